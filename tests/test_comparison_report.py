"""The page of all comparisons: what it claims and what not, that it is whole, and that the README's tables are its."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from test_cli import run
from test_comparison import run_of, said
from test_report import Page

from screformer.benchmarks.ablations import DEFAULTS, ablations
from screformer.benchmarks.comparison import WEAK_ABOVE
from screformer.benchmarks.comparison_report import (
    BEGIN,
    END,
    NO_RESULTS,
    read_results,
    readme_section,
    readme_text,
    write_benchmark_report,
)
from screformer.benchmarks.comparison_sections import ablation_blocks, across_blocks, gap_blocks
from screformer.benchmarks.comparison_statistics import paired_tests, pool_cells, summarize_systems
from screformer.benchmarks.comparison_verdicts import outcome, pairs_of_ours, tally_sentence
from screformer.benchmarks.suites import known_systems
from screformer.train.figure_names import name_points

ROOT = Path(__file__).resolve().parents[1]
OURS, REGRESSION = "screformer", "logistic_regression"
LOWER = (0.7, 0.72, 0.69, 0.71, 0.7)
HIGHER = (0.8, 0.83, 0.78, 0.82, 0.79)
UNEQUAL = (0.6, 0.8, 0.7, 0.6, 0.83)


def make_results(data="pancreas", kind="five_fold", *, is_weak=False, seeds=1, left_out=None, **scores):
    """Return a result as `compare_systems` writes it, of systems with these macro-F1 of each fold."""
    runs = [
        run_of(name, f"fold{number}", value, seed=seed)
        for name, values in scores.items()
        for number, value in enumerate(values)
        for seed in range(seeds)
    ]
    rows = summarize_systems(runs)
    cells, truth = ["1", "2", "3", "4"], ["alpha", "alpha", "beta", "beta"]
    named = said(cells, truth, ["alpha", "beta", "beta", "beta"], [[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]])
    named = named._replace(named=named.named._replace(classes=("alpha", "beta")))
    predictions = {name: [named] for name in rows}
    for name, own in predictions.items():
        rows[name] |= pool_cells(own) | {"expected_calibration_error": 0.1}
    facts = {"date": "2026-11-25", "command": "screformer benchmark --suite small", "versions": {"screformer": "1"}}
    return {
        "question": f"How well do systems name the cell types of {data}?",
        "data": data, "num_cells": 4, "num_genes": 9, "kind": kind, "num_folds": len(next(iter(scores.values()))),
        "seeds": seeds, "is_weak": is_weak, **facts, "systems": rows, "paired_tests": paired_tests(runs, predictions),
        "left_out": left_out or {}, "runs": runs,
    }  # fmt: skip


def put(folder, *all_results):
    folder.mkdir(parents=True, exist_ok=True)
    for results in all_results:
        (folder / f"comparison-{results['data']}-{results['kind']}.json").write_text(json.dumps(results))


ABLATIONS = {
    "question": "What is each part worth?", "date": "2026-11-25", "command": "screformer benchmark ablations",
    "versions": {}, "columns": ["model", "macro-F1", "cells"], "rows": [["full", 0.95, 2125], ["plain", None, "some"]],
    "notes": ["Two folds."],
}  # fmt: skip
FEW = {
    "data": "lines", "kind": "five_fold", "date": "2026-11-25", "command": "screformer benchmark --few-labels 5",
    "points": {
        number: {OURS: {"title": OURS, "is_inductive": True, "macro_f1": score, "less_baseline": None}}
        for number, score in (("5", 0.5), ("20", 0.75))
    },
    "left_out": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the folder with the report of two comparisons, of which one is weak, few labels and ablations."""
    folder = tmp_path_factory.mktemp("report")
    left_out = {"singler": "singler is not installed: pip install singler"}
    put(
        folder / "results",
        make_results(left_out=left_out, **{OURS: HIGHER, REGRESSION: LOWER, "majority_class": (0.1,) * 5}),
        make_results("lines", is_weak=True, **{REGRESSION: (1.0,) * 5, "knn": LOWER}),
    )
    (folder / "results" / "comparison-pancreas-five_fold-split.json").write_text("{}")
    (folder / "results" / "few-labels-lines-five_fold.json").write_text(json.dumps(FEW))
    (folder / "results" / "ablations.json").write_text(json.dumps(ABLATIONS))
    path = write_benchmark_report(folder / "results", folder / "page")
    assert path == folder / "page" / "benchmark_report.html"
    return folder / "page"


