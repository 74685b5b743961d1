r"""What can be done to a pipeline before it draws, so that it draws the same images faster, told line by line.

The numbers stay the same up to rounding: nothing here changes the precision, the weights or what is saved.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

COMPILE = (None, "blocks", "graphs")
GRAPHS: dict[str, Any] = {"mode": "reduce-overhead", "dynamic": False}  # CUDA graphs, one for every batch size


@dataclass(frozen=True)
class Step:
    """One line of what was done.

    Attributes:
        name: of the step.
        done: whether it holds now.
        why: what it does, or why it was left.
    """

    name: str
    done: bool
    why: str


@dataclass(frozen=True)
class Optimised:
    """What `DriftingPipeline.optimize` did and what it left, a line each when printed."""

    steps: tuple[Step, ...]

    @property
    def done(self) -> list[str]:
        """The names of what was done."""
        return [step.name for step in self.steps if step.done]

    def __str__(self) -> str:
        width = max(len(step.name) for step in self.steps)
        return "\n".join(f"{'done' if step.done else 'left'}  {step.name:<{width}}  {step.why}" for step in self.steps)

    __repr__ = __str__


def optimise(pipeline: Any, compile: str | None = None) -> Optimised:
    """Prepare a pipeline where it stands; see `DriftingPipeline.optimize`."""
    if compile not in COMPILE:
        raise ValueError(f"compile must be one of {COMPILE}, got {compile!r}")
    return Optimised(tuple(_steps(pipeline, compile)))


def is_compiled(model: Any) -> bool:
    """Whether a model is called through a compiler, by whichever of torch's ways."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def new_step(*models: Any) -> None:
    """Tell CUDA graphs that what the last call of these models returned is no longer needed; nothing where none is compiled."""
    if any(is_compiled(model) or is_compiled(getattr(model, "decoder", None)) for model in models):
        torch.compiler.cudagraph_mark_step_begin()


def compile_trouble(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device; None if nothing speaks against it."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "torch.compile writes Triton for this device, and triton is not installed"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or more"
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        return f"torch.compile writes C++ for this device, and {compiler} was not found: install it, or name another in CXX"
    return None


def _steps(pipeline: Any, compile: str | None) -> Iterator[Step]:
    generator, decoder = getattr(pipeline.transformer, "_orig_mod", pipeline.transformer), getattr(pipeline.vae, "decoder", None)
    yield _fuse(generator)
    yield _attention(generator)
    yield _channels_last(pipeline.vae)
    yield _precision(generator)
    trouble = _obstacle(pipeline, generator.device, compile)
    yield _compile("compiled generator", trouble, generator, lambda: _compile_generator(generator, compile))
    if decoder is not None:
        yield _compile("compiled decoder", trouble, decoder, lambda: decoder.compile(**(GRAPHS if compile == "graphs" else {})))


def _fuse(generator: Any) -> Step:
    name = "one projection"
    try:
        generator.fuse_modulation()
    except ValueError as error:
        return Step(name, False, str(error))
    layers = len(generator.transformer_blocks) + 1
    return Step(
        name, True, f"the condition is projected for all {layers} layers in one product; where the generator is compiled, it is as before"
    )


def _attention(generator: Any) -> Step:
    backends = {
        processor._attention_backend for processor in generator.attn_processors.values() if hasattr(processor, "_attention_backend")
    }
    chosen = ", ".join(str(backend) for backend in backends - {None}) or "torch's scaled_dot_product_attention, which chooses by device"
    return Step("fused attention", True, f"as always: {chosen}; another by `transformer.set_attention_backend`")


def _channels_last(vae: Any) -> Step:
    name = "channels_last decoder"
    if vae is None:
        return Step(name, False, "there is no decoder: samples are images")
    if not any(isinstance(module, nn.Conv2d) for module in vae.modules()):
        return Step(name, False, f"{type(vae).__name__} has no convolutions of images")
    vae.to(memory_format=torch.channels_last)
    return Step(name, True, "convolutions read the channels of a pixel side by side")


def _precision(generator: Any) -> Step:
    kind, device = str(generator.dtype).removeprefix("torch."), generator.device.type
    if generator.dtype in (torch.bfloat16, torch.float16):
        return Step("16 bits", True, f"as loaded: {kind}")
    gain = "half the bytes, and the matrix units of a GPU" if device == "cuda" else "which few CPUs multiply faster"
    return Step("16 bits", False, f"it would change the images: load with dtype=torch.bfloat16 for it ({gain})")


def _obstacle(pipeline: Any, device: torch.device, compile: str | None) -> str | None:
    """Why what was asked for cannot be compiled."""
    if compile is None:
        return 'not asked for: compile="blocks", or "graphs" for CUDA graphs at one batch size'
    if compile == "graphs" and device.type != "cuda":
        return f'CUDA graphs need a GPU, this is on "{device.type}": take compile="blocks"'
    if getattr(pipeline, "_all_hooks", None):
        return "the parts of this pipeline are moved to the GPU one by one: compile without offloading"
    return compile_trouble(device)


def _compile(name: str, trouble: str | None, model: Any, go: Callable[[], None]) -> Step:
    parts = [model, *getattr(model, "transformer_blocks", [])]
    if any(is_compiled(part) for part in parts):
        return Step(name, True, "it was compiled before and stays as it is")
    if trouble is not None:
        return Step(name, False, trouble)
    go()
    return Step(name, True, "its first call at every batch size compiles, and takes up to minutes")


def _compile_generator(generator: Any, compile: str | None) -> None:
    if compile == "graphs":
        generator.compile(**GRAPHS)
    else:
        generator.compile_repeated_blocks()
