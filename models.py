"""The transformer of DiT and SiT, a small network and a toy distribution in 2-D, the VAE codec, and checkpoints.

`python models.py` prints parameters and GFLOPs of every configuration, and what the paper's training runs cost.
"""
import argparse
import contextlib
import copy
import datetime
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# depth, width, heads (DiT, Table 1; T is ours, for scikit-learn's 8x8 digits)
SIZES = {"T": (4, 64, 4), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
NAMES = [f"{kind}-{size}/{patch}" for kind in ("DiT", "SiT") for size in SIZES for patch in (2, 4, 8)] + ["MLP"]

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # DiT's forward process, t = 0..999
ALPHA_BARS = torch.cumprod(1 - BETAS, 0)


def variational_bound(x0, noise, eps, share, t):
    """What the variance channels learn from, in bits a dimension: (N,). It knows nothing of the guidance.

    x0, noise, eps, share (N, C, H, W), t (N,). eps, the network's noise, fixes the mean; share, -1 to 1, says where log variance
    lies between the posterior's and log beta (improved DDPM, Eq. 15). t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); t = 0:
    -log p of the 8-bit value that x0 stands for, with the exact normal distribution function (ADM's code has a tanh in its place).
    """
    dtype = x0.dtype
    x0, noise, eps, share = (x.double() for x in (x0, noise, eps, share))
    abar, beta = (table.to(x0.device)[t].view(-1, 1, 1, 1) for table in (ALPHA_BARS, BETAS))
    low = beta * (1 - abar / (1 - beta)) / (1 - abar)                                              # the posterior's variance
    low = torch.where(low > 0, low, BETAS[1] * BETAS[0] / (1 - ALPHA_BARS[1])).log()  # at t = 0: that of t = 1
    log_var = low + (share + 1) / 2 * (beta.log() - low)
    off = beta / ((1 - abar) * (1 - beta)).sqrt() * (eps - noise)                                  # mean of q minus mean of p
    kl = 0.5 * (log_var - low - 1 + (low - log_var).exp() + off.square() * (-log_var).exp())

    def below(x):  # P(x_0 < x) under p: at t = 0 the mean of q is x0 itself
        return torch.special.ndtr((x - x0 + off) * (-log_var / 2).exp())
    upper, lower = torch.where(x0 > 0.999, 1, below(x0 + 1 / 255)), torch.where(x0 < -0.999, 0, below(x0 - 1 / 255))
    nll = -(upper - lower).clamp(min=1e-12).log()
    return torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl).mean((1, 2, 3)).to(dtype) / math.log(2)


def create_model(name, *, input_size, in_channels, num_classes, scale_aware=False, empty_class=True, freq_divisor=127,
                 kind="SiT"):
    """The network that `name` stands for, with DiT's initialisation.

    name: "{DiT,SiT}-{T,S,B,L,XL}/{2,4,8}" or "MLP" (points as images of 1x1 pixel; input_size 1).
    input_size, in_channels: of x, that is of the latents where there is a VAE.
    num_classes: real classes; label num_classes is the empty class.
    scale_aware: the network also takes the guidance scale w (Eq. 21).
    empty_class: False reserves no embedding for the empty class (Eq. 23).
    freq_divisor: t is embedded at frequencies 10000^(-i/freq_divisor), i = 0..127. diffusers' DiT has 127, the public
        DiT, SiT and REPA files were trained with 128. New models take 127, so that they can go to diffusers unchanged.
    kind: "DiT" or "SiT", what an MLP is trained as; other names say it themselves.
    ValueError for an unknown name, or an input_size that the patches don't divide.
    """
    if name not in NAMES:
        raise ValueError(f"--model {name}: unknown; known: {', '.join(NAMES)}")
    common = {"input_size": input_size, "in_channels": in_channels, "num_classes": num_classes,
              "scale_aware": scale_aware, "empty_class": empty_class, "freq_divisor": freq_divisor}
    if name == "MLP":
        return MLP(kind=kind, **common)
    kind, size, patch = name.replace("/", "-").split("-")
    if input_size % int(patch):
        raise ValueError(f"--model {name}: needs an input size that {patch} divides, not {input_size} (of the images, or of their latents)")
    depth, width, heads = SIZES[size]
    return Transformer(depth, width, heads, int(patch), kind=kind, learn_sigma=kind == "DiT", **common)


class ScalarEmbedder(nn.Module):
    """t (and w, in scale-aware models) as 256 sines and cosines, then a two-layer network: (N,) -> (N, width)."""

    def __init__(self, width, freq_divisor):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("freqs", frequencies(freq_divisor), persistent=False)  # DiT's files don't have it

    def forward(self, s):
        args = s[:, None].float() * self.freqs
        return self.mlp(torch.cat([args.cos(), args.sin()], 1).to(self.mlp[0].weight.dtype))


