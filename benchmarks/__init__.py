"""Benchmarks: each against the published algorithm, torch.compile and the public peers that are installed."""
