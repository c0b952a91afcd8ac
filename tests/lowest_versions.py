"""Print the lowest versions that pyproject.toml allows, as constraints for pip: `make test-lowest` installs them.

    python tests/lowest_versions.py [torch==2.13.0 ...]

Arguments replace the lines of their packages.
"""

import re
import sys
from pathlib import Path


def lowest_versions(pyproject: Path, instead: list[str]) -> list[str]:
    """Return a line NAME==VERSION for each required package.

    Parameters
    ----------
    pyproject
        The file.
    instead
        Lines to take in the place of those of the same packages.
    """
    block = re.search(r"^dependencies = \[\n(.*?)^\]", pyproject.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert block is not None
    replaced = {line.partition("==")[0]: line for line in instead}
    required = re.findall(r'^    "([\w-]+)>=([\w.]+)', block[1], re.MULTILINE)
    return [replaced.get(name, f"{name}=={version}") for name, version in required]


if __name__ == "__main__":
    print("\n".join(lowest_versions(Path(__file__).parents[1] / "pyproject.toml", sys.argv[1:])))  # noqa: T201
