"""One forward and one activation backward of a pack; out come the LoRA gradients of each of its examples.

For a LoRA linear `y = W x + s B (A x)` with `h_t = A x_t` and `u_t = B^T g_t` (g: gradient of y):

    forward   [y | h | z] = x [W + sBA | A | R_in]^T      one pass over x
    backward  [dx | u | y'] = g [W + sBA | B | R_out]     one pass over g
    per example e:  R_out^T dB_e = s sum_t y'_t h_t^T,    dA_e R_in = s sum_t u_t z_t^T

The base is frozen and so are the factors while the engine is open: no weight gradient is formed, the factors can be
folded into the base weight, and `(T, r + p)` numbers a module are all that is kept for the backward.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from influence_fast.data.packing import IGNORED, Pack, pack_examples, teaches, text_config
from influence_fast.errors import ConfigError, ModelError, listing, say_once
from influence_fast.gradients import attention, backends, fp8, graphs
from influence_fast.gradients.autograd_parameters import AutogradParameters, Part, parameter_parts
from influence_fast.gradients.fused_layers import Fused, fused, overridden
from influence_fast.gradients.input_groups import InputGroup, replaced_forward
from influence_fast.gradients.lora import (
    LayoutEntry,
    LoraLinear,
    find_lora_linears,
    in_top_layers,
    layout_of,
    other_targets,
)
from influence_fast.gradients.lora_parameters import LoraParameter
from influence_fast.gradients.loss import CompletionLoss, drawn_tokens
from influence_fast.gradients.memory import layer_bytes
from influence_fast.gradients.projection import SIDED_KINDS, Projection
from influence_fast.gradients.reduction import FullReducer, ProjectedReducer, Reducer
from influence_fast.gradients.referee import Referee, Tolerance, decoder_of
from influence_fast.gradients.routed_modules import routed_modules
from influence_fast.gradients.row_sketch import segment_sums
from influence_fast.gradients.separation import Separation
from influence_fast.gradients.step_inputs import StepInputs, StepShape
from influence_fast.gradients.transfer import to_device

logger = logging.getLogger(__name__)

_PROBED = 24  # tokens: each of 128 experts of which a token takes 8 meets one or two
# Share of a card's free memory that kept activations may fill: gradients inside a layer, and fragments, need the rest.
_ROOM = 0.8
# Of the user's own data, what is compared with plain forwards. At 2,048 tokens the logits of a vocabulary of 152k take
# 0.6 GB in 16 bits; 4 forwards of a build of 1,000 examples are a thousandth of it.
_COMPARED_EXAMPLES, _COMPARED_TOKENS = 4, 2048
# Heads that do more than a matrix product; their logits are taken from the model itself. Named, since two tokens of an
# untrained model need not show it (softcapping); what has no name here is found by trying.
_HEAD_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class GradientEngine:
    """Opens a peft model for per-example gradients; use as a context manager.

    While open, the LoRA layers' forwards are replaced, dropout is off and no parameter asks for a gradient;
    everything is put back on exit. The factors must not change while the engine is open.

    `reducer`, a function of the model's LoRA linears and their row layout, makes something else of each module's
    tokens than gradient rows (see `streaming`). With `bf16_rows` the kernels may write rows in bf16.
    `precision`: "auto", products with the base weights in the model's own dtype, or "fp8", those of the LoRA linears in
    8 bits (see `fp8`; ConfigError on entry where that cannot be).
    `cuda_graphs`: replay recorded steps in place of launching each operation (see `graphs`). By default wherever they
    can be and the environment does not forbid it; with True, ConfigError where they cannot.
    """

    def __init__(
        self,
        model: Any,
        projection: Projection | None,
        loss_reduction: str = "mean",
        backend: str | None = None,
        reducer: Callable[[list[LoraLinear], list[LayoutEntry]], Reducer] | None = None,
        bf16_rows: bool = False,
        precision: str = fp8.AUTO,
        cuda_graphs: bool | None = None,
    ) -> None:
        fp8.check_precision(precision)
        if loss_reduction not in ("mean", "sum"):
            raise ConfigError(f"loss_reduction must be 'mean' or 'sum', not {loss_reduction!r}")
        self.model = model
        self.loss_reduction = loss_reduction
        self.precision = precision
        self.linears = in_top_layers(find_lora_linears(model), projection)
        weight = self.linears[0].weight
        self.device = weight.device
        self.backend, self.backend_why = backends.choose(backend, weight.device, weight.dtype)
        layout = layout_of(self.linears, projection)
        if reducer is not None:
            self.reducer = reducer(self.linears, layout)
        else:
            kind = None if projection is None else projection.kind
            reducer_class = ProjectedReducer if kind in SIDED_KINDS else FullReducer
            self.reducer = reducer_class(self.linears, layout, projection)
        self.reducer.triton = self.backend == "triton"
        self.reducer.bf16_rows = bf16_rows
        self.base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = decoder_of(self.base)
        self.head = self.base.get_output_embeddings()
        self.mode = Separation(True)
        self.referee: Referee | None = None  # while open; None for a model without numbers
        self._graphs_asked_for = cuda_graphs is True
        wanted = graphs.wanted() if cuda_graphs is None else cuda_graphs
        self._graphs_wanted = wanted is True
        self.cuda_graphs = wanted is not False
        if self.cuda_graphs and (why := self._not_recordable()):
            self._leave_graphs(why)
        self._graphs: graphs.StepGraphs | None = None
        self._stack = contextlib.ExitStack()
        self._groups: list[InputGroup] = []
        self._parameters: list[Part] = []
        self._routed: set[int] = set()  # places of LoRA linears inside routed experts
        self._fused_layers = Fused()
        self.compared = False  # whether data of the user's own were
        self._given: list[tuple[Any, Any]] = []  # modules whose forward is replaced, and their own
        self._layers: list[Any] = []  # those that can be computed again in the backward, and are not already
        self.room = _free_bytes(self.device)
        self._whole_model_logits = type(self.head) is not nn.Linear or any(
            getattr(text_config(self.base.config), name, None) not in (None, 1, 1.0) for name in _HEAD_TRANSFORMS
        )

    @property
    def packs_are_separate(self) -> bool:
        """Whether several examples go in one pack; else one at a time."""
        return self.mode.packs_pay

    @property
    def own_attention(self) -> bool:
        """Whether the model keeps its own attention and mask."""
        return self.mode.own_attention

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.reducer.width

    def __enter__(self) -> GradientEngine:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_frozen(self.model))
            weights: list[fp8.Fp8Weight | None] = [None] * len(self.linears)
            if self.precision == fp8.FP8:
                plain = [n for n, linear in enumerate(self.linears) if not isinstance(linear, LoraParameter)]
                eights = fp8.weights_of([self.linears[n] for n in plain], self.backend == "triton")
                for n, eight in zip(plain, eights, strict=True):
                    weights[n] = eight
                self.room = _free_bytes(self.device)  # less the copies
            self._layers = stack.enter_context(_recomputable(self.base)) if self.room is not None else []
            self._given_implementation = self.decoder.config._attn_implementation
            forwards = {module: vars(module).get("forward") for module in self.base.modules()}
            stack.enter_context(self._settled())
            inputs, calls = self._probe()
            self._groups = self._group(inputs, weights)
            members = [(n, linear) for n, linear in enumerate(self.linears) if isinstance(linear, LoraParameter)]
            self._parameters = parameter_parts(members, calls, self.reducer)
            self._take_one_at_a_time()
            for part in self._parameters:
                stack.enter_context(part.opened())
            for group in self._groups:
                for place, member in enumerate(group.members):
                    stack.enter_context(replaced_forward(member.layer, group, place))
            if self.backend == "triton":
                self._fused_layers = stack.enter_context(fused(self.base, self.linears[0].weight.dtype))
            self._given = [(m, own) for m, own in forwards.items() if vars(m).get("forward") is not own]
            self._compare()
            if not self._graphs_wanted and self._kept(1) is None:
                self.cuda_graphs = False  # a second pack's activations might not fit, and nothing would say so before
            if self.cuda_graphs:
                self._graphs = graphs.StepGraphs(self._step, self.device, graphs.CudaRecorder(self.device))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._graphs = None
        self._stack.close()
        self._groups, self._parameters, self._given, self.referee = [], [], [], None

    def run(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients and losses of a pack: rows [E, k], losses [E] (reduced as the gradients are).

        On a card it returns as soon as all is queued; nothing in it waits for the card. A pack whose activations would
        not fit in the card's free memory has its layers computed again in the backward (docs/memory.md).
        """
        if self._graphs is None:
            return self._step(self._inputs(pack).to(self.device), self.overflows(len(pack.input_ids)))
        shape, examples = StepShape.of(pack), len(pack.indices)
        inputs = self._inputs(pack, shape)
        if not self.overflows(2 * shape.tokens):  # the memory of recorded steps is theirs alone
            return self._graphs.run(shape, inputs, examples)
        rows, losses = self._step(inputs.to(self.device), self.overflows(shape.tokens + self._graphs.most_tokens))
        return rows[:examples], losses[:examples]

    def _inputs(self, pack: Pack, shape: StepShape | None = None) -> StepInputs:
        """What `_step` needs of a pack, on the host."""
        return StepInputs.of(
            pack, self.loss_reduction, self.reducer.dtype, triton=self.backend == "triton", shape=shape
        )

    def _step(self, inputs: StepInputs, recompute: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and losses of inputs on the device; a function of their numbers that reads none on the host."""
        self.reducer.begin(inputs.tokens.cu_seqlens, inputs.segments)
        anchor = torch.empty((), device=self.device, requires_grad=True)
        for part in self._parts:
            part.anchor = anchor
        for parameters in self._parameters:
            parameters.begin()
        with torch.enable_grad(), _recomputing(self._layers if recompute else []):
            loss, losses = self._loss(inputs)
            if not loss.requires_grad:
                raise ModelError(
                    f"{type(self.base).__name__}: no gradient reaches the LoRA layers, as where a model computes its "
                    "layers in a backward of its own (reversible layers, reentrant checkpointing): call "
                    "gradient_checkpointing_disable(), or choose another model"
                )
            with attention.unchanged_order():
                loss.backward()
        for part in self._parts:
            part.anchor = None
        for parameters in self._parameters:
            parameters.collect()
        return self.reducer.finish(), losses

    @property
    def _parts(self) -> list[InputGroup | Part]:
        """All that computes LoRA modules' products."""
        return [*self._groups, *self._parameters]

    def overflows(self, tokens: int) -> bool:
        """Whether what the layers keep of so many tokens is more than `room`; unknown models are taken to fit."""
        kept = self._kept(tokens)
        return kept is not None and self.room is not None and kept > _ROOM * self.room

    def _kept(self, tokens: int) -> float | None:
        """Bytes that the layers keep of so many tokens; None where that is not known."""
        if not self._layers:
            return None
        columns = max(max(part.columns) for part in self._parts)
        inputs, w = self.reducer.needs_input, self.linears[0].weight.element_size()
        try:
            layer = layer_bytes(
                text_config(self.base.config),
                weight_bytes=w,
                columns=columns,
                inputs=inputs,
                fused_norms=self._fused_layers.norms,
                fused_mlp=self._fused_layers.mlps,
            )
        except ConfigError:
            return None
        return tokens * layer * len(self._layers)

    @torch.no_grad()
    def losses(self, pack: Pack) -> torch.Tensor:
        """Losses of a pack [E], without a backward pass."""
        inputs = StepInputs.of(pack, self.loss_reduction, self.reducer.dtype, triton=False)  # nothing is summed
        return self._loss(inputs.to(self.device))[1]

    @torch.no_grad()
    def draw(self, pack: Pack, uniform: torch.Tensor) -> torch.Tensor:
        """A token from the model's prediction of each that the loss counts [n] int64, by uniform numbers [n]."""
        inputs = StepInputs.of(pack, self.loss_reduction, self.reducer.dtype, triton=False).to(self.device)
        return drawn_tokens(*self._hidden(inputs), to_device(uniform, self.device))

    def _loss(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The pack's summed loss, to differentiate, and the loss of each example [E]."""
        hidden, weight, bias = self._hidden(inputs)
        triton = self.backend == "triton"
        loss, token_losses = CompletionLoss.apply(hidden, weight, bias, inputs.targets, inputs.weights, triton)
        return loss, segment_sums(token_losses * inputs.weights, inputs.edges)

    def _hidden(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What the loss needs: the last hidden states of the completion tokens, the head's weight and bias; or their
        logits and no weight, where the model's head is more than that."""
        try:
            found = self._call(self.base if self._whole_model_logits else self.decoder, inputs.tokens)
        finally:
            for part in self._parts:
                part.forget()
        if self._whole_model_logits:
            return found.logits[0, inputs.positions], None, None
        hidden = found.last_hidden_state[0, inputs.positions]
        return hidden, self.head.weight.detach(), None if self.head.bias is None else self.head.bias.detach()

    def _call(self, module: nn.Module, tokens: attention.PackedTokens, **kwargs: Any) -> Any:
        implementation = self.decoder.config._attn_implementation
        return attention.call(
            module,
            implementation,
            tokens,
            with_bounds=self.mode.takes_bounds,
            with_positions=not self.mode.own_attention,
            **kwargs,
        )

    @property
    def _computes(self) -> bool:
        """Whether there are numbers to compare: kernels that are only listed (`runtime.recording`) give none."""
        if self.backend != "triton":
            return True
        from influence_fast.kernels.runtime import is_recording

        return not is_recording()

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """While the block runs, the model's attention is the fastest that agrees with the plain forward."""
        if self.device.type == "meta":  # a model without numbers, of which nothing but shapes is asked
            with attention.packed(self.base, self.decoder.config):
                self.mode = Separation(self.decoder.config._attn_implementation not in attention.REPLACED)
                yield
            return
        self.referee = Referee(self.base, self.decoder, self.device)
        if not self._whole_model_logits and self.referee.usable:
            self._whole_model_logits = not self.referee.head_is_a_product(self.head)
        with self.referee.settled(self._whole_model_logits) as self.mode:
            yield

    @torch.no_grad()
    def _compare(self) -> None:
        """Raise ModelError where this engine's outputs or losses of a few texts are not those of the plain forward."""
        referee = self.referee
        if referee is None or not self._computes:
            return
        referee.as_given = self.as_given
        if self.precision == fp8.FP8:
            referee.tolerance = Tolerance.of(self.linears[0].weight.dtype, self.device, fp8=True)
        seen: list[torch.Tensor] = []
        module = self.base if self._whole_model_logits else self.decoder
        handle = module.register_forward_hook(lambda _, __, output: seen.append(_outputs(output)))
        errors, losses, wanted, texts = [], [], [], []
        try:
            for pack in referee.packs(self.packs_are_separate):
                if len(pack.input_ids) == 1:
                    continue  # a text of one token has no loss
                found = self.losses(pack).tolist()
                errors += referee.errors(pack, seen.pop(), self._whole_model_logits)
                for place, loss in zip(pack.indices, found, strict=True):
                    text = referee.texts[place]
                    if text.loss is not None:
                        losses.append(loss / (len(text.ids) - 1) if self.loss_reduction == "sum" else loss)
                        wanted.append(text.loss)
                        texts.append((text.ids, text.labels))
        finally:
            handle.remove()
        if not referee.accepts(errors):
            raise self._refusal(max(errors))
        agreeing = referee.losses_agree(losses, wanted, texts) if referee.usable else [True]
        if not all(agreeing):
            raise self._refusal(max(abs(a - b) for a, b in zip(losses, wanted, strict=True)))

    def compare_losses(self, pack: Pack, losses: torch.Tensor, names: Sequence[str]) -> None:
        """Raise ModelError where losses [E] of a pack, as `run` gives them, are not those of the plain forward.

        names: the pack's examples, for the message. Costs a plain forward an example, of at most 4 examples and 2,048
        tokens of the pack; where its first example is longer, of that one's first 2,048 tokens.
        """
        if self.referee is None or not self._computes:
            return
        texts = _first_texts(pack)
        ours = losses[: len(texts)].tolist()
        if len(texts[0][0]) < pack.lengths[0]:
            cut = pack_examples([{"input_ids": ids, "labels": labels} for ids, labels in texts], _COMPARED_TOKENS)
            ours = self.losses(cut[0]).tolist()
        if self.loss_reduction == "sum":
            counts = [int((labels[1:] != IGNORED).sum()) for _, labels in texts]
            ours = [loss / count for loss, count in zip(ours, counts, strict=True)]
        plain = self.referee.plain_losses(texts)
        agreeing = self.referee.losses_agree(ours, plain, texts)
        if all(agreeing):
            return
        found = zip(names, ours, plain, agreeing, strict=False)
        differing = [f"{name} (loss {a:.6g}, plain {b:.6g})" for name, a, b, same in found if not same]
        remedy = self._remedy() or (
            "take one example at a time (max_tokens=1)"
            if self.packs_are_separate and len(pack.indices) > 1
            else "load the model with attn_implementation='eager', or in float32"
        )
        raise ModelError(
            f"{self.referee.name}: the engine's mean losses are not those of the model's own forward for "
            f"{listing(differing)}: {remedy}"
        )

    def _remedy(self) -> str:
        """What to change where the engine's numbers are not the model's; empty where it is not known."""
        if self.precision == fp8.FP8:
            return "leave precision at 'auto'"
        return "pass backend='torch'" if self.backend == "triton" else ""

    def _refusal(self, error: float) -> ModelError:
        assert self.referee is not None
        module = self.base if self._whole_model_logits else self.decoder

        def ours(pack: Pack) -> None:
            self._call(module, attention.PackedTokens.of(pack).to(self.device))
            for part in self._parts:
                part.forget()

        return self.referee.refusal(ours, error, self._remedy())

    @contextlib.contextmanager
    def as_given(self) -> Iterator[None]:
        """While the block runs, the model has the forwards and the attention that it was given with; dropout is off."""
        ours = [(module, vars(module).pop("forward")) for module, _ in self._given]
        implementation = self.decoder.config._attn_implementation
        try:
            for module, own in self._given:
                if own is not None:
                    module.forward = own
            with attention.implementation(self.base, implementation, self._given_implementation):
                yield
        finally:
            for module, forward in ours:
                module.forward = forward

    def _probe(self) -> tuple[dict[int, torch.Tensor], dict[nn.Module, tuple[Any, ...]]]:
        """Run a few tokens; return each LoRA linear's input, and what wrappers of parameters were called with."""
        implementation = self.decoder.config._attn_implementation
        module = self.base if self._whole_model_logits else self.decoder
        inputs: dict[int, torch.Tensor] = {}
        calls = [0] * len(self.linears)
        wrapped: dict[nn.Module, tuple[Any, ...]] = {}

        def called(n: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
            calls[n] += 1
            if isinstance(self.linears[n], LoraParameter):
                wrapped[layer] = args
            else:
                inputs[n] = args[0]

        handles = [
            member.layer.register_forward_pre_hook(lambda layer, args, n=n: called(n, layer, args))
            for n, member in enumerate(self.linears)
        ]
        ids = self._probe_tokens()
        pack = Pack([0], ids, torch.arange(len(ids)), ids, [0, len(ids)])
        tokens = attention.PackedTokens.of(pack).to(self.device)
        seen: list[bool] = []
        try:
            with torch.no_grad():
                self._call(module, tokens, packed_probe=seen)
        finally:
            for handle in handles:
                handle.remove()
        names = [member.name for member in self.linears]
        strange = {n for n, x in inputs.items() if x.numel() != len(ids) * self.linears[n].d_in}
        uncalled = {n for n, count in enumerate(calls) if not count}
        self._routed = routed_modules(names, strange, uncalled)
        if self.cuda_graphs and (not self.packs_are_separate or self._routed):
            self._leave_graphs("the examples of a pack would see each other in this model")
        if self.cuda_graphs and max(calls) > 1:
            self._leave_graphs(
                "a LoRA layer is called more than once, and its sums take each pack's bounds on the host"
            )
        if self.cuda_graphs and implementation == attention.PACKED and not all(seen):
            self._leave_graphs(
                "this model's attention runs an example at a time (it takes a 16-bit model, with heads of up to "
                "256 numbers in multiples of 8)"
            )
        unused = [names[n] for n in sorted(uncalled - self._routed)]
        if unused:
            raise ModelError(
                f"{unused[0]}: the model's forward on text never calls this LoRA layer, which has no gradient; leave "
                f"it out of target_modules{other_targets(names, unused)}"
            )
        return inputs, wrapped

    def _probe_tokens(self) -> torch.Tensor:
        """The tokens [n] int64 of `_probe`: enough that a router spreads them."""
        if self.referee is None:
            return torch.zeros(2, dtype=torch.int64)
        return max((text.ids for text in self.referee.texts), key=len)[:_PROBED]

    def _take_one_at_a_time(self) -> None:
        """Pack nothing where it is not known which example a routed row belongs to."""
        autograd = [part for part in self._parameters if isinstance(part, AutogradParameters)]
        if not self.mode.apart or not (autograd or self._routed):
            return
        self.mode = replace(self.mode, apart=False)
        name = autograd[0].members[0][1].name if autograd else self.linears[min(self._routed)].name
        say_once(logger, f"{name}: examples go one at a time (not every token of a pack comes here in its order)")

    def _leave_graphs(self, why: str) -> None:
        """No CUDA graphs: ConfigError if this call asked for them, a warning if the environment did."""
        if self._graphs_asked_for:
            raise ConfigError(f"cuda_graphs: CUDA graphs cannot be used: {why}; leave them off")
        if self._graphs_wanted:
            say_once(graphs.logger, f"{graphs.VARIABLE}: CUDA graphs are not used here: {why}")
        self.cuda_graphs = False

    def _not_recordable(self) -> str:
        """Why no step of this engine can be a CUDA graph; empty if it may be."""
        if _recomputes(self.base):
            return "the model has gradient checkpointing switched on, which asks for the state of random numbers"
        if self.backend != "triton":
            return f"the backend is not triton but {self.backend} ({self.backend_why})"
        if self.device.type != "cuda":
            return f"the model is not on a CUDA device but on {self.device.type}"
        if any(isinstance(linear, LoraParameter) for linear in self.linears):
            return "LoRA on parameters of experts is summed by each pack's own routing"
        if any(linear.sharded for linear in self.linears):
            return "the base weights are spread over processes (FSDP), which exchange them in every step"
        if not self.reducer.recordable:
            return "these gradients are summed by PyTorch, with each pack's bounds on the host"
        return ""

    def _group(self, inputs: dict[int, torch.Tensor], fp8_weights: list[fp8.Fp8Weight | None]) -> list[InputGroup]:
        by_input: dict[int, list[int]] = {}
        for n, linear in enumerate(self.linears):
            if not isinstance(linear, LoraParameter):  # an expert that no probed token met is a group of its own
                by_input.setdefault(id(inputs.get(n, linear)), []).append(n)
        groups = []
        for numbers in by_input.values():
            members = [self.linears[n] for n in numbers]
            # Folding s B A into a 16-bit weight would round the adapter away; on a card the second copy of the
            # weights would cost more than it saves.
            # Sharded weights (FSDP2) are whole only inside their own layer's forward and backward: nothing to fold.
            weight, triton = members[0].weight, self.backend == "triton"
            wide = weight.dtype in (torch.float32, torch.float64)
            fused = wide and weight.device.type == "cpu" and not triton and not members[0].sharded
            fused = fused and self.precision != fp8.FP8  # a folded weight would round the adapter too
            eights = [fp8_weights[n] for n in numbers]
            routed = not self._routed.isdisjoint(numbers)
            groups.append(InputGroup(members, numbers, self.reducer, fused, triton, eights, routed))
        return groups


def _first_texts(pack: Pack) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (input_ids [n], labels [n]) of the first examples of a pack to compare; of a longer one its beginning."""
    texts: list[tuple[torch.Tensor, torch.Tensor]] = []
    tokens = 0
    for start, end in pairwise(pack.cu_seqlens[: _COMPARED_EXAMPLES + 1]):
        if texts and tokens + end - start > _COMPARED_TOKENS:
            break
        ids, targets = pack.input_ids[start:end], pack.targets[start:end]
        labels = torch.cat([targets.new_tensor([IGNORED]), targets[:-1]])
        if len(ids) > _COMPARED_TOKENS:
            ids, labels = ids[:_COMPARED_TOKENS], labels[:_COMPARED_TOKENS]
            labels = labels if teaches(labels) else torch.where(labels == IGNORED, ids, labels)
        texts.append((ids, labels))
        tokens += len(ids)
    return texts


def _outputs(output: Any) -> torch.Tensor:
    """[T, d]: the last hidden states, or the logits of a whole model."""
    hidden = getattr(output, "last_hidden_state", None)
    found: torch.Tensor = (output.logits if hidden is None else hidden)[0]
    return found


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    training = {module: module.training for module in model.modules()}
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for module in model.modules():
            # such a layer recomputes only while training; its own flag touches nothing else
            if isinstance(module, GradientCheckpointingLayer):
                module.training = bool(getattr(module, "gradient_checkpointing", False))
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
        for module, flag in training.items():
            module.training = flag


def _free_bytes(device: torch.device) -> int | None:
    """What a card has left, PyTorch's own cache counted as free; None for the CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _recomputes(base: Any) -> bool:
    """Whether the model has its own gradient checkpointing switched on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


@contextlib.contextmanager
def _recomputable(base: Any) -> Iterator[list[Any]]:
    """The layers that `_recomputing` can switch; none where the model does so already, or cannot."""
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if _recomputes(base) or not getattr(base, "supports_gradient_checkpointing", False):
        yield []
        return
    # Set here and not by the model's own switch, which would make the embedding's output ask for a gradient too and
    # leave that behind. Nothing is random with dropout off.
    how = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(overridden(layer, "_gradient_checkpointing_func", how))
        yield layers


@contextlib.contextmanager
def _recomputing(layers: list[Any]) -> Iterator[None]:
    try:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = True
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False
