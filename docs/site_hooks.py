"""What the site takes from the source when it is built, so that no page repeats it by hand.

The package by its import name, for the reference; the help of every command; tables and pages of measured results; and
a page for each source file that a page links to, so that links work in the repository and on the site alike.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

if TYPE_CHECKING:
    import click
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS_MARK = "<!-- commands -->"
RESULT_MARK = re.compile(r"<!-- result: (?P<file>\S+?)(?: \| (?P<heading>.+?))? -->")
LINK = re.compile(r"\]\((?P<path>\.\.?/[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
PACKAGE_FOLDER = re.compile(r'^"(screformer[\w.]*)" = "(\w+)"$', re.MULTILINE)  # in pyproject.toml
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".md": "markdown"}
HELP_COLUMNS = "100"

_package_folders: list[Path] = []


@event_priority(100)  # before mkdocstrings reads where the package is
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay the folders out as the package that they become, and let reference and commands be read from there."""
    folder = _link_package()
    _package_folders.append(folder)
    sys.path.insert(0, str(folder))
    config.plugins["mkdocstrings"].config["handlers"].setdefault("python", {})["paths"] = [str(folder)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and figures of results, and a page for each source file that is linked to."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in (".md", ".png"):
            source = path.relative_to(RESULTS.parent).as_posix()
            files.append(File(source, str(RESULTS.parent), config.site_dir, config.use_directory_urls))
    for path in sorted({target for page in pages for target in _linked_sources(page)}):
        title, language = path.relative_to(ROOT).as_posix(), LANGUAGES[path.suffix]
        content = f"# {title}\n\n~~~~{language}\n{path.read_text(encoding='utf-8')}~~~~\n"
        files.append(File.generated(config, _page_of(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in commands and results, and let links out of the documentation lead to pages of the site."""
    if page.file.abs_src_path is None or not Path(page.file.abs_src_path).is_relative_to(config.docs_dir):
        return markdown
    if COMMANDS_MARK in markdown:
        markdown = markdown.replace(COMMANDS_MARK, "\n".join(_command_sections()))
    markdown = RESULT_MARK.sub(lambda found: read_result(found["file"], found["heading"]), markdown)
    here, docs = Path(page.file.abs_src_path), Path(config.docs_dir)

    def rewrite(found: re.Match[str]) -> str:
        target = (here.parent / found["path"]).resolve()
        if target.is_relative_to(docs) or not target.is_relative_to(ROOT):
            return found[0]
        relative = os.path.relpath(docs / _page_of(target), here.parent)
        return f"]({Path(relative).as_posix()}{found['anchor'] or ''})"

    return LINK.sub(rewrite, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Remove the links."""
    while _package_folders:
        shutil.rmtree(_package_folders.pop())


def read_result(name: str, heading: str | None = None) -> str:
    """Return a section of a file of measured results without its heading, or what is before the first section.

    Raises
    ------
    ValueError
        The file has no such section.
    """
    parts = re.split(r"^## (.+)\n", (RESULTS / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = {None: parts[0].partition("\n")[2], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    if heading not in sections:
        raise ValueError(f"{name} has no section {heading!r}; it has {[each for each in sections if each]}")
    return sections[heading].strip()


def _link_package() -> Path:
    """Return a new folder in which the package can be imported by its name."""
    folder = Path(tempfile.mkdtemp(prefix="screformer-docs-"))
    for package, source in PACKAGE_FOLDER.findall((ROOT / "pyproject.toml").read_text(encoding="utf-8")):
        target = folder.joinpath(*package.split("."))
        if "." in package:
            target.symlink_to(ROOT / source, target_is_directory=True)
            continue
        target.mkdir()
        for path in (ROOT / source).iterdir():
            (target / path.name).symlink_to(path, target_is_directory=path.is_dir())
    return folder


def _linked_sources(page: Path) -> Iterator[Path]:
    for found in LINK.finditer(page.read_text(encoding="utf-8")):
        target = (page.parent / found["path"]).resolve()
        is_page = any(target.is_relative_to(folder) for folder in (ROOT / "docs", RESULTS))
        if target.suffix in LANGUAGES and target.is_relative_to(ROOT) and target.is_file() and not is_page:
            yield target


def _page_of(path: Path) -> str:
    """Return where on the site a file of the repository is, relative to the documentation's folder."""
    if path.is_relative_to(RESULTS):
        return path.relative_to(RESULTS.parent).as_posix()
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def _command_sections() -> Iterator[str]:
    """Give a heading and the help of every command, as the command itself says it."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from screformer.cli import app

    runner = CliRunner()
    for words in _command_names(get_command(app)):
        shown = runner.invoke(app, [*words, "--help"], env={"COLUMNS": HELP_COLUMNS, "NO_COLOR": "1"})
        if shown.exit_code != 0:
            raise RuntimeError(f"screformer {' '.join(words)} --help ended with {shown.exit_code}: {shown.output}")
        yield f"{'#' * (len(words) + 1)} screformer {' '.join(words)}\n\n```text\n{shown.output.strip()}\n```\n"


def _command_names(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if words:
        yield words
    commands: dict[str, Any] = getattr(command, "commands", {})
    for name, inner in commands.items():
        yield from _command_names(inner, (*words, name))
