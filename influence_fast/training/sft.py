"""The training steps of a fine-tuning: trl's `SFTTrainer` over rows that are tokenized and masked already.

trl gets `input_ids` and `labels` and no text, so it neither tokenizes again nor makes labels of its own: the loss is
the mean over the completion tokens of the batch. It patches the model that it trains (a fused LM head in the place of
`forward`, the tokenizer's special tokens in the configuration); `train` takes that back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from influence_fast.atomic import replacing
from influence_fast.data.packing import IGNORED, example_name
from influence_fast.errors import ConfigError, NumericError, one_line, setting, truncated_list
from influence_fast.gradients.model.referee import Referee, decoder_of
from influence_fast.training.files import list_checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from influence_fast.training.settings import TrainConfig

NAMES = "optimizer_names.json"  # the last file of a checkpoint
_SECONDS = "seconds.json"
FIELDS = ("input_ids", "labels")
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    folder: Path,
    config: TrainConfig,
    callbacks: Sequence[TrainerCallback],
) -> tuple[list[tuple[int, float]], float, int]:
    """Train the parameters of `model` that ask for gradients, from the last checkpoint in `folder` if there is one.

    Returns [(optimizer step, mean loss since the last entry)], seconds (those before that checkpoint included), and
    tokens seen (padding not counted).
    Raises ConfigError (packs that cannot be kept apart, or settings that trl refuses) and NumericError (NaN loss).
    """
    with _no_data_bars(), _left_as_it_was(model), _packs_apart(model, config):
        trainer = make_trainer(model, tokenizer, examples, folder, config)
        for callback in callbacks:
            trainer.add_callback(callback)
        # a checkpoint that a killed run was still writing has no names yet
        kept = [checkpoint for checkpoint in list_checkpoints(folder) if (checkpoint / NAMES).exists()]
        spent = _read_seconds(kept[-1]) if kept else 0.0
        trainer.add_callback(_end_checkpoints(spent))
        trainer.add_callback(_count_on(trainer))
        trainer.add_callback(_stop_at_nan())
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(kept[-1]) if kept else None)
        seconds = spent + time.perf_counter() - start
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):  # by the last step, after its loss
        raise NumericError(
            f"the last training step left weights that are not finite: lower {setting('training.learning_rate')}"
        )
    history = [(int(log["step"]), float(log["loss"])) for log in trainer.state.log_history if "loss" in log]
    return history, seconds, int(trainer.state.num_input_tokens_seen)


def make_trainer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    folder: Path,
    config: TrainConfig,
) -> Any:
    """Make a `trl.SFTTrainer` for tokenized `examples`, ready to train; `model` keeps trl's patches (see `train`)."""
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer

    class Trainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
            """Return an order that a run which goes on in the middle of an epoch finds again."""
            args: Any = self.args
            rows: Any = self.train_dataset if train_dataset is None else train_dataset
            lengths = None if packing else [len(row["input_ids"]) for row in rows]
            group = args.train_batch_size * args.gradient_accumulation_steps
            return EpochOrder(len(rows), lambda: int(self.state.epoch or 0), args.seed, lengths, group)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Write no model card: the result's record (training.json) says what made it."""

    packing = config.packing is not None
    if config.packing is not None:
        long = [example_name(e, i) for i, e in enumerate(examples) if len(e["input_ids"]) > config.packing]
        if long:
            raise ConfigError(
                f"{setting('training.packing')} is {config.packing} tokens, and longer are {truncated_list(long)}: "
                "raise it"
            )
    save_steps = 0 if isinstance(config.save_checkpoints, bool) else config.save_checkpoints
    saving = "no" if not config.save_checkpoints else ("steps" if save_steps else "epoch")
    cuda = torch.cuda.is_available() and next(model.parameters()).is_cuda
    bf16 = config.precision == "bf16" or (config.precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        lr_scheduler_type=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=not cuda,
        save_strategy=saving,
        save_steps=save_steps or 500,
        logging_strategy="steps",
        logging_first_step=True,
        logging_nan_inf_filter=False,  # which would show a NaN as 0
        train_sampling_strategy="random" if packing else "group_by_length",
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        # a pack has no padding, and no attention mask to count by
        include_num_input_tokens_seen="all" if packing else "non_padding",
        max_length=config.packing,  # None: nothing is cut
        packing=packing,
        packing_strategy="bfd",
        pad_to_multiple_of=None,
        disable_tqdm=True,
        report_to=[],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # a process trains on the card that its model is on; torchrun gives each its own
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    try:
        trainer = Trainer(
            model=model,  # type: ignore[arg-type]
            args=arguments,
            train_dataset=_dataset(examples if packing else examples[:1]),
            data_collator=None if packing else Collator(int(pad or 0)),
            processing_class=tokenizer,
        )
    except ValueError as error:
        raise ConfigError(f"trl does not train this: {one_line(error)}") from error
    if not packing:
        # trl wants a Dataset, and then does nothing to rows that are tokenized; plain rows are not copied into Arrow
        # and read 0.2 ms each faster, at every step and for every length that batches are grouped by
        # (ids are for callbacks that name examples)
        trainer.train_dataset = [
            {key: torch.as_tensor(e[key]) for key in FIELDS} | {key: e[key] for key in ("id",) if key in e}
            for e in examples
        ]
    steps = config.max_steps
    if steps <= 0:  # known only now: packing makes fewer rows
        rows = len(trainer.train_dataset)  # type: ignore[arg-type]
        steps = max(1, round(config.epochs * -(-rows // (config.batch_size * config.gradient_accumulation_steps))))
    trainer.args.warmup_steps = round(config.warmup_ratio * steps)
    trainer.args.logging_steps = max(1, steps // 50)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


def _dataset(examples: Sequence[Mapping[str, Any]]) -> Any:
    """Make a `datasets.Dataset` of int32 `input_ids` and `labels`."""
    from datasets import Dataset

    columns = {key: [torch.as_tensor(e[key]).to(torch.int32).numpy() for e in examples] for key in FIELDS}
    return Dataset.from_dict(columns).with_format("numpy")


class EpochOrder(torch.utils.data.Sampler[int]):
    """Rows in an order that follows from seed and epoch alone; with `lengths`, `group` neighbours are of like length.

    Those of transformers and accelerate draw from the global random state, which at an epoch's start is known only to
    a run that was there, or count epochs, and are not told the number where a run goes on inside one.
    `epoch()` is asked whenever an order begins.
    """

    def __init__(
        self, rows: int, epoch: Callable[[], int], seed: int, lengths: list[int] | None = None, group: int = 1
    ) -> None:
        self.rows = rows
        self.epoch = epoch
        self.seed = seed
        self.lengths = lengths
        self.group = group

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        # a hash of both: seed + epoch would give the next seed's run this one's orders, an epoch late
        key = hashlib.sha256(f"{self.seed} {self.epoch()}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


class Collator:
    """Pads on the right to the longest example of the batch."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        input_ids = torch.full((len(batch), width), self.pad, dtype=torch.int64)  # [B, width]
        labels = torch.full((len(batch), width), IGNORED, dtype=torch.int64)
        mask = torch.zeros((len(batch), width), dtype=torch.int64)
        for i, row in enumerate(batch):
            n = len(row["input_ids"])
            input_ids[i, :n] = row["input_ids"]
            labels[i, :n] = row["labels"]
            mask[i, :n] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


@contextlib.contextmanager
def _no_data_bars() -> Iterator[None]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """Undo what trl and transformers change in a model beside its weights."""
    base = _base(model)
    patched = [base, model] if base is not model else [base]
    forwards = [part.__dict__.get("forward") for part in patched]
    settings = [c for c in (base.config, getattr(base, "generation_config", None)) if c is not None]
    tokens = [{name: getattr(c, name, None) for name in SPECIAL} for c in settings]
    recomputing = {m: m.gradient_checkpointing for m in base.modules() if hasattr(m, "gradient_checkpointing")}
    hooks = base.get_input_embeddings()._forward_hooks  # checkpointing makes the embeddings ask for gradients
    hooked = set(hooks)
    try:
        yield
    finally:
        for part, forward in zip(patched, forwards, strict=True):
            part.__dict__.pop("forward", None)
            if forward is not None:
                part.forward = forward
        for c, saved in zip(settings, tokens, strict=True):
            for name, value in saved.items():
                setattr(c, name, value)
        for module, flag in recomputing.items():
            module.gradient_checkpointing = flag
        for hook in set(hooks) - hooked:
            del hooks[hook]


@contextlib.contextmanager
def _packs_apart(model: Any, config: TrainConfig) -> Iterator[None]:
    """Set attention that keeps the examples of a pack apart, if `config.packing` is set, and test it on two of them.

    Flash-attention stays where the model has it; the others are replaced by `attention.packed_attention`, since they
    see a pack as one text.
    """
    if config.packing is None:
        yield
        return
    base = _base(model)
    with _keeps_packs_apart(base) as apart:
        if not apart:
            raise ConfigError(
                f"{setting('training.packing')}: in a pack the examples of this model ({base.config.model_type}, "
                "attention "
                f"{base.config._attn_implementation}) see each other, which would train on mixed-up contexts: "
                "leave packing out, or load the model with flash-attention where its attention is to blame and has it"
            )
        yield


@contextlib.contextmanager
def _keeps_packs_apart(base: Any) -> Iterator[bool]:
    """Set the attention that agrees with the model's own forward, for the block; yield whether packs are apart."""
    training = {module: module.training for module in base.modules()}

    def restore() -> None:
        for module, flag in training.items():
            module.training = flag

    base.eval()
    try:
        referee = Referee(base, decoder_of(base), next(base.parameters()).device)
        with referee.settled(True) as mode:
            restore()
            yield mode.apart
    finally:
        restore()


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _end_checkpoints(spent: float) -> Any:
    """Return a callback that writes, beside each optimizer.pt, which parameter each of its indices is.

    The seconds of training so far, after `spent` ones, are kept with it.
    """
    from transformers import TrainerCallback

    start = time.perf_counter()

    class EndCheckpoints(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            names = {id(p): name for name, p in kwargs["model"].named_parameters()}
            groups = kwargs["optimizer"].param_groups
            ordered = [names.get(id(p), "") for group in groups for p in group["params"]]
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / _SECONDS).write_text(json.dumps(spent + time.perf_counter() - start), encoding="utf-8")
            with replacing(folder / NAMES) as temporary:
                temporary.write_text(json.dumps(ordered), encoding="utf-8")

    return EndCheckpoints()


def _count_on(trainer: Any) -> Any:
    """Make a callback that lets trl's `num_tokens` go on from a checkpoint, where trl would begin at zero again."""
    from transformers import TrainerCallback

    class CountOn(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer._total_train_tokens = state.num_input_tokens_seen

    return CountOn()


def _stop_at_nan() -> Any:
    """Return a callback that raises NumericError at the first loss that is not finite.

    What follows would be trained for nothing.
    """
    from transformers import TrainerCallback

    class StopAtNan(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not math.isfinite(float((logs or {}).get("loss", 0.0))):
                raise NumericError(
                    f"the training loss is not finite at step {state.global_step}: lower "
                    f"{setting('training.learning_rate')}"
                )

    return StopAtNan()


def _read_seconds(checkpoint: Path) -> float:
    path = checkpoint / _SECONDS
    return float(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else 0.0


def progress_bar() -> Any:
    """Return a callback that shows the steps on stderr."""
    from rich.console import Console
    from rich.progress import Progress
    from transformers import TrainerCallback

    class ProgressBar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = Progress(transient=True, console=Console(stderr=True))
            self.task = self.bar.add_task("fine-tuning", total=state.max_steps)
            self.bar.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(self.task, completed=state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.stop()

    return ProgressBar()
