"""Captions and answers about images: autoregressive sampling and scoring of given answers.

An image is prefilled once and shared by its questions, a question once and shared by its samples. The answers of a
batch are decoded together, one token a step; those that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.token_sample import token_sample

from .sequence_logprob import next_token_targets
from .span_tree import Span, SpanTree
from .token_layout import TokenLayout
from .transformer import Embeds, Transformer

QuestionIds = Sequence[Sequence[Sequence[int]]]
"""Plain text ids of each image's questions: [image][question][token]."""

Pair = tuple[int, int]
"""(image, question of that image)."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one answer is sampled; kernels/token_sample.py explains the filters.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing. An answer ends with eot, or at max_new_tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0, float("inf")), "top_k": (0, float("inf")), "top_p": (0, 1), "min_p": (0, 1),
            "max_new_tokens": (1, float("inf")),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high or value == float("inf"):
                raise ValueError(f"SamplingParams: expected a finite {name} in [{low}, {high}], got {value}")


class TextDecoder:
    """Samples and scores text about images.

    An answer is a function of the model, its image, question, seed and parameters, whatever else is in the batch.
    Text is drawn from the text vocabulary, the head's first rows; text_only=False takes the whole joint vocabulary, as
    the published code of Show-o does.
    """

    def __init__(self, transformer: Transformer, layout: TokenLayout, backend: str | None = None) -> None:
        self.transformer, self.layout, self.backend = transformer, layout, backend

    def extend(
        self, images: Tensor, question_ids: QuestionIds, sampling: Sequence[SamplingParams], seeds: Tensor,
        *, text_only: bool = True, max_tokens: int = 16384,
    ) -> list[list[list[list[int]]]]:  # fmt: skip
        """Answer each question once for every entry of sampling.

        Args:
            images: codes int64 [B, N], or features [B, F, D] of the model's width D.
            question_ids: plain text ids [B][Q of the image].
            sampling: S settings.
            seeds: int64 [B, Q, S], Q at least the largest number of questions of an image.
            text_only: whether only text ids may be drawn.
            max_tokens: tokens that a batch may hold in the cache; one question with its answers always fits.
        Returns: ids [b][q][s], each a list of token ids without eot.
        Raises: RuntimeError naming the answer and the step if the model's logits hold NaN.
        """
        answers: list[list] = [[None] * len(questions) for questions in question_ids]
        reserve = sum(params.max_new_tokens for params in sampling)
        costs = [[len(question) + 1 + reserve for question in questions] for questions in question_ids]
        for pairs in self._batches(images, costs, max_tokens):
            batch_seeds = torch.stack([seeds[image, question] for image, question in pairs]).flatten()
            spans, embeds = self._question_spans(images, question_ids, pairs)
            batch = _AnswerBatch(self, spans, embeds, pairs, sampling, batch_seeds, text_only)
            for (image, question), samples in zip(pairs, batch.decode(), strict=True):
                answers[image][question] = samples
        return answers

    def score_choices(
        self, images: Tensor, question_ids: QuestionIds, choice_ids: Sequence[QuestionIds],
        *, text_only: bool = True, max_tokens: int = 16384,
    ) -> list[list[list[float]]]:  # fmt: skip
        """Log-probability of each given answer and the eot after it, all in one pass a batch.

        Args:
            images: codes int64 [B, N], or features [B, F, D] of the model's width D.
            question_ids: plain text ids [B][Q of the image].
            choice_ids: plain text ids [B][Q][C of the question], none of them empty.
            text_only: whether probabilities are normalised over the text ids or over the joint vocabulary.
            max_tokens: tokens of one pass; one question with its choices always fits.
        Returns: log-probabilities [b][q][c].
        """
        scores: list[list] = [[None] * len(questions) for questions in question_ids]
        costs = [
            [len(question) + 1 + sum(map(len, choices)) for question, choices in zip(*of_image, strict=True)]
            for of_image in zip(question_ids, choice_ids, strict=True)
        ]
        for pairs in self._batches(images, costs, max_tokens):
            spans, embeds = self._question_spans(images, question_ids, pairs)
            logprobs_of = self._score(spans, embeds, pairs, choice_ids, text_only)
            for (image, question), logprobs in zip(pairs, logprobs_of, strict=True):
                scores[image][question] = logprobs
        return scores

    def _score(
        self, spans: list[Span], embeds: Embeds | None, pairs: list[Pair], choice_ids: Sequence[QuestionIds],
        text_only: bool,
    ) -> list[list[float]]:  # fmt: skip
        choices = [choice_ids[image][question] for image, question in pairs]
        num_choices = [len(of_question) for of_question in choices]
        first_question, first_choice = len(spans) - len(pairs), len(spans)
        asked = enumerate(choices, start=first_question)
        spans = [*spans, *((ids, parent, "causal") for parent, of_question in asked for ids in of_question)]
        if len(spans) == first_choice:
            return [[] for _ in pairs]
        tree = SpanTree.build(spans, self.transformer.embed.weight.device)
        rows, targets = next_token_targets(tree, range(first_choice, len(spans)), end=self.layout.eot)
        weight, bias = self.text_head(text_only)
        hidden = self.transformer(tree, embeds=embeds)[rows]
        logprob = linear_logprob(hidden, weight, targets, bias=bias, backend=self.backend)
        lengths = tree.lengths[first_choice:] + 1
        # Summed on the host in fp64: the order of a device's atomic additions may change from run to run.
        sums = np.add.reduceat(logprob.double().cpu().numpy(), np.cumsum(lengths) - lengths)
        return [part.tolist() for part in np.split(sums, np.cumsum(num_choices)[:-1])]

    def text_head(self, text_only: bool) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the head over the ids that text may take."""
        head, ids = self.transformer.head, slice(self.layout.text_vocab_size if text_only else None)
        return head.weight[ids], None if head.bias is None else head.bias[ids]

    def _question_spans(
        self, images: Tensor, question_ids: QuestionIds, pairs: list[Pair]
    ) -> tuple[list[Span], Embeds | None]:
        """The images of the pairs, each once, then one question a pair; and the images' features, if they are such."""
        used = list(dict.fromkeys(image for image, _ in pairs))
        span_of = {image: span for span, image in enumerate(used)}
        spans: list[Span]
        if images.is_floating_point():
            ids, first = self.layout.feature_prefix(images.shape[1])
            spans = [(ids, -1, first)] * len(used)
            rows = torch.arange(len(used))[:, None] * len(ids) + torch.arange(first, len(ids))
            ask, embeds = self.layout.feature_question, (rows.flatten(), images[used].flatten(0, 1))
        else:
            spans = [(self.layout.image_prefix(codes), -1, "full") for codes in images[used].tolist()]
            ask, embeds = self.layout.question, None
        for image, question in pairs:
            spans.append((ask(question_ids[image][question]), span_of[image], "causal"))
        return spans, embeds

    def _batches(self, images: Tensor, costs: list[list[int]], max_tokens: int) -> Iterator[list[Pair]]:
        """(image, question) pairs in order, cut so that images and costs [image][question] stay within max_tokens."""
        prefix = images.shape[1] + (2 + len(self.layout.system_ids) if images.is_floating_point() else 3)
        pairs: list[Pair] = []
        total = 0
        for image, of_image in enumerate(costs):
            for question, cost in enumerate(of_image):
                added = cost if pairs and pairs[-1][0] == image else cost + prefix
                if pairs and total + added > max_tokens:
                    yield pairs
                    pairs, total, added = [], 0, cost + prefix
                pairs.append((image, question))
                total += added
        if pairs:
            yield pairs


