"""The web page itself: what is on it, and what happens when it is used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from screformer.annotation.app_annotation import (
    Classifier,
    VisitorOptions,
    annotate_cells,
    inspect_upload,
    write_table,
)
from screformer.annotation.app_plots import choose_styles, lay_out
from screformer.annotation.app_sessions import SessionFiles
from screformer.annotation.app_tables import error_html, message_html, passport_html, results_html
from screformer.annotation.calibration import Calibration
from screformer.annotation.label_tree import label_names_of
from screformer.tokenization.passport_problems import PROBLEM_CODES

logger = logging.getLogger(__name__)

TITLE = "Cell types for your cells"
IF_REFUSED = "If the file is refused"
# Seconds: how often Gradio looks for files of its own to remove, and how old they are then.
CLEANING = (3600, 24 * 3600)
UNKNOWN_ERROR = (
    "Something happened that this page has no words for ({name}). The details are in the log of the server; whoever "
    "runs it can tell what went wrong."
)


class PageEvents:
    """What happens when the page is used.

    Parameters
    ----------
    model
        The classifier, loaded.
    files
        Where uploads and results are.
    """

    def __init__(self, model: Classifier, files: SessionFiles) -> None:
        self._model = model
        self._files = files

    def keep_upload(self, path: str | None, request: gr.Request) -> tuple[Any, ...]:
        """Take a new file over; return the status, and that nothing else is shown."""
        try:
            upload = self._files.keep_upload(str(request.session_hash), Path(str(path)))
        except FileNotFoundError as error:
            return error_html(str(error)), *nothing_shown()
        size = upload.stat().st_size / 2**20
        return message_html(f"{upload.name} is here ({size:,.1f} MB). The button above annotates it."), *nothing_shown()

    def remove_upload(self, request: gr.Request) -> tuple[Any, ...]:
        """Forget the file; return that nothing is shown."""
        self._files.remove_upload(str(request.session_hash))
        return "", *nothing_shown()

    def leave(self, request: gr.Request) -> None:
        """Remove the files of a visitor who has closed the page."""
        self._files.close(str(request.session_hash))

    def annotate(
        self,
        answers_all: bool,
        error_percent: float,
        layer: str | None,
        gene_column: str | None,
        allow: list[str] | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008 - how Gradio is asked for it
    ) -> Iterator[tuple[Any, ...]]:  # Any: updates of components
        """Annotate the visitor's file; yield status, passport, results, and the two downloads as they come."""
        options = VisitorOptions(
            max_error=None if answers_all else error_percent / 100,
            layer=(layer or "").strip() or None,
            gene_column=(gene_column or "").strip() or None,
            allow=tuple(allow or ()),
        )
        yield message_html("Reading the file …"), *nothing_shown()
        try:
            with self._files.working(str(request.session_hash)) as (upload, folder):
                for shown in self._annotate_into(upload, folder, options):
                    yield shown.updates()
        except (ValueError, OSError, ImportError) as error:
            yield error_html(self._files.hide_folders(str(error))), gr.skip(), *nothing_shown()[1:]
        except Exception as error:
            logger.exception("annotating an uploaded file")
            yield error_html(UNKNOWN_ERROR.format(name=type(error).__name__)), gr.skip(), *nothing_shown()[1:]

    def _annotate_into(self, upload: Path, folder: Path, options: VisitorOptions) -> Iterator[Shown]:
        """Annotate `upload` into `folder`, and yield what to show as it comes."""
        passport = inspect_upload(self._model, upload, options)
        report = passport_html(passport, is_open=True)
        if passport.refusals:
            refusal = " ".join(str(problem) for problem in passport.refusals)
            yield Shown(error_html(f"{refusal} What begins with -- can be set under “{IF_REFUSED}”."), report)
            return
        yield Shown(message_html(f"Naming the types of {passport.num_cells:,} cells …"), report)
        output = folder / f"{upload.stem}_annotated.h5ad"
        cells = annotate_cells(self._model, upload, output, options)
        table = output.with_suffix(".csv")
        write_table(cells, table)
        yield Shown(message_html("Drawing the cells …"), report)
        layout = lay_out(output, cells.embedding_name)
        results = results_html(cells, layout, choose_styles(list(cells.summary.label_counts)))
        num_named = sum(cells.summary.label_counts.values())
        done = f"Done: {num_named:,} of {cells.summary.num_cells:,} cells have a type. The downloads have all cells."
        yield Shown(message_html(done), passport_html(passport, is_open=False), results, (output, table))


