"""The last step of a corpus: of cells that are the same, the first stays, whatever shards they are in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from screformer.tokenization.cell_hashes import UInt64Array
from screformer.tokenization.corpus_files import Manifest
from screformer.tokenization.corpus_shards import drop_cells


def drop_duplicates(folder: Path, entries: list[Manifest], hashes: list[UInt64Array]) -> list[Manifest]:
    """Write the shards that hold later copies again, without them; return the entries of all.

    It can be stopped and begun again at any point: which cell comes first depends on the order of the shards alone.

    Parameters
    ----------
    folder
        Where the shards are.
    entries
        Of all shards, in order.
    hashes
        Of the cells of each shard; those of the dropped cells are taken out of this list.
    """
    is_first = _is_first(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    ends = np.cumsum([len(part) for part in hashes])
    kept = list(entries)
    for at, part in enumerate(np.split(is_first, ends[:-1])):
        if not part.all():
            kept[at] = drop_cells(folder, entries[at], part)
            hashes[at] = hashes[at][part]
    return kept


def _is_first(hashes: UInt64Array) -> npt.NDArray[np.bool_]:
    """Whether no earlier cell has the same hash; cells without counts (hash 0) are not compared."""
    is_first = hashes == 0
    is_first[np.unique(hashes, return_index=True)[1]] = True
    return is_first
