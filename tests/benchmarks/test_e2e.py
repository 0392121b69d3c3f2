"""The benchmark of whole tasks: its baseline is the engine's truth, its arithmetic, its lines and its profiles."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

from hermesflow import cli
from hermesflow.benchmarks import e2e, lines, measuring, model_work, naive_model
from hermesflow.engine.engine import Engine
from hermesflow.engine.image_decoder import ImageSamplingParams
from hermesflow.engine.sequence_logprob import next_token_targets
from hermesflow.engine.span_tree import SpanTree
from hermesflow.engine.text_decoder import SamplingParams

KINDS = ("sequential", "parallel-gqa-partial-qknorm", "rmsnorm-gated-mqa-tied", "relu2-no-rotary")
PROMPTS = ([5, 9, 7], [11], [])
EXTRA = {"mfu", "items_per_s", "num_rounds", "baseline_rounds", "baseline_scaled"}


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads wait for each other where other processes use the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=KINDS)
def model(request, naive):
    """A random tiny transformer of each kind, and its layout."""
    return naive.tiny_model(request.param), naive.LAYOUT


def codes_of(layout, num_images):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(layout.codebook_size, (num_images, layout.num_image_tokens), generator=generator)


def assert_logits_equal(transformer, hidden, naive_logits, truth):
    """Engine's and naive's errors against fp64 are of one size: at most 4 roundings of fp32 at the logits' scale apart."""
    engine_logits = F.linear(hidden, transformer.head.weight, transformer.head.bias)
    budget = 2 * (naive_logits.double() - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (engine_logits.double() - truth).abs().max() <= budget
    assert (engine_logits - naive_logits).abs().max() <= 2 * budget
