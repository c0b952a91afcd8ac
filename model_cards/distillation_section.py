"""What a model card says of a checkpoint that was distilled: from what, how, and how it does beside its teacher."""

from __future__ import annotations

from collections.abc import Iterator

from screformer.model_cards.checkpoint_records import Checkpoint, Json
from screformer.model_cards.markdown import format_share, format_value, plain, table
from screformer.train.result_files import read_json

DISTILLATION = "distillation"
REPORT_FILE = "distillation.json"


def is_distilled(checkpoint: Checkpoint) -> bool:
    """Return whether another model taught this one."""
    return checkpoint.training.get("task") == DISTILLATION


def distillation_paragraphs(checkpoint: Checkpoint) -> Iterator[str]:
    """Give the teacher and its share in the loss, and both models' scores; nothing for other checkpoints."""
    if not is_distilled(checkpoint):
        return
    teacher = checkpoint.training["teacher"]
    yield (
        f"It was distilled from {format_value(teacher['name'])} ({format_value(teacher['num_parameters'])} parameters; "
        f"SHA-256 of its weights {plain(teacher['weights_sha256'])}), as Hinton et al. 2015 do it: of the loss, a "
        f"share of {format_value(teacher['teacher_weight'])} was the divergence from the teacher's probabilities at "
        f"temperature {format_value(teacher['temperature'])}, the rest cross-entropy on the labels. The teacher's own "
        f"training is in its card."
    )
    path = checkpoint.folder / REPORT_FILE
    if path.exists():
        yield from _comparison(read_json(path))


def _comparison(report: Json) -> Iterator[str]:
    rows = [
        (
            plain(name).capitalize(),
            *(format_share(facts.get(score)) for score in ("accuracy", "macro_f1", "agreement")),
            format_value(facts["parameters"]),
            f"{facts['cells_per_second']:,.1f}",
        )
        for name, facts in report["models"].items()
    ]
    yield table(("Model", "Accuracy", "Macro-F1", "Agreement", "Parameters", "Cells/s"), rows)
    yield (
        f"On the {format_value(report['num_cells'])} validation cells, which chose the best epochs: no test. Agreement "
        "is the share of cells with the teacher's answer. In the same run the student read "
        f"{report['student_to_teacher']['speed']:.2f} times as many cells a second as the teacher "
        f"({plain(report['timing']['device'])})."
    )
