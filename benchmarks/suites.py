"""`screformer benchmark --suite`: the comparison of all systems on the packaged cells, or on files that are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from screformer.benchmarks.cell_type_systems import CellTypeSystem
from screformer.benchmarks.comparison import compare_systems
from screformer.benchmarks.known_systems import SYSTEMS
from screformer.benchmarks.protocol import Kind, LabelledData, read_labelled_data
from screformer.benchmarks.system_ours import ScReformerSystem
from screformer.tokenization.example_cells import example_cells_path

Suite = Literal["small", "full"]
OURS = "screformer"


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


def run_suite(
    suite: Suite,
    *,
    cells: Sequence[str] = (),
    systems: Sequence[str] = (),
    seeds: int = 1,
    output: str | Path = "benchmarks/results",
    work: str | Path = "runs/comparison",
    command: str = "run_suite",
) -> list[dict[str, Any]]:  # Any: JSON
    """Compare systems, and return the result of each file.

    Parameters
    ----------
    suite
        ``"small"``: the packaged pancreas, each donor held out once; ``"full"``: that, and five folds of each file.
    cells
        Files of the full suite, ``FILE[:LABELS[:GROUPS]]``; those with groups have each of them held out once.
    systems
        Names; default all.
    seeds, output, work, command
        As for `compare_systems`.

    Raises
    ------
    ValueError
        A name is unknown, or files are named for the small suite or none for the full one.
    """
    chosen = known_systems(systems)
    if (suite == "full") != bool(cells):
        raise ValueError(f"suite={suite!r} got the files {list(cells)}: the full one needs some, the small one none")
    results = []
    for one in (CellsToCompareOn(str(example_cells_path()), group_column="donor"), *map(CellsToCompareOn.parse, cells)):
        kind: Kind = "five_fold" if one.group_column is None else "leave_one_group_out"
        data = _read(one)
        results.append(compare_systems(data, chosen, kind=kind, output=output, work=work, seeds=seeds, command=command))
    return results


def _read(one: CellsToCompareOn) -> LabelledData:
    return read_labelled_data(one.path, label_column=one.label_column, group_column=one.group_column)
