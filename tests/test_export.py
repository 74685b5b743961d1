"""Exported files: what other runtimes draw is what PyTorch draws, by the file alone; and no file that differs, or was there, is touched."""

import importlib.util
import json
import re
import zipfile
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch.testing import assert_close

from drifting_diffusers import export
from drifting_diffusers.cli import main
from drifting_diffusers.export import ExportChoices, OneCall, export_onnx, export_program
from drifting_diffusers.generator import DriftingGenerator
from drifting_diffusers.pipeline import DriftingPipeline
from drifting_diffusers.shipped import shipped_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# torch.export follows symbolic sizes, which no annotation of an int admits.
pytestmark = pytest.mark.usefixtures("as_users_see_it")

ROOT = Path(__file__).parents[1]
HERE = str(Path(export.__file__).parents[1]).encode()

NAMES = ["cat", "Dog", "tench, Tinca tinca", "crane", "Kran, früh"]


def generator(**changes) -> DriftingGenerator:
    torch.manual_seed(0)
    size = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_class_tokens": 2}
    rest = {"in_channels": 3, "num_classes": 5, "num_style_tokens": 3, "style_codebook_size": 4}
    model = DriftingGenerator(**(size | rest | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_decoder() -> AutoencoderTiny:
    torch.manual_seed(1)
    blocks = {"encoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(decoder_block_out_channels=(8, 8), scaling_factor=0.5, **blocks).eval()


def kl_decoder() -> AutoencoderKL:
    torch.manual_seed(1)
    one = {"block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 8, "scaling_factor": 0.2, "shift_factor": 0.1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(latent_channels=4, **one, **blocks).eval()


def pipeline(vae=None, labels=None, guidance_scale: float = 1.0, **changes) -> DriftingPipeline:
    return DriftingPipeline(generator(**changes), vae=vae, labels=labels, guidance_scale=guidance_scale)


def drawn(pipe: DriftingPipeline, output_type: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the pipeline itself makes of the same noise."""
    batch = len(inputs["noise"])
    many = {} if "class_labels" in inputs else {"num_images_per_label": batch}
    scale = {"guidance_scale": inputs["guidance_scale"]} if "guidance_scale" in inputs else {}
    images = pipe(
        inputs.get("class_labels"),
        latents=inputs["noise"],
        style_labels=inputs.get("style_labels"),
        output_type=output_type,
        **many,
        **scale,
    ).images
    return images if isinstance(images, torch.Tensor) else torch.from_numpy(images)


def by_onnxruntime(file: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == list(inputs)  # those and no others, in this order
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def by_torch(file: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.export.load(file).module()(**inputs)


def signed(images: torch.Tensor) -> torch.Tensor:
    return images * 2 - 1


# What generators differ in. Each is of several differences at once, because writing ONNX takes seconds.
GENERATORS = {
    "everything": {},
    "nothing": {
        "num_classes": 0,
        "num_style_tokens": 0,
        "guidance_embedding": False,
        "num_class_tokens": 0,
        "rope": False,
        "qk_norm": False,
    },
    "rectangle": {"sample_size": (4, 12), "norm_type": "layer_norm", "activation": "gelu", "num_style_tokens": 0, "out_channels": 1},
    "classes alone": {"num_style_tokens": 0, "guidance_embedding": False, "condition_dim": 12, "num_layers": 2, "patch_size": 4},
    "styles alone": {"num_classes": 0, "guidance_embedding": False, "norm_type": "layer_norm", "in_channels": 1},
}


@pytest.mark.slow  # by default the shipped model is drawn, and one with a decoder
@pytest.mark.parametrize("name", GENERATORS)
def test_onnxruntime_draws_what_the_pipeline_draws(tmp_path, name):
    pipe = pipeline(**GENERATORS[name])
    done = export_onnx(pipe, tmp_path / "a.onnx", output_range="unit")
    assert done.max_error < 1e-5
    for batch in (1, 3, 8):  # of one file
        inputs = OneCall(pipe, ExportChoices()).random_inputs(batch, seed=batch + 10)
        assert_close(by_onnxruntime(done.file, inputs), drawn(pipe, "pt", inputs), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATORS)
def test_a_program_draws_what_the_pipeline_draws(tmp_path, name):
    pipe = pipeline(**GENERATORS[name])
    done = export_program(pipe, tmp_path / "a.pt2")
    assert done.max_error < 1e-6  # the program has the formulas as they read, drawing those of fewer passes
    for batch in (1, 3, 8):
        inputs = OneCall(pipe, ExportChoices()).random_inputs(batch, seed=batch + 10)
        assert_close(by_torch(done.file, inputs), signed(drawn(pipe, "pt", inputs)), atol=1e-6, rtol=0)


DECODERS = {"tiny": tiny_decoder, "kl": kl_decoder}


@pytest.mark.parametrize("name", [pytest.param("tiny"), pytest.param("kl", marks=pytest.mark.slow)])
def test_onnxruntime_decodes(tmp_path, name):
    pipe = pipeline(DECODERS[name](), in_channels=4)
    done = export_onnx(pipe, tmp_path / "a.onnx", output_range="unit")
    assert done.metadata["decoder"] == type(pipe.vae).__name__
    assert json.loads(done.metadata["output"]) == {"name": "images", "type": "float32", "shape": ["batch", 3, 16, 16], "range": [0, 1]}
    for batch in (1, 3, 8):
        inputs = OneCall(pipe, ExportChoices()).random_inputs(batch, seed=batch)
        images = by_onnxruntime(done.file, inputs)
        assert images.std() > 0.01
        assert_close(images, drawn(pipe, "pt", inputs), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_a_program_decodes(tmp_path, name):
    pipe = pipeline(DECODERS[name](), in_channels=4)
    done = export_program(pipe, tmp_path / "images.pt2")
    for batch in (1, 3, 8):
        inputs = OneCall(pipe, ExportChoices()).random_inputs(batch, seed=5)
        assert_close(by_torch(done.file, inputs), signed(drawn(pipe, "pt", inputs)), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_latents_are_what_the_generator_returns(tmp_path):
    pipe = pipeline(kl_decoder(), in_channels=4)
    inputs = OneCall(pipe, ExportChoices()).random_inputs(3, seed=5)
    done = export_program(pipe, tmp_path / "latents.pt2", with_decoder=False)
    assert json.loads(done.metadata["output"]) == {"name": "latents", "type": "float32", "shape": ["batch", 4, 8, 8]}
    assert_close(by_torch(done.file, inputs), drawn(pipe, "latent", inputs), atol=1e-5, rtol=0)


# -- the shipped model, by the file alone


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """Exported by the command."""
    file = tmp_path_factory.mktemp("shipped") / "clothes.onnx"
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert main(["export", "fashion-mnist", str(file), "--output-range", "unit"]) == 0
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    return file


def test_the_shipped_model_by_name_from_the_file_alone(shipped):
    session = onnxruntime.InferenceSession(shipped, providers=["CPUExecutionProvider"])
    meta = session.get_modelmeta().custom_metadata_map
    described, rng = json.loads(meta["inputs"]), np.random.default_rng(0)
    wanted = [json.loads(meta["labels"]).index(name) for name in ("Sneaker", "Bag", "Sneaker")]
    draw = {
        "noise": lambda shape, _: rng.standard_normal(shape, dtype=np.float32),
        "class_labels": lambda *_: np.array(wanted),
        "guidance_scale": lambda shape, entry: np.full(shape, entry["default"], np.float32),
        "style_labels": lambda shape, entry: rng.integers(entry["range"][0], entry["range"][1] + 1, shape),
    }
    inputs = {name: draw[name]((3, *entry["shape"][1:]), entry) for name, entry in described.items()}
    images = torch.from_numpy(session.run(["images"], inputs)[0])

    pipe = DriftingPipeline.from_pretrained(shipped_model("fashion-mnist"))
    expected = pipe(
        ["Sneaker", "Bag", "Sneaker"], latents=inputs["noise"], style_labels=inputs.get("style_labels"), output_type="pt"
    ).images
    assert_close(images, expected, atol=1e-5, rtol=0)
    assert meta["source"] == "drifting_diffusers: fashion-mnist"
    assert json.loads(meta["guidance_scale"]) == pipe.config.guidance_scale


def test_the_command_says_what_it_wrote(shipped, tmp_path, capsys):
    target = tmp_path / "new" / "clothes"
    assert main(["export", str(shipped_model()), str(target), "--format", "pt2", "--batch-size", "2", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert f"{target}.pt2: " in said
    assert "computes in bfloat16" in said
    assert "takes noise: float32 [2, 1, 28, 28]" in said
    assert "returns images: float32 [2, 1, 28, 28] in [-1, 1]" in said
    assert "the largest error is " in said
    assert [file.name for file in target.parent.iterdir()] == ["clothes.pt2"]


@pytest.mark.slow
def test_the_command_takes_another_decoder(tmp_path):
    pipeline(kl_decoder(), in_channels=4).save_pretrained(tmp_path / "pipeline")
    tiny_decoder().save_pretrained(tmp_path / "tiny")
    words = ["export", str(tmp_path / "pipeline"), str(tmp_path / "a.pt2"), "--decoder", str(tmp_path / "tiny")]
    assert main(words) == 0
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        metadata = json.loads(archive.read(next(name for name in archive.namelist() if name.endswith("metadata.json"))))
    assert metadata["decoder"] == "AutoencoderTiny"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["fashion-mnist", "{}/a"], "TARGET {}/a says no format: let it end in .onnx or .pt2, or give --format"),
        (["fashion-mnist", "{}/a.onnx", "--format", "pt2"], "TARGET {}/a.onnx ends in .onnx, --format says pt2: give one of them"),
        (["fashion-mnist", "{}/there.onnx"], "{}/there.onnx exists: give another TARGET, or --overwrite"),
        (["fashion-mnist", "{}/a.pt2", "--with-decoder"], "this pipeline has no decoder"),
        (["fashion-mnist", "{}/a.pt2", "--decoder", "x/y", "--no-decoder"], "--decoder x/y and --no-decoder contradict each other"),
        (["fashion-mnits", "{}/a.pt2"], "did you mean fashion-mnist?"),
    ],
)
def test_errors_of_the_command_are_one_line(tmp_path, capsys, words, error):
    (tmp_path / "there.onnx").write_text("mine")
    assert main(["export", *(word.format(tmp_path) for word in words)]) == 1
    said = capsys.readouterr().err
    assert error.format(tmp_path) in said
    assert said.count("\n") == 1
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("there.onnx", "mine")]


def test_without_onnx_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find(name, *rest))
    assert main(["export", "fashion-mnist", str(tmp_path / "a.onnx")]) == 1
    assert "ONNX needs onnxscript: pip install 'drifting-diffusers[export]'" in capsys.readouterr().err


# -- what stands in a file


def test_metadata_of_a_program(tmp_path):
    pipe = pipeline(labels=NAMES, guidance_scale=1.5)
    pipe.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine/README.md").write_text("---\nlicense: cc-by-4.0\n---\nclothes\n")
    done = export_program(DriftingPipeline.from_pretrained(tmp_path / "mine"), tmp_path / "a.pt2", dtype=torch.bfloat16)
    extra = {"metadata.json": ""}
    program = torch.export.load(done.file, extra_files=extra).module()
    for batch in (1, 3, 8):
        inputs = OneCall(pipe, ExportChoices()).random_inputs(batch, seed=batch)
        assert_close(program(**inputs), signed(drawn(pipe, "pt", inputs)), atol=0.1, rtol=0)
    metadata = json.loads(extra["metadata.json"])
    assert metadata == done.metadata
    assert json.loads(metadata["labels"]) == NAMES
    assert metadata["guidance_scale"] == "1.5"
    assert metadata["model_license"] == "cc-by-4.0"
    assert metadata["dtype"] == "bfloat16"
    assert metadata["library_version"]
    assert "source" not in metadata  # a folder's place is nobody's business
    with zipfile.ZipFile(done.file) as archive:
        assert not [name for name in archive.namelist() if HERE in archive.read(name)]
    assert json.loads(metadata["inputs"]) == {
        "noise": {"type": "float32", "shape": ["batch", 3, 8, 8], "law": "standard normal"},
        "class_labels": {"type": "int64", "shape": ["batch"], "range": [0, 4]},
        "guidance_scale": {"type": "float32", "shape": ["batch"], "default": 1.5, "above": 0},
        "style_labels": {"type": "int64", "shape": ["batch", 3], "range": [0, 3], "law": "uniform"},
    }


def test_batches_have_a_name_and_weights_stand_in_the_file(shipped):
    assert HERE not in shipped.read_bytes()  # where it was made is nobody's business
    graph = onnx.load(shipped, load_external_data=False).graph
    assert [each.type.tensor_type.shape.dim[0].dim_param for each in (*graph.input, *graph.output)] == ["batch"] * (len(graph.input) + 1)
    assert {each.data_location for each in graph.initializer} == {onnx.TensorProto.DEFAULT}
    assert [each.name for each in shipped.parent.iterdir()] == [shipped.name]


@pytest.mark.slow
def test_large_weights_stand_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_FILE", 1000)
    pipe = pipeline(num_style_tokens=0)
    done = export_onnx(pipe, tmp_path / "a.onnx", batch_size=2, dtype=torch.float16)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    assert done.size == sum(each.stat().st_size for each in tmp_path.iterdir())
    inputs = OneCall(pipe, ExportChoices()).random_inputs(2, seed=5)
    assert_close(by_onnxruntime(done.file, inputs), signed(drawn(pipe, "pt", inputs)), atol=2e-2, rtol=0)


# -- what is left alone


@pytest.mark.slow
def test_the_pipeline_is_left_as_it_is(tmp_path):
    pipe = pipeline(kl_decoder(), in_channels=4).to(dtype=torch.bfloat16)
    pipe.transformer.train()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    export_program(pipe, tmp_path / "a.pt2", dtype=torch.float16)
    assert pipe.transformer.training
    assert {value.dtype for value in pipe.vae.state_dict().values()} == {torch.bfloat16}
    assert_close(pipe.transformer.state_dict(), before, atol=0, rtol=0)
    assert all(parameter.requires_grad for parameter in pipe.transformer.parameters())


@pytest.mark.slow
def test_adapters_and_offloading_are_no_obstacle(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = pipeline(num_style_tokens=0)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    inputs = OneCall(pipe, ExportChoices()).random_inputs(2, seed=5)
    expected = drawn(pipe, "pt", inputs)
    pipe.enable_model_cpu_offload(device="cpu")
    done = export_program(pipe, tmp_path / "a.pt2")
    assert_close(by_torch(done.file, inputs), signed(expected), atol=1e-5, rtol=0)
    assert pipe.transformer.peft_config


def test_a_file_that_is_there_stays_without_a_good_one_to_replace_it(tmp_path):
    file, pipe = tmp_path / "a.pt2", pipeline(num_style_tokens=0)
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"a\.pt2 exists: give another name, or overwrite=True"):
        export_program(pipe, file)
    with pytest.raises(ValueError, match=r"the graph in float16 differs from PyTorch by .* where 1e-09 is allowed, so nothing was written"):
        export_program(pipe, file, dtype=torch.float16, tolerance=1e-9, overwrite=True)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.pt2", "mine")]


@pytest.mark.slow
def test_a_good_file_replaces_another_when_told(tmp_path):
    file, pipe = tmp_path / "a.pt2", pipeline(num_style_tokens=0)
    file.write_text("mine")
    export_program(pipe, file, overwrite=True)
    assert by_torch(file, OneCall(pipe, ExportChoices()).random_inputs(2, seed=0)).shape == (2, 3, 8, 8)
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt2"]


@pytest.mark.parametrize("write", [export_onnx, export_program])
def test_numbers_too_large_for_float16_are_refused(tmp_path, write):
    pipe = pipeline()
    pipe.transformer.transformer_blocks[0].ff.net[2].bias.data += 1e6
    with pytest.raises(
        ValueError, match="in float16 this pipeline returns NaN: its numbers are too large for it, take bfloat16 or float32"
    ):
        write(pipe, tmp_path / f"a.{'onnx' if write is export_onnx else 'pt2'}", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_onnxruntime_cannot_run_is_written_only_when_told(tmp_path):
    with pytest.raises(ValueError, match="onnxruntime does not run this graph, so nothing was written"):
        export_onnx(pipeline(), tmp_path / "a.onnx", dtype=torch.bfloat16)
    assert not list(tmp_path.iterdir())
    done = export_onnx(pipeline(), tmp_path / "a.onnx", dtype=torch.bfloat16, check=False)
    assert (done.max_error, done.tolerance, done.checked) == (None, None, "not checked, as told")
    assert onnx.TensorProto.BFLOAT16 in {each.data_type for each in onnx.load(done.file).graph.initializer}


@pytest.mark.parametrize(
    ("choices", "error"),
    [
        ({"dtype": torch.float64}, "dtype must be one of torch.float32, torch.float16, torch.bfloat16, got torch.float64"),
        ({"batch_size": 0}, "batch_size must be at least 1, or None for any, got 0"),
        ({"output_range": "byte"}, r"output_range must be one of \('signed', 'unit'\), got 'byte'"),
        ({"tolerance": 0.0}, "tolerance must be above 0, got 0.0"),
        ({"with_decoder": True}, "this pipeline has no decoder: load it with a vae, or export it without"),
    ],
)
def test_choices_that_do_not_fit(tmp_path, choices, error):
    with pytest.raises(ValueError, match=error):
        export_program(pipeline(), tmp_path / "a.pt2", **choices)


def test_latents_have_no_range(tmp_path):
    with pytest.raises(ValueError, match="output_range is of images, got 'unit' for latents"):
        export_program(pipeline(in_channels=4), tmp_path / "a.pt2", output_range="unit")


@pytest.mark.parametrize(("write", "ending"), [(export_onnx, ".onnx"), (export_program, ".pt2")])
def test_the_ending_is_the_format(tmp_path, write, ending):
    with pytest.raises(ValueError, match=f"must end in {ending}, got a.bin"):
        write(pipeline(), tmp_path / "a.bin")


# -- the page and the example


@pytest.mark.slow
def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL):
        exec(compile(block, "export.md", "exec"), names)
    assert names["images"].shape == (3, 1, 28, 28)
    assert_close(names["same"], torch.from_numpy(names["images"]), atol=1e-5, rtol=0)
    assert json.loads(names["extra"]["metadata.json"]) == json.loads(Path("clothes.json").read_text())
    assert {name: str(value.dtype) for name, value in names["feeds"].items()} == {
        name: entry["type"] for name, entry in names["inputs"].items()
    }


@pytest.mark.slow
def test_the_example_runs(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("export_example", ROOT / "examples/07_export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images = module.main(["--output_dir", str(tmp_path), "--repeats", "2"])
    assert images.shape == (80, 1, 28, 28)
    assert images.min() >= 0
    assert images.max() <= 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clothes.onnx", "clothes.png"]
    assert capsys.readouterr().out.count("ms per image") == 4
