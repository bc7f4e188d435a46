"""`pytest test_mg.py`: everything on the CPU, nothing is downloaded."""
import argparse
import contextlib
import copy
import csv
import errno
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import nn
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

import checkpoints
import data
import fid
import models
import runtime
import sample
import toy_mg
import train_dit_mg
import train_sit_mg
from checkpoints import load_checkpoint, save_curves
from models import ALPHA_BARS, BETAS, create_model
from runtime import UserError
from sample import SAMPLERS, generate


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory):
    """A cache of our own for the digits' CNN; no network; one thread, as the tensors are small."""
    os.environ |= {"TORCH_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    for number in runtime.SIGNALS:  # nohup and jobs in the background ignore some
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    # matplotlib takes a third of a second for each; test_curves_are_drawn has the real one.
    checkpoints.save_curves = lambda rows, path: Path(path).touch()


def error(main, *argv):
    """The one line with which main(argv) ends, or main() without argv."""
    with pytest.raises(UserError) as e:
        main([str(a) for a in argv]) if argv else main()
    assert "\n" not in str(e.value)
    return str(e.value)


def before(function, number, act):
    """The function, but its call of this number does act(*args) first."""
    calls = itertools.count(1)

    def called(*args, **kwargs):
        if next(calls) == number:
            act(*args)
        return function(*args, **kwargs)
    return called


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def shell(*command, processes=0):
    """A script of the project, plainly or under torchrun: (exit status, stdout + stderr)."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*launcher, HERE / command[0], *map(str, command[1:])], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
                          check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout


def fork(function, world=1, status=0):
    """Runs function(rank) in forks, as torchrun does. All must end with status. -> their output."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def run(rank):
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        function(rank)
    with tempfile.TemporaryFile("a+") as log:
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=run, args=[rank]) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        log.seek(0)
        words = log.read()
    assert [process.exitcode for process in processes] == [status] * world, words
    return words


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_one_call(name):
    def net(x, t):
        assert x.dtype == torch.float64 and t == (999 if name in ("ddpm", "ddim") else 1)
        calls.append(t)
        return x
    calls = []
    x_0 = SAMPLERS[name](net, torch.randn(2, 1, 1, 1), 1)
    assert len(calls) == 1 and x_0.dtype == torch.float32 and x_0.isfinite().all()


def save_image(path, image):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path)


def random_model(name="SiT-T/2", input_size=8, in_channels=1, num_classes=10, seed=0, **kwargs):
    """A network without zeros in it, so that each of its parts matters."""
    model = create_model(name, input_size=input_size, in_channels=in_channels,
                         num_classes=num_classes, **kwargs)
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05 if p.ndim > 1 else 0.02)
    return model.eval()


def save_random(path, model, name, **config):
    """A checkpoint of ours that holds this network."""
    shape = {key: getattr(model, key) for key in checkpoints.SHAPE}
    state = model.state_dict()
    classes = [f"class {i}" for i in range(model.num_classes)]
    checkpoints.save_checkpoint(path, {
        "config": {"model": name, "vae": None} | config | shape, "step": 7, "w": 1.5, "log": [],
        "losses": torch.zeros(0), "model": state, "ema": state, "optimizer": {},
        "classes": classes})
    return path


def double_channels(state):
    """To the layout of SiT's files: for each pixel of a patch v, then what nobody uses."""
    for key in "final_layer.linear.weight", "final_layer.linear.bias":
        value = state[key].unflatten(0, (-1, 1, 4))
        state[key] = torch.cat([value, torch.randn_like(value)], 1).flatten(0, 2)


def tiny_vae(folder):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
                  up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4,
                  scaling_factor=0.3).save_pretrained(folder / "vae")
    return models.load_vae(str(folder / "vae"))


# ---------------------------------------------------------------- models.py

def test_parameters_and_gflops_are_the_published_ones(capsys, monkeypatch):
    """DiT's Table 4 and the paper's Fig. 6, within 1 %."""
    monkeypatch.setattr(sys, "argv", ["models.py"])
    published = {"SiT-S/2": (33, 6.06), "DiT-B/2": (130, 23.01), "SiT-L/2": (458, 80.71),
                 "DiT-XL/2": (675, 118.64)}
    monkeypatch.setattr(models, "NAMES", [*published])
    models.main()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "iT-" in line]
    found = {row[1].strip(): (float(row[2]), float(row[3])) for row in rows}
    for name, want in published.items():
        assert found[name] == pytest.approx(want, rel=0.01)


def dit_by_name(state, x, t, y, heads=4, patch=2):
    """facebookresearch/DiT's and willisma/SiT's forward pass, from the names of its state dict."""
    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, shift, scale):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * (1 + scale[:, None]) + shift[:, None]

    def waves(place, count, functions):
        angles = place[:, None] * torch.exp(-np.log(10000) * torch.arange(count) / count)
        return [function(angles) for function in functions]
    embedding = torch.cat(waves(t.float(), 128, (torch.cos, torch.sin)), 1)
    c = linear("t_embedder.mlp.0", embedding)
    c = linear("t_embedder.mlp.2", c * c.sigmoid()) + state["y_embedder.embedding_table.weight"][y]
    silu = c * c.sigmoid()
    x = nn.functional.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"],
                             stride=patch)
    grid = x.shape[-1]
    width = x.shape[1]
    row = torch.arange(grid).repeat_interleave(grid)
    column = torch.arange(grid).repeat(grid)
    position = [wave for place in (column, row)  # MAE's: the column first
                for wave in waves(place, width // 4, (torch.sin, torch.cos))]
    x = x.flatten(2).transpose(1, 2) + torch.cat(position, 1)
    depth = len([key for key in state if key.endswith("attn.qkv.weight")])
    for i in range(depth):
        b = f"blocks.{i}"
        s1, c1, g1, s2, c2, g2 = linear(f"{b}.adaLN_modulation.1", silu).chunk(6, 1)
        q, k, v = linear(f"{b}.attn.qkv", norm(x, s1, c1)).chunk(3, -1)
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
        h = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + g1[:, None] * linear(f"{b}.attn.proj", h)
        h = nn.functional.gelu(linear(f"{b}.mlp.fc1", norm(x, s2, c2)), approximate="tanh")
        x = x + g2[:, None] * linear(f"{b}.mlp.fc2", h)
    shift, scale = linear("final_layer.adaLN_modulation.1", silu).chunk(2, 1)
    x = linear("final_layer.linear", norm(x, shift, scale))
    x = x.reshape(len(x), grid, grid, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, grid * patch, grid * patch)


@pytest.mark.parametrize("kind", ["DiT", "SiT"])
def test_networks_are_dits_and_sits(kind):
    """The same state dict gives the same output, and nothing is added to it."""
    model = random_model(f"{kind}-T/2", 8, 4)
    x = torch.randn(4, 4, 8, 8)
    y = torch.tensor([0, 3, 9, 10])
    t = torch.tensor([0, 3, 600, 999]) if kind == "DiT" else torch.tensor([0.0, 0.01, 0.6, 1.0])
    with torch.no_grad():
        out = model(x, t, y)
    assert out.shape == (4, 8 if kind == "DiT" else 4, 8, 8) and out.std() > 0.1
    torch.testing.assert_close(out, dit_by_name(model.state_dict(), x, t, y), rtol=0, atol=1e-5)
    with torch.device("meta"):  # DiT-XL-2-256x256.pt: 28 blocks of 10 tensors, and 12 more
        big = create_model(f"{kind}-XL/2", input_size=32, in_channels=4, num_classes=1000)
    shapes = {key: tuple(value.shape) for key, value in big.state_dict().items()}
    assert len(shapes) == 292 and shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["blocks.27.attn.qkv.weight"] == (3456, 1152)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["final_layer.linear.weight"] == (32 if kind == "DiT" else 16, 1152)


def test_every_block_gets_a_contiguous_input():
    """Transposed ones are slower, and inductor's CPU backward is wrong for them."""
    model = random_model("SiT-T/2", 8, 4)
    strides = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: strides.append(args[0].is_contiguous()))
    model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 10]))
    assert strides == [True] * 4


def test_the_empty_class_has_scale_0():
    """Eq. 22, whatever w it is given; a label without w is at 1."""
    model = random_model(scale_aware=True)
    x = torch.randn(1, 1, 8, 8).repeat(3, 1, 1, 1)
    t = torch.full((3,), 0.5)
    y = torch.tensor([10, 10, 3])
    with torch.no_grad():
        a, b, c = model(x, t, y, torch.tensor([0.0, 2.5, 2.5]))
        assert torch.equal(a, b) and not torch.equal(b, c)
        torch.testing.assert_close(model(x, t, y)[2], model(x, t, y, 1.0)[2])
        assert not torch.equal(model(x, t, y)[2], c)


def test_new_networks_start_as_dit_does():
    shape = {"input_size": 8, "in_channels": 3, "num_classes": 5}
    model = create_model("SiT-T/2", scale_aware=True, **shape)
    x = torch.randn(2, 3, 8, 8)
    t = torch.rand(2)
    y = torch.tensor([0, 5])
    assert model(x, t, y, 2.0).abs().max() == 0
    for layer in [*model.blocks, model.final_layer]:
        nn.init.normal_(layer.adaLN_modulation[1].weight)
    nn.init.normal_(model.final_layer.linear.weight)  # w has no effect until it has learnt one
    assert torch.equal(model(x, t, y, 3.0), model(x, t, y)) and model(x, t, y).std() > 0.1
    assert model.y_embedder.embedding_table.weight.detach().std() == pytest.approx(0.02, rel=0.2)
    assert "scale-aware" in error(lambda: create_model("SiT-T/2", **shape)(x, t, y, 1.5))
    assert "SiT-XL/2" in error(lambda: create_model("SiT-XXL/2", **shape))
    assert "doesn't divide" in error(lambda: create_model("SiT-T/8", **shape | {"input_size": 10}))


def test_vae_codec(tmp_path):
    """Scaled latents in and out, fp32 under any autocast, image by image."""
    from safetensors.torch import load_file, save_file
    vae = tiny_vae(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = vae.encode(images).latent_dist
    with torch.autocast("cpu", torch.bfloat16):
        mean, std = models.encode(vae, images)
        back = models.decode(vae, mean)
    assert mean.shape == (2, 4, 8, 8) and vae.use_slicing
    assert torch.equal(mean, posterior.mean * 0.3) and torch.equal(std, posterior.std * 0.3)
    torch.testing.assert_close(back, vae.decode(posterior.mean).sample)
    assert "--vae" in error(lambda: models.load_vae(str(tmp_path / "nothing")))
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({key: x for key, x in state.items() if key != "decoder.conv_in.weight"}, file)
    assert "incomplete, decoder.conv_in" in error(lambda: models.load_vae(str(tmp_path / "vae")))


def test_one_line_and_status_2(tmp_path):
    """An error of a user: plainly, and under torchrun, where one rank speaks; its exit is 1."""
    code, words = shell("fid.py", "nowhere", "digits")
    assert code == 2 and words.startswith("fid.py: error: nowhere") and words.count("\n") == 1
    code, words = shell("train_sit_mg.py", "--model", "X", "--out", tmp_path, processes=2)
    line = "train_sit_mg.py: error: --model X: unknown"
    assert code == 1 and words.count(line) == 1 and "in create_model" not in words
    assert "--model X: unknown" in "".join(words.splitlines()[-3:])  # of torchrun's own report


def test_run_keeps_the_exit_status():
    """Of sys.exit(), also under torchrun."""
    for code, status, says in ((None, 0, ""), (3, 3, ""), ("a word", 1, "a word")):
        def leave(_):
            os.environ |= {"RANK": "0"}
            runtime.run(lambda: sys.exit(code))  # noqa: B023  it runs at once
        assert says in fork(leave, status=status)


def test_names_that_are_not_utf_8_can_be_printed():
    assert r"\udcff.png" in fork(lambda _: runtime.run(lambda: print(os.fsdecode(b"\xff.png"))))


def test_a_reader_that_ends_early():
    """As in `python models.py | head -1`: no traceback, and the shell's status for it."""
    code = "import runtime; runtime.run(lambda: print('x' * 10**6))"
    command = f"'{sys.executable}' -c \"{code}\" | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=HERE, capture_output=True, text=True,
                          check=False)
    assert (done.stdout, done.stderr) == ("x141\n", "")


def unpack_a_tensor(*_):
    a, b = torch.zeros(3)
    return a + b


def read_a_key(*_):
    return {}["key"]


def multiply_shapes(*_):
    return torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.mark.parametrize("bug", [unpack_a_tensor, read_a_key, multiply_shapes])
@pytest.mark.parametrize("launched", [False, True])
def test_a_bug_keeps_its_traceback(bug, launched, tmp_path):
    """Of whoever edits Block.forward: it ends with the file and the line."""
    def edited(_):
        if launched:
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        models.Block.forward = bug
        runtime.run(lambda: train("SiT", tmp_path, "--steps", 2))
    words = fork(edited, status=1)
    assert re.search(rf'File ".*test_mg.py", line {bug.__code__.co_firstlineno + 1}, in', words)
    assert "Traceback" in words and "error: " not in words


# ---------------------------------------------------------------- mg_loss

def mg_loss(script, model, teacher, x0, y, w, *, t, noise, dropped, null=None, guide=None,
            share=1.0, t_max=1.0, others=None):
    """script.mg_loss, called as train() does: the mask becomes an index, w an input of the net."""
    w = w if w is None else torch.as_tensor(w, dtype=x0.dtype).expand(len(x0))
    guided = ~dropped & (t <= t_max * script.T_NOISE) & (w != 1)
    guided = guided if guide is None else guided & guide
    draws = {"t": t, "dropped": dropped, "w": w, "guide": guided.nonzero()[:, 0]}
    draws |= {} if others is None else {"others": others}
    draws = {key: runtime.move(x, x0.device) for key, x in draws.items()}
    aware = getattr(model, "scale_aware", False)
    student = (lambda x, t, y: model(x, t, y, draws["w"])) if aware else model
    y = runtime.move(y, x0.device)
    null = model.num_classes if null is None else null
    return script.mg_loss(student, teacher, x0, y, noise=noise, share=share, null=null, **draws)


def batch(kind="SiT", n=12, seed=0, channels=1):
    """Arguments of mg_loss: three of twelve are dropped."""
    g = torch.Generator().manual_seed(seed)
    b = {"x0": torch.randn(n, channels, 8, 8, generator=g).clamp(-1, 1),
         "y": torch.randint(10, (n,), generator=g), "t": torch.rand(n, generator=g),
         "noise": torch.randn(n, channels, 8, 8, generator=g), "dropped": torch.arange(n) % 4 == 3}
    if kind == "DiT":
        b["t"] = (b["t"] * 1000).long()
        b["t"][1] = 0
    return b


def corrupt(kind, b):
    """x_t and the plain target in float64, from Eq. 1, 3, 4 and 6."""
    x0 = b["x0"].double()
    noise = b["noise"].double()
    if kind == "SiT":
        t = b["t"].double().view(-1, 1, 1, 1)
        return (1 - t) * x0 + t * noise, noise - x0
    abar = ALPHA_BARS[b["t"]].view(-1, 1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise, noise


def reference_bound(b, eps, v):
    """The variational term from its definition: a KL of torch's, and the mass of a bin at t = 0."""
    def at(table):
        return table[b["t"]].view(-1, 1, 1, 1)
    x0 = b["x0"].double()
    x_t, _ = corrupt("DiT", b)
    earlier = torch.cat([torch.ones(1, dtype=torch.float64), ALPHA_BARS[:-1]])
    variance = BETAS * (1 - earlier) / (1 - ALPHA_BARS)
    variance[0] = variance[1]

    def mean(x0):  # of q(x_{t-1} | x_t, x_0)
        return (at(earlier.sqrt() * BETAS / (1 - ALPHA_BARS)) * x0
                + at((1 - BETAS).sqrt() * (1 - earlier) / (1 - ALPHA_BARS)) * x_t)
    x0_hat = (x_t - (1 - at(ALPHA_BARS)).sqrt() * eps) / at(ALPHA_BARS).sqrt()
    log_var = (v + 1) / 2 * at(BETAS).log() + (1 - v) / 2 * at(variance).log()
    p = torch.distributions.Normal(mean(x0_hat), (log_var / 2).exp())
    q = torch.distributions.Normal(mean(x0), at(variance).sqrt())
    lower = torch.where(x0 < -0.999, 0, p.cdf(x0 - 1 / 255))
    upper = torch.where(x0 > 0.999, 1, p.cdf(x0 + 1 / 255))
    nll = -(upper - lower).clamp(min=1e-12).log()
    bound = torch.where(at(torch.arange(1000)) == 0, nll, torch.distributions.kl_divergence(q, p))
    return bound.mean((1, 2, 3)) / np.log(2)


CASES = {  # what mg_loss is given besides the batch -> whose guidance term counts, with its factor
    "plain": {"teacher": None}, "w 1": {"w": 1.0}, "ema": {}, "online": {"teacher": "online"},
    "t_max": {"t_max": 0.6}, "share": {"guide": torch.arange(12) % 3 == 0, "share": 0.25},
    "several w": {"w": torch.linspace(1, 3, 12)},
    "others": {"others": torch.arange(1, 5)}, "online, others": {"teacher": "online",
                                                                 "others": torch.arange(1, 3)}}


@pytest.mark.parametrize("scale_aware", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["SiT", "DiT"])
def test_mg_loss_against_its_equations(kind, case, scale_aware):
    """The loss in float64, its gradient with a constant target, and who the teacher was run on."""
    options = {"teacher": "ema", "w": 1.7} | CASES[case]
    b = batch(kind, channels=2)
    channels = 2
    model, ema = (random_model(f"{kind}-T/2", in_channels=2, seed=seed, scale_aware=scale_aware)
                  for seed in (0, 1))
    teacher = {"ema": ema, "online": model, None: None}[options.pop("teacher")]
    if "others" in options:
        options["others"] = (b["y"][:, None] + options["others"]) % 10
    w = torch.as_tensor(options["w"]).expand(12)
    ones = torch.ones(12)
    zeros = torch.zeros(12)
    noise_time = b["t"] / 1000 if kind == "DiT" else b["t"]
    guided = ~b["dropped"] & (noise_time <= options.get("t_max", 1)) & (w != 1)
    guided &= options.get("guide", torch.tensor(True))
    x_t, target = corrupt(kind, b)

    def call(net, label, scale):
        return net(x_t.float(), b["t"], label, *([scale.float()] if scale_aware else [])).double()
    if teacher is not None:
        with torch.no_grad():
            cond = call(teacher, b["y"], ones)[:, :channels]
            if "others" in options:
                others = options["others"].T
                uncond = torch.stack([call(teacher, label, ones) for label in others]).mean(0)
            else:
                uncond = call(teacher, torch.full((12,), 10), zeros)
        factor = torch.where(guided, (w.double() - 1) / options.get("share", 1), 0)
        target = target + factor.view(-1, 1, 1, 1) * (cond - uncond[:, :channels])  # Eq. 18, 20, 22
    label = torch.where(b["dropped"], 10, b["y"])
    out = call(model, label, torch.where(b["dropped"], 0, w))
    want = (out[:, :channels] - target).square().mean((1, 2, 3))                   # Eq. 17, 19
    if kind == "DiT":
        want = want + reference_bound(b, out[:, :channels].detach(), out[:, channels:])
    want_grad = torch.autograd.grad(want.mean(), model.parameters())
    calls = []
    for net in model, ema:
        net.register_forward_pre_hook(lambda net, args: calls.append((net, len(args[0]))))
    loss = mg_loss(SCRIPTS[kind], model, teacher, **b, **options)
    passes = 1 + options["others"].shape[1] if "others" in options else 2
    if teacher is model and not scale_aware:
        passes -= 1  # the student's output is reused
    if teacher is None or not guided.any():
        passes = 0
    assert calls == [(model, 12)] + [(teacher, int(guided.sum()))] * passes
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    grad = torch.autograd.grad(loss.mean(), model.parameters())
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in ema.parameters())


