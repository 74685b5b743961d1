"""How fast is an image drawn, and by what? OMP_NUM_THREADS=1 python benchmarks/inference.py

Random weights, nothing is loaded. The parts, which --only picks:

  dit        a call of our generator beside diffusers' DiT of equal width and depth, at equal tokens and with our 16 class tokens more
  generator  seconds per image and peak memory of B/2 and L/2 on latents of 32 x 32 x 4, and of B/16 on 256 x 256 pixels
  decoder    the same of an AutoencoderKL of Stable Diffusion's size and of an AutoencoderTiny of TAESD's, which is for previews
  savings    each optimisation with it and without
  pipeline   what a pipeline takes beyond its generator and its decoder
  steps      the whole way to an image beside diffusers' DiTPipeline of XL/2 with guidance, at 50 and 250 steps

On a CPU: processor time on one thread, variants interleaved, the fastest of several rounds; the first variant runs twice a round, which shows the noise, and
50 and 250 steps are extrapolated from one and two. On a GPU: CUDA events in bfloat16, all steps, compiled blocks and CUDA graphs as well.
"""

import argparse
import ctypes
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DDIMScheduler, DiTPipeline
from diffusers.models.activations import SwiGLU
from diffusers.utils import logging
from inference_models import PIXELS, XL, B, L, autoencoder, call_of, dit, ours, products
from torch import Tensor, nn

from drifting_diffusers import DriftingGenerator, DriftingPipeline, blocks, generator
from drifting_diffusers.optimisation import compile_trouble

XLA = {1: 0.62, 4: 2.33}  # CPU seconds of a B/2 call in float32, the reference compiled by XLA, two threads of another machine
MEGABYTE = 1e6


