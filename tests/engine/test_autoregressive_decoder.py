"""Images drawn code by code against the same drawn alone, each code from its whole sequence, without a cache."""

import dataclasses
import logging

import pytest
import torch

from hermesflow.engine import memory_planner
from hermesflow.engine.decoders.autoregressive import AutoregressiveDecoder, CodeSamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.memory_planner import kv_bytes
from hermesflow.engine.token_layout import Ids, Layout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.sampling import sample_rows
from hermesflow.kernels.token_sample import token_sample

BOS, END, ROW_END, BOI, EOI = range(5)


class CausalLayout(Layout):
    """[5 specials | codes, backwards, with a gap | text]; the unconditional prompt is as long as the prompt."""

    vocab_size, codebook_size, num_image_tokens, image_grid = 60, 12, 6, (2, 3)
    image_mode = prefix_mode = "causal"
    before_image, row_end, after_image, eot = (BOI, EOI), (ROW_END,), (EOI,), 59
    text_ids, code_ids = Ids(range(30, 60)), Ids([20 - code - (code > 5) for code in range(12)])

    def text_prompt(self, text_ids):
        return [BOS, *text_ids, END]

    def unguided_prompt(self, text_ids):
        return [BOS, *[END] * len(text_ids), END]

    def image_prefix(self, codes):
        return [BOS, *self.image(codes)]

    def question(self, text_ids):
        return list(text_ids)


LAYOUT = CausalLayout()
PLAIN = CodeSamplingParams(guidance_scale=1.5, temperature=0.8)
PARAMS = {
    "plain": PLAIN,
    "greedy": CodeSamplingParams(guidance_scale=1.5, temperature=0.0),
    "unguided": CodeSamplingParams(guidance_scale=0.0),
    "top-k": CodeSamplingParams(guidance_scale=2.0, top_k=4),
    "top-p": CodeSamplingParams(guidance_scale=0.5, temperature=0.7, top_p=0.6),
}
PROMPTS = [[31, 40, 50], [33], [31, 40, 50], []]
SEEDS = torch.arange(12).view(4, 3) * 7 + 1


@pytest.fixture
def transformer(naive):
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_size": 48, "norm": "rmsnorm"}
    model = Transformer(TransformerConfig(vocab_size=LAYOUT.vocab_size, gated=True, activation="silu", **shape))
    return model.init_weights(torch.Generator().manual_seed(0), std=0.4).eval()


@torch.no_grad()
def draw_alone(naive, transformer, prompt, seed, params, known=None):
    """One image by the rule, and the log-probability of each code."""
    codes, logprobs = [], []
    rows = list(LAYOUT.code_ids)
    for number in range(LAYOUT.num_image_tokens):
        begun = LAYOUT.image([*codes, *[0] * (LAYOUT.num_image_tokens - number)])[: LAYOUT.code_positions[number]]
        logits = []
        for condition in (LAYOUT.text_prompt(prompt), LAYOUT.unguided_prompt(prompt)):
            logits.append(naive.chain_logits(transformer, ([*condition, *begun], "causal"))[-1, rows])
        guidance = params.guidance_scale
        guided = ((1 + guidance) * logits[0] - guidance * logits[1])[None]
        key = RandomKey(torch.tensor([seed]), torch.tensor(number), torch.tensor([0]))
        if params.top_k or params.top_p < 1:
            settings = {name: torch.tensor([float(getattr(params, name))]) for name in ("temperature", "top_p")}
            settings |= {"top_k": torch.tensor([params.top_k]), "min_p": torch.zeros(1)}
            token, logprob = token_sample(guided, **settings, key=key, backend="torch")
        else:
            token, logprob = sample_rows(guided, params.temperature, key)
        is_known = known is not None and known[number] >= 0
        codes.append(int(known[number]) if is_known else int(token))
        logprobs.append(0.0 if is_known else float(logprob))
    return codes, logprobs


