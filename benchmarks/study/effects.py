"""What an arm changes and how arms differ, with intervals over both seeds and records.

Every arm is measured on the same records and with the same draws, so that what two arms share falls out of their
difference. Records are many: they are drawn with replacement, alike for all arms (the bootstrap; Efron and Tibshirani,
1993). Seeds are few, and the bootstrap of five values is too narrow: how the mean of a difference over seeds strays
follows Student's t with the seeds' own spread. An interval is of the sum of both; it errs on the wide side, since the
luck of a seed with single records counts in either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hermesflow.benchmarks.lines import Line
from hermesflow.benchmarks.study.arms import ARMS
from hermesflow.benchmarks.study.runner import BASE, PAIR_DPO, SELF_PLAY
from hermesflow.evaluation.stats import percentile_interval
from hermesflow.runtime.files import InputError

HEADLINE = ("understanding", "generation", "generation_strict", "gap")
"""As hermesflow.evaluation.builtin has them: fractions of sums over records; gap is understanding less generation."""
NUM_RESAMPLES = 4000
SEED = 20250218

Change = dict[str, Any]


class Effects:
    """Metrics of a study's arms over the seeds that all of them have been run with."""

    def __init__(self, lines: Sequence[Line]) -> None:
        """
        Args:
            lines: of run_study.
        Raises: InputError if no seed is complete.
        """
        seeds = {arm: {line["seed"] for line in lines if line["arm"] == arm} for arm in ARMS}
        self.arms = [arm for arm in ARMS if seeds[arm]]
        """Those that were run."""
        self.self_play = [arm for arm in SELF_PLAY if arm in self.arms]
        """Of those the ones that the others are held against."""
        self.seeds = sorted(set.intersection(*(seeds[arm] for arm in self.arms))) if self.arms else []
        if PAIR_DPO not in self.arms or not self.seeds:
            raise InputError(
                "study: no seed of study.seeds has been run with all of its arms yet; let hermesflow study finish"
            )
        right = {(line["arm"], line["seed"]): line["right"] for line in lines}
        asked = next(line["asked"] for line in lines if line["arm"] == BASE)
        asked = {name: counts for name, counts in asked.items() if any(counts)}
        of_base = {name: np.array(counts) for name, counts in asked.items()}
        self.num_understanding, self.num_prompts = (
            int((of_base[name] > 0).sum()) for name in ("understanding", "generation_strict")
        )
        self.num_images = int(of_base["generation_strict"].sum())
        self.metrics = [*HEADLINE, *(name for name in asked if name not in HEADLINE)]
        """All that was measured, the headline first."""
        rng = np.random.default_rng(SEED)
        weights = _weights(rng, len(of_base["understanding"]))
        self._ratios = {
            arm: _ratios([right[arm, seed] for seed in self.seeds], asked, weights) for arm in self.arms
        } | {BASE: _ratios([right[BASE, None]], asked, weights)}
        """Metrics [1 + NUM_RESAMPLES, seeds] by arm; the first row is of each record once."""
        self._t = rng.standard_t(max(len(self.seeds) - 1, 1), NUM_RESAMPLES)

    def value(self, arm: str, metric: str) -> float:
        """A metric of an arm, the mean over its seeds, or of "base", the model before self-play."""
        return float(self._ratios[arm][metric][0].mean())

    def change(self, arm: str, metric: str) -> Change:
        """What an arm has more than the model before self-play."""
        return self.difference(arm, BASE, metric)

    def difference(self, arm: str, other: str, metric: str) -> Change:
        """What an arm has more than another: {"change", "ci95", "significant"}, as paired_change has it."""
        return _change(self._over_seeds(self._ratios[arm][metric] - self._ratios[other][metric]))

    def seed_changes(self, arm: str, metric: str) -> list[Change]:
        """change for each of self.seeds by itself: its interval is over records alone."""
        return [_change(of_seed) for of_seed in (self._ratios[arm][metric] - self._ratios[BASE][metric]).T]

    def closed_gap(self, arm: str) -> Change | None:
        """The part of the gap that an arm closes, as a change: 1 is all of it; None where there is no gap to close."""
        before = self._ratios[BASE]["gap"]
        if before.min() <= 0:
            return None
        closed = self._over_seeds(before - self._ratios[arm]["gap"])
        return _change(closed / before[:, 0])

    def _over_seeds(self, samples: np.ndarray) -> np.ndarray:
        """The mean [1 + NUM_RESAMPLES] of [1 + NUM_RESAMPLES, seeds], strayed by what other seeds would give.

        A single seed says nothing of others: its interval is over records alone.
        """
        means, num_seeds = samples.mean(axis=1), samples.shape[1]
        if num_seeds > 1:
            means[1:] += self._t * samples[0].std(ddof=1) / np.sqrt(num_seeds)
        return means


def _change(samples: np.ndarray) -> Change:
    """What a difference is, of its value and resamples [1 + NUM_RESAMPLES]."""
    low, high = percentile_interval(samples[1:])
    return {"change": float(samples[0]), "ci95": [low, high], "significant": not low <= 0 <= high}


def _weights(rng: np.random.Generator, number: int) -> np.ndarray:
    """How often each of so many is drawn: float64 [1 + NUM_RESAMPLES, number], in the first row once."""
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=NUM_RESAMPLES)
    return np.concatenate([np.ones((1, number)), drawn])


def _ratios(
    right: Sequence[dict[str, list[int]]], asked: dict[str, list[int]], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Each metric float64 [B, seeds] of what was right by seed, the records weighted [B, records]."""
    ratios = {}
    for name, of_name in asked.items():
        found = np.array([of_seed[name] for of_seed in right], dtype=np.float64)
        ratios[name] = weights @ found.T / (weights @ np.array(of_name, dtype=np.float64))[:, None]
    return ratios | {"gap": ratios["understanding"] - ratios["generation"]}
