"""The study: its intervals on counts of known effect, its arms and scorers, and a runner that resumes, unmixed."""

import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from hermesflow import cli
from hermesflow.benchmarks.study import findings, page, runner, scorers
from hermesflow.benchmarks.study.arms import ARMS, arm_config
from hermesflow.benchmarks.study.effects import HEADLINE, Effects
from hermesflow.benchmarks.study.runner import BASE, read_study, run_study
from hermesflow.config import STUDY_ARMS, load_config
from hermesflow.runtime.files import InputError
from hermesflow.training import is_online, train_records
from hermesflow.worlds import oracle, shapes

ROOT = Path(__file__).parents[2]
ARMS_RUN = ("pair-dpo", "generation-only", "understanding-only")
NUM_QUESTIONS, NUM_IMAGES = 5, 2


def make_line(arm, seed, chances, rng):
    """A line of records that are right with these chances [records]: questions about 3 of 4, images of all."""
    size = len(chances)
    asked = {
        "understanding": np.where(np.arange(size) % 4 < 3, NUM_QUESTIONS, 0),
        "generation": np.full(size, NUM_QUESTIONS * NUM_IMAGES),
        "generation_strict": np.full(size, NUM_IMAGES),
        "samplers 8/0.7 generation_strict": np.full(size, NUM_IMAGES),
        "understanding_by_kind yes": np.where(np.arange(size) % 4 < 3, 1, 0),
    }
    harder = dict(zip(asked, (0, 0.2, 0.4, 0.3, 0), strict=True))
    right = {name: rng.binomial(number, chances - harder[name]).tolist() for name, number in asked.items()}
    line = {"arm": arm, "seed": seed, "rounds": 3, "right": right, "metrics": {}, "settings": "", "seconds": 1.0}
    return line | ({"asked": {name: number.tolist() for name, number in asked.items()}} if arm == BASE else {})


def make_lines(rng, gains, *, size=200, seeds=(1, 2, 3, 4), seed_spread=0.01):
    chances = np.clip(rng.normal(0.7, 0.08, size), 0.45, 0.9)
    lines = [make_line(BASE, None, chances, rng)]
    for seed in seeds:
        for arm, gain in gains.items():
            lines.append(make_line(arm, seed, np.clip(chances + gain + rng.normal(0, seed_spread), 0.4, 1), rng))
    return lines


def test_effects_find_what_is_there_and_nothing_else():
    effects = Effects(make_lines(np.random.default_rng(2), {"pair-dpo": 0.08, "no-op": 0.0}))
    assert effects.arms == ["pair-dpo", "no-op"] and effects.seeds == [1, 2, 3, 4]
    assert (effects.num_prompts, effects.num_images, effects.num_understanding) == (200, 400, 150)
    for metric in HEADLINE[:3]:
        assert effects.change("pair-dpo", metric)["significant"] and not effects.change("no-op", metric)["significant"]
        assert effects.difference("pair-dpo", "no-op", metric)["ci95"][0] > 0
    assert not effects.change("pair-dpo", "gap")["significant"]  # both sides gain alike


def test_values_are_ratios_of_sums():
    lines = make_lines(np.random.default_rng(1), {"pair-dpo": 0.05})
    of_arm = [line for line in lines if line["arm"] == "pair-dpo"]

    def ratio(name, some):
        return sum(sum(line["right"][name]) for line in some) / sum(lines[0]["asked"][name]) / len(some)

    generation, understanding = (ratio(name, of_arm) for name in ("generation", "understanding"))
    effects = Effects(lines)
    for name in effects.metrics:
        assert name == "gap" or effects.value("pair-dpo", name) == pytest.approx(ratio(name, of_arm), abs=1e-12)
    assert effects.value("pair-dpo", "generation") == pytest.approx(generation, abs=1e-12)
    assert effects.value("pair-dpo", "gap") == pytest.approx(understanding - generation, abs=1e-12)
    assert effects.value(BASE, "generation_strict") == pytest.approx(ratio("generation_strict", lines[:1]), abs=1e-12)


def test_what_was_not_measured_is_no_metric():
    """With fewer than four images a prompt there is no best of four."""
    lines = make_lines(np.random.default_rng(1), {"pair-dpo": 0.05})
    for line in lines:
        line["right"]["samplers 8/0.7 best_of_4_strict"] = [0] * 200
    lines[0]["asked"]["samplers 8/0.7 best_of_4_strict"] = [0] * 200
    effects, without = Effects(lines), Effects(make_lines(np.random.default_rng(1), {"pair-dpo": 0.05}))
    assert effects.metrics == without.metrics and "samplers 8/0.7 generation_strict" in effects.metrics
    assert findings.markdown(effects) == findings.markdown(without)


