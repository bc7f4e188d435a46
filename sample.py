"""Samples from a checkpoint: `python sample.py CKPT --labels 3 7 --out grid.png`, or, on any number of GPUs,
`torchrun -- sample.py CKPT --num 50000 --class-labels balanced --out samples.npz`.

Conventions, here and in the train scripts: larger t is noisier. SiT: t in [0, 1], x_t = (1-t) x_0 + t eps, and the
network predicts v = dx_t/dt = eps - x_0. DiT: t in 0..999, and it predicts eps. Guidance scale 1 is off, for cfg (here,
two passes a step) and for w (trained, one pass). Label num_classes is the empty class. Images are NCHW in [-1, 1], latents
the VAE's times its scaling_factor.
"""
import contextlib
import itertools
import json
import math
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import models
from models import ALPHA_BARS, atomic, decode, grid_data, grid_scores, load_checkpoint, load_vae, save_diffusers, write_json


@torch.no_grad()
def predict(model, x, t, y, w, cfg, interval, noise_time):
    """One network call, with classifier-free guidance (Eq. 9) where noise_time is in the interval: float64, as x.

    x (N, C, H, W); t a number in the network's own units; noise_time the same in [0, 1]; the others as of the samplers.
    Where the network also gives variances (2C channels), they are the conditional ones: guidance acts on all of the first C
    channels and on no others.
    """
    t = torch.full((len(x),), t, device=x.device)
    if w is None and getattr(model, "scale_aware", False):
        w = 1.0
    guided = cfg != 1 and interval[0] <= noise_time <= interval[1]
    if not guided:
        return model(x.float(), t, y, *(() if w is None else (w,))).double()
    scale = () if w is None else (torch.cat([torch.as_tensor(w).to(x).expand(len(x)), x.new_zeros(len(x))]),)  # (empty, 0): Eq. 22
    cond, uncond = model(torch.cat([x, x]).float(), torch.cat([t, t]),
                         torch.cat([y, torch.full_like(y, model.num_classes)]), *scale).double().chunk(2)
    out, empty = cond[:, :x.shape[1]], uncond[:, :x.shape[1]]
    return torch.cat([empty + cfg * (out - empty), cond[:, x.shape[1]:]], 1)                       # Eq. 9, cfg = 1 + its w


# ---------------------------------------------------------------- samplers
# All of them: x (N, C, H, W) standard normal, y (N,) labels -> x_0 (N, C, H, W), float32. steps: network calls; w: a scale-aware
# network's scale; cfg: CFG's scale, 1 is off; interval: the noise times in [0, 1] in which it acts; randn(): the next normal draw
# like x, None is torch.randn_like; progress: show a bar.

# ---------------------------------------------------------------- SiT
# The path (Eq. 4): x_t = (1-t) x_0 + t eps, v = eps - x_0. So eps = x_t + (1-t) v, and the score is -eps / t.

def euler_maruyama(model, x, y, *, steps, w=None, cfg=1.0, interval=(0.0, 1.0), randn=None, progress=False):
    """Reverse SDE dx = [v - (g^2/2) score] dt + g dW with g^2 = 2t, from t = 1 to 0.04, then one step to 0 without noise.

    REPA's and the MG authors' schedule.
    """
    x, times = x.double(), torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist() + [0.0]
    for t, t_next in tqdm(list(itertools.pairwise(times)), "sampling", leave=False, disable=not progress):
        v = predict(model, x, t, y, w, cfg, interval, t)
        score = -(x + (1 - t) * v) / t
        x = x + (v - t * score) * (t_next - t)                                                     # g^2/2 = t
        if t_next > 0:
            noise = randn() if randn else torch.randn_like(x)
            x = x + (2 * t * (t - t_next)) ** 0.5 * noise
    return x.float()


def euler(model, x, y, *, steps, w=None, cfg=1.0, interval=(0.0, 1.0), randn=None, progress=False):
    """dx = v dt from t = 1 to 0 in equal steps, one network call each."""
    x, times = x.double(), torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, t_next in tqdm(list(itertools.pairwise(times)), "sampling", leave=False, disable=not progress):
        x = x + predict(model, x, t, y, w, cfg, interval, t) * (t_next - t)
    return x.float()


