"""The Cell Ontology: the packaged table, terms that are found with certainty or not at all, and trees of subsets."""

import gzip
import hashlib
import json
import logging
import re
import subprocess
import sys
import zipfile
from importlib.resources import files

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from screformer.annotation.build_cell_ontology import (
    BROAD_LISTS,
    DATA_FOLDER,
    OntologySource,
    build_cell_ontology,
    read_wheel,
)
from screformer.annotation.cell_ontology import (
    CELL_ONTOLOGY_FILE,
    broad_types,
    cell_ontology_tree,
    find_term,
    ontology_ids,
    steps_above,
    suggest_names,
)

PACKAGED_SHA256 = "33c88497941a65ad111c2f4eeee6646023eeb5791f146371e2fffd165f538247"


@pytest.fixture(scope="module")
def rows():
    data = files("screformer.annotation").joinpath(CELL_ONTOLOGY_FILE).read_bytes()
    header, *lines = gzip.decompress(data).decode().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


# The packaged table


def test_the_packaged_table_is_the_one_that_was_built():
    data = files("screformer.annotation").joinpath(CELL_ONTOLOGY_FILE).read_bytes()
    assert len(data) < 100_000
    assert hashlib.sha256(data).hexdigest() == PACKAGED_SHA256
    assert f"`{CELL_ONTOLOGY_FILE}`" in files("screformer.annotation").joinpath("ATTRIBUTION.md").read_text("utf-8")


def test_every_term_is_a_cell_and_every_reference_is_one_of_a_term(rows):
    terms = {row["id"]: row for row in rows if not row["replaced_by"]}
    assert (len(terms), len(rows) - len(terms)) == (3316, 127)
    assert {row["replaced_by"] for row in rows if row["replaced_by"]} <= set(terms)
    assert all(re.fullmatch(r"CL:\d{7}", row["id"]) for row in rows)
    assert len({row["name"] for row in terms.values()}) == len(terms)
    for term_id in terms:
        above = steps_above(term_id)
        assert term_id not in above  # no cycles
        assert ("CL:0000000" in above) == (term_id != "CL:0000000")


def test_broad_types_are_kinds_of_cells():
    names = {find_term(term_id).name for term_id in broad_types()}
    assert len(names) == 79
    assert {"epithelial cell", "hematopoietic cell", "neuron", "lymphocyte"} <= names
    assert not {"cell", "motile cell", "progenitor cell"} & names


def term(name, *above, synonyms=(), replaced_by=None, deprecated=False):
    found = {
        "label": name,
        "ancestors": {f"CL:{number:07d}": steps for number, steps in above},
        "deprecated": deprecated,
    }
    return (
        found
        | ({"synonyms": list(synonyms)} if synonyms else {})
        | ({"replaced_by": replaced_by} if replaced_by else {})
    )


SMALL = {
    "CL:0000000": term("cell"),
    "CL:0000002": term("blood cell", (0, 1), synonyms=["b", "a"]),
    "CL:0000001": term("motile cell", (0, 1)),
    "CL:0000003": term("T cell", (2, 1), (1, 1), (0, 2)),
    "CL:0000004": term("nucleus", (0, 3)),
    "CL:0000005": term("obsolete x", deprecated=True, replaced_by="CL:0000006"),
    "CL:0000006": term("obsolete y", deprecated=True, replaced_by="CL:0000003", synonyms=["z"]),
    "CL:0000007": term("obsolete round", deprecated=True, replaced_by="CL:0000007"),
    "CL:0000008": term("obsolete line", deprecated=True, replaced_by="CLO:0000019"),
}
BROAD = ["CL:0000001", "CL:0000002", "CL:0000006"]


def test_what_the_table_keeps_and_leaves_out():
    rows, report = build_cell_ontology(OntologySource("2000-01-01", SMALL, BROAD))
    assert [tuple(row.values()) for row in rows] == [
        ("CL:0000000", "cell", "", "", "", "0"),
        ("CL:0000001", "motile cell", "", "CL:0000000", "", "0"),
        ("CL:0000002", "blood cell", "a|b", "CL:0000000", "", "1"),
        ("CL:0000003", "T cell", "", "CL:0000001|CL:0000002", "", "0"),
        ("CL:0000005", "obsolete x", "", "", "CL:0000003", "0"),
        ("CL:0000006", "obsolete y", "", "", "CL:0000003", "0"),
    ]
    assert (report.num_terms, report.num_synonyms, report.num_replaced) == (4, 2, 2)
    assert (report.num_left_out, report.num_broad) == (3, 1)
    with pytest.raises(ValueError, match="CL:0000000 has a tab, a line break or"):
        build_cell_ontology(OntologySource("2000-01-01", {"CL:0000000": term("a|b")}, []))


