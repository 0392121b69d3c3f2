"""What the `hermesflow` command reads: its commands, their options, and how each is explained."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hermesflow import __version__
from hermesflow.config import setting_names
from hermesflow.evaluation.suites.presets import PRESETS
from hermesflow.runtime.files import InputError, expand_home
from hermesflow.runtime.registry import ANSWER_SCORERS, CAPTION_SCORERS, SUITES

Arguments = argparse.Namespace
Option = tuple[list[str], dict[str, Any]]
"""Names, and how argparse reads the option."""


def with_settings(argv: Sequence[str]) -> list[str]:
    """Arguments with each bare section.key=value as a --set, after the others.

    Beside prompts and files only what begins with the name of a setting, has no blank and is no file is taken for one;
    an option's value and what follows "--" never are.
    """
    named = {command.name: command for command in COMMANDS}
    command = named.get(" ".join(argv[:2])) or named.get(" ".join(argv[:1]))
    if command is None or not any("--set" in names for names, _ in command.options):
        return list(argv)
    takes_value = {name for names, how in command.options for name in names if how.get("action") != "store_true"}
    takes_texts = any(not names[0].startswith("-") for names, _ in command.options)
    end = argv.index("--") if "--" in argv else len(argv)
    others, settings = [], []
    for before, argument in zip(["", *argv], argv[:end], strict=False):
        name, equals, _ = argument.partition("=")
        is_setting = bool(equals) and before not in takes_value and re.fullmatch(r"\w[\w.-]*", name)
        if is_setting and takes_texts:
            is_setting = name in setting_names() and " " not in argument and not os.path.exists(argument)
        if is_setting:
            settings += ["--set", argument]
        else:
            others.append(argument)
    return [*others, *settings, *argv[end:]]


class Command(NamedTuple):
    """A command, or a group of commands."""

    name: str
    """After that of its group, if it is in one."""
    description: str
    example: str
    """What follows the name."""
    options: tuple[Option, ...]
    continues: bool
    """The same command resumes."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands.

    It gives command (a name in COMMANDS), continues, config (a Path or None), set and shortcuts (lists of KEY=VALUE)
    and what the command's own options say.
    """
    parser = argparse.ArgumentParser(
        prog="hermesflow",
        allow_abbrev=False,
        description="Narrow the gap between what a unified multimodal model understands and what it can draw.",
        epilog="example: hermesflow selfplay run.name=demo",
    )
    parser.add_argument("--version", action="version", version=f"hermesflow {__version__}")
    groups = {"": _group(parser, "")}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        added = groups[group].add_parser(
            name,
            help=command.description,
            description=f"{command.description[0].upper()}{command.description[1:]}.",
            allow_abbrev=False,
            epilog=f"example:\n  hermesflow {command.name} {command.example}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the example on one line, to be copied
        )
        added.set_defaults(command=command.name, continues=command.continues, config=None, set=[], shortcuts=[])
        for names, how in command.options:
            added.add_argument(*names, **how)
        if name not in _GROUPS:
            added.add_argument("-v", "--verbose", action="store_true", help="say more, such as the sizes of batches")
        if name in _GROUPS:
            groups[name] = _group(added, name)
    return parser


_GROUPS = {"": ("commands", "COMMAND"), "pairs": ("directions", "DIRECTION"), "bench": ("benchmarks", "BENCHMARK")}
"""How help calls the commands of a group."""


def _group(parser: argparse.ArgumentParser, name: str) -> argparse._SubParsersAction:
    title, metavar = _GROUPS[name]
    return parser.add_subparsers(title=title, metavar=metavar, required=True)


def _at_home(text: str) -> str:
    """A path, or a name that may be one, with its ~ written out: a shell leaves it in --option=~/x and in quotes."""
    try:
        return expand_home(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _path(text: str) -> Path:
    return Path(_at_home(text))


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a file name that ends with .png, got {text!r}")
    return _path(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**62 - 1, got {text!r}")
    return int(text)


def _option(spelled: str, description: str, kind: Callable[[str], Any] = str, **how: Any) -> Option:
    """An option as help shows it, such as "-o --output FOLDER", with its explanation and the type of its value."""
    names = spelled.split()
    if names[-1][0].isupper():
        how["metavar"] = names.pop()
    return names, how | {"help": description} | ({} if kind is str else {"type": kind})


def _shortcut(spelled: str, key: str, description: str) -> Option:
    """An option that sets a key, and wins over --set."""
    return _option(spelled, f"{description} ({key})", lambda text: f"{key}={text}", dest="shortcuts", action="append")


def _command(
    name: str, description: str, example: str, *options: Option, configured: bool = True, continues: bool = False
) -> Command:
    return Command(name, description, example, (*(_CONFIG if configured else ()), *options), continues)


# What several commands take.
_repeated = partial(_option, action="append", default=[])
_CONFIG = (
    _option("--config FILE", "settings in TOML, one table a section", _path),
    _repeated(
        "--set KEY=VALUE",
        "one setting, such as train.lr=1e-5; may be repeated; wins over the file; the --set itself may be left out",
    ),
)
_MODEL = (
    _shortcut("--model NAME", "model.name", 'a folder or hub id; without it, the built-in "tiny"'),
    _shortcut("--device D", "model.device", "cpu, cuda or cuda:N; without it, cuda if there is one"),
    _shortcut("--family NAME", "model.family", "its family, or module:object of your own; without it, by config.json"),
    _shortcut("--dtype T", "model.dtype", "float32, bfloat16 or float16; without it, the checkpoint's own"),
)
_SCORERS = tuple(
    _shortcut(
        f"--{kind}-scorer NAME",
        f"curation.{kind}_scorer",
        f"how {kind}s are scored: {', '.join(names)} or module:function",
    )
    for kind, names in (("caption", CAPTION_SCORERS), ("answer", ANSWER_SCORERS))
)
_ROUND = _option("--round N", "the round, from 1 [1]", _positive)
_output = partial(_option, "-o --output FOLDER", kind=_path)
_root = partial(_option, "--root FOLDER", kind=_path)
_IMAGE = _option("image IMAGE", "an image file of any size", _at_home)
_IMAGES = _option("images IMAGE", "image files of any size", _at_home, nargs="+")
_DRAWING = (
    _output("where they go; files of the same prompt and seed are replaced [images]", default=Path("images")),
    _option("--grid FILE.png", "also write all images on one, with their prompts", _png),
    _option("--num-images N", "images of each prompt [1]", _positive, default=1),
    _option("--seed N", "seed of the first image [0]", _seed, default=0),
    _option("--num-steps N", "decoding steps [the model's own number]", _positive),
    _option("--temperature T", "sampling temperature of image tokens [the model's own]", _number),
    _option("--guidance-scale G", "classifier-free guidance [the model's own]", _number),
    _option("--mask-temperature T", "noise on which tokens are masked again [the model's own]", _number),
    _option("--top-k K", "draw from the K most likely codes, 0 for all [the model's own]", _seed),
    _option("--top-p P", "draw from the most likely codes that hold P together [the model's own]", _number),
)  # fmt: skip

# Of benchmarks; their destinations are the fields of the benchmark's settings.
_SHAPES = ("tiny", "small", "showo-1.3b-256", "showo-1.3b")
_shape = partial(_option, default="small")
_DEVICE = _option("--device", "[cpu]", choices=("cpu", "cuda"), default="cpu")
_DTYPE = _option("--dtype", "of the weights [float32]", choices=("float32", "bfloat16"), default="float32")
_CASES = _repeated("--case NAME", "may be repeated [all]", dest="cases")
_FAMILIES = ("showo", "janus", "emu3", "chameleon", "mmada", "lumina-dimoo", "bagel")
_family = partial(_option, "--family NAME", "of the model; all but showo at the shapes tiny and small [showo]")
_OUT = _option("--out FILE.jsonl", "where to write the lines", _path)
_NAIVE = _option(
    "--naive", "measure the published algorithm too [yes]", action=argparse.BooleanOptionalAction, default=True
)
_PROFILE = _option("--profile FOLDER", "where to write a trace and a table of each case", _path)
_OF_MODELS = (_DEVICE, _shape("--shape NAME", f"one of {', '.join(_SHAPES)} [small]"), _DTYPE, _CASES, _OUT)

_DRAWN = "pictures/a-large-green-triangle-in-the-top-left-on-a-white-background-seed0.png"
COMMANDS = (
    _command(
        "selfplay", "run rounds of curation, Pair-DPO and evaluation, and write the report",
        "run.name=demo selfplay.num_rounds=1", *_MODEL, *_SCORERS, continues=True,
    ),
    _command(
        "pretrain", "make the tiny model from a seed", "pretrain.folder=runs/pretrain pretrain.seed=0",
        continues=True,
    ),
    _command(
        "generate", "draw images for prompts",
        '"a large green triangle in the top left on a white background" -o pictures --num-images 4',
        _option("prompts PROMPT", "what to draw", nargs="*"),
        _option("--prompts-file FILE", "more prompts, one a line", _path), *_DRAWING, *_MODEL,
    ),
    _command(
        "inpaint", "draw the white part of a mask anew",
        f'{_DRAWN} docs/mask.png "a large red square in the top left on a white background" -o pictures', _IMAGE,
        _option("mask MASK", "a picture of the same shape: white is drawn anew, black is kept", _at_home),
        _option("prompt PROMPT", "what the image shows in the end"), *_DRAWING, *_MODEL,
    ),
    _command(
        "extrapolate", "draw more of an image beyond its borders",
        f'{_DRAWN} "a large green triangle in the top left on a white background" --direction right --direction down '
        "-o pictures", _IMAGE,
        _option("prompts PROMPT", "what the picture shows: one text, or one for each extension", nargs="+"),
        _option("--direction SIDE", "left, right, up or down; may be repeated, and is followed in this order",
                dest="directions", action="append", required=True),
        _option("--steps N", "rounds of the directions [1]", int, default=1),
        _option("--offset N", "draw N tokens more, and see N less, at each extension [0]", int, default=0),
        *_DRAWING, *_MODEL,
    ),
    _command("caption", "describe images, as JSON lines", "pictures/*.png", _IMAGES, *_MODEL),
    _command(
        "answer", "answer a question about each of some images, as JSON lines",
        f'{_DRAWN} "what color is the triangle ?" --choices red,green,blue,yellow', _IMAGES,
        _option("question QUESTION", "the question, after the images"),
        _option("--choices A,B,C", "answers to choose from; without, it answers freely"), *_MODEL,
    ),
    _command(
        "curate", "make and score candidates, and pick the pairs of one round", "run.name=demo --round 1",
        *_MODEL, *_SCORERS, _ROUND,
        _option("--worker", "make candidates beside other workers of the same command, on any machines that share the "
                "folder; without it, the command then makes the pairs", action="store_true"),
        _option("--ray", "make candidates as tasks of Ray, on the cluster of RAY_ADDRESS or this machine; without it, "
                "the command then makes the pairs", action="store_true"),
        continues=True,
    ),
    _command(
        "train", "train on the pairs of one round, or of a file",
        "--pairs runs/demo/round-1/pairs.parquet -o trained train.beta=0.1",
        _option("--pairs FILE", "pairs.parquet or pair_dpo_data.json, without a run", _path),
        _output("where training on --pairs goes [run.folder/run.name]"),
        _root("where image paths start [the folder of --pairs]"), *_MODEL, _ROUND, continues=True,
    ),
    _command("pairs", "exchange pairs with other code", "export runs/demo -o pairs", configured=False),
    _command(
        "pairs export", "write a round's pairs for other code", "runs/demo --round 1 -o pairs",
        _option("run_folder RUN", "the run's folder", _path),
        _option("--format", "pair_dpo_data.json with images, or Parquet of prompt, chosen, rejected and images "
                "[published]", choices=("published", "datasets"), default="published"),
        _output("[pairs]", default=Path("pairs")), _ROUND, configured=False,
    ),
    _command(
        "pairs import", "make a pair_dpo_data.json the pairs of a run's round, ready for train",
        "pairs/pair_dpo_data.json run.name=mine --round 1",
        _option("file FILE.json", "pair_dpo_data.json", _path),
        _root("where image paths start [the file's folder]"), _ROUND,
    ),
    _command(
        "score", "score captions or answers of a file, as JSON lines", "captions.jsonl --scorer token-f1",
        _option("file FILE", 'lines {"caption", "truth"} or {"answer", "choices"}', _path),
        _option("--scorer NAME", "as hermesflow curate --help lists them", required=True),
    ),
    _command(
        "questions", "write questions about captions with a text model, in TIFA's form",
        "captions.jsonl -o questions.json --filter",
        _option("captions CAPTIONS", "JSON with id and caption, or text lines", _path),
        _option("-o --output FILE.json", "[questions.json]", _path, default=Path("questions.json")),
        _option("--model NAME", "a text model's hub id or folder [TIFA's LLaMA 2]", _at_home),
        _option("--filter NAME", "keep what a question-answering model finds in the caption [off; without a NAME "
                "UnifiedQA]", _at_home, nargs="?", const=""), configured=False, continues=True,
    ),
    _command(
        "eval", "measure understanding and generation, or draw and judge a suite's prompts",
        "--model tiny eval.num_prompts=200 -o tiny.json", *_MODEL,
        _option("-o --output FILE.json",
                "where the result goes [run.folder/run.name/evaluation.json]; of a suite its folder", _path),
        _shortcut("--data FILE", "eval.data", "measure on held-out records of your own"),
        _option("--suite NAME", f"draw a suite's images: {', '.join(SUITES)}"),
        _option("--prompts FILE", "the suite's own list of prompts", _path),
        _option("--preset NAME", f"draw as was published: {', '.join(PRESETS)}", default=""),
        _option("--judge JUDGE",
                "of the images: self or an endpoint's address; of a suite import:FILE, of geneval mask2former:FOLDER"),
        _option("--judge-model NAME", "of the endpoint [the first that it lists]", default=""),
        _option("--compare FILE.json", "say how the result differs from an earlier one", _path),
        _option("--worker", "measure a round of a run beside other workers of the same command, on any machines that "
                "share the folder; selfplay takes what they measured", action="store_true"),
        _option("--round N", "of --worker: the round, 0 before the first [0]", _seed),
        continues=True,
    ),
    _command(
        "serve", "answer requests in OpenAI's form: images, and questions about images", "--model tiny --port 8000",
        *_MODEL, _option("--host ADDRESS", "where it listens [127.0.0.1]", default="127.0.0.1"),
        _option("--port N", "[8000]", _positive, default=8000),
        _option("--max-waiting N", "requests that may wait; more are refused [256]", _positive, default=256),
        _option("--max-batch N", "images, or answers, of one pass [64]", _positive, default=64),
        _option("--max-mebibytes N", "of a request [32]", _positive, default=32),
    ),
    _command(
        "export", "write a trained model in the published layout, which the original code can load",
        "runs/mine -o exported --dtype bfloat16",
        _option("source MODEL", "a run's folder (its last trained round), or a model's", _at_home),
        _output("where it goes", required=True),
        _option("--dtype", "of the weights [as they are kept]", choices=("float32", "bfloat16", "float16")),
        _option("--family NAME", "a model's family, or module:object of your own [by config.json; a run's own]"),
        configured=False,
    ),
    _command(
        "merge", "write the mean of the weights of models that were trained from one start",
        "runs/pairs runs/online -o runs/merged",
        _option("sources MODEL", "runs' folders (their last trained rounds), or models'", _at_home, nargs="+"),
        _output("where it goes", required=True),
        _option("--family NAME", "the models' family, or module:object of your own [by config.json; a run's own]"),
        configured=False,
    ),
    _command(
        "push", "send a trained model, or a round's pairs, to the Hugging Face hub, with a card",
        "runs/demo me/demo --private",
        _option("source SOURCE", "a run's folder (its last trained round), or a model's", _at_home),
        _option("repo REPO", "where it goes: OWNER/NAME, made if need be"),
        _option("--pairs", "send the pairs of a run's round, for the datasets library", action="store_true"),
        _option("--round N", "of --pairs: the round, from 1 [1]", _positive),
        _option("--private", "nobody but the owner may see it", action="store_true"),
        _option("--family NAME", "a model's family, or module:object of your own [by config.json; a run's own]"),
        configured=False,
    ),
    _command(
        "report", "write the page that shows a run", "runs/demo",
        _option("run_folder RUN", "the run's folder [as configured]", _path, nargs="?"),
    ),
    _command(
        "study", "run self-play and its controls over several seeds, and say what they show",
        "--config benchmarks/study/default.toml study.workers=2",
        _option("--lines FILE.jsonl", "show this study.jsonl, and measure nothing", _path),
        _repeated(
            "--readme FILE.md",
            "write the tables into this file, between <!-- study --> (or, for one table, <!-- study short -->) and "
            "<!-- /study -->; may be repeated",
            _path, dest="readmes",
        ),
        _option("--plot FILE.png", "where to draw the effects (needs matplotlib)", _png), continues=True,
    ),
    _command(
        "config", "print all settings with their meaning, as a TOML file to start from", "train.lr=1e-5 -o mine.toml",
        _option("-o --output FILE.toml", "write them into this file", _path),
    ),
    _command("doctor", "show what this machine can run, and for the rest why not", "", configured=False),
    _command(
        "bench", "measure speed and memory against the published algorithms and public peers",
        "ops --shape small --op guided_sample --out results.jsonl", configured=False,
    ),
    _command(
        "bench ops", "every op on every backend that can run; its tests run first",
        "--shape small --op mask_topk --out results.jsonl --profile traces",
        _DEVICE, _shape("--shape", "sizes [small]", choices=("tiny", "small", "showo-1.3b", "padded", "tiny-padded")),
        *(_repeated(f"--{name} NAME", "may be repeated [all that can run]", dest=f"{name}s")
          for name in ("op", "backend", "baseline")), _OUT,
        _option("--plot FILE.png", "where to draw the roofline (needs matplotlib)", _path),
        _option("--profile FOLDER", "where to write a trace and a table of each case and backend", _path),
        _option("--no-test", "do not run the op's tests first", dest="test", action="store_false"), configured=False,
    ),
    _command(
        "bench e2e", "images, captions, answers and whole records, against the published algorithm",
        "--shape tiny --out results.jsonl --profile traces",
        _DEVICE, _shape("--shape", "of the model, and how much is drawn [small]", choices=_SHAPES), _DTYPE, _CASES,
        _NAIVE, _family(choices=_FAMILIES, default="showo"), _OUT, _PROFILE, configured=False,
    ),
    _command(
        "bench train", "a Pair-DPO step, forward and backward, against the published algorithm",
        "--shape small --out results.jsonl --profile traces", *_OF_MODELS, _NAIVE,
        _family(choices=_FAMILIES, default="showo"), _PROFILE, configured=False,
    ),
    _command(
        "bench drop-in", "a published class's methods before and after hermesflow.accelerate",
        "--shape small --out results.jsonl", *_OF_MODELS, _family(choices=("showo", "mmada"), default="showo"),
        _option("--code FOLDER", "a checkout of Show-o, HermesFlow or MMaDA [a stand-in of its class]", _path),
        configured=False,
    ),
    _command(
        "bench table", "print lines of a benchmark as a Markdown table",
        "benchmarks/results/ops-cpu-small.jsonl --backend cpu",
        _option("files FILE.jsonl", "files that a benchmark wrote", _path, nargs="+"),
        _repeated("--backend NAME", "may be repeated [all]", dest="backends"),
        _option(
            "--readme FILE.md",
            "write tables into this file, between <!-- results BENCH [BACKEND ...] --> and <!-- /results -->", _path,
        ),
        configured=False,
    ),
)  # fmt: skip
