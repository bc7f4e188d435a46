"""Samples images from a checkpoint: ours, DiT's, SiT's, REPA's, MG's, or a DiTPipeline's.

    python sample.py CKPT --labels 3 7 --out grid.png
    torchrun sample.py CKPT --num-samples 50000 --class-labels balanced --out samples.npz

Larger t is noisier. SiT: t in [0, 1], x_t = (1-t) x_0 + t eps, and the network predicts
v = dx_t/dt = eps - x_0. DiT: t in 0..999, and it predicts eps. Guidance scale 1 is off: --cfg
(here, two passes a step) and --w (trained, one pass). Label num_classes is the empty class. Images
are NCHW in [-1, 1]; latents are the VAE's times its scaling_factor.

Interrupted, the same command resumes. Equations without a name are Tang et al.'s (2025).
"""
import itertools
import json
import math
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch

import models
import runtime
from checkpoints import fingerprint, load_checkpoint
from data import fill
from models import ALPHA_BARS
from runtime import UserError


def guided(model, y, *, cfg=1.0, interval=(0.0, 1.0), w=None, null=None):
    """The network for labels y (N,), with classifier-free guidance (Eq. 9): net(x, t).

    net(x (N, C, H, W), t a number, or (N,)) -> float64 (N, C, H, W), DiT with 2C channels.
    cfg: the scale; 1 is off and costs one pass. It acts where the noise time (t; DiT: t / 1000)
    is in the interval, on all channels but DiT's variances, which are those with the label.
    w: the scale of a scale-aware network (None: 1).
    y may be any other condition, (N, ...); null is then the empty one, as in mg_loss().
    """
    empty = torch.zeros_like(y) + (model.num_classes if null is None else null)
    scale = []
    both_scales = []
    if w is not None:
        w = torch.zeros(len(y), device=y.device) + w
        scale = [w]
        both_scales = [torch.cat([w, w])]  # the network itself sets the empty class's to 0
    last = 1000 if getattr(model, "kind", "SiT") == "DiT" else 1

    @torch.no_grad()
    def net(x, t):
        noise_time = torch.as_tensor(t) / last  # a number's stays on the CPU
        acts = (noise_time >= interval[0]) & (noise_time <= interval[1])
        if not isinstance(t, torch.Tensor):  # made on the device, without waiting for it
            t = torch.full((), t, device=x.device)
        t = t.to(x.device).expand(len(x))
        if cfg == 1 or not acts.any():
            return model(x.float(), t, y, *scale).double()
        strength = cfg
        if not acts.all():  # t is (N,), and inside the interval for some samples only
            strength = 1 + (cfg - 1) * acts.double().view(-1, *[1] * (x.ndim - 1))
        C = x.shape[1]
        x = torch.cat([x, x]).float()
        t = torch.cat([t, t])
        cond, uncond = model(x, t, torch.cat([y, empty]), *both_scales).double().chunk(2)
        out = uncond[:, :C] + strength * (cond[:, :C] - uncond[:, :C])                 # Eq. 9
        return torch.cat([out, cond[:, C:]], 1)
    return net


# ---------------------------------------------------------------- samplers
# net(x, t): what the network predicts, guided or not; x (N, C, H, W): standard normal; steps: the
# number of calls of net (heun: 2 * steps - 1); randn(): the next normal draw like x.
# -> x_0 (N, C, H, W), float32; float64 in between.

# ---------------------------------------------------------------- SiT
# The path (Eq. 4): x_t = (1-t) x_0 + t eps, v = eps - x_0: eps = x_t + (1-t) v, score = -eps / t.

def euler_maruyama(net, x, steps, randn=None):
    """The reverse SDE dx = [v - (g^2/2) score] dt + g dW with g^2 = 2t, from t = 1 to 0.04.

    A last step to 0 adds no noise. The schedule of REPA and of MG's authors.
    """
    randn = randn or (lambda: torch.randn_like(x))
    x = x.double()
    times = torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist()
    for t, t_next in itertools.pairwise([*times, 0.0]):
        v = net(x, t)
        score = -(x + (1 - t) * v) / t
        x = x + (v - t * score) * (t_next - t)                                     # g^2/2 = t
        if t_next > 0:
            x = x + (2 * t * (t - t_next)) ** 0.5 * randn()
    return x.float()