def test_the_online_teacher_is_known_in_its_wrappers():
    model = random_model()
    b = batch()
    calls = []
    compiled = torch.compile(model, backend="eager")
    want = mg_loss(train_sit_mg, model, model, w=1.5, **b)
    model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    wrapped = nn.DataParallel(model)  # it has .module, as DDP
    wrapped.num_classes = 10
    for net, teacher in (compiled, compiled), (model, model), (wrapped, model):
        got = mg_loss(train_sit_mg, net, teacher, w=1.5, **b)
        torch.testing.assert_close(got, want)
    assert calls == [12, 9] * 3


def test_any_condition():
    """Text embeddings and a network that knows no labels: the same as label by label."""
    b = batch()
    embeddings = torch.randn(11, 3, 5)
    net = random_model()

    def by_text(x, t, text):
        return net(x, t, (text[:, None] - embeddings).abs().sum((2, 3)).argmin(1))
    want = mg_loss(train_sit_mg, net, net, w=1.5, **b)
    got = mg_loss(train_sit_mg, by_text, by_text, w=1.5, null=embeddings[10],
                               **b | {"y": embeddings[b["y"]]})
    torch.testing.assert_close(got, want)
    want = sample.guided(net, b["y"], cfg=2.0)(b["x0"], 0.5)
    got = sample.guided(by_text, embeddings[b["y"]], cfg=2.0, null=embeddings[10])(b["x0"], 0.5)
    torch.testing.assert_close(got, want)


def each_element(kind, x, t, y):
    """A network that treats each number of x by itself; DiT's with the variance after it."""
    per_sample = [-1] + [1] * (x.ndim - 1)
    out = (x * (1 + y).view(per_sample) / 7 + t.view(per_sample) / 900).cos()
    return torch.cat([out, out.sin()], 1) if kind == "DiT" else out


@pytest.mark.parametrize("teacher", ["ema", "online", None])
@pytest.mark.parametrize("shape", [(4, 4), (4, 3), (4, 4, 4), (4, 5, 4), (4, 4, 3), (4, 3, 4, 4),
                                   (4, 4, 4, 4), (4, 3, 4, 5, 5), (4, 4, 4, 4, 4)])
@pytest.mark.parametrize("kind", ["SiT", "DiT"])
def test_mg_loss_takes_data_of_any_shape(kind, shape, teacher):
    """Vectors, tokens, images, video: to the bit what a loop over samples gives."""
    torch.manual_seed(0)
    x0, noise = torch.randn(2, *shape)
    y = torch.tensor([3, 0, 5, 5])
    t = torch.tensor([0.1, 0.5, 0.9, 0.3]) if kind == "SiT" else torch.tensor([0, 500, 999, 20])
    w = torch.tensor([1.2, 1.5, 1.9, 0.7])
    dropped = torch.tensor([False, True, False, False])
    others = torch.tensor([[1, 2], [2, 3], [3, 4], [4, 0]])

    def model(x, t, y):
        return each_element(kind, x, t, y)

    def ema(x, t, y):
        return each_element(kind, 1.1 * x, t, y)
    teacher = {"ema": ema, "online": model, None: None}[teacher]

    def loss(i, **options):
        return SCRIPTS[kind].mg_loss(model, teacher, x0[i], y[i], w[i], t=t[i], noise=noise[i],
                                     dropped=dropped[i], null=6, **options)
    rows = [slice(i, i + 1) for i in range(4)]
    assert torch.equal(loss(slice(4)), torch.cat([loss(i) for i in rows]))
    got = loss(slice(4), others=others)
    assert torch.equal(got, torch.cat([loss(i, others=others[i]) for i in rows]))
    # the second is dropped, the fourth isn't named
    got = loss(slice(4), guide=torch.tensor([2, 0, 1]), share=0.5)
    some = [loss(i, guide=torch.arange(n), share=0.5) for i, n in zip(rows, (1, 0, 1, 0))]
    assert torch.equal(got, torch.cat(some))
    assert (got[0] == loss(slice(4))[0]) == (teacher is None)


@pytest.mark.parametrize("kind", ["SiT", "DiT"])
def test_mg_loss_refuses_a_mask_and_a_share_of_nobody(kind):
    b = batch(kind)
    options = b | {"null": 10}
    model = random_model(f"{kind}-T/2")
    for says, wrong in (("nonzero", {"guide": ~b["dropped"]}), ("needs guide", {"share": 0.5})):
        with pytest.raises(ValueError, match=says):
            SCRIPTS[kind].mg_loss(model, model, w=1.5, **options, **wrong)


class Foreign(nn.Module):
    """A network like minRF's and REPA's, which drops labels itself in training."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.drop = 0.1
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 1, 3, padding=1)
        self.empty = []  # shares of the empty label in the passes that learn

    def forward(self, x, t, y):
        if self.training:
            y = torch.where(torch.rand(len(y)) < self.drop, 10, y)
        if torch.is_grad_enabled():
            self.empty.append((y == 10).float().mean().item())
        features = self.first(x) + (self.embedding(y) + t[:, None])[:, :, None, None]
        return self.last(features.tanh()), features


def minrf_step(model, x, y):
    """Its own times and no moving average: the network is its own teacher."""
    t = torch.sigmoid(torch.randn(len(x)))
    z1 = torch.randn_like(x)

    def net(x_t, t, y):
        return model(x_t, t, y)[0]
    return mg_loss(train_sit_mg, net, net, x, y, 1.5, t=t, noise=z1, null=torch.tensor([10]),
                                dropped=torch.rand(len(x)) < 0.1).mean()


def repa_step(model, x, y):
    """The network also returns features, for a loss of their own."""
    kept = []

    def net(x_t, t, y):
        v, features = model(x_t, t, y)
        kept.append(features)
        return v
    t = torch.rand(len(x))
    noise = torch.randn_like(x)
    loss = mg_loss(train_sit_mg, net, net, x, y, 1.5, t=t, noise=noise, null=torch.tensor([10]),
                                dropped=torch.rand(len(x)) < 0.1).mean()
    return loss + 0.5 * (kept[0] - 1).square().mean()  # the first pass is the one that learns


@pytest.mark.parametrize("step", [minrf_step, repa_step])
def test_loops_of_others(step):
    """With the network's own dropping turned off, 10 % of the labels are dropped; else 19 %."""
    torch.manual_seed(0)
    model = Foreign()
    x0 = torch.randn(500, 1, 4, 4)
    y = torch.randint(10, (500,))
    for drop, share in (0.1, 0.19), (0, 0.1):
        model.drop = drop
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        model.empty.clear()
        losses = []
        for _ in range(20):
            losses.append(step(model, x0, y))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert sum(model.empty) / 20 == pytest.approx(share, abs=0.013)  # four sigma of 10,000
        assert len(model.empty) == 20 and losses[-1] < losses[0]


def test_online_mg_is_gft():
    """GFT at beta = 2 - w, |beta s + (1 - beta) sg(u) - target|^2, has beta times the gradient."""
    b = batch()
    model = random_model().double()
    w = 1.6
    b = {key: x.double() if x.is_floating_point() else x for key, x in b.items()}
    b["dropped"][:] = False
    loss = mg_loss(train_sit_mg, model, model, w=w, **b).mean()
    mg = torch.autograd.grad(loss, model.parameters())
    x_t, target = corrupt("SiT", b)
    beta = 2 - w
    u = model(x_t, b["t"], torch.full((12,), 10)).detach()
    s = model(x_t, b["t"], b["y"])
    loss = (beta * s + (1 - beta) * u - target).square().mean()
    gft = torch.autograd.grad(loss, model.parameters())
    torch.testing.assert_close(gft, [beta * x for x in mg], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("w", [0.5, 1.1, 1.5, 1.8])
@pytest.mark.parametrize("teacher", ["ema", "online"])
def test_fixed_point_is_cfg_at_1_over_2_minus_w(w, teacher):
    """One free output for each label: what a network that can fit everything converges to.

    Trained to its target until nothing moves, out(c) is CFG's output at scale 1/(2-w).
    """
    x0, empty = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    b = {"x0": x0, "noise": torch.zeros_like(x0), "y": torch.tensor([0]), "t": torch.zeros(1),
         "dropped": torch.tensor([False]), "null": torch.tensor(1)}
    cond = -x0[0]  # what plain training converges to: noise - x0
    out = empty.repeat(2, 1, 1, 1).requires_grad_()
    average = empty.repeat(2, 1, 1, 1)

    def model(x, t, y):
        return out[y]

    def ema(x, t, y):
        return average[y]
    for _ in range(400):
        used = ema if teacher == "ema" else model
        loss = mg_loss(train_sit_mg, model, used, w=w, **b).sum() * cond.numel()
        grad, = torch.autograd.grad(loss, out)
        with torch.no_grad():
            out -= 0.25 * grad
            average.lerp_(out, 0.5)
    want = empty[0] + (cond - empty[0]) / (2 - w)
    torch.testing.assert_close(out[0], want, rtol=0, atol=1e-7)


# ---------------------------------------------------------------- samplers

MEAN = 0.7  # of x_0 below: all coordinates are normal and alike
STD = 0.5


def gaussian_velocity(x, t):
    """E[eps - x_0 | x_t = x], exact."""
    var = (1 - t) ** 2 * STD ** 2 + t ** 2
    return -MEAN + (t - (1 - t) * STD ** 2) / var * (x - (1 - t) * MEAN)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_the_ode_samplers(name, order):
    """The exact flow maps x to mean + std * x; the error falls as steps^-order."""
    x = torch.randn(500, 1, 1, 1)
    errors = []
    calls = []

    def net(x, t):
        calls.append(t)
        return gaussian_velocity(x, t)
    for steps in 16, 32, 64:
        x_0 = SAMPLERS[name](net, x, steps)
        errors.append((x_0 - (MEAN + STD * x)).abs().mean().item())
    assert len(calls) == 112 * order - 3 * (order - 1)  # Heun's last step is Euler's
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_euler_maruyama_against_its_moments():
    """The scheme is linear here: its mean and variance follow a recursion without samples."""
    mean = 0.0
    var = 1.0
    for t, t_next in itertools.pairwise([*np.linspace(1, 0.04, 20), 0.0]):
        var_t = (1 - t) ** 2 * STD ** 2 + t ** 2
        # v = -mean + slope d and score = -d / var_t, with d = x - (1-t) mean; g^2 = 2t
        slope = (t - (1 - t) * STD ** 2) / var_t + t / var_t
        mean += (-MEAN + slope * (mean - (1 - t) * MEAN)) * (t_next - t)
        noise = 2 * t * (t - t_next) if t_next > 0 else 0
        var = (1 + slope * (t_next - t)) ** 2 * var + noise
    torch.manual_seed(0)
    x_0 = SAMPLERS["euler-maruyama"](gaussian_velocity, torch.randn(200_000, 1, 1, 1), 20)
    assert x_0.mean() == pytest.approx(mean, abs=0.005)
    assert x_0.var() == pytest.approx(var, rel=0.015)


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 1000), ("ddpm", 8), ("ddim", 50)])
def test_dit_samplers_equal_diffusers(name, steps, monkeypatch):
    """Step by step with the same noise; with diffusers' tables in float64, as ours are."""
    import diffusers
    from diffusers.schedulers import scheduling_ddpm
    options = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
    if name == "ddpm":
        theirs = diffusers.DDPMScheduler(variance_type="learned_range",
                                         timestep_spacing="linspace", **options)
    else:
        theirs = diffusers.DDIMScheduler(timestep_spacing="trailing", **options)
    theirs.alphas = 1 - BETAS
    theirs.betas = BETAS
    theirs.alphas_cumprod = ALPHA_BARS
    theirs.one = theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    theirs.set_timesteps(steps)
    model = random_model("DiT-T/2", in_channels=4)
    nn.init.normal_(model.final_layer.linear.weight, std=0.01)  # variances about in [-1, 1]
    net = sample.guided(model, torch.tensor([1, 2, 10]))
    x = torch.randn(3, 4, 8, 8)
    noises = torch.randn(steps, 3, 4, 8, 8).double()
    draws = iter(noises)
    want = x.double()
    times = []
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(draws))
    for t in theirs.timesteps:
        out = net(want, int(t))
        want = theirs.step(out if name == "ddpm" else out[:, :4], t, want).prev_sample
    draws = iter(noises)
    got = SAMPLERS[name](lambda x, t: times.append(t) or net(x, t), x, steps, lambda: next(draws))
    assert times == theirs.timesteps.tolist()
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["SiT", "DiT"])
@pytest.mark.parametrize("w", [None, 1.7])
def test_cfg_acts_in_its_interval_on_all_channels_but_variances(kind, w):
    model = random_model(f"{kind}-T/2", in_channels=4, scale_aware=w is not None)
    rows = []
    x = torch.randn(3, 4, 8, 8).double()
    y = torch.tensor([1, 2, 3])
    empty = torch.full((3,), 10)
    net = sample.guided(model, y, cfg=3.0, interval=(0.3, 0.7), w=w)
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for noise_time in 0.2, 0.3, 0.7, 0.8:
        t = round(1000 * noise_time) if kind == "DiT" else noise_time
        got = net(x, t)
        inside = 0.3 <= noise_time <= 0.7
        assert rows.pop() == (6 if inside else 3) and got.dtype == torch.float64
        with torch.no_grad():
            t = torch.full((3,), t)
            cond = model(x.float(), t, y, *([w] if w else []))
            uncond = model(x.float(), t, empty, *([0.0] if w else []))
        want = cond.clone()
        if inside:
            want[:, :4] = uncond[:, :4] + 3 * (cond - uncond)[:, :4]               # Eq. 9
        torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-5)
    assert "scale-aware" in error(lambda: sample.guided(random_model(), y, w=2.0)(x, 0.5))
    t = torch.tensor([0.2, 0.5, 0.8]) * (1000 if kind == "DiT" else 1)  # a time for each sample
    mixed = net(x, t)
    for i in range(3):
        one = sample.guided(model, y[i:i + 1], cfg=3.0, interval=(0.3, 0.7), w=w, null=10)
        want = one(x[i:i + 1], t[i].item())
        torch.testing.assert_close(mixed[i:i + 1], want, rtol=1e-4, atol=1e-5)


def test_generate_rounds_and_refuses_what_is_not_finite():
    model = random_model()
    options = {"labels": torch.tensor([5]), "seeds": torch.tensor([3]), "steps": 4}
    x = np.random.Generator(np.random.Philox(key=3)).standard_normal((1, 1, 8, 8), np.float32)
    x_0 = SAMPLERS["euler"](sample.guided(model, options["labels"]), torch.from_numpy(x), 4)
    want = np.rint((x_0[0, 0].numpy() + 1) * 127.5).clip(0, 255)
    np.testing.assert_array_equal(generate(model, sampler="euler", **options)[0, ..., 0], want)
    model.final_layer.linear.bias.data[0] = torch.nan
    assert "not finite" in error(lambda: generate(model, **options))


# ---------------------------------------------------------------- sample.py

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("ckpt") / "ckpt.pt", random_model(), "SiT-T/2")


def draw(ckpt, out, *flags):
    sample.main([str(ckpt), "--steps", "2", "--out", str(out), *map(str, flags)])


def test_samples_are_the_same_for_1_2_and_4_processes(checkpoint, tmp_path):
    """And for any batch size, as each image has a seed of its own."""
    flags = "--num-samples", 22, "--batch", 4, "--class-labels", "random", "--seed", 3

    def drawn(world):
        out = tmp_path / f"{world}.npz"
        fork(lambda _: draw(checkpoint, out, *flags), world)
        return np.load(out)
    files = [drawn(world) for world in (1, 2, 4)]
    images = files[0]["arr_0"]
    labels = files[0]["labels"]
    assert images.shape == (22, 8, 8, 1) and images.dtype == np.uint8
    assert len(np.unique(images, axis=0)) == 22 and len(set(labels.tolist())) > 5
    model, _ = load_checkpoint(checkpoint)
    seeds = 3 * 2 ** 32 + torch.arange(22)
    want = generate(model, torch.from_numpy(labels), seeds, steps=2)
    assert np.abs(images.astype(int) - want.numpy()).max() <= 1
    for file in files[1:]:
        assert np.array_equal(file["arr_0"], images) and np.array_equal(file["labels"], labels)
    record = json.loads((tmp_path / "1.npz.json").read_text())
    assert record["class_labels"] == "random" and record["sampler"] == "euler-maruyama"
    assert len(os.listdir(tmp_path)) == 6


def test_interrupted_sampling_goes_on(checkpoint, tmp_path, monkeypatch):
    """With the same checkpoint and flags, but not with another in the same place."""
    own = tmp_path / "c.pt"
    flags = ["--num-samples", 20, "--batch", 4]
    calls = []
    real = generate
    shutil.copy(checkpoint, own)

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "generate", before(real, 3, interrupt))
    with pytest.raises(KeyboardInterrupt):
        draw(own, tmp_path / "a.npz", *flags)
    save_random(own, random_model(seed=5), "SiT-T/2")
    assert "weights_sha256" in error(lambda: draw(own, tmp_path / "a.npz", *flags))
    shutil.copy(checkpoint, own)
    assert "another seed" in error(lambda: draw(own, tmp_path / "a.npz", *flags, "--seed", 1))
    assert "another network_dtype" in error(
        lambda: draw(own, tmp_path / "a.npz", *flags, "--dtype", "bf16"))
    monkeypatch.setattr(sample, "generate", lambda *a, **k: calls.append(1) or real(*a, **k))
    draw(own, tmp_path / "a.npz", *flags)
    assert len(calls) == 3
    draw(own, tmp_path / "b.npz", *flags)
    assert np.array_equal(*(np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab"))


def test_a_grid_has_a_row_for_each_label(checkpoint, tmp_path):
    from PIL import Image
    (tmp_path / "g.json").write_text("mine")
    draw(checkpoint, tmp_path / "g.png", "--labels", "class 3", "7", "--num-samples", 6)
    picture = np.asarray(Image.open(tmp_path / "g.png"))
    assert picture.shape == (2 * 50, 3 * 50)  # 8 pixels six times, and a frame
    model, _ = load_checkpoint(checkpoint)
    images = generate(model, torch.tensor([3] * 3 + [7] * 3), torch.arange(6), steps=2)[..., 0]
    for i, (row, column) in enumerate(itertools.product(range(2), range(3))):
        tile = picture[50 * row + 1:50 * row + 49, 50 * column + 1:50 * column + 49]
        np.testing.assert_array_equal(tile[::6, ::6], images[i])
    assert (tmp_path / "g.json").read_text() == "mine"


def test_labels_are_names_first_then_numbers():
    """Without --labels they are the first by index, whatever the names are."""
    def chosen(classes, *flags):
        args = sample.parse_args(["x.pt", "--num-samples", "6", *flags])
        labels, rule, _ = sample.choose_labels(args, classes)
        assert rule == "list"
        return labels.tolist()
    assert chosen(["1", "2", "3"]) == [0, 0, 1, 1, 2, 2]
    assert chosen(["1", "2", "3"], "--labels", "1", "0") == [0, 0, 0, 0, 0, 0]
    decomposed = "Caf\u0065\u0301"
    assert chosen(["Tea", decomposed], "--labels", "Caf\u00e9", decomposed) == [1] * 6
    line = error(lambda: chosen(["cat", "dog"], "--labels", "cat,dog"))
    assert "(cat, dog)" in line and "put spaces between classes" in line


def test_balanced_labels_are_spread():
    assert sample.balanced(25, 10).bincount().tolist() == [3] * 5 + [2] * 5
    assert sample.balanced(4, 10).tolist() == [0, 2, 5, 7]


def test_sample_knows_how_a_checkpoint_was_trained(tmp_path, capsys):
    assert "--eval-steps 1001" in error(lambda: train("DiT", tmp_path, "--eval-steps", 1001))
    dit = save_random(tmp_path / "dit.pt", random_model("DiT-T/2"), "DiT-T/2", num_labels=3)
    for flags, says in ((["--sampler", "euler"], "takes ddpm or ddim"),
                        (["--steps", 1001], "--steps 1001"), (["--cfg", 2], "no empty class")):
        assert says in error(sample.main, dit, *flags)
    aware = random_model(scale_aware=True)
    aware = save_random(tmp_path / "aware.pt", aware, "SiT-T/2", w_range=[1.0, 3.0])
    for w, warned in (3.5, True), (2, False):
        draw(aware, tmp_path / "a.png", "--w", w)
        assert ("warning: --w" in capsys.readouterr().err) == warned
    for sampler, steps, warned in (("euler-maruyama", 4, True), ("euler-maruyama", 5, False),
                                   ("euler", 2, False), ("ddpm", 2, True), ("ddpm", 3, False)):
        path = dit if sampler == "ddpm" else aware
        draw(path, tmp_path / "a.png", "--sampler", sampler, "--steps", steps)
        assert ("or --sampler " in capsys.readouterr().err) == warned


# ---------------------------------------------------------------- checkpoints.py

class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['TORCH_HOME']}/evil",)


def test_bad_checkpoints(checkpoint, tmp_path):
    """One line that names the file; nothing in a pickle is run."""
    whole = torch.load(checkpoint, weights_only=True)
    lacking = {key: x for key, x in whole["ema"].items() if key != "blocks.2.mlp.fc1.bias"}
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:100_000])
    (tmp_path / "folder.pt").mkdir()
    for name, state in (("other", {"model": 1}), ("evil", {"ema": Evil()}), ("list", [1, 2]),
                        ("lacking", whole | {"ema": lacking}),
                        ("nano", {"config": {"n_layer": 3}, "model": {}}),
                        ("forged", whole | {"config": whole["config"] | {"input_size": "8"}}),
                        ("numbers", {0: torch.ones(2)})):
        torch.save(state, tmp_path / f"{name}.pt")
    for name, says in (("cut", "truncated"), ("none", "no such"), ("list", "not a checkpoint"),
                       ("other", "not a checkpoint"),
                       ("evil", f"never run ({os.system.__module__}.system)"),
                       ("lacking", "blocks.2.mlp.fc1.bias"),
                       ("folder", "neither the ckpt.pt of a run"), ("forged", "not a whole"),
                       ("nano", "lacks 'x_embedder.proj.weight'"),
                       ("numbers", "not a checkpoint")):
        with pytest.raises(UserError) as e:
            load_checkpoint(tmp_path / f"{name}.pt")
        assert says in str(e.value) and f"{name}.pt" in str(e.value)
    assert not Path(os.environ["TORCH_HOME"], "evil").exists()


