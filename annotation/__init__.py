"""Using a trained model on new cells."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from screformer.annotation.annotate import AnnotationSummary, annotate_file
    from screformer.annotation.embed import EmbeddingSummary, embed_file

_HOMES = {
    "AnnotationSummary": "annotate",
    "annotate_file": "annotate",
    "EmbeddingSummary": "embed",
    "embed_file": "embed",
}
__all__ = [  # noqa: RUF022 - grouped by module
    "AnnotationSummary",
    "annotate_file",
    "EmbeddingSummary",
    "embed_file",
]


def __getattr__(name: str) -> Any:  # any exported object
    """Import a public name when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    """Name the public objects."""
    return sorted(__all__)
