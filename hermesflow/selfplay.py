"""Self-play: rounds of curation, Pair-DPO and evaluation in one folder, resumable at every step.

    runs/NAME/  config.toml  records.parquet  round-0/evaluation.json (before)  summary.json  report/index.html
      round-K/  candidates/part-*.parquet  pairs.parquet  rejected.parquet  train/step-*/  metrics.jsonl  model/
                evaluation.json  seconds.json

Every phase writes its result whole and is skipped where that exists, so that a run that was killed goes on where it was
and ends with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from .config import Config, load_config, to_toml
from .curation import curate
from .evaluation import agreement, evaluate, summarise
from .files import (
    InputError,
    atomic_folder,
    read_json,
    read_parquet,
    remove_leftovers,
    write_json,
    write_parquet,
    write_text,
)
from .models import Model, load_model
from .pairs import make_pairs, pair_statistics
from .records import Record, read_records, write_records
from .report import write_report
from .summaries import print_summary
from .training import train_pairs
from .worlds import shapes


def run_selfplay(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Runs all rounds, going on where an earlier run of the same name and settings stopped.

    Args:
        config: the settings; config.run names the folder.
        console: where the closing table goes; None is the standard output.
    Returns: what summary.json holds.
    Raises: InputError if the folder holds a run with other settings or cannot be written, or if a round keeps no pair.
    """
    console = console or Console()
    run = Run(config)
    console.print(f"settings: {run.folder / 'config.toml'}", soft_wrap=True, highlight=False)
    run.evaluation(0)
    for number in range(1, config.selfplay.num_rounds + 1):
        run.curate(number)
        run.train(number)
        run.evaluation(number)
    summary = run.summary()
    write_json(run.folder / "summary.json", summary)
    page = write_report(run.folder)
    print_summary(summary, console)
    console.print(f"report: {page}", soft_wrap=True, highlight=False)
    return summary


def run_curation(config: Config, number: int) -> None:
    """Makes the candidates and the pairs of one round; the rounds before it must be there."""
    Run(config).curate(number)


def run_training(config: Config, number: int) -> None:
    """Trains on the pairs of one round, which run_curation has made."""
    Run(config).train(number)


