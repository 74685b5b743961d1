"""An encoder that learns from a stream: the images in their order, each with the chance of its number; resumed it is the run that never stopped."""

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Image, IterableDataset, Value
from test_encoder_trainer import IMAGES, TINY, arguments, history, make_encoder, make_images, make_vae, trainer, weights
from test_latents import load_example
from torch.testing import assert_close

from drifting_diffusers.data import LabelledImages
from drifting_diffusers.image_streams import ImageStream, TrainingStream

N = len(IMAGES)


@pytest.fixture(autouse=True)
def one_accelerator_per_test():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def shuffled():
    """Another order in every pass."""
    return IMAGES.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=3)


def sharded():
    """Always the same order, from several files in turn."""
    return IMAGES.to_iterable_dataset(num_shards=4)


def batches(dataset, steps, places=range(6), first=0, positions=None, **changes):
    choices = {"batch_size": 6, "seed": 7, "flip": True, "crop_area_min": 0.3} | changes
    images = ImageStream(dataset, size=(8, 8), channels=3, num_classes=3, image_column="image", label_column="label")
    stream = TrainingStream(images, **choices)
    if positions is not None:
        stream.positions = positions
    read = stream.parts(first, places, read=4, threads=2)
    per_step = -(-len(places) // 4)
    parts = [next(read) for _ in range(steps * per_step)]
    read.close()
    return [torch.cat(each) for each in zip(*parts, strict=True)], stream


@pytest.mark.parametrize("crop_area_min", [0.3, 1.0])
def test_images_come_in_their_order_with_the_chance_of_their_number(crop_area_min):
    (samples, labels, numbers), _ = batches(IMAGES.to_iterable_dataset(), 7, crop_area_min=crop_area_min)
    form = {"size": (8, 8), "channels": 3, "num_classes": 3, "image_column": "image", "label_column": "label"}
    data, rows = LabelledImages(IMAGES, **form, crop_area_min=crop_area_min), [number % N for number in range(42)]
    assert numbers.tolist() == list(range(42))
    assert labels.tolist() == data.labels[rows].tolist()
    assert_close(samples, data.varied(rows, [(7, number) for number in range(42)], flip=True), rtol=0, atol=0)


def test_every_pass_has_its_epoch():
    stream, expected = shuffled(), []
    for epoch in range(2):
        stream.set_epoch(epoch)
        expected += [row["label"] for row in stream]
    (_, labels, _), _ = batches(shuffled(), 6)
    assert labels.tolist() == expected[:36]
    assert expected[:N] != expected[N:]


@pytest.mark.parametrize("opened", [sharded, shuffled])
@pytest.mark.parametrize("batch_size", [5, 6])
@pytest.mark.parametrize("first", [1, 3, 4, 6])
def test_it_goes_on_from_any_step(batch_size, first, opened):
    """Of a buffer too, which no state holds. Four steps of five are a whole pass."""
    whole, _ = batches(opened(), 9, range(batch_size), batch_size=batch_size)
    _, stream = batches(opened(), first, range(batch_size), batch_size=batch_size)
    rest, _ = batches(opened(), 9 - first, range(batch_size), first, {first: stream.positions[first]}, batch_size=batch_size)
    for ours, theirs in zip(rest, whole, strict=True):
        assert_close(ours, theirs[first * batch_size :], rtol=0, atol=0)


def test_processes_share_a_batch_and_decode_their_share_alone():
    whole, _ = batches(IMAGES.to_iterable_dataset(), 2)

    def rows():
        for i, row in enumerate(IMAGES.cast_column("image", Image(decode=False))):
            yield row | ({"image": {"bytes": b"no image", "path": None}} if i % 6 < 3 and i else {})  # the first tells streams apart

    ours, _ = batches(IterableDataset.from_generator(rows, features=IMAGES.features), 2, range(3, 6))
    for part, all_of_them in zip(ours, whole, strict=True):
        assert_close(part, all_of_them[[3, 4, 5, 9, 10, 11]], rtol=0, atol=0)


def test_a_step_that_passed_by_is_refused():
    _, stream = batches(IMAGES.to_iterable_dataset(), 5)
    assert sorted(stream.positions) == [3, 4, 5]
    with pytest.raises(RuntimeError, match=r"stands before the steps \[3, 4, 5\], and step 1 is asked for: load the checkpoint"):
        next(stream.parts(1, range(6), 4, 1))


@pytest.mark.parametrize(("killed_after", "opened"), [(1, shuffled), (2, sharded), (3, shuffled), (4, sharded)])
def test_resuming_is_never_having_stopped(killed_after, opened, tmp_path):
    """Bit for bit, across the end of a pass in step 3; killed before the first checkpoint, after the one of step 2, after that of step 4."""
    choices = {"data": opened(), "eval_steps": 2, "max_steps": 8}
    whole = trainer(tmp_path / "whole", **choices)
    whole.train()
    killed = trainer(tmp_path / "killed", **choices)
    after = killed._after_step

    def stop(outcome, bar):
        after(outcome, bar)
        if killed.step == killed_after:
            raise KeyboardInterrupt

    killed._after_step = stop
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = trainer(tmp_path / "killed", **choices)
    again.train()
    assert_close(weights(again), weights(whole), rtol=0, atol=0)
    assert history(again) == history(whole)


def test_the_same_trainer_goes_on_in_its_process(tmp_path):
    whole = trainer(tmp_path / "whole", data=shuffled(), save_steps=9)
    whole.train()
    cut = trainer(tmp_path / "cut", data=shuffled(), save_steps=9)
    learn = cut.training_step

    def once():
        if cut.step == 3:
            cut.draws.of_step(3)
            raise KeyboardInterrupt
        return learn()

    cut.training_step = once
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    cut.training_step = learn
    cut.train()
    assert_close(weights(cut), weights(whole), rtol=0, atol=0)


def test_images_of_a_stream_become_latents(tmp_path):
    run = trainer(tmp_path / "run", data=shuffled(), vae=make_vae(), encoder=make_encoder(in_channels=4), max_steps=3)
    assert run.draws.encodes
    assert run.train()["reconstruction"] > 0


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_dataset": None}, "a stream cannot be evaluated on.*give held-out images as eval_dataset"),
        ({"size": None}, "size is missing"),
        ({"image_column": "photo", "eval_dataset": IMAGES.rename_column("image", "photo")}, "the stream has no column 'photo'"),
        ({"data": IMAGES.to_iterable_dataset().take(0)}, "the stream is empty"),
        ({"data": IMAGES.cast_column("label", Value("int64")).map(lambda row: {"label": 3}).to_iterable_dataset()},
         r"row 0 of the stream has the label 3 in column 'label', and labels must be integers in \[0, 3\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_work(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", **({"data": shuffled()} | changes))
    assert not (tmp_path / "run").exists()


def test_another_stream_in_the_folder_is_refused(tmp_path):
    trainer(tmp_path / "run", data=shuffled(), max_steps=3).train()
    for data in (IMAGES, make_images(7).select([3, 1]).to_iterable_dataset()):
        with pytest.raises(ValueError, match="holds another run: data="):
            trainer(tmp_path / "run", data=data, max_steps=3)


def test_labels_are_not_looked_at_in_a_run_that_does_not_classify(tmp_path):
    bare = IMAGES.remove_columns("label")
    run = trainer(tmp_path / "run", data=bare.to_iterable_dataset(), eval_dataset=bare, classification_steps=0, max_steps=2)
    assert set(run.train()) == {"reconstruction", "reconstruction_flat"}


def test_the_program_reads_a_stream(tmp_path):
    IMAGES.select(range(14)).to_parquet(tmp_path / "data/train.parquet")
    IMAGES.select(range(14, 20)).to_parquet(tmp_path / "data/test.parquet")
    example = load_example("train_mae")
    data = {"dataset_name": tmp_path / "data", "eval_split": "test", "resolution": 32, "max_train_samples": 5}
    classes = {"classification_steps": 1, "classification_warmup_steps": 0}
    words = ["--streaming", *arguments(preset="mae-pixel-640", **data, **TINY, **classes, output_dir=tmp_path / "run")]
    run = example.main(words)
    assert run.draws.train_data.positions[3]["passes"] == 2  # images 10 and 11 of 5
    assert run.encoder().config.num_classes == 3
    with pytest.raises(SystemExit, match="--streaming is of images, --dataset_name, and needs held-out ones, --eval_split"):
        example.main(["--streaming", *arguments(latents=tmp_path / "run", output_dir=tmp_path / "b")])
    unnamed = [IMAGES.cast_column("label", Value("int64")).to_iterable_dataset(), IMAGES.cast_column("label", Value("int64"))]
    assert example.count_classes(unnamed, "label") == 3
