"""A round's candidates as tasks of Ray, one a part: Ray gives a task again where its process or its machine dies.

The driver holds the run's lock for all of its tasks, and makes the records that are not there yet.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from hermesflow.curation import Candidates, part_paths
from hermesflow.runs.run import Run
from hermesflow.runtime.files import InputError, reason_of
from hermesflow.runtime.progress import stage, track

_MAX_RETRIES = 10
"""Of a part; its machine may be taken away several times."""


def share_by_ray(run: Run, number: int) -> None:
    """Makes a round's candidates that are not there yet, on the cluster of RAY_ADDRESS, or one of this machine.

    Args:
        run: a worker's; all nodes see its folder, and the model's, under the paths that this process sees.
        number: of the round.
    Raises: InputError as Candidates and Run.needs_candidates, or if Ray is not there or gives up.
    """
    if not run.needs_candidates(number):
        return
    ray, device = _import_ray(), run.config.model.device
    if device.startswith("cuda:"):
        raise InputError(f"model.device {device}: all tasks would share it; set it to cuda, and each takes its own")
    config = run.config.of_round(number).curation
    paths = part_paths(run.path(number, "candidates"), len(run.round_records(number)), config)
    missing = [part for part, path in enumerate(paths) if not path.exists()]
    if not missing:
        return
    place, folder = os.getcwd(), os.path.abspath(run.config.run.folder)
    arguments = pickle.dumps(replace(run.config, run=replace(run.config.run, folder=folder))), place, number
    try:
        # Ray puts the working folder on its processes' path, where a checkout's kernels/ would shadow a package.
        with contextlib.chdir(run.folder):
            ray.init(log_to_driver=False)
        try:
            takes_gpu = device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
            # GPU tasks would have a process each, and open the model in it, without max_calls.
            task = ray.remote(num_gpus=int(takes_gpu), max_calls=0, max_retries=_MAX_RETRIES)(_make)
            done = _run(ray, task, arguments, missing, "GPU" if takes_gpu else "CPU")
            with stage(f"round {number}, curation"):
                for _ in track(
                    done, "candidates by Ray", "batches", total=len(paths), completed=len(paths) - len(missing)
                ):
                    pass
        finally:
            ray.shutdown()
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, InputError) else error) from error
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise InputError(f"Ray: {reason_of(error)}; the same command resumes where it stopped") from error


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray: needs the package ray; pip install 'hermesflow[ray]'") from error
    return ray


def _run(ray: Any, task: Any, arguments: tuple, parts: Sequence[int], resource: str) -> Iterator[None]:
    """Yields at each part that is made; as many tasks are given as keep the cluster at work, which may grow."""
    waiting, given = iter(parts), []
    while True:
        most = 2 * max(1, int(ray.cluster_resources().get(resource, 0)))
        given += [task.remote(*arguments, part) for part in islice(waiting, most - len(given))]
        if not given:
            return
        done, given = ray.wait(given)
        for each in done:
            yield ray.get(each)


def _make(config: bytes, place: str, number: int, part: int) -> None:
    """Makes a part, in a process of Ray's."""
    candidates = _open(config, place, number)
    if not candidates.paths[part].exists():
        candidates.make(part)


@functools.lru_cache(maxsize=1)
def _open(config: bytes, place: str, number: int) -> Candidates:
    """The model is opened once in each process."""
    if os.path.isdir(place):  # relative paths, such as a model's, start from the driver's folder
        os.chdir(place)
    run = Run(pickle.loads(config), as_worker=True)
    run.leave()
    return run.candidates(number)
