"""Perturbation changes tokens and nothing else, runs only what changes them, and knows what is no more than chance."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import sparse
from typer.testing import CliRunner

import screformer.annotation
from screformer.annotation import perturb
from screformer.annotation import perturbation_run as run_module
from screformer.annotation.perturb import find_genes
from screformer.annotation.perturbation_null import adjust_p_values, empirical_p_values, match_genes, match_sets
from screformer.annotation.trained_model import TrainedModel
from screformer.cli import app
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.inference import BatchInference

NUM_GENES, NUM_CELLS = 400, 40
IDS = [f"ENSG{number:011d}" for number in range(1, NUM_GENES + 1)]
SYMBOLS = [f"GENE{number}" for number in range(NUM_GENES)]
LABELS = ["alpha", "beta", "gamma"]
PLANTED, SILENT, HIGH = 40, 398, 399
FILES = ["perturbation.json", "perturbation.md", "perturbation.parquet", "perturbation.png"]


def make_cells(num_cells=NUM_CELLS):
    """Return raw counts: genes differ in how many cells express them, the last is high in all so that bins differ."""
    rates = np.tile(np.linspace(0.3, 3, NUM_GENES), (num_cells, 1))
    rates[:, SILENT], rates[:, HIGH] = 0, 5_000
    counts = np.random.default_rng(1).poisson(rates).astype(np.int32)
    obs = pd.DataFrame(
        {"kind": [["round", "flat"][number % 2] for number in range(num_cells)]},
        index=[f"cell{number}" for number in range(num_cells)],
    )
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=IDS))


def make_tokenizer():
    aliases = [[f"OLD{number}", *(["TWICE"] if number in (3, 4) else [])] for number in range(NUM_GENES)]
    return ScReformerTokenizer(GeneVocabulary(IDS, symbols=SYMBOLS, aliases=aliases), on_empty_cells="keep")


@pytest.fixture
def trained(tiny_config):
    """Return a classifier whose linear path calls cells with the planted gene alpha, and others beta."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ScReformerForCellClassification(
            tiny_config(
                num_genes=NUM_GENES,
                num_hidden_layers=1,
                num_hashes=1,
                classifier_paths=["convolution", "linear"],
                tokenizer_fingerprint=tokenizer.fingerprint,
                id2label=dict(enumerate(LABELS)),
                label2id={label: index for index, label in enumerate(LABELS)},
            )
        )
    weight = torch.zeros(3, NUM_GENES)
    weight[0, PLANTED] = 20.0
    model.start_linear_path(weight, torch.tensor([-2.0, 0.0, -30.0]))
    return TrainedModel(model.eval(), tokenizer, "planted")


@pytest.fixture
def checkpoint(trained, tmp_path):
    trained.model.save_pretrained(tmp_path / "model")
    trained.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(trained, genes, cells=None, **options):
    options = {"progress": False, "num_null": 0, **options}
    return perturb(make_cells() if cells is None else cells, trained, genes=genes, **options)


def outputs_of(trained, bins, gene_space):
    """Return logits, embeddings and probabilities of cells, by calling the model on their bins (cells, genes)."""
    model = trained.model
    with torch.no_grad():
        if gene_space == "full":
            batches = [{"input_ids": torch.from_numpy(bins)}]
        else:
            batches = [
                {
                    "input_ids": torch.from_numpy(row[row > 0])[None],
                    "gene_ids": torch.from_numpy(np.flatnonzero(row))[None],
                }
                for row in bins
            ]
        given = [model(**batch) for batch in batches]
    logits = torch.cat([one.logits for one in given])
    return logits.numpy(), torch.cat([one.cell_embedding for one in given]).numpy(), logits.softmax(-1).numpy()