def test_what_two_arms_share_falls_out_of_their_difference():
    """Equal counts differ by nothing, though seeds and records spread widely."""
    lines = make_lines(np.random.default_rng(2), {"pair-dpo": 0.05}, seed_spread=0.05)
    lines += [line | {"arm": "no-op"} for line in lines[1:]]
    effects = Effects(lines)
    for metric in HEADLINE:
        difference = effects.difference("pair-dpo", "no-op", metric)
        assert difference == {"change": 0.0, "ci95": [0.0, 0.0], "significant": False}


@pytest.mark.parametrize("seed_spread", [0.0, 0.03], ids=["seeds_alike", "seeds_differ"])
def test_intervals_hold_the_truth(seed_spread):
    """100 studies of 4 seeds: of 95 % intervals at most 10 miss, as of 99 % of binomials with a chance of 0.05."""
    rng, gain, held = np.random.default_rng(3), 0.04, 0
    for _ in range(100):
        lines = make_lines(rng, {"pair-dpo": gain, "no-op": 0.0}, size=120, seeds=range(4), seed_spread=seed_spread)
        low, high = Effects(lines).difference("pair-dpo", "no-op", "generation")["ci95"]
        held += low <= gain <= high
    assert held >= 90


def test_the_changes_of_a_seed_are_those_of_a_study_of_it_alone():
    lines = make_lines(np.random.default_rng(2), {"pair-dpo": 0.02, "no-op": 0.0}, seed_spread=0.03)
    effects = Effects(lines)
    for metric in HEADLINE:
        changes = effects.seed_changes("pair-dpo", metric)
        for seed, change in zip(effects.seeds, changes, strict=True):
            alone = Effects([line for line in lines if line["seed"] in (None, seed)]).change("pair-dpo", metric)
            assert change["change"] == pytest.approx(alone["change"], abs=1e-12)
            assert change["ci95"] == pytest.approx(alone["ci95"], abs=1e-8)
    assert {change["significant"] for change in effects.seed_changes("pair-dpo", "generation_strict")} == {True, False}


def test_only_seeds_with_every_arm_count():
    lines = make_lines(np.random.default_rng(4), {"pair-dpo": 0.05, "no-op": 0.0})
    assert Effects(lines[:-1]).seeds == [1, 2, 3]
    for too_few in (lines[:1], [line for line in lines if line["arm"] != "pair-dpo"]):
        with pytest.raises(InputError, match="no seed of study.seeds has been run with all of its arms yet"):
            Effects(too_few)


def test_every_arm_changes_what_it_says_and_nothing_else():
    base = load_config(None, ["run.name=study", "study.workers=2"])
    assert tuple(ARMS) == STUDY_ARMS
    for name, arm in ARMS.items():
        config = arm_config(base, name, 7)
        assert config.run_folder == base.run_folder / f"{name}-seed-7" and config.run.seed == 7
        before, after = asdict(replace(base, run=config.run)), asdict(config)
        changed = {}
        for section, keys in after.items():
            for key, value in keys.items():
                if value != before[section][key]:
                    changed.setdefault(section, {})[key] = value
        # What is the default already may be named too: the arm stays what it is under other settings.
        assert {(section, key) for section in changed for key in changed[section]} <= {
            (section, key) for section, keys in arm.settings.items() for key in keys
        }
        assert bool(changed) == (
            name != "pair-dpo" and not arm.best_of and not arm.mean_of
        ) and arm.description.endswith(".")


def test_online_arms_share_records_and_no_pairs(config, evaluated, console, monkeypatch):
    settings = {"selfplay": {"algorithm": "grpo"}}
    monkeypatch.setitem(ARMS, "grpo", ARMS["grpo"]._replace(settings=settings))  # on as many records as pair-dpo
    arms = ("pair-dpo", "grpo", "positive-control")
    run_study(replace(config, study=replace(config.study, arms=arms, seeds=(1,))), console)
    of_grpo = [name for folder, name in StubRun.events if folder == "grpo-seed-1"]
    assert of_grpo == ["round-1/model", "round-2/model"]  # what is shared is not made
    assert evaluated == [BASE, *(f"{arm}-seed-1" for arm in arms)]


