"""How names of cell types are compared: which differences of spelling say nothing, and which might."""

from __future__ import annotations

import re
import unicodedata

# "GREEK SMALL LETTER ALPHA" and on; Unicode writes "lamda".
GREEK = {
    chr(code): unicodedata.name(chr(code)).split()[-1].lower().replace("md", "mbd") for code in range(0x3B1, 0x3CA)
}
BRITISH = {"haem": "hem", "leuco": "leuko", "oesoph": "esoph", "oestro": "estro", "fibre": "fiber", "tumour": "tumor"}
APOSTROPHES = re.compile("['\N{RIGHT SINGLE QUOTATION MARK}`]")
# "CD4+", "CD4-CD8- T cell", "CD4- T cell", but not "T-cell" and "alpha-beta".
POSITIVE = re.compile(r"(?<=[a-z0-9)])\+")
NEGATIVE = re.compile(r"(?<=[a-z0-9)])-(?![a-z0-9])")
NEGATIVE_BEFORE_MARKER = re.compile(r"\b(cd\d+[a-z]?)-(?=cd\d)")
# With fewer letters a name without "cell" is an abbreviation: "EC" is an endothelial cell more often than an EC cell.
MIN_LETTERS_WITHOUT_CELL = 4


def spelling(name: str) -> str:
    """Return the name in words: without case, accents and punctuation; + and - after a marker are words.

    British spellings become American ones, as the Cell Ontology has them.

    Examples
    --------
    >>> spelling("CD4+, alpha-beta_T-cell")
    'cd4 positive alpha beta t cell'
    """
    text = _fold(_fold(unicodedata.normalize("NFKD", name)))  # what one of the two makes, the other may change
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")
    text = APOSTROPHES.sub("", "".join(letter for letter in text if not unicodedata.combining(letter)))
    for letter, word in GREEK.items():
        text = text.replace(letter, f" {word} ")
    text = NEGATIVE_BEFORE_MARKER.sub(r"\1 negative ", text)
    text = NEGATIVE.sub(" negative ", POSITIVE.sub(" positive ", text))
    for british, american in BRITISH.items():
        text = text.replace(british, american)
    return " ".join(re.findall(r"[^\W_]+", text))


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKD", text.casefold())


def singular(words: str) -> str:
    """Return a `spelling` with its plurals in -s made singular.

    Examples
    --------
    >>> singular("memory b cells"), singular("mucus")
    ('memory b cell', 'mucus')
    """
    return " ".join(_singular_word(word) for word in words.split())


def _singular_word(word: str) -> str:
    is_plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word[:-1] if is_plural else word


def without_cell(words: str) -> str:
    """Return a `singular` without "cell" at its end; "" where too little is left to be a name.

    Examples
    --------
    >>> without_cell("mast cell"), without_cell("mast"), without_cell("ec cell")
    ('mast', 'mast', '')
    """
    rest = words.removesuffix(" cell")
    enough = sum(letter.isalpha() for letter in rest) >= MIN_LETTERS_WITHOUT_CELL
    return rest if enough and not is_letter(rest) and rest != "cell" else ""


def is_abbreviation(name: str) -> bool:
    """Whether a name is one word with a digit or several capitals.

    Such words mean one cell in one organ, another in the next, and may be genes or numbers of clusters.

    Examples
    --------
    >>> is_abbreviation("EPC"), is_abbreviation("DC1"), is_abbreviation("Treg"), is_abbreviation("NK cell")
    (True, True, False, False)
    """
    has_marks = any(letter.isdigit() for letter in name) or sum(letter.isupper() for letter in name) > 1
    return has_marks and re.fullmatch(r"[^\W_]+", name) is not None


def is_letter(words: str) -> bool:
    """Whether a name is one letter, Latin or Greek, with or without "cell".

    Several organs have an alpha cell, and more have a D cell.

    Examples
    --------
    >>> is_letter("beta cell"), is_letter("t"), is_letter("nk cell")
    (True, True, False)
    """
    rest = words.removesuffix(" cell")
    return len(rest) == 1 or rest in GREEK.values()
