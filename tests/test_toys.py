"""The toys: the two examples run at a reduced size, and a generator finds both of two Gaussians from every start."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from drifting_diffusers.fields import DriftingField
from drifting_diffusers.losses import drift_loss

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """An example as a module; its name starts with a digit."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    """These sums are too small to share out; sharing them costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def is_picture(file: Path, magic: bytes) -> bool:
    return file.read_bytes().startswith(magic) and file.stat().st_size > 5000


def test_particles_reach_the_spiral(tmp_path):
    particles = example("01_particles")
    distance = particles.main(["--output_dir", str(tmp_path), "--particles", "128", "--data", "512", "--steps", "24"])
    assert distance < 0.005  # 1.8 at the start; fresh draws of the spiral lie within about 0.01 of 0
    assert is_picture(tmp_path / "particles.png", b"\x89PNG")


def test_particles_rest_where_they_have_arrived():
    """Why the example leaves the force unnormalised: its velocity fades by itself, the normalised one does not."""
    particles = example("01_particles")
    generator = torch.Generator().manual_seed(0)
    data = particles.spiral(512, generator)
    path = particles.flow(torch.tensor([0.85, -0.85]) + 0.08 * torch.randn(128, 2, generator=generator), data, 60)
    length = lambda x, y: float((y - x).norm(dim=1).mean())
    assert length(path[-2], path[-1]) < 0.01 * length(path[0], path[1])
    restless = DriftingField(particles.FIELD.temperatures, affinity_floor=0.0)
    there = restless(path[-1], positives=data, negatives=path[-1])
    assert there.velocity.square().mean().sqrt() > 0.3 * there.unit


def test_the_toy_covers_every_mode(tmp_path):
    toy = example("02_toy_2d")
    table = toy.main(["--output_dir", str(tmp_path), "--targets", "gaussians", "--starts", "collapsed", "--steps", "500", "--frames", "4"])
    mass, outside = table["gaussians", "collapsed"]
    assert_close(mass, torch.ones(8), rtol=0, atol=0.15)
    assert outside < 0.3
    assert is_picture(tmp_path / "toy_2d.png", b"\x89PNG")
    assert is_picture(tmp_path / "toy_2d.gif", b"GIF8")


@pytest.mark.parametrize("name", ["gaussians", "checkerboard"])
def test_the_data_of_the_toy_pass_its_own_meter(name):
    target = example("02_toy_2d").TARGETS[name]()
    mass, outside = target.coverage(target.sample(20_000, torch.Generator().manual_seed(0)))
    assert_close(mass, torch.ones(8), rtol=0, atol=0.06)
    assert outside < 0.02
    assert target.coverage(torch.full((10, 2), 8.0))[1] == 1


MODES = torch.tensor([[-2.5, 0.0], [2.5, 0.0]])


def two_gaussians(n: int, generator: torch.Generator) -> Tensor:
    return MODES[torch.randint(0, 2, (n,), generator=generator)] + 0.35 * torch.randn(n, 2, generator=generator)


def trained(field: DriftingField, start: tuple[float, float], scale: float, steps: int = 600) -> Tensor:
    """Samples of a small one-step generator after training from an output around `start`, `scale` times as wide as usual."""
    torch.manual_seed(0)  # the initial weights
    model = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    with torch.no_grad():
        model[0].weight.mul_(4)
        model[-1].weight.mul_(scale)
        model[-1].bias.copy_(torch.tensor(start))
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    for _ in range(steps):
        x, data = model(torch.randn(128, 2, generator=generator)), two_gaussians(256, generator)
        loss, _ = drift_loss(x[None], data[None], field=field)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        schedule.step()
    return model(torch.randn(4000, 2, generator=generator)).detach()


@pytest.mark.parametrize(
    ("start", "scale"), [((0.0, 0.0), 1.0), ((10.0, 10.0), 1.0), ((2.5, 0.0), 1e-3)], ids=["between", "far", "collapsed"]
)
def test_a_generator_covers_two_gaussians(start, scale):
    """Modes at (+-2.5, 0) with standard deviation 0.35: half the mass each within 10 %, of the right spread, little in between."""
    x = trained(DriftingField((0.05, 0.2, 1.0), affinity_floor=0.0), start, scale)
    distance, mode = torch.cdist(x, MODES).min(dim=1)
    assert abs(float((mode == 0).float().mean()) - 0.5) < 0.05
    assert_close(distance.median(), torch.tensor(0.35 * 1.1774), rtol=0.2, atol=0)  # median of a Rayleigh law
    assert (distance > 3 * 0.35).float().mean() < 0.12
    for i in range(2):
        own = x[(mode == i) & (distance < 3 * 0.35)]
        assert_close(own.mean(dim=0), MODES[i], rtol=0, atol=0.15)
        assert_close(own.std(dim=0), torch.tensor([0.35, 0.35]), rtol=0, atol=0.1)


def test_with_the_affinity_floor_the_same_generator_freezes_between_the_modes():
    """The known limit that the toys switch the floor off for: it is tuned for many dimensions and few targets."""
    x = trained(DriftingField(affinity_floor=1e-3), (0.0, 0.0), 1.0, steps=200)
    assert torch.cdist(x, MODES).min(dim=1).values.median() > 1.5
