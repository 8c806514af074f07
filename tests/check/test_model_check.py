"""A check finds what is planted, agrees where all is right, and leaves the model as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import influence_fast as inf
from influence_fast.check import model_check
from influence_fast.check.differences import adapter_parameters, differences, plain_losses
from influence_fast.check.verdicts import AGREES, DIFFERS, REFUSED, UNJUDGED, Check, ModelCheck
from influence_fast.cli import main
from influence_fast.errors import ConfigError, DataError
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.step.reduction import FullReducer
from influence_fast.gradients.targets import gradient_layout

FAST = {"count": 2, "directions": 1}


def make_examples(*lengths: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in lengths or (24, 17, 9):
        ids = torch.randint(5, 300, (n,), generator=generator)
        labels = ids.clone()
        labels[: n // 3] = -100
        examples.append({"id": f"ex-{n}", "input_ids": ids, "labels": labels})
    return examples


def verdicts(found: ModelCheck) -> dict[str, str]:
    return {check.name: check.verdict for check in found.checks}


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is a tenth too large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * 1.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_agrees_on_a_model_that_is_right(tiny_lora: Callable[..., Any], dtype: torch.dtype) -> None:
    found = inf.check_model(tiny_lora("qwen2", dtype), make_examples(), **FAST)
    assert found.ok, found
    names = ["engine", "losses", "rows", "random", "packs"] + ["rounding"] * (dtype == torch.bfloat16)
    assert [check.name for check in found.checks] == names
    assert found["engine"].note == "several examples in a pack"
    assert found.tokens == (24, 9)
    if dtype == torch.float32:
        assert found["rows"].value is not None
        assert found["rows"].value < 5e-4


def test_an_adapter_whose_b_is_zero_is_judged_by_b(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("qwen2")
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.zero_()
    assert inf.check_model(model, make_examples(), **FAST).ok


def test_gradients_that_a_hook_scales_differ_from_the_losses(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("qwen2")
    model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda _, __, output: _Scaled.apply(output))
    found = inf.check_model(model, make_examples(), **FAST)
    assert (found["losses"].verdict, found["rows"].verdict) == (AGREES, DIFFERS)
    assert found["rows"].value is not None
    assert found["rows"].value > 1e-3
    assert not found.ok


def _rows_as(change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the engine gives rows that `change` makes of its own."""
    finish = FullReducer.finish
    monkeypatch.setattr(FullReducer, "finish", lambda self: change(finish(self)))


