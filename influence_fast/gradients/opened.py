"""What is true of a model that is open for gradients: one frozen value, made once by `open_model`.

How it is called (packed, one example at a time, or with its own attention), which LoRA linears read the same tensor,
whether the logits of the whole model are needed, which layers can be recomputed in the backward, why its steps cannot
be CUDA graphs, and the plain forward that all of it is compared with.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from influence_fast.data.packing import Pack, text_config
from influence_fast.errors import ConfigError, ModelError
from influence_fast.gradients import attention, fp8
from influence_fast.gradients.frozen import frozen, recomputable_layers, recomputes
from influence_fast.gradients.fused_layers import Fused, fused
from influence_fast.gradients.input_groups import InputGroup, replaced_forward
from influence_fast.gradients.lora import LoraLinear, other_targets
from influence_fast.gradients.memory import layer_bytes
from influence_fast.gradients.reduction import Reducer
from influence_fast.gradients.referee import Referee, decoder_of
from influence_fast.gradients.separation import Separation
from influence_fast.gradients.tolerance import Tolerance

# Heads that do more than a matrix product; their logits are taken from the model itself. Named, since two tokens of an
# untrained model need not show it (softcapping); what has no name here is found by trying.
_HEAD_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True, eq=False)
class GivenModel:
    """Remember the forwards and the attention that a model had before it was opened.

    replaced: modules whose forward is another while the model is open, and their own instance's one, or None.
    """

    base: Any
    decoder: Any
    replaced: Sequence[tuple[Any, Any]]
    implementation: str | None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """While the block runs, the model has the forwards and the attention that it was given with; dropout is off."""
        ours = [(module, vars(module).pop("forward")) for module, _ in self.replaced]
        implementation = self.decoder.config._attn_implementation
        try:
            for module, own in self.replaced:
                if own is not None:
                    module.forward = own
            with attention.implementation(self.base, implementation, self.implementation):
                yield
        finally:
            for module, forward in ours:
                module.forward = forward


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """Hold what is true of a model while it is open.

    Attributes:
        base: the causal LM, without a peft wrapper around it.
        decoder: the part of it that gives the last hidden states.
        head: the module that makes logits of them.
        linears: the linears whose gradients are taken.
        groups: the same by the tensor that they read.
        whole_model_logits: whether logits come from the whole model; else they are the head's product.
        mode: how the model is called.
        recomputable: layers that can be recomputed in the backward, and are not already; none on the CPU.
        why_no_graphs: why no step of it can be a CUDA graph; empty if it may be.
        room: free bytes of its GPU before anything was kept; None for the CPU.
        given: how to have it as it was given.
        referee: its own plain outputs; None for a model without numbers (on the meta device).
        fused_layers: which kinds of modules the Triton kernels compute.
        backend: "triton" or "torch".
        precision: "auto" or "fp8".
    """

    base: Any
    decoder: Any
    head: Any
    linears: Sequence[LoraLinear]
    groups: Sequence[InputGroup]
    whole_model_logits: bool
    mode: Separation
    recomputable: Sequence[Any]
    why_no_graphs: str
    room: int | None
    given: GivenModel
    referee: Referee | None
    fused_layers: Fused
    backend: str
    precision: str

    @property
    def device(self) -> torch.device:
        """The device that packs go to."""
        return self.linears[0].device

    @property
    def module(self) -> Any:
        """What a pack is passed through: the whole model, or its decoder."""
        return self.base if self.whole_model_logits else self.decoder

    def call(self, tokens: attention.PackedTokens) -> Any:
        """Pass a pack on the device through `module` and return its output."""
        return _call(self.module, self.decoder.config, self.mode, tokens)

    def kept_bytes(self, tokens: int) -> float | None:
        """Return how many bytes the layers keep of so many tokens; None where that is not known."""
        if not self.recomputable:
            return None
        columns = max(max(group.columns) for group in self.groups)
        inputs, w = self.groups[0].reducer.needs_input, self.linears[0].dtype.itemsize
        try:
            layer = layer_bytes(
                text_config(self.base.config),
                weight_bytes=w,
                columns=columns,
                inputs=inputs,
                fused_norms=self.fused_layers.norms,
                fused_mlp=self.fused_layers.mlps,
            )
        except ConfigError:
            return None
        return tokens * layer * len(self.recomputable)


def base_of(model: Any) -> Any:
    """Return the causal LM that a peft model wraps, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def open_model(
    model: Any,
    linears: Sequence[LoraLinear],
    reducer: Reducer,
    backend: str,
    precision: str = fp8.AUTO,
    why_no_graphs: str = "",
) -> Iterator[OpenedModel]:
    """Open a model for gradients of `linears` while the block runs; yields what is true of it.

    The LoRA layers' forwards are replaced, dropout is off and no parameter asks for a gradient; all is put back
    afterwards. Nothing is compared yet (`comparison.compare_opened`). `why_no_graphs` is what `not_recordable` said.

    Raises ModelError where the model cannot be called, or a LoRA layer of it has no gradient of its own.
    """
    base, triton = base_of(model), backend == "triton"
    decoder, head, first = decoder_of(base), base.get_output_embeddings(), linears[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        weights: list[fp8.Fp8Weight | None] = [None] * len(linears)
        room = free_bytes(first.device)
        if precision == fp8.FP8:
            weights = fp8.weights_of(list(linears), triton)
            room = free_bytes(first.device)  # less the copies
        recomputable = stack.enter_context(recomputable_layers(base)) if room is not None else []
        implementation = decoder.config._attn_implementation
        forwards = {module: vars(module).get("forward") for module in base.modules()}
        whole, mode, referee = stack.enter_context(_settled(base, decoder, head, linears))
        call = functools.partial(_call, base if whole else decoder, decoder.config, mode)
        inputs, why = _probe(call, linears, mode, decoder.config._attn_implementation)
        groups = _groups(linears, inputs, reducer, weights, triton, precision)
        for group in groups:
            for place, member in enumerate(group.members):
                stack.enter_context(replaced_forward(member.layer, group, place))
        fused_layers = stack.enter_context(fused(base, first.dtype)) if triton else Fused()
        replaced = [(module, own) for module, own in forwards.items() if vars(module).get("forward") is not own]
        given = GivenModel(base, decoder, replaced, implementation)
        if referee is not None:
            referee.as_given = given.restored
            if precision == fp8.FP8:
                referee.tolerance = Tolerance.of(first.dtype, first.device, fp8=True)
        yield OpenedModel(
            base=base,
            decoder=decoder,
            head=head,
            linears=linears,
            groups=groups,
            whole_model_logits=whole,
            mode=mode,
            recomputable=recomputable,
            why_no_graphs=why_no_graphs or why,
            room=room,
            given=given,
            referee=referee,
            fused_layers=fused_layers,
            backend=backend,
            precision=precision,
        )


def not_recordable(base: Any, linears: Sequence[LoraLinear], reducer: Reducer, backend: str, why: str) -> str:
    """Tell why no step of a model can be a CUDA graph, as far as is known before it is opened; empty if it may be.

    why: why that backend was chosen.
    """
    device = linears[0].device
    if recomputes(base):
        return "the model has gradient checkpointing switched on, which asks for the state of random numbers"
    if backend != "triton":
        return f"the backend is not triton but {backend} ({why})"
    if device.type != "cuda":
        return f"the model is not on a CUDA device but on {device.type}"
    if any(linear.sharded for linear in linears):
        return "the base weights are spread over processes (FSDP), which exchange them in every step"
    if not reducer.recordable:
        return "these gradients are summed by PyTorch, with each pack's bounds on the host"
    return ""


def free_bytes(device: torch.device) -> int | None:
    """Return what a GPU has left, PyTorch's own cache counted as free; None for the CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _call(module: Any, config: Any, mode: Separation, tokens: attention.PackedTokens, **kwargs: Any) -> Any:
    return attention.call(
        module,
        config._attn_implementation,
        tokens,
        with_bounds=mode.takes_bounds,
        with_positions=not mode.own_attention,
        **kwargs,
    )


@contextlib.contextmanager
def _settled(
    base: Any, decoder: Any, head: Any, linears: Sequence[LoraLinear]
) -> Iterator[tuple[bool, Separation, Referee | None]]:
    """While the block runs, the model's attention is the fastest that agrees with the plain forward.

    Yields whether the whole model's logits are needed, how to call it, and the plain outputs.
    """
    device = linears[0].device
    asked = any(linear.layer is head for linear in linears)  # whose own forward is to be called
    whole = (
        type(head) is not nn.Linear
        or asked
        or any(getattr(text_config(base.config), name, None) not in (None, 1, 1.0) for name in _HEAD_TRANSFORMS)
    )
    if device.type == "meta":  # a model without numbers, of which nothing but shapes is asked
        with attention.packed(base, decoder.config):
            yield whole, Separation(decoder.config._attn_implementation not in attention.REPLACED), None
        return
    referee = Referee(base, decoder, device)
    if not whole and referee.usable:
        whole = not referee.head_is_a_product(head)
    with referee.settled(whole) as mode:
        yield whole, mode, referee


def _probe(
    call: Callable[..., Any], linears: Sequence[LoraLinear], mode: Separation, implementation: str | None
) -> tuple[dict[int, torch.Tensor], str]:
    """Run two tokens to learn which LoRA linears share an input, and why no step can be a CUDA graph."""
    inputs: dict[int, torch.Tensor] = {}
    calls = [0] * len(linears)

    def called(n: int, x: torch.Tensor) -> None:
        inputs[n] = x
        calls[n] += 1

    handles = [
        member.layer.register_forward_pre_hook(lambda _, args, n=n: called(n, args[0]))
        for n, member in enumerate(linears)
    ]
    two = torch.zeros(2, dtype=torch.int64)
    tokens = attention.PackedTokens.of(Pack([0], two, torch.arange(2), two, [0, 2])).to(linears[0].device)
    seen: list[bool] = []
    try:
        with torch.no_grad():
            call(tokens, packed_probe=seen)
    finally:
        for handle in handles:
            handle.remove()
    _check_inputs(inputs, linears)
    why = ""
    if not mode.packs_pay:
        why = "the examples of a pack would see each other in this model"
    elif max(calls) > 1:
        why = "a LoRA layer is called more than once, and its sums take each pack's bounds on the host"
    elif implementation == attention.PACKED and not all(seen):
        why = (
            "this model's attention runs an example at a time (it takes a 16-bit model, with heads of up to 256 "
            "numbers in multiples of 8)"
        )
    return inputs, why


def _check_inputs(inputs: dict[int, torch.Tensor], linears: Sequence[LoraLinear]) -> None:
    """Raise ModelError for a LoRA layer that saw no tokens, or others than the two that were passed."""
    unused = [m.name for n, m in enumerate(linears) if n not in inputs]
    if unused:
        targets = other_targets([member.name for member in linears], unused, linears[0].named_by)
        raise ModelError(
            f"{unused[0]}: the model's forward on text never calls this layer, which has no gradient; leave "
            f"it out of {linears[0].named_by}{targets}"
        )
    strange = [n for n, x in inputs.items() if x.numel() != 2 * linears[n].d_in]
    if strange:
        x, names = inputs[strange[0]], [linears[n].name for n in strange]
        raise ModelError(
            f"{names[0]}: sees {x.numel() // x.shape[-1]} tokens of 2 (a routed expert?); leave it out of "
            f"{linears[0].named_by}{other_targets([member.name for member in linears], names, linears[0].named_by)}"
        )


def _groups(
    linears: Sequence[LoraLinear],
    inputs: dict[int, torch.Tensor],
    reducer: Reducer,
    fp8_weights: Sequence[fp8.Fp8Weight | None],
    triton: bool,
    precision: str,
) -> list[InputGroup]:
    """Group LoRA linears by the tensor that they read."""
    by_input: dict[int, list[int]] = {}
    for n in range(len(linears)):
        by_input.setdefault(id(inputs[n]), []).append(n)
    groups = []
    for numbers in by_input.values():
        members = [linears[n] for n in numbers]
        eights = [fp8_weights[n] for n in numbers]
        # Folding s B A into a 16-bit weight would round the adapter away, and so would folding it into an 8-bit one; on
        # a GPU the second copy of the weights would cost more than it saves.
        # Sharded weights (FSDP2) are whole only inside their own layer's forward and backward: nothing to fold.
        first = members[0]
        wide = first.dtype in (torch.float32, torch.float64)
        folds = wide and first.device.type == "cpu" and not triton and not first.sharded and precision != fp8.FP8
        groups.append(InputGroup(members, numbers, reducer, folds, triton, eights))
    return groups
