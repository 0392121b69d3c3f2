"""The command line: examples that parse, one clear line for bad input, and the tasks on a stand-in model."""

import errno
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from hermesflow import arguments, cli, tasks
from hermesflow.arguments import with_settings
from hermesflow.config import load_config
from hermesflow.kernels.registry import BackendError
from hermesflow.models import family
from hermesflow.models.images import fit_image, read_image
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError
from hermesflow.worlds.pretraining import PROMPTS as TINY_PROMPTS
from hermesflow.worlds.pretraining import SAMPLING as TINY_SAMPLING

COMMANDS = [
    "selfplay", "pretrain", "generate", "inpaint", "extrapolate", "caption", "answer", "curate", "train", "score",
    "questions", "eval", "serve", "export", "merge", "push", "pairs", "pairs export", "pairs import", "report", "study",
    "config", "doctor", "bench", "bench ops", "bench e2e", "bench train", "bench drop-in", "bench table",
]  # fmt: skip
SIZE = 16


class StandInEngine:
    """Draws each image in one grey level, its seed, and says how bright an image is."""

    max_sequences = 8

    def __init__(self):
        self.calls = []

    def generate(self, prompt_ids, *, num_images, seeds, sampling, known_codes=None, progress=iter):
        assert seeds.shape == (len(prompt_ids), num_images)
        assert known_codes is None or known_codes.shape == (len(prompt_ids), 4)
        self.calls.append((prompt_ids, sampling.num_steps))
        return seeds[:, :, None].repeat(1, 1, 4)

    def generate_text(self, image_codes, question_ids, *, sampling, seeds):
        assert len(question_ids) == len(image_codes) and seeds.shape == (len(image_codes), 1, len(sampling))
        assert sampling[0].temperature == 0
        return [[[[int(codes[0])]]] for codes in image_codes]

    def score_choices(self, image_codes, question_ids, choice_ids):
        # The right choice is the one of as many words as the image's level.
        levels = image_codes[:, 0].tolist()
        return [
            [[-float(abs(len(ids) - level)) for ids in of_question] for of_question in of_image]
            for level, of_image in zip(levels, choice_ids, strict=True)
        ]


class StandInModel(Model):
    image_size, engine = SIZE, None
    prompts, sampling = TINY_PROMPTS, TINY_SAMPLING
    layout = types.SimpleNamespace(image_grid=(2, 2), num_image_tokens=4)

    def __init__(self):
        self.engine = StandInEngine()

    def encode_text(self, text):
        if "unicorn" in text:
            raise InputError("the model does not know the word 'unicorn'")
        return [len(word) for word in text.split()]

    def decode_text(self, ids):
        return " ".join(f"level {number}" for number in ids)

    def encode_images(self, images):
        assert images.dtype == np.uint8 and images.shape[1:] == (SIZE, SIZE, 3)
        return torch.from_numpy(images[:, 0, 0, :1].astype(np.int64)).repeat(1, 4)

    def view_images(self, images):
        return self.encode_images(np.stack([fit_image(image, SIZE) for image in images]))

    def decode_images(self, codes, height=None, width=None):
        return np.broadcast_to(codes[:, 0].numpy().astype(np.uint8)[:, None, None, None], (len(codes), SIZE, SIZE, 3))


@pytest.fixture
def model(monkeypatch):
    model = StandInModel()
    monkeypatch.setattr(family, "load_model", lambda name, device, dtype, family: model)
    return model


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in("selfplay", run_selfplay=function) puts a module in the real one's place."""

    def replace(name, **functions):
        monkeypatch.setitem(sys.modules, f"hermesflow.{name}", types.SimpleNamespace(**functions))

    return replace


def raising(error):
    def run(*_):
        raise error

    return run


def grey(path, level, size=(SIZE, SIZE), mode="RGB"):
    Image.new("L", size, level).convert(mode).save(path)
    return path


def error_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("hermesflow: error: "), captured.err
    return captured.err


def example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    line = text.partition("example:\n")[2].strip()
    assert line.startswith(f"hermesflow {command}"), text
    return shlex.split(line)[1:]


def test_verbose_stands_anywhere():
    orders = ["-v", "run.name=x"], ["run.name=x", "-v"], ["-v", "--set", "run.name=x"]
    for words in (["selfplay", *order] for order in orders):
        arguments = cli.make_parser().parse_args(with_settings(words))
        assert arguments.verbose and arguments.set == ["run.name=x"]
    assert cli.make_parser().parse_args(["bench", "ops", "-v"]).verbose


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(command, capsys):
    arguments = cli.make_parser().parse_args(with_settings(example(command, capsys)))
    load_config(arguments.config, arguments.set)


