"""What a page says, as blocks that are written alike as Markdown and as HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from screformer.model_cards import html_page, markdown

Style = Literal["wins", "loses", "even"]


class Heading(NamedTuple):
    """A heading; one of the second level begins a section, one of the third is within it."""

    text: str
    level: Literal[2, 3] = 2


class Text(NamedTuple):
    """A paragraph; what stands between backticks is code."""

    text: str


class Bullets(NamedTuple):
    """A list of sentences; what stands between backticks is code."""

    lines: Sequence[str]


class Cells(NamedTuple):
    """A table whose first column names the rows; `name` is for who cannot see it."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """A PNG file, the sentence under it, and what it shows in words for who cannot see it."""

    path: Path
    caption: str
    alt_text: str


class Outcome(NamedTuple):
    """Sentences that say who is ahead, coloured by that in HTML."""

    style: Style
    lines: Sequence[str]


Block: TypeAlias = Heading | Text | Bullets | Cells | Picture | Outcome


def blocks_as_markdown(title: str, blocks: Sequence[Block], *, folder: Path) -> str:
    """Return a page as Markdown; pictures are linked relative to `folder`, where it is to be."""
    return "\n\n".join([f"# {_inline_markdown(title)}", *(_markdown(block, folder) for block in blocks)]) + "\n"


def write_blocks_as_html(path: str | Path, title: str, blocks: Sequence[Block]) -> Path:
    """Write a page that needs no other file and no network, with its contents after the first section; return its path.

    Raises
    ------
    FileNotFoundError
        A picture does not exist.
    ValueError
        A picture is no PNG or has no alt text.
    """
    sections: list[tuple[str, list[str]]] = [("", [])]
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            sections.append((block.text, []))
        else:
            sections[-1][1].append(_html(block))
    named = [(number, heading) for number, (heading, _) in enumerate(sections) if heading]
    links = "\n".join(f'<li><a href="#section{number}">{escape(heading)}</a></li>' for number, heading in named)
    contents = f'<nav aria-label="Contents">\n<ul>\n{links}\n</ul>\n</nav>' if len(named) > 1 else ""
    body = [
        html_page.section(sections[number][0], "\n".join(sections[number][1]), anchor=f"section{number}")
        for number, _ in named
    ]
    body = ["\n".join(sections[0][1]), *body[:1], html_page.section("Contents", contents), *body[1:]]
    return html_page.write_page(path, title, "\n".join(body))


def _markdown(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_inline_markdown(block.text)}"
    if isinstance(block, Text):
        return _inline_markdown(block.text)
    if isinstance(block, Bullets):
        return markdown.bullets(map(_inline_markdown, block.lines))
    if isinstance(block, Cells):
        return cells_as_markdown(block)
    if isinstance(block, Outcome):
        return "\n".join(f"> {_inline_markdown(line)}  " for line in block.lines)
    return f"![{markdown.plain(block.alt_text)}]({block.path.relative_to(folder).as_posix()})\n\n" + _inline_markdown(
        block.caption
    )


def cells_as_markdown(block: Cells) -> str:
    """Return a table as Markdown."""
    return markdown.table(
        [markdown.plain(column) for column in block.columns], [list(map(markdown.plain, row)) for row in block.rows]
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h3>{escape(block.text)}</h3>"
    if isinstance(block, Text):
        return f"<p>{_inline_html(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>\n" + "\n".join(f"<li>{_inline_html(line)}</li>" for line in block.lines) + "\n</ul>"
    if isinstance(block, Cells):
        rows = [
            [row[0], *(html_page.Number(text) if _is_number(text) else text for text in row[1:])] for row in block.rows
        ]
        return html_page.table(block.columns, rows, name=block.name)
    if isinstance(block, Outcome):
        lines = "\n".join(f"<p>{_inline_html(line)}</p>" for line in block.lines)
        return f'<div class="verdict {block.style}">\n{lines}\n</div>'
    return html_page.figure(block.path, block.caption, block.alt_text)


def _is_number(text: str) -> bool:
    return bool(re.match(r"[-+]?[\d.]|-$|$", text))


def _inline_html(text: str) -> str:
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _inline_markdown(text: str) -> str:
    parts = text.split("`")
    return "".join(f"`{part}`" if index % 2 else _plain(part) for index, part in enumerate(parts))


def _plain(text: str) -> str:
    """Return text escaped, with the spaces that stand between it and code."""
    before, after = (" " if edge.isspace() else "" for edge in (text[:1], text[-1:]))
    return f"{before}{markdown.plain(text)}{after}" if text.strip() else text
