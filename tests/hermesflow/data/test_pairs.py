"""Which candidates become pairs, and what is said of the rest."""

import dataclasses
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermesflow.config import CurationConfig
from hermesflow.data.pairs import PAIRS_SCHEMA, PREVIOUS, REAL, SIDES, PairFile, make_pairs, pair_statistics, read_pairs
from hermesflow.data.records import Question, Record
from hermesflow.runtime.files import InputError, write_parquet

GOOD_IMAGES, GOOD_CAPTIONS = [0.2, 0.9, 0.5], [0.3, 1.0, 0.6]


def record(id: str = "a") -> Record:
    question = Question("what color is it ?", ("red", "blue"), "red", "color", "red")
    return Record(id, f"caption of {id}", "colors", (question,), codes=np.arange(4, dtype=np.int32))


def candidate(id: str, kind: str, index: int, score: float, codes: list[int], text: str | None = None) -> dict:
    return {"record_id": id, "kind": kind, "index": index, "token_ids": codes, "text": text, "score": score}


def images(scores: list[float], id: str = "a") -> list[dict]:
    return [candidate(id, "image", index, score, [index, 7, 7, 7]) for index, score in enumerate(scores)]


def captions(scores: list[float], id: str = "a") -> list[dict]:
    """Captions of equal score say the same."""
    return [
        candidate(id, "caption", index, score, [int(score * 1000)], f"text {score}")
        for index, score in enumerate(scores)
    ]


def table(rows: list[dict]) -> pa.Table:
    schema = pa.schema(
        [
            ("record_id", pa.string()),
            ("kind", pa.string()),
            ("index", pa.int32()),
            ("token_ids", pa.list_(pa.int32())),
            ("text", pa.string()),
            ("score", pa.float32()),
        ]
    )
    return pa.Table.from_pylist(rows, schema)


def choose(rows: list[dict], previous: pa.Table | None = None, **changes) -> tuple[list[dict], dict[str, str]]:
    """Pairs, and reasons by side, of the one record "a"."""
    pairs, rejected = make_pairs([record()], table(rows), CurationConfig(**{"margin": 0.2, **changes}), previous)
    return pairs.to_pylist(), {row["side"]: row["reason"] for row in rejected.to_pylist()}


def previous_pair(sides: str = "both") -> pa.Table:
    """A pair of an earlier round; its caption scores are 0.8 and 0.4."""
    row = dict.fromkeys(PAIRS_SCHEMA.names) | {"record_id": "a", "sides": sides}
    if sides != "understanding":
        row |= {"win_codes": [1, 1, 1, 1], "lose_codes": [2, 2, 2, 2], "win_image_score": 0.0, "lose_image_score": 0.0}
    if sides != "generation":
        row |= {"win_caption": "old win", "win_caption_ids": [1], "win_caption_score": 0.8}
        row |= {"lose_caption": "old lose", "lose_caption_ids": [2], "lose_caption_score": 0.4}
    return pa.Table.from_pylist([row], PAIRS_SCHEMA)


def previous_images(win: float, lose: float) -> list[dict]:
    """The same pair's images as the current judge sees them."""
    return [
        candidate("a", "previous_win", 0, win, [1, 1, 1, 1]),
        candidate("a", "previous_lose", 0, lose, [2, 2, 2, 2]),
    ]


def test_best_and_worst_of_both_sides() -> None:
    pairs, rejected = choose(images(GOOD_IMAGES) + captions(GOOD_CAPTIONS))
    assert not rejected
    (pair,) = pairs
    assert pair == {
        "record_id": "a",
        "category": "colors",
        "caption": "caption of a",
        "sides": "both",
        "record_codes": [0, 1, 2, 3],
        "win_codes": [1, 7, 7, 7],
        "lose_codes": [0, 7, 7, 7],
        "win_image_index": 1,
        "lose_image_index": 0,
        "win_image_score": pytest.approx(0.9),
        "lose_image_score": pytest.approx(0.2),
        "win_caption": "text 1.0",
        "lose_caption": "text 0.3",
        "win_caption_ids": [1000],
        "lose_caption_ids": [300],
        "win_caption_score": 1.0,
        "lose_caption_score": pytest.approx(0.3),
        "questions": ["what color is it ?"],
        "answers": ["red"],
        "choices": [["red", "blue"]],
        "record_image": None,
    }


