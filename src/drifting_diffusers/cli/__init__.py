"""The command `drifting-diffusers`: each verb is a thin shell over the library, in a module of its own.

That module holds DESCRIPTION and EXAMPLES, what `--help` says; `arguments(parser)`, which adds its own, and `run(options)`. It is imported when the
verb is chosen, and imports the library when it runs, so that `--help` answers at once. In place of `arguments` it may have `parser(**how)`, a parser of
another kind.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from .. import __version__
from ..arguments_help import Paragraphs

VERBS = {
    "train": "train a generator on images or latents, on one process or many",
    "sample": "draw images, into a grid or into files",
    "evaluate": "distances, precision, diversity and memorisation of a pipeline or of images",
    "convert": "the authors' released weights -> a folder that from_pretrained loads",
    "export": "a pipeline -> ONNX or torch.export, for other runtimes",
    "info": "what a pipeline is: classes, weights, guidance, results",
    "demo": "draw in the browser, with sliders",
    "playground": "watch particles drift, in the browser",
    "completion": "what lets the shell complete these commands",
}
"""The commands with a line of help each, in the order in which a user meets them."""

DESCRIPTION = "Drifting Models: generators that make an image in one network call."

EPILOG = """\
examples:
  drifting-diffusers sample fashion-mnist --labels sneaker bag --output a.png
  drifting-diffusers info fashion-mnist
  drifting-diffusers COMMAND --help

PIPELINE is a folder, a repository of the Hub (user/name), or fashion-mnist, which comes with the package.
Options may be written with - or _. What is fetched from the Hub stays in its cache; HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they always mean.

exit codes:
  0    done
  1    an error: one line on stderr says what to do, --traceback shows where
  2    a wrong command
  75   training was told to stop (SIGTERM) and is saved: run it again
  130  interrupted
"""


class Parser(argparse.ArgumentParser):
    """Options with - and with _ are the same; a text is as wide as the terminal."""

    def __init__(self, **how: Any):
        super().__init__(**{"formatter_class": Paragraphs, "allow_abbrev": False} | how)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args([*map(self._with_hyphens, sys.argv[1:] if args is None else args)], namespace)

    def _with_hyphens(self, word: str) -> str:
        name, equals, value = word.partition("=")
        hyphens = name.replace("_", "-")
        return hyphens + equals + value if name.startswith("--") and hyphens in self._option_string_actions else word


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 for done, 1 for an error in one line, 2 for a wrong command, 130 for an interruption."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = argparse.Namespace(traceback="--traceback" in words)
    try:
        options = _parser(_chosen(words)).parse_args(words, argparse.Namespace(words=words))
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read this has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.traceback:
            raise
        print(f"drifting-diffusers: error: {_in_a_line(error)}", file=sys.stderr)
        return 1
    return 0


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | TypeError | OSError | ImportError) and text:
        return text
    # no sentence of ours: of the network, of torch, of memory
    return f"{type(error).__name__}{f': {text}' if text else ''} (--traceback shows where)"


def _chosen(words: Sequence[str]) -> list[str]:
    """The command among the words, if there is one of that name."""
    return [word for word in words if not word.startswith("-")][:1]


def _parser(verbs: Iterable[str] = VERBS) -> argparse.ArgumentParser:
    """The parser of the command, complete for these verbs: of the others it knows the line of help."""
    verbs = list(verbs)
    parser = Parser(prog="drifting-diffusers", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=__version__)
    unknown = [name for name in verbs if name not in VERBS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], VERBS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        parser.error(f"there is no command {unknown[0]!r}; {hint}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands", parser_class=_of_verb)  # type: ignore[arg-type]
    for name, line in VERBS.items():
        commands.add_parser(name, help=line, module=importlib.import_module(f".{name}", __name__) if name in verbs else None)
    return parser


def _of_verb(module: Any = None, **how: Any) -> argparse.ArgumentParser:
    """The parser of a verb by its module; an empty one without."""
    if module is None:
        return Parser(**how)
    parser = module.parser(**how) if hasattr(module, "parser") else Parser(description=module.DESCRIPTION, epilog=module.EXAMPLES, **how)
    parser.set_defaults(run=module.run)
    if hasattr(module, "arguments"):
        module.arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser
