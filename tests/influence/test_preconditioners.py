"""Every preconditioner against a dense float64 computation from its definition, and the small interface around it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from influence_fast.config import RunConfig
from influence_fast.data.adapter_names import plain_name
from influence_fast.errors import ConfigError, DataError, ModelError, NumericError
from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.gradients.rows.projection import Projection, random_matrix
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence import preconditioners
from influence_fast.influence.adam import adam_moments
from influence_fast.influence.building import build_store
from influence_fast.influence.damping import GRID
from influence_fast.influence.row_access import factors_of, module_blocks
from influence_fast.influence.scorer import Scorer
from influence_fast.philox import sjlt_map
from influence_fast.settings import from_dict
from influence_fast.store.building import BuildOptions

# two modules, ranks 2 and 1, p = 3 and 5
FACTORS = [
    LayoutEntry("m1", "lora_A", (2, 3), 0),
    LayoutEntry("m1", "lora_B", (3, 2), 6),
    LayoutEntry("m2", "lora_A", (1, 5), 12),
    LayoutEntry("m2", "lora_B", (5, 1), 17),
]
BLOCKS = [(0, 12), (12, 22)]
WIDTH = 22
NAMES = ("adam", "fisher", "ekfac", "datainf")


def rows(n: int = 40, k: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """Correlated numbers, six decades apart between coordinates."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(k) + 0.4 * torch.randn(k, k, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, k, generator=generator) @ mixing * torch.logspace(-4, 2, k)


def fitted(name: str, data: torch.Tensor, damping: float | str = 0.1) -> Any:
    return preconditioners.fit(name, lambda: data.split(7), BLOCKS, damping=damping, factors=FACTORS)


def dense(name: str, data: torch.Tensor, damping: float) -> np.ndarray:
    """H^-1 [k, k] in float64, block by block from the definition."""
    g = data.double().numpy()
    out = np.zeros((WIDTH, WIDTH))
    if name == "ekfac":
        for entry in FACTORS:
            m, n = entry.shape
            at = slice(entry.offset, entry.offset + m * n)
            matrices = g[:, at].reshape(-1, m, n)
            left = np.linalg.eigh(np.mean([G @ G.T for G in matrices], axis=0))[1]
            right = np.linalg.eigh(np.mean([G.T @ G for G in matrices], axis=0))[1]
            basis = np.kron(left, right)  # of row-major vec(G)
            corrected = np.mean((g[:, at] @ basis) ** 2, axis=0)
            h = basis @ np.diag(corrected) @ basis.T + damping * corrected.mean() * np.eye(m * n)
            out[at, at] = np.linalg.inv(h)
        return out
    for start, end in BLOCKS:
        at, b = slice(start, end), g[:, start:end]
        eye = np.eye(end - start)
        fisher = b.T @ b / len(b)
        ridge = damping * np.trace(fisher) / (end - start)
        if name == "fisher":
            out[at, at] = np.linalg.inv(fisher + ridge * eye)
        elif name == "datainf":
            out[at, at] = np.mean([np.linalg.inv(np.outer(row, row) + ridge * eye) for row in b], axis=0)
        elif name == "adam":
            root = np.sqrt(np.mean(b**2, axis=0))
            out[at, at] = np.diag(1 / (root + damping * root.mean()))
    return out


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    """Largest relative error of a module's block."""
    found_ = found.double().numpy()
    return max(
        float(np.linalg.norm(found_[:, a:b] - expected[:, a:b]) / np.linalg.norm(expected[:, a:b])) for a, b in BLOCKS
    )


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("name", NAMES)
def test_apply_is_the_dense_inverse(name: str, damping: float) -> None:
    data, queries = rows(), rows(3, seed=1)
    expected = queries.double().numpy() @ dense(name, data, damping)
    found = fitted(name, data, damping).apply(queries)
    assert found.dtype == queries.dtype
    assert error(found, expected) < 1e-5
    assert error(fitted(name, data.double(), damping).apply(queries.double()), expected) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_may_come_in_any_pieces(name: str) -> None:
    data, queries = rows(), rows(3, seed=1)
    whole = preconditioners.fit(name, lambda: [data], BLOCKS, factors=FACTORS).apply(queries)
    pieces = preconditioners.fit(name, lambda: iter(data.split(1)), BLOCKS, factors=FACTORS).apply(queries)
    assert error(pieces, whole.double().numpy()) < 1e-5


