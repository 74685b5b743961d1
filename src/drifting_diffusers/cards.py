r"""The card that stands before a model: what it is, a snippet that works, what was measured, and pictures of what it makes.

Cards and pictures of ours carry a mark. What carries none somebody wrote or chose, and it is never replaced.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

CARD_MARK = "<!-- Rendered by drifting_diffusers; delete this line and the next push keeps the card as you left it. -->"
RENDERED = "<!-- From the model, its results.json and its pictures. -->"  # other cards of ours have other sources, as those of releases
PICTURE_MARK = "drifting_diffusers"  # the PNG's entry "Software"

README, RESULTS = "README.md", "results.json"
SAMPLES, CURVES = "samples.png", "curves.png"
PICTURES = {SAMPLES: "Samples", CURVES: "What was watched while it was trained"}
"""What a card shows of its folder, with the words for who cannot see it."""

ABOUT = ("license", "license_name", "license_link", "dataset", "datasets", "base_model", "base_model_relation", "tags")
"""Entries of results that go into the metadata; "datasets" are one or several names on the Hub, and "dataset" is what was measured on."""
UNSHOWN = ("sd", "real", "better", "meaning", "sweep", "reference", "extractor")


def model_card(
    pipeline: Any, results: Mapping[str, Any] | None = None, *, repo_id: str = "user/repository", pictures: Iterable[str] = ()
) -> str:
    """The text of a README.md: what the generator is, how to draw from it, and measured numbers if there are any.

    Args:
        pipeline: the pipeline that is published.
        results: {"metrics": {"fid": 12.3}} and how they were made: what `ABOUT` names goes into the metadata as well, every other entry
            (seeds, number of samples, command, commit) is printed as it is. "base_model" is the repository that was fine-tuned, and
            "base_model_relation" how: "finetune", if not given, or "adapter".
        repo_id: where the snippet loads from.
        pictures: which of `PICTURES` stand beside it.

    Raises:
        ValueError: if a metric is not a finite number.
    """
    metrics, about, results = _parts(results)
    config = pipeline.transformer.config
    sides = f"{pipeline.transformer.sample_height} x {pipeline.transformer.sample_width}"
    classes = f"{config.num_classes} classes" if config.num_classes else "no class labels"
    # Adapters are saved as part of the other weights.
    weights = sum(p.numel() for name, p in pipeline.transformer.named_parameters() if "lora_" not in name)
    base, decoder = about.get("base_model"), f", decoded by an `{type(pipeline.vae).__name__}`" if pipeline.vae is not None else ""
    return _joined([
        f"---\n{_metadata(pipeline.transformer, repo_id, about, metrics)}\n---\n{CARD_MARK}\n{RENDERED}",
        f"# {repo_id.split('/')[-1]}",
        "A one-step image generator trained with drifting ([Generative Modeling via Drifting](https://arxiv.org/abs/2602.04770)): one network call "
        f"per image. Samples are {pipeline.transformer.out_channels} x {sides}{decoder}; it knows {classes} and has {weights:,} weights.",
        f"It was fine-tuned from [{base}](https://huggingface.co/{base})." if base else "",
        _picture(SAMPLES, pictures),
        f"```bash\npip install drifting-diffusers\n```\n\n```python\n{_snippet(pipeline, repo_id)}\n```",
        f'`DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)` loads the same pipeline, with the package installed.',
        _results_section(metrics, about | results),
        _picture(CURVES, pictures),
    ])  # fmt: skip


def network_card(
    model: Any, results: Mapping[str, Any] | None = None, *, repo_id: str = "user/repository", pictures: Iterable[str] = ()
) -> str:
    """The text of a README.md for a network alone, a generator or a feature encoder: what it is and how to load it; see `model_card`."""
    metrics, about, results = _parts(results)
    name, weights = type(model).__name__, sum(p.numel() for p in model.parameters())
    choices = "\n".join(f"| {key} | {value} |" for key, value in model.config.items() if not key.startswith("_"))
    base = about.get("base_model")
    return _joined([
        f"---\n{_metadata(model, repo_id, about, metrics)}\n---\n{CARD_MARK}\n{RENDERED}",
        f"# {repo_id.split('/')[-1]}",
        f"A `{name}` of {weights:,} weights, of a drifting model ([Generative Modeling via Drifting](https://arxiv.org/abs/2602.04770)).",
        f"It was fine-tuned from [{base}](https://huggingface.co/{base})." if base else "",
        _picture(SAMPLES, pictures),
        f'```bash\npip install drifting-diffusers\n```\n\n```python\nfrom drifting_diffusers import {name}\n\n'
        f'model = {name}.from_pretrained("{repo_id}")\n```',
        f"## Configuration\n\n| | |\n|---|---|\n{choices}",
        _results_section(metrics, about | results),
        _picture(CURVES, pictures),
    ])  # fmt: skip


def read_about(card: Mapping[str, Any] | str | os.PathLike | None) -> dict[str, Any]:
    """What a user wants a card to say, from a mapping or a results.json.

    Raises:
        ValueError: for entries that would not be shown.
    """
    about = json.loads(Path(card).read_text(encoding="utf-8")) if isinstance(card, str | os.PathLike) else dict(card or {})
    unknown = [name for name in about if name not in ABOUT]
    if unknown and "metrics" not in about:
        raise ValueError(f"a card says {', '.join(ABOUT)}, and with metrics how they were made; got {', '.join(unknown)} without metrics")
    return about


def evaluation_results(entry: Mapping[str, Any], **how: Any) -> dict[str, Any]:
    """An evaluation as a card takes it: every number beside the same one of real samples.

    Args:
        entry: the line of a run's log, with "step"; a number of real samples ends in "_real".
        how: how it was made, and what `ABOUT` names.
    """
    numbers = {name: value for name, value in entry.items() if name != "step"}
    return {
        "metrics": {name: value for name, value in numbers.items() if not name.endswith("_real")},
        "real": {name.removesuffix("_real"): value for name, value in numbers.items() if name.endswith("_real")},
        "step": entry["step"],
        **how,
    }


def _parts(results: Mapping[str, Any] | None) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Metrics, what goes into the metadata, and everything else."""
    rest = dict(results or {})
    metrics = dict(rest.pop("metrics", {}))
    about = {name: rest.pop(name) for name in ABOUT if name in rest}
    bad = {name: value for name, value in metrics.items() if not isinstance(value, int | float) or not math.isfinite(value)}
    if bad:
        raise ValueError(f"metrics must be finite numbers, got {bad}: leave out what was not measured")
    return metrics, {name: value for name, value in about.items() if value is not None}, rest


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _results_section(metrics: Mapping[str, float], results: Mapping[str, Any]) -> str:
    return "\n".join(["## Results", "", *_rows(metrics, results), "", *_how(results)]) if metrics else ""


