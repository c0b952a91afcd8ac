"""Write the checkpoint that stands for a release: `python tests/released_checkpoint.py`, once before it is tagged.

It is tiny, has random weights, and is published as any other; tests/test_released_checkpoints.py opens it for ever.
"""

import json
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
from small_corpus import make_tokenizer

from screformer import ScReformerConfig, ScReformerForCellClassification
from screformer.model_cards.model_card import write_model_card
from screformer.model_cards.publish import stage_checkpoint

FOLDER = Path(__file__).with_name("checkpoints")


def write_released_checkpoint(target: Path) -> None:
    """Write a zip file of a published classifier of three types."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = ScReformerConfig.preset(
        "tiny", num_genes=len(tokenizer.gene_vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        classifier_hidden_sizes=[16, 8], bucket_size=8, tokenizer_fingerprint=tokenizer.fingerprint,
        id2label={0: "alpha", 1: "beta", 2: "duct"},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder, staged = Path(place, "checkpoint"), Path(place, "staged")
        ScReformerForCellClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        row = {"accuracy": 0.3, "macro_f1": 0.2, "balanced_accuracy": 0.3}
        (folder / "evaluation.json").write_text(json.dumps(row))
        write_model_card(folder, model_name="Of random weights")
        stage_checkpoint(folder, staged, allow_holes=True)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(staged.iterdir()):
                file.write(path, path.name)


def unpack(source: Path, folder: Path) -> None:
    """Write the files of a zip file into a folder."""
    with zipfile.ZipFile(source) as file:
        file.extractall(folder)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    write_released_checkpoint(FOLDER / f"{version('screformer')}.zip")