def test_the_html_is_whole_and_needs_nothing_else(page):
    text = (page / "benchmark_report.html").read_text()
    assert not re.search(r"https?://|@import|url\(|<script", text)
    html = Page(text)
    assert html.open == []
    figures = {path.name for path in (page / "benchmark_report_figures").iterdir()}
    assert len(html.all("img")) == len(figures)
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in html.all("img"))
    targets = {section.get("id") for section in html.all("section")}
    links = [link["href"] for link in html.all("a")]
    assert len(links) >= 5
    assert {link.removeprefix("#") for link in links} <= targets
    for ending in (
        "scores",
        "cost",
        "cell_types",
        "roc",
        "confusion-screformer",
        "confusion-logistic_regression",
        "reliability",
    ):
        assert f"pancreas-five_fold-{ending}.png" in figures


def test_the_markdown_says_the_same_and_its_figures_exist(page):
    text = (page / "benchmark_report.md").read_text()
    pictures = re.findall(r"!\[(.+?)\]\((.+?)\)", text)
    assert len(pictures) == len(list((page / "benchmark_report_figures").iterdir()))
    assert all((page / path).exists() for _, path in pictures)
    assert "screformer beats the best rival, logistic_regression: macro-F1 +0.100, 95% interval +0.0" in text
    assert "- Left out: singler (singler is not installed: pip install singler)." in text
    for heading in ("## What came out", "## Few labelled cells", "### F1 by cell type", "### Paired differences"):
        assert heading in text
    assert "| full | 0.950 | 2,125 |\n| plain | - | some |" in text
    assert "- Two folds." in text
    html = Page((page / "benchmark_report.html").read_text()).text
    for sentence in ("screformer beats the best rival", "pip install singler", "Weak set: logistic regression errs"):
        assert sentence in html


def test_a_weak_set_is_shown_and_marked_but_in_no_summary(page):
    text = (page / "benchmark_report.md").read_text()
    summary, rest = text.split("## What these numbers do not show")
    assert "Shown below, but in no summary: lines, five random folds of cells (weak set)." in summary
    assert summary.count("lines") == 1
    assert "\n## lines, five random folds of cells (weak set)\n\n> Weak set: logistic regression errs so" in rest
    assert "\n### lines, five random folds of cells (weak set)\n" in rest  # few labels


def test_model_cards_get_a_flat_record_a_system(page):
    records = json.loads((page / "benchmark_report.json").read_text())
    assert len(records) == 5
    (ours,) = [record for record in records if record["system"] == OURS]
    assert (ours["data"], ours["kind"], ours["num_folds"], ours["seeds"]) == ("pancreas", "five_fold", 5, 1)
    assert ours["macro_f1_less_logistic_regression"] == pytest.approx(np.mean(HIGHER) - np.mean(LOWER))
    assert ours["macro_f1_less_logistic_regression_interval"][0] > 0
    (weak,) = [record for record in records if record["system"] == REGRESSION and record["is_weak"]]
    assert weak["macro_f1_less_logistic_regression"] is None
    assert set(weak) == set(ours)
    assert {"accuracy", "accuracy_interval", "macro_f1_interval", "title", "is_inductive", "date"} <= set(ours)