class _AnswerBatch:
    """Answers under way. Row r answers question r // S with sampling[r % S], S the number of settings."""

    def __init__(
        self, decoder: TextDecoder, spans: list[Span], embeds: Embeds | None, pairs: list[Pair],
        sampling: Sequence[SamplingParams], seeds: Tensor, text_only: bool,
    ) -> None:  # fmt: skip
        self.transformer, self.eot, self.backend = decoder.transformer, decoder.layout.eot, decoder.backend
        self.head, self.pairs, self.num_samples = decoder.text_head(text_only), pairs, len(sampling)
        device, num_questions = self.head[0].device, len(pairs)
        self.seeds = seeds.to(device)
        self.max_new_tokens = [params.max_new_tokens for params in sampling]
        self.settings = {}
        for name in ("temperature", "top_k", "top_p", "min_p"):
            dtype = torch.int64 if name == "top_k" else torch.float32
            values = torch.tensor([getattr(params, name) for params in sampling], dtype=dtype, device=device)
            self.settings[name] = values.repeat(num_questions)
        self.tree, self.embeds = SpanTree.build(spans, device), embeds
        self.question_spans = np.arange(len(spans) - num_questions, len(spans))
        self.answer_spans = np.full(len(seeds), -1)
        # The last token of an answer is never fed back.
        self.limit = max(self.max_new_tokens)
        self.cache = self.transformer.new_cache(self.tree.capacity + len(seeds) * (self.limit - 1))

    @property
    def device(self) -> torch.device:
        return self.head[0].device

    def decode(self) -> list[list[list[int]]]:
        """Token ids [question][sample], without eot."""
        answers: list[list[int]] = [[] for _ in self.seeds]
        active = np.arange(len(answers))
        logits = self._first_logits()
        for step in range(self.limit):
            token = self._sample(logits, active, step)
            going_on = []
            for index, (row, drawn) in enumerate(zip(active.tolist(), token.tolist(), strict=True)):
                if drawn < 0:
                    raise self._no_distribution(row, step)
                if drawn != self.eot:
                    answers[row].append(drawn)
                    if step + 1 < self.max_new_tokens[row % self.num_samples]:
                        going_on.append(index)
            if not going_on:
                break
            active, token = active[going_on], token[torch.tensor(going_on, device=self.device)]
            logits = self._next_logits(active, token, step)
        return [answers[row : row + self.num_samples] for row in range(0, len(answers), self.num_samples)]

    def _first_logits(self) -> Tensor:
        """A question's last token predicts the first token of all its samples."""
        tree = self.tree
        last = tree.packed_starts[self.question_spans] + tree.num_new[self.question_spans] - 1
        hidden = self.transformer(tree, self.cache, self.embeds)[torch.from_numpy(last).to(self.device)]
        return F.linear(hidden, *self.head).repeat_interleave(self.num_samples, dim=0)

    def _next_logits(self, active: np.ndarray, token: Tensor, step: int) -> Tensor:
        """Feeds token [R] to the active rows."""
        if step == 0:
            parents = self.question_spans[active // self.num_samples]
            drawn_after = zip(token.tolist(), parents.tolist(), strict=True)
            spans = [([drawn], parent, "causal") for drawn, parent in drawn_after]
            self.answer_spans[active] = self.tree.num_spans + np.arange(len(active))
            self.tree = self.tree.extend(spans, reserve=self.limit - 2)
        else:
            self.tree = self.tree.grow(self.answer_spans[active], token)
        return F.linear(self.transformer(self.tree, self.cache), *self.head)

    def _sample(self, logits: Tensor, active: np.ndarray, step: int) -> Tensor:
        rows = torch.from_numpy(active).to(self.device)
        step_number = torch.full((), step, dtype=torch.int64, device=self.device)
        key = RandomKey(self.seeds[rows], step_number, torch.zeros_like(rows))
        settings = {name: values[rows] for name, values in self.settings.items()}
        return token_sample(logits, **settings, key=key, backend=self.backend)[0]

    def _no_distribution(self, row: int, step: int) -> RuntimeError:
        image, question = self.pairs[row // self.num_samples]
        return RuntimeError(
            f"TextDecoder: the model gives no distribution (NaN) for image {image}, question {question}, "
            f"sample {row % self.num_samples}, step {step}; check its weights"
        )
