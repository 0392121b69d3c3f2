"""A run's folder: what exists in it, and which settings something in it was made with."""

from hermesflow.runs.run import (
    Run,
    check_origin,
    claim_folder,
    export_model,
    import_pairs,
    merge_trained,
    save_trained,
    train_on_pairs,
)
from hermesflow.runs.samples import send_round

__all__ = [
    "Run",
    "check_origin",
    "claim_folder",
    "export_model",
    "import_pairs",
    "merge_trained",
    "save_trained",
    "send_round",
    "train_on_pairs",
]
