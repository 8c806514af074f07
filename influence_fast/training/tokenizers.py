"""Tokenizers: the adapter's own where it has one, else the model's.

An adapter learned the tokens that its tokenizer and chat template made. Under the base model's own template the same
weights answer another question: on sums of two digits a small model falls from 1.000 right answers to 0.017 (measured).
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from influence_fast.data.fingerprints import tokenizer_hash
from influence_fast.errors import ModelError, one_line, shown, warn_once
from influence_fast.guards import reading
from influence_fast.training.files import cannot_load, check_folder, check_no_pipes, check_place
from influence_fast.training.tokenizer_limits import check_tokenizer_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
#: Any of these makes a folder one with a tokenizer; the other files only add to it.
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model"),
    *("tekken.json", "vocab.json", "vocab.txt"),
)
_CONFIG = "tokenizer_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json", _CONFIG)
_PATTERNS = [
    *VOCABULARIES,
    *_TEMPLATES,
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "additional_chat_templates/*"),
]


def load_tokenizer(
    model_id_or_path: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    model: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a model, or an adapter of it, was trained with.

    Args:
        model_id_or_path: folder or hub id of the base model.
        adapter: folder or hub id of an adapter. A tokenizer that lies there takes the place of the base's, and a chat
            template alone that of the base's template; where that changes any token, one warning says so.
        tokenizer: folder or hub id of a tokenizer that is used whatever the model and the adapter have.
        model: is checked to have an embedding for every token (`check_tokenizer`).
        trust_remote_code: run a tokenizer's own code.

    Returns:
        The tokenizer. One without a padding token pads with EOS, or with another special token where it has none.

    Raises:
        ModelError: not found, neither an EOS token nor a chat template, more tokens than `model` has embeddings.

    Example:
        >>> tokenizer = inf.load_tokenizer("Qwen/Qwen2.5-0.5B", adapter="my-adapter")  # doctest: +SKIP
    """
    base = os.fspath(model_id_or_path)
    source = os.fspath(tokenizer or adapter or base)
    with reading(f"the tokenizer of {source}", ModelError):
        if tokenizer is not None:
            found = _open(os.fspath(tokenizer), trust_remote_code)
        elif adapter is not None:
            found = _of_adapter(os.fspath(adapter), base, trust_remote_code)
        else:
            found = _open(base, trust_remote_code)
        if model is not None:
            check_tokenizer(model, found, adapter=None if tokenizer is not None else adapter)
        return found


def check_tokenizer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, adapter: str | os.PathLike[str] | None = None
) -> None:
    """Raise ModelError when `tokenizer` has a token that `model` has no embedding for.

    adapter: the adapter in `model`, or to come, which the message tells how to save with its embeddings.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    size = embedding.weight.shape[0]
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest < size:
        return
    remedy = "use the model's own tokenizer"
    if adapter is not None:
        remedy = (
            f"the adapter {os.fspath(adapter)} stores none either: save it again from the model it was trained in, "
            "with save_pretrained(..., save_embedding_layers=True), or set another tokenizer (--tokenizer, "
            "model.tokenizer)"
        )
    raise ModelError(
        f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has token {token!r} with id "
        f"{highest}, the model has embeddings for {size}; {remedy}"
    )


# ---- an adapter's own ------------------------------------------------------------------------------------


def _of_adapter(adapter: str, base: str, trust_remote_code: bool) -> Any:
    """Return the adapter's tokenizer, or the base's with the adapter's template, or the base's."""
    folder = _adapter_folder(adapter)
    template = _template_in(folder)
    if not any((folder / name).is_file() for name in VOCABULARIES):
        found = _open(base, trust_remote_code)
        if template is not None and template != found.chat_template:
            found.chat_template = template
            warn_once(logger, f"the adapter {adapter} has its own chat template, used in place of that of {base}")
        return found
    own = _open(str(folder), trust_remote_code, base=base)
    if own.chat_template is None:
        own.chat_template = template  # of chat_template.json, which transformers reads for processors alone
    try:
        of_base = _open(base, trust_remote_code)
    except ModelError:
        return own  # the only one there is
    if tokenizer_hash(own) != tokenizer_hash(of_base):
        why = _difference(own, of_base)
        warn_once(logger, f"the adapter {adapter} has its own tokenizer, used in place of that of {base} ({why})")
    return own


def _difference(own: Any, of_base: Any) -> str:
    parts = [
        ("vocabulary", lambda t: t.get_vocab()),
        ("special tokens", lambda t: {k: str(v) for k, v in t.special_tokens_map.items()}),
        ("chat template", lambda t: t.chat_template),
    ]
    differing = [name for name, of in parts if of(own) != of(of_base)]
    return f"another {', '.join(differing)}" if differing else "it splits text by other rules"


def _adapter_folder(adapter: str) -> Path:
    """Return the local folder with an adapter's tokenizer files, fetched from the hub if it is not local."""
    folder = Path(adapter).expanduser()
    if os.path.isdir(folder):
        check_no_pipes(folder)
        return folder
    check_place(adapter, "adapter")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(adapter, allow_patterns=_PATTERNS))
    except Exception as error:
        raise ModelError(cannot_load(adapter, "adapter", error)) from error


