"""train_sit_mg.py with a w that falls linearly to 1 over the run, from --w on.

The flags are the same. In log.csv w stays at its start.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime
import train_sit_mg

draw = train_sit_mg.draw


def falling(args, data, step, w):
    return draw(args, data, step, 1 + (w - 1) * (1 - step / args.steps))


train_sit_mg.draw = falling
runtime.run(train_sit_mg.main)
