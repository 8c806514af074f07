"""Compare the engine with the model's own plain forward, and choose the fastest way of calling it that agrees.

The reference is `model(input_ids)`, one text at a time, with the model as it was given: its own attention, mask and
positions. The ways, fastest first:

    packed          our attention (or the model's flash-attention), several examples in one row
    alone           the same, one example at a time
    own attention   one example at a time, with the model's own attention, mask and positions left as they are

What agrees in no way is refused by the name of the first layer whose output differs. Texts are longer than the windows,
chunks and top-k that the configuration names, as far as `_LONGEST` goes; a longer limit that our attention is not
handed as an argument cannot be tried, and such a model keeps its own attention.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from influence_fast.data.packing import IGNORED, Pack, context_of, pack_examples, text_config
from influence_fast.errors import ModelError, one_line, say_once
from influence_fast.gradients import attention
from influence_fast.gradients.separation import Separation, StatefulModelError, separation

logger = logging.getLogger(__name__)

# A forward of 512 tokens takes a billion-parameter model some 5 seconds on two CPU cores; windows of real models (4,096
# tokens) would take a minute at every opening. The user's own data are compared up to 2,048 tokens.
_LONGEST = 512
_UNLIMITED = 24  # tokens of the longest text where the configuration names no limit
_ROOM_FOR_OFFSETS = 4  # positions that some tables spend before the first token (padding_idx + 1)
_LAST = 16  # tokens whose logits are kept: they depend on all before them
# Relative errors of hidden states. fp64: 1e-15 was measured; a wrong mask gives 1e-2 and more. fp32: 1e-6 was measured
# on tiny models and 5e-5 on rows of a real one. Lower precisions round every layer, by some 1e-2 in all.
_FLOORS = {torch.float64: 1e-9, torch.float32: 1e-4}
_FLOOR_16 = 0.03
_FLOOR_8 = 0.15
_MOST = 0.5  # beyond which no noise excuses a difference
# Standard deviations of noise, as a plain forward with rounded layer outputs shows it, that count as agreement.
_NOISES = 4.0
_OFFSET_LOSS_16 = 0.2  # of one token's loss: logits of 20 are rounded by 0.06 in bf16; divided by the root of the count


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Which relative error of outputs is rounding, for a model of `dtype` with products of `unit` relative rounding."""

    dtype: torch.dtype
    floor: float
    unit: float

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device, fp8: bool = False) -> Tolerance:
        """Choose the tolerance for a model's dtype; TF32 products on a GPU round as 16-bit ones do."""
        if fp8:
            return cls(torch.bfloat16, _FLOOR_8, 2.0**-4)
        unit = torch.finfo(dtype).eps
        if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            return cls(dtype, 1e-2, 2.0**-10)
        return cls(dtype, _FLOORS.get(dtype, _FLOOR_16), unit)

    def difference(self, outputs: torch.Tensor, plain: torch.Tensor) -> float:
        """Return the relative error of outputs [n, d]: over all of them, or of the median token in low precision.

        A token that a rounded sum sends to another expert differs altogether, with nothing wrong; a dropped mask
        changes most tokens of a text of twice its length.
        """
        if outputs.shape != plain.shape:
            return math.inf
        apart, wide = (outputs - plain).double(), plain.double()
        if self.floor < _FLOOR_16:
            return float(apart.norm() / wide.norm().clamp_min(torch.finfo(torch.float64).tiny))
        return float((apart.norm(dim=1) / wide.norm(dim=1).clamp_min(1e-30)).median())

    def of_loss(self, count: int) -> float:
        """Return the error of a mean loss over `count` tokens, relative to 1 + loss, that is rounding."""
        return self.floor if self.floor < 1e-2 else self.floor + _OFFSET_LOSS_16 / math.sqrt(max(1, count))


@dataclass(frozen=True, slots=True)
class PlainText:
    """One text and what the model's own forward makes of it."""

    ids: torch.Tensor  # [n] int64, on the host
    labels: torch.Tensor  # [n] int64: the ids, within the width of the logits
    hidden: torch.Tensor | None  # [n, d]; None where the decoder's output was not to be seen
    logits: torch.Tensor  # [min(n, 16), vocab], of the last tokens
    loss: float | None  # the mean over its tokens; None for a text of one token

    def outputs(self, whole: bool) -> torch.Tensor:
        """Return what is compared: the last hidden states, or the last logits of a whole model."""
        return self.logits if whole or self.hidden is None else self.hidden


