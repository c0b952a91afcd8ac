"""scReformer-BERT: a Reformer that reads every gene of a cell.

``import screformer`` is light: nothing heavy is imported until a name is used. It makes transformers' Auto classes know
the model type ``screformer``, so that ``AutoModel.from_pretrained(folder)`` needs no ``trust_remote_code``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .auto_classes import register_with_transformers

if TYPE_CHECKING:
    from .configuration_screformer import ScReformerConfig
    from .modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM, ScReformerModel
    from .tokenization.gene_vocabulary import GeneVocabulary
    from .tokenization.tokenization_screformer import ScReformerTokenizer

__version__ = "0.1.0"

_MODULE_OF = {
    "GeneVocabulary": ".tokenization.gene_vocabulary",
    "ScReformerConfig": ".configuration_screformer",
    "ScReformerForCellClassification": ".modeling_screformer",
    "ScReformerForMaskedLM": ".modeling_screformer",
    "ScReformerModel": ".modeling_screformer",
    "ScReformerTokenizer": ".tokenization.tokenization_screformer",
}

__all__ = [
    "GeneVocabulary",
    "ScReformerConfig",
    "ScReformerForCellClassification",
    "ScReformerForMaskedLM",
    "ScReformerModel",
    "ScReformerTokenizer",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(import_module(_MODULE_OF[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_with_transformers()