def test_balanced_questions_take_the_place_of_the_record_s_own() -> None:
    asked = (Question("is it blue ?", ("yes", "no"), "no", "color", "blue"),)
    balanced = dataclasses.replace(record(), balanced_questions=asked)
    candidates = pa.Table.from_pylist(images(GOOD_IMAGES) + captions(GOOD_CAPTIONS))
    [pair] = make_pairs([balanced], candidates, CurationConfig())[0].to_pylist()
    assert (pair["questions"], pair["answers"], pair["choices"]) == (["is it blue ?"], ["no"], [["yes", "no"]])


def test_a_file_of_before_has_no_choices(tmp_path) -> None:
    pairs, _ = choose(images(GOOD_IMAGES) + captions(GOOD_CAPTIONS))
    old = pa.Table.from_pylist(pairs, PAIRS_SCHEMA).drop_columns(["choices"])
    write_parquet(tmp_path / "pairs.parquet", old)
    for read in (read_pairs(tmp_path / "pairs.parquet"), PairFile(tmp_path / "pairs.parquet").of([record()])):
        assert read.to_pylist() == [pairs[0] | {"choices": None}]


def test_ties_go_to_the_lower_index_whatever_the_order_of_rows() -> None:
    rows = images([0.2, 0.9, 0.9, 0.2]) + captions(GOOD_CAPTIONS)
    for order in (rows, rows[::-1]):
        ((pair,), _) = choose(order)
        assert (pair["win_image_index"], pair["lose_image_index"]) == (1, 0)


# Scores pass through float32, where 0.6 is more than 0.6, and 1 - 0.8 is less than 0.2 in float64.
@pytest.mark.parametrize(
    ("scores", "changes", "reason"),
    [
        ([0.61, 0.1], {}, None),
        ([0.6, 0.1], {}, "best image not above threshold: it scores 0.600, needed is more than 0.6"),
        ([0.3, 0.1], {}, "best image not above threshold: it scores 0.300, needed is more than 0.6"),
        ([0.3, 0.1], {"threshold": 0.2}, None),
        ([0.8, 1.0], {}, None),
        ([0.8, 0.7], {}, "margin of images too small: number 0 scores 0.800, number 1 0.700, needed is 0.2 more"),
        ([0.8, 0.7], {"margin": 0.1}, None),
        ([0.8, 0.8], {"margin": 0.0}, "win and lose images alike: number 0 and number 0"),
        ([], {}, "no images: there are no candidates"),
    ],
)
def test_images_need_threshold_and_margin(scores: list[float], changes: dict, reason: str | None) -> None:
    pairs, rejected = choose(images(scores) + captions(GOOD_CAPTIONS), **changes)
    if reason is None:
        assert [pair["sides"] for pair in pairs] == ["both"] and not rejected
    else:
        assert not pairs
        assert rejected == {"generation": reason, "understanding": "other side rejected: curation.keep is both"}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (captions([0.5, 0.52]), None),
        (captions([0.7, 0.7]), "all captions alike: all 2 say 'text 0.7'"),
        (
            captions([0.7, 0.705]),
            "margin of captions too small: number 1 scores 0.705, number 0 0.700, needed is 0.01 more",
        ),
        (  # other texts of one score: there is no better and no worse
            [candidate("a", "caption", 0, 0.5, [1], "x"), candidate("a", "caption", 1, 0.5, [2], "y")],
            "win and lose captions alike: number 0 and number 0",
        ),
        ([], "no captions: there are no candidates"),
    ],
)
def test_captions_need_a_difference(rows: list[dict], reason: str | None) -> None:
    pairs, rejected = choose(images(GOOD_IMAGES) + rows)
    if reason is None:
        assert [pair["sides"] for pair in pairs] == ["both"] and not rejected
    else:
        assert not pairs
        assert rejected == {"generation": "other side rejected: curation.keep is both", "understanding": reason}


