"""The code beside a checkpoint: that of this release and nothing else, and nothing that leads to code elsewhere."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from screformer.configuration_screformer import AUTO_MAP
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.result_files import read_json

HUB_PACKAGES = ("screformer", "screformer.tokenization")
TOKENIZER = f"{ScReformerTokenizer.__module__.rpartition('.')[2]}.{ScReformerTokenizer.__name__}"
# What transformers imports, when it is trusted, by the files that name it; as `save_pretrained` writes it.
AUTO_MAPS: dict[str, dict[str, Any]] = {  # Any: JSON
    "config.json": AUTO_MAP,
    "tokenizer_config.json": {"AutoTokenizer": [TOKENIZER, None]},
}
# Other settings by which transformers fetches code; no release writes them.
PIPELINES = "custom_pipelines"
CODE_SETTINGS = (PIPELINES, "attn_implementation", "experts_implementation")  # of the latter with ORGANISATION/NAME
BESIDE = re.compile(r"\w+\.\w+", re.ASCII)


def foreign_code(folder: Path) -> Iterator[str]:
    """Give a sentence each of the files and settings by which other code than this release's would run."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        ours = _source_of(path.stem) if path.parent == folder else None
        if ours is None:
            yield f"{name} is no file of this package; read it before you trust it"
        elif ours != path.read_text(encoding="utf-8", errors="replace"):
            yield f"{name} is not that of this release of screformer; it is of another, or was changed"
    if not (folder / "modeling_screformer.py").exists():
        yield "modeling_screformer.py is missing: without this package nothing opens the checkpoint"
    for name, own in AUTO_MAPS.items():
        named = _settings(folder / name).get("auto_map", {})
        wrong = named if not isinstance(named, dict) else {one: to for one, to in named.items() if own.get(one) != to}
        if wrong:
            yield f"{name} has code loaded that is not this release's: auto_map {wrong!r}"
    yield from _code_of_settings(folder)


def code_elsewhere(folder: Path) -> Iterator[str]:
    """Give a sentence each of the settings that lead to code which is not beside the checkpoint."""
    for name in AUTO_MAPS:
        for reference in _texts(_settings(folder / name).get("auto_map")):
            if not BESIDE.fullmatch(reference):
                yield f"{name} names code that is not beside it: auto_map {reference!r}"
    yield from _code_of_settings(folder)


def _code_of_settings(folder: Path) -> Iterator[str]:
    for name in AUTO_MAPS:
        settings = _settings(folder / name)
        for setting in CODE_SETTINGS:
            if any("/" in text or setting == PIPELINES for text in _texts(settings.get(setting))):
                yield f"{name} has code loaded from elsewhere: {setting} {settings[setting]!r}"


def _settings(path: Path) -> dict[str, Any]:  # Any: JSON
    settings = read_json(path) if path.exists() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings and their values; write or download it again")
    return settings


def _texts(value: Any) -> Iterator[str]:  # Any: JSON
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _source_of(module: str) -> str | None:
    """Return a module's source, without importing it."""
    for package in HUB_PACKAGES:
        path = Path(str(importlib.import_module(package).__file__)).with_name(f"{module}.py")
        if path.exists():
            return path.read_text(encoding="utf-8")
    return None
