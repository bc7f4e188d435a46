"""Model-guidance (MG) in one file: a small network learns a 2-D board, in a minute on a CPU.

    python toy_mg.py            trains without and with MG, prints scores, draws the paper's Fig. 2
    python toy_mg.py --sweep    what w means: MG at w acts as classifier-free guidance at 1/(2-w)

Larger t is noisier: x_t = (1-t) x_0 + t eps, and the network predicts v = dx_t/dt = eps - x_0.
(The paper writes u = x_0 - eps = -v. MG is linear in it, so nothing else changes.)
Tang et al. 2025, "Diffusion Models without Classifier-free Guidance", arXiv:2502.12154.
"""
import argparse
import copy
import functools
from pathlib import Path

import numpy as np
import torch
from torch import nn

EMPTY = 2                                 # classes 0 and 1; label 2 is the empty class
POINTS = 20_000                           # samples for every score
STEPS = 50                                # Euler steps for every sample
SWEEP = [1.1, 1.25, 1.4, 1.5, 1.6, 1.75]
COLOURS = np.array(["tab:orange", "tab:blue", "dimgray"])  # of labels 0, 1, 2

# A 4x4 chessboard of unit cells on [-2, 2]^2: each class is uniform on the cells of one colour.
CELLS = (torch.arange(4)[:, None] + torch.arange(4)) % 2                   # (4, 4)


def board(n):
    """n exact draws of the data: x_0 (n, 2), y (n,)."""
    y = torch.randint(2, (n,))
    i = torch.randint(4, (n,))
    j = 2 * torch.randint(2, (n,)) + (i + y) % 2                           # CELLS[i, j] = y
    return torch.stack([i, j], 1) - 2 + torch.rand(n, 2), y


class MLP(nn.Module):
    """network(x (N, 2), t (N,), y (N,)) -> v (N, 2)."""

    def __init__(self, width=128):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(3, width)
        self.first = nn.Linear(2, width)
        self.last = nn.Linear(width, 2)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x, t, y):
        c = self.time(t[:, None]) + self.label(y)                          # (N, width)
        h = self.first(x)
        for layer in self.hidden:
            h = nn.functional.silu(layer(h + c))
        return self.last(h)


# ---------------------------------------------------------------- the method

def mg_loss(network, teacher, x0, y, w, *, t, noise, dropped, guide, share=1.0):
    """MG's loss, a scalar. x0, noise (N, 2); t, y, dropped (N,); w = 1 is plain diffusion.

    teacher: the moving average of the weights (EMA, Eq. 18) or the network itself (Eq. 20).
    dropped: samples that train the empty class, on the plain target.
    guide (K,): the samples to guide, none of them dropped. If they were chosen with probability
        share, their term is divided by it: the target keeps its mean at fewer teacher passes.
    """
    x_t = (1 - t[:, None]) * x0 + t[:, None] * noise                       # Eq. 4
    target = noise - x0                                                    # Eq. 6: v = -u
    out = network(x_t, t, torch.where(dropped, EMPTY, y))                  # (N, 2)
    if w != 1:
        with torch.no_grad():                                              # sg(.) of Eq. 18, 20
            cond = out[guide] if teacher is network else teacher(x_t[guide], t[guide], y[guide])
            uncond = teacher(x_t[guide], t[guide], torch.full_like(y[guide], EMPTY))
        target[guide] += (w - 1) / share * (cond - uncond)                 # Eq. 18, 20
    return (out - target).square().mean()                                  # Eq. 19


def train(w, steps, *, teacher="ema", share=1.0, ema=0.995, batch=256, drop=0.1, seed=0):
    """Returns the EMA network. Reseeds torch; all draws are the same for any w, teacher, share."""
    torch.manual_seed(seed)
    network = MLP()
    average = copy.deepcopy(network).eval().requires_grad_(False)
    guiding = {"ema": average, "online": network}[teacher]
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(steps):
        x0, y = board(batch)
        t = torch.rand(batch)
        noise = torch.randn(batch, 2)
        dropped = torch.rand(batch) < drop
        guide = ((torch.rand(batch) < share) & ~dropped).nonzero()[:, 0]
        loss = mg_loss(network, guiding, x0, y, w, t=t, noise=noise,
                       dropped=dropped, guide=guide, share=share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(ema, (1 + step) / (10 + step))                         # warm-up
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), network.parameters()):
                mean.lerp_(weight, 1 - decay)
    return average


@torch.no_grad()
def sample(network, x, y, *, cfg=1.0, steps=STEPS):
    """Euler's method on dx = v dt from t = 1 to 0: x (N, 2) normal -> the path (steps + 1, N, 2).

    cfg: the scale of classifier-free guidance, a second pass in every step; 1 is off.
    """
    path = [x]
    for i in range(steps):
        t = torch.full((len(x),), 1 - i / steps)
        v = network(x, t, y)
        if cfg != 1:
            uncond = network(x, t, torch.full_like(y, EMPTY))
            v = uncond + cfg * (v - uncond)                                # Eq. 9, its w is cfg - 1
        x = x - v / steps
        path.append(x)
    return torch.stack(path)


# ---------------------------------------------------------------- scores

