"""How much is added to the eigenvalues of a preconditioner: a share of their mean, given or picked on held-out rows.

`damping="auto"`: every fifth training row is held out (rows 4, 9, 14, ...), the eigenvalues are fitted on the others,
and of `GRID` the share is taken under which the held-out rows are likeliest as draws from N(0, H + lambda_b I),

    log p = -1/2 sum over blocks b and eigendirections j of  log(e_bj + lambda_b) + m_bj / (e_bj + lambda_b)

e: fitted eigenvalues, m: mean square of the held-out rows along the same directions, lambda_b: share x mean of e_b.
Too little damping makes held-out rows unlikely along directions that the fit never saw, too much along all others.
No query is looked at, so the choice leaks nothing into the scores; the final fit is on all rows.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator

import torch

from influence_fast.errors import ConfigError, NumericError, shown

Damping = float | str  # a share of the mean eigenvalue, or AUTO
RowBlocks = Callable[[], Iterable[torch.Tensor]]  # each call is one pass over the training rows, in pieces [n, k]

AUTO = "auto"
DEFAULT_DAMPING = 0.1
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
FEWEST_ROWS = 10  # below this, two rows or fewer would be held out

# Above this width a dense k x k matrix no longer fits beside the work (8192^2 fp64 is 512 MiB).
MAX_DENSE = 8192

_EVERY = 5


def check_damping(damping: Damping) -> None:
    """Raise ConfigError unless `damping` is a share above 0 or "auto"."""
    if isinstance(damping, str):
        if damping != AUTO:
            raise ConfigError(f"damping must be a number above 0 or {AUTO!r}, not {damping!r}")
    elif not isinstance(damping, numbers.Real) or isinstance(damping, bool) or not 0 < damping < math.inf:
        raise ConfigError(f"damping must be above 0, not {shown(damping)}: it is a share of the mean eigenvalue")


def check_width(name: str, width: int) -> None:
    """Raise ConfigError if a dense block of `width` numbers would be too large."""
    if width > MAX_DENSE:
        raise ConfigError(
            f"a {name} block of {width} numbers is too wide for a dense factorisation (limit {MAX_DENSE}): "
            "use a smaller projection dim or width, or preconditioner 'datainf' or 'cosine'"
        )


def split_rows(name: str, row_blocks: RowBlocks, damping: Damping) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Split one pass into fp64 pieces (rows to fit on [n, k], rows held out [m, k]); a given damping holds none out.

    Raises ConfigError, naming the preconditioner `name`, where there are too few rows.
    """
    count = 0
    for rows in row_blocks():
        wide = rows.to(torch.float64)
        places = torch.arange(count, count + len(wide), device=wide.device)
        count += len(wide)
        if damping != AUTO:
            yield wide, wide[:0]
            continue
        held = places % _EVERY == _EVERY - 1
        yield wide[~held], wide[held]
    if count == 0:
        raise ConfigError(f"preconditioner {name!r} needs at least one training row to be fitted on")
    if damping == AUTO and count < FEWEST_ROWS:
        raise ConfigError(f"damping='auto' needs at least {FEWEST_ROWS} training rows, not {count}; give a number")


def ridge(damping: float, mean_eigenvalue: float) -> float:
    """Return lambda_b of one block; an all-zero block has no scale, and any ridge leaves its scores zero.

    Raises NumericError where the mean is NaN or infinite.
    """
    if not mean_eigenvalue < float("inf"):
        raise NumericError("the training rows hold NaN or infinite numbers; rebuild the store")
    return damping * mean_eigenvalue or 1.0


def best_damping(spectra: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the share of `GRID` under which the held-out rows are likeliest.

    spectra: for each block, its fitted eigenvalues and the mean squares of the held-out rows along them.
    """

    def log_likelihood(damping: float) -> float:
        total = 0.0
        for eigenvalues, held in spectra:
            variance = eigenvalues.clamp(min=0) + ridge(damping, float(eigenvalues.mean()))
            total -= 0.5 * float((variance.log() + held / variance).sum())
        return total

    return max(GRID, key=log_likelihood)
