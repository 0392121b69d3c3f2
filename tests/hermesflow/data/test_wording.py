"""Words of captions in every writing and Unicode form."""

import re
import unicodedata
from collections import Counter

import pytest

from hermesflow.data.wording import overlap_f1, split_words, token_f1
from hermesflow.runtime.text import plain_text

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
WORDS = {
    "Chinese": ("红色的圆形。", ["红", "色", "的", "圆", "形"]),
    "Japanese": ("赤いボール、ｶﾞﾗｽ", ["赤", "い", "ボ", "ー", "ル", "ガ", "ラ", "ス"]),
    "Thai": ("สีแดง", ["สี", "แ", "ด", "ง"]),
    "Khmer": ("រូបភាព", ["រូ", "ប", "ភា", "ព"]),
    "among letters": ("a红circle圆", ["a", "红", "circle", "圆"]),
    "Korean has blanks": ("빨간 원", ["빨간", "원"]),
    "Hindi has blanks": ("हिंदी में", ["हिंदी", "में"]),
    "accents": ("Café crème", ["café", "crème"]),
    "full width": ("Ａ ｒｅｄ　ＣＡＴ", ["a", "red", "cat"]),
    "ligature": ("a ﬁne dog", ["a", "fine", "dog"]),
    "fraction": ("½ cup", ["1⁄2", "cup"]),
    "no words": ("… 。・!", []),
}


@pytest.mark.parametrize(("text", "words"), WORDS.values(), ids=WORDS.keys())
def test_words_are_the_same_in_every_unicode_form(text, words):
    for form in FORMS:
        written = unicodedata.normalize(form, text)
        assert [unicodedata.normalize("NFC", word) for word in split_words(written)] == [
            unicodedata.normalize("NFC", unicodedata.normalize("NFKC", word)) for word in words
        ]
        assert token_f1(written, text) == (1 if words else 0)


@pytest.mark.parametrize("text", ["红色的圆形", "赤い丸の絵", "วงกลมสีแดง"], ids=["Chinese", "Japanese", "Thai"])
def test_a_letter_less_lowers_the_score_a_little(text):
    assert 0.7 < token_f1(text[:-1], text) < 1
    assert token_f1("x", text) == 0
    assert 0 < token_f1(text[::-1], text) < token_f1(text[:-1], text)


ENGLISH = [
    "A red circle, above a blue square!",
    "it's the dog's 2nd \u201cball\u201d \u2014 at 10:30 \u2026",
    "snake_case 3.5 x-ray, don\u2019t",
    "a Lego\u2122 set, 50 % off for \u20ac5",
    "",
]


@pytest.mark.parametrize("text", ENGLISH)
def test_english_is_split_as_ever(text):
    """The regular expression that recorded results were made with."""
    words = re.findall(r"\w+", text.lower())
    assert split_words(text) == words
    grams = Counter(words) + Counter(zip(words, words[1:], strict=False))
    other = Counter(["a", "red", "dog", ("a", "red"), ("red", "dog")])
    assert token_f1(text, "a red dog") == overlap_f1(grams, other)


def test_a_plain_text_is_one_for_each_way_to_write_it():
    assert len({plain_text(text) for text in (" caf\u00e9  au", "cafe\u0301\u00a0au ", "caf\u200b\u00e9 au")}) == 1
    assert len({plain_text(text) for text in ("a", "A", "\uff21", "a.")}) == 4
