"""`drifting-diffusers export`: a pipeline -> one file for other runtimes."""

import argparse
import time
from pathlib import Path
from typing import Any

from .convert import DTYPES
from .pipelines import HELP, hub_errors, located

ENDINGS = {"onnx": ".onnx", "pt2": ".pt2"}

DESCRIPTION = """\
Write a pipeline as one file that draws in one call without this library: ONNX for onnxruntime, browsers and other runtimes, or a program of torch.export.

Inputs of the file are noise, class labels, guidance scales and style labels, whichever the generator takes; the output is images, or latents. Names of the
classes and all that a program must know stand in its metadata. The file is run and compared with PyTorch before it gets its name; one that differs is
not kept. ONNX needs pip install 'drifting-diffusers[export]'.
"""

EXAMPLES = """\
examples:
  drifting-diffusers export fashion-mnist clothes.onnx
  drifting-diffusers export user/drifting-B B.onnx --decoder madebyollin/taesd --dtype float16 --output-range unit
  drifting-diffusers export outputs/mine/pipeline mine.pt2 --no-decoder --batch-size 16
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("pipeline", metavar="PIPELINE", help=HELP)
    parser.add_argument("target", metavar="TARGET", type=Path, help="the file to write")
    parser.add_argument("--format", choices=ENDINGS, help="of the file (default: as TARGET ends; without an ending this one is added)")
    parser.add_argument("--revision", help="of the repository: a branch, tag or commit")
    graph = parser.add_argument_group("what the file computes")
    decodes = graph.add_mutually_exclusive_group()
    decodes.add_argument("--with-decoder", action="store_true", default=None, help="images (default where the pipeline has a decoder)")
    decodes.add_argument("--no-decoder", dest="with_decoder", action="store_false", default=None, help="leave latents as they are")
    graph.add_argument("--decoder", metavar="NAME", help="decoder of latents in place of the pipeline's: a folder or a repository")
    graph.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and activations (default: float32)")
    graph.add_argument("--batch-size", type=_batch_size, metavar="N|dynamic", help="images in one call (default: dynamic, any number)")
    graph.add_argument("--output-range", choices=("signed", "unit"), help="images in [-1, 1] or in [0, 1] (default: signed)")
    how = parser.add_argument_group("how it is written")
    how.add_argument(
        "--tolerance",
        type=float,
        metavar="E",
        help="largest error, in the output's largest value (default: 1e-4, float16 2e-2, bfloat16 1e-1)",
    )
    how.add_argument("--no-check", dest="check", action="store_false", help="write it without running it")
    how.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(options: argparse.Namespace) -> None:
    """Export, and say what the file takes, what it returns and how far it is from PyTorch."""
    kind, target = _target(options)
    if options.decoder is not None and options.with_decoder is False:
        raise ValueError(f"--decoder {options.decoder} and --no-decoder contradict each other: give one of them")
    if target.exists() and not options.overwrite:
        raise FileExistsError(f"{target} exists: give another TARGET, or --overwrite")
    started = time.monotonic()

    import torch

    from ..export import export_onnx, export_program

    export = {"onnx": export_onnx, "pt2": export_program}[kind]
    done = export(
        _load(options),
        target,
        with_decoder=options.with_decoder,
        output_range=options.output_range,
        batch_size=options.batch_size,
        dtype=getattr(torch, options.dtype),
        tolerance=options.tolerance,
        check=options.check,
        overwrite=options.overwrite,
    )
    _report(done, time.monotonic() - started)


def _batch_size(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, or dynamic, got {text!r}")
    return int(text)


def _target(options: argparse.Namespace) -> tuple[str, Path]:
    """Format and file."""
    target: Path = options.target
    meant = next((kind for kind, ending in ENDINGS.items() if target.suffix == ending), None)
    if options.format is None and meant is None:
        raise ValueError(f"TARGET {target} says no format: let it end in .onnx or .pt2, or give --format")
    if options.format not in (None, meant):
        if meant is not None:
            raise ValueError(f"TARGET {target} ends in {target.suffix}, --format says {options.format}: give one of them")
        target = target.with_name(target.name + ENDINGS[options.format])
    return str(options.format or meant), target


def _load(options: argparse.Namespace) -> Any:
    from diffusers import AutoModel
    from diffusers.utils import logging

    from ..pipeline import DriftingPipeline

    logging.disable_progress_bar()
    source = located(options.pipeline, options.revision)
    with hub_errors(options.decoder or source):
        parts = {"vae": AutoModel.from_pretrained(options.decoder)} if options.decoder else {}
    if options.with_decoder is False:
        parts = {}
    with hub_errors(source):
        return DriftingPipeline.from_pretrained(source, revision=options.revision, **parts)


def _report(done: Any, seconds: float) -> None:
    import json

    inputs, output = json.loads(done.metadata["inputs"]), json.loads(done.metadata["output"])
    shape = lambda entry: f"{entry['type']} [{', '.join(map(str, entry['shape']))}]"
    print(f"{done.file}: {done.size / 1e6:.1f} MB, computes in {done.metadata['dtype']}, {seconds:.0f} s")
    for name, entry in inputs.items():
        print(f"  takes {name}: {shape(entry)}")
    span = f" in [{output['range'][0]}, {output['range'][1]}]" if "range" in output else ""
    print(f"  returns {output['name']}: {shape(output)}{span}")
    if done.max_error is None:
        print(f"  {done.checked}")
    else:
        print(f"  compared with PyTorch by {done.checked}: the largest error is {done.max_error:.1e}, {done.tolerance:.1e} is allowed")
