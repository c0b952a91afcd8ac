"""A fixed, hashed order of genes, and the way from any list of gene names to positions in it."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_GENES = 65_535  # positions are stored as uint16
HUMAN_TABLE = "genes_human.tsv.gz"
# ENSG00000182378, ENSG00000182378.15, ENSG00000182378.15_PAR_Y (GENCODE's mark for the copy on chromosome Y).
_ENSEMBL_ID = re.compile(r"(ENS[A-Z]*G\d{6,})(\.\d+)?(_PAR_Y)?", re.IGNORECASE)
# What a missing name becomes as text; NaN is also an alias of a gene.
_NO_NAMES = ("", "NAN", "NONE", "NA", "<NA>")

MatchKind = Literal["ensembl_id", "symbol", "alias", "ambiguous", "unknown"]


class _Match(NamedTuple):
    position: int
    kind: MatchKind
    is_case_folded: bool = False
    has_dots_for_dashes: bool = False


@dataclass(frozen=True)
class GeneMappingReport:
    """What became of each name of a list.

    Attributes
    ----------
    num_names
        Length of the list.
    num_vocabulary_genes
        Size of the vocabulary.
    num_genes_found
        Positions of the vocabulary that at least one name maps to.
    num_by_ensembl_id, num_by_symbol, num_by_alias
        Mapped names, by what they were recognised as.
    num_case_folded
        How many symbols and aliases matched only after ignoring upper and lower case.
    num_dots_for_dashes
        How many symbols matched only after reading their dots as dashes, as R's data frames write them (`HLA.A`).
    summed
        Symbol of a gene -> the two or more names that map to it; their counts are to be added up.
    ambiguous
        Names that could mean several genes. They are not mapped.
    unknown
        Names that mean no gene of the vocabulary. They are not mapped.
    """

    num_names: int
    num_vocabulary_genes: int
    num_genes_found: int
    num_by_ensembl_id: int
    num_by_symbol: int
    num_by_alias: int
    num_case_folded: int
    num_dots_for_dashes: int
    summed: dict[str, list[str]]
    ambiguous: list[str]
    unknown: list[str]

    @property
    def num_mapped(self) -> int:
        """Names that have a position."""
        return self.num_by_ensembl_id + self.num_by_symbol + self.num_by_alias

    def to_dict(self, *, max_names: int = 20) -> dict[str, Any]:
        """Counts, and at most `max_names` examples of each kind of trouble, as plain JSON values."""
        return {
            "num_names": self.num_names,
            "num_mapped": self.num_mapped,
            "num_by_ensembl_id": self.num_by_ensembl_id,
            "num_by_symbol": self.num_by_symbol,
            "num_by_alias": self.num_by_alias,
            "num_case_folded": self.num_case_folded,
            "num_dots_for_dashes": self.num_dots_for_dashes,
            "num_vocabulary_genes": self.num_vocabulary_genes,
            "num_genes_found": self.num_genes_found,
            "num_summed_genes": len(self.summed),
            "num_ambiguous": len(self.ambiguous),
            "num_unknown": len(self.unknown),
            "summed": dict(list(self.summed.items())[:max_names]),
            "ambiguous": self.ambiguous[:max_names],
            "unknown": self.unknown[:max_names],
        }

    def __str__(self) -> str:
        """Give a few readable lines."""
        lines = [
            f"{self.num_mapped} of {self.num_names} gene names mapped (Ensembl id {self.num_by_ensembl_id}, "
            f"symbol {self.num_by_symbol}, alias {self.num_by_alias}; {self.num_case_folded} by ignoring case, "
            f"{self.num_dots_for_dashes} by reading dots as dashes)",
            f"{self.num_genes_found} of the vocabulary's {self.num_vocabulary_genes} genes found",
            f"genes named more than once, counts summed: {_examples(list(self.summed), len(self.summed))}",
            f"ambiguous, not mapped: {_examples(self.ambiguous, len(self.ambiguous))}",
            f"unknown, not mapped: {_examples(self.unknown, len(self.unknown))}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class GeneMapping:
    """Where each of a list of gene names is in a vocabulary.

    Attributes
    ----------
    positions
        int32, one a name: position in the vocabulary, -1 where the name is unknown or ambiguous. Two names may share a
        position: their counts are to be summed.
    report
        Counts and lists behind `positions`.
    """

    positions: np.ndarray
    report: GeneMappingReport


class GeneVocabulary:
    """Genes in a fixed order: a gene's position is its identity for the model.

    Parameters
    ----------
    ensembl_ids
        One id a gene, without version, unique. The order is the vocabulary.
    symbols
        Current symbol of each gene; the ids when left out.
    aliases
        Previous symbols, other names and other Ensembl ids of each gene.
    ambiguous_names
        Names that must never be mapped, because they are known to mean several genes, some of which may not be in
        this vocabulary. Aliases shared by genes of the vocabulary are found without being listed.
    name
        What reports and cards call this vocabulary.

    Raises
    ------
    ValueError
        Ids missing, repeated or more than 65,535; lists of different lengths.

    Examples
    --------
    >>> vocabulary = GeneVocabulary(["ENSG00000198851", "ENSG00000116824"], symbols=["CD3E", "CD2"])
    >>> vocabulary.map_names(["CD2", "ENSG00000198851.10", "nonsense"]).positions.tolist()
    [1, 0, -1]
    """

    def __init__(
        self,
        ensembl_ids: Iterable[str],
        *,
        symbols: Iterable[str] | None = None,
        aliases: Iterable[Iterable[str]] | None = None,
        ambiguous_names: Iterable[str] = (),
        name: str = "custom",
    ) -> None:
        self.ensembl_ids: list[str] = [str(gene) for gene in ensembl_ids]
        self.symbols: list[str] = list(self.ensembl_ids) if symbols is None else [str(symbol) for symbol in symbols]
        self.aliases: list[list[str]] = (
            [[] for _ in self.ensembl_ids] if aliases is None else [[str(alias) for alias in one] for one in aliases]
        )
        self.ambiguous_names: list[str] = sorted({str(one).upper() for one in ambiguous_names})
        self.name = name
        self._check()
        self._by_id = self._index_ids()
        self._by_symbol = _index_folded((symbol, at) for at, symbol in enumerate(self.symbols))
        self._by_alias = _index_folded((alias, at) for at, some in enumerate(self.aliases) for alias in some)
        self._ambiguous = set(self.ambiguous_names)

    @classmethod
    def human_v1(cls) -> GeneVocabulary:
        """Return the packaged default: human protein-coding genes that Gene2vec knows, sorted by Ensembl id.

        Raises
        ------
        FileNotFoundError
            The packaged table is not beside this file, as in a copy of the code next to a checkpoint.
        """
        return _read_human_v1(Path(__file__).with_name(HUMAN_TABLE))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> GeneVocabulary:
        """Build from what `to_dict` gave.

        Raises
        ------
        ValueError
            A key is missing, or the ids are not those that the stored fingerprint was taken of.
        """
        missing = [key for key in ("name", "ensembl_ids", "symbols", "aliases") if key not in content]
        if missing:
            msg = f"not a gene vocabulary: {missing} missing, found the keys {sorted(content)}"
            raise ValueError(msg)
        vocabulary = cls(
            content["ensembl_ids"],
            symbols=content["symbols"],
            aliases=content["aliases"],
            ambiguous_names=content.get("ambiguous_names", ()),
            name=content["name"],
        )
        stored = content.get("fingerprint", vocabulary.fingerprint)
        if stored != vocabulary.fingerprint:
            msg = (
                f"gene vocabulary {vocabulary.name!r} was changed after it was saved: its ids have the fingerprint "
                f"{vocabulary.fingerprint}, the file says {stored}. Restore the file, or remove its 'fingerprint' "
                "entry if you meant to make a new vocabulary."
            )
            raise ValueError(msg)
        return vocabulary

    @property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, of the ordered Ensembl ids: what the positions mean, and nothing else."""
        return hashlib.sha256("\n".join(self.ensembl_ids).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Everything `from_dict` needs, as plain JSON values."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "ensembl_ids": self.ensembl_ids,
            "symbols": self.symbols,
            "aliases": self.aliases,
            "ambiguous_names": self.ambiguous_names,
        }

    def map_names(self, names: Sequence[str] | np.ndarray) -> GeneMapping:
        """Position of each name; Ensembl ids, symbols and aliases may be mixed.

        In this order: an Ensembl id (version and `_PAR_Y` stripped); a current symbol; an alias or previous symbol of
        exactly one gene; a current symbol whose dashes became dots, as R writes them (`HLA.A` is `HLA-A`). Upper and
        lower case are ignored (`C1ORF112` is `C1orf112`). A current symbol is always that gene, even where it once
        named another. What a missing name becomes as text, such as "nan", is no gene.

        Raises
        ------
        TypeError
            A name is not a string.
        """
        texts = [_as_text(name) for name in names]
        matches = [self._match(text) for text in texts]
        positions = np.array([match.position for match in matches], dtype=np.int32)
        return GeneMapping(positions=positions, report=self._report(texts, matches))

    def subset(self, names: Sequence[str], *, name: str) -> GeneVocabulary:
        """Return the genes among `names`, in this vocabulary's order, as a vocabulary called `name`.

        Raises
        ------
        ValueError
            A name is not in this vocabulary.
        """
        mapping = self.map_names(names)
        if (mapping.positions < 0).any():
            lost = mapping.report.unknown + mapping.report.ambiguous
            msg = f"names: {_examples(lost, len(lost))} not in the vocabulary {self.name!r}; leave them out"
            raise ValueError(msg)
        kept = np.unique(mapping.positions).tolist()
        # An alias that a gene left behind shares stays ambiguous.
        shared = [alias for alias, found in self._by_alias.items() if len(found) > 1]
        return GeneVocabulary(
            [self.ensembl_ids[at] for at in kept],
            symbols=[self.symbols[at] for at in kept],
            aliases=[self.aliases[at] for at in kept],
            ambiguous_names=[*self.ambiguous_names, *shared],
            name=name,
        )

    def to_tokenizers(self) -> Tokenizer:
        """Return a WordLevel model over the Ensembl ids, whose JSON any binding of `tokenizers` reads.

        `encode("ENSG00000198851.10 ENSG00000116824").ids` are positions; versions are stripped; an unknown id is
        `len(vocabulary)`. Symbols are not in it: they need `map_names`, which can say "ambiguous".
        """
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        words = {gene: at for at, gene in enumerate(self.ensembl_ids)} | {"[UNK]": len(self)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Replace(Regex(r"\.\d+(_PAR_Y)?(?=\s|$)"), "")
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return tokenizer

    def __len__(self) -> int:
        """Count the genes."""
        return len(self.ensembl_ids)

    def __eq__(self, other: object) -> bool:
        """Compare everything that can change a mapping, and the name."""
        return isinstance(other, GeneVocabulary) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"GeneVocabulary({self.name!r}, {len(self)} genes, fingerprint {self.fingerprint[:12]})"

    def _check(self) -> None:
        if not 0 < len(self.ensembl_ids) <= MAX_GENES:
            msg = f"ensembl_ids: 1 to {MAX_GENES} genes are allowed, got {len(self.ensembl_ids)}"
            raise ValueError(msg)
        for what, values in (("symbols", self.symbols), ("aliases", self.aliases)):
            if len(values) != len(self.ensembl_ids):
                msg = f"{what}: one entry a gene is needed, got {len(values)} for {len(self.ensembl_ids)} ensembl_ids"
                raise ValueError(msg)
        bare = [_bare_id(gene) for gene in self.ensembl_ids]
        if "" in bare:
            msg = f"ensembl_ids: empty at position {bare.index('')}; every gene needs an id"
            raise ValueError(msg)
        if len(set(bare)) != len(bare):
            repeated = sorted(gene for gene, count in Counter(bare).items() if count > 1)
            msg = f"ensembl_ids: versions aside, each may occur once; repeated: {_examples(repeated, len(repeated))}"
            raise ValueError(msg)

    def _index_ids(self) -> dict[str, int]:
        # Other Ensembl ids of a gene stand among its aliases; a gene's own id always wins over them.
        by_id: dict[str, int] = {}
        for at, some in enumerate(self.aliases):
            by_id.update({_bare_id(alias): at for alias in some if _ENSEMBL_ID.fullmatch(alias)})
        by_id.update({_bare_id(gene): at for at, gene in enumerate(self.ensembl_ids)})
        return by_id

    def _match(self, text: str) -> _Match:
        if is_no_name(text):
            return _Match(-1, "unknown")
        folded = text.upper()
        at_id = self._by_id.get(_bare_id(text))
        if at_id is not None:
            return _Match(at_id, "ensembl_id")
        for index, kind in ((self._by_symbol, "symbol"), (self._by_alias, "alias")):
            found = index.get(folded)
            if found is None:
                continue
            if len(found) > 1 or (kind == "alias" and folded in self._ambiguous):
                return _Match(-1, "ambiguous")
            ((position, spellings),) = found.items()
            return _Match(position, "symbol" if kind == "symbol" else "alias", text not in spellings)
        if folded in self._ambiguous:
            return _Match(-1, "ambiguous")
        return self._match_dots(folded)

    def _match_dots(self, folded: str) -> _Match:
        found = self._by_symbol.get(folded.replace(".", "-"), {})
        # R also appends ".1" to a name it has seen already: then the name without it is a symbol.
        if len(found) != 1 or folded.rpartition(".")[0] in self._by_symbol:
            return _Match(-1, "unknown")
        (position,) = found
        return _Match(position, "symbol", has_dots_for_dashes=True)

    def _report(self, texts: list[str], matches: list[_Match]) -> GeneMappingReport:
        names_of: dict[int, list[str]] = defaultdict(list)
        for text, match in zip(texts, matches, strict=True):
            if match.position >= 0:
                names_of[match.position].append(text)

        def count(kind: MatchKind) -> int:
            return sum(match.kind == kind for match in matches)

        return GeneMappingReport(
            num_names=len(texts),
            num_vocabulary_genes=len(self),
            num_genes_found=len(names_of),
            num_by_ensembl_id=count("ensembl_id"),
            num_by_symbol=count("symbol"),
            num_by_alias=count("alias"),
            num_case_folded=sum(match.is_case_folded for match in matches),
            num_dots_for_dashes=sum(match.has_dots_for_dashes for match in matches),
            summed={self.symbols[at]: names for at, names in sorted(names_of.items()) if len(names) > 1},
            ambiguous=[text for text, match in zip(texts, matches, strict=True) if match.kind == "ambiguous"],
            unknown=[text for text, match in zip(texts, matches, strict=True) if match.kind == "unknown"],
        )


def is_ensembl_id(name: str) -> bool:
    """Whether a name has the form of an Ensembl gene id, of any species, with or without a version."""
    return _ENSEMBL_ID.fullmatch(name) is not None


def is_no_name(text: str) -> bool:
    """Whether it is what a missing name becomes as text: "nan", "None", "NA", "<NA>" in any case, or nothing."""
    return text.strip().upper() in _NO_NAMES


def read_gene_table(path: Path) -> list[dict[str, str]]:
    """Rows of a gene table: ensembl_id, symbol, aliases ('|' between), in_gene2vec ('0' or '1').

    Raises
    ------
    FileNotFoundError
        There is no such file.
    """
    if not path.is_file():
        msg = (
            f"gene table {path.name} is not in {path.parent}. The code beside a checkpoint has none: load that "
            "checkpoint's own tokenizer with from_pretrained, or install the package (`pip install screformer`)."
        )
        raise FileNotFoundError(msg)
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def load_vocabulary(path: str | os.PathLike[str]) -> GeneVocabulary:
    """Read a vocabulary from its JSON file."""
    return GeneVocabulary.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


@lru_cache(maxsize=1)
def _read_human_v1(path: Path) -> GeneVocabulary:
    rows = read_gene_table(path)
    aliases = {row["ensembl_id"]: row["aliases"].split("|") if row["aliases"] else [] for row in rows}
    # Aliases are compared over all coding genes, those that Gene2vec does not know included.
    by_alias = _index_folded((alias, at) for at, some in enumerate(aliases.values()) for alias in some)
    kept = sorted((row for row in rows if row["in_gene2vec"] == "1"), key=lambda row: row["ensembl_id"])
    return GeneVocabulary(
        [row["ensembl_id"] for row in kept],
        symbols=[row["symbol"] for row in kept],
        aliases=[aliases[row["ensembl_id"]] for row in kept],
        ambiguous_names=[alias for alias, found in by_alias.items() if len(found) > 1],
        name="human-v1",
    )


def _index_folded(names: Iterable[tuple[str, int]]) -> dict[str, dict[int, list[str]]]:
    """Upper-cased name -> position -> the spellings seen."""
    index: dict[str, dict[int, list[str]]] = {}
    for name, position in names:
        index.setdefault(name.upper(), {}).setdefault(position, []).append(name)
    return index


def _bare_id(name: str) -> str:
    match = _ENSEMBL_ID.fullmatch(name)
    return match.group(1).upper() if match else name


def _as_text(name: object) -> str:
    if isinstance(name, bytes):
        return name.decode("utf-8").strip()
    if not isinstance(name, str):
        msg = (
            f"gene_names: every name must be a string, got {name!r} of type {type(name).__name__}. "
            "Pass symbols or Ensembl ids, such as adata.var_names or a column of adata.var."
        )
        raise TypeError(msg)
    return name.strip()


def _examples(names: list[str], total: int) -> str:
    if total == 0:
        return "none"
    return f"{total} ({', '.join(names[:5])}{', ...' if total > 5 else ''})"