def test_it_is_built_from_the_newest_release_of_a_wheel_with_the_same_bytes_each_time(tmp_path):
    with zipfile.ZipFile(tmp_path / "guide.whl", "w") as wheel:
        for version, terms in (("2001-02-03", SMALL), ("2000-01-01", {})):
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(json.dumps(terms).encode())
            wheel.writestr(f"{DATA_FOLDER}CL-ontology-v{version}.json.zst", sink.getvalue().to_pybytes())
        wheel.writestr(DATA_FOLDER + BROAD_LISTS[0], json.dumps(BROAD[:1]))
        wheel.writestr(DATA_FOLDER + BROAD_LISTS[1], json.dumps(BROAD[1:]))
    assert read_wheel(tmp_path / "guide.whl") == ("2001-02-03", SMALL, BROAD)
    for folder in ("once", "again"):
        (tmp_path / folder).mkdir()
        command = [sys.executable, "-m", "screformer.annotation.build_cell_ontology"]
        command += ["--wheel", "guide.whl", "-o", folder]
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    once, again = (tmp_path / folder / "cell_ontology_2001-02-03.tsv.gz" for folder in ("once", "again"))
    assert once.read_bytes() == again.read_bytes()
    assert (
        gzip.decompress(once.read_bytes()).decode().startswith("id\tname\tsynonyms\tparents\treplaced_by\tis_broad\n")
    )
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("nothing.txt", "")
    with pytest.raises(ValueError, match=r"there is no .*CL-ontology"):
        read_wheel(tmp_path / "empty.whl")


# Names


def test_terms_are_found_by_their_own_id_and_name_and_by_synonyms_of_theirs_alone(rows):
    terms = [row for row in rows if not row["replaced_by"]]
    for row in terms:
        assert find_term(row["id"]).name == find_term(row["name"]).name == row["name"]
    synonyms = [(name, row["id"]) for row in terms for name in row["synonyms"].split("|") if name]
    assert len(synonyms) == 2769
    others = {name: found.name for name, term_id in synonyms if (found := find_term(name)) and found.id != term_id}
    # It is another term's name, which goes before a synonym.
    assert others == {"substantia nigra dopaminergic neuron": "substantia nigra dopaminergic neuron"}
    missed = {name for name, _ in synonyms if find_term(name) is None}
    letters = {"alpha cell", "C cell", "D cell", "G cell", "K cell", "M-cell", "N cell", "P cell"}
    assert letters <= missed
    assert len(missed - letters) == 87
    assert all(re.fullmatch("[A-Za-z0-9]{2,5}", name) for name in missed - letters)
    assert {"EPC", "DC1", "C41", "VIP"} <= missed


@pytest.mark.parametrize(
    ("name", "term_id"),
    [
        ("T cells", "CL:0000084"),
        ("t_cell", "CL:0000084"),
        ("B", ""),
        ("beta", ""),
        ("beta cell", ""),
        ("alpha cell", ""),  # a synonym of a cell of the retina
        ("pancreatic beta cells", "CL:0000169"),
        ("NK cells", "CL:0000623"),
        ("EC", ""),
        ("Lamp5", ""),  # a gene, and a synonym of one of the neurons that have it
        ("Tregs", "CL:0000815"),
        ("Mast", "CL:0000097"),
        ("Endothelial", "CL:0000115"),
        ("neuron cell", "CL:0000540"),
        ("CD14+ Monocytes", "CL:0001054"),
        ("CD4+ T cells", ""),  # the ontology's are alpha-beta T cells, or helper T cells
        ("CD4+ alpha-beta T cells", "CL:0000624"),
        ("CD8+, alpha-beta T cell", "CL:0000625"),
        ("CD4- alpha-beta T cell", ""),
        ("cl_0000084", "CL:0000084"),
        ("http://purl.obolibrary.org/obo/CL_0000084", "CL:0000084"),
        ("CL:0000003", "CL:0000000"),
        ("native cell", "CL:0000000"),
        ("CL:9999999", ""),
        ("fraction C precursor B", ""),  # "cell" is missing, and there is also a fraction C'
        ("", ""),
        ("+", ""),
    ],
)
def test_what_is_not_certain_is_not_found(name, term_id):
    assert ontology_ids([name]) == [term_id]


