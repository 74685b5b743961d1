"""Time and memory of one call of every field, each in a process of its own: as many queries as positives and own negatives, in 128 dimensions. On Linux."""

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from field_rows import rows

DIMENSIONS = 128
CODE = """
import json, sys, time
import torch
from drifting_diffusers.fields import Situation, read_field, situated
torch.set_num_threads(1)
size, d = int(sys.argv[2]), int(sys.argv[3])
field = situated(read_field(sys.argv[1]), Situation(0, 1000))
x, y = (torch.randn(1, size, d, generator=torch.Generator().manual_seed(i)) for i in range(2))
field(x[:, :64], positives=y[:, :64], negatives=x[:, :64], own=64)
status = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak of the imports is not the call's
before, started = status("VmRSS"), time.perf_counter()
field(x, positives=y, negatives=x, own=size)
print(json.dumps({"seconds": time.perf_counter() - started, "megabytes": status("VmHWM") - before}))
"""


def measure(text: str, size: int) -> dict:
    done = subprocess.run([sys.executable, "-c", CODE, text, str(size), str(DIMENSIONS)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def jobs(args: Any) -> Iterable[tuple[str, Any, dict]]:
    from fields import temperatures

    chosen = temperatures(args.output_dir)
    for name, row in rows().items():
        yield name, measure, {"text": row.field(chosen.get(row.like or name)), "size": args.size}
