"""The comparison as a page: numbers into docs/results/fields.json, tables into the marked places of docs/fields.md, pictures into docs/images/."""

import datetime
import json
import re
import statistics
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from field_rows import rows

Results = Mapping[str, Mapping[str, dict[str, Any]]]
PLANE_NUMBERS = ("energy", "energy_real", "transport", "transport_real", "modes", "least_mode", "outside", "ms_per_step")
IMAGE_NUMBERS = ("energy", "energy_real", "accuracy", "classes", "least_class", "spread", "spread_real", "ms_per_step")


def write(results: Results, args: Any, machine: str) -> None:
    from fields import temperatures

    found = {"how": how(args, machine), "temperatures": temperatures(args.output_dir), **summary(results)}
    (args.docs / "results/fields.json").write_text(json.dumps(found, indent=1) + "\n")
    page = args.docs / "fields.md"
    page.write_text(with_tables(page.read_text(), tables(found)))
    for name, figure in pictures(results, args.targets).items():
        figure.savefig(args.docs / "images" / f"fields_{name}.png", dpi=75 if name == "images" else 110)
    print(f"wrote {page}, {args.docs / 'results/fields.json'} and pictures")


def how(args: Any, machine: str) -> dict[str, Any]:
    return {
        "command": "python benchmarks/fields.py tune planes images claims cost && python benchmarks/fields.py page",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seeds": args.seeds,
        "steps": args.steps,
        "image_steps": args.image_steps,
        "versions": {name: version(name) for name in ("drifting-diffusers", "torch")},
        "machine": f"{machine}, {args.jobs} trainings of one thread at a time",
    }


