"""The mean of models' weights."""

import copy

import pytest
import torch

from hermesflow import cli
from hermesflow.config import load_config, to_toml
from hermesflow.models import load_model
from hermesflow.models.merging import merge_models
from hermesflow.runs import merge_trained
from hermesflow.runtime.files import InputError


def moved(seed):
    model, generator = load_model("tiny"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def weights(model):
    return model.transformer.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mean_is_of_float64s(dtype):
    models = [load_model("tiny", dtype=dtype), *(moved(seed) for seed in (1, 2))]
    expected = {name: sum(weights(model)[name].double() for model in models) / 3 for name in weights(models[0])}
    before = [copy.deepcopy(weights(model)) for model in models[1:]]
    assert merge_models(models[0], models[1:]) == 3
    for name, tensor in weights(models[0]).items():
        assert tensor.dtype == dtype
        error = torch.finfo(dtype).eps * expected[name].abs() + 1e-7
        assert torch.all((tensor.double() - expected[name]).abs() <= error)
    for model, kept in zip(models[1:], before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(model).items())


def test_models_are_opened_one_after_another():
    """A generator's models are dropped as soon as they are added."""
    model, opened = load_model("tiny"), []
    alone = copy.deepcopy(weights(model))

    def others():
        for _ in range(3):
            opened.append(1)
            yield load_model("tiny")

    assert merge_models(model, others()) == 4 and len(opened) == 3
    assert all(torch.allclose(tensor, alone[name], atol=1e-7) for name, tensor in weights(model).items())


def test_what_does_not_fit_is_refused():
    model, other = load_model("tiny"), load_model("tiny")
    with torch.no_grad():
        next(other.vq_tokenizer.parameters()).add_(1)
    with pytest.raises(InputError, match="model 2 of the merge has another image tokenizer than the first"):
        merge_models(model, [other])
    other = load_model("tiny")
    other.transformer.blocks = other.transformer.blocks[:-1]
    with pytest.raises(InputError, match="model 3 of the merge is of another family or shape than the first"):
        merge_models(model, [load_model("tiny"), other])


def test_runs_and_models_are_merged_from_the_command(tmp_path, capsys):
    run = tmp_path / "run"
    for number in (2, 10):
        moved(number).save(run / f"round-{number}" / "model")
    (run / "config.toml").write_text(to_toml(load_config(None, [])))
    out = tmp_path / "merged"
    assert cli.main(["merge", "tiny", str(run), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    expected = moved(10)
    merge_models(expected, [load_model("tiny")])
    merged = weights(load_model(str(out)))
    assert all(torch.equal(tensor, merged[name]) for name, tensor in weights(expected).items())
    assert cli.main(["merge", "tiny", str(run), "-o", str(out)]) == 2
    assert "there is something already; choose another folder" in capsys.readouterr().err
    assert cli.main(["merge", "tiny", "-o", str(tmp_path / "one")]) == 2
    assert "expected two models or more, got 1" in capsys.readouterr().err and not (tmp_path / "one").exists()


def test_the_folder_of_a_run_is_no_model(tmp_path):
    for number in (9, 10):
        (tmp_path / f"round-{number}" / "model").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"is the folder of a run; give the model of a round, such as .*round-10/model"
    ):
        load_model(tmp_path)


def test_nothing_is_written_where_a_model_is_missing(tmp_path):
    with pytest.raises(InputError, match="no model"):
        merge_trained(["tiny", str(tmp_path / "none")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
