"""Runs the arms of a study and keeps what they measured.

    runs/NAME/  config.toml  study.jsonl  index.html
      ARM-seed-N/  a run of self-play (see hermesflow.selfplay), evaluated after its last round alone

A study that was killed resumes: an arm that has its line is done, another resumes its run. Within a
seed the arms share what would come out equal: records, and the pairs that the model chooses before it is trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from hermesflow.benchmarks.lines import Line, read_objects, write_lines
from hermesflow.benchmarks.measuring import run_facts
from hermesflow.benchmarks.study.arms import ARMS, arm_config, comes_from
from hermesflow.config import STUDY_ARMS, Config, ConfigError, ModelConfig
from hermesflow.evaluation.builtin import sampler_name
from hermesflow.evaluation.evaluation import evaluate
from hermesflow.evaluation.metrics import measure, right_of_asked
from hermesflow.models import Model, open_model
from hermesflow.models.merging import merge_models
from hermesflow.models.model import model_digest
from hermesflow.report.tables import LABELS, format_value
from hermesflow.runs import Run, check_origin, claim_folder
from hermesflow.runtime.distributed import local_device
from hermesflow.runtime.files import InputError, atomic_write
from hermesflow.selfplay import play_round
from hermesflow.training import check_training

BASE, PAIR_DPO = "base", STUDY_ARMS[0]
SELF_PLAY = PAIR_DPO, "grpo", "merged"
"""The arms that the others are held against."""
COUNTS = ("right", "asked")
"""By metric, a number for each record: what was right, of how many. A metric is named by its path in an evaluation's
metrics, such as "samplers 4/0.7 generation_strict"."""
_FACTS = ("device", "torch", "commit", "date")
_ADDED = (
    ("model", "family", "auto"), ("eval", "suite", "builtin"), ("selfplay", "algorithm", "pair-dpo"),
    ("curation", "win_image", "best"), ("curation", "lose_caption", "worst"),
    ("model", "image_size", 0), ("model", "judge", ""), ("model", "answer_masks", 0),
    ("train", "generation_beta", 0.0), ("train", "understanding_beta", 0.0),
    ("curation", "top_k", -1), ("curation", "top_p", -1.0), ("eval", "top_k", -1), ("eval", "top_p", -1.0),
    ("eval", "data", ""), ("eval", "questions", ""), ("eval", "root", ""), ("eval", "judge", "self"),
)  # fmt: skip
"""Settings that older lines do not have: they count where they are not the default, so that those lines still fit."""


def run_study(config: Config, console: Console) -> list[Line]:
    """Measures the model before self-play and after each arm of each seed, resuming an earlier call.

    Args:
        config: the settings; config.study says what is run, config.run names the folder.
        console: receives a line for each measurement.
    Returns: the lines of study.jsonl: {"arm", "seed", "rounds", COUNTS, "metrics", "settings", "seconds", "device",
        "torch", "commit", "date"}; the first is of the base. The others lack "asked", which is the same for all.
    Raises: InputError if the folder holds results of other settings or weights or cannot be written, the settings leave
        an arm nothing to train, or an arm keeps no pair.
    """
    check_training(config)
    _check_arms(config)
    path, guard = config.run_folder / "study.jsonl", threading.Lock()
    with claim_folder(config.run_folder, config, "run.name"):
        lines = read_study(path) if path.exists() else []
        _check_settings(path, lines, config)
        model = open_model(config.model)
        reasons = {"model": f"other weights than {config.model.name!r} holds now"}
        check_origin(config.run_folder, {"model": model_digest(model)}, reasons, "run.name")
        facts = run_facts(torch.device(local_device(config.model.device)))

        def add(line: Line) -> None:
            with guard:
                lines.append(line | {name: facts[name] for name in _FACTS})
                write_lines(path, lines)
                console.print(_describe_line(line), highlight=False, markup=False, soft_wrap=True)

        if not lines:
            add(_measure_base(model, config))
        for arm in config.study.arms:
            if ARMS[arm].best_of:
                _add_untrained(model, config, arm, lines, add)
        del model  # the arms open it for themselves
        done = {(line["arm"], line["seed"]) for line in lines}
        missing = [[(arm, seed) for arm in config.study.arms if (arm, seed) not in done] for seed in config.study.seeds]
        _measure_arms(config, [jobs for jobs in missing if jobs], add)
    return lines


def read_study(path: Path) -> list[Line]:
    """The lines that run_study wrote.

    Args:
        path: study.jsonl, or a copy.
    Raises: InputError if the file is missing, damaged or not of a study.
    """
    lines = read_objects(path, ("arm", "seed", "rounds", "right", "metrics", "settings", "seconds"), "a study")
    keys = [(line["arm"], line["seed"]) for line in lines]
    named = all(arm in list(ARMS) and isinstance(seed, int) for arm, seed in keys[1:])
    if not keys or keys[0] != (BASE, None) or not named or "asked" not in lines[0]:
        raise InputError(f"{path}: is not of a study: expected a line of {BASE}, then lines of {', '.join(ARMS)}")
    if isinstance(lines[0]["right"], list):
        raise InputError(
            f"{path}: was measured before balanced questions were asked; choose another run.name, or measure again"
        )
    settings: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not all(map(_are_counts, (line["right"], line.get("asked", line["right"])))):
            raise InputError(f"{path}: line {number} is damaged: expected lists of counts; remove it and run again")
        if {name: len(counts) for name, counts in line["right"].items()} != {
            name: len(counts) for name, counts in lines[0]["asked"].items()
        }:
            raise InputError(f"{path}: line {number} measures other records than line 1; remove it and run again")
        if keys.index(keys[number - 1]) < number - 1:
            raise InputError(f"{path}: line {number} repeats an arm and seed; remove one of the two")
        if settings.setdefault(line["arm"], line["settings"]) != line["settings"]:
            raise InputError(f"{path}: line {number} was measured under other settings than its arm's first; remove it")
    return lines


def _are_counts(counts: Any) -> bool:
    lists = list(counts.values()) if isinstance(counts, dict) else [None]
    return all(isinstance(of_name, list) and all(type(count) is int for count in of_name) for of_name in lists)


def run_arm(config: Config, arm: str, seed: int) -> Line:
    """Trains one arm through all its rounds, and measures the model that comes out.

    Args:
        config: the study's settings.
        arm: a name in ARMS. The seed's pair-dpo must be done before it, and so must the arms that it comes from.
        seed: of the run.
    Returns: its line; see run_study.
    Raises: InputError if the arm's run has other settings or keeps no pair, or what it shares is missing.
    """
    if ARMS[arm].mean_of:
        return _measure_mean(config, arm, seed)
    began, of_arm = time.perf_counter(), arm_config(config, arm, seed)
    run, rounds = Run(replace(of_arm, model=_start(config, arm, seed))), of_arm.selfplay.num_rounds
    source = arm_config(config, PAIR_DPO, seed).run_folder
    # Where pair-dpo's run was removed since, an arm makes the same for itself, unless it cannot.
    if arm != PAIR_DPO and (ARMS[arm].same_pairs or source.exists()) and of_arm.data == config.data:
        shares_pairs = of_arm.curation == config.curation and not run.is_online(1)
        num_shared = rounds if ARMS[arm].same_pairs else int(shares_pairs)
        _share(source, run.folder, num_shared)
    for number in range(1, rounds + 1):
        play_round(run, number)
    result = evaluate(run.model(rounds), of_arm.drawn_by(of_arm.eval))
    if arm != PAIR_DPO:  # of which candidates may be looked at later
        for folder in run.folder.glob("round-*/candidates"):
            shutil.rmtree(folder)
    return _line(arm, seed, rounds, result, of_arm, began) | {"settings": _arm_digest(config, arm, seed)}


def _measure_mean(config: Config, arm: str, seed: int) -> Line:
    """The line of an arm that takes the mean of others; the model itself is not kept."""
    began, of_arm = time.perf_counter(), arm_config(config, arm, seed)
    first, *others = (_start_of(config, arm, before, seed) for before in ARMS[arm].mean_of)
    model = open_model(first)
    merge_models(model, map(open_model, others))
    result = evaluate(model, of_arm.drawn_by(of_arm.eval))
    return _line(arm, seed, 0, result, of_arm, began) | {"settings": _arm_digest(config, arm, seed)}


def _start(config: Config, arm: str, seed: int) -> ModelConfig:
    """The model that an arm starts from."""
    return _start_of(config, arm, ARMS[arm].after, seed) if ARMS[arm].after else config.model


def _start_of(config: Config, arm: str, before: str, seed: int) -> ModelConfig:
    """The model that another arm ended with."""
    of_before = arm_config(config, before, seed)
    folder = of_before.run_folder / f"round-{of_before.selfplay.num_rounds}" / "model"
    if not folder.exists():
        raise InputError(
            f"{folder}: is missing, and {arm} starts from it; remove the line of {before} and seed {seed} from "
            "study.jsonl, so that it is made again"
        )
    return replace(config.model, name=str(folder))


def _line(arm: str, seed: int, rounds: int, result: dict[str, Any], config: Config, began: float) -> Line:
    """An arm's; the base's line has what was asked."""
    line = {"arm": arm, "seed": seed, "rounds": rounds} | _measured(result, config)
    del line["asked"]
    return line | {"seconds": round(time.perf_counter() - began, 1)}


def _add_untrained(model: Model, config: Config, arm: str, lines: Sequence[Line], add: Callable[[Line], None]) -> None:
    """Adds an arm that is not trained: measured once, it is the same for every seed."""
    of_arm = [line for line in lines if line["arm"] == arm]
    missing = [seed for seed in config.study.seeds if seed not in {line["seed"] for line in of_arm}]
    if missing and not of_arm:
        began = time.perf_counter()
        of_arm = [_line(arm, missing[0], 0, best_of(model, config, ARMS[arm].best_of), config, began)]
    for seed in missing:
        add(of_arm[0] | {"seed": seed})


def best_of(model: Model, config: Config, count: int) -> dict[str, Any]:
    """An evaluation where each image is the one of `count` that the model itself scores highest, drawn with seeds of
    their own."""
    wide = replace(config.drawn_by(config.eval), images_per_prompt=count * config.eval.images_per_prompt)
    result = evaluate(model, wide)
    for row in result["records"]:
        for of_sampler in row["samplers"].values():
            groups = np.array(of_sampler["scores"]).reshape(-1, count)
            chosen = groups.argmax(1) + count * np.arange(len(groups))
            for name in ("drawn", "scores"):
                of_sampler[name] = [of_sampler[name][index] for index in chosen]
        if row["drawn"] is not None:
            row["drawn"] = row["samplers"][sampler_name(model, model.sampling_of(wide))]["drawn"]
    return result | {"metrics": measure(result["records"])}


def settings_digest(config: Config) -> str:
    """A fingerprint of the settings that a measurement depends on.

    Where a run lies, on which device, and how a study is spread do not count; [drawing] shows in curation and eval.
    """
    values = asdict(replace(config, curation=config.drawn_by(config.curation), eval=config.drawn_by(config.eval)))
    del values["run"], values["pretrain"], values["study"], values["drawing"], values["model"]["device"]
    if not values["round"]:
        del values["round"]  # which older lines do not have
    for name in ("grpo", "own_drawings"):
        if config.selfplay.algorithm != name.replace("_", "-"):
            del values[name]
    for section, name, default in _ADDED:
        if values[section][name] == default:
            del values[section][name]
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def _arm_digest(config: Config, arm: str, seed: int) -> str:
    """A fingerprint of an arm's settings and of those of the arms that it comes from."""
    if arm == BASE:
        return settings_digest(config)
    before = "".join(f"{_arm_digest(config, name, seed)}+" for name in comes_from(arm))
    return before + settings_digest(arm_config(config, arm, seed))


