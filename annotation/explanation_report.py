"""What an explanation is written as: tables of genes, an h5ad, a page in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData
from scipy import sparse

from screformer.annotation.explained_cells import SomeCells
from screformer.annotation.explanation_checks import EXPLANATION
from screformer.model_cards.markdown import table
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.train.result_files import written_aside

Json = Mapping[str, Any]
NUM_LISTED = 20
VALUES_LAYER, CLASS_COLUMN = "values", "explained_class"


def gene_table(
    values: npt.NDArray[np.float32],
    bins: npt.NDArray[np.uint8],
    vocabulary: GeneVocabulary,
    background: npt.NDArray[np.uint8],
    regression_weights: npt.NDArray[np.float64] | None = None,
) -> pd.DataFrame:
    """Return a row a gene with a value in some cell, the one that counts most first.

    ``gene`` and ``ensembl_id``; ``mean_abs_value`` and ``mean_value`` over the cells, and ``mean_where_expressed`` over
    those that express it (NaN: none); ``sign``, 1 where high expression raises the score (the correlation of value and
    bin over the cells, or where the bin is the same in all the mean value), -1 where it lowers it; ``mean_bin`` and
    ``share_expressed`` of the cells, ``background_share_expressed``; ``regression_place``, the gene's place by a
    logistic regression's weight times the mean bin, 0 without one.

    Parameters
    ----------
    values, bins
        (cells, num_genes).
    vocabulary
        The model's genes.
    background
        (cells, num_genes): bins of the background.
    regression_weights
        (num_genes,), of a bin.
    """
    mean_abs = np.abs(values).mean(axis=0)
    genes = np.argsort(-mean_abs, kind="stable")[: int((mean_abs > 0).sum())]
    own, levels = values[:, genes].astype(np.float64), bins[:, genes].astype(np.float64)
    together = ((own - own.mean(axis=0)) * (levels - levels.mean(axis=0))).mean(axis=0)
    signs = np.sign(np.where(np.abs(together) > 1e-12, together, own.mean(axis=0)))
    num_expressed = (levels > 0).sum(axis=0)
    where_expressed = np.where(
        num_expressed > 0, (own * (levels > 0)).sum(axis=0) / np.maximum(num_expressed, 1), np.nan
    )
    places = np.zeros(len(vocabulary), dtype=np.int64)
    if regression_weights is not None:
        by_regression = np.argsort(-np.abs(regression_weights) * bins.mean(axis=0), kind="stable")
        places[by_regression] = np.arange(1, len(places) + 1)
    return pd.DataFrame(
        {
            "gene": [vocabulary.symbols[gene] for gene in genes],
            "ensembl_id": [vocabulary.ensembl_ids[gene] for gene in genes],
            "mean_abs_value": mean_abs[genes],
            "mean_value": own.mean(axis=0),
            "mean_where_expressed": where_expressed,
            "sign": signs.astype(int),
            "mean_bin": levels.mean(axis=0),
            "share_expressed": (levels > 0).mean(axis=0),
            "background_share_expressed": (background[:, genes] > 0).mean(axis=0),
            "regression_place": places[genes],
        }
    )


def write_parquet(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Write the tables of all classes as one, with a column ``class`` and a column ``rank``."""
    whole = pd.concat(
        [
            of_class.assign(rank=np.arange(1, len(of_class) + 1)).assign(**{"class": name})
            for name, of_class in tables.items()
        ],
        ignore_index=True,
    )
    with written_aside(path) as aside:
        whole.to_parquet(aside, index=False)


def write_h5ad(
    cells: Mapping[str, SomeCells],
    values: Mapping[str, npt.NDArray[np.float32]],
    vocabulary: GeneVocabulary,
    record: dict[str, Any],
    path: Path,
) -> None:
    """Write the explained cells: ``X`` are their bins, the layer ``values`` what each gene adds to the class's score.

    ``obs["explained_class"]`` says which class, ``obs["label"]`` what the cell is; a cell of two classes is in two
    rows. ``varm["mean_abs_value"]`` and ``varm["mean_value"]`` have a column a class.
    """
    parts = []
    for name, own in cells.items():
        obs = pd.DataFrame(
            {CLASS_COLUMN: name, "label": own.labels.astype(object), "cell": own.names, "row": own.rows},
            index=[f"{cell} {name}" for cell in own.names],
        )
        parts.append((obs, sparse.csr_matrix(own.bins), sparse.csr_matrix(values[name])))
    obs = pd.concat([part[0] for part in parts])
    var = pd.DataFrame({"symbol": list(vocabulary.symbols)}, index=list(vocabulary.ensembl_ids))
    adata = AnnData(
        sparse.vstack([part[1] for part in parts], format="csr"), obs=obs.astype({CLASS_COLUMN: "category"}), var=var
    )
    adata.layers[VALUES_LAYER] = sparse.vstack([part[2] for part in parts], format="csr")
    for key, measure in (
        ("mean_abs_value", lambda each: np.abs(each).mean(axis=0)),
        ("mean_value", lambda each: each.mean(axis=0)),
    ):
        adata.varm[key] = pd.DataFrame({name: measure(each) for name, each in values.items()}, index=var.index)
    adata.uns["explanation"] = record
    with written_aside(path) as aside:
        adata.write_h5ad(aside, compression="gzip")


