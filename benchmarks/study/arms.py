"""The arms of a study: self-play as it is, and controls that each change one thing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from hermesflow.config import Config, RunConfig

_SCORERS = "hermesflow.benchmarks.study.scorers"


class Arm(NamedTuple):
    """A way to train."""

    description: str
    """What it is, in a sentence."""
    settings: dict[str, dict[str, Any]] = {}
    """Section -> key -> the value that differs from the study's settings."""
    same_pairs: bool = False
    """Whether it trains on pair-dpo's pairs in every round, rather than on those of its own model."""
    after: str = ""
    """The arm whose model it starts from; empty: the model of the study."""
    mean_of: tuple[str, ...] = ()
    """The arms whose models' weights it takes the mean of, without training of its own."""
    best_of: int = 0
    """Draw so many images for each one and let the model itself choose, without training; 0 trains."""


_GRPO = Arm(
    "Self-play by GRPO: images that the model draws and judges as it learns, in one round as long as three.",
    {
        "selfplay": {"algorithm": "grpo", "num_rounds": 1},
        "data": {"num_records": 1536},
        "train": {"num_steps": 144, "lr": 5e-5, "replay_weight": 2.0},
    },
)
_OWN_DRAWINGS = Arm(
    "Training on answers about the model's own drawings, whose labels are the prompts: reading learned from painting.",
    {
        "selfplay": {"algorithm": "own-drawings", "num_rounds": 1},
        "data": {"num_records": 4096},
        "train": {"num_steps": 120, "pairs_per_step": 128, "lr": 3e-5},
    },
)

ARMS = {
    "pair-dpo": Arm("Self-play as it is: Pair-DPO on pairs that the model itself chose."),
    "grpo": _GRPO,
    "no-op": Arm(
        "All steps on pair-dpo's pairs, whose loss counts zero times: what is left to follow is the replay's rounding.",
        {"train": {"preference_weight": 0.0, "nll_weight": 0.0}},
        same_pairs=True,
    ),
    "random-pairs": Arm(
        "Pair-DPO where chance alone scores images and captions: training as much, with nothing preferred.",
        {"curation": {"score": f"{_SCORERS}:random_images", "caption_scorer": f"{_SCORERS}:random_captions"}},
    ),
    "sft-best": Arm(
        "Supervised training on the wins, without the loses.",
        {"train": {"preference_weight": 0.0, "nll_weight": 1.0}},
    ),
    "distill": Arm(
        "Supervised training on images of the default sampler, and on captions, that chance chooses: a better sampler "
        "without a judge.",
        {
            "curation": {
                "score": f"{_SCORERS}:random_images",
                "caption_scorer": f"{_SCORERS}:random_captions",
                "temperature": -1.0,
                "threshold": 0.0,
                "margin": 0.0,
            },
            "train": {"preference_weight": 0.0, "nll_weight": 1.0},
        },
    ),
    "best-of-4": Arm(
        "No training: of four images the model's own score chooses one, at four times the cost.", best_of=4
    ),
    "generation-only": Arm("The image side of each pair alone.", {"train": {"understanding_weight": 0.0}}),
    "understanding-only": Arm(
        "The caption side of each pair alone, with the weight of the paper.",
        {"train": {"generation_weight": 0.0, "understanding_weight": 1.0}},
    ),
    "oracle-pairs": Arm(
        "Pair-DPO where the oracle scores the images: as well as any score could do.",
        {"curation": {"score": f"{_SCORERS}:oracle_images"}},
    ),
    "positive-control": Arm(
        "Supervised training on right answers about real images, which come from outside: understanding must rise.",
        {
            "selfplay": {"algorithm": "hermesflow.benchmarks.study.control:RightAnswers"},
            "data": {"num_records": 4096},
            "train": {"num_steps": 100, "pairs_per_step": 96, "replayed_questions": 12, "lr": 6e-5},
        },
    ),
    "own-drawings": _OWN_DRAWINGS,
    "grpo+own-drawings": _OWN_DRAWINGS._replace(
        description="GRPO, and then training on answers about the drawings of the model that came out.", after="grpo"
    ),
    "pair-dpo+grpo": _GRPO._replace(
        description="Pair-DPO, and then GRPO on the model that came out.", after="pair-dpo"
    ),
    "merged": Arm(
        "The mean of the weights that pair-dpo+grpo, counted twice, and grpo+own-drawings end with.",
        mean_of=("pair-dpo+grpo", "pair-dpo+grpo", "grpo+own-drawings"),
    ),
}
"""Arms by the names of hermesflow.config.STUDY_ARMS."""


def comes_from(arm: str) -> tuple[str, ...]:
    """The arms whose models an arm begins with."""
    return (ARMS[arm].after,) if ARMS[arm].after else ARMS[arm].mean_of


def arm_config(config: Config, arm: str, seed: int) -> Config:
    """The settings of one arm's run, which lies in the study's folder.

    Args:
        config: the study's settings.
        arm: a name in ARMS.
        seed: of the run.
    """
    changed = {section: replace(getattr(config, section), **keys) for section, keys in ARMS[arm].settings.items()}
    run = RunConfig(folder=str(config.run_folder), name=f"{arm}-seed-{seed}", seed=seed)
    return replace(config, run=run, **changed)
