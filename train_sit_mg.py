"""SiT with Model-guidance (MG): `torchrun train_sit_mg.py --w 1.5`. Larger t is noisier, t in [0, 1]: x_t = (1-t) x_0 + t eps, and
the network predicts v = dx_t/dt = eps - x_0. (The paper's Eq. 6: u = x_0 - eps = -v; MG is linear, so nothing else changes.)

The whole algorithm is mg_loss() and the fenced training step. w = 1 is no guidance (Table 3's scale; Eq. 18 and 20 write our w-1
as w); label num_classes is the empty class; images are NCHW in [-1, 1], latents the VAE's times its scaling_factor.
Tang et al. 2025, "Diffusion Models without Classifier-free Guidance"; Peebles & Xie 2023 (DiT); Ma et al. 2024 (SiT).
"""
# ================================================================ the same in train_dit_mg.py and train_sit_mg.py: imports
import contextlib
import copy
import csv
import functools
import io
import itertools
import math
import os
import resource
import signal
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import fid
import models
from sample import save_classes, save_curves, together, write_samples

# ================================================================ this script's own: the path

KIND, T = "SiT", 1  # t is drawn from [0, T)

# ================================================================ the same in train_dit_mg.py and train_sit_mg.py: presets

PRESETS = {  # defaults by --data
    "digits": {"model": f"{KIND}-T/2", "image_size": 8, "vae": "none", "batch": 64, "lr": 4e-3, "ema": 0.995, "steps": 2400,
               "eval_every": 0, "eval_samples": 2000, "eval_steps": 50, "save_every": 800, "log_every": 50, "eval_batch": 500},
    "grid": {"model": "MLP", "image_size": 1, "vae": "none", "batch": 256, "lr": 3e-3, "ema": 0.995, "steps": 4000,
             "eval_every": 0, "eval_samples": 20_000, "eval_steps": 50, "save_every": 2000, "log_every": 100, "eval_batch": 2000},
    # the paper's ImageNet recipe
    "folder": {"model": f"{KIND}-XL/2", "image_size": 256, "vae": "stabilityai/sd-vae-ft-ema", "batch": 256, "lr": 1e-4,
               "ema": 0.9999, "steps": 400_000, "eval_every": 50_000, "eval_samples": 5000, "eval_steps": 250,
               "save_every": 10_000, "log_every": 100, "eval_batch": 64},
}


# ================================================================ this script's own: the corruption

