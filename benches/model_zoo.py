"""Rows of the engine against plain autograd, for every model type of transformers' causal-LM mapping.

    python -m benches.model_zoo [--kinds llama gemma2 ...] [--targets all-linear attention best] [--output zoo.json]
        [--table docs/supported-models.md]

Every model is tiny and random, its windows and chunks 8 tokens and its texts up to 22, in float64 (in float32 where the
model itself runs in nothing wider). A type is `exact` (the rows are autograd's, one example at a time through the model
as transformers gives it), `refused` (a ModelError or ConfigError that says why), `wrong` or `crash`. `no adapter`: peft
puts none on these targets. `unbuilt`: there is no tiny model of it here, or no reference to compare with.

`best` is the first that is exact of all-linear, the targets that its refusal names, attention, and the linears that
peft takes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

import influence_fast as inf
from benches.environment import describe
from influence_fast.errors import InfluenceFastError, one_line
from influence_fast.gradients.targets import gradient_layout

VOCABULARY = 128
WINDOW = 8
LENGTHS = (22, 3, 13, 2, 9)
EXACT = 1e-8  # relative norm of a row's error in float64
_MOST_NUMBERS = 50_000_000
TARGETS = ("all-linear", "attention", "best")
# Names of modules that project queries, keys and values, over all types; the linear may be inside a module so named.
_ATTENTION = re.compile(
    r"(?!.*(encoder_attn|cross|vision|image|audio))(.*\.)?(q_proj|v_proj|query|value|c_attn|query_key_value|Wqkv|qkv_proj"
    r"|qkv|q_lin|v_lin|q_b_proj|kv_b_proj|project_q|project_v|query_proj|value_proj|Wq|Wv)(\.[a-z_]+)?"
)
# What a configuration is told, wherever it has the name.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "dim": 32,
    "emb_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "dff": 48,
    "d_ff": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "multi_query_group_num": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "window_size": WINDOW,
    "local_attention": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "is_decoder": True,
    "rope_scaling": None,
}
# What a type needs beside or in place of that.
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "patching_mode": "static",
        "use_cache": False,
        "encoder_config": {"hidden_size_global": 32, "num_hidden_layers": 1},
        "decoder_config": {"hidden_size_global": 32},
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 4},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "shared_experts_intermediate_size": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": [48] * 4, "activation_sparsity_pattern": None},
    "gemma4_assistant": {
        "backbone_hidden_size": 32,
        "text_config": {
            "model_type": "gemma4_text",
            "num_hidden_layers": 4,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 4,
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gpt_oss": {"num_attention_heads": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    "inkling2_loop_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "kimi_linear": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "moshi": {"audio_vocab_size": 64},
    "mpt": {"expansion_ratio": 2},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attention_head_size": 8},
    "rwkv": {"use_cache": False},
    "xlm": {"causal": True},
    "xlstm": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_blocks": 2,
        "chunk_size": 1,  # in training every length must be a multiple of it
        "qk_dim_factor": 1.0,
        "mode": "train",
        "use_cache": False,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "num_key_value_heads": 4, "attn_layer_offset": 1, "attn_layer_period": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "router_hidden_size": 16},
}
# Of types whose class for causal LMs is built from one part of their configuration, that part.
_DECODERS = {"musicgen": "decoder", "musicgen_melody": "decoder"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one type with one choice of targets; `error` is the largest relative error of a row."""

    kind: str
    targets: str
    verdict: str  # exact, refused, wrong, crash, no adapter, unbuilt
    error: float | None = None
    packs: bool | None = None
    own_attention: bool | None = None
    message: str = ""
    chosen: str = ""  # of `best`: which targets