def check_against_model(result, trained, before, after, gene_space):
    """Compare one gene's record with the model's outputs on bins before and after."""
    is_changed = (before != after).any(axis=1)
    old, new = (outputs_of(trained, bins[is_changed], gene_space) for bins in (before, after))
    (found,) = result.record["results"]
    assert found["num_changed_cells"] == is_changed.sum()
    assert found["num_unchanged_cells"] == (~is_changed).sum()
    for at, name in enumerate(LABELS):
        logit, probability = (found["classes"][name][kind]["mean"] for kind in ("logit", "probability"))
        assert logit == pytest.approx((new[0] - old[0])[:, at].mean(), abs=1e-4)
        assert probability == pytest.approx((new[2] - old[2])[:, at].mean(), abs=1e-5)
    assert found["euclidean_distance"]["mean"] == pytest.approx(
        np.linalg.norm(new[1] - old[1], axis=1).mean(), rel=1e-3
    )
    cosines = (new[1] * old[1]).sum(1) / np.linalg.norm(new[1], axis=1) / np.linalg.norm(old[1], axis=1)
    assert found["cosine_distance"]["mean"] == pytest.approx((1 - cosines).mean(), abs=1e-5)
    answers = old[0].argmax(1), new[0].argmax(1)
    assert found["labels_changed"]["mean"] == pytest.approx((answers[0] != answers[1]).mean())
    own = np.take_along_axis(new[2] - old[2], answers[0][:, None], axis=1).mean()
    assert found["own_probability"]["mean"] == pytest.approx(own, abs=1e-5)
    expected = {}
    for one, other in zip(*answers, strict=True):
        if one != other:
            row = expected.setdefault(LABELS[one], {})
            row[LABELS[other]] = row.get(LABELS[other], 0) + 1
    assert found["label_changes"] == expected


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_deleting_a_gene_is_as_a_cell_with_the_same_bins_and_without_that_gene(trained, gene_space):
    bins = make_tokenizer()(make_cells())["input_ids"]
    without = bins.copy()
    without[:, PLANTED] = 0
    result = run(trained, ["GENE40"], gene_space=gene_space, batch_size=7)
    check_against_model(result, trained, bins, without, gene_space)
    assert result.record["results"][0]["label_changes"]["alpha"]["beta"] > 5


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_raising_adds_bins_up_to_the_highest_to_cells_without_the_gene_too(trained, gene_space):
    bins = make_tokenizer()(make_cells())["input_ids"]
    raised = bins.copy()
    raised[:, PLANTED] = np.minimum(bins[:, PLANTED] + 4, 5)
    assert {(1, 5), (0, 4)} <= set(zip(bins[:, PLANTED].tolist(), raised[:, PLANTED].tolist(), strict=True))
    result = run(trained, ["GENE40"], change="raise", bins=4, gene_space=gene_space)
    check_against_model(result, trained, bins, raised, gene_space)


def test_genes_together_are_changed_at_once(trained):
    bins = make_tokenizer()(make_cells())["input_ids"]
    without = bins.copy()
    without[:, [PLANTED, 60]] = 0
    result = run(trained, ["GENE60", "GENE40"], together=True)
    check_against_model(result, trained, bins, without, "full")
    assert result.record["results"][0]["symbols"] == ["GENE40", "GENE60"]
    assert [one["gene"] for one in run(trained, ["GENE60", "GENE40"]).record["results"]] == ["GENE60", "GENE40"]


def test_changes_that_are_none_are_counted_and_not_run(trained, monkeypatch):
    original, rows_run = BatchInference.__call__, []

    def count(self, rows, **options):
        rows_run.append(len(rows))
        return original(self, rows, **options)

    monkeypatch.setattr(BatchInference, "__call__", count)
    expressing = int((make_cells().X[:, PLANTED] > 0).sum())
    deleted = run(trained, ["GENE40", "GENE398"], num_null=3)
    planted, silent = deleted.record["results"]
    assert rows_run[:2] == [NUM_CELLS, expressing]
    assert (silent["num_changed_cells"], silent["num_unchanged_cells"]) == (0, NUM_CELLS)
    assert silent["own_probability"] == {"mean": None, "null": None, "p": None, "q": None}
    assert silent["notes"] == ["the change changes no cell"]
    assert "GENE398: the change changes no cell" in str(deleted)
    assert planted["own_probability"]["p"] is not None
    rows_run.clear()
    (at_the_top,) = run(trained, ["GENE399"], change="raise").record["results"]
    assert rows_run == [NUM_CELLS]
    assert at_the_top["num_unchanged_cells"] == NUM_CELLS


def test_a_cell_that_would_be_empty_is_not_run(trained):
    cells = make_cells()
    counts = cells.X.toarray()
    counts[:2] = 0
    counts[0, HIGH] = 7
    cells.X = sparse.csr_matrix(counts)
    result = run(trained, ["GENE399"], cells=cells)
    (found,) = result.record["results"]
    assert (found["num_emptied_cells"], found["num_changed_cells"]) == (1, NUM_CELLS - 2)
    assert found["notes"] == ["1 cells would have no expressed gene left, and are not counted"]
    assert (result.record["cells"]["num_cells"], result.record["cells"]["num_empty"]) == (NUM_CELLS - 1, 1)


