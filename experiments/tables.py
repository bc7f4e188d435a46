"""Tables of what experiments/run.sh has run: `python experiments/tables.py [PREFIX ...]`.

A row for each name: means over its seeds, and the Fréchet distances one by one. For the runs that
were scored on their way, `python experiments/tables.py price` also draws assets/price.png. run.sh
calls `tables.py keep NAME-sSEED`: the scores of that run go to experiments/results.csv.
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
    if sys.argv[1:] == ["price"]:
        price(ROOT / "assets" / "price.png")
    elif sys.argv[1:2] == ["keep"]:
        keep(sys.argv[2])
    else:
        main(tuple(sys.argv[1:]))
