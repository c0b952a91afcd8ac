"""Fine-tuning on labelled cells: predict the cell type (paper, sections 2.5, 2.8 and 2.9)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import set_seed

from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import Corpus, open_corpus
from screformer.train.arguments import (
    FineTuningArguments,
    FineTuningDataArguments,
    ModelArguments,
    parse_arguments,
)
from screformer.train.batch_size import fit_training_batch_size, longest_cell
from screformer.train.cell_dataset import CellDataset
from screformer.train.collator import CellCollator
from screformer.train.corpus_columns import describe_corpus, name_cells, read_column
from screformer.train.figures import plot_proportions
from screformer.train.metrics import compute_cell_type_metrics, keep_logits
from screformer.train.result_files import write_json
from screformer.train.splits import Split, split_by_group, split_cells
from screformer.train.starting_model import starting_model
from screformer.train.training_run import (
    CellTrainer,
    TrainingResult,
    begin_run,
    describe_run,
    early_stopping,
    leave_process_group,
    log_to_console,
    train_and_save,
)

# By name, because run with `python -m` this module is called __main__.
logger = logging.getLogger("screformer.train.finetune")

EXAMPLE = """\
  python -m screformer.train.finetune --corpus corpus --checkpoint pretrained --group_column donor --test_groups human4
  python -m screformer.train.finetune finetune.yaml --learning_rate 3e-4
  accelerate launch -m screformer.train.finetune --corpus corpus --checkpoint pretrained --bf16"""

SPLITS_FILE, PROPORTIONS_FILE = "splits.json", "cell_types.png"


class LabelledCells(NamedTuple):
    """A corpus's labelled cells: row numbers in it, label and group of each, and their parts."""

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.str_]
    groups: npt.NDArray[np.str_] | None
    split: Split


def finetune(
    model_arguments: ModelArguments, data: FineTuningDataArguments, training: FineTuningArguments
) -> TrainingResult:
    """Train a cell type classifier and return its folder and validation metrics.

    The cells are split as `data` says, and ``splits.json`` keeps the names of each part's cells. Validation accuracy
    selects the best epoch and decides when to stop. The test cells are not touched here: see
    `screformer.train.evaluate`. Labels are those of the training part; validation cells with another label are left
    out, with a logged warning. A run that was interrupted in `training.output_dir` is resumed; a finished one is
    returned as it is.

    Raises
    ------
    ValueError
        A column is not in the corpus, there are fewer than two labels, a part is empty, the checkpoint belongs to
        another tokenizer than the corpus, or the output folder holds a run with other settings.
    """
    corpus = open_corpus(data.corpus)
    record = describe_run("fine-tuning", training, describe_corpus(corpus), model=model_arguments, cells=data)
    begun = begin_run(training, record)
    if isinstance(begun, TrainingResult):
        return begun
    cells = _split_labelled_cells(corpus, data, training.seed)
    label_names = sorted(set(cells.labels[cells.split.train].tolist()))
    if len(label_names) < 2:
        raise ValueError(f"label_column={data.label_column!r} has the labels {label_names} in training; two are needed")
    if training.process_index == 0:
        _write_split(corpus, cells, data, training)
    set_seed(training.seed)
    model = starting_model(
        ScReformerForCellClassification, corpus.tokenizer(), model_arguments, label_names=label_names
    )
    batch = fit_training_batch_size(training, model, longest=longest_cell(CellDataset(corpus)))
    trainer = _make_trainer(model, corpus, cells, data, training)
    return train_and_save(
        trainer,
        {**record, **batch},
        checkpoint=begun,
        held_out_name="validation",
        scores=("accuracy", "macro_f1"),
        corpus=corpus,
        used_rows=cells.rows[np.concatenate([cells.split.train, cells.split.validation])],
    )