def test_a_planted_gene_is_found_and_random_ones_are_not(trained):
    genes = ["GENE40", "GENE41", "GENE80", "GENE120", "GENE160"]
    result = run(trained, genes, num_null=19)
    planted, *others = result.record["results"]
    assert planted["null"]["num_genes"] == 19
    assert planted["classes"]["alpha"]["probability"]["p"] == planted["labels_changed"]["p"] == 1 / 20
    assert planted["classes"]["alpha"]["probability"]["mean"] < -0.3
    # Any one of them may be among the outermost of its null by chance.
    assert np.median([other["classes"]["alpha"]["probability"]["p"] for other in others]) > 0.1
    assert not set(genes) & {name for one in (planted, *others) for name in one["null"]["genes"]}
    table = result.table.set_index(["gene", "class"])
    assert table.shape[0] == 15
    assert table.loc[("GENE40", "alpha"), "probability_q"] <= 5 / 20
    for gene in (planted, *others):
        assert gene["classes"]["beta"]["probability"]["q"] >= gene["classes"]["beta"]["probability"]["p"]


def test_the_null_is_the_same_change_of_the_matched_genes(trained):
    (found,) = run(trained, ["GENE40"], num_null=4).record["results"]
    alone = run(trained, found["null"]["genes"]).record["results"]
    for kind in ("cosine_distance", "own_probability"):
        shifts = [one[kind]["mean"] for one in alone]
        assert found[kind]["null"]["mean"] == pytest.approx(np.mean(shifts), abs=1e-6)
        assert found[kind]["null"]["lowest"] == pytest.approx(min(shifts), abs=1e-6)
        more = sum(abs(shift) >= abs(found[kind]["mean"]) for shift in shifts)
        assert found[kind]["p"] == (1 + more) / 5


