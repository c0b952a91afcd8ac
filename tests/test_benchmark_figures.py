from screformer.benchmarks.speed_figures import format_results, format_table, format_targets, plot_growth

SIZES = {"series": "length", "step": "forward", "batch_size": 1, "length": 4096, "num_layers": 1}


def results():
    ours = {**SIZES, "contestant": "ours", "median_seconds": 0.5, "peak_bytes": 2_000_000}
    return {
        "question": "How fast?",
        "command": "python",
        "date": "2026-01-31",
        "device": {"name": "a processor", "threads": 2},
        "versions": {"torch": "2"},
        "contestants": {"ours": "screformer", "exact": "exact", "absent": "never measured"},
        "targets": [],
        "exponents": {"forward": {"ours": 1.04, "exact": None}, "training": {}},
        "measurements": [ours, {**ours, "contestant": "exact", "median_seconds": 1.0, "peak_bytes": 0}],
        "ratios": [{**SIZES, "contestant": "exact", "time_ratio": 2.0, "memory_ratio": 0.0}],
        "skipped": [{**SIZES, "contestant": "absent", "reason": "needs more than 14 GB"}],
    }


def test_columns_line_up_as_plain_text():
    assert format_table(["Name", "Number"], [["a", "1"], ["longer", "1,234.5"]]).splitlines() == [
        "| Name   |  Number |",
        "| ------ | ------: |",
        "| a      |       1 |",
        "| longer | 1,234.5 |",
    ]


def test_targets_say_whether_they_are_met():
    text = format_targets(
        [
            {"target": "a", "at_least": 4, "measured": 5.0, "is_met": True},
            {"target": "b", "at_most": 1.1, "measured": 1.25, "is_met": False},
            {"target": "c", "at_most": 1.1, "measured": None, "is_met": None},
        ]
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert cells == [
        ["a", "at least 4", "5", "yes"],
        ["b", "at most 1.1", "1.25", "NO"],
        ["c", "at most 1.1", "", "not measured"],
    ]


def test_the_text_has_ratios_and_names_who_was_skipped_and_why():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in format_results(results()).splitlines()]
    assert ["screformer", "4,096", "0.5000", "1.00", "2", "1.00"] in lines
    assert ["exact", "4,096", "1.0000", "2.00", "0", "0.00"] in lines
    assert ["never measured", "Inference", "1", "4,096", "1", "needs more than 14 GB"] in lines


def test_a_figure_is_drawn_though_a_contestant_is_absent(tmp_path):
    plot_growth(results(), tmp_path / "figure.png", title="Speed")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
