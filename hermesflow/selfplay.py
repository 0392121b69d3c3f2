"""Self-play (HermesFlow, arXiv 2502.12148): the model draws, judges, learns from its best and worst, and plays on.

Every phase writes its result whole and is skipped where that exists (runs.py): the same command resumes a killed run.
With torchrun all processes curate, train and measure; the first does the rest.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from hermesflow.config import Config
from hermesflow.data.pairs import PAIRS_SCHEMA, REJECTED_SCHEMA, PairFile, make_pairs
from hermesflow.evaluation.evaluation import find_evaluation
from hermesflow.report.page import write_report
from hermesflow.report.tables import make_console, print_summary
from hermesflow.runs import Run, save_trained, send_round
from hermesflow.runtime.distributed import barrier, on_main, world_size
from hermesflow.runtime.files import parquet_writer, write_json
from hermesflow.scoring.scorers import check_scorers
from hermesflow.training import check_takes_pairs, check_training, train_on


def run_selfplay(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Runs all rounds, resuming where an earlier run of the same name and settings stopped.

    Args:
        config: the settings; config.run names the folder.
        console: where the closing table goes; None is the standard output.
    Returns: what summary.json holds.
    Raises: InputError on settings, data or a folder that cannot be used, or if a round keeps no pair.
    """
    console = console or make_console()
    for of_round in config.each_round():
        check_training(of_round)
        check_scorers(of_round.curation)
    find_evaluation(config.eval)
    run = Run(config)
    console.print(f"settings: {run.folder / 'config.toml'}", soft_wrap=True, highlight=False)
    _ = run.records  # a mistake in the data shows before the first evaluation, and so does a judge that does not fit
    run.check_judge()
    evaluate_round(run, 0)
    for number in run.rounds:
        play_round(run, number)
        evaluate_round(run, number)
    return on_main(lambda: _finish(run, console))


def play_round(run: Run, number: int) -> None:
    """A round's pairs, unless its algorithm is online, and its training. Raises: as curate_round and train_round."""
    if not run.is_online(number):
        curate_round(run, number)
    train_round(run, number)


def curate_round(run: Run, number: int) -> None:
    """Draws and scores a round's candidates, and keeps each record's best and worst as a pair. Raises: as curate;
    InputError if the run has no such round, or its algorithm takes no pairs."""
    run.check_round(number)
    check_takes_pairs(run.config.of_round(number).selfplay.algorithm)
    if run.is_made(number, "pairs.parquet", "rejected.parquet"):
        return

    def write_pairs() -> None:
        previous, parts = run.previous(number), run.candidates(number).share()
        with (
            parquet_writer(run.path(number, "pairs.parquet"), PAIRS_SCHEMA) as write_kept,
            parquet_writer(run.path(number, "rejected.parquet"), REJECTED_SCHEMA) as write_rejected,
        ):
            for records, candidates in parts:
                before = None if previous is None else previous.of(records)
                pairs, rejected = make_pairs(records, candidates, run.config.of_round(number).curation, before)
                write_kept(pairs)
                write_rejected(rejected)

    def work() -> None:
        if world_size() > 1:
            for _ in run.candidates(number).share():
                pass
            barrier()
        on_main(write_pairs)

    run.timed(number, "curation", work)


def train_round(run: Run, number: int) -> None:
    """Trains the model of the round before on what the round learns from. Raises: as train_on, or without pairs."""
    run.check_round(number)
    if run.is_made(number, "model", "training.json"):
        return
    learned, folder = run.learned(number), run.path(number)

    def work() -> None:
        model, options = run.policy(number - 1), {"seed": run.seed(number), "first": run.first(number)}
        save_trained(
            model, train_on(model, learned, run.config.of_round(number), folder=folder / "train", **options), folder
        )

    run.timed(number, "training", work)


def evaluate_round(run: Run, number: int) -> None:
    """Measures the model after a round (0: before the first), and how far its candidates' scores can be trusted; sends
    the round to its tracker. Raises: as evaluate and send_round; InputError if other records were measured before."""

    def work() -> None:
        agreed, measured = on_main(lambda: _agreement(run, number)), run.measurement(number)
        measured.share()
        barrier()
        on_main(lambda: run.save_evaluation(number, measured, agreed))

    if not run.is_made(number, "evaluation.json"):
        on_main(run.check_eval_files)
        run.timed(number, "evaluation", work)
    on_main(lambda: send_round(run, number, run.evaluation(number)))


def _agreement(run: Run, number: int) -> dict[str, Any]:
    suite, has_candidates = find_evaluation(run.config.eval), run.path(number, "candidates").exists()
    if not has_candidates or run.config.data.source not in suite.known_sources:  # imported pairs have none
        return {}
    pairs, candidates = PairFile(run.path(number, "pairs.parquet")), run.candidates(number).share()
    parts = ((records, of_records, pairs.of(records)) for records, of_records in candidates)
    return {"agreement": suite.judge_candidates(run.model(number), parts)}


def _finish(run: Run, console: Console) -> dict[str, Any]:
    summary = run.summary()
    write_json(run.folder / "summary.json", summary)
    print_summary(summary, console)
    console.print(f"report: {write_report(run.folder)}", soft_wrap=True, highlight=False)
    return summary
