"""Pairs as packed span trees: what a pass of Pair-DPO computes, and what each side must predict in it.

    generation      prompt -> win image, lose image (masked: once a mask, which both share; causal: once)
    understanding   image -> question -> win caption, lose caption
    replay          image -> questions -> each of their choices, or the right answer alone

Each token is stored and computed once; there are no pads. Masks and dropped prompts are pure functions of the seed, of
the pair and of its visit (how often it was trained on before), so that a resumed run and a cached reference meet the
same ones.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hermesflow.algorithms.batch import REPLAY, PairBatch, PairVisit, Side
from hermesflow.algorithms.losses import find_loss
from hermesflow.config import TrainConfig, print_of
from hermesflow.data.pairs import SIDES, each_row
from hermesflow.engine.mask_schedule import mask_ratio
from hermesflow.kernels.span_tree import SpanForest
from hermesflow.models.images import decode_image
from hermesflow.models.model import Model
from hermesflow.runtime.distributed import rank, world_size
from hermesflow.runtime.files import InputError
from hermesflow.runtime.seeds import shuffled_epochs

_COLUMNS = {
    "generation": ("win_codes", "lose_codes"),
    "understanding": ("record_codes", "win_caption_ids", "lose_caption_ids"),
}
# The settings that change what a visit's tokens are and which of them it must predict, in the order of older
# fingerprints, and those that do not.
_DRAWN_BY = (
    "condition_dropout", "masks_per_pair", "complementary_masks", "boundary_labels", "replay_target",
    "replayed_questions",
)  # fmt: skip
_NOT_DRAWN_BY = (
    "num_steps", "pairs_per_step", "tokens_per_pass", "lr", "weight_decay", "warmup_steps", "max_grad_norm",
    "loss_type", "beta", "generation_beta", "understanding_beta", "label_smoothing", "simpo_margin",
    "length_normalize", "generation_weight", "understanding_weight", "preference_weight", "nll_weight",
    "replay_weight", "elbo_weighting", "reference", "dtype", "activation_checkpointing",
    "compile", "lora_rank", "lora_alpha", "lora_targets", "holdout_pairs", "holdout_every", "patience", "tracker",
    "checkpoint_every", "keep_checkpoints",
)  # fmt: skip
_REMEMBERED_VIEWS = 256
"""Pairs whose features are kept."""


class TokenMask(NamedTuple):
    """What one mask hides of an image.

    hidden: int64 [k], positions in ascending order.
    weight: of each hidden token's log-probability.
    """

    hidden: np.ndarray
    weight: float


class PairPacker:
    """Makes the passes of a training run from a table of pairs."""

    constant_sides: tuple[str, ...] = ("understanding",)
    """Sides that are the same at every visit; images have other masks, and the replay other questions."""

    def __init__(self, model: Model, pairs: pa.Table, config: TrainConfig, seed: int) -> None:
        """
        Args:
            model: its layout, text tokenizer and prompts are used.
            pairs: a table of hermesflow.data.pairs, which check_pairs and trained_pairs have seen.
            config: how masks are drawn and what is scored; a side of weight 0 is not packed.
            seed: of masks, dropped prompts and the order of pairs.
        """
        self.model, self.pairs, self.config, self.seed = model, pairs, config, seed
        self._packed_sides = _trained_sides(config) + ([REPLAY] if config.replay_weight else [])
        self.question_ids = model.caption_prompt()
        layout = model.layout
        if model.views_codes:
            self._prefix_length = len(layout.image_prefix([0] * layout.num_image_tokens))
        else:
            span = layout.feature_span(model.num_features)
            self._prefix_length = len(span.before) + len(span.ids)
        self._views = functools.lru_cache(_REMEMBERED_VIEWS)(self._view)
        self._captions, self._sides = pairs["caption"].to_pylist(), pairs["sides"].to_pylist()
        self._tokens = {name: _token_rows(pairs[name]) for side in SIDES for name in _COLUMNS[side]}
        asked = pairs.select(["questions", "answers", "choices"])
        self._questions = [_asked_of(row, config) for row in each_row(asked)]

    def only(self, *sides: str) -> PairPacker:
        """The same packer, which leaves out all but these sides of every pair."""
        packer = copy.copy(self)
        packer._packed_sides = [name for name in self._packed_sides if name in sides]
        return packer

    def visits(self, step: int) -> list[PairVisit]:
        """The pairs of a step: consecutive entries of an endless row of shuffled epochs."""
        count = self.config.pairs_per_step
        positions = range(step * count, (step + 1) * count)
        return [PairVisit(*place) for place in shuffled_epochs([self.seed, 0], len(self.pairs), positions)]

    def passes(self, visits: Sequence[PairVisit]) -> list[tuple[list[PairVisit], bool]]:
        """This process's passes over all processes' visits, and whether each counts.

        Each holds config.tokens_per_pass tokens at most, or one visit. All processes have equally many, since they go
        through sharded layers together: one that has less to do takes a pass that does not count.
        """
        if not visits:
            return []
        sizes = [self.num_tokens(visit) for visit in visits]
        plan = plan_passes(sizes, self.config.tokens_per_pass, world_size())[rank() :: world_size()]
        return [([visits[item] for item in items] or [visits[0]], bool(items)) for items in plan]

    def num_tokens(self, visit: PairVisit) -> int:
        """Packed tokens of a visit."""
        layout, sides, total = self.model.layout, self._sides_of(visit.pair), 0
        lengths = {name: len(rows[visit.pair]) for name, rows in self._tokens.items()}
        if "generation" in sides:
            num_copies = self.config.masks_per_pair if layout.image_mode == "full" else 1
            total += len(self._prompt_of(visit)) + 2 * num_copies * layout.image_length
        if "understanding" in sides or REPLAY in sides:
            total += self._prefix_length
        if "understanding" in sides:
            total += len(self._ask(self.question_ids))
            total += lengths["win_caption_ids"] + lengths["lose_caption_ids"]
        if REPLAY in sides:
            for question, answers in self._replayed(visit):
                total += len(question) + sum(map(len, answers))
        return total

    def pack(
        self,
        visits: Sequence[PairVisit],
        device: torch.device | str | None = None,
        totals: Mapping[str, int] | None = None,
    ) -> PairBatch:
        """One pass over these visits; device None is the CPU, totals are num_pairs of the whole step."""
        builder = TreeBuilder()
        for index, visit in enumerate(visits):
            sides = self._sides_of(visit.pair)
            if "generation" in sides:
                self._add_images(builder, index, visit)
            self._add_asked(builder, index, visit, [side for side in sides if side != "generation"])
        batch = builder.build_batch(visits, device, totals or {})
        layout = self.model.layout
        return replace(batch, code_ids=layout.code_ids) if layout.codes_apart else batch

    def add_replay(self, builder: TreeBuilder, index: int, visit: PairVisit) -> None:
        """Adds a visit's replay to a pass that holds something else too; index is that of the visit in the pass."""
        if REPLAY in self._sides_of(visit.pair):
            self._add_asked(builder, index, visit, [REPLAY])

    def fingerprint(self) -> str:
        """Of all that the visits' passes depend on: the pairs' tokens, what is asked, the seed and the settings."""
        drawn_by = print_of(self.config, _DRAWN_BY, _NOT_DRAWN_BY)
        texts = [self.question_ids, self._captions, self._sides, self._packed_sides, self.seed, drawn_by]
        texts += [self._questions] if REPLAY in referenced_sides(self.config) else []
        digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16)
        if "record_image" in self.pairs.column_names:
            for image in self.pairs["record_image"].drop_null().to_pylist():
                digest.update(image)
        for rows in self._tokens.values():
            digest.update(np.array([len(row) for row in rows], dtype=np.int32))
            for row in rows:
                digest.update(row.astype(np.int32))
        return digest.hexdigest()

    def further_metric_names(self, visits: Sequence[PairVisit]) -> list[str]:
        """Of PairBatch.further_metrics."""
        return []

    def num_pairs(self, visits: Iterable[PairVisit]) -> dict[str, int]:
        """How many of the visits have each side; sides that are not packed and sides that none has are left out."""
        found = Counter(side for visit in visits for side in self._sides_of(visit.pair))
        return {side: found[side] for side in (*SIDES, REPLAY) if found[side]}

    def _ask(self, text_ids: Sequence[int]) -> list[int]:
        """What is asked of the real image."""
        layout = self.model.layout
        return layout.question(text_ids) if self.model.views_codes else layout.feature_question(text_ids)

    def _sides_of(self, pair: int) -> list[str]:
        """Those of the pair's sides that are packed, and the replay if it has questions."""
        has = ["generation", "understanding"] if self._sides[pair] == "both" else [self._sides[pair]]
        has += [REPLAY] if self._questions[pair] else []
        return [side for side in self._packed_sides if side in has]

    def _replayed(self, visit: PairVisit) -> list[tuple[list[int], list[list[int]]]]:
        """Ids of questions about the real image, and of the answers to each that are replayed."""
        questions = self._questions[visit.pair]
        order = np.random.default_rng([self.seed, 4, *visit]).permutation(len(questions))
        chosen = (questions[number] for number in order[: self.config.replayed_questions])
        model = self.model
        return [
            (self._ask(model.question_prompt(question)), list(map(model.answer_ids, model.merge_choices(answers))))
            for question, answers in chosen
        ]

    def _prompt_of(self, visit: PairVisit) -> list[int]:
        """The condition that win and lose share: the caption, or what stands for it in the unconditional half."""
        # A stream of its own, so that the masks stay the same.
        is_dropped = np.random.default_rng([self.seed, 3, *visit]).random() < self.config.condition_dropout
        ids = self.model.image_prompt(self._captions[visit.pair])
        return self.model.layout.unguided_prompt(ids) if is_dropped else self.model.layout.text_prompt(ids)

    def _add_images(self, builder: TreeBuilder, index: int, visit: PairVisit) -> None:
        prompt = builder.add(self._prompt_of(visit), -1, "causal")
        images = [self._tokens[name][visit.pair] for name in ("win_codes", "lose_codes")]
        add = self._add_masked_images if self.model.layout.image_mode == "full" else self._add_causal_images
        add(builder, index, visit, prompt, [np.array(self.model.layout.image(codes)) for codes in images])

    def _add_masked_images(
        self, builder: TreeBuilder, index: int, visit: PairVisit, prompt: int, images: list[np.ndarray]
    ) -> None:
        """Each mask hides the same codes of win and lose, which their own rows predict."""
        layout, config = self.model.layout, self.config
        rng = np.random.default_rng([self.seed, 1, *visit])
        codes = layout.code_positions
        for hidden, weight in draw_masks(len(codes), config, rng):
            rows, weights = codes[hidden], np.full(len(hidden), weight)
            if config.boundary_labels:
                around = np.setdiff1d(np.arange(layout.image_length), codes)
                rows = np.sort(np.concatenate([rows, around]))
                weights = np.where(np.isin(rows, around), mask_share(config), weight)
            for lose, image in enumerate(images):
                builder.predict("generation", index, 2 * index + lose, builder.packed + rows, image[rows], weights)
                masked = image.copy()
                masked[codes[hidden]] = layout.mask_id
                builder.add(masked, prompt, "full")

    def _add_causal_images(
        self, builder: TreeBuilder, index: int, visit: PairVisit, prompt: int, images: list[np.ndarray]
    ) -> None:
        """Next codes; the row before each predicts it."""
        codes = self.model.layout.code_positions
        for lose, image in enumerate(images):
            builder.add_next_tokens("generation", index, 2 * index + lose, prompt, image, image, codes)

    def _add_asked(self, builder: TreeBuilder, index: int, visit: PairVisit, sides: list[str]) -> None:
        """What is said about the real image, below which it all stands."""
        if not sides:
            return
        image = self._add_real_image(builder, visit)
        if "understanding" in sides:
            self._add_captions(builder, index, visit.pair, image)
        if REPLAY in sides:
            self._add_answers(builder, index, visit, image)

    def _add_real_image(self, builder: TreeBuilder, visit: PairVisit) -> int:
        layout = self.model.layout
        if self.model.views_codes:
            return builder.add(layout.image_prefix(self._tokens["record_codes"][visit.pair]), -1, layout.prefix_mode)
        span, features = layout.feature_span(self.model.num_features), self._views(visit.pair)
        if span.before and builder.root < 0:
            first = builder.packed + len(span.before) - span.shared
            builder.embed(range(first, first + span.shared), features[: span.shared])
            builder.root = builder.add(span.before, -1, "causal")
        builder.embed([builder.packed + row for row in span.rows], features[span.shared :])
        return builder.add(span.ids, builder.root, span.mode, span.place)

    def _view(self, pair: int) -> torch.Tensor:
        """Features [F, D] of a pair's real image, or of the image that its codes give."""
        image = self.pairs["record_image"][pair].as_py() if "record_image" in self.pairs.column_names else None
        if image is None:
            codes = torch.from_numpy(self._tokens["record_codes"][pair].astype(np.int64))
            return self.model.view_codes(codes[None])[0].cpu()
        return self.model.view_pixels(decode_image(image, f"pair {pair}: record_image", self.model.fit)[None])[0].cpu()

    def _add_captions(self, builder: TreeBuilder, index: int, pair: int, image: int) -> None:
        """Next tokens, and eot where a caption ended by itself."""
        layout = self.model.layout
        question = builder.add(self._ask(self.question_ids), image, "causal")
        for lose, name in enumerate(("win_caption_ids", "lose_caption_ids")):
            caption = self._tokens[name][pair]
            targets = np.append(caption, layout.eot)[: self.model.prompts.max_caption_tokens]
            builder.add_next_tokens("understanding", index, 2 * index + lose, question, caption, targets)

    def _add_answers(self, builder: TreeBuilder, index: int, visit: PairVisit, image: int) -> None:
        """Next tokens of the answers, and eot. An answer's weight is one over the visit's tokens; one over its
        questions where the reference is kept."""
        replayed = self._replayed(visit)
        num_tokens = sum(len(answer) + 1 for _, answers in replayed for answer in answers)
        share = 1 / (len(replayed) if self.config.replay_target == "reference" else num_tokens)
        for prefix, answers in replayed:
            question = builder.add(prefix, image, "causal")
            for answer in answers:
                number = builder.number_answer(share)
                targets = np.array([*answer, self.model.layout.eot])
                builder.add_next_tokens(REPLAY, index, number, question, answer, targets)


