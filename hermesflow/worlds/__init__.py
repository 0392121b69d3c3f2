"""Worlds whose truth is known: scenes, their pictures, captions and questions, and an oracle that reads pixels alone."""
