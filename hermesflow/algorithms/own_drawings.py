"""Reading learned from painting: answers about the model's own drawings, whose labels are the prompts.

A model may paint well what it reads badly. It draws the captions that state such things. It keeps a drawing if it
answers all other questions about it as the caption does, for then the drawing is mostly right in full, and trains the
taught questions with the caption's answers. With q the probability of an answer now, and p what it was before the first
round, a step learns

    L = mean over its visits of the mean over a drawing's questions of -log q + q - 1,
        or over a real image's questions of the sum over choices of p log(p / q) - p + q

which teaches most what is answered least, and keeps answers about real images where they were. No label comes from
outside but the captions that self-play draws from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hermesflow.algorithms.algorithm import Reference
from hermesflow.algorithms.batch import REPLAY, PairBatch, PairVisit
from hermesflow.algorithms.packers import make_packer
from hermesflow.algorithms.pair_dpo import PairDPO
from hermesflow.algorithms.policy import Policy
from hermesflow.algorithms.references import make_reference
from hermesflow.config import Config
from hermesflow.data.pairs import records_table
from hermesflow.data.records import Question, Record
from hermesflow.models.model import Model
from hermesflow.runtime.distributed import gather, rank, world_size
from hermesflow.runtime.files import InputError
from hermesflow.runtime.seeds import candidate_seeds, shuffled_epochs
from hermesflow.scoring.scorers import find_matcher
from hermesflow.scoring.self_answers import check_record, self_vqa

_RECORDS_AT_ONCE = 64


class OwnDrawings(PairDPO):
    """The algorithm: see Algorithm. It is online: it learns from records, of whose captions it draws images. Half of a
    step's visits are of drawings, half of the records' real images."""

    name = "answers about own drawings"
    is_online = True

    def __init__(self, model: Model, records: Sequence[Record], config: Config, seed: int) -> None:
        """
        Args:
            model: draws, judges and is trained.
            records: with codes and questions, and ids of their own.
            config: own_drawings, drawing, curation.answer_scorer, and of train what the replay takes: pairs_per_step
                visits, an even number, and replayed_questions of each.
            seed: of the drawings, which a resumed run makes again, and the order of visits and questions.
        Raises: InputError if no caption states what is asked for, no drawing can be used, or a record has no questions.
        """
        self.config = replace(config.train, replay_target="reference", replay_weight=1.0)
        self._settings, self._types = config, set(config.own_drawings.element_types)
        for record in records:
            check_record(model, record)
        asked = [record for record in records if len(set(map(self._is_taught, record.questions))) == 2]
        if not asked:
            raise InputError(
                f"own_drawings.element_types: no record asks for {', '.join(sorted(self._types))} and for something "
                f"else; name some of the types that questions have: {', '.join(_types_of(records)) or 'none'}"
            )
        share = np.array_split(np.arange(len(asked)), world_size())[rank()]
        mine = list(self._draw(model, [asked[place] for place in share], seed))
        own = [record for of_rank in gather(mine) for record in of_rank]
        if not own:
            raise InputError(
                "own_drawings: the model answers no drawing as its caption does in all other questions; raise "
                "data.num_records or own_drawings.num_images"
            )
        self._num_own, self._num_real = len(own), len(records)
        self.packer = make_packer(model, records_table([*own, *records]), self.config, seed).only(REPLAY)

    @staticmethod
    def check(config: Config) -> None:
        """Raises InputError on settings that do not go together."""
        find_matcher(config.curation)
        if config.model.judge:
            raise InputError("model.judge: with own-drawings the model judges its own drawings; leave it empty")
        if config.train.pairs_per_step % 2:
            raise InputError(
                f"train.pairs_per_step {config.train.pairs_per_step}: half of them are of drawings; give an even number"
            )

    def visits(self, step: int) -> list[PairVisit]:
        """Of a step."""
        half, seed = self.config.pairs_per_step // 2, self.packer.seed
        positions = range(step * half, (step + 1) * half)
        own = shuffled_epochs([seed, 0], self._num_own, positions)
        real = shuffled_epochs([seed, 1], self._num_real, positions)
        return [PairVisit(*place) for place in own] + [PairVisit(self._num_own + item, epoch) for item, epoch in real]

    def reference(self, policy: Policy, steps: Iterable[int], path: Path) -> Reference:
        """Of real images the model before the first round, of drawings the labels."""
        visits = [visit for step in steps for visit in self.visits(step)]
        return _Labelled(make_reference(policy, self.packer, visits, path), self._num_own)

    def _draw(self, model: Model, records: Sequence[Record], seed: int) -> Iterator[Record]:
        """Drawings that may be used, as records with the taught questions. A question's only choice is its answer: the
        other choices are not known to be wrong."""
        sampling, count = model.sampling_of(self._settings.drawing), self._settings.own_drawings.num_images
        match_answers = find_matcher(self._settings.curation)
        for start in range(0, len(records), _RECORDS_AT_ONCE):
            part = records[start : start + _RECORDS_AT_ONCE]
            seeds = torch.from_numpy(candidate_seeds(seed, [record.id for record in part], "own drawing", count))
            prompts = [model.image_prompt(record.caption) for record in part]
            codes = model.engine.generate(prompts, num_images=count, seeds=seeds, sampling=sampling)
            scores = self_vqa(model, codes, part, match_answers)
            for record, of_record, scores_of_record in zip(part, codes.cpu().numpy(), scores, strict=True):
                taught = tuple(filter(self._is_taught, record.questions))
                taught = tuple(replace(question, choices=(question.answer,)) for question in taught)
                for index, (image, score) in enumerate(zip(of_record, scores_of_record, strict=True)):
                    answers = zip(record.questions, score.answers, strict=True)
                    others = [found for question, found in answers if not self._is_taught(question)]
                    if all(found.answer == found.expected for found in others):
                        name = f"{record.id}, own drawing {index}"
                        yield replace(record, id=name, codes=image, questions=taught, balanced_questions=taught)

    def _is_taught(self, question: Question) -> bool:
        return question.element_type in self._types


class _Labelled:
    """A reference that is certain of the answers about drawings: 0 is their log-probability."""

    def __init__(self, reference: Reference, num_own: int) -> None:
        self._reference, self._num_own, self.is_live = reference, num_own, reference.is_live

    def logprobs(self, batch: PairBatch) -> Tensor:
        """fp32 [T]."""
        values = self._reference.logprobs(batch)
        is_real = torch.tensor([visit.pair >= self._num_own for visit in batch.visits_of[REPLAY]], dtype=values.dtype)
        counts = torch.tensor(batch.num_tokens_of[REPLAY])
        return values * is_real.repeat_interleave(counts).to(values.device)


def _types_of(records: Sequence[Record]) -> list[str]:
    return sorted({question.element_type for record in records for question in record.questions} - {""})