def _split_labelled_cells(corpus: Corpus, data: FineTuningDataArguments, seed: int) -> LabelledCells:
    labels = read_column(corpus, data.label_column, argument="label_column")
    is_used = (labels != "") & ~np.isin(labels, np.array(data.exclude_labels, dtype=np.str_))
    rows = np.flatnonzero(is_used)
    if len(rows) < len(labels):
        logger.info(
            "%d of %d cells have no label or an excluded one and are left out", len(labels) - len(rows), len(labels)
        )
    labels = labels[rows]
    groups = None
    if data.group_column is None:
        fractions = (1 - data.validation_fraction - data.test_fraction, data.validation_fraction, data.test_fraction)
        split = split_cells(labels, fractions=fractions, seed=seed)
    else:
        groups = read_column(corpus, data.group_column, argument="group_column")[rows]
        split = split_by_group(
            labels,
            groups,
            test_groups=data.test_groups,
            validation_groups=data.validation_groups or None,
            validation_fraction=data.validation_fraction,
            seed=seed,
        )
    return LabelledCells(rows, labels, groups, _drop_unseen(split, labels))


def _drop_unseen(split: Split, labels: npt.NDArray[np.str_]) -> Split:
    """Return the split without validation cells whose label training does not have."""
    is_seen = np.isin(labels[split.validation], labels[split.train])
    unseen = sorted(set(labels[split.validation[~is_seen]].tolist()))
    if unseen:
        logger.warning(
            "%d validation cells are left out: training has no cell with their labels %s", (~is_seen).sum(), unseen
        )
    if not is_seen.any():
        raise ValueError(
            "the validation part is empty, and nothing could select the best epoch; choose a larger "
            "validation_fraction or other validation_groups"
        )
    return split._replace(validation=split.validation[is_seen])


def _write_split(
    corpus: Corpus, cells: LabelledCells, data: FineTuningDataArguments, training: FineTuningArguments
) -> None:
    """Write splits.json, and the figure of cell types in each group or part."""
    cell_names = name_cells(corpus)[cells.rows]
    parts = cells.split._asdict()
    write_json(
        f"{training.output_dir}/{SPLITS_FILE}",
        {
            "label_column": data.label_column,
            "group_column": data.group_column,
            "test_groups": data.test_groups,
            "seed": training.seed,
            "num_cells": {name: len(rows) for name, rows in parts.items()},
            **{name: cell_names[rows].tolist() for name, rows in parts.items()},
        },
    )
    counts: dict[str, dict[str, int]] = {}
    if cells.groups is None:
        members = {name: cells.labels[rows] for name, rows in parts.items()}
    else:
        members = {name: cells.labels[cells.groups == name] for name in sorted(set(cells.groups.tolist()))}
    for name, labels in members.items():
        present, numbers = np.unique(labels, return_counts=True)
        counts[name] = dict(zip(present.tolist(), numbers.tolist(), strict=True))
    plot_proportions(
        counts,
        f"{training.output_dir}/{PROPORTIONS_FILE}",
        title=data.label_column,
        group_name=data.group_column or "part",
    )


def _make_trainer(
    model: ScReformerForCellClassification,
    corpus: Corpus,
    cells: LabelledCells,
    data: FineTuningDataArguments,
    training: FineTuningArguments,
) -> CellTrainer:
    def collator(gene_dropout: float) -> CellCollator:
        return CellCollator.from_config(
            model.config,
            gene_dropout=gene_dropout,
            label_column=data.label_column,
            label2id=model.config.label2id,
            seed=training.seed,
        )

    return CellTrainer(
        model=model,
        args=training,
        train_dataset=CellDataset(corpus, cells.rows[cells.split.train], columns=[data.label_column]),
        eval_dataset=CellDataset(corpus, cells.rows[cells.split.validation], columns=[data.label_column]),
        data_collator=collator(data.gene_dropout),
        eval_data_collator=collator(0.0),
        processing_class=corpus.tokenizer(),
        compute_metrics=compute_cell_type_metrics,
        preprocess_logits_for_metrics=keep_logits,
        callbacks=early_stopping(training),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, fine-tune, and log where the results are."""
    data, model, training = parse_arguments(
        [FineTuningDataArguments, ModelArguments, FineTuningArguments],
        argv,
        program="python -m screformer.train.finetune",
        description="Fine-tune scReformer-BERT on labelled cells. The test cells stay untouched: see train.evaluate.",
        example=EXAMPLE,
    )
    log_to_console(training)
    try:
        result = finetune(model, data, training)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    logger.info("checkpoint and results: %s", result.output_dir)
    leave_process_group()


if __name__ == "__main__":
    main()
