"""Candidates: what is drawn, that it is reproducible, and that a killed run ends with the same result."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from hermesflow.config import ANSWER_SCORERS, CAPTION_SCORERS, CurationConfig
from hermesflow.curation import CANDIDATES_SCHEMA, caption_sampling, curate
from hermesflow.data.pairs import PAIRS_SCHEMA, PairFile, make_pairs
from hermesflow.data.records import Record
from hermesflow.data.wording import token_f1
from hermesflow.models.model import Model, PromptFormat
from hermesflow.runtime.files import InputError, read_parquet, write_parquet
from hermesflow.runtime.seeds import candidate_seed
from hermesflow.scoring.scorers import Scorers
from hermesflow.scoring.self_answers import self_vqa
from hermesflow.worlds.pretraining import SAMPLING as TINY_SAMPLING

CONFIG = CurationConfig(
    guidance_scale=1.0,
    mask_temperature=3.0,
    num_images=3,
    num_steps=3,
    caption_temperatures=(0.7, 1.0),
    caption_top_k=(2, 0),
    batch_records=3,
    threshold=0.0,
    margin=1e-4,
    keep="any",
)


def curate_all(*args, **kwargs) -> pa.Table:
    """All candidates in one table."""
    return pa.concat_tables([CANDIDATES_SCHEMA.empty_table(), *(table for _, table in curate(*args, **kwargs))])


@pytest.fixture(scope="module")
def short_captions(shared_tiny_model: Model) -> Iterator[PromptFormat]:
    """A model of random weights seldom ends a caption by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_tiny_model, "prompts", replace(shared_tiny_model.prompts, max_caption_tokens=6))
        yield shared_tiny_model.prompts


@pytest.fixture
def tiny_model(tiny_model: Model, short_captions: PromptFormat) -> Model:
    """The model of each test, with short captions."""
    tiny_model.prompts = short_captions
    return tiny_model


@pytest.fixture(scope="module")
def made_once(
    shared_tiny_model: Model, tiny_records: list[Record], short_captions: PromptFormat, tmp_path_factory
) -> tuple[pa.Table, Path]:
    """The seven records' candidates, made in parts of 3, 3 and 1, and the folder of the parts."""
    folder = tmp_path_factory.mktemp("curation") / "candidates"
    return curate_all(shared_tiny_model, tiny_records, CONFIG, seed=5, folder=folder), folder


@pytest.fixture
def candidates(made_once: tuple[pa.Table, Path], tmp_path: Path) -> pa.Table:
    """The same, with the parts copied to tmp_path / "candidates"."""
    shutil.copytree(made_once[1], tmp_path / "candidates")
    return made_once[0]


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def drawn(table: pa.Table) -> pa.Table:
    """Everything but scores, which may differ in the last bits between batches of another size."""
    return table.drop_columns(["score", "answers"])


def test_every_record_has_its_candidates(candidates: pa.Table, tiny_records: list[Record], tmp_path: Path) -> None:
    assert candidates.schema == CANDIDATES_SCHEMA
    assert parts(tmp_path / "candidates") == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    rows = candidates.to_pylist()
    expected = [("image", index) for index in range(3)] + [("caption", index) for index in range(5)]
    assert [(row["record_id"], row["kind"], row["index"]) for row in rows] == [
        (record.id, *item) for record in tiny_records for item in expected
    ]
    assert [row["seed"] for row in rows] == [
        candidate_seed(5, row["record_id"], row["kind"], row["index"]) for row in rows
    ]
    for row in rows:
        assert 0 <= row["score"] <= 1
        if row["kind"] == "image":
            assert len(row["token_ids"]) == 16 and row["text"] is None
            assert json.loads(row["settings"]) == asdict(
                replace(TINY_SAMPLING, num_steps=3, guidance_scale=1.0, mask_temperature=3.0, temperature=1.0)
            )
        else:
            assert row["text"] is not None and row["answers"] == "[]"
    settings = [tuple(json.loads(row["settings"]).values()) for row in rows[3:8]]  # temperature, top_k
    assert settings == [(0, 0), (0.7, 2), (1.0, 2), (0.7, 0), (1.0, 0)]


def test_parts_on_disk_are_the_result(candidates: pa.Table, tmp_path: Path) -> None:
    files = sorted((tmp_path / "candidates").glob("part-*.parquet"))
    assert pa.concat_tables([read_parquet(file) for file in files]).equals(candidates)


