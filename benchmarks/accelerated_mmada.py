"""The cases of `hermesflow bench drop-in --family mmada`: t2i_generate and mmu_generate of MMadaModelLM, as
inference_t2i.py and inference_mmu.py of MMaDA call them; see accelerated.py."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from hermesflow.benchmarks import causal_models, masked_tasks
from hermesflow.benchmarks.accelerated_showo import Calls
from hermesflow.benchmarks.causal_models import NUM_SPECIAL
from hermesflow.benchmarks.masked_tasks import TASK_SHAPES
from hermesflow.drop_in import accelerate
from hermesflow.engine.mask_schedule import num_to_mask
from hermesflow.engine.model_work import ModelWork, Work
from hermesflow.engine.transformer import TransformerConfig
from hermesflow.models.mmada import SAMPLING

_NUM_PROMPTS = 4
_OPTIONS = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "block_group_size": 1, "block_type": "llama", "embedding_dropout": 0.0, "eos_token_id": 0, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "cpu",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "max_sequence_length": 4096, "mlp_ratio": 4, "multi_query_attention": None,
    "pad_token_id": 0, "precision": None, "residual_dropout": 0.0, "rms_norm_eps": 1e-5, "rope": True,
    "rope_full_precision": True, "rope_theta": 500_000.0, "scale_logits": False, "use_cache": False,
    "weight_tying": False,
}  # fmt: skip
"""Of LLaDA's configuration, as MMaDA's checkpoints have them."""


class MMaDACalls(Calls):
    """Calls of one model; its shapes are those of causal_models.py and masked_tasks.py."""

    CASES = ("t2i_generate", "mmu_generate")

    def __init__(self, published: type[nn.Module], shape_name: str, device: torch.device, dtype: torch.dtype) -> None:
        sizes, self.shape, self.device = causal_models.SHAPES[shape_name], TASK_SHAPES[shape_name], device
        self.layout = masked_tasks.FAMILIES["mmada"].layout(sizes)
        settings = {
            "d_model": sizes.hidden_size, "n_layers": sizes.num_layers, "n_heads": sizes.num_heads,
            "n_kv_heads": sizes.num_heads, "mlp_hidden_size": sizes.mlp_size, "mask_token_id": self.layout.mask_id,
            "embedding_size": self.layout.vocab_size, "vocab_size": self.layout.vocab_size,
        }  # fmt: skip
        config = sys.modules[published.__module__].MMadaConfig(**_OPTIONS, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.policy = published(config).eval().to(device, dtype)
        self.policy.config.use_cache = False  # which the published class reads, and transformers 5 leaves out
        accelerate(self.policy)
        self.head = self.policy.model.transformer.ff_out
        shared: TransformerConfig = self.policy.t2i_generate.acceleration.transformer().config
        self.work = ModelWork(config=shared, layout=self.layout, dtype=dtype)
        self._make_inputs(torch.Generator().manual_seed(0), sizes.text_vocab_size)

    def has(self, name: str) -> bool:
        """Both."""
        return True

    def passes(self, name: str) -> list[Work]:
        """What the exact algorithm needs at least."""
        layout, shape = self.layout, self.shape
        if name == "t2i_generate":
            lengths = [shape.text_len + 3 + layout.image_length, 3 + layout.image_length]
            tokens = layout.num_image_tokens
            unknown = [tokens, *num_to_mask(tokens, SAMPLING.num_steps)[:-1]]
            return [
                self._pass([(_NUM_PROMPTS, lengths[0]), (_NUM_PROMPTS if step else 1, lengths[1])],
                           _NUM_PROMPTS * masked, layout.codebook_size)
                for step, masked in enumerate(unknown)
            ]  # fmt: skip
        length, before = shape.caption_len, self._asked.shape[1]
        return [self._pass([(1, before + length)], left, layout.vocab_size) for left in range(length, 0, -2)]

    def items(self, name: str) -> dict[str, int]:
        """What a call makes."""
        return {"images": _NUM_PROMPTS} if name == "t2i_generate" else {"tokens": self.shape.caption_len}

    def describe(self, name: str) -> str:
        """How much a call is."""
        tokens, length = self.layout.num_image_tokens, self.shape.caption_len
        return {
            "t2i_generate": f"MMaDA, {_NUM_PROMPTS} prompts, {tokens} tokens, {SAMPLING.num_steps} steps, guidance "
            f"{SAMPLING.guidance_scale:g}",
            "mmu_generate": f"MMaDA, {length} tokens in {length // 2} steps, one image of {tokens} tokens",
        }[name]

    def _make_inputs(self, generator: torch.Generator, text_vocab_size: int) -> None:
        shape, layout, device = self.shape, self.layout, self.device
        texts = torch.randint(NUM_SPECIAL, text_vocab_size, (_NUM_PROMPTS, shape.text_len), generator=generator)
        rows, masks = [], []
        for text in (texts.tolist(), [[]] * _NUM_PROMPTS):
            prompts = [layout.text_prompt(ids) for ids in text]
            pads = [shape.padded_to - len(ids) for ids in prompts]
            image = layout.image([-1] * layout.num_image_tokens)
            rows.append(torch.tensor([[layout.pad] * n + ids + image for n, ids in zip(pads, prompts, strict=True)]))
            masks.append((torch.arange(rows[-1].shape[1]) >= torch.tensor(pads)[:, None]).long())
        self._rows, self._masks = [part.to(device) for part in rows], [part.to(device) for part in masks]
        codes = torch.randint(layout.codebook_size, (layout.num_image_tokens,), generator=generator).tolist()
        self._asked = torch.tensor([layout.asked(codes, texts[0].tolist())], device=device)

    def _t2i_generate(self, num_steps: int | None = None) -> Tensor:
        layout = self.layout
        return self._method(self.policy, "t2i_generate")(
            self._rows[0].clone(), self._rows[1], self._masks[0], self._masks[1],
            timesteps=num_steps or SAMPLING.num_steps, guidance_scale=SAMPLING.guidance_scale,
            seq_len=layout.num_image_tokens, mask_token_id=layout.mask_id, resolution=self.shape.padded_to - 1,
            codebook_size=layout.codebook_size, uni_prompting=SimpleNamespace(text_tokenizer=range(layout.code_offset)),
        )  # fmt: skip

    def _mmu_generate(self) -> list[Tensor]:
        length = self.shape.caption_len
        found = self._method(self.policy, "mmu_generate")(
            self._asked, max_new_tokens=length, steps=length // 2, block_length=length, mask_id=self.layout.mask_id
        )
        return list(found[0, -length:])

    def _pass(self, spans: list[tuple[int, int]], head_rows: int, head_size: int) -> Work:
        return self.work.one_pass([(*span, 0, False) for span in spans], 0, head_rows, head_size)
