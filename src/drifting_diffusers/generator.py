r"""The one-step generator x = f(noise; class, guidance scale, style): a diffusion transformer without a time step (arXiv 2602.04770, section 4 and A.2).

The path of this module is file format: diffusers writes it into every published `model_index.json`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.activations import SwiGLU
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed_from_grid
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .blocks import (
    EPS,
    NORMS,
    DriftingAttention,
    DriftingBlock,
    drawing,
    embedding_sum,
    join,
    joined,
    mlp_width,
    modulate,
    rotary_tables,
    separate,
    token_norm,
)
from .convert import from_release
from .hub import PushWithCard
from .shapes import Float, Int


class DriftingGenerator(PushWithCard, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    r"""Noise in, sample out, in one call.

    The condition is class embedding + sum of style embeddings + 0.02 RMSNorm(MLP(Fourier(guidance scale))). It modulates every block and, projected,
    stands as `num_class_tokens` tokens before the patches. The output layer starts at zero, so an untrained generator returns zeros.

    Args:
        sample_size: height and width of a sample, one number or two.
        patch_size: side of the square patch that makes a token; it must divide both sides.
        in_channels: channels of the noise.
        out_channels: channels of the sample; those of the noise if not given.
        num_classes: number of class labels; 0 for an unconditional generator.
        num_layers: transformer blocks.
        num_attention_heads: heads per block.
        attention_head_dim: width of a head; even. The model's width is heads times this.
        mlp_ratio: width of the MLP over the width of the model, before SwiGLU's factor 2/3.
        condition_dim: width of the condition; that of the model if not given.
        num_class_tokens: in-context copies of the projected condition; 0 switches them off.
        num_style_tokens: style labels per sample, each with a codebook of its own; 0 switches them off.
        style_codebook_size: entries per codebook.
        activation: "swiglu" or "gelu".
        norm_type: "rms_norm" or "layer_norm", for tokens, queries and keys.
        qk_norm: whether queries and keys are normalised per head.
        rope: whether queries and keys are rotated by their place in the sequence, class tokens included.
        guidance_embedding: whether the generator is told the guidance scale.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DriftingBlock"]
    _repeated_blocks = ["DriftingBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "class_token_embed", "norm", "embedding"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | list[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_classes: int = 1000,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        condition_dim: int | None = None,
        num_class_tokens: int = 16,
        num_style_tokens: int = 32,
        style_codebook_size: int = 64,
        activation: str = "swiglu",
        norm_type: str = "rms_norm",
        qk_norm: bool = True,
        rope: bool = True,
        guidance_embedding: bool = True,
    ):
        super().__init__()
        height, columns = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        _check_numbers(self.config)
        _check_config(height, columns, patch_size, num_attention_heads, attention_head_dim, activation, norm_type)
        self.sample_height, self.sample_width = height, columns
        self.grid = (height // patch_size, columns // patch_size)
        self.out_channels = out_channels or in_channels
        width = num_attention_heads * attention_head_dim
        condition_dim = condition_dim or width

        self._embed_condition(condition_dim)
        self.patch_proj = nn.Linear(patch_size**2 * in_channels, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], width))
        if num_class_tokens:
            self.class_token_proj = nn.Linear(condition_dim, width)
            self.class_token_embed = nn.Parameter(torch.zeros(1, num_class_tokens, width))
        inner = mlp_width(width, mlp_ratio, activation)
        self.transformer_blocks = nn.ModuleList(
            DriftingBlock(num_attention_heads, attention_head_dim, condition_dim, inner, activation, norm_type, qk_norm)
            for _ in range(num_layers)
        )
        self.modulation_out = nn.Linear(condition_dim, 2 * width)
        self.norm_out = token_norm(norm_type, width)
        self.proj_out = nn.Linear(width, patch_size**2 * self.out_channels)
        self.gradient_checkpointing = False
        self._initialise()

    def _embed_condition(self, condition_dim: int) -> None:
        """What `condition` adds up."""
        config = self.config
        self.class_embedding = nn.Embedding(config.num_classes, condition_dim) if config.num_classes else None
        entries = config.num_style_tokens * config.style_codebook_size
        self.style_embedding = nn.Embedding(entries, condition_dim) if entries else None
        if config.guidance_embedding:
            self.guidance_fourier = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.guidance_embedder = TimestepEmbedding(256, condition_dim)
            self.guidance_norm = nn.RMSNorm(condition_dim, eps=EPS)

    def _initialise(self) -> None:
        """Xavier for matrices, N(0, 0.02) for embeddings and the guidance MLP, sines for positions, zero where adaLN-zero says so."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        _initialise_joint_matrices(self)
        for name, parameter in self.named_parameters():
            if name.endswith(("modulation.weight", "modulation_out.weight", "proj_out.weight")):
                nn.init.zeros_(parameter)
            elif name in ("guidance_embedder.linear_1.weight", "guidance_embedder.linear_2.weight", "class_token_embed"):
                nn.init.normal_(parameter, std=0.02)
        rows, columns = (torch.arange(n, dtype=torch.float32) for n in self.grid)
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))  # (2, rows, columns), the column first as in the release
        self.pos_embed.data.copy_(get_2d_sincos_pos_embed_from_grid(self.pos_embed.shape[-1], places, output_type="pt")[None])

    @classmethod
    def from_release(cls, source: str | os.PathLike, **kwargs: Any) -> "DriftingGenerator":
        """The reference release's generator, converted; see `convert.from_release` for sources and arguments."""
        return from_release(cls, "gen", source, **kwargs)

    def forward(
        self,
        noise: Float[Tensor, "b c h w"],
        class_labels: Int[Tensor, " b"] | None = None,
        guidance_scale: float | Float[Tensor, "*b"] = 1.0,
        style_labels: Int[Tensor, "b k"] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """One sample per noise.

        Args:
            noise: standard normal.
            class_labels: in [0, num_classes); not given for an unconditional generator.
            guidance_scale: one for all or one per sample, finite and above 0; 1 is no guidance. Without `guidance_embedding` only 1 is possible.
            style_labels: `num_style_tokens` per sample, in [0, style_codebook_size), uniformly drawn in training.
            return_dict: whether to return an output with `.sample` or a tuple.

        Raises:
            ValueError: for inputs that do not fit the configuration.
        """
        _check_inputs(self, noise, class_labels, guidance_scale, style_labels)
        condition = self.condition(noise, class_labels, guidance_scale, style_labels)
        tokens = self.patch_proj(self.patchify(noise)) + self.pos_embed
        if self.config.num_class_tokens:
            class_tokens = self.class_token_proj(condition)[:, None] + self.class_token_embed
            tokens = torch.cat([class_tokens, tokens], dim=1)
        rotary = self.rotary(tokens) if self.config.rope else None
        condition = nn.functional.silu(condition)
        *modulations, modulation_out = self._modulations(condition)
        for block, modulation in zip(self.transformer_blocks, modulations, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, condition, rotary)
            else:
                tokens = block(tokens, condition, rotary, modulation)
        tokens = tokens[:, self.config.num_class_tokens :]
        modulation_out = self.modulation_out(condition) if modulation_out is None else modulation_out
        shift, scale = modulation_out[:, None].chunk(2, dim=-1)
        sample = self.unpatchify(self.proj_out(modulate(self.norm_out(tokens), shift, scale)))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def condition(
        self, noise: Tensor, class_labels: Tensor | None, guidance_scale: float | Tensor, style_labels: Tensor | None
    ) -> Float[Tensor, "b d"]:
        """What every block is told: class, guidance scale and style, [b, condition_dim] in the precision of the noise."""
        condition = noise.new_zeros(())
        if self.class_embedding is not None:
            condition = condition + self.class_embedding(class_labels)
        if self.style_embedding is not None:
            first = torch.arange(self.config.num_style_tokens, device=noise.device) * self.config.style_codebook_size
            condition = condition + embedding_sum(self.style_embedding, style_labels + first)
        if self.config.guidance_embedding:
            scale = torch.as_tensor(guidance_scale, dtype=torch.float32, device=noise.device).expand(noise.shape[0])
            embedded = self.guidance_embedder(self.guidance_fourier(scale).to(noise.dtype))
            condition = condition + 0.02 * self.guidance_norm(embedded)
        return condition.expand(noise.shape[0], self.modulation_out.in_features)

    def rotary(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotation, each [tokens, head_dim], in float32 whatever the model runs in."""
        return rotary_tables(self.config.attention_head_dim, tokens)

    def fuse_modulation(self) -> None:
        """Lay the weights that project the condition behind each other in memory, so that a call without gradients projects it once for all blocks.

        Names, shapes and values of the weights stay as they are, so saving, loading, adapters and training do as well. A call finds out by itself
        whether it holds: after a move or a cast (`.to`), with adapters or hooks on these layers, in training and when compiled, every block projects
        for itself, as without this.

        Raises:
            ValueError: if these layers are not plain, or not all in one place.
        """
        join(self._projections())

    def unfuse_modulation(self) -> None:
        """Undo `fuse_modulation`."""
        separate(self._projections())

    @property
    def fused_modulation(self) -> bool:
        """Whether a call without gradients, with inputs where the weights are, projects the condition once."""
        return joined(self._projections(), self.modulation_out.weight) is not None

    def _projections(self) -> list[Any]:
        return [*(block.modulation for block in self.transformer_blocks), self.modulation_out]

    def _modulations(self, condition: Float[Tensor, "b d"]) -> Sequence[Tensor | None]:
        """What every block, and then the output, takes of the condition; None where they project it themselves."""
        layers = self._projections()
        found = joined(layers, condition) if drawing() else None
        if found is None:
            return [None] * len(layers)
        return nn.functional.linear(condition, *found).split([layer.out_features for layer in layers], dim=-1)

    def patchify(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t p"]:
        """Tokens in row-major order, each the (row, column, channel) values of its patch."""
        side = self.config.patch_size
        return images.unflatten(2, (-1, side)).unflatten(4, (-1, side)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: Float[Tensor, "b t p"]) -> Float[Tensor, "b c h w"]:
        side = self.config.patch_size
        grid = tokens.unflatten(1, self.grid).unflatten(3, (side, side, -1))  # (b, rows, columns, side, side, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _initialise_joint_matrices(model: nn.Module) -> None:
    """Xavier's fans are those of the release's matrices: q, k and v are one, the halves of SwiGLU are two."""
    for module in model.modules():
        if isinstance(module, DriftingAttention):
            for linear in (module.to_q, module.to_k, module.to_v):
                nn.init.xavier_uniform_(linear.weight, gain=0.5**0.5)  # sqrt(6 / 4d) for sqrt(6 / 2d)
        elif isinstance(module, SwiGLU):
            for half in module.proj.weight.data.chunk(2):
                nn.init.xavier_uniform_(half)


LEAST = {
    "in_channels": 1, "out_channels": 1, "num_classes": 0, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 2, "condition_dim": 1,
    "num_class_tokens": 0, "num_style_tokens": 0, "style_codebook_size": 1,
}  # fmt: skip
WAYS_OUT = {
    "out_channels": "leave it out for those of the noise",
    "condition_dim": "leave it out for the width of the model",
    "num_classes": "0 makes an unconditional generator",
    "num_class_tokens": "0 switches them off",
    "num_style_tokens": "0 switches them off",
    "style_codebook_size": "num_style_tokens=0 switches styles off",
}


def _check_numbers(config: Mapping[str, Any]) -> None:
    for name, least in LEAST.items():
        value = config[name]
        left_out = value is None and name in ("out_channels", "condition_dim")
        if not left_out and not (isinstance(value, int) and value >= least):
            hint = f"; {WAYS_OUT[name]}" if name in WAYS_OUT else ""
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}{hint}")
    if not _finite_and_positive(config["mlp_ratio"]):
        raise ValueError(f"mlp_ratio must be finite and above 0, got {config['mlp_ratio']!r}; the paper's is 4")


def _finite_and_positive(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and float(value) > 0


def _check_config(height: int, columns: int, patch_size: int, heads: int, head_dim: int, activation: str, norm_type: str) -> None:
    if min(height, columns) < 1:
        raise ValueError(f"sample_size must be at least 1, got {height} x {columns}")
    if patch_size < 1 or height % patch_size or columns % patch_size:
        raise ValueError(f"patch_size must divide both sides of sample_size, got {patch_size} for {height} x {columns}")
    if head_dim % 2:
        raise ValueError(f"attention_head_dim must be even, got {head_dim}: rotations act on pairs")
    if heads * head_dim % 4:
        raise ValueError(
            f"num_attention_heads * attention_head_dim must be a multiple of 4, got {heads} * {head_dim}: places are sines and "
            f"cosines of rows and columns"
        )
    if activation not in ("swiglu", "gelu"):
        raise ValueError(f'activation must be "swiglu" or "gelu", got {activation!r}')
    if norm_type not in NORMS:
        raise ValueError(f"norm_type must be one of {tuple(NORMS)}, got {norm_type!r}")


def _check_inputs(
    model: DriftingGenerator, noise: Tensor, class_labels: Tensor | None, guidance_scale: Any, style_labels: Tensor | None
) -> None:
    config, b = model.config, noise.shape[0]  # len() would be a fixed number in an exported graph
    if not b:
        raise ValueError(f"noise must hold at least one sample, got {list(noise.shape)}: leave out the call for an empty batch")
    if noise.shape[1:] != (config.in_channels, model.sample_height, model.sample_width):
        raise ValueError(
            f"noise must be [b, {config.in_channels}, {model.sample_height}, {model.sample_width}], got {list(noise.shape)}; "
            f"another size needs a generator built with that sample_size"
        )
    _check_labels("class_labels", class_labels, [b], config.num_classes, needed=config.num_classes > 0)
    _check_labels(
        "style_labels", style_labels, [b, config.num_style_tokens], config.style_codebook_size, needed=config.num_style_tokens > 0
    )
    _check_guidance(guidance_scale, b, embedded=config.guidance_embedding)


def _check_guidance(scale: Any, b: int, *, embedded: bool) -> None:
    if not embedded:
        if not (isinstance(scale, Real) and scale == 1):
            raise ValueError(f"this generator was built without guidance_embedding, so guidance_scale must stay 1.0, got {scale}")
        return
    if isinstance(scale, Tensor) and scale.ndim and scale.shape != (b,):
        raise ValueError(f"guidance_scale must be one number or one per sample, [{b}], got {list(scale.shape)}")
    if torch.compiler.is_compiling():
        return
    if isinstance(scale, Tensor):  # as with labels, values on a GPU are not looked at
        fits = scale.device.type != "cpu" or bool((scale.isfinite() & (scale > 0)).all())
    else:
        fits = _finite_and_positive(scale)
    if not fits:
        raise ValueError(f"guidance_scale must be finite and above 0 (1 is no guidance), got {scale!r}")


def _check_labels(name: str, labels: Tensor | None, shape: list[int], size: int, *, needed: bool) -> None:
    if not needed:
        if labels is not None:
            raise ValueError(f"this generator takes no {name}, got {list(labels.shape)}: leave them out")
        return
    if labels is None:
        raise ValueError(f"{name} are needed: integers {shape} in [0, {size})")
    if list(labels.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(labels.shape)}")
    # On a GPU looking at the values would wait for the device; the pipeline checks them before they go there.
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= size:
            raise ValueError(f"{name} must lie in [0, {size}), got values from {low} to {high}")
