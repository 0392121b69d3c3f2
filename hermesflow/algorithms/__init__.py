"""Preference training: pairs as span trees, the frozen reference, and the losses."""
