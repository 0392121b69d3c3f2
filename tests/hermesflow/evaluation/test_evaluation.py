"""The measurement is right where the truth is known, its intervals cover, and pairs are resampled together."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from rich.console import Console

from hermesflow import cli
from hermesflow.config import EvalConfig, load_config
from hermesflow.curation import CANDIDATES_SCHEMA
from hermesflow.data.pairs import PAIRS_SCHEMA
from hermesflow.evaluation import stats
from hermesflow.evaluation.builtin import agreement, caption_truth, sampler_name
from hermesflow.evaluation.evaluation import Measurement, evaluate
from hermesflow.evaluation.metrics import measure, paired_change, summarize
from hermesflow.models.model import Model
from hermesflow.report import tables as summaries
from hermesflow.runtime.files import InputError, read_json
from hermesflow.worlds import oracle, shapes
from hermesflow.worlds.pretraining import PROMPTS as TINY_PROMPTS
from hermesflow.worlds.pretraining import SAMPLING as TINY_SAMPLING

SMALL = EvalConfig(num_prompts=5, num_understanding=4, images_per_prompt=2, num_steps=2)


class KnowingModel(Model):
    """Stands in for a model that knows the truth: a code is the number of a known picture.

    It answers rightly, except about the pictures in `blind`, and draws each prompt's own picture, except that the image
    number 1 of each prompt is empty where `careless`.
    """

    image_size, engine = shapes.IMAGE_SIZE, None

    def __init__(self, config, blind=(), careless=False):
        scenes = shapes.sample_scenes(config.split, max(config.num_prompts, config.num_understanding), config.seed)
        self.records = [shapes.make_record(scene, "", np.random.default_rng(scene.seed)) for scene in scenes]
        black = np.zeros((64, 64, 3), np.uint8)
        self.pictures = np.stack([record.image for record in self.records] + [black])
        self.blind, self.careless, self.texts, self.seeds, self.drawn_by = blind, careless, [], [], set()
        self.layout, self.prompts = SimpleNamespace(num_image_tokens=1, sot=-1), TINY_PROMPTS
        self.sampling, self.sampling_of = TINY_SAMPLING, lambda settings: TINY_SAMPLING
        self.engine = SimpleNamespace(generate=self._generate, score_choices=self._score_choices)
        self.engine.generate_text = self._generate_text

    def encode_text(self, text):
        if text not in self.texts:
            self.texts.append(text)
        return [self.texts.index(text)]

    def decode_text(self, ids):
        return self.texts[ids[0]]

    def encode_images(self, images):
        return torch.tensor([[self._number(image)] for image in images])

    def decode_images(self, codes):
        return self.pictures[codes[:, 0].numpy()]

    def _number(self, image):
        return next(number for number, picture in enumerate(self.pictures) if (picture == image).all())

    def _generate(self, prompt_ids, *, num_images, seeds, sampling):
        assert seeds.shape == (len(prompt_ids), num_images)
        self.drawn_by.add(f"{sampling.num_steps}/{sampling.temperature:g}")
        self.seeds += seeds.flatten().tolist()
        captions = [record.caption for record in self.records]
        codes = torch.tensor([[captions.index(self.texts[ids[0]])] * num_images for ids in prompt_ids])
        if self.careless:
            codes[:, 1] = len(self.records)
        return codes[..., None]

    def _score_choices(self, codes, questions, choices):
        rows = []
        for [number], asked, offered in zip(codes.tolist(), questions, choices, strict=True):
            shown = self.records[number : number + 1]  # of the empty picture it knows nothing
            asked_of = [item for record in shown for item in (*record.questions, *record.balanced_questions)]
            truth = {item.question: item.answer for item in asked_of}
            rows.append([])
            for [question], answers in zip(asked, offered, strict=True):
                right = [self.texts[answer] == truth.get(self.texts[question]) for [answer] in answers]
                rows[-1].append([float(mark != (number in self.blind)) for mark in right])
        return rows

    def _generate_text(self, codes, questions, *, sampling, seeds):
        return [[[self.encode_text(self.records[number].caption)]] for [number] in codes.tolist()]


def row(answered=None, drawn=None, category="a", id="x", f1=None, **measured):
    """A measured record; without more it is of before balanced questions and samplers."""
    types = ["color"] * len(answered or (drawn or [""])[0])
    caption = None if f1 is None else "words"
    return measured | {
        "id": id,
        "category": category,
        "element_types": types,
        "answered": answered,
        "drawn": drawn,
        "caption": caption,
        "caption_f1": f1,
        "caption_exact": None if f1 is None else f1 == 1,
    }


def random_rows(rng, ability, *, understanding, generation):
    """Records whose difficulty is their own: the same wherever `ability` is."""

    def digits(chance, n):
        return "".join(str(int(mark)) for mark in rng.random(n) < np.clip(chance, 0, 1))

    return [
        row(digits(understanding + a, 4), [digits(generation + a, 4) for _ in range(2)], id=str(number), f1=0.5)
        for number, a in enumerate(ability)
    ]


def test_intervals_cover_the_truth():
    """Of records whose questions share a difficulty, 1,000 times 80: 95 % within four standard errors (2.8 points)."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        chance = rng.beta(3, 1, size=80)  # mean 0.75
        asked = rng.integers(3, 6, size=80)
        right = rng.binomial(asked, chance)
        samples = stats.resample_ratios(right[:, None], asked[:, None], num_resamples=200)
        low, high = stats.percentile_interval(samples[:, 0])
        hits += low <= 0.75 <= high
    assert hits / 1000 == pytest.approx(0.95, abs=0.028)


