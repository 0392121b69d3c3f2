"""The truth that the engine is held to: whole sequences, dense masks, no cache, one sample at a time, the full head."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import HeadNorm, Transformer, TransformerConfig
from hermesflow.kernels.guided_sample import guided_sample
from hermesflow.kernels.mask_topk import mask_topk
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.token_sample import token_sample

LAYOUT = TokenLayout(text_vocab_size=40, codebook_size=64, num_image_tokens=16, sot=0, eot=1)
FEATURE_LAYOUT = replace(LAYOUT, system_ids=(20, 21, 22))

# What the built-in model, Phi, Llama and Chameleon are made of, each at least once.
MODELS = {
    "sequential": {},
    "parallel-gqa-partial-qknorm": {
        "block": "parallel", "num_kv_heads": 2, "rotary_fraction": 0.5, "qk_norm": True, "activation": "gelu_tanh",
        "head_bias": True,
    },
    "rmsnorm-gated-mqa-tied": {
        "norm": "rmsnorm", "gated": True, "activation": "silu", "num_kv_heads": 1, "bias": False,
        "tie_embeddings": True, "qk_norm": True,
    },
    "post-rmsnorm-headnorm": {
        "norm": "rmsnorm", "gated": True, "activation": "silu", "num_kv_heads": 2, "bias": False, "block": "post",
        "qk_norm_per_head": True,
    },
    "relu2-no-rotary": {"activation": "relu2", "rotary_fraction": 0.0, "num_kv_heads": 2},
}  # fmt: skip


def tiny_model(kind="sequential", layout=LAYOUT, dtype=torch.float32, seed=0):
    """A random transformer with weights large enough for distributions that are far from uniform."""
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "mlp_size": 48}
    generator = torch.Generator().manual_seed(seed)
    transformer = Transformer(TransformerConfig(vocab_size=layout.vocab_size, **(shape | MODELS[kind])))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(mean + 0.25 * torch.randn(parameter.shape, generator=generator))
    return transformer.to(dtype).eval()


def dense_hidden(transformer, token_ids, position_ids, allowed):
    """Hidden states [T, D] of tokens [T] under a dense mask [T, T], written out without the engine's attention."""
    return dense_hidden_of(transformer, transformer.embed.weight[token_ids], position_ids, allowed)


def dense_hidden_of(transformer, x, position_ids, allowed):
    """The same of embeddings x [T, D]."""
    config = transformer.config
    for block in transformer.blocks:
        normed = block.attention_norm(x)
        attended = _attention(block.attention, config, normed, position_ids, allowed)
        if config.block == "parallel":
            x = x + attended + _mlp(block.mlp, config, normed)
        elif config.block == "post":
            x = x + block.attention_norm(_attention(block.attention, config, x, position_ids, allowed))
            x = x + block.mlp_norm(_mlp(block.mlp, config, x))
        else:
            x = x + attended
            x = x + _mlp(block.mlp, config, block.mlp_norm(x))
    return transformer.norm(x)


def _attention(attention, config, x, position_ids, allowed):
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = F.linear(x, attention.qkv.weight, attention.qkv.bias)
    q, k, v = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    out = []
    for head in range(heads):
        group = head * kv_heads // heads
        query = q[:, head * head_dim : (head + 1) * head_dim]
        key = k[:, group * head_dim : (group + 1) * head_dim]
        query = _rotate(_normed(attention.q_norm, query, head), position_ids, config)
        key = _rotate(_normed(attention.k_norm, key, group), position_ids, config)
        scores = (query @ key.T / math.sqrt(head_dim)).masked_fill(~allowed, float("-inf"))
        out.append(scores.softmax(1) @ v[:, group * head_dim : (group + 1) * head_dim])
    return F.linear(torch.cat(out, 1), attention.out.weight, attention.out.bias)


def _normed(norm, x, head):
    if not isinstance(norm, HeadNorm):
        return norm(x)
    centered = x - x.mean(1, keepdim=True)
    return centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight[head] + norm.bias[head]


def _rotate(x, position_ids, config):
    """Rotary embedding as a product of complex numbers."""
    width = config.rotary_dim
    half = width // 2
    frequencies = config.rope_theta ** -(torch.arange(half, dtype=torch.float32) * 2 / max(width, 1))
    # Angles in fp32, as the engine keeps them in every dtype.
    angles = position_ids[:, None].float() * frequencies
    turned = torch.complex(x[:, :half], x[:, half:width]) * torch.complex(angles.cos(), angles.sin())
    return torch.cat([turned.real, turned.imag, x[:, width:]], 1)


def _mlp(mlp, config, x):
    activation = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu2": lambda x: F.relu(x) ** 2,
        "silu": F.silu,
    }[config.activation]
    x = F.linear(x, mlp.up.weight, mlp.up.bias)
    if config.gated:
        x = activation(x[:, : config.mlp_size]) * x[:, config.mlp_size :]
    else:
        x = activation(x)
    return F.linear(x, mlp.down.weight, mlp.down.bias)


