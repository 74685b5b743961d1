"""What the tabs ask of a pipeline: images [n, c, h, w] in [0, 1] from one call, and the seconds it took. Limits keep one visitor from taking all."""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from gpu import on_gpu
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from drifting_diffusers import DriftingPipeline
from drifting_diffusers.shipped import find_pipeline

MOST_IMAGES, MOST_PIXELS = 256, 2**21  # of one call; 32 images of 256 x 256
MOST_BYTES = 4 * 10**9  # of a repository that a visitor types
KNOWN: dict[str, str] = {}  # what the owner of the page offers: a short name -> what `find_pipeline` takes

_one_call_at_a_time = threading.Lock()


def offer(sources: Sequence[str]) -> list[str]:
    """Make pipelines known by short names, the first ready to draw.

    Raises:
        OSError, ValueError: if the first cannot be loaded.
    """
    for source in sources:
        short = Path(source).name if Path(source).exists() else source
        KNOWN[source if KNOWN.get(short, source) != source else short] = source
    load(next(iter(KNOWN)))
    return list(KNOWN)


@lru_cache(maxsize=3)  # models in memory
def load(name: str) -> DriftingPipeline:
    """The pipeline of a known name, or of a repository that a visitor typed; folders of the server are the owner's alone."""
    if name not in KNOWN:
        if "/" not in str(name) or Path(name).exists():
            raise ValueError(f"no model is named {name!r}: choose one of {', '.join(KNOWN)}, or type a repository of the Hub as user/name")
        validate_repo_id(name)
    try:
        if name in KNOWN:
            pipe = DriftingPipeline.from_pretrained(find_pipeline(KNOWN[name]))
        else:
            _check_size(name)
            pipe = DriftingPipeline.from_pretrained(name, token=False)  # the owner's token opens what the owner offers and nothing else
    except OSError as error:
        raise OSError(f"{name} cannot be loaded, is it a drifting pipeline, public, and the network there? {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def _check_size(name: str) -> None:
    """Before anything large is fetched.

    Raises:
        ValueError: for a large repository.
    """
    size = sum(getattr(entry, "size", 0) for entry in HfApi(token=False).list_repo_tree(name, recursive=True))
    if size > MOST_BYTES:
        raise ValueError(f"{name} has {size / 1e9:.0f} GB, and this page fetches up to {MOST_BYTES / 1e9:.0f}: open it on your own machine")


def classes(pipe: DriftingPipeline) -> list[tuple[str, str | int]]:
    """(what is shown, what is meant) for every class: its name, or its id where it has none."""
    return [(name, name) for name in pipe.labels] or [(f"class {i}", i) for i in range(pipe.transformer.config.num_classes)]


def guided(pipe: DriftingPipeline) -> bool:
    return bool(pipe.transformer.config.guidance_embedding)


@on_gpu
def call(name: str, mixed_with: tuple[Any, Tensor] | None = None, **how: Any) -> tuple[Tensor, float]:
    """One call of a loaded pipeline. The class of image i is mixed with `mixed_with` = (another class, shares [n] in [0, 1])."""
    pipe = load(name)
    if not guided(pipe):
        how.pop("guidance_scale", None)
    with _one_call_at_a_time, _mixing(pipe, mixed_with):
        started = time.perf_counter()
        images = pipe(output_type="pt", **how).images.cpu()
        return images, time.perf_counter() - started


@contextmanager
def _mixing(pipe: DriftingPipeline, mixed_with: tuple[Any, Tensor] | None) -> Iterator[None]:
    """Between two classes lie the points between their embeddings."""
    if mixed_with is None:
        yield
        return
    other = pipe.get_label_ids(mixed_with[0])
    embedding: Any = pipe.transformer.class_embedding

    def mix(module: torch.nn.Module, given: tuple, embedded: Tensor) -> Tensor:
        share = mixed_with[1].to(embedded)[:, None]
        return torch.lerp(embedded, embedding.weight[other].to(embedded).expand_as(embedded), share)

    with embedding.register_forward_hook(mix):
        yield


def check_amount(pipe: DriftingPipeline, images: int) -> None:
    most = most_images(pipe)
    if not 1 <= images <= most:
        raise ValueError(
            f"{images} images are more than the {most} that this page makes of this model at once: take fewer classes or fewer of each"
        )


def most_images(pipe: DriftingPipeline) -> int:
    model = pipe.transformer
    scale = 2 ** (len(pipe.vae.config.get("block_out_channels", range(4))) - 1) if pipe.vae is not None else 1
    return max(1, min(MOST_IMAGES, MOST_PIXELS // (model.sample_height * model.sample_width * scale**2)))


def meant(pipe: DriftingPipeline, labels: Sequence[str | int] | str | int | None) -> list[int] | None:
    """Ids of what was chosen or typed."""
    if not pipe.transformer.config.num_classes:
        return None
    given = [labels] if isinstance(labels, str | int) else list(labels or [])
    if not given:
        raise ValueError("choose at least one class")
    return pipe.get_label_ids([int(label) if isinstance(label, str) and label.isdigit() and not pipe.labels else label for label in given])


def draw(name: str, labels: Any, guidance: float, each: int, seed: int) -> tuple[Tensor, float, list[str]]:
    """`each` images of every class, and the names of the classes."""
    pipe = load(name)
    ids = meant(pipe, labels)
    check_amount(pipe, int(each) * len(ids or [0]))
    shown = [classes(pipe)[i][0] for i in ids or []]
    images, seconds = call(name, class_labels=ids, guidance_scale=guidance, num_images_per_label=int(each), generator=seeded(seed))
    return images, seconds, shown


def between_noises(name: str, label: Any, guidance: float, frames: int, seed: int) -> tuple[Tensor, float, int]:
    """Images [frames * tiles, ...] from noise a to noise b on the arc cos(t) a + sin(t) b, all of whose points are standard normal, and the tiles."""
    pipe, angle = load(name), _ease(frames) * math.pi / 2
    tiles = _tiles(pipe, frames)
    (a, style), (b, _) = _draws(pipe, tiles, seeded(seed)), _draws(pipe, tiles, seeded(seed + 1))
    path = [part.cos() * a + part.sin() * b for part in angle]
    return *_film(name, meant(pipe, label), guidance, path, style), tiles


def between_classes(name: str, first: Any, second: Any, guidance: float, frames: int, seed: int) -> tuple[Tensor, float, int]:
    """The same noises from one class to another."""
    pipe, shares = load(name), _ease(frames)
    ids, other = meant(pipe, first), meant(pipe, second)
    if ids is None or other is None or ids == other:
        raise ValueError("choose two different classes" if ids else "this model knows no classes: walk between two noises instead")
    tiles = _tiles(pipe, frames)
    noise, style = _draws(pipe, tiles, seeded(seed))
    return *_film(name, ids, guidance, [noise] * frames, style, (other, shares.repeat_interleave(tiles))), tiles


def styles(name: str, label: Any, guidance: float, rows: int, columns: int, seed: int) -> tuple[Tensor, float]:
    """One class: the noise is the same along a row, the style along a column."""
    pipe, rows, columns = load(name), int(rows), int(columns)
    if not pipe.transformer.config.num_style_tokens:
        raise ValueError("this model was built without style tokens: there is one style only")
    check_amount(pipe, rows * columns)
    noise, style = _draws(pipe, max(rows, columns), seeded(seed))
    latents, tokens = noise[:rows].repeat_interleave(columns, 0), style[:columns].repeat(rows, 1)
    ids = meant(pipe, label)
    return call(name, class_labels=ids, num_images_per_label=rows * columns, guidance_scale=guidance, latents=latents, style_labels=tokens)


def seeded(seed: float) -> torch.Generator:
    if not (isinstance(seed, int | float) and float(seed).is_integer() and 0 <= seed < 2**32):
        raise ValueError(f"a seed is a whole number from 0 to {2**32 - 1}, got {seed!r}")
    return torch.Generator().manual_seed(int(seed))


def _draws(pipe: DriftingPipeline, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise and style labels of n images."""
    model: Any = pipe.transformer
    noise = torch.randn(n, model.config.in_channels, model.sample_height, model.sample_width, generator=generator)
    return noise, torch.randint(model.config.style_codebook_size, (n, model.config.num_style_tokens), generator=generator)


def _film(name: str, ids: Any, guidance: float, path: list[Tensor], style: Tensor, mixed_with: Any = None) -> tuple[Tensor, float]:
    latents = torch.cat(path)
    more = {"style_labels": style.repeat(len(path), 1)} if style.shape[1] else {}
    how = {"class_labels": ids, "num_images_per_label": len(latents), "guidance_scale": guidance, "latents": latents}
    return call(name, mixed_with, **how, **more)


def _ease(frames: int) -> Tensor:
    """From 0 to 1, slow at both ends."""
    if not 2 <= frames <= 48:
        raise ValueError(f"a film has 2 to 48 frames, got {frames}")
    return (1 - torch.linspace(0, math.pi, int(frames)).cos()) / 2


def _tiles(pipe: DriftingPipeline, frames: int) -> int:
    """How many films side by side: eight if that is not too much."""
    tiles = most_images(pipe) // int(frames)
    if not tiles:
        raise ValueError(f"{int(frames)} frames are more than the {most_images(pipe)} images that this page makes of this model at once")
    return 8 if tiles >= 8 else 4 if tiles >= 4 else tiles