def test_resampling_questions_alone_would_be_too_narrow():
    right = np.repeat([[4.0], [0.0]], 50, axis=0)  # all of a record's questions fall together
    clustered = stats.resample_ratios(right, np.full((100, 1), 4.0))
    alone = stats.resample_ratios(right.repeat(4, axis=0) / 4, np.ones((400, 1)))
    widths = [np.ptp(stats.percentile_interval(samples[:, 0])) for samples in (clustered, alone)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.15)


def test_resampling_leaves_out_what_was_not_measured():
    samples = stats.resample_ratios(np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]]))
    assert set(samples[~np.isnan(samples)]) == {1.0} and np.isnan(samples).any()
    assert stats.percentile_interval(samples[:, 0]) == [1.0, 1.0]
    assert stats.percentile_interval(np.full(5, np.nan)) is None


@pytest.mark.parametrize("sizes", [((0, 1), (0, 1)), ((2, 1), (3, 1)), ((2,), (2,))], ids=["empty", "unequal", "flat"])
def test_resampling_refuses(sizes):
    with pytest.raises(ValueError, match="resample_ratios: expected numerators and denominators"):
        stats.resample_ratios(*map(np.zeros, sizes))


def test_rank_correlation():
    assert stats.rank_correlation([1, 2, 3], [10, 20, 1000]) == pytest.approx(1)
    assert stats.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert stats.rank_correlation([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486833)  # ties share their rank
    assert stats.rank_correlation([1, 1], [1, 2]) is None


def test_roc_auc():
    assert stats.roc_auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == pytest.approx(0.75)
    assert stats.roc_auc([1, 1, 1], [True, False, False]) == pytest.approx(0.5)
    assert stats.roc_auc([1, 2], [True, True]) is None


def test_measure_counts_by_question():
    rows = [row("1101", ["1111", "1011"], "a", f1=1.0), row("10", None, "b", f1=0.5), row(None, ["000"], "b")]
    metrics = measure(rows)
    assert metrics["understanding"] == pytest.approx(4 / 6)
    assert metrics["generation"] == pytest.approx(7 / 11)
    assert metrics["generation_strict"] == pytest.approx(1 / 3)
    assert metrics["gap"] == pytest.approx(4 / 6 - 7 / 11)
    assert metrics["caption_f1"] == 0.75 and metrics["caption_exact"] == 0.5
    assert (metrics["num_understanding"], metrics["num_prompts"], metrics["num_images"]) == (2, 2, 3)
    assert metrics["by_category"]["b"]["understanding"] == 0.5 and metrics["by_category"]["b"]["count"] == 2
    assert metrics["by_element_type"] == {
        "color": {"understanding_record_questions": 4 / 6, "generation": 7 / 11, "count": 6}
    }
    names = set(summaries.LABELS) - {"understanding_record_questions"}
    assert all(metrics[f"{name}_ci95"][0] <= metrics[name] <= metrics[f"{name}_ci95"][1] for name in names)


NEW = {
    "balanced": "110",
    "kinds": ["color", "yes", "no"],
    "samplers": {
        "4/1": {"drawn": ["10", "11", "11", "01", "11"], "scores": [0.1, 0.2, 0.9, 0.3, 1.0]},
        "8/0.7": {"drawn": ["11", "10", "11", "11", "11"], "scores": [0.1, 0.8, 0.2, 0.3, 1.0]},
    },
}


def test_measure_tells_kinds_and_samplers_apart():
    rows = [row("01", NEW["samplers"]["4/1"]["drawn"], **NEW), row("11", None, balanced="1", kinds=["no"], samplers={})]
    metrics = measure(rows)
    assert metrics["understanding"] == 3 / 4 and metrics["understanding_record_questions"] == 3 / 4
    kinds = metrics["understanding_by_kind"]
    assert (kinds["color"], kinds["yes"], kinds["no"]) == (1, 1, 1 / 2)
    assert kinds["no_ci95"][0] <= kinds["no"] <= kinds["no_ci95"][1]
    first, second = metrics["samplers"]["4/1"], metrics["samplers"]["8/0.7"]
    assert (first["generation"], first["generation_strict"]) == (8 / 10, 3 / 5)
    assert first["generation"] == metrics["generation"] and first["generation_strict"] == metrics["generation_strict"]
    # The fifth image is not among the first four.
    assert (first["best_of_4_strict"], second["best_of_4_strict"]) == (1, 0)
    assert metrics["judge"]["auc"] == pytest.approx(5 / 6) and metrics["num_questions"] == 4
    few = {"4/1": {"drawn": ["11"] * 3, "scores": [1, 1, 1]}}
    assert measure([row("1", ["11"] * 3, samplers=few)])["samplers"]["4/1"]["best_of_4_strict"] is None
    json.dumps(metrics, allow_nan=False)


def test_changes_nest_as_the_metrics_do():
    drawn = NEW["samplers"]["4/1"]["drawn"]
    before = {"records": [row("01", drawn, **NEW)] * 3}
    after = {"records": [row("01", drawn, **NEW | {"balanced": "101"})] * 3}
    changes = paired_change(before, after)
    assert changes["understanding"]["change"] == 0 and changes["understanding_by_kind"]["no"]["change"] == 1
    assert changes["understanding_by_kind"]["yes"] == {"change": -1.0, "ci95": [-1.0, -1.0], "significant": True}
    assert changes["samplers"]["8/0.7"]["best_of_4_strict"]["change"] == 0


def test_a_run_of_before_is_measured_by_record_questions():
    metrics = measure([row("01", ["11"])])
    assert metrics["understanding"] == 1 / 2 and not summaries.is_balanced(metrics)
    assert "understanding_by_kind" not in metrics and "samplers" not in metrics
    assert summaries.is_balanced(measure([row("01", ["11"], **NEW)]))
    with pytest.raises(ValueError, match="a change needs the same records, asked the same"):
        paired_change({"records": [row("01", ["11"])]}, {"records": [row("01", ["11"], **NEW)]})


def test_measure_tells_what_was_not_measured():
    metrics = measure([row("11", None)])
    assert metrics["understanding"] == 1 and metrics["generation"] is None and metrics["gap_ci95"] is None
    json.dumps(metrics, allow_nan=False)


def test_a_change_is_paired():
    """What makes a record hard cancels, so the interval is narrower than that of two independent measurements."""
    rng = np.random.default_rng(1)
    ability = rng.normal(0, 0.3, size=300)
    halves = [random_rows(rng, ability, understanding=0.6, generation=chance) for chance in (0.4, 0.5)]
    before, after = ({"records": rows, "metrics": measure(rows)} for rows in halves)
    changes = paired_change(before, after)
    change = changes["generation"]
    assert change["significant"] and change["change"] == pytest.approx(
        after["metrics"]["generation"] - before["metrics"]["generation"]
    )
    assert change["ci95"][0] < change["change"] < change["ci95"][1]
    widths = [np.ptp(half["metrics"]["generation_ci95"]) for half in (before, after)]
    assert np.ptp(change["ci95"]) < 0.8 * np.hypot(*widths)
    assert not changes["understanding"]["significant"] and not changes["caption_f1"]["significant"]
    assert changes["gap"]["change"] == pytest.approx(changes["understanding"]["change"] - change["change"])
    first, rounds = summarize([before, after, before])
    assert first == before["metrics"] and rounds[0]["change"] == changes
    assert rounds[1]["change"]["gap"] == {"change": 0.0, "ci95": [0.0, 0.0], "significant": False}


@pytest.mark.parametrize(
    "other", [row("11", ["11"], id="y"), row("11", None), row("11", ["11", "11"])], ids=["id", "drawn", "images"]
)
def test_a_change_needs_the_same_records(other):
    with pytest.raises(ValueError, match="a change needs the same"):
        paired_change({"records": [row("11", ["11"])]}, {"records": [other]})


def test_a_model_that_knows_everything_scores_full():
    model = KnowingModel(SMALL)
    metrics = evaluate(model, SMALL)["metrics"]
    for name in ("understanding", "generation", "generation_strict", "caption_f1", "caption_exact"):
        assert metrics[name] == 1, name
    assert metrics["gap"] == 0 and metrics["understanding_record_questions"] == 1
    assert all(value == 1 for kind, value in metrics["understanding_by_kind"].items() if not kind.endswith("_ci95"))
    assert (metrics["num_understanding"], metrics["num_prompts"], metrics["num_images"]) == (4, 5, 10)
    assert metrics["num_questions"] == sum(len(record.balanced_questions) for record in model.records[:4])
    assert len(set(model.seeds)) == 10  # no two images share a seed
    default = sampler_name(model, TINY_SAMPLING)
    assert list(metrics["samplers"]) == list(dict.fromkeys([default, *SMALL.samplers]))
    assert len(model.drawn_by) == len(metrics["samplers"])


def test_errors_are_counted_where_they_are():
    result = evaluate(KnowingModel(SMALL, blind={2}, careless=True), SMALL)
    rows = result["records"]
    for name in ("answered", "balanced"):
        assert [set(item[name]) for item in rows[:4]] == [{"1"}, {"1"}, {"0"}, {"1"}] and rows[4][name] is None
    assert all(set(item["drawn"][0]) == {"1"} and "0" in item["drawn"][1] for item in rows)
    assert result["metrics"]["generation_strict"] == 0.5


def test_evaluation_depends_on_the_settings_alone(shared_tiny_model):
    result = evaluate(shared_tiny_model, SMALL)
    assert evaluate(shared_tiny_model, SMALL) == result
    json.dumps(result, allow_nan=False)
    fewer = evaluate(shared_tiny_model, replace(SMALL, num_prompts=2, num_understanding=1, images_per_prompt=1))
    assert fewer["records"][0]["answered"] == result["records"][0]["answered"]
    assert fewer["records"][1]["drawn"] == result["records"][1]["drawn"][:1]
    assert fewer["records"][0]["id"] == result["records"][0]["id"]


def test_images_of_another_size_are_measured_as_well():
    """The world's images are enlarged for the model, and its own made smaller for the oracle."""
    config = replace(SMALL, num_understanding=5)
    model = KnowingModel(config, blind=(1,))
    large = KnowingModel(config, blind=(1,))
    large.image_size, large.pictures = 128, large.pictures.repeat(2, axis=1).repeat(2, axis=2)
    assert evaluate(large, config) == evaluate(model, config)


def test_run_evaluation_writes_and_prints(tiny_model, tmp_path, capsys):
    tiny_model.save(tmp_path / "model")
    settings = [f"model.name={tmp_path / 'model'}", f"run.folder={tmp_path}", "run.name=here", "eval.num_steps=2",
                "eval.num_prompts=3", "eval.num_understanding=3", "eval.images_per_prompt=2"]  # fmt: skip
    assert cli.main(["eval", *(f"--set={setting}" for setting in settings)]) == 0
    result = read_json(tmp_path / "here" / "evaluation.json")
    assert result == {"model": str(tmp_path / "model")} | evaluate(tiny_model, load_config(None, settings).eval)
    out = capsys.readouterr().out
    assert "understanding" in out and "95 % interval" in out and "6 images drawn" in out


def judged_candidates(model, scores, fractions_of):
    rows = []
    for number, record in enumerate(fractions_of):
        for index, (code, score) in enumerate(zip((number, len(model.records)), scores, strict=True)):
            rows.append({"record_id": record, "kind": "image", "index": index, "token_ids": [code], "score": score})
    rows.append({"record_id": fractions_of[0], "kind": "caption", "index": 0, "token_ids": [1], "score": 9.0})
    return pa.Table.from_pylist(rows, CANDIDATES_SCHEMA)


@pytest.mark.parametrize("scores", [(0.9, 0.1), (0.1, 0.9)], ids=["sees", "errs"])
def test_agreement_with_the_oracle(scores):
    """Two records, each with its true picture and an empty one."""
    model = KnowingModel(SMALL)
    records = [
        shapes.make_record(scene, f"r{n}", np.random.default_rng(scene.seed))
        for n, scene in enumerate(shapes.sample_scenes("test", 2, SMALL.seed))
    ]
    sees = scores[0] > scores[1]
    codes = {"win": [0] if sees else [5], "lose": [5] if sees else [0]}
    pairs = [
        {"record_id": "r0", "sides": "both", **{f"{role}_codes": code for role, code in codes.items()}},
        {"record_id": "r1", "sides": "understanding"},
    ]
    truth, untrue = "a red circle left of a blue square on a white background", "a red circle on a black background"
    texts = {"caption": truth, "win_caption": truth if sees else untrue, "lose_caption": untrue if sees else truth}
    pairs = [pair | texts for pair in pairs]
    candidates, pairs = judged_candidates(model, scores, ["r0", "r1"]), pa.Table.from_pylist(pairs, PAIRS_SCHEMA)
    result = agreement(model, [(records, candidates, pairs)])
    parts = [
        ([record], *(table.filter(pc.equal(table["record_id"], record.id)) for table in (candidates, pairs)))
        for record in records
    ]
    assert agreement(model, parts) == result
    empty = [oracle.score(record.questions, oracle.read(model.pictures[-1:])[0])[0] for record in records]
    assert result["mean_oracle"] == pytest.approx((2 + sum(empty)) / 4) and result["mean_score"] == pytest.approx(0.5)
    assert result["spearman_within"] == pytest.approx(1 if sees else -1) and result["auc"] == float(sees)
    assert (result["win_better"], result["win_worse"], result["tie"]) == (float(sees), float(not sees), 0)
    assert (result["best_strict"], result["mean_strict"], result["worst_strict"]) == (sees, 0.5, not sees)
    assert (result["num_images"], result["num_pairs"], result["num_caption_pairs"]) == (4, 1, 2)
    message = (result["caption_win_truer"], result["caption_win_less_true"], result["caption_tie"])
    assert message == (float(sees), float(not sees), 0) and result["caption_win_exact"] == float(sees)
    assert 0 < caption_truth(untrue, truth) < caption_truth(f"there is {truth}", truth) == 1


def test_agreement_without_images():
    model = KnowingModel(SMALL)
    result = agreement(model, [([], CANDIDATES_SCHEMA.empty_table(), PAIRS_SCHEMA.empty_table())])
    assert agreement(model, []) == result
    assert result["spearman"] is None and result["win_better"] is None and result["num_pairs"] == 0
    with pytest.raises(ValueError, match="agreement: expected a record for each candidate, got none for 'r0'"):
        agreement(model, [([], judged_candidates(model, (1, 0), ["r0"]), PAIRS_SCHEMA.empty_table())])


def printed(summary):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    summaries.print_summary(summary, console)
    return console.export_text()


def test_the_closing_table_says_what_changed():
    rng = np.random.default_rng(2)
    ability = rng.normal(0, 0.2, size=300)
    halves = [random_rows(rng, ability, understanding=0.7, generation=chance) for chance in (0.3, 0.5)]
    before, rounds = summarize([{"records": rows, "metrics": measure(rows)} for rows in halves])
    rounds[0] |= {"pairs": {"records": 9, "kept": 7}, "seconds": {"training": 3.2}}
    text = printed({"before": before, "rounds": rounds})
    lines = [line.strip() for line in text.splitlines()]
    after = {name: lines[lines.index(name) + 2] for name in ("record questions", "generation", "gap")}
    assert after["record questions"].endswith("no significant change")
    assert after["generation"].endswith("better") and after["gap"].endswith("down")
    assert "7 of 9 records gave pairs" in text and "time: 3 s (training 3 s)" in text
    said = summaries.headline({"before": before, "rounds": rounds})
    assert said.startswith("After 1 round, on 300 held-out prompts: gap: down") and "generation: up" in said
    assert "understanding (record questions, which ask only of what is there): no significant change" in said
    for rows in halves:
        for number, item in enumerate(rows):
            item |= NEW | {"balanced": "110" if rows is halves[0] or number % 9 else "100"}
    before, rounds = summarize([{"records": rows, "metrics": measure(rows)} for rows in halves])
    said, text = summaries.headline({"before": before, "rounds": rounds}), printed({"before": before, "rounds": rounds})
    assert "understanding (balanced questions): down 3.8 points" in said and "better" not in said
    assert "8/0.7, best of 4, strict" in text and "yes" in text and "record questions" in text
    lines = [line.strip() for line in text.splitlines()]
    assert lines[lines.index("understanding") + 2].endswith("worse")
    assert "round 1: the model's own scores of these images and the oracle: rank correlation" in text


def test_a_gap_below_zero_has_a_minus_and_none_at_zero():
    found = [summaries.format_value(value) for value in (-0.012, -1e-5, 0.0, 0.5)]
    assert found == ["\N{MINUS SIGN}1.2", "0.0", "0.0", "50.0"]


def test_the_headline_before_any_round():
    metrics = measure([row("1110", ["1011", "0111"])])
    said = summaries.headline({"before": metrics, "rounds": []})
    assert "75.0 % of the questions" in said and "gap of 0.0 points" in said
    assert "before" in printed({"before": metrics, "rounds": []})


ROW = {"id": "a", "scores": {"right": [1, 2]}}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected a list with a dict for each record"),
        (iter([ROW]), "expected a list with a dict for each record"),
        ([{"scores": {"right": [1, 2]}}], "row 0: expected an id of its own, a text, got None"),
        ([ROW, ROW], "row 1: expected an id of its own, a text, got 'a'"),
        ([{"id": "a", "scores": {}}], "row 'a': expected scores"),
        ([{"id": "a", "answered": "1"}], "row 'a': expected scores"),
        ([ROW | {"scores": {"judge": [1, 2]}}], "a metric cannot be called 'judge'"),
        ([ROW | {"scores": {"a//b": [1, 2]}}], "a metric cannot be called 'a//b'"),
        ([ROW | {"scores": {"\x1b[31m": [1, 2]}}], "a metric cannot be called"),
        ([ROW | {"scores": {"a": [1, 2], "a/b": [1, 2]}}], "'a' is a metric and holds others"),
        ([ROW | {"scores": {"right": [float("nan"), 2]}}], r"right: expected \[right, asked\], finite numbers"),
        ([ROW | {"scores": {"right": [10**400, 2]}}], r"right: expected \[right, asked\], finite numbers"),
        ([ROW | {"scores": {"right": [1, 0]}}], r"right: expected \[right, asked\], finite numbers"),
        ([ROW | {"scores": {"right": np.array([1, 2])}}], r"right: expected \[right, asked\], finite numbers"),
        ([ROW | {"more": {1, 2}}], "not JSON serializable"),
        ([ROW | {"more": float("nan")}], "not JSON compliant"),
    ],
)
def test_rows_that_are_none_are_refused(rows, message, monkeypatch, tmp_path):
    (tmp_path / "own_suite.py").write_text(
        "from hermesflow.evaluation.evaluation import Evaluation\n"
        "class Own(Evaluation):\n    rows = None\n    def measure(self, model, config): return self.rows\n"
        "SUITE = Own()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_suite", raising=False)
    import own_suite

    own_suite.SUITE.rows = rows
    with pytest.raises(InputError, match=f"eval.suite own_suite:SUITE: .*{message}"):
        evaluate(None, EvalConfig(suite="own_suite:SUITE"))


