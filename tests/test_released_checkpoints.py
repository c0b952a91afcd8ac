"""A checkpoint of every release opens for ever: by its own code, by today's package, and with the same outputs."""

from importlib.metadata import version

import numpy as np
import pytest
import torch
from released_checkpoint import FOLDER, unpack
from safetensors.numpy import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from screformer.model_cards.golden_cells import CELLS, FACTS, check_golden_cells
from screformer.model_cards.verify import verify_checkpoint
from screformer.train.result_files import read_json

RELEASES = sorted(FOLDER.glob("*.zip"))


@pytest.fixture(params=RELEASES, ids=lambda path: path.stem)
def released(request, tmp_path):
    unpack(request.param, tmp_path)
    return tmp_path


def test_there_is_one_of_this_release():
    assert version("screformer") in {path.stem for path in RELEASES}


def test_its_own_code_gives_the_recorded_outputs(released):
    assert check_golden_cells(released) is None


def test_todays_package_gives_the_recorded_outputs(released):
    golden, names = load_file(released / CELLS), read_json(released / FACTS)["gene_names"]
    tokenizer = AutoTokenizer.from_pretrained(released)
    model = AutoModelForSequenceClassification.from_pretrained(released).eval()
    assert type(model).__module__.startswith("screformer.")
    cells = tokenizer(golden["counts"], gene_names=names, gene_space=model.config.gene_space, return_tensors="pt")
    with torch.no_grad():
        logits = model(**cells).logits.numpy()
    np.testing.assert_allclose(logits, golden["outputs"], atol=1e-4)
    for kind in (AutoModel, AutoModelForMaskedLM):
        assert kind.from_pretrained(released).config.num_genes == model.config.num_genes


def test_it_verifies_but_for_its_code(released):
    wrong = [check.name for check in verify_checkpoint(released, trust_code=True) if check.problems]
    assert set(wrong) <= {"its code is that of this release"}
