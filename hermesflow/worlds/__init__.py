"""Worlds whose truth is known: scenes, pictures, captions and questions, and an oracle that reads pixels alone."""
