"""`drifting-diffusers completion`: a script with which a shell completes commands, options, choices, names and files."""

import argparse
from collections.abc import Iterator
from typing import Any

from ..config import DriftingConfig
from ..shipped import SHIPPED

SHELLS = ("bash", "zsh", "tcsh")

DESCRIPTION = """\
Print a script with which the shell completes drifting-diffusers: commands, options and their choices, presets, names of what can be drawn from or
converted, and files.
"""

EXAMPLES = """\
for the bash that is open:
  eval "$(drifting-diffusers completion bash)"

for every bash, with the package bash-completion:
  mkdir -p ~/.local/share/bash-completion/completions
  drifting-diffusers completion bash > ~/.local/share/bash-completion/completions/drifting-diffusers

for every zsh, with `fpath+=~/.zfunc; autoload -U compinit; compinit` in ~/.zshrc:
  mkdir -p ~/.zfunc
  drifting-diffusers completion zsh > ~/.zfunc/_drifting-diffusers

for every tcsh, with `source ~/.drifting-diffusers.tcsh` in ~/.tcshrc:
  drifting-diffusers completion tcsh > ~/.drifting-diffusers.tcsh
"""

FILES = ("FILE", "FILE.yaml", "FILE|FOLDER", "FOLDER", "TARGET", "FILE_OR_FOLDER")
"""What options and positions are called that name something on disk."""

PATHS = (
    "output_dir",
    "latents",
    "eval_latents",
    "dataset_name",
    "dataset",
    "vae",
    "extractor_weights",
    "accelerate_config",
    "resume_from_checkpoint",
)
"""Options that may name something on disk, whatever their values are called."""

BASH = """\
_drifting_diffusers_{name}() {{
  compgen -W "{words}" -- "$1"
  compgen -f -- "$1"
}}
"""
ZSH = """\
_drifting_diffusers_{name}() {{
  compadd -- {words}
  _files
}}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("shell", choices=SHELLS, metavar="{bash,zsh,tcsh}", help="for which shell")


def run(options: argparse.Namespace) -> None:
    """Print the script."""
    print(script(options.shell))


def script(shell: str) -> str:
    """What a shell reads to complete the command."""
    import shtab

    from . import _parser

    parser = _parser()
    names = _names()
    for action in _actions(parser):
        kind = _kind(action)
        if kind in names:
            action.complete = {each: f"_drifting_diffusers_{kind}" for each in ("bash", "zsh")} | {"tcsh": "f"}  # type: ignore[attr-defined]
        elif kind == "file":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    functions = {
        each: "\n".join(form.format(name=kind, words=" ".join(words)) for kind, words in names.items())
        for each, form in (("bash", BASH), ("zsh", ZSH))
    }
    return shtab.complete(parser, shell, preamble=functions | {"tcsh": ""})  # type: ignore[arg-type]


def _names() -> dict[str, list[str]]:
    """Words that stand beside files, by the kind of place."""
    from ..releases import RELEASES

    return {"pipeline": list(SHIPPED), "source": list(RELEASES), "preset": list(DriftingConfig.presets())}


def _kind(action: argparse.Action) -> str:
    """What an argument names: a key of `_names`, "file", or nothing that can be completed."""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if metavar in ("PIPELINE", "SOURCE"):
        return metavar.lower()
    if action.dest == "preset":
        return "preset"
    return "file" if metavar in FILES or action.dest in PATHS else ""


def _actions(parser: Any) -> Iterator[argparse.Action]:
    """All arguments, those of the commands as well."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
