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
LINES = {  # of the figure: runs, and what a step costs in plain ones (bench.py)
    "plain": ("curve-plain", 1), "MG, EMA teacher": ("curve-ema", 1.61),
    "MG, online teacher": ("curve-online", 1.29),
    "MG, online, a quarter guided": ("curve-quarter", 1.11)}


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
            by_seed = " ".join(f"{value:.1f}" for value in distances)
            print(f"| {name} | {step or ''} | {mean(distances):.1f} | {by_seed} | "
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
    for label, name, calls in (("plain", f"{preset}-plain()", 1),
                               ("plain + CFG", rf"{preset}-plain-cfg([\d.]+)", 2),
                               ("MG", rf"{preset}-w([\d.]+)", 1)):
        tried = {}
        for run, seeds in scores().items():
            match = re.fullmatch(rf"{name}-{sampler}(\d+)", run)
            if match:
                steps = int(match[2])
                steps = 2 * steps - 1 if sampler == "heun" else steps
                tried.setdefault(calls * steps, []).append((by_seed(seeds), match[1]))
        best = {x: min(scales) for x, scales in sorted(tried.items())}
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
    colour = {"plain": "gray", "plain + CFG": "tab:blue", "MG": "tab:orange"}[label.split(",")[0]]
    axis.plot(x, [mean(values) for _, values in points], ".-", color=colour, label=label)
    axis.fill_between(x, [min(values) for _, values in points],
                      [max(values) for _, values in points], color=colour, alpha=0.2)
    axis.grid(alpha=0.3, which="both")


def price(path):
    """FD against what training has cost: a figure, and a table at 400, 800, 1600 plain steps."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 3.6), layout="tight")
    axis = figure.add_subplot()
    found = scores()
    table = {}
    for label, (name, cost) in LINES.items():
        steps = sorted(set.intersection(*(set(rows) for rows in found[name].values())))
        steps = [step for step in steps if step * cost < 2500]
        distances = [[float(rows[step]["fd"]) for rows in found[name].values()] for step in steps]
        axis.plot([step * cost for step in steps], [mean(f) for f in distances], ".-", label=label)
        axis.fill_between([step * cost for step in steps], [min(f) for f in distances],
                          [max(f) for f in distances], alpha=0.2)
        table[label] = {round(step * cost, -2): (step, f) for step, f in zip(steps, distances)}
    cfg = {steps: (steps, [float(rows[0]["fd"]) for rows in found[f"plain{steps}-cfg2"].values()])
           for steps in (400, 800, 1600)}
    axis.plot(cfg.keys(), [mean(f) for _, f in cfg.values()], "x--", color="gray",
              label="plain + CFG 2 (two passes)")
    axis.set(xlabel="cost of training, in plain steps", ylabel="FD", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    print("| | 400 | 800 | 1600 |\n|---|---|---|---|")
    for label, points in {**table, "plain + CFG 2": cfg}.items():
        cells = []
        for cost in 400, 800, 1600:
            step, distances = points[cost]
            by_seed = ", ".join(f"{x:.1f}" for x in distances)
            cells.append(f"{mean(distances):.1f} ({by_seed}), {step} steps")
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(sys.argv[2])
    elif sys.argv[1:] == ["worth"]:
        worth()
    elif sys.argv[1:] == ["price"]:
        price(ROOT / "assets" / "price.png")
    else:
        main(tuple(sys.argv[1:]))
