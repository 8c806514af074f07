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
from collections.abc import Callable, Sequence
from typing import Any

import torch

from influence_fast.data.packing import Pack
from influence_fast.data.wrappers import unwrapped
from influence_fast.errors import ConfigError
from influence_fast.gradients import comparison, direct_use
from influence_fast.gradients.model import backends
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.model.loss import drawn_tokens
from influence_fast.gradients.model.model_kinds import check_predicts_tokens
from influence_fast.gradients.model.referee import Referee
from influence_fast.gradients.rows.layout import LayoutEntry, layout_of
from influence_fast.gradients.rows.precision import AUTO, check_precision
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.step import opened
from influence_fast.gradients.step.cuda_graphs import CudaRecorder, Wish
from influence_fast.gradients.step.opened import OpenedModel
from influence_fast.gradients.step.reduction import FullReducer, ProjectedReducer, Reducer
from influence_fast.gradients.step.runner import Runner
from influence_fast.gradients.step.step import hidden_of, losses_of
from influence_fast.gradients.step.step_inputs import StepInputs
from influence_fast.gradients.targets import check_exact, find_linears, linear_for_losses
from influence_fast.transfer import to_device


class GradientEngine:
    """Opens a model for per-example gradients; use as a context manager.

    While open, the forwards of the LoRA layers, or of the linears that `projection.target` names, are replaced, dropout
    is off and no parameter asks for a gradient; everything is put back on exit. The factors, or these weights, must not
    change while the engine is open.

    `reducer`, a function of the model's LoRA linears and their row layout, makes something else of each module's
    tokens than gradient rows (see `streaming`). With `bf16_rows` the kernels may write rows in bf16.
    `precision`: "auto", products with the base weights in the model's own dtype, or "fp8", those of the LoRA linears in
    8 bits (see `fp8`; ConfigError on entry where that cannot be).
    `cuda_graphs`: replay recorded steps in place of launching each operation (see `cuda_graphs`). By default where they
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
        precision: str = AUTO,
        cuda_graphs: bool | None = None,
    ) -> None:
        check_precision(precision)
        if loss_reduction not in ("mean", "sum"):
            raise ConfigError(f"loss_reduction must be 'mean' or 'sum', not {loss_reduction!r}")
        self.model = unwrapped(model)
        self.loss_reduction = loss_reduction
        self.precision = precision
        self.linears = self._find_linears(projection)
        self.device = self.linears[0].device
        self.backend, self.backend_why = backends.choose(backend, self.device, self.linears[0].dtype)
        self.reducer = _reducer(self.linears, projection, reducer)
        self.reducer.backend = self.backend
        self.reducer.bf16_rows = bf16_rows
        self.base = opened.base_of(self.model)
        check_predicts_tokens(self.base)
        self.compared = False  # whether data of the user's own were
        self._wish = Wish.of(cuda_graphs)
        self._why_no_graphs = opened.not_recordable(
            self.base, self.linears, self.reducer, self.backend, self.backend_why
        )
        self.cuda_graphs = self._wish.granted(self._why_no_graphs)
        self._runner: Runner | None = None
        self._stack = contextlib.ExitStack()
        self._opened: OpenedModel | None = None

    def _find_linears(self, projection: Projection | None) -> list[LoraLinear]:
        """Return the linears whose gradients are in a row. Raises ModelError where there is none."""
        return find_linears(self.model, projection)

    @property
    def opened(self) -> OpenedModel:
        """Return what is true of the model; raise RuntimeError unless the engine is open."""
        if self._opened is None:
            raise RuntimeError("the engine is not open: use it in a with block")
        return self._opened

    @property
    def packs_are_separate(self) -> bool:
        """Return whether several examples go in one pack; else one at a time."""
        return self.opened.mode.packs_pay

    @property
    def own_attention(self) -> bool:
        """Return whether the model keeps its own attention and mask."""
        return self.opened.mode.own_attention

    @property
    def referee(self) -> Referee | None:
        """Return the model's own plain outputs, while open; None for a model without numbers."""
        return None if self._opened is None else self._opened.referee

    @property
    def width(self) -> int:
        """Return the count of numbers in a row."""
        return self.reducer.width

    def __enter__(self) -> GradientEngine:
        if torch.is_inference_mode_enabled():
            raise ConfigError(
                "gradients cannot be taken inside torch.inference_mode(), whose tensors no backward pass keeps: call "
                "outside of it (torch.no_grad() does no harm)"
            )
        with contextlib.ExitStack() as stack:
            opening = opened.open_model(
                self.model, self.linears, self.reducer, self.backend, self.precision, self._why_no_graphs
            )
            self._opened = stack.enter_context(opening)
            stack.callback(self._forget)
            if self.cuda_graphs:
                self.cuda_graphs = self._wish.granted(self._opened.why_no_graphs)
            comparison.compare_opened(self._opened, self.loss_reduction, self.reducer.dtype)
            direct_use.check_weights(self._opened)
            if not self._wish.said and self._opened.kept_bytes(1) is None:
                self.cuda_graphs = False  # a second pack's activations might not fit, and nothing would say so before
            recorder = CudaRecorder(self.device) if self.cuda_graphs else None
            self._runner = Runner(self._opened, self.reducer, self.loss_reduction, self.backend, recorder)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._runner = None
        self._stack.close()

    def _forget(self) -> None:
        self._opened = None
        self._runner = None

    @property
    def runner(self) -> Runner:
        """Return what runs packs; raise RuntimeError unless the engine is open."""
        if self._runner is None:
            raise RuntimeError("the engine is not open: use it in a with block")
        return self._runner

    def run(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute gradients and losses of a pack: rows [E, k], losses [E] (reduced as the gradients are).

        On a GPU it returns as soon as all is queued; nothing in it waits for the GPU. A pack whose activations would
        not fit in the GPU's free memory has its layers recomputed in the backward (docs/memory.md).
        """
        return self.runner.run(pack)

    def overflows(self, tokens: int) -> bool:
        """Return whether what the layers keep of so many tokens is more than there is room for."""
        return self.runner.overflows(tokens)

    def losses(self, pack: Pack) -> torch.Tensor:
        """Compute the losses of a pack [E], without a backward pass."""
        return losses_of(self.opened, pack, self.loss_reduction, self.reducer.dtype)

    @torch.no_grad()
    def draw(self, pack: Pack, uniform: torch.Tensor) -> torch.Tensor:
        """Draw a token from the model's prediction of each that the loss counts [n] int64, by uniform numbers [n]."""
        inputs = StepInputs.of(pack, self.loss_reduction, self.reducer.dtype).to(self.device)
        return drawn_tokens(*hidden_of(self.opened, inputs), to_device(uniform, self.device))

    def compare_losses(self, pack: Pack, losses: torch.Tensor, names: Sequence[str]) -> None:
        """Raise ModelError where losses [E] of a pack, as `run` gives them, are not those of the plain forward.

        names: the pack's examples, for the message (see `comparison.compare_losses`).
        """
        comparison.compare_losses(self.opened, pack, losses, names, self.loss_reduction, self.reducer.dtype)

    def as_given(self) -> contextlib.AbstractContextManager[None]:
        """Restore the model's own forwards and attention, as it was given, while the block runs; dropout is off."""
        return self.opened.given.restored()


class LossEngine(GradientEngine):
    """Opens a model for the losses of examples alone, where it may have no LoRA layer."""

    def __init__(self, model: Any, loss_reduction: str = "mean", precision: str = AUTO) -> None:
        super().__init__(model, None, loss_reduction, precision=precision)

    def _find_linears(self, projection: Projection | None) -> list[LoraLinear]:
        return linear_for_losses(self.model)


def _reducer(
    linears: list[LoraLinear],
    projection: Projection | None,
    make: Callable[[list[LoraLinear], list[LayoutEntry]], Reducer] | None,
) -> Reducer:
    """Return what sums the rows: what `make` makes, or by the projection's kind."""
    layout = layout_of(linears, projection)
    if make is not None:
        return make(linears, layout)
    check_exact(projection, layout)
    reducer_class = ProjectedReducer if projection is not None and projection.sided else FullReducer
    return reducer_class(linears, layout, projection)
