"""Gene names become positions: every kind of name, nothing guessed, everything reported."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from screformer.tokenization import GeneVocabulary
from screformer.tokenization.build_gene_table import GencodeGene, build_gene_table, read_gencode, write_gene_table
from screformer.tokenization.gene_vocabulary import is_ensembl_id, load_vocabulary, read_gene_table

HUMAN_V1_SIZE = 17_927
HUMAN_V1_FINGERPRINT = "0a350bf25fa555ea65715cb438f5bdc73ff87960c0f841986c7ffa2e6803d5f2"


@pytest.fixture(scope="module")
def human() -> GeneVocabulary:
    return GeneVocabulary.human_v1()


@pytest.fixture
def small() -> GeneVocabulary:
    return GeneVocabulary(
        ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"],
        symbols=["AAA", "C1orf2", "CCC"],
        aliases=[["OLD1", "SHARED"], ["OLD2", "ENSG00000000009"], ["Shared"]],
        ambiguous_names=["elsewhere"],
        name="small",
    )


def test_human_v1_is_pinned(human: GeneVocabulary) -> None:
    assert len(human) == HUMAN_V1_SIZE
    assert human.fingerprint == HUMAN_V1_FINGERPRINT
    assert human.name == "human-v1"
    assert human.ensembl_ids == sorted(human.ensembl_ids)


def test_human_v1_maps_its_own_ids_and_symbols_to_themselves(human: GeneVocabulary) -> None:
    everyone = np.arange(len(human))
    np.testing.assert_array_equal(human.map_names(human.ensembl_ids).positions, everyone)
    np.testing.assert_array_equal(human.map_names(human.symbols).positions, everyone)


def test_human_v1_knows_immune_markers_and_renamed_genes(human: GeneVocabulary) -> None:
    positions = human.map_names(["CD3D", "PTPRC", "CD45", "SEPT4", "SEPTIN4", "C1ORF112"]).positions
    assert human.symbols[positions[0]] == "CD3D"
    assert positions[1] == positions[2]
    assert positions[3] == positions[4]
    assert (positions >= 0).all()


def test_a_missing_name_is_no_gene(human: GeneVocabulary) -> None:
    assert "NaN" in human.aliases[human.symbols.index("SCN11A")]
    names = ["nan", "NaN", "None", "NA", "na", "<NA>", "", " nan ", "SCN11A"]
    mapping = human.map_names(names)
    assert mapping.positions.tolist() == [-1] * 8 + [human.symbols.index("SCN11A")]
    assert mapping.report.unknown == [name.strip() for name in names[:-1]]


def test_both_copies_of_a_pseudoautosomal_gene_are_one_gene(human: GeneVocabulary) -> None:
    names = ["PLCXD1", "ENSG00000182378", "ENSG00000292344", "ENSG00000182378.15_PAR_Y"]
    positions = human.map_names(names).positions
    assert len(set(positions.tolist())) == 1
    assert human.ensembl_ids[positions[0]] == "ENSG00000182378"


def test_no_alias_is_the_current_symbol_of_another_gene() -> None:
    from pathlib import Path

    import screformer.tokenization.gene_vocabulary as module

    rows = read_gene_table(Path(module.__file__).with_name(module.HUMAN_TABLE))
    symbols = {row["symbol"].upper() for row in rows}
    assert len(rows) == len(symbols) == 20_092
    assert not symbols & {alias.upper() for row in rows for alias in row["aliases"].split("|")}


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("ENSG00000000002", 1),
        ("ENSG00000000002.7", 1),
        ("ensg00000000002.7", 1),
        ("ENSG00000000009", 1),
        ("C1orf2", 1),
        ("C1ORF2", 1),
        ("OLD2", 1),
        ("old2", 1),
        (" AAA ", 0),
        ("SHARED", -1),
        ("Shared", -1),
        ("Elsewhere", -1),
        ("ENSG00000000004", -1),
        ("", -1),
    ],
)
def test_any_kind_of_name_finds_its_gene(small: GeneVocabulary, name: str, position: int) -> None:
    mapping = small.map_names([name])
    assert mapping.positions.dtype == np.int32
    assert mapping.positions.tolist() == [position]


def test_byte_strings_are_names_too(small: GeneVocabulary) -> None:
    assert small.map_names(np.array([b"CCC", b"AAA"])).positions.tolist() == [2, 0]


def test_report_counts_every_name_once(small: GeneVocabulary) -> None:
    names = ["ENSG00000000001.3", "AAA", "OLD1", "c1orf2", "SHARED", "elsewhere", "nonsense"]
    report = small.map_names(names).report
    assert (report.num_by_ensembl_id, report.num_by_symbol, report.num_by_alias) == (1, 2, 1)
    assert report.num_case_folded == 1
    assert report.ambiguous == ["SHARED", "elsewhere"]
    assert report.unknown == ["nonsense"]
    assert report.num_mapped + len(report.ambiguous) + len(report.unknown) == report.num_names == 7
    assert report.num_genes_found == 2
    assert report.summed == {"AAA": ["ENSG00000000001.3", "AAA", "OLD1"]}


def test_report_reads_as_text_and_as_json(small: GeneVocabulary) -> None:
    report = small.map_names([f"unknown{i}" for i in range(50)] + ["AAA"]).report
    assert "1 of 51 gene names mapped" in str(report)
    assert "50 (unknown0, unknown1" in str(report)
    content = json.loads(json.dumps(report.to_dict(max_names=3)))
    assert content["num_unknown"] == 50
    assert len(content["unknown"]) == 3


def test_dots_that_r_writes_for_dashes_are_understood() -> None:
    vocabulary = GeneVocabulary(["ENSG1", "ENSG2", "ENSG3"], symbols=["HLA-A", "ERVK3", "ERVK3-1"])
    mapping = vocabulary.map_names(["HLA.A", "hla.a", "ERVK3.1", "ERVK3-1", "HLA.A.1"])
    assert mapping.positions.tolist() == [0, 0, -1, 2, -1]
    assert mapping.report.num_dots_for_dashes == 2
    assert mapping.report.unknown == ["ERVK3.1", "HLA.A.1"]
    ambiguous = GeneVocabulary(["ENSG1", "ENSG2"], symbols=["NKX6-1", "NKX6-2"], aliases=[["Nkx6.1"], ["NKX6.1"]])
    assert ambiguous.map_names(["NKX6.1"]).report.ambiguous == ["NKX6.1"]


def test_a_current_symbol_wins_over_an_alias() -> None:
    vocabulary = GeneVocabulary(["ENSG1", "ENSG2"], symbols=["AMN", "ABCD1"], aliases=[[], ["AMN"]])
    assert vocabulary.map_names(["AMN"]).positions.tolist() == [0]


def test_a_symbol_of_two_genes_is_ambiguous() -> None:
    vocabulary = GeneVocabulary(["ENSG1", "ENSG2"], symbols=["TWIN", "TWIN"])
    assert vocabulary.map_names(["TWIN"]).report.ambiguous == ["TWIN"]


def test_dictionary_round_trip_is_lossless(small: GeneVocabulary, tmp_path) -> None:
    path = tmp_path / "genes.json"
    path.write_text(json.dumps(small.to_dict()))
    loaded = load_vocabulary(path)
    assert loaded == small
    assert hash(loaded) == hash(small)
    assert loaded.map_names(["SHARED", "OLD2"]).positions.tolist() == [-1, 1]


def test_fingerprint_is_of_the_order_alone(small: GeneVocabulary) -> None:
    ids = small.ensembl_ids
    assert GeneVocabulary(ids, name="other").fingerprint == small.fingerprint
    assert GeneVocabulary(ids[::-1]).fingerprint != small.fingerprint
    assert "small" in repr(small)


def test_subset_keeps_order_names_and_ambiguity(small: GeneVocabulary) -> None:
    part = small.subset(["CCC", "AAA"], name="part")
    assert part.symbols == ["AAA", "CCC"]
    alone = small.subset(["CCC"], name="alone")
    assert alone.map_names(["Shared"]).report.ambiguous == ["Shared"]
    with pytest.raises(ValueError, match="not in the vocabulary 'small'"):
        small.subset(["nonsense"], name="part")


def test_tokenizers_model_gives_the_same_positions(human: GeneVocabulary, tmp_path) -> None:
    from tokenizers import Tokenizer

    path = tmp_path / "word_level.json"
    human.to_tokenizers().save(str(path))
    names = [human.ensembl_ids[5], human.ensembl_ids[0] + ".12", human.ensembl_ids[-1] + ".3_PAR_Y"]
    ids = Tokenizer.from_file(str(path)).encode(" ".join([*names, "ENSG99999999999"])).ids
    assert ids == [*human.map_names(names).positions.tolist(), len(human)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ensembl_ids": []}, "1 to 65535 genes"),
        ({"ensembl_ids": ["A", ""]}, "empty at position 1"),
        ({"ensembl_ids": ["ENSG00000000001.1", "ENSG00000000001.2"]}, "may occur once"),
        ({"ensembl_ids": ["A"], "symbols": ["A", "B"]}, "symbols: one entry a gene"),
        ({"ensembl_ids": ["A"], "aliases": []}, "aliases: one entry a gene"),
    ],
)
def test_a_broken_vocabulary_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneVocabulary(**arguments)


def test_a_broken_file_is_refused(small: GeneVocabulary) -> None:
    with pytest.raises(ValueError, match=r"'symbols', 'aliases'\] missing"):
        GeneVocabulary.from_dict({"name": "x", "ensembl_ids": []})
    changed = small.to_dict() | {"ensembl_ids": ["A", "B", "C"]}
    with pytest.raises(ValueError, match="was changed after it was saved"):
        GeneVocabulary.from_dict(changed)


def test_names_that_are_not_strings_are_refused(small: GeneVocabulary) -> None:
    with pytest.raises(TypeError, match="must be a string, got 3 of type int"):
        small.map_names([3])  # type: ignore[list-item]


def test_a_missing_table_says_what_to_do(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="from_pretrained"):
        read_gene_table(tmp_path / "genes_human.tsv.gz")


def test_ensembl_ids_are_recognised_by_form() -> None:
    assert is_ensembl_id("ENSG00000182378.15_PAR_Y")
    assert is_ensembl_id("ENSMUSG00000000001")
    assert not is_ensembl_id("ENSA")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import screformer.tokenization, sys; print(sorted({'torch', 'numpy', 'anndata'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_names_its_exports() -> None:
    import screformer.tokenization as package

    assert set(dir(package)) == set(package.__all__) == set(package._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


GENCODE = [
    GencodeGene("ENSG00000000007", "TWIN", "protein_coding"),
    GencodeGene("ENSG00000000003", "TWIN", "protein_coding"),
    GencodeGene("ENSG00000000001", "AAA", "protein_coding"),
    GencodeGene("ENSG00000000002", "NONCODING", "lncRNA"),
]
ALIASES = {"AAA": "AAA", "OLD": "AAA", "TWIN": "AAA", "NONCODING": "AAA", "Both": "AAA", "BOTH": "TWIN", "X": "GONE"}


def test_gene_table_states_its_rules() -> None:
    rows, report = build_gene_table(GENCODE, ALIASES, {"old"})
    assert rows == [
        {"ensembl_id": "ENSG00000000001", "symbol": "AAA", "aliases": "Both|OLD", "in_gene2vec": "1"},
        {"ensembl_id": "ENSG00000000003", "symbol": "TWIN", "aliases": "BOTH|ENSG00000000007", "in_gene2vec": "0"},
    ]
    assert report.num_merged_ids == 1
    assert report.num_aliases_are_symbols == 2
    assert report.num_aliases_shared == 1
    assert report.num_aliases_without_gene == 1
    assert (report.num_gene2vec_by_symbol, report.num_gene2vec_by_alias) == (0, 1)


def test_gene_table_by_an_ambiguous_alias_is_not_in_gene2vec() -> None:
    rows, _ = build_gene_table(GENCODE, ALIASES, {"BOTH"})
    assert [row["in_gene2vec"] for row in rows] == ["0", "0"]


def test_gene_table_is_built_from_the_command_line_with_the_same_bytes_each_time(tmp_path) -> None:
    (tmp_path / "gencode.csv.gz").write_bytes(
        gzip.compress("".join(f"{gene.ensembl_id},{gene.symbol},1,100,{gene.biotype}\n" for gene in GENCODE).encode())
    )
    (tmp_path / "aliases.json.gz").write_bytes(gzip.compress(json.dumps(ALIASES).encode()))
    (tmp_path / "names.txt").write_text("TWIN\n")
    command = [sys.executable, "-m", "screformer.tokenization.build_gene_table", "--gencode", "gencode.csv.gz"]
    command += ["--aliases", "aliases.json.gz", "--gene2vec-names", "names.txt", "-o", "table.tsv.gz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert '"num_genes": 2' in done.stderr
    rows = read_gene_table(tmp_path / "table.tsv.gz")
    assert [row["in_gene2vec"] for row in rows] == ["0", "1"]
    write_gene_table(rows, tmp_path / "again.tsv.gz")
    assert (tmp_path / "again.tsv.gz").read_bytes() == (tmp_path / "table.tsv.gz").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_gencode_list_with_an_id_twice_is_refused(tmp_path) -> None:
    (tmp_path / "gencode.csv.gz").write_bytes(gzip.compress(b"ENSG1,A,1,100,lncRNA\nENSG1,B,1,100,lncRNA\n"))
    with pytest.raises(ValueError, match="may occur once"):
        read_gencode(tmp_path / "gencode.csv.gz")
