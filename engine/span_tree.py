"""SpanTree and what goes with it, which live in kernels/span_tree.py."""

from hermesflow.kernels.span_tree import AttentionGroup, Span, SpanTree

__all__ = ["AttentionGroup", "Span", "SpanTree"]
