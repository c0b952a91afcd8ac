"""A few cells that travel with a checkpoint, and what it makes of them: whoever loads it can see that it still does.

They are read by transformers alone, in a process that cannot import this package: the code that travels with the
checkpoint is what is tried.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from screformer.model_cards.published_code import code_elsewhere
from screformer.model_cards.published_files import published_files
from screformer.tokenization.gene_vocabulary import GeneVocabulary, load_vocabulary
from screformer.train.result_files import read_json, weight_files, write_json

CELLS, FACTS = "golden_cells.safetensors", "golden_cells.json"
NUM_CELLS, MAX_GENES, SEED = 8, 1000, 0
TOLERANCE = 1e-3  # of the largest value; other processors and versions add up in another order
TIME_LIMIT = 600
OUTPUTS = {
    "ScReformerForCellClassification": ("AutoModelForSequenceClassification", "logits"),
    "ScReformerForMaskedLM": ("AutoModelForMaskedLM", "logits"),
    "ScReformerModel": ("AutoModel", "cell_embedding"),
}

# A program of its own, that needs nothing but transformers, torch and safetensors.
PROGRAM = """
import json
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "screformer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
import torch
import transformers
from safetensors.numpy import load_file, save_file

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
options = {"trust_remote_code": True, "local_files_only": True}
tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"], **options)
auto_class = getattr(transformers, request["auto_class"])
model = auto_class.from_pretrained(request["folder"], use_safetensors=True, **options).eval()
counts = load_file(request["cells"])["counts"]
batch = tokenizer(
    counts.tolist(), gene_names=request["gene_names"], gene_space=model.config.gene_space, return_tensors="pt"
)
with torch.no_grad():
    outputs = model(**batch)
save_file({"outputs": outputs[request["output"]].float().numpy()}, request["result"])
"""


def write_golden_cells(folder: str | Path) -> None:
    """Make up a few cells, and write them with what the checkpoint makes of them beside it.

    No cell of anybody's is among them: counts are drawn, of genes of the vocabulary.

    Parameters
    ----------
    folder
        Checkpoint.

    Raises
    ------
    ValueError
        The checkpoint cannot be opened without this package, or its outputs are not finite.
    """
    place = Path(folder)
    names, counts = _made_up_cells(load_vocabulary(place / "genes.json"))
    save_file({"counts": counts}, place / CELLS)
    write_json(place / FACTS, {"gene_names": names, "tolerance": TOLERANCE})
    outputs = _outputs_without_the_package(place)
    num_lost = int((~np.isfinite(outputs)).any(axis=tuple(range(1, outputs.ndim))).sum())
    if num_lost:
        raise ValueError(
            f"{place.name} gives NaN or infinity for {num_lost} of {len(outputs)} cells: its training diverged, or its "
            "weights are damaged; publish an earlier checkpoint, or train again with a lower learning rate"
        )
    save_file({"counts": counts, "outputs": outputs}, place / CELLS)


def _made_up_cells(vocabulary: GeneVocabulary) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Return names of genes, and counts (cells, genes) of cells from poor to rich."""
    generator = np.random.default_rng(SEED)
    num_genes = min(len(vocabulary), MAX_GENES)
    chosen = np.sort(generator.choice(len(vocabulary), num_genes, replace=False))
    shares = np.linspace(0.05, 0.6, NUM_CELLS)[:, None]
    counts = generator.geometric(0.3, (NUM_CELLS, num_genes)) * (generator.random((NUM_CELLS, num_genes)) < shares)
    counts[:, 0] = 1  # no cell is empty
    return [vocabulary.ensembl_ids[gene] for gene in chosen], counts.astype(np.int32)


def check_golden_cells(folder: str | Path) -> str | None:
    """Return what is wrong with what a checkpoint makes of its golden cells; None if it is as recorded.

    Raises
    ------
    OSError
        The folder has none.
    ValueError
        They are damaged, or the checkpoint cannot be opened without this package.
    """
    place = Path(folder)
    try:
        expected = load_file(place / CELLS)["outputs"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{CELLS} cannot be read ({error}): it was cut off or changed; download it again") from error
    allowed = min(read_json(place / FACTS)["tolerance"], TOLERANCE)  # what is proved does not say how well
    found = _outputs_without_the_package(place)
    if found.shape != expected.shape:
        return f"outputs have the shape {found.shape}, recorded were {expected.shape}"
    worst = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-6))
    return None if worst <= allowed else f"outputs differ by {worst:.2g} of the largest, more than {allowed:g}"


def _outputs_without_the_package(folder: Path) -> npt.NDArray[np.float32]:
    architecture = (read_json(folder / "config.json").get("architectures") or ["none"])[0]
    if architecture not in OUTPUTS:
        raise ValueError(f"config.json names the architecture {architecture!r}; known are {', '.join(OUTPUTS)}")
    elsewhere = next(code_elsewhere(folder), None)
    if elsewhere is not None:
        raise ValueError(f"{elsewhere}; it is not run")
    weight_files(folder)
    auto_class, output = OUTPUTS[architecture]
    with tempfile.TemporaryDirectory() as home:
        request = {
            "folder": str(_what_is_published(folder, Path(home, "checkpoint"))),
            "auto_class": auto_class,
            "output": output,
            "cells": str((folder / CELLS).resolve()),
            "gene_names": read_json(folder / FACTS)["gene_names"],
            "result": str(Path(home, "result.safetensors")),
        }
        path = Path(home, "request.json")
        path.write_text(json.dumps(request), encoding="utf-8")
        message = _run_program(path, home)
        if message is not None:
            raise ValueError(f"{folder.name} cannot be opened by transformers without this package: {message}")
        outputs: npt.NDArray[np.float32] = load_file(request["result"])["outputs"]
    return outputs


def _what_is_published(folder: Path, place: Path) -> Path:
    """Fill a new folder with what is published of a checkpoint, and return it: transformers sees nothing else."""
    place.mkdir()
    for path in published_files(folder):
        try:
            (place / path.name).symlink_to(path.resolve())
        except OSError:  # Windows allows it to few
            shutil.copyfile(path, place / path.name)
    return place


def _run_program(request: Path, home: str) -> str | None:
    """Run the program offline, with a home of its own; return its error, None if there is none."""
    places = {"HF_HOME": home, "HF_HUB_CACHE": f"{home}/hub", "HF_MODULES_CACHE": f"{home}/modules"}
    environment = os.environ | places | {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(request)],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {TIME_LIMIT} seconds"
    return (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else None