def _template_in(folder: Path) -> Any:
    """Read the chat template that lies in a folder: its text, named ones as a dict, or None.

    Raises ModelError for a file that is no JSON.
    """
    jinja, *others = (folder / name for name in _TEMPLATES)
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for path in others:
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is not JSON ({one_line(error)}); mend it, or remove it") from error
        template = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(template, list):  # [{"name": ..., "template": ...}], as tokenizer_config.json keeps several
            template = {one["name"]: one["template"] for one in template}
        if template is not None:
            return template
    return None


# ---- one folder or repository ----------------------------------------------------------------------------


def _open(source: str, trust_remote_code: bool, base: str | None = None) -> Any:
    """Open the tokenizer of a folder or hub id; `base`: the model whose configuration an adapter's folder lacks."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if os.path.isdir(source):
        check_no_pipes(Path(source))
    else:
        check_folder(source, "tokenizer.json", "tokenizer")
    if (file := _tokenizer_file(source)) is not None:
        check_tokenizer_file(file)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if base is not None and not (Path(source) / "config.json").is_file():
        options |= _config_of(base, trust_remote_code)
    try:
        declared = get_tokenizer_config(source, trust_remote_code=trust_remote_code).get("tokenizer_class")
        # A generic class means that tokenizer.json says everything. AutoTokenizer would go by the model's type
        # instead, and put (for example) Qwen2's own splitting in the place of the file's.
        generic = declared in GENERIC_TOKENIZERS
        if generic:
            options.pop("config", None)
        loader: Any = PreTrainedTokenizerFast if generic else AutoTokenizer
        tokenizer = loader.from_pretrained(source, **options)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(cannot_load(source, "tokenizer", error)) from error
    templates = tokenizer.chat_template
    every = templates.values() if isinstance(templates, dict) else [templates or ""]
    if not all(isinstance(template, str) for template in every):
        raise ModelError(f"the tokenizer {source} has the chat template {shown(templates)}, which is no text; mend it")
    if tokenizer.eos_token_id is None and not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer {source} has neither an EOS token nor a chat template that ends a turn; set "
            "tokenizer.eos_token to the model's end-of-text token and save it again"
        )
    _set_padding(tokenizer)
    return tokenizer


def _tokenizer_file(source: str) -> Path | None:
    """Return the tokenizer.json of a folder or hub id, None if there is none or the hub cannot be asked."""
    path = Path(source).expanduser() / "tokenizer.json"
    if os.path.isdir(source):
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "tokenizer.json"))
    except Exception:  # loading the tokenizer, which asks for the same file, says what is wrong
        return None


def _config_of(base: str, trust_remote_code: bool) -> dict[str, Any]:
    """Return the base's configuration as an option of AutoTokenizer, which chooses a class by the model's type.

    Without it the same files in an adapter's folder would be split by another class than in the base's.
    """
    from transformers import AutoConfig

    try:
        return {"config": AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)}
    except Exception:  # loading the model says what is wrong with its configuration
        return {}


def _set_padding(tokenizer: Any) -> None:
    """Set a padding token: padding is masked wherever it stands, so any special token will do.

    Without one, callers pad with id 0.
    """
    if tokenizer.pad_token_id is not None:
        return
    candidates = [tokenizer.eos_token, tokenizer.unk_token, *tokenizer.all_special_tokens]
    tokenizer.pad_token = next((token for token in candidates if token is not None), None)
