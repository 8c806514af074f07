"""The demo's world, made on the spot and without a network: tokenizer, pre-trained model, pool, validation, test.

The model is a Qwen2 of half a million parameters that has read stories with two kinds of events and bare
arithmetic of all kinds (demo_data.py). Everything follows from one seed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from influence_fast.data.examples import Example, load_examples, render_prompt, save_examples
from influence_fast.errors import ConfigError
from influence_fast.progress import track
from influence_fast.run import demo_data
from influence_fast.run.demo_data import draw_examples, draw_pool, drill
from influence_fast.settings import check_seed
from influence_fast.training.fine_tuning import quiet_libraries
from influence_fast.training.settings import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from influence_fast.config import RunConfig

RECORD = "world.json"
SPLITS = ("pool", "validation", "test")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Answer:\n' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:\n' }}{% endif %}"
)
VOCABULARY_STORIES = 2000  # stories read to find the words there are


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """Sizes of the demo's world. Defaults are set so that the whole demo takes a few minutes on two cores."""

    pool_size: int = 640
    validation_size: int = 150
    test_size: int = 300
    hidden_size: int = 128
    layers: int = 3
    pretrain_steps: int = 700
    pretrain_batch: int = 16
    drill_share: float = 0.25  # of the pre-training documents: bare arithmetic
    reading_share: float = 0.1  # of the pre-training documents: questions in the new wordings, without solutions


@dataclass(frozen=True, slots=True)
class DemoWorld:
    """A made world: folder of the model with its tokenizer, and the three sets."""

    path: Path
    model_path: Path
    pool: list[Example]
    validation: list[Example]
    test: list[Example]

    def file(self, split: str) -> Path:
        """Return the jsonl file of a split, with `id`, `prompt`, `completion`, `answer` and `label` in each row."""
        return self.path / f"{split}.jsonl"


def make_world(
    output_dir: str | Path, *, seed: int = 0, config: WorldConfig | None = None, progress: bool = False
) -> DemoWorld:
    """Make the demo's synthetic task in `output_dir`, or load it if it was made with the same seed and sizes.

    A world of another seed or other sizes is replaced. Raises ConfigError: what is there is no world of the demo.
    """
    check_seed("seed", seed)
    config = config or WorldConfig()
    final = Path(output_dir)
    record = {"seed": seed, "code": _code_hash(), **asdict(config)}
    if _record_in(final) != record:
        _check_replaceable(final)
        partial = final.parent / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tokenizer = make_tokenizer()
        model = pretrain(tokenizer, config, seed, progress=progress)
        with quiet_libraries():
            model.save_pretrained(partial / "model")
        tokenizer.save_pretrained(partial / "model")
        save_examples(draw_pool(_rng(seed, "pool"), config.pool_size), partial / "pool.jsonl")
        for split, size in (("validation", config.validation_size), ("test", config.test_size)):
            save_examples(draw_examples(_rng(seed, split), size, split), partial / f"{split}.jsonl")
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    pool, validation, test = (load_examples(final / f"{split}.jsonl") for split in SPLITS)
    return DemoWorld(final, final / "model", pool, validation, test)


def demo_config(
    output: str | Path, *, seed: int = 0, config: WorldConfig | None = None, progress: bool = True
) -> RunConfig:
    """Make the synthetic task beside `output` (in `<output>-world`) and return the configuration of the run over it."""
    from influence_fast.config import DataConfig, ModelConfig, RunConfig, Source
    from influence_fast.evaluation.evaluate import EvalConfig

    output = Path(output)
    world = make_world(output.with_name(f"{output.name}-world"), seed=seed, config=config, progress=progress)
    pool, validation, test = (Source(str(world.file(split))) for split in SPLITS)
    return RunConfig(
        output=str(output),
        title="Demo: arithmetic word problems with corrupted traces",
        model=ModelConfig(str(world.model_path)),
        data=DataConfig(pool=pool, validation=validation, test=test),
        training=DEMO_TRAINING,
        evaluation=EvalConfig(max_new_tokens=48, batch_size=300),
        seed=seed,
    )


# rates are those of a model of half a million parameters, not of a language model
DEMO_TRAINING = TrainConfig(epochs=2, learning_rate=5e-3, batch_size=8)