def scores(x, y):
    """(outliers, coverage) of samples x (N, 2) of labels y (N,). The empty class owns all cells.

    outliers: the share of samples outside the cells of their label. coverage: of the 8x8 parts of
    each of these cells, the share with at least half as many samples as exact draws would give on
    average. It wants some 20 samples a part: 20,000 exact draws of both classes score .99.
    """
    label = torch.arange(3)[:, None, None]
    own = (CELLS.repeat_interleave(8, 0).repeat_interleave(8, 1) == label) | (label == EMPTY)
    part = ((x + 2) * 8).floor().long()                                    # (N, 2), of 32x32
    on_board = ((part >= 0) & (part < 32)).all(1)
    flat = (y * 32 + part[:, 0]) * 32 + part[:, 1]
    counts = flat[on_board].bincount(minlength=3 * 32 * 32).view(3, 32, 32)
    asked = y.bincount(minlength=3)[:, None, None]                         # samples of each label
    exact = asked / own.sum((1, 2), keepdim=True)                          # the same, per part
    covered = (counts >= exact / 2)[own & (asked > 0)]
    return 1 - counts[own].sum().item() / len(y), covered.float().mean().item()


@torch.no_grad()
def measured_scale(network, plain):
    """The CFG scale in a network's output: its v(c) - v(empty) over the plain network's.

    Least squares on noised data, t uniform in [0, 1].
    """
    x0, y = board(POINTS)
    t = torch.rand(POINTS)
    empty = torch.full_like(y, EMPTY)
    x_t = (1 - t[:, None]) * x0 + t[:, None] * torch.randn(POINTS, 2)      # Eq. 4
    mine, base = (net(x_t, t, y) - net(x_t, t, empty) for net in (network, plain))
    return ((mine * base).sum() / base.square().sum()).item()


# ---------------------------------------------------------------- figures; fit(w) trains a network

def fig2(fit, w, out):
    """The paper's Fig. 2: samples, paths and density of the plain network, of CFG and of MG."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    print("| | outliers | coverage |\n|---|---|---|", flush=True)
    plain = fit(1)
    mg = fit(w)
    scale = 1 / (2 - w)
    noise = torch.randn(POINTS, 2)
    both = torch.arange(POINTS) % 2
    columns = [("conditional", plain, both, 1),
               ("unconditional", plain, torch.full_like(both, EMPTY), 1),
               (f"CFG {scale:.3g}, two passes", plain, both, scale),
               (f"MG {w:g}, one pass", mg, both, 1)]
    figure = Figure(figsize=(12, 9.5), layout="constrained")
    axes = figure.subplots(3, 4)
    for (name, network, y, cfg), (top, middle, bottom) in zip(columns, axes.T):
        path = sample(network, noise, y, cfg=cfg)                          # (STEPS + 1, N, 2)
        outliers, coverage = scores(path[-1], y)
        print(f"| {name} | {outliers:.3f} | {coverage:.3f} |", flush=True)
        top.set_title(f"{name}\noutliers {outliers:.3f}, coverage {coverage:.3f}", fontsize=10)
        path = path.numpy()
        colours = COLOURS[y.numpy()]
        top.scatter(*path[-1, :3000].T, c=colours[:3000], s=2, linewidths=0)
        middle.scatter(*path[-1, :60].T, c=colours[:60], s=8, linewidths=0)
        for i in range(60):
            middle.plot(*path[:, i].T, color=colours[i], linewidth=0.6)
        bottom.hist2d(*path[-1].T, bins=52, range=[(-2.6, 2.6)] * 2, density=True,
                      cmap="magma", vmin=0, vmax=3 / 16)  # the data: 1/16 on all of the board
        for axis in top, middle:
            axis.imshow(CELLS.numpy(), cmap=ListedColormap(COLOURS[:2]), alpha=0.12,
                        origin="lower", extent=(-2, 2, -2, 2))
        for axis in top, middle, bottom:
            axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ["samples", "paths", "density"]):
        axis.set_ylabel(name)
    figure.savefig(out, dpi=80)
    print(f"\nCFG scale measured in MG's output: {measured_scale(mg, plain):.2f}; 1/(2-w) is "
          f"{scale:.2f}; {out} shows all four")


def sweep(fit):
    """What w means, derived and measured.

    After training the network's output v is the mean of its own target:
    v(c) = plain(c) + (w-1) (v(c) - v(empty)), and v(empty) is plain. Solved for v(c) - v(empty):
    v(c) - v(empty) = (plain(c) - v(empty)) / (2-w), which is CFG at the scale 1/(2-w).
    """
    print("| w | 1/(2-w) | measured | outliers | coverage | CFG at 1/(2-w): outliers | coverage |\n"
          "|---|---|---|---|---|---|---|", flush=True)
    plain = fit(1)
    noise = torch.randn(POINTS, 2)
    y = torch.arange(POINTS) % 2
    for w in SWEEP:
        mg = fit(w)
        scale = 1 / (2 - w)
        row = [w, scale, measured_scale(mg, plain), *scores(sample(mg, noise, y)[-1], y),
               *scores(sample(plain, noise, y, cfg=scale)[-1], y)]
        print("| " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--w", type=float, default=1.5, help="of MG, from 1 (off) to 2 [%(default)s]")
    p.add_argument("--sweep", action="store_true", help=f"w {', '.join(map(str, SWEEP))}")
    p.add_argument("--steps", type=int, default=4000, help="of training [%(default)s]")
    p.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    p.add_argument("--out", type=Path, default="fig2.png", help="the picture [%(default)s]")
    args = p.parse_args(argv)
    if not 1 <= args.w < 2:
        p.error(f"--w {args.w}: must be 1, or more and below 2, where guidance has no bound")
    if args.steps < 1 or args.seed < 0:
        p.error("--steps must be at least 1, --seed at least 0")
    if args.out.suffix != ".png" or not args.out.parent.is_dir():
        p.error(f"--out {args.out}: must be a .png in a folder that exists")
    fit = functools.partial(train, steps=args.steps, seed=args.seed)
    if args.sweep:
        sweep(fit)
    else:
        fig2(fit, args.w, args.out)
    print(f"\n{POINTS} points each, {STEPS} Euler steps, seed {args.seed}")


if __name__ == "__main__":
    main()
