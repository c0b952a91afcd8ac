"""Cells become tokens: raw counts -> 10,000 per cell -> expression bins, one token a gene."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer

from .expression_bins import (
    Binning,
    CountsCSR,
    as_counts_csr,
    check_raw_counts,
)
from .gene_vocabulary import GeneMapping, GeneVocabulary, is_ensembl_id, is_no_name, load_vocabulary
from .row_tokens import BinRule, tokenize_rows

VOCAB_FILES_NAMES = {"vocab_file": "genes.json"}
PAD_TOKEN = "[PAD]"
MASK_TOKEN = "[MASK]"
FEATURE_TYPE_COLUMNS = ("feature_types", "feature_type")
GENE_EXPRESSION = "Gene Expression"
GeneSpace = Literal["full", "expressed"]


class TokenizedCells(NamedTuple):
    """Expressed genes of cells, compressed by rows; `gene_ids` ascend within a cell.

    Attributes
    ----------
    indptr
        int64 (num_cells + 1,): where each cell begins.
    gene_ids
        uint16: position in the gene vocabulary.
    input_ids
        uint8: expression bin, 1 to num_bins - 1.
    total_counts
        float64 (num_cells,): sum of all counts of each cell.
    known_counts
        float64 (num_cells,): sum of its counts on genes of the vocabulary.
    """

    indptr: np.ndarray
    gene_ids: np.ndarray
    input_ids: np.ndarray
    total_counts: np.ndarray
    known_counts: np.ndarray


class GeneNames(NamedTuple):
    """The gene names chosen for a matrix, where they were found, and their positions."""

    names: list[str]
    source: str
    mapping: GeneMapping


class ScReformerTokenizer(PreTrainedTokenizer):
    """Turn raw counts into `input_ids` (expression bins) and `gene_ids` (positions in the gene vocabulary).

    A cell's counts are divided by the sum of **all** its counts as given, genes outside the vocabulary included, and
    multiplied by `target_sum`. Input genes that share a position are summed. Bin 0 means "not expressed"; a gene with
    any count is in bin 1 or above, so low expression is never mistaken for none.

    Parameters
    ----------
    vocabulary
        The genes; `GeneVocabulary.human_v1()` when left out.
    vocab_file
        A saved `genes.json` instead (`from_pretrained` passes it).
    num_bins
        Bins with bin 0, 3 to 254. Special ids follow: `[PAD]` is num_bins, `[MASK]` num_bins + 1.
    binning
        "log2": floor(log2(1 + normalised)), held between 1 and num_bins - 1 (scBERT's rule, which however lets a weakly
        expressed gene fall into bin 0). "quantile": the expressed genes of each cell are cut at the
        num_bins - 1 evenly spaced quantiles of their own counts; equal counts share a bin (scGPT's rule).
    target_sum
        What the counts of a cell are scaled to before "log2". "quantile" does not depend on it.
    min_gene_coverage
        The least share (0 to 1) of an input's counts that must fall on genes of the vocabulary.
    on_empty_cells
        What to do with a cell that has no counts on known genes: "error", or "keep" it without any expressed gene.

    Raises
    ------
    ValueError
        An option is out of its range, or both `vocabulary` and `vocab_file` are given.

    Examples
    --------
    >>> vocabulary = GeneVocabulary(["ENSG1", "ENSG2", "ENSG3"], symbols=["CD3D", "CD3E", "CD2"])
    >>> tokenizer = ScReformerTokenizer(vocabulary)
    >>> cells = tokenizer([[0, 1, 9999], [5, 0, 5]], gene_names=["CD2", "CD3E", "CD3D"])
    >>> cells["input_ids"].tolist()
    [[5, 1, 0], [5, 0, 5]]
    >>> tokenizer.decode(cells["input_ids"][0], gene_ids=cells["gene_ids"][0])
    'CD3D:5 CD3E:1'
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "gene_ids", "attention_mask"]  # noqa: RUF012 - transformers' own form
    padding_side = "right"
    # save_pretrained then copies this file and gene_vocabulary.py, and names them in `auto_map`.
    _auto_class = "AutoTokenizer"

    def __init__(
        self,
        vocabulary: GeneVocabulary | None = None,
        *,
        vocab_file: str | os.PathLike[str] | None = None,
        num_bins: int = 6,
        binning: Binning = "log2",
        target_sum: float = 10_000,
        min_gene_coverage: float = 0.5,
        on_empty_cells: Literal["error", "keep"] = "error",
        **kwargs: Any,  # transformers' own settings, as read back from tokenizer_config.json
    ) -> None:
        _check_options(num_bins, binning, target_sum, min_gene_coverage, on_empty_cells)
        if vocabulary is not None and vocab_file is not None:
            msg = "give either vocabulary or vocab_file; a saved tokenizer already has its genes.json"
            raise ValueError(msg)
        if vocab_file is not None:
            vocabulary = load_vocabulary(vocab_file)
        self.gene_vocabulary = GeneVocabulary.human_v1() if vocabulary is None else vocabulary
        self.num_bins = num_bins
        self.binning = binning
        self.target_sum = target_sum
        self.min_gene_coverage = min_gene_coverage
        self.on_empty_cells = on_empty_cells
        self._tokens = [*map(str, range(num_bins)), PAD_TOKEN, MASK_TOKEN]
        self._token_ids = {token: at for at, token in enumerate(self._tokens)}
        # The ids of special tokens follow from num_bins; saved ones would be wrong after num_bins is changed.
        kwargs.pop("added_tokens_decoder", None)
        for of_the_call in ("is_local", "local_files_only"):  # from_pretrained's, which save_pretrained would keep
            kwargs.pop(of_the_call, None)
        for key, token in (("pad_token", PAD_TOKEN), ("mask_token", MASK_TOKEN)):
            if str(kwargs.setdefault(key, token)) != token:
                msg = f"{key}: always {token!r} here, got {str(kwargs[key])!r}"
                raise ValueError(msg)
        super().__init__(
            num_bins=num_bins,
            binning=binning,
            target_sum=target_sum,
            min_gene_coverage=min_gene_coverage,
            on_empty_cells=on_empty_cells,
            **kwargs,
        )

    def __call__(
        self,
        cells: Any,  # AnnData, CSR, CSC, dense: told apart by their attributes, so that none need be installed
        gene_names: Sequence[str] | None = None,
        *,
        layer: str | None = None,
        gene_column: str | None = None,
        gene_space: GeneSpace = "full",
        return_tensors: Literal["np", "pt"] | None = None,
    ) -> BatchEncoding:
        """Tokenize cells.

        Parameters
        ----------
        cells
            Raw counts, cells x genes: an AnnData, a sparse matrix, or anything `numpy.asarray` reads. Features of an
            AnnData that are no gene expression by its column `feature_types`, such as antibodies, are left out.
        gene_names
            Ensembl ids, symbols or aliases, one a column; for an AnnData they are found in it.
        layer, gene_column
            Of an AnnData: the layer with the counts (else `X`), the column of `var` with the gene names (else a column
            of Ensembl ids if the vocabulary knows more of them, else `var_names`). Where that column has no name, the
            `var_names` fill in.
        gene_space
            "full": every gene of the vocabulary in order, (num_cells, num_genes). "expressed": only genes with counts,
            padded to the cell with most of them.
        return_tensors
            None or "np": int64 arrays (in the full space `gene_ids` and `attention_mask` are read-only views of
            one row). "pt": int64 tensors.

        Returns
        -------
        BatchEncoding
            `input_ids`, `gene_ids`, `attention_mask`, all (num_cells, length).

        Raises
        ------
        TypeError
            `cells` is not a matrix of numbers.
        ValueError
            Values are not raw counts, gene names are missing or unknown, too few counts fall on known genes, or a cell
            is empty.
        """
        _check_choice("gene_space", gene_space, ("full", "expressed"))
        _check_choice("return_tensors", return_tensors, (None, "np", "pt"))
        counts, names, hint = self._read_input(cells, gene_names, layer, gene_column)
        if len(names.names) != counts.num_genes:
            msg = f"gene_names: one name a column is needed, got {len(names.names)} for {counts.num_genes} columns"
            raise ValueError(msg)
        check_raw_counts(counts.data, remedy=hint)
        self.check_gene_names(names.names, names.mapping)
        self.check_gene_coverage(*self.count_sums(counts, names.mapping), names.mapping)
        tokens = self.tokenize_counts(counts, names.mapping)
        arrays = self._lay_out_full(tokens) if gene_space == "full" else self._lay_out_expressed(tokens)
        return BatchEncoding(_to_torch(arrays) if return_tensors == "pt" else arrays)

    def tokenize_counts(
        self, counts: Any, mapping: GeneMapping, *, first_row: int = 0, allow_fractions: bool = False
    ) -> TokenizedCells:
        """Bins of the expressed genes of each cell.

        Parameters
        ----------
        counts
            Raw counts, cells x input genes: sparse or dense.
        mapping
            Where the input genes are in the vocabulary.
        first_row
            Number of the first cell in what the caller reads, for messages only.
        allow_fractions
            Take values that are no whole numbers as they are, such as counts corrected for ambient RNA.

        Raises
        ------
        ValueError
            Values are not raw counts, `mapping` is of other columns, or a cell is empty (see `on_empty_cells`).
        """
        counts = counts if isinstance(counts, CountsCSR) else as_counts_csr(counts)
        if len(mapping.positions) != counts.num_genes:
            msg = f"mapping: has {len(mapping.positions)} names, the counts have {counts.num_genes} columns"
            raise ValueError(msg)

        def check() -> None:
            check_raw_counts(np.floor(counts.data) if allow_fractions else counts.data)

        rule = BinRule(self.binning, self.num_bins, self.target_sum)
        rows = tokenize_rows(counts, mapping.positions, rule, check=check)
        self._check_empty_cells(rows.lengths, first_row)
        return TokenizedCells(
            indptr=np.concatenate([np.zeros(1, np.int64), np.cumsum(rows.lengths, dtype=np.int64)]),
            gene_ids=rows.gene_ids,
            input_ids=rows.input_ids,
            total_counts=rows.total_counts,
            known_counts=rows.known_counts,
        )

    def count_sums(self, counts: Any, mapping: GeneMapping) -> tuple[float, float]:
        """Sum of the counts on known genes, and sum of all counts; `tokenize_counts` gives both with the tokens."""
        counts = counts if isinstance(counts, CountsCSR) else as_counts_csr(counts)
        is_known = mapping.positions[counts.indices] >= 0
        return float(counts.data[is_known].sum(dtype=np.float64)), float(counts.data.sum(dtype=np.float64))

    def check_gene_names(self, names: Sequence[str], mapping: GeneMapping) -> None:
        """Refuse names of which none is known, or which look like another species' symbols.

        Raises
        ------
        ValueError
            As said.
        """
        report = mapping.report
        vocabulary = self.gene_vocabulary.name
        if report.num_mapped == 0:
            msg = (
                f"gene_names: none of the {report.num_names} names is in the vocabulary {vocabulary!r}; they begin "
                f"with {[str(name) for name in names[:5]]}. Pass Ensembl gene ids or symbols of that species: "
                "gene_names=..., or gene_column= a column of adata.var."
            )
            raise ValueError(msg)
        if report.num_case_folded > report.num_mapped / 2:
            msg = (
                f"gene_names: {report.num_case_folded} of {report.num_mapped} known names match only when upper and "
                "lower case are ignored, as mouse symbols do. Map them to orthologues first; if they do belong to "
                f"the vocabulary {vocabulary!r}, write them as it does (for human, upper case)."
            )
            raise ValueError(msg)

    def check_gene_coverage(self, known: float, total: float, mapping: GeneMapping) -> None:
        """Refuse an input of whose counts less than `min_gene_coverage` fall on known genes.

        Raises
        ------
        ValueError
            As said.
        """
        if total == 0 or known / total >= self.min_gene_coverage:
            return
        unknown = mapping.report.unknown + mapping.report.ambiguous
        msg = (
            f"gene_names: {known / total:.1%} of the counts fall on genes of the vocabulary "
            f"{self.gene_vocabulary.name!r}, at least {self.min_gene_coverage:.1%} must (min_gene_coverage). "
            f"{len(unknown)} of {mapping.report.num_names} names are not known, such as {unknown[:5]}. Give Ensembl "
            "ids (gene_names= or gene_column=), check the species, or lower min_gene_coverage if that is meant so."
        )
        raise ValueError(msg)

    @property
    def num_genes(self) -> int:
        """Genes of the vocabulary."""
        return len(self.gene_vocabulary)

    @property
    def vocab_size(self) -> int:
        """Bins and the two special tokens."""
        return len(self._tokens)

    @property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, of what gives tokens their meaning: the order of genes, the bins, the rule.

        The names by which input genes are recognised, and the options that only refuse input, are not in it.
        """
        meaning: dict[str, Any] = {
            "rule": 1,
            "genes": self.gene_vocabulary.fingerprint,
            "num_bins": self.num_bins,
            "binning": self.binning,
        }
        if self.binning == "log2":
            meaning["target_sum"] = float(self.target_sum)
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def get_vocab(self) -> dict[str, int]:
        """Token -> id: the bins as decimal numbers, then the special tokens."""
        return dict(self._token_ids)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the gene vocabulary as JSON; returns the path in a tuple."""
        name = VOCAB_FILES_NAMES["vocab_file"]
        path = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        aside = path.with_name(path.name + ".part")
        aside.write_text(json.dumps(self.gene_vocabulary.to_dict(), ensure_ascii=False, indent=0), encoding="utf-8")
        os.replace(aside, path)
        return (str(path),)

    def decode(
        self,
        token_ids: Any,  # list, array or tensor, as in the base class
        skip_special_tokens: bool = False,
        *,
        gene_ids: Any = None,
        **kwargs: Any,  # accepted for the base class's callers; text clean-up has no meaning here
    ) -> str | list[str]:
        """Return one cell as text, or a list of texts for a batch.

        With `gene_ids`, "SYMBOL:bin" of every expressed or masked gene; without, the tokens in order.
        """
        token_ids = np.asarray(token_ids)
        if token_ids.ndim == 2:
            genes = [None] * len(token_ids) if gene_ids is None else np.asarray(gene_ids)
            return [self._decode_cell(*one, skip_special_tokens) for one in zip(token_ids, genes, strict=True)]
        return self._decode_cell(np.atleast_1d(token_ids), gene_ids, skip_special_tokens)

    def _decode_cell(self, token_ids: np.ndarray, gene_ids: Any, skip_special_tokens: bool) -> str:
        if gene_ids is None:
            kept = token_ids[token_ids < self.num_bins] if skip_special_tokens else token_ids
            return " ".join(self._convert_id_to_token(token) for token in kept)
        symbols = self.gene_vocabulary.symbols
        pairs = zip(np.asarray(gene_ids).tolist(), token_ids.tolist(), strict=True)
        left_out = {0, self.pad_token_id, self.mask_token_id if skip_special_tokens else 0}
        return " ".join(f"{symbols[g]}:{self._convert_id_to_token(t)}" for g, t in pairs if t not in left_out)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:  # kwargs: the base class's
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        if token not in self._token_ids:
            msg = f"token {token!r} is not one of {self._tokens}"
            raise ValueError(msg)
        return self._token_ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._tokens):
            msg = f"token id {index} is not in 0..{len(self._tokens) - 1}"
            raise ValueError(msg)
        return self._tokens[int(index)]

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        foreign = [str(token) for token in new_tokens or () if str(token) not in self._token_ids]
        if foreign:
            msg = (
                f"tokens cannot be added, got {foreign}: they are the bins and {PAD_TOKEN}, {MASK_TOKEN}; set num_bins"
            )
            raise ValueError(msg)
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def _pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:  # the base class's
        """Pad `gene_ids` with 0 as the base class pads `input_ids`, so that transformers' collators work."""
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        if "gene_ids" in padded:
            gene_ids = list(padded["gene_ids"])
            missing = [0] * (len(padded["input_ids"]) - len(gene_ids))
            side = kwargs.get("padding_side") or self.padding_side
            padded["gene_ids"] = gene_ids + missing if side == "right" else missing + gene_ids
        return padded

    def _read_input(
        self, cells: Any, gene_names: Sequence[str] | None, layer: str | None, gene_column: str | None
    ) -> tuple[CountsCSR, GeneNames, str]:
        if not hasattr(cells, "var_names"):
            if layer is not None or gene_column is not None:
                msg = "layer and gene_column are of an AnnData; for a matrix give gene_names alone"
                raise ValueError(msg)
            if gene_names is None:
                msg = "gene_names is missing: with a matrix, give one name a column (Ensembl ids or symbols)"
                raise ValueError(msg)
            names = list(gene_names)
            return as_counts_csr(cells), GeneNames(names, "gene_names", self.gene_vocabulary.map_names(names)), ""
        if layer is not None and layer not in cells.layers:
            msg = f"layer={layer!r} is not in adata.layers, which has {list(cells.layers)}"
            raise ValueError(msg)
        matrix = cells.X if layer is None else cells.layers[layer]
        if matrix is None:
            msg = f"adata.X is None; name the layer with raw counts, layer= one of {list(cells.layers)}"
            raise ValueError(msg)
        columns = {str(key): cells.var[key] for key in cells.var.columns}
        if gene_names is None:
            chosen = choose_gene_names(
                cells.var_names, columns, vocabulary=self.gene_vocabulary, gene_column=gene_column
            )
        else:
            chosen = GeneNames(list(gene_names), "gene_names", self.gene_vocabulary.map_names(gene_names))
        counts, others = as_counts_csr(matrix), find_other_features(columns)
        if others and len(chosen.names) == counts.num_genes:
            kept = [at for at in range(counts.num_genes) if at not in others]
            names = [chosen.names[at] for at in kept]
            counts = _keep_columns(counts, kept)
            chosen = GeneNames(names, chosen.source, self.gene_vocabulary.map_names(names))
        return counts, chosen, _where_counts_may_be(cells)

    def _check_empty_cells(self, num_expressed: np.ndarray, first_row: int) -> None:
        if self.on_empty_cells == "keep" or num_expressed.all():
            return
        empty = np.flatnonzero(num_expressed == 0)
        msg = (
            f"{len(empty)} of {len(num_expressed)} cells have no counts on known genes: rows "
            f"{(empty[:10] + first_row).tolist()}{' ...' if len(empty) > 10 else ''}. Remove them "
            "(scanpy.pp.filter_cells), or make the tokenizer with on_empty_cells='keep'."
        )
        raise ValueError(msg)

    def _lay_out_full(self, tokens: TokenizedCells) -> dict[str, np.ndarray]:
        num_cells = len(tokens.indptr) - 1
        input_ids = np.zeros((num_cells, self.num_genes), np.int64)
        input_ids[np.repeat(np.arange(num_cells), np.diff(tokens.indptr)), tokens.gene_ids] = tokens.input_ids
        return {
            "input_ids": input_ids,
            "gene_ids": np.broadcast_to(np.arange(self.num_genes), input_ids.shape),
            "attention_mask": np.broadcast_to(np.ones((), np.int64), input_ids.shape),
        }

    def _lay_out_expressed(self, tokens: TokenizedCells) -> dict[str, np.ndarray]:
        lengths = np.diff(tokens.indptr)
        is_token = np.arange(max(1, lengths.max(initial=1))) < lengths[:, None]
        input_ids = np.full(is_token.shape, self.pad_token_id, np.int64)
        gene_ids = np.zeros(is_token.shape, np.int64)
        input_ids[is_token] = tokens.input_ids
        gene_ids[is_token] = tokens.gene_ids
        return {"input_ids": input_ids, "gene_ids": gene_ids, "attention_mask": is_token.astype(np.int64)}