def test_images_are_scored_by_the_models_answers(
    candidates: pa.Table, tiny_model: Model, tiny_records: list[Record], tmp_path: Path
) -> None:
    rows = [row for row in candidates.to_pylist() if row["kind"] == "image"]
    codes = torch.tensor([row["token_ids"] for row in rows]).reshape(len(tiny_records), 3, 16)
    scores = [score for of_record in self_vqa(tiny_model, codes, tiny_records) for score in of_record]
    assert [row["score"] for row in rows] == pytest.approx([score.soft for score in scores], abs=1e-5)
    for row, score in zip(rows, scores, strict=True):
        answers = json.loads(row["answers"])
        assert [answer["question"] for answer in answers] == [answer.question for answer in score.answers]
        assert [answer["answer"] for answer in answers] == [answer.answer for answer in score.answers]
        assert [answer["probability"] for answer in answers] == pytest.approx(
            [answer.probability for answer in score.answers], abs=1e-5
        )
    hard = curate_all(tiny_model, tiny_records, replace(CONFIG, score="hard"), seed=5, folder=tmp_path / "hard")
    hard_scores = [row["score"] for row in hard.to_pylist() if row["kind"] == "image"]
    assert hard_scores == pytest.approx([score.hard for score in scores])


def test_captions_are_scored_against_the_true_one(candidates: pa.Table, tiny_records: list[Record]) -> None:
    truths = {record.id: record.caption for record in tiny_records}
    rows = [row for row in candidates.to_pylist() if row["kind"] == "caption"]
    assert len({row["text"] for row in rows}) > 20
    for row in rows:
        assert row["score"] == pytest.approx(token_f1(row["text"], truths[row["record_id"]]))


@pytest.mark.parametrize("scorer", CAPTION_SCORERS)
def test_captions_by_every_scorer(
    shared_tiny_model: Model, short_captions, tiny_records: list[Record], tiny_encoder: str, tmp_path: Path, scorer: str
) -> None:
    config = replace(CONFIG, caption_scorer=scorer, bert_model=tiny_encoder, sentence_model=tiny_encoder)
    table = curate_all(shared_tiny_model, tiny_records[:4], config, seed=5, folder=tmp_path / "candidates")
    scorers, rows = Scorers(config), [row for row in table.to_pylist() if row["kind"] == "caption"]
    for record in tiny_records[:4]:
        mine = [row for row in rows if row["record_id"] == record.id]
        [scores] = scorers.score_captions([[row["text"] for row in mine]], [record.caption])
        assert [row["score"] for row in mine] == pytest.approx(scores, abs=1e-5)
    assert len({row["score"] for row in rows}) > 1 or scorer in ("exact", "normalized", "normalised")


@pytest.mark.parametrize("scorer", ANSWER_SCORERS)
def test_images_by_every_scorer(
    shared_tiny_model: Model, short_captions, tiny_records: list[Record], tiny_encoder: str, tmp_path: Path, scorer: str
) -> None:
    config = replace(CONFIG, answer_scorer=scorer, sentence_model=tiny_encoder)
    table = curate_all(shared_tiny_model, tiny_records[:4], config, seed=5, folder=tmp_path / "candidates")
    rows = [row for row in table.to_pylist() if row["kind"] == "image"]
    codes = torch.tensor([row["token_ids"] for row in rows]).reshape(4, 3, 16)
    scores = self_vqa(shared_tiny_model, codes, tiny_records[:4], Scorers(config).match_answers)
    assert [row["score"] for row in rows] == pytest.approx([score.soft for of in scores for score in of], abs=1e-5)
    answers = [answer for row in rows for answer in json.loads(row["answers"])]
    if scorer != "likelihood":
        assert {answer["probability"] for answer in answers} <= {0.0, 1.0}


def test_real_images_are_scored_where_they_are_to_win(
    shared_tiny_model: Model, short_captions, tiny_records: list[Record], tmp_path: Path
) -> None:
    records, config = tiny_records[:3], replace(CONFIG, win_image="real")
    table = curate_all(shared_tiny_model, records, config, seed=5, folder=tmp_path / "candidates")
    rows = [row for row in table.to_pylist() if row["kind"] == "real"]
    assert [row["token_ids"] for row in rows] == [record.codes.tolist() for record in records]
    codes = torch.tensor([row["token_ids"] for row in rows])[:, None]
    scores = self_vqa(shared_tiny_model, codes, records)
    assert [row["score"] for row in rows] == pytest.approx([score.soft for [score] in scores], abs=1e-5)
    pairs, _ = make_pairs(records, table, config)
    of_images = [row for row in pairs.to_pylist() if row["win_codes"]]
    assert all(row["win_codes"] == row["record_codes"] for row in of_images)


