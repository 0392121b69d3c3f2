"""MAGVIT-v2's image tokenizer, which lives in engine/image_tokenizers/magvit.py."""

from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig

__all__ = ["VQTokenizer", "VQTokenizerConfig"]
