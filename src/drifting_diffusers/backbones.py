"""Features of frozen vision models of `transformers`: hidden states as maps, each seen at several scales.

A pretrained model knows which images look alike where pixels do not. Its weights are never trained here; gradients pass through it to the images.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from .features import check_windows, map_statistics
from .shapes import Float

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CONVNETS = ("convnext", "convnextv2", "dinov3_convnext", "resnet")  # their hidden states are maps
LEARNED_POSITIONS = ("dinov2", "dinov2_with_registers", "siglip_vision_model", "vit", "vit_mae")
FAMILIES = (*CONVNETS, *LEARNED_POSITIONS, "dinov3_vit")  # of `config.model_type`; the rest have hidden states in sequences of tokens


class BackboneFeatures(nn.Module):
    """A feature map of a frozen vision model: images [n, c, h, w] in [-1, 1] to float32 features by name.

    DINOv2 (with registers or without), DINOv3 (ViT and ConvNeXt), ConvNeXt, ConvNeXt V2, ViT, ViT-MAE, SigLIP and SigLIP 2 of fixed resolution, ResNet.
    A hidden state k becomes the map `layer{k}` and its statistics (see `map_statistics`). Where there is a class token, the one of hidden state k
    is `layer{k}_class`; the model's own `pooler_output`, where there is one, is `pooled`. Register tokens are dropped. Hidden states are taken as
    the model returns them, for a transformer before its last norm. A ViT-MAE sees every patch, in order: nothing is masked or shuffled.

    Whole images are resized to `size`, bilinearly, with antialiasing where they shrink; nothing is cropped, and grey ones are repeated to three
    channels. Where `size` is not the one of pretraining, learned positions are interpolated.

    Args:
        model: it is frozen in place; of a `SiglipModel` its vision tower is taken, and the mask ratio of a ViT-MAE becomes 0.
        image_mean: per channel, what the model expects images in [0, 1] to be centred by. It has no default: ImageNet's (`IMAGENET_MEAN`) is wrong
            for SigLIP and for many ViTs, which expect 0.5, and nothing else would tell.
        image_std: the same for the division.
        layers: indices into the hidden states: 0 enters the first layer (stage), k leaves the k-th, negative ones count from the end. By default
            four evenly spaced ones that end with the last.
        size: height and width that the model sees, in pixels. By default `config.image_size`.
        locations: whether every place of a map is a location of its own.
        mean: whether to take the mean over a map.
        std: the same for the standard deviation.
        mean_windows: sides of the windows of further means; a side that does not divide a map's is left out.
        std_windows: the same for standard deviations.
        pooled: whether to take class tokens and the pooled output, one location each.
        standardise: whether the channels of every place and class token are brought to mean 0 and standard deviation 1; see `standardised`.
        prefix: of all names, so that two backbones can stand in one objective.

    Raises:
        ValueError: for a model of another family or with a head; for layers or a size that it does not have; for a mean or standard deviation
            that images in [0, 1] do not have; on a call, for images that it cannot see.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        layers: Sequence[int] | None = None,
        size: int | Sequence[int] | None = None,
        locations: bool = True,
        mean: bool = True,
        std: bool = True,
        mean_windows: Sequence[int] = (2, 4),
        std_windows: Sequence[int] = (2, 4),
        pooled: bool = True,
        standardise: bool = False,
        prefix: str = "",
    ):
        super().__init__()
        tower: Any = model.vision_model if hasattr(model.config, "vision_config") and hasattr(model, "vision_model") else model
        config = tower.config
        if config.model_type not in FAMILIES:
            raise ValueError(f"cannot read the hidden states of a {type(model).__name__}; take one of {', '.join(sorted(FAMILIES))}")
        check_base(tower)
        if config.model_type == "vit_mae":
            config.mask_ratio = 0.0
        self.model = tower
        self.layers = chosen_layers(config, layers)
        self.size = chosen_size(config, size)
        self.image_mean = per_channel(config, "image_mean", image_mean)
        self.image_std = per_channel(config, "image_std", image_std)
        check_windows(mean_windows, std_windows)
        self.statistics: dict[str, Any] = {"locations": locations, "mean": mean, "std": std}
        self.statistics |= {"mean_windows": tuple(mean_windows), "std_windows": tuple(std_windows)}
        self.pooled, self.standardise, self.prefix = pooled, standardise, prefix
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> "BackboneFeatures":
        """The features of a model on the Hub or in a folder.

        `size`, `image_mean` and `image_std` come from its preprocessor configuration (the size after the centre crop, if there is one) unless given.
        Without them nothing is guessed.

        Args:
            name_or_folder: as in `transformers.AutoModel.from_pretrained`.
            revision: passed on, as are `token`, `cache_dir` and `local_files_only`.
            dtype: of the weights and of what is computed between them; features are float32 whatever it is.
            options: of the class.

        Raises:
            ValueError: where neither the preprocessor configuration nor `options` has one of the three; where weights are missing.
        """
        source = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        source = {name: value for name, value in source.items() if value is not None}
        model = load_model(name_or_folder, dtype, **source)
        if not {"size", "image_mean", "image_std"} <= options.keys():
            options = preprocessing(name_or_folder, **source) | options
        missing = sorted({"size", "image_mean", "image_std"} - options.keys())
        if missing:
            raise ValueError(
                f"no preprocessor configuration of {name_or_folder} says {', '.join(missing)}; take what the model was trained with from its card "
                f"and give it, e.g. size=224, image_mean={IMAGENET_MEAN}, image_std={IMAGENET_STD} for ImageNet's"
            )
        return cls(model, **options)

    def extra_repr(self) -> str:
        options = {"layers": self.layers, "size": self.size, "image_mean": self.image_mean, "image_std": self.image_std} | self.statistics
        options |= {"pooled": self.pooled, "standardise": self.standardise, "prefix": self.prefix}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    def train(self, mode: bool = True) -> "BackboneFeatures":
        """It stays in evaluation mode, whatever a module that holds it does: dropout and batch norm are frozen as the weights are."""
        return super().train(False)

    def forward(self, images: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n _ _"]]:
        outputs = self.outputs(images)
        places = standardised if self.standardise else (lambda x: x)
        found: dict[str, Tensor] = {}
        for index in self.layers:
            name, state = f"{self.prefix}layer{index}", at_least_float32(outputs.hidden_states[index])
            maps, front = self.as_map(state)
            found |= map_statistics(name, places(maps), **self.statistics)
            if self.pooled and front is not None and index > 0:  # the class token that enters is the same for all images
                found[f"{name}_class"] = places(front.mT).mT.float()
        pooled = getattr(outputs, "pooler_output", None)
        if self.pooled and pooled is not None:
            found[f"{self.prefix}pooled"] = pooled.flatten(1)[:, None].float()
        if not found:
            raise ValueError(f"{self.extra_repr()} leave no feature; switch one on")
        return found

    def preprocessed(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k height width"]:
        """What the model sees: resized and normalised, in float32 (or float64, if the images are)."""
        channels = len(self.image_mean)
        allowed = (1, 3) if channels == 3 else (channels,)
        if images.ndim != 4 or images.shape[1] not in allowed:
            raise ValueError(
                f"images must have shape [n, c, h, w] with c in {allowed}, got {list(images.shape)}; decode latents and drop alpha first"
            )
        if not images.is_floating_point():
            raise ValueError(f"images must be floating-point numbers in [-1, 1], got {images.dtype}; convert bytes by images / 127.5 - 1")
        x = at_least_float32(images)
        if x.shape[2:] != self.size:
            shrinks = x.shape[2] > self.size[0] or x.shape[3] > self.size[1]
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=shrinks)
        x = x.expand(-1, channels, -1, -1)
        # Not buffers: a buffer would follow the model into 16 bits, and a mean of three digits shifts every image.
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return ((x + 1) / 2 - mean) / std

    def outputs(self, images: Float[Tensor, "n c h w"]) -> Any:
        """The model's own output for these images, with all hidden states."""
        x = self.preprocessed(images).to(self.model.dtype)
        config, options = self.model.config, {}
        if config.model_type in ("vit", "vit_mae", "siglip_vision_model"):  # DINOv2 decides by itself
            options["interpolate_pos_encoding"] = self.size != pair(config.image_size)
        if config.model_type == "vit_mae":  # it sorts patches by this noise, and draws it at random if there is none
            rows, columns = self.grid()
            options["noise"] = torch.arange(rows * columns, device=x.device, dtype=torch.float32).expand(len(x), -1)
        return self.model(pixel_values=x, output_hidden_states=True, **options)

    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of a transformer."""
        height, width = pair(self.model.config.patch_size)
        return self.size[0] // height, self.size[1] // width

    def as_map(self, state: Tensor) -> tuple[Float[Tensor, "n c rows columns"], Float[Tensor, "n 1 c"] | None]:
        """A hidden state as a map, without the tokens in front of the patches, and its class token if it has one."""
        if self.model.config.model_type in CONVNETS:
            return state, None
        rows, columns = self.grid()
        front = state.shape[1] - rows * columns  # none in SigLIP; elsewhere a class token, then registers
        return state[:, front:].mT.unflatten(2, (rows, columns)), state[:, :1] if front else None


class ConvNextV2Features(BackboneFeatures):
    """The features of the pixel recipe of arXiv 2602.04770: ConvNeXt V2, each place's channels standardised.

    Stage k of the paper is `layer{k + 1}` here. Stages 1 to 3 give every location, mean and standard deviation, stage 0 mean and standard deviation
    only: it has 56 x 56 places. `pooled` is the model's LayerNorm of the spatial mean of stage 3. Our sources say no more of it than "pooled LN", so
    this is our reading.

    Args:
        model: a `ConvNextV2Model` of four stages; it is frozen in place.
        size: height and width that images are resized to, in pixels.
        prefix: of all names.

    Raises:
        ValueError: for another model, and as in `BackboneFeatures`.
    """

    def __init__(self, model: PreTrainedModel, *, size: int | Sequence[int] = 224, prefix: str = ""):
        if model.config.model_type != "convnextv2" or len(model.config.depths) != 4:
            raise ValueError(
                f"the recipe needs a ConvNextV2Model of four stages, got {type(model).__name__}; BackboneFeatures takes others"
            )
        normalisation: dict[str, Any] = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
        super().__init__(
            model, layers=(1, 2, 3, 4), size=size, mean_windows=(), std_windows=(), standardise=True, prefix=prefix, **normalisation
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike = "facebook/convnextv2-base-22k-224",
        *,
        dtype: torch.dtype = torch.float32,
        size: int | Sequence[int] = 224,
        prefix: str = "",
        **source: Any,
    ) -> "ConvNextV2Features":
        """The features of a ConvNeXt V2 on the Hub or in a folder; its preprocessor configuration is not asked, the recipe has its own.

        Args:
            name_or_folder: as in `transformers.AutoModel.from_pretrained`.
            dtype: of the weights and of what is computed between them.
            size: as in the class.
            prefix: as in the class.
            source: `revision`, `token`, `cache_dir` and `local_files_only`.
        """
        return cls(load_model(name_or_folder, dtype, **source), size=size, prefix=prefix)

    def forward(self, images: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n _ _"]]:
        found = super().forward(images)
        del found[f"{self.prefix}layer1"]
        return found


def standardised(maps: Float[Tensor, "n c *places"]) -> Float[Tensor, "n c *places"]:
    """(x - mean) / (std + 1e-3) over the channels of every place (arXiv 2602.04770, official code), with the standard deviation of a population."""
    centred = maps - maps.mean(1, keepdim=True)
    return centred / ((centred.square().mean(1, keepdim=True) + 1e-12).sqrt() + 1e-3)  # at 0 a bare root has no gradient


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_base(model: Any) -> None:
    """Refuse a model with a head, or of transformers' backbones: what they return has no pooled output, or other hidden states."""
    if any(base.__name__ == "BackboneMixin" for base in type(model).__mro__):  # its module differs between versions of transformers
        raise ValueError(
            f"a {type(model).__name__} returns no hidden states as they are; load the same weights with AutoModel.from_pretrained"
        )
    if re.search("For[A-Z]", type(model).__name__):  # by name: a DINOv3Model, too, has another `base_model` than itself
        raise ValueError(
            f"a {type(model).__name__} has a head, and its output no pooled one; give its model.base_model, a {type(model.base_model).__name__}"
        )


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, of which a configuration may hold one number for both."""
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def per_channel(config: Any, name: str, values: Sequence[float]) -> tuple[float, ...]:
    kind = "positive numbers" if name == "image_std" else "numbers"
    sound = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == config.num_channels
    if not sound or not all(isinstance(x, int | float) and 0 <= x <= 1 and (x or name == "image_mean") for x in values):
        raise ValueError(
            f"{name} must be {config.num_channels} {kind} up to 1, one for each channel of the model, got {values}; "
            "they are of images in [0, 1]: divide what is of bytes by 255"
        )
    return tuple(float(value) for value in values)


def chosen_layers(config: Any, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Indices from the front, checked; by default four evenly spaced ones that end with the last."""
    count = len(config.depths) if config.model_type in CONVNETS else config.num_hidden_layers
    if layers is None:
        return tuple(sorted({-(-count * quarter // 4) for quarter in (1, 2, 3, 4)}))
    if not isinstance(layers, Sequence) or not all(type(index) is int for index in layers):
        raise ValueError(f"layers must be a sequence of integers in {-count - 1}...{count}, got {layers!r}; one layer is ({count},)")
    found = tuple(index + count + 1 if index < 0 else index for index in layers)
    if not found or len(set(found)) != len(found) or not all(0 <= index <= count for index in found):
        raise ValueError(
            f"layers must be different indices in {-count - 1}...{count} for this {config.model_type}, at least one, got {list(layers)}"
        )
    return found


def chosen_size(config: Any, size: int | Sequence[int] | None) -> tuple[int, int]:
    """Height and width that the model can see, checked."""
    pretrained: Any = getattr(config, "image_size", None)
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and not (isinstance(sides, tuple | list) and len(sides) == 2 and all(type(side) is int for side in sides)):
        raise ValueError(f"size must be an integer, the side in pixels, or two, height and width, got {size!r}; e.g. size=224")
    if size is None and pretrained is None:
        raise ValueError(
            f"the configuration of this {config.model_type} has no image_size; give size, the side in pixels that it was trained with"
        )
    found, units = pair(pretrained if size is None else size), multiples(config)
    if any(side < 1 or side % unit for side, unit in zip(found, units, strict=True)):
        near = tuple(max(1, round(side / unit)) * unit for side, unit in zip(found, units, strict=True))
        raise ValueError(
            f"size {found} does not divide into the {units} pixels of a patch of this {config.model_type}; the nearest is size={near}"
        )
    if config.model_type in LEARNED_POSITIONS and found != pair(pretrained):
        height, width = pair(pretrained)
        if height != width or not isinstance(config.patch_size, int):
            raise ValueError(
                f"learned positions of {pretrained} pixels cannot be interpolated to size {found}; give size={(height, width)}"
            )
    return found


def multiples(config: Any) -> tuple[int, int]:
    """Height and width in pixels of what one place of the last hidden state stands on; a ResNet pads and takes any size."""
    if config.model_type == "resnet":
        return 1, 1
    height, width = pair(getattr(config, "patch_size", 4))  # the stride of DINOv3's ConvNeXt is not in its configuration
    halvings = len(config.depths) - 1 if config.model_type in CONVNETS else 0
    return height << halvings, width << halvings


def load_model(name_or_folder: str | os.PathLike, dtype: torch.dtype, **source: Any) -> PreTrainedModel:
    """A model with all its weights: a pooler without weights is left out, anything else without weights is refused."""
    model, loading = AutoModel.from_pretrained(name_or_folder, dtype=dtype, output_loading_info=True, **source)
    missing = sorted(name for name in loading["missing_keys"] if not name.endswith("mask_token"))  # nothing is masked here
    if missing and model.config.model_type == "vit" and all(name.startswith("pooler.") for name in missing):
        model.pooler = None  # checkpoints of ViT classifiers have none, and a random one says nothing
    elif missing:
        raise ValueError(
            f"{name_or_folder} has no weights for {missing[:4]} of {type(model).__name__}; random ones are no features: take another"
        )
    return model


def preprocessing(name_or_folder: str | os.PathLike, **source: Any) -> dict[str, Any]:
    """What the preprocessor configuration says of `size`, `image_mean` and `image_std`; what it does not say is left out.

    Read as a dictionary, not as an image processor: some of those exist with torchvision only.
    """
    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(name_or_folder, **source)
    except OSError:  # there is none
        return {}
    size = config.get("crop_size") if config.get("do_center_crop") else config.get("size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    normalised = config.get("do_normalize", True)
    found = {name: config.get(name) if normalised else rest for name, rest in (("image_mean", (0.0,) * 3), ("image_std", (1.0,) * 3))}
    if not config.get("do_rescale", True) or abs(255 * config.get("rescale_factor", 1 / 255) - 1) > 1e-3:
        found = {}  # mean and std of images that are not in [0, 1]
    return {name: value for name, value in ({"size": size} | found).items() if value is not None}
