"""How alike two texts are in their words."""

from __future__ import annotations

import re
from collections import Counter


def token_f1(caption: str, truth: str) -> float:
    """F1 over the multiset of words and pairs of neighboring words; the pairs make the order count mildly.

    Args:
        caption: what was written.
        truth: what it is held against.
    Returns: 0 to 1; 1 for the same words in the same order (case and punctuation aside), 0 where either has no words.
    """
    return overlap_f1(_grams(caption), _grams(truth))


def overlap_f1(found: Counter, wanted: Counter) -> float:
    """F1 of one multiset against another, 0 to 1; 0 where either is empty."""
    return 2 * (found & wanted).total() / max(found.total() + wanted.total(), 1)


def _grams(text: str) -> Counter:
    words = re.findall(r"\w+", text.lower())
    return Counter(words) + Counter(zip(words, words[1:], strict=False))