def test_identical_tokens_never_pair() -> None:
    """Two judgments of one image may differ by rounding, but it cannot be better than itself."""
    rows = [candidate("a", "image", 0, 0.9, [1, 2]), candidate("a", "image", 1, 0.1, [1, 2])]
    _, rejected = choose(rows + captions(GOOD_CAPTIONS))
    assert rejected["generation"] == "win and lose images alike: number 0 and number 1"


@pytest.mark.parametrize(
    ("rows", "sides"),
    [
        (images(GOOD_IMAGES) + captions(GOOD_CAPTIONS), "both"),
        (images(GOOD_IMAGES) + captions([0.5, 0.5]), "generation"),
        (images([0.1, 0.2]) + captions(GOOD_CAPTIONS), "understanding"),
        (images([0.1, 0.2]) + captions([0.5, 0.5]), None),
    ],
)
def test_keep_any_keeps_the_good_side_alone(rows: list[dict], sides: str | None) -> None:
    pairs, rejected = choose(rows, keep="any")
    assert [pair["sides"] for pair in pairs] == ([sides] if sides else [])
    assert set(rejected) == set(SIDES) - (set(SIDES) if sides == "both" else {sides})
    for pair in pairs:
        assert (pair["win_codes"] is None) == (pair["lose_codes"] is None) == (sides == "understanding")
        assert (pair["win_caption"] is None) == (pair["lose_caption_ids"] is None) == (sides == "generation")


# The new best and what the current judge gives the previous win and lose; margin 0.2, threshold 0.6.
@pytest.mark.parametrize(
    ("best", "old_win", "old_lose", "lose", "lose_score"),
    [
        (0.9, 0.5, 0.2, "win", 0.5),  # beats the previous win, which becomes the lose
        (0.9, 0.7, 0.2, "win", 0.7),  # by just the margin
        (0.9, 0.8, 0.2, "lose", 0.2),  # above the previous win, but not by the margin
        (0.9, 1.0, 0.2, "lose", 0.2),  # below it: the published script would still take it
        (0.9, 1.0, 0.8, None, None),  # beats neither by the margin
        (0.7, 1.0, 0.9, None, None),  # below both: here the published script inverts the pair
        (0.6, 0.1, 0.0, None, None),  # not above the threshold
    ],
)
def test_update_rule_for_images(
    best: float, old_win: float, old_lose: float, lose: str | None, lose_score: float | None
) -> None:
    rows = images([0.0, best, 0.3]) + previous_images(old_win, old_lose)
    pairs, rejected = choose(rows, previous_pair("generation"), keep="any")
    if lose is None:
        assert not pairs
        expected = "best image not above threshold" if best == 0.6 else "margin of images too small: number 1 scores"
        assert rejected["generation"].startswith(expected)
        return
    (pair,) = pairs
    assert pair["win_codes"] == [1, 7, 7, 7] and pair["win_image_index"] == 1
    assert pair["lose_codes"] == ([1, 1, 1, 1] if lose == "win" else [2, 2, 2, 2])
    assert pair["lose_image_index"] == PREVIOUS
    assert pair["lose_image_score"] == pytest.approx(lose_score)


# The previous captions score 0.8 and 0.4; captions need 0.01 more.
@pytest.mark.parametrize(
    ("best", "lose"),
    [(0.9, "old win"), (0.805, "old lose"), (0.6, "old lose"), (0.405, None), (0.2, None)],
)
def test_update_rule_for_captions(best: float, lose: str | None) -> None:
    pairs, rejected = choose(captions([0.1, best]), previous_pair("understanding"), keep="any")
    assert [pair["lose_caption"] for pair in pairs] == ([lose] if lose else [])
    if lose is None:
        reason = rejected["understanding"]
        assert re.match("margin of captions too small: number 1 scores .*, the previous 0.400", reason)