def test_what_an_evaluation_raises_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "own_suite.py").write_text(
        "from hermesflow.evaluation.evaluation import Evaluation\n"
        "class Own(Evaluation):\n    def measure(self, model, config): raise SystemExit(0)\n"
        "class Odd(Own):\n    known_sources = 'shapes'\n"
        "SUITE, ODD, NUMBER = Own(), Odd(), 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_suite", raising=False)
    for name, message in (
        ("SUITE", r"raised SystemExit \(.*\); correct it"),
        ("ODD", "expected an Evaluation whose known_sources are a tuple"),
        ("NUMBER", "NUMBER is 3, which has no measure, settings, known_sources"),
        ("Own", r"expected an object such as Own\(\), got a class"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(None, EvalConfig(suite=f"own_suite:{name}"))


def test_an_evaluation_of_ones_own_in_parts(tmp_path, monkeypatch):
    (tmp_path / "parted.py").write_text(
        "from functools import partial\n"
        "from hermesflow.evaluation.evaluation import Evaluation\n"
        "def rows(*ids): return [{'id': each, 'scores': {'right': (len(each), 4)}} for each in ids]\n"
        "class Parted(Evaluation):\n"
        "    def parts(self, model, config): return [partial(rows, 'a', 'bb'), partial(rows, 'ccc')]\n"
        "class Whole(Parted):\n"
        "    def measure(self, model, config): return super().measure(model, config)[1:]\n"
        "class Twice(Evaluation):\n"
        "    def parts(self, model, config): return [partial(rows, 'a')] * 2\n"
        "class Neither(Evaluation):\n    pass\n"
        "PARTED, WHOLE, TWICE, NEITHER = Parted(), Whole(), Twice(), Neither()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config, whole, twice, neither = (
        EvalConfig(suite=f"parted:{name}") for name in ("PARTED", "WHOLE", "TWICE", "NEITHER")
    )
    result = evaluate(None, config)
    assert [row["id"] for row in result["records"]] == ["a", "bb", "ccc"] and result["metrics"]["right"] == 6 / 12
    assert [row["id"] for row in evaluate(None, whole)["records"]] == ["bb", "ccc"]  # the subclass's own way counts
    with pytest.raises(InputError, match="eval.suite parted:TWICE: row 1: expected an id of its own"):
        evaluate(None, twice)
    with pytest.raises(InputError, match="Neither: measures nothing; define measure or parts"):
        evaluate(None, neither)

    model, folder = SimpleNamespace(modules=lambda: ()), tmp_path / "parts"
    measurement = Measurement(model, config, folder)
    assert [path.name for path in measurement.paths] == ["part-00000.json", "part-00001.json"]
    measurement.share()
    monkeypatch.setattr(sys.modules["parted"], "rows", lambda *ids: 1 / 0)  # what is there is not measured again
    again = Measurement(model, config, folder)
    again.share()
    assert json.dumps(again.result()) == json.dumps(result)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    wrong = Measurement(model, twice, tmp_path / "twice")
    wrong.share()
    with pytest.raises(InputError, match="row 1: expected an id of its own"):
        wrong.result()
    assert not (tmp_path / "twice").exists()  # the code is to be corrected
