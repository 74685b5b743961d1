"""Cards, pictures and pushes that somebody waits for, to a Hub on 127.0.0.1: what arrives, what stays, what is tried again and what is told."""

import io
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants, hf_api
from loopback_hub import Repository
from PIL import Image
from test_pushing import server
from torch.testing import assert_close

from drifting_diffusers import DriftingGenerator, DriftingPipeline, MaskedAutoencoder, cards, hub, remote

__all__ = ["server"]

pytestmark = [pytest.mark.hub, pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")]  # that diffusers gives

NAME = "tester/fish"
COMMIT, WEIGHTS = "/commit/", "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def waits(server, tmp_path, monkeypatch) -> list[float]:
    """This process believes in that Hub, for loading as well; what is waited for between attempts."""
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    waits: list[float] = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's own waits
    return waits


def generator(seed: int = 0, **changes) -> DriftingGenerator:
    torch.manual_seed(seed)
    form = {"sample_size": 8, "in_channels": 3, "num_classes": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    model = DriftingGenerator(**(form | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def pipeline(seed: int = 0, **changes) -> DriftingPipeline:
    return DriftingPipeline(generator(seed, **changes), labels=["cat", "dog, hound"][: changes.get("num_classes", 2)])


def draw(pipe: DriftingPipeline) -> torch.Tensor:
    return pipe("dog", generator=torch.Generator().manual_seed(0), output_type="pt").images


def files(server, revision: str = "main", name: str = NAME) -> dict[str, bytes]:
    return server.repositories[name].files(revision)


def card(server, revision: str = "main", name: str = NAME) -> str:
    return files(server, revision, name)["README.md"].decode()


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def png(colour: str = "red") -> bytes:
    """A picture that somebody made."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, format="PNG")
    return file.getvalue()


# -- the card of a push


def test_a_push_brings_a_card_with_what_the_user_says_and_a_picture(server, waits):
    pipe = pipeline()
    about = {"license": "mit", "datasets": ["user/data", "user/more"], "base_model": "user/base", "tags": ["fish"]}
    pipe.push_to_hub(NAME, card=about | {"metrics": {"fid": 12.5}, "seeds": [0]})
    found = metadata(card(server))
    assert found["library_name"] == "drifting-diffusers"
    assert found["pipeline_tag"] == "unconditional-image-generation"
    assert {"diffusers", "drifting", "fish"} <= set(found["tags"])
    assert (found["license"], found["base_model"], found["base_model_relation"]) == ("mit", "user/base", "finetune")
    assert found["datasets"] == ["user/data", "user/more"]
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"]["type"] == "user/data"
    assert result["metrics"][0]["value"] == 12.5
    assert "- seeds: [0]" in card(server)
    assert "![Samples](samples.png)" in card(server)
    assert "curves.png" not in card(server)
    with Image.open(io.BytesIO(files(server)["samples.png"])) as picture:
        assert picture.width == 2 * 98 + 2
        assert len(np.unique(np.asarray(picture))) > 50


def test_the_snippet_of_the_card_runs_against_the_hub(server, waits):
    pipe = pipeline()
    pipe.push_to_hub(NAME)
    scope: dict = {}
    exec(card(server).split("```python\n")[1].split("```")[0], scope)
    want = pipe(["cat", "dog"], generator=torch.Generator().manual_seed(0)).images
    assert [np.asarray(image).tolist() for image in scope["images"]] == [np.asarray(image).tolist() for image in want]


def test_a_network_alone_says_where_it_comes_from_and_what_it_reached(server, waits):
    encoder = MaskedAutoencoder(base_channels=32, layers_per_stage=[1, 1, 1, 1], num_classes=2)
    encoder.push_to_hub(NAME, card={"license": "mit", "dataset": "user/data", "metrics": {"reconstruction": 0.25}})
    found = metadata(card(server))
    assert (found["pipeline_tag"], found["license"], found["datasets"]) == ("image-feature-extraction", "mit", ["user/data"])
    assert "| reconstruction | 0.25 |" in card(server)
    assert "samples.png" not in files(server)
    generator().push_to_hub("tester/network", revision="wip")
    assert metadata(card(server, "wip", "tester/network"))["pipeline_tag"] == "unconditional-image-generation"


def test_numbers_and_curves_of_the_folder_are_shown(server, waits, tmp_path):
    (tmp_path / "curves.png").write_bytes(png())
    (tmp_path / "results.json").write_text(json.dumps({"metrics": {"energy": 0.5}, "dataset": "user/data"}))
    pipe = pipeline()
    pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id=NAME, card={"license": "mit"})
    assert "![What was watched while it was trained](curves.png)" in card(server)
    assert "| energy | 0.5 |" in card(server)
    assert metadata(card(server))["license"] == "mit"
    assert files(server)["curves.png"] == png()
    pipe.push_to_hub("tester/other", card=tmp_path / "results.json")
    assert "| energy | 0.5 |" in card(server, name="tester/other")
    (tmp_path / "results.json").write_text(json.dumps({"metrics": {"energy": 0.25}, "sd": {"fid": 0.125}, "command": "the old one"}))
    pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id="tester/newer", card={"metrics": {"fid": 3.0}})
    assert "| fid | 3 | - |" in card(server, name="tester/newer")  # nothing of how the former numbers were made
    assert "the old one" not in card(server, name="tester/newer")
    pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id=NAME)  # over our card of before
    assert "| energy | 0.25 |" in card(server)


def test_what_was_loaded_brings_what_its_folder_tells_of_it(server, waits, tmp_path):
    pipeline().save_pretrained(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"metrics": {"energy": 0.5}}))
    (tmp_path / "curves.png").write_bytes(png())
    pipe = DriftingPipeline.from_pretrained(tmp_path)
    pipe.push_to_hub(NAME)
    assert "| energy | 0.5 |" in card(server)
    assert "(curves.png)" in card(server)
    (tmp_path / "README.md").write_text("My words.")
    pipe.push_to_hub("tester/mine")
    assert card(server, name="tester/mine") == "My words."
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1)
    pipe.push_to_hub("tester/changed")  # whose numbers nobody has measured
    assert not {"results.json", "curves.png"} & set(files(server, name="tester/changed"))
    assert "energy" not in card(server, name="tester/changed")


def test_a_card_of_ours_from_elsewhere_stays(server, waits, tmp_path):
    """As that of a converted release, whose numbers are its authors'."""
    (tmp_path / "README.md").write_text(f"{cards.CARD_MARK}\nThe authors' numbers.")
    pipeline().save_pretrained(tmp_path, push_to_hub=True, repo_id=NAME)
    assert card(server).endswith("The authors' numbers.")
    assert "samples.png" not in files(server)  # nothing would show it


@pytest.mark.usefixtures("as_users_see_it")
def test_what_a_card_would_not_say_is_refused(server, waits):
    with pytest.raises(ValueError, match=r"a card says license, .*; got licence without metrics"):
        pipeline().push_to_hub(NAME, card={"licence": "mit"})
    assert server.repositories == {}


# -- pictures


def test_pictures_of_the_user_stay_and_ours_give_way(server, waits, tmp_path):
    pipeline(0).push_to_hub(NAME)
    first = files(server)["samples.png"]
    pipeline(1).push_to_hub(NAME)
    second = files(server)["samples.png"]
    assert first != second
    assert cards.is_ours(io.BytesIO(second))

    (tmp_path / "samples.png").write_bytes(png("blue"))
    pipeline(2).save_pretrained(tmp_path, push_to_hub=True, repo_id=NAME)  # somebody's own, in the folder
    assert files(server)["samples.png"] == png("blue") == (tmp_path / "samples.png").read_bytes()
    assert "![Samples](samples.png)" in card(server)

    pipeline(3).push_to_hub(NAME)  # somebody's own, in the repository
    assert files(server)["samples.png"] == png("blue")
    assert "![Samples](samples.png)" in card(server)
    (tmp_path / "samples.png").unlink()
    hub.add_pictures(pipeline(3), tmp_path)
    hub.upload(pipeline(3), tmp_path, NAME)  # ours in the folder, somebody's own in the repository
    assert files(server)["samples.png"] == png("blue")
    assert cards.is_ours(tmp_path / "samples.png")


def test_samples_of_weights_that_are_gone_are_drawn_again(server, waits, tmp_path):
    for seed in (0, 1):
        pipeline(seed).save_pretrained(tmp_path, push_to_hub=True, repo_id=NAME)
        with Image.open(io.BytesIO(files(server)["samples.png"])) as found:
            assert np.asarray(found).tolist() == np.asarray(cards.sample_sheet(pipeline(seed))).tolist()
    pipeline(2).save_pretrained(tmp_path)
    assert not (tmp_path / "samples.png").exists()


def test_drawing_changes_nothing():
    pipe = pipeline()
    pipe.transformer.train()
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    first = cards.sample_sheet(pipe)
    assert_close(torch.rand(3), want, rtol=0, atol=0)
    assert pipe.transformer.training
    assert np.asarray(first).tolist() == np.asarray(cards.sample_sheet(pipe)).tolist()


@pytest.mark.parametrize(("classes", "columns", "rows"), [(0, 5, 3), (1, 1, 4), (2, 2, 3), (40, 10, 3)])
def test_a_sheet_has_few_samples_of_few_classes(classes, columns, rows):
    pipe = DriftingPipeline(generator(num_classes=classes))
    assert cards.sample_sheet(pipe).size == (columns * 98 + 2, rows * 98 + 2 + (18 if classes else 0))
    assert cards.sample_sheet(pipe, side=2).width == columns * 6 + 2  # large ones are reduced


def test_what_cannot_be_drawn_is_pushed_without(server, waits, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no memory")

    pipe = pipeline()
    monkeypatch.setattr(pipe.transformer, "forward", broken)
    with pytest.warns(UserWarning, match="no samples can be drawn for the card: no memory; a samples.png of your own"):
        pipe.push_to_hub(NAME)
    assert WEIGHTS in files(server)
    assert "samples.png" not in files(server)
    assert "samples.png" not in card(server)


def test_what_needs_no_picture_gets_none(server, waits):
    server.repositories["tester/kept"] = Repository()
    server.repositories["tester/kept"].commit({"README.md": b"My words."})
    pipeline().push_to_hub("tester/kept")
    assert card(server, name="tester/kept") == "My words."
    pipeline(in_channels=4).push_to_hub("tester/latents")
    pipeline().push_to_hub("tester/plain", samples=False)
    for name in ("tester/kept", "tester/latents", "tester/plain"):
        assert "samples.png" not in files(server, name=name)
        assert "samples.png" not in card(server, name=name)


# -- branches, pull requests, private repositories


def test_a_branch_is_pushed_to_and_loaded(server, waits, tmp_path):
    pipeline(0).push_to_hub(NAME)
    pipeline(1).push_to_hub(NAME, revision="feature/next")
    pipeline(2).save_pretrained(tmp_path, push_to_hub=True, repo_id=NAME, revision="third")
    load = DriftingPipeline.from_pretrained
    for revision, seed in (("main", 0), ("feature/next", 1), ("third", 2)):
        assert_close(draw(load(NAME, revision=revision)), draw(pipeline(seed)))
    generator(3).push_to_hub(NAME, revision="network")
    assert_close(dict(DriftingGenerator.from_pretrained(NAME, revision="network").state_dict()), dict(generator(3).state_dict()))


@pytest.mark.parametrize("xet", [False, True])  # the client opens pull requests otherwise where it has xet, and sends small files alike
def test_a_pull_request_holds_what_was_pushed(server, waits, monkeypatch, xet):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    pipeline(0).push_to_hub(NAME)
    for number in (1, 2):
        made = pipeline(number).push_to_hub(NAME, create_pr=True, commit_message=f"number {number}", private=False)
        assert made.pr_revision == f"refs/pr/{number}"
        assert made.pr_url.endswith(f"{NAME}/discussions/{number}")
    load = DriftingPipeline.from_pretrained
    for revision, seed in (("main", 0), ("refs/pr/1", 1), ("refs/pr/2", 2)):
        assert_close(draw(load(NAME, revision=revision)), draw(pipeline(seed)))
    pipeline(3).push_to_hub(NAME, revision="refs/pr/1")  # more of the same
    assert_close(draw(load(NAME, revision="refs/pr/1")), draw(pipeline(3)))
    assert set(server.repositories[NAME].refs) == {"main", "refs/pr/1", "refs/pr/2"}


def test_a_pull_request_to_somebody_elses_repository(server, waits):
    pipeline(0).push_to_hub(NAME)
    server.fail("/api/repos/create", status=403)
    assert pipeline(1).push_to_hub(NAME, create_pr=True).pr_revision == "refs/pr/1"


def test_a_pull_request_is_tried_once(server, waits):
    pipeline(0).push_to_hub(NAME)
    server.fail(COMMIT, status=500)
    with pytest.raises(OSError, match=f"Pushing to {NAME} failed: the Hub answered 500"):
        pipeline(1).push_to_hub(NAME, create_pr=True)
    assert waits == []


@pytest.mark.usefixtures("as_users_see_it")
def test_pushes_that_contradict_themselves(server, waits):
    with pytest.raises(ValueError, match="a pull request is to the main branch, got create_pr=True and revision='wip'"):
        pipeline().push_to_hub(NAME, create_pr=True, revision="wip")
    assert server.requests == []
    pipeline().push_to_hub(NAME)
    with pytest.raises(ValueError, match=f"{NAME} is public already, so private=True would hide nothing"):
        pipeline().push_to_hub(NAME, private=True)
    pipeline().push_to_hub("tester/secret", private=True)
    pipeline().push_to_hub("tester/secret", private=True)
    assert server.repositories["tester/secret"].private
    with pytest.raises(OSError, match="tester/secret"):
        DriftingPipeline.from_pretrained("tester/secret", token=False)


# -- what goes wrong with a push that somebody waits for


REFUSED = {401: "`hf auth login`", 403: "write permission", 404: "check the name", 413: ""}


@pytest.mark.parametrize(
    ("path", "status", "way_out"),
    [(path, *refused) for path in ("/api/repos/create", COMMIT) for refused in REFUSED.items()] + [(COMMIT, 409, "as the test wants")],
)
def test_what_does_not_pass_is_an_error_with_a_way_out(server, waits, path, status, way_out):
    server.fail(path, status=status, times=9)
    with pytest.raises(OSError, match=f"Pushing to {NAME} failed: the Hub answered {status}") as caught:
        pipeline().push_to_hub(NAME, samples=False)
    assert way_out in str(caught.value)
    assert str(caught.value).endswith("Push again when that is settled")
    assert waits == []


def test_a_wrong_token_is_told_and_not_shown(server, waits):
    with pytest.raises(OSError, match=r"the Hub answered 401 .*hf auth login") as caught:
        pipeline().push_to_hub(NAME, token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)


def test_what_passes_is_tried_again(server, waits):
    server.fail("/api/repos/create", status=503)
    server.fail(COMMIT, status=429, headers={"Retry-After": "7"})
    server.fail(COMMIT, first=2, status=409, message="another conflicting operation is in progress")
    server.fail(COMMIT, first=3, cut=100)
    pipeline().push_to_hub(NAME)
    assert waits == [2.0, 7.0, 4.0, 8.0]
    assert server.repositories[NAME].messages == ["Upload DriftingPipeline"]


def test_attempts_end(server, waits):
    server.fail(COMMIT, status=502, times=99)
    with pytest.raises(OSError, match=r"the Hub answered 502 .*4 times in a row"):
        pipeline().push_to_hub(NAME)
    assert waits == [2.0, 4.0, 8.0]
    server.fail("/api/repos/create", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(OSError, match="the server asks for 3600 s of patience, more than 60"):
        pipeline().push_to_hub(NAME)


def test_a_slow_peer_is_waited_for(server, waits):
    faults = [server.fail(path, slow=500) for path in (COMMIT, "/resolve/")]
    pipeline().push_to_hub(NAME)
    assert_close(draw(DriftingPipeline.from_pretrained(NAME)), draw(pipeline()))
    assert all(fault.arrived.is_set() for fault in faults)
    assert waits == []


def test_the_card_of_somebody_is_safe_from_a_network_that_fails(server, waits):
    server.repositories[NAME] = Repository()
    server.repositories[NAME].commit({"README.md": b"My words."})
    server.fail("README.md", status=500, times=99)
    with pytest.raises(OSError, match="the Hub answered 500"):
        pipeline().push_to_hub(NAME)
    assert card(server) == "My words."


# -- large files


def test_large_files_go_by_lfs_and_come_back(server, waits):
    server.lfs_above = 5_000
    pipe = pipeline()
    pipe.push_to_hub(NAME)
    assert WEIGHTS in server.repositories[NAME].large
    assert "README.md" not in server.repositories[NAME].large
    assert len(server.objects) == len(server.repositories[NAME].large)
    assert_close(draw(DriftingPipeline.from_pretrained(NAME)), draw(pipe))
    before = sum(method == "PUT" for method, _ in server.requests)
    pipe.push_to_hub(NAME, commit_message="the same")
    assert sum(method == "PUT" for method, _ in server.requests) == before  # nothing is sent twice


def test_a_connection_that_breaks_in_the_middle_of_a_large_file(server, waits):
    server.lfs_above = 5_000
    fault = server.fail("/large/", cut=1_000, times=2)
    pipeline().push_to_hub(NAME)
    assert fault.seen > 2
    assert_close(draw(DriftingPipeline.from_pretrained(NAME)), draw(pipeline()))


def test_a_large_file_that_is_refused_says_why(server, waits):
    server.lfs_above = 5_000
    server.fail("/large/", status=403, times=99)
    with pytest.raises(OSError, match=r"the Hub answered 403 .*write permission"):
        pipeline().push_to_hub(NAME)
    assert waits == []


# -- loading


@pytest.mark.parametrize(
    ("status", "said"), [(401, "hf auth login"), (403, "accept its terms"), (404, "check the name"), (500, "3 times in a row")]
)
def test_weights_that_do_not_come_are_an_error_with_a_way_out(server, waits, status, said):
    pipeline().push_to_hub(NAME)
    server.fail(f"resolve/{server.repositories[NAME].refs['main']}/{WEIGHTS}", status=status, times=99)
    with pytest.raises(OSError, match=f"{NAME} could not be fetched: the Hub answered {status}") as caught:
        DriftingPipeline.from_pretrained(NAME)
    assert said in str(caught.value)
    assert waits == ([2.0, 4.0] if status == 500 else [])


@pytest.mark.parametrize("status", [401, 404, 500])
def test_an_index_that_does_not_come_is_an_error(server, waits, status):
    pipeline().push_to_hub(NAME)
    server.fail("model_index.json", status=status, times=99)
    with pytest.raises(OSError, match=NAME):
        DriftingPipeline.from_pretrained(NAME)


def test_a_download_that_is_cut_goes_on(server, waits):
    pipeline().push_to_hub(NAME)
    server.cuts[WEIGHTS] = 1_000
    assert_close(draw(DriftingPipeline.from_pretrained(NAME)), draw(pipeline()))
    assert not server.cuts


def test_a_busy_server_is_asked_again_for_weights(server, waits):
    pipeline().push_to_hub(NAME)
    server.fail(WEIGHTS, status=500)
    assert_close(draw(DriftingPipeline.from_pretrained(NAME)), draw(pipeline()))
