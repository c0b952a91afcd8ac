import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import save_file
from scipy.stats import binomtest

from screformer.model_cards.card_inputs import CardInputs, DataSource
from screformer.model_cards.checkpoint_records import Checkpoint, read_checkpoint
from screformer.model_cards.comparison import compare, points
from screformer.model_cards.cost_section import emissions_metadata, estimate_emissions
from screformer.model_cards.markdown import flat_rows, format_value, plain, table
from screformer.model_cards.model_card import write_card_of, write_model_card
from screformer.model_cards.publish import card_holes

EXPECTED_CARD = Path(__file__).with_name("expected_model_card.md")
CARDS = Path(__file__).parents[1] / "model_cards"
SOURCES = [
    DataSource(
        "Two donors' pancreas",
        "Doe et al. 2020",
        "https://example.org/cells_2020?a=1&b=2",
        "CC BY 4.0",
    )
]


PASSPORT = {
    "name": "/home/somebody/cells.h5ad",
    "sha256": "ab12",
    "num_cells": 260,
    "num_kept": 250,
    "num_genes": 20_125,
    "format": "h5ad",
    "count_source": "layers['counts']",
    "gene_source": "var_names",
    "gene_coverage": 0.98765,
    "dropped": {"few_genes": 8, "duplicate": 2},
    "allowed": ["fractions"],
    "organism": "human",
    "gene_ids": "symbol",
    "median_genes_per_cell": 1795.0,
    "median_counts_per_cell": 5520.5,
}


def other_split(group: str | None, gap: float, *, seen: int = 0) -> dict[str, Any]:
    """Return a run on another split, whose model is `gap` better than its logistic regression."""
    rows = {
        name: {"accuracy": value, "macro_f1": value, "balanced_accuracy": value, "num_cells": 1200}
        for name, value in (("model", 0.9 + gap), ("logistic_regression", 0.9))
    }
    rows["model"]["seen_cells"] = {"num_seen": seen, "num_cells": 1200, "is_complete": True}
    groups = (
        {"group_column": None, "test_groups": []}
        if group is None
        else {"group_column": "donor", "test_groups": [group]}
    )
    return {
        "split": {**groups, "num_cells": {"train": 150, "validation": 40, "test": 60}},
        "seed": 2022,
        "results": rows,
    }


def scores(accuracy: float, macro_f1: float, f1: dict[str, float]) -> dict[str, Any]:
    supports = {"alpha|cell": 30, "beta_cell": 16, "t<cell": 4, "schwann": 0}
    return {
        "accuracy": accuracy,
        "macro_f1": macro_f1,
        "balanced_accuracy": macro_f1 - 0.01,
        "num_cells": 50,
        "per_class": {
            name: {
                "precision": f1[name] + 0.01,
                "recall": f1[name] - 0.01,
                "f1": f1[name],
                "support": support,
                "auc": 0.9,
            }
            for name, support in supports.items()
        },
    }


