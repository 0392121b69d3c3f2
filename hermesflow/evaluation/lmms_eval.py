"""The door of lmms-eval, which finds it by its entry point: lmms_eval --model hermesflow --model_args model=tiny."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Says which class answers (lmms_model.py)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="hermesflow", simple_class_path="hermesflow.evaluation.lmms_model.LmmsModel")
