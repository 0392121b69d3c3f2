"""How images and text are drawn, one file a kind."""