def test_an_arm_starts_from_another_of_its_seed(config, evaluated, console, monkeypatch):
    begun = {}

    def play_round(run, number):
        begun[run.folder.name] = run.config.model.name
        run.play_round(number)

    monkeypatch.setattr(runner, "play_round", play_round)
    arms = ("pair-dpo", "grpo", "grpo+own-drawings")
    lines = run_study(replace(config, study=replace(config.study, arms=arms)), console)
    for seed in (1, 2):
        assert begun[f"grpo-seed-{seed}"] == "tiny"
        expected = config.run_folder / f"grpo-seed-{seed}/round-1/model"
        assert begun[f"grpo+own-drawings-seed-{seed}"] == str(expected) and expected.exists()
    elsewhere = replace(config, run=replace(config.run, name="other"))  # where it lies is no setting
    of_grpo, own = (runner.settings_digest(runner.arm_config(elsewhere, arm, 1)) for arm in arms[1:])
    assert [line["settings"] for line in lines if line["arm"] == arms[2]] == [f"{of_grpo}+{own}"] * 2
    with pytest.raises(InputError, match="starts from it; remove the line of grpo and seed 1 from study.jsonl"):
        runner.run_arm(elsewhere, arms[2], 1)
    for some in (("pair-dpo", arms[2]), ("pair-dpo", arms[2], "grpo")):
        with pytest.raises(InputError, match="starts from grpo; name grpo before it in study.arms"):
            run_study(replace(elsewhere, study=replace(config.study, arms=some)), console)
    assert not elsewhere.run_folder.exists() or not (elsewhere.run_folder / "study.jsonl").exists()


def test_an_arm_takes_the_mean_of_others(config, evaluated, console, monkeypatch):
    opened = {}

    def merge(model, others):
        opened["merged"] = [str(other) for other in others]

    monkeypatch.setitem(ARMS, "merged", ARMS["merged"]._replace(mean_of=("pair-dpo", "grpo")))
    monkeypatch.setattr(runner, "merge_models", merge)
    monkeypatch.setattr(runner, "open_model", lambda model: model.name)
    monkeypatch.setattr(runner, "model_digest", lambda model: "digest")
    arms = ("pair-dpo", "grpo", "merged")
    lines = run_study(replace(config, study=replace(config.study, arms=arms, seeds=(1,))), console)
    pair_dpo, grpo = (
        config.run_folder / f"{arm}-seed-1/round-{last}/model" for arm, last in (("pair-dpo", 2), ("grpo", 1))
    )
    assert evaluated[-1] == str(pair_dpo) and opened["merged"] == [str(grpo)]
    of_pairs, of_grpo, merged = (line["settings"] for line in lines[1:])
    assert merged == f"{of_pairs}+{of_grpo}+{runner.settings_digest(runner.arm_config(config, 'merged', 1))}"
    assert lines[-1]["rounds"] == 0
    with pytest.raises(InputError, match="merged starts from grpo; name grpo before it in study.arms"):
        few = replace(config.study, arms=("pair-dpo", "merged"))
        run_study(replace(config, study=few, run=replace(config.run, name="few")), console)


def test_an_arm_without_training_is_measured_once(config, evaluated, console, monkeypatch):
    monkeypatch.setattr(runner, "best_of", lambda model, config, count: runner.evaluate(model, config.eval))
    settings = replace(config, study=replace(config.study, arms=("pair-dpo", "best-of-4")))
    lines = run_study(settings, console)
    assert evaluated == [BASE, BASE, "pair-dpo-seed-1", "pair-dpo-seed-2"]
    one, other = (line for line in lines if line["arm"] == "best-of-4")
    assert one | {"seed": 2} == other and one["rounds"] == 0
    more = replace(settings, study=replace(settings.study, seeds=(1, 2, 3)))
    assert run_study(more, console)[-2]["arm"] == "best-of-4" and len(evaluated) == 5


def test_the_best_is_chosen_by_the_models_own_score(monkeypatch):
    row = {
        "id": "a", "category": "colors", "balanced": None, "answered": None, "kinds": [], "element_types": ["color"],
        "caption": None, "caption_f1": None, "caption_exact": None, "drawn": ["0"] * 8,
        "samplers": {"8/0.7": {"drawn": list("01000010"), "scores": [0.1, 0.9, 0.2, 0.2, 0.5, 0.8, 0.7, 0.5]}},
    }  # fmt: skip
    monkeypatch.setattr(runner, "evaluate", lambda model, config: {"records": [row], "metrics": {}})
    config = load_config(None, ["eval.images_per_prompt=2"])
    [chosen] = runner.best_of(runner.open_model(config.model), config, 4)["records"]
    assert chosen["drawn"] == chosen["samplers"]["8/0.7"]["drawn"] == ["1", "0"]
    assert chosen["samplers"]["8/0.7"]["scores"] == [0.9, 0.8]


