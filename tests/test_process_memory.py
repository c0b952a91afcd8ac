"""What the command line's processes keep of freed memory."""

import os
import platform
import subprocess
import sys

import pytest

HOLE = """
import sys
from pathlib import Path

from screformer.train.process_memory import return_large_blocks


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


done = return_large_blocks() if sys.argv[1] == "called" else None
large = bytearray(30_000_000)
del large  # from now on glibc, left to itself, takes blocks below this size from its heap
start = resident()
blocks = [bytearray(b"x" * 12_000_000) for _ in range(4)]
above = bytearray(b"x" * 100_000)  # small, and stays: the heap cannot shrink below it
blocks.clear()
print(done, resident() - start)
"""


def run_child(argument, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", HOLE, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**environment, **variables})
    answer, kept = done.stdout.split()
    return answer, int(kept)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_go_back_to_the_system():
    _, hoarded = run_child("left")
    answer, kept = run_child("called")
    assert answer == "True"
    assert hoarded > 20_000_000  # or there is nothing to mend
    assert kept < 2_000_000


def test_the_user_decides():
    answer, _ = run_child("called", MALLOC_MMAP_THRESHOLD_="1000000")
    assert answer == "False"


def test_another_c_library_is_left_alone(monkeypatch):
    from screformer.tokenization import freed_memory
    from screformer.train import process_memory

    monkeypatch.delenv(freed_memory.THRESHOLD_VARIABLE, raising=False)
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda _: object())
    assert process_memory.return_large_blocks() is False


def test_a_corpus_is_built_by_processes_that_give_back_columns(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from screformer.cli import app
    from screformer.tokenization import example_cells_path, freed_memory

    calls = []
    monkeypatch.setattr(freed_memory, "return_columns", lambda: calls.append(1))
    arguments = ["corpus", str(example_cells_path()), "--output", str(tmp_path / "corpus"), "--workers", "1"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert calls


@pytest.mark.parametrize(("command", "is_called"), [("embed", True), ("benchmark", False)])
def test_commands_return_memory_and_benchmarks_take_the_process_as_it_is(monkeypatch, command, is_called):
    from typer.testing import CliRunner

    from screformer.cli import app
    from screformer.train import process_memory

    calls = []
    monkeypatch.setattr(process_memory, "return_large_blocks", lambda: calls.append(command))
    CliRunner().invoke(app, [command])
    assert bool(calls) is is_called
