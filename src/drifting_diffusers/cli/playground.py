"""`drifting-diffusers playground`: the page of `demo` without a model."""

import argparse

from .demo import page_arguments, serve

DESCRIPTION = """\
Open a page in the browser on which particles and a small one-step generator drift onto a target, frame by frame: choose a target or draw one, choose the field and
its temperature. It needs no model and no network. Ctrl-C ends it.
"""

EXAMPLES = """\
examples:
  drifting-diffusers playground
  drifting-diffusers playground --port 8080 --no-browser
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    page_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    serve(options, ())
