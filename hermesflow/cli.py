"""The `hermesflow` command: reads its arguments and calls; the work is done elsewhere."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hermesflow import __version__
from hermesflow.config import ANSWER_SCORERS, CAPTION_SCORERS, Config, load_config
from hermesflow.runtime.files import InputError, read_bytes, write_problem

if TYPE_CHECKING:
    from hermesflow.models import Model


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None takes those of the process.
    Returns: the exit code: 0, 1 if a benchmark met a wrong result, 2 on bad input (with one line on stderr), 130 when
        interrupted.
    """
    arguments = _parser().parse_args(argv)
    debug = os.environ.get("HERMESFLOW_DEBUG") == "1"
    try:
        # Settings come first, so that a mistake in them shows before anything heavy is loaded.
        config = load_config(arguments.config, [*arguments.set, *arguments.shortcuts])
        with _log_on_stderr():
            code = arguments.run(arguments, config)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        if debug:
            raise
        hint = "; the same command goes on where it stopped" if arguments.continues else ""
        if _may_tell():
            print(f"\nhermesflow: stopped{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message, is_first = _user_message(error), _may_tell()
        if debug or (message is None and is_first):
            raise
        if is_first:
            print(f"hermesflow: error: {' '.join(message.split())}", file=sys.stderr)
        return 2


class _StderrHandler(logging.Handler):
    """Prints to what stderr is at the time: a progress bar stands in for it while it is on screen."""

    def emit(self, record: logging.LogRecord) -> None:
        from hermesflow.runtime.distributed import is_main

        if is_main():
            print(f"hermesflow: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Shows what the library logs, such as the size of batches, while a command runs."""
    logger, handler = logging.getLogger("hermesflow"), _StderrHandler(logging.INFO)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _user_message(error: Exception) -> str | None:
    """What to tell the user, or None if the error is a fault of ours that deserves a traceback."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        path = error.filename or "output"
        return str(write_problem(path, error) or f"{path}: {error.strerror or error}")
    distributed = sys.modules.get("hermesflow.runtime.distributed")
    if distributed is not None and distributed.is_lost(error):
        return distributed.LOST
    registry = sys.modules.get("hermesflow.kernels.registry")  # loaded wherever its error can come from
    if registry is not None and isinstance(error, registry.BackendError):
        return str(error)
    return None


def _may_tell() -> bool:
    """Of the processes that torchrun started, the first that ends tells why."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from hermesflow.runtime.distributed import may_tell

    return may_tell()


def _selfplay(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.runtime.distributed import process_group
    from hermesflow.selfplay import run_selfplay

    with process_group(config.model.device):
        run_selfplay(config)


def _pretrain(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.worlds.pretraining import run_pretraining

    run_pretraining(config.pretrain)


def _curate(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.runtime.distributed import process_group
    from hermesflow.selfplay import run_curation

    with process_group(config.model.device):
        run_curation(config, arguments.round)


def _train(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.runtime.distributed import process_group

    if arguments.pairs is None:
        for option in ("output", "root"):
            if getattr(arguments, option) is not None:
                raise InputError(f"--{option}: belongs to --pairs FILE; a round's training goes into its run")
        from hermesflow.selfplay import run_training

        with process_group(config.model.device):
            run_training(config, arguments.round or 1)
        return
    if arguments.round is not None:
        raise InputError("--round: belongs to a run; with --pairs FILE there is none, leave one of the two out")
    from hermesflow.pair_training import train_on_pairs

    with process_group(config.model.device):
        print(train_on_pairs(config, arguments.pairs, arguments.output or config.run_folder, arguments.root))


def _pairs_export(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.data.published_pairs import export_pairs

    print(export_pairs(arguments.run_folder, arguments.round, arguments.output))


def _pairs_import(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.selfplay import import_pairs

    print(import_pairs(config, arguments.round, arguments.file, arguments.root))


def _eval(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.evaluation.builtin import run_evaluation

    run_evaluation(config)


def _export(arguments: argparse.Namespace, config: Config) -> None:
    import torch

    from hermesflow.runs import export_model

    export_model(arguments.source, arguments.output, arguments.dtype and getattr(torch, arguments.dtype))
    print(arguments.output)


def _report(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.report.page import write_report

    print(write_report(arguments.run_folder or config.run_folder))


def _study(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.benchmarks.study.publication import publish_study

    if arguments.config is None:
        raise InputError("study: give --config FILE, for instance benchmarks/study/default.toml")
    publish_study(config, lines=arguments.lines, readme=arguments.readme, plot=arguments.plot)


def _doctor(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.doctor import run_doctor

    run_doctor()


def _bench_ops(arguments: argparse.Namespace, config: Config) -> int:
    from hermesflow.benchmarks.ops import Settings, run_ops

    return run_ops(
        Settings(
            device=arguments.device, shape=arguments.shape, ops=arguments.op, backends=arguments.backend,
            baselines=arguments.baseline, out=arguments.out, plot=arguments.plot, test=arguments.test,
        )
    )  # fmt: skip


def _bench_e2e(arguments: argparse.Namespace, config: Config) -> int:
    from hermesflow.benchmarks.e2e import Settings, run_e2e

    return run_e2e(
        Settings(
            device=arguments.device, shape=arguments.shape, dtype=arguments.dtype, cases=arguments.case,
            naive=arguments.naive, out=arguments.out, profile=arguments.profile,
        )
    )  # fmt: skip


def _bench_train(arguments: argparse.Namespace, config: Config) -> int:
    from hermesflow.benchmarks.train import Settings, run_train

    return run_train(
        Settings(
            device=arguments.device, shape=arguments.shape, dtype=arguments.dtype, cases=arguments.case,
            out=arguments.out,
        )
    )  # fmt: skip


def _bench_drop_in(arguments: argparse.Namespace, config: Config) -> int:
    from hermesflow.benchmarks.accelerated import Settings, run_accelerated

    return run_accelerated(
        Settings(
            device=arguments.device, shape=arguments.shape, dtype=arguments.dtype, cases=arguments.case,
            code=arguments.code, out=arguments.out,
        )
    )  # fmt: skip


def _bench_table(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.benchmarks.lines import markdown_table, read_lines, update_readme

    lines = [line for path in arguments.files for line in read_lines(path)]
    if arguments.readme:
        update_readme(arguments.readme, lines)
        return
    chosen = [line for line in lines if not arguments.backend or line["backend"] in arguments.backend]
    print(markdown_table(chosen), end="")


def _generate(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.tasks import generate_images

    prompts = list(arguments.prompts)
    if arguments.prompts_file is not None:
        prompts += [line.strip() for line in _read_text(arguments.prompts_file).splitlines() if line.strip()]
    if not prompts:
        raise InputError("generate: no prompts; give them as arguments or with --prompts-file FILE, one a line")
    model = _open_model(config)
    drawing = _drawing(arguments, model)
    images = generate_images(model, prompts, **drawing)
    _save_images(arguments, config, images, drawing, {"command": "generate"})


def _inpaint(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.tasks import inpaint_images

    model = _open_model(config)
    drawing = _drawing(arguments, model)
    images = inpaint_images(model, arguments.image, arguments.mask, arguments.prompt, **drawing)
    settings = {"command": "inpaint", "image": arguments.image, "mask": arguments.mask}
    _save_images(arguments, config, images, drawing, settings, label="inpainted")


def _extrapolate(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.tasks import extrapolate_image

    model = _open_model(config)
    drawing = _drawing(arguments, model)
    images = extrapolate_image(
        model, arguments.image, arguments.prompts, arguments.direction, steps=arguments.steps, offset=arguments.offset,
        **drawing,
    )  # fmt: skip
    settings = {
        "command": "extrapolate",
        "image": arguments.image,
        "prompts": arguments.prompts,
        "directions": arguments.direction,
        "steps": arguments.steps,
        "offset": arguments.offset,
    }
    _save_images(arguments, config, images, drawing, settings, label="extrapolated")


def _drawing(arguments: argparse.Namespace, model: "Model") -> dict:
    """How the images are drawn: the model's own way where no option says otherwise."""
    names = ("num_steps", "temperature", "guidance_scale", "mask_temperature")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    sampling = replace(model.sampling, **given)
    return {"num_images": arguments.num_images, "seed": arguments.seed, "sampling": sampling}


def _save_images(
    arguments: argparse.Namespace, config: Config, images: Iterable, drawing: dict, settings: dict, label: str = ""
) -> None:
    from hermesflow.tasks import save_contact_sheet, save_image

    settings |= {"model": config.model.name, "dtype": config.model.dtype, **asdict(drawing["sampling"])}
    kept = []
    for image in images:
        print(save_image(arguments.output, image, settings, label), flush=True)
        if arguments.grid is not None:
            kept.append(image)
    if arguments.grid is not None:
        print(save_contact_sheet(arguments.grid, kept, settings, arguments.num_images))


def _caption(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.tasks import caption_images

    for line in caption_images(_open_model(config), arguments.images):
        print(json.dumps(line, ensure_ascii=False), flush=True)


def _answer(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.tasks import answer_question

    if os.path.isfile(arguments.question):
        raise InputError(f"{arguments.question}: is a file; write the question last, after the images")
    choices = arguments.choices.split(",") if arguments.choices is not None else ()
    for line in answer_question(_open_model(config), arguments.images, arguments.question, choices):
        print(json.dumps(line, ensure_ascii=False), flush=True)


def _questions(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.scoring.questions import FILTER, GENERATOR, write_questions

    qa_filter = FILTER if arguments.filter == "" else arguments.filter
    count = write_questions(arguments.captions, arguments.output, arguments.model or GENERATOR, qa_filter)
    print(f"{count} questions: {arguments.output}")


def _score(arguments: argparse.Namespace, config: Config) -> None:
    from hermesflow.data.sources import read_entries
    from hermesflow.scoring.scorers import score_entries

    entries = read_entries(arguments.file)
    for line in score_entries(arguments.scorer, entries, config.curation, str(arguments.file)):
        print(json.dumps(line, ensure_ascii=False))


def _open_model(config: Config) -> "Model":
    from hermesflow.models import open_model

    return open_model(config.model)


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hermesflow",
        description="Narrow the gap between what a unified multimodal model understands and what it can draw.",
        epilog="example: hermesflow selfplay --set run.name=demo",
    )
    parser.add_argument("--version", action="version", version=f"hermesflow {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    selfplay = _command(
        commands, "selfplay", _selfplay, "run rounds of curation, Pair-DPO and evaluation, and write the report",
        "hermesflow selfplay --set run.name=demo --set selfplay.num_rounds=1", continues=True,
    )  # fmt: skip
    _command(
        commands, "pretrain", _pretrain, "make the tiny model from a seed",
        "hermesflow pretrain --set pretrain.folder=runs/pretrain --set pretrain.seed=0", continues=True,
    )  # fmt: skip

    generate = _command(
        commands, "generate", _generate, "draw images for prompts",
        'hermesflow generate "a large green triangle in the top left on a white background" -o pictures --num-images 4',
    )  # fmt: skip
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    generate.add_argument("--prompts-file", type=Path, metavar="FILE", help="more prompts, one a line")

    inpaint = _command(
        commands, "inpaint", _inpaint, "draw the white part of a mask anew",
        "hermesflow inpaint pictures/a-large-green-triangle-in-the-top-left-on-a-white-background-seed0.png docs/"
        'mask.png "a large red square in the top left on a white background" -o pictures',
    )  # fmt: skip
    inpaint.add_argument("image", metavar="IMAGE", help="an image file of any size")
    inpaint.add_argument("mask", metavar="MASK", help="a picture of the same shape: white is drawn anew, black is kept")
    inpaint.add_argument("prompt", metavar="PROMPT", help="what the image shows in the end")

    extrapolate = _command(
        commands, "extrapolate", _extrapolate, "draw more of an image beyond its borders",
        "hermesflow extrapolate pictures/a-large-green-triangle-in-the-top-left-on-a-white-background-seed0.png "
        '"a large green triangle in the top left on a white background" --direction right '
        "--direction down -o pictures",
    )  # fmt: skip
    extrapolate.add_argument("image", metavar="IMAGE", help="an image file of any size")
    extrapolate.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="what the picture shows: one text, or one for each extension"
    )
    extrapolate.add_argument(
        "--direction", action="append", required=True, metavar="SIDE",
        help="left, right, up or down; may be repeated, and is followed in this order",
    )  # fmt: skip
    extrapolate.add_argument("--steps", type=int, default=1, metavar="N", help="rounds of the directions [1]")
    extrapolate.add_argument(
        "--offset", type=int, default=0, metavar="N", help="draw N tokens more, and see N less, at each extension [0]"
    )
    for command in (generate, inpaint, extrapolate):
        _add_drawing_options(command)

    caption = _command(
        commands, "caption", _caption, "describe images, as JSON lines", "hermesflow caption pictures/*.png"
    )
    caption.add_argument("images", nargs="+", metavar="IMAGE", help="image files of any size")

    answer = _command(
        commands, "answer", _answer, "answer a question about each of some images, as JSON lines",
        "hermesflow answer pictures/a-large-green-triangle-in-the-top-left-on-a-white-background-seed0.png "
        '"what color is the triangle ?" --choices red,green,blue,yellow',
    )  # fmt: skip
    answer.add_argument("images", nargs="+", metavar="IMAGE", help="image files of any size")
    answer.add_argument("question", metavar="QUESTION", help="the question, after the images")
    answer.add_argument("--choices", metavar="A,B,C", help="answers to choose from; without, it answers freely")
    for command in (generate, inpaint, extrapolate, caption, answer):
        _add_model_options(command)

    curate = _command(
        commands, "curate", _curate, "make and score candidates, and pick the pairs of one round",
        "hermesflow curate --set run.name=demo --round 1", continues=True,
    )  # fmt: skip
    train = _command(
        commands, "train", _train, "train on the pairs of one round, or of a file",
        "hermesflow train --pairs runs/demo/round-1/pairs.parquet -o trained --set train.beta=0.1", continues=True,
    )  # fmt: skip
    train.add_argument("--pairs", type=Path, metavar="FILE", help="pairs.parquet or pair_dpo_data.json, without a run")
    train.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="where training on --pairs goes [run.folder/run.name]"
    )
    train.add_argument("--root", type=Path, metavar="FOLDER", help="where image paths start [the folder of --pairs]")
    pairs = _command(
        commands, "pairs", None, "exchange pairs with the published code", "hermesflow pairs export runs/demo -o pairs",
        configured=False,
    )  # fmt: skip
    exchanges = pairs.add_subparsers(title="directions", metavar="DIRECTION", required=True)
    export = _command(
        exchanges, "export", _pairs_export, "write a round's pairs as pair_dpo_data.json with images",
        "hermesflow pairs export runs/demo --round 1 -o pairs", configured=False,
    )  # fmt: skip
    export.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder")
    export.add_argument("-o", "--output", type=Path, default=Path("pairs"), metavar="FOLDER", help="[pairs]")
    import_ = _command(
        exchanges, "import", _pairs_import, "make a pair_dpo_data.json the pairs of a run's round, ready for train",
        "hermesflow pairs import pairs/pair_dpo_data.json --set run.name=mine --round 1",
    )  # fmt: skip
    import_.add_argument("file", type=Path, metavar="FILE.json", help="pair_dpo_data.json")
    import_.add_argument("--root", type=Path, metavar="FOLDER", help="where image paths start [the file's folder]")
    for command in (selfplay, curate, train):
        _add_model_options(command)
    for command in (selfplay, curate):
        for kind, names in (("caption", CAPTION_SCORERS), ("answer", ANSWER_SCORERS)):
            told = f"how {kind}s are scored: {', '.join(names)} or module:function"
            _add_shortcut(command, f"--{kind}-scorer", f"curation.{kind}_scorer", "NAME", told)
    for command in (curate, train, export, import_):
        default = None if command is train else 1  # tells whether it was given beside --pairs
        command.add_argument("--round", type=_positive, default=default, metavar="N", help="the round, from 1 [1]")

    score = _command(
        commands, "score", _score, "score captions or answers of a file, as JSON lines",
        "hermesflow score captions.jsonl --scorer token-f1",
    )  # fmt: skip
    score.add_argument("file", type=Path, metavar="FILE", help='lines {"caption", "truth"} or {"answer", "choices"}')
    score.add_argument("--scorer", required=True, metavar="NAME", help="as hermesflow curate --help lists them")
    questions = _command(
        commands, "questions", _questions, "write questions about captions with a text model, in TIFA's form",
        "hermesflow questions captions.jsonl -o questions.json --filter", configured=False,
    )  # fmt: skip
    questions.add_argument("captions", type=Path, metavar="CAPTIONS", help="JSON with id and caption, or text lines")
    questions.add_argument(
        "-o", "--output", type=Path, default=Path("questions.json"), metavar="FILE.json", help="[questions.json]"
    )
    questions.add_argument("--model", metavar="NAME", help="a text model's hub id or folder [TIFA's LLaMA 2]")
    questions.add_argument(
        "--filter", nargs="?", const="", metavar="NAME",
        help="keep what a question-answering model finds in the caption [off; without a NAME UnifiedQA]",
    )  # fmt: skip

    evaluate = _command(
        commands, "eval", _eval, "measure understanding and generation",
        "hermesflow eval --model tiny --set eval.num_prompts=200",
    )  # fmt: skip
    _add_model_options(evaluate)
    export = _command(
        commands, "export", _export, "write a trained model in the published layout, which the original code can load",
        "hermesflow export runs/mine -o exported --dtype bfloat16", configured=False,
    )  # fmt: skip
    export.add_argument("source", metavar="MODEL", help="a run's folder (its last trained round), or a model's")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where it goes")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights [as they are kept]"
    )
    report = _command(commands, "report", _report, "write the page that shows a run", "hermesflow report runs/demo")
    report.add_argument("run_folder", nargs="?", type=Path, metavar="RUN", help="the run's folder [as configured]")

    study = _command(
        commands, "study", _study, "run self-play and its controls over several seeds, and tell what they show",
        "hermesflow study --config benchmarks/study/default.toml --set study.workers=2", continues=True,
    )  # fmt: skip
    study.add_argument("--lines", type=Path, metavar="FILE.jsonl", help="tell of this study.jsonl, and measure nothing")
    study.add_argument(
        "--readme", type=Path, metavar="FILE.md",
        help="write the table into this file, between <!-- study --> and <!-- /study -->",
    )  # fmt: skip
    study.add_argument("--plot", type=_png, metavar="FILE.png", help="where to draw the effects (needs matplotlib)")

    _command(
        commands, "doctor", _doctor, "show what this machine can run, and for the rest why not", "hermesflow doctor",
        configured=False,
    )  # fmt: skip

    bench = _command(
        commands, "bench", None, "measure speed and memory against the published algorithms and public peers",
        "hermesflow bench ops --shape small --op guided_sample --out results.jsonl", configured=False,
    )  # fmt: skip
    benches = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    ops = _command(
        benches, "ops", _bench_ops, "every op on every backend that can run; its tests run first",
        "hermesflow bench ops --shape small --op mask_topk --out results.jsonl --plot roofline.png", configured=False,
    )  # fmt: skip
    ops.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    ops.add_argument("--shape", choices=("tiny", "small", "showo-1.3b"), default="small", help="sizes [small]")
    for option in ("--op", "--backend", "--baseline"):
        ops.add_argument(option, action="append", default=[], metavar="NAME", help="may be repeated [all that can run]")
    ops.add_argument("--out", type=Path, metavar="FILE.jsonl", help="where to write the lines")
    ops.add_argument("--plot", type=Path, metavar="FILE.png", help="where to draw the roofline (needs matplotlib)")
    ops.add_argument("--no-test", dest="test", action="store_false", help="do not run the op's tests first")
    e2e = _command(
        benches, "e2e", _bench_e2e, "images, captions, answers and whole records, against the published algorithm",
        "hermesflow bench e2e --shape tiny --out results.jsonl --profile traces", configured=False,
    )  # fmt: skip
    e2e.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    shapes = ("tiny", "small", "showo-1.3b-256", "showo-1.3b")
    e2e.add_argument("--shape", choices=shapes, default="small", help="of the model, and how much is drawn [small]")
    e2e.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights [float32]")
    e2e.add_argument("--case", action="append", default=[], metavar="NAME", help="may be repeated [all]")
    e2e.add_argument(
        "--naive", action=argparse.BooleanOptionalAction, default=True, help="measure the published algorithm too [yes]"
    )
    e2e.add_argument("--out", type=Path, metavar="FILE.jsonl", help="where to write the lines")
    e2e.add_argument("--profile", type=Path, metavar="FOLDER", help="where to write a trace and a table of each case")
    step = _command(
        benches, "train", _bench_train, "a Pair-DPO step, forward and backward, against the published algorithm",
        "hermesflow bench train --shape small --out results.jsonl", configured=False,
    )  # fmt: skip
    _add_bench_options(step, shapes)
    published = _command(
        benches, "drop-in", _bench_drop_in, "the published class's methods before and after hermesflow.accelerate",
        "hermesflow bench drop-in --shape small --out results.jsonl", configured=False,
    )  # fmt: skip
    _add_bench_options(published, shapes)
    published.add_argument(
        "--code", type=Path, metavar="FOLDER", help="a checkout of Show-o or HermesFlow [a stand-in of its class]"
    )
    table = _command(
        benches, "table", _bench_table, "print lines of a benchmark as a Markdown table",
        "hermesflow bench table benchmarks/results/ops-cpu-small.jsonl --backend cpu", configured=False,
    )  # fmt: skip
    table.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl", help="files that a benchmark wrote")
    table.add_argument("--backend", action="append", default=[], metavar="NAME", help="may be repeated [all]")
    table.add_argument(
        "--readme", type=Path, metavar="FILE.md",
        help="write tables into this file, between <!-- results BENCH [BACKEND ...] --> and <!-- /results -->",
    )  # fmt: skip
    return parser


def _add_bench_options(parser: argparse.ArgumentParser, shapes: Sequence[str]) -> None:
    """The options of a benchmark of whole models."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    parser.add_argument("--shape", default="small", metavar="NAME", help=f"one of {', '.join(shapes)} [small]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights [float32]")
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help="may be repeated [all]")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="where to write the lines")


def _command(
    commands: argparse._SubParsersAction,
    name: str,
    run: object,
    help_text: str,
    example: str,
    *,
    configured: bool = True,
    continues: bool = False,
) -> argparse.ArgumentParser:
    description = help_text[0].upper() + help_text[1:] + "."
    command = commands.add_parser(
        name,
        help=help_text,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the example on one line, to be copied
    )
    command.set_defaults(run=run, continues=continues, config=None, set=[], shortcuts=[])
    if configured:
        command.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML, one table a section")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE",
            help="one setting, such as train.lr=1e-5; may be repeated; wins over the file",
        )  # fmt: skip
    return command


def _add_model_options(command: argparse.ArgumentParser) -> None:
    _add_shortcut(command, "--model", "model.name", "NAME", 'a folder or hub id; without it, the built-in "tiny"')
    _add_shortcut(command, "--device", "model.device", "D", "cpu, cuda or cuda:N; without it, cuda if there is one")
    _add_shortcut(
        command, "--dtype", "model.dtype", "T", "float32, bfloat16 or float16; without it, the checkpoint's own"
    )


def _add_drawing_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-o", "--output", type=Path, default=Path("images"), metavar="FOLDER",
        help="where they go; files of the same prompt and seed are replaced [images]",
    )
    command.add_argument(
        "--grid", type=_png, metavar="FILE.png", help="also write all images on one, with their prompts"
    )
    command.add_argument("--num-images", type=_positive, default=1, metavar="N", help="images of each prompt [1]")
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the first image [0]")
    command.add_argument("--num-steps", type=_positive, metavar="N", help="decoding steps [the model's own number]")
    command.add_argument(
        "--temperature", type=_number, metavar="T", help="sampling temperature of image tokens [the model's own]"
    )
    command.add_argument(
        "--guidance-scale", type=_number, metavar="G", help="classifier-free guidance [the model's own]"
    )
    command.add_argument(
        "--mask-temperature", type=_number, metavar="T", help="noise on which tokens are masked again [the model's own]"
    )


def _add_shortcut(command: argparse.ArgumentParser, option: str, key: str, metavar: str, help_text: str) -> None:
    """An option that sets a key, and wins over --set."""
    command.add_argument(
        option, dest="shortcuts", action="append", type=lambda text: f"{key}={text}", metavar=metavar,
        help=f"{help_text} ({key})",
    )  # fmt: skip


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a file name that ends with .png, got {text!r}")
    return Path(text)


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
