"""Arguments of programs: a preset under a YAML file under flags, diffusers' spellings, and mistakes told in one line."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from drifting_diffusers.arguments import ALIASES, REFUSED, describe, parse_arguments
from drifting_diffusers.config import DriftingConfig, EncoderConfig
from drifting_diffusers.presets import ENCODER_PRESETS, PRESETS


@dataclass
class Data:
    """Data and networks."""

    dataset_name: str = field(default="none-given", metadata={"help": "where images are, 100% of them"})
    vae: str | None = field(default=None, metadata={"help": "the autoencoder"})
    cache: Path = field(default=Path("cache"), metadata={"help": "folder of latents"})
    resolution: int | None = field(default=None, metadata={"help": "side of the images"})
    flips: bool = field(default=True, metadata={"help": "mirror"})
    sizes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "sizes"})


@dataclass
class WithPreset:
    preset: str | None = None


def generator(*argv: str) -> DriftingConfig:
    return parse_arguments((DriftingConfig,), argv)[0]


def encoder(*argv: str) -> EncoderConfig:
    return parse_arguments((EncoderConfig,), argv)[0]


@pytest.fixture
def yaml(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


@pytest.fixture
def mistake(capsys, as_users_see_it):
    """What a program with these kinds and flags says on stderr before it ends."""

    def told(*argv: str, kinds: tuple = (Data, DriftingConfig)) -> str:
        with pytest.raises(SystemExit) as ended:
            parse_arguments(kinds, argv)
        assert ended.value.code == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    return told


# Where values come from


def test_flags_over_yaml_over_preset_over_defaults(yaml):
    file = yaml("output_dir: here\nlearning_rate: 0.01\nweight_decay: 0.5\n")
    config = generator("--preset", "latent-b", "--config", file, "--learning_rate", "0.02")
    preset = DriftingConfig.preset("latent-b")
    assert (config.learning_rate, config.weight_decay, config.output_dir) == (0.02, 0.5, "here")
    assert config.guidance_power == preset.guidance_power != DriftingConfig("unused").guidance_power
    assert config.bank_size == DriftingConfig("unused").bank_size


def test_without_a_preset_defaults_are_the_configs_own():
    assert generator("--output_dir", "x") == DriftingConfig("x")
    assert encoder("--output_dir", "x") == EncoderConfig("x")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_of_generators(name):
    assert generator("--preset", name) == DriftingConfig.preset(name)
    assert generator("--preset", name).output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", ENCODER_PRESETS)
def test_every_preset_of_encoders(name):
    assert encoder("--preset", name) == EncoderConfig.preset(name)


def test_a_preset_keeps_its_share_of_warm_up():
    assert generator("--preset", "ablation", "--max_steps", "3000") == DriftingConfig.preset("ablation", steps=3000)
    assert generator("--preset", "ablation", "--max_train_steps", "3000").warmup_steps == 500
    assert generator("--preset", "ablation", "--max_steps", "3000", "--lr_warmup_steps", "7").warmup_steps == 7
    assert encoder("--preset", "mae-latent-256", "--max_steps", "3000").warmup_steps == 500  # of a default warm-up as well


def test_the_preset_may_stand_in_the_yaml_and_a_flag_is_over_it(yaml):
    file = yaml("preset: ablation")
    assert generator("--config", file) == DriftingConfig.preset("ablation")
    assert generator("--config", file, "--preset", "latent-l") == DriftingConfig.preset("latent-l")


def test_the_presets_name_goes_into_a_field_of_that_name(yaml):
    kinds = (WithPreset, DriftingConfig)
    assert parse_arguments(kinds, ["--preset", "ablation"]) == (WithPreset("ablation"), DriftingConfig.preset("ablation"))
    assert parse_arguments(kinds, ["--config", yaml("preset: ablation")])[0].preset == "ablation"
    assert parse_arguments(kinds, ["--output_dir", "x"])[0].preset is None


def test_kinds_come_back_in_their_order():
    config, data = parse_arguments((DriftingConfig, Data), ["--output_dir", "x", "--dataset_name", "y"])
    assert (config.output_dir, data.dataset_name) == ("x", "y")
    assert parse_arguments((Data,), []) == (Data(),)


# Spellings

VALUES = {"lr_scheduler_type": "cosine", "project": "p", "image_column": "i", "label_column": "l", "dataset_name": "d", "vae": "v"}


@pytest.mark.parametrize("alias", [alias for alias in ALIASES if alias != "train_batch_size"])
@pytest.mark.parametrize("spelled", [lambda name, value: [name, value], lambda name, value: [f"{name}={value}"]], ids=["space", "equals"])
@pytest.mark.parametrize("hyphen", [False, True])
def test_every_alias_in_every_spelling(alias, spelled, hyphen, yaml):
    target = ALIASES[alias]
    value = VALUES.get(target, "6000")
    flag = "--" + (alias.replace("_", "-") if hyphen else alias)
    rest = ["--output_dir", "x"]
    kinds = (Data, DriftingConfig)
    expected = parse_arguments(kinds, [*rest, f"--{target}", value])
    assert expected != parse_arguments(kinds, rest)
    assert parse_arguments(kinds, [*rest, *spelled(flag, value)]) == expected
    assert parse_arguments(kinds, [*rest, "--config", yaml(f"{alias}: {value}")]) == expected


def test_fields_take_both_spellings_and_mixtures():
    expected = DriftingConfig("x", save_total_limit=5)
    for flag in ("--save_total_limit", "--save-total-limit", "--save-total_limit"):
        assert generator("--output_dir", "x", flag, "5") == generator("--output-dir=x", f"{flag}=5") == expected


def test_an_alias_over_its_target_in_the_file(yaml):
    assert generator("--config", yaml("output_dir: x\nsave_steps: 7"), "--checkpointing_steps", "9").save_steps == 9
    assert generator("--config", yaml("output_dir: x\ncheckpointing_steps: 7"), "--save_steps", "9").save_steps == 9


def test_a_field_is_not_taken_for_an_alias():
    @dataclass
    class Own:
        train_data_dir: str = "a"
        dataset_name: str = "b"

    assert parse_arguments((Own,), ["--train_data_dir", "c"]) == (Own("c", "b"),)


def test_batch_sizes(yaml):
    assert encoder("--output_dir", "x", "--train_batch_size", "64").batch_size == 64
    for argv in (["--train_batch_size", "640"], ["--config", yaml("train_batch_size: 640")]):
        assert generator("--output_dir", "x", *argv).labels_per_step == 10
    assert generator("--output_dir", "x", "--train_batch_size", "640", "--generated_per_label", "32").labels_per_step == 20
    assert generator("--preset", "fashion-mnist", "--train_batch_size", "160").labels_per_step == 10  # 16 per label
    file = yaml("output_dir: x\nlabels_per_step: 3")
    assert generator("--config", file, "--train_batch_size", "640").labels_per_step == 10


def test_batch_sizes_that_are_not_whole(mistake):
    assert "train_batch_size must be a multiple of generated_per_label, got 100 and 64" in mistake(
        "--output_dir", "x", "--train_batch_size", "100"
    )
    assert "got 0 and 64" in mistake("--output_dir", "x", "--train_batch_size", "0")


# Types


def test_types_of_a_yaml_file(yaml):
    data, config = parse_arguments(
        (Data, DriftingConfig),
        [
            "--config",
            yaml(
                "output_dir: x\nlearning_rate: 1e-3\nweight_decay: 0\nmixed_precision: no\nreport_to: tensorboard\nmax_steps: 7_000\n"
                "more_ema_decays: [0.5, 1e-1]\nrun_name: null\nhub_model_id: none\nrandom_flip: true\nallow_tf32: yes\n"
                "flips: false\nsizes: 3\ncache: /tmp/x\nresolution: 64\n"
            ),
        ],
    )
    assert config == DriftingConfig(
        "x",
        learning_rate=1e-3,
        weight_decay=0.0,
        mixed_precision="no",
        report_to=["tensorboard"],
        max_steps=7000,
        more_ema_decays=[0.5, 0.1],
        random_flip=True,
        allow_tf32=True,
    )
    assert data == Data(flips=False, sizes=[3], cache=Path("/tmp/x"), resolution=64)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate: true", "learning_rate must be float, got bool True"),
        ("max_steps: 1e4", "max_steps must be int, got str '1e4': write digits alone, without quotes, as in 1000"),
        ("max_steps: 2.5", "max_steps must be int, got float 2.5"),
        ("random_flip: 'true'", "random_flip must be bool, got str 'true': write true or false, without quotes"),
        ("run_name: 2024", "run_name must be str, got int 2024: put it in quotes"),
        ("lr_scheduler: linear", "lr_scheduler must be one of ('constant', 'cosine'), got 'linear'"),
        ("more_ema_decays: [0.9, x]", "more_ema_decays must be a number, got 'x'"),
        ("report_to: [none, wandb]", "report_to must be names or none, got none wandb"),
        ("max_step: 3", "there is no max_step; did you mean max_steps?"),
        ("max-steps: 3", "there is no max-steps; did you mean max_steps?"),
        ("3: 3", "there is no 3"),
        ("hub_token: abc", "there is no hub_token: it would be written down beside the run"),
        ("max_steps: 3\nmax_train_steps: 4", "max_steps and max_train_steps are the same choice"),
        ("max_steps: 3\nmax_steps: 4", "max_steps stands twice in the file"),
        ("- max_steps", "must hold `option: value` lines, got a list"),
        ("max_steps: [", "while parsing"),
        ("learning_rate: 0.0", "learning_rate must be at least 1e-6"),
        ("learning_rate: .nan", "learning_rate must be finite"),
    ],
)
def test_mistakes_in_a_yaml_file(mistake, yaml, line, words):
    assert words in mistake("--output_dir", "x", "--config", yaml(line))


def test_an_empty_yaml_file_says_nothing(yaml):
    assert generator("--output_dir", "x", "--config", yaml("# nothing\n")) == DriftingConfig("x")


def test_switches_have_opposites_and_values():
    assert generator("--preset", "ablation").random_flip
    for argv in (["--no_random_flip"], ["--no-random-flip"], ["--random_flip", "false"], ["--random_flip=False"]):
        assert not generator("--preset", "ablation", *argv).random_flip
    assert generator("--output_dir", "x", "--random_flip").random_flip
    assert not parse_arguments((Data,), ["--no_flips"])[0].flips


def test_lists_and_none():
    assert generator("--preset", "latent-b", "--more_ema_decays").more_ema_decays == []
    assert generator("--preset", "latent-b", "--more_ema_decays", "0.5", "0.25").more_ema_decays == [0.5, 0.25]
    assert generator("--output_dir", "x", "--report_to", "tensorboard", "wandb").report_to == ["tensorboard", "wandb"]
    assert generator("--output_dir", "x", "--report_to", "tensorboard").report_to == ["tensorboard"]
    assert generator("--output_dir", "x", "--report_to", "all").report_to == ["all"]


def test_none_takes_a_value_of_the_file_back(yaml):
    file = yaml("output_dir: x\nreport_to: [wandb]\nrun_name: a\nresolution: 3\n")
    data, config = parse_arguments(
        (Data, DriftingConfig), ["--config", file, "--report_to", "none", "--run_name", "None", "--resolution=none"]
    )
    assert (config.report_to, config.run_name, data.resolution) == ([], None, None)


# Mistakes


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_do_not_exist_on_purpose_say_why(mistake, name):
    for flag in (f"--{name}", f"--{name.replace('_', '-')}=3"):
        assert f"there is no --{name}: {REFUSED[name]}" in mistake("--output_dir", "x", flag)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lerning_rate", "3"], "there is no --lerning_rate; did you mean --learning_rate?"),
        (["--max_train_step=3"], "there is no --max_train_step; did you mean --max_train_steps?"),
        (["--max"], "there is no --max"),  # no abbreviations: a new option would change what they mean
        (["stray"], "'stray' belongs to no option"),
        (["-x"], "'-x' belongs to no option"),
        (["--max_steps", "2.5"], "invalid int value: '2.5'"),
        (["--max_steps"], "expected one argument"),
        (["--lr_scheduler", "linear"], "invalid choice: 'linear'"),
        (["--resolution", "big"], "invalid int value: 'big'"),
        (["--random_flip", "maybe"], "maybe"),
        (["--max_steps", "3", "--max-train-steps", "4"], "max_steps and max_train_steps are the same choice, and both stand on the command line"),
        (["--labels_per_step", "3", "--train_batch_size", "64"], "labels_per_step and train_batch_size are the same choice"),
        (["--report_to", "none", "wandb"], "report_to must be names or none, got none wandb"),
        (["--preset", "abaltion"], "preset must be one of ablation, latent-b"),
        (["--preset", "ablation", "--max_steps", "0"], "max_steps must be at least 1, got 0"),
        (["--warmup_steps", "31000"], "warmup_steps must be at most max_steps"),
        (["--config", "no/such.yaml"], "no/such.yaml"),
    ],
)  # fmt: skip
def test_mistakes_in_flags(mistake, argv, words):
    assert words in mistake("--output_dir", "x", *argv)


def test_a_missing_value_is_named_with_its_meaning(mistake):
    assert "--output_dir is missing: folder of the run" in mistake("--max_steps", "3")


def test_presets_exist_where_a_config_has_them(mistake):
    assert "there is no --preset" in mistake("--preset", "ablation", kinds=(Data,))


def test_kinds_that_cannot_be_parsed_together():
    @dataclass
    class Seed:
        seed: int = 0

    with pytest.raises(ValueError, match=r"^'seed' belongs to Seed and to DriftingConfig"):
        parse_arguments((Seed, DriftingConfig), [])
    with pytest.raises(ValueError, match=r"^at most one kind may be a RunConfig, got \['EncoderConfig', 'DriftingConfig'\]"):
        parse_arguments((EncoderConfig, DriftingConfig), [])


# Help


@pytest.mark.parametrize("columns", [80, 120])
def test_help(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        parse_arguments((Data, DriftingConfig), ["--help"], description="Train something.", epilog="The last words.")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert text.splitlines()[2] == "Train something."
    assert text.rstrip().endswith("The last words.")
    titles = [
        "where values come from:",
        "Data and networks:",
        "What every training run chooses:",
        "How a generator is trained:",
        "presets:",
    ]
    assert sorted(titles, key=text.index) == titles
    for name in (*Data.__dataclass_fields__, *DriftingConfig.__dataclass_fields__):
        assert text.count(f"\n  --{name} ") == 1, name
    assert all(f"--{alias}" in words for alias in ALIASES)
    assert all(name in text for name in PRESETS)
    assert "fid 1.54, inception_score 258.9 (arXiv 2602.04770, guidance 1.0; 128 TPU v6e)" in words
    assert "where images are, 100% of them (default: none-given)" in words
    assert "SUPPRESS" not in text
    assert max(map(len, text.splitlines())) <= columns


# What a run says of itself


def test_describe_names_the_preset_and_every_difference():
    config = generator("--preset", "ablation", "--max_steps", "3000", "--output_dir", "elsewhere")
    first, *changes = describe(config, "ablation").splitlines()
    assert first.startswith("preset ablation: ImageNet 256 latents; reported: fid 8.46 (arXiv 2602.04770")
    assert changes == ["  max_steps: 30000 -> 3000", "  warmup_steps: 5000 -> 500"]
    assert describe(generator("--preset", "ablation"), "ablation").splitlines()[1:] == ["  nothing is changed"]


def test_describe_without_a_preset_starts_from_the_defaults():
    assert describe(EncoderConfig("x", seed=3)) == "defaults of EncoderConfig\n  seed: 0 -> 3"
    assert describe(EncoderConfig("x")) == "defaults of EncoderConfig\n  nothing is changed"
