"""Recipes: whole sets of training options, as YAML files beside this module, each used by its name.

``pretrain-paper.yaml`` is the recipe ``pretrain-paper`` of the task ``pretrain``. A file's first line is a comment that
says what the recipe is for.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

Task = Literal["pretrain", "finetune"]

FOLDER = Path(__file__).parent


def list_recipes(task: Task) -> dict[str, str]:
    """Return the recipes of a task: name -> what it is for, in one line."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for path in sorted(FOLDER.glob(f"{task}-*.yaml"))
    }


def find_recipe(name: str, task: Task) -> Path:
    """Return the file of a recipe.

    Raises
    ------
    ValueError
        The task has no recipe of that name; the message lists those it has.
    """
    known = list_recipes(task)
    if name in known:
        return FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(name, known, n=1)
    raise ValueError(
        f"{name!r} is no recipe of {task}{f'; did you mean {near[0]}?' if near else '.'} Recipes: {', '.join(known)}. "
        "A file of your own ends in .yaml; every other setting is a flag, as --corpus corpus"
    )
