"""The objective of a step against plain formulas in float64: losses, gradients, metrics, and passes that add up."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from hermesflow.algorithms.algorithm import StepSums
from hermesflow.algorithms.batch import PairVisit
from hermesflow.algorithms.losses import check_loss
from hermesflow.algorithms.packing import PairPacker
from hermesflow.algorithms.pair_dpo import metric_names, pass_objective
from hermesflow.config import PAPER_OBJECTIVE, TrainConfig
from hermesflow.runtime.files import InputError

VISITS = [PairVisit(pair, visit) for pair, visit in ((3, 0), (0, 1), (1, 0), (2, 2), (4, 0))]

LOSSES = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2},
    "simpo": {"loss_type": "simpo", "simpo_margin": 0.7},
}
SETTINGS = {
    "sums": {},
    "defaults": {"masks_per_pair": 4, "complementary_masks": True, "nll_weight": 1.0, "replay_weight": 0.3},
    "means over tokens": {"length_normalize": True},
    "masks": {"masks_per_pair": 4, "complementary_masks": True, "boundary_labels": True},
    "masks, means over tokens": {"masks_per_pair": 4, "length_normalize": True},
    "elbo": {"masks_per_pair": 2, "elbo_weighting": True},
    "likelihood": {"nll_weight": 0.3},
    "a beta a side": {"generation_beta": 0.05, "understanding_beta": 0.4},
    "weights": {
        "generation_weight": 0.7,
        "understanding_weight": 1.9,
        "preference_weight": 0.6,
        "nll_weight": 0.5,
    },
    "the wins alone": {"preference_weight": 0, "nll_weight": 0.5},
    "generation alone": {"understanding_weight": 0},
    "understanding alone": {"generation_weight": 0, "nll_weight": 0.2},
    "replay": {"replay_weight": 0.7, "replayed_questions": 1},
    "right answers replayed": {"replay_weight": 0.7, "replay_target": "answers"},
    "generation and replay": {"understanding_weight": 0, "replay_weight": 0.7},
    "understanding and replay": {"generation_weight": 0, "replay_weight": 0.7},
}
CASES = {
    f"{loss}, {name}": PAPER_OBJECTIVE | LOSSES[loss] | settings
    for loss, (name, settings) in itertools.product(LOSSES, SETTINGS.items())
    if not (loss == "simpo" and "elbo_weighting" in settings)
}
every_case = pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())


def make_packer(model, random_pairs, settings):
    """Of pairs with both sides and with either side alone, some with questions."""
    asked = [("what color is the circle ?", "red"), ("where is the circle ?", "top left")]
    pairs = random_pairs(model, 5, ("both", "generation", "understanding"), asked)
    kept = {"generation_weight": (0, 1, 3, 4), "understanding_weight": (0, 2, 3)}
    trained = set().union(*(rows for name, rows in kept.items() if settings.get(name, 1)))
    visits = [visit for visit in VISITS if visit.pair in trained]
    return PairPacker(model, pairs, TrainConfig(beta=0.3, **settings), seed=0), visits


def values_of(batch, seed, scale=1.0):
    """Token log-probabilities fp32 [T] that are the same for a visit in any pass."""
    parts = []
    for name in batch.sides:
        for count, visit in zip(batch.num_tokens_of[name], batch.visits_of[name], strict=True):
            rng = np.random.default_rng([seed, len(name), *visit])
            parts.append(-scale * rng.exponential(size=count))
    return torch.from_numpy(np.concatenate(parts)).float()


def plain_loss(margin, config):
    """l of a pair's reward margin, from the papers' formulas."""
    smoothing, beta = config.label_smoothing, config.beta
    if config.loss_type == "simpo":
        return -logsigmoid(margin - config.simpo_margin)
    if config.loss_type == "hinge":
        return (1 - margin).clamp(min=0)
    if config.loss_type == "ipo":
        return (margin / beta - 1 / (2 * beta)) ** 2
    if config.loss_type == "robust":
        return (-(1 - smoothing) * logsigmoid(margin) + smoothing * logsigmoid(-margin)) / (1 - 2 * smoothing)
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def plain_pair(now, before, weights, config):
    """Metrics of one side of one pair; each argument holds the values of the win's tokens and of the lose's."""
    simpo = config.loss_type == "simpo"
    moved = [after - earlier for after, earlier in zip(now, before, strict=True)]
    if simpo or config.length_normalize:
        win, lose = (values.mean() for values in (now if simpo else moved))
    else:
        win, lose = ((weight.double() * values).sum() for weight, values in zip(weights, moved, strict=True))
    margin = config.beta * win - config.beta * lose
    found = {
        "loss": plain_loss(margin, config), "win_reward": config.beta * win, "lose_reward": config.beta * lose,
        "margin": margin, "accuracy": (margin > 0).double(), "nll": -now[0].mean(),
    }  # fmt: skip
    if not simpo:
        kl = sum((values.exp() - 1 - values).mean() for values in moved) / 2
        found |= {"win_logprob_drift": win, "kl": kl}
    return found


def plain_replay(now, before, number, config):
    """Of one visit: the mean over tokens of right answers, or over questions of the divergence from the reference."""
    if config.replay_target == "answers":
        return -now.mean()
    ours, theirs = ([values[number == answer].sum() for answer in number.unique()] for values in (now, before))
    total = sum(p.exp() * (p - q) - p.exp() + q.exp() for p, q in zip(theirs, ours, strict=True))
    return total / num_questions(len(ours))


def num_questions(num_answers):
    """Of make_packer's pairs: each question has two choices."""
    assert num_answers % 2 == 0
    return num_answers // 2


