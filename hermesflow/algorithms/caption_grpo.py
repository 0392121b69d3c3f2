"""GRPO on captions, for models that fill text from masks; the loss and the settings are those of grpo.py.

At each rollout the policy writes a group of captions of each record's image, at temperature 1 from all text ids, which
are rewarded by how well they agree with the record's own (curation.caption_scorer). What is learned is a caption up to
its end, by grpo.likelihood:

    kept      the tokens that each decoding step kept, in the state in which it kept them: the decoder's own law
    masked    its tokens under random masks, behind the image and the question, the region filled as in training:
              UniGRPO's estimate (arXiv 2505.15809)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hermesflow.algorithms.batch import REPLAY
from hermesflow.algorithms.grpo import GRPO, Group, GRPOBatch, check_rollouts, visit_of
from hermesflow.algorithms.packers import make_packer
from hermesflow.algorithms.packing import TreeBuilder
from hermesflow.config import Config
from hermesflow.data.pairs import records_table
from hermesflow.data.records import Record
from hermesflow.engine.answer_sampler import SamplingParams
from hermesflow.engine.decoders.masked_text import text_bias
from hermesflow.engine.rollout_logprob import DrawnCodes
from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.span_tree import SpanForest
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError
from hermesflow.runtime.seeds import candidate_seeds
from hermesflow.scoring.scorers import Scorers, check_scorers


class CaptionBatch(GRPOBatch):
    """One pass: the states of captions and the replay in one tree; codes are text ids."""

    def logprobs(self, transformer: Transformer) -> Tensor:
        """Log-probabilities fp32 of the captions' tokens [T] among text ids, and of the replay's targets after them."""
        hidden = transformer(self.tree, embeds=self.replay.embeds, rows=self.rows)
        written, hidden = hidden.tensor_split([len(self.codes.targets)])
        head, bias = transformer.head, text_bias(self.layout, hidden.device).to(hidden.dtype)
        bias = bias if head.bias is None else head.bias + bias
        logprob = linear_logprob(written, head.weight, self.codes.targets, bias=bias)
        if not self.replay.sides:
            return logprob
        return torch.cat([logprob, linear_logprob(hidden, head.weight, self.replay.targets, bias=head.bias)])


class CaptionGRPO(GRPO):
    """The algorithm: see Algorithm. A group is of one image: its codes [G, L] are the regions' token ids, masks where
    nothing was kept (kept_at -1)."""

    name = "GRPO on captions"
    _batch = CaptionBatch

    def __init__(self, model: Model, records: Sequence[Record], config: Config, seed: int) -> None:
        """
        Args:
            model: writes and is trained.
            records: with codes, and ids of their own.
            config: grpo, of whose settings num_images are captions, train, and curation.caption_scorer.
            seed: of records, captions, the steps that are trained, and the replay.
        Raises: InputError on records without an image, or a model that does not fill text from masks.
        """
        self.model, self.records, self.config, self.seed = model, records, config, seed
        self.check_model(model, config)
        for record in records:
            if record.codes is None:
                raise InputError(f"record {record.id}: has no image codes; encode its image with the model's tokenizer")
        self._question, self._num_codes = model.caption_prompt(), model.prompts.max_caption_tokens
        self._params_of_text = SamplingParams(temperature=1.0, max_new_tokens=self._num_codes)
        self.packer = make_packer(model, records_table(records), config.train, seed).only(REPLAY)
        self._scorers = Scorers(config.curation)
        self._groups: tuple[int, list[Group]] = (-1, [])
        self._old: dict[tuple[int, ...], Tensor] = {}

    @staticmethod
    def check_model(model: Model, config: Config) -> None:
        """Raises InputError on a model that does not fill text from masks."""
        if not model.layout.is_bidirectional:
            raise InputError(
                "selfplay.algorithm caption-grpo: the model does not fill text from masks; take pair-dpo, or a model "
                "such as mmada"
            )

    @staticmethod
    def check(config: Config) -> None:
        """Raises InputError on settings that do not go together."""
        if config.model.judge:
            raise InputError("model.judge: caption-grpo compares captions with those of the records; leave it empty")
        if config.grpo.likelihood == "drawn":
            raise InputError("grpo.likelihood drawn: is for images; take kept or masked")
        check_scorers(config.curation)
        check_rollouts(config)

    def _draw_share(self, numbers: Sequence[int], rollout: int) -> list[Group]:
        model, size = self.model, self.config.grpo.num_images
        records = [self.records[number] for number in numbers]
        if not records:
            return []
        seeds = candidate_seeds(self.seed, [record.id for record in records], f"caption rollout {rollout}", size)
        drawn = model.engine.rollout_text(
            torch.from_numpy(np.stack([record.codes for record in records])).long(),
            [[self._question]] * len(records),
            sampling=[self._params_of_text] * size,
            seeds=torch.from_numpy(seeds[:, None]),
        )
        texts = [[self._text_of(caption.ids) for caption in captions] for (captions,) in drawn]
        rewards = self._scorers.score_captions(texts, [record.caption for record in records])
        groups = []
        for number, (captions,), of_group in zip(numbers, drawn, rewards, strict=True):
            arrays = (np.stack([getattr(each, name) for each in captions]) for name in ("ids", "kept_at", "logprob"))
            steps = np.zeros((size, 0, self._num_codes), dtype=np.int32)
            groups.append(Group(number, rollout, *arrays, steps, np.array(of_group, dtype=np.float64), np.zeros(size)))
        return groups

    def _text_of(self, region: np.ndarray) -> str:
        ids = region[: self._length_of(region)].tolist()
        return self.model.decode_text(ids[:-1] if ids[-1] == self.model.layout.eot else ids)

    def _length_of(self, region: np.ndarray) -> int:
        """Tokens of a caption with its end; a region that has none is a caption as far as it is filled."""
        ends = np.flatnonzero(region == self.model.layout.eot)
        return int(ends[0]) + 1 if len(ends) else int((region != self.model.layout.mask_id).sum())

    def _num_tokens(self, group: Group) -> int:
        span = len(self._asked(group)) + self._num_codes + len(self.model.layout.after_answer)
        return self._num_states(group) * len(group.used) * span + self.packer.num_tokens(visit_of(group))

    def _asked(self, group: Group) -> list[int]:
        return self.model.layout.asked(self.records[group.record].codes.tolist(), self._question)

    def _add_drawn(
        self, builder: TreeBuilder, groups: Sequence[Group], drawn: Sequence[tuple[Group, int]]
    ) -> tuple[DrawnCodes, list[float], Any, SpanForest | None]:
        states = _TextStates(self.model.layout.mask_id, self.model.layout.after_answer, builder)
        for group in [each for each in groups if not each.used]:  # so that no tree is empty
            builder.add(self._asked(group), -1, "full")
        weights = [self._add_caption(states, owner, *of) for owner, of in enumerate(drawn)]
        return states.drawn(), weights, self._params_of_text, None

    def _add_caption(self, states: _TextStates, owner: int, group: Group, number: int) -> float:
        """Adds a caption's states, or masks; returns what each weighs, so that they stand for all."""
        asked, region, kept_at = self._asked(group), group.codes[number], group.kept_at[number]
        length = self._length_of(region)
        if self._is_masked:
            filled = np.append(region[:length], np.full(len(region) - length, self.model.layout.filler))
            hidden_at = self._masks(group, number, length)
            for mask, hidden in enumerate(hidden_at):
                states.add(asked, filled, hidden, hidden, owner, mask)
            return length / sum(map(len, hidden_at))
        steps = np.unique(kept_at[:length])
        rng = np.random.default_rng([self.seed, 5, group.rollout, group.record, number])
        chosen = rng.permutation(steps)[: self.config.grpo.trained_steps or len(steps)]
        for step in np.sort(chosen).tolist():
            hidden = np.flatnonzero((kept_at >= step) | (kept_at < 0))
            states.add(asked, region, hidden, np.flatnonzero(kept_at[:length] == step), owner, step)
        return len(steps) / len(chosen)


