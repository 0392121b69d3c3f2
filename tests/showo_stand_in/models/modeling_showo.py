"""A stand-in for Show-o's published class. Tests and benchmarks accelerate it where the published code is missing.

It lies as in a checkout of Show-o or HermesFlow, so that both are loaded alike. The interface, the names of the weights
and the results are the published ones, oddities included; so is the work that is done: eager torch over whole sequences
under dense masks, logits of the whole vocabulary at all positions, and nothing kept from one step or token to the next.
The code is our own. Attention is torch's own operation, as the published class chooses it with any torch that has it.
Source: Show-o (arXiv 2408.12528) and HermesFlow (arXiv 2502.12148) with their code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

IGNORED = -100
PHI_DEFAULTS = {
    "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
    "rope_scaling": None, "max_position_embeddings": 2048, "attention_dropout": 0.0, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0, "num_key_value_heads": None,
}  # fmt: skip
"""What a Phi configuration leaves out, as transformers has it."""


class PhiSettings(SimpleNamespace):
    """A Phi configuration."""

    def to_dict(self) -> dict:
        """Its values by name."""
        return dict(vars(self))


class Rotary(nn.Module):
    """Cosines and sines of the first positions, of twice dim / 2 angles."""

    def __init__(self, dim: int, num_positions: int, base: float) -> None:
        super().__init__()
        self.dim, self.base = dim, base
        angles = torch.arange(num_positions).float()[:, None] / base ** (torch.arange(0, dim, 2).float() / dim)
        angles = torch.cat([angles, angles], dim=1)
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotates the first dim of each head of x [B, H, L, D]."""
        cos, sin = self.cos_cached[: x.shape[2]].to(x.dtype), self.sin_cached[: x.shape[2]].to(x.dtype)
        turned, kept = x[..., : self.dim], x[..., self.dim :]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, kept], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: PhiSettings) -> None:
        super().__init__()
        self.config, self.attention_dropout, self.rope_theta = config, config.attention_dropout, config.rope_theta
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.partial_rotary_factor = config.partial_rotary_factor
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size)
        self.q_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
        self.k_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
        dim = int(config.partial_rotary_factor * self.head_dim)
        self.rotary_emb = Rotary(dim, config.max_position_embeddings, config.rope_theta)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotary_emb(self.q_layernorm(q)), self.rotary_emb(self.k_layernorm(k))
        k, v = (part.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=1) for part in (k, v))
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=attention_mask is None and x.shape[1] > 1,
        )
        return self.dense(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: PhiSettings) -> None:
        super().__init__()
        self.config, self.activation_fn = config, ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: PhiSettings) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        normed = self.input_layernorm(x)
        attended = self.resid_dropout(self.self_attn(normed, attention_mask))
        return attended + self.resid_dropout(self.mlp(normed)) + x


class Backbone(nn.Module):
    def __init__(self, config: PhiSettings) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        x = self.embed_dropout(x)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, attention_mask, use_reentrant=True)
            else:
                x = layer(x, attention_mask)
        return self.final_layernorm(x)


class LanguageModel(nn.Module):
    def __init__(self, config: PhiSettings) -> None:
        super().__init__()
        self.config, self.vocab_size = config, config.vocab_size
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def gradient_checkpointing_enable(self) -> None:
        self.model.gradient_checkpointing = True

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None) -> dict[str, Tensor]:
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return {"logits": self.lm_head(self.model(x, attention_mask)).float()}


def cosine_schedule(t: Tensor) -> Tensor:
    """Share of an image that is masked after the share t of the steps."""
    return torch.cos(t * math.pi * 0.5)


