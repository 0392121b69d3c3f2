"""Self-play: rounds of curation, Pair-DPO and evaluation in one folder, resumable at every step.

    runs/NAME/  config.toml  records.parquet  rejected.parquet  round-0/evaluation.json (before)  summary.json
      report/index.html
      round-K/  candidates/part-*.parquet  pairs.parquet  rejected.parquet  train/step-*/  metrics.jsonl  model/
                evaluation.json  seconds.json

Every phase writes its result whole and is skipped where that exists, so that a run that was killed goes on where it was
and ends with the same result. With torchrun, all processes curate and train; the first does the rest, and writes.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console

from hermesflow.config import Config
from hermesflow.curation import curate
from hermesflow.data.balancing import balance_questions, yes_share
from hermesflow.data.pairs import PAIRS_SCHEMA, REJECTED_SCHEMA, PairFile, make_pairs, pair_statistics, read_pairs
from hermesflow.data.published_pairs import read_published_pairs
from hermesflow.data.records import Record, RecordFile, write_records
from hermesflow.data.sources import UNUSABLE_SCHEMA, count_reasons, describe_rejected, encode_records, read_source
from hermesflow.evaluation.builtin import agreement, evaluate, summarise
from hermesflow.models.family import open_model
from hermesflow.models.model import Model, model_digest
from hermesflow.pair_training import train_and_save
from hermesflow.report.page import write_report
from hermesflow.report.tables import describe_one_sided, is_balanced, print_summary
from hermesflow.runs import check_origin, check_views_codes, claim_folder
from hermesflow.runtime.distributed import barrier, is_main, on_main, world_size
from hermesflow.runtime.files import (
    InputError,
    damaged,
    parquet_writer,
    read_json,
    read_parquet,
    write_json,
    write_parquet,
)
from hermesflow.runtime.trackers import check_tracker
from hermesflow.worlds import shapes

_LOGGER = logging.getLogger(__name__)
_SCENE_SEEDS = 2**32


def run_selfplay(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Runs all rounds, going on where an earlier run of the same name and settings stopped.

    Args:
        config: the settings; config.run names the folder.
        console: where the closing table goes; None is the standard output.
    Returns: what summary.json holds.
    Raises: InputError if the folder holds a run with other settings or cannot be written, or if a round keeps no pair.
    """
    check_tracker(config.train.tracker)
    console = console or Console()
    run = Run(config)
    console.print(f"settings: {run.folder / 'config.toml'}", soft_wrap=True, highlight=False)
    _ = run.records  # a mistake in the data shows before the first evaluation, not after it
    run.evaluation(0)
    for number in range(1, config.selfplay.num_rounds + 1):
        run.curate(number)
        run.train(number)
        run.evaluation(number)

    def finish() -> dict[str, Any]:
        summary = run.summary()
        write_json(run.folder / "summary.json", summary)
        page = write_report(run.folder)
        print_summary(summary, console)
        console.print(f"report: {page}", soft_wrap=True, highlight=False)
        return summary

    return on_main(finish)


def run_curation(config: Config, number: int) -> None:
    """Makes the candidates and the pairs of one round; the rounds before it must be there."""
    Run(config).curate(number)


def run_training(config: Config, number: int) -> None:
    """Trains on the pairs of one round, which run_curation has made."""
    check_tracker(config.train.tracker)
    Run(config).train(number)


def import_pairs(config: Config, number: int, path: str | os.PathLike, root: str | os.PathLike | None = None) -> Path:
    """Gives a round of a run the pairs of a published pair_dpo_data.json, so that run_training goes on from there.

    Args:
        config: the run's settings; curation.threshold is what a win's image must score more than.
        number: the round, from 1; the rounds before it must be trained.
        path: see read_published_pairs.
        root: see read_published_pairs.
    Returns: the path of the pairs; rejected.parquet is written beside it.
    Raises: InputError if the file cannot be used, or the round has pairs already.
    """
    return Run(config).import_pairs(number, path, root)


