"""Compare the engine with the model's own plain forward, and choose the fastest way of calling it that agrees.

The reference is `model(input_ids)`, one text at a time, with the model as it was given: its own attention, mask and
positions. The ways, fastest first:

    packed          our attention (or the model's flash-attention), several examples in one row
    alone           the same, one example at a time
    own attention   one example at a time, with the model's own attention, mask and positions left as they are

What agrees in no way is refused by the name of the first layer whose output differs. Texts are longer than the windows,
chunks and top-k that the configuration names, as far as `probe_texts` goes; a longer limit that our attention is not
handed as an argument cannot be tried, and such a model keeps its own attention.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from influence_fast.data.packing import IGNORED, Pack, context_of, pack_examples
from influence_fast.errors import ModelError, one_line, warn_once
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.model.layer_outputs import (
    CoarsestRounding,
    as_rows,
    captured,
    outputs_of,
    recorded_layers,
    rounded_layers,
)
from influence_fast.gradients.model.pack_isolation import Separation, StatefulModelError, separation
from influence_fast.gradients.model.probe_texts import limits, probe_texts
from influence_fast.gradients.model.tolerance import FLOOR_16, Tolerance

logger = logging.getLogger(__name__)

_LAST = 16  # tokens whose logits are kept: they depend on all before them
_MOST = 0.5  # beyond which no noise excuses a difference
# Standard deviations of noise, as a plain forward with rounded layer outputs shows it, that count as agreement.
_NOISES = 4.0


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
        self._options: dict[str, Any] = {}  # what the plain forward is given beside ids
        self.texts = [self._plain(ids) for ids in probe_texts(base)]
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
        """Return the model's type, for messages."""
        return str(getattr(self.base.config, "model_type", type(self.base).__name__))

    @property
    def usable(self) -> bool:
        """Return whether the plain outputs are numbers; NaN weights are found, and named, by their gradients."""
        return all(bool(text.outputs(True).isfinite().all()) for text in self.texts)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, vocab] of the model's own forward of ids [n], by `input_ids` alone if it can.

        Raises ModelError where that fails, with a cache (as by default) and without.
        """
        given = ids[None].to(self.device)
        for options in [self._options] if self._options else [{}, {"use_cache": False}]:
            try:
                logits: torch.Tensor = self.base(input_ids=given, **options).logits[0]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                failure = error
            else:
                self._options = options
                return logits
        raise ModelError(
            f"{self.name}: the model's own forward of {len(ids)} tokens fails ({one_line(failure, 160)}): a model is "
            "needed that takes input_ids alone"
        ) from failure

    def _plain(self, ids: torch.Tensor) -> PlainText:
        with torch.no_grad(), captured(self.decoder) as seen:
            logits = self._forward(ids)
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
        """Pack texts together, every token of which counts; by default all of them."""
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
        """Return the relative rounding of the model's coarsest sums: many float64 models compute norms in float32."""
        if self.tolerance.dtype != torch.float64:
            return self.tolerance.unit
        longest = max(self.texts, key=lambda text: len(text.ids)).ids
        with self.as_given(), torch.no_grad(), CoarsestRounding() as coarsest:
            self._forward(longest)
        return min(coarsest.unit, torch.finfo(torch.float32).eps)

    @property
    def noise(self) -> float:
        """Return the relative change of outputs when every layer's output is rounded once more; measured once."""
        if self._noise is None:
            found = []
            with self.as_given(), rounded_layers(self.decoder, self.unit):
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
        """Set the fastest attention that agrees with the model's own, while the block runs; yield how to call it.

        `whole`: whether the whole model is called, and its logits are compared, or the decoder alone.

        Raises ModelError where not even the model's own attention gives the plain outputs, or the model keeps a state.
        """
        module, config = (self.base if whole else self.decoder), self.decoder.config
        with contextlib.ExitStack() as stack:
            stack.enter_context(attention.packed(self.base, config))
            verdict, why = self._with_ours(module, whole)
            if verdict is None:
                stack.close()
                verdict = Separation(False, takes_bounds=False, own_attention=True, why=why)
                self._require_own(module, whole, verdict)
                warn_once(
                    logger,
                    f"{self.name}: examples go one at a time and with the model's own attention, which packed "
                    f"attention does not reproduce ({why})",
                )
            elif not verdict.apart:
                warn_once(logger, f"{self.name}: examples go one at a time ({why})")
                verdict = replace(verdict, why=why)
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
            coarse = self.tolerance.floor >= FLOOR_16
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
            found += self.errors(pack, outputs_of(output, whole), whole)
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
            with self.as_given(), recorded_layers(self.decoder) as wanted:
                self._forward(text.ids)
            with recorded_layers(self.decoder) as found:
                ours(self.pack([text]))
        where = next(
            (
                name
                for (name, one), (other, two) in zip(found, wanted, strict=False)
                if name != other or not self.accepts([self.tolerance.difference(as_rows(one), as_rows(two))])
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
                logits = self._forward(ids)[:-1]
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
        with rounded_layers(self.decoder, self.unit):
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


def _wide(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `function` for logits in fp32 at least."""
    return lambda logits, *rest: function(logits.to(torch.promote_types(logits.dtype, torch.float32)), *rest)
