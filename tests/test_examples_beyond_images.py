"""The examples without classes and without a trainer, run at a reduced size, and the claims that their pictures make."""

import math
from pathlib import Path

import torch
from test_toys import example, one_thread
from torch.testing import assert_close

__all__ = ["one_thread"]


def is_picture(file: Path) -> bool:
    return file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000


# --- from a picture to pictures ----------------------------------------------------------------------------------------------------------


def test_a_condition_gets_several_answers_that_fit_it(tmp_path):
    translation = example("03_conditional_translation")
    sizes = ["--steps", "40", "--batch", "32", "--images", "500", "--held_out", "400"]
    table = translation.main(["--output_dir", str(tmp_path), *sizes])
    assert table["energy distance, generated"] < 0.05
    assert table["two answers to one condition"] > 0.1
    assert table["energy distance, answers shuffled"] > table["energy distance, real"]
    assert is_picture(tmp_path / "translation.png")


def test_the_gradient_of_a_joint_problem_reaches_the_answer_alone():
    translation = example("03_conditional_translation")
    generator = torch.Generator().manual_seed(0)
    conditions, answers = translation.halves(torch.rand(6, 1, 28, 28, generator=generator))
    answers.requires_grad_()
    pairs = translation.pairs(answers, conditions, key=2.0)
    assert {name: tuple(values.shape) for name, values in pairs.items()} == {"pixels": (6, 784), "coarse": (6, 156)}
    loss = translation.drift_loss(pairs["pixels"][None], pairs["pixels"].detach().flip(0)[None] + 0.1, field=translation.FIELD)[0]
    loss.sum().backward()
    assert answers.grad is not None
    assert answers.grad.abs().sum() > 0
    assert not conditions.requires_grad


# --- a policy ----------------------------------------------------------------------------------------------------------------------------


def test_a_policy_runs_in_a_closed_loop(tmp_path):
    policy = example("04_policy")
    sizes = ["--steps", "40", "--episodes", "100", "--observations", "1000", "--rollouts", "100"]
    table = policy.main(["--output_dir", str(tmp_path), *sizes])
    assert list(table) == ["expert", "regression", "drifting"]
    assert table["expert"][1:] == (1, 0)
    assert table["expert"][0] < 0.05 < min(table["regression"][0], table["drifting"][0])  # so short a training cannot do it
    assert is_picture(tmp_path / "policy.png")


def test_the_expert_takes_either_way_and_their_mean_is_none():
    policy = example("04_policy")
    generator = torch.Generator().manual_seed(0)
    state = policy.starts(200, generator)
    left, right = (policy.expert(state, side * torch.ones(200)) for side in (-1.0, 1.0))
    towards = torch.nn.functional.normalize(state[:, 2:] - state[:, :2], dim=1)
    for way in (left, right):
        assert ((way * towards).sum(1).abs() < 0.75).all()  # around the block
    mean = torch.nn.functional.normalize(left + right, dim=1)
    assert ((mean * towards).sum(1).abs() > 0.99).float().mean() > 0.9  # along the line to it
    assert policy.reached(policy.expert_rollout(state, generator)).all()
    assert not policy.reached(state[:, None]).any()


def test_a_push_the_wrong_way_loses_the_block_for_good():
    """Straight on, the direction of the mean of the two ways, every block falls; then not even the expert, from behind, brings it back."""
    policy = example("04_policy")
    state = policy.starts(100, torch.Generator().manual_seed(0))
    assert not policy.fallen(state).any()
    for _ in range(20):
        state = policy.move(state, torch.nn.functional.normalize(state[:, 2:] - state[:, :2], dim=1))
    assert policy.fallen(state).all()
    late = policy.expert_rollout(torch.cat([2 * state[:, 2:], state[:, 2:]], dim=1), torch.Generator().manual_seed(1))
    assert_close(late[..., 2:], state[:, None, 2:].expand(-1, late.shape[1], -1))
    assert not policy.reached(late).any()


def test_the_world_of_the_policy_turns_with_its_frame():
    """Observations do not change when everything is turned about the goal, and actions in the frame turn with it."""
    policy = example("04_policy")
    state = policy.starts(50, torch.Generator().manual_seed(0)).double()
    c, s = math.cos(1.0), math.sin(1.0)
    turn = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    turned = torch.cat([state[:, :2] @ turn, state[:, 2:] @ turn], dim=1)
    assert_close(policy.observe(turned), policy.observe(state))
    action = torch.randn(50, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    there = policy.move(turned, (action @ policy.frame(turned).mT)[:, 0])
    here = policy.move(state, (action @ policy.frame(state).mT)[:, 0])
    assert_close(there, torch.cat([here[:, :2] @ turn, here[:, 2:] @ turn], dim=1))
    assert ((here[:, 2:] - here[:, :2]).norm(dim=1) >= policy.CONTACT - 1e-9).all()


# --- features of one's own ---------------------------------------------------------------------------------------------------------------


def test_own_features_are_better_where_they_hear_more(tmp_path):
    own = example("05_bring_your_own_features")
    table = own.main(["--output_dir", str(tmp_path), "--steps", "60", "--batch", "32", "--samples", "300"])
    assert list(table) == ["real", "raw samples", "own features"]
    assert table["own features"]["by spectra"] < table["raw samples"]["by spectra"]
    assert abs(table["real"]["by spectra"]) < 0.02
    assert is_picture(tmp_path / "own_features.png")


def test_spectra_do_not_hear_the_phase_and_have_a_slope_at_silence():
    own = example("05_bring_your_own_features")
    time = torch.arange(own.LENGTH) / own.LENGTH
    tone = lambda phase: (2 * math.pi * 64 * time + phase).sin()[None, None, None]
    heard = [own.spectra(tone(phase), 64) for phase in (0.0, 1.0)]
    assert (heard[0] - heard[1]).norm() < 0.01 * heard[0].norm()
    assert (tone(0.0) - tone(1.0)).norm() > 0.5 * tone(0.0).norm()
    silence = torch.zeros(1, 1, 1, own.LENGTH, requires_grad=True)
    sum(values.sum() for values in own.Spectra()(silence).values()).backward()
    assert silence.grad is not None
    assert torch.isfinite(silence.grad).all()
