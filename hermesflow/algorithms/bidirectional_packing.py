"""Passes of preference training for bidirectional models (Layout.is_bidirectional).

Nothing can be shared: each mask of win or of lose is a sequence of its own, with its prompt or with the image and the
question. Captions are masked too, as LLaDA (arXiv 2502.09992) trains them: win and lose fill regions of one length with
their tokens, eot and the family's filler, of which each mask hides the same places. All answers to a question of the
replay are scored in one sequence, whose region is masked as a whole, as the engine scores choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hermesflow.algorithms.batch import REPLAY, PairVisit
from hermesflow.algorithms.packing import PairPacker, TreeBuilder, draw_masks, mask_share


class BidirectionalPacker(PairPacker):
    """See PairPacker; captions have other masks at every visit too."""

    constant_sides = ()

    def fingerprint(self) -> str:
        """See PairPacker."""
        return f"{super().fingerprint()}-by-visit"

    def num_tokens(self, visit: PairVisit) -> int:
        """Packed tokens of a visit."""
        sides, layout, config = self._sides_of(visit.pair), self.model.layout, self.config
        total = 0
        if "generation" in sides:
            total += 2 * config.masks_per_pair * (len(self._prompt_of(visit)) + layout.image_length)
        if "understanding" in sides:
            asked = self._asked(visit, self.question_ids)
            total += 2 * config.masks_per_pair * (len(asked) + len(self._regions(visit.pair)[0]))
        if REPLAY in sides:
            behind = len(layout.after_answer)
            total += sum(len(asked) + size + behind for asked, size in self._replayed_regions(visit))
        return total

    def _add_images(self, builder: TreeBuilder, index: int, visit: PairVisit) -> None:
        prompt, layout = self._prompt_of(visit), self.model.layout
        images = [self._tokens[name][visit.pair] for name in ("win_codes", "lose_codes")]
        sequences = [[*prompt, *layout.image(codes)] for codes in images]
        rng = np.random.default_rng([self.seed, 1, *visit])
        seen = (
            np.setdiff1d(np.arange(layout.image_length), layout.code_positions) if self.config.boundary_labels else ()
        )
        masks = draw_masks(len(layout.code_positions), self.config, rng)
        hidden = [(len(prompt) + layout.code_positions[places], share) for places, share in masks]
        self._add_masked(builder, "generation", index, sequences, hidden, [len(prompt) + place for place in seen])

    def _add_asked(self, builder: TreeBuilder, index: int, visit: PairVisit, sides: list[str]) -> None:
        if "understanding" in sides:
            asked, regions = self._asked(visit, self.question_ids), self._regions(visit.pair)
            rng = np.random.default_rng([self.seed, 5, *visit])
            masks = draw_masks(len(regions[0]), self.config, rng, "linear")
            hidden = [(len(asked) + places, share) for places, share in masks]
            self._add_masked(builder, "understanding", index, [[*asked, *region] for region in regions], hidden)
        if REPLAY in sides:
            self._add_answers(builder, index, visit, -1)

    def _add_masked(
        self,
        builder: TreeBuilder,
        side: str,
        index: int,
        sequences: list[list[int]],
        masks: Sequence[tuple[np.ndarray, float]],
        seen: Sequence[int] = (),
    ) -> None:
        """Each mask hides the same places of win and lose, whose own rows predict what is there; those of places that
        are seen do so too."""
        for hidden, share in masks:
            rows = np.append(hidden, np.array(seen, dtype=np.int64))
            weights = np.append(np.full(len(hidden), share), np.full(len(seen), mask_share(self.config)))
            for lose, ids in enumerate(map(np.array, sequences)):
                builder.predict(side, index, 2 * index + lose, builder.packed + rows, ids[rows], weights)
                ids[hidden] = self.model.layout.mask_id
                builder.add(ids, -1, "full")

    def _add_answers(self, builder: TreeBuilder, index: int, visit: PairVisit, image: int) -> None:
        replayed, layout = self._replayed(visit), self.model.layout
        num_tokens = sum(len(answer) + 1 for _, answers in replayed for answer in answers)
        share = 1 / (len(replayed) if self.config.replay_target == "reference" else num_tokens)
        for (_, answers), (asked, size) in zip(replayed, self._replayed_regions(visit), strict=True):
            first = builder.packed + len(asked)
            builder.add([*asked, *[layout.mask_id] * size, *layout.after_answer], -1, "full")
            for answer in answers:
                targets, number = np.array([*answer, layout.eot]), builder.number_answer(share)
                rows = first + np.arange(len(targets))
                builder.predict(REPLAY, index, number, rows, targets, np.ones(len(targets)))

    def _ask(self, text_ids: Sequence[int]) -> list[int]:
        return list(text_ids)  # the image may stand among the words

    def _asked(self, visit: PairVisit, text_ids: Sequence[int]) -> list[int]:
        """The real image with what is asked of it."""
        return self.model.layout.asked(self._tokens["record_codes"][visit.pair], text_ids)

    def _regions(self, pair: int) -> list[list[int]]:
        """Win and lose as their regions hold them, of one length."""
        layout, most = self.model.layout, self.model.prompts.max_caption_tokens
        captions = [
            [*self._tokens[name][pair].tolist(), layout.eot] for name in ("win_caption_ids", "lose_caption_ids")
        ]
        size = min(most, max(map(len, captions)))
        return [[*ids, *[layout.filler] * (size - len(ids))][:size] for ids in captions]

    def _replayed_regions(self, visit: PairVisit) -> list[tuple[list[int], int]]:
        """Of each question that is replayed: the image with it, and the length of the answers' region."""
        return [
            (self._asked(visit, question), max(map(len, answers)) + 1) for question, answers in self._replayed(visit)
        ]