def heun(model, x, y, *, steps, w=None, cfg=1.0, interval=(0.0, 1.0), randn=None, progress=False):
    """Euler's step, then the mean of the slopes at its two ends; the last step is Euler's: 2 * steps - 1 network calls."""
    x, times = x.double(), torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, t_next in tqdm(list(itertools.pairwise(times)), "sampling", leave=False, disable=not progress):
        v = predict(model, x, t, y, w, cfg, interval, t)
        if t_next > 0:
            v = (v + predict(model, x + v * (t_next - t), t_next, y, w, cfg, interval, t_next)) / 2
        x = x + v * (t_next - t)
    return x.float()


# ---------------------------------------------------------------- DiT
# The path (Eq. 1): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, with abar = 1 below t = 0.

def with_bars(times):
    """Falling times -> [(t, abar at t, abar at the next time)]; after the last time comes abar = 1."""
    bars = [float(ALPHA_BARS[t]) for t in times] + [1.0]
    return list(zip(times, bars, bars[1:], strict=False))


def ddpm(model, x, y, *, steps, w=None, cfg=1.0, interval=(0.0, 1.0), randn=None, progress=False):
    """Ancestral sampling (Ho et al. 2020, Eq. 7 and 11) with the learned variance (Nichol & Dhariwal 2021, Eq. 15).

    Without variance channels: the posterior's variance. Nothing is clipped. The times: `steps` of 999..0, evenly spaced with
    both ends (ADM).
    """
    x, C = x.double(), x.shape[1]
    times = np.linspace(len(ALPHA_BARS) - 1, 0, steps).round().astype(int).tolist()
    for t, bar, bar_next in tqdm(with_bars(times), "sampling", leave=False, disable=not progress):
        out = predict(model, x, t, y, w, cfg, interval, t / len(ALPHA_BARS))
        beta = 1 - bar / bar_next
        x_0 = (x - (1 - bar) ** 0.5 * out[:, :C]) / bar ** 0.5                                     # Eq. 1 solved for x_0
        x = bar_next ** 0.5 * beta / (1 - bar) * x_0 + (1 - beta) ** 0.5 * (1 - bar_next) / (1 - bar) * x
        if bar_next < 1:  # the last step is its mean
            low = math.log(beta * (1 - bar_next) / (1 - bar))
            log_var = low + (out[:, C:] + 1) / 2 * (math.log(beta) - low) if out.shape[1] > C else torch.tensor(low)
            x = x + (log_var / 2).exp() * (randn() if randn else torch.randn_like(x))
    return x.float()


def ddim(model, x, y, *, steps, w=None, cfg=1.0, interval=(0.0, 1.0), randn=None, progress=False):
    """Deterministic sampling (Song et al. 2021, Eq. 12 with sigma = 0).

    The times: 999 and on in equal steps of 1000/steps, as diffusers' DDIMScheduler has them with "trailing" spacing.
    """
    x, C = x.double(), x.shape[1]
    times = (np.arange(steps, 0, -1) * len(ALPHA_BARS) / steps).round().astype(int) - 1
    for t, bar, bar_next in tqdm(with_bars(times.tolist()), "sampling", leave=False, disable=not progress):
        eps = predict(model, x, t, y, w, cfg, interval, t / len(ALPHA_BARS))[:, :C]
        x_0 = (x - (1 - bar) ** 0.5 * eps) / bar ** 0.5
        x = bar_next ** 0.5 * x_0 + (1 - bar_next) ** 0.5 * eps
    return x.float()


SAMPLERS = {"euler-maruyama": euler_maruyama, "euler": euler, "heun": heun, "ddpm": ddpm, "ddim": ddim}
KINDS = {"SiT": ("euler-maruyama", "euler", "heun"), "DiT": ("ddpm", "ddim")}  # the paper's first


def choose_sampler(name, model):
    """The sampler of that name, or the paper's for this model. ValueError if it doesn't fit what the network predicts.

    A network from elsewhere that says neither kind nor learn_sigma is taken for a SiT.
    """
    kind = getattr(model, "kind", None)  # a network from elsewhere doesn't say
    fitting = KINDS[kind or ("DiT" if getattr(model, "learn_sigma", False) else "SiT")]
    if name not in (None, *(fitting if kind else SAMPLERS)):
        raise ValueError(f"--sampler {name}: a {kind or 'network'} takes {', '.join(fitting if kind else SAMPLERS)}")
    return name or fitting[getattr(model, "input_size", 0) == 1]  # points: without noise, to see the paths