class Run:
    """One run's folder and the phases that fill it; rounds count from 1, round 0 is the model before training."""

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, config.run_folder
        on_main(self._claim)
        self._loaded: tuple[int, Model] | None = None

    def _claim(self) -> None:
        self._lock = claim_folder(self.folder, self.config, "run.name")

    @cached_property
    def records(self) -> RecordFile:
        """All rounds' image-caption pairs with their images' codes; on the disk, and read where they are used."""
        path = self.folder / "records.parquet"

        def work() -> None:
            if not (path.exists() and (self.folder / "rejected.parquet").exists()):
                write_records(path, self._make_records())
                if told := describe_one_sided(yes_share(RecordFile(path))):
                    _LOGGER.warning("%s: %s", self.config.data.source, told)

        on_main(work)
        return RecordFile(path)

    def _make_records(self) -> Iterator[Record]:
        """The records one by one; when the last was taken, the rejected ones are written down."""
        data, rounds = self.config.data, self.config.selfplay.num_rounds if self.config.selfplay.fresh_prompts else 1
        count, rejected = data.num_records * rounds, []
        if data.source == "shapes":
            # A stream of its own: pretraining draws the scenes of small seeds.
            seed = _SCENE_SEEDS + self.config.run.seed
            scenes = itertools.islice(shapes.endless_scenes("train", seed), count)
            rng = np.random.default_rng([seed, len(shapes.SPLITS)])
            records = (shapes.make_record(scene, f"train-{index:06d}", rng) for index, scene in enumerate(scenes))
        else:
            records, rejected = read_source(data.source, data.questions or None, data.root or None)
            records = balance_questions(records)
        num_usable = 0
        for record, reason in encode_records(self.model(0), records, count):
            if reason is None:
                num_usable += 1
                yield record
            else:
                rejected.append({"record_id": record.id, "reason": reason})
        if num_usable < count:
            told = f"; rejected were {describe_rejected(rejected)}" if rejected else ""
            need = f"{count} are needed" + (f" ({rounds} rounds of {data.num_records})" if rounds > 1 else "")
            raise InputError(
                f"{data.source}: has {num_usable} usable records, {need}; lower data.num_records{told}"
            )
        write_parquet(self.folder / "rejected.parquet", pa.Table.from_pylist(rejected, UNUSABLE_SCHEMA))

    def round_records(self, number: int) -> Sequence[Record]:
        """The records of one round: fresh ones, or the same in every round."""
        if not self.config.selfplay.fresh_prompts:
            return self.records
        count = self.config.data.num_records
        return self.records[(number - 1) * count : number * count]

    def model(self, number: int) -> Model:
        """The model after a round; 0 is the one the run starts from."""
        if self._loaded is None or self._loaded[0] != number:
            if number and not self._path(number, "model").exists():
                raise InputError(f"{self._path(number, 'model')}: round {number} is not trained yet; run it first")
            self._loaded = (number, self._load(number))
        return self._loaded[1]

    def _load(self, number: int) -> Model:
        if number:
            return self._open(number, self._origin().get("dtype", "float32"))
        model = self._open(0, self.config.model.dtype)
        check_views_codes(model, self.config.model.name)
        self._check_origin(model)
        return model

    def _open(self, number: int, dtype: str) -> Model:
        """The model after a round, in a dtype."""
        if number == 0:
            return open_model(replace(self.config.model, dtype=dtype))
        folder = self._path(number, "model")
        try:
            return open_model(replace(self.config.model, name=str(folder), dtype=dtype))
        except InputError as error:
            raise InputError(f"{error}, or delete {folder} and run the same command again to train it anew") from error

    def _origin(self) -> dict[str, str]:
        """What the run began with: the weights' digest, and their dtype, which every round draws and judges in."""
        return read_json(self.folder / "origin.json")

    def _check_origin(self, model: Model) -> None:
        """Refuses a run that began with other weights of the same name."""
        dtype = str(model.engine.dtype).removeprefix("torch.")
        told = {"model": f"other weights than {self.config.model.name!r} holds now"}
        check_origin(self.folder, {"model": model_digest(model), "dtype": dtype}, told, "run.name")

    def _check_round(self, number: int) -> None:
        if number > self.config.selfplay.num_rounds:
            raise InputError(
                f"round {number}: the run has {self.config.selfplay.num_rounds} rounds; give a smaller --round, or a "
                "larger selfplay.num_rounds under another run.name"
            )

    def _previous(self, number: int) -> PairFile | None:
        """The pairs that a round's win and lose are compared with, where its records are the same."""
        if number == 1 or self.config.selfplay.fresh_prompts:
            return None
        return PairFile(self._path(number - 1, "pairs.parquet"))

    def _candidates(self, number: int) -> Iterator[tuple[list[Record], pa.Table]]:
        """A round's records and candidates, part by part; what is on disk is read, the rest made."""
        return curate(
            self.model(number - 1),
            self.round_records(number),
            self.config.curation,
            seed=self.config.run.seed * 1_000 + number,
            folder=self._path(number, "candidates"),
            previous=self._previous(number),
        )

    def curate(self, number: int) -> None:
        """Candidates, pairs and rejected records of a round."""
        self._check_round(number)
        if self._is_made(number, "pairs.parquet", "rejected.parquet"):
            return

        def write_pairs_of_parts() -> None:
            previous, parts = self._previous(number), self._candidates(number)
            with (
                parquet_writer(self._path(number, "pairs.parquet"), PAIRS_SCHEMA) as write_pairs,
                parquet_writer(self._path(number, "rejected.parquet"), REJECTED_SCHEMA) as write_rejected,
            ):
                for records, candidates in parts:
                    before = None if previous is None else previous.of(records)
                    pairs, rejected = make_pairs(records, candidates, self.config.curation, before)
                    write_pairs(pairs)
                    write_rejected(rejected)

        def work() -> None:
            if world_size() > 1:
                for _ in self._candidates(number):
                    pass
                barrier()
            on_main(write_pairs_of_parts)

        self._timed(number, "curation", work)

    def import_pairs(self, number: int, path: str | os.PathLike, root: str | os.PathLike | None) -> Path:
        """Pairs and rejected records of a round from a published file."""
        self._check_round(number)
        target = self._path(number, "pairs.parquet")
        if target.exists():
            raise InputError(f"{target}: round {number} has pairs already; choose another run.name or --round")
        threshold = self.config.curation.threshold
        pairs, rejected = read_published_pairs(self.model(number - 1), path, root, threshold)
        write_parquet(self._path(number, "rejected.parquet"), rejected)
        write_parquet(target, pairs)
        return target

    def train(self, number: int) -> None:
        """Pair-DPO on a round's pairs."""
        self._check_round(number)
        if self._is_made(number, "model", "training.json"):
            return
        if not self._path(number, "pairs.parquet").exists():
            raise InputError(f"{self.folder}: round {number} has no pairs yet; curate or import them first")
        pairs = read_pairs(self._path(number, "pairs.parquet"))
        if not len(pairs):
            rejected = read_parquet(self._path(number, "rejected.parquet"), REJECTED_SCHEMA.names)
            reason = next(iter(pair_statistics(pairs, rejected)["rejected"]), "no records")
            raise InputError(
                f"{self._path(number, 'rejected.parquet')}: round {number} kept no pair, most often for {reason!r}; "
                "lower curation.threshold or curation.margin, set curation.keep to any, or raise data.num_records, "
                "under another run.name"
            )

        def work() -> None:
            model = self.model(number - 1)
            self._loaded = None  # the policy changes in place
            if model.engine.dtype != torch.float32:  # a step of 2e-5 is lost in the 8 bits of bf16
                model = self._open(number - 1, "float32")
            seed = self.config.run.seed * 1_000 + number
            train_and_save(model, pairs, self.config.train, seed=seed, folder=self._path(number))

        self._timed(number, "training", work)

    def evaluation(self, number: int) -> dict[str, Any]:
        """The evaluation after a round."""
        path = self._path(number, "evaluation.json")

        def work() -> None:
            if not path.exists():
                self._timed(number, "evaluation", lambda: write_json(path, self._evaluate(number)))

        on_main(work)
        result = read_json(path)
        if not isinstance(result, dict) or not {"metrics", "records"} <= result.keys():
            raise damaged(path, "evaluation", ValueError("it has no metrics"))
        if not is_balanced(result["metrics"]):
            raise InputError(
                f"{path}: was measured by record questions, as an older version did; `hermesflow report {self.folder}` "
                "shows the run, and another run.name begins one that is measured by balanced questions"
            )
        return result

    def _evaluate(self, number: int) -> dict[str, Any]:
        agreed = {}
        curated = number and self._path(number, "candidates").exists()  # imported pairs have no candidates
        if curated and self.config.data.source == "shapes":
            pairs = PairFile(self._path(number, "pairs.parquet"))
            parts = ((records, candidates, pairs.of(records)) for records, candidates in self._candidates(number))
            agreed = {"agreement": agreement(self.model(number), parts)}
        return evaluate(self.model(number), self.config.eval) | agreed

    def summary(self) -> dict[str, Any]:
        """What summary.json holds: before, and each round with its paired changes."""
        numbers = range(self.config.selfplay.num_rounds + 1)
        evaluations = [self.evaluation(number) for number in numbers]
        before, rounds = summarise(evaluations)
        for number, metrics in enumerate(rounds, start=1):
            pairs = read_parquet(self._path(number, "pairs.parquet"), ["record_id", "sides"])
            rejected = read_parquet(self._path(number, "rejected.parquet"), REJECTED_SCHEMA.names)
            metrics["pairs"] = pair_statistics(pairs, rejected)
            metrics["training"] = read_json(self._path(number, "training.json"))
            if "agreement" in evaluations[number]:
                metrics["agreement"] = evaluations[number]["agreement"]
            metrics["seconds"] = self._seconds(number)
        before["seconds"] = self._seconds(0)
        settings = asdict(replace(self.config))
        del settings["pretrain"], settings["study"]
        num_records = len(self.records)  # they are made now if every round's pairs were imported
        unusable = read_parquet(self.folder / "rejected.parquet", UNUSABLE_SCHEMA.names).to_pylist()
        return {
            "settings": settings,
            "seed": self.config.run.seed,
            "data": {
                "records": num_records,
                "rejected": count_reasons(unusable),
                "yes_share": yes_share(self.records),
            },
            "before": before,
            "rounds": rounds,
        }

    def _path(self, number: int, *names: str) -> Path:
        return self.folder.joinpath(f"round-{number}", *names)

    def _is_made(self, number: int, *names: str) -> bool:
        """Whether a round has these files, for all processes."""
        return on_main(lambda: all(self._path(number, name).exists() for name in names))

    def _timed(self, number: int, phase: str, work: Callable[[], None]) -> None:
        """Runs a phase and notes its seconds; of a phase that was killed, those since it went on."""
        began = time.perf_counter()
        work()
        if is_main():
            seconds = self._seconds(number) | {phase: round(time.perf_counter() - began, 2)}
            write_json(self._path(number, "seconds.json"), seconds)

    def _seconds(self, number: int) -> dict[str, float]:
        """Seconds by phase; a kill right after a phase loses its entry, and nothing else."""
        path = self._path(number, "seconds.json")
        return read_json(path) if path.exists() else {}
