import math

import pytest
import torch

from hermesflow.kernels import checks, registry
from hermesflow.kernels.pair_dpo import pair_dpo

OP = "pair_dpo"
needs_extension = pytest.mark.skipif(checks.cpu_missing() is not None, reason=str(checks.cpu_missing()))
NUM_PAIRS = 4


def make_case(dtype=torch.float32, num_tokens=60, device="cpu"):
    """Tokens of all segments shuffled, some skipped; every side has at least one."""
    generator = torch.Generator().manual_seed(0)
    segment = torch.cat(
        [torch.arange(2 * NUM_PAIRS), torch.randint(-1, 2 * NUM_PAIRS, (num_tokens,), generator=generator)]
    )
    segment = segment[torch.randperm(len(segment), generator=generator)]
    policy = -3 * torch.rand(len(segment), generator=generator)
    reference = policy + 0.5 * torch.randn(len(segment), generator=generator)
    return policy.to(device, dtype), reference.to(device, dtype), segment.to(device)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def loss_by_hand(h, beta, loss_type, smoothing):
    """The formulas of the papers for one pair, in Python's floats."""
    if loss_type == "hinge":
        return max(0.0, 1 - beta * h)
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss_type == "robust":
        return -((1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)) / (1 - 2 * smoothing)
    return -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)


def by_hand(policy, reference, segment, *, beta, loss_type, label_smoothing=0.0, length_normalize=False, weight=None):
    """Each pair alone, one token at a time."""
    losses, rewards = [], []
    for pair in range(NUM_PAIRS):
        ratios = []
        for side in (2 * pair, 2 * pair + 1):
            terms = [
                p - r
                for p, r, s in zip(policy.tolist(), reference.tolist(), segment.tolist(), strict=True)
                if s == side
            ]
            ratios.append(math.fsum(terms) / (len(terms) if length_normalize else 1))
        losses.append(loss_by_hand(ratios[0] - ratios[1], beta, loss_type, label_smoothing))
        rewards.append([beta * ratio for ratio in ratios])
    weight = weight or [1.0] * NUM_PAIRS
    return math.fsum(w * x for w, x in zip(weight, losses, strict=True)) / math.fsum(weight), torch.tensor(rewards)


LOSSES = [("sigmoid", 0.0), ("sigmoid", 0.1), ("robust", 0.0), ("robust", 0.1), ("hinge", 0.0), ("ipo", 0.0)]


