"""Spellings of a cell type's name: what says nothing is dropped, and what says something stays."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from screformer.annotation.cell_names import is_abbreviation, is_letter, singular, spelling, without_cell


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("T-cell", "t cell"),
        ("Müller  cell", "muller cell"),
        ("Merkel's cell", "merkels cell"),
        ("\N{GREEK SMALL LETTER GAMMA}\N{GREEK SMALL LETTER DELTA} T", "gamma delta t"),
        ("CD4+ T", "cd4 positive t"),
        ("CD4+CD8- T", "cd4 positive cd8 negative t"),
        ("CD4-CD8- T", "cd4 negative cd8 negative t"),
        ("CD8-_T.", "cd8 negative t"),
        ("CD11c-CD123+", "cd11c negative cd123 positive"),
        ("CD4\N{MINUS SIGN} T", "cd4 negative t"),
        ("CD4-positive, alpha-beta T cell", "cd4 positive alpha beta t cell"),
        ("Haematopoietic stem cell", "hematopoietic stem cell"),
        ("...", ""),
    ],
)
def test_spelling(name, words):
    assert spelling(name) == words


@example("\U0001d6e2")  # a mathematical capital alpha: no case of its own
@given(st.text())
def test_spelling_of_a_spelling_is_itself(name):
    words = spelling(name)
    assert spelling(words) == words
    assert spelling(f" {name}_") == spelling(f"_{name} ")


def test_signs_are_never_lost():
    names = ["CD4 T", "CD4+ T", "CD4- T"]
    assert len(set(map(spelling, names))) == 3


def test_plurals():
    assert singular("mast cells") == "mast cell"
    assert singular("bronchus") == "bronchus"
    assert singular("stellate ns") == "stellate ns"


def test_cell_is_left_out_only_where_a_name_is_left():
    assert without_cell("schwann cell") == "schwann"
    for name in ("cell", "nk cell", "beta cell", "b cell", "ec"):
        assert without_cell(name) == ""


def test_letters():
    assert all(map(is_letter, ["b", "b cell", "delta", "delta cell"]))
    assert not any(map(is_letter, ["nk", "pancreatic delta cell", "cell", ""]))


def test_abbreviations():
    assert all(map(is_abbreviation, ["RBC", "pDC", "Th17", "C4"]))
    assert not any(map(is_abbreviation, ["Treg", "mastocyte", "NK cell", "T-cell", "", "Purkinje"]))
