"""The seam of evaluations: what a measurement gives, and evaluate, which runs the one that the settings name.

An evaluation is one file, and one line in EVALUATIONS of runtime/registry.py. It gives a row for each record; metrics,
intervals, paired changes, tables and the report come from the rows alone (metrics.py). It is measured in parts, which
processes share.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import pyarrow as pa

from hermesflow.config import EvalConfig
from hermesflow.data.records import Record
from hermesflow.evaluation.metrics import check_rows, measure
from hermesflow.models.model import Model, model_digest
from hermesflow.runtime.claims import Claims
from hermesflow.runtime.distributed import gather, rank, world_size
from hermesflow.runtime.files import InputError, StrPath, damaged, make_folder, read_json, reason_of, write_json
from hermesflow.runtime.parts import make_parts
from hermesflow.runtime.progress import track
from hermesflow.runtime.registry import EVALUATIONS, resolve

Rows = list[dict[str, Any]]
"""What was measured, a row a record."""
Parts = Iterable[tuple[Sequence[Record], pa.Table, pa.Table]]
"""(records, their candidates, the pairs made of them), one part at a time in memory."""


class Evaluation:
    """One measurement; a subclass says what it measures, by measure or in parts."""

    known_sources: tuple[str, ...] = ()
    """Values of data.source whose truth it knows, so that it can judge their candidates."""

    def measure(self, model: Model, config: EvalConfig) -> Rows:
        """Measures a model, in one process.

        Args:
            model: the model.
            config: how many, and how images are drawn; all draws are pure functions of it, so that two models are
                compared on the same ones.
        Returns: a row for each record, the same records for every model: {"id": name, "scores": {metric: [right,
            asked]}}; a metric is the sum of the one over the sum of the other, "a/b" nests it. More keys may stand
            beside them. All is ready for JSON.
        Raises: InputError on a model that cannot be measured so.
        """
        return [row for part in self.parts(model, config) for row in part()]

    def parts(self, model: Model, config: EvalConfig) -> Sequence[Callable[[], Rows]]:
        """The same in parts, which several processes share.

        Args:
            model, config: as measure.
        Returns: functions that measure a part each, in the order of its rows. There are as many in every process, and
            what one gives depends on no other.
        Raises: InputError as measure.
        """
        raise NotImplementedError(f"{type(self).__name__}: measures nothing; define measure or parts")

    def settings(self, model: Model, config: EvalConfig) -> dict[str, Any]:
        """Settings of the measurement, saved with its result."""
        return asdict(config)

    def judge_candidates(self, model: Model, parts: Parts) -> dict[str, Any]:
        """How far the scores of a round's candidates can be trusted, for records of known_sources.

        Args:
            model: decodes the images.
            parts: the candidates.
        Returns: numbers for the summary.
        """
        raise NotImplementedError(f"{type(self).__name__}: knows sources, and does not judge their candidates")


def evaluate(model: Model, config: EvalConfig) -> dict[str, Any]:
    """Measures a model as the settings say; processes share the parts, and all have the result.

    Args:
        model: the model.
        config: eval.suite names the evaluation.
    Returns: {"settings", "metrics", "records"}, ready for JSON; see metrics.measure, and the evaluation for its rows.
    Raises: InputError on an evaluation that cannot be had, or a model that it cannot measure.
    """
    parts = _parts(model, config)
    shares = gather([part() for part in track(parts[rank() :: world_size()], "records", "batches")])
    made = [shares[number % len(shares)][number // len(shares)] for number in range(len(parts))]
    return _result(model, config, [row for part in made for row in part])


class Measurement:
    """An evaluation in parts of which each is a file, folder/part-NNNNN.json, so that a killed one resumes."""

    def __init__(self, model: Model, config: EvalConfig, folder: StrPath) -> None:
        """
        Args:
            model: the model.
            config: eval.suite names the evaluation. Do not resume a folder with other settings.
            folder: of the parts; made if need be.
        Raises: InputError as evaluate, or on an unwritable folder.
        """
        self._model, self._config, self._parts = model, config, _parts(model, config)
        self.folder = make_folder(folder)
        self.paths = [self.folder / f"part-{number:05d}.json" for number in range(len(self._parts))]

    @cached_property
    def _digest(self) -> str:
        return model_digest(self._model)

    def share(self, claims: Claims | None = None) -> None:
        """Makes this process's share of the parts.

        Args:
            claims: of a worker, which makes parts beside others until all are there.
        Raises: InputError as make and read.
        """
        for _ in make_parts(self.paths, self.make, "measured records", claims=claims, check=self.read):
            pass

    def make(self, number: int) -> None:
        """Measures a part, and writes its file. Raises: InputError as evaluate, or if it cannot be written."""
        write_json(self.paths[number], {"model": self._digest, "records": self._parts[number]()})

    def read(self, number: int) -> Rows:
        """The rows of a part. Raises: InputError if its file is damaged, or of another model."""
        path = self.paths[number]
        part = read_json(path)
        if not isinstance(part, dict) or part.keys() != {"model", "records"} or not isinstance(part["records"], list):
            raise damaged(path, "evaluation", ValueError("it has no model and records"))
        if part["model"] != self._digest:
            raise InputError(f"{path}: was measured of other weights; delete {self.folder} to measure these")
        return part["records"]

    def result(self) -> dict[str, Any]:
        """What evaluate returns, once all parts are there. Raises: InputError as read and evaluate."""
        rows = [row for number in range(len(self.paths)) for row in self.read(number)]
        try:
            return _result(self._model, self._config, rows)
        except InputError:  # by code of the user's, which is to be corrected
            self.remove()
            raise

    def remove(self) -> None:
        """Removes the parts."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _parts(model: Model, config: EvalConfig) -> list[Callable[[], Rows]]:
    """Those of the evaluation that the settings name; one that measures as a whole is a single part."""
    suite = find_evaluation(config)

    def checked(part: Callable[[], Rows]) -> Callable[[], Rows]:
        def rows() -> Rows:
            with _naming(config):
                return _check(part(), config)

        return rows

    with _naming(config):
        kind = next(kind for kind in type(suite).__mro__ if vars(kind).keys() & {"parts", "measure"})
        parts = suite.parts(model, config) if "parts" in vars(kind) else [lambda: suite.measure(model, config)]
        return [checked(part) for part in parts]


