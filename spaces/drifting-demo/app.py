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
).set(
    block_border_width="0px",
    block_shadow="none",
    block_title_background_fill="none",
    block_title_background_fill_dark="none",
    block_title_padding="0",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    body_text_color_subdued="*neutral_500",
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_500",
    button_large_text_weight="600",
    button_large_padding="8px 16px",
    button_large_text_size="*text_md",
)
LOOK: dict[str, Any] = {"theme": THEME, "css_paths": HERE / "style.css", "footer_links": ["api"]}


def build(pipelines: Sequence[str] = ("fashion-mnist",)) -> gr.Blocks:
    """The page; without pipelines, the playground alone."""
    with gr.Blocks(title="Drifting Models", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(HEAD)
        if not pipelines:
            playground_tab(None, page)
        else:
            from drawing_tabs import drawing_tabs, show_settings

            with drawing_tabs(page, pipelines), gr.Tab("Playground", id="playground") as tab:
                tab.select(None, js=show_settings(False), api_visibility="private")
                playground_tab(tab, page)
    return page.queue(max_size=32, default_concurrency_limit=1)


if __name__ == "__main__":
    build(os.environ.get("DRIFTING_MODELS", "fashion-mnist").split()).launch(**LOOK)
