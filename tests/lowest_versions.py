"""Print the lowest versions that pyproject.toml allows, as constraints for pip: `make test-lowest` installs them.

    python tests/lowest_versions.py [torch==2.13.0 ...]

Arguments replace the lines of their packages.
"""

import re
import sys
import tomllib
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
    required = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    replaced = {line.partition("==")[0]: line for line in instead}
    lines = []
    for requirement in required:
        found = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        assert found is not None, requirement
        lines.append(replaced.get(found[1], f"{found[1]}=={found[2]}"))
    return lines


if __name__ == "__main__":
    print("\n".join(lowest_versions(Path(__file__).parents[1] / "pyproject.toml", sys.argv[1:])))  # noqa: T201
