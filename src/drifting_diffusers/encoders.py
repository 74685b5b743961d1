r"""What samples are compared in: a convolutional autoencoder that learned to fill in what was masked (arXiv 2602.04770, A.3 to A.5).

    conv1 -> layer1 -> layer2 -> layer3 -> layer4 -> logits        residual stages of 1, 2, 4 and 8 times the base channels, halving both sides
      |        |         |         |         |
    image <- up10 <-- up21 <--- up32 <--- up43 <- bridge           each resized to its skip's size and joined with it

Training fills in masked patches; what is compared are statistics of the encoder's maps on whole images. The names of maps are the release's.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F

from .convert import from_release
from .encoded import Reading, in_halves
from .features import check_windows, map_readings
from .hub import PushWithCard
from .shapes import Float, Int

GROUPS = 32  # of every norm; the release takes the largest divisor of the channels up to 32, and all channels are multiples of 32


@dataclass
class MaskedAutoencoderOutput(BaseOutput):
    """What a masked image became. All losses are float32, one per sample.

    Args:
        loss: [n], weight * classification_loss + (1 - weight) * reconstruction_loss.
        reconstruction_loss: [n], squared error summed over channels and averaged over masked positions; 0 where nothing is masked.
        classification_loss: [n], cross entropy; none without labels.
        reconstruction: [n, c, h, w] like the images, the unmasked positions too.
        logits: [n, num_classes].
    """

    loss: Float[Tensor, " n"]
    reconstruction_loss: Float[Tensor, " n"]
    classification_loss: Float[Tensor, " n"] | None
    reconstruction: Float[Tensor, "n c h w"]
    logits: Float[Tensor, "n k"]


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


def conv3x3(channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))); x is projected where the shape changes."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = conv3x3(channels, out_channels, stride), group_norm(out_channels)
        self.conv2, self.norm2 = conv3x3(out_channels, out_channels), group_norm(out_channels)
        self.conv_shortcut = self.norm_shortcut = None
        if stride != 1 or channels != out_channels:
            self.conv_shortcut = nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False)
            self.norm_shortcut = group_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = x if self.conv_shortcut is None else self.norm_shortcut(self.conv_shortcut(x))
        return F.relu(shortcut + residual)


class ConvNormReLU(nn.Module):
    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv, self.norm = conv3x3(channels, out_channels), group_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class UpBlock(nn.Module):
    """A map resized to its skip's size and joined with it."""

    def __init__(self, channels: int, skip_channels: int):
        super().__init__()
        self.norm = group_norm(channels + skip_channels)
        self.proj = ConvNormReLU(channels + skip_channels, skip_channels)
        self.refine = ConvNormReLU(skip_channels, skip_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        return self.refine(self.proj(self.norm(torch.cat([x, skip], dim=1))))


class MaskedAutoencoder(PushWithCard, ModelMixin, ConfigMixin):
    """The feature encoder, with the decoder and the classifier that it is trained with.

    `DriftingObjective(encoder.activations)` compares samples in it. In 16 bits convolutions run in 16 bits and the statistics of every norm and
    feature in float32. Train a generator through it in float32 or bfloat16: behind norms of flat images gradients exceed float16's range.
    Fresh weights are He's for convolutions, torch's for the classifier and the last convolution; norms start at 1 and 0. The release's dropout is
    left out: it acts in training alone. The defaults make 2.7 billion weights.

    Args:
        in_channels: channels of the images, 4 for latents.
        base_channels: of the first stage, a multiple of 32; every later stage has twice as many. With 32 every group of the first stage is one
            channel, so `layer1_mean` and `layer1_std` are the same for all images; the objective leaves them out once it has seen some.
        layers_per_stage: residual blocks of each of the four stages.
        input_patch_size: side of the squares of pixels that become the channels of one position, before everything else.
        mask_patch_size: side of the squares of positions that `draw_mask` removes together.
        num_classes: of the classifier.

    Raises:
        ValueError: for values outside their range.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock", "UpBlock"]
    _repeated_blocks = ["ResidualBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        base_channels: int = 640,
        layers_per_stage: tuple[int, ...] | list[int] = (3, 4, 6, 3),
        input_patch_size: int = 1,
        mask_patch_size: int = 2,
        num_classes: int = 1000,
    ):
        super().__init__()
        _check_config(self.config)
        patched = in_channels * input_patch_size**2
        widths = [base_channels * 2**i for i in range(4)]
        self.conv_in, self.norm_in = conv3x3(patched, base_channels), group_norm(base_channels)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                ResidualBlock(widths[i] if j else widths[max(i - 1, 0)], widths[i], stride=2 if i and not j else 1) for j in range(blocks)
            )
            for i, blocks in enumerate(layers_per_stage)
        )
        self.stage_norms = nn.ModuleList(group_norm(width) for width in widths)
        self.classifier = nn.Linear(widths[3], num_classes)
        self.bridge = ConvNormReLU(widths[3], widths[3])
        self.up_blocks = nn.ModuleList(
            UpBlock(wide, narrow)
            for wide, narrow in ((widths[3], widths[2]), (widths[2], widths[1]), (widths[1], widths[0]), widths[:1] * 2)
        )
        self.conv_out = nn.Conv2d(base_channels, patched, 1)
        self.gradient_checkpointing = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.conv_out:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    @classmethod
    def from_release(cls, source: str | os.PathLike, **kwargs: Any) -> "MaskedAutoencoder":
        """The reference release's encoder, converted.

        Args:
            source: a name of `RELEASES`, a folder or a file.
            **kwargs: `dtype` of the weights; `revision`, `token`, `cache_dir` and `local_files_only` for the download; see `convert.from_release`.
        """
        return from_release(cls, "mae", source, **kwargs)

    # -- features

    @in_halves("maps", "readings")
    def activations(
        self,
        images: Float[Tensor, "n c h w"],
        *,
        mean: bool = True,
        std: bool = True,
        mean_windows: Sequence[int] = (2, 4),
        std_windows: Sequence[int] = (2, 4),
        every_block: int | None = 2,
        whole_image: bool = True,
    ) -> dict[str, Float[Tensor, "n l d"]]:
        """Statistics of the encoder's maps at several scales (arXiv 2602.04770, A.5), in float32, differentiable in the images.

        The maps are `conv1`, `layer1` to `layer4` and `layer{i}_blk{j}`, the output of block j of stage i; for what is taken of each, see
        `map_statistics`. `norm_x` is the root mean square of every channel of the image, cut into patches.

        Args:
            images: what the encoder was trained on; both sides divisible by `input_patch_size`.
            mean: whether means over a whole map are taken.
            std: whether standard deviations over a whole map are taken.
            mean_windows: sides of the windows of means; what does not divide a map's sides is left out there.
            std_windows: the same for standard deviations.
            every_block: outputs of blocks whose number, from 1, this divides; none without it.
            whole_image: whether the image itself is a feature, `global`, its (row, column, channel) values as one location.

        Raises:
            ValueError: for images that do not fit the configuration, windows or `every_block` below 1.
        """
        windows = {"mean_windows": mean_windows, "std_windows": std_windows}
        check_windows(mean_windows, std_windows)  # before a pass through the encoder
        found: dict[str, Tensor] = {}
        for name, values in self.maps(images, every_block=every_block).items():
            reads = self.readings(name, values, mean=mean, std=std, whole_image=whole_image, **windows)
            values = values.float()  # once: the gradients of all readings meet in float32
            found |= {key: read(values) for key, read in reads.items()}
        return found

    def maps(self, images: Float[Tensor, "n c h w"], *, every_block: int | None = 2) -> dict[str, Float[Tensor, "n _ _ _"]]:
        """The half of `activations` that costs: the maps by name, in the encoder's precision, and `image`, the image itself."""
        self._check_images(images)
        if every_block is not None and not _natural(every_block):
            raise ValueError(f"every_block must be at least 1, an integer, got {every_block!r}; None leaves the blocks out")
        return {"image": images.float(), **self._encode(self.patchify(images.float()).to(self.dtype), every_block)}

    def readings(self, name: str, maps: Float[Tensor, "n c h w"], *, whole_image: bool = True, **statistics: Any) -> dict[str, Reading]:
        """The other half: what `activations` takes of a map of this name and size, each still to be taken."""
        if name != "image":
            return map_readings(name, maps, **statistics)
        found: dict[str, Reading] = {"norm_x": lambda images: (self.patchify(images).square().mean((2, 3)) + 1e-6).sqrt()[:, None]}
        if whole_image:
            found["global"] = lambda images: images.permute(0, 2, 3, 1).flatten(1)[:, None]
        return found

    def _encode(self, patched: Tensor, every_block: int | None = None) -> dict[str, Tensor]:
        """The maps by name, first to last."""
        x = F.relu(self.norm_in(self.conv_in(patched)))
        found = {"conv1": x}
        for i, (blocks, norm) in enumerate(zip(self.stages, self.stage_norms, strict=True), start=1):
            for j, block in enumerate(cast(nn.ModuleList, blocks), start=1):
                x = self._run(block, x)
                if every_block is not None and j % every_block == 0:
                    found[f"layer{i}_blk{j}"] = x
            x = norm(x)  # the next stage goes on from here
            found[f"layer{i}"] = x
        return found

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    # -- learning to fill in

    def draw_mask(
        self, n: int, grid: tuple[int, int], *, generator: torch.Generator, ratio: tuple[float, float] = (0.5, 0.5)
    ) -> Float[Tensor, "n 1 h w"]:
        """Which positions of each sample are removed, 1, on the generator's device; the squares of `mask_patch_size` are removed independently.

        Args:
            n: number of samples.
            grid: positions of a patched image, its height and width over `input_patch_size`.
            generator: of the random numbers.
            ratio: the share that is removed is uniform between these for each sample; the paper's is 0.5 for all.

        Raises:
            ValueError: for a grid that squares do not tile, or a ratio outside [0, 1].
        """
        side, (low, high) = self.config.mask_patch_size, ratio if isinstance(ratio, tuple | list) and len(ratio) == 2 else (1, 0)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"ratio must satisfy 0 <= low <= high <= 1, got {ratio}; the paper's is (0.5, 0.5)")
        if min(grid) < 1 or grid[0] % side or grid[1] % side:
            raise ValueError(
                f"mask_patch_size must divide both sides of the grid, got {side} for {tuple(grid)}; crop the images or choose another mask_patch_size"
            )
        share = low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator, device=generator.device)
        cells = torch.rand(n, 1, grid[0] // side, grid[1] // side, generator=generator, device=generator.device) < share
        return cells.float().repeat_interleave(side, 2).repeat_interleave(side, 3)

    def forward(
        self,
        images: Float[Tensor, "n c h w"],
        mask: Float[Tensor, "n 1 _ _"],
        labels: Int[Tensor, " n"] | None = None,
        classification_weight: float = 0.0,
        return_dict: bool = True,
    ) -> MaskedAutoencoderOutput | tuple:
        """Fill in what is masked and classify what is seen.

        Args:
            images: both sides divisible by `input_patch_size`.
            mask: 1 for removed positions of the patched image, 0 for the others; see `draw_mask`.
            labels: in [0, num_classes); needed for a classification weight above 0.
            classification_weight: share of the classification loss, in [0, 1].
            return_dict: whether to return an output or a tuple of its entries that are not none.

        Raises:
            ValueError: for inputs that do not fit the configuration or each other.
        """
        self._check_images(images)
        self._check_mask(images, mask)
        self._check_labels(images, labels, classification_weight)
        patched, mask = self.patchify(images.float()), mask.float()
        maps = self._encode((patched * (1 - mask)).to(self.dtype))
        reconstruction = self._decode(maps)
        squared_error = (mask * (reconstruction.float() - patched).square()).sum((1, 2, 3))
        loss = reconstruction_loss = squared_error / (mask.sum((1, 2, 3)) + 1e-8)
        logits, classification_loss = self.classifier(maps["layer4"].mean((2, 3))), None
        if labels is not None:
            classification_loss = F.cross_entropy(logits.float(), labels.long(), reduction="none")
            loss = classification_weight * classification_loss + (1 - classification_weight) * reconstruction_loss
        output = MaskedAutoencoderOutput(loss, reconstruction_loss, classification_loss, self.unpatchify(reconstruction), logits)
        return output if return_dict else output.to_tuple()

    def _decode(self, maps: Mapping[str, Tensor]) -> Float[Tensor, "n p h w"]:
        x = self.bridge(maps["layer4"])
        for block, skip in zip(self.up_blocks, ("layer3", "layer2", "layer1", "conv1"), strict=True):
            x = self._run(block, x, maps[skip])
        return self.conv_out(x)

    # -- patches

    def patchify(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n p _ _"]:
        """Squares of pixels as channels, in the order (row, column, channel)."""
        side = self.config.input_patch_size
        return images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)

    def unpatchify(self, patched: Float[Tensor, "n p h w"]) -> Float[Tensor, "n c _ _"]:
        """The images of these patches."""
        side = self.config.input_patch_size
        return patched.unflatten(1, (side, side, -1)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)

    # -- bad inputs

    def _check_images(self, images: Tensor) -> None:
        channels, side = self.config.in_channels, self.config.input_patch_size
        if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape or not images.is_floating_point():
            raise ValueError(f"images must be floating point numbers [n, {channels}, h, w], none of them 0, got {_kind(images)}")
        if images.shape[2] % side or images.shape[3] % side:
            raise ValueError(
                f"input_patch_size must divide both sides of the images, got {side} for {list(images.shape)}; crop or resize them"
            )

    def _check_mask(self, images: Tensor, mask: Tensor) -> None:
        side = self.config.input_patch_size
        expected = [len(images), 1, images.shape[2] // side, images.shape[3] // side]
        if list(mask.shape) != expected or not mask.is_floating_point():
            raise ValueError(
                f"mask must be floating point numbers {expected} for images {list(images.shape)}, got {_kind(mask)}; see draw_mask"
            )
        if _readable(mask) and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must hold 1 for removed positions and 0 for the others, got other values or NaN; see draw_mask")

    def _check_labels(self, images: Tensor, labels: Tensor | None, weight: float) -> None:
        if not 0 <= weight <= 1:
            raise ValueError(f"classification_weight must lie in [0, 1], got {weight}; it is the share of the classification loss")
        if labels is None:
            if weight:
                raise ValueError(f"labels are needed for a classification_weight of {weight}; give them, or 0 to learn without labels")
            return
        size = self.config.num_classes
        if labels.shape != (len(images),) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers [{len(images)}] in [0, {size}), got {_kind(labels)}")
        if _readable(labels) and bool(((labels < 0) | (labels >= size)).any()):
            raise ValueError(f"labels must lie in [0, {size}), got values from {int(labels.min())} to {int(labels.max())}")


def _readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: on a GPU that waits for the device, and in a compiled graph it breaks the graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _check_config(config: Mapping[str, Any]) -> None:
    for name in ("in_channels", "input_patch_size", "mask_patch_size", "num_classes"):
        if not _natural(config[name]):
            raise ValueError(f"{name} must be an integer of at least 1, got {config[name]!r}")
    base = config["base_channels"]
    if not _natural(base) or base % GROUPS:
        raise ValueError(
            f"base_channels must be a multiple of {GROUPS}, the groups of every norm, got {base!r}; the release's encoders have 256 and 640"
        )
    layers = config["layers_per_stage"]
    if not isinstance(layers, tuple | list) or len(layers) != 4 or not all(map(_natural, layers)):
        raise ValueError(f"layers_per_stage must be 4 integers of at least 1, got {layers!r}; the paper's are (3, 4, 6, 3)")


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