@pytest.mark.parametrize(
    ("ours", "theirs", "style", "sentence"),
    [
        (HIGHER, LOWER, "wins", "screformer beats the best rival, logistic_regression: macro-F1 +0.100"),
        (LOWER, HIGHER, "loses", "screformer loses to the best rival, logistic_regression: macro-F1 -0.100"),
        (
            UNEQUAL,
            LOWER,
            "even",
            "ties with the best rival, logistic_regression: macro-F1 +0.002, 95% interval -0.130 to +0.134",
        ),
        (LOWER, LOWER, "even", "+0.000 to +0.000 contains 0, so no difference is claimed."),
        (HIGHER[:4], LOWER[:4], "even", "ahead of the best rival, logistic_regression (macro-F1 +0.103, "),
        (LOWER[:4], HIGHER[:4], "even", "but 4 folds are too few to claim it (5 are needed)."),
        (UNEQUAL[:2], LOWER[:2], "even", "but 2 folds are too few to claim it (5 are needed)."),
        (LOWER[:4], LOWER[:4], "even", "screformer is level with the best rival, logistic_regression"),
        ((0.9,), (0.5,), "even", "macro-F1 +0.400. One fold has no interval, so nothing is claimed."),
    ],
)
def test_a_verdict_is_by_the_interval_of_the_paired_difference(ours, theirs, style, sentence):
    found = outcome(make_results(**{OURS: ours, REGRESSION: theirs}))
    assert found.style == style
    assert len(found.lines) == 1
    assert sentence in found.lines[0]


def test_seeds_make_no_claim_of_few_folds():
    results = make_results(seeds=5, **{OURS: HIGHER[:4], REGRESSION: LOWER[:4]})
    assert [pair.verdict for pair in pairs_of_ours(results)] == ["no claim"]


def test_ours_is_beside_the_best_rival_and_beside_logistic_regression():
    results = make_results(**{OURS: HIGHER, REGRESSION: LOWER, "knn": [score + 0.01 for score in HIGHER]})
    assert [(pair.second, pair.verdict) for pair in pairs_of_ours(results)] == [
        ("knn", "loses to"),
        (REGRESSION, "beats"),
    ]
    assert outcome(results).style == "loses"
    weak = make_results("lines", is_weak=True, **{OURS: HIGHER, REGRESSION: LOWER})
    few = make_results("gut", **{OURS: HIGHER[:4], REGRESSION: LOWER[:4]})
    assert tally_sentence([results, weak, few]) == (
        "scReformer-BERT is in 2 comparisons, weak sets not counted: beside the best rival it wins 0, ties 0 and "
        "loses 1, and 1 without a claim, for want of folds; beside logistic regression it wins 1, ties 0 and "
        "loses 0, and 1 without a claim, for want of folds."
    )


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        (make_results(**{REGRESSION: LOWER}), "was not among these systems, so nothing is claimed"),
        (make_results(**{OURS: LOWER}), "There is no rival in this comparison"),
        (make_results(is_weak=True, **{OURS: LOWER, REGRESSION: HIGHER}), "no difference here says anything"),
    ],
)
def test_without_ours_or_rivals_and_on_weak_sets_nothing_is_claimed(results, sentence):
    assert sentence in outcome(results).lines[0]
    assert pairs_of_ours(results) == []
    assert "nothing is claimed for it" in tally_sentence([results])


def test_data_sets_are_averaged_without_weak_ones_over_systems_that_were_on_all():
    blocks = across_blocks(
        [
            make_results("a", knn=(0.9,) * 5, svc=(0.8,) * 5, extra=(1.0,) * 5),
            make_results("b", knn=(0.5,) * 5, svc=(0.7,) * 5),
            make_results("weak", is_weak=True, knn=(0.0,) * 5, svc=(1.0,) * 5),
            make_results("c", "leave_one_group_out", knn=(0.0,) * 5),
        ]
    )
    assert blocks[-1].columns == ["system", "mean", "mean rank", "a", "b"]
    assert blocks[-1].rows == [
        ["svc", "0.750", "1.5", "0.800", "0.700"],
        ["knn", "0.700", "1.5", "0.900", "0.500"],
        ["extra", "-", "-", "1.000", "-"],
    ]
    assert len(blocks) == 4  # one kind has several data sets
    assert across_blocks([make_results("a", knn=LOWER)]) == []


def test_what_new_donors_cost_is_of_systems_with_both_kinds_of_folds(tmp_path):
    known = make_results(knn=(0.9,) * 5, svc=(0.8,) * 5)
    unseen = make_results(kind="leave_one_group_out", is_weak=True, knn=(0.6,) * 4)
    blocks = gap_blocks([known, unseen], tmp_path)
    assert blocks[2].text == "pancreas (weak set)"
    assert blocks[4].rows == [["knn", "0.733", "0.733", "+0.000"]]  # of all test cells, which are the same here
    assert blocks[5].path.exists()
    assert gap_blocks([known], tmp_path) == []


