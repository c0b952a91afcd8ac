"""How far a model's probabilities and error rates can be trusted, as sections of its card say it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from screformer.model_cards.markdown import table


def confidence_paragraphs(model: Mapping[str, Any]) -> list[str]:
    """Return what asking for an error rate gave on the test cells; nothing of a model that is not calibrated."""
    answers = model.get("answers")
    if not answers:
        return []
    rows = [
        (f"{row['asked']:.0%}", "cannot be vouched for", "")
        if row["error"] is None
        else (f"{row['asked']:.0%}", f"{row['error']:.1%}", f"{row['answered']:.1%}")
        for row in answers
    ]
    return [
        "### Error rates",
        "`screformer annotate --max-error` answers only the cells that are sure enough. On the test cells:",
        table(("Wrong answers, at most", "Wrong of the answered", "Answered"), rows),
    ]


def calibration_limitations(model: Mapping[str, Any]) -> Iterable[str]:
    """Give a sentence on the calibration error, if it was measured."""
    error = model.get("expected_calibration_error")
    if error is None:
        return
    calibration = model.get("calibration", {})
    if "temperatures" not in calibration:
        yield f"Its probabilities were not calibrated: the expected calibration error on the test set is {error:.3f}."
        return
    finest = calibration["levels"][-1]
    yield (
        "Its probabilities were calibrated on cells that were held out; on the test set the expected calibration error "
        f"is {finest['expected_calibration_error']:.3f} (without calibration {finest['before']:.3f}). On cells of "
        "another kind, probabilities and error rates are not what they say."
    )