def chain_logits(transformer, *spans):
    """Logits [T, V] of one sequence of spans (ids, mode), each of which sees all spans before it."""
    ids = torch.tensor([token for span, _ in spans for token in span])
    allowed = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    start = 0
    for span, mode in spans:
        if mode != "causal":
            first = 0 if mode == "full" else mode
            allowed[start : start + len(span), start + first : start + len(span)] = True
        start += len(span)
    hidden = dense_hidden(transformer, ids, torch.arange(len(ids)), allowed)
    return F.linear(hidden, transformer.head.weight, transformer.head.bias)


@torch.no_grad()
def draw_image(transformer, layout, prompt, seed, params, known_codes=None):
    """Codes of one image by the published loop with its cosine schedule: both guidance halves in full at each step."""
    num_tokens = layout.num_image_tokens
    codes = torch.full((num_tokens,), -1) if known_codes is None else known_codes.clone()
    if (codes >= 0).all():
        return codes
    every = torch.arange(num_tokens)
    seeds = torch.full((num_tokens,), seed)
    image_ids = slice(layout.code_offset, layout.code_offset + layout.codebook_size)
    mask_temperature = params.mask_temperature
    for step in range(params.num_steps):
        ratio = (step + 1) / params.num_steps
        image = [layout.mask_id if code < 0 else code + layout.code_offset for code in codes.tolist()]
        halves = []
        for text in (prompt, []):
            condition = [layout.special("t2i"), layout.sot, *text, layout.eot]
            logits = chain_logits(transformer, (condition, "causal"), ([layout.soi, *image, layout.eoi], "full"))
            halves.append(logits[len(condition) + 1 : -1, image_ids])
        drawn, logprob = guided_sample(
            halves[0],
            halves[1],
            guidance_scale=params.guidance_scale,
            temperature=params.temperature,
            key=RandomKey(seeds, torch.tensor(step), every),
        )
        known = codes >= 0
        codes = torch.where(known, codes, drawn)
        if step == params.num_steps - 1:
            return codes
        num_masked = math.floor(num_tokens * torch.cos(torch.tensor(ratio) * math.pi / 2).item())
        num_masked = max(1, min(int((~known).sum()) - 1, num_masked))
        mask_temperature = (mask_temperature if params.mask_decay == "showo" else params.mask_temperature) * (1 - ratio)
        masked = mask_topk(
            logprob[None],
            known[None],
            torch.tensor([num_masked]),
            temperature=mask_temperature,
            key=RandomKey(seeds[:1], torch.tensor(step), every[:1]),
        )[0]
        codes = torch.where(masked, -1, codes)


def understanding_logits(transformer, layout, image, text):
    """Logits [1 + text, V] of the last token before the text and of the text, after an image.

    The image is a list of codes, or features [F, D]: then the sequence is [mmu, system ids, soi, features, eoi, text],
    causal but for the features, which all tokens see.
    """
    if isinstance(image, list):
        codes = [code + layout.code_offset for code in image]
        image = [layout.special("mmu"), layout.soi, *codes, layout.eoi]
        return chain_logits(transformer, (image, "full"), ([layout.sot, *text], "causal"))[len(image) :]
    before = [layout.special("mmu"), *layout.system_ids, layout.soi]
    embed = transformer.embed.weight
    x = torch.cat([embed[before], image.to(embed), embed[[layout.eoi, *text]]])
    allowed = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    allowed[:, len(before) : len(before) + len(image)] = True
    hidden = dense_hidden_of(transformer, x, torch.arange(len(x)), allowed)[len(before) + len(image) :]
    return F.linear(hidden, transformer.head.weight, transformer.head.bias)


@torch.no_grad()
def answer(transformer, layout, image, question, params, seed, text_only=True):
    """Token ids of one answer about codes or features; the whole sequence is computed again for each token."""
    ids = []
    num_ids = layout.text_vocab_size if text_only else layout.vocab_size
    for step in range(params.max_new_tokens):
        logits = understanding_logits(transformer, layout, image, [*question, *ids])[-1:, :num_ids]
        token, _ = token_sample(
            logits,
            temperature=torch.tensor([float(params.temperature)]),
            top_k=torch.tensor([params.top_k]),
            top_p=torch.tensor([float(params.top_p)]),
            min_p=torch.tensor([float(params.min_p)]),
            key=RandomKey(torch.tensor([seed]), torch.tensor(step), torch.tensor([0])),
        )
        if token.item() == layout.eot:
            break
        ids.append(token.item())
    return ids


@torch.no_grad()
def choice_logprob(transformer, layout, image, question, choice, text_only=True):
    """Log-probability of one choice about codes or features, and of its eot."""
    logits = understanding_logits(transformer, layout, image, [*question, *choice])
    logits = logits[:, : layout.text_vocab_size if text_only else layout.vocab_size].double()
    logprobs = logits[len(question) :].log_softmax(1)
    return sum(logprobs[row, token].item() for row, token in enumerate([*choice, layout.eot]))
