"""The arguments of a program: dataclasses filled from a preset, a YAML file and flags, each over the one before it.

A YAML file has the fields' own names, flat, and the types of its values are the fields' own. Three habits of YAML are taken as they are meant:
`1e-3` without a point is a number where a number is asked for, `no` is the word where a choice has that word, and a single value is a list of one.
In a file and in flags, `none` is None for what may be None, and no names for a list of names.

diffusers' scripts name some choices differently: `ALIASES` are understood, and `REFUSED` says what to do instead of the rest.
"""

import argparse
import dataclasses
import difflib
import functools
import sys
import types
from argparse import SUPPRESS
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from .arguments_help import HelpFormatter, default_in_words, metavar_of, overview, sections_of
from .config import RunConfig

ALIASES = {
    "max_train_steps": "max_steps",
    "checkpointing_steps": "save_steps",
    "checkpoints_total_limit": "save_total_limit",
    "lr_scheduler": "lr_scheduler_type",
    "lr_warmup_steps": "warmup_steps",
    "adam_weight_decay": "weight_decay",
    "validation_steps": "eval_steps",
    "num_validation_images": "eval_samples_per_class",
    "tracker_project_name": "project",
    "dataset_image_column_name": "image_column",
    "dataset_class_label_column_name": "label_column",
    "train_data_dir": "dataset_name",
    "pretrained_vae_model_name_or_path": "vae",
    "train_batch_size": "batch_size",
}
"""Spellings of diffusers' scripts -> ours; there where the field is. `train_batch_size` of a generator is `labels_per_step x generated_per_label`."""

REFUSED = {
    "gradient_accumulation_steps": "it would change the objective, whose samples see each other: labels_per_microbatch (microbatch_size of an encoder) "
    "gives the same gradient in less memory",
    "hub_token": "it would be written down beside the run: set HF_TOKEN, or run `hf auth login` once",
    "use_ema": "averaged weights are always kept: ema_decay says how",
    "foreach_ema": "averaged weights need no such choice: leave it out",
    "offload_ema": "averaged weights stay where the network is: leave it out",
    "scale_lr": "the learning rate is taken as it is: set learning_rate",
    "use_8bit_adam": "there is only AdamW in full precision: leave it out",
    "adam_epsilon": "it is AdamW's own 1e-8: leave it out",
    "num_train_epochs": "runs are counted in steps: max_steps = epochs x images / images per step (push_per_step of a generator, batch_size of an encoder)",
    "validation_epochs": "evaluations are counted in steps: set eval_steps",
    "save_images_epochs": "previews are counted in steps: set preview_steps",
    "overwrite_output_dir": "no run is overwritten: choose a new output_dir, or delete the old one",
    "logging_dir": "logs stand in output_dir: leave it out",
    "local_rank": "processes learn it from their launcher: start with `accelerate launch` or `torchrun`",
    "center_crop": "images are always cropped at their centre: leave it out",
    "enable_xformers_memory_efficient_attention": "attention is always PyTorch's own memory-efficient one: leave it out",
}
"""Flags of diffusers' scripts that do not exist here on purpose: why, and what to do."""

BATCH = "train_batch_size"


@dataclasses.dataclass(frozen=True)
class _Samples:
    """Generated samples per step: a value of `labels_per_step` until it is known how many belong to a label."""

    count: int


def parse_arguments(
    kinds: tuple[type, ...], argv: Sequence[str] | None = None, *, description: str | None = None, epilog: str | None = None
) -> tuple[Any, ...]:
    """One instance of each kind, from `--preset NAME`, under the values of `--config FILE.yaml`, under the flags.

    The preset's name also goes into the field `preset` of a kind that has one. With a preset, `output_dir` is `runs/NAME` and the warm-up keeps its
    share of `max_steps` where these are not given. Mistakes are told in one line on stderr and end the program with exit code 2.

    Args:
        kinds: dataclasses, at most one of them a `RunConfig`; no two share a field's name.
        argv: the flags; those of this process if not given.
        description: first line of `--help`.
        epilog: its last lines.

    Raises:
        ValueError: for kinds that cannot be parsed together.
    """
    parser = ConfigParser(kinds, description=description, epilog=epilog)
    return parser.values(parser.parse_args(sys.argv[1:] if argv is None else argv))


