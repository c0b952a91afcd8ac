"""Pretraining on unlabelled cells: predict the masked expression bins (paper, sections 2.6 and 2.7)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce

from screformer.modeling_screformer import ScReformerForMaskedLM
from screformer.tokenization.corpus import Corpus, open_corpus
from screformer.train.argument_parser import parse_arguments
from screformer.train.arguments import (
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
)
from screformer.train.batch_size import fit_training_batch_size, longest_cell
from screformer.train.cell_dataset import CellDataset
from screformer.train.collator import CellCollator
from screformer.train.corpus_columns import describe_corpus, read_column
from screformer.train.figures import MASKED_GENE_ANSWERS
from screformer.train.gene_start import start_gene_embeddings
from screformer.train.masked_gene_metrics import count_gene_bins
from screformer.train.masked_gene_trainer import MaskedGeneTrainer
from screformer.train.splits import Int64Array, hold_out
from screformer.train.starting_model import starting_model
from screformer.train.trainable import choose_trainable
from screformer.train.training_run import (
    TrainingResult,
    begin_run,
    describe_run,
    early_stopping,
    leave_process_group,
    log_to_console,
    set_seeds,
    train_and_save,
)

# By name, because run with `python -m` this module is called __main__.
logger = logging.getLogger("screformer.train.pretrain")

EXAMPLE = """\
  python -m screformer.train.pretrain --corpus corpus --preset tiny --output_dir pretrained
  python -m screformer.train.pretrain pretrain-tiny --corpus corpus
  python -m screformer.train.pretrain pretrain.yaml --num_train_epochs 10
  accelerate launch -m screformer.train.pretrain --corpus corpus --preset large --bf16"""


def pretrain(
    model_arguments: ModelArguments, data: PretrainingDataArguments, training: PretrainingArguments
) -> TrainingResult:
    """Train a masked-bin model on a corpus and return its folder and held-out metrics.

    The cells that the corpus holds out, else a random `held_out_fraction`, are never trained on; their loss, with masks
    that are the same in every epoch, selects the best epoch and decides when to stop. A run that was interrupted in
    `training.output_dir` is resumed; a finished one is returned as it is.

    The result's metrics hold ``held_out_loss``, ``held_out_masked_accuracy`` and beside it what needs no model:
    ``held_out_majority_bin_accuracy`` (always the commonest bin), ``held_out_gene_majority_accuracy`` and
    ``held_out_gene_mean_accuracy`` (each gene's commonest or mean bin in the training cells), and
    ``held_out_gene_frequency_loss`` (the loss of each gene's bin frequencies); ``held_out_by_bin`` has them for each
    true bin. See `screformer.train.masked_gene_metrics`.

    Raises
    ------
    ValueError
        The checkpoint belongs to another tokenizer than the corpus; the output folder holds a run with other settings;
        gene embeddings have two starts, or too few cells for theirs; or a setting is out of its range.
    """
    _check_gene_start(model_arguments, data)
    corpus = open_corpus(data.corpus)
    record = describe_run("pretraining", training, describe_corpus(corpus), model=model_arguments, cells=data)
    begun = begin_run(training, record)
    if isinstance(begun, TrainingResult):
        return begun
    set_seeds(training)
    model = starting_model(ScReformerForMaskedLM, corpus.tokenizer(), model_arguments)
    started: dict[str, Any] = {}
    if data.gene_start != "random":
        training_cells = _split_cells(corpus, data, training.seed)[0]
        started["gene_start"] = start_gene_embeddings(model, corpus, training_cells, seed=training.seed)
    batch = fit_training_batch_size(training, model, longest=longest_cell(CellDataset(corpus)))
    model = choose_trainable(model, model_arguments, training)
    trainer = _make_trainer(model, corpus, data, training)
    return train_and_save(
        trainer,
        {**record, **started, **batch},
        checkpoint=begun,
        held_out_name="held_out",
        scores=("masked_accuracy", *MASKED_GENE_ANSWERS, "majority_bin_accuracy"),
        corpus=corpus,
        used_rows=np.concatenate(_split_cells(corpus, data, training.seed)),
    )


def _check_gene_start(model: ModelArguments, data: PretrainingDataArguments) -> None:
    """Refuse two starts of the gene embeddings."""
    others = {"gene2vec": model.gene2vec, "checkpoint": model.checkpoint}
    given = {name: value for name, value in others.items() if value is not None}
    if data.gene_start != "random" and given:
        raise ValueError(
            f"gene_start={data.gene_start!r} and {given} both bring gene embeddings; leave out one or the other, for "
            "example with --gene_start random"
        )


def _split_cells(corpus: Corpus, data: PretrainingDataArguments, seed: int) -> tuple[Int64Array, Int64Array]:
    """Return (kept, held out) corpus rows: by the corpus's own split if it has one, else drawn at random."""
    rows = _rows_to_learn_from(corpus, data)
    if not corpus.has_split:
        kept, held_out = hold_out(len(rows), fraction=data.held_out_fraction, seed=seed)
        return rows[kept], rows[held_out]
    parts = np.intersect1d(rows, corpus.training), np.intersect1d(rows, corpus.held_out)
    if not len(parts[0]) or not len(parts[1]):
        raise ValueError(
            f"exclude_groups leaves {len(parts[0])} cells to train on and {len(parts[1])} held out, by the split of "
            f"the corpus {corpus.folder}; exclude fewer groups, or build a corpus without hold_out"
        )
    logger.info("held out: %d cells, as the corpus says; held_out_fraction is not used", len(parts[1]))
    return parts


def _make_trainer(
    model: ScReformerForMaskedLM, corpus: Corpus, data: PretrainingDataArguments, training: PretrainingArguments
) -> MaskedGeneTrainer:
    kept, held_out = _split_cells(corpus, data, training.seed)
    cells = CellDataset(corpus, kept)

    def collator(*, deterministic: bool) -> CellCollator:
        return CellCollator.from_config(
            model.config,
            masked_fraction=data.masked_fraction,
            replace_probability=data.replace_probability,
            gene_dropout=0.0 if deterministic else data.gene_dropout,
            seed=training.seed,
            deterministic=deterministic,
        )

    return MaskedGeneTrainer(
        model=model,
        args=training,
        train_dataset=cells,
        eval_dataset=CellDataset(corpus, held_out),
        data_collator=collator(deterministic=False),
        eval_data_collator=collator(deterministic=True),
        processing_class=corpus.tokenizer(),
        gene_bin_counts=_count_gene_bins(cells, model, training),
        callbacks=early_stopping(training),
    )


def _count_gene_bins(cells: CellDataset, model: ScReformerForMaskedLM, training: PretrainingArguments) -> Int64Array:
    """Return the table of all training cells, of which every process has counted its share."""
    counts = count_gene_bins(
        cells,
        num_genes=model.config.num_genes,
        num_bins=model.config.num_bins,
        process=training.process_index,
        num_processes=training.world_size,
        show_progress=not training.disable_tqdm and training.process_index == 0,
    )
    return reduce(torch.from_numpy(counts).to(training.device), reduction="sum").cpu().numpy()


def _rows_to_learn_from(corpus: Corpus, data: PretrainingDataArguments) -> Int64Array:
    """Return the corpus rows of all groups but the excluded ones; cells without a group may be of one of these."""
    if data.group_column is None:
        return np.arange(len(corpus))
    groups = read_column(corpus, data.group_column, argument="group_column")
    known = sorted(set(groups.tolist()) - {""})
    unknown = sorted(set(data.exclude_groups) - set(known))
    if unknown:
        raise ValueError(f"exclude_groups has {unknown}; the groups of column {data.group_column!r} are {known}")
    if (groups == "").any():
        logger.warning(
            "%d cells have no value in column %r and are left out: they may be of an excluded group",
            (groups == "").sum(),
            data.group_column,
        )
    return np.flatnonzero(~np.isin(groups, ["", *data.exclude_groups]))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, pretrain, and log where the results are."""
    data, model, training = parse_arguments(
        [PretrainingDataArguments, ModelArguments, PretrainingArguments],
        argv,
        program="python -m screformer.train.pretrain",
        description="Pretrain scReformer-BERT on a corpus of cells by predicting masked expression bins.",
        example=EXAMPLE,
        recipes="pretrain",
    )
    log_to_console(training)
    try:
        result = pretrain(model, data, training)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    logger.info("checkpoint and results: %s", result.output_dir)
    leave_process_group()


if __name__ == "__main__":
    main()
