"""Whether self-play improves the model: runs of it and of its controls, and what they show (`hermesflow study`)."""
