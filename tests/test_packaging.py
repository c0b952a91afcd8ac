"""What a user installs: the wheel holds every source and data file, says what it needs, and imports lightly.

The wheel is built from a copy of the source, so that no earlier build's files can slip into it.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import screformer

REPOSITORY = Path(__file__).parents[1]
PACKAGE_OF_FOLDER = {
    "modeling_screformer": "screformer",
    "tokenization": "screformer/tokenization",
    "train": "screformer/train",
    "annotation": "screformer/annotation",
    "benchmarks": "screformer/benchmarks",
    "model_cards": "screformer/model_cards",
}
DATA_FILES = {
    "screformer/py.typed",
    "screformer/tokenization/ATTRIBUTION.md",
    "screformer/annotation/ATTRIBUTION.md",
    "screformer/benchmarks/marker_types.json",
    "screformer/annotation/cell_ontology_2026-03-26.tsv.gz",
    "screformer/annotation/uhaf_2.2.0.csv.gz",
    "screformer/annotation/app_page.css",
    "screformer/tokenization/genes_human.tsv.gz",
    "screformer/tokenization/pancreas_baron2016.h5ad",
    "screformer/train/pretrain-paper.yaml",
    "screformer/train/finetune-paper.yaml",
    "screformer/train/accelerate_fsdp2.yaml",
    "screformer/train/deepspeed_zero2.json",
    "screformer/benchmarks/heart_sources.json",
    "screformer/benchmarks/seurat_transfer.R",
    "screformer/model_cards/template.md",
    "screformer/model_cards/report_template.html",
}
HEAVY = {"anndata", "datasets", "h5py", "matplotlib", "numpy", "pandas", "scipy", "sklearn", "torch", "transformers"}
# Rivals that development does without, where the module has another name than the package.
RIVAL_OF_MODULE = {"scvi": ["scvi-tools"], "xgboost": ["xgboost-cpu"]}
MAX_WHEEL_BYTES = 8 * 2**20
MAX_IMPORT_SECONDS = 0.2
IMPORT_REPEATS = 5


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Return the path of the wheel, built once from a copy of the source."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, source)
    for folder in PACKAGE_OF_FOLDER:
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(source)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = output.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def wheel_names(wheel):
    """Return the names of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="session")
def metadata(wheel):
    """Return the wheel's metadata, by field."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="session")
def unpacked(wheel, tmp_path_factory):
    """Return a folder that an interpreter can import the wheel's package from."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def source_files(folder):
    """Return the files of a source folder that are not leftovers of a tool."""
    return [path for path in (REPOSITORY / folder).iterdir() if path.is_file() and not path.name.startswith(".")]


# What is in it


def test_only_one_name_reaches_site_packages(wheel_names, metadata):
    folders = {name.partition("/")[0] for name in wheel_names}
    assert folders == {"screformer", f"screformer-{metadata['Version']}.dist-info"}


def test_the_wheel_has_the_six_packages_and_no_tests(wheel_names):
    code = {name for name in wheel_names if name.endswith(".py")}
    assert {name.rpartition("/")[0] for name in code} == set(PACKAGE_OF_FOLDER.values())
    assert not [name for name in wheel_names if "test" in name.rpartition("/")[2].split("_")]


@pytest.mark.parametrize("folder", PACKAGE_OF_FOLDER)
def test_every_file_of_a_source_folder_is_in_the_wheel(folder, wheel_names):
    expected = {f"{PACKAGE_OF_FOLDER[folder]}/{path.name}" for path in source_files(folder)}
    assert f"{PACKAGE_OF_FOLDER[folder]}/__init__.py" in expected
    assert expected <= wheel_names


@pytest.mark.parametrize("folder", PACKAGE_OF_FOLDER)
def test_source_folders_are_flat_as_the_list_of_packages_says(folder):
    assert {path.parent.name for path in (REPOSITORY / folder).rglob("*.py")} == {folder}