def mg_loss(model, teacher, x0, y, w, *, drop=0.1, t_max=1.0, empty="class", num_labels=4,
            t=None, noise=None, dropped=None, order=None):
    """The loss of every sample, (N,). The unit to copy: of this file it needs nothing else.

    model(x_t (N, C, H, W), t (N,), y (N,)) -> (N, C, H, W), DiT also (N, 2C, H, W). It has num_classes; scale_aware, it takes w (N,) too.
    teacher: the EMA network (Eq. 18), the model itself (Eq. 20: its own output is reused), or None: plain diffusion.
    x0 (N, C, H, W); y (N,) int64; w: the guidance scale, 1 is off; (N,) for scale-aware models.
    drop: share of samples that get the empty class and the plain target; t_max: guide only where t <= t_max, in [0, 1].
    empty: "class", or "labels": estimate the unconditional output as the mean over num_labels other labels (Eq. 23).
    t (N,), noise like x0, dropped (N,) bool, order (N, num_classes - 1), random numbers that rank the other labels:
    drawn when None. ValueError: another empty, or num_labels that aren't fewer than the classes.
    """
    # 1. corrupt: x0, noise (N, C, H, W), t (N,) -> x_t, plain target (N, C, H, W); noise_time (N,) is t in [0, 1]
    noise = torch.randn_like(x0) if noise is None else noise
    t = noise_time = torch.rand(len(x0), device=x0.device) if t is None else t
    s = t.view(-1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * noise                                                                 # Eq. 4
    target = noise - x0                                                                            # Eq. 6: v = -u

    # ============================================================ the same in train_dit_mg.py and train_sit_mg.py: guide
    # 2. guide: the K samples that keep their label and have noise_time <= t_max, if w isn't 1
    net, C = getattr(model, "module", model), x0.shape[1]  # DDP hides attributes
    scale_aware = getattr(net, "scale_aware", False)
    if empty not in ("class", "labels") or (empty == "labels" and not 0 < num_labels < net.num_classes):
        raise ValueError(f"empty {empty!r} with num_labels {num_labels}: must be class, or labels with 1 to {net.num_classes - 1} of them")
    if dropped is None:
        dropped = torch.rand(len(x0), device=x0.device) < (drop if empty == "class" else 0)
    w = torch.as_tensor(w, dtype=target.dtype, device=x0.device).expand(len(x0))
    label = torch.where(dropped, net.num_classes, y)
    out = model(x_t, t, label, *([torch.where(dropped, 0, w)] if scale_aware else []))             # the student's pass
    k = (~dropped & (noise_time <= t_max) & (w != 1)).nonzero().squeeze(1)                         # (K,); a GPU is waited for
    if teacher is not None and len(k):
        if empty == "class":
            labels = torch.full_like(y[k, None], net.num_classes)                                  # (K, 1)
        else:  # num_labels distinct others, never the sample's own
            order = torch.rand(len(x0), net.num_classes - 1, device=x0.device) if order is None else order
            labels = (y[k, None] + 1 + order[k].argsort(1)[:, :num_labels]) % net.num_classes      # (K, num_labels)
        reuse = (teacher is model or teacher is net) and not scale_aware
        if not reuse:
            labels = torch.cat([y[k, None], labels], 1)                                            # (K, 1 + num_labels)
        L = labels.shape[1]
        scales = torch.ones_like(labels, dtype=w.dtype)
        scales[:, 1:] = float(empty != "class")                                                    # (c, 1), (empty, 0): Eq. 22; others at 1
        with torch.no_grad():  # one batched pass; sg(.) of Eq. 18, 20
            outs = getattr(teacher, "module", teacher)(x_t[k].repeat_interleave(L, 0), t[k].repeat_interleave(L),
                                                       labels.flatten(), *([scales.flatten()] if scale_aware else []))
            outs = outs[:, :C].unflatten(0, (len(k), L)).to(target.dtype)                          # (K, L, C, H, W)
            cond = out[k, :C].to(target.dtype) if reuse else outs[:, 0]                            # (K, C, H, W)
            uncond = outs[:, 0 if reuse else 1:].mean(1)                                           # of the empty class, or Eq. 23
            target[k] += (w[k] - 1).view(-1, 1, 1, 1) * (cond - uncond)                            # MG: Eq. 18, 20, 22
    # ============================================================ this script's own: the loss

    # 3. learn
    return (out - target).square().mean((1, 2, 3))                                                 # Eq. 19


# ================================================================ the same in train_dit_mg.py and train_sit_mg.py: the run

def parse_args(argv):
    """The command line with the preset of its --data filled in: (flags, parser)."""
    presets = "\n".join([f"{'preset of --data':20}" + "".join(f"{name:12}" for name in PRESETS)] + [
        f"  --{key.replace('_', '-'):16}" + "".join(f"{preset[key]!s:12}" for preset in PRESETS.values()) for key in PRESETS["digits"]])

    def number_or_auto(text):
        return text if text == "auto" else float(text)
    p = models.command_line(f"{__doc__}\n{presets}")
    g = p.add_argument_group("data")
    g.add_argument("--data", default="digits", help="digits (scikit-learn's scans, 8x8), grid (the 2-D points of Fig. 2) or a folder of "
                   "class folders of images [%(default)s]")
    g.add_argument("--image-size", type=int, metavar="PIXELS", help="a folder's images are cropped to this height and width [preset]")
    g.add_argument("--vae", metavar="NAME", help="hub name or folder of diffusers' AutoencoderKL; none: train on pixels [preset]")
    g.add_argument("--latents", metavar="DIR", help="encode all images once, into this folder (ImageNet-256: about 42 GB), and train "
                                                    "from it [encode in every step]")
    g.add_argument("--workers", type=int, default=min(4, os.cpu_count()), metavar="N", help="processes that read a folder's images "
                   "[up to 4]")
    g = p.add_argument_group("guidance")
    g.add_argument("--w", type=number_or_auto, help="guidance scale: 1 is off, w acts as CFG at 1/(2-w), 2 is the limit (Eq. 18, 20); "
                   "auto: found while training (Sec. 3.3) [1.5]")
    g.add_argument("--t-max", type=float, default=1.0, help="guide only at noise times up to this, 0 to 1; the authors: 0.75 "
                   "[%(default)s]")
    # torchrun takes a script's --start for its own --start-method, unless a "--" stands before the script
    g.add_argument("--start", "--start-step", type=int, default=0, metavar="STEPS", help="of plain training first; under torchrun "
                   "write --start-step; the authors: 100000 [%(default)s]")
    g.add_argument("--w-ramp", type=int, metavar="STEPS", help="over which w then rises from 1 to --w [0; with --init 1000]")
    g.add_argument("--teacher", choices=["ema", "online"], default="ema", help="whose outputs guide: the moving average's (Eq. 18), or "
                   "the trained network's own, which costs less (Eq. 20) [%(default)s]")
    g.add_argument("--drop", type=float, metavar="SHARE", help="of samples that train the empty class (Table 4) [0.1; with --empty "
                   "labels 0]")
    g.add_argument("--empty", choices=["class", "labels"], default="class", help="guide away from the empty class, or from the mean of "
                   "other labels, with no empty class (Eq. 23, Table 6) [%(default)s]")
    g.add_argument("--num-labels", type=int, metavar="N", help="how many other labels, with --empty labels (Eq. 23) [4]")
    g.add_argument("--w-range", type=float, nargs=2, metavar=("LO", "HI"), help="in place of --w: a scale-aware network, which takes "
                   "CFG's scale as an input, drawn from here (Eq. 21, 22, Table 5) [off]")
    g.add_argument("--auto-rule", choices=["probe", "paper"], help="--w auto rises at an evaluation where, probe: CFG 1.1 on top scores "
                   "better; paper: the score got worse since the last one; and falls at all others [probe]")
    g.add_argument("--auto-metric", choices=[*LOWER, *HIGHER], metavar="SCORE", help="that --w auto goes by: "
                   f"{', '.join([*LOWER, *HIGHER])} [fid; grid: outliers]")
    g.add_argument("--auto-step", type=float, metavar="SHARE", help="of the way to --auto-max, or back to 1, at an evaluation [0.1]")
    g.add_argument("--auto-max", type=float, metavar="W", help="bound of --w auto, below 2; 1.9 acts as CFG 10 [1.9]")
    g = p.add_argument_group("training")
    g.add_argument("--model", metavar="NAME", help=f"{KIND}-{{T,S,B,L,XL}}/{{2,4,8}}, or MLP [preset]")
    g.add_argument("--init", metavar="CKPT", help="start from these weights: ours, or DiT's, SiT's, REPA's, MG's files [random]")
    g.add_argument("--steps", type=int, metavar="N", help="training steps in all [preset]")
    g.add_argument("--batch", type=int, metavar="N", help="images a step, all processes together [preset]")
    g.add_argument("--accum", type=int, default=1, metavar="N", help="passes in which a process works off its share of a batch "
                   "[%(default)s]")
    g.add_argument("--lr", type=float, help="learning rate of AdamW, constant, no weight decay [preset]")
    g.add_argument("--ema", type=float, metavar="DECAY", help="of the moving average, a step [preset]")
    g.add_argument("--clip", type=float, metavar="NORM", help="scale longer gradients down to this norm [off]")
    g.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the networks' passes (autocast; fp32 is TF32 on GPUs "
                   "that have it); weights, average and loss are fp32 [%(default)s]")
    g.add_argument("--compile", action="store_true", help="torch.compile the network and its teacher [off]")
    g.add_argument("--recompute", action="store_true", help="compute activations twice, not keep them: less memory, slower [off]")
    g.add_argument("--seed", type=int, default=0, help="of the initial weights, data order, noise, times, dropped labels and evaluations "
                   "[%(default)s]")
    g = p.add_argument_group("evaluation, files")
    g.add_argument("--eval-every", type=int, metavar="STEPS", help="between evaluations; 0: at the end only [preset]")
    g.add_argument("--eval-samples", type=int, metavar="N", help="images drawn for one; 0: just those in samples.png, not scored [preset]")
    g.add_argument("--eval-steps", type=int, metavar="N", help="sampling steps of one [preset]")
    g.add_argument("--eval-batch", type=int, metavar="N", help="images drawn at once, per process [preset]")
    g.add_argument("--reference", metavar="FILE", help="what samples are scored against: an ADM .npz, one of fid.py --save-stats, or a "
                   "folder [--data]")
    g.add_argument("--save-every", type=int, metavar="STEPS", help="between checkpoints, which come before evaluations too; 0: at the end "
                   "only [preset]")
    g.add_argument("--log-every", type=int, metavar="STEPS", help="between rows of log.csv [preset]")
    g.add_argument("--peak", type=float, metavar="TFLOPS", help="of one GPU in bf16, for the MFU shown [known for some GPUs]")
    g.add_argument("--out", metavar="DIR", help="for ckpt.pt, log.csv, samples, curves.png; the same command again resumes "
                   "[out/MODEL-DATA-wW]")
    args = p.parse_args(argv)
    args.data = os.path.normpath(args.data)
    for key, value in PRESETS.get(args.data, PRESETS["folder"]).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.w_range and args.w is not None:
        p.error(f"--w {args.w}: must be left out with --w-range, which draws w")
    if not args.w_range and args.w is None:
        args.w = 1.5
    auto = args.w == "auto"
    if args.drop is None:
        args.drop = 0.1 if args.empty == "class" else 0.0
    for flag, needed, there, default in [  # a flag without what it belongs to would silently do nothing
            ("auto_rule", "--w auto", auto, "probe"), ("auto_step", "--w auto", auto, 0.1),
            ("auto_metric", "--w auto", auto, "outliers" if args.data == "grid" else "fid"), ("auto_max", "--w auto", auto, 1.9),
            ("num_labels", "--empty labels", args.empty == "labels", 4)]:
        if getattr(args, flag) is None:
            setattr(args, flag, default if there else None)
        elif not there:
            p.error(f"--{flag.replace('_', '-')}: only with {needed}")
    if args.w_ramp is None:
        args.w_ramp = 1000 if args.init and not args.w_range and not auto else 0
    if args.out is None:
        scale = "-".join(map(str, args.w_range)) if args.w_range else args.w
        args.out = f"out/{args.model.replace('/', '-')}-{Path(args.data).name}-w{scale}"
    metrics = ["outliers", "coverage"] if args.data == "grid" else [
        "fid", "sfid", "is", "precision", "recall"] + ["accuracy"] * (args.data == "digits")
    for flag, ok, rule in [
            ("--w", args.w_range or auto or math.isfinite(args.w), "a number, or auto"),
            ("--auto-metric", not auto or args.auto_metric in metrics, f"one of {', '.join(metrics)} with this --data"),
            ("--reference", args.reference is None or args.data != "grid", "left out with --data grid, which is known exactly"),
            ("--auto-step", not auto or 0 < args.auto_step <= 1, "above 0, up to 1"),
            ("--auto-max", not auto or 1 < args.auto_max < 2, "between 1 and 2, where MG has no bound"),
            ("--auto-rule", args.auto_rule != "probe" or args.empty == "class", "paper with --empty labels: CFG needs the empty class"),
            ("--eval-every", not auto or args.eval_every > 0, "above 0 with --w auto, which goes by the evaluations"),
            ("--eval-samples", not auto or args.eval_samples > 0, "above 0 with --w auto, which goes by the evaluations"),
            ("--w-ramp", not auto or not args.w_ramp, "left out with --w auto, which starts at 1"),
            ("--w-range", args.w_range is None or 1 <= args.w_range[0] < args.w_range[1] < math.inf, "1 <= LO < HI"),
            ("--drop", 0 <= args.drop < 1, "0 up to, not with, 1"),
            ("--drop", args.empty == "class" or not args.drop, "left out with --empty labels, which has no empty class"),
            ("--t-max", 0 <= args.t_max <= 1, "0 to 1"),
            ("--w-ramp", not (args.w_ramp and args.w_range), "left out with --w-range, which draws w"),
            ("--ema", 0 <= args.ema < 1, "0 up to, not with, 1"),
            ("--lr", 0 < args.lr < math.inf, "above 0"),
            ("--clip", args.clip is None or 0 < args.clip < math.inf, "above 0"),
            ("--peak", args.peak is None or 0 < args.peak < math.inf, "above 0"),
            ("--recompute", not args.recompute or args.model != "MLP", "left out with the MLP, which has no blocks"),
            ("--seed", 0 <= args.seed < 2 ** 31, "0 to 2^31 - 1"),
            ("--eval-steps", KIND == "SiT" or args.eval_steps <= T, f"at most {T}"),
            *((f"--{name.replace('_', '-')}", getattr(args, name) >= 1, "at least 1")
              for name in ("image_size", "steps", "batch", "accum", "eval_steps", "eval_batch", "log_every")),
            *((f"--{name.replace('_', '-')}", getattr(args, name) >= 0, "0 or more")
              for name in ("start", "w_ramp", "eval_every", "eval_samples", "save_every", "workers")),
            ("--num-labels", args.num_labels is None or args.num_labels >= 1, "at least 1"),
            ("--eval-samples", args.eval_samples not in (1, 2, 3), "0, or at least 4"),
            ("--reference", args.reference is None or args.eval_samples, "left out with --eval-samples 0, which scores nothing")]:
        if not ok:
            p.error(f"{flag} {getattr(args, flag[2:].replace('-', '_'))}: must be {rule}")
    return args, p


