"""A classifier of two types with random weights and the records of a training: enough to publish in a second."""

import json
from pathlib import Path

from small_corpus import make_tokenizer

from screformer import ScReformerConfig, ScReformerForCellClassification
from screformer.model_cards.model_card import write_model_card
from screformer.model_cards.verify import check_files

SCORES = {"accuracy": 0.9, "macro_f1": 0.8, "balanced_accuracy": 0.85}


def write_checkpoint(folder: Path, **weights_files) -> None:
    """Write a checkpoint without records."""
    config = ScReformerConfig.preset(
        "tiny", num_genes=40, hidden_size=8, intermediate_size=16, num_hidden_layers=1, classifier_hidden_sizes=[16, 8],
        bucket_size=8, id2label={0: "alpha", 1: "beta"}, tokenizer_fingerprint=make_tokenizer().fingerprint,
    )  # fmt: skip
    ScReformerForCellClassification(config).save_pretrained(folder, **weights_files)
    make_tokenizer().save_pretrained(folder)


def write_checkpoint_with_card(folder: Path) -> None:
    """Write one with scores, some of its records with places of this machine, predictions, and a card."""
    write_checkpoint(folder)
    write_record(folder, "evaluation", **SCORES, checkpoint="/home/me/secret/checkpoint")
    (folder / "predictions.tsv").write_text("cell\tlabel\n")
    write_model_card(folder, model_name="tiny")


def write_record(folder: Path, name: str, **values) -> None:
    """Write a JSON file of a checkpoint."""
    (folder / f"{name}.json").write_text(json.dumps(values))


def change_record(path: Path, **values) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def problems_of_files(folder: Path) -> list[str]:
    """Return what is wrong with a published folder, but for its outputs, which take a process to know."""
    return [problem for check in check_files(folder) for problem in check.problems]
