"""Measuring screformer against rivals and against time."""
