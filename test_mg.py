"""`pytest test_mg.py`: everything on the CPU, nothing downloaded. `python test_mg.py`: the benchmarks."""
import contextlib
import copy
import csv
import glob
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fid
import models
import sample
import train_dit_mg
import train_sit_mg
from models import ALPHA_BARS, BETAS, create_model, load_checkpoint, save_checkpoint
from sample import SAMPLERS, draw, generate

HERE = Path(__file__).parent
SCRIPTS = {"SiT": train_sit_mg, "DiT": train_dit_mg}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The digits' feature net is trained into a folder of the tests' own; nothing is looked up on the network."""
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("torch_home"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors; and on a busy machine threads wait for each other
    yield
    torch.set_num_threads(threads)


def run(*command, processes=None, cwd=HERE, env=None, timeout=240):
    """A script of the project, plainly or under torchrun -> (exit status, stdout, stderr)."""
    launcher = [sys.executable] if processes is None else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"]
    done = subprocess.run([*launcher, HERE / command[0], *map(str, command[1:])], cwd=cwd, capture_output=True, text=True, check=False,
                          timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))
    return done.returncode, done.stdout, done.stderr


def error_of(main, *argv):
    """The line that a script's main() prints before it exits with status 2."""
    text = io.StringIO()
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(text):
        main([str(a) for a in argv])
    assert end.value.code == 2
    lines = [line for line in text.getvalue().strip().splitlines() if line.strip() and not re.search("(step|img)/s", line)]
    assert len(lines) == 1, lines
    return lines[0]


def random_model(name="SiT-T/2", input_size=8, in_channels=1, num_classes=10, seed=0, **kwargs):
    """A network whose zero-initialised layers aren't zero, so that every part of it matters."""
    torch.manual_seed(seed)
    model = create_model(name, input_size=input_size, in_channels=in_channels, num_classes=num_classes, **kwargs)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05) if p.ndim > 1 else nn.init.normal_(p, std=0.02)
    return model.eval()


def save_random(path, model, name, **config):
    """A checkpoint of our own format with this network in it."""
    state = model.state_dict()
    keys = "input_size", "in_channels", "num_classes", "scale_aware", "empty_class", "freq_divisor", "kind"
    config = {"model": name, "vae": "none", "w": 1.5, **{k: getattr(model, k) for k in keys}, **config}
    save_checkpoint(path, {"config": config, "step": 7, "model": state, "ema": state, "optimizer": {}})
    return path


# ---------------------------------------------------------------- models.py

def test_parameters_and_gflops_are_the_published_ones(capsys):
    """DiT's Table 4 and the paper's Fig. 6, within 1 %."""
    models.main()
    rows = {c[1].strip(): (float(c[2]), float(c[3])) for c in (line.split("|") for line in capsys.readouterr().out.splitlines()
                                                               if line.startswith("|")) if "/" in c[1]}
    published = {"S/2": (33, 6.06), "B/2": (130, 23.01), "L/2": (458, 80.71), "XL/2": (675, 118.64)}
    for size, (parameters, gflops) in published.items():
        for kind in "DiT", "SiT":
            assert rows[f"{kind}-{size}"] == (pytest.approx(parameters, rel=0.01), pytest.approx(gflops, rel=0.01))
    # 400k steps of 256, 2 * 118.64 GFLOPs a pass, 3 passes and twice 90 % (of SiT's t up to 0.75); 312 TFLOP/s at 40 %
    for kind, times in ("DiT", 3 + 1.8), ("SiT", 3 + 1.35):
        hours = [400e3 * 256 * 2 * 118.64e9 * n / (0.4 * 312e12) / 3600 for n in (3, times)]
        assert rows[f"{kind}-XL/2, 400,000 steps"] == pytest.approx(hours, abs=2)


def to_diffusers(state, depth):
    """Our state dict under diffusers' names, written out on its own here."""
    new = {}

    def put(to, of, part=slice(None)):
        new[f"{to}.weight"], new[f"{to}.bias"] = state[f"{of}.weight"][part], state[f"{of}.bias"][part]
    put("pos_embed.proj", "x_embedder.proj")
    put("proj_out_1", "final_layer.adaLN_modulation.1")
    put("proj_out_2", "final_layer.linear")
    for i in range(depth):
        theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        put(f"{theirs}.norm1.emb.timestep_embedder.linear_1", "t_embedder.mlp.0")
        put(f"{theirs}.norm1.emb.timestep_embedder.linear_2", "t_embedder.mlp.2")
        new[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
        put(f"{theirs}.norm1.linear", f"{ours}.adaLN_modulation.1")
        width = len(state[f"{ours}.attn.proj.bias"])
        for j, name in enumerate("qkv"):
            put(f"{theirs}.attn1.to_{name}", f"{ours}.attn.qkv", slice(j * width, (j + 1) * width))
        put(f"{theirs}.attn1.to_out.0", f"{ours}.attn.proj")
        put(f"{theirs}.ff.net.0.proj", f"{ours}.mlp.fc1")
        put(f"{theirs}.ff.net.2", f"{ours}.mlp.fc2")
    return new


@pytest.mark.parametrize("divisor", [127, 128])
def test_transformer_equals_diffusers(divisor):
    """diffusers embeds t at 10000^(-i/127); DiT's own code at 10000^(-i/128), which its files need."""
    from diffusers import DiTTransformer2DModel
    ours = random_model("DiT-S/4", 16, 4, 10, freq_divisor=divisor)
    theirs = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12,
                                   sample_size=16, patch_size=4, num_embeds_ada_norm=10, norm_eps=1e-6).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), 12))
    if divisor == 128:
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = torch.randn(5, 4, 16, 16), torch.tensor([0, 3, 250, 700, 999]), torch.tensor([0, 1, 2, 9, 10])
    with torch.no_grad():
        a, b = ours(x, t, y), theirs(x, t, y).sample
    assert a.std() > 0.1
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_new_networks_start_as_dit_does():
    """adaLN-Zero: the output is 0 whatever goes in; a scale-aware network ignores w until it has learnt it."""
    model = create_model("SiT-T/2", input_size=8, in_channels=3, num_classes=5, scale_aware=True)
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 5])
    assert model(x, t, y, 2.0).abs().max() == 0
    nn.init.normal_(model.final_layer.linear.weight)
    assert torch.equal(model(x, t, y, 3.0), model(x, t, y)) and model(x, t, y).abs().max() > 0
    with pytest.raises(ValueError, match="scale-aware"):
        create_model("SiT-T/2", input_size=8, in_channels=3, num_classes=5)(x, t, y, 1.5)
    with pytest.raises(ValueError, match="SiT-XL/2"):
        create_model("SiT-XXL/2", input_size=8, in_channels=3, num_classes=5)


def test_vae_codec(tmp_path):
    """A tiny AutoencoderKL saved here: scaled latents in and out, shapes, and the scale in one place."""
    vae = tiny_vae(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = models.encode(vae, images)
    posterior = vae.encode(images).latent_dist
    assert mean.shape == (2, 4, 8, 8)
    torch.testing.assert_close(mean, posterior.mean * 0.3)
    torch.testing.assert_close(std, posterior.std * 0.3)
    torch.testing.assert_close(models.decode(vae, mean), vae.decode(posterior.mean).sample)
    with pytest.raises(ValueError, match="--vae"):
        models.load_vae(str(tmp_path / "nothing"))


def tiny_vae(folder):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                  latent_channels=4, norm_num_groups=4, scaling_factor=0.3).save_pretrained(folder / "vae")
    return models.load_vae(str(folder / "vae"))


# ---------------------------------------------------------------- mg_loss

def batch(n=12, seed=0, shape=(1, 8, 8), classes=10):
    g = torch.Generator().manual_seed(seed)
    return {"x0": torch.randn(n, *shape, generator=g), "y": torch.randint(classes, (n,), generator=g),
            "t": torch.rand(n, generator=g), "noise": torch.randn(n, *shape, generator=g),
            "dropped": torch.arange(n) % 4 == 3}


def count_rows(model):
    """-> a list that gets the batch size of every pass."""
    rows = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def test_w_1_is_plain_sit_bit_for_bit():
    b, model, teacher = batch(), random_model(), random_model(seed=1)
    t = b["t"].view(-1, 1, 1, 1)
    out = model((1 - t) * b["x0"] + t * b["noise"], b["t"], torch.where(b["dropped"], 10, b["y"]))
    plain = (out - (b["noise"] - b["x0"])).square().mean((1, 2, 3))                                # Eq. 5, written out
    expected = torch.autograd.grad(plain.mean(), model.parameters())
    for w, used in ((1.0, teacher), (1.5, None)):
        loss = train_sit_mg.mg_loss(model, used, w=w, **b)
        assert torch.equal(loss, plain)
        for got, want in zip(torch.autograd.grad(loss.mean(), model.parameters()), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["ema", "online"])
def test_mg_target(kind):
    """Against Eq. 20 sample by sample; dropped and late samples keep the plain target and cost no teacher pass."""
    b, model = batch(), random_model()
    teacher = random_model(seed=1) if kind == "ema" else model
    w, t_max = 1.7, 0.6
    rows, expected, guided = count_rows(teacher), [], 0
    loss = train_sit_mg.mg_loss(model, teacher, w=w, t_max=t_max, **b)
    seen = rows.copy()
    for x0, y, t, noise, dropped in zip(*(b[key] for key in ("x0", "y", "t", "noise", "dropped")), strict=True):
        x_t, target = ((1 - t) * x0 + t * noise)[None], noise - x0
        if not dropped and t <= t_max:
            guided += 1
            target = target + (w - 1) * (teacher(x_t, t[None], y[None]) - teacher(x_t, t[None], torch.tensor([10])))[0].detach()
        label = torch.tensor([10]) if dropped else y[None]
        expected.append((model(x_t, t[None], label)[0] - target).square().mean())
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert 0 < guided < 9
    assert seen == ([2 * guided] if kind == "ema" else [12, guided])  # Eq. 20 reuses the training pass, only the empty class costs


def test_no_gradient_reaches_the_teacher():
    b, model, teacher = batch(), random_model(), random_model(seed=1)
    train_sit_mg.mg_loss(model, teacher, w=1.5, **b).mean().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())
    # the online teacher is the model: sg(.) means that the gradient is that of a constant target
    model.zero_grad()
    train_sit_mg.mg_loss(model, model, w=1.5, **b).mean().backward()
    frozen, online = copy.deepcopy(model), [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    train_sit_mg.mg_loss(model, frozen, w=1.5, **b).mean().backward()
    for p, g in zip(model.parameters(), online, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_mg_without_the_empty_class():
    """Eq. 23: the mean over distinct other labels, never the sample's own, in one pass; no sample is dropped."""
    b, model, teacher = batch(), random_model(empty_class=False), random_model(seed=1, empty_class=False)
    del b["dropped"]
    order, seen = torch.rand(12, 9), []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(args[2].view(12, -1)))
    loss = train_sit_mg.mg_loss(model, teacher, w=1.5, empty="labels", num_labels=3, order=order, **b)
    assert len(seen) == 1 and seen[0].shape == (12, 4) and torch.equal(seen[0][:, 0], b["y"])
    assert all(len(set(row.tolist())) == 4 for row in seen[0])
    t = b["t"].view(-1, 1, 1, 1)
    x_t, target = (1 - t) * b["x0"] + t * b["noise"], b["noise"] - b["x0"]
    labels = seen[0].clone()
    with torch.no_grad():
        outs = torch.stack([teacher(x_t, b["t"], labels[:, i]) for i in range(4)])
    target = target + 0.5 * (outs[0] - outs[1:].mean(0))
    torch.testing.assert_close(loss, (model(x_t, b["t"], b["y"]) - target).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_mg_of_a_scale_aware_network():
    """Eq. 22: the student sees (c, w) or (empty, 0), the teacher (c, 1) and (empty, 0); scale 1 costs no teacher pass."""
    b, model, teacher = batch(), random_model(scale_aware=True), random_model(seed=1, scale_aware=True)
    w = torch.where(torch.arange(12) % 2 == 0, torch.linspace(1.2, 3, 12), 1.0)
    rows = count_rows(teacher)
    loss = train_sit_mg.mg_loss(model, teacher, w=w, **b)
    guided = ~b["dropped"] & (w != 1)
    assert rows == [2 * int(guided.sum())]
    t, empty = b["t"].view(-1, 1, 1, 1), torch.full((12,), 10)
    x_t, target = (1 - t) * b["x0"] + t * b["noise"], b["noise"] - b["x0"]
    with torch.no_grad():
        offset = teacher(x_t, b["t"], b["y"], 1.0) - teacher(x_t, b["t"], empty, 0.0)
        target = target + torch.where(guided, w - 1, 0).view(-1, 1, 1, 1) * offset
    out = model(x_t, b["t"], torch.where(b["dropped"], empty, b["y"]), torch.where(b["dropped"], 0, w))
    torch.testing.assert_close(loss, (out - target).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_draws_of_mg_loss():
    """t, noise and dropped are drawn when not given: uniform times, --drop's share of empty labels."""
    model, seen = random_model(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args))
    torch.manual_seed(0)
    train_sit_mg.mg_loss(model, None, torch.zeros(4000, 1, 8, 8), torch.zeros(4000, dtype=torch.int64), 1.0, drop=0.2)
    x_t, t, y = seen[0]
    assert abs((y == 10).float().mean() - 0.2) < 0.02 and 0 <= t.min() and t.max() < 1 and abs(t.mean() - 0.5) < 0.02
    torch.testing.assert_close(x_t.std((1, 2, 3)) / t, torch.ones(4000), rtol=0, atol=0.5)


class Table(nn.Module):
    """One free output for each (point, label): what a network that can fit anything converges to."""
    num_classes = 2

    def __init__(self, empty):
        super().__init__()
        self.empty, self.out = empty, nn.Parameter(torch.zeros_like(empty))                        # (N, 2, 1, 1)

    def forward(self, x, t, y):
        n = len(self.empty)
        return torch.where((y == 2).view(-1, 1, 1, 1), self.empty.repeat(len(y) // n, 1, 1, 1),
                           self.out.repeat(len(y) // n, 1, 1, 1))


class Pairs(Table):
    """The same for mg_loss's teacher pass, whose rows are (c, empty), (c, empty), ..."""

    def forward(self, x, t, y):
        return torch.where((y == 2).view(-1, 1, 1, 1), self.empty.repeat_interleave(2, 0), self.out.repeat_interleave(2, 0))


MEANS, STD = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.5, -1.0]], dtype=torch.float64), 0.4  # classes: rows 0, 1 | row 2


def mixture_velocity(x, t, rows, data=False):
    """E[eps - x_0 | x_t = x] (data: E[x_0 | x_t]) where x_0 is an even mixture of N(MEANS[rows], STD^2): (N, 2), exact."""
    var = (1 - t) ** 2 * STD ** 2 + t ** 2
    off = x[:, None] - (1 - t) * MEANS[rows]                                                       # (N, rows, 2)
    weight = torch.softmax(-off.square().sum(-1) / (2 * var), 1)[..., None]
    x0 = (weight * (MEANS[rows] + (1 - t) * STD ** 2 / var * off)).sum(1)
    return x0 if data else (x - (1 - t) * x0) / t - x0


@pytest.mark.parametrize("w", [0.5, 1.1, 1.5, 1.8])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_fixed_point_is_cfg_at_1_over_2_minus_w(w, t):
    """Training to the target, then the EMA catching up, again and again: out(c) ends at CFG's output at scale 1/(2-w)."""
    torch.manual_seed(0)
    x_t = torch.randn(16, 2, dtype=torch.float64)
    x0 = mixture_velocity(x_t, t, [0, 1], data=True)
    noise = (x_t - (1 - t) * x0) / t  # so that noise - x0 is exactly E[v | x_t, c]
    cond, empty = mixture_velocity(x_t, t, [0, 1]), mixture_velocity(x_t, t, [0, 1, 2])
    model, teacher = Table(empty[..., None, None]), Pairs(empty[..., None, None])
    image = {"x0": x0[..., None, None], "y": torch.zeros(16, dtype=torch.int64), "noise": noise[..., None, None],
             "t": torch.full((16,), t, dtype=torch.float64), "dropped": torch.zeros(16, dtype=torch.bool)}
    for _ in range(200):
        model.out.grad = None
        train_sit_mg.mg_loss(model, teacher, w=w, **image).sum().backward()
        with torch.no_grad():
            model.out -= model.out.grad  # the loss is mean((out - target)^2) over 2 numbers: this goes to the target
            teacher.out.copy_(model.out)
    scale = 1 / (2 - w)
    torch.testing.assert_close(model.out[..., 0, 0], empty + scale * (cond - empty), rtol=0, atol=1e-9)
    assert (cond - empty).abs().max() > 0.05


# ---------------------------------------------------------------- train_dit_mg.py

def dit_batch(**kwargs):
    b = batch(shape=(4, 8, 8), **kwargs)
    return b | {"t": (b["t"] * 1000).long(), "x0": b["x0"].clamp(-1, 1)}


def corrupt_dit(b):
    """Eq. 1 in float64."""
    bar = ALPHA_BARS[b["t"]].view(-1, 1, 1, 1)
    return bar.sqrt() * b["x0"].double() + (1 - bar).sqrt() * b["noise"].double()


def reference_bound(b, eps, v):
    """The variational term straight from the definitions, in float64: torch.distributions' KL, and the mass of a bin at t = 0."""
    def at(table):
        return table[b["t"]].view(-1, 1, 1, 1)
    x_t, x0, before = corrupt_dit(b), b["x0"].double(), torch.cat([torch.ones(1, dtype=torch.float64), ALPHA_BARS[:-1]])
    variance = BETAS * (1 - before) / (1 - ALPHA_BARS)
    variance[0] = variance[1]

    def mean(x0):  # of q(x_{t-1} | x_t, x_0): DDPM, Eq. 7
        return (at(before).sqrt() * at(BETAS) * x0 + (1 - at(BETAS)).sqrt() * (1 - at(before)) * x_t) / (1 - at(ALPHA_BARS))
    guess = (x_t - (1 - at(ALPHA_BARS)).sqrt() * eps) / at(ALPHA_BARS).sqrt()
    part = (v + 1) / 2
    q = torch.distributions.Normal(mean(x0), at(variance).sqrt())
    p = torch.distributions.Normal(mean(guess), (part * at(BETAS).log() + (1 - part) * at(variance).log()).exp().sqrt())
    high, low = p.cdf(x0 + 1 / 255), p.cdf(x0 - 1 / 255)
    high[x0 > 0.999], low[x0 < -0.999] = 1, 0
    first = -(high - low).clamp(min=1e-12).log()
    kl = torch.distributions.kl_divergence(q, p)
    return torch.where(b["t"].view(-1, 1, 1, 1) == 0, first, kl).mean((1, 2, 3)) / np.log(2)


def test_dit_loss_against_the_formulas():
    """Both terms, with and without guidance, which moves the first one only; four of the samples are at t = 0."""
    model, teacher, b = random_model("DiT-T/2", in_channels=4), random_model("DiT-T/2", in_channels=4, seed=1), dit_batch(n=40)
    b["t"][:4] = 0
    x_t = corrupt_dit(b).float()
    out = model(x_t, b["t"], torch.where(b["dropped"], 10, b["y"])).double()
    bound = reference_bound(b, out[:, :4].detach(), out[:, 4:])
    with torch.no_grad():
        offset = (teacher(x_t, b["t"], b["y"]) - teacher(x_t, b["t"], torch.full((40,), 10)))[:, :4].double()
    for w, used in ((1.0, None), (1.5, teacher)):
        guided = (~b["dropped"] & (b["t"] <= 700)).view(-1, 1, 1, 1)
        target = b["noise"].double() + (w - 1) * torch.where(guided, offset, 0)                    # Eq. 18
        want = (out[:, :4] - target).square().mean((1, 2, 3)) + bound
        got = train_dit_mg.mg_loss(model, used, w=w, t_max=0.7, **b)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    # the variational term sees no gradient into eps: the mean is frozen
    bias = model.final_layer.linear.bias
    bound_only = models.variational_bound(b["x0"], b["noise"], out[:, :4].detach(), out[:, 4:].float(), b["t"])
    grad, = torch.autograd.grad(bound_only.sum(), bias, retain_graph=True)
    assert grad.view(4, 8)[:, :4].abs().max() == 0 and grad.view(4, 8)[:, 4:].abs().max() > 0
    grad, = torch.autograd.grad(got.sum(), bias, retain_graph=True)
    want, = torch.autograd.grad(((out[:, :4] - target).square().mean((1, 2, 3)) + bound).sum(), bias)
    torch.testing.assert_close(grad, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 1000), ("ddpm", 50), ("ddpm", 8), ("ddim", 50), ("ddim", 8)])
