"""The configuration of a run: every default is here (or in the settings classes it is made of) and nowhere else.

A YAML file maps onto `RunConfig` key by key; an unknown key, a value of the wrong kind or an unknown strategy is a
ConfigError that names the key and the nearest one that exists.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from influence_fast.data.diversity import check_similarity
from influence_fast.data.schemas import check_turns
from influence_fast.errors import ConfigError, setting, shown
from influence_fast.evaluation.evaluate import EvalConfig
from influence_fast.evaluation.generation_settings import EXPLICIT
from influence_fast.gradients.rows.precision import FP8
from influence_fast.gradients.rows.row_spec import SKETCHES, RowSpec
from influence_fast.guards import reading
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.settings import CONTRAST, InfluenceConfig
from influence_fast.selection.strategies import STRATEGIES, needed_columns
from influence_fast.settings import MAX_TRAINING_SEED, check_seed, from_dict, one_of, read_mapping
from influence_fast.training.quantized_files import check_quantization
from influence_fast.training.settings import LoraSettings, TrainConfig


@dataclass(frozen=True)
class Source:
    """A source of examples: a hub id, a file or a saved dataset, and how its rows are read."""

    path: str
    split: str = "train"
    format: str = "auto"
    # The choice among an OpenR1 row's traces.
    trace: str | int = "first_correct"
    limit: int | None = None
    columns: dict[str, str | None] | None = None
    # The assistant turns of a conversation that have a loss: the last, or all.
    turns: str = "last"

    def __post_init__(self) -> None:
        check_turns(self.turns)

    @classmethod
    def from_text(cls, path: str) -> Source:
        """Return the source at `path` with default settings: in a YAML file a bare path stands for all of them."""
        return cls(path=path)


@dataclass(frozen=True)
class DataConfig:
    """The training pool, which is scored and pruned, the validation questions and the test questions.

    `validation` and `test` left out are held out of the pool: the first `holdout_validation` and the next
    `holdout_test` rows of a seeded shuffle. `decontaminate` sets pool examples aside that share 8 words in a row with
    a test question or its solution.
    """

    pool: Source
    validation: Source | None = None
    test: Source | None = None
    holdout_validation: int = 0
    holdout_test: int = 0
    max_length: int | None = None
    truncate: bool = False
    decontaminate: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The base model, and the adapter to start from if there is one.

    `tokenizer`: hub id or folder of a tokenizer used in place of the adapter's or the model's own. `quantize`: nf4, fp4
    or int8 quantises the base weights with bitsandbytes as they are loaded (docs/quantized.md).
    """

    path: str
    # With a trained adapter the first fine-tuning is skipped.
    adapter: str | None = None
    tokenizer: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    quantize: str | None = None

    def __post_init__(self) -> None:
        check_quantization(self.quantize, "model.quantize")


@dataclass(frozen=True)
class PruningConfig:
    """The pruning grid: each strategy at each fraction of the pool dropped, fine-tuned with each seed.

    `max_similar`: of traces with this Jaccard similarity of their 8-word runs or more, only the one that the strategy
    would drop last stays. The pass rates that `difficulty`, `easy` and `hard` read come from `pass_rate_samples`
    answers to each question of the pool at `pass_rate_temperature`.
    """

    strategies: tuple[str, ...] = ("random", "low_benefit", "high_harm", "combined")
    fractions: tuple[float, ...] = (0.1, 0.5)
    seeds: tuple[int, ...] = (0,)
    max_similar: float | None = None
    pass_rate_samples: int = 4
    pass_rate_temperature: float = 0.6

    def pass_rate_config(self, evaluation: EvalConfig) -> EvalConfig:
        """Return the evaluation settings under which the pool's questions are answered to estimate their pass rates.

        They are those of `evaluation` but for the engine and the sampling: the pretrained model is in memory then, so
        it answers itself whatever `evaluation.engine` is, and it samples by `pass_rate_samples` and
        `pass_rate_temperature` whatever `evaluation.generation` is.
        """
        return dataclasses.replace(
            evaluation,
            samples=self.pass_rate_samples,
            temperature=self.pass_rate_temperature,
            generation=EXPLICIT,
            pass_at=(),
            engine="auto",
        )


