"""A run's folder: its lock, its settings, what it began with, and what exists in it.

    runs/NAME/  config.toml  origin.json  judge.json (with model.judge)  files.json (with files of records)
                records.parquet  rejected.parquet  summary.json  report/{index,pairs}.html
      round-K/  candidates/part-*.parquet  pairs.parquet  rejected.parquet  train/step-*/  metrics.jsonl  model/
                training.json  evaluation/part-*.json, then evaluation.json  seconds.json
                sent.json (with train.tracker)  pushed.json (after push --pairs)

Round 0 is the model before training and has an evaluation alone. Every file is written whole, so that what exists is
finished and is not made again. A training on a file of pairs has a folder of its own:

    FOLDER/  config.toml  origin.json  training.json  model/  train/step-*/  metrics.jsonl  reference.parquet
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import torch

from hermesflow.algorithms.packing import check_pairs
from hermesflow.config import Config, load_config, to_toml
from hermesflow.curation import Candidates
from hermesflow.data.balancing import yes_share
from hermesflow.data.pairs import REJECTED_SCHEMA, SIDES, PairFile, each_row, pair_statistics, read_pairs
from hermesflow.data.published_pairs import read_published_pairs
from hermesflow.data.records import Record, RecordFile
from hermesflow.data.sources import UNUSABLE_SCHEMA, count_reasons, describe_rejected
from hermesflow.evaluation.evaluation import Measurement
from hermesflow.evaluation.metrics import check_same_records, is_balanced, summarize
from hermesflow.models.family import load_model, open_model, trained_rounds
from hermesflow.models.merging import merge_models
from hermesflow.models.model import Model, model_digest, weights_digest
from hermesflow.runs.records import are_made, clear_records, make_records
from hermesflow.runs.settings import (
    all_changed_settings,
    changed_files,
    changed_settings,
    changed_training_settings,
    describe_way_out,
    is_measured,
    note_files,
)
from hermesflow.runtime.claims import Claims
from hermesflow.runtime.distributed import is_launched, is_main, on_main
from hermesflow.runtime.files import (
    InputError,
    StrPath,
    atomic_folder,
    damaged,
    make_folder,
    read_json,
    read_parquet,
    remove_leftovers,
    write_json,
    write_parquet,
    write_problem,
    write_text,
)
from hermesflow.runtime.progress import stage
from hermesflow.training import check_model, check_takes_pairs, check_training, is_online, train_checked_pairs

_ELSEWHERE = "output folder (-o)"
_LOGGER = logging.getLogger(__name__)
_RESULTS = ("round-*", "records.parquet", "train", "study.jsonl")
"""Files of which one must be there for settings to be fixed."""


class Busy(InputError):
    """Another process is at work in a folder."""


class Run:
    """One run's folder and what exists in it; rounds count from 1, round 0 is the model before training."""

    def __init__(self, config: Config, *, as_worker: bool = False) -> None:
        """
        Args:
            config: the settings.
            as_worker: works on the folder beside others that do, on this or other machines; else it is this process's
                (and its group's) alone.
        Raises: InputError as claim_folder, or if torchrun started the worker.
        """
        if as_worker and is_launched():
            raise InputError("--worker: a worker is one process; start each by itself, without torchrun")
        self.config, self.folder = config, config.run_folder
        self.rounds = range(1, config.selfplay.num_rounds + 1)
        self._loaded: tuple[int, Model] | None = None
        self._is_worker = as_worker
        on_main(self._join if as_worker else self._claim)

    def _claim(self) -> None:
        self._lock = claim_folder(self.folder, self.config, "run.name", partial(changed_settings, self.folder))
        for claims in self.folder.glob("round-*/claims"):  # of workers, none of which is at work now
            shutil.rmtree(claims, ignore_errors=True)
        if (self.folder / "records").exists():
            clear_records(self.folder, self.config)
        for evaluation in self.folder.glob("round-*/evaluation.json"):
            shutil.rmtree(evaluation.with_suffix(""), ignore_errors=True)  # its parts
        self._warn_of_files()

    def _join(self) -> None:
        """Shares the lock with other workers; whoever is alone writes down the settings first."""
        while True:
            try:
                self._claim()
                fcntl.flock(self._lock, fcntl.LOCK_SH)
                return
            except Busy:
                self._lock = _lock(make_folder(self.folder) / ".lock", fcntl.LOCK_SH)
                if (self.folder / "config.toml").exists():
                    _check_settings(self.folder, self.config, "run.name", partial(changed_settings, self.folder))
                    return
                self._lock.close()  # who was to write them is gone

    def leave(self) -> None:
        """Frees the folder's lock; what is read or written from now on is under that of another process."""
        self._lock.close()

    def _warn_of_files(self) -> None:
        for section, made in (("data", "records.parquet"), ("eval", "round-*/evaluation*")):
            for path in changed_files(self.folder, self.config, section) if any(self.folder.glob(made)) else ():
                _LOGGER.warning(
                    "%s: changed since the run made %s of it, which stays as it is; choose another run.name to use "
                    "the file as it is now",
                    path,
                    self.folder / made,
                )

    @cached_property
    def records(self) -> RecordFile:
        """All rounds' image-caption pairs with their images' codes; on the disk, and read where they are used."""
        counts = self._num_records()
        if not on_main(lambda: are_made(self.folder, sum(counts))):
            begun = (self.folder.glob(name) for name in ("records.parquet", "round-*"))
            on_main(lambda: self._check_files("data", is_begun=any(map(any, begun))))
            make_records(self.folder, self.config, counts, self.model(0), as_worker=self._is_worker)
        return RecordFile(self.folder / "records.parquet")

    def _check_files(self, section: str, is_begun: bool) -> None:
        """Notes what a section's files of records hold; raises InputError if the run began with something else."""
        if not is_begun:
            note_files(self.folder, self.config, section)
        for path in changed_files(self.folder, self.config, section):
            raise InputError(
                f"{path}: changed since the run began, and more is to be made of it; put the file back as it was, or "
                "choose another run.name"
            )

    def _num_records(self) -> list[int]:
        """How many records each round needs; one number if all rounds have the same records."""
        numbers = self.rounds if self.config.selfplay.fresh_prompts else [1]
        return [self.config.of_round(number).data.num_records for number in numbers]

    def round_records(self, number: int) -> Sequence[Record]:
        """The records of one round: fresh ones, or the same in every round."""
        if not self.config.selfplay.fresh_prompts:
            return self.records
        end = sum(self.config.of_round(each).data.num_records for each in self.rounds[:number])
        return self.records[end - self.config.of_round(number).data.num_records : end]

    def model(self, number: int) -> Model:
        """The model after a round, in the dtype in which every round draws and judges; 0 is the one it starts from."""
        if self._loaded is None or self._loaded[0] != number:
            if number and not self.path(number, "model").exists():
                raise InputError(f"{self.path(number, 'model')}: round {number} is not trained yet; run it first")
            self._loaded = (number, self._load(number))
        return self._loaded[1]

    def check_judge(self) -> None:
        """Raises InputError as judge does; keeps nothing in memory."""
        _ = self.judge
        self.__dict__.pop("judge", None)

    @cached_property
    def judge(self) -> Model | None:
        """What scores drawn images in place of the model. Raises: InputError if it has other image codes, or
        other weights than when the run began."""
        name = self.config.model.judge
        if not name:
            return None
        config = self.config.model
        try:
            judge, painter = open_model(replace(config, name=name, family="auto")), self.model(0)
        except InputError as error:
            raise InputError(f"model.judge: {error}") from error
        theirs, ours = ((model.layout.codebook_size, *model.layout.image_grid) for model in (judge, painter))
        if theirs != ours:
            codes, expected = ("{} codes in {} x {}".format(*values) for values in (theirs, ours))
            raise InputError(
                f"model.judge {name}: its images are {codes}, those of {config.name} {expected}; give a judge with "
                "the same image tokenizer"
            )
        if weights_digest(judge.vq_tokenizer) != weights_digest(painter.vq_tokenizer):
            raise InputError(
                f"model.judge {name}: the weights of its image tokenizer are not those of {config.name}, so that codes "
                "mean other images to it; give a judge with the same image tokenizer"
            )
        reasons = {"judge": f"other weights than the judge {name!r} holds now"}
        check_origin(self.folder, {"judge": model_digest(judge)}, reasons, "run.name", file="judge.json")
        return judge

    def policy(self, number: int) -> Model:
        """The model after a round, in float32, to be trained in place."""
        model = self.model(number)
        self._loaded = None
        self.__dict__.pop("judge", None)  # its memory is needed
        # A step of 2e-5 is lost in the 8 bits of bf16.
        return model if model.engine.dtype == torch.float32 else self._open(number, "float32")

    def first(self, number: int) -> Model | None:
        """The model before self-play, in float32, as the reference of an online round after the first one: a reference
        that moved with the rounds would let answers drift a little in each."""
        return self._open(0, "float32") if self.is_online(number) and number > 1 else None

    def _load(self, number: int) -> Model:
        if number:
            return self._open(number, self._origin().get("dtype", "float32"))
        model = self._open(0, self.config.model.dtype)
        check_is_saved_whole(model, self.config.model.name)
        for section in (self.config.eval, *(of_round.curation for of_round in self.config.each_round())):
            model.sampling_of(self.config.drawn_by(section))  # a setting that the family lacks shows now
        for of_round in self.config.each_round():
            check_model(model, of_round)
        self._check_origin(model)
        return model

    def _open(self, number: int, dtype: str) -> Model:
        """The model after a round, in a dtype."""
        if number == 0:
            return open_model(replace(self.config.model, dtype=dtype))
        folder = self.path(number, "model")
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
        reasons = {"model": f"other weights than {self.config.model.name!r} holds now"}
        check_origin(self.folder, {"model": model_digest(model), "dtype": dtype}, reasons, "run.name")

    def check_round(self, number: int) -> None:
        """Raises InputError if the run has no such round."""
        if number not in self.rounds:
            raise InputError(
                f"round {number}: the run has rounds 1 to {len(self.rounds)}; give one of them, or raise "
                "selfplay.num_rounds"
            )

    def check_eval_files(self) -> None:
        """Raises InputError if the files of records to measure on changed since the first evaluation."""
        self._check_files("eval", is_begun=is_measured(self.folder))

    def previous(self, number: int) -> PairFile | None:
        """The pairs that a round's win and lose are compared with, where its records are the same."""
        with_pairs = [each for each in self.rounds[: number - 1] if not self.is_online(each)]
        if not with_pairs or self.config.selfplay.fresh_prompts:
            return None
        return PairFile(self.path(with_pairs[-1], "pairs.parquet"))

    def measurement(self, number: int) -> Measurement:
        """The evaluation after a round, in parts."""
        return Measurement(self.model(number), self.config.drawn_by(self.config.eval), self.path(number, "evaluation"))

    def share_evaluation(self, number: int) -> None:
        """Makes the parts of the evaluation after a round (0: before the first) beside other workers, until all are
        there; evaluate_round joins them.

        Raises: as Measurement; InputError if the run has no such round, or it is not trained yet.
        """
        if number:
            self.check_round(number)
        if not self.is_made(number, "evaluation.json"):
            _ = self.records  # a mistake in the data shows before the first evaluation
            self.check_eval_files()
            with stage(f"round {number}, evaluation" if number else "before self-play, evaluation"):
                self.measurement(number).share(Claims(self.path(number, "claims")))

    def save_evaluation(self, number: int, measured: Measurement, more: dict[str, Any]) -> None:
        """Writes a round's evaluation, with more beside it, in place of its parts.

        Raises: as Measurement; InputError if it measured other records than that before self-play.
        """
        result = measured.result() | more
        before = self.evaluation(0) if number else result
        try:
            check_same_records(before, result)
        except ValueError as error:
            measured.remove()  # what made them is to be corrected
            raise InputError(f"eval.suite {self.config.eval.suite}: {error}") from error
        write_json(self.path(number, "evaluation.json"), result)
        measured.remove()

    def evaluation(self, number: int) -> dict[str, Any]:
        """The evaluation after a round, which must be there.

        Raises: InputError if the file is damaged, or measured in a way that cannot be compared with today's.
        """
        path = self.path(number, "evaluation.json")
        result = read_json(path)
        if not isinstance(result, dict) or not {"metrics", "records"} <= result.keys():
            raise damaged(path, "evaluation", ValueError("it has no metrics"))
        if "by_category" in result["metrics"] and not is_balanced(result["metrics"]):
            raise InputError(
                f"{path}: was measured by record questions, as an older version did; `hermesflow report {self.folder}` "
                "shows the run, and another run.name begins one that is measured by balanced questions"
            )
        return result

    def candidates(self, number: int) -> Candidates:
        """A round's candidates, in parts."""
        return Candidates(
            self.model(number - 1), self.round_records(number),
            self.config.drawn_by(self.config.of_round(number).curation), seed=self.seed(number),
            folder=self.path(number, "candidates"), previous=self.previous(number), judge=lambda: self.judge,
            are_checked=True,
        )  # fmt: skip

    def share_candidates(self, number: int) -> None:
        """Makes a round's candidates beside other workers, until all are there; curate_round makes pairs of them.

        Raises: as Candidates and needs_candidates.
        """
        if self.needs_candidates(number):
            with stage(f"round {number}, curation"):
                self.candidates(number).share_as_worker(Claims(self.path(number, "claims")))

    def needs_candidates(self, number: int) -> bool:
        """Whether a round's pairs are still to be made. Raises: InputError if the run has no such round, or its
        algorithm takes no pairs."""
        self.check_round(number)
        check_takes_pairs(self.config.of_round(number).selfplay.algorithm)
        return not self.is_made(number, "pairs.parquet", "rejected.parquet")

    def pairs(self, number: int) -> pa.Table:
        """A round's pairs, at least one. Raises: InputError if they are not made yet, or none was kept."""
        if not self.path(number, "pairs.parquet").exists():
            raise InputError(f"{self.folder}: round {number} has no pairs yet; curate or import them first")
        pairs = read_pairs(self.path(number, "pairs.parquet"))
        if not len(pairs):
            rejected = read_parquet(self.path(number, "rejected.parquet"), REJECTED_SCHEMA.names)
            reason = next(iter(pair_statistics(pairs, rejected)["rejected"]), "no records")
            raise InputError(
                f"{self.path(number, 'rejected.parquet')}: round {number} kept no pair, most often for {reason!r}; "
                "lower curation.threshold or curation.margin, set curation.keep to any, or raise data.num_records, "
                "under another run.name"
            )
        return pairs

    def describe_pairs(self, number: int) -> str:
        """How many pairs a round has, and where they are."""
        path, rejected = self.path(number, "pairs.parquet"), self.path(number, "rejected.parquet")
        kept, asked = read_parquet(path, ["record_id"]).num_rows, len(self.round_records(number))
        return f"{path}: {kept} pairs of {asked} records; {rejected.name} has the reasons of the rest"

    def learned(self, number: int) -> pa.Table | list[Record]:
        """What a round's training learns from: its pairs, or its records where the algorithm is online. Raises: as
        pairs."""
        return list(self.round_records(number)) if self.is_online(number) else self.pairs(number)

    def seed(self, number: int) -> int:
        """Of a round's candidates and training."""
        return (self.config.run.seed * 1_000 + number) % 2**63  # torch's seeds end there

    def summary(self) -> dict[str, Any]:
        """What summary.json holds: before, and each round with its paired changes."""
        evaluations = [self.evaluation(number) for number in (0, *self.rounds)]
        before, rounds = summarize(evaluations)
        for number, metrics in enumerate(rounds, start=1):
            if not self.is_online(number):
                pairs = read_parquet(self.path(number, "pairs.parquet"), ["record_id", "sides"])
                rejected = read_parquet(self.path(number, "rejected.parquet"), REJECTED_SCHEMA.names)
                metrics["pairs"] = pair_statistics(pairs, rejected)
            metrics["training"] = read_json(self.path(number, "training.json"))
            if "agreement" in evaluations[number]:
                metrics["agreement"] = evaluations[number]["agreement"]
            metrics["seconds"] = self.seconds(number)
        before["seconds"] = self.seconds(0)
        settings = asdict(self.config)
        del settings["pretrain"], settings["study"]
        num_records = len(self.records)  # they are made now if every round's pairs were imported
        unusable = read_parquet(self.folder / "rejected.parquet", UNUSABLE_SCHEMA.names).to_pylist()
        data = {"records": num_records, "rejected": count_reasons(unusable), "yes_share": yes_share(self.records)}
        return {"settings": settings, "seed": self.config.run.seed, "data": data, "before": before, "rounds": rounds}

    def is_online(self, number: int) -> bool:
        """Whether a round's algorithm draws its own images as it learns, and needs no pairs."""
        return is_online(self.config.of_round(number).selfplay.algorithm)

    def path(self, number: int, *names: str) -> Path:
        """A file of a round."""
        return self.folder.joinpath(f"round-{number}", *names)

    def is_made(self, number: int, *names: str) -> bool:
        """Whether a round has these files, for all processes."""
        return on_main(lambda: all(self.path(number, name).exists() for name in names))

    def timed(self, number: int, phase: str, work: Callable[[], None]) -> None:
        """Runs a phase and notes its seconds; of a phase that was killed, those since it was resumed."""
        began = time.perf_counter()
        with stage(f"round {number} of {len(self.rounds)}, {phase}" if number else f"before self-play, {phase}"):
            work()
        if is_main():
            seconds = self.seconds(number) | {phase: round(time.perf_counter() - began, 2)}
            write_json(self.path(number, "seconds.json"), seconds)

    def seconds(self, number: int) -> dict[str, float]:
        """Seconds by phase; a kill right after a phase loses its entry, and nothing else."""
        path = self.path(number, "seconds.json")
        return read_json(path) if path.exists() else {}