def test_dit_samplers_equal_diffusers(name, steps, monkeypatch):
    """Step by step with the same noise; diffusers' tables in float64, as ours (its float32 ones are off by 1e-5 and more)."""
    import diffusers
    from diffusers.schedulers import scheduling_ddpm
    options = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
    if name == "ddpm":
        theirs = diffusers.DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace", **options)
    else:
        theirs = diffusers.DDIMScheduler(timestep_spacing="trailing", **options)
    theirs.alphas, theirs.betas, theirs.alphas_cumprod = 1 - BETAS, BETAS, ALPHA_BARS
    theirs.one = theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    theirs.set_timesteps(steps)
    model = random_model("DiT-T/2", in_channels=4)
    nn.init.normal_(model.final_layer.linear.weight, std=0.01)  # the variance channels stay about in [-1, 1]
    x, y, noises = torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 10]), torch.randn(steps, 3, 4, 8, 8)
    draws = iter(noises.double())
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(draws))
    want, times, ours = x.double(), [], iter(noises)
    model.register_forward_pre_hook(lambda _, args: times.append(int(args[1][0])))
    with torch.no_grad():
        for t in theirs.timesteps:
            out = model(want.float(), t.expand(3), y).double()
            want = theirs.step(out if name == "ddpm" else out[:, :4], t, want).prev_sample
        got = SAMPLERS[name](model, x, y, steps=steps, randn=lambda: next(ours))
    assert times[:steps] == times[steps:] == theirs.timesteps.tolist()
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


class GaussianNoise(nn.Module):
    """The exact eps of DiT's path where x_0 ~ N(0.7, 0.5^2)."""
    num_classes = 1

    def forward(self, x, t, y):
        bar = ALPHA_BARS.float()[t].view(-1, 1, 1, 1)
        return (1 - bar).sqrt() / (bar * 0.25 + 1 - bar) * (x - bar.sqrt() * 0.7)


@pytest.mark.parametrize(("name", "steps", "off"), [("ddpm", 1000, 0.02), ("ddim", 1000, 0.01), ("ddim", 50, 0.06)])
def test_dit_samplers_reproduce_mean_and_variance(name, steps, off):
    """ddim is of first order: at 50 steps its standard deviation is 5 % short, whatever the spacing of the times."""
    torch.manual_seed(0)
    x_0 = SAMPLERS[name](GaussianNoise(), torch.randn(20000, 1, 1, 1), torch.zeros(20000, dtype=torch.int64), steps=steps)
    assert x_0.mean() == pytest.approx(0.7, abs=0.015) and x_0.std() == pytest.approx(0.5, rel=off)


def test_cfg_of_a_dit_leaves_the_variance_conditional():
    model, x, y = random_model("DiT-T/2", in_channels=4), torch.randn(2, 4, 8, 8).double(), torch.tensor([1, 2])
    with torch.no_grad():
        got = sample.predict(model, x, 500, y, None, 2.0, (0.0, 1.0), 0.5).float()
        time = torch.full((2,), 500)
        cond, empty = model(x.float(), time, y), model(x.float(), time, torch.full((2,), 10))
    torch.testing.assert_close(got[:, :4], (2 * cond - empty)[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[:, 4:], cond[:, 4:], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- public checkpoints, diffusers

PUBLIC = {"embedding": ("y_embedder.embedding_table.weight", (1001, 1152)), "positions": ("pos_embed", (1, 256, 1152)),
          "patches": ("x_embedder.proj.weight", (1152, 4, 2, 2)), "t": ("t_embedder.mlp.0.weight", (1152, 256)),
          "qkv": ("blocks.27.attn.qkv.weight", (3456, 1152)), "fc1": ("blocks.0.mlp.fc1.weight", (4608, 1152)),
          "modulation": ("blocks.5.adaLN_modulation.1.weight", (6912, 1152)), "out": ("final_layer.linear.weight", (32, 1152)),
          "last": ("final_layer.adaLN_modulation.1.bias", (2304,))}


def test_keys_and_shapes_of_dit_xl():
    """DiT-XL-2-256x256.pt has 28 blocks of 10 tensors and 12 more; nothing is allocated."""
    with torch.device("meta"):
        state = create_model("DiT-XL/2", input_size=32, in_channels=4, num_classes=1000).state_dict()
    assert len(state) == 28 * 10 + 12
    assert all(tuple(state[key].shape) == shape for key, shape in PUBLIC.values())


def public_file(path, layout, seed=3):
    """Random weights in a public layout at size S/8 -> (path, our network that gives what the original would give)."""
    kind = "DiT" if layout in ("dit", "dit-training") else "SiT"
    model = random_model(f"{kind}-S/8", 16, 4, 7, seed=seed, freq_divisor=128)
    state = dict(model.state_dict())
    if layout in ("sit", "sit-training"):  # twice the channels; per patch pixel: C of v, then C that nobody uses
        for name in ("weight", "bias"):
            value = state[f"final_layer.linear.{name}"].view(64, 1, 4, *((384,) if name == "weight" else ()))
            state[f"final_layer.linear.{name}"] = torch.cat([value, torch.randn_like(value)], 1).flatten(0, 2)
    if layout == "repa":
        state |= {"projectors.0.0.weight": torch.ones(3, 3), "projectors.0.0.bias": torch.ones(3)}
    if "training" in layout:
        import argparse
        args = argparse.Namespace(model=f"{kind}-S/8", lr=1e-4)
        state = {"model": state, "ema": state, "opt": {"state": {}}, "args": args}
    elif layout in ("repa", "mg"):
        state = {"ema": state, "steps": 4}
    torch.save(state, path)
    return model


@pytest.mark.parametrize(("layout", "name"), [
    ("dit", "DiT-XL-2-512x512.pt"), ("dit-training", "0400000.pt"), ("sit", "SiT-XL-2-256x256.pt"),
    ("sit-training", "0400000.pt"), ("repa", "last.pt"), ("mg", "sit-mg.pt")])
def test_public_layouts(layout, name, tmp_path):
    """Each gives what its own convention defines: SiT's own files run from t' = 1 - t and give x_0 - eps."""
    original = public_file(tmp_path / name, layout)
    model, config = load_checkpoint(tmp_path / name)
    assert (model.num_classes, model.input_size, model.in_channels, model.learn_sigma) == (7, 16, 4, "dit" in layout)
    assert config["model"] == ("DiT-S/8" if "dit" in layout else "SiT-S/8")
    x, y, t = torch.randn(4, 4, 16, 16), torch.tensor([0, 3, 6, 7]), torch.tensor([0.0, 0.3, 0.71, 1.0])
    with torch.no_grad():
        if "dit" in layout:
            t = (t * 999).long()
            got, want = model(x, t, y), original(x, t, y)
        elif layout in ("repa", "mg"):
            got, want = model(x, t, y), original(x, t, y)
        else:
            got, want = model(x, t, y), -original(x, 1 - t, y)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_public_files_that_are_refused(tmp_path):
    """No hint of DiT or SiT, a missing and an unexpected tensor, a size that nobody has, code in the pickle."""
    public_file(tmp_path / "DiT.pt", "dit")
    state = torch.load(tmp_path / "DiT.pt", weights_only=True)

    def refused(name, state):
        torch.save(state, tmp_path / name)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as e:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(e.value)
        return str(e.value)
    assert "have exactly one of DiT and SiT" in refused("renamed.pt", state)
    assert "mlp.fc1.bias" in refused("DiT-less.pt", {k: v for k, v in state.items() if k != "blocks.3.mlp.fc1.bias"})
    assert "q_norm" in refused("DiT-more.pt", state | {"blocks.0.attn.q_norm.weight": torch.ones(64)})
    assert "no known size" in refused("DiT-odd.pt", {k: v for k, v in state.items() if not k.startswith("blocks.11.")})
    assert "never run" in refused("DiT-evil.pt", {"ema": state, "args": Evil()})
    assert not Path(os.environ["TORCH_HOME"], "evil").exists()


def test_round_trip_through_diffusers(tmp_path):
    """Our DiT -> a folder -> DiTPipeline: the images of our ddim from the same latents; and back, tensor by tensor."""
    from diffusers import DiTPipeline
    vae, ours = tiny_vae(tmp_path), random_model("DiT-T/2", 8, 4, 10)
    save_random(tmp_path / "ckpt.pt", ours, "DiT-T/2", vae=str(tmp_path / "vae"))
    sample.main([str(tmp_path / "ckpt.pt"), "--to-diffusers", str(tmp_path / "folder")])
    pipeline = DiTPipeline.from_pretrained(tmp_path / "folder")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1, 2, 3], guidance_scale=1.0, num_inference_steps=20, generator=torch.Generator().manual_seed(5),
                      output_type="np").images
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        x_0 = SAMPLERS["ddim"](ours, x, torch.tensor([1, 2, 3]), steps=20)
    want = (models.decode(vae, x_0) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - want).max() < 1e-4 and want.std() > 0.01
    back, config = load_checkpoint(tmp_path / "folder")
    assert config["vae"] == str(tmp_path / "folder" / "vae") and config["w"] == 1.5
    for (key, a), (other, b) in zip(ours.state_dict().items(), back.state_dict().items(), strict=True):
        assert key == other and torch.equal(a, b)
    assert "exists already" in error_of(sample.main, tmp_path / "ckpt.pt", "--to-diffusers", tmp_path / "folder")
    save_random(tmp_path / "pixels.pt", random_model("DiT-T/2"), "DiT-T/2")
    assert "give --vae" in error_of(sample.main, tmp_path / "pixels.pt", "--to-diffusers", tmp_path / "new")


# ---------------------------------------------------------------- samplers

class Gaussian(nn.Module):
    """The exact velocity where x_0 ~ N(mean, std^2), all coordinates alike; counts its calls."""
    num_classes, mean, std, calls = 1, 0.7, 0.5, 0

    def forward(self, x, t, y):
        self.calls += 1
        t = t.view(-1, 1, 1, 1)
        var = (1 - t) ** 2 * self.std ** 2 + t ** 2
        return -self.mean + (t - (1 - t) * self.std ** 2) / var * (x - (1 - t) * self.mean)


def gaussian_x_0(name, steps, n=20000):
    torch.manual_seed(0)
    model, x = Gaussian(), torch.randn(n, 1, 1, 1)
    return SAMPLERS[name](model, x, torch.zeros(n, dtype=torch.int64), steps=steps), x, model.calls


@pytest.mark.parametrize(("name", "calls"), [("euler", 100), ("heun", 199), ("euler-maruyama", 100)])
def test_samplers_reproduce_mean_and_variance(name, calls):
    x_0, _, made = gaussian_x_0(name, 100)
    assert made == calls and x_0.dtype == torch.float32
    assert x_0.mean() == pytest.approx(0.7, abs=0.012) and x_0.std() == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("name", ["euler", "heun", "euler-maruyama"])
def test_one_step_is_one_call(name):
    assert gaussian_x_0(name, 1, 10)[2] == 1


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_the_ode_samplers(name, order):
    """The flow maps x to mean + std * x exactly; the error falls as steps^-order."""
    errors = []
    for steps in (16, 32, 64):
        x_0, x, _ = gaussian_x_0(name, steps, 500)
        errors.append(float((x_0 - (0.7 + 0.5 * x)).abs().mean()))
    for coarse, fine in itertools.pairwise(errors):
        assert np.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_euler_maruyama_against_its_moments():
    """The scheme is linear here, so its mean and variance follow a recursion that needs no sampling."""
    mean, var, times = 0.0, 1.0, [*np.linspace(1, 0.04, 20), 0.0]
    for t, t_next in itertools.pairwise(times):
        v_t = (1 - t) ** 2 * 0.25 + t ** 2
        slope = (t - (1 - t) * 0.25) / v_t                                                         # v = -0.7 + slope (x - (1-t) 0.7)
        # drift v - (g^2/2) score with score = -(x - (1-t) 0.7) / v_t, g^2 = 2t
        a = 1 + (slope + t / v_t) * (t_next - t)
        mean = mean + (-0.7 + (slope + t / v_t) * (mean - (1 - t) * 0.7)) * (t_next - t)
        var = a ** 2 * var + (2 * t * (t - t_next) if t_next > 0 else 0)
    x_0, _, _ = gaussian_x_0("euler-maruyama", 20, 200_000)
    assert x_0.mean() == pytest.approx(mean, abs=0.005) and x_0.var() == pytest.approx(var, rel=0.015)


def test_cfg_acts_in_its_interval_and_on_every_channel():
    """cond + (cfg - 1) (cond - uncond) inside, cond outside with half the rows."""
    model, rows = random_model(in_channels=4), []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    x, y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 2, 3])
    with torch.no_grad():
        got = [sample.predict(model, x, t, y, None, 3.0, (0.3, 0.7), t) for t in (0.2, 0.3, 0.7, 0.8)]
        assert rows == [3, 6, 6, 3]
        for t, out in zip((0.2, 0.3, 0.7, 0.8), got, strict=True):
            time = torch.full((3,), t)
            cond, empty = model(x.float(), time, y), model(x.float(), time, torch.full((3,), 10))
            want = cond + 2 * (cond - empty) if 0.3 <= t <= 0.7 else cond
            torch.testing.assert_close(out.float(), want, rtol=1e-4, atol=1e-5)


def test_a_sample_depends_on_its_seed_alone():
    """Whatever the batch size and the order, with noise at every step."""
    model = random_model()
    labels, seeds = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2, 6, 5, 2 ** 40])
    whole = draw(model, labels, seeds, steps=8)
    back = draw(model, labels.flip(0), seeds.flip(0), steps=8).flip(0)
    alone = torch.cat([draw(model, labels[i:i + 1], seeds[i:i + 1], steps=8) for i in range(5)])
    torch.testing.assert_close(back, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)
    assert (draw(model, labels, seeds + 1, steps=8) - whole).abs().mean() > 0.1
    images = generate(model, labels, seeds, steps=8)
    assert images.dtype == torch.uint8 and images.shape == (5, 8, 8, 1)
    assert torch.equal(images[..., 0].float(), ((whole[:, 0] + 1) * 127.5).round().clamp(0, 255))


# ---------------------------------------------------------------- sample.py, the command line

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("ckpt") / "ckpt.pt", random_model(), "SiT-T/2")


def test_sample_npz_is_the_same_for_1_2_and_4_processes(checkpoint, tmp_path):
    command = "sample.py", checkpoint, "--num", 10, "--class-labels", "balanced", "--steps", 5, "--batch", 3, "--out"
    status, out, err = run(*command, tmp_path / "2.npz", processes=2)
    assert status == 0 and "images/s" in out, err
    for processes in (1, 4):
        draw_all = lambda n=processes: sample.main([*map(str, command[1:]), str(tmp_path / f"{n}.npz")])
        assert in_processes(processes, draw_all) == [0] * processes
    one, two, four = (np.load(tmp_path / f"{processes}.npz") for processes in (1, 2, 4))
    assert one["arr_0"].shape == (10, 8, 8, 1) and one["arr_0"].dtype == np.uint8
    assert np.array_equal(one["labels"], np.arange(10)) and np.array_equal(one["arr_0"], two["arr_0"])
    assert np.array_equal(one["arr_0"], four["arr_0"])
    record = json.loads((tmp_path / "1.json").read_text())
    assert record == json.loads((tmp_path / "2.json").read_text())
    assert {k: record[k] for k in ("sampler", "steps", "cfg", "w", "seed", "dtype", "class_labels", "num", "checkpoint")} == {
        "sampler": "euler-maruyama", "steps": 5, "cfg": 1.0, "w": None, "seed": 0, "dtype": "fp32",
        "class_labels": "balanced", "num": 10, "checkpoint": str(checkpoint)}
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob("*.tmp"))


