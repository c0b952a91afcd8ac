"""An explanation as a page: what was explained and how, each class with its genes, checks and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from screformer.annotation.explanation_checks import EXPLANATION
from screformer.model_cards.page_blocks import (
    Block,
    Bullets,
    Cells,
    Heading,
    Picture,
    Text,
    blocks_as_markdown,
    write_blocks_as_html,
)
from screformer.train.result_files import written_aside

Json = Mapping[str, Any]
NUM_LISTED = 20
PAGE = "explanation"
MAX_GAP = 0.02
MIN_STABLE = 0.9  # rank correlation
FEWEST_CELLS = 10  # for an interval over cells
ROUGH = (
    " Single cells' values are rough then: take more points (`--points`), or a smaller "
    "`--sum-error`; means over many cells suffer less."
)
TITLE = "Which genes make a cell one of its type, to the model?"
GENE_COLUMNS = (
    "place", "gene", "mean absolute value", "mean value", "where expressed", "high expression", "share of cells",
    "of the background", "mean bin", "place by logistic regression",
)  # fmt: skip


def write_page(results: Json, folder: Path) -> None:
    """Write ``explanation.md`` and ``explanation.html``; the figures are in the folder already."""
    blocks: list[Block] = [Text(_how(results)), Text(_cost(results))]
    named = file_names([one["class"] for one in results["classes"]])
    for one in results["classes"]:
        blocks += class_blocks(one, folder, named=named[one["class"]])
    if len(results["classes"]) > 1:
        blocks += [
            Heading("Classes beside each other"),
            Picture(
                folder / "classes.png",
                "Mean values of the genes that count most, in the cells of each class.",
                f"Heat map of genes by {len(results['classes'])} classes.",
            ),
        ]
    with written_aside(folder / f"{PAGE}.md") as aside:
        aside.write_text(blocks_as_markdown(TITLE, blocks, folder=folder), encoding="utf-8")
    write_blocks_as_html(folder / f"{PAGE}.html", TITLE, blocks)


def _how(results: Json) -> str:
    return (
        f"{results['date']}, `{results['command']}`, screformer {results['versions']['screformer']}, model "
        f"`{Path(results['model']['name']).name}`, {results['gene_space']} gene space. Values by "
        f"{sampling_as_words(results['sampling'])}, beside "
        f"{results['num_background']} background cells of {results['background_file']}"
        f"{_shared(results.get('num_in_background', 0))}. They are in units of the "
        f"class's {results['score'].replace('_', ' ')}, and sum to that of the cell less the background's."
    )


def _shared(number: int) -> str:
    return f", {number:,} of which are explained too" if number else ""


def sampling_as_words(sampling: Json) -> str:
    """Return the method, its points and how well the sums are known, of the record's ``sampling``."""
    told = f"{sampling['method'].replace('_', ' ')}, {sampling['num_points']} points a cell"
    most = sampling["max_sum_error"]
    if sampling["method"] != "expected_gradients" or most is None:
        return told
    return f"{told} and sums by forward passes, to a standard error of {most:.1%}, where points do not give them"


def _cost(results: Json) -> str:
    price = results["price"]
    told = f"Estimated before: {price['seconds']:.0f} s and {price['peak_bytes'] / 1e9:.1f} GB"
    if results["seconds"] is None:
        return f"{told}; some of the values are of an earlier run, so that the whole has no time."
    return f"{told}; it took {results['seconds']:.0f} s and {results['peak_bytes'] / 1e9:.1f} GB."


def class_blocks(one: Json, folder: Path, *, stem: str = "", named: str | None = None) -> list[Block]:
    """Return one class: its genes, checks and figures, and the genes that were asked for.

    Parameters
    ----------
    one
        Of the record's ``classes``.
    folder
        Where the figures lie.
    stem
        What their names begin with.
    named
        What they call the class; default `file_name`.
    """
    name, named = one["class"], named or file_name(one["class"])
    top = one["top"][0]["gene"] if one["top"] else "none"
    blocks: list[Block] = [
        Heading(name),
        Text(f"{one['num_cells']:,} cells of {one['file']}."),
        Cells(f"Genes of {name}", GENE_COLUMNS, _gene_rows(one["top"])),
        Bullets(check_sentences(one)),
        Picture(
            folder / f"{stem}beeswarm-{named}.png",
            "A point a cell: what the gene adds to the class's score, coloured by its expression.",
            f"Beeswarm of the values of {len(one['top'])} genes; the first is {top}.",
        ),
        Picture(
            folder / f"{stem}genes-{named}.png",
            "The same genes by mean absolute value; the colour says what high expression does to the score.",
            f"Bars of {len(one['top'])} genes.",
        ),
        Picture(
            folder / f"{stem}curves-{named}.png",
            "The class's probability as expressed genes are taken away, the highest first, and as they come back.",
            "Curves of the mean probability over the number of genes, by three orders of the genes.",
        ),
    ]
    if one["genes_asked"]:
        blocks += [Heading("Genes that were asked for", 3)]
        blocks += [Cells(f"Genes asked for, {name}", GENE_COLUMNS, _gene_rows(one["genes_asked"]))]
        blocks += [Text(asked_sentence(one["genes_asked"]))]
    return blocks


