"""`drifting-diffusers sample`: images of a pipeline, into a grid or into files."""

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from .convert import DTYPES
from .pipelines import HELP, hub_errors, located

DESCRIPTION = """\
Draw images, each in one network call. Labels are names, whole or any part between commas, or ids, or all.

Every image has a seed of its own: image i of a label is drawn with seed S + i, counted from 0, so it is the same whatever is drawn beside it, and
the same as pipe(label, generator=torch.Generator().manual_seed(S + i)) in Python. Several seeds give one image each.

An output that ends in .png is one picture: the image itself where there is one, else a grid with a row for every label. Any other output is a folder
with a file LABEL-SEED.png for every image. Label, seed and guidance scale stand in the metadata of each. No file is replaced without --overwrite.
"""

EXAMPLES = """\
examples:
  drifting-diffusers sample fashion-mnist --labels all --num-images-per-label 8 --output clothes.png
  drifting-diffusers sample fashion-mnist --labels sneaker 8 --seed 3 14 15 --output outputs/samples
  drifting-diffusers sample user/drifting-L --labels macaw alp --guidance-scale 1.5 --device cuda --dtype bfloat16 --output birds.png --overwrite
"""

LARGEST_GRID = 4096  # images; more are no picture
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Job(NamedTuple):
    """One image.

    Attributes:
        label: id of its class; None without classes.
        name: of the class, as the grid shows it; empty without classes.
        stem: of its file, without the seed; empty without classes.
        seed: of its noise and style.
    """

    label: int | None
    name: str
    stem: str
    seed: int


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("pipeline", metavar="PIPELINE", help=HELP)
    what = parser.add_argument_group("what is drawn")
    what.add_argument("--labels", nargs="+", default=(), metavar="LABEL", help="names or ids of classes, or all")
    what.add_argument("--num-images-per-label", type=_positive, metavar="N", help="default: 1, or one for every seed")
    what.add_argument(
        "--seed", type=_seed, nargs="+", default=[0], metavar="S", help="of the first image of every label, or of each (default: 0)"
    )
    what.add_argument("--guidance-scale", type=float, metavar="ALPHA", help="1 is no guidance (default: the pipeline's own)")
    what.add_argument(
        "--style", type=int, nargs="+", metavar="K", help="style labels for all images, in place of those drawn with the seed"
    )
    where = parser.add_argument_group("where it goes")
    where.add_argument(
        "--output", type=Path, default=Path("samples.png"), metavar="FILE|FOLDER", help="FILE.png or a folder (default: samples.png)"
    )
    kind = where.add_mutually_exclusive_group()
    kind.add_argument("--grid", action="store_true", help="a grid in any case; in a folder it is grid.png")
    kind.add_argument("--files", action="store_true", help="a file for every image in any case")
    where.add_argument("--overwrite", action="store_true", help="replace files that are there")
    how = parser.add_argument_group("how")
    how.add_argument("--device", help="as torch names it (default: an accelerator if there is one, else cpu)")
    how.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    how.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="images in one network call (default: 32)")
    how.add_argument("--vae", metavar="NAME", help="decoder of latents in place of the pipeline's: a folder or a repository")
    how.add_argument("--revision", help="of the repository: a branch, tag or commit")


def run(options: argparse.Namespace) -> None:
    """Draw, and say how many images, how long, and where."""
    from .pictures import save_picture, seed_grid

    seeds = _seeds(options)
    pipeline = _load(options)
    jobs = [Job(*label, seed) for label in _labels(pipeline, options) for seed in seeds]
    files = _files(options, jobs)
    _check_free(files, options.overwrite)
    started = time.monotonic()
    images = _draw(pipeline, jobs, options)
    seconds = time.monotonic() - started
    notes = _notes(pipeline, options)
    if len(files) == len(jobs) and not options.grid:
        for job, image, file in zip(jobs, images, files, strict=True):
            save_picture(image, file, notes | {"label": job.name, "seed": str(job.seed)})
    else:
        rows = [(jobs[i].name, images[i : i + len(seeds)]) for i in range(0, len(jobs), len(seeds))]
        labels = ", ".join(name for name, _ in rows if name)
        save_picture(seed_grid(rows, seeds), files[0], notes | {"labels": labels, "seeds": " ".join(map(str, seeds))})
    count = "1 image" if len(jobs) == 1 else f"{len(jobs)} images"
    print(f"{count} in {seconds:.2f} s: {files[0] if len(files) == 1 else options.output}")


# What is drawn


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2^63 - 1, got {text!r}")
    return int(text)


def _seeds(options: argparse.Namespace) -> list[int]:
    """The seeds of a label's images, in their order."""
    given, count = list(dict.fromkeys(options.seed)), options.num_images_per_label
    if len(given) == 1:
        return [given[0] + i for i in range(count or 1)]
    if count not in (None, len(given)):
        raise ValueError(f"--num-images-per-label is {count} and there are {len(given)} seeds: give one seed, or leave the number out")
    return given


