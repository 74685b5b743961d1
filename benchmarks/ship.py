"""Pack a trained and measured quickstart as the model that comes with the package: weights, results, pictures, card. `make shipped` is the whole way.

    python benchmarks/ship.py outputs/shipped outputs/shipped/evaluation src/drifting_diffusers/shipped_models/fashion-mnist

The guidance scale that calls take by default is the one the evaluation found best. Numbers come from its results.json and nowhere else.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from drifting_diffusers import DriftingPipeline
from drifting_diffusers.cards import CURVES, README, RESULTS, SAMPLES, model_card, sample_sheet, save_marked

ABOUT = {"license": "apache-2.0", "dataset": "zalando-datasets/fashion_mnist"}  # the embedded 8,000 images are a part of it
HOW = (
    "sweep",
    "real",
    "real_samples",
    "sd",
    "better",
    "meaning",
    "extractor",
    "reference",
    "guidance_scale",
    "date",
    "versions",
    "python",
    "device",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="what examples/quickstart.py left")
    parser.add_argument("evaluation", type=Path, help="what drifting-diffusers evaluate left")
    parser.add_argument("target", type=Path, help="the folder of the shipped model")
    options = parser.parse_args()

    results = shipped_results(options.run, options.evaluation)
    pipeline = DriftingPipeline.from_pretrained(options.run / "pipeline")
    pipeline.register_to_config(guidance_scale=results["guidance_scale"])
    shutil.rmtree(options.target, ignore_errors=True)  # written by this program and nothing else; git keeps the former one
    pipeline.save_pretrained(options.target)
    (options.target / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    save_marked(sample_sheet(pipeline), options.target / SAMPLES)
    shutil.copy(options.run / CURVES, options.target / CURVES)
    name = options.target.name
    card = model_card(pipeline, results, repo_id=name, pictures=(SAMPLES, CURVES))
    (options.target / README).write_text(from_the_package(card, name), encoding="utf-8")
    size = sum(file.stat().st_size for file in options.target.rglob("*") if file.is_file())
    print(f"{options.target}: {size / 1e6:.1f} MB, guidance scale {results['guidance_scale']:g}")


def shipped_results(run: Path, evaluation: Path) -> dict[str, Any]:
    """The evaluation, with what the run says of its training."""
    trained, measured = (json.loads((folder / RESULTS).read_text(encoding="utf-8")) for folder in (run, evaluation))
    return {
        "metrics": measured["metrics"],
        **ABOUT,
        "training": {name: trained[name] for name in ("command", "training_images", "steps", "training_seconds", "seeds")},
        "evaluation": {"command": measured["command"], "samples": measured["num_samples"]},
        **{name: measured[name] for name in HOW},
    }


def from_the_package(card: str, name: str) -> str:
    """The card's snippet with the folder that comes along in the place of a repository; there is none to load generically."""
    generic = card.index("`DiffusionPipeline.from_pretrained(")
    precision = "It draws in float32 and bfloat16; in float16 its activations overflow."
    card = card[:generic] + precision + card[card.index("\n\n", generic) :]
    card = card.replace(f'from_pretrained("{name}")', f'from_pretrained(shipped_model("{name}"))')
    return card.replace("import DriftingPipeline\n", "import DriftingPipeline, shipped_model\n")


if __name__ == "__main__":
    main()
