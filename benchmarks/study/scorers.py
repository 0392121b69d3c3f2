"""Scorers of a study's controls, for curation.score and curation.caption_scorer: chance, and the oracle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from hermesflow.data.records import Record
from hermesflow.models.images import resize_images
from hermesflow.worlds import oracle, shapes


def random_images(images: np.ndarray, record: Record) -> list[float]:
    """Scores of an image scorer that sees nothing: uniform in [0, 1), the same for the same images of a record.

    Args:
        images: uint8 [n, H, W, 3].
        record: whose caption they were drawn of.
    Returns: n numbers.
    """
    return [_uniform(record.id, index, image.tobytes()) for index, image in enumerate(images)]


def random_captions(captions: Sequence[str], truth: str) -> list[float]:
    """The same for captions of an image, whose true caption is `truth`."""
    return [_uniform(truth, index, caption.encode()) for index, caption in enumerate(captions)]


def oracle_images(images: np.ndarray, record: Record) -> list[float]:
    """Scores of an image scorer that is always right: the fraction of the record's questions that the oracle, reading
    each image's pixels, answers rightly.

    Args:
        images: uint8 [n, H, H, 3].
        record: of the built-in world.
    Returns: n numbers in [0, 1].
    """
    return [oracle.score(record.questions, seen)[0] for seen in oracle.read(resize_images(images, shapes.IMAGE_SIZE))]


def _uniform(name: str, index: int, content: bytes) -> float:
    digest = hashlib.blake2b(repr((name, index)).encode() + content, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
