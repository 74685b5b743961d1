"""The trainer of generators conducts: who draws what, in which order, in how many pieces. Every formula lives elsewhere."""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers.trainer_callback import TrainerCallback

from .caching import Packing, check_cache
from .cards import CURVES, RESULTS, evaluation_results
from .config import DriftingConfig
from .data import LabelledImages, RealSamples
from .draws import EVAL, LABELS, NOISE, RealDraws, as_samples, class_names, make_feed
from .encoded import Samples
from .fields import Situation
from .files import write_text
from .finetuning import adaptation
from .generator import DriftingGenerator
from .guidance import draw_guidance, unconditional_weight
from .hub import add_pictures, upload
from .loop import COUNTS, TrainingLoop
from .objective import DriftingObjective
from .pipeline import DriftingPipeline
from .runs import RunFolder
from .sampling import refuse_previews
from .services import repository_of, track_images
from .shapes import Float, Int
from .steps import Step, in_one_pass, in_two_passes
from .watching import Watcher

LOSS_NOTICE = (
    "The loss of a drifting model is flat by construction (every force is divided by its own size), so it is not shown as progress. "
    "Watch the energy distance to held-out images and the strengths in log.jsonl."
)


class DriftingTrainer(TrainingLoop):
    """Trains a generator by drifting (arXiv 2602.04770, Algorithm 1), on one process or many, as Accelerate was launched.

    A step is the same on any number of processes: each takes its share of the labels, and the means of the field are over all of them.

    Args:
        generator: the generator; it is trained in place.
        objective: features and field.
        train_dataset: images and integer labels as a `datasets.Dataset`, brought to the generator's size and channels; the same as a stream, an
            `IterableDataset`; or samples that can be read by row, such as a `LatentCache`.
        config: every other choice.
        eval_dataset: held-out samples, at least 4 per class. Without it distances are to training samples; a stream needs it.
        vae: decodes latents, for pictures, extractors and the pipeline.
        extractor: what evaluations look through, as `load_extractor` makes it; samples themselves if not given.
        compute_metrics: further numbers of an evaluation, from its samples [n, c, h, w] (images in [-1, 1]) and their labels [n].
        callbacks: of transformers, instances or classes.

    Raises:
        ValueError: for a dataset, generator or output folder that does not fit, before any work.
    """

    config: DriftingConfig

    def __init__(
        self,
        generator: DriftingGenerator,
        objective: DriftingObjective,
        train_dataset: Dataset | IterableDataset | RealSamples,
        config: DriftingConfig,
        *,
        eval_dataset: Dataset | RealSamples | None = None,
        vae: Any | None = None,
        extractor: Any | None = None,
        compute_metrics: Callable[[Tensor, Tensor], dict[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    ):
        config = dataclasses.replace(config, field=objective.settle_field(config.field))  # a run says what it does
        super().__init__(config, callbacks)
        self.objective, self.vae = objective, vae
        if extractor is not None or compute_metrics is not None:
            refuse_previews(vae)
        self._model_config = generator.config
        _check_generator(generator, config)
        objective.try_field(config.generated_per_label, config.positives_per_label, config.unconditional_per_label)
        self.slots = self._share("labels_per_step")
        self.samples_per_step = config.labels_per_step * config.generated_per_label
        held_out = cast(Any, train_dataset if eval_dataset is None else eval_dataset)
        streamed = isinstance(train_dataset, IterableDataset)
        if streamed and eval_dataset is None:
            raise ValueError("a stream cannot be read twice, so a streamed train_dataset needs an eval_dataset that is not one")
        classes = generator.config.num_classes
        form = {"size": (generator.sample_height, generator.sample_width), "channels": generator.config.in_channels, "num_classes": classes}
        self.eval_data = as_samples(held_out, **form, config=config)
        self.train_data = None if streamed else self.eval_data if eval_dataset is None else as_samples(train_dataset, **form, config=config)
        self.labels = class_names(train_dataset, held_out, config.label_column) if classes else None
        objective.freeze(self.accelerator.device)
        _check_generator(generator, config)  # of a feature map that holds the generator, frozen with it
        objective.arrange(channels_last=config.channels_last, compiled=config.compile_features)
        if vae is not None:
            vae.to(self.accelerator.device).eval().requires_grad_(False)
        known = self.eval_data if self.train_data is None else self.train_data
        data = {"stream": str(cast(Any, train_dataset).info.features)} if streamed else known.fingerprint()
        self.run = RunFolder(config, {"generator": _shape_of(generator), **objective.describe(), "data": data})
        self.watcher = Watcher(
            self.run, self.eval_data, decode=self._decode if vae is not None else None, extractor=extractor, compute_metrics=compute_metrics
        )
        self._ignore_constant_features(known)
        feed = make_feed(
            cast(Any, train_dataset) if self.train_data is None else self.train_data,
            self.eval_data,
            config,
            pack=self._packing(known),
            classes=classes or 1,
            device=self.accelerator.device,
            progress=self.accelerator.is_main_process,
        )
        self.real = RealDraws(feed, config, classes=classes or 1, slots=self.slots, device=self.accelerator.device)
        if objective.observers and self.train_data is None:
            raise ValueError(
                f"the field {config.field} looks at all real samples once, and a stream cannot be read twice; take one without a memory"
            )
        self._prepare(generator, [self.real, *([objective] if objective.state_dict()["memories"] else [])])
        self.pipeline()  # what could not be saved in the end is refused now

    @property
    def generator(self) -> DriftingGenerator:
        """The network as it is trained, wrapped where there are several processes."""
        return self.model

    # -- learning

    def training_step(self) -> dict[str, Any]:
        """One step of Algorithm 1: fresh samples into the banks, real ones drawn, samples generated, the loss, one update."""
        then = time.monotonic()
        drawn = self.real.of_step(self.step)
        self._waited += time.monotonic() - then
        positives, negatives = (None if real is None else self.real.on_device(real) for real in (drawn.attracting, drawn.repelling))
        guidance = self._draw_guidance()[list(self.slots)]
        weights = None if negatives is None else self._unconditional_weight(guidance)
        generate = lambda part: self._generate(drawn.labels[part], guidance[part], list(self.slots)[part])
        real = (cast(Samples, positives), negatives, weights)
        now = Situation(self.step, self.config.max_steps, labels=drawn.labels)
        step = Step(self.objective, generate, *real, now, mean=self._mean, together=self._together)
        size, count = self.config.labels_per_microbatch, len(self.slots)
        whole = not 0 < size < count
        loss, measured = in_one_pass(step, self.accelerator) if whole else in_two_passes(step, self.accelerator, self.model, count, size)
        first = dataclasses.replace(now, labels=drawn.labels[:1])
        outcome = self._update(lambda: self._blame(generate(slice(0, 1)), *(None if t is None else t[:1] for t in real), first))
        return outcome | {"loss": loss, "features": measured}

    def _blame(self, generated: Tensor, *real: Any) -> str:
        """Which features have a gradient that is not finite, seen through the first label."""
        guilty = self.objective.steep(generated, *real)
        return f"the gradients of features {guilty} are not finite: a division by zero or a root at 0" if guilty else "the loss diverged"

    def _generate(self, labels: Tensor, guidance: Tensor, slots: Sequence[int]) -> Float[Tensor, "l n c h w"]:
        """Samples of these labels, the noise of each from its place in the step, so that it does not depend on who generates it."""
        each, device = self.config.generated_per_label, self.accelerator.device
        noise, styles = zip(*(self._noise(each, self._rng(NOISE, self.step, slot)) for slot in slots), strict=True)
        inputs = self._inputs(labels.repeat_interleave(each), torch.cat(noise), torch.cat(styles))
        scale = guidance.repeat_interleave(each).to(device) if self._model_config.guidance_embedding else 1.0
        return self.model(**inputs, guidance_scale=scale).sample.unflatten(0, (len(labels), each))

    def _noise(self, n: int, rng: torch.Generator) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, "n k"]]:
        model, size = self._model_config, self.eval_data.size
        noise = torch.randn(n, model.in_channels, *size, generator=rng)
        return noise, torch.randint(max(1, model.style_codebook_size), (n, model.num_style_tokens), generator=rng)

    def _inputs(self, labels: Tensor, noise: Tensor, styles: Tensor) -> dict[str, Tensor | None]:
        """What the generator takes, on the device."""
        model, device = self._model_config, self.accelerator.device
        return {
            "noise": noise.to(device),
            "class_labels": labels.to(device) if model.num_classes else None,
            "style_labels": styles.to(device) if model.num_style_tokens else None,
        }

    def _draw_guidance(self) -> Float[Tensor, " l"]:
        config = self.config
        return draw_guidance(
            config.labels_per_step,
            generator=self._rng(LABELS, self.step, 1),
            high=config.guidance_max if config.unconditional_per_label else 1.0,
            power=config.guidance_power,
            unguided_share=config.unguided_share,
        )

    def _unconditional_weight(self, guidance: Tensor) -> Float[Tensor, " l"]:
        weight = unconditional_weight(guidance, self.config.generated_per_label, self.config.unconditional_per_label)
        return weight.to(self.accelerator.device)

    # -- real samples

    def _begin(self) -> None:
        self.real.feed.fill()
        if self.objective.observers:
            self._show_everything()

    def _show_everything(self) -> None:
        """All real samples, once, to a field that remembers them. Every process looks at all, so that all remember the same."""
        data, device, size = cast(RealSamples, self.train_data), self.accelerator.device, self.config.push_per_step
        shown = tqdm(range(0, len(data.labels), size), desc="remembering", disable=not self.accelerator.is_main_process)
        for i in shown:
            samples, labels = data.gather(range(i, min(i + size, len(data.labels))))
            self.objective.observe(samples.to(device), labels.to(device))

    def _packing(self, data: RealSamples) -> Packing | None:
        """What makes the features that banks keep, if they do; the memory that this takes is said, or refused, here."""
        config, device = self.config, self.accelerator.device
        if not config.cache_features:
            return None
        pack = Packing(self.objective, config.push_per_step, device)
        banks = device if config.bank_device == "accelerator" else torch.device("cpu")
        numbers = pack(data.gather([0])[0]).shape[1]
        check_cache(config, numbers, classes=self._model_config.num_classes or 1, device=banks, tell=self.accelerator.print)
        return pack

    def _ignore_constant_features(self, data: RealSamples) -> None:
        some = data.starters(1 + 255 // len(np.unique(data.labels)), seed=self.config.seed)[:256]
        constant = self.objective.ignore_constant(data.gather(some)[0].to(self.accelerator.device))
        if constant:
            self.accelerator.print(f"These features are the same for every image and are left out of the loss: {constant}")

    def _close(self) -> None:
        self.real.close()

    # -- looking

    def train(self, resume_from_checkpoint: str | Path | None = None) -> dict[str, float]:
        """As `TrainingLoop.train`."""
        self.accelerator.print(LOSS_NOTICE)
        if self.eval_data is self.train_data:
            self.accelerator.print("No eval_dataset: distances are to training images, so they do not see memorisation.")
        return super().train(resume_from_checkpoint)

    def _look(self, bar: tqdm | None = None) -> None:
        due = lambda every: every and (self.step % every == 0 or self.step == self.config.max_steps)
        if due(self.config.preview_steps) and self._picturable:
            shown = torch.arange(min(self._model_config.num_classes or 1, 10)).repeat_interleave(4)
            samples = self.generate(shown, rng=self._rng(EVAL, 1))  # every process makes its share
            self._on_main(lambda: track_images(self.accelerator, self.watcher.preview(samples, self.step), self.step))
        if not due(self.config.eval_steps) and not self.events.control.should_evaluate:
            return
        found = self._evaluate()
        self._on_main(lambda: self.watcher.keep_if_best(self.step, found, self.pipeline()))
        if bar is not None:
            bar.set_postfix_str(f"energy {found['energy']:.2f} (real {found['energy_real']:.2f})")

    @property
    def _picturable(self) -> bool:
        return self.vae is not None or self._model_config.in_channels in (1, 3)

    def _end(self) -> dict[str, float]:
        return self._evaluate()

    def _restored(self) -> None:
        self._on_main(lambda: self.watcher.forget_after(self.step))
        self._look()  # it may have been killed between the checkpoint and these

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
            found = {name: value for name, value in done[-1].items() if name not in ("step", *COUNTS)}
        else:
            samples = self.generate(self.watcher.wanted(), rng=self._rng(EVAL, 0))  # every process makes its share, one looks
            found = cast(dict[str, float], self._from_main(lambda: self.watcher.numbers(samples)))
            self._log(found)
            self._on_main(lambda: self.watcher.curves(self.log_history))
        self.events.tell_evaluation(self.step, found)
        return found

    def _scalars(self, outcome: dict[str, Any]) -> dict[str, float]:
        """`strength/pixels/0`, the first temperature's, and so on."""
        found = {name: float(outcome[name]) for name in ("learning_rate", "grad_norm", "loss")} | self.objective.clamped
        for name, measured in outcome["features"].items():
            found[f"distance/{name}"] = float(measured.distance.mean())
            strengths = measured.strength.flatten(1).mean(1) if measured.strength.ndim > 1 else measured.strength
            found |= {f"strength/{name}/{i}": float(value) for i, value in enumerate(strengths)}
        return found

    # -- drawing

    def pipeline(self, vae: Any = None, *, best: bool = False, ema_decay: float | None = None) -> DriftingPipeline:
        """The pipeline of the averaged weights. It shares its weights with the trainer: copy it before a cast.

        Args:
            vae: a decoder for latents; the trainer's own if not given.
            best: take those of the best evaluation while training, by `config.metric_for_best_model`, read from the folder `best`.
            ema_decay: one of the config's; the first if not given.
        """
        vae = self.vae if vae is None else vae
        if best:
            if self.watcher.best() is None:
                raise FileNotFoundError(f"{self.watcher.best_folder} has no weights yet: set eval_steps and train, or take best=False")
            return DriftingPipeline.from_pretrained(self.watcher.best_folder, **({"vae": vae} if vae is not None else {}))
        return DriftingPipeline(transformer=self._averaged(ema_decay), vae=vae, labels=self.labels)

    def sample(self, class_labels: Any = None, **kwargs: Any) -> Any:
        """Images of the averaged generator, as `DriftingPipeline.__call__` makes them."""
        self._restore()
        return self.pipeline()(class_labels, **kwargs)

    def save_model(self, output_dir: str | Path | None = None, *, ema_decay: float | None = None) -> Path:
        """Save the pipeline of the averaged weights, with pictures, into `pipeline/` of the run if no folder is given, and return the folder."""
        self._restore()
        folder = Path(output_dir) if output_dir else self.run.path / "pipeline"
        self._on_main(lambda: self._save_model(folder, ema_decay))
        return folder

    def _save_model(self, folder: Path, ema_decay: float | None = None) -> DriftingPipeline:
        """The pipeline, with what its card shows."""
        pipeline = self.pipeline(ema_decay=ema_decay)
        pipeline.save_pretrained(folder)
        add_pictures(pipeline, folder, self.run.path / CURVES)
        if ema_decay is None:  # of another average nobody took numbers
            self._save_results(folder)
        return pipeline

    def _save_results(self, folder: Path) -> None:
        """The numbers of the last evaluation, for the card."""
        config = self.config
        done = [{name: value for name, value in entry.items() if name not in COUNTS} for entry in self.log_history if "energy" in entry]
        if done:
            how = ({"field": config.field} if config.field else {}) | self.about | {"samples_per_class": config.eval_samples_per_class}
            write_text(folder / RESULTS, json.dumps(evaluation_results(done[-1], **how), indent=2))

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> Any:
        """Push the pipeline of the averaged weights, with a card that holds the numbers of the last evaluation.

        Args:
            repo_id: `config.hub_model_id`, or the folder's name, if not given.
            **kwargs: as `DriftingPipeline.push_to_hub` takes them; private is `config.hub_private_repo` if not given.
        """
        self._restore()
        repo_id, kwargs = repo_id or repository_of(self.config), {"private": self.config.hub_private_repo, **kwargs}
        with tempfile.TemporaryDirectory() as folder:
            return self._from_main(lambda: str(upload(self._save_model(Path(folder)), folder, repo_id, **kwargs)))

    @torch.no_grad()
    def generate(self, labels: Tensor, *, rng: torch.Generator, batch_size: int = 250, ema_decay: float | None = None) -> Tensor:
        """Samples [n, c, h, w] of the averaged generator without guidance, on the CPU; images are clipped to [-1, 1].

        Every process makes its share, so all of them must call it.
        """
        model, count, processes = self._averaged(ema_decay), len(labels), self.accelerator.num_processes
        noise, styles = self._noise(count, rng)
        share = -(-count // processes)
        mine = torch.arange(share) + share * self.accelerator.process_index
        mine = mine.clamp(max=count - 1)  # every process makes as many; what is too many is cut off
        parts = []
        for i in range(0, share, batch_size):
            rows = mine[i : i + batch_size]
            parts.append(model(**self._inputs(labels[rows], noise[rows], styles[rows])).sample.float())
        samples = cast(Tensor, self.accelerator.gather(torch.cat(parts)))[:count].cpu()
        return samples if self._latent else samples.clamp(-1, 1)

    @property
    def _latent(self) -> bool:
        return self.vae is not None or not isinstance(self.eval_data, LabelledImages)

    @torch.no_grad()
    def _decode(self, samples: Tensor) -> Tensor:
        """Images [n, c, h, w] in [-1, 1], on the CPU, from latents."""
        decode = self.pipeline().decode
        parts = [decode(part.to(self.accelerator.device)).float().clamp(-1, 1).cpu() for part in samples.split(16)]
        return torch.cat(parts)


def _check_generator(generator: DriftingGenerator, config: DriftingConfig) -> None:
    if bool(config.unconditional_per_label) != generator.config.guidance_embedding:
        raise ValueError(
            f"guidance is learned from unconditional samples: unconditional_per_label={config.unconditional_per_label} and a generator "
            f"with guidance_embedding={generator.config.guidance_embedding} do not go together; set both or neither"
        )
    if generator.out_channels != generator.config.in_channels:
        raise ValueError(
            f"noise and samples must have the same channels, got {generator.config.in_channels} and {generator.out_channels}; leave out_channels out"
        )
    if generator.dtype != torch.float32 or not any(p.requires_grad for p in generator.parameters()):
        raise ValueError(f"the generator must be trainable and in float32, got {generator.dtype}; for 16 bits set mixed_precision")


def _shape_of(generator: DriftingGenerator) -> dict[str, Any]:
    return {name: value for name, value in generator.config.items() if not name.startswith("_")} | adaptation(generator)
