"""Each function against the formula of the published code, written out here."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from hermesflow.drop_in.functional import (
    dpo_loss,
    draw_seeds,
    gumbel_sample,
    mask_by_random_topk,
    selective_log_softmax,
)
from hermesflow.kernels import checks
from hermesflow.kernels.philox import MASK_STREAM, RandomKey, gumbel, random_words

INF, NAN = float("inf"), float("nan")
CPU = torch.device("cpu")
FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# 99.99 % of chi-square draws lie below, by degrees of freedom.
CHI_SQUARE_LIMIT = {4: 23.51, 5: 25.74}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square(counts, probability):
    expected = probability.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def published_mask(mask_len, probs, noise):
    """Masked are the confidences strictly below the one of rank mask_len, counted from 0 upwards."""
    confidence = probs.clamp(min=1e-20).log() + noise
    return torch.stack([row < row.sort().values[int(count)] for row, count in zip(confidence, mask_len, strict=True)])


def make_probs(num_rows=4, num_tokens=33, share_known=0.3):
    probs = torch.rand(num_rows, num_tokens, generator=seeded(1))
    known = torch.rand(num_rows, num_tokens, generator=seeded(2)) < share_known
    return torch.where(known, torch.finfo(probs.dtype).max, probs), known


@pytest.mark.parametrize("integers", [False, True], ids=["floored", "integers"])
def test_mask_without_noise_is_the_published_one(integers):
    probs, known = make_probs()
    probs[0, :3] = torch.tensor([0.0, 1e-30, 1e-10])  # the first two are equal: both raised to 1e-20
    known[0, :3] = False
    # The last row masks all that is unknown.
    mask_len = torch.tensor([[2.0], [0.0], [1.0], [float((~known[3]).sum())]])
    masked = mask_by_random_topk(mask_len.long() if integers else mask_len, probs, temperature=0)
    assert masked.dtype == torch.bool
    assert torch.equal(masked, published_mask(mask_len, probs, torch.zeros_like(probs)))
    assert torch.equal(masked.sum(1, keepdim=True), mask_len.long()) and not (masked & known).any()


def test_mask_with_noise_is_the_published_one_on_the_same_noise():
    probs, known = make_probs(64, 50)
    mask_len = torch.minimum((~known).sum(1, keepdim=True) - 1, torch.tensor(20.7)).clamp(min=1)
    seeds = draw_seeds(64, seeded(), CPU)
    key = RandomKey(seeds, torch.tensor(0), torch.zeros_like(seeds))
    noise = gumbel(random_words(key, 50, MASK_STREAM, use_position=False)[0])
    for temperature in (0.3, 4.0):
        masked = mask_by_random_topk(mask_len, probs, temperature, seeded())
        assert torch.equal(masked, published_mask(mask_len, probs, temperature * noise))
        assert not (masked & known).any()


def test_mask_follows_its_distribution():
    """Of noise at temperature T the kept tokens are drawn one after the other, each in proportion to p ** (1 / T)."""
    p, temperature, num_draws = torch.tensor([0.05, 0.15, 0.3, 0.5]), 1.7, 20_000
    weight = p.double() ** (1 / temperature)
    pairs = list(itertools.combinations(range(4), 2))
    expected = torch.stack(
        [
            sum(
                weight[first] / weight.sum() * weight[second] / (weight.sum() - weight[first])
                for first, second in itertools.permutations(set(range(4)) - set(pair))
            )
            for pair in pairs
        ]
    )
    assert float(expected.sum()) == pytest.approx(1)
    two = torch.full((num_draws, 1), 2)
    masked = mask_by_random_topk(two, p.expand(num_draws, -1), temperature, seeded())
    counts = torch.tensor([int(masked[:, pair].all(1).sum()) for pair in pairs])
    assert counts.sum() == num_draws
    assert chi_square(counts, expected) < CHI_SQUARE_LIMIT[5]
    other = mask_by_random_topk(two, p.expand(num_draws, -1), 1.9, seeded())
    counts = torch.tensor([int(other[:, pair].all(1).sum()) for pair in pairs])
    assert chi_square(counts, expected) > CHI_SQUARE_LIMIT[5]  # so that the line above says something


def test_mask_of_more_tokens_than_are_unknown_takes_known_ones():
    """As the published code does with a row that is known as a whole, of which it still masks one token."""
    probs = torch.full((500, 3), torch.finfo(torch.float32).max)
    probs[:, 0] = 0.5
    masked = mask_by_random_topk(torch.full((500, 1), 2), probs, 1.0, seeded())
    assert masked[:, 0].all() and (masked.sum(1) == 2).all()
    assert 200 < masked[:, 1].sum() < 300
    assert mask_by_random_topk(torch.full((500, 1), 9), probs).all()


def test_mask_of_equal_confidences_takes_the_lower_index():
    probs = torch.tensor([[0.9, 0.2, 0.2, 0.2]])
    assert mask_by_random_topk(torch.tensor([[2]]), probs, 0.0).tolist() == [[False, True, True, False]]
    assert not published_mask(torch.tensor([[2]]), probs, 0.0).any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_mask_computes_other_dtypes_in_fp32(dtype):
    probs, known = make_probs()
    probs = torch.where(known, torch.finfo(dtype).max, probs.to(dtype))
    mask_len = torch.full((4, 1), 9.0)
    wide = probs.float().clamp(max=torch.finfo(torch.float32).max)
    masked = mask_by_random_topk(mask_len, probs, 0.5, seeded())
    assert torch.equal(masked, mask_by_random_topk(mask_len, wide, 0.5, seeded()))
    assert (masked.sum(1) == 9).all() and not (masked & known).any()


def test_mask_takes_any_strides_temperatures_in_tensors_and_gradients():
    probs, _ = make_probs(6, 40)
    mask_len = torch.full((6, 1), 7.0)
    expected = mask_by_random_topk(mask_len, probs, 0.75, seeded())
    assert torch.equal(mask_by_random_topk(mask_len, probs.t().contiguous().t(), 0.75, seeded()), expected)
    one_len = torch.tensor([[7.0]]).expand(6, 1)
    assert torch.equal(mask_by_random_topk(one_len, probs, torch.tensor(0.75).double(), seeded()), expected)
    assert torch.equal(mask_by_random_topk(mask_len, probs.requires_grad_(), 0.75, seeded()), expected)
    assert mask_by_random_topk(torch.ones(0, 1), torch.ones(0, 5)).shape == (0, 5)
    assert mask_by_random_topk(torch.ones(3, 1), torch.ones(3, 0)).shape == (3, 0)


def test_mask_error_messages():
    probs, one = torch.rand(4, 8), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"mask_by_random_topk: expected floating probs \[B, N\], got float32 \[8\]"):
        mask_by_random_topk(one, probs[0])
    with pytest.raises(ValueError, match=r"mask_by_random_topk: expected floating probs \[B, N\], got int64"):
        mask_by_random_topk(one, probs.long())
    with pytest.raises(ValueError, match=r"mask_by_random_topk: expected mask_len \[B, 1\] = \[4, 1\]"):
        mask_by_random_topk(one[:1], probs)
    with pytest.raises(ValueError, match="mask_by_random_topk: expected temperature to be a finite number of at least"):
        mask_by_random_topk(one, probs, -1.0)
    with pytest.raises(ValueError, match="mask_by_random_topk: expected temperature a number or 0-dim, got float32"):
        mask_by_random_topk(one, probs, torch.ones(4))


@pytest.mark.parametrize("dim", [-1, 0, 1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1e-12, 1e-9, -1.0, torch.tensor(0.0)], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_sample_at_temperature_near_0_is_the_argmax(temperature, dim, dtype):
    # Distinct numbers, that each dtype holds.
    logits = (torch.randperm(3 * 5 * 7, generator=seeded()) - 50).reshape(3, 5, 7).to(dtype)
    index = gumbel_sample(logits, temperature, dim)
    assert index.dtype == torch.int64
    assert torch.equal(index, logits.argmax(dim))


def test_sample_follows_softmax():
    logits, temperature, num_draws = torch.tensor([0.3, -1.2, 2.0, 0.0, 1.1]), 0.7, 20_000
    index = gumbel_sample(logits.expand(100, num_draws // 100, 5), temperature, generator=seeded())
    assert index.shape == (100, num_draws // 100)
    expected = (logits.double() / temperature).softmax(0)
    counts = torch.bincount(index.flatten(), minlength=5)
    assert chi_square(counts, expected) < CHI_SQUARE_LIMIT[4]
    assert chi_square(counts, (logits.double() / 0.8).softmax(0)) > CHI_SQUARE_LIMIT[4]


def test_sample_agrees_with_the_published_draws():
    """Total variation between our draws and those of the argmax of logits / T plus Gumbel noise."""
    logits, num_draws = torch.randn(40, generator=seeded(3)), 50_000
    noise = -torch.empty(num_draws, 40, dtype=torch.float64).exponential_(generator=seeded(4)).log()
    published = (logits / 1.5 + noise).argmax(1)
    ours = gumbel_sample(logits.expand(num_draws, -1), 1.5, generator=seeded())
    shares = [torch.bincount(index, minlength=40).double() / num_draws for index in (published, ours)]
    exact = (logits.double() / 1.5).softmax(0)
    # Two shares of n draws differ by about sqrt(4 p (1 - p) / (pi n)) each: half their sum, and a quarter more.
    bound = 1.25 * float((4 * exact * (1 - exact) / (torch.pi * num_draws)).sqrt().sum()) / 2
    assert float((shares[0] - shares[1]).abs().sum()) / 2 < bound


@pytest.mark.parametrize("dtype", FLOAT_DTYPES[1:], ids=str)
def test_sample_computes_other_dtypes_in_fp32(dtype):
    logits = torch.randn(6, 300, generator=seeded()).to(dtype)
    assert torch.equal(gumbel_sample(logits, 0.9, generator=seeded()), gumbel_sample(logits.float(), 0.9, -1, seeded()))


def test_sample_takes_any_shape_dim_and_strides():
    logits = torch.randn(4, 9, 6, generator=seeded())
    expected = gumbel_sample(logits, 0.8, generator=seeded(5))
    assert torch.equal(gumbel_sample(logits.transpose(1, 2), 0.8, 1, seeded(5)), expected)
    assert torch.equal(gumbel_sample(logits.transpose(1, 2).contiguous(), 0.8, -2, seeded(5)), expected)
    assert torch.equal(gumbel_sample(logits.requires_grad_(), torch.tensor(0.8), -1, seeded(5)), expected)
    one = gumbel_sample(logits[0, 0], 1.0)
    assert one.shape == () and 0 <= one < 6
    assert gumbel_sample(torch.zeros(2, 0, 5)).shape == (2, 0)
    assert gumbel_sample(torch.zeros(3, 1)).tolist() == [0, 0, 0]


def test_sample_of_entries_that_are_not_finite():
    logits = torch.tensor([[-INF, 1.0, -INF], [NAN, 0.0, 0.0], [INF, 0.0, 0.0], [-INF] * 3, [1.0, 1.0, 0.0]])
    for temperature in (0.0, 1.0):
        assert gumbel_sample(logits, temperature)[:4].tolist() == [1, -1, -1, -1]
    assert gumbel_sample(logits, 0.0)[4] == 0


def test_sample_error_messages():
    for logits in (torch.tensor(1.0), torch.zeros(3, 0)):
        with pytest.raises(
            ValueError, match="gumbel_sample: expected logits with at least one entry along dim -1, got"
        ):
            gumbel_sample(logits)
    for temperature in (NAN, INF):
        with pytest.raises(ValueError, match="gumbel_sample: expected temperature to be a finite number, got"):
            gumbel_sample(torch.zeros(3), temperature)
    with pytest.raises(ValueError, match=r"gumbel_sample: expected temperature a number or 0-dim, got float32 \[2\]"):
        gumbel_sample(torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(IndexError, match="Dimension out of range"):
        gumbel_sample(torch.zeros(2, 3), dim=2)


def draw_mask(generator):
    return mask_by_random_topk(torch.full((8, 1), 9), make_probs(8, 60)[0], 1.0, generator)


def draw_sample(generator):
    return gumbel_sample(torch.zeros(8, 500), generator=generator)


@pytest.mark.parametrize("draw", [draw_mask, draw_sample])
def test_draws_follow_the_generator(draw):
    generator = seeded(7)
    first, second = draw(generator), draw(generator)
    assert not torch.equal(first, second)
    again = seeded(7)
    assert torch.equal(draw(again), first) and torch.equal(draw(again), second)
    assert len({str(row) for row in first.tolist()}) > 4  # rows of equal logits differ
    with torch.random.fork_rng():
        torch.manual_seed(11)
        default = draw(None)
        assert torch.equal(default, draw(seeded(11))) and not torch.equal(default, draw(None))


@pytest.mark.parametrize("draw", [draw_mask, draw_sample])
def test_draws_do_not_depend_on_the_backend(draw, monkeypatch):
    drawn = []
    for backend in ("torch", *([] if checks.cpu_missing() else ["cpu"])):
        monkeypatch.setenv("HERMESFLOW_BACKEND", backend)
        drawn.append(draw(seeded(3)))
    assert all(torch.equal(each, drawn[0]) for each in drawn)


def test_seeds():
    seeds = draw_seeds(10_000, seeded(), CPU)
    assert seeds.dtype == torch.int64 and seeds.shape == (10_000,) and seeds.device == CPU
    assert len(seeds.unique()) == 10_000 and (seeds >> 32).unique().numel() > 9_000  # both words of the key
    assert torch.equal(seeds, draw_seeds(10_000, seeded(), CPU))
    assert draw_seeds(0, None, CPU).shape == (0,)
    assert draw_seeds(3, seeded(), torch.device("meta")).device.type == "meta"


def published_logprob(logits, index):
    return F.log_softmax(logits, dim=-1).gather(-1, index[..., None]).squeeze(-1)


@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 4, 129), (2, 0, 6), (2, 1, 1), (1, 3, 8192)], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_logprob_and_gradient(shape, dtype):
    logits = (4 * torch.randn(shape, generator=seeded())).to(dtype)
    index = torch.randint(shape[-1], shape[:-1], generator=seeded(1))
    grad = torch.randn(shape[:-1], generator=seeded(2), dtype=torch.float64)
    results = []
    for function, leaf in (
        (selective_log_softmax, logits),
        (published_logprob, logits.double()),
        (published_logprob, logits.float()),
        (published_logprob, logits),
    ):
        leaf = leaf.clone().requires_grad_()
        out = function(leaf, index)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, grad.to(out.dtype))))
    ours, truth, in_fp32, same_dtype = results
    assert ours[0].shape == index.shape and ours[0].dtype == torch.promote_types(dtype, torch.float32)
    assert ours[1].dtype == dtype and ours[1].shape == logits.shape
    if not index.numel():
        return
    # At most twice the error of plain torch, and four roundings; the output is fp32 also for 16-bit logits.
    for number, plain in ((0, in_fp32 if dtype != torch.float64 else same_dtype), (1, same_dtype)):
        floor = 4 * torch.finfo(ours[number].dtype).eps * truth[number].abs().max().clamp(min=1e-3)
        error, budget = ((each[number].double() - truth[number]).abs().max() for each in (ours, plain))
        assert error <= 2 * budget + floor


def test_logprob_gradcheck():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=seeded()).requires_grad_()
    index = torch.tensor([[0, 4, 2], [1, -100, 3]])
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, index), logits)


def test_logprob_skips_labels_of_minus_100():
    """The published methods drop those rows by a mask; a sum is the same."""
    logits = torch.randn(2, 6, 11, generator=seeded())
    labels = torch.randint(11, (2, 6), generator=seeded())
    labels[0, 2:5] = -100
    kept = labels != -100
    expected = published_logprob(logits[kept], labels[kept]).sum()
    logits[~kept] = NAN
    leaf = logits.requires_grad_()
    logprob = selective_log_softmax(leaf, labels)
    assert (logprob[~kept] == 0).all()
    torch.testing.assert_close(logprob.sum(), expected)
    logprob.sum().backward()
    assert (leaf.grad[~kept] == 0).all() and torch.isfinite(leaf.grad).all()


def test_logprob_takes_any_strides():
    logits = torch.randn(3, 7, 10, generator=seeded())
    index = torch.randint(10, (3, 7), generator=seeded())
    expected = selective_log_softmax(logits, index)
    transposed = logits.transpose(0, 1), index.transpose(0, 1)
    assert torch.equal(selective_log_softmax(*transposed), expected.transpose(0, 1))
    # The shift by one of next-token prediction.
    assert torch.equal(selective_log_softmax(logits[:, :-1], index[:, :-1]), expected[:, :-1])
    columns = logits.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(selective_log_softmax(columns, index), expected)


def test_logprob_error_messages():
    logits, index = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
    name = "selective_log_softmax: expected"
    with pytest.raises(ValueError, match=rf"{name} logits \[..., V\] and index int64 .* and int64 \[2, 3, 1\] on cpu;"):
        selective_log_softmax(logits, index[..., None])
    with pytest.raises(ValueError, match=r"int32 \[2, 3\] on cpu; give index.long\(\), and squeeze\(-1\) an index"):
        selective_log_softmax(logits, index.int())
    with pytest.raises(ValueError, match=rf"{name} logits"):
        selective_log_softmax(torch.tensor(0.0), torch.tensor(0))
    with pytest.raises(ValueError, match=rf"{name} at least one token id, got logits float32 \[2, 3, 0\]"):
        selective_log_softmax(logits[..., :0], index)
    with pytest.raises(ValueError, match=r"expected target ids in \[0, 8\) or ignore_index -100, got 8 in row 4"):
        selective_log_softmax(logits, index.flatten().index_fill(0, torch.tensor(4), 8).view(2, 3))


def make_sums(shape, dtype=torch.float32):
    """policy_win, policy_lose, reference_win, reference_lose."""
    reference = -500 + 50 * torch.randn(2, *shape, generator=seeded(), dtype=torch.float64)
    policy = reference + torch.randn(2, *shape, generator=seeded(1), dtype=torch.float64)
    return tuple(each.to(dtype) for each in (*policy, *reference))


def published_loss(policy_win, policy_lose, reference_win, reference_lose, beta=0.2):
    win_ratio, lose_ratio = policy_win - reference_win, policy_lose - reference_lose
    return -torch.log(torch.sigmoid(beta * (win_ratio - lose_ratio))).mean()


@pytest.mark.parametrize("shape", [(), (1,), (37,)], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_loss_and_gradient(shape, dtype):
    sums = make_sums(shape, dtype)
    leaves, exact = ([each.to(to).requires_grad_() for each in sums] for to in (dtype, torch.float64))
    loss, truth = dpo_loss(*leaves), published_loss(*exact)
    assert loss.shape == () and loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    expected = torch.autograd.grad(truth, exact)
    assert found[2] is None and found[3] is None
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=max(1e-5, torch.finfo(dtype).eps), atol=0)


def test_loss_gradcheck():
    policy_win, policy_lose, *reference = make_sums((5,), torch.float64)
    leaves = policy_win.requires_grad_(), policy_lose.requires_grad_()
    assert torch.autograd.gradcheck(lambda win, lose: dpo_loss(win, lose, *reference, beta=0.7), leaves)


def test_loss_is_the_mean_over_pairs_whose_default_beta_is_0_2():
    sums = make_sums((4,))
    alone = torch.stack([dpo_loss(*(each[pair] for each in sums)) for pair in range(4)])
    torch.testing.assert_close(dpo_loss(*sums), alone.mean())
    assert torch.equal(dpo_loss(*sums), dpo_loss(*sums, beta=0.2))
    zero = torch.zeros(3)
    assert dpo_loss(zero, zero, zero, zero).item() == pytest.approx(torch.tensor(2.0).log().item())
    strided = [torch.stack([each, each + 1], 1)[:, 0] for each in sums]
    assert torch.equal(dpo_loss(*strided), dpo_loss(*sums))


@pytest.mark.parametrize("lead", [-1e30, -1e6, -445.0, 445.0, 1e6])
def test_loss_at_huge_margins(lead):
    """beta * 445 is a margin of 89, whose exponential fp32 does not hold."""
    win = torch.tensor([lead]).requires_grad_()
    zero = torch.zeros(1)
    loss = dpo_loss(win, zero, zero, zero)
    loss.backward()
    assert loss.item() == pytest.approx(max(0.0, -0.2 * lead), rel=1e-6, abs=1e-12)
    assert win.grad.item() == pytest.approx(-0.2 if lead < 0 else 0.0, rel=1e-6, abs=1e-12)
    if lead < 0:
        assert published_loss(win.detach(), zero, zero, zero) == INF


def test_loss_error_messages():
    win, lose, *reference = make_sums((3,))
    with pytest.raises(
        ValueError, match=r"dpo_loss: expected four .* of one shape, got \[3\], \[3\], \[3\], \[\]; sum"
    ):
        dpo_loss(win, lose, reference[0], reference[1][0])
    with pytest.raises(ValueError, match=r"got \[3, 1\], \[3, 1\], \[3, 1\], \[3, 1\]; sum over tokens first"):
        dpo_loss(*(each[:, None] for each in (win, lose, *reference)))
    with pytest.raises(ValueError, match="dpo_loss: expected at least one pair, got none; skip the step"):
        dpo_loss(*(each[:0] for each in (win, lose, *reference)))
    for beta in (0.0, -0.1, INF, NAN):
        with pytest.raises(ValueError, match=f"dpo_loss: expected beta to be a finite number above 0, got {beta}"):
            dpo_loss(win, lose, *reference, beta=beta)