@pytest.mark.parametrize("weight", [None, [1.0, 0.0, 2.5, 0.5]], ids=["equal", "weighted"])
@pytest.mark.parametrize("length_normalize", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(("loss_type", "label_smoothing"), LOSSES)
def test_against_the_formula(loss_type, label_smoothing, length_normalize, weight, backend, device):
    policy, reference, segment = make_case(device=device)
    settings = {
        "beta": 0.7,
        "loss_type": loss_type,
        "label_smoothing": label_smoothing,
        "length_normalize": length_normalize,
    }
    pair_weight = None if weight is None else torch.tensor(weight, device=device)
    out = pair_dpo(policy, reference, segment, NUM_PAIRS, pair_weight=pair_weight, backend=backend, **settings)
    loss, rewards = by_hand(policy, reference, segment, weight=weight, **settings)
    rewards = rewards.to(device)
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(torch.stack([out.win_reward, out.lose_reward], 1), rewards, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.margin, rewards[:, 0] - rewards[:, 1], rtol=1e-5, atol=1e-5)
    correct = (rewards[:, 0] > rewards[:, 1]).float()
    pair_weight = torch.ones(NUM_PAIRS, device=device) if weight is None else pair_weight
    torch.testing.assert_close(out.accuracy, (correct * pair_weight).sum() / pair_weight.sum())
    assert 0 < correct.sum() < NUM_PAIRS


@pytest.mark.parametrize("length_normalize", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(("loss_type", "label_smoothing"), LOSSES)
def test_gradcheck(loss_type, label_smoothing, length_normalize, backend, device):
    policy, reference, segment = make_case(torch.float64, num_tokens=20, device=device)
    weight = torch.tensor([1.0, 0.0, 2.5, 0.5], dtype=torch.float64, device=device)

    def loss(policy):
        return pair_dpo(
            policy,
            reference,
            segment,
            NUM_PAIRS,
            beta=0.7,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            length_normalize=length_normalize,
            pair_weight=weight,
            backend=backend,
        ).loss

    assert torch.autograd.gradcheck(loss, policy.requires_grad_())


@pytest.mark.parametrize(("loss_type", "label_smoothing"), LOSSES)
def test_error_budget(loss_type, label_smoothing, check_error_budget, backend, device):
    """fp32 against fp64, beside the formula that sums policy and reference apart."""
    policy, reference, segment = make_case(num_tokens=4000, device=device)

    def plain(policy):
        kept, one_hot = segment >= 0, torch.nn.functional.one_hot(segment.clamp(min=0), 2 * NUM_PAIRS)
        one_hot = (one_hot * kept[:, None]).to(policy.dtype)
        sums, reference_sums = policy @ one_hot, reference.to(policy.dtype) @ one_hot
        h = (sums[0::2] - sums[1::2]) - (reference_sums[0::2] - reference_sums[1::2])
        right, wrong = (-torch.nn.functional.logsigmoid(sign * 0.7 * h) for sign in (1, -1))
        return {
            "sigmoid": (1 - label_smoothing) * right + label_smoothing * wrong,
            "robust": ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing),
            "hinge": (1 - 0.7 * h).relu(),
            "ipo": (h - 1 / 1.4) ** 2,
        }[loss_type].mean()

    def run(function, policy):
        policy = policy.detach().requires_grad_()
        loss = function(policy)
        return loss.detach(), torch.autograd.grad(loss, policy)[0]

    settings = {"beta": 0.7, "loss_type": loss_type, "label_smoothing": label_smoothing}
    got = run(lambda p: pair_dpo(p, reference, segment, NUM_PAIRS, backend=backend, **settings).loss, policy)
    for mine, truth, peer in zip(got, run(plain, policy.double()), run(plain, policy), strict=True):
        check_error_budget(mine, truth, peer)


def test_sums_are_of_each_pair(backend, device):
    """Two opposite pairs: a sum over the batch would cancel to a loss of log 2."""
    policy, segment = torch.tensor([5.0, 0.0, 0.0, 5.0], device=device), torch.arange(4, device=device)
    out = pair_dpo(policy, torch.zeros_like(policy), segment, 2, beta=1.0, loss_type="sigmoid", backend=backend)
    assert out.loss.item() == pytest.approx(-(log_sigmoid(5) + log_sigmoid(-5)) / 2, rel=1e-6)
    assert out.margin.tolist() == [5.0, -5.0] and out.accuracy.item() == 0.5


def test_pairs_do_not_touch_each_other(backend, device):
    policy, reference, segment = make_case(device=device)
    settings = {"beta": 0.7, "loss_type": "sigmoid", "backend": backend}
    together = pair_dpo(policy, reference, segment, NUM_PAIRS, **settings)
    losses = []
    for pair in range(NUM_PAIRS):
        own = torch.where(segment // 2 == pair, segment - 2 * pair, -1)
        losses.append(pair_dpo(policy, reference, own, 1, **settings).loss)
    torch.testing.assert_close(together.loss, torch.stack(losses).mean())


def test_golden_sums(backend, device):
    """The sums of log-probabilities and the losses of the original's code for one homologous pair."""
    policy_win, policy_lose = [-87.46563720703125, -59.986717224121094], [-77.18718719482422, -45.07354736328125]
    reference_win, reference_lose = [-85.75540161132812, -60.758384704589844], [-76.8648452758789, -46.006492614746094]
    policy = torch.tensor([policy_win, policy_lose], device=device).t().flatten()
    reference = torch.tensor([reference_win, reference_lose], device=device).t().flatten()
    segment, settings = torch.arange(4, device=device), {"beta": 0.2, "loss_type": "sigmoid", "backend": backend}
    for pair_weight, expected in (([1.0, 0.0], 0.8415370583534241), ([0.0, 1.0], 0.7094049453735352)):
        weight = torch.tensor(pair_weight, device=device)
        out = pair_dpo(policy, reference, segment, 2, pair_weight=weight, **settings)
        assert out.loss.item() == pytest.approx(expected, abs=1e-6)
    both = pair_dpo(policy, reference, segment, 2, **settings)
    assert 2 * both.loss.item() == pytest.approx(1.5509419441223145, abs=1e-6)


@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize(("loss_type", "label_smoothing"), LOSSES)
def test_large_margins(loss_type, label_smoothing, margin, backend, device):
    policy = torch.tensor([margin, 0.0], device=device, requires_grad=True)
    settings = {"beta": 1.0, "loss_type": loss_type, "label_smoothing": label_smoothing, "backend": backend}
    out = pair_dpo(policy, torch.zeros_like(policy), torch.arange(2, device=device), 1, **settings)
    out.loss.backward()
    slope = {  # dl/dh by hand: sigmoid(-h) is 0 or 1 here
        "sigmoid": label_smoothing if margin > 0 else label_smoothing - 1,
        "robust": (-label_smoothing if margin > 0 else label_smoothing - 1) / (1 - 2 * label_smoothing),
        "hinge": 0.0 if margin > 0 else -1.0,
        "ipo": 2 * (margin - 0.5),
    }[loss_type]
    assert out.loss.item() == pytest.approx(loss_by_hand(margin, 1.0, loss_type, label_smoothing), rel=1e-6)
    torch.testing.assert_close(policy.grad.cpu(), torch.tensor([slope, -slope]), rtol=1e-6, atol=1e-6)


def test_difference_before_the_sum_keeps_the_digits(backend, device):
    """Sums near -1e5 in fp32 are known to 0.008 only; their difference here is 0.1."""
    num_tokens = 20_000
    policy = torch.full((num_tokens,), -5.0, device=device)
    reference = policy.clone()
    reference[0] = -5.1
    segment = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    out = pair_dpo(policy, reference, segment, 1, beta=1.0, loss_type="sigmoid", backend=backend)
    assert out.win_reward.item() == pytest.approx(0.1, abs=1e-5)


def test_equal_policies_give_log_2_and_no_reward(backend, device):
    policy, _, segment = make_case(device=device)
    policy.requires_grad_()
    out = pair_dpo(policy, policy, segment, NUM_PAIRS, beta=0.2, loss_type="sigmoid", backend=backend)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(2)) and out.accuracy == 0 and not out.margin.any()
    # -beta / 2 for win tokens: the reference has no gradient.
    expected = torch.where(segment % 2 == 0, -0.1, 0.1) / NUM_PAIRS
    torch.testing.assert_close(policy.grad, torch.where(segment < 0, 0.0, expected))
    assert not any(t.requires_grad for t in out[1:])


def test_skipped_tokens_are_not_read(backend, device):
    policy, reference, segment = make_case(device=device)
    skipped = segment < 0
    policy[skipped], reference[skipped] = float("nan"), float("inf")
    policy.requires_grad_()
    out = pair_dpo(policy, reference, segment, NUM_PAIRS, beta=0.7, loss_type="sigmoid", backend=backend)
    out.loss.backward()
    assert skipped.any() and torch.isfinite(out.loss)
    assert not policy.grad[skipped].any() and (policy.grad[~skipped] != 0).all()


@pytest.mark.parametrize("length_normalize", [False, True], ids=["sum", "mean"])
def test_nothing_to_learn_from(length_normalize, backend, device):
    settings = {"beta": 0.7, "loss_type": "sigmoid", "length_normalize": length_normalize, "backend": backend}
    empty, no_ids = torch.zeros(0, device=device, requires_grad=True), torch.zeros(0, dtype=torch.int64, device=device)
    out = pair_dpo(empty, empty.detach(), no_ids, 0, **settings)
    out.loss.backward()
    assert out.loss == 0 and out.accuracy == 0 and out.margin.shape == (0,) and empty.grad.shape == (0,)

    policy, reference, segment = make_case(device=device)
    no_pairs = pair_dpo(policy.requires_grad_(), reference, torch.full_like(segment, -1), 0, **settings)
    no_pairs.loss.backward()
    assert no_pairs.loss == 0 and not policy.grad.any()
    out = pair_dpo(policy, reference, torch.full_like(segment, -1), NUM_PAIRS, **settings)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(2)) and not out.margin.any() and not policy.grad.any()

    weighted = pair_dpo(policy, reference, segment, NUM_PAIRS, pair_weight=policy.new_zeros(NUM_PAIRS), **settings)
    assert weighted.loss == 0 and weighted.accuracy == 0


