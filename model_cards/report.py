"""One HTML page about one run, complete in itself: scores beside the baselines, figures, facts, what to type next."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
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
from screformer.model_cards.markdown import format_share
from screformer.model_cards.masked_genes import Metrics, masked_gene_rows, masked_gene_sentence
from screformer.train.result_files import written_aside

TEMPLATE = "report_template.html"
SCORES, PER_CLASS, MASKED_GENES = "Scores on the test cells", "By cell type", "Pretraining: masked genes"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
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
    template = Template(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(report.title),
        verdict=_verdict(report.results),
        scores=_section(SCORES, _scores_table(report.results)),
        next_commands=_section("What to type next", _commands(report.next_commands)),
        figures=_section("Figures", "\n".join(map(_figure, report.figures))),
        per_class=_section(PER_CLASS, _per_class_table(report.results)),
        masked_genes=_section(MASKED_GENES, _masked_gene_table(report.pretraining)),
        limitations=_section("What these numbers do not show", _list(report.limitations)),
        facts=_facts(report),
    )
    target = Path(path)
    with written_aside(target) as aside:
        aside.write_text(page, encoding="utf-8")
    return target


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


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>" if body else ""


def _scores_table(results: Results) -> str:
    rows = [
        [row_title(name), *(_Score(float(row[metric])) for metric in METRIC_TITLES)]
        for name, row in ordered_rows(results)
    ]
    size = results[MODEL].get("num_cells")
    cells = f"{size:,} test cells. " if size is not None else ""
    note = (
        f"{cells}Same cells, genes and split for every row. Macro-F1: mean over the classes that occur. "
        "Balanced accuracy: mean recall."
    )
    return _table(["", *METRIC_TITLES.values()], rows, name=SCORES, note=note, style="scores")


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
        rows.append([name, _Number(f"{scores['support']:,}")])
        rows[-1] += [_Number(format_share(value if is_tested else None)) for value in shown]
    note = (
        "Precision, recall and F1 are the model's. Where there are fewer than "
        f"{FEW_CELLS} test cells, single cells decide; a dash means that none was tested."
    )
    return _table(columns, rows, name=PER_CLASS, note=note)


def _masked_gene_table(metrics: Metrics) -> str:
    answers = masked_gene_rows(metrics)
    if not answers:
        return ""
    rows: list[list[object]] = [
        [row.title, _Number(format_share(row.accuracy)), _Number(format_share(row.loss))] for row in answers
    ]
    note = masked_gene_sentence(metrics) or "On masked genes of held-out cells."
    return _table(["Answer", "Accuracy", "Loss"], rows, name=MASKED_GENES, note=note)


def _facts(report: Report) -> str:
    stages: dict[str, object] = {name: format_seconds(value) for name, value in report.stage_seconds.items()}
    if len(stages) > 1:
        stages["Total"] = format_seconds(sum(report.stage_seconds.values()))
    groups: list[tuple[str, Mapping[str, object]]] = [
        ("Data", report.dataset),
        ("Time", stages),
        ("Environment", report.environment),
    ]
    sections = "\n".join(_section(heading, _fact_table(facts, heading)) for heading, facts in groups if facts)
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


class _Number(str):
    """Text of a number, aligned to the right."""


class _Score(float):
    """A share from 0 to 1, shown with a bar."""


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, name: str, note: str, style: str = "") -> str:
    body = [list(row) for row in rows]
    classes = ["" if index == 0 else ' class="number"' for index in range(len(columns))]
    # An empty corner is a cell, not a header of nothing.
    head = "".join(
        f'<th scope="col"{style_of}>{escape(column)}</th>' if column else "<td></td>"
        for column, style_of in zip(columns, classes, strict=True)
    )
    lines = "\n".join(
        f'<tr><th scope="row">{escape(str(title))}</th>{"".join(map(_cell, values))}</tr>' for title, *values in body
    )
    table = (
        f'<table class="{style}" aria-label="{escape(name)}">\n<thead>\n<tr>{head}</tr>\n</thead>\n'
        f"<tbody>\n{lines}\n</tbody>\n</table>"
    )
    # Not a <caption>: that is as wide as the table, and on a phone would have to be scrolled to be read.
    return f'<p class="soft">{escape(note)}</p>\n{_scrollable(table, name)}'


def _scrollable(content: str, name: str) -> str:
    """Return `content` in a box that scrolls sideways on a phone, with the keyboard too."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}">\n{content}\n</div>'


def _cell(value: object) -> str:
    if isinstance(value, _Score):
        bar = f'<span class="bar" aria-hidden="true"><span style="width:{100 * value:.1f}%"></span></span>'
        return f'<td class="number">{value:.3f}{bar}</td>'
    style = ' class="number"' if isinstance(value, _Number) else ""
    return f"<td{style}>{escape(str(value))}</td>"


def _figure(figure: ReportFigure) -> str:
    image = Path(figure.path).read_bytes()
    if not image.startswith(PNG_SIGNATURE):
        raise ValueError(f"figure {str(figure.path)!r} is not a PNG file; save it as PNG")
    if not figure.alt_text.strip():
        raise ValueError(f"figure {str(figure.path)!r} has no alt_text; say in words what it shows")
    data = base64.b64encode(image).decode("ascii")
    picture = _scrollable(f'<img src="data:image/png;base64,{data}" alt="{escape(figure.alt_text)}">', figure.caption)
    return f"<figure>\n{picture}\n<figcaption>{escape(figure.caption)}</figcaption>\n</figure>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>" if lines else ""


def _commands(commands: Sequence[NextCommand]) -> str:
    return "\n".join(
        f"<p>{escape(item.purpose)}</p>\n<pre><code>{escape(item.command)}</code></pre>" for item in commands
    )
