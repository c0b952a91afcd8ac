import gzip

import numpy as np
import pytest

from screformer.tokenization.gene_graph import read_gene_graph, walk_graph
from screformer.tokenization.gene_vocabulary import GeneVocabulary

NUM_GENES = 8


@pytest.fixture
def vocabulary():
    return GeneVocabulary(
        [f"ENSG{number:011d}" for number in range(NUM_GENES)], symbols=[f"GENE{number}" for number in range(NUM_GENES)]
    )


def edges_of(graph):
    rows = np.repeat(np.arange(NUM_GENES), np.diff(graph.indptr))
    return {
        (row, column): weight
        for row, column, weight in zip(rows.tolist(), graph.neighbors.tolist(), graph.weights.tolist(), strict=True)
        if row < column
    }


def write(folder, text, name="edges.txt"):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("separator", ["\t", ",", " "])
def test_edges_are_read_in_both_directions_with_their_highest_score(tmp_path, vocabulary, separator):
    lines = [
        "first second score",
        "GENE0 GENE1 0.5",
        "GENE1 GENE0 0.9",
        "GENE2 GENE1 0.2",
        "GENE3 GENE3 1",
        "X GENE1 1",
    ]
    path = write(tmp_path, "\n".join(lines).replace(" ", separator))
    graph = read_gene_graph(path, vocabulary)
    assert edges_of(graph) == {(0, 1): 0.9, (1, 2): 0.2}
    np.testing.assert_array_equal(graph.neighbors, [1, 0, 2, 1])
    assert (graph.num_edges, graph.num_lines, graph.unknown) == (2, 5, ["X"])
    assert str(graph) == "2 edges of 3 genes, from 5 lines; not in the vocabulary: X ..."


def test_two_columns_are_enough(tmp_path, vocabulary):
    path = write(tmp_path, "GENE0\tGENE1\nENSG00000000002.4\tgene1\n")
    assert edges_of(read_gene_graph(path, vocabulary)) == {(0, 1): 1.0, (1, 2): 1.0}


def test_a_file_of_string_is_read_with_its_protein_names(tmp_path, vocabulary):
    links = "protein1 protein2 combined_score\n9606.ENSP1 9606.ENSP2 173\n9606.ENSP2 9606.ENSP1 173\n"
    links += "9606.ENSP2 9606.ENSP3 900\n"
    info = "#string_protein_id\tpreferred_name\tprotein_size\tannotation\n"
    info += "9606.ENSP1\tGENE0\t130\tA \"kinase; 5' end\n9606.ENSP2\tGENE4\t99\t\n9606.ENSP3\tGENE5\t7\tx\n"
    path = tmp_path / "9606.protein.links.v12.0.txt.gz"
    path.write_bytes(gzip.compress(links.encode()))
    names = tmp_path / "9606.protein.info.v12.0.txt.gz"
    names.write_bytes(gzip.compress(info.encode()))
    assert edges_of(read_gene_graph(path, vocabulary, protein_names=names)) == {(0, 4): 173.0, (4, 5): 900.0}
    high = read_gene_graph(path, vocabulary, protein_names=names, min_score=700)
    assert edges_of(high) == {(4, 5): 900.0}
    with pytest.raises(
        ValueError, match=r"unknown are such as \['9606\.ENSP1'.*STRING's proteins need .*--protein-names"
    ):
        read_gene_graph(path, vocabulary)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, r"the first line is ''"),
        ("GENE0\n", {}, r"two names a line are needed.* the first line is 'GENE0'"),
        ("GENE0 GENE1\n", {"min_score": 0.5}, r"min_score=0\.5 needs a third column"),
        ("GENE0 GENE1 0.4\n", {"min_score": 0.5}, r"no edge between two known genes with a score of 0\.5 or more"),
        ("GENE0 GENE1 -1\n", {}, r"scores must be above 0, got -1"),
        ("GENE0 GENE1 1\nGENE0 GENE2 high\n", {}, r"not an edge list: Unable to parse string \"high\""),
        ("GENE0 GENE1 1\nGENE0 GENE2\n", {}, r"scores must be above 0, got nan"),
        ("A B 1\n", {}, r"no edge between two known genes; unknown are such as \['A', 'B'\]"),
    ],
)
def test_what_is_no_edge_list_is_refused(tmp_path, vocabulary, text, options, message):
    with pytest.raises(ValueError, match=message):
        read_gene_graph(write(tmp_path, text), vocabulary, **options)