def test_interrupted_sampling_goes_on(checkpoint, tmp_path, monkeypatch):
    argv = [str(checkpoint), "--num", "9", "--class-labels", "random", "--steps", "3", "--batch", "2", "--out"]
    sample.main([*argv, str(tmp_path / "whole.npz")])
    real, calls = sample.generate, []

    def dies_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(sample, "generate", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        sample.main([*argv, str(tmp_path / "a.npz")])
    assert "a.npz.parts" in error_of(sample.main, *argv, tmp_path / "a.npz", "--steps", 4)  # made otherwise: refused
    calls.clear()
    calls += [1] * 3  # no more deaths
    sample.main([*argv, str(tmp_path / "a.npz")])
    assert len(calls) == 3 + 3  # of 5 batches, 2 were there
    for key in "arr_0", "labels":
        assert np.array_equal(np.load(tmp_path / "a.npz")[key], np.load(tmp_path / "whole.npz")[key])


def test_sample_grid(checkpoint, tmp_path):
    """A row a label; the numbers in the picture are the samples'."""
    from PIL import Image
    sample.main([str(checkpoint), "--labels", "7", "3", "--num", "6", "--steps", "3", "--out", str(tmp_path / "grid.png")])
    want = generate(load_checkpoint(checkpoint)[0], torch.tensor([7, 7, 7, 3, 3, 3]), torch.arange(6), steps=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 50, 3 * 50)
    assert np.array_equal(grid.reshape(2, 50, 3, 50)[:, 1:-1:6, :, 1:-1:6].swapaxes(1, 2).reshape(6, 8, 8), want[..., 0])


@pytest.mark.parametrize(("argv", "says"), [
    (["--labels", 10], "--labels 10: must be 0 to 9"),
    (["--sampler", "ddpmm"], "--sampler ddpmm"),
    (["--w", 1.5], "--w 1.5"),
    (["--stepz", 3], "--stepz"),
    (["--steps", 0], "--steps 0"),
    (["--interval", 0.7, 0.3], "--interval"),
    (["--out", "x.jpg"], "--out x.jpg"),
    (["--labels", 1, "--class-labels", "random"], "--class-labels random"),
    (["--vae", "nowhere"], "--vae nowhere"),
    (["--interval", 0, 0.5], "--interval"),
    (["--figure", "x.png", "--compare", "x.pt", "--labels", 1], "--figure x.png"),
])
def test_sample_refuses(checkpoint, argv, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert says in error_of(sample.main, checkpoint, *argv)
    assert not list(tmp_path.iterdir())


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['TORCH_HOME']}/evil",)


def test_bad_checkpoints(checkpoint, tmp_path):
    """Missing, truncated, foreign, with code inside: one line that names the file, and the code is not run."""
    whole = Path(checkpoint).read_bytes()
    (tmp_path / "torn.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"ema": Evil()}, tmp_path / "evil.pt")
    state = torch.load(checkpoint, weights_only=True)
    state["config"] = state["config"] | {"input_size": 16}
    torch.save(state, tmp_path / "mixed.pt")
    for i, odd in enumerate(({"config": {}, "ema": {}}, {"config": "abc", "ema": {}, "step": 1}, {0: torch.ones(1)},
                             {"pos_embed": torch.ones(3)})):
        torch.save(odd, tmp_path / f"odd{i}.pt")
    for name in ("none", "torn", "text", "empty", "foreign", "list", "evil", "mixed", "odd0", "odd1", "odd2", "odd3"):
        assert f"{name}.pt" in error_of(sample.main, tmp_path / f"{name}.pt", "--out", tmp_path / "x.png")
    assert error_of(sample.main, tmp_path)
    assert not (tmp_path / "x.png").exists() and not Path(os.environ["TORCH_HOME"], "evil").exists()


def test_a_vae_of_other_channels_leaves_nothing_behind(checkpoint, tmp_path):
    tiny_vae(tmp_path)
    assert "--vae" in error_of(sample.main, checkpoint, "--vae", tmp_path / "vae", "--steps", 1, "--out", tmp_path / "x.png")
    assert not list(tmp_path.glob("x.*"))


# ---------------------------------------------------------------- the train scripts' run

TINY = ["--batch", "8", "--log-every", "1", "--eval-samples", "20", "--eval-steps", "2"]


def train(kind, out, *flags):
    """A short run in this process -> what it printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        SCRIPTS[kind].main([*TINY, "--out", str(out), *map(str, flags)])
    return text.getvalue()


def losses(out):
    with open(Path(out) / "log.csv", newline="") as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


def assert_same_checkpoint(a, b, **tolerance):
    a, b = (torch.load(Path(out) / "ckpt.pt", weights_only=True) for out in (a, b))
    assert a["config"] == b["config"] and a["step"] == b["step"]
    for name in "model", "ema":
        for key in a[name]:
            torch.testing.assert_close(a[name][key], b[name][key], **{"rtol": 0, "atol": 0} | tolerance)


def test_the_scripts_are_equal_between_their_fences():
    """And `diff` of the two, which the README prints, is short."""
    def fenced(kind):
        parts = re.split(r"^ *# =+ (.*)\n", (HERE / f"train_{kind}_mg.py").read_text(), flags=re.MULTILINE)
        return [(title, text) for title, text in zip(parts[1::2], parts[2::2], strict=True) if title.startswith("the same")]
    dit, sit = fenced("dit"), fenced("sit")
    assert len(dit) == 6 and dit == sit
    assert sum(len(text.splitlines()) for _, text in sit) > 500
    diff = subprocess.run(["diff", "train_dit_mg.py", "train_sit_mg.py"], cwd=HERE, capture_output=True, text=True, check=False)
    assert 20 < len(diff.stdout.splitlines()) < 40
    assert f"```diff\n{diff.stdout}```" in (HERE / "README.md").read_text()


def readme_commands():
    """What the README's indented lines run, in their order, with their shell loops unrolled: [[script, *flags]].

    Left out: those marked as not run, and all seeds of a loop but the first.
    """
    text = re.sub(r"^```.*?^```", "", (HERE / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    for line in lines:
        assert "not run" in line or not re.search(r"imagenet|[DS]iT-XL|VIRTUAL", line), line
    text = "\n".join(line for line in lines if "not run" not in line).replace("for s in 0 1 2", "for s in 0")
    shell = 'set -f; python() { printf "%s\\037" "$@"; echo; }; torchrun() { python "$@"; }; pip() { :; }; pytest() { :; }\n'
    done = subprocess.run(["bash", "-c", shell + text], capture_output=True, text=True, check=True)
    assert not done.stderr
    return [[word for word in line.split("\037")[:-1] if word != "--"] for line in done.stdout.splitlines()]


def test_the_readmes_code():
    """Its first lines make mg_loss's target; those to copy train a network."""
    idea, use = re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    model, ema, b = random_model(seed=1), random_model(seed=2), batch()
    given = {"x0": b["x0"], "y": b["y"], "w": 1.5}
    s = b["t"].view(-1, 1, 1, 1)
    names = {**given, "torch": torch, "ema": ema, "t": b["t"], "noise": b["noise"], "x_t": (1 - s) * b["x0"] + s * b["noise"],
             "empty": torch.full_like(b["y"], 10)}
    exec(idea, names)  # noqa: S102
    want = (model(names["x_t"], b["t"], b["y"]) - names["target"]).square().mean((1, 2, 3))
    torch.testing.assert_close(train_sit_mg.mg_loss(model, ema, **given, drop=0, t=b["t"], noise=b["noise"]), want)
    names = {**given, "torch": torch, "copy": copy, "model": model, "optimizer": torch.optim.AdamW(model.parameters(), 1e-3)}
    before = copy.deepcopy(model.state_dict())
    exec(use, names)  # noqa: S102
    assert all((model.state_dict()[key] != value).any() for key, value in before.items() if key.endswith("weight"))
    assert not any(p.requires_grad for p in names["ema"].parameters())
    for key, value in names["ema"].state_dict().items():
        torch.testing.assert_close(value, before[key].lerp(model.state_dict()[key], 1 - 0.9999), rtol=0, atol=1e-6)


def test_the_readmes_commands_run(tmp_path, monkeypatch, capsys):
    """Each of them, one after the other, on few images; those that need ImageNet, public weights or GPUs say that they weren't run."""
    monkeypatch.chdir(tmp_path)
    mains = {"train_sit_mg.py": train_sit_mg.main, "train_dit_mg.py": train_dit_mg.main, "sample.py": sample.main, "fid.py": fid.main,
             "models.py": models.main}
    short = {"train": ["--steps", "2", "--batch", "8", "--eval-samples", "20", "--eval-steps", "2"], "sample": ["--steps", "2"]}
    seen = set()
    for script, *flags in readme_commands():
        if script == "test_mg.py":  # the benchmarks
            continue
        flags = [name for flag in flags for name in (sorted(glob.glob(flag)) or [flag])] + short.get(script[:-3].split("_")[0], [])
        if {"--num", "--num-samples", "--figure"} & set(flags):
            flags += ["--num", "20"]
        mains[script](*([flags] if script != "models.py" else []))
        seen.add(script)
        assert capsys.readouterr().out, script
    assert seen == set(mains)


@pytest.mark.parametrize("kind", ["SiT", "DiT"])
def test_train_sample_score(kind, tmp_path):
    out = tmp_path / "made" / "for it"
    printed = train(kind, out, "--steps", 4, "--w", 1.5)
    scale, = (line for line in printed.splitlines() if line.startswith("effective guidance scale"))
    assert "= 2.00" in scale and "w=1.5" in printed.split(scale)[0]
    assert "| fid | sfid | is | precision | recall | accuracy |" in printed
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "log.csv", "samples.npz", "samples.json", "samples.png", "curves.png"}
    assert len(losses(out)) == 4 and all(np.isfinite(losses(out)))
    drawn = np.load(out / "samples.npz")
    assert drawn["arr_0"].shape == (20, 8, 8, 1) and np.array_equal(drawn["labels"], np.arange(20) % 10)
    assert json.loads((out / "samples.json").read_text())["sampler"] == {"SiT": "euler-maruyama", "DiT": "ddpm"}[kind]
    model, config = load_checkpoint(out / "ckpt.pt")
    assert model.kind == kind and config["w"] == 1.5 and config["data"] == "digits"
    assert "warning" in train(kind, tmp_path / "far", "--steps", 1, "--w", 2.5)
    other = {"SiT": "DiT-T/2", "DiT": "SiT-T/2"}[kind]
    assert f"--model {other}" in error_of(SCRIPTS[kind].main, "--model", other, "--out", tmp_path / "x")
    assert "fits" not in printed and not (tmp_path / "x").exists()


def test_bf16_trains_and_keeps_fp32_weights(tmp_path):
    train("SiT", tmp_path / "fp32", "--steps", 3)
    train("SiT", tmp_path / "bf16", "--steps", 3, "--dtype", "bf16")
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    assert np.allclose(losses(tmp_path / "bf16"), losses(tmp_path / "fp32"), rtol=0.02)
    assert torch.load(tmp_path / "bf16" / "ckpt.pt", weights_only=True)["model"]["blocks.0.attn.qkv.weight"].dtype == torch.float32


@pytest.mark.parametrize("teacher", ["ema", "online"])
def test_compile(teacher, tmp_path, monkeypatch):
    """The network and its teacher are compiled, whose batches change their size; here without the compiler's last, slow part."""
    flags = ["--steps", 3, "--teacher", teacher]
    train("SiT", tmp_path / "eager", *flags)
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or real(net, backend="eager"))
    train("SiT", tmp_path / "compiled", *flags, "--compile")
    assert len(compiled) == (2 if teacher == "ema" else 1)
    assert np.allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-5)


@pytest.mark.parametrize("flags", [["--w", 1.5], ["--w-range", 1, 3], ["--empty", "labels", "--num-labels", 3],
                                   ["--teacher", "online", "--t-max", 0.75, "--start", 2]])
def test_resuming_is_bit_for_bit(flags, tmp_path):
    """Interrupted after 3 of 5 steps, or not. And any --accum is the same run up to rounding."""
    train("SiT", tmp_path / "whole", "--steps", 5, *flags)
    train("SiT", tmp_path / "parts", "--steps", 3, *flags)
    train("SiT", tmp_path / "parts", "--steps", 5, *flags)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    train("SiT", tmp_path / "accum", "--steps", 5, "--accum", 4, *flags)
    assert np.allclose(losses(tmp_path / "accum"), losses(tmp_path / "whole"), rtol=0, atol=1e-5)


def test_two_processes_are_the_same_run(tmp_path):
    """The readme's command with 2 processes and with 1: the same losses and, up to rounding, the same images."""
    train("SiT", tmp_path / "one", "--steps", 5, "--w", 1.5)
    status, out, err = run("train_sit_mg.py", *TINY, "--steps", 5, "--w", 1.5, "--out", tmp_path / "two", processes=2)
    assert status == 0, err
    assert out.count("effective guidance scale") == 1
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=0, atol=1e-5)
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    train("SiT", tmp_path, "--steps", 2)
    good = (tmp_path / "ckpt.pt").read_bytes()
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    state["model"]["final_layer.linear.bias"][:] = torch.inf
    torch.save(state, tmp_path / "ckpt.pt")
    bad = (tmp_path / "ckpt.pt").read_bytes()
    error = error_of(train_sit_mg.main, *TINY, "--steps", 4, "--out", tmp_path)
    assert "the loss or the gradient of step 3, or a weight after it, is not finite" in error
    assert (tmp_path / "ckpt.pt").read_bytes() == bad != good



# ---------------------------------------------------------------- faults

FEW = ["--batch", "8", "--log-every", "3", "--save-every", "4", "--eval-samples", "0", "--eval-steps", "2"]


def work(out, argv, prepare, main=train_sit_mg.main):
    """main(argv), its words in OUT.txt; the process ends unless all went well."""
    code = 1
    try:
        sys.stdout = sys.stderr = open(f"{out}.txt", "a", buffering=1)  # noqa: SIM115
        if prepare:
            prepare(int(os.environ.get("RANK", "0")))
        main([*map(str, argv), "--out", str(out)])
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    sys.stdout.flush()
    if code:
        os._exit(code)


def fork(out, *argv, prepare=None, main=train_sit_mg.main, ranks=1):
    """Processes that run main(argv): forks of this one, which has imported everything -> exit statuses, -n for signal n.

    prepare(rank) comes first, where faults are put in. What they print goes to OUT.txt.
    """
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if not pids[-1]:
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
                               "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            work(out, argv, prepare, main)
            os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def said(out):
    """What the processes of fork() said since the last look."""
    text = Path(f"{out}.txt").read_text()
    Path(f"{out}.txt").unlink()
    return text


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(number, action):
    """-> a prepare() for fork(): in the number-th step of the process, in the middle of it, this is called."""
    def prepare(_):
        calls, real = itertools.count(1), train_sit_mg.mg_loss
        train_sit_mg.mg_loss = lambda *args, **kwargs: (next(calls) == number and action()) or real(*args, **kwargs)
    return prepare


def at_call(module, name, number, after=False):
    """-> a prepare() for fork(): kill -9 at the number-th call of a function, before it or after."""
    def prepare(_):
        calls, real = itertools.count(1), getattr(module, name)

        def dying(*args, **kwargs):
            last = next(calls) == number
            if last and not after:
                die()
            result = real(*args, **kwargs)
            if last:
                die()
            return result
        setattr(module, name, dying)
    return prepare


