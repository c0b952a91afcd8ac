"""Parts of an HTML page that is complete in itself: sections, tables, figures. All text that is given is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from screformer.train.result_files import written_aside

TEMPLATE = "report_template.html"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Number(str):
    """Text of a number, aligned to the right."""


class Score(float):
    """A share from 0 to 1, shown with a bar."""


def write_page(path: str | Path, title: str, body: str) -> Path:
    """Write an HTML file that needs no other file and no network, and return its path."""
    template = Template(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    target = Path(path)
    with written_aside(target) as aside:
        aside.write_text(template.substitute(title=escape(title), body=body), encoding="utf-8")
    return target


def section(heading: str, body: str, *, anchor: str = "") -> str:
    """Return HTML under a heading, which `anchor` makes a target of links; nothing where there is none."""
    target = f' id="{escape(anchor)}"' if anchor else ""
    return f"<section{target}>\n<h2>{escape(heading)}</h2>\n{body}\n</section>" if body else ""


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, name: str, note: str = "", style: str = ""
) -> str:
    """Return a table whose first column names the rows, under a note.

    Parameters
    ----------
    columns
        Headings.
    rows
        Text, `Number` or `Score`.
    name
        What a screen reader calls it.
    note
        Sentences over it.
    style
        Class of the table.
    """
    body = [list(row) for row in rows]
    is_number = [
        index > 0 and all(isinstance(row[index], (Number, Score)) for row in body) for index in range(len(columns))
    ]
    classes = [' class="number"' if number else "" for number in is_number]
    # An empty corner is a cell, not a header of nothing.
    head = "".join(
        f'<th scope="col"{style_of}>{escape(column)}</th>' if column else "<td></td>"
        for column, style_of in zip(columns, classes, strict=True)
    )
    lines = "\n".join(
        f'<tr><th scope="row">{escape(str(title))}</th>{"".join(map(_cell, values))}</tr>' for title, *values in body
    )
    whole = (
        f'<table class="{style}" aria-label="{escape(name)}">\n<thead>\n<tr>{head}</tr>\n</thead>\n'
        f"<tbody>\n{lines}\n</tbody>\n</table>"
    )
    # Not a <caption>: that is as wide as the table, and on a phone would have to be scrolled to be read.
    return (f'<p class="soft">{escape(note)}</p>\n' if note else "") + scrollable(whole, name)


def scrollable(content: str, name: str) -> str:
    """Return `content` in a box that scrolls sideways on a phone, with the keyboard too."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}">\n{content}\n</div>'


def figure(path: str | Path, caption: str, alt_text: str) -> str:
    """Return a PNG file as a figure that holds its bytes.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is no PNG, or has no alt text.
    """
    image = Path(path).read_bytes()
    if not image.startswith(PNG_SIGNATURE):
        raise ValueError(f"figure {str(path)!r} is not a PNG file; save it as PNG")
    if not alt_text.strip():
        raise ValueError(f"figure {str(path)!r} has no alt_text; say in words what it shows")
    data = base64.b64encode(image).decode("ascii")
    picture = scrollable(f'<img src="data:image/png;base64,{data}" alt="{escape(alt_text)}">', caption)
    return f"<figure>\n{picture}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def bullets(lines: Sequence[str]) -> str:
    """Return a list; nothing for none."""
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>" if lines else ""


def _cell(value: object) -> str:
    if isinstance(value, Score):
        bar = f'<span class="bar" aria-hidden="true"><span style="width:{100 * value:.1f}%"></span></span>'
        return f'<td class="number">{value:.3f}{bar}</td>'
    style = ' class="number"' if isinstance(value, Number) else ""
    return f"<td{style}>{escape(str(value))}</td>"
