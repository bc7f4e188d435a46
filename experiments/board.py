"""MG on toy_mg.py's board: python experiments/board.py 0 1 2 runs these seeds, then prints means.

Its figures go to out/experiments/board.jsonl, a line a training; what is there is not run again.
"""
import json
import sys
from pathlib import Path
from statistics import mean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toy_mg

FILE = ROOT / "out" / "experiments" / "board.jsonl"
STEPS = 4000
USUAL = {"teacher": "ema", "share": 1, "ema": 0.995, "batch": 256}  # toy_mg.train()'s defaults
TEACHERS = ("ema", "online")
SHARES = (1, 1 / 4)
SETTINGS = [USUAL | changes for changes in [
    *({"w": w, "teacher": teacher} for teacher in TEACHERS for w in (*toy_mg.SWEEP, 2.1, 2.5)),
    *({"w": w, "teacher": teacher, "share": 1 / 4} for teacher in TEACHERS for w in toy_mg.SWEEP),
    *({"w": 1.5, "share": share} | cure for share in SHARES
      for cure in ({"ema": 0.98}, {"ema": 0.999}, {"batch": 1024})),
]]


def run(seed, rows):
    y = torch.arange(toy_mg.POINTS) % 2
    plain = {}
    for setting in SETTINGS:
        done = {"seed": seed} | setting
        if any(done.items() <= row.items() for row in rows):
            continue
        key = setting["ema"], setting["batch"]
        if key not in plain:  # the same average and batch, without guidance
            plain[key] = toy_mg.train(1, STEPS, ema=key[0], batch=key[1], seed=seed)
        torch.manual_seed(seed)
        noise = torch.randn(toy_mg.POINTS, 2)
        options = {name: value for name, value in setting.items() if name != "w"}
        mg = toy_mg.train(setting["w"], STEPS, seed=seed, **options)
        row = done | {"measured": toy_mg.measured_scale(mg, plain[key])}
        drawn = {"": toy_mg.sample(mg, noise, y)}
        if setting["w"] < 2:
            drawn["cfg_"] = toy_mg.sample(plain[key], noise, y, cfg=1 / (2 - setting["w"]))
        for name, path in drawn.items():
            row[f"{name}outliers"], row[f"{name}coverage"] = toy_mg.scores(path[-1], y)
        rows.append(row)
        with FILE.open("a") as f:
            f.write(json.dumps(row) + "\n")


def main():
    FILE.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    for seed in map(int, sys.argv[1:]):
        run(seed, rows)
    print("| w | teacher | P | EMA | batch | 1/(2-w) | measured | by seed | outliers | coverage | "
          "plain + CFG 1/(2-w): outliers | coverage |\n" + "|---" * 12 + "|")
    for setting in SETTINGS:
        found = [row for row in rows if setting.items() <= row.items()]
        if not found:
            continue
        w = setting["w"]
        law = 1 / (2 - w)
        cells = [w, setting["teacher"], setting["share"], setting["ema"], setting["batch"],
                 f"{law:.2f}" if w < 2 else "none", f"{mean(r['measured'] for r in found):.2f}",
                 " ".join(f"{r['measured']:.2f}" for r in found)]
        for key in "outliers", "coverage", "cfg_outliers", "cfg_coverage":
            cells.append(f"{mean(r.get(key, float('nan')) for r in found):.3f}")
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
