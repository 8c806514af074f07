"""Name the precisions of the products with base weights."""

from __future__ import annotations

from influence_fast.errors import ConfigError, did_you_mean

AUTO, FP8 = "auto", "fp8"
PRECISIONS = (AUTO, FP8)


def check_precision(name: str, source: str = "precision", *, sharded: bool = False) -> None:
    """Raise ConfigError for a precision that does not exist, or does not go with base weights that are `sharded`."""
    if name not in PRECISIONS:
        known = did_you_mean(str(name), PRECISIONS)
        raise ConfigError(f": unknown value {name!r}", key=source, value=name, remedy=known)
    if sharded and name == FP8:
        raise ConfigError(
            ": fp8 keeps copies of whole base weights, and these are spread over processes (FSDP); "
            "use 'auto', or one process a GPU",
            key=source,
            value=name,
        )