def test_a_scorer_that_is_not_there_is_told_before_any_work(
    shared_tiny_model: Model, tiny_records: list[Record], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(shared_tiny_model.engine, "generate", None)
    config = replace(CONFIG, answer_scorer="no_such_module:f")
    with pytest.raises(InputError, match="curation.answer_scorer no_such_module:f: the module no_such_module cannot"):
        curate_all(shared_tiny_model, tiny_records, config, seed=5, folder=tmp_path / "candidates")


def test_captions_are_of_the_records_image(candidates: pa.Table, tiny_model: Model, tiny_records: list[Record]) -> None:
    question, greedy = tiny_model.caption_prompt(), caption_sampling(CONFIG, 6)[:1]
    for record in tiny_records:
        codes = torch.from_numpy(record.codes.astype(np.int64))[None]
        seeds = torch.zeros(1, 1, 1, dtype=torch.int64)
        (((ids,),),) = tiny_model.engine.generate_text(codes, [[question]], sampling=greedy, seeds=seeds)
        (row,) = (
            row
            for row in candidates.to_pylist()
            if (row["record_id"], row["kind"], row["index"]) == (record.id, "caption", 0)
        )
        assert row["token_ids"] == ids


@pytest.mark.parametrize("batch_records", [1, 2, 7, 32])
def test_batches_change_nothing(
    candidates: pa.Table, tiny_model: Model, tiny_records: list[Record], tmp_path: Path, batch_records: int
) -> None:
    config = replace(CONFIG, batch_records=batch_records)
    other = curate_all(tiny_model, tiny_records, config, seed=5, folder=tmp_path / "other")
    assert drawn(other).equals(drawn(candidates))
    assert np.allclose(other["score"].to_numpy(), candidates["score"].to_numpy(), rtol=0, atol=1e-5)


def test_order_and_company_of_records_change_nothing(
    candidates: pa.Table, tiny_model: Model, tiny_records: list[Record], tmp_path: Path
) -> None:
    other = curate_all(tiny_model, tiny_records[5:2:-1], CONFIG, seed=5, folder=tmp_path / "other")
    for record in tiny_records[3:6]:
        mine, theirs = (
            [row for row in drawn(table).to_pylist() if row["record_id"] == record.id] for table in (other, candidates)
        )
        assert mine == theirs


def test_another_seed_draws_others(
    candidates: pa.Table, tiny_model: Model, tiny_records: list[Record], tmp_path: Path
) -> None:
    other = curate_all(tiny_model, tiny_records, CONFIG, seed=6, folder=tmp_path / "other")
    assert other["seed"].to_pylist() != candidates["seed"].to_pylist()
    mine, theirs = ({tuple(ids) for ids in table["token_ids"].to_pylist()} for table in (other, candidates))
    assert len(mine & theirs) < len(mine) / 2


def test_seeds_are_63_bits_and_differ() -> None:
    seeds = [
        candidate_seed(seed, id, kind, index)
        for seed in (0, 1, 2**63 - 1)
        for id in ("a", "a|image", 'a", "image')
        for kind in ("image", "caption")
        for index in range(20)
    ]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0 and max(seeds) < 2**63 and max(seeds) > 2**62
    assert candidate_seed(0, "train-000000", "image", 0) == candidate_seed(0, "train-000000", "image", 0)


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 1, 2)])
def test_lost_parts_come_back_the_same(
    candidates: pa.Table, tiny_model: Model, tiny_records: list[Record], tmp_path: Path, lost: tuple[int, ...]
) -> None:
    folder = tmp_path / "candidates"
    for number in lost:
        (folder / f"part-{number:05d}.parquet").unlink()
    assert curate_all(tiny_model, tiny_records, CONFIG, seed=5, folder=folder).equals(candidates)


@pytest.mark.parametrize("stage", ["generate", "generate_text", "score_choices"])
def test_a_killed_run_goes_on_and_ends_the_same(
    candidates: pa.Table, tiny_model: Model, tiny_records: list[Record], tmp_path: Path, monkeypatch, stage: str
) -> None:
    folder, calls = tmp_path / "killed", Counter()
    work = getattr(tiny_model.engine, stage)

    def killed_at_second_call(*args, **kwargs):
        calls[stage] += 1
        if calls[stage] == 2:
            raise KeyboardInterrupt
        return work(*args, **kwargs)

    monkeypatch.setattr(tiny_model.engine, stage, killed_at_second_call)
    with pytest.raises(KeyboardInterrupt):
        curate_all(tiny_model, tiny_records, CONFIG, seed=5, folder=folder)
    assert parts(folder) == ["part-00000.parquet"]
    assert curate_all(tiny_model, tiny_records, CONFIG, seed=5, folder=folder).equals(candidates)
    assert calls[stage] == 4  # the first part, the one that was killed, and the two that were missing


