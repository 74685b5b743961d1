"""`drifting-diffusers convert`: the reference release's weights -> a folder that `from_pretrained` loads."""

import argparse
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")

DESCRIPTION = """\
Convert weights of the reference release of "Generative Modeling via Drifting" into a folder of diffusers' format.

SOURCE is a name (latent_L_sota, latent_B_sota, pixel_L_sota, pixel_B_sota, ablation, mae_latent_640, mae_latent_256,
mae_pixel_640), which is downloaded from the Hub at HF_ENDPOINT and continued where a download was cut off; or a folder with
metadata.json and ema_params.msgpack; or a .msgpack or .msgpack.xz file with metadata.json beside it.
"""

EXAMPLES = """\
examples:
  drifting-diffusers convert latent_L_sota models/drifting-L
  drifting-diffusers convert runs/mine/params_ema models/mine --dtype bfloat16 --guidance-scale 1.1
  drifting-diffusers convert mae_latent_640 models/mae --push-to-hub user/mae-latent-640 --private
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("source", metavar="SOURCE", help="a released name, a folder or a file")
    parser.add_argument("target", metavar="TARGET", type=Path, help="the folder to write; it must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; the release's are float32 (default)")
    parser.add_argument(
        "--guidance-scale", type=float, metavar="ALPHA", help="the pipeline's default; that of the best reported FID for a name, else 1"
    )
    decoder = parser.add_mutually_exclusive_group()
    decoder.add_argument(
        "--vae", metavar="NAME", help="decoder of latents: a folder or a Hub repository (default: stabilityai/sd-vae-ft-mse)"
    )
    decoder.add_argument("--no-vae", action="store_true", default=None, help="leave the decoder out; samples stay latents")
    parser.add_argument("--revision", help="of the release's repository: a branch, tag or commit")
    parser.add_argument("--push-to-hub", metavar="USER/REPOSITORY", help="upload the folder, with its card, after it is written")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make that repository private, should it be new; a public one is refused"
    )


def run(options: argparse.Namespace) -> None:
    _check_options(options)
    target = _checked_target(options.target, options.source)
    started = time.monotonic()
    model, name = _load(options)

    from ..convert import made_whole

    with made_whole(target) as folder:
        model.save_pretrained(folder)
        if name is not None:
            (folder / "README.md").write_text(_card(name, options), encoding="utf-8")
    weights = sum(p.numel() for p in getattr(model, "transformer", model).parameters())
    print(f"{target}: {type(model).__name__}, {weights:,} weights in {options.dtype}, {time.monotonic() - started:.0f} s")
    print(f'load it with {type(model).__name__}.from_pretrained("{target}")')
    if options.push_to_hub:
        from .. import hub

        hub.upload(model, target, options.push_to_hub, private=options.private)
        print(f"pushed to {options.push_to_hub}")


def _check_options(options: argparse.Namespace) -> None:
    if options.private and not options.push_to_hub:
        raise ValueError("--private says how to make a repository on the Hub: give --push-to-hub too, or leave it out")
    if options.vae == "":
        raise ValueError("--vae is empty: name a folder or repository, or give --no-vae for samples that stay latents")
    if options.push_to_hub is not None:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(options.push_to_hub)


def _checked_target(given: Path, source: str) -> Path:
    """Where to write, resolved; what cannot be written is refused before anything is fetched or converted."""
    target = given.resolve()
    if given.is_symlink() or (os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir()))):
        raise FileExistsError(f"{given} exists and is not an empty folder: nothing is overwritten, give another TARGET")
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"TARGET {given} is the working directory or holds it, and would be replaced: name a folder in it")
    if source not in _released() and Path(source).is_dir() and target.is_relative_to(Path(source).resolve()):
        raise ValueError(f"TARGET {given} lies in SOURCE {source}, which would change: give a TARGET beside it")
    base = next(parent for parent in target.parents if os.path.lexists(parent))
    if not base.is_dir():
        raise NotADirectoryError(f"{base} is no folder, so {target} cannot be made: give another TARGET")
    if not os.access(base, os.W_OK | os.X_OK):
        raise PermissionError(f"{base} is not yours to write in, so {target} cannot be made: give another TARGET")
    return target


def _released() -> Collection[str]:
    from ..releases import RELEASES

    return RELEASES


def _card(name: str, options: argparse.Namespace) -> str:
    from ..hub import CARD_MARK
    from ..releases import VAE, Conversion, release_card

    vae = None if options.no_vae else options.vae or VAE
    if vae is not None and Path(vae).is_dir():
        vae = Path(vae).resolve().name  # where it lay on this machine is nobody's business
    how = Conversion(dtype=options.dtype, guidance_scale=options.guidance_scale, vae=vae, revision=options.revision, mark=CARD_MARK)
    return release_card(name, options.push_to_hub, how)


def _load(options: argparse.Namespace) -> tuple[Any, str | None]:
    """The converted model and, if it is one of the release's, its name."""
    import torch

    from ..artefacts import find_artefact
    from ..convert import find_source, kind_of
    from ..encoders import MaskedAutoencoder
    from ..pipeline import DriftingPipeline
    from ..releases import RELEASES, VAE

    release = RELEASES.get(options.source)
    if release is None and options.revision:
        raise ValueError("--revision is of the release's repository: leave it out for a folder or file")
    path = find_source(options.source, **({"revision": options.revision} if release else {}))
    dtype = getattr(torch, options.dtype)
    name = release.name if release else None
    if kind_of(find_artefact(path)[0]) == "mae":
        wrong = [f"--{flag}" for flag in ("guidance-scale", "vae", "no-vae") if getattr(options, flag.replace("-", "_")) is not None]
        if wrong:
            raise ValueError(f"{' and '.join(wrong)} are of generators, {options.source} is a feature encoder: leave them out")
        return MaskedAutoencoder.from_release(path, dtype=dtype), name
    scale = options.guidance_scale if options.guidance_scale is not None else release.guidance_scale if release else None
    vae = None if options.no_vae else options.vae or VAE
    return DriftingPipeline.from_release(path, dtype=dtype, guidance_scale=scale, vae=vae), name
