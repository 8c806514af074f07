"""The choice of a backend, and the whole gradient path on the Triton kernels (in the interpreter)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from influence_fast import doctor
from influence_fast.errors import ConfigError
from influence_fast.gradients.model import backends

CPU = torch.device("cpu")


def test_torch_is_chosen_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backend, why = backends.choose(None, CPU, torch.float32)
    assert backend is backends.TORCH
    assert "CUDA" in why or "triton" in why.lower()


def test_the_call_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.VARIABLE, "nonsense")
    with pytest.raises(ConfigError, match="INFLUENCE_FAST_BACKEND: unknown value 'nonsense'"):
        backends.choose(None, CPU, torch.float32)
    assert backends.choose("torch", CPU, torch.float32)[0] is backends.TORCH
    with pytest.raises(ConfigError, match="did you mean 'triton'"):
        backends.choose("trition", CPU, torch.float32)


def test_native_is_no_backend_of_the_gradients_and_doctor_says_so() -> None:
    with pytest.raises(ConfigError, match=r"backend: native computes no gradients: .*; choose auto, triton, torch"):
        backends.choose("native", CPU, torch.float32)
    lines = {name: (active, note) for name, active, note in doctor.paths()}
    assert lines["gradients: native"] == (False, backends.NOT_NATIVE)
    assert any(active for name, (active, _) in lines.items() if name.startswith("gradients: "))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels can run")
def test_triton_is_refused_with_its_reason_where_it_cannot_run() -> None:
    with pytest.raises(ConfigError, match=r"triton cannot be used: .+; choose 'auto' or 'torch'"):
        backends.choose("triton", CPU, torch.float32)


def test_the_gradient_path_on_the_kernels_agrees_with_float64(interpreted: Callable[[str], Any]) -> None:
    errors = interpreted("interpreted_backend.py")
    assert len(errors) == 10
    for case, found in errors.items():
        if case.endswith("float32"):
            assert found["triton"] < 1e-5, case
        else:
            # A tiny model's bf16 noise is several per cent whatever computes it: no worse than PyTorch's.
            assert found["triton"] < 1.1 * found["torch"] < 0.2, (case, found)


def test_doctor_says_whether_products_go_through_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    lines = {name: (active, note) for name, active, note in doctor.paths()}
    active, note = lines["inner products: cuBLAS"]
    assert not active
    assert "there is no CUDA device here" in note
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("influence_fast.products.gpu.why_not", lambda device: "")
    monkeypatch.delenv("INFLUENCE_FAST_ISA", raising=False)
    assert doctor._cublas()[1] is True
    monkeypatch.setenv("INFLUENCE_FAST_ISA", "mma")
    assert "INFLUENCE_FAST_ISA=mma asks for another" in doctor._cublas()[2]