class Shown(NamedTuple):
    """What the page shows: status, passport and results as HTML, and the files to download."""

    status: str
    passport: str
    results: str | None = None
    downloads: tuple[Path, Path] | None = None

    def updates(self) -> tuple[Any, ...]:  # Any: Gradio's
        """Return it as updates of the five components."""
        _, no_results, *no_files = nothing_shown()
        files = [gr.update(value=str(path), visible=True) for path in self.downloads or ()]
        results = gr.update(value=self.results, visible=True) if self.results else no_results
        return self.status, gr.update(value=self.passport, visible=True), results, *(files or no_files)


def nothing_shown() -> tuple[Any, ...]:
    """Return updates that hide passport, results and the two downloads."""
    return (gr.update(value="", visible=False),) * 2 + (gr.update(value=None, visible=False),) * 2


def build_page(model: Classifier, root: Path, *, max_upload_mb: int) -> gr.Blocks:
    """Return the page, not yet served.

    Parameters
    ----------
    model
        The classifier, loaded.
    root
        Folder for temporary files.
    max_upload_mb
        The limit that is told to the visitor; whoever serves the page sets it.
    """
    events = PageEvents(model, SessionFiles(root))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CLEANING) as page:
        gr.HTML(_introduction(model))
        upload = gr.File(label=f"File of raw counts, up to {max_upload_mb:,} MB", height=150, elem_id="upload")
        choices = _add_choices(can_choose=Calibration.from_config(model.model.config) is not None)
        button = gr.Button("Annotate", variant="primary", elem_id="annotate")
        status = gr.HTML(elem_id="status")
        progress = gr.HTML(elem_id="progress")
        with gr.Row(elem_id="downloads"):
            downloads = [
                gr.DownloadButton(f"Download {what}", visible=False, elem_id=f"download_{ending}")
                for what, ending in (("annotated file (h5ad)", "h5ad"), ("table (CSV)", "csv"))
            ]
        passport = gr.HTML(visible=False, elem_id="passport")
        results = gr.HTML(visible=False, elem_id="results")
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        shown = [status, passport, results, *downloads]
        upload.upload(events.keep_upload, upload, shown, **quiet)
        upload.clear(events.remove_upload, None, shown, **quiet)
        button.click(
            events.annotate,
            choices,
            shown,
            api_visibility="private",
            show_progress_on=progress,
            concurrency_limit=1,  # one annotation at a time; the others wait in a queue
        )
        page.unload(events.leave)
    return page


def page_css() -> str:
    """Return the page's style sheet."""
    return files("screformer.annotation").joinpath("app_page.css").read_text(encoding="utf-8")


def page_theme() -> gr.themes.Base:
    """Return a theme with the fonts of the reader's system, so that none is fetched, and enough contrast."""
    theme = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="gray",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_text_color="white",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )


def _introduction(model: Classifier) -> str:
    labels = [escape(name) for name in label_names_of(model.model.config)]
    return (
        f"<h1>{TITLE}</h1>"
        "<p>Give a file of raw counts, in which rows are cells. You get it back with a cell type and a probability for "
        "every cell. The file is read on the computer that this page comes from, and removed when you close the page."
        "</p><details><summary>"
        f"The model chooses among {len(labels)} cell types</summary><p>{', '.join(labels)}</p>"
        f"<p>Model: {escape(Path(model.name).name)}. A cell of another type gets the likeliest of these.</p></details>"
    )


def _add_choices(*, can_choose: bool) -> list[gr.components.Component]:
    """Add the controls that `PageEvents.annotate` takes, in its order; an error rate only for a calibrated model."""
    answers_all = gr.Checkbox(
        True, label="Name a type for every cell", visible=can_choose,
        info="Otherwise cells that the model is not sure of get a broader type, or none.",
    )  # fmt: skip
    error_percent = gr.Slider(
        1, 50, 5, step=1, label="Wrong labels to accept, percent", visible=False, elem_id="error_rate"
    )
    answers_all.change(
        lambda answers: gr.update(visible=not answers), answers_all, error_percent, api_visibility="private"
    )
    with gr.Accordion(IF_REFUSED, open=False):
        layer = gr.Textbox(label="Layer with the raw counts (--layer)", placeholder="found by its values")
        gene_column = gr.Textbox(
            label="Column of var with the gene names (--gene-column)", placeholder="found by its names"
        )
        allow = gr.CheckboxGroup(
            [(f"{code}: {what}", code) for code, what in PROBLEM_CODES.items()], label="Accept nevertheless (--allow)"
        )
    return [answers_all, error_percent, layer, gene_column, allow]
