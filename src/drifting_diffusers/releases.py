r"""What the authors of "Generative Modeling via Drifting" released, and the numbers that they report for it.

The numbers are theirs (README of their repository and arXiv 2602.04770, tables 5 and 6): FID and IS of 50,000 samples in one step on ImageNet 256 x 256.
"""

from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData

REPOSITORY = "Goodeat/drifting"
VAE = "stabilityai/sd-vae-ft-mse"  # the decoder of the latent generators, scaling factor 0.18215


@dataclass(frozen=True)
class Release:
    """One artefact.

    Args:
        kind: "gen" for a generator, "mae" for a feature encoder.
        space: "latent" for samples [4, 32, 32] of the VAE, "pixel" for images [3, 256, 256].
        description: in one line.
        encoder: the feature encoder that a generator was trained with.
        guidance_scale: where a generator's FID is best.
        results: reported for a generator, guidance scale -> (FID, IS, where); IS is None where it is not reported.
    """

    name: str
    kind: str
    space: str
    description: str
    encoder: str | None = None
    guidance_scale: float = 1.0
    results: tuple[tuple[float, float, float | None, str], ...] = ()

    @property
    def path(self) -> str:
        """Its folder in the repository."""
        return f"models/{self.kind}/jax/{self.name}"


_ROWS = [
    Release(
        "latent_L_sota",
        "gen",
        "latent",
        "L/2: 24 blocks of width 1024, 463M weights",
        "mae_latent_640",
        1.0,
        ((1.0, 1.53, 260.1, "release"), (1.0, 1.54, 258.9, "paper"), (1.5, 3.01, 354.4, "paper")),
    ),
    Release(
        "latent_B_sota",
        "gen",
        "latent",
        "B/2: 12 blocks of width 768, 133M weights",
        "mae_latent_640",
        1.1,
        ((1.1, 1.74, 263.4, "release"), (1.1, 1.75, 263.2, "paper")),
    ),
    Release(
        "pixel_L_sota",
        "gen",
        "pixel",
        "L/16: 24 blocks of width 1024, 464M weights",
        "mae_pixel_640",
        1.0,
        ((1.0, 1.62, 308.6, "release"), (1.0, 1.61, 307.5, "paper")),
    ),
    Release(
        "pixel_B_sota",
        "gen",
        "pixel",
        "B/16: 12 blocks of width 768, 134M weights",
        "mae_pixel_640",
        1.0,
        ((1.0, 1.73, 300.1, "release"), (1.0, 1.76, 299.7, "paper")),
    ),
    Release(
        "ablation",
        "gen",
        "latent",
        "B/2 of the ablations, trained for 30,000 steps",
        "mae_latent_256",
        2.0,
        ((2.0, 8.49, 144.0, "release"), (2.0, 8.46, None, "paper")),
    ),
    Release("mae_latent_640", "mae", "latent", "masked autoencoder of latents, 640 channels, 1280 epochs, then tuned as a classifier"),
    Release("mae_latent_256", "mae", "latent", "masked autoencoder of latents, 256 channels, 192 epochs"),
    Release("mae_pixel_640", "mae", "pixel", "masked autoencoder of pixels in patches of 8 x 8, 640 channels"),
]
RELEASES = {row.name: row for row in _ROWS}


@dataclass(frozen=True)
class Conversion:
    """What was asked of a conversion: its card must say so.

    Args:
        dtype: of the weights.
        guidance_scale: the pipeline's default, where it is not the one of the best FID.
        vae: the decoder's repository or folder; None where samples stay latents.
        revision: of the release's repository.
        mark: a line that tells a rendered card from one that somebody wrote.
    """

    dtype: str = "float32"
    guidance_scale: float | None = None
    vae: str | None = VAE
    revision: str | None = None
    mark: str = ""


