"""All committed comparisons as one page: Markdown, HTML, JSON for model cards, figures, and the README's tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from screformer.benchmarks.comparison_sections import (
    KIND_TITLES,
    ablation_blocks,
    across_blocks,
    comparison_blocks,
    few_labels_blocks,
    gap_blocks,
    heading_of,
)
from screformer.benchmarks.comparison_statistics import BASELINE, pooled_macro_f1
from screformer.benchmarks.comparison_tables import number, shown_title
from screformer.benchmarks.comparison_verdicts import outcome, tally_sentence
from screformer.model_cards.markdown import bullets, plain
from screformer.model_cards.page_blocks import (
    Block,
    Bullets,
    Cells,
    Heading,
    Text,
    blocks_as_markdown,
    cells_as_markdown,
    write_blocks_as_html,
)
from screformer.train.result_files import read_json, write_json, written_aside

Results = Mapping[str, Any]  # Any: JSON
TITLE = "Systems that name cell types, compared"
NAME = "benchmark_report"
BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"
NO_RESULTS = "No results are committed yet."
README_SENTENCE = (
    "Accuracy / macro-F1 / macro-F1 of the test cells of all folds together; the first two are means over folds, in "
    "which a type with one cell in a fold weighs like any other. Intervals, tests, F1 of each cell type, seconds, "
    "memory and the command are behind the links. A system with * names a cell by the others that are named with it. "
    "The pancreas is the set on which this project was developed: settings of ours and of some rivals were chosen "
    "after scores of donors that are test donors here; the other sets are cleaner."
)
SHORT_KINDS = {"five_fold": "random folds", "leave_one_group_out": "unseen donors", "random": "one random split"}
README_KINDS = ("leave_one_group_out", "five_fold")
# What the page reads of each kind of file, at the top.
COMPARISON_KEYS = ("data", "kind", "is_weak", "systems", "paired_tests", "runs", "left_out")
FEW_LABELS_KEYS = ("data", "kind", "points", "left_out")
ABLATION_KEYS = ("question", "date", "command", "columns", "rows")
LIMITATIONS = (
    "Intervals are of the folds at hand, which share training cells: they are too narrow rather than too wide.",
    "The packaged pancreas is the set on which this project was developed: the recipe finetune-small, SingleR's method "
    "and scBERT's settings were chosen after scores of donors that are test donors of other folds here, and scCATCH's "
    "choice of clusterings after scores. Figures on the other sets are cleaner.",
    "The best rival was chosen by the same test cells, which favours it.",
    "Published labels often come from clusters of the same cells, which favours systems that cluster.",
)


class CommittedResults(NamedTuple):
    """What lies in a folder of results: `comparisons` by data and kind, few-label `curves`, and `ablations`."""

    comparisons: list[Results]
    curves: list[Results]
    ablations: list[Results]


def write_benchmark_report(results: str | Path, output: str | Path, *, readme: str | Path | None = None) -> Path:
    """Write ``benchmark_report.md``, ``.html``, ``.json`` and the figures; return the path of the HTML.

    Weak sets are shown and marked, but are in no summary, in no claim and not in the README.

    Parameters
    ----------
    results
        Folder with ``comparison-*.json``, ``few-labels-*.json`` and ``ablations*.json``.
    output
        Folder to write to; figures are in ``benchmark_report_figures`` in it.
    readme
        Markdown file whose text between the markers of the benchmark table is replaced, too.

    Raises
    ------
    ValueError
        `results` is no folder, a file in it lacks what the page reads, or `readme` lacks the markers.
    """
    found = read_results(results)
    text = None if readme is None else readme_text(results, readme)  # first: it may be refused
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    blocks = report_blocks(found, folder / f"{NAME}_figures")
    _write(folder / f"{NAME}.md", blocks_as_markdown(TITLE, blocks, folder=folder))
    write_json(folder / f"{NAME}.json", score_records(found.comparisons))
    if readme is not None and text is not None:
        _write(Path(readme), text)
    return write_blocks_as_html(folder / f"{NAME}.html", TITLE, blocks)


def read_results(folder: str | Path) -> CommittedResults:
    """Return the results in a folder, by file name.

    Raises
    ------
    ValueError
        It is no folder, or a file lacks what the page reads.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"results got {str(folder)!r}, which is no folder; give the --output of screformer benchmark")
    comparisons = [path for path in sorted(Path(folder).glob("comparison-*.json")) if not path.stem.endswith("-split")]
    return CommittedResults(
        [_read(path, COMPARISON_KEYS) for path in comparisons],
        [_read(path, FEW_LABELS_KEYS) for path in sorted(Path(folder).glob("few-labels-*.json"))],
        [_read(path, ABLATION_KEYS) for path in sorted(Path(folder).glob("ablations*.json"))],
    )


def _read(path: Path, keys: Sequence[str]) -> Results:
    found: Results = read_json(path)
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(map(repr, missing))}: it is of another format. Run the command in it again, "
            "and delete the file if that writes another"
        )
    return found


