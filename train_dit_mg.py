"""DiT with Model-guidance (MG): `torchrun train_dit_mg.py --w 1.5`.

Larger t is noisier: t in 0..999, x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, and the network
predicts eps and, in C more channels, the variance's interpolation (improved DDPM, Eq. 15).
Guidance scale w = 1 is off (the scale of Table 3; Eq. 18 and 20 write our w - 1 as w). Label
num_classes is the empty class. Images are NCHW in [-1, 1], latents the VAE's times scaling_factor.

The algorithm is mg_loss(), and the step in train(). The same command resumes.

Tang et al. 2025, "Diffusion Models without Classifier-free Guidance"; Peebles & Xie 2023 (DiT);
Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models".
"""
# ================================================ the same in train_dit_mg.py and train_sit_mg.py
import contextlib
import copy
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoints
import fid
import models
from data import Data
from sample import balanced, save_classes, save_curves, save_log, write_samples

# ================================================ DiT's own
KIND, DIGITS_STEPS = "DiT", 1600


def draw_t(n, generator):
    """The times of n samples, (n,): uniform in 0..999."""
    return torch.randint(1000, (n,), generator=generator)


def variational_bound(x0, noise, eps, v, t):
    """What the variance channels learn from, in bits a dimension: (N,). Guidance doesn't affect it.

    x0, noise, eps, v (N, C, H, W); t (N,) int64. eps, the network's noise, gives the mean of p; v
    in [-1, 1] gives its log variance, between the posterior's and log beta (improved DDPM, Eq. 15).
    t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). t = 0: -log p of the 8-bit value that x0
    stands for, with the exact normal CDF (ADM's code approximates it by a tanh).
    """
    x0, noise, eps, v = (x.double() for x in (x0, noise, eps, v))
    betas, abars = models.schedule(x0.device)
    beta, abar = betas[t].view(-1, 1, 1, 1), abars[t].view(-1, 1, 1, 1)
    # The posterior's variance, beta (1 - abar_{t-1}) / (1 - abar), is 0 at t = 0: t = 1's there.
    variances = betas[1:] * (1 - abars[:-1]) / (1 - abars[1:])
    log_posterior_variance = variances[(t - 1).clamp(min=0)].log().view(-1, 1, 1, 1)
    log_var = log_posterior_variance + (v + 1) / 2 * (beta.log() - log_posterior_variance)
    # The mean of q minus the mean of p is sqrt(abar_{t-1}) beta / (1 - abar) (x0 - x0_hat), and
    # x0 - x0_hat = sqrt(1 - abar) / sqrt(abar) (eps_hat - eps), by Eq. 1.
    mean_difference = beta / ((1 - abar) * (1 - beta)).sqrt() * (eps - noise)
    kl = 0.5 * (log_var - log_posterior_variance - 1 + (log_posterior_variance - log_var).exp()
                + mean_difference.square() * (-log_var).exp())

    def cdf(x):  # of p, whose mean at t = 0 is x0 - mean_difference
        return torch.special.ndtr((x - x0 + mean_difference) * (-log_var / 2).exp())
    upper = torch.where(x0 > 0.999, 1, cdf(x0 + 1 / 255))
    lower = torch.where(x0 < -0.999, 0, cdf(x0 - 1 / 255))
    nll = -(upper - lower).clamp(min=1e-12).log()
    bound = torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl)
    return bound.mean((1, 2, 3)).float() / np.log(2)