def plain_objective(logprob, reference, batch, config):
    """Loss and metrics of a step of one pass, pair by pair."""
    loss, metrics, before = 0.0, {}, batch.split(reference)
    for name, now in batch.split(logprob).items():
        side, rows = batch.sides[name], []
        if name == "replay":
            of_visits = (values.split(batch.num_tokens_of[name]) for values in (now, before[name], side.segment))
            kept = [plain_replay(*of_visit, config) for of_visit in zip(*of_visits, strict=True)]
            metrics[f"replay/{'kl' if config.replay_target == 'reference' else 'nll'}"] = (sum(kept) / len(kept)).item()
            loss += config.replay_weight * sum(kept) / len(kept)
            continue
        for pair in range(len(batch.visits)):
            tokens = [side.segment == 2 * pair + lose for lose in (0, 1)]
            if tokens[0].any():
                values = ([each[mine] for mine in tokens] for each in (now, before[name], side.token_weight))
                own = getattr(config, f"{name}_beta") or config.beta
                rows.append(plain_pair(*values, dataclasses.replace(config, beta=own)))
        means = {metric: sum(row[metric] for row in rows) / len(rows) for metric in rows[0]}
        loss += getattr(config, f"{name}_weight") * (
            config.preference_weight * means["loss"] + config.nll_weight * means["nll"]
        )
        metrics |= {f"{name}/{metric}": mean.item() for metric, mean in means.items()}
    return loss, metrics


@every_case
def test_loss_gradient_and_metrics(shared_tiny_model, random_pairs, settings):
    packer, visits = make_packer(shared_tiny_model, random_pairs, settings)
    batch, config = packer.pack(visits), packer.config
    reference = values_of(batch, 0)
    logprob = (reference + 0.1 * values_of(batch, 1) + 0.08).requires_grad_()
    loss, shares = pass_objective(logprob, reference, batch, packer.num_pairs(visits), config)
    (gradient,) = torch.autograd.grad(loss, logprob)
    exact = logprob.detach().double().requires_grad_()
    expected, metrics = plain_objective(exact, reference.double(), batch, config)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert gradient.abs().max() > 0
    assert (gradient - expected_gradient).abs().max() <= 2e-6 * expected_gradient.abs().max()
    assert {name: share.item() for name, share in shares.items()} == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    assert not any(share.requires_grad for share in shares.values())