def test_the_positive_control_learns_right_answers(tmp_path):
    arm = ARMS["positive-control"].settings["selfplay"]["algorithm"]
    settings = ["train.num_steps=6", "train.pairs_per_step=4", "train.warmup_steps=1", f"selfplay.algorithm={arm}"]
    config = load_config(None, settings)
    model = runner.open_model(config.model)
    records = list(shapes.training_records(5, 4))
    codes = model.encode_images(np.stack([record.image for record in records])).numpy()
    records = [replace(record, codes=of_record) for record, of_record in zip(records, codes, strict=True)]
    train_records(model, records, config, seed=0, folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["replay/nll"] < lines[0]["replay/nll"] and lines[0]["loss"] == lines[0]["replay/nll"]


def test_random_scorers_are_uniform_and_repeat_themselves():
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (400, 4, 4, 3), dtype=np.uint8)
    record = shapes.make_record(shapes.sample_scenes("test", 1, 0)[0], "a", rng)
    captions = [f"caption {index}" for index in range(400)]
    for scores in (scorers.random_images(images, record), scorers.random_captions(captions, "truth")):
        assert min(scores) >= 0 and max(scores) < 1 and len(set(scores)) == 400
        assert np.histogram(scores, 10, (0, 1))[0].min() >= 20  # of 40; chance goes below once in 2,000
    assert scorers.random_images(images, record) == scorers.random_images(images, record)
    assert scorers.random_images(images[:3], record) == scorers.random_images(images, record)[:3]
    assert scorers.random_captions(captions, "truth") != scorers.random_captions(captions, "another")
    assert len(set(scorers.random_images(images[[0, 0]], record))) == 2  # equal images are no tie


@pytest.mark.parametrize("factor", [1, 2], ids=["as_read", "resized"])
def test_the_oracle_scores_as_the_oracle_reads(factor):
    scenes = shapes.sample_scenes("test", 6, 0)
    records = [shapes.make_record(scene, str(scene.seed), np.random.default_rng(0)) for scene in scenes]
    images = np.stack([record.image for record in records])
    large = images.repeat(factor, axis=1).repeat(factor, axis=2)
    for record, own in zip(records, large, strict=True):
        scores = scorers.oracle_images(np.concatenate([own[None], large]), record)
        assert scores[0] == 1
        assert scores[1:] == [oracle.score(record.questions, seen)[0] for seen in oracle.read(images)]


class StubRun:
    """Makes the files that a run shares, and says what it was made to do."""

    events = []

    def __init__(self, config):
        self.config, self.folder = config, config.run_folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def _make(self, name):
        path = self.folder / name
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} of {self.folder.name}")
        self.events.append((self.folder.name, name))

    def is_online(self, number):
        return is_online(self.config.of_round(number).selfplay.algorithm)

    def play_round(self, number):
        for name in ("records.parquet", "rejected.parquet"):
            self._make(name)
        if not self.is_online(number):
            self._curate_round(number)
        self.train_round(number)

    def _curate_round(self, number):
        if not (self.folder / f"round-{number}/pairs.parquet").exists():
            for name in ("candidates/part-00000.parquet", "rejected.parquet", "pairs.parquet"):
                self._make(f"round-{number}/{name}")

    def train_round(self, number):
        self._make(f"round-{number}/model")

    def model(self, number):
        return self.folder.name


@pytest.fixture
def evaluated(monkeypatch):
    """Receives the name of each model that is evaluated; all are right alike."""
    names = []

    def evaluate(model, config):
        names.append(model)
        row = {
            "answered": "101", "balanced": "1101", "kinds": ["color", "yes", "no", "no"], "drawn": ["11", "10"],
            "samplers": {"8/0.7": {"drawn": ["11", "11"], "scores": [0.5, 0.5]}},
            "caption": "a", "caption_f1": 0.5, "caption_exact": False,
        }  # fmt: skip
        asked = {"answered": "1", "balanced": "1", "kinds": ["color"], "drawn": None, "caption": None, "samplers": {}}
        rows = [row] * config.num_prompts + [asked]
        return {"records": rows, "metrics": dict.fromkeys(runner.LABELS, 0.5)}

    monkeypatch.setattr(StubRun, "events", [])
    monkeypatch.setattr(runner, "Run", StubRun)
    monkeypatch.setattr(runner, "play_round", StubRun.play_round)
    monkeypatch.setattr(runner, "evaluate", evaluate)
    monkeypatch.setattr(runner, "open_model", lambda config: BASE)
    monkeypatch.setattr(runner, "model_digest", lambda model: model)
    return names


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def config(tmp_path):
    settings = ["run.name=study", "eval.num_prompts=3", "selfplay.num_rounds=2", "study.seeds=[1, 2]"]
    return load_config(None, [*settings, f"run.folder={tmp_path}", f"study.arms={json.dumps(ARMS_RUN)}"])