def half_written(number):
    """-> a prepare() for fork(): kill -9 when half of the number-th checkpoint is in its file."""
    def prepare(_):
        calls, real = itertools.count(1), torch.save

        def save(state, f):
            if next(calls) == number:
                whole = io.BytesIO()
                real(state, whole)
                f.write(whole.getvalue()[:len(whole.getvalue()) // 2])
                f.flush()
                die()
            real(state, f)
        torch.save = save
    return prepare


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """20 steps that nothing happened to; in this process, so that what a run imports is there for the forks."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    train("SiT", out, *FEW, "--steps", 20)
    assert len(losses(out)) == 10  # every third step and every fourth
    return out


def assert_same_run(a, b):
    """The whole checkpoint to the bit, the optimizer's state too, and the log's losses and metrics."""
    def assert_same(a, b):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        elif isinstance(a, (dict, list)):
            assert len(a) == len(b)
            for key in a if isinstance(a, dict) else range(len(a)):
                assert_same(a[key], b[key])
        else:
            assert a == b
    assert_same(*(torch.load(out / "ckpt.pt", weights_only=True) for out in (a, b)))
    logs = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader((out / "log.csv").open())]
            for out in (a, b)]
    assert logs[0] == logs[1]


def test_fault_kill_at_ten_moments(undisturbed, tmp_path):
    """kill -9 in a step, in the write, between the renames, and at any time at all; resumed each time."""
    out, rng = tmp_path / "out", random.Random(0)
    moments = [at_step(3, die), at_call(torch, "_foreach_lerp_", 2), half_written(1), at_call(os, "fsync", 3),
               at_call(os, "link", 1, after=True), at_call(os, "replace", 5, after=True), at_call(os, "replace", 4)]
    moments += [lambda _: threading.Timer(rng.uniform(0, 1), die).start()] * 3
    for k, prepare in enumerate(moments):
        assert fork(out, *FEW, "--steps", 20, prepare=prepare) in ([-signal.SIGKILL], [0]), (k, said(out))
        if (out / "ckpt.pt").exists():
            models.read_checkpoint(out / "ckpt.pt")
    assert fork(out, *FEW, "--steps", 20) == [0], said(out)
    assert_same_run(out, undisturbed)
    assert not [p for p in out.iterdir() if p.suffix == ".tmp"]
    text = said(out)
    assert {int(step) for step in re.findall(r"resuming from step (\d+)", text)} > {4} and "Traceback" not in text


def test_fault_the_last_two_checkpoints(tmp_path, monkeypatch):
    """At every moment there is a whole one, and two of them whenever a third is in the making."""
    path = tmp_path / "ckpt.pt"
    seen, steps = [], lambda: {p.name: models.read_checkpoint(p)["step"] for p in tmp_path.iterdir() if not p.name.startswith("ckpt.pt.")}
    save_checkpoint(path, {"step": 1})
    save_checkpoint(path, {"step": 2})
    assert steps() == {"ckpt.pt": 2, "ckpt-prev.pt": 1}
    for real in os.link, os.replace:
        def watched(*args, real=real):
            seen.append(steps())
            real(*args)
            seen.append(steps())
        monkeypatch.setattr(os, real.__name__, watched)
    save_checkpoint(path, {"step": 3})
    assert [s["ckpt.pt"] for s in seen] == [2, 2, 2, 3, 3, 3] and all(len(set(s.values())) >= 2 for s in seen)
    assert steps() == {"ckpt.pt": 3, "ckpt-prev.pt": 2}

    def no_links(*_):
        raise OSError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", no_links)
    save_checkpoint(path, {"step": 4})
    assert steps() == {"ckpt.pt": 4, "ckpt-prev.pt": 3}


def test_fault_corrupt_checkpoints(undisturbed, tmp_path):
    """Any flipped bit of the contents is found, by the training too, which goes on from the checkpoint before."""
    rng, path = random.Random(0), tmp_path / "run" / "ckpt.pt"
    good = (undisturbed / "ckpt.pt").read_bytes()
    with zipfile.ZipFile(undisturbed / "ckpt.pt") as archive:
        spans = [(info.header_offset + 200, info.file_size) for info in archive.infolist() if info.file_size > 1000]
    path.parent.mkdir()
    damaged = [good[:rng.randrange(len(good))] for _ in range(4)]
    for offset, size in rng.sample(spans, 8):
        i = offset + rng.randrange(size - 200)
        damaged.append(good[:i] + bytes([good[i] ^ 1 << rng.randrange(8)]) + good[i + 1:])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="ckpt.pt: (corrupt|truncated)"):
            load_checkpoint(path)
    for _ in range(100):  # anywhere: told, or of no consequence
        i = rng.randrange(len(good))
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << rng.randrange(8)]) + good[i + 1:])
        try:
            state = models.read_checkpoint(path)
        except ValueError as e:
            assert str(path) in str(e) and "\n" not in str(e)
        else:
            whole = torch.load(undisturbed / "ckpt.pt", weights_only=True)
            assert state["config"] == whole["config"] and state["step"] == whole["step"]
            assert all(torch.equal(state[part][key], whole[part][key]) for part in ("model", "ema") for key in whole[part])
    log = (undisturbed / "log.csv").read_text()
    for data in (damaged[0], damaged[-1], None):
        (path.parent / "ckpt-prev.pt").write_bytes((undisturbed / "ckpt-prev.pt").read_bytes())
        (path.parent / "log.csv").write_text(log)
        path.write_bytes(data) if data else path.unlink()
        assert "--seed" not in (refused := error_of(train_sit_mg.main, *FEW, "--steps", 20, "--seed", 1, "--out", path.parent))
        assert "seed 0, not 1" in refused and path.exists() == bool(data)  # a refusal changes nothing
        assert fork(path.parent, *FEW, "--steps", 20) == [0]
        text = said(path.parent)
        assert "resuming from step 16" in text and ("warning: " in text and "going on from the one before" in text) == bool(data)
        assert_same_run(path.parent, undisturbed)
        assert models.read_checkpoint(path.parent / "ckpt-prev.pt")["step"] == 16  # the corrupt one isn't kept in its place
    for name in "ckpt.pt", "ckpt-prev.pt":
        (path.parent / name).write_bytes(damaged[-1])
    assert "ckpt-prev.pt: corrupt" in error_of(train_sit_mg.main, *FEW, "--steps", 20, "--out", path.parent)


def limit(size):
    """-> a prepare() for fork(): no file may grow beyond this, as on a full disk."""
    return lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(("blocked", "flags"), [("ckpt.pt", []), ("log.csv", []), ("samples.npz", []), ("curves.png", []),
                                                ("samples.npz.parts/0.npy", ["--eval-samples", 20])])
def test_fault_full_disk(blocked, flags, undisturbed, tmp_path):
    """/dev/full is the disk: one line that names the file, exit status 2, the checkpoints of before whole."""
    out = tmp_path / "out"
    assert fork(out, *FEW, *flags, "--steps", 20, prepare=at_step(14, die)) == [-signal.SIGKILL], said(out)
    before = (out / "ckpt.pt").read_bytes(), (out / "ckpt-prev.pt").read_bytes()

    def full(_):
        real = open
        models.open = lambda path, mode: real("/dev/full" if str(path) == f"{out / blocked}.tmp" else path, mode)
    said(out)
    assert fork(out, *FEW, *flags, "--steps", 20, prepare=full) == [2]
    text = said(out)
    assert f"{out / blocked} can't be written: No space left on device" in text and "Traceback" not in text
    late = blocked not in ("ckpt.pt", "log.csv")  # by then all is trained
    assert late == (models.read_checkpoint(out / "ckpt.pt")["step"] == 20) == (
        ((out / "ckpt.pt").read_bytes(), (out / "ckpt-prev.pt").read_bytes()) != before)
    assert not list(out.glob("*.tmp"))
    assert fork(out, *FEW, *flags, "--steps", 20) == [0]
    assert_same_run(out, undisturbed) if not flags else assert_same_checkpoint(out, undisturbed)


def test_fault_full_disk_of_two_processes(tmp_path):
    """A file size limit stops torch.save half-way in one of two processes: both end, with one line."""
    out = tmp_path / "out"
    assert fork(out, *FEW, "--steps", 20, prepare=limit(1_000_000), ranks=2) == [2, 2]
    text = said(out)
    assert text.count("ckpt.pt can't be written: File too large") == 1 and "Traceback" not in text
    assert {p.name for p in out.iterdir()} == {"log.csv"} and len(losses(out)) == 2


def test_fault_gradients(tmp_path):
    """A gradient that isn't finite, of a loss that is, stops the run and names the step. --clip acts on the length."""
    def prepare(_):
        calls, real = itertools.count(1), train_sit_mg.mg_loss

        def mg_loss(*args, **kwargs):
            loss = real(*args, **kwargs)
            if next(calls) == 5:
                loss.register_hook(lambda grad: grad * math.inf)
            return loss
        train_sit_mg.mg_loss = mg_loss
    out = tmp_path / "out"
    assert fork(out, *FEW, "--steps", 20, prepare=prepare) == [2]
    text = said(out)
    assert "the loss or the gradient of step 5, or a weight after it, is not finite" in text and "Traceback" not in text
    assert models.read_checkpoint(out / "ckpt.pt")["step"] == 4
    lengths, weights = {}, {}
    for clip in 1e9, 0.1:
        lengths[clip], real = [], torch.optim.AdamW.step

        def step(self, *args, real=real, into=lengths[clip]):
            into.append(float(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm()))
            return real(self, *args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            train("SiT", tmp_path / str(clip), "--steps", 3, "--eval-samples", 0, "--clip", clip)
        weights[clip] = torch.load(tmp_path / str(clip) / "ckpt.pt", weights_only=True)["model"]
    assert min(lengths[1e9]) > 0.2 and lengths[0.1] == pytest.approx([0.1] * 3, rel=1e-3)
    train("SiT", tmp_path / "none", "--steps", 3, "--eval-samples", 0)
    none = torch.load(tmp_path / "none" / "ckpt.pt", weights_only=True)["model"]
    assert all(torch.equal(none[key], weights[1e9][key]) for key in none)


@pytest.mark.parametrize("scale_aware", [False, True])
def test_fault_recompute_changes_nothing(scale_aware):
    """--recompute: the same outputs and gradients, and the activations inside a block aren't kept."""
    b, model = batch(), random_model(scale_aware=scale_aware)
    w = (torch.linspace(1, 2, len(b["x0"])),) if scale_aware else ()
    x, t, y = b["x0"], torch.linspace(0, 1, len(b["x0"])), b["y"]
    kept, found = {}, {}
    for recompute in False, True:
        model.recompute, sizes = recompute, []
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            out = model(x, t, y, *w)
        out.square().mean().backward()
        kept[recompute], found[recompute] = sum(sizes), [out.detach()] + [p.grad.clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found[False], found[True], strict=True))
    assert kept[True] < kept[False] / 2
    assert list(model.state_dict()) == list(random_model(scale_aware=scale_aware).state_dict())


def test_fault_processes_and_accum(tmp_path):
    """1, 2 and 4 processes, --accum 1, 2 and 4: 20 steps with the same losses."""
    runs = {(ranks, accum): tmp_path / f"{ranks}-{accum}" for ranks, accum in ((1, 1), (1, 4), (2, 2), (4, 1))}
    for (ranks, accum), out in runs.items():
        flags = [*FEW, "--clip", 0.5, "--recompute", "--log-every", 1, "--steps", 20, "--accum", accum]
        assert fork(out, *flags, ranks=ranks) == [0] * ranks, said(out)
    want = losses(runs[1, 1])
    assert len(want) == 20
    for out in runs.values():
        assert np.abs(np.subtract(losses(out), want)).max() < 1e-5, out


def test_fault_a_signal_saves(undisturbed, undisturbed_pair, tmp_path):
    """At a step that no checkpoint or row was due for; the processes get it at different steps and stop at the same one."""
    out = tmp_path / "one"
    assert fork(out, *FEW, "--steps", 20, prepare=at_step(5, lambda: os.kill(os.getpid(), signal.SIGINT))) == [130]
    text = said(out)
    assert "SIGINT: step 5 is saved" in text and "Traceback" not in text
    assert models.read_checkpoint(out / "ckpt.pt")["step"] == 5 and len(losses(out)) == 2
    assert fork(out, *FEW, "--steps", 20) == [0]
    assert_same_run(out, undisturbed)
    two = tmp_path / "two"

    def prepare(rank):
        at_step(5 if rank else 7, lambda: os.kill(os.getpid(), signal.SIGTERM))(rank)
    assert fork(two, *FEW, "--steps", 20, prepare=prepare, ranks=2) == [143, 143]
    text = said(two)
    assert text.count("SIGTERM: step 5 is saved") == 1 and "Traceback" not in text
    assert fork(two, *FEW, "--steps", 20, ranks=2) == [0, 0]
    assert_same_run(two, undisturbed_pair)


def test_fault_a_signal_during_an_evaluation(tmp_path):
    """It doesn't wait for the end, since all is saved; the evaluation is made up for. And before the first step: no harm."""
    flags = [*FEW, "--eval-samples", "20", "--eval-every", "5", "--steps", "10"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert fork(whole, *flags) == [0], said(whole)

    def in_evaluation(_):
        real = fid.evaluate
        fid.evaluate = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM) or real(*args, **kwargs)

    def in_setup(_):
        fid.real_images = lambda *_: os.kill(os.getpid(), signal.SIGINT)
    assert fork(out, *flags, prepare=in_setup) == [-signal.SIGINT] and not out.exists()
    assert fork(out, *flags, prepare=in_evaluation) == [-signal.SIGTERM]
    assert models.read_checkpoint(out / "ckpt.pt")["step"] == 5 and "Traceback" not in said(out)
    assert fork(out, *flags) == [0]
    assert_same_run(out, whole)
    assert [bool(row["fid"]) for row in csv.DictReader((out / "log.csv").open())] == [False, False, True, False, False, False, True]


def test_fault_a_signal_during_an_evaluation_that_nothing_was_saved_before(tmp_path):
    """--save-every 0: no checkpoint before the end, but for a signal's."""
    flags = [*FEW, "--eval-samples", "20", "--eval-every", "2", "--steps", "4", "--save-every", "0"]

    def in_evaluation(_):
        real = fid.evaluate

        def evaluate(*args, **kwargs):
            assert not (tmp_path / "out" / "ckpt.pt").exists()
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)
        fid.evaluate = evaluate
    assert fork(tmp_path / "out", *flags, prepare=in_evaluation) == [128 + signal.SIGTERM], said(tmp_path / "out")
    assert models.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 3
    assert fork(tmp_path / "out", *flags) == [0] and fork(tmp_path / "whole", *flags) == [0]
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def node(out, *argv, prepare=None, nodes=1, processes=2, port=0, host=True):
    """A forked process with the agent that torchrun starts, whose workers are forks in turn (no imports) -> its id."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else restarted processes read each other's addresses of before
        sys.stdout = sys.stderr = open(f"{out}.agent.txt", "a", buffering=1)  # noqa: SIM115
        elastic_launch(LaunchConfig(
            min_nodes=nodes, max_nodes=nodes, nproc_per_node=processes, run_id="test", rdzv_backend="c10d", max_restarts=3,
            rdzv_endpoint=f"localhost:{port}", start_method="fork", local_addr="localhost",
            rdzv_configs={"is_host": host, "keep_alive_interval": 1, "last_call_timeout": 1}), work)(out, argv, prepare)
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def undisturbed_pair(undisturbed):
    """The same with two processes."""
    out = undisturbed.with_name("pair")
    assert fork(out, *FEW, "--steps", 20, ranks=2) == [0, 0], said(out)
    assert losses(out) == pytest.approx(losses(undisturbed), abs=1e-5)
    return out


def once(flag, number, action):
    """-> a prepare(): in the number-th step of rank 1 this is called, the first time that it gets there."""
    def first():
        if not flag.exists():
            flag.touch()
            action()
    return lambda rank: at_step(number, first)(rank) if rank == 1 else None


def test_fault_torchrun_restarts(undisturbed_pair, tmp_path):
    """One of two processes is killed: torchrun ends the other, starts both, and they go on from the checkpoint."""
    out = tmp_path / "out"
    assert status(node(out, *FEW, "--steps", 20, prepare=once(tmp_path / "flag", 7, die))) == 0
    assert (tmp_path / "flag").exists() and "resuming from step 4" in said(out)
    assert_same_run(out, undisturbed_pair)


def test_fault_torchrun_is_terminated(undisturbed_pair, tmp_path):
    """SIGTERM to torchrun, which passes it on: saved, and the same command goes on from there."""
    out = tmp_path / "out"
    prepare = once(tmp_path / "flag", 5, lambda: os.kill(os.getppid(), signal.SIGTERM))
    assert status(node(out, *FEW, "--steps", 20, prepare=prepare)) != 0
    step = int(re.findall(r"SIGTERM: step (\d+) is saved", said(out))[0])
    assert 5 <= step < 20 and models.read_checkpoint(out / "ckpt.pt")["step"] == step
    assert status(node(out, *FEW, "--steps", 20)) == 0
    assert_same_run(out, undisturbed_pair)


def test_fault_one_of_two_nodes(undisturbed_pair, tmp_path):
    """Two agents with a c10d rendezvous; the one that doesn't host it is killed with its process, and started again."""
    out = tmp_path / "out"
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    prepare = once(tmp_path / "flag", 7, lambda: os.killpg(0, signal.SIGKILL))  # rank 1: its agent and itself, or the host's
    here, there = (node(out, *FEW, "--steps", 20, prepare=prepare, nodes=2, processes=1, port=port, host=host)
                   for host in (True, False))
    assert status(there) == -signal.SIGKILL
    there = node(out, *FEW, "--steps", 20, prepare=prepare, nodes=2, processes=1, port=port, host=False)
    assert (status(here), status(there)) == (0, 0)
    assert "resuming from step 4" in said(out)
    assert_same_run(out, undisturbed_pair)


def test_fault_a_signal_to_the_whole_group(tmp_path):
    """As of Ctrl-C or Slurm: the processes that read images get it too, and neither fall nor complain."""
    image_folder(tmp_path / "images")
    flags = [*FEW, "--data", tmp_path / "images", "--model", "SiT-T/2", "--image-size", 8, "--vae", "none", "--steps", 6, "--workers", 2]
    assert fork(tmp_path / "whole", *flags) == [0], said(tmp_path / "whole")
    for number in signal.SIGTERM, signal.SIGINT:
        out = tmp_path / number.name

        def signal_all(number=number):  # its sender is another than the loader's parent, as it is then
            subprocess.run(["kill", f"-{number}", "--", f"-{os.getpid()}"], check=False)

        def prepare(rank, signal_all=signal_all):
            os.setpgrp()
            at_step(2, signal_all)(rank)
        assert fork(out, *flags, prepare=prepare) == [128 + number]
        text = said(out)
        assert f"{number.name}: step 2 is saved" in text and "Traceback" not in text
        assert fork(out, *flags) == [0]
        assert_same_run(out, tmp_path / "whole")


def test_fault_code_in_a_pickle_is_never_run(checkpoint, tmp_path, capsys, monkeypatch):
    """At every place that takes a file: resuming, --init, sampling, load_checkpoint, fid.py's samples, reference and weights."""
    monkeypatch.chdir(tmp_path)
    out, mark = tmp_path / "out", Path(os.environ["TORCH_HOME"], "evil")
    out.mkdir()
    for path, evil in ((out / "ckpt.pt", {"config": Evil(), "step": 1, "model": {}, "ema": {}, "optimizer": {}}),
                       (tmp_path / "init.pt", {"ema": Evil()}), (tmp_path / "old.pt", Evil())):
        torch.save(evil, path, _use_new_zipfile_serialization=path.name != "old.pt")
    np.savez(tmp_path / "evil.npz", arr_0=np.array([Evil()], dtype=object))
    np.savez(tmp_path / "stats.npz", **{key: np.array([Evil()], dtype=object) for key in ("mu", "sigma", "mu_s", "sigma_s")})
    np.savez(tmp_path / "good.npz", arr_0=digit_samples(64, 10)[0])
    assert "never run" in error_of(train_sit_mg.main, *FEW, "--out", out)
    for name in "init.pt", "old.pt":
        assert name in error_of(train_sit_mg.main, *FEW, "--init", name, "--out", tmp_path / "no")
        assert name in error_of(sample.main, name, "--out", "x.png")
        for weights in "ema", "model":
            with pytest.raises(ValueError, match="never run"):
                load_checkpoint(name, weights=weights)
    for line in ("evil.npz digits", "good.npz evil.npz", "good.npz stats.npz", "good.npz digits --features inception --weights old.pt"):
        status, _, err = cli(capsys, *line.split())
        assert status == 2 and len(err) == 1 and any(name in err[0] for name in ("evil.npz", "stats.npz", "old.pt"))
    assert not mark.exists()
    with contextlib.suppress(AttributeError, TypeError, KeyError):  # and it would have been seen
        torch.load("old.pt", weights_only=False)
    assert mark.exists()
    mark.unlink()


def test_fault_nothing_is_written_elsewhere(tmp_path):
    """Training, sampling and scoring write where they are told; the digits' feature net and matplotlib's fonts are cached."""
    home, temporary, cwd, out = (tmp_path / name for name in ("home", "tmp", "cwd", "made/for/it"))
    for folder in home, temporary, cwd:
        folder.mkdir()
    fid.digits_net()
    shutil.copytree(Path(os.environ["TORCH_HOME"], "hub"), home / ".cache/torch/hub")  # it takes seconds to train
    env = {"HOME": str(home), "TMPDIR": str(temporary), "TORCH_HOME": str(home / ".cache/torch"), "PYTHONDONTWRITEBYTECODE": "1"}
    for command in (["train_sit_mg.py", *TINY, "--steps", 2, "--out", out], ["sample.py", out / "ckpt.pt", "--steps", 2, "--num", 10,
                                                                           "--out", out / "x.png"]):
        status, _, err = run(*command, cwd=cwd, env=env)
        assert status == 0, err
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert {p for p in written if not re.match(r"home/\.(cache|config)/matplotlib/", p)} == {
        "home/.cache/torch/hub/checkpoints/digits-cnn-v1.pt",
        *(f"made/for/it/{name}" for name in ("ckpt.pt", "log.csv", "curves.png", "samples.npz", "samples.json", "samples.png",
                                             "x.png", "x.json"))}


@pytest.mark.parametrize(("flags", "says"), [
    (["--stepz", 3], "--stepz"),
    (["--w", "nan"], "--w nan"),
    (["--w-range", 3, 1], "--w-range"),
    (["--drop", 1.5], "--drop 1.5"),
    (["--t-max", 2], "--t-max 2"),
    (["--empty", "labels", "--drop", 0.1], "--drop 0.1"),
    (["--empty", "labels", "--num-labels", 10], "--num-labels 10"),
    (["--batch", 9, "--accum", 2], "--batch 9"),
    (["--batch", 0], "--batch 0"),
    (["--model", "SiT-XXL/2"], "SiT-XXL/2"),
    (["--image-size", 16], "--image-size 16"),
    (["--data", "nowhere"], "nowhere"),
    (["--init", "nowhere.pt"], "nowhere.pt"),
    (["--eval-samples", 1], "--eval-samples 1"),
    (["--seed", 2 ** 31], "--seed 2147483648"),
    (["--w", 1.3, "--w-range", 1, 3], "--w 1.3"),
    (["--vae", "x"], "--vae x"),
    (["--w-range", 1, 3, "--w-ramp", 5], "--w-ramp 5"),
    (["--w", "automatic"], "--w"),
    (["--w", "auto"], "--eval-every 0"),
    (["--w", "auto", "--eval-every", 1, "--eval-samples", 0], "--eval-samples 0"),
    (["--w", "auto", "--eval-every", 1, "--auto-max", 2], "--auto-max 2"),
    (["--w", "auto", "--eval-every", 1, "--auto-step", 0], "--auto-step 0"),
    (["--w", "auto", "--eval-every", 1, "--empty", "labels"], "--auto-rule probe"),
    (["--w", "auto", "--w-range", 1, 3], "--w auto"),
    (["--w", "auto", "--eval-every", 1, "--auto-metric", "outliers"], "--auto-metric outliers"),
    (["--data", "grid", "--reference", "x.npz"], "--reference x.npz"),
    (["--auto-step", 0.1], "--auto-step: only with --w auto"),
    (["--num-labels", 3], "--num-labels: only with --empty labels"),
    (["--data", "grid", "--image-size", 8], "--image-size 8"),
    (["--data", "grid", "--vae", "x"], "--vae x"),
])
def test_train_refuses(flags, says, tmp_path):
    error = error_of(train_sit_mg.main, *TINY, *flags, "--out", tmp_path / "out")
    assert says in error and not (tmp_path / "out").exists()


def test_more_that_is_refused_before_training(tmp_path):
    assert "--eval-steps 1500" in error_of(train_dit_mg.main, *TINY, "--eval-steps", 1500, "--out", tmp_path / "no")
    (tmp_path / "file").write_text("")
    assert "file" in error_of(train_sit_mg.main, *TINY, "--out", tmp_path / "file")
    (tmp_path / "foreign").mkdir()
    for state in ({"config": {}, "step": 1, "model": {}, "ema": {}, "optimizer": {}},
                  {"config": 3, "step": 1, "model": {}, "ema": {}, "optimizer": {}}, {"config": {}, "model": {}},
                  {"config": {"freq_divisor": 127}}, [1]):
        torch.save(state, tmp_path / "foreign" / "ckpt.pt")
        assert "ckpt.pt" in error_of(train_sit_mg.main, *TINY, "--out", tmp_path / "foreign")
    image_folder(tmp_path / "images")
    (tmp_path / "images" / "cat" / "3.png").write_bytes(b"broken")
    flags = ["--data", tmp_path / "images", "--model", "SiT-T/2", "--image-size", 16, "--vae", "none", "--eval-samples", 0]
    for workers in 0, 2:
        assert "3.png" in error_of(train_sit_mg.main, *TINY[:4], *flags, "--steps", 3, "--workers", workers, "--out", tmp_path / "o")


def test_an_error_in_one_process_ends_all_with_its_line(tmp_path, capfd):
    """A folder that one machine alone lacks; an image that one process alone reads, in the middle of the training."""
    image_folder(tmp_path / "here")
    flags = [*TINY, "--model", "SiT-T/2", "--image-size", 16, "--vae", "none", "--eval-samples", 0, "--out", tmp_path / "out",
             "--workers", 0]

    def main():
        train_sit_mg.main([*map(str, flags), "--data", str(tmp_path / ("here" if os.environ["RANK"] == "0" else "nowhere"))])
    assert in_processes(2, main) == [2, 2]
    assert capfd.readouterr().err.count("nowhere") == 1 and not (tmp_path / "out").exists()
    (tmp_path / "here" / "dog" / "3.png").write_bytes(b"broken")

    def main():
        train_sit_mg.main([*map(str, flags), "--data", str(tmp_path / "here")])
    assert in_processes(2, main) == [2, 2]
    errors = capfd.readouterr().err
    assert errors.count("3.png: unreadable image") == 1 and "Traceback" not in errors


def test_scores_against_a_reference_file(tmp_path, capsys):
    """--reference with what fid.py --save-stats wrote of the digits: the same scores as with --data's own images."""
    train("SiT", tmp_path / "a", "--steps", 1)
    fid.main([str(tmp_path / "a" / "samples.npz"), "digits", "--save-stats", str(tmp_path / "ref.npz")])
    train("SiT", tmp_path / "b", "--steps", 1, "--reference", tmp_path / "ref.npz")
    a, b = ([float(v) for v in list(csv.DictReader((tmp_path / name / "log.csv").open()))[-1].values() if v] for name in "ab")
    assert a[3:] == pytest.approx(b[3:], rel=1e-4) and a[4] > 0


def test_w_is_logged_as_it_acts(tmp_path):
    train("SiT", tmp_path, "--steps", 5, "--w", 1.6, "--start", 2, "--w-ramp", 3)
    with open(tmp_path / "log.csv", newline="") as f:
        assert [float(row["w"]) for row in csv.DictReader(f)] == pytest.approx([1, 1, 1.2, 1.4, 1.6])


def test_a_data_set_that_changed_is_refused(tmp_path):
    image_folder(tmp_path / "images")
    flags = ["--data", tmp_path / "images", "--model", "SiT-T/2", "--image-size", 16, "--vae", "none", "--eval-samples", 0, "--workers", 0]
    train("SiT", tmp_path / "out", *flags, "--steps", 1)
    shutil.copy(tmp_path / "images" / "cat" / "0.png", tmp_path / "images" / "cat" / "new.png")
    assert "images 12, not 13" in error_of(train_sit_mg.main, *TINY, *flags, "--steps", 2, "--out", tmp_path / "out")
    (tmp_path / "out" / "log.csv").write_text("a,b\n1,2\n")
    (tmp_path / "images" / "cat" / "new.png").unlink()
    assert "log.csv" in error_of(train_sit_mg.main, *TINY, *flags, "--steps", 2, "--out", tmp_path / "out")


def test_mg_loss_refuses_what_would_mean_something_else():
    b = batch()
    for options in ({"empty": "lables"}, {"empty": "labels", "num_labels": 10}, {"empty": "labels", "num_labels": 0}):
        with pytest.raises(ValueError, match="num_labels"):
            train_sit_mg.mg_loss(random_model(), random_model(), b["x0"], b["y"], 1.5, **options)


def test_the_average_is_no_graph(tmp_path, monkeypatch):
    """The EMA is changed in place by numbers; a graph of all its steps would eat the memory of a long run."""
    averages, real = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda a, b, c: (averages.append(a), real(a, b, c)))
    train("SiT", tmp_path, "--steps", 2)
    assert len(averages) == 2 and all(p.grad_fn is None and not p.requires_grad for p in averages[-1])


def test_changed_settings_and_foreign_folders_are_refused(tmp_path):
    train("SiT", tmp_path, "--steps", 2, "--w", 1.5)
    before = (tmp_path / "ckpt.pt").read_bytes()
    for flags, says in ((["--w", 1.25], "w 1.5, not 1.25"), (["--w", 1.5, "--seed", 1], "seed 0, not 1"),
                        (["--w", 1.5, "--steps", 1], "--steps 1")):
        assert says in error_of(train_sit_mg.main, *TINY, "--steps", 3, "--out", tmp_path, *flags)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    (tmp_path / "ckpt.pt").write_bytes(before[:1000])
    assert "ckpt.pt: truncated" in error_of(train_sit_mg.main, *TINY, "--steps", 3, "--out", tmp_path)


