"""`screformer benchmark --suite`: the comparison of all systems on the packaged cells, or on files that are named."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from screformer.benchmarks.cell_type_systems import CellTypeSystem
from screformer.benchmarks.comparison import compare_systems, provenance
from screformer.benchmarks.comparison_statistics import OURS
from screformer.benchmarks.few_labels import compare_with_few_labels
from screformer.benchmarks.known_systems import SYSTEMS
from screformer.benchmarks.labelled_data import LabelledData, join_labelled_data, read_labelled_data
from screformer.benchmarks.marker_tables import MarkerTable
from screformer.benchmarks.protocol import KINDS, Kind
from screformer.benchmarks.system_ours import ScReformerSystem
from screformer.benchmarks.system_sccatch import ScCatchOfTable
from screformer.tokenization.corpus_workers import available_cores
from screformer.tokenization.example_cells import example_cells_path
from screformer.train.result_files import read_json, write_json

Suite = Literal["small", "full", "across"]
OF_TABLE = "sccatch_cellmatch"
# What runs anywhere in minutes.
SMALL = (
    OURS, "majority_class", "logistic_regression", "linear_svc", "knn", "mlp", "scpred", "sccatch", OF_TABLE,
    "xgboost", "celltypist", "singler",
)  # fmt: skip
UNMAPPED = "unmapped"
MAX_WORKERS = 4  # each takes gigabytes


class CellsToCompareOn(NamedTuple):
    """A file of labelled cells, and its columns of labels and donors; without donors there are five folds."""

    path: str
    label_column: str = "cell_type"
    group_column: str | None = None

    @classmethod
    def parse(cls, text: str) -> CellsToCompareOn:
        """Return it of ``FILE[:LABELS[:GROUPS]]``."""
        path, labels, groups = [*text.split(":"), "", ""][:3]
        return cls(path, labels or "cell_type", groups or None)


def known_systems(names: Sequence[str] = ()) -> dict[str, Callable[[], CellTypeSystem]]:
    """Return the systems of these names, ours first; all of them for none.

    Raises
    ------
    ValueError
        There is no such system.
    """
    known: Mapping[str, Callable[[], CellTypeSystem]] = {OURS: ScReformerSystem, **SYSTEMS}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"systems got {unknown}; there are {', '.join(known)}")
    return {name: known[name] for name in (names or known)}


def default_workers() -> int:
    """Return how many runs the command line does at once: one with a GPU, otherwise one a core, and four at most.

    A thread a run is the better use of a few cores: most of what systems compute here is too small to be shared out.
    """
    return 1 if torch.accelerator.is_available() else min(available_cores(), MAX_WORKERS)


def run_suite(
    suite: Suite,
    *,
    cells: Sequence[str] = (),
    systems: Sequence[str] = (),
    label_map: str | Path | None = None,
    few_labels: Sequence[int] = (),
    kinds: Sequence[str] = (),
    splits: Sequence[str | Path] = (),
    marker_table: str | None = None,
    marker_types: str | Path | None = None,
    seeds: int = 1,
    output: str | Path = "benchmarks/results",
    work: str | Path = "runs/comparison",
    command: str = "run_suite",
    note: str | None = None,
    num_workers: int = 1,
) -> list[dict[str, Any]]:  # Any: JSON
    """Compare systems, and return the result of each comparison.

    ``suite-SUITE.json`` says what it took: ``seconds``, and how many runs were made in them (``num_runs``).

    Parameters
    ----------
    suite
        ``"small"``: the quick systems on the packaged pancreas, each donor held out once. ``"full"``: all systems on
        that and on each file, five folds of cells, and where groups are known each of them held out once, so that both
        say what new donors cost. ``"across"``: the files put together, each held out once; trained on the others.
    cells
        Files of the full suite, beside the packaged cells, and of that across files, ``FILE[:LABELS[:GROUPS]]``.
    systems
        Names; default all of the suite.
    label_map
        JSON file, {name of a file without its ending: {label in it: label of the comparison}}; labels that are not
        in it, or stand for "unmapped", are left out. Files that it does not name keep their labels.
    few_labels
        Also train on at most so many cells of each type; see `compare_with_few_labels`.
    kinds
        Of folds, see `make_folds`, instead of the suite's.
    splits
        Split files, as each comparison writes one: those cells are then split so, and no other way.
    marker_table
        ``FILE[:TISSUE,TISSUE]``, a csv file with the columns of CellMatch, for ``sccatch_cellmatch``; without it that
        system is left out.
    marker_types
        JSON file that says which of its types is which label, see `MarkerTable`; default the packaged one.
    seeds, output, work, command, note, num_workers
        As for `compare_systems`.

    Raises
    ------
    ValueError
        A name or kind is unknown, a marker table, its types or a split file are for nothing, two files have one name,
        or files are named for the small suite, or fewer than two for that across files.
    """
    chosen = known_systems(systems or (_of_small_suite() if suite == "small" else ()))
    if marker_table is not None and OF_TABLE in chosen:
        chosen[OF_TABLE] = partial(ScCatchOfTable, MarkerTable.parse(marker_table, marker_types))
    elif marker_table is not None or marker_types is not None:
        raise ValueError(
            f"marker_table={marker_table!r} and marker_types={marker_types!r} belong together and to {OF_TABLE!r}; the "
            f"systems are {list(chosen)}"
        )
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"kinds got {unknown}; there are {', '.join(KINDS)}")
    least = 2 if suite == "across" else 0
    if len(cells) < least or (suite == "small" and cells):
        wanted = "none: its cells are packaged" if suite == "small" else f"at least {least}: give --cells for each"
        raise ValueError(f"suite={suite!r} got the files {list(cells)}; it takes {wanted}")
    maps: Mapping[str, Mapping[str, str]] = read_json(label_map) if label_map is not None else {}
    named = [CellsToCompareOn.parse(text) for text in cells]
    if suite == "across":
        every = [join_labelled_data([_read(one, maps) for one in named])]
    else:
        files = [CellsToCompareOn(str(example_cells_path()), group_column="donor"), *named]
        _check_names([Path(one.path).stem for one in files])
        every = [_read(one, maps) for one in files]
    split_of = _splits_by_name(splits, [data.name for data in every])
    started, before = time.monotonic(), _runs_in(work)
    results = []
    for data in every:
        for kind, split in _folds_of(data, suite, kinds, split_of.get(data.name)):
            where: Any = {"kind": kind, "output": output, "work": work, "seeds": seeds, "command": command}
            where["num_workers"] = num_workers
            results.append(compare_systems(data, chosen, note=note, split=split, **where))
            if few_labels and split is None and (data.groups is None or kind == "leave_one_group_out"):
                compare_with_few_labels(data, chosen, few_labels, **where)
    took = {
        "suite": suite,
        **provenance(command),
        "note": note,
        "comparisons": [f"{result['data']}, {result['kind']}" for result in results],
        "systems": sorted({name for result in results for name in result["systems"]}),
        "num_runs": len(_runs_in(work) - before),
        "num_workers": num_workers,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(Path(output, f"suite-{suite}.json"), took)
    return results


def _runs_in(work: str | Path) -> set[Path]:
    return set(Path(work).glob("*.json"))


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"cells: several files are called {', '.join(twice)}, and results are kept by name; rename one (the "
            f"packaged cells are {example_cells_path().stem})"
        )


def _splits_by_name(splits: Sequence[str | Path], names: Sequence[str]) -> dict[str, str | Path]:
    found = {read_json(path)["data"]: path for path in splits}
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise ValueError(f"splits are of {unknown}; the cells are {', '.join(names)}")
    return found


def _folds_of(
    data: LabelledData, suite: Suite, kinds: Sequence[str], split: str | Path | None
) -> list[tuple[Kind, str | Path | None]]:
    if split is not None:
        return [(read_json(split)["kind"], split)]
    if kinds:
        return [(kind, None) for kind in KINDS if kind in kinds]
    own: list[Kind] = [] if data.groups is None else ["leave_one_group_out"]
    if data.groups is None or suite == "full":
        own.append("five_fold")
    return [(kind, None) for kind in own]


def _of_small_suite() -> list[str]:
    return [name for name in SMALL if name == OURS or name in SYSTEMS]


def _read(one: CellsToCompareOn, maps: Mapping[str, Mapping[str, str]]) -> LabelledData:
    label_map = maps.get(Path(one.path).stem)
    if label_map is not None:
        label_map = {label: common for label, common in label_map.items() if common and common != UNMAPPED}
    return read_labelled_data(
        one.path, label_column=one.label_column, group_column=one.group_column, label_map=label_map
    )