def test_update_rule_takes_captions_that_are_all_alike() -> None:
    """The model has learnt to say one good thing; what it said before still stands below."""
    ((pair,), _) = choose(captions([1.0, 1.0]), previous_pair("understanding"), keep="any")
    assert (pair["win_caption"], pair["lose_caption"]) == ("text 1.0", "old win")


def test_repeating_the_previous_win_is_paired_with_the_previous_lose() -> None:
    rows = [candidate("a", "caption", 0, 0.8, [1], "old win"), candidate("a", "caption", 1, 0.1, [9], "other")]
    ((pair,), _) = choose(rows, previous_pair("understanding"), keep="any")
    assert (pair["win_caption"], pair["lose_caption"]) == ("old win", "old lose")


def test_a_side_without_a_previous_pair_takes_its_own_worst() -> None:
    rows = images(GOOD_IMAGES) + captions(GOOD_CAPTIONS) + previous_images(0.1, 0.0)
    ((pair,), _) = choose(rows, previous_pair("generation"))
    assert pair["lose_codes"] == [1, 1, 1, 1]
    assert pair["lose_caption"] == "text 0.3"


def test_previous_pairs_must_have_been_scored_again() -> None:
    with pytest.raises(ValueError, match="make_pairs: expected a candidate 'previous_win' of record 'a', got none"):
        choose(images(GOOD_IMAGES), previous_pair("generation"))


def test_a_record_needs_codes() -> None:
    bare = Record("a", "caption", "colors", record().questions)
    with pytest.raises(ValueError, match="make_pairs: expected codes in record 'a', got none; encode its image first"):
        make_pairs([bare], table(images(GOOD_IMAGES) + captions(GOOD_CAPTIONS)), CurationConfig())


SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.65, 0.8, 1.0]), max_size=4)


@settings(deadline=None, max_examples=60)
@given(
    data=st.lists(st.tuples(SCORES, SCORES), max_size=5),
    keep=st.sampled_from(["both", "any"]),
    threshold=st.sampled_from([0.0, 0.6]),
    margin=st.sampled_from([0.0, 0.2]),
)
def test_every_side_is_kept_or_rejected_and_pairs_are_homologous(
    data: list, keep: str, threshold: float, margin: float
) -> None:
    records = [record(f"record-{index}") for index in range(len(data))]
    # A token of each candidate names its record, so that a mix of two records would show.
    rows = []
    for index, (item, (image_scores, caption_scores)) in enumerate(zip(records, data, strict=True)):
        rows += [row | {"token_ids": [index, *row["token_ids"]]} for row in images(image_scores, item.id)]
        rows += [row | {"token_ids": [index, *row["token_ids"]]} for row in captions(caption_scores, item.id)]
    config = CurationConfig(keep=keep, threshold=threshold, margin=margin)
    pairs, rejected = make_pairs(records, table(rows[::-1]), config)
    covered = [(row["record_id"], row["side"]) for row in rejected.to_pylist()]
    for pair in pairs.to_pylist():
        index = int(pair["record_id"].removeprefix("record-"))
        assert pair["caption"] == records[index].caption
        both = pair["sides"] == "both"
        assert both or keep == "any"
        if both or pair["sides"] == "generation":
            covered.append((pair["record_id"], "generation"))
            assert pair["win_codes"][0] == pair["lose_codes"][0] == index
            assert pair["win_codes"] != pair["lose_codes"]
            assert pair["win_image_score"] > max(threshold, pair["lose_image_score"])
            assert pair["win_image_score"] - pair["lose_image_score"] >= margin - 1e-6
        if both or pair["sides"] == "understanding":
            covered.append((pair["record_id"], "understanding"))
            assert pair["win_caption_ids"][0] == pair["lose_caption_ids"][0] == index
            assert pair["win_caption"] != pair["lose_caption"]
            assert pair["win_caption_score"] > pair["lose_caption_score"]
    assert sorted(covered) == sorted((item.id, side) for item in records for side in SIDES)
    statistics = pair_statistics(pairs, rejected)
    assert statistics["records"] == len(records) and statistics["kept"] == len(pairs)
    assert sum(statistics["rejected"].values()) == len(rejected)