def frequencies(divisor):
    """10000^(-i/divisor), i = 0..127, float32."""
    return torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / divisor)


class Conditioning(nn.Module):
    """What every network here has: its public attributes, and c = embed(t) + embed(y) [+ embed(w)].

    ModuleDicts, here and below, are there for the names alone: those of DiT's state dict.
    """

    def __init__(self, width, kind, learn_sigma, input_size, in_channels, num_classes, scale_aware, empty_class,
                 freq_divisor):
        super().__init__()
        self.kind, self.learn_sigma, self.input_size, self.in_channels = kind, learn_sigma, input_size, in_channels
        self.num_classes, self.scale_aware, self.empty_class = num_classes, scale_aware, empty_class
        self.freq_divisor = freq_divisor
        self.t_embedder = ScalarEmbedder(width, freq_divisor)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + empty_class, width)})
        if scale_aware:
            self.w_embedder = ScalarEmbedder(width, freq_divisor)

    def condition(self, t, y, w):
        """t (N,), y (N,), w (N,), number or None -> (N, width). w None is 1: guidance off."""
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        if self.scale_aware:
            w = torch.as_tensor(1.0 if w is None else w, dtype=torch.float32, device=t.device)
            c = c + self.w_embedder(w.expand(len(t)))
        elif w is not None:
            raise ValueError("w is an input of scale-aware models only; this network was trained at one scale")
        return c

    def initialize(self):
        """Everything but the zero-initialised outputs: Xavier for linear layers, N(0, 0.02) for embeddings (DiT)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        if self.scale_aware:  # w has no effect until it is learnt: starts as, or from, a model without it
            nn.init.normal_(self.w_embedder.mlp[0].weight, std=0.02)
            nn.init.zeros_(self.w_embedder.mlp[2].weight)


class Block(nn.Module):
    """A transformer block whose scales, shifts and gates come from the condition, all zero at first (adaLN-Zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)  # (N, 1, D) each
        h = modulate(x, shift1, scale1)                                                            # (N, T, D)
        q, k, v = self.attn.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)       # (N, heads, T, D/heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)                     # (N, T, D)
        x = x + gate1 * self.attn.proj(h)
        h = self.mlp.fc1(modulate(x, shift2, scale2))                                              # (N, T, 4D)
        return x + gate2 * self.mlp.fc2(F.gelu(h, approximate="tanh"))