def decode(transformer, params, prompts=PROMPTS, seeds=SEEDS, **options):
    with torch.inference_mode():
        return AutoregressiveDecoder(transformer, LAYOUT).generate(prompts, seeds, params, **options)


@pytest.mark.parametrize(
    ("name", "graphs"), [*((name, False) for name in PARAMS), ("plain", True), ("greedy", True), ("unguided", True)]
)
@torch.inference_mode()
def test_images_and_log_probabilities_are_those_drawn_alone(naive, transformer, request, name, graphs):
    params = PARAMS[name]
    if graphs:
        request.getfixturevalue("recorded_graphs")
    decoder = AutoregressiveDecoder(transformer, LAYOUT)
    codes, logprob = decoder._draw(PROMPTS, SEEDS, params, None, 256, iter)
    for row, prompt in enumerate(PROMPTS):
        for image, seed in enumerate(SEEDS[row].tolist()):
            expected, logprobs = draw_alone(naive, transformer, prompt, seed, params)
            assert codes[row, image].tolist() == expected
            torch.testing.assert_close(logprob[row, image], torch.tensor(logprobs), rtol=1e-4, atol=1e-4)
    assert codes.flatten(0, 1).unique(dim=0).shape[0] > (2 if params.temperature == 0 else 8)


@pytest.mark.parametrize("max_sequences", [2, 5, 24])
def test_an_image_is_the_same_in_any_batch(transformer, max_sequences):
    whole = decode(transformer, PLAIN)
    assert torch.equal(decode(transformer, PLAIN, max_sequences=max_sequences), whole)
    assert torch.equal(decode(transformer, PLAIN, PROMPTS[1:2], SEEDS[1:2, 2:]), whole[1:2, 2:])


def test_known_codes_are_kept_and_condition_what_follows(naive, transformer):
    known = torch.tensor([[3, 4, -1, -1, -1, -1], [-1, -1, 5, -1, 0, -1], [11, 0, 1, 2, 3, 4], [-1] * 6])
    codes = decode(transformer, PLAIN, known_codes=known)
    for row, prompt in enumerate(PROMPTS):
        for image, seed in enumerate(SEEDS[row].tolist()):
            expected = draw_alone(naive, transformer, prompt, seed, PLAIN, known[row])[0]
            assert codes[row, image].tolist() == expected
    assert not torch.equal(codes, decode(transformer, PLAIN))


