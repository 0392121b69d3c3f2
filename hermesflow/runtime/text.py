"""When two texts are one."""

from __future__ import annotations

import re
import unicodedata

INVISIBLE = re.compile("[\u00ad\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]")
"""Hyphenation, marks against line breaks, and variants of a glyph: they show nothing of their own."""


def plain_text(text: str) -> str:
    """The same for texts that differ in blanks, Unicode form (NFC or NFD) or invisible characters alone."""
    return " ".join(INVISIBLE.sub("", unicodedata.normalize("NFC", text.replace("\u200b", ""))).split())