DRAWN = 0.2  # share of a batch that draws a scale in a scale-aware run; --drop is (empty, 0), the rest is at 1 (the authors)
# Flags that may change when a run is resumed: they don't change what is trained.
FREE = {"out", "steps", "accum", "compile", "recompute", "peak", "workers", "eval_every", "eval_samples", "eval_steps", "reference",
        "eval_batch", "save_every", "log_every"}
LOWER, HIGHER = ("fid", "sfid", "outliers"), ("is", "precision", "recall", "accuracy", "coverage")  # scores, by what is better
COLUMNS = ["step", "loss", "images_per_s", "w", *LOWER, *HIGHER]  # of log.csv
PROBE = 1.1  # the CFG scale that --w auto tries on top
# TFLOP/s, dense, in bf16 (V100: fp16)
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165, "V100": 125}


def sampler(n, batch, micro, first_step, rank, world, seed):
    """Indices of this process's parts of the global batches, (micro,) each, from first_step on, without end.

    The order is a function of seed alone: image k of the run, k = step * batch + i, is number k % n of epoch k // n.
    """
    orders = (torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, 1, epoch))).tolist()
              for epoch in itertools.count(first_step * batch // n))
    images = itertools.islice(itertools.chain.from_iterable(orders), first_step * batch % n, None)
    while True:  # what all processes take next, and of it the part of this one
        yield list(itertools.islice(images, world * micro))[rank * micro:(rank + 1) * micro]


def mix(*numbers):
    """Numbers -> a seed; torch's CPU generator takes 32 bits of it."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextlib.contextmanager
def own_signals():
    """Inside, SIGTERM and SIGINT end the process at once, until listen() says otherwise; then the caller's handlers are back."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def obey_parent(parent, _):
    """A loader's process outlives a signal to the whole job, so that the step can be finished; it obeys its parent's (a pid) alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:  # the parent's comes when it exits
            pass
        os._exit(0)
    threading.Thread(target=obey, daemon=True).start()


@own_signals()
def main(argv=None):
    args, parser = parse_args(argv)
    cuda, ddp = torch.cuda.is_available(), "RANK" in os.environ  # torchrun sets RANK
    if ddp:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # gloo: what they agree on; nccl: gradients
    rank, world = (dist.get_rank(), dist.get_world_size()) if ddp else (0, 1)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    out, micro = Path(args.out), args.batch // (world * args.accum)

    bar = None

    def stop(error):
        """Ends the run with one line. If all processes know the error, the first one says it."""
        if bar is not None:
            bar.close()
        line = str(error).strip().rpartition("\n")[2].removeprefix("ValueError: ")  # a worker's has its traceback above it
        shared = getattr(error, "shared", isinstance(error, str))
        parser.exit(2, None if rank and shared else f"{parser.prog}: error: {line}\n")

    @contextlib.contextmanager
    def stopping():
        """What goes wrong inside ends the run with its line; with together(), in all processes."""
        try:
            yield
        except (ValueError, OSError) as e:
            stop(e)

    # ---------------- everything that depends on the user's input, before anything is written
    with stopping(), together():
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: must be a folder, and is a file")
        if args.batch % (world * args.accum):
            raise ValueError(f"--batch {args.batch}: must be a multiple of processes times --accum, {world} x {args.accum}")
        if args.data in ("digits", "grid"):
            size = PRESETS[args.data]["image_size"]
            if args.image_size != size:
                raise ValueError(f"--image-size {args.image_size}: {args.data} has {size}")
            if args.vae != "none":
                raise ValueError(f"--vae {args.vae}: {args.data} has no three colours to encode; leave --vae out")
        images = models.grid_data() if args.data == "grid" else fid.real_images(args.data, args.image_size)
        vae = None if args.vae == "none" else models.load_vae(args.vae, device)
        sample, _ = images[0]                                                                      # (C, H, W)
        shape = models.encode(vae, sample[None].to(device) / 127.5 - 1)[0].shape[1:] if vae else sample.shape  # (c, h, w)
        if args.latents and not vae:
            raise ValueError(f"--latents {args.latents}: there are none without a VAE; give --vae, or leave --latents out")
        latents = models.Latents(args.latents, images, vae, args.vae, shape) if args.latents else None
        kwargs = {"input_size": shape[1], "in_channels": shape[0], "num_classes": len(images.classes),
                  "scale_aware": args.w_range is not None, "empty_class": args.empty == "class", "freq_divisor": 127, "kind": KIND}
        if args.empty == "labels" and args.num_labels >= kwargs["num_classes"]:
            raise ValueError(f"--num-labels {args.num_labels}: must be less than the number of classes, {kwargs['num_classes']}")
        path = out / "ckpt.pt"
        checkpoint, source, warning = models.read_last(path)
        if checkpoint:
            kwargs["freq_divisor"] = checkpoint["config"].get("freq_divisor", 127)
        torch.manual_seed(args.seed)
        if args.init and not checkpoint:
            model, warning = models.initialize_from(args.init, args.model, kwargs)
        else:
            model = models.create_model(args.model, **kwargs)
        if model.kind != KIND:
            raise ValueError(f"--model {args.model}: this script trains {KIND}; train_{model.kind.lower()}_mg.py trains that")
        # what the weights depend on, and all that sample.py needs to know
        free = FREE - {"eval_every", "eval_samples", "eval_steps", "reference"} if args.w == "auto" else FREE
        config = {key: value for key, value in vars(args).items() if key not in free} | kwargs | {"images": len(images)}
        if checkpoint:
            for key, value in checkpoint["config"].items():
                if config.get(key) != value:
                    raise ValueError(f"--out {out} holds a run with {key} {value}, not {config.get(key)}: "
                                     f"give the same flags to resume it, or another --out")
            if checkpoint["step"] > args.steps:
                raise ValueError(f"--steps {args.steps}: the run in --out {out} is at step {checkpoint['step']} already")
        cost = models.flops(model)
        model = model.to(device)
        model.recompute = args.recompute
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0, fused=True)
        first, auto = 0, {"w": 1.0, "score": None}  # of an automatic w: now, and at the last evaluation
        if checkpoint:
            first = checkpoint["step"]
            try:
                auto = checkpoint["auto"] if args.w == "auto" else auto
                model.load_state_dict(checkpoint["model"])
                ema.load_state_dict(checkpoint["ema"])
                optimizer.load_state_dict(checkpoint["optimizer"])
            except (KeyError, TypeError, ValueError, RuntimeError) as e:
                raise ValueError(f"--out {out}: its ckpt.pt is not whole ({type(e).__name__}); give another --out") from None
        if rank == 0:
            print(textwrap.fill(" ".join(f"{key}={value}" for key, value in sorted((vars(args) | kwargs).items())), 128,
                                break_on_hyphens=False, break_long_words=False))
            print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(images)} images of "
                  f"{len(images.classes)} classes, {world} x {device.type}" + (f", resuming from step {first}" if first else ""))
            print(describe_w(args, len(images.classes)), *([warning] if warning else []), sep="\n", flush=True)
    seen = torch.tensor([first, -first])
    if ddp:
        dist.all_reduce(seen, dist.ReduceOp.MAX)
    if seen.sum():
        stop(f"--out {out}: at step {seen[0]} for one process and {-seen[1]} for another; it must be a folder that all machines share")
    with stopping():
        if args.eval_samples and args.data != "grid":
            reference = fid.load_reference(args.reference or args.data, "digits" if args.data == "digits" else "inception",
                                           size=args.image_size, progress=len(images) > 10_000)
        if latents:
            latents.fill(images, vae, args.workers)
    with stopping(), together():
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            if checkpoint and source != path:
                os.replace(source, path)  # or the next checkpoint would put the corrupt one in the place of the good one
    window = checkpoint.get("window", torch.empty(0)) if checkpoint else torch.empty(0)  # losses since the last row of log.csv
    del checkpoint
    net = torch.compile(model) if args.compile else model
    net = DistributedDataParallel(net, forward_sync_buffers=False) if world > 1 else net
    teacher = net if args.teacher == "online" else torch.compile(ema) if args.compile else ema
    weights, ema_weights = [w.detach() for w in model.parameters()], list(ema.parameters())  # detached: no graph of averages
    order = sampler(len(images), args.batch, micro, first, rank, world, args.seed)
    if args.data in ("digits", "grid"):  # in memory
        inputs, labels = images.tensors if args.data == "grid" else (images.images, torch.tensor(images.labels))
        data, reading = ((inputs[part], labels[part]) for part in order), contextlib.nullcontext
    else:
        batches = {"sampler": order, "batch_size": None} if latents else {"batch_sampler": order}  # latents come a batch at a time
        data, reading = iter(DataLoader(latents or images, **batches, num_workers=args.workers, pin_memory=cuda,
                                        worker_init_fn=functools.partial(obey_parent, os.getpid()))), together
    # ---------------- logging and evaluation
    rows, started = [], time.perf_counter()

    def write_log():
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        with models.atomic(out / "log.csv") as f:
            f.write(text.getvalue().encode())

    def due(step):
        return step == args.steps or (args.eval_every and step % args.eval_every == 0)

    def evaluate(step):
        """Draws with the EMA, one pass a step, in all processes; scores; writes samples and pictures. All else is saved."""
        path, classes = out / "samples.npz", len(images.classes)
        rows_of = torch.linspace(0, classes - 1, min(classes, 10)).long()  # the classes that samples.png shows, a row each
        labels = torch.arange(args.eval_samples) % classes if args.eval_samples else rows_of.repeat(10)
        w = args.w_range or (auto["w"] if args.w == "auto" else args.w)

        def score(path, cfg):
            write_samples(path, ema, labels, args.seed, batch=args.eval_batch, vae=vae, cfg=cfg,
                          record={"checkpoint": str(out / "ckpt.pt"), "step": step, "weights": "ema", "model": args.model,
                                  "trained_w": w, "vae": args.vae, "class_labels": "balanced", "labels": None},
                          steps=args.eval_steps, w=sum(args.w_range) / 2 if args.w_range else None, go_on=False)
            if not args.eval_samples:
                return {}
            if args.data == "grid":
                return models.grid_scores(torch.from_numpy(np.load(path)["arr_0"]), labels)
            return fid.evaluate(path, reference, labels=labels)
        metrics = score(path, 1.0)
        if args.w == "auto" and step >= args.start and step < args.steps:
            # 3.3: w moves as a moving average towards its bounds. The paper's words, "raised when quality decreases and suppressed
            # otherwise", can't tell guidance from training; ours asks the network: what would a little more guidance do?
            sign, now = -1 if args.auto_metric in LOWER else 1, metrics[args.auto_metric]
            if args.auto_rule == "probe":
                more = sign * score(out / "probe.npz", PROBE)[args.auto_metric] > sign * now
            else:
                more = auto["score"] is not None and sign * now < sign * auto["score"]
            auto.update(w=auto["w"] + args.auto_step * ((args.auto_max if more else 1) - auto["w"]), score=now)
        with together():
            if rank == 0:
                for name in "probe.npz", "probe.json":
                    (out / name).unlink(missing_ok=True)
                if not rows or int(rows[-1]["step"]) != step:  # log.csv was lost
                    rows.append({"step": step})
                rows[-1] |= metrics
                write_log()
                if metrics:
                    shown = f"{sum(w) / 2} of {w}" if args.w_range else round(w, 3)
                    tqdm.write(f"\n| {args.eval_samples} samples, {args.eval_steps} steps, one pass each | {' | '.join(metrics)} |\n"
                               f"|---{'|---' * len(metrics)}|\n| {args.model} at step {step}, w {shown} | "
                               + " | ".join(f"{value:.3f}" for value in metrics.values()) + " |")
                save_classes(np.load(path)["arr_0"], labels, rows_of, out / "samples.png")
                save_curves(rows, out / "curves.png")

    # ---------------- a signal in a step is noted, to finish the step and save it; at other times all is saved, and it ends the process
    signals = []

    def listen(on):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, (lambda number, _: signals.append(number)) if on else signal.SIG_DFL)
        if signals and not on:  # it came after the last step that asked
            os.kill(os.getpid(), signals[0])

    def uniform(*shape):
        return torch.rand(args.batch, *shape, generator=generator, device=device)

    peak = args.peak or next((peak for name, peak in PEAKS.items() if cuda and name in torch.cuda.get_device_name()), None)
    kept = (DRAWN if args.w_range else 1 - args.drop if args.w != 1 else 0) * args.t_max  # the share that is guided
    teaching = (args.num_labels if args.empty == "labels" else 1) + (args.teacher == "ema" or args.w_range is not None)
    generator, losses, norms, begin, done = torch.Generator(device), [], [], time.perf_counter(), first
    with stopping(), together():
        if not out.is_dir():
            raise ValueError(f"--out {out}: must be a folder that all machines share")
        if rank == 0:
            if first and (out / "log.csv").exists():
                try:
                    with open(out / "log.csv", newline="") as f:
                        rows += [row for row in csv.DictReader(f) if int(row["step"]) <= first]
                except (KeyError, TypeError, ValueError):
                    raise ValueError(f"{out / 'log.csv'}: not of this project, or torn; delete it") from None
            write_log()
    if first and due(first):  # ended during this evaluation, or before
        with stopping():
            evaluate(first)
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=rank > 0, unit="step")
    listen(True)
    for step in bar:
        # ======================================================== the same in train_dit_mg.py and train_sit_mg.py: the training step
        generator.manual_seed(mix(args.seed, 0, step))  # everything is drawn for the global batch: any split gives the same
        draws = {"t": T * uniform(), "dropped": uniform() < args.drop,
                 "noise": torch.randn(args.batch, *shape, generator=generator, device=device)}
        if args.empty == "labels":
            draws["order"] = uniform(len(images.classes) - 1)
        if args.w_range:  # of the batch, 20 % draw a scale, the dropped ones are (empty, 0), the rest are at 1
            lo, hi = args.w_range
            w = torch.where(uniform() < DRAWN / (1 - args.drop), lo + (hi - lo) * uniform(), 1.0)
        else:
            risen = 0 if step < args.start else min(1, (step + 1 - args.start) / args.w_ramp) if args.w_ramp else 1
            scale = auto["w"] if args.w == "auto" else args.w
            w = torch.full((args.batch,), 1 + (scale - 1) * risen, device=device)
        flip = uniform(1, 1, 1) < (0 if args.data in ("digits", "grid") else 0.5)
        posterior = torch.randn(args.batch, *shape, generator=generator, device=device) if vae else None
        for a in range(args.accum):
            part = slice((a * world + rank) * micro, (a * world + rank + 1) * micro)
            with stopping(), reading():  # an image that can't be read
                x, y = next(data)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            if latents:
                mean, std = torch.where(flip[part, None], x[:, 1], x[:, 0]).float().unbind(1)
            else:
                x = x / 127.5 - 1 if x.dtype == torch.uint8 else x
                x0 = torch.where(flip[part], x.flip(-1), x)
                if vae:
                    mean, std = models.encode(vae, x0)
            if vae:
                x0 = mean + std * posterior[part]
            sync = net.no_sync() if world > 1 and a < args.accum - 1 else contextlib.nullcontext()
            with sync, torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                loss = mg_loss(net, teacher if step >= args.start else None, x0, y, w[part], t_max=args.t_max,
                               empty=args.empty, num_labels=args.num_labels,
                               **{key: value[part] for key, value in draws.items()}).mean() / args.accum
                loss.backward()
            losses.append(loss.detach())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        if args.clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), args.clip, norms[-1])
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema_weights, weights, 1 - args.ema)
        # ======================================================== the same in train_dit_mg.py and train_sit_mg.py: log, evaluate, save
        step += 1
        ended = torch.tensor(signals[:1] or [0])
        if ddp:
            dist.all_reduce(ended, dist.ReduceOp.MAX)  # a signal in one process is one for all; on the CPU, the GPU works on
        ended = int(ended)
        saving = step == args.steps or (args.save_every and (due(step) or step % args.save_every == 0))
        logging = saving or due(step) or step % args.log_every == 0
        if not (logging or ended):
            continue
        new = torch.stack([torch.stack(losses).view(-1, args.accum).sum(1), torch.stack(norms)])   # (2, steps since last here)
        if ddp:
            dist.all_reduce(new)
            new /= world
        finite = new.isfinite().all(0)
        if saving or ended:
            finite = torch.cat([finite, torch.stack([p.isfinite().all() for p in weights]).all()[None]])
        if not finite.all():
            bad = min(done + 1 + int((~finite).nonzero()[0]), step)
            stop(f"the loss or the gradient of step {bad}, or a weight after it, is not finite; the last good checkpoint stays "
                 f"in --out {out}. Lower --lr or --w, give --clip, or use --dtype fp32")
        window = torch.cat([window, new[0].cpu()])
        if logging:
            speed = (step - done) * args.batch / (time.perf_counter() - begin)
            rows.append({"step": step, "loss": float(window.mean()), "images_per_s": round(speed, 1),
                         "w": None if args.w_range else round(float(w[0]), 6)})
            passes = 3 + (kept * teaching if step > args.start else 0)  # useful ones: the student's, its backward worth 2, the teacher's
            mfu = speed * cost * passes / (world * (peak or math.inf) * 1e12)
            most = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            bar.set_postfix_str(f"loss {rows[-1]['loss']:.4f}, gradient {new[1].mean():.3g}, {speed:.4g} images/s, MFU "
                                f"{f'{mfu:.1%}' if peak else 'unknown'}, {most / 1e9:.1f} GB")
            window = torch.empty(0)
        losses, norms, done = [], [], step
        with stopping():
            with together():
                if rank == 0 and logging:  # before the checkpoint: a run that goes on from this step has its row
                    write_log()
                if rank == 0 and (saving or ended):
                    models.save_checkpoint(path, {"config": config, "step": step, "model": model.state_dict(), "window": window,
                                                  "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
                                           | ({"auto": auto} if args.w == "auto" else {}))
            if ended:
                bar.close()
                parser.exit(128 + ended, None if rank else f"{signal.Signals(ended).name}: step {step} is saved in {path}; the "
                                                           f"same command goes on from there\n")
            if due(step):
                if saving:
                    listen(False)
                evaluate(step)
                listen(True)
            begin = time.perf_counter()
    bar.close()
    if rank == 0:
        print(f"\n{args.steps - first} steps and the evaluation in {time.perf_counter() - started:.0f} s; {out} has ckpt.pt, log.csv, "
              f"curves.png, samples.png, samples.npz")
    if ddp:
        del net, teacher  # DDP before its process group: else their ends can wait for each other (gloo's threads for the GIL)
        dist.destroy_process_group()


def describe_w(args, classes):
    """The line that says what --w means for this run."""
    if args.w_range:
        return f"scale-aware: one network for guidance scales {args.w_range[0]} to {args.w_range[1]}, chosen when sampling"
    if args.w == "auto":
        rule = f"CFG {PROBE} on top scores a better {args.auto_metric}" if args.auto_rule == "probe" else f"{args.auto_metric} got worse"
        return (f"automatic w: from 1, at each evaluation {args.auto_step} of the way to {args.auto_max} where {rule}, "
                f"as much of the way back to 1 otherwise")
    # out(c) = out*(c) + (w-1) (out(c) - uncond); with --empty labels, uncond moves too: it is the mean of the other classes
    gain, around = (1, "") if args.empty == "class" else (classes / (classes - 1), ", around the mean of the classes")
    effective = 1 - (args.w - 1) * gain
    if args.w < 1:
        return (f"warning: --w {args.w} guides less than plain training, as CFG at {1 / effective:.2f}; 1 is off (Eq. 18 and 20 write "
                f"w - 1 as w)")
    if effective <= 0:
        return (f"warning: at --w {args.w} the effective guidance scale has no bound (it has below {1 + 1 / gain:.3g}): it grows for "
                f"as long as the run lasts, the slower the EMA the slower. The paper's best is 1.5")
    scope = "" if args.t_max == 1 else f", at noise times up to {args.t_max}"
    if args.w != 1 and args.empty == "class" and not args.drop and not args.init:
        scope += "; warning: --drop 0 never trains the empty class that guides"
    formula = "1/(2-w)" if gain == 1 else f"1/(1 - (w-1) {classes}/{classes - 1})"
    return (f"effective guidance scale: MG at w {args.w} acts as classifier-free guidance at {formula} = {1 / effective:.2f}"
            f"{around}{scope}")


if __name__ == "__main__":
    models.run(main)