def test_a_study_measures_every_arm_of_every_seed_once(config, evaluated, console):
    lines = run_study(config, console)
    assert evaluated == [BASE, *(f"{arm}-seed-{seed}" for seed in (1, 2) for arm in ARMS_RUN)]
    assert read_study(config.run_folder / "study.jsonl") == lines
    counts = {
        "understanding": (3, 4, 1), "understanding_record_questions": (2, 3, 1), "generation": (3, 4, 0),
        "generation_strict": (1, 2, 0), "understanding_by_kind color": (1, 1, 1),
        "understanding_by_kind yes": (1, 1, 0), "understanding_by_kind no": (1, 2, 0),
        "samplers 8/0.7 generation": (4, 4, 0), "samplers 8/0.7 generation_strict": (2, 2, 0),
        "samplers 8/0.7 best_of_4_strict": (0, 0, 0),
    }  # fmt: skip
    right = {name: [of_prompt] * 3 + [last] for name, (of_prompt, _, last) in counts.items()}
    assert all(line["right"] == right for line in lines)
    assert lines[0]["asked"] == {name: [asked] * 3 + [last] for name, (_, asked, last) in counts.items()}
    assert not any("asked" in line for line in lines[1:])
    assert [line["rounds"] for line in lines] == [0] + [2] * 6
    assert len(console.file.getvalue().splitlines()) == 7
    run_study(config, console)
    assert len(evaluated) == 7


def test_arms_share_what_would_come_out_equal(config, evaluated, console):
    arms = ("pair-dpo", "no-op", "generation-only", "random-pairs")
    run_study(replace(config, study=replace(config.study, seeds=(1,), arms=arms)), console)
    own = {arm: [name for run, name in StubRun.events if run == f"{arm}-seed-1"] for arm in arms}
    models = {"round-1/model", "round-2/model"}
    round_2 = {f"round-2/{name}.parquet" for name in ("candidates/part-00000", "rejected", "pairs")}
    round_1 = {name.replace("2", "1", 1) for name in round_2}
    assert set(own["pair-dpo"]) == {"records.parquet", "rejected.parquet"} | round_1 | round_2 | models
    assert set(own["no-op"]) == models
    assert set(own["generation-only"]) == round_2 | models
    assert set(own["random-pairs"]) == round_1 | round_2 | models
    for arm in arms:
        folder = config.run_folder / f"{arm}-seed-1"
        assert (folder / "records.parquet").read_text() == "records.parquet of pair-dpo-seed-1"
        assert (folder / "round-2/candidates").exists() == (arm == "pair-dpo")
        assert not list(folder.rglob(".*.tmp"))