def public_file(path, layout, args=None):
    """Random weights in a public layout -> what its own code computes from x, t, y."""
    model = random_model("DiT-T/8" if layout == "dit" else "SiT-T/8", 16, 4, 7,
                         scale_aware=layout == "scale-aware")
    state = {key.replace("w_emb", "s_emb"): x for key, x in model.state_dict().items()}
    if layout == "sit":
        double_channels(state)
    if layout == "ddp":
        state = {f"module._orig_mod.{key}": x for key, x in state.items()}
    if layout == "repa":
        state |= {"projectors.0.0.weight": torch.ones(3, 3)}
    if args:
        flags = args if path.name == "dict.pt" else argparse.Namespace(**args)
        state = {"model": state, "ema": state, "opt": {}, "args": flags}
    elif layout in ("repa", "mg", "ddp"):
        state = {"ema": state, "steps": 4}
    torch.save(state, path)
    return (lambda x, t, y: -model(x, 1 - t, y)) if layout in ("sit", "sit without variance") else (
        model)


@pytest.mark.parametrize(("layout", "name", "args"), [
    ("dit", "DiT-XL-2-512x512.pt", None), ("dit", "0400000.pt", {"model": "DiT-T/8"}),
    ("sit", "SiT-XL-2-256x256.pt", None), ("mg", "sit-mg.pt", None), ("repa", "last.pt", None),
    ("sit", "04.pt", {"model": "SiT-T/8", "path_type": "Linear", "prediction": "velocity"}),
    ("sit without variance", "04.pt",
     {"model": "SiT-T/8", "path_type": "Linear", "prediction": "velocity", "seed": np.int64(3),
      "lr": np.float32(1e-4), "out": Path("results")}),
    ("sit without variance", "dict.pt", {"path_type": "Linear", "prediction": "velocity"}),
    ("ddp", "last.pt", None),
    ("mg", "latest.pt", {"model": "SiT-T/8", "mgw": [1.45, 1.45], "mg_high": 0.75}),
    ("scale-aware", "latest.pt", {"model": "ScaleAware-SiT-T/8", "mgw": [1.0, 3.0]}),
    ("repa", "04.pt", {"model": "SiT-T/8", "path_type": "linear", "prediction": "v"})])
def test_public_files_mean_what_they_meant(layout, name, args, tmp_path):
    original = public_file(tmp_path / name, layout, args)
    model, config = load_checkpoint(tmp_path / name)
    assert (model.num_classes, model.input_size, model.in_channels) == (7, 16, 4)
    assert config["model"] == ("DiT-T/8" if layout == "dit" else "SiT-T/8")
    x = torch.randn(4, 4, 16, 16)
    y = torch.tensor([0, 3, 6, 7])
    t = torch.tensor([0.0, 0.3, 0.71, 1.0]) * (999 if layout == "dit" else 1)
    with torch.no_grad():
        got = model(x, t, y)
        want = original(x, t, y)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", ["path_type", "prediction", "name"])
def test_public_files_of_another_kind_are_refused(wrong, tmp_path):
    says = {"path_type": "path GVP", "prediction": "prediction GVP", "name": "exactly one of"}
    args = {"path_type": "Linear", "prediction": "v"} | {wrong: "GVP"}
    public_file(tmp_path / "04.pt", "sit", args)
    assert says[wrong] in error(lambda: load_checkpoint(tmp_path / "04.pt"))


def test_files_that_name_no_convention(tmp_path):
    """Weights alone: a SiT's could be SiT's or REPA's, and a DiT needs its variance channels."""
    state = random_model("SiT-T/8", 16, 4, 7).state_dict()
    for key in "model", "state_dict":
        torch.save({key: random_model("DiT-T/8", 16, 4, 7).state_dict()}, tmp_path / "DiT.pt")
        assert load_checkpoint(tmp_path / "DiT.pt")[1]["model"] == "DiT-T/8"
        torch.save({key: state}, tmp_path / "last.pt")
        assert "which way t runs" in error(lambda: load_checkpoint(tmp_path / "last.pt"))
    right = {"path_type": "Linear", "prediction": "velocity"}
    for args in ([right], {"transport": right}, {"model": "SiT-T/8"}, right | {"prediction": "v"},
                 right | {"path_type": "linear"}, argparse.Namespace(path_type="linear")):
        torch.save({"ema": state, "args": args}, tmp_path / "last.pt")
        assert "which way t runs" in error(lambda: load_checkpoint(tmp_path / "last.pt"))
    averaged = {f"module.{key}": x for key, x in state.items()} | {"n_averaged": torch.tensor(3)}
    torch.save({"ema": averaged, "config": {"lr": 1e-4}}, tmp_path / "last.pt")
    same(load_checkpoint(tmp_path / "last.pt")[0].state_dict(), state)
    torch.save({"ema": state}, tmp_path / "DiT.pt")
    assert "without variance" in error(lambda: load_checkpoint(tmp_path / "DiT.pt"))


def test_safetensors(tmp_path):
    """A public file's tensors, and ours, written and read, with its config."""
    from safetensors.torch import load_file, save_file
    public = random_model("DiT-T/8", 16, 4, 7)
    save_file(dict(public.state_dict()), tmp_path / "DiT-S-8.safetensors")
    model, config = load_checkpoint(tmp_path / "DiT-S-8.safetensors")
    assert config["model"] == "DiT-T/8"
    same(model.state_dict(), public.state_dict())
    ours = random_model(scale_aware=True)
    file = tmp_path / "mg.safetensors"
    argv = [str(save_random(tmp_path / "c.pt", ours, "SiT-T/2")), "--to-safetensors", str(file)]
    checkpoints.main(argv)
    written = load_file(file)
    same(sorted(written.items()), sorted(ours.state_dict().items()))
    model, config = load_checkpoint(file)
    same(model.state_dict(), ours.state_dict())
    assert config == load_checkpoint(tmp_path / "c.pt")[1] and config["classes"][3] == "class 3"
    assert "must be a new file" in error(checkpoints.main, *argv)
    assert "leave out --raw" in error(sample.main, file, "--raw")
    os.truncate(file, 5000)
    assert "mg.safetensors: truncated" in error(lambda: load_checkpoint(file))


def test_what_stands_in_the_way_of_a_file_is_named(tmp_path):
    sit = random_model("SiT-T/8", 16, 4, 7).state_dict()
    own = {"args": {"path_type": "Linear", "prediction": "velocity"}}
    t_input = "t_embedder.mlp.0.weight"
    for state, says in (({"ema": {"x_embedder.proj.weight": 3}}, "proj.weight is of type int"),
                        ({"ema": {"net.a": torch.ones(1), "net.b": torch.ones(1)}},
                         "lacks 'x_embedder.proj.weight', has net.a, net.b"),
                        ({"ema": {"x_embedder.proj.weight": torch.ones(2)}}, "another shape"),
                        (sit | {"x_embedder.proj.weight": torch.ones(64, 4, 0, 0)}, "by zero"),
                        (own | {"ema": sit | {t_input: torch.ones(64, 255)}}, "another shape"),
                        (own | {"ema": {key: x for key, x in sit.items() if key != t_input}},
                         f"lacks, or has in another shape, '{t_input}'")):
        torch.save(state, tmp_path / "x.pt")
        assert says in error(lambda: load_checkpoint(tmp_path / "x.pt"))


def test_names_on_the_hub(tmp_path, monkeypatch):
    """Downloaded: what is needed, and the older format only where there is no other."""
    import huggingface_hub
    original = random_model("DiT-T/2", 8, 4, 7)
    save_random(tmp_path / "c.pt", original, "DiT-T/2", vae=str(tmp_path / "vae"))
    tiny_vae(tmp_path)
    folder = tmp_path / "hub"
    checkpoints.main([str(tmp_path / "c.pt"), "--to-diffusers", str(folder)])
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, config = load_checkpoint("someone/DiT-T-2")
    same(model.state_dict(), original.state_dict())
    assert config["vae"] == str(folder / "vae")
    assert [name for name, _ in asked] == ["someone/DiT-T-2"]
    assert not any(".bin" in pattern for pattern in asked[0][1])
    # Weights as .bin: read as tensors alone, so that no code runs.
    from safetensors.torch import load_file
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    same(load_checkpoint("someone/DiT-T-2")[0].state_dict(), original.state_dict())
    assert asked[-1] == ("someone/DiT-T-2", ["transformer/*.bin"])
    torch.save({"pos_embed.proj.weight": Evil()}, file.with_suffix(".bin"))
    assert "not a folder of diffusers" in error(lambda: load_checkpoint(folder))
    assert not Path(os.environ["TORCH_HOME"], "evil").exists()

    def no_socks(*_, **__):
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_socks)
    assert "ImportError: Using SOCKS" in error(sample.main, "someone/DiT-T-2")
    monkeypatch.undo()
    line = error(sample.main, "someone/DiT-T-2")  # HF_HUB_OFFLINE
    assert "someone/DiT-T-2: no such file or folder here" in line and "give its folder" in line
    line = error(train_dit_mg.main, "--init", "someone/DiT-T-2", "--out", tmp_path / "out")
    assert "can't be had from the hub" in line
    for path in "out/ckpt.pt", "out/last.ckpt", "./DiT-T-2", "../DiT-T-2":
        assert "no such checkpoint" in error(sample.main, path)


def test_round_trip_through_diffusers(tmp_path):
    """A DiT -> a folder -> DiTPipeline, used as its README says: ddim's images; and back."""
    from diffusers import DiTPipeline
    from safetensors.torch import load_file, save_file
    vae = tiny_vae(tmp_path)
    ours = random_model("DiT-T/2", 8, 4, 10)
    folder = tmp_path / "folder"
    save_random(tmp_path / "c.pt", ours, "DiT-T/2", vae=str(tmp_path / "vae"))
    checkpoints.main([str(tmp_path / "c.pt"), "--to-diffusers", str(folder)])
    code = re.findall(r"^    (.*)", (folder / "README.md").read_text(), re.MULTILINE)
    assert len(code) == 4 and "guidance_scale=1" in code[3]
    scope = {"DiTPipeline": DiTPipeline}
    exec("\n".join([code[0].replace("folder", str(folder)), *code[1:3]]), scope)  # noqa: S102
    pipe = scope["pipe"]
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels["class 3"] == 3
    images = pipe([1, 2, 3], guidance_scale=1, num_inference_steps=20, output_type="np",
                  generator=torch.Generator().manual_seed(5)).images
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    x_0 = SAMPLERS["ddim"](sample.guided(ours, torch.tensor([1, 2, 3])), x, 20)
    want = (models.decode(vae, x_0) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - want).max() < 1e-4 and want.std() > 0.01
    back, config = load_checkpoint(folder)
    assert config["vae"] == str(folder / "vae") and config["classes"][3] == "class 3"
    same(back.state_dict(), ours.state_dict())
    assert "exists already" in error(checkpoints.main, tmp_path / "c.pt", "--to-diffusers", folder)
    pixels = save_random(tmp_path / "p.pt", random_model("DiT-T/2"), "DiT-T/2")
    assert "give --vae" in error(checkpoints.main, pixels, "--to-diffusers", tmp_path / "new")
    # a folder with a tensor missing, and one with another number of heads
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    settings = folder / "transformer" / "config.json"
    save_file({key: x for key, x in state.items() if key != "proj_out_2.bias"}, file)
    assert "incomplete, proj_out_2.bias" in error(lambda: load_checkpoint(folder))
    save_file(state, file)
    text = settings.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 8')
    settings.write_text(text.replace('"attention_head_dim": 16', '"attention_head_dim": 8'))
    assert "8 heads" in error(lambda: load_checkpoint(folder))


# ---------------------------------------------------------------- data.py

def image_folder(folder, count=7, classes=("class0", "class1")):
    """Folders of PNGs with random smooth content."""
    from PIL import Image
    rng = np.random.default_rng(0)
    for i in range(count):
        image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        image = image.resize((24, 20), Image.BICUBIC)
        save_image(folder / classes[i % len(classes)] / f"{i}.png", image)
    return folder


def prepare(folder, out, *flags):
    data.main([str(folder), "--size", "16", "--out", str(out), *map(str, flags)])
    return data.Data(out)


