"""The playground: `drifting_diffusers.playground` computes the frames here, the browser paints them."""

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from messages import with_messages
from PIL import Image

from drifting_diffusers.playground import CHOICES, STARTS, TARGETS, Frame, Target, play, points_from_drawing

HERE = Path(__file__).parent
DRAWING = "my drawing"
MOST_STEPS, LEAST_PAUSE = 600, 0.04  # steps of one play; seconds between frames, at least
MOST_CHARACTERS, MOST_SIDE = 500_000, 1024  # of a drawing; pixels of its side
ABOUT = (
    "A field pulls samples to the target and pushes them from each other: on the left it moves particles, on the right a small network learns, from the same "
    "field, to land there in one call. Choose a target or draw one."
)


def playground_tab(tab: gr.Tab | None, page: gr.Blocks) -> None:
    """Components and wiring; it plays by itself when it is seen for the first time."""
    gr.Markdown(ABOUT, elem_classes="said")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            target = gr.Dropdown([*TARGETS, DRAWING], value="spiral", label="Target", elem_id="target")
            with gr.Column(visible=False) as paper:
                sketch = gr.HTML(value="", html_template=_text("paper.html"), js_on_load=_text("paper.js"), elem_id="sketch")
            field = gr.Dropdown(list(CHOICES), value="drifting", label="Field", info=CHOICES["drifting"].caption)
            temperature = gr.Slider(0.02, 2, 0.2, step=0.01, label="Temperature", info="how far samples hear each other, in mean distances")
            with gr.Accordion("More", open=False):
                start = gr.Radio(list(STARTS), value="middle", label="Both start")
                steps = gr.Slider(40, MOST_STEPS, 240, step=20, label="Steps")
                particles = gr.Slider(50, 500, 256, step=1, label="Points")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            with gr.Row():
                go = gr.Button("Play", variant="primary", min_width=100, elem_id="play")
                stop = gr.Button("Stop", min_width=100, elem_id="stop")
        with gr.Column(scale=5, min_width=320, elem_classes="result"):
            stage = gr.HTML(html_template=_text("stage.html"), js_on_load=_text("stage.js"), elem_id="stage")
    turn = gr.State(Turn())
    asked: Any = [turn, target, sketch, field, temperature, start, steps, particles, seed]
    more: Any = {"show_progress": "hidden", "concurrency_limit": 4, "concurrency_id": "play", "trigger_mode": "multiple"}
    go.click(with_messages(frames), asked, stage, api_name="play", **more)
    more["api_visibility"] = "private"
    (page.load if tab is None else tab.select)(with_messages(first_frames), asked, stage, **more)
    stop.click(_stop, turn, None, queue=False, show_progress="hidden", api_visibility="private")
    target.change(lambda name: gr.Column(visible=name == DRAWING), target, paper, api_visibility="private", show_progress="hidden")
    # What is chosen or drawn is seen at once, from the start.
    chosen = field.input(_suits, field, [field, temperature], api_visibility="private", show_progress="hidden")
    for event in (target.input, start.input, temperature.release, sketch.drawn, chosen.then):
        event(with_messages(chosen_frames), asked, stage, **more)


class Turn:
    """Whose turn it is on the stage of one visitor: a play goes on until another begins, or until Stop."""

    def __init__(self):
        self.number = 0

    def take(self) -> int:
        self.number += 1
        return self.number


def _stop(turn: Turn) -> None:
    """A play that has lost its turn ends."""
    turn.take()


def frames(
    turn: Turn,
    target: str,
    drawing: str | None,
    field: str,
    temperature: float,
    start: str,
    steps: float,
    particles: float,
    seed: float,
) -> Iterator[str]:
    """One JSON text per step: `target`, `particles` and `generated` as x, y, x, y, ... in thousandths of the square, and all `energies` so far."""
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"this page plays 1 to {MOST_STEPS} steps, got {steps:g}")
    if not 2 <= particles <= 500:
        raise ValueError(f"this page moves 2 to 500 points, got {particles:g}")
    law = _law(target, drawing)
    chosen = None if CHOICES.get(field) and CHOICES[field].temperature is None else temperature
    shown = _thousandths(law(600, torch.Generator().manual_seed(1)))
    energies: list[tuple[float, float]] = []
    due, mine = 0.0, turn.take()
    for frame in play(law, field, chosen, start=start, steps=int(steps), particles=int(particles), seed=int(seed)):
        energies.append((round(frame.particle_energy, 5), round(frame.generator_energy, 5)))
        time.sleep(max(0.0, due - time.monotonic()))
        if turn.number != mine:
            return
        due = time.monotonic() + LEAST_PAUSE
        yield _spoken(frame, shown, energies, int(steps))


def first_frames(turn: Turn, *asked: Any) -> Iterator[Any]:
    """As `frames`, where nothing was played yet."""
    if turn.number:
        yield gr.skip()
    else:
        yield from frames(turn, *asked)


def chosen_frames(turn: Turn, target: str, drawing: str | None, *asked: Any) -> Iterator[Any]:
    """As `frames`, but an empty paper is no mistake yet."""
    if target == DRAWING and not drawing:
        turn.take()
        yield gr.skip()
    else:
        yield from frames(turn, target, drawing, *asked)


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _law(target: str, drawing: str | None) -> Target:
    if target == DRAWING:
        ink = _ink(drawing)
        points_from_drawing(ink, 1, torch.Generator())  # an empty paper is told now
        return lambda n, generator: points_from_drawing(ink, n, generator)
    if target not in TARGETS:
        raise ValueError(f"there is no target {target!r}: take one of {', '.join([*TARGETS, DRAWING])}")
    return TARGETS[target]


def _ink(drawing: str | None) -> torch.Tensor:
    """How opaque the drawing is, [h, w] in [0, 1]; nothing where nobody drew."""
    if not drawing:
        return torch.zeros(1, 1)
    kind, _, data = drawing.partition(",")
    if kind != "data:image/png;base64" or len(data) > MOST_CHARACTERS:
        raise ValueError(f"a drawing is a PNG as a data: address of at most {MOST_CHARACTERS:,} characters, got {drawing[:30]!r}")
    with Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]) as picture:
        if max(picture.size) > MOST_SIDE:
            raise ValueError(f"a drawing is at most {MOST_SIDE} pixels wide and high, got {picture.size}")
        return torch.from_numpy(np.asarray(picture.convert("RGBA"))[..., 3] / np.float32(255))


def _suits(field: str) -> tuple[Any, Any]:
    """What a field is, and the temperature that suits it."""
    choice = CHOICES[field]
    slider = gr.Slider(interactive=False) if choice.temperature is None else gr.Slider(value=choice.temperature, interactive=True)
    return gr.Dropdown(info=choice.caption), slider


def _thousandths(points: torch.Tensor) -> list[int]:
    return (points * 1000).round().clamp(-9999, 9999).int().flatten().tolist()


def _spoken(frame: Frame, target: list[int], energies: list[tuple[float, float]], steps: int) -> str:
    moved = {"particles": _thousandths(frame.particles), "generated": _thousandths(frame.generated)}
    return json.dumps({"step": frame.step, "steps": steps, "target": target, **moved, "energies": energies}, separators=(",", ":"))
