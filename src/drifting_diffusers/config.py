"""One frozen table of every choice of a training run, readable from the command line and from YAML through transformers' HfArgumentParser."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

CONFIG_NAME = "training_config.json"
Rule = tuple[str, Callable[[Any], bool]]
CHANGEABLE = (
    "logging_steps",
    "eval_steps",
    "preview_steps",
    "metric_for_best_model",
    "greater_is_better",
    "save_steps",
    "save_total_limit",
    "eval_samples_per_class",
    "dataloader_num_workers",
)
"""What may differ when a run is resumed: nothing of it enters a gradient."""


def _described(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _at_least(least: float, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, (f"be at least {least}", lambda value: value >= least))


def _one_of(*allowed: str) -> Rule:
    return f"be one of {allowed}", lambda value: value in allowed


RULES: dict[str, Rule] = {
    **_at_least(
        0, "seed", "unconditional_per_label", "warmup_steps", "weight_decay", "dataloader_num_workers", "eval_steps", "preview_steps"
    ),
    **_at_least(1, "max_steps", "labels_per_step", "positives_per_label", "bank_size", "unconditional_bank_size", "push_per_step"),
    **_at_least(1, "guidance_max", "logging_steps", "save_steps", "save_total_limit"),
    **_at_least(2, "generated_per_label", "eval_samples_per_class"),
    "learning_rate": ("be at least 1e-6, where the warm-up starts", lambda value: value >= 1e-6),
    "max_grad_norm": ("be above 0", lambda value: value > 0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "ema_decay"), ("lie in [0, 1)", lambda value: 0 <= value < 1)),
    "unguided_share": ("lie in [0, 1]", lambda value: 0 <= value <= 1),
    "lr_scheduler_type": _one_of("constant", "cosine"),
    "mixed_precision": _one_of("no", "bf16"),
}
"""What a value must be, in words and as a test."""

ORDER = (
    ("warmup_steps", "max_steps", "the learning rate would never be reached"),
    ("positives_per_label", "bank_size", "samples would be drawn twice"),
    ("unconditional_per_label", "unconditional_bank_size", "samples would be drawn twice"),
)


@dataclass(frozen=True)
class DriftingConfig:
    """How a generator is trained. The defaults are the ablation recipe of arXiv 2602.04770, Table 8, for one process.

    Raises:
        ValueError: for values outside their range, with the range.
    """

    output_dir: str = field(metadata={"help": "folder of the run: checkpoints, logs, previews; a folder that holds another run is refused"})
    max_steps: int = _described(30_000, "optimiser steps of the whole run")
    seed: int = _described(0, "every random number of step k is a function of this and k")

    labels_per_step: int = _described(64, "classes per step; distinct ones while there are enough")
    generated_per_label: int = _described(64, "generated samples per class and step; at least 2, they repel each other")
    positives_per_label: int = _described(64, "real samples per class and step")
    unconditional_per_label: int = _described(16, "real samples of any class that repel, for guidance; 0 trains without guidance")
    bank_size: int = _described(128, "real samples kept per class")
    unconditional_bank_size: int = _described(1000, "real samples of any class kept")
    push_per_step: int = _described(64, "fresh real samples pushed into the banks per step")
    cache_features: bool = _described(
        False, "keep the features of banked images instead of the images: exact while feature maps are frozen, faster, more memory"
    )
    random_flip: bool = _described(False, "mirror half of the real images")

    guidance_max: float = _described(4.0, "largest guidance scale seen in training; the least is 1")
    guidance_power: float = _described(3.0, "guidance scales are drawn from the density ~ scale^-power")
    unguided_share: float = _described(0.0, "share of the labels trained at guidance scale 1")

    learning_rate: float = _described(2e-4, "AdamW's, after the warm-up")
    lr_scheduler_type: Literal["constant", "cosine"] = _described("constant", "what follows the linear warm-up from 1e-6")
    warmup_steps: int = _described(5_000, "steps of the warm-up")
    adam_beta1: float = _described(0.9, "AdamW's")
    adam_beta2: float = _described(0.95, "AdamW's")
    weight_decay: float = _described(0.01, "AdamW's, on all parameters")
    max_grad_norm: float = _described(2.0, "gradients with a larger global norm are scaled down to it")
    ema_decay: float = _described(0.999, "decay per step of the averaged weights, which are what is sampled and saved")
    mixed_precision: Literal["no", "bf16"] = _described("no", "precision of the generator; features and field always run in float32")
    gradient_checkpointing: bool = _described(False, "recompute the blocks' activations in the backward pass")

    image_column: str = _described("image", "column of images")
    label_column: str = _described("label", "column of integer labels")
    dataloader_num_workers: int = _described(0, "processes that decode images")

    logging_steps: int = _described(10, "steps between log lines")
    eval_steps: int = _described(500, "steps between evaluations; 0 for none before the end")
    eval_samples_per_class: int = _described(100, "generated samples per class in an evaluation")
    metric_for_best_model: str = _described("energy", "number of an evaluation that says which weights are kept in `best`")
    greater_is_better: bool = _described(False, "whether that number should be large")
    preview_steps: int = _described(500, "steps between preview pictures; 0 for none, else there is always one at the end")
    save_steps: int = _described(1_000, "steps between checkpoints; there is always one at the end")
    save_total_limit: int = _described(2, "newest checkpoints kept")

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            self._check_type(entry)
        for name, (words, holds) in RULES.items():
            if not holds(getattr(self, name)):
                meaning = self.__dataclass_fields__[name].metadata["help"]
                raise ValueError(f"{name} must {words}, got {getattr(self, name)!r} ({meaning})")
        for small, large, why in ORDER:
            if getattr(self, small) > getattr(self, large):
                raise ValueError(f"{small} must be at most {large}, got {getattr(self, small)} and {getattr(self, large)}: {why}")

    def _check_type(self, entry: dataclasses.Field) -> None:
        """Values come from YAML and command lines too: "1e-3" is no number there, and "false" would be true."""
        value = getattr(self, entry.name)
        if entry.type is float and isinstance(value, int) and not isinstance(value, bool):
            return
        if entry.type in (bool, int, float, str) and type(value) is not entry.type:
            raise TypeError(f"{entry.name} must be {entry.type.__name__}, got {type(value).__name__} {value!r} ({entry.metadata['help']})")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{entry.name} must be finite, got {value!r} ({entry.metadata['help']})")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "DriftingConfig":
        """The config that a run wrote into its output folder."""
        return cls(**json.loads((Path(folder) / CONFIG_NAME).read_text()))

    def differences(self, other: "DriftingConfig") -> dict[str, tuple[Any, Any]]:
        """What another run chose differently and cannot be changed on resuming: name -> (here, there)."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        if self.lr_scheduler_type == "constant" and self.max_steps > other.max_steps:
            theirs["max_steps"] = self.max_steps  # a longer run with the same beginning
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name] and name not in (*CHANGEABLE, "output_dir")}


def learning_rate_at(step: int, config: DriftingConfig) -> float:
    """The learning rate of update `step`, counted from 0: linear from 1e-6 over the warm-up, then constant, or a cosine down to 1e-6 of the peak."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return 1e-6 + (peak - 1e-6) * step / warmup
    if config.lr_scheduler_type == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, config.max_steps - warmup))
    return peak * (1e-6 + (1 - 1e-6) * 0.5 * (1 + math.cos(math.pi * done)))
