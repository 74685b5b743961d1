"""`drifting-diffusers evaluate`: how far a pipeline's samples, or images in a folder, are from real images."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..shipped import find_pipeline
from .convert import DTYPES
from .pipelines import HELP, hub_errors, located

DESCRIPTION = """\
Measure a pipeline (a folder, a Hub repository or a name that comes along) or images (a folder or parquet files) against the real images of
a dataset. Writes results.json, a class grid, the nearest training images and, for several guidance scales, their curves. What was
stopped goes on where it was; with torchrun or accelerate several processes share the work and give the same numbers.
"""

EXAMPLES = """\
examples:
  drifting-diffusers evaluate fashion-mnist --dataset examples/data/fashion_mnist --held-out-split test --extractor pixels --judge \
      --num-samples 2000 --output outputs/evaluation
  drifting-diffusers evaluate outputs/quickstart/pipeline --dataset zalando-datasets/fashion_mnist --held-out-split test \\
      --extractor lite0 --num-samples 10000 --output outputs/lite0
  drifting-diffusers evaluate user/drifting-L --dataset ILSVRC/imagenet-1k --extractor inception --weights inception.pth \\
      --guidance-scales 1.0 1.1 1.5 --seeds 0 1 2 --device cuda --dtype bfloat16 --output outputs/imagenet
  drifting-diffusers evaluate user/drifting-L --reference VIRTUAL_imagenet256_labeled.npz --weights inception.pth --output outputs/adm

extractors: inception (the FID), lite0, dinov2, convnextv2, pixels, or any vision model of transformers.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("pipeline", metavar="PIPELINE", help=f"{HELP}; or images: a folder or parquet files")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for results, pictures and what is kept of features")
    real = parser.add_argument_group("real images")
    real.add_argument("--dataset", metavar="NAME", help="a dataset of the Hub, a folder, or parquet files")
    real.add_argument("--split", default="train", help="the reference (default: train)")
    real.add_argument("--held-out-split", metavar="SPLIT", help="other real images: their numbers stand beside the generated ones")
    real.add_argument("--image-column", default="image", metavar="NAME", help="column of images (default: image)")
    real.add_argument("--label-column", default="label", metavar="NAME", help="column of integer labels (default: label)")
    real.add_argument(
        "--reference", type=Path, metavar="FILE", help="in place of --dataset: .npz with mu and sigma, or .safetensors of ours"
    )
    real.add_argument("--reference-cache", type=Path, metavar="FOLDER", help="where references are kept (default: the Hub's assets folder)")
    look = parser.add_argument_group("what looks")
    look.add_argument("--extractor", default="inception", metavar="NAME", help="see below (default: inception)")
    look.add_argument("--weights", metavar="FILE", help="of the extractor")
    look.add_argument("--metrics", nargs="+", default=(), metavar="NAME", help="default: all that are possible")
    look.add_argument(
        "--judge", action="store_true", help="train a small classifier of the dataset: for accuracy, where the extractor has none"
    )
    draw = parser.add_argument_group("what is drawn")
    draw.add_argument("--num-samples", type=int, default=50_000, metavar="N", help="per scale and seed (default: 50000)")
    draw.add_argument("--guidance-scales", type=float, nargs="+", default=(), metavar="ALPHA", help="default: the pipeline's own")
    draw.add_argument("--seeds", type=int, nargs="+", default=(0,), metavar="SEED", help="each gives samples of its own (default: 0)")
    draw.add_argument("--batch-size", type=int, default=100, metavar="N", help="images in one network call (default: 100)")
    draw.add_argument("--device", help="as torch names it (default: what Accelerate finds)")
    draw.add_argument("--dtype", choices=DTYPES, default="float32", help="of the pipeline's weights (default: float32)")


def run(options: argparse.Namespace) -> None:
    """Evaluate, and write results and pictures."""
    import torch

    from ..extractors import load_extractor
    from ..protocol import Bench
    from ..reference import make_reference
    from ..sampling import DatasetSamples, processes

    if (options.dataset is None) == (options.reference is None):
        raise ValueError("give the real images as --dataset or as --reference, one of them")
    state = processes()
    device = torch.device(options.device) if options.device else state.device
    generated = _generated(options, device)
    size, channels, classes = _form(generated)
    real = {
        split: _real(options, split, size, channels, classes)
        for split in (options.split, options.held_out_split)
        if options.dataset and split
    }
    extractor = load_extractor(options.extractor, weights=options.weights, device=device)
    training = DatasetSamples(real[options.split], labelled=bool(classes)) if real else None
    if training is not None:
        reference = make_reference(training, extractor, cache=options.reference_cache, batch_size=options.batch_size, state=state)
    else:
        reference = _read_reference(options.reference, extractor)
    bench = Bench(
        reference,
        extractor,
        tuple(options.metrics),
        judge=_judge(options, real[options.split], state) if options.judge and real else None,
        judged_by_extractor=extractor.imagenet_logits and classes == 1000,
        folder=options.output,
        batch_size=options.batch_size,
        state=state,
    )
    if options.held_out_split and real:
        held_out = bench.see(DatasetSamples(real[options.held_out_split], labelled=bool(classes)), f"real-{options.held_out_split}")
        bench = replace(bench, held_out=held_out)
    _report(options, generated, bench, training)


