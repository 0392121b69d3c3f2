"""HermesFlow: narrow the gap between what a unified multimodal model understands and what it can draw.

The names below load on first use, so that `import hermesflow.kernels` does not load the whole library.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "Engine": "hermesflow.engine.engine",
    "accelerate": "hermesflow.drop_in.acceleration",
    "load_model": "hermesflow.models",
    "read_pairs": "hermesflow.data.pairs",
    "restore": "hermesflow.drop_in.acceleration",
    "train_pairs": "hermesflow.training",
}

__all__ = ["Engine", "__version__", "accelerate", "load_model", "read_pairs", "restore", "train_pairs"]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hermesflow' has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
