"""What an arm changes and how arms differ, with intervals over both seeds and records.

Every arm is measured on the same records and with the same seeds. So records and seeds are drawn with replacement,
independently of one another and alike for all arms: what two arms share falls out of their difference (the pigeonhole
bootstrap for crossed factors; Owen, Annals of Applied Statistics 1(2), 2007, whose intervals err on the wide side).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hermesflow.files import InputError
from hermesflow.stats import percentile_interval

from ..lines import Line
from .arms import ARMS
from .runner import BASE, COUNTS

METRICS = ("understanding", "generation", "generation_strict", "gap")
"""As hermesflow.evaluation has them: fractions of sums over records; gap is understanding less generation."""
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
        self.seeds = sorted(set.intersection(*(seeds[arm] for arm in self.arms))) if self.arms else []
        if not self.seeds:
            raise InputError("study: no seed has been run with all of its arms yet; let hermesflow study go on")
        counts = {(line["arm"], line["seed"]): [line[name] for name in COUNTS] for line in lines}
        base = np.array([counts[BASE, None]] * len(self.seeds))
        self.rounds = max(line["rounds"] for line in lines)
        of_base = dict(zip(COUNTS, base[0], strict=True))
        self.num_understanding, self.num_prompts = (int((of_base[name] > 0).sum()) for name in ("asked", "images"))
        self.num_images = int(of_base["images"].sum())
        rng = np.random.default_rng(SEED)
        # The first row is the whole, each seed and record once; it gives the values.
        record_weights, seed_weights = (_weights(rng, number) for number in (base.shape[2], base.shape[0]))
        self._samples = {
            arm: _ratios(np.array([counts[arm, seed] for seed in self.seeds]), seed_weights, record_weights)
            for arm in self.arms
        }
        self._samples[BASE] = _ratios(base, seed_weights, record_weights)
        alone = np.ones((len(record_weights), 1))
        self._of_seeds = {
            arm: [_ratios(np.array([counts[arm, seed]]), alone, record_weights) for seed in self.seeds]
            for arm in self.arms
        }

    def value(self, arm: str, metric: str) -> float:
        """A metric of an arm, or of "base", the model before self-play."""
        return float(self._samples[arm][metric][0])

    def change(self, arm: str, metric: str) -> Change:
        """What an arm has more than the model before self-play."""
        return self.difference(arm, BASE, metric)

    def difference(self, arm: str, other: str, metric: str) -> Change:
        """What an arm has more than another: {"change", "ci95", "significant"}, as paired_change has it."""
        return _change(self._samples[arm][metric] - self._samples[other][metric])

    def seed_changes(self, arm: str, metric: str) -> list[Change]:
        """change for each of self.seeds by itself: its interval is over records alone."""
        return [_change(samples[metric] - self._samples[BASE][metric]) for samples in self._of_seeds[arm]]


def _change(samples: np.ndarray) -> Change:
    """What a difference is, of its value and resamples [1 + NUM_RESAMPLES]."""
    low, high = percentile_interval(samples[1:])
    return {"change": float(samples[0]), "ci95": [low, high], "significant": not low <= 0 <= high}


def _weights(rng: np.random.Generator, number: int) -> np.ndarray:
    """How often each of so many is drawn: float64 [1 + NUM_RESAMPLES, number], in the first row once."""
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=NUM_RESAMPLES)
    return np.concatenate([np.ones((1, number)), drawn])


def _ratios(counts: np.ndarray, seed_weights: np.ndarray, record_weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric by resample, float64 [B], of counts [seeds, COUNTS, records]; B, seeds and records as weighted."""
    of_seeds = np.einsum("br,scr->bsc", record_weights, counts, optimize=True)
    understood, asked, right, questions, strict, images = np.einsum("bs,bsc->cb", seed_weights, of_seeds)
    ratios = {
        "understanding": understood / asked,
        "generation": right / questions,
        "generation_strict": strict / images,
    }
    return ratios | {"gap": ratios["understanding"] - ratios["generation"]}
