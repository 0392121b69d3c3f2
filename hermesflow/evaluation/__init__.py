"""What a model can do, measured, with intervals and paired changes."""
