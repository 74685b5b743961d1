"""The Space as programs meet it: every endpoint, messages for what does not work, the commands that open it."""

import base64
import io
import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from loopback_hub import LoopbackHub, Repository, run_script
from PIL import Image
from space_server import serving

from drifting_diffusers import DriftingGenerator, DriftingPipeline
from drifting_diffusers.cli import main
from drifting_diffusers.cli.demo import find_space
from drifting_diffusers.playground import CHOICES, TARGETS

pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of gradio_client's own threads
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parents[1]
SMALL = {"sample_size": 8, "patch_size": 4, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}


def pipeline(folder: Path, *, seed: int, labels=None, **choices) -> Path:
    """A tiny generator with random weights; a new one draws nothing but grey."""
    torch.manual_seed(seed)
    model = DriftingGenerator(**(SMALL | choices))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    DriftingPipeline(model, labels=labels).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A client of a page with the shipped model, one with guidance and without names, and one without classes or styles."""
    folder = tmp_path_factory.mktemp("space")
    guided = pipeline(folder / "guided", seed=0, in_channels=3, num_classes=12, num_style_tokens=2)
    plain = pipeline(folder / "plain", seed=1, in_channels=1, num_classes=0, num_style_tokens=0, guidance_embedding=False)
    with serving(folder, "demo", "fashion-mnist", str(guided), str(plain)) as (address, _, log):
        found = client.Client(address, verbose=False, download_files=str(folder / "got"))
        found.log = log
        yield found
        found.close()


def refused(page, *given, api_name: str) -> str:
    """The message of a call that does not work; nothing of the server's inside is in it."""
    with pytest.raises(client.exceptions.AppError) as told:
        page.predict(*given, api_name=api_name)
    message = str(told.value)
    assert "Traceback" not in message
    assert "File " not in message
    return message


def test_every_endpoint_has_a_name(page):
    assert page.view_api(return_format="dict")["named_endpoints"].keys() == {"/draw", "/interpolate", "/styles", "/about", "/play"}
    assert not page.view_api(return_format="dict")["unnamed_endpoints"]


def test_draw(page):
    sheet, told = page.predict("fashion-mnist", ["Sneaker", "bag"], 1, 3, 5, api_name="/draw")
    same, _ = page.predict("fashion-mnist", ["Sneaker", "Bag"], 1, 3, 5, api_name="/draw")
    other, _ = page.predict("fashion-mnist", ["Sneaker", "Bag"], 1, 3, 6, api_name="/draw")
    assert told.startswith("**6 images** in one network call, **")
    with Image.open(sheet) as image:
        assert image.height > 2 * 112  # 28 pixels, four times as large
        assert image.width > 3 * 112
        assert image.convert("L").getextrema()[1] > 200
    assert Path(sheet).read_bytes() == Path(same).read_bytes()
    assert Path(sheet).read_bytes() != Path(other).read_bytes()


def test_guidance_changes_a_model_that_knows_it(page):
    plain, guided = (page.predict("guided", [3, 4], scale, 2, 0, api_name="/draw")[0] for scale in (1, 3))
    assert Path(plain).read_bytes() != Path(guided).read_bytes()


def test_a_model_without_classes_draws(page):
    _, told = page.predict("plain", [], 1, 4, 0, api_name="/draw")
    assert told.startswith("**4 images** in one")


@pytest.mark.parametrize(("between", "first", "second"), [("two classes", "Sneaker", "Trouser"), ("two noises", "Bag", None)])
def test_interpolate(page, between, first, second):
    file, told = page.predict("fashion-mnist", between, first, second, 1, 8, 0, api_name="/interpolate")
    assert told.startswith("**64 images** in one network call")
    with Image.open(file) as film:
        assert film.format == "WEBP"
        assert film.n_frames == 14  # 8 there, 6 back, and again
        assert film.info["loop"] == 0
        stills = []
        for i in range(8):
            film.seek(i)
            stills.append(film.convert("RGB").tobytes())
    assert len(set(stills)) == 8


