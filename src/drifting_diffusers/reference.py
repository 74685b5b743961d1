r"""What generated samples are compared with: moments of all real images and the features of some, kept with what they were made of.

Numbers against different references cannot be compared. So a reference carries its description (dataset, resize, extractor, counts), is found in a cache
by it, and is refused where it does not fit.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import cached_assets_path
from safetensors import safe_open
from torch import Tensor

from .evaluation import Moments
from .files import write_tensors
from .meters import FeatureSet, Reference, limited, moments_of
from .sampling import Samples, extract, processes

MOST_SAMPLES = 10_000  # whose features are kept: the protocol of precision and recall
FORMAT = 1


def make_reference(
    samples: Samples,
    extractor: Any,
    *,
    most_samples: int = MOST_SAMPLES,
    cache: str | os.PathLike | None = None,
    batch_size: int = 100,
    state: PartialState | None = None,
) -> Reference:
    """The reference of these real images in this extractor, from the cache if it was made before.

    Args:
        samples: the real images.
        extractor: what sees them.
        most_samples: of how many, drawn at random, the features are kept.
        cache: a folder; the Hub's assets folder if not given.
        batch_size: images per call.
        state: of the processes that share the work.
    """
    description = {
        "format": FORMAT,
        "samples": samples.describe(),
        "extractor": extractor.describe(),
        "kept": min(most_samples, len(samples)),
    }
    folder = Path(cache) if cache else cached_assets_path("drifting_diffusers", "references", "features")
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"{extractor.name.replace('/', '--')}-{key}.safetensors"
    state = state or processes()
    there = file.exists()
    state.wait_for_everyone()  # before one of them writes it
    if there:
        return read_reference(file, description)
    shards = folder / f"{key}.shards"
    seen = extract(samples, extractor, folder=shards, batch_size=batch_size, description="real images", state=state)
    chosen = limited(len(seen), most_samples)
    reference = Reference(moments_of(seen.features), seen.take(chosen), description, chosen)
    state.wait_for_everyone()  # all have read the shards
    if state.is_main_process:
        write_reference(reference, file)
        shutil.rmtree(shards)
    state.wait_for_everyone()
    return reference


def write_reference(reference: Reference, file: str | os.PathLike) -> None:
    """Keep a reference as safetensors with its description."""
    moments, samples = reference.moments, reference.samples
    tensors = {"mean": moments.mean, "covariance": moments.covariance, "count": torch.tensor(moments.count)}
    if samples is not None:
        parts = {"features": samples.features, "labels": samples.labels, "logits": samples.logits, "chosen": reference.chosen}
        tensors |= {name: part for name, part in parts.items() if part is not None}
    write_tensors(
        Path(file),
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        {"description": json.dumps(reference.description)},
    )


def read_reference(file: str | os.PathLike, expected: Mapping[str, Any] | None = None) -> Reference:
    """A reference that `write_reference` kept.

    Args:
        file: safetensors.
        expected: what its description must say; entries that it does not name are free.

    Raises:
        ValueError: if it was made of something else, and the sentence says where they differ.
    """
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        if "description" not in metadata:
            raise ValueError(f"{file} is no reference of this library: make one with `drifting-diffusers evaluate --dataset`")
        tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    description = json.loads(metadata["description"])
    wanted = json.loads(json.dumps(dict(expected or {})))
    differences = {key: (value, description.get(key)) for key, value in wanted.items() if description.get(key) != value}
    if differences:
        listed = "; ".join(f"{key}: wanted {want}, made of {there}" for key, (want, there) in differences.items())
        raise ValueError(f"{file} does not fit: {listed}. Numbers against it could not be compared; leave it out to make another")
    samples = FeatureSet(tensors["features"], tensors.get("labels"), tensors.get("logits")) if "features" in tensors else None
    moments = Moments(tensors["mean"], tensors["covariance"], int(tensors["count"]))
    return Reference(moments, samples, description, tensors.get("chosen"))


def read_npz(file: str | os.PathLike, extractor: Any) -> Reference:
    """Reference statistics in the layout of ADM's evaluator: `mu` [d] and `sigma` [d, d].

    The file does not say what it was made of nor of how many images (`count` is 0), so its digest goes into the results. Its images (`arr_0`), where there are any, are not read.

    Args:
        file: as published beside ADM (Dhariwal and Nichol 2021) or by other evaluators.
        extractor: what its features must be of; only their number can be checked.

    Raises:
        ValueError: if it holds no such arrays, or those of another extractor.
    """
    with np.load(file, allow_pickle=False) as arrays:
        missing = [name for name in ("mu", "sigma") if name not in arrays]
        if missing:
            raise ValueError(f"{file} has no {' and no '.join(missing)} but {', '.join(arrays.files)}: it holds no reference statistics")
        mean, covariance = (torch.from_numpy(np.asarray(arrays[name], dtype=np.float64)) for name in ("mu", "sigma"))
    d = extractor.num_features
    if mean.shape != (d,) or covariance.shape != (d, d):
        raise ValueError(
            f"{file} has mu {list(mean.shape)} and sigma {list(covariance.shape)}, {extractor.name} has {d} features: take the extractor that made it"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all() and torch.allclose(covariance, covariance.T, atol=1e-6)):
        raise ValueError(f"sigma of {file} is no covariance: it is not finite or not symmetric")
    sha = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    described = {"npz": Path(file).name, "sha256": sha, "extractor": extractor.describe()}
    return Reference(Moments(mean, covariance, 0), None, described)