def choose_gene_names(
    var_names: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    vocabulary: GeneVocabulary,
    gene_column: str | None = None,
) -> GeneNames:
    """Pick the names to recognise the genes of a matrix by.

    `gene_column` if given; else a column of Ensembl ids if the vocabulary knows more of them than of `var_names`; else
    `var_names`. Where such a column has no name, the `var_names` fill in.

    Raises
    ------
    ValueError
        There is no column `gene_column`.
    """
    if gene_column is not None:
        if gene_column not in columns:
            msg = f"gene_column={gene_column!r} is not a column of var, which has {list(columns)}"
            raise ValueError(msg)
        names = _fill_in(columns[gene_column], var_names)
        return GeneNames(names, f"var[{gene_column!r}]", vocabulary.map_names(names))
    plain = [str(name) for name in var_names]
    best = GeneNames(plain, "var_names", vocabulary.map_names(plain))
    for key, column in columns.items():
        values = [value if isinstance(value, str) else "" for value in column]
        if sum(map(is_ensembl_id, values[:1000])) * 2 <= len(values[:1000]):
            continue
        names = _fill_in(values, plain)
        mapping = vocabulary.map_names(names)
        if mapping.report.num_mapped > best.mapping.report.num_mapped:
            best = GeneNames(names, f"var[{key!r}]", mapping)
    return best


