"""Help: at once, true, and as wide as the terminal; what the shell completes."""

import shlex
import subprocess
import sys
from importlib import import_module

import pytest
from test_import import HEAVY

from drifting_diffusers import cli
from drifting_diffusers.arguments_help import Paragraphs

VERBS = list(cli.VERBS)
FOREIGN = ("accelerate launch -m drifting_diffusers.cli ", "torchrun --nproc_per_node 2 -m drifting_diffusers.cli ")


def own_words(line):
    """The words after the command's name in a line of an example; None in other lines."""
    for start in ("drifting-diffusers ", *FOREIGN):
        if start in line:
            return shlex.split(line[line.index(start) + len(start) :].split(" > ")[0])
    return None


def examples(name):
    text = import_module(f"drifting_diffusers.cli.{name}").EXAMPLES.replace("\\\n", " ")
    return [
        words for line in text.splitlines() if line.startswith("  ") and (words := own_words(line.strip().removesuffix(')"'))) is not None
    ]


def test_help_loads_nothing_heavy():
    code = f"""if True:
        import io, sys
        from contextlib import redirect_stdout
        from drifting_diffusers.cli import main
        for words in ([], *([name] for name in {VERBS!r})):
            with redirect_stdout(io.StringIO()) as said:
                try: main([*words, '--help'])
                except SystemExit as done: assert done.code == 0, words
            assert 'usage: drifting-diffusers' in said.getvalue(), words
            loaded = [name for name in {HEAVY!r} if name in sys.modules]
            assert not loaded, (words, loaded)
            assert words or not any(f'drifting_diffusers.cli.{{name}}' in sys.modules for name in {VERBS!r}), 'help alone loads no verb'
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_verb_loads_no_other():
    code = f"""if True:
        import sys
        from drifting_diffusers.cli import _parser
        _parser(['info'])
        assert [name for name in {VERBS!r} if f'drifting_diffusers.cli.{{name}}' in sys.modules] == ['info']
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", VERBS)
def test_every_example_is_understood(name):
    found = examples(name)
    assert found
    for words in found:
        options = cli._parser([words[0]]).parse_args(words)
        assert callable(options.run)
        if name == "train" and "--config" not in words:
            arguments, config, _ = options.values(options)
            assert arguments.dataset_name or arguments.latents
            assert config.output_dir


def test_the_examples_of_the_main_help_are_understood():
    found = [words for line in cli.EPILOG.splitlines() if (words := own_words(line)) and words[0] != "COMMAND"]
    assert len(found) >= 2
    for words in found:
        cli._parser([words[0]]).parse_args(words)


@pytest.mark.parametrize("name", [None, *VERBS])
@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(name, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    parser = cli._parser([name] if name else [])
    own = parser._subparsers._group_actions[0].choices[name] if name else parser
    lines = own.format_help().splitlines()
    long = [line for line in lines if len(line) > width and "/" not in line]  # a path cannot be broken
    assert not long
    assert any(len(line) > 60 for line in lines)


def test_a_broken_command_is_the_same_command():
    text = "  drifting-diffusers sample fashion-mnist --labels 'ankle boot' bag --seed 1 2 3 --output outputs/samples --overwrite"
    shown = Paragraphs("x", width=60)._fill_text(text, 60, "")
    assert shown.count("\\\n") == 2
    assert shlex.split(shown.replace("\\\n", " ")) == shlex.split(text)


@pytest.mark.parametrize(
    ("word", "hint"), [("sampel", "did you mean sample?"), ("eval", "did you mean evaluate?"), ("xyz", "there are train, sample,")]
)
def test_an_unknown_command_names_the_nearest(word, hint, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([word])
    assert f"there is no command '{word}'; {hint}" in " ".join(capsys.readouterr().err.split())


def test_exit_codes_and_traceback_are_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    said = capsys.readouterr().out
    for line in ("0    done", "1    an error", "2    a wrong command", "130  interrupted", "75   training"):
        assert line in said


def test_options_may_be_written_with_underscores():
    read = lambda *words: vars(cli._parser(["sample"]).parse_args(["sample", "p", *words]))
    assert read("--num_images_per_label=3", "--guidance_scale", "2") == read("--num-images-per-label", "3", "--guidance-scale", "2")


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m drifting_diffusers.cli completion bash | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "1")  # 0 where all of it fits into the pipe


# Completion


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """What bash offers for the last of some words, through the function that the script registers."""
    folder = tmp_path_factory.mktemp("completion")
    with (folder / "script").open("w") as file:
        subprocess.run([sys.executable, "-m", "drifting_diffusers.cli", "completion", "bash"], stdout=file, check=True)
    (folder / "run.yaml").touch()

    def offered(*words):
        line = """
            source ./script
            COMP_WORDS=(drifting-diffusers "$@"); COMP_CWORD=$#; COMPREPLY=()
            function=$(complete -p drifting-diffusers | sed 's/.*-F \\([^ ]*\\).*/\\1/')
            $function drifting-diffusers "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$COMP_CWORD-1]}"
            printf '%s\\n' "${COMPREPLY[@]}"
        """
        done = subprocess.run(["bash", "-c", line, "bash", *words], capture_output=True, text=True, check=True, cwd=folder)
        return done.stdout.split()

    return offered


def test_bash_completes(complete):
    assert complete("sam") == ["sample"]
    assert complete("") == [*cli.VERBS]
    assert complete("sample", "fash") == ["fashion-mnist"]
    assert complete("sample", "fashion-mnist", "--guid") == ["--guidance-scale"]
    assert complete("sample", "fashion-mnist", "--dtype", "bf") == ["bfloat16"]
    assert complete("train", "--preset", "abl") == ["ablation"]
    assert complete("train", "--config", "ru") == ["run.yaml"]
    assert complete("train", "--lr_scheduler_type", "cos") == ["cosine"]
    assert complete("convert", "latent_L") == ["latent_L_sota"]
    assert complete("completion", "") == ["bash", "zsh", "tcsh"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    said = capsys.readouterr().out
    for word in ("drifting-diffusers", "sample", "guidance-scale"):
        assert word in said
