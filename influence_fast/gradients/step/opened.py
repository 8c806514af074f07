"""What is true of a model that is open for gradients: one frozen value, made once by `open_model`.

How it is called (packed, one example at a time, or with its own attention), which LoRA linears read the same tensor,
whether the logits of the whole model are needed, which layers can be recomputed in the backward, why its steps cannot
be CUDA graphs, and the plain forward that all of it is compared with.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from influence_fast.data.packing import text_config
from influence_fast.errors import ConfigError
from influence_fast.gradients.model import fp8, quantized
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.model.backends import Torch
from influence_fast.gradients.model.frozen import frozen, recomputable_layers, recomputes
from influence_fast.gradients.model.fused_layers import Fused
from influence_fast.gradients.model.given import GivenModel
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.model.lora_parameters import LoraParameter
from influence_fast.gradients.model.pack_isolation import Separation
from influence_fast.gradients.model.referee import Referee, decoder_of
from influence_fast.gradients.model.tolerance import Tolerance
from influence_fast.gradients.rows.precision import AUTO, FP8
from influence_fast.gradients.step.autograd_parameters import Part, parameter_parts
from influence_fast.gradients.step.input_groups import InputGroup, Product, replaced_forward
from influence_fast.gradients.step.memory import layer_bytes
from influence_fast.gradients.step.probing import call_packed, heed_order, heed_parameters, probe, probe_tokens
from influence_fast.gradients.step.reduction import Reducer

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
        """Return the device that packs go to."""
        return self.linears[0].device

    @property
    def module(self) -> Any:
        """Return what a pack is passed through: the whole model, or its decoder."""
        return self.base if self.whole_model_logits else self.decoder

    def call(self, tokens: attention.PackedTokens) -> Any:
        """Call `module` on a pack that is on the device and return its output."""
        return call_packed(self.module, self.decoder.config, self.mode, tokens)

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
    precision: str = AUTO,
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
        if precision == FP8:
            eights = _fp8_weights(linears, backend)
            room = free_bytes(first.device)  # less the copies
        recomputable = stack.enter_context(recomputable_layers(base)) if room is not None else []
        implementations = attention.implementations(base)
        forwards = {module: vars(module).get("forward") for module in base.modules()}
        whole, mode, referee = stack.enter_context(_settled(base, decoder, head, linears))
        call = functools.partial(call_packed, base if whole else decoder, decoder.config, mode)
        ids = probe_tokens(referee)
        inputs, calls, mode, why = probe(call, linears, mode, decoder.config._attn_implementation, ids)
        # Weights that are spread over processes are whole inside their own layers' forward and backward alone.
        sharded = any(linear.sharded for linear in linears)
        if mode.packs_pay and referee is not None and referee.usable and not sharded:
            mode = heed_order(base, linears, call, ids, mode)
            why = why if mode.packs_pay else "the examples of a pack would see each other in this model"
        dtypes = [inputs[n].dtype if n in inputs else linear.dtype for n, linear in enumerate(linears)]
        products = [eight or own for eight, own in zip(eights, quantized.products_of(linears, dtypes), strict=True)]
        groups = _groups(linears, inputs, reducer, products, backend, precision)
        members = [(n, linear) for n, linear in enumerate(linears) if isinstance(linear, LoraParameter)]
        parameters = parameter_parts(members, calls, reducer)
        for part in parameters:
            stack.enter_context(part.opened())
        mode = heed_parameters(parameters, mode)
        for group in groups:
            for place, member in enumerate(group.members):
                stack.enter_context(replaced_forward(member.layer, group, place))
        fused_layers = stack.enter_context(backend.fused_layers(base, first.dtype))
        replaced = [(module, own) for module, own in forwards.items() if vars(module).get("forward") is not own]
        given = GivenModel(base, replaced, implementations)
        if referee is not None:
            referee.as_given = given.restored
            if precision == FP8:
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


@contextlib.contextmanager
def _settled(
    base: Any, decoder: Any, head: Any, linears: Sequence[LoraLinear]
) -> Iterator[tuple[bool, Separation, Referee | None]]:
    """Set the fastest attention that agrees with the plain forward, while the block runs.

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


def _fp8_weights(linears: Sequence[LoraLinear], backend: Torch) -> list[fp8.Fp8Weight | None]:
    """Return the 8-bit weights of linears; None for LoRA on parameters, which multiply as they are."""
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
        folds = folds and not first.sharded and precision != FP8
        given = inputs.get(numbers[0])
        dtype = given.dtype if quantised and given is not None else first.dtype
        groups.append(InputGroup(members, numbers, reducer, folds and not quantised, backend, chosen, dtype))
    return groups
