"""HermesFlow: narrow the gap between what a unified multimodal model understands and what it can draw.

The names below load on first use, so that `import hermesflow.kernels` does not load the whole library.
"""

import importlib
import os
from typing import TYPE_CHECKING

from hermesflow.runtime.editable import list_folders_beside

if TYPE_CHECKING:  # what editors and type checkers see
    from hermesflow.config import Config as Config
    from hermesflow.config import CurationConfig as CurationConfig
    from hermesflow.config import EvalConfig as EvalConfig
    from hermesflow.config import TrainConfig as TrainConfig
    from hermesflow.config import load_config as load_config
    from hermesflow.curation import curate as curate
    from hermesflow.data.pairs import make_pairs as make_pairs
    from hermesflow.data.pairs import read_pairs as read_pairs
    from hermesflow.data.sources import read_records as read_records
    from hermesflow.drop_in.acceleration import accelerate as accelerate
    from hermesflow.drop_in.acceleration import restore as restore
    from hermesflow.engine.decoders.masked import ImageSamplingParams as ImageSamplingParams
    from hermesflow.engine.decoders.text import SamplingParams as SamplingParams
    from hermesflow.engine.engine import Engine as Engine
    from hermesflow.evaluation.evaluation import evaluate as evaluate
    from hermesflow.models import Model as Model
    from hermesflow.models import load_model as load_model
    from hermesflow.models.merging import merge_models as merge_models
    from hermesflow.selfplay import run_selfplay as run_selfplay
    from hermesflow.training import train_pairs as train_pairs
    from hermesflow.training import train_records as train_records

__version__ = "0.1.0"

if "OMP_WAIT_POLICY" not in os.environ:
    # A thread that waits for others looks 10,000 times and then sleeps. OpenMP's 300,000 gain nothing on an idle
    # machine, and where other processes want the cores it takes the very core that it waits for. 12 training steps on
    # two cores: 14 s either way; beside two busy processes 28 s, by the default 163 s. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

list_folders_beside(__path__)

_EXPORTS = {
    "Config": "hermesflow.config",
    "CurationConfig": "hermesflow.config",
    "Engine": "hermesflow.engine.engine",
    "EvalConfig": "hermesflow.config",
    "ImageSamplingParams": "hermesflow.engine.decoders.masked",
    "Model": "hermesflow.models",
    "SamplingParams": "hermesflow.engine.decoders.text",
    "TrainConfig": "hermesflow.config",
    "accelerate": "hermesflow.drop_in.acceleration",
    "curate": "hermesflow.curation",
    "evaluate": "hermesflow.evaluation.evaluation",
    "load_config": "hermesflow.config",
    "load_model": "hermesflow.models",
    "make_pairs": "hermesflow.data.pairs",
    "merge_models": "hermesflow.models.merging",
    "read_pairs": "hermesflow.data.pairs",
    "read_records": "hermesflow.data.sources",
    "restore": "hermesflow.drop_in.acceleration",
    "run_selfplay": "hermesflow.selfplay",
    "train_pairs": "hermesflow.training",
    "train_records": "hermesflow.training",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hermesflow' has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
