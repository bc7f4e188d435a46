"""What things cost: `python experiments/bench.py [steps sampling fid] [counts] [gpu]`.

Things are compared in alternation, in one process; figures are medians of ratios. Let nothing else
run beside it. `counts`: memory and FLOPs of training SiTs in bf16, counted without computing.
`gpu`, on a GPU alone: steps/s and TFLOP/s of B/2 and XL/2 in bf16.
"""
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, ROOT)
import fid
import models
import runtime
import sample
import train_dit_mg
import train_sit_mg

SCRIPTS = {"SiT": train_sit_mg, "DiT": train_dit_mg}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = {  # arguments of training_step()
    "plain": {"teacher": None}, "ema": {}, "ema, t_max .75": {"t_max": 0.75},
    "ema, 1/2": {"share": 1 / 2}, "ema, 1/4": {"share": 1 / 4}, "ema, 1/8": {"share": 1 / 8},
    "online": {"teacher": "online"}, "online, t_max .75": {"teacher": "online", "t_max": 0.75},
    "online, 1/2": {"teacher": "online", "share": 1 / 2},
    "online, 1/4": {"teacher": "online", "share": 1 / 4},
    "online, 1/8": {"teacher": "online", "share": 1 / 8}, "4 labels": {"labels": 4}}


def ratios(functions, rounds):
    """Median over the rounds of each function's time over the first's, and the first's seconds."""
    times = []
    for _ in range(rounds + 1):
        row = []
        for function in functions.values():
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            row.append(time.perf_counter() - start)
        times.append(row)
    times = np.array(times[1:])  # the first round warms up
    middle = np.median(times / times[:, :1], 0)
    return dict(zip(functions, middle.tolist(), strict=True)), float(np.median(times[:, 0]))


def training_step(name, input_size, channels, batch, teacher="ema", share=1.0, t_max=1.0, labels=0,
                  dtype=None, compiled=False):
    """A whole step (draws, loss, backward, AdamW, EMA), as a function."""
    script = SCRIPTS[name[:3]]
    model = models.create_model(name, input_size=input_size, in_channels=channels, num_classes=1000)
    model = model.to(DEVICE)
    ema = copy.deepcopy(model).requires_grad_(False)
    if compiled:
        for block in [*model.blocks, *ema.blocks]:
            block.compile()
    teacher = {"ema": ema, "online": model, None: None}[teacher]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=True)
    weights = [p.detach() for p in model.parameters()]
    ema_weights = list(ema.parameters())
    x0 = torch.randn(batch, channels, input_size, input_size, device=DEVICE)
    y = torch.randint(1000, (batch,), device=DEVICE)
    cpu = torch.Generator().manual_seed(0)

    def step():
        t = script.draw_t(batch, cpu)
        dropped = torch.rand(batch, generator=cpu) < 0.1
        chosen = torch.rand(batch, generator=cpu) < share
        guided = chosen & ~dropped & (t <= t_max * script.T_NOISE)
        draws = {"t": t, "dropped": dropped, "guide": guided.nonzero()[:, 0]}
        draws = {key: runtime.move(x, x0.device) for key, x in draws.items()}
        if labels:
            offsets = 1 + torch.rand(batch, 999, device=DEVICE).topk(labels).indices
            draws["others"] = (y[:, None] + offsets) % 1000
        with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = script.mg_loss(model, teacher, x0, y, 1.5, noise=torch.randn_like(x0), null=1000,
                                  share=share, **draws).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema_weights, weights, 1e-4)
    return step


def bench_steps():
    print("| a training step over a plain one | plain, ms | " + " | ".join([*WAYS][1:]) + " |")
    print("|---" * (len(WAYS) + 1) + "|", flush=True)
    for name, size, channels, batch, rounds in (
            ("SiT-T/2", 8, 1, 64, 60), ("DiT-T/2", 8, 1, 64, 60), ("SiT-S/2", 32, 4, 8, 8)):
        steps = {way: training_step(name, size, channels, batch, **options)
                 for way, options in WAYS.items()}
        over, seconds = ratios(steps, rounds)
        cells = [f"{name}, batch {batch}", f"{seconds * 1000:.0f}"]
        cells += [f"{value:.2f}" for value in [*over.values()][1:]]
        print("| " + " | ".join(cells) + " |", flush=True)
    shape = "SiT-S/2", 32, 4, 8
    over, _ = ratios({"fp32": training_step(*shape, None),
                      "bf16": training_step(*shape, None, dtype=torch.bfloat16)}, 8)
    print(f"\nSiT-S/2, plain: --dtype bf16 takes {over['bf16']:.2f} of fp32's time")
    for teacher in None, "ema", "online":
        step = f"bench.training_step('SiT-S/2', 32, 4, 8, {teacher!r})"
        memory = peak(f"step = {step}", "for _ in range(3): step()")
        print(f"memory of three such steps, teacher {teacher}: {memory:.0f} MB", flush=True)