def _picture(name: str, pictures: Iterable[str]) -> str:
    return f"![{PICTURES[name]}]({name})" if name in pictures else ""


def _rows(metrics: Mapping[str, float], results: Mapping[str, Any]) -> list[str]:
    """The table of numbers, with their deviation over seeds and the number of real images where there are any."""
    deviations, real, better = (results.get(key) or {} for key in ("sd", "real", "better"))
    spread = lambda name: f" ± {deviations[name]:.4g}" if deviations.get(name) is not None else ""
    lines = [
        f"| {name} | {value:.4g}{spread(name)} | {format(real[name], '.4g') if name in real else '-'} | {better.get(name, '-')} |"
        for name, value in metrics.items()
    ]
    return ["| metric | value | real images | better |", "|---|---|---|---|", *lines]


def _how(results: Mapping[str, Any]) -> list[str]:
    """How the numbers were made, in lines; what is nested stays in results.json."""
    known = {key: value for key, value in results.items() if key not in (*UNSHOWN, "base_model", "base_model_relation", "tags")}
    named = {key: results[key]["name"] for key in ("extractor",) if isinstance(results.get(key), Mapping) and "name" in results[key]}
    text = lambda value: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else json.dumps(value)
    return [f"- {name}: {value if isinstance(value, str) else text(value)}" for name, value in (known | named).items()]


def _snippet(pipeline: Any, repo_id: str) -> str:
    config, names = pipeline.transformer.config, list(pipeline.config.labels)
    wanted = json.dumps(
        names[:2] if names and len(set(names)) == len(names) else list(range(min(2, config.num_classes))), ensure_ascii=False
    )
    what = wanted if config.num_classes else "num_images_per_label=2"
    latent = pipeline.vae is None and pipeline.transformer.out_channels not in (1, 3)
    arguments = [what, "generator=torch.Generator().manual_seed(0)", *(['output_type="latent"'] if latent else [])]
    return "\n".join([
        "import torch",
        "from drifting_diffusers import DriftingPipeline",
        "",
        f'pipe = DriftingPipeline.from_pretrained("{repo_id}")',
        f"images = pipe({', '.join(arguments)}).images",
    ])  # fmt: skip


