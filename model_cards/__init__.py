"""The card that travels with a checkpoint."""
