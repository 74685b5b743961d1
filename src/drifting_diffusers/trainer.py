"""The trainer conducts: order, devices, checkpoints, logs, previews. Every formula lives elsewhere."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .bank import SampleBank
from .config import DriftingConfig, learning_rate_at
from .data import LabelledImages, ShuffledOrder, label_names
from .generator import DriftingGenerator
from .guidance import draw_guidance, unconditional_weight
from .objective import DriftingObjective
from .pipeline import DriftingPipeline
from .runs import RunFolder
from .watching import Watcher

LOSS_NOTICE = (
    "The loss of a drifting model is flat by construction (every force is divided by its own size), so it is not shown as progress. "
    "Watch the energy distance to held-out images and the strengths in log.jsonl."
)
FILL, PUSH, STEP, EVAL = range(4)  # what a stream of random numbers is for: the first half of its seed


class DriftingTrainer:
    """Trains a generator by drifting (arXiv 2602.04770, Algorithm 1) in one process, on the device that Accelerate chooses.

    Everything random in step k is a function of (seed, k), so a resumed run is the run that never stopped.

    Args:
        generator: the generator; it is trained in place.
        objective: features and field.
        train_dataset: a map-style `datasets.Dataset` with images and integer labels; images are brought to the generator's size and channels.
        config: every other choice.
        eval_dataset: held-out images of the same columns, at least 4 per class. Without it distances are to training images.
        extractor: what evaluations look through, as `load_extractor` makes it; pixels if not given.
        compute_metrics: further numbers of an evaluation, from its images [n, c, h, w] in [-1, 1] and their labels [n].

    Raises:
        ValueError: for a dataset, generator or output folder that does not fit, before any work.
    """

    def __init__(
        self,
        generator: DriftingGenerator,
        objective: DriftingObjective,
        train_dataset: Dataset,
        config: DriftingConfig,
        *,
        eval_dataset: Dataset | None = None,
        extractor: Any | None = None,
        compute_metrics: Callable[[Tensor, Tensor], dict[str, float]] | None = None,
    ):
        self.config, self.objective = config, objective
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        if self.accelerator.num_processes > 1:
            raise ValueError(f"this trainer runs in one process, got {self.accelerator.num_processes}; start it with plain `python`")
        if bool(config.unconditional_per_label) != generator.config.guidance_embedding:
            raise ValueError(
                f"guidance is learned from unconditional samples: unconditional_per_label={config.unconditional_per_label} and a generator "
                f"with guidance_embedding={generator.config.guidance_embedding} do not go together; set both or neither"
            )
        _check_generator(generator)
        self._model_config = generator.config
        self.train_data = self._images(generator, train_dataset)
        self.eval_data = self.train_data if eval_dataset is None else self._images(generator, eval_dataset)
        names = [
            label_names(d, config.label_column) if generator.config.num_classes else None
            for d in (train_dataset, eval_dataset or train_dataset)
        ]
        if names[0] != names[1]:
            raise ValueError(f"train_dataset and eval_dataset must have the same classes in the same order, got {names[0]} and {names[1]}")
        self.labels = names[0]
        objective.freeze(self.accelerator.device)
        self.run = RunFolder(config, {"generator": _shape_of(generator), **objective.describe(), "data": self.train_data.fingerprint()})
        self.watcher = Watcher(self.run, self.eval_data, extractor=extractor, compute_metrics=compute_metrics)
        if config.gradient_checkpointing:
            generator.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(
            generator.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,  # one pass over the parameters
        )
        self.generator, self.optimizer = self.accelerator.prepare(generator, optimizer)
        # Not prepared: Accelerate would step it once per process.
        self.schedule = LambdaLR(optimizer, lambda step: learning_rate_at(step, config) / config.learning_rate)
        # Not diffusers' EMAModel: that one ramps its decay and needs many times 1/(1 - decay) steps.
        self.ema = AveragedModel(self.accelerator.unwrap_model(self.generator), multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.ema.n_averaged.fill_(1)  # the initial weights count, as in the release; at 0 the first update would copy
        self._ignore_constant_features()
        stored = tuple(self._stored(self.train_data[0][0][None]).shape[1:])
        bank = lambda classes, size: SampleBank(classes, size, stored, device=self.accelerator.device)
        self.bank = bank(generator.config.num_classes or 1, config.bank_size)
        self.unconditional_bank = bank(1, config.unconditional_bank_size) if config.unconditional_per_label else None
        self.accelerator.register_for_checkpointing(*filter(None, (self.schedule, self.ema, self.bank, self.unconditional_bank)))
        self.pipeline()  # what could not be saved in the end is refused now
        self.step = 0
        self.seconds = 0.0  # of training, evaluations and checkpoints included, before and after every resume
        self.log_history: list[dict[str, Any]] = []

    def _images(self, generator: DriftingGenerator, dataset: Dataset) -> LabelledImages:
        return LabelledImages(
            dataset,
            size=(generator.sample_height, generator.sample_width),
            channels=generator.config.in_channels,
            num_classes=generator.config.num_classes,
            image_column=self.config.image_column,
            label_column=self.config.label_column,
        )

    # -- learning

    def train(self) -> dict[str, float]:
        """Train to `config.max_steps`, from the newest checkpoint in the output folder if there is one, and return the last evaluation."""
        self._restore()
        if self.step == 0:
            self.run.forget_after(0)  # of a run that was killed before its first checkpoint
            self._fill_banks()
        self.accelerator.print(LOSS_NOTICE)
        if self.eval_data is self.train_data:
            self.accelerator.print("No eval_dataset: distances are to training images, so they do not see memorisation.")
        batches = iter(self._batches())
        started = time.monotonic() - self.seconds
        with tqdm(total=self.config.max_steps, initial=self.step, desc="training", unit="step", dynamic_ncols=True) as bar:
            while self.step < self.config.max_steps:
                outcome = self.training_step(*next(batches))
                self.seconds = time.monotonic() - started
                bar.update()
                self._after_step(outcome, bar)
        return self._evaluate()

    def training_step(self, fresh: Tensor, fresh_labels: Tensor) -> dict[str, Any]:
        """One step of Algorithm 1: fresh images into the banks, samples drawn and generated, the loss, one update."""
        config, rng = self.config, self._rng(STEP, self.step)
        self._push(fresh, fresh_labels, self._rng(PUSH, self.step))
        labels, guidance = self._draw_labels(rng), self._draw_guidance(rng)
        positives = self.bank.draw(labels, config.positives_per_label, generator=rng)
        negatives, weights = self._draw_negatives(guidance, rng)
        generated = self._generate(labels, guidance, rng)
        loss, measured = self.objective(generated, positives, negatives, weights)
        self.accelerator.backward(loss)
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.generator.parameters(), config.max_grad_norm))
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of step {self.step} is not finite (norm {float(norm)}): a feature divides by zero or takes a root at 0, or the "
                f"learning rate is too high for this objective (a lower one is another run: choose a new output_dir). "
                f"Sound checkpoints of steps {list(self.run.checkpoints())} are in {self.run.path}"
            )
        learning_rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.accelerator.unwrap_model(self.generator))
        self.step += 1
        return {"learning_rate": learning_rate, "grad_norm": norm, "loss": loss.detach(), "features": measured}

    def _generate(self, labels: Tensor, guidance: Tensor, rng: torch.Generator) -> Tensor:
        """[labels, generated_per_label, c, h, w], with gradient."""
        each, device = self.config.generated_per_label, self.accelerator.device
        inputs = self._inputs(labels.repeat_interleave(each), rng)
        scale = guidance.repeat_interleave(each).to(device) if self._model_config.guidance_embedding else 1.0
        return self.generator(**inputs, guidance_scale=scale).sample.unflatten(0, (len(labels), each))

    def _inputs(self, labels: Tensor, rng: torch.Generator) -> dict[str, Tensor | None]:
        """Noise and style labels for these class labels, on the device."""
        model, device = self._model_config, self.accelerator.device
        noise = torch.randn(len(labels), model.in_channels, *self.train_data.size, generator=rng)
        styles = (
            torch.randint(model.style_codebook_size, (len(labels), model.num_style_tokens), generator=rng)
            if model.num_style_tokens
            else None
        )
        return {
            "noise": noise.to(device),
            "class_labels": labels.to(device) if model.num_classes else None,
            "style_labels": None if styles is None else styles.to(device),
        }

    def _draw_labels(self, rng: torch.Generator) -> Tensor:
        """Distinct classes; where a step wants more than there are, whole rounds of all of them first."""
        classes, wanted = self._model_config.num_classes or 1, self.config.labels_per_step
        rounds = [torch.randperm(classes, generator=rng) for _ in range(-(-wanted // classes))]
        return torch.cat(rounds)[:wanted]

    def _draw_guidance(self, rng: torch.Generator) -> Tensor:
        config = self.config
        return draw_guidance(
            config.labels_per_step,
            generator=rng,
            high=config.guidance_max if config.unconditional_per_label else 1.0,
            power=config.guidance_power,
            unguided_share=config.unguided_share,
        )

    def _draw_negatives(self, guidance: Tensor, rng: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """Unconditional negatives per label and the mass of each."""
        each = self.config.unconditional_per_label
        if self.unconditional_bank is None:
            return None, None
        negatives = self.unconditional_bank.draw(torch.zeros(len(guidance), dtype=torch.long), each, generator=rng)
        return negatives, unconditional_weight(guidance, self.config.generated_per_label, each).to(self.accelerator.device)

    # -- real images

    def _batches(self) -> DataLoader:
        """The fresh images of every step from this one on."""
        order = ShuffledOrder(len(self.train_data), self.config.push_per_step, seed=self.config.seed, position=self.step)
        return DataLoader(self.train_data, batch_sampler=order, num_workers=self.config.dataloader_num_workers)  # pyright: ignore[reportArgumentType]

    def _fill_banks(self) -> None:
        config, chunk = self.config, 1000
        starters = self.train_data.starters(config.bank_size, seed=config.seed)
        for first in tqdm(range(0, len(starters), chunk), desc="filling the bank", unit="thousand images", leave=False, dynamic_ncols=True):
            self._push(*self.train_data.gather(starters[first : first + chunk]), self._rng(FILL, first))

    def _push(self, images: Tensor, labels: Tensor, rng: torch.Generator) -> None:
        if self.config.random_flip:
            mirrored = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        samples = self._stored(images)
        self.bank.push(samples, labels)
        if self.unconditional_bank is not None:
            self.unconditional_bank.push(samples, torch.zeros_like(labels))

    def _stored(self, images: Tensor) -> Tensor:
        """What a bank keeps of images."""
        images = images.to(self.accelerator.device)
        return self.objective.pack(images) if self.config.cache_features else images

    def _ignore_constant_features(self) -> None:
        some = self.train_data.starters(1 + 255 // len(np.unique(self.train_data.labels)), seed=self.config.seed)[:256]
        constant = self.objective.ignore_constant(self.train_data.gather(some)[0].to(self.accelerator.device))
        if constant:
            self.accelerator.print(f"These features are the same for every image and are left out of the loss: {constant}")

    def _rng(self, *stream: int) -> torch.Generator:
        """Random numbers of their own for every purpose and step."""
        seed = np.random.SeedSequence((self.config.seed, *stream)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed) >> 1)

    # -- checkpoints and logs

    def _after_step(self, outcome: dict[str, Any], bar: tqdm) -> None:
        config, last = self.config, self.step == self.config.max_steps
        if self.step % config.logging_steps == 0 or last:
            self._log(_scalars(outcome))
        if self.step % config.save_steps == 0 or last:  # before anything that a user's code may break
            self.run.save_checkpoint(self.step, self._save_state)
        found = self._look()
        if found:
            bar.set_postfix_str(f"energy {found['energy']:.2f} (real {found['energy_real']:.2f})")

    def _look(self) -> dict[str, float] | None:
        """The evaluation and preview that are due at this step."""
        due = lambda every: every and (self.step % every == 0 or self.step == self.config.max_steps)
        if due(self.config.preview_steps):
            self.watcher.preview(lambda labels: self.generate(labels, rng=self._rng(EVAL, 1)), self._model_config.num_classes, self.step)
        if not due(self.config.eval_steps):
            return None
        found = self._evaluate()
        self.watcher.keep_if_best(self.step, found, self.pipeline())
        return found

    def _log(self, entry: dict[str, float]) -> None:
        entry = {"step": self.step, **entry}
        self.log_history.append(entry)
        self.run.log(entry)

    def _save_state(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        (folder / "trainer_state.json").write_text(json.dumps({"step": self.step, "seconds": self.seconds}))

    def _restore(self) -> None:
        """Claim the folder, and load its newest checkpoint if that is ahead of what this trainer holds."""
        self.run.claim()
        newest, folder = max(self.run.checkpoints().items(), default=(0, self.run.path))
        if newest <= self.step:
            return
        try:
            self.accelerator.load_state(str(folder))
            self.seconds = json.loads((folder / "trainer_state.json").read_text())["seconds"]
        except Exception as error:
            raise RuntimeError(
                f"the checkpoint {folder} cannot be read ({error}); remove this folder to go on from the one before"
            ) from error
        self.step = newest
        self.run.forget_after(self.step)
        self.watcher.forget_after(self.step)
        self.log_history = self.run.history()
        self.accelerator.print(f"Resuming from {folder}")
        self._look()  # it may have been killed between the checkpoint and these

    # -- drawing

    def pipeline(self, vae: Any = None, *, best: bool = False) -> DriftingPipeline:
        """The pipeline of the averaged weights; a decoder for latents can be given. It shares its weights with the trainer: copy it before a cast.

        With `best` it is that of the best evaluation while training, by `config.metric_for_best_model`, read from the folder `best`.
        """
        if best:
            if self.watcher.best() is None:
                raise FileNotFoundError(f"{self.watcher.best_folder} has no weights yet: set eval_steps and train, or take best=False")
            return DriftingPipeline.from_pretrained(self.watcher.best_folder, **({"vae": vae} if vae is not None else {}))
        return DriftingPipeline(transformer=cast(DriftingGenerator, self.ema.module), vae=vae, labels=self.labels)

    def sample(self, class_labels: Any = None, **kwargs: Any) -> Any:
        """Images of the averaged generator, as `DriftingPipeline.__call__` makes them."""
        self._restore()
        return self.pipeline()(class_labels, **kwargs)

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Save the pipeline of the averaged weights, into `pipeline/` of the run if no folder is given, and return the folder."""
        self._restore()
        folder = Path(output_dir) if output_dir else self.run.path / "pipeline"
        self.pipeline().save_pretrained(folder)
        return folder

    @torch.no_grad()
    def generate(self, labels: Tensor, *, rng: torch.Generator, batch_size: int = 250) -> Tensor:
        """Samples [n, c, h, w] of the averaged generator without guidance, clipped to [-1, 1], on the CPU."""
        inputs = self._inputs(labels, rng)
        parts = []
        for i in range(0, len(labels), batch_size):
            part = {name: None if value is None else value[i : i + batch_size] for name, value in inputs.items()}
            parts.append(self.ema.module(**part).sample.float().clamp(-1, 1).cpu())
        return torch.cat(parts)

    def evaluate(self) -> dict[str, float]:
        """Distances of generated samples to held-out images at this step; see `Watcher`. Always the same noise, so that curves are smooth.

        The result is logged; a second call at the same step returns the logged one.
        """
        self._restore()
        return self._evaluate()

    def _evaluate(self) -> dict[str, float]:
        """`evaluate` of the weights at hand, without another look into the folder."""
        done = [entry for entry in self.log_history if entry["step"] == self.step and "energy" in entry]
        if done:
            found = {name: value for name, value in done[-1].items() if name != "step"}
        else:
            found = self.watcher.numbers(lambda labels: self.generate(labels, rng=self._rng(EVAL, 0)))
            self._log(found)
        self.watcher.curves(self.log_history)
        return found


def _check_generator(generator: DriftingGenerator) -> None:
    channels = (generator.config.in_channels, generator.out_channels)
    if channels not in ((1, 1), (3, 3)):
        raise ValueError(
            f"images have 1 or 3 channels and so must noise and samples, got {channels}; build the generator with in_channels=1 or 3"
        )
    if generator.dtype != torch.float32 or not all(p.requires_grad for p in generator.parameters()):
        raise ValueError(f"the generator must be trainable and in float32, got {generator.dtype}; for bfloat16 set mixed_precision")


def _shape_of(generator: DriftingGenerator) -> dict[str, Any]:
    return {name: value for name, value in generator.config.items() if not name.startswith("_")}


def _scalars(outcome: dict[str, Any]) -> dict[str, float]:
    """A step's outcome as flat numbers: `strength/pixels/0`, the first temperature's, and so on."""
    found = {name: float(outcome[name]) for name in ("learning_rate", "grad_norm", "loss")}
    for name, measured in outcome["features"].items():
        found[f"distance/{name}"] = float(measured.distance.mean())
        strengths = measured.strength.flatten(1).mean(1) if measured.strength.ndim > 1 else measured.strength
        found |= {f"strength/{name}/{i}": float(value) for i, value in enumerate(strengths)}
    return found