def referenced_sides(config: TrainConfig) -> tuple[str, ...]:
    """Those whose loss compares the policy with the reference."""
    sides = SIDES if find_loss(config.loss_type).needs_reference else ()
    replayed = config.replay_weight and config.replay_target == "reference"
    return (*sides, REPLAY) if replayed else tuple(sides)


def _asked_of(row: dict, config: TrainConfig) -> list[tuple[str, list[str]]]:
    """A pair's questions and the answers to each that are replayed; files without choices have the right one alone."""
    right = [[answer] for answer in row["answers"] or ()]
    answers = row["choices"] or right if config.replay_target == "reference" else right
    return list(zip(row["questions"] or (), answers, strict=True))


def check_pairs(pairs: pa.Table, model: Model) -> None:
    """Raise InputError, which names the record, unless what the pairs' sides need is there and can be this model's."""
    for row in each_row(pairs):
        try:
            _check_row(row, model)
        except ValueError as error:
            reason = str(error).partition("; ")[0]
            raise InputError(
                f"record {row['record_id']}: {reason}; give pairs that this model drew, or the model that drew them"
            ) from error


def _check_row(row: dict, model: Model) -> None:
    layout, sides = model.layout, row["sides"]
    if sides not in ("both", *SIDES):
        raise ValueError(f"sides is {sides!r}, expected both, {' or '.join(SIDES)}")
    needed = [name for side in SIDES if sides in ("both", side) for name in _COLUMNS[side]]
    if sides != "understanding":
        needed.append("caption")
    if row["questions"] and "record_codes" not in needed:  # the replay asks about the real image
        needed.append("record_codes")
    for name in needed:
        if row[name] is None:
            raise ValueError(f"{name} is missing, which sides {sides!r} needs")
        if name == "caption":
            model.encode_text(row[name])
        elif name.endswith("_codes"):
            if len(row[name]) != layout.code_length:
                raise ValueError(
                    f"{name} has {len(row[name])} tokens, the model's image {layout.code_length} at "
                    f"model.image_size {model.image_size}"
                )
            if layout.latent_size and None not in row[name]:
                layout.check_codes(np.array(row[name]))
            else:
                _check_ids(name, row[name], range(layout.codebook_size), f"codebook has {layout.codebook_size}")
        else:
            _check_ids(name, row[name], layout.text_ids, f"text vocabulary has {len(layout.text_ids)}")
            _check_spelling(name, row[name], row[name.removesuffix("_ids")], model)
    questions, answers = row["questions"] or [], row["answers"] or []
    if len(questions) != len(answers) or None in (*questions, *answers):
        raise ValueError(f"questions and answers do not match: there are {len(questions)} and {len(answers)}")
    choices = row["choices"] or [[answer] for answer in answers]
    if len(choices) != len(answers) or not all(map(_is_choice, answers, choices)):
        raise ValueError("choices do not match: expected a list for each question, which holds its answer")
    for question, of_question in zip(questions, choices, strict=True):
        model.question_prompt(question)
        for choice in of_question:
            model.answer_ids(choice)


