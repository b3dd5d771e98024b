"""Is a difference real? Paired bootstrap over rows, Holm's correction, rank correlation. Pure functions on arrays.

Rows are resampled within their task, and every cell is judged on the same resampled rows, so what is hard for all
methods cancels in a difference. It covers the choice of rows; how far another seed falls is for the spread to say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator

NUM_RESAMPLES = 5_000
LEVEL = 0.05
FEW = 20  # resamples beyond zero that make a tail's share worth believing


def bootstrap_means(values: ndarray, *, tasks: ndarray, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> ndarray:
    """Resampled means over tasks of the means over their rows.

    values: (rows, cells); tasks: (rows,) task numbers; returns (resamples, cells).
    """
    import numpy as np

    random = np.random.default_rng(seed)
    found = np.zeros((num_resamples, values.shape[1]))
    names = np.unique(tasks)
    for task in names:
        rows = values[tasks == task]
        for start in range(0, num_resamples, 500):  # 500 x 2000 counts are 8 MB
            resamples = found[start : start + 500]
            resamples += _draw(random, num_rows=len(rows), num_resamples=len(resamples)) @ rows / len(rows)
    return found / len(names)


def _draw(random: Generator, *, num_rows: int, num_resamples: int) -> ndarray:
    """How often each row is drawn: (resamples, rows). Ten times as fast as a multinomial."""
    import numpy as np

    drawn = random.integers(num_rows, size=(num_resamples, num_rows))
    drawn += np.arange(num_resamples)[:, None] * num_rows
    return np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)


def interval(resampled: ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled numbers (percentile bootstrap)."""
    import numpy as np

    low, high = np.quantile(resampled, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def p_value(differences: ndarray, *, observed: float) -> float:
    """Two-sided p-value that a difference is zero, from its resampled values.

    The share of resamples on zero's other side, doubled; where too few lie there to count, the normal tail of the
    resampled spread, since five thousand resamples cannot tell 1e-3 from 1e-9, and a correction for many pairs must.
    """
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    by_count = min(1.0, 2 * (float(beyond) + 1) / (len(differences) + 1))
    spread = float(differences.std())
    if beyond >= FEW or (spread == 0 and observed == 0):
        return by_count
    return min(by_count, math.erfc(abs(observed) / spread / math.sqrt(2))) if spread else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's, equal values sharing their mean rank; None for fewer than three pairs or a side of equal values."""
    import numpy as np

    if len(left) < 3 or len(set(left)) == 1 or len(set(right)) == 1:
        return None
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]
