"""docs/imagenet.md: every command has flags that exist, every preset is there, and what is marked computed follows from its figures."""

import re
import shlex
from pathlib import Path

import pytest
from test_train_imagenet import example

from drifting_diffusers.arguments import parse_arguments
from drifting_diffusers.config import DriftingConfig, EncoderConfig
from drifting_diffusers.presets import PRESETS

PAGE = (Path(__file__).parents[1] / "docs/imagenet.md").read_text()
RATES = {"H100": 989e12, "A100": 312e12}  # dense bfloat16, data sheets
USED = 0.4


def commands():
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line.split("#")[0]) for line in text.splitlines() if line.split("#")[0].strip()]


def flags_of(name):
    return next(words[words.index(f"examples/{name}.py") + 1 :] for words in commands() if f"examples/{name}.py" in words)


@pytest.mark.parametrize(("name", "config"), [("train_imagenet", DriftingConfig), ("train_mae", EncoderConfig)])
def test_commands_are_understood(name, config):
    arguments, chosen = parse_arguments((example(name).Arguments, config), flags_of(name))
    assert arguments.preset in config.presets()
    assert chosen.output_dir.startswith("runs/")


def test_the_cache_command_is_understood():
    (arguments,) = parse_arguments((example("cache_latents").Arguments,), flags_of("cache_latents"))
    assert (arguments.resolution, arguments.output_dir) == (256, "latents/train")


def test_the_evaluate_command_is_understood():
    from drifting_diffusers.cli import _parser

    words = next(words for words in commands() if words[:2] == ["drifting-diffusers", "evaluate"])
    assert _parser().parse_args(words[1:]).guidance_scales == [1.0, 1.5, 2.0]


def test_the_table_of_presets_is_what_its_sources_and_figures_say():
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", PAGE, flags=re.MULTILINE))
    assert set(rows) == {name for name, row in PRESETS.items() if "ImageNet" in row.data}
    for name, text in rows.items():
        what, reported, operations, h100, a100 = (cell.strip() for cell in text.split("|"))
        assert f"{PRESETS[name].config['max_steps']:,} steps" in what
        expected = f"FID {PRESETS[name].reported['fid']}"
        assert reported.startswith(expected)
        if operations.endswith("EFLOP"):
            total = float(operations.split()[0].replace(",", "")) * 1e18
            for days, rate in ((h100, RATES["H100"]), (a100, RATES["A100"])):
                assert float(days) == pytest.approx(total / (USED * rate) / 86400, rel=0.04)


def test_disk_of_latents():
    for split, images in (("train", 1_281_167), ("validation", 50_000)):
        assert f"{images:,}" in PAGE, split
        size = images * 2 * 4 * 32 * 32 * 2 / 1e9  # mirror image, latent, float16
        assert f"{2 * size:.2g} GB" in PAGE
        assert f"{size:.2g} GB" in PAGE or f"{size:.1g} GB" in PAGE
