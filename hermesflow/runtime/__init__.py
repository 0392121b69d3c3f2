"""What every room stands on: whole files, processes, checkpoints, logs, progress, seeds. Knows no model."""
