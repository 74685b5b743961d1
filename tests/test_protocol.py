"""An evaluation from beginning to end, on tiny real pipelines and images: samples by index, references, results, pictures, the command."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch.testing import assert_close

from drifting_diffusers import DriftingGenerator, DriftingPipeline
from drifting_diffusers.cli import main
from drifting_diffusers.data import LabelledImages
from drifting_diffusers.evaluation import energy_distance, frechet_distance
from drifting_diffusers.extractors import load_extractor
from drifting_diffusers.hub import model_card
from drifting_diffusers.meters import METRIC_OF, METRICS, FeatureSet, Reference, limited, measure, moments_of, possible
from drifting_diffusers.protocol import Bench, evaluate_images, evaluate_pipeline, over_seeds, summarise, table, write_results
from drifting_diffusers.reference import make_reference, read_npz, read_reference, write_reference
from drifting_diffusers.sampling import SHARD, DatasetSamples, PipelineSamples, extract
from drifting_diffusers.sheets import class_grid, memorisation_sheet, sweep_plot


def pixels():
    return load_extractor("pixels")


def dataset(n=150, seed=0, shift=0):
    """Three classes of 4 x 4 images: one bright row, with noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (n, 4, 4), dtype=np.uint8)
    labels = [i % 3 for i in range(n)]
    for i, label in enumerate(labels):
        images[i, label] = 200 + shift
    features = Features({"image": Image(), "label": ClassLabel(names=["top", "middle", "low"])})
    return Dataset.from_dict({"image": [PILImage.fromarray(image) for image in images], "label": labels}, features=features)


