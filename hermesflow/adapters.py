"""hermesflow.adapters.load_adapter, which lives in hermesflow/models/lora.py."""

from hermesflow.models.lora import Adapters, load_adapter

__all__ = ["Adapters", "load_adapter"]
