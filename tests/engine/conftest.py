"""What the engine's tests share: the naive truth, which lies beside this file and in no package."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def naive():
    """The module naive.py."""
    spec = importlib.util.spec_from_file_location("engine_naive", Path(__file__).with_name("naive.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def layout(naive):
    """The layout of the naive module's tiny models."""
    return naive.LAYOUT
