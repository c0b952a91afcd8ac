"""Using a trained model on new cells."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from screformer.annotation.annotate import AnnotationSummary, annotate, annotate_file
    from screformer.annotation.class_explanation import ExplainOptions
    from screformer.annotation.embed import EmbeddingSummary, embed_file
    from screformer.annotation.explain import Explanation, explain_file
    from screformer.annotation.gene_interactions import GeneInteractions, TypeInteractions, find_gene_interactions
    from screformer.annotation.interaction_files import InteractionSummary, interactions_file
    from screformer.annotation.label_tree import LabelTree
    from screformer.annotation.perturb import PerturbationResult, perturb
    from screformer.annotation.recalibration import calibrate_checkpoint
    from screformer.annotation.trained_model import load_classifier, load_encoder

_HOMES = {
    "AnnotationSummary": "annotate",
    "annotate": "annotate",  # also the module's name, which is called all the same
    "annotate_file": "annotate",
    "calibrate_checkpoint": "recalibration",
    "EmbeddingSummary": "embed",
    "embed_file": "embed",
    "Explanation": "explain",
    "ExplainOptions": "class_explanation",
    "explain_file": "explain",
    "GeneInteractions": "gene_interactions",
    "TypeInteractions": "gene_interactions",
    "find_gene_interactions": "gene_interactions",
    "InteractionSummary": "interaction_files",
    "interactions_file": "interaction_files",
    "LabelTree": "label_tree",
    "load_classifier": "trained_model",
    "load_encoder": "trained_model",
    "PerturbationResult": "perturb",
    "perturb": "perturb",  # as annotate
}
__all__ = [  # noqa: RUF022 - grouped by module
    "AnnotationSummary",
    "annotate",
    "annotate_file",
    "calibrate_checkpoint",
    "EmbeddingSummary",
    "embed_file",
    "Explanation",
    "ExplainOptions",
    "explain_file",
    "GeneInteractions",
    "TypeInteractions",
    "find_gene_interactions",
    "InteractionSummary",
    "interactions_file",
    "LabelTree",
    "load_classifier",
    "load_encoder",
    "PerturbationResult",
    "perturb",
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