# ---------------------------------------------------------------- images

@torch.no_grad()
def generate(model, labels, seeds, *, sampler=None, steps=250, w=None, cfg=1.0, interval=(0.0, 1.0), vae=None,
             progress=False):
    """labels, seeds: int tensors (N,) -> (N, H, W, C) uint8 images on the CPU.

    Sample i's noise, every step's included, depends on seeds[i] >= 0 alone: not on batch size, order, rank or number
    of processes. sampler None: the paper's for this model, euler-maruyama or ddpm. vae None: the model works on pixels.
    """
    x = draw(model, labels, seeds, sampler=sampler, steps=steps, w=w, cfg=cfg, interval=interval, progress=progress)
    return to_uint8(decode(vae, x) if vae else x)


@torch.no_grad()
def draw(model, labels, seeds, *, sampler=None, **options):
    """generate() before decoding and rounding: x_0 (N, C, H, W), float32."""
    device, shape = next(model.parameters(), torch.empty(0)).device, (model.in_channels, model.input_size, model.input_size)
    streams = [np.random.Generator(np.random.Philox(key=int(seed))) for seed in seeds]  # the same on every device

    def randn():
        return torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams])).to(device)
    return SAMPLERS[choose_sampler(sampler, model)](model, randn(), torch.as_tensor(labels).to(device), randn=randn, **options)


def to_uint8(x):
    """(N, C, H, W) in [-1, 1] -> (N, H, W, C) uint8 on the CPU, rounded."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def save_grid(images, path, columns):
    """(N, H, W, 1 or 3) uint8 -> a PNG with `columns` images a row, small ones enlarged to at least 48 pixels."""
    from PIL import Image
    images = np.asarray(images)
    images = np.pad(images, [(0, -len(images) % columns), (0, 0), (0, 0), (0, 0)])
    zoom = -(-48 // images.shape[1])
    images = np.pad(images.repeat(zoom, 1).repeat(zoom, 2), [(0, 0), (1, 1), (1, 1), (0, 0)])
    n, height, width, channels = images.shape
    grid = images.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(n // columns * height, columns * width, channels)
    with atomic(path) as f:
        Image.fromarray(grid[..., 0] if channels == 1 else grid).save(f, format="png")


@contextlib.contextmanager
def together():
    """Work of every process, after which they wait for each other. An error in one is raised in all, so that none waits for ever."""
    error = None
    try:
        yield
    except (ValueError, OSError) as e:
        error = e
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error and ValueError(str(error)))
    for e in errors:
        if e:
            e.shared = True  # one process can say it for all
            raise e


def write_samples(path, model, labels, seed, *, batch, record, vae=None, dtype="fp32", columns=10, go_on=True,
                  sampler=None, steps=250, w=None, cfg=1.0, interval=(0.0, 1.0)):
    """Draws image i for labels[i] from seed * 2^32 + i, on all processes, into a .png or .npz with a .json record beside.

    labels: int64 (num,) on the CPU, the same in every process; batch: images at once, per process.
    Every batch is a file of its own until the end, so that an interrupted run goes on where it was, on any number of
    processes. ValueError if what it finds was made otherwise (go_on=False: that is thrown away).
    -> the speed, for people, on rank 0.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    path, device = Path(path), next(model.parameters()).device
    parts = Path(f"{path}.parts")
    record = dict(record, sampler=choose_sampler(sampler, model), steps=steps, w=w, cfg=cfg, interval=list(interval), seed=seed,
                  dtype=dtype, num=len(labels), batch=batch)
    with together():
        if rank == 0:
            if parts.exists() and not go_on:
                shutil.rmtree(parts)
            parts.mkdir(parents=True, exist_ok=True)
            if any(parts.glob("*.npy")) and (parts / "record.json").exists():  # without any, nothing is lost
                for key, value in json.loads((parts / "record.json").read_text()).items():
                    if record.get(key) != value:
                        raise ValueError(f"{parts} holds an interrupted run with {key} {value}, not {record.get(key)}: "
                                         f"finish that one, or delete the folder")
            write_json(parts / "record.json", record)
    with together():  # every process has looked before any of them draws
        starts = list(range(0, len(labels), batch))
        missing = [start for start in starts if not (parts / f"{start}.npy").exists()]
    todo, made = missing[rank::world], sum(min(batch, len(labels) - start) for start in missing)
    begin = time.perf_counter()
    options = {"sampler": sampler, "steps": steps, "w": w, "cfg": cfg, "interval": interval, "progress": rank == 0}
    with together():
        for start in tqdm(todo, desc="samples", unit="batch", disable=rank > 0, leave=False):
            index = torch.arange(start, min(start + batch, len(labels)))
            inputs = model, labels[index], seed * 2 ** 32 + index
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                if model.input_size == 1:  # points: (N, 2) float32
                    images = draw(*inputs, **options).flatten(1).cpu()
                else:
                    images = generate(*inputs, vae=vae, **options)
            with atomic(parts / f"{start}.npy") as f:
                np.save(f, images.numpy())
    seconds = time.perf_counter() - begin
    with together():
        if rank == 0:
            files = [parts / f"{start}.npy" for start in starts]
            if path.suffix == ".npz":
                save_npz(path, labels.numpy(), files)
            elif model.input_size == 1:
                save_points(np.concatenate([np.load(file) for file in files]), labels, path)
            else:
                save_grid(np.concatenate([np.load(file) for file in files]), path, columns)
            write_json(path.with_suffix(".json"), record)
            shutil.rmtree(parts)
    return f"{made / seconds:.1f} images/s on {world} x {device.type}" if made else "all of them drawn before"


