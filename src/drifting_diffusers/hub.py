r"""How a pipeline lies in a folder or a Hub repository, and the card that stands before it.

diffusers loads a class it does not ship only from a file in the repository. So `model_index.json` names two files of one import line each,
`pipeline.py` and `transformer/modeling_drifting.py`: the generic `DiffusionPipeline` finds everything through them once it is trusted to run code,
while our own class reads the names back as what they stand for, runs nothing from the repository and needs no trust.
"""

import copy
import filecmp
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, constants, snapshot_download
from PIL import Image

from .cards import (
    ABOUT,
    CARD_MARK,
    CURVES,
    PICTURES,
    README,
    RENDERED,
    RESULTS,
    SAMPLES,
    is_ours,
    model_card,
    network_card,
    read_about,
    sample_sheet,
    save_marked,
)
from .remote import NotDone, Patience, file_there, open_repository

INDEX = "model_index.json"
SHIM = "from drifting_diffusers import {name} as {name}\n"

# What the index says on disk, and what it means to us.
PIPELINE_ON_DISK, PIPELINE = ["pipeline", "DriftingPipeline"], "DriftingPipeline"
GENERATOR_ON_DISK, GENERATOR = ["modeling_drifting", "DriftingGenerator"], ["drifting_diffusers.generator", "DriftingGenerator"]


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
        OSError: if the Hub does not give them.
    """
    components = list(components)
    fetch = partial(_fetched, repo_id, **where)
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


def _fetched(repo_id: str, **what: Any) -> str:
    """The folder of a snapshot; what is cut off goes on from where it was, so it is asked for again."""
    fetch = partial(snapshot_download, repo_id, **what)
    if what.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return fetch()
    try:
        return Patience(attempts=3, longest_wait=60).ask(fetch)
    except NotDone as error:
        raise OSError(f"{repo_id} could not be fetched: {error}; what has arrived is kept, so the same call goes on from there") from error


PUSHING = ("repo_id", "commit_message", "private", "token", "revision", "create_pr", "card", "samples")


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

        With `push_to_hub` the folder is uploaded to the repository `repo_id` (by default of the folder's name), with our card unless somebody wrote
        one, and further arguments are those of `upload`. Numbers come from `results.json`, if the folder has it.
        """
        # By name, because a pipeline asks its components' signatures what it may pass on.
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        options |= {"use_flashpack": use_flashpack}
        defaults = {"safe_serialization": True, "use_flashpack": False}
        kwargs |= {name: value for name, value in options.items() if value != defaults.get(name)}
        pushing = {key: kwargs.pop(key) for key in PUSHING if key in kwargs}
        super(PushWithCard, with_plain_weights(self)).save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        samples = Path(save_directory, SAMPLES)
        if kwargs.get("is_main_process", True) and samples.exists() and is_ours(samples):
            samples.unlink()  # of the weights that were here before
        if push_to_hub and kwargs.get("is_main_process", True):
            upload(self, save_directory, pushing.pop("repo_id", Path(save_directory).name), **pushing)

    def push_to_hub(
        self, repo_id: str, *, safe_serialization: bool = True, variant: str | None = None, max_shard_size: Any = None, **kwargs: Any
    ) -> Any:
        """Save to a temporary folder and upload it; returns the commit, with `pr_url` and `pr_revision` of a pull request.

        What was loaded from a folder and has its weights still brings that folder's numbers, pictures, and the card that somebody wrote.

        Args:
            repo_id: the repository, made if it is new.
            safe_serialization: whether to save as safetensors.
            variant: goes into the names of the weights, as in "fp16".
            max_shard_size: of a file, as in "5GB".
            kwargs: commit_message, private, token, revision, create_pr, card, samples; see `upload`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size)
            _bring_along(self, Path(folder))
            return upload(self, folder, repo_id, **kwargs)


def _bring_along(model: Any, folder: Path) -> None:
    """Put what tells of a model beside its weights, from the folder that it was loaded from; not if it has other weights since then."""
    source = Path(str(getattr(model.config, "_name_or_path", None) or ""))
    weights = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin")]
    if not all((source / name).exists() and filecmp.cmp(source / name, folder / name, shallow=False) for name in weights):
        return
    for name in (README, RESULTS, *PICTURES):
        ours = name == README and (source / name).exists() and CARD_MARK in (source / name).read_text(encoding="utf-8")
        if (source / name).exists() and not ours:
            shutil.copy(source / name, folder / name)


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
    revision: str | None = None,
    create_pr: bool = False,
    card: Mapping[str, Any] | str | os.PathLike | None = None,
    samples: bool = True,
    wait: Callable[[float], Any] | None = None,
) -> Any:
    """Upload a saved pipeline or network, with our card and a picture of samples unless somebody made others; see `settle_card`.

    What passes, such as a busy server or a connection that is cut, is tried four times, but not a pull request, which could be opened twice.

    Args:
        model: what was saved.
        folder: where.
        repo_id: the repository, made if it is new; without a user's name it is the token's own.
        commit_message: of the commit; the title of a pull request.
        private: make it private, should it be new; one that is public already is refused.
        token: of the Hub; the stored one if not given.
        revision: branch to push to, made from the main one if it is new; or the "refs/pr/1" of a pull request to add to.
        create_pr: open a pull request to the main branch.
        card: what the card says beside the folder's results.json, or in place of it: {"license": "mit", "datasets": ["user/data"], "base_model":
            "user/base"} and what else `cards.ABOUT` names, "metrics" and how they were made; or a results.json.
        samples: whether a picture of samples is drawn where none is, for a card of ours.
        wait: waits for so many seconds between attempts.

    Raises:
        ValueError: for what contradicts itself, and for a `card` with entries that it would not show.
        OSError: if the Hub refuses, or cannot be reached; the message says what helps.
    """
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise ValueError(f"a pull request is to the main branch, got create_pr=True and revision={revision!r}: leave one of them out")
    api, folder, about = HfApi(token=token), Path(folder), read_about(card)
    patience, once = Patience(attempts=4, longest_wait=60), Patience(attempts=1)
    try:
        repo_id = patience.ask(lambda: open_repository(api, repo_id, private=private, revision=revision), wait=wait)
        settle = partial(settle_card, api, model, folder, revision=revision, about=about, samples=samples)
        theirs = patience.ask(lambda: settle(repo_id), wait=wait)
        push = partial(api.upload_folder, repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr)
        message = commit_message or f"Upload {type(model).__name__}"
        return (once if create_pr else patience).ask(lambda: push(commit_message=message, ignore_patterns=[*theirs]), wait=wait)
    except NotDone as error:
        raise OSError(f"Pushing to {repo_id} failed: {error}. Push again when that is settled") from error


def settle_card(
    api: HfApi,
    model: Any,
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    about: Mapping[str, Any] | None = None,
    samples: bool = False,
) -> list[str]:
    """Put our card into a folder that is about to be pushed, unless somebody wrote one there or in the repository; pictures likewise.

    A card of ours that is there stays if it has other sources than results.json, as those of converted releases, and `about` adds nothing.

    Args:
        api: with the token.
        model: what the card is of; without it only what is there is judged.
        folder: may have README.md, results.json, samples.png and curves.png.
        repo_id: the repository.
        revision: branch; the main one if not given.
        about: what the card says beside results.json.
        samples: whether to draw samples for a card that is rendered, if there is no picture of them.

    Returns:
        names in the folder that must not be pushed, because the repository has somebody's own.

    Raises:
        OSError: if it cannot be known what the repository has.
    """
    here = (folder / README).read_text(encoding="utf-8") if (folder / README).exists() else None
    there = partial(file_there, api, repo_id, revision=revision)
    chosen = [name for name in PICTURES if (found := there(name)) is not None and not is_ours(io.BytesIO(found))]
    theirs = [name for name in chosen if (folder / name).exists() and is_ours(folder / name)]
    if here is not None and CARD_MARK not in here:
        return theirs
    found = there(README)
    if found is not None and CARD_MARK.encode() not in found:
        return [*theirs, README]
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8")) if (folder / RESULTS).exists() else {}
    if model is None or (here is not None and RENDERED not in here and not results and not about):
        return theirs
    if samples and SAMPLES not in chosen:
        add_pictures(model, folder)
    shown = [name for name in PICTURES if name in chosen or (folder / name).exists()]
    render = model_card if isinstance(model, DiffusionPipeline) else network_card
    if about and "metrics" in about:  # other numbers: how the former ones were made is not said of them
        results = {name: results[name] for name in ABOUT if name in results}
    (folder / README).write_text(render(model, {**results, **(about or {})}, repo_id=repo_id, pictures=shown), encoding="utf-8")
    return theirs


def add_pictures(model: Any, folder: Path, curves: Path | None = None) -> None:
    """Put samples of a pipeline, and training curves where there are any, into its folder for its card. What is there stays.

    Nothing is drawn of networks alone and of latents. What cannot be drawn is told as a warning.
    """
    if curves is not None and curves.exists() and (not (folder / CURVES).exists() or is_ours(folder / CURVES)):
        with Image.open(curves) as picture:
            save_marked(picture, folder / CURVES)
    if (folder / SAMPLES).exists() or not isinstance(model, DiffusionPipeline):
        return
    if model.vae is None and model.transformer.out_channels not in (1, 3):
        return
    try:
        save_marked(sample_sheet(model), folder / SAMPLES)
    except Exception as error:  # a picture is worth no failure
        warnings.warn(f"no samples can be drawn for the card: {error}; a {SAMPLES} of your own goes with it too", stacklevel=2)
