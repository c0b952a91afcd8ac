"""Which cells of a corpus are held out from training: by cell, by file, or by a column such as the donor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from screformer.tokenization.cell_hashes import UInt64Array, mix_with
from screformer.tokenization.corpus_files import Manifest

DEFAULT_SEED = 2022
CELL, FILE = "cell", "file"


@dataclass(frozen=True)
class HoldOut:
    """The rule of a split.

    Attributes
    ----------
    fraction
        Share of the cells to hold out, above 0 and below 1.
    by
        "cell": at random by the cell's counts, so that the same cell is on the same side in every corpus with this seed
        and fraction. "file": whole files. Else the name of an obs column that the corpus keeps, such as "donor" or
        "dataset": whole groups; cells without a value are never held out.
    seed
        Draws cells or groups.

    Raises
    ------
    ValueError
        `fraction` is out of its range.
    """

    fraction: float
    by: str = CELL
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            msg = f"hold_out: a fraction above 0 and below 1, such as 0.1, got {self.fraction}"
            raise ValueError(msg)


def held_out_by_cell(rule: HoldOut, hashes: UInt64Array) -> npt.NDArray[np.bool_]:
    """Whether each cell is held out, by its hash."""
    return mix_with(hashes, rule.seed) < np.uint64(int(rule.fraction * 2.0**64))


def choose_groups(rule: HoldOut, sizes: Mapping[str, int]) -> list[str]:
    """Return the groups to hold out: drawn by the seed, as long as their cells come nearer to the fraction.

    Raises
    ------
    ValueError
        There are fewer than two groups.
    """
    if len(sizes) < 2:
        msg = (
            f"hold_out: by={rule.by!r} holds out whole groups and needs at least two of them, the corpus has "
            f"{sorted(sizes)}; hold out by cell, or choose another column"
        )
        raise ValueError(msg)
    target = rule.fraction * sum(sizes.values())
    drawn = sorted(sizes, key=lambda group: hashlib.sha256(f"{rule.seed}\0{group}".encode()).digest())
    chosen: list[str] = []
    total = 0
    for group in drawn:
        if len(chosen) < len(sizes) - 1 and abs(total + sizes[group] - target) < abs(total - target):
            chosen.append(group)
            total += sizes[group]
    return sorted(chosen) or [min(drawn, key=lambda group: (abs(sizes[group] - target), group))]


def record_split(rule: HoldOut, hashes: UInt64Array, group_sizes: Mapping[str, int]) -> Manifest:
    """Return what the manifest says of a split: the rule, the groups held out (None by cell), and how many cells.

    Raises
    ------
    ValueError
        One side would have no cells.
    """
    groups = None if rule.by == CELL else choose_groups(rule, group_sizes)
    if groups is None:
        num_held_out = int(held_out_by_cell(rule, hashes).sum())
    else:
        num_held_out = sum(group_sizes[group] for group in groups)
    if not 0 < num_held_out < len(hashes):
        msg = (
            f"hold_out: {rule.fraction} of {len(hashes)} cells holds out {num_held_out}; at least one cell must be on "
            "each side. Choose another fraction or seed"
        )
        raise ValueError(msg)
    return {**asdict(rule), "groups": groups, "num_held_out": num_held_out}
