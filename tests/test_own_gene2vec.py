import numpy as np
import pytest
from small_corpus import NUM_GENES, make_corpus
from typer.testing import CliRunner

from screformer.cli import app
from screformer.tokenization.corpus import open_corpus
from screformer.tokenization.gene2vec import GeneVectors, read_gene_vectors, save_gene_vectors
from screformer.tokenization.gene_pairs import PairRules
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.tokenization.own_gene2vec import WalkRules, gene2vec_of_corpus, gene2vec_of_edges

LOOSE = PairRules(min_correlation=0.2, min_z=2, min_cells=2)


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("own"))


def run(*arguments):
    return CliRunner().invoke(app, ["gene2vec", *map(str, arguments)])


def test_vectors_of_a_corpus_bring_genes_of_a_type_together(corpus_folder):
    pytest.importorskip("gensim")
    corpus = open_corpus(corpus_folder)
    vectors = gene2vec_of_corpus(corpus, LOOSE, num_dimensions=8, num_epochs=200)
    aligned = vectors.align(corpus.tokenizer().gene_vocabulary).vectors
    directions = aligned / np.linalg.norm(aligned, axis=1, keepdims=True)
    similarity = directions[:12] @ directions[:12].T  # six genes of either type
    assert np.nanmean(similarity[:6, :6]) > np.nanmean(similarity[:6, 6:]) + 0.1
    assert vectors.record["pair_rules"]["min_correlation"] == 0.2
    assert vectors.record["groups"][0]["num_cells"] == 48
    assert vectors.record["tokenizer"] == {"num_bins": 6, "binning": "log2"}


def test_vectors_of_edges_bring_neighbors_together(tmp_path):
    pytest.importorskip("gensim")
    vocabulary = GeneVocabulary([f"ENSG{number:011d}" for number in range(NUM_GENES)])
    edges = [(first, second) for part in (0, 6) for first in range(part, part + 6) for second in range(part, first)]
    text = "".join(f"{vocabulary.ensembl_ids[first]}\t{vocabulary.ensembl_ids[second]}\n" for first, second in edges)
    (tmp_path / "edges.tsv").write_text(text)
    vectors = gene2vec_of_edges(
        tmp_path / "edges.tsv", vocabulary, WalkRules(length=10), num_dimensions=8, num_epochs=20
    )
    directions = vectors.vectors / np.linalg.norm(vectors.vectors, axis=1, keepdims=True)
    similarity = directions @ directions.T
    assert similarity[:6, :6].mean() > similarity[:6, 6:].mean() + 0.1
    assert vectors.record["edges"] == {"file": "edges.tsv", "num_edges": 30, "num_lines": 30}
    assert vectors.record["walk_rules"]["length"] == 10


def test_the_command_trains_on_a_corpus(corpus_folder, tmp_path):
    pytest.importorskip("gensim")
    options = ("--dimensions", 4, "--epochs", 1)
    path = tmp_path / "own.safetensors"
    failed = run("--corpus", corpus_folder, "-o", path, *options, "--min_correlation", 2)
    assert failed.exit_code == 1
    assert "min_correlation: 0 to 1, got 2.0" in failed.output
    assert not list(tmp_path.iterdir())
    made = run("--corpus", corpus_folder, "-o", path, *options, "--group_column", "donor")
    assert made.exit_code == 0, made.output
    assert "of the 40 genes" in made.output
    assert read_gene_vectors(path).num_dimensions == 4


def test_the_command_walks_on_edges(tmp_path):
    pytest.importorskip("gensim")
    (tmp_path / "links.txt").write_text("protein1 protein2 score\nP1 P2 900\nP2 P3 800\nP1 P3 100\n")
    (tmp_path / "info.txt").write_text("#id\tname\nP1\tCD3D\nP2\tCD3E\nP3\tINS\n")
    arguments = ("--edges", tmp_path / "links.txt", "--protein_names", tmp_path / "info.txt", "--min_score", 700)
    made = run(*arguments, "-o", tmp_path / "own.npy", "--dimensions", 4, "--epochs", 1)
    assert made.exit_code == 0, made.output
    assert "3 of the 17,9" in made.output
    assert (tmp_path / "own.genes.txt").read_text().count("ENSG") == 3


def test_the_command_reads_and_converts(tmp_path):
    (tmp_path / "released.txt").write_text("CD3D\t1 2 \nNOSUCHGENE\t3 4 \n")
    said = run("--read", tmp_path / "released.txt")
    assert said.exit_code == 0, said.output
    assert "1 of the 17,9" in said.output
    assert "NOSUCHGENE" in said.output
    assert run("--read", tmp_path / "released.txt", "-o", tmp_path / "new.safetensors").exit_code == 0
    assert read_gene_vectors(tmp_path / "new.safetensors").genes == ["CD3D", "NOSUCHGENE"]
    again = run("--read", tmp_path / "released.txt", "-o", tmp_path / "new.safetensors")
    assert (again.exit_code, "exists; choose another name" in again.output) == (1, True)
    assert run("--read", tmp_path / "released.txt", "-o", tmp_path / "new.safetensors", "--overwrite").exit_code == 0


def test_an_array_is_read_with_its_genes(tmp_path):
    save_gene_vectors(GeneVectors(["CD3D", "INS"], np.ones((2, 3), np.float32)), tmp_path / "own.npy")
    (tmp_path / "own.genes.txt").rename(tmp_path / "names.txt")
    assert run("--read", tmp_path / "own.npy").exit_code == 1
    assert "2 of the 17,9" in run("--read", tmp_path / "own.npy", "--genes", tmp_path / "names.txt").output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "one of the arguments --corpus --edges --read is required"),
        (("--corpus", "a", "--edges", "b"), 2, "not allowed with argument --corpus"),
        (("--corpus", "absent"), 2, "--output is needed"),
        (("--corpus", "absent", "-o", "new.txt"), 1, "ends in .safetensors or .npy is needed, got new.txt"),
        (("--corpus", "absent", "-o", "new.npy"), 1, "absent is not a corpus"),
        (("--read", "absent.txt"), 1, "there is no file absent.txt"),
    ],
)
def test_mistakes_are_one_message(arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output


def test_help_has_examples():
    result = run("--help")
    assert result.exit_code == 0
    assert "screformer gene2vec --corpus corpus" in result.output
