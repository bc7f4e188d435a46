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
import copy
import functools
import math
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
import runtime
from data import Data
from runtime import UserError
from sample import balanced, save_classes, write_samples

# ================================================ DiT's own
KIND = "DiT"
T_NOISE = 1000  # the time of pure noise
DIGITS_STEPS = 1000


def draw_t(n, generator):
    """The times of n samples, (n,): uniform in 0..999."""
    return torch.randint(1000, (n,), generator=generator)


def variational_bound(x0, noise, eps, v, t):
    """What the variance channels learn from, in bits a dimension: (N,). Guidance doesn't affect it.

    x0, noise, eps, v (N, ...); t (N,) int64. eps, the network's noise, gives the mean of p; v
    in [-1, 1] gives its log variance, between the posterior's and log beta (improved DDPM, Eq. 15).
    t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). t = 0: -log p of the 8-bit value that x0
    stands for, with the exact normal CDF (ADM's code approximates it by a tanh).
    """
    x0, noise, eps, v = (x.double() for x in (x0, noise, eps, v))
    per_sample = [-1] + [1] * (x0.ndim - 1)
    betas, abars = models.schedule(x0.device)
    beta = betas[t].view(per_sample)
    abar = abars[t].view(per_sample)
    # The posterior's variance, beta (1 - abar_{t-1}) / (1 - abar), is 0 at t = 0: t = 1's there.
    variances = betas[1:] * (1 - abars[:-1]) / (1 - abars[1:])
    log_posterior_variance = variances[(t - 1).clamp(min=0)].log().view(per_sample)
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
    bound = torch.where(t.view(per_sample) == 0, nll, kl)
    return bound.flatten(1).mean(1).float() / math.log(2)


# ================================================ the same in train_dit_mg.py and train_sit_mg.py
def mg_loss(model, teacher, x0, y, w, *, t, noise, dropped, null, guide=None, share=1.0,
            others=None):
    """The loss of each sample, (N,). The function to copy: it draws nothing itself.

    model(x_t, t, y) -> like x0; a DiT has as many channels again (dim 1), for the variance.
        Scale-aware (Eq. 21): lambda x, t, y: network(x, t, y, w); the teacher runs at its w of 1.
    teacher: the EMA network (Eq. 18); the model itself (Eq. 20), whose output is then reused; or
        None, for plain diffusion. Under DDP pass the network that DDP wraps.
    x0 (N, ...): data of any shape; y (N,) int64: labels, or any other condition (N, ...)
    w: guidance scale, a number or (N,); 1 is off (teacher None saves its passes then)
    t (N,), noise (N, ...): the time and the noise of each sample
    dropped (N,) bool: these get the empty condition and the plain target. If your model or loader
        drops labels too, turn that off, but keep its empty embedding.
    null: the empty condition, a label or a tensor like y[0]
    guide (K,) int64: the samples to guide; a dropped one never is. None: all that keep their label.
    share: the probability of being chosen for guide; the guidance term is divided by it. A quarter
        of those below t 0.75: guide = ((t < 0.75) & (torch.rand(N) < 0.25)).nonzero()[:, 0]
    others (N, L) int64: L labels, distinct and not y, in place of the empty condition (Eq. 23)
    ValueError: share without guide, or a guide that is a mask.
    """
    if guide is None and share != 1:
        raise ValueError("share needs guide, the samples that were chosen with that probability")
    if guide is not None and guide.dtype == torch.bool:
        raise ValueError("guide is a mask; give the indices of its samples, guide.nonzero()[:, 0]")
    C = x0.shape[1]
    per_sample = [-1] + [1] * (x0.ndim - 1)  # views (N,) as (N, 1, ..., 1), to multiply x0

    # ============================================ DiT's own
    # 1. corrupt: x_t and the plain target, (N, ...) each
    _, abars = models.schedule(x0.device)
    abar = abars[t].view(per_sample)
    x_t = abar.sqrt().to(x0.dtype) * x0 + (1 - abar).sqrt().to(x0.dtype) * noise   # Eq. 1
    target = noise.clone()                                                         # Eq. 3

    # ============================================ the same in train_dit_mg.py and train_sit_mg.py
    # 2. predict
    empty = torch.zeros_like(y) + null                                             # (N, ...)
    label = torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), empty, y)
    out = model(x_t, t, label)                                                     # (N, ...)

    # 3. guide: the target of K samples
    k = (~dropped).nonzero()[:, 0] if guide is None else guide                     # (K,)
    if teacher is not None and len(k):
        def teach(condition):
            return teacher(x_t[k], t[k], condition)[:, :C].to(target.dtype)        # (K, ...)
        with torch.no_grad():                                                      # sg(.)
            if teacher is model or teacher is getattr(model, "module", None):  # bare, or in DDP
                cond = out[k, :C].to(target.dtype)
            else:
                cond = teach(y[k])
            if others is None:
                uncond = teach(empty[k])
            else:                                                                  # Eq. 23
                uncond = sum(teach(labels) for labels in others[k].T) / others.shape[1]
            w_k = torch.where(dropped[k], 1, (x0.new_zeros(len(x0)) + w)[k]).view(per_sample)
            # Guiding a random share of the samples, 1/share times as much, keeps the target's mean.
            target[k] += (w_k - 1) / share * (cond - uncond)                       # Eq. 18, 20, 22

    # ============================================ DiT's own
    # 4. learn
    loss = (out[:, :C] - target).square().flatten(1).mean(1)                       # Eq. 17
    if out.shape[1] > C:
        loss = loss + variational_bound(x0, noise, out[:, :C].detach(), out[:, C:], t)
    return loss