def test_read_image_is_adms_crop_of_any_mode(tmp_path):
    from PIL import Image
    x = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    image = Image.fromarray(x)
    image.save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(data.read_image(tmp_path / "rgb.png"), x)
    half = image.resize((45, 35), Image.BOX)  # as min(70, 90) is at least twice 32
    want = np.asarray(half.resize((round(45 * 32 / 35), 32), Image.BICUBIC))
    left = (want.shape[1] - 32) // 2
    got = data.read_image(tmp_path / "rgb.png", 32)
    np.testing.assert_array_equal(got, want[:, left:left + 32])
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    for pixels in grey, grey.astype(np.uint16) * 257:
        Image.fromarray(pixels).save(tmp_path / "grey.png")
        got = data.read_image(tmp_path / "grey.png")
        np.testing.assert_array_equal(got, np.stack([grey] * 3, 2))
    for mode in "RGBA", "LA", "P", "CMYK", "1":
        image.convert(mode).save(tmp_path / "a.tiff")
        assert data.read_image(tmp_path / "a.tiff", 16).shape == (16, 16, 3)
    (tmp_path / "broken.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:500])
    assert "broken.png: unreadable" in error(lambda: data.read_image(tmp_path / "broken.png"))


def png_of_16_bits(x, key=()):
    """A PNG of 16 bits, which PIL can't write: x (H, W, 1), 3, or 4 with alpha; key: no colour."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))
    header = struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 16, {1: 0, 3: 2, 4: 6}[x.shape[2]],
                         0, 0, 0)
    clear = chunk(b"tRNS", np.array(key, ">u2").tobytes()) if key else b""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in x)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + clear
            + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def test_images_that_other_programs_write(tmp_path, monkeypatch, capsys):
    """Upright, on white, scaled to 8 bits; never black without a word, nor slow for its shape."""
    from PIL import Image
    path = tmp_path / "a.png"

    def read(image, size=None, **options):
        image.save(path, **options)
        return data.read_image(path, size)
    x = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees, clockwise
    np.testing.assert_array_equal(read(Image.fromarray(x), exif=exif), np.rot90(x, -1))
    ways = [x, x[:, ::-1], x[::-1, ::-1], x[::-1], x.swapaxes(0, 1), np.rot90(x, -1),
            np.rot90(x, 2).swapaxes(0, 1), np.rot90(x)]
    for number, want in enumerate(ways, 1):
        exif[0x0112] = number
        np.testing.assert_array_equal(read(Image.fromarray(x), exif=exif), want)
        Image.fromarray(x).save(tmp_path / "turned.tiff", exif=exif)
        np.testing.assert_array_equal(data.read_image(tmp_path / "turned.tiff"), want)
    # A width beside it that is a text, as some cameras write it.
    tags = struct.pack(">2sHIHHHI4sHHI4sI", b"MM", 42, 8, 2, 0x0100, 2, 4, b"wide",
                       0x0112, 3, 1, b"\0\6\0\0", 0)
    np.testing.assert_array_equal(read(Image.fromarray(x), exif=tags), np.rot90(x, -1))
    ramp = np.arange(256).reshape(16, 16)
    want = np.stack([ramp] * 3, 2)
    twelve = np.rint(ramp * (4095 / 255)).astype(np.uint16)
    np.testing.assert_array_equal(read(Image.fromarray(twelve)), want)
    assert "without a value above 4095" in capsys.readouterr().err
    ten = (np.arange(1024) << 4).astype(np.uint16)[None]  # of 16 bits, if not all of them are used
    assert read(Image.fromarray(ten))[0, :, 0].max() == round(16368 / 257)
    for white in 1, 255, 65535:
        values = (ramp * (white / 255)).astype(np.float32)
        Image.fromarray(values).save(tmp_path / "float.tiff")
        np.testing.assert_array_equal(data.read_image(tmp_path / "float.tiff"), want)
    for x, says in ((values - 9, "values below 0"), (ramp / 200, "up to 1.275"),
                    (ramp << 12, "up to 1.04448e+06"), (values * 1e6, "white isn't known")):
        kind = np.float32 if x.dtype.kind == "f" else np.int32
        Image.fromarray(x.astype(kind)).save(tmp_path / "float.tiff")
        assert says in error(lambda: data.read_image(tmp_path / "float.tiff"))
    path.write_bytes(png_of_16_bits(want * 257))
    np.testing.assert_array_equal(data.read_image(path), want)
    path.write_bytes(png_of_16_bits(want * 16))
    assert "12 bits stored as 16" in error(lambda: data.read_image(path))
    black = np.zeros((1, 2, 4), int)
    black[0, 0, 3] = 65535
    path.write_bytes(png_of_16_bits(black))
    assert data.read_image(path)[0, :, 0].tolist() == [0, 255]
    path.write_bytes(png_of_16_bits(np.array([[[0], [514], [65535]]]), [514]))
    assert data.read_image(path)[0, :, 1].tolist() == [0, 255, 255]
    path.write_bytes(png_of_16_bits(np.array([[[257, 0, 0], [0, 514, 65535]]]), [257, 0, 0]))
    assert data.read_image(path)[0].tolist() == [[255, 255, 255], [0, 2, 255]]
    # A PGM says what its white is: 10,000 and 65,535; a TIFF may say that 0 is white.
    for white in b"10000", b"65535":
        (tmp_path / "a.pgm").write_bytes(b"P5 2 1 " + white + b"\n" + struct.pack(">HH", 0, 2000))
        want = round(2000 / int(white) * 255)
        assert data.read_image(tmp_path / "a.pgm")[0, :, 0].tolist() == [0, want]
    (tmp_path / "a.pgm").write_bytes(b"Pf\n2 1\n-1.0\n" + struct.pack("<ff", 0, 0.5))  # floats
    assert data.read_image(tmp_path / "a.pgm")[0, :, 0].tolist() == [0, 128]
    inverted = Image.fromarray(np.uint16([[0, 257, 65535]]))
    inverted.save(tmp_path / "inverted.tiff", tiffinfo={262: 0})
    assert data.read_image(tmp_path / "inverted.tiff")[0, :, 0].tolist() == [255, 254, 0]
    # Half transparent black is grey; what is hidden under alpha 0 is white.
    layers = np.zeros((1, 3, 4), np.uint8)
    layers[0, :, 3] = 255, 102, 0
    layers[0, 2, :3] = 200
    clear = Image.fromarray(layers)
    assert read(clear)[0, :, 0].tolist() == [0, 153, 255]
    assert read(clear.convert("LA"))[0, :, 0].tolist() == [0, 153, 255]
    grey = Image.fromarray(np.uint8([[0, 7]]))
    assert read(grey, transparency=7)[0, :, 1].tolist() == [0, 255]
    assert read(grey.convert("P"), transparency=7)[0, :, 1].tolist() == [0, 255]
    # A strip is cut before it is enlarged; a page of one bit is no bomb.
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *how: (
        sizes.append(size), resize(image, size, *how))[1])
    strip = np.zeros((1, 20000), np.uint8)
    strip[:, 9999:10001] = 255
    got = read(Image.fromarray(strip), 64)
    assert got[0, [0, 20, 43, 63], 0].tolist() == [255] * 4 and max(sizes) == (1024, 64)
    assert read(Image.new("1", (14000, 14000), 1), 8).min() == 255


def test_what_is_left_out_is_counted(tmp_path, capsys):
    """Other files and empty folders; the suffixes of JPEG and AVIF are images."""
    from PIL import Image
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "a").mkdir()
    (tmp_path / "none").mkdir()
    for name in "1.jfif", "2.jpe", "3.AVIF":
        image.save(tmp_path / "a" / name, format="AVIF" if "AVIF" in name else "JPEG")
    for name in "a/x.heic", "a/y.heic", "a/.hidden", "note.txt":
        (tmp_path / name).touch()
    paths, labels, classes, notes = data.class_folders(tmp_path)
    assert classes == ["a"] and labels == [0, 0, 0]
    assert [data.read_image(path).shape for path in paths] == [(4, 4, 3)] * 3
    assert "left out 3 files" in notes[0] and ".heic (2), .txt (1)" in notes[0]
    assert "1 folders without images: none" in notes[1]
    shutil.rmtree(tmp_path / "none")
    for path in paths:
        os.remove(path)
    assert ".heic (2)" in error(lambda: data.class_folders(tmp_path))


@pytest.mark.parametrize("vae", [False, True])
def test_damaged_images_are_left_out(vae, tmp_path, capsys):
    """Also those that go while data.py is interrupted; on any number of processes."""
    folder = image_folder(tmp_path / "images")
    if vae:
        tiny_vae(tmp_path)
    flags = "--vae", tmp_path / "vae" if vae else "none", "--batch", 2
    whole = prepare(folder, tmp_path / "whole", *flags)

    def killed(_):
        os.pwrite = before(os.pwrite, 5, lambda *_: kill())
        prepare(folder, tmp_path / "out", *flags)
    fork(killed, status=-signal.SIGKILL)
    (folder / "class1" / "3.png").write_bytes(b"cut")
    (folder / "class0" / "6.png").unlink()
    capsys.readouterr()
    got = prepare(folder, tmp_path / "out", *flags)
    text = capsys.readouterr().out
    assert "left out 2 of 7" in text and "class0/6.png, class1/3.png" in text
    assert got.classes == whole.classes and got.identity == whole.identity
    bad = [got.files.index("class0/6.png"), got.files.index("class1/3.png")]
    assert json.loads((tmp_path / "out" / "data.json").read_text())["bad"] == bad
    good = np.delete(np.arange(7), bad)
    assert len(got) == 5 and got.index(0, 0, 5).sort().values.tolist() == [*range(5)]
    x, y = got.get(np.arange(5))
    want, labels = whole.get(good)
    assert torch.equal(x, want) and torch.equal(y, labels)
    images = fid.Images(tmp_path / "out", real=True, size=16)  # pixels, or the originals
    assert images.count == 5
    _, pixels = next(images.batches(5))
    read = [data.read_image(folder / whole.files[row], 16) for row in good]
    assert sorted(x.numpy().tobytes() for x in pixels.permute(0, 2, 3, 1)) == sorted(
        x.tobytes() for x in read)
    assert (tmp_path / "out" / "preview.png").exists() is not vae
    fork(lambda _: prepare(folder, tmp_path / "two", *flags, "--batch", 3), 2)
    two = data.Data(tmp_path / "two")  # of what is in the folder now
    assert two.files == [file for file in whole.files if file != "class0/6.png"]
    assert torch.equal(two.get(np.arange(5))[0], want)
    # Mended it may be, as it was never read; another image must not become another.
    shutil.copy(folder / "class1" / "5.png", folder / "class1" / "3.png")
    again = prepare(folder, tmp_path / "out", *flags)
    assert again.identity == got.identity and len(again) == 5
    (folder / "class1" / "5.png").write_bytes(b"another")
    assert "such as class1/5.png" in error(
        data.main, folder, "--size", 16, "--out", tmp_path / "out", *flags)
    folder.rename(tmp_path / "moved")
    assert "no such folder" in error(data.main, folder, "--size", 16, "--out", tmp_path / "out")


def test_another_folder_with_the_same_names_is_other_data(tmp_path):
    """A folder that has moved is not; a run's data stay where they were."""
    from PIL import Image
    folder = image_folder(tmp_path / "images")
    out = tmp_path / "out"
    first = prepare(folder, out, "--vae", "none")
    moved = shutil.move(folder, tmp_path / "moved")
    assert prepare(moved, out, "--vae", "none").source == str(tmp_path / "moved")
    other = shutil.copytree(moved, tmp_path / "other")
    for path in other.rglob("*.png"):
        Image.new("RGB", (24, 20), "red").save(path)
    assert "not those that" in error(data.main, other, "--size", 16, "--vae", "none", "--out", out)
    assert data.Data(out).source == str(tmp_path / "moved")
    assert prepare(other, tmp_path / "new", "--vae", "none").identity != first.identity


def test_what_passes_is_no_damage(tmp_path, monkeypatch):
    """A class's folder that is gone, a disk's error: the same command goes on, without losses."""
    from PIL import Image
    folder = image_folder(tmp_path / "images")
    out = folder / "out"  # in FOLDER, yet no class

    def fail(cause):
        def open_(*_):
            raise cause
        return open_
    for cause, says in ((OSError(errno.EIO, "Input/output error"), "Input/output error"),
                        (MemoryError(), "can't be read")):
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", fail(cause))
            line = error(data.main, folder, "--size", 16, "--vae", "none", "--out", out)
        assert says in line and "run the same command again" in line
    (folder / "class1").rename(tmp_path / "class1")
    assert "class1/1.png: can't be read" in error(
        data.main, folder, "--size", 16, "--vae", "none", "--out", out)
    (tmp_path / "class1").rename(folder / "class1")
    for _ in range(2):
        assert len(prepare(folder, out, "--vae", "none")) == 7
    assert "left out" not in str(data.class_folders(folder)[3])


def test_classes_of_numbers_are_sorted_as_numbers(tmp_path):
    for name in [*map(str, range(12)), "007"]:
        save_image(tmp_path / name / "a.png", np.zeros((4, 4, 3), np.uint8))
    paths, labels, classes, _ = data.class_folders(tmp_path)
    assert classes == [*map(str, range(7)), "007", *map(str, range(7, 12))]
    assert labels == [*range(13)] and Path(paths[12]).parent.name == "11"
    save_image(tmp_path / "1b" / "a.png", np.zeros((4, 4, 3), np.uint8))
    assert data.class_folders(tmp_path)[2][:4] == ["0", "007", "1", "10"]


def test_a_folder_called_digits(tmp_path, monkeypatch):
    """It is never taken for scikit-learn's scans, nor they for it."""
    monkeypatch.chdir(tmp_path)
    folder = image_folder(tmp_path / "images")
    flags = "--size", 16, "--vae", "none", "--out"
    assert "--out digits" in error(data.main, folder, *flags, "digits")
    assert len(prepare(folder, "./digits", "--vae", "none")) == 7
    assert "give ./digits" in error(lambda: data.Data("digits"))
    assert len(data.Data("./digits")) == 7


def test_links_in_image_folders(tmp_path):
    """A linked class folder counts; links that lead back up, or to each other, end."""
    folder = image_folder(tmp_path / "images")
    elsewhere = image_folder(tmp_path / "other", 3)
    for link, target in (("class2", elsewhere / "class0"), ("class0/up", "../.."),
                         ("class1/self", "."), ("class2/top", folder), ("class2/above", elsewhere)):
        (folder / link).symlink_to(target)
    (folder / "empty").mkdir()
    (folder / ".hidden").mkdir()
    paths, labels, classes, _ = data.class_folders(folder)
    assert classes == ["class0", "class1", "class2"] and np.bincount(labels).tolist() == [4, 3, 2]
    assert len(set(paths)) == 9 and paths == sorted(paths)


def test_prepared_latents_are_what_encode_gives(tmp_path):
    """On 1 and 2 processes, in batches of any size, and interrupted by kill -9, to the bit."""
    folder = image_folder(tmp_path / "images")
    vae = tiny_vae(tmp_path)
    flags = "--vae", tmp_path / "vae", "--batch", 2
    latents = prepare(folder, tmp_path / "out", *flags)
    assert latents.shape == (4, 8, 8) and latents.vae == str(tmp_path / "vae")
    x = torch.from_numpy(data.read_image(folder / "class1" / "3.png", 16)).permute(2, 0, 1)[None]
    posterior = torch.randn(2, 4, 8, 8)
    index = torch.tensor([5, 5])
    got, _ = latents.get(index, torch.tensor([False, True]), posterior)
    for i, view in enumerate([x, x.flip(-1)]):
        mean, std = models.encode(vae, view / 127.5 - 1)
        torch.testing.assert_close(got[i], (mean + std * posterior[i])[0], rtol=2e-3, atol=2e-3)
    mean, _ = models.encode(vae, x / 127.5 - 1)
    torch.testing.assert_close(latents.get(index)[0][:1], mean, rtol=2e-3, atol=2e-3)

    def killed(_):
        models.encode = before(models.encode, 6, lambda *_: kill())
        prepare(folder, tmp_path / "killed", *flags)
    fork(killed, status=-signal.SIGKILL)
    assert "not complete" in error(lambda: data.Data(tmp_path / "killed"))
    prepare(folder, tmp_path / "killed", *flags)

    def killed_early(number):
        def dying(_):
            os.replace = before(os.replace, number, lambda *_: kill())
            prepare(folder, tmp_path / f"early{number}", *flags)
        fork(dying, status=-signal.SIGKILL)
        prepare(folder, tmp_path / f"early{number}", *flags)
    for number in 1, 2, 3:
        killed_early(number)
    fork(lambda _: prepare(folder, tmp_path / "two", *flags[:2]), 2)
    for name in "killed", "early1", "early2", "early3", "two":
        assert sorted(os.listdir(tmp_path / name)) == [runtime.LOCK, "data.json", "x.npy"]
        for file in "data.json", "x.npy":
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_data_refuses(tmp_path, capsys):
    folder = image_folder(tmp_path / "images")
    out = tmp_path / "out"
    tiny_vae(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()

    def refused(folder=folder, size=16, vae="none", out=out, more=()):
        return error(data.main, folder, "--size", size, "--vae", vae, "--out", out, *more)
    assert "no such folder" in refused(tmp_path / "x")
    assert "give the folder above the classes" in refused(folder / "class0")
    assert "multiple of 4, the smallest patch in the VAE's" in refused(
        size=14, vae=tmp_path / "vae")
    assert "multiple of 2, the smallest patch" in refused(size=33)
    assert "has other files" in refused(out=tmp_path / "full")
    with runtime.locked(out):
        assert "another process is writing" in refused()
    for _ in range(2):  # the second time it is complete
        prepare(folder, out, "--vae", "none")
    assert "class0 (" in capsys.readouterr().out
    assert "another shape" in refused(size=8)
    assert "another flip" in refused(more=["--no-flip"])
    # A folder of an earlier edition can be used, not gone on with.
    info = json.loads((out / "data.json").read_text())
    old = {key: x for key, x in info.items() if key != "files"} | {"images_sha256": "old"}
    (out / "data.json").write_text(json.dumps(old))
    assert prepare(folder, out, "--vae", "none").identity[0] == "old"
    assert "another flip" in refused(more=["--no-flip"])
    (out / "progress").touch()
    assert "begun by an earlier edition" in refused()
    (out / "progress").unlink()
    (out / "data.json").write_text(json.dumps(info | {"bad": [*range(7)]}))
    assert "none of its images" in refused()
    (out / "data.json").write_text(json.dumps(info))
    shutil.copy(folder / "class0" / "2.png", folder / "class0" / "new.png")
    assert "such as class0/new.png; give another --out" in refused()
    assert "neither digits nor prepared" in error(lambda: data.Data(folder))
    os.truncate(out / "x.npy", 300)
    assert "x.npy is missing or damaged" in error(lambda: data.Data(out))
    (folder / "class0" / "new.png").unlink()
    (out / "x.npy").unlink()
    assert "x.npy is gone" in refused()  # what it keeps beside it would be of other rows
    (out / "data.json").write_text("[1]")
    assert "data.json is damaged" in error(lambda: data.Data(out))


@pytest.mark.parametrize("vae", [False, True])
def test_only_the_rows_of_a_batch_are_read_ahead(vae, tmp_path):
    """Of latents the view that is drawn, of pixels all of the image."""
    folder = image_folder(tmp_path / "images")
    tiny_vae(tmp_path)
    prepared = prepare(folder, tmp_path / "out", "--vae", tmp_path / "vae" if vae else "none")
    index = np.array([6, 0, 3])
    flip = np.array([True, False, True])
    whole = np.array(prepared.images)
    want = whole[index, flip.astype(int)] if vae else whole[index]
    asked = mock.Mock()
    prepared.images._mmap = asked
    got = prepared.read(index, flip.astype(int)) if vae else prepared.read(index)
    np.testing.assert_array_equal(got, want)
    prepared.get(index, flip)
    file = (tmp_path / "out" / "x.npy").read_bytes()
    assert asked.madvise.call_count == 6
    for (advice, start, length), row in zip(
            [call.args for call in asked.madvise.call_args_list], [*want, *want], strict=True):
        assert advice == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
        assert row.tobytes() in file[start:start + length]
        assert length < row.nbytes + mmap.PAGESIZE


def test_each_image_once_an_epoch():
    from sklearn.datasets import load_digits
    digits = data.Data("digits")
    n = 1797
    index = torch.cat([digits.index(0, step, 100) for step in range(40)])
    for epoch in 0, 1:
        assert index[epoch * n:(epoch + 1) * n].sort().values.tolist() == list(range(n))
    assert not torch.equal(index[:n], index[n:2 * n])
    assert torch.equal(digits.index(0, 0, 4000), index[:4000])
    assert not torch.equal(digits.index(1, 0, 100), index[:100])
    x, y = digits.get(index[:5], torch.ones(5, dtype=bool), torch.randn(5, 1, 8, 8))
    scans = load_digits()
    want = np.rint(scans.images[index[:5]] * 255 / 16) / 127.5 - 1
    np.testing.assert_allclose(x[:, 0], want, atol=1e-6)  # neither mirrored nor noisy
    assert y.tolist() == scans.target[index[:5]].tolist()


# ---------------------------------------------------------------- the train scripts

FEW = ["--batch", 8, "--log-every", 3, "--save-every", 4, "--eval-samples", 0, "--eval-steps", 2]


def load(out):
    """A run's checkpoint, without what depends on the clock."""
    state = torch.load(out / "ckpt.pt", weights_only=True)
    for row in state["log"]:
        del row["images_per_s"]
    return state

HERE = Path(__file__).parent
SCRIPTS = {"SiT": train_sit_mg, "DiT": train_dit_mg}


def train(kind, out, *flags):
    """A run of a train script in this process -> its checkpoint."""
    SCRIPTS[kind].main([str(a) for a in (*FEW, *flags, "--out", out)])
    return load(out)


def same(a, b, rtol=0.0, atol=0.0):
    """Two checkpoints, or parts of them, are equal, numbers within these tolerances."""
    a, tree = tree_flatten(a)
    b, other = tree_flatten(b)
    assert tree == other
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor | float):
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol)
        else:
            assert x == y


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of nine steps that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    fork(lambda _: train("SiT", out, "--steps", 9))
    return load(out)


def test_the_scripts_are_equal_between_their_fences():
    parts = {}
    for kind, script in SCRIPTS.items():
        text = Path(script.__file__).read_text()
        names = re.findall(r"^ *# =+ (.*)", text, re.MULTILINE)
        both = "the same in train_dit_mg.py and train_sit_mg.py"
        assert names == [both, f"{kind}'s own"] * 3 + [both]
        parts[kind] = re.split(r"^ *# =+ .*", text, flags=re.MULTILINE)[1::2]
    assert parts["SiT"] == parts["DiT"]


MODES = [("SiT", []), ("DiT", []), ("SiT", ["--w-range", 1, 3]), ("DiT", ["--w-range", 1, 3]),
         ("SiT", ["--num-labels", 3]), ("DiT", ["--num-labels", 3, "--clip", 0.5]),
         ("SiT", ["--teacher", "online", "--t-max", 0.3, "--start-step", 5]),
         ("DiT", ["--teacher", "online", "--guide-share", 0.25, "--accum", 2]),
         ("SiT", ["--w", "auto", "--eval-every", 5, "--eval-samples", 8])]


@pytest.mark.parametrize(("kind", "flags"), MODES)
def test_resuming_is_exact(kind, flags, tmp_path):
    """To the bit: weights, average, optimizer, log; stopped at step 7, which nothing else marks."""
    flags = [*flags, "--steps", 14]
    a = tmp_path / "a"
    b = tmp_path / "b"
    run = train(kind, a, *flags)

    def stopped(_):
        script = SCRIPTS[kind]
        number = 14 if "--accum" in flags else 7
        script.mg_loss = before(script.mg_loss, number, lambda *_: kill(signal.SIGTERM))
        train(kind, b, *flags)
    words = fork(stopped, status=128 + signal.SIGTERM)
    assert "step 7 is saved" in words and load(b)["step"] == 7
    same(train(kind, b, *flags), run)
    with open(b / "log.csv") as f:
        steps = [int(row["step"]) for row in csv.DictReader(f)]
    assert steps == [row["step"] for row in run["log"]]
    assert set(os.listdir(b)) == {"ckpt.pt", "ckpt-prev.pt", "log.csv", "curves.png", "samples.npz",
                                  "samples.npz.json", "samples.png", runtime.LOCK}


@pytest.mark.parametrize(("moment", "number"), [("save", 1), ("save", 2), ("replace", 2),
                                                ("replace", 6), ("replace", 7), ("replace", 13)])