def test_finished_parts_need_no_model(
    candidates: pa.Table, tiny_model: Model, tiny_records: list[Record], tmp_path: Path, monkeypatch
) -> None:
    for name in ("generate", "generate_text", "score_choices"):
        monkeypatch.setattr(tiny_model.engine, name, None)
    chosen = replace(CONFIG, threshold=0.9, margin=0.5, keep="both")  # these only choose among candidates
    assert curate_all(tiny_model, tiny_records, chosen, seed=5, folder=tmp_path / "candidates").equals(candidates)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_part_is_named(
    candidates: pa.Table, tiny_model: Model, tiny_records: list[Record], tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "candidates" / "part-00001.parquet"
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"not a table"}[damage])
    with pytest.raises(InputError, match=r"part-00001\.parquet: damaged Parquet file \(.*delete it and run the same"):
        curate_all(tiny_model, tiny_records, CONFIG, seed=5, folder=tmp_path / "candidates")


def test_a_part_with_other_columns_is_named(
    candidates: pa.Table, tiny_model: Model, tiny_records: list[Record], tmp_path: Path
) -> None:
    path = tmp_path / "candidates" / "part-00001.parquet"
    table = read_parquet(path)
    write_parquet(path, table.drop_columns(["score"]))
    with pytest.raises(InputError, match=r"part-00001\.parquet: damaged candidates file .*delete it"):
        curate_all(tiny_model, tiny_records, CONFIG, seed=5, folder=tmp_path / "candidates")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"config": replace(CONFIG, num_steps=4)},
        {"config": replace(CONFIG, answer_scorer="exact")},
        {"config": replace(CONFIG, bert_model="other")},
        {"config": replace(CONFIG, sentence_model="other")},
        {"config": replace(CONFIG, batch_records=4)},
        {"records": slice(1, None)},
        {"records": slice(0, 3)},  # parts are left over
    ],
)
def test_parts_of_other_settings_or_records_are_refused(
    candidates: pa.Table, tiny_model: Model, tiny_records: list[Record], tmp_path: Path, change: dict
) -> None:
    records = tiny_records[change.get("records", slice(None))]
    config, seed = change.get("config", CONFIG), change.get("seed", 5)
    with pytest.raises(InputError, match=r"part-0000\d\.parquet: was made from other records or settings; delete "):
        curate_all(tiny_model, records, config, seed=seed, folder=tmp_path / "candidates")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "train-0"}, "record train-0: the id occurs twice; give each record an id of its own"),
        ({"questions": ()}, "record train-6: has no questions to judge its images by"),
        ({"codes": None}, "record train-6: has no image codes; encode its image"),
        ({"caption": "a red unicorn"}, "does not know the word 'unicorn'"),
    ],
)
def test_bad_records_are_told_before_any_work(
    tiny_model: Model, tiny_records: list[Record], tmp_path: Path, change: dict, message: str
) -> None:
    records = [*tiny_records[:-1], replace(tiny_records[-1], **change)]
    with pytest.raises(InputError, match=message):
        curate_all(tiny_model, records, CONFIG, seed=5, folder=tmp_path / "candidates")
    assert not (tmp_path / "candidates").exists()