def _measure_base(model: Model, config: Config) -> Line:
    began = time.perf_counter()
    result = evaluate(model, config.drawn_by(config.eval))
    seconds = round(time.perf_counter() - began, 1)
    return {"arm": BASE, "seed": None, "rounds": 0} | _measured(result, config) | {"seconds": seconds}


def _measured(result: dict[str, Any], config: Config) -> Line:
    """What a line keeps of an evaluation."""
    rows = [right_of_asked(row) for row in result["records"]]
    paths = [path for path in dict.fromkeys(path for row in rows for path in row) if not path[0].startswith("caption")]
    counts = {
        name: {" ".join(path): [int(row.get(path, (0, 0))[index]) for row in rows] for path in paths}
        for index, name in enumerate(COUNTS)
    }
    metrics = {name: result["metrics"][name] for name in LABELS}
    return counts | {"metrics": metrics, "settings": settings_digest(config)}


def _measure_arms(config: Config, jobs: Sequence[Sequence[tuple[str, int]]], add: Callable[[Line], None]) -> None:
    """Adds the line of each (arm, seed); those of one seed in their order, several seeds at once."""
    workers = min(config.study.workers, len(jobs))
    if workers <= 1:
        for of_seed in jobs:
            for arm, seed in of_seed:
                add(run_arm(config, arm, seed))
        return
    num_threads, stopped = max(1, torch.get_num_threads() // workers), threading.Event()
    # A thread for each worker follows one seed, and only this process writes.
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (num_threads,)) as processes,
        ThreadPoolExecutor(workers) as followers,
    ):

        def follow(of_seed: Iterable[tuple[str, int]]) -> None:
            try:
                for arm, seed in of_seed:
                    if not stopped.is_set():
                        add(processes.submit(run_arm, config, arm, seed).result())
            except BaseException:
                stopped.set()  # the other seeds end with the arm that they are at
                raise

        try:
            for _ in followers.map(follow, jobs):
                pass
        except BaseException:
            stopped.set()  # an interrupt reaches this thread alone
            raise