def test_styles(page):
    sheet, told = page.predict("fashion-mnist", "Sneaker", 1, 2, 3, 0, api_name="/styles")
    assert told.startswith("**6 images** in one network call")
    with Image.open(sheet) as image:
        assert image.width > 3 * 112
        assert image.height > 2 * 112


def test_about_says_what_a_model_knows(page):
    scale, *lists = page.predict("guided", api_name="/about")
    assert scale["interactive"] is True
    assert [choice for choice, _ in lists[0]["choices"]] == [f"class {i}" for i in range(12)]
    scale, *lists = page.predict("plain", api_name="/about")
    assert scale["interactive"] is False
    assert scale["info"] == "this model was built without guidance"
    assert all(entry["visible"] is False for entry in lists)


def test_play(page):
    job = page.submit("heart", None, "drifting", 0.2, "corner", 40, 50, 0, api_name="/play")
    job.result(timeout=120)
    frames = [json.loads(text) for text in job.outputs()]
    assert [frame["step"] for frame in frames][-1] == 40
    assert all(len(frame["particles"]) == len(frame["generated"]) == 100 for frame in frames)
    assert len(frames[-1]["energies"]) == 41
    assert frames[-1]["energies"][0] > frames[-1]["energies"][-1]


def test_play_a_drawing(page):
    picture = Image.new("RGBA", (100, 100))
    picture.paste((0, 0, 0, 255), (60, 0, 100, 40))  # the upper right corner
    file = io.BytesIO()
    picture.save(file, "PNG")
    given = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    target = json.loads(page.predict("my drawing", given, "score", 0.2, "middle", 40, 50, 0, api_name="/play"))["target"]
    assert min(target) >= 600
    assert max(target) <= 1000


@pytest.mark.parametrize(
    ("api_name", "given", "message"),
    [
        ("/draw", ["fashion-mnist", ["sneeker"], 1, 3, 0], "no class is named 'sneeker'; did you mean 'Sneaker'?"),
        ("/draw", ["fashion-mnist", [], 1, 3, 0], "choose at least one class"),
        ("/draw", ["fashion-mnist", ["Bag"], 1, 16, 2**40], "a seed is a whole number from 0"),
        ("/draw", ["fashion-mnist", ["Bag"] * 1000, 1, 10, 0], "10000 images are more than the 256"),
        ("/draw", ["guided", ["12"], 1, 1, 0], "class ids must lie from 0 to 11, got 12"),
        ("/draw", ["/etc", ["Bag"], 1, 1, 0], "no model is named '/etc'"),
        ("/draw", ["nobody", ["Bag"], 1, 1, 0], "no model is named 'nobody'"),
        ("/draw", ["nobody/nothing", ["Bag"], 1, 1, 0], "nobody/nothing cannot be loaded"),
        ("/interpolate", ["fashion-mnist", "two classes", "Bag", "Bag", 1, 8, 0], "choose two different classes"),
        ("/interpolate", ["plain", "two classes", None, None, 1, 8, 0], "knows no classes"),
        ("/styles", ["plain", None, 1, 2, 2, 0], "built without style tokens"),
        ("/play", ["my drawing", "data:image/png;base64,AAAA", "drifting", 0.2, "middle", 40, 50, 0], "cannot identify image file"),
        ("/play", ["my drawing", "https://x.y/z.png", "drifting", 0.2, "middle", 40, 50, 0], "a drawing is a PNG"),
        ("/play", ["my drawing", None, "drifting", 0.2, "middle", 40, 50, 0], "the drawing is empty"),
    ],
    ids=str,
)
def test_what_does_not_work_is_told(page, api_name, given, message):
    assert message in refused(page, *given, api_name=api_name)


def test_limits_hold_for_programs_too(page):
    asked = ["spiral", None, "drifting", 0.2, "middle", 240, 100, 0]
    for place, value in {5: 10_000, 6: 100_000, 3: 50}.items():
        assert refused(page, *asked[:place], value, *asked[place + 1 :], api_name="/play")