def _result(model: Model, config: EvalConfig, rows: Rows) -> dict[str, Any]:
    suite = find_evaluation(config)
    with _naming(config):
        settings = suite.settings(model, config)
        _check(rows, config, settings)
    return {"settings": settings, "metrics": measure(rows), "records": rows}


def _check(rows: Rows, config: EvalConfig, settings: Any = None) -> Rows:
    """The rows. Raises: ValueError if those of the user's code are none, or cannot be kept."""
    if ":" in config.suite:
        check_rows(rows)
        json.dumps([rows, settings], ensure_ascii=False, allow_nan=False).encode()
    return rows


@contextlib.contextmanager
def _naming(config: EvalConfig) -> Iterator[None]:
    """Errors of the user's code name it, and are InputErrors."""
    if ":" not in config.suite:
        yield
        return
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"eval.suite {config.suite}: {error}") from error
    except (Exception, SystemExit) as error:  # code of the user's may raise anything
        raise InputError(
            f"eval.suite {config.suite}: raised {type(error).__name__} ({reason_of(error)}); correct it "
            "(HERMESFLOW_DEBUG=1 shows where)"
        ) from error


def find_evaluation(config: EvalConfig) -> Evaluation:
    """The evaluation that the settings name. Raises: InputError if there is none, or it is none."""
    suite = resolve(EVALUATIONS, config.measures, "eval.suite", ("measure", "settings", "known_sources"))
    if not isinstance(suite, Evaluation) or not isinstance(suite.known_sources, tuple):
        raise InputError(f"eval.suite {config.suite}: expected an Evaluation whose known_sources are a tuple; mend it")
    return suite