def save_npz(path, labels, parts):
    """arr_0 and labels as numpy.savez would write them, but with one part in memory at a time."""
    first = np.load(parts[0], mmap_mode="r")
    with atomic(path) as f, zipfile.ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {
                "descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": (len(labels), *first.shape[1:])})
            for part in parts:
                member.write(np.load(part).tobytes())
        with archive.open("labels.npy", "w") as member:
            np.lib.format.write_array(member, labels)


# ---------------------------------------------------------------- plots: a run's curves, and pictures of 2-D checkpoints

COLOURS = ["tab:orange", "dimgray", "tab:blue"]  # of the grid's classes 0 and 1, and of the empty class


def new_figure(rows, columns, size):
    """matplotlib's (figure, axes (rows, columns)), each size inches, without a window."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path, dpi=100):
    with atomic(path) as f:
        figure.savefig(f, format="png", dpi=dpi)


def plot_points(axis, x, y, size=1.0):
    """Points x (N, 2) of labels y (N,) on the grid."""
    board = (np.arange(4)[:, None] + np.arange(4)) % 2
    axis.imshow(board, extent=(-2, 2, -2, 2), cmap="gray", alpha=0.12)
    axis.scatter(*np.asarray(x).T, c=np.array(COLOURS)[np.asarray(y)], s=size, linewidths=0)
    axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", xticks=[], yticks=[])


def save_points(x, y, path):
    """A picture of points x (N, 2) of labels y (N,)."""
    figure, axes = new_figure(1, 1, 5)
    plot_points(axes[0, 0], x, y)
    save_figure(figure, path)


def save_classes(drawn, labels, rows_of, path):
    """What write_samples() drew, as a picture: points (N, 2) all in one, of images up to ten of each class in rows_of."""
    if drawn.ndim == 2:
        save_points(drawn, labels, path)
    else:
        columns = max(1, min(10, min(int((labels == c).sum()) for c in rows_of)))
        save_grid(drawn[torch.cat([(labels == c).nonzero().flatten()[:columns] for c in rows_of])], path, columns)


def save_curves(rows, path):
    """Of a training run, the rows of its log.csv: loss and score against steps, and w where it changed."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.2))
    axes = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.1, right=0.92, bottom=0.16, top=0.95, wspace=0.25)  # a layout engine takes a second
    scores = {"fid": "Fréchet distance (lower is better)", "outliers": "share of outliers", "coverage": "coverage of the cells"}

    def draw(axis, key, name, **style):
        points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key) not in (None, "")]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None, label=name, **style)
        return bool(points)
    draw(axes[0], "loss", "loss")
    drawn = [name for key, name in scores.items() if draw(axes[1], key, name)]
    for axis, name in zip(axes, ("loss", ", ".join(drawn) or "not scored"), strict=True):
        axis.set(xlabel="step", ylabel=name, yscale="log")
        axis.grid(alpha=0.3)
    if len({float(row["w"]) for row in rows if row.get("w") not in (None, "")}) > 1:  # from a file they are text
        right = axes[1].twinx()
        draw(right, "w", "w", color="gray", linestyle="--")
        right.set(ylabel="w (dashed)")
    save_figure(figure, path, dpi=120)


