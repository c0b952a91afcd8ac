"""`screformer benchmark explanations`: trained, explained and compared on made-up cells."""

import json

import pytest
from small_corpus import TINY_MODEL, make_cells, make_tokenizer

from screformer.annotation.attributions import Sampling
from screformer.annotation.class_explanation import ExplainOptions
from screformer.annotation.explanation_run import Checks
from screformer.benchmarks import explanations as module
from screformer.benchmarks.labelled_data import read_labelled_data
from screformer.benchmarks.system_ours import ScReformerSystem


def tiny_system():
    shape = " ".join(value.replace(" ", "") for value in [*TINY_MODEL, "gene_space=expressed"])
    return ScReformerSystem("finetune-small --use_cpu", model=f"--config_overrides {shape}", tokenizer=make_tokenizer())


def test_the_genes_of_a_type_are_found_in_cells_that_it_was_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ScReformerSystem", tiny_system)
    make_cells(150, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    options = ExplainOptions(
        ["alpha"],
        sampling=Sampling(num_points=4),
        num_cells=8,
        num_background=30,
        checks=Checks(4, 4, 4),
        genes=["GENE0", "GENE39"],
    )
    results = module.explain_labelled_cells(
        read_labelled_data(tmp_path / "cells.h5ad"),
        options,
        output=tmp_path / "out",
        work=tmp_path / "work",
        num_compared=3,
        methods=["expected_gradients", "integrated_gradients"],
    )
    assert (results["num_train"], results["test_accuracy"] > 0.8) == (120, True)
    (alpha,) = results["classes"]
    top = {row["gene"] for row in alpha["top"][:6]}
    assert len(top & {f"GENE{number}" for number in range(6)}) >= 5  # those that alpha expresses
    ours, integrated = results["methods"]
    assert ours["rank_correlation"] > 0.9
    assert ours["median_gap"] < 0.05
    assert integrated["num_cells"] == 3
    assert json.loads((tmp_path / "out" / "explanations-cells.json").read_text()) == results
    text = (tmp_path / "out" / "explanations-cells.md").read_text()
    assert "| integrated gradients | 4 |" in text
    assert "Genes that were asked for" in text
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "explanations-cells-beeswarm-alpha.png", "explanations-cells-curves-alpha.png"
    }  # fmt: skip


def test_a_class_that_is_none_ends_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ScReformerSystem", tiny_system)
    make_cells(90, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    folders = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    with pytest.raises(SystemExit, match="error: class 'gamma'"):
        module.main(["--cells", str(tmp_path / "cells.h5ad"), "--class", "gamma", *folders])