@given(st.text(max_size=20))
def test_any_text_is_a_term_or_none(name):
    found = find_term(name)
    assert found is None or ontology_ids([found.id]) == [found.id]


def test_suggestions_hold_the_words_first():
    assert suggest_names("ductal")[0] == "pancreatic ductal cell"
    assert "T cell" in suggest_names("T cel")
    assert suggest_names("") == suggest_names("qqqqqqqqqqqq") == []


# Trees


ALL_NAMES = st.sampled_from(
    sorted({find_term(term_id).name for start in ("CL:0000236", "CL:0000169", "CL:0001054", "CL:0000624", "CL:0000636",
            "CL:0000173", "CL:0002079", "CL:0000669", "CL:0000037", "CL:0000160", "CL:0000653", "CL:0000746")
            for term_id in (start, *steps_above(start))})
)  # fmt: skip


@settings(deadline=None)
@given(st.sets(ALL_NAMES, min_size=1, max_size=12), st.sampled_from(["nothing", "broad types", "terms"]), st.data())
def test_every_label_is_in_the_tree_and_every_parent_is_above_it_in_the_ontology(labels, kind, data):
    above = {"nothing": [], "broad types": None, "terms": data.draw(st.lists(ALL_NAMES, max_size=6))}[kind]
    tree = cell_ontology_tree(labels, above=above)
    assert labels <= set(tree.labels)
    assert set(tree.leaves) <= labels
    chosen = {name: find_term(name).id for name in tree.labels}
    for label, parent in tree.parents.items():
        above_it = set(steps_above(chosen[label]))
        in_tree = {name for name in tree.labels if chosen[name] in above_it}
        assert (parent is None) == (not in_tree)
        if parent is not None:
            assert parent in in_tree
            # No other label lies between them.
            assert not any(chosen[parent] in steps_above(chosen[other]) for other in in_tree)
    assert cell_ontology_tree(sorted(labels, reverse=True), above=above).parents == tree.parents


def test_all_terms_make_a_tree_of_direct_parents(rows):
    names = {row["id"]: row["name"] for row in rows if not row["replaced_by"]}
    some = dict(list(names.items())[:300])
    tree = cell_ontology_tree(some.values(), above=())
    parents_of = {row["name"]: {names[term_id] for term_id in row["parents"].split("|") if term_id} for row in rows}
    for label, parent in tree.parents.items():
        if parents_of[label] & set(some.values()):
            assert parent in parents_of[label]


def test_of_several_parents_the_choice_is_the_nearest_and_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="screformer"):
        tree = cell_ontology_tree(["pancreatic D cell", "neuron", "endocrine cell", "pericyte"], above=["mural cell"])
    # Three steps to endocrine cell, four to neuron.
    assert tree.path("pancreatic D cell") == ("endocrine cell", "pancreatic D cell")
    assert caplog.messages == ["pancreatic D cell is below endocrine cell, not below neuron"]
    # Both are one step above, and have two terms above them.
    tree = cell_ontology_tree(["pericyte"], above=["mural cell", "connective tissue cell"])
    assert tree.path("pericyte") == ("connective tissue cell", "pericyte")


def test_labels_keep_their_spelling_and_ids_have_ids_above_them():
    assert cell_ontology_tree(["T Cells"], above=["lymphocyte", "neuron"]).path("T Cells") == ("lymphocyte", "T Cells")
    assert cell_ontology_tree(["CL:0000084"], above=["lymphocyte"]).path("CL:0000084") == ("CL:0000542", "CL:0000084")


def test_labels_that_are_no_terms_are_named_with_what_is_near():
    with pytest.raises(
        ValueError, match=r"labels that are not in .*: 'ductal' \(pancreatic ductal cell.*exclude_labels"
    ):
        cell_ontology_tree(["T cell", "ductal"])
    with pytest.raises(ValueError, match=r"terms that are not in .*: 'xyzw' \("):
        cell_ontology_tree(["T cell"], above=["xyzw"])
    with pytest.raises(ValueError, match=r"the same Cell Ontology term need one name: \{'T cell': 'T cells'\}"):
        cell_ontology_tree(["T cells", "T cell"])
    with pytest.raises(ValueError, match="a label tree needs labels"):
        cell_ontology_tree([])
