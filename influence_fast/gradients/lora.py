"""Where the LoRA factors of a model are, and how one example's gradient is laid out as a row."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn

from influence_fast.data.adapter_names import is_adapter_parameter, plain_name
from influence_fast.data.fingerprints import active_adapters, held_adapters
from influence_fast.data.wrappers import unwrapped
from influence_fast.errors import ModelError, listing, say_once
from influence_fast.gradients.adapter_kinds import check_active_kinds, check_together
from influence_fast.gradients.factors import Columns, Factor, make_factor
from influence_fast.gradients.lora_parts import AdapterPart, Magnitude, join_adapters, part_factors
from influence_fast.gradients.projection import Projection
from influence_fast.gradients.quantized import kind_of

logger = logging.getLogger(__name__)

_LAYER_NUMBER = re.compile(r"\.(?:layers|h|blocks|block|layer)\.(\d+)\.")


class LayoutEntry(NamedTuple):
    """One factor's place in a gradient row.

    `module` is the name `model.named_modules()` gives the layer, `factor` what `factors.SIDES` calls it (`"lora_A"`,
    `"lora_B"`), `shape` the factor's shape as stored in the row (C order), `offset` the index of its first number.
    """

    module: str
    factor: str
    shape: tuple[int, int]
    offset: int

    @property
    def columns(self) -> slice:
        """The factor's numbers in a row."""
        return slice(self.offset, self.offset + self.shape[0] * self.shape[1])


