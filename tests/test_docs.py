"""The documentation is true: its examples run, and what it names exists: files, links, options, messages, results."""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import anndata
import pytest
import yaml
from documented_examples import code_blocks, lay_out, run_line, run_python
from typer.main import get_command
from typer.testing import CliRunner

from screformer.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
AT_THE_TOP = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
TOP_PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in AT_THE_TOP}
RUN = [name for name, text in PAGES.items() if {"python", "bash"} & {block.language for block in code_blocks(text)}]
# What pages take from earlier ones: a folder, and what a quickstart has made of the kind.
MADE_BY_QUICKSTART = {"corpus": "corpus", "pretrained": "pretrained", "finetuned": "checkpoint"}
SOURCES = ("modeling_screformer", "tokenization", "train", "annotation", "benchmarks", "model_cards")
EXPORTING = ("screformer", "screformer.tokenization", "screformer.annotation")
# Options of other programs, which the documentation names in prose.
FOREIGN_OPTIONS = {"--machine_rank", "--node_rank", "--deepspeed"}


def anchor_of(heading):
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


# Examples


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # without a GPU, by default
@pytest.mark.parametrize("name", RUN)
def test_the_examples_of_a_page_run(name, small_quickstart, tmp_path, monkeypatch):
    run_page(name, lay_out(small_quickstart, tmp_path), monkeypatch)


def run_page(name, folder, monkeypatch):
    few = anndata.read_h5ad(folder / "new_cells.h5ad")[::5].copy()
    few.write_h5ad(folder / "new_cells.h5ad")
    few.write_h5ad(folder / "quickstart" / "new_cells.h5ad")
    for part, source in MADE_BY_QUICKSTART.items():
        if not re.search(rf"(-o|--output_dir) {part}\b", PAGES[name]):
            shutil.copytree(folder / "quickstart" / source, folder / part)
    monkeypatch.chdir(folder)
    names = {"__name__": "__main__"}
    for block in code_blocks(PAGES[name]):
        if block.language == "python":
            run_python(block.text, name, names)
        elif block.language == "bash":
            for line in block.text.splitlines():
                run_line(line)


@pytest.mark.parametrize("name", [name for name in PAGES if name not in RUN])
def test_blocks_are_of_known_kinds_and_only_our_commands_run(name):
    assert {block.language for block in code_blocks(PAGES[name])} <= {"console", "text"}


@pytest.mark.parametrize("name", RUN)
def test_bash_blocks_hold_our_commands_alone(name):
    blocks = code_blocks(PAGES[name])
    assert {block.language for block in blocks} <= {"python", "bash", "console", "text"}
    for block in blocks:
        if block.language == "bash":
            assert all(line.startswith("screformer ") for line in block.text.splitlines()), block.text


# Commands and their options


@cache
def known_options(words):
    """Return the options of a command, as its own help says them; None if there is no such command."""
    command = get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            return None
    if command.add_help_option:
        return {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
    shown = CliRunner().invoke(app, [*words, "--help_all"]).output
    if "--help_all" not in shown:
        shown = CliRunner().invoke(app, [*words, "--help"]).output
    found = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown))
    return found | {"--" + option[2:].replace("_", "-") for option in found if option.startswith("--")}


class Line(NamedTuple):
    """A command line of ours: the command's words, what follows them, and all options."""

    words: tuple[str, ...]
    rest: list[str]
    options: list[str]


def read_line(line):
    """Return a line's command and options, or None of a line that is no command of ours."""
    try:
        parts = shlex.split(line, comments=True)
    except ValueError:
        return None
    start = next((at for at, part in enumerate(parts) if re.fullmatch(r"screformer(\.train\.\w+)?", part)), None)
    if start is None:
        return None
    module, rest, words = parts[start].rpartition(".")[2], parts[start + 1 :], ()
    if module != "screformer":
        words = (module,)
    while rest and known_options((*words, rest[0])) is not None:
        words, rest = (*words, rest[0]), rest[1:]
    return Line(words, rest, [part.partition("=")[0] for part in rest if re.match(r"--?[a-z]", part)])


def command_lines(text):
    blocks = [block for block in code_blocks(text) if block.language in ("bash", "console")]
    yield from (line for block in blocks for line in block.text.splitlines())
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_options_exist(name):
    for line in command_lines(PAGES[name]):
        found = read_line(line)
        if found is None or "import" in line:
            continue
        assert found.words or not found.rest or found.rest[0].isupper(), f"no command: {line}"
        assert not set(found.options) - (known_options(found.words) | {"--help"}), line


@cache
def all_options():
    names = ["pretrain", "finetune", "distill", "evaluate", "gene2vec"]
    names += [name for name in get_command(app).commands if name not in (*names, "benchmark")]
    inner = [("benchmark", "report"), ("benchmark", "heart"), ("benchmark",)]
    return set().union(*(known_options(words) for words in [*((name,) for name in names), *inner]))


