"""Using a trained model on new cells."""