def test_a_study_that_was_stopped_goes_on(config, evaluated, console, monkeypatch):
    train = StubRun.train_round

    def train_until_killed(self, number):
        if self.folder.name == "generation-only-seed-1" and number == 2:
            raise KeyboardInterrupt
        train(self, number)

    monkeypatch.setattr(StubRun, "train_round", train_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run_study(config, console)
    assert evaluated == [BASE, "pair-dpo-seed-1"]
    monkeypatch.setattr(StubRun, "train_round", train)
    lines = run_study(config, console)
    assert [(line["arm"], line["seed"]) for line in lines[1:]] == [(arm, seed) for seed in (1, 2) for arm in ARMS_RUN]
    assert len(StubRun.events) == len(set(StubRun.events)) and evaluated.count("pair-dpo-seed-1") == 1


def test_more_seeds_and_workers_join_a_study_and_other_settings_do_not(config, evaluated, console):
    run_study(config, console)
    more = replace(config, study=replace(config.study, seeds=(1, 2, 3), workers=2))  # one seed to do, so no process
    assert len(run_study(more, console)) == 10
    other = replace(config, train=replace(config.train, lr=1e-3))
    with pytest.raises(InputError, match=r"the run has other settings \(train.lr\); choose another run.name"):
        run_study(other, console)
    (config.run_folder / "config.toml").unlink()  # as where study.jsonl alone was copied
    with pytest.raises(InputError, match="study.jsonl: base was measured under other settings; choose another"):
        run_study(other, console)


@pytest.mark.soak
def test_workers_measure_what_one_process_does(tmp_path, console):
    """Real runs, so small that pairs are few."""
    small = ["data.num_records=24", "curation.num_images=3", "curation.margin=0.01", "selfplay.num_rounds=2"]
    small += ["train.num_steps=2", "train.pairs_per_step=4", "eval.num_prompts=6", "eval.num_understanding=6"]
    arms, found = ("pair-dpo", "no-op", "generation-only", "oracle-pairs"), []
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)  # one for each worker
    for workers in (2, 1):
        where = [f"run.folder={tmp_path}", f"run.name=of-{workers}", f"study.workers={workers}", "study.seeds=[1, 2]"]
        lines = run_study(load_config(None, [*small, *where, f"study.arms={json.dumps(arms)}"]), console)
        measured = {(line["arm"], line["seed"]): [line["right"], line["settings"]] for line in lines}
        assert set(measured) == {(BASE, None), *((arm, seed) for arm in arms for seed in (1, 2))}
        own, shared = (tmp_path / f"of-{workers}/{arm}-seed-1/round-2/pairs.parquet" for arm in arms[:2])
        assert own.samefile(shared)
        found.append(measured)
        torch.set_num_threads(1)
    torch.set_num_threads(num_threads)
    assert found[0] == found[1]


def test_an_arm_says_what_it_lacks_of_pair_dpo(config, evaluated, console):
    first = replace(config.study, arms=("pair-dpo",))
    run_study(replace(config, study=first), console)
    (config.run_folder / "pair-dpo-seed-1/records.parquet").unlink()
    with pytest.raises(InputError, match="pair-dpo-seed-1/records.parquet: is missing, and generation-only-seed-1"):
        run_study(config, console)


def with_counts(line, counts):
    return line | {"right": line["right"] | {"generation": counts}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "is not of a study: expected a line of base"),
        (lambda lines: [lines[0], lines[1] | {"arm": "<b>"}], "is not of a study"),
        (lambda lines: [lines[0], with_counts(lines[1], [1])], "line 2 measures other records than line 1"),
        (lambda lines: [lines[0], lines[1] | {"right": {}}], "line 2 measures other records than line 1"),
        (lambda lines: [{"arm": BASE}], "line 1 is not of a study, it lacks seed, rounds"),
        (lambda lines: [{k: v for k, v in lines[0].items() if k != "asked"}], "is not of a study: expected a line of"),
        (lambda lines: [], "is not of a study"),
        (lambda lines: [lines[0] | {"seed": 0}], "is not of a study: expected a line of base"),
        (lambda lines: [lines[0] | {"right": [1, 2], "asked": [3, 4]}], "was measured before balanced questions were"),
        (lambda lines: [lines[0], lines[1] | {"arm": ["no-op"]}], "is not of a study"),
        (lambda lines: [lines[0], lines[1] | {"right": 5}], "line 2 is damaged: expected lists of counts"),
        (lambda lines: [lines[0], with_counts(lines[1], 5)], "line 2 is damaged: expected lists of counts"),
        (lambda lines: [lines[0], with_counts(lines[1], ["5"] * 8)], "line 2 is damaged"),
        (lambda lines: [*lines, lines[1]], "line 3 repeats an arm and seed"),
        (lambda lines: [*lines, lines[1] | {"seed": 2, "settings": "b"}], "line 3 was measured under other settings"),
    ],
    ids=[
        "no_base",
        "unknown_arm",
        "other_records",
        "other_metrics",
        "fields",
        "nothing_asked",
        "empty",
        "base_with_a_seed",
        "of_before",
        "arm_no_text",
        "no_metrics",
        "no_list",
        "no_number",
        "twice",
        "settings",
    ],
)
def test_what_is_no_study_is_refused(change, message, tmp_path):
    lines = change(make_lines(np.random.default_rng(6), {"pair-dpo": 0.0}, size=8, seeds=(1,)))
    path = tmp_path / "study.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=message):
        read_study(path)


