"""The pages of docs/: their Python runs, their commands are understood, their links have an end, and the site that is built of them needs nobody else."""

import argparse
import dataclasses
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_train_imagenet import example
from torch.testing import assert_close

import drifting_diffusers
from drifting_diffusers import DriftingGenerator, DriftingPipeline
from drifting_diffusers.arguments import parse_arguments
from drifting_diffusers.cli import _parser
from drifting_diffusers.config import DriftingConfig, EncoderConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
FENCE = re.compile(r"^```python(?: title=\"(?P<needs>needs [^\"]+)\")?\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
FASHION = ROOT / "examples/data/fashion_mnist"

NOT_RUN = {
    ("imagenet.md", "needs the Hub"): "pushes what a training of days left; test_push_while_training.py pushes small ones",
    ("how-to/push.md", "needs the Hub"): "pushes and pulls; test_hub.py does, on 127.0.0.1",
    ("how-to/deploy.md", "needs a running demo"): "the demo's own tests speak with it",
    ("how-to/deploy.md", "needs a GPU"): "there is none here",
    ("how-to/inference.md", "needs a GPU"): "there is none here",
}
"""Blocks that are shown and not run, by page and the caption that readers see, and why."""

ELSEWHERE = {
    "export.md": "test_export.py runs it",
    "released.md": "test_release_hub.py runs it, against weights on 127.0.0.1",
    "fields.md": "test_fields_page.py runs it",
}


def blocks(page):
    return [found["code"] for found in FENCE.finditer(PAGES[page]) if not found["needs"]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder like that of somebody who follows the pages: the examples, a folder of images, and small trained pipelines."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "examples").symlink_to(ROOT / "examples")
    data = Dataset.from_parquet(str(FASHION / "test.parquet"), cache_dir=str(folder / "cache"))
    for label, name in ((8, "bag"), (9, "boot")):
        (folder / "my_images" / name).mkdir(parents=True)
        for i in [i for i, given in enumerate(data["label"]) if given == label][:40]:
            data[i]["image"].save(folder / "my_images" / name / f"{i}.png")
    small = {"sample_size": 28, "patch_size": 7, "in_channels": 1, "num_classes": 10, "num_layers": 1, "num_attention_heads": 1}
    for where in ("outputs/quickstart", "runs/mine", "runs/guided"):
        torch.manual_seed(0)
        model = DriftingGenerator(**small, guidance_embedding="guided" in where)
        DriftingPipeline(model, labels=data.features["label"].names).save_pretrained(folder / where / "pipeline")
    return folder


@pytest.fixture
def reader(prepared, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(prepared, tmp_path / "work", symlinks=True, ignore=shutil.ignore_patterns("cache"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def run(page):
    """The blocks of a page, one after the other, as a reader would type them."""
    torch.manual_seed(0)
    names: dict = {"__name__": "docs"}
    for code in blocks(page):
        exec(compile(code, page, "exec"), names)
    return names


def shown_by_concepts(names, folder):
    losses, strengths, error = names["losses"], names["strengths"], names["error"]
    assert float(names["rest"].abs().max()) == 0 < float(names["there"].abs().max())
    assert all(1 < loss < 9 for loss in losses)
    assert min(losses) > 0.8 * max(losses)  # flat
    assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(strengths))
    assert strengths[-1] < strengths[0] / 10
    for fewer, more in ((16, 64), (64, 256)):
        assert error[fewer] / error[more] == pytest.approx(2, rel=0.25)
    assert_close(names["weight"], torch.tensor([0.0, 0.5 * 63 / 16, 3 * 63 / 16]))


def shown_by_field(names, folder):
    assert names["before"] > 4
    assert names["after"] < 0.005
    assert names["objective"].field == names["EnergyField"]()


def shown_by_dataset(names, folder):
    assert names["trainer"].pipeline().labels == ["bag", "boot"]
    assert names["labelled"].features["label"].names == ["else", "shoe"]


SHOWN = {
    "index.md": lambda names, folder: (folder / "sneaker.png").exists() and len(names["images"]) == 8,
    "quickstart.md": lambda names, folder: (
        (folder / "outputs/mine/pipeline/model_index.json").exists() and (folder / "trouser.png").exists()
    ),
    "finetune.md": lambda names, folder: names["again"].config.num_classes == 2,
    "concepts.md": shown_by_concepts,
    "how-to/dataset.md": shown_by_dataset,
    "how-to/field.md": shown_by_field,
    "how-to/features.md": lambda names, folder: (
        set(names["measured"]) == {"pixels", "spectrum"} and names["found"]["layer2"].shape == (4, 4, 32)
    ),
    "how-to/evaluate.md": lambda names, folder: names["results"]["metrics"]["energy"] > 0,
    "how-to/deploy.md": lambda names, folder: names["png"]("dress", 3) != names["png"]("dress", 4),
    "how-to/inference.md": lambda names, folder: len(names["images"]) == 16 and names["drawn"].shape == (8, 3, 8, 8),
}
"""What the blocks of a page must have shown when they are through."""


SLOW = {"how-to/dataset.md", "how-to/evaluate.md", "quickstart.md"}
"""They train and measure."""


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES if blocks(page) and page not in ELSEWHERE]
)
def test_the_blocks_of_a_page_run(page, reader):
    if page == "finetune.md":
        pytest.importorskip("peft")
    assert SHOWN[page](run(page), reader) in (True, None)


def test_what_is_not_run_is_listed():
    captions = {(page, found["needs"]) for page in PAGES for found in FENCE.finditer(PAGES[page]) if found["needs"]}
    assert captions == set(NOT_RUN)
    for page, text in PAGES.items():
        assert len(re.findall("^```python", text, re.MULTILINE)) == len(FENCE.findall(text)), f"{page} has a fence of another kind"
    assert all(blocks(page) for page in ELSEWHERE)


# -- commands


def commands():
    """(page, program, arguments) of every command of ours, whoever launches it."""
    for page, text in PAGES.items():
        for shell in re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            for line in shell.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for at, word in enumerate(words):
                    if word in ("drifting-diffusers", "drifting_diffusers.cli") or re.fullmatch(r"(examples|benchmarks)/\w+\.py", word):
                        yield page, word, words[at + 1 :]
                        break


COMMANDS = list(commands())


class Understood(Exception):
    """Arguments were parsed, and nothing was run."""


def understand(monkeypatch, module, words):
    """Let a program with a parser of its own read its arguments."""
    read = argparse.ArgumentParser.parse_args

    def parse(self, arguments=None, namespace=None):
        read(self, arguments, namespace)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Understood):
        module.main(words)


@pytest.mark.parametrize(
    ("page", "program", "words"), COMMANDS, ids=[f"{page}-{' '.join([program, *words])[:60]}" for page, program, words in COMMANDS]
)
def test_a_command_is_understood(page, program, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no file of the commands is
    if program in ("drifting-diffusers", "drifting_diffusers.cli"):
        options = _parser(words[:1]).parse_args(words)
        assert callable(options.run)
        return
    module = example(Path(program).stem)
    config = getattr(module, "Choices", {"train_imagenet": DriftingConfig, "train_mae": EncoderConfig}.get(Path(program).stem))
    kinds = tuple(kind for kind in (getattr(module, "Arguments", None), config) if kind)
    if "..." in words:  # the rest stands above it on the page
        assert {word[2:] for word in words if word.startswith("--")} <= {entry.name for kind in kinds for entry in dataclasses.fields(kind)}
    elif hasattr(module, "parse_arguments"):
        parse_arguments(kinds, words)
    elif kinds:
        assert not words  # quickstart.py as it is
    else:
        understand(monkeypatch, module, words)


def test_commands_were_found():
    assert len(COMMANDS) > 20
    assert {"drifting-diffusers", "examples/train_imagenet.py", "examples/finetune.py", "examples/05_bring_your_own_features.py"} <= {
        c[1] for c in COMMANDS
    }


# -- links, and the site


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (DOCS / page).parent.joinpath(target).exists(), target


def test_every_public_name_has_its_place():
    listed = re.findall(r"^::: (\S+)$", "\n".join(text for page, text in PAGES.items() if page.startswith("api/")), re.MULTILINE)
    assert len(listed) == len({*listed})
    missing = [name for name in drifting_diffusers.__all__ if f"drifting_diffusers.{name}" not in listed and name != "__version__"]
    assert not missing, f"docs/api lacks {missing}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as CI does, every warning an error."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
    return folder


def test_the_site_is_built_and_has_every_name(site):
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    names = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    assert {f"drifting_diffusers.{name}" for name in drifting_diffusers.__all__ if name != "__version__"} <= names
    assert (site / "search/search_index.json").stat().st_size > 100_000
    choices = (site / "api/choices/index.html").read_text()
    assert all(f"<code>{entry.name}</code>" in choices for kind in (DriftingConfig, EncoderConfig) for entry in dataclasses.fields(kind))
    assert "drifting-diffusers evaluate" in (site / "api/cli/index.html").read_text()
    assert "Which of the published fields is best" in (site / "experiments/index.html").read_text()


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"?((?:https?:)?//[^\"\s>]+)", page.read_text())
        assert not loaded, f"{page}: {loaded}"
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet


# -- pictures


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("make_pictures", DOCS / "make_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_arrows_are_those_of_eq_10(pictures, rng):
    x, real = torch.randn(9, 2, generator=rng, dtype=torch.float64), torch.randn(30, 2, generator=rng, dtype=torch.float64)
    near = lambda points: torch.exp(-torch.cdist(x, points) / 0.3)
    mean = lambda weights, points: (weights / weights.sum(1, keepdim=True)) @ points - x
    pull, push = pictures.pull_and_push(x, real, 0.3)
    assert_close(pull, mean(near(real), real))
    assert_close(push, -mean(near(x) * (1 - torch.eye(9, dtype=torch.float64)), x))


@pytest.mark.slow
def test_every_picture_is_made(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOMENTS", (0, 5, 10, 20))
    pictures.main(["--folder", str(tmp_path)])
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in pictures.PICTURES)