def test_ablations_need_no_notes():
    assert len(ablation_blocks([{key: value for key, value in ABLATIONS.items() if key != "notes"}])) == 4
    assert ablation_blocks([]) == []


# The README


@pytest.fixture
def project(tmp_path):
    put(
        tmp_path / "benchmarks" / "results",
        make_results(**{OURS: HIGHER, REGRESSION: LOWER}),
        make_results(kind="leave_one_group_out", left_out={"knn": "why"}, **{OURS: LOWER[:4], REGRESSION: HIGHER[:4]}),
        make_results("lines", is_weak=True, **{OURS: LOWER, REGRESSION: HIGHER}),
        make_results("gut", "random", **{OURS: LOWER[:1], REGRESSION: HIGHER[:1]}),
    )
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n")
    return tmp_path


def is_stale(readme):
    return readme_text(readme.parent / "benchmarks" / "results", readme) != readme.read_text(encoding="utf-8")


def test_the_readme_has_a_column_for_each_comparison_that_is_not_weak(project):
    text = readme_text(project / "benchmarks" / "results", project / "README.md")
    assert text.startswith(
        f"# Title\n\n{BEGIN}\nAccuracy / macro-F1 / macro-F1 of the test cells of all folds together;"
    )
    assert text.endswith(f"\n{END}\n\nrest\n")
    assert "| system | pancreas, unseen donors | pancreas, random folds |" in text
    assert re.search(r"\| screformer \| 0\.7\d\d / 0\.7\d\d / 0\.733 \| 0\.804 / 0\.804 / 0\.733 \|", text)
    assert "**pancreas**, each donor or data set held out once: 4 cells, 4 folds, 1 seed, 2026-11-25" in text
    assert "([all of it](benchmarks/results/comparison-pancreas-five_fold.md))." in text
    assert "- screformer beats the best rival, logistic_regression: macro-F1 +0.100" in text
    assert "- Left out: knn (why)." in text
    assert "lines" not in text
    assert "gut" not in text


def test_sets_that_were_put_together_are_no_donors():
    joined = {**make_results(kind="leave_one_group_out", knn=LOWER[:4]), "data": "a+b"}
    assert "| system | a+b, unseen data sets |" in readme_section([joined], "results")


def test_systems_that_are_not_in_every_column_come_last(tmp_path):
    text = readme_section(
        [make_results(knn=LOWER, svc=HIGHER), make_results(kind="leave_one_group_out", knn=LOWER[:4])], "results"
    )
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| knn", "| svc"]
    assert rows[3].endswith("| - | 0.804 / 0.804 / 0.733 |")


def test_the_readme_of_the_repository_is_that_of_its_results():
    if not (ROOT / "README.md").exists():
        pytest.skip("no checkout: the README is not here")
    assert not is_stale(ROOT / "README.md"), "run: screformer benchmark report --readme README.md"


def test_a_planted_difference_is_seen(project):
    readme = project / "README.md"
    assert is_stale(readme)
    readme.write_text(readme_text(project / "benchmarks" / "results", readme), encoding="utf-8")
    assert not is_stale(readme)
    readme.write_text(readme.read_text().replace("0.804", "0.904", 1))
    assert is_stale(readme)
    readme.write_text(readme_text(project / "benchmarks" / "results", readme), encoding="utf-8")
    put(project / "benchmarks" / "results", make_results(**{OURS: UNEQUAL, REGRESSION: LOWER}))
    assert is_stale(readme)
    shutil.rmtree(project / "benchmarks" / "results")
    (project / "benchmarks" / "results").mkdir()
    assert NO_RESULTS in readme_text(project / "benchmarks" / "results", readme)


def test_only_weak_sets_are_as_no_results():
    assert readme_section([make_results(is_weak=True, **{OURS: LOWER})], "results") == NO_RESULTS