def test_non_contiguous(backend, device):
    case = *make_case(device=device), torch.arange(1.0, NUM_PAIRS + 1, device=device)
    strided = [t.repeat_interleave(2)[::2] for t in case]
    results = []
    for policy, reference, segment, weight in (case, strided):
        policy = policy.detach().requires_grad_()
        settings = {"beta": 0.7, "loss_type": "sigmoid", "pair_weight": weight, "backend": backend}
        out = pair_dpo(policy, reference, segment, NUM_PAIRS, **settings)
        results.append((*out, torch.autograd.grad(out.loss, policy)[0]))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_pairs", [1, 150], ids=["one_pair", "many_pairs"])
def test_equals_the_reference(num_pairs, dtype, backend, device):
    """150 pairs: more than a block of pairs of the Triton kernel; some sides have no token."""
    generator = torch.Generator().manual_seed(num_pairs)
    segment = torch.randint(-1, 2 * num_pairs, (1500,), generator=generator).to(device)
    policy = -3 * torch.rand(1500, generator=generator, dtype=dtype).to(device)
    reference = policy + torch.randn(1500, generator=generator, dtype=dtype).to(device)
    weight = torch.rand(num_pairs, generator=generator, dtype=dtype).to(device)
    settings = {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.1, "length_normalize": True}
    results = []
    for name in (backend, "torch"):
        policy = policy.detach().requires_grad_()
        out = pair_dpo(policy, reference, segment, num_pairs, pair_weight=weight, backend=name, **settings)
        assert all(t.dtype == dtype for t in out)
        results.append((*out, torch.autograd.grad(2 * out.loss, policy)[0]))
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_results_are_the_same_in_every_run(backend, device):
    """Bit by bit, whatever the order in which blocks finish."""
    policy, reference, segment = make_case(num_tokens=4000, device=device)
    settings = {"beta": 0.7, "loss_type": "sigmoid", "backend": backend}
    first, again = (pair_dpo(policy, reference, segment, NUM_PAIRS, **settings) for _ in range(2))
    if backend != "torch" or device.type == "cpu":  # torch's index_add on CUDA adds in any order
        assert all(torch.equal(*both) for both in zip(first, again, strict=True))


