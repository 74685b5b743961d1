r"""What a `DriftingGenerator` repeats: tokens + gate * f(scale * norm(tokens) + shift), with f attention and then the MLP (adaLN-zero).

Every formula stands here twice where that pays: as it reads, for training and for compilers, which fuse it themselves; and for drawing, without
gradients, in fewer passes over memory. Both are the same numbers up to rounding, and no tensor that a hook may have seen is written to.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from diffusers.models.activations import SwiGLU
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from torch import Tensor, nn

from .shapes import Float, Int

EPS = 1e-6  # of every norm in the release
NORMS: dict[str, type[nn.Module]] = {"rms_norm": nn.RMSNorm, "layer_norm": nn.LayerNorm}

# diffusers annotates these more narrowly than they are.
apply_rotary: Any = apply_rotary_emb
make_tables: Any = get_1d_rotary_pos_embed


def drawing() -> bool:
    """Whether nothing is recorded, neither for gradients nor by a compiler or exporter."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


# -- rotations


def rotary_tables(head_dim: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for tokens [b, t, _], each [t, head_dim], in float32; made once for every length on every device."""
    plain = drawing() and type(tokens) is Tensor  # neither a compiler's stand-in nor a share of a tensor
    return (_kept_tables if plain else _tables)(head_dim, tokens.shape[1], tokens.device)


def _tables(head_dim: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return make_tables(head_dim, torch.arange(length, device=device), use_real=True, repeat_interleave_real=False)


@lru_cache(maxsize=16)
def _kept_tables(head_dim: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be used outside of it
        return _tables(head_dim, length, device)


def rotate(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys [b, t, h, d], pairs (i, i + d/2) turned by the angle of their token, computed in float32 where the input is of 16 bits."""
    if not drawing():
        return apply_rotary(heads, rotary, use_real_unbind_dim=-2, sequence_dim=1)
    cosines, sines = (table[:, None, :] for table in rotary)
    half = heads.shape[-1] // 2
    turned = heads * cosines
    turned[..., :half].addcmul_(heads[..., half:], sines[..., :half], value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sines[..., half:])
    return turned.to(heads.dtype)


# -- layers


class DriftingAttnProcessor:
    """Scaled dot-product attention through diffusers' dispatcher, so that `set_attention_backend` works."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "DriftingAttention", hidden_states: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (t.unflatten(-1, (attn.heads, -1)) for t in (query, key, value))  # (b, tokens, heads, head_dim)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        mixed = dispatch_attention_fn(query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config)
        return attn.to_out[1](attn.to_out[0](mixed.flatten(2)))


class DriftingAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = DriftingAttnProcessor
    _available_processors = [DriftingAttnProcessor]
    processor: Any

    def __init__(self, heads: int, head_dim: int, norm: type[nn.Module] | None):
        super().__init__()
        width = heads * head_dim
        self.heads, self.use_bias = heads, True
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])  # diffusers' layout, which LoRA tools expect
        self.norm_q = norm(head_dim, eps=EPS) if norm else nn.Identity()
        self.norm_k = norm(head_dim, eps=EPS) if norm else nn.Identity()
        self.set_processor(cast(Any, self._default_processor_cls()))

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.processor(self, hidden_states, rotary)


class GatedUnit(SwiGLU):
    """diffusers' SwiGLU, whose two matrices are one product already, with one large tensor less per call."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not drawing():
            return super().forward(hidden_states)
        value, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(value)


class DriftingBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero)."""

    def __init__(self, heads: int, head_dim: int, condition_dim: int, mlp_width: int, activation: str, norm_type: str, qk_norm: bool):
        super().__init__()
        width = heads * head_dim
        self.modulation = nn.Linear(condition_dim, 6 * width)
        self.norm1 = token_norm(norm_type, width)
        self.attn = DriftingAttention(heads, head_dim, NORMS[norm_type] if qk_norm else None)
        self.norm2 = token_norm(norm_type, width)
        self.ff = FeedForward(width, inner_dim=mlp_width, activation_fn=activation)
        if activation == "swiglu":
            self.ff.net[0] = GatedUnit(width, mlp_width)

    def forward(self, tokens: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor] | None, modulation: Tensor | None = None) -> Tensor:
        """Tokens [b, t, width]. `modulation` [b, 6 * width] is what the condition is projected to, where that was done for all blocks at once."""
        projected = self.modulation(condition) if modulation is None else modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = projected[:, None].chunk(6, dim=-1)  # each (b, 1, width)
        tokens = gated(tokens, gate1, self.attn(modulate(self.norm1(tokens), shift1, scale1), rotary))
        return gated(tokens, gate2, self.ff(modulate(self.norm2(tokens), shift2, scale2)))


def token_norm(norm_type: str, width: int) -> nn.Module:
    """RMSNorm keeps its weight; LayerNorm has none, the modulation does that."""
    return nn.RMSNorm(width, eps=EPS) if norm_type == "rms_norm" else nn.LayerNorm(width, eps=EPS, elementwise_affine=False)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, tokens, 1 + scale) if drawing() else tokens * (1 + scale) + shift


def gated(tokens: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    return torch.addcmul(tokens, gate, change) if drawing() else tokens + gate * change


def mlp_width(width: int, mlp_ratio: float, activation: str) -> int:
    """Two thirds for SwiGLU, which has three matrices, rounded up to a multiple of 32."""
    inner = int(width * mlp_ratio)
    return inner if activation == "gelu" else -(-int(2 / 3 * inner) // 32) * 32


def embedding_sum(embedding: nn.Module, indices: Int[Tensor, "b k"]) -> Float[Tensor, "b d"]:
    """The sum of k embeddings, without the k of them in memory where nothing listens to the layer."""
    if drawing() and is_plain(embedding, nn.Embedding):
        return nn.functional.embedding_bag(indices, cast(Tensor, embedding.weight), mode="sum")
    return embedding(indices).sum(1)  # (b, k, d) -> (b, d)


# -- layers whose weights lie behind each other


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is what its class says: no adapter, no quantised weight, no hook, nothing moved or cast when it is called."""
    listens = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is kind and type(layer.weight) is nn.Parameter and not listens


