"""Suites of prompts that others publish: their images in the layout that their own judges read, and their results."""
