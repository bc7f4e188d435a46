"""train_sit_mg.py with the loss of Guidance-free training (GFT; Chen et al. 2025), to compare.

beta s(c) + (1 - beta) sg(u) is fitted to the plain target, with beta = 2 - w; dropped samples have
beta 1. Its gradient is beta times online MG's, so that dropped samples weigh 1/beta as much as
there. --alike divides by beta, so that they weigh alike.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime
import train_sit_mg

ALIKE = "--alike" in sys.argv
if ALIKE:
    sys.argv.remove("--alike")


def gft_loss(model, teacher, x0, y, w, *, t, noise, dropped, null, **_):
    s = t.view(-1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * noise
    target = noise - x0
    label = torch.where(dropped, null, y)
    beta = torch.where(dropped, 1, 2 - w)
    with torch.no_grad():
        empty = model(x_t, t, torch.full_like(y, null))
    scale = beta.view(-1, 1, 1, 1)
    out = scale * model(x_t, t, label) + (1 - scale) * empty
    loss = (out - target).square().mean((1, 2, 3))
    return loss / beta if ALIKE else loss


train_sit_mg.mg_loss = gft_loss
runtime.run(train_sit_mg.main)