@dataclass(frozen=True)
class ValidateConfig:
    """Settings of `influence-fast validate`: the methods to validate, and the number of retrainings.

    methods: names of `methods.METHODS`, or mappings of `Method`'s fields with a name; `default` is the one that the
    others are compared with. external: name -> .npz file with `scores` [N, Q] of another tool, for the same pool and
    queries in their order.

    LDS: `subsets` random subsets of `share` of the pool, each trained with every one of `seeds`. Leave-k-out:
    `leave_out_sets` random sets of `leave_out` of the pool, trained without. Removal: for each of `removal_methods`,
    the `remove` shares that help and that harm the queries most are dropped. 0 sets, or no methods, skip a part.
    """

    methods: tuple[Any, ...] = ("ekfac-cosine", "cosine", "dot", "fisher", "fisher-cosine", "ekfac", "datainf", "loss")
    default: str = "ekfac-cosine"
    external: dict[str, str] = field(default_factory=dict)
    subsets: int = 64
    share: float = 0.5
    seeds: tuple[int, ...] = (0, 1)
    leave_out: float = 0.1
    leave_out_sets: int = 16
    remove: tuple[float, ...] = (0.1, 0.3)
    removal_methods: tuple[str, ...] = ("ekfac-cosine", "loss")
    processes: int = 1
    draws: int = 1000

    def __post_init__(self) -> None:
        for name in ("share", "leave_out"):
            if not 0 < getattr(self, name) < 1:
                value = getattr(self, name)
                raise ConfigError(f"is {value}; it is a share between 0 and 1", key=f"validate.{name}", value=value)
        if (self.subsets and self.subsets < 3) or (self.leave_out_sets and self.leave_out_sets < 3):
            raise ConfigError("validate.subsets and leave_out_sets must be 0 (skipped) or at least 3")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"validate.seeds: {list(self.seeds)} are no different seeds; give one or more")
        for seed in self.seeds:
            check_seed("validate.seeds", seed, MAX_TRAINING_SEED)
        if self.processes < 1 or self.draws < 1:
            raise ConfigError("validate.processes and draws must be at least 1")
        for share in self.remove:
            if not 0 < share < 1:
                raise ConfigError(f"validate.remove: {share} is not between 0 and 1 (the share that is dropped)")


@dataclass(frozen=True)
class RunConfig:
    """The configuration of one complete run.

    `output`: the folder everything is written to; a relative one is taken from the folder that the command is started
    in, while all other paths of a YAML file are taken from the file's own folder.
    """

    output: str
    model: ModelConfig
    data: DataConfig
    # `model` scores the pool, and this one is fine-tuned and evaluated; None: `model` is used for both.
    target_model: ModelConfig | None = None
    title: str = "Influence-based data selection"
    seed: int = 0
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: TrainConfig = field(default_factory=TrainConfig)
    gradients: RowSpec = field(default_factory=RowSpec)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)

    def __post_init__(self) -> None:
        Recipe.of(self.gradients, self.influence).check()
        if not isinstance(self.gradients.sketch, str):
            raise ConfigError(f"{setting('gradients.sketch')}: a run names a fitted sketch by the folder of its store")
        _check_quantized(self)
        if self.influence.checkpoints and not self.training.save_checkpoints and self.model.adapter is None:
            raise ConfigError(
                f"{setting('influence.checkpoints')}: there will be none; set {setting('training.save_checkpoints')}"
            )
        given = self.model.adapter
        if self.gradients.target is not None and (
            given is None or (Path(given).expanduser() / "adapter_config.json").exists()
        ):
            raise ConfigError(
                f"{setting('gradients.target')} is of a fully fine-tuned model, and a run fine-tunes LoRA adapters: "
                "leave it out, or "
                "give the folder of a fully fine-tuned model as model.adapter"
            )
        if self.target_model is not None and self.target_model.adapter is not None:
            raise ConfigError("target_model.adapter: the grid fine-tunes a fresh adapter; leave it out, or merge it")
        if not self.pruning.seeds or len(set(self.pruning.seeds)) < len(self.pruning.seeds):
            raise ConfigError(
                f"{setting('pruning.seeds')}: {list(self.pruning.seeds)} are no different seeds; give one or more"
            )
        cells = {(s, round(100 * f)) for s in self.pruning.strategies for f in self.pruning.fractions}
        if len(cells) < len(self.pruning.strategies) * len(self.pruning.fractions):
            raise ConfigError(
                "pruning: a strategy or fraction comes twice (fractions are told apart by whole per cent)"
            )
        check_strategies(self.pruning.strategies, self.influence)
        if self.pruning.max_similar is not None:
            check_similarity(self.pruning.max_similar)
        if self.pruning.pass_rate_samples < 1 or self.pruning.pass_rate_temperature <= 0:
            raise ConfigError("pruning: pass_rate_samples must be at least 1 and pass_rate_temperature above 0")
        for fraction in self.pruning.fractions:
            if not 0 < fraction < 1:
                raise ConfigError(
                    f"{setting('pruning.fractions')}: {fraction} is not between 0 and 1 (the share that is dropped)"
                )
        check_seed("seed", self.seed)
        for seed in self.pruning.seeds:
            check_seed("pruning.seeds", seed, MAX_TRAINING_SEED)
        for name in ("validation", "test"):
            if getattr(self.data, name) is not None and getattr(self.data, f"holdout_{name}"):
                raise ConfigError(
                    f": there is a {name} source as well; leave out one of the two", key=f"data.holdout_{name}"
                )
        if self.data.validation is None and self.data.holdout_validation < 1:
            raise ConfigError("data: give a validation source, or holdout_validation to hold some of the pool out")
        if self.data.test is None and self.data.holdout_test < 1:
            raise ConfigError("data: give a test source, or holdout_test to hold some of the pool out")


