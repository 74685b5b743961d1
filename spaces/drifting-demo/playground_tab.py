"""The playground: `drifting_diffusers.playground` computes the frames here, the browser paints them."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from messages import with_messages

from drifting_diffusers.playground import CHOICES, STARTS, TARGETS, Frame, Target, play, points_from_drawing

HERE = Path(__file__).parent
DRAWING = "my drawing"
MOST_STEPS, LEAST_PAUSE, SIDE = 600, 0.04, 320  # steps of one play; seconds between frames, at least; pixels of the paper
ABOUT = (
    "A field pulls samples to the target and pushes them from each other: on the left it moves particles, on the right a small network learns, from the same "
    "field, to land there in one call. Choose a target or draw one."
)


def playground_tab(tab: gr.Tab | None, page: gr.Blocks) -> None:
    """Components and wiring; it plays by itself when it is seen for the first time."""
    gr.Markdown(ABOUT, elem_classes="said")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            target = gr.Dropdown([*TARGETS, DRAWING], value="spiral", label="Target")
            with gr.Group(visible=False) as paper:
                sketch = gr.Sketchpad(
                    label="Draw with the mouse or a finger",
                    canvas_size=(SIDE, SIDE),
                    fixed_canvas=True,
                    height=SIDE + 90,
                    image_mode="RGBA",
                    layers=False,
                    transforms=(),
                    brush=gr.Brush(default_size=14, colors=["#0d9488"], default_color="#0d9488", color_mode="fixed"),
                    buttons=[],
                    elem_id="sketch",
                )
            field = gr.Dropdown([(f"{name}: {choice.caption}", name) for name, choice in CHOICES.items()], value="drifting", label="Field")
            temperature = gr.Slider(0.02, 2, 0.2, step=0.01, label="Temperature", info="how far samples hear each other, in mean distances")
            with gr.Accordion("More", open=False):
                start = gr.Radio(list(STARTS), value="middle", label="Both start")
                steps = gr.Slider(40, MOST_STEPS, 240, step=20, label="Steps")
                particles = gr.Slider(50, 500, 256, step=1, label="Points")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            with gr.Row():
                go = gr.Button("Play", variant="primary", elem_id="play")
                stop = gr.Button("Stop", elem_id="stop")
        with gr.Column(scale=5, min_width=320):
            stage = gr.HTML(html_template=(HERE / "stage.html").read_text(), js_on_load=(HERE / "stage.js").read_text(), elem_id="stage")
    asked: Any = [target, sketch, field, temperature, start, steps, particles, seed]
    more: Any = {"show_progress": "hidden", "concurrency_limit": 4, "concurrency_id": "play"}
    playing = [go.click(with_messages(frames), asked, stage, api_name="play", **more)]
    seen = gr.State(False)
    first = (page.load if tab is None else tab.select)(
        with_messages(first_frames), [seen, *asked], [seen, stage], api_visibility="private", **more
    )
    stop.click(None, cancels=[*playing, first], api_visibility="private")
    target.change(lambda name: gr.Group(visible=name == DRAWING), target, paper, api_visibility="private", show_progress="hidden")
    field.change(_suits, field, temperature, api_visibility="private", show_progress="hidden")
    for choice in (target, field, temperature, start):  # what is chosen is seen at once, from the start
        event = choice.release if choice is temperature else choice.input
        again = event(None, cancels=[*playing, first], api_visibility="private").then(
            with_messages(chosen_frames), asked, stage, api_visibility="private", **more
        )
        playing.append(again)


def frames(
    target: str, drawing: dict[str, Any] | None, field: str, temperature: float, start: str, steps: float, particles: float, seed: float
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
    due = 0.0
    for frame in play(law, field, chosen, start=start, steps=int(steps), particles=int(particles), seed=int(seed)):
        energies.append((round(frame.particle_energy, 5), round(frame.generator_energy, 5)))
        time.sleep(max(0.0, due - time.monotonic()))
        due = time.monotonic() + LEAST_PAUSE
        yield _spoken(frame, shown, energies, int(steps))


def first_frames(seen: bool, *asked: Any) -> Iterator[tuple[bool, Any]]:
    if not seen:
        yield from ((True, frame) for frame in frames(*asked))
    else:
        yield True, gr.skip()


def chosen_frames(target: str, drawing: dict[str, Any] | None, *asked: Any) -> Iterator[Any]:
    """As `frames`, but an empty paper is no mistake yet."""
    if target == DRAWING and not (_ink(drawing) > 0).any():
        yield gr.skip()
        return
    yield from frames(target, drawing, *asked)


def _law(target: str, drawing: dict[str, Any] | None) -> Target:
    if target == DRAWING:
        ink = _ink(drawing)
        points_from_drawing(ink, 1, torch.Generator())  # an empty paper is told now
        return lambda n, generator: points_from_drawing(ink, n, generator)
    if target not in TARGETS:
        raise ValueError(f"there is no target {target!r}: take one of {', '.join([*TARGETS, DRAWING])}")
    return TARGETS[target]


def _ink(drawing: dict[str, Any] | None) -> torch.Tensor:
    """How opaque the drawing is, [h, w] in [0, 1]; nothing where nobody drew."""
    picture = (drawing or {}).get("composite")
    if picture is None:
        return torch.zeros(1, 1)
    ink = torch.from_numpy(np.asarray(picture)[..., 3].astype("float32") / 255)
    return ink if ink.numel() <= 2**20 else ink[:: ink.shape[0] // 512 + 1, :: ink.shape[1] // 512 + 1]


def _suits(field: str) -> Any:
    """The temperature that suits a field."""
    suits = CHOICES[field].temperature
    return gr.Slider(interactive=False) if suits is None else gr.Slider(value=suits, interactive=True)


def _thousandths(points: torch.Tensor) -> list[int]:
    return (points * 1000).round().clamp(-9999, 9999).int().flatten().tolist()


def _spoken(frame: Frame, target: list[int], energies: list[tuple[float, float]], steps: int) -> str:
    moved = {"particles": _thousandths(frame.particles), "generated": _thousandths(frame.generated)}
    return json.dumps({"step": frame.step, "steps": steps, "target": target, **moved, "energies": energies}, separators=(",", ":"))
