"""One HTML page about one run, complete in itself: scores beside the baselines, figures, facts, what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

from screformer.model_cards.comparison import (
    FEW_CELLS,
    LOGISTIC_REGRESSION,
    METRIC_TITLES,
    MODEL,
    Results,
    Verdict,
    by_support,
    check_results,
    compare,
    majority_sentence,
    ordered_rows,
    row_title,
)
from screformer.model_cards.html_page import Number, Score, bullets, figure, section, table, write_page
from screformer.model_cards.markdown import format_share
from screformer.model_cards.masked_genes import Metrics, masked_gene_rows, masked_gene_sentence

SCORES, PER_CLASS, MASKED_GENES = "Scores on the test cells", "By cell type", "Pretraining: masked genes"
VERDICT_CLASSES: dict[Verdict, str] = {"wins": "wins", "loses": "loses", "draws": "even", "is mixed": "even"}


class ReportFigure(NamedTuple):
    """A PNG file, the sentence under it, and what it shows in words for who cannot see it."""

    path: str | Path
    caption: str
    alt_text: str


class NextCommand(NamedTuple):
    """A command line to copy, and what it is for."""

    purpose: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of a report.

    Attributes
    ----------
    title
        Headline of the page.
    results
        ``"model"``, ``"logistic_regression"``, ``"majority_class"`` (and others) -> metrics on the same test cells, as
        `classification_metrics` returns them.
    dataset
        Facts about the cells, name -> value.
    environment
        Versions, seeds, device; name -> value.
    stage_seconds
        Stage of the run -> wall time.
    figures
        Shown in this order.
    limitations
        One sentence each: what the scores do not show.
    next_commands
        What a reader can type next.
    pretraining
        ``metrics.json`` of the pretraining that the model began from.
    """

    title: str
    results: Results
    dataset: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    figures: Sequence[ReportFigure] = ()
    limitations: Sequence[str] = ()
    next_commands: Sequence[NextCommand] = ()
    pretraining: Metrics = field(default_factory=dict)


def write_report(path: str | Path, report: Report) -> Path:
    """Write `report` as one HTML file that needs no other file and no network, and return its path.

    Raises
    ------
    FileNotFoundError
        A figure does not exist.
    ValueError
        A figure is no PNG or has no alt text, or ``results`` lack a metric or are of different test sets.
    """
    check_results(report.results)
    sections = [
        _verdict(report.results),
        section(SCORES, _scores_table(report.results)),
        section("What these numbers do not show", bullets(report.limitations)),
        section("What to type next", _commands(report.next_commands)),
        section("Figures", "\n".join(figure(*one) for one in report.figures)),
        section(PER_CLASS, _per_class_table(report.results)),
        section(MASKED_GENES, _masked_gene_table(report.pretraining)),
        _facts(report),
    ]
    return write_page(path, report.title, "\n".join(sections))


def format_seconds(seconds: float) -> str:
    """Return a duration as ``8.2 s``, ``3 min 05 s`` or ``2 h 05 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _verdict(results: Results) -> str:
    comparison, majority = compare(results), majority_sentence(results)
    if comparison is None:
        style, headline = "even", "Not compared with logistic regression"
        sentences = ["No logistic regression was measured on this test set, so no advantage over it is claimed."]
    else:
        style, headline = VERDICT_CLASSES[comparison.verdict], comparison.headline
        sentences = [comparison.sentence]
    sentences += [majority] if majority else []
    paragraphs = "\n".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<section class="verdict {style}">\n<h2>{escape(headline)}</h2>\n{paragraphs}\n</section>'


def _scores_table(results: Results) -> str:
    rows = [
        [row_title(name), *(Score(float(row[metric])) for metric in METRIC_TITLES)]
        for name, row in ordered_rows(results)
    ]
    size = results[MODEL].get("num_cells")
    cells = f"{size:,} test cells. " if size is not None else ""
    note = (
        f"{cells}Same cells, genes and split for every row. Macro-F1: mean over the classes that occur. "
        "Balanced accuracy: mean recall."
    )
    return table(["", *METRIC_TITLES.values()], rows, name=SCORES, note=note, style="scores")


def _per_class_table(results: Results) -> str:
    classes = by_support(results[MODEL])
    if not classes:
        return ""
    regression = results.get(LOGISTIC_REGRESSION, {}).get("per_class", {})
    columns = ["Cell type", "Test cells", "Precision", "Recall", "F1"]
    columns += ["F1, logistic regression"] if regression else []
    rows: list[list[object]] = []
    for name, scores in classes:
        shown = [scores[metric] for metric in ("precision", "recall", "f1")]
        shown += [regression.get(name, {}).get("f1")] if regression else []
        is_tested = scores["support"] > 0
        rows.append([name, Number(f"{scores['support']:,}")])
        rows[-1] += [Number(format_share(value if is_tested else None)) for value in shown]
    note = (
        "Precision, recall and F1 are the model's. Where there are fewer than "
        f"{FEW_CELLS} test cells, single cells decide; a dash means that none was tested."
    )
    return table(columns, rows, name=PER_CLASS, note=note)


def _masked_gene_table(metrics: Metrics) -> str:
    answers = masked_gene_rows(metrics)
    if not answers:
        return ""
    rows: list[list[object]] = [
        [row.title, Number(format_share(row.accuracy)), Number(format_share(row.loss))] for row in answers
    ]
    note = masked_gene_sentence(metrics) or "On masked genes of held-out cells."
    return table(["Answer", "Accuracy", "Loss"], rows, name=MASKED_GENES, note=note)


def _facts(report: Report) -> str:
    stages: dict[str, object] = {name: format_seconds(value) for name, value in report.stage_seconds.items()}
    if len(stages) > 1:
        stages["Total"] = format_seconds(sum(report.stage_seconds.values()))
    groups: list[tuple[str, Mapping[str, object]]] = [
        ("Data", report.dataset),
        ("Time", stages),
        ("Environment", report.environment),
    ]
    sections = "\n".join(section(heading, _fact_table(facts, heading)) for heading, facts in groups if facts)
    return f'<div class="columns">\n{sections}\n</div>' if sections else ""


def _fact_table(facts: Mapping[str, object], heading: str) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(_fact(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f'<table class="facts" aria-label="{escape(heading)}">\n<tbody>\n{rows}\n</tbody>\n</table>'


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_fact, value))
    return str(value)


def _commands(commands: Sequence[NextCommand]) -> str:
    return "\n".join(
        f"<p>{escape(item.purpose)}</p>\n<pre><code>{escape(item.command)}</code></pre>" for item in commands
    )
