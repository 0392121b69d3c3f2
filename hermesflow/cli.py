"""The `hermesflow` command: reads its arguments and calls; the work is done elsewhere."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from hermesflow.arguments import Arguments, make_parser, with_settings
from hermesflow.config import DRAWING, Config, ConfigError, load_config, to_toml
from hermesflow.runtime.console import escape_what_cannot_be_printed, log_on_stderr, may_tell, user_message
from hermesflow.runtime.files import InputError, check_output, read_text, split_lines, write_text

if TYPE_CHECKING:
    from hermesflow.models import Model


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None takes those of the process.
    Returns: the exit code: 0, 1 if a benchmark met a wrong result, 2 on bad input (with a line on stderr for each), 130
        when interrupted.
    """
    escape_what_cannot_be_printed()
    arguments = make_parser().parse_args(with_settings(sys.argv[1:] if argv is None else argv))
    debug = os.environ.get("HERMESFLOW_DEBUG") == "1"
    try:
        # Settings come first, so that a mistake in them shows before anything heavy is loaded.
        config = load_config(arguments.config, [*arguments.set, *arguments.shortcuts])
        with log_on_stderr(logging.DEBUG if arguments.verbose else logging.INFO):
            code = _RUN[arguments.command](arguments, config)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        if debug:
            raise
        hint = "; the same command resumes where it stopped" if arguments.continues else ""
        if may_tell():
            print(f"\nhermesflow: stopped{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message, is_first = user_message(error), may_tell()
        if debug or (message is None and is_first):
            raise
        if is_first:
            print(f"hermesflow: error: {' '.join(message.split())}", file=sys.stderr)
        return 2


def _selfplay(arguments: Arguments, config: Config) -> None:
    from hermesflow.runtime.distributed import process_group
    from hermesflow.selfplay import run_selfplay

    with process_group(config.model.device):
        run_selfplay(config)


def _pretrain(arguments: Arguments, config: Config) -> None:
    from hermesflow.runtime.distributed import process_group
    from hermesflow.worlds.pretraining import run_pretraining

    with process_group("cpu"):
        run_pretraining(config.pretrain)


def _generate(arguments: Arguments, config: Config) -> None:
    from hermesflow.tasks import generate_images

    prompts = list(arguments.prompts)
    if arguments.prompts_file is not None:
        prompts += [line.strip() for line in split_lines(read_text(arguments.prompts_file)) if line.strip()]
    if not prompts:
        raise InputError("generate: no prompts; give them as arguments or with --prompts-file FILE, one a line")
    model, drawing = _open_for_drawing(arguments, config)
    images = generate_images(model, prompts, **drawing)
    _save_images(arguments, config, images, drawing, {"command": "generate"})


def _inpaint(arguments: Arguments, config: Config) -> None:
    from hermesflow.tasks import inpaint_images

    model, drawing = _open_for_drawing(arguments, config)
    images = inpaint_images(model, arguments.image, arguments.mask, arguments.prompt, **drawing)
    settings = {"command": "inpaint", "image": arguments.image, "mask": arguments.mask}
    _save_images(arguments, config, images, drawing, settings, label="inpainted")


def _extrapolate(arguments: Arguments, config: Config) -> None:
    from hermesflow.tasks import extrapolate_image

    model, drawing = _open_for_drawing(arguments, config)
    asked = {name: getattr(arguments, name) for name in ("image", "prompts", "directions", "steps", "offset")}
    images = extrapolate_image(model, **asked, **drawing)
    settings = {"command": "extrapolate"} | asked
    _save_images(arguments, config, images, drawing, settings, label="extrapolated")


def _open_for_drawing(arguments: Arguments, config: Config) -> tuple["Model", dict]:
    """The model, and how its images are drawn: as options say, else [drawing], else its own way."""
    model = _open_model(config)
    given = {name: getattr(arguments, name) for name in DRAWING if getattr(arguments, name) is not None}
    try:
        sampling = model.sampling_of(replace(config.drawing, **given))
    except ConfigError as error:
        raise InputError(f"--{error.key.replace('_', '-')}: {error.reason}") from error
    return model, {"num_images": arguments.num_images, "seed": arguments.seed, "sampling": sampling}


def _save_images(
    arguments: Arguments, config: Config, images: Iterable, drawing: dict, settings: dict, label: str = ""
) -> None:
    from hermesflow.tasks import save_contact_sheet, save_image

    if arguments.grid is not None:
        check_output(arguments.grid)
    settings |= {"model": config.model.name, "dtype": config.model.dtype, **asdict(drawing["sampling"])}
    kept = []
    for image in images:
        print(save_image(arguments.output, image, settings, label), flush=True)
        if arguments.grid is not None:
            kept.append(image)
    if arguments.grid is not None:
        print(save_contact_sheet(arguments.grid, kept, settings, arguments.num_images))


def _caption(arguments: Arguments, config: Config) -> int:
    from hermesflow.tasks import caption_images

    bad: list[InputError] = []
    _print_lines(caption_images(_open_model(config), arguments.images, skip=lambda error: _tell_of(error, bad)))
    return 2 if bad else 0


def _tell_of(error: InputError, bad: list[InputError]) -> None:
    """Says what is wrong with one of many images; the others follow."""
    print(f"hermesflow: error: {error}", file=sys.stderr, flush=True)
    bad.append(error)


def _answer(arguments: Arguments, config: Config) -> int:
    from hermesflow.tasks import answer_question

    if os.path.isfile(arguments.question):
        raise InputError(f"{arguments.question}: is a file; write the question last, after the images")
    choices = arguments.choices.split(",") if arguments.choices is not None else ()
    bad: list[InputError] = []
    model, skip = _open_model(config), lambda error: _tell_of(error, bad)
    _print_lines(answer_question(model, arguments.images, arguments.question, choices, skip=skip))
    return 2 if bad else 0


def _curate(arguments: Arguments, config: Config) -> None:
    from hermesflow.runs import Run
    from hermesflow.runtime.distributed import on_main, process_group
    from hermesflow.selfplay import curate_round
    from hermesflow.training import check_training

    # What training would refuse shows before the work on candidates, which locks the settings.
    check_training(config)
    with process_group(config.model.device):
        number = arguments.round or 1
        if arguments.worker or arguments.ray:
            from hermesflow.runs.workers import share_candidates

            print(share_candidates(config, number, by_ray=arguments.ray))
            return
        run = Run(config)
        curate_round(run, number)
        on_main(lambda: print(run.describe_pairs(number)))


def _train(arguments: Arguments, config: Config) -> None:
    from hermesflow.runtime.distributed import on_main, process_group

    if arguments.pairs is None:
        for option in ("output", "root"):
            if getattr(arguments, option) is not None:
                raise InputError(f"--{option}: belongs to --pairs FILE; a round's training goes into its run")
        from hermesflow.runs import Run
        from hermesflow.selfplay import train_round
        from hermesflow.training import check_training

        check_training(config)
        with process_group(config.model.device):
            run, number = Run(config), arguments.round or 1
            train_round(run, number)
            on_main(lambda: print(run.path(number, "model")))
        return
    if arguments.round is not None:
        raise InputError("--round: belongs to a run; with --pairs FILE there is none, leave one of the two out")
    from hermesflow.runs import train_on_pairs

    with process_group(config.model.device):
        print(train_on_pairs(config, arguments.pairs, arguments.output or config.run_folder, arguments.root))


def _pairs_export(arguments: Arguments, config: Config) -> None:
    from hermesflow.data.published_pairs import export_pairs

    print(export_pairs(arguments.run_folder, arguments.round or 1, arguments.output, arguments.format))


def _pairs_import(arguments: Arguments, config: Config) -> None:
    from hermesflow.runs import import_pairs
    from hermesflow.training import check_training

    check_training(config)
    print(import_pairs(config, arguments.round or 1, arguments.file, arguments.root))


def _score(arguments: Arguments, config: Config) -> None:
    from hermesflow.data.entries import read_entries
    from hermesflow.scoring.scorers import score_entries

    entries = read_entries(arguments.file)
    _print_lines(score_entries(arguments.scorer, entries, config.curation, str(arguments.file)))


def _questions(arguments: Arguments, config: Config) -> None:
    from hermesflow.scoring.questions import FILTER, GENERATOR, write_questions

    qa_filter = FILTER if arguments.filter == "" else arguments.filter
    count = write_questions(arguments.captions, arguments.output, arguments.model or GENERATOR, qa_filter)
    print(f"{count} questions: {arguments.output}")


def _eval(arguments: Arguments, config: Config) -> None:
    from hermesflow.evaluation.evaluation import evaluate
    from hermesflow.report.tables import make_console, print_metrics
    from hermesflow.runtime.distributed import is_main, process_group
    from hermesflow.runtime.files import read_json, write_json

    for option in ("output", "suite", "compare", "judge") if arguments.worker else ("round",):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option}: {'not with' if arguments.worker else 'belongs to'} --worker")
    if arguments.worker:
        from hermesflow.runs.workers import share_evaluation

        return print(share_evaluation(config, arguments.round or 0))
    for option in ("prompts", "preset"):
        if getattr(arguments, option) and arguments.suite is None:
            raise InputError(f"--{option}: belongs to --suite NAME")
    if arguments.judge is not None and arguments.suite is None:
        if not config.eval.data:
            raise InputError("--judge: belongs to --suite NAME or --data FILE")
        try:
            config = replace(config, eval=replace(config.eval, judge=arguments.judge))
        except ConfigError as error:
            raise InputError(f"--{error.key}: {error.reason}") from error
    console, earlier = make_console(), arguments.compare and read_json(arguments.compare)
    if arguments.suite is None:
        path = arguments.output or config.run_folder / "evaluation.json"
        check_output(path)
        with process_group(config.model.device):
            result = {"model": config.model.name} | evaluate(_open_model(config), config.drawn_by(config.eval))
            if not is_main():
                return
        write_json(path, result)
    else:
        found = _eval_suite(arguments, config)
        if found is None:
            return
        result, path = found
    print_metrics(result["metrics"], console)
    changes = None
    if earlier is not None:
        from hermesflow.report.tables import changes_between, print_change

        changes = changes_between(earlier, result, arguments.compare)
        print_change(changes, result["metrics"], console)
    console.print(f"evaluation: {path}", soft_wrap=True, highlight=False)
    if arguments.suite is not None:
        from hermesflow.evaluation.suites.run import find_suite
        from hermesflow.report.suite_page import write_suite_page

        suite = find_suite(arguments.suite)
        page = write_suite_page(result, suite, suite.read_prompts(arguments.prompts), path.parent, changes)
        console.print(f"page: {page}", soft_wrap=True, highlight=False)


