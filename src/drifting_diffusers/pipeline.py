r"""Class labels in, images out: image = decode(f(noise; label, guidance scale, style)), with noise ~ N(0, 1) and style labels uniform.

Each image takes its noise and then its style from its own generator, so the same seed gives the same image whatever stands around it in the batch.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, SupportsIndex

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import hub
from .generator import DriftingGenerator
from .labels import checked_id, finder, imagenet_labels, names_of
from .optimisation import Optimised, is_compiled, new_step, optimise
from .releases import RELEASES, VAE
from .shapes import Float, Int

Label = SupportsIndex | str
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DECODER_MEMORY = 2**31  # bytes of activations that a decoder may take if nobody says how many images it decodes at a time


class DriftingPipeline(hub.PushWithCard, DiffusionPipeline):
    r"""Draws images from a `DriftingGenerator`, one network call per image.

    Args:
        transformer: the generator.
        vae: decodes its samples; without one the samples are the images, in [-1, 1].
        labels: a name for every class, in the order of the ids; or {0: name}, or {"0": name} as `model_index.json` holds them.
        guidance_scale: what is taken when a call gives none; 1 is no guidance.

    Raises:
        ValueError: if labels, vae or guidance scale do not fit the generator.
        TypeError: if the labels are no names, or the guidance scale is no number.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        transformer: DriftingGenerator,
        vae: ModelMixin | None = None,
        labels: Sequence[str] | Mapping[str, str] | Mapping[int, str] | None = None,
        guidance_scale: int | float = 1.0,
    ):
        super().__init__()
        names = names_of(labels)
        _check_fit(transformer, vae, names)
        if not isinstance(guidance_scale, Real):
            raise TypeError(f"guidance_scale of a pipeline must be one number, got {guidance_scale!r}; give one per label to a call")
        _guidance_scales(guidance_scale, 1, embedded=transformer.config.guidance_embedding)
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(labels=names, guidance_scale=float(guidance_scale))
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor | None = None,
        guidance_scale: int | float | Sequence[int | float] | Tensor | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Float[Tensor, "b c h w"] | Any | None = None,
        style_labels: Int[Tensor, "b k"] | Any | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        decode_batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """`num_images_per_label` images of every label, those of a label side by side.

        Args:
            class_labels: ids, names, or one of them. A name is a whole one of `labels` or any of its parts between commas, with or without regard to
                case: whole names are found first, then parts, and what agrees in case before what does not. Not given for an unconditional generator,
                which makes `num_images_per_label` images.
            guidance_scale: one for all or one per label, finite and above 0; the pipeline's own if not given.
            num_images_per_label: at least 1.
            generator: one, which the images draw from in turn, or a list with one per image; torch's global one if not given.
            latents: noise in place of the drawn one, finite; a tensor or what makes one.
            style_labels: integers in [0, style_codebook_size), in place of the drawn ones; a tensor or what makes one.
            output_type: "pil", "np" [b, h, w, c] in [0, 1], "pt" [b, c, h, w] in [0, 1], or "latent", what the generator returned.
            return_dict: whether to return an output with `.images` or a tuple.
            decode_batch_size: how many images the vae decodes at a time; if not given, as many as take up to 2 GiB. The images are the same.

        Raises:
            ValueError: for inputs that do not fit the generator; nothing is drawn then.
            TypeError: for inputs of another kind.
        """
        self._check_output(output_type, num_images_per_label)
        _check_count("decode_batch_size", 1 if decode_batch_size is None else decode_batch_size)
        ids = self.get_label_ids(class_labels)
        count = len(ids) if ids is not None else 1
        num_images_per_label = int(num_images_per_label)  # of numpy too
        scales = _guidance_scales(
            self.config.guidance_scale if guidance_scale is None else guidance_scale,
            count,
            embedded=self.transformer.config.guidance_embedding,
        )
        noise, style = self._inputs(count * num_images_per_label, generator, latents, style_labels)
        new_step(self.transformer)
        sample = self.transformer(
            noise,
            torch.tensor(ids, device=noise.device).repeat_interleave(num_images_per_label) if ids is not None else None,
            scales.to(noise.device).repeat_interleave(num_images_per_label) if scales is not None else 1.0,
            style,
            return_dict=False,
        )[0]
        if output_type == "latent":
            images: Any = sample.clone() if is_compiled(self.transformer) else sample  # the next call may write where this one did
        else:
            images = self._images(sample, output_type, decode_batch_size)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def labels(self) -> list[str]:
        """The name of every class by its id; empty if the classes have no names."""
        return list(self.config.labels)

    def get_label_ids(self, class_labels: Label | Sequence[Label] | Tensor | None) -> list[int] | None:
        """Ids of labels given by id or name; None for an unconditional generator.

        Raises:
            ValueError: for ids out of range, names that are unknown or shared by several classes, no labels, or labels for an unconditional generator.
            TypeError: for what is neither an id nor a name.
        """
        classes = self.transformer.config.num_classes
        if classes == 0:
            if class_labels is not None:
                raise ValueError(f"this generator knows no classes, got class_labels={class_labels!r}: set num_images_per_label instead")
            return None
        if class_labels is None:
            raise ValueError(f"class_labels are needed: ids from 0 to {classes - 1}{' or names' if self.labels else ''}")
        given: Any = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels  # of torch or numpy
        if isinstance(given, bytes) or not isinstance(given, Label | Iterable):
            raise TypeError(f"class_labels must be ids, names, or one of them, got {given!r}")
        wanted = [given] if isinstance(given, Label) else list(given)
        if not wanted:
            raise ValueError("class_labels are empty: give at least one label")
        find = finder(self.labels) if any(isinstance(label, str) for label in wanted) else None
        return [find(label) if find and isinstance(label, str) else checked_id(label, classes) for label in wanted]

    def decode(self, sample: Float[Tensor, "b c h w"], batch_size: int | None = None) -> Float[Tensor, "b _ _ _"]:
        """Images in about [-1, 1] from samples of the generator: through the vae if there is one, `batch_size` at a time.

        Where no `batch_size` is given, it is as many as take up to 2 GiB, on every device the same. Slicing and tiling of the vae come on top.
        """
        if self.vae is None:
            return sample
        scaling, shift = getattr(self.vae.config, "scaling_factor", None), getattr(self.vae.config, "shift_factor", None)
        scaled = (sample.float() / (scaling or 1.0) + (shift or 0.0)).to(self.vae.dtype)
        size = batch_size or _decoded_at_once(self.vae, scaled)
        if torch.compiler.is_compiling() or len(scaled) <= size:  # an exported graph takes its batch whole
            return self.vae.decode(scaled, return_dict=False)[0]
        parts = []
        for part in scaled.split(size):
            new_step(self.vae)
            decoded = self.vae.decode(part, return_dict=False)[0]
            parts.append(decoded.clone() if is_compiled(getattr(self.vae, "decoder", None)) else decoded)
        return torch.cat(parts)

    def optimize(self, compile: str | None = None) -> Optimised:
        """Prepare for drawing many images, on the device where the pipeline is now: the same images up to rounding, faster.

        The generator projects its condition once for all blocks and the decoder's convolutions take channels_last. `print` what is returned: it says
        what was done and what was left, and why. Move and cast the pipeline, and load adapters, before; what was done holds until then.

        Args:
            compile: None compiles nothing; "blocks" compiles the repeated blocks and the decoder, which takes seconds; "graphs" compiles both whole and
                replays them as CUDA graphs, for the one batch size that you draw with.
        """
        return optimise(self, compile)

    def _images(self, sample: Float[Tensor, "b c h w"], output_type: str, decode_batch_size: int | None) -> Any:
        """Decoded; NaN would be black in a picture and say nothing."""
        decoded = self.decode(sample, decode_batch_size).float()
        if output_type != "pt" and not decoded.isfinite().all():  # "pt" stays on its device, which need not wait
            parts = [
                f"{name} in {str(part.dtype)[6:]}"
                for name, part in (("generator", self.transformer), ("vae", self.vae))
                if part is not None
            ]
            raise ValueError(f"these images are NaN or infinite ({', '.join(parts)}): load the pipeline in bfloat16 or float32")
        return self.image_processor.postprocess(decoded, output_type)

    def _inputs(
        self, n: int, generator: torch.Generator | Sequence[torch.Generator] | None, latents: Any, style_labels: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Noise [n, c, h, w] and style labels [n, k]. What is given replaces what is drawn, so it does not shift the rest."""
        model, device = self.transformer, self._execution_device
        config = model.config
        generators = _generators(generator, n)
        shape = (config.in_channels, model.sample_height, model.sample_width)
        latents, style_labels = _tensor("latents", latents), _tensor("style_labels", style_labels)
        _check_latents(latents, [n, *shape])
        _check_style(style_labels, n, config.num_style_tokens, config.style_codebook_size)
        drawn = [_draw(shape, config.num_style_tokens, config.style_codebook_size, rng, device) for rng in generators]
        noise = torch.cat([noise for noise, _ in drawn]) if latents is None else latents
        style = torch.cat([style for _, style in drawn]) if style_labels is None else style_labels
        return noise.to(device, model.dtype), style.to(device) if config.num_style_tokens else None

    def _check_output(self, output_type: str, num_images_per_label: int) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        _check_count("num_images_per_label", num_images_per_label)
        channels = self.transformer.out_channels
        if output_type == "pil" and self.vae is None and channels not in (1, 3):
            raise ValueError(f'samples of {channels} channels are no picture: load the pipeline with its vae, or take output_type="latent"')

    # -- folders and the Hub

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json` in the published layout, with the shims it names."""
        if push_to_hub:
            raise ValueError(
                "a pipeline's index is of no use alone on the Hub: call push_to_hub() or save_pretrained(..., push_to_hub=True)"
            )
        super().save_config(save_directory, **kwargs)
        hub.publish_layout(save_directory)

    @classmethod
    def from_release(
        cls,
        source: str | os.PathLike,
        *,
        vae: ModelMixin | str | None = VAE,
        labels: Sequence[str] | None = None,
        guidance_scale: int | float | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "DriftingPipeline":
        """The pipeline of a generator of the reference release (arXiv 2602.04770), downloaded and converted where that was not done before.

        Args:
            source: "latent_L_sota", "latent_B_sota", "pixel_L_sota", "pixel_B_sota", "ablation"; or a folder or file of the release's format.
            vae: decodes samples of 4 channels; a model, or the folder or repository that `AutoencoderKL.from_pretrained` loads, or None for samples
                that stay latents.
            labels: a name for every class; for 1000 classes those of ImageNet if not given.
            guidance_scale: what is taken when a call gives none; if not given, the one of the release's best FID, or 1 for a folder or file.
            dtype: of the weights; float32 if not given.
            kwargs: revision, token, cache_dir, local_files_only; see `convert.from_release`.

        Raises:
            FileNotFoundError: if there is no such folder or file.
            ValueError: for an unknown name, or an artefact that is broken or no generator.
            TypeError: for a `vae` or `dtype` of another kind.
        """
        if not (vae is None or isinstance(vae, ModelMixin) or (isinstance(vae, str) and vae)):
            raise TypeError(f"vae must be a model, the name of a folder or repository, or None for samples that stay latents, got {vae!r}")
        transformer = DriftingGenerator.from_release(source, dtype=dtype, **kwargs)
        if labels is None and transformer.config.num_classes == 1000:
            labels = imagenet_labels()
        if guidance_scale is None:
            guidance_scale = RELEASES[str(source)].guidance_scale if str(source) in RELEASES else 1.0
        if transformer.out_channels != 4:
            vae = None if vae == VAE else vae
        if isinstance(vae, str):
            where = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in kwargs}
            vae = AutoencoderKL.from_pretrained(vae, dtype=dtype, **where)
        return cls(transformer, vae=vae, labels=labels, guidance_scale=guidance_scale)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, with our classes under their own names, so that loading them needs no code from the repository."""
        loaded = super().load_config(*args, **kwargs)
        return (hub.from_published(loaded[0]), *loaded[1:]) if isinstance(loaded, tuple) else hub.from_published(loaded)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetch configurations and weights into the cache; no code, and nothing of the components that are passed as arguments."""
        where = {key: kwargs.get(key) for key in ("cache_dir", "token")}
        where |= {key: bool(kwargs.get(key)) for key in ("force_download", "local_files_only")}
        index, commit = cls.load_config(pretrained_model_name, revision=kwargs.get("revision"), return_commit_hash=True, **where)
        expected, _ = cls._get_signature_keys(cls)
        components = [name for name in expected if name not in kwargs and index.get(name, [None])[0] is not None]
        return hub.download_components(
            pretrained_model_name,
            components,
            variant=kwargs.get("variant"),
            suffix="bin" if kwargs.get("use_safetensors") is False else "safetensors",
            revision=commit or kwargs.get("revision"),  # the commit of the index, should the branch move meanwhile
            **where,
        )


def _draw(
    shape: tuple[int, int, int], tokens: int, codebook: int, rng: torch.Generator | None, device: torch.device
) -> tuple[Float[Tensor, "1 c h w"], Int[Tensor, "1 k"]]:
    """Noise and style labels of one image. Float32 whatever the model runs in, so a seed means the same noise in every precision."""
    noise = randn_tensor((1, *shape), generator=rng, device=device, dtype=torch.float32)
    style = torch.randint(codebook, (1, tokens), generator=rng, device=rng.device if rng is not None else device)
    return noise, style.to(device)


def _decoded_at_once(vae: Any, latents: Float[Tensor, "b c h w"]) -> int:
    """How many images of this size fit `DECODER_MEMORY`.

    A decoder is widest where its last block begins, at full size. As many as six such maps live at once: AutoencoderTiny was measured at 5.7 per
    image, AutoencoderKL at 2.7.
    """
    widths = list(vae.config.get("block_out_channels") or (128, 256, 512, 512))  # of most autoencoders
    pixels = latents[0, 0].numel() * 4 ** (len(widths) - 1)
    return max(1, DECODER_MEMORY // (6 * pixels * max(widths[:2]) * latents.element_size()))


def _check_count(name: str, given: Any) -> None:
    if not isinstance(given, Integral) or isinstance(given, bool):
        raise TypeError(f"{name} must be an integer of at least 1, got {given!r}")
    if given < 1:
        raise ValueError(f"{name} must be at least 1, got {given}")


def _tensor(name: str, given: Any) -> Tensor | None:
    if given is None:
        return None
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or numbers that make one, got {given!r}") from error


def _generators(given: Any, n: int) -> list[torch.Generator | None]:
    """One per image."""
    generators = list(given) if isinstance(given, list | tuple) else [given] * n
    if len(generators) != n:
        raise ValueError(f"{len(generators)} generators for {n} images: give one per image, or a single one that they draw from in turn")
    for rng in generators:
        if not isinstance(rng, torch.Generator | None):
            seed = rng if isinstance(rng, int) else 0
            raise TypeError(f"a generator must be a torch.Generator, got {rng!r}: take torch.Generator().manual_seed({seed})")
    return generators


def _guidance_scales(scale: Any, count: int, *, embedded: bool) -> Float[Tensor, " n"] | None:
    """One scale per label; None for a generator that is not told."""
    try:
        scales = torch.as_tensor(scale, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"guidance_scale must be one number or one per label ({count}), got {scale!r}") from error
    if scales.ndim > 1 or scales.numel() not in (1, count):
        raise ValueError(f"guidance_scale must be one number or one per label ({count}), got shape {list(scales.shape)}")
    if not (scales.isfinite() & (scales > 0)).all():
        raise ValueError(f"guidance_scale must be finite and above 0 (1 is no guidance), got {scales.tolist()}")
    if embedded:
        return scales.expand(count)
    if (scales != 1).any():
        raise ValueError(f"this generator was built without guidance_embedding, so guidance_scale must stay 1, got {scales.tolist()}")
    return None


def _check_latents(latents: Tensor | None, shape: list[int]) -> None:
    if latents is None:
        return
    if list(latents.shape) != shape:
        raise ValueError(f"latents must be {shape}, got {list(latents.shape)}")
    if not latents.isfinite().all():
        raise ValueError(f"latents must be finite, got {int((~latents.isfinite()).sum())} NaN or infinite values of {latents.numel()}")


def _check_style(style_labels: Tensor | None, n: int, tokens: int, codebook: int) -> None:
    """Here and not in the generator, which would have to wait for the device to look at the values."""
    if style_labels is None:
        return
    if not tokens:
        raise ValueError("this generator takes no style_labels: leave them out")
    if list(style_labels.shape) != [n, tokens]:
        raise ValueError(f"style_labels must be {[n, tokens]}, got {list(style_labels.shape)}")
    if style_labels.is_floating_point() or style_labels.dtype == torch.bool:
        raise ValueError(f"style_labels must be integers, got {style_labels.dtype}: take style_labels.long()")
    if style_labels.min() < 0 or style_labels.max() >= codebook:
        raise ValueError(f"style_labels must lie in [0, {codebook}), got values from {style_labels.min()} to {style_labels.max()}")


def _check_fit(transformer: DriftingGenerator, vae: ModelMixin | None, names: Iterable[str]) -> None:
    names, classes = list(names), transformer.config.num_classes
    if names and len(names) != classes:
        raise ValueError(f"{len(names)} labels for a generator of {classes} classes: give one name per class, or none")
    channels = getattr(vae.config, "latent_channels", transformer.out_channels) if vae is not None else transformer.out_channels
    if channels != transformer.out_channels:
        raise ValueError(
            f"the vae decodes {channels} channels, the generator makes {transformer.out_channels}: they were not trained together"
        )