def over_seeds(entries: Iterable[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """Mean and sample standard deviation of each number, and how many there are."""
    entries = [entry for entry in entries if "error" not in entry]
    found: dict[str, Any] = {"runs": len(entries)}
    for name in names:
        values = [float(entry[name]) for entry in entries if name in entry]
        if values:
            found[name] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
    return found


def summary(results: Results) -> dict[str, Any]:
    """All numbers of all parts, without points and pixels."""
    grouped: dict[str, dict[str, Any]] = {"planes": {}, "images": {}, "claims": {}, "cost": {}}
    order = list(rows())
    place = lambda group: order.index(name) if (name := group.split("|")[0]) in order else len(order)
    for part, numbers in (("planes", PLANE_NUMBERS), ("images", IMAGE_NUMBERS)):
        for group, entries in sorted(_grouped(results.get(part, {})).items(), key=lambda item: place(item[0])):
            errors = [entry["error"] for entry in entries if "error" in entry]
            grouped[part][group] = {"field": entries[0]["field"]} | over_seeds(entries, numbers) | ({"error": errors[0]} if errors else {})
    for group, entries in _grouped(results.get("claims", {})).items():
        numbers = {key for entry in entries for key, value in entry.items() if isinstance(value, int | float)}
        grouped["claims"][group] = over_seeds(entries, sorted(numbers))
    for name, entry in results.get("cost", {}).items():
        grouped["cost"][name] = {key: entry[key] for key in ("field", "seconds", "megabytes", "error") if key in entry}
    return grouped


def _grouped(entries: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By key without the seed, which is its last part where there is one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key, entry in entries.items():
        name, _, last = key.rpartition("|")
        found.setdefault(name if last.isdigit() and not key.startswith(("annealing", "landmarks")) else key, []).append(entry)
    return found


# --- tables ------------------------------------------------------------------------------------------------------------------------------


def number(pair: Any) -> str:
    """Mean ± sd, or a dash."""
    if pair is None:
        return "-"
    mean, sd = pair
    value = f"{mean:,.0f}" if abs(mean) >= 100 else f"{mean:.3g}"
    return f"{value} ± {f'{sd:.0f}' if sd >= 10 else f'{sd:.1g}'}" if sd else value


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *lines])


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    planes, images, cost, claims = (found[name] for name in ("planes", "images", "cost", "claims"))
    names = list(dict.fromkeys(key.split("|")[0] for key in planes))
    targets = list(dict.fromkeys(key.split("|")[1] for key in planes))
    cell = lambda name, target, what: number(planes.get(f"{name}|{target}", {}).get(what))
    real = lambda what: [
        "*real*",
        *[number(next((v[what] for k, v in planes.items() if k.endswith(f"|{t}") and what in v), None)) for t in targets],
    ]
    warmth = lambda name: f"{found['temperatures'][name]:g}" if name in found["temperatures"] else ""
    return {
        "rows": table(["row", "field"], [[name, f"`{next(v['field'] for k, v in planes.items() if k.split('|')[0] == name)}`"] for name in names]),
        "energy": table(["energy distance", *targets, "temperature"], [[*[name, *[cell(name, t, "energy") for t in targets]], warmth(name)] for name in names] + [[*real("energy_real"), ""]]),
        "transport": table(["transport distance", *targets], [[name, *[cell(name, t, "transport") for t in targets]] for name in names] + [real("transport_real")]),
        "modes": table(["share of modes", *targets], [[name, *[cell(name, t, "modes") for t in targets]] for name in names]),
        "images": table(
            ["Fashion-MNIST", "energy", "accuracy", "classes of 10", "spread", "ms per step"],
            [[name, *[number(row.get(what)) for what in ("energy", "accuracy", "classes", "spread", "ms_per_step")]] for name, row in images.items()]
            + [["*real*", *[number(next(iter(images.values()), {}).get(what)) for what in ("energy_real", "")], "10", number(next(iter(images.values()), {}).get("spread_real")), ""]],
        ),
        "time": table(["ms per step", *targets], [[name, *[cell(name, t, "ms_per_step") for t in targets]] for name in names]),
        "cost": table(
            ["one call", "seconds", "MiB"],
            [[name, f"{row['seconds']:.1f}", f"{row['megabytes']:.0f}"] if "seconds" in row else [name, "-", "-"] for name, row in cost.items()],
        ),
        **claim_tables(claims, planes, targets),
    }  # fmt: skip


def claim_tables(claims: Mapping[str, Any], planes: Mapping[str, Any], targets: list[str]) -> dict[str, str]:
    get = lambda key, what: claims.get(key, {}).get(what)
    of = lambda word, at: (
        [key.split("|") for key in claims if key.startswith(f"{word}|")]
        and sorted({key.split("|")[at] for key in claims if key.startswith(f"{word}|")}, key=float)
    )
    steps = lambda kind, k: number(get(f"annealing|{kind}|{k}", "steps"))
    plain = lambda name, target: number(planes.get(f"{name}|{target}", {}).get("energy"))
    return {
        "annealing": table(["frequency K", *(frequencies := of("annealing", 2) or [])], [[f"{kind}", *[steps(kind, k) for k in frequencies]] for kind in ("fixed", "annealed")]),
        "lookahead": table(
            ["energy distance", *targets],
            [
                ["plain", *[plain("Algorithm 2", t) for t in targets]],
                ["lookahead, equal steps", *[plain("lookahead", t) for t in targets]],
                ["lookahead, equal time", *[number(get(f"equal time|{t}", "energy")) for t in targets]],
            ],
        ),
        "sharp": table(
            ["energy distance", *targets],
            [
                ["mean shift", *[plain("mean shift", t) for t in targets]],
                ["sharp, same temperature", *[number(get(f"sharp|{t}", "energy")) for t in targets]],
            ],
        ),
        "classes": table(
            ["no labels", "temperature", "classes of 10", "least share of a class", "energy"],
            [
                [name, t, *[number(get(f"classes|{name}|{t}", what)) for what in ("classes", "least_class", "energy")]]
                for t in of("classes", 2) or []
                for name in ("default", "Sinkhorn")
            ],
        ),
        "landmarks": table(
            ["real samples", "pairs, ms", "pairs again, ms", "landmarks, ms", "times faster"],
            [
                [n, *[f"{row[what][0]:.2f}" for what in ("pairs_ms", "pairs_again_ms", "landmarks_ms")], f"{row['pairs_ms'][0] / row['landmarks_ms'][0]:.1f}"]
                for n in of("landmarks", 1) or []
                if (row := claims[f"landmarks|{n}"]).get("pairs_ms")
            ],
        ),
    }  # fmt: skip


def with_tables(text: str, made: Mapping[str, str]) -> str:
    """The page with what stands between `<!-- table: NAME -->` and `<!-- end -->` replaced.

    Raises:
        LookupError: for a mark that names no table.
    """

    def fill(match: re.Match) -> str:
        if match[1] not in made:
            raise LookupError(f"the page asks for table {match[1]!r}; there are {', '.join(made)}")
        return f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.S)


