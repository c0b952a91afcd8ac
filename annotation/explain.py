"""What makes a cell one of its type: what each gene adds to a class's score, checked, as tables, figures and h5ad."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from screformer.annotation.attributions import Sampling, check_sampling
from screformer.annotation.cell_numbers import NumbersInFiles
from screformer.annotation.explained_cells import CellFile, CellsToExplain, Classifier, SomeCells, choose_cells
from screformer.annotation.explained_score import ClassScore, ScoreKind
from screformer.annotation.explanation_checks import (
    EXPLANATION,
    RANDOM,
    REGRESSION,
    STEPS,
    completeness,
    deletion_and_insertion,
    marker_overlap,
    random_order,
    read_marker_genes,
    regression_order,
    stability,
)
from screformer.annotation.explanation_figures import (
    plot_beeswarm,
    plot_class_heat_map,
    plot_curves,
    plot_gene_bars,
    top_genes,
)
from screformer.annotation.explanation_report import (
    NUM_LISTED,
    checks,
    format_explanation,
    gene_table,
    write_h5ad,
    write_parquet,
)
from screformer.annotation.explanation_run import Checks, Explainer, estimate, explain_cells
from screformer.annotation.perturb import find_genes
from screformer.annotation.trained_model import load_classifier
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.train.collator import GeneSpace
from screformer.train.process_memory import forget_peak, peak_process_memory
from screformer.train.result_files import finite, software_versions, write_json, written_aside

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)
RESULT_FILE, VALUES_FOLDER = "explanation.json", "values.partial"
CURVE_PASSES = 2 * 3 * len(STEPS)
NUM_HEAT_MAP_GENES = 8  # of each class
DEFAULT_SAMPLING, DEFAULT_CHECKS = Sampling(), Checks()
Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ExplainOptions:
    """How an explanation is made.

    Attributes
    ----------
    classes
        What to explain: labels, labels above them, or ``NAME=LABEL|LABEL``.
    sampling
        How values are estimated.
    score
        ``"logit"`` or ``"log_odds"`` of the class.
    num_cells, num_background
        The most that are drawn, of each class and beside it (the paper: 1,000 and 500).
    gene_space
        Instead of the checkpoint's.
    seed
        Of what is drawn.
    batch_size
        Points that are worked on together.
    checks
        How many cells each check takes.
    genes
        Whose places are reported, by any name.
    markers, marker_types
        File of marker genes, and cell types in it.
    """

    classes: Sequence[str]
    sampling: Sampling = DEFAULT_SAMPLING
    score: ScoreKind = "logit"
    num_cells: int = 1000
    num_background: int = 500
    gene_space: GeneSpace | None = None
    seed: int = 0
    batch_size: int = 8
    checks: Checks = DEFAULT_CHECKS
    genes: Sequence[str] = ()
    markers: str | Path | None = None
    marker_types: Sequence[str] = ()


@dataclass
class Explanation:
    """What was found, and where it lies.

    Attributes
    ----------
    output
        The folder.
    results
        The content of its ``explanation.json``.
    tables
        Class -> its genes, see `gene_table`.
    """

    output: Path
    results: dict[str, Any]  # Any: JSON
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def __str__(self) -> str:
        """Give the genes that count most and the checks of each class, and where the rest is."""
        lines = []
        for one in self.results["classes"]:
            genes = ", ".join(row["gene"] + ("" if row["sign"] > 0 else " (-)") for row in one["top"])
            lines += [f"{one['class']}, {one['num_cells']:,} cells: {genes}", *checks(one)]
        return "\n".join([*lines, f"All of it: {self.output / 'explanation.md'}"])


def explain_file(
    cells: str | Path | AnnData,
    model: str | Path | Classifier,
    output: str | Path,
    options: ExplainOptions,
    *,
    label_column: str | None = None,
    background: str | Path | AnnData | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    allow: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
    device: str | None = None,
    announce: Callable[[str], object] = logger.info,
    command: str = "explain_file",
) -> Explanation:
    """Explain classes of a classifier by cells of a file, check it, and write tables, figures and an h5ad.

    In `output`: ``explanation.json`` and ``.md``, ``genes.parquet`` (a row a gene and class), ``explanation.h5ad`` (see
    `write_h5ad`), and for each class ``beeswarm-CLASS.png``, ``genes-CLASS.png`` and ``curves-CLASS.png``; with several
    classes ``classes.png``. Values are kept in a folder there until all is written: a run that is stopped goes on.

    Parameters
    ----------
    cells
        Raw counts in any format of `open_count_matrix`; cells that the model was not trained on.
    model
        Folder or Hub id of a fine-tuned checkpoint, or one from `load_classifier`.
    output
        Folder.
    options
        What to explain, and how.
    label_column
        Column of `obs` with the cells' types; None: what the model names them.
    background
        Cells to compare with, such as those of the training; None: others of `cells`.
    layer, gene_column, allow, progress, device
        As for `annotate_file`; of both files.
    overwrite
        Replace an earlier explanation.
    announce
        Called with the estimate and with what goes on.
    command
        What the result says that it was made by.

    Raises
    ------
    OSError
        A file or the checkpoint is not there, or `output` has an explanation (FileExistsError).
    ValueError
        A class, gene or option is none, no cell is of a class, or as `annotate_file`.
    ImportError
        The method needs `shap`.
    """
    target = _check_output(output, overwrite)
    check_sampling(options.sampling, options.num_background)
    trained = load_classifier(model, device=device)
    trained.model.eval().requires_grad_(False)
    config, vocabulary = trained.model.config, trained.tokenizer.gene_vocabulary
    scores = [ClassScore.parse(config, text, options.score) for text in options.classes]
    if not scores or len({score.name for score in scores}) < len(scores):
        raise ValueError(f"classes got {list(options.classes)}; at least one is needed, and each once")
    asked = find_genes(vocabulary, options.genes) if options.genes else []
    markers = _read_markers(options, vocabulary)
    gene_space = options.gene_space or config.gene_space
    file = CellFile(cells, label_column, layer, gene_column, tuple(allow), progress)
    beside = None if background is None else file._replace(cells=background)
    chosen = choose_cells(
        file,
        beside,
        trained,
        scores,
        num_cells=options.num_cells,
        num_background=options.num_background,
        gene_space=gene_space,
        seed=options.seed,
    )
    explainer = Explainer(trained.model, chosen.background.bins, gene_space, options.batch_size)
    of_class = dict(zip(scores, chosen.of_class, strict=True))
    price = estimate(
        explainer,
        {score: own.bins for score, own in of_class.items()},
        options.sampling,
        options.checks,
        passes_of_curves=CURVE_PASSES,
    )
    announce(f"{sum(len(own.names) for own in chosen.of_class)} cells beside {len(chosen.background.names)}: {price}")
    run = _Run(trained, explainer, chosen, options, target / VALUES_FOLDER, progress)
    begin = time.perf_counter()
    forget_peak()
    found = {score.name: run.explain(number, score, own) for number, (score, own) in enumerate(of_class.items())}
    results = {
        "question": "Which genes make a cell one of its type, to the model?",
        "date": date.today().isoformat(),
        "command": command,
        "versions": software_versions(),
        "model": trained.describe(),
        "gene_space": gene_space,
        "sampling": options.sampling._asdict(),
        "score": options.score,
        "seed": options.seed,
        "background_file": (beside or file).name,
        "num_background": len(chosen.background.names),
        "price": price._asdict(),
        "seconds": None if run.is_resumed else time.perf_counter() - begin,
        "peak_bytes": peak_process_memory(),
        "inputs": chosen.inputs,
        "classes": [],
    }
    values = {name: values for name, (values, _) in found.items()}
    tables = {}
    for score, own in of_class.items():
        tables[score.name] = gene_table(values[score.name], own.bins, vocabulary)
        one = {"class": score.name, "members": [config.id2label[member] for member in score.members]}
        one |= {
            "file": file.name,
            "num_cells": len(own.names),
            "top": tables[score.name].head(NUM_LISTED).to_dict("records"),
        }
        one |= found[score.name][1]
        one["markers"] = _describe_markers(markers, values[score.name], own, options)
        one["genes_asked"] = _places(asked, tables[score.name], vocabulary)
        results["classes"].append(one)
    _write(
        target,
        results,
        tables,
        {score.name: own for score, own in of_class.items()},
        values,
        vocabulary,
        config.num_bins,
    )
    shutil.rmtree(target / VALUES_FOLDER, ignore_errors=True)
    return Explanation(target, results, tables)


def _check_output(output: str | Path, overwrite: bool) -> Path:
    target = Path(output)
    if target.exists() and not target.is_dir():
        raise ValueError(f"output: a folder is needed, {target} is a file")
    if (target / RESULT_FILE).exists() and not overwrite:
        raise FileExistsError(
            f"output: {target} has an explanation; choose another folder, or replace it with overwrite=True "
            "(--overwrite)"
        )
    return target


class _Run:
    """Explains one class after another; all values lie in files."""

    def __init__(
        self,
        trained: Classifier,
        explainer: Explainer,
        chosen: CellsToExplain,
        options: ExplainOptions,
        folder: Path,
        progress: bool,
    ) -> None:
        self.explainer, self.chosen, self.options = explainer, chosen, options
        self.folder, self.progress, self.is_resumed = folder, progress, False
        self.names = [trained.model.config.id2label[number] for number in range(trained.model.config.num_labels)]
        self.facts = {"model": trained.describe(), "gene_space": explainer.gene_space}

    def explain(self, number: int, score: ClassScore, own: SomeCells) -> tuple[Values, dict[str, Any]]:
        """Return the values of the cells of a class, (cells, num_genes), and what checks say of them."""
        options, checks = self.options, self.options.checks
        values = self._values(f"{number}", self.explainer, score, own.bins, options.sampling)
        order = np.random.default_rng([options.seed, number]).permutation(len(values))
        again = order[: checks.stability]
        other = self.explainer._replace(background=self.chosen.other_background.bins)
        sampling = options.sampling._replace(seed=options.sampling.seed + 1)
        second = self._values(f"{number}-again", other, score, own.bins[again], sampling)
        some = order[: checks.completeness]
        return values, {
            "completeness": completeness(self.explainer, score, own.bins[some], values[some], options.sampling),
            "stability": stability(values[again], second),
            "curves": self._curves(score, own, values, order[: checks.curves]),
        }

    def _values(
        self, name: str, explainer: Explainer, score: ClassScore, bins: npt.NDArray[np.uint8], sampling: Sampling
    ) -> Values:
        folder = self.folder / name
        numbers: NumbersInFiles = explain_cells(
            explainer, score, bins, sampling, folder=folder, facts=self.facts, progress=self.progress
        )
        self.is_resumed |= numbers.was_begun
        return np.concatenate([values for _, values in numbers.read()])

    def _curves(self, score: ClassScore, own: SomeCells, values: Values, rows: npt.NDArray[np.int64]) -> dict[str, Any]:
        bins = own.bins[rows]
        orders: dict[str, npt.NDArray[np.floating]] = {EXPLANATION: values[rows]}
        orders[RANDOM] = random_order(*bins.shape, self.options.seed)
        by_regression = regression_order(self.chosen.background, score, self.names, bins)
        if by_regression is not None:
            orders[REGRESSION] = by_regression
        described: dict[str, Any] = finite(
            deletion_and_insertion(self.explainer, score, bins, orders).describe(self.options.seed)
        )
        return described


def _read_markers(options: ExplainOptions, vocabulary: GeneVocabulary) -> npt.NDArray[np.bool_] | None:
    if options.markers is None:
        return None
    genes = read_marker_genes(options.markers, cell_types=options.marker_types)
    positions = vocabulary.map_names(genes).positions
    is_marker = np.zeros(len(vocabulary.ensembl_ids), dtype=bool)
    is_marker[positions[positions >= 0]] = True
    return is_marker


def _describe_markers(
    is_marker: npt.NDArray[np.bool_] | None, values: Values, own: SomeCells, options: ExplainOptions
) -> dict[str, Any] | None:
    if is_marker is None or options.markers is None:
        return None
    found = marker_overlap(np.abs(values).mean(axis=0, dtype=np.float64), is_marker, own.bins.any(axis=0))
    return {"file": Path(options.markers).name, "cell_types": list(options.marker_types), **found}


def _places(asked: Sequence[int], table: pd.DataFrame, vocabulary: GeneVocabulary) -> dict[str, int | None]:
    ranks = {name: rank for rank, name in enumerate(table["ensembl_id"], start=1)}
    return {vocabulary.symbols[position]: ranks.get(vocabulary.ensembl_ids[position]) for position in asked}


def _write(
    target: Path,
    results: dict[str, Any],
    tables: Mapping[str, pd.DataFrame],
    cells: Mapping[str, SomeCells],
    values: Mapping[str, Values],
    vocabulary: GeneVocabulary,
    num_bins: int,
) -> None:
    names = list(vocabulary.symbols)
    for number, (name, own) in enumerate(cells.items()):
        stem, title = file_name(name), f"{name}: {len(own.names):,} cells"
        plot_beeswarm(values[name], own.bins, names, target / f"beeswarm-{stem}.png", title=title, num_bins=num_bins)
        plot_gene_bars(tables[name], target / f"genes-{stem}.png", title=title)
        plot_curves(results["classes"][number]["curves"], target / f"curves-{stem}.png", title=title)
    if len(cells) > 1:
        plot_class_heat_map(_class_means(values, names), target / "classes.png")
    write_parquet(tables, target / "genes.parquet")
    write_h5ad(
        cells,
        values,
        vocabulary,
        {key: results[key] for key in ("date", "command", "score", "gene_space")},
        target / "explanation.h5ad",
    )
    with written_aside(target / "explanation.md") as aside:
        aside.write_text(format_explanation(results), encoding="utf-8")
    write_json(target / RESULT_FILE, results)  # last: where it is, the explanation is complete


def _class_means(values: Mapping[str, Values], names: Sequence[str]) -> pd.DataFrame:
    genes = list(dict.fromkeys(gene for own in values.values() for gene in top_genes(own, NUM_HEAT_MAP_GENES).tolist()))
    means = {name: own[:, genes].mean(axis=0) for name, own in values.items()}
    return pd.DataFrame(means, index=[names[gene] for gene in genes])


def file_name(name: str) -> str:
    """Return a class's name as part of a file's."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