def describe(config: RunConfig, preset: str | None = None) -> str:
    """What a run is: its preset with what the source reports, or the defaults, and one line for each choice that differs from them."""
    kind = type(config)
    if preset is None:
        base, title = kind(output_dir=config.output_dir), f"defaults of {kind.__name__}"
    else:
        base, title = kind.preset(preset, output_dir=config.output_dir), f"preset {preset}: {overview(kind.presets()[preset])}"
    changes = config.changes_from(base)
    return "\n".join([title, *(f"  {line}" for line in changes.splitlines())]) if changes else f"{title}\n  nothing is changed"


class ConfigParser(argparse.ArgumentParser):
    """The parser of `parse_arguments`, which may be a command's.

    Flags are collected without defaults, so that what was given is known; defaults are the dataclasses' own.

    Args:
        kinds: as for `parse_arguments`.
        description: first lines of `--help`.
        epilog: its last lines.
        how: further arguments of an `ArgumentParser`, as in prog.
    """

    def __init__(self, kinds: Sequence[type], *, description: str | None = None, epilog: str | None = None, **how: Any):
        self.kinds, self.types = tuple(kinds), _types_of(kinds)
        run = next((kind for kind in kinds if issubclass(kind, RunConfig)), None)
        presets = run.presets() if run is not None else {}
        self.aliases = {alias: to for alias, to in ALIASES.items() if alias not in self.types and to in self.types}
        if BATCH not in self.types and {"labels_per_step", "generated_per_label"} <= self.types.keys():
            self.aliases[BATCH] = "labels_per_step"
        usage = f"%(prog)s {'[--preset NAME] ' if presets else ''}[--config FILE.yaml] [options]"
        text = HelpFormatter.epilog(self.aliases, presets, epilog)
        super().__init__(usage=usage, description=description, epilog=text, formatter_class=HelpFormatter, allow_abbrev=False, **how)
        group = self.add_argument_group("where values come from")
        group.add_argument(
            "--config", metavar="FILE.yaml", default=SUPPRESS, help="values by the options' names; over a preset's, under flags"
        )
        if presets and "preset" not in self.types:
            self.types["preset"] = str | None
            group.add_argument("--preset", metavar="NAME", default=SUPPRESS, help="a published recipe; they are listed below")
        for kind in self.kinds:
            self._add_fields(kind)
        for alias, target in self.aliases.items():
            self._add_alias(alias, self._option_string_actions[f"--{target}"])

    def _add_fields(self, kind: Any) -> None:
        for title, names in sections_of(kind):
            group = self.add_argument_group(title)
            for name in names:
                self._add_field(group, kind.__dataclass_fields__[name], self.types[name])

    def _add_field(self, group: Any, field: dataclasses.Field, kind: Any) -> None:
        """No default, a list may be empty, every switch has its opposite, and `none` is None."""
        text = f"{field.metadata.get('help', '')} ({default_in_words(field)})".replace("%", "%%").strip()
        shared: dict[str, Any] = {"dest": field.name, "default": SUPPRESS}
        add = lambda name, **how: group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **shared, **how)
        add(field.name, help=text, metavar=metavar_of(kind), **_reader(kind))
        if kind is bool or bool in get_args(kind):
            add(f"no_{field.name}", help=SUPPRESS, action="store_false")

    def _add_alias(self, alias: str, action: Any) -> None:
        spellings = dict.fromkeys((f"--{alias}", f"--{alias.replace('_', '-')}"))
        same = {key: getattr(action, key) for key in ("type", "nargs", "const", "choices")}
        self.add_argument(*spellings, dest=alias, default=SUPPRESS, help=SUPPRESS, **same)

    def error(self, message: str) -> NoReturn:
        """One line: the usage of many options would hide it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """All of them are known, or it is a mistake."""
        try:
            words = [self._spelled_our_way(word) for word in (sys.argv[1:] if args is None else args)]
        except ValueError as error:
            self.error(str(error))
        namespace, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"{rest[0]!r} belongs to no option: options start with --, and a value with spaces stands in quotes")
        return namespace, rest

    def values(self, namespace: argparse.Namespace) -> tuple[Any, ...]:
        """One instance of each kind from what was parsed; a mistake ends the program."""
        try:
            return self._values(
                {name: value for name, value in vars(namespace).items() if name in self.types or name in self.aliases}, namespace
            )
        except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
            self.error(str(error))

    def _values(self, given: Mapping[str, Any], namespace: argparse.Namespace) -> tuple[Any, ...]:
        file = getattr(namespace, "config", None)
        flags = self._by_field(given, "on the command line")
        values = self._by_field(self._read_yaml(file), f"in {file}") | flags if file is not None else flags
        return tuple(self._build(kind, values) for kind in self.kinds)

    def _spelled_our_way(self, word: str) -> str:
        """A flag with underscores; other words as they are."""
        if not word.startswith("--") or word == "--":
            return word
        name, equals, value = word.partition("=")
        name = "--" + name[2:].replace("-", "_")
        if name not in self._option_string_actions:
            known = (option[2:] for option in self._option_string_actions if option.startswith("--"))
            raise ValueError(_unknown(name[2:], known, "--"))
        return name + equals + value

    def _read_yaml(self, file: str) -> dict[str, Any]:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
        if content is None:
            return {}
        if not isinstance(content, dict):
            raise ValueError(f"{file} must hold `option: value` lines, got a {type(content).__name__}")
        own = {name: self.types[to] for name, to in self.aliases.items()} | self.types
        for name in content:
            if name not in own:
                raise ValueError(f"{file}: {_unknown(str(name), own, '')}")
        return {name: _typed(f"{file}: {name}", value, own[name]) for name, value in content.items()}

    def _by_field(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The same values under the fields' own names."""
        values: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        for name, value in given.items():
            target = self.aliases.get(name, name)
            if target in spelled:
                raise ValueError(f"{spelled[target]} and {name} are the same choice, and both stand {where}: keep {target}")
            spelled[target] = name
            if self.types[target] == list[str] and "none" in (words := [word.lower() for word in value]):
                if len(words) > 1:
                    raise ValueError(f"{name} must be names or none, got {' '.join(value)}")
                values[target] = []
            elif name == BATCH and target == "labels_per_step":
                values[target] = _Samples(value)
            else:
                values[target] = value
        return values

    def _build(self, kind: Any, values: Mapping[str, Any]) -> Any:
        fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
        mine = {name: values[name] for name in fields if name in values}
        preset = values.get("preset") if issubclass(kind, RunConfig) else None
        if preset is None:
            for field in fields.values():
                if field.name not in mine and field.default is field.default_factory is dataclasses.MISSING:
                    raise ValueError(f"--{field.name} is missing: {field.metadata.get('help', 'there is no default')}")
            return kind(**_with_labels(mine, {name: field.default for name, field in fields.items()}))
        base = kind.preset(preset)
        if mine.get("max_steps", 0) > 0 and "warmup_steps" not in mine:
            mine["warmup_steps"] = round(base.warmup_steps * mine["max_steps"] / base.max_steps)
        return kind.preset(preset, **_with_labels(mine, vars(base)))


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is a mistake, not the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} stands twice in the file ({str(node.start_mark).strip()}): keep one")
        return super().construct_mapping(node, deep)


