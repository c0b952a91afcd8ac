"""Examples of README and documentation: run as they are written, in a folder that holds what they say it holds."""

import re
import shlex
import shutil
from typing import NamedTuple

from typer.testing import CliRunner

from screformer.cli import app

TINY = ["--config_overrides", "hidden_size=8", "num_hidden_layers=1", "--max_steps", "1", "--use_cpu"]
# The same lines with less to compute: one step, a narrow model where one is made, few cells, and one process.
SHORTER = {
    "corpus": ["--workers", "1"],
    "pretrain": TINY,
    "finetune": TINY[3:],
    "distill": TINY,
    "explain": ["--num-cells", "2", "--num-background", "4", "--points", "2"],
    "perturb": ["--null", "2", "--max-cells", "4"],
    "benchmark --suite": ["--system", "majority_class", "--workers", "1"],
}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code: its language and its text."""

    language: str
    text: str


def code_blocks(text):
    """Return the blocks of a Markdown text in order."""
    return [Block(*found) for found in _BLOCK.findall(text)]


def lay_out(quickstart, folder):
    """Put the results of a quickstart into a folder, and beside them its cells and its cells without labels."""
    shutil.copytree(quickstart, folder / "quickstart")
    shutil.copy(quickstart.parent / "cells.h5ad", folder / "cells.h5ad")
    shutil.copy(quickstart / "new_cells.h5ad", folder / "new_cells.h5ad")
    return folder


def run_line(line):
    """Run a command line of `screformer`, with less to compute."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "screformer", line
    shorter = SHORTER.get(arguments[0], SHORTER.get(" ".join(arguments[:2]), []))
    result = CliRunner().invoke(app, [*arguments, *shorter])
    assert result.exit_code == 0, (line, result.output, result.exception)


def run_python(text, source, names):
    """Run a block of Python in a namespace."""
    exec(compile(text, source, "exec"), names)