# ================================================ the same in train_dit_mg.py and train_sit_mg.py
def mg_loss(model, teacher, x0, y, w, *, t, noise, dropped, null=None, guide=None, share=1.0,
            t_max=1.0, others=None):
    """The loss of each sample, (N,). The unit to copy; it draws nothing itself.

    model(x_t (N, C, H, W), t (N,), y) -> (N, C, H, W); DiT's has C more channels, the variances.
    teacher: the EMA network (Eq. 18); the model, bare or wrapped by DDP or torch.compile, whose
        output is reused (Eq. 20); None: plain diffusion. Under DDP pass the bare network.
    x0 (N, C, H, W): data; y: labels (N,) int64, or any other condition (N, ...).
    w: guidance scale, a number or (N,); 1 is off. Scale-aware: the model also takes it (Eq. 21).
    t (N,), noise (like x0): the time and noise of each sample.
    dropped (N,) bool: who gets the empty condition and the plain target. If your own code drops
        labels too, they are dropped twice: turn that off, but keep its empty class.
    null: the empty condition, broadcast over the batch; None: the label model.num_classes.
    guide (N,) bool, share: which samples get the guidance term, and the probability of that;
        None: all of them.
    t_max: guide only at noise times up to this, 0 to 1.
    others (N, L): L labels, distinct and not y, in place of the empty condition (Eq. 23).
    """
    def move(draw):  # via pinned memory, so that CPU draws are copied without synchronising
        draw = draw.pin_memory() if x0.is_cuda and not draw.is_cuda else draw
        return draw.to(x0.device, non_blocking=True)

    def unwrap(module):  # DDP(torch.compile(network)) -> network
        module = getattr(module, "module", module)
        return getattr(module, "_orig_mod", module)

    # ============================================ DiT's own
    # 1. corrupt: x_t and the plain target, (N, C, H, W) each
    noise_time, t = t / 1000, move(t).long()
    abar = models.schedule(x0.device)[1][t].view(-1, 1, 1, 1)
    x_t = abar.sqrt().to(x0.dtype) * x0 + (1 - abar).sqrt().to(x0.dtype) * noise   # Eq. 1
    target = noise.clone()                                                         # Eq. 3

    # ============================================ the same in train_dit_mg.py and train_sit_mg.py
    # 2. guide: the K samples that keep their label, have noise_time <= t_max and w != 1
    if share != 1 and guide is None:
        raise ValueError("share needs guide, the samples that get the term")
    net, C, place = unwrap(model), x0.shape[1], dropped.device
    w = torch.as_tensor(w, dtype=target.dtype).expand(len(x0)).contiguous()
    guided = ~dropped & (noise_time.to(place) <= t_max) & (w.to(place) != 1)
    if guide is not None:
        guided &= guide.to(place)
    k = move(guided.nonzero().squeeze(1))                                          # (K,)
    w, dropped, y = move(w), move(dropped), move(y)
    null = torch.full_like(y[:1], net.num_classes) if null is None else move(null)
    label = torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), null, y)
    scale_aware = getattr(net, "scale_aware", False)
    out = model(x_t, t, label, *([torch.where(dropped, 0, w)] if scale_aware else []))

    def teach(condition, scale):  # not through DDP: it would wait for the other processes
        scales = [torch.full_like(w[k], scale)] if scale_aware else []
        out_k = getattr(teacher, "module", teacher)(x_t[k], t[k], condition, *scales)
        return out_k[:, :C].to(target.dtype)                                       # (K, C, H, W)

    if teacher is not None and len(k):
        with torch.no_grad():                                                      # sg(.)
            if unwrap(teacher) is net and not scale_aware:  # the student's own output
                cond = out[k, :C].to(target.dtype)
            else:
                cond = teach(y[k], 1)
            if others is None:
                uncond = teach(null.expand_as(y)[k], 0)  # scale-aware: (empty, 0), Eq. 22
            else:  # Eq. 23
                uncond = sum(teach(other, 1) for other in move(others)[k].T) / others.shape[1]
            # The minimiser of a squared loss depends only on the target's mean: guiding a random
            # share of the samples, scaled by 1/share, keeps that mean.
            w_k = w[k].view(-1, 1, 1, 1)
            target[k] += (w_k - 1) / share * (cond - uncond)                       # Eq. 18, 20, 22

    # ============================================ DiT's own
    # 3. learn
    loss = (out[:, :C] - target).square().mean((1, 2, 3))                          # Eq. 17
    if out.shape[1] > C:
        loss = loss + variational_bound(x0, noise, out[:, :C].detach(), out[:, C:], t)
    return loss


