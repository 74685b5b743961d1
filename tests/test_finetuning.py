"""Fine-tuning: what is kept and what is new, what adapters train, and the example from a folder of images to a card on the Hub."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from diffusers import AutoencoderKL
from loopback_hub import LoopbackHub, run_script
from PIL import Image
from torch.testing import assert_close

from drifting_diffusers import DriftingConfig, DriftingGenerator, DriftingObjective, DriftingPipeline, DriftingTrainer, Pixels
from drifting_diffusers.finetuning import add_lora, kept_classes, load_lora, merge_lora, save_lora, with_classes
from drifting_diffusers.hub import model_card

EXAMPLE = Path(__file__).parents[1] / "examples/finetune.py"
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="adapters need peft, which is not installed")
BASE = ["cat", "dog", "fox"]


@pytest.fixture(autouse=True)
def one_accelerator_per_test():
    """Accelerate keeps one state per process, which knows one precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def generator(**changes):
    """All weights random: a fresh generator returns zeros, whatever it is asked for."""
    torch.manual_seed(0)
    small = {"sample_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 3, "num_layers": 2, "num_attention_heads": 2}
    small |= {"attention_head_dim": 8, "num_class_tokens": 1, "num_style_tokens": 2, "style_codebook_size": 4}
    model = DriftingGenerator(**(small | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@torch.no_grad()
def draw(model, label=None):
    """Two samples, always of the same noise."""
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(2, model.config.in_channels, 8, 8, generator=rng)
    labels = torch.full((2,), label) if model.config.num_classes else None
    styles = torch.randint(4, (2, model.config.num_style_tokens), generator=rng)
    return model(noise, labels, 1.5 if model.config.guidance_embedding else 1.0, styles).sample


# -- classes


def test_classes_of_the_same_name_draw_what_they_drew():
    base = generator()
    ours = with_classes(base, 2, labels=["fox", "cat"], base_labels=BASE)
    assert_close(draw(ours, 0), draw(base, 2), rtol=0, atol=0)
    assert_close(draw(ours, 1), draw(base, 0), rtol=0, atol=0)


def test_new_classes_start_from_the_mean():
    base = generator()
    ours = with_classes(base, 4, labels=["wolf", "dog", "Cat", "fo"], base_labels=BASE)  # near names are other classes
    table, mean = ours.class_embedding.weight, base.class_embedding.weight.mean(0)
    assert table.shape == (4, 16)
    assert_close(table[[0, 2, 3]], mean.expand(3, -1))
    assert_close(table[1], base.class_embedding.weight[1], rtol=0, atol=0)
    assert_close(draw(ours, 0), draw(ours, 3), rtol=0, atol=0)
    assert_close(with_classes(base, 5).class_embedding.weight, mean.expand(5, -1))  # without names nothing is known
    assert kept_classes(["dog", "a", "cat"], BASE) == {0: 1, 2: 0}


def test_the_copy_shares_nothing_and_has_everything_else():
    base = generator().eval()
    before, state = base.state_dict()["class_embedding.weight"].clone(), torch.get_rng_state()
    ours = with_classes(base, 2)
    assert_close(torch.get_rng_state(), state)  # nothing is drawn
    assert ours.config.num_classes == 2
    assert base.config.num_classes == 3
    rest = lambda model: {name: value for name, value in model.config.items() if name != "num_classes" and not name.startswith("_")}
    assert rest(ours) == rest(base)
    assert not ours.training
    assert all(p.requires_grad and p.device == base.device for p in ours.parameters())
    for name, value in ours.state_dict().items():
        if name != "class_embedding.weight":
            assert_close(value, base.state_dict()[name], rtol=0, atol=0)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    assert_close(base.class_embedding.weight, before)
    assert with_classes(base.to(torch.bfloat16), 2).dtype == torch.bfloat16


def test_a_base_without_classes_draws_what_it_drew():
    base = generator(num_classes=0)
    assert_close(draw(with_classes(base, 2), 1), draw(base), rtol=0, atol=0)


def test_a_new_generator_is_saved_and_loaded(tmp_path):
    ours = with_classes(generator(), 2, labels=["fox", "owl"], base_labels=BASE)
    DriftingPipeline(ours, labels=["fox", "owl"]).save_pretrained(tmp_path / "pipeline")
    loaded = DriftingPipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.labels == ["fox", "owl"]
    assert_close(draw(loaded.transformer, 1), draw(ours, 1))
    again = with_classes(loaded.transformer, 3)
    again.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again/config.json").read_text()


@pytest.mark.parametrize(
    ("count", "labels", "base_labels", "words"),
    [
        (0, None, None, "num_classes must be an integer of at least 1, got 0"),
        (True, None, None, "got True"),
        (2, ["a"], None, "labels must name all 2 classes, got 1"),
        (2, ["a", "b"], ["cat"], "base_labels must name the base's 3 classes, got 1"),
        (2, ["a", "a"], None, r"got \['a'\] more than once"),
        (2, ["a", "cat"], ["cat", "cat", "fox"], r"'cat' is the name of the base's classes \[0, 1\]"),
    ],
)
def test_classes_that_do_not_fit_are_refused(as_users_see_it, count, labels, base_labels, words):
    with pytest.raises(ValueError, match=words):
        with_classes(generator(), count, labels=labels, base_labels=base_labels)


def test_labels_that_are_no_names_are_refused(as_users_see_it):
    with pytest.raises(TypeError, match="must be names, got 3"):
        with_classes(generator(), 1, labels=[3])
    fused = generator()
    fused.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        with_classes(fused, 2)


# -- adapters


def images(classes=("left", "right"), each=10):
    """A bright column at a place that tells the class."""
    rng, pictures, labels = torch.Generator().manual_seed(0), [], []
    for i in range(each * len(classes)):
        pixels = (torch.rand(8, 8, generator=rng) * 60).byte()
        pixels[:, 4 * (i % len(classes)) :][:, :3] = 220
        pictures.append(Image.fromarray(pixels.numpy()))
        labels.append(i % len(classes))
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(classes))})
    return Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def trainer(folder, model, **changes):
    small = {"max_steps": 4, "labels_per_step": 2, "generated_per_label": 3, "positives_per_label": 4, "unconditional_per_label": 2}
    small |= {"bank_size": 8, "unconditional_bank_size": 10, "push_per_step": 4, "warmup_steps": 1, "learning_rate": 1e-2, "ema_decay": 0.5}
    small |= {"eval_steps": 2, "eval_samples_per_class": 3, "preview_steps": 0, "save_steps": 2, "logging_steps": 1}
    data = images()
    return DriftingTrainer(
        model, DriftingObjective(Pixels()), data, DriftingConfig(output_dir=str(folder), **(small | changes)), eval_dataset=data
    )


