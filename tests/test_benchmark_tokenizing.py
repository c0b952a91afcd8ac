"""The tokenizing benchmark at toy size: every contestant goes through the cells, and its files say what it measured."""

import json
import sys

import anndata
import datasets
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from screformer.benchmarks import tokenizing
from screformer.benchmarks.per_cell_loops import align_genes, dense_cells, rank_cells, save_ranks
from screformer.benchmarks.tokenizing import benchmark_tokenizing, main
from screformer.benchmarks.tokenizing_report import (
    ALIGNED,
    CORPUS,
    DENSE,
    OURS,
    RANKS,
    READING,
    find_rate,
    format_tokenizing,
    judge_tokenizing,
    project,
)
from screformer.tokenization import example_cells_path

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
COUNTS = csr_matrix([[4, 0, 8, 8, 80], [0, 1, 0, 0, 1]])
POSITIONS = np.array([2, 0, 1, -1, 3])


def test_ranks_go_from_the_highest_scaled_count_down_without_unknown_genes(tmp_path):
    medians = np.array([1.0, 4.0, 1.0, 100.0])
    cells = list(rank_cells(COUNTS, POSITIONS, medians))
    assert cells == [[2, 1, 3], [0, 3]]
    save_ranks(cells, tmp_path / "ranks")
    assert not list(tmp_path.iterdir())


def test_dense_cells_are_log2_of_ten_thousand_counts_held_at_the_highest_bin():
    first, second = dense_cells(COUNTS, POSITIONS, 4, highest_bin=5)
    assert first.tolist() == [0, 5, 5, 5]
    assert second.tolist() == [5, 0, 0, 5]
    assert str(first.dtype) == "torch.int64"
    (low,) = dense_cells(csr_matrix([[5, 9995]]), np.array([0, -1]), 2, highest_bin=5)
    assert low.tolist() == [2, 0]  # log2(1 + 5) = 2.6


def test_aligned_cells_have_the_vocabularys_genes_in_order():
    aligned = align_genes(COUNTS, POSITIONS, 5)
    assert aligned.toarray().tolist() == [[0, 8, 4, 80, 0], [1, 0, 0, 1, 0]]


def results_of(rates, memory):
    """Return results with these cells/s, by contestant and compression."""
    speed = [
        {
            "contestant": name,
            "compression": compression,
            "cells_per_second": rate / 2,
            "cells_per_processor_second": rate,
            "file_bytes_per_cell": 4000,
        }
        for (name, compression), rate in rates.items()
    ]
    return {"speed": speed, "memory": memory}


RATES = {(READING, "gzip"): 1000, (OURS, "gzip"): 700, (CORPUS, "gzip"): 300, (RANKS, "gzip"): 70, (DENSE, "gzip"): 71}


def memory_row(num_cells, peak_bytes):
    return {
        "num_cells": num_cells,
        "num_tokens": 1000 * num_cells,
        "corpus_bytes": 3100 * num_cells,
        "file_bytes": 4000 * num_cells,
        "cells_per_second": 400.0,
        "cells_per_processor_second": 500.0,
        "peak_bytes": peak_bytes,
        "own_bytes": peak_bytes / 2,
    }


def test_targets_are_judged_by_ratios_within_the_run():
    judged = judge_tokenizing(results_of(RATES, [memory_row(10, 10**9), memory_row(1000, 1.2 * 10**9)]))
    assert [target["is_met"] for target in judged] == [True, None, None, True, False, None, True, False, True]
    assert judged[0]["measured"] == 0.7
    assert judged[6]["measured"] == pytest.approx(1.2)
    assert judged[8]["measured"] == pytest.approx(15 * (3 * 918 + 100) / 1000)
    nothing = judge_tokenizing(results_of({}, []))
    assert {target["is_met"] for target in nothing} == {None}


def test_many_cells_are_projected_from_the_largest_corpus():
    many = project(results_of({}, [memory_row(10, 1), memory_row(1000, 1)]))
    assert many["measured_on_cells"] == 1000
    assert many["hours"]["1"] == pytest.approx(15e6 / 500 / 3600)
    assert many["hours"]["8"] == pytest.approx(many["hours"]["1"] / 8)
    assert many["input_gigabytes"] == pytest.approx(60)
    assert many["corpus_gigabytes"]["1000"] == pytest.approx(46.5)
    assert project(results_of({}, [])) is None


@pytest.fixture
def in_this_process(monkeypatch):
    """Run what would be a process a measurement here: starting Python takes longer than all the rest."""
    threads = torch.get_num_threads()

    def run(step, *paths):
        return {"--build": tokenizing.build_and_measure, "--read": tokenizing.read_and_measure}[step](*paths)

    monkeypatch.setattr(tokenizing, "_in_new_process", run)
    monkeypatch.setattr(tokenizing, "return_large_blocks", lambda: None)
    monkeypatch.setattr(tokenizing, "return_columns", lambda: None)
    yield
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()


@needs_linux
@pytest.mark.usefixtures("in_this_process")
def test_the_benchmark_measures_everything_and_leaves_only_its_results(tmp_path, capsys):
    source = tmp_path / "real.h5ad"
    anndata.read_h5ad(example_cells_path())[:40, ::30].copy().write_h5ad(source)
    arguments = [
        "--cells",
        "200",
        "--rate-cells",
        "60",
        "--loop-cells",
        "20",
        "--repeats",
        "1",
        "--source",
        str(source),
    ]
    main([*arguments, "--output", str(tmp_path / "results"), "--work", str(tmp_path / "work")])
    assert {path.name for path in tmp_path.iterdir()} == {"results", "real.h5ad"}
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {f"tokenizing_cpu.{ending}" for ending in ("json", "md", "png")}
    results = json.loads((tmp_path / "results" / "tokenizing_cpu.json").read_text())
    measured = {(row["contestant"], row["compression"]) for row in results["speed"]}
    assert measured == {(name, kind) for name in (READING, OURS) for kind in ("gzip", "lzf", "none")} | {
        (name, "gzip") for name in (CORPUS, RANKS, DENSE, ALIGNED)
    }
    assert find_rate(results, OURS, "lzf") > 0
    assert [row["num_cells"] for row in results["memory"]] == [2, 20, 200]
    assert all(10**8 < row["peak_bytes"] < 3 * 10**9 for row in results["memory"])
    reading = results["memory"][-1]["reading"]
    assert reading["is_each_seen_once"]
    assert reading["num_tokens"] == results["memory"][-1]["num_tokens"]
    text = (tmp_path / "results" / "tokenizing_cpu.md").read_text()
    assert text == format_tokenizing(results)
    assert text in capsys.readouterr().out
    assert "reading, shuffled, each cell once" in text


def test_wrong_calls_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cells: at least 100"):
        benchmark_tokenizing(tmp_path, tmp_path / "work", num_cells=99)
    with pytest.raises(SystemExit, match=r"error: .*File exists"):
        main(["--work", str(tmp_path), "--output", str(tmp_path)])
    with pytest.raises(OSError, match="a process of the benchmark failed: ValueError"):
        tokenizing._in_new_process("--build", __file__, tmp_path / "corpus")
