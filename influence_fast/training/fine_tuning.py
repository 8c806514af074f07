"""Fine-tuning through trl (see sft.py for the steps): a peft LoRA adapter, or every weight.

A finished result is renamed into place as a whole, with a record of what made it (`training.json`): asking again
for the same thing returns it at once, and an interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from safetensors import SafetensorError

from influence_fast.data.fingerprints import dataset_fingerprint, weight_hashes
from influence_fast.data.packing import context_of, example_name, say_if_beyond, teaches
from influence_fast.errors import ConfigError, DataError, ModelError, NumericError, one_line, truncated_list
from influence_fast.guards import reading
from influence_fast.training import sft
from influence_fast.training.files import list_checkpoints
from influence_fast.training.fresh_adapter import attach_lora
from influence_fast.training.memory import TrainingMemory, check_memory, training_memory
from influence_fast.training.model_sizes import check_model_sizes
from influence_fast.training.optimizer_states import AdamState, named_adam
from influence_fast.training.settings import LoraSettings, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

RECORD = "training.json"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a fine-tuning.

    `path` holds the adapter in peft's format, or the whole model after full fine-tuning. `loss_history` is
    [(optimizer step, mean training loss since the last entry)]. `checkpoints` are in the order of training.
    `reused` says that a finished result was found; its `seconds` are those of the run that made it.
    """

    path: Path
    loss_history: list[tuple[int, float]]
    seconds: float
    tokens_seen: int
    is_adapter: bool = True
    checkpoints: list[Path] = field(default_factory=list)
    reused: bool = False


class FinetuneOptions(TypedDict, total=False):
    """Options of `finetune` that do not decide its result.

    progress: a progress bar on stderr (default True).
    overwrite: replace another result in `output_dir` (default False).
    callbacks: of transformers' `TrainerCallback`, such as an `InfluenceCallback`, whose scores are then kept in the
        folder `influence` of the result. They are not called where a finished result is returned at once.
    on_memory: called with the `TrainingMemory` that is expected, before the training; by default `check_memory`, which
        refuses what clearly does not fit. None estimates nothing.
    """

    progress: bool
    overwrite: bool
    callbacks: Sequence[TrainerCallback]
    on_memory: Callable[[TrainingMemory], None] | None