SETTINGS_OF_A_STUDY = {
    "study.seeds=[]": "expected at least one, none of them twice, got []",
    "study.seeds=[1, 1]": "none of them twice, got [1, 1]",
    "study.seeds=[-1]": "expected seeds from 0 to 2**63 - 1",
    'study.arms=["no-op", "pair-dpo"]': "expected pair-dpo first",
    'study.arms=["pair-dpo", "magic"]': "expected some of pair-dpo, grpo, no-op",
    "study.workers=0": "at least 1",
}


@pytest.mark.parametrize("setting", SETTINGS_OF_A_STUDY)
def test_settings_of_a_study_are_checked(setting):
    with pytest.raises(InputError, match=re.escape(SETTINGS_OF_A_STUDY[setting])):
        load_config(None, [setting])


def test_an_arm_that_cannot_be_is_told_before_anything_runs(config, evaluated, console):
    one_sided = replace(config, train=replace(config.train, generation_weight=0.0))
    with pytest.raises(
        InputError,
        match="study: generation-only cannot have these settings: .*generation_weight.*leave it out of study.arms",
    ):
        run_study(one_sided, console)
    assert not evaluated and not config.run_folder.exists()


def test_other_weights_do_not_join_a_study(config, evaluated, console, monkeypatch):
    run_study(config, console)
    monkeypatch.setattr(runner, "model_digest", lambda model: "other")
    with pytest.raises(InputError, match="the run began with other weights than 'tiny' holds now"):
        run_study(config, console)


def test_readme_and_its_page_show_the_study_in_benchmarks_results():
    effects = Effects(read_study(ROOT / "benchmarks/results/study-cpu-tiny.jsonl"))
    for name, marker in (("README.md", "study short"), ("docs/study.md", "study")):
        text = (ROOT / name).read_text()
        shown = text.partition(f"<!-- {marker} -->\n\n")[2].partition("\n\n<!-- /study -->")[0]
        assert shown == findings.markdown(effects, marker).strip()
    config = load_config(ROOT / "benchmarks/study/default.toml")
    assert tuple(effects.seeds) == config.study.seeds
    assert {"pair-dpo", "no-op", "generation-only"} <= set(effects.arms)


@pytest.fixture
def finished(tmp_path):
    """Lines of a study, its settings, and a README with markers."""
    gains = {"pair-dpo": 0.1, "no-op": 0.0, "generation-only": 0.1, "understanding-only": 0.0}
    lines = make_lines(np.random.default_rng(7), gains)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "study.toml").write_text(f'[run]\nname = "<i>"\nfolder = "{tmp_path}"\n[study]\nseeds = [1, 2, 3, 4]\n')
    (tmp_path / "README.md").write_text("# A\n\n<!-- study -->\nold\n<!-- /study -->\nB\n")
    return tmp_path


def study(folder, *options):
    return cli.main(["study", "--config", str(folder / "study.toml"), "--lines", str(folder / "lines.jsonl"), *options])


def test_lines_are_enough_for_table_readme_and_page(finished, capsys):
    assert study(finished, "--readme", str(finished / "README.md")) == 0
    shown, text = " ".join(capsys.readouterr().out.split()), (finished / "README.md").read_text()
    assert "4 seeds of each arm, 200 prompts with 400 images and 150 real images" in shown
    assert "pair-dpo minus understanding-only: understanding: yes, +" in shown
    assert "pair-dpo minus generation-only: generation: not shown" in shown
    assert text.startswith("# A\n\n<!-- study -->\n\n4 seeds of each arm") and text.endswith("\n<!-- /study -->\nB\n")
    assert "old" not in text and re.search(r"\| pair-dpo \| [\d.]+, \*\*\+[\d.]+ \[", text)
    html = (finished / "<i>" / "index.html").read_text()
    assert "<h1>Self-play against its controls</h1>" in html and "Study &lt;i&gt;" in html and "<i>" not in html
    assert html.count("<svg") == 12 and 'class="dot better"' in html and "no significant difference" in html
    assert study(finished, "--readme", str(finished / "README.md")) == 0
    assert (finished / "README.md").read_text() == text
    chosen = ["--set", "study.seeds=[2, 3]", "--set", 'study.arms=["pair-dpo", "no-op"]']
    assert study(finished, *chosen, "--readme", str(finished / "README.md")) == 0
    text = (finished / "README.md").read_text()
    assert "2 seeds of each arm" in text and "| no-op |" in text and "generation-only" not in text


