"""The numbers of docs/results/performance/ as tables in the marked places of docs/performance.md: python benchmarks/performance_page.py

What was not measured stands there too, with the command that would.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
COMMANDS = {
    "field": "OMP_NUM_THREADS=1 python benchmarks/field.py --peers FOLDER --json docs/results/performance/field.json",
    "train_step": "OMP_NUM_THREADS=1 python benchmarks/train_step.py --json docs/results/performance/train_step.json",
    "inference": "OMP_NUM_THREADS=1 python benchmarks/inference.py --json docs/results/performance/inference.json",
    "input": "OMP_NUM_THREADS=1 python benchmarks/input.py --json docs/results/performance/input.json",
    "gpu": "make gpu-check",
}


@dataclass(frozen=True)
class Goal:
    """What was promised, and so has a line whether it was measured or not.

    Attributes:
        row: what is measured.
        goal: the number, at most or at least.
        better: "lower" or "higher".
        unit: of the number.
        found: a pattern in the names of the measured rows that it is, as "step | part | row"; its own name if not given.
    """

    row: str
    goal: float
    better: str
    unit: str
    found: str = ""


SHAPES = {
    "64, 64/64/16, 256": (3.0, 6, 1.9, 0.25),
    "4096, 64/64/16, 64": (5.5, 3.2, 2.0, 0.22),
    "1, 1024/1024/0, 1024": (1.5, 2, 1.35, 0.33),
    "1, 8192/8192/0, 128": (5, 4, 2.4, 0.10),
    "256, 64/64/32, 1280": (4.3, 8, 0.95, 0.34),
}
BESIDE = (("plain path / ours", "higher"), ("drift-models 0.1.1 / ours", "higher"), ("ours / its matmuls alone", "lower"))
PROMISED: dict[str, list[Goal]] = {
    "field": [
        *(
            Goal(f"[{shape}]: {what}", goal, better, "times")
            for shape, goals in SHAPES.items()
            for (what, better), goal in zip((*BESIDE, ("extra memory, ours / plain", "lower")), goals, strict=True)
        ),
        Goal("[64, 64/64/16, 256]: CPU time / the reference compiled by XLA", 0.6, "lower", "times"),
        Goal("[1, 1024/1024/0, 1024]: CPU time / the reference compiled by XLA", 0.6, "lower", "times"),
    ],
    "train_step": [
        Goal("frozen encoder, forward and backward / trainable", 0.70, "lower", "times", "encoder frozen"),
        Goal("field, share of a step of the CIFAR-10 preset", 0.10, "lower", "share", "cifar10: field, share"),
    ],
    "inference": [
        Goal("our call / diffusers' DiT of equal width, depth and tokens", 1.0, "lower", "times", "equal tokens"),
        Goal("pipeline beyond generator and decoder", 0.03, "lower", "share", "beyond generator"),
        Goal("B/2 call in float32, batch 1: CPU time beside the reference compiled by XLA", 0.62, "lower", "s", "batch 1: our call( |$)"),
        Goal("B/2 call in float32, batch 4: CPU time beside the reference compiled by XLA", 2.33, "lower", "s", "batch 4: our call( |$)"),
    ],
    "input": [
        Goal("latents: rows per second and core, LatentCache / one .pt file per image", 20, "higher", "times", "LatentCache / one .pt"),
        Goal("latents: rows per second and core, LatentCache / Array3D column", 10, "higher", "times", "LatentCache / Array3D"),
        Goal("resuming at a late step / at the first", 1.1, "lower", "times", "resuming"),
    ],
    "gpu": [
        Goal("field: time / that of reading its features twice", 2.0, "lower", "times", r"field \|.*floor"),
        Goal("field, share of a training step", 0.05, "lower", "share", r"field, share of a step"),
        Goal("a step of the ablation preset on one H200", 2.8, "lower", "s", r"ablation: a whole step"),
        Goal("a step of SOTA-B on one H200", 20, "lower", "s", r"latent-b: a whole step"),
        Goal("B/2, batch 1: eager / CUDA graphs", 3.0, "higher", "times", r"B/2, batch 1: eager / CUDA graphs"),
        Goal("B/2 with the VAE of Stable Diffusion", 500, "higher", "images/s", r"images per second"),
    ],
}  # fmt: skip


def stored(docs: Path) -> dict[str, Any]:
    """What was measured, by part; None where nothing was."""
    files = {part: docs / f"results/performance/{part}.json" for part in COMMANDS}
    return {part: json.loads(file.read_text()) if file.exists() else None for part, file in files.items()}


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """What stands in the marked places."""
    return {"goals": overview(found)} | {part: section(part, found[part]) for part in COMMANDS}


def overview(found: Mapping[str, Any]) -> str:
    """How many goals were reached, part by part."""
    titles = {"field": "The field", "train_step": "The training step", "inference": "Inference", "input": "Input", "gpu": "On a GPU"}
    lines = []
    for part, title in titles.items():
        rows = [row for row in promised_rows(part, found[part]) if row["goal"] is not None]
        verdicts = [verdict(row) for row in rows]
        lines.append(
            [
                f"[{title}](#{title.lower().replace(' ', '-')})",
                *[str(verdicts.count(each)) for each in ("hit", "**missed**", "not measured")],
            ]
        )
    return table(["", "hit", "missed", "not measured"], lines)


def section(part: str, found: Mapping[str, Any] | None) -> str:
    """All rows with goals, where they come from, and what else was measured."""
    rows = promised_rows(part, found)
    pieces = [table(["", "goal", "measured", "", "noise"], [cells(row) for row in rows if row["goal"] is not None])]
    pieces += notes(rows)
    if found is None:
        why = "no GPU was at hand" if part == "gpu" else "nothing was run"
        return "\n\n".join([*pieces, f"Not measured: {why}. `{COMMANDS[part]}` fills this table."])
    where = [found["date"], found["machine"], *[f"{found[key]}" for key in ("gpu",) if found.get(key)], f"torch {found['torch']}"]
    where += [f"{key} {found[key]}" for key in ("triton", "driver", "commit") if found.get(key)]
    pieces.append(f"`{found['command']}`; {', '.join(where)}.")
    pieces += [
        f"**{step['name']}: {step['state']}** after {step['seconds']:.0f} s."
        for step in found.get("steps", [])
        if step["state"] != "passed"
    ]
    rest = [row for row in rows if row["goal"] is None]
    more = [
        *([table(["", "measured", "noise"], [[*cells(row)[:1], cells(row)[2], cells(row)[4]] for row in rest])] if rest else []),
        *found.get("tables", []),
    ]
    if more:
        pieces += ['<details markdown="1"><summary>All that was measured</summary>', *more, "</details>"]
    return "\n\n".join(pieces)


def promised_rows(part: str, found: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What was measured, in one form, then what was promised and was not."""
    rows = uniform(found) if found else []
    names = [" | ".join(str(row.get(key, "")) for key in ("step", "part", "row")) for row in rows if row["goal"] is not None]
    for goal in PROMISED[part]:
        if not any(re.search(goal.found or re.escape(goal.row), name) for name in names):
            rows.append(
                {"row": goal.row, "goal": goal.goal, "better": goal.better, "unit": goal.unit, "value": None, "noise": None, "note": ""}
            )
    return rows


