"""The config: one table, checked, readable from a command line, written beside the run."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from drifting_diffusers import DriftingConfig
from drifting_diffusers.config import CHANGEABLE, EncoderConfig, learning_rate_at
from drifting_diffusers.presets import ENCODER_PRESETS, PRESETS


def test_recorded_learning_rates(shared):
    for case in json.loads((shared / "fixtures/misc/lr_schedule.json").read_text()):
        config = DriftingConfig(
            "unused",
            learning_rate=case["learning_rate"],
            warmup_steps=case["warmup_steps"],
            max_steps=case["total_steps"],
            lr_scheduler_type="cosine" if case["lr_schedule"] == "cosine" else "constant",
        )
        for step, expected in zip(case["steps"], case["lr"], strict=True):
            assert learning_rate_at(step, config) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_defaults_are_the_ablation_recipe():
    """Those of arXiv 2602.04770, Table 8, and the release's queues."""
    config = DriftingConfig("unused")
    assert (config.labels_per_step, config.generated_per_label, config.positives_per_label, config.unconditional_per_label) == (
        64,
        64,
        64,
        16,
    )
    assert (config.learning_rate, config.warmup_steps, config.max_steps, config.max_grad_norm) == (2e-4, 5_000, 30_000, 2.0)
    assert (config.adam_beta1, config.adam_beta2, config.weight_decay, config.ema_decay) == (0.9, 0.95, 0.01, 0.999)
    assert (config.bank_size, config.unconditional_bank_size, config.push_per_step, config.guidance_power) == (128, 1000, 64, 3.0)


def test_command_line():
    (config,) = HfArgumentParser(DriftingConfig).parse_args_into_dataclasses(
        ["--output_dir", "x", "--lr_scheduler_type", "cosine", "--max_steps", "7000"]
    )
    assert (config.output_dir, config.lr_scheduler_type, config.max_steps) == ("x", "cosine", 7000)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("generated_per_label", 1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("ema_decay", 1.0),
        ("unguided_share", 1.5),
        ("guidance_max", 0.5),
        ("lr_scheduler_type", "linear"),
        ("mixed_precision", "fp8"),
    ],
)
@pytest.mark.usefixtures("as_users_see_it")
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must .*got {value!r}"):
        DriftingConfig("unused", **{name: value})


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 2.5),
        ("learning_rate", "1e-3"),
        ("random_flip", "false"),
        ("output_dir", Path("x")),
        ("report_to", "wandb"),
        ("run_name", 3),
    ],
)
def test_wrong_types_are_refused(name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be .*got {type(value).__name__}"):
        DriftingConfig(**({"output_dir": "unused"} | {name: value}))
    assert DriftingConfig("unused", weight_decay=0).weight_decay == 0  # an int is a float


@pytest.mark.parametrize(
    "changes", [{"max_steps": 10}, {"bank_size": 63}, {"unconditional_bank_size": 15}, {"guidance_power": float("inf")}]
)
def test_values_that_do_not_go_together_are_refused(changes):
    with pytest.raises(ValueError, match=r"at most|finite"):
        DriftingConfig("unused", **changes)


@pytest.mark.parametrize("kind", [DriftingConfig, EncoderConfig])
def test_every_number_has_a_rule_and_every_rule_a_field(kind):
    hints = typing.get_type_hints(kind)
    numbers = {
        f.name for f in dataclasses.fields(kind) if hints[f.name] in (int, float) or typing.get_origin(hints[f.name]) is typing.Literal
    }
    free = {"guidance_power"}  # any number
    assert set(kind.rules()) - {"more_ema_decays"} == numbers - free
    names = {f.name for config in (DriftingConfig, EncoderConfig) for f in dataclasses.fields(config)}
    assert set(CHANGEABLE) <= names
    assert {name for pair in kind.order() for name in pair[:2]} <= numbers


@pytest.mark.parametrize(("kind", "rows"), [(DriftingConfig, PRESETS), (EncoderConfig, ENCODER_PRESETS)])
def test_every_preset_is_a_config_and_says_what_it_reached(kind, rows):
    for name, row in rows.items():
        config = kind.preset(name)
        assert config.output_dir == f"runs/{name}"
        assert row.reported, name
        assert row.source, name
        changed = config.changes_from(kind(config.output_dir)).splitlines()
        default = kind("unused")
        assert {line.split(":")[0] for line in changed} == {k for k, v in row.config.items() if v != getattr(default, k)}


def test_a_preset_of_another_length_keeps_its_share_of_warm_up():
    config = DriftingConfig.preset("ablation", steps=600, output_dir="here", seed=3)
    assert (config.max_steps, config.warmup_steps, config.seed, config.output_dir) == (600, 100, 3, "here")
    assert config.changes_from(DriftingConfig.preset("ablation", output_dir="here")).splitlines() == [
        "max_steps: 30000 -> 600",
        "seed: 0 -> 3",
        "warmup_steps: 5000 -> 100",
    ]


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"preset must be one of ablation, latent-b, .*, got 'sota'"):
        DriftingConfig.preset("sota")


def test_round_trip_and_differences(tmp_path):
    config = DriftingConfig(str(tmp_path), max_steps=6000)
    (tmp_path / "training_config.json").write_text(config.to_json())
    assert DriftingConfig.from_folder(tmp_path) == config
    other = dataclasses.replace(config, max_steps=7000, logging_steps=3, output_dir="elsewhere")
    assert config.differences(other) == {"max_steps": (6000, 7000)}
    assert other.differences(config) == {}  # with a constant schedule a longer run has the same beginning