def test_every_command_is_run_by_a_function():
    assert {*cli._RUN, "pairs", "bench"} == {command.name for command in arguments.COMMANDS} == set(COMMANDS)


def test_the_examples_of_the_tasks_run_one_after_the_other(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(Path(__file__).parents[2] / "docs" / "mask.png", tmp_path / "docs")
    for command in ("generate", "inpaint", "extrapolate"):
        assert cli.main(example(command, capsys)) == 0
    *start, pattern = example("caption", capsys)
    assert cli.main([*start, *map(str, sorted(tmp_path.glob(pattern)))]) == 0
    assert cli.main(example("answer", capsys)) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "selfply",
        "selfplay extra",
        "curate --round 0",
        "generate x --num-images -1",
        "generate x --seed y",
        "generate x --grid x.jpg",
        "caption",
        "answer a.png",
        "inpaint a.png b.png",
        "extrapolate a.png x",
        "extrapolate a.png x --direction left --steps two",
    ],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    assert caught.value.code == 2
    assert "usage: hermesflow" in capsys.readouterr().err


def test_commands_pass_their_settings_on(stand_in, tmp_path, capsys):
    calls = {}

    def record(name, result=None):
        return lambda *arguments: calls.update({name: arguments}) or result

    rounds = {"curate_round": record("curate"), "train_round": record("train")}
    stand_in("selfplay", run_selfplay=record("selfplay"), **rounds)
    stand_in("runs", Run=record("run", types.SimpleNamespace(describe_pairs="{} pairs".format, path="{} {}".format)))
    stand_in("worlds.pretraining", run_pretraining=record("pretrain"))
    stand_in("evaluation.evaluation", evaluate=record("eval", {"metrics": {}}))
    stand_in("report.tables", print_metrics=record("print"), make_console=Console)
    stand_in("report.page", write_report=record("report", "page"))
    (tmp_path / "settings.toml").write_text("[run]\nseed = 3\n[pretrain]\nseed = 4\n")
    common = ["--config", str(tmp_path / "settings.toml"), "--set", "run.name=here", "--set", f"run.folder={tmp_path}"]
    for command in ("selfplay", "pretrain", "eval", "report"):
        assert cli.main([command, *common]) == 0
    for command in ("curate", "train"):
        assert cli.main([command, *common, "--round", "2"]) == 0
    assert calls["selfplay"][0].run.seed == 3 and calls["selfplay"][0].run.name == "here"
    assert calls["pretrain"][0].seed == 4
    assert calls["curate"][1] == calls["train"][1] == 2 and calls["run"][0].run.name == "here"
    assert calls["report"][0].name == "here"
    assert calls["eval"][1] == calls["selfplay"][0].eval
    path = tmp_path / "here" / "evaluation.json"
    assert capsys.readouterr().out == f"evaluation: {path}\npage\n2 pairs\n2 model\n"
    assert cli.main(["eval", *common, "-o", str(tmp_path / "other.json")]) == 0 and (tmp_path / "other.json").exists()


