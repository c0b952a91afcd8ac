"""The notebooks run from top to bottom, and what they push arrives."""

from pathlib import Path

import pytest
from hub_stand_in import WRITER, running_hub

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorials" / "finetune_and_share.ipynb"
# The same with less to compute, and somewhere to push to.
SHORTER = {
    "read_h5ad(example_cells_path())": "read_h5ad(example_cells_path())[::30].copy()",
    '"my_model", None, 2': '"my_model", "me/pancreas", 0.1',
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_notebook_fine_tunes_and_pushes(small_quickstart, monkeypatch, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for given, instead in SHORTER.items():
        assert sum(given in cell.source for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(given, instead)
    with running_hub() as hub:
        for name, value in {
            "HF_ENDPOINT": hub.address, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "IPYTHONDIR": str(tmp_path),
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        (tmp_path / "quickstart").symlink_to(small_quickstart)
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
        _, files = hub.at("me/pancreas", "main")
    assert {"model.safetensors", "modeling_screformer.py", "genes.json"} <= set(files)
    assert "alpha" in str(notebook.cells[-1].outputs)
