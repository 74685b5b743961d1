r"""A pipeline as one file for other runtimes: image = decode(f(noise; label, guidance scale, style)), in a single call of a graph.

There is no sampling loop to write anew elsewhere. What is random stays outside: noise and style labels are inputs. The graph takes and returns float32
and int64 in whatever precision it computes, and what a program must know to draw by the name of a class stands in the file's metadata. A file is
compared with PyTorch before it gets its name, and one that differs gets none.
"""

import copy
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .export_metadata import RANGES, describe, type_name
from .hub import with_plain_weights
from .pipeline import DriftingPipeline
from .shapes import Float, Int

INSTALL = "pip install 'drifting-diffusers[export]'"

TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a graph may be from PyTorch in float32, by what it computes in; in units of the largest value that PyTorch returns, at least 1."""

LARGEST_FILE = 2_000_000_000
"""Bytes of weights in one ONNX file, which ends at 2^31 with all that it holds; more weights stand in a second file beside it."""

PROBES = (1, 2, 5)  # batches that a graph of any batch size is checked with; of a fixed size, as many of it

Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: the graph. Where its weights are larger than 2 GB they stand beside it, under its name with ".data" behind it.
        size: bytes of both.
        metadata: what stands in the file beside the graph.
        max_error: the largest difference to PyTorch in float32 that was seen, in the units of the output; None if it was not checked.
        tolerance: what was allowed, in the same units; None if it was not checked.
        checked: what it was checked with, or why not.
    """

    file: Path
    size: int
    metadata: dict[str, str]
    max_error: float | None
    tolerance: float | None
    checked: str


@dataclass(frozen=True, kw_only=True)
class ExportChoices:
    """What `export_onnx` and `export_program` can be told.

    Args:
        with_decoder: whether the vae decodes the generator's samples; if not given, it does where there is one. Without it, samples of a pipeline with a
            vae, or of other than 1 or 3 channels, are latents, as the generator returns them. A program with an `AutoencoderKL` takes up to 63 at a time.
        output_range: "signed" for images clipped to [-1, 1], taken if not given, or "unit" for images in [0, 1].
        batch_size: the one that the graph takes; any if not given.
        dtype: of weights and activations: float32, float16 or bfloat16, which few runtimes take.
        tolerance: how far the file may be from PyTorch, see `TOLERANCES`, which holds what is taken if not given.
        check: whether to run the file and to compare it with PyTorch; ONNX needs onnxruntime for it.
        overwrite: whether to replace a file of that name.
    """

    with_decoder: bool | None = None
    output_range: str | None = None
    batch_size: int | None = None
    dtype: torch.dtype = torch.float32
    tolerance: float | None = None
    check: bool = True
    overwrite: bool = False

    def __post_init__(self):
        if self.output_range not in (None, *RANGES):
            raise ValueError(f"output_range must be one of {tuple(RANGES)}, got {self.output_range!r}")
        if self.dtype not in TOLERANCES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, got {self.dtype!r}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or None for any, got {self.batch_size}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be above 0, got {self.tolerance}")


