"""What users import and keep: names that stay where they were, whatever moves; files that older versions wrote."""

import importlib
import json

import numpy as np
import pyarrow as pa
import pytest

from hermesflow.algorithms.packing import PairPacker
from hermesflow.benchmarks.study.runner import settings_digest
from hermesflow.config import CurationConfig, TrainConfig, load_config, to_toml
from hermesflow.curation import _fingerprint
from hermesflow.data.pairs import PAIRS_SCHEMA
from hermesflow.data.records import Question, Record
from hermesflow.kernels import OPS
from hermesflow.models import load_model
from hermesflow.models.family import ASSETS

NAMES = {
    "hermesflow": ("Engine", "accelerate", "load_model", "read_pairs", "restore", "train_pairs"),
    "hermesflow.config": ("TrainConfig", "Config", "load_config", "PAPER_OBJECTIVE"),
    "hermesflow.adapters": ("load_adapter",),
    "hermesflow.functional": (
        "dpo_loss",
        "draw_seeds",
        "gumbel_sample",
        "mask_by_random_topk",
        "selective_log_softmax",
    ),
    "hermesflow.drop_in": ("AcceleratedMethod", "METHODS", "accelerate", "restore"),
    "hermesflow.models": ("Model", "load_model", "open_model"),
    "hermesflow.engine.engine": ("Engine",),
    "hermesflow.engine.span_tree": ("AttentionGroup", "Span", "SpanTree"),
    "hermesflow.engine.image_decoder": ("ImageDecoder", "ImageSamplingParams"),
    "hermesflow.engine.text_decoder": ("SamplingParams", "TextDecoder"),
    "hermesflow.engine.vq_tokenizer": ("VQTokenizer", "VQTokenizerConfig"),
    "hermesflow.engine.token_layout": ("SPECIAL_TOKENS", "TokenLayout"),
    "hermesflow.engine.transformer": ("Transformer", "TransformerConfig"),
    "hermesflow.engine.sequence_logprob": ("next_token_targets", "span_logprobs"),
    **{f"hermesflow.kernels.{op}": (op, f"{op}_reference") for op in OPS},
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_a_name_is_where_it_was(module, name):
    assert getattr(importlib.import_module(module), name) is not None


def test_an_unknown_name_of_the_drop_in_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hermesflow.drop_in' has no attribute 'speed_up'"):
        importlib.import_module("hermesflow.drop_in").speed_up  # noqa: B018


def test_settings_of_an_older_run_are_those_of_today(tmp_path):
    """Its config.toml has no [drawing], and lacks the names that were added since."""
    added = ("family = ", "suite = ", "algorithm = ")
    text = to_toml(load_config(None, ["curation.num_steps=3", "eval.temperature=0.5"]))
    sections = [section for section in text.split("\n\n") if not section.startswith("[drawing]")]
    lines = [line for line in "\n\n".join(sections).splitlines() if not line.startswith(added)]
    (tmp_path / "config.toml").write_text("\n".join(lines))
    assert load_config(tmp_path / "config.toml") == load_config(None, ["curation.num_steps=3", "eval.temperature=0.5"])


def test_a_model_folder_of_before_has_the_built_in_prompts(tmp_path):
    """Its config.json holds neither prompts nor sampling."""
    model = load_model("tiny")
    for path in (ASSETS / "tiny").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["prompts"], config["sampling"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = load_model(str(tmp_path))
    assert (old.prompts, old.sampling) == (model.prompts, model.sampling)


def test_fingerprints_of_older_files_are_those_of_today():
    """Candidates, references and study lines of older versions are found again; a setting that is added must not change
    these while it has its default."""
    model = load_model("tiny")
    asked = Question("is there a circle ?", ("yes", "no"), "yes", "object", "circle")
    record = Record("r0", "a red circle", "colors", (asked,), codes=np.arange(16, dtype=np.int32))
    curation = CurationConfig(num_images=3, num_steps=4)
    assert _fingerprint(model, [record], curation, 7, {}) == "6e2c85a12cb6aa3eaf62cb24c47c3c7f"
    by_code = load_model("tiny-ar")
    assert _fingerprint(by_code, [record], CurationConfig(num_images=3), 7, {}) == "a4f110617e758d397d108e9fcdbe0fc7"

    row = dict.fromkeys(PAIRS_SCHEMA.names) | {"record_id": "r0", "category": "colors", "caption": record.caption}
    row |= {"sides": "both", "record_codes": list(range(16)), "win_codes": list(range(16))}
    row |= {"lose_codes": list(range(16, 32)), "win_caption_ids": [1, 2], "lose_caption_ids": [3]}
    row |= {"questions": [asked.question], "answers": ["yes"], "choices": [["yes", "no"]]}
    train = TrainConfig(masks_per_pair=2, condition_dropout=0.25)
    packer = PairPacker(model, pa.Table.from_pylist([row], PAIRS_SCHEMA), train, 5)
    assert packer.fingerprint() == "cadef39b2fd6ada84b36538e6456ea49"

    assert settings_digest(load_config(None, ["eval.num_steps=3"])) == "af6ddb85f1737d84"
