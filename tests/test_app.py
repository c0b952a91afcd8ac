"""The web page: a visitor's way through it in a real browser, what it says when something is wrong, and what stays."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from page_browser import (
    WHY_NONE,
    open_browser,
    overflow,
    pale_texts,
    reach_and_enter,
    requested_addresses,
    set_width,
    wait,
)
from small_corpus import NUM_GENES, TYPES, make_cells, make_tokenizer
from typer.testing import CliRunner

from screformer.annotation import annotate_file, app, app_page, app_plots
from screformer.annotation.app_sessions import SessionFiles
from screformer.annotation.calibration import Calibration
from screformer.annotation.trained_model import load_classifier
from screformer.cli import app as command_line
from screformer.modeling_screformer import ScReformerForCellClassification

STRANGE_NAME = "<b>cell</b> ${1+1} {{name}}"
START = "from screformer.cli import main; main()"


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    """Return a small classifier's folder."""
    tokenizer = make_tokenizer()
    names = {"id2label": dict(enumerate(TYPES)), "label2id": {name: at for at, name in enumerate(TYPES)}}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = ScReformerForCellClassification(
            tiny_config(
                num_genes=NUM_GENES, tokenizer_fingerprint=tokenizer.fingerprint, num_labels=len(TYPES), **names
            )
        )
    with torch.no_grad():  # so that cells get different labels
        model.classifier.convolution_path.output.weight.mul_(10)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def cells(tmp_path):
    """Return a file of 120 cells that has a UMAP, and a name that a careless page would run."""
    adata = make_cells(120)
    adata.obs_names = [STRANGE_NAME, *adata.obs_names[1:]]
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(120, 2))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


# In a browser


@pytest.fixture
def page(checkpoint, tmp_path):
    """Give the address, the process and the temporary folder of a page that takes files up to 1 MB."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", START, "app", "--model", checkpoint, "--port", port, "--max-upload-mb", 1]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path
        )
        try:
            deadline = time.monotonic() + 120
            while f"http://127.0.0.1:{port}" not in (tmp_path / "log.txt").read_text():
                assert process.poll() is None, (tmp_path / "log.txt").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
                time.sleep(0.1)
            yield SimpleNamespace(address=f"http://127.0.0.1:{port}/", process=process, temporary=temporary)
        finally:
            process.kill()
            process.wait()


def status(driver):
    return driver.find_element("id", "status").text


def choose_file(driver, path):
    """Give a file, as the browser's own dialogue would; return when the page has it or refuses it."""
    driver.find_element("css selector", "#upload input[type=file]").send_keys(str(path))


def annotate_by_keyboard(driver):
    reach_and_enter(driver, "#annotate")
    wait(driver, lambda: status(driver).startswith(("Done", "This did not work")), "the end of the annotation")


def download_by_keyboard(driver, name, folder):
    reach_and_enter(driver, f"#download_{name}")
    path = folder / f"cells_annotated.{name}"

    def is_whole():
        return path.exists() and path.stat().st_size and not list(folder.glob("*.crdownload"))

    wait(driver, is_whole, f"the download of {path.name}")
    return path