@dataclass(frozen=True, eq=False)
class LoraLinear:
    """One LoRA linear, `y = W x + b + s B (A x)`, as plain tensors; with r = 0 a plain one, whose weight is trained.

    Several active adapters are one of all their columns (see `lora_parts`).
    """

    name: str
    layer: nn.Module
    weight: torch.Tensor  # [d_out, d_in]; of a quantised base an empty one, of the activations' dtype
    bias: torch.Tensor | None  # [d_out]; None where a quantised base adds its own, and under a magnitude vector
    a: torch.Tensor  # [r, d_in]
    b: torch.Tensor  # [d_out, r]
    scaling: float
    quantized: bool = False  # the base layer itself multiplies (see `quantized`)
    parts: tuple[AdapterPart, ...] = ()  # of other adapters than one plain pair
    added_bias: torch.Tensor | None = None  # [d_out] of the adapter, a part of `bias` unless the base is quantised
    magnitude: Magnitude | None = None  # of DoRA

    named_by: ClassVar[str] = "target_modules"  # the setting that chose it, for messages
    noun: ClassVar[str] = "LoRA layer"

    @property
    def key(self) -> str:
        """The name that seeds the projection: the same with and without the peft wrapper."""
        return plain_name(self.name)

    @property
    def d_in(self) -> int:
        return self.a.shape[1]

    @property
    def d_out(self) -> int:
        return self.b.shape[0]

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products with the base weight; of a quantised base the activations'."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def factors(self, projection: Projection | None = None) -> tuple[Factor, ...]:
        """Return what this module adds to a row, in the row's order; projected columns stand after those of A and B."""
        if self.parts:
            return part_factors(self.key, (self.d_out, self.d_in), self.r, self.parts, projection)
        return tuple(
            make_factor(
                name,
                (self.d_out, self.d_in),
                Columns(0, self.r),
                projection,
                (self.r, self.r),
                self.scaling,
                f"{self.key}/rank",
            )
            for name in (("lora_A", "lora_B") if self.r else ("weight",))
        )

    @property
    def base(self) -> Any:
        """The layer that holds the base weight."""
        return self.layer.get_base_layer()  # type: ignore[operator]

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the weight, which is then whole only while the layer around it runs."""
        return hasattr(self.weight, "full_tensor")  # a DTensor; to import that class costs everybody a second

    @property
    def live_weight(self) -> torch.Tensor:
        """[d_out, d_in]: `weight`, or what FSDP2 has gathered of it for the layer that is running."""
        if not self.sharded:
            return self.weight
        base = self.base
        return base.weight.detach() if isinstance(base, nn.Linear) else base.weight.detach().T

    @property
    def live_bias(self) -> torch.Tensor | None:
        """[d_out], as `live_weight`."""
        if not self.sharded or self.bias is None:
            return self.bias
        base = self.base
        if base.bias is None:
            return self.added_bias
        own: torch.Tensor = base.bias.detach()
        return own if self.added_bias is None else own + self.added_bias


Module = TypeVar("Module", LoraLinear, LayoutEntry)


def find_lora_linears(model: nn.Module) -> list[LoraLinear]:
    """Every LoRA linear of `model` that its active adapters change, in the order of their parameters in the model.

    Raises ModelError when there is none, one is of a kind whose gradient this package does not compute, or an adapter
    is of another kind than LoRA, merged or disabled.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    model = unwrapped(model)
    check_active_kinds(model)
    layers: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    if not layers:
        raise ModelError(
            "the model has no LoRA adapter: load one (peft.PeftModel.from_pretrained) or add a fresh one "
            "(peft.get_peft_model) before asking for per-example gradients; for those of its own weights, as of a "
            "fully fine-tuned model, name a target: Projection(kind='kron', target='all-linear'), --target all-linear"
        )
    active = [(name, layer, adapters) for name, layer in layers if (adapters := _active_in(layer))]
    if not active:
        held = sorted({adapter for _, layer in layers for adapter in held_adapters(layer) or ()})
        raise ModelError(
            f"no layer has the active adapter {listing(layers[0][1].active_adapters)}; they have "
            f"{listing(held)}: call set_adapter with one of these"
        )
    refused = [name for name, layer, _ in active if not is_supported(layer)]
    if refused:
        kind = type(model.get_submodule(refused[0]).get_base_layer()).__name__  # type: ignore[operator]
        raise ModelError(
            f"{refused[0]}: LoRA over {kind} is not supported (linears that are a plain product are); leave that "
            f"module out of target_modules{other_targets([name for name, _, _ in active], refused)}"
        )
    if any(isinstance(layer, ParamWrapper) for _, layer, _ in active):  # inside another's base layer, which is first
        places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
        active.sort(key=lambda one: min((places[id(p)] for p in one[1].lora_A.parameters()), default=-1))
    quantised = any(kind_of(layer.get_base_layer()) is not None for _, layer, _ in active)
    activations = _activation_dtype(model) if quantised else torch.float32  # read of quantised ones alone
    several = len({adapter for _, _, adapters in active for adapter in adapters}) > 1
    found = [_as_plain(name, layer, adapters, activations, several) for name, layer, adapters in active]
    if others := _beside_in(model):
        say_once(logger, beside_warning(others))
    if unfrozen := _unfrozen_in(model):
        say_once(
            logger,
            f"parameters beside LoRA factors ask for gradients ({listing(unfrozen)}); gradients and scores here are of "
            "the factors alone: train with these frozen to have all of it scored",
        )
    return found


def beside_warning(others: Sequence[str]) -> str:
    """What is said of an adapter that trains `others` (see `trained_beside`)."""
    return (
        f"the adapter trains more than LoRA factors ({listing(others)}); gradients and scores here are of the "
        "factors alone: train without modules_to_save, trainable_token_indices and bias to have all of it scored"
    )


def unscored_in(model: nn.Module) -> list[str]:
    """Return what is trained but in no gradient row: what an adapter has beside LoRA factors, and unfrozen weights."""
    return [*_beside_in(model), *_unfrozen_in(model)]