# ================================================ the same in train_dit_mg.py and train_sit_mg.py
PRESETS = {  # by the kind of --data
    "digits": {  # scikit-learn's 8x8 scans, on a laptop
        "model": f"{KIND}-T/2", "batch": 64, "lr": 4e-3, "ema": 0.995, "steps": DIGITS_STEPS,
        "eval_every": 0, "eval_samples": 2000, "eval_steps": 50, "eval_batch": 500,
        "save_every": 400, "log_every": 50},
    "pixels": {  # small images of your own
        "model": f"{KIND}-T/2", "batch": 32, "lr": 2e-3, "ema": 0.999, "steps": 8000,
        "eval_every": 0, "eval_samples": 2000, "eval_steps": 50, "eval_batch": 50,
        "save_every": 500, "log_every": 50},
    "latents": {  # the paper's ImageNet recipe
        "model": f"{KIND}-XL/2", "batch": 256, "lr": 1e-4, "ema": 0.9999, "steps": 400_000,
        "eval_every": 50_000, "eval_samples": 5000, "eval_steps": 250, "eval_batch": 64,
        "save_every": 10_000, "log_every": 100},
}
AUTO_CFG, AUTO_RATE, AUTO_MAX = 1.1, 0.1, 1.9  # --w auto: CFG on top; moving average; its ceiling
DRAWN = 0.2  # --w-range: share of all samples that draw a scale; the rest is at 1 (the authors)
RAMP = 1000  # --init: steps over which w ramps up
# Flags that may differ when a run is resumed: they don't change what is trained.
FREE = ["data", "init", "steps", "accum", "compile", "recompute", "eval_batch", "save_every",
        "log_every", "weights", "out"]
EVALUATION = ["eval_every", "eval_samples", "eval_steps", "reference"]  # free but for --w auto


