"""Memory that calls use again is never seen by two of them, and never by who called."""

import threading

import pytest
import torch
from torch.testing import assert_close

from drifting_diffusers import drift_loss
from drifting_diffusers.fields import batch_mean, workspace
from drifting_diffusers.fields.engine import Sides, TorchEngine
from drifting_diffusers.fields.workspace import Workspace

CPU = torch.device("cpu")
SHAPES = ((3, 12, 10, 6), (3, 12, 10, 6), (2, 5, 7, 40), (6, 4, 3, 130), (1, 30, 20, 6), (3, 12, 10, 6))


@pytest.fixture
def room(monkeypatch):
    room = Workspace()
    monkeypatch.setattr("drifting_diffusers.fields.engine.WORKSPACE", room)
    return room


def take(room, *shape, dtype=torch.float32):
    return room.take(shape, dtype, CPU)


def test_what_was_given_back_is_lent_again():
    room = Workspace()
    first = take(room, 10, 10)
    room.give(first)
    again = take(room, 9, 5, dtype=torch.float64)  # 360 bytes of 400
    assert again.shape == (9, 5)
    assert again.dtype == torch.float64
    assert again.is_contiguous()
    assert again.data_ptr() == first.data_ptr()
    assert not room.free


def test_what_is_lent_is_lent_once():
    room = Workspace()
    room.give(take(room, 100))
    one, other = take(room, 100), take(room, 100)
    assert one.data_ptr() != other.data_ptr()


def test_a_large_block_is_not_spent_on_a_small_tensor():
    room = Workspace()
    large = take(room, 1000)
    room.give(large)
    assert take(room, 10).data_ptr() != large.data_ptr()
    assert len(room.free) == 1


def test_little_is_kept(monkeypatch):
    monkeypatch.setattr(workspace, "KEPT", 4000)
    room = Workspace()
    for tensor in [take(room, 300) for _ in range(5)]:
        room.give(tensor)
    assert sum(map(len, room.free)) == 3600  # three of 1,200 bytes
    room.give(take(room, 2000))  # alone too large
    assert sum(map(len, room.free)) == 3600
    for tensor in [take(room, 1) for _ in range(100)] + [take(room, 0)]:
        room.give(tensor)
    assert len(room.free) <= workspace.MOST


def test_inference_mode_leaves_nothing_that_cannot_be_written():
    room = Workspace()
    with torch.inference_mode():
        room.give(take(room, 10))
    again = take(room, 10)
    assert not again.is_inference()
    again.fill_(1.0)


def test_every_thread_has_its_own():
    room = Workspace()
    room.give(take(room, 10))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(list(room.free)))
    thread.start()
    thread.join()
    assert seen == [[]]
    assert len(room.free) == 1


def test_other_devices_keep_memory_by_themselves():
    room = Workspace()
    tensor = room.take((2, 3), torch.float32, torch.device("meta"))
    room.give(tensor)
    assert tensor.device.type == "meta"
    assert not room.free


def clouds(b, n, p, d):
    rng = torch.Generator().manual_seed(b + d)
    return torch.randn(b, n, d, generator=rng, dtype=torch.float64), torch.randn(b, p, d, generator=rng, dtype=torch.float64)


def engine(x, y, **choices):
    return TorchEngine(Sides(x, (x, y), x.shape[1], own=x.shape[1]), (0.02, 0.05, 0.2), 1e-6, 100.0, **choices)


def stages(engine):
    length = batch_mean(*engine.measure())
    yield
    factors = engine.forces(length).sum(1).rsqrt()
    yield
    yield engine.velocity(factors)


@pytest.mark.parametrize("choices", [{"gram": True}, {"gram": False}, {"chunk": 300, "block": 200}, {}], ids=str)
def test_calls_that_take_turns_do_not_see_each_other(choices, room):
    """Engines whose stages are interleaved, as those of features that share a message are, and calls after them."""
    alone = []
    for shape in SHAPES:
        room.free.clear()
        alone.append([*stages(engine(*clouds(*shape), **choices))][-1])
    kept = [velocity.clone() for velocity in alone]
    for _ in range(2):
        running = [stages(engine(*clouds(*shape), **choices)) for shape in SHAPES]
        together = [[next(each) for each in running] for _ in range(3)][-1]
        for found, expected in zip(together, kept, strict=True):
            assert_close(found, expected, rtol=0, atol=0)
    assert room.free
    for found, expected in zip(alone, kept, strict=True):  # nobody wrote into what was returned
        assert_close(found, expected, rtol=0, atol=0)


def test_a_second_step_takes_no_new_memory(room):
    x, y = clouds(4, 16, 12, 40)
    blocks = []
    for _ in range(3):
        drift_loss(x.clone().requires_grad_(), y)[0].sum().backward()
        blocks.append({block.data_ptr() for block in room.free})
    assert blocks[0]
    assert blocks[0] == blocks[1] == blocks[2]
