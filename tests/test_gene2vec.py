import gzip
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from screformer.tokenization.gene2vec import GeneVectors, names_of, read_gene_vectors, save_gene_vectors
from screformer.tokenization.gene_vocabulary import GeneVocabulary

GENES = ["CD3D", "CD3E", "INS"]
VECTORS = np.array([[1, 2.5, -3], [4, 5, 6e-3], [-7, 8, 9]], np.float32)


@pytest.fixture
def vocabulary():
    return GeneVocabulary(
        ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"],
        symbols=["INS", "CD3D", "GCG"],
        aliases=[["IDDM"], ["T3D", "OKT3"], []],
    )


def matrix_text(genes=GENES, vectors=VECTORS):
    """As Gene2vec's generateMatrix.py writes it: a tab, then numbers with a space after each."""
    return "".join(
        f"{gene}\t{''.join(f'{value} ' for value in row)}\n" for gene, row in zip(genes, vectors, strict=True)
    )


def word2vec_text(genes=GENES, vectors=VECTORS):
    lines = [f"{gene} {' '.join(map(str, row))}\n" for gene, row in zip(genes, vectors, strict=True)]
    return f"{len(genes)} {vectors.shape[1]}\n" + "".join(lines)


def assert_same(found, genes=GENES, vectors=VECTORS):
    assert found.genes == genes
    assert found.vectors.dtype == np.float32
    np.testing.assert_array_equal(found.vectors, vectors)


@pytest.mark.parametrize("text", [matrix_text(), word2vec_text()])
def test_both_released_text_layouts_are_read_compressed_or_not(tmp_path, text):
    (tmp_path / "vectors.txt").write_text(text)
    assert_same(read_gene_vectors(tmp_path / "vectors.txt"))
    (tmp_path / "vectors.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert_same(read_gene_vectors(tmp_path / "vectors.txt.gz"))


def test_an_array_is_read_with_its_list_of_genes(tmp_path):
    np.save(tmp_path / "gene2vec_16906.npy", VECTORS.astype(np.float64))
    (tmp_path / "names.txt").write_text("\n".join(GENES))
    assert_same(read_gene_vectors(tmp_path / "gene2vec_16906.npy", gene_list=tmp_path / "names.txt"))


@pytest.mark.parametrize("ending", [".safetensors", ".npy"])
def test_what_is_saved_is_read_again(tmp_path, ending):
    save_gene_vectors(GeneVectors(GENES, VECTORS, {"seed": 3}), tmp_path / "new" / f"own{ending}")
    found = read_gene_vectors(tmp_path / "new" / f"own{ending}")
    assert_same(found)
    assert found.record == ({"seed": 3} if ending == ".safetensors" else {})
    assert not list((tmp_path / "new").glob("*.part"))


def test_vectors_are_laid_out_in_the_order_of_the_vocabulary(vocabulary):
    aligned = GeneVectors(["CD3D", "nonsense", "ENSG00000000001.7"], VECTORS).align(vocabulary)
    np.testing.assert_array_equal(aligned.vectors[:2], VECTORS[[2, 0]])
    assert np.isnan(aligned.vectors[2]).all()
    report = aligned.report
    assert (report.num_vectors, report.num_genes, report.num_matched, report.num_used) == (3, 3, 2, 2)
    assert (report.without_vector, report.unknown) == (["GCG"], ["nonsense"])
    assert "2 of the 3 genes (66.7%) have a vector, from 2 of 3 vectors; 1 names are not" in str(report)


def test_a_current_symbol_wins_over_former_names_which_are_averaged(vocabulary):
    both = GeneVectors(["T3D", "cd3d", "OKT3"], VECTORS).align(vocabulary)
    np.testing.assert_array_equal(both.vectors[1], VECTORS[1])
    assert (both.report.num_used, both.report.num_averaged) == (1, 0)
    former = GeneVectors(["T3D", "OKT3"], VECTORS[:2]).align(vocabulary)
    np.testing.assert_allclose(former.vectors[1], VECTORS[:2].mean(axis=0), rtol=1e-6)
    assert (former.report.num_used, former.report.num_averaged) == (2, 1)
    assert "1 genes take the mean of several former names" in str(former.report)


def test_vectors_of_another_species_or_kind_are_refused(vocabulary):
    with pytest.raises(ValueError, match=r"none of 3 names is in the vocabulary 'custom'; they begin with \['Cd79a'"):
        GeneVectors(["Cd79a", "Foo", "Bar"], VECTORS).align(vocabulary)


@pytest.mark.parametrize(
    ("genes", "vectors", "message"),
    [
        (GENES[:2], VECTORS, r"one row a gene is needed, got shape \(3, 3\) for 2 genes"),
        (GENES, VECTORS[0], r"got shape \(3,\)"),
        ([], VECTORS[:0], r"got shape \(0, 3\)"),
        (["CD3D", "INS", "CD3D"], VECTORS, r"each name once and none empty, got \['CD3D'\]"),
        (["CD3D", "INS", ""], VECTORS, r"got \[''\]"),
        (GENES, np.where(VECTORS == 5, np.nan, VECTORS), r"1 rows hold NaN or infinity, of \['CD3E'\]"),
        (GENES, np.where(VECTORS == 9, -np.inf, VECTORS), r"of \['INS'\]"),
    ],
)
def test_names_and_vectors_must_fit(genes, vectors, message):
    with pytest.raises(ValueError, match=message):
        GeneVectors(genes, vectors)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"vectors.txt: no vectors"),
        ("3 3\n", r"no vectors"),
        ("CD3D\t1 2\nCD3E\t1\n", r"line 2 \(CD3E\) has 1 numbers, 2 as before are needed"),
        ("2 2\nCD3D 1 2\nCD3E 1\n", r"line 3 \(CD3E\) has 1 numbers"),
        ("CD3D\nCD3E\n", r"line 1 \(CD3D\) has 0 numbers, at least one are needed"),
        ("CD3D\t1 two\n", r"line 1 is not GENE v1 v2 \.\.\.: could not convert string to float: 'two'"),
        ("3 2\nCD3D 1 2\n", r"the header says 3 x 2, the lines hold 1 x 2; cut short\?"),
        ("CD3D\t1 nan\n", r"hold NaN"),
        ("CD3D\t1 2\nCD3D\t1 2\n", r"each name once"),
    ],
)
def test_damaged_text_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "vectors.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_gene_vectors(tmp_path / "vectors.txt")


