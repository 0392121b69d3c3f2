"""Images of records, encoded batch by batch; and what a model sees of them.

What cannot be used is rejected with its reason, in the form "kind: detail", and stops nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hermesflow.data.records import Question, Record, png_bytes
from hermesflow.models.images import decode_image
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError, read_bytes, shown
from hermesflow.runtime.progress import track

_BATCH_PIXELS = 2**22
_QUESTIONS = 2**16
"""Whose words a model's answers are kept of: those of a data set repeat."""
_Item = TypeVar("_Item")


class RecordEncoder:
    """Adds the codes of their images to records, for one model; it remembers what questions are to the model."""

    def __init__(self, model: Model) -> None:
        """
        Args:
            model: encodes the images, and must know the words of captions and questions.
        """
        self._model = model
        self._fit = lru_cache(_QUESTIONS)(lambda question: _fit_question(model, question))

    def encode(self, records: Iterable[Record], count: int) -> Iterator[tuple[Record, str | None]]:
        """See encode_records."""
        num_done, waiting, at_end = 0, iter(records), False
        while num_done < count and not at_end:
            wanted, at_end = count - num_done, True
            for record, codes in encode_lazily(
                self._model, itertools.islice(waiting, wanted), self._check_and_open, wanted
            ):
                at_end = False
                if isinstance(codes, str):
                    yield record, codes
                else:
                    num_done += 1
                    yield self._encoded(record, codes[0] if codes else record.codes), None

    def _check_and_open(self, record: Record) -> list[np.ndarray]:
        """The record's image if it is to be encoded, after a look at all the rest."""
        try:
            self._model.image_prompt(record.caption)
        except InputError as error:
            raise ValueError(_unknown_word(error)) from error
        for fitted in map(self._fit, record.questions):
            if isinstance(fitted, str):
                raise ValueError(fitted)
        if record.codes is not None:
            _check_codes(self._model, record.codes)
            return []
        return [open_record(self._model, record)]

    def _encoded(self, record: Record, codes: np.ndarray) -> Record:
        kept = None if self._model.views_codes or _is_coded(record) else png_bytes(open_record(self._model, record))
        own = tuple(map(self._fit, record.questions))
        balanced = tuple(each for each in map(self._fit, record.balanced_questions) if isinstance(each, Question))
        return Record(record.id, record.caption, record.category, own, codes, kept, None, balanced)


def encode_records(model: Model, records: Iterable[Record], count: int) -> Iterator[tuple[Record, str | None]]:
    """Adds the codes of their images to records; images are opened a batch at a time and dropped, but for models that
    do not see codes.

    Args:
        model: encodes the images, and must know the words of captions and questions.
        records: with codes, images or image paths; images of other sizes are fitted to the model's (see fit_image).
        count: how many usable records are wanted; later ones are not looked at.
    Yields: in order (a usable record with its codes, None), or (a record, why it is unusable).
    """
    return RecordEncoder(model).encode(records, count)


def encode_lazily(
    model: Model, items: Iterable[_Item], read: Callable[[_Item], list[np.ndarray]], total: int
) -> Iterator[tuple[_Item, list[np.ndarray] | str]]:
    """Encodes the images of each item, with no more than one batch of images in memory.

    Args:
        model: encodes them.
        items: what has images.
        read: the images of an item, uint8 [size, size, 3] each; raises ValueError where it cannot.
        total: how many items there are at most, for the progress bar.
    Yields: (item, codes int32 [N] of each of its images) in order, or (item, the reason) where read raised.
    """
    batch: list[tuple[_Item, list[np.ndarray] | str]] = []
    num_images = 0
    for item in track(items, "encode images", "records", total=total):
        try:
            images = read(item)
            batch.append((item, images))
            num_images += len(images)
        except ValueError as error:
            batch.append((item, str(error)))
        if num_images * model.image_size**2 >= _BATCH_PIXELS:
            yield from _encode(model, batch)
            batch, num_images = [], 0
    yield from _encode(model, batch)


def _fit_question(model: Model, question: Question) -> Question | str:
    """The question with each choice once, as the model sees it; or why it cannot be asked."""
    try:
        model.choice_prompt(question.question, question.choices)
        choices = tuple(model.merge_choices(question.choices, question.answer))
    except InputError as error:
        return _unknown_word(error)
    if len(choices) < 2:
        values = shown(list(question.choices)), shown(question.question)
        return "too few choices: {} for {} are one to the model, expected two or more".format(*values)
    return replace(question, choices=choices)


def _unknown_word(error: InputError) -> str:
    return f"unknown word: {str(error).partition('; ')[0]}"


def _is_coded(record: Record) -> bool:
    return record.image is None and record.image_path is None


def open_record(model: Model, record: Record) -> np.ndarray:
    """A record's image as the model sees it, uint8 [image_size, image_size, 3].

    Raises: ValueError if there is none or it is damaged.
    """
    try:
        if record.image_path is not None:
            return decode_image(read_bytes(record.image_path), str(record.image_path), model.fit)
        if isinstance(record.image, bytes):
            return decode_image(record.image, "its image", model.fit)
    except InputError as error:
        raise ValueError(f"damaged image: {error}") from error
    if record.image is None:
        raise ValueError("no image: the record has neither an image nor codes")
    return model.fit(Image.fromarray(record.image))


def record_views(model: Model, records: Sequence[Record]) -> Tensor:
    """What the model sees of records' own images: codes int64 [B, N]; or features [B, F, D], of the images, and where a
    record has none of the images that its codes give."""
    codes = torch.from_numpy(np.stack([record.codes for record in records]).astype(np.int64))
    if model.views_codes or all(record.image is None for record in records):
        return model.view_codes(codes)
    decoded = iter(model.decode_images(codes[[record.image is None for record in records]]))
    images = [next(decoded) if record.image is None else open_record(model, record) for record in records]
    return model.view_pixels(np.stack(images))


def _check_codes(model: Model, codes: np.ndarray) -> None:
    try:
        model.layout.check_codes(codes)
    except ValueError as error:
        raise ValueError(f"wrong codes: {error}; give codes of this model's tokenizer, or the image") from error


def _encode(
    model: Model, batch: Sequence[tuple[_Item, list[np.ndarray] | str]]
) -> Iterator[tuple[_Item, list[np.ndarray] | str]]:
    images = [image for _, found in batch if not isinstance(found, str) for image in found]
    codes = iter(model.encode_images(np.stack(images)).cpu().numpy().astype(np.int32) if images else ())
    for item, found in batch:
        yield item, found if isinstance(found, str) else [next(codes) for _ in found]
