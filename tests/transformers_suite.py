"""transformers' own tests of every model, imported from its source: its wheel has no tests, and this package no copy.

`TRANSFORMERS_SOURCE` names a folder that has transformers' `tests/` as a package: a checkout, or the source
distribution that `make test-transformers` fetches for the installed version.
"""

import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = "transformers_suite_tests"  # not `tests`: that is ours
# What the suite imports and a source distribution leaves out: tests of exporting and generating, which are not for
# these models, and the values that a configuration is tried with.
STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["BertModel"],
            "id2label": {0: "alpha"},
            "label2id": {"alpha": 0},
            "problem_type": "regression",
        }
    },
}


def load_suite() -> tuple[ModuleType, ModuleType]:
    """Return transformers' `test_modeling_common` and `test_configuration_common`; without them the module is skipped.

    Raises
    ------
    FileNotFoundError
        `TRANSFORMERS_SOURCE` has no such tests.
    """
    source = os.environ.get("TRANSFORMERS_SOURCE")
    if not source:
        pytest.skip(
            "transformers' own tests are not in its wheel: run `make test-transformers`, or set TRANSFORMERS_SOURCE to "
            "a checkout of the installed version",
            allow_module_level=True,
        )
    folder = Path(source).resolve() / "tests"
    if not (folder / "test_modeling_common.py").is_file():
        msg = f"TRANSFORMERS_SOURCE got {source!r}, without tests/test_modeling_common.py; give transformers' checkout."
        raise FileNotFoundError(msg)
    if PACKAGE not in sys.modules:
        _add_package(PACKAGE, folder)
        for path, names in STAND_INS.items():
            _add_package(f"{PACKAGE}.{path.partition('.')[0]}")
            _add_package(f"{PACKAGE}.{path}", **names)
    modules = (f"{PACKAGE}.{name}" for name in ("test_modeling_common", "test_configuration_common"))
    modeling, configuration = map(importlib.import_module, modules)
    return modeling, configuration


def suite_marks() -> set[str]:
    """Return the names of pytest's marks in the suite; none where there is no suite."""
    source = os.environ.get("TRANSFORMERS_SOURCE")
    file = Path(source or "", "tests", "test_modeling_common.py")
    if not source or not file.is_file():
        return set()
    return set(re.findall(r"\bmark\.(\w+)", file.read_text(encoding="utf-8"))) - {"parametrize", "skip", "skipif"}


def _add_package(name: str, *folders: Path, **names: object) -> None:
    module = ModuleType(name)
    module.__path__ = list(map(str, folders))
    module.__dict__.update(names)
    sys.modules[name] = module
