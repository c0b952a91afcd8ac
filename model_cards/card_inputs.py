"""What a card is written from and no other file of a checkpoint holds: kept beside it, to write it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from screformer.model_cards.checkpoint_records import Checkpoint, Json, read_checkpoint
from screformer.model_cards.comparison import MODEL, Results, check_results
from screformer.train.result_files import read_json, write_json

INPUTS_FILE = "card.json"
NOT_SHOWN = ("roc_curves", "confusion_matrix")  # of a row of results: long, and in evaluation.json


class DataSource(NamedTuple):
    """Where training cells come from: words that no file of a checkpoint holds."""

    name: str
    citation: str
    origin: str
    licence: str


@dataclass(frozen=True)
class CardInputs:
    """See `write_model_card`.

    Attributes
    ----------
    model_name, repo_id
        None: the folder's name.
    licence
        Of weights and code.
    data_sources
        Of the training cells.
    results
        Name of a model -> metrics; None: that of ``evaluation.json`` alone.
    pretraining
        ``training`` and ``metrics`` of the run that this one started from.
    other_splits
        Of runs of the same settings, see `record_of_split`.
    """

    model_name: str | None = None
    repo_id: str | None = None
    licence: str = "apache-2.0"
    data_sources: Sequence[DataSource] = ()
    results: Results | None = None
    pretraining: Mapping[str, Json] | None = None
    other_splits: Sequence[Json] = ()

    @classmethod
    def read(cls, folder: str | Path) -> CardInputs | None:
        """Return what a folder keeps; None where no card was written.

        Raises
        ------
        ValueError
            The file is damaged, or of a later release.
        """
        path = Path(folder, INPUTS_FILE)
        if not path.exists():
            return None
        kept = read_json(path)
        if not isinstance(kept, dict):
            raise ValueError(f"{path} must hold fields and their values; have the card written again")
        _refuse_unknown(path, kept, [field.name for field in fields(cls)])
        sources = kept.pop("data_sources", [])
        for source in sources:
            _refuse_unknown(path, source, DataSource._fields)
        return cls(**kept, data_sources=[DataSource(**source) for source in sources])

    def write(self, folder: str | Path) -> None:
        """Keep it in a folder."""
        sources = [source._asdict() for source in self.data_sources]
        write_json(Path(folder, INPUTS_FILE), asdict(replace(self, data_sources=())) | {"data_sources": sources})

    def results_of(self, checkpoint: Checkpoint) -> Results | None:
        """Return the scores that the card gives."""
        path = checkpoint.folder / "evaluation.json"
        if self.results is not None or not path.exists():
            return self.results
        return {MODEL: shown(read_json(path))}

    def pretraining_of(self) -> Checkpoint | None:
        """Return the records of the run that this one started from."""
        if self.pretraining is None:
            return None
        return Checkpoint.of_records(**self.pretraining)


def _refuse_unknown(path: Path, kept: Json, known: Sequence[str]) -> None:
    unknown = [name for name in kept if name not in known]
    if unknown:
        raise ValueError(
            f"{path} has {', '.join(map(repr, unknown))}, which this release does not know; it is of a later one: "
            "update screformer"
        )


def shown(row: Mapping[str, Any]) -> Json:
    """Return metrics without what a card does not show."""
    return {name: value for name, value in row.items() if name not in NOT_SHOWN}


def records_of_pretraining(folder: str | Path) -> dict[str, Json]:
    """Return what a card says of the run that another one started from.

    Raises
    ------
    FileNotFoundError
        The folder has no ``config.json``.
    """
    found = read_checkpoint(folder)
    return {"training": found.training, "metrics": found.metrics}


def checked_results(results: Results | None) -> Results | None:
    """Return the rows without what a card does not show.

    Raises
    ------
    ValueError
        They lack a metric or are of different test sets.
    """
    if results is None:
        return None
    check_results(results)
    return {name: shown(row) for name, row in results.items()}
