"""The drop-in for the published code: accelerate(model), restore(model), and fast functions for code of one's own.

The names below load on first use. Pickles of accelerated models name the two classes here.
"""

import importlib

_EXPORTS = ("METHODS", "AcceleratedMethod", "_Acceleration", "accelerate", "restore")


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hermesflow.drop_in' has no attribute {name!r}")
    return getattr(importlib.import_module("hermesflow.drop_in.acceleration"), name)