def test_init(tmp_path):
    """Fine-tuning: weights and EMA start from the file, w rises from 1; another class count starts the label table anew."""
    source = random_model(num_classes=10)
    save_random(tmp_path / "ten.pt", source, "SiT-T/2", drop=0.1)
    flags = ["--steps", 1, "--lr", 1e-30, "--w", 1.5]
    printed = train("SiT", tmp_path / "out", "--init", tmp_path / "ten.pt", *flags)
    assert "warning" not in printed and "freq_divisor=127" in printed
    state = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    for key, value in source.state_dict().items():
        assert torch.equal(state["model"][key], value)
        torch.testing.assert_close(state["ema"][key], value, rtol=0, atol=1e-7)
    save_random(tmp_path / "seven.pt", random_model(num_classes=7, freq_divisor=128), "SiT-T/2", drop=0.1)
    printed = train("SiT", tmp_path / "out7", "--init", tmp_path / "seven.pt", *flags)
    assert "has 7 classes, not 10: the label table starts anew" in printed and "freq_divisor=128" in printed
    save_random(tmp_path / "never.pt", source, "SiT-T/2", drop=0.0)
    assert "was trained with --drop 0" in train("SiT", tmp_path / "out0", "--init", tmp_path / "never.pt", *flags)
    save_random(tmp_path / "nine.pt", random_model(num_classes=9), "SiT-T/2")
    assert "nine.pt has no empty class" in train("SiT", tmp_path / "out9", "--init", tmp_path / "nine.pt", *flags)
    save_random(tmp_path / "wide.pt", random_model(scale_aware=True), "SiT-T/2", drop=0.1)  # its w = 1 goes into a bias
    assert "warning" not in train("SiT", tmp_path / "outw", "--init", tmp_path / "wide.pt", *flags)
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.arange(3)
    with torch.no_grad():
        torch.testing.assert_close(load_checkpoint(tmp_path / "outw" / "ckpt.pt", weights="model")[0](x, t, y),
                                   load_checkpoint(tmp_path / "wide.pt")[0](x, t, y, 1.0), rtol=1e-4, atol=1e-5)
    save_random(tmp_path / "labels.pt", random_model(empty_class=False), "SiT-T/2", drop=0.0)
    assert "has no empty class" in train("SiT", tmp_path / "outl", "--init", tmp_path / "labels.pt", *flags)
    state = torch.load(tmp_path / "outl" / "ckpt.pt", weights_only=True)["model"]["y_embedder.embedding_table.weight"]
    assert torch.equal(state[:10], random_model(empty_class=False).y_embedder.embedding_table.weight)
    train("SiT", tmp_path / "out11", "--init", tmp_path / "ten.pt", "--empty", "labels", *flags)
    state = torch.load(tmp_path / "out11" / "ckpt.pt", weights_only=True)["model"]["y_embedder.embedding_table.weight"]
    assert torch.equal(state, source.y_embedder.embedding_table.weight[:10])
    save_random(tmp_path / "eight.pt", random_model(num_classes=9), "SiT-T/2", drop=0.1)
    assert "has 9 classes, not 10" in train("SiT", tmp_path / "out8", "--init", tmp_path / "eight.pt", *flags)
    save_random(tmp_path / "big.pt", random_model(input_size=16), "SiT-T/2")
    assert "doesn't fit" in error_of(train_sit_mg.main, *TINY, "--init", tmp_path / "big.pt", "--out", tmp_path / "no")
    save_random(tmp_path / "dit.pt", random_model("DiT-T/2"), "DiT-T/2")
    assert "this script trains SiT" in error_of(train_sit_mg.main, *TINY, "--init", tmp_path / "dit.pt", "--out", tmp_path / "no")


def test_w_rises_over_the_ramp(tmp_path, monkeypatch):
    seen, real = [], train_sit_mg.mg_loss
    monkeypatch.setattr(train_sit_mg, "mg_loss", lambda *args, **kwargs: seen.append(
        None if args[1] is None else float(args[4][0])) or real(*args, **kwargs))
    train("SiT", tmp_path, "--steps", 6, "--w", 1.6, "--start", 2, "--w-ramp", 3)
    assert seen == [None, None, pytest.approx(1.2), pytest.approx(1.4), pytest.approx(1.6), pytest.approx(1.6)]


def image_folder(folder, count=6):
    """Class folders of PNGs of odd sizes: (folder / cat, folder / dog)."""
    from PIL import Image
    rng = np.random.default_rng(0)
    for name in "cat", "dog":
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_training_on_a_folder_through_a_vae(tmp_path):
    image_folder(tmp_path / "images")
    tiny_vae(tmp_path)
    flags = ["--data", tmp_path / "images", "--model", "SiT-T/2", "--image-size", 16, "--workers", 0, "--eval-samples", 0]
    printed = train("SiT", tmp_path / "latent", *flags, "--vae", tmp_path / "vae", "--steps", 2, "--lr", 1e-3)
    assert {"in_channels=4", "input_size=8"} <= set(printed.split())
    assert np.load(tmp_path / "latent" / "samples.npz")["arr_0"].shape == (20, 16, 16, 3)
    _, config = load_checkpoint(tmp_path / "latent" / "ckpt.pt")
    assert config["vae"] == str(tmp_path / "vae") and config["num_classes"] == 2
    sample.main([str(tmp_path / "latent" / "ckpt.pt"), "--labels", "1", "--num", "2", "--steps", "2",
                 "--out", str(tmp_path / "x.png")])
    assert "2 images" in printed or "12 images of 2 classes" in printed
    train("SiT", tmp_path / "pixels", *flags, "--vae", "none", "--steps", 2)
    assert load_checkpoint(tmp_path / "pixels" / "ckpt.pt")[0].in_channels == 3


def test_a_run_with_workers_ends(tmp_path):
    """A process of its own, as its exit is what waits for them: at the end, and where an image can't be read."""
    image_folder(tmp_path / "images")
    flags = ["--data", tmp_path / "images", "--model", "SiT-T/2", "--image-size", 8, "--vae", "none", "--steps", 3, "--batch", 4,
             "--eval-samples", 0, "--eval-steps", 1, "--workers", 2]
    code, said, _ = run("train_sit_mg.py", *flags, "--out", tmp_path / "whole", timeout=60)
    assert code == 0 and "3 steps" in said
    broken = next((tmp_path / "images").glob("*/*.png"))
    broken.write_bytes(broken.read_bytes()[:50])
    code, _, errors = run("train_sit_mg.py", *flags, "--out", tmp_path / "broken", timeout=60)
    assert code == 2 and "Traceback" not in errors and f"error: {broken}: unreadable image" in errors.splitlines()[-1]


def photo_tiles(folder, size, count=24):
    """Class folders of tiles, size x size pixels, of scikit-learn's two photographs: (folder / china, folder / flower)."""
    from PIL import Image
    from sklearn.datasets import load_sample_image
    for name in "china", "flower":
        (folder / name).mkdir(parents=True)
        photo = load_sample_image(f"{name}.jpg")                                                   # (427, 640, 3) uint8
        for i in range(count):
            top, left = i // 8 * (427 - size) // (-(-count // 8) - 1), i % 8 * (640 - size) // 7
            Image.fromarray(photo[top:top + size, left:left + size]).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """48 real pictures of 64x64 pixels in two class folders."""
    return photo_tiles(tmp_path_factory.mktemp("photos"), 64)


def cached(folder, data, vae, size=16, workers=0):
    """A cache of latents of `data`, filled by this process: (models.Latents, the images)."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    images = fid.real_images(str(data), size)
    latents = models.Latents(folder, images, vae, "tiny", (4, size // 2, size // 2))
    latents.fill(images, vae, workers)
    return latents, images


def in_processes(world, function):
    """function() in `world` forks of this process, with the variables that torchrun sets -> their exit codes."""
    import multiprocessing
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def rank_main(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
        function()
    processes = [multiprocessing.get_context("fork").Process(target=rank_main, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]


def test_latents_are_what_encode_gives(photo_folder, tmp_path):
    """Mean and std, plain and flipped, of every image, to float16's 11 bits; also through workers, and by any index."""
    vae = tiny_vae(tmp_path)
    latents, images = cached(tmp_path / "cache", photo_folder, vae, workers=2)
    x = torch.stack([image for image, _ in images]) / 127.5 - 1
    got, labels = latents[list(range(48))]
    assert got.dtype == torch.float16 and got.shape == (48, 2, 2, 4, 8, 8) and labels.tolist() == images.labels
    for flipped, pixels in enumerate((x, x.flip(-1))):
        for i, wanted in enumerate(models.encode(vae, pixels)):
            torch.testing.assert_close(got[:, flipped, i].float(), wanted, rtol=2 ** -11, atol=1e-6)
    assert (got[:, 1] - got[:, 0].flip(-1)).abs().max() > 0.01  # the VAE isn't symmetric: a flip of latents wouldn't do
    some, labels = latents[[40, 3, 40]]
    assert torch.equal(some, got[[40, 3, 40]]) and labels.tolist() == [1, 0, 1]
    header = json.loads((tmp_path / "cache" / "latents.json").read_text())
    assert {"vae": "tiny", "scale": 0.3, "size": 16, "dtype": "float16", "count": 48, "classes": ["china", "flower"],
            "complete": True}.items() <= header.items() and "flipped" in header["flips"] and "centre" in header["crop"]
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"latents.json", "latents.npy"}
    import pickle
    assert len(pickle.dumps(latents)) < 10_000  # what a worker is given


def test_latents_train_as_online_encoding_does(photo_folder, tmp_path, monkeypatch):
    """The same draws, so the same losses up to float16, with 2 processes too. Without flips or std they'd differ by far more."""
    tiny_vae(tmp_path)
    flags = ["--data", photo_folder, "--model", "SiT-T/2", "--image-size", 16, "--workers", 0, "--eval-samples", 0,
             "--vae", tmp_path / "vae", "--lr", 3e-3, "--steps", 8]
    train("SiT", tmp_path / "online", *flags)
    train("SiT", tmp_path / "first", *flags, "--latents", tmp_path / "cache")
    online, first = (np.array(losses(tmp_path / name)) for name in ("online", "first"))
    assert len(online) == 8
    off = np.abs(first - online).max()
    assert 0 < off < 1e-4
    assert in_processes(2, lambda: train("SiT", tmp_path / "two", *flags, "--latents", tmp_path / "cache2")) == [0, 0]
    assert np.allclose(losses(tmp_path / "two"), first, rtol=0, atol=1e-5)
    assert (tmp_path / "cache2" / "latents.npy").read_bytes() == (tmp_path / "cache" / "latents.npy").read_bytes()
    encoded, real, real_item = [], models.encode, models.Latents.__getitem__
    monkeypatch.setattr(models, "encode", lambda vae, x: encoded.append(len(x)) or real(vae, x))
    for name, edit in ("plain", lambda x: x[:, :1].expand_as(x)), ("mean", lambda x: x * torch.tensor([1, 0]).view(-1, 1, 1, 1)):
        monkeypatch.setattr(models.Latents, "__getitem__", lambda self, index, edit=edit: (
            edit(real_item(self, index)[0]), real_item(self, index)[1]))
        train("SiT", tmp_path / name, *flags, "--latents", tmp_path / "cache", "--steps", 3)
        assert np.abs(np.array(losses(tmp_path / name)) - online[:3]).max() > 20 * off
    assert encoded == [1, 1]  # no more than the image that says what shape latents have
    monkeypatch.undo()
    sample.main([str(tmp_path / "first" / "ckpt.pt"), "--labels", "1", "--num", "1", "--steps", "2", "--out", str(tmp_path / "x.png")])
    assert "holds a run with latents" in error_of(train_sit_mg.main, *TINY, *flags, "--out", tmp_path / "first")


def test_latents_killed_and_gone_on_with(photo_folder, tmp_path, monkeypatch):
    """kill -9 in the third of six chunks, and a torn write where it was: the rest is encoded, and the bytes are the same."""
    monkeypatch.setattr(models.Latents, "CHUNK", 8)
    vae, real, calls = tiny_vae(tmp_path), models.encode, []
    whole, _ = cached(tmp_path / "whole", photo_folder, vae)

    def dies(vae, x):
        calls.append(len(x))
        return real(vae, x) if len(calls) < 6 else os.kill(os.getpid(), 9)
    monkeypatch.setattr(models, "encode", dies)
    assert in_processes(1, lambda: cached(tmp_path / "cache", photo_folder, vae)) == [-9]
    assert {p.name for p in (tmp_path / "cache" / "done").iterdir()} == {"0", "1"}
    with open(tmp_path / "cache" / "latents.npy", "r+b") as f:
        f.seek(128 + 20 * whole.open()[0].nbytes)
        f.write(b"half a chunk")
    monkeypatch.setattr(models, "encode", lambda vae, x: calls.append(len(x)) or real(vae, x))
    cached(tmp_path / "cache", photo_folder, vae)
    assert calls == [8] * 2 * 4
    for name in "latents.npy", "latents.json":
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    cached(tmp_path / "cache", photo_folder, vae)
    assert len(calls) == 8


def test_latents_are_the_same_for_1_2_and_4_processes(photo_folder, tmp_path, monkeypatch):
    """And one of them that can't go on ends the others, though they'd wait for weeks."""
    monkeypatch.setattr(models.Latents, "CHUNK", 10)  # the last chunk has 8
    vae, real = tiny_vae(tmp_path), models.encode
    cached(tmp_path / "1", photo_folder, vae)

    def counted(vae, x):
        with open(tmp_path / "calls", "a") as f:
            f.write(f"{len(x)} ")
        return real(vae, x)
    monkeypatch.setattr(models, "encode", counted)
    for world in 2, 4:
        assert in_processes(world, lambda world=world: cached(tmp_path / str(world), photo_folder, vae)) == [0] * world
        for name in "latents.npy", "latents.json":
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / str(world) / name).read_bytes()
        assert not (tmp_path / str(world) / "done").exists()
    assert sorted((tmp_path / "calls").read_text().split()) == ["10"] * 16 + ["8"] * 4  # 2 x 5 chunks, plain and flipped, once each
    image_folder(tmp_path / "images")
    (tmp_path / "images" / "dog" / "5.png").write_bytes(b"broken")  # in chunk 1, of process 1
    assert 0 not in in_processes(2, lambda: cached(tmp_path / "broken", tmp_path / "images", vae))


