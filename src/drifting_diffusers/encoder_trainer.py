"""The trainer of feature encoders: random crops, masks, reconstructions, and in the end classes (arXiv 2602.04770, A.3)."""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.trainer_callback import TrainerCallback

from .cards import RESULTS, SAMPLES, evaluation_results, save_marked
from .config import EncoderConfig
from .data import LabelledImages, RealSamples
from .encoder_draws import EncoderBatch, EncoderDraws
from .encoders import MaskedAutoencoder
from .extractors import digest
from .files import write_text
from .image_streams import ImageStream, TrainingStream
from .loop import COUNTS, TrainingLoop
from .losses import NonFinite
from .runs import RunFolder
from .services import repository_of, track_images
from .shapes import Float
from .sheets import reconstruction_sheet

LOOK = 100  # images at a time in an evaluation
SHOWN = 8  # images of a preview


class MaskedAutoencoderTrainer(TrainingLoop):
    """Trains a feature encoder to fill in what is masked, and in the last `classification_steps` to classify as well, on one process or many.

    A step is the same on any number of processes: each takes its share of the batch, and every random number belongs to an image; see `EncoderDraws`.

    In a run that does not classify, labels are not looked at, and the classifier has no gradient: as in the release, weight decay alone acts on it.

    Args:
        encoder: it is trained in place.
        train_dataset: images as a `datasets.Dataset`, with integer labels in a run that classifies; or samples that can be read by row, such as a
            `LatentCache`, which are taken as they are: random crops are made before a VAE encodes. Or images as an `IterableDataset`, pass after pass
            in the order in which they come, which should not be sorted by class.
        config: every other choice.
        size: (height, width) of the images that the encoder, or the vae, is given; the paper's are 256 x 256. A dataset of images needs it; samples
            that are read by row have their own.
        eval_dataset: held-out images or samples. Without it evaluations are of training images, which those of a stream cannot be.
        vae: for an encoder of latents. Images are encoded as they come, one latent drawn of each; of latents it decodes previews alone.
        callbacks: of transformers, instances or classes.

    Raises:
        ValueError: for a dataset, encoder, vae or output folder that does not fit, before any work.
    """

    config: EncoderConfig

    def __init__(
        self,
        encoder: MaskedAutoencoder,
        train_dataset: Dataset | IterableDataset | RealSamples,
        config: EncoderConfig,
        *,
        size: tuple[int, int] | None = None,
        eval_dataset: Dataset | RealSamples | None = None,
        vae: Any | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    ):
        super().__init__(config, callbacks)
        _check_config(config)
        _check_encoder(encoder)
        self.samples_per_step, self.vae = config.batch_size, vae
        if vae is not None:
            vae.to(self.accelerator.device).eval().requires_grad_(False)
        self._channels = encoder.config.in_channels if vae is None else vae.config.in_channels
        self._classes = encoder.config.num_classes if config.classification_steps else 0
        train_data, eval_data = self._data(train_dataset, eval_dataset, size)
        places, device = self._share("batch_size"), self.accelerator.device
        self.draws = EncoderDraws(train_data, eval_data, encoder, config, vae=vae, places=places, device=device)
        setup = {
            "encoder": {name: value for name, value in encoder.config.items() if not name.startswith("_")},
            "data": train_data.fingerprint() | {"size": train_data.size},
            "vae": digest(cast(Any, vae)) if self.draws.encodes else None,
            "classification_from": _classification_from(config) if self._classes else None,  # it is another step in a longer run
        }
        self.run = RunFolder(config, setup)
        self._prepare(encoder, [self.draws] if isinstance(train_data, TrainingStream) else [])

    def _data(
        self, train_dataset: Any, eval_dataset: Any, size: tuple[int, int] | None
    ) -> tuple[RealSamples | TrainingStream, RealSamples]:
        config = self.config
        if not isinstance(train_dataset, IterableDataset):
            train_data = self._as_samples(train_dataset, size, crop_area_min=config.crop_area_min)
            return train_data, train_data if eval_dataset is None else self._as_samples(eval_dataset, size)
        if eval_dataset is None:
            raise ValueError("a stream cannot be evaluated on, it passes by: give held-out images as eval_dataset, a datasets.Dataset")
        eval_data, images = self._as_samples(eval_dataset, size), ImageStream(train_dataset, **self._form(size))
        chance = {"seed": config.seed, "flip": config.random_flip, "crop_area_min": config.crop_area_min}
        return TrainingStream(images, batch_size=config.batch_size, **chance), eval_data

    def _as_samples(self, dataset: Any, size: tuple[int, int] | None, crop_area_min: float = 1.0) -> RealSamples:
        if isinstance(dataset, RealSamples):
            _check_samples(dataset, size, crop_area_min, self._classes)
            return dataset
        return LabelledImages(dataset, **self._form(size), complete=False, crop_area_min=crop_area_min)

    def _form(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """What images are read as."""
        if size is None:
            raise ValueError("size is missing: the encoder takes images of any, so say (height, width), as in size=(256, 256) of the paper")
        if self._channels not in (1, 3):
            raise ValueError(
                f"images have 1 or 3 channels, got in_channels={self._channels}: for an encoder of latents give the vae that makes them, or a LatentCache"
            )
        form: dict[str, Any] = {"size": size, "channels": self._channels, "num_classes": self._classes}
        return form | {"image_column": self.config.image_column, "label_column": self.config.label_column}

    @property
    def _plain(self) -> MaskedAutoencoder:
        """The network as it is trained, without what it is wrapped in."""
        return self.accelerator.unwrap_model(self.model)

    # -- learning

    def training_step(self) -> dict[str, Any]:
        """One update from the batch of this step."""
        if self.step == 0 and self.config.eval_steps:
            self._evaluate()  # what later ones are compared with
        then = time.monotonic()
        batch = self.draws.of_step(self.step)
        self._waited += time.monotonic() - then
        weight = classification_weight_at(self.step, self.config)
        pieces = batch.pieces(self.config.microbatch_size or len(batch))
        sums = torch.zeros(3, device=self.accelerator.device)
        for i, piece in enumerate(pieces):
            sync = contextlib.nullcontext() if i == len(pieces) - 1 else self.accelerator.no_sync(self.model)
            with sync:
                losses = self._losses(piece, weight)
                self.accelerator.backward(losses[0].sum() / len(batch))
            sums += torch.stack([each.detach().sum() for each in losses])
        loss, reconstruction, classification = (self._total(sums) / self.config.batch_size).tolist()
        if not np.isfinite(loss):  # of all processes, so that all do the same
            raise NonFinite(f"the loss is {loss}: reconstruction {reconstruction}, classification {classification}")
        outcome = {"loss": loss, "reconstruction_loss": reconstruction}
        if self._classes:
            outcome |= {"classification_loss": classification, "classification_weight": weight}
        return outcome | self._update(lambda: f"the loss is {loss}, so the backward pass overflowed")

    def _losses(self, batch: EncoderBatch, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of every image, its reconstruction's and its classification's.

        The classification loss is there with a weight of 0 too: all parameters must have a gradient where several processes share theirs.
        """
        device = self.accelerator.device
        images, masks, labels = self.draws.seen(batch), batch.masks.to(device), batch.labels.to(device)
        return self.model(images, masks, labels, weight, return_dict=False)[:3]

    def _scalars(self, outcome: dict[str, Any]) -> dict[str, float]:
        return {name: float(value) for name, value in outcome.items()}

    def _total(self, sums: Tensor) -> Tensor:
        """The sums over all processes."""
        return cast(Tensor, self.accelerator.reduce(sums, "sum")) if self.accelerator.num_processes > 1 else sums

    # -- looking

    def _begin(self) -> None:
        self.log_history = self.run.history()  # one that was killed before its first checkpoint has looked already
        if self.draws.eval_data is self.draws.train_data:
            self.accelerator.print("No eval_dataset: evaluations are of training images, so they do not see overfitting.")

    def _look(self, bar: tqdm | None = None) -> None:
        every = self.config.eval_steps
        due = every and (self.step % every == 0 or self.step == self.config.max_steps)
        if due or self.events.control.should_evaluate:
            found = self._evaluate()
            if bar is not None:
                bar.set_postfix_str(f"held-out reconstruction {found['reconstruction']:.4f}")

    def _restored(self) -> None:
        self._close()  # what was drawn ahead is of other steps
        self._look()  # it may have been killed between the checkpoint and this

    def _close(self) -> None:
        self.draws.close()

    def _end(self) -> dict[str, float]:
        return self._evaluate()

    def evaluate(self) -> dict[str, float]:
        """How well the averaged weights fill in held-out images, with always the same masks; see `MaskedAutoencoderOutput` for the unit.

        `reconstruction` is the loss; `reconstruction_flat` is what it would be if every masked position was filled with the mean of those that are seen of
        its image, and `accuracy`, in a run that classifies, the share of masked images whose class is found. The result is logged; a second call
        at the same step returns the logged one.
        """
        self._restore()
        return self._evaluate()

    def _evaluate(self) -> dict[str, float]:
        """`evaluate` of the weights at hand, without another look into the folder."""
        done = [entry for entry in self.log_history if entry["step"] == self.step and "reconstruction" in entry]
        if done:
            found = {name: value for name, value in done[-1].items() if name not in ("step", *COUNTS)}
        else:
            found = self._measure()
            self._on_main(self._preview)
            self._log(found)
        self.events.tell_evaluation(self.step, found)
        return found

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Every process looks at its share."""
        count, processes = len(self.draws.eval_rows), self.accelerator.num_processes
        share = -(-count // processes)
        first = share * self.accelerator.process_index
        sums = torch.zeros(3, device=self.accelerator.device)
        for i in range(first, min(first + share, count), LOOK):
            batch = self.draws.held_out(range(i, min(i + LOOK, first + share, count)))
            images, masks, labels = (self.draws.seen(batch), *(t.to(self.accelerator.device) for t in (batch.masks, batch.labels)))
            with self.accelerator.autocast():
                _, reconstruction, _, _, logits = self._averaged()(images, masks, labels, return_dict=False)
            right = (logits.argmax(1) == labels).float()
            sums += torch.stack([each.sum() for each in (reconstruction, self._flat(images, masks), right)])
        names = ("reconstruction", "reconstruction_flat", *(["accuracy"] if self._classes else []))
        return dict(zip(names, (self._total(sums) / count).tolist(), strict=False))

    def _flat(self, images: Tensor, masks: Tensor) -> Float[Tensor, " n"]:
        """The loss of filling in the mean of what is seen."""
        patched, total = self._plain.patchify(images), lambda t: t.sum((2, 3), keepdim=True)
        mean = total(patched * (1 - masks)) / (total(1 - masks) + 1e-8)
        return (masks * (patched - mean).square()).sum((1, 2, 3)) / (masks.sum((1, 2, 3)) + 1e-8)

    @torch.no_grad()
    def _preview(self) -> None:
        """A picture of what was masked and how it is filled in; of latents it takes a vae."""
        if self.vae is None and self.draws.form[0] not in (1, 3):
            return
        batch = self.draws.held_out(range(min(SHOWN, len(self.draws.eval_rows))))
        images, masks = self.draws.seen(batch), batch.masks.to(self.accelerator.device)
        mask = F.interpolate(masks, scale_factor=float(self._plain.config.input_patch_size))
        found = self._averaged()(images, masks).reconstruction.float()
        shown, filled = (self.draws.pictured(each) for each in (images, images * (1 - mask) + found * mask))
        page = reconstruction_sheet(shown, F.interpolate(mask.cpu(), size=shown.shape[2:]), filled)
        folder = self.run.path / "previews"
        folder.mkdir(exist_ok=True)
        page.save(folder / f"step-{self.step:06d}.png")
        track_images(self.accelerator, [page], self.step)

    # -- what is published

    def encoder(self, *, ema_decay: float | None = None) -> MaskedAutoencoder:
        """The averaged encoder. It shares its weights with the trainer: copy it before a cast.

        Args:
            ema_decay: one of the config's; the first if not given.
        """
        self._restore()
        return self._averaged(ema_decay)

    def save_model(self, output_dir: str | Path | None = None, *, ema_decay: float | None = None) -> Path:
        """Save the averaged encoder, into `encoder/` of the run if no folder is given, and return the folder."""
        encoder = self.encoder(ema_decay=ema_decay)
        folder = Path(output_dir) if output_dir else self.run.path / "encoder"
        self._on_main(lambda: encoder.save_pretrained(folder))
        return folder

    def _save_model(self, folder: Path) -> MaskedAutoencoder:
        """The encoder, with the numbers of the last evaluation and its picture for its card."""
        encoder = self._averaged()
        encoder.save_pretrained(folder)
        done = [
            {name: value for name, value in entry.items() if name not in COUNTS} for entry in self.log_history if "reconstruction" in entry
        ]
        if done:
            write_text(folder / RESULTS, json.dumps(evaluation_results(done[-1], **self.about), indent=2))
        for preview in sorted((self.run.path / "previews").glob("step-*.png"))[-1:]:
            with Image.open(preview) as picture:
                save_marked(picture, folder / SAMPLES)
        return encoder

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> Any:
        """Push the averaged encoder, with a card.

        Args:
            repo_id: `config.hub_model_id`, or the folder's name, if not given.
            **kwargs: as `MaskedAutoencoder.push_to_hub` takes them; private is `config.hub_private_repo` if not given.
        """
        encoder, name = self.encoder(), repo_id or repository_of(self.config)
        kwargs = ({"private": True} if self.config.hub_private_repo else {}) | kwargs
        return self._from_main(lambda: str(encoder.push_to_hub(name, **kwargs)))


def classification_weight_at(step: int, config: EncoderConfig) -> float:
    """The share of the classification loss in update `step`, counted from 0: it rises linearly from 0 where the last `classification_steps` begin."""
    done = step - _classification_from(config)
    if not config.classification_steps or done < 0:
        return 0.0
    rise = config.classification_warmup_steps
    return config.classification_weight * (min(1.0, done / rise) if rise else 1.0)


def _classification_from(config: EncoderConfig) -> int:
    return config.max_steps - config.classification_steps


def _check_config(config: EncoderConfig) -> None:
    if config.classification_steps and config.classification_warmup_steps > config.classification_steps:
        raise ValueError(
            f"classification_warmup_steps must be at most classification_steps, got {config.classification_warmup_steps} and "
            f"{config.classification_steps}: classification_weight would never be reached"
        )


def _check_encoder(encoder: MaskedAutoencoder) -> None:
    if encoder.dtype != torch.float32 or not any(p.requires_grad for p in encoder.parameters()):
        raise ValueError(f"the encoder must be trainable and in float32, got {encoder.dtype}; for 16 bits set mixed_precision")


def _check_samples(data: RealSamples, size: tuple[int, int] | None, crop_area_min: float, classes: int) -> None:
    if crop_area_min != 1:
        raise ValueError(
            f"crop_area_min must be 1 for samples that are read by row, got {crop_area_min}: they are taken as they are; crops are made of images, "
            "so give a datasets.Dataset, for an encoder of latents with a vae"
        )
    if size is not None and tuple(size) != tuple(data.size):
        raise ValueError(f"size must be that of the samples, {tuple(data.size)}, got {tuple(size)}: leave it out")
    if classes and not 0 <= data.labels.min() <= data.labels.max() < classes:
        raise ValueError(
            f"labels must lie in [0, {classes}) to be classified, got values from {data.labels.min()} to {data.labels.max()}: build the encoder with "
            f"num_classes={data.labels.max() + 1}, or set classification_steps=0"
        )
