"""The shipped model as one ONNX file, drawn with onnxruntime and numpy alone; and how long an image takes there and in PyTorch.

    python examples/07_export.py --output_dir outputs/export

`draw` is all that a program on another machine needs: it knows neither torch nor this library, only the file. Needs pip install 'drifting-diffusers[export]'.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image


def load(file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def draw(session: Any, names: list[str], rng: np.random.Generator) -> np.ndarray:
    """One image of every named class, [b, c, h, w] in [0, 1]."""
    metadata = session.get_modelmeta().custom_metadata_map
    labels, inputs = json.loads(metadata["labels"]), json.loads(metadata["inputs"])
    make = {
        "noise": lambda shape, _: rng.standard_normal(shape, dtype=np.float32),
        "class_labels": lambda *_: np.array([labels.index(name) for name in names]),
        "guidance_scale": lambda shape, entry: np.full(shape, entry["default"], np.float32),
        "style_labels": lambda shape, entry: rng.integers(entry["range"][1] + 1, size=shape),
    }
    feeds = {name: make[name]((len(names), *entry["shape"][1:]), entry) for name, entry in inputs.items()}
    return session.run(["images"], feeds)[0]


def save(images: np.ndarray, columns: int, file: Path) -> None:
    rows = [np.concatenate(list(row), axis=-1) for row in images.reshape(-1, columns, *images.shape[1:])]
    pixels = np.round(255 * np.concatenate(rows, axis=-2)).astype(np.uint8)  # (c, h, w)
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file)


def export(file: Path) -> Any:
    """Write the file; returns the same graph in PyTorch."""
    from drifting_diffusers import DriftingPipeline, shipped_model
    from drifting_diffusers.export import ExportChoices, OneCall, export_onnx

    pipeline = DriftingPipeline.from_pretrained(shipped_model("fashion-mnist"))
    done = export_onnx(pipeline, file, output_range="unit", overwrite=True)
    print(f"saved {file}, {done.size / 1e6:.1f} MB; largest error against PyTorch {done.max_error:.1e}")
    return OneCall(pipeline, ExportChoices(output_range="unit"))


def compare(call: Any, session: Any, batch: int, repeats: int) -> None:
    """Milliseconds per image of both, measured in turn, so that what else the machine does meets both."""
    import torch

    inputs = call.random_inputs(batch, seed=0)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    runs = {"PyTorch": torch.inference_mode()(lambda: call(**inputs)), "onnxruntime": lambda: session.run(None, feeds)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(10 + repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat >= 10:  # the first ones warm up
                times[name].append(1000 * (time.perf_counter() - started) / batch)
    for name, values in times.items():
        print(f"batch {batch:3d}, {name}: {statistics.mean(values):.2f} ms per image (sd {statistics.stdev(values):.2f}, {repeats} runs)")


def main(argv: list[str] | None = None) -> np.ndarray:
    parser = argparse.ArgumentParser(description="the shipped model in onnxruntime")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/export"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=300, help="of the measurement, at least 2")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import torch

    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    file = args.output_dir / "clothes.onnx"
    call = export(file)
    session = load(file, args.threads)
    names = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    images = draw(session, [name for name in names for _ in range(8)], np.random.default_rng(args.seed))
    save(images, 8, args.output_dir / "clothes.png")
    print(f"saved {args.output_dir / 'clothes.png'}")
    for batch in (1, 16):
        compare(call, session, batch, args.repeats)
    return images


if __name__ == "__main__":
    main()
