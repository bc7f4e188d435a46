"""Tables of what experiments/run.sh has run: `python experiments/tables.py [PREFIX ...]`.

A row for each name: means over its seeds, and the Fréchet distances one by one.
"""
import csv
import re
import sys
from pathlib import Path
from statistics import mean

FOLDER = Path(__file__).resolve().parent.parent / "out" / "experiments"


def scores():
    """{name: {seed: {"fid", "accuracy", "recall", "steps"}}} of all runs and sample sets."""
    found = {}
    for path in sorted([*FOLDER.glob("*/log.csv"), *FOLDER.glob("*.md")]):
        if path.suffix == ".md":  # fid.py's table
            lines = [line.split("|")[1:-1] for line in path.read_text().splitlines()]
            row = {key.strip().lower(): cell.strip() for key, cell in zip(lines[0], lines[2])}
            name = path.stem
        else:
            with path.open() as f:
                row = list(csv.DictReader(f))[-1]
            name = path.parent.name
        if row.get("accuracy"):
            name, seed = re.fullmatch(r"(.*)-s(\d+)", name).groups()
            found.setdefault(name, {})[int(seed)] = row
    return found


def main():
    print("| run | FD | by seed | accuracy | recall |\n|---|---|---|---|---|")
    for name, seeds in sorted(scores().items()):
        if len(sys.argv) > 1 and not name.startswith(tuple(sys.argv[1:])):
            continue
        rows = [row for _, row in sorted(seeds.items())]
        fids, accuracies, recalls = ([float(row[key]) for row in rows]
                                     for key in ("fid", "accuracy", "recall"))
        by_seed = " ".join(f"{value:.1f}" for value in fids)
        print(f"| {name} | {mean(fids):.1f} | {by_seed} | {mean(accuracies):.3f} | "
              f"{mean(recalls):.2f} |")


if __name__ == "__main__":
    main()
