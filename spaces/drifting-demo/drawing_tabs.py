"""Three tabs that draw: images, films between two of them, sheets of styles. Each shows what one call of the network made."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr
import models
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from messages import with_messages
from pictures import animation, sheet
from PIL import Image

NOISES, CLASSES = "two noises", "two classes"
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
PICTURE: dict[str, Any] = {"buttons": ["download", "fullscreen"], "show_label": False, "elem_classes": "sheet", "container": False}
LIVE: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "minimal"}


@contextmanager
def drawing_tabs(page: gr.Blocks, pipelines: Sequence[str]) -> Iterator[None]:
    """The settings that all three share, and the tabs, with room for more of them."""
    names = models.offer(pipelines)
    pipe = models.load(names[0])
    with gr.Row(equal_height=True, elem_id="settings"):
        model = gr.Dropdown(
            names, value=names[0], allow_custom_value=True, label="Model", info="or type a repository of the Hub, user/name", min_width=300
        )
        guidance = gr.Slider(1, 4, pipe.config.guidance_scale, step=0.1, label="Guidance scale", min_width=300, **_guidance(pipe))
    with gr.Tabs():
        with _tab("Draw"):
            labels, redraw = _draw_tab(page, pipe, model, guidance)
        with _tab("Interpolate") as walking:
            label, other = _interpolate_tab(walking, pipe, model, guidance)
        with _tab("Styles") as styling:
            styled = _style_tab(styling, pipe, model, guidance)
        yield
    lists = [guidance, labels, label, other, styled]
    model.input(with_messages(_about), model, lists, api_name="about", show_progress="minimal").success(**redraw)


def _tab(name: str) -> gr.Tab:
    tab = gr.Tab(name)
    tab.select(None, js=show_settings(True), api_visibility="private")  # before what takes longer
    return tab


def show_settings(shown: bool) -> str:
    """What the browser does without asking the server."""
    return f"() => document.querySelector('#settings').style.display = '{'' if shown else 'none'}'"


def _guidance(pipe: Any) -> dict[str, Any]:
    told = "1 is none; more is more typical and less varied" if models.guided(pipe) else "this model was built without guidance"
    return {"interactive": models.guided(pipe), "info": told}


def _about(name: str) -> tuple[Any, ...]:
    """What a model can be asked for: settings of the guidance scale and of the four lists of classes."""
    pipe = models.load(name)
    scale = gr.Slider(value=pipe.config.guidance_scale, **_guidance(pipe))
    return scale, gr.Dropdown(**_several(pipe)), *(gr.Dropdown(**_one(pipe, place)) for place in (0, -1, 0))


def _several(pipe: Any) -> dict[str, Any]:
    choices = models.classes(pipe)
    most = max(1, min(5, models.most_images(pipe) // 8))
    return {"choices": choices, "value": [meant for _, meant in choices[-most:]], "visible": bool(choices)}


def _one(pipe: Any, place: int) -> dict[str, Any]:
    choices = models.classes(pipe)
    return {"choices": choices, "value": choices[place][1] if choices else None, "visible": bool(choices)}


# -- draw


def _draw_tab(page: gr.Blocks, pipe: Any, model: gr.Dropdown, guidance: gr.Slider) -> tuple[gr.Dropdown, dict[str, Any]]:
    """The list of classes, and what draws anew when the model is another."""
    gr.Markdown("Choose classes and how many of each; the whole sheet is one call of the network.", elem_classes="said")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            labels = gr.Dropdown(
                label="Classes",
                info="pick, or type to search",
                multiselect=True,
                allow_custom_value=True,
                **_several(pipe),
                elem_id="labels",
            )
            each = gr.Slider(1, 16, 8, step=1, label="Images of each class")
            seed, other = _seed()
            go = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=5, min_width=320, elem_classes="result"):
            picture = gr.Image(format="png", elem_id="drawn", **PICTURE)
            time = gr.Markdown(elem_classes="timed", elem_id="draw-time")
    asked: Any = [model, labels, guidance, each, seed]
    gr.on([go.click, seed.submit], with_messages(draw), asked, [picture, time], api_name="draw", **LIVE)
    redraw: dict[str, Any] = {"fn": with_messages(draw), "inputs": asked, "outputs": [picture, time], "api_visibility": "private", **LIVE}
    gr.on([page.load, each.release, guidance.release, labels.change, seed.change], **redraw)  # a typed name is a change, but no input
    other.click(_another, seed, seed, **QUIET)
    return labels, redraw


def draw(model: str, labels: Any, guidance: float, each: int, seed: int) -> tuple[Image.Image, str]:
    images, seconds, names = models.draw(model, labels, guidance, each, seed)
    columns = int(each) if names else min(8, int(each))
    return sheet(images, columns, names), _told(len(images), seconds)


# -- interpolate


def _interpolate_tab(tab: gr.Tab, pipe: Any, model: gr.Dropdown, guidance: gr.Slider) -> tuple[gr.Dropdown, gr.Dropdown]:
    gr.Markdown(
        "Walk between two noises, on an arc on which noise stays noise, or between two classes; all frames come from one call.",
        elem_classes="said",
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            between = gr.Radio([CLASSES, NOISES], value=CLASSES if models.classes(pipe) else NOISES, label="Between")
            first = gr.Dropdown(label="Class", allow_custom_value=True, **_one(pipe, 0))
            second = gr.Dropdown(label="Other class", allow_custom_value=True, **_one(pipe, -1))
            frames = gr.Slider(8, 32, 24, step=1, label="Frames")
            seed, other = _seed()
            go = gr.Button("Walk", variant="primary", elem_id="walk")
        with gr.Column(scale=5, min_width=320, elem_classes="result"):
            picture = gr.Image(format="webp", type="filepath", elem_id="walked", **PICTURE)
            time = gr.Markdown(elem_classes="timed")
    between.change(lambda way: gr.Dropdown(visible=way == CLASSES), between, second, **QUIET)
    asked: Any = [model, between, first, second, guidance, frames, seed]
    gr.on([go.click, seed.submit], with_messages(interpolate), asked, [picture, time], api_name="interpolate", **LIVE)
    live = [tab.select, between.input, first.input, second.input, seed.change, frames.release]
    gr.on(live, with_messages(interpolate), asked, [picture, time], api_visibility="private", **LIVE)
    other.click(_another, seed, seed, **QUIET)
    return first, second


def interpolate(model: str, between: str, first: Any, second: Any, guidance: float, frames: int, seed: int) -> tuple[str, str]:
    if between == CLASSES:
        images, seconds, tiles = models.between_classes(model, first, second, guidance, frames, seed)
    elif between == NOISES:
        images, seconds, tiles = models.between_noises(model, first, guidance, frames, seed)
    else:
        raise ValueError(f"a walk is between {CLASSES} or {NOISES}, got {between!r}")
    file = save_bytes_to_cache(animation(images, int(frames), min(4, tiles)), "walk.webp", get_upload_folder())
    return file, _told(len(images), seconds)


# -- styles


def _style_tab(tab: gr.Tab, pipe: Any, model: gr.Dropdown, guidance: gr.Slider) -> gr.Dropdown:
    gr.Markdown(
        "One class: every row has its own noise, every column its own style tokens, drawn at random as in training.", elem_classes="said"
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            label = gr.Dropdown(label="Class", allow_custom_value=True, **_one(pipe, 0))
            rows = gr.Slider(1, 8, 5, step=1, label="Noises")
            columns = gr.Slider(1, 10, 8, step=1, label="Styles")
            seed, other = _seed()
            go = gr.Button("Draw", variant="primary", elem_id="style")
        with gr.Column(scale=5, min_width=320, elem_classes="result"):
            picture = gr.Image(format="png", elem_id="styled", **PICTURE)
            time = gr.Markdown(elem_classes="timed")
    asked: Any = [model, label, guidance, rows, columns, seed]
    gr.on([go.click, seed.submit], with_messages(style), asked, [picture, time], api_name="styles", **LIVE)
    live = [tab.select, label.input, rows.release, columns.release, seed.change]
    gr.on(live, with_messages(style), asked, [picture, time], api_visibility="private", **LIVE)
    other.click(_another, seed, seed, **QUIET)
    return label


def style(model: str, label: Any, guidance: float, rows: int, columns: int, seed: int) -> tuple[Image.Image, str]:
    images, seconds = models.styles(model, label, guidance, rows, columns, seed)
    heads = [f"style {i + 1}" for i in range(int(columns))]
    return sheet(images, int(columns), [f"noise {i + 1}" for i in range(int(rows))], heads), _told(len(images), seconds)


# -- what the tabs share


def _seed() -> tuple[gr.Number, gr.Button]:
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, scale=3, min_width=100)
        other = gr.Button("Next seed", size="sm", scale=2, min_width=90, elem_classes="next-seed")
    return seed, other


def _another(seed: float) -> int:
    return int(seed or 0) + 1


def _told(images: int, seconds: float) -> str:
    return f"**{images} image{'s' if images > 1 else ''}** in one network call, **{seconds * 1000:.0f} ms**"
