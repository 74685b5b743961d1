"""Fields by name: what is written is what is read, schedules are numbers at a step, and adding a field takes what the recipe says."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import drifting_diffusers
from drifting_diffusers import DriftingConfig, DriftingObjective, Pixels
from drifting_diffusers.couplings import row_softmax
from drifting_diffusers.fields import (
    FIELDS,
    Combined,
    DivergenceField,
    DriftingField,
    Friction,
    Lookahead,
    MeanShiftField,
    Memory,
    ScoreField,
    Situation,
    Symmetrised,
    algorithm_2,
    memories,
    read_field,
    situated,
    spell,
    temperature_set,
)
from drifting_diffusers.fields.names import SETTINGS
from drifting_diffusers.fields.situation import walk
from drifting_diffusers.kernels import Gaussian, Matern, Radial
from drifting_diffusers.schedules import Schedule, exponential, linear

EXAMPLES = {
    "drifting": "drifting(temperatures=(0.1, 0.2), affinity_floor=0.0, coupling=row_softmax)",
    "mean_shift": "mean_shift(temperatures=(0.2,), kernel=matern(nu=1.5), bias_corrected=True)",
    "score": "score(temperatures=(exponential(1.0, 0.05, steps=100),))",
    "sharp": "sharp(temperatures=(0.2,), kernel=rational_quadratic(alpha=2.0))",
    "kernel_gradient": "kernel_gradient(temperatures=(0.3,), normalise_force=False)",
    "divergence": "divergence(temperatures=(0.3,), weighting='mmd')",
    "sinkhorn": "sinkhorn(temperatures=(0.1, 0.2), iterations=5, own_term='masked')",
    "nystrom": "nystrom(temperatures=(0.2,), landmarks=3)",
    "frechet": "frechet(moments='average')",
    "lookahead": "lookahead(mean_shift(temperatures=(0.2,)), terms=2, weights=(0.5, 0.25, 0.25))",
    "friction": "friction(drifting, linear(0.1, 0.9))",
    "combined": "combined((mean_shift, sharp(temperatures=(0.1,))), weights=(1.0, 0.5))",
    "velocity_guidance": "velocity_guidance(sinkhorn(temperatures=(0.1,)))",
    "symmetrised": "symmetrised(mean_shift(temperatures=(0.2,)))",
}
"""A field of every name, not as it is by default."""


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_spelled_is_read_again(name):
    field = read_field(EXAMPLES[name])
    assert type(field) is FIELDS[name]
    assert read_field(spell(field)) == field
    assert spell(read_field(spell(field))) == spell(field)


@pytest.mark.parametrize("name", SETTINGS)
def test_published_settings_are_spelled_out(name):
    field = read_field(f"{name}(0.3)" if name == "algorithm_2" else name)
    assert read_field(spell(field)) == field
    assert name not in spell(field)


def test_names_stand_for_these_fields():
    assert read_field("drifting") == DriftingField()
    assert spell(DriftingField()) == "drifting"
    assert read_field(" mean_shift( temperatures = [0.2], kernel=gaussian ) ") == MeanShiftField((0.2,), kernel=Gaussian())
    assert read_field("algorithm_2(0.5)") == algorithm_2(0.5)
    assert spell(ScoreField((linear(1, 0.5, steps=7),))) == "score(temperatures=(linear(1, 0.5, steps=7),))"
    assert spell(Lookahead(DriftingField((0.1,)))) == "lookahead(drifting(temperatures=(0.1,)))"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("dreifing", "'dreifing' is not known; fields are drifting, mean_shift"),
        ("drifting(", r"a field is written as in mean_shift\(temperatures=\(0.2,\)\), got 'drifting\('"),
        ("gaussian", "'gaussian' is not a field; take one of drifting"),
        ("1", "'1' is not a field"),
        ("drifting(temp=1)", "drifting: got an unexpected keyword argument 'temp'; it takes temperatures"),
        ("drifting(temperatures=0.2)", r"drifting: temperatures must be a tuple of numbers, got 0.2; write \(0.2,\)"),
        ("lookahead", "lookahead: missing a required argument: 'field'"),
        ("__import__('os').system('true')", r"is no name, number, text or tuple"),
        ("drifting(**{})", "is no name, number, text or tuple"),
        ("[mean_shift for _ in 'ab']", "is no name, number, text or tuple"),
        ("row_softmax", "'row_softmax' is not a field"),
    ],
)
def test_what_is_no_field_is_refused_with_what_there_is(text, why, as_users_see_it):
    with pytest.raises(ValueError, match=why):
        read_field(text)


def test_a_field_without_a_name_is_told_how_to_get_one():
    @dataclasses.dataclass(frozen=True)
    class Mine(MeanShiftField):
        pass

    with pytest.raises(LookupError, match=r"has no name; give it one: drifting_diffusers.fields.FIELDS\[NAME\] = Mine"):
        spell(Mine())


def test_a_schedule_is_its_number_at_a_step():
    field = read_field("lookahead(combined((score(temperatures=(exponential(1.0, 0.01),)), mean_shift)), terms=1)")
    half = situated(field, Situation(50, 100))
    assert half.field.fields[0].temperatures == (pytest.approx(0.1),)
    assert situated(field, Situation()) == field  # no run, no moment
    assert situated(half, Situation(3, 100)) is half


@pytest.mark.parametrize("name", ["score", "friction", "lookahead", "combined"])
def test_an_unresolved_schedule_is_refused(name):
    text = {
        "lookahead": "lookahead(score(temperatures=(linear(1.0, 0.1),)))",
        "combined": "combined((score(temperatures=(linear(1.0, 0.1),)),))",
    }
    field = read_field(text.get(name, EXAMPLES[name]))
    x, y = torch.randn(2, 1, 6, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="changes over a run"):
        field(x, positives=y, negatives=x)
    assert torch.isfinite(situated(field, Situation(1, 10))(x, positives=y, negatives=x).velocity).all()


def test_a_temperature_set_is_the_field_with_that_set():
    x, y = torch.randn(2, 1, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    several = temperature_set(DriftingField((1.0,)), (0.1, 0.4))
    assert isinstance(several, Combined)
    torch.testing.assert_close(
        several(x, positives=y, negatives=x).velocity, DriftingField((0.1, 0.4))(x, positives=y, negatives=x).velocity, rtol=1e-12, atol=0
    )


# --- choices as they are kept ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (lambda: DriftingField([0.1, 0.2]), "drifting(temperatures=(0.1, 0.2))"),
        (lambda: ScoreField([exponential(1.0, 0.1)]), "score(temperatures=(exponential(1.0, 0.1),))"),
        (lambda: Lookahead(DriftingField(), weights=[0.5, 0.25]), "lookahead(drifting, weights=(0.5, 0.25))"),
        (lambda: Combined([DriftingField()], weights=[2.0]), "combined((drifting,), weights=(2.0,))"),
        (
            lambda: DivergenceField(weighting=["kl", "mmd"], mixture=[1.0, 2.0]),
            "divergence(weighting=('kl', 'mmd'), mixture=(1.0, 2.0))",
        ),
        (lambda: Symmetrised(DriftingField(), [[[1.0]], [[-1.0]]]), "symmetrised(drifting, group=(((1.0,),), ((-1.0,),)))"),
        (lambda: MeanShiftField(tuple(np.linspace(0.1, 0.2, 2))), "mean_shift(temperatures=(0.1, 0.2))"),
        (lambda: MeanShiftField((np.float32(0.5),)), "mean_shift(temperatures=(0.5,))"),
        (lambda: MeanShiftField((0.5,), kernel=Matern(np.float64(2.5))), "mean_shift(temperatures=(0.5,), kernel=matern(nu=2.5))"),
        (lambda: ScoreField((linear(np.float32(1.0), np.float64(0.5), np.int64(7)),)), "score(temperatures=(linear(1.0, 0.5, steps=7),))"),
        (lambda: Lookahead(DriftingField(), terms=np.int64(2), step=np.float64(0.5)), "lookahead(drifting, terms=2, step=0.5)"),
        (lambda: Friction(DriftingField(), np.float32(0.25)), "friction(drifting, friction=0.25)"),
        (lambda: ScoreField(form=np.str_("score")), "score(form='score')"),
    ],
)
def test_lists_and_numbers_of_other_libraries_are_kept_as_plain_values(given, meant, as_users_see_it):
    field = given()
    assert spell(field) == meant
    assert read_field(meant) == field
    assert hash(read_field(meant)) == hash(field)
    now = situated(field, Situation(5, 10))
    json.dumps(DriftingObjective(Pixels(), now).describe())
    x, y = torch.randn(2, 1, 6, 2, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(now(x, positives=y, negatives=x).velocity).all()


def test_a_number_of_another_library_is_written_as_a_number():
    assert spell((np.float64(0.2), np.int32(3), True)) == "(0.2, 3, True)"


def test_a_config_goes_on_with_a_list_or_array(tmp_path, as_users_see_it):
    assert (
        DriftingObjective(Pixels(), DriftingField([0.2])).settle_field("drifting(temperatures=(0.2,))") == "drifting(temperatures=(0.2,))"
    )
    config = DriftingConfig(str(tmp_path), field=MeanShiftField((np.float64(0.2),)))
    (tmp_path / "training_config.json").write_text(config.to_json())
    assert DriftingConfig.from_folder(tmp_path) == config


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "mean_shift(kernel='gaussian')",
            "mean_shift: kernel must be a kernel, one of laplace, gaussian, .* got 'gaussian'; .* without quotes",
        ),
        ("mean_shift(kernel=0.2)", "mean_shift: kernel must be a kernel, .* got 0.2"),
        ("nystrom(kernel=row_softmax)", "nystrom: kernel must be a kernel"),
        ("drifting(coupling='row_softmax')", "drifting: coupling must be a coupling, one of two_sided_softmax, .* without quotes"),
        ("drifting(coupling=gaussian)", "drifting: coupling must be a coupling"),
        ("drifting(coupling=mean_shift)", "drifting: coupling must be a coupling"),
        ("lookahead('drifting')", r"lookahead: field must be a field, .* got 'drifting'; .* without quotes"),
        ("friction('drifting')", "friction: field must be a field"),
        ("friction(0.2)", "friction: field must be a field, .* got 0.2"),
        ("symmetrised(gaussian)", "symmetrised: field must be a field"),
        ("velocity_guidance(row_softmax)", "velocity_guidance: field must be a field"),
        ("drifting(normalise_force='false')", "drifting: normalise_force must be True or False, got 'false'"),
        ("mean_shift(bias_corrected=1)", "mean_shift: bias_corrected must be True or False, got 1"),
        ("lookahead(drifting, rescale='no')", "lookahead: rescale must be True or False, got 'no'"),
        ("drifting(affinity_floor='0.1')", "drifting: affinity_floor must be a number, got '0.1'"),
        ("frechet(decay='a')", "frechet: decay must be a number, got 'a'"),
        ("divergence(ratio_bound=None)", "divergence: ratio_bound must be a number, got None"),
        ("lookahead(drifting, weights=0.5)", r"lookahead: weights must be a tuple of numbers, got 0.5; write \(0.5,\)"),
        ("combined((drifting,), weights=0.5)", r"combined: weights must be a tuple of numbers, got 0.5; write \(0.5,\)"),
        ("combined((drifting,), weights=('a',))", r"combined: weights must be finite and at least 0, .* got \('a',\)"),
        ("divergence(mixture=1.0)", r"divergence: mixture must be one finite factor for each of \('kl',\), got 1.0"),
        ("divergence(mixture=('a',))", r"divergence: mixture must be one finite factor for each of \('kl',\), got \('a',\)"),
        ("divergence(weighting=5)", "divergence: weighting must be one or several of kl, p/q, q/p, mmd, got 5"),
        ("nystrom(report=0)", "nystrom: report is kept by the field itself; it takes temperatures, .* least_mass$"),
        ("nystrom((0.2,), place=3)", "nystrom: place is kept by the field itself"),
        ("frechet(memory=0, feature='x')", "frechet: memory, feature is kept by the field itself"),
        ("drifting(coupling=unnormalised(0.5))", "unnormalised: a coupling is .* write unnormalised without parentheses"),
        ("unnormalised(0.5)", "unnormalised: a coupling is .* write unnormalised without parentheses"),
        ("mean_shift(temperatures=(1" + 400 * "0" + ",))", "mean_shift: int too large"),
    ],
)
def test_a_choice_of_a_wrong_kind_is_refused_before_a_run(text, why, as_users_see_it):
    with pytest.raises(ValueError, match=why):
        read_field(text)


@pytest.mark.parametrize(
    "text",
    [
        90_000 * "-" + "1",
        40_000 * "a." + "b",
        40_000 * "1+" + "1",
        "\ud800",
        "drifting\0",
        "drifting(" + 200_000 * " " + ")",
        300 * "friction(" + "drifting" + 300 * ")",
        "combined((" + 1000 * "drifting, " + "'x'))",
    ],
    ids=["minus", "dots", "sum", "half a pair", "NUL", "long", "deep", "wide"],
)
def test_texts_that_break_readers_are_refused_in_few_words(text, as_users_see_it):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the words differ
        read_field(text)
    assert not isinstance(caught.value, UnicodeError)
    assert len(str(caught.value)) < 1000


def test_a_field_is_read_from_a_text(as_users_see_it):
    with pytest.raises(TypeError, match=r"a field is named by a text such as .* got 3"):
        read_field(3)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class OwnKernel(Radial):
    """The Gaussian by another name."""

    def log_value(self, distance, temperature):
        return Gaussian().log_value(distance, temperature)

    def log_pull(self, distance, temperature):
        return Gaussian().log_pull(distance, temperature)

    def log_sharp(self, distance, temperature):
        return Gaussian().log_sharp(distance, temperature)


def test_kernels_couplings_and_fields_of_ones_own_are_taken():
    x, y = torch.randn(2, 1, 6, 2, generator=torch.Generator().manual_seed(0))
    coupling = lambda logits, weights=None, *, floor=0.0, columns=None: row_softmax(logits, weights, floor=floor, columns=columns)
    for own, known in (
        (MeanShiftField(kernel=OwnKernel()), MeanShiftField(kernel=Gaussian())),
        (DriftingField(coupling=coupling), DriftingField(coupling=row_softmax)),
        (Friction(lambda x, **given: DriftingField()(x, **given), 0.5), Friction(DriftingField(), 0.5)),
    ):
        assert torch.equal(own(x, positives=y, negatives=x).velocity, known(x, positives=y, negatives=x).velocity)
    with pytest.raises(TypeError, match="kernel must be a kernel"):
        MeanShiftField(kernel=OwnKernel)  # type: ignore[arg-type]


def test_a_walk_meets_everything_within_a_field():
    field = read_field(
        "friction(combined((frechet(moments='average'), score(temperatures=(linear(1.0, 0.5),)))), exponential(0.5, 0.1, 9))"
    )
    met = list(walk(field))
    assert met[0] is field
    assert [one.start for one in met if isinstance(one, Schedule)] == [1.0, 0.5]
    assert [type(one).__name__ for one in met if isinstance(one, Memory)] == ["Moments"]
    assert [type(one).__name__ for one in met if hasattr(one, "force")] == ["FrechetField", "ScoreField"]
    assert list(memories(field)) == [field.field.fields[0].memory]


# --- configs and objectives --------------------------------------------------------------------------------------------------------------


def test_a_config_says_its_field_in_one_way(tmp_path, as_users_see_it):
    config = DriftingConfig(str(tmp_path), field="  mean_shift( temperatures=[0.2,] )")
    assert config.field == "mean_shift(temperatures=(0.2,))"
    assert DriftingConfig(str(tmp_path), field=MeanShiftField((0.2,))).field == config.field  # type: ignore[arg-type]
    (tmp_path / "training_config.json").write_text(config.to_json())
    assert DriftingConfig.from_folder(tmp_path) == config
    with pytest.raises(ValueError, match="'nonsense' is not known"):
        DriftingConfig(str(tmp_path), field="nonsense")


def test_the_help_names_every_field():
    text = DriftingConfig.__dataclass_fields__["field"].metadata["help"]
    assert [name for name in FIELDS if not re.search(rf"\b{name}\b", text)] == []


def test_objective_and_config_agree_on_a_field():
    free, bound = DriftingObjective(Pixels()), DriftingObjective(Pixels(), "sharp")
    assert free.settle_field(None) == "drifting"
    assert free.settle_field("sharp") == "sharp"
    assert free.field == read_field("sharp")
    assert free.settle_field("mean_shift") == "mean_shift"  # of another run
    assert bound.settle_field(None) == bound.settle_field("sharp") == "sharp"
    with pytest.raises(ValueError, match=r"objective's field is SharpField.*, and the config's mean_shift; leave one of them out"):
        bound.settle_field("mean_shift")
    own = DriftingObjective(Pixels(), lambda x, **_: None)  # type: ignore[arg-type]
    assert own.settle_field(None) is None


def test_a_memory_is_found_wherever_the_field_is():
    plain, remembering = read_field("lookahead(drifting)"), read_field("friction(combined((drifting, frechet(moments='average'))))")
    assert len(list(memories(plain))) == 0
    assert len(list(memories(remembering))) == 1


def test_a_memory_of_moved_samples_is_refused():
    with pytest.raises(ValueError, match="FrechetField remembers the samples it is called with"):
        read_field("lookahead(frechet(moments='queue'))")
    read_field("lookahead(nystrom(sums='dataset'))")  # of real samples, which do not move


def test_memories_are_no_part_of_what_a_run_is():
    described = json.dumps(DriftingObjective(Pixels(), "frechet(moments='average')").describe())
    assert "moments" in described
    assert "memory" not in described


# --- the recipe --------------------------------------------------------------------------------------------------------------------------

NEW_FIELD = '''r"""A field for a test of the recipe: everything is pulled to the mean of the positives."""

from dataclasses import dataclass

from .frame import FramedField


@dataclass(frozen=True)
class CentreField(FramedField):
    strength: float = 1.0

    def force(self, problems, temperature):
        return self.strength * (problems.positives.mean(dim=1, keepdim=True) - problems.x)
'''

TRY = """
import torch
from drifting_diffusers import DriftingConfig
from drifting_diffusers.fields import CentreField, read_field, spell
x, y = torch.randn(2, 1, 6, 2)
field = read_field("lookahead(centre(strength=2.0, temperatures=(1.0,)))")
assert field.field == CentreField((1.0,), strength=2.0)
assert DriftingConfig("run", field="centre").field == "centre" == spell(CentreField())
assert torch.isfinite(field(x, positives=y, negatives=x).velocity).all()
import sys; sys.path.insert(0, sys.argv[1])
import field_rows
assert field_rows.rows()["centre"].field(None) == "centre"
print("done")
"""


def test_the_recipe_of_contributing_adds_a_field(tmp_path):
    """One file, one line of export, one row: literally, in a copy of the package; its row in the comparison comes by itself."""
    root = Path(drifting_diffusers.__file__).parent
    recipe = re.search(r"## Add a field\n(.*?)\n## ", (root.parents[1] / "CONTRIBUTING.md").read_text(), re.S)
    assert recipe is not None
    for word in ("`fields/NAME.py`", "`fields/__init__.py`", "`fields/names.py`", "benchmarks/fields.py"):
        assert word in recipe[1]
    copy = tmp_path / "drifting_diffusers"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "fields/centre.py").write_text(NEW_FIELD)
    exports = (copy / "fields/__init__.py").read_text()
    (copy / "fields/__init__.py").write_text(exports.replace("from .combined", "from .centre import CentreField\nfrom .combined", 1))
    names = (copy / "fields/names.py").read_text()
    names = names.replace("from .combined", "from .centre import CentreField\nfrom .combined", 1)
    (copy / "fields/names.py").write_text(
        names.replace('    "drifting": DriftingField,\n', '    "drifting": DriftingField,\n    "centre": CentreField,\n', 1)
    )
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(root.parents[1] / "benchmarks")],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "done", done.stderr