def parse_args(argv):
    """-> the flags, with the preset's values where none is given, and the Data."""
    number = models.number
    count, positive = number("[0, inf)", int), number("[1, inf)", int)

    def scale(text):
        return text if text in ("auto", "auto-paper") else number()(text)
    scale.__name__ = "number, auto or auto-paper"
    rows = ["preset by the kind of --data: " + "".join(f"{kind:10}" for kind in PRESETS)]
    for key in PRESETS["digits"]:
        values = "".join(f"{preset[key]!s:10}" for preset in PRESETS.values())
        rows.append(f"  --{key.replace('_', '-'):26} {values}")
    p = models.command_line("\n".join([__doc__, *rows]))
    add = p.add_argument_group("guidance").add_argument
    add("--w", type=scale, help="guidance scale: 1 is off, w acts as CFG at 1/(2-w); auto: raise w "
        "when extra CFG lowers FID, auto-paper: when FID rose since the last evaluation [1.5]")
    add("--w-range", type=number("[1, inf)"), nargs=2, metavar=("LO", "HI"),
        help="in place of --w: a scale-aware network, sampled with --w (Eq. 21) [off]")
    add("--drop", type=number("[0, 1)"), help="label dropout probability [0.1]")
    add("--t-max", type=number("[0, 1]"), default=1.0,
        help="guide up to this noise time; the authors: 0.75 [%(default)s]")
    add("--start-step", type=count, default=0, metavar="N",
        help="train plainly before this step; the authors: 100000 [%(default)s]")
    add("--teacher", choices=["ema", "online"], default="ema",
        help="the moving average (Eq. 18), or the network itself (Eq. 20) [%(default)s]")
    add("--num-labels", type=positive, metavar="N",
        help="guide away from N other labels; no empty class (Eq. 23) [off]")
    add("--guide-share", type=number("(0, 1]"), default=1.0, metavar="P",
        help="guide only this share of samples, 1/P times as much: cheaper [%(default)s]")
    add = p.add_argument_group("training").add_argument
    add("--data", default="digits", help="digits, or a folder made by data.py [%(default)s]")
    add("--model", help=f"{KIND}-{{T,S,B,L,XL}}/{{2,4,8}} [preset]")
    add("--init", metavar="CKPT",
        help=f"start from these weights; w then ramps up over {RAMP} steps [random]")
    add("--steps", type=positive, metavar="N", help="training steps in all [preset]")
    add("--batch", type=positive, metavar="N", help="global batch size [preset]")
    add("--accum", type=positive, metavar="N", default=1,
        help="gradient-accumulation steps [%(default)s]")
    add("--lr", type=number("(0, inf)"), help="learning rate of AdamW, constant [preset]")
    add("--ema", type=number("[0, 1)"), help="decay of the moving average, a step [preset]")
    add("--clip", type=number("(0, inf)"), help="clip the gradient norm [off]")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="autocast [%(default)s]")
    add("--compile", action="store_true", help="torch.compile the network and its teacher [off]")
    add("--recompute", action="store_true", help="activation checkpointing [off]")
    add("--seed", type=number("[0, 2147483647]", int), default=0, help="of all draws [%(default)s]")
    add = p.add_argument_group("evaluation, files").add_argument
    add("--eval-every", type=count, metavar="N", help="steps; 0: only at the end [preset]")
    add("--eval-samples", type=count, metavar="N", help="0: only draw samples.png [preset]")
    add("--eval-steps", type=positive, metavar="N", help="sampling steps [preset]")
    add("--eval-batch", type=positive, metavar="N", help="sampling batch size per process [preset]")
    add("--reference", metavar="FILE", help="score against this [the images of --data]")
    add("--weights", metavar="FILE", help="Inception's weights [downloaded]")
    add("--save-every", type=count, metavar="N", help="steps; 0: only at the end [preset]")
    add("--log-every", type=positive, metavar="N", help="steps [preset]")
    add("--out", metavar="DIR", help="output folder [out/MODEL-DATA-wW]")
    args = p.parse_args(argv)
    data = Data(args.data)
    for key, value in PRESETS[data.kind].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.w_range and (args.w is not None or args.w_range[0] >= args.w_range[1]):
        p.error("--w-range: needs LO below HI, and no --w")
    if args.w is None and not args.w_range:
        args.w = 1.5
    if args.num_labels and (args.drop is not None or args.w == "auto"):
        p.error("--num-labels: trains no empty class, which --drop and --w auto need")
    if args.num_labels and args.num_labels >= len(data.classes):
        p.error(f"--num-labels {args.num_labels}: needs more classes than {len(data.classes)}")
    if args.drop is None:
        args.drop = 0.0 if args.num_labels else 0.1
    if str(args.w).startswith("auto") and not (args.eval_every and args.eval_samples):
        p.error(f"--w {args.w}: moves at evaluations; give --eval-every and --eval-samples")
    if 0 < args.eval_samples < 4:
        p.error(f"--eval-samples {args.eval_samples}: must be 0, or 4 and more")
    if KIND == "DiT" and args.eval_steps > 1000:
        p.error(f"--eval-steps {args.eval_steps}: a DiT has 1 to 1000")
    if args.out is None:
        name = "-".join(str(w).removesuffix(".0") for w in args.w_range or [args.w])
        args.out = f"out/{args.model.replace('/', '-')}-{Path(args.data).resolve().name}-w{name}"
    return args, data