def modulate(x, shift, scale):
    """LayerNorm without weights of its own, then the condition's: (N, T, D), (N, 1, D), (N, 1, D) -> (N, T, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Transformer(Conditioning):
    """DiT (Peebles & Xie 2023); SiT (Ma et al. 2024) is the same network without the variance channels.

    forward(x, t, y, w=None): x (N, C, H, W); t (N,), DiT: integers 0..999, SiT: [0, 1], larger is noisier in both;
    y (N,) int64, num_classes is the empty class; w (N,) or number, scale-aware models only.
    -> DiT (N, 2C, H, W): eps, then the variance interpolation; SiT (N, C, H, W): v = eps - x_0.
    """
    recompute = False  # True: the backward pass computes every block's activations anew, instead of their being kept

    def __init__(self, depth, width, heads, patch, **common):
        super().__init__(width, **common)
        self.patch = patch
        self.out_channels = self.in_channels * (2 if self.learn_sigma else 1)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(self.in_channels, width, patch, stride=patch)})
        self.register_buffer("pos_embed", position_embedding(width, self.input_size // patch))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict({
            "linear": nn.Linear(width, patch * patch * self.out_channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))})
        self.initialize()
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a view: as the linear layer that it is
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1],
                                                                           self.final_layer.linear]:
            nn.init.zeros_(layer.weight)

    def forward(self, x, t, y, w=None):
        height, width = x.shape[2] // self.patch, x.shape[3] // self.patch
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed                    # (N, T, D)
        c = self.condition(t, y, w)                                                                # (N, D)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = recomputed(block, x, c, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
            else:
                x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        x = self.final_layer.linear(modulate(x, shift, scale))                                     # (N, T, patch*patch*C)
        x = x.unflatten(1, (height, width)).unflatten(3, (self.patch, self.patch, self.out_channels))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)                             # (N, C, H, W)


def position_embedding(width, grid):
    """Fixed 2-D sines and cosines, column then row (MAE's order): (1, grid*grid, width) float32."""
    freqs = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * freqs                              # (grid, width/4)
    table = torch.cat([angles.sin(), angles.cos()], 1)                                             # (grid, width/2)
    return torch.cat([table.repeat(grid, 1), table.repeat_interleave(grid, 0)], 1).float()[None]


class MLP(Conditioning):
    """For 2-D points, x (N, 2, 1, 1) -> (N, 2, 1, 1), or tiny images: three hidden layers of 128. t as the training script gives it."""

    def __init__(self, width=128, **common):
        super().__init__(width, learn_sigma=False, **common)
        self.inp = nn.Linear(self.in_channels * self.input_size ** 2, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, self.inp.in_features)
        self.initialize()

    def forward(self, x, t, y, w=None):
        c = self.condition(t, y, w)
        h = self.inp(x.flatten(1))
        for layer in self.hidden:
            h = F.silu(layer(h + c))
        return self.out(h).view_as(x)


# ---------------------------------------------------------------- the 2-D grid of Fig. 2
# A 4x4 chessboard of unit cells on [-2, 2]^2. Its two colours are the classes: x_0 is uniform in the cells (i, j) with
# (i + j) % 2 = class. A point is an image of 1x1 pixel with two channels. Label 2, the empty class, stands for both.

def grid_cells(y):
    """Which of the 4x4 cells belong to labels y (N,): (N, 4, 4) bool."""
    colour = torch.arange(4)[:, None] + torch.arange(4)
    return (colour % 2 == y.view(-1, 1, 1)) | (y.view(-1, 1, 1) == 2)


def grid_data(num=100_000, seed=0):
    """A Dataset of (x_0 (2, 1, 1) float32, class), exact draws, as many of each class; .classes names them."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num) % 2
    i, j = (torch.randint(high, (num,), generator=generator) for high in (4, 2))
    corner = torch.stack([i, 2 * j + (i + y) % 2], 1)                                              # (num, 2)
    x = corner - 2 + torch.rand(num, 2, generator=generator)
    data = torch.utils.data.TensorDataset(x[..., None, None], y)
    data.classes = ["even", "odd"]
    return data


def grid_scores(x, y):
    """{"outliers", "coverage"} of points x (N, 2) that were asked for as y (N,) in 0..2.

    outliers: the share outside the cells of the asked class (of 2: outside the board). coverage: of the 8x8 sub-cells of each
    cell of each asked class, the share that holds at least half as many points as exact draws would put there on average.
    Some 20 points a sub-cell (20,000 of two classes) make it steady: exact draws then have .99.
    """
    place = ((x + 2) * 8).floor().long()                                                           # of 32x32 sub-cells
    inside = ((place >= 0) & (place < 32)).all(1)
    i, j = place.clamp(0, 31).unbind(1)
    inside &= grid_cells(y)[torch.arange(len(x)), i // 8, j // 8]
    covered, total = 0, 0
    for label in y.unique():
        own = grid_cells(label).sum().item() * 64
        here = inside & (y == label)
        counts = torch.bincount(i[here] * 32 + j[here], minlength=32 * 32)
        covered, total = covered + int((counts >= (y == label).sum() / own / 2).sum()), total + own
    return {"outliers": 1 - inside.double().mean().item(), "coverage": covered / total}


# ---------------------------------------------------------------- the VAE codec

def load_vae(name, device="cpu"):
    """diffusers' AutoencoderKL from a hub name or a local folder, frozen. ValueError if it can't be had."""
    from diffusers import AutoencoderKL
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # the error says it
    try:
        vae = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)
    except (OSError, ValueError) as e:
        raise ValueError(f"--vae {name}: no folder of an AutoencoderKL, and not to be had from the hub; give such a folder, or none "
                         f"({str(e).strip().splitlines()[0]})") from None
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode(vae, images):
    """(N, 3, H, W) in [-1, 1] -> mean and std (N, c, h, w) of the scaled latents; a latent is mean + std * normal."""
    posterior = vae.encode(images).latent_dist
    return posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor


@torch.no_grad()
def decode(vae, latents):
    """Scaled latents (N, c, h, w) -> images (N, 3, H, W), about [-1, 1]."""
    return vae.decode(latents / vae.config.scaling_factor).sample


class Latents(Dataset):
    """A folder with mean and std of every image's scaled latents, plain and flipped: encoded once, then trained from.

    ds[[i, ...]] -> (float16 (N, 2 plain or flipped, 2 mean or std, c, h, w), int64 labels (N,)), once fill() has been called.
    In it: latents.json, what the numbers depend on; latents.npy, the numbers; and, until all are there, done/, a file a chunk.

    images: fid.real_images of a folder; vae, name: the VAE and what the user calls it; shape: (c, h, w). Writes nothing.
    ValueError of one line for a folder that was made otherwise, isn't whole, isn't a cache, or doesn't fit on the disk.
    """
    CHUNK = 32  # images encoded together, by whichever process: the bytes depend on the images alone

    def __init__(self, folder, images, vae, name, shape):
        self.folder, self.labels, self.complete = Path(folder), torch.tensor(images.labels), False
        weights, files = hashlib.sha256(), hashlib.sha256()
        for key, value in vae.state_dict().items():
            weights.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
        for path in images.images:
            files.update(os.fsencode(path[len(images.data):].lstrip(os.sep)) + b"\0")
        for path in images.images[::-(-len(images) // 1000)]:  # and not all contents: to read 1.28 million files takes too long
            files.update(hashlib.sha256(Path(path).read_bytes()).digest())
        self.header = {"vae": name, "vae_sha256": weights.hexdigest(), "scale": vae.config.scaling_factor, "size": images.size,
                       "crop": "ADM's, centre", "flips": "plain, flipped", "values": "mean, std", "dtype": "float16",
                       "count": len(images), "shape": [len(images), 2, 2, *shape], "classes": images.classes,
                       "files_sha256": files.hexdigest()}
        there = os.listdir(folder) if self.folder.exists() else []
        if "latents.json" in there:
            self.compare()
        elif set(there) - {"latents.json.tmp"}:
            raise ValueError(f"--latents {folder}: has files in it that are no latents; give a new or empty folder")
        if self.complete or "latents.npy" in there:
            self.open()
        size = math.prod(self.header["shape"]) * 2
        if "latents.npy" in there:
            size -= (self.folder / "latents.npy").stat().st_blocks * 512  # of a file with holes, what isn't one
        free = shutil.disk_usage(next(near for near in (self.folder, *self.folder.absolute().parents) if near.exists())).free
        if not self.complete and size > free:
            raise ValueError(f"--latents {folder}: {size / 1e9:.3g} GB are to be written, and {free / 1e9:.3g} are free there; "
                             f"give a folder on another disk, or leave it out")

    def compare(self):
        """ValueError naming both values where latents.json and this run differ."""
        try:
            there = json.loads((self.folder / "latents.json").read_text())
            self.complete = there["complete"]
            for key, here in self.header.items():
                made = there[key]
                if made == here or (key == "vae" and there["vae_sha256"] == self.header["vae_sha256"]):  # or by another name
                    continue
                if isinstance(here, list):  # the first that differs
                    made, here = next(pair for pair in itertools.zip_longest(made, here) if pair[0] != pair[1])
                what = f"{key} {made}, not {here}" + (", of other images" if key == "files_sha256" else "")
                raise ValueError(f"--latents {self.folder} was made with {what}: give another folder, or delete it")
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"--latents {self.folder}: its latents.json is not of this project; give another folder") from None

    def open(self):
        """latents.npy, memory-mapped. ValueError if it isn't whole."""
        with contextlib.suppress(OSError, ValueError, EOFError):
            latents = np.load(self.folder / "latents.npy", mmap_mode="r")
            if [*latents.shape] == self.header["shape"] and latents.dtype == np.float16:
                return latents
        raise ValueError(f"--latents {self.folder}: its latents.npy is missing, truncated or another's; delete the folder")

    def fill(self, images, vae, workers):
        """Encodes what isn't there yet, chunk k in process k % world. Stopped at any moment, it goes on where it was.

        All processes call it; it returns when the last one is through. ValueError, in one of them, for an unreadable image.
        """
        if self.complete:
            return
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # the default one would give up on the slowest process after half an hour; this one sees at once that one has ended
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(weeks=4)) if dist.is_initialized() else None

        def barrier():
            try:
                if group:
                    dist.barrier(group)
            except RuntimeError:
                raise ValueError(f"--latents {self.folder}: another process has ended; the same command again goes on") from None
        done, file, count = self.folder / "done", self.folder / "latents.npy", len(images)
        barrier()  # every process has looked into the folder
        if rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "latents.json", self.header | {"complete": self.complete})
            if not file.exists():
                shutil.rmtree(done, ignore_errors=True)
                with atomic(file) as f:
                    np.lib.format.write_array_header_1_0(f, {"descr": "<f2", "fortran_order": False, "shape": tuple(self.header["shape"])})
                    f.truncate(f.tell() + math.prod(self.header["shape"]) * 2)  # holes, until they are written
            done.mkdir(exist_ok=True)
        barrier()
        start, marks = self.open().offset, {int(name) for name in os.listdir(done)}
        chunks = {k: range(k * self.CHUNK, min((k + 1) * self.CHUNK, count)) for k in range(-(-count // self.CHUNK))}
        todo = [k for k in chunks if k not in marks and k % world == rank]
        data = DataLoader(images, batch_sampler=[chunks[k] for k in todo], num_workers=workers, pin_memory=vae.device.type == "cuda")
        bar = tqdm(total=count, initial=sum(len(chunks[k]) for k in marks), desc=f"latents into {self.folder}", unit="img",
                   disable=rank > 0)
        try:  # written, not mapped: a full disk is then an error and not a signal
            with bar, os.fdopen(os.open(file, os.O_WRONLY), "wb") as f:
                for k, (x, _) in zip(todo, data, strict=True):
                    x = x.to(vae.device, non_blocking=True).float() / 127.5 - 1
                    both = torch.stack([torch.stack(encode(vae, v), 1) for v in (x, x.flip(-1))], 1)      # (N, 2, 2, c, h, w)
                    f.seek(start + chunks[k].start * both[0].numel() * 2)
                    f.write(both.half().cpu().numpy().tobytes())
                    f.flush()
                    os.fsync(f.fileno())
                    (done / str(k)).touch()  # not before the numbers are on the disk
                    bar.update(min(len(x) * world, count - bar.n))
        except ValueError as e:  # of an image; a worker's has its traceback in it
            raise ValueError(str(e).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
        except OSError as e:
            raise ValueError(f"--latents {self.folder}: {e}; the same command again goes on") from None
        barrier()
        self.complete = True
        if rank == 0:
            write_json(self.folder / "latents.json", self.header | {"complete": self.complete})
            shutil.rmtree(done)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.from_numpy(self.open()[index]), self.labels[index]  # opened here: workers get a path, not 42 GB


# ---------------------------------------------------------------- checkpoints
# Ours: {"config": plain values, "step": int, "model": state dict, "ema": state dict, "optimizer": state dict, "window": losses
# since the last row of log.csv, and with --w auto "auto": {"w", "score"}}.

@contextlib.contextmanager
def atomic(path):
    """A binary file to write, which is either whole and on the disk or not there: temporary name, fsync, rename.

    OSError of one line that names the file if that fails, a full disk for one; an earlier file of that name then stays.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save makes the latter of the former
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError) or cause.filename:
            raise
        raise OSError(f"{path} can't be written: {cause.strerror or cause}") from None
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, is on the disk
        finally:
            os.close(folder)


def command_line(description):
    """The ArgumentParser of every script: text as it stands, wide help, no abbreviated flags.

    Under torchrun every process would complain of the same flag: a node's first one does, and torchrun ends the others.
    """
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS, allow_abbrev=False, formatter_class=lambda prog:
                                     argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=120))

    def error(_):
        time.sleep(30)
        parser.exit(2)
    if int(os.environ.get("LOCAL_RANK", "0")):
        parser.error = error
    return parser


def run(main):
    """main() of a script. Under torchrun the process then ends at once: at an orderly exit gloo's threads abort one in ten."""
    status = 0
    try:
        main()
    except SystemExit as e:
        status = e.code
        if "RANK" not in os.environ:
            raise
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def write_json(path, value):
    with atomic(path) as f:
        f.write((json.dumps(value, indent=1) + "\n").encode())


def previous(path):
    """Where save_checkpoint() keeps the file that was at path before: ckpt.pt -> ckpt-prev.pt."""
    return Path(path).with_stem(f"{Path(path).stem}-prev")


def save_checkpoint(path, state):
    """Writes a dict that read_checkpoint() reads, and keeps the file before it: see previous(). OSError as of atomic().

    Whenever it is interrupted, there is a whole file at path or at previous(path).
    """
    second = Path(f"{previous(path)}.tmp")
    second.unlink(missing_ok=True)
    if Path(path).exists():
        try:
            os.link(path, second)
        except OSError:  # a file system without links: for a moment there is the previous one alone
            os.replace(path, previous(path))
    try:
        with atomic(path) as f:
            torch.save(state, f)
        if second.exists():
            os.replace(second, previous(path))
    finally:
        second.unlink(missing_ok=True)


def read_checkpoint(path):
    """The file as tensors and plain values; no code in it is run. ValueError of one line if that is impossible.

    torch.load() doesn't look at the checksums of a file, so a flipped bit would go on to live in the weights: this does.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else contextlib.nullcontext() as archive:
            corrupt = archive and archive.testzip()
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, LookupError, ValueError, zlib.error, struct.error):
        corrupt = True
    if corrupt:
        raise ValueError(f"{path}: corrupt, its checksums are wrong; delete it, or copy it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():  # DiT's training script pickles its flags
            warnings.simplefilter("ignore")  # of a pickle protocol that it is about to refuse
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: not a checkpoint, or one with code in its pickle, which is never run") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error):
        raise ValueError(f"{path}: truncated, or not a checkpoint; delete it, or copy it again") from None


def read_last(path):
    """What a run goes on from, the file at path or, where that is corrupt, the one before it: (dict, its file, warning or None).

    Without a file (None, None, None). ValueError if neither can be read, or it is not of a training run.
    """
    files = [file for file in (path, previous(path)) if file.exists()]
    if not files:
        return None, None, None
    try:
        checkpoint, source, warning = read_checkpoint(files[0]), files[0], None
    except ValueError as e:
        if len(files) == 1:
            raise
        checkpoint, source, warning = read_checkpoint(files[1]), files[1], f"warning: {e}; going on from the one before, {files[1]}"
    whole = isinstance(checkpoint, dict) and {"config", "step", "model", "ema", "optimizer"} <= set(checkpoint)
    if not whole or not isinstance(checkpoint["config"], dict):
        raise ValueError(f"--out {path.parent}: its ckpt.pt is not of this project; give another --out")
    return checkpoint, source, warning


def load_checkpoint(path, *, weights="ema", device="cpu"):
    """A network ready to sample with, and the configuration that it was trained with: (model in eval mode, dict).

    path: our ckpt.pt; a public file of DiT, SiT, REPA or MG (see from_public); or a folder that diffusers' DiTPipeline loads.
    weights: "ema" or "model". ValueError of one line for a file that is missing, torn, foreign or unsafe.
    """
    if Path(path).is_dir():
        state, config = from_diffusers(Path(path))
    else:
        checkpoint = read_checkpoint(path)
        try:
            if "config" in checkpoint and weights in checkpoint:
                state, config = checkpoint[weights], checkpoint["config"] | {"step": checkpoint["step"]}
                if "auto" in checkpoint:
                    config["w"] = checkpoint["auto"]["w"]
            else:
                state, config = from_public(checkpoint, weights, path)
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError):
            raise ValueError(f"{path}: not a checkpoint of this project, DiT, SiT, REPA or MG") from None
    keys = "input_size", "in_channels", "num_classes", "scale_aware", "empty_class", "freq_divisor", "kind"
    try:
        with torch.device("meta"):  # no time lost on an initialisation that is then overwritten
            model = create_model(config["model"], **{key: config[key] for key in keys})
        model.load_state_dict(state, assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{path}: not a whole checkpoint ({str(e).strip().splitlines()[-1].strip()[:200]})") from None
    for embedder in model.modules():
        if isinstance(embedder, ScalarEmbedder):
            embedder.freqs = frequencies(model.freq_divisor)  # the one thing that isn't in the file
    return model.float().to(device).eval().requires_grad_(True), config


def size_name(depth, width, path):
    """Which of SIZES that is. ValueError if none."""
    for name, (d, w, _) in SIZES.items():
        if (d, w) == (depth, width):
            return name
    raise ValueError(f"{path}: {depth} blocks of width {width} are no known size")


def from_public(checkpoint, weights, path):
    """The state dict and configuration of a public file; sizes are read from the tensors, DiT or SiT from the file's name.

    DiT's and SiT's files are bare state dicts, their training scripts write {"model", "ema", "opt", "args"}, REPA and MG
    {"ema", ...}. REPA's and MG's SiT have our convention and no second half of the channels. SiT's own have both otherwise:
    its t runs from noise to data, t' = 1 - t, and its v' = x_0 - eps = -v. Both are linear in a weight, so the weights are
    changed here and nothing else needs to know.
    """
    nested = isinstance(checkpoint.get("ema"), dict)
    state = checkpoint.get(weights) if nested else checkpoint
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: not a checkpoint with {weights} weights")
    state = {key: value for key, value in state.items() if not key.startswith("projectors.")}  # REPA's alignment heads
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens, rows = state["pos_embed"].shape[1], len(state["y_embedder.embedding_table.weight"])
        halves = len(state["final_layer.linear.weight"]) / (patch ** 2 * channels)
    except (KeyError, ValueError):
        raise ValueError(f"{path}: not a checkpoint of DiT, SiT, REPA or MG") from None
    size = size_name(sum(key.endswith(".attn.qkv.weight") for key in state), width, path)
    if halves not in (1, 2):
        raise ValueError(f"{path}: {halves:g} times as many output channels as input channels is neither DiT's nor SiT's")
    hint = f"{getattr(checkpoint.get('args'), 'model', '') if nested else ''} {Path(path).name}".lower()
    kinds = [kind for kind in ("DiT", "SiT") if re.search(rf"(?<![a-z]){kind.lower()}", hint)] if halves == 2 else ["SiT"]
    if len(kinds) != 1:
        raise ValueError(f"{path}: DiT's and SiT's files look alike; have exactly one of DiT and SiT in the file's name")
    if kinds[0] == "SiT" and halves == 2:
        freqs = frequencies(128)
        cos, sin = state["t_embedder.mlp.0.weight"].float().chunk(2, 1)                            # (D, 128) each
        # cos f(1-t) = cos f cos ft + sin f sin ft, and sin f(1-t) = sin f cos ft - cos f sin ft
        turned = torch.cat([cos * freqs.cos() + sin * freqs.sin(), cos * freqs.sin() - sin * freqs.cos()], 1)
        keep = torch.arange(2 * channels * patch ** 2).view(patch ** 2, 2, channels)[:, 0].flatten()  # not the unused half
        state = state | {"t_embedder.mlp.0.weight": turned} | {
            f"final_layer.linear.{name}": -state[f"final_layer.linear.{name}"][keep] for name in ("weight", "bias")}
    return state, {"model": f"{kinds[0]}-{size}/{patch}", "kind": kinds[0], "input_size": round(tokens ** 0.5) * patch,
                   "in_channels": channels, "num_classes": rows - 1, "empty_class": True, "scale_aware": False,
                   "freq_divisor": 128, "vae": "stabilityai/sd-vae-ft-ema" if channels == 4 else "none", "w": None,
                   "step": None}


def initialize_from(path, name, kwargs):
    """create_model(name, **kwargs) with the weights of a checkpoint where they fit: (model, what to warn of or None).

    The label table may have other classes, and the w input may be new; everything else must be there in the right shape, or
    it is a ValueError. kwargs["freq_divisor"] becomes what the weights were trained with.
    """
    source, config = load_checkpoint(path)
    kwargs["freq_divisor"] = source.freq_divisor
    model = create_model(name, **kwargs)
    state, here, notes = source.state_dict(), model.state_dict(), []
    table = "y_embedder.embedding_table.weight"
    old, new = state[table], here[table]
    if source.kind != kwargs["kind"]:
        raise ValueError(f"--init {path}: this is a {source.kind} {config['model']}, and this script trains {kwargs['kind']}")
    n, ours = model.num_classes, "drop" in config
    if source.num_classes == n and model.empty_class <= source.empty_class:
        state[table] = old[:len(new)]
        if config.get("drop") == 0 and model.empty_class:
            notes.append(f"{path} was trained with --drop 0")
    elif len(old) == n and (not ours or source.num_classes == n):  # one row a class and no more
        state[table] = torch.cat([old, new[n:]])
        notes.append(f"{path} has no empty class")
    else:
        del state[table]
        notes.append(f"{path} has {source.num_classes} classes, not {n}: the label table starts anew")
    if source.scale_aware and not model.scale_aware:
        state["t_embedder.mlp.2.bias"] += source.w_embedder(torch.ones(1))[0].detach()  # what w = 1 adds, for good
    for key, _ in sorted({(key, value.shape) for key, value in here.items()} ^ {(key, value.shape) for key, value in state.items()}):
        if key != table and not key.startswith("w_embedder."):
            raise ValueError(f"--init {path}: {config['model']} for {source.in_channels}x{source.input_size}x{source.input_size} "
                             f"doesn't fit {name} for {model.in_channels}x{model.input_size}x{model.input_size} ({key})")
    model.load_state_dict(here | {key: value for key, value in state.items() if key in here})
    if notes and model.empty_class:
        notes.append("guidance needs a trained empty class: give --start some thousand steps of plain training first")
    return model, "warning: " + "; ".join(notes) if notes else None


# ---------------------------------------------------------------- to and from diffusers' DiTPipeline

def diffusers_names(depth):
    """[(our layer, its names there, which third of it)]: linear layers, with a weight and a bias each."""
    embedder = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_{}"  # a copy in every block
    pairs = [("x_embedder.proj", ["pos_embed.proj"], None), ("final_layer.linear", ["proj_out_2"], None),
             ("final_layer.adaLN_modulation.1", ["proj_out_1"], None),
             ("t_embedder.mlp.0", [embedder.format(i, 1) for i in range(depth)], None),
             ("t_embedder.mlp.2", [embedder.format(i, 2) for i in range(depth)], None)]
    for i in range(depth):
        pairs += [(f"blocks.{i}.{ours}", [f"transformer_blocks.{i}.{theirs}"], third) for ours, theirs, third in (
            ("adaLN_modulation.1", "norm1.linear", None), ("attn.qkv", "attn1.to_q", 0), ("attn.qkv", "attn1.to_k", 1),
            ("attn.qkv", "attn1.to_v", 2), ("attn.proj", "attn1.to_out.0", None), ("mlp.fc1", "ff.net.0.proj", None),
            ("mlp.fc2", "ff.net.2", None))]
    return pairs


def save_diffusers(model, config, vae, folder):
    """Writes a folder that `diffusers.DiTPipeline.from_pretrained(folder)` loads, with DDIM as in sample.py.

    ValueError where diffusers has no such network or pipeline: it can't do without a VAE.
    """
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    if model.kind != "DiT" or not isinstance(model, Transformer) or model.scale_aware or not model.empty_class:
        raise ValueError(f"--to-diffusers {folder}: diffusers' DiTPipeline takes a DiT with an empty class and no w input")
    if vae is None:
        raise ValueError(f"--to-diffusers {folder}: this checkpoint works on pixels, and DiTPipeline ends with a VAE; give --vae")
    if Path(folder).exists():
        raise ValueError(f"--to-diffusers {folder}: exists already; name a new folder")
    state, depth, heads = model.state_dict(), len(model.blocks), model.blocks[0].heads
    transformer = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=state["pos_embed"].shape[2] // heads, in_channels=model.in_channels,
        out_channels=model.out_channels, num_layers=depth, sample_size=model.input_size, patch_size=model.patch,
        num_embeds_ada_norm=model.num_classes, norm_eps=1e-6)
    new = {f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight":
           state["y_embedder.embedding_table.weight"] for i in range(depth)}
    for ours, names, third in diffusers_names(depth):
        for part in "weight", "bias":
            value = state[f"{ours}.{part}"]
            new |= {f"{name}.{part}": value if third is None else value.chunk(3)[third] for name in names}
    transformer.load_state_dict(new)
    scheduler = DDIMScheduler(1000, float(BETAS[0]), float(BETAS[-1]), "linear", clip_sample=False, timestep_spacing="trailing")
    temporary = Path(folder).with_name(f"{Path(folder).name}.tmp")
    DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler).save_pretrained(temporary)
    (temporary / "mg.json").write_text(json.dumps(config, indent=1) + "\n")
    os.replace(temporary, folder)


def from_diffusers(folder):
    """The state dict and configuration of such a folder, ours (with its mg.json) or anybody's."""
    from diffusers import DiTTransformer2DModel
    try:
        if not (folder / "transformer").is_dir():
            raise OSError
        transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer", use_safetensors=True,
                                                              local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError):
        raise ValueError(f"{folder}: not a folder of diffusers' DiTPipeline with transformer/*.safetensors") from None
    there, size = transformer.state_dict(), transformer.config
    state = {"y_embedder.embedding_table.weight": there["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"],
             "pos_embed": position_embedding(transformer.inner_dim, size.sample_size // size.patch_size)}
    for ours, names, third in diffusers_names(size.num_layers):
        for part in "weight", "bias":
            parts = [state[f"{ours}.{part}"]] if third else []
            state[f"{ours}.{part}"] = torch.cat([*parts, there[f"{names[0]}.{part}"]])
    name = size_name(size.num_layers, transformer.inner_dim, folder)
    config = {"model": f"DiT-{name}/{size.patch_size}", "kind": "DiT", "input_size": size.sample_size,
              "in_channels": size.in_channels, "num_classes": size.num_embeds_ada_norm, "empty_class": True,
              "scale_aware": False, "freq_divisor": 128, "w": None, "step": None}  # others' are conversions of DiT's files
    if (folder / "mg.json").exists():
        config = json.loads((folder / "mg.json").read_text())
    return state, config | {"vae": str(folder / "vae") if (folder / "vae").is_dir() else "none"}


# ---------------------------------------------------------------- what it costs

def flops(model):
    """Floating-point operations of one image's forward pass, two for a multiply-add. Nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode
    model = copy.deepcopy(model).to("meta")
    x = torch.empty(1, model.in_channels, model.input_size, model.input_size, device="meta")
    y = torch.empty(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, torch.empty(1, device="meta"), y)
    return counter.get_total_flops()


def main():
    print("| model | parameters (M) | GFLOPs a pass (multiply-adds; 32x32x4 latents of 256x256 images, T: 8x8 digits, MLP: points) |\n"
          "|---|---|---|")
    a_pass = {}
    for name in NAMES:
        size, channels, classes = (1, 2, 2) if name == "MLP" else (8, 1, 10) if "-T/" in name else (32, 4, 1000)
        with torch.device("meta"):
            model = create_model(name, input_size=size, in_channels=channels, num_classes=classes)
        parameters = sum(p.numel() for p in [*model.parameters(), *model.buffers()]) - 128  # DiT counts the positions, not freqs
        a_pass[name] = flops(model)
        gflops = a_pass[name] / 2e9
        print(f"| {name} | {parameters / 1e6:.2f} | {gflops:.{2 if gflops > 0.1 else 4}f} |")
    print("\nComputed, not measured: GPU-hours of the runs of the paper's Table 7 and of a 7M-step one, batch 256, on A100s at\n"
          "40 % of their 312 TFLOP/s (bf16). The teacher sees the 90 % that keep their label; SiT's with --t-max 0.75.\n"
          "Without the VAE and evaluations.\n\n| model | plain | +MG | ratio |\n|---|---|---|---|")
    for steps, names in (400_000, ("B/2", "L/2", "XL/2")), (7_000_000, ("XL/2",)):
        for name in [f"{kind}-{size}" for kind in ("DiT", "SiT") for size in names]:
            kept = 0.9 * (0.75 if name[0] == "S" else 1)
            passes = 3, 3 + 2 * kept  # the student's forward pass and its backward pass, worth two; the teacher's, with label and without
            plain, guided = (steps * 256 * a_pass[name] * n / (0.4 * 312e12) / 3600 for n in passes)
            print(f"| {name}, {steps:,} steps | {plain:.0f} | {guided:.0f} | {guided / plain:.2f} |")


if __name__ == "__main__":
    command_line(__doc__).parse_args()
    main()
