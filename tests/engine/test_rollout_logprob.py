"""The law of rollouts: what the decoder says of its draws is what a differentiable pass finds, and its gradient."""

from dataclasses import replace

import pytest
import torch

from hermesflow.engine import rollout_logprob
from hermesflow.engine.decoders import masked
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.rollout_logprob import RolloutStates
from hermesflow.kernels.span_tree import SpanForest

PROMPTS = [[3, 4, 5], [], [6, 7]]
SEEDS = torch.tensor([[1, 2], [3, 2**62], [-5, 6]])
WAY = {"num_steps": 6, "guidance_scale": 1.5, "mask_temperature": 2.0, "temperature": 0.7}
WAYS = {
    "guided, tempered": {},
    "no guidance": {"guidance_scale": 0.0},
    "negative guidance, hot": {"guidance_scale": -0.5, "temperature": 1.7},
    "one step": {"num_steps": 1},
    "more steps than tokens": {"num_steps": 20},
    "no noise": {"mask_temperature": 0.0, "temperature": 1.0},
}


def draw(engine, **change):
    return engine.rollout(PROMPTS, num_images=2, seeds=SEEDS, **WAY | change)


@pytest.mark.parametrize("change", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("name", ["sequential", "parallel-gqa-partial-qknorm"])
def test_the_law_is_that_of_the_draws(naive, name, change):
    engine = Engine(naive.tiny_model(name), naive.LAYOUT)
    drawn = draw(engine, **change)
    codes = engine.generate(PROMPTS, num_images=2, seeds=SEEDS, **WAY | change)
    assert drawn.codes.equal(codes)
    # Each step kept what the schedule says.
    steps = masked._changing_steps(16, 16, ImageSamplingParams(**WAY | change))
    kept = [(drawn.kept_at == number).sum(-1) for number, *_ in steps]
    assert all((count == before - after).all() for count, (_, before, after, _) in zip(kept, steps, strict=True))
    assert drawn.drawn.gather(2, drawn.kept_at[:, :, None])[:, :, 0].equal(codes.int())
    found = engine.rollout_logprobs(PROMPTS, drawn, **WAY | change)
    assert found.requires_grad and found.isfinite().all()
    torch.testing.assert_close(found.detach(), drawn.logprob, rtol=0, atol=1e-5)


def test_the_law_of_all_draws_counts_what_was_masked_again(naive, monkeypatch):
    engine, message = Engine(naive.tiny_model(), naive.LAYOUT), []
    sample = masked.linear_sample
    monkeypatch.setattr(
        masked, "linear_sample", lambda *args, **kwargs: message.append(sample(*args, **kwargs)) or message[-1]
    )
    drawn = draw(engine)
    found = engine.rollout_logprobs(PROMPTS, drawn, remasked=True, **WAY)
    expected = sum(logprob.view(3, 2, -1).sum(-1) for _, logprob in message)
    torch.testing.assert_close(found.detach().sum(-1), expected, rtol=1e-5, atol=1e-4)
    assert (drawn.drawn[:, :, 0] >= 0).all() and (drawn.drawn[:, :, -1] < 0).any()


def test_known_codes_and_layouts_in_rows(naive):
    """Known codes are no draws; an image in rows with ids between them has its law too."""

    class InRows(type(naive.LAYOUT)):
        row_end = (naive.LAYOUT.pad,)

    layout = InRows(**naive.LAYOUT.to_dict())
    engine = Engine(naive.tiny_model(layout=layout), layout)
    drawn = draw(engine)
    found = engine.rollout_logprobs(PROMPTS, drawn, **WAY)
    torch.testing.assert_close(found.detach(), drawn.logprob, rtol=0, atol=1e-5)
    drawn.kept_at[:, :, :4] = -1
    assert not engine.rollout_logprobs(PROMPTS, drawn, **WAY)[:, :, :4].any()


@pytest.mark.parametrize("remasked", [False, True])
def test_gradient_by_finite_differences(naive, remasked):
    transformer = naive.tiny_model(dtype=torch.float64)
    engine = Engine(transformer, naive.LAYOUT)
    drawn, options = (
        draw(Engine(naive.tiny_model(), naive.LAYOUT), num_steps=3),
        WAY | {"num_steps": 3, "remasked": remasked},
    )
    weights = torch.linspace(-1, 1, drawn.codes.numel(), dtype=torch.float64).view_as(drawn.codes)

    def value():
        return (engine.rollout_logprobs(PROMPTS, drawn, **options) * weights).sum()

    value().backward()
    generator, step = torch.Generator().manual_seed(0), 1e-5
    for name, parameter in transformer.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = value().item()
            parameter.sub_(direction, alpha=2 * step)
            slope = (above - value().item()) / (2 * step)
            parameter.add_(direction, alpha=step)
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-5), name


def test_equal_states_are_one_span(naive):
    params = ImageSamplingParams(**WAY)
    forest = SpanForest()
    states = RolloutStates(naive.LAYOUT, params, forest)
    drawn = draw(Engine(naive.tiny_model(), naive.LAYOUT))
    for prompt, ids in enumerate(PROMPTS):
        for image in range(2):
            states.add(ids, drawn.codes[prompt, image].numpy(), drawn.kept_at[prompt, image].numpy())
    # The first state of all images is one span a prompt; the empty prompt is its own unconditional half.
    roots, num_steps = 3, 6
    of_prompt = 1 + 2 * (num_steps - 1)
    unguided = 1 + 6 * (num_steps - 1)
    assert len(forest.spans) == roots + 2 * of_prompt + unguided


def test_chosen_steps_alone(naive):
    params, forest = ImageSamplingParams(**WAY), SpanForest()
    states = RolloutStates(naive.LAYOUT, params, forest)
    drawn = draw(Engine(naive.tiny_model(), naive.LAYOUT))
    codes, kept_at = drawn.codes[0, 0].numpy(), drawn.kept_at[0, 0].numpy()
    states.add(PROMPTS[0], codes, kept_at, steps=[2, 4])
    found = states.drawn()
    assert sorted(set(found.steps.tolist())) == [2, 4]
    assert found.positions.sort().values.tolist() == [place for place in range(16) if kept_at[place] in (2, 4)]
    assert found.targets.tolist() == codes[found.positions.numpy()].tolist()


def test_what_has_no_law_is_refused(naive):
    engine = Engine(naive.tiny_model(), naive.LAYOUT)
    drawn = draw(engine)
    with pytest.raises(ValueError, match="expected a temperature above 0"):
        engine.rollout_logprobs(PROMPTS, drawn, **WAY | {"temperature": 0.0})

    class Silent:
        params = ImageSamplingParams

    engine.image_decoder = Silent()
    with pytest.raises(ValueError, match="Silent does not say how it draws; use a model of masked image tokens"):
        draw(engine)


def test_no_guidance_has_no_second_half(naive):
    params = replace(ImageSamplingParams(**WAY), guidance_scale=0.0)
    states = RolloutStates(naive.LAYOUT, params, SpanForest())
    assert [len(values) for values in states.drawn()] == [0] * len(rollout_logprob.DrawnCodes._fields)
    drawn = draw(Engine(naive.tiny_model(), naive.LAYOUT), guidance_scale=0.0)
    states.add(PROMPTS[0], drawn.codes[0, 0].numpy(), drawn.kept_at[0, 0].numpy())
    assert len(states.drawn().unguided) == 0 and len(states.drawn().guided) == 16