def kinds() -> list[str]:
    """Return the model types of transformers' causal-LM mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """Build a random causal LM of type `kind` with four layers, 32 wide, windows and chunks of 8 tokens."""
    from transformers import AutoModelForCausalLM

    config, build = tiny_config(kind), AutoModelForCausalLM.from_config
    if kind in _DECODERS:  # the mapping's class takes a part of the mapping's configuration
        build, config = AutoModelForCausalLM._model_mapping[type(config)]._from_config, getattr(config, _DECODERS[kind])
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numbers = sum(p.numel() for p in build(config).parameters())
    if numbers > _MOST_NUMBERS:
        raise ValueError(f"its tiny configuration has {numbers:,} numbers")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(config, dtype=dtype).to(dtype).eval()
    with contextlib.suppress(Exception):
        model.set_experts_implementation("eager")  # PyTorch's grouped products take no float64
    return model


def tiny_config(kind: str) -> Any:
    """Build the configuration of `tiny(kind)`."""
    from transformers import AutoConfig

    own = _OWN.get(kind, {})
    try:
        default = AutoConfig.for_model(kind)
    except Exception:  # a default that its own checks refuse
        default = AutoConfig.for_model(kind, **own)
    return type(default)(**_settings_for(default, own))


def _settings_for(default: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Return the small settings of a configuration by the names that it has, its parts' inside them, and `own` ones."""
    names = {*vars(default), *getattr(default, "attribute_map", {})}
    settings = {name: value for name, value in _SMALL.items() if name in names}
    if "kv_lora_rank" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]  # of a latent there are no groups
    for name, part in _parts(default):
        chosen = own.get(name, _OWN.get(part.model_type, {}))
        settings[name] = {"model_type": part.model_type} | _settings_for(part, chosen)
    return settings | {name: value for name, value in own.items() if not isinstance(settings.get(name), dict)}


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    """Give the configurations inside a configuration (of its text, of its images), with the names they have there."""
    from transformers import PreTrainedConfig

    held = dict(vars(config))
    for name, kind in getattr(config, "sub_configs", {}).items():
        if held.get(name) is None:
            with contextlib.suppress(Exception):  # a part that may be of any type has no default
                held[name] = kind()
    yield from ((name, part) for name, part in held.items() if isinstance(part, PreTrainedConfig))


def with_adapter(model: Any, targets: str = "all-linear", r: int = 3) -> Any:
    """Put a LoRA adapter with B factors that are not zero on `targets`: "all-linear", "attention" or peft's own."""
    from peft import LoraConfig, get_peft_model

    modules = _attention_linears(model) if targets == "attention" else targets
    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=modules, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
            elif parameter.dim() > 1:
                parameter.mul_(3)  # so that what tokens see of each other is no rounding
    return adapted.to(dtype).eval()


def _attention_linears(model: Any) -> list[str]:
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    if found := [name for name in linears if _ATTENTION.fullmatch(name)]:
        return found
    raise ValueError("no linear is named as one of attention's projections")