@torch.no_grad()
def measured_scale(model, plain, n=20_000):
    """The CFG scale at which `model` sits: least squares of its out(c) - out(empty) on the plain network's.

    Over n points of the grid, noised to times drawn evenly.
    """
    generator = torch.Generator().manual_seed(0)
    x0, y = grid_data(n, seed=1).tensors
    u, noise = torch.rand(n, 1, 1, 1, generator=generator), torch.randn(x0.shape, generator=generator)
    if model.kind == "SiT":
        t, a, s = u.flatten(), 1 - u, u                                                            # Eq. 4
    else:
        t = (u.flatten() * len(ALPHA_BARS)).long()
        a, s = (bar.float().sqrt().view(-1, 1, 1, 1) for bar in (ALPHA_BARS[t], 1 - ALPHA_BARS[t]))  # Eq. 1
    x_t, empty = a * x0 + s * noise, torch.full_like(y, 2)
    ours, theirs = (net(x_t, t, y) - net(x_t, t, empty) for net in (model, plain))
    return float((ours * theirs).sum() / theirs.square().sum())


def draw_panels(model, plain, path, *, w, cfg, num, seed, **options):
    """Fig. 2: samples, paths and density of the plain network, with and without labels and with CFG, and of `model`.

    plain None: those of `model` alone. -> rows of the printed table, a column of the figure each.
    """
    both, none, rows, shown = torch.arange(num) % 2, torch.full((num,), 2), [], min(60, num)  # shown: paths
    columns = [("conditional", plain or model, both, 1.0), ("unconditional", plain or model, none, 1.0),
               (f"CFG {cfg:.3g}", plain or model, both, cfg)] + ([(f"MG {w:.3g}, one pass", model, both, 1.0)] if plain else [])
    figure, axes = new_figure(3, len(columns), 3)
    for column, (name, net, labels, scale) in enumerate(columns):
        seen = []
        with net.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][:shown].flatten(1).clone())):
            x = draw(net, labels, seed * 2 ** 32 + torch.arange(num), cfg=scale, progress=True, **options).flatten(1)
        scores = grid_scores(x, labels)
        rows.append({"": name} | scores)
        plot_points(axes[0, column], x[:3000], labels[:3000])
        axes[0, column].set_title(f"{name}\noutliers {scores['outliers']:.3f}, coverage {scores['coverage']:.3f}", fontsize=9)
        paths = torch.stack([*seen, x[:shown]])                                                    # (steps + 1, shown, 2)
        for i in range(shown):
            axes[1, column].plot(*paths[:, i].T, color=COLOURS[labels[i]], linewidth=0.5)
        plot_points(axes[1, column], x[:shown], labels[:shown], size=6)
        counts, *_ = np.histogram2d(*x.T.numpy(), bins=52, range=[(-2.6, 2.6)] * 2)
        axes[2, column].imshow(counts.T / num / 0.1 ** 2, origin="lower", extent=(-2.6, 2.6) * 2, cmap="magma",
                               vmin=0, vmax=3 / 16)  # exact: 1/16 on all of the board
        axes[2, column].set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("samples", "paths", "density"), strict=True):
        axis.set_ylabel(name)
    save_figure(figure, path, dpi=80)
    return rows