class Showo(nn.Module):
    """The published class: constructor, attributes, methods with their defaults, returns and oddities.

    Left out: what no test or benchmark here calls, and everything of the hub.
    """

    def __init__(
        self,
        w_clip_vit,
        vocab_size,
        llm_vocab_size,
        llm_model_path="",
        codebook_size=8192,
        num_vq_tokens=256,
        load_from_showo=True,
        **kwargs,
    ):
        super().__init__()
        self.config = SimpleNamespace(
            w_clip_vit=w_clip_vit,
            vocab_size=vocab_size,
            llm_vocab_size=llm_vocab_size,
            llm_model_path=str(llm_model_path),
            codebook_size=codebook_size,
            num_vq_tokens=num_vq_tokens,
            load_from_showo=load_from_showo,
            mask_token_id=vocab_size - 1,
        )
        self.vocab_size = self.output_size = vocab_size
        self.showo = LanguageModel(phi_config(Path(llm_model_path, "config.json"), vocab_size))
        if w_clip_vit:
            self.mm_projector = nn.Sequential(nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 2048))

    def _logits(self, input_ids, input_embeddings, attention_mask) -> Tensor:
        if input_embeddings is None:
            return self.showo(input_ids=input_ids, attention_mask=attention_mask)["logits"]
        return self.showo(inputs_embeds=input_embeddings, attention_mask=attention_mask)["logits"]

    def forward(
        self,
        input_ids,
        input_embeddings=None,
        attention_mask=None,
        labels=None,
        label_smoothing=0.0,
        batch_size_t2i=0,
        batch_size_lm=0,
        batch_size_mmu=0,
        max_seq_length=128,
        labels_mask_text=None,
        labels_mask_image=None,
        **kwargs,
    ):
        logits = self._logits(input_ids, input_embeddings, attention_mask)
        if labels is None:
            return logits
        image, language = slice(max_seq_length + 1, None), slice(batch_size_t2i, batch_size_t2i + batch_size_lm)
        pairs = [
            (logits[:batch_size_t2i, image], labels[:batch_size_t2i, image]),
            (logits[language, :-1], labels[language, 1:]),
            (logits[-batch_size_mmu:, :-1], labels[-batch_size_mmu:, 1:]),
        ]
        losses = (F.cross_entropy(at.flatten(0, 1), of.flatten(), ignore_index=IGNORED) for at, of in pairs)
        return logits, *losses

    def loss_for_unidpo(
        self,
        input_ids,
        input_embeddings=None,
        attention_mask=None,
        labels=None,
        label_smoothing=0.0,
        batch_size_t2i=0,
        batch_size_mmu=0,
        max_seq_length=128,
    ):
        logits = self._logits(input_ids, input_embeddings, attention_mask)
        if labels is None:
            return None
        image = slice(max_seq_length + 1, None)
        # With batch_size_mmu 0 these are all rows: -0 counts from the front.
        return (
            label_logprobs(logits[:batch_size_t2i, image], labels[:batch_size_t2i, image]),
            label_logprobs(logits[-batch_size_mmu:, :-1], labels[-batch_size_mmu:, 1:]),
        )

    def loss_for_dpo(
        self,
        input_ids,
        input_embeddings=None,
        attention_mask=None,
        labels=None,
        label_smoothing=0.0,
        batch_size_t2i=0,
        max_seq_length=128,
    ):
        logits = self._logits(input_ids, input_embeddings, attention_mask)
        if labels is None:
            return None
        image = slice(max_seq_length + 1, None)
        return label_logprobs(logits[:batch_size_t2i, image], labels[:batch_size_t2i, image])

    def loss_for_dpo_understanding(
        self,
        input_ids,
        input_embeddings=None,
        attention_mask=None,
        labels=None,
        label_smoothing=0.0,
        batch_size_mmu=0,
        max_seq_length=128,
        labels_mask_text=None,
        labels_mask_image=None,
        **kwargs,
    ):
        logits = self._logits(input_ids, input_embeddings, attention_mask)
        return label_logprobs(logits[:, :-1], labels[:, 1:])

    def t2i_generate(
        self,
        input_ids=None,
        uncond_input_ids=None,
        attention_mask=None,
        temperature=1.0,
        timesteps=18,
        guidance_scale=0,
        noise_schedule=cosine_schedule,
        generator=None,
        config=None,
        **kwargs,
    ):
        mask_id, num_tokens = self.config.mask_token_id, config.model.showo.num_vq_tokens
        first_code = config.model.showo.llm_vocab_size + config.model.showo.num_new_special_tokens
        text, image = config.dataset.preprocessing.max_seq_length + 1, slice(-num_tokens - 1, -1)
        guided = uncond_input_ids is not None and guidance_scale > 0
        for step in range(timesteps):
            if guided:
                unguided = torch.cat([uncond_input_ids[:, :text], input_ids[:, text:]], dim=1)
                both = self(torch.cat([input_ids, unguided]), attention_mask=attention_mask)
                cond, uncond = both.chunk(2)
                logits = (1 + guidance_scale) * cond - guidance_scale * uncond
            else:
                logits = self(input_ids, attention_mask=attention_mask)
            probs = logits[:, image, first_code:-1].softmax(dim=-1)
            sampled = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(probs.shape[:2])
            unknown = input_ids[:, image] == mask_id
            sampled = torch.where(unknown, sampled, input_ids[:, image] - first_code)

            ratio = (step + 1) / timesteps
            confidence = torch.where(unknown, probs.gather(2, sampled[..., None])[..., 0], torch.finfo(probs.dtype).max)
            count = (num_tokens * noise_schedule(torch.tensor(ratio))).floor().to(probs.device)
            count = torch.minimum(unknown.sum(dim=1, keepdim=True) - 1, count).clamp(min=1)
            temperature = temperature * (1.0 - ratio)
            noise = torch.empty_like(confidence).uniform_(generator=generator)
            noise = -torch.log((-torch.log(noise.clamp(min=1e-20))).clamp(min=1e-20))
            confidence = confidence.clamp(min=1e-20).log() + temperature * noise
            masked = confidence < confidence.sort(dim=1).values.gather(1, count.long())
            input_ids[:, image] = torch.where(masked, mask_id, sampled + first_code)
        return sampled

    @torch.no_grad()
    def mmu_generate(
        self,
        idx=None,
        input_embeddings=None,
        attention_mask=None,
        max_new_tokens=100,
        temperature=1.0,
        top_k=None,
        eot_token=None,
    ):
        result = []
        for _ in range(max_new_tokens):
            logits = self(idx, input_embeddings=input_embeddings, attention_mask=attention_mask)
            # The new token is seen by no earlier one and sees what the last one saw; the mask loses its first two dims.
            mask = attention_mask.squeeze()
            unseen = torch.full((len(mask), 1), torch.finfo(logits.dtype).min, device=mask.device)
            mask = torch.cat([mask, mask[-1:]])
            attention_mask = torch.cat([mask, torch.cat([unseen, unseen.new_zeros(1, 1)])], dim=1)
            logits = logits[:, -1] / temperature
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits[logits < least] = -math.inf
            token = torch.multinomial(logits.softmax(dim=-1), 1)
            result.append(token[0, 0])
            if self.config.w_clip_vit:
                input_embeddings = torch.cat([input_embeddings, self.showo.model.embed_tokens(token)], dim=1)
            else:
                idx = torch.cat([idx, token], dim=1)
            if eot_token is not None and token.cpu() == eot_token:
                break
        return result

    def save_pretrained(
        self, folder, save_function: Callable | None = None, state_dict=None, safe_serialization: bool = True
    ) -> None:
        """Writes config.json and the model's own weights; as published, the two arguments between are not read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "Showo", **vars(self.config)}
        Path(folder, "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if safe_serialization:
            save_file(self.state_dict(), Path(folder, "pytorch_model.safetensors"), metadata={"format": "pt"})
        else:
            torch.save(self.state_dict(), Path(folder, "pytorch_model.bin"))

    @classmethod
    def from_pretrained(cls, folder) -> Showo:
        """The model of a folder that save_pretrained wrote."""
        config = json.loads(Path(folder, "config.json").read_text())
        model = cls(**{name: value for name, value in config.items() if not name.startswith("_")})
        file = Path(folder, "pytorch_model.safetensors")
        model.load_state_dict(load_file(file) if file.exists() else torch.load(file.with_suffix(".bin")))
        return model.eval()


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the log-probabilities of labels [B, L], of all rows together, under logits [B, L, V]."""
    logits, labels = logits.flatten(0, 1), labels.flatten()
    scored = labels != IGNORED
    return F.log_softmax(logits[scored], dim=-1).gather(1, labels[scored][:, None]).sum()


def phi_config(file: Path, vocab_size: int) -> PhiSettings:
    """Phi's configuration as transformers writes it, with the joint vocabulary and Show-o's norms of q and k."""
    written = json.loads(file.read_text())
    # transformers 5 keeps two of them in a dictionary of their own.
    config = PhiSettings(**PHI_DEFAULTS | (written.get("rope_parameters") or {}) | written)
    config.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
    config.vocab_size, config.qk_layernorm, config.use_cache = vocab_size, True, False
    return config
