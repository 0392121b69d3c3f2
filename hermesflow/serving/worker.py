"""Requests of many clients, computed together: one thread takes what waits, in batches of one kind.

A request that cannot be computed fails alone: where a batch fails, each of its requests is tried by itself.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.models.model import Model

_LOGGER = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """More requests wait than may."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What one request asks for; those with one key can be computed together."""

    key: Hashable
    size: int
    """What it counts in a batch: its images, or its answers."""
    done: Future = field(default_factory=Future)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageJob(Job):
    """Images of one prompt, one a seed. Gives uint8 [n, H, W, 3]; the key is the sampling."""

    prompt_ids: list[int]
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerJob(Job):
    """Answers to a question about an image, one a seed. Gives ids [n]; the key is SamplingParams."""

    image: Image.Image
    question_ids: list[int]
    seeds: tuple[int, ...]


class Worker:
    """Computes jobs in a thread of its own, for the model is one."""

    def __init__(self, model: Model, *, max_waiting: int, max_batch: int) -> None:
        """
        Args:
            model: whose engine computes.
            max_waiting: jobs that may wait; more are refused.
            max_batch: images, or answers, of one pass.
        """
        self._model, self._max_waiting, self._max_batch = model, max_waiting, max_batch
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._kept: list[Job] = []
        self._lock, self._num_waiting, self.num_batches = threading.Lock(), 0, 0
        self._thread = threading.Thread(target=self._work, name="hermesflow-worker", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Jobs that are not begun."""
        return self._num_waiting

    def submit(self, job: Job) -> Future:
        """Puts a job in the row; cancelling its future takes it out again. Raises: QueueFullError."""
        with self._lock:
            if self._num_waiting >= self._max_waiting:
                raise QueueFullError(f"{self._num_waiting} requests wait already; try again later")
            self._num_waiting += 1
        self._jobs.put(job)
        return job.done

    def close(self) -> None:
        """Ends the thread after what it does now; jobs that wait are cancelled."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            running = [job for job in batch if job.done.set_running_or_notify_cancel()]
            if running:
                self.num_batches += 1
                self._compute(running)

    def _next_batch(self) -> list[Job] | None:
        """The first that waits and all others of its key that fit, in their order; None at the end."""
        waiting, at_end = [self._kept.pop(0)] if self._kept else [self._jobs.get()], False
        waiting += self._kept
        while not self._jobs.empty():
            waiting.append(self._jobs.get())
        at_end = None in waiting
        jobs = [job for job in waiting if job is not None]
        if at_end:
            for job in jobs:
                job.done.cancel()
            return None
        first, *others = jobs
        batch, size, self._kept = [first], first.size, []
        for job in others:
            fits = (type(job), job.key) == (type(first), first.key) and size + job.size <= self._max_batch
            (batch if fits else self._kept).append(job)
            size += job.size if fits else 0
        with self._lock:
            self._num_waiting -= len(batch)
        return batch

    def _compute(self, jobs: Sequence[Job]) -> None:
        compute: Callable[[Any], list] = self._draw if isinstance(jobs[0], ImageJob) else self._answer
        try:
            results = compute(jobs)
        except Exception as error:  # the thread must outlive whatever the model raises
            if len(jobs) == 1:
                _LOGGER.warning("a request failed: %s", error)
                jobs[0].done.set_exception(error)
            else:
                for job in jobs:
                    self._compute([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.done.set_result(result)

    def _draw(self, jobs: Sequence[ImageJob]) -> list[np.ndarray]:
        prompts = [job.prompt_ids for job in jobs for _ in job.seeds]
        seeds = torch.tensor([[seed] for job in jobs for seed in job.seeds])
        codes = self._model.engine.generate(prompts, num_images=1, seeds=seeds, sampling=jobs[0].key)[:, 0]
        grid = getattr(jobs[0].key, "grid", None) or self._model.layout.image_grid
        # One by one, since rounding by batch may move a pixel by a level.
        images = np.concatenate([self._model.decode_images(codes[row : row + 1], *grid) for row in range(len(codes))])
        return np.split(images, np.cumsum([len(job.seeds) for job in jobs])[:-1])

    def _answer(self, jobs: Sequence[AnswerJob]) -> list[list[list[int]]]:
        params: SamplingParams = jobs[0].key
        found: list[list[list[int]]] = [[] for _ in jobs]
        for numbers, seen, engine in self._model.views([job.image for job in jobs]):
            group = [jobs[number] for number in numbers]
            most = max(len(job.seeds) for job in group)
            # A question is asked once for each of its seeds.
            asked = [[job.question_ids] * len(job.seeds) for job in group]
            seeds = torch.tensor([[[seed] for seed in (*job.seeds, *[0] * (most - len(job.seeds)))] for job in group])
            answers = engine.generate_text(seen, asked, sampling=[params], seeds=seeds)
            for number, of_image in zip(numbers, answers, strict=True):
                found[number] = [samples[0] for samples in of_image]
        return found