def _start_worker(num_threads: int) -> None:
    torch.set_num_threads(num_threads)

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)  # what was being written is under a temporary name

    threading.Thread(target=end_with_parent, daemon=True).start()


def _share(source: Path, folder: Path, num_rounds: int) -> None:
    """Gives a run the records of another, and the pairs of its first rounds, so that they are not made again."""
    names = ["records.parquet", "rejected.parquet"]
    names += [f"round-{number}/{name}.parquet" for number in range(1, num_rounds + 1) for name in ("rejected", "pairs")]
    for name in names:
        if (folder / name).exists():
            continue
        if not (source / name).exists():
            raise InputError(f"{source / name}: is missing, and {folder.name} shares it; choose another run.name")
        with atomic_write(folder / name) as temporary:
            try:
                os.link(source / name, temporary)  # results are replaced whole, never changed in place
            except OSError:  # a file system without links
                shutil.copyfile(source / name, temporary)


def _check_arms(config: Config) -> None:
    """Refuses settings that an arm cannot have, before anything is run."""
    for place, arm in enumerate(config.study.arms):
        for before in comes_from(arm):
            if before not in config.study.arms[:place]:
                raise InputError(f"study: {arm} starts from {before}; name {before} before it in study.arms")
        try:
            arm_config(config, arm, config.study.seeds[0])
        except ConfigError as error:
            raise InputError(f"study: {arm} cannot have these settings: {error}; leave it out of study.arms") from error


def _check_settings(path: Path, lines: Sequence[Line], config: Config) -> None:
    """Refuses lines that were measured under other settings."""
    for line in lines:
        if line["settings"] != _arm_digest(config, line["arm"], line["seed"]):
            raise InputError(
                f"{path}: {line['arm']} was measured under other settings; choose another run.name, or delete "
                f"{path.parent} to start over"
            )


def _describe_line(line: Line) -> str:
    names = ("understanding", "generation", "generation_strict", "gap")
    values = ", ".join(f"{LABELS[name]} {format_value(line['metrics'][name])}" for name in names)
    which = "before self-play" if line["arm"] == BASE else f"seed {line['seed']}, {line['arm']}"
    return f"{which}: {values} (%), {line['seconds']:.0f} s"
