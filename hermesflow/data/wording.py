"""How alike two texts are in their words, and when they are one text."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from hermesflow.runtime.text import INVISIBLE

_TRADEMARKS = re.compile("([\u2120\u2122])")
_JOINERS = "\u200c\u200d\u2044"
"""Between letters of a word, and the slash of a fraction such as \u00bd, which is one word."""
_NO_BLANKS = re.compile(
    "[\u0e00-\u0e4f\u0e80-\u0ecf\u0edc-\u0edf\u1000-\u103f\u1050-\u108f\u1780-\u17d3\u1950-\u19df\u1a20-\u1a7f"
    "\u1b05-\u1b4b\ua980-\ua9c0\uaa60-\uaadf\u3005-\u3007\u3021-\u3029\u3031-\u303c\u3041-\u30ff\u3105-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48f\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
"""Letters of writing without blanks between words: Thai, Lao, Burmese, Khmer, Tai, Balinese, Javanese, Cham, kana,
bopomofo, Chinese characters, Yi."""


def token_f1(caption: str, truth: str) -> float:
    """F1 over the multiset of words and pairs of neighboring words; the pairs make the order count mildly.

    Args:
        caption: what was written.
        truth: what it is held against.
    Returns: 0 to 1; 1 for the same words in the same order (case, punctuation and Unicode form aside), 0 where either
        has no words.
    """
    return overlap_f1(_grams(caption), _grams(truth))


def overlap_f1(found: Counter, wanted: Counter) -> float:
    """F1 of one multiset against another, 0 to 1; 0 where either is empty."""
    return 2 * (found & wanted).total() / max(found.total() + wanted.total(), 1)


def split_words(text: str) -> list[str]:
    """Lower-case words in one Unicode form (NFKC); of writing without blanks, such as Chinese or Thai, each letter with
    its marks is a word."""
    if text.isascii():
        return re.findall(r"\w+", text.lower())
    words, kind = [], ""  # of the last character: "letter", "alone" or "", which is no part of a word
    for char in unicodedata.normalize("NFC", _compatible(_compatible(text).lower())):
        if unicodedata.category(char)[0] == "M" or char in _JOINERS:
            if kind:  # a mark belongs to its letter
                words[-1] += char
            continue
        last, kind = kind, _kind(char)
        if kind == "letter" == last:
            words[-1] += char
        elif kind:
            words.append(char)
    return words


def _kind(char: str) -> str:
    if not char.isalnum() and char != "_":
        return ""
    return "alone" if _NO_BLANKS.match(char) else "letter"


def _compatible(text: str) -> str:
    """NFKC; a trademark sign stays what it is, which is no letter."""
    parts = _TRADEMARKS.split(INVISIBLE.sub("", text))
    return "".join(part if _TRADEMARKS.match(part) else unicodedata.normalize("NFKC", part) for part in parts)


def _grams(text: str) -> Counter:
    words = split_words(text)
    return Counter(words) + Counter(zip(words, words[1:], strict=False))
