"""Each recipe says what the paper says, and runs from its name to a checkpoint on packaged cells."""

import json

import anndata
import numpy as np
import pytest
import yaml

from screformer.tokenization import GeneVocabulary, ScReformerTokenizer, build_corpus, example_cells_path
from screformer.train import finetune as finetune_module
from screformer.train import pretrain as pretrain_module
from screformer.train.argument_parser import parse_arguments
from screformer.train.arguments import (
    FineTuningArguments,
    FineTuningDataArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
)
from screformer.train.classifier_start import ClassifierArguments
from screformer.train.recipes import FOLDER, find_recipe, list_recipes

NAMES = [*list_recipes("pretrain"), *list_recipes("finetune")]
TYPES = {
    "pretrain": (PretrainingDataArguments, ModelArguments, PretrainingArguments),
    "finetune": (FineTuningDataArguments, ModelArguments, FineTuningArguments, ClassifierArguments),
}
MAIN = {"pretrain": pretrain_module.main, "finetune": finetune_module.main}
NUM_GENES = 60
# Less of everything that costs time; the rest is the recipe's.
SMALL = ["hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=32", "bucket_size=8"]
SHORTER = [
    "--config_overrides",
    *SMALL,
    "--max_steps",
    "2",
    "--eval_steps",
    "1",
    "--save_strategy",
    "steps",
    "--save_steps",
    "1",
    "--gradient_accumulation_steps",
    "2",
    "--disable_tqdm",
    "true",
]
SELECTING = ["--eval_strategy", "steps"]  # fmt: skip


def parse(task, *argv):
    return parse_arguments(
        TYPES[task], argv, program=task, description="Train.", example=f"  {task} --corpus corpus", recipes=task
    )