def _load(options: argparse.Namespace) -> Any:
    import torch
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    from ..pipeline import DriftingPipeline

    logging.disable_progress_bar()
    dtype = getattr(torch, options.dtype)
    source = located(options.pipeline, options.revision)
    with hub_errors(options.vae or source):
        parts = {"vae": AutoencoderKL.from_pretrained(options.vae, dtype=dtype)} if options.vae else {}
    with hub_errors(source):
        pipeline = DriftingPipeline.from_pretrained(source, dtype=dtype, revision=options.revision, **parts)
    return pipeline.to(options.device or _accelerator())


def _accelerator() -> str:
    import torch

    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def _labels(pipeline: Any, options: argparse.Namespace) -> list[tuple[int | None, str, str]]:
    """Id, name and stem of the files of the classes that are drawn."""
    classes, names, wanted = pipeline.transformer.config.num_classes, pipeline.labels, list(options.labels)
    if classes == 0:
        if wanted:
            raise ValueError("this generator knows no classes: leave --labels out, and say --num-images-per-label")
        return [(None, "", "")]
    if not wanted:
        raise ValueError(f"--labels are needed: all, or names or ids of classes, as in {' '.join(names[:2]) or '0 1'}")
    numbers = [int(word) if word.isdecimal() and word not in names else word for word in wanted]
    try:
        ids = range(classes) if wanted == ["all"] else pipeline.get_label_ids(numbers)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--labels: {error} (drifting-diffusers info {options.pipeline} --labels lists all classes)") from error
    shown, stems = [name.split(",")[0].strip() for name in names] or [*map(str, range(classes))], _stems(names, classes)
    return [(i, shown[i], stems[i]) for i in dict.fromkeys(ids)]


def _stems(names: Sequence[str], classes: int) -> list[str]:
    """A name for the files of every class: the first part of its name, as file systems take it; with its id where that is not its own."""
    plain = [re.sub(r"[^\w.-]+", "-", name.split(",")[0]).strip("-.") for name in names] or [""] * classes
    often = Counter(stem.casefold() for stem in plain)
    return [stem if stem and often[stem.casefold()] == 1 else f"{stem}-{i}".strip("-") for i, stem in enumerate(plain)]


def _draw(pipeline: Any, jobs: Sequence[Job], options: argparse.Namespace) -> list[Any]:
    import torch

    batches = [jobs[i : i + options.batch_size] for i in range(0, len(jobs), options.batch_size)]
    pipeline.set_progress_bar_config(disable=len(batches) == 1 or not sys.stderr.isatty())
    images: list[Any] = []
    for batch in pipeline.progress_bar(batches):
        labels = [job.label for job in batch]
        images += pipeline(
            None if None in labels else labels,
            guidance_scale=options.guidance_scale,
            num_images_per_label=len(batch) if None in labels else 1,
            generator=[torch.Generator().manual_seed(job.seed) for job in batch],
            style_labels=[options.style] * len(batch) if options.style else None,
        ).images
    return images


# Where it goes


def _files(options: argparse.Namespace, jobs: Sequence[Job]) -> list[Path]:
    """One for every image, or one alone: the grid."""
    output: Path = options.output
    picture = output.suffix.lower() == ".png" and not output.is_dir()
    if output.suffix.lower() in OTHER_PICTURES:
        raise ValueError(f"--output {output} is no .png: pictures are written as PNG, which keeps every pixel and the seed; rename it")
    if not picture and output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output {output} is a file: give a folder, or FILE.png")
    if picture and options.files and len(jobs) > 1:
        raise ValueError(f"--files are {len(jobs)} files, and --output {output} is one: give a folder")
    if picture and len(jobs) == 1 and not options.grid:
        return [output]
    if options.grid or picture:
        if len(jobs) > LARGEST_GRID:
            raise ValueError(f"a grid shows up to {LARGEST_GRID} images, got {len(jobs)}: give a folder as --output, and no --grid")
        return [output if picture else output / "grid.png"]
    return [output / f"{f'{job.stem}-' if job.stem else ''}{job.seed}.png" for job in jobs]


def _check_free(files: Sequence[Path], overwrite: bool) -> None:
    there = [file for file in files if os.path.lexists(file)]
    if there and not overwrite:
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise FileExistsError(f"{there[0]}{others} would be replaced: give another --output or --seed, or --overwrite")


def _notes(pipeline: Any, options: argparse.Namespace) -> dict[str, str]:
    """What the metadata of every picture says."""
    scale = options.guidance_scale if options.guidance_scale is not None else pipeline.config.guidance_scale
    source = (
        options.pipeline if not Path(options.pipeline).is_absolute() else Path(options.pipeline).name
    )  # of a machine, nobody's business
    notes = {"Software": f"drifting-diffusers {__version__}", "pipeline": source, "guidance_scale": f"{scale:g}", "dtype": options.dtype}
    return notes | ({"style_labels": " ".join(map(str, options.style))} if options.style else {})