class _TextStates:
    """Gathers sequences in which part of a region is hidden, equal ones once, and the tokens that they predict."""

    def __init__(self, mask_id: int, after: Sequence[int], builder: TreeBuilder) -> None:
        self._mask_id, self._after, self._builder = mask_id, after, builder
        self._first_rows: dict[tuple[int, ...], int] = {}
        self._found: list[tuple[np.ndarray, ...]] = []

    def add(
        self, asked: Sequence[int], region: np.ndarray, hidden: np.ndarray, chosen: np.ndarray, owner: int, step: int
    ) -> None:
        """A region behind what is asked, masks at hidden, of which the tokens at chosen are predicted."""
        state = region.copy()
        state[hidden] = self._mask_id
        ids = (*asked, *state.tolist(), *self._after)
        if ids not in self._first_rows:
            self._first_rows[ids] = self._builder.packed + len(asked)
            self._builder.add(ids, -1, "full")
        owners, steps = (np.full(len(chosen), value) for value in (owner, step))
        self._found.append((self._first_rows[ids] + chosen, chosen[:0], region[chosen], owners, chosen, steps))

    def drawn(self) -> DrawnCodes:
        """What was added, on the host."""
        columns = zip(*self._found, strict=True) if self._found else [[np.zeros(0)]] * len(DrawnCodes._fields)
        return DrawnCodes(*(torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in columns))