def draw_curves(networks, plains, path, *, num, seed, **options):
    """Outliers and coverage of MG and of CFG on plain networks over the scale, and the scale that each w of MG measures.

    networks, plains: [(model, config)], of several seeds and, MG's, w. MG is compared with the plain network of its seed.
    -> rows of the printed table, means over the seeds.
    """
    figure, (axes,) = new_figure(1, 3, 3.6)
    y, found = torch.arange(num) % 2, {}

    def score(name, scale, net, cfg):
        x = draw(net, y, seed * 2 ** 32 + torch.arange(num), cfg=cfg, progress=True, **options).flatten(1)
        found.setdefault((name, scale), []).append(grid_scores(x, y))
    for net, _ in plains:
        for cfg in (1, 1.11, 1.33, 1.67, 2, 2.5, 3, 4):
            score("CFG", cfg, net, cfg)
    for net, config in sorted(networks, key=lambda pair: pair[1]["w"]):
        score("MG", config["w"], net, 1.0)
        plain = next((net for net, other in plains if other.get("seed") == config.get("seed")), plains[0][0])
        found["MG", config["w"]][-1]["measured scale"] = measured_scale(net, plain)
    rows = [{"": f"{name} {scale:g}", "1/(2-w)": 1 / (2 - scale) if name == "MG" and scale < 2 else math.nan}
            | {key: float(np.mean([seed[key] for seed in scores])) for key in scores[0]} | {"runs": len(scores)}
            for (name, scale), scores in found.items()]
    for name, colour in (("CFG", "tab:blue"), ("MG", "tab:red")):
        mine = [row for (kind, _), row in zip(found, rows, strict=True) if kind == name]
        acts = [scale for kind, scale in found if kind == name] if name == "CFG" else [row["1/(2-w)"] for row in mine]
        for key, style in (("outliers", "-o"), ("coverage", "--s")):
            axes[0].plot(acts, [row[key] for row in mine], style, color=colour, markersize=3, label=f"{name}, {key}")
        axes[1].plot([row["outliers"] for row in mine], [row["coverage"] for row in mine], "-o", color=colour, markersize=3, label=name)
    law = [row for row in rows if row["1/(2-w)"] > 0]  # MG's below w = 2: the others have nan
    axes[2].plot([row["1/(2-w)"] for row in law], [row["measured scale"] for row in law], "o-", color="tab:red", markersize=3)
    limits = (1, 1.05 * max([row["1/(2-w)"] for row in law] + [row["measured scale"] for row in law]))
    axes[2].plot(limits, limits, color="gray", linewidth=0.8)
    axes[0].set(xlabel="scale: CFG's, and 1/(2-w) of MG", ylabel="share")
    axes[0].legend(fontsize=7)
    axes[1].set(xlabel="outliers", ylabel="coverage")
    axes[1].legend(fontsize=7)
    axes[2].set(xlabel="1/(2-w)", ylabel="CFG scale measured in MG's output", xlim=limits, ylim=limits, aspect="equal")
    save_figure(figure, path)
    return rows


def print_table(rows):
    """Dicts as a Markdown table; the longest has all the keys."""
    keys = list(max(rows, key=len))
    print(f"| {' | '.join(keys)} |\n|{'---|' * len(keys)}")
    for row in rows:
        print("| " + " | ".join("" if key not in row or row[key] != row[key] else f"{row[key]:.3f}" if isinstance(row[key], float)
                                else str(row[key]) for key in keys) + " |")


# ---------------------------------------------------------------- command line

