r"""What is looked at while a model trains: distances to held-out images, pictures, curves, and the best weights so far.

The loss of a drifting model is flat by construction, so these are the only signs of progress.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL.Image import Image
from torch import Tensor

from .data import RealSamples
from .evaluation import compare
from .files import write_folder
from .meters import FeatureSet, Reference, measure, moments_of, possible
from .runs import RunFolder
from .shapes import Float, Int
from .sheets import training_curves

SKIPPED = ("energy_per_class", "spread", "memorisation")  # the first two are `compare`'s, the last needs the whole training set


class Watcher:
    """Looks at the samples of one run.

    Half of the held-out images of a class are the reference, the other half the control, and as many are generated as the control has.

    Args:
        run: the folder of the run.
        data: held-out samples, at least 4 per class.
        decode: latents [n, c, h, w] to images, for pictures and extractors; none for samples that are images.
        extractor: distances are taken in its features, and its other metrics are added where there are samples enough; pixels without one.
        compute_metrics: further numbers, from images [n, c, h, w] in [-1, 1] and their labels [n].

    Raises:
        ValueError: for classes with fewer than 4 images.
    """

    def __init__(
        self,
        run: RunFolder,
        data: RealSamples,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        extractor: Any | None = None,
        compute_metrics: Callable[[Tensor, Tensor], dict[str, float]] | None = None,
    ):
        self.run, self.data, self.extractor, self.compute_metrics = run, data, extractor, compute_metrics
        self.decode = decode or (lambda samples: samples)
        labels, counts = np.unique(data.labels, return_counts=True)
        scarce = labels[counts < 4].tolist()  # half of a class is the reference, half the control, and a spread needs two
        if scarce:
            raise ValueError(
                f"classes {scarce} have fewer than 4 images to evaluate with; hold out more of them, or pass another eval_dataset"
            )

    def wanted(self) -> Int[Tensor, " n"]:
        """The labels of the samples that `numbers` takes."""
        labels = torch.as_tensor(np.concatenate([self.data.labels[rows] for rows in self.data.rows_per_class(self._each)]))
        return labels[halves(labels)[1]]

    @property
    def _each(self) -> int:
        return 2 * self.run.config.eval_samples_per_class

    def numbers(self, generated: Float[Tensor, "n c h w"]) -> dict[str, float]:
        """Distances of generated to held-out samples beside those of real ones; see `compare` and `meters.METRICS`."""
        images, labels = self.data.per_class(self._each)
        reference, control = halves(labels)
        wanted = labels[control]
        drawn, known, other = (
            self._see(x, y) for x, y in ((generated, wanted), (images[reference], labels[reference]), (images[control], wanted))
        )
        pairs = [(seen.features, cast(Tensor, seen.labels)) for seen in (drawn, known, other)]
        found = compare(*pairs) | self._more(drawn, known, other)
        extra = {name: float(value) for name, value in self.compute_metrics(generated, wanted).items()} if self.compute_metrics else {}
        clash = extra.keys() & {*found, "step"}
        if clash:
            raise ValueError(f"compute_metrics returned {sorted(clash)}, which are the trainer's own names; choose others")
        return found | extra

    def _see(self, images: Tensor, labels: Tensor) -> FeatureSet:
        if self.extractor is None:
            return FeatureSet(images.flatten(1), labels)
        parts = [self.extractor(self.decode(part))["features"].float().cpu() for part in images.split(100)]
        return FeatureSet(torch.cat(parts), labels)

    def _more(self, drawn: FeatureSet, known: FeatureSet, other: FeatureSet) -> dict[str, float]:
        """What else this extractor can say of so few samples, of generated and of real ones."""
        if self.extractor is None:
            return {}
        reference = Reference(moments_of(known.features), known, {})
        names = [name for name in possible(drawn, reference, self.extractor, None) if name not in (*SKIPPED, "energy")]
        look = lambda seen: measure(seen, reference, extractor=self.extractor, metrics=names)
        return look(drawn) | {f"{name}_real": value for name, value in look(other).items()}

    def preview(self, samples: Float[Tensor, "n c h w"], step: int) -> list[Image]:
        """A grid with the samples of a class, 4 of each side by side in `samples`, in one column; returns its pictures, row by row."""
        ordered = samples.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)
        images = cast(list[Image], VaeImageProcessor().postprocess(self.decode(ordered), output_type="pil"))
        folder = self.run.path / "previews"
        folder.mkdir(exist_ok=True)
        make_image_grid(images, rows=4, cols=len(images) // 4).save(folder / f"step-{step:06d}.png")
        return images

    def curves(self, history: list[dict[str, Any]]) -> None:
        """`curves.png` of the run, where matplotlib is there to draw it."""
        if importlib.util.find_spec("matplotlib") is not None:
            training_curves(history, self.run.path / "curves.png")

    # -- the best weights

    @property
    def best_folder(self) -> Path:
        return self.run.path / "best"

    def best(self) -> dict[str, Any] | None:
        """Step, metric and value of the best weights, or None before the first evaluation."""
        file = self.best_folder / "best.json"
        return json.loads(file.read_text()) if file.exists() else None

    def keep_if_best(self, step: int, found: dict[str, float], pipeline: Any) -> bool:
        """Save the pipeline in `best/` if no evaluation was better.

        Raises:
            ValueError: if the evaluation has no such metric.
        """
        metric, sign = self.run.config.metric_for_best_model, -1 if self.run.config.greater_is_better else 1
        if metric not in found:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(found)}, got {metric!r}")
        best = self.best()
        if best is not None and best["metric"] == metric and sign * best["value"] <= sign * found[metric]:
            return False

        def fill(folder: Path) -> None:
            pipeline.save_pretrained(folder)
            (folder / "best.json").write_text(json.dumps({"step": step, "metric": metric, "value": found[metric]}))

        write_folder(self.best_folder, fill)
        return True

    def forget_after(self, step: int) -> None:
        """Drop best weights of a step that a killed run took beyond its last checkpoint: it is about to be taken again."""
        best = self.best()
        if best is not None and best["step"] > step:
            shutil.rmtree(self.best_folder)


def halves(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each class's samples, the first half and the second: which are the reference and which the control."""
    sizes = labels.unique_consecutive(return_counts=True)[1]
    places = torch.cat([torch.arange(n) for n in sizes.tolist()])
    reference = places < (sizes // 2).repeat_interleave(sizes)
    return reference, ~reference
