"""The command: help at once, errors in one line, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
from release_files import to_release, write_artefact
from test_convert import random_generator

from drifting_diffusers import DriftingGenerator, DriftingPipeline, __version__
from drifting_diffusers.cli import main


def test_help_costs_no_import_of_torch():
    code = (
        "import sys, time; from drifting_diffusers.cli import main\n"
        "try: main(['convert', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert 'torch' not in sys.modules and time.process_time() < 0.5"  # processor time, interpreter included; measured 0.05
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "drifting-diffusers convert latent_L_sota models/drifting-L" in out


def test_the_command_is_installed():
    done = subprocess.run([Path(sys.executable).with_name("drifting-diffusers"), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


@pytest.mark.parametrize("arguments", [[], ["draw"], ["convert"], ["convert", "a"], ["convert", "a", "b", "--dtype", "int8"]], ids=str)
def test_a_wrong_command_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "usage: drifting-diffusers" in capsys.readouterr().err


def test_a_folder_is_converted(tmp_path, capsys):
    source = write_artefact(tmp_path / "release", to_release(random_generator()))
    target = tmp_path / "new/ours"
    assert main(["convert", str(source), str(target), "--dtype", "float16", "--guidance-scale", "1.5"]) == 0
    out = capsys.readouterr().out
    assert f'DriftingPipeline.from_pretrained("{target}")' in out
    assert "weights in float16" in out
    pipe = DriftingPipeline.from_pretrained(target)
    assert pipe.config.guidance_scale == 1.5
    assert not (target / "README.md").exists()  # a card of the release is for what the release made
    assert list(target.parent.iterdir()) == [target]  # nothing half-made stays
    expected = DriftingGenerator.from_release(source).half().state_dict()
    for name, tensor in pipe.transformer.state_dict().items():
        assert (tensor == expected[name].float()).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "new"], "nowhere is neither a released artefact (latent_L_sota,"),
        (["{source}", "{full}"], "is not an empty folder: nothing is overwritten"),
        (["{source}", "{full}/file"], "is not an empty folder: nothing is overwritten"),
        (["{source}", "new", "--private"], "give --push-to-hub too"),
        (["{source}", "new", "--revision", "main"], "--revision is of the release's repository"),
        (["{source}", "new", "--guidance-scale", "-1"], "guidance_scale must be finite and above 0"),
        (["{broken}", "new"], "RMSNorm_0/weight is missing"),
        (["{encoder}", "new", "--no-vae", "--guidance-scale", "2"], "--guidance-scale and --no-vae are of generators"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch, as_users_see_it, arguments, message):
    monkeypatch.chdir(tmp_path)
    tensors = to_release(random_generator())
    places = {"source": write_artefact(tmp_path / "release", tensors)}
    places["encoder"] = write_artefact(tmp_path / "encoder", {}, kind="mae")
    places["broken"] = write_artefact(tmp_path / "broken", {key: value for key, value in tensors.items() if key != "RMSNorm_0/weight"})
    places["full"] = tmp_path / "full"
    places["full"].mkdir()
    (places["full"] / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", *(argument.format(**places) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("drifting-diffusers: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises((ValueError, OSError)):
        main(["convert", "--traceback", *(argument.format(**places) for argument in arguments)])