def find_other_features(columns: Mapping[str, Sequence[Any]]) -> dict[int, str]:
    """Return number -> type of the features that are no gene expression, by the columns of `var`.

    These are antibodies, guides and the like, which may be called like genes (CD4, CD19). None where no feature is gene
    expression: then the types are not those of Cell Ranger.
    """
    types = next((columns[key] for key in FEATURE_TYPE_COLUMNS if key in columns), ())
    others = {at: str(kind) for at, kind in enumerate(types) if str(kind) != GENE_EXPRESSION}
    return others if len(others) < len(types) else {}


def _fill_in(column: Sequence[Any], var_names: Sequence[str]) -> list[str]:
    """Return names of a column, and the `var_names` where it has none."""
    return [str(name if is_no_name(str(value)) else value) for value, name in zip(column, var_names, strict=True)]


def _keep_columns(counts: CountsCSR, kept: Sequence[int]) -> CountsCSR:
    position = np.full(counts.num_genes, -1, counts.indices.dtype)
    position[kept] = np.arange(len(kept))
    indices = position[counts.indices]
    is_kept = indices >= 0
    num_kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept, dtype=np.int64)])
    return CountsCSR(num_kept[counts.indptr], indices[is_kept], counts.data[is_kept], len(kept))


def _where_counts_may_be(adata: Any) -> str:
    """Name the places of an AnnData whose first values are counts."""
    places = [f"layer={key!r}" for key in adata.layers if _begins_with_counts(adata.layers[key])]
    raw = getattr(adata, "raw", None)
    if raw is not None and _begins_with_counts(raw.X):
        places.append("adata.raw.to_adata()")
    if places:
        return f"Whole numbers were found in: {', '.join(places)}."
    return f"No layer of this AnnData holds whole numbers (layers: {list(adata.layers)})."


