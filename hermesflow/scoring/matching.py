"""The choice that a free answer means: an exact match, else the first of ever weaker normalizations that finds one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from hermesflow.runtime.text import plain_text

_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-") | {"\u2044": "/"})
_OTHER_MEANING = ("<super>", "<sub>", "<fraction>", "<circle>")
"""Decompositions that would make another number of 10\u00b2 and 1\u00bd."""
_STOPS = " .\u3002\uff0e\uff61"
_QUOTES = "\"'`*_ "
_SENTENCE = ".,;:!?\u2026\u3001\u3002\uff0c\uff0e\uff1a\uff1b\uff01\uff1f\uff61"
_NUMBER = r"[\d\u00bc-\u00be\u2150-\u215e\u221e]"
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:[,'\u2019_]\d{3})+(?![\d,'\u2019_])")
_SIGN_APART = re.compile(rf"(?<!\w)([+-])\s+(?=[^\w\s]*{_NUMBER})")
_UNIT_APART = re.compile(r"(?<=\d)\s+(?=[%\u2030\u00b0])")
_SIGNED = re.compile(rf"[^\w\s]*{_NUMBER}|\w(?!\w)")
_SHORT_NAME = re.compile(r"(?<!\w)\w{1,2}[+-]*$")
_MARK = re.compile(r"[^\w\s]|_")
_ARTICLE = re.compile(r"(?<!\S)(a|an|the)(?= \S)")
_PLUS = re.compile(r"(?<!\S)\+(?=\.?\d)")


def find_choice(answer: str, choices: Sequence[str]) -> int:
    """The choice that a free answer means.

    The first step at which a choice fits decides: the text itself, blanks and Unicode form, a full stop, quotes and
    brackets, full width, case, punctuation, articles, units.

    Args:
        answer: what was said.
        choices: what may be meant.
    Returns: its index; -1 where no choice fits, or several do that are not one text.
    """
    if answer in choices:
        return choices.index(answer)
    for normalize in _STEPS:
        wanted = normalize(answer)
        fits = [index for index, choice in enumerate(choices) if wanted and normalize(choice) == wanted]
        if fits:
            return fits[0] if len({plain_text(choices[index]) for index in fits}) == 1 else -1
    return -1


def normalize_text(text: str) -> str:
    """Lower-case words split by single blanks, without punctuation, units and articles.

    What tells numbers and short names apart stays: the sign of -1, the point of 1.5, A- and C++. An article is a word
    before another, so that the answer "A" stays.

    Source: the matching of answers of SQuAD (arXiv 1606.05250), which takes 1.5 for 15 and -1 for 1.
    """
    text = _MARK.sub(_without_unit, _without_articles(text))
    return _PLUS.sub("", " ".join(text.split()))


def _without_stop(text: str) -> str:
    return plain_text(text).rstrip(_STOPS)


def _without_quotes(text: str) -> str:
    """Without quotes, brackets and emphasis around it, and the end of its sentence."""
    text = plain_text(text)
    while text and (text[0] in _QUOTES + "\u00a1\u00bf" or unicodedata.category(text[0]) in ("Ps", "Pi", "Pf")):
        text = text[1:]
    while text and (text[-1] in _QUOTES + _SENTENCE or unicodedata.category(text[-1]) in ("Pe", "Pi", "Pf")):
        text = text[:-1]
    return text


def _one_form(text: str) -> str:
    """Full-width letters, ligatures and kinds of dashes as plain ones."""
    return plain_text("".join(map(_plain_form, plain_text(text)))).translate(_DASHES)


def _plain_form(char: str) -> str:
    kept = unicodedata.decomposition(char).startswith(_OTHER_MEANING)
    return char if kept else unicodedata.normalize("NFKC", char)


def _folded(text: str) -> str:
    return plain_text(_one_form(text).casefold())


def _without_marks(text: str) -> str:
    """Lower-case words without punctuation; symbols, and what belongs to a number or a short name, stay."""
    text = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), _without_quotes(_folded(text)))
    text = _UNIT_APART.sub("", _SIGN_APART.sub(r"\1", text))
    return " ".join(_MARK.sub(_kept_mark, text).split())


def _kept_mark(found: re.Match) -> str:
    char, before, after = found[0], found.string[: found.start()], found.string[found.end() :]
    is_inside = before[-1:].isnumeric() and after[:1].isnumeric()  # 1.5, 10:30, 1/2
    follows_word = bool(re.search(r"\w$", before))
    is_start = not follows_word and bool(_SIGNED.match(after) if char == "-" else char == "." and after[:1].isdigit())
    is_end = char == "-" and bool(_SHORT_NAME.search(before)) and not re.match(r"\w", after)
    is_symbol = unicodedata.category(char)[0] in "MS" or char in "%#&@\u2030"
    return char if is_inside or is_start or is_end or is_symbol else ""


def _without_articles(text: str) -> str:
    return " ".join(_ARTICLE.sub("", _without_marks(text)).split())


def _without_unit(found: re.Match) -> str:
    """Symbols go, but for those of arithmetic and of names such as C#."""
    char, follows_word = found[0], bool(re.search(r"\w$", found.string[: found.start()]))
    kind = unicodedata.category(char)
    is_kept = kind[0] in "MP" and char not in "%#&@\u2030" or kind == "Sm" and char not in "|~"
    return char if is_kept or (char in "#^" and follows_word) else ""


_STEPS = (
    plain_text,
    _without_stop,
    _without_quotes,
    _one_form,
    lambda text: _without_stop(_one_form(text)),
    lambda text: _without_quotes(_one_form(text)),
    _folded,
    lambda text: _without_stop(_folded(text)),
    lambda text: _without_quotes(_folded(text)),
    _without_marks,
    _without_articles,
    normalize_text,
)
