"""Values and tables as Markdown that shows what was recorded, whatever characters are in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def plain(text: object) -> str:
    """Return `text` on one line, with what Markdown or HTML would act on escaped."""
    line = " ".join(str(text).split())
    # An underscore within a word is an underscore; at its edge it would be emphasis.
    return re.sub(r"([\\`*~|\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def flat_rows(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Give (name, value) of every recorded value, nested names joined by a dot; empty ones are left out."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat_rows(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value, start=1):
                yield from flat_rows(item, f"{prefix}{name}.{index}.") if isinstance(item, Mapping) else ()
        elif value is not None and value not in ("", [], {}):
            yield plain(prefix + name), format_value(value)


def format_value(value: object) -> str:
    """Return a recorded value as a reader wants it: four significant digits, lists joined, paths by their last name."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    # A path of the machine that trained it says nothing to others, and may say too much.
    text = str(value)
    return plain(Path(text).name if Path(text).is_absolute() else text)


def format_share(value: float | None) -> str:
    """Return a number from 0 to 1 with three decimals, a dash for None."""
    return "-" if value is None else f"{value:.3f}"


def join_names(names: Iterable[str]) -> str:
    """Return names in a row, escaped."""
    return ", ".join(map(plain, names))


def bullets(lines: Iterable[str]) -> str:
    """Return a list, one line an item."""
    return "\n".join(f"- {line}" for line in lines)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and the others are numbers if every cell reads like one."""
    body = [tuple(row) for row in rows]
    is_number = [
        index > 0 and all(re.fullmatch(r"[\d.,]+|-", row[index]) for row in body) for index in range(len(columns))
    ]
    rule = ["---:" if number else "---" for number in is_number]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *body])
