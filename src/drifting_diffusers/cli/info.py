"""`drifting-diffusers info`: what a pipeline is, from its configurations and the headers of its weights."""

import argparse
import json
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..shipped import SHIPPED
from .pipelines import HELP, INDEX, hub_errors, located

DESCRIPTION = """\
What a pipeline is: classes, weights, guidance, and its results beside those of real images. No weights are loaded; of a repository only the small
files are fetched, and of its weights the headers.
"""

EXAMPLES = """\
examples:
  drifting-diffusers info fashion-mnist
  drifting-diffusers info fashion-mnist --labels
  drifting-diffusers info user/drifting-L --json
"""

SHOWN = 6  # names of classes
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}  # of safetensors, as torch and --dtype name them
SMALL = (INDEX, "README.md", "results.json", "*/config.json")


@dataclass(frozen=True)
class Store:
    """Where a pipeline lies.

    Attributes:
        folder: with the small files.
        sizes: bytes of all its files by their path.
        header: of a safetensors file by its path, with `parameter_count` by data type.
    """

    folder: Path
    sizes: Mapping[str, int]
    header: Callable[[str], Any]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("pipeline", metavar="PIPELINE", help=HELP)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, for machines")
    form.add_argument("--labels", action="store_true", help="every class with its id, a line each")
    parser.add_argument("--revision", help="of the repository: a branch, tag or commit")


def run(options: argparse.Namespace) -> None:
    """Print what is there."""
    source = located(options.pipeline, options.revision)
    if Path(source).is_dir():
        about = describe(_local(Path(source)))
    else:
        with hub_errors(source):
            about = describe(_remote(source, options.revision))
    if options.json:
        print(json.dumps({"pipeline": options.pipeline, **about}, indent=2, ensure_ascii=False))
    elif options.labels:
        print("\n".join(f"{i:>4}  {name}" for i, name in enumerate(about["labels"] or [""] * about["classes"])) or "it knows no classes")
    else:
        print(_page(options.pipeline, about))


# Where it lies


def _local(folder: Path) -> Store:
    from huggingface_hub import parse_local_safetensors_file_metadata

    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return Store(folder, sizes, lambda name: parse_local_safetensors_file_metadata(folder / name))


def _remote(repository: str, revision: str | None) -> Store:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    if constants.is_offline_mode():
        return _local(Path(snapshot_download(repository, revision=revision, local_files_only=True)))
    there = api.model_info(repository, revision=revision)
    sizes = {
        each.path: each.size for each in api.list_repo_tree(repository, recursive=True, revision=there.sha) if isinstance(each, RepoFile)
    }
    if INDEX not in sizes:
        raise FileNotFoundError(f"{repository} holds no {INDEX}, so it is no pipeline: is it a single network?")
    folder = snapshot_download(repository, revision=there.sha, allow_patterns=list(SMALL))
    return Store(Path(folder), sizes, lambda name: api.parse_safetensors_file_metadata(repository, name, revision=there.sha))


# What it is


def describe(store: Store) -> dict[str, Any]:
    """The pipeline as JSON: classes, sample, guidance, components, configuration, results."""
    index = _read(store.folder / INDEX)
    names = [
        name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and None not in value and name != "_class_name"
    ]
    configs = {name: _read(store.folder / name / "config.json") for name in names}
    config = configs.get("transformer", {})
    labels = index.get("labels") or []
    return {
        "class": index["_class_name"][-1] if isinstance(index["_class_name"], list) else index["_class_name"],
        "diffusers_version": index.get("_diffusers_version"),
        "classes": config.get("num_classes"),
        "labels": list(labels.values()) if isinstance(labels, dict) else labels,
        "sample": {"channels": config.get("out_channels") or config.get("in_channels"), "size": config.get("sample_size")},
        "guidance_scale": index.get("guidance_scale"),
        "guidance_embedding": config.get("guidance_embedding"),
        "components": {name: _component(store, name, configs[name]) for name in names},
        "bytes": sum(store.sizes.values()),
        "config": configs,
        "results": _results(store.folder),
    }


