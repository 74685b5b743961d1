"""`on_gpu` lends a function a GPU of ZeroGPU, and does nothing elsewhere. To be imported before torch, as `spaces` wants it."""

from collections.abc import Callable
from typing import Any

try:
    import spaces
except ImportError:

    def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
        return function
else:
    on_gpu = spaces.GPU(duration=15)  # seconds; a short time waits less in the queue