def _check_spelling(name: str, ids: list[int], text: str | None, model: Model) -> None:
    """Raises ValueError unless ids spell the text or begin its encoding, as imported captions do, which may be cut;
    those of another tokenizer do neither."""
    if text is None or model.decode_text(ids).strip() == text.strip():
        return
    if model.encode_text(text)[: len(ids)] != ids:
        raise ValueError(f"{name} spells {model.decode_text(ids)!r:.80}, not {text!r:.80}")


def _is_choice(answer: str, choices: list[str | None] | None) -> bool:
    return choices is not None and answer in choices and None not in choices


def _check_ids(name: str, ids: list[int | None], known: Container[int], limit: str) -> None:
    for token in ids:
        if token is None or token not in known:
            raise ValueError(f"{name} holds {token}, the model's {limit}")


def trained_pairs(pairs: pa.Table, config: TrainConfig) -> pa.Table:
    """The pairs that have a side of weight above 0, in the table's order.

    Raises: InputError if there are pairs, but none of them has one.
    """
    sides = _trained_sides(config)
    kept = pairs.filter(pc.is_in(pairs["sides"], pa.array(["both", *sides])))
    if len(pairs) and not len(kept):
        (missing,) = set(SIDES) - set(sides)
        raise InputError(
            f"no pairs to train on: all {len(pairs)} have the {missing} side alone, and train.{missing}_weight is 0; "
            "raise it, or take other pairs"
        )
    return kept