def _check_quantized(config: RunConfig) -> None:
    """Raise ConfigError for settings that cannot be combined with base weights quantised on loading."""
    models = [config.model, config.target_model or config.model]
    if all(model.quantize is None for model in models):
        return
    if config.gradients.precision == FP8 and config.model.quantize is not None:
        raise ConfigError(
            f"{setting('gradients.precision')}: fp8 rounds base weights that model.quantize has rounded; use 'auto'"
        )
    if config.evaluation.engine == "vllm":
        raise ConfigError(
            f"{setting('evaluation.engine')}: vllm would load the weights unquantised; use 'transformers'"
        )


def check_strategies(names: typing.Iterable[str], influence: InfluenceConfig) -> None:
    """Raise ConfigError for a strategy that is unknown, or that reads columns which the queries do not give."""
    for strategy in names:
        one_of("pruning.strategies", strategy, STRATEGIES)
        needed = needed_columns([strategy])
        if any(column.endswith("_contrast") for column in needed) and influence.queries != CONTRAST:
            raise ConfigError(
                f": {strategy!r} reads right and wrong answers to the same questions; set "
                f"{setting('influence.queries', CONTRAST)}, or leave the strategy out",
                key="pruning.strategies",
                value=strategy,
            )
        wrong = any(column.endswith("_incorrect") for column in needed)
        if wrong and influence.queries == "reference":
            raise ConfigError(
                f"{setting('pruning.strategies')}: {strategy!r} reads the model's wrong answers, which "
                f"{setting('influence.queries', 'reference')} does not ask for; use own_answers, or leave the "
                "strategy out"
            )


def load_config(path: str | Path) -> RunConfig:
    """Read a run's configuration from a YAML file.

    Relative paths in it are taken from the file's own folder if they exist there. Raises ConfigError naming the file
    and the key.
    """
    path = Path(path)
    try:
        raw = read_mapping(path, "a configuration")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    gradients = raw.get("gradients")
    if isinstance(gradients, dict) and isinstance(sketch := gradients.get("sketch"), str) and sketch not in SKETCHES:
        # The sketch's folder is checked when it is read.
        raw["gradients"] = gradients | {"sketch": _local(sketch, path.parent)}
    try:
        with reading("the configuration", ConfigError):
            return _resolve_paths(from_dict(RunConfig, raw), path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.marked}", value=error.value) from error.__cause__


_LONGEST_NAME = 255  # bytes, of every file system in use


def _local(path: str, folder: Path) -> str:
    """Return `path` resolved against `folder` if it exists there, else unchanged.

    Raises ConfigError for a text that cannot be a file name.
    """
    if "\0" in path or any(_name_bytes(part) > _LONGEST_NAME for part in path.split("/")):
        raise ConfigError(f"{shown(path)} cannot be the name of a file or folder; check the path")
    # The same file has one name wherever the command is run.
    beside = Path(os.path.abspath(folder / path))
    return str(beside) if not Path(path).is_absolute() and os.path.exists(beside) else path


def _resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    def local(path: str) -> str:
        return _local(path, folder)

    def source(value: Any) -> Any:
        return None if value is None else dataclasses.replace(value, path=local(value.path))

    def model(value: ModelConfig) -> ModelConfig:
        adapter = None if value.adapter is None else local(value.adapter)
        tokenizer = None if value.tokenizer is None else local(value.tokenizer)
        return dataclasses.replace(value, path=local(value.path), adapter=adapter, tokenizer=tokenizer)

    # The output folder is not resolved, but it has to be a valid path.
    local(config.output)
    data, optimizer = config.data, config.influence.optimizer
    return dataclasses.replace(
        config,
        influence=dataclasses.replace(config.influence, optimizer=None if optimizer is None else local(optimizer)),
        model=model(config.model),
        target_model=config.target_model and model(config.target_model),
        validate=dataclasses.replace(
            config.validate,
            external={name: local(path) for name, path in config.validate.external.items()},
            methods=tuple(
                method | {"proxy": local(method["proxy"])}
                if isinstance(method, dict) and method.get("proxy")
                else method
                for method in config.validate.methods
            ),
        ),
        data=dataclasses.replace(
            data, pool=source(data.pool), validation=source(data.validation), test=source(data.test)
        ),
    )


def _name_bytes(name: str) -> float:
    """Return how many bytes a name takes in a folder, infinity for text that no file system can write."""
    try:
        return len(os.fsencode(name))
    except UnicodeEncodeError:  # half a surrogate pair
        return float("inf")
