import json

import numpy as np
import pytest
from small_corpus import make_corpus

from screformer.benchmarks import feeding as module
from screformer.benchmarks.feeding import (
    CONTESTANTS,
    PLACES,
    Limits,
    benchmark_feeding,
    compute_ratios,
    judge_feeding,
    main,
    measure_order,
    measure_padding,
)
from screformer.benchmarks.shuffle_quality import entropies, measure_shufflings, sorted_origins
from screformer.tokenization.corpus import open_corpus
from screformer.train.cell_dataset import CellDataset

QUICK = {"batch_size": 8, "quality_cells": 3000, "many_cells": 5000, "limits": Limits(0.02, 2)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def few_sizes(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_SIZES", (1, 16, 64))
    monkeypatch.setattr(module, "BUFFER_SIZES", (1024, 16_384))


def row(place, contestant, rate):
    return {"place": place, "contestant": contestant, "median": rate, "median_per_processor_second": 2 * rate}


def test_the_files_have_every_contestant_in_every_place(corpus, tmp_path, few_sizes):
    results = benchmark_feeding(tmp_path, corpus=corpus, **QUICK)
    assert json.loads((tmp_path / "feeding_cpu.json").read_text()) == results
    found = [(one["place"], one["contestant"]) for one in results["measurements"]]
    assert found == [(place, name) for place in PLACES for name in CONTESTANTS]
    assert all(len(one["cells_per_second"]) == 2 and one["median"] > 0 for one in results["measurements"])
    assert results["corpus"]["num_cells"] == 48
    assert len(results["quality"]["rows"]) == 3 * 2
    text = (tmp_path / "feeding_cpu.md").read_text()
    for line in ("## Targets", "## Cells a second", "## Mixing", "## Padding", "## The order of 5,000 cells"):
        assert line in text
    assert "load of the machine" in " ".join(text.split())
    assert (tmp_path / "feeding_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_corpus_is_made_where_none_is_given(tmp_path, few_sizes):
    results = benchmark_feeding(tmp_path, num_cells=20, **{**QUICK, "limits": Limits(0.01, 1)})
    assert results["corpus"]["num_cells"] == 20
    assert results["corpus"]["expressed_genes"] > 500


def test_ratios_and_targets_are_those_of_the_shuffled_reading():
    rows = [
        row("expressed", "ours", 12_000.0),
        row("expressed", "datasets_random", 3000.0),
        row("full", "ours", 3999.0),
    ]
    assert compute_ratios(rows) == [{"place": "expressed", "contestant": "datasets_random", "times_faster": 4.0}]
    quality = [{"block_size": module.BLOCK_SIZE, "buffer_size": module.BUFFER_SIZE, "label_share": 0.995}]
    assert [target["is_met"] for target in judge_feeding(rows, quality)] == [True, True, False, True, True]
    assert [target["is_met"] for target in judge_feeding([], [])] == [None] * 5


def test_entropy_is_that_of_the_shares_in_bits():
    codes = np.array([0, 0, 1, 1, 2, 3, 3, 3])
    found = entropies([[0, 1], [0, 2], [0, 2, 4, 5], [0, 2, 3, 3]], codes)
    np.testing.assert_allclose(found, [0, 1, 2, 0.25 * 2 + 0.75 * np.log2(4 / 3)])


def test_sorted_files_have_each_label_as_often_as_it_is():
    origins = sorted_origins([30, 10], 100, cells_a_file=40)
    assert np.bincount(origins.label[:40]).tolist() == [30, 10]
    assert (np.diff(origins.label[:40]) >= 0).all()
    assert np.bincount(origins.file).tolist() == [40, 40, 20]
    assert set(origins.run) == {0}


def test_smaller_blocks_and_larger_buffers_mix_better_and_single_cells_fully():
    rows = measure_shufflings(sorted_origins([1] * 8, 40_000), [1, 64], [256, 4096], batch_size=32, num_batches=300)
    shares = {(one["block_size"], one["buffer_size"]): one["label_share"] for one in rows}
    # Entropies of 300 batches scatter by a hundredth of their mean, and means by a tenth of that.
    assert shares[1, 256] == pytest.approx(1, abs=0.01)
    assert shares[1, 4096] == pytest.approx(1, abs=0.01)
    assert shares[64, 256] < 0.8
    assert shares[64, 256] < shares[64, 4096] < 1
    assert all(one["run_share"] <= 1.01 for one in rows)


def test_a_buffer_below_its_block_is_left_out():
    rows = measure_shufflings(sorted_origins([1, 1], 500), [64], [16, 128], batch_size=8, num_batches=20)
    assert [(one["block_size"], one["buffer_size"]) for one in rows] == [(64, 128)]


def test_padding_is_less_in_groups(corpus):
    cells = CellDataset(open_corpus(corpus))
    plain, grouped = (measure_padding(cells, 8, is_grouped=is_grouped) for is_grouped in (False, True))
    assert 0 < grouped < plain < 1


def test_the_order_of_many_cells_takes_no_bytes_a_cell():
    order = measure_order(1_000_000, 64)
    assert order["bytes_held"] < 2e6
    assert order["bytes_of_chosen_rows"] == 4e6


def test_refuses_sizes_that_cannot_be(corpus, tmp_path):
    with pytest.raises(ValueError, match="limits must be positive, got 0 s and 5 repeats"):
        benchmark_feeding(tmp_path, corpus=corpus, limits=Limits(0))
    with pytest.raises(ValueError, match="batch_size must lie between 1 and the 48 cells of the corpus, got 64"):
        benchmark_feeding(tmp_path, corpus=corpus)


def test_the_command_line_runs_and_ends_with_a_message_where_something_is_missing(
    corpus, tmp_path, capsys, few_sizes, monkeypatch
):
    monkeypatch.setattr(module, "benchmark_feeding", lambda output, **options: options)
    monkeypatch.setattr(module, "format_feeding", lambda options: f"{options['limits']} {options['corpus']}")
    main(["--corpus", corpus, "--seconds", "0.5", "--output", str(tmp_path)])
    assert f"Limits(seconds=0.5, repeats=5) {corpus}" in capsys.readouterr().out
    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"error: .*is not a corpus"):
        main(["--corpus", str(tmp_path / "absent")])