def draw_masks(
    num_codes: int, config: TrainConfig, rng: np.random.Generator, schedule: str = "cosine"
) -> list[TokenMask]:
    """The masks of one visit of a pair of images, or of captions.

    A mask hides the schedule's share of the image at a uniform time. The weighted log-probabilities of what all
    masks hide add up to the image's: to the mean of the masks' sums, or with elbo_weighting to an unbiased estimate of
    the evidence lower bound of decoding in any order, which is the sum over k = 1..N of
    (1 / k) E[sum over k hidden tokens, drawn uniformly]: a mask that hides k with probability P(k) weighs 1 / (k P(k)).

    Args:
        num_codes: N, tokens of an image.
        config: masks_per_pair, complementary_masks and elbo_weighting are used, and whether tokens are averaged.
        rng: the visit's.
        schedule: "cosine", or "linear", as LLaDA hides text (arXiv 2502.09992).
    Returns: masks_per_pair masks. Of complementary ones every second hides what the one before it shows, or all where
        that one shows nothing; it comes with the probability of the one before it.
    Source: MaskGIT (arXiv 2202.04200), section 3.3, for the schedule; autoregressive diffusion (arXiv 2110.02037),
        section 3, for the bound.
    """
    probability, masks = mask_count_probability(num_codes, schedule), []
    for _ in range(config.masks_per_pair // (2 if config.complementary_masks else 1)):
        ratio = mask_ratio(torch.tensor(rng.random(), dtype=torch.float64), schedule).item()
        order, count = rng.permutation(num_codes), max(round(ratio * num_codes), 1)
        for part in (order[:count], order[count:])[: 2 if config.complementary_masks else 1]:
            hidden = np.sort(part if len(part) else order)
            weight = 1 / (len(hidden) * probability[count - 1]) if config.elbo_weighting else 1.0
            masks.append(TokenMask(hidden, weight * mask_share(config)))
    return masks


def mask_count_probability(num_codes: int, schedule: str = "cosine") -> np.ndarray:
    """Probability fp64 [N] that a mask at a uniform time hides 1, ..., N tokens: max(round(cos(pi t / 2) N), 1), or
    with the linear schedule max(round((1 - t) N), 1)."""
    # The times at which the rounded count falls below k.
    least = (np.arange(1, num_codes + 1) - 0.5) / num_codes
    until = np.arccos(least) * 2 / np.pi if schedule == "cosine" else 1 - least
    until[0] = 1.0
    return until - np.append(until[1:], 0.0)


def plan_passes(sizes: Sequence[int], budget: int, multiple_of: int = 1) -> list[list[int]]:
    """Shares the items of a step out among few passes, evenly.

    Args:
        sizes: tokens of each item.
        budget: the most tokens of a pass; an item that is larger makes one by itself.
        multiple_of: the number of passes is a multiple of this, of processes that work side by side.
    Returns: item numbers of each pass; some are empty where there are more passes than items.
    """
    least = -(-sum(min(size, budget) for size in sizes) // budget) or 1
    passes = _fill_passes(sizes, budget, least, multiple_of)
    # Passes that were opened late hold small items alone; open from the start, as many may come out even.
    even = _fill_passes(sizes, budget, len(passes), multiple_of)
    return even if len(even) == len(passes) else passes


def _fill_passes(sizes: Sequence[int], budget: int, count: int, multiple_of: int) -> list[list[int]]:
    """The largest items first, each into the emptiest pass; where it has no room there, more passes are opened."""
    count += -count % multiple_of
    passes: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        if loads[0][0] and loads[0][0] + sizes[item] > budget:
            for number in range(len(passes), len(passes) + multiple_of):
                passes.append([])
                heapq.heappush(loads, (0, number))
        load, number = loads[0]
        passes[number].append(item)
        heapq.heapreplace(loads, (load + sizes[item], number))
    return [sorted(items) for items in passes]


def _trained_sides(config: TrainConfig) -> list[str]:
    return [side for side in SIDES if getattr(config, f"{side}_weight")]


def mask_share(config: TrainConfig) -> float:
    """Share of one mask in an image's log-probability; a mean over all masks' tokens needs no weights."""
    is_mean = config.length_normalize or find_loss(config.loss_type).means_over_tokens
    return 1.0 if is_mean else 1 / config.masks_per_pair


def _token_rows(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A column of token ids, a view a row; empty where it is null."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    # Sides that a pair does not have may hold anything.
    return np.split(pc.fill_null(lists.values, 0).to_numpy()[: offsets[-1]], offsets[:-1])[1:]


class _Predicted(NamedTuple):
    """What some rows of the packed tree predict, as Side has it, and the visit they are of."""

    index: int
    segment: int
    rows: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class TreeBuilder(SpanForest):
    """Collects the spans of a pass and, side by side, what they must predict."""

    root = -1
    """The span that all images that are seen follow, once it is there."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[str, list[_Predicted]] = {side: [] for side in (*SIDES, REPLAY)}
        self._answer_shares: list[float] = []
        self._embeds: list[tuple[Sequence[int], torch.Tensor]] = []

    def embed(self, rows: Sequence[int], values: torch.Tensor) -> None:
        """Vectors [n, D] stand in place of the embeddings of n packed rows."""
        self._embeds.append((rows, values))

    def number_answer(self, share: float) -> int:
        """The number of a further answer of the replay, which counts with this share."""
        self._answer_shares.append(share)
        return len(self._answer_shares) - 1

    def predict(
        self, side: str, index: int, segment: int, rows: np.ndarray, targets: np.ndarray, weights: np.ndarray
    ) -> None:
        """Packed rows predict targets, as part of a segment of visit `index`."""
        self._found[side].append(_Predicted(index, segment, rows, targets.astype(np.int64), weights.astype(np.float32)))

    def add_next_tokens(
        self,
        side: str,
        index: int,
        segment: int,
        parent: int,
        ids: Sequence[int],
        targets: np.ndarray,
        scored: np.ndarray | slice = slice(None),
    ) -> None:
        """Appends a causal span; its parent's last token and its own predict targets, as many as there are, or those
        that are scored."""
        rows = np.append(self.ends[parent] - 1, self.packed + np.arange(len(ids)))[: len(targets)][scored]
        targets = targets[scored]
        self.predict(side, index, segment, rows, targets, np.ones(len(targets)))
        if len(ids):
            self.add(ids, parent, "causal")

    def build_batch(
        self, visits: Sequence[PairVisit], device: torch.device | str | None, totals: Mapping[str, int]
    ) -> PairBatch:
        """The finished batch."""
        found = {side: parts for side, parts in self._found.items() if parts}
        sides = {side: self._side(side, parts, len(visits), device) for side, parts in found.items()}
        counts = {side: Counter() for side in found}
        for side, parts in found.items():
            for part in parts:
                counts[side][part.index] += len(part.rows)
        visits_of = {side: [visits[index] for index in counts[side]] for side in found}
        num_tokens_of = {side: list(counts[side].values()) for side in found}
        embeds = None
        if self._embeds:
            rows = torch.tensor([row for rows, _ in self._embeds for row in rows])
            embeds = rows.to(device), torch.cat([values for _, values in self._embeds]).to(device)
        return PairBatch(tuple(visits), self.build(device), sides, visits_of, num_tokens_of, totals, embeds=embeds)

    def _side(self, name: str, found: list[_Predicted], num_pairs: int, device: torch.device | str | None) -> Side:
        indices, numbers, rows, targets, weights = zip(*found, strict=True)
        if name == REPLAY:
            pair_weight = np.array(self._answer_shares, dtype=np.float32)
        else:
            pair_weight = np.zeros(num_pairs, dtype=np.float32)
            pair_weight[np.array(indices)] = 1.0
        segment = np.repeat(np.array(numbers, dtype=np.int64), [len(part) for part in rows])
        arrays = (np.concatenate(rows), np.concatenate(targets), segment, np.concatenate(weights), pair_weight)
        return Side(*(torch.from_numpy(array).to(device) for array in arrays))
