"""Proof that a published checkpoint is what its card says, and that it works where it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from screformer.model_cards.card_inputs import CardInputs
from screformer.model_cards.card_numbers import wrong_numbers
from screformer.model_cards.checkpoint_records import checkpoint_folder
from screformer.model_cards.evaluated_scores import scores_of_other_weights
from screformer.model_cards.golden_cells import CELLS, check_golden_cells
from screformer.model_cards.model_card import card_text
from screformer.model_cards.published_code import foreign_code
from screformer.model_cards.published_files import CHECKSUMS, pickles_in, unlisted_files, wrong_files
from screformer.tokenization.gene_vocabulary import load_vocabulary
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.result_files import read_json

# What reading a damaged file can raise.
DAMAGE = (ValueError, OSError, SafetensorError, LookupError, TypeError, AttributeError)


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

    Files are those of ``checksums.json``; no file is a pickle; the code beside it, and what its settings have loaded,
    is that of this release; vocabulary, tokenizer and configuration fit each other; scores are of these weights; the
    numbers of the card are those of the JSON files; and transformers alone, without this package, makes of the golden
    cells what was recorded. A file that cannot be read is a problem of every question that needs it.

    Parameters
    ----------
    folder
        Made by `stage_checkpoint`, or downloaded.
    trust_code
        Run the code beside the weights though it, or another file, is not that of this release.

    Raises
    ------
    OSError
        There is no such folder, or it has no ``config.json``.
    """
    place = checkpoint_folder(folder)
    outputs = partial(_outputs, trust_code=trust_code)
    return [*check_files(place), _ask("it gives the recorded outputs without this package", outputs, place)]


def check_files(folder: Path) -> list[Check]:
    """Ask what can be asked without running the model."""
    questions: dict[str, Callable[[Path], Iterator[str]]] = {
        "its files are those that were published": _files,
        "no file is a pickle": _pickles,
        "its code is that of this release": foreign_code,
        "vocabulary, tokenizer and configuration fit": _vocabulary,
        "its scores are of these weights": _scores,
        "the card says what the files say": _card,
    }
    return [_ask(name, question, folder) for name, question in questions.items()]


def _ask(name: str, question: Callable[[Path], Iterator[str]], folder: Path) -> Check:
    """Return what is wrong; what is too damaged for the rest of the question is one of the problems."""
    problems: list[str] = []
    try:
        problems.extend(question(folder))
    except DAMAGE as error:
        is_told = isinstance(error, (ValueError, OSError))
        problems.append(str(error) if is_told else f"a file is damaged: {type(error).__name__}: {error}")
    return Check(name, problems)


def _files(folder: Path) -> Iterator[str]:
    if not (folder / CHECKSUMS).exists():
        yield f"there is no {CHECKSUMS}; the folder was not made by `screformer publish`"
        return
    yield from wrong_files(folder, read_json(folder / CHECKSUMS)["sha256"])


def _pickles(folder: Path) -> Iterator[str]:
    for name in pickles_in(folder):
        yield f"{name} is a pickle, which can run any code when it is opened; do not open it"


def _scores(folder: Path) -> Iterator[str]:
    for problem in scores_of_other_weights(folder):
        yield f"{problem}; evaluate again"


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
    yield from wrong_numbers(folder)
    inputs = CardInputs.read(folder)
    if inputs is not None and _is_of_this_release(folder):
        ours, theirs = card_text(folder, inputs).splitlines(), path.read_text(encoding="utf-8").splitlines()
        changed = next((line for line, other in zip_longest(theirs, ours) if line != other), None)
        if ours != theirs:
            yield f"README.md is not what the other files say, first here: {(changed or 'at its end')[:120]!r}"


def _is_of_this_release(folder: Path) -> bool:
    path = folder / CHECKSUMS
    return path.exists() and read_json(path)["versions"].get("screformer") == version("screformer")


def _outputs(folder: Path, *, trust_code: bool) -> Iterator[str]:
    if not (folder / CELLS).exists():
        yield f"there is no {CELLS}, so that nothing shows that it works"
        return
    if not trust_code and any((*foreign_code(folder), *pickles_in(folder), *_unlisted(folder))):
        yield "it was not tried: not all of it is this release's; read it, then run it with --trust-remote-code"
        return
    problem = check_golden_cells(folder)
    if problem is not None:
        yield problem


def _unlisted(folder: Path) -> Iterator[str]:
    path = folder / CHECKSUMS
    yield from unlisted_files(folder, read_json(path)["sha256"] if path.exists() else ())