@pytest.mark.skipif(WHY_NONE is not None, reason=str(WHY_NONE))
def test_a_visitor_goes_through_the_page_by_keyboard(page, checkpoint, cells, tmp_path):
    expected = annotate_file(cells, checkpoint, tmp_path / "expected.h5ad", progress=False)
    assert len(expected.label_counts) == 2
    downloads = tmp_path / "downloads"
    with open_browser(downloads) as driver:
        set_width(driver, 360)
        driver.get(page.address)
        wait(driver, lambda: driver.find_elements("id", "annotate"), "the page")
        assert overflow(driver) <= 0
        assert driver.title == "Cell types for your cells"

        # A press of Enter asks for a file; the dialogue itself belongs to the browser.
        driver.execute_script(
            "window.asked = 0; document.addEventListener('click', event => {"
            "  if (event.target.matches('#upload input')) { window.asked += 1; event.preventDefault(); }"
            "}, true)"
        )
        reach_and_enter(driver, "#upload button[aria-label*=upload]")
        wait(driver, lambda: driver.execute_script("return window.asked") == 1, "the dialogue")
        choose_file(driver, cells)
        wait(driver, lambda: "cells.h5ad is here" in status(driver), "the upload")
        annotate_by_keyboard(driver)
        assert status(driver) == "Done: 120 of 120 cells have a type. The downloads have all cells."
        for part in ("#results img", "#passport dd", "#download_csv", "#download_h5ad"):  # these come one by one
            wait(driver, lambda part=part: driver.find_elements("css selector", part), part)
        results = driver.find_element("id", "results").text
        for label, count in expected.label_counts.items():
            assert f"{label} {count} {count / 120:.1%}" in results
        assert 'Positions: the UMAP of the file, obsm["X_umap"]; 120 cells.' in results
        assert STRANGE_NAME in results
        assert "120 cells x 40 genes, accepted" in driver.find_element("id", "passport").text
        texts = [image.get_attribute("alt") for image in driver.find_elements("css selector", "#results img")]
        first = next(iter(expected.label_counts.items()))
        assert texts[0].startswith(f"Scatter plot of cells coloured by cell type: {first[0]} {first[1]}")
        assert "median probability" in texts[1]
        assert overflow(driver) <= 0

        table = pd.read_csv(download_by_keyboard(driver, "csv", downloads), index_col="cell")
        annotated = anndata.read_h5ad(download_by_keyboard(driver, "h5ad", downloads))
        wanted = anndata.read_h5ad(tmp_path / "expected.h5ad")
        for found in (table, annotated.obs):
            assert found.index.tolist() == wanted.obs_names.tolist()
            assert found["screformer_cell_type"].tolist() == wanted.obs["screformer_cell_type"].tolist()
            np.testing.assert_allclose(
                found["screformer_probability"], wanted.obs["screformer_probability"], rtol=1e-5, atol=1e-5
            )

        for dark in (False, True):
            set_width(driver, 1200, dark=dark)
            assert pale_texts(driver, dark=dark) == []
        set_width(driver, 360)

        (tmp_path / "text.h5ad").write_text("not HDF5")
        reach_and_enter(driver, "#upload button[aria-label=Clear]")
        wait(driver, lambda: driver.find_elements("css selector", "#upload input"), "an empty page")
        choose_file(driver, tmp_path / "text.h5ad")
        wait(driver, lambda: "text.h5ad is here" in status(driver), "the upload")
        wait(driver, lambda: not driver.find_elements("css selector", "#downloads button, #results img"), "no results")
        annotate_by_keyboard(driver)
        [alert] = driver.find_elements("css selector", "#status [role=alert]")
        assert alert.text.startswith("This did not work. path: text.h5ad is not an h5ad file")
        assert "Traceback" not in driver.find_element("tag name", "body").text
        assert str(page.temporary) not in driver.page_source.split("window.gradio_config")[0]
        assert overflow(driver) <= 0

        (tmp_path / "large.h5ad").write_bytes(bytes(2 * 2**20))
        reach_and_enter(driver, "#upload button[aria-label=Clear]")
        wait(driver, lambda: driver.find_elements("css selector", "#upload input"), "an empty page")
        choose_file(driver, tmp_path / "large.h5ad")
        said = 'exceed the maximum allowed size of 1.0 Mb: "large.h5ad"'
        wait(driver, lambda: said in driver.find_element("tag name", "body").text, "the refusal")

        addresses = requested_addresses(driver)
        assert len(addresses) > 5
        assert not [address for address in addresses if not address.startswith((page.address, "data:", "blob:"))]
        [root] = page.temporary.glob("screformer-app-*")
        assert list(root.glob("session-*"))
    # The visitor has left.
    deadline = time.monotonic() + 30
    while (left := list(root.glob("session-*"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    page.process.send_signal(signal.SIGTERM)
    assert page.process.wait(timeout=30) == 0
    assert not list(page.temporary.glob("screformer-app-*"))


# Without one


@pytest.fixture
def closed_loops(monkeypatch):
    """Close the event loops that Gradio makes and forgets."""
    made, make = [], asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: made.append(make()) or made[-1])
    yield
    asyncio.set_event_loop(None)
    for loop in made:
        loop.close()


@pytest.fixture
def events(checkpoint, tmp_path, monkeypatch):
    """Return a function: file -> what the page shows of it in the end; and the folder of the files."""
    monkeypatch.setattr(app_plots, "find_spec", lambda _: None)  # without UMAP, which compiles itself for long
    root = tmp_path / "root"
    (root / "of-gradio").mkdir(parents=True)
    page_events = app_page.PageEvents(load_classifier(checkpoint), SessionFiles(root))
    request = SimpleNamespace(session_hash="visitor")

    def annotate(file=None, *, layer=None, gene_column=None, allow=None):
        if file is not None:
            upload = root / "of-gradio" / file.name
            upload.write_bytes(file.read_bytes())
            page_events.keep_upload(str(upload), request)
        shown = list(page_events.annotate(True, 5, layer, gene_column, allow, request))
        return shown[-1]

    return SimpleNamespace(annotate=annotate, root=root, leave=lambda: page_events.leave(request))


def test_files_of_a_visitor_go_when_they_leave(events, cells):
    state, passport, results, h5ad, table = events.annotate(cells)
    assert "Done: 120 of 120" in state
    assert passport["visible"]
    assert results["visible"]
    for button, name in ((h5ad, "cells_annotated.h5ad"), (table, "cells_annotated.csv")):
        assert button["value"].startswith(str(events.root))
        assert button["value"].endswith(name)
        assert os.path.exists(button["value"])
    assert len(list(events.root.rglob("*.h5ad"))) == 2  # the upload and the result: nothing on the way to it
    events.leave()
    assert [path.name for path in events.root.rglob("*")] == ["of-gradio"]


def test_annotating_again_replaces_the_results(events, cells):
    first, second = events.annotate(cells)[3]["value"], events.annotate()[3]["value"]
    assert not os.path.exists(first)
    assert os.path.exists(second)


def test_without_a_file_the_page_asks_for_one(events):
    assert "choose one, and wait until it is uploaded" in events.annotate()[0]


def test_a_refused_file_shows_its_passport_and_the_remedy(events, tmp_path):
    adata = make_cells()
    adata.layers["raw"] = adata.X.copy()
    adata.X = adata.X.astype(np.float32).log1p()
    adata.layers["raw"].data[:2] = 7
    adata.write_h5ad(tmp_path / "normalised.h5ad")
    adata.layers["other"] = adata.layers.pop("raw").astype(np.float32).log1p()
    adata.write_h5ad(tmp_path / "no_counts.h5ad")
    state, passport, results, *downloads = events.annotate(tmp_path / "no_counts.h5ad")
    assert "this looks normalised or log-transformed" in state
    assert "can be set under" in state
    assert "REFUSED" in passport["value"]
    assert '<details class="passport" open>' in passport["value"]
    assert [part["visible"] for part in (results, *downloads)] == [False] * 3
    # What the page offers is what the message names.
    assert "Done" in events.annotate(allow=["not-counts"])[0]
    assert "Done" in events.annotate(tmp_path / "normalised.h5ad", layer=" raw ")[0]
    assert "layer" in events.annotate(layer="absent")[0]


def test_what_nobody_foresaw_is_said_without_details_and_logged(events, cells, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("the secret of the server")

    monkeypatch.setattr(app_page, "annotate_cells", fail)
    with caplog.at_level(logging.ERROR):
        state, *_ = events.annotate(cells)
    assert "RuntimeError" in state
    assert "secret" not in state
    assert "the secret of the server" in caplog.text


def test_messages_have_no_folders_of_the_server(events, cells, monkeypatch):
    def fail(_, upload, *__):
        raise OSError(f"cannot write {upload.parent / 'out.h5ad'}, a copy of {upload}")

    monkeypatch.setattr(app_page, "annotate_cells", fail)
    assert "cannot write out.h5ad, a copy of cells.h5ad" in events.annotate(cells)[0]


@pytest.mark.usefixtures("closed_loops")
def test_the_page_has_a_control_for_errors_where_cells_can_be_left_out(checkpoint, tmp_path, monkeypatch):
    model = load_classifier(checkpoint)
    for can_choose in (False, True):
        calibration = Calibration((1.0,), (0.05,), (0.5,)).to_config() if can_choose else None
        monkeypatch.setattr(model.model.config, "calibration", calibration)
        page = app_page.build_page(model, tmp_path, max_upload_mb=7)
        controls = {getattr(block, "label", None): block for block in page.blocks.values()}
        assert controls["Name a type for every cell"].visible is can_choose
        assert "File of raw counts, up to 7 MB" in controls
        [annotate] = [each for each in page.fns.values() if each.name == "annotate"]
        assert annotate.concurrency_limit == 1


# Serving


def test_without_gradio_the_remedy_is_said(checkpoint, monkeypatch):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    result = CliRunner().invoke(command_line, ["app", "--model", str(checkpoint)])
    assert result.exit_code == 1
    assert result.output == 'error: the web page needs Gradio: pip install "screformer[app]"\n'


def test_a_taken_port_and_a_limit_out_of_range_are_refused(checkpoint):
    with pytest.raises(ValueError, match="max_upload_mb must be at least 1, got 0"):
        app.serve(checkpoint, max_upload_mb=0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port: {port} of 127.0.0.1 cannot be listened at .*; choose another"):
            app.serve(checkpoint, port=port)


def test_a_checkpoint_is_looked_for_before_anything_is_served(tmp_path):
    with pytest.raises(OSError, match=r"model: .*nowhere is neither a folder with a whole checkpoint"):
        app.serve(tmp_path / "nowhere")
