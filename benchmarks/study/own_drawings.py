"""Whether a model can learn to read from what it paints: answers about its own drawings, whose labels are its prompts.

A model may paint what it reads badly. Of its drawings those are kept about which it answers every other question as
their prompts do, which are mostly right in the rest too; the questions that are left are trained on them, beside the
model's own answers to balanced questions about real images, which keep the rest where it was. No label comes from
outside but the captions that self-play draws from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from hermesflow.algorithms.algorithm import Reference
from hermesflow.algorithms.batch import REPLAY, PairBatch, PairVisit
from hermesflow.algorithms.packing import PairPacker
from hermesflow.algorithms.pair_dpo import PairDPO
from hermesflow.algorithms.policy import Policy
from hermesflow.algorithms.references import make_reference
from hermesflow.config import Config
from hermesflow.data.pairs import records_table
from hermesflow.data.records import Question, Record
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError
from hermesflow.runtime.seeds import candidate_seeds, shuffled_epochs
from hermesflow.scoring.self_answers import self_vqa
from hermesflow.worlds.shapes import question_kind

_NUM_IMAGES, _RECORDS_AT_ONCE = 2, 64


class OwnDrawings(PairDPO):
    """An algorithm (selfplay.algorithm), online in that it takes records: half of a step's visits are of own drawings,
    half of the records' real images."""

    name = "answers about own drawings"
    is_online = True

    def __init__(self, model: Model, records: Sequence[Record], config: Config, seed: int) -> None:
        """
        Args:
            model: draws, judges and is trained.
            records: of the built-in world, with codes and questions.
            config: train is used: pairs_per_step visits a step, replayed_questions of each.
            seed: of the drawings, and the order of visits and questions.
        Raises: InputError if no drawing is kept.
        """
        self.config = replace(config.train, replay_target="reference", replay_weight=1.0)
        own = list(_own_drawings(model, records, seed))
        if not own:
            raise InputError("answers about own drawings: no drawing can be used; raise data.num_records")
        self._num_own, self._num_real = len(own), len(records)
        self.packer = PairPacker(model, records_table([*own, *records]), self.config, seed).only(REPLAY)

    @staticmethod
    def check(config: Config) -> None:
        """All settings go together."""

    def visits(self, step: int) -> list[PairVisit]:
        """Of a step."""
        positions, seed = _half_of(step, self.config.pairs_per_step), self.packer.seed
        own = shuffled_epochs([seed, 0], self._num_own, positions)
        real = shuffled_epochs([seed, 1], self._num_real, positions)
        return [PairVisit(*place) for place in own] + [PairVisit(self._num_own + item, epoch) for item, epoch in real]

    def reference(self, policy: Policy, steps: Iterable[int], path: Path) -> Reference:
        """Of real images the model before the first round; of own drawings the labels."""
        visits = [visit for step in steps for visit in self.visits(step)]
        return _Labelled(make_reference(policy, self.packer, visits, path), self._num_own)


class _Labelled:
    """A reference that is certain of the answers about own drawings: 0 is their log-probability.

    The divergence from it, -log q + q - 1 for an answer of probability q, teaches most what is answered least.
    """

    def __init__(self, reference: Reference, num_own: int) -> None:
        self._reference, self._num_own, self.is_live = reference, num_own, reference.is_live

    def logprobs(self, batch: PairBatch) -> Tensor:
        """fp32 [T]."""
        is_real = [visit.pair >= self._num_own for visit in batch.visits_of[REPLAY]]
        values = self._reference.logprobs(batch)
        counts = torch.tensor(batch.num_tokens_of[REPLAY])
        return values * torch.tensor(is_real, dtype=values.dtype).repeat_interleave(counts).to(values.device)


def _own_drawings(model: Model, records: Sequence[Record], seed: int) -> Iterator[Record]:
    """Drawings of captions that state a relation, with the questions about it, where the model answers every other
    question as the caption does. A question's only choice is its answer: the rest is not known to be wrong."""
    asked = [record for record in records if any(map(_is_hard, record.questions))]
    for start in range(0, len(asked), _RECORDS_AT_ONCE):
        part = asked[start : start + _RECORDS_AT_ONCE]
        seeds = candidate_seeds(seed, [record.id for record in part], "own drawing", _NUM_IMAGES)
        prompts = [model.image_prompt(record.caption) for record in part]
        sampling = asdict(model.sampling)
        codes = model.engine.generate(prompts, num_images=_NUM_IMAGES, seeds=torch.from_numpy(seeds), **sampling)
        for record, of_record, scores in zip(part, codes, self_vqa(model, codes, part), strict=True):
            hard = tuple(
                replace(question, choices=(question.answer,)) for question in record.questions if _is_hard(question)
            )
            for index, (image, score) in enumerate(zip(of_record.cpu().numpy(), scores, strict=True)):
                pairs = zip(record.questions, score.answers, strict=True)
                if all(found.answer == found.expected for question, found in pairs if not _is_hard(question)):
                    name = f"{record.id}, own drawing {index}"
                    yield replace(record, id=name, codes=image, questions=hard, balanced_questions=hard)


def _is_hard(question: Question) -> bool:
    return question_kind(question) == "relation"


def _half_of(step: int, count: int) -> range:
    half = max(count // 2, 1)
    return range(step * half, (step + 1) * half)
