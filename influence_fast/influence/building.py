"""A gradient store from a model, its data and a `RowSpec`, with the sketch that the spec asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from influence_fast.data.held import Held
from influence_fast.deprecation import also_called_as
from influence_fast.errors import ConfigError
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.preconditioners import DEFAULT
from influence_fast.influence.sketch_fitting import fit_projection, resolved
from influence_fast.store.building import DEFAULT_OPTIONS, DEFAULT_SPEC, BuildOptions, build_rows, check_call, old_build
from influence_fast.store.reader import Store
from influence_fast.store.shard_rows import Texts
from influence_fast.store.survey import held

if TYPE_CHECKING:
    from influence_fast.data.examples import Example


@also_called_as(old_build("build_store(path, model, data, spec, tokenizer=..., options=BuildOptions(...))"))
def build_store(
    path: str | Path,
    model: nn.Module,
    data: Sequence[Example] | Held,
    spec: RowSpec = DEFAULT_SPEC,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncate: bool = False,
    options: BuildOptions = DEFAULT_OPTIONS,
) -> Store:
    """Compute the gradient of every example of `data` and store it in the folder `path`.

    Run again after any interruption (kill, full disk, Ctrl-C), it computes only the shards that are not yet
    recorded, and the store comes out bit for bit as if nothing had happened. Shards that were damaged since are
    computed again too, with a warning: every byte that is there is checked first.

    Args:
        path: a new or empty folder, or a store of the same work, finished or not: of this data, or joined (by
            `merge_stores`, `append_store`) of stores of its pieces, in its order.
        model: a LoRA model (peft), or one without an adapter where `spec.target` names its linears.
        data: `data.Example`s; or tokenized examples `{"id", "input_ids", "labels"}` in any form that
            `data.held.as_examples` takes. Ids must be unique; rows without one get their place.
        spec: how a gradient becomes a row. The sketch that it asks for is fitted first, with `SketchFit`'s own damping
            and labels, and kept in the store; `store.spec` has it. For others give
            `spec.with_projection(fit_projection(model, data, spec, fit=...))`.
        tokenizer: the model's own; None when `data` is tokenized already.
        max_length: longer examples are set aside, or cut when `truncate`.
        options: how shards are cut, what resumes, what is shown, what is done about gradients that are not finite.

    Returns:
        The finished store, with the examples' losses (as `spec.loss_reduction` has them) beside the rows.
        `store.set_aside` has (id, reason) of every example without a row; a warning sums it up.

    Raises:
        StoreError: `path` holds other work (model, data, projection, ...: the message names the field and both
            sides), ids come twice, or the disk fails; finished shards stay.
        NumericError: a gradient is not finite and `options.on_nonfinite` is "error".
        DataError, ModelError: as `per_example_gradients`.
        ConfigError: a setting that does not fit the others or the device.
        KeyboardInterrupt: stopped with Ctrl-C; the message says how much is done.

    Example:
        store = inf.build_store("store", model, examples, inf.RowSpec(width=8192), tokenizer=tokenizer)
    """
    check_call(model, spec, options)
    if options.part != (0, 1):
        raise ConfigError("part: a whole store has no other parts; for one process's share call build_shards")
    dataset, texts = held(data), Texts(tokenizer, max_length, truncate)

    def fit(asked: RowSpec) -> Projection:
        return fit_projection(
            model, dataset, asked, tokenizer=tokenizer, max_length=max_length, truncate=truncate, folder=path
        )

    return build_rows(path, model, dataset, resolved(spec, DEFAULT, model, fit), texts, options)