def adapted(rank=2, **options):
    return add_lora(with_classes(generator(), 2), rank, **options)


@needs_peft
def test_adapters_change_nothing_until_they_are_trained():
    plain = with_classes(generator(), 2)
    assert_close(draw(adapted(), 1), draw(plain, 1), rtol=0, atol=0)
    same = [value for name, value in adapted(seed=3).state_dict().items() if "lora_A" in name]
    assert all(a.equal(b) for a, b in zip(same, [v for n, v in adapted(seed=3).state_dict().items() if "lora_A" in n], strict=True))
    assert not same[0].equal(next(v for n, v in adapted(seed=4).state_dict().items() if "lora_A" in n))


@needs_peft
def test_only_adapters_and_classes_are_trained_and_averaged(tmp_path):
    run = trainer(tmp_path / "run", adapted())
    before = {name: value.clone() for name, value in run.generator.state_dict().items()}
    run.train()
    for weights in (run.generator.state_dict(), run.pipeline().transformer.state_dict()):
        moved = {name for name, value in weights.items() if not value.equal(before[name])}
        assert moved == {name for name in before if "lora_" in name or name == "class_embedding.weight"}
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
    here = {name.split(".lora_")[0] for name in moved if "lora_" in name}
    assert here == {f"transformer_blocks.{i}.{name}" for i in range(2) for name in targets}


@needs_peft
def test_what_is_saved_of_adapters_are_plain_weights(tmp_path):
    run = trainer(tmp_path / "run", adapted(alpha=6.0))
    run.train()
    model = run.pipeline().transformer
    merged = merge_lora(model)
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    assert merged.state_dict().keys() == generator().state_dict().keys()
    assert_close(draw(merged, 1), draw(model, 1), rtol=1e-5, atol=1e-5)
    for folder in (run.save_model(), tmp_path / "run/best"):
        saved = DriftingPipeline.from_pretrained(folder)
        assert saved.transformer.state_dict().keys() == merged.state_dict().keys()
    assert_close(draw(DriftingPipeline.from_pretrained(run.save_model()).transformer, 1), draw(merged, 1), rtol=0, atol=0)
    assert f"{sum(p.numel() for p in merged.parameters()):,} weights" in model_card(run.pipeline())


@needs_peft
def test_a_run_with_adapters_is_resumed_exactly(tmp_path):
    whole = trainer(tmp_path / "whole", adapted())
    whole.train()
    killed = trainer(tmp_path / "killed", adapted())
    step = killed._after_step

    def stop(*arguments):
        step(*arguments)
        if killed.step == 3:
            raise KeyboardInterrupt

    killed._after_step = stop
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    for others, words in ((adapted(rank=3), "'rank': 3"), (adapted(alpha=1.0), "'alpha': 1.0"), (with_classes(generator(), 2), "'lora'")):
        with pytest.raises(ValueError, match=f"holds another run.*{words}"):
            trainer(tmp_path / "killed", others)
    again = trainer(tmp_path / "killed", adapted())
    again.train()
    for name, value in whole.pipeline().transformer.state_dict().items():
        assert_close(again.pipeline().transformer.state_dict()[name], value, rtol=0, atol=0, msg=name)


