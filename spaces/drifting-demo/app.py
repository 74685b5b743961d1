"""Drifting Models in the browser: draw, walk between images, change their style, and a playground of the idea.

    python app.py            with the models named in DRIFTING_MODELS, or with the one that comes with the package
    drifting-diffusers demo  the same, with more to say
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu  # noqa: F401 - before torch
import gradio as gr
from playground_tab import playground_tab

HERE = Path(__file__).parent
HEAD = """<div class="masthead"><h1>Drifting Models</h1>
<p>Generators that make an image in one network call: no steps, no schedule.
<a href="https://arxiv.org/abs/2602.04770" target="_blank" rel="noopener">The paper</a></p></div>"""
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # of the visitor's own machine
THEME: Any = gr.themes.Soft(
    primary_hue=gr.themes.colors.teal, neutral_hue=gr.themes.colors.slate, font=FONTS, font_mono=["ui-monospace", "monospace"]
).set(block_border_width="0px", block_shadow="none", body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950")
LOOK: dict[str, Any] = {"theme": THEME, "css_paths": HERE / "style.css", "footer_links": ["api"]}


def build(pipelines: Sequence[str] = ("fashion-mnist",)) -> gr.Blocks:
    """The page; without pipelines, the playground alone."""
    with gr.Blocks(title="Drifting Models", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(HEAD)
        if not pipelines:
            playground_tab(None, page)
        else:
            from drawing_tabs import drawing_tabs

            with drawing_tabs(page, pipelines) as settings, gr.Tab("Playground", id="playground") as tab:
                playground_tab(tab, page)
            tab.select(lambda: gr.Row(visible=False), None, settings, api_visibility="private", show_progress="hidden")
    return page.queue(max_size=32, default_concurrency_limit=1)


if __name__ == "__main__":
    build(os.environ.get("DRIFTING_MODELS", "fashion-mnist").split()).launch(**LOOK)