def _report(options: argparse.Namespace, generated: Any, bench: Any, training: Any) -> None:
    """Measure, and let one process write it down."""
    from ..protocol import evaluate_images, evaluate_pipeline, table, write_results
    from ..sampling import DatasetSamples, PipelineSamples

    about = {"measured": options.pipeline, "dataset": options.dataset, "split": options.split if options.dataset else None}
    sweep = {"num_samples": options.num_samples, "guidance_scales": options.guidance_scales, "seeds": options.seeds}
    if isinstance(generated, DatasetSamples):
        results, shown = evaluate_images(generated, bench, about=about), generated
    else:
        results = evaluate_pipeline(generated, bench, about=about, **sweep)
        shown = PipelineSamples(generated, options.num_samples, seed=options.seeds[0], guidance_scale=results["guidance_scale"])
    name = f"guidance-{shown.guidance_scale:g}-seed-{shown.seed}" if isinstance(shown, PipelineSamples) else "images"
    seen = bench.see(shown, name)  # on every process: the shards are there, and all of them wait for each other
    if not bench.state.is_main_process:
        return
    write_results(results, options.output / "results.json")
    _draw(options.output, results, bench, (shown, seen), training)
    print(table(results))
    print(f"\n{options.output}: results.json, {', '.join(sorted(path.name for path in options.output.glob('*.png')))}")


def _generated(options: argparse.Namespace, device: Any) -> Any:
    """A pipeline on its device, or the images of a folder or of parquet files."""
    import torch
    from datasets import Dataset

    from ..data import open_images
    from ..pipeline import DriftingPipeline

    path = Path(find_pipeline(options.pipeline))
    if path.exists() and not (path / "model_index.json").exists():
        images = open_images(options.pipeline, "train")
        assert isinstance(images, Dataset)
        return _samples(images, options)
    source = located(options.pipeline)
    with hub_errors(source):
        pipeline = DriftingPipeline.from_pretrained(source, dtype=getattr(torch, options.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _samples(images: Any, options: argparse.Namespace) -> Any:
    """Images that were made elsewhere, at the size of the first."""
    import numpy as np

    from ..data import LabelledImages
    from ..sampling import DatasetSamples

    labelled = options.label_column in images.column_names
    first = images[0][options.image_column]
    data = LabelledImages(
        images,
        size=(first.height, first.width),
        channels=1 if first.mode in ("1", "L") else 3,
        num_classes=int(np.max(images[options.label_column])) + 1 if labelled else 0,
        image_column=options.image_column,
        label_column=options.label_column,
    )
    return DatasetSamples(data, labelled=labelled)


def _form(generated: Any) -> tuple[tuple[int, int], int, int]:
    """Size, channels and number of classes of the samples."""
    from ..sampling import DatasetSamples, PipelineSamples

    if isinstance(generated, DatasetSamples):
        return generated.data.size, generated.data.channels, int(generated.labels.max()) + 1 if generated.labels is not None else 0
    first = PipelineSamples(generated, 1).images([0])
    return (first.shape[2], first.shape[3]), first.shape[1], generated.transformer.config.num_classes


def _real(options: argparse.Namespace, split: str, size: tuple[int, int], channels: int, classes: int) -> Any:
    from ..data import LabelledImages, open_images

    images = open_images(options.dataset, split)
    return LabelledImages(
        images, size=size, channels=channels, num_classes=classes, image_column=options.image_column, label_column=options.label_column
    )


def _read_reference(file: Path, extractor: Any) -> Any:
    from ..reference import read_npz, read_reference

    return read_npz(file, extractor) if file.suffix == ".npz" else read_reference(file, {"extractor": extractor.describe()})


def _judge(options: argparse.Namespace, real: Any, state: Any) -> Any:
    from ..classifiers import kept_classifier

    if max(real.size) > 64:
        raise ValueError(
            f"a small judge is for images of up to 64 pixels, got {real.size}: take an extractor with a classifier of these classes"
        )
    file = options.output / f"judge-{real.dataset._fingerprint}.safetensors"
    read = lambda: real.gather(list(range(len(real))))
    with state.main_process_first():
        return kept_classifier(file, read, channels=real.channels, num_classes=int(real.labels.max()) + 1)


def _draw(folder: Path, results: dict[str, Any], bench: Any, shown: tuple[Any, Any], training: Any) -> None:
    from ..sampling import PipelineSamples
    from ..sheets import class_grid, memorisation_sheet, sweep_plot

    names = shown[0].pipeline.labels if isinstance(shown[0], PipelineSamples) else []
    class_grid(shown[0], names).save(folder / "class_grid.png")
    if len(results["sweep"]) > 1:
        sweep_plot(results, folder / "guidance_sweep.png")
    if training is not None:
        memorisation_sheet(shown, (training, bench.reference), bench.held_out).save(folder / "memorisation.png")