@pytest.fixture
def results() -> dict[str, dict[str, Any]]:
    return {
        "majority_class": scores(0.6, 0.25, {"alpha|cell": 0.75, "beta_cell": 0, "t<cell": 0, "schwann": 0}),
        "model": scores(0.88, 0.81, {"alpha|cell": 0.95, "beta_cell": 0.9, "t<cell": 0.58, "schwann": 0})
        | {
            "part": "test",
            "macro_auc": 0.97,
            "expected_calibration_error": 0.041,
            "unknown_labels": ["mast"],
            "roc_curves": "a long curve",
            "seen_cells": {"num_seen": 0, "num_cells": 50, "is_complete": True},
        },
        "logistic_regression": scores(0.94, 0.87, {"alpha|cell": 0.97, "beta_cell": 0.94, "t<cell": 0.7, "schwann": 0})
        | {"seconds": 6.26, "inverse_strength": 0.1},
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The records of a fine-tuned classifier, with weights of 14 numbers."""
    folder = tmp_path / "finetuned"
    folder.mkdir()
    write_json(
        folder / "config.json",
        {
            "architectures": ["ScReformerForCellClassification"],
            "num_genes": 17_927,
            "num_bins": 6,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "attention": "lsh",
            "bucket_size": 64,
            "num_hashes": 2,
            "gene_space": "expressed",
            "id2label": {"0": "alpha|cell", "1": "beta_cell", "2": "t<cell", "3": "schwann"},
        },
    )
    write_json(folder / "tokenizer_config.json", {"binning": "log2", "target_sum": 10_000, "num_bins": 6})
    write_json(
        folder / "training.json",
        {
            "task": "fine-tuning",
            "state": "finished",
            "corpus": {
                "num_cells": 250,
                "sources": [PASSPORT],
                "missing": None,
            },
            "model": {"checkpoint": "runs/pretrained", "preset": None, "config_overrides": []},
            "cells": {"label_column": "cell_type", "group_column": "donor", "test_groups": ["d2"], "gene_dropout": 0.0},
            "training": {"num_train_epochs": 3.0, "max_steps": -1, "learning_rate": 1e-4, "bf16": False, "seed": 2022},
            "versions": {"python": "3.11.9", "torch": "2.13.0"},
        },
    )
    write_json(folder / "metrics.json", {"validation_accuracy": 0.91, "best_step": 12, "training_seconds": 61.53})
    write_json(
        folder / "splits.json",
        {
            "group_column": "donor",
            "test_groups": ["d2"],
            "num_cells": {"train": 160, "validation": 40, "test": 50},
            "train": ["c1"],
        },
    )
    write_json(
        folder / "resources.json",
        {
            "task": "fine-tuning",
            "device": {"type": "cpu", "name": "A processor", "threads": 2, "number": 1},
            "precision": "float32",
            "parameters": 14,
            "peak_memory_gb": {"process": 1.25, "gpu": None},
            "hours": 0.5,
            "cells": 480,
        },
    )
    write_json(folder / "seen_cells.json", {"is_complete": True})
    weights = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(2, np.float32)}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def card_text(checkpoint: Path, results: dict[str, dict[str, Any]]) -> str:
    path = write_model_card(
        checkpoint,
        results=results,
        model_name="pancreas-tiny",
        repo_id="me/pancreas-tiny",
        data_sources=SOURCES,
        other_splits=[other_split("d1", 0.02), other_split("d3", -0.01), other_split(None, 0.05, seen=1100)],
    )
    return path.read_text(encoding="utf-8")


def edit(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def test_the_whole_card_is_as_expected(card_text: str) -> None:
    assert card_text == EXPECTED_CARD.read_text(encoding="utf-8")


def test_front_matter_loads_and_holds_the_scores_of_the_model(checkpoint: Path, card_text: str) -> None:
    data = ModelCard.load(checkpoint / "README.md").data
    assert (data.license, data.library_name, data.model_name) == ("apache-2.0", "transformers", "pancreas-tiny")
    assert "cell-type-annotation" in data.tags
    own = [result for result in data.eval_results if result.dataset_config == "held-out donor: d2"]
    found = {(result.metric_type, result.metric_name): result.metric_value for result in own}
    assert found == {
        ("accuracy", "Accuracy"): 0.88,
        ("f1", "Macro-F1"): 0.81,
        ("balanced_accuracy", "Balanced accuracy"): 0.8,
    }
    anew = "(the same settings, trained anew, seed 2022)"
    others = {result.dataset_config: result.metric_value for result in data.eval_results if result not in own}
    assert others == {
        f"held-out donor: d1 {anew}": 0.92,
        f"held-out donor: d3 {anew}": 0.89,
        f"random split {anew}": 0.95,
    }
    assert {result.dataset_type for result in data.eval_results} == {"two-donors-pancreas"}


def test_writing_a_card_opens_no_connection(
    checkpoint: Path, results: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", refuse)
    write_model_card(checkpoint, results=results)
    ModelCard.load(checkpoint / "README.md")


def test_every_number_of_the_template_is_part_of_a_name_or_the_citation() -> None:
    import screformer.model_cards.model_card as module

    template = Path(module.__file__).with_name("template.md").read_text(encoding="utf-8")
    prose = template.split("## Citation")[0]
    assert re.findall(r"(?<![\w$])\d+\b", prose) == [
        "2025",
        "0",
        "16",
        "16",
    ]  # the paper, "from 0", cells of the examples


def test_a_win_a_draw_and_a_mixed_result_are_called_so(results: dict[str, dict[str, Any]]) -> None:
    regression = results["logistic_regression"]

    def verdict(accuracy_gap: float, macro_f1_gap: float) -> str:
        changed = {
            "accuracy": regression["accuracy"] + accuracy_gap,
            "macro_f1": regression["macro_f1"] + macro_f1_gap,
        }
        comparison = compare(results | {"model": results["model"] | changed})
        assert comparison is not None
        return f"{comparison.verdict}: {comparison.headline}"

    assert verdict(0.02, 0.01) == (
        "wins: The model beats logistic regression: +2.0 points of accuracy, +1.0 points of macro-F1"
    )
    assert verdict(0.02, 0.0004).startswith("wins: The model beats")
    assert verdict(0.0004, -0.0004) == (
        "draws: The model is level with logistic regression: ±0.0 points of accuracy, ±0.0 points of macro-F1"
    )
    assert verdict(0.02, -0.03) == (
        "is mixed: The model and logistic regression each win once: +2.0 points of accuracy, -3.0 points of macro-F1"
    )
    assert verdict(0, -0.03).startswith("loses: The model loses to")


def test_chance_is_no_win_and_cells_of_one_alone_are_counted(results: dict[str, dict[str, Any]]) -> None:
    def compared(only_model: int, only_baseline: int) -> Any:
        paired = {
            "only_model_right": only_model,
            "only_baseline_right": only_baseline,
            "p_value": binomtest(only_model, only_model + only_baseline).pvalue,
        }
        better = {"accuracy": 0.96, "macro_f1": 0.99}
        regression = results["logistic_regression"] | {"paired": paired}
        return compare(results | {"model": results["model"] | better, "logistic_regression": regression})

    few, many = compared(8, 4), compared(12, 1)
    assert (few.verdict, many.verdict) == ("draws", "wins")
    assert few.headline == (
        "The model is level with logistic regression: +2.0 points of accuracy (8 cells that only it names right, 4 "
        "that only the regression does, p = 0.39), +12.0 points of macro-F1"
    )


def test_a_classifier_that_began_as_a_regression_says_so(checkpoint: Path, results: dict[str, dict[str, Any]]) -> None:
    assert "began as a" not in write_model_card(checkpoint, results=results).read_text(encoding="utf-8")
    edit(
        checkpoint / "training.json",
        classifier={"classifier_paths": ["convolution", "linear"], "linear_start": "principal_components"},
        linear_start={"chosen": "64 components, C=1"},
    )
    text = write_model_card(checkpoint, results=results).read_text(encoding="utf-8")
    assert "| classifier_paths | convolution, linear |" in text
    assert (
        "began as a logistic regression on the principal components (64 components, C=1) of the training cells" in text
    )
    assert "- Its classifier began as a regression on the training cells: how much" in text


def test_seen_cells_of_an_incomplete_record_are_called_so(checkpoint: Path, results: dict[str, dict[str, Any]]) -> None:
    seen = {"num_seen": 3, "num_cells": 50, "is_complete": False}
    write_json(checkpoint / "seen_cells.json", {"is_complete": False})
    changed = results | {"model": results["model"] | {"seen_cells": seen}}
    text = write_model_card(checkpoint, results=changed).read_text(encoding="utf-8")
    assert "3 test cells were read while the model was trained, its pretraining included, as far as that is" in text
    assert "Hashes of the counts of the cells that its last training has read" in text


def test_other_files_of_pretraining_have_their_passports_too(
    checkpoint: Path, tmp_path: Path, results: dict[str, dict[str, Any]]
) -> None:
    folder = tmp_path / "pretrained"
    folder.mkdir()
    write_json(folder / "config.json", {"architectures": ["ScReformerForMaskedLM"]})
    for checksum, is_told in (("ab12", False), ("cd34", True)):
        sources = [PASSPORT | {"sha256": checksum, "name": "atlas.h5ad"}]
        write_json(folder / "training.json", {"task": "pretraining", "corpus": {"sources": sources}})
        text = write_model_card(checkpoint, results=results, pretraining=folder).read_text(encoding="utf-8")
        assert ("Pretraining read other files:" in text) == ("| atlas.h5ad |" in text) == is_told


def test_points_round_to_a_tenth_with_a_sign() -> None:
    assert [points(gap) for gap in (0.0314, -0.0314, 0.0004, -0.0004)] == [
        "+3.1 points",
        "-3.1 points",
        "±0.0 points",
        "±0.0 points",
    ]


def test_a_card_without_baselines_or_results_says_so(checkpoint: Path, results: dict[str, dict[str, Any]]) -> None:
    text = write_model_card(checkpoint, results={"model": results["model"]}).read_text(encoding="utf-8")
    assert "claims no advantage over it" in text
    assert "Logistic regression was not measured" in text
    assert "Always naming" not in text
    text = write_model_card(checkpoint).read_text(encoding="utf-8")
    assert "No evaluation on test cells is recorded" in text
    assert ModelCard.load(checkpoint / "README.md").data.eval_results is None


def test_the_evaluation_file_of_the_folder_is_the_default_result(
    checkpoint: Path, results: dict[str, dict[str, Any]]
) -> None:
    write_json(checkpoint / "evaluation.json", results["model"])
    assert "| scReformer-BERT | 0.880 |" in write_model_card(checkpoint).read_text(encoding="utf-8")


def test_an_unknown_rival_gets_a_row_of_its_own(checkpoint: Path, results: dict[str, dict[str, Any]]) -> None:
    text = write_model_card(checkpoint, results={"k|NN": results["model"]} | results).read_text(encoding="utf-8")
    assert text.index("| scReformer-BERT |") < text.index("| Majority class |") < text.index("| k\\|NN |")


PRETRAINING = {
    "held_out_loss": 0.9,
    "held_out_masked_accuracy": 0.51234,
    "held_out_masked_loss": 1.0214,
    "held_out_majority_bin_accuracy": 0.5,
    "held_out_gene_majority_accuracy": 0.5301,
    "held_out_gene_mean_accuracy": 0.4,
    "held_out_cell_majority_accuracy": 0.51234,
    "held_out_gene_frequency_loss": 1.1002,
    "held_out_by_bin": [
        {"bin": 1, "num_masked_genes": 27874, "accuracy": 0.98, "gene_majority_accuracy": 0.94, "loss": 0.35,
         "gene_frequency_loss": 0.44, "gene_mean_accuracy": 0.8, "cell_majority_accuracy": 0.9},
        {"bin": 2, "num_masked_genes": 0, "accuracy": None, "gene_majority_accuracy": None, "loss": None,
         "gene_frequency_loss": None, "gene_mean_accuracy": None, "cell_majority_accuracy": None},
    ],
    "training_seconds": 12.5,
}  # fmt: skip
MASKED_GENES = """\
Of the masked genes of held-out cells the model gets 0.512 right: -1.8 points against each gene's commonest bin in the \
training cells (0.530), +11.2 points against its mean bin (0.400), ±0.0 points against the cell's commonest visible \
bin (0.512), +1.2 points against the commonest bin of all (0.500). Its loss is 1.021; each gene's frequencies alone \
have 1.100. Only expressed genes are masked: zeros never count.

| Answer to a masked gene of a held-out cell | Accuracy | Loss |
| --- | ---: | ---: |
| scReformer-BERT | 0.512 | 1.021 |
| Each gene's frequencies in the training cells, or its commonest bin | 0.530 | 1.100 |
| Each gene's mean bin in the training cells | 0.400 | - |
| The cell's commonest visible bin | 0.512 | - |
| The commonest bin of all | 0.500 | - |

| True bin | Masked genes | Accuracy | Accuracy, gene's commonest bin | Loss | Loss, gene's frequencies |
| --- | ---: | ---: | ---: | ---: | ---: |
| 1 | 27,874 | 0.980 | 0.940 | 0.350 | 0.440 |
| 2 | 0 | - | - | - | - |
"""


def test_pretraining_joins_the_card(checkpoint: Path, tmp_path: Path, results: dict[str, dict[str, Any]]) -> None:
    folder = tmp_path / "pretrained"
    folder.mkdir()
    write_json(folder / "config.json", {"architectures": ["ScReformerForMaskedLM"]})
    write_json(folder / "training.json", {"task": "pretraining", "training": {"seed": 7, "max_steps": 300}})
    write_json(folder / "metrics.json", PRETRAINING)
    text = write_model_card(checkpoint, results=results, pretraining=folder).read_text(encoding="utf-8")
    assert "| max_steps | 300 |" in text
    assert MASKED_GENES in text
    assert "| training_seconds | 12.5 |" in text
    assert text.count("held_out_") == text.count("held_out_loss") == 1  # the others not a second time
    assert "how that was pretrained" not in text


def test_masked_genes_of_an_older_run_are_shown_as_far_as_they_were_measured(checkpoint: Path) -> None:
    metrics = {"held_out_masked_accuracy": 0.51234, "held_out_majority_bin_accuracy": 0.5}
    write_json(checkpoint / "metrics.json", metrics)
    text = write_model_card(checkpoint).read_text(encoding="utf-8")
    assert "| scReformer-BERT | 0.512 | - |\n| The commonest bin of all | 0.500 | - |" in text
    assert "gets 0.512 right: +1.2 points against the commonest bin of all (0.500). Only expressed" in text
    write_json(checkpoint / "metrics.json", {"held_out_masked_accuracy": 0.51234})
    assert "masked genes" not in write_model_card(checkpoint).read_text(encoding="utf-8")


def test_a_classifier_that_began_at_random_says_so(checkpoint: Path) -> None:
    edit(checkpoint / "training.json", model={"checkpoint": None, "preset": "tiny"})
    assert "There was no pretraining" in write_model_card(checkpoint).read_text(encoding="utf-8")


def test_a_random_split_is_called_easier(checkpoint: Path) -> None:
    edit(checkpoint / "splits.json", group_column=None, test_groups=[])
    text = write_model_card(checkpoint).read_text(encoding="utf-8")
    assert "On a new donor expect lower scores" in text
    assert "Split at random" in text


def test_a_card_can_be_written_again_from_what_is_kept_beside_it(checkpoint, results, card_text):
    assert "a long curve" not in (checkpoint / "card.json").read_text(encoding="utf-8")
    inputs = CardInputs.read(checkpoint)
    assert inputs is not None
    assert card_text == write_card_of(checkpoint, inputs).read_text(encoding="utf-8")
    other = write_card_of(checkpoint, replace(inputs, repo_id="you/other")).read_text(encoding="utf-8")
    assert 'source = "you/other"' in other
    assert "me/pancreas-tiny" not in other
    assert CardInputs.read(checkpoint / "nowhere") is None


@pytest.mark.parametrize(
    ("device", "grams", "watts"),
    [
        ({"type": "cpu", "threads": 2, "name": "any"}, 4.8, 20),
        ({"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "number": 4}, 672.0, 2800),
        ({"type": "cuda", "name": "NVIDIA RTX A1000"}, None, None),  # no A100
    ],
)
def test_emissions_are_power_times_time(device, grams, watts):
    found = estimate_emissions({"device": device, "hours": 0.5})
    assert found is None if grams is None else found == pytest.approx((grams, watts))
    assert estimate_emissions({"device": device}) is None
    assert emissions_metadata(Checkpoint.of_records(training={}, metrics={})) is None


@pytest.mark.parametrize(
    ("architecture", "auto_class"),
    [("ScReformerForMaskedLM", "AutoModelForMaskedLM"), ("ScReformerModel", "AutoModel")],
)
def test_a_folder_with_only_a_config_gets_a_card(tmp_path: Path, architecture: str, auto_class: str) -> None:
    write_json(tmp_path / "config.json", {"architectures": [architecture]})
    text = write_model_card(tmp_path).read_text(encoding="utf-8")
    assert f"model = {auto_class}.from_pretrained(source, trust_remote_code=True)" in text
    assert "screformer annotate" not in text
    assert text.count("not recorded") >= 4


def test_a_card_replaces_the_old_one_and_leaves_nothing_else(checkpoint: Path) -> None:
    before = {path.name for path in checkpoint.iterdir()}
    for _ in range(2):
        write_model_card(checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == before | {"README.md", "card.json"}


def test_text_cannot_break_out_of_a_table() -> None:
    assert plain("a|b\n<script> `x` *y* [z] snake_case _edge_ & ~") == (
        "a\\|b &lt;script> \\`x\\` \\*y\\* \\[z\\] snake_case \\_edge\\_ &amp; \\~"
    )
    assert table(("Name", "N"), [("x", "1"), ("y", "-")]) == "| Name | N |\n| --- | ---: |\n| x | 1 |\n| y | - |"


def test_recorded_values_are_readable_and_hide_the_machine() -> None:
    values = [True, 2022, 15_000, 0.123456, [1, "two"], "/home/somebody/cells.h5ad", "runs/pretrained"]
    assert [format_value(value) for value in values] == [
        "yes",
        "2022",
        "15,000",
        "0.1235",
        "1, two",
        "cells.h5ad",
        "runs/pretrained",
    ]
    assert list(flat_rows({"a": {"b": 1}, "c": [{"d": 2}, {"d": 3}], "e": None, "f": []})) == [
        ("a.b", "1"),
        ("c.1.d", "2"),
        ("c.2.d", "3"),
    ]


def test_the_example_of_the_card_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, dict[str, Any]]
) -> None:
    import anndata
    import torch

    from screformer import GeneVocabulary, ScReformerConfig, ScReformerForCellClassification, ScReformerTokenizer

    tokenizer = ScReformerTokenizer()
    labels = dict(enumerate(results["model"]["per_class"]))
    config = ScReformerConfig.preset(
        "tiny",
        num_genes=tokenizer.num_genes,
        hidden_size=8,
        num_hidden_layers=1,
        intermediate_size=8,
        classifier_hidden_sizes=[4, 4],
        id2label=labels,
        gene_space="expressed",
    )
    folder = tmp_path / "saved"
    with torch.random.fork_rng():
        ScReformerForCellClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = write_model_card(folder, results=results).read_text(encoding="utf-8")
    assert "| Cell types | 4 |" in card
    counts = np.random.default_rng(0).integers(0, 3, (20, 30)).astype(np.float32)
    cells = anndata.AnnData(counts)
    cells.var_names = GeneVocabulary.human_v1().ensembl_ids[:30]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    example, remote = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert len(names["labels"]) == 16
    assert set(names["labels"]) <= set(labels.values())
    assert remote == example.replace("\nimport screformer  # tells the Auto classes about this model\n", "").replace(
        "(source)", "(source, trust_remote_code=True)"
    )


def without(row: dict[str, Any], metric: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != metric}


def test_results_that_lack_something_or_do_not_fit_are_refused(
    checkpoint: Path, results: dict[str, dict[str, Any]]
) -> None:
    model = results["model"]
    wrong = [
        ({"logistic_regression": model}, "must have a row 'model'"),
        ({"model": without(model, "macro_f1")}, "must be a number from 0 to 1, got None"),
        ({"model": model | {"accuracy": 88}}, "must be a number from 0 to 1, got 88"),
        (results | {"model": model | {"num_cells": 51}}, "must all be of the same test cells"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            write_model_card(checkpoint, results=given)
    assert not (checkpoint / "README.md").exists()


def test_a_folder_that_is_no_checkpoint_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        write_model_card(tmp_path)
    write_json(tmp_path / "config.json", {"architectures": ["BertModel"]})
    with pytest.raises(ValueError, match="architecture 'BertModel'"):
        write_model_card(tmp_path)


@pytest.mark.parametrize("name", ["config", "training", "splits"])
def test_a_record_that_is_no_object_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / f"{name}.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=rf"{name}\.json holds list, not an object: it was changed; write or download"):
        read_checkpoint(checkpoint)


def test_a_calibrated_model_says_what_its_error_rates_are_worth(checkpoint: Path, results) -> None:
    answers = [
        {"asked": 0.01, "threshold": None, "answered": None, "answered_in_full": None, "error": None},
        {"asked": 0.05, "threshold": 0.8, "answered": 0.9, "answered_in_full": 0.8, "error": 0.0444},
    ]
    levels = [{"level": 1, "expected_calibration_error": 0.025, "before": 0.034}]
    results["model"] |= {"answers": answers, "calibration": {"levels": levels, "temperatures": [0.8]}}
    card = write_model_card(checkpoint, results=results).read_text(encoding="utf-8")
    assert "| 1% | cannot be vouched for |  |" in card
    assert "| 5% | 4.4% | 90.0% |" in card
    assert "expected calibration error is 0.025 (without calibration 0.034)" in card
    assert "not calibrated" not in card


@pytest.mark.parametrize("path", sorted(CARDS.glob("screformer-*.md")), ids=lambda path: path.stem)
def test_released_cards_know_everything_and_have_a_baseline_beside(path):
    text = path.read_text(encoding="utf-8")
    assert card_holes(text) == []
    assert "| logistic regression" in text.lower()
    assert ModelCard(text).data.model_name == path.stem