# ================================================ the same in train_dit_mg.py and train_sit_mg.py
AUTO_CFG = 1.1      # --w auto: the guidance on top that is tried,
AUTO_RATE = 0.1     # how fast w moves,
AUTO_MAX = 1.9      # and how far
SCALED_SHARE = 0.2  # --w-range: this share of all samples draws a scale, the rest is at 1 (authors)
RAMP = 1000         # --init: w ramps up over so many steps, or a quarter of the run


def draw(args, data, step, w):
    """The small draws of a step, for its whole batch and on the CPU: a function of (seed, step).

    Every process and every part of --accum takes its rows of them, so that the run is the same for
    any number of both; and which samples are guided is known without waiting for a GPU.
    -> index (N,) int64 and flip (N,) bool, for data.get(); guided (N,) bool: the samples that get
    the guidance term; a dict of mg_loss's t, dropped, w (N,) and, with --num-labels, others (N, L)
    """
    n = args.batch
    cpu = runtime.generator(args.seed, 0, step)
    index = data.index(args.seed, step, n)
    t = draw_t(n, cpu)
    dropped = torch.rand(n, generator=cpu) < args.drop
    chosen = torch.rand(n, generator=cpu) < args.guide_share
    flip = torch.rand(n, generator=cpu) < 0.5
    draws = {"t": t, "dropped": dropped, "w": torch.full((n,), float(w))}
    if args.num_labels:  # distinct offsets from the sample's own label
        classes = len(data.classes)
        order = torch.rand(n, classes - 1, generator=cpu)
        offsets = 1 + order.topk(args.num_labels).indices
        draws["others"] = (torch.from_numpy(data.labels)[index][:, None] + offsets) % classes
    if args.w_range:
        low, high = args.w_range
        # A share of those that are not dropped, so that it is SCALED_SHARE of all.
        scaled = torch.rand(n, generator=cpu) < SCALED_SHARE / (1 - args.drop)
        drawn = low + (high - low) * torch.rand(n, generator=cpu)
        draws["w"] = torch.where(scaled, drawn, 1.0)
    guided = chosen & ~dropped & (t <= args.t_max * T_NOISE) & (draws["w"] != 1)
    if len(data.classes) == 1:  # with and without the label there is the same to learn
        guided = torch.zeros_like(guided)
    return index, flip, guided, draws