def finetune(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    *,
    config: TrainConfig,
    lora: LoraSettings | None,
    **options: Unpack[FinetuneOptions],
) -> TrainResult:
    """Fine-tune `model` on tokenized examples.

    Args:
        model: a causal LM, or a PeftModel whose adapter is trained further.
        tokenizer: its tokenizer, which is saved with the result.
        examples: {"id", "input_ids" [n], "labels" [n]}; labels of -100 are ignored.
        output_dir: written under a temporary name and renamed when it is whole.
        config: how to train.
        lora: a fresh adapter is trained and saved, and `model` comes back as it was given: attach the adapter by
            `load_finetuned`. None trains every weight of `model` in place, or the adapter that it carries.
        options: `progress`, `overwrite`, `callbacks` and `on_memory`: see `FinetuneOptions`.

    Returns:
        A `TrainResult`; a finished one of the same configuration and data is read instead of trained again.

    Raises:
        DataError: no examples, malformed or fully masked ones.
        ConfigError: `output_dir` holds something else and `overwrite` is False, the arguments come in another order, or
            the training clearly does not fit in memory.
        ModelError: unknown target modules.
        NumericError: the loss became NaN.

    Example:
        >>> lora = inf.LoraSettings(r=16)  # doctest: +SKIP
        >>> inf.finetune(model, tok, tokens, "adapter", config=inf.TrainConfig(), lora=lora).path  # doctest: +SKIP
        PosixPath('adapter')
    """
    from peft import PeftModel

    chosen = _with_defaults(options)
    _check_order(model, tokenizer, examples)
    final = Path(output_dir)
    _check(examples)
    say_if_beyond(context_of(getattr(model, "config", None)), examples)
    if lora is not None and isinstance(model, PeftModel):
        raise ModelError("the model already carries a LoRA adapter: pass lora=None to train that one further")
    record = {
        "train": asdict(config),
        "lora": None if lora is None else lora.record(),
        "examples": dataset_fingerprint(examples),
        "model": weight_hashes(model),
    }
    record = json.loads(json.dumps(record))  # tuples as lists, as it will be read back
    found = _finished(final, record)
    if found is not None:
        return found
    if final.exists() and any(final.iterdir()) and not chosen["overwrite"]:
        if not (final / RECORD).exists():  # not ours, so nothing that we tell anybody to delete
            raise ConfigError(
                f"{final} is not empty and holds no fine-tuning of this tool: choose another output folder"
            )
        raise ConfigError(
            f"{final} holds a result of other data or settings: choose another output folder, or delete it"
        )
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
    partial = final.parent / f".{final.name}.partial-{digest}"
    partial.mkdir(parents=True, exist_ok=True)

    is_adapter = lora is not None or isinstance(model, PeftModel)
    was_training = model.training
    was_trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with quiet_libraries():
        trained = model if lora is None else attach_lora(model, lora, config.seed)
        try:
            if chosen["on_memory"] is not None and (memory := training_memory(trained, examples, config)):
                chosen["on_memory"](memory)
            callbacks = [*chosen["callbacks"], *([sft.progress_bar()] if chosen["progress"] else [])]
            with _writing(partial, "a checkpoint"):
                history, seconds, tokens = sft.train(trained, tokenizer, examples, partial, config, callbacks)
            with _writing(partial, "the result"):
                trained.save_pretrained(partial)  # type: ignore[operator]
            tokenizer.save_pretrained(partial)  # beside an adapter too: it goes with these tokens alone
        except NumericError:
            shutil.rmtree(partial)  # going on from its checkpoints would end the same way
            raise
        except ConfigError:  # before the first step
            with suppress(OSError):  # not empty: an earlier run's checkpoints
                partial.rmdir()
            raise
        finally:
            if lora is not None:
                trained.unload()  # type: ignore[operator]
                for parameter, flag in was_trainable:
                    parameter.requires_grad_(flag)
            model.train(was_training)
    record["result"] = {
        "loss_history": history,
        "seconds": seconds,
        "tokens_seen": tokens,
        "is_adapter": is_adapter,
        "versions": _versions(),
    }
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    return TrainResult(final, history, seconds, tokens, is_adapter, list_checkpoints(final))


@contextmanager
def _writing(folder: Path, what: str) -> Iterator[None]:
    """Raise what the libraries raise on a full disk as an OSError that names `folder`."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(0, f"{what} cannot be written ({one_line(error)})", str(folder)) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(0, f"{what} cannot be written ({one_line(error, 160)})", str(folder)) from error


def load_finetuned(model: torch.nn.Module, path: str | Path, *, trainable: bool = False) -> torch.nn.Module:
    """Load the adapter, or the fully fine-tuned model, that `path` holds.

    Args:
        model: the base. An adapter is attached to it in place; `.unload()` takes it off again.
        path: a folder, or the hub id of an adapter.
        trainable: leave the adapter's factors asking for gradients.

    Returns:
        The `PeftModel` around `model`, or a whole model in the dtype and on the device of `model`.

    Raises:
        ModelError: `path` holds neither, or the adapter does not fit the model.

    Example:
        >>> model = inf.load_finetuned(base, "adapter")  # doctest: +SKIP
    """
    from transformers import AutoModelForCausalLM

    from influence_fast.training.adapter_bases import name_of
    from influence_fast.training.adapters import attach_adapter

    folder = Path(path)
    with quiet_libraries():
        if (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
            like = next(model.parameters())
            with reading(f"the model {folder}", ModelError):
                check_model_sizes(str(folder))
                whole: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=like.dtype)
                return whole.to(like.device)
        return attach_adapter(model, str(path), name_of(model), trainable=trainable)


@contextmanager
def finetuned(base: torch.nn.Module, path: str | Path) -> Iterator[Any]:
    """Attach the adapter of `path` as `load_finetuned` does, and take it off `base` again at the end.

    Embeddings that came with it are put back too; a vocabulary that it resized stays resized.
    """
    from influence_fast.training.vocabulary import kept_embeddings

    with kept_embeddings(base, str(path)):
        model: Any = load_finetuned(base, path)
        try:
            yield model
        finally:
            if hasattr(model, "unload"):
                model.unload()


def load_adam_moments(checkpoint: str | Path) -> dict[str, dict[str, torch.Tensor]]:
    """Load Adam's state of a checkpoint by parameter name: {name: {"exp_avg", "exp_avg_sq", "step"}}.

    `exp_avg` and `exp_avg_sq` have their parameter's shape. Raises ModelError when the folder has no such state, or
    another optimizer's.
    """
    return {name: dict(state.values) for name, state in load_adam_states(checkpoint).items()}


def load_adam_states(checkpoint: str | Path, beta2: float | None = None) -> dict[str, AdamState]:
    """Load Adam's state of a checkpoint by parameter name, each with the beta2 of its group.

    beta2: decides where the state does not say. Raises ModelError as `load_adam_moments`.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; name a checkpoint-* folder that a fine-tuning has saved")
    return named_adam(folder, folder / sft.NAMES, beta2)