def test_kill_9_while_saving(moment, number, whole, tmp_path):
    """With half of a checkpoint written, or before a file gets its name."""
    def half(state, f):
        save(state, f)
        f.truncate(f.tell() // 2)
        kill()

    def dying(_):
        if moment == "save":
            torch.save = before(save, number, half)
        else:
            os.replace = before(os.replace, number, lambda *_: kill())
        train("SiT", tmp_path, "--steps", 9)
    save = torch.save
    fork(dying, status=-signal.SIGKILL)
    same(train("SiT", tmp_path, "--steps", 9), whole)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_or_a_broken_file_leaves_the_checkpoint_before(whole, tmp_path, capsys):
    import resource

    def fill_up(*_):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20))

    def limited(_):
        checkpoints.save_checkpoint = before(checkpoints.save_checkpoint, 2, fill_up)
        train("SiT", tmp_path, "--steps", 9)
    words = fork(lambda _: runtime.run(lambda: limited(0)), status=2)
    assert words.endswith(f"error: {tmp_path}/ckpt.pt: can't be written: File too large\n")
    assert load(tmp_path)["step"] == 4
    same(train("SiT", tmp_path, "--steps", 9), whole)
    os.truncate(tmp_path / "ckpt.pt", 1000)
    same(train("SiT", tmp_path, "--steps", 9), whole)
    assert "truncated" in capsys.readouterr().out

    def killed(number):  # while the broken one is replaced
        def dying(_):
            os.replace = before(os.replace, number, lambda *_: kill())
            train("SiT", tmp_path, "--steps", 9)
        os.truncate(tmp_path / "ckpt.pt", 1000)
        fork(dying, status=-signal.SIGKILL)
        same(train("SiT", tmp_path, "--steps", 9), whole)
    for number in 1, 2:
        killed(number)
    for name in "ckpt.pt", "ckpt-prev.pt":
        os.truncate(tmp_path / name, 1000)
    line = error(lambda: train("SiT", tmp_path, "--steps", 9))
    assert "ckpt.pt: truncated" in line and "ckpt-prev.pt: truncated" in line


@pytest.mark.parametrize(("kind", "flags"), [
    ("SiT", ["--t-max", 0.1]), ("DiT", ["--w-range", 1, 3]), ("SiT", ["--num-labels", 4])])
def test_processes_and_accumulation_change_rounding_alone(kind, flags, tmp_path):
    """With t_max 0.1 some ranks have nothing to guide."""
    flags = [*flags, "--steps", 6, "--save-every", 0]
    run = train(kind, tmp_path / "1", *flags)
    for accum in 2, 4:
        same(train(kind, tmp_path / f"a{accum}", *flags, "--accum", accum), run, 1e-4, 1e-4)

    def shared(world):
        fork(lambda _: train(kind, tmp_path / f"p{world}", *flags), world)
        return load(tmp_path / f"p{world}")
    for world in 2, 4:
        same(shared(world), run, 1e-4, 1e-4)


def test_under_torchrun(tmp_path):
    """Two processes, two --accum: a run with its evaluation is the run of one process."""
    flags = [*FEW, "--steps", 4, "--save-every", 2, "--eval-samples", 8, "--accum", 2]
    run = train("DiT", tmp_path / "a", *flags)
    assert run["log"][-1].keys() >= {"fd", "accuracy", "precision", "recall"}
    code, words = shell("train_dit_mg.py", *flags, "--out", tmp_path / "b", processes=2)
    assert code == 0 and "Traceback" not in words and "Warning" not in words, words
    same(load(tmp_path / "b"), run, 1e-4, 1e-4)


def test_a_signal_to_one_process_saves_all(tmp_path):
    """The others end after the one that saves: torchrun would kill it 30 s after them."""
    def slow(*_):
        time.sleep(1)

    def signalled(rank):
        checkpoints.save_checkpoint = before(checkpoints.save_checkpoint, 1, slow)
        if rank == 1:
            train_sit_mg.mg_loss = before(train_sit_mg.mg_loss, 3, lambda *_: kill(signal.SIGINT))
        try:
            train("SiT", tmp_path, "--steps", 20)
        finally:
            assert load(tmp_path)["step"] == 3
    words = fork(signalled, 2, status=128 + signal.SIGINT)
    assert words.count("step 3 is saved") == 1


def test_a_step_that_a_signal_saved_can_become_the_last(tmp_path):
    def stopped(_):
        train_sit_mg.mg_loss = before(train_sit_mg.mg_loss, 2, lambda *_: kill(signal.SIGTERM))
        train("SiT", tmp_path)
    fork(stopped, status=128 + signal.SIGTERM)
    assert not load(tmp_path)["log"]
    (tmp_path / "samples.png").touch()  # of an evaluation before
    log = train("SiT", tmp_path, "--steps", 2)["log"]
    assert [row["step"] for row in log] == [2] and log[0]["loss"] > 0
    assert "\n2,1." in (tmp_path / "log.csv").read_text()
    assert ",,1.5" in (tmp_path / "log.csv").read_text()  # no images/s without a step
    assert (tmp_path / "samples.png").stat().st_size > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_ends(number, tmp_path):
    """Also with --save-every 0, and twice at once."""
    def twice(*_):
        kill(number)
        kill(number)  # torchrun passes a Ctrl-C on, which the process may have had already

    def signalled(_):
        train_sit_mg.mg_loss = before(train_sit_mg.mg_loss, 3, twice)
        train("SiT", tmp_path, "--save-every", 0)
    words = fork(signalled, status=128 + number)
    assert "step 3 is saved" in words and load(tmp_path)["step"] == 3


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As nohup does."""
    def started_by_nohup(_):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        train_sit_mg.mg_loss = before(train_sit_mg.mg_loss, 3, lambda *_: kill(signal.SIGHUP))
        train("SiT", tmp_path, "--steps", 5)
    fork(started_by_nohup)
    assert load(tmp_path)["step"] == 5


@pytest.mark.parametrize(("samples", "save_every"), [(0, 4), (8, 4), (8, 0)])
def test_a_signal_in_an_evaluation_ends_at_once(samples, save_every, tmp_path, monkeypatch):
    """A later run makes up for it; an evaluation that was made is not made again."""
    flags = ["--eval-samples", samples, "--save-every", save_every, "--eval-every", 3]
    evaluate = train_sit_mg.evaluate

    def signalled(_):
        train_sit_mg.evaluate = lambda *_, **__: kill(signal.SIGTERM)
        runtime.run(lambda: train("SiT", tmp_path, *flags, "--steps", 4))
    assert "interrupted; run the same command to resume" in fork(signalled, status=130)
    assert load(tmp_path)["step"] == 3 and load(tmp_path)["scored"] == 0
    scored = []
    monkeypatch.setattr(train_sit_mg, "evaluate",
                        lambda *args: scored.append(args[5]) or evaluate(*args))
    run = train("SiT", tmp_path, *flags, "--steps", 4)
    assert scored == [3, 4] and run["scored"] == 4
    assert ["fd" in row for row in run["log"]] == [samples > 0] * 2
    same(train("SiT", tmp_path, *flags, "--steps", 4), run)
    assert scored == [3, 4]


def test_a_signal_before_an_evaluation_prevents_it(tmp_path):
    """It comes while the checkpoint is written."""
    def signalled(_):
        train_sit_mg.evaluate = lambda *_, **__: os._exit(9)
        checkpoints.save_checkpoint = before(checkpoints.save_checkpoint, 1,
                                             lambda *_: kill(signal.SIGTERM))
        runtime.run(lambda: train("SiT", tmp_path, "--steps", 3))
    fork(signalled, status=130)
    assert load(tmp_path)["step"] == 3 and load(tmp_path)["scored"] == 0


def test_a_run_that_was_not_scored_can_be(tmp_path):
    assert "fd" not in train("SiT", tmp_path, "--steps", 3)["log"][-1]
    assert train("SiT", tmp_path, "--steps", 3, "--eval-samples", 8)["log"][-1]["fd"] > 0


def test_main_in_a_notebook(tmp_path, whole):
    """Twice in one process and in a thread, to the bit; Ctrl-C then works as before the calls."""
    def mine(*_):
        raise KeyError
    earlier = signal.signal(signal.SIGINT, mine)
    thread = threading.Thread(target=train, args=("SiT", tmp_path / "a", "--steps", 9))
    thread.start()
    thread.join()
    same(load(tmp_path / "a"), whole)
    for name in "b", "c":
        same(train("SiT", tmp_path / name, "--steps", 9), whole)
    assert signal.getsignal(signal.SIGINT) is mine
    signal.signal(signal.SIGINT, earlier)
    assert all(signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGTERM,
                                                                         signal.SIGUSR1))


def test_without_a_terminal_lines_are_printed(tmp_path, capsys):
    train("SiT", tmp_path, "--steps", 30, "--log-every", 10, "--save-every", 0)
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("step")] == [
        "step 10 of 30", "step 20 of 30", "step 30 of 30"]
    assert err == "" and "\r" not in out


def test_waiting_for_others_says_for_whom(monkeypatch):
    """A stale RANK in the environment."""
    def lonely(_):
        os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": "0"}
        threading.Timer = lambda _, act, *args: timer(0.1, act, *args)
        signal.alarm(2)
        runtime.setup()
    timer = threading.Timer
    words = fork(lonely, status=-signal.SIGALRM)
    assert "waiting for the other processes (RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1" in words
    monkeypatch.setenv("RANK", "0")
    for key in "WORLD_SIZE", "MASTER_ADDR":
        monkeypatch.delenv(key, raising=False)
    assert "WORLD_SIZE expected" in error(runtime.setup)


def test_an_interface_that_is_not_there(monkeypatch):
    """gloo's message names neither the variable nor the address."""
    def alone(_):
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "nope"}
        assert "MASTER_ADDR=127.0.0.1" in error(runtime.setup)
        line = error(runtime.setup)
        assert "GLOO_SOCKET_IFNAME=nope" in line and "this machine has lo" in line
    fork(alone)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    def spoil(net, *_):
        nn.init.constant_(net.x_embedder.proj.bias, torch.nan)
    monkeypatch.setattr(train_sit_mg, "mg_loss", before(train_sit_mg.mg_loss, 6, spoil))
    assert "not finite at step 6" in error(lambda: train("SiT", tmp_path, "--steps", 12))
    assert load(tmp_path)["step"] == 4
    with open(tmp_path / "log.csv") as f:
        assert [row["step"] for row in csv.DictReader(f)] == ["3", "4"]


@pytest.mark.parametrize("flag", ["--dtype=bf16", "--recompute", "--compile"])
def test_ways_to_be_faster_or_smaller(flag, tmp_path, monkeypatch):
    """The same losses. Three graphs serve all blocks, the teacher, and any number of samples."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend=backend))
    torch._dynamo.reset()
    flags = ["--steps", 6, "--eval-samples", 8]
    plain = train("SiT", tmp_path / "a", *flags)
    fast = train("SiT", tmp_path / "b", *flags, flag)
    assert 2 <= len(graphs) <= 3 if flag == "--compile" else not graphs
    for row, other in zip(plain["log"], fast["log"], strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=0.02 if "bf16" in flag else 1e-6)
    assert fast["model"].keys() == plain["model"].keys()
    assert all(x.dtype == torch.float32 for x in fast["model"].values())


@pytest.mark.parametrize(("rule", "score", "plain", "with_cfg", "want"), [
    ("auto", "fd", [5, 4, 5, 1], [4, 5, 4, 1], [1.0, 1.09, 1.081, 1.1629]),
    ("auto", "fid", [5, 4, 5, 1], [4, 5, 4, 1], [1.0, 1.09, 1.081, 1.1629]),
    ("auto-paper", "fd", [5, 4, 6, 1], [], [1.0, 1.0, 1.0, 1.09])])
def test_automatic_w(rule, score, plain, with_cfg, want, tmp_path, monkeypatch):
    """Sec. 3.3: a moving average towards 1.9 or 1, by scores that are given here."""
    plain = iter(plain)
    with_cfg = iter(with_cfg)
    monkeypatch.setattr(train_sit_mg, "evaluate",
                        lambda *_, cfg=1.0: {score: next(plain if cfg == 1 else with_cfg)})
    curves = []
    monkeypatch.setattr(checkpoints, "save_curves",
                        lambda rows, _: curves.append(rows[-1]["step"]))
    run = train("SiT", tmp_path, "--w", rule, "--eval-samples", 8, "--eval-every", 2, "--steps", 8)
    assert curves == [2, 4, 6, 8]
    assert [row["w"] for row in run["log"] if score in row] == pytest.approx(want)


def test_init(tmp_path, capsys):
    """The weights and their average; w ramps up; classes that are new start anew."""
    def initialized(out, model, *flags, drop=0.1):
        """From this network's checkpoint a step that is too small to matter."""
        source = save_random(tmp_path / "c.pt", model, f"{model.kind}-T/2", drop=drop)
        flags = "--init", source, "--steps", 1, "--lr", 1e-12, *flags
        return train("SiT", tmp_path / out, *flags), capsys.readouterr().out
    model = random_model()
    five = random_model(num_classes=5)
    key = "blocks.0.attn.qkv.weight"
    run, said = initialized("a", model)
    for name in "model", "ema":
        same(run[name], model.state_dict(), atol=1e-6)
    assert "empty class" not in said
    flags = "--log-every", 1, "--lr", 1e-12
    run, _ = initialized("ramp", model, "--steps", 8, *flags)
    w = [1.25, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]  # risen after a quarter of the steps
    assert [row["w"] for row in run["log"]] == w and run["ramp"] == 2
    assert train("SiT", tmp_path / "ramp", "--steps", 12, *flags)["ramp"] == 2
    (tmp_path / "c.pt").unlink()  # a run that goes on needs it no more
    again = "--init", tmp_path / "c.pt", "--steps", 16, *flags
    assert train("SiT", tmp_path / "ramp", *again)["ramp"] == 2
    run, said = initialized("b", five)
    same(run["model"][key], five.state_dict()[key], atol=1e-6)
    assert "has 5 of 10 classes, by number\nnew classes: 5, 6, 7, 8, 9" in said
    table = "y_embedder.embedding_table.weight"
    same(run["model"][table][[0, 1, 2, 3, 4, -1]], five.state_dict()[table], atol=1e-6)
    initialized("c", model, "--w-range", 1, 2)
    assert "without an empty class" in initialized("d", model, drop=0.0)[1]
    assert "is a DiT-T/2" in error(lambda: initialized("e", random_model("DiT-T/2")))
    line = error(lambda: initialized("e", model, "--model", "SiT-S/2"))
    assert "its SiT-T/2 for 1x8x8 doesn't fit SiT-S/2" in line
    assert "3x8x8 doesn't fit" in error(lambda: initialized("e", random_model(in_channels=3)))


def test_init_takes_rows_by_name(tmp_path, capsys):
    """Cat and dog in another order, and a fox."""
    def animals(name, *classes):
        folder = image_folder(tmp_path / name, 2 * len(classes), classes)
        prepare(folder, tmp_path / f"{name}-16", "--vae", "none")
        return tmp_path / f"{name}-16"
    flags = "--model", "SiT-T/2", "--steps", 1
    first = train("SiT", tmp_path / "a", "--data", animals("two", "dog", "cat"), *flags)
    assert first["classes"] == ["cat", "dog"]
    capsys.readouterr()
    second = train("SiT", tmp_path / "b", "--data", animals("three", "dog", "bat", "fox"),
                   "--init", tmp_path / "a", "--steps", 1, "--lr", 1e-12)
    assert "has 1 of 3 classes, by name\nnew classes: bat, fox\n" in capsys.readouterr().out
    old, new = (run["ema"]["y_embedder.embedding_table.weight"] for run in (first, second))
    torch.testing.assert_close(new[[1, 3]], old[[1, 2]])  # dog, and the empty class
    assert (new[0] - old[0]).abs().min() > 0 and second["config"]["model"] == "SiT-T/2"


def test_init_by_some_numbers(tmp_path):
    """Folders called 2 and 5, and a network of the classes 0 to 9: its rows 2, 5 and the empty."""
    old = random_model()
    path = save_random(tmp_path / "c.pt", old, "SiT-T/2")
    state = torch.load(path, weights_only=True)
    torch.save(state | {"classes": [*"0123456789"]}, path)
    shape = {"input_size": 8, "in_channels": 1, "num_classes": 2, "scale_aware": False}
    new, _ = checkpoints.initialize_from(path, "SiT-T/2", shape, ["2", "5"])
    want = old.y_embedder.embedding_table.weight[[2, 5, 10]]
    assert torch.equal(new.y_embedder.embedding_table.weight, want)