def test_a_short_table_for_one_file_and_all_tables_for_another(finished):
    short, full = finished / "README.md", finished / "study.md"
    full.write_text(short.read_text())
    short.write_text("<!-- study short -->\n<!-- /study -->\n")
    assert study(finished, "--readme", str(short), "--readme", str(full)) == 0
    assert "minus" in full.read_text() and "minus" not in short.read_text()
    short.write_text("<!-- study shrt -->\n<!-- /study -->\n")
    assert (
        study(finished, "--readme", str(short)) == 2 and short.read_text() == "<!-- study shrt -->\n<!-- /study -->\n"
    )
    short.write_text("<!-- study short -->\n<!-- /study -->\n")
    assert study(finished, "--readme", str(short)) == 0
    [header] = [line for line in short.read_text().splitlines() if line.startswith("| measured")]
    assert header == "| measured: %, change in points | understanding | 8/0.7, strict |"


def test_one_arm_alone_has_no_comparisons(finished):
    lines = make_lines(np.random.default_rng(8), {"pair-dpo": 0.1}, seeds=(1,))
    effects = Effects(lines)
    words = dict(findings.answer_claims(effects))
    of_gap = words.pop("How much of the gap closes?")
    assert re.fullmatch(r"pair-dpo: 3\.3 % of it \[−\d+\.\d, \d+\.\d\], from 20\.9 to 20\.2 points\.", of_gap)
    [(asked, answer)] = words.items()
    assert asked == "Is one run enough to see it?" and "significantly better in 1 of 1" in answer
    assert "minus" not in findings.markdown(effects)
    assert findings.describe_study(effects).startswith("1 seed of each arm")
    config = load_config(finished / "study.toml")
    assert page.write_page(config, effects).read_text().count("<svg") == 6


def test_the_part_of_the_gap_that_closes_has_an_interval():
    lines = make_lines(np.random.default_rng(11), {"pair-dpo": 0.0, "no-op": 0.0}, seed_spread=0.0)
    for line in lines[1:]:
        if line["arm"] == "pair-dpo":  # generation as good as understanding nearly is
            more = np.minimum(lines[0]["asked"]["generation"], np.add(line["right"]["generation"], 1)).tolist()
            line["right"]["generation"] = more
    effects = Effects(lines)
    closed, gap = effects.closed_gap("pair-dpo"), effects.value(BASE, "gap")
    assert closed["change"] == pytest.approx((gap - effects.value("pair-dpo", "gap")) / gap)
    assert closed["ci95"][0] < closed["change"] < closed["ci95"][1] and closed["significant"]
    assert not effects.closed_gap("no-op")["significant"]
    lines[0]["right"]["understanding"] = [0] * 200
    assert Effects(lines).closed_gap("pair-dpo") is None
    assert findings.answer_claims(Effects(lines))[0][1] == "There was none that is clear of zero."


def test_pictures_are_drawn_by_the_models_that_are_there(finished, monkeypatch):
    config = load_config(finished / "study.toml", ["eval.num_prompts=8"])
    gains = {"pair-dpo": 0.1, "grpo": 0.1, "no-op": 0.0}
    effects, opened = Effects(make_lines(np.random.default_rng(9), gains)), []
    rounds = {"pair-dpo": 3, "grpo": 1}
    folders = [arm_config(config, arm, 1).run_folder / f"round-{last}/model" for arm, last in rounds.items()]
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.setattr(page, "open_model", lambda model: opened.append(model.name))
    pixels = np.zeros((6, 1, 8, 8, 3), np.uint8)
    monkeypatch.setattr(page, "draw_images", lambda model, records, settings: pixels[: len(records)])
    html = page.write_page(config, effects).read_text()
    assert opened == ["tiny", *map(str, folders)] and html.count("<img") == 18
    assert html.count("<figcaption>before self-play</figcaption>") == 6


def test_a_study_is_refused_without_its_settings_or_markers(finished, capsys):
    assert cli.main(["study"]) == 2
    assert "study: give --config FILE" in capsys.readouterr().err
    (finished / "README.md").write_text("# A\n")
    assert study(finished, "--readme", str(finished / "README.md")) == 2
    assert "has no markers; add <!-- study --> and <!-- /study -->" in capsys.readouterr().err


def test_a_picture_of_the_effects(finished):
    pytest.importorskip("matplotlib")
    assert study(finished, "--plot", str(finished / "study.png")) == 0
    assert (finished / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_settings_that_ship_can_be_read():
    config = load_config(runner.Path(runner.__file__).with_name("default.toml"))
    assert config.run.name == "study" and config.study.arms == STUDY_ARMS and config.eval.split == "test"
