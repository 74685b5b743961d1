"""Pushing in the background, to a Hub on 127.0.0.1 that fails as the tests want: nothing of it reaches training, and nothing is lost silently."""

import logging
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from loopback_hub import TOKEN, LoopbackHub, run_script

from drifting_diffusers.pushing import SNAPSHOT, Pusher

pytestmark = pytest.mark.hub

NAME = "tester/run"
COMMIT = "/commit/"


@pytest.fixture
def server(monkeypatch):
    """The Hub of this process; what the library reads once is put in its place by hand."""
    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        for fault in server.faults:
            if fault.gate is not None:
                fault.gate.set()
        close_session()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def pusher(server, waits):
    """Of a run called `NAME`; its waits are written down and take no time."""
    pusher = Pusher(NAME, attempts=4, wait=waits.append)
    yield pusher
    for fault in server.faults:
        if fault.gate is not None:
            fault.gate.set()
    pusher.finish(None)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "run" / "checkpoint-1"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer/model.safetensors").write_bytes(b"weights" * 100)
    (folder / "log.jsonl").write_text("1\n")
    return folder


def files(server, revision: str = "main") -> dict[str, bytes]:
    return {name: data for name, data in server.repositories[NAME].files(revision).items() if name != ".gitattributes"}


def messages(server) -> list[str]:
    return server.repositories[NAME].messages


def asked(server, path: str) -> int:
    return sum(path in asked for _, asked in server.requests)


def held(checkpoint: Path) -> list[Path]:
    return [path for path in checkpoint.parent.iterdir() if path.name.startswith(SNAPSHOT)]


def stuck(server, path: str = COMMIT):
    return server.fail(path, gate=threading.Event())


# What arrives


def test_a_folder_arrives(pusher, server, checkpoint, waits):
    pusher.push(checkpoint, message="first")
    assert pusher.finish() == pusher.failures == waits == []
    assert files(server) == {"transformer/model.safetensors": b"weights" * 100, "log.jsonl": b"1\n"}
    assert messages(server) == ["first"]
    assert not server.repositories[NAME].private
    assert held(checkpoint) == []


def test_the_root_leaves_checkpoints_and_half_written_files_out(pusher, server, checkpoint):
    (checkpoint.parent / "log.jsonl").write_text("all\n")
    (checkpoint.parent / "checkpoint-2.partial").mkdir()
    (checkpoint.parent / "checkpoint-2.partial/x").write_text("half")
    (checkpoint.parent / f"{SNAPSHOT}left").mkdir()
    (checkpoint.parent / f"{SNAPSHOT}left/x").write_text("of a killed run")
    pusher.push(checkpoint.parent, message="root")
    pusher.push(checkpoint, message="part", path_in_repo="last", ignore=["*.jsonl"])
    assert pusher.finish() == []
    assert set(files(server)) == {"log.jsonl", "last/transformer/model.safetensors"}


def test_a_folder_of_the_repository_becomes_the_one_pushed(pusher, server, checkpoint):
    first = Pusher(NAME)
    first.push(checkpoint, message="root")
    first.push(checkpoint, message="one", path_in_repo="last")
    assert first.finish() == []
    (checkpoint / "log.jsonl").rename(checkpoint / "other.jsonl")
    pusher.push(checkpoint, message="two", path_in_repo="last/")
    assert pusher.finish() == []
    assert set(files(server)) == {
        "transformer/model.safetensors",
        "log.jsonl",
        "last/transformer/model.safetensors",
        "last/other.jsonl",
    }


def test_pushes_arrive_in_order(pusher, server, checkpoint):
    gate = stuck(server)
    for i in range(4):
        pusher.push(checkpoint, message=f"push {i}", path_in_repo=f"checkpoint-{i}")
    gate.gate.set()
    assert pusher.finish() == []
    assert messages(server) == [f"push {i}" for i in range(4)]


def test_of_those_that_wait_the_newest_of_a_kind_goes_and_the_one_in_flight_ends(pusher, server, checkpoint):
    gate = stuck(server)
    pusher.push(checkpoint, message="in flight")
    gate.arrived.wait()
    pusher.push(checkpoint, message="replaced")
    pusher.push(checkpoint, message="another kind", path_in_repo="last")
    (checkpoint / "log.jsonl").write_text("newest\n")
    pusher.push(checkpoint, message="newest")
    assert len(held(checkpoint)) == 3  # not of the one that was replaced
    gate.gate.set()
    assert pusher.finish() == []
    assert messages(server) == ["in flight", "another kind", "newest"]
    assert files(server)["log.jsonl"] == b"newest\n"


