"""Makes transformers' Auto classes know this package's classes, without importing transformers before the user does.

Registration needs transformers and, for models, torch: seconds of import that `import screformer` must not cost. So
each group of classes is registered when the user's program first loads the Auto module that wants it.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def register_with_transformers() -> None:
    """Register now with the Auto modules that are loaded, and later with each of the others when it is loaded."""
    for name in REGISTRATIONS:
        module = sys.modules.get(name)
        if module is not None:
            REGISTRATIONS[name](module)
    if not any(isinstance(finder, _AutoModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoModuleFinder())


def _register_config(auto: ModuleType) -> None:
    from .configuration_screformer import ScReformerConfig

    auto.AutoConfig.register(ScReformerConfig.model_type, ScReformerConfig, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from .configuration_screformer import AUTO_MAP, ScReformerConfig

    modeling = importlib.import_module(".modeling_screformer", __package__)
    for auto_name, path in AUTO_MAP.items():
        if auto_name != "AutoConfig":
            model_class = getattr(modeling, path.partition(".")[2])
            getattr(auto, auto_name).register(ScReformerConfig, model_class, exist_ok=True)


def _register_tokenizer(auto: ModuleType) -> None:
    from .configuration_screformer import ScReformerConfig
    from .tokenization.tokenization_screformer import ScReformerTokenizer

    auto.AutoTokenizer.register(ScReformerConfig, tokenizer_class=ScReformerTokenizer, exist_ok=True)


REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
}


class _AutoModuleFinder(importlib.abc.MetaPathFinder):
    """Finds transformers' Auto modules as usual, with a loader that registers our classes after loading them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the usual spec with a registering loader for an Auto module, None for all others."""
        if fullname not in REGISTRATIONS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _RegisteringLoader(fullname, spec.origin)
        return spec


class _RegisteringLoader(importlib.machinery.SourceFileLoader):
    """Loads an Auto module, then registers our classes with it."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code, then register."""
        super().exec_module(module)
        REGISTRATIONS[module.__name__](module)
