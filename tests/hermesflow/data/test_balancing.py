"""Each yes in a data set gets a no from other records' things; one-sided data sets are reported."""

import pytest

from hermesflow.data.balancing import THINGS, balance_questions, yes_share
from hermesflow.data.records import Question, Record
from hermesflow.report.tables import describe_one_sided

YES_NO = ("yes", "no")
THINGS_SHOWN = ("dog", "red car", "two cats", "tree", "child", "pizza", "boat", "horse")


def thing(name, answer="yes", element_type="object", choices=YES_NO):
    return Question(f"is there a {name} ?", choices, answer, element_type, name)


def record_of(index, *questions, caption=None):
    caption = caption or " ".join(["a picture of", *(question.element for question in questions)])
    return Record(f"r{index}", caption, "other", tuple(questions))


def records_of_things(count=40, **options):
    """Each record shows two neighboring things."""
    names = [THINGS_SHOWN[index % len(THINGS_SHOWN)] for index in range(count + 1)]
    return [record_of(index, *(thing(name, **options) for name in names[index : index + 2])) for index in range(count)]


def asked_no(record):
    return [question for question in record.balanced_questions if question.answer.lower() == "no"]


def test_each_yes_gets_a_no_about_what_the_record_does_not_name():
    records = records_of_things()
    assert yes_share(records) == 1
    balanced = balance_questions(records)
    assert yes_share(balanced) == 0.5
    for before, after in zip(records, balanced, strict=True):
        assert after.questions == before.questions == after.balanced_questions[:2]
        absent = asked_no(after)
        assert len({question.question for question in absent}) == 2
        assert not any(word in before.caption.split() for question in absent for word in question.element.split())
    again = balance_questions(records)
    assert [record.balanced_questions for record in again] == [record.balanced_questions for record in balanced]


def test_every_thing_is_asked_for_where_it_is_not():
    balanced = balance_questions(records_of_things())
    assert {question.element for record in balanced for question in asked_no(record)} == set(THINGS_SHOWN)


def test_what_is_named_in_other_words_is_not_asked_for():
    """Plurals, another case, and the caption alone."""
    shown = record_of(0, thing("dog"), caption="A dog, CATS, boxes, cherries and two children under a Tree.")
    names = ("cat", "tree", "box", "cherry", "child", "boat", "boats")
    others = [record_of(index, thing(name)) for index, name in enumerate(names, 1)]
    first, *_ = balance_questions([shown, *others])
    assert [question.element.removesuffix("s") for question in asked_no(first)] == ["boat"]


def test_questions_with_other_choices_stay_and_get_no_other_side():
    color = Question("what color is it ?", ("red", "blue"), "red", "color", "red")
    records = [record_of(0, color), *records_of_things(8)]
    first, *others = balance_questions(records)
    assert first.balanced_questions == () and first.image_questions == (color,)
    assert yes_share(others) == 0.5 and yes_share([first]) is None


def test_a_no_that_is_there_counts():
    records = [record_of(0, thing("dog"), thing("boat", answer="no")), *records_of_things(8)]
    assert balance_questions(records)[0].balanced_questions == ()


def test_answers_keep_the_words_of_their_choices():
    records = records_of_things(8, answer="Yes", choices=("Yes", "No"))
    assert {question.answer for record in balance_questions(records) for question in asked_no(record)} == {"No"}


@pytest.mark.parametrize("choices", [("yes", "no", "yes"), ("YES", "yes", "No"), (" yes", "no ")])
def test_repeats_and_blanks_of_yes_and_no_count_as_one(choices):
    records = records_of_things(8, answer=choices[0], choices=choices)
    balanced = balance_questions(records)
    assert yes_share(records) == 1 and yes_share(balanced) == 0.5


def test_things_are_compared_in_one_unicode_form():
    shown = record_of(0, thing("dog"), caption="a dog in a caf\u00e9")
    first, *_ = balance_questions([shown, record_of(1, thing("cafe\u0301"))])
    assert asked_no(first) == []


def test_balanced_questions_of_a_record_are_kept():
    own = (thing("ghost", answer="no"),)
    given = [Record("a", "a dog", "other", (thing("dog"),), balanced_questions=own), *records_of_things(8)]
    assert balance_questions(given)[0].balanced_questions == own


@pytest.mark.parametrize(
    "options", [{"element_type": "activity"}, {"element_type": ""}], ids=["no things", "no element type"]
)
def test_where_nothing_fits_the_questions_stay_one_sided(options):
    records = balance_questions(records_of_things(8, **options))
    assert yes_share(records) == 1 and "100.0 % of the yes-or-no questions" in describe_one_sided(1.0)
    assert all(thing in describe_one_sided(0.0) for thing in THINGS)


def test_a_balanced_data_set_goes_without_a_word():
    assert describe_one_sided(yes_share(balance_questions(records_of_things(8)))) == ""
    assert describe_one_sided(yes_share(balance_questions([]))) == ""
