r"""Averaged weights: theta' <- decay theta' + (1 - decay) theta after every step, for one decay or several side by side.

The average starts at the initial weights, as in the reference release, and the decay is what it says from the first step on: diffusers' `EMAModel`
ramps it up and needs many times 1/(1 - decay) steps to get there.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Copies of a network that hold its averaged weights, in full on every process, sharded or not.

    Args:
        model: the network, before it is wrapped or sharded.
        decays: one copy for each, by its decay.
    """

    def __init__(self, model: nn.Module, decays: Sequence[float]):
        self.models = {decay: copy.deepcopy(model).requires_grad_(False) for decay in decays}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of the network as they are now."""
        current = [whole(p) for p in model.parameters()]
        for decay, averaged in self.models.items():
            torch._foreach_lerp_(list(averaged.parameters()), current, 1 - decay)
            for kept, buffer in zip(averaged.buffers(), model.buffers(), strict=True):
                kept.copy_(whole(buffer))

    def state_dict(self) -> dict[str, Any]:
        return {str(decay): model.state_dict() for decay, model in self.models.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for decay, model in self.models.items():
            model.load_state_dict(state[str(decay)])


def whole(tensor: Tensor) -> Tensor:
    """A parameter as one tensor, gathered where it is sharded (FSDP2)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