def test_the_server_saw_no_fault_of_its_own(page):
    """After all of the above, in their order. What Gradio itself refuses, it writes down; what is a fault of ours, `messages` does."""
    assert "the demo failed" not in page.log.read_text()


def test_the_playground_needs_no_model_and_ctrl_c_ends_it(tmp_path):
    with serving(tmp_path, "playground") as (address, process, log):
        found = client.Client(address, verbose=False)
        assert found.view_api(return_format="dict")["named_endpoints"].keys() == {"/play"}
        found.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
    assert "Traceback" not in log.read_text()


def test_a_port_that_is_none_and_a_model_that_is_none(tmp_path, capsys):
    assert main(["demo", "--port", "70000"]) == 1
    assert capsys.readouterr().err == "drifting-diffusers: error: --port must be from 0 to 65535, got 70000\n"


def test_without_gradio_the_command_says_what_to_install(tmp_path):
    """An interpreter that finds no gradio."""
    code = (
        "import sys; from importlib.machinery import PathFinder; find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: None if name == 'gradio' else find(name, *rest)\n"
        "from drifting_diffusers.cli import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    message = "the page is made with gradio, which is not installed: pip install 'drifting-diffusers[demo]'"
    assert done.stderr == f"drifting-diffusers: error: {message}\n"


def test_the_space_is_ready_for_the_hub():
    folder = find_space()
    assert folder == ROOT / "spaces/drifting-demo"
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["sdk_version"], front["python_version"]) == ("gradio", "6.31.0", "3.12")
    assert (folder / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60  # the Hub's limit
    assert len((folder / "app.py").read_text().splitlines()) <= 150
    assert "drifting-diffusers" in (folder / "requirements.txt").read_text()


def test_choices_of_the_page_are_those_of_the_library(page):
    parameters = page.view_api(return_format="dict")["named_endpoints"]["/play"]["parameters"]
    choices = {entry["parameter_name"]: entry["type"].get("enum") for entry in parameters}
    assert choices["target"] == [*TARGETS, "my drawing"]
    assert choices["field"] == list(CHOICES)


@pytest.mark.slow
def test_the_wheel_holds_the_space(tmp_path):
    """Built as pip builds it, with the build backend from the registry; the editable install of the tests would not notice."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = {entry for entry in wheel.namelist() if entry.startswith("drifting_diffusers/space/")}
    assert inside == {f"drifting_diffusers/space/{file.name}" for file in find_space().iterdir() if file.is_file()}


@pytest.mark.hub
def test_a_visitors_repository_is_fetched_without_the_owners_token_and_up_to_a_size(tmp_path):
    pipeline(tmp_path / "pipeline", seed=0, in_channels=1, num_classes=2, num_style_tokens=0)
    content = {
        str(file.relative_to(tmp_path / "pipeline")): file.read_bytes() for file in (tmp_path / "pipeline").rglob("*.*") if file.is_file()
    }
    with LoopbackHub() as hub:
        for name, private in (("tester/public", False), ("tester/private", True)):
            hub.repositories[name] = Repository(private=private)
            hub.repositories[name].commit(content)
        run_script(
            f"""
import sys
sys.path.insert(0, {str(find_space())!r})
import models
from drifting_diffusers import DriftingPipeline

assert models.load("tester/public").transformer.config.num_classes == 2
DriftingPipeline.from_pretrained("tester/private")  # the token opens it
for name, limit, sentence in (("tester/private", models.MOST_BYTES, "public"), ("tester/public", 1000, "this page fetches up to")):
    models.MOST_BYTES = limit
    models.load.cache_clear()
    try:
        models.load(name)
    except (OSError, ValueError) as error:
        assert sentence in str(error), error
    else:
        raise AssertionError(name)
""",
            tmp_path,
            hub.url,
        )