def release_card(name: str, repo_id: str | None = None, conversion: Conversion | None = None) -> str:
    """The README.md of a converted artefact: what it is, how to use it, what its authors report, what is to be minded.

    Args:
        name: of the artefact.
        repo_id: where the converted model lies; without one the snippet converts.
        conversion: how it was converted; plainly, if not given.
    """
    release, how = RELEASES[name], conversion or Conversion()
    cls = "DriftingPipeline" if release.kind == "gen" else "MaskedAutoencoder"
    load = f'{cls}.from_pretrained("{repo_id}")' if repo_id else f'{cls}.from_release("{name}"{_arguments(release, how)})'
    latent = release.space == "latent" and how.vae is None
    facts = {
        "load": load,
        "imports": "import torch\n" if not repo_id and how.dtype != "float32" else "",  # of an encoder: what `load` names
        "samples": _samples(release, how),
        "seen": _SEEN[release.space],
        "encoders": _encoders(release),
        "scales": _scales(release, how),
        "draw": 'latents = pipe(["macaw", "alp"], generator=torch.Generator().manual_seed(0), output_type="latent").images'
        if latent
        else 'images = pipe(["macaw", "alp"], generator=torch.Generator().manual_seed(0)).images',
    }
    sections = [
        f"---\n{_metadata(release, repo_id)}\n---" + (f"\n{how.mark}" if how.mark else ""),
        f"# {repo_id.split('/')[-1] if repo_id else name}",
        (_GENERATOR if release.kind == "gen" else _ENCODER).format(**vars(release) | facts),
        *([_reported(release)] if release.results else []),
        _USE[release.kind],
        _ORIGIN.format(path=release.path, repository=REPOSITORY, command=_command(release, how), at=_at(how), weights=_weights(how)),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _arguments(release: Release, how: Conversion) -> str:
    """What `from_release` is given beside the name to make the same."""
    given = {
        "vae": how.vae if release.space == "latent" and release.kind == "gen" and how.vae != VAE else ...,
        "guidance_scale": how.guidance_scale if _other_scale(release, how) else ...,
        "revision": how.revision or ...,
    }
    dtype = "" if how.dtype == "float32" else f", dtype=torch.{how.dtype}"
    return dtype + "".join(f", {name}={value!r}" for name, value in given.items() if value is not ...)


def _command(release: Release, how: Conversion) -> str:
    """The command that makes the same."""
    decoder = (["--no-vae"] if how.vae is None else ["--vae", how.vae]) if release.kind == "gen" and how.vae != VAE else []
    parts = [
        "drifting-diffusers convert",
        release.name,
        *(["--dtype", how.dtype] if how.dtype != "float32" else []),
        *(["--guidance-scale", str(how.guidance_scale)] if _other_scale(release, how) else []),
        *decoder,
        *(["--revision", how.revision] if how.revision else []),
    ]
    return " ".join(parts)


def _other_scale(release: Release, how: Conversion) -> bool:
    return how.guidance_scale not in (None, release.guidance_scale)


def _at(how: Conversion) -> str:
    return f" at revision `{how.revision}`" if how.revision else ""


def _weights(how: Conversion) -> str:
    return "every tensor is taken over\nas it is" if how.dtype == "float32" else f"every tensor is taken over,\nrounded to {how.dtype}"


def _scales(release: Release, how: Conversion) -> str:
    best = release.guidance_scale
    if _other_scale(release, how):
        return f"{how.guidance_scale} is taken if none is given; the FID reported below is best at {best}"
    return f"{best} is taken if none is given, where the FID reported below is best"


def _samples(release: Release, how: Conversion) -> str:
    if release.space == "pixel":
        return "images of 3 x 256 x 256, without a decoder"
    if how.vae is None:
        return f"latents of 4 x 32 x 32 of [{VAE}](https://huggingface.co/{VAE}) (scaling factor 0.18215), and comes without that decoder"
    link = f"latents of 4 x 32 x 32, which [{VAE}](https://huggingface.co/{VAE}) decodes to images of 256 x 256 (scaling factor 0.18215)"
    return link if how.vae == VAE else f"{link}; here `{how.vae}` decodes them"


_SEEN = {
    "latent": f"latents of 4 x 32 x 32 of [{VAE}](https://huggingface.co/{VAE}), times 0.18215",
    "pixel": "images of 3 x 256 x 256 in [-1, 1]",
}


def _encoders(release: Release) -> str:
    convnext = " and of [ConvNeXt V2](https://huggingface.co/facebook/convnextv2-base-22k-224)" if release.space == "pixel" else ""
    return f"`{release.encoder}`{convnext}"


_GENERATOR = """
A one-step generator of ImageNet 256 x 256 by the authors of [Generative Modeling via Drifting](https://arxiv.org/abs/2602.04770), converted from
their JAX weights to drifting_diffusers. {description}. It makes {samples}, in one network call. It was trained in the features of {encoders}.

```bash
pip install drifting-diffusers
```

```python
import torch
from drifting_diffusers import DriftingPipeline

pipe = {load}
{draw}
```

`guidance_scale` is an input of the network, from 1 (none) to 4; {scales}.
`.to(torch.bfloat16)` runs it as the release does."""

_ENCODER = """
A feature encoder by the authors of [Generative Modeling via Drifting](https://arxiv.org/abs/2602.04770), converted from their JAX weights to
drifting_diffusers: {description}. It sees {seen}. Drifting models are trained in its activations: 86 sets of features, from single places to the
whole image.

```bash
pip install drifting-diffusers
```

```python
{imports}from drifting_diffusers import DriftingObjective, MaskedAutoencoder

encoder = {load}
objective = DriftingObjective(encoder.activations)
```"""

_USE = {
    "gen": """
## Intended use and limits

For research on one-step generation and for comparison. It knows the 1000 classes of ImageNet-1k and nothing else, at 256 x 256. Expect
failures on faces, hands and text, as with most models of ImageNet, and the biases of its training data. It must not be used to make images that pass for real ones.""",
    "mae": """
## Intended use and limits

For training generators of ImageNet 256 x 256 and for research on features. It was trained on ImageNet-1k alone; elsewhere its features may mean
little. It makes no images worth looking at: its reconstructions only served its training.""",
}

_ORIGIN = """
## Origin and licence

Converted from `{path}` of [{repository}](https://huggingface.co/{repository}){at} with `{command}`; {weights}. That conversion and network give the numbers of the reference implementation is tested with recorded outputs of small networks of the same
kinds; with these weights themselves no comparison was recorded.

The source names no licence for the weights: check there what is allowed before you use or share them. ImageNet has terms of its own.

```bibtex
@article{{deng2026generative,
  title={{Generative Modeling via Drifting}},
  author={{Deng, Mingyang and Li, He and Li, Tianhong and Du, Yilun and He, Kaiming}},
  journal={{arXiv preprint arXiv:2602.04770}},
  year={{2026}}
}}
```"""


def _reported(release: Release) -> str:
    rows = [f"| {scale} | {fid} | {'-' if score is None else score} | the {where} |" for scale, fid, score, where in release.results]
    return "\n".join([
        "## Results, as the authors report them",
        "",
        "50,000 samples against the training set, one step; not measured again here. The release is the table of its README, the paper arXiv 2602.04770.",
        "",
        "| guidance scale | FID | IS | reported by |",
        "|---|---|---|---|",
        *rows,
    ])  # fmt: skip


def _metadata(release: Release, repo_id: str | None) -> str:
    generator = release.kind == "gen"
    task = "unconditional-image-generation" if generator else "image-feature-extraction"
    scale, fid, score, _ = release.results[0] if generator else (None, None, None, None)
    evaluations = [
        EvalResult(
            task_type=task,
            dataset_type="ILSVRC/imagenet-1k",
            dataset_name=f"ImageNet 256x256, guidance scale {scale}",
            metric_type=metric,
            metric_value=value,
            source_name="reported by the authors",
            source_url="https://github.com/lambertae/drifting",
        )
        for metric, value in (("fid", fid), ("inception_score", score))
        if value is not None
    ]
    data = ModelCardData(
        library_name="drifting-diffusers",
        tags=["diffusers", "drifting", *(["one-step", "class-conditional-image-generation"] if generator else []), "arxiv:2602.04770"],
        pipeline_tag=task,
        license="other",
        license_name="see-the-source",
        license_link=f"https://huggingface.co/{REPOSITORY}",
        datasets=["ILSVRC/imagenet-1k"],
        base_model=REPOSITORY,
        metrics=["fid", "inception_score"] if generator else None,
        model_name=(repo_id or release.name).split("/")[-1] if generator else None,
        eval_results=evaluations or None,
    )
    return data.to_yaml()
