r"""How a pipeline lies in a folder or a Hub repository, and the card that stands before it.

diffusers loads a class it does not ship only from a file in the repository. So `model_index.json` names two files of one import line each,
`pipeline.py` and `transformer/modeling_drifting.py`: the generic `DiffusionPipeline` finds everything through them once it is trusted to run code,
while our own class reads the names back as what they stand for, runs nothing from the repository and needs no trust.
"""

import copy
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCardData, create_repo, hf_hub_download, snapshot_download, upload_folder
from huggingface_hub.errors import RemoteEntryNotFoundError

INDEX = "model_index.json"
SHIM = "from drifting_diffusers import {name} as {name}\n"

# What the index says on disk, and what it means to us.
PIPELINE_ON_DISK, PIPELINE = ["pipeline", "DriftingPipeline"], "DriftingPipeline"
GENERATOR_ON_DISK, GENERATOR = ["modeling_drifting", "DriftingGenerator"], ["drifting_diffusers.generator", "DriftingGenerator"]

CARD_MARK = "<!-- Rendered by drifting_diffusers; delete this line and the next push keeps the card as you left it. -->"


def to_published(index: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `model_index.json` as it is published.

    `labels` becomes an object {"0": name}: of a list, diffusers' `download` takes the first entry for a component's library.
    """
    published = {key: GENERATOR_ON_DISK if value == GENERATOR else value for key, value in index.items()}
    published.pop("_name_or_path", None)  # where this copy came from is nobody's business
    if index["_class_name"] == PIPELINE:
        published["_class_name"] = PIPELINE_ON_DISK
    if isinstance(index.get("labels"), list):
        published["labels"] = {str(i): name for i, name in enumerate(index["labels"])}
    return published


def from_published(index: Mapping[str, Any]) -> dict[str, Any]:
    """The same content with our classes under their own names; an index in diffusers' stock layout comes back as it is."""
    meant = {key: GENERATOR if value == GENERATOR_ON_DISK else value for key, value in index.items()}
    if index.get("_class_name") == PIPELINE_ON_DISK:
        meant["_class_name"] = PIPELINE
    return meant


def publish_layout(folder: str | os.PathLike) -> None:
    """Rewrite the `model_index.json` that diffusers saved in `folder` and put the two shims beside it."""
    path = Path(folder, INDEX)
    index = to_published(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if index["_class_name"] == PIPELINE_ON_DISK:
        Path(folder, "pipeline.py").write_text(SHIM.format(name="DriftingPipeline"), encoding="utf-8")
    for component in (key for key, value in index.items() if value == GENERATOR_ON_DISK):
        Path(folder, component).mkdir(exist_ok=True)
        Path(folder, component, "modeling_drifting.py").write_text(SHIM.format(name="DriftingGenerator"), encoding="utf-8")


def download_components(
    repo_id: str, components: Iterable[str], *, variant: str | None = None, suffix: str = "safetensors", **where: Any
) -> str:
    """Fetch configurations and weights of the components, and no code; returns the folder of the snapshot.

    A component without weights of the variant comes with its plain ones, as in diffusers.

    Args:
        repo_id: the repository.
        components: names of the sub-folders to fetch.
        variant: as in "fp16"; plain weights if not given.
        suffix: "safetensors" or "bin".
        where: revision, token, cache_dir and so on, as `snapshot_download` takes them.

    Raises:
        ValueError: if no component has weights of the variant.
    """
    components = list(components)
    fetch = partial(snapshot_download, repo_id, **where)
    allow = [INDEX, *(f"{name}/*.json" for name in components)]
    plain = components
    if variant is not None:
        weights = [f"{name}/*.{variant}{shard}.{suffix}" for name in components for shard in ("", "-*")]
        folder = fetch(allow_patterns=[*allow, *weights])
        plain = [name for name in components if not any(Path(folder, name).glob(f"*.{variant}*.{suffix}"))]
        if plain == components and components:
            raise ValueError(f"{repo_id} has no {suffix} weights of variant {variant!r}: leave `variant` out, or save them with it first")
        if not plain:
            return folder
    return fetch(allow_patterns=[*allow, *(f"{name}/*.{suffix}" for name in plain)], ignore_patterns=[f"*.*.{suffix}"])


class PushWithCard:
    """Pushing with our card in place of diffusers' empty one, for pipelines and single networks."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        use_flashpack: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in diffusers; adapters become part of the weights.

        With `push_to_hub` the repository `repo_id` (by default the folder's name) gets our card unless it has its own README.
        """
        # By name, because a pipeline asks its components' signatures what it may pass on.
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        options |= {"use_flashpack": use_flashpack}
        defaults = {"safe_serialization": True, "use_flashpack": False}
        kwargs |= {name: value for name, value in options.items() if value != defaults.get(name)}
        pushing = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "token", "create_pr") if key in kwargs}
        super(PushWithCard, with_plain_weights(self)).save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if push_to_hub and kwargs.get("is_main_process", True):
            upload(self, save_directory, pushing.pop("repo_id", Path(save_directory).name), **pushing)

    def push_to_hub(
        self, repo_id: str, *, safe_serialization: bool = True, variant: str | None = None, max_shard_size: Any = None, **kwargs: Any
    ) -> Any:
        """Save to a temporary folder and upload it.

        Args:
            repo_id: the repository, made if it is new.
            safe_serialization: whether to save as safetensors.
            variant: goes into the names of the weights, as in "fp16".
            max_shard_size: of a file, as in "5GB".
            kwargs: commit_message, private, token, create_pr.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size)
            return upload(self, folder, repo_id, **kwargs)


def with_plain_weights(model: Any) -> Any:
    """The model; of one with LoRA adapters a copy whose adapters are part of its weights, so that it loads without peft."""
    if not getattr(model, "peft_config", None):
        return model
    plain = copy.deepcopy(model)
    plain.fuse_lora()
    plain.unload_lora()
    return plain


def upload(
    model: Any,
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload a saved pipeline or network; the repository is made if it is new, and gets our card if it has none of its own."""
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    write_card(model, folder, repo_id, token=token)
    message = commit_message or f"Upload {type(model).__name__}"
    return upload_folder(repo_id=repo_id, folder_path=str(folder), token=token, commit_message=message, create_pr=create_pr)