def test_not_a_number_reaches_the_loss(backend, device):
    """The training loop stops on it; the other pairs keep their results."""
    policy, reference, segment = make_case(device=device)
    policy[segment == 0] = float("nan")
    for loss_type in ("sigmoid", "hinge", "ipo"):
        out = pair_dpo(policy, reference, segment, NUM_PAIRS, beta=0.7, loss_type=loss_type, backend=backend)
        assert torch.isnan(out.loss) and torch.isnan(out.margin).tolist() == [True, False, False, False]


def test_no_gradient_for_metrics(backend, device):
    policy, reference, segment = make_case(device=device)
    out = pair_dpo(policy.requires_grad_(), reference, segment, NUM_PAIRS, beta=0.7, loss_type="ipo", backend=backend)
    assert out.loss.requires_grad and not any(t.requires_grad for t in out[1:])
    with torch.no_grad():
        assert not pair_dpo(
            policy, reference, segment, NUM_PAIRS, beta=0.7, loss_type="ipo", backend=backend
        ).loss.requires_grad


@needs_extension
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted):
    policy, reference, segment = make_case()
    weight = torch.rand(NUM_PAIRS) if weighted else None
    arguments = (policy, reference, segment, NUM_PAIRS, 0.7, "sigmoid", 0.1, True, weight)
    torch.library.opcheck(torch.ops.hermesflow.pair_dpo.default, arguments)


@needs_extension
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(1, 4)}, r"expected policy_logprob fp32 or fp64 \[T\]"),
        ({0: torch.zeros(4).half()}, r"expected policy_logprob fp32 or fp64 \[T\]"),
        ({1: torch.zeros(3)}, "expected reference_logprob like policy_logprob"),
        ({2: torch.zeros(4)}, "expected segment int64"),
        ({2: torch.tensor([0, 1, 2, 4])}, r"expected segments in \[-1, 4\) for 2 pairs, got 4"),
        ({2: torch.tensor([0, -2, 2, 3])}, r"expected segments in \[-1, 4\) for 2 pairs, got -2"),
        ({3: -1}, "expected num_pairs of at least 0, got -1"),
        ({5: "dpo"}, "expected loss_type to be one of sigmoid ipo hinge robust, got dpo"),
        ({8: torch.ones(3)}, r"expected pair_weight \[2\]"),
        ({8: torch.tensor([1.0, -1.0])}, "expected pair_weight of at least 0, got -1"),
    ],
)
def test_extension_checks_its_arguments(changes, message):
    """Callers of torch.ops.hermesflow bypass the public function's checks, torch.compile those of values."""
    registry.dispatch(OP, "cpu", P, P, S, 2, beta=0.2, loss_type="sigmoid")
    arguments = [P, P, S, 2, 0.2, "sigmoid", 0.0, False, None]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.hermesflow.pair_dpo(*arguments)


