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


def tiny_system(finetuning="finetune-small"):
    shape = " ".join(value.replace(" ", "") for value in [*TINY_MODEL, "gene_space=expressed"])
    return ScReformerSystem(f"{finetuning} --use_cpu", model=f"--config_overrides {shape}", tokenizer=make_tokenizer())


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
    assert (results["num_train"], results["num_test"]) == (120, 30)
    assert results["named_so"]["alpha"] > 0.8
    (alpha,) = results["classes"]
    top = {row["gene"] for row in alpha["top"][:6]}
    assert len(top & {f"GENE{number}" for number in range(6)}) >= 5  # those that alpha expresses
    ours, integrated, as_drawn = results["methods"]
    assert as_drawn["method"] == "expected gradients, sums as drawn"
    assert ours["rank_correlation"] > 0.9
    assert ours["median_gap"] < 0.05
    assert integrated["num_cells"] == 3
    assert json.loads((tmp_path / "out" / "explanations-cells.json").read_text()) == results
    text = (tmp_path / "out" / "explanations-cells.md").read_text()
    assert "| integrated gradients | 4 |" in text
    assert "Genes that were asked for" in text
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        f"explanations-cells-{figure}-alpha.png" for figure in ("beeswarm", "genes", "curves")
    }  # fmt: skip


def test_cells_of_another_file_are_explained_by_a_model_of_all_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ScReformerSystem", tiny_system)
    make_cells(90, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    others = make_cells(60, types=["alpha", "beta"], seed=7)
    others.obs["cell_type"] = ["endocrine" if name == "alpha" else name for name in others.obs["cell_type"]]
    others.write_h5ad(tmp_path / "others.h5ad")
    words = "--class endocrine=alpha --classifier paper --points 4 --num-cells 8 --num-background 30 --num-compared 0 "
    words += "--gene-space full"
    module.main([
        "--cells", str(tmp_path / "cells.h5ad"), "--test-cells", str(tmp_path / "others.h5ad"), *words.split(),
        "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"),
    ])  # fmt: skip
    results = json.loads((tmp_path / "out" / "explanations-others-paper-full.json").read_text())
    assert (results["num_train"], results["num_test"], results["train_data"]) == (90, 60, "cells")
    assert list(results["named_so"]) == ["endocrine"]
    assert results["classifier"] == "The paper's classifier"
    assert results["classes"][0]["num_cells"] == 8
    assert (results["gene_space"], results["methods"]) == ("full", [])
    assert "## Methods" not in (tmp_path / "out" / "explanations-others-paper-full.md").read_text()


def test_a_share_that_is_none_is_refused(tmp_path):
    make_cells(60, types=["alpha", "beta"]).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(SystemExit, match=r"error: test_share got 1\.0; it must lie between 0 and 1"):
        module.main(["--cells", str(tmp_path / "cells.h5ad"), "--class", "alpha", "--test-share", "1"])


def test_a_class_that_is_none_ends_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ScReformerSystem", tiny_system)
    make_cells(90, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    folders = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    with pytest.raises(SystemExit, match="error: class 'gamma'"):
        module.main(["--cells", str(tmp_path / "cells.h5ad"), "--class", "gamma", *folders])