class Bench:
    """Where and how long is measured, and what was found."""

    def __init__(self, options: argparse.Namespace):
        self.device, self.small = torch.device(options.device), options.small
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.rounds, self.batches = 2 if self.small else options.rounds, (1, 2) if self.small else options.batches
        self.rows: list[dict[str, Any]] = []

    def row(self, part: str, row: str, value: float, unit: str, *, goal: float | None = None, better: str = "lower", **more: Any) -> None:
        self.rows.append({"part": part, "row": row, "value": value, "unit": unit, "goal": goal, "better": better, "note": "", **more})

    def seconds(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            started = time.process_time()
            call()
            return time.process_time() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def clock(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if self.cuda else time.process_time()

    def interleaved(self, calls: dict[str, Callable[[], Any]], rounds: int | None = None) -> dict[str, float]:
        """The fastest of each, in seconds; the first once more as "again"."""
        calls = calls | {"again": next(iter(calls.values()))}
        best = dict.fromkeys(calls, float("inf"))
        for warming in (*(True,) * (3 if self.cuda else 1), *(False,) * (rounds or self.rounds)):
            for name, call in calls.items():
                took = self.seconds(call)
                best[name] = best[name] if warming else min(best[name], took)
        return best

    def peak(self, call: Callable[[], Any]) -> float:
        """MB above what was there before the call."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - before) / MEGABYTE
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left free is not there before
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before


def _status(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1000


def noise(found: dict[str, float]) -> float:
    return abs(found["again"] / next(iter(found.values())) - 1)


# -- parts


def part_dit(bench: Bench) -> None:
    for name, size, batches in (("B/2", B, (1, 4)), ("L/2", L, (1,))):
        models = {
            "DiT": dit(bench, **size),
            "equal tokens": ours(bench, **size, num_class_tokens=0),
            "with 16 class tokens": ours(bench, **size),
        }
        models["equal tokens"].fuse_modulation()
        models["with 16 class tokens"].fuse_modulation()
        for batch in batches:
            calls = {kind: call_of(bench, model, batch) for kind, model in models.items()}
            found = bench.interleaved(calls | {"products": products(models["with 16 class tokens"], calls["with 16 class tokens"])})
            bare = found["with 16 class tokens"] / found["products"]
            bench.row("dit", f"{name}, batch {batch}: our call / its linear layers alone", bare, "times", noise=noise(found))
            for kind in list(models)[1:]:
                goal = 1.0 if kind == "equal tokens" else None
                note = f"diffusers' takes {found['DiT']:.3g} s"
                text = f"{name}, batch {batch}: our call / diffusers' DiT, {kind}"
                bench.row("dit", text, found[kind] / found["DiT"], "times", goal=goal, noise=noise(found), note=note)
            if name == "B/2" and not bench.cuda and not bench.small:
                beside = f"the reference compiled by XLA took {XLA[batch]} s of CPU on two threads of ANOTHER machine"
                seconds = found["with 16 class tokens"]
                bench.row("dit", f"B/2, batch {batch}: our call", seconds, "s", goal=XLA[batch], noise=noise(found), note=beside)


def part_generator(bench: Bench) -> None:
    for name, size in (("B/2", B), ("L/2", L), ("B/16 pixels", B | PIXELS)):
        model = ours(bench, **size)
        for batch in bench.batches:
            _per_image(bench, "generator", name, call_of(bench, model, batch), batch)
        if bench.cuda and name == "B/2":
            _compiled(bench, name, model)


def _per_image(bench: Bench, part: str, name: str, call: Callable[[], Any], batch: int) -> None:
    found = bench.interleaved({"call": call}, rounds=bench.rounds if batch == 1 else 2 if batch < 16 else 1)
    memory = bench.peak(call)
    text = f"{name}, batch {batch}: per image"
    bench.row(part, text, found["call"] / batch, "s", noise=noise(found), memory=memory, images_per_second=batch / found["call"])


def _compiled(bench: Bench, name: str, model: DriftingGenerator) -> None:
    """CUDA graphs against eager calls, batch 1."""
    eager = bench.interleaved({"eager": call_of(bench, model, 1)})
    model.compile(mode="reduce-overhead", dynamic=False)
    graphs = bench.interleaved({"graphs": call_of(bench, model, 1)})
    text = f"{name}, batch 1: eager / CUDA graphs"
    bench.row("generator", text, eager["eager"] / graphs["graphs"], "times", goal=3.0, better="higher", noise=noise(graphs))


def part_decoder(bench: Bench) -> None:
    side = 8 if bench.small else 32
    for kind in ("AutoencoderKL", "AutoencoderTiny"):
        vae = autoencoder(bench, kind).to(memory_format=torch.channels_last)
        for batch in bench.batches:
            latents = torch.randn(batch, 4, side, side).to(bench.device, bench.dtype)
            _per_image(bench, "decoder", f"{kind}, channels_last", partial(vae.decode, latents), batch)


def part_savings(bench: Bench) -> None:
    model = ours(bench, **B)
    for batch in bench.batches[:2]:
        call = call_of(bench, model, batch)
        for name, without in WITHOUT.items():
            _saving(bench, name, batch, call, partial(_inside, without, model, call))
        model.fuse_modulation()
        apart = partial(_inside, lambda model: patch.object(generator, "joined", lambda *_: None), model, call)
        _saving(bench, "one projection for all blocks", batch, call, apart)
        model.unfuse_modulation()
        _saving(bench, "SDPA, beside explicit attention", batch, call, partial(_inside, _explicit, model, call))
    vae, latents = autoencoder(bench), torch.randn(1, 4, *[8 if bench.small else 32] * 2).to(bench.device, bench.dtype)
    last = autoencoder(bench).to(memory_format=torch.channels_last)
    _saving(bench, "channels_last, SD's decoder", 1, partial(last.decode, latents), partial(vae.decode, latents))
    half = ours(bench, **B).to(torch.bfloat16 if bench.dtype == torch.float32 else torch.float32)
    bench_half = argparse.Namespace(device=bench.device, dtype=half.dtype)
    calls = {bench.dtype: call_of(bench, model, 1), half.dtype: call_of(bench_half, half, 1)}
    _saving(bench, "bfloat16", 1, calls[torch.bfloat16], calls[torch.float32])
    if compile_trouble(bench.device) is None:
        compiled = ours(bench, **B)
        compiled.compile_repeated_blocks()
        _saving(bench, "compile_repeated_blocks", 1, call_of(bench, compiled, 1), call_of(bench, model, 1))


def _saving(bench: Bench, name: str, batch: int, with_it: Callable, without: Callable) -> None:
    found = bench.interleaved({"with": with_it, "without": without})
    memory = (bench.peak(with_it), bench.peak(without))
    note = f"peak MB with {memory[0]:.0f}, without {memory[1]:.0f}"
    text = f"{name}, batch {batch}: without / with"
    bench.row("savings", text, found["without"] / found["with"], "times", better="higher", noise=noise(found), note=note)


def _inside(context: Callable[[Any], Any], model: DriftingGenerator, call: Callable[[], Any]) -> None:
    with context(model):
        call()


def _plain_rotation(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    return blocks.apply_rotary(heads, rotary, use_real_unbind_dim=-2, sequence_dim=1)


def _two_products(self: SwiGLU, x: Tensor) -> Tensor:
    """SwiGLU as two layers."""
    (value, gate), (a, b) = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
    return nn.functional.silu(nn.functional.linear(x, gate, b)).mul_(nn.functional.linear(x, value, a))


@contextmanager
def _all_plain(model: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for module in (blocks, generator):
            stack.enter_context(patch.object(module, "drawing", lambda: False))
        yield


@contextmanager
def _explicit(model: DriftingGenerator) -> Iterator[None]:
    model.set_attention_backend("_native_math")
    yield
    model.set_attention_backend("native")


@contextmanager
def _two_passes(model: Any) -> Iterator[None]:
    with (
        patch.object(blocks, "modulate", lambda tokens, shift, scale: tokens * (1 + scale) + shift),
        patch.object(generator, "modulate", lambda tokens, shift, scale: tokens * (1 + scale) + shift),
        patch.object(blocks, "gated", lambda tokens, gate, change: tokens + gate * change),
    ):
        yield


WITHOUT: dict[str, Callable[[Any], Any]] = {
    "all formulas in fewer passes": _all_plain,
    "rotation in fewer passes": lambda model: patch.object(blocks, "rotate", _plain_rotation),
    "SwiGLU with one tensor less": lambda model: patch.object(blocks.GatedUnit, "forward", SwiGLU.forward),
    "SwiGLU as one product, not two": lambda model: patch.object(blocks.GatedUnit, "forward", _two_products),
    "modulation in one pass": _two_passes,
    "cached RoPE tables": lambda model: patch.object(blocks, "_kept_tables", blocks._tables),
    "one gather-sum for style": lambda model: patch.object(generator, "embedding_sum", lambda layer, indices: layer(indices).sum(1)),
}


def part_pipeline(bench: Bench) -> None:
    """The share of a call that is neither the generator's nor the decoder's, within the same calls."""
    small = {"sample_size": 8} if bench.small else {}
    latent = lambda kind: DriftingPipeline(ours(bench, **B | small), vae=autoencoder(bench, kind))
    pipes = {"B/2, SD's decoder": latent("AutoencoderKL"), "B/2, TAESD's decoder": latent("AutoencoderTiny")}
    pipes["B/16 pixels"] = DriftingPipeline(ours(bench, **B | PIXELS))
    for name, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        for batch in (1, 4) if name != "B/2, SD's decoder" else (1,):
            shares = [_beyond(bench, pipe, batch) for _ in range(bench.rounds + 1)][1:]
            bench.row(
                "pipeline",
                f"{name}, batch {batch}: beyond generator and decoder",
                min(shares),
                "share",
                goal=0.03,
                noise=max(shares) - min(shares),
            )
    if bench.cuda:
        _throughput(bench, pipes["B/2, SD's decoder"])


def _beyond(bench: Bench, pipe: DriftingPipeline, batch: int) -> float:
    inside = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            started = bench.clock()
            found = call(*args, **kwargs)
            inside += bench.clock() - started
            return found

        return run

    with ExitStack() as stack:
        stack.enter_context(patch.object(pipe.transformer, "forward", timed(pipe.transformer.forward)))
        if pipe.vae is not None:
            stack.enter_context(patch.object(pipe.vae, "decode", timed(pipe.vae.decode)))
        started = bench.clock()
        pipe(list(range(batch)), output_type="pt", generator=torch.Generator().manual_seed(0))
        return (bench.clock() - started) / inside - 1


def _throughput(bench: Bench, pipe: DriftingPipeline) -> None:
    print(pipe.optimize("graphs"))
    batch = 64
    found = bench.interleaved({"call": lambda: pipe(list(range(batch)), output_type="pt")})
    text = f"B/2, SD's decoder, batch {batch}, optimize('graphs'): images per second"
    bench.row("pipeline", text, batch / found["call"], "images/s", goal=500, better="higher", noise=noise(found))


def part_steps(bench: Bench) -> None:
    vae = autoencoder(bench).to(memory_format=torch.channels_last)
    size = {"sample_size": 8} if bench.small else {}
    theirs = DiTPipeline(dit(bench, **XL | size), vae, DDIMScheduler())
    pipes = {name: DriftingPipeline(ours(bench, **kind | size), vae=vae) for name, kind in (("B/2", B), ("L/2", L))}
    for pipe in (theirs, *pipes.values()):
        pipe.set_progress_bar_config(disable=True)
    counts = (50, 250) if bench.cuda else (1, 2)
    calls = {f"{n}": partial(theirs, [1], guidance_scale=4.0, num_inference_steps=n, output_type="pt") for n in counts}
    found = bench.interleaved(
        {name: partial(pipe, [1], output_type="pt") for name, pipe in pipes.items()} | calls, rounds=min(2, bench.rounds)
    )
    one = found[str(counts[1])] - found[str(counts[0])]
    step = one / (counts[1] - counts[0])
    told = "" if bench.cuda else "extrapolated from 1 and 2 steps"
    bench.row("steps", "DiTPipeline XL/2 with guidance: per step", step, "s", noise=noise(found))
    for name in pipes:
        bench.row("steps", f"DriftingPipeline {name}: per image", found[name], "s", noise=noise(found))
    for n in (50, 250):
        whole = found[str(n)] if bench.cuda else found["1"] + (n - 1) * step
        for name in pipes:
            text = f"an image of DiTPipeline XL/2 at {n} steps / of DriftingPipeline {name}, decoder included"
            bench.row("steps", text, whole / found[name], "times", better="higher", noise=noise(found), note=told)


PARTS = {
    "dit": part_dit,
    "generator": part_generator,
    "decoder": part_decoder,
    "savings": part_savings,
    "pipeline": part_pipeline,
    "steps": part_steps,
}


# -- telling


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["", "measured", "goal", "noise", "peak MB", ""], ["---", "---:", "---:", "---:", "---:", "---"]]
    for row in rows:
        value = f"{row['value']:.1%}" if row["unit"] == "share" else f"{row['value']:.3g} {row['unit']}"
        verdict = "" if row["goal"] is None else "hit" if hit(row) else "missed"
        goal = "" if row["goal"] is None else f"{'at least' if row['better'] == 'higher' else 'at most'} {row['goal']:g}"
        memory = f"{row['memory']:.0f}" if "memory" in row else ""
        lines.append([row["row"], value, goal, f"{row['noise']:.1%}", memory, "; ".join(text for text in (verdict, row["note"]) if text)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def hit(row: dict[str, Any]) -> bool:
    return row["value"] >= row["goal"] if row["better"] == "higher" else row["value"] <= row["goal"]


def machine(bench: Bench) -> str:
    if bench.cuda:
        return torch.cuda.get_device_name(bench.device)
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts; all if not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 4, 16), help="of generator, decoder and savings")
    parser.add_argument("--rounds", type=int, default=5, help="of every timing; long ones take one or two")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    parser.add_argument("--small", action="store_true", help="a size that takes seconds")
    options = parser.parse_args()
    bench = Bench(options)
    logging.set_verbosity_error()  # it warns of casts and of attention backends
    if not bench.cuda:
        torch.set_num_threads(1)
    with torch.inference_mode():
        for part in options.only:
            PARTS[part](bench)
            print(f"\n### {part}\n\n{table([row for row in bench.rows if row['part'] == part])}", flush=True)
            if options.json:  # after every part: what was found stays, if a later one is stopped
                options.json.write_text(json.dumps(told(bench), indent=1) + "\n")


def told(bench: Bench) -> dict[str, Any]:
    command = " ".join(["OMP_NUM_THREADS=1", "python", "benchmarks/inference.py", *sys.argv[1:]]).partition(" --json")[0]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"command": command, "date": date, "machine": machine(bench), "torch": torch.__version__, "rows": bench.rows}


if __name__ == "__main__":
    main()
