"""The numbers in a card's metadata beside those that were measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from screformer.model_cards.card_inputs import INPUTS_FILE, CardInputs
from screformer.model_cards.checkpoint_records import read_checkpoint
from screformer.model_cards.comparison import METRIC_TITLES, MODEL
from screformer.model_cards.other_splits import other_config, split_config
from screformer.train.result_files import read_json

ROUNDING = 5.1e-5  # of a card's four digits
FEWEST_DIGITS = 2  # of a number that somebody rounded
Told = Mapping[tuple[str | None, str], list[Any]]  # (split, metric) -> values; Any: YAML


def is_by_hand(folder: Path) -> bool:
    """Return whether a folder has a card that was not written from its records."""
    return (folder / "README.md").exists() and not (folder / INPUTS_FILE).exists()


def read_metadata(folder: Path) -> ModelCardData:
    """Return the metadata of a folder's card.

    Raises
    ------
    ValueError
        It cannot be read.
    """
    try:
        card: ModelCardData = ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    except (ValueError, TypeError, LookupError, AttributeError, YAMLError) as error:
        raise ValueError(f"README.md has metadata that cannot be read: {error}") from error
    return card


def wrong_numbers(folder: Path) -> Iterator[str]:
    """Give a sentence each of the metrics in a card's metadata that were not measured so.

    A card that was written by hand need not give every metric, and may round.
    """
    told: dict[tuple[str | None, str], list[Any]] = {}
    for one in read_metadata(folder).eval_results or []:
        name = (one.metric_name or one.metric_type).casefold()
        told.setdefault((one.dataset_config, name), []).append(one.metric_value)
    path, by_hand = folder / "evaluation.json", is_by_hand(folder)
    if not path.exists():
        if told:
            yield (
                f"README.md gives {', '.join(name for _, name in told)}, and there is no evaluation.json: make it with "
                "screformer evaluate, or take the model-index out of the card"
            )
        return
    own = split_config(read_checkpoint(folder).splits)
    yield from _differences(told, own, read_json(path), path.name, by_hand=by_hand)
    inputs = CardInputs.read(folder)
    for other in inputs.other_splits if inputs is not None else ():
        yield from _differences(told, other_config(other), other["results"][MODEL], INPUTS_FILE, by_hand=by_hand)


def _differences(
    told: Told, config: str | None, measured: Mapping[str, Any], file: str, *, by_hand: bool
) -> Iterator[str]:
    of = f", {config}," if config else ""
    for key, title in METRIC_TITLES.items():
        name, found = title.casefold(), measured.get(key)
        given = told.get((config, name), told.get((None, name), []) if by_hand else [])
        texts = [value for value in given if not isinstance(value, (int, float))]
        if not given:
            if not by_hand:
                yield f"README.md does not give {title}{of} which {file} has"
        elif not isinstance(found, (int, float)):
            yield f"README.md gives {title}{of} as {given[0]!r}, {file} does not have it"
        elif texts:
            yield f"README.md gives {title}{of} as {texts[0]!r}, which is no number"
        else:
            far = [value for value in given if not abs(value - found) <= _rounding(value, by_hand=by_hand)]
            if len(far) == len(given) or (far and not by_hand):  # by hand, one of two may be of other cells
                yield f"README.md gives {title}{of} as {far[0]}, {file} as {found:.4f}"


def _rounding(value: float, *, by_hand: bool) -> float:
    digits = max(len(repr(value).partition(".")[2]), FEWEST_DIGITS)
    return max(ROUNDING, 0.51 * 10**-digits) if by_hand else ROUNDING
