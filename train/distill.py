"""Distillation: a fine-tuned classifier teaches a smaller one (Hinton et al. 2015)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np

from screformer.annotation.label_tree import label_names_of
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import Corpus, open_corpus
from screformer.train.argument_parser import parse_arguments
from screformer.train.batch_size import fit_training_batch_size, longest_cell
from screformer.train.cell_dataset import CellDataset
from screformer.train.corpus_columns import describe_corpus, name_cells
from screformer.train.distillation_arguments import (
    DistillationArguments,
    DistillationDataArguments,
    StudentArguments,
    TeacherArguments,
)
from screformer.train.distillation_loss import DistillationLoss, compute_distillation_metrics
from screformer.train.distillation_report import Contest, is_reported, remove_report, report_distillation
from screformer.train.labelled_cells import write_split
from screformer.train.metrics import keep_logits
from screformer.train.seen_cells import add_cells_seen_by
from screformer.train.starting_model import starting_model
from screformer.train.taught_cells import NO_CLASS, TaughtCells, TeacherSplit, choose_taught_cells, read_teacher_split
from screformer.train.taught_dataset import TaughtCellCollator, TaughtCellDataset
from screformer.train.teacher_logits import Facts, TeacherLogits, describe_teacher, load_teacher
from screformer.train.trainable import choose_trainable
from screformer.train.training_run import (
    CellTrainer,
    TrainingResult,
    begin_run,
    describe_run,
    early_stopping,
    log_to_console,
    set_seeds,
    train_and_save,
)

# By name, because run with `python -m` this module is called __main__.
logger = logging.getLogger("screformer.train.distill")

EXAMPLE = """\
  python -m screformer.train.distill --teacher finetuned --corpus corpus --preset tiny --output_dir distilled
  python -m screformer.train.distill --teacher finetuned --corpus corpus --gene_space expressed --compare_scratch
  accelerate launch -m screformer.train.distill --teacher finetuned --corpus corpus --bf16"""

LOGITS_FOLDER, SCRATCH_FOLDER = "teacher_logits", "without_teacher"


class _Lesson(NamedTuple):
    """What is the same for the student and for its twin that has no teacher."""

    corpus: Corpus
    data: DistillationDataArguments
    cells: TaughtCells
    label_names: list[str]
    label_parents: dict[str, str | None] | None
    teacher: Facts
    logits: TeacherLogits
    temperature: float


def distill(
    student: StudentArguments,
    data: DistillationDataArguments,
    teaching: TeacherArguments,
    training: DistillationArguments,
) -> TrainingResult:
    """Train a small classifier on a large one's answers and return its folder and validation metrics.

    The student has the teacher's labels, in its order, and its label tree; cells with a label above the classes cannot
    be learned from. By default it has the teacher's split too: the cells that the
    teacher was tested on are not touched here, see `screformer.train.evaluate`. The teacher reads every cell once, in
    eval mode; its logits stay in ``teacher_logits/`` of the output folder. Best epoch and early stopping go by
    validation accuracy, or by agreement with the teacher where no validation cell has a label. The output folder is a
    checkpoint as fine-tuning leaves it, with ``distillation.json``, ``.md`` and ``.png`` beside: student and teacher
    on the validation cells. A run that was interrupted is resumed; a finished one is returned as it is.

    Raises
    ------
    ValueError
        The teacher is no classifier or has another tokenizer than the corpus, the corpus lacks cells of its split or
        has labels that it does not know, a part is empty, or the output folder holds a run with other settings.
    """
    corpus = open_corpus(data.corpus)
    student = student.with_default_preset()
    teacher_split = read_teacher_split(teaching.teacher)
    if data.split == "teacher":
        data = data.with_split_of_teacher(_needed(teacher_split, teaching.teacher))
    teacher = load_teacher(teaching.teacher, corpus)
    lesson = _plan_lesson(corpus, data, teaching, teacher, teacher_split, training)
    shares = {"temperature": teaching.temperature, "teacher_weight": teaching.teacher_weight}
    record = {
        **describe_run("distillation", training, describe_corpus(corpus), model=student, cells=data),
        "teacher": {**lesson.teacher, **shares},
    }
    begun = begin_run(training, record)
    _ask_teacher(teacher, lesson.logits, training)
    if isinstance(begun, TrainingResult):
        result = begun
    else:
        if training.process_index == 0:
            _write_split(lesson, training, teacher_split)
            remove_report(str(training.output_dir))
        result = _train(lesson, student, training, record, begun, teacher_weight=teaching.teacher_weight)
    alone = _train_scratch(lesson, student, training, record) if teaching.compare_scratch else None
    if training.process_index == 0:
        _report(lesson, result, alone, training)
    return result


def _plan_lesson(
    corpus: Corpus,
    data: DistillationDataArguments,
    teaching: TeacherArguments,
    teacher: ScReformerForCellClassification,
    teacher_split: TeacherSplit | None,
    training: DistillationArguments,
) -> _Lesson:
    """Choose cells and labels, and refuse what does not fit, before anything is written."""
    label_names = label_names_of(teacher.config)
    cells = choose_taught_cells(corpus, data, teacher_split, label_names, teacher=teaching.teacher, seed=training.seed)
    _check_labels(cells, teaching, training)
    facts = describe_teacher(teacher, teaching.teacher, teaching.teacher_gene_space)
    rows = np.concatenate([cells.training_cells(label_names)[0], cells.validation_cells(label_names)[0]])
    logits = TeacherLogits(f"{training.output_dir}/{LOGITS_FOLDER}", corpus, rows, facts)
    tree = teacher.config.label_parents
    return _Lesson(corpus, data, cells, label_names, tree, facts, logits, teaching.temperature)


def _needed(teacher_split: TeacherSplit | None, teacher: str) -> TeacherSplit:
    if teacher_split is None:
        raise ValueError(
            f"split='teacher': teacher {teacher!r} has no splits.json beside it, as fine-tuning leaves it. Give the "
            "folder of a fine-tuned checkpoint, or split the cells anew (--split new)"
        )
    return teacher_split


def _check_labels(cells: TaughtCells, teaching: TeacherArguments, training: DistillationArguments) -> None:
    """Refuse a share for labels where there are none; without labels to validate with, select by agreement."""
    if not len(cells.labelled.split.train) and (teaching.teacher_weight < 1 or teaching.compare_scratch):
        raise ValueError(
            f"teacher_weight={teaching.teacher_weight} and compare_scratch={teaching.compare_scratch} need labels, but "
            "no training cell has one; set teacher_weight=1 without compare_scratch, or name the label_column"
        )
    if not len(cells.labelled.split.validation) and training.metric_for_best_model == "eval_accuracy":
        logger.info("no validation cell has a label: the best epoch is that which agrees most with the teacher")
        training.metric_for_best_model = "eval_agreement"


def _ask_teacher(
    teacher: ScReformerForCellClassification, logits: TeacherLogits, training: DistillationArguments
) -> None:
    """Let every process of the run compute its share of the logits, and wait for the others."""
    teacher.to(training.device)
    logits.fill(
        teacher,
        batch_size=training.per_device_eval_batch_size,
        rank=training.process_index,
        world_size=training.world_size,
        progress=not training.disable_tqdm and training.process_index == 0,
    )
    teacher.to("cpu")
    if training.distributed_state is not None:
        training.distributed_state.wait_for_everyone()


def _write_split(lesson: _Lesson, training: DistillationArguments, teacher_split: TeacherSplit | None) -> None:
    names = name_cells(lesson.corpus)
    more: dict[str, Any] = {}
    for part in ("unlabelled_train", "unlabelled_validation"):
        rows = getattr(lesson.cells, part)
        more |= {part: names[rows].tolist()} if len(rows) else {}
    if lesson.data.split == "teacher" and teacher_split is not None:
        more["seed"] = teacher_split["seed"]
    write_split(lesson.corpus, lesson.cells.labelled, lesson.data, training, more=more)


def _train(
    lesson: _Lesson,
    student: StudentArguments,
    training: DistillationArguments,
    record: Mapping[str, Any],
    checkpoint: str | None,
    *,
    teacher_weight: float,
) -> TrainingResult:
    """Train one student, from its checkpoint if it was interrupted."""
    training = copy(training)  # a batch size that is found here stays here
    set_seeds(training)
    corpus, label_names = lesson.corpus, lesson.label_names
    model = starting_model(
        ScReformerForCellClassification,
        corpus.tokenizer(),
        student,
        label_names=label_names,
        head={"label_parents": lesson.label_parents, "calibration": None},  # what it starts from may have others
    )
    batch = fit_training_batch_size(training, model, longest=longest_cell(CellDataset(corpus)))
    model = choose_trainable(model, student, training)
    rows, class_ids = lesson.cells.training_cells(label_names)
    if teacher_weight == 0:  # a cell without a label has nothing to say
        rows, class_ids = rows[class_ids != NO_CLASS], class_ids[class_ids != NO_CLASS]
    selecting, selecting_ids = lesson.cells.validation_cells(label_names)
    trainer = CellTrainer(
        model=model,
        args=training,
        train_dataset=TaughtCellDataset(corpus, rows, class_ids=class_ids, teacher_logits=lesson.logits),
        eval_dataset=TaughtCellDataset(corpus, selecting, class_ids=selecting_ids, teacher_logits=lesson.logits),
        data_collator=TaughtCellCollator.from_config(
            model.config, gene_dropout=lesson.data.gene_dropout, seed=training.seed
        ),
        eval_data_collator=TaughtCellCollator.from_config(model.config, seed=training.seed),
        processing_class=corpus.tokenizer(),
        compute_loss_func=DistillationLoss(
            lesson.temperature, teacher_weight, label_smoothing=training.label_smoothing_factor
        ),
        compute_metrics=compute_distillation_metrics,
        preprocess_logits_for_metrics=keep_logits,
        callbacks=early_stopping(training),
    )
    return train_and_save(
        trainer,
        {**record, **batch},
        checkpoint=checkpoint,
        held_out_name="validation",
        scores=("accuracy", "macro_f1", "agreement"),
        corpus=corpus,
        used_rows=np.concatenate([rows, selecting]),
    )


def _train_scratch(
    lesson: _Lesson, student: StudentArguments, training: DistillationArguments, record: Mapping[str, Any]
) -> TrainingResult:
    """Train the student's twin on the labels alone: same start, same cells in the same order, same epochs."""
    alone = copy(training)
    alone.output_dir = f"{training.output_dir}/{SCRATCH_FOLDER}"
    twin = {
        **record,
        "task": "fine-tuning",
        "training": alone.to_dict(),
        "teacher": {"weights_sha256": None, "teacher_weight": 0.0},
    }
    begun = begin_run(alone, twin)
    if isinstance(begun, TrainingResult):
        return begun
    return _train(lesson, student, alone, twin, begun, teacher_weight=0.0)


