"""Memory that calls on a CPU use again.

Fresh memory comes from the system page by page, each zeroed at its first touch, and large tensors go back to the system when they are freed. On steps of some megabytes that
was half of a field's time. On other devices torch keeps memory by itself.
"""

import math
import threading

import torch
from torch import Tensor

KEPT = 2**26
"""Bytes that are kept per thread between calls."""
MOST = 64
"""Blocks that are kept."""


class Workspace(threading.local):
    """Blocks of memory that nobody uses, the latest last."""

    def __init__(self):
        self.free: list[Tensor] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with anything in it."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        fitting = [block for block in self.free if size <= block.numel() <= 2 * size]
        if fitting:
            block = min(fitting, key=len)
            self.free = [other for other in self.free if other is not block]
        else:
            with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside
                block = torch.empty(size, dtype=torch.uint8)
        return block[:size].view(dtype).view(shape)

    def give(self, tensor: Tensor) -> None:
        """Take back what `take` gave and nobody looks at any more; the oldest blocks go where there are too many."""
        if tensor.device.type != "cpu":
            return
        with torch.inference_mode(False):
            block = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        if 0 < len(block) <= KEPT:
            self.free.append(block)
        while len(self.free) > MOST or sum(map(len, self.free)) > KEPT:
            self.free.pop(0)


WORKSPACE = Workspace()
