"""The positive control: supervised training on the right answers to questions about real images, which come from
outside the model. A study in which this arm shows nothing could show nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from hermesflow.algorithms.algorithm import Reference
from hermesflow.algorithms.batch import REPLAY
from hermesflow.algorithms.packers import make_packer
from hermesflow.algorithms.pair_dpo import PairDPO
from hermesflow.algorithms.policy import Policy
from hermesflow.algorithms.references import NoReference
from hermesflow.config import Config
from hermesflow.data.pairs import records_table
from hermesflow.data.records import Record
from hermesflow.models.model import Model


class RightAnswers(PairDPO):
    """An algorithm (selfplay.algorithm), online in that it takes records: the replay of Pair-DPO alone, with the right
    answers."""

    name = "right answers"
    is_online = True

    def __init__(self, model: Model, records: Sequence[Record], config: Config, seed: int) -> None:
        """
        Args:
            model: see Algorithm.
            records: with codes and questions.
            config: train is used: pairs_per_step records a step, replayed_questions of each.
            seed: of the order of records and questions.
        """
        self.config = replace(config.train, replay_target="answers", replay_weight=1.0)
        self.packer = make_packer(model, records_table(records), self.config, seed).only(REPLAY)

    @staticmethod
    def check(config: Config) -> None:
        """All settings go together."""

    def reference(self, policy: Policy, steps: Iterable[int | None], path: Path) -> Reference:
        """None is needed."""
        return NoReference()
