"""Settings: round trip, and one clear line for every kind of mistake."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from hermesflow.config import (
    ALSO_CALLED,
    PAPER_OBJECTIVE,
    Config,
    CurationConfig,
    RunConfig,
    TrainConfig,
    load_config,
    to_toml,
)
from hermesflow.runtime.files import InputError
from hermesflow.training import check_training


def settings_file(tmp_path, text):
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_survive_the_round_trip(tmp_path):
    assert load_config(settings_file(tmp_path, to_toml(Config()))) == Config()


def test_every_kind_of_value_survives_the_round_trip(tmp_path):
    odd = 'quote " backslash \\ tab\t del\x7f snow ☃ 𝄞'
    overrides = ["train.lr=1e-7", "curation.include_greedy=false", "curation.caption_top_k=[0, 3]", "run.seed=7"]
    config = load_config(None, [*overrides, f"data.source={odd}"])
    assert config.data.source == odd.strip()
    assert load_config(settings_file(tmp_path, to_toml(config))) == config


def test_a_byte_order_mark_before_the_settings(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[run]\r\nseed = 3\r\n")
    assert load_config(tmp_path / "a.toml").run.seed == 3


HOME_KEYS = (
    "run.folder", "model.name", "model.judge", "data.source", "data.questions", "data.root", "curation.bert_model",
    "curation.sentence_model", "eval.data", "eval.questions", "eval.root", "pretrain.folder",
)  # fmt: skip


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "override"])
@pytest.mark.parametrize("key", HOME_KEYS)
def test_the_home_folder_in_settings(key, from_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    section, _, name = key.partition(".")
    needed = ["data.source=x", "eval.data=x"] if name in ("questions", "root") else []
    path = settings_file(tmp_path, f'[{section}]\n{name} = "~/x"\n') if from_file else None
    config = load_config(path, [*needed, *([] if from_file else [f"{key}=~/x"])])
    assert getattr(getattr(config, section), name) == "/home/me/x"
    assert load_config(settings_file(tmp_path, to_toml(config))) == config


def test_no_folder_is_called_tilde(monkeypatch):
    assert RunConfig(folder="~").folder == str(Path.home())
    with pytest.raises(InputError, match="run.name: expected a plain folder name"):
        load_config(None, ["run.name=~"])
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(InputError, match="run.folder=~/x: run.folder: ~/x: ~ is the home folder, .*; set HOME"):
        load_config(None, ["run.folder=~/x"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("caf\udce9", r"text: 'caf\\udce9' is not valid Unicode text; write it"),
        ('"a\\u0000"', "text: expected no null"),
    ],
    ids=["surrogate", "null"],
)
@pytest.mark.parametrize("key", ["data.source", "run.folder", "eval.judge", "curation.score", "model.family"])
def test_texts_that_no_file_can_hold(key, value, message):
    with pytest.raises(InputError, match=f"{key}: {message}"):
        load_config(None, [f"{key}={value}"])


def test_the_published_settings():
    config = load_config(Path(__file__).parents[2] / "docs/paper.toml")
    assert PAPER_OBJECTIVE.items() <= dataclasses.asdict(config.train).items()
    assert config.curation.num_captions == 10
    drawn = (config.curation.num_images, config.curation.num_steps, config.curation.guidance_scale)
    assert drawn == (16, 50, 5.0) and config.curation.threshold == 0.6 and config.data.num_records == 5000
    trained = (config.train.num_steps, config.train.pairs_per_step, config.train.lr, config.train.beta)
    assert trained == (3000, 4, 2e-5, 0.2) and not config.selfplay.fresh_prompts


def test_the_scores_of_a_function_have_their_own_scale():
    config = load_config(None, ["curation.score=rewards:score", "curation.threshold=-1.5", "curation.margin=2"])
    assert (config.curation.threshold, config.curation.margin) == (-1.5, 2)
    for setting, message in (("threshold=nan", "a finite number"), ("margin=-1", "at least 0"), ("margin=inf", "at")):
        with pytest.raises(InputError, match=message):
            load_config(None, ["curation.score=rewards:score", f"curation.{setting}"])
    with pytest.raises(InputError, match="0 to 1"):
        load_config(None, ["curation.threshold=-1.5"])


def test_each_key_is_explained():
    for line in to_toml(Config()).splitlines():
        assert not line or line.startswith("[") or line.endswith("."), line
    tables = tomllib.loads(to_toml(Config()))
    assert {name: set(table) for name, table in tables.items()} == {
        section.name: {key.name for key in dataclasses.fields(getattr(Config(), section.name))}
        for section in dataclasses.fields(Config)
        if section.name != "round"
    }


def test_overrides_win_over_the_file(tmp_path):
    path = settings_file(tmp_path, "[train]\nlr = 1\nbeta = 0.5\n")
    config = load_config(path, ["train.lr=2e-5", "train.lr=3e-5"])
    assert config.train.lr == 3e-5 and config.train.beta == 0.5


def test_whole_numbers_become_floats_and_lists_tuples(tmp_path):
    config = load_config(settings_file(tmp_path, "[train]\nbeta = 1\n[curation]\ncaption_temperatures = [1, 0.5]\n"))
    assert type(config.train.beta) is float
    assert config.curation.caption_temperatures == (1.0, 0.5)
    assert config.curation.num_captions == 1 + 2 * 3


@pytest.mark.parametrize(
    ("override", "value"),
    [("run.name=3", "3"), ("run.name=2024-01-01", "2024-01-01"), ('run.name="x y"', "x y"), ("run.name = a=b", "a=b")],
)
def test_a_string_needs_no_quotes_on_the_command_line(override, value):
    assert load_config(None, [override]).run.name == value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.compile=True", True),
        ("train.compile=FALSE", False),
        ("train.lr=.5", 0.5),
        ("train.lr=5.", 5.0),
        ("train.lr=+1E-4", 1e-4),
        ("train.num_steps=1e3", 1000),
        ("train.num_steps=1_000", 1000),
        ("eval.seed=9007199254740993", 2**53 + 1),
        ("eval.seed=09007199254740993", 2**53 + 1),
    ],
)
def test_values_are_read_as_people_write_them(override, value):
    section, key = override.partition("=")[0].split(".")
    found = getattr(getattr(load_config(None, [override]), section), key)
    assert found == value and type(found) is type(value)


def test_keys_by_what_other_trainers_call_them():
    for name, key in ALSO_CALLED.items():
        section, _, name_of_key = key.partition(".")
        assert hasattr(getattr(load_config(), section), name_of_key), key
        with pytest.raises(InputError, match=f"unknown key train.{name}; the nearest is {key}$"):
            load_config(None, [f"train.{name}=1"])
        with pytest.raises(InputError, match=f"unknown key {name}; the nearest is {key}$"):
            load_config(None, [f"{name}=1"])


def test_a_round_may_have_settings_of_its_own(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[train]\nlr = 1e-4\n[round.2.train]\nnum_steps = 5\n[round.2.selfplay]\nalgorithm = 'grpo'\n")
    config = load_config(path, ["train.beta=0.5", "round.3.train.lr=1", "round.2.train.num_steps=6"])
    assert config.of_round(1) == config
    second, third = config.of_round(2), config.of_round(3)
    assert (second.train.num_steps, second.train.lr, second.train.beta) == (6, 1e-4, 0.5)
    assert second.selfplay.algorithm == "grpo" and third.selfplay.algorithm == "pair-dpo"
    assert third.train.lr == 1.0 and isinstance(third.train.lr, float)
    path.write_text(to_toml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("round.4.train.lr=1", r"round.4: the run has rounds 1 to 3; raise selfplay.num_rounds"),
        ("round.0.train.lr=1", "unknown key round.0.train.lr; the nearest is train.lr"),
        (
            "round.2.model.name=x",
            "unknown key round.2.model.name; .*a round's own is round.NUMBER.section.key, of data",
        ),
        ("round.2.train.lr=-1", r"round.2.train.lr: expected more than 0, got -1.0"),
        ("round.2.train=3", "unknown key round.2.train"),
    ],
)
def test_a_mistake_in_a_round(override, message):
    with pytest.raises(InputError, match=message):
        load_config(None, [override])


def test_rounds_of_the_same_records_have_as_many():
    with pytest.raises(InputError, match="round.2.data: every round has the same records"):
        load_config(None, ["selfplay.fresh_prompts=false", "round.2.data.num_records=3"])


def test_run_folder():
    assert load_config(None, ["run.folder=out", "run.name=demo"]).run_folder.parts == ("out", "demo")


FILE_MISTAKES = {
    "syntax": ("[train\n", r"not a TOML file .*line 1"),
    "unknown section": ("[trian]\nlr = 1\n", "unknown key trian; the nearest is train$"),
    "unknown key": ("[train]\nlearning_rates = 1\n", r"unknown key train.learning_rates; the nearest is \w+\.\w+$"),
    "key in the wrong section": ("[train]\nnum_rounds = 1\n", "train.num_rounds; the nearest is selfplay.num_rounds$"),
    "section is no table": ("train = 3\n", r"train: expected a table \[train\], got 3 \(int\)"),
    "nested table": ("[train.lr]\nx = 1\n", r"train.lr: expected a finite number \(float\), got \{'x': 1\} \(table\)"),
    "string for float": ('[train]\nlr = "fast"\n', r"train.lr: expected a finite number \(float\), got 'fast'"),
    "float for int": ("[train]\nnum_steps = 1.5\n", r"train.num_steps: expected a whole number \(int\), got 1.5"),
    "bool for int": ("[train]\nnum_steps = true\n", r"train.num_steps: .* got True \(bool\)"),
    "int for bool": ("[selfplay]\nfresh_prompts = 1\n", r"fresh_prompts: expected true or false, got 1 \(int\)"),
    "int for str": ("[run]\nname = 1\n", r"run.name: expected a string in quotes, got 1 \(int\)"),
    "number for list": ("[curation]\ncaption_top_k = 4\n", r"caption_top_k: expected a list of int such as \[2, 4"),
    "string in list": ('[curation]\ncaption_top_k = ["4"]\n', "caption_top_k: expected a list of int"),
    "choice": ('[curation]\nscore = "mild"\n', 'curation.score: expected soft, hard, mixed, or .*, got .mild.'),
    "not finite": ("[train]\nlr = inf\n", "train.lr: expected a finite number"),
    "too large for a float": (f"[train]\nlr = {10**400}\n", "train.lr: expected a finite number"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), FILE_MISTAKES.values(), ids=FILE_MISTAKES)
def test_a_mistake_in_a_file_names_file_and_key(tmp_path, text, message):
    path = settings_file(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="settings.toml: not a TOML file"):
        load_config(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="none.toml: no such file"):
        load_config(tmp_path / "none.toml")


SET_MISTAKES = {
    "no equals": ("train.lr", "expected section.key=value"),
    "no section": ("lr=1", r"unknown key lr; the nearest is \w+\.lr$"),
    "a fraction for a count": ("train.num_steps=1.5", r"expected a whole number \(int\), got 1.5"),
    "too large": ("train.num_steps=1e300", r"expected a whole number \(int\), got 1e\+300"),
    "infinite": ("train.lr=1e400", "expected a finite number"),
    "not a number": ("train.lr=NaN", "expected a finite number"),
    "a number in quotes": ('train.num_steps="12"', "expected a whole number"),
    "no number": ("train.num_steps=many", r"expected a whole number \(int\), got 'many'"),
    "no truth": ("train.compile=yes", "expected true or false, got 'yes'"),
    "misspelt": ("train.betta=1", "unknown key train.betta; the nearest is train.beta$"),
    "two values": ("train.num_steps=1\nx=2", "train.num_steps: expected a whole number"),
}


@pytest.mark.parametrize(("override", "message"), SET_MISTAKES.values(), ids=SET_MISTAKES)
def test_a_mistake_in_set(override, message):
    with pytest.raises(InputError, match=message) as caught:
        load_config(None, [override])
    assert str(caught.value).startswith(override.splitlines()[0][:8])


def test_a_key_outside_its_section(tmp_path):
    (tmp_path / "a.toml").write_text("lr = 1e-4\n")
    with pytest.raises(InputError, match=r"unknown key lr; the nearest is train.lr; write it below its section"):
        load_config(tmp_path / "a.toml")


RANGES = {
    "run.seed=-1": "a seed from 0",
    "run.name=": "a plain folder name, got ''",
    "run.name=../up": "a plain folder name",
    "run.name=a\\b": "a plain folder name",
    "data.num_records=0": "at least 1, got 0",
    "data.questions=vqa_data.json": 'a file of records in data.source, got "shapes"',
    "data.root=images": 'a file of records in data.source, got "shapes"',
    "curation.num_images=1": "at least 2, got 1",
    "curation.threshold=1.5": "0 to 1, got 1.5",
    "curation.caption_temperatures=[0.5, -1]": r"at least 0, got \[0.5, -1.0\]",
    "curation.caption_temperatures=[]": "at least 2 captions",
    "curation.caption_temperatures=[1e38]": r"at most 1e6, got \[1e\+38\]",
    "curation.caption_temperatures=[1e-300]": r"1e-6 to 1e6 if not 0, got \[1e-300\]",
    "curation.caption_top_k=[2147483648]": "at most 2147483647",
    "drawing.guidance_scale=1e38": r"at least 0, or -1 to leave it open, and 1e-6 to 1e6 if not 0, got 1e\+38",
    "drawing.temperature=1e308": r"at least 0, or -1 to leave it open, and 1e-6 to 1e6 if not 0, got 1e\+308",
    "drawing.mask_temperature=1e-300": "at least 0, or -1 to leave it open, and 1e-6 to 1e6 if not 0, got 1e-300",
    "drawing.guidance_scale=nan": "a finite number",
    "eval.samplers=['4/1', '65537/1']": "at most 65536 steps",
    "eval.samplers=['4/0.0000000001']": "at most 65536 steps, and a temperature of 0 or 1e-6 to 1e6",
    "train.lr=1e38": r"at most 1e6, got 1e\+38",
    "train.lr=1e308": r"at most 1e6, got 1e\+308",
    "train.lr=inf": "a finite number",
    "train.beta=1e38": r"at most 1e6, got 1e\+38",
    "train.beta=1e-300": "1e-6 to 1e6 if not 0, got 1e-300",
    "train.generation_beta=1e-300": "1e-6 to 1e6 if not 0, got 1e-300",
    "train.weight_decay=1e38": "at most 1e6",
    "train.max_grad_norm=1e308": "at most 1e6",
    "train.nll_weight=1e38": "at most 1e6",
    "train.num_steps=99999999999999999999": "at most 2147483647",
    "train.lora_rank=99999999": "0 to 65536",
    "grpo.reward_weights=[1e38, 1]": "-1e6 to 1e6",
    "grpo.kl_weight=1e38": "at most 1e6",
    "train.lr=0": "more than 0, got 0.0",
    "train.warmup_steps=-1": "at least 0, got -1",
    "train.replay_weight=-0.5": "at least 0, got -0.5",
    "train.replayed_questions=0": "at least 1, got 0",
    "eval.seed=9223372036854775808": "a seed from 0",
    "eval.guidance_scale=-0.5": "at least 0, or -1 to leave it open, and 1e-6 to 1e6 if not 0, got -0.5",
    "selfplay.num_rounds=0": "at least 1, got 0",
    "pretrain.condition_dropout=2": "0 to 1, got 2.0",
}


@pytest.mark.parametrize(("override", "message"), RANGES.items(), ids=RANGES)
def test_a_value_out_of_range(override, message):
    with pytest.raises(InputError, match=f"{override.partition('=')[0]}: expected {message}"):
        load_config(None, [override])


def test_sections_check_themselves_in_python_too():
    with pytest.raises(ValueError, match="TrainConfig.lr: expected more than 0, got -1.0"):
        TrainConfig(lr=-1)
    with pytest.raises(ValueError, match="CurationConfig.keep: expected one of"):
        CurationConfig(keep="none")
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 3


def test_how_images_are_drawn_is_said_once_and_may_be_overridden():
    config = load_config(None, ["drawing.num_steps=4", "drawing.temperature=0.7", "eval.temperature=0"])
    curation, measured = config.drawn_by(config.curation), config.drawn_by(config.eval)
    assert (curation.num_steps, measured.num_steps, curation.guidance_scale) == (4, 4, -1)
    assert (curation.temperature, measured.temperature) == (1.0, 0.0)  # curation's default is its own
    config = load_config(None, ["drawing.temperature=0.7", "curation.temperature=-1"])
    assert config.curation.temperature == -1 and config.drawn_by(config.curation).temperature == 0.7


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "docs").glob("*.toml")), ids=lambda path: path.name
)
def test_the_settings_in_docs_can_be_read(path: Path) -> None:
    config = load_config(path)
    check_training(config)
    if path.name.startswith("grpo"):
        assert config.selfplay.algorithm == "grpo"
