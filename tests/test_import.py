"""Importing is free: the package loads nothing, the field loads torch and nothing of Hugging Face."""

import json
import subprocess
import sys

import pytest

import drifting_diffusers

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "datasets", "huggingface_hub", "safetensors", "PIL", "jaxtyping", "matplotlib")


def fresh(statement: str) -> dict:
    """What a new interpreter has loaded after a statement, and the processor time that took."""
    code = (
        f"import json, sys, time\nstart = time.process_time()\n{statement}\n"
        f"print(json.dumps({{'seconds': time.process_time() - start, 'loaded': [m for m in {HEAVY!r} if m in sys.modules]}}))"
    )
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_importing_the_package_loads_nothing():
    seen = fresh("import drifting_diffusers")
    assert seen["loaded"] == []
    assert seen["seconds"] < 0.3  # processor time, not wall time; measured 0.003


@pytest.mark.parametrize(
    "statement",
    [
        "from drifting_diffusers.fields import DriftingField",
        "from drifting_diffusers import DriftingField, drift_loss",
        "from drifting_diffusers.guidance import draw_guidance",
    ],
)
def test_the_ground_floor_loads_torch_and_nothing_else(statement):
    assert fresh(statement)["loaded"] == ["torch"]


def test_an_unknown_name_says_which_names_there_are():
    with pytest.raises(AttributeError, match=r"'DriftField'; its public names are .*DriftingField"):
        drifting_diffusers.DriftField  # noqa: B018


def test_public_names_are_a_snapshot():
    assert dir(drifting_diffusers) == [
        "BackboneFeatures",
        "Bench",
        "ConvNextV2Features",
        "Drift",
        "DriftingConfig",
        "DriftingField",
        "DriftingGenerator",
        "DriftingObjective",
        "DriftingPipeline",
        "DriftingTrainer",
        "EncoderConfig",
        "LatentCache",
        "MaskedAutoencoder",
        "MaskedAutoencoderTrainer",
        "MultiScaleStatistics",
        "Pixels",
        "SampleBank",
        "Windows",
        "__version__",
        "add_lora",
        "cache_latents",
        "drift_loss",
        "evaluate_pipeline",
        "load_extractor",
        "load_features",
        "merge_lora",
        "shipped_model",
        "with_classes",
    ]
