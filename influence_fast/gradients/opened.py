"""What is true of a model that is open for gradients: one frozen value, made once by `open_model`.

How it is called (packed, one example at a time, or with its own attention), which LoRA linears read the same tensor,
whether the logits of the whole model are needed, which layers can be recomputed in the backward, why its steps cannot
be CUDA graphs, and the plain forward that all of it is compared with.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from influence_fast.data.packing import Pack, text_config
from influence_fast.errors import ConfigError, ModelError, listing, say_once
from influence_fast.gradients import attention, fp8, quantized
from influence_fast.gradients.autograd_parameters import AutogradParameters, Part, SplitModule, parameter_parts
from influence_fast.gradients.backends import Torch
from influence_fast.gradients.frozen import frozen, recomputable_layers, recomputes
from influence_fast.gradients.fused_layers import Fused
from influence_fast.gradients.given import GivenModel
from influence_fast.gradients.input_groups import InputGroup, Product, replaced_forward
from influence_fast.gradients.lora import LoraLinear
from influence_fast.gradients.lora_bases import other_targets
from influence_fast.gradients.lora_parameters import LoraParameter
from influence_fast.gradients.memory import layer_bytes
from influence_fast.gradients.reduction import Reducer
from influence_fast.gradients.referee import Referee, decoder_of
from influence_fast.gradients.routed import RoutedExperts
from influence_fast.gradients.routed_modules import routed_modules
from influence_fast.gradients.separation import Separation
from influence_fast.gradients.token_order import out_of_order
from influence_fast.gradients.tolerance import Tolerance

logger = logging.getLogger(__name__)

_PROBED = 24  # tokens: each of 128 experts of which a token takes 8 meets one or two
# Heads that do more than a matrix product; their logits are taken from the model itself. Named, since two tokens of an
# untrained model need not show it (softcapping); what has no name here is found by trying.
_HEAD_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """Hold what is true of a model while it is open.

    Attributes:
        base: the causal LM, without a peft wrapper around it.
        decoder: the part of it that gives the last hidden states.
        head: the module that makes logits of them.
        linears: the linears whose gradients are taken.
        groups: the same by the tensor that they read.
        parameters: those on parameters of modules, by module.
        whole_model_logits: whether logits come from the whole model; else they are the head's product.
        mode: how the model is called.
        recomputable: layers that can be recomputed in the backward, and are not already; none on the CPU.
        why_no_graphs: why no step of it can be a CUDA graph; empty if it may be.
        room: free bytes of its GPU before anything was kept; None for the CPU.
        given: how to have it as it was given; referee: its own plain outputs, None on the meta device.
        fused_layers: which kinds of modules the Triton kernels compute.
        backend: computes what kernels and PyTorch compute differently; precision: "auto" or "fp8".
    """

    base: Any
    decoder: Any
    head: Any
    linears: Sequence[LoraLinear]
    groups: Sequence[InputGroup]
    parameters: Sequence[Part]
    whole_model_logits: bool
    mode: Separation
    recomputable: Sequence[Any]
    why_no_graphs: str
    room: int | None
    given: GivenModel
    referee: Referee | None
    fused_layers: Fused
    backend: Torch
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
        if not self.groups:
            return None
        columns = max(max(group.columns) for group in self.groups)
        columns += max(group.kept_outputs for group in self.groups)
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
    backend: Torch,
    precision: str = fp8.AUTO,
    why_no_graphs: str = "",
) -> Iterator[OpenedModel]:
    """Open a model for gradients of `linears` while the block runs; yields what is true of it.

    The LoRA layers' forwards are replaced, dropout is off and no parameter asks for a gradient; all is put back
    afterwards. Nothing is compared yet (`comparison.compare_opened`). `why_no_graphs` is what `not_recordable` said.

    Raises ModelError where the model cannot be called, or a LoRA layer of it has no gradient of its own.
    """
    base = base_of(model)
    decoder, head, first = decoder_of(base), base.get_output_embeddings(), linears[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(quantized.settled(base))
        eights: list[fp8.Fp8Weight | None] = [None] * len(linears)
        room = free_bytes(first.device)
        if precision == fp8.FP8:
            eights = _fp8_weights(linears, backend)
            room = free_bytes(first.device)  # less the copies
        recomputable = stack.enter_context(recomputable_layers(base)) if room is not None else []
        implementations = attention.implementations(base)
        forwards = {module: vars(module).get("forward") for module in base.modules()}
        whole, mode, referee = stack.enter_context(_settled(base, decoder, head, linears))
        call = functools.partial(_call, base if whole else decoder, decoder.config, mode)
        ids = _probe_tokens(referee)
        inputs, calls, mode, why = _probe(call, linears, mode, decoder.config._attn_implementation, ids)
        # Weights that are spread over processes are whole inside their own layers' forward and backward alone.
        sharded = any(linear.sharded for linear in linears)
        if mode.packs_pay and referee is not None and referee.usable and not sharded:
            mode = _heed_order(base, linears, call, ids, mode)
            why = why if mode.packs_pay else "the examples of a pack would see each other in this model"
        dtypes = [inputs[n].dtype if n in inputs else linear.dtype for n, linear in enumerate(linears)]
        products = [eight or own for eight, own in zip(eights, quantized.products_of(linears, dtypes), strict=True)]
        groups = _groups(linears, inputs, reducer, products, backend, precision)
        members = [(n, linear) for n, linear in enumerate(linears) if isinstance(linear, LoraParameter)]
        parameters = parameter_parts(members, calls, reducer)
        for part in parameters:
            stack.enter_context(part.opened())
        mode = _heed_parameters(parameters, mode)
        for group in groups:
            for place, member in enumerate(group.members):
                stack.enter_context(replaced_forward(member.layer, group, place))
        fused_layers = stack.enter_context(backend.fused_layers(base, first.dtype))
        replaced = [(module, own) for module, own in forwards.items() if vars(module).get("forward") is not own]
        given = GivenModel(base, replaced, implementations)
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
            parameters=parameters,
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


def not_recordable(base: Any, linears: Sequence[LoraLinear], reducer: Reducer, backend: Torch, why: str) -> str:
    """Tell why no step of a model can be a CUDA graph, as far as is known before it is opened; empty if it may be.

    why: why that backend was chosen.
    """
    device = linears[0].device
    if recomputes(base):
        return "the model has gradient checkpointing switched on, which asks for the state of random numbers"
    if not backend.launches_kernels:
        return f"the backend is not triton but {backend.name} ({why})"
    if device.type != "cuda":
        return f"the model is not on a CUDA device but on {device.type}"
    if any(isinstance(linear, LoraParameter) for linear in linears):
        return "LoRA on parameters of experts or on embeddings is summed by each pack's own tokens"
    if any(linear.sharded for linear in linears):
        return "the base weights are spread over processes (FSDP), which exchange them in every step"
    if not reducer.recordable:
        return "these gradients are summed by PyTorch, with each pack's bounds on the host"
    if any(linear.quantized for linear in linears):
        return "the base is quantised, and its library's products may wait for the host"
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


def _probe_tokens(referee: Referee | None) -> torch.Tensor:
    """The tokens [n] int64 of `_probe`: enough that a router spreads them."""
    if referee is None:
        return torch.zeros(2, dtype=torch.int64)
    return max((text.ids for text in referee.texts), key=len)[:_PROBED]


def _probe(
    call: Callable[..., Any],
    linears: Sequence[LoraLinear],
    mode: Separation,
    implementation: str | None,
    ids: torch.Tensor,
) -> tuple[dict[int, torch.Tensor], dict[nn.Module, tuple[Any, ...]], Separation, str]:
    """Run the tokens `ids` to learn which LoRA linears share an input, what wrappers of parameters are called with, how
    to call the model for what its layers see, and why no step can be a CUDA graph."""
    inputs: dict[int, torch.Tensor] = {}
    wrapped: dict[nn.Module, tuple[Any, ...]] = {}
    calls = [0] * len(linears)

    def called(n: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
        calls[n] += 1
        if isinstance(linears[n], LoraParameter):
            wrapped[layer] = args
        else:
            inputs[n] = args[0]

    handles = [
        member.layer.register_forward_pre_hook(lambda layer, args, n=n: called(n, layer, args))
        for n, member in enumerate(linears)
    ]
    pack = Pack([0], ids, torch.arange(len(ids)), ids, [0, len(ids)])
    tokens = attention.PackedTokens.of(pack).to(linears[0].device)
    seen: list[bool] = []
    try:
        with torch.no_grad():
            call(tokens, packed_probe=seen)
    finally:
        for handle in handles:
            handle.remove()
    strange = {n for n, x in inputs.items() if x.numel() != len(ids) * linears[n].d_in}
    mode, why = _heed_calls(linears, calls, strange, mode), ""
    if not mode.packs_pay:
        why = "the examples of a pack would see each other in this model"
    elif max(calls) > 1:
        why = "a LoRA layer is called more than once, and its sums take each pack's bounds on the host"
    elif implementation == attention.PACKED and not all(seen):
        why = (
            "this model's attention runs an example at a time (it takes a 16-bit model, with heads of up to 256 "
            "numbers in multiples of 8)"
        )
    return inputs, wrapped, mode, why


def _heed_calls(linears: Sequence[LoraLinear], calls: Sequence[int], strange: set[int], mode: Separation) -> Separation:
    """Return how to call a model whose LoRA layers were called so often, and say which of them text leaves out.

    A layer that is not called has no part in the loss: its gradient is zero. One that sees other tokens than the text's
    (some of them, as a routed expert, a prompt before it, several streams of it) has those of one example where
    examples go one at a time, and its sums are over all that it sees.

    Raises ModelError where text reaches none.
    """
    names = [member.name for member in linears]
    uncalled = {n for n, count in enumerate(calls) if not count}
    routed = routed_modules(names, strange, uncalled)
    unused = [names[n] for n in sorted(uncalled - routed)]
    if len(unused) == len(names):
        raise ModelError(
            f"{unused[0]}: the model's forward on text calls no {linears[0].noun}, as where they are those of images "
            f"or of an encoder: name layers of the text decoder in {linears[0].named_by}"
        )
    if unused:
        say_once(
            logger,
            f"the model's forward on text never calls the {linears[0].noun}s {listing(unused)}, whose gradients are "
            f"zero; rows are shorter without them{other_targets(names, unused, linears[0].named_by)}",
        )
    if not routed:
        return mode
    if mode.packs_pay:
        name = names[min(routed)]
        say_once(logger, f"{name}: sees other tokens than a text's (a routed expert?), so examples go one at a time")
    return replace(mode, apart=False)


def _heed_order(
    base: Any, linears: Sequence[LoraLinear], call: Callable[..., Any], ids: torch.Tensor, mode: Separation
) -> Separation:
    """Return how to call a model of which some LoRA layer may see a pack's tokens in another order."""
    layers = {id(member.layer): member.layer for member in linears}
    found = out_of_order(call, base.get_input_embeddings(), list(layers.values()), ids, linears[0].device)
    if found is None:
        return mode
    name = next(member.name for member in linears if member.layer is found)
    say_once(logger, f"{name}: sees the tokens of a pack in another order, so examples go one at a time")
    return replace(mode, apart=False)


