"""The command `drifting-diffusers`: each verb is a thin shell over the library, in a module of its own.

That module holds HELP, one line; DESCRIPTION and EXAMPLES, the rest of what `--help` says; `arguments(parser)`, which adds its own, and
`run(options)`. Only argparse is imported until a verb runs, so that `--help` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import convert, evaluate

VERBS = {"convert": convert, "evaluate": evaluate}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 for done, 1 for an error in one line, 2 for a wrong command, 130 for an interruption."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.traceback:
            raise
        text = " ".join(str(error).split())
        if not isinstance(
            error, ValueError | TypeError | OSError | ImportError
        ):  # no sentence of ours: of the network, of torch, of memory
            text = f"{type(error).__name__}{f': {text}' if text else ''} (--traceback shows where)"
        print(f"drifting-diffusers: error: {text}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="drifting-diffusers", description="Drifting Models: one-step generators for diffusers.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="command")
    for name, verb in VERBS.items():
        own = verbs.add_parser(
            name,
            help=verb.HELP,
            description=verb.DESCRIPTION,
            epilog=verb.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.set_defaults(run=verb.run)
        verb.arguments(own)
        own.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser
