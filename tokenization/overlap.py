"""How many cells of a file a corpus holds, or a model has seen while it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from screformer.tokenization.cell_hashes import SeenCells, seen_cells
from screformer.tokenization.corpus_files import MANIFEST, TOKENIZER_FOLDER
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.tokenization.tokenization_screformer import VOCAB_FILES_NAMES, ScReformerTokenizer


def tokenizer_of(folder: str | Path) -> ScReformerTokenizer:
    """Load the tokenizer of a corpus or checkpoint.

    Raises
    ------
    FileNotFoundError
        The folder is neither.
    """
    folder = Path(folder)
    place = folder / TOKENIZER_FOLDER if (folder / MANIFEST).is_file() else folder
    if not (place / VOCAB_FILES_NAMES["vocab_file"]).is_file():
        raise FileNotFoundError(f"against: {folder} is neither a finished corpus nor a checkpoint: it has no tokenizer")
    return ScReformerTokenizer.from_pretrained(place)


def find_seen_cells(
    path: str | Path,
    folder: str | Path,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    allow: Sequence[str] = (),
) -> SeenCells:
    """Read a file of counts once and say which of its cells a corpus or checkpoint has seen.

    Cells are recognised by their counts on the genes of that folder's vocabulary, whatever the file's format, the order
    of its genes or the names of its cells.

    Raises
    ------
    OSError
        There is no such file; or the folder does not say which cells it has seen.
    ValueError
        The file holds no raw counts, or the folder's record is damaged.
    """
    tokenizer = tokenizer_of(folder)
    vocabulary = tokenizer.gene_vocabulary
    with open_count_matrix(path, layer=layer, gene_column=gene_column, vocabulary=vocabulary, allow=allow) as matrix:
        return seen_cells(matrix, tokenizer, folder)
