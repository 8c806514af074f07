"""Hostile gradients of other tools: tensors of every odd kind, headers that lie, folders that lack pieces."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benches.hostile.case import Case
from benches.hostile.values import DEEP, DIGITS, ODD, Raw, damaged, dumped, noise
from influence_fast.store.importers import import_gradients


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("exit 3",)


def tensors() -> dict[str, Any]:
    """Values that `torch.save` writes in the place of a matrix."""
    dense = torch.arange(12.0).reshape(3, 4)
    return {
        "plain": dense,
        "half": dense.half(),
        "bf16": dense.bfloat16(),
        "double": dense.double(),
        "int": dense.int(),
        "bool": dense.bool(),
        "complex": dense.cfloat(),
        "fp8": dense.to(torch.float8_e4m3fn),
        "gradient": dense.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(dense),
        "sparse": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "meta": torch.empty(3, 4, device="meta"),
        "nested": torch.nested.nested_tensor([dense[0], dense[1, :2]]),
        "jagged": torch.nested.nested_tensor([dense[0], dense[1, :2]], layout=torch.jagged),
        "quantized": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        "scalar": torch.tensor(1.0),
        "vector": dense[0],
        "cube": dense[None],
        "no rows": dense[:0],
        "no columns": dense[:, :0],
        "expanded": torch.zeros(1, 1).expand(3_000_000, 3_000_000),
        "strided": dense.t(),
        "nan": dense * float("nan"),
        "inf": dense + float("inf"),
        "huge meta": torch.empty(10**9, 10**9, device="meta"),
        "conjugate": dense.cfloat().conj(),
        "list": [dense],
        "dict": {"a": dense},
        "none": None,
        "text": "x",
        "number": 5,
        "set": {1},
        "numpy": np.ones(3),
        "runs": _Runs(),
        "module": torch.nn.Linear(2, 2),
        "size": torch.Size([1]),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "views": dense[1:, 1:],
        "uint8": dense.to(torch.uint8),
        "zero stride": torch.zeros(3, 1).expand(3, 4),
    }


def _read(path: Path, **how: Any) -> Callable[[], Any]:
    return lambda: import_gradients(path, path.parent / "store", **how)


def _saved(value: Any, name: str, **how: Any) -> Callable[[Path], Callable[[], Any]]:
    def make(folder: Path) -> Callable[[], Any]:
        torch.save(value, folder / name, **how)
        return _read(folder / name)

    return make


def _bytes(name: str, body: bytes, **how: Any) -> Case:
    def make(folder: Path) -> Callable[[], Any]:
        path = folder / name.split("/")[-1]
        path.write_bytes(body)
        return _read(path, **how)

    return Case(f"{name} {how}" if how else name, make)


def cases(rng: random.Random, shared: Path) -> Iterator[Case]:
    """Yield every case of the room."""
    for name, value in tensors().items():
        for file in ("all_orig.pt", "grads-3.pt", "x.pt"):
            yield Case(f"pt/{name}/{file}", _saved(value, file))
        if name not in ("jagged", "nested", "meta", "huge meta"):
            yield Case(f"pt/{name}/old", _saved(value, "all_orig.pt", _use_new_zipfile_serialization=False))
    torch.save(torch.ones(3, 4), shared / "a.pt")
    np.save(shared / "a.npy", np.ones((3, 4), np.float32))
    from safetensors.torch import save

    bodies = {
        "a.pt": (shared / "a.pt").read_bytes(),
        "a.npy": (shared / "a.npy").read_bytes(),
        "a.safetensors": save({"a": torch.ones(3, 4)}),
    }
    for name, body in bodies.items():
        for number in range(25):
            yield _bytes(f"damaged/{number}/{name}", damaged(rng, body))
        for kind, text in {
            "empty": b"",
            "noise": noise(rng, 999),
            "nul": bytes(999),
            "deep": b"[" * DEEP,
            "pickle": pickle.dumps(_Runs()),
            "npz": b"PK\3\4" + bytes(60),
        }.items():
            yield _bytes(f"other/{kind}/{name}", text)
    yield from _headers()
    yield from _folders(rng)
    yield from _options(bodies)


def _headers() -> Iterator[Case]:
    for descr in (
        "<f4",
        "|O",
        "<U9",
        "<c8",
        "<M8[s]",
        "<f2",
        "<f8",
        "<f16",
        "V4",
        "x",
        [("a", "<f4")],
        5,
        None,
        "(9999999999,)<f4",
    ):
        for shape in ((3, 4), (10**9, 10**9), (-1, 4), (3,), (), (0, 0), (3.5, 4), "x", (2**70, 1)):
            header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
            yield _bytes(
                f"npy/{descr}/{shape}/a.npy".replace("/(", "-("),
                b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(48),
            )
    for text in (b"(" * 5000, b"{'descr': " + b"9" * 5000 + b"}", b"{", b"__import__('os')", b"{'a': 1}", b"\xff" * 99):
        yield _bytes(
            f"npy/{text[:9]!r}/a.npy".replace("\\", ""), b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
        )
    entries: dict[str, Any] = {
        "fp8": {"dtype": "F8_E4M3", "shape": [3, 4], "data_offsets": [0, 12]},
        "far": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 10**12]},
        "huge": {"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 48]},
        "negative": {"dtype": "F32", "shape": [-3, 4], "data_offsets": [0, 48]},
        "text": "x",
        "kind": {"dtype": "X", "shape": [1], "data_offsets": [0, 48]},
        "int": {"dtype": "I64", "shape": [3, 2], "data_offsets": [0, 48]},
        "digits": Raw(DIGITS),
        "deep": Raw("[" * DEEP),
        "vector": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]},
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]},
    }
    for name, entry in entries.items():
        text = dumped({"a": entry}).encode()
        for size in (len(text), 2**60, 0, len(text) - 1):
            yield _bytes(f"header/{name}/{size}/a.safetensors", struct.pack("<Q", size) + text + bytes(48))


def _folders(rng: random.Random) -> Iterator[Case]:
    bergson = {"num_grads": 3, "grad_sizes": {"a": 4}, "base_dtype": "float32"}
    trak = {"JL dimension": 4, "train set size": 3}

    def folder_of(name: str, body: str, further: dict[str, bytes]) -> Callable[[Path], Callable[[], Any]]:
        def make(folder: Path) -> Callable[[], Any]:
            inside = folder / "in"
            inside.mkdir()
            (inside / name).write_bytes(body.encode("utf-8", "surrogatepass"))
            for file, content in further.items():
                (inside / file).parent.mkdir(exist_ok=True)
                (inside / file).write_bytes(content)
            return _read(inside)

        return make

    array = (
        b"\x93NUMPY\1\0"
        + struct.pack("<H", 64)
        + (repr({"descr": "<f4", "fortran_order": False, "shape": (3, 4)}).ljust(63) + "\n").encode()
        + bytes(48)
    )
    for key in ("num_grads", "grad_sizes", "base_dtype", "dtype", "attribute_tokens"):
        for number, value in enumerate(ODD):
            if rng.random() < 0.5:
                yield Case(
                    f"bergson/{key}/{number}",
                    folder_of("info.json", dumped(bergson | {key: value}), {"gradients.bin": bytes(48)}),
                )
    for number, value in enumerate(
        (
            "object",
            "O",
            "<V4",
            "U",
            "datetime64",
            "complex64",
            "int32",
            "float16",
            "(2,)f4",
            "f4,f4",
            "bfloat16",
            "",
            "x" * 9999,
            "f4)" * 99,
        )
    ):
        yield Case(
            f"bergson/kind/{number}",
            folder_of("info.json", dumped(bergson | {"base_dtype": value}), {"gradients.bin": bytes(48)}),
        )
        yield Case(
            f"bergson/sizes/{number}",
            folder_of(
                "info.json",
                dumped(bergson | {"grad_sizes": {"a": [-4, 2**62, 0, 1.5][number % 4]}}),
                {"gradients.bin": bytes(48)},
            ),
        )
    for key in trak:
        for number, value in enumerate(ODD):
            if rng.random() < 0.5:
                yield Case(
                    f"trak/{key}/{number}",
                    folder_of("metadata.json", dumped(trak | {key: value}), {"0/grads.mmap": array}),
                )
    for number, value in enumerate(ODD):
        yield Case(f"info/{number}", folder_of("info.json", dumped(value), {}))
        yield Case(f"metadata/{number}", folder_of("metadata.json", dumped(value), {"0/grads.mmap": b"x"}))
    for names in (
        ("grads-x.pt",),
        ("grads-3.pt", "grads-9.pt"),
        (f"grads-{DIGITS[:200]}.pt",),
        ("dim4/grads-3.pt",),
        ("all_unormalized.pt",),
        ("grads-.pt",),
    ):
        yield Case(f"less/{names}", folder_of("x", "", dict.fromkeys(names, b"x")))
    yield Case("folder/empty", folder_of("x", "", {}))
    yield Case("folder/root", lambda folder: lambda: import_gradients("/", folder / "store"))
    for name in ("a.pt", "a.npy", "a.safetensors"):
        yield Case(f"pipe/{name}", lambda folder, name=name: (os.mkfifo(folder / name), _read(folder / name))[1])
        yield Case(
            f"device/{name}",
            lambda folder, name=name: ((folder / name).symlink_to("/dev/zero"), _read(folder / name))[1],
        )


def _options(bodies: dict[str, bytes]) -> Iterator[Case]:
    npy = bodies["a.npy"]
    for how in (
        {"format": 5},
        {"format": "x"},
        {"ids": 5},
        {"ids": ["a"]},
        {"ids": [1, 2, 3]},
        {"ids": ["a", "a", "b"]},
        {"ids": ["a", None, "b"]},
        {"dtype": 5},
        {"dtype": "x"},
        {"key": 5},
        {"x": 1},
        {"ids": "abc"},
        {"identity": 5},
    ):
        yield _bytes("options/a.npy", npy, **how)
    for how in ({"format": "less"}, {"format": "trak"}, {"format": "bergson"}, {"format": "safetensors"}):
        yield _bytes("options/a.npy", npy, **how)
        yield _bytes("options/a.safetensors", bodies["a.safetensors"], **how)
    yield _bytes("options/a.safetensors", bodies["a.safetensors"], key="b")
    yield _bytes("options/a.safetensors", bodies["a.safetensors"], key=5)
    yield _bytes("options/a.pt", bodies["a.pt"], file=5)
    _ = json