def test_prompts_are_computed_once_and_codes_one_by_one(transformer, monkeypatch):
    counts, forward = [], Transformer.forward

    def counted(self, tree, *args, **kwargs):
        counts.append(len(tree.token_ids))
        return forward(self, tree, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", counted)
    decode(transformer, PLAIN)
    # Three distinct prompts and their unconditional twins, of which the empty prompt's is itself; 24 rows a token,
    # five codes and the end of a row.
    assert counts == [2 * (7 + 5) + 4, *[24] * 6]


@pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
def test_out_of_memory_halves_the_pass(transformer, monkeypatch, caplog, guidance_scale):
    params = dataclasses.replace(PLAIN, guidance_scale=guidance_scale)
    expected, new_cache = decode(transformer, params), Transformer.new_cache

    def small_cache(self, capacity):
        if capacity > 70:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new_cache(self, capacity)

    monkeypatch.setattr(Transformer, "new_cache", small_cache)
    with caplog.at_level(logging.WARNING, "hermesflow.engine.decoders.passes"):
        assert torch.equal(decode(transformer, params), expected)
    assert "sequences in a pass; continuing with" in caplog.text


def test_nan_names_the_image_and_the_code(transformer):
    transformer.embed.weight.data[LAYOUT.code_ids[7]] = float("nan")
    known = torch.tensor([[1, 2, 3, 4, 5, -1], [-1, 7, -1, -1, -1, -1]])
    with pytest.raises(RuntimeError, match="NaN\\) for prompt 1, image 0, code 2; .*embed"):
        decode(transformer, PLAIN, [[31], [33]], SEEDS[:2, :1] * 0 + 5, known_codes=known)


def test_progress_sees_the_codes_of_each_pass(transformer):
    seen = []
    decode(transformer, PLAIN, max_sequences=12, progress=lambda items: seen.append(len(items)) or items)
    assert seen == [6, 6]


def test_an_engine_draws_by_it(transformer):
    engine = Engine(transformer, LAYOUT, image_decoder=AutoregressiveDecoder)
    codes = engine.generate(PROMPTS, num_images=3, seeds=SEEDS, sampling=PLAIN, temperature=0.8)
    assert torch.equal(codes, decode(transformer, PLAIN))


def test_a_grid_of_its_own(transformer):
    """The layout's own grid is no other one; a layout of one grid refuses the rest, whatever is known."""
    assert torch.equal(decode(transformer, dataclasses.replace(PLAIN, grid=(2, 3))), decode(transformer, PLAIN))
    engine, wide = (
        Engine(transformer, LAYOUT, image_decoder=AutoregressiveDecoder),
        dataclasses.replace(PLAIN, grid=(1, 4)),
    )
    for known in (None, torch.full((4, 4), -1)):
        with pytest.raises(ValueError, match="draws images of 2 x 3 codes alone, got a grid of 1 x 4; leave it out"):
            engine.generate(PROMPTS, num_images=3, seeds=SEEDS, sampling=wide, known_codes=known)


def test_ids_that_drawing_looked_up_serve_training_too():
    ids = Ids([5, 3, 9])
    with torch.inference_mode():
        ids.of(torch.tensor([0, 1]))
    head = torch.nn.Linear(2, 10)
    ids.rows(head)[0].sum().backward()
    assert head.weight.grad.sum(1).nonzero()[:, 0].tolist() == [3, 5, 9]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 1e-30),
        ("top_k", -1),
        ("top_p", 1.5),
        ("guidance_scale", float("nan")),
        ("grid", (0, 4)),
    ],
)
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=f"expected {name} (in|of|as )"):
        dataclasses.replace(PLAIN, **{name: value})


def test_masked_images_are_refused(naive, transformer):
    with pytest.raises(ValueError, match="draws causal images, the layout's image_mode is 'full'"):
        AutoregressiveDecoder(transformer, naive.LAYOUT)


@pytest.mark.parametrize("name", ["plain", "unguided"])
def test_a_rollout_is_scored_by_the_law_that_drew_it(transformer, name):
    """To rounding, and differentiable; each code has a step of its own."""
    engine = Engine(transformer, LAYOUT, image_decoder=AutoregressiveDecoder)
    drawn = engine.rollout(PROMPTS, num_images=3, seeds=SEEDS, sampling=PARAMS[name])
    assert torch.equal(drawn.codes, decode(transformer, PARAMS[name]))
    assert torch.equal(drawn.kept_at, torch.arange(6).expand(4, 3, 6)) and torch.equal(
        drawn.drawn[:, :, 0], drawn.codes
    )
    logprob = engine.rollout_logprobs(PROMPTS, drawn, sampling=PARAMS[name])
    torch.testing.assert_close(logprob, drawn.logprob, rtol=1e-5, atol=1e-5)
    logprob.sum().backward()
    assert transformer.embed.weight.grad.norm() > 0
    with pytest.raises(ValueError, match="expected top_k 0 and top_p 1, got 4 and 1.0; a filtered law"):
        engine.rollout_logprobs(PROMPTS, drawn, sampling=PARAMS["top-k"])


def test_passes_are_as_large_as_the_cache_allows(transformer, monkeypatch):
    """A row's tokens are keys and values, not what one computed token takes; at most 64 rows on a CPU."""
    row = LAYOUT.image_length * kv_bytes(transformer.config, 4)
    for free, expected in ((10 * row / 0.9 + 1, 10), (1e15, 64)):
        monkeypatch.setattr(memory_planner, "free_bytes", lambda device, free=free: free)
        assert Engine(transformer, LAYOUT, image_decoder=AutoregressiveDecoder).max_sequences == expected