def test_a_new_repository_can_be_private(server, checkpoint):
    pusher = Pusher("run", private=True)  # the token's own, without its name
    pusher.push(checkpoint, message="first")
    assert pusher.finish() == []
    assert server.repositories[NAME].private
    assert pusher.repo_id == NAME


def test_a_branch_is_made_and_used_again(server, checkpoint):
    for message in ("first", "second"):
        pusher = Pusher(NAME, revision="wip")
        pusher.push(checkpoint, message=message)
        assert pusher.finish() == []
    assert files(server) == {}
    assert set(files(server, "wip")) == {"transformer/model.safetensors", "log.jsonl"}
    assert messages(server) == ["first", "second"]


# What goes wrong


def test_what_passes_is_tried_again_with_waits_that_double(pusher, server, checkpoint, waits):
    server.fail(COMMIT, status=500)
    server.fail(COMMIT, first=2, status=503)
    server.fail(COMMIT, first=3, status=504)
    pusher.push(checkpoint, message="first")
    assert pusher.finish() == []
    assert messages(server) == ["first"]
    assert waits == [2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (503, {"Retry-After": "7"}, 7.0),
        (429, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        (429, {"RateLimit": '"api";r=0;t=55'}, 55.0),
        (429, {}, 2.0),
        (429, {"Retry-After": "soon"}, 2.0),
        (500, {"Retry-After": "7"}, 2.0),
    ],
)
def test_a_server_is_left_alone_for_as_long_as_it_asks(pusher, server, checkpoint, waits, status, headers, expected):
    server.fail(COMMIT, status=status, headers=headers)
    pusher.push(checkpoint, message="first")
    assert pusher.finish() == []
    assert waits == [expected]


@pytest.mark.parametrize("asked_for", ["301", "Fri, 01 Jan 2999 00:00:00 GMT"])
def test_a_server_that_asks_for_too_much_is_not_asked_again(pusher, server, checkpoint, waits, asked_for):
    server.fail(COMMIT, status=429, headers={"Retry-After": asked_for})
    pusher.push(checkpoint, message="first")
    (failure,) = pusher.finish()
    assert "the Hub answered 429" in failure
    assert "s of patience, more than 300" in failure
    assert waits == []


def test_attempts_and_waits_are_bounded(server, checkpoint, waits):
    server.fail(COMMIT, times=99)
    pusher = Pusher(NAME, attempts=4, first_wait=1, longest_wait=3, wait=waits.append)
    pusher.push(checkpoint, message="first")
    (failure,) = pusher.finish()
    assert failure == (
        "Pushing 'first' to tester/run failed: the Hub answered 500 (as the test wants), 4 times in a row. "
        "By hand: hf upload tester/run FOLDER"
    )
    assert waits == [1, 2, 3]
    assert asked(server, COMMIT) == 4


@pytest.mark.parametrize(
    ("status", "way_out"), [(401, "`hf auth login`"), (403, "write permission"), (404, "check the name"), (409, "(as the test wants)"), (400, "")]
)  # fmt: skip
def test_what_does_not_pass_is_told_and_training_goes_on(pusher, server, checkpoint, waits, caplog, status, way_out):
    server.fail(COMMIT, status=status)
    pusher.push(checkpoint, message="first", path_in_repo="last")
    pusher.push(checkpoint, message="second")
    with caplog.at_level(logging.WARNING):
        (failure,) = pusher.finish()
    assert failure.startswith(f"Pushing 'first' to tester/run/last failed: the Hub answered {status}")
    assert failure.endswith("By hand: hf upload tester/run FOLDER last")
    assert way_out in failure
    assert failure in pusher.failures
    assert failure in caplog.messages
    assert waits == []
    assert messages(server) == ["second"]


def test_a_conflict_with_somebody_elses_commit_passes(pusher, server, checkpoint, waits):
    server.fail(COMMIT, status=409, message="another conflicting operation is in progress")
    server.fail(COMMIT, first=2, status=412, message="A commit has happened since. Please refresh and try again.")
    pusher.push(checkpoint, message="first")
    assert pusher.finish() == []
    assert waits == [2.0, 4.0]