def settings(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Build a corpus of 48 packaged cells of two types and four donors, with their 60 most variable genes."""
    folder = tmp_path_factory.mktemp("corpus")
    adata = anndata.read_h5ad(example_cells_path())
    groups = adata[adata.obs["cell_type"].isin(["alpha", "beta"])].obs.groupby(["donor", "cell_type"], observed=True)
    cells = adata[[name for _, group in groups for name in group.index[:6]]].copy()
    variances = cells.X.power(2).mean(0).A1 - cells.X.mean(0).A1 ** 2
    genes = cells.var["ensembl_id"].to_numpy()
    known = np.array([str(gene).startswith("ENSG") for gene in genes])
    chosen = np.sort(np.argsort(-np.where(known, variances, -1))[:NUM_GENES])
    cells.write_h5ad(folder / "cells.h5ad")
    tokenizer = ScReformerTokenizer(GeneVocabulary(genes[chosen].tolist()))
    built = build_corpus(
        folder / "cells.h5ad",
        folder / "corpus",
        tokenizer=tokenizer,
        obs_columns=["cell_type", "donor"],
        allow=["low-coverage"],
    )
    assert len(built) == 48
    return str(folder / "corpus")


def test_there_are_five_recipes_with_a_line_each():
    assert NAMES == ["pretrain-paper", "pretrain-tiny", "finetune-fast", "finetune-paper", "finetune-small"]
    for task in TYPES:
        assert all(20 < len(title) < 120 and title.endswith(".") for title in list_recipes(task).values())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_parsed_to_what_its_file_says(name):
    task = name.partition("-")[0]
    filled = parse(task, name, "--corpus", "cells")
    found = {key: value for part in filled for key, value in vars(part).items()}
    for key, value in settings(name).items():
        assert found[key] == value, key
    assert found["corpus"] == "cells"


def test_pretraining_is_the_papers():
    data, model, training = parse("pretrain", "pretrain-paper", "--corpus", "cells")
    assert (data.masked_fraction, data.replace_probability, data.held_out_fraction) == (0.15, 0.9, 0.1)
    assert data.gene_dropout == 0
    assert (model.preset or "base", model.gene_space) == ("base", "full")
    assert (training.num_train_epochs, training.early_stopping_patience) == (50, 5)
    assert (training.metric_for_best_model, training.greater_is_better) == ("eval_loss", False)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (64, 1)
    assert (training.lr_scheduler_type, training.get_warmup_steps(1000)) == ("linear", 100)
    assert training.optim.startswith("adamw")
    assert (training.seed, training.full_determinism, training.bf16) == (2022, True, False)


def test_fine_tuning_is_the_papers():
    data, model, training, classifier = parse("finetune", "finetune-paper", "--corpus", "cells")
    assert (classifier.classifier_paths, classifier.linear_start) == ([], "zeros")
    assert (data.validation_fraction, data.test_fraction, data.gene_dropout) == (0.2, 0.2, 0)
    assert model.gene_space == "full"
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (6, 60)
    assert (training.learning_rate, training.num_train_epochs, training.seed) == (1e-4, 3, 2022)
    assert (training.metric_for_best_model, training.early_stopping_patience) == ("eval_accuracy", 1)
    assert (training.lr_scheduler_type, training.get_warmup_steps(1000)) == ("linear", 100)
    assert training.optim.startswith("adamw")
    assert (training.full_determinism, training.bf16, training.class_weights) == (True, False, "none")
    assert (training.label_smoothing_factor, training.freeze, training.layer_lr_decay) == (0, "none", 1)


def test_fast_fine_tuning_reads_expressed_genes_in_bfloat16_and_larger_batches():
    _, model, training, _ = parse("finetune", "finetune-fast", "--corpus", "cells")
    assert (model.gene_space, training.bf16) == ("expressed", True)
    assert training.per_device_train_batch_size > FineTuningArguments().per_device_train_batch_size


def test_fine_tuning_on_few_cells_starts_as_a_regression_and_trains_on_all_of_them():
    data, _, training, classifier = parse("finetune", "finetune-small", "--corpus", "cells")
    assert (classifier.classifier_paths, classifier.linear_start) == (["convolution", "linear"], "principal_components")
    assert (data.validation_fraction, training.eval_strategy, training.load_best_model_at_end) == (0, "no", False)


def test_flags_after_a_recipe_win():
    _, _, training, _ = parse("finetune", "finetune-fast", "--corpus", "cells", "--bf16", "false", "--seed", "1")
    assert (training.bf16, training.seed, training.num_train_epochs) == (False, 1, 3)
    _, model, _ = parse("pretrain", "pretrain-paper", "--corpus", "cells", "--checkpoint", "earlier")
    assert model.checkpoint == "earlier"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pretrain-papre",
            "'pretrain-papre' is no recipe of pretrain; did you mean pretrain-paper? Recipes: pretrain-",
        ),
        ("finetune-paper", "'finetune-paper' is no recipe of pretrain"),
        ("xyzzy", "no recipe of pretrain. Recipes: pretrain-paper, pretrain-tiny. A file of your own ends in .yaml"),
    ],
)
def test_an_unknown_name_ends_with_the_recipes_there_are(name, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("pretrain", name, "--corpus", "cells")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="is no recipe of pretrain"):
        find_recipe(name, "pretrain")


@pytest.mark.parametrize("task", TYPES)
def test_help_shows_the_recipes(task, capsys):
    with pytest.raises(SystemExit):
        MAIN[task](["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert "[RECIPE | CONFIG.yaml]" in lines[0]
    for name, title in list_recipes(task).items():
        assert any(line.split()[:1] == [name] and line.endswith(title) for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_from_its_name_to_a_checkpoint(name, corpus, tmp_path, restored_determinism):
    shorter = SHORTER if settings(name).get("validation_fraction") == 0 else [*SHORTER, *SELECTING]
    MAIN[name.partition("-")[0]]([name, "--corpus", corpus, "--output_dir", str(tmp_path / "run"), *shorter])
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (record["state"], metrics["steps"]) == ("finished", 2)
    assert (tmp_path / "run" / "model.safetensors").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["gene_space"], config["num_genes"]) == (settings(name)["gene_space"], NUM_GENES)
    for key in {"seed", "per_device_train_batch_size", "early_stopping_patience", "learning_rate"} & set(
        settings(name)
    ):
        assert record["training"][key] == settings(name)[key]


def test_the_command_line_takes_a_recipe(corpus, tmp_path):
    from typer.testing import CliRunner

    from screformer.cli import app

    arguments = ["pretrain", "pretrain-tiny", "--corpus", corpus, "--output_dir", str(tmp_path / "run"), *SHORTER]
    arguments += SELECTING
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "model.safetensors").exists()
