"""Accuracy, macro-F1 and balanced accuracy as an `evaluate` metric that needs no network.

Use the class, or load the file: `evaluate.load("<path of this file>")`.
"""

# `evaluate.load` reads the import lines of this file itself: one `import` a line, nothing relative.
import datasets
import evaluate
from sklearn.metrics import f1_score, recall_score

DESCRIPTION = "Accuracy, macro-F1 and balanced accuracy of predicted cell types."
INPUTS_DESCRIPTION = """
Args:
    predictions: predicted class ids.
    references: true class ids.
Returns:
    accuracy; macro_f1 (mean F1 over the classes that are true or predicted at least once, scikit-learn's rule);
    balanced_accuracy (mean recall over the classes that are true at least once).
"""
CITATION = "Pedregosa et al. 2011, Scikit-learn: Machine Learning in Python, JMLR 12:2825-2830."


class CellTypeMetrics(evaluate.Metric):
    """Accuracy, macro-F1 and balanced accuracy of integer predictions against integer references."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        present = sorted(set(references))
        correct = sum(predicted == true for predicted, true in zip(predictions, references, strict=True))
        return {
            "accuracy": correct / len(references),
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
            "balanced_accuracy": float(
                recall_score(references, predictions, labels=present, average="macro", zero_division=0)
            ),
        }