def _with_defaults(options: FinetuneOptions) -> FinetuneOptions:
    """Return all options. Raises TypeError for one that there is not."""
    known: FinetuneOptions = {"progress": True, "overwrite": False, "callbacks": (), "on_memory": check_memory}
    strange = sorted(options.keys() - known.keys())
    if strange:
        raise TypeError(f"finetune() got an unexpected keyword argument {strange[0]!r}")
    return {**known, **options}


def _check_order(model: Any, tokenizer: Any, examples: Any) -> None:
    """Raise ConfigError for arguments that stand in each other's places."""
    order = "finetune takes (model, tokenizer, examples, output_dir)"
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"{order}, and the first is a {type(model).__name__}, which is no model")
    if isinstance(tokenizer, torch.nn.Module) or not callable(tokenizer) or not hasattr(tokenizer, "save_pretrained"):
        raise ConfigError(f"{order}, and the second is a {type(tokenizer).__name__}, which is no tokenizer")
    if callable(examples) or not (hasattr(examples, "__len__") and hasattr(examples, "__getitem__")):
        raise ConfigError(
            f"{order}, and the third is a {type(examples).__name__}, which is no list of examples: give that of "
            "tokenize(...).examples"
        )


def _check(examples: Sequence[Mapping[str, Any]]) -> None:
    if len(examples) == 0:
        raise DataError("no training examples: check the data source, its limit, and what pruning kept")
    masked = []
    for i, example in enumerate(examples):
        name = example_name(example, i)
        for key in sft.FIELDS:
            if key not in example:
                raise DataError(f"{name}: no {key!r}; an example is {{'id', 'input_ids', 'labels'}}")
        labels = torch.as_tensor(example["labels"])
        if len(labels) != len(example["input_ids"]):
            raise DataError(f"{name}: {len(example['input_ids'])} input_ids but {len(labels)} labels")
        if not teaches(labels):
            masked.append(name)
    if masked:
        raise DataError(
            f"no completion token to learn from (every label is -100) in {truncated_list(masked)}: drop these examples"
        )


def _finished(path: Path, record: Mapping[str, Any]) -> TrainResult | None:
    """Return the finished result in `path` if exactly this configuration made it."""
    try:
        old = json.loads((path / RECORD).read_text(encoding="utf-8"))
        result = old.pop("result")
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return None  # damaged: the folder is then one of something else
    if old != record:
        return None
    history = [(int(step), float(loss)) for step, loss in result["loss_history"]]
    return TrainResult(
        path,
        history,
        result["seconds"],
        result["tokens_seen"],
        result["is_adapter"],
        list_checkpoints(path),
        reused=True,
    )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' notes and bars off the screen; errors still raise."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate", "peft", "trl", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _versions() -> dict[str, str]:
    import peft
    import transformers
    import trl

    modules = (torch, transformers, peft, trl)
    return {module.__name__: str(module.__version__) for module in modules}
