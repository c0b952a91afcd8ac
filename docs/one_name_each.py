"""For the reference: parameters that share a description in a docstring get one each, with their own types."""

import re
from typing import Any

from griffe import Extension, Object

_NAMES = re.compile(r"(?P<indent> *)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+)")
_UNDERLINE = re.compile(r" *-{3,}")
_SECTIONS = ("Parameters", "Attributes")


class OneNameEach(Extension):
    """Splits ``first, second`` with a description below into two entries with the same description."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:  # Any: griffe's own
        """Rewrite the docstring of a function, class or module."""
        if obj.docstring is not None:
            obj.docstring.value = split_names(obj.docstring.value)


def split_names(docstring: str) -> str:
    """Return a docstring of numpy's form in which each entry of its parameters and attributes has one name."""
    lines = docstring.splitlines()
    written: list[str] = []
    section, at = "", 0
    while at < len(lines):
        line = lines[at]
        if at + 1 < len(lines) and _UNDERLINE.fullmatch(lines[at + 1]):
            section = line.strip()
        found = _NAMES.fullmatch(line) if section in _SECTIONS else None
        end = at + 1
        if found is None:
            written.append(line)
        else:
            deeper = len(found["indent"]) + 1
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" " * deeper)):
                end += 1
            for name in found["names"].split(", "):
                written += [found["indent"] + name, *lines[at + 1 : end]]
        at = end
    return "\n".join(written)