def _eval_suite(arguments: Arguments, config: Config) -> tuple[dict, Any] | None:
    """The result of a judge and its file; None where images were drawn."""
    from hermesflow.evaluation.suites import run
    from hermesflow.runtime.distributed import on_main, process_group

    if arguments.prompts is None:
        raise InputError(f"--suite {arguments.suite}: give its list of prompts with --prompts FILE")
    folder = arguments.output or config.run_folder / arguments.suite
    chosen = arguments.suite, arguments.prompts, folder
    if arguments.judge is None:
        with process_group(config.model.device):
            images = run.draw(config, *chosen, lambda: _open_model(config), arguments.preset)
            on_main(lambda: print(images))
        return None
    return run.judge(*chosen, arguments.judge, lambda: _open_model(config), arguments.judge_model)


def _serve(arguments: Arguments, config: Config) -> None:
    from hermesflow.serving.server import run_server

    model = _open_model(config)
    print(f"http://{arguments.host}:{arguments.port}/v1", flush=True)
    limits = {"max_waiting": arguments.max_waiting, "max_batch": arguments.max_batch}
    limits["max_bytes"] = arguments.max_mebibytes << 20
    run_server(model, config.model.name, arguments.host, arguments.port, **limits)


def _export(arguments: Arguments, config: Config) -> None:
    import torch

    from hermesflow.runs import export_model

    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    export_model(arguments.source, arguments.output, dtype, arguments.family or "auto")
    print(arguments.output)


