"""What a newcomer has: an environment with torch and transformers alone, or the wheel without a checkout."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import released_checkpoint
from test_hub_round_trip import LOAD

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def fresh_environment(folder, *requirements):
    """Make an environment, and return its folder of programs."""
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    # torch first and alone, so that no other package's requirement picks another build of it.
    for some in (["torch"], requirements):
        subprocess.run([programs / "pip", "install", "--quiet", *constraints, *some], check=True)
    return programs


def test_a_published_folder_needs_nothing_but_torch_and_transformers(tmp_path):
    programs = fresh_environment(tmp_path / "environment", "transformers")
    installed = json.loads(
        subprocess.run([programs / "pip", "list", "--format", "json"], check=True, capture_output=True).stdout
    )
    assert not {"screformer", "anndata", "datasets", "scipy", "scikit-learn"} & {one["name"] for one in installed}
    folder = tmp_path / "published"
    released_checkpoint.unpack(sorted(released_checkpoint.FOLDER.glob("*.zip"))[-1], folder)
    program = LOAD.replace('"me/tiny"', repr(str(folder)))
    program += "\nprint(AutoModel.from_pretrained(name, **options)(**cells).cell_embedding.shape[0])"
    done = subprocess.run(
        [programs / "python", "-c", program, "{}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "2"


def test_the_wheel_runs_the_quickstart_without_a_checkout(tmp_path):
    others = shutil.ignore_patterns(".*", "runs", "quickstart", "build", "dist", "site", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "source", ignore=others)
    building = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tmp_path / "source"]
    subprocess.run(building, check=True)
    shutil.rmtree(tmp_path / "source")
    (wheel,) = tmp_path.glob("*.whl")
    programs = fresh_environment(tmp_path / "environment", wheel)
    done = subprocess.run(
        [programs / "screformer", "quickstart"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    left = {path.name for path in (tmp_path / "quickstart").iterdir()}
    assert {"corpus", "checkpoint", "annotated.h5ad", "metrics.json", "report.html"} <= left
    assert (tmp_path / "quickstart" / "checkpoint" / "README.md").exists()