def test_backends_that_cannot_run_say_why():
    meta = torch.zeros(4, device="meta")
    reasons = dict(registry.explain(OP, meta, meta, meta, 2))
    assert reasons["torch"] is None
    assert reasons["cpu"] in (checks.cpu_missing(), "a tensor is on meta, needs cpu")
    assert reasons["triton"] == checks.triton_missing() or "a tensor is on meta" in reasons["triton"]


@pytest.mark.parametrize("weighted", [False, True])
def test_compiles_as_a_whole(weighted, backend, device):
    """torch.compile finds no graph break, and loss, metrics and gradient are the same."""
    policy, reference, segment = make_case(device=device)
    weight = torch.arange(1.0, NUM_PAIRS + 1, device=device) if weighted else None

    def call(policy):
        return pair_dpo(
            policy,
            reference,
            segment,
            NUM_PAIRS,
            beta=0.7,
            loss_type="sigmoid",
            label_smoothing=0.1,
            pair_weight=weight,
            backend=backend,
        )

    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        leaf = policy.detach().requires_grad_()
        out = function(leaf)
        (3 * out.loss).backward()
        results.append((*out, leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


P, S = torch.zeros(4), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_logprob": P[None]}, r"pair_dpo: expected policy_logprob .*\[T\], got float32 \[1, 4\]"),
        ({"policy_logprob": P.bfloat16()}, r"expected policy_logprob float32 or float64 .*got bfloat16"),
        ({"reference_logprob": P[:3]}, r"expected reference_logprob float32 \[T\] = \[4\].*got float32 \[3\]"),
        ({"reference_logprob": P.double()}, r"expected reference_logprob float32 .*got float64"),
        ({"segment": S.int()}, r"expected segment int64 .*got int32"),
        ({"segment": S + 1}, r"expected segments in \[-1, 4\) for 2 pairs, got 4"),
        ({"segment": S - 2}, r"expected segments in \[-1, 4\) for 2 pairs, got -2"),
        ({"num_pairs": -1}, r"expected num_pairs to be an integer of at least 0, got -1"),
        ({"num_pairs": 2.0}, r"expected num_pairs to be an integer of at least 0, got 2.0"),
        ({"beta": 0.0}, r"expected beta to be a finite number above 0, got 0.0"),
        ({"beta": float("nan")}, r"expected beta to be a finite number above 0, got nan"),
        ({"loss_type": "dpo"}, r"expected loss_type to be one of sigmoid, ipo, hinge, robust, got 'dpo'"),
        ({"label_smoothing": 0.5}, r"expected label_smoothing in \[0, 0.5\), got 0.5"),
        (
            {"loss_type": "ipo", "label_smoothing": 0.1},
            r"label_smoothing 0.1 has no meaning for loss_type 'ipo'; set it to 0",
        ),
        ({"pair_weight": torch.ones(3)}, r"expected pair_weight float32 \[P\] = \[2\].*got float32 \[3\]"),
        ({"pair_weight": torch.tensor([1.0, -1.0])}, r"expected pair_weight of at least 0, got -1"),
    ],
)
def test_errors(changes, message):
    arguments = {
        "policy_logprob": P,
        "reference_logprob": P,
        "segment": S,
        "num_pairs": 2,
        "beta": 0.2,
        "loss_type": "sigmoid",
    } | changes
    with pytest.raises(ValueError, match=message):
        pair_dpo(**arguments)


@pytest.mark.parametrize(("loss_type", "label_smoothing"), [("sigmoid", 0.1), ("robust", 0.49)])
def test_fp64_stays_fp64(loss_type, label_smoothing, backend, device):
    """robust at 0.49 divides by 0.02, which shows a share that was rounded to fp32."""
    policy = torch.tensor([0.3, 0.1], dtype=torch.float64, device=device, requires_grad=True)
    segment = torch.tensor([0, 1], device=device)
    settings = {"beta": 0.1, "loss_type": loss_type, "label_smoothing": label_smoothing}
    loss = pair_dpo(policy, torch.zeros_like(policy), segment, 1, **settings, backend=backend).loss
    assert loss.item() == pytest.approx(loss_by_hand(0.2, 0.1, loss_type, label_smoothing), rel=1e-12)
