"""Which genes are mitochondrial: their share of a cell's counts tells dying cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PREFIXES = ("MT-", "MT.")  # R's data frames write dots
# The 13 protein-coding genes of the human and of the mouse mitochondrion, for names that are Ensembl ids.
ENSEMBL_IDS = frozenset(
    [f"ENSG00000{number}" for number in (
        198695, 198712, 198727, 198763, 198786, 198804, 198840, 198886, 198888, 198899, 198938, 212907, 228253
    )]
    + [f"ENSMUSG000000{number}" for number in (
        64341, 64345, 64351, 64354, 64356, 64357, 64358, 64360, 64363, 64367, 64368, 64370, 65947
    )]
)  # fmt: skip


def is_mitochondrial(names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return bool (num_names,): a symbol that begins with MT-, in any case, or such a gene's Ensembl id.

    Examples
    --------
    >>> is_mitochondrial(["MT-ND1", "mt-Nd1", "MTOR", "ENSG00000198888.2"]).tolist()
    [True, True, False, True]
    """
    folded = [name.upper() for name in names]
    return np.array([name.startswith(PREFIXES) or name.partition(".")[0] in ENSEMBL_IDS for name in folded], dtype=bool)
