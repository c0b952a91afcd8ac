"""A checkpoint is made ready to be shared: with all that belongs to it, without what does not, and looked through."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from transformers.dynamic_module_utils import custom_object_save

from screformer.model_cards.card_inputs import CardInputs
from screformer.model_cards.card_numbers import is_by_hand, read_metadata
from screformer.model_cards.checkpoint_records import read_checkpoint
from screformer.model_cards.evaluated_scores import scores_of_other_cells, scores_of_other_weights
from screformer.model_cards.golden_cells import CELLS, FACTS, write_golden_cells
from screformer.model_cards.model_card import write_card_of
from screformer.model_cards.published_code import AUTO_MAPS
from screformer.model_cards.published_files import CHECKSUMS, checksums_of, pickles_of, published_files
from screformer.model_cards.verify import check_files
from screformer.modeling_screformer import ScReformerForMaskedLM
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.result_files import read_json, software_versions, write_json

# Where a card admits that it does not know.
HOLES = ("not recorded", "no evaluation on test cells", "no comparison with", "was not measured", "not known")
NUM_TOLD = 5
HUB_PREFIX = "hf://"
OWN_LICENCE = "apache-2.0"
OF_THE_CALL = ("is_local", "local_files_only")  # which tokenizer_config.json had until 0.1.0
LABEL_KEYS = ("id2label", "label2id", "label_parents")
# Fields of CardInputs that a card written by hand has no place for, and how the command line calls them.
CARD_OPTIONS = {
    "model_name": "--name",
    "data_sources": "--data",
    "results": "--counts",
    "pretraining": "--pretraining",
    "other_splits": "--other-split",
}


def stage_checkpoint(
    folder: str | Path,
    target: str | Path,
    *,
    card: Mapping[str, Any] | None = None,  # Any: fields of CardInputs
    allow_holes: bool = False,
    licence_file: str | Path | None = None,
) -> list[Path]:
    """Make the folder that is published, and return its files.

    It holds what `published_files` names, the code of this release, the card written anew, golden cells (made up, see
    `write_golden_cells`), LICENSE and checksums, and it verifies. Of absolute paths in records the last part is left.
    A card that was written by hand (without ``card.json``) stays as it is.

    Parameters
    ----------
    folder
        Checkpoint.
    target
        Folder to make.
    card
        Name of a field of `CardInputs` -> what the card is to say instead of what ``card.json`` keeps.
    allow_holes
        Whether a card may be published that does not know everything, or whose scores are not of the split's test
        cells.
    licence_file
        Text of the licence; needed where it is not Apache's, which is this package's own.

    Raises
    ------
    FileNotFoundError
        The folder has no ``config.json``, or there is no `licence_file`.
    FileExistsError
        `target` is there.
    ValueError
        The card has holes, or was written by hand and cannot say what is given for it; scores are of other weights or
        cells; a file is a pickle or damaged; the licence's text is missing; or what was staged does not verify.
    """
    source, place = Path(folder), Path(target)
    read_checkpoint(source)
    pickles = list(pickles_of(source, source.iterdir()))
    if pickles:
        raise ValueError(f"folder {source} has pickles, which can run any code: {', '.join(pickles)}; remove them")
    if place.exists():
        raise FileExistsError(f"to: {place} is there; choose another folder, or delete it")
    refuse_card_fields(source, card or {})
    refuse_other_scores(source, allow_other_cells=allow_holes)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".publish-", dir=place.parent) as beside:
        aside = Path(beside, place.name)  # a folder of its own, whose rights are those of any new one
        aside.mkdir()
        for path in published_files(source):
            if path.suffix != ".py" and path.name not in {CELLS, FACTS, CHECKSUMS}:
                _copy(path, aside / path.name)
        for with_code in (ScReformerForMaskedLM, ScReformerTokenizer):  # whichever head: it is one module
            custom_object_save(with_code, aside)
        inputs = _write_card(source, aside, card or {})
        _refuse_holes(source, (aside / "README.md").read_text(encoding="utf-8"), allow_holes)
        (aside / "LICENSE").write_text(_licence(inputs, licence_file), encoding="utf-8")
        write_golden_cells(aside)
        write_json(aside / CHECKSUMS, {"versions": software_versions(), "sha256": checksums_of(aside)})
        problems = [problem for check in check_files(aside) for problem in check.problems]
        if problems:
            raise ValueError(f"what would be published does not verify: {'; '.join(problems)}")
        aside.rename(place)
    return sorted(path for path in place.iterdir() if path.is_file())


def refuse_card_fields(folder: str | Path, fields: Iterable[str]) -> None:
    """Raise ValueError if a checkpoint's card was written by hand, which leaves no place for these of `CardInputs`."""
    given = [CARD_OPTIONS[name] for name in fields if name in CARD_OPTIONS]
    if given and is_by_hand(Path(folder)):
        raise ValueError(
            f"{', '.join(given)}: README.md of {folder} was written by hand (there is no card.json), so that nothing "
            "is added to it; say it there, or delete README.md to have the card written from the records"
        )


