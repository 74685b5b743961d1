"""Pushing while a run goes on, to a Hub on 127.0.0.1: what each strategy leaves there, and that a dead Hub costs nothing but a sentence."""

import functools
import io
import json
import sys

import pytest
import yaml
from huggingface_hub import constants, hf_api
from loopback_hub import Repository
from PIL import Image
from test_callbacks import trainer
from test_pushing import NAME, files, messages, server
from test_trainer import images, one_accelerator_per_test

from drifting_diffusers import DriftingPipeline
from drifting_diffusers.cards import is_ours
from drifting_diffusers.pushing import Pusher

__all__ = ["images", "one_accelerator_per_test", "server"]

pytestmark = pytest.mark.hub

MODEL = {
    "README.md",
    "model_index.json",
    "pipeline.py",
    "results.json",
    "samples.png",
    "curves.png",
    "transformer/config.json",
    "transformer/modeling_drifting.py",
    "transformer/diffusion_pytorch_model.safetensors",
}
PUSHING = {"push_to_hub": True, "save_steps": 2, "logging_steps": 9}


@pytest.fixture(autouse=True)
def cards(server, tmp_path, monkeypatch):
    """What cards ask for goes to the same Hub."""
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def in_order(monkeypatch):
    """Every push is done before training goes on: otherwise the newest of those that wait replaces the others."""

    class Patient(Pusher):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named, attempts=1)

        def push(self, *arguments, **named):
            super().push(*arguments, **named)
            with self._changed:
                self._changed.wait_for(lambda: not self._waiting and self._in_flight is None)

    monkeypatch.setattr(sys.modules["drifting_diffusers.loop"], "Pusher", Patient)


@pytest.mark.parametrize(
    ("strategy", "told", "folders"),
    [
        ("end", ["Step 6"], set()),
        ("every_save", ["Step 2", "Step 4", "Step 6"], set()),
        ("checkpoint", [f"{what} {step}" for step in (2, 4, 6) for what in ("Step", "Checkpoint of step")], {"last-checkpoint"}),
        (
            "all_checkpoints",
            [f"{what} {step}" for step in (2, 4, 6) for what in ("Step", "Checkpoint of step")],
            {f"checkpoint-{step}" for step in (2, 4, 6)},
        ),
    ],
)
def test_each_strategy_leaves_what_it_promises(strategy, told, folders, images, tmp_path, server, monkeypatch):
    in_order(monkeypatch)
    run = trainer(images, tmp_path / "run", **PUSHING, hub_strategy=strategy)
    found = run.train()
    assert messages(server) == told
    there = files(server)
    assert {name.split("/")[0] for name in there} - {name.split("/")[0] for name in MODEL} == folders
    assert {name for name in there if name.split("/")[0] not in folders} == MODEL
    results = json.loads(there["results.json"])
    assert results["step"] == 6
    assert results["metrics"]["energy"] == found["energy"]
    assert f"{found['energy']:.3g}"[:4] in there["README.md"].decode()
    for picture in ("samples.png", "curves.png"):
        assert f"]({picture})" in there["README.md"].decode()
        assert is_ours(io.BytesIO(there[picture]))
    for folder in folders:
        step = 6 if folder == "last-checkpoint" else int(folder.split("-")[1])
        assert json.loads(there[f"{folder}/trainer_state.json"])["step"] == step
        assert there[f"{folder}/optimizer.bin"]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]  # neither models nor snapshots


def test_what_is_pushed_is_the_pipeline(images, tmp_path, server):
    run = trainer(images, tmp_path / "run", **PUSHING, hub_private_repo=True, hub_strategy="end", max_steps=2)
    run.train()
    assert server.repositories[NAME].private
    for name, data in files(server).items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(data)
    pipe = DriftingPipeline.from_pretrained(tmp_path / "there")
    assert pipe.labels == ["left", "middle", "right"]
    assert (tmp_path / "there/README.md").read_text().count(NAME)


def test_a_dead_hub_never_stops_training_and_is_told_at_the_end(images, tmp_path, server, monkeypatch, capsys):
    quick = functools.partial(Pusher, attempts=2, wait=lambda seconds: None)
    monkeypatch.setattr(sys.modules["drifting_diffusers.loop"], "Pusher", quick)
    server.fail("/api/repos/create", times=99, status=503)
    run = trainer(images, tmp_path / "run", **PUSHING)
    assert run.train()["energy"] > 0
    assert list(run.run.checkpoints()) == [4, 6]
    said = capsys.readouterr().out
    assert "Pushing 'Step 6' to run failed: the Hub answered 503" in said
    assert "By hand: hf upload run FOLDER" in said
    assert server.repositories == {}
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_what_a_killed_run_left_of_its_pushes_is_cleared_away(images, tmp_path, server):
    first = trainer(images, tmp_path / "run", max_steps=2)
    first.train()
    for name in (".model-x", ".push-y"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "weights.bin").write_bytes(b"of a killed run")
    trainer(images, tmp_path / "run", push_to_hub=True, max_steps=2).train()
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert messages(server) == ["Step 2"]


def test_a_run_is_pushed_by_hand_with_the_numbers_of_its_last_evaluation(images, tmp_path, server):
    run = trainer(images, tmp_path / "run", max_steps=2)
    found = run.train()
    saved = json.loads((run.save_model() / "results.json").read_text())
    assert saved["metrics"]["energy"] == found["energy"]
    run.push_to_hub("tester/other", commit_message="by hand")
    there = server.repositories["tester/other"]
    assert there.messages[-1] == "by hand"
    assert json.loads(there.files()["results.json"])["metrics"]["energy"] == found["energy"]
    again = trainer(images, tmp_path / "run", max_steps=2, hub_private_repo=True)
    again.about = {"base_model": "user/base"}
    again.push_to_hub(card={"license": "mit", "datasets": ["user/data"]})
    assert set(files(server)) == MODEL
    assert server.repositories[NAME].private
    about = yaml.safe_load(files(server)["README.md"].decode().split("---\n")[1])
    assert (about["license"], about["datasets"], about["base_model"]) == ("mit", ["user/data"], "user/base")
    again.push_to_hub(revision="wip")
    again.push_to_hub(create_pr=True)
    assert set(files(server, "wip")) == set(files(server, "refs/pr/1")) == MODEL


def test_pictures_of_the_user_stay_beside_a_saved_model_and_in_the_repository(images, tmp_path, server):
    run = trainer(images, tmp_path / "run", **PUSHING, max_steps=2)
    mine = io.BytesIO()
    Image.new("RGB", (4, 4), "blue").save(mine, format="PNG")
    server.repositories[NAME] = Repository()
    server.repositories[NAME].commit({"samples.png": mine.getvalue()})
    found = run.train()
    assert files(server)["samples.png"] == mine.getvalue()
    assert is_ours(io.BytesIO(files(server)["curves.png"]))
    folder = run.save_model()
    assert is_ours(folder / "samples.png")
    assert is_ours(folder / "curves.png")
    (folder / "samples.png").write_bytes(mine.getvalue())
    run.save_model()
    assert (folder / "samples.png").read_bytes() == mine.getvalue()
    assert found == trainer(images, tmp_path / "other", max_steps=2).train()  # pictures and pushes change no number


def test_a_name_that_no_repository_can_have_is_refused_before_any_work(images, tmp_path):
    for folder, name in ((tmp_path / "run", "a/b/c"), (tmp_path / "my run!", None)):
        with pytest.raises(ValueError, match=r"hub_model_id must be a repository's name, USER/NAME: "):
            trainer(images, folder, push_to_hub=True, hub_model_id=name)
        assert not folder.exists()
