"""Which genes are mitochondrial: their share of a cell's counts tells dying cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PREFIXES = ("MT-", "MT.")  # R's data frames write dots
# For names that are Ensembl ids: the 37 genes of the human mitochondrion (13 protein-coding, then rRNA and tRNA, whose
# symbols begin with MT- as well), and the 13 protein-coding ones of the mouse's.
ENSEMBL_IDS = frozenset(
    [f"ENSG00000{number}" for number in (
        198695, 198712, 198727, 198763, 198786, 198804, 198840, 198886, 198888, 198899, 198938, 212907, 228253,
        209082, 210049, 210077, 210082, 210100, 210107, 210112, 210117, 210127, 210135, 210140,
        210144, 210151, 210154, 210156, 210164, 210174, 210176, 210184, 210191, 210194, 210195,
        210196, 211459
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
