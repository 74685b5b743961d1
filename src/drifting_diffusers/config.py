"""Frozen tables of every choice of a training run, readable from the command line and from YAML, and the published recipes as rows."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from .config_rules import CHANGEABLE, ELSEWHERE, GENERATOR_RULES, RULES, Rule, at_least
from .presets import ENCODER_PRESETS, PRESETS, Preset

CONFIG_NAME = "training_config.json"
Config = TypeVar("Config", bound="RunConfig")


def _described(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """What every training run chooses, in the vocabulary of transformers' `TrainingArguments`.

    Raises:
        ValueError: for values outside their range, with the range.
    """

    output_dir: str = field(metadata={"help": "folder of the run: checkpoints, logs, previews; a folder that holds another run is refused"})
    max_steps: int = _described(30_000, "optimiser steps of the whole run")
    seed: int = _described(0, "every random number of step k is a function of this and k")

    learning_rate: float = _described(2e-4, "AdamW's, after the warm-up")
    lr_scheduler_type: Literal["constant", "cosine"] = _described("constant", "what follows the linear warm-up from 1e-6")
    warmup_steps: int = _described(5_000, "steps of the warm-up")
    adam_beta1: float = _described(0.9, "AdamW's")
    adam_beta2: float = _described(0.95, "AdamW's")
    weight_decay: float = _described(0.01, "AdamW's, on all parameters")
    max_grad_norm: float = _described(2.0, "gradients with a larger global norm are scaled down to it")
    ema_decay: float = _described(0.999, "decay per step of the averaged weights, which are what is sampled and saved")
    more_ema_decays: list[float] = field(
        default_factory=list, metadata={"help": "further averages that are kept beside that one, each a copy of the weights"}
    )
    max_skipped_steps: int = _described(
        10, "steps whose loss or gradient is not finite are skipped and counted; one more than this stops the run"
    )

    mixed_precision: Literal["no", "bf16", "fp16"] = _described(
        "no", "precision of the network that is trained; features and field always run in float32; fp16 needs a GPU"
    )
    allow_tf32: bool = _described(False, "let a GPU multiply float32 matrices in TF32; the field's distances stay exact")
    gradient_checkpointing: bool = _described(False, "recompute the blocks' activations in the backward pass")
    torch_compile: bool = _described(False, "compile the blocks of the network that is trained")

    image_column: str = _described("image", "column of images")
    label_column: str = _described("label", "column of integer labels")
    dataloader_num_workers: int = _described(0, "processes that decode images")

    logging_steps: int = _described(10, "steps between log lines")
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "trackers of Accelerate, as in tensorboard, wandb or trackio; log.jsonl is always written"}
    )
    project: str = _described("drifting-diffusers", "the trackers' project")
    run_name: str | None = _described(None, "the trackers' name of this run; the folder's name if not given")
    save_steps: int = _described(1_000, "steps between checkpoints; there is always one at the end")
    save_total_limit: int = _described(2, "newest checkpoints kept")
    resume_from_checkpoint: str | None = _described(
        None, "a checkpoint folder to start from; the newest one in output_dir if not given, or 'latest'"
    )
    push_to_hub: bool = _described(False, "upload the model, with its card, as hub_strategy says")
    hub_model_id: str | None = _described(None, "USER/REPOSITORY to push to; the folder's name if not given")
    hub_private_repo: bool = _described(False, "make that repository private, should it be new; one that is public is refused")
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = _described(
        "every_save", "push at the end, with every checkpoint, or the checkpoints themselves too: the last one or all"
    )

    def __post_init__(self):
        kinds = get_type_hints(type(self))  # not the fields' own: HfArgumentParser rewrites those
        for entry in dataclasses.fields(self):
            self._check_type(entry, kinds[entry.name])
        for name, (words, holds) in self.rules().items():
            if not holds(getattr(self, name)):
                meaning = self.__dataclass_fields__[name].metadata["help"]
                raise ValueError(f"{name} must {words}, got {getattr(self, name)!r} ({meaning})")
        for small, large, why in self.order():
            if getattr(self, small) > getattr(self, large):
                raise ValueError(f"{small} must be at most {large}, got {getattr(self, small)} and {getattr(self, large)}: {why}")

    @classmethod
    def rules(cls) -> dict[str, Rule]:
        """What a value must be, in words and as a test."""
        return RULES

    @classmethod
    def order(cls) -> tuple[tuple[str, str, str], ...]:
        """Pairs of choices of which the first is at most the second, and why."""
        return (("warmup_steps", "max_steps", "the learning rate would never be reached"),)

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        """The published recipes of this kind of run."""
        return {}

    def _check_type(self, entry: dataclasses.Field, kind: Any) -> None:
        """Values come from YAML and command lines too: "1e-3" is no number there, and "false" would be true."""
        value = getattr(self, entry.name)
        got = f"got {type(value).__name__} {value!r} ({entry.metadata['help']})"
        if kind == list[float] and isinstance(value, list | tuple):
            object.__setattr__(self, entry.name, [float(v) for v in value])  # the same in JSON, YAML and Python
        elif kind == list[str] and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise TypeError(f"{entry.name} must be a list of names, {got}")
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            return
        elif kind in (bool, int, float, str) and type(value) is not kind:
            raise TypeError(f"{entry.name} must be {kind.__name__}, {got}")
        elif kind == str | None and not isinstance(value, str | None):
            raise TypeError(f"{entry.name} must be a text or None, {got}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{entry.name} must be finite, got {value!r} ({entry.metadata['help']})")

    @property
    def ema_decays(self) -> list[float]:
        """All of them, the one that is sampled first."""
        return list(dict.fromkeys([self.ema_decay, *self.more_ema_decays]))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_folder(cls: type[Config], folder: str | Path) -> Config:
        """The config that a run wrote into its output folder."""
        return cls(**json.loads((Path(folder) / CONFIG_NAME).read_text()))

    @classmethod
    def preset(cls: type[Config], name: str, *, output_dir: str | None = None, steps: int | None = None, **changes: Any) -> Config:
        """The config of a published recipe; see `PRESETS` and `ENCODER_PRESETS`.

        Args:
            name: of the recipe.
            output_dir: `runs/NAME` if not given.
            steps: a run of another length; the warm-up keeps its share of it.
            changes: other values.

        Raises:
            ValueError: for an unknown name, or values outside their range.
        """
        rows = cls.presets()
        if name not in rows:
            raise ValueError(f"preset must be one of {', '.join(rows)}, got {name!r}")
        values: dict[str, Any] = {"output_dir": output_dir or f"runs/{name}"} | rows[name].config
        if steps is not None:
            whole = cls(**values)
            values |= {"max_steps": steps, "warmup_steps": round(whole.warmup_steps * steps / whole.max_steps)}
        return cls(**values | changes)

    def changes_from(self, other: "RunConfig") -> str:
        """What is chosen differently from another config, one line each: `learning_rate: 0.0002 -> 0.001`."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return "\n".join(f"{name}: {theirs[name]} -> {value}" for name, value in mine.items() if value != theirs[name])

    def differences(self, other: "RunConfig") -> dict[str, tuple[Any, Any]]:
        """What another run chose differently and cannot be changed on resuming: name -> (here, there)."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        if self.lr_scheduler_type == "constant" and self.max_steps > other.max_steps:
            theirs["max_steps"] = self.max_steps  # a longer run with the same beginning
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name] and name not in (*CHANGEABLE, *ELSEWHERE)}


@dataclass(frozen=True)
class DriftingConfig(RunConfig):
    """How a generator is trained. The defaults are the ablation recipe of arXiv 2602.04770, Table 8.

    Every count is of the whole step, over all processes.

    Raises:
        ValueError: for values outside their range, with the range.
    """

    labels_per_step: int = _described(64, "classes per step")
    labels_from: Literal["classes", "data"] = _described(
        "classes", "distinct classes while there are enough, or those of the step's fresh samples, as often as they come (release)"
    )
    generated_per_label: int = _described(64, "generated samples per class and step; at least 2, they repel each other")
    positives_per_label: int = _described(64, "real samples per class and step")
    unconditional_per_label: int = _described(16, "real samples of any class that repel, for guidance; 0 trains without guidance")
    labels_per_microbatch: int = _described(
        0, "classes whose activations are in memory at once; 0 for all; the gradient is the same, every sample is generated twice"
    )

    field: str | None = _described(
        None,
        "the drifting field: a name and what differs from its defaults, as in 'sinkhorn(temperatures=(0.05,))'. Fields are drifting, mean_shift, score, sharp, "
        "kernel_gradient, divergence, sinkhorn, nystrom, frechet; lookahead, friction, combined, velocity_guidance and symmetrised hold others; see docs/fields.md. "
        "Not given, it is that of the objective, and without one there the released field",
    )
    positives_from: Literal["bank", "dataset"] = _described(
        "bank",
        "the most recent samples of a class, or any of the dataset: nothing to fill, but it is read at random, as latent caches allow",
    )
    bank_size: int = _described(128, "real samples kept per class")
    unconditional_bank_size: int = _described(1000, "real samples of any class kept")
    push_per_step: int = _described(64, "fresh real samples pushed into the banks per step")
    bank_device: Literal["cpu", "accelerator"] = _described("cpu", "where banks are; from the CPU, draws are copied while a step runs")
    bank_dtype: Literal["float32", "bfloat16", "float16", "uint8"] = _described(
        "float32", "what banks hold; uint8 is of images, rounded to 256 levels: exact for those that were not resized"
    )
    cache_features: bool | str = _described(
        False,
        "keep what features are made of in the banks in place of images, of all (true, all) or of the unconditional ones alone (negatives): exact while "
        "feature maps are frozen, faster, more memory; how much is said before it is taken",
    )
    compile_features: bool = _described(False, "compile the networks that samples are compared in")
    channels_last: bool = _described(
        False, "keep those networks' maps with channels last in memory, which convolutions on GPUs like; the generator has no convolutions"
    )
    random_flip: bool = _described(False, "mirror half of the real images")

    guidance_max: float = _described(4.0, "largest guidance scale seen in training; the least is 1")
    guidance_power: float = _described(3.0, "guidance scales are drawn from the density ~ scale^-power")
    unguided_share: float = _described(0.0, "share of the labels trained at guidance scale 1")

    eval_steps: int = _described(500, "steps between evaluations; 0 for none before the end")
    eval_samples_per_class: int = _described(100, "generated samples per class in an evaluation")
    metric_for_best_model: str = _described("energy", "number of an evaluation that says which weights are kept in `best`")
    greater_is_better: bool = _described(False, "whether that number should be large")
    preview_steps: int = _described(500, "steps between preview pictures; 0 for none, else there is always one at the end")

    def __post_init__(self):
        if self.field is not None:
            object.__setattr__(self, "field", _in_words(self.field))
        super().__post_init__()
        self._check_cache()

    def _check_cache(self) -> None:
        if self.cache_features == "all":
            object.__setattr__(self, "cache_features", True)  # one spelling in files and comparisons
        if not isinstance(self.cache_features, bool) and self.cache_features != "negatives":
            meaning = self.__dataclass_fields__["cache_features"].metadata["help"]
            kind = ValueError if isinstance(self.cache_features, str) else TypeError
            raise kind(f"cache_features must be true, false, 'negatives' or 'all', got {self.cache_features!r} ({meaning})")
        if self.cache_features == "negatives" and not self.unconditional_per_label:
            raise ValueError(
                "cache_features='negatives' is of unconditional negatives, and unconditional_per_label=0 has none: take 'all', or leave it out"
            )
        if self.cache_features and self.bank_dtype == "uint8":
            raise ValueError("bank_dtype='uint8' is of images, and cache_features keeps features: take another bank_dtype")
        if self.cache_features and self.positives_from == "dataset":
            raise ValueError(
                "cache_features keeps features in a bank, and positives_from='dataset' has no bank: take positives_from='bank'"
            )

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        found = super().differences(other)
        if self.max_steps != other.max_steps and _lasts_the_run(self.field):
            found["max_steps"] = (self.max_steps, other.max_steps)
        return found

    @classmethod
    def rules(cls) -> dict[str, Rule]:
        return RULES | GENERATOR_RULES

    @classmethod
    def order(cls) -> tuple[tuple[str, str, str], ...]:
        return (
            *super().order(),
            ("positives_per_label", "bank_size", "samples would be drawn twice"),
            ("unconditional_per_label", "unconditional_bank_size", "samples would be drawn twice"),
        )

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        return PRESETS


@dataclass(frozen=True)
class EncoderConfig(RunConfig):
    """How a feature encoder is trained (arXiv 2602.04770, A.3); the defaults are the paper's where it says them.

    The paper names neither warm-up, betas nor weight decay of the encoder; those are the generator's.

    Raises:
        ValueError: for values outside their range, with the range.
    """

    learning_rate: float = _described(4e-3, "AdamW's, after the warm-up")
    ema_decay: float = _described(0.9995, "decay per step of the averaged weights, which are what is saved")

    batch_size: int = _described(8192, "images per step, over all processes")
    microbatch_size: int = _described(0, "images in memory at once on a process; 0 for all of its share; the gradient is the same")
    mask_ratio_min: float = _described(0.5, "least share of masked patches; uniform between this and the next for each image")
    mask_ratio_max: float = _described(0.5, "largest share of masked patches")
    crop_area_min: float = _described(0.2, "least share of an image's area that a random crop keeps; 1 for centre crops alone")
    random_flip: bool = _described(True, "mirror half of the images")
    classification_steps: int = _described(0, "last steps of the run that learn to classify as well: the paper's fine-tune has 3,000")
    classification_weight: float = _described(0.1, "share of the classification loss then")
    classification_warmup_steps: int = _described(1_000, "steps over which that share rises from 0")
    eval_steps: int = _described(500, "steps between evaluations; 0 for none before the end")
    eval_samples: int = _described(1_000, "held-out images of an evaluation")

    @classmethod
    def rules(cls) -> dict[str, Rule]:
        share: Rule = ("lie in [0, 1]", lambda value: 0 <= value <= 1)
        own = {
            **at_least(0, "microbatch_size", "classification_steps", "classification_warmup_steps", "eval_steps"),
            **at_least(1, "batch_size", "eval_samples"),
            **dict.fromkeys(("mask_ratio_min", "mask_ratio_max", "classification_weight"), share),
            "crop_area_min": ("lie in (0, 1]", lambda value: 0 < value <= 1),
        }
        return RULES | own

    @classmethod
    def order(cls) -> tuple[tuple[str, str, str], ...]:
        return (
            *super().order(),
            ("mask_ratio_min", "mask_ratio_max", "shares are uniform between them"),
            ("classification_steps", "max_steps", "they are the last of its steps"),
        )

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        return ENCODER_PRESETS


def _in_words(field: Any) -> str:
    """A field, or words for one, in the words that any other config has for it."""
    from .fields import read_field, spell  # torch, which a config without a field does without

    if not isinstance(field, str) and not callable(field):
        raise TypeError(f"field must be a field or its name, as in 'sinkhorn(temperatures=(0.05,))', got {type(field).__name__} {field!r}")
    return spell(read_field(field if isinstance(field, str) else spell(field)))


def _lasts_the_run(field: str | None) -> bool:
    """Whether a schedule of the field takes its length from the run: then a longer run begins differently."""
    if field is None:
        return False
    from .fields import Situation, read_field, situated

    recipe = read_field(field)
    return situated(recipe, Situation(1, 10)) != situated(recipe, Situation(1, 20))


def learning_rate_at(step: int, config: RunConfig) -> float:
    """The learning rate of update `step`, counted from 0: linear from 1e-6 over the warm-up, then constant, or a cosine down to 1e-6 of the peak."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return 1e-6 + (peak - 1e-6) * step / warmup
    if config.lr_scheduler_type == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, config.max_steps - warmup))
    return peak * (1e-6 + (1 - 1e-6) * 0.5 * (1 + math.cos(math.pi * done)))
