"""What a reader sees of a checkpoint: its card, and the report of the run that made it."""
