"""Explanations on labelled cells: a classifier trained on one part of them, explained on another.

A part of the cells, drawn at random from each type, trains `finetune-small`, which is nearly linear, or the paper's
classifier alone (as the ablations without pretraining train it), which is not; the rest, or cells of another file, are
explained beside a background of the first. Also what each method makes of the same cells with as many points: how far
its values are from adding up, how near it comes to expected gradients with many points, and its seconds.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from anndata import AnnData
from scipy.stats import spearmanr
from sklearn.model_selection import train_test_split

from screformer.annotation.annotate import annotate
from screformer.annotation.attributions import METHODS, Sampling
from screformer.annotation.class_explanation import ExplainOptions
from screformer.annotation.explain import Explanation, explain_file
from screformer.annotation.explained_cells import CellFile, Classifier, choose_cells
from screformer.annotation.explained_score import ClassScore
from screformer.annotation.explanation_checks import completeness
from screformer.annotation.explanation_page import class_blocks, file_names, sampling_as_words
from screformer.annotation.explanation_run import Explainer
from screformer.benchmarks.ablations import DEFAULTS, FINETUNING
from screformer.benchmarks.comparison import SPLIT_SEED, provenance
from screformer.benchmarks.fine_tuning_runs import without_folders
from screformer.benchmarks.labelled_data import LabelledData, read_labelled_data
from screformer.benchmarks.suites import CellsToCompareOn
from screformer.benchmarks.system_ours import ScReformerSystem
from screformer.model_cards.page_blocks import Block, Cells, Heading, Text, blocks_as_markdown
from screformer.tokenization.example_cells import example_cells_path
from screformer.train.result_files import write_json

logger = logging.getLogger("screformer.benchmarks.explanations")
Json = dict[str, Any]
LABEL = "cell_type"
NUM_REFERENCE_POINTS = 256
AS_DRAWN = "expected gradients, sums as drawn"
FIGURES = ("beeswarm", "genes", "curves")
Classifiers = Literal["small", "paper"]
RATE = f"--learning_rate {DEFAULTS.learning_rate} --num_train_epochs {DEFAULTS.epochs}"
FINE_TUNINGS: dict[Classifiers, str] = {
    "small": "finetune-small",
    "paper": f"{FINETUNING} --gene_space expressed {RATE}",
}
TITLES: dict[Classifiers, str] = {"small": "finetune-small", "paper": "The paper's classifier"}


def explain_labelled_cells(
    data: LabelledData,
    options: ExplainOptions,
    *,
    output: str | Path,
    work: str | Path,
    other: LabelledData | None = None,
    test_share: float = 0.2,
    classifier: Classifiers = "small",
    num_compared: int = 10,
    methods: Sequence[str] = METHODS,
    command: str = "explain_labelled_cells",
) -> Json:
    """Train, explain other cells, compare methods; write ``explanations-DATA.*``; return the JSON.

    Parameters
    ----------
    data
        Labelled cells.
    options
        Of the explanation.
    output
        Folder for JSON, Markdown and figures.
    work
        Folder for the whole explanation.
    other
        Cells to explain, when all of `data` train; their labels are names of the classes, or of the model's labels.
    test_share
        Share of `data` to explain, otherwise.
    classifier
        ``"small"``: the recipe `finetune-small`; ``"paper"``: the paper's classifier, with no regression to start from.
    num_compared
        Cells of the first class that all methods explain; 0: none, the methods are not compared.
    methods
        Which.
    command
        What the result says that it was made by.

    Raises
    ------
    ValueError
        `test_share` is no share, or as `explain_file`.
    """
    train, unseen = _split(data, other, test_share)
    known = _labelled(data, train)
    name = (data if other is None else other).name
    system = ScReformerSystem(FINE_TUNINGS[classifier])
    logger.info("fine-tuning on %d cells", len(train))
    system.fit(data.adata[train].copy(), data.labels[train].tolist(), seed=options.seed)
    trained = system.trained
    kinds = [classifier if classifier != "small" else None, options.gene_space]
    stem = "-".join(["explanations", name, *(kind for kind in kinds if kind is not None)])
    folder = Path(work, stem)
    folder.mkdir(parents=True, exist_ok=True)
    test_file, train_file = (folder / f"{each}.h5ad" for each in (f"{name}-test", f"{data.name}-train"))
    unseen.write_h5ad(test_file)
    known.write_h5ad(train_file)
    explanation = explain_file(
        test_file,
        trained,
        folder,
        options,
        label_column=LABEL,
        background=train_file,
        overwrite=True,
        announce=logger.info,
        command=command,
    )
    results: Json = {
        "question": f"Which genes make the cells of {name} what they are, to the model?",
        "name": stem,
        "data": name,
        "train_data": data.name,
        "classifier": TITLES[classifier],
        "num_train": len(train),
        "num_test": unseen.n_obs,
        "named_so": _shares_named_so(trained, unseen, options),
        **provenance(command),
        **{
            key: explanation.results[key]
            for key in (
                "gene_space",
                "sampling",
                "score",
                "num_background",
                "price",
                "seconds",
                "peak_bytes",
                "classes",
            )
        },
        "methods": _compare_methods(trained, unseen, known, options, methods, num_compared) if num_compared else [],
    }
    _write(results, explanation, Path(output))
    return results


def _split(data: LabelledData, other: LabelledData | None, test_share: float) -> tuple[npt.NDArray[np.int64], AnnData]:
    """Return the rows of `data` that train, and the cells to explain."""
    every = np.arange(data.adata.n_obs)
    if other is not None:
        return every, _labelled(other, np.arange(other.adata.n_obs))
    if not 0 < test_share < 1:
        raise ValueError(f"test_share got {test_share}; it must lie between 0 and 1")
    train, test = train_test_split(every, test_size=test_share, stratify=data.labels, random_state=SPLIT_SEED)
    return np.sort(train), _labelled(data, np.sort(test))


def _shares_named_so(trained: Classifier, unseen: AnnData, options: ExplainOptions) -> dict[str, float | None]:
    """Return class -> the share of its cells, by their labels, that the model names so."""
    named = annotate(unseen, trained, copy=True, progress=False)
    assert named is not None
    found, given = named.obs["screformer_cell_type"].astype(str), named.obs[LABEL].astype(str)
    shares = {}
    for text in options.classes:
        score = ClassScore.parse(trained.model.config, text, options.score)
        labels = score.labels(trained.model.config)
        own = given.isin(labels)
        shares[score.name] = float(found[own].isin(labels).mean()) if own.any() else None
    return shares


def _labelled(data: LabelledData, rows: npt.NDArray[np.int64]) -> AnnData:
    adata = data.adata[rows].copy()
    adata.obs[LABEL] = data.labels[rows].tolist()
    return adata


def _compare_methods(
    trained: Classifier,
    unseen: AnnData,
    known: AnnData,
    options: ExplainOptions,
    methods: Sequence[str],
    num_cells: int,
) -> list[Json]:
    """Return a row a method: gap, correlation with the reference over the genes of a cell, seconds a cell."""
    score = ClassScore.parse(trained.model.config, options.classes[0], options.score)
    gene_space = options.gene_space or trained.model.config.gene_space
    chosen = choose_cells(
        CellFile(unseen, LABEL, progress=False),
        CellFile(known, LABEL, progress=False),
        trained,
        [score],
        num_cells=num_cells,
        num_background=options.num_background,
        gene_space=gene_space,
        seed=options.seed,
    )
    explainer = Explainer(trained.model, chosen.background.bins, gene_space, options.batch_size)
    bins = chosen.of_class[0].bins

    def values_by(sampling: Sampling) -> tuple[npt.NDArray[np.float32], float]:
        begin = time.perf_counter()
        found = [explainer.values(score, own, sampling, number=number) for number, own in enumerate(bins)]
        return np.stack(found), (time.perf_counter() - begin) / len(bins)

    reference, _ = values_by(Sampling("expected_gradients", NUM_REFERENCE_POINTS, options.seed + 1, None))
    rows = []
    samplings = {
        method: Sampling(method, options.sampling.num_points, options.seed, options.sampling.max_sum_error)  # type: ignore[arg-type]
        for method in methods
    }
    if "expected_gradients" in samplings and options.sampling.max_sum_error is not None:
        samplings[AS_DRAWN] = samplings["expected_gradients"]._replace(max_sum_error=None)
    for method, sampling in samplings.items():
        logger.info("%s of %d cells", method, len(bins))
        values, seconds = values_by(sampling)
        near = [float(spearmanr(ours, theirs).statistic) for ours, theirs in zip(values, reference, strict=True)]
        found = completeness(explainer, score, bins, values, sampling)
        rows.append(
            {
                "method": method,
                "num_points": sampling.num_points,
                "seconds_a_cell": seconds,
                "rank_correlation": float(np.median(near)),
                **found,
            }
        )
    return rows


def _write(results: Json, explanation: Explanation, output: Path) -> None:
    stem = results["name"]
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"{stem}.json", results)
    named = file_names([one["class"] for one in results["classes"]])
    for one in results["classes"]:
        for figure in FIGURES:
            own = f"{figure}-{named[one['class']]}.png"
            (output / f"{stem}-{own}").write_bytes((explanation.output / own).read_bytes())
    (output / f"{stem}.md").write_text(format_explanations(results, output), encoding="utf-8")


def format_explanations(results: Json, folder: Path) -> str:
    """Return the result as Markdown; the figures lie in `folder`."""
    price, took = results["price"], ""
    if results["seconds"] is not None:
        took = f"; it took {results['seconds']:.0f} s and {results['peak_bytes'] / 1e9:.1f} GB"
    named = ", ".join(
        f"{'-' if share is None else f'{share:.1%}'} of {name}" for name, share in results["named_so"].items()
    )
    rows = [
        [
            row["method"].replace("_", " "),
            f"{row['num_points']}",
            f"{row['median_gap']:.1%}",
            f"{row['largest_gap']:.1%}",
            f"{row['rank_correlation']:.2f}",
            f"{row['seconds_a_cell']:.2f}",
        ]
        for row in results["methods"]
    ]
    columns = ["method", "points", "median gap", "largest gap", "rank correlation with many points", "seconds a cell"]
    blocks: list[Block] = [
        Text(
            f"{results['date']}, `{results['command']}`, screformer {results['versions']['screformer']}. "
            f"{results['classifier']}, tiny, trained on {results['num_train']:,} cells of {results['train_data']}; of "
            f"{results['num_test']:,} other cells of {results['data']} the model gives their class to {named}. "
            f"{results['gene_space'].capitalize()} gene space; {sampling_as_words(results['sampling'])}, "
            f"{results['num_background']} background cells of the training. "
            f"Estimated before: {price['seconds']:.0f} s and {price['peak_bytes'] / 1e9:.1f} GB{took}."
        )
    ]
    for one in results["classes"]:
        blocks += class_blocks(one, folder, stem=f"{results['name']}-")
    if rows:
        blocks += [
            Heading("Methods"),
            Text(
                f"The same {results['methods'][0]['num_cells']} cells of the first class. Gap: by how much a cell's "
                "values miss what they should sum to. The correlation is over the genes of a cell, with expected "
                f"gradients of {NUM_REFERENCE_POINTS} points, another seed; median of the cells."
            ),
            Cells("Methods", columns, rows),
        ]
    return blocks_as_markdown(results["question"], blocks, folder=folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="screformer benchmark explanations",
        description="Train on a part of labelled cells, explain another, and compare methods.",
        epilog='example: screformer benchmark explanations --cells pbmc3k_10x.h5ad --class "T cells=CD4 T cells|CD8 T '
        'cells" --gene CD3D CD3E CD2 IL7R PTPRC',
    )
    parser.add_argument("--cells", help="FILE[:LABELS]; default: the packaged pancreas.")
    parser.add_argument("--test-cells", help="FILE[:LABELS] to explain; then all of --cells train.")
    parser.add_argument("--test-share", type=float, default=0.2, help="Of --cells, otherwise (default: %(default)s).")
    parser.add_argument("--classifier", default="small", choices=list(TITLES), help="finetune-small, or the paper's.")
    parser.add_argument("--class", dest="classes", nargs="+", required=True, help="As for screformer explain.")
    parser.add_argument("--gene", nargs="+", default=[], help="Report the places of these.")
    parser.add_argument("--markers", help="As for screformer explain.")
    parser.add_argument("--marker-type", nargs="+", default=[], help="As for screformer explain.")
    parser.add_argument("--score", default="logit", choices=["logit", "log_odds"])
    parser.add_argument("--points", type=int, default=Sampling().num_points, help="(default: %(default)s)")
    parser.add_argument("--num-cells", type=int, default=1000, help="Of each class (default: %(default)s).")
    parser.add_argument("--num-background", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--num-compared", type=int, default=10, help="Cells that all methods explain; 0: none.")
    parser.add_argument("--gene-space", choices=["full", "expressed"], help="Instead of the model's.")
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--work", default="runs/explanations", help="Folder for the rest (default: %(default)s).")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("screformer.benchmarks").setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = ExplainOptions(
        given.classes,
        sampling=Sampling(num_points=given.points),
        score=given.score,
        num_cells=given.num_cells,
        num_background=given.num_background,
        gene_space=given.gene_space,
        genes=given.gene,
        markers=given.markers,
        marker_types=given.marker_type,
    )
    try:
        results = explain_labelled_cells(
            _read(given.cells or str(example_cells_path())),
            options,
            output=given.output,
            work=given.work,
            other=None if given.test_cells is None else _read(given.test_cells),
            test_share=given.test_share,
            classifier=given.classifier,
            num_compared=given.num_compared,
            command=f"screformer benchmark explanations {shlex.join(without_folders(arguments))}",
        )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(format_explanations(results, Path(given.output)))


def _read(text: str) -> LabelledData:
    one = CellsToCompareOn.parse(text)
    return read_labelled_data(one.path, label_column=one.label_column)


if __name__ == "__main__":
    main()
