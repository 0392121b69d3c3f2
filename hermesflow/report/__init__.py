"""What a run measured, as tables in the terminal and as a page."""