def _types_of(kinds: Iterable[type]) -> dict[str, Any]:
    """The types of all fields by name."""
    if sum(issubclass(kind, RunConfig) for kind in kinds) > 1:
        raise ValueError(f"at most one kind may be a RunConfig, got {[kind.__name__ for kind in kinds]}")
    owners: dict[str, str] = {"config": "the parser", "help": "the parser"}
    found: dict[str, Any] = {}
    for kind in kinds:
        for field in dataclasses.fields(kind):
            if field.name in owners:
                raise ValueError(f"{field.name!r} belongs to {owners[field.name]} and to {kind.__name__}: rename one")
            owners[field.name] = kind.__name__
            found[field.name] = get_type_hints(kind)[field.name]
    return found


def _reader(kind: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    parts = get_args(kind)
    if type(None) in parts:
        how = _reader(next(part for part in parts if part is not type(None)))
        return how | {"type": _or_none(how.get("type", str))} | ({"choices": [*how["choices"], None]} if "choices" in how else {})
    if bool in parts:
        return {"type": _truth_or_word, "nargs": "?", "const": True}
    if get_origin(kind) is Literal:
        return {"choices": list(parts)}
    if get_origin(kind) is list:
        return {"type": parts[0], "nargs": "*"}
    return {"type": _truth, "nargs": "?", "const": True} if kind is bool else {"type": kind}


TRUTHS = {"true": True, "yes": True, "t": True, "y": True, "1": True, "false": False, "no": False, "f": False, "n": False, "0": False}


def _truth(text: str) -> bool:
    if text.lower() not in TRUTHS:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return TRUTHS[text.lower()]


def _truth_or_word(text: str) -> bool | str:
    """Of a switch that takes words too; which ones, its dataclass knows."""
    return TRUTHS.get(text.lower(), text)


def _or_none(convert: Any) -> Any:
    return functools.wraps(convert)(lambda text: None if text.lower() == "none" else convert(text))


def _unknown(name: str, known: Iterable[str], dashes: str) -> str:
    if name in REFUSED:
        return f"there is no {dashes}{name}: {REFUSED[name]}"
    close = difflib.get_close_matches(name, [*known], n=1)
    return f"there is no {dashes}{name}" + (f"; did you mean {dashes}{close[0]}?" if close else "")


def _with_labels(values: dict[str, Any], under: Mapping[str, Any]) -> dict[str, Any]:
    """The values with `labels_per_step` as a number of labels."""
    samples = values.get("labels_per_step")
    if not isinstance(samples, _Samples):
        return values
    each = values.get("generated_per_label", under["generated_per_label"])
    if samples.count < 1 or each < 1 or samples.count % each:
        raise ValueError(
            f"{BATCH} must be a multiple of generated_per_label, got {samples.count} and {each}: it is the generated samples of a step over all "
            "processes, labels_per_step x generated_per_label"
        )
    return values | {"labels_per_step": samples.count // each}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value of a YAML file as the field's type has it."""
    origin, parts = get_origin(kind), get_args(kind)
    if bool in parts and isinstance(value, bool | str):
        return value
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _typed(name, value, next(part for part in parts if part is not type(None)))
    if origin is list:
        return [_typed(name, entry, parts[0]) for entry in (value if isinstance(value, list) else [value])]
    if origin is Literal:
        value = "no" if value is False and "no" in parts else value  # YAML's `no` is false
        if value not in parts:
            raise ValueError(f"{name} must be one of {parts}, got {value!r}")
        return value
    return _plain(name, value, kind)


def _plain(name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError as error:
            raise ValueError(f"{name} must be a number, got {value!r}") from error
    if type(value) is kind:
        return value
    ways_out = {str: "put it in quotes", bool: "write true or false, without quotes", int: "write digits alone, without quotes, as in 1000"}
    if kind in ways_out or not isinstance(value, str):
        raise ValueError(f"{name} must be {kind.__name__}, got {type(value).__name__} {value!r}: {ways_out.get(kind, 'see --help')}")
    return kind(value)  # as in a path
