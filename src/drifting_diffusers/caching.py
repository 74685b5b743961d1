"""Features of real samples that banks keep in place of the samples: how they are made, and how much memory they take, said before it is taken."""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from .config import DriftingConfig
from .objective import DriftingObjective

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may take."""


class Packing:
    """What a bank that keeps features keeps of samples [n, c, h, w].

    Features are made in batches of one size, filled up where there are fewer samples: with another size convolutions round otherwise, and a bank that is
    filled again on resuming must hold the same bits.

    Args:
        objective: whose features.
        size: of the batches.
        device: of the networks.
    """

    def __init__(self, objective: DriftingObjective, size: int, device: torch.device):
        self.objective, self.size, self.device = objective, size, device

    def __call__(self, samples: Tensor) -> Tensor:
        parts = []
        for part in samples.to(self.device).split(self.size):
            filled = torch.cat([part, part[:1].expand(self.size - len(part), *part.shape[1:])])
            parts.append(self.objective.pack(filled)[: len(part)])
        return torch.cat(parts)


def check_cache(config: DriftingConfig, numbers: int, *, classes: int, device: torch.device, tell: Callable[[str], object]) -> None:
    """Say how much memory the features in the banks will take.

    Args:
        config: of the run.
        numbers: that are kept per sample.
        classes: of the data.
        device: of the banks.
        tell: the user.

    Raises:
        ValueError: if it is more than is free, with what takes less.
    """
    kind = getattr(torch, config.bank_dtype)
    size = lambda samples: samples * numbers * kind.itemsize
    negatives = config.unconditional_bank_size if config.unconditional_per_label else 0
    samples = negatives if config.cache_features == "negatives" else negatives + classes * config.bank_size
    free, processes = free_memory(device), int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    name = f"cache_features={config.cache_features!r}"
    what = f"{samples:,} samples, {numbers:,} numbers of {config.bank_dtype} each: {_gigabytes(size(samples))}"
    where = f"{device.type}{f' in each of {processes} processes' if processes > 1 else ''}, {_gigabytes(free)} free"
    if size(samples) * processes <= free:
        tell(f"{name} keeps features of {what} on {where}")
        return
    less = []
    if config.cache_features is True and negatives:
        less.append(f"cache_features='negatives' ({_gigabytes(size(negatives))})")
    if kind.itemsize > 2:
        less.append("bank_dtype='bfloat16' (half of it; exact for maps of a network in bfloat16)")
    raise ValueError(f"{name} would keep features of {what} on {where}: take {', '.join([*less, 'smaller banks'])}, or leave it out")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken there, at most what a container leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no container, or not Linux
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"
