r"""Samples to be measured, by their index: sample i is the same whatever is drawn beside it, on one device or on eight.

Features are kept in shards while they are made, so an evaluation that was stopped goes on where it was.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import LabelledImages
from .extractors import digest
from .files import write_tensors, write_text
from .meters import FeatureSet
from .pipeline import DriftingPipeline
from .shapes import Float, Int

SHARD = 500  # samples per file: what an interruption may cost
CONTRACT = "contract.json"


@runtime_checkable
class Samples(Protocol):
    """Labelled images by index."""

    labels: Int[Tensor, " n"] | None

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int]) -> Float[Tensor, "b c h w"]:
        """Those of these indices, in [-1, 1]."""
        ...

    def describe(self) -> dict[str, Any]:
        """What they are, as JSON: equal descriptions are equal images."""
        ...


class PipelineSamples:
    """What a pipeline draws: sample i has class i mod the number of classes and a random generator of its own, seeded by (seed, i).

    Args:
        pipeline: draws them.
        num_samples: how many; a multiple of the classes is balanced exactly.
        seed: of all of them.
        guidance_scale: the pipeline's own if not given.

    Raises:
        ValueError: if there are none to draw, or the pipeline decodes for previews only.
    """

    def __init__(self, pipeline: DriftingPipeline, num_samples: int, *, seed: int = 0, guidance_scale: float | None = None):
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        refuse_previews(pipeline.vae)
        self.pipeline, self.num_samples, self.seed = pipeline, num_samples, seed
        self.guidance_scale = float(pipeline.config.guidance_scale if guidance_scale is None else guidance_scale)
        classes = pipeline.transformer.config.num_classes
        self.labels = torch.arange(num_samples) % classes if classes else None

    def __len__(self) -> int:
        return self.num_samples

    def generator(self, index: int) -> torch.Generator:
        """Of one sample, on the CPU whatever the pipeline runs on."""
        state = np.random.SeedSequence((self.seed, index)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state) >> 1)

    def images(self, indices: Sequence[int]) -> Float[Tensor, "b c h w"]:
        labels = None if self.labels is None else self.labels[list(indices)]
        drawn: Any = self.pipeline(
            labels,
            guidance_scale=self.guidance_scale,
            num_images_per_label=1 if labels is not None else len(indices),
            generator=[self.generator(i) for i in indices],
            output_type="pt",
        ).images
        return 2 * drawn - 1

    def describe(self) -> dict[str, Any]:
        parts = [self.pipeline.transformer, *([self.pipeline.vae] if self.pipeline.vae is not None else [])]
        return {
            "weights": [digest(part) for part in parts],
            "dtype": str(self.pipeline.transformer.dtype),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
        }


class DatasetSamples:
    """Images of a dataset, or of a folder that was loaded as one."""

    def __init__(self, data: LabelledImages, *, labelled: bool = True):
        self.data = data
        self.labels = torch.as_tensor(np.asarray(data.labels), dtype=torch.long) if labelled else None

    def __len__(self) -> int:
        return len(self.data)

    def images(self, indices: Sequence[int]) -> Float[Tensor, "b c h w"]:
        return self.data.gather(list(indices))[0]

    def describe(self) -> dict[str, Any]:
        return {
            "dataset": self.data.dataset._fingerprint,
            "images": len(self.data),
            "size": list(self.data.size),
            "channels": self.data.channels,
            "resize": "shorter side, Lanczos; centre crop",
        }


def refuse_previews(vae: Any) -> None:
    """Refuse to measure through a decoder that approximates.

    Raises:
        ValueError: for an `AutoencoderTiny`.
    """
    if isinstance(getattr(vae, "_orig_mod", vae), AutoencoderTiny):
        raise ValueError(
            "numbers are measured through the decoder that the latents were made for, got an AutoencoderTiny, whose images are approximate "
            "previews: load the pipeline with the AutoencoderKL of its training, as in from_pretrained(..., vae=AutoencoderKL.from_pretrained(...))"
        )


def processes() -> PartialState:
    """The processes that share the work; bare `PartialState()` would not see ACCELERATE_USE_CPU and take each of several for the only one."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@torch.no_grad()