def join(layers: Sequence[Any]) -> None:
    """Lay weights and biases of layers behind each other in memory. Names, shapes and values stay, and nothing is held twice.

    Raises:
        ValueError: if a layer is no plain `nn.Linear`, or they are not all on one device and of one type.
    """
    kinds = {(layer.weight.device, layer.weight.dtype) for layer in layers}
    if not all(is_plain(layer, nn.Linear) for layer in layers) or len(kinds) > 1:
        raise ValueError(
            "only plain nn.Linear layers on one device and of one type can be laid together: fuse adapters, remove hooks of offloading, and leave "
            "quantised weights as they are"
        )
    for name in ("weight", "bias"):
        whole = torch.cat([getattr(layer, name).detach() for layer in layers])
        for layer, part in zip(layers, whole.split([layer.out_features for layer in layers]), strict=True):
            getattr(layer, name).data = part


def separate(layers: Sequence[Any]) -> None:
    """Undo `join`: each layer has memory of its own again."""
    for layer in layers:
        layer.weight.data, layer.bias.data = layer.weight.data.clone(), layer.bias.data.clone()


def joined(layers: Sequence[Any], inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of all layers as one, if they lie behind each other, now, where the inputs are; None if they do not.

    It is asked at every call and nothing is remembered: in whatever way a layer was moved, cast, replaced, wrapped or given other weights, the answer
    is of the weights that it would use.
    """
    first = layers[0]
    fits = lambda layer: is_plain(layer, nn.Linear) and (layer.weight.device, layer.weight.dtype) == (inputs.device, inputs.dtype)
    if not all(fits(layer) for layer in layers):
        return None
    rows = sum(layer.out_features for layer in layers)
    if not _behind([layer.weight for layer in layers]) or not _behind([layer.bias for layer in layers]):
        return None
    columns = first.in_features
    weight = first.weight.detach().as_strided((rows, columns), (columns, 1))
    return weight, first.bias.detach().as_strided((rows,), (1,))


def _behind(tensors: Sequence[Tensor]) -> bool:
    """Whether each begins, in the same memory, where the one before it ends."""
    place = tensors[0].storage_offset()
    for tensor in tensors:
        if tensor.storage_offset() != place or not tensor.is_contiguous():
            return False
        place += tensor.numel()
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