def test_latents_of_something_else_are_refused(photo_folder, tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace
    vae, data, cache = tiny_vae(tmp_path), tmp_path / "data", tmp_path / "cache"
    shutil.copytree(photo_folder, data)
    _, images = cached(cache, data, vae)
    before = (cache / "latents.npy").read_bytes()

    def refused(folder=cache, name="tiny", size=16, vae=vae):
        with pytest.raises(ValueError) as error:
            models.Latents(folder, fid.real_images(str(data), size), vae, name, (4, size // 2, size // 2))
        assert str(error.value).startswith(f"--latents {folder}") and "\n" not in str(error.value)
        return str(error.value)
    models.Latents(cache, images, vae, "by another name", (4, 8, 8))
    models.Latents(cache, fid.real_images(f"{data}/", 16), vae, "tiny", (4, 8, 8))
    assert "made with size 16, not 32" in refused(size=32)
    vae.register_to_config(scaling_factor=0.5)
    assert "made with scale 0.3, not 0.5" in refused()
    vae.register_to_config(scaling_factor=0.3)
    vae.encoder.conv_in.bias.data[0] += 1e-3
    assert "made with vae tiny, not other" in refused(name="other")
    assert "made with vae_sha256" in refused()
    vae.encoder.conv_in.bias.data[0] -= 1e-3
    vae = tiny_vae(tmp_path)
    (data / "china").rename(data / "china2")
    assert "made with classes china, not china2" in refused()
    (data / "china2").rename(data / "china")
    (data / "china" / "00.png").rename(data / "china" / "000.png")
    assert "made with files_sha256" in refused()
    (data / "china" / "000.png").unlink()
    assert "made with count 48, not 47" in refused()
    shutil.copy(photo_folder / "china" / "00.png", data / "china" / "00.png")
    models.Latents(cache, images, vae, "tiny", (4, 8, 8))

    for broken in before[:-1], before[:100], b"":
        (cache / "latents.npy").write_bytes(broken)
        assert "latents.npy is missing, truncated" in refused()
    for other in np.zeros((48, 2, 2, 4, 8, 8), np.float32), np.zeros((49, 2, 2, 4, 8, 8), np.float16):
        np.save(cache / "latents.npy", other)
        assert "latents.npy is missing, truncated or another's" in refused()
    (cache / "latents.npy").unlink()
    assert "latents.npy is missing, truncated" in refused()
    (cache / "latents.npy").write_bytes(before)
    for text in "", "[1]", '{"complete": true}', '{"vae": "x"}':
        (cache / "latents.json").write_text(text)
        assert "latents.json is not of this project" in refused()
    (cache / "latents.json").unlink()
    assert "has files in it that are no latents" in refused()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "9.83e-05 GB are to be written, and 1e-06 are free" in refused(folder=tmp_path / "new" / "er")
    assert not (tmp_path / "new").exists()


def test_latents_refused_by_the_script(tmp_path):
    image_folder(tmp_path / "images")
    tiny_vae(tmp_path)
    cache, out = tmp_path / "cache", tmp_path / "out"
    assert f"--latents {cache}" in error_of(train_sit_mg.main, *TINY, "--latents", cache, "--out", out)
    flags = [*TINY[:4], "--data", tmp_path / "images", "--model", "SiT-T/2", "--image-size", 16, "--eval-samples", 0, "--steps", 1,
             "--latents", cache, "--out", out]
    assert f"--latents {cache}" in error_of(train_sit_mg.main, *flags, "--vae", "none")
    flags += ["--vae", tmp_path / "vae"]
    assert "no latents" in error_of(train_sit_mg.main, *flags, "--latents", tmp_path / "images") and not out.exists()
    whole = (tmp_path / "images" / "dog" / "3.png").read_bytes()
    (tmp_path / "images" / "dog" / "3.png").write_bytes(b"broken")
    for workers in 0, 2:
        error = error_of(train_sit_mg.main, *flags, "--workers", workers)
        assert "3.png: unreadable image" in error and "Traceback" not in error
    (tmp_path / "images" / "dog" / "3.png").write_bytes(whole)
    assert "files_sha256" in error_of(train_sit_mg.main, *flags, "--workers", 0)  # the same names, other contents
    shutil.rmtree(cache)
    train("SiT", out, *flags, "--workers", 0)
    assert len(losses(out)) == 1


# ---------------------------------------------------------------- the 2-D grid of Fig. 2, and an automatic w

def grid_posterior(x_t, y, a, s):
    """Exactly p(x_t | y) (N,) and E[x_0 | x_t, y] (N, 2), float64, where x_t (N, 2) = a x_0 + s eps, a, s > 0; y (N,) 0..2.

    A box convolved with a normal is a difference of normal distribution functions, along each axis for itself.
    """
    x_t = x_t.double()[..., None]                                                                  # (N, 2, 1)
    z = (a * torch.arange(-2, 3, dtype=torch.float64) - x_t) / s                                      # (N, 2, 5)
    tail = torch.special.erfc(z.abs() / 2 ** 0.5) / 2  # of the normal distribution, beyond |z|: no 1 - 1 far out
    low, high = z[..., :-1], z[..., 1:]
    mass = torch.where((low < 0) & (high > 0), 1 - tail[..., 1:] - tail[..., :-1], tail.diff().abs())  # (N, 2, 4)
    first = (x_t * mass - s * (-z.square() / 2).exp().diff() / math.sqrt(2 * math.pi)) / a         # of x_0, times mass
    cells = models.grid_cells(y).double()                                                                 # (N, 4, 4)
    total, *mean = (torch.einsum("nij,ni,nj->n", cells, f, g) for f, g in (
        (mass[:, 0], mass[:, 1]), (first[:, 0], mass[:, 1]), (mass[:, 0], first[:, 1])))
    return total / (a ** 2 * cells.sum((1, 2))), torch.stack(mean, 1) / total[:, None]


class ExactGrid(nn.Module):
    """The network that a long training on the grid would give, with its guidance: out(empty) + scale (out(c) - out(empty))."""
    num_classes, in_channels, input_size, scale_aware = 2, 2, 1, False

    def __init__(self, kind, scale=1.0):
        super().__init__()
        self.kind, self.scale = kind, scale

    def plain(self, x, t, y):
        out = torch.empty(len(x), 2, dtype=torch.float64)
        for one in t.unique():
            here, bar = t == one, ALPHA_BARS[int(one)]
            a, s = (max(1 - float(one), 1e-4), float(one)) if self.kind == "SiT" else (float(bar.sqrt()), float((1 - bar).sqrt()))
            points = x[here].flatten(1).double()
            _, x0 = grid_posterior(points, y[here], a, s)
            eps = (points - a * x0) / s
            out[here] = eps - x0 if self.kind == "SiT" else eps
        return out.float()[..., None, None]

    def forward(self, x, t, y):
        empty = self.plain(x, t, torch.full_like(y, 2))
        return empty + self.scale * (self.plain(x, t, y) - empty)


def test_grid_posterior_against_sums():
    """p(x_t | y) and E[x_0 | x_t, y] against a sum over a fine lattice of x_0."""
    side = (torch.arange(800, dtype=torch.float64) + 0.5) / 200 - 2
    x0 = torch.cartesian_prod(side, side)
    cell = (x0 + 2).floor().long().sum(1) % 2
    for a, s in ((0.6, 0.4), (0.2, 0.98)):
        for point in torch.tensor([[0.3, 0.2], [1.5, -0.9], [-2.5, 2.5]], dtype=torch.float64):
            likelihood = torch.exp(-(point - a * x0).square().sum(1) / (2 * s * s)) / (2 * math.pi * s * s)
            for y in 0, 1, 2:
                chosen = likelihood * ((cell == y) | (y == 2))
                density, mean = grid_posterior(point[None], torch.tensor([y]), a, s)
                assert math.isclose(density.item(), (chosen.sum() / 200 ** 2 / (16 if y == 2 else 8)).item(), rel_tol=1e-3)
                torch.testing.assert_close(mean[0], (chosen[:, None] * x0).sum(0) / chosen.sum(), rtol=0, atol=2e-3)


def test_grid_data_and_scores():
    data = models.grid_data(20_000)
    x, y = data.tensors[0].flatten(1), data.tensors[1]
    assert torch.equal((x + 2).floor().long().sum(1) % 2, y) and data.classes == ["even", "odd"] and x.abs().max() <= 2
    assert abs(x.mean()) < 0.03 and abs(x.var() - 4 / 3) < 0.03
    scores = models.grid_scores(x, y)
    assert scores["outliers"] == 0 and scores["coverage"] > 0.97
    assert models.grid_scores(x, 1 - y) == {"outliers": 1.0, "coverage": 0.0}
    assert models.grid_scores(x, torch.full_like(y, 2))["coverage"] > 0.97
    one = torch.tensor([[-1.99, -1.99]]).repeat(10, 1)  # all in one of the 512 sub-cells of class 0
    assert models.grid_scores(one, torch.zeros(10, dtype=torch.int64)) == {"outliers": 0.0, "coverage": 1 / 512}
    assert models.grid_scores(one + 10, torch.full((10,), 2)) == {"outliers": 1.0, "coverage": 0.0}


@pytest.mark.parametrize("kind", ["SiT", "DiT"])
def test_samplers_on_the_exact_grid(kind):
    """With the exact network the points fill the cells of their class, and measured_scale finds the scale that is in it."""
    y = torch.arange(4000) % 2
    scores = models.grid_scores(draw(ExactGrid(kind), y, torch.arange(4000), steps=60).flatten(1), y)
    assert scores["outliers"] < 0.03 and scores["coverage"] > 0.85
    assert sample.choose_sampler(None, ExactGrid(kind)) == {"SiT": "euler", "DiT": "ddim"}[kind]
    assert sample.measured_scale(ExactGrid(kind, 1.7), ExactGrid(kind), 500) == pytest.approx(1.7, abs=1e-3)


def flat_mean_error(t):
    """On the grid at noise time t, exactly: RMS of v(c) - v(empty), and of what the mean over all labels (Eq. 23) is off v(empty)."""
    x0, y = (x[:2000] for x in models.grid_data().tensors)
    noise, net = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), ExactGrid("SiT")
    x_t, times = (1 - t) * x0 + t * noise, torch.full((2000,), t)
    exact, own, other = (net(x_t, times, labels) for labels in (y * 0 + 2, y, 1 - y))
    return (own - exact).square().mean().sqrt().item(), ((own + other) / 2 - exact).square().mean().sqrt().item()


def test_eq_23_is_exact_only_where_the_posterior_is_flat():
    """The mean over all labels against the exact unconditional velocity: right at large t, wrong by construction at small t."""
    off = {t: error / needed for t in (0.1, 0.4, 0.9) for needed, error in [flat_mean_error(t)]}
    assert off[0.9] < 0.02 and 0.2 < off[0.4] < 0.5 and off[0.1] > 2


@pytest.mark.parametrize("kind", ["SiT", "DiT"])
def test_training_on_the_grid(kind, tmp_path, capsys):
    grid = ["--data", "grid", "--eval-samples", 100]
    printed = train(kind, tmp_path / "mg", *grid, "--steps", 4, "--w", 1.5)
    assert "| outliers | coverage |" in printed
    train(kind, tmp_path / "parts", *grid, "--steps", 2, "--w", 1.5)
    train(kind, tmp_path / "parts", *grid, "--steps", 4, "--w", 1.5)
    assert_same_checkpoint(tmp_path / "mg", tmp_path / "parts")
    drawn = np.load(tmp_path / "mg" / "samples.npz")
    assert drawn["arr_0"].dtype == np.float32 and drawn["arr_0"].shape == (100, 2)
    logged = list(csv.DictReader((tmp_path / "mg" / "log.csv").open()))[-1]
    assert float(logged["outliers"]) == models.grid_scores(torch.from_numpy(drawn["arr_0"]), torch.from_numpy(drawn["labels"]))["outliers"]
    for seed in 0, 1:
        train(kind, tmp_path / f"plain{seed}", *grid, "--steps", 1, "--w", 1, "--seed", seed)
    mg, plain = tmp_path / "mg" / "ckpt.pt", tmp_path / "plain0" / "ckpt.pt"
    few = ["--steps", 2, "--num", 200]
    capsys.readouterr()
    main = lambda *argv: sample.main([str(a) for a in argv])
    main(mg, *few, "--class-labels", "balanced", "--cfg", 2, "--out", tmp_path / "x.npz")
    x = np.load(tmp_path / "x.npz")
    found = models.grid_scores(torch.from_numpy(x["arr_0"]), torch.from_numpy(x["labels"]))
    assert f"| {found['outliers']:.3f} | {found['coverage']:.3f} |" in capsys.readouterr().out
    main(mg, *few, "--figure", tmp_path / "fig2.png", "--compare", plain)
    table = capsys.readouterr().out
    assert "| CFG 2 |" in table and "| MG 1.5, one pass |" in table and (tmp_path / "fig2.png").stat().st_size > 10_000
    main(mg, tmp_path / "parts" / "ckpt.pt", *few, "--figure", tmp_path / "law.png", "--compare", plain, tmp_path / "plain1" / "ckpt.pt")
    table = capsys.readouterr().out
    assert re.search(r"\| CFG 1.33 \| +\| .* \| 2 \|", table) and re.search(r"\| MG 1.5 \| 2.000 \| .* \| 2 \|", table)
    main(mg, *few, "--figure", tmp_path / "alone.png")
    table = capsys.readouterr().out
    assert "| CFG 2 |" in table and "MG" not in table and (tmp_path / "alone.png").stat().st_size > 10_000
    main(mg, *few, "--out", tmp_path / "points.png")
    assert (tmp_path / "points.png").stat().st_size > 1000
    assert "--compare" in error_of(sample.main, mg, plain, "--figure", tmp_path / "x.png")
    assert "--compare" in error_of(sample.main, mg, "--figure", tmp_path / "x.png", "--compare", mg)
    assert "CKPT" in error_of(sample.main, mg, mg, "--out", tmp_path / "x.npz")
    digits = save_random(tmp_path / "digits.pt", random_model(), "SiT-T/2")
    assert "digits.pt" in error_of(sample.main, digits, "--figure", tmp_path / "x.png", "--compare", plain)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(("rule", "scores", "expected"), [
    # probe: pairs of scores, as it is and with some CFG on top; a lower Frechet distance on top raises w, or else it falls
    ("probe", [5, 4, 5, 4, 5, 6, 1], [1, 1.18, 1.324, 1.2592]),
    # paper: raised where the distance grew since the last evaluation; at the first there is nothing to compare with
    ("paper", [5, 4, 6, 1], [1, 1, 1, 1.18])])
def test_automatic_w(rule, scores, expected, tmp_path, monkeypatch):
    """The sequence of w from a script of scores; each log row has the w that its steps were trained with."""
    script = iter(scores)
    monkeypatch.setattr(train_sit_mg.fid, "evaluate", lambda *_, **__: {"fid": next(script)})
    train("SiT", tmp_path, "--w", "auto", "--auto-rule", rule, "--auto-step", 0.2, "--eval-every", 2, "--steps", 8, "--log-every", 2)
    with open(tmp_path / "log.csv", newline="") as f:
        assert [float(row["w"]) for row in csv.DictReader(f)] == pytest.approx(expected)
    assert next(script, None) is None
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert state["config"]["w"] == "auto" and state["auto"]["w"] == pytest.approx(expected[-1])
    assert load_checkpoint(tmp_path / "ckpt.pt")[1]["w"] == pytest.approx(expected[-1])
    assert json.loads((tmp_path / "samples.json").read_text())["trained_w"] == pytest.approx(expected[-1])


def test_automatic_w_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Also where the checkpoint's step was to be evaluated: checkpoints are from before that. More guidance always scores better here."""
    falling = itertools.count(0, -1)
    monkeypatch.setattr(train_sit_mg.fid, "evaluate", lambda *_, **__: {"fid": next(falling)})
    flags = ["--w", "auto", "--eval-every", 2, "--auto-step", 0.5]
    train("SiT", tmp_path / "whole", "--steps", 5, *flags)
    train("SiT", tmp_path / "parts", "--steps", 2, *flags)
    train("SiT", tmp_path / "parts", "--steps", 3, *flags)
    train("SiT", tmp_path / "parts", "--steps", 5, *flags)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")
    logs = [[(row["step"], row["loss"], row["w"]) for row in csv.DictReader((tmp_path / name / "log.csv").open())]
            for name in ("whole", "parts")]
    assert logs[0] == logs[1] and [float(w) for _, _, w in logs[0]] == [1, 1, 1.45, 1.45, 1.675]
    assert "eval_every 2, not 3" in error_of(train_sit_mg.main, *TINY, "--steps", 6, *flags, "--eval-every", 3, "--out", tmp_path / "whole")


# ---------------------------------------------------------------- fid.py: metrics against closed forms, scipy and loops


def covariance(rng, dim, rank, scale=1.0):
    x = rng.standard_normal((rank + 1, dim)) * scale
    return np.cov(x, rowvar=False)


def test_fid_frechet_closed_forms():
    rng = np.random.default_rng(0)
    s, m1, m2 = covariance(rng, 50, 80), rng.standard_normal(50), rng.standard_normal(50)
    assert math.isclose(fid.frechet_distance(m1, s, m2, s), ((m1 - m2) ** 2).sum(), rel_tol=1e-9)
    q, _ = np.linalg.qr(rng.standard_normal((50, 50)))  # commuting: one basis, so the root acts on the eigenvalues
    a, b = rng.random(50) ** 4, rng.random(50) ** 4
    a[:20] = b[10:30] = 0
    want = ((m1 - m2) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    assert math.isclose(fid.frechet_distance(m1, q * a @ q.T, m2, q * b @ q.T), want, rel_tol=1e-6)
    assert fid.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1)
    assert fid.frechet_distance(m1, 0 * s, m1, s) == pytest.approx(np.trace(s))
    for bad in ((m1, s, m2[:3], s), (m1 * np.nan, s, m2, s), (m1, -s, m2, s)):
        with pytest.raises(ValueError):
            fid.frechet_distance(*bad)


def test_fid_frechet_identical_inputs_are_zero():
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.standard_normal((500, 500)))
    covariances = [covariance(rng, 2048, 300, 3.0), covariance(rng, 500, 500, np.exp(rng.standard_normal(500))),
                   covariance(rng, 500, 501, 20.0), (q * np.logspace(1, -9, 500)) @ q.T, (q * np.logspace(2, -20, 500)) @ q.T]
    for s in covariances:
        mu = rng.standard_normal(len(s))
        assert 0 <= fid.frechet_distance(mu, s, mu, s) < 1e-6


def test_fid_frechet_against_sqrtm():
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(2)
    for rank1, rank2 in ((300, 400), (60, 30), (60, 300), (300, 20), (127, 127)):
        x1, x2 = rng.standard_normal((rank1 + 1, 128)), rng.standard_normal((rank2 + 1, 128)) * (1 + rng.random(128))
        s1, s2 = np.cov(x1, rowvar=False), np.cov(x2, rowvar=False)
        if min(rank1, rank2) >= 128:
            root = sqrtm(s1 @ s2)
        else:  # sqrtm is wrong where the product is singular; its eigenvalues other than 0 are those of a a^T
            a, b = (x - x.mean(0) for x in (x1, x2))
            q = np.linalg.qr(np.eye(len(a)) - 1 / len(a))[0][:, :-1] if rank1 <= rank2 else \
                np.linalg.qr(np.eye(len(b)) - 1 / len(b))[0][:, :-1]  # centred rows: drop the direction they miss
            c = q.T @ a @ b.T if rank1 <= rank2 else q.T @ b @ a.T
            root = sqrtm(c @ c.T / (rank1 * rank2))
        mu = rng.standard_normal(128)
        want = (mu**2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real
        assert math.isclose(fid.frechet_distance(mu, s1, 0 * mu, s2), want, rel_tol=1e-9), (rank1, rank2)


def loop_precision_recall(real, fake, k):
    def inside(points, manifold):
        dist = [[math.dist(a, b) for b in manifold] for a in manifold]
        radius = [sorted(d for j, d in enumerate(row) if j != i)[k - 1] for i, row in enumerate(dist)]
        return np.mean([any(math.dist(p, m) <= r for m, r in zip(manifold, radius)) for p in points])
    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3])
def test_fid_precision_recall_against_loops(k):
    rng = np.random.default_rng(3)
    for real, fake in [(rng.standard_normal((70, 3)), rng.standard_normal((90, 3)) * 1.7 + 1),
                       (rng.standard_normal((50, 3)) + 1e4, rng.standard_normal((40, 3)) * 0.5 + 1e4),
                       (rng.integers(0, 7, (60, 2)), rng.integers(3, 12, (45, 2)))]:  # ties and duplicates
        want = loop_precision_recall(real.tolist(), fake.tolist(), k)
        real, fake = (torch.tensor(x, dtype=torch.float64) for x in (real, fake))
        assert fid.precision_recall(real, fake, k) == pytest.approx(want)
        assert fid.precision_recall(real, fake, k, block=16) == pytest.approx(want)


def test_fid_precision_recall_direction_and_errors():
    real = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    collapsed = real[:1] + 1e-3 * torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    precision, recall = fid.precision_recall(real, collapsed)
    assert precision > 0.95 and recall < 0.05
    assert fid.precision_recall(real, real) == (1.0, 1.0)
    assert fid.precision_recall(real, real[:1].repeat(9, 1)) == (1.0, 1 / 400)  # radius 0
    assert fid.precision_recall(real, real + 100) == (0.0, 0.0)
    for fake in (real[:3], real[:, :2], real * math.nan):
        with pytest.raises(ValueError):
            fid.precision_recall(real, fake)


def test_fid_inception_score_formula():
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(6) * 0.3, 25)

    def score(p):
        return math.exp(np.mean([sum(x * math.log(x / m) for x, m in zip(row, p.mean(0))) for row in p]))
    assert fid.inception_score(p) == pytest.approx(score(p), rel=1e-9)
    assert fid.inception_score(p, 10) == pytest.approx(np.mean([score(p[:10]), score(p[10:20]), score(p[20:])]), rel=1e-9)
    assert fid.inception_score(np.eye(5)) == pytest.approx(5)  # 0 log 0
    assert fid.inception_score(np.full((7, 5), 0.2)) == pytest.approx(1)


# ---------------------------------------------------------------- fid.py: the Inception network

def test_fid_resize_is_tensorflow_1s():
    x = torch.tensor([[0, 10, 40]], dtype=torch.uint8).view(1, 1, 1, 3)
    up, down = fid.resize_tf1(x, 6), fid.resize_tf1(x, 2)
    assert up[0, 0, 0].tolist() == [0, 5, 10, 25, 40, 40]  # at 0, .5, 1, 1.5, 2 and 2.5 (the edge)
    assert down[0, 0, 0].tolist() == [0, 25]  # at 0 and 1.5
    assert fid.resize_tf1(x.transpose(2, 3), 6)[0, 0, :, 0].tolist() == [0, 5, 10, 25, 40, 40]
    y = torch.tensor([[0, 100], [40, 60]], dtype=torch.uint8)[None, None]
    assert fid.resize_tf1(y, 4)[0, 0, :3, :3].tolist() == [[0, 50, 100], [20, 50, 80], [40, 50, 60]]
    z = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(fid.resize_tf1(z), z.float())


def inception_layout():
    """name -> (out, in, kh, kw) of the 94 convolutions of the public file, written down from torchvision's inception_v3."""
    def block(name, width, *convs):
        for conv, out, into, kh, kw in convs:
            layout[f"{name}.{conv}"] = (out, into or width, kh, kw)
    layout = {}
    for name, out, into, size in (("1a_3x3", 32, 3, 3), ("2a_3x3", 32, 32, 3), ("2b_3x3", 64, 32, 3), ("3b_1x1", 80, 64, 1),
                                  ("4a_3x3", 192, 80, 3)):
        layout[f"Conv2d_{name}"] = (out, into, size, size)
    for name, width, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        block(f"Mixed_{name}", width, ("branch1x1", 64, 0, 1, 1), ("branch5x5_1", 48, 0, 1, 1), ("branch5x5_2", 64, 48, 5, 5),
              ("branch3x3dbl_1", 64, 0, 1, 1), ("branch3x3dbl_2", 96, 64, 3, 3), ("branch3x3dbl_3", 96, 96, 3, 3),
              ("branch_pool", pool, 0, 1, 1))
    block("Mixed_6a", 288, ("branch3x3", 384, 0, 3, 3), ("branch3x3dbl_1", 64, 0, 1, 1), ("branch3x3dbl_2", 96, 64, 3, 3),
          ("branch3x3dbl_3", 96, 96, 3, 3))
    for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        block(f"Mixed_{name}", 768, ("branch1x1", 192, 0, 1, 1), ("branch7x7_1", c, 0, 1, 1), ("branch7x7_2", c, c, 1, 7),
              ("branch7x7_3", 192, c, 7, 1), ("branch7x7dbl_1", c, 0, 1, 1), ("branch7x7dbl_2", c, c, 7, 1),
              ("branch7x7dbl_3", c, c, 1, 7), ("branch7x7dbl_4", c, c, 7, 1), ("branch7x7dbl_5", 192, c, 1, 7),
              ("branch_pool", 192, 0, 1, 1))
    block("Mixed_7a", 768, ("branch3x3_1", 192, 0, 1, 1), ("branch3x3_2", 320, 192, 3, 3), ("branch7x7x3_1", 192, 0, 1, 1),
          ("branch7x7x3_2", 192, 192, 1, 7), ("branch7x7x3_3", 192, 192, 7, 1), ("branch7x7x3_4", 192, 192, 3, 3))
    for name, width in (("7b", 1280), ("7c", 2048)):
        block(f"Mixed_{name}", width, ("branch1x1", 320, 0, 1, 1), ("branch3x3_1", 384, 0, 1, 1),
              ("branch3x3_2a", 384, 384, 1, 3), ("branch3x3_2b", 384, 384, 3, 1), ("branch3x3dbl_1", 448, 0, 1, 1),
              ("branch3x3dbl_2", 384, 448, 3, 3), ("branch3x3dbl_3a", 384, 384, 1, 3), ("branch3x3dbl_3b", 384, 384, 3, 1),
              ("branch_pool", 192, 0, 1, 1))
    return layout