def real(n=150, seed=0, **kwargs):
    data = LabelledImages(dataset(n, seed, **kwargs), size=(4, 4), channels=1, num_classes=3, image_column="image", label_column="label")
    return DatasetSamples(data)


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    model = DriftingGenerator(
        sample_size=4, patch_size=2, in_channels=1, num_classes=3, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_class_tokens=1, num_style_tokens=1, style_codebook_size=4,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pipe = DriftingPipeline(model, labels=["top", "middle", "low"], guidance_scale=1.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- samples by index


def test_a_sample_is_a_function_of_its_index_and_the_seed(pipeline):
    samples = PipelineSamples(pipeline, 12, seed=3)
    assert samples.labels.tolist() == [0, 1, 2] * 4
    whole = samples.images(range(12))
    assert_close(samples.images([7]), whole[7:8])
    assert_close(samples.images([11, 2]), whole[[11, 2]])
    assert_close(PipelineSamples(pipeline, 8, seed=3).images([7]), whole[7:8])  # however many are drawn
    by_hand = pipeline([1], generator=samples.generator(7), output_type="pt").images * 2 - 1
    assert_close(whole[7:8], by_hand)
    assert not torch.equal(PipelineSamples(pipeline, 12, seed=4).images([7]), whole[7:8])
    assert not torch.equal(PipelineSamples(pipeline, 12, seed=3, guidance_scale=3.0).images([7]), whole[7:8])


def test_batches_and_shards_do_not_matter(pipeline, tmp_path):
    samples = PipelineSamples(pipeline, SHARD + 7)
    plain = extract(samples, pixels(), batch_size=64)
    assert len(plain) == SHARD + 7
    kept = extract(samples, pixels(), batch_size=33, folder=tmp_path)
    assert_close(kept.features, plain.features)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000000.safetensors", f"{SHARD:08d}.safetensors", "contract.json"]


def test_what_was_stopped_goes_on(pipeline, tmp_path):
    samples, extractor = PipelineSamples(pipeline, 2 * SHARD), pixels()
    whole = extract(samples, extractor, folder=tmp_path)
    (tmp_path / f"{SHARD:08d}.safetensors").unlink()
    drawn = []
    images = samples.images
    samples.images = lambda indices: drawn.extend(indices) or images(indices)
    again = extract(samples, extractor, folder=tmp_path)
    assert drawn == list(range(SHARD, 2 * SHARD))
    assert_close(again.features, whole.features, rtol=0, atol=0)


def test_shards_of_something_else_are_refused(pipeline, tmp_path):
    extract(PipelineSamples(pipeline, 6), pixels(), folder=tmp_path)
    with pytest.raises(ValueError, match=r"holds features of something else.*'seed': 1"):
        extract(PipelineSamples(pipeline, 6, seed=1), pixels(), folder=tmp_path)
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.add_(0.1)
    with pytest.raises(ValueError, match="holds features of something else"):
        extract(PipelineSamples(pipeline, 6), pixels(), folder=tmp_path)


def test_weights_are_not_read_for_features_that_are_not_kept(pipeline, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("drifting_diffusers.sampling.digest", lambda model: read.append(model) or "digest")
    samples = PipelineSamples(pipeline, 6)
    extract(samples, pixels())
    assert read == []
    extract(samples, pixels(), folder=tmp_path)
    assert read == [pipeline.transformer]


SHARED_WORK = """
import sys; sys.path.insert(0, {tests!r})
import torch
from drifting_diffusers import DriftingPipeline
from drifting_diffusers.extractors import load_extractor
from drifting_diffusers.sampling import PipelineSamples, extract, processes
pipe = DriftingPipeline.from_pretrained({pipe!r})
state = processes()
assert state.num_processes == 2
seen = extract(PipelineSamples(pipe, 1203), load_extractor("pixels"), folder={folder!r})
torch.save(seen.features, {folder!r} + f"/rank{{state.process_index}}.pt")
"""


def test_two_processes_give_what_one_gives(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipe")
    one = extract(PipelineSamples(pipeline, 1203), pixels())
    script = tmp_path / "work.py"
    script.write_text(SHARED_WORK.format(tests=str(Path(__file__).parent), pipe=str(tmp_path / "pipe"), folder=str(tmp_path / "features")))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=180,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"features/rank{rank}.pt"), one.features)


# -- references


def test_a_reference_is_made_once(tmp_path, monkeypatch):
    first = make_reference(real(), pixels(), most_samples=20, cache=tmp_path)
    assert (first.moments.count, len(first.samples)) == (150, 20)
    images = real().images(range(150)).flatten(1)
    levels = ((images + 1) * 127.5).round() / 127.5 - 1
    assert_close(first.moments.mean, levels.double().mean(0), rtol=1e-6, atol=1e-6)
    assert_close(first.moments.covariance, levels.double().T.cov(), rtol=1e-5, atol=1e-6)
    assert_close(first.samples.features, levels[first.chosen])
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    monkeypatch.setattr("drifting_diffusers.reference.extract", lambda *args, **kwargs: 1 / 0)
    again = make_reference(real(), pixels(), most_samples=20, cache=tmp_path)
    assert_close(again.moments.covariance, first.moments.covariance, rtol=0, atol=0)
    assert_close(again.samples.features, first.samples.features)
    assert again.samples.labels.tolist() == first.samples.labels.tolist()
    assert again.description == json.loads(json.dumps(first.description))
    with pytest.raises(ZeroDivisionError):
        make_reference(real(seed=1), pixels(), most_samples=20, cache=tmp_path)


def test_a_reference_of_something_else_is_refused(tmp_path):
    reference = make_reference(real(), pixels(), cache=tmp_path)
    write_reference(reference, tmp_path / "mine.safetensors")
    assert read_reference(tmp_path / "mine.safetensors", {"extractor": pixels().describe()}).moments.count == 150
    with pytest.raises(ValueError, match=r"does not fit: extractor: wanted .*lite0.*made of .*pixels"):
        read_reference(tmp_path / "mine.safetensors", {"extractor": {"name": "lite0"}})
    from safetensors.torch import save_file

    save_file({"mean": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no reference of this library"):
        read_reference(tmp_path / "other.safetensors")


def test_adm_statistics_are_read(tmp_path):
    class Two:
        name, num_features = "two", 2

        def describe(self):
            return {"name": "two"}

    mean, covariance = np.array([1.0, 2.0]), np.array([[2.0, 0.5], [0.5, 1.0]])
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    reference = read_npz(tmp_path / "adm.npz", Two())
    assert_close(reference.moments.mean, torch.from_numpy(mean))
    assert_close(reference.moments.covariance, torch.from_numpy(covariance))
    assert (reference.samples, reference.moments.count, len(reference.description["sha256"])) == (None, 0, 16)
    for arrays, message in [
        ({"mu": mean}, "has no sigma but mu"),
        ({"mu": np.zeros(3), "sigma": covariance}, r"mu \[3\] .*two has 2 features"),
        ({"mu": mean, "sigma": np.array([[1.0, 2.0], [0.0, 1.0]])}, "not symmetric"),
        ({"mu": np.array([np.nan, 0]), "sigma": covariance}, "not finite"),
    ]:
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read_npz(tmp_path / "bad.npz", Two())


# -- numbers


def features(n=200, d=4, seed=0, shift=0.0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift
    logits = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed + 1))
    return FeatureSet(x, torch.arange(n) % 3, logits, logits)


class Stub:
    distance_name, fewest = "fd_stub", 10


def as_reference(samples):
    return Reference(moments_of(samples.features), samples, {})


def test_numbers_are_those_of_the_functions():
    x, y, h = features(), features(seed=2, shift=0.5), features(seed=4)
    found = measure(x, as_reference(y), extractor=Stub(), held_out=h)
    assert found["fd_stub"] == frechet_distance(moments_of(x.features), moments_of(y.features))
    assert found["energy"] == energy_distance(x.features, y.features)
    worst = [energy_distance(x.features[x.labels == c], y.features[y.labels == c]) for c in range(3)]
    assert found["energy_worst_class"] == pytest.approx(max(worst))
    assert found["energy_per_class"] == pytest.approx(sum(worst) / 3)
    assert "kid" not in found  # 200 samples are no subset of 1000
    assert {"inception_score", "precision", "recall", "density", "coverage", "coverage_worst_class", "spread", "accuracy",
            "accuracy_worst_class", "class_share_worst", "memorisation_ratio", "memorisation_share"} <= found.keys()  # fmt: skip


def test_a_missing_class_is_seen_by_the_figure_per_class():
    y = features(n=300)
    apart = dataclasses.replace(y, features=y.features + 20 * y.labels[:, None])
    reference = as_reference(apart)
    whole = measure(apart, reference, extractor=Stub(), metrics=["coverage_worst_class"])
    missing = measure(apart.take(apart.labels != 1), reference, extractor=Stub(), metrics=["coverage_worst_class"])
    assert (whole["coverage_worst_class"], missing["coverage_worst_class"]) == (1.0, 0.0)


def test_the_share_of_the_rarest_class_needs_no_features_and_no_labels():
    judged = torch.eye(3)[torch.arange(300) % 3]
    real = FeatureSet(torch.randn(300, 2, generator=torch.Generator().manual_seed(0)), judged=judged)
    look = lambda samples: measure(samples, as_reference(real), extractor=Stub(), metrics=["class_share"], held_out=real)[
        "class_share_worst"
    ]
    assert look(real) == 1.0
    assert look(real.take(judged.argmax(1) != 1)) == 0.0
    half = torch.cat([torch.arange(0, 300, 3), torch.arange(1, 150, 3), torch.arange(2, 300, 3)])
    assert look(real.take(half)) == pytest.approx(50 / 250 * 3)


@pytest.mark.parametrize(
    ("metric", "change", "message"),
    [
        ("fid", {}, "no metric 'fid'; the metrics are frechet, kid"),
        ("kid", {}, "kid cannot be measured: it draws subsets of 1000 samples, got 200 and 200"),
        ("accuracy", {"judged": None}, "no classifier of these classes; train a judge"),
        ("inception_score", {"logits": None}, "this extractor has no classifier"),
        ("spread", {"labels": None}, "there are no labels"),
        ("memorisation", {}, "there are no held-out images"),
    ],
)
def test_what_cannot_be_measured_says_why(metric, change, message):
    samples = dataclasses.replace(features(), **change)
    with pytest.raises(ValueError, match=message):
        measure(samples, as_reference(features(seed=1)), extractor=Stub(), metrics=[metric])
    assert metric not in possible(samples, as_reference(features(seed=1)), Stub(), None)


def test_too_few_for_a_frechet_distance_are_refused_and_an_unknown_count_is_not():
    few = as_reference(features(n=9))
    with pytest.raises(ValueError, match="needs 10 samples on both sides, got 200 and 9"):
        measure(features(), few, extractor=Stub(), metrics=["frechet"])
    unknown = Reference(few.moments._replace(count=0), None, {})
    assert possible(features(), unknown, Stub(), None) == ["frechet", "inception_score", "spread", "accuracy"]


def test_a_subset_is_drawn_without_repeats_and_stays():
    chosen = limited(100, 30)
    assert len(chosen.unique()) == 30
    assert chosen.tolist() == sorted(limited(100, 30).tolist())
    assert limited(5, 30).tolist() == [0, 1, 2, 3, 4]


# -- results


@pytest.fixture
def bench(tmp_path):
    reference = make_reference(real(), pixels(), cache=tmp_path / "references")
    return Bench(reference, pixels(), held_out=extract(real(seed=5, n=30), pixels()), folder=tmp_path / "run")


def test_a_sweep_says_which_scale_is_best_and_how_it_was_made(pipeline, bench, tmp_path):
    results = evaluate_pipeline(pipeline, bench, num_samples=30, guidance_scales=(1.0, 2.0), seeds=(0, 1), about={"dataset": "rows"})
    assert [row["guidance_scale"] for row in results["sweep"]] == [1.0, 2.0]
    for row in results["sweep"]:
        for found in row["metrics"].values():
            assert found["mean"] == pytest.approx(sum(found["values"]) / 2)
            assert found["sd"] == pytest.approx(abs(found["values"][0] - found["values"][1]) / 2**0.5)
    best = min(results["sweep"], key=lambda row: row["metrics"]["fd_pixels"]["mean"])
    assert results["guidance_scale"] == best["guidance_scale"]
    assert results["metrics"]["fd_pixels"] == best["metrics"]["fd_pixels"]["mean"]
    assert {"command", "commit", "versions", "device", "seeds", "num_samples", "reference", "extractor", "real", "date"} <= results.keys()
    assert set(results["meaning"]) == set(results["better"]) == set(results["metrics"])

    write_results(results, tmp_path / "run/results.json")
    again = json.loads((tmp_path / "run/results.json").read_text())
    assert again == json.loads(json.dumps(results))
    assert f"| fd_pixels | {results['metrics']['fd_pixels']:.4g} ± {results['sd']['fd_pixels']:.4g} |" in table(again)
    sweep_plot(again, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000

    card = model_card(pipeline, again, repo_id="user/rows")
    assert f"| fd_pixels | {results['metrics']['fd_pixels']:.4g}" in card
    assert "- num_samples: 30" in card
    assert "{" not in card.split("## Results")[1]  # numbers and words, no JSON


def test_one_seed_has_no_deviation(pipeline, bench):
    results = evaluate_pipeline(pipeline, bench, num_samples=30)
    assert results["guidance_scale"] == 1.5
    assert set(results["sd"].values()) == {None}
    with pytest.raises(ValueError, match=r"seeds must be different and at least one, got \[0, 0\]"):
        evaluate_pipeline(pipeline, bench, num_samples=30, seeds=(0, 0))


@pytest.mark.parametrize(
    ("metrics", "fewest", "leading"),
    [
        ((), 10, "fd_stub"),
        ((), 1000, "inception_score"),  # too few samples for a Frechet distance: a score is to be high
        (("precision",), 10, "precision"),
        (("spread", "coverage"), 10, "density"),
        (("energy_per_class", "accuracy"), 10, "energy_per_class"),
        (("spread",), 10, "spread"),
    ],
)
def test_the_best_scale_is_best_in_the_direction_of_the_number_that_leads(metrics, fewest, leading):
    extractor = Stub()
    extractor.fewest, extractor.describe = fewest, dict
    bench = Bench(as_reference(features(seed=1)), extractor, metrics)
    measured = [bench.look(features(seed=seed, shift=seed / 4)) for seed in (2, 4, 6)]
    values = [numbers[leading] for numbers in measured]
    assert len(set(values)) == 3
    rows = [{"guidance_scale": scale, "metrics": over_seeds([numbers])} for scale, numbers in enumerate(measured)]
    results = summarise(rows, bench, {})
    best = max(values) if results["better"][leading] == "higher" else min(values)
    assert bench.leading(measured[0]) == leading
    assert results["metrics"][leading] == best


def test_images_are_measured_like_samples(bench):
    same = evaluate_images(real(), bench)
    assert same["metrics"]["fd_pixels"] == pytest.approx(0, abs=1e-9)
    assert same["metrics"]["coverage"] == 1.0
    other = evaluate_images(real(seed=9, shift=40), dataclasses.replace(bench, folder=None))
    assert other["metrics"]["fd_pixels"] > same["metrics"]["fd_pixels"] + 0.01


def test_numbers_that_are_none_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"\['fid'\] are not finite"):
        write_results({"metrics": {"fid": float("nan")}}, tmp_path / "results.json")


# -- pictures


def test_pictures_show_what_they_say(pipeline, bench):
    samples = PipelineSamples(pipeline, 30)
    grid = class_grid(samples, ["top", "middle", "low"], rows=2)
    cell = np.asarray(grid)[16 : 16 + 64, 6 : 6 + 64, 0].astype(float)
    expected = ((samples.images([0])[0, 0] + 1) * 127.5).clamp(0, 255).numpy().repeat(16, 0).repeat(16, 1)
    assert np.abs(cell - expected).max() <= 1
    copies = real()  # of the training images themselves
    sheet = memorisation_sheet((copies, extract(copies, pixels())), (copies, bench.reference), bench.held_out, pairs=12)
    page = np.asarray(sheet)
    above, below = page[22 : 22 + 64], page[22 + 66 : 22 + 66 + 64]
    assert (above == below).all()  # every copy stands above its original


# -- the command


def save_parquet(folder: Path, **splits: Dataset) -> str:
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(str(folder / f"{name}.parquet"))
    return str(folder)


def test_the_command(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "pipe")
    data = save_parquet(tmp_path / "data", train=dataset(), test=dataset(30, 5))
    command = ["evaluate", str(tmp_path / "pipe"), "--dataset", data, "--held-out-split", "test", "--extractor", "pixels",
               "--num-samples", "30", "--guidance-scales", "1.0", "2.0", "--seeds", "0", "1", "--output", str(tmp_path / "out"),
               "--reference-cache", str(tmp_path / "cache")]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "| fd_pixels |" in out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"class_grid.png", "guidance_sweep.png", "memorisation.png"}
    results = json.loads((tmp_path / "out/results.json").read_text())
    extractor = pixels()
    by_hand = extract(PipelineSamples(pipeline, 30, guidance_scale=1.0), extractor)
    reference = make_reference(real(), extractor, cache=tmp_path / "other")
    expected = measure(by_hand, reference, extractor=extractor, metrics=["frechet"])["fd_pixels"]
    assert results["sweep"][0]["metrics"]["fd_pixels"]["values"][0] == pytest.approx(expected, rel=1e-5)
    assert main(command) == 0  # again: nothing is drawn anew, the same numbers
    assert json.loads((tmp_path / "out/results.json").read_text())["metrics"] == results["metrics"]


@pytest.mark.slow
def test_the_command_shared_by_two_processes(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipe")
    data = save_parquet(tmp_path / "data", train=dataset(), test=dataset(30, 5))
    command = ["evaluate", str(tmp_path / "pipe"), "--dataset", data, "--held-out-split", "test", "--extractor", "pixels",
               "--num-samples", "600", "--judge", "--reference-cache", str(tmp_path / "cache"), "--output"]  # fmt: skip
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    alone = ["-m", "drifting_diffusers.cli", *command, str(tmp_path / "one")]
    shared = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "drifting_diffusers.cli", *command]
    for arguments in ([*shared, str(tmp_path / "two")], alone):
        done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, value in one["metrics"].items():  # a pixel on the edge between two levels may fall to either side
        assert two["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_the_command_measures_folders_of_images(tmp_path, capsys):
    data = save_parquet(tmp_path / "data", train=dataset(), test=dataset(30, 5))
    images = tmp_path / "images"
    for i, row in enumerate(dataset(30, 9)):
        folder = images / ["a", "b", "c"][row["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{i}.png")
    command = ["evaluate", str(images), "--dataset", data, "--extractor", "pixels", "--metrics", "energy", "energy_per_class", "frechet",
               "--output", str(tmp_path / "out"), "--reference-cache", str(tmp_path / "cache")]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["metrics"]) == ["energy", "energy_per_class", "energy_worst_class", "fd_pixels"]
    assert results["num_samples"] == 30


def test_the_command_refuses_in_one_line(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "pipe")
    common = ["evaluate", str(tmp_path / "pipe"), "--output", str(tmp_path / "out")]
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3))
    for more, message in [
        ([], "give the real images as --dataset or as --reference"),
        (["--reference", str(tmp_path / "adm.npz"), "--extractor", "nothing"], "no extractor is called 'nothing'"),
        (["--reference", str(tmp_path / "adm.npz"), "--extractor", "pixels"], "pixels has"),
    ]:
        assert main([*common, *more]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("drifting-diffusers: error") == 1


def test_a_judge_of_large_images_is_refused(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(3):
        PILImage.new("L", (65, 33), i).save(tmp_path / f"images/{i}.png")
    data = save_parquet(tmp_path / "data", train=dataset(12))
    command = ["evaluate", str(tmp_path / "images"), "--dataset", data, "--extractor", "pixels", "--judge", "--output", str(tmp_path / "out"),
               "--reference-cache", str(tmp_path / "cache")]  # fmt: skip
    assert main(command) == 1
    assert "a small judge is for images of up to 64 pixels, got (33, 65)" in capsys.readouterr().err


def test_every_metric_has_a_meaning():
    for name, metric in METRICS.items():
        assert metric.meaning
        assert metric.better in ("lower", "higher", "as real"), name


def test_a_metric_gives_the_numbers_that_it_says():
    x, y, h = (features(n=1000, seed=seed) for seed in (0, 2, 4))
    for name, metric in METRICS.items():
        found = measure(x, as_reference(y), extractor=Stub(), metrics=[name], held_out=h)
        assert tuple(found) == (metric.gives or ("fd_stub",)), name
        assert {METRIC_OF.get(number, "frechet") for number in found} == {name}