def _merge(arguments: Arguments, config: Config) -> None:
    from hermesflow.runs import merge_trained

    merge_trained(arguments.sources, arguments.output, arguments.family or "auto")
    print(arguments.output)


def _push(arguments: Arguments, config: Config) -> None:
    from hermesflow.runs.publishing import push

    options = {"pairs": arguments.pairs, "number": arguments.round, "private": arguments.private}
    print(push(arguments.source, arguments.repo, family=arguments.family or "auto", **options))


def _report(arguments: Arguments, config: Config) -> None:
    from hermesflow.report.page import write_report

    print(write_report(arguments.run_folder or config.run_folder))


def _study(arguments: Arguments, config: Config) -> None:
    from hermesflow.benchmarks.study.publication import publish_study

    if arguments.config is None:
        raise InputError("study: give --config FILE, for instance benchmarks/study/default.toml")
    publish_study(config, lines=arguments.lines, readmes=arguments.readmes, plot=arguments.plot)


def _config(arguments: Arguments, config: Config) -> None:
    if arguments.output is None:
        print(to_toml(config), end="")
    elif arguments.output.exists():
        raise InputError(f"{arguments.output}: is there already; give another name, or remove it")
    else:
        write_text(arguments.output, to_toml(config))
        print(arguments.output)