def test_files_that_are_something_else_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.txt"):
        read_gene_vectors(tmp_path / "absent.txt")
    (tmp_path / "w2v.bin").write_bytes(b"3 3\nCD3D \xff\xfe\x80")
    with pytest.raises(ValueError, match=r"w2v\.bin: not text; .*convert a binary word2vec file"):
        read_gene_vectors(tmp_path / "w2v.bin")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(matrix_text().encode())[:-9])
    with pytest.raises(ValueError, match=r"cut\.txt\.gz: "):
        read_gene_vectors(tmp_path / "cut.txt.gz")
    (tmp_path / "plain.txt.gz").write_text(matrix_text())
    with pytest.raises(ValueError, match=r"plain\.txt\.gz: Not a gzipped file"):
        read_gene_vectors(tmp_path / "plain.txt.gz")
    (tmp_path / "list.txt").write_text(matrix_text())
    with pytest.raises(ValueError, match=r"only a \.npy file has its genes elsewhere, list\.txt names its own"):
        read_gene_vectors(tmp_path / "list.txt", gene_list=tmp_path / "list.txt")


def test_arrays_without_fitting_names_are_refused(tmp_path):
    path = tmp_path / "vectors.npy"
    np.save(path, VECTORS)
    with pytest.raises(FileNotFoundError, match=r"no names of its own and there is no .*vectors\.genes\.txt"):
        read_gene_vectors(path)
    (tmp_path / "vectors.genes.txt").write_text("CD3D\nCD3E\n")
    with pytest.raises(ValueError, match=r"3 rows, but vectors\.genes\.txt has 2 genes"):
        read_gene_vectors(path)
    np.save(path, np.arange(3))
    with pytest.raises(ValueError, match=r"an array of fractions.*got int64 of shape \(3,\)"):
        read_gene_vectors(path)


def test_a_pickle_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    np.save(tmp_path / "vectors.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "vectors.genes.txt").write_text("CD3D\n")
    with pytest.raises(ValueError, match=r"vectors\.npy: Object arrays cannot be loaded"):
        read_gene_vectors(tmp_path / "vectors.npy")


def test_safetensors_of_something_else_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": VECTORS}, path)
    with pytest.raises(ValueError, match=r"the tensor 'vectors' and the metadata 'genes' are needed.*\['weight'\]"):
        read_gene_vectors(path)
    save_file({"vectors": VECTORS}, path, metadata={"genes": json.dumps(GENES)})
    assert_same(read_gene_vectors(path))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_gene_vectors(path)


def test_other_endings_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.safetensors or \.npy is needed, got vectors\.pkl"):
        save_gene_vectors(GeneVectors(GENES, VECTORS), tmp_path / "vectors.pkl")
    assert not list(tmp_path.iterdir())


def test_our_own_vectors_are_named_by_ensembl_ids(vocabulary):
    assert names_of(vocabulary, [2, 0]) == ["ENSG00000000003", "ENSG00000000001"]
