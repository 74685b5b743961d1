"""Options of a run that change how it is computed and not what, and those that a machine cannot have."""

import pytest
import torch
from test_callbacks import SMALL
from test_trainer import images, one_accelerator_per_test, tiny_generator, weights
from torch.testing import assert_close

from drifting_diffusers import DriftingConfig, DriftingObjective, DriftingTrainer, MultiScaleStatistics, Pixels

__all__ = ["images", "one_accelerator_per_test"]


def generator():
    """Its output layer does not start at 0, where all samples are alike and rounding decides."""
    model = tiny_generator()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def trained(images, folder, **changes):
    config = DriftingConfig(
        str(folder), **(SMALL | {"max_steps": 4, "labels_per_step": 3, "generated_per_label": 3, "ema_decay": 0.0} | changes)
    )
    run = DriftingTrainer(generator(), DriftingObjective([Pixels(), MultiScaleStatistics()]), images, config, eval_dataset=images)
    run.train()
    return run


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    from accelerate.state import AcceleratorState

    found = weights(trained(images, tmp_path_factory.mktemp("plain") / "run"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


def distance(ours, theirs):
    """The largest difference of two updates, over the size of each weight's update."""
    before = generator().state_dict()
    return max(float((ours[n] - theirs[n]).norm() / (theirs[n] - before[n]).norm().clamp(min=1e-12)) for n in theirs)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pieces_of_the_labels_make_the_update_of_one_pass(size, images, tmp_path, plain):
    """Two of three labels leave a smaller piece."""
    assert distance(weights(trained(images, tmp_path / "run", labels_per_microbatch=size)), plain) < 1e-4


def test_gradient_checkpointing_makes_it_too(images, tmp_path, plain):
    assert distance(weights(trained(images, tmp_path / "run", gradient_checkpointing=True)), plain) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_blocks_make_it_too(images, tmp_path, plain):
    assert distance(weights(trained(images, tmp_path / "run", torch_compile=True)), plain) < 1e-3


def test_a_bank_of_uint8_is_exact_for_images_of_8_bits(images, tmp_path, plain):
    run = trained(images, tmp_path / "run", bank_dtype="uint8")
    assert run.real.feed.positives.samples.dtype == torch.uint8
    assert distance(weights(run), plain) < 1e-4


def test_every_average_is_kept_sampled_and_saved(images, tmp_path):
    run = trained(images, tmp_path / "run", ema_decay=0.9, more_ema_decays=[0.5])
    assert [*run.ema.models] == [0.9, 0.5]
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, other = (run.pipeline(ema_decay=decay).transformer.patch_proj.weight for decay in (None, 0.5))
    assert not torch.equal(ours, other)
    assert noise.shape == run.pipeline()(["left"], latents=noise, output_type="pt").images.shape
    with pytest.raises(ValueError, match=r"ema_decay must be one of \[0.9, 0.5\], got 0.7: set more_ema_decays before training"):
        run.save_model(ema_decay=0.7)


def test_a_guidance_of_1_for_all_gives_the_negatives_no_mass(images, tmp_path):
    run = trained(images, tmp_path / "run", guidance_max=1.0)
    assert run._draw_guidance().tolist() == [1.0, 1.0, 1.0]
    assert run._unconditional_weight(run._draw_guidance()).tolist() == [0.0, 0.0, 0.0]


def test_tf32_is_left_as_it_is_unless_it_is_asked_for(images, tmp_path):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for mine in ("highest", "high"):
            torch.set_float32_matmul_precision(mine)
            trained(images, tmp_path / mine, max_steps=1)
            assert torch.get_float32_matmul_precision() == mine
        torch.set_float32_matmul_precision("highest")
        trained(images, tmp_path / "run", max_steps=1, allow_tf32=True)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float16_without_a_gpu_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="mixed_precision='fp16' needs a GPU, and this process has none: take 'bf16' or 'no'"):
        trained(images, tmp_path / "run", mixed_precision="fp16")
    assert not (tmp_path / "run").exists()


def test_weights_are_compared_where_there_are_any(plain):
    assert_close(distance(plain, plain), 0.0)
    assert distance(generator().state_dict(), plain) == pytest.approx(1)