class OneCall(nn.Module):
    """What a pipeline does between drawing noise and making pictures of what comes out: the graph.

    Args:
        pipeline: copied to the CPU in float32; adapters become part of the weights.
        choices: of decoder and range.
    """

    def __init__(self, pipeline: DriftingPipeline, choices: ExportChoices):
        super().__init__()
        decodes = pipeline.vae is not None if choices.with_decoder is None else choices.with_decoder
        if decodes and pipeline.vae is None:
            raise ValueError("this pipeline has no decoder: load it with a vae, or export it without")
        self.transformer = _plain(pipeline.transformer)
        self.vae = _plain(pipeline.vae) if decodes else None
        self.output = "images" if decodes or (pipeline.vae is None and self.transformer.out_channels in (1, 3)) else "latents"
        if choices.output_range is not None and self.output == "latents":
            raise ValueError(f"output_range is of images, got {choices.output_range!r} for latents: leave it out, or export with a decoder")
        self.unit = choices.output_range == "unit"
        self.pipeline = DriftingPipeline(self.transformer, vae=self.vae)  # it knows how latents are scaled
        self.precision = torch.float32
        self.eval().requires_grad_(False)

    def computing_in(self, dtype: torch.dtype) -> "OneCall":
        """This module, with weights and activations of that type from now on; inputs and outputs stay as they are."""
        self.precision = dtype
        return self.to(dtype)

    def forward(
        self,
        noise: Float[Tensor, "b c h w"],
        class_labels: Int[Tensor, " b"] | None = None,
        guidance_scale: Float[Tensor, " b"] | None = None,
        style_labels: Int[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b _ _ _"]:
        """Images, clipped to their range, or latents. What the generator is not told is left out."""
        scale = 1.0 if guidance_scale is None else guidance_scale
        sample = self.transformer(noise.to(self.precision), class_labels, scale, style_labels, return_dict=False)[0]
        if self.output == "latents":
            return sample.float()
        images = self.pipeline.decode(sample).float()
        return (images / 2 + 0.5).clamp(0, 1) if self.unit else images.clamp(-1, 1)

    def random_inputs(self, batch: int, seed: int) -> Inputs:
        """What the graph takes, by name and in its order, drawn as a pipeline draws it; guidance scales uniform in [1, 4]."""
        model, rng = self.transformer, torch.Generator().manual_seed(seed)
        config = model.config
        inputs = {"noise": torch.randn(batch, config.in_channels, model.sample_height, model.sample_width, generator=rng)}
        if config.num_classes:
            inputs["class_labels"] = torch.randint(config.num_classes, (batch,), generator=rng)
        if config.guidance_embedding:
            inputs["guidance_scale"] = 1 + 3 * torch.rand(batch, generator=rng)
        if config.num_style_tokens:
            inputs["style_labels"] = torch.randint(config.style_codebook_size, (batch, config.num_style_tokens), generator=rng)
        return inputs


def export_onnx(pipeline: DriftingPipeline, file: str | os.PathLike, **choices: Any) -> Exported:
    """Write a pipeline as ONNX.

    Inputs of the graph are `noise` [b, c, h, w], `class_labels` [b], `guidance_scale` [b] and `style_labels` [b, k], each of them only if the generator
    takes it; its output is `images` or `latents`, [b, c, h, w]. Floats are float32 and labels int64. The metadata hold names of the classes, the default
    guidance scale, shapes and ranges, the repository the pipeline came from and the licence on its card.

    Args:
        pipeline: left as it is.
        file: ends in ".onnx".
        choices: by name, see `ExportChoices`.

    Raises:
        ImportError: if onnx or onnxscript are not installed.
        FileExistsError: if the file is there already.
        ValueError: if a choice does not fit the pipeline, onnxruntime cannot run the graph, or the graph differs from PyTorch. Nothing is written then.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX needs {' and '.join(missing)}: {INSTALL}")
    return _export(_Format(".onnx", _write_onnx, _onnx_runner), pipeline, Path(file), ExportChoices(**choices))


def export_program(pipeline: DriftingPipeline, file: str | os.PathLike, **choices: Any) -> Exported:
    """Write a pipeline as a program of `torch.export`, which torch reads and runs without this library or diffusers.

    `torch.export.load(file).module()` takes the inputs that `export_onnx` names, by name. The metadata are the extra file "metadata.json".

    Args:
        pipeline: left as it is.
        file: ends in ".pt2".
        choices: by name, see `ExportChoices`.

    Raises:
        FileExistsError: if the file is there already.
        ValueError: if a choice does not fit the pipeline, or the program differs from PyTorch. Nothing is written then.
    """
    return _export(_Format(".pt2", _write_program, _program_runner), pipeline, Path(file), ExportChoices(**choices))


@dataclass(frozen=True)
class _Format:
    """How a program is written, and how the file is run; a runner of None says that nothing here can run it."""

    ending: str
    write: Callable[[ExportedProgram, Path, Mapping[str, str], ExportChoices], None]
    runner: Callable[[Path], tuple[Run | None, str]]


def _export(form: _Format, pipeline: DriftingPipeline, file: Path, choices: ExportChoices) -> Exported:
    if file.suffix != form.ending:
        raise ValueError(f"the file's name must end in {form.ending}, got {file.name}")
    _check_free([file], choices.overwrite)
    call = OneCall(pipeline, choices)
    batches = PROBES if choices.batch_size is None else [choices.batch_size] * len(PROBES)
    probes = [call.random_inputs(batch, seed) for seed, batch in enumerate(batches)]
    with torch.no_grad():
        expected = [call(**inputs) for inputs in probes] if choices.check else []
        call.computing_in(choices.dtype)
        if expected and choices.dtype != torch.float32:
            _check_numbers(call, probes)
        with _quiet():
            program = _trace(call, choices.batch_size)
    metadata = describe(pipeline, call, program, dtype=choices.dtype, batch_size=choices.batch_size)
    max_error, tolerance, checked = None, None, "not checked, as told"
    with _beside(file, choices.overwrite) as aside:
        with _quiet():
            form.write(program, aside, metadata, choices)
        if choices.check:
            run, checked = form.runner(aside)
            if run is not None:
                max_error, tolerance = _compared(run, probes, expected, choices)
            del run  # which holds the file open
        size = sum(each.stat().st_size for each in aside.parent.iterdir())
    return Exported(file, size, metadata, max_error, tolerance, checked)


def _plain(model: Any) -> Any:
    """A copy on the CPU in float32: not compiled, with adapters in its weights, without the hooks of offloading."""
    model = with_plain_weights(getattr(model, "_orig_mod", model))
    model = remove_hook_from_module(copy.deepcopy(model), recurse=True)
    for module in model.modules():
        if getattr(getattr(module, "processor", None), "_attention_backend", None) is not None:
            module.processor._attention_backend = None  # of a GPU perhaps
    return nn.Module.to(model, "cpu", torch.float32)  # diffusers' own warns of nothing


def _trace(call: OneCall, batch_size: int | None) -> ExportedProgram:
    inputs = call.random_inputs(batch_size or 2, seed=0)
    shapes = None if batch_size else {name: {0: Dim.DYNAMIC} for name in inputs}  # where a decoder has a bound, it stays
    program = torch.export.export(call, (), inputs, dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _check_numbers(call: OneCall, probes: list[Inputs]) -> None:
    """In PyTorch, because onnxruntime may compute in float32 where it has no other way, and a GPU would not."""
    if not all(call(**inputs).isfinite().all() for inputs in probes):
        raise ValueError(
            f"in {type_name(call.precision)} this pipeline returns NaN: its numbers are too large for it, take bfloat16 or float32"
        )


def _compared(run: Run, probes: list[Inputs], expected: list[Tensor], choices: ExportChoices) -> tuple[float, float]:
    """The largest error and what was allowed."""
    returned = [run(inputs) for inputs in probes]
    error = float(torch.stack([(got - want).abs().max() for got, want in zip(returned, expected, strict=True)]).max())  # NaN stays
    largest = max(1.0, *(float(want.abs().max()) for want in expected))
    allowed = (choices.tolerance or TOLERANCES[choices.dtype]) * largest
    if not error <= allowed:
        way_out = "take float32" if choices.dtype != torch.float32 else "please report it with the generator's configuration"
        raise ValueError(
            f"the graph in {type_name(choices.dtype)} differs from PyTorch by {error:.2g} where {allowed:.2g} is allowed, so nothing was written: "
            f"{way_out}, or allow more with `tolerance`"
        )
    return error, allowed


# -- formats


def _write_onnx(program: ExportedProgram, file: Path, metadata: Mapping[str, str], choices: ExportChoices) -> None:
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    output = json.loads(metadata["output"])["name"]
    model = torch.onnx.export(program, output_names=[output], dynamo=True, verbose=False).model
    ClearMetadataAndDocStringPass()(model)  # paths of this machine
    if choices.batch_size is None:
        _name_batch(model.graph)
    model.metadata_props.update(metadata)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    onnx_ir.save(model, file, external_data=f"{file.name}.data" if weights > LARGEST_FILE else None)


def _name_batch(graph: Any) -> None:
    """Call the first axis of every input "batch", wherever it stands; torch numbers it."""
    symbol = graph.inputs[0].shape[0]
    for value in (*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)):
        for axis, size in enumerate(value.shape or ()):
            if size == symbol:
                value.shape[axis] = "batch"


def _onnx_runner(file: Path) -> tuple[Run | None, str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return None, f"not checked, because onnxruntime is not installed: {INSTALL}"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, torch.get_num_threads()  # errors come as exceptions
    with _runtime_errors():
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Tensor:
        with _runtime_errors():
            return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

    return run, f"onnxruntime {onnxruntime.__version__}"


@contextmanager
def _runtime_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime has a dozen kinds that share no parent
        raise ValueError(
            f"onnxruntime does not run this graph, so nothing was written ({str(error).strip()}): take float32, or do without the check"
        ) from error


def _write_program(program: ExportedProgram, file: Path, metadata: Mapping[str, str], choices: ExportChoices) -> None:
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata, ensure_ascii=False, indent=2)})


def _program_runner(file: Path) -> tuple[Run | None, str]:
    with _quiet():
        module = torch.export.load(file).module()
    return lambda inputs: module(**inputs), f"torch {torch.__version__}"


# -- files


def _check_free(files: list[Path], overwrite: bool) -> None:
    there = [str(file) for file in files if os.path.lexists(file) and not (overwrite and file.is_file())]
    if there:
        raise FileExistsError(f"{' and '.join(there)} exists: give another name, or overwrite=True for a file that may be replaced")


@contextmanager
def _beside(file: Path, overwrite: bool) -> Iterator[Path]:
    """Where to write meanwhile: in a folder of its own, whose files move beside `file` when all is well and are gone otherwise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        yield Path(folder, file.name)
        written = sorted(Path(folder).iterdir(), key=lambda each: each.name == file.name)  # the graph last: it names the other
        _check_free([file.parent / each.name for each in written], overwrite)
        for each in written:
            each.replace(file.parent / each.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of its own insides while it exports: that there is no torchvision, that it calls itself in deprecated ways."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
