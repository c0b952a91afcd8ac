"""A web page that names the cell types of an uploaded file: ``screformer app``, or a Hugging Face Space.

Everything it shows comes from the computer it runs on; nothing is fetched from elsewhere, and nothing is kept.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from screformer.annotation.trained_model import load_classifier

if TYPE_CHECKING:
    import gradio as gr

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 7860
DEFAULT_UPLOAD_MB = 2048
# Read by Gradio when it starts: no statistics, no version check, no memory of runs in the browser, no public tunnel.
GRADIO_SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SSR_MODE": "False",
}
# A browser fetches nothing from elsewhere, whatever is on the page. Gradio builds its page by scripts of its own.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'"
)


def serve(
    model: str | Path,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    max_upload_mb: int = DEFAULT_UPLOAD_MB,
    announce: Callable[[str], None] | None = None,
    until: threading.Event | None = None,
) -> None:
    """Serve the page until it is stopped (Ctrl-C, or SIGTERM); then remove every file that was uploaded or made.

    Parameters
    ----------
    model
        Folder or Hub id of a fine-tuned checkpoint; loaded once.
    host
        Address to listen at; ``"0.0.0.0"`` lets other computers in.
    port
        To listen at.
    max_upload_mb
        The largest file that is taken, in megabytes (of 1,048,576 bytes).
    announce
        Called with a line about the page's address when it can be used.
    until
        Ends it too, when set.

    Raises
    ------
    ImportError
        Gradio is not installed.
    OSError
        There is no such checkpoint, or the port is taken.
    ValueError
        The checkpoint cannot name cell types (see `load_classifier`), or an option is out of its range.
    """
    check_gradio()
    if max_upload_mb < 1:
        raise ValueError(f"max_upload_mb must be at least 1, got {max_upload_mb}")
    check_port(host, port)
    classifier = load_classifier(model)
    with tempfile.TemporaryDirectory(prefix="screformer-app-", ignore_cleanup_errors=True) as folder:
        root = Path(folder).resolve()
        os.environ.update(GRADIO_SETTINGS, GRADIO_TEMP_DIR=str(root))
        from screformer.annotation.app_page import build_page, page_css, page_theme

        page = build_page(classifier, root, max_upload_mb=max_upload_mb)
        how = {"css": page_css(), "theme": page_theme(), "max_file_size": max_upload_mb * 2**20}
        try:
            with stopped_by_sigterm():
                address = _launch(page, host, port, **how)
                if announce is not None:
                    announce(f"The page is at {address}; Ctrl-C ends it")
                (until or threading.Event()).wait()
        except KeyboardInterrupt:
            pass
        finally:
            page.close(verbose=False)


def check_gradio() -> None:
    """Refuse to go on without Gradio.

    Raises
    ------
    ImportError
        It is not installed.
    """
    if find_spec("gradio") is None:
        raise ImportError('the web page needs Gradio: pip install "screformer[app]"')


def check_port(host: str, port: int) -> None:
    """Refuse, before a model is loaded, to listen where it is not possible.

    Raises
    ------
    OSError
        The port is taken, or the host is no address of this computer.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise OSError(f"port: {port} of {host} cannot be listened at ({error}); choose another") from error


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, as a container gets it, end the program the way Ctrl-C does, so that files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class ContentPolicy:
    """ASGI middleware that adds the page's content policy to every answer."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI
        """Answer as the application does, with one header more."""

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", CONTENT_POLICY.encode("ascii"))
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _launch(page: gr.Blocks, host: str, port: int, **settings: Any) -> str:  # Any: Gradio's
    """Start to serve, in threads of its own; return the address."""
    from starlette.middleware import Middleware

    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        app_kwargs={"middleware": [Middleware(ContentPolicy)]},
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        footer_links=[],
        **settings,
    )
    return address