def examples_for(model: Any, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    """Make random examples of `lengths` tokens, the first third of each without labels."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    vocabulary = VOCABULARY if weight is None else min(VOCABULARY, weight.shape[0])
    generator = torch.Generator().manual_seed(1)
    made = []
    for n in lengths:
        ids = torch.randint(3, vocabulary, (n,), generator=generator)
        labels = ids.clone()
        labels[: max(1, n // 3)] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def by_autograd(model: Any, examples: list[dict[str, Any]]) -> torch.Tensor:
    """Return exact rows [E, k] by one ordinary forward and backward an example of the model as it is."""
    model = copy.deepcopy(model).eval()
    layout = gradient_layout(model)
    parameters = dict(model.named_parameters())
    factors = [next(p for n, p in parameters.items() if n.startswith(f"{e.module}.{e.factor}.")) for e in layout]
    rows = []
    for example in examples:
        logits = model(input_ids=example["input_ids"][None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, example["labels"][1:])
        grads = torch.autograd.grad(loss, factors, allow_unused=True)
        flat = [(torch.zeros_like(f) if g is None else g).flatten() for f, g in zip(factors, grads, strict=True)]
        rows.append(torch.cat(flat))
    return torch.stack(rows)


def rows_against_autograd(kind: str, targets: str | list[str] = "all-linear") -> Outcome:
    """Compare the engine's rows of `tiny(kind)` with plain autograd's; never raises.

    In float64, or in float32 where the model itself runs in nothing wider.
    """
    wide = _rows_against_autograd(kind, targets, torch.float64)
    if wide.verdict in ("exact", "no adapter") or "tiny configuration" in wide.message:
        return wide
    narrow = _rows_against_autograd(kind, targets, torch.float32)
    return narrow if narrow.verdict == "exact" and wide.verdict != "wrong" else wide


def _rows_against_autograd(kind: str, targets: str | list[str], dtype: torch.dtype) -> Outcome:
    name = targets if isinstance(targets, str) else ", ".join(targets)
    try:
        plain = tiny(kind, dtype)
    except Exception as error:
        return Outcome(kind, name, "unbuilt", message=_said(error))
    try:
        model = with_adapter(plain, targets)
    except Exception as error:
        return Outcome(kind, name, "no adapter", message=_said(error))
    examples = examples_for(model)
    try:
        from influence_fast.gradients.engine import GradientEngine

        rows = inf.per_example_gradients(model, examples)
        with GradientEngine(model, None) as engine:
            packs, own = engine.packs_are_separate, engine.own_attention
    except InfluenceFastError as error:
        return Outcome(kind, name, "refused", message=one_line(error, 400))
    except Exception as error:
        return Outcome(kind, name, "crash", message=_said(error))
    try:
        wanted = by_autograd(model, examples)
    except Exception as error:
        return Outcome(kind, name, "unbuilt", message=f"no reference: {_said(error)}")
    relative = _relative(rows, wanted)
    exact = relative < EXACT or relative < 10 * _rounding(model, examples, wanted)
    return Outcome(kind, name, "exact" if exact else "wrong", relative, packs, own)


def best_of(kind: str, tried: list[Outcome]) -> Outcome:
    """Return what some targets give: of those that were tried, that a refusal names, or that peft takes."""
    by_name = {outcome.targets: outcome for outcome in tried}
    everything, attention = (by_name.get(name) or rows_against_autograd(kind, name) for name in TARGETS[:2])
    ways: list[tuple[str, Callable[[], Outcome]]] = [("all-linear", lambda: everything)]
    named = re.search(r"target_modules=\[([^\]]*)\]", everything.message)
    if everything.verdict == "refused" and named:
        names = re.findall(r"'([^']+)'", named[1])
        ways.append(("as the refusal says", lambda: rows_against_autograd(kind, names)))
    ways.append(("attention", lambda: attention))
    if everything.verdict == "no adapter":
        ways.append(("what peft takes", lambda: rows_against_autograd(kind, _taken(kind, everything.message))))
    found = everything
    for chosen, outcome in ways:
        found = outcome()
        if found.verdict in ("exact", "wrong", "crash"):
            return replace(found, targets="best", chosen=chosen)
    return replace(everything, targets="best")


def _taken(kind: str, message: str) -> list[str]:
    """Return the names of a type's linears, without its head and without those that peft's message names."""
    model = tiny(kind)
    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and module is not head]
    return sorted({name.split(".")[-1] for name in linears} - set(re.findall(r"'(\w+)'", message)))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, 200)}"


def _relative(rows: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest relative norm of a row's error."""
    return float(((rows - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def _rounding(model: Any, examples: list[dict[str, Any]], wanted: torch.Tensor) -> float:
    """Return by how much plain rows move with the weights by 1e-11 of themselves, or by a float32 model's rounding.

    It is more than 1e-8 in a float64 model that computes in float32 inside. At most 1e-6 (1e-4 in float32), so that
    nothing but that is excused.
    """
    size, most = (1e-11, 1e-6) if wanted.dtype == torch.float64 else (2.0**-24, 1e-4)
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1 + size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return min(most, _relative(by_autograd(moved, examples), wanted))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    logging.getLogger("influence_fast").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(outcome: Outcome, seconds: float) -> str:
    error = "" if outcome.error is None else f"{outcome.error:.1e}"
    what = f"{outcome.kind:28} {outcome.targets:11} {outcome.verdict:10}"
    return f"{what} {error:8} {way(outcome):13} {seconds:5.1f} s  {outcome.chosen} {outcome.message}"


def way(outcome: Outcome) -> str:
    """Return how the engine called a model: packs, one example alone, or with its own attention."""
    if outcome.packs is None:
        return ""
    return "packs" if outcome.packs else "own attention" if outcome.own_attention else "alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", help="by default all of the mapping")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--output", type=Path, help="a JSON file of all outcomes")
    parser.add_argument("--table", type=Path, help="a Markdown file of their table")
    args = parser.parse_args()
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    with _quiet():
        for kind in args.kinds or kinds():
            tried: list[Outcome] = []
            for targets in args.targets:
                start = time.perf_counter()
                outcome = best_of(kind, tried) if targets == "best" else rows_against_autograd(kind, targets)
                tried.append(outcome)
                print(_line(outcome, time.perf_counter() - start), flush=True)
            outcomes += tried
            gc.collect()
    minutes = (time.perf_counter() - began) / 60
    for targets in args.targets:
        print(targets, dict(Counter(o.verdict for o in outcomes if o.targets == targets)))
    print(f"{minutes:.1f} minutes")
    if args.output:
        record = {"environment": describe(), "minutes": round(minutes, 1), "outcomes": [asdict(o) for o in outcomes]}
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.table:
        from benches.zoo_table import page

        args.table.write_text(page(outcomes, describe(), minutes))


if __name__ == "__main__":
    main()
