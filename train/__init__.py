"""Pretraining, fine-tuning and evaluation."""