def import_pairs(config: Config, number: int, path: StrPath, root: StrPath | None = None) -> Path:
    """Gives a round of a run the pairs of a published pair_dpo_data.json, so that training takes them.

    Args:
        config: the run's settings; curation.threshold is what a win's image must score more than.
        number: the round, from 1; the rounds before it must be trained.
        path: see read_published_pairs.
        root: see read_published_pairs.
    Returns: the path of the pairs; rejected.parquet is written beside it.
    Raises: InputError if the file cannot be used, or the round has pairs already.
    """
    check_takes_pairs(config.of_round(number).selfplay.algorithm)
    run = Run(config)
    run.check_round(number)
    target = run.path(number, "pairs.parquet")
    if target.exists():
        raise InputError(f"{target}: round {number} has pairs already; choose another run.name or --round")
    pairs, rejected = read_published_pairs(
        run.model(number - 1), path, root, config.of_round(number).curation.threshold
    )
    write_parquet(run.path(number, "rejected.parquet"), rejected)
    write_parquet(target, pairs)
    return target


def train_on_pairs(config: Config, path: StrPath, folder: StrPath, root: StrPath | None = None) -> Path:
    """Trains a model on a file of pairs, resuming an earlier call of the same settings and pairs.

    Args:
        config: model and train are used, run.seed, and for a published file curation.threshold.
        path: pairs.parquet of any run, or a published pair_dpo_data.json, whose images are encoded.
        folder: receives config.toml, train/ as train_pairs fills it, training.json with the means over the last tenth
            of the steps, and the trained model/.
        root: the folder that a published file's image paths start from; None is the file's own.
    Returns: the path of the trained model.
    Raises: InputError if the file cannot be used, a pair does not fit the model, or the folder holds results of other
        settings, weights or pairs.
    """
    check_training(config)
    check_takes_pairs(config.selfplay.algorithm)
    folder, path = Path(folder), Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give pairs.parquet of a run or a published pair_dpo_data.json")
    pairs = read_pairs(path) if path.suffix == ".parquet" else None
    if any(folder.glob("round-*")):
        raise InputError(f"{folder}: holds a run of self-play; choose another {_ELSEWHERE}")
    with contextlib.ExitStack() as held:

        def claim() -> None:
            held.enter_context(claim_folder(folder, config, _ELSEWHERE, changed_training_settings))

        on_main(claim)
        model, pairs = _open(config, path, root, pairs)
        origin = {"pairs": _digest(pairs), "model": model_digest(model)}
        reasons = {
            "pairs": f"other pairs than {path} holds now",
            "model": f"other weights than {config.model.name!r} holds now",
        }
        on_main(lambda: check_origin(folder, origin, reasons, _ELSEWHERE))
        if not on_main(lambda: (folder / "model").exists() and (folder / "training.json").exists()):
            options = {"seed": config.run.seed, "folder": folder / "train", "algorithm": config.selfplay.algorithm}
            save_trained(model, train_checked_pairs(model, pairs, config.train, **options), folder)
    return folder / "model"