def test_statistics_group_reasons_without_their_numbers() -> None:
    records = [record("a"), record("b"), record("c"), record("d")]
    rows = images([0.1, 0.2], "a") + images([0.3, 0.4], "b") + images(GOOD_IMAGES, "c") + images(GOOD_IMAGES, "d")
    rows += [row for id in "abc" for row in captions(GOOD_CAPTIONS, id)] + captions([0.5, 0.5], "d")
    pairs, rejected = make_pairs(records, table(rows), CurationConfig(keep="any"))
    assert pair_statistics(pairs, rejected) == {
        "records": 4,
        "kept": 4,
        "both": 1,
        "generation": 1,
        "understanding": 2,
        "rejected": {"generation: best image not above threshold": 2, "understanding: all captions alike": 1},
    }


def test_no_records_no_pairs() -> None:
    pairs, rejected = make_pairs([], table([]), CurationConfig())
    assert (len(pairs), len(rejected)) == (0, 0)
    assert pair_statistics(pairs, rejected)["rejected"] == {}


def test_pairs_pass_through_a_file(tmp_path) -> None:
    rows = images(GOOD_IMAGES) + captions([0.5, 0.5])
    pairs, _ = make_pairs([record()], table(rows), CurationConfig(keep="any"))
    write_parquet(tmp_path / "pairs.parquet", pairs)
    assert read_pairs(tmp_path / "pairs.parquet").equals(pairs)


def test_a_file_without_pairs_is_refused(tmp_path) -> None:
    path = tmp_path / "pairs.parquet"
    write_parquet(path, pa.table({"record_id": ["a"]}))
    with pytest.raises(InputError, match=r"pairs\.parquet: has no column 'category'"):
        read_pairs(path)
    write_parquet(path, pa.table({name: ["x"] for name in PAIRS_SCHEMA.names}))
    with pytest.raises(InputError, match=r"pairs\.parquet: damaged pairs file"):
        read_pairs(path)


def real(score: float, codes: tuple[int, ...] = (0, 1, 2, 3)) -> dict:
    return candidate("a", "real", 0, score, list(codes))


def test_the_real_image_wins_where_it_is_to() -> None:
    (pair,), _ = choose(images(GOOD_IMAGES) + captions(GOOD_CAPTIONS) + [real(0.95)], win_image="real")
    assert (pair["win_codes"], pair["win_image_index"]) == ([0, 1, 2, 3], REAL)
    assert pair["win_image_score"] == pytest.approx(0.95) and pair["lose_codes"] == [0, 7, 7, 7]
    # It must score like any other win.
    _, reasons = choose(images(GOOD_IMAGES) + captions(GOOD_CAPTIONS) + [real(0.5)], win_image="real", keep="any")
    assert reasons["generation"].startswith("best image not above threshold")
    _, reasons = choose(images([0.9]) + [real(0.95)], win_image="real", keep="any")
    assert reasons["generation"].startswith("margin of images too small: the real one scores 0.950, number 0 0.900")
    with pytest.raises(ValueError, match="expected a candidate 'real' of record 'a', got none; give curate these"):
        choose(images(GOOD_IMAGES), win_image="real")


def test_a_caption_of_like_wording_loses_where_it_is_to() -> None:
    texts = [("a red circle on white", 1.0), ("a blue circle on white", 0.5), ("nothing at all", 0.0), ("red", 0.999)]
    rows = [candidate("a", "caption", index, score, [index], text) for index, (text, score) in enumerate(texts)]
    (worst,), _ = choose(rows, keep="any")
    (alike,), _ = choose(rows, keep="any", lose_caption="alike")
    assert worst["lose_caption"] == "nothing at all" and alike["lose_caption"] == "a blue circle on white"
    assert worst["win_caption"] == alike["win_caption"] == "a red circle on white"
    # Nothing that scores lower: as before.
    same = [candidate("a", "caption", index, 1.0, [index], text) for index, (text, _) in enumerate(texts)]
    _, reasons = choose(same, keep="any", lose_caption="alike")
    assert reasons["understanding"].startswith("win and lose captions alike")
