"""One run of an in-silico perturbation: which cells, which genes beside which, and what is measured of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from screformer.annotation.annotated_copy import dated
from screformer.annotation.calibration import LabelReader
from screformer.annotation.cell_numbers import CellNumbers, NumbersInFiles, NumbersInMemory
from screformer.annotation.cell_source import CellSource, warn_of_empty_cells
from screformer.annotation.perturbation_null import match_genes, match_sets
from screformer.annotation.perturbation_results import MeasuredGenes, describe_results
from screformer.annotation.perturbed_cells import (
    BinChange,
    CellTokens,
    Change,
    GeneSet,
    Int64Array,
    PerturbationMeasure,
)
from screformer.annotation.trained_model import TrainedModel
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.count_matrix import CountMatrix
from screformer.train.batch_size import BatchSize
from screformer.train.collator import GeneSpace
from screformer.train.inference import BatchInference

MAX_NAMED = 20  # labels in a message


@dataclass(frozen=True)
class PerturbationOptions:
    """Options of `perturb` that its result depends on; ValueError for one that is out of its range."""

    change: Change = "zero"
    bins: int = 2
    together: bool = False
    num_null: int = 50
    cells_of: str | None = None
    label_column: str | None = None
    max_cells: int = 1000
    seed: int = 2022

    def __post_init__(self) -> None:
        if self.change not in ("zero", "raise"):
            raise ValueError(f"change must be 'zero' or 'raise', got {self.change!r}")
        for name, least in (("bins", 1), ("num_null", 0), ("max_cells", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.label_column is not None and self.cells_of is None:
            raise ValueError(
                f"label_column={self.label_column!r} says where the types are; say which of them to take, too: "
                "cells_of= (--cells-of)"
            )


class NumberStore(NamedTuple):
    """Where numbers are kept during a run: in `folder` until `kept` is left without an error, or in memory."""

    folder: Path | None
    kept: ExitStack

    def open(
        self, name: str, facts: Mapping[str, Any], *, num_rows: int, width: int, rows_per_block: int = 1
    ) -> CellNumbers:
        """Return the numbers called `name`; those that an earlier run of the same facts left are in them."""
        if self.folder is None:
            return NumbersInMemory(num_rows, width, rows_per_block)
        numbers = NumbersInFiles(
            self.folder / f"{name}.partial", facts, num_cells=num_rows, width=width, cells_per_block=rows_per_block
        )
        self.kept.enter_context(numbers.kept_until_written())
        return numbers


class PerturbationRun:
    """A classifier and the options of a perturbation; see `perturb`.

    Raises
    ------
    ValueError
        An option does not fit the model.
    """

    def __init__(
        self,
        trained: TrainedModel[ScReformerForCellClassification],
        options: PerturbationOptions,
        *,
        batch_size: BatchSize,
        gene_space: GeneSpace | None,
        progress: bool,
    ) -> None:
        self.trained, self.options, self.progress = trained, options, progress
        self.reader = LabelReader(trained.model.config)
        self.inference = BatchInference(
            trained.model, ["logits", "cell_embedding"], batch_size=batch_size, gene_space=gene_space
        )
        self.change = BinChange(options.change, options.bins, trained.tokenizer.num_bins - 1)
        if options.change == "raise" and options.bins > self.change.highest:
            raise ValueError(f"bins: the model's highest bin is {self.change.highest}, got {options.bins}")
        label = options.cells_of
        if label is not None and options.label_column is None and label not in self.reader.tree.labels:
            raise ValueError(
                f"cells_of={label!r} is no label of {trained.name}, which has {_some(self.reader.tree.labels)}. Name "
                "one of these, or the column of obs with that label: label_column= (--label-column)"
            )
        self.own_class = label if label in self.reader.class_names else None

    def __call__(
        self, matrix: CountMatrix, source: CellSource, targets: Sequence[int], store: NumberStore
    ) -> dict[str, Any]:  # Any: JSON
        """Return the record of what changing the genes at these positions does."""
        self.inference.choose_batch_size(source.longest_cell + len(targets))
        facts = {"model": self.trained.describe(), "gene_space": self.inference.gene_space}
        candidates = self._find_cells(matrix, source, store, facts)
        drawn = np.random.default_rng(self.options.seed).permutation(candidates)[: self.options.max_cells]
        numbers = np.sort(drawn)
        vocabulary = self.trained.tokenizer.gene_vocabulary
        tokens = CellTokens(source.read_tokens(numbers, task="read"), numbers, len(vocabulary))
        num_empty = len(numbers) - len(tokens)
        warn_of_empty_cells(num_empty, len(numbers), consequence="they are left out")
        if not len(tokens):
            raise ValueError(f"cells: none of {matrix.name} has counts on genes that the model knows")
        cells = {"num_candidates": len(candidates), "num_empty": num_empty, "sha256": tokens.fingerprint}
        measured, before = self._measure(tokens, targets, store, {**facts, "cells": cells})
        results = describe_results(
            measured,
            tokens,
            symbols=vocabulary.symbols,
            ensembl_ids=vocabulary.ensembl_ids,
            class_names=self.reader.class_names,
            in_file=matrix.map_genes(vocabulary).positions,
            num_null=self.options.num_null,
        )
        return dated(
            {
                "settings": {**asdict(self.options), "own_class": self.own_class},
                **facts,
                "input": source.describe_input(),
                "cells": {"num_cells": len(tokens), **cells, **before},
                "results": results,
            }
        )

    def _find_cells(
        self, matrix: CountMatrix, source: CellSource, store: NumberStore, facts: Mapping[str, Any]
    ) -> Int64Array:
        """Return the rows of the cells that may be taken."""
        label, column = self.options.cells_of, self.options.label_column
        if label is None:
            return np.arange(source.num_cells)
        if column is not None:
            labels = matrix.obs_column(column)
            found = np.flatnonzero([one == label for one in labels])
            others, named_by = sorted({one for one in labels if one}), f"label_column={column!r}"
        else:
            names = self._name_cells(source, store, facts)
            found = np.flatnonzero((names == self.reader.tree.labels.index(label)).any(axis=1))
            others = [self.reader.tree.labels[place] for place in np.unique(names[:, -1]) if place >= 0]
            named_by = f"the model {self.trained.name}"
        if not len(found):
            raise ValueError(f"cells_of={label!r}: no cell is so by {named_by}; there are {_some(others)}")
        return found

    def _name_cells(self, source: CellSource, store: NumberStore, facts: Mapping[str, Any]) -> Int64Array:
        """Return the path of labels of each cell, (cells, levels), as indices in the tree's; -1 of an empty cell."""
        inference = BatchInference(
            self.trained.model, "logits", batch_size=self.inference.batch_size, gene_space=self.inference.gene_space
        )
        numbers = store.open(
            "names",
            {**facts, "input": source.describe_input(), "state": source.state},
            num_rows=source.num_cells,
            width=inference.width,
            rows_per_block=source.cells_per_block(inference),
        )
        source.measure(inference, numbers, task="name")
        paths = [np.where(np.isnan(given[:, :1]), -1, self.reader(given).level_labels) for _, given in numbers.read()]
        return np.concatenate(paths)

    def _measure(
        self, tokens: CellTokens, targets: Sequence[int], store: NumberStore, facts: Mapping[str, Any]
    ) -> tuple[list[MeasuredGenes], dict[str, Any]]:  # Any: JSON
        """Return each perturbation with its null, and what the model says of the unchanged cells."""
        with self._bar("before", len(tokens)) as bar:
            measure = PerturbationMeasure(
                tokens, self.inference, self.reader, self.change, own_class=self.own_class, advance=bar.update
            )
        sets: list[GeneSet] = [tuple(sorted(targets))] if self.options.together else [(gene,) for gene in targets]
        nulls = self._match(tokens, targets, sets)
        null_sets = sorted({genes for null in nulls for genes in null})
        facts = {**facts, "options": asdict(self.options)}
        shifts, null_shifts = (
            self._measure_sets(
                measure,
                some,
                store.open(name, {**facts, "sets": some}, num_rows=len(some), width=width),
                task=name,
            )
            for name, some, width in (("genes", sets, measure.width), ("null", null_sets, measure.num_statistics))
        )
        row_of = {genes: row for row, genes in enumerate(null_sets)}
        measured = []
        for genes, shift, null in zip(sets, shifts, nulls, strict=True):
            rows = null_shifts[[row_of[one] for one in null]]
            has_cells = ~np.isnan(rows[:, 0])
            changed = tokens.changed_by(genes, self.change)
            name = " + ".join(self.trained.tokenizer.gene_vocabulary.symbols[gene] for gene in genes)
            kept = [one for one, is_kept in zip(null, has_cells, strict=True) if is_kept]
            measured.append(MeasuredGenes(name, genes, changed, shift, kept, rows[has_cells]))
        counts = np.bincount(measure.before.answers, minlength=len(self.reader.class_names)).tolist()
        means = measure.before.probabilities.mean(axis=0, dtype=np.float64).tolist()
        names = self.reader.class_names
        return measured, {
            "labels": dict(zip(names, counts, strict=True)),
            "mean_probabilities": dict(zip(names, means, strict=True)),
        }

    def _match(self, tokens: CellTokens, targets: Sequence[int], sets: Sequence[GeneSet]) -> list[list[GeneSet]]:
        """Return the null of each set; none of one that changes no cell."""
        matches = match_genes(
            targets,
            np.setdiff1d(tokens.changeable(self.change), targets),
            tokens.num_expressing,
            tokens.mean_bins,
            number=self.options.num_null,
            seed=self.options.seed,
        )
        return [
            match_sets(genes, matches) if len(tokens.changed_by(genes, self.change).cells) else [] for genes in sets
        ]

    def _measure_sets(
        self, measure: PerturbationMeasure, sets: Sequence[GeneSet], numbers: CellNumbers, *, task: str
    ) -> Any:  # float32 (sets, width)
        sizes = [len(measure.cells.changed_by(genes, self.change).cells) for genes in sets]
        done = numbers.done()
        with self._bar(task, sum(sizes), initial=sum(sizes[number] for number in done)) as bar:
            for number in sorted(set(range(len(sets))) - done):
                values = measure(sets[number], advance=bar.update)
                numbers.write(number, values[None, : numbers.width])
        return np.concatenate([np.zeros((0, numbers.width), np.float32), *(values for _, values in numbers.read())])

    def _bar(self, task: str, total: int, *, initial: int = 0) -> tqdm:
        return tqdm(desc=task, total=total, initial=initial, unit="cell", disable=not self.progress)


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - MAX_NAMED} more" if len(labels) > MAX_NAMED else ""
    return f"{', '.join(labels[:MAX_NAMED])}{more}"