class Run:
    """One run's folder and the phases that fill it; rounds count from 1, round 0 is the model before training."""

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, config.run_folder
        settings = self.folder / "config.toml"
        if settings.exists():
            self._check_settings(settings)
            remove_leftovers(self.folder)
        else:
            write_text(settings, to_toml(config))
        self._loaded: tuple[int, Model] | None = None

    def _check_settings(self, path: Path) -> None:
        saved, now = asdict(load_config(path)), asdict(self.config)
        changed = [
            f"{section}.{key}"
            for section in now
            for key in now[section]
            if section != "pretrain"
            and now[section][key] != saved[section][key]
            and (section, key) != ("run", "folder")
        ]
        if changed:
            raise InputError(
                f"{path}: the run has other settings ({', '.join(changed)}); choose another run.name, "
                f"or delete {self.folder} to start over"
            )

    @cached_property
    def records(self) -> list[Record]:
        """All rounds' image-caption pairs with their images' codes."""
        path = self.folder / "records.parquet"
        if not path.exists():
            write_records(path, self._make_records())
        return read_records(path)

    def _make_records(self) -> list[Record]:
        data, rounds = self.config.data, self.config.selfplay.num_rounds if self.config.selfplay.fresh_prompts else 1
        count = data.num_records * rounds
        if data.source == "shapes":
            scenes = shapes.sample_scenes("train", count, seed=self.config.run.seed)
            rng = np.random.default_rng([self.config.run.seed, 2])
            records = [shapes.make_record(scene, f"train-{index:06d}", rng) for index, scene in enumerate(scenes)]
        else:
            records = read_records(data.source)[:count]
            if len(records) < count:
                raise InputError(
                    f"{data.source}: has {len(records)} records, {count} are needed; lower data.num_records"
                )
        return with_codes(self.model(0), records)

    def round_records(self, number: int) -> list[Record]:
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
        if number == 0:
            return load_model(self.config.model.name)
        folder = self._path(number, "model")
        try:
            return load_model(str(folder))
        except InputError as error:
            raise InputError(f"{error}, or delete {folder} and run the same command again to train it anew") from error

    def curate(self, number: int) -> None:
        """Candidates, pairs and rejected records of a round."""
        if self._path(number, "pairs.parquet").exists():
            return
        previous = None
        if number > 1 and not self.config.selfplay.fresh_prompts:
            previous = read_parquet(self._path(number - 1, "pairs.parquet"))

        def work() -> None:
            records, folder = self.round_records(number), self._path(number, "candidates")
            seed = self.config.run.seed * 1_000 + number
            candidates = curate(
                self.model(number - 1), records, self.config.curation, seed=seed, folder=folder, previous=previous
            )
            pairs, rejected = make_pairs(records, candidates, self.config.curation, previous)
            write_parquet(self._path(number, "rejected.parquet"), rejected)
            write_parquet(self._path(number, "pairs.parquet"), pairs)

        self._timed(number, "curation", work)

    def train(self, number: int) -> None:
        """Pair-DPO on a round's pairs."""
        target = self._path(number, "model")
        if target.exists():
            return
        pairs = read_parquet(self._path(number, "pairs.parquet"))
        if not len(pairs):
            raise InputError(
                f"{self._path(number, 'pairs.parquet')}: round {number} kept no pair; lower curation.threshold or "
                "curation.margin, or raise data.num_records, under another run.name"
            )

        def work() -> None:
            model = self.model(number - 1)
            self._loaded = None  # the policy changes in place
            means = train_pairs(
                model,
                pairs,
                self.config.train,
                seed=self.config.run.seed * 1_000 + number,
                folder=self._path(number, "train"),
            )
            write_json(self._path(number, "training.json"), means)
            with atomic_folder(target) as temporary:
                model.save(temporary)

        self._timed(number, "training", work)

    def evaluation(self, number: int) -> dict[str, Any]:
        """The evaluation after a round."""
        path = self._path(number, "evaluation.json")
        if not path.exists():
            self._timed(number, "evaluation", lambda: write_json(path, self._evaluate(number)))
        return read_json(path)

    def _evaluate(self, number: int) -> dict[str, Any]:
        result = evaluate(self.model(number), self.config.eval)
        if number and self.config.data.source == "shapes":
            parts = sorted(self._path(number, "candidates").glob("part-*.parquet"))
            candidates = pa.concat_tables([read_parquet(part) for part in parts])
            pairs = read_parquet(self._path(number, "pairs.parquet"))
            result["agreement"] = agreement(self.model(number), self.round_records(number), candidates, pairs)
        return result

    def summary(self) -> dict[str, Any]:
        """What summary.json holds: before, and each round with its paired changes."""
        numbers = range(self.config.selfplay.num_rounds + 1)
        evaluations = [self.evaluation(number) for number in numbers]
        before, rounds = summarise(evaluations)
        for number, metrics in enumerate(rounds, start=1):
            pairs, rejected = (read_parquet(self._path(number, name)) for name in ("pairs.parquet", "rejected.parquet"))
            metrics["pairs"] = pair_statistics(pairs, rejected)
            metrics["training"] = read_json(self._path(number, "training.json"))
            if "agreement" in evaluations[number]:
                metrics["agreement"] = evaluations[number]["agreement"]
            metrics["seconds"] = read_json(self._path(number, "seconds.json"))
        before["seconds"] = read_json(self._path(0, "seconds.json"))
        settings = asdict(replace(self.config))
        del settings["pretrain"]
        return {"settings": settings, "seed": self.config.run.seed, "before": before, "rounds": rounds}

    def _path(self, number: int, *names: str) -> Path:
        return self.folder.joinpath(f"round-{number}", *names)

    def _timed(self, number: int, phase: str, work: Callable[[], None]) -> None:
        """Runs a phase and notes its seconds; of a phase that was killed, those since it went on."""
        began = time.perf_counter()
        work()
        path = self._path(number, "seconds.json")
        seconds = read_json(path) if path.exists() else {}
        write_json(path, seconds | {phase: round(time.perf_counter() - began, 2)})


def with_codes(model: Model, records: Sequence[Record]) -> list[Record]:
    """The records with their images tokenised where they have no codes yet; pixels are dropped.

    Raises: InputError if a record has neither image nor codes.
    """
    empty = [record.id for record in records if record.image is None and record.codes is None]
    if empty:
        raise InputError(f"record {empty[0]}: has neither an image nor codes; add one of them")
    missing = [index for index, record in enumerate(records) if record.codes is None]
    codes = model.encode_images(np.stack([records[index].image for index in missing])) if missing else []
    done = list(records)
    for index, row in zip(missing, codes, strict=True):
        done[index] = replace(records[index], codes=row.numpy().astype(np.int32))
    return [replace(record, image=None) for record in done]