class Referee:
    """Hold a model's own plain outputs on a few texts and judge other ways of calling it by them.

    Args:
        base: the causal LM (no peft wrapper around it), in evaluation mode and with its own attention.
        decoder: the part of it that gives the last hidden states.
        device: where its inputs go.
        tolerance: what counts as rounding; by default that of the coarser of its embeddings' and its logits' dtypes.
    """

    def __init__(self, base: Any, decoder: Any, device: torch.device, tolerance: Tolerance | None = None) -> None:
        self.base, self.decoder, self.device = base, decoder, device
        self._own_implementations = attention.implementations(base)
        self.texts = [self._plain(ids) for ids in _texts(base)]
        if tolerance is None:
            dtypes = {next(base.parameters()).dtype, self.texts[0].logits.dtype}
            # some models give out logits of another dtype than their own
            tolerance = Tolerance.of(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps), device)
        self.tolerance = tolerance
        self._noise: float | None = None
        # a context in which the model is as it was given
        self.as_given: Callable[[], contextlib.AbstractContextManager[None]] = self._with_own_attention

    @property
    def name(self) -> str:
        """The model's type, for messages."""
        return str(getattr(self.base.config, "model_type", type(self.base).__name__))

    @property
    def usable(self) -> bool:
        """Whether the plain outputs are numbers; NaN weights are found, and named, by their gradients."""
        return all(bool(text.outputs(True).isfinite().all()) for text in self.texts)

    def _plain(self, ids: torch.Tensor) -> PlainText:
        with torch.no_grad(), _captured(self.decoder) as seen:
            try:
                logits = self.base(input_ids=ids[None].to(self.device)).logits[0]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise ModelError(
                    f"{self.name}: the model's own forward of {len(ids)} tokens of text fails ({one_line(error, 160)}): "
                    "a model is needed that takes input_ids alone"
                ) from error
        loss, labels = None, ids % logits.shape[-1]
        if len(ids) > 1:
            loss = float(_wide(cross_entropy)(logits[:-1], labels[1:].to(logits.device)))
        return PlainText(ids, labels, seen[0][0] if len(seen) == 1 else None, logits[-_LAST:].clone(), loss)

    def head_is_a_product(self, head: nn.Linear) -> bool:
        """Tell whether the logits are the head's product with the decoder's last hidden states."""
        with torch.no_grad():
            for text in self.texts:
                if text.hidden is None or text.hidden.shape[-1] != head.weight.shape[-1]:
                    return False
                logits = linear(text.hidden[-_LAST:], head.weight, head.bias)
                # one product, so a twentieth of what all layers may differ by; 16-bit logits are rounded themselves
                if not self.tolerance.difference(logits, text.logits) <= self.tolerance.floor:
                    return False
        return True

    def pack(self, texts: Sequence[PlainText] | None = None) -> Pack:
        """Put texts into one pack, every token of which counts; by default all of them."""
        chosen = self.texts if texts is None else texts
        examples = [{"input_ids": text.ids, "labels": text.labels} for text in chosen]
        packed = pack_examples(examples, sum(len(text.ids) for text in chosen))
        assert len(packed) == 1
        return packed[0]

    def packs(self, apart: bool) -> list[Pack]:
        """Return the texts as packs: all in one, or each alone."""
        if apart:
            return [self.pack()]
        return [Pack([i], one.input_ids, one.position_ids, one.targets, one.cu_seqlens) for i, one in self._alone()]

    def _alone(self) -> Iterator[tuple[int, Pack]]:
        for i, text in enumerate(self.texts):
            yield i, self.pack([text])

    def errors(self, pack: Pack, outputs: torch.Tensor, whole: bool) -> list[float]:
        """Return each text's relative error by outputs [T, d] of a pack of `packs`."""
        found = []
        for place, (start, end) in zip(
            pack.indices, zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False), strict=True
        ):
            plain = self.texts[place].outputs(whole)
            found.append(self.tolerance.difference(outputs[start:end][-len(plain) :], plain))
        return found

    def accepts(self, errors: Sequence[float]) -> bool:
        """Tell whether all relative errors are rounding."""
        if not self.usable:
            return True
        if not all(math.isfinite(error) for error in errors):
            return False
        worst = max(errors)
        if worst <= self.tolerance.floor:
            return True
        return worst <= min(_MOST, _NOISES * self.noise)

    @functools.cached_property
    def unit(self) -> float:
        """The relative rounding of the coarsest sum that the model makes: many compute norms of float64 in float32."""
        if self.tolerance.dtype != torch.float64:
            return self.tolerance.unit
        with self.as_given(), torch.no_grad(), _Coarsest() as coarsest:
            self.base(input_ids=max(self.texts, key=lambda text: len(text.ids)).ids[None].to(self.device))
        return min(coarsest.unit, torch.finfo(torch.float32).eps)

    @property
    def noise(self) -> float:
        """The relative change of outputs when every layer's output is rounded once more; measured when first asked."""
        if self._noise is None:
            found = []
            with self.as_given(), _rounded_layers(self.decoder, self.unit):
                for text in self.texts:
                    found.append(self.tolerance.difference(self._plain(text.ids).outputs(False), text.outputs(False)))
            self._noise = max(found)
        return self._noise

    @contextlib.contextmanager
    def _with_own_attention(self) -> Iterator[None]:
        with attention.implementation(self.base, self._own_implementations):
            yield

    @contextlib.contextmanager
    def settled(self, whole: bool) -> Iterator[Separation]:
        """While the block runs, the model's attention is the fastest that agrees with its own; yields how to call it.

        `whole`: whether the whole model is called, and its logits are compared, or the decoder alone.

        Raises ModelError where not even the model's own attention gives the plain outputs, or the model keeps a state.
        """
        module, config = (self.base if whole else self.decoder), self.decoder.config
        with contextlib.ExitStack() as stack:
            stack.enter_context(attention.packed(self.base, config))
            verdict, why = self._with_ours(module, whole)
            if verdict is None:
                stack.close()
                verdict = Separation(False, takes_bounds=False, own_attention=True)
                self._require_own(module, whole, verdict)
                say_once(
                    logger,
                    f"{self.name}: examples go one at a time and with the model's own attention, which packed "
                    f"attention does not reproduce ({why})",
                )
            elif not verdict.apart:
                say_once(logger, f"{self.name}: examples go one at a time ({why})")
            yield verdict

    def _with_ours(self, module: Any, whole: bool) -> tuple[Separation | None, str]:
        """Judge the attention that is set now: how to call it, or None and why it will not do."""
        implementation = self.decoder.config._attn_implementation
        try:
            verdict = separation(module, implementation, self.device)
            windows: set[int] = set()
            why = "in a pack they would see each other"
            if verdict.apart:
                errors = self._errors_of(module, whole, verdict, windows)
                if not self.accepts(errors):
                    why = f"packed, its outputs differ from the plain forward by {max(errors):.1e}"
                    verdict = Separation(False, verdict.takes_bounds, verdict.masked)
            if not verdict.apart:
                errors = self._errors_of(module, whole, verdict, windows)
                if not self.accepts(errors):
                    return None, f"its outputs differ by {max(errors):.1e}"
        except (torch.OutOfMemoryError, StatefulModelError):
            raise
        except Exception as error:  # of the model's own code, which takes other attentions than ours
            return None, one_line(error, 120)
        if implementation == attention.PACKED:
            longest = max(len(text.ids) for text in self.texts)
            # low precision cannot tell a few tokens that a window should have hidden from its own rounding
            coarse = self.tolerance.floor >= _FLOOR_16
            named = [n for n in limits(self.base.config) if n not in windows]
            untried = [n for n in named if coarse or 2 * n >= longest]
            context = context_of(self.base.config)
            if untried and (context is None or min(untried) < context):
                return None, f"its limit of {min(untried)} tokens is kept by its mask alone"
        return verdict, why

    def _errors_of(self, module: Any, whole: bool, mode: Separation, windows: set[int]) -> list[float]:
        found = []
        for pack in self.packs(mode.apart):
            with torch.no_grad():
                output = call(module, self.decoder.config, pack, self.device, mode, packed_windows=windows)
            found += self.errors(pack, _tensor(output, whole), whole)
        return found

    def _require_own(self, module: Any, whole: bool, mode: Separation) -> None:
        try:
            errors = self._errors_of(module, whole, mode, set())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self.name}: the model cannot be called one text at a time without a cache ({one_line(error, 160)}): "
                "mend its forward, or choose another model"
            ) from error
        if not self.accepts(errors):
            raise self.refusal(lambda pack: call(module, self.decoder.config, pack, self.device, mode), max(errors))

    def refusal(
        self,
        ours: Callable[[Pack], Any],
        error: float,
        remedy: str = "",
    ) -> ModelError:
        """Make the error that names the first layer whose output differs when `ours` calls the model."""
        text = max(self.texts, key=lambda one: len(one.ids))
        with torch.no_grad():
            with self.as_given(), _recorded_layers(self.decoder) as wanted:
                self.base(input_ids=text.ids[None].to(self.device))
            with _recorded_layers(self.decoder) as found:
                ours(self.pack([text]))
        where = next(
            (
                name
                for (name, one), (other, two) in zip(found, wanted, strict=False)
                if name != other or not self.accepts([self.tolerance.difference(_rows(one), _rows(two))])
            ),
            "the end of the decoder",
        )
        return ModelError(
            f"{self.name}: the engine's outputs differ from the model's own by {error:.1e}, first after {where}: "
            + (remedy or "load it with attn_implementation='eager', or in float32 (dtype=torch.float32)")
        )

    def plain_losses(self, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
        """Return the mean completion loss of each (input_ids [n], labels [n]) by the plain forward."""
        found = []
        with self.as_given(), torch.no_grad():
            for ids, labels in examples:
                logits = self.base(input_ids=ids[None].to(self.device)).logits[0, :-1]
                targets = labels[1:].to(logits.device, torch.int64)
                counted = targets != IGNORED
                found.append(float(_wide(cross_entropy)(logits[counted], targets[counted])))
        return found

    def losses_agree(
        self,
        ours: Sequence[float],
        plain: Sequence[float],
        examples: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> list[bool]:
        """Tell of each mean loss whether it is the plain one but for rounding."""
        counts = [int((labels[1:] != IGNORED).sum()) for _, labels in examples]
        apart = [abs(a - b) / (1 + abs(b)) for a, b in zip(ours, plain, strict=True)]
        passed = [
            not math.isfinite(b) or d <= self.tolerance.of_loss(n) for d, b, n in zip(apart, plain, counts, strict=True)
        ]
        if all(passed):
            return passed
        with _rounded_layers(self.decoder, self.unit):
            shaken = self.plain_losses(examples)
        # one shaken forward may leave every token with its experts where another does not
        noise = max(self._noise or 0.0, *(abs(a - b) / (1 + abs(b)) for a, b in zip(shaken, plain, strict=True)))
        return [ok or d <= min(_MOST, _NOISES * noise) for ok, d in zip(passed, apart, strict=True)]


def decoder_of(base: Any) -> Any:
    """Return the part of a causal LM that gives the last hidden states; some call their head a decoder."""
    found = base.get_decoder()
    if hasattr(found, "config"):
        return found
    return getattr(base, getattr(base, "base_model_prefix", ""), base)


def vocabulary_of(base: Any) -> int:
    """Return the number of tokens that a causal LM embeds; by its configuration where it has a table for each code."""
    weight = getattr(base.get_input_embeddings(), "weight", None)
    return int(text_config(base.config).vocab_size) if weight is None else len(weight)


def call(module: Any, config: Any, pack: Pack, device: torch.device, mode: Separation, **kwargs: Any) -> Any:
    """Call a decoder or a whole model with a pack in the way that `mode` says."""
    tokens = attention.PackedTokens.of(pack).to(device)
    return attention.call(
        module,
        config._attn_implementation,
        tokens,
        with_bounds=mode.takes_bounds,
        with_positions=not mode.own_attention,
        **({} if mode.own_attention else kwargs),
    )


_LIMIT = re.compile("window|chunk|index_top_?k|local_att|block_size")
# Numbers of layers, patterns of them, and pieces that something other than attention is computed in.
_NO_LIMIT = re.compile("^n_|num_|layer|pattern|feed_forward|mamba|ssm|expert|moe|conv|vision")


def limits(config: Any) -> list[int]:
    """Return the lengths that a configuration sets to what a token attends to: windows, chunks, an indexer's top-k."""
    found: set[int] = set()
    for name, value in vars(text_config(config)).items():
        if not _LIMIT.search(name) or _NO_LIMIT.search(name):
            continue
        numbers = value if isinstance(value, list | tuple) else [value]
        found |= {n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 1}
    return sorted(found)


def _texts(base: Any) -> list[torch.Tensor]:
    """Make random texts, [n] int64 each: of 2 tokens, longer than the limits, of 1 token, and of about half."""
    longest = max([_UNLIMITED, *(2 * n + 3 for n in limits(base.config))])
    context = context_of(base.config)
    longest = max(2, min(longest, _LONGEST, _LONGEST if context is None else context - _ROOM_FOR_OFFSETS))
    allowed = torch.tensor(sorted(set(range(vocabulary_of(base))) - _special_tokens(base.config)) or [0])
    generator = torch.Generator().manual_seed(0)
    lengths = (2, longest, 1, longest // 2 + 1)
    return [allowed[torch.randint(0, len(allowed), (n,), generator=generator)] for n in lengths]


def _special_tokens(config: Any) -> set[int]:
    """Return the tokens that a configuration gives a meaning: an image's token with no image is an error."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            found |= _special_tokens(value)
        elif "token" in name and ("id" in name or "index" in name):
            numbers = value if isinstance(value, list | tuple) else [value]
            found |= {n for n in numbers if isinstance(n, int)}
    return found


def _tensor(output: Any, whole: bool) -> torch.Tensor:
    """Return outputs [T, d] of one row: the last hidden states, or the logits."""
    hidden = getattr(output, "last_hidden_state", None)
    return (output.logits if whole or hidden is None else hidden)[0]


def _wide(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Have `function` take logits in fp32 at least."""
    return lambda logits, *rest: function(logits.to(torch.promote_types(logits.dtype, torch.float32)), *rest)


@contextlib.contextmanager
def _captured(module: Any) -> Iterator[list[torch.Tensor]]:
    """Gather the last hidden states [1, n, d] that `module` gives out while the block runs."""
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if isinstance(hidden, torch.Tensor):
            seen.append(hidden.clone())

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _layers(decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the outermost members of lists of modules, by name; every module where there is no list."""
    lists = [name for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    found = [
        (f"{name}.{place}" if name else place, layer)
        for name in outer
        for place, layer in decoder.get_submodule(name).named_children()
    ]
    return found or [(name, module) for name, module in decoder.named_modules() if name]


def _first_tensor(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output
    values = output if isinstance(output, tuple | list) else getattr(output, "values", tuple)()
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


@contextlib.contextmanager
def _recorded_layers(decoder: nn.Module) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Gather the layers' outputs in the order of their calls."""
    seen: list[tuple[str, torch.Tensor]] = []

    def keep(name: str, output: Any) -> None:
        if (tensor := _first_tensor(output)) is not None:
            seen.append((name, tensor.detach().clone()))

    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: keep(name, output))  # type: ignore[misc]
        for name, layer in _layers(decoder)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Coarsest(TorchDispatchMode):
    """Watch a forward for the coarsest dtype that floating numbers of float64 are turned into."""

    unit = torch.finfo(torch.float64).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64 and found.is_floating_point():
            self.unit = max(self.unit, torch.finfo(found.dtype).eps)
        return found


@contextlib.contextmanager
def _rounded_layers(decoder: nn.Module, unit: float) -> Iterator[None]:
    """While the block runs, every number that a layer gives out is moved by `unit` of itself, up or down."""
    generator = torch.Generator().manual_seed(0)

    def shake(_: Any, __: Any, output: Any) -> Any:
        tensor = _first_tensor(output)
        if tensor is None or not tensor.is_floating_point():
            return output
        signs = torch.randint(0, 2, tensor.shape, generator=generator).mul_(2).sub_(1)
        moved = tensor * (1 + unit * signs).to(tensor.device, tensor.dtype)
        if tensor is output:
            return moved
        if isinstance(output, tuple):
            return tuple(moved if value is tensor else value for value in output)
        return output

    handles = [layer.register_forward_hook(shake) for _, layer in _layers(decoder)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor[:, None]
