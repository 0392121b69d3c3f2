"""The seam of evaluations: what a measurement gives, and evaluate, which runs the one that the settings name.

An evaluation is one file, and one line in EVALUATIONS of runtime/registry.py. It gives a row for each record; metrics,
intervals, paired changes, tables and the report come from the rows alone (metrics.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from hermesflow.config import EvalConfig
from hermesflow.data.records import Record
from hermesflow.evaluation.metrics import check_rows, measure
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError, reason_of
from hermesflow.runtime.registry import EVALUATIONS, resolve

Parts = Iterable[tuple[Sequence[Record], pa.Table, pa.Table]]
"""(records, their candidates, the pairs made of them), one part at a time in memory."""


class Evaluation:
    """One measurement; a subclass says what it measures."""

    known_sources: tuple[str, ...] = ()
    """Values of data.source whose truth it knows, so that it can judge their candidates."""

    def measure(self, model: Model, config: EvalConfig) -> list[dict[str, Any]]:
        """Measures a model.

        Args:
            model: the model.
            config: how many, and how images are drawn; all draws are pure functions of it, so that two models are
                compared on the same ones.
        Returns: a row for each record, the same records for every model: {"id": name, "scores": {metric: [right,
            asked]}}; a metric is the sum of the one over the sum of the other, "a/b" nests it. More keys may stand
            beside them. All is ready for JSON.
        Raises: InputError on a model that cannot be measured so.
        """
        raise NotImplementedError(f"{type(self).__name__}: measures nothing; define measure")

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
    """Measures a model as the settings say.

    Args:
        model: the model.
        config: eval.suite names the evaluation.
    Returns: {"settings", "metrics", "records"}, ready for JSON; see metrics.measure, and the evaluation for its rows.
    Raises: InputError on an evaluation that cannot be had, or a model that it cannot measure.
    """
    suite = find_evaluation(config)
    if ":" not in config.suite:
        rows, settings = suite.measure(model, config), suite.settings(model, config)
        return {"settings": settings, "metrics": measure(rows), "records": rows}
    try:
        rows, settings = suite.measure(model, config), suite.settings(model, config)
        check_rows(rows)
        json.dumps([rows, settings], ensure_ascii=False, allow_nan=False).encode()
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"eval.suite {config.suite}: {error}") from error
    except (Exception, SystemExit) as error:  # code of the user's may raise anything
        raise InputError(
            f"eval.suite {config.suite}: raised {type(error).__name__} ({reason_of(error)}); correct it "
            "(HERMESFLOW_DEBUG=1 shows where)"
        ) from error
    return {"settings": settings, "metrics": measure(rows), "records": rows}


def find_evaluation(config: EvalConfig) -> Evaluation:
    """The evaluation that the settings name. Raises: InputError if there is none, or it is none."""
    suite = resolve(EVALUATIONS, config.measures, "eval.suite", ("measure", "settings", "known_sources"))
    if not isinstance(suite, Evaluation) or not isinstance(suite.known_sources, tuple):
        raise InputError(f"eval.suite {config.suite}: expected an Evaluation whose known_sources are a tuple; mend it")
    return suite