def _doctor(arguments: Arguments, config: Config) -> None:
    from hermesflow.runtime.doctor import run_doctor

    run_doctor()


def _bench_ops(arguments: Arguments, config: Config) -> int:
    from hermesflow.benchmarks.ops import Settings, run_ops

    return run_ops(_settings(Settings, arguments))


def _bench_e2e(arguments: Arguments, config: Config) -> int:
    from hermesflow.benchmarks import causal_tasks, e2e, flow_tasks, masked_tasks

    if arguments.family == "showo":
        return e2e.run_e2e(_settings(e2e.Settings, arguments))
    if arguments.family in masked_tasks.FAMILIES:
        return masked_tasks.run_masked_e2e(_settings(masked_tasks.TaskSettings, arguments))
    if arguments.family in flow_tasks.FAMILIES:
        return flow_tasks.run_flow_e2e(_settings(flow_tasks.TaskSettings, arguments))
    return causal_tasks.run_causal_e2e(_settings(causal_tasks.TaskSettings, arguments))


def _bench_train(arguments: Arguments, config: Config) -> int:
    from hermesflow.benchmarks import causal_tasks, flow_tasks, masked_tasks, train

    if arguments.family == "showo":
        return train.run_train(_settings(train.Settings, arguments))
    if arguments.family in masked_tasks.FAMILIES:
        return masked_tasks.run_masked_train(_settings(masked_tasks.StepSettings, arguments))
    if arguments.family in flow_tasks.FAMILIES:
        return flow_tasks.run_flow_train(_settings(flow_tasks.StepSettings, arguments))
    return causal_tasks.run_causal_train(_settings(causal_tasks.StepSettings, arguments))


def _bench_drop_in(arguments: Arguments, config: Config) -> int:
    from hermesflow.benchmarks.accelerated import Settings, run_accelerated

    return run_accelerated(_settings(Settings, arguments))


def _bench_table(arguments: Arguments, config: Config) -> None:
    from hermesflow.benchmarks.lines import markdown_table, read_lines, update_readme

    lines = [line for path in arguments.files for line in read_lines(path)]
    if arguments.readme:
        update_readme(arguments.readme, lines)
        return
    chosen = [line for line in lines if not arguments.backends or line["backend"] in arguments.backends]
    print(markdown_table(chosen), end="")


def _settings(kind: type, arguments: Arguments) -> Any:
    """The settings of a benchmark, whose fields are the options' destinations."""
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})


def _print_lines(lines: Iterable[dict]) -> None:
    for line in lines:
        text = json.dumps(line, ensure_ascii=False)
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:  # JSON has escapes of its own
            text = json.dumps(line)
        print(text, flush=True)


def _open_model(config: Config) -> "Model":
    from hermesflow.models import open_model

    return open_model(config.model)


_RUN: dict[str, Callable[[Arguments, Config], int | None]] = {
    "selfplay": _selfplay, "pretrain": _pretrain, "generate": _generate, "inpaint": _inpaint,
    "extrapolate": _extrapolate, "caption": _caption, "answer": _answer, "curate": _curate, "train": _train,
    "pairs export": _pairs_export, "pairs import": _pairs_import, "score": _score, "questions": _questions,
    "eval": _eval, "serve": _serve, "export": _export, "merge": _merge, "push": _push, "report": _report,
    "study": _study, "config": _config, "doctor": _doctor, "bench ops": _bench_ops, "bench e2e": _bench_e2e,
    "bench train": _bench_train, "bench drop-in": _bench_drop_in, "bench table": _bench_table,
}  # fmt: skip
