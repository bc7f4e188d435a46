"""Tables of what experiments/run.sh has run: `python experiments/tables.py [PREFIX ...]`.

A row for each name: means over its seeds, and the Fréchet distances one by one. In place of a
PREFIX `worth` and `price` draw assets/worth.png and price.png, and print their tables. run.sh calls
`tables.py keep NAME-sSEED`: the scores of that run go to experiments/results.csv.
"""
import csv
import re
import sys
from pathlib import Path
from statistics import mean

import filelock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import runtime

FOLDER = ROOT / "out" / "experiments"
RESULTS = ROOT / "experiments" / "results.csv"
COLUMNS = ["run", "seed", "step", "w", "fd", "accuracy", "precision", "recall"]
LINES = {  # of the figure of prices: runs, and what a step costs in plain ones (bench.py)
    "plain": ("curve-plain", 1), "MG 1.25": ("steps-w1.25", 1.59), "MG 1.5": ("steps-w1.5", 1.59),
    "MG 1.25 online, a quarter": ("steps-quarter1.25", 1.13),
    "MG 1.5 online, a quarter": ("steps-quarter1.5", 1.13)}
COLOURS = {  # by the label up to its comma
    "plain": "gray", "plain + CFG": "tab:blue", "MG": "tab:orange", "MG 1.25": "tab:orange",
    "MG 1.5": "tab:red", "MG 1.25 online": "tab:green", "MG 1.5 online": "tab:olive"}


def read():
    """The rows of results.csv, dicts of strings."""
    with RESULTS.open() as f:
        return list(csv.DictReader(f))


def keep(name):
    """Takes the scores of a run, or of a sample set, whose step is 0, into results.csv."""
    run, seed = re.fullmatch(r"(.*)-s(\d+)", name).groups()
    table = FOLDER / f"{name}.md"
    if table.exists():  # fid.py's
        lines = [line.split("|")[1:-1] for line in table.read_text().splitlines()]
        row = {key.strip().lower(): cell.strip() for key, cell in zip(lines[0], lines[2])}
        found = [row | {"step": "0"}]
    else:
        with (FOLDER / name / "log.csv").open() as f:
            found = [row for row in csv.DictReader(f) if row.get("accuracy")]
    found = [{key: row.get(key, "") for key in COLUMNS} | {"run": run, "seed": seed}
             for row in found]
    with filelock.FileLock(FOLDER / "results.lock"):
        others = [row for row in read() if (row["run"], row["seed"]) != (run, seed)]
        rows = sorted(others + found, key=lambda row: (row["run"], row["seed"], int(row["step"])))
        lines = [",".join(row[key] for key in COLUMNS) + "\n" for row in rows]
        with runtime.atomic(RESULTS) as f:
            f.write("".join([",".join(COLUMNS) + "\n", *lines]).encode())


def scores():
    """{name: {seed: {step: row of scores}}} of all runs, and of sample sets, whose step is 0."""
    found = {}
    for row in read():
        seeds = found.setdefault(row["run"], {})
        seeds.setdefault(int(row["seed"]), {})[int(row["step"])] = row
    return found


def main(prefixes):
    print("| run | step | FD | by seed | accuracy | recall |\n|---|---|---|---|---|---|")
    for name, seeds in sorted(scores().items()):
        if prefixes and not name.startswith(prefixes):
            continue
        for step in sorted({step for rows in seeds.values() for step in rows}):
            rows = [seeds[seed][step] for seed in sorted(seeds) if step in seeds[seed]]
            if len(rows) < len(seeds):
                continue
            distances, accuracies, recalls = ([float(row[key]) for row in rows]
                                         for key in ("fd", "accuracy", "recall"))
            each = " ".join(f"{value:.1f}" for value in distances)
            print(f"| {name} | {step or ''} | {mean(distances):.1f} | {each} | "
                  f"{mean(accuracies):.3f} | {mean(recalls):.2f} |")


