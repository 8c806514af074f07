"""Adam's state by whoever saved it: betas of its own, and other optimizers by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from influence_fast.errors import ModelError, warn_once
from influence_fast.training.optimizer_states import named_adam, read_adam

Factory = Callable[..., Any]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="influence_fast")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("influence_fast")]


def trained(optimizer: Factory, steps: int = 6, groups: int = 1) -> tuple[Any, list[torch.Tensor]]:
    """An optimizer after steps with the same gradients, and these."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 5)) for _ in range(2)]
    gradients = [torch.randn(3, 5) for _ in parameters]
    made = optimizer(parameters if groups == 1 else [{"params": [p]} for p in parameters])
    for _ in range(steps):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        made.step()
    return made, gradients


def adamw(**options: Any) -> Factory:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, **options)


@pytest.mark.parametrize("file", ["optimizer.pt", "optimizer.bin"])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("groups", [1, 2])
def test_moments_of_constant_gradients_are_their_squares(tmp_path: Path, file: str, beta2: float, groups: int) -> None:
    optimizer, gradients = trained(adamw(betas=(0.9, beta2)), groups=groups)
    torch.save(optimizer.state_dict(), tmp_path / file)
    state = read_adam(tmp_path)
    assert [len(group) for group in state.groups] == ([2] if groups == 1 else [1, 1])
    for number, gradient in enumerate(gradients):
        assert state.states[number].beta2 == beta2
        torch.testing.assert_close(state.states[number].unbiased, gradient.double().square(), rtol=1e-4, atol=1e-12)


def test_each_group_has_its_own_betas(tmp_path: Path) -> None:
    def two(groups: Any) -> Any:
        return torch.optim.AdamW([groups[0] | {"betas": (0.9, 0.9)}, groups[1] | {"betas": (0.9, 0.99)}])

    optimizer, gradients = trained(two, groups=2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    states = read_adam(tmp_path, beta2=0.5).states
    assert [states[n].beta2 for n in (0, 1)] == [0.9, 0.99]
    for number, gradient in enumerate(gradients):
        torch.testing.assert_close(states[number].unbiased, gradient.double().square(), rtol=1e-4, atol=1e-12)


def test_missing_betas_are_given_or_said(tmp_path: Path, said: Any) -> None:
    optimizer, _ = trained(adamw())
    content = optimizer.state_dict()
    for group in content["param_groups"]:
        del group["betas"]
    torch.save(content, tmp_path / "optimizer.pt")
    assert read_adam(tmp_path, beta2=0.95).states[0].beta2 == 0.95
    assert said() == []
    assert [read_adam(tmp_path).states[0].beta2 for _ in range(2)] == [0.999, 0.999]
    (line,) = said()
    assert "does not say its betas; 0.999 is taken" in line


def test_amsgrad_divides_by_the_largest_moment(tmp_path: Path) -> None:
    optimizer, _ = trained(adamw(amsgrad=True))
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    kept = optimizer.state[parameter]
    assert not torch.equal(kept["max_exp_avg_sq"], kept["exp_avg_sq"])
    torch.testing.assert_close(read_adam(tmp_path).states[0].second, kept["max_exp_avg_sq"])


def test_states_by_name_are_those_of_the_list(tmp_path: Path) -> None:
    optimizer, _ = trained(adamw(), groups=2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "names.json").write_text(json.dumps(["one", "two"]))
    found = named_adam(tmp_path, tmp_path / "names.json")
    assert set(found) == {"one", "two"}
    torch.testing.assert_close(found["two"].second, optimizer.state_dict()["state"][1]["exp_avg_sq"])
    (tmp_path / "names.json").write_text(json.dumps(["one"]))
    with pytest.raises(ModelError, match="names 1 parameters, and the optimizer beside it has 2"):
        named_adam(tmp_path, tmp_path / "names.json")


def adafactor(parameters: Any) -> Any:
    from transformers import Adafactor

    return Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (adafactor, "Adafactor"),
        (lambda ps: torch.optim.Adafactor(ps), "Adafactor"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1), "SGD without momentum"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), "SGD or Muon"),
        (lambda ps: torch.optim.Muon(ps), "SGD or Muon"),
        (lambda ps: torch.optim.RMSprop(ps), "RMSprop"),
        (lambda ps: torch.optim.Adagrad(ps), "Adagrad"),
        (lambda ps: torch.optim.Adamax(ps), "Adamax"),
    ],
)
def test_other_optimizers_are_named(tmp_path: Path, optimizer: Factory, name: str) -> None:
    torch.save(trained(optimizer)[0].state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ModelError, match=rf"optimizer\.pt is not Adam's: the optimizer is .*{name}") as error:
        read_adam(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"), "8-bit Adam of bitsandbytes"),
        (("step", "state1", "state2"), "Adam of bitsandbytes"),
        (("step", "state1", "qmap1", "absmax1"), "8-bit optimizer of bitsandbytes"),
        (("exp_avg",), "Lion"),
        (("step", "odd"), "none that is known"),
    ],
)
def test_states_of_other_packages_are_named(tmp_path: Path, keys: tuple[str, ...], name: str) -> None:
    state = {0: {key: torch.zeros(2) for key in keys}}
    torch.save({"state": state, "param_groups": [{"params": [0]}]}, tmp_path / "optimizer.bin")
    with pytest.raises(ModelError, match=name):
        read_adam(tmp_path)


class Foreign:
    """A class that only its package could load."""


@pytest.mark.parametrize(
    "content", [b"PK not a file", {"state": {0: Foreign()}, "param_groups": []}], ids=["no-archive", "a-foreign-class"]
)
def test_files_that_are_no_plain_tensors_are_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "optimizer.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ModelError, match=r"optimizer\.pt cannot be read as plain tensors"):
        read_adam(tmp_path)
    torch.save([1], path)
    with pytest.raises(ModelError, match=r"no optimizer's state"):
        read_adam(tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match=r"has no optimizer\.pt or optimizer\.bin"):
        read_adam(tmp_path)


def test_a_group_that_says_beta2_alone_is_heard(tmp_path: Path, said: Any) -> None:
    content = trained(adamw())[0].state_dict()
    for group in content["param_groups"]:
        del group["betas"]
        group["beta2"] = 0.95
    torch.save(content, tmp_path / "optimizer.pt")
    assert read_adam(tmp_path, beta2=0.5).states[0].beta2 == 0.95
    assert said() == []


def test_moments_without_their_step_are_named(tmp_path: Path) -> None:
    content = trained(adamw())[0].state_dict()
    for values in content["state"].values():
        del values["step"]
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(ModelError, match=r"moments of Adam without their step \(it keeps exp_avg, exp_avg_sq\)"):
        read_adam(tmp_path)


def test_a_step_may_be_counted_by_the_group(tmp_path: Path) -> None:
    optimizer, gradients = trained(adamw())
    content = optimizer.state_dict()
    for values in content["state"].values():
        content["param_groups"][0]["step"] = int(values.pop("step"))
    torch.save(content, tmp_path / "optimizer.pt")
    found = read_adam(tmp_path).states[0].unbiased
    torch.testing.assert_close(found, gradients[0].double().square(), rtol=1e-4, atol=1e-12)
