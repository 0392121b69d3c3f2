from contextlib import nullcontext

import pytest
import torch

from hermesflow.kernels import checks
from hermesflow.kernels import linear_logprob as reference
from hermesflow.kernels.guided_sample import guided_sample
from hermesflow.kernels.linear_sample import linear_sample
from hermesflow.kernels.philox import RandomKey

OP = "linear_sample"
needs_extension = pytest.mark.skipif(checks.cpu_missing() is not None, reason=str(checks.cpu_missing()))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {  # R, D, V
    "one_tile": (5, 16, 40),
    "ragged_tiles": (300, 32, 8 * 128 + 3),
    "one_row": (1, 8, 300),
    "one_id": (4, 8, 1),
}


def make_case(num_rows, width, vocab_size, dtype=torch.float32, device="cpu"):
    """Multiples of 1/8, for which a matmul is exact whatever its order of summation: equal tokens on every machine."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + vocab_size)
    shapes = ((num_rows, width), (vocab_size, width), (vocab_size,))
    hidden, weight, bias = (torch.randint(-8, 9, shape, generator=generator) / 8 for shape in shapes)
    return *(tensor.to(device, dtype) for tensor in (hidden, weight, bias)), make_key(num_rows, device)


def make_key(num_rows, device="cpu"):
    rows = torch.arange(num_rows, device=device)
    return RandomKey(rows * 7919, rows % 5, rows % 11)


def sample(hidden, weight, bias, *, key, backend, temperature=1.0):
    return linear_sample(hidden, weight, bias, temperature=temperature, key=key, backend=backend)


def draw_from_logits(logits, temperature, key):
    """The reference's draw from the same logits."""
    return guided_sample(logits, None, guidance_scale=0.0, temperature=temperature, key=key, backend="torch")


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_guided_sample_of_the_logits(shape, dtype, with_bias, temperature, backend, device):
    hidden, weight, bias, key = make_case(*shape, dtype, device)
    logits = hidden.float() @ weight.float().t() + (bias.float() if with_bias else 0)
    expected = draw_from_logits(logits, temperature, key)
    token, logprob = sample(
        hidden, weight, bias if with_bias else None, temperature=temperature, key=key, backend=backend
    )
    assert token.dtype == torch.int64 and logprob.dtype == torch.float32
    assert torch.equal(token, expected[0])
    # Logits reach 20; each of the few fp32 roundings at that size is at most 1e-6.
    torch.testing.assert_close(logprob, expected[1], rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("vocab_size", [8192, 58498])
def test_vocabularies_of_show_o(vocab_size, backend, device):
    hidden, weight, bias, key = make_case(2, 8, vocab_size, device=device)
    expected = draw_from_logits(hidden @ weight.t() + bias, 1.0, key)
    token, logprob = sample(hidden, weight, bias, key=key, backend=backend)
    assert torch.equal(token, expected[0])
    torch.testing.assert_close(logprob, expected[1], rtol=1e-6, atol=5e-6)


def test_logprob_against_fp64(backend, device):
    hidden, weight, bias, key = make_case(50, 64, 500, torch.float16, device)
    token, logprob = sample(hidden, weight, bias, temperature=0.7, key=key, backend=backend)
    logits = hidden.double() @ weight.double().t() + bias.double()
    truth = (logits / 0.7).log_softmax(1).gather(1, token[:, None]).squeeze(1)
    torch.testing.assert_close(logprob.double(), truth, rtol=1e-5, atol=1e-5)


def test_a_width_that_no_block_divides(backend, device):
    hidden, weight, bias, key = make_case(7, 71, 200, device=device)
    expected = draw_from_logits(hidden @ weight.t() + bias, 1.0, key)
    assert torch.equal(sample(hidden, weight, bias, key=key, backend=backend)[0], expected[0])


def test_guidance_on_hidden_states_is_guidance_on_logits(backend, device):
    cond, weight, bias, key = make_case(200, 32, 500, device=device)
    uncond = cond.flip(0)
    pair = (half @ weight.t() + bias for half in (cond, uncond))
    expected = guided_sample(*pair, guidance_scale=2.5, temperature=1.0, key=key, backend="torch")
    token, logprob = sample(3.5 * cond - 2.5 * uncond, weight, bias, key=key, backend=backend)
    assert torch.equal(token, expected[0])
    torch.testing.assert_close(logprob, expected[1], rtol=1e-4, atol=1e-4)


@pytest.fixture
def small_blocks(monkeypatch):
    """Make a block hold that many rows of fp32 logits, in the reference and in the blocked backends."""

    def set_rows(rows, vocab_size):
        monkeypatch.setattr(reference, "REFERENCE_BLOCK_BYTES", rows * vocab_size * 4)
        if checks.extension_missing() is None:
            from hermesflow.kernels import linear_sample_blocked

            small = dict.fromkeys(linear_sample_blocked.WORKSPACE_BYTES, rows * vocab_size * 4)
            monkeypatch.setattr(linear_sample_blocked, "WORKSPACE_BYTES", small)

    return set_rows


@pytest.mark.parametrize("shared_step", [False, True], ids=["step_a_row", "one_step"])
def test_blocks_give_the_same(shared_step, small_blocks, backend, device):
    hidden, weight, bias, key = make_case(10, 16, 300, device=device)
    key = key._replace(step=torch.tensor(4, device=device)) if shared_step else key
    expected = sample(hidden, weight, bias, key=key, backend=backend)
    small_blocks(3, 300)
    token, logprob = sample(hidden, weight, bias, key=key, backend=backend)
    assert torch.equal(token, expected[0])
    torch.testing.assert_close(logprob, expected[1], rtol=1e-5, atol=1e-5)


def test_no_logits_are_kept(small_blocks, peak_bytes, backend, device):
    """A block of 50 rows of logits and a few numbers a row; all 1000 rows would take 20 times the block."""
    if device.type != "cpu":
        pytest.skip("the profiler's records are the CPU's")
    hidden, weight, bias, key = make_case(1000, 4, 256, device=device)
    small_blocks(50, 256)

    def draw():
        return sample(hidden, weight, bias, key=key, backend=backend)

    draw()  # what is made once is not counted
    # The reference holds about six temporaries of a block's size, Triton's interpreter its own copies of the arguments.
    blocks = {"torch": 8, "triton": 8}.get(backend, 1)
    assert peak_bytes(draw) < blocks * 50 * 256 * 4 + 64 * 1000


class FakeStream:
    """Records what a stream waits for; the work itself is done at once."""

    def __init__(self, name, log):
        self.name, self.log, self.num_events = name, log, 0

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.num_events += 1
        return f"draw {self.num_events - 1}"


@needs_extension
def test_draws_beside_matmuls_wait_for_one_another(monkeypatch):
    from hermesflow.kernels import linear_sample_blocked

    log = []
    main, side = FakeStream("main", log), FakeStream("side", log)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    multiply = linear_sample_blocked.multiply
    monkeypatch.setattr(
        linear_sample_blocked, "multiply", lambda *matrices: (log.append("matmul"), multiply(*matrices))
    )
    hidden, weight, _, _ = make_case(8, 16, 300)
    drawn = torch.empty(8, 300)
    blocks = [slice(0, 3), slice(3, 6), slice(6, 8)]
    linear_sample_blocked._draw_beside_matmuls(hidden, weight, blocks, drawn.__setitem__, main, side)
    assert torch.equal(drawn, hidden @ weight.t())
    begin = ["matmul", "side waits for main"]
    assert log == [*begin, *begin, "main waits for draw 0", *begin, "main waits for side"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_holds_both_streams(small_blocks):
    hidden, weight, bias, key = make_case(50, 16, 300, device="cuda")
    small_blocks(7, 300)
    expected = sample(hidden, weight, bias, key=key, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sample(hidden, weight, bias, key=key, backend="cuda")
    graph.replay()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_rows_without_a_distribution(backend, device):
    hidden, weight, bias, key = make_case(4, 8, 200, device=device)
    clean = sample(hidden, weight, bias, key=key, backend=backend)
    hidden[1] = float("nan")
    token, logprob = sample(hidden, weight, bias, key=key, backend=backend)
    assert token[1] == -1 and logprob[1].isnan()
    kept = [0, 2, 3]
    assert torch.equal(token[kept], clean[0][kept]) and torch.equal(logprob[kept], clean[1][kept])
    for temperature in (0.0, 1.0):
        nothing = torch.full_like(bias, float("-inf"))
        token, logprob = sample(hidden, weight, nothing, temperature=temperature, key=key, backend=backend)
        assert (token == -1).all() and logprob.isnan().all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_ids_are_never_drawn(temperature, backend, device):
    """A bias of -inf forbids; whole tiles of forbidden ids lie before, between and after the allowed ones."""
    hidden, weight, bias, key = make_case(40, 8, 700, device=device)
    allowed = torch.tensor([200, 201, 385, 512], device=device)
    forbidden = torch.ones(700, dtype=torch.bool, device=device).index_fill(0, allowed, False)
    bias[forbidden] = float("-inf")
    token, logprob = sample(hidden, weight, bias, temperature=temperature, key=key, backend=backend)
    expected = draw_from_logits(hidden @ weight.t() + bias, temperature, key)
    assert torch.equal(token, expected[0]) and torch.isin(token, allowed).all()
    torch.testing.assert_close(logprob, expected[1], rtol=1e-5, atol=1e-5)


def test_no_gradient(backend, device):
    """The model's hidden states carry a graph; the draw leaves it."""
    hidden, weight, bias, key = make_case(3, 8, 200, device=device)
    assert not sample(hidden.requires_grad_(), weight.requires_grad_(), bias, key=key, backend=backend)[1].requires_grad


def test_argmax_takes_the_lower_id_on_ties(backend, device):
    hidden = torch.ones(2, 4, device=device)
    weight = torch.zeros(400, 4, device=device)
    weight[[129, 130, 300]] = 1.0
    token, _ = sample(hidden, weight, None, temperature=0.0, key=make_key(2, device), backend=backend)
    assert token.tolist() == [129, 129]


def test_argmax_sees_the_last_digit(backend, device):
    """Logits that differ by one rounding have the same exponential."""
    weight = torch.full((200, 1), 1.0, device=device)
    weight[150] = 1.0 + 2.0**-23
    token, _ = sample(
        torch.ones(1, 1, device=device), weight, None, temperature=0.0, key=make_key(1, device), backend=backend
    )
    assert token.item() == 150


def test_non_contiguous_and_empty(backend, device):
    hidden, weight, bias, key = make_case(6, 10, 300, device=device)
    expected = sample(hidden, weight, bias, key=key, backend=backend)
    strided = (hidden.t().contiguous().t(), weight.repeat_interleave(2, 0)[::2], bias.repeat_interleave(2)[::2])
    token, logprob = sample(*strided, key=key, backend=backend)
    assert torch.equal(token, expected[0])
    torch.testing.assert_close(logprob, expected[1], rtol=1e-5, atol=1e-5)
    token, logprob = sample(hidden[:0], weight, bias, key=make_key(0, device), backend=backend)
    assert token.shape == logprob.shape == (0,) and token.dtype == torch.int64


def test_strides_beyond_2_31(backend, device):
    """Rows 2**31 elements apart, in memory that is touched in two places only."""
    hidden, weight, bias, key = make_case(2, 8, 300, torch.float16, device)
    apart = torch.empty(2**31 + 8, dtype=torch.float16, device=device).as_strided((2, 8), (2**31, 1)).copy_(hidden)
    found, expected = (sample(rows, weight, bias, key=key, backend=backend) for rows in (apart, hidden))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_compiles_as_a_whole(backend, device):
    """torch.compile finds no graph break, and the compiled op draws the same."""
    hidden, weight, bias, key = make_case(6, 16, 300, device=device)

    def call(hidden, weight, bias, key):
        return sample(hidden, weight, bias, temperature=0.8, key=key, backend=backend)

    found, expected = torch.compile(call, fullgraph=True)(hidden, weight, bias, key), call(hidden, weight, bias, key)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


@needs_extension
def test_opcheck():
    hidden, weight, bias, key = make_case(6, 16, 300)
    sample(hidden, weight, bias, key=key, backend="cpu")  # loads the op
    torch.library.opcheck(torch.ops.hermesflow.linear_sample.default, (hidden, weight, bias, 0.8, *key, "extension"))


H, W, B = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": H[0]}, r"linear_sample: expected hidden .*\[R, D\], got float32 \[6\]"),
        ({"hidden": H.double()}, r"expected hidden float32 or .*got float64"),
        ({"weight": W[:, :3]}, r"expected hidden \[R, D\] and weight \[V, D\], got \[4, 6\] and \[5, 3\]"),
        ({"weight": W.half()}, r"expected weight float32 .*got float16"),
        ({"weight": W[:0], "bias": None}, r"expected at least one token id, got weight \[0, 6\]"),
        ({"bias": B[:2]}, r"expected bias float32 \[V\] = \[5\].*got float32 \[2\]"),
        ({"temperature": -0.5}, r"expected temperature to be a finite number of at least 0, got -0.5"),
        ({"key": make_key(3)}, r"expected key.seed int64 \[R\] = \[4\].*got int64 \[3\]"),
    ],
)
def test_errors(changes, message):
    arguments = {"hidden": H, "weight": W, "bias": B, "temperature": 1.0, "key": make_key(4)} | changes
    with pytest.raises(ValueError, match=message):
        linear_sample(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("bias"), **arguments)