def _component(store: Store, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Class, weights by data type and bytes of a component; its plain weights where there are variants."""
    files = [file for file in store.sizes if file.startswith(f"{name}/") and file.endswith(".safetensors")]
    plain = [file for file in files if file.removesuffix(".safetensors").count(".") == 0] or files
    counts: Counter[str] = Counter()
    for file in plain:
        counts.update(store.header(file).parameter_count)
    return {
        "class": config.get("_class_name"),
        "parameters": sum(counts.values()),
        "dtypes": {DTYPES.get(kind, kind): count for kind, count in counts.items()},
        "bytes": sum(store.sizes[file] for file in plain),
    }


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): save or fetch the pipeline again") from error


def _results(folder: Path) -> dict[str, Any] | None:
    """What results.json says, else what the index of the card says."""
    if (folder / "results.json").is_file():
        return _read(folder / "results.json")
    if not (folder / "README.md").is_file():
        return None
    from huggingface_hub import ModelCard

    found = ModelCard((folder / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=True).data.eval_results or []
    if not found:
        return None
    return {"metrics": {each.metric_type: each.metric_value for each in found}, "dataset": found[0].dataset_name}


# How it is shown


def _page(name: str, about: Mapping[str, Any]) -> str:
    """A page for people, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, 110)
    rows = {"": SHIPPED.get(name, ""), "draws": _drawn(about), "classes": _classes(about), "guidance": _guidance(about)}
    rows |= {part: _weights(each) for part, each in about["components"].items()}
    rows["files"] = f"{_size(about['bytes'])}, written with diffusers {about['diffusers_version']}"
    lines = [f"{name}: a {about['class']}", *(_row(title, text, width) for title, text in rows.items() if text)]
    return "\n".join([*lines, *_table(about["results"], width)])


def _row(title: str, text: str, width: int) -> str:
    return textwrap.fill(text, width, initial_indent=f"  {title:<12}", subsequent_indent=" " * 14, break_on_hyphens=False)


def _drawn(about: Mapping[str, Any]) -> str:
    size, channels = about["sample"]["size"], about["sample"]["channels"]
    sides = " x ".join(map(str, size)) if isinstance(size, list) else f"{size} x {size}"
    if "vae" in about["components"]:
        return f"latents of {sides} in {channels} channels, decoded by {about['components']['vae']['class']}"
    return f"{sides} pixels, {({1: 'grey', 3: 'in colour'}).get(channels, f'{channels} channels')}"


def _classes(about: Mapping[str, Any]) -> str:
    names = [name.split(",")[0] for name in about["labels"]]
    if not about["classes"]:
        return "none"
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{about['classes']}: {shown}" if names else f"{about['classes']}, without names"


def _guidance(about: Mapping[str, Any]) -> str:
    if not about["guidance_embedding"]:
        return "none: the generator was trained without it, so the scale stays 1"
    return f"a scale told to the generator; {about['guidance_scale']:g} if none is given"


def _weights(part: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{count:,} in {kind}" if len(part["dtypes"]) > 1 else kind for kind, count in part["dtypes"].items())
    return f"{part['class']}, {part['parameters']:,} weights" + (
        f" ({kinds}, {_size(part['bytes'])})" if kinds else "; no .safetensors is there"
    )


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _table(results: Mapping[str, Any] | None, width: int) -> list[str]:
    """Numbers of the pipeline beside those of real images, and how they were made."""
    if not results or not results.get("metrics"):
        return ["", "No results come with it; measure it with drifting-diffusers evaluate."]
    real, better, meaning = (results.get(key) or {} for key in ("real", "better", "meaning"))
    number = lambda value: f"{value:.4g}" if isinstance(value, int | float) else "-"
    column = max(12, *(len(name) + 2 for name in results["metrics"]))
    lines = ["", f"  {'results':<{column}}{'generated':>10}{'real':>10}"]
    for name, value in results["metrics"].items():
        row = f"  {name:<{column}}{number(value):>10}{number(real.get(name)):>10}"
        note = meaning.get(name) or (f"{better[name]} is better" if name in better else "")
        lines += textwrap.wrap(note, width, initial_indent=f"{row}  ", subsequent_indent=" " * (len(row) + 2)) or [row]
    made = {
        key: results[key] for key in ("dataset", "steps", "guidance_scale", "samples_per_class", "num_samples", "seeds") if results.get(key)
    }
    words = ", ".join(f"{key.replace('_', ' ')} {' '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in made.items())
    return [*lines, *([textwrap.fill(words, width, initial_indent="  ", subsequent_indent="  ")] if words else [])]
