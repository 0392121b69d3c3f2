"""What the tests of the benchmarks share."""

import pytest


@pytest.fixture(autouse=True)
def all_in_one_thread(one_thread):
    """Of every test here."""