def asked_sentence(genes: Sequence[Json]) -> str:
    """Return which of the genes that were asked for are among the first, and what is known of the others."""
    first = [row for row in genes if row["place"] is not None and row["place"] <= NUM_LISTED]
    lowering = [row["gene"] for row in first if row["sign"] < 0]
    others = [_apart(row) for row in genes if row not in first]
    if first:
        told = (
            f"Among the {NUM_LISTED} genes that count most are {len(first)} of the {len(genes)} that were asked for: "
            f"{', '.join(row['gene'] for row in first)}; high expression "
            + (f"of {', '.join(lowering)} lowers the score." if lowering else "raises the score.")
        )
    else:
        told = f"None of the {len(genes)} genes that were asked for is among the {NUM_LISTED} that count most."
    return told + (f" The others: {'; '.join(others)}." if others else "")


def _apart(row: Json) -> str:
    if row["place"] is None:
        return f"{row['gene']}, in none of these cells"
    place = row["regression_place"]
    return (
        f"{row['gene']}, place {row['place']}, which {row['share_expressed']:.0%} of these cells express and "
        f"{row['background_share_expressed']:.0%} of the background"
        + (f" (place {place} by logistic regression)" if place is not None else "")
    )


def _gene_rows(genes: Sequence[Json]) -> list[list[str]]:
    return [
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
        else ["-", row["gene"], *["-"] * (len(GENE_COLUMNS) - 2)]
        for row in genes
    ]


def check_sentences(one: Json) -> list[str]:
    """Return what a class's explanation is worth, a sentence a check."""
    gap, stable, markers = one["completeness"], one["stability"], one["markers"]
    adds_up = gap["median_gap"] <= MAX_GAP
    lines = [
        f"{'It adds up' if adds_up else 'It does not add up well'}: the values of a cell miss the difference to the "
        f"background by {gap['median_gap']:.1%} (median of {gap['num_cells']} cells; the most is "
        f"{gap['largest_gap']:.1%}). The mean difference is {gap['mean_effect']:+.2f}."
        + _as_drawn(gap)
        + ("" if adds_up else ROUGH),
        f"{_stays(stable)}: with another seed and a background drawn anew the ranks of the {stable['num_genes']} genes "
        f"that count most correlate at {_shown(stable['rank_correlation'])} ({stable['num_cells']} cells), and "
        f"{stable['shared']:.0%} of them are among them again.",
        *_curve_sentences(one["curves"], one["num_cells"]),
    ]
    if markers is not None:
        lines.append(
            f"Known markers: {markers['hits']} of the {markers['num_top']} genes that count most are among the "
            f"{markers['num_markers']} of {markers['file']}; by chance {markers['expected']:.1f} would be (p = "
            f"{markers['p']:.2g}, hypergeometric, {markers['num_seen']:,} expressed genes)."
        )
    return lines


def _as_drawn(gap: Json) -> str:
    """Return what the points alone leave open, where forward passes were there to find it."""
    left = gap.get("as_drawn")
    return "" if left is None else f" By the points alone they would miss it by {left:.1%}."


def _stays(stable: Json) -> str:
    correlation = stable["rank_correlation"]
    return "It stays the same" if correlation is not None and correlation >= MIN_STABLE else "It does not stay the same"


def _curve_sentences(curves: Json, num_cells: int) -> list[str]:
    lines = []
    for name, words, wanted, sign in (
        ("deletion_probability", "taken away", "falls", -1), ("insertion_probability", "put back alone", "rises", 1)
    ):  # fmt: skip
        less = curves[name]["less"].items()
        told = [
            f"{_verdict(sign, one)} than by {order} ({one['mean']:+.3f}, {one['interval'][0]:+.3f} to "
            f"{one['interval'][1]:+.3f})"
            for order, one in less
        ]
        if num_cells < FEWEST_CELLS:
            told = [f"by {one['mean']:+.3f} beside {order}, of too few cells for an interval" for order, one in less]
        lines.append(
            f"Genes {words}: the probability is {curves[name]['areas'][EXPLANATION]:.3f} on average over "
            f"{curves['steps'][1]} to {curves['steps'][-1]} genes; it {wanted} {'; '.join(told)}."
        )
    return lines


def _verdict(sign: int, difference: Json) -> str:
    low, high = sorted(sign * end for end in difference["interval"])
    return "faster" if low > 0 else "slower" if high < 0 else "no faster and no slower"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def file_names(names: Sequence[str]) -> dict[str, str]:
    """Return class -> its name as part of a file's, with its number in front where two would be the same."""
    plain = [file_name(name) for name in names]
    times = Counter(name.casefold() for name in plain)  # some systems do not tell a from A
    return {
        name: each if times[each.casefold()] == 1 else f"{number}-{each}"
        for number, (name, each) in enumerate(zip(names, plain, strict=True), start=1)
    }


def file_name(name: str) -> str:
    """Return a class's name as part of a file's."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