def save_trained(model: Model, means: dict[str, float], folder: Path) -> None:
    """The first process writes a training's folder/training.json and folder/model."""

    def save() -> None:
        write_json(folder / "training.json", means)
        with atomic_folder(folder / "model") as temporary:
            model.save(temporary)

    on_main(save)


def _open(config: Config, path: Path, root: StrPath | None, pairs: pa.Table | None) -> tuple[Model, pa.Table]:
    """The model, and the pairs, which fit it; None are still to be read from a published file."""
    # A step of 2e-5 is lost in the 8 bits of bf16.
    model = open_model(replace(config.model, dtype="float32"))
    check_is_saved_whole(model, config.model.name)
    if pairs is None:
        pairs, rejected = read_published_pairs(model, path, root, config.curation.threshold)
        if len(rejected):
            _LOGGER.info("%s: left out %s", path, describe_rejected(rejected.to_pylist()[:: len(SIDES)]))
    try:
        check_pairs(pairs, model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return model, pairs


def _digest(pairs: pa.Table) -> str:
    """A fingerprint of all columns, wherever the file lies and however it is stored."""
    digest = hashlib.blake2b(digest_size=16)
    for row in each_row(pairs):
        image = row.pop("record_image", None)  # which older files do not have
        digest.update(json.dumps(row).encode() + (image or b""))
    return digest.hexdigest()


def claim_folder(
    folder: Path,
    config: Config,
    elsewhere: str,
    changed: Callable[[Config, Config], list[str]] = all_changed_settings,
) -> TextIO:
    """Makes a folder this process's own, writes config.toml into it, and removes what a killed process left.

    Args:
        folder: made if need be.
        config: the settings.
        elsewhere: what the user changes to work in another folder, for messages.
        changed: names the settings that may not differ, given those in the folder, which has results, and these.
    Returns: the open lock file; the system frees it when it is closed or this process ends, however it ends.
    Raises: InputError if another process is at work in it, or it holds results of other settings.
    """
    try:
        lock = _lock(make_folder(folder) / ".lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Busy(
            f"{folder}: another process is at work on this run; wait for it or choose another {elsewhere}"
        ) from error
    _check_settings(folder, config, elsewhere, changed)
    write_text(folder / "config.toml", to_toml(config))
    remove_leftovers(folder)
    return lock


def _check_settings(
    folder: Path, config: Config, elsewhere: str, changed: Callable[[Config, Config], list[str]]
) -> None:
    """Raises InputError if the folder holds results of other settings."""
    settings = folder / "config.toml"
    if settings.exists() and any(path for pattern in _RESULTS for path in folder.glob(pattern)):
        if names := changed(saved := load_config(settings), config):
            raise InputError(
                f"{settings}: the run has other settings ({', '.join(names)}); "
                f"{describe_way_out(folder, names, elsewhere)}"
            )
        if names := all_changed_settings(saved, config):
            _LOGGER.info("%s: settings changed, with which nothing was made yet: %s", settings, ", ".join(names))


def _lock(path: Path, how: int) -> TextIO:
    """The file, locked. Raises: BlockingIOError if another has it and how says not to wait."""
    try:
        lock = path.open("w")
    except OSError as error:
        raise write_problem(path, error) or error from error
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        lock.close()
        raise
    return lock


def check_origin(
    folder: Path, origin: dict[str, str], reasons: dict[str, str], elsewhere: str, file: str = "origin.json"
) -> None:
    """Writes folder/file, or raises if that file records other weights or pairs.

    Args:
        folder: of the run.
        origin: what it would begin with now.
        reasons: for each key that must be as it was, what another value means, for messages.
        elsewhere: as in claim_folder.
        file: its name.
    Raises: InputError if a value is another one.
    """
    path = folder / file
    if not path.exists():
        write_json(path, origin)
    began = read_json(path)
    if not isinstance(began, dict):
        raise damaged(path, "origin", ValueError("it is no object"))
    for key, reason in reasons.items():
        if began.get(key) != origin[key]:
            raise InputError(
                f"{path}: the run began with {reason}; choose another {elsewhere}, or delete {folder} to start over"
            )


def check_is_saved_whole(model: Model, name: str) -> None:
    """Raise InputError if a round of self-play could not open what the last one saved."""
    if not model.is_saved_whole:
        raise InputError(
            f"{name}: sees images through a vision encoder that is saved with none of its rounds; choose a checkpoint "
            "without it, such as showlab/show-o-512x512"
        )


def export_model(source: StrPath, folder: StrPath, dtype: torch.dtype | None = None, family: str = "auto") -> None:
    """Writes a model in its family's published layout, all at once.

    Args:
        source: a run's folder, whose last trained round is taken, or what load_model opens.
        folder: where to; a new or an empty one.
        dtype: of the weights; None keeps theirs.
        family: see load_model; of a run its own.
    Raises: InputError if there is no such model, its family has no published layout, or the folder holds anything.
    """
    _check_empty(folder)
    model = load_trained(source, family)
    if not model.is_published:
        raise InputError(f"{source}: its family has no published layout; its folder is what load_model opens")
    with atomic_folder(folder) as temporary:
        model.save(temporary, dtype)


def merge_trained(sources: Sequence[StrPath], folder: StrPath, family: str = "auto") -> None:
    """Writes the mean of several models' weights as a model, all at once.

    Args:
        sources: two or more, trained from one start; as load_trained takes them.
        folder: where to; a new or an empty one.
        family: see load_model; of runs their own.
    Raises: InputError as load_trained and merge_models do, or if there are fewer than two or the folder holds anything.
    """
    if len(sources) < 2:
        raise InputError(f"merge: expected two models or more, got {len(sources)}; name those whose mean is wanted")
    _check_empty(folder)
    model = load_trained(sources[0], family)
    merge_models(model, (load_trained(source, family) for source in sources[1:]))
    with atomic_folder(folder) as temporary:
        model.save(temporary)


def load_trained(source: StrPath, family: str = "auto") -> Model:
    """The model of a run's last trained round, or what load_model opens.

    Args:
        source: a run's folder, or a name for load_model.
        family: see load_model; of a run its own.
    Raises: InputError if there is no such model, or no round of the run is trained yet.
    """
    rounds = trained_rounds(source)
    is_run = (Path(source) / "config.toml").is_file()
    if is_run and not rounds:
        raise InputError(f"{source}: no round of this run is trained yet; run it first, or give a model")
    if is_run:
        family = load_config(Path(source) / "config.toml").model.family
    return load_model(rounds[-1] if rounds else source, family=family)


def _check_empty(folder: StrPath) -> None:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something already; choose another folder, or remove it")
