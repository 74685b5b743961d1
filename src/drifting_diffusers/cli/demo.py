"""`drifting-diffusers demo`: the Space on this machine."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .pipelines import located

DESCRIPTION = """\
Open a page in the browser: draw images of each model, walk between two of them, change their style, and a playground of the idea. Without a PIPELINE it is the
model that comes with the package, and needs no network. Ctrl-C ends it.

It is the Space of spaces/drifting-demo, which may be put on the Hub as it is.
"""

EXAMPLES = """\
examples:
  drifting-diffusers demo
  drifting-diffusers demo outputs/quickstart/pipeline user/drifting-L
  drifting-diffusers demo --host 0.0.0.0 --port 8080 --no-browser
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "pipelines", metavar="PIPELINE", nargs="*", default=["fashion-mnist"], help="models to choose from (default: fashion-mnist)"
    )
    page_arguments(parser)


def page_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the page is."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="port; 0 takes any free one (default: 7860)")
    parser.add_argument("--share", action="store_true", help="a public address for a week, through Gradio's servers")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open nothing")


def run(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    for name in options.pipelines:
        located(name)  # a typo is told at once
    serve(options, options.pipelines)


def serve(options: argparse.Namespace, pipelines: Sequence[str]) -> None:
    """Serve the page with these pipelines; without any it is the playground alone."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the page is made with gradio, which is not installed: pip install 'drifting-diffusers[demo]'")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, got {options.port}")
    folder = find_space()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    sys.path.insert(0, str(folder))  # its modules know each other by their plain names, as on the Hub
    app: Any = importlib.import_module("app")
    page = app.build(pipelines)
    how = {"server_name": options.host, "server_port": options.port or _free_port(options.host), "share": options.share}
    try:
        page.launch(inbrowser=not options.no_browser, prevent_thread_lock=True, quiet=True, **app.LOOK, **how)
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise OSError(
            f"port {options.port} is taken, perhaps by another demo: give another --port, or --port 0 for any free one"
        ) from error
    print(f"{page.local_url}  (Ctrl-C ends it)", flush=True)
    if page.share_url:
        print(f"{page.share_url}  for everybody", flush=True)
    try:
        page.server.thread.join()
    finally:
        page.close(verbose=False)


def find_space() -> Path:
    """The folder of the Space: in the package, or in the checkout that the package is installed from.

    Raises:
        FileNotFoundError: if it is in neither.
    """
    package = Path(__file__).parents[1]
    places = [package / "space", package.parents[1] / "spaces/drifting-demo"]
    for place in places:
        if (place / "app.py").is_file():
            return place
    raise FileNotFoundError(
        f"the page is missing, it is neither in {places[0]} nor in {places[1]}: install the package again, pip install --force-reinstall 'drifting-diffusers[demo]'"
    )


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as listener:
        listener.bind((host, 0))
        return listener.getsockname()[1]