# ---- tokenizer -------------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Make a byte-level BPE of Qwen2's own kind over the demo's words: each word one token, each digit one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    examples = draw_pool(_rng(0, "vocabulary"), VOCABULARY_STORIES)
    texts = [f"Question: {example.prompt}\nAnswer:\n{example.completion}" for example in examples]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    )
    learnt = json.loads(core.to_str())["model"]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    # a tokenizer class of the model's own family: AutoTokenizer takes no other for a Qwen2 config
    merges: list[Any] = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=merges, **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# ---- pre-training ----------------------------------------------------------------------------------------


def pretrain(
    tokenizer: PreTrainedTokenizerBase, config: WorldConfig, seed: int, *, progress: bool = False
) -> PreTrainedModel:
    """Train a Qwen2-shaped model from scratch until it solves the known kinds of stories.

    A loop of its own, not `finetune`: batches are drawn as they are needed, and Muon (Jordan et al., 2024) on the
    matrices leaves 1 % of the known stories wrong where AdamW alone, in as many steps, leaves 4 %.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=config.hidden_size**-0.5,  # with 0.02 14 % of the known stories stay wrong, not 4 %
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    model = Qwen2ForCausalLM(shape)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    steps = config.pretrain_steps

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    model.train()
    batches = _batches(tokenizer, config, seed)
    for tokens, targets in track(batches, "pre-training the demo model", shown=progress, total=steps):
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()
    return model.eval()


def _batches(
    tokenizer: PreTrainedTokenizerBase, config: WorldConfig, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of documents of like length: tokens and targets [B, width], prompt and padding ignored.

    Padding is on the right, where causal attention never looks: no mask is needed.
    """
    rng = _rng(seed, "pre-training")
    count = config.pretrain_steps * config.pretrain_batch
    documents: list[tuple[str, str]] = []
    for _ in range(count):
        kind = rng.random()
        if kind < config.drill_share:
            documents.append(("", "\n".join(drill(rng) for _ in range(9))))
        elif kind < config.drill_share + config.reading_share:
            # a word that never is a target is pushed away from all that are, and all such words end up alike
            (story,) = draw_examples(rng, 1, "read")
            documents.append(("", f"Question: {story.prompt}"))
        else:
            (story,) = draw_examples(rng, 1, "story", new_share=0.0)
            documents.append((render_prompt(story, tokenizer), story.completion))
    prompts = tokenizer([prompt for prompt, _ in documents], add_special_tokens=False)["input_ids"]
    texts = tokenizer([text for _, text in documents], add_special_tokens=False)["input_ids"]
    rows = [(p + t + [tokenizer.eos_token_id], len(p)) for p, t in zip(prompts, texts, strict=True)]
    size, order = config.pretrain_batch, []
    for start in range(0, count, 16 * size):
        near = sorted(rows[start : start + 16 * size], key=lambda row: len(row[0]))
        batches = [near[i : i + size] for i in range(0, len(near), size)]
        rng.shuffle(batches)
        order += batches
    for batch in order:
        width = max(len(ids) for ids, _ in batch)
        tokens = torch.full((len(batch), width), tokenizer.pad_token_id, dtype=torch.int64)
        targets = torch.full((len(batch), width), -100, dtype=torch.int64)
        for i, (ids, n_prompt) in enumerate(batch):
            tokens[i, : len(ids)] = torch.tensor(ids)
            targets[i, n_prompt : len(ids)] = tokens[i, n_prompt : len(ids)]
        yield tokens, targets


def _rng(seed: int, purpose: str) -> random.Random:
    return random.Random(f"{seed}:{purpose}")


def _code_hash() -> str:
    """Return the SHA-256 of the code that makes the task, so that one made by other code is made anew."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in (__file__, demo_data.__file__))).hexdigest()


def _record_in(path: Path) -> dict[str, Any] | None:
    """Return what the task in a folder was made of; None if there is no record, or one of another program."""
    try:
        found = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"seed", "code"} <= found.keys() else None


def _check_replaceable(path: Path) -> None:
    """Raise ConfigError unless the folder is empty, missing or an older task of the demo."""
    empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not empty and _record_in(path) is None:
        raise ConfigError(f"{path} holds something else than the demo's world: choose another output, or move it away")
