"""`on_gpu` lends a function a GPU of ZeroGPU, and does nothing elsewhere. To be imported before torch, as `spaces` wants it."""

from collections.abc import Callable
from typing import Any

try:
    from spaces import GPU
except ImportError:  # a folder of that name is no such package either

    def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
        return function
else:
    on_gpu = GPU(duration=15)  # seconds; a short time waits less in the queue