def parse_args(argv):
    p = models.command_line(__doc__)
    p.add_argument("checkpoint", nargs="+", metavar="CKPT", help="ckpt.pt of a training run; a public file of DiT, SiT, REPA or MG; a "
                   "folder of diffusers' DiTPipeline; several only with --figure")
    p.add_argument("--out", default="samples.png", help="a .png (grid) or an .npz (arr_0 uint8 NHWC, labels) [%(default)s]")
    p.add_argument("--labels", type=int, nargs="+", metavar="CLASS", help="classes to draw, in equal shares, a row each in a .png "
                   "[0 to 9 in a .png]")
    p.add_argument("--class-labels", choices=["balanced", "random"],
                   help="in place of --labels, over all classes: i %% classes, or drawn from --seed [balanced in an .npz]")
    # torchrun takes a script's --num for its own --numa-binding, unless a "--" stands before the script
    p.add_argument("--num", "--num-samples", type=int, metavar="N", help="images in all; under torchrun write --num-samples [8 a label]")
    p.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} [the paper's: euler-maruyama, ddpm]")
    p.add_argument("--steps", type=int, default=250, metavar="N", help="network calls (heun: 2N-1); DiT: up to 1000 [%(default)s]")
    p.add_argument("--w", type=float, help="guidance scale of a scale-aware model, one pass a step; 1 is off [1]")
    p.add_argument("--cfg", type=float, help="classifier-free guidance scale, two passes; 1 is off [1]")
    p.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"),
                   help="--cfg acts at the noise times between these, 0 is data, 1 noise [0 1]")
    p.add_argument("--seed", type=int, default=0, help="image i is drawn from seed * 2^32 + i [%(default)s]")
    p.add_argument("--batch", type=int, default=64, metavar="N", help="images at once, per process [%(default)s]")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the network's passes (autocast; fp32 is TF32 on "
                   "GPUs that have it) [%(default)s]")
    p.add_argument("--weights", choices=["ema", "model"], default="ema", help="the moving average, or the network that "
                   "was trained [%(default)s]")
    p.add_argument("--to-diffusers", metavar="DIR", help="draw nothing; write a folder for diffusers' DiTPipeline (DiT only) [off]")
    p.add_argument("--figure", metavar="PNG", help="2-D checkpoints: one, Fig. 2 (--cfg [1/(2-w)] on the plain one); several, of any w "
                   "and --seed: outliers and coverage over the scale, and the scale measured. Prints the numbers [off]")
    p.add_argument("--compare", nargs="+", metavar="PLAIN", help="with --figure: checkpoints trained with --w 1, one, or one a seed [none: "
                   "Fig. 2 of CKPT alone]")
    p.add_argument("--vae", metavar="NAME", help="hub name or folder of the decoder [the checkpoint's; none: pixels]")
    args = p.parse_args(argv)
    for flag, value, ok, rule in [
            ("--num", args.num, args.num is None or args.num > 0, "at least 1"),
            ("--steps", args.steps, args.steps > 0, "at least 1"),
            ("--cfg", args.cfg, args.cfg is None or math.isfinite(args.cfg), "a number"),
            ("--figure", args.figure, not args.figure or args.figure.endswith(".png"), "a .png"),
            ("--figure", args.figure, not args.figure or args.compare or len(args.checkpoint) == 1, "given with --compare for several"),
            ("--compare", args.compare, args.figure or not args.compare, "left out without --figure"),
            ("--figure", args.figure, not args.figure or not (args.labels or args.class_labels or args.w or args.to_diffusers or args.vae),
             "given without --labels, --class-labels, --w, --vae and --to-diffusers"),
            ("--interval", args.interval, tuple(args.interval) == (0, 1) or not args.figure and args.cfg not in (None, 1),
             "left out without --cfg, and with --figure"),
            ("--cfg", args.cfg, args.cfg is None or len(args.checkpoint) == 1, "left out with several CKPT"),
            ("CKPT", " ".join(args.checkpoint), args.figure or len(args.checkpoint) == 1, "one, unless --figure is given"),
            ("--w", args.w, args.w is None or math.isfinite(args.w), "a number"),
            ("--batch", args.batch, args.batch > 0, "at least 1"),
            ("--seed", args.seed, 0 <= args.seed < 2 ** 31, "0 to 2^31 - 1"),
            ("--interval", args.interval, 0 <= args.interval[0] < args.interval[1] <= 1, "two noise times, 0 <= LO < HI <= 1"),
            ("--out", args.out, args.out.endswith((".png", ".npz")), "a file that ends in .png or .npz"),
            ("--class-labels", args.class_labels, not (args.class_labels and args.labels), "left out where --labels is given")]:
        if not ok:
            p.error(f"{flag} {value}: must be {rule}")
    if not args.figure:
        args.checkpoint, args.cfg = args.checkpoint[0], 1.0 if args.cfg is None else args.cfg
    return args, p


def main_figure(args):
    """--figure: prints the table, writes the picture. ValueError for checkpoints that aren't of the 2-D grid."""
    networks, plains = ([(path, *load_checkpoint(path, weights=args.weights)) for path in paths or []]
                        for paths in (args.checkpoint, args.compare))
    for path, net, config in networks + plains:
        if net.input_size != 1 or net.in_channels != 2 or net.num_classes != 2 or not net.empty_class or net.scale_aware:
            raise ValueError(f"--figure: {path} isn't of a network for the 2-D grid with an empty class and one scale (--data grid)")
        if net.kind != networks[0][1].kind:
            raise ValueError(f"--figure: {path} is a {net.kind}, and {networks[0][0]} a {networks[0][1].kind}: compare like with like")
    for path, _, config in plains:
        if config["w"] != 1:
            raise ValueError(f"--compare {path}: trained with --w {config['w']}; the plain network is trained with --w 1")
    options = {"num": args.num or 20_000, "seed": args.seed, "sampler": args.sampler, "steps": args.steps}
    if len(networks) > 1:
        rows = draw_curves([pair[1:] for pair in networks], [pair[1:] for pair in plains], args.figure, **options)
    else:
        (_, net, config), w = networks[0], networks[0][2]["w"]
        cfg = args.cfg or (1 / (2 - w) if w < 2 else 4.0)
        rows = draw_panels(net, plains[0][1] if plains else None, args.figure, w=w, cfg=cfg, **options)
        if plains:
            print(f"CFG scale measured in MG's output: {measured_scale(net, plains[0][1]):.3f}"
                  + (f"; 1/(2-w) = {1 / (2 - w):.3f}" if w < 2 else "; none is its limit at w >= 2"))
    print_table(rows)
    print(f"{args.figure}: {options['num']} points each, {args.steps} steps, seed {args.seed}")