def random_inception():
    """A state dict in pytorch-fid's layout whose activations neither vanish nor explode."""
    g, state = torch.Generator().manual_seed(0), {}
    for name, shape in inception_layout().items():
        out = shape[0]
        state[f"{name}.conv.weight"] = torch.randn(shape, generator=g) * (2 / math.prod(shape[1:])) ** 0.5
        state[f"{name}.bn.weight"] = 0.5 + torch.rand(out, generator=g)
        state[f"{name}.bn.bias"] = torch.randn(out, generator=g) / 10
        state[f"{name}.bn.running_mean"] = torch.randn(out, generator=g) / 10
        state[f"{name}.bn.running_var"] = 0.5 + torch.rand(out, generator=g)
    state["fc.weight"] = torch.randn(1008, 2048, generator=g) / 50
    state["fc.bias"] = torch.randn(1008, generator=g)
    return state


def plain_inception(state, x):
    """The network as it is published, eager, with its batch norms -> (pool, spatial, probs). x: (N, 3, 299, 299)."""
    def c(name, x, stride=1, pad=0):
        w = f"{name}.conv.weight"
        bn = [state[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(F.conv2d(x, state[w], None, stride, pad), *bn, eps=0.001))

    def avg(x):
        ones = torch.ones_like(x[:1, :1])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)  # the padding is not counted
    x = c("Conv2d_2b_3x3", c("Conv2d_2a_3x3", c("Conv2d_1a_3x3", x, 2)), 1, 1)
    x = c("Conv2d_4a_3x3", c("Conv2d_3b_1x1", F.max_pool2d(x, 3, 2)))
    x = F.max_pool2d(x, 3, 2)
    for m in ("Mixed_5b.", "Mixed_5c.", "Mixed_5d."):
        five = c(m + "branch5x5_2", c(m + "branch5x5_1", x), 1, 2)
        three = c(m + "branch3x3dbl_3", c(m + "branch3x3dbl_2", c(m + "branch3x3dbl_1", x), 1, 1), 1, 1)
        x = torch.cat([c(m + "branch1x1", x), five, three, c(m + "branch_pool", avg(x))], 1)
    m = "Mixed_6a."
    three = c(m + "branch3x3dbl_3", c(m + "branch3x3dbl_2", c(m + "branch3x3dbl_1", x), 1, 1), 2)
    x = torch.cat([c(m + "branch3x3", x, 2), three, F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_6b.", "Mixed_6c.", "Mixed_6d.", "Mixed_6e."):
        one = c(m + "branch1x1", x)
        if m == "Mixed_6d.":
            spatial = one[:, :7].permute(0, 2, 3, 1).reshape(len(x), 17 * 17 * 7)
        a = c(m + "branch7x7_3", c(m + "branch7x7_2", c(m + "branch7x7_1", x), 1, (0, 3)), 1, (3, 0))
        b = c(m + "branch7x7dbl_3", c(m + "branch7x7dbl_2", c(m + "branch7x7dbl_1", x), 1, (3, 0)), 1, (0, 3))
        b = c(m + "branch7x7dbl_5", c(m + "branch7x7dbl_4", b, 1, (3, 0)), 1, (0, 3))
        x = torch.cat([one, a, b, c(m + "branch_pool", avg(x))], 1)
    m = "Mixed_7a."
    b = c(m + "branch7x7x3_3", c(m + "branch7x7x3_2", c(m + "branch7x7x3_1", x), 1, (0, 3)), 1, (3, 0))
    x = torch.cat([c(m + "branch3x3_2", c(m + "branch3x3_1", x), 2), c(m + "branch7x7x3_4", b, 2), F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_7b.", "Mixed_7c."):
        a, b = c(m + "branch3x3_1", x), c(m + "branch3x3dbl_2", c(m + "branch3x3dbl_1", x), 1, 1)
        pooled = avg(x) if m == "Mixed_7b." else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([c(m + "branch1x1", x), c(m + "branch3x3_2a", a, 1, (0, 1)), c(m + "branch3x3_2b", a, 1, (1, 0)),
                       c(m + "branch3x3dbl_3a", b, 1, (0, 1)), c(m + "branch3x3dbl_3b", b, 1, (1, 0)),
                       c(m + "branch_pool", pooled)], 1)
    pool = x.mean((2, 3))
    return pool, spatial, (pool @ state["fc.weight"].T).softmax(1)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_inception(), path)
    return str(path)


def test_fid_inception_layout_is_the_public_files(inception_file, tmp_path):
    state = torch.load(inception_file)
    convs = [m for m in fid.InceptionV3(inception_file).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(inception_layout()) == len(convs) == 94 and len(state) == 472
    assert {k for m in convs for k in m.keys} | {"fc.weight", "fc.bias"} == set(state)
    assert sum(v.numel() for k, v in state.items() if "running" not in k) == 23_850_960
    assert sum(v.numel() for v in state.values()) == 23_885_392
    counters = {k.replace("var", "x").replace("running_x", "num_batches_tracked"): torch.tensor(0) for k in state if "var" in k}
    torch.save(state | counters, tmp_path / "counters.pth")  # torch adds these, and they say nothing
    fid.InceptionV3(str(tmp_path / "counters.pth"))


def test_fid_inception_equals_the_plain_network(inception_file):
    net, g = fid.InceptionV3(inception_file), torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8, generator=g)
    with torch.no_grad():
        want = plain_inception(torch.load(inception_file), (fid.resize_tf1(x) - 128) / 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which must not reach the features
        got = net(x)
    assert [tuple(t.shape) for t in got] == [(2, 2048), (2, 2023), (2, 1008)] and not got[0].requires_grad
    for a, b in zip(got, want):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 1e-5 * b.abs().max()
    gray = x[:1, :1]
    torch.testing.assert_close(net(gray), net(gray.repeat(1, 3, 1, 1)))


def test_fid_inception_wrong_weights(inception_file, tmp_path, monkeypatch):
    state = torch.load(inception_file)
    missing = {k: v for k, v in state.items() if k != "Mixed_6d.branch1x1.bn.bias"}
    for name, content in (("missing", missing), ("foreign", {"a": 1}), ("extra", state | {"AuxLogits.fc.bias": state["fc.bias"]}),
                          ("shape", state | {"fc.weight": torch.zeros(1000, 2048)}), ("list", [1, 2])):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: no Inception weights") as e:
            fid.InceptionV3(str(tmp_path / name))
        assert "\n" not in str(e.value)
    (tmp_path / "text").write_text("hello")
    for path in ("text", "nowhere"):
        with pytest.raises(ValueError, match=path):
            fid.InceptionV3(str(tmp_path / path))

    def download(url, path, sha256):
        assert url.endswith("pt_inception-2015-12-05-6726825d.pth") and sha256.startswith("6726825d") and len(sha256) == 64
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="no network.*put http.* there"):
        fid.InceptionV3()
    cached = tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE
    cached.write_bytes(Path(inception_file).read_bytes())
    with pytest.raises(ValueError, match="SHA-256"):
        fid.InceptionV3()


# ---------------------------------------------------------------- fid.py: the digits

def test_fid_digits_net(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    real, before = fid.real_images("digits"), torch.get_rng_state()
    torch.set_num_threads(2)
    net = fid.digits_net()
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == 2 and torch.is_grad_enabled()
    pool, spatial, probs = net(real.images)
    assert pool.shape == (1797, 64) and spatial.shape == (1797, 128) and probs.shape == (1797, 10)
    held_out = torch.arange(0, 1797, 5)
    right = (probs.argmax(1) == torch.tensor(real.labels))[held_out].double().mean()
    assert right >= 0.98
    (file,) = (tmp_path / "hub" / "checkpoints").iterdir()
    state = torch.load(file)
    file.write_bytes(file.read_bytes()[:1000])  # a broken cache is trained again, and comes out the same
    torch.set_num_threads(1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(7)
        again = fid.digits_net().state_dict()
    assert all(torch.equal(state[k], again[k]) for k in state)
    assert torch.equal(fid.digits_net()(real.images[:5])[0], net(real.images[:5])[0])  # from the cache


# ---------------------------------------------------------------- fid.py: images

def save_image(path, x, **kwargs):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, **kwargs)


def test_fid_real_images_digits():
    from sklearn.datasets import load_digits
    ds = fid.real_images("digits", 8)
    x, y = ds[5]
    assert len(ds) == 1797 and x.shape == (1, 8, 8) and x.dtype == torch.uint8 and type(y) is int
    assert ds.classes == list("0123456789") and y == load_digits().target[5]
    assert np.array_equal(x[0].numpy(), np.floor(load_digits().images[5] * 255 / 16 + 0.5))
    with pytest.raises(ValueError, match="8x8"):
        fid.real_images("digits", 16)


def test_fid_real_images_folder(tmp_path):
    from PIL import Image
    rng = np.random.default_rng(5)
    wide = rng.integers(0, 256, (70, 150, 3), dtype=np.uint8)
    save_image(tmp_path / "b" / "x.png", wide)
    save_image(tmp_path / "b" / "nested" / "a.JPEG", np.full((16, 16, 3), 200, np.uint8))
    save_image(tmp_path / "a" / "z.webp", np.full((20, 16, 3), 9, np.uint8), lossless=True)
    save_image(tmp_path / "a" / "._z.png", wide)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    ds = fid.real_images(tmp_path, 16)
    assert ds.classes == ["a", "b"] and [y for _, y in (ds[i] for i in range(3))] == [0, 1, 1]
    assert [Path(p).name for p in ds.images] == ["z.webp", "a.JPEG", "x.png"]
    x = Image.fromarray(wide)  # 150x70 -> halved to 75x35, 37x17 (17 < 32 stops) -> bicubic to 35x16 -> the middle 16
    x = x.resize((75, 35), Image.BOX).resize((37, 17), Image.BOX).resize((35, 16), Image.BICUBIC).crop((9, 0, 25, 16))
    assert torch.equal(ds[2][0], torch.tensor(np.array(x)).permute(2, 0, 1))
    assert abs(int(ds[1][0].float().mean()) - 200) <= 1 and (ds[0][0] == 9).all()


def test_fid_real_images_modes(tmp_path):
    from PIL import Image
    sixteen = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = np.stack([ramp, ramp.T, 255 - ramp], 2)
    save_image(tmp_path / "c" / "0.png", sixteen)
    Image.fromarray(ramp).convert("LA").save(tmp_path / "c" / "1.png")
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(tmp_path / "c" / "2.png", transparency=bytes(range(16)))
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "c" / "3.jpg", quality=100)
    Image.fromarray(np.dstack([rgb, ramp])).save(tmp_path / "c" / "4.png")
    Image.fromarray(ramp > 128).save(tmp_path / "c" / "5.png")
    got = [fid.real_images(tmp_path, 16)[i][0].permute(1, 2, 0).numpy() for i in range(6)]
    assert all(x.shape == (16, 16, 3) and x.dtype == np.uint8 for x in got)
    assert np.array_equal(got[0], np.stack([ramp] * 3, 2)) and np.array_equal(got[1], got[0])
    assert np.array_equal(got[2], np.array(palette.convert("RGB"))) and np.array_equal(got[4], rgb)
    assert np.abs(got[3].astype(int) - rgb).mean() < 6 and set(got[5].ravel()) == {0, 255}


def test_fid_real_images_errors(tmp_path):
    save_image(tmp_path / "flat" / "x.png", np.zeros((8, 8, 3), np.uint8))
    broken = tmp_path / "data" / "c" / "broken.png"
    save_image(broken, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    broken.write_bytes(broken.read_bytes()[:2000])
    for folder in ("nowhere", "flat"):
        with pytest.raises(ValueError, match=folder):
            fid.real_images(tmp_path / folder, 8)
    with pytest.raises(ValueError, match="size"):
        fid.real_images(tmp_path / "data", 0)
    with pytest.raises(ValueError, match="broken.png"):
        fid.real_images(tmp_path / "data", 8)[0]


def test_fid_open_images_splits_the_rows(tmp_path):
    x = np.random.default_rng(7).integers(0, 256, (13, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "stored.npz", labels=np.arange(13), arr_0=x)
    np.savez_compressed(tmp_path / "x.npz", arr_0=x)
    for i, image in enumerate(x):
        save_image(tmp_path / "folder" / str(i % 2) / f"{i:02}.png", image)
    order = [*range(0, 13, 2), *range(1, 13, 2)]  # a folder's images in the order of their paths
    for ranks in (1, 3):
        for name, want in (("stored.npz", x), ("x.npz", x), ("folder", x[order]), (None, x)):
            seen = {}
            for rank in range(ranks):
                images = fid.open_images(tmp_path / name if name else x[rank::ranks])
                assert images.shape == (5, 4, 3) and images.local == (name is None)
                for index, part in images.read(4, rank, ranks, 13):
                    assert 0 < len(index) == len(part) <= 4 and (index % ranks == rank).all()
                    seen |= dict(zip(index.tolist(), part.numpy(), strict=True))
            assert list(seen) == sorted(seen) or ranks > 1
            assert np.array_equal(np.stack([seen[i] for i in range(13)]), want)


# ---------------------------------------------------------------- fid.py: evaluation

def digit_samples(n, noise, seed=0):
    """(images (n, 8, 8, 1), labels): digits with noise."""
    ds, rng = fid.real_images("digits"), np.random.default_rng(seed)
    i = rng.integers(0, len(ds), n)
    x = ds.images[torch.tensor(i)].permute(0, 2, 3, 1).numpy() + rng.normal(0, noise, (n, 8, 8, 1))
    return x.round().clip(0, 255).astype(np.uint8), np.array(ds.labels)[i]


def test_fid_evaluate_is_its_parts(monkeypatch):
    """The streamed figures are those of all features at once, whatever the batch size."""
    monkeypatch.setattr(fid, "SPLIT", 200)
    x, y = digit_samples(501, 30)
    net, real = fid.digits_net(), fid.real_images("digits").images
    (p1, s1, _), (p2, s2, probs) = net(real), net(torch.tensor(x).permute(0, 3, 1, 2))
    want = {"is": fid.inception_score(probs, 200), "accuracy": (probs.argmax(1).numpy() == y).mean()}
    for key, a, b in (("fid", p1, p2), ("sfid", s1, s2)):
        stats = [t for f in (a, b) for t in (f.double().mean(0).numpy(), np.cov(f.double().numpy(), rowvar=False))]
        want[key] = fid.frechet_distance(*stats)
    want["precision"], want["recall"] = fid.precision_recall(p1, p2)
    reference = fid.load_reference("digits", "digits")
    for batch in (1, 7, 64):
        got = fid.evaluate(x, reference, batch=batch, labels=y)
        assert got == pytest.approx(want, rel=1e-5)
    assert set(fid.evaluate(torch.tensor(x), "digits", "digits")) == {"fid", "sfid", "is", "precision", "recall"}
    same = fid.evaluate(real.permute(0, 2, 3, 1), reference)
    assert same["fid"] < 1e-6 and same["sfid"] < 1e-6 and same["precision"] == same["recall"] == 1


def test_fid_inception_batch_sizes(inception_file):
    rng = np.random.default_rng(6)
    a = rng.integers(0, 256, (9, 40, 40, 3), dtype=np.uint8)
    b = (rng.integers(0, 256, (8, 1, 1, 3)) // 2 + rng.integers(0, 64, (8, 40, 40, 3))).astype(np.uint8)
    reference = fid.load_reference(b, "inception", weights=inception_file)
    one, seven, all_ = (fid.evaluate(a, reference, batch=n) for n in (1, 7, 64))
    assert seven == pytest.approx(one, rel=1e-5) and all_ == pytest.approx(one, rel=1e-5)
    assert one["fid"] > 1 and one["sfid"] > 1 and one["is"] >= 1


def test_fid_two_processes(tmp_path):
    x, y = digit_samples(203, 20)
    np.savez_compressed(tmp_path / "x.npz", arr_0=x, labels=y)
    np.savez(tmp_path / "one.npz", arr_0=x[:129])  # 64 and 64, then 1 and none
    fid.digits_net()  # into the cache

    def score():
        torch.distributed.init_process_group("gloo")
        rank, fid.SPLIT, fid.MANIFOLD = torch.distributed.get_rank(), 64, 1000
        ref = fid.load_reference("digits", "digits")
        out = [fid.evaluate(x[rank::2], ref, labels=y[rank::2], batch=10), fid.evaluate(str(tmp_path / "x.npz"), ref, labels=y),
               fid.evaluate(str(tmp_path / "one.npz"), x[rank::2], "digits")]
        (tmp_path / f"{rank}.json").write_text(json.dumps(out))
        torch.distributed.destroy_process_group()
    assert in_processes(2, score) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert str(first) == str(second)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fid, "SPLIT", 64)
        m.setattr(fid, "MANIFOLD", 1000)
        ref = fid.load_reference("digits", "digits")
        want = [fid.evaluate(x, ref, labels=y)] * 2 + [fid.evaluate(x[:129], x, "digits")]
    for a, b in zip(first, want, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    status, out, err = run("fid.py", tmp_path / "x.npz", "digits", "--json", processes=2)
    assert status == 0, err
    alone = fid.evaluate(str(tmp_path / "x.npz"), "digits", "digits")
    assert list(alone) == ["fid", "sfid", "is", "precision", "recall"]  # accuracy is of labels that are given
    (row,) = json.loads(out)
    assert {k: row[k] for k in alone} == pytest.approx(alone, rel=1e-5)


def cli(capsys, *argv):
    """(exit status, stdout, stderr without progress bars) of fid.py."""
    try:
        fid.main([str(a) for a in argv])
        status = 0
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, [line for line in err.replace("\r", "\n").splitlines() if line and "img" not in line]


def test_fid_cli_table_and_json(tmp_path, capsys):
    x, y = digit_samples(300, 10)
    np.savez(tmp_path / "nan.npz", arr_0=x, labels=y)
    np.savez(tmp_path / "b.npz", arr_0=x[:50])
    (tmp_path / "nan.json").write_text(json.dumps({"class_labels": "balanced", "num": 300}))
    status, out, err = cli(capsys, tmp_path / "nan.npz", tmp_path / "b.npz", "digits")
    lines = out.splitlines()
    assert status == 0 and len(lines) == 4
    assert [c.strip() for c in lines[0].split("|")[1:-1]] == [
        "samples", "images", "labels", "FID", "sFID", "IS", "precision", "recall", "accuracy"]
    a, b = ([c.strip() for c in line.split("|")[1:-1]] for line in lines[2:])
    assert a[:3] == [str(tmp_path / "nan.npz"), "300", "balanced"] and b[1:3] == ["50", "-"] and b[8] == "-"
    want = fid.evaluate(x, "digits", "digits", labels=y)
    assert [float(v) for v in a[3:]] == pytest.approx(list(want.values()), abs=1e-4)
    assert len(err) == 1 and "b.npz" in err[0] and "warning" in err[0]  # 50 images, 64 features
    status, out, _ = cli(capsys, tmp_path / "nan.npz", "digits", "--json", "--batch", 7)
    (row,) = json.loads(out)
    assert row["labels"] == "balanced" and {k: row[k] for k in want} == pytest.approx(want, rel=1e-5)


def test_fid_references(tmp_path, capsys):
    """The same images as .npz, folder, class folders and saved statistics give the same figures."""
    x = np.repeat(digit_samples(90, 10)[0], 3, 3)
    fake = digit_samples(80, 40, seed=1)[0]
    np.savez(tmp_path / "fake.npz", arr_0=fake)
    np.savez(tmp_path / "real.npz", arr_0=x)
    for i, image in enumerate(x):
        save_image(tmp_path / "flat" / f"{i:03}.png", image)
        save_image(tmp_path / "classes" / str(i % 3) / f"{i:03}.png", image.repeat(2, 0).repeat(2, 1))  # box-halved again
    want = fid.evaluate(fake, x, "digits")
    for name in ("real.npz", "flat", "classes"):
        out = tmp_path / f"{name}.stats.npz"
        status, text, err = cli(capsys, tmp_path / "fake.npz", tmp_path / name, "--json", "--save-stats", out)
        assert status == 0, err
        assert json.loads(text)[0]["fid"] == pytest.approx(want["fid"], rel=1e-9)
        stats = np.load(out)
        assert {k: v.shape for k, v in stats.items()} == {"mu": (64,), "sigma": (64, 64), "mu_s": (128,),
                                                          "sigma_s": (128, 128), "arr_0": (90, 8, 8, 3)}
        assert fid.evaluate(fake, str(out), "digits") == pytest.approx(want, rel=1e-9)
    np.savez(tmp_path / "only.npz", **{k: v for k, v in stats.items() if k != "arr_0"})
    status, text, _ = cli(capsys, tmp_path / "fake.npz", tmp_path / "only.npz")
    cells = [c.strip() for c in text.splitlines()[2].split("|")[1:-1]]
    assert status == 0 and float(cells[3]) == pytest.approx(want["fid"], abs=1e-4) and cells[6:8] == ["-", "-"]
    status, text, _ = cli(capsys, tmp_path / "fake.npz", tmp_path / "only.npz", "--json")
    assert json.loads(text)[0]["precision"] is None
    assert math.isnan(fid.evaluate(fake, str(tmp_path / "only.npz"), "digits")["recall"])


def test_fid_class_folders_are_not_read_class_by_class(tmp_path):
    """Precision and recall look at the first 10,000 images of a reference: they must not be those of the first classes."""
    for k, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for i in range(20):
            save_image(tmp_path / name / f"{i}.png", np.full((8, 8, 3), 100 * k + i, np.uint8))
    values = torch.cat([x[:, 0, 0, 0] for _, x in fid.open_images(str(tmp_path), 8).read(7, 0, 1, 40)]).tolist()
    assert sorted(values) == [100 * k + i for k in range(2) for i in range(20)] and 5 <= sum(v < 100 for v in values[:20]) <= 15


def test_fid_manifold_is_the_first_images_of_the_reference(monkeypatch):
    monkeypatch.setattr(fid, "MANIFOLD", 100)
    x, fake = digit_samples(300, 5)[0], digit_samples(150, 30, seed=1)[0]
    a, b = fid.evaluate(fake, x, "digits", batch=32), fid.evaluate(fake, x[:100], "digits")
    assert (a["precision"], a["recall"]) == (b["precision"], b["recall"]) and a["fid"] != pytest.approx(b["fid"])


BAD = {
    "good.npz digits --nosuch 3": "--nosuch",
    "good.npz": "REFERENCE",
    "nowhere.npz digits": "nowhere.npz",
    "good.npz nowhere": "nowhere",
    "good.npz digits --batch 0": "--batch",
    "good.npz digits --batch x": "--batch",
    "good.npz digits --features resnet": "--features",
    "good.npz digits --weights good.npz": "weights",
    "good.npz digits --features inception --weights good.npz": "good.npz",
    "good.npz digits --features inception --weights nowhere.pth": "nowhere.pth",
    "good.npz digits --save-stats nowhere/x.npz": "--save-stats",
    "good.npz digits --save-stats x.txt": "--save-stats",
    "good.npz other.npz --save-stats good.npz": "--save-stats",
    "one.npz digits": "one.npz",
    "good.npz one.npz": "one.npz",
    "mixed digits": "mixed",
    "empty digits": "empty",
    "broken digits": "broken",
    "float.npz digits": "float.npz",
    "chw.npz other.npz --features inception": "chw.npz",
    "flat.npz digits": "flat.npz",
    "noarr.npz digits": "arr_0",
    "objects.npz digits": "never unpickled",
    "truncated.npz digits": "truncated.npz",
    "short.npz digits": "short.npz",
    "corrupt.npz digits": "corrupt.npz",
    "text.npz digits": "text.npz",
    "badlabels.npz digits": "labels",
    "good.npz nanstats.npz": "nanstats.npz",
    "good.npz partstats.npz": "mu_s",
    "good.npz good.npz --features inception --weights w.pth": "w.pth",
    "big.npz digits": "big.npz",
    "good.npz big.npz --features digits": "big.npz",
    "good.npz big.npz other.npz": "big.npz",
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    d = tmp_path_factory.mktemp("bad")
    x, y = digit_samples(64, 10)
    np.savez(d / "good.npz", arr_0=x)
    np.savez(d / "other.npz", arr_0=x)
    np.savez(d / "one.npz", arr_0=x[:1])
    np.savez(d / "float.npz", arr_0=x / 255)
    np.savez(d / "chw.npz", arr_0=x.transpose(0, 3, 1, 2))
    np.savez(d / "flat.npz", arr_0=x[..., 0])
    np.savez(d / "noarr.npz", images=x)
    np.savez(d / "objects.npz", arr_0=np.array([x, None], dtype=object))
    np.savez(d / "badlabels.npz", arr_0=x, labels=y[:5])
    np.savez(d / "big.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    stats = {"mu": np.zeros(64), "sigma": np.eye(64), "mu_s": np.zeros(128), "sigma_s": np.eye(128)}
    np.savez(d / "nanstats.npz", **stats | {"sigma": np.eye(64) * np.nan})
    np.savez(d / "partstats.npz", mu=stats["mu"], sigma=stats["sigma"])
    good = (d / "good.npz").read_bytes()
    (d / "truncated.npz").write_bytes(good[:-200])
    i = good.index(x.tobytes())
    (d / "corrupt.npz").write_bytes(good[:i + 50] + bytes([good[i + 50] ^ 255]) + good[i + 51:])  # the checksum tells
    with zipfile.ZipFile(d / "short.npz", "w") as z, zipfile.ZipFile(d / "good.npz") as g:
        z.writestr("arr_0.npy", g.read("arr_0.npy")[:-1])
    (d / "text.npz").write_text("hello")
    (d / "w.pth").write_text("hello")
    (d / "empty").mkdir()
    for name, size in (("a", 8), ("b", 9)):
        save_image(d / "mixed" / f"{name}.png", np.zeros((size, 8, 3), np.uint8))
        save_image(d / "broken" / f"{name}.png", np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    (d / "broken" / "b.png").write_bytes((d / "broken" / "b.png").read_bytes()[:90])
    return d


@pytest.mark.parametrize("line", BAD)
def test_fid_bad_input(line, bad_files, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    before = {p: p.stat().st_mtime_ns for p in bad_files.rglob("*")}
    status, out, err = cli(capsys, *line.split())
    assert status == 2 and not out and len(err) == 1 and BAD[line] in err[0], (status, out, err)
    assert before == {p: p.stat().st_mtime_ns for p in bad_files.rglob("*")}


def test_fid_fails_before_the_features(bad_files, monkeypatch, capsys):
    """A bad second file or reference is named before the first image goes through a network."""
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(fid, "statistics", lambda *_, **__: pytest.fail("too late"))
    for line in ("good.npz float.npz digits", "good.npz other.npz nanstats.npz", "good.npz truncated.npz",
                 "good.npz short.npz digits", "good.npz one.npz digits", "good.npz other.npz mixed"):
        assert cli(capsys, *line.split())[0] == 2


def test_fid_help_is_quick_and_complete():
    start = time.time()
    out = subprocess.run([sys.executable, str(HERE / "fid.py"), "--help"], capture_output=True, text=True, check=True).stdout
    assert time.time() - start < 15
    for flag in ("--features", "--weights", "--batch", "--json", "--save-stats"):
        assert flag in out
    assert out.count("]\n") == 5  # defaults


# ---------------------------------------------------------------- python test_mg.py: benchmarks

def ratios(functions, rounds):
    """Times the functions in alternation -> {name: median of its time over the first one's in the same round}."""
    for function in functions.values():
        function()  # warm up
    times = []
    for _ in range(rounds):
        row = []
        for function in functions.values():
            start = time.perf_counter()
            function()
            row.append(time.perf_counter() - start)
        times.append(row)
    times = np.array(times)
    return dict(zip(functions, np.median(times / times[:, :1], 0).tolist(), strict=True)), float(np.median(times[:, 0]))


def training_step(kind, name, input_size, in_channels, batch, **options):
    """One whole training step (loss, backward, AdamW, EMA), as a function."""
    model = random_model(name, input_size, in_channels).train()
    ema = copy.deepcopy(model).requires_grad_(False)
    net = (options.pop("wrap", None) or (lambda net: net))(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=True)
    weights, ema_weights = [w.detach() for w in model.parameters()], list(ema.parameters())
    x0, y = torch.randn(batch, in_channels, input_size, input_size), torch.randint(10, (batch,))
    teacher = {"plain": None, "ema": ema, "online": net}[options.pop("teacher")]

    def step():
        SCRIPTS[kind].mg_loss(net, teacher, x0, y, 1.5, **options).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema_weights, weights, 1e-4)
    return step


MEASURE = """import sys, time; sys.path.insert(0, {root!r}); import fid, torch
def peak():  # MB; getrusage's maximum would be that of the process which started this one
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
"""
PEAK = MEASURE + """ref = fid.load_reference("digits", "digits"); ref.features = None  # precision and recall keep features
fid.evaluate({path!r}, ref); print(peak())"""
PR = MEASURE + """g = torch.Generator().manual_seed(0); a, b = (torch.randn(10000, 2048, generator=g) for _ in "ab")
before = peak(); t = time.time(); fid.precision_recall(a, b); print(time.time() - t, peak() - before)"""


def bench_fid(folder):
    """The evaluator: two things in alternation, median ratio."""
    from statistics import median

    from scipy.linalg import sqrtm

    def clock(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    rng = np.random.default_rng(0)
    stats = []
    for _ in range(2):
        x = rng.standard_normal((5000, 2048)) * np.exp(rng.standard_normal(2048))
        stats += [x.mean(0), np.cov(x, rowvar=False)]
    ours, theirs = zip(*[(clock(lambda: fid.frechet_distance(*stats)), clock(lambda: sqrtm(stats[1] @ stats[3])))
                         for _ in range(3)])
    print(f"Frechet distance, 2048 dimensions: {median(ours):.2f} s, sqrtm {median(theirs):.2f} s, "
          f"{median(b / a for a, b in zip(ours, theirs)):.1f} times as fast")

    path, state = os.path.join(folder, "bench_inception.pth"), random_inception()
    torch.save(state, path)
    net, images = fid.InceptionV3(path), torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)

    def plain():
        with torch.no_grad():
            plain_inception(state, (fid.resize_tf1(images) - 128) / 128)
    net(images), plain()
    ours, theirs = zip(*[(clock(lambda: net(images)), clock(plain)) for _ in range(5)])
    print(f"Inception features: {16 / median(ours):.1f} images/s, plain eager {16 / median(theirs):.1f}, "
          f"{median(b / a for a, b in zip(ours, theirs)):.2f} times")
    os.remove(path)

    peaks = []
    for n in (2000, 20000):
        path = os.path.join(folder, f"bench_{n}.npz")
        np.savez(path, arr_0=digit_samples(n, 10)[0])
        fid.digits_net()
        run = subprocess.run([sys.executable, "-c", PEAK.format(root=str(HERE), path=path)], capture_output=True, text=True,
                             check=True)
        peaks.append(float(run.stdout))
        os.remove(path)
    print(f"Peak memory of FID, sFID and IS of 2,000 images {peaks[0]:.0f} MB, of 20,000 {peaks[1]:.0f} MB: {peaks[1] / peaks[0] - 1:+.1%}")
    run = subprocess.run([sys.executable, "-c", PR.format(root=str(HERE))], capture_output=True, text=True, check=True)
    seconds, memory = map(float, run.stdout.split())
    print(f"Precision and recall, 10,000 x 10,000 x 2048: {seconds:.1f} s, {memory:.0f} MB beside the features")


def bench_latents(folder):
    """Loading cached latents, and training from them against encoding in every step; pictures of 256x256 pixels."""
    from diffusers import AutoencoderKL
    from torch.utils.data import DataLoader
    from torch.utils.flop_counter import FlopCounterMode

    def gflops(f):  # multiply-adds
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            f()
        return counter.get_total_flops() / 2e9

    def autoencoder(widths, layers):
        return AutoencoderKL(block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=layers,
                             up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4).eval().requires_grad_(False)
    with torch.device("meta"):
        sd, meta = autoencoder((128, 256, 512, 512), 2), autoencoder((32, 32, 64, 64), 1)
        b2, tiny = (create_model(f"SiT-{size}/2", input_size=32, in_channels=4, num_classes=1000) for size in "BT")

    def pass_of(model):
        model(torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.int64))
    encoder = gflops(lambda: sd.encode(torch.empty(1, 3, 256, 256)))
    forward = gflops(lambda: pass_of(b2))
    print(f"\nSD's VAE encodes an image in {encoder:.0f} GFLOPs; a B/2 step of plain SiT has {3 * forward:.0f} an image, with MG "
          f"{(3 + 2 * 0.9) * forward:.0f}")

    vae, images = autoencoder((32, 32, 64, 64), 1), fid.real_images(str(photo_tiles(Path(folder) / "tiles", 256, 16)), 256)
    many = copy.copy(images)
    many.images, many.labels = images.images * 150, images.labels * 150
    latents = models.Latents(Path(folder) / "large", many, vae, "small", (4, 32, 32))
    (Path(folder) / "large").mkdir()
    np.save(latents.folder / "latents.npy", np.random.default_rng(0).integers(0, 2 ** 15, latents.header["shape"], np.int16
                                                                               ).view(np.float16))
    os.sync()
    for workers in 0, 2:
        for where in "memory", "disk":
            rates = []
            for _ in range(3):
                if where == "disk":
                    with open(latents.folder / "latents.npy", "rb") as f:
                        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                data = iter(DataLoader(latents, sampler=train_sit_mg.sampler(len(many), 256, 256, 0, 0, 1, 0), batch_size=None,
                                       num_workers=workers))
                next(data)
                start = time.perf_counter()
                for _ in range(15):
                    next(data)
                rates.append(15 * 256 / (time.perf_counter() - start))
            rate, size = float(np.median(rates)), latents.open()[0].nbytes
            print(f"cached latents from {where}, {workers} workers: {rate:.0f} images/s, {rate * size / 1e6:.0f} MB/s")
    need = 400e12 / (3 * forward * 2e9)
    print(f"needed by plain SiT-B/2 on a GPU that gives 400 TFLOP/s: {need:.0f} images/s, {need * size / 1e6:.0f} MB/s")

    latents = models.Latents(Path(folder) / "small", images, vae, "small", (4, 32, 32))
    latents.fill(images, vae, 0)
    name, n = "SiT-T/2", 8
    model = random_model(name, 32, 4).train()
    ema, optimizer = copy.deepcopy(model).requires_grad_(False), torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(cached):
        index = torch.randint(len(images), (n,)).tolist()
        if cached:
            x, y = latents[index]
            mean, std = x[:, 0].float().unbind(1)
        else:
            x, y = torch.utils.data.default_collate([images[i] for i in index])
            mean, std = models.encode(vae, x.float() / 127.5 - 1)
        train_sit_mg.mg_loss(model, ema, mean + std * torch.randn_like(mean), y, 1.5).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    got, seconds = ratios({"cache": lambda: step(True), "online": lambda: step(False)}, 7)
    small, t2 = gflops(lambda: meta.encode(torch.empty(1, 3, 256, 256))), gflops(lambda: pass_of(tiny))
    print(f"training {name}, batch {n}: {n / seconds:.1f} images/s from cached latents, {n / seconds / got['online']:.1f} encoding in the "
          f"step, {got['online']:.2f} times (VAE {small:.1f} GFLOPs, step {4.8 * t2:.1f} an image)")


def eager_dit(state, x, t, y, heads=6, patch=2):
    """DiT's forward pass as its authors' code has it, a function of a SiT-S/2's state dict: what a plain implementation costs."""
    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(x, shift, scale):
        return F.layer_norm(x, (x.shape[-1],), None, None, 1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    n, height = len(x), x.shape[2] // patch
    freqs = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 127)
    args = t[:, None].float() * freqs[None]
    c = linear(F.silu(linear(torch.cat([torch.cos(args), torch.sin(args)], -1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = c + F.embedding(y, state["y_embedder.embedding_table.weight"])
    x = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    x = x + state["pos_embed"]
    for i in range(12):
        b = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(F.silu(c), f"{b}.adaLN_modulation.1").chunk(6, dim=1)
        q, k, v = linear(modulated(x, shift1, scale1), f"{b}.attn.qkv").reshape(n, -1, 3, heads, 64).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, heads * 64)
        x = x + gate1.unsqueeze(1) * linear(h, f"{b}.attn.proj")
        h = F.gelu(linear(modulated(x, shift2, scale2), f"{b}.mlp.fc1"), approximate="tanh")
        x = x + gate2.unsqueeze(1) * linear(h, f"{b}.mlp.fc2")
    shift, scale = linear(F.silu(c), "final_layer.adaLN_modulation.1").chunk(2, dim=1)
    x = linear(modulated(x, shift, scale), "final_layer.linear").reshape(n, height, height, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(n, -1, height * patch, height * patch)


def bench_step():
    """SiT-S/2 on 32x32x4 latents: our plain step against an eager DiT step with AdamW's and EMA's usual loops; precisions, EMA, memory."""
    model = random_model("SiT-S/2", 32, 4).train()
    state, x0, y = dict(model.state_dict(keep_vars=True)), torch.randn(4, 4, 32, 32), torch.randint(10, (4,))
    averages = [p.detach().clone() for p in model.parameters()]
    t = torch.rand(4)
    torch.testing.assert_close(eager_dit(state, x0, t, y), model(x0, t, y), rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, foreach=False)

    def loop():
        for a, p in zip(averages, model.parameters(), strict=True):
            a.mul_(0.9999).add_(p.detach(), alpha=1e-4)

    def eager():
        t, noise = torch.rand(4), torch.randn_like(x0)
        s = t.view(-1, 1, 1, 1)
        F.mse_loss(eager_dit(state, (1 - s) * x0 + s * noise, t, y), noise - x0).backward()
        optimizer.step()
        optimizer.zero_grad()
        loop()
    shape = ("SiT", "SiT-S/2", 32, 4, 4)
    plain = training_step(*shape, teacher="plain")

    def bf16():
        with torch.autocast("cpu", torch.bfloat16):
            plain()
    got, seconds = ratios({"plain": plain, "eager": eager, "bf16": bf16,
                           "compiled": training_step(*shape, teacher="plain", wrap=torch.compile)}, 9)
    print(f"\nSiT-S/2, batch 4, plain step {seconds * 1000:.0f} ms; over it: eager DiT step {got['eager']:.2f}, "
          f"--compile {got['compiled']:.2f}, --dtype bf16 {got['bf16']:.2f}")
    weights = [p.detach() for p in model.parameters()]
    got, seconds = ratios({"foreach": lambda: torch._foreach_lerp_(averages, weights, 1e-4), "loop": loop}, 50)
    print(f"EMA update {seconds * 1000:.1f} ms; the loop takes {got['loop']:.2f} times as long")
    for teacher in "plain", "ema", "online":
        code = MEASURE.format(root=str(HERE)) + f"import test_mg as m\nstep = m.training_step(*{shape!r}, teacher={teacher!r})\n" \
            "[step() for _ in range(3)]; print(peak())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        print(f"peak resident memory of three such steps, teacher {teacher}: {float(done.stdout):.0f} MB")


def bench():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of ratios, taken in alternation\n")
    print("| one training step, time over plain's | plain, ms | ema | ema, t_max .75 | online | online, t_max .75 | 4 labels |")
    print("|---|---|---|---|---|---|---|")
    for kind, name, shape, batch_size, rounds in (("SiT", "SiT-T/2", (8, 1), 64, 40), ("DiT", "DiT-T/2", (8, 1), 64, 40),
                                                  ("SiT", "SiT-S/2", (32, 4), 4, 8)):
        got, plain = ratios({label: training_step(kind, name, *shape, batch_size, **options) for label, options in {
            "plain": {"teacher": "plain"}, "ema": {"teacher": "ema"}, "ema.75": {"teacher": "ema", "t_max": 0.75},
            "online": {"teacher": "online"}, "online.75": {"teacher": "online", "t_max": 0.75},
            "labels": {"teacher": "ema", "empty": "labels", "num_labels": 4}}.items()}, rounds)
        print(f"| {name}, batch {batch_size} | {plain * 1000:.0f} | " + " | ".join(f"{r:.2f}" for r in list(got.values())[1:]) + " |")
    model, labels = random_model(), torch.arange(500) % 10
    got, mg = ratios({f"cfg {cfg}": lambda cfg=cfg: generate(model, labels, torch.arange(500), steps=25, cfg=cfg)
                      for cfg in (1.0, 2.0)}, 9)
    print(f"\nsampling, SiT-T/2, 25 steps: 500 at once: MG {500 / mg:.0f} images/s, {got['cfg 2.0']:.2f} times those with CFG")

    print("\n| the grid, exactly, at t | RMS of v(c) - v(empty) | RMS error of Eq. 23's flat mean |\n|---|---|---|")
    for t in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        print(f"| {t} | " + " | ".join(f"{value:.3f}" for value in flat_mean_error(t)) + " |")
    bench_step()
    with tempfile.TemporaryDirectory() as folder:
        bench_fid(folder)
        bench_latents(folder)


if __name__ == "__main__":
    bench()
