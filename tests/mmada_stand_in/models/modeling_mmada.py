"""A stand-in for MMaDA's published class. Tests and benchmarks accelerate it where the published code is missing.

It lies as in a checkout of MMaDA, so that both are loaded alike. The interface, the names of the weights and the
results of what is replaced are the published ones, oddities included; so is the work that is done: eager torch over
whole sequences under dense masks, logits of the whole vocabulary at all positions in every step. The code is our own.
Source: MMaDA (arXiv 2505.15809) with its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MMadaConfig(SimpleNamespace):
    """A configuration; model_type is the class's."""

    model_type = "mmada"

    def to_dict(self) -> dict:
        """Its values by name."""
        return {**vars(self), "model_type": self.model_type}


class Norm(nn.Module):
    def __init__(self, config: MMadaConfig) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.d_model)), config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
            normed = normed.to(x.dtype)
        return self.weight * normed


class Block(nn.Module):
    def __init__(self, config: MMadaConfig) -> None:
        super().__init__()
        self.config, width = config, config.d_model // config.n_heads
        self.attn_norm, self.ff_norm = Norm(config), Norm(config)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_heads * width, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_heads * width, bias=False)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        normed, heads = self.attn_norm(x), self.config.n_heads
        q, k, v = (
            linear(normed).unflatten(-1, (-1, x.shape[-1] // heads)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self._rotated(q), self._rotated(k)
        k, v = (part.repeat_interleave(heads // self.config.n_kv_heads, dim=1) for part in (k, v))
        dropped = self.config.attention_dropout if self.training else 0.0
        bias = None if bias is None else bias.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped)
        x = x + self.dropout(self.attn_out(attended.transpose(1, 2).flatten(2)))
        normed = self.ff_norm(x)
        return x + self.dropout(self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed)))

    def _rotated(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            half = x.shape[-1] // 2
            angles = torch.arange(x.shape[2], device=x.device)[:, None] / self.config.rope_theta ** (
                torch.arange(half, device=x.device).float() / half
            )
            first, second = x.float().chunk(2, dim=-1)
            cos, sin = angles.cos(), angles.sin()
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Body(nn.Module):
    def __init__(self, config: MMadaConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "emb_drop": nn.Dropout(config.embedding_dropout),
                "ln_f": Norm(config),
                "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
            }
        )

    def forward(self, input_ids: Tensor, attention_bias: Tensor | None) -> Tensor:
        if attention_bias is not None and attention_bias.dtype in (torch.bool, torch.int8):
            attention_bias = torch.where(attention_bias.bool(), 1.0, torch.finfo(torch.float).min)
        x = self.transformer.emb_drop(self.transformer.wte(input_ids))
        for block in self.transformer.blocks:
            x = block(x, attention_bias)
        return self.transformer.ff_out(self.transformer.ln_f(x))


class LLaDAModelLM(nn.Module):
    def __init__(self, config: MMadaConfig) -> None:
        super().__init__()
        self.config, self.model = config, Body(config)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.model.transformer.wte.weight.device

    def forward(self, input_ids: Tensor = None, attention_bias: Tensor | None = None) -> SimpleNamespace:
        """logits [B, L, V]."""
        return SimpleNamespace(logits=self.model(input_ids, attention_bias))


def cosine_schedule(t: Tensor) -> Tensor:
    """Share of tokens that stay masked at time t."""
    return torch.cos(t * math.pi * 0.5)


class MMadaModelLM(LLaDAModelLM):
    """See the file's docstring."""

    @torch.no_grad()
    def t2i_generate(
        self,
        input_ids: Tensor = None,
        uncond_input_ids: Tensor = None,
        attention_mask: Tensor | None = None,
        uncond_attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        timesteps: int = 18,
        guidance_scale: float = 0,
        noise_schedule: Callable = cosine_schedule,
        generator: torch.Generator = None,
        config: object = None,
        seq_len: int = 1024,
        mask_token_id: int = 126336,
        resolution: int = 512,
        codebook_size: int = 8192,
        **kwargs: object,
    ) -> Tensor:
        """Codes [B, seq_len]; input_ids is written to."""
        offset = len(kwargs["uni_prompting"].text_tokenizer)
        image = slice(-seq_len - 1, -1)
        codes = torch.where(input_ids[:, image] == mask_token_id, mask_token_id, input_ids[:, image] - offset)
        for step in range(timesteps):
            if uncond_input_ids is not None and guidance_scale > 0:
                start = resolution + 1
                rows = torch.cat([input_ids, torch.cat([uncond_input_ids[:, :start], input_ids[:, start:]], 1)])
                cond, uncond = self._logits(rows, torch.cat([attention_mask, uncond_attention_mask])).chunk(2)
                logits = (1 + guidance_scale) * cond - guidance_scale * uncond
            else:
                logits = self._logits(input_ids, attention_mask)
            probs = logits[:, image, offset : offset + codebook_size].softmax(-1)
            drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(codes.shape)
            unknown = codes == mask_token_id
            drawn = torch.where(unknown, drawn, codes)
            confidence = probs.gather(-1, drawn[..., None])[..., 0]
            confidence = torch.where(unknown, confidence, torch.finfo(confidence.dtype).max)
            ratio = (step + 1) / timesteps
            count = (seq_len * noise_schedule(torch.tensor(ratio))).floor()
            count = torch.minimum(unknown.sum(1, keepdim=True) - 1, count).clamp(min=1).long()
            temperature = temperature * (1 - ratio)
            noise = torch.zeros_like(confidence).uniform_(0, 1, generator=generator)
            noisy = confidence.log() - temperature * noise.clamp(min=1e-20).log().neg().clamp(min=1e-20).log()
            masking = noisy < noisy.sort(dim=-1).values.gather(1, count)
            input_ids[:, image] = torch.where(masking, mask_token_id, drawn + offset)
            codes = torch.where(masking, mask_token_id, drawn)
        return drawn

    def _logits(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        bias = None if mask is None else (mask[:, :, None] & mask[:, None, :]).bool().unsqueeze(1)
        return self(ids, attention_bias=bias).logits

    @torch.no_grad()
    def mmu_generate(
        self,
        idx: Tensor = None,
        input_embeddings: Tensor = None,
        max_new_tokens: int = 128,
        steps: int = 128,
        block_length: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        eot_token: int | None = None,
        cfg_scale: float = 0.0,
        remasking: str = "low_confidence",
        mask_id: int = 126336,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The prompts [B, L] and what was drawn, [B, L + max_new_tokens]."""
        arguments = (max_new_tokens, steps, block_length, temperature, cfg_scale, remasking, mask_id, attention_mask)
        return self._filled(idx, None, *arguments)

    @torch.no_grad()
    def mmu_generate_fast(
        self,
        idx: Tensor = None,
        input_embeddings: Tensor = None,
        max_new_tokens: int = 128,
        steps: int = 128,
        block_length: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        eot_token: int | None = None,
        cfg_scale: float = 0.0,
        remasking: str = "low_confidence",
        mask_id: int = 126336,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The same; ends after a block whose last tokens are eot_token."""
        arguments = (max_new_tokens, steps, block_length, temperature, cfg_scale, remasking, mask_id, attention_mask)
        return self._filled(idx, eot_token, *arguments)

    def _filled(
        self,
        idx: Tensor,
        eot_token: int | None,
        max_new_tokens: int,
        steps: int,
        block_length: int,
        temperature: float,
        cfg_scale: float,
        remasking: str,
        mask_id: int,
        attention_mask: Tensor | None,
    ) -> Tensor:
        batch, length = idx.shape
        if attention_mask is not None and 0.0 not in attention_mask:
            attention_mask = None
        x = torch.full((batch, length + max_new_tokens), mask_id, dtype=torch.long, device=self.device)
        x[:, :length] = idx
        is_prompt = x != mask_id
        num_blocks = max_new_tokens // block_length
        assert max_new_tokens % block_length == 0 and steps % num_blocks == 0
        steps //= num_blocks
        for block in range(num_blocks):
            end = length + (block + 1) * block_length
            to_fill = (x[:, end - block_length : end] == mask_id).sum(1)
            for step in range(steps):
                is_masked = x == mask_id
                if cfg_scale > 0:
                    logits, uncond = self._logits(torch.cat([x, x.masked_fill(is_prompt, mask_id)]), None).chunk(2)
                    logits = uncond + (cfg_scale + 1) * (logits - uncond)
                else:
                    logits = self._logits(x, attention_mask)
                noisy = logits
                if temperature:
                    noise = -torch.rand_like(logits, dtype=torch.float64).log()
                    noisy = logits.double().exp() / noise**temperature
                token = noisy.argmax(-1)
                if remasking == "low_confidence":
                    confidence = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
                elif remasking == "random":
                    confidence = torch.rand(token.shape, device=x.device)
                else:
                    raise NotImplementedError(remasking)
                confidence[:, end:] = float("-inf")
                confidence = confidence.masked_fill(~is_masked, float("-inf"))
                token = torch.where(is_masked, token, x)
                for row in range(batch):
                    count = int(to_fill[row] // steps + (step < to_fill[row] % steps))
                    kept = confidence[row].topk(count).indices
                    x[row, kept] = token[row, kept]
            if eot_token is not None and (x[:, end - 1] == eot_token).all():
                break
        return x
