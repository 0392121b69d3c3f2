"""Captions and answers about images: autoregressive sampling and scoring of given answers.

An image is prefilled once and shared by its questions, a question once and shared by its samples. Answers are decoded
together, one token a step; those that have ended make room for the next (answer_stream.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hermesflow.engine.answer_sampler import AnswerSampler, SamplingParams
from hermesflow.engine.answer_stream import AnswerStream
from hermesflow.engine.memory_planner import is_out_of_memory
from hermesflow.engine.phases import phase
from hermesflow.engine.prompt_spans import Asked, PromptSpans, QuestionIds
from hermesflow.engine.sequence_logprob import next_token_targets
from hermesflow.engine.token_layout import Ids, Layout
from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.span_tree import SpanTree

__all__ = ["QuestionIds", "SamplingParams", "TextDecoder"]
logger = logging.getLogger(__name__)


class TextDecoder:
    """Samples and scores text about images.

    An answer is a function of the model, its image, question, seed and parameters, whatever else is in the batch.
    Text is drawn from the layout's text ids; text_only=False takes the whole joint vocabulary, as
    the published code of Show-o does.
    """

    def __init__(self, transformer: Transformer, layout: Layout, backend: str | None = None) -> None:
        self.transformer, self.layout, self.backend = transformer, layout, backend
        self._bounds: dict[str, int] = {}

    def extend(
        self,
        images: Tensor,
        question_ids: QuestionIds,
        sampling: Sequence[SamplingParams],
        seeds: Tensor,
        *,
        text_only: bool = True,
        max_tokens: int = 16384,
    ) -> list[list[list[list[int]]]]:
        """Answer each question once for every entry of sampling.

        Args:
            images: codes int64 [B, N], or features [B, F, D] of the model's width D.
            question_ids: plain text ids [B][Q of the image].
            sampling: S settings.
            seeds: int64 [B, Q, S], Q at least the largest number of questions of an image.
            text_only: whether only text ids may be drawn.
            max_tokens: tokens that a batch may hold in the cache; one question with its answers always fits. Where
                memory runs out it is halved, for later calls too.
        Returns: ids [b][q][s], each a list of token ids without eot.
        Raises: RuntimeError naming the answer and the step if the model's logits hold NaN.
        """
        answers: list[list] = [[None] * len(questions) for questions in question_ids]
        prompts = PromptSpans(self.layout, images, question_ids)
        limits = [params.max_new_tokens for params in sampling]
        sizes = {pair: len(prompts.question(*pair)) + sum(limits) for pair in prompts.pairs}

        ids = self._ids(text_only)

        def draw(capacity: int) -> None:
            cache = self.transformer.new_cache(capacity + 1)
            head = ids.rows(self.transformer.head)
            sampler = AnswerSampler(self.transformer, cache, head, self.layout.eot, self.backend, ids=ids)
            left = [(image, question) for image, question in sizes if answers[image][question] is None]
            for (image, question), samples in AnswerStream(sampler, prompts, sampling, seeds).answers(left):
                answers[image][question] = samples

        # Room for the longest piece of a question twice: what the gaps beside an image may waste.
        longest = max((max(size - sum(limits), *limits) for size in sizes.values()), default=0)
        self._within_memory("extend", draw, sizes, prompts, max_tokens, longest)
        return answers

    def score_choices(
        self,
        images: Tensor,
        question_ids: QuestionIds,
        choice_ids: Sequence[QuestionIds],
        *,
        text_only: bool = True,
        max_tokens: int = 16384,
    ) -> list[list[list[float]]]:
        """Log-probability of each given answer and the eot after it, all in one pass a batch.

        Args:
            images: codes int64 [B, N], or features [B, F, D] of the model's width D.
            question_ids: plain text ids [B][Q of the image].
            choice_ids: plain text ids [B][Q][C of the question], none of them empty.
            text_only: whether probabilities are normalized over the text ids or over the joint vocabulary.
            max_tokens: tokens of one pass; one question with its choices always fits. Halved where memory runs out.
        Returns: log-probabilities [b][q][c].
        """
        scores: list[list] = [[None] * len(questions) for questions in question_ids]
        prompts = PromptSpans(self.layout, images, question_ids)
        sizes = {
            (image, question): len(prompts.question(image, question)) + sum(map(len, choice_ids[image][question]))
            for image, question in prompts.pairs
        }

        def score(max_tokens: int) -> None:
            left = {pair: size for pair, size in sizes.items() if scores[pair[0]][pair[1]] is None}
            for pairs in _batches(left, prompts.image_length, max_tokens):
                logprobs_of = self._score(prompts, pairs, choice_ids, text_only)
                for (image, question), logprobs in zip(pairs, logprobs_of, strict=True):
                    scores[image][question] = logprobs

        self._within_memory("score_choices", score, sizes, prompts, max_tokens)
        return scores

    def _within_memory(
        self,
        name: str,
        work: Callable[[int], None],
        sizes: dict[Asked, int],
        prompts: PromptSpans,
        max_tokens: int,
        slack: int = 0,
    ) -> None:
        """Calls work(bound), which resumes, with half the bound each time that memory runs out.

        The bound is no more than all pairs need with their images, and no less than any one needs with the slack.
        """
        if not sizes:
            return
        image, root = prompts.image_length, len(prompts.root)
        total = sum(sizes.values()) + image * len({image for image, _ in sizes}) + root
        least = min(total, max(sizes.values()) + image + root + slack)
        bound = max(least, min(total, max_tokens, self._bounds.get(name, total)))
        while True:
            try:
                return work(bound)
            except (RuntimeError, MemoryError) as error:
                if bound == least or not is_out_of_memory(error):
                    raise
            # Only here, after the error is gone and with it what the failed batch held.
            smaller = self._bounds[name] = max(least, bound // 2)
            logger.warning(
                "TextDecoder.%s: out of memory with %d tokens in a batch; continuing with %d", name, bound, smaller
            )
            bound = smaller
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _score(
        self, prompts: PromptSpans, pairs: list[Asked], choice_ids: Sequence[QuestionIds], text_only: bool
    ) -> list[list[float]]:
        choices = [choice_ids[image][question] for image, question in pairs]
        num_choices = [len(of_question) for of_question in choices]
        if not any(num_choices):
            return [[] for _ in pairs]
        images = list(dict.fromkeys(image for image, _ in pairs))
        roots = prompts.roots
        number = {image: span for span, image in enumerate(images, start=len(roots))}
        spans = [*roots, *(prompts.image(image, len(roots) - 1) for image in images)]
        spans += [(prompts.question(*pair), number[pair[0]], "causal") for pair in pairs]
        first_choice = len(spans)
        asked = enumerate(choices, start=len(roots) + len(images))
        spans += [(ids, parent, "causal") for parent, of_question in asked for ids in of_question]
        tree = SpanTree.build(spans, self.transformer.embed.weight.device)
        rows, targets = next_token_targets(tree, range(first_choice, len(spans)), end=self.layout.eot)
        ids = self._ids(text_only)
        weight, bias = ids.rows(self.transformer.head)
        with phase("judge"):
            hidden = self.transformer(tree, embeds=prompts.embeds(images, with_root=bool(roots)), rows=rows)
            logprob = linear_logprob(hidden, weight, ids.numbers(targets), bias=bias, backend=self.backend)
        lengths = tree.lengths[first_choice:] + 1
        # Summed on the host in fp64: the order of a device's atomic additions may change from run to run.
        sums = np.add.reduceat(logprob.double().cpu().numpy(), np.cumsum(lengths) - lengths)
        return [part.tolist() for part in np.split(sums, np.cumsum(num_choices)[:-1])]

    def _ids(self, text_only: bool) -> Ids:
        """What text may take."""
        return self.layout.text_ids if text_only else Ids(range(self.layout.vocab_size))


def _batches(sizes: dict[Asked, int], image_length: int, max_tokens: int) -> Iterator[list[Asked]]:
    """Pairs in order, cut so that their images and sizes stay within max_tokens; one pair always fits."""
    pairs: list[Asked] = []
    total = 0
    for pair, size in sizes.items():
        added = size if pairs and pairs[-1][0] == pair[0] else size + image_length
        if pairs and total + added > max_tokens:
            yield pairs
            pairs, total, added = [], 0, size + image_length
        pairs.append(pair)
        total += added
    if pairs:
        yield pairs
