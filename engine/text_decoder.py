"""The decoder of captions and answers, which lives in engine/decoders/text.py."""

from hermesflow.engine.decoders.text import QuestionIds, SamplingParams, TextDecoder

__all__ = ["QuestionIds", "SamplingParams", "TextDecoder"]
