"""The CUDA part as it is compiled, and what the host plans for it. No device is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from influence_fast.errors import ConfigError, DataError
from influence_fast.products import native
from influence_fast.products.inner_products import ProductOptions, inner_products

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
GRANULE, TILE_ROWS = 16, 128  # bytes, rows: csrc/cuda/plan.h


def nvcc() -> str | None:
    places = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"), os.environ.get("PATH", "")]
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(reversed(places)))


@pytest.fixture(scope="module")
def module() -> Any:
    loaded, why = native.load()
    if loaded is None:
        pytest.skip(f"no native module: {why}")
    return loaded


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc(), "-std=c++17", "-O3", code, "-Xptxas", "-v", "-cubin", SOURCES / "score.cu"]
    built = subprocess.run([*map(str, command), "-o", tmp_path / "score.cubin"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    names = re.findall(r"Compiling entry function '(\S+)'", built.stderr)
    assert sum("score_kernel" in name for name in names) == 4  # int8 and bf16, few and many queries
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", built.stderr)]
    assert len(spills) == 2 * len(names)
    assert not any(spills)
    stacks = [int(n) for n in re.findall(r"(\d+) bytes stack frame", built.stderr)]
    assert not any(stacks)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", built.stderr)]
    assert max(registers) <= 128  # two blocks of 256 threads on a multiprocessor


def test_module_says_what_was_built(module: Any) -> None:
    config = native.build_config()["cuda"]
    if not config["compiled"]:
        assert native.cuda_why().startswith("not compiled: ")
        assert not module.cuda_available()
        pytest.skip(native.cuda_why())
    assert config["architectures"][0] == "80"
    assert config["compiler"].startswith("nvcc ")


def test_available_only_with_a_device(module: Any) -> None:
    available = module.cuda_available()
    assert available == (module.cuda_why() == "")
    if not torch.cuda.is_available():
        assert native.cuda_why()
    if available:
        assert native.build_config()["cuda"]["compiled"]
    (line,) = [line for line in native.status() if line[0] == "inner products: cuda"]
    assert line[2]
    assert line[1] == (not native.cuda_why() and os.environ.get(native.ISA_VARIABLE) != native.TORCH)


def test_a_stream_without_a_device_is_an_error(module: Any) -> None:
    if not native.build_config()["cuda"]["compiled"] or module.cuda_available():
        pytest.skip("needs the CUDA part and no device")
    with pytest.raises(RuntimeError, match="CUDA: "):
        module.CudaStream(0, 128, 64)


def test_device_that_is_not_there() -> None:
    rows, queries = torch.zeros(3, 4), torch.zeros(2, 4)
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        inner_products(rows, queries, options=ProductOptions(device="gpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device 'cuda' is not available"):
            inner_products(rows, queries, options=ProductOptions(device="cuda"))
    with pytest.raises(DataError, match="rows are a meta tensor"):
        inner_products(rows.to("meta"), queries, options=ProductOptions(device="cpu"))
    assert torch.equal(inner_products(rows, queries, options=ProductOptions(device="cpu")), torch.zeros(3, 2))


def test_rows_are_padded_to_granules(module: Any) -> None:
    for size in [*range(0, 70), 8191, 8192, 8193]:
        padded = module.cuda_padded_row(size)
        assert padded % GRANULE == 0
        assert max(size, 1) <= padded < max(size, 1) + GRANULE


def test_chunks_are_whole_tiles_within_the_budget(module: Any) -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        rows, row_bytes = int(generator.integers(1, 1 << 20)), int(generator.integers(1, 1 << 15))
        budget = int(generator.integers(1, 1 << 26))
        chunk = module.cuda_chunk_rows(rows, row_bytes, budget)
        padded = module.cuda_padded_row(row_bytes)
        assert chunk % TILE_ROWS == 0
        assert chunk == TILE_ROWS or chunk * padded <= budget
        assert chunk < rows + TILE_ROWS
        more = chunk + TILE_ROWS
        assert chunk >= rows or more * padded > budget  # no smaller than it need be


@pytest.mark.parametrize("queries", [1, 16, 17, 128, 129, 300])
def test_group_lists_cut_at_tiles(module: Any, queries: int) -> None:
    generator = np.random.default_rng(queries)
    groups = [generator.permutation(queries)[: generator.integers(0, queries + 1)] for _ in range(7)]
    begin = np.cumsum([0, *map(len, groups)], dtype=np.int64)
    flat = np.concatenate(groups).astype(np.int64)
    first, column = module.cuda_tile_groups(begin, flat, queries)
    width = module.cuda_tile_columns(queries)
    assert first.shape == (-(-queries // width), len(groups) + 1)
    assert column.size == flat.size
    for g, group in enumerate(groups):
        for t in range(len(first)):
            inside = [q for q in group if q // width == t]  # in the order of the group
            assert (column[first[t, g] : first[t, g + 1]] + t * width).tolist() == inside


def test_group_lists_refuse_wrong_queries(module: Any) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        module.cuda_tile_groups(np.array([0, 1]), np.array([3]), 3)
    with pytest.raises(ValueError, match="do not span"):
        module.cuda_tile_groups(np.array([0, 2]), np.array([0]), 3)
