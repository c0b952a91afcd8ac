"""The whole story on real cells: counts to a corpus, pretraining, fine-tuning, a fair test, new labels, a report.

`quickstart` reads like the README: one function a step, each of them what a user would call on cells of their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata

from screformer.annotation.annotate import annotate_file
from screformer.annotation.calibration import Calibration
from screformer.benchmarks.checkpoint_baselines import score_baselines
from screformer.benchmarks.gene_spaces import compare_gene_spaces, describe_gene_spaces
from screformer.configuration_screformer import ScReformerConfig
from screformer.model_cards.card_inputs import DataSource
from screformer.model_cards.card_sections import limitations
from screformer.model_cards.checkpoint_records import read_checkpoint
from screformer.model_cards.comparison import METRIC_TITLES, MODEL, compare, ordered_rows, row_title
from screformer.model_cards.model_card import write_model_card
from screformer.model_cards.report import NextCommand, Report, ReportFigure, write_report
from screformer.tokenization.corpus import build_corpus
from screformer.tokenization.example_cells import example_cells_path
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.arguments import (
    FineTuningArguments,
    FineTuningDataArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
)
from screformer.train.classifier_start import ClassifierArguments
from screformer.train.corpus_columns import read_column
from screformer.train.evaluate import evaluate_checkpoint
from screformer.train.figures import plot_comparison
from screformer.train.finetune import finetune
from screformer.train.pretrain import pretrain
from screformer.train.result_files import read_json, software_versions, write_json

logger = logging.getLogger(__name__)

TEST_DONOR = "human4"  # the last of the four
SEED = 2022
STAGES_FILE = "stages.json"
MAX_ERROR = 0.02  # of the annotated cells' answers
COMPARED_CELLS = 32
# Halves of a cell's genes, another one at each step: an augmentation that also halves the time.
GENE_DROPOUT = 0.5
PANCREAS = DataSource(
    name="Human pancreatic islets, 2,142 cells of four donors (inDrop)",
    citation="Baron et al. 2016, Cell Systems 3:346 (GEO GSE84133)",
    origin="PyPI package came 0.1.13",
    licence="MIT (package); GEO states none of its own for the data",
)


@dataclass
class QuickstartResult:
    """What a quickstart leaves behind.

    Attributes
    ----------
    folder
        Holds ``corpus/``, ``pretrained/``, ``checkpoint/``, ``new_cells.h5ad``, ``annotated.h5ad``, ``metrics.json``,
        ``report.html`` and its figures.
    metrics
        The content of ``metrics.json``.
    stage_seconds
        Stage -> wall time, of the run that did it.
    """

    folder: Path
    metrics: dict[str, Any]
    stage_seconds: dict[str, float] = field(default_factory=dict)


def quickstart(
    output: str | Path = "quickstart",
    *,
    cells: Path | None = None,
    test_donor: str = TEST_DONOR,
    max_steps: int = -1,
    announce: Callable[[str], None] = logger.info,
) -> QuickstartResult:
    """Run every step on the packaged pancreas cells and return where the results are.

    Three donors are for learning, the fourth for the test; in a run its cells are neither trained on nor used to select
    the model. Stages that an earlier run has finished in `output` are not repeated; one that was interrupted goes on.

    Parameters
    ----------
    output
        Folder for the results.
    cells
        h5ad with raw counts and the obs columns ``cell_type`` and ``donor``; default the packaged ones.
    test_donor
        The donor to hold out.
    max_steps
        End each training after so many steps, for a quick look; -1 trains as many epochs as it should.
    announce
        Called with a line of text when a stage begins.

    Raises
    ------
    ValueError
        There is no such donor, or the folder holds a quickstart of other settings.
    """
    folder, cells = Path(output), cells or example_cells_path()
    stages = _Stages(folder, announce)
    with stages("Tokenize the cells"):
        corpus = build_corpus(
            cells, folder / "corpus", tokenizer=ScReformerTokenizer(), obs_columns=["cell_type", "donor"]
        )
    donors = sorted(set(read_column(corpus, "donor", argument="cells").tolist()))
    if test_donor not in donors:
        raise ValueError(f"test_donor got {test_donor!r}; the donors are {', '.join(donors)}")
    with stages("Pretrain on masked genes, without labels"):
        pretrained = pretrain(*_pretraining(folder, test_donor, max_steps))
    with stages("Fine-tune on cell types"):
        checkpoint = finetune(*_fine_tuning(folder, test_donor, max_steps)).output_dir
    with stages(f"Test on donor {test_donor}"):
        evaluation = evaluate_checkpoint(checkpoint, corpus.folder, checkpoint)
    with stages("Fit logistic regression to the same cells"):
        results = {MODEL: evaluation, **score_baselines(cells, checkpoint, evaluation["label_names"], seed=SEED)}
    with stages("Annotate cells without labels"):
        new_cells = _cells_without_labels(cells, test_donor, folder / "new_cells.h5ad")
        output = folder / "annotated.h5ad"
        annotate_file(new_cells, checkpoint, output, max_error=_max_error(checkpoint), overwrite=True)
    with stages("Compare expressed genes with every gene"):
        spaces = compare_gene_spaces(checkpoint, new_cells, num_cells=COMPARED_CELLS if max_steps < 0 else 8)
    with stages("Write the report and the model card"):
        metrics = _metrics(results, pretrained.metrics, test_donor)
        metrics |= {"gene_spaces": {**spaces, "sentence": describe_gene_spaces(spaces)}}
        metrics |= {"answers_sentence": _describe_answers(evaluation["answers"])}
        write_json(folder / "metrics.json", metrics)
        write_model_card(
            checkpoint,
            results=results,
            model_name="scReformer-BERT tiny, human pancreas",
            data_sources=[PANCREAS],
            pretraining=pretrained.output_dir,
        )
        _report(folder, metrics, results, stages.seconds)
    return QuickstartResult(folder, metrics, stages.seconds)


def _pretraining(
    folder: Path, test_donor: str, max_steps: int
) -> tuple[ModelArguments, PretrainingDataArguments, PretrainingArguments]:
    """Return the settings of the short pretraining: every donor but the tested one."""
    return (
        ModelArguments(preset="tiny", gene_space="expressed"),
        PretrainingDataArguments(
            corpus=str(folder / "corpus"),
            group_column="donor",
            exclude_groups=[test_donor],
            gene_dropout=GENE_DROPOUT,
        ),
        PretrainingArguments(
            output_dir=str(folder / "pretrained"),
            num_train_epochs=1,
            max_steps=max_steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=3e-3,
            logging_steps=0.05,
            seed=SEED,
            train_sampling_strategy="group_by_length",
        ),
    )


def _fine_tuning(
    folder: Path, test_donor: str, max_steps: int
) -> tuple[ModelArguments, FineTuningDataArguments, FineTuningArguments, ClassifierArguments]:
    """Return the settings of the fine-tuning: three donors, a fifth of their cells for validation.

    They are those of the recipe finetune-small, but for the validation cells, which the report shows.
    """
    return (
        ModelArguments(checkpoint=str(folder / "pretrained")),
        FineTuningDataArguments(
            corpus=str(folder / "corpus"),
            group_column="donor",
            test_groups=[test_donor],
        ),
        FineTuningArguments(
            output_dir=str(folder / "checkpoint"),
            num_train_epochs=1,
            max_steps=max_steps,
            early_stopping_patience=0,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=1,
            learning_rate=1e-5,
            class_weights="balanced",
            logging_steps=0.05,
            seed=SEED,
            train_sampling_strategy="group_by_length",
        ),
        ClassifierArguments(["convolution", "linear"], linear_start="principal_components"),
    )


def _cells_without_labels(cells: Path, test_donor: str, path: Path) -> Path:
    """Write the test donor's cells as a file that nobody has labelled, and return its path."""
    adata = anndata.read_h5ad(cells)
    adata = adata[adata.obs["donor"] == test_donor].copy()
    del adata.obs["cell_type"]
    aside = path.with_name(path.name + ".partial")
    adata.write_h5ad(aside, compression="gzip")
    aside.replace(path)
    return path