def test_a_part_that_rows_lack_shows_along_random_directions(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_lora("qwen2")
    lost = next(entry.columns for entry in gradient_layout(model) if entry.factor == "lora_B")
    _rows_as(lambda rows: rows.index_fill(1, torch.arange(lost.start, lost.stop), 0), monkeypatch)
    found = inf.check_model(model, make_examples(), **FAST)
    assert verdicts(found) | {"rows": ""} == {
        "engine": AGREES,
        "losses": AGREES,
        "rows": "",
        "random": DIFFERS,
        "packs": AGREES,
    }


def test_one_factor_that_is_too_large_is_found(tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lora("qwen2")
    scales = torch.ones(sum(e.shape[0] * e.shape[1] for e in gradient_layout(model)))
    scales[gradient_layout(model)[1].columns] = 1.2
    _rows_as(lambda rows: rows * scales, monkeypatch)
    found = inf.check_model(model, make_examples(), **FAST)
    assert found["rows"].verdict == DIFFERS


def test_a_pack_that_leaks_into_rows_is_found(tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _rows_as(lambda rows: rows + 0.01 * rows.sum(0) * (len(rows) > 1), monkeypatch)
    found = inf.check_model(tiny_lora("qwen2"), make_examples(), **FAST)
    assert found["packs"].verdict == DIFFERS
    assert found["losses"].verdict == AGREES


def test_a_pack_that_leaks_into_losses_is_found(tiny_lora: Callable[..., Any]) -> None:
    """Of more tokens than the texts that an engine is opened with."""
    model = tiny_lora("qwen2")
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.register_forward_hook(lambda _, __, output: output + output.mean(1) if output.shape[1] > 60 else output)
    found = inf.check_model(model, make_examples(40, 39), **FAST)
    assert (found["losses"].verdict, found["packs"].verdict) == (DIFFERS, DIFFERS)


def test_a_scaling_that_changes_on_the_way_is_found(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_lora("qwen2")
    ours = model_check.engine_numbers

    def then_scaled(*args: Any) -> Any:
        numbers = ours(*args)
        model.get_base_model().model.layers[0].mlp.down_proj.scaling["default"] *= 2
        return numbers

    monkeypatch.setattr(model_check, "engine_numbers", then_scaled)
    found = inf.check_model(model, make_examples(), **FAST)
    assert (found["losses"].verdict, found["rows"].verdict) == (DIFFERS, DIFFERS)


def test_what_the_engine_refuses_is_a_verdict(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("qwen2")
    model.merge_adapter()
    found = inf.check_model(model, make_examples(), **FAST)
    assert verdicts(found) == {"engine": REFUSED, "losses": UNJUDGED, "rows": UNJUDGED}
    assert "merged into the base weights" in found["engine"].note
    assert not found.ok


def test_a_model_that_fails_in_its_own_code_is_a_verdict(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("qwen2")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("of the model's own")

    model.get_base_model().model.layers[0].register_forward_hook(fail)
    found = inf.check_model(model, make_examples(), **FAST)
    assert found["engine"].verdict == REFUSED
    assert "of the model's own" in found["engine"].note


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before_to_the_bit(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    model = tiny_lora("qwen2", torch.bfloat16).train()
    model.get_base_model().model.layers[0].eval()
    training = [module.training for module in model.modules()]
    asking = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fails:
        calls: list[int] = []

        def stop(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:  # the adapter is moved then
                raise KeyboardInterrupt
            return plain_losses(*args)

        monkeypatch.setattr("influence_fast.check.row_judge.plain_losses", stop)
        with pytest.raises(KeyboardInterrupt):
            inf.check_model(model, make_examples(), **FAST)
    else:
        inf.check_model(model, make_examples(), **FAST)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == training
    assert [parameter.requires_grad for parameter in model.parameters()] == asking


def test_rows_that_are_all_zero_cannot_be_judged(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("qwen2")
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.zero_()
    found = inf.check_model(model, make_examples(), **FAST)
    assert found["rows"].verdict == UNJUDGED
    assert not found.ok


def test_rows_that_are_not_numbers_cannot_be_judged(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("qwen2")
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] = torch.nan
    found = inf.check_model(model, make_examples(), **FAST)
    assert {found["losses"].verdict, found["rows"].verdict} == {UNJUDGED}
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_what_no_row_has_is_named(tiny_model: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], bias="lora_only")
    found = inf.check_model(get_peft_model(tiny_model("llama"), lora), make_examples(), **FAST)
    assert found.ok
    assert "lm_head" in str(found).splitlines()[-1]
    assert any("bias" in name for name in found.not_scored)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "lora_bias"])
def test_rows_of_other_adapters_agree_with_differences(tiny_model: Callable[..., Any], config: dict[str, Any]) -> None:
    """DoRA's gradients take the norms for constants, and so do the differences; with r = 1 a bias is as long as B."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = tiny_model("llama", num_hidden_layers=1)
    model = get_peft_model(base, LoraConfig(r=1, target_modules=["q_proj", "down_proj"], **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    found = inf.check_model(model, make_examples(), **FAST)
    assert verdicts(found)["rows"] == verdicts(found)["random"] == AGREES
    assert ("DoRA's norms held" in found["rows"].note) == ("use_dora" in config)


def test_only_the_active_adapters_parameters_are_moved(tiny_lora: Callable[..., Any]) -> None:
    from peft import LoraConfig

    model = tiny_lora("qwen2")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert not any(".other." in name for name in adapter_parameters(model))
    model.set_adapter("other")
    names = list(adapter_parameters(model))
    assert len(names) == 4
    assert all(".other." in name for name in names)


def test_a_model_that_takes_no_packs_says_how_and_why(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("qwen2")
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.register_forward_hook(lambda _, __, output: output.cumsum(1))
    found = inf.check_model(model, make_examples(), **FAST)
    assert found["engine"].note == "one example at a time: in a pack they would see each other"
    assert found["packs"].value is None
    assert found.ok, found


def test_weighted_examples_are_checked_with_their_weights(tiny_lora: Callable[..., Any]) -> None:
    examples = make_examples()
    for example in examples:
        example["weights"] = torch.linspace(-1, 2, len(example["input_ids"]))
    found = inf.check_model(tiny_lora("qwen2"), examples, **FAST)
    assert found.ok, found


def test_examples_are_of_spread_lengths_and_cut(tiny_lora: Callable[..., Any]) -> None:
    examples = make_examples(30, 5, 12, 7, 20)
    examples[0]["labels"][:25] = -100  # nothing is learned of its first tokens: all of them are then
    found = inf.check_model(tiny_lora("qwen2"), examples, count=3, max_tokens=16, directions=1)
    assert found.examples == ("ex-30", "ex-12", "ex-5")
    assert found.tokens == (16, 12, 5)
    assert found.ok


@pytest.mark.parametrize(
    ("options", "message"),
    [({"count": 0}, "count is 0"), ({"max_tokens": 1}, "max_tokens is 1"), ({"step": 0.0}, "step is 0")],
)
def test_options_out_of_range_are_named(tiny_lora: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inf.check_model(tiny_lora("qwen2"), make_examples(), **options)


def test_examples_of_another_vocabulary_are_an_error(tiny_lora: Callable[..., Any]) -> None:
    ids = torch.tensor([5, 6, 999])
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        inf.check_model(tiny_lora("qwen2"), [{"input_ids": ids, "labels": ids}])
    with pytest.raises(DataError, match="no example"):
        inf.check_model(tiny_lora("qwen2"), [])


def test_differences_predict_what_the_dtype_made_of_the_step() -> None:
    """A step far below bf16's spacing moves some numbers by a whole unit, and the others not at all."""
    weight = torch.nn.Parameter(torch.linspace(0.5, 2, 64).bfloat16())
    slope = torch.linspace(-1, 1, 64, dtype=torch.float64)
    direction = torch.ones(64) / 8
    (found,) = differences(lambda: [float(weight.double() @ slope)], slope[None], direction, [weight], 0.01)
    assert found.measured == pytest.approx(found.predicted, abs=1e-12)
    assert found.distance != pytest.approx(0.02, rel=1e-3)


def test_verdicts_follow_the_bounds() -> None:
    assert Check.of("rows", 1e-5, 1e-4, "").verdict == AGREES
    assert Check.of("rows", 1e-3, 1e-4, "").verdict == DIFFERS
    assert Check.of("rows", 0.1, 0.6, "").verdict == UNJUDGED
    assert Check.of("rows", float("nan"), 0.1, "").verdict == UNJUDGED


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_lora: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("check")
    model = tiny_lora("qwen2")
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{i}+{i}?", "completion": f"It is {2 * i}. " * (1 + i)} for i in range(4)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


def test_the_verb_prints_a_table_and_exits_with_the_verdict(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    command = ["check", "--model", "model", "--adapter", "adapter", "--data", "data.jsonl"]
    fast = ["--count", "2", "--directions", "1"]
    assert main([*command, *fast]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("qwen2, float32 on cpu; 2 examples of ")
    assert [line.split()[1] for line in lines[2:]] == ["agrees"] * 5
    _rows_as(lambda rows: rows * 1.1, monkeypatch)
    assert main([*command, *fast, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert {check["name"]: check["verdict"] for check in found["checks"]}["rows"] == DIFFERS
    assert main([*command, "--count", "0"]) == 2
    assert capsys.readouterr().err == "error: --count is 0; it must be at least 1\n"
    assert main([*command[:-1], "absent.jsonl"]) == 2


def test_the_engine_is_opened_once_in_wide_dtypes(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    enter = GradientEngine.__enter__
    monkeypatch.setattr(GradientEngine, "__enter__", lambda self: (opened.append(1), enter(self))[1])
    inf.check_model(tiny_lora("qwen2"), make_examples(), **FAST)
    assert opened == [1]


def test_the_padding_of_an_adapted_embedding_is_not_moved(tiny_model: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = tiny_model("llama", torch.float64, pad_token_id=7)
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"]), autocast_adapter_dtype=False
    )
    for name, parameter in model.double().named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    examples = make_examples()
    for example in examples:
        example["input_ids"][2:4] = 7
    found = inf.check_model(model, examples, **FAST)
    assert found["random"].verdict == AGREES, found


def test_an_example_of_no_gradient_has_no_relative_error() -> None:
    from influence_fast.check.engine_numbers import relative

    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert relative(rows + 1e-18, rows) < 1e-11
    assert relative(rows + 1e-3, rows) > 1e-4