def test_files_that_are_not_there_or_damaged_are_named(tmp_path, vocabulary):
    with pytest.raises(FileNotFoundError, match=r"path: there is no file .*absent"):
        read_gene_graph(tmp_path / "absent.txt", vocabulary)
    edges = write(tmp_path, "GENE0 GENE1\n")
    with pytest.raises(FileNotFoundError, match=r"protein_names: there is no file .*absent"):
        read_gene_graph(edges, vocabulary, protein_names=tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"protein_names: one\.txt is no table of two columns"):
        read_gene_graph(edges, vocabulary, protein_names=write(tmp_path, "P1\nP2\n", "one.txt"))
    with pytest.raises(ValueError, match=r"edges\.txt\.gz: not an edge list: Not a gzipped file"):
        read_gene_graph(write(tmp_path, "GENE0 GENE1\n", "edges.txt.gz"), vocabulary)


@pytest.fixture
def graph(tmp_path, vocabulary):
    """Two triangles joined by one edge, a weak edge in the second; the last two genes are alone."""
    text = "0 1 1;0 2 1;1 2 1;2 3 1;3 4 1;3 5 1;4 5 0.25"
    lines = [f"GENE{a} GENE{b} {score}" for a, b, score in (edge.split() for edge in text.split(";"))]
    return read_gene_graph(write(tmp_path, "\n".join(lines)), vocabulary)


def test_walks_follow_edges_and_start_everywhere(graph):
    walks = walk_graph(graph, num_walks=3, length=12)
    assert walks.shape == (18, 12)
    assert np.bincount(walks[:, 0]).tolist() == [3] * 6
    edges = edges_of(graph)
    steps = {
        tuple(sorted(step)) for step in zip(walks[:, :-1].ravel().tolist(), walks[:, 1:].ravel().tolist(), strict=True)
    }
    assert steps <= set(edges)


def test_walks_are_the_same_for_the_same_seed_alone(graph):
    first, again, other = (walk_graph(graph, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("p", "q"), [(1, 1), (0.25, 4), (10, 0.5)])
def test_steps_have_the_probabilities_of_node2vec(graph, p, q):
    walks = walk_graph(graph, num_walks=4000, length=6, return_parameter=p, in_out_parameter=q)
    triples = np.stack([walks[:, at : at + 3] for at in range(4)], axis=1).reshape(-1, 3)
    edges = edges_of(graph)
    weight = {**edges, **{(b, a): value for (a, b), value in edges.items()}}
    for before, at in ((2, 3), (4, 3), (4, 5)):
        taken = triples[(triples[:, 0] == before) & (triples[:, 1] == at), 2]
        chances = {
            gene: weight[at, gene] * (1 / p if gene == before else 1 if (before, gene) in weight else 1 / q)
            for gene in range(6)
            if (at, gene) in weight
        }
        for gene, chance in chances.items():
            expected = chance / sum(chances.values())
            # Four standard errors of a share.
            assert abs((taken == gene).mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / len(taken)) + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_walks": 0}, "num_walks: at least 1, got 0"),
        ({"length": 1}, "length: at least 2, got 1"),
        ({"return_parameter": 0}, r"return_parameter: 0\.1 to 10, got 0"),
        ({"in_out_parameter": 11}, r"in_out_parameter: 0\.1 to 10, got 11"),
    ],
)
def test_numbers_are_in_their_range(graph, options, message):
    with pytest.raises(ValueError, match=message):
        walk_graph(graph, **options)