def euler(net, x, steps, randn=None):
    """The ODE dx = v dt from t = 1 to 0 in equal steps."""
    x = x.double()
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, t_next in itertools.pairwise(times):
        x = x + net(x, t) * (t_next - t)
    return x.float()


def heun(net, x, steps, randn=None):
    """Euler's step, then the mean of the slopes at its ends; the last step is Euler's."""
    x = x.double()
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, t_next in itertools.pairwise(times):
        v = net(x, t)
        if t_next > 0:
            v = (v + net(x + v * (t_next - t), t_next)) / 2
        x = x + v * (t_next - t)
    return x.float()


# ---------------------------------------------------------------- DiT
# The path (Eq. 1): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; after the last step abar is 1.

def ddpm(net, x, steps, randn=None):
    """Ancestral sampling (Ho et al. 2020, Eq. 7) at `steps` of the times 999..0, with both ends.

    The variance is learned (improved DDPM, Eq. 15), or the posterior's where net has C channels.
    """
    randn = randn or (lambda: torch.randn_like(x))
    C = x.shape[1]
    x = x.double()
    times = np.linspace(len(ALPHA_BARS) - 1, 0, steps).round().astype(int).tolist()
    abars = [float(ALPHA_BARS[t]) for t in times] + [1.0]
    for t, abar, abar_next in zip(times, abars, abars[1:], strict=False):
        out = net(x, t)
        beta = 1 - abar / abar_next
        x_0 = (x - (1 - abar) ** 0.5 * out[:, :C]) / abar ** 0.5                   # Eq. 1, for x_0
        x = (abar_next ** 0.5 * beta / (1 - abar) * x_0
             + (1 - beta) ** 0.5 * (1 - abar_next) / (1 - abar) * x)               # DDPM, Eq. 7
        if abar_next < 1:  # the last step is the mean
            log_var = log_posterior_variance = math.log(beta * (1 - abar_next) / (1 - abar))
            if out.shape[1] > C:
                v = (out[:, C:] + 1) / 2                                           # from 0 to 1
                log_var = v * math.log(beta) + (1 - v) * log_posterior_variance
            x = x + torch.as_tensor(log_var / 2, dtype=torch.float64).exp() * randn()
    return x.float()


def ddim(net, x, steps, randn=None):
    """Deterministic sampling (Song et al. 2021, Eq. 12 with sigma 0), every 1000/steps from 999 on.

    These are the times of diffusers' DDIMScheduler, "trailing", where steps divides 1000.
    """
    C = x.shape[1]
    x = x.double()
    times = (np.arange(steps, 0, -1) * len(ALPHA_BARS) / steps).round().astype(int) - 1
    abars = [float(ALPHA_BARS[t]) for t in times] + [1.0]
    for t, abar, abar_next in zip(times.tolist(), abars, abars[1:], strict=False):
        eps = net(x, t)[:, :C]
        x_0 = (x - (1 - abar) ** 0.5 * eps) / abar ** 0.5                          # Eq. 1, for x_0
        x = abar_next ** 0.5 * x_0 + (1 - abar_next) ** 0.5 * eps
    return x.float()


SAMPLERS = {"euler-maruyama": euler_maruyama, "euler": euler, "heun": heun,
            "ddpm": ddpm, "ddim": ddim}
# With fewer steps a sampler's FD is more than twice that of its deterministic rival (the digits).
FEWEST = {"euler-maruyama": (5, "euler"), "ddpm": (3, "ddim")}


