"""The table of the release and the cards that are rendered from it."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from drifting_diffusers import DriftingObjective, DriftingPipeline, MaskedAutoencoder, Pixels
from drifting_diffusers.releases import RELEASES, Conversion, release_card

CARDS = Path(__file__).parents[1] / "model_cards"


def test_names_paths_and_encoders():
    assert list(RELEASES) == [
        "latent_L_sota", "latent_B_sota", "pixel_L_sota", "pixel_B_sota", "ablation", "mae_latent_640", "mae_latent_256", "mae_pixel_640",
    ]  # fmt: skip
    for name, release in RELEASES.items():
        assert release.name == name
        assert release.path == f"models/{release.kind}/jax/{name}"
        if release.kind == "gen":
            encoder = RELEASES[release.encoder]
            assert (encoder.kind, encoder.space) == ("mae", release.space)


def test_the_default_guidance_scale_is_where_the_fid_is_best():
    for release in RELEASES.values():
        if release.kind == "gen":
            assert release.guidance_scale == min(release.results, key=lambda row: row[1])[0]


def test_cards_in_the_repository_are_those_that_are_rendered():
    assert {path.stem for path in CARDS.glob("*.md")} - {"README"} == set(RELEASES)
    for name in RELEASES:
        assert (CARDS / f"{name}.md").read_text() == release_card(name), "render them anew: make cards"


@pytest.mark.parametrize("name", RELEASES)
def test_cards_say_whose_numbers_they_are(name):
    release, card = RELEASES[name], ModelCard(release_card(name, "user/mine"))
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("drifting-diffusers", "other", "Goodeat/drifting")
    assert "The source names no licence for the weights" in card.text
    assert '.from_pretrained("user/mine")' in card.text
    assert f'.from_release("{name}")' in release_card(name)
    if release.kind == "gen":
        assert "not measured again here" in card.text
        for scale, fid, score, where in release.results:
            assert f"| {scale} | {fid} | {'-' if score is None else score} | the {where} |" in card.text
        reported = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert reported == {"fid": release.results[0][1], "inception_score": release.results[0][2]}
        assert {result.source_name for result in card.data.eval_results} == {"reported by the authors"}
    else:
        assert "FID" not in card.text


def test_cards_say_how_the_weights_were_converted():
    plain = release_card("latent_L_sota", "user/mine")
    assert "1.0 is taken if none is given, where the FID reported below is best" in plain
    how = Conversion(dtype="bfloat16", guidance_scale=3.0, vae=None, revision="v1", mark="<!-- mark -->")
    card = release_card("latent_L_sota", "user/mine", how)
    for said in (
        "3.0 is taken if none is given; the FID reported below is best at 1.0",
        "rounded to bfloat16",
        'output_type="latent").images',
        "comes without that decoder",
        "at revision `v1`",
        "with `drifting-diffusers convert latent_L_sota --dtype bfloat16 --guidance-scale 3.0 --no-vae --revision v1`",
        "<!-- mark -->",
    ):
        assert said in card
        assert said not in plain
    for said in ("as it is", "decodes to images", "images = pipe", "where the FID reported below is best"):
        assert said in plain
        assert said not in card
    assert ModelCard(card).data.to_dict() == ModelCard(plain).data.to_dict()
    assert "; here `user/other` decodes them" in release_card("latent_L_sota", conversion=Conversion(vae="user/other"))
    loaded = "from_release(\"latent_L_sota\", dtype=torch.bfloat16, vae=None, guidance_scale=3.0, revision='v1')"
    assert loaded in release_card("latent_L_sota", conversion=how)
    assert "vae" not in release_card("pixel_L_sota", conversion=Conversion(vae=None)).replace("--no-vae", "")


class Loaded:
    """What a card loads, in place of gigabytes."""

    activations, images = Pixels(), ()

    def __call__(self, labels, *, generator, output_type="pil"):
        assert isinstance(generator, torch.Generator)
        return self


@pytest.mark.parametrize("repo_id", [None, "user/mine"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RELEASES)
def test_what_cards_say_runs(name, dtype, repo_id, monkeypatch):
    asked = []
    for cls in (DriftingPipeline, MaskedAutoencoder):
        for way in ("from_release", "from_pretrained"):
            monkeypatch.setattr(cls, way, lambda source, **kwargs: asked.append((source, kwargs)) or Loaded())
    card = release_card(name, repo_id, Conversion(dtype=dtype, vae=None))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(code, names)
    ((source, kwargs),) = asked
    assert source == (repo_id or name)
    assert kwargs.get("dtype") == (torch.bfloat16 if dtype == "bfloat16" and repo_id is None else None)
    assert RELEASES[name].kind == "gen" or isinstance(names["objective"], DriftingObjective)