def _heed_parameters(parts: Sequence[Part], mode: Separation) -> Separation:
    """Return how to call a model with LoRA on parameters, and say what of its experts is not scored."""
    kinds = {type(part) for part in parts}
    if RoutedExperts in kinds and SplitModule not in kinds:
        say_once(
            logger,
            "routed experts are scored at the model's own choice of experts, which has no gradient; its routers have "
            "no LoRA and are left out",
        )
    alone = [part for part in parts if isinstance(part, AutogradParameters)]
    if not alone:
        return mode
    if mode.packs_pay:
        _, member = alone[0].members[0]
        what = f"LoRA on the parameter {member.parameter} of {type(member.module).__name__}"
        say_once(logger, f"{member.name}: {what} is differentiated as it stands, so examples go one at a time")
    return replace(mode, apart=False)


def _fp8_weights(linears: Sequence[LoraLinear], backend: Torch) -> list[fp8.Fp8Weight | None]:
    """The 8-bit weights of linears; None for LoRA on parameters, which multiply as they are."""
    plain = [linear for linear in linears if not isinstance(linear, LoraParameter)]
    made = iter(fp8.weights_of(plain, backend))
    return [None if isinstance(linear, LoraParameter) else next(made) for linear in linears]


def _groups(
    linears: Sequence[LoraLinear],
    inputs: dict[int, torch.Tensor],
    reducer: Reducer,
    products: Sequence[Product | None],
    backend: Torch,
    precision: str,
) -> list[InputGroup]:
    """Group LoRA linears by the tensor that they read."""
    by_input: dict[int, list[int]] = {}
    for n, linear in enumerate(linears):
        if not isinstance(linear, LoraParameter):
            # what the probe did not reach shares its input with nothing that is known
            by_input.setdefault(id(inputs[n]) if n in inputs else -n - 1, []).append(n)
    groups = []
    for numbers in by_input.values():
        members = [linears[n] for n in numbers]
        chosen = [products[n] for n in numbers]
        # Folding s B A into a 16-bit weight would round the adapter away, and so would folding it into an 8-bit one; on
        # a GPU the second copy of the weights would cost more than it saves.
        # Sharded weights (FSDP2) are whole only inside their own layer's forward and backward: nothing to fold; nor is
        # a quantised one ever kept whole.
        first, quantised = members[0], any(member.quantized for member in members)
        wide = first.dtype in (torch.float32, torch.float64)
        folds = wide and first.device.type == "cpu" and not backend.launches_kernels
        folds = folds and not first.sharded and precision != fp8.FP8
        given = inputs.get(numbers[0])
        dtype = given.dtype if quantised and given is not None else first.dtype
        groups.append(InputGroup(members, numbers, reducer, folds and not quantised, backend, chosen, dtype))
    return groups
