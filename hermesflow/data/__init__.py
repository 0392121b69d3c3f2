"""Records and pairs, and the files that they come from."""
