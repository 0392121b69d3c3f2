"""Unified models: one file a family, and what they share."""

from hermesflow.models.family import load_model, open_model
from hermesflow.models.model import Model

__all__ = ["Model", "load_model", "open_model"]
