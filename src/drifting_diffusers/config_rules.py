"""What the values of configs must be, and which of them may differ when a run is resumed."""

from collections.abc import Callable
from typing import Any

Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words and as a test."""

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
    "labels_per_microbatch",
    "microbatch_size",
    "gradient_checkpointing",
    "torch_compile",
    "compile_features",
    "channels_last",
    "bank_device",
    "report_to",
    "run_name",
    "project",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_strategy",
    "resume_from_checkpoint",
    "max_skipped_steps",
)
"""What may differ when a run is resumed: nothing of it changes what is computed, but for rounding."""

ELSEWHERE = ("output_dir", "field")
"""What tells no run from another: where it is, and the field's name, because the setup of a run describes the field itself."""


def at_least(least: float, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, (f"be at least {least}", lambda value: value >= least))


def one_of(*allowed: str) -> Rule:
    return f"be one of {allowed}", lambda value: value in allowed


RULES: dict[str, Rule] = {
    **at_least(0, "seed", "warmup_steps", "weight_decay", "dataloader_num_workers", "max_skipped_steps"),
    **at_least(1, "max_steps", "logging_steps", "save_steps", "save_total_limit"),
    "learning_rate": ("be at least 1e-6, where the warm-up starts", lambda value: value >= 1e-6),
    "max_grad_norm": ("be above 0", lambda value: value > 0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "ema_decay"), ("lie in [0, 1)", lambda value: 0 <= value < 1)),
    "more_ema_decays": ("be different numbers in [0, 1)", lambda values: all(0 <= v < 1 for v in values) and len({*values}) == len(values)),
    "lr_scheduler_type": one_of("constant", "cosine"),
    "mixed_precision": one_of("no", "bf16", "fp16"),
    "hub_strategy": one_of("end", "every_save", "checkpoint", "all_checkpoints"),
}
"""What a value of every run must be, in words and as a test."""


GENERATOR_RULES: dict[str, Rule] = {
    **at_least(0, "unconditional_per_label", "labels_per_microbatch", "eval_steps", "preview_steps"),
    **at_least(1, "labels_per_step", "positives_per_label", "bank_size", "unconditional_bank_size", "push_per_step", "guidance_max"),
    **at_least(2, "generated_per_label", "eval_samples_per_class"),
    "unguided_share": ("lie in [0, 1]", lambda value: 0 <= value <= 1),
    "labels_from": one_of("classes", "data"),
    "positives_from": one_of("bank", "dataset"),
    "bank_device": one_of("cpu", "accelerator"),
    "bank_dtype": one_of("float32", "bfloat16", "float16", "uint8"),
}
"""The same for a run that trains a generator."""