def write_card(model: Any, folder: str | os.PathLike, repo_id: str, *, token: str | None = None) -> None:
    """Put a README.md in `folder`.

    The first of these: what somebody wrote there; what somebody wrote in the repository; what we rendered there; a card of ours with the numbers of
    results.json. What we rendered carries `CARD_MARK`.

    Raises:
        OSError: if it cannot be known whether somebody wrote a README there.
    """
    readme, results = Path(folder, "README.md"), Path(folder, "results.json")
    rendered = readme.read_text(encoding="utf-8") if readme.exists() else None
    if rendered is not None and CARD_MARK not in rendered:
        return
    try:
        text = Path(hf_hub_download(repo_id, "README.md", token=token)).read_text(encoding="utf-8")
    except RemoteEntryNotFoundError:  # the Hub says so; a network that fails says nothing of what somebody wrote
        text = CARD_MARK
    if CARD_MARK in text and rendered is not None:
        return
    if CARD_MARK in text:
        measured = json.loads(results.read_text(encoding="utf-8")) if results.exists() else None
        text = (
            model_card(model, measured, repo_id=repo_id) if isinstance(model, DiffusionPipeline) else network_card(model, repo_id=repo_id)
        )
    readme.write_text(text, encoding="utf-8")


def model_card(pipeline: DiffusionPipeline, results: Mapping[str, Any] | None = None, *, repo_id: str = "user/repository") -> str:
    """The text of a README.md: what the generator is, how to draw from it, and measured numbers if there are any.

    Args:
        pipeline: the pipeline that is published.
        results: {"metrics": {"fid": 12.3}} and how they were made: "dataset" and "license" go into the metadata as well, every other entry
            (seeds, number of samples, command, commit) is printed as it is. "base_model" is the repository that was fine-tuned, and
            "base_model_relation" how: "finetune", if not given, or "adapter".
        repo_id: where the snippet loads from.

    Raises:
        ValueError: if a metric is not a finite number.
    """
    results = dict(results or {})
    metrics, config = dict(results.pop("metrics", {})), pipeline.transformer.config
    bad = {name: value for name, value in metrics.items() if not isinstance(value, int | float) or not math.isfinite(value)}
    if bad:
        raise ValueError(f"metrics must be finite numbers, got {bad}: leave out what was not measured")
    sides = f"{pipeline.transformer.sample_height} x {pipeline.transformer.sample_width}"
    classes = f"{config.num_classes} classes" if config.num_classes else "no class labels"
    # Adapters are saved as part of the other weights.
    weights = sum(p.numel() for name, p in pipeline.transformer.named_parameters() if "lora_" not in name)
    base = {name: results.pop(name) for name in ("base_model", "base_model_relation") if name in results}
    decoder = f", decoded by an `{type(pipeline.vae).__name__}`" if pipeline.vae is not None else ""
    parts = [
        f"---\n{_metadata(repo_id, config.num_classes, results | base, metrics)}\n---\n{CARD_MARK}",
        f"# {repo_id.split('/')[-1]}",
        "A one-step image generator trained with drifting ([Generative Modeling via Drifting](https://arxiv.org/abs/2602.04770)): one network call "
        f"per image. Samples are {pipeline.transformer.out_channels} x {sides}{decoder}; it knows {classes} and has {weights:,} weights.",
        *(
            [f"It was fine-tuned from [{base['base_model']}](https://huggingface.co/{base['base_model']})."]
            if base.get("base_model")
            else []
        ),
        f"```bash\npip install drifting-diffusers\n```\n\n```python\n{_snippet(pipeline, repo_id)}\n```",
        f'`DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)` loads the same pipeline, with the package installed.',
    ]
    if metrics:
        parts.append("\n".join(["## Results", "", *_rows(metrics, results), "", *_how(results)]))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def network_card(model: Any, *, repo_id: str = "user/repository") -> str:
    """The text of a README.md for a network alone, a generator or a feature encoder: what it is and how to load it."""
    name, weights = type(model).__name__, sum(p.numel() for p in model.parameters())
    choices = "\n".join(f"| {key} | {value} |" for key, value in model.config.items() if not key.startswith("_"))
    data = ModelCardData(library_name="drifting-diffusers", tags=["diffusers", "drifting", "arxiv:2602.04770"])
    return "\n\n".join([
        f"---\n{data.to_yaml()}\n---\n{CARD_MARK}",
        f"# {repo_id.split('/')[-1]}",
        f"A `{name}` of {weights:,} weights, of a drifting model ([Generative Modeling via Drifting](https://arxiv.org/abs/2602.04770)).",
        f'```bash\npip install drifting-diffusers\n```\n\n```python\nfrom drifting_diffusers import {name}\n\n'
        f'model = {name}.from_pretrained("{repo_id}")\n```',
        f"## Configuration\n\n| | |\n|---|---|\n{choices}\n",
    ])  # fmt: skip


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
    known = {
        key: value for key, value in results.items() if key not in ("sd", "real", "better", "meaning", "sweep", "reference", "extractor")
    }
    named = {key: results[key]["name"] for key in ("extractor",) if isinstance(results.get(key), Mapping) and "name" in results[key]}
    text = lambda value: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else json.dumps(value)
    return [f"- {name}: {value if isinstance(value, str) else text(value)}" for name, value in (known | named).items()]


def _snippet(pipeline: DiffusionPipeline, repo_id: str) -> str:
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


def _metadata(repo_id: str, num_classes: int, results: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    dataset, task = results.get("dataset"), "unconditional-image-generation"  # of class-conditional models too; the Hub has no other name
    conditional = ["class-conditional-image-generation"] if num_classes else []
    evaluations = [
        EvalResult(task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=name, metric_value=value)
        for name, value in metrics.items()
        if dataset  # a number without a dataset cannot stand in the index of the Hub
    ]
    base = results.get("base_model")
    data = ModelCardData(
        base_model=base,
        base_model_relation=results.get("base_model_relation", "finetune") if base else None,
        library_name="drifting-diffusers",  # with "diffusers" the Hub would show a text-to-image snippet
        tags=["diffusers", "drifting", "one-step", *conditional, "arxiv:2602.04770"],
        pipeline_tag=task,
        license=results.get("license"),
        datasets=[dataset] if dataset else None,
        metrics=list(metrics) or None,
        model_name=repo_id.split("/")[-1] if evaluations else None,
        eval_results=evaluations or None,
    )
    return data.to_yaml()
