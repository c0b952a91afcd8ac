"""A module that is called as its function: ``screformer.annotation.annotate`` is the name of both."""

from __future__ import annotations

from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """Set as ``sys.modules[__name__].__class__``, it lets a module be called as its function of the same name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:  # Any: the function's own
        """Call the function."""
        function = getattr(self, self.__name__.rpartition(".")[2])
        return function(*arguments, **options)