def _beside_in(model: nn.Module) -> list[str]:
    """What else an adapter has than LoRA factors: whole modules saved with it, rows of embeddings, and biases."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    saved = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved.append(name)
        elif isinstance(module, TrainableTokensWrapper):
            saved.append(f"tokens of {name}")
    configs = getattr(model, "peft_config", {})
    kinds = {kind for name in active_adapters(model) or () for kind in _biases(configs.get(name))}
    return saved + sorted(kinds)


def _unfrozen_in(model: nn.Module) -> list[str]:
    """Parameters that ask for gradients and are no adapter's: unfrozen by hand, so that training moves them too."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    configs = getattr(model, "peft_config", {})
    biases = any(_biases(configs.get(name)) for name in active_adapters(model) or ())
    wrapped = [f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    return [
        plain_name(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not is_adapter_parameter(name)
        and not name.startswith(tuple(wrapped))
        and not (biases and name.endswith(".bias"))
    ]


def trained_beside(config: Any) -> list[str]:
    """Return what a peft configuration trains beside LoRA factors: whole modules by its names, tokens, and biases."""
    tokens = ["trainable_token_indices"] if getattr(config, "trainable_token_indices", None) else []
    return [*(getattr(config, "modules_to_save", None) or ()), *tokens, *_biases(config)]


def _biases(config: Any) -> list[str]:
    kind = getattr(config, "bias", "none")
    return [] if kind == "none" else [f"bias={kind!r}"]


def _active_in(layer: Any) -> list[str]:
    """The active adapters that have factors in `layer`; none where it belongs to another adapter."""
    held = held_adapters(layer) or ()
    return [name for name in layer.active_adapters if name in held]


def _as_plain(name: str, layer: Any, active: list[str], activations: torch.dtype, several: bool) -> LoraLinear:
    """Take a layer's active adapters as one; `several`: whether more than one is active in the model."""
    from peft.tuners.lora.layer import ParamWrapper

    if layer.disable_adapters:
        raise ModelError(f"{name}: the adapter is disabled; leave disable_adapter() first, or enable its layers")
    if layer.merged:
        raise ModelError(f"{name}: the adapter is merged into the base weights; call unmerge_adapter() first")
    check_together(name, layer, active)
    if layer.lora_embedding_A:
        from influence_fast.gradients.lora_embedding import embedding_of

        return embedding_of(name, layer, active, several)
    if not isinstance(layer, ParamWrapper) or _is_weight(layer):
        return _linear_of(name, layer, active, activations, several)
    from influence_fast.gradients.lora_parameters import parameter_of

    if several:
        raise ModelError(
            f"{name}: several adapters are active ({listing(active)} here), and LoRA on parameters has rows of "
            "one alone: activate one at a time by set_adapter"
        )
    return parameter_of(name, layer, active[0])


def _is_weight(layer: Any) -> bool:
    """Whether a wrapper of a parameter is around a linear's weight and nothing else is: it is that linear's LoRA."""
    base = layer.base_layer
    return getattr(layer, "parameter_name", "") == "weight" and isinstance(base, nn.Linear) and is_a_product(base)


def _linear_of(name: str, layer: Any, active: list[str], activations: torch.dtype, several: bool) -> LoraLinear:
    base = layer.get_base_layer()
    joined = join_adapters(layer, active, several)
    if quantised := kind_of(base) is not None:
        weight, bias = joined.a.new_empty(0, dtype=activations), None
    else:
        weight = (base.weight if isinstance(base, nn.Linear) else base.weight.T).detach()
        bias = None if base.bias is None else base.bias.detach()
    magnitude = None
    if active[0] in layer.lora_magnitude_vector:
        magnitude, bias = Magnitude.of(name, layer, active[0], weight, bias, joined), None
    added = None if joined.added_bias is None else joined.added_bias.to(weight.dtype)
    if added is not None and not quantised and not hasattr(bias, "full_tensor"):
        bias = added if bias is None else bias + added
    return LoraLinear(
        name=name,
        layer=layer,
        weight=weight,
        bias=bias,
        a=joined.a,
        b=joined.b,
        scaling=joined.scaling,
        quantized=quantised,
        parts=joined.parts,
        added_bias=added,
        magnitude=magnitude,
    )


def _activation_dtype(model: Any) -> torch.dtype:
    """Return the widest dtype of the parameters that are neither factors nor quantised: norms and embeddings.

    They make what flows between quantised layers; a head may be wider and changes nothing before it.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    apart = set() if head is None else {id(parameter) for parameter in head.parameters()}
    apart -= {id(parameter) for parameter in base.get_input_embeddings().parameters()} if apart else set()
    dtypes = {
        parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and parameter.element_size() > 1
        and id(parameter) not in apart
        and not is_adapter_parameter(name)
        and not hasattr(parameter, "__tensor_flatten__")
    }
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)


def other_targets(names: Sequence[str], refused: Sequence[str], setting: str = "target_modules") -> str:
    """Return the end of a message that names values of `setting` for the layers `names` that are not `refused`.

    A target is the end of a module's name, as peft takes it: its last part, or its last two where a refused layer has
    the same last part.
    """
    short, long = ({_ending(name, parts) for name in refused} for parts in (1, 2))
    working = set()
    for name in set(names) - set(refused):
        if (last := _ending(name, 1)) not in short:
            working.add(last)
        elif (ending := _ending(name, 2)) not in long:
            working.add(ending)
    return f", as by {setting}={sorted(working)}" if working else ""


def _ending(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])


def is_supported(layer: Any) -> bool:
    """Tell whether gradients of LoRA on the base of `layer` are computed: on products, embeddings, and parameters."""
    from peft.tuners.lora.layer import ParamWrapper

    base = layer.get_base_layer()
    if layer.lora_embedding_A:
        # else what a token's row is, or its gradient, depends on the other tokens
        return isinstance(base, nn.Embedding) and base.max_norm is None and not base.scale_grad_by_freq
    return isinstance(layer, ParamWrapper) or is_a_product(base)


def is_a_product(base: Any) -> bool:
    """Tell whether a layer computes x W^T + b and nothing else; a subclass of nn.Linear is tried on random tokens.

    A quantised one is taken to, and compared with autograd when an engine opens.
    """
    if kind_of(base) is not None:
        return True
    if type(base) is nn.Linear or type(base).__name__ == "Conv1D":
        return True
    if not isinstance(base, nn.Linear):
        return False
    weight = base.weight
    if hasattr(weight, "full_tensor"):  # a DTensor, whole only while the layer around it runs
        return type(base).forward is nn.Linear.forward
    if weight.device.type == "meta":
        return True
    x = torch.randn(2, base.in_features, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            found = base(x)
        except Exception:  # a forward of another kind
            return False
        wanted = nn.functional.linear(x, weight, base.bias)
    most = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 1e-2
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:  # a router, which gives several
        return False
    return bool((found - wanted).norm() <= most * wanted.norm())


def layout_of(linears: list[LoraLinear], projection: Projection | None = None) -> list[LayoutEntry]:
    """The row layout of `linears`: exact factors, or their projections (before any sketch of the whole row)."""
    entries: list[LayoutEntry] = []
    offset = 0
    for linear in in_top_layers(linears, projection):
        for factor in linear.factors(projection):
            entries.append(LayoutEntry(linear.name, factor.name, factor.shape, offset))
            offset = entries[-1].columns.stop
    return entries


def in_top_layers(modules: Sequence[Module], projection: Projection | None) -> list[Module]:
    """Those of `modules` that `projection.layers` leaves in a row; modules above all layers (a head) stay.

    Raises ModelError where no module's name has a layer's number to go by.
    """
    if projection is None or projection.layers == 1:
        return list(modules)
    numbers = [_layer_number(module) for module in modules]
    known = [number for number in numbers if number is not None]
    if not known:
        raise ModelError(
            f"the LoRA modules' names have no layer number ({_module_name(modules[0])}): leave projection layers at 1"
        )
    count = max(known) + 1
    lowest = count - math.ceil(projection.layers * count - 1e-9)
    return [
        module
        for module, n in zip(modules, numbers, strict=True)
        if not _is_an_embedding(module) and (n is None or n >= lowest)
    ]


def _layer_number(module: LoraLinear | LayoutEntry) -> int | None:
    found = _LAYER_NUMBER.search(_module_name(module))
    return int(found[1]) if found else None


def _is_an_embedding(module: LoraLinear | LayoutEntry) -> bool:
    name = module.factors()[0].name if isinstance(module, LoraLinear) else module.factor
    return name.startswith("lora_embedding")


def _module_name(module: LoraLinear | LayoutEntry) -> str:
    return module.name if isinstance(module, LoraLinear) else module.module


def layout_width(layout: Sequence[LayoutEntry]) -> int:
    """Numbers in a row of this layout."""
    last = layout[-1]
    return int(last.columns.stop)