def describe(args, data):
    """The lines at the start: what differs from the preset, what w means, warnings."""
    changed = [f"--{key.replace('_', '-')} {getattr(args, key)}"
               for key, value in PRESETS[data.kind].items() if getattr(args, key) != value]
    yield (f"{args.model}, {len(data)} images of {len(data.classes)} classes, "
           f"{'x'.join(map(str, data.shape))}; preset {data.kind} {' '.join(changed)}")
    if isinstance(args.w, float):
        # At the fixed point out(c) = out*(c) + (w-1) (out(c) - uncond). In Eq. 23 uncond, the mean
        # of the other C - 1 classes, is C / (C - 1) times as far from out(c) as the mean of all.
        gain = len(data.classes) / (len(data.classes) - 1) if args.num_labels else 1
        inverse = 1 - (args.w - 1) * gain
        if inverse > 0:
            yield f"effective guidance scale: w {args.w} acts as CFG at {1 / inverse:.2f}"
        else:
            yield f"warning: --w {args.w}: nothing bounds guidance from w {1 + 1 / gain:.3g} on"
        if args.w < 1:
            yield f"warning: --w {args.w} weakens the label, as CFG below 1 does; 1 is off"
    if args.w_range:
        yield f"scale-aware: evaluated at w {sum(args.w_range) / 2}; sample with --w"
    if not args.drop and not args.num_labels and args.w != 1 and not args.init:
        yield "warning: --drop 0 doesn't train the empty class, which guidance needs"
    if args.steps * (1 - args.ema) < 1:
        yield f"warning: --ema {args.ema} averages over more than the run's {args.steps} steps"
    if data.kind == "pixels" and data.size > 64:
        yield f"warning: {data.size} pixels a side are slow without a VAE (data.py --vae)"
    if data.kind == "latents" and args.steps * args.batch > 1000 * len(data):
        yield f"warning: {args.steps * args.batch // len(data)} epochs of so few images overfit"


def evaluate(args, ema, data, vae, reference, record, cfg=1.0):
    """Draws OUT/samples.npz and .png with the EMA, in all processes. -> the scores, if any."""
    path, classes = Path(args.out) / "samples.npz", len(data.classes)
    labels = (balanced(args.eval_samples, classes) if args.eval_samples else
              balanced(min(10, classes), classes).repeat_interleave(10))
    w = sum(args.w_range) / 2 if args.w_range else None
    write_samples(path, ema, labels, args.seed, batch=args.eval_batch, record=record, vae=vae,
                  dtype=args.dtype, resume=False, steps=args.eval_steps, w=w, cfg=cfg)
    if models.ranks()[0] == 0:
        with np.load(path) as samples:
            save_classes(samples["arr_0"], labels, path.with_suffix(".png"))
    return fid.evaluate(path, reference) if args.eval_samples else {}


def main(argv=None):
    args, data = parse_args(argv)
    rank, world, device = models.setup()
    with models.locked(args.out) if rank == 0 else contextlib.nullcontext():
        train(args, data, rank, world, device)


