import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from screformer.model_cards.report import NextCommand, Report, ReportFigure, format_seconds, write_report

# One grey pixel.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mOoBwAAgQCA2h9ZrQAAAABJRU5ErkJggg==")
VOID_TAGS = {"meta", "img"}


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def scores(accuracy: float, macro_f1: float) -> dict[str, Any]:
    per_class = {
        name: {"precision": 0.5, "recall": 0.25, "f1": f1, "support": support}
        for name, f1, support in (("rare <b>", 0.333, 3), ("alpha", 0.951, 1_200), ("absent", 0, 0))
    }
    return {
        "accuracy": accuracy,
        "macro_f1": macro_f1,
        "balanced_accuracy": 0.5,
        "num_cells": 1_203,
        "per_class": per_class,
    }


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    path = tmp_path / "matrix.png"
    path.write_bytes(PNG)
    return path


@pytest.fixture
def content(figure: Path) -> dict[str, Any]:
    return {
        "title": "Pancreas & <friends>",
        "results": {
            "majority_class": scores(0.3, 0.1),
            "logistic_regression": scores(0.94, 0.87),
            "model": scores(0.9, 0.8),
        },
        "dataset": {"Cells": 2142, "Genes": 20_125, "Donors": ["d1", "d<2"], "Raw counts": True},
        "environment": {"Seed": 2022, "torch": "2.13.0"},
        "stage_seconds": {"Pretraining": 96.4, "Fine-tuning": 151.0},
        "figures": [ReportFigure(figure, "A <caption>.", 'A matrix, "mostly" diagonal')],
        "limitations": ["One donor & one seed."],
        "next_commands": [NextCommand("Label your cells:", "screformer annotate *.h5ad > 'log' && true")],
    }


def render(folder: Path, content: dict[str, Any]) -> tuple[str, Page]:
    text = write_report(folder / "report.html", Report(**content)).read_text(encoding="utf-8")
    return text, Page(text)


def test_every_tag_is_closed_and_nothing_comes_from_outside(tmp_path: Path, content: dict[str, Any]) -> None:
    text, page = render(tmp_path, content)
    assert page.open == []
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert not re.search(r"https?://|@import|url\(", text)
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.all("img"))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_all_text_is_escaped(tmp_path: Path, content: dict[str, Any]) -> None:
    text, page = render(tmp_path, content)
    for raw in ("<friends>", "<b>", "d<2", "<caption>.", "&& true"):
        assert raw not in text
        assert raw in page.text
    assert page.all("img")[0]["alt"] == 'A matrix, "mostly" diagonal'


@pytest.mark.parametrize(
    ("accuracy", "macro_f1", "style", "headline"),
    [
        (0.9, 0.8, "loses", "The model loses to logistic regression: -4.0 points of accuracy, -7.0 points of macro-F1"),
        (0.95, 0.9, "wins", "The model beats logistic regression: +1.0 points of accuracy, +3.0 points of macro-F1"),
        (0.94, 0.87, "even", "The model is level with logistic regression: ±0.0 points of accuracy"),
        (0.95, 0.8, "even", "The model and logistic regression each win once: +1.0 points of accuracy"),
    ],
)
def test_the_page_begins_with_the_gap_to_logistic_regression(
    tmp_path: Path, content: dict[str, Any], accuracy: float, macro_f1: float, style: str, headline: str
) -> None:
    content["results"]["model"] = scores(accuracy, macro_f1)
    _, page = render(tmp_path, content)
    assert page.all("section")[0] == {"class": f"verdict {style}"}
    after_title = page.text.split("<friends>")[-1]
    assert after_title.strip().startswith(headline)