def format_explanation(results: Json) -> str:
    """Return the result as Markdown: what was explained and how, then each class with its checks."""
    lines = [
        f"# What makes a cell {_joined([one['class'] for one in results['classes']])}?",
        f"{results['date']}, `{results['command']}`, screformer {results['versions']['screformer']}, model "
        f"`{results['model']['name']}`, {results['gene_space']} gene space.",
        f"Values by {results['sampling']['method'].replace('_', ' ')}, {results['sampling']['num_points']} points a "
        f"cell, beside {results['num_background']} background cells of {results['background_file']}. They are in units "
        f"of the class's {results['score'].replace('_', ' ')}, and sum to that of the cell less the background's.",
        _cost(results),
    ]
    for one in results["classes"]:
        lines += ["", *format_class(one)]
    return "\n\n".join(line for line in lines if line) + "\n"


def _cost(results: Json) -> str:
    price = results["price"]
    told = f"Estimated before: {price['seconds']:.0f} s and {price['peak_bytes'] / 1e9:.1f} GB"
    if results["seconds"] is None:
        return f"{told}; some of the values are of an earlier run, so that the whole has no time."
    return f"{told}; it took {results['seconds']:.0f} s and {results['peak_bytes'] / 1e9:.1f} GB."


def format_class(one: Json) -> list[str]:
    """Return the paragraphs of one class: its genes, its checks, the genes that were asked for."""
    lines = [
        f"## {one['class']}",
        f"{one['num_cells']} cells of {one['file']}.",
        _genes_table(one["top"]),
        *checks(one),
    ]
    if one["genes_asked"]:
        lines += ["Genes that were asked for:", _genes_table(one["genes_asked"])]
    return lines


def _genes_table(genes: Sequence[Json]) -> str:
    columns = [
        "place", "gene", "mean absolute value", "mean value", "where expressed", "high expression", "share of cells",
        "of the background", "mean bin", "place by logistic regression",
    ]  # fmt: skip
    rows = [
        [
            f"{row['place']}",
            row["gene"],
            f"{row['mean_abs_value']:.4f}",
            f"{row['mean_value']:+.4f}",
            "-" if row["mean_where_expressed"] is None else f"{row['mean_where_expressed']:+.4f}",
            "raises" if row["sign"] > 0 else "lowers",
            f"{row['share_expressed']:.0%}",
            f"{row['background_share_expressed']:.0%}",
            f"{row['mean_bin']:.2f}",
            f"{row['regression_place'] or '-'}",
        ]
        if row["place"] is not None
        else ["-", row["gene"], *["-"] * 8]
        for row in genes
    ]
    return table(columns, rows)


def checks(one: Json) -> list[str]:
    """Return the sentences that say what a class's explanation is worth."""
    gap, stable = one["completeness"], one["stability"]
    lines = [
        f"- **Adds up**: the values of a cell miss the difference to the background by {gap['median_gap']:.1%} (median "
        f"of {gap['num_cells']} cells; the most is {gap['largest_gap']:.1%}). The mean difference is "
        f"{gap['mean_effect']:+.2f}.",
        f"- **Stays the same**: with another seed and another background the ranks of the {stable['num_genes']} genes "
        f"that count most correlate at {_shown(stable['rank_correlation'])} ({stable['num_cells']} cells), and "
        f"{stable['shared']:.0%} of them are among them again.",
    ]
    lines += _curve_lines(one["curves"])
    markers = one["markers"]
    if markers is not None:
        lines.append(
            f"- **Known markers**: {markers['hits']} of the {markers['num_top']} genes that count most are among the "
            f"{markers['num_markers']} of {markers['file']}; by chance {markers['expected']:.1f} would be (p = "
            f"{markers['p']:.2g}, hypergeometric, {markers['num_seen']:,} expressed genes)."
        )
    return ["\n".join(lines)]


def _curve_lines(curves: Json) -> list[str]:
    lines = []
    for name, words, wanted in (
        ("deletion_probability", "taken away", "falls"), ("insertion_probability", "put back alone", "rises")
    ):  # fmt: skip
        areas, less = curves[name]["areas"], curves[name]["less"]
        sign = -1 if wanted == "falls" else 1
        told = [
            f"{_verdict(sign, one)} than by {order} ({one['mean']:+.3f}, {one['interval'][0]:+.3f} to "
            f"{one['interval'][1]:+.3f})"
            for order, one in less.items()
        ]
        lines.append(
            f"- **Genes {words}**: the probability is {areas[EXPLANATION]:.3f} on average over {curves['steps'][1]} to "
            f"{curves['steps'][-1]} genes; it {wanted} {'; '.join(told)}."
        )
    return lines


def _verdict(sign: int, difference: Json) -> str:
    low, high = (sign * end for end in difference["interval"])
    low, high = min(low, high), max(low, high)
    return "faster" if low > 0 else "slower" if high < 0 else "no faster and no slower"


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
