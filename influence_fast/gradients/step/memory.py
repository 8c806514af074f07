"""What the gradients of one packed batch hold on the device, as a sum of formulas (docs/memory.md has the numbers).

For decoders of Llama's kind (Llama, Mistral, Qwen2, Qwen3: two RMS norms in fp32, grouped-query attention without a
T x T matrix, a gated MLP) whose LoRA modules are all linears of a layer. T tokens, widths d (hidden), f (MLP), a (all
query heads) and b (all key heads), h query heads, w bytes a number, c = r + p columns kept a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from influence_fast.errors import ConfigError, truncated_list
from influence_fast.gradients.model.fp8 import MULTIPLE as fp8_multiple
from influence_fast.gradients.model.loss import CARD_TOKENS
from influence_fast.gradients.rows.precision import FP8
from influence_fast.gradients.rows.row_spec import RowSpec

MODULES = 7  # q, k, v, o, gate, up, down
_NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True, slots=True)
class GradientMemory:
    """Bytes on the device: what is there throughout, and what the fullest moment adds.

    throughout: weights and factors. moments: everything else that is alive, at each moment that can be the fullest.
    """

    throughout: dict[str, int]
    moments: dict[str, dict[str, int]]

    @property
    def fullest(self) -> str:
        """Return the moment that decides."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def batch(self) -> int:
        """Return the bytes of the fullest moment, without weights and factors."""
        return sum(self.moments[self.fullest].values())

    @property
    def peak(self) -> int:
        """Return the bytes in all."""
        return sum(self.throughout.values()) + self.batch


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """Weights of a base that are stored in fewer bits: how many, their bytes with scales, and those of the largest."""

    parameters: int
    stored: int
    largest: int


def layer_bytes(
    config: Any,
    *,
    weight_bytes: int = 2,
    columns: int = 0,
    inputs: bool = False,
    fused_norms: bool = False,
    fused_mlp: bool = False,
) -> int:
    """Return the bytes a token that one decoder layer keeps for its backward.

    Weights are frozen, and `columns` numbers are kept for a LoRA module:

    2 (4 d + 4) fp32 copies and scales of the norms, w (2 a + 2 b) + 4 h of the attention, 3 w f of the MLP, 7 w c.
    fused_norms, fused_mlp: by the kernels (`fused_layers`), which keep 2 w d and 2 w f.
    inputs: the LoRA modules' inputs too, w (2 d + a + f), which exact rows and flat projections need.
    """
    s = _Shape.of(config)
    w = weight_bytes if fused_norms else 0
    norms = 2 * _norm(s.hidden, w)
    if s.head_norms:
        norms += s.heads * _norm(s.head_dim, w) + s.key_heads * _norm(s.head_dim, w)
    attention = weight_bytes * (2 * s.queries + 2 * s.keys) + 4 * s.heads
    x = 2 * s.hidden + s.queries + s.mlp if inputs else 0
    return norms + attention + weight_bytes * ((2 if fused_mlp else 3) * s.mlp + MODULES * columns + x)


@dataclass(frozen=True, slots=True)
class PackSize:
    """Size of one packed batch: tokens, examples, and tokens that the loss counts (None: all)."""

    tokens: int
    examples: int = 1
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """The base model's weights: how many, the bytes of one (2 for bf16), and those that are stored in fewer bits.

    Of the last, one is dequantised at a time.
    """

    parameters: int
    bytes: int = 2
    quantized: QuantizedWeights | None = None