def test_training_on_images_of_ones_own(tmp_path, inception_file):
    """Folder -> data.py -> a run with its evaluation -> a picture, and the source then moves."""
    folder = image_folder(tmp_path / "images", 6)
    tiny_vae(tmp_path)
    prepare(folder, tmp_path / "data", "--vae", tmp_path / "vae")
    flags = ["--model", "SiT-T/2", "--eval-samples", 4, "--weights", inception_file,
             "--eval-batch", 4, "--ema", 0.5]
    run = train("SiT", tmp_path / "out", "--data", tmp_path / "data", *flags, "--steps", 2)
    assert run["log"][-1]["fid"] > 0 and run["classes"] == ["class0", "class1"]
    real = np.stack([data.read_image(path, 16) for path in data.class_folders(folder)[0]])
    moved = shutil.move(tmp_path / "data", tmp_path / "moved")
    shutil.rmtree(folder)
    flags += ["--data", moved, "--steps", 4]
    assert train("SiT", tmp_path / "out", *flags)["step"] == 4
    draw(tmp_path / "out" / "ckpt.pt", tmp_path / "grid.png", "--labels", "class1")
    options = {"weights": inception_file}
    assert "(16, 16, 3)" in error(lambda: fid.load_reference(moved, size=32, **options))
    kept, anew = (fid.evaluate(real[:4] // 2, x, **options) for x in (moved, real))
    assert kept == pytest.approx(anew, rel=1e-5)  # the statistics are those of the images
    (moved / "inception.npz").unlink()
    line = error(lambda: train("SiT", tmp_path / "new", *flags))
    assert "is gone; give --reference" in line


@pytest.mark.parametrize(("line", "says"), [
    ("sample.py --labels 10", "--labels 10: neither a class"),
    ("sample.py --labels 1 2 --num-samples 3", "--num-samples 3: must be a multiple"),
    ("sample.py --labels 1 --class-labels random", "--class-labels: not allowed"),
    ("sample.py --out x.jpg", "--out x.jpg"), ("sample.py --steps 0", "--steps: 0"),
    ("sample.py --interval 0.5 0.5", "--interval"), ("sample.py --interval 0 0.5", "give --cfg"),
    ("sample.py --sampler ddpm", "takes euler-maruyama"), ("sample.py --num 3", "--num"),
    ("sample.py --w 2", "--w 2.0: this checkpoint"), ("sample.py --vae nowhere", "--vae nowhere"),
    ("train.py --w nan", "--w"), ("train.py --drop 1", "--drop: 1"),
    ("train.py --guide-share 0", "--guide-share: 0"), ("train.py --model X", "--model X"),
    ("train.py --model DiT-T/2", "trains a SiT"), ("train.py --w-range 3 1", "--w-range"),
    ("train.py --w-range 1 3 --w 1.5", "--w-range"), ("train.py --batch 9 --accum 2", "9"),
    ("train.py --eval-samples 3", "--eval-samples 3"), ("train.py --w auto", "--eval-every"),
    ("train.py --num-labels 10", "needs more classes than 10"), ("train.py --star 1", "--star"),
    ("train.py --num-labels 2 --drop 0.1", "--num-labels"),
    ("train.py --num-labels 2 --w auto", "--num-labels"),
    ("train.py --data nowhere", "--data nowhere"), ("train.py --init x.pt", "x.pt: no such")])
def test_flags_that_are_refused(line, says, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, *flags = line.split()
    if script == "sample.py":
        assert says in error(sample.main, checkpoint, *flags)
    else:
        assert says in error(train_sit_mg.main, *flags)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name[0] != "."]


def test_curves_are_drawn(tmp_path):
    """Of what was logged and moved: the loss, FD where it was scored, w where it changed."""
    from PIL import Image
    rows = [{"step": i, "loss": 1 / i, "w": 1.5, "fd": 9 - i if i % 2 else ""} for i in (1, 2, 3)]
    save_curves(rows, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width == 2 * 540
    rows[2]["w"] = 1.6
    save_curves(rows, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width == 3 * 540


def test_one_run_per_folder(tmp_path):
    def refused(*flags, kind="SiT", out=tmp_path):
        return error(lambda: train(kind, out, *flags))
    with runtime.locked(tmp_path / "a"):
        assert "another process is writing" in refused(out=tmp_path / "a")
    (tmp_path / "file").touch()
    for path in tmp_path / "file", tmp_path / "file" / "a":
        assert "is, or is in, a file" in refused(out=path)
    train("SiT", tmp_path, "--steps", 4)
    line = refused("--clip", 1)
    assert "clip None, not 1.0" in line and "--init" in line and "--out NEW" in line
    assert "at step 4" in refused("--steps", 3)
    assert "--model" not in refused(kind="DiT")
    assert train("SiT", tmp_path, "--steps", 5, "--accum", 2)["step"] == 5
    torch.save({"config": 3}, tmp_path / "ckpt.pt")
    assert "something else" in refused()


def test_the_learning_rate_may_change_on_resume(tmp_path, capsys):
    """Only if it is given: then it says so, and is kept from there on."""
    def rate(steps, *flags):
        run = train("SiT", tmp_path, "--steps", steps, *flags)
        return run["optimizer"]["param_groups"][0]["lr"], "--lr" in capsys.readouterr().out
    assert rate(2, "--lr", 1e-3)[0] == 1e-3
    assert rate(3) == (1e-3, False)
    train("SiT", tmp_path, "--steps", 4, "--lr", 1e-4)
    assert "--lr 0.001 -> 0.0001\n" in capsys.readouterr().out
    assert rate(5) == (1e-4, False)


def test_a_run_is_of_its_data(tmp_path):
    """Others are refused in words, not hashes; what is too few to score says so first."""
    for name, count in ("three", 3), ("four", 4):
        prepare(image_folder(tmp_path / f"images {name}", count), tmp_path / name, "--vae", "none")
    flags = "--model", "SiT-T/2", "--steps", 1, "--eval-samples"
    line = error(lambda: train("SiT", tmp_path / "run", "--data", tmp_path / "three", *flags, 4))
    assert "too few images to score with; give --eval-samples 0" in line
    train("SiT", tmp_path / "run", "--data", tmp_path / "three", *flags, 0)
    line = error(lambda: train("SiT", tmp_path / "run", "--data", tmp_path / "four", *flags, 0))
    assert "holds a run on other --data" in line and "[" not in line


def test_one_class_is_not_guided(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "images", 4, ("one", "one"))
    prepare(folder, tmp_path / "data", "--vae", "none")
    flags = ["--data", str(tmp_path / "data"), "--eval-samples", "0"]
    args, one = train_sit_mg.parse_args(flags)
    assert "nothing to guide" in "\n".join(train_sit_mg.describe(args, one))
    _, _, guided, _ = train_sit_mg.draw(args, one, 0, 1.5)
    assert not guided.any()


def test_what_a_run_says_first():
    def said(*flags):
        return "\n".join(train_sit_mg.describe(*train_sit_mg.parse_args(flags)))
    assert "CFG at 2.00" in said() and "warning" not in said() and "--batch" not in said()
    for flags, words in (("--batch 32", "--batch 32"), ("--w 1.75", "CFG at 4.00"),
                         ("--num-labels 9", "CFG at 2.25"),  # 1 / (1 - 0.5 * 10/9)
                         ("--w 2", "from w 2 on"), ("--w 1.95 --num-labels 2", "from w 1.9 on"),
                         ("--w 0.9", "warning"), ("--drop 0", "warning")):
        assert words in said(*flags.split())


def spied(monkeypatch, out, *flags):
    """What a short run gives to mg_loss: [(positional, keyword arguments)], a step each."""
    seen = []
    loss = train_sit_mg.mg_loss
    with monkeypatch.context() as m:
        m.setattr(train_sit_mg, "mg_loss", lambda *a, **k: seen.append((a, k)) or loss(*a, **k))
        train("SiT", out, *flags)
    return seen


def drawn(kind, step, *flags, w=1.5):
    """What draw() gives for a batch of 4,000: (index, flip, guided, draws)."""
    args, digits = SCRIPTS[kind].parse_args(["--batch", "4000", *map(str, flags)])
    return SCRIPTS[kind].draw(args, digits, step, w)


def test_draws_are_functions_of_seed_and_step(tmp_path, monkeypatch):
    flags = "--guide-share", 0.25, "--num-labels", 4
    first, other = (spied(monkeypatch, tmp_path / str(seed), *flags, "--steps", 2, "--seed", seed)
                    for seed in (0, 1))
    steps = [{"x0": args[2], **draws} for args, draws in first + other]
    for name in "x0", "t", "noise", "others":
        for a, b in itertools.combinations(steps, 2):
            assert not torch.equal(a[name], b[name])
    assert steps[0]["share"] == 0.25 and steps[0]["noise"].std() == pytest.approx(1, abs=0.1)
    index, flip, guided, draws = drawn("SiT", 0, *flags)
    for a, b in zip(drawn("SiT", 0, *flags)[:3], (index, flip, guided), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(drawn("SiT", 1, *flags)[2], guided)
    assert not torch.equal(drawn("SiT", 0, *flags, "--seed", 1)[2], guided)
    assert guided.float().mean() == pytest.approx(0.25, abs=0.03)
    assert flip.float().mean() == pytest.approx(0.5, abs=0.03)
    assert draws["t"].mean() == pytest.approx(0.5, abs=0.02)
    y = torch.from_numpy(data.digits()[1])[index]
    labels = torch.cat([y[:, None], draws["others"]], 1).sort(1).values
    assert (labels.diff() > 0).all() and labels.min() == 0 and labels.max() == 9
    assert drawn("SiT", 0, *flags, "--batch", 1)[3]["others"].shape == (1, 4)
    counts = draws["others"].flatten().bincount()
    assert counts.min() > 1450 and counts.max() < 1750  # 4000 * 4 / 10
    for script, high in (train_sit_mg, 1), (train_dit_mg, 999):
        t = script.draw_t(100_000, torch.Generator().manual_seed(0)).double()
        assert t.min() >= 0 and t.max() <= high and t.mean() == pytest.approx(high / 2, rel=0.01)


@pytest.mark.parametrize("kind", ["SiT", "DiT"])
def test_draw_guides_whom_it_should(kind):
    """Not the dropped, not the noisiest, not those at scale 1; and a share of the others."""
    for more, w, share in (([], 1.5, 1), (["--guide-share", 0.25], 1.5, 0.25), ([], 1, 0),
                           (["--w-range", 2, 3], 1, 0.2 / 0.7)):
        _, _, guided, draws = drawn(kind, 5, "--t-max", 0.6, "--drop", 0.3, *more, w=w)
        able = ~draws["dropped"] & (draws["t"] / SCRIPTS[kind].T_NOISE <= 0.6)
        assert not (guided & ~able).any() and not (guided & (draws["w"] == 1)).any()
        assert able.float().mean() == pytest.approx(0.7 * 0.6, abs=0.03)
        assert guided.sum() / able.sum() == pytest.approx(share, abs=0.03)


def test_prepared_pixels_and_their_mirroring(tmp_path, monkeypatch):
    """Also --start-step: plain training comes first."""
    folder = image_folder(tmp_path / "images")
    out = tmp_path / "data"
    pixels = prepare(folder, out, "--vae", "none")
    assert (len(pixels), pixels.shape, pixels.kind) == (7, (3, 16, 16), "pixels")
    assert pixels.classes == ["class0", "class1"] and pixels.labels.tolist() == [0] * 4 + [1] * 3
    want = data.read_image(folder / "class1" / "3.png", 16)
    twice = torch.tensor([5, 5]), torch.tensor([False, True])
    x, y = pixels.get(*twice, None)
    np.testing.assert_allclose(x[0].permute(1, 2, 0), want / 127.5 - 1, atol=1e-6)
    assert torch.equal(x[1], x[0].flip(-1)) and y.tolist() == [1, 1]
    a, b = prepare(folder, tmp_path / "no-flip", "--vae", "none", "--no-flip").get(*twice)[0]
    assert torch.equal(a, b)
    seen = spied(monkeypatch, tmp_path, "--data", out, "--steps", 8, "--start-step", 3)
    plain = pixels.get(torch.arange(7))[0]
    x0 = torch.cat([args[2] for args, _ in seen])
    as_is, mirrored = ((x0[:, None] == views).flatten(2).all(2).any(1)
                       for views in (plain, plain.flip(-1)))
    assert (as_is ^ mirrored).all() and 20 < as_is.sum() < 44
    assert [args[1] is None for args, _ in seen] == [True] * 3 + [False] * 5
    assert [row["w"] for row in load(tmp_path)["log"]] == [1.0, 1.5, 1.5, 1.5]


def test_scale_aware_draws():
    """20 % of a batch draw a scale, a tenth is dropped, the rest is at 1 (the authors)."""
    steps = [drawn("SiT", step, "--w-range", 1.5, 3) for step in (0, 1)]
    w = torch.cat([draws["w"] for _, _, _, draws in steps])
    dropped = torch.cat([draws["dropped"] for _, _, _, draws in steps])
    scaled = (w != 1) & ~dropped
    assert scaled.float().mean() == pytest.approx(0.2, abs=0.02)
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.02)
    assert 1.5 <= w[scaled].min() < 1.52 and 2.98 < w[scaled].max() <= 3
    assert len(set(w[scaled].tolist())) > 1000  # other ones in each step


def test_the_average_follows_the_weights(tmp_path):
    """Its decay at step n is the smaller of --ema and (1 + n) / (10 + n)."""
    torch.manual_seed(0)
    first = create_model("SiT-T/2", input_size=8, in_channels=1, num_classes=10).state_dict()
    average = dict(first)
    for step, decay in enumerate([1 / 10, 2 / 11, 0.25, 0.25]):  # 3/12 and 4/13, or --ema
        run = train("SiT", tmp_path, "--steps", step + 1, "--ema", 0.25)
        average = {key: torch.lerp(x, run["model"][key], 1 - decay) for key, x in average.items()}
        same(dict(run["ema"]), average, 1e-4, 1e-7)
    for weights in "ema", "model":
        loaded, _ = load_checkpoint(tmp_path / "ckpt.pt", weights=weights)
        same(loaded.state_dict(), run[weights])


# ---------------------------------------------------------------- toy_mg.py

def linear_network(rows):
    """v = rows[y] + 0.3 x + 0.2 t, whose gradient is easy to write down."""
    return lambda x, t, y: rows[y] + 0.3 * x + 0.2 * t[:, None]


def test_toy_board_and_scores():
    torch.manual_seed(0)
    x, y = toy_mg.board(20_000)
    assert x.abs().max() <= 2 and torch.equal((x + 2).floor().long().sum(1) % 2, y)
    outliers, coverage = toy_mg.scores(x, y)
    assert outliers < 1e-3 and coverage > 0.98
    assert toy_mg.scores(x, torch.full_like(y, toy_mg.EMPTY))[1] > 0.98
    assert toy_mg.scores(x, 1 - y) == (1, 0)
    corner = torch.full((10, 2), -1.99)  # all in one of the 512 parts of class 0
    assert toy_mg.scores(corner, torch.zeros(10, dtype=torch.long)) == (0, 1 / 512)
    assert toy_mg.scores(corner - 1, torch.full((10,), toy_mg.EMPTY)) == (1, 0)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(("w", "share"), [(1.0, 1.0), (1.5, 1.0), (1.75, 0.5)])
def test_toy_gradient_by_hand(w, share, online):
    """Six samples: the second is dropped, the fifth not guided."""
    torch.manual_seed(0)
    x0, y = toy_mg.board(6)
    t = torch.rand(6)
    noise = torch.randn(6, 2)
    want = torch.zeros(3, 2)
    rows = torch.randn(3, 2, requires_grad=True)
    guide = torch.randn(3, 2)
    network = linear_network(rows)
    teacher = linear_network(guide)
    if online:
        teacher = network
        guide = rows
    for i in range(6):
        target = noise[i] - x0[i]
        if i not in (1, 4):
            target = target + (w - 1) / share * (guide[y[i]] - guide[2])
        label = 2 if i == 1 else y[i]
        out = rows[label] + 0.3 * ((1 - t[i]) * x0[i] + t[i] * noise[i]) + 0.2 * t[i]
        want[label] += (out - target).detach() / 6  # of the mean over (N, 2)
    loss = toy_mg.mg_loss(network, teacher, x0, y, w, t=t, noise=noise, share=share,
                          dropped=torch.arange(6) == 1, guide=torch.tensor([0, 2, 3, 5]))
    torch.testing.assert_close(torch.autograd.grad(loss, rows)[0], want)


def test_toy_train(monkeypatch):
    """A function of the seed; averages the weights; draws, and hands on, what it says."""
    first, again, other = (toy_mg.train(1.5, 3, seed=seed).last.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    start, one, half = (list(toy_mg.train(1, steps, ema=ema).parameters())
                        for steps, ema in ((0, 0), (1, 0), (1, 0.75)))
    want = [a + 0.9 * (b - a) for a, b in zip(start, one, strict=True)]  # 1/10, the warm-up's
    torch.testing.assert_close(half, want)
    seen = []
    loss = toy_mg.mg_loss
    monkeypatch.setattr(toy_mg, "mg_loss", lambda *a, **k: seen.append((a, k)) or loss(*a, **k))
    for name in "ema", "online":
        average = toy_mg.train(1.5, 1, teacher=name, share=0.25, drop=0.4, batch=4000)
        (network, teacher, *_), draws = seen.pop()
        assert teacher is (network if name == "online" else average) and draws["share"] == 0.25
        assert draws["dropped"].float().mean() == pytest.approx(0.4, abs=0.03)
        assert len(draws["guide"]) / 4000 == pytest.approx(0.25 * 0.6, abs=0.03)
        assert not draws["dropped"][draws["guide"]].any()
        assert not any(p.requires_grad for p in average.parameters())


def test_toy_euler_and_cfg():
    torch.manual_seed(0)
    x = torch.randn(100, 2)
    y = torch.arange(100) % 2
    path = toy_mg.sample(lambda x, t, y: gaussian_velocity(x, t[:, None]), x, y, steps=2000)
    assert path.shape == (2001, 100, 2) and torch.equal(path[0], x)
    torch.testing.assert_close(path[-1], MEAN + STD * x, rtol=0, atol=5e-3)
    rows = torch.tensor([[1.0, 0], [0, 2], [3, 3]])
    moved = toy_mg.sample(lambda x, t, y: rows[y] + t[:, None], x, y, cfg=1.7, steps=4)[-1]
    times = (1 + 0.75 + 0.5 + 0.25) / 4
    torch.testing.assert_close(moved, x - (rows[2] + 1.7 * (rows[y] - rows[2])) - times)
    guided = rows[2] + 1.7 * (rows - rows[2])
    scale = toy_mg.measured_scale(linear_network(guided), linear_network(rows))
    assert scale == pytest.approx(1.7, abs=1e-4)


def test_toy_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy_mg, "POINTS", 200)
    monkeypatch.setattr(toy_mg, "SWEEP", [1, 1.25])
    for more, first in ([], "| conditional | "), (["--sweep"], "| 1.000 | 1.000 | 1.000 | "):
        toy_mg.main(["--steps", "3", "--out", str(tmp_path / "a.png"), *more])
        assert f"|\n{first}" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for flags in ["--w", "2"], ["--x", "1"], ["--out", "no/such/folder/a.png"], ["--out", "a.jpg"]:
        with pytest.raises(SystemExit, match="2"):
            toy_mg.main(flags)
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and flags[0] in message


# ---------------------------------------------------------------- fid.py

def test_frechet_closed_forms():
    rng = np.random.default_rng(0)
    s = np.cov(rng.standard_normal((50, 81)))
    m1, m2 = rng.standard_normal((2, 50))
    apart = ((m1 - m2) ** 2).sum()
    assert fid.frechet_distance(m1, s, m2, s) == pytest.approx(apart, rel=1e-9)
    assert fid.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1)
    q, _ = np.linalg.qr(rng.standard_normal((50, 50)))  # one basis: the root is the eigenvalues'
    a, b = rng.random((2, 50)) ** 4
    a[:20] = b[10:30] = 0
    want = apart + ((a**0.5 - b**0.5) ** 2).sum()
    assert fid.frechet_distance(m1, q * a @ q.T, m2, q * b @ q.T) == pytest.approx(want, rel=1e-6)
    low_rank = np.cov(rng.standard_normal((2048, 301)))
    for s in low_rank, *((q * np.logspace(2, low, 50)) @ q.T for low in (-9, -20)):
        assert 0 <= fid.frechet_distance(0 * s[0], s, 0 * s[0], s) < 1e-6
    for bad in (m1 * np.nan, s, m2, s), (m1, -s, m2, s):
        with pytest.raises(ValueError):
            fid.frechet_distance(*bad)


@pytest.mark.parametrize("ranks", [(300, 400), (60, 30), (60, 300), (300, 20), (127, 127)])
def test_frechet_of_data(ranks):
    """For X'X and Y'Y the trace of the root is the sum of the singular values of XY'."""
    rng = np.random.default_rng(2)
    x, y = (rng.standard_normal((rank + 1, 128)) for rank in ranks)
    y *= 1 + rng.random(128)
    s1 = np.cov(x.T)
    s2 = np.cov(y.T)
    apart = x.mean(0) - y.mean(0)
    root = np.linalg.norm((x - x.mean(0)) @ (y - y.mean(0)).T, "nuc") / math.sqrt(math.prod(ranks))
    want = (apart**2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
    got = fid.frechet_distance(x.mean(0), s1, y.mean(0), s2)
    assert got == pytest.approx(want, rel=1e-9)
    if min(ranks) >= 128:  # elsewhere sqrtm is wrong, as the product is singular
        assert root == pytest.approx(np.trace(sqrtm(s1 @ s2)).real)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_against_loops(k):
    def inside(points, manifold):
        dist = [[math.dist(a, b) for b in manifold] for a in manifold]
        radius = [sorted(row[:i] + row[i + 1:])[k - 1] for i, row in enumerate(dist)]
        return np.mean([any(math.dist(p, m) <= r for m, r in zip(manifold, radius, strict=True))
                        for p in points])
    rng = np.random.default_rng(3)
    normal = rng.standard_normal
    integers = rng.integers
    for real, fake in [(normal((70, 3)), normal((90, 3)) * 1.7 + 1),
                       (normal((50, 3)) + 1e4, normal((40, 3)) * 0.5 + 1e4),
                       (integers(0, 7, (60, 2)), integers(3, 12, (45, 2)))]:  # ties, duplicates
        a = real.tolist()
        b = fake.tolist()
        for block in 512, 16:
            got = fid.precision_recall(real, fake, k, block=block)
            assert got == pytest.approx((inside(b, a), inside(a, b)))
    assert fid.precision_recall(real, real[:1].repeat(9, 0))[0] == 1  # balls of radius 0
    with pytest.raises(ValueError):
        fid.precision_recall(real, real[:k], k)


def test_inception_score_formula():
    def score(p):
        return math.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    p = np.random.default_rng(4).dirichlet(np.ones(6) * 0.3, 25)
    splits = np.mean([score(p[:10]), score(p[10:20]), score(p[20:])])
    assert fid.inception_score(p, 10) == pytest.approx(splits, rel=1e-9)
    assert fid.inception_score(np.eye(5)) == pytest.approx(5)  # 0 log 0


def test_resize_is_tensorflow_1s():
    x = torch.tensor([[0, 10, 40]], dtype=torch.uint8).view(1, 1, 1, 3)
    up = [0, 5, 10, 25, 40, 40]  # at 0, .5, 1, 1.5, 2 and 2.5 (the edge)
    assert fid.resize_tf1(x, 6)[0, 0, 0].tolist() == up
    assert fid.resize_tf1(x, 2)[0, 0, 0].tolist() == [0, 25]  # at 0 and 1.5
    assert fid.resize_tf1(x.transpose(2, 3), 6)[0, 0, :, 0].tolist() == up


def plain_inception(x, state):
    """The network as published, batch norms apart: (N, 3, H, W) -> (pool, spatial, probs).

    Random weights that keep activations in range are put where state has none.
    """
    g = torch.Generator().manual_seed(len(state))
    row = (1, 7)
    column = (7, 1)

    def chain(x, prefix, *convs):
        for name, out, kernel, *stride_and_pad in convs:
            kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
            stride, pad = stride_and_pad or (1, [k // 2 for k in kernel])
            name = prefix + name
            shape = (out, x.shape[1], *kernel)
            if f"{name}.conv.weight" not in state:
                std = (2 / math.prod(shape[1:])) ** 0.5
                state[f"{name}.conv.weight"] = std * torch.randn(shape, generator=g)
                for key, low, high in (("running_mean", -0.2, 0.2), ("running_var", 0.5, 1.5),
                                       ("weight", 0.5, 1.5), ("bias", -0.2, 0.2)):
                    state[f"{name}.bn.{key}"] = torch.empty(out).uniform_(low, high, generator=g)
            x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, pad)
            keys = ("running_mean", "running_var", "weight", "bias")
            x = F.relu(F.batch_norm(x, *(state[f"{name}.bn.{key}"] for key in keys), eps=0.001))
        return x

    def avg(x):
        ones = torch.ones_like(x[:1, :1])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)  # padding doesn't count

    def mixed(name, *branches):
        return torch.cat([chain(x, f"Mixed_{name}.branch", *convs) for x, *convs in branches], 1)
    x = chain(x, "Conv2d_", ("1a_3x3", 32, 3, 2, 0), ("2a_3x3", 32, 3, 1, 0), ("2b_3x3", 64, 3))
    x = chain(F.max_pool2d(x, 3, 2), "Conv2d_", ("3b_1x1", 80, 1), ("4a_3x3", 192, 3, 1, 0))
    x = F.max_pool2d(x, 3, 2)
    double3 = ("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3)
    for name, width in (("5b", 32), ("5c", 64), ("5d", 64)):
        x = mixed(name, (x, ("1x1", 64, 1)), (x, ("5x5_1", 48, 1), ("5x5_2", 64, 5)),
                  (x, *double3, ("3x3dbl_3", 96, 3)), (avg(x), ("_pool", width, 1)))
    x = mixed("6a", (x, ("3x3", 384, 3, 2, 0)), (x, *double3, ("3x3dbl_3", 96, 3, 2, 0)),
              (F.max_pool2d(x, 3, 2),))
    for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        x = mixed(name, (x, ("1x1", 192, 1)),
                  (x, ("7x7_1", c, 1), ("7x7_2", c, row), ("7x7_3", 192, column)),
                  (x, ("7x7dbl_1", c, 1), ("7x7dbl_2", c, column), ("7x7dbl_3", c, row),
                   ("7x7dbl_4", c, column), ("7x7dbl_5", 192, row)), (avg(x), ("_pool", 192, 1)))
        if name == "6d":
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
    x = mixed("7a", (x, ("3x3_1", 192, 1), ("3x3_2", 320, 3, 2, 0)),
              (x, ("7x7x3_1", 192, 1), ("7x7x3_2", 192, row), ("7x7x3_3", 192, column),
               ("7x7x3_4", 192, 3, 2, 0)), (F.max_pool2d(x, 3, 2),))
    for name in "7b", "7c":
        pooled = avg(x) if name == "7b" else F.max_pool2d(x, 3, 1, 1)
        a = mixed(name, (x, ("3x3_1", 384, 1)))
        b = mixed(name, (x, ("3x3dbl_1", 448, 1), ("3x3dbl_2", 384, 3)))
        x = mixed(name, (x, ("1x1", 320, 1)), (a, ("3x3_2a", 384, (1, 3))),
                  (a, ("3x3_2b", 384, (3, 1))), (b, ("3x3dbl_3a", 384, (1, 3))),
                  (b, ("3x3dbl_3b", 384, (3, 1))), (pooled, ("_pool", 192, 1)))
    state.setdefault("fc.weight", torch.randn(1008, 2048, generator=g) / 50)
    state.setdefault("fc.bias", torch.randn(1008, generator=g))
    pool = x.mean((2, 3))
    return pool, spatial, (pool @ state["fc.weight"].T).softmax(1)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights in pytorch-fid's layout."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    state = {}
    plain_inception(torch.zeros(1, 3, 75, 75), state)
    torch.save(state, path)
    return str(path)


def test_inception_equals_the_plain_network(inception_file):
    state = torch.load(inception_file)
    net = fid.InceptionV3(inception_file)
    assert sum(v.numel() for v in state.values()) == 23_885_392  # of the public file
    x = torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8)
    with torch.no_grad():
        want = plain_inception((fid.resize_tf1(x) - 128) / 128, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which must not reach the features
        got = net(x)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-5 * b.abs().max()
    gray = x[:1, :1]
    torch.testing.assert_close(net(gray), net(gray.repeat(1, 3, 1, 1)))


def test_inception_weights_that_cant_be_had(inception_file, tmp_path, monkeypatch):
    state = torch.load(inception_file)
    torch.save(state | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "shape")
    del state["Mixed_6d.branch1x1.bn.bias"]
    torch.save(state, tmp_path / "missing")
    for path in tmp_path / "shape", tmp_path / "missing":
        with pytest.raises(ValueError, match=f"{path.name}: no Inception weights"):
            fid.InceptionV3(path)

    def download(url, path, sha256, **_):
        raise OSError(f"no network for {sha256}")
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    line = error(fid.InceptionV3)
    assert re.search("no network for 6726825d.*https://.*--weights.*--eval-samples 0", line)


@pytest.mark.parametrize("setting", ["new", "old", "none"])
def test_features_are_computed_in_full_fp32(setting):
    """Whatever the caller has set, which is back afterwards."""
    cudnn = torch.backends.cudnn
    new = hasattr(torch.backends, "fp32_precision")

    def now():
        if not new:
            return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
        return (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision,
                torch.backends.mkldnn.matmul.fp32_precision, cudnn.deterministic)

    def check(_):
        if setting == "new" and new:
            torch.backends.fp32_precision = "tf32"
        if setting == "old":
            torch.set_float32_matmul_precision("medium")
            cudnn.allow_tf32 = True
        earlier = now()
        with torch.autocast("cpu", torch.bfloat16), fid.plain_float32("cpu"):
            assert now() == (("ieee",) * 3 if new else (False, False)) + (True,)
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert now() == earlier
    fork(check)


def test_the_digits_classifier(tmp_path, monkeypatch):
    """Trained again, and the same, where its file is broken; nothing of the caller's matters."""
    images, labels = map(torch.from_numpy, data.digits())
    images = images[:, None, :, :, 0]
    probs = fid.load_reference("digits", "classifier").net(images)[2]
    right = (probs.argmax(1) == labels).double()
    assert 0.98 <= right[::5].mean() < right.mean()  # it isn't trained on every fifth
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(fid, "TRAINING", 60)
    first = fid.load_reference("digits", "classifier")
    file = tmp_path / "hub" / "checkpoints" / "digits-classifier.npz"
    os.truncate(file, 1000)
    torch.manual_seed(7)
    rng = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        again = fid.load_reference("digits", "classifier")
    assert torch.equal(torch.get_rng_state(), rng)
    monkeypatch.setattr(fid, "train_classifier", None)
    kept = fid.load_reference("digits", "classifier")  # from its file
    for reference in again, kept:
        same(reference.net.state_dict(), first.net.state_dict())
        same(reference.stats["sigma"].tolist(), first.stats["sigma"].tolist())


def test_what_one_machine_alone_has_kept_is_made_anew(tmp_path, monkeypatch):
    """Rank 0 keeps the digits' statistics in a folder of its own, where they alone are found."""
    monkeypatch.setattr(fid, "TRAINING", 60)

    def load_there(rank):
        os.environ["TORCH_HOME"] = str(tmp_path / str(rank))
        runtime.setup()
        reference = fid.load_reference("digits", "classifier")
        np.save(tmp_path / f"{rank}.npy", reference.stats["sigma"])
    for _ in range(2):
        fork(load_there, 2)
        np.testing.assert_array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))
    assert [*tmp_path.rglob("*.npz")] == [tmp_path / "0/hub/checkpoints/digits-classifier.npz"]


def bright_and_dark(folder, count=60):
    """A folder of two classes of 16 pixels that are easy to tell apart."""
    rng = np.random.default_rng(0)
    for i in range(count):
        image = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + 150 * (i % 2)
        save_image(folder / "ab"[i % 2] / f"{i:02}.png", image.astype(np.uint8))
    return folder


def test_own_images_are_scored_by_a_classifier_of_them(tmp_path, monkeypatch, capsys):
    """Offline; the same on 1 and 2 processes; not where there is nothing to learn."""
    monkeypatch.setattr(fid, "TRAINING", 60)
    folder = bright_and_dark(tmp_path / "images")
    out = tmp_path / "data"
    prepared = prepare(folder, out, "--vae", "none")
    assert fid.choose_features(out) == "classifier"
    flags = "--data", out, "--eval-samples", 8, "--steps", 2, "--eval-batch", 4
    scores = train("SiT", tmp_path / "run", *flags)["log"][-1]
    assert scores["fd"] > 0 and 0 <= scores["accuracy"] <= 1 and "fid" not in scores
    assert "recognises 1.000 of 12 held-out images" in capsys.readouterr().out
    with np.load(tmp_path / "run" / "samples.npz") as samples:
        want = fid.evaluate(tmp_path / "run" / "samples.npz", out, "classifier")
        assert want == {key: scores[key] for key in want}
        real = np.array(prepared.images)
        np.savez(tmp_path / "real.npz", arr_0=real, labels=prepared.labels)
        assert samples["arr_0"].shape == (8, 16, 16, 3)
    perfect = fid.evaluate(tmp_path / "real.npz", out, "classifier")
    assert perfect["fd"] < 1e-6 and perfect["accuracy"] == perfect["precision"] == 1
    single = bright_and_dark(tmp_path / "single", 2)  # one image is left
    shutil.rmtree(single / "b")
    capsys.readouterr()
    prepare(single, tmp_path / "one class", "--vae", "none")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("/one class' --w 1 --eval-samples 0")  # quoted
    (out / "classifier.npz").unlink()

    def score(_):
        runtime.setup()
        got = fid.evaluate(tmp_path / "run" / "samples.npz", out, "classifier")
        assert got == pytest.approx(want, rel=1e-5)
    fork(score, 2)
    assert sorted(os.listdir(out)) == [runtime.LOCK, "classifier.npz", "data.json", "preview.png",
                                       "x.npy"]
    mixed = tmp_path / "mixed.npz"
    np.savez(mixed, arr_0=real, labels=np.arange(60) % 3)
    line = error(lambda: fid.evaluate(real, mixed, "classifier"))
    assert "too few images to learn from" in line and "--eval-samples 0" in line
    np.savez(mixed, arr_0=real, labels=np.full(60, 4))
    assert "has one class" in error(lambda: fid.evaluate(real, mixed, "classifier"))
    np.savez(mixed, arr_0=real, labels=np.arange(60) * 10**11)
    assert "labels below 10,000" in error(lambda: fid.evaluate(real, mixed, "classifier"))
    np.savez(mixed, arr_0=real[:, :8], labels=np.arange(60) % 2)
    assert "square images" in error(lambda: fid.evaluate(real[:, :8], mixed, "classifier"))


def digit_samples(n, noise, seed=0):
    """Digits with noise: uint8 (n, 8, 8, 1), labels (n,)."""
    x, y = data.digits()
    rng = np.random.default_rng(seed)
    i = rng.integers(0, len(x), n)
    return (x[i] + rng.normal(0, noise, (n, 8, 8, 1))).round().clip(0, 255).astype(np.uint8), y[i]


class TwoFeatures(nn.Module):
    """In place of Inception: the digits' classifier, and as spatial features the pixels."""
    widths = (64, 64, 10)

    def __init__(self, weights=None):
        super().__init__()
        self.net = fid.load_reference("digits", "classifier").net

    def forward(self, x):
        pool, _, probs = self.net(x)
        return pool, x[:, 0].flatten(1).float(), probs


def test_evaluate_is_its_parts(tmp_path, monkeypatch):
    """The streamed figures are those of all features at once, for any batch and processes."""
    kept = Path(torch.hub.get_dir())
    net = TwoFeatures()
    shutil.copytree(kept, tmp_path / "hub")  # as the patches change what is kept there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(fid, "SPLIT", 200)
    monkeypatch.setattr(fid, "MANIFOLD", 1000)
    monkeypatch.setattr(fid, "InceptionV3", lambda _: net)
    x, y = digit_samples(401, 30)
    real = digit_samples(1500, 0, seed=1)[0]
    np.savez_compressed(tmp_path / "x.npz", arr_0=x, labels=y)  # one rank lacks the last split
    (p1, s1, _), (p2, s2, probs) = (net(torch.tensor(a).permute(0, 3, 1, 2)) for a in (real, x))
    want = {"is": fid.inception_score(probs, 200)}
    for key, *features in (("fid", p1, p2), ("sfid", s1, s2)):
        f, g = (f.double().numpy() for f in features)
        want[key] = fid.frechet_distance(f.mean(0), np.cov(f.T), g.mean(0), np.cov(g.T))
    want["precision"], want["recall"] = fid.precision_recall(p1[:1000], p2)

    def score(_):
        runtime.setup()
        reference = fid.load_reference(real)
        for size in 1, 7, 64:
            got = fid.evaluate(tmp_path / "x.npz", reference, batch=size)
            assert got == pytest.approx(want, rel=1e-5)
        reference.features = "classifier"
        short = fid.evaluate(tmp_path / "x.npz", reference)
        assert short == pytest.approx({"fd": want["fid"]} | {
            "accuracy": (probs.argmax(1).numpy() == y).mean()} | {
            key: want[key] for key in ("precision", "recall")}, rel=1e-5)
        digits = fid.evaluate(tmp_path / "x.npz", "digits", "classifier", batch=10)
        (tmp_path / f"{runtime.ranks()}").write_text(json.dumps([got, digits]))
    for world in 1, 2:
        fork(score, world)
    (_, one), two, other = (json.loads((tmp_path / name).read_text())
                            for name in ("(0, 1)", "(0, 2)", "(1, 2)"))
    assert two == other and two[1] == pytest.approx(one, rel=1e-5)
    reference = fid.load_reference(real[:1000])
    same = fid.evaluate(real[:1000], reference)
    assert same["fid"] < 1e-6 and same["sfid"] < 1e-6 and same["precision"] == same["recall"] == 1
    black = fid.evaluate(np.zeros((70, 8, 8, 1), np.uint8), reference)  # a collapsed model
    assert black["fid"] > want["fid"] and black["recall"] == 0 and black["is"] == pytest.approx(1)


def test_rows_are_split_and_sorted_classes_are_mixed(tmp_path):
    x = np.arange(26, dtype=np.uint8).repeat(12).reshape(26, 2, 2, 3)
    np.savez(tmp_path / "stored.npz", labels=np.arange(26), arr_0=x)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=x)
    with zipfile.ZipFile(tmp_path / "packed.npz", "a") as z:
        z.writestr("README.txt", "how it was made")
    for i, image in enumerate(x):
        save_image(tmp_path / "flat" / f"{i:02}.png", image)
        save_image(tmp_path / "classes" / f"{i // 13}" / f"{i:02}.png", image)

    def read(source, world):
        """The values of the images in the order of their rows, read by `world` processes."""
        images = fid.Images(source, real=True, size=2)
        found = {}
        for rank in range(world):
            for rows, part in images.batches(4, rank, world):
                assert 0 < len(rows) == len(part) <= 4 and (rows % world == rank).all()
                found.update(zip(rows.tolist(), part[:, 0, 0, 0].tolist(), strict=True))
        return [found[row] for row in range(26)]
    for source in (x, *(tmp_path / name for name in ("stored.npz", "packed.npz", "flat"))):
        assert read(source, 1) == read(source, 3) == list(range(26))
    mixed = read(tmp_path / "classes", 1)
    assert mixed == read(tmp_path / "classes", 3) and sorted(mixed) == list(range(26))
    assert 3 <= sum(value < 13 for value in mixed[:13]) <= 10  # not class after class


def test_command_line_and_references_of_statistics(tmp_path, capsys, monkeypatch):
    """--save-stats keeps all figures; mu and sigma alone have no sFID, precision and recall."""
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    fake, labels = digit_samples(80, 40, seed=1)
    np.savez("fake.npz", arr_0=fake, labels=labels.astype(np.int32))
    np.savez("few.npz", arr_0=fake[:50])
    Path("fake.npz.json").write_text('{"class_labels": "balanced"}')
    want = fid.evaluate("fake.npz", "digits", "classifier")
    capsys.readouterr()
    files = ["--save-stats", "stats.npz", "--picture", "rows.png"]
    fid.main(["fake.npz", "few.npz", "digits", *files])
    out, err = capsys.readouterr()
    header, _, a, b = (line.replace("|", " ").split() for line in out.splitlines())
    assert " ".join(header) == "samples images labels FD accuracy precision recall"
    assert a[:3] == ["fake.npz", "80", "balanced"]
    assert b[:3] == ["few.npz", "50", "-"] and b[4] == "-"
    assert [float(cell) for cell in a[3:]] == pytest.approx([*want.values()], abs=1e-4)
    assert err.count("warning") == 1 and "few.npz: 50 images" in err  # of 64 features
    rows = np.asarray(Image.open("rows.png"))  # 2 x 10 digits of 48 pixels in frames of 1
    assert rows.shape == (100, 500) and (rows[:50] == rows[50:]).all()
    assert (rows[1:49:6, 51:99:6] == fake[1, :, :, 0]).all()
    fid.main(["fake.npz", "stats.npz"])  # by its width
    assert capsys.readouterr().out.splitlines()[2].split("|")[4:] == out.splitlines()[2].split(
        "|")[4:]
    stats = {key: x for key, x in np.load("stats.npz").items() if key != "pool"}
    np.savez("adm.npz", **stats, arr_0=data.digits()[0])
    assert fid.evaluate("fake.npz", "adm.npz", "classifier") == pytest.approx(want, rel=1e-9)
    assert "the order is SAMPLES REFERENCE" in error(fid.main, "adm.npz", "fake.npz")
    np.savez("alone.npz", **{key: x for key, x in stats.items() if key[:3] != "net"})
    assert "no classifier" in error(lambda: fid.evaluate("fake.npz", "alone.npz", "classifier"))
    for key, x in (("shape", np.array([8.0, 4, 1])), ("shape", -stats["shape"]),
                   ("net.fc2.weight", np.array(3)), ("pool", np.array(3))):
        np.savez("alone.npz", **stats | {key: x})
        line = error(lambda: fid.evaluate("fake.npz", "alone.npz", "classifier"))
        assert "no classifier" in line or "must be numbers" in line
    monkeypatch.setattr(fid, "InceptionV3", TwoFeatures)
    np.savez("alone.npz", mu=stats["mu"], sigma=stats["sigma"])  # as pytorch-fid's files
    capsys.readouterr()
    fid.main(["fake.npz", "alone.npz", "--features", "inception"])
    cells = capsys.readouterr().out.splitlines()[2].replace("|", " ").split()
    assert float(cells[3]) == pytest.approx(want["fd"], abs=1e-4)
    assert [cells[i] for i in (4, 6, 7)] == ["-"] * 3 and float(cells[5]) > 1


BAD = {
    "good.npz one.npz --save-stats one.npz": "--save-stats",
    "good.npz digits --weights good.npz": "--weights",
    "good.npz one.npz": "one.npz: must have at least 4 images",
    "float.npz digits": "uint8",
    "mixed mixed": "b.png: is (7, 8, 3)",
    "broken broken": "b.png",
    "truncated.npz digits": "truncated.npz",
    "good.npz part.npz": "part.npz: shape must be",
    "good.npz color.npz": "but (8, 8, 3) in color.npz",
    "color.npz digits": "images of (8, 8, 3)",
    "good.npz good.npz --features classifier": "needs images with labels",
    "good.npz digits --features classifier --weights x.pth": "--weights x.pth",
    "good.npz digits --picture good.npz": "--picture",
    "good.npz large.npz digits": "large.npz",
    "good.npz large.npz digits --picture a.png": "all SAMPLES must have one size",
    "good.npz digits --picture a.png --save-stats a.png": "--picture a.png",
    "digits good.npz": "digits: real images; the order is SAMPLES REFERENCE",
    "empty digits": "empty: a folder without images",
}


def test_fid_bad_input(tmp_path, monkeypatch, inception_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url",
                        lambda *_, **__: torch.load(inception_file))
    x, _ = digit_samples(64, 10)
    for name, array in (("good", x), ("one", x[:1]), ("float", x / 255),
                        ("color", x[:4].repeat(3, 3)),
                        ("large", np.zeros((4, 16, 16, 1), np.uint8))):
        np.savez(f"{name}.npz", arr_0=array)
    np.savez("part.npz", mu=np.zeros(64), sigma=np.eye(64))
    good = Path("good.npz").read_bytes()
    Path("truncated.npz").write_bytes(good[:-200])
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for name in "abcd":
        save_image(Path("mixed", f"{name}.png"), noise[:8 - (name == "b")])
        save_image(Path("broken", f"{name}.png"), noise)
    os.truncate("broken/b.png", 20)
    os.mkdir("empty")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for line, says in BAD.items():
        assert says in error(fid.main, *line.split())
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_kept_statistics_are_of_the_weights_that_made_them(tmp_path, inception_file):
    out = tmp_path / "out"
    prepare(image_folder(tmp_path / "images", 4), out, "--vae", "none")
    state = torch.load(inception_file)
    state["Mixed_7c.branch1x1.bn.bias"] += 1
    torch.save(state, tmp_path / "other.pth")
    first = fid.load_reference(out, weights=inception_file)
    second = fid.load_reference(out, weights=tmp_path / "other.pth")
    assert (second.stats["mu"] - first.stats["mu"]).max() > 0.1
    kept = (out / "inception.npz").stat().st_mtime_ns
    again = fid.load_reference(out, weights=tmp_path / "other.pth")
    np.testing.assert_array_equal(again.stats["mu"], second.stats["mu"])
    assert (out / "inception.npz").stat().st_mtime_ns == kept
    np.savez(tmp_path / "stats.npz", **first.stats)
    fid.load_reference(tmp_path / "stats.npz", weights=inception_file)
    assert "of other Inception weights" in error(
        lambda: fid.load_reference(tmp_path / "stats.npz", weights=tmp_path / "other.pth"))


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    """Neither arrays of a wrong shape, nor more of one than its header says."""
    x, _ = digit_samples(8, 0)
    bomb = np.zeros(16_000_000)  # 128 MB
    stats = {"mu": np.zeros(64), "sigma": np.eye(64)}

    def refused(says):
        tracemalloc.start()
        assert says in error(lambda: fid.evaluate(x, tmp_path / "bomb.npz", "classifier"))
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()
    for key, array in (("mu", bomb), ("sigma", bomb), ("pool", bomb.reshape(-1, 64))):
        np.savez_compressed(tmp_path / "bomb.npz", **stats | {key: array})
        refused(f"bomb.npz: {key} must be")
    file = io.BytesIO()
    np.save(file, x)
    file.write(bomb.tobytes())
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("arr_0.npy", file.getvalue())
    refused("bomb.npz: neither a folder of images nor an intact .npz (arr_0 has another size")


# ---------------------------------------------------------------- a GPU where there is none

CUDA = torch.device("cuda:0")
SYNCHRONISE = ["_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2"]


class Fake(torch.Tensor):
    """C++ takes it for a tensor on the CPU, Python sees cuda:0; held: its values."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, x):
        self = torch.Tensor._make_wrapper_subclass(
            cls, x.shape, x.stride(), x.storage_offset(), dtype=x.dtype, device="cpu")
        self.held = x
        return self

    def to(self, *args, **kwargs):
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        x = self if dtype in (None, self.dtype) else super().to(dtype)
        return x.cpu() if device and device.type == "cpu" else x

    def cpu(self):
        FakeGPU.now.note("waits", "to the CPU")
        return self.held.detach().clone()

    def __reduce_ex__(self, protocol):  # torch.save
        return self.cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return FakeGPU.now.__torch_dispatch__(op, types, args, kwargs)


class FakeGPU(TorchDispatchMode):
    """Inside it the scripts find a GPU, whose tensors are Fakes: with FakeGPU() as gpu.

    gpu.waits, gpu.copies, gpu.kernels: Counters of "operation file.py:line", where the CPU waits
    for the GPU; what is copied to it without waiting (pinned, non_blocking); kernels (no views).
    To mix GPU and CPU tensors is an error, but for a CPU tensor of 0 dimensions.
    Not covered: nccl, CUDA's own list of autocast, what kernels do inside, torch.compile.
    """

    def __enter__(self):
        FakeGPU.now = self
        self.waits, self.copies, self.kernels = (Counter() for _ in range(3))
        self.stack = contextlib.ExitStack()
        autocast = torch.autocast
        generator = runtime.generator
        to = nn.Module.to
        group = clip_grad._group_tensors_by_device_and_dtype

        def pin_memory(x):
            x = x.clone()
            x.pinned = True
            return x

        def move(module, *args, **kwargs):
            torch.__future__.set_swap_module_params_on_conversion(True)  # parameters become Fakes
            module = to(module, *(CUDA if str(x) == "cuda" else x for x in args), **kwargs)
            torch.__future__.set_swap_module_params_on_conversion(False)
            return module
        for owner, name, value in (
                (torch.cuda, "is_available", lambda: True), (torch.cuda, "_lazy_init", lambda: 0),
                (torch.cuda, "current_device", lambda: 0), (nn.Module, "to", move),
                (torch.Tensor, "pin_memory", pin_memory),
                (torch, "autocast", lambda _, *args, **kwargs: autocast("cpu", *args, **kwargs)),
                (runtime, "generator", lambda *numbers, device=None: generator(*numbers)),
                (clip_grad, "_group_tensors_by_device_and_dtype", lambda *args: {
                    (CUDA, dtype): x for (_, dtype), x in group(*args).items()})):
            self.stack.enter_context(mock.patch.object(owner, name, value))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device=...) copies, as we then see
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        self.stack.close()
        super().__exit__(*error)

    def note(self, kind, what):
        """Counts it for the innermost line of ours, outside of the tests."""
        frame = sys._getframe(1)
        while frame and (frame.f_code.co_filename == __file__
                         or Path(frame.f_code.co_filename).parent != HERE):
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "the tests"
        getattr(self, kind)[f"{what} {place}"] += 1

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = op._schema.name.removeprefix("aten::")
        returns = op._schema.returns
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        fakes = [x for x in tensors if isinstance(x, Fake)]
        others = [x for x in tensors if not isinstance(x, Fake)]
        made = str(kwargs.get("device")).startswith("cuda")
        if not fakes and not made:
            return op(*args, **kwargs)
        indices = []
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple):
            indices = [x for x in args[1] if x is not None]
        if name in ("_to_copy", "copy_"):
            from_cpu = others and tensors[-1] is others[-1]
            free = getattr(tensors[-1], "pinned", False) and (
                kwargs.get("non_blocking") or args[2:] == (True,))
            if others:
                self.note("copies" if free and from_cpu else "waits",
                          "to the GPU" if from_cpu else "to the CPU")
        elif any(x.ndim and not any(x is y for y in indices) for x in others):
            raise RuntimeError(f"{op}: tensors on the CPU and on cuda:0")
        if name in SYNCHRONISE or any(
                x.dtype == torch.bool or not isinstance(x, Fake) for x in indices):
            self.note("waits", name)
        is_view = any(x.alias_info and not x.alias_info.is_write for x in returns)
        if not is_view and "empty" not in name:
            self.note("kernels", name)
        if made:
            kwargs["device"] = torch.device("cpu")
        held = tree_map_only(Fake, lambda x: x.held, (args, kwargs))
        out = op(*held[0], **held[1])
        if op._schema.is_mutable and returns:
            return args[0]
        return tree_map_only(torch.Tensor, Fake, out)


@pytest.mark.parametrize(("kind", "flags", "kernels", "copies"), [
    ("SiT", [], 554, 6),
    ("SiT", ["--teacher", "online", "--guide-share", 0.5, "--clip", 1, "--accum", 2], 1288, 12),
    ("DiT", ["--num-labels", 3, "--t-max", 0.75], 905, 7),
    ("DiT", ["--w-range", 1, 3, "--dtype", "bf16"], 1053, 6)])
def test_training_on_a_gpu_is_that_on_the_cpu(kind, flags, kernels, copies, tmp_path):
    """Resuming and evaluations too. A step of training never waits for the GPU.

    kernels, copies: of a step. More of them are a price to know of: change the numbers if it is.
    """
    flags = ["--eval-samples", 8, "--log-every", 100, "--save-every", 0, *flags]
    counts = []
    for steps in 1, 3, 6:  # resumed twice
        with FakeGPU() as gpu:
            there = train(kind, tmp_path / "gpu", *flags, "--steps", steps)
        counts.append([gpu.waits, gpu.copies, gpu.kernels])
    cpu = train(kind, tmp_path / "cpu", *flags, "--steps", 6)
    for part in "model", "ema", "optimizer":
        same(cpu[part], there[part])
    assert cpu["log"][-1]["fd"] == pytest.approx(there["log"][-1]["fd"])
    found = []
    for three, two in zip(counts[2], counts[1], strict=True):
        three.subtract(two)  # one step is left
        found.append(sum(three.values()))
    assert found == [0, copies, kernels], counts[2]


@pytest.mark.parametrize(("kind", "sampler", "draws"), [
    ("SiT", "euler-maruyama", 1), ("SiT", "euler", 0), ("SiT", "heun", 0), ("DiT", "ddpm", 1),
    ("DiT", "ddim", 0)])
def test_sampling_on_a_gpu_is_that_on_the_cpu(kind, sampler, draws, tmp_path):
    """A step never waits for the GPU, also with CFG in an interval; its draws are pinned."""
    model = random_model(f"{kind}-T/2", in_channels=4)
    vae = tiny_vae(tmp_path)
    seeds = torch.arange(4)
    options = {"sampler": sampler, "cfg": 2.0, "interval": (0.2, 0.7)}
    want = generate(model, seeds, seeds, steps=9, vae=vae, **options)
    with FakeGPU() as gpu:
        model, vae = (copy.deepcopy(x).to("cuda:0") for x in (model, vae))
        counts = []
        for steps in 9, 8:
            gpu.waits.clear()
            gpu.copies.clear()
            got = generate(model, seeds, seeds, steps=steps, vae=vae, **options)
            assert steps == 8 or torch.equal(got, want)
            counts.append((sum(gpu.waits.values()), sum(gpu.copies.values())))
    assert counts[0][0] == counts[1][0] == 3  # the labels, whether all is finite, the images
    assert counts[0][1] - counts[1][1] == draws


@pytest.mark.parametrize("features", ["inception", "classifier"])
def test_scores_on_a_gpu_are_those_on_the_cpu(features, tmp_path, inception_file):
    """No batch waits for the GPU."""
    x, y = digit_samples(4, 30)
    np.savez(tmp_path / "x.npz", arr_0=x, labels=y)
    weights = None if features == "classifier" else inception_file
    reference = "digits" if features == "classifier" else x[::-1]
    options = {"features": features, "weights": weights}
    want = fid.evaluate(tmp_path / "x.npz", reference, **options)
    with FakeGPU() as gpu:
        ref = fid.load_reference(reference, **options)
        counts = []
        for batch in 4, 2:
            gpu.waits.clear()
            assert fid.evaluate(tmp_path / "x.npz", ref, batch=batch) == pytest.approx(want, 1e-5)
            counts.append(sum(gpu.waits.values()))
    assert counts[1] - counts[0] == 0, gpu.waits


def test_latents_made_on_a_gpu_are_those_of_the_cpu(tmp_path):
    folder = image_folder(tmp_path / "images")
    tiny_vae(tmp_path)
    flags = "--vae", tmp_path / "vae", "--batch", 4
    want = prepare(folder, tmp_path / "cpu", *flags)
    with FakeGPU():
        got = prepare(folder, tmp_path / "gpu", *flags)
    np.testing.assert_array_equal(got.images, want.images)


def test_the_fake_gpu_is_strict():
    with FakeGPU() as gpu:
        x = torch.ones(3, device="cuda:0")
        cpu = torch.ones(3)
        assert isinstance(x + torch.tensor(1.0), Fake) and not gpu.waits
        with pytest.raises(RuntimeError, match="on the CPU and on cuda:0"):
            x + cpu
        for act in (lambda: x[x > 0], lambda: x[torch.tensor([0])], lambda: x.sum().item(),
                    lambda: bool(x.any()), lambda: x.nonzero(), lambda: x.cpu(),
                    lambda: cpu.to("cuda:0"), lambda: cpu.to("cuda:0", non_blocking=True),
                    lambda: cpu.pin_memory().to("cuda:0"), lambda: cpu.copy_(x),
                    lambda: torch.tensor([1.0], device="cuda:0"),
                    lambda: torch.as_tensor(1.0, device="cuda:0")):
            gpu.waits.clear()
            act()
            assert sum(gpu.waits.values()) == 1
        gpu.waits.clear()
        cpu.pin_memory().to("cuda:0", non_blocking=True)
        x[torch.tensor([0, 1]).pin_memory().to("cuda:0", non_blocking=True)] += 1
        assert not gpu.waits and sum(gpu.copies.values()) == 2


def test_help_is_quick():
    """Without the libraries that take seconds to import."""
    code = ("import sys, fid, sample, train_sit_mg, toy_mg\n"
            "print({'diffusers', 'sklearn', 'matplotlib'} & {*sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          check=True)
    assert done.stdout == "set()\n"


# ---------------------------------------------------------------- README.md

README = (HERE / "README.md").read_text()


def test_the_readmes_commands_run(tmp_path, monkeypatch, inception_file, capsys):
    """Each of them, in their order, in this process: with small data, networks and numbers."""
    monkeypatch.chdir(tmp_path)
    for folder in "photos", "imagenet/train":
        image_folder(tmp_path / folder, classes=("cat", "dog"))
    vae = tiny_vae(tmp_path)
    monkeypatch.setattr(models, "load_vae", lambda *_: vae)
    monkeypatch.setattr(models, "SIZES", {size: (1, 16, 2) for size in models.SIZES})
    monkeypatch.setattr(nn.Module, "compile", lambda _: None)
    monkeypatch.setattr(toy_mg, "POINTS", 200)
    np.savez("VIRTUAL_imagenet256_labeled.npz", arr_0=np.zeros((5, 16, 16, 3), np.uint8))
    for kind in SCRIPTS:
        state = random_model(f"{kind}-XL/2", 8, 4, 1000).state_dict()
        if kind == "SiT":
            double_channels(state)
        torch.save(state, f"{kind}-XL-2-256x256.pt")
    small = {"train": "--steps 2 --batch 8 --eval-samples 4 --eval-steps 2 --eval-batch 4",
             "sample": "--steps 2 --num-samples 4", "data": "--size 16", "toy": "--steps 2"}
    command = r"^ +(?:pip .* && )?(?:python|torchrun)(?: .*)? (\w+)\.py(.*)$"
    for script, flags in re.findall(command, README, re.MULTILINE):
        argv = [*flags.split(), *small.get(script.split("_")[0], "").split()]
        if script == "fid" and "digits" not in argv or script[:5] == "train" and "--data" in argv:
            argv += ["--weights", inception_file]
        sys.modules[script].main(argv)
    capsys.readouterr()
    assert {"samples.npz", "grid.png", "animals.png", "dit-mg", "fig2.png"} <= set(os.listdir("."))


def readme_code(number, **scope):
    """Runs one of the README's blocks of Python in this scope -> the scope after it."""
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    scope = {"torch": torch, **scope}
    exec(code, scope)  # noqa: S102
    return scope


def test_the_readmes_target_is_mg_losss():
    """The dense form that anyone can paste, and the sampler beside it."""
    torch.manual_seed(0)
    model = random_model()
    ema = random_model(seed=1)
    scope = {"model": model, "ema": ema, "x0": torch.randn(60, 1, 8, 8), "w": 1.7, "steps": 4,
             "y": torch.randint(10, (60,)), "num_classes": 10}
    got = readme_code(0, **scope)
    draws = {key: got[key] for key in ("noise", "dropped")}
    assert 0 < draws["dropped"].sum() < 60
    want = train_sit_mg.mg_loss(model, ema, scope["x0"], scope["y"], 1.7, t=got["t"].flatten(),
                                null=10, **draws)
    torch.testing.assert_close(got["loss"], want.mean())
    torch.manual_seed(3)
    got = readme_code(1, **scope)["x"]
    torch.manual_seed(3)
    net = sample.guided(ema, scope["y"])
    torch.testing.assert_close(got, SAMPLERS["euler"](net, torch.randn(60, 1, 8, 8), 4),
                               rtol=1e-4, atol=1e-5)


def test_the_readmes_four_lines_draw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out/SiT-T-2-digits-w1.5").mkdir(parents=True)
    model = random_model()
    save_random("out/SiT-T-2-digits-w1.5/ckpt.pt", model, "SiT-T/2")
    images = readme_code(4)["images"]
    assert torch.equal(images, sample.generate(model, [3, 7], [0, 1], steps=50))


def test_the_readmes_loop_trains():
    """The loop of one's own: steps of mg_loss, and an average that follows with a warm-up."""
    model = random_model()
    b = batch()
    batches = [(b["x0"], b["y"])] * 2
    want = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    weights = []

    def remember(*_):
        weights.append([p.detach().clone() for p in model.parameters()])
    optimizer.register_step_post_hook(remember)
    scope = readme_code(2, model=model, optimizer=optimizer, batches=batches, num_classes=10)
    assert scope["loss"].isfinite() and not torch.equal(weights[0][0], weights[1][0])
    for decay, new in zip((1 / 10, 2 / 11), weights, strict=True):
        want = [torch.lerp(p, q, 1 - decay) for p, q in zip(want, new, strict=True)]
    torch.testing.assert_close(list(scope["ema"].parameters()), want)


def test_the_readmes_quarter_is_that_of_the_scripts():
    """A quarter of what keeps its label is guided, by the network itself, four times as much."""
    model = random_model()
    draws = batch(n=400)
    scope = readme_code(3, model=model, mg_loss=train_sit_mg.mg_loss, num_classes=10, **draws)
    guide = scope["guide"]
    assert not draws["dropped"][guide].any() and 40 < len(guide) < 110
    x0, y, t, noise, dropped = (draws[key] for key in ("x0", "y", "t", "noise", "dropped"))
    with torch.no_grad():
        x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        out = model(x_t, t, torch.where(dropped, 10, y))
        push = torch.zeros_like(x0)
        push[guide] = (out - model(x_t, t, torch.full_like(y, 10)))[guide] * 0.5 * 4
    want = (out - (noise - x0 + push)).square().mean()
    torch.testing.assert_close(scope["loss"].detach(), want)