def uniform(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a benchmark in one form; those of a training step are gathered from its tables."""
    rows = found.get("rows", [])
    if "step" in found and not all("value" in row for row in rows):
        rows = of_training(found)
    return [{"goal": None, "better": "lower", "noise": None, "note": "", "unit": ""} | row for row in rows]


def of_training(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What benchmarks/train_step.py tells: savings alone, a step taken apart, whole steps, and steps in several passes."""
    step, named = found["step"], re.search(r"--preset[ =](\S+)", found["command"])
    preset, cuda = named[1] if named else "cifar10", "--device cuda" in found["command"]
    megabytes = lambda row, *names: ", ".join(f"{row[f'megabytes_{name}']:.0f} MB {name}" for name in names)
    rows = [
        {
            "part": "savings",
            "row": f"{row['saving']}: time with / without",
            "unit": "times",
            "value": row["time_ratio"],
            "goal": 0.7 if row["saving"].startswith("encoder frozen") else None,
            "noise": abs(row["noise"] - 1),
            "note": megabytes(row, "with", "without"),
        }
        for row in found["savings"]
    ]
    whole, again = step["whole_steps"]["seconds"], step["whole_steps_again"]["seconds"]
    noise, goals = abs(again / whole - 1), {"field": 0.05} if cuda else {"field": 0.1} if preset == "cifar10" else {}
    rows += [
        {
            "part": "step",
            "row": f"{preset}: {row['part']}, share of a step",
            "unit": "share",
            "value": row["share"],
            "goal": goals.get(row["part"]),
            "noise": noise,
        }
        for row in step["parts"]
    ]
    scaled = f", extrapolated from a step with 1 / {step['scale']:.3g} of its labels" if step["scale"] > 1 else ""
    goal = {"ablation": 2.8, "latent-b": 20.0}.get(preset) if cuda else None
    rows.append(
        {
            "part": "step",
            "row": f"{preset}: a whole step{scaled}",
            "unit": "s",
            "value": whole * step["scale"],
            "goal": goal,
            "noise": noise,
        }
    )
    rows += [
        {
            "part": "passes",
            "row": f"{preset}: {row['labels_per_microbatch']} labels at once: time / all at once",
            "unit": "times",
            "value": row["time_ratio"],
        }
        for row in found["passes"]
        if row["labels_per_microbatch"]
    ]
    return [row for row in rows if row.get("goal") is not None] if found.get("tables") else rows  # the rest stands in the tables


def verdict(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "not measured"
    reached = row["value"] >= row["goal"] if row["better"] == "higher" else row["value"] <= row["goal"]
    return "hit" if reached else "**missed**"


def cells(row: Mapping[str, Any]) -> list[str]:
    """Of a line: what, the goal, what was measured, whether it was reached, the noise."""
    said = "" if row["goal"] is None else f"{'at least' if row['better'] == 'higher' else 'at most'} {number(row['goal'], row['unit'])}"
    value = "" if row["value"] is None else number(row["value"], row["unit"])
    value += f", {row['memory']:,.0f} MB" if row.get("memory") else ""
    noise = row["noise"] if isinstance(row["noise"], str) else "" if row["noise"] is None else f"{row['noise']:.1%}"
    return [row["row"].replace("|", "&#124;"), said, value, "" if row["goal"] is None else verdict(row), noise]


def number(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.3g} %"
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{digits} x" if unit in ("times", "x") else f"{digits} {unit}".rstrip()


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must be said of the rows with goals, each once."""
    said = list(dict.fromkeys(row["note"] for row in rows if row["goal"] is not None and row["note"]))
    of = lambda note: ", ".join(row["row"] for row in rows if row["goal"] is not None and row["note"] == note)
    return ["\n".join(f"- {of(note)}: {note}." for note in said)] if said else []


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---", *["---:"] * (len(head) - 1)], *lines])


def with_tables(text: str, made: Mapping[str, str]) -> str:
    """The page with what stands between `<!-- table: NAME -->` and `<!-- end -->` replaced.

    Raises:
        LookupError: for a mark that names no table.
    """

    def fill(match: re.Match) -> str:
        if match[1] not in made:
            raise LookupError(f"the page asks for table {match[1]!r}; there are {', '.join(made)}")
        return f"<!-- table: {match[1]} -->\n\n{made[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of the page and its results")
    docs = parser.parse_args(words).docs
    page = docs / "performance.md"
    page.write_text(with_tables(page.read_text(), tables(stored(docs))))
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
