"""`drifting-diffusers sample` and `info`: a seed for every image, names for files, nothing replaced; what a pipeline is without its weights."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from loopback_hub import LoopbackHub, Repository, environment_of
from PIL import Image
from test_cli_help import examples
from torch.testing import assert_close

from drifting_diffusers import DriftingGenerator, DriftingPipeline
from drifting_diffusers.cli import main
from drifting_diffusers.cli.pictures import SIDE
from drifting_diffusers.shipped import shipped_model

NAMES = ["crane, wading bird", "T-shirt/top", "crane, machine"]
TINY = {"sample_size": 8, "patch_size": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_class_tokens": 1}


def tiny(labels=NAMES, **changes):
    torch.manual_seed(0)
    model = DriftingGenerator(**TINY | {"in_channels": 1, "num_classes": len(labels), "num_style_tokens": 2} | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return DriftingPipeline(model, labels=labels or None, guidance_scale=1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    tiny().save_pretrained(folder)
    results = {"metrics": {"fid": 12.345}, "real": {"fid": 1.5}, "better": {"fid": "lower"}, "dataset": "user/data", "seeds": [0, 1]}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, as_users_see_it):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(file):
    with Image.open(file) as image:
        return torch.tensor(list(image.tobytes())).reshape(image.height, image.width, -1)


def notes(file):
    with Image.open(file) as image:
        return image.text


# Sample


def test_every_image_has_a_seed_of_its_own_and_says_so(folder, here, capsys):
    words = ["sample", str(folder), "--labels", "T-shirt/top", "0", "2", "--num-images-per-label", "3", "--seed", "5", "--batch-size", "4"]
    assert main([*words, "--output", "out"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("9 images in ")
    assert said.endswith(" s: out\n")
    stems = ("T-shirt-top", "crane-0", "crane-2")
    assert {path.name for path in Path("out").iterdir()} == {f"{stem}-{seed}.png" for stem in stems for seed in (5, 6, 7)}
    pipe = DriftingPipeline.from_pretrained(folder)
    for i, stem in ((1, "T-shirt-top"), (2, "crane-2")):
        for seed in (5, 7):
            expected = pipe(i, generator=torch.Generator().manual_seed(seed)).images[0]
            drawn = pixels(f"out/{stem}-{seed}.png")
            assert_close(drawn.flatten(), torch.tensor(list(expected.tobytes())), atol=1, rtol=0)  # sums are ordered by the batch
    assert len({tuple(pixels(path).flatten().tolist()) for path in Path("out").iterdir()}) == 9
    told = notes("out/crane-2-6.png")
    assert (told["label"], told["seed"], told["guidance_scale"], told["pipeline"]) == ("crane", "6", "1.5", "pipeline")


def test_several_seeds_are_one_image_each(folder, here):
    assert main(["sample", str(folder), "--labels", "1", "--seed", "9", "2", "--output", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["T-shirt-top-2.png", "T-shirt-top-9.png"]
    assert main(["sample", str(folder), "--labels", "1", "--seed", "9", "--output", "one.png"]) == 0
    assert_close(pixels("one.png"), pixels("out/T-shirt-top-9.png"), atol=1, rtol=0)


def test_a_grid_shows_a_row_for_every_label_enlarged_without_smoothing(folder, here):
    words = ["sample", str(folder), "--labels", "all", "--num-images-per-label", "2", "--guidance-scale", "3"]
    assert main([*words, "--output", "grid.png"]) == 0
    assert main([*words, "--output", "out", "--files"]) == 0
    page = pixels("grid.png")[..., 0]
    factor = SIDE // 8
    for row, stem in enumerate(("crane-0", "T-shirt-top", "crane-2")):
        for column in range(2):
            image = pixels(f"out/{stem}-{column}.png")[..., 0].repeat_interleave(factor, 0).repeat_interleave(factor, 1)
            y, x = page.shape[0] - (3 - row) * (SIDE + 2), page.shape[1] - (2 - column) * (SIDE + 2)
            assert_close(page[y : y + SIDE, x : x + SIDE], image, atol=1, rtol=0)
    left = page[:, : page.shape[1] - 2 * (SIDE + 2)]
    assert left.min() < 100  # names stand there
    told = notes("grid.png")
    assert (told["labels"], told["seeds"], told["guidance_scale"]) == ("crane, T-shirt/top, crane", "0 1", "3")


def test_many_images_of_a_label_are_a_block(folder, here):
    assert main(["sample", str(folder), "--labels", "1", "--num-images-per-label", "25", "--output", "x", "--grid"]) == 0
    with Image.open("x/grid.png") as image:
        assert image.height == 5 * (SIDE + 2) + 2
    assert list(Path("x").iterdir()) == [Path("x/grid.png")]


def test_style_and_decoder_are_used(here, tmp_path):
    tiny(["a", "b"], in_channels=4).save_pretrained("latent")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4
    ).save_pretrained("vae")
    words = ["sample", "latent", "--labels", "b", "--vae", "vae"]
    assert main([*words, "--output", "1.png"]) == 0
    assert main([*words, "--output", "2.png", "--style", "3", "4"]) == 0
    assert pixels("1.png").shape == (16, 16, 3)
    assert not torch.equal(pixels("1.png"), pixels("2.png"))
    assert notes("2.png")["style_labels"] == "3 4"


def test_an_unconditional_generator_needs_no_labels(here, capsys):
    tiny([]).save_pretrained("plain")
    assert main(["sample", "plain", "--num-images-per-label", "3", "--output", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["0.png", "1.png", "2.png"]
    assert main(["sample", "plain", "--num-images-per-label", "4", "--output", "grid.png"]) == 0
    assert main(["sample", "plain", "--labels", "0"]) == 1
    assert "knows no classes: leave --labels out" in capsys.readouterr().err
    assert main(["info", "plain"]) == 0
    assert "classes     none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}"], "--labels are needed: all, or names or ids of classes, as in"),
        (["{folder}", "--labels", "swan"], "no class is named 'swan'"),
        (["{folder}", "--labels", "swan"], "info {folder} --labels lists all classes"),
        (["{folder}", "--labels", "3"], "class ids must lie from 0 to 2, got 3"),
        (["{folder}", "--labels", "crane"], "is the name of the classes [0, 2]: give the id"),
        (["{folder}", "--labels", "1", "--seed", "1", "2", "--num-images-per-label", "3"], "is 3 and there are 2 seeds"),
        (["{folder}", "--labels", "1", "--output", "a.jpg"], "a.jpg is no .png"),
        (["{folder}", "--labels", "all", "--files", "--output", "a.png"], "--files are 3 files, and --output a.png is one"),
        (["{folder}", "--labels", "1", "--output", "mine.txt"], "mine.txt is a file: give a folder, or FILE.png"),
        (["{folder}", "--labels", "1", "--output", "mine.png"], "mine.png would be replaced: give another --output"),
        (["{folder}", "--labels", "1", "--grid", "--num-images-per-label", "5000"], "a grid shows up to 4096 images, got 5000"),
        (["{folder}", "--labels", "1", "--guidance-scale", "0"], "guidance_scale must be finite and above 0"),
        (["{folder}", "--labels", "1", "--style", "1"], "style_labels must be [1, 2], got [1, 1]"),
        (["fashion-mnits", "--labels", "1"], "did you mean fashion-mnist?"),
        (["./nowhere", "--labels", "1"], "there is no folder ./nowhere"),
        (["mine.txt", "--labels", "1"], "mine.txt is a file: give the folder of a pipeline"),
        (["above", "--labels", "1"], "did you mean above/inside?"),
        (["nobody/nothing", "--labels", "1"], "nobody/nothing is no folder and not in the cache, and HF_HUB_OFFLINE"),
    ],
)
def test_mistakes_of_sample_are_one_line_and_leave_nothing(folder, here, capsys, words, message):
    Path("mine.txt").write_text("mine")
    Path("mine.png").write_text("mine")
    Path("above/inside").mkdir(parents=True)
    Path("above/inside/model_index.json").touch()
    before = sorted(here.rglob("*"))
    assert main(["sample", *(word.format(folder=folder) for word in words)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("drifting-diffusers: error: ")
    assert message.format(folder=folder) in error
    assert error.count("\n") == 1
    assert sorted(here.rglob("*")) == before
    assert Path("mine.png").read_text() == "mine"


def test_overwrite_replaces(folder, here):
    Path("mine.png").write_text("mine")
    assert main(["sample", str(folder), "--labels", "1", "--output", "mine.png", "--overwrite"]) == 0
    assert pixels("mine.png").shape == (8, 8, 1)


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--seed", "1.5"], ["--batch-size", "0"], ["--num-images-per-label", "0"]])
def test_numbers_out_of_range_are_a_wrong_command(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "x", *words])
    assert "must be an integer" in capsys.readouterr().err


def test_the_examples_of_the_shipped_model_run(here, capsys):
    lines = [words for name in ("sample", "info") for words in examples(name) if "fashion-mnist" in words]
    assert len(lines) >= 4
    for words in lines:
        assert main(words) == 0, words
    said = capsys.readouterr().out
    assert "80 images in" in said
    assert "Ankle boot" in said
    assert len([*Path("outputs/samples").iterdir()]) == 6


def test_the_command_draws_in_a_process_of_its_own(here):
    command = [Path(sys.executable).with_name("drifting-diffusers"), "sample", "fashion-mnist", "--labels", "bag", "--output", "bag.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 image in ")
    assert done.stderr == ""
    pipe = DriftingPipeline.from_pretrained(shipped_model())
    expected = pipe("bag", generator=torch.Generator().manual_seed(0)).images[0]
    assert_close(pixels("bag.png").flatten(), torch.tensor(list(expected.tobytes())), atol=1, rtol=0)


# Info


def test_info_says_what_a_pipeline_is(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["info", str(folder)]) == 0
    said = capsys.readouterr().out
    weights = sum(p.numel() for p in tiny().transformer.parameters())
    for part in ("8 x 8 pixels, grey", "3: crane, T-shirt/top, crane", "1.5 if none is given", f"{weights:,} weights (float32, "):
        assert part in said
    assert "fid              12.35       1.5  lower is better" in said
    assert "dataset user/data, seeds 0 1" in said
    assert max(map(len, said.splitlines()[1:])) <= 80


def test_info_for_machines(folder, capsys):
    assert main(["info", str(folder), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    pipe = tiny()
    weights = {"parameters": sum(p.numel() for p in pipe.transformer.parameters())}
    part = about["components"]["transformer"]
    assert part["dtypes"] == {"float32": weights["parameters"]}
    assert part["bytes"] == next(folder.glob("transformer/*.safetensors")).stat().st_size
    assert (about["classes"], about["labels"], about["guidance_scale"], about["guidance_embedding"]) == (3, NAMES, 1.5, True)
    assert about["config"]["transformer"]["num_layers"] == 1
    assert about["results"]["metrics"] == {"fid": 12.345}


def test_info_reads_the_card_where_there_are_no_results(folder, tmp_path, capsys):
    from drifting_diffusers.hub import model_card

    pipe = DriftingPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "other")
    assert main(["info", str(tmp_path / "other")]) == 0
    assert "measure it with drifting-diffusers evaluate" in capsys.readouterr().out
    (tmp_path / "other/README.md").write_text(model_card(pipe, {"metrics": {"fid": 7.5}, "dataset": "user/data"}, repo_id="user/tiny"))
    assert main(["info", str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == {"metrics": {"fid": 7.5}, "dataset": "user/data"}


def test_info_and_labels_need_no_torch(folder):
    for words in (["info", str(folder)], ["info", "fashion-mnist", "--labels"]):
        code = f"import sys; from drifting_diffusers.cli import main; assert main({words!r}) == 0; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.hub
def test_info_of_a_repository_fetches_no_weights(folder, tmp_path):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with LoopbackHub() as hub:
        hub.repositories["user/tiny"] = Repository()
        hub.repositories["user/tiny"].commit(files)
        environment = environment_of(tmp_path, hub.url)
        ask = lambda line: subprocess.run(
            [sys.executable, "-m", "drifting_diffusers.cli", *shlex.split(line)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        done, missing = ask("info user/tiny --json"), ask("info user/missing")
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert about["labels"] == NAMES
    weights = files["transformer/diffusion_pytorch_model.safetensors"]
    assert about["components"]["transformer"]["bytes"] == len(weights)
    assert about["results"]["metrics"] == {"fid": 12.345}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == weights]
    assert missing.returncode == 1
    assert missing.stderr.startswith("drifting-diffusers: error: there is no folder user/missing, and no repository of that name")
    assert missing.stderr.count("\n") == 1


def test_a_grid_of_one_image_is_a_grid(here, folder):
    assert main(["sample", str(folder), "--labels", "1", "--grid", "--output", "one.png"]) == 0
    assert pixels("one.png").shape[0] > SIDE - 8  # enlarged, and its name beside it
    assert pixels("one.png").shape[1] > pixels("one.png").shape[0]


@pytest.mark.parametrize("words", [["sample", "--labels", "1"], ["info"], ["export", "x.onnx"]], ids=lambda words: words[0])
def test_a_folder_has_no_revisions(here, folder, capsys, words):
    verb, *rest = words
    assert main([verb, str(folder), *rest, "--revision", "v1"]) == 1
    assert "--revision v1 is of a repository" in capsys.readouterr().err


def test_a_demo_of_a_typo_is_told_at_once(here, capsys):
    assert main(["demo", "fashion-mnist", "nosuch", "--no-browser"]) == 1
    assert "there is no folder nosuch" in capsys.readouterr().err
