"""scReformer-BERT: a Reformer that reads every gene of a cell."""

__version__ = "0.1.0"