def test_pretraining_is_shown_beside_answers_that_need_no_model(tmp_path: Path, content: dict[str, Any]) -> None:
    _, page = render(tmp_path, content)
    assert "masked genes" not in page.text
    content["pretraining"] = {
        "held_out_masked_accuracy": 0.5,
        "held_out_gene_majority_accuracy": 0.52,
        "held_out_gene_mean_accuracy": 0.4,
    }
    _, page = render(tmp_path, content)
    assert page.open == []
    assert "Pretraining: masked genes" in page.text
    assert "Each gene's mean bin in the training cells 0.400 -" in page.text
    assert "-2.0 points against each gene's commonest bin in the training cells (0.520)" in page.text


def test_without_logistic_regression_no_advantage_is_claimed(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["results"]["logistic_regression"]
    _, page = render(tmp_path, content)
    assert "Not compared with logistic regression" in page.text
    assert "F1, logistic regression" not in page.text


def test_scores_stand_in_the_order_model_regression_majority(tmp_path: Path, content: dict[str, Any]) -> None:
    _, page = render(tmp_path, content)
    table = page.text[page.text.index("Balanced accuracy") :]
    assert "scReformer-BERT 0.900 0.800 0.500 Logistic regression 0.940 0.870 0.500 Majority class 0.300" in table


def test_classes_are_sorted_by_cells_and_untested_ones_have_no_score(tmp_path: Path, content: dict[str, Any]) -> None:
    _, page = render(tmp_path, content)
    assert ("alpha 1,200 0.500 0.250 0.951 0.951 rare <b> 3 0.500 0.250 0.333 0.333 absent 0 - - - -") in page.text


def test_facts_times_and_commands_are_readable(tmp_path: Path, content: dict[str, Any]) -> None:
    _, page = render(tmp_path, content)
    for expected in (
        "Cells 2142 Genes 20,125 Donors d1, d<2 Raw counts yes",
        "Pretraining 1 min 36 s Fine-tuning 2 min 31 s Total 4 min 07 s",
        "Seed 2022 torch 2.13.0",
        "One donor & one seed.",
        "Label your cells: screformer annotate *.h5ad > 'log' && true",
    ):
        assert expected in page.text


def test_headers_have_a_scope_and_wide_content_can_be_scrolled_by_keyboard(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    text, page = render(tmp_path, content)
    assert {header["scope"] for header in page.all("th")} == {"row", "col"}
    assert all(table["aria-label"] for table in page.all("table"))
    regions = [box for box in page.all("div") if box.get("class") == "wide"]
    assert len(regions) == 3
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in regions)
    assert page.all("html") == [{"lang": "en"}]
    assert "prefers-color-scheme: dark" in text


def test_what_is_not_given_leaves_no_empty_section(tmp_path: Path, content: dict[str, Any]) -> None:
    row = {"accuracy": 0.5, "macro_f1": 0.5, "balanced_accuracy": 0.5}
    _, page = render(tmp_path, {"title": "Bare", "results": {"model": row}})
    assert len(page.all("section")) == 2  # the verdict and the scores
    assert "$" not in page.text


def test_a_figure_must_exist_be_a_png_and_have_an_alt_text(
    tmp_path: Path, content: dict[str, Any], figure: Path
) -> None:
    (tmp_path / "fake.png").write_text("not an image")
    wrong: list[tuple[ReportFigure, type[Exception], str]] = [
        (ReportFigure(tmp_path / "none.png", "c", "a"), FileNotFoundError, "none.png"),
        (ReportFigure(tmp_path / "fake.png", "c", "a"), ValueError, "is not a PNG"),
        (ReportFigure(figure, "c", " "), ValueError, "has no alt_text"),
    ]
    for item, error, message in wrong:
        with pytest.raises(error, match=message):
            write_report(tmp_path / "report.html", Report(**content | {"figures": [item]}))
    assert not (tmp_path / "report.html").exists()


def test_results_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have a row 'model'"):
        write_report(tmp_path / "report.html", Report(title="t", results={}))


def test_durations_are_readable() -> None:
    assert [format_seconds(value) for value in (0.04, 8.24, 59.96, 185, 3599.6, 7_500)] == [
        "0.0 s",
        "8.2 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 05 min",
    ]
