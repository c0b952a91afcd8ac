"""Proof that a published checkpoint is what its card says, and that it works where it is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard
from yaml import YAMLError

from screformer.model_cards.card_inputs import INPUTS_FILE, CardInputs
from screformer.model_cards.checkpoint_records import read_checkpoint
from screformer.model_cards.comparison import METRIC_TITLES, MODEL
from screformer.model_cards.golden_cells import CELLS, check_golden_cells
from screformer.model_cards.model_card import card_text
from screformer.model_cards.other_splits import other_config, split_config
from screformer.model_cards.published_files import CHECKSUMS, pickles_in, wrong_files
from screformer.tokenization.gene_vocabulary import load_vocabulary
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.result_files import read_json

HUB_PACKAGES = ("screformer", "screformer.tokenization")
ROUNDING = 5.1e-5  # of a card's four digits


class Check(NamedTuple):
    """One question to a published checkpoint.

    Attributes
    ----------
    name
        What is asked.
    problems
        Sentences; empty if all is well.
    """

    name: str
    problems: list[str]


def verify_checkpoint(folder: str | Path, *, trust_code: bool = False) -> list[Check]:
    """Ask everything of a published checkpoint; nothing is changed, and nothing reads the network.

    Files are those of ``checksums.json``; no file is a pickle; the code beside it is that of this release; vocabulary,
    tokenizer and configuration fit each other; the numbers of the card are those of the JSON files; and transformers
    alone, without this package, makes of the golden cells what was recorded.

    Parameters
    ----------
    folder
        Made by `stage_checkpoint`, or downloaded.
    trust_code
        Run the code beside the weights though it is not that of this release.

    Raises
    ------
    OSError
        There is no such folder, or it has no ``config.json``.
    """
    place = Path(folder)
    read_checkpoint(place)

    outputs = list(_outputs(place, trust_code=trust_code))
    return [*check_files(place), Check("it gives the recorded outputs without this package", outputs)]


def check_files(folder: Path) -> list[Check]:
    """Ask what can be asked without running the model."""
    questions: dict[str, Callable[[Path], Iterator[str]]] = {
        "its files are those that were published": _files,
        "no file is a pickle": _pickles,
        "its code is that of this release": _code,
        "vocabulary, tokenizer and configuration fit": _vocabulary,
        "the card says what the files say": _card,
    }
    return [Check(name, list(ask(folder))) for name, ask in questions.items()]


def _files(folder: Path) -> Iterator[str]:
    if not (folder / CHECKSUMS).exists():
        yield f"there is no {CHECKSUMS}; the folder was not made by `screformer publish`"
        return
    yield from wrong_files(folder, read_json(folder / CHECKSUMS)["sha256"])


def _pickles(folder: Path) -> Iterator[str]:
    for name in pickles_in(folder):
        yield f"{name} is a pickle, which can run any code when it is opened; do not open it"


def _code(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.py")):
        ours = _source_of(path.stem)
        if ours is None:
            yield f"{path.name} is no file of this package; read it before you trust it"
        elif ours != path.read_text(encoding="utf-8"):
            yield f"{path.name} is not that of this release of screformer; it is of another, or was changed"
    if not list(folder.glob("modeling_screformer.py")):
        yield "modeling_screformer.py is missing: without this package nothing opens the checkpoint"


def _source_of(module: str) -> str | None:
    """Return a module's source, without importing it."""
    for package in HUB_PACKAGES:
        path = Path(str(importlib.import_module(package).__file__)).with_name(f"{module}.py")
        if path.exists():
            return path.read_text(encoding="utf-8")
    return None


def _vocabulary(folder: Path) -> Iterator[str]:
    config = read_json(folder / "config.json")
    if not (folder / "genes.json").exists():
        yield "genes.json is missing: nobody knows which gene is which"
        return
    try:
        vocabulary = load_vocabulary(folder / "genes.json")
    except ValueError as error:
        yield f"genes.json: {error}"
        return
    if len(vocabulary) != config["num_genes"]:
        yield f"genes.json has {len(vocabulary):,} genes, config.json says {config['num_genes']:,}"
    if not (folder / "tokenizer_config.json").exists():
        yield "tokenizer_config.json is missing"
        return
    bins = read_json(folder / "tokenizer_config.json").get("num_bins")
    if bins != config["num_bins"]:
        yield f"the tokenizer has {bins} bins, the model {config['num_bins']}"
        return
    expected, found = config.get("tokenizer_fingerprint"), ScReformerTokenizer.from_pretrained(folder).fingerprint
    if expected is not None and expected != found:
        yield f"the tokenizer has the fingerprint {found[:12]}, the model was trained with {expected[:12]}"


def _card(folder: Path) -> Iterator[str]:
    path = folder / "README.md"
    if not path.exists():
        yield "README.md is missing: nobody knows what the checkpoint is for"
        return
    text = path.read_text(encoding="utf-8")
    try:
        told = {
            (one.dataset_config, one.metric_name): one.metric_value for one in ModelCard(text).data.eval_results or []
        }
    except (ValueError, TypeError, KeyError, YAMLError) as error:
        yield f"README.md has metadata that cannot be read: {error}"
        return
    yield from _numbers(folder, told)
    inputs = CardInputs.read(folder)
    if inputs is not None and _is_of_this_release(folder):
        ours, theirs = card_text(folder, inputs).splitlines(), text.splitlines()
        changed = next((line for line, other in zip_longest(theirs, ours) if line != other), None)
        if ours != theirs:
            yield f"README.md is not what the other files say, first here: {(changed or 'at its end')[:120]!r}"


def _numbers(folder: Path, told: Mapping[tuple[str | None, str | None], Any]) -> Iterator[str]:
    """Compare the metrics of a card's metadata with what was measured."""
    if not (folder / "evaluation.json").exists():
        if told:
            yield f"README.md gives {', '.join(str(name) for _, name in told)}, and there is no evaluation.json"
        return
    own = split_config(read_checkpoint(folder).splits)
    yield from _differences(told, own, read_json(folder / "evaluation.json"), "evaluation.json")
    inputs = CardInputs.read(folder)
    for other in inputs.other_splits if inputs is not None else ():
        yield from _differences(told, other_config(other), other["results"][MODEL], INPUTS_FILE)


def _differences(
    told: Mapping[tuple[str | None, str | None], Any], config: str | None, measured: Mapping[str, Any], file: str
) -> Iterator[str]:
    of = f", {config}," if config else ""
    for key, title in METRIC_TITLES.items():
        if (config, title) not in told:
            yield f"README.md does not give {title}{of} which {file} has"
        elif abs(told[config, title] - measured[key]) > ROUNDING:
            yield f"README.md gives {title}{of} as {told[config, title]}, {file} as {measured[key]:.4f}"


def _is_of_this_release(folder: Path) -> bool:
    path = folder / CHECKSUMS
    return path.exists() and read_json(path)["versions"].get("screformer") == version("screformer")


def _outputs(folder: Path, *, trust_code: bool) -> Iterator[str]:
    if not (folder / CELLS).exists():
        yield f"there is no {CELLS}, so that nothing shows that it works"
        return
    if not trust_code and any((*_code(folder), *_pickles(folder))):
        yield "it was not tried: its code is not this release's; read it, then run it with --trust-remote-code"
        return
    try:
        problem = check_golden_cells(folder)
    except (ValueError, OSError) as error:
        problem = str(error)
    if problem is not None:
        yield problem