def worth():
    """Two figures: what MG is worth beside CFG, by scale and by passes; and their tables."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.4), layout="tight")
    quality(figure.add_subplot(1, 2, 1), "SiT", "preset")
    passes(figure.add_subplot(1, 2, 2), "SiT, Euler-Maruyama", "preset", "euler-maruyama")
    figure.savefig(ROOT / "assets" / "worth.png", dpi=110)
    figure = Figure(figsize=(9, 6.4), layout="tight")
    quality(figure.add_subplot(2, 2, 1), "DiT", "dit-preset")
    passes(figure.add_subplot(2, 2, 2), "DiT, DDPM", "dit-preset", "ddpm")
    passes(figure.add_subplot(2, 2, 3), "SiT, Euler", "preset", "euler")
    passes(figure.add_subplot(2, 2, 4), "SiT, Heun", "preset", "heun")
    figure.savefig(ROOT / "assets" / "worth-more.png", dpi=110)


def quality(axis, title, preset):
    """FD against the scale of guidance: CFG's, and 1/(2-w) of MG."""
    print(f"\n{title}: FD by scale of guidance")
    found = scores()
    for label, pattern in (("plain + CFG, two passes a step", rf"{preset}-plain-cfg([\d.]+)"),
                           ("MG, one pass a step, at 1/(2-w)", rf"{preset}-w([\d.]+)")):
        curve = {1: by_seed(found[f"{preset}-plain"])}
        for run, seeds in found.items():
            match = re.fullmatch(pattern, run)
            if match:
                scale = float(match[1])
                curve[1 / (2 - scale) if "MG" in label else scale] = by_seed(seeds)
        plot(axis, curve, label)
        for scale, distances in sorted(curve.items()):
            values = " ".join(f"{x:.1f}" for x in distances)
            print(f"| {label} | {scale:.2f} | {mean(distances):.1f} | {values} |")
    axis.set(title=title, xlabel="scale of guidance", ylabel="FD", xlim=(0.9, 3.1))
    axis.legend(fontsize=8)


def passes(axis, title, preset, sampler):
    """FD against network passes per image: of the scales tried at a number of them, the best."""
    print(f"\n{title}: FD at passes per image, and the scale")
    found = scores()
    for label, name, calls in (("plain", f"{preset}-plain()", 1),
                               ("plain + CFG", rf"{preset}-plain-cfg([\d.]+)", 2),
                               ("MG", rf"{preset}-w([\d.]+)", 1)):
        tried = {}
        for run, seeds in found.items():
            match = re.fullmatch(rf"{name}-{sampler}(\d+)", run)
            if match:
                steps = int(match[2])
                steps = 2 * steps - 1 if sampler == "heun" else steps
                tried.setdefault(calls * steps, []).append((by_seed(seeds), match[1]))
        best = {x: min(scales, key=lambda found: mean(found[0]))
                for x, scales in sorted(tried.items())}
        if best:
            plot(axis, {x: values for x, (values, _) in best.items()}, label)
        figures = [f"{x}: {mean(y):.1f} ({scale})" for x, (y, scale) in best.items()]
        print(f"| {label} | {', '.join(figures)} |")
    axis.set(title=title, xlabel="network passes per image", ylabel="FD", xscale="log",
             yscale="log")
    ticks = [10, 15, 20, 30, 50, 100]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    ticks = [8, 16, 24, 50, 100, 200]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=8)


def by_seed(seeds):
    """The FD of each seed, at its run's end."""
    return [float(seeds[seed][max(seeds[seed])]["fd"]) for seed in sorted(seeds)]


def plot(axis, curve, label):
    """Means of {x: values of each seed}, as a line in a band from the least to the largest."""
    points = sorted(curve.items())
    x = [x for x, _ in points]
    line, = axis.plot(x, [mean(values) for _, values in points], ".-", label=label,
                      color=COLOURS[label.split(",")[0]])
    axis.fill_between(x, [min(values) for _, values in points],
                      [max(values) for _, values in points], color=line.get_color(), alpha=0.2)
    axis.grid(alpha=0.3, which="both")


def price():
    """FD against what training has cost, in plain steps: a figure, and a table."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 3.6), layout="tight")
    axis = figure.add_subplot()
    found = scores()
    curves = {}
    for label, (name, cost) in LINES.items():
        seeds = found[name]
        steps = sorted(set.intersection(*(set(rows) for rows in seeds.values())))
        curves[label] = {step * cost: [float(seeds[seed][step]["fd"]) for seed in sorted(seeds)]
                         for step in steps}
    cfg = curves["plain + CFG, two passes a step"] = {}
    for steps in 400, 800, 1600, 2400:
        name = "preset-plain" if steps == 400 else f"plain{steps}"
        tried = [by_seed(seeds) for run, seeds in found.items()
                 if re.fullmatch(rf"{name}-cfg[\d.]+", run)]
        cfg[steps] = min(tried, key=mean)
    print("| | cost in plain steps | FD | by seed | plain training has it after |\n"
          "|---|---|---|---|---|")
    plain = [(mean(values), cost) for cost, values in curves["plain"].items()]
    for label, curve in curves.items():
        plot(axis, curve, label)
        for cost, values in curve.items():
            later = next((steps for distance, steps in plain if distance <= mean(values)), "-")
            each = " ".join(f"{x:.1f}" for x in values)
            print(f"| {label} | {cost:.0f} | {mean(values):.1f} | {each} | {later} |")
    axis.set(xlabel="cost of training, in plain steps", ylabel="FD", yscale="log")
    ticks = [2, 5, 10, 20, 50, 100, 200]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    figure.savefig(ROOT / "assets" / "price.png", dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(sys.argv[2])
    elif sys.argv[1:] == ["worth"]:
        worth()
    elif sys.argv[1:] == ["price"]:
        price()
    else:
        main(tuple(sys.argv[1:]))