def choose_sampler(name, model, steps):
    """The name, or the paper's sampler for None. UserError: it doesn't fit the network."""
    dit = getattr(model, "kind", "SiT") == "DiT"
    fitting = ["ddpm", "ddim"] if dit else ["euler-maruyama", "euler", "heun"]
    if name not in (None, *fitting):
        raise UserError(f"--sampler {name}: this network takes {' or '.join(fitting)}")
    if dit and steps > len(ALPHA_BARS):
        raise UserError(f"--steps {steps}: a DiT has 1 to {len(ALPHA_BARS)}")
    return name or fitting[0]


# ---------------------------------------------------------------- images

@torch.no_grad()
def generate(model, labels, seeds, *, sampler=None, steps=250, w=None, cfg=1.0, interval=(0.0, 1.0),
             vae=None):
    """Images of labels (N,): uint8 (N, H, W, C), on the CPU.

    Sample i depends on seeds[i] >= 0 alone: not on batch size, order or number of processes.
    sampler None: the paper's, euler-maruyama or ddpm. vae None: the model works on pixels.
    UserError: the sampler doesn't fit, or the network's output is not finite.
    """
    device = next(model.parameters(), torch.empty(0)).device
    shape = model.in_channels, model.input_size, model.input_size
    streams = [np.random.Generator(np.random.Philox(key=int(seed))) for seed in seeds]

    def randn():  # drawn on the CPU: the same on every device
        draws = [stream.standard_normal(shape, dtype=np.float32) for stream in streams]
        return runtime.move(torch.from_numpy(np.stack(draws)), device)
    net = guided(model, torch.as_tensor(labels).to(device), cfg=cfg, interval=interval, w=w)
    x = SAMPLERS[choose_sampler(sampler, model, steps)](net, randn(), steps, randn)
    x = models.decode(vae, x) if vae else x
    if not x.isfinite().all():
        raise UserError("the network's output is not finite (NaN or infinite): nothing is drawn")
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def balanced(num, classes):
    """num labels, as many of each class; where num is smaller, spread over the classes."""
    return torch.arange(num) * classes // num if num < classes else torch.arange(num) % classes


def write_samples(path, model, labels, seed, *, batch, record, vae=None, dtype="fp32", columns=10,
                  resume=True, **options):
    """Draws image i for labels[i] from seed * 2^32 + i, in all processes, into a .png or .npz.

    labels: int64 (num,), on the CPU; batch: images at a time, per process; options: generate()'s.
    Beside it, PATH.json records how it was made: `record` and the sampling options. Interrupted, it
    resumes, unless resume=False. UserError: PATH.parts is of another interrupted run.
    """
    rank, _ = runtime.ranks()
    parts = f"{path}.parts"
    if rank == 0 and not resume:
        shutil.rmtree(parts, ignore_errors=True)
    size = model.input_size
    channels = model.in_channels
    if vae:
        size *= models.vae_factor(vae)
        channels = vae.config.out_channels
    record = record | options | {
        "seed": seed, "dtype": dtype,
        "weights_sha256": fingerprint(model) if rank == 0 else None}

    def make(rows):
        device = next(model.parameters()).device.type
        for part in torch.from_numpy(rows).split(batch):
            seeds = seed * 2 ** 32 + part
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
                images = generate(model, labels[part], seeds, vae=vae, **options)
            yield images.numpy()
    info = record | {"labels": labels.tolist(), "network_dtype": dtype, "dtype": "|u1",
                     "shape": [len(labels), size, size, channels]}
    images = fill(parts, info, make)
    if rank == 0:
        if str(path).endswith(".png"):
            save_grid(images, path, columns)
        else:
            with runtime.atomic(path) as f:  # what ADM's evaluator reads
                np.savez(f, arr_0=images, labels=labels.numpy())
        with runtime.atomic(f"{path}.json") as f:
            f.write(json.dumps(record, indent=1).encode() + b"\n")
        shutil.rmtree(parts)
    runtime.barrier()