def test_an_unwritable_folder_is_an_input_error(tiny_model: Model, tiny_records: list[Record], no_folder: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        curate_all(tiny_model, tiny_records, CONFIG, seed=5, folder=no_folder)


def test_no_records(tiny_model: Model, tmp_path: Path) -> None:
    table = curate_all(tiny_model, [], CONFIG, seed=5, folder=tmp_path / "candidates")
    assert len(table) == 0 and table.schema == CANDIDATES_SCHEMA


def test_previous_images_are_scored_by_the_current_model(
    candidates: pa.Table, tiny_model: Model, tiny_records: list[Record], tmp_path: Path
) -> None:
    pairs, _ = make_pairs(tiny_records, candidates, CONFIG)
    stranger = pairs.to_pylist()[-1] | {"record_id": "stranger"}
    captions_only = pairs.to_pylist()[0] | {"win_codes": None, "lose_codes": None, "sides": "understanding"}
    previous = pa.Table.from_pylist([captions_only, *pairs.to_pylist()[1:], stranger], PAIRS_SCHEMA)
    write_parquet(tmp_path / "pairs.parquet", previous)
    before = PairFile(tmp_path / "pairs.parquet")
    with torch.no_grad():  # a round of training
        for parameter in tiny_model.transformer.parameters():
            parameter.mul_(0.9)
    again = curate_all(tiny_model, tiny_records, CONFIG, seed=6, folder=tmp_path / "round-2", previous=before)
    rows = [row for row in again.to_pylist() if row["kind"].startswith("previous")]
    kept = [row for row in previous.to_pylist()[:-1] if row["win_codes"] is not None]
    assert len(kept) >= 4
    assert [(row["record_id"], row["kind"], row["token_ids"]) for row in rows] == [
        (pair["record_id"], f"previous_{role}", pair[f"{role}_codes"]) for pair in kept for role in ("win", "lose")
    ]
    records = [record for record in tiny_records if record.id in {pair["record_id"] for pair in kept}]
    codes = torch.tensor([[pair["win_codes"], pair["lose_codes"]] for pair in kept])
    expected = [score.soft for of_record in self_vqa(tiny_model, codes, records) for score in of_record]
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-5)
    old_scores = [pair[f"{role}_image_score"] for pair in kept for role in ("win", "lose")]
    assert [row["score"] for row in rows] != pytest.approx(old_scores, abs=1e-5)
    new_pairs, _ = make_pairs(tiny_records, again, CONFIG, previous)
    for pair in new_pairs.to_pylist():
        if pair["win_codes"] is not None:
            assert pair["win_image_score"] > pair["lose_image_score"]
    (tmp_path / "round-2" / "part-00001.parquet").unlink()
    resumed = curate_all(tiny_model, tiny_records, CONFIG, seed=6, folder=tmp_path / "round-2", previous=before)
    assert resumed.equals(again)


def test_kept_pairs_are_homologous(candidates: pa.Table, tiny_records: list[Record]) -> None:
    """Win and lose of both sides are candidates of the pair's own record."""
    pairs, _ = make_pairs(tiny_records, candidates, CONFIG)
    own = {(row["record_id"], row["kind"], tuple(row["token_ids"])) for row in candidates.to_pylist()}
    by_id = {record.id: record for record in tiny_records}
    assert "both" in pairs["sides"].to_pylist()
    for pair in pairs.to_pylist():
        assert pair["caption"] == by_id[pair["record_id"]].caption
        assert pair["record_codes"] == by_id[pair["record_id"]].codes.tolist()
        for role in ("win", "lose"):
            for kind, column in (("image", f"{role}_codes"), ("caption", f"{role}_caption_ids")):
                if pair[column] is not None:
                    assert (pair["record_id"], kind, tuple(pair[column])) in own


def test_sampling_of_captions() -> None:
    settings = [(params.temperature, params.top_k) for params in caption_sampling(CurationConfig(), 64)]
    assert settings == [(0, 0)] + [(t, k) for k in (2, 4, 8) for t in (0.1, 0.7, 1.0)]
    assert len(caption_sampling(CurationConfig(include_greedy=False), 64)) == 9


def test_parts_come_one_by_one_each_when_it_is_on_the_disk(
    tiny_model: Model, tiny_records: list[Record], tmp_path: Path
) -> None:
    for number, (records, table) in enumerate(curate(tiny_model, tiny_records, CONFIG, seed=5, folder=tmp_path)):
        assert parts(tmp_path) == [f"part-{index:05d}.parquet" for index in range(number + 1)]
        assert [record.id for record in records] == [record.id for record in tiny_records[3 * number :][:3]]
        assert list(dict.fromkeys(table["record_id"].to_pylist())) == [record.id for record in records]
    assert number == 2


def test_pairs_of_a_file_are_found_by_their_records(
    candidates: pa.Table, tiny_records: list[Record], tmp_path: Path
) -> None:
    pairs, _ = make_pairs(tiny_records, candidates, CONFIG)
    write_parquet(tmp_path / "pairs.parquet", pairs)
    found = PairFile(tmp_path / "pairs.parquet")
    assert found.of(tiny_records).equals(pairs)
    chosen = [tiny_records[4], replace(tiny_records[0], id="stranger"), tiny_records[1]]
    kept = {row["record_id"]: row for row in pairs.to_pylist()}
    assert found.of(chosen).to_pylist() == [kept[record.id] for record in chosen if record.id in kept]
    assert found.of([]).schema == PAIRS_SCHEMA
    write_parquet(tmp_path / "other.parquet", pairs.drop_columns(["sides"]))
    with pytest.raises(InputError, match="other.parquet: has no column 'sides'"):
        PairFile(tmp_path / "other.parquet")
