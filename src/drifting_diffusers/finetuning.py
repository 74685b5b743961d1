r"""A trained generator made ready for other classes: a new class embedding, and adapters of low rank in place of all weights.

    base = DriftingPipeline.from_pretrained("user/base")
    generator = with_classes(base.transformer, 2, labels=["cat", "my dog"], base_labels=base.labels)
    add_lora(generator, rank=8)
    trainer = DriftingTrainer(generator, ...)

An adapted matrix is W + (alpha / rank) B A with A [rank, inputs] and B [outputs, rank] (LoRA, arXiv 2106.09685); B starts at 0, so that training starts
from what the generator was. What is saved or pushed of an adapted generator are its plain weights: they load without peft.
"""

import copy
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors.torch import load_file
from torch import nn

from .files import write_tensors
from .generator import DriftingAttention, DriftingGenerator
from .hub import with_plain_weights
from .labels import names_of

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""The matrices of every block that `add_lora` adapts: attention and MLP. Those of the condition (`modulation`) and of the output stay as they are."""
CLASSES = "class_embedding.safetensors"
ADAPTER = "default"  # peft's and diffusers' own name of an only adapter


def with_classes(
    generator: DriftingGenerator, num_classes: int, *, labels: Sequence[str] | None = None, base_labels: Sequence[str] | None = None
) -> DriftingGenerator:
    """A copy of the generator for other classes, with its weights and a class embedding [num_classes, condition_dim] of its own.

    A class whose name is one of the base's, letter for letter, keeps that embedding. Every other class starts from the mean of the base's embeddings,
    nothing added: new classes draw the same images until they are trained. A base without classes starts from zeros, what it drew before.

    Args:
        generator: the base, without adapters.
        num_classes: at least 1.
        labels: the names of the new classes by id, all different.
        base_labels: the names of the base's classes by id.

    Raises:
        ValueError: for counts and names that do not fit, a name that several classes of the base have, or a base with adapters.
        TypeError: for labels that are no names.
    """
    _check_plain(generator)
    kept = kept_classes(labels or (), base_labels or ())
    _check_counts(generator, num_classes, labels, base_labels)
    old = generator.class_embedding
    state = {name: tensor.detach().clone() for name, tensor in generator.state_dict().items()}
    width = generator.modulation_out.in_features
    if old is None:
        table = torch.zeros(num_classes, width, dtype=generator.dtype, device=generator.device)
    else:
        table = old.weight.detach().mean(0).repeat(num_classes, 1)
        for here, there in kept.items():
            table[here] = old.weight.detach()[there]
    config: dict[str, Any] = {name: value for name, value in generator.config.items() if not name.startswith("_")}
    config["num_classes"] = num_classes
    with torch.device("meta"):  # no weights are drawn only to be replaced
        adapted = DriftingGenerator(**config)
    adapted.load_state_dict(state | {"class_embedding.weight": table}, assign=True)
    return adapted.train(generator.training)


def kept_classes(labels: Sequence[str], base_labels: Sequence[str]) -> dict[int, int]:
    """The classes that a base knows by name: id here -> id there. Whole names count, letter for letter: near ones are other classes.

    Raises:
        ValueError: for a name that stands twice in the labels, or that several classes of the base have.
        TypeError: for labels that are no names.
    """
    names, base = names_of(labels), names_of(base_labels)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"labels must be different names, got {twice} more than once: merge these classes, or rename one")
    shared = {name: [i for i, other in enumerate(base) if other == name] for name in names if base.count(name) > 1}
    if shared:
        name, ids = next(iter(shared.items()))
        raise ValueError(f"{name!r} is the name of the base's classes {ids}: rename all but one of them in base_labels")
    return {i: base.index(name) for i, name in enumerate(names) if name in base}


def add_lora(
    generator: DriftingGenerator, rank: int, *, alpha: float | None = None, targets: Sequence[str] = TARGETS, seed: int = 0
) -> DriftingGenerator:
    """Freeze the generator, in place, but for new adapters of low rank and the class embedding, which is trained in full; returns it.

    Args:
        generator: without adapters.
        rank: of each adapter, at least 1.
        alpha: adapters are scaled by alpha / rank; the rank if not given. Above 0.
        targets: ends of the names of the matrices to adapt, as in `TARGETS`.
        seed: of the adapters' first weights; torch's global generator is left as it was.

    Raises:
        ImportError: without peft.
        ValueError: for values outside their range, targets that no matrix has, or a generator that has adapters.
    """
    _check_peft()
    from peft import LoraConfig

    _check_plain(generator)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}; 4 to 64 are common")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha!r}; leave it out to take the rank")
    names = [name for name, module in generator.named_modules() if isinstance(module, nn.Linear)]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unknown or not targets:
        raise ValueError(f"targets must be ends of names of linear layers, such as {TARGETS}, got {unknown or list(targets)}")
    config = LoraConfig(r=rank, lora_alpha=cast(int, alpha or rank), target_modules=list(targets), init_lora_weights=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator.add_adapter(config, ADAPTER)
    return _with_trained_classes(generator)


def merge_lora(generator: DriftingGenerator) -> DriftingGenerator:
    """A copy whose adapters are part of its plain weights; it draws the same images but for rounding, and needs no peft.

    Raises:
        ValueError: for a generator without adapters.
    """
    _check_adapted(generator)
    return with_plain_weights(generator)


def save_lora(generator: DriftingGenerator, folder: str | os.PathLike) -> None:
    """Write the adapters alone, in diffusers' format, and the class embedding, [num_classes, condition_dim], beside them: what `load_lora` reads.

    Raises:
        ValueError: for a generator without adapters.
    """
    _check_adapted(generator)
    generator.save_lora_adapter(folder, adapter_name=ADAPTER)
    if generator.class_embedding is not None:
        write_tensors(Path(folder, CLASSES), {"weight": generator.class_embedding.weight.detach().cpu()})


def load_lora(generator: DriftingGenerator, folder: str | os.PathLike) -> DriftingGenerator:
    """A copy of the base that they were trained on, with the adapters and the class embedding of the folder.

    Raises:
        FileNotFoundError: if `save_lora` did not write the folder.
        ImportError: without peft.
        ValueError: for adapters of a generator of another width.
    """
    _check_peft()
    if not Path(folder, LORA_WEIGHT_NAME_SAFE).is_file():
        raise FileNotFoundError(f"{folder} holds no {LORA_WEIGHT_NAME_SAFE}: give a folder that save_lora wrote")
    file = Path(folder, CLASSES)
    table = load_file(file)["weight"] if file.is_file() else None
    if table is not None and table.shape[1] != generator.modulation_out.in_features:
        raise ValueError(
            f"the class embedding of {folder} is {list(table.shape)} and the generator's condition has {generator.modulation_out.in_features} "
            "numbers: give the base that the adapters were trained on"
        )
    adapted = copy.deepcopy(generator) if table is None else with_classes(generator, len(table))
    if table is not None:
        with torch.no_grad():
            cast(nn.Embedding, adapted.class_embedding).weight.copy_(table)
    source: dict[str, Any] = {"prefix": None, "weight_name": LORA_WEIGHT_NAME_SAFE, "adapter_name": ADAPTER}
    adapted.load_lora_adapter(str(folder), **source)
    return _with_trained_classes(adapted)


def adaptation(generator: DriftingGenerator) -> dict[str, Any]:
    """What tells one partly trained generator from another, as JSON: its adapters and which weights are trained; nothing where all are."""
    parameters = list(generator.named_parameters())
    trained = [name for name, parameter in parameters if parameter.requires_grad]
    if len(trained) == len(parameters):
        return {}
    lora = {name: {"rank": one.r, "alpha": one.lora_alpha} for name, one in getattr(generator, "peft_config", {}).items()}
    return {"lora": lora, "trained": hashlib.sha256("\n".join(trained).encode()).hexdigest()[:16]}


def _with_trained_classes(generator: DriftingGenerator) -> DriftingGenerator:
    """An adapter cannot tell new classes apart whose embeddings are the same, so the embedding is trained too."""
    if generator.class_embedding is not None:
        generator.class_embedding.requires_grad_(True)
    return generator


def _check_plain(generator: DriftingGenerator) -> None:
    adapters = list(getattr(generator, "peft_config", {}))
    if adapters:
        raise ValueError(f"the generator must have no adapters, got {adapters}: take merge_lora(generator) first")
    if any(module.fused_projections for module in generator.modules() if isinstance(module, DriftingAttention)):
        raise ValueError("the generator must have separate projections, got fused ones: call unfuse_qkv_projections() first")


def _check_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ImportError("adapters need peft, which is not installed: pip install 'drifting-diffusers[lora]'")


def _check_adapted(generator: DriftingGenerator) -> None:
    if not getattr(generator, "peft_config", None):
        raise ValueError("the generator must have adapters, got one without: call add_lora(generator, rank) first")


def _check_counts(generator: DriftingGenerator, num_classes: int, labels: Any, base_labels: Any) -> None:
    if type(num_classes) is not int or num_classes < 1:
        raise ValueError(f"num_classes must be an integer of at least 1, got {num_classes!r}; images without classes are one class")
    if labels and len(labels) != num_classes:
        raise ValueError(f"labels must name all {num_classes} classes, got {len(labels)} names: name each once, or leave labels out")
    known = generator.config.num_classes
    if base_labels and len(base_labels) != known:
        raise ValueError(f"base_labels must name the base's {known} classes, got {len(base_labels)} names: take pipeline.labels")