def report_blocks(found: CommittedResults, figures: Path) -> list[Block]:
    """Return the page: what came out, data sets against each other, then each comparison; draw its figures."""
    comparisons = found.comparisons
    if not comparisons:
        summary: list[Block] = [Text(NO_RESULTS)]
    else:
        strong = [results for results in comparisons if not results["is_weak"]]
        lines = [f"{heading_of(results)}: {' '.join(outcome(results).lines)}" for results in strong]
        summary = [Text(tally_sentence(strong)), Bullets(lines)]
        weak = [heading_of(results) for results in comparisons if results["is_weak"]]
        summary += [Text(f"Shown below, but in no summary: {'; '.join(weak)}.")] if weak else []
        summary += [Heading("What these numbers do not show"), Bullets(LIMITATIONS)]
    is_weak = [(results["data"], results["kind"]) for results in comparisons if results["is_weak"]]
    return [
        Heading("What came out"),
        *summary,
        *across_blocks(comparisons),
        *gap_blocks(comparisons, figures),
        *few_labels_blocks(found.curves, is_weak, figures),
        *ablation_blocks(found.ablations),
        *(block for results in comparisons for block in comparison_blocks(results, figures)),
    ]


def score_records(comparisons: Sequence[Results]) -> list[dict[str, Any]]:  # Any: JSON
    """Return a flat record for each system of each comparison, for model cards."""
    records = []
    for results in comparisons:
        for name, row in results["systems"].items():
            less = row.get("less_baseline") or {}
            records.append(
                {
                    **{key: results[key] for key in ("data", "kind", "num_folds", "seeds")},
                    "system": name,
                    **{key: row[key] for key in ("title", "is_inductive")},
                    **{key: row[key] for score in ("accuracy", "macro_f1") for key in (score, f"{score}_interval")},
                    "pooled_macro_f1": pooled_macro_f1(row),
                    f"macro_f1_less_{BASELINE}": less.get("macro_f1"),
                    f"macro_f1_less_{BASELINE}_interval": less.get("macro_f1_interval"),
                    **{key: results[key] for key in ("date", "is_weak")},
                }
            )
    return records


def readme_text(results: str | Path, readme: str | Path) -> str:
    """Return the text of `readme` with the tables of `results` between the markers; write nothing.

    Raises
    ------
    ValueError
        There is not one begin and after it one end, or as `read_results`.
    """
    text = Path(readme).read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or text.count(BEGIN) + text.count(END) != 2:
        raise ValueError(
            f"readme {str(readme)!r} must have one line {BEGIN!r} and after it one line {END!r}; write them where the "
            "tables shall be"
        )
    folder = Path(os.path.relpath(results, Path(readme).parent)).as_posix()
    return f"{before}{begin}\n{readme_section(read_results(results).comparisons, folder)}\n{end}{after}"


def readme_section(comparisons: Sequence[Results], folder: str) -> str:
    """Return one table of the comparisons that are not weak, and what each says; links go to files in `folder`."""
    chosen = [
        results
        for kind in README_KINDS
        for results in comparisons
        if results["kind"] == kind and not results["is_weak"]
    ]
    if not chosen:
        return NO_RESULTS
    return "\n\n".join(
        [README_SENTENCE, cells_as_markdown(_readme_table(chosen)), *(_readme_outcome(one, folder) for one in chosen)]
    )


def _readme_table(chosen: Sequence[Results]) -> Cells:
    """Return a row a system, those with the highest mean macro-F1 first, then those that are not in every column."""
    titles = {name: shown_title(row) for results in chosen for name, row in results["systems"].items()}

    def place(name: str) -> tuple[bool, float]:
        scores = [results["systems"][name]["macro_f1"] for results in chosen if name in results["systems"]]
        return len(scores) < len(chosen), -sum(scores) / len(scores)

    rows = []
    for name in sorted(titles, key=place):
        own = [results["systems"].get(name) for results in chosen]
        shown = ["-" if row is None else " / ".join(map(number, _readme_scores(row))) for row in own]
        rows.append([titles[name], *shown])
    return Cells("", ["system", *(f"{one['data']}, {_short_kind(one)}" for one in chosen)], rows)


def _short_kind(results: Results) -> str:
    is_joined = "+" in results["data"]  # see `join_labelled_data`
    kind: str = results["kind"]
    return "unseen data sets" if is_joined and kind == "leave_one_group_out" else SHORT_KINDS[kind]


def _readme_scores(row: Results) -> tuple[float, float, float]:
    return row["accuracy"], row["macro_f1"], pooled_macro_f1(row)


def _readme_outcome(results: Results, folder: str) -> str:
    path = f"{folder}/comparison-{results['data']}-{results['kind']}.md"
    measured = (
        f"**{plain(results['data'])}**, {KIND_TITLES[results['kind']]}: {results['num_cells']:,} cells, "
        f"{results['num_folds']} folds, {results['seeds']} seed{'' if results['seeds'] == 1 else 's'}, "
        f"{results['date']} ([all of it]({path}))."
    )
    told = [*outcome(results).lines, *(f"Left out: {name} ({why})." for name, why in results["left_out"].items())]
    return f"{measured}\n\n{bullets(map(plain, told))}"


def _write(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
