"""Statistics of measurements: bootstrap intervals of ratios over records, rank correlation, area under the ROC curve.

Records are resampled whole, since the questions of one record and the images of one prompt are not independent
(cluster bootstrap; Davison and Hinkley, Bootstrap Methods, 1997, section 3.8). The resamples depend on the number of
records alone: two measurements of the same records are resampled alike, so that their difference is a paired one.
"""

from __future__ import annotations

import numpy as np

NUM_RESAMPLES = 2000
SEED = 20250218
_BLOCK = 100


def resample_ratios(numerators: np.ndarray, denominators: np.ndarray, num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """Ratios of sums over records drawn with replacement.

    Args:
        numerators: [n, m], a row for each record; for instance the questions answered rightly.
        denominators: [n, m]; for instance the questions asked, 0 where the record was not measured.
        num_resamples: how often the n records are drawn.
    Returns: float64 [num_resamples, m]; NaN where the drawn records hold nothing to divide by.
    Raises: ValueError without records, or if the shapes differ.
    """
    if numerators.shape != denominators.shape or numerators.ndim != 2 or not len(numerators):
        raise ValueError(
            "resample_ratios: expected numerators and denominators [n, m] with n > 0, got "
            f"{list(numerators.shape)} and {list(denominators.shape)}; give both a row for each record"
        )
    n, rng = len(numerators), np.random.default_rng(SEED)
    ratios = []
    for start in range(0, num_resamples, _BLOCK):
        times_drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(_BLOCK, num_resamples - start)).astype(np.float64)
        with np.errstate(invalid="ignore"):
            ratios.append((times_drawn @ numerators) / (times_drawn @ denominators))
    return np.concatenate(ratios)


def percentile_interval(samples: np.ndarray) -> list[float] | None:
    """The central 95 % of resampled values.

    Args:
        samples: float64 [num_resamples]; NaN is left out.
    Returns: [low, high], rounded to 1e-9 since matrix products may add in another order from run to run; None if every
        value is NaN.
    """
    samples = samples[~np.isnan(samples)]
    return np.percentile(samples, (2.5, 97.5)).round(9).tolist() if len(samples) else None


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean.

    Args:
        values: [n].
    Returns: float64 [n].
    """
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rank correlation.

    Args:
        x: [n].
        y: [n].
    Returns: a value in [-1, 1], or None if either is constant or there is nothing.
    """
    if not len(x):
        return None
    ranks = np.stack([average_ranks(np.asarray(x)), average_ranks(np.asarray(y))])
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((ranks**2).sum(axis=1))
    return float(ranks[0] @ ranks[1] / spread.prod()) if spread.all() else None


def roc_auc(score: np.ndarray, right: np.ndarray) -> float | None:
    """How often something right scores above something wrong, a tie counting half.

    Args:
        score: [n].
        right: bool [n].
    Returns: the area under the ROC curve, or None without both kinds.
    """
    right = np.asarray(right, dtype=bool)
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    if not num_right or not num_wrong:
        return None
    above = average_ranks(np.asarray(score))[right].sum() - num_right * (num_right + 1) / 2
    return float(above / (num_right * num_wrong))
