"""The table of the release and the cards that are rendered from it."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from drifting_diffusers.releases import RELEASES, release_card

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
