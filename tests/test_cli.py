"""The command: help at once, errors in one line, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from release_files import to_release, write_artefact
from safetensors import SafetensorError
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


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["draw"],
        ["convert"],
        ["convert", "a"],
        ["convert", "a", "b", "--dtype", "int8"],
        ["convert", "a", "b", "--vae", "x", "--no-vae"],
    ],
    ids=str,
)
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
        (["{encoder}", "new", "--no-vae", "--guidance-scale", "0"], "--guidance-scale and --no-vae are of generators"),
        (["{source}", "new", "--vae", ""], "--vae is empty: name a folder or repository, or give --no-vae"),
        (["{source}", "link"], "link exists and is not an empty folder"),
        (["{source}", "dangling"], "dangling exists and is not an empty folder"),
        (["{source}", "."], "exists and is not an empty folder"),
        (["{source}", "nowhere/.."], "exists and is not an empty folder"),
        (["latent_L_sota", "{full}/file/new"], "{full}/file is no folder, so {full}/file/new cannot be made"),
        (["{source}", "release/new"], "lies in SOURCE {source}, which would change"),
        (["latent_L_sota", "new", "--push-to-hub", "a/b/c"], "'a/b/c'"),
        (["{broken}", "new/deep/er"], "RMSNorm_0/weight is missing"),
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
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nothing")
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", *(argument.format(**places) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("drifting-diffusers: error: ")
    assert message.format(**places) in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises((ValueError, OSError)):
        main(["convert", "--traceback", *(argument.format(**places) for argument in arguments)])


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch, capsys):
    source = write_artefact(tmp_path / "release", to_release(random_generator()))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (".", "../here", str(tmp_path / "here")):
        assert main(["convert", str(source), target]) == 1
        assert "is the working directory or holds it" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(source), "../x/../empty"]) == 0
    assert DriftingPipeline.from_pretrained(tmp_path / "empty").vae is None


def test_a_place_to_write_is_asked_for_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may be allowed everything
    assert main(["convert", "latent_L_sota", str(tmp_path / "new/ours")]) == 1
    assert f"{tmp_path} is not yours to write in" in capsys.readouterr().err


def test_a_failure_while_writing_leaves_no_folder(tmp_path, monkeypatch, capsys):
    source = write_artefact(tmp_path / "release", to_release(random_generator()))
    seen = []

    def full(self, folder):
        seen.extend(path.name for path in Path(folder).parents[1].iterdir())
        raise OSError("no space left")

    monkeypatch.setattr(DriftingPipeline, "save_pretrained", full)
    assert main(["convert", str(source), str(tmp_path / "new/deep/ours")]) == 1
    assert "no space left" in capsys.readouterr().err
    assert [name.startswith(".ours.partial-") for name in seen] == [True]
    assert list(tmp_path.iterdir()) == [source]


def test_what_is_written_has_the_permissions_of_the_umask(tmp_path):
    source = write_artefact(tmp_path / "release", to_release(random_generator()))
    code = "import os, sys; os.umask(0o027); from drifting_diffusers.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, "convert", str(source), str(tmp_path / "ours")], check=True, capture_output=True)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "ours").rglob("*") if path.is_file()}
    folders = {path.stat().st_mode & 0o777 for path in [tmp_path / "ours", *(tmp_path / "ours").rglob("*")] if path.is_dir()}
    assert (modes, folders) == ({0o640}, {0o750})


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), EOFError(), MemoryError(), KeyError("x"), SafetensorError("header")], ids=repr)
def test_what_nobody_foresaw_is_one_line_too(tmp_path, monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("drifting_diffusers.convert.find_source", fail)
    assert main(["convert", "latent_L_sota", str(tmp_path / "new")]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"drifting-diffusers: error: {type(error).__name__}")
    assert line.endswith(" (--traceback shows where)\n")
    assert line.count("\n") == 1
    with pytest.raises(type(error)):
        main(["convert", "--traceback", "latent_L_sota", str(tmp_path / "new")])


def test_an_interruption_is_130(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("drifting_diffusers.convert.find_source", interrupt)
    assert main(["convert", "latent_L_sota", str(tmp_path / "new")]) == 130
    assert list(tmp_path.iterdir()) == []
