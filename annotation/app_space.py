"""The web page as a Hugging Face Space: a folder with all that a Space needs, ready to be uploaded."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from screformer.annotation.app import DEFAULT_UPLOAD_MB, check_gradio

MODEL_FOLDER = "model"
# Spaces forward this port, of every address.
SPACE_HOST, SPACE_PORT = "0.0.0.0", 7860
PYTHON_VERSION = "3.11"
# What a checkpoint needs to be loaded, besides its weights; the records of its training stay at home.
MODEL_FILES = ("config.json", "genes.json", "tokenizer_config.json")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")

APP = '''"""The page of this Space. To see it at home: python app.py"""

from pathlib import Path

from screformer.annotation.app import serve

if __name__ == "__main__":
    serve({model}, host="{host}", port={port}, max_upload_mb={max_upload_mb}, announce=print)
'''

README = """---
{front_matter}---

# {title}

Give a file of raw counts, in which rows are cells, and get it back with a cell type and a probability for every cell.
Uploads and results are removed when the page is closed.

`requirements.txt` asks for the package from PyPI. For a version that is not there, put its wheel into this folder and
name the file in `requirements.txt` instead.
"""


def write_space(folder: str | Path, model: str | Path, *, max_upload_mb: int = DEFAULT_UPLOAD_MB) -> str:
    """Write the folder, and return what to do with it.

    Parameters
    ----------
    folder
        New, or empty.
    model
        Checkpoint folder, which is copied, or Hub id, which the Space loads.
    max_upload_mb
        The largest file that the page takes.

    Raises
    ------
    FileExistsError
        `folder` holds something.
    FileNotFoundError
        `model` is a folder that lacks a file of a checkpoint.
    ImportError
        Gradio, whose version the Space is told, is not installed.
    """
    check_gradio()
    target, source = Path(folder), Path(model)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"folder: {target} exists and is no empty folder; choose another")
    is_local = source.is_dir()
    parts = _find_parts(source) if is_local else []
    target.mkdir(parents=True, exist_ok=True)
    if is_local:
        (target / MODEL_FOLDER).mkdir()
        for part in parts:
            shutil.copyfile(part, target / MODEL_FOLDER / part.name)
    where = f'Path(__file__).parent / "{MODEL_FOLDER}"' if is_local else repr(str(model))
    app = APP.format(model=where, host=SPACE_HOST, port=SPACE_PORT, max_upload_mb=max_upload_mb)
    if not is_local:
        app = app.replace("from pathlib import Path\n\n", "")
    front_matter = _front_matter(None if is_local else str(model))
    text = yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True)
    (target / "app.py").write_text(app, encoding="utf-8")
    (target / "README.md").write_text(README.format(front_matter=text, title=front_matter["title"]), encoding="utf-8")
    (target / "requirements.txt").write_text(f"screformer[app]>={version('screformer')}\n", encoding="utf-8")
    return f"{target} is ready. Upload it: hf upload NAME/SPACE {target} --repo-type space"


def _find_parts(checkpoint: Path) -> list[Path]:
    weights = [path for pattern in WEIGHTS for path in sorted(checkpoint.glob(pattern))]
    missing = [name for name in MODEL_FILES if not (checkpoint / name).is_file()]
    if missing or not weights:
        lacks = ", ".join([*missing, *([] if weights else [WEIGHTS[0]])])
        raise FileNotFoundError(f"model: {checkpoint} lacks {lacks}; give a whole checkpoint")
    return [*(checkpoint / name for name in MODEL_FILES), *weights]


def _front_matter(hub_id: str | None) -> dict[str, Any]:  # Any: YAML
    """Return what a Space reads at the top of its README."""
    facts: dict[str, Any] = {
        "title": "Cell types for your cells",
        "emoji": "🔬",
        "colorFrom": "blue",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": PYTHON_VERSION,
        "app_file": "app.py",
        "short_description": "Cell types for a file of raw counts",
        "license": "apache-2.0",
    }
    return facts if hub_id is None else facts | {"models": [hub_id]}