def refuse_other_scores(folder: str | Path, *, allow_other_cells: bool = False) -> None:
    """Raise ValueError if ``evaluation.json`` is of other weights than those beside it, or not of its test cells."""
    place = Path(folder)
    again = f"evaluate again: screformer evaluate {place} CORPUS --output {place}"
    problems = list(scores_of_other_weights(place))
    if problems:
        raise ValueError(f"{place}: {'; '.join(problems)}; {again}")
    problems = [] if allow_other_cells else list(scores_of_other_cells(place))
    if problems:
        raise ValueError(f"{place}: {'; '.join(problems)}, so that they are no test; {again}")


def _copy(source: Path, target: Path) -> None:
    """Copy a file; of JSON without the places of this machine, and with the names of the code that goes along."""
    if source.suffix != ".json" or source.name == "genes.json":
        shutil.copyfile(source, target)
        return
    given = read_json(source)
    value = without_places(given)
    if source.name == "config.json":
        value |= {key: given[key] for key in LABEL_KEYS if key in given}  # cell types may look like paths
    if source.name in AUTO_MAPS:
        value["auto_map"] = AUTO_MAPS[source.name]
    if source.name == "tokenizer_config.json":
        value = {key: item for key, item in value.items() if key not in OF_THE_CALL}
    write_json(target, value)


def without_places(value: Any) -> Any:  # Any: JSON
    """Return JSON in which an absolute path is its last part."""
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(item) for item in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return value


def _write_card(source: Path, aside: Path, changes: Mapping[str, Any]) -> CardInputs:
    """Write the card, unless the checkpoint's own was written by hand; return what is known besides its files."""
    kept = CardInputs.read(aside)
    places = {name: without_places(value) for name, value in changes.items() if name != "data_sources"}
    inputs = replace(kept or CardInputs(), **{**changes, **places})
    own = source.resolve().name  # not that of the folder aside, which is renamed
    inputs = replace(inputs, model_name=inputs.model_name or own, repo_id=inputs.repo_id or own)
    if is_by_hand(aside):
        return replace(inputs, licence=_licence_by_hand(aside, changes.get("licence")))
    inputs.write(aside)
    write_card_of(aside, inputs)
    return inputs


def _licence_by_hand(folder: Path, given: str | None) -> str:
    told = read_metadata(folder).license
    if given is not None and told not in (None, given):
        raise ValueError(
            f"licence got {given!r}, README.md, which was written by hand, says {told!r}; change one of them"
        )
    return str(told or given or OWN_LICENCE)


def _refuse_holes(source: Path, card: str, allow_holes: bool) -> None:
    holes = card_holes(card)
    if holes and not allow_holes:
        more = f" and {len(holes) - NUM_TOLD} more" if len(holes) > NUM_TOLD else ""
        raise ValueError(
            f"the card of {source.name} does not know {len(holes)} things: {' | '.join(holes[:NUM_TOLD])}{more}. Give "
            "them (--data, --counts, --pretraining; write_model_card), or publish it as it is with --allow-holes"
        )


def card_holes(text: str) -> list[str]:
    """Return the lines of a card in which it does not know something, each once."""
    lines = (line.strip(" >*-|") for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if any(hole in line.lower() for hole in HOLES)))


def _licence(inputs: CardInputs, file: str | Path | None) -> str:
    if file is not None:
        return Path(file).read_text(encoding="utf-8")
    if inputs.licence != OWN_LICENCE:
        raise ValueError(
            f"licence got {inputs.licence!r}, of which this package has no text; give a file with it (--licence-file)"
        )
    for path in distribution("screformer").files or []:
        if path.name == "LICENSE":
            return str(path.read_text())
    raise FileNotFoundError("the installed package has no LICENSE; give a file with it (--licence-file)")


def describe_files(files: Sequence[Path]) -> list[str]:
    """Return a line a file with its size, and the sum."""
    sizes = [path.stat().st_size for path in files]
    lines = [f"{size / 1e6:10.2f} MB  {path.name}" for path, size in zip(files, sizes, strict=True)]
    return [*lines, f"{sum(sizes) / 1e6:10.2f} MB  in {len(files)} files"]


def is_repo_id(text: str) -> bool:
    """Return whether it is a name on the Hub, such as ORGANISATION/NAME; a folder is told by ``./`` before it."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def hub_name(to: str) -> str | None:
    """Return the name on the Hub that is meant; None for a folder.

    Raises
    ------
    ValueError
        It could be either.
    """
    if to.startswith(HUB_PREFIX):
        return to.removeprefix(HUB_PREFIX)
    if is_repo_id(to) and Path(to).parent.is_dir():
        raise ValueError(
            f"to got {to!r}, which may be a name on the Hub or a folder in {Path(to).parent}; write ./{to} for the "
            f"folder, {HUB_PREFIX}{to} for the Hub"
        )
    return to if is_repo_id(to) else None