def test_a_repository_that_cannot_be_made_is_told(server, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    pusher = Pusher(NAME)
    pusher.push(checkpoint, message="first")
    (failure,) = pusher.finish()
    assert "the Hub answered 401" in failure
    assert "hf_wrong" not in failure


def test_making_the_repository_is_tried_again(pusher, server, checkpoint, waits):
    server.fail("/api/repos/create", status=502)
    pusher.push(checkpoint, message="first")
    assert pusher.finish() == []
    assert waits == [2.0]


@pytest.mark.parametrize("cut", [0, 100_000])
def test_a_connection_that_breaks_in_the_middle_of_an_upload(pusher, server, checkpoint, waits, cut):
    content = bytes(range(256)) * 8_000
    (checkpoint / "transformer/model.safetensors").write_bytes(content)
    server.fail(COMMIT, cut=cut)
    pusher.push(checkpoint, message="first")
    assert pusher.finish() == []
    assert waits == [2.0]
    assert files(server)["transformer/model.safetensors"] == content


@pytest.mark.parametrize("cut", [True, False])
def test_a_large_file_that_is_cut_or_refused(pusher, server, checkpoint, waits, monkeypatch, cut):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's own waits
    server.lfs_above = 1_000
    content = bytes(range(256)) * 8_000
    (checkpoint / "transformer/model.safetensors").write_bytes(content)
    fault = server.fail("/large/", times=7 if cut else 99, **({"cut": 100_000} if cut else {"status": 403}))
    pusher.push(checkpoint, message="first")
    failures = pusher.finish()
    if cut:
        assert failures == []
        assert fault.seen == 8
        assert files(server)["transformer/model.safetensors"] == content
    else:
        assert "the Hub answered 403 (as the test wants): the token" in failures[0]
        assert waits == []


def test_a_slow_peer_is_waited_for(pusher, server, checkpoint, waits):
    server.fail(COMMIT, slow=20)
    pusher.push(checkpoint, message="first")
    assert pusher.finish() == waits == []
    assert messages(server) == ["first"]


def test_a_public_repository_is_no_private_one(server, checkpoint):
    for private in (False, True):
        pusher = Pusher(NAME, private=private)
        pusher.push(checkpoint, message="first")
        failures = pusher.finish()
        assert [f"{NAME} is public already" in failure for failure in failures] == [True] * private


def test_offline_is_told_at_once(pusher, checkpoint, waits, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pusher.push(checkpoint, message="first")
    (failure,) = pusher.finish()
    assert "offline mode is enabled" in failure
    assert waits == []


# The end


def test_a_peer_that_never_answers_does_not_hold_the_end(pusher, server, checkpoint):
    gate = stuck(server)
    pusher.push(checkpoint, message="in flight")
    gate.arrived.wait()
    pusher.push(checkpoint, message="queued", path_in_repo="last")
    first, second = pusher.finish(0.01)
    assert first.startswith("Pushing 'in flight' to tester/run failed: it was not done after 0.01 s")
    assert second.startswith("Pushing 'queued' to tester/run/last failed: it was not done after 0.01 s")
    assert pusher.finish(0.01) == [first, second]
    gate.gate.set()
    pusher._thread.join()
    assert messages(server) == ["in flight"]  # what had begun still ends, if the process lives
    assert pusher.failures == [first, second]
    assert held(checkpoint) == []


def test_the_end_cuts_waits_short(server, checkpoint):
    fault = server.fail(COMMIT, times=99)
    pusher = Pusher(NAME, first_wait=1e6, longest_wait=1e6)
    pusher.push(checkpoint, message="first")
    fault.arrived.wait()
    (failure,) = pusher.finish(0.01)
    assert "it was not done after 0.01 s" in failure
    pusher._thread.join()
    assert asked(server, COMMIT) == 1


def test_finishing_nothing(pusher):
    assert pusher.finish() == []


def test_the_interpreter_waits_for_nothing(checkpoint, tmp_path):
    """One push waits for an answer, the other for its next attempt."""
    with LoopbackHub() as server:
        gate = server.fail("tester/stuck/commit", gate=threading.Event())
        server.fail("tester/down/commit", times=99)
        run_script(
            f"""
import threading
from drifting_diffusers.pushing import Pusher
waiting = threading.Event()
def wait(seconds):
    waiting.set()
    threading.Event().wait()
for name, options in (("stuck", {{}}), ("down", {{"wait": wait}})):
    Pusher(f"tester/{{name}}", **options).push({str(checkpoint)!r}, message="first")
waiting.wait()
""",
            tmp_path / "home",
            server.url,
        )
        gate.gate.set()
    assert held(checkpoint) == []


# The snapshot


def test_the_folder_may_be_gone_or_another_one(pusher, server, checkpoint):
    gate = stuck(server, "/api/repos/create")
    pusher.push(checkpoint, message="first")
    weights = checkpoint / "transformer/model.safetensors"
    assert weights.stat().st_nlink == 2  # held without a copy
    aside = weights.with_name("aside")
    aside.write_bytes(b"new")
    aside.replace(weights)
    with (checkpoint / "log.jsonl").open("a") as log:
        log.write("2\n")
    shutil.rmtree(checkpoint)
    gate.gate.set()
    assert pusher.finish() == []
    assert files(server) == {"transformer/model.safetensors": b"weights" * 100, "log.jsonl": b"1\n"}


def test_a_file_that_is_rewritten_in_place_is_noticed(pusher, server, checkpoint):
    gate = stuck(server, "/api/repos/create")
    pusher.push(checkpoint, message="first")
    weights = checkpoint / "transformer/model.safetensors"
    weights.write_bytes(b"torn")
    gate.gate.set()
    (failure,) = pusher.finish()
    assert f"{weights} was written into while it was pushed" in failure
    assert files(server) == {}


def test_without_hard_links_files_are_copied(pusher, server, checkpoint, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    gate = stuck(server, "/api/repos/create")
    pusher.push(checkpoint, message="first")
    (checkpoint / "transformer/model.safetensors").write_bytes(b"torn")
    gate.gate.set()
    assert pusher.finish() == []
    assert files(server)["transformer/model.safetensors"] == b"weights" * 100


def test_a_full_disk_is_told(pusher, checkpoint, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    pusher.push(checkpoint, message="first")
    assert "its files could not be held: [Errno 28] No space left on device" in pusher.finish()[0]
    assert held(checkpoint) == []


# Mistakes of the caller are errors


@pytest.mark.usefixtures("as_users_see_it")
def test_mistakes(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="a//b"):
        Pusher("a//b")
    with pytest.raises(ValueError, match="attempts must be at least 1 and waits positive, got attempts=0"):
        Pusher(NAME, attempts=0)
    pusher = Pusher(NAME)
    with pytest.raises(ValueError, match=r"there is nothing to push in .*nowhere"):
        pusher.push(tmp_path / "nowhere", message="x")
    with pytest.raises(ValueError, match=r"there is nothing to push in .*got \['\*'\]"):
        pusher.push(checkpoint, message="x", ignore=["*"])
    with pytest.raises(ValueError, match="a card stands in the root"):
        pusher.push(checkpoint, message="x", path_in_repo="last", model=object())
    pusher.finish()
    with pytest.raises(ValueError, match="this pusher has finished"):
        pusher.push(checkpoint, message="x")


# Cards


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """One process that pushes a network to repositories with and without a README of the user; the first look at `flaky`'s fails."""
    home = tmp_path_factory.mktemp("cards")
    with LoopbackHub() as server:
        server.fail("tester/flaky/resolve", status=503, times=2)
        run_script(
            """
import sys, torch
from pathlib import Path
from huggingface_hub import HfApi
from drifting_diffusers import MaskedAutoencoder
from drifting_diffusers.pushing import Pusher
encoder = MaskedAutoencoder(base_channels=32, layers_per_stage=[1, 1, 1, 1], num_classes=2)
folder = Path(sys.argv[1], "model")
encoder.save_pretrained(folder)
mine = b"---\\nlibrary_name: mine\\n---\\nMy words."
for name in ("kept", "flaky", "branch"):
    HfApi().create_repo(f"tester/{name}")
for name, revision in (("kept", None), ("flaky", None), ("branch", "wip")):
    if revision:
        HfApi().create_branch(f"tester/{name}", branch=revision)
    HfApi().upload_file(repo_id=f"tester/{name}", path_in_repo="README.md", path_or_fileobj=mine, revision=revision)
def push(name, folder=folder, model=encoder, **options):
    pusher = Pusher(f"tester/{name}", wait=lambda seconds: None, **options)
    pusher.push(folder, message="trained", model=model)
    assert pusher.finish() == [], pusher.failures
push("new")
push("new")
push("plain", model=None)
push("kept")
push("flaky")
push("branch", revision="wip")
assert not (folder / "README.md").exists()
(folder / "README.md").write_text("My words beside the model.")
push("own")
push("kept-too", model=None)
""",
            home,
            server.url,
        )
        yield server.repositories


def card(cards, name: str, revision: str = "main") -> str:
    return cards[f"tester/{name}"].files(revision)["README.md"].decode()


def test_a_new_repository_has_our_card(cards):
    assert "library_name: drifting-diffusers" in card(cards, "new")
    assert 'MaskedAutoencoder.from_pretrained("tester/new")' in card(cards, "new")
    assert "README.md" not in cards["tester/plain"].files()


def test_what_a_user_wrote_stays(cards):
    assert card(cards, "kept").endswith("My words.")
    assert card(cards, "branch", "wip").endswith("My words.")
    assert card(cards, "flaky").endswith("My words.")
    assert card(cards, "own") == card(cards, "kept-too") == "My words beside the model."