@pytest.mark.parametrize("name", PAGES)
def test_options_that_are_named_alone_exist(name):
    for code in re.findall(r"`(--[a-z][^`\n]*)`", PAGES[name]):
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
            assert option in all_options() | FOREIGN_OPTIONS, option


def test_a_wrong_option_or_command_would_be_seen():
    assert read_line("screformer annotate a.h5ad --max_errors 1") == (
        ("annotate",), ["a.h5ad", "--max_errors", "1"], ["--max_errors"]
    )  # fmt: skip
    assert "--max_errors" not in known_options(("annotate",))
    assert {"--corpus", "--save_steps"} <= known_options(("finetune",))
    assert read_line("accelerate launch -m screformer.train.pretrain --corpus a").words == ("pretrain",)
    assert read_line("screformer anotate a.h5ad").words == ()


# Links, pages and results


@pytest.mark.parametrize("name", [*PAGES, *TOP_PAGES])
def test_links_lead_somewhere(name):
    text = PAGES.get(name) or TOP_PAGES[name]
    here = DOCS / name if name in PAGES else ROOT / name
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        path = (here.parent / target).resolve() if target else here
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(anchor_of, headings), f"{target}#{anchor}"


@pytest.mark.parametrize("name", [*PAGES, *TOP_PAGES])
def test_named_files_of_the_repository_exist(name):
    text = PAGES.get(name) or TOP_PAGES[name]
    for path in re.findall(rf"`((?:{'|'.join((*SOURCES, 'tests', 'docs'))})/[\w./*-]*)`", text):
        assert list(ROOT.glob(path.rstrip("/"))), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE)) <= set(targets)


def nav_pages(entry):
    if isinstance(entry, str):
        return [entry]
    inner = entry.values() if isinstance(entry, dict) else entry
    return [page for one in inner for page in nav_pages(one)]


def test_every_page_is_in_the_navigation_once():
    listed = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(PAGES)


def test_the_first_page_lists_the_extras():
    [table] = re.findall(
        r"^\[project.optional-dependencies\]\n(.*?)^\[project",
        (ROOT / "pyproject.toml").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    extras = set(re.findall(r"^(\w+) = \[", table, flags=re.MULTILINE))
    assert set(re.findall(r"^\| `(\w+)` \|", PAGES["index.md"], flags=re.MULTILINE)) == extras - {"dev", "docs"}


def test_the_reference_has_every_exported_name():
    pages = "\n".join(text for name, text in PAGES.items() if name.startswith("reference/"))
    named = re.findall(r"^::: screformer\.([\w.]+)\.(\w+)$", pages, flags=re.MULTILINE)
    for module, name in named:
        assert hasattr(import_module(f"screformer.{module}"), name), (module, name)
    for package in EXPORTING:
        assert set(import_module(package).__all__) <= {name for _, name in named}


@pytest.mark.parametrize("name", PAGES)
def test_included_results_exist(name):
    for file, heading in re.findall(r"<!-- result: (\S+?)(?: \| (.+?))? -->", PAGES[name]):
        text = (ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8")
        assert f"\n## {heading}\n" in text if heading else "\n| " in text.partition("\n## ")[0], (file, heading)


def test_the_comparison_has_no_score_that_was_typed():
    assert not re.findall(r"\d\.\d", PAGES["comparison.md"])


# Messages


@cache
def source_messages():
    """Return every string of the source, with … for what is filled in."""
    found = []
    for path in (path for folder in SOURCES for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("%s", "…").replace("%d", "…"))
    return found


def is_in_source(message):
    pattern = re.compile(".*?".join(map(re.escape, message.strip().strip("…").split("…"))), flags=re.DOTALL)
    return any(pattern.search(text) for text in source_messages())


def test_messages_are_those_of_the_source():
    blocks = [block for block in code_blocks(PAGES["troubleshooting.md"]) if block.language == "text"]
    messages = [" ".join(block.text.split()) for block in blocks]
    assert len(messages) > 10
    assert [message for message in messages if not is_in_source(message)] == []
    assert not is_in_source("counts: … values are sour")


# The site


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))), reason='needs ".[docs]"'
)
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    commands = pages[tmp_path / "site" / "reference" / "command-line" / "index.html"]
    assert "--max-error" in commands
    assert "--label_tree" in commands
    assert "Logistic regression" in pages[tmp_path / "site" / "comparison" / "index.html"]
    # Of three parameters with one description, the last has its own type.
    reference = pages[tmp_path / "site" / "reference" / "tokenization" / "index.html"]
    assert re.search(r"<code>allow</code>.{0,200}<code>.{0,200}Sequence", reference, flags=re.DOTALL)
    fetched = (
        r"<(script|img|iframe)[^>]*\ssrc=\"?(https?:)?//|<link[^>]*(stylesheet|preconnect)[^>]*\shref=\"?(https?:)?//"
    )
    assert [path for path, page in pages.items() if re.search(fetched, page)] == []