def gradient_memory(
    config: Any,
    pack: PackSize,
    weights: BaseWeights,
    spec: RowSpec,
    *,
    rank: int = 16,
    row: int | None = None,
    checkpointing: bool = True,
    triton: bool = True,
) -> GradientMemory:
    """Return the sum for a pack, with projected rows (`one_sided` or `kron`).

    config: the model's transformers configuration. spec: how rows are made; with precision "fp8" on a card. rank: of
    the adapter. row: numbers in a row, by default the spec's width, or those of the projection without a sketch.
    checkpointing: layers are computed again in the backward. triton: else PyTorch adds up in fp32.

    Not in it: the CUDA context, what an operation uses inside itself, fragmentation. Raises ConfigError for a
    configuration that names no such sizes.
    """
    s = _Shape.of(config)
    w, columns, fp8, tokens = weights.bytes, rank + spec.dim, spec.precision == FP8, pack.tokens
    quantized, parameters = weights.quantized, weights.parameters
    counted = tokens if pack.completion_tokens is None else pack.completion_tokens
    ends = s.layers * s.module_ends
    throughout = {
        "weights": parameters * w if quantized is None else (parameters - quantized.parameters) * w + quantized.stored,
        # q, k and v share an input, and so do gate and up: their A's lie together once more
        "LoRA factors, and with their random columns once more for each pass": ends * rank * w
        + ends * columns * w
        + s.layers * 5 * s.hidden * rank * w,
    }
    if fp8:
        throughout["e4m3 copies of W and W^T, with their scales"] = s.layers * sum(
            2 * d_in * d_out + 4 * (d_in + d_out)
            for d_in, d_out in s.modules
            if d_in % fp8_multiple == 0 and d_out % fp8_multiple == 0
        )
    kept = layer_bytes(config, weight_bytes=w, columns=columns, fused_norms=triton, fused_mlp=triton and s.silu)
    layer = tokens * kept
    last_norm = tokens * _norm(s.hidden, w if triton else 0)
    sides = 2 * tokens * MODULES * columns * w  # [h | z] and [u | y] of one layer
    inputs = tokens * s.hidden * w  # one layer's input, or a gradient of that shape
    angles = 2 * tokens * s.head_dim * w
    work = tokens * (3 * s.mlp * w + columns * w) + inputs  # gradients inside the MLP
    whole = 0 if quantized is None else quantized.largest * w
    if fp8 and not triton:  # the last of them in e4m3, and in fp32 while it is rounded
        work = tokens * (w * s.mlp + 5 * s.mlp + w * (2 * s.hidden + columns) + 8)
        # PyTorch's norms hold on to theirs, but for the input of a layer that is computed again
        work += inputs if checkpointing else 2 * inputs
    chunk = min(counted, CARD_TOKENS)
    numbers = row or spec.width or 2 * rank * spec.dim * MODULES * s.layers

    def moment(saved: int, **more: int) -> dict[str, int]:
        named = {"layer inputs" if checkpointing else "activations of all layers": saved, "rotary angles": angles}
        return {**named, **{name.replace("_", " "): amount for name, amount in more.items()}}

    all_layers = s.layers * inputs if checkpointing else s.layers * layer - last_norm
    again = 0
    if checkpointing:  # the kernel of a layer's first norm keeps the layer's input, which is there already
        again = layer - inputs if triton else layer
    logits = chunk * s.vocabulary * (w if triton else 4 + w)  # the kernel writes the gradient over them
    moments = {
        "the loss": moment(all_layers, final_norm=last_norm, last_hidden=2 * counted * s.hidden * w, logits=logits),
        "the backward of the top layer": moment(
            all_layers, one_layer_again=again, gradients_in_it=work, one_weight_dequantised=whole
        ),
        "the sums of examples": {
            "kept for the sums: [h | z] and [u | y] of all layers": s.layers * sides,
            "the same, stacked by rank": s.layers * sides,
            "the same in fp32": 0 if triton or w >= 4 else 2 * s.layers * sides,
            "rows, and by PyTorch the factors that become them": (1 if triton else 2) * 4 * pack.examples * numbers,
        },
    }
    if checkpointing:
        bottom = moment(
            inputs,
            one_layer_again=again,
            gradients_in_it=work,
            one_weight_dequantised=whole,
            kept_for_the_sums=(s.layers - 1) * sides,
        )
        moments["the backward of the bottom layer"] = bottom
    return GradientMemory(throughout, moments)


@dataclass(frozen=True, slots=True)
class _Shape:
    hidden: int
    mlp: int
    heads: int
    key_heads: int
    head_dim: int
    layers: int
    vocabulary: int
    head_norms: bool
    silu: bool

    @classmethod
    def of(cls, config: Any) -> _Shape:
        missing = [name for name in _NEEDED if not isinstance(getattr(config, name, None), int)]
        if missing:
            kind = getattr(config, "model_type", type(config).__name__)
            raise ConfigError(
                f"no memory sum for a {kind} model: its configuration has no {truncated_list(missing)}; "
                "measure a short batch instead"
            )
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            mlp=config.intermediate_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
            head_norms=str(getattr(config, "model_type", "")).startswith("qwen3"),
            silu=getattr(config, "hidden_act", None) in ("silu", "swish"),
        )

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.key_heads * self.head_dim

    @property
    def modules(self) -> list[tuple[int, int]]:
        """Return (d_in, d_out) of a layer's modules."""
        d, f = self.hidden, self.mlp
        return [(d, self.queries), (d, self.keys), (d, self.keys), (self.queries, d), (d, f), (d, f), (f, d)]

    @property
    def module_ends(self) -> int:
        """Return d_in + d_out, summed over a layer's modules."""
        return sum(map(sum, self.modules))


def _norm(width: int, fused_bytes: int = 0) -> int:
    """Return the bytes a token that one RMS norm keeps: its input in fp32, and one scale; by a kernel its input as it
    is.
    """
    return fused_bytes * width if fused_bytes else 4 * width + 4
