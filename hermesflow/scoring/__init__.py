"""How good candidates are: images by answers about them, captions by likeness to the true one."""