@pytest.mark.parametrize("command", ["selfplay", "pretrain", "generate", "curate", "train", "eval"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--set", "train.lrr=1"], "train.lrr=1: unknown key train.lrr; the nearest is train.lr"),
        (["--set", "train.lr=fast"], "train.lr: expected a finite number"),
        (["--set", "train.lr=-1"], "train.lr: expected more than 0, got -1.0"),
        (["--config", "none.toml"], "none.toml: no such file"),
    ],
    ids=["key", "type", "range", "file"],
)
def test_wrong_settings_stop_a_command(command, settings, message, capsys, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = raising(AssertionError("started"))
    stand_in("selfplay", run_selfplay=started, curate_round=started, train_round=started)
    stand_in("worlds.pretraining", run_pretraining=started)
    stand_in("evaluation.evaluation", evaluate=started)
    assert cli.main([command, *settings]) == 2
    assert message in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_settings_need_no_set_before_them(stand_in, capsys):
    runs = []
    stand_in("selfplay", run_selfplay=runs.append)
    assert cli.main(["selfplay", "train.lr=.5", "--set", "train.beta=2", "run.name=a=b"]) == 0
    assert (runs[0].train.lr, runs[0].train.beta, runs[0].run.name) == (0.5, 2.0, "a=b")
    assert cli.main(["selfplay", "train.learning_rate=1"]) == 2
    assert "error: train.learning_rate=1: unknown key train.learning_rate; the nearest is train.lr" in error_line(
        capsys
    )
    assert cli.main(["selfplay", "lr=1"]) == 2
    assert "error: lr=1: unknown key lr; the nearest is " in error_line(capsys)


def test_what_is_no_setting_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.name=a.png").touch()
    for given in (
        ["generate", "a=b", "trainer.lr=1", "drawing.num_steps=4 red circles", "x", "--", "train.lr=1"],
        ["generate", "x", "-o", "run.name=1", "--set", "train.lr=1"],
        ["caption", "run.name=a.png", "x.png"],
        ["selfplay", "--config", "data.source=2.toml", "--model=a=b"],
        ["bench", "table", "data.source=1.jsonl"],
        ["unknown", "train.lr=1"],
        [],
    ):
        assert with_settings(given) == given
    given = ["generate", "a", "drawing.num_steps=4", "b", "--", "c"]
    assert with_settings(given) == ["generate", "a", "b", "--set", "drawing.num_steps=4", "--", "c"]
    with pytest.raises(SystemExit):
        cli.main(["selfplay", "--se", "train.lr=1"])


def test_config_prints_and_writes_all_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", "train.lr=1e-5"]) == 0
    text = capsys.readouterr().out
    assert "lr = 1e-05  # Peak learning rate of AdamW." in text
    assert cli.main(["config", "train.lr=1e-5", "-o", "mine.toml"]) == 0
    assert capsys.readouterr().out == "mine.toml\n" and (tmp_path / "mine.toml").read_text() == text
    assert load_config("mine.toml") == load_config(None, ["train.lr=1e-5"])
    assert cli.main(["config", "-o", "mine.toml"]) == 2
    assert "mine.toml: is there already; give another name" in error_line(capsys)
    assert (tmp_path / "mine.toml").read_text() == text


ERRORS = {
    "input": (InputError("runs/x: damaged\n  file"), "hermesflow: error: runs/x: damaged file\n"),
    "backend": (BackendError("no backend can run"), "no backend can run"),
    "disk full": (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: the disk is full; free some"),
    "disk full, no name": (OSError(errno.ENOSPC, "No space left on device"), "output: the disk is full"),
    "forbidden": (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "runs/x: cannot be written"),
    "read-only": (OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/x"), "runs/x: cannot be written"),
    "missing": (FileNotFoundError(errno.ENOENT, "No such file or directory", "runs/x"), "runs/x: No such file"),
}


@pytest.mark.parametrize(("error", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_of_the_users_is_one_line(error, message, stand_in, capsys):
    stand_in("selfplay", run_selfplay=raising(error))
    assert cli.main(["selfplay"]) == 2
    assert message in error_line(capsys)


def test_debug_shows_the_traceback(stand_in, monkeypatch):
    stand_in("selfplay", run_selfplay=raising(InputError("wrong")))
    monkeypatch.setenv("HERMESFLOW_DEBUG", "1")
    with pytest.raises(InputError):
        cli.main(["selfplay"])


def test_our_own_faults_keep_their_traceback(stand_in):
    stand_in("selfplay", run_selfplay=raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["selfplay"])


def test_interrupt_says_that_the_run_goes_on(stand_in, capsys):
    stand_in("selfplay", run_selfplay=raising(KeyboardInterrupt()))
    stand_in("report.page", write_report=raising(KeyboardInterrupt()))
    assert cli.main(["selfplay"]) == 130
    assert capsys.readouterr().err.strip() == "hermesflow: stopped; the same command resumes where it stopped"
    assert cli.main(["report"]) == 130
    assert capsys.readouterr().err.strip() == "hermesflow: stopped"


def test_the_process_ends_with_the_code_and_one_line(tmp_path):
    command = [sys.executable, "-P", "-m", "hermesflow", "selfplay", "--set", "tarin.lr=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "hermesflow: error: tarin.lr=1: unknown key tarin.lr; the nearest is train.lr\n"


def test_doctor_tells_of_every_op(capsys):
    from hermesflow.kernels import OPS

    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in (*OPS, torch.__version__, "C++ extension", "C++ compiler", "nvcc", "triton", "flash-attn", "xformers"):
        assert word in out, word


def test_generate_writes_what_is_needed_to_draw_again(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a green square\n\n  ¿?  \n", encoding="utf-8")
    arguments = ["--num-images", "2", "--seed", "5", "--num-steps", "3", "-o", str(tmp_path / "out")]
    assert cli.main(["generate", "a Red circle", "--prompts-file", str(prompts), *arguments]) == 0
    files = capsys.readouterr().out.split()
    assert [os.path.basename(file) for file in files] == [
        "a-red-circle_f240c6dfb9ed-seed5.png",
        "a-red-circle_f240c6dfb9ed-seed6.png",
        "a-green-square-seed7.png",
        "a-green-square-seed8.png",
        "image_21f2cda9ecb4-seed9.png",
        "image_21f2cda9ecb4-seed10.png",
    ]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(map(os.path.basename, files))
    with Image.open(files[4]) as image:
        assert image.text["prompt"] == "¿?" and image.text["seed"] == "9"
        assert json.loads(image.text["settings"])["num_steps"] == 3
        assert image.size == (SIZE, SIZE) and image.getpixel((0, 0)) == (9, 9, 9)
    assert {steps for _, steps in model.engine.calls} == {3}


def test_options_win_over_settings(monkeypatch, tmp_path):
    asked = []
    model = StandInModel()
    monkeypatch.setattr(family, "load_model", lambda *given, **options: asked.append((given, options)) or model)
    settings = ["--set", "model.name=other"]
    options = ["--model", "mine", "--device", "cpu", "--dtype", "bfloat16", "--num-steps", "2"]
    assert cli.main(["generate", "x", *options, *settings, "-o", str(tmp_path)]) == 0
    assert asked == [(("mine", "cpu", torch.bfloat16), {"family": "auto"})]
    assert model.engine.calls[0][1] == 2
    assert cli.main(["generate", "x", *settings, "-o", str(tmp_path)]) == 0
    assert asked[1] == (("other", "cuda" if torch.cuda.is_available() else "cpu", None), {"family": "auto"})
    assert model.engine.calls[1][1] == TINY_SAMPLING.num_steps


@pytest.mark.parametrize(("option", "value"), [("device", "tpu"), ("dtype", "int8")])
def test_a_device_or_dtype_that_is_none(option, value, capsys):
    assert cli.main(["generate", "x", f"--{option}", value]) == 2
    assert f"model.{option}: expected " in error_line(capsys)


def test_a_device_that_is_not_there(capsys):
    assert cli.main(["generate", "x", "--device", "cuda:99"]) == 2
    assert "model.device cuda:99: torch sees" in error_line(capsys)


def test_a_model_that_is_not_there(capsys):
    assert cli.main(["caption", "x.png", "--model", "giant"]) == 2
    assert "no model 'giant'" in error_line(capsys)


def test_pictures_of_pictures_carry_how_they_were_drawn(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey("a.png", 10)
    grey("mask.png", 255)
    common = ["-o", "out", "--num-images", "2", "--seed", "4"]
    warm = ["--temperature", "0.25", "--grid", "sheets/all.png"]
    assert cli.main(["inpaint", "a.png", "mask.png", "a dog", *common, *warm]) == 0
    assert capsys.readouterr().out.split() == [
        "out/a-dog-inpainted-seed4.png",
        "out/a-dog-inpainted-seed5.png",
        "sheets/all.png",
    ]
    drawing = {"model": "tiny", "dtype": "auto", **asdict(TINY_SAMPLING)}
    for file in ("out/a-dog-inpainted-seed4.png", "sheets/all.png"):
        with Image.open(file) as image:
            assert image.text["prompt"] == "a dog"
            assert json.loads(image.text["settings"]) == drawing | {
                "command": "inpaint",
                "image": "a.png",
                "mask": "mask.png",
                "temperature": 0.25,
            }
    monkeypatch.setattr(
        tasks,
        "extrapolate_image",
        lambda *given, **options: iter(
            [
                tasks.GeneratedImage(
                    "a dog", options["seed"], np.zeros((8, 24, 3), np.uint8), torch.zeros(2, 6, dtype=torch.int64)
                )
            ]
        ),
    )
    more = ["--direction", "left", "--direction", "up", "--steps", "2", "--offset", "1"]
    assert cli.main(["extrapolate", "a.png", "a dog", *more, *common]) == 0
    with Image.open(capsys.readouterr().out.strip()) as image:
        assert json.loads(image.text["settings"]) == drawing | {
            "command": "extrapolate",
            "image": "a.png",
            "prompts": ["a dog"],
            "directions": ["left", "up"],
            "steps": 2,
            "offset": 1,
        }


def test_generate_draws_the_same_whatever_the_batch(model):
    prompts = [f"prompt {number}" for number in range(5)]
    whole = list(tasks.generate_images(model, prompts, num_images=3, seed=1))
    model.engine.max_sequences = 6
    model.engine.calls.clear()
    parts = list(tasks.generate_images(model, prompts, num_images=3, seed=1))
    assert len(model.engine.calls) == 5 and len(parts) == 15
    for one, other in zip(whole, parts, strict=True):
        assert one[:2] == other[:2] and (one.pixels == other.pixels).all()


def test_the_tasks_on_the_real_engine(tiny_model, monkeypatch, tmp_path, capsys, recwarn):
    monkeypatch.setattr(family, "load_model", lambda name, device, dtype, family: tiny_model)
    monkeypatch.chdir(tmp_path)
    prompts = ["a small red circle", "a blue square"]
    assert cli.main(["generate", *prompts, "--num-images", "2", "-o", "all", "--set", "eval.num_steps=3"]) == 0
    assert cli.main(["generate", prompts[1], "--seed", "3", "-o", "one", "--set", "eval.num_steps=3"]) == 0
    again, image = (str(tmp_path / folder / "a-blue-square-seed3.png") for folder in ("one", "all"))
    # The codes are equal (tests/engine); convolutions round by batch size, which may move a pixel by one level of 255.
    first, second = (read_image(path, 64).astype(int) for path in (again, image))
    assert abs(first - second).max() <= 1
    capsys.readouterr()
    assert cli.main(["caption", again, image]) == 0
    captions = [json.loads(line)["caption"] for line in capsys.readouterr().out.splitlines()]
    assert len(captions) == 2 and captions[0] == captions[1]
    assert cli.main(["answer", image, "what color is the circle ?", "--choices", "red,green"]) == 0
    assert set(json.loads(capsys.readouterr().out)["probabilities"]) == {"red", "green"}
    assert cli.main(["answer", image, "what color is the circle ?"]) == 0
    both = ["--direction", "up", "--direction", "left"]
    Image.new("L", (640, 640), 255).save("mask.png")
    assert cli.main(["inpaint", image, "mask.png", prompts[0], "--grid", "grid.png"]) == 0
    assert cli.main(["extrapolate", image, prompts[0], *both]) == 0
    with Image.open(capsys.readouterr().out.split()[-1]) as extended:
        assert extended.size == (96, 96)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompts; give them as arguments or with --prompts-file"),
        (["a circle", " "], "prompt 2: expected words, got ' '"),
        (["a unicorn"], "does not know the word 'unicorn'"),
        (["--prompts-file", "none.txt"], "none.txt: no such file"),
    ],
)
def test_generate_refuses(model, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", *arguments, "-o", "out"]) == 2
    assert message in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_generate_to_a_folder_that_cannot_be_written(model, no_folder, capsys):
    assert cli.main(["generate", "a circle", "-o", str(no_folder)]) == 2
    assert "cannot be written" in error_line(capsys)


def test_generate_to_a_full_disk(model, full_disk, capsys):
    assert cli.main(["generate", "a circle", "-o", str(full_disk)]) == 2
    assert "a-circle-seed0.png: the disk is full" in error_line(capsys)
    assert os.listdir(full_disk) == ["filling"]


def test_caption_reads_any_kind_and_size(model, tmp_path, capsys):
    images = [grey(tmp_path / "a.png", 10, (40, 17)), grey(tmp_path / "b.jpg", 20, (5, 90)),
              grey(tmp_path / "c.gif", 30, mode="L"), grey(tmp_path / "d.png", 40, mode="RGBA")]  # fmt: skip
    assert cli.main(["caption", *map(str, images)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"image": str(path), "caption": f"level {level}"} for path, level in zip(images, (10, 20, 30, 40), strict=True)
    ]


def test_read_image_crops_the_centre_and_turns_it_upright(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255  # the center
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", 8)[:, 1:7] > 200).all()

    turned = np.zeros((8, 8, 3), np.uint8)
    turned[:, :4] = 255  # left, to be turned by 90 degrees clockwise: top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=exif)
    upright = read_image(tmp_path / "turned.png", 8)
    assert upright[:3].min() == 255 and upright[5:].max() == 0


def test_read_image_keeps_the_levels_of_16_bit_grey(tmp_path):
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png", 4) == 128).all()


def no_image(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    if kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:800])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "text.png: not an image that can be read; give a whole PNG"),
        ("empty", "empty.png: not an image"),
        ("cut", "cut.png: not an image"),
        ("folder", "folder.png: cannot be read"),
        ("none", "none.png: no such file"),
    ],
)
@pytest.mark.parametrize("command", ["caption", "answer"])
def test_an_image_that_is_none(model, command, kind, message, tmp_path, capsys):
    good, bad = str(grey(tmp_path / "good.png", 1)), str(no_image(tmp_path, kind))
    assert cli.main(["caption", good, bad] if command == "caption" else ["answer", bad, "what ?"]) == 2
    captured = capsys.readouterr()
    described = [json.loads(line)["image"] for line in captured.out.splitlines()]
    assert described == ([good] if command == "caption" else [])
    assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("command", ["caption", "answer", "choices"])
@pytest.mark.parametrize(
    "bad", [[0], [3], [2, 15, 16, 33], [*range(16)], [*range(34)]], ids=["first", "one", "several", "a batch", "all"]
)
def test_bad_images_do_not_stop_the_others(model, command, bad, tmp_path, capsys):
    """34 images are two whole batches and a ragged one."""
    paths = [str(grey(tmp_path / f"{number:02}.png", 2)) for number in range(34)]
    kinds = itertools.cycle(["text", "empty", "cut", "folder", "none"])
    for number, kind in zip(bad, kinds, strict=False):
        paths[number] = (
            str(no_image(tmp_path, kind).rename(tmp_path / f"{number}-{kind}")) if kind != "none" else "none"
        )
    question = {"caption": [], "answer": ["how bright ?"], "choices": ["how bright ?", "--choices", "one,just two"]}
    assert cli.main([command.replace("choices", "answer"), *paths, *question[command]]) == 2
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["image"] for line in lines] == [path for number, path in enumerate(paths) if number not in bad]
    told = captured.err.splitlines()
    assert [line.split(": ")[2] for line in told] == [paths[number] for number in bad], told
    assert all(line.startswith("hermesflow: error: ") for line in told)


@pytest.mark.parametrize(("question", "message"), [("a unicorn ?", "the word 'unicorn'"), (" ", "expected words")])
def test_a_wrong_question_is_told_once_beside_bad_images(model, question, message, tmp_path, capsys):
    paths = [str(grey(tmp_path / f"{number}.png", 2)) for number in range(3)]
    Path(paths[1]).write_text("no image")
    assert cli.main(["answer", *paths, question]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and [line.count(message) for line in captured.err.splitlines()] == [0, 1]


PROMPT_FILES = {
    "byte order mark": (b"\xef\xbb\xbfa dog\r\na cat\r\n", ["a dog", "a cat"]),
    "no line end": (b"a dog\na cat", ["a dog", "a cat"]),
    "blank lines": (b"\n\r\n \na dog\n\n", ["a dog"]),
    "separators": ("a\u2028b\nc\u2029d\ne\x85f\ng\x0bh\ni\x0cj\nk\x1cl\x1dm\x1en".encode(),
                   ["a\u2028b", "c\u2029d", "e\x85f", "g\x0bh", "i\x0cj", "k\x1cl\x1dm\x1en"]),
}  # fmt: skip


@pytest.mark.parametrize(("data", "prompts"), PROMPT_FILES.values(), ids=PROMPT_FILES)
def test_prompts_of_a_file(model, data, prompts, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes(data)
    assert cli.main(["generate", "--prompts-file", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "out")]) == 0
    drawn = []
    for path in capsys.readouterr().out.splitlines():
        with Image.open(path) as image:
            drawn.append(image.text["prompt"])
    assert drawn == prompts


def hermesflow(*arguments, cwd, **environment):
    command = [sys.executable, "-P", "-m", "hermesflow", *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-8:surrogateescape"])
def test_any_output_can_hold_json_lines(encoding, tmp_path):
    line = {"caption": "é 漢 🙂 \udce9", "truth": "é"}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line))
    done = hermesflow("score", "lines.jsonl", "--scorer", "exact", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert json.loads(done.stdout.decode(encoding.partition(":")[0])) == line | {"score": 0.0}


def test_any_output_can_hold_paths_and_settings(tmp_path):
    for encoding in ("ascii", "utf-8"):
        command = ["config", "run.name=é", "-o", f"{encoding}-é\udce9.toml"]
        done = hermesflow(*command, cwd=tmp_path, PYTHONIOENCODING=encoding)
        escaped = "\\xe9" if encoding == "ascii" else "é"
        assert done.stdout.decode() == f"{encoding}-{escaped}\\udce9.toml\n" and not done.stderr, done.stderr
        done = hermesflow("config", "run.name=é", cwd=tmp_path, PYTHONIOENCODING=encoding)
        assert f'name = "{escaped}"' in done.stdout.decode() and not done.stderr, done.stderr


NO_UNICODE = {
    "prompt": (["generate", "a dog", "caf\udce9"], r"prompt 2: 'caf\udce9' is not valid Unicode text"),
    "inpainted prompt": (["inpaint", "a.png", "a.png", "caf\udce9"], r"prompt: 'caf\udce9' is not valid Unicode text"),
    "extrapolated prompt": (
        ["extrapolate", "a.png", "caf\udce9", "--direction", "up"], r"prompt 1: 'caf\udce9' is not valid Unicode text",
    ),
    "question": (["answer", "a.png", "caf\udce9"], r"question: 'caf\udce9' is not valid Unicode text"),
    "source": (["curate", "data.source=caf\udce9"], r"data.source: text: 'caf\udce9' is not valid Unicode text"),
    "run's folder": (["selfplay", "run.folder=caf\udce9"], r"run.folder: text: 'caf\udce9' is not valid Unicode text"),
    "model": (["caption", "a.png", "--model", "caf\udce9"], r"model.name: text: 'caf\udce9' is not valid Unicode text"),
    "judge": (["eval", "--data", "x", "--judge", "caf\udce9"], r"--judge: text: 'caf\udce9' is not valid Unicode text"),
    "image": (["caption", "caf\udce9"], r"caf\udce9: no such file"),
    "file": (["config", "--config", "caf\udce9"], r"caf\udce9: no such file"),
    "pairs": (["train", "--pairs", "caf\udce9"], r"caf\udce9"),
    "captions": (["questions", "caf\udce9"], r"caf\udce9: no such file"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "message"), NO_UNICODE.values(), ids=NO_UNICODE)
def test_what_is_no_unicode_is_named(model, command, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey("a.png", 255)
    assert cli.main(command) == 2
    assert message in error_line(capsys)


PATH_OPTIONS = [
    ["config", "--config", "~/x"], ["generate", "a", "--prompts-file", "~/x"], ["generate", "a", "-o", "~/x"],
    ["generate", "a", "--grid=~/x.png"], ["inpaint", "~/x", "~/x", "a"], ["caption", "~/x"], ["answer", "~/x", "a"],
    ["extrapolate", "~/x", "a", "--direction", "up"], ["train", "--pairs=~/x", "--root=~/x", "-o", "~/x"],
    ["pairs", "export", "~/x", "-o", "~/x"], ["pairs", "import", "~/x"], ["score", "~/x", "--scorer", "exact"],
    ["questions", "~/x", "-o", "~/x", "--model=~/x", "--filter=~/x"], ["eval", "-o", "~/x", "--compare", "~/x"],
    ["eval", "--prompts=~/x"], ["export", "~/x", "-o", "~/x"], ["merge", "~/x", "~/x", "-o", "~/x"], ["report", "~/x"],
    ["study", "--lines=~/x", "--readme=~/x", "--plot=~/x.png"], ["config", "-o", "~/x"],
    ["bench", "ops", "--out=~/x", "--plot=~/x", "--profile=~/x"], ["bench", "table", "~/x", "--readme", "~/x"],
    ["bench", "drop-in", "--code=~/x"],
]  # fmt: skip


@pytest.mark.parametrize("command", PATH_OPTIONS, ids=" ".join)
def test_the_home_folder_in_options(command, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = vars(cli.make_parser().parse_args(with_settings(command)))
    found = [value for item in given.values() for value in (item if isinstance(item, list) else [item])]
    assert not any(str(value).startswith("~") for value in found)
    assert sum(str(value).startswith("/home/me/x") for value in found) == sum("~/x" in word for word in command)


def test_every_option_that_is_a_path_knows_the_home_folder():
    kinds = [how.get("type") for command in arguments.COMMANDS for _, how in command.options]
    assert Path not in kinds


def test_a_result_that_cannot_be_written_is_told_before_the_work(model, no_folder, tmp_path, stand_in, capsys):
    stand_in("evaluation.evaluation", evaluate=raising(AssertionError("started")))
    for path in (tmp_path, no_folder / "result.json"):
        assert cli.main(["eval", "-o", str(path)]) == 2
        assert str(path.parent if path != tmp_path else path) in error_line(capsys)
    (tmp_path / "sheet.png").mkdir()
    assert cli.main(["generate", "a dog", "-o", str(tmp_path), "--grid", str(tmp_path / "sheet.png")]) == 2
    assert "sheet.png: is a folder or a device; give the name of a file" in error_line(capsys)
    assert model.engine.calls == []


def test_answer_freely_and_from_choices(model, tmp_path, capsys):
    path = str(grey(tmp_path / "two.png", 2))
    assert cli.main(["answer", path, "how bright ?"]) == 0
    assert json.loads(capsys.readouterr().out) == {"image": path, "question": "how bright ?", "answer": "level 2"}
    assert cli.main(["answer", path, "how bright ?", "--choices", "one, just two,as many as four"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["answer"] == "just two" and list(line["probabilities"]) == ["one", "just two", "as many as four"]
    assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_answer_of_several_images(model, tmp_path, capsys):
    paths = [str(grey(tmp_path / f"{level}.png", level)) for level in (2, 3)]
    assert cli.main(["answer", *paths, "how bright ?"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["image"], line["answer"]) for line in lines] == [(paths[0], "level 2"), (paths[1], "level 3")]
    assert cli.main(["answer", *paths, "how bright ?", "--choices", "just two,as many as"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["answer"] for line in lines] == ["just two", "as many as"]


def test_answer_refuses_an_empty_question(model, tmp_path, capsys):
    assert cli.main(["answer", str(grey(tmp_path / "a.png", 2)), ""]) == 2
    assert "question: expected words, got ''" in error_line(capsys)


@pytest.mark.parametrize("choices", ["", "yes", "yes,yes", "yes,,no"])
def test_answer_refuses_choices_that_are_none(model, choices, tmp_path, capsys):
    assert cli.main(["answer", str(grey(tmp_path / "a.png", 2)), "what ?", "--choices", choices]) == 2
    assert "expected two or more distinct answers" in error_line(capsys)


def test_answer_refuses_choices_that_are_one_to_the_model(model, tmp_path, capsys):
    assert cli.main(["answer", str(grey(tmp_path / "a.png", 2)), "what ?", "--choices", "cafe\u0301,no,caf\u00e9"]) == 2
    assert "caf\u00e9 are one to the model; leave one out" in error_line(capsys)


def test_scorers_are_chosen_by_options(stand_in, capsys):
    asked = []
    run = types.SimpleNamespace
    stand_in("runs", Run=lambda config: run(config=config, describe_pairs=str))
    stand_in("selfplay", run_selfplay=asked.append, curate_round=lambda run, number: asked.append(run.config))
    for command in ("selfplay", "curate"):
        options = ["--caption-scorer", "bert-cls", "--answer-scorer", "own:match"]
        assert cli.main([command, "--set", "curation.caption_scorer=exact", *options]) == 0
        assert (asked[-1].curation.caption_scorer, asked[-1].curation.answer_scorer) == ("bert-cls", "own:match")
    assert cli.main(["curate", "--answer-scorer", "bleu"]) == 2
    assert "curation.answer_scorer: expected likelihood, sentence, exact" in error_line(capsys)


def test_score_prints_json_lines(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"id": 1, "caption": "A cat", "truth": "a cat."}\n{"caption": "Füchse", "truth": "a cat"}\n')
    assert cli.main(["score", str(path), "--scorer", "normalised"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"id": 1, "caption": "A cat", "truth": "a cat.", "score": 1.0},
        {"caption": "Füchse", "truth": "a cat", "score": 0.0},
    ]
    path.write_text('{"caption": "a"}')
    assert cli.main(["score", str(path), "--scorer", "exact"]) == 2
    assert "lines.jsonl: entry 1: expected" in error_line(capsys)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ("GENERATOR", None)),
        (["--filter"], ("GENERATOR", "FILTER")),
        (["--model", "mine", "--filter", "other"], ("mine", "other")),
    ],
)
def test_questions_name_their_models(options, names, tmp_path, stand_in, capsys):
    calls = []
    stand_in(
        "scoring.questions",
        GENERATOR="GENERATOR",
        FILTER="FILTER",
        write_questions=lambda *arguments: calls.append(arguments) or 3,
    )
    assert cli.main(["questions", "captions.jsonl", "-o", "out.json", *options]) == 0
    assert calls == [(Path("captions.jsonl"), Path("out.json"), *names)]
    assert capsys.readouterr().out == "3 questions: out.json\n"
