"""The networks that `inference.py` measures, with random weights."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel
from torch import Tensor, nn

from drifting_diffusers import DriftingGenerator

B, L, XL = {"num_layers": 12, "num_attention_heads": 12}, {"num_layers": 24, "num_attention_heads": 16}, {"num_layers": 28}
PIXELS = {"sample_size": 256, "patch_size": 16, "in_channels": 3}
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}


def made(bench: Any, kind: Any, **config: Any) -> Any:
    """On the device from the beginning: random numbers for half a billion weights take long elsewhere."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        return kind(**config).eval().to(bench.device, bench.dtype)


def ours(bench: Any, **size: Any) -> DriftingGenerator:
    return made(bench, DriftingGenerator, **size | (TINY if bench.small else {}))


def dit(bench: Any, **size: Any) -> DiTTransformer2DModel:
    heads = {"num_attention_heads": 16, "attention_head_dim": 72 if size["num_layers"] == XL["num_layers"] else 64}
    common = {"sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000}
    return made(bench, DiTTransformer2DModel, **common | heads | size | (TINY if bench.small else {}))


def autoencoder(bench: Any, kind: str = "AutoencoderKL") -> Any:
    if kind == "AutoencoderTiny":
        width = (8,) * 4 if bench.small else (64,) * 4
        return made(bench, AutoencoderTiny, encoder_block_out_channels=width, decoder_block_out_channels=width)
    width, groups = ((8, 16, 16, 16), 4) if bench.small else ((128, 256, 512, 512), 32)
    types = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    rest = {"layers_per_block": 1 if bench.small else 2, "norm_num_groups": groups, "latent_channels": 4}
    return made(bench, AutoencoderKL, **types, **rest, block_out_channels=width)


def call_of(bench: Any, model: Any, batch: int) -> Callable[[], Tensor]:
    """One network call with inputs that are there."""
    config, rng = model.config, torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.in_channels, *[config.sample_size] * 2, generator=rng).to(bench.device, bench.dtype)
    labels = torch.randint(1000, (batch,), generator=rng).to(bench.device)
    if isinstance(model, DiTTransformer2DModel):
        return lambda: model(x, torch.full_like(labels, 500), labels).sample
    style = torch.randint(64, (batch, 32), generator=rng).to(bench.device)
    scale = torch.full((batch,), 1.5, device=bench.device)
    return lambda: model(x, labels, scale, style).sample


def products(model: nn.Module, call: Callable[[], Any]) -> Callable[[], Any]:
    """The linear layers of a call, each with the inputs that it has there, and nothing between them."""
    given: list[tuple[nn.Module, Tensor]] = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(lambda layer, inputs, _: given.append((layer, inputs[0].clone()))) for layer in layers]
    call()
    for hook in hooks:
        hook.remove()
    return lambda: [layer(inputs) for layer, inputs in given]
