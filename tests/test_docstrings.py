import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "modeling_screformer": "screformer",
    "tokenization": "screformer.tokenization",
    "train": "screformer.train",
    "annotation": "screformer.annotation",
    "benchmarks": "screformer.benchmarks",
    "model_cards": "screformer.model_cards",
}
WITH_EXAMPLES = [
    f"{package}.{path.stem}"
    for folder, package in FOLDERS.items()
    for path in sorted((ROOT / folder).glob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples_run(name):
    results = doctest.testmod(import_module(name))
    assert results.attempted > 0
    assert results.failed == 0
