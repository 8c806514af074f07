"""95 % intervals of shares and of means, and the quantiles that they need."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share (Wilson, JASA 1927), valid at 0 and 1 and for small n."""
    z, share = Z95, correct / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # rounding must not leave the share itself outside, as it can at 0 and 1
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))


def bootstrap_interval(values: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean, resampling `values` (one a question, 0 to 1) `draws` times.

    Where all are 0, or all 1, resampling shows no spread, and Wilson's interval of one answer a question is returned.
    """
    if all(value == values[0] for value in values) and values[0] in (0.0, 1.0):
        return wilson_interval(round(sum(values)), len(values))
    rng = np.random.default_rng(seed)
    data = np.asarray(values, dtype=np.float64)
    means = np.array([data[rng.integers(0, len(data), len(data))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


# Two-sided 97.5 % quantiles of Student's t for 1..9 degrees of freedom, where the expansion below is too coarse.
_T975 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t; above nine degrees by the Cornish-Fisher expansion (error < 5e-5)."""
    if degrees < 1:
        return math.nan
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z, n = Z95, float(degrees)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / n + second / n**2 + third / n**3 + fourth / n**4