@needs_peft
def test_adapters_alone_are_saved_and_loaded(tmp_path):
    model = adapted()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    save_lora(model, tmp_path / "adapter")
    loaded = load_lora(generator(), tmp_path / "adapter")
    assert loaded.config.num_classes == 2
    assert_close(draw(loaded, 1), draw(model, 1), rtol=0, atol=0)
    trained = lambda m: {name for name, p in m.named_parameters() if p.requires_grad}
    assert trained(loaded) == trained(model)
    save_lora(add_lora(generator(num_classes=0), 1), tmp_path / "unconditional")
    assert load_lora(generator(num_classes=0), tmp_path / "unconditional").config.num_classes == 0


@needs_peft
def test_adapters_that_do_not_fit_are_refused(as_users_see_it, tmp_path):
    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match="rank must be an integer of at least 1, got"):
            add_lora(generator(), rank)
    with pytest.raises(ValueError, match=r"alpha must be above 0, got -1.0"):
        add_lora(generator(), 2, alpha=-1.0)
    for targets in (["to_q", "to_nothing"], []):
        with pytest.raises(ValueError, match="targets must be ends of names of linear layers"):
            add_lora(generator(), 2, targets=targets)
    for again in (lambda: add_lora(adapted(), 2), lambda: with_classes(adapted(), 2)):
        with pytest.raises(ValueError, match=r"must have no adapters, got \['default'\]: take merge_lora"):
            again()
    for needs in (merge_lora, lambda model: save_lora(model, tmp_path)):
        with pytest.raises(ValueError, match="got one without: call add_lora"):
            needs(generator())
    with pytest.raises(FileNotFoundError, match="give a folder that save_lora wrote"):
        load_lora(generator(), tmp_path)
    save_lora(adapted(), tmp_path)
    with pytest.raises(ValueError, match=r"is \[2, 16\] and the generator's condition has 32"):
        load_lora(generator(attention_head_dim=16), tmp_path)


def test_without_peft_adapters_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'drifting-diffusers\[lora\]'"):
        add_lora(generator(), 2)


# -- the card


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_names_base_dataset_and_licence():
    pipe = DriftingPipeline(generator())
    results = {"metrics": {"energy": 0.5}, "base_model": "user/base", "dataset": "user/pets", "license": "mit"}
    card = model_card(pipe, results, repo_id="me/pets")
    found = metadata(card)
    assert (found["base_model"], found["base_model_relation"]) == ("user/base", "finetune")
    assert (found["datasets"], found["license"]) == (["user/pets"], "mit")
    assert "fine-tuned from [user/base](https://huggingface.co/user/base)" in card
    assert metadata(model_card(pipe, results | {"base_model_relation": "adapter"}))["base_model_relation"] == "adapter"
    assert not [name for name in metadata(model_card(pipe)) if name.startswith("base_model")]


# -- the example


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune"] = module  # dataclasses look their types up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A folder of 20 images of each of two classes, one of which the base knows."""
    folder = tmp_path_factory.mktemp("data") / "pets"
    dataset = images(("fox", "owl"), each=20)
    for i, row in enumerate(dataset):
        file = folder / dataset.features["label"].int2str(row["label"]) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        row["image"].resize((12, 12)).save(file)
    return folder


SHORT = ["--max_steps", "2", "--warmup_steps", "1", "--eval_steps", "0", "--preview_steps", "0"]


def arguments(base, data, folder, *more):
    where = ["--pretrained_model_name_or_path", str(base), "--dataset_name", str(data), "--output_dir", str(folder)]
    return [*where, *SHORT, *more]