def _max_error(checkpoint: Path) -> float | None:
    """Return the error rate to ask for; None, which answers every cell, where too few cells calibrated the model."""
    calibration = Calibration.from_config(ScReformerConfig.from_pretrained(checkpoint))
    return MAX_ERROR if calibration is not None and calibration.error_rates[0] <= MAX_ERROR else None


def _describe_answers(answers: list[dict[str, Any]]) -> str:
    """Return what asking for an error rate gave on the test cells, as a sentence."""
    row = next(row for row in answers if row["asked"] == MAX_ERROR)
    if row["error"] is None:
        return f"An error rate of {MAX_ERROR:.0%} is lower than what the calibration can vouch for."
    return (
        f"Asked for at most {MAX_ERROR:.0%} wrong answers, {row['answered']:.1%} of the test cells are answered, and "
        f"{row['error']:.1%} of these answers are wrong."
    )


def _metrics(results: dict[str, dict[str, Any]], pretraining: dict[str, Any], test_donor: str) -> dict[str, Any]:
    comparison = compare(results)
    assert comparison is not None
    return {
        **results,
        "model_minus_logistic_regression": comparison.gaps,
        "verdict": comparison.sentence,
        "test_donor": test_donor,
        "seed": SEED,
        "pretraining": pretraining,
        "versions": software_versions(),
    }


