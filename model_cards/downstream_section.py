"""What a card says of an encoder by its use: fine-tuned on labelled cells, beside the same settings from nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from screformer.model_cards.checkpoint_records import Checkpoint
from screformer.model_cards.markdown import plain, table

Json = Mapping[str, Any]
DOWNSTREAM = "downstream"  # .json beside a checkpoint
MIN_FOLDS = 5  # for a claim
SCORES = {"accuracy": "Accuracy", "macro_f1": "Macro-F1"}
REGRESSION = "logistic_regression"


def downstream_paragraphs(found: Json) -> list[str]:
    """Return a table and the verdicts of each data set, as Markdown.

    Parameters
    ----------
    found
        ``titles`` (system -> title), ``twins`` (pairs of systems that differ in the start alone), and ``tasks``: data
        set -> ``scores`` and ``differences`` as `summarize_pretraining` gives them, and ``num_cells``.
    """
    paragraphs = [
        "Fine-tuned on labelled cells of data that pretraining has not seen, tested on donors or folds that "
        "fine-tuning has not seen, and beside it the same settings from nothing, and a logistic regression on the same "
        "training cells."
    ]
    for name, task in found["tasks"].items():
        scores = task["scores"]["all"]
        rows = [
            [plain(title), *(f"{scores[system][score]['mean']:.3f}" for score in SCORES)]
            for system, title in found["titles"].items()
        ]
        paragraphs += [f"### {plain(name)}", table(("System", *SCORES.values()), rows)]
        paragraphs.append("\n".join(f"- {line}" for line in downstream_verdicts(found, name)))
    return paragraphs


def downstream_verdicts(found: Json, name: str) -> list[str]:
    """Return a sentence each of the twins, and of what they are beside logistic regression, on one data set."""
    rows = {(row["system"], row["less"]): row for row in found["tasks"][name]["differences"] if _is_macro_f1(row)}
    titles = found["titles"]
    pairs = [tuple(pair) for pair in found["twins"]] + [(pair[0], REGRESSION) for pair in found["twins"]]
    return [_verdict(titles[first], titles[second], rows[first, second]) for first, second in pairs]


def _is_macro_f1(row: Json) -> bool:
    return row["score"] == "macro_f1" and row["cells"] == "all"


def _verdict(first: str, second: str, row: Json) -> str:
    runs = f"{row['num_donors']} folds, {row['num_seeds']} seed{'s' if row['num_seeds'] > 1 else ''}"
    figures = f"macro-F1 {row['mean']:+.3f}"
    if row["interval_95"] is None:
        return f"{first} beside {second}: {figures}; one fold is too few for a claim."
    low, high = row["interval_95"]
    figures += f", 95% interval {low:+.3f} to {high:+.3f}"
    if row["num_donors"] < MIN_FOLDS and (low > 0 or high < 0):
        return f"{first} beside {second}: {figures}; {runs}, and {MIN_FOLDS} folds are needed for a claim."
    if low > 0 or high < 0:
        return f"{first} {'beats' if low > 0 else 'loses to'} {second}: {figures} ({runs})."
    return f"{first} ties with {second}: {figures} contains 0, so no difference is claimed ({runs})."


def downstream_verdict(checkpoint: Checkpoint) -> str | None:
    """Return what stands at a card's top: all verdicts on the twins; None where nothing was fine-tuned."""
    found = checkpoint.downstream
    if not found:
        return None
    twins: Sequence[str] = [
        f"{plain(name)}: {downstream_verdicts(found, name)[number]}"
        for name in found["tasks"]
        for number in range(len(found["twins"]))
    ]
    return "\n>\n".join(f"> {line}" for line in ["**Is the pretraining worth it?**", *twins])
