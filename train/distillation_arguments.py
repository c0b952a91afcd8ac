"""What a distillation can be told beside the settings of every training run: flags, or one YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from screformer.train.arguments import (
    FineTuningDataArguments,
    GeneSpace,
    ModelArguments,
    Preset,
    ScReformerTrainingArguments,
)

# What decides a split; together with the teacher's own split they would contradict it.
SPLIT_SETTINGS = (
    "exclude_labels", "group_column", "test_groups", "validation_groups", "validation_fraction", "test_fraction",
)  # fmt: skip
DEFAULT_STUDENT: Preset = "tiny"


@dataclass
class TeacherArguments:
    """The teacher, and how much of what is learned comes from it (Hinton et al. 2015)."""

    _argument_group_name = "teacher"

    teacher: str = field(metadata={"help": "Folder or Hub id of the fine-tuned classifier to learn from."})
    temperature: float = field(
        default=2.0,
        metadata={"help": "Softens both models' probabilities, so that what the teacher thinks of wrong types counts."},
    )
    teacher_weight: float = field(
        default=0.5,
        metadata={"help": "Share of the teacher in the loss, the rest is the labels'; 1 needs no label, 0 no teacher."},
    )
    teacher_gene_space: GeneSpace | None = field(
        default=None,
        metadata={
            "help": "How the teacher reads a cell, full or expressed, whatever the student does. Default: its own."
        },
    )
    compare_scratch: bool = field(
        default=False,
        metadata={"help": "Train the same student on the labels alone too, and report it beside; takes as long again."},
    )

    def __post_init__(self) -> None:
        """Raise ValueError for a number out of its range."""
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; 1 to 10 are usual")
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(
                f"teacher_weight must be a share from 0 (labels alone) to 1 (teacher alone), got {self.teacher_weight}"
            )


@dataclass
class StudentArguments(ModelArguments):
    """The student: a new model, by default the smallest preset, or a pretrained checkpoint."""

    _argument_group_name = "student"

    checkpoint: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a small pretrained model to start from; without it one is made."},
    )
    preset: Preset | None = field(
        default=None, metadata={"help": f"Size of a new student: tiny, base, large. Default: {DEFAULT_STUDENT}."}
    )

    def with_default_preset(self) -> StudentArguments:
        """Return these settings with the preset that a new student has by default."""
        return replace(self, preset=DEFAULT_STUDENT) if self.checkpoint is None and self.preset is None else self


@dataclass
class DistillationDataArguments(FineTuningDataArguments):
    """The cells: by default the teacher's own parts, so that its test cells test the student too."""

    split: Literal["teacher", "new"] = field(
        default="teacher",
        metadata={
            "help": "teacher: the parts in the teacher's splits.json; new: split as the options here say. Cells that "
            "tested the teacher are never learned from."
        },
    )
    use_unlabelled: bool = field(
        default=False,
        metadata={
            "help": "Learn from the teacher on cells without a label too; if no cell has one, teacher_weight must be 1."
        },
    )

    def __post_init__(self) -> None:
        """Raise ValueError where settings contradict each other."""
        super().__post_init__()
        if self.split not in ("teacher", "new"):
            raise ValueError(f"split must be 'teacher' or 'new', got {self.split!r}")

    def with_split_of_teacher(self, split: dict[str, Any]) -> DistillationDataArguments:  # Any: JSON
        """Return these settings with the columns and groups of a teacher's ``splits.json``.

        Raises
        ------
        ValueError
            A setting asks for another split.
        """
        default_of = {item.name: _default(item) for item in fields(self)}
        given = [name for name in SPLIT_SETTINGS if getattr(self, name) != default_of[name]]
        if self.label_column not in (default_of["label_column"], split["label_column"]):
            given.append("label_column")
        if given:
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise ValueError(
                f"{values} would be ignored: the cells are split as the teacher's were. Leave these settings out, or "
                "split anew with split='new' (--split new)"
            )
        names = ("label_column", "group_column", "test_groups")
        return replace(self, **{name: split[name] for name in names})


def _help_of(name: str) -> Mapping[str, Any]:  # Any: as dataclasses has it
    return ScReformerTrainingArguments.__dataclass_fields__[name].metadata


def _default(item: Any) -> Any:  # Any: a dataclass field and its default
    return item.default_factory() if callable(item.default_factory) else item.default


@dataclass
class DistillationArguments(ScReformerTrainingArguments):
    """Defaults of distillation: many epochs over few batches, as a small student learns slowly and is cheap."""

    output_dir: str | None = field(
        default="distilled",
        metadata={"help": "Folder for the checkpoint and the results; an interrupted run in it is resumed."},
    )
    num_train_epochs: float = field(default=30.0, metadata=_help_of("num_train_epochs"))
    learning_rate: float = field(default=1e-3, metadata=_help_of("learning_rate"))
    per_device_train_batch_size: int = field(default=32, metadata=_help_of("per_device_train_batch_size"))
    per_device_eval_batch_size: int = field(default=32, metadata=_help_of("per_device_eval_batch_size"))
    metric_for_best_model: str | None = field(default="eval_accuracy", metadata=_help_of("metric_for_best_model"))
