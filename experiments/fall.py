"""train_sit_mg.py with a w that falls linearly to 1 over the run, from --w on.

The flags are the same; --steps must be given. In log.csv w stays at its start.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
import train_sit_mg
from data import Data

loss, order = train_sit_mg.mg_loss, Data.index
steps = int(sys.argv[sys.argv.index("--steps") + 1])
left = 1.0  # of the run


def index(self, seed, step, batch):  # is called once a step
    global left
    left = 1 - step / steps
    return order(self, seed, step, batch)


def falling_loss(net, teacher, x0, y, w, **draws):
    return loss(net, teacher, x0, y, 1 + (w - 1) * left, **draws)


Data.index, train_sit_mg.mg_loss = index, falling_loss
models.run(train_sit_mg.main)
