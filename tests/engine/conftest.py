"""What the engine's tests share."""

import pytest


@pytest.fixture(scope="session")
def layout(naive):
    """The layout of the naive module's tiny models."""
    return naive.LAYOUT
