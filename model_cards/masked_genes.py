"""What card and report say of masked genes: the model beside answers that need none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from screformer.model_cards.comparison import MODEL, ROW_TITLES, points

Metrics = Mapping[str, Any]  # of a pretraining's metrics.json

PREFIX = "held_out_"
BY_BIN = f"{PREFIX}by_bin"
BIN_COLUMNS = {
    "accuracy": "Accuracy",
    "gene_majority_accuracy": "Accuracy, gene's commonest bin",
    "loss": "Loss",
    "gene_frequency_loss": "Loss, gene's frequencies",
}


class MaskedGeneRow(NamedTuple):
    """An answer to masked genes: its accuracy, and its cross-entropy if it gives probabilities."""

    title: str
    short_title: str
    accuracy: float | None
    loss: float | None


# Titles, and where accuracy and loss are in metrics.json.
ROWS = (
    (ROW_TITLES[MODEL], "the model", "masked_accuracy", "masked_loss"),
    (
        "Each gene's frequencies in the training cells, or its commonest bin",
        "each gene's commonest bin in the training cells",
        "gene_majority_accuracy",
        "gene_frequency_loss",
    ),
    ("Each gene's mean bin in the training cells", "its mean bin", "gene_mean_accuracy", None),
    ("The cell's commonest visible bin", "the cell's commonest visible bin", "cell_majority_accuracy", None),
    ("The commonest bin of all", "the commonest bin of all", "majority_bin_accuracy", None),
)


def masked_gene_rows(metrics: Metrics) -> list[MaskedGeneRow]:
    """Return the model and the answers without it that were measured; nothing without masked genes."""
    found = [
        MaskedGeneRow(title, short, metrics.get(PREFIX + accuracy), metrics.get(PREFIX + loss) if loss else None)
        for title, short, accuracy, loss in ROWS
    ]
    return [row for row in found if row.accuracy is not None] if found[0].accuracy is not None else []


def masked_gene_sentence(metrics: Metrics) -> str | None:
    """Return how the model stands to every answer without it, whatever the sign; None if there is none."""
    answers = masked_gene_rows(metrics)
    if len(answers) < 2 or answers[0].accuracy is None:
        return None
    gaps = ", ".join(
        f"{points(answers[0].accuracy - row.accuracy)} against {row.short_title} ({row.accuracy:.3f})"
        for row in answers[1:]
        if row.accuracy is not None
    )
    sentence = f"Of the masked genes of held-out cells the model gets {answers[0].accuracy:.3f} right: {gaps}."
    losses = [row.loss for row in answers[:2] if row.loss is not None]
    if len(losses) == 2:
        sentence += f" Its loss is {losses[0]:.3f}; each gene's frequencies alone have {losses[1]:.3f}."
    return f"{sentence} Only expressed genes are masked: zeros never count."


def shown_elsewhere(name: str) -> bool:
    """Return whether a name of metrics.json is in the tables of masked genes, and not to be listed again."""
    return name == BY_BIN or any(name in (f"{PREFIX}{accuracy}", f"{PREFIX}{loss}") for *_, accuracy, loss in ROWS)