def _begins_with_counts(matrix: Any) -> bool:
    try:
        check_raw_counts(as_counts_csr(matrix[:100]).data)
    except (TypeError, ValueError):
        return False
    return True


def _to_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    import torch

    tensors = {}
    for key, array in arrays.items():
        is_view = array.ndim == 2 and array.strides[0] == 0 and len(array) > 0
        row_or_all = torch.from_numpy(np.array(array[:1] if is_view else array))
        tensors[key] = row_or_all.expand(array.shape) if is_view else row_or_all
    return tensors


def _check_options(
    num_bins: int, binning: str, target_sum: float, min_gene_coverage: float, on_empty_cells: str
) -> None:
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or not 3 <= num_bins <= 254:
        msg = f"num_bins: a whole number from 3 to 254 (bin 0 is 'not expressed'; stored as uint8), got {num_bins!r}"
        raise ValueError(msg)
    _check_choice("binning", binning, ("log2", "quantile"))
    _check_choice("on_empty_cells", on_empty_cells, ("error", "keep"))
    if not 0 < target_sum < float("inf"):
        msg = f"target_sum: a positive number, got {target_sum!r}"
        raise ValueError(msg)
    if not 0 <= min_gene_coverage <= 1:
        msg = f"min_gene_coverage: a share from 0 to 1, got {min_gene_coverage!r}"
        raise ValueError(msg)


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        msg = f"{name}: one of {', '.join(map(repr, allowed))}, got {value!r}"
        raise ValueError(msg)
