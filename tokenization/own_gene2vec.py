"""Our own Gene2vec, from the cells of a corpus or from an edge list, with a record of how it was made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from screformer.tokenization.corpus import Corpus, open_corpus
from screformer.tokenization.gene2vec import SAVED_AS, GeneVectors, read_gene_vectors, save_gene_vectors
from screformer.tokenization.gene_graph import read_gene_graph, walk_graph
from screformer.tokenization.gene_pairs import GenePairs, PairRules, find_gene_pairs
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.tokenization.skip_gram import train_skip_gram

EXAMPLES = """\
examples:
  screformer gene2vec --corpus corpus --output gene2vec.safetensors
  screformer gene2vec --edges 9606.protein.links.v12.0.txt.gz --protein_names 9606.protein.info.v12.0.txt.gz \\
      --min_score 700 --output string.safetensors
  screformer gene2vec --read gene2vec_dim_200_iter_9_w2v.txt --output gene2vec.safetensors
  screformer gene2vec --read gene2vec_16906.npy --genes genes.txt"""


class WalkRules(NamedTuple):
    """How an edge list is read and walked: see `read_gene_graph` and `walk_graph`; `window` is of the skip-gram."""

    min_score: float | None = None
    num_walks: int = 10
    length: int = 40
    return_parameter: float = 1.0
    in_out_parameter: float = 1.0
    window: int = 5


def gene2vec_of_corpus(
    corpus: Corpus,
    rules: PairRules | None = None,
    *,
    group_column: str | None = None,
    memory: float = 1.0,
    num_dimensions: int = 200,
    num_epochs: int = 5,
    seed: int = 2022,
) -> GeneVectors:
    """Train vectors on the gene pairs that are co-expressed in a corpus; for the arguments see `find_gene_pairs`.

    Raises
    ------
    ModuleNotFoundError
        gensim is not installed.
    ValueError
        A number is out of its range, or no pair passes.
    """
    rules = rules or PairRules()
    pairs = find_gene_pairs(corpus, rules, group_column=group_column, memory=memory, seed=seed)
    return gene2vec_of_pairs(corpus, pairs, rules, num_dimensions=num_dimensions, num_epochs=num_epochs, seed=seed)


def gene2vec_of_pairs(
    corpus: Corpus, pairs: GenePairs, rules: PairRules, *, num_dimensions: int, num_epochs: int, seed: int
) -> GeneVectors:
    """Train vectors on pairs that `find_gene_pairs` found in a corpus by these rules."""
    tokenizer = corpus.tokenizer()
    vectors = train_skip_gram(
        pairs.genes, tokenizer.gene_vocabulary, num_dimensions=num_dimensions, num_epochs=num_epochs, seed=seed
    )
    source = {
        "method": "skip-gram over co-expressed gene pairs",
        "tokenizer": {"num_bins": tokenizer.num_bins, "binning": tokenizer.binning},
        "pair_rules": asdict(rules),
        "groups": pairs.describe(),
    }
    return _with_record(vectors, source, num_dimensions=num_dimensions, num_epochs=num_epochs, seed=seed)


def gene2vec_of_edges(
    path: str | Path,
    vocabulary: GeneVocabulary,
    rules: WalkRules | None = None,
    *,
    protein_names: str | Path | None = None,
    num_dimensions: int = 200,
    num_epochs: int = 5,
    seed: int = 2022,
) -> GeneVectors:
    """Train vectors on walks over the graph of an edge list, such as STRING's.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ModuleNotFoundError
        gensim is not installed.
    ValueError
        It is no edge list of known genes, or a number is out of its range.
    """
    rules = rules or WalkRules()
    graph = read_gene_graph(path, vocabulary, min_score=rules.min_score, protein_names=protein_names)
    walks = walk_graph(
        graph,
        num_walks=rules.num_walks,
        length=rules.length,
        return_parameter=rules.return_parameter,
        in_out_parameter=rules.in_out_parameter,
        seed=seed,
    )
    vectors = train_skip_gram(
        walks, vocabulary, num_dimensions=num_dimensions, window=rules.window, num_epochs=num_epochs, seed=seed
    )
    source = {
        "method": "skip-gram over walks on a graph",
        "edges": {"file": Path(path).name, "num_edges": graph.num_edges, "num_lines": graph.num_lines},
        "walk_rules": rules._asdict(),
    }
    return _with_record(vectors, source, num_dimensions=num_dimensions, num_epochs=num_epochs, seed=seed)


def _with_record(vectors: GeneVectors, source: dict[str, Any], **options: int) -> GeneVectors:
    versions = {name: version(name) for name in ("screformer", "gensim", "numpy")}
    return GeneVectors(vectors.genes, vectors.vectors, {**source, **options, "versions": versions})


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, make or read vectors, say how many genes matched, and save them."""
    parser = _make_parser()
    arguments = parser.parse_args(argv)
    if arguments.output is None and arguments.read is None:
        parser.error("--output is needed: where to save the vectors")
    try:
        _check_output(arguments.output, overwrite=arguments.overwrite)
        vectors, vocabulary = _make_vectors(arguments)
        sys.stdout.write(f"{vectors.align(vocabulary).report}\n")
        if arguments.output is not None:
            save_gene_vectors(vectors, arguments.output)
            sys.stdout.write(f"{len(vectors.genes):,} x {vectors.num_dimensions} in {arguments.output}\n")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def _make_vectors(arguments: argparse.Namespace) -> tuple[GeneVectors, GeneVocabulary]:
    options = {"num_dimensions": arguments.dimensions, "num_epochs": arguments.epochs, "seed": arguments.seed}
    if arguments.corpus is not None:
        corpus = open_corpus(arguments.corpus)
        rules = PairRules(
            min_correlation=arguments.min_correlation, num_neighbors=arguments.neighbors, max_cells=arguments.max_cells
        )
        vectors = gene2vec_of_corpus(
            corpus, rules, group_column=arguments.group_column, memory=arguments.memory, **options
        )
        return vectors, corpus.tokenizer().gene_vocabulary
    vocabulary = GeneVocabulary.human_v1()
    if arguments.edges is not None:
        walks = WalkRules(
            min_score=arguments.min_score,
            num_walks=arguments.walks,
            length=arguments.walk_length,
            return_parameter=arguments.p,
            in_out_parameter=arguments.q,
        )
        vectors = gene2vec_of_edges(
            arguments.edges, vocabulary, walks, protein_names=arguments.protein_names, **options
        )
        return vectors, vocabulary
    return read_gene_vectors(arguments.read, gene_list=arguments.genes), vocabulary


