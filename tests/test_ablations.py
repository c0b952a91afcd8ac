"""`screformer benchmark ablations`: what each variant lacks, and what a step costs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from small_corpus import TINY_MODEL, make_cells, make_tokenizer
from test_protocol import Nearest

from screformer.benchmarks import ablations as module
from screformer.benchmarks.ablation_costs import COST_LIMITS, COSTS, costs_rows, measure_costs, write_costs
from screformer.benchmarks.ablations import FULL, REGRESSION, Settings, ablations, main, run_ablations
from screformer.benchmarks.labelled_data import read_labelled_data
from screformer.benchmarks.measuring import Shape
from screformer.benchmarks.protocol import make_folds
from screformer.benchmarks.standard_encoder import StandardEncoder
from screformer.benchmarks.system_ours import ScReformerSystem

SMALL = Shape(256, num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32, bucket_size=16, num_hashes=2)


def attributes(system):
    plain = {name: value for name, value in vars(system).items() if not name.startswith("_") and name != "title"}
    return plain | {"num_bins": system._tokenizer and system._tokenizer.num_bins}


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("exact_attention", {"model": "attention=exact"}),
        ("variable_genes", {"num_variable_genes": 3_000}),
        ("standard_transformer", {"encoder": "standard", "num_variable_genes": 3_000}),
        ("not_pretrained", {"pretraining": None}),
        ("no_gene2vec", {"gene_vectors": None}),
        ("other_gene_space", {"finetuning": "--gene_space full", "pretraining": "--gene_space full"}),
        ("one_round", {"model": "num_hashes=1"}),
        ("more_rounds", {"model": "num_hashes=8"}),
        ("few_bins", {"num_bins": 3}),
        ("many_bins", {"num_bins": 12}),
        ("pooled", {"finetuning": "--classifier_paths pooled"}),
        ("frozen", {"finetuning": "--freeze encoder"}),
    ],
)
def test_a_variant_differs_in_what_it_is_named_for_alone(name, lacks):
    variants = ablations(Settings())
    whole, variant = attributes(variants[FULL]()), attributes(variants[name]())
    assert {key for key in whole if whole[key] != variant[key]} == set(lacks)
    for key, value in lacks.items():
        assert value in variant[key] if isinstance(value, str) else variant[key] == value
    assert set(variants) == {FULL, REGRESSION} | {
        "exact_attention", "variable_genes", "standard_transformer", "not_pretrained", "no_gene2vec",
        "other_gene_space", "one_round", "more_rounds", "few_bins", "many_bins", "pooled", "frozen",
    }  # fmt: skip


def test_the_papers_width_is_one_setting_away():
    whole = ablations(Settings(preset="base", gene_space="full", cells_per_label=0))[FULL]()
    assert "--preset base" in whole.model
    assert whole.gene_vectors == 200
    assert "--gene_space full" in whole.finetuning
    assert "cells_per_label" not in whole.finetuning


@pytest.mark.parametrize("encoder", ["reformer", "standard"])
def test_everything_before_fine_tuning_sees_training_cells_alone(tmp_path, encoder):
    pytest.importorskip("gensim")
    make_cells(120, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    data = read_labelled_data(tmp_path / "cells.h5ad", group_column="donor")
    shape = " ".join(value.replace(" ", "") for value in [*TINY_MODEL, "gene_space=expressed"])
    system = ScReformerSystem(
        "finetune-small --use_cpu",
        model=f"--config_overrides {shape}",
        pretraining="pretrain-tiny --gene_start random --use_cpu --num_train_epochs 1",
        gene_vectors=16,
        num_variable_genes=20,
        encoder=encoder,
        tokenizer=make_tokenizer(),
    )
    fold = make_folds(data, "leave_one_group_out")[0]
    train = np.concatenate([fold.cells.train, fold.cells.validation])
    system.fit(data.adata[train].copy(), data.labels[train].tolist(), groups=data.groups[train].tolist(), seed=0)
    assert system._trained.model.config.num_genes == 20
    assert isinstance(system._trained.model.screformer.encoder, StandardEncoder) == (encoder == "standard")
    named = system.predict(data.adata[fold.cells.test].copy())
    assert (
        np.mean([label == right for label, right in zip(named.labels, data.labels[fold.cells.test], strict=True)]) > 0.8
    )


def test_variants_become_a_table_with_differences_to_the_whole_method(tmp_path, monkeypatch):
    make_cells(120, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    data = read_labelled_data(tmp_path / "cells.h5ad", group_column="donor")
    monkeypatch.setattr(module, "ablations", lambda settings: {FULL: Nearest, "pooled": Nearest, REGRESSION: Nearest})
    where = {"kind": "leave_one_group_out", "output": tmp_path / "out", "work": tmp_path / "work"}
    results = run_ablations(data, names=["pooled"], note="Another program ran beside it.", **where)
    assert list(results["systems"]) == [FULL, "pooled"]
    assert results["left_out"] == {}
    assert json.loads((tmp_path / "out" / "ablations-cells.json").read_text()) == results
    text = (tmp_path / "out" / "ablations-cells.md").read_text()
    assert "**a toy width**" in text
    assert "\n\nAnother program ran beside it.\n\n" in text
    assert "+0.000 (+0.000 to +0.000)" in text
    assert (tmp_path / "out" / "ablations-cells.png").exists()
    with pytest.raises(ValueError, match=r"names got \['pool'\]; there are full, pooled"):
        run_ablations(data, names=["pool"], **where)


def test_eager_attention_runs_out_of_memory_and_the_others_do_not(tmp_path):
    shape = replace(SMALL, length=4096)
    limits = replace(COST_LIMITS, memory_limit=0.3, time_limit=120)
    rows = measure_costs(["lsh", "bert_eager"], shape=shape, limits=limits)
    assert [row["reason"] for row in rows] == [None, "needs more than 0.3 GB"]
    assert rows[1]["pair_bytes"] == 4 * 2 * 4096**2
    assert rows[0]["seconds"] > 0
    results = write_costs(rows, tmp_path, provenance={"date": "d", "command": "c"})
    assert results["rows"][0][2].endswith("(1x)")
    assert results["rows"][1][2:] == ["-", "**needs more than 0.3 GB**; scores of a layer alone are 0.1 GB"]
    assert "**needs more than 0.3 GB**" in (tmp_path / "ablations-step_costs.md").read_text()
    assert json.loads((tmp_path / "ablations-step_costs.json").read_text()) == results
    with pytest.raises(ValueError, match=r"names got \['eager'\]; there are lsh"):
        measure_costs(["eager"])


def test_costs_at_the_variable_genes_are_of_fewer_genes():
    assert COSTS["bert_sdpa_variable_genes"].num_genes == 3_000
    row = {"title": "t", "num_genes": 256, "seconds": None, "peak_bytes": None, "reason": "no", "pair_bytes": None}
    assert costs_rows([row])[1] == [["t", "256", "-", "**no**"]]


def test_the_command_refuses_unknown_names(capsys):
    with pytest.raises(SystemExit, match=r"error: names got \['nonsense'\]"):
        main(["--costs", "nonsense"])
