"""What `--help` of a program says of dataclasses: sections, values and defaults in words, presets with what their source reports."""

import argparse
import dataclasses
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    from .presets import Preset


class Paragraphs(argparse.HelpFormatter):
    """Text as wide as the terminal: paragraphs flow, indented lines stay lines, each wrapped under its own second column, and commands stay commands."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog, **{"max_help_position": 30} | kwargs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Names keep their hyphens together."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
            flows = line and not line[0].isspace() and lines and lines[-1] and not lines[-1][0].isspace()
            if flows and not lines[-1].endswith(":"):
                lines[-1] += f" {line}"
            else:
                lines.append(line)
        return "\n".join(_wrapped(line, width, indent) for line in lines)

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        """What a call must have; what it may have is listed below."""
        if usage is None and any(action.option_strings and not action.required for action in actions):
            needed = [action for action in actions if not action.option_strings or action.required]
            words = [self._in_usage(action) for action in needed]
            usage = " ".join(["%(prog)s", *words, "[options]"]) if not _commands(actions) else "%(prog)s COMMAND [options]"
        super().add_usage(usage, actions, groups, prefix)

    def _in_usage(self, action: argparse.Action) -> str:
        default = self._get_default_metavar_for_optional if action.option_strings else self._get_default_metavar_for_positional
        values = self._format_args(action, default(action))
        return " ".join([*action.option_strings[:1], f"[{values}]" if action.nargs == "*" else values])

    def _format_args(self, action: argparse.Action, default_metavar: Any) -> str:
        """Several values as `NAME ...`: whether they may be left out, the help says."""
        if action.nargs in ("*", "+"):
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
        return super()._format_args(action, default_metavar)

    def _format_action(self, action: argparse.Action) -> str:
        """Of commands the names with their help, without a line for all of them that says nothing."""
        commands = _commands([action])
        return "".join(map(super()._format_action, commands)) if commands else super()._format_action(action)


def _commands(actions: Iterable[argparse.Action]) -> list[argparse.Action]:
    return [command for action in actions for command in getattr(action, "_get_subactions", list)()]


class HelpFormatter(Paragraphs):
    """One spelling for each option."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        values = self._format_args(action, str(action.metavar))
        return f"{action.option_strings[0]} {values}"

    @staticmethod
    def epilog(aliases: Mapping[str, str], presets: "Mapping[str, Preset]", last: str | None) -> str:
        """The presets with their results, the other spellings, and a program's own last lines."""
        parts = []
        if presets:
            column = max(map(len, presets)) + 2
            parts.append("presets:\n" + "\n".join(f"  {name:<{column}}{overview(row)}" for name, row in presets.items()))
        if aliases:
            column = max(map(len, aliases)) + 4
            lines = [f"  {'--' + alias:<{column}}{_meaning(alias, target)}" for alias, target in aliases.items()]
            parts.append("\n".join(["diffusers' spellings, understood as well:", *lines]))
        parts.append("Every option may be written with - for _, and stand in the file of --config by its name.")
        return "\n\n".join([*parts, *([last] if last else [])]).replace("%", "%%")


def _meaning(alias: str, target: str) -> str:
    if alias == "train_batch_size" and target == "labels_per_step":
        return "generated samples of a step over all processes: labels_per_step x generated_per_label"
    return f"--{target}"


def _wrapped(line: str, width: int, indent: str) -> str:
    if re.match(r"\s+(drifting-diffusers|accelerate|[A-Z_]+=\S+ torchrun) ", line):
        return _command(line, width, indent)
    columns = re.match(r"\s*\S+\s{2,}", line)
    hang = " " * (columns.end() if columns else len(line) - len(line.lstrip()))
    return textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent + hang, break_on_hyphens=False)


def _command(line: str, width: int, indent: str) -> str:
    """A command that the shell understands as it stands: broken before an option, with a backslash."""
    words: list[str] = []
    for word in re.findall(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""", line):
        if word.startswith("-") or not words or not words[-1].startswith("-"):
            words.append(word)
        else:
            words[-1] += f" {word}"
    hang = indent + " " * (len(line) - len(line.lstrip()))
    rows = [hang + words[0]]
    for word in words[1:]:
        if len(rows[-1]) + len(word) + 3 > width:
            rows.append(hang + "   ")
        rows[-1] += f" {word}"
    return " \\\n".join(rows)


def overview(preset: "Preset") -> str:
    """A preset's data, and what its source reports."""
    if preset.reported is None:
        return f"{preset.data}; no result is reported"
    numbers = ", ".join(f"{name} {value:g}" for name, value in preset.reported.items())
    where = "; ".join(part for part in (preset.source, preset.hardware) if part)
    return f"{preset.data}; reported: {numbers}" + (f" ({where})" if where else "") + (f"; {preset.memory}" if preset.memory else "")


def sections_of(kind: Any) -> list[tuple[str, list[str]]]:
    """The options of a dataclass under titles: those of a base under the base's.

    A title is `_argument_group_name`, as for HfArgumentParser, or the first sentence of the docstring.
    """
    homes = [cls for cls in reversed(kind.__mro__) if dataclasses.is_dataclass(cls)]
    sections: dict[str, list[str]] = {}
    for field in dataclasses.fields(kind):
        if field.init:
            home = next((cls for cls in homes if field.name in cls.__annotations__), kind)
            sections.setdefault(_title(home), []).append(field.name)
    return list(sections.items())


def _title(cls: Any) -> str:
    sentence = re.split(r"[.,;:]\s|\.$", (cls.__doc__ or "").strip(), maxsplit=1)[0].replace("`", "")
    title = cls.__dict__.get("_argument_group_name") or ("" if sentence.startswith(f"{cls.__name__}(") else sentence)
    return title or cls.__name__


def metavar_of(kind: Any) -> str:
    """What kind of value an option takes, in a word; of a choice, the choices."""
    if bool in get_args(kind):
        return "true|false|WORD"
    if type(None) in get_args(kind):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is list:
        return metavar_of(get_args(kind)[0])
    return {int: "N", float: "X", bool: "true|false"}.get(kind, "TEXT")


def default_in_words(field: dataclasses.Field) -> str:
    if field.default is field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    words = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    if isinstance(value, list):
        words = " ".join(map(str, value)) or "none"
    return f"default: {words or ('none' if value is None else value)}"