def extract(
    samples: Samples,
    extractor: Any,
    *,
    judge: nn.Module | None = None,
    judged_by_extractor: bool = False,
    folder: str | os.PathLike | None = None,
    batch_size: int = 100,
    description: str = "samples",
    state: PartialState | None = None,
) -> FeatureSet:
    """The features of all samples, in the order of their indices.

    Args:
        samples: by index.
        extractor: images in [-1, 1] to {"features": [b, d], "logits": [b, k]}; see `extractors`.
        judge: a classifier of their classes.
        judged_by_extractor: whether the extractor's own logits are of their classes.
        folder: where shards are kept and found again; needed for several processes, which share the work through it.
        batch_size: samples per call.
        description: what the progress bar says.
        state: of the processes that share the work.

    Raises:
        ValueError: if the folder holds shards of something else.
    """
    state = state or processes()
    if folder is None and state.num_processes > 1:
        raise ValueError(f"{state.num_processes} processes share features through files: give a folder that all of them see")
    if not extractor.num_features:
        extractor(samples.images([0]))  # pixels are counted when the first image is seen, and all of them may be in shards already
    firsts = range(0, len(samples), SHARD)
    if folder is not None:
        if state.is_main_process:  # a description reads all weights: only where it is written down
            contract = {"samples": samples.describe(), "extractor": extractor.describe(), "judge": None if judge is None else digest(judge)}
            _claim(Path(folder), contract)
        state.wait_for_everyone()
    mine = firsts[state.process_index :: state.num_processes]
    with tqdm(
        total=sum(min(SHARD, len(samples) - first) for first in mine),
        desc=description,
        unit="image",
        dynamic_ncols=True,
        disable=not state.is_main_process,
    ) as bar:
        look = lambda indices: _shard(samples, extractor, judge, indices, batch_size, bar)
        found = {first: _made(look, range(first, min(first + SHARD, len(samples))), folder, bar) for first in mine}
    state.wait_for_everyone()
    shards = [found.get(first) or load_file(_file(folder, first)) for first in firsts]
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    judged = whole.get("judged") if judge is not None else whole.get("logits") if judged_by_extractor else None
    return FeatureSet(whole["features"], samples.labels, whole.get("logits"), judged)


def _file(folder: str | os.PathLike | None, first: int) -> Path:
    return Path(str(folder), f"{first:08d}.safetensors")


def _made(look: Callable[[range], dict[str, Tensor]], indices: range, folder: str | os.PathLike | None, bar: tqdm) -> dict[str, Tensor]:
    """A shard as it lies in the folder, or made and put there."""
    if folder is None:
        return look(indices)
    file = _file(folder, indices[0])
    if file.exists():
        bar.update(len(indices))
        return load_file(file)
    found = look(indices)
    write_tensors(file, found)
    return found


def _claim(folder: Path, contract: dict[str, Any]) -> None:
    """Write down what the shards are of, or refuse those of something else."""
    contract = json.loads(json.dumps(contract))
    file = folder / CONTRACT
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        if there != contract:
            differences = {key: (contract[key], there.get(key)) for key in contract if contract[key] != there.get(key)}
            raise ValueError(f"{folder} holds features of something else, here and there: {differences}; choose another folder")
        return
    write_text(file, json.dumps(contract, indent=2))


def _shard(
    samples: Samples, extractor: Any, judge: nn.Module | None, indices: range, batch_size: int, bar: tqdm
) -> dict[str, Float[Tensor, "n d"]]:
    parts: list[dict[str, Tensor]] = []
    for i in range(0, len(indices), batch_size):
        batch = indices[i : i + batch_size]
        images = samples.images(batch)
        part = dict(extractor(images))
        if judge is not None:
            part["judged"] = judge(images.to(next(judge.parameters()).device))
        parts.append({name: values.float().cpu() for name, values in part.items()})
        bar.update(len(batch))
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
