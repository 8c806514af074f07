"""Random texts that show how a model attends: longer than every limit that its configuration names."""

from __future__ import annotations

import re
from typing import Any

import torch

from influence_fast.data.packing import context_of, text_config

# A forward of 512 tokens takes a billion-parameter model some 5 seconds on two CPU cores; windows of real models (4,096
# tokens) would take a minute at every opening. The user's own data are compared up to 2,048 tokens.
_LONGEST = 512
_UNLIMITED = 24  # tokens of the longest text where the configuration names no limit
_ROOM_FOR_OFFSETS = 4  # positions that some tables spend before the first token (padding_idx + 1)

_LIMIT = re.compile("window|chunk|index_top_?k|local_att|block_size")
# Numbers of layers, patterns of them, and pieces that something other than attention is computed in.
_NO_LIMIT = re.compile("^n_|num_|layer|pattern|feed_forward|mamba|ssm|expert|moe|conv|vision")


def limits(config: Any) -> list[int]:
    """Return the lengths that a configuration sets to what a token attends to: windows, chunks, an indexer's top-k."""
    found: set[int] = set()
    for name, value in vars(text_config(config)).items():
        if not _LIMIT.search(name) or _NO_LIMIT.search(name):
            continue
        numbers = value if isinstance(value, list | tuple) else [value]
        found |= {n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 1}
    return sorted(found)


def vocabulary_of(base: Any) -> int:
    """Return the number of tokens that a causal LM embeds; by its configuration where it has a table for each code."""
    weight = getattr(base.get_input_embeddings(), "weight", None)
    return int(text_config(base.config).vocab_size) if weight is None else len(weight)


def probe_texts(base: Any) -> list[torch.Tensor]:
    """Make random texts, [n] int64 each: of 2 tokens, longer than the limits, of 1 token, and of about half."""
    longest = max([_UNLIMITED, *(2 * n + 3 for n in limits(base.config))])
    context = context_of(base.config)
    longest = max(2, min(longest, _LONGEST, _LONGEST if context is None else context - _ROOM_FOR_OFFSETS))
    allowed = torch.tensor(sorted(set(range(vocabulary_of(base))) - _special_tokens(base.config)) or [0])
    generator = torch.Generator().manual_seed(0)
    lengths = (2, longest, 1, longest // 2 + 1)
    return [allowed[torch.randint(0, len(allowed), (n,), generator=generator)] for n in lengths]


def _special_tokens(config: Any) -> set[int]:
    """Return the tokens that a configuration gives a meaning: an image's token with no image is an error."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            found |= _special_tokens(value)
        elif "token" in name and ("id" in name or "index" in name):
            numbers = value if isinstance(value, list | tuple) else [value]
            found |= {n for n in numbers if isinstance(n, int)}
    return found