def train(args, data, rank, world, device):
    out, batch, micro = Path(args.out), args.batch, args.batch // (world * args.accum)
    if batch != micro * world * args.accum:
        raise ValueError(f"--batch {batch}: must be a multiple of processes times --accum, "
                         f"{world} x {args.accum}")
    # ---------------- networks: new ones, or the last checkpoint's
    auto = str(args.w).startswith("auto")
    shape = {"input_size": data.shape[1], "in_channels": data.shape[0],
             "num_classes": len(data.classes), "scale_aware": args.w_range is not None}
    config = shape | {"data": data.identity, "vae": data.vae, "ramp": RAMP if args.init else 0} | {
        key: value for key, value in vars(args).items()
        if key not in FREE and (auto or key not in EVALUATION)}
    last, notes, rewrite = checkpoints.read_last(out / "ckpt.pt", config, args.steps)
    torch.manual_seed(args.seed)
    if args.init and not last:
        model, notes = checkpoints.initialize_from(args.init, args.model, shape)
    else:
        model = models.create_model(args.model, **shape)
    if model.kind != KIND:
        raise ValueError(f"--model {args.model}: this script trains a {KIND}")
    model.recompute, model = args.recompute, model.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0, fused=True)
    step, rows, losses, w_now = 0, [], torch.zeros(0, device=device), 1.0 if auto else args.w
    if last:
        for key, target in ("model", model), ("ema", ema), ("optimizer", optimizer):
            target.load_state_dict(last[key])
        step, rows, losses, w_now = last["step"], last["log"], last["losses"].to(device), last["w"]
        del last
    agreed = models.reduce(torch.tensor([step, -step]), dist.ReduceOp.MAX)
    if agreed.sum():
        raise ValueError(f"--out {out}: one process finds step {agreed[0]} in it and another "
                         f"{-agreed[1]}; it must be a folder that all machines share")
    if rewrite and rank == 0:  # unreadable: it must not replace the one before it
        (out / "ckpt.pt").unlink(missing_ok=True)
    vae = models.load_vae(data.vae, device) if data.vae else None
    reference = fid.load_reference(
        args.reference or args.data, "digits" if data.kind == "digits" else "inception",
        size=data.size, weights=args.weights) if args.eval_samples else None
    net = torch.compile(model) if args.compile else model
    average = torch.compile(ema) if args.compile else ema
    teacher = net if args.teacher == "online" else average
    net = DistributedDataParallel(net, broadcast_buffers=False) if world > 1 else net
    weights, ema_weights = [p.detach() for p in model.parameters()], list(ema.parameters())
    if rank == 0:
        print(*describe(args, data), *notes, sep="\n", flush=True)

    def save():
        if rank == 0:
            checkpoints.save_checkpoint(out / "ckpt.pt", {
                "config": config, "step": step, "model": model.state_dict(),
                "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "log": rows,
                "losses": losses, "w": w_now, "classes": data.classes})

    def draw_log():
        if rank == 0:
            save_log(rows, out / "log.csv")
            save_curves(rows, out / "curves.png")

    def score():
        """Evaluates; the scores join the last row of the log; --w auto moves."""
        nonlocal w_now
        record = {"checkpoint": str(out / "ckpt.pt"), "step": step, "weights": "ema",
                  "model": args.model, "trained_w": args.w_range or w_now, "vae": data.vae,
                  "class_labels": "balanced"}
        # w rises where a rival has the better FID: the same network with CFG on top, or for
        # auto-paper the network at the last evaluation (Sec. 3.3 gives that rule in words).
        rival = next((row["fid"] for row in reversed(rows) if "fid" in row), np.inf)
        if args.w == "auto" and step < args.steps:
            rival = evaluate(args, ema, data, vae, reference, record, cfg=AUTO_CFG)["fid"]
        scores = evaluate(args, ema, data, vae, reference, record)
        if auto and step < args.steps:
            w_now += AUTO_RATE * ((AUTO_MAX if rival < scores["fid"] else 1) - w_now)
        rows[-1] |= scores
        draw_log()
        if rank == 0 and scores:
            tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))

    def due(step):
        return step == args.steps or args.eval_every and step % args.eval_every == 0

    def note(number, _):  # torchrun forwards a Ctrl-C: one that comes at once is the same
        if signals and time.perf_counter() > signals[0][1] + 1:
            os._exit(128 + number)
        signals.append((number, time.perf_counter()))

    def listen(handler):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)

    if step and due(step):
        fresh = not rows or rows[-1]["step"] != step  # a signal saved it, and it is due only now
        if fresh:
            rows.append({"step": step, "loss": losses.double().mean().item(),
                         "images_per_s": "", "w": ""})
        drawn = (out / "samples.png").exists() and (not args.eval_samples or "fid" in rows[-1])
        if fresh or not drawn:  # the run ended in this evaluation
            score()
            rewrite = True
    if rewrite:
        save()
    if step:  # the log may be gone, or ahead of the checkpoint
        draw_log()
    bar = tqdm(initial=step, total=args.steps, unit="step", disable=rank > 0)
    begin, since, signals = time.perf_counter(), step, []
    while step < args.steps:
        listen(note)
        # ---------------- the training step. All is drawn for the whole batch, from (seed, step):
        # every number of processes and every --accum give the same run. Small draws on the CPU.
        index, cpu = data.index(args.seed, step, batch), models.generator(args.seed, 0, step)
        gpu = models.generator(args.seed, 1, step, device=device)
        draws = {"t": draw_t(batch, cpu), "dropped": torch.rand(batch, generator=cpu) < args.drop,
                 "guide": torch.rand(batch, generator=cpu) < args.guide_share}
        flip = torch.rand(batch, generator=cpu) < 0.5
        if args.num_labels:  # 1 to classes - 1 ahead of the sample's own
            classes = len(data.classes)
            order = torch.rand(batch, classes - 1, generator=cpu)
            ahead = 1 + order.topk(args.num_labels).indices
            draws["others"] = (torch.from_numpy(data.labels[index])[:, None] + ahead) % classes
        if args.w_range:
            low, high = args.w_range
            drawn = torch.rand(batch, generator=cpu) < DRAWN / (1 - args.drop)  # of the kept ones
            w = torch.where(drawn, low + (high - low) * torch.rand(batch, generator=cpu), 1.0)
        else:
            ramp = 1 if step >= args.start_step else 0
            if config["ramp"]:
                ramp *= min(1, (step + 1 - args.start_step) / RAMP)
            w = torch.full((batch,), 1 + (w_now - 1) * ramp)
        noise = torch.randn(batch, *data.shape, generator=gpu, device=device)
        posterior = torch.randn(batch, *data.shape, generator=gpu, device=device)
        losses = torch.cat([losses, losses.new_zeros(1)])
        for a in range(args.accum):
            part = slice((a * world + rank) * micro, (a * world + rank + 1) * micro)
            x0, y = data.get(index[part], flip[part], posterior[part])
            sync = net.no_sync() if world > 1 and a < args.accum - 1 else contextlib.nullcontext()
            with sync, torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                loss = mg_loss(net, teacher if step >= args.start_step else None,
                               x0, y, w[part], noise=noise[part], share=args.guide_share,
                               t_max=args.t_max,
                               **{key: draw[part] for key, draw in draws.items()}).mean()
                (loss / args.accum).backward()
            losses[-1] += loss.detach() / args.accum
        if args.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema_weights, weights, 1 - args.ema)
        # ---------------- log, save, evaluate
        step += 1
        bar.update()
        ended = torch.tensor(signals[0][0] if signals else 0)  # on the CPU: no GPU waits
        ended = models.reduce(ended, dist.ReduceOp.MAX)
        saving = step == args.steps or args.save_every and (
            due(step) or step % args.save_every == 0)
        logging = saving or due(step) or step % args.log_every == 0
        if not (logging or ended):
            continue
        losses = models.reduce(losses) / world
        if not torch.stack([x.isfinite().all() for x in (losses, *ema_weights)]).all():
            raise ValueError(f"the loss or a weight is not finite at step {step}; earlier "
                             f"checkpoints stay. Lower --lr or --w, or give --clip")
        if logging:
            speed = (step - since) * batch / (time.perf_counter() - begin)
            rows.append({"step": step, "loss": losses.double().mean().item(),
                         "images_per_s": round(speed, 1), "w": "" if args.w_range else w[0].item()})
            bar.set_postfix_str(f"loss {rows[-1]['loss']:.4f}, {speed:.0f} images/s")
            losses = losses[:0]
            if rank == 0:
                save_log(rows, out / "log.csv")
        if due(step) and rank == 0:  # whose absence shows that the evaluation has to be made
            (out / "samples.png").unlink(missing_ok=True)
        if saving or ended:
            save()
        if ended:
            bar.close()
            if rank == 0:
                print(f"step {step} is saved in {out}; run the same command to resume")
            raise SystemExit(128 + ended.item())
        if due(step):
            listen(signal.SIG_DFL)  # in an evaluation, signals end the process at once
            score()
            if saving:
                save()
        begin, since = time.perf_counter(), step
    bar.close()
    if rank == 0:
        print(f"{out} has ckpt.pt, log.csv, curves.png, samples.png and samples.npz")


if __name__ == "__main__":
    models.run(main)