def _report(
    lesson: _Lesson, result: TrainingResult, alone: TrainingResult | None, training: DistillationArguments
) -> None:
    """Compare the models and say what the student's index of seen cells owes to the teacher, unless that was done."""
    models = {"teacher": lesson.teacher["name"], "student": str(result.output_dir)}
    if alone is not None:
        models["without teacher"] = str(alone.output_dir)
    contest = Contest(models, lesson.teacher["gene_space"])
    if is_reported(result.output_dir, contest):
        return
    add_cells_seen_by(lesson.teacher["name"], result.output_dir, lesson.corpus)
    rows, class_ids = lesson.cells.validation_cells(lesson.label_names)
    report_distillation(result.output_dir, contest, lesson.corpus, rows, class_ids, lesson.logits, training)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, distill, and log where the results are."""
    teaching, data, student, training = parse_arguments(
        [TeacherArguments, DistillationDataArguments, StudentArguments, DistillationArguments],
        argv,
        program="python -m screformer.train.distill",
        description="Let a fine-tuned classifier teach a smaller one. The test cells stay untouched: see "
        "train.evaluate.",
        example=EXAMPLE,
    )
    log_to_console(training)
    try:
        result = distill(student, data, teaching, training)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    logger.info("checkpoint and results: %s", result.output_dir)


if __name__ == "__main__":
    main()
