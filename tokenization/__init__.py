"""From files of counts to tokens and a corpus."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from screformer.tokenization.corpus import Corpus, build_corpus, open_corpus
    from screformer.tokenization.count_matrix import CountMatrix, open_count_matrix
    from screformer.tokenization.example_cells import example_cells_path
    from screformer.tokenization.gene2vec import GeneVectors, read_gene_vectors
    from screformer.tokenization.gene_vocabulary import GeneMapping, GeneVocabulary
    from screformer.tokenization.passport import InputPassport, check_passport, inspect_counts, inspect_file
    from screformer.tokenization.tokenization_screformer import ScReformerTokenizer, TokenizedCells

_HOMES = {
    "Corpus": "corpus",
    "build_corpus": "corpus",
    "open_corpus": "corpus",
    "CountMatrix": "count_matrix",
    "open_count_matrix": "count_matrix",
    "example_cells_path": "example_cells",
    "GeneVectors": "gene2vec",
    "read_gene_vectors": "gene2vec",
    "GeneMapping": "gene_vocabulary",
    "GeneVocabulary": "gene_vocabulary",
    "InputPassport": "passport",
    "check_passport": "passport",
    "inspect_counts": "passport",
    "inspect_file": "passport",
    "ScReformerTokenizer": "tokenization_screformer",
    "TokenizedCells": "tokenization_screformer",
}
__all__ = [  # noqa: RUF022 - grouped by module
    "Corpus",
    "build_corpus",
    "open_corpus",
    "CountMatrix",
    "open_count_matrix",
    "example_cells_path",
    "GeneVectors",
    "read_gene_vectors",
    "GeneMapping",
    "GeneVocabulary",
    "InputPassport",
    "check_passport",
    "inspect_counts",
    "inspect_file",
    "ScReformerTokenizer",
    "TokenizedCells",
]


def __getattr__(name: str) -> Any:  # any exported object
    """Import a public name when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    """Name the public objects."""
    return sorted(__all__)
