r"""What the authors of "Generative Modeling via Drifting" released, and the numbers that they report for it.

The numbers are theirs (README of their repository and arXiv 2602.04770, tables 5 and 6): FID and IS of 50,000 samples in one step on ImageNet 256 x 256.
"""

from dataclasses import dataclass

REPOSITORY = "Goodeat/drifting"
VAE = "stabilityai/sd-vae-ft-mse"  # the decoder of the latent generators, scaling factor 0.18215


@dataclass(frozen=True)
class Release:
    """One artefact.

    Args:
        kind: "gen" for a generator, "mae" for a feature encoder.
        space: "latent" for samples [4, 32, 32] of the VAE, "pixel" for images [3, 256, 256].
        description: in one line.
        encoder: the feature encoder that a generator was trained with.
        guidance_scale: where a generator's FID is best.
        results: reported for a generator, guidance scale -> (FID, IS, where); IS is None where it is not reported.
    """

    name: str
    kind: str
    space: str
    description: str
    encoder: str | None = None
    guidance_scale: float = 1.0
    results: tuple[tuple[float, float, float | None, str], ...] = ()

    @property
    def path(self) -> str:
        """Its folder in the repository."""
        return f"models/{self.kind}/jax/{self.name}"


_ROWS = [
    Release(
        "latent_L_sota",
        "gen",
        "latent",
        "L/2: 24 blocks of width 1024, 463M weights",
        "mae_latent_640",
        1.0,
        ((1.0, 1.53, 260.1, "release"), (1.0, 1.54, 258.9, "paper"), (1.5, 3.01, 354.4, "paper")),
    ),
    Release(
        "latent_B_sota",
        "gen",
        "latent",
        "B/2: 12 blocks of width 768, 133M weights",
        "mae_latent_640",
        1.1,
        ((1.1, 1.74, 263.4, "release"), (1.1, 1.75, 263.2, "paper")),
    ),
    Release(
        "pixel_L_sota",
        "gen",
        "pixel",
        "L/16: 24 blocks of width 1024, 464M weights",
        "mae_pixel_640",
        1.0,
        ((1.0, 1.62, 308.6, "release"), (1.0, 1.61, 307.5, "paper")),
    ),
    Release(
        "pixel_B_sota",
        "gen",
        "pixel",
        "B/16: 12 blocks of width 768, 134M weights",
        "mae_pixel_640",
        1.0,
        ((1.0, 1.73, 300.1, "release"), (1.0, 1.76, 299.7, "paper")),
    ),
    Release(
        "ablation",
        "gen",
        "latent",
        "B/2 of the ablations, trained for 30,000 steps",
        "mae_latent_256",
        2.0,
        ((2.0, 8.49, 144.0, "release"), (2.0, 8.46, None, "paper")),
    ),
    Release("mae_latent_640", "mae", "latent", "masked autoencoder of latents, 640 channels, 1280 epochs, then tuned as a classifier"),
    Release("mae_latent_256", "mae", "latent", "masked autoencoder of latents, 256 channels, 192 epochs"),
    Release("mae_pixel_640", "mae", "pixel", "masked autoencoder of pixels in patches of 8 x 8, 640 channels"),
]
RELEASES = {row.name: row for row in _ROWS}