def test_data_files_and_the_licence_are_in_the_wheel(wheel_names, metadata):
    assert wheel_names >= DATA_FILES
    assert f"screformer-{metadata['Version']}.dist-info/licenses/LICENSE" in wheel_names


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_the_command_is_a_function_of_the_wheel(wheel, wheel_names):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in wheel_names if name.endswith("/entry_points.txt")]
        assert archive.read(name).decode().split("\n", 1) == ["[console_scripts]", "screformer = screformer.cli:main\n"]
        functions = [node.name for node in ast.parse(archive.read("screformer/cli.py")).body if hasattr(node, "name")]
    assert "main" in functions


# What it says


def test_the_version_is_the_same_everywhere(metadata):
    assert metadata["Version"] == screformer.__version__ == version("screformer")


def test_dependencies_have_lower_bounds_only(metadata):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert len(requirements) > 10
    for requirement in requirements:
        assert [bound.operator for bound in requirement.specifier] == [">="], str(requirement)


def imported_packages(path):
    """Return the top-level names of other packages that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"screformer"}


@pytest.mark.parametrize("folder", PACKAGE_OF_FOLDER)
def test_every_imported_package_is_a_dependency(folder, metadata):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    required = {canonicalize_name(each.name) for each in requirements if "dev" not in str(each.marker)}
    distributions = RIVAL_OF_MODULE | packages_distributions()
    for path in (REPOSITORY / folder).glob("*.py"):
        for name in imported_packages(path):
            owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
            assert owners & required, f"{path.name} imports {name}, which pyproject.toml does not name"


# How it imports

LIGHT_IMPORT = """
import json
import sys
import time

sys.path.insert(0, sys.argv[1])
start = time.perf_counter()
import screformer
seconds = time.perf_counter() - start
loaded = {"package": sorted(name.partition(".")[0] for name in sys.modules), "seconds": seconds}
import screformer.annotation, screformer.benchmarks, screformer.model_cards, screformer.tokenization, screformer.train
loaded["packages"] = sorted(name.partition(".")[0] for name in sys.modules)
loaded["file"] = screformer.__file__
print(json.dumps(loaded))
"""

USE_DATA = """
import sys

sys.path.insert(0, sys.argv[1])
import screformer
from screformer.tokenization.example_cells import example_cells_path

assert len(screformer.GeneVocabulary.human_v1()) > 15_000
print(example_cells_path())
"""


def run_from(folder, program):
    """Run a program in a fresh interpreter, elsewhere, with a folder to import from; return what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(
        command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def light_imports(unpacked):
    """Return what several fresh interpreters had loaded after importing the package, and how long it took."""
    return [json.loads(run_from(unpacked, LIGHT_IMPORT)) for _ in range(IMPORT_REPEATS)]


def test_importing_the_package_loads_nothing_heavy(light_imports, unpacked):
    loaded = light_imports[0]
    assert Path(loaded["file"]).is_relative_to(unpacked)
    assert not HEAVY & set(loaded["package"])
    assert not HEAVY & set(loaded["packages"])


def test_importing_the_package_is_fast(light_imports):
    assert min(loaded["seconds"] for loaded in light_imports) < MAX_IMPORT_SECONDS


def test_data_files_are_found_from_the_wheel_alone(unpacked):
    path = Path(run_from(unpacked, USE_DATA).strip())
    assert path.is_relative_to(unpacked)
    assert path.is_file()


@pytest.mark.parametrize("name", screformer.__all__)
def test_public_names_are_listed_and_found(name):
    assert name in dir(screformer)
    # Once loaded, a module of that name would stand in its place.
    assert not (REPOSITORY / "modeling_screformer" / f"{name}.py").exists()
    assert getattr(screformer, name).__module__.startswith("screformer.")


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(AttributeError, match=r"has no attribute 'Nonsense'; it has .*ScReformerModel"):
        screformer.Nonsense  # noqa: B018 - the access is what is tested