def train(args, data, rank, world, device):
    out = Path(args.out)
    batch = args.batch
    micro = batch // (world * args.accum)
    if batch != micro * world * args.accum:
        raise UserError(f"--batch {batch}: must be a multiple of processes times --accum, "
                        f"{world} x {args.accum}")
    # ---------------- a new run, or the last checkpoint's
    auto = str(args.w).startswith("auto")
    shape = {"input_size": data.shape[1], "in_channels": data.shape[0],
             "num_classes": len(data.classes), "scale_aware": args.w_range is not None}
    free = FREE if auto else FREE + EVALUATION
    config = {key: value for key, value in vars(args).items() if key not in free} | shape | {
        "data": data.identity, "vae": data.vae}
    saved, lines = checkpoints.read_last(out / "ckpt.pt", config, args.steps)
    torch.manual_seed(args.seed)
    if args.init and not saved:
        model, lines = checkpoints.initialize_from(args.init, args.model, shape, data.classes)
    else:
        model = models.create_model(args.model, **shape)
    if model.kind != KIND:
        raise UserError(f"--model {args.model}: this script trains a {KIND}")
    model = model.to(device)
    model.checkpointing = args.recompute
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0, fused=True)
    step = 0
    scored = 0                             # the step of the last evaluation
    w_now = 1.0 if auto else args.w        # --w auto moves it
    log = []                               # the rows of log.csv
    losses = torch.zeros(0)                # of the steps since the last row
    ramp = min(RAMP, args.steps // 4) if args.init else 0
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        group, = optimizer.param_groups
        if args.new_lr not in (None, group["lr"]):
            lines.append(f"--lr {group['lr']} -> {args.new_lr}")
            group["lr"] = args.new_lr
        step = saved["step"]
        scored = saved["scored"]
        w_now = saved["w"]
        log = saved["log"]
        losses = saved["losses"]
        ramp = saved["ramp"]
        if args.eval_samples and log and not {"fd", "fid"} & log[-1].keys():
            scored = min(scored, step - 1)  # at this step samples.png alone was drawn
        del saved
    losses = losses.to(device)
    start = step
    span = runtime.reduce(torch.tensor([step, -step]), dist.ReduceOp.MAX).sum()
    if span:  # the largest step minus the smallest
        raise UserError(f"--out {out}: the processes find checkpoints {span} steps apart in it; "
                        "it must be a folder that all machines share")
    vae = models.load_vae(data.vae, device) if data.vae else None
    reference = None
    if args.eval_samples:
        real = args.reference or args.data
        features = fid.choose_features(real, args.weights)
        reference = fid.load_reference(real, features, size=data.size, weights=args.weights)
    net = model
    teacher = model if args.teacher == "online" else ema
    if args.compile:  # block by block: the blocks are alike, so that one is compiled for all
        torch._dynamo.config.optimize_ddp = False  # it would split the graphs once more
        for block in [*model.blocks, *ema.blocks]:
            block.compile()
    if world > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        net.broadcast_buffers = False  # pos_embed is constant; the argument is deprecated
    weights = [p.detach() for p in model.parameters()]
    ema_weights = list(ema.parameters())
    if rank == 0:
        print(*describe(args, data), *lines, sep="\n", flush=True)

    def save():
        if rank == 0:
            checkpoints.save_checkpoint(out / "ckpt.pt", {
                "config": config, "classes": data.classes, "step": step, "scored": scored,
                "w": w_now, "ramp": ramp, "log": log, "losses": losses,
                "model": model.state_dict(), "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict()})

    def every(n):
        return n and step % n == 0

    def w_at(step):
        """The w of a step: 1, plain training, before --start-step; after --init it ramps up."""
        risen = (step + 1 - args.start_step) / max(1, ramp)
        return 1 if args.w_range else 1 + (w_now - 1) * min(1, max(0, risen))

    stop = torch.tensor(0)  # the number of a signal that arrived

    def remember(number, _):
        stop.fill_(number)
    runtime.listen(remember)
    bar = tqdm(initial=step, total=args.steps, unit="step", disable=None if rank == 0 else True)
    clock = time.perf_counter()
    since = step
    while True:
        # ---------------- log, save, evaluate; a run that resumes does here what is still due
        stopped = runtime.reduce(stop.clone(), dist.ReduceOp.MAX).item()  # on the CPU: no GPU waits
        last = step == args.steps
        due = step > scored and (last or every(args.eval_every))
        saving = step > start and (last or every(args.save_every) or due and args.save_every)
        logging = len(losses) and (due or saving or every(args.log_every))
        if due or saving or logging or stopped:
            losses = runtime.reduce(losses) / world
            if not torch.stack([x.isfinite().all() for x in (losses, *ema_weights)]).all():
                raise UserError(f"the loss or a weight is not finite at step {step}; earlier "
                                f"checkpoints stay. Lower --lr or --w, or give --clip")
            if logging:
                speed = ""
                if step > since:  # not of a resumed run that has made no step yet
                    speed = round((step - since) * batch / (time.perf_counter() - clock), 1)
                log.append({"step": step, "loss": losses.double().mean().item(),
                            "images_per_s": speed,
                            "w": "" if args.w_range else w_at(step - 1)})
                losses = losses[:0]
                line = f"loss {log[-1]['loss']:.4f}, {speed or 0:.0f} images/s"
                bar.set_postfix_str(line)
                if rank == 0:
                    checkpoints.save_log(log, out / "log.csv")
                    if bar.disable:  # there is no terminal
                        print(f"step {step} of {args.steps}: {line}", flush=True)
            if saving or stopped and step > start:
                save()
            if stopped:
                bar.close()
                runtime.barrier()  # or torchrun would end the one that saves, as others have ended
                if rank == 0 and step:
                    print(f"step {step} is saved in {out}; run the same command to resume")
                raise SystemExit(128 + stopped)
            if due:
                # From here to the scores a signal ends the run at once: the evaluation stays due.
                inputs = [args, ema, data, vae, reference, step, w_now]
                tried = {}
                try:
                    runtime.listen(signal.default_int_handler)
                    if stop:  # it came while the checkpoint was written
                        raise KeyboardInterrupt
                    if args.w == "auto" and not last:
                        tried = evaluate(*inputs, cfg=AUTO_CFG)
                    scores = evaluate(*inputs)
                except KeyboardInterrupt:
                    runtime.listen(remember)  # a second one must not interrupt the writing
                    if not saving:
                        save()
                    raise
                runtime.listen(remember)
                distance = "fd" if "fd" in scores else "fid"
                if auto and not last:
                    # Raise w if the competitor's distance is lower, else lower it. auto: the same
                    # network with CFG on top; auto-paper: the last evaluation (Sec. 3.3).
                    earlier = [row[distance] for row in log if distance in row]
                    competitor = tried or {distance: earlier[-1] if earlier else math.inf}
                    goal = AUTO_MAX if competitor[distance] < scores[distance] else 1
                    w_now += AUTO_RATE * (goal - w_now)
                log[-1] |= scores
                scored = step
                if saving or step == start:
                    save()
                if rank == 0:
                    checkpoints.save_log(log, out / "log.csv")
                    checkpoints.save_curves(log, out / "curves.png")
                    if scores:
                        figures = [f"{key} {value:.3f}" for key, value in scores.items()]
                        bar.clear()
                        print(f"step {step}: {', '.join(figures)}", flush=True)
            clock = time.perf_counter()
            since = step
        if last:
            break
        # ---------------- the training step
        index, flip, guided, draws = draw(args, data, step, w_at(step))
        gpu = runtime.generator(args.seed, 1, step, device=device)
        noise = torch.randn(batch, *data.shape, generator=gpu, device=device)
        posterior = torch.randn(batch, *data.shape, generator=gpu, device=device)
        losses = torch.cat([losses, losses.new_zeros(1)])
        for i in range(args.accum):
            part = slice((i * world + rank) * micro, (i * world + rank + 1) * micro)
            x0, y = data.get(index[part], flip[part], posterior[part])
            mine = {key: runtime.move(x[part], device) for key, x in draws.items()}
            guide = runtime.move(guided[part].nonzero()[:, 0], device)
            student = net
            if args.w_range:  # at a w of each sample; the teacher runs at w = 1 (Eq. 22)
                student = functools.partial(net, w=mine["w"])
            net.require_backward_grad_sync = i == args.accum - 1  # DDP adds up after the last part
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                loss = mg_loss(student, teacher if step >= args.start_step else None, x0, y,
                               noise=noise[part], null=len(data.classes), guide=guide,
                               share=args.guide_share, **mine).mean() / args.accum
            loss.backward()
            losses[-1] += loss.detach()
        if args.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        # Warm-up: a small decay at first, so that the average forgets its initial weights.
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(ema_weights, weights, 1 - decay)
        step += 1
        bar.update()
    bar.close()
    if rank == 0:
        print(f"{out} has ckpt.pt, log.csv, curves.png, samples.png and samples.npz")


def evaluate(args, ema, data, vae, reference, step, w, cfg=1.0):
    """Draws OUT/samples.npz and .png with the EMA, in all processes. -> the scores, if any."""
    path = Path(args.out) / "samples.npz"
    classes = len(data.classes)
    if args.eval_samples:
        labels = balanced(args.eval_samples, classes)
    else:  # a row of the picture each
        labels = balanced(min(10, classes), classes).repeat_interleave(10)
    record = {"checkpoint": f"{args.out}/ckpt.pt", "step": step, "weights": "ema",
              "model": args.model, "trained_w": args.w_range or w, "vae": data.vae,
              "class_labels": "balanced"}
    write_samples(path, ema, labels, args.seed, batch=args.eval_batch, record=record, vae=vae,
                  dtype=args.dtype, resume=False, steps=args.eval_steps, cfg=cfg,
                  w=sum(args.w_range) / 2 if args.w_range else None)
    if runtime.ranks()[0] == 0:
        with np.load(path) as samples:
            save_classes(samples["arr_0"], labels, path.with_suffix(".png"))
    return fid.evaluate(path, reference) if args.eval_samples else {}


# ---------------------------------------------------------------- flags

PRESETS = {  # by the kind of --data
    "digits": {  # scikit-learn's 8x8 scans, on a laptop
        "model": f"{KIND}-T/2", "batch": 64, "lr": 4e-3, "ema": 0.995, "steps": DIGITS_STEPS,
        "eval_every": 0, "eval_samples": 2000, "eval_steps": 50, "eval_batch": 500,
        "save_every": 200, "log_every": 50},
    "pixels": {  # small images of your own
        "model": f"{KIND}-T/2", "batch": 32, "lr": 2e-3, "ema": 0.999, "steps": 8000,
        "eval_every": 0, "eval_samples": 2000, "eval_steps": 50, "eval_batch": 50,
        "save_every": 500, "log_every": 50},
    "latents": {  # the paper's ImageNet recipe
        "model": f"{KIND}-XL/2", "batch": 256, "lr": 1e-4, "ema": 0.9999, "steps": 400_000,
        "eval_every": 50_000, "eval_samples": 5000, "eval_steps": 250, "eval_batch": 64,
        "save_every": 10_000, "log_every": 100},
}
# Flags that may differ when a run is resumed: but for the learning rate, which is kept unless
# another is given, they don't change what is trained.
FREE = ["data", "init", "steps", "accum", "lr", "new_lr", "compile", "recompute", "eval_batch",
        "save_every", "log_every", "weights", "out"]
EVALUATION = ["eval_every", "eval_samples", "eval_steps", "reference"]  # free but for --w auto


def parse_args(argv):
    """-> the flags, with the preset's values where none is given, and the Data."""
    number = runtime.number
    count = number("[0, inf)", int)
    positive = number("[1, inf)", int)

    def w_value(text):
        return text if text in ("auto", "auto-paper") else number()(text)
    w_value.__name__ = "number, auto or auto-paper"
    rows = ["preset by the kind of --data: " + "".join(f"{kind:10}" for kind in PRESETS)]
    for key in PRESETS["digits"]:
        values = "".join(f"{preset[key]!s:10}" for preset in PRESETS.values())
        rows.append(f"  --{key.replace('_', '-'):26} {values}")
    p = runtime.command_line("\n".join([__doc__, *rows]))
    add = p.add_argument_group("guidance").add_argument
    add("--w", type=w_value, help="guidance scale: 1 is off, w acts as CFG at 1/(2-w); auto: raise "
        "w when CFG on top lowers FID or FD, auto-paper: when it rose since the last time [1.5]")
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
    add("--model", help=f"{KIND}-{{T,XS,S,B,L,XL}}/{{2,4,8}} [that of --init, or preset]")
    add("--init", metavar="CKPT",
        help=f"start from these weights; --w ramps up over --steps / 4, at most {RAMP} [random]")
    add("--steps", type=positive, metavar="N", help="training steps in all [preset]")
    add("--batch", type=positive, metavar="N", help="global batch size [preset]")
    add("--accum", type=positive, metavar="N", default=1,
        help="gradient-accumulation steps [%(default)s]")
    add("--lr", type=number("(0, inf)"),
        help="learning rate of AdamW, constant; may change on resume [preset]")
    add("--ema", type=number("[0, 1)"),
        help="decay of the moving average; at step n at most (1+n)/(10+n) [preset]")
    add("--clip", type=number("(0, inf)"), help="clip the gradient norm [off]")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="autocast [%(default)s]")
    add("--compile", action="store_true", help="torch.compile the network's blocks [off]")
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
    if args.init and args.model is None:
        begun = args.out and Path(args.out, "ckpt.pt").exists()  # then --init may be gone
        _, config = checkpoints.load_checkpoint(args.out if begun else args.init)
        args.model = config["model"]
        if config["kind"] != KIND:
            p.error(f"--init {args.init}: is a {args.model}; this script trains a {KIND}")
    args.new_lr = args.lr  # of a run that resumes; None: it keeps its own
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
    if args.eval_samples and len(data) < 4 and not args.reference:
        p.error(f"--data {args.data}: has too few images to score with; give --eval-samples 0")
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
    if len(data.classes) == 1 and args.w != 1:
        yield "warning: there is one class, and so nothing to guide: this is plain training"
    elif isinstance(args.w, float):
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
    if data.kind == "pixels" and data.size > 64:
        yield f"warning: {data.size} pixels a side are slow without a VAE (data.py --vae)"
    if data.kind == "latents" and args.steps * args.batch > 1000 * len(data):
        yield f"warning: {args.steps * args.batch // len(data)} epochs of so few images overfit"


def main(argv=None):
    args, data = parse_args(argv)
    rank, world, device = runtime.setup()
    with runtime.locked(args.out), runtime.handlers_kept():
        train(args, data, rank, world, device)


if __name__ == "__main__":
    runtime.run(main)