# --- pictures ----------------------------------------------------------------------------------------------------------------------------


def pictures(results: Results, targets: list[str]) -> dict[str, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    made = {}
    order = list(rows())
    place = lambda entry: order.index(name) if (name := entry[0].split("|")[0]) in order else len(order)
    results = {part: dict(sorted(entries.items(), key=place)) for part, entries in results.items()}
    if results.get("planes"):
        made |= {"planes": planes_picture(results["planes"], targets), "curves": curves_picture(results["planes"], targets)}
    if results.get("images"):
        made["images"] = images_picture(results["images"])
    return made


def planes_picture(entries: Mapping[str, dict], targets: list[str], across: int = 11):
    """Seed 0 of every row: a column each, in bands, targets below each other."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(key.split("|")[0] for key in entries))
    bands = -(-len(names) // across)
    figure, panels = plt.subplots(
        bands * len(targets), across, figsize=(1.25 * across, 1.33 * bands * len(targets)), squeeze=False, layout="constrained"
    )
    for panel in panels.flat:
        panel.axis("off")
    for i, name in enumerate(names):
        for j, target in enumerate(targets):
            panel, entry = panels[i // across * len(targets) + j, i % across], entries.get(f"{name}|{target}|0", {})
            reach = 5.4 if target == "clusters" else 3.3
            panel.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
            if j == 0:
                panel.set_title(name.replace(", ", ",\n").replace(" ", "\n", 1) if len(name) > 12 else name, fontsize=8, color="0.2")
            if entry.get("points"):
                panel.scatter(*zip(*[(x / 1000, y / 1000) for x, y in entry["points"]], strict=True), s=1.2, color="#00798c", linewidths=0)
    return figure


def curves_picture(entries: Mapping[str, dict], targets: list[str]):
    """Energy distance over the steps, mean over seeds; a few rows in colours, the others in grey."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(key.split("|")[0] for key in entries))
    shown = ("released", "released, no floor", "mean shift", "score, annealed", "kernel gradient", "Sinkhorn", "Frechet", "lookahead")
    colours = {name: plt.get_cmap("tab10")(i) for i, name in enumerate(shown)}
    figure, panels = plt.subplots(1, len(targets), figsize=(3.3 * len(targets), 3.6), squeeze=False, layout="constrained")
    for panel, target in zip(panels[0], targets, strict=True):
        for name in names:
            curves = [e["curve"] for k, e in entries.items() if k.startswith(f"{name}|{target}|") and "curve" in e]
            if curves:
                steps = [point[0] for point in curves[0]]
                energy = [statistics.fmean(curve[i][2] for curve in curves) for i in range(len(steps))]
                panel.plot(
                    steps, energy, color=colours.get(name, "0.85"), lw=1.6 if name in shown else 0.8, zorder=2 + (name in shown), label=name
                )
        panel.set(xscale="log", yscale="log", title=target, xlabel="step")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("energy distance")
    lines = {label: line for line, label in zip(*panels[0, 0].get_legend_handles_labels(), strict=True) if label in shown}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    return figure


def images_picture(entries: Mapping[str, dict]):
    """Two samples of every class, seed 0, a row per field."""
    import matplotlib.pyplot as plt
    import numpy as np

    shown = {key.rpartition("|")[0]: entry["tiles"] for key, entry in entries.items() if entry.get("tiles")}
    figure, panels = plt.subplots(len(shown), 1, figsize=(9, 0.5 * len(shown)), squeeze=False)
    figure.subplots_adjust(left=0.17, right=0.995, top=0.995, bottom=0.005, hspace=0.08)
    for panel, (name, tiles) in zip(panels[:, 0], shown.items(), strict=True):
        side = round((len(tiles) * len(tiles[0]) // 40) ** 0.5)
        samples = np.array(tiles, dtype=np.uint8).reshape(10, 4, side, side)[:, :2].reshape(20, side, side)
        panel.imshow(np.concatenate(list(samples), axis=1), cmap="gray", vmin=0, vmax=255, aspect="auto")
        panel.axis("off")
        panel.text(-side / 4, side / 2, name, ha="right", va="center", fontsize=9)
    return figure


def stored(docs: Path) -> dict[str, Any]:
    return json.loads((docs / "results/fields.json").read_text())
