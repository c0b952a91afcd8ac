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

import pandas as pd

from screformer.annotation.attributions import check_sampling
from screformer.annotation.class_explanation import (
    ClassExplainer,
    ClassExplanation,
    ExplainOptions,
    Values,
    read_class_markers,
)
from screformer.annotation.explained_cells import CellFile, Classifier, choose_cells
from screformer.annotation.explained_score import ClassScore
from screformer.annotation.explanation_checks import STEPS
from screformer.annotation.explanation_figures import (
    plot_beeswarm,
    plot_class_heat_map,
    plot_curves,
    plot_gene_bars,
    top_genes,
)
from screformer.annotation.explanation_page import NUM_LISTED, TITLE, check_sentences, file_names, write_page
from screformer.annotation.explanation_run import Explainer, activations_kept, estimate, workers_of
from screformer.annotation.explanation_tables import write_h5ad, write_parquet
from screformer.annotation.perturb import find_genes
from screformer.annotation.trained_model import load_classifier
from screformer.configuration_screformer import ScReformerConfig
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.train.process_memory import forget_peak, peak_process_memory
from screformer.train.result_files import finite, read_json, software_versions, write_json

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)
RESULT_FILE, VALUES_FOLDER = "explanation.json", "values.partial"
FIGURES = ("beeswarm-*.png", "genes-*.png", "curves-*.png")
PAGES = ("md", "html", "h5ad")
CURVE_PASSES = 2 * 3 * len(STEPS)
NUM_HEAT_MAP_GENES = 8  # of each class


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
            lines.append(f"{one['class']}, {one['num_cells']:,} cells: {genes}")
            lines += [f"- {sentence}" for sentence in check_sentences(one)]
        return "\n".join([*lines, f"All of it: {self.output / 'explanation.html'}"])


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

    In `output`: ``explanation.json``, ``.md`` and ``.html``, ``genes.parquet`` (a row a gene and class),
    ``explanation.h5ad`` (see `write_h5ad`), and for each class ``beeswarm-CLASS.png``, ``genes-CLASS.png`` and
    ``curves-CLASS.png``; with several classes ``classes.png``. Values are kept in a folder there until all is written:
    a run that is stopped goes on.

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
    for score in scores:  # before anything is computed
        read_class_markers(options, score.name, vocabulary)
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
    explainer = Explainer(
        trained.model,
        chosen.background.bins,
        gene_space,
        options.batch_size,
        workers_of(trained.model, options.sampling),
    )
    of_class = dict(zip(scores, chosen.of_class, strict=True))
    longest = max(int(explainer.num_tokens(own.bins).max()) for own in chosen.of_class)
    run = ClassExplainer(trained, explainer, chosen, options, target / VALUES_FOLDER, progress)
    with activations_kept(explainer, longest):
        price = estimate(
            explainer,
            {score: own.bins for score, own in of_class.items()},
            options.sampling,
            options.checks,
            passes_of_curves=CURVE_PASSES,
        )
        number = sum(len(own.names) for own in chosen.of_class)
        announce(f"{number} cells beside {len(chosen.background.names)}: {price}")
        begin = time.perf_counter()
        forget_peak()
        found = [run.explain(number, *pair) for number, pair in enumerate(of_class.items())]
    results = {
        "question": TITLE,
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
        "num_in_background": chosen.num_in_background,
        "price": price._asdict(),
        "seconds": None if run.is_resumed else time.perf_counter() - begin,
        "peak_bytes": peak_process_memory(),
        "inputs": chosen.inputs,
        "classes": [_describe(one, config, file.name, asked, vocabulary) for one in found],
    }
    _remove_earlier(target)
    _write(target, results, found, vocabulary, config.num_bins)
    shutil.rmtree(target / VALUES_FOLDER, ignore_errors=True)
    return Explanation(target, results, {one.score.name: one.table for one in found})


def _remove_earlier(target: Path) -> None:
    """Remove an earlier explanation, its record first, so that no figure of it stays among the new ones.

    Only what its record says that it has: other files of the folder are somebody's.
    """
    record = target / RESULT_FILE
    if not record.exists():
        return
    stems = file_names([one["class"] for one in read_json(record)["classes"]]).values()
    figures = [pattern.replace("*", stem) for stem in stems for pattern in FIGURES]
    for name in (RESULT_FILE, *(f"explanation.{ending}" for ending in PAGES), "genes.parquet", "classes.png", *figures):
        (target / name).unlink(missing_ok=True)


def _describe(
    one: ClassExplanation, config: ScReformerConfig, file: str, asked: Sequence[int], vocabulary: GeneVocabulary
) -> dict[str, Any]:
    """Return a class for the record."""
    rows = one.table.assign(place=range(1, len(one.table) + 1)).to_dict("records")
    by_id = {row["ensembl_id"]: row for row in rows}
    ids = {vocabulary.ensembl_ids[gene]: vocabulary.symbols[gene] for gene in asked}
    described: dict[str, Any] = finite(
        {
            "class": one.score.name,
            "members": [config.id2label[member] for member in one.score.members],
            "file": file,
            "num_cells": len(one.cells.names),
            "top": rows[:NUM_LISTED],
            **one.checks,
            "genes_asked": [by_id.get(name, {"gene": symbol, "place": None}) for name, symbol in ids.items()],
        }
    )
    return described


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


def _write(
    target: Path,
    results: dict[str, Any],
    found: Sequence[ClassExplanation],
    vocabulary: GeneVocabulary,
    num_bins: int,
) -> None:
    names = list(vocabulary.symbols)
    stem_of = file_names([one.score.name for one in found])
    for one in found:
        stem, title = stem_of[one.score.name], f"{one.score.name}: {len(one.cells.names):,} cells"
        path = target / f"beeswarm-{stem}.png"
        plot_beeswarm(one.values, one.cells.bins, names, path, title=title, num_bins=num_bins)
        plot_gene_bars(one.table, target / f"genes-{stem}.png", title=title)
        plot_curves(one.checks["curves"], target / f"curves-{stem}.png", title=title)
    values = {one.score.name: one.values for one in found}
    if len(found) > 1:
        plot_class_heat_map(_class_means(values, names), target / "classes.png")
    write_parquet({one.score.name: one.table for one in found}, target / "genes.parquet")
    record = {key: results[key] for key in ("date", "command", "score", "gene_space")}
    cells = {one.score.name: one.cells for one in found}
    write_h5ad(cells, values, vocabulary, record, target / "explanation.h5ad")
    write_page(results, target)
    write_json(target / RESULT_FILE, results)  # last: where it is, the explanation is complete


def _class_means(values: Mapping[str, Values], names: Sequence[str]) -> pd.DataFrame:
    genes = list(dict.fromkeys(gene for own in values.values() for gene in top_genes(own, NUM_HEAT_MAP_GENES).tolist()))
    means = {name: own[:, genes].mean(axis=0) for name, own in values.items()}
    return pd.DataFrame(means, index=[names[gene] for gene in genes])