@pytest.mark.parametrize(("name", "power"), [("fisher", 0), ("ekfac", 0), ("datainf", 0), ("adam", 1), ("none", 2)])
def test_scores_scale_as_h_says(name: str, power: int) -> None:
    """With every gradient c times as large, g^T H^-1 g stays, or grows by c (Adam: H is a root) or c^2 (H = I)."""
    data, queries, c = rows(), rows(2, seed=1), 1e3
    small = fitted(name, data).apply(queries).double() @ data.double().T
    large = fitted(name, data * c).apply(queries * c).double() @ (data * c).double().T
    torch.testing.assert_close(large, small * c**power, rtol=1e-4, atol=1e-5 * float(small.abs().max()) * c**power)


@pytest.mark.parametrize("damping", [0.1, "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_an_all_zero_block_disturbs_no_other(name: str, damping: float | str) -> None:
    data, queries = rows(), rows(2, seed=1)
    data[:, 12:] = 0
    found = fitted(name, data, damping)
    applied = found.apply(queries)
    assert torch.isfinite(applied).all()
    expected = dense(name, rows(), found.damping)[:12, :12]
    reference = queries[:, :12].double().numpy() @ expected
    assert np.linalg.norm(applied[:, :12].double().numpy() - reference) < 1e-5 * np.linalg.norm(reference)


def test_ekfac_of_a_vector_block_is_the_fisher() -> None:
    """Where one side is 1 the Kronecker factor of the other is the Fisher itself: m2 of this layout."""
    data, queries = rows(), rows(3, seed=1)
    by_factor = preconditioners.fit("fisher", lambda: [data], [(0, 12), (12, 17), (17, 22)]).apply(queries)
    found = fitted("ekfac", data).apply(queries)
    assert (found - by_factor)[:, 12:].norm() < 1e-5 * by_factor[:, 12:].norm()
    assert (found - by_factor)[:, :12].norm() > 1e-2 * by_factor[:, :12].norm()


def test_datainf_of_one_row_is_the_fisher() -> None:
    data, queries = rows(1), rows(3, seed=1)
    expected = fitted("fisher", data).apply(queries)
    assert error(fitted("datainf", data).apply(queries), expected.double().numpy()) < 1e-5


def test_datainf_takes_blocks_too_wide_for_a_matrix() -> None:
    k = preconditioners.MAX_DENSE + 3
    generator = torch.Generator().manual_seed(0)
    data, query = torch.randn(4, k, generator=generator), torch.randn(1, k, generator=generator)
    ridge = 0.1 * data.double().square().mean()
    expected = torch.zeros(1, k, dtype=torch.float64)
    for row in data.double():  # Woodbury's identity, row by row
        expected += (query.double() - (query.double() @ row) / (ridge + row @ row) * row) / ridge / len(data)
    found = preconditioners.fit("datainf", lambda: [data], [(0, k)]).apply(query)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", [*NAMES, "none"])
def test_scores_from_a_store(tmp_path: Path, tiny_lora: Any, name: str) -> None:
    """Blocks and shapes come from the store's own record of its layout."""
    model = tiny_lora("qwen2")
    projection = Projection(dim=3)
    entries = gradient_layout(model, projection)
    width = entries[-1].offset + entries[-1].shape[0] * entries[-1].shape[1]
    data, queries = rows(12, width), rows(2, width, seed=1)

    def source(model: Any, examples: list[dict[str, Any]], spec: RowSpec) -> Any:
        yield list(range(len(examples))), torch.stack([data[int(e["id"])] for e in examples])

    ids = torch.tensor([1, 2, 3])
    examples = [{"id": str(i), "input_ids": ids, "labels": ids} for i in range(len(data))]
    options = BuildOptions(shard_rows=5, gradients=source)
    store = build_store(tmp_path / "store", model, examples, RowSpec(dim=3, dtype="fp32"), options=options)
    assert factors_of(store) == entries
    moments = torch.rand(width) if name == "adam" else None
    scorer = Scorer.fit(store, preconditioner=name, damping=0.3, moments=moments, fisher="data")
    found = scorer.scores(queries, {"all": [0, 1]})
    h = preconditioners.fit(
        name, lambda: [data.double()], module_blocks(entries), damping=0.3, factors=entries, moments=moments
    )
    expected = (data.double() @ h.apply(queries.double()).T).mean(dim=1).numpy()
    assert np.linalg.norm(found.columns["s_all"] - expected) < 1e-4 * np.linalg.norm(expected)


def test_a_sketched_store_has_no_factor_blocks(tmp_path: Path, tiny_lora: Any) -> None:
    ids = torch.arange(6)
    examples = [{"id": str(i), "input_ids": ids[: 3 + i], "labels": ids[: 3 + i]} for i in range(3)]
    spec = RowSpec(dim=3, width=40, sketch="random")
    store = build_store(tmp_path / "store", tiny_lora("qwen2"), examples, spec)
    assert factors_of(store) is None
    with pytest.raises(ConfigError, match="'ekfac' needs rows with a block for each LoRA factor"):
        Scorer.fit(store, preconditioner="ekfac", fisher="data").scores(rows(2, 40), {"all": [0, 1]})
    table = Scorer.fit(store, preconditioner="datainf", fisher="data").scores(rows(2, 40), {"all": [0, 1]})
    assert np.isfinite(table.columns["s_all"]).all()


def test_settings_that_do_not_fit_together_are_refused_at_once() -> None:
    def config(width: int | None = None, **influence: Any) -> Any:
        raw = {
            "output": "run",
            "model": {"path": "model"},
            "data": {"pool": "pool.jsonl", "holdout_validation": 1, "holdout_test": 1},
            "gradients": {"width": width},
            "influence": influence,
            "training": {"save_checkpoints": True},
        }
        return from_dict(RunConfig, raw).influence

    assert config(preconditioner="ekfac", damping="auto").damping == "auto"
    assert config(preconditioner="datainf", damping="1e-2", width=64).damping == 0.01
    assert config(preconditioner="adam", optimizer="checkpoint-9").optimizer == "checkpoint-9"
    for settings, message in (
        ({"damping": "often"}, "influence.damping: damping must be a number above 0 or 'auto', not 'often'"),
        ({"damping": 0}, "influence.damping: damping must be above 0"),
        ({"preconditioner": "fisher", "optimizer": "x"}, "influence.optimizer is read by 'adam' and 'less' only"),
        ({"preconditioner": "adam", "optimizer": "x", "damping": "auto"}, "'auto' cannot be picked"),
        ({"preconditioner": "less", "checkpoints": True, "damping": "auto"}, "'auto' cannot be picked"),
        ({"preconditioner": "less", "checkpoints": True, "optimizer": "x"}, "has moments of its own"),
        ({"preconditioner": "fisher_cosine", "width": 10_000}, "a Fisher block of 10000 numbers is too wide"),
        ({"fallback": "refrence"}, "influence.fallback: unknown value"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(**settings)


# ---- damping="auto" ------------------------------------------------------------------------------------------------


def held_out_log_likelihood(name: str, data: torch.Tensor, damping: float) -> float:
    """Of rows 4, 9, 14, ... under the Gaussian with the damped H of the others as covariance, from its density."""
    held = np.arange(len(data)) % 5 == 4
    inverse = dense("fisher" if name == "datainf" else name, data[~held], damping)
    covariance = np.linalg.inv(inverse)
    if name == "adam":
        covariance = covariance @ covariance
    total = 0.0
    blocks = [(e.offset, e.offset + e.shape[0] * e.shape[1]) for e in FACTORS] if name == "ekfac" else BLOCKS
    for start, end in blocks:
        density = stats.multivariate_normal(cov=covariance[start:end, start:end], allow_singular=True)
        total += density.logpdf(data[held, start:end].double().numpy()).sum()
    return total


@pytest.mark.parametrize("n", [24, 400])
@pytest.mark.parametrize("name", NAMES)
def test_auto_takes_the_share_that_makes_held_out_rows_likeliest(name: str, n: int) -> None:
    data = rows(n).double() / torch.logspace(-4, 2, WIDTH)  # scipy's density wants a fair condition number
    best = max(GRID, key=lambda share: held_out_log_likelihood(name, data, share))
    found = fitted(name, data, "auto")
    assert found.damping == best
    queries = rows(2, seed=1).double()
    assert error(found.apply(queries), queries.numpy() @ dense(name, data, best)) < 1e-8  # the final fit is on all rows


def test_auto_damps_more_where_rows_are_few() -> None:
    shares = [fitted("fisher", torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(3)), "auto").damping
              for n in (12, 60, 3000)]  # fmt: skip
    assert shares[0] > shares[1] >= shares[2]


# ---- Adam's own moments --------------------------------------------------------------------------------------------


def fake_checkpoint(folder: Path, layout: list[LayoutEntry], step: int = 7) -> torch.Tensor:
    """An optimizer state as training leaves it, parameters in another order than the layout's; v [k], not corrected."""
    generator = torch.Generator().manual_seed(0)
    moments = [torch.rand(entry.shape, generator=generator) ** 4 for entry in layout]
    order = list(range(len(layout)))[::-1]
    state = {
        i: {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(layout[e].shape), "exp_avg_sq": moments[e]}
        for i, e in enumerate(order)
    }
    torch.save({"state": state, "param_groups": []}, folder / "optimizer.pt")
    names = [f"base_model.model.{layout[e].module}.{layout[e].factor}.default.weight" for e in order]
    (folder / "optimizer_names.json").write_text(json.dumps(names).replace("base_model.model.base_model", "base_model"))
    return torch.cat([moment.flatten() for moment in moments]).double()


@pytest.fixture
def layout(tiny_lora: Any) -> list[LayoutEntry]:
    return gradient_layout(tiny_lora("qwen2"))


def test_moments_of_exact_rows_are_the_optimizers(tmp_path: Path, layout: list[LayoutEntry]) -> None:
    v = fake_checkpoint(tmp_path, layout)
    torch.testing.assert_close(adam_moments(tmp_path, layout), v / (1 - 0.999**7), rtol=1e-12, atol=0)
    torch.testing.assert_close(adam_moments(tmp_path, layout, beta2=0.9), v / (1 - 0.9**7), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("step", 0.0, "step 0"),
        ("step", float("nan"), "step nan"),
        ("exp_avg_sq", float("nan"), "NaN or infinite second moments"),
        ("exp_avg_sq", float("inf"), "NaN or infinite second moments"),
        ("exp_avg_sq", -1.0, "negative second moments"),
    ],
)
@pytest.mark.parametrize("projection", [None, Projection(dim=3)], ids=["exact", "projected"])
def test_moments_of_no_use_are_refused_by_factor(
    tmp_path: Path, layout: list[LayoutEntry], key: str, value: float, fault: str, projection: Projection | None
) -> None:
    fake_checkpoint(tmp_path, layout)
    content = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    content["state"][2][key].view(-1)[0] = value
    torch.save(content, tmp_path / "optimizer.pt")
    entry = layout[::-1][2]
    with pytest.raises(ModelError, match=rf"{plain_name(entry.module)}\.{entry.factor} has {fault}"):
        adam_moments(tmp_path, layout, projection=projection)


def test_a_beta2_that_is_no_share_is_refused(tmp_path: Path, layout: list[LayoutEntry]) -> None:
    fake_checkpoint(tmp_path, layout)
    with pytest.raises(ModelError, match=r"lora_[AB] has beta2 1, "):
        adam_moments(tmp_path, layout, beta2=1.0)


PROJECTIONS = [
    Projection(dim=3),
    Projection("kron", dim=3),
    Projection(dim=3, width=50),
    Projection("sjlt", width=50),
    Projection("rademacher", width=50),
]


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: f"{p.kind}-{p.width}")
def test_projected_moments_are_the_squares_of_the_projection(
    tmp_path: Path, layout: list[LayoutEntry], projection: Projection
) -> None:
    v = fake_checkpoint(tmp_path, layout) / (1 - 0.999**7)
    blocks, ranks = [], {e.module: e.shape[0] for e in layout if e.factor == "lora_A"}
    for entry in layout:
        moment = v[entry.offset : entry.offset + entry.shape[0] * entry.shape[1]].view(entry.shape)
        key = entry.module.removeprefix("base_model.model.")
        side = "in" if entry.factor == "lora_A" else "out"
        if projection.kind in ("one_sided", "kron"):
            long = entry.shape[1] if side == "in" else entry.shape[0]
            squares = random_matrix(projection, f"{key}/{side}", long, dtype=torch.float64) ** 2
            moment = moment @ squares if side == "in" else squares.T @ moment
            if projection.kind == "kron":
                rank = random_matrix(projection, f"{key}/rank", ranks[entry.module], dtype=torch.float64) ** 2
                moment = rank.T @ moment if side == "in" else moment @ rank
        blocks.append((f"{key}/row/{entry.factor}", moment.flatten()))
    if projection.width is None:
        expected = torch.cat([moment for _, moment in blocks])
    else:
        expected = torch.zeros(projection.width, dtype=torch.float64)
        for name, moment in blocks:
            if projection.kind == "rademacher":
                expected += moment.sum() / projection.width
                continue
            bucket, _ = sjlt_map(projection.seed, name, len(moment), projection.width)
            for b, m in zip(bucket.tolist(), moment, strict=True):
                expected[b] += m
    found = adam_moments(tmp_path, layout, projection=projection)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_adam_uses_given_moments_and_reads_no_row() -> None:
    moments = torch.rand(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def refuse() -> Iterable[torch.Tensor]:
        raise AssertionError("rows were read")

    queries = rows(2)
    found = preconditioners.fit("adam", refuse, BLOCKS, damping=0.5, moments=moments).apply(queries)
    root = moments.sqrt()
    eps = torch.cat([0.5 * root[:12].mean().expand(12), 0.5 * root[12:].mean().expand(10)])
    assert error(found, (queries.double() / (root + eps)).numpy()) < 1e-6


# ---- the interface -------------------------------------------------------------------------------------------------


def test_none_and_cosine_leave_queries_as_they_are() -> None:
    queries = rows(2)
    for name, normalize in (("none", False), ("cosine", True)):
        found = preconditioners.fit(name, lambda: [], BLOCKS)
        assert torch.equal(found.apply(queries), queries)
        assert found.normalize is normalize


def test_an_unknown_name_is_met_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        preconditioners.fit("cosin", lambda: [], BLOCKS)


@pytest.mark.parametrize("name", NAMES)
def test_mistakes_are_named(name: str) -> None:
    for damping in (0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="above 0"):
            fitted(name, rows(), damping)
    with pytest.raises(ConfigError, match="'auto', not 'often'"):
        fitted(name, rows(), "often")
    with pytest.raises(ConfigError, match=f"'{name}' needs at least one training row"):
        preconditioners.fit(name, lambda: [], BLOCKS, factors=FACTORS)
    with pytest.raises(ConfigError, match="at least 10 training rows, not 9"):
        fitted(name, rows(9), "auto")
    with pytest.raises(DataError, match=r"\(40, 21\) do not fit blocks of 22"):
        preconditioners.fit(name, lambda: [rows()[:, 1:]], BLOCKS, factors=FACTORS)
    for damping in (0.1, "auto"):
        for bad in (float("nan"), float("inf")):
            broken = rows()
            broken[3, 13] = bad
            with pytest.raises(NumericError, match="NaN or infinite"):
                fitted(name, broken, damping)


def test_what_does_not_fit_a_preconditioner_is_said() -> None:
    wide = [(0, preconditioners.MAX_DENSE + 1)]
    with pytest.raises(ConfigError, match="Fisher block of 8193 numbers is too wide"):
        preconditioners.fit("fisher", lambda: [], wide)
    with pytest.raises(ConfigError, match="Kronecker block of 8193 numbers is too wide"):
        preconditioners.fit("ekfac", lambda: [], wide, factors=[LayoutEntry("m", "lora_A", (1, wide[0][1]), 0)])
    with pytest.raises(ConfigError, match="'ekfac' needs rows with a block for each LoRA factor"):
        preconditioners.fit("ekfac", lambda: [rows()], BLOCKS)
    moments = torch.ones(WIDTH)
    with pytest.raises(ConfigError, match="cannot be picked"):
        preconditioners.fit("adam", lambda: [], BLOCKS, moments=moments, damping="auto")
    with pytest.raises(ConfigError, match=r"\(21,\) do not fit rows of 22"):
        preconditioners.fit("adam", lambda: [], BLOCKS, moments=moments[1:])
    with pytest.raises(ConfigError, match="negative or NaN"):
        preconditioners.fit("adam", lambda: [], BLOCKS, moments=-moments)


def test_a_checkpoint_of_another_adapter_is_named(tmp_path: Path, layout: list[LayoutEntry]) -> None:
    with pytest.raises(ModelError, match="save_checkpoints"):
        adam_moments(tmp_path, layout)
    fake_checkpoint(tmp_path, layout[2:])
    with pytest.raises(ModelError, match=r"needs Adam's state of .*q_proj.lora_A \(4, 32\), holds none"):
        adam_moments(tmp_path, layout)
    other = [entry._replace(shape=(9, 9)) for entry in layout]
    fake_checkpoint(tmp_path, other)
    with pytest.raises(ModelError, match=r"\(4, 32\), holds one of shape \(9, 9\)"):
        adam_moments(tmp_path, layout)


# ---- cosines in the metric of H^-1 -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fisher", "ekfac"])
def test_whitened_cosine_is_the_cosine_under_the_dense_inverse(name: str) -> None:
    data, queries = rows(), rows(5, seed=1)
    found = fitted(f"{name}_cosine", data)
    scores = (data.double() @ found.apply(queries.double()).T) / found.row_norms(data)[:, None]
    inverse = dense(name, data, 0.1)
    g, q = data.double().numpy(), queries.double().numpy()
    lengths = [np.sqrt(np.einsum("ij,jk,ik->i", side, inverse, side)) for side in (g, q)]
    wanted = (g @ inverse @ q.T) / np.outer(*lengths)
    assert np.abs(wanted).max() <= 1 + 1e-9
    np.testing.assert_allclose(scores.numpy(), wanted, rtol=1e-6, atol=1e-9)


def test_less_is_the_cosine_of_adams_step_and_the_plain_query() -> None:
    data, queries = rows(), rows(5, seed=1)
    found = fitted("less", data)
    scores = (data.double() @ found.apply(queries.double()).T) / found.row_norms(data)[:, None]
    inverse = dense("adam", data, 0.1)
    steps, q = data.double().numpy() @ inverse, queries.double().numpy()
    wanted = (steps @ q.T) / np.outer(np.linalg.norm(steps, axis=1), np.linalg.norm(q, axis=1))
    np.testing.assert_allclose(scores.numpy(), wanted, rtol=1e-6, atol=1e-9)