def test_matched_genes_are_near_in_expression():
    generator = np.random.default_rng(0)
    expressing, means = generator.integers(1, 1000, 2000), generator.uniform(1, 5, 2000)
    matches = match_genes([0, 1], np.arange(2, 2000), expressing, means, number=20, seed=1)
    for target in (0, 1):
        assert len(set(matches[target])) == 20
        near = [
            (np.abs(values[matches[target]] - values[target]) <= 0.11 * np.ptp(values)).all()
            for values in (expressing, means)
        ]
        assert near == [True, True]
    same = np.full(2000, 7)
    drawn = [match_genes([0], np.arange(1, 2000), same, same, number=20, seed=seed)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_genes_with_few_alike_say_so(trained):
    few = make_cells()[:, 100:].copy()
    (high,) = run(trained, ["GENE399"], cells=few, num_null=30).record["results"]
    assert 0 < high["null"]["num_genes"] < 19
    least = 1 / (1 + high["null"]["num_genes"])
    assert high["notes"][0].startswith(
        f"too few genes are expressed alike, {high['null']['num_genes']} of 30: p cannot"
    )
    assert high["notes"][0].endswith(f"{least:.2g}")
    assert high["cosine_distance"]["p"] >= least
    ours, theirs = high["mean_bin"], high["null"]["mean_bin"]
    assert high["notes"][1:] == [f"its null is expressed otherwise: mean bin {theirs:.2f}, its own {ours:.2f}"]
    lonely = match_genes([0], np.arange(1, 11), np.array([1000, *[1] * 10]), np.ones(11), number=5, seed=0)
    assert lonely == {0: []}


def test_sets_are_matched_gene_by_gene():
    assert match_sets((1, 2), {1: [5, 6, 7], 2: [5, 8, 9]}) == [(5, 8), (6, 8), (7, 9)]
    assert match_sets((1, 2), {1: [5, 6], 2: []}) == []


def test_p_values_count_larger_shifts_in_either_direction():
    null = np.array([[0.1, 0.0], [-0.3, 0.0], [0.2, 0.0]])
    np.testing.assert_allclose(empirical_p_values(np.array([-0.2, 0.0]), null), [3 / 4, 1])
    first, none, second = adjust_p_values([np.array([0.01, 0.5]), None, np.array([0.04, 0.5])])
    assert none is None
    np.testing.assert_allclose([first, second], [[0.02, 0.5], [0.04, 0.5]])
    assert adjust_p_values([None]) == [None]


def test_cells_are_of_the_asked_type_and_drawn_by_the_seed(trained):
    cells = make_cells()
    by_column = run(trained, ["GENE40"], cells_of="flat", label_column="kind")
    assert by_column.record["cells"]["num_cells"] == NUM_CELLS // 2
    assert by_column.record["settings"]["own_class"] is None
    alone = run(trained, ["GENE40"], cells=cells[cells.obs["kind"] == "flat"].copy())
    assert alone.record["cells"]["sha256"] == by_column.record["cells"]["sha256"]
    named = run(trained, ["GENE40"], cells_of="alpha")
    everyone = run(trained, ["GENE40"])
    assert named.record["cells"]["labels"] == {
        **dict.fromkeys(LABELS, 0),
        "alpha": everyone.record["cells"]["labels"]["alpha"],
    }
    assert 0 < named.record["cells"]["num_cells"] < NUM_CELLS
    found = named.record["results"][0]
    assert found["own_probability"] == found["classes"]["alpha"]["probability"]
    drawn = [run(trained, ["GENE40"], max_cells=9, seed=seed).record["cells"] for seed in (1, 1, 2)]
    assert [one["num_cells"] for one in drawn] == [9, 9, 9]
    assert drawn[0]["sha256"] == drawn[1]["sha256"] != drawn[2]["sha256"]


def test_cells_may_be_of_a_type_above_the_classes(trained):
    trained.model.config.label_parents = {"alpha": "both", "beta": "both", "both": None, "gamma": None}
    result = run(trained, ["GENE40"], cells_of="both")
    assert result.record["cells"]["num_cells"] == NUM_CELLS
    assert result.record["settings"]["own_class"] is None
    with pytest.raises(ValueError, match="cells_of='gamma': no cell is so"):
        run(trained, ["GENE40"], cells_of="gamma")


def test_blocks_change_nothing(trained, monkeypatch):
    whole = run(trained, ["GENE40", "GENE60"], num_null=3)
    for module in ("perturbed_cells", "cell_source"):
        monkeypatch.setattr(f"screformer.annotation.{module}.CELLS_PER_BLOCK", 7)
    parts = run(trained, ["GENE40", "GENE60"], num_null=3, batch_size=3)
    pd.testing.assert_frame_equal(parts.table, whole.table, atol=1e-5, rtol=1e-3)


def test_a_run_that_is_stopped_goes_on_to_the_same_results(trained, tmp_path, monkeypatch):
    options = {"num_null": 4, "cells_of": "alpha"}
    whole = run(trained, ["GENE40", "GENE60"], output=tmp_path / "whole", **options)
    original, measured, fails = run_module.PerturbationMeasure.__call__, [], [True]

    def fail_once(self, genes, **more):
        if len(measured) == 4 and fails:
            fails.clear()
            raise RuntimeError("out of memory")
        measured.append(genes)
        return original(self, genes, **more)

    monkeypatch.setattr(run_module.PerturbationMeasure, "__call__", fail_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(trained, ["GENE40", "GENE60"], output=tmp_path / "broken", **options)
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == [
        "genes.partial", "names.partial", "null.partial"
    ]  # fmt: skip
    run(trained, ["GENE40", "GENE60"], output=tmp_path / "broken", **options)
    assert (
        len(measured)
        == len(set(measured))
        == 2 + len({name for one in whole.record["results"] for name in one["null"]["genes"]})
    )
    for folder in ("whole", "broken"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == FILES
    for name in FILES[1:]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    records = [json.loads((tmp_path / folder / FILES[0]).read_text()) for folder in ("whole", "broken")]
    assert records[0].pop("date") <= records[1].pop("date")
    assert records[0] == records[1]


@pytest.mark.parametrize(
    ("genes", "options"),
    [
        (["GENE40", "GENE60"], {"change": "raise"}),
        (["GENE60", "GENE40"], {}),
        (["GENE40", "GENE60"], {"max_cells": 30}),
    ],
)
def test_what_is_of_other_settings_is_not_taken(trained, tmp_path, monkeypatch, genes, options):
    original, measured = run_module.PerturbationMeasure.__call__, []

    def fail_at_third(self, genes, **more):
        measured.append(genes)
        if len(measured) == 3:
            raise RuntimeError("out of memory")
        return original(self, genes, **more)

    monkeypatch.setattr(run_module.PerturbationMeasure, "__call__", fail_at_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(trained, ["GENE40", "GENE60"], output=tmp_path / "out", num_null=1)
    result = run(trained, genes, output=tmp_path / "out", num_null=1, **options)
    assert sorted(measured[3:5]) == [(40,), (60,)]
    expected = run(trained, genes, num_null=1, **options)
    pd.testing.assert_frame_equal(result.table, expected.table)


def test_the_folder_holds_record_table_page_and_figure(trained, tmp_path):
    result = run(trained, ["OLD40", "GENE398", IDS[60]], output=tmp_path / "out", num_null=5)
    assert result.output == tmp_path / "out"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    record = json.loads((tmp_path / "out" / "perturbation.json").read_text())
    assert record == result.record
    assert record["model"]["name"] == "planted"
    assert record["settings"]["num_null"] == 5
    assert [one["gene"] for one in record["results"]] == ["GENE40", "GENE398", "GENE60"]
    assert {"date", "versions", "input", "gene_space"} <= set(record)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "perturbation.parquet"), result.table)
    page = (tmp_path / "out" / "perturbation.md").read_text()
    assert "| GENE40 | " in page
    assert "GENE398: the change changes no cell" in page
    assert "GENE40: alpha to beta, " in page
    with Image.open(tmp_path / "out" / "perturbation.png") as image:
        assert min(image.size) > 300
        assert len(image.convert("L").getcolors()) > 20
    with pytest.raises(FileExistsError, match=r"has a perturbation.json; .*--overwrite"):
        run(trained, ["GENE40"], output=tmp_path / "out")
    run(trained, ["GENE40"], output=tmp_path / "out", overwrite=True)
    assert len(json.loads((tmp_path / "out" / "perturbation.json").read_text())["results"]) == 1


def test_genes_are_found_by_any_name_once():
    vocabulary = make_tokenizer().gene_vocabulary
    assert find_genes(vocabulary, ["GENE7", IDS[3], "OLD9", IDS[7]]) == [7, 3, 9]
    message = r"'GENE4O' is unknown \(near: GENE4.*'gene' is unknown \(near: GENE0, GENE1, GENE2\); 'xyz' is unknown$"
    with pytest.raises(ValueError, match=message):
        find_genes(vocabulary, ["GENE4O", "GENE1", "gene", "xyz"])
    with pytest.raises(ValueError, match="'TWICE' may mean several genes: give its Ensembl id"):
        find_genes(vocabulary, ["TWICE"])
    with pytest.raises(ValueError, match="genes: at least one is needed"):
        find_genes(vocabulary, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": "half"}, "change must be 'zero' or 'raise', got 'half'"),
        ({"change": "raise", "bins": 0}, "bins must be at least 1, got 0"),
        ({"change": "raise", "bins": 6}, "bins: the model's highest bin is 5, got 6"),
        ({"num_null": -1}, "num_null must be at least 0, got -1"),
        ({"max_cells": 0}, "max_cells must be at least 1, got 0"),
        ({"label_column": "kind"}, r"label_column='kind' says where the types are.*--cells-of"),
        ({"cells_of": "delta"}, r"cells_of='delta' is no label of planted, which has alpha, beta, gamma.*--label"),
        ({"cells_of": "gamma"}, r"cells_of='gamma': no cell is so by the model planted; there are alpha, beta$"),
        ({"cells_of": "x", "label_column": "kind"}, r"cells_of='x': no cell is so by .*'kind'; there are flat, round$"),
        ({"cells_of": "x", "label_column": "no"}, r"obs column 'no' is not in"),
        ({"genes": ["nothing"]}, "'nothing' is unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_and_leaves_nothing(trained, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(trained, options.pop("genes", ["GENE40"]), output=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_cells_without_known_counts_and_a_file_as_folder_are_refused(trained, tmp_path):
    cells = make_cells(4)
    cells.X = sparse.csr_matrix(cells.X.shape, dtype=np.int32)
    with pytest.raises(ValueError, match="counts"):
        run(trained, ["GENE40"], cells=cells)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"the name of a folder is needed, .*file is a file"):
        run(trained, ["GENE40"], output=tmp_path / "file")


def test_a_gene_that_the_file_lacks_says_so(trained):
    cells = make_cells()
    (found,) = run(trained, ["GENE40"], cells=cells[:, cells.var_names != IDS[40]].copy()).record["results"]
    assert found["notes"] == ["not all of it is among the file's genes", "the change changes no cell"]


def test_the_command_line_writes_what_it_says(checkpoint, tmp_path):
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["perturb", tmp_path / "cells.h5ad", "--model", checkpoint, "--gene", "GENE40", "--gene", "GENE41"]
    more = ["--null", "19", "--max-cells", "30", "-o", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *more)])
    assert result.exit_code == 0, result.output
    assert "30 cells; changes of the probability of the cells' own labels:" in result.output
    assert f"{tmp_path / 'out'}: perturbation.json" in result.output.replace("\n", "")
    record = json.loads((tmp_path / "out" / "perturbation.json").read_text())
    assert [one["gene"] for one in record["results"]] == ["GENE40", "GENE41"]
    assert len(record["model"]["weights_sha256"]) == 64
    refused = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *more)])
    assert refused.exit_code == 1
    assert refused.output.startswith("error: output: ")


def test_perturb_is_a_function_and_a_module_of_the_same_name():
    from screformer.annotation import perturb as again

    assert again is screformer.annotation.perturb
    with pytest.raises(ValueError, match="change must be"):
        screformer.annotation.perturb(None, "nowhere", genes=["GENE1"], change="half")
