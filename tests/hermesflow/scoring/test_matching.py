"""The choice that a free answer means, and texts that are the same but for their writing."""

import random
import re

import pytest

from hermesflow.scoring.matching import find_choice, normalize_text

MEANT = {
    "end of a sentence": [("A.", "A B", "A"), ("Yes!", "yes no", "yes"), ("red。", "red blue", "red")],
    "nothing": [("", "a b", None), ("...", "? !", None)],
    "marks around it": [("**A**", "A B", "A"), ("(B)", "A B", "B"), ('"red".', "red blue", "red"), ("«A»", "A B", "A")],
    "exact first": [("Red", "red Red", "Red"), ("A-", "A A- A+", "A-"), ("C++", "C C++", "C++")],
    "several are none": [("Red", "RED red", None), ("b.", "B! B?", None), ("1,5", "15 1.5", None)],
    "a repeat is one": [("Red.", "red red", "red"), ("CAFE\u0301", "caf\u00e9 cafe\u0301", "caf\u00e9")],
    "points": [("1.5.", "15 1.5", "1.5"), ("1.5", "15 2", None), ("15", "1.5 2", None), (".5.", "5 .5", ".5")],
    "numbers": [("1,000", "100 1000", "1000"), ("1-2", "12 3", None), ("10:30", "1030 9", None), ("1/2", "12 2", None)],
    "powers": [("10²", "102 10", None), ("x².", "x2 x²", "x²"), ("1½", "11/2 1½", "1½"), ("50%", "50 25", "50")],
    "signs": [("-1", "1 2", None), ("1", "-1 0", None), ("-1.", "1 -1", "-1"), ("- 1", "1 2", None)],
    "kinds of minus": [("\u22121", "1 -1", "-1"), ("\uff0d1", "1 -1", "-1")],
    "a minus before a mark": [("\u20135", "5 -5", "-5"), ("-$5", "$5", None)],
    "plus": [("+1", "1 -1", "1"), ("+1.", "1 +1", "+1"), ("+1", "-1 2", None)],
    "grades": [("A+", "A B", None), ("a+.", "A A+", "A+")],
    "comparisons": [("<5", "5 >5", None), ("<5.", "<5 >5", "<5"), ("c", "C++ C#", None), ("C#.", "C C#", "C#")],
    "articles": [("the cat", "cat dog", "cat"), ("a", "A B", "A"), ("an", "A B", None), ("the", "a b", None)],
    "composed": [("cafe\u0301.", "cafe caf\u00e9", "caf\u00e9"), ("cafe", "caf\u00e9 tea", None)],
    "full width": [("Ａ", "A a", "A"), ("Ａ．", "A B", "A"), ("１．５", "15 1.5", "1.5")],
    "half width": [("ｶﾞﾗｽ", "ガラス 木", "ガラス")],
    "other writing": [("हिंदी.", "हद हिंदी", "हिंदी"), ("是。", "是 否", "是"), ("STRASSE", "straße weg", "straße")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "choices", "meant"), [case for cases in MEANT.values() for case in cases],
    ids=[f"{kind} {number}" for kind, cases in MEANT.items() for number, _ in enumerate(cases)],
)  # fmt: skip
def test_an_answer_means_a_choice_or_none(answer, choices, meant):
    choices = choices.split()
    index = find_choice(answer, choices)
    assert (choices[index] if index >= 0 else None) == meant
    assert find_choice(answer, choices[::-1]) == (len(choices) - 1 - index if index >= 0 else -1) or meant in (
        "red",  # of repeats the first
        "caf\u00e9",
    )


def test_choices_of_several_words():
    assert find_choice("Option", ["Option A", "Option B"]) == -1
    assert find_choice("the light-blue cat.", ["a lightblue cat", "cat"]) == 0
    assert find_choice("50 %", ["50", "50%"]) == 1
    assert find_choice("yes", [" yes", "yes "]) == 0


def test_words_without_numbers_normalize_as_in_squad():
    rng = random.Random(0)
    words = 'a An the red, light-blue it\'s (two) "cat" dog. runs; on_the 3 12 over! of: theatre'.split()
    for _ in range(500):
        text = " ".join([*rng.choices(words, k=6), "end"])
        squad = re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[^\w\s]|_", "", text.lower()))
        assert normalize_text(text) == " ".join(squad.split())
