"""The README's examples run as they are written, in order, in a folder that holds what the README says it holds."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from documented_examples import code_blocks, lay_out, run_line, run_python

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return [block.text for block in code_blocks(README) if block.language == language]


@pytest.fixture
def folder(small_quickstart, tmp_path, monkeypatch):
    monkeypatch.chdir(lay_out(small_quickstart, tmp_path))
    return tmp_path


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # without a GPU, by default
def test_the_three_doors_run(folder):
    doors = blocks("python")
    assert len(doors) == 4
    for code in doors:
        run_python(code, "README.md", {"__name__": "__main__"})
    assert (folder / "my_model" / "model.safetensors").exists()
    assert (folder / "shared" / "README.md").exists()


def test_the_command_lines_run(folder):
    for line in "".join(blocks("bash")).strip().splitlines():
        run_line(line)
    for name in ("annotated.h5ad", "embedded.h5ad", "evaluation/evaluation.json"):
        assert (folder / name).exists()


def test_every_named_file_exists():
    for name in re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r"`(tests/[\w./]+)`", README):
        assert (ROOT / name).exists(), name


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)[`\n ]", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert "make quickstart" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_tree_names_every_source_folder():
    tree = README.split("## Where things are")[1]
    for folder in ("tokenization", "modeling_screformer", "train", "annotation", "benchmarks", "model_cards", "tests"):
        assert f"    {folder}/" in tree


def test_the_figures_of_few_cells_are_those_of_the_result_files():
    results = json.loads((ROOT / "benchmarks" / "results" / "fine_tuning.json").read_text())["tasks"]
    text = " ".join(README.split())
    pancreas, blood = results["pancreas"], results["pbmc3k_10x"]
    ours, theirs = "small", "logistic_regression"

    def shown(task, system, score="macro_f1"):
        return f"{task[system][score]:.3f}"

    assert f"macro-F1 {shown(pancreas, ours)} and logistic regression {shown(pancreas, theirs)};" in text
    assert f"{shown(blood, ours)} and {shown(blood, theirs)}, where logistic regression is ahead in accuracy, " in text
    assert f"{shown(blood, theirs, 'accuracy')} to {shown(blood, ours, 'accuracy')}." in text

    answers = json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text())["tasks"]["pancreas"]
    rows = {row["asked"]: row for row in answers["held_out_groups"]["answers"]}
    for name, form in (("error", ".1%"), ("worst_error", ".1%"), ("answered", ".0%")):
        first, second, third = (f"{rows[asked][name]:{form}}" for asked in (0.01, 0.02, 0.05))
        assert f"{first}, {second} and {third} of the " in text or f"{first}, {second} and {third} on the worst" in text
    regression = {row["asked"]: f"{row['answered']:.0%}" for row in answers["logistic_regression"]["answers"]}
    told = f"by its own probability answers {regression[0.01]}, {regression[0.02]} and {regression[0.05]}"
    assert told in text
    annotating = json.loads((ROOT / "benchmarks" / "results" / "annotating.json").read_text())
    assert f"take {annotating['beside_model_gigabytes']:.2f} GB beside the model" in text
    spaces = json.loads((ROOT / "benchmarks" / "results" / "gene_spaces.json").read_text())
    assert f"alone give {spaces['ratio']:.1f} times the cells a second of every gene" in text
    assert f"{spaces['label_agreement']:.0%} of {spaces['num_cells']} cells get the same label, " in text
    assert f"drift by {spaces['embedding_drift']:.0%} (cosine {spaces['embedding_cosine']:.2f})" in text

    unknown = json.loads((ROOT / "benchmarks" / "results" / "unknown_types.json").read_text())
    found, softmax = (unknown["systems"][name]["confirmed_by"]["auroc"] for name in ("detector", "classifier: softmax"))
    gain = unknown["differences"]["detector - classifier: softmax"]["confirmed_by"]
    low, high = gain["interval_95"]
    assert f"its AUROC is {found:.3f}, the classifier's softmax's {softmax:.3f} " in text
    assert f"(difference {gain['mean']:+.3f}, 95% interval {low:+.3f} to {high:+.3f})" in text

    results = json.loads((ROOT / "benchmarks" / "results" / "pretraining.json").read_text())
    few = {
        (cells, name): f"{facts['macro_f1']['mean']:.3f}"
        for cells, of in results["scores"].items()
        for name, facts in of.items()
    }
    lost = {name: f"{np.mean([scores['loss'] for scores in of]):.3f}" for name, of in results["held_out"].items()}
    gain = next(
        row
        for row in results["differences"]
        if (row["cells"], row["system"], row["less"], row["score"]) == ("5", "small_both", "small", "macro_f1")
    )
    low, high = gain["interval_95"]
    for told in (
        f"a held-out loss of {lost['both']} instead of {lost['masked']}.",
        f"its macro-F1 on unseen donors is {few['5', 'small_both']}, without pretraining {few['5', 'small']} "
        f"(difference {gain['mean']:+.3f}, 95% interval {low:+.3f} to {high:+.3f}: four donors are too few",
        f"with ten {few['10', 'small_both']} and {few['10', 'small']}, with fifty {few['50', 'small_both']} and "
        f"{few['50', 'small']}.",
        f"Logistic regression reaches {few['5', theirs]}, {few['10', theirs]} and {few['50', theirs]}, and is ahead",
        f"(with five {few['5', 'paper_both']} instead of {few['5', 'paper']})",
    ):
        assert told in text, told


def test_the_figures_of_explanations_are_those_of_the_result_files():
    text = " ".join(README.split())
    results = ROOT / "benchmarks" / "results"
    held_out, full = (
        json.loads((results / f"explanations-{name}.json").read_text()) for name in ("pbmc3k_10x", "pbmc3k_10x-full")
    )
    (t_cells,) = (one for one in held_out["classes"] if one["class"] == "T cells")
    by_shap = next(row for row in held_out["methods"] if row["method"] == "shap")
    assert t_cells["completeness"]["median_gap"] < 1e-3
    assert f"by less than 0.1% (median; shap's by {by_shap['median_gap']:.0%} with as many points)" in text
    assert f"rank the first hundred genes alike ({t_cells['stability']['rank_correlation']:.2f})" in text
    less = t_cells["curves"]["deletion_probability"]["less"]
    random, regression = less["random genes"]["mean"], less["logistic regression"]["mean"]
    assert f"falls by {-random:.3f} more than by random genes, by {regression:.3f} less than by the" in text
    places = {row["gene"]: row["place"] for row in t_cells["genes_asked"]}
    assert {gene for gene, place in places.items() if place <= 20} == {"CD3D", "IL7R", "CD3E"}
    assert f"CD2 is {places['CD2']}th, and PTPRC," in text
    assert f"as often as T cells do, {places['PTPRC']}nd (" in text
    took, estimated = (f"{seconds / 60:.0f} minutes" for seconds in (full["seconds"], full["price"]["seconds"]))
    memory, memory_before = (f"{size / 1e9:.1f} GB" for size in (full["peak_bytes"], full["price"]["peak_bytes"]))
    assert f"background of {full['num_background']} take {took} and {memory} on two cores" in text
    assert f"with {full['sampling']['num_points']} points a cell; {estimated} and {memory_before} were" in text
    assert full["classes"][0]["num_cells"] == 1000
    for before, after in (
        (full["price"]["seconds"], full["seconds"]),
        (full["price"]["peak_bytes"], full["peak_bytes"]),
    ):
        assert abs(before / after - 1) < 0.3
    for one in (*held_out["classes"], *full["classes"]):
        assert one["completeness"]["median_gap"] < 0.02
        assert one["stability"]["rank_correlation"] >= 0.9
        assert one["curves"]["deletion_probability"]["less"]["random genes"]["interval"][1] < 0

    paper = json.loads((results / "explanations-pbmc3k_10x-paper.json").read_text())
    gap = paper["classes"][0]["completeness"]["median_gap"]
    methods = {row["method"]: row for row in paper["methods"]}
    ours, as_drawn = methods["expected_gradients"], methods["expected gradients, sums as drawn"]
    points, times = paper["sampling"]["num_points"], ours["seconds_a_cell"] / as_drawn["seconds_a_cell"]
    assert gap < 0.02
    assert f"{points} points a cell leave {as_drawn['median_gap']:.1%} of a sum open (median);" in text
    assert f"find the sums to {gap:.1%}, and a cell then takes {times:.0f} times as long." in text
    first = [row["gene"] for row in paper["classes"][0]["genes_asked"] if row["place"] <= 20]
    assert first == ["CD3D"]

    attention = json.loads((results / "attention_interactions.json").read_text())
    areas = {row["score"]: f"{row['area']:.3f}" for row in attention["scores"]}
    assert f"its area is {areas['attention']} in the quickstart's model, a tie with gene frequency" in text
    assert f"({areas['gene frequency']}), co-expression ({areas['co-expression']}) and an untrained" in text
    ablations = json.loads((results / "ablations-pancreas_baron2016.json").read_text())["systems"]
    gain = ablations["full"]["macro_f1"] - ablations["pooled"]["macro_f1"]
    assert f"the paper's convolution was worth {gain:.2f} of macro-F1 beside a pooled head" in text
    score = {name: row["macro_f1"] for name, row in ablations.items()}
    assert max(score, key=lambda name: score[name]) == "variable_genes"
    assert min(score["not_pretrained"], score["no_gene2vec"], score["one_round"]) > score["full"] > score["more_rounds"]
    every, expressed = ablations["other_gene_space"], ablations["full"]
    assert every["macro_f1"] < expressed["macro_f1"]
    assert every["fit_seconds"] / expressed["fit_seconds"] == pytest.approx(50, abs=2)
    assert "every gene did worse than expressed genes alone, in fifty times the time" in text