@needs_peft
def test_the_example_teaches_a_pixel_pipeline(example, pets, tmp_path, capsys):
    DriftingPipeline(generator(), labels=BASE, guidance_scale=1.5).save_pretrained(tmp_path / "base")
    wanted = arguments(tmp_path / "base", pets, tmp_path / "run", "--lora_rank", "2", "--license", "mit", "--base_model", "user/base")
    found = example.main(wanted)
    assert "Classes that the base knows by name: fox; new ones: owl" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/results.json").read_text()) == found
    assert found["before"] != found["metrics"]
    assert (found["training_images"], found["samples_per_class"], found["steps"]) == (32, 2, 2)
    pipe = DriftingPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert (pipe.labels, pipe.config.guidance_scale) == (["fox", "owl"], 1.5)
    assert not [name for name in pipe.transformer.state_dict() if "lora" in name]
    with Image.open(tmp_path / "run/samples.png") as picture:
        assert picture.size == (13 * 64, 2 * 64)
    config = DriftingConfig.from_folder(tmp_path / "run")
    assert (config.labels_per_step, config.generated_per_label, config.positives_per_label, config.bank_size) == (2, 32, 16, 16)
    assert (config.unconditional_per_label, config.unconditional_bank_size, config.eval_samples_per_class) == (16, 32, 2)
    card = model_card(pipe, json.loads((tmp_path / "run/pipeline/results.json").read_text()))
    assert metadata(card)["base_model"] == "user/base"
    assert str(tmp_path) not in card

    assert example.main(wanted)["metrics"] == found["metrics"]  # the finished run
    DriftingPipeline(generator(), labels=BASE).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds another run"):
        example.main([*wanted, "--pretrained_model_name_or_path", str(tmp_path / "other")])


def test_the_example_teaches_a_latent_pipeline(example, pets, tmp_path):
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4}
    vae = AutoencoderKL(block_out_channels=(8, 8), sample_size=16, latent_channels=4, **blocks)
    base = DriftingPipeline(generator(in_channels=4, guidance_embedding=False, num_classes=0), vae=vae)
    base.save_pretrained(tmp_path / "base")
    wanted = arguments(tmp_path / "base", pets, tmp_path / "run", "--features", "pixels + statistics + windows", "--random_flip")
    found = example.main(wanted)
    assert found["features"] == ["MultiScaleStatistics", "Pixels", "Windows"]
    assert sorted(path.name for path in (tmp_path / "run-latents").iterdir()) == ["eval", "train"]
    assert json.loads((tmp_path / "run-latents/train/latent_cache.json").read_text())["latent_shape"] == [4, 8, 8]
    pipe = DriftingPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe(["owl"], output_type="pt").images.shape == (1, 3, 16, 16)
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit/config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="latents of 4 channels: take mae_latent_256"):
        example.main(arguments(tmp_path / "base", pets, tmp_path / "third", "--features", str(tmp_path / "vit"), "--random_flip"))


def test_what_the_example_cannot_do_is_refused(example, pets, tmp_path):
    DriftingPipeline(generator(), labels=BASE).save_pretrained(tmp_path / "base")
    refused = lambda *more, data=pets: example.main(arguments(tmp_path / "base", data, tmp_path / "run", *more))
    with pytest.raises(SystemExit, match=r"fewer than 4 to measure with: take --held_out_share 0.2"):
        refused("--held_out_share", "0.1")
    with pytest.raises(SystemExit, match="no column 'kind'; its columns are"):
        refused("--label_column", "kind")
    with pytest.raises(SystemExit, match="for images without labels, and there is a column 'label'"):
        refused("--class_name", "owl")
    with pytest.raises(SystemExit, match=r"no column 'label'.*set --class_name"):
        refused(data=pets / "owl")
    with pytest.raises(ValueError, match="a classifier needs at least 2 classes"):
        refused("--features", "classifier", "--class_name", "owl", data=pets / "owl")
    with pytest.raises(SystemExit):
        refused("--held_out_share", "1.5")
    assert not (tmp_path / "run").exists()


def test_the_page_names_options_that_there_are(example):
    page = (EXAMPLE.parents[1] / "docs/finetune.md").read_text()
    known = {entry.name for kind in (example.Arguments, example.Choices) for entry in dataclasses.fields(kind)}
    assert set(re.findall(r"--(\w+)", page)) - {"help"} <= known


@pytest.mark.hub
def test_a_push_names_its_base(pets, tmp_path):
    """From a repository of the Hub to another, in a process of its own, since the endpoint is read when the library is imported."""
    DriftingPipeline(generator(), labels=BASE).save_pretrained(tmp_path / "base")
    script = f"""
import sys
sys.path.append({str(EXAMPLE.parent)!r})
from pathlib import Path
from drifting_diffusers import DriftingPipeline
import finetune
DriftingPipeline.from_pretrained({str(tmp_path / "base")!r}).push_to_hub("tester/base")
finetune.main({[*arguments("tester/base", pets, tmp_path / "run"), "--push_to_hub", "--hub_model_id", "tester/pets", "--license", "mit"]!r})
assert DriftingPipeline.from_pretrained("tester/pets").labels == ["fox", "owl"]
"""
    with LoopbackHub() as server:
        run_script(script, tmp_path / "home", server.url)
        files = server.repositories["tester/pets"].files()
    card = files["README.md"].decode()
    found = metadata(card)
    assert (found["base_model"], found["base_model_relation"], found["license"]) == ("tester/base", "finetune", "mit")
    assert "datasets" not in found  # a folder of one's own is no dataset of the Hub
    assert "| energy |" in card
    assert str(tmp_path) not in card