def _metadata(network: Any, repo_id: str, about: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    generates = hasattr(network, "sample_height")
    conditional = ["class-conditional-image-generation"] if generates and network.config.num_classes else []
    # Of class-conditional models too; the Hub has no other name.
    task = "unconditional-image-generation" if generates else "image-feature-extraction"
    datasets = [about["datasets"]] if isinstance(about.get("datasets"), str) else list(about.get("datasets") or [])
    dataset = about.get("dataset") or next(iter(datasets), None)
    evaluations = [
        EvalResult(task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=name, metric_value=value)
        for name, value in metrics.items()
        if dataset  # a number without a dataset cannot stand in the index of the Hub
    ]
    base = about.get("base_model")
    return ModelCardData(
        base_model=base,
        base_model_relation=about.get("base_model_relation", "finetune") if base else None,
        library_name="drifting-diffusers",  # with "diffusers" the Hub would show a text-to-image snippet
        tags=["diffusers", "drifting", *(["one-step"] if generates else []), *conditional, "arxiv:2602.04770", *about.get("tags", [])],
        pipeline_tag=task,
        datasets=[*dict.fromkeys([*([dataset] if dataset else []), *datasets])] or None,
        metrics=list(metrics) or None,
        model_name=repo_id.split("/")[-1] if evaluations else None,
        eval_results=evaluations or None,
        license=about.get("license"),
        license_name=about.get("license_name"),
        license_link=about.get("license_link"),
    ).to_yaml()


# -- pictures


def save_marked(picture: Image.Image, file: Path) -> None:
    """A PNG that says that it is ours, so that the next push may replace it."""
    mark = PngInfo()
    mark.add_text("Software", PICTURE_MARK)
    picture.save(file, pnginfo=mark)


def is_ours(file: Any) -> bool:
    """Whether a picture, a file or its path, carries our mark."""
    try:
        with Image.open(file) as picture:
            return picture.info.get("Software") == PICTURE_MARK
    except OSError:  # somebody's file that is no picture
        return False


def sample_sheet(pipeline: Any, *, side: int = 96) -> Image.Image:
    """A few samples of up to ten classes, evenly chosen, each column under its name; the same ones for the same weights.

    Neither torch's global random numbers nor the pipeline's device or mode are other ones afterwards.

    Args:
        pipeline: with samples that are images, or with a vae.
        side: what small images are enlarged to, about, and half of what large ones are reduced to; in pixels.
    """
    classes = pipeline.transformer.config.num_classes
    chosen = torch.linspace(0, classes - 1, min(10, classes)).round().long().tolist()
    columns, rows = len(chosen) or 5, 1 if pipeline.vae is not None else 3
    rows = max(rows, 4 // columns)
    generators = [torch.Generator().manual_seed(i) for i in range(columns * rows)]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _evaluating(pipeline):
        images = (
            pipeline(chosen, num_images_per_label=rows, generator=generators).images
            if classes
            else pipeline(num_images_per_label=columns * rows, generator=generators).images
        )
    names = pipeline.labels or [str(i) for i in range(classes)]
    return _page(images, rows, [names[i].split(",")[0] for i in chosen], side)


class _evaluating:
    """Within it the pipeline's networks are in evaluation mode."""

    def __init__(self, pipeline: Any):
        networks = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
        self.training = [module for network in networks for module in network.modules() if module.training]

    def __enter__(self) -> None:
        for module in self.training:
            module.training = False

    def __exit__(self, *_: Any) -> None:
        for module in self.training:
            module.training = True


def _page(images: Sequence[Image.Image], rows: int, names: Sequence[str], side: int) -> Image.Image:
    """Images column by column, the names above."""
    factor = min(max(1.0, round(side / max(images[0].size))), 2 * side / max(images[0].size))
    width, height, line = round(images[0].width * factor), round(images[0].height * factor), 18 if names else 0
    resampling = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    page = Image.new("RGB", (len(images) // rows * (width + 2) + 2, line + rows * (height + 2) + 2), "white")
    draw = ImageDraw.Draw(page)
    for i, image in enumerate(images):
        x, y = 2 + i // rows * (width + 2), line + 2 + i % rows * (height + 2)
        page.paste(image.convert("RGB").resize((width, height), resampling), (x, y))
    for column, name in enumerate(names):
        while name and draw.textlength(name) > width:
            name = name[:-1]
        draw.text((3 + column * (width + 2), 3), name, fill=(40, 40, 40))
    return page