def save_grid(images, path, columns):
    """uint8 (N, H, W, 1 or 3) -> a PNG, `columns` a row, small ones enlarged to 48 pixels."""
    from PIL import Image
    images = np.pad(images, [(0, -len(images) % columns), (0, 0), (0, 0), (0, 0)],
                    constant_values=255)
    zoom = math.ceil(48 / images.shape[1])
    images = np.pad(images.repeat(zoom, 1).repeat(zoom, 2), [(0, 0), (1, 1), (1, 1), (0, 0)])
    n, height, width, channels = images.shape
    grid = images.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(n // columns * height, columns * width, channels)
    with runtime.atomic(path) as f:
        Image.fromarray(grid.squeeze(-1) if channels == 1 else grid).save(f, format="png")


def save_classes(images, labels, path, rows=None):
    """Up to ten classes, a row of up to ten images each, as a PNG.

    images: uint8 (M, H, W, C); labels: int64 (N,); rows: int64 (N,), where their images are.
    """
    rows = np.arange(len(labels)) if rows is None else rows
    classes = labels.unique()
    classes = classes[torch.linspace(0, len(classes) - 1, min(10, len(classes))).long()]
    found = [images[rows[(labels == label).numpy()][:10]] for label in classes]
    columns = max(map(len, found))
    blank = ((0, 0), (0, 0), (0, 0))
    filled = [np.pad(x, ((0, columns - len(x)), *blank), constant_values=255) for x in found]
    save_grid(np.concatenate(filled), path, columns)


# ---------------------------------------------------------------- command line

def parse_args(argv):
    p = runtime.command_line(__doc__)
    number = runtime.number
    add = p.add_argument
    positive = number("[1, inf)", int)
    either = p.add_mutually_exclusive_group().add_argument
    add("checkpoint", metavar="CKPT",
        help="a file, a run's folder, a DiTPipeline's, or its name on the hub")
    either("--labels", nargs="+", metavar="CLASS",
           help="classes to draw, by name or number (--labels=-x: one with a dash); in a .png a "
           "row each [.png: 0 to 9]")
    either("--class-labels", choices=["balanced", "random"],
           help="instead: all classes in turn, or drawn from --seed [.npz: balanced]")
    add("--num-samples", type=positive, metavar="N", help="number of images [8 per label]")
    add("--sampler", choices=SAMPLERS, metavar="NAME",
        help="SiT: euler-maruyama, euler or heun; DiT: ddpm or ddim [the first]")
    add("--steps", type=positive, default=250, metavar="N",
        help="network calls, heun 2N-1; DiT up to 1000 [%(default)s]")
    add("--w", type=number(), help="guidance scale of a scale-aware checkpoint, one pass [1]")
    add("--cfg", type=number(), default=1.0,
        help="classifier-free guidance, two passes; 1 is off [%(default)s]")
    add("--interval", type=number("[0, 1]"), nargs=2, default=[0.0, 1.0], metavar=("LO", "HI"),
        help="noise times at which --cfg acts, 1 is noise [0 1]")
    add("--seed", type=number("[0, 2147483647]", int), default=0,
        help="image i is drawn from seed * 2^32 + i [%(default)s]")
    add("--batch", type=positive, default=64, metavar="N",
        help="images at a time, per process [%(default)s]")
    add("--dtype", choices=["fp32", "bf16"], default="fp32",
        help="of the network's passes [%(default)s]")
    add("--raw", action="store_true",
        help="the trained weights, not the EMA: try it if a short run looks unfinished [off]")
    add("--vae", metavar="NAME", help="hub name or folder of the decoder [trained with]")
    add("--out", default="samples.png", metavar="FILE",
        help="a .png, or an .npz with arr_0 (uint8 NHWC) and labels [%(default)s]")
    args = p.parse_args(argv)
    if not args.out.endswith((".png", ".npz")):
        p.error(f"--out {args.out}: must end in .png or .npz")
    if Path(args.out).is_dir():
        p.error(f"--out {args.out}: is a folder")
    if args.interval != [0.0, 1.0] and args.cfg == 1:
        p.error("--interval: is where --cfg acts; give --cfg")
    if args.interval[0] >= args.interval[1]:
        p.error("--interval: LO must be below HI")
    return args


def choose_labels(args, classes):
    """-> (labels (num,) int64, the rule for the record, images in a row of a .png)."""
    if args.class_labels == "random":
        num = args.num_samples or 8 * len(classes)
        rng = np.random.default_rng(args.seed)
        return torch.from_numpy(rng.integers(len(classes), size=num)), "random", 10
    if args.class_labels or (args.out.endswith(".npz") and not args.labels):
        return balanced(args.num_samples or 8 * len(classes), len(classes)), "balanced", 10
    wanted = []
    names = [unicodedata.normalize("NFC", name) for name in classes]  # as typed or as on a disk
    for label in args.labels or []:
        name = unicodedata.normalize("NFC", label)
        if name in names:
            wanted.append(names.index(name))
        elif label.isdecimal() and int(label) < len(classes):
            wanted.append(int(label))
        else:
            known = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            hint = "; put spaces between classes" if "," in label else ""
            raise UserError(f"--labels {label}: neither a class of this checkpoint ({known}) nor a "
                            f"number from 0 to {len(classes) - 1}{hint}")
    wanted = wanted or [*range(min(10, len(classes)))]
    num = args.num_samples or 8 * len(wanted)
    if num % len(wanted):
        raise UserError(f"--num-samples {num}: must be a multiple of the {len(wanted)} labels")
    return torch.tensor(wanted).repeat_interleave(num // len(wanted)), "list", num // len(wanted)


def main(argv=None):
    args = parse_args(argv)
    rank, _, device = runtime.setup()
    weights = "model" if args.raw else "ema"
    model, config = load_checkpoint(args.checkpoint, weights=weights, device=device)
    labels, rule, columns = choose_labels(args, config["classes"])
    sampler = choose_sampler(args.sampler, model, args.steps)
    if args.w is not None and not model.scale_aware:
        raise UserError(f"--w {args.w}: this checkpoint was trained at one scale (no --w-range)")
    if args.cfg != 1 and config.get("num_labels"):
        raise UserError(f"--cfg {args.cfg}: this checkpoint has no empty class (--num-labels)")
    vae_name = args.vae or config["vae"]
    vae = models.load_vae(vae_name, device) if vae_name else None
    if vae and vae.config.latent_channels != model.in_channels:
        raise UserError(f"--vae {vae_name}: has {vae.config.latent_channels} channels, and this "
                        f"checkpoint {model.in_channels}")
    if rank == 0 and args.cfg != 1 and config.get("drop") == 0:
        print(f"warning: {args.checkpoint} was trained with --drop 0: CFG needs the empty class",
              file=sys.stderr)
    fewest, rival = FEWEST.get(sampler, (1, None))
    if rank == 0 and args.steps < fewest:
        print(f"warning: --steps {args.steps}: too few for {sampler}; give {fewest} or more, or "
              f"--sampler {rival}", file=sys.stderr)
    low, high = config.get("w_range") or (1, 1)
    if rank == 0 and args.w not in (None, 1) and not low <= args.w <= high:
        print(f"warning: --w {args.w} is outside of what was trained, {low} to {high}",
              file=sys.stderr)
    record = {"checkpoint": args.checkpoint, "step": config["step"], "weights": weights,
              "model": config["model"], "trained_w": config.get("w_range") or config["w"],
              "vae": vae_name, "class_labels": rule}
    write_samples(args.out, model, labels, args.seed, batch=args.batch, record=record, vae=vae,
                  dtype=args.dtype, columns=columns, sampler=sampler, steps=args.steps, w=args.w,
                  cfg=args.cfg, interval=args.interval)
    if rank == 0:
        print(f"{args.out}: {len(labels)} images, {sampler}, {args.steps} steps, cfg {args.cfg}, "
              f"seed {args.seed}")


if __name__ == "__main__":
    runtime.run(main)