SPLITS = {
    "one by one": [[0], [1], [2], [3], [4]],
    "two": [[0, 1, 2], [3, 4]],
    "any order": [[4, 0], [2], [3, 1]],
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
@every_case
def test_passes_add_up(shared_tiny_model, random_pairs, settings, split):
    packer, visits = make_packer(shared_tiny_model, random_pairs, settings)
    totals, cpu = packer.num_pairs(visits), torch.device("cpu")

    def step(parts):
        """Metrics of the step, and the gradient by side and visit."""
        sums, gradients = StepSums(metric_names(totals, packer.config), cpu), {}
        for part in parts:
            batch = packer.pack(part)
            reference = values_of(batch, 0)
            logprob = (reference + 0.1 * values_of(batch, 1) + 0.08).requires_grad_()
            loss, shares = pass_objective(logprob, reference, batch, totals, packer.config)
            loss.backward()
            sums.add(loss, shares)
            for name, gradient in batch.split(logprob.grad).items():
                of_visits = gradient.split(batch.num_tokens_of[name])
                for visit, of_visit in zip(batch.visits_of[name], of_visits, strict=True):
                    gradients[name, visit] = of_visit.tolist()
        return sums.metrics(), {key: values for key, values in gradients.items() if values}

    parts = [[visits[item] for item in part if item < len(visits)] for part in split]
    (metrics, gradients), (expected, expected_gradients) = step([part for part in parts if part]), step([visits])
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in gradients.items():
        assert gradient == pytest.approx(expected_gradients[key], rel=1e-6, abs=1e-6)


def test_replay_adds_its_weight_times_the_mean_over_its_pairs(shared_tiny_model, random_pairs):
    """By hand: each pair counts alike, however many questions and tokens it has."""
    settings = PAPER_OBJECTIVE | {"replay_weight": 0.7, "replay_target": "answers"}
    packer, visits = make_packer(shared_tiny_model, random_pairs, settings)
    batch, totals = packer.pack(visits), packer.num_pairs(visits)
    reference, logprob = values_of(batch, 0), values_of(batch, 1).requires_grad_()
    loss, shares = pass_objective(logprob, reference, batch, totals, packer.config)
    without = dataclasses.replace(packer.config, replay_weight=0.0)
    rest, _ = pass_objective(logprob, reference, batch, totals, without)
    lengths = batch.num_tokens_of["replay"]
    parts = [part.tolist() for part in batch.split(logprob)["replay"].split(lengths)]
    assert len(parts) == totals["replay"] == 3 and len({len(part) for part in parts}) > 1
    expected = -np.mean([np.mean(part) for part in parts])
    assert shares["replay/nll"].item() == pytest.approx(expected, rel=1e-6)
    assert loss.item() - rest.item() == pytest.approx(0.7 * expected, rel=1e-5)
    gradient = batch.split(torch.autograd.grad(loss, logprob)[0])["replay"]
    assert torch.allclose(gradient, torch.cat([torch.full((length,), -0.7 / 3 / length) for length in lengths]))


def test_the_replay_of_a_reference_starts_at_zero_and_pulls_back(shared_tiny_model, random_pairs):
    """By hand: no loss and no gradient at the reference; away from it each choice is pulled by p - q."""
    packer, visits = make_packer(shared_tiny_model, random_pairs, PAPER_OBJECTIVE | {"replay_weight": 0.7})
    batch = packer.only("replay").pack(visits)
    totals, side = packer.only("replay").num_pairs(visits), batch.sides["replay"]
    reference = values_of(batch, 0)
    for moved in (0.0, 0.3):
        logprob = (reference + moved).requires_grad_()
        loss, shares = pass_objective(logprob, reference, batch, totals, packer.config)
        (gradient,) = torch.autograd.grad(loss, logprob)
        ours, theirs = (torch.zeros(len(side.pair_weight)).index_add(0, side.segment, x) for x in (logprob, reference))
        pull = 0.7 / totals["replay"] * (side.pair_weight * (ours.exp() - theirs.exp()))[side.segment]
        assert torch.allclose(gradient, pull.detach(), atol=1e-8)
        assert (loss.item() == 0.0) == (moved == 0.0) == (shares["replay/kl"].item() == 0.0) and loss.item() >= 0


def test_simpo_does_not_read_the_reference(shared_tiny_model, random_pairs):
    packer, visits = make_packer(shared_tiny_model, random_pairs, LOSSES["simpo"] | {"replay_target": "answers"})
    batch, totals = packer.pack(visits), packer.num_pairs(visits)
    found = []
    for reference in (torch.zeros(len(batch.rows)), torch.full((len(batch.rows),), math.nan)):
        logprob = values_of(batch, 0).requires_grad_()
        loss, shares = pass_objective(logprob, reference, batch, totals, packer.config)
        loss.backward()
        found.append([loss.item(), logprob.grad.tolist(), {name: share.item() for name, share in shares.items()}])
    assert found[0] == found[1]
    assert not {name.partition("/")[2] for name in found[0][2]} & {"win_logprob_drift", "kl"}


def test_a_policy_far_from_its_reference_stays_finite(shared_tiny_model, random_pairs):
    packer, visits = make_packer(shared_tiny_model, random_pairs, {})
    batch = packer.pack(visits)
    logprob = torch.full((len(batch.rows),), -1e-3, requires_grad=True)
    loss, shares = pass_objective(logprob, logprob.detach() - 500, batch, packer.num_pairs(visits), packer.config)
    loss.backward()
    assert loss.isfinite() and logprob.grad.isfinite().all()
    assert all(share.isfinite() for share in shares.values())
    assert shares["generation/kl"] > 1e8


@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES.keys())
def test_a_step_s_names_do_not_depend_on_its_passes(shared_tiny_model, random_pairs, settings):
    """A process whose passes lack a side adds up the same names as the others."""
    packer, visits = make_packer(shared_tiny_model, random_pairs, settings)
    batch, totals = packer.pack([PairVisit(2, 2)]), packer.num_pairs(visits)
    _, shares = pass_objective(values_of(batch, 0), values_of(batch, 1), batch, totals, packer.config)
    names = [name.partition("/")[2] for name in shares if name != "replay/kl"]
    sums = StepSums(metric_names(totals, packer.config), torch.device("cpu"))
    expected = ["loss", *(f"{side}/{name}" for side in ("generation", "understanding") for name in names), "replay/kl"]
    assert sums.metrics() == dict.fromkeys(expected, 0.0)
    sums.add(torch.tensor(0.5), shares)
    metrics = sums.metrics()
    assert metrics["loss"] == 0.5 and metrics["generation/nll"] == 0 != metrics["understanding/nll"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss_type": "ipo", "label_smoothing": 0.1},
            "label_smoothing: expected 0 with loss_type ipo, got 0.1; take",
        ),
        (
            {"loss_type": "simpo", "elbo_weighting": True},
            "elbo_weighting: expected false where .* are means",
        ),
        ({"length_normalize": True, "elbo_weighting": True}, "elbo_weighting: expected false where .* are means"),
    ],
    ids=["smoothing", "simpo", "means"],
)
def test_settings_without_a_meaning_for_the_loss_are_refused(settings, message):
    with pytest.raises(InputError, match=f"train.{message}"):
        check_loss(TrainConfig(**settings))
