"""What an encoder learns from in every step, and what it is evaluated on: images or latents, and what is masked of them.

Every image of a run has a number, its ticket: step x batch_size + place in the batch. The row it reads, its crop, mirroring, mask and the noise of its
latent are functions of (seed, ticket), so a step is the same on any number of processes. Of a stream ticket t is the t-th image that comes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from .config import EncoderConfig
from .data import LabelledImages, RealSamples
from .draws import random_stream
from .encoders import MaskedAutoencoder
from .image_streams import TrainingStream
from .shapes import Float, Int
from .sources import Ahead, TicketReader, Tickets

MASK, LATENT, HELD_OUT_MASK, HELD_OUT_LATENT = range(4)
"""What a stream of random numbers is for: the first part of its name."""

BLOCK = 32  # tickets whose random numbers are drawn together: with a generator each, masks would take as long as decoding
READ = 64  # images that a worker reads at a time
ENCODED = 32  # images that a VAE encodes at a time: it needs far more memory for each than the encoder


@dataclass(frozen=True)
class EncoderBatch:
    """Images and what chance decided of them, on the CPU.

    Attributes:
        samples: [n, c, h, w], images or latents.
        labels: [n]; all 0 in a run that does not classify.
        masks: [n, 1, y, x].
        noise: [n, k, y, x] of the latents of images that are encoded as they come, else none.
    """

    samples: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    masks: Float[Tensor, "n 1 _ _"]
    noise: Float[Tensor, "n k y x"] | None

    def __len__(self) -> int:
        return len(self.samples)

    def pieces(self, size: int) -> list["EncoderBatch"]:
        """The same in pieces of at most so many images."""
        parts = [slice(i, i + size) for i in range(0, len(self), size)]
        cut = lambda part: (self.samples[part], self.labels[part], self.masks[part], None if self.noise is None else self.noise[part])
        return [EncoderBatch(*cut(part)) for part in parts]


class EncoderDraws:
    """The batches of the steps, in order, each drawn while the step before runs, and the held-out ones.

    Args:
        train_data: images, or samples that are taken as they are, or a stream of images.
        eval_data: of the same form.
        encoder: whose masks are drawn.
        config: how many of what.
        vae: encodes images; decodes latents for pictures.
        places: of this process in a batch.
        device: of the training.

    Attributes:
        encodes: whether images become latents here.
        form: (channels, height, width) of what the encoder is given.

    Raises:
        ValueError: for samples that do not fit each other or the encoder.
        TypeError: for a vae that tells no posterior.
    """

    def __init__(
        self,
        train_data: RealSamples | TrainingStream,
        eval_data: RealSamples,
        encoder: MaskedAutoencoder,
        config: EncoderConfig,
        *,
        vae: Any | None,
        places: range,
        device: torch.device,
    ):
        self.train_data, self.eval_data, self.config, self.vae, self.places, self.device = (
            train_data,
            eval_data,
            config,
            vae,
            places,
            device,
        )
        self.encodes = vae is not None and isinstance(train_data, LabelledImages | TrainingStream)
        self.form = self._form(encoder)
        patch, ratio = encoder.config.input_patch_size, (config.mask_ratio_min, config.mask_ratio_max)
        self._mask = lambda rng: encoder.draw_mask(BLOCK, (self.form[1] // patch, self.form[2] // patch), generator=rng, ratio=ratio)
        self.eval_rows = np.random.default_rng(config.seed).permutation(len(eval_data))[: config.eval_samples].tolist()
        self._tickets = Tickets([], 0 if isinstance(train_data, TrainingStream) else len(train_data), seed=config.seed)
        self._ahead: Ahead[EncoderBatch] | None = None
        self._next = 0  # the step after the one that was asked for last

    def _form(self, encoder: MaskedAutoencoder) -> tuple[int, int, int]:
        form, other = ((data.channels, *data.size) for data in (self.train_data, self.eval_data))
        if form != other:
            raise ValueError(
                f"train_dataset and eval_dataset must have samples of one form, got {form} and {other}: take both from the same kind of source"
            )
        if self.encodes:
            channels, height, width = self._posterior(torch.zeros(1, *form)).mean.shape[1:]
            form = (channels, height, width)
        if form[0] != encoder.config.in_channels:
            raise ValueError(
                f"samples have {form[0]} channels and the encoder reads {encoder.config.in_channels}: build it with in_channels={form[0]}"
            )
        side = encoder.config.input_patch_size * encoder.config.mask_patch_size
        if form[1] % side or form[2] % side:
            raise ValueError(
                f"input_patch_size x mask_patch_size must divide both sides of what the encoder reads, got {side} for {form[1]} x {form[2]}: "
                "take another size, or build it with other patches"
            )
        return form

    # -- batches

    def of_step(self, step: int) -> EncoderBatch:
        """The batch of this step, its share of this process; that of the next is begun. Steps come in order."""
        if self._ahead is None:
            stream = self._read_from(step)
            self._ahead = Ahead(lambda step: self._draw(step, stream), self.config.max_steps)
        batch = self._ahead(step)
        self._next = step + 1
        return batch

    def close(self) -> None:
        """Wait for what is being drawn, and drop it; then any step may be asked for."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def tickets_of(self, step: int) -> range:
        """The tickets of this process in a step."""
        first = step * self.config.batch_size
        return range(first + self.places.start, first + self.places.stop)

    def state_dict(self) -> dict[str, Any]:
        """Where a stream is before the next step; rows have no state."""
        streamed = isinstance(self.train_data, TrainingStream)
        return {"step": self._next, "position": self.train_data.positions[self._next]} if streamed else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where a stream was."""
        self.close()
        if isinstance(self.train_data, TrainingStream):
            self._next = state["step"]
            self.train_data.positions = {self._next: state["position"]}

    def _read_from(self, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if isinstance(self.train_data, TrainingStream):
            return self.train_data.parts(step, self.places, READ, max(1, self.config.dataloader_num_workers))
        reader = TicketReader(self.train_data, self._tickets, flip=self.config.random_flip)
        parts = lambda tickets: (list(tickets[i : i + READ]) for i in range(0, len(tickets), READ))
        batches = (part for k in range(step, self.config.max_steps) for part in parts(self.tickets_of(k)))
        return iter(reader.batches(batches, self.config.dataloader_num_workers))

    def _draw(self, step: int, stream: Iterator[tuple[Tensor, Tensor, Tensor]]) -> EncoderBatch:
        tickets = self.tickets_of(step)
        parts = [next(stream) for _ in range(0, len(tickets), READ)]
        samples, labels = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        if self.device.type == "cuda":  # pinned memory is copied while a step runs
            samples = samples.pin_memory()
        return self._with_chance(samples, labels, tickets, MASK, LATENT)

    def held_out(self, places: range) -> EncoderBatch:
        """Images of an evaluation by their places in it, always the same, not cropped."""
        samples, labels = self.eval_data.gather([self.eval_rows[i] for i in places])
        return self._with_chance(samples, labels, places, HELD_OUT_MASK, HELD_OUT_LATENT)

    def _with_chance(self, samples: Tensor, labels: Tensor, tickets: range, mask: int, latent: int) -> EncoderBatch:
        stream = lambda name, block: random_stream(self.config.seed, name, block)
        masks = in_blocks(tickets, lambda block: self._mask(stream(mask, block)))
        normals = lambda block: torch.randn(BLOCK, *self.form, generator=stream(latent, block))
        labels = labels if self.config.classification_steps else torch.zeros_like(labels)
        return EncoderBatch(samples, labels, masks, in_blocks(tickets, normals) if self.encodes else None)

    # -- latents

    @torch.no_grad()
    def seen(self, batch: EncoderBatch) -> Float[Tensor, "n c h w"]:
        """What the encoder is given, on the device: samples as they are, or a latent of each image."""
        samples = batch.samples.to(self.device, non_blocking=True)
        if batch.noise is None:
            return samples
        posteriors, (scaling, shift) = [self._posterior(part) for part in samples.split(ENCODED)], self._scales()
        mean, std = torch.cat([posterior.mean for posterior in posteriors]), torch.cat([posterior.std for posterior in posteriors])
        return (mean + std * batch.noise.to(self.device) - shift) * scaling

    @torch.no_grad()
    def pictured(self, samples: Float[Tensor, "n c h w"]) -> Float[Tensor, "n _ _ _"]:
        """Images in [-1, 1] of what the encoder is given, on the CPU."""
        if self.vae is not None:
            scaling, shift = self._scales()
            unscaled = (samples / scaling + shift).to(self.vae.dtype)
            samples = torch.cat([self.vae.decode(one).sample for one in unscaled.split(1)])  # a decoder needs much memory
        return samples.float().clamp(-1, 1).cpu()

    @torch.no_grad()
    def _posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        found = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        if not isinstance(getattr(found, "latent_dist", None), DiagonalGaussianDistribution):
            raise TypeError(
                f"the vae must tell a normal posterior, `encode(images).latent_dist`, as AutoencoderKL does; got {type(self.vae).__name__}"
            )
        return DiagonalGaussianDistribution(found.latent_dist.parameters.float())  # the rest in float32

    def _scales(self) -> tuple[float, float]:
        """Scaling and shift: z = (latent - shift) * scaling."""
        return float(self.vae.config.get("scaling_factor") or 1.0), float(self.vae.config.get("shift_factor") or 0.0)


def in_blocks(tickets: range, draw: Callable[[int], Tensor]) -> Tensor:
    """One row for each of consecutive tickets, cut from blocks of rows: what a ticket is given does not depend on who asks for which others.

    Args:
        tickets: at least one.
        draw: the rows of a block, from its number; ticket t is row t % BLOCK of block t // BLOCK.
    """
    first, last = tickets[0] // BLOCK, tickets[-1] // BLOCK
    drawn = torch.cat([draw(block) for block in range(first, last + 1)])
    return drawn[tickets[0] - first * BLOCK :][: len(tickets)]