def choose_labels(args, num_classes):
    """-> (the label of each image (num,) int64, name of the rule, images in a row of a grid)."""
    if args.labels or (args.out.endswith(".png") and not args.class_labels):
        listed = args.labels or list(range(min(num_classes, 10)))
        if not all(0 <= label < num_classes for label in listed):
            raise ValueError(f"--labels {' '.join(map(str, listed))}: must be 0 to {num_classes - 1} for this checkpoint")
        num = args.num or 8 * len(listed)
        if args.out.endswith(".png") and num % len(listed):
            raise ValueError(f"--num {num}: must be a multiple of the number of labels, {len(listed)}: a row of the picture each")
        labels = torch.tensor(listed)[torch.arange(num) * len(listed) // num]
        return labels, "list", max(1, num // len(listed))
    num = args.num or 8 * num_classes
    if args.class_labels == "random":
        return torch.from_numpy(np.random.default_rng(args.seed).integers(num_classes, size=num)), "random", 10
    return torch.arange(num) % num_classes, "balanced", 10


def main(argv=None):
    args, parser = parse_args(argv)
    if "RANK" in os.environ:  # under torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo")  # the processes only wait for each other
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as the train scripts
    rank = dist.get_rank() if dist.is_initialized() else 0
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        with together():
            if args.figure:
                if rank == 0:
                    main_figure(args)
                return
            model, config = load_checkpoint(args.checkpoint, weights=args.weights, device=device)
            labels, rule, columns = choose_labels(args, model.num_classes)
            vae_name = args.vae or config["vae"]
            vae = None if vae_name in (None, "none") else load_vae(vae_name, device)
            if vae and vae.config.latent_channels != model.in_channels:
                raise ValueError(f"--vae {vae_name}: has {vae.config.latent_channels} channels, and this checkpoint {model.in_channels}")
            if args.w is not None and not model.scale_aware:
                raise ValueError(f"--w {args.w}: this checkpoint was trained at one scale; --w needs one trained with --w-range")
            if args.cfg != 1 and not model.empty_class:
                raise ValueError(f"--cfg {args.cfg}: this checkpoint has no empty class; leave --cfg at 1")
            if model.kind == "DiT" and args.steps > len(ALPHA_BARS):
                raise ValueError(f"--steps {args.steps}: a DiT has 1 to {len(ALPHA_BARS)}")
            if args.to_diffusers:
                if rank == 0:
                    save_diffusers(model, config, vae, args.to_diffusers)
                    print(f"{args.to_diffusers}: DiTPipeline.from_pretrained loads it" + ("" if model.freq_divisor == 127 else
                          "; but diffusers embeds t at other frequencies than this file was trained with, so its images differ"))
                return
        record = {"checkpoint": args.checkpoint, "step": config.get("step"), "weights": args.weights,
                  "model": config["model"], "trained_w": config.get("w_range") or config.get("w"),
                  "vae": vae_name, "class_labels": rule, "labels": args.labels}
        speed = write_samples(args.out, model, labels, args.seed, vae=vae, batch=args.batch, dtype=args.dtype,
                              columns=columns, record=record, sampler=args.sampler, steps=args.steps, w=args.w,
                              cfg=args.cfg, interval=args.interval)
        if rank == 0:
            print(f"{args.out}: {len(labels)} images, labels {rule}, {choose_sampler(args.sampler, model)}, {args.steps} steps, "
                  f"w {record['trained_w'] if args.w is None else args.w}, cfg {args.cfg}, {args.dtype}, seed {args.seed}; {speed}")
            if model.input_size == 1 and args.out.endswith(".npz"):
                print_table([grid_scores(torch.from_numpy(np.load(args.out)["arr_0"]), labels)])
    except (ValueError, OSError) as e:
        parser.exit(2, None if rank else f"{parser.prog}: error: {e}\n")  # the other processes would say the same
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    models.run(main)