def peak(*lines):
    """Peak resident memory, MB, of a process of its own that runs these lines."""
    code = [f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench, fid",
            *lines, "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], check=True, text=True,
                          capture_output=True)
    return int(done.stdout.split()[-1]) / 1024


def bench_sampling():
    """MG's one pass a step against CFG's two."""
    labels = torch.arange(500) % 10
    model = models.create_model("SiT-T/2", input_size=8, in_channels=1, num_classes=10).to(DEVICE)

    def draw(cfg):
        return lambda: sample.generate(model, labels, labels, steps=25, cfg=cfg)
    over, seconds = ratios({cfg: draw(cfg) for cfg in (1, 2)}, 9)
    print(f"sampling SiT-T/2, 25 steps, 500 at a time: {500 / seconds:.0f} images/s; CFG takes "
          f"{over[2]:.2f} times as long")


def bench_fid():
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(0)
    stats = []
    for _ in range(2):
        x = rng.standard_normal((5000, 2048)) * np.exp(rng.standard_normal(2048))
        stats += [x.mean(0), np.cov(x, rowvar=False)]
    over, seconds = ratios({"ours": lambda: fid.frechet_distance(*stats),
                            "sqrtm": lambda: sqrtm(stats[1] @ stats[3])}, 2)
    print(f"Fréchet distance, 2048 features: {seconds:.1f} s; sqrtm takes {over['sqrtm']:.1f} x")
    real, fake = torch.randn(2, 10_000, 2048)
    start = time.perf_counter()
    fid.precision_recall(real, fake)
    print(f"precision and recall, 10,000 against 10,000: {time.perf_counter() - start:.0f} s")
    fid.load_reference("digits", "classifier")
    with tempfile.TemporaryDirectory() as folder:
        for n in 2000, 20_000:
            path = os.path.join(folder, f"{n}.npz")
            np.savez(path, arr_0=rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8))
            lines = ("reference = fid.load_reference('digits', 'classifier')",
                     "del reference.stats['pool']",  # precision and recall keep features
                     f"fid.evaluate({path!r}, reference)")
            print(f"memory of FD of {n} images: {peak(*lines):.0f} MB", flush=True)


def saved_bytes(name, batch, recompute):
    """What a forward pass keeps for the backward pass, beside the weights; and the parameters."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    with FakeTensorMode():
        model = models.create_model(name, input_size=32, in_channels=4, num_classes=1000)
        model.checkpointing = recompute
        x = torch.empty(batch, 4, 32, 32)
        label = torch.empty(batch, dtype=torch.int64)
        with (torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
              torch.autocast("cpu", torch.bfloat16)):
            model(x, torch.empty(batch), label).square().mean()
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return (sum(n for key, n in kept.items() if key not in weights),
            sum(p.numel() for p in model.parameters()))


def bench_counts():
    """State: fp32 weights, gradients, average and AdamW's two moments, 20 bytes a parameter."""
    print("| model | state, GB | MB a sample | with --recompute | GFLOPs a sample and step |\n"
          "|---|---|---|---|---|")
    for name in "SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2":
        cells = []
        for recompute in False, True:
            two, parameters = saved_bytes(name, 2, recompute)
            four, _ = saved_bytes(name, 4, recompute)
            cells.append(f"{(four - two) / 2 / 1e6:.0f}")
        with torch.device("meta"):
            model = models.create_model(name, input_size=32, in_channels=4, num_classes=1000)
        # Forward 1, backward 2, and of the online teacher at a quarter .9 / 4.
        flops = models.flops(model) * (3 + 0.225) / 1e9
        print(f"| {name} | {20 * parameters / 1e9:.1f} | {' | '.join(cells)} | {flops:.0f} |")


def bench_gpu():
    """Steps/s and achieved TFLOP/s (forward 1, backward 2, plus the teacher's passes)."""
    for name, batch in ("SiT-B/2", 256), ("SiT-XL/2", 64):
        with torch.device("meta"):
            model = models.create_model(name, input_size=32, in_channels=4, num_classes=1000)
        cost = models.flops(model)
        for compiled in False, True:
            for way, passes in (("plain", 3), ("ema", 3 + 1.8), ("online", 3 + 0.9),
                                ("online, 1/4", 3 + 0.225)):
                step = training_step(name, 32, 4, batch, dtype=torch.bfloat16,
                                     compiled=compiled,
                                     **WAYS[way])
                for _ in range(10):
                    step()
                times = []
                for _ in range(5):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(10):
                        step()
                    torch.cuda.synchronize()
                    times.append((time.perf_counter() - start) / 10)
                speed = 1 / statistics.median(times)
                what = f"{name}, batch {batch}, bf16, {way}{', --compile' if compiled else ''}"
                print(f"{what}: {speed:.2f} steps/s, {passes * cost * batch * speed / 1e12:.0f} "
                      f"TFLOP/s", flush=True)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n", flush=True)
    for name in sys.argv[1:] or ["steps", "sampling", "fid"]:
        globals()[f"bench_{name}"]()