def _report(
    folder: Path, metrics: dict[str, Any], results: dict[str, dict[str, Any]], stage_seconds: dict[str, float]
) -> None:
    """Write ``report.html`` with its figures."""
    checkpoint, test_donor = folder / "checkpoint", metrics["test_donor"]
    scores = {row_title(name): {key: float(row[key]) for key in METRIC_TITLES} for name, row in ordered_rows(results)}
    plot_comparison(scores, folder / "comparison.png", title=f"Donor {test_donor}, never seen in training")
    splits = read_json(checkpoint / "splits.json")
    figures = [
        ReportFigure(
            folder / "comparison.png",
            "The model beside logistic regression and the commonest class, on the same cells.",
            "Bars of accuracy and macro-F1 for each method; the values are in the table of scores.",
        ),
        ReportFigure(
            checkpoint / "confusion_matrix.png",
            "Test cells by true (rows) and predicted (columns) type.",
            "Confusion matrix with a row for each true cell type; the diagonal holds the correct cells.",
        ),
        ReportFigure(
            checkpoint / "reliability.png",
            "How often a type is right, by its probability; the larger a mark, the more test cells.",
            "Share of correct cells over the probability of their type, near the diagonal where both agree.",
        ),
        ReportFigure(
            checkpoint / "roc_curves.png",
            "Each type against the rest.",
            "Receiver operating characteristic curves, one a cell type, with the area under each.",
        ),
        ReportFigure(
            checkpoint / "training_curves.png",
            "Fine-tuning: training loss drops half of each cell's genes, validation loss does not.",
            "Losses, validation accuracy and macro-F1, learning rate and cells a second, by epoch.",
        ),
        ReportFigure(
            folder / "pretrained" / "training_curves.png",
            "Pretraining: the loss of predicting masked bins, and accuracy beside that of answers that need no model.",
            "Training and held-out loss, masked accuracy, learning rate and cells a second, by epoch.",
        ),
        ReportFigure(
            folder / "pretrained" / "masked_genes.png",
            "Masked genes by how strongly they are expressed: the model beside each gene's own frequencies.",
            "Accuracy and loss at each true expression bin; the numbers are in pretrained/metrics.json.",
        ),
        ReportFigure(
            checkpoint / "cell_types.png",
            "What each donor consists of.",
            "Stacked bars: the share of each cell type in each donor.",
        ),
    ]
    write_report(
        folder / "report.html",
        Report(
            title="scReformer-BERT on human pancreas: one donor held out",
            results=results,
            dataset={
                "Cells": PANCREAS.name,
                "Study": PANCREAS.citation,
                "Test donor": test_donor,
                **{f"Cells for {part}": number for part, number in splits["num_cells"].items()},
            },
            environment={"seed": SEED, **software_versions()},
            stage_seconds=stage_seconds,
            # A pretraining that an earlier release has finished lacks the newer ones.
            figures=[figure for figure in figures if Path(figure.path).exists()],
            limitations=list(limitations(results, read_checkpoint(checkpoint))),
            next_commands=_next_commands(folder),
            pretraining=metrics["pretraining"],
        ),
    )


def _next_commands(folder: Path) -> list[NextCommand]:
    model = folder / "checkpoint"
    return [
        NextCommand("Label your own cells", f"screformer annotate my_cells.h5ad --model {model} -o labelled.h5ad"),
        NextCommand("Embed them", f"screformer embed my_cells.h5ad --model {model} -o embedded.h5ad"),
        NextCommand(
            "Make a corpus of your own files", "screformer corpus *.h5ad -o corpus --obs cell_type --obs donor"
        ),
        NextCommand(
            "Fine-tune on your labels",
            f"screformer finetune finetune-small --corpus corpus --checkpoint {folder / 'pretrained'} "
            "--group_column donor --test_groups DONOR --output_dir finetuned",
        ),
    ]


class _Stages:
    """Announces and times the stages, and remembers the times of those that an earlier run has done."""

    def __init__(self, folder: Path, announce: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._announce, self._number = folder / STAGES_FILE, announce, 0
        self.seconds: dict[str, float] = read_json(self._path) if self._path.exists() else {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._number += 1
        self._announce(f"{self._number}. {name}")
        start = time.monotonic()
        yield
        self.seconds.setdefault(name, round(time.monotonic() - start, 1))
        write_json(self._path, self.seconds)