def test_every_system_and_every_ablation_has_a_committed_figure():
    results = ROOT / "benchmarks" / "results"
    if not results.exists():
        pytest.skip("no checkout")
    of_table = {"sccatch_cellmatch"}  # its table has no markers of some sets' labels
    for name, needed in {
        "pancreas_baron2016-leave_one_group_out": set(known_systems()),
        "pancreas_baron2016-five_fold": set(known_systems()),
        "pbmc3k_10x-five_fold": set(known_systems()),
        "celllines_mixology_celseq2-leave_one_group_out": set(known_systems()) - of_table,
        "pollen2014_mixed-five_fold": set(known_systems()) - of_table,
    }.items():
        found = json.loads((results / f"comparison-{name}.json").read_text())
        assert needed <= set(found["systems"]), name
        assert all(0 <= row["macro_f1"] <= 1 and row["fit_seconds"] > 0 for row in found["systems"].values())
        assert found["date"]
        assert found["versions"]["torch"]
        regression = found["systems"][REGRESSION]["accuracy"]
        assert found["is_weak"] == (regression > WEAK_ABOVE)  # and a weak set is in no claim, see above
    ablated = json.loads((results / "ablations-pancreas_baron2016.json").read_text())
    assert set(ablations(DEFAULTS)) <= set(ablated["systems"])
    assert "**a toy width**" in ablated["notes"][0]
    costs = json.loads((results / "ablations-step_costs.json").read_text())
    assert any("eager" in row[0] and "needs more than" in row[3] for row in costs["rows"])


@pytest.mark.parametrize(
    "text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}", f"{BEGIN}{END}{END}"], ids=range(6)
)
def test_a_readme_without_the_marks_is_refused_and_nothing_is_written(text, project):
    (project / "README.md").write_text(text)
    with pytest.raises(ValueError, match=f"must have one line '{BEGIN}' and after it one line '{END}'"):
        write_benchmark_report(project / "benchmarks" / "results", project / "page", readme=project / "README.md")
    assert not (project / "page").exists()
    assert (project / "README.md").read_text() == text


def test_a_folder_that_is_none_and_files_of_another_format_are_refused(tmp_path):
    with pytest.raises(ValueError, match="which is no folder; give the --output of screformer benchmark"):
        read_results(tmp_path / "nowhere")
    (tmp_path / "comparison-a-five_fold.json").write_text('{"data": "a", "kind": "five_fold"}')
    with pytest.raises(ValueError, match=r"has no 'is_weak', 'systems', .*: it is of another format"):
        read_results(tmp_path)


def test_the_command_writes_the_page_and_the_readme(tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    (tmp_path / "results").mkdir()
    done = run("benchmark", "report", "--results", tmp_path / "results", "-o", tmp_path / "page", "--readme",
               tmp_path / "README.md")  # fmt: skip
    assert done.exit_code == 0
    assert "benchmark_report.html" in done.output
    assert NO_RESULTS in (tmp_path / "page" / "benchmark_report.md").read_text()
    assert NO_RESULTS in (tmp_path / "page" / "benchmark_report.html").read_text()
    assert (tmp_path / "README.md").read_text() == f"{BEGIN}\n{NO_RESULTS}\n{END}\n"
    assert "screformer benchmark report --results" in run("benchmark", "report", "--help").output
    failed = run("benchmark", "report", "--results", tmp_path / "nowhere")
    assert failed.exit_code == 1


# Names in figures


def test_names_of_points_cover_neither_each_other_nor_marks():
    generator = np.random.default_rng(0)
    points = {f"a system of number {number}": tuple(generator.uniform(0, 1, 2) ** 2) for number in range(16)}
    points |= {"the same place": points["a system of number 3"]}
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.scatter(*np.array(list(points.values())).T)
    axes.margins(0.14)
    name_points(axes, points, size=9)
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert sorted(boxes) == sorted(points)
    names = list(boxes)
    assert not [(a, b) for at, a in enumerate(names) for b in names[:at] if boxes[a].overlaps(boxes[b])]
    for place in points.values():
        assert not any(box.contains(*axes.transData.transform(place)) for box in boxes.values())
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes.values())


def test_the_name_of_one_point_needs_no_line():
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([1], [1], "o")
    name_points(axes, {"alone": (1, 1)}, size=9)
    assert len(axes.lines) == 1  # the mark
