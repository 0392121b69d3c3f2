"""Shared by the tests of accelerate(), whose modules make the model: with it and without it, and what it warned of."""

import logging

import pytest

import hermesflow


@pytest.fixture
def model(make_model):
    """A model whose methods are the class's own."""
    return make_model()


@pytest.fixture
def fast(make_model):
    """The same model, accelerated."""
    return hermesflow.accelerate(make_model())


@pytest.fixture(autouse=True)
def reasons(caplog):
    """Takes the warnings so far, each of a call that went to the original method; none may be left at the end."""
    caplog.set_level(logging.WARNING, "hermesflow.drop_in")

    def take():
        messages = [record.getMessage() for record in caplog.records if record.name == "hermesflow.drop_in"]
        caplog.clear()
        return messages

    yield take
    # The records of this phase would be those of the teardown.
    assert [record for record in caplog.get_records("call") if record.name == "hermesflow.drop_in"] == []