def _check_output(output: Path | None, *, overwrite: bool) -> None:
    if output is None:
        return
    if output.suffix not in SAVED_AS:
        msg = f"--output: a name that ends in {' or '.join(SAVED_AS)} is needed, got {output.name}"
        raise ValueError(msg)
    if output.exists() and not overwrite:
        msg = f"--output: {output} exists; choose another name, or replace it with --overwrite"
        raise ValueError(msg)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="screformer gene2vec",
        description="Gene vectors: train our own from co-expression or from an edge list, or read the released ones.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", type=Path, help="Corpus folder: gene pairs that are co-expressed in its cells.")
    source.add_argument("--edges", type=Path, help="Edge list, such as STRING's protein.links: walks on its graph.")
    source.add_argument("--read", type=Path, help="Released vectors: .txt, .txt.gz, .npy or .safetensors.")
    parser.add_argument("-o", "--output", type=Path, help=f"File to write, {' or '.join(SAVED_AS)}.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the file.")
    pairs, walks = PairRules(), WalkRules()
    training = parser.add_argument_group("training")
    training.add_argument("--dimensions", type=int, default=200, help="Length of a vector (default: %(default)s).")
    training.add_argument("--epochs", type=int, default=5, help="Readings of all pairs (default: %(default)s).")
    training.add_argument("--seed", type=int, default=2022, help="(default: %(default)s).")
    _add(
        parser.add_argument_group("from a corpus"),
        ("group_column", str, None, "Column kept in the corpus whose values are correlated apart. Default: the file."),
        ("min_correlation", float, pairs.min_correlation, "The least correlation of a pair (default: %(default)s)."),
        ("neighbors", int, pairs.num_neighbors, "The most pairs a gene starts, in a group (default: %(default)s)."),
        ("max_cells", int, pairs.max_cells, "The most cells of a group looked at (default: %(default)s)."),
        ("memory", float, 1.0, "GB for sums of products (default: %(default)s)."),
    )
    _add(
        parser.add_argument_group("from an edge list"),
        ("protein_names", Path, None, "STRING's protein.info: which genes its proteins are."),
        ("min_score", float, None, "The least score of an edge; STRING calls 700 high confidence."),
        ("walks", int, walks.num_walks, "Walks a gene (default: %(default)s)."),
        ("walk_length", int, walks.length, "Genes a walk (default: %(default)s)."),
        ("p", float, walks.return_parameter, "node2vec's p: above 1, walks seldom turn back (default: %(default)s)."),
        ("q", float, walks.in_out_parameter, "node2vec's q: above 1, walks stay near (default: %(default)s)."),
    )
    released = parser.add_argument_group("released vectors")
    released.add_argument("--genes", type=Path, help="For a .npy: its genes, one a line. Default: NAME.genes.txt.")
    return parser


def _add(group: argparse._ArgumentGroup, *options: tuple[str, type, float | None, str]) -> None:
    for name, kind, default, text in options:
        group.add_argument(f"--{name}", type=kind, default=default, help=text)


if __name__ == "__main__":
    main()
