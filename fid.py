"""FID, sFID, Inception Score, precision and recall as ADM's TensorFlow evaluator (openai/guided-diffusion) defines them.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz     # an ADM reference; or any .npz or folder of images
    python fid.py samples.npz digits                              # scikit-learn's digits, in a small CNN's features
    torchrun --nproc_per_node 8 fid.py a.npz b.npz reference.npz  # the images split over the ranks, the same figures

Images are uint8, HWC in files and CHW in tensors. Under torch.distributed a file is split over the ranks as rows
rank::world, an array *is* this rank's rows rank::world, and every rank gets the same figures.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MANIFOLD = 10_000  # images of the reference used for precision and recall, and kept in a saved one (ADM)
SPLIT = 5_000      # images in a split of the Inception Score (ADM)

# ---------------------------------------------------------------- images: digits, folders, .npz


@contextmanager
def open_image(path):
    from PIL import Image
    try:
        with Image.open(path) as image:
            yield image
    except Exception as e:  # noqa: BLE001  whatever a decoder does with a broken file
        raise ValueError(f"{path}: unreadable image ({e}); remove or replace it") from None


def read_rgb(path):
    """Image file of any mode -> PIL image, RGB. Alpha is dropped, as ADM does. ValueError names an unreadable file."""
    from PIL import Image
    with open_image(path) as image:
        if image.mode.startswith("I"):  # 16 bits: PIL's own conversion clips at 255
            image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")  # a palette may hold transparency


def list_images(folder):
    """All image files under folder, sorted; what starts with a dot is skipped."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [os.path.join(root, f) for f in files if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
    return sorted(found)


class real_images(torch.utils.data.Dataset):
    """Real images with labels: ds[i] -> (uint8 (C, H, W), int label); ds.classes: the names, in the labels' order.

    data: "digits" (scikit-learn's 1797 scans, C 1, size 8), or a folder that holds one folder of images a class: any
    mode to RGB, ADM's centre crop to (3, size, size). ValueError: one line that names the folder or unreadable file.
    """

    def __init__(self, data, size=None):
        self.data, self.size = os.fspath(data), size
        if self.data == "digits":
            if size not in (None, 8):
                raise ValueError(f"digits are images of 8x8 pixels, not {size}x{size}: use size 8")
            from sklearn.datasets import load_digits
            digits = load_digits()  # values 0..16
            self.images = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8))[:, None]
            self.labels, self.classes = digits.target.tolist(), [str(c) for c in range(10)]
            return
        if not os.path.isdir(self.data):
            raise ValueError(f"{data}: no such folder; give digits or a folder that holds one folder of images a class")
        if not size or size < 1:
            raise ValueError(f"{data}: images from a folder need a size of at least 1 pixel to crop to, not {size}")
        folders = sorted(f.name for f in os.scandir(self.data) if f.is_dir() and not f.name.startswith("."))
        files = {name: list_images(os.path.join(self.data, name)) for name in folders}
        self.classes = [name for name in folders if files[name]]
        if not self.classes:
            raise ValueError(f"{data}: no class folders with images in it; put the images into one folder a class")
        self.images = [path for name in self.classes for path in files[name]]
        self.labels = [label for label, name in enumerate(self.classes) for _ in files[name]]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        if self.data == "digits":
            return self.images[i], self.labels[i]
        from PIL import Image
        x, size = read_rgb(self.images[i]), self.size
        while min(x.size) >= 2 * size:
            x = x.resize((x.width // 2, x.height // 2), Image.BOX)
        scale = size / min(x.size)
        x = np.array(x.resize((round(x.width * scale), round(x.height * scale)), Image.BICUBIC))
        top, left = (x.shape[0] - size) // 2, (x.shape[1] - size) // 2
        return torch.from_numpy(x[top:top + size, left:left + size]).permute(2, 0, 1).contiguous(), self.labels[i]


def npz_keys(path):
    """Names of the arrays in an .npz; none if it is not one."""
    try:
        with zipfile.ZipFile(path) as z:
            return [name.removesuffix(".npy") for name in z.namelist()]
    except (OSError, zipfile.BadZipFile):
        return []


@contextmanager
def open_npz(path, key):
    """(file at the first value, shape, dtype) of one array, to be read in pieces. Nothing is ever unpickled."""
    try:
        with zipfile.ZipFile(path) as z:
            if key not in npz_keys(path):
                raise ValueError(f"has no {key} but {', '.join(npz_keys(path)[:6]) or 'nothing'}; images are in "
                                 "arr_0, statistics in mu, sigma, mu_s and sigma_s")
            with z.open(f"{key}.npy") as f:
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = header[np.lib.format.read_magic(f)](f)
                if dtype.hasobject:
                    raise ValueError(f"{key} holds Python objects, which are never unpickled; save plain numbers")
                if fortran and len(shape) > 1:
                    raise ValueError(f"{key} is in Fortran order; save np.ascontiguousarray of it")
                if z.getinfo(f"{key}.npy").file_size - f.tell() != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{key} is truncated; make the file again")
                yield f, shape, dtype
    except (ValueError, KeyError) as e:
        raise ValueError(f"{path}: {e}") from None
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path}: not an .npz, or a truncated one ({e}); make the file again") from None


def read_npz(path, key):
    with open_npz(path, key) as (f, shape, dtype):
        return np.frombuffer(f.read(), dtype).reshape(shape)


def open_images(data, size=None):
    """A set of images, of which only the headers are read: namespace(name, count, shape (H, W, C), local, read).

    data: an .npz with arr_0 uint8 (N, H, W, C); a folder of images, searched through; "digits"; or an array like arr_0,
    whose rows and count are this rank's (local). With size, a folder with images only in its folders is real data:
    centre-cropped to size x size and in a fixed random order. ValueError: one line that names the file.
    read(batch, rank, ranks, stop) yields (indices (b,), uint8 (b, H, W, C)): rows rank::ranks below stop, in order.
    """
    local = not isinstance(data, (str, os.PathLike))
    name, dtype = "samples" if local else os.fspath(data), "uint8"
    if local:
        array = data.cpu().numpy() if isinstance(data, torch.Tensor) else np.asarray(data)
        (count, *shape), dtype = array.shape or [0], array.dtype

        def read(batch, rank, ranks, stop):
            rows = torch.arange(rank, stop, ranks)
            for i in range(0, len(rows), batch):
                yield rows[i:i + batch], torch.from_numpy(array[i:i + batch][:len(rows) - i].copy())

    elif name == "digits" or os.path.isdir(name):
        files = [] if name == "digits" else list_images(name)
        flat = {os.path.normpath(os.path.dirname(f)) for f in files} == {os.path.normpath(name)}
        if name == "digits" or size and files and not flat:
            real = real_images(name, None if name == "digits" else size)
            count, shape = len(real), real[0][0].permute(1, 2, 0).shape
            # not sorted by class: precision and recall look at the first 10,000
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist() if files else range(count)
        else:
            real, count, sizes = None, len(files), {}
            for f in files:
                with open_image(f) as image:
                    sizes.setdefault(image.size, f)
                if len(sizes) > 1:
                    raise ValueError(f"{name}: images of mixed sizes ({', '.join(sizes.values())}); make them one size")
            if not files:
                raise ValueError(f"{name}: no images in this folder")
            shape = (*min(sizes)[::-1], 3)

        def load(i):
            return real[order[i]][0].permute(1, 2, 0) if real else torch.from_numpy(np.array(read_rgb(files[i])))

        def read(batch, rank, ranks, stop):
            rows = torch.arange(rank, stop, ranks)
            with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # decoding runs outside the GIL
                for part in rows.split(batch):
                    yield part, torch.stack(list(pool.map(load, part.tolist())))

    elif os.path.exists(name):
        with open_npz(name, "arr_0") as (_, (count, *shape), dtype):
            pass

        def read(batch, rank, ranks, stop):
            rows = torch.arange(stop)
            with open_npz(name, "arr_0") as (f, _, _):
                for part in rows.split(batch * ranks):
                    x = np.frombuffer(f.read(len(part) * math.prod(shape)), np.uint8).reshape(len(part), *shape)
                    if rank < len(part):
                        yield part[rank::ranks], torch.from_numpy(x[rank::ranks].copy())

    else:
        raise ValueError(f"{name}: no such file or folder; give an .npz of images, a folder of images, or digits")
    if dtype != "uint8" or len(shape) != 3 or shape[2] not in (1, 3) or 0 in shape:
        raise ValueError(f"{name}: images must be uint8 (N, H, W, C) with C 1 or 3, not {dtype} {(count, *shape)}")
    if not local and count < 4:
        raise ValueError(f"{name}: at least 4 images are needed, with 3 neighbours each, and it has {count}")
    return SimpleNamespace(name=name, count=count, shape=tuple(shape), local=local, read=read)


# ---------------------------------------------------------------- metrics


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) >= 0, in float64 (FID: Heusel et al. 2017, Eq. 6).

    mu (D,), sigma (D, D), of any rank. With sigma1 = A A^T the trace of the root is the sum of the square roots of the
    eigenvalues of A^T sigma2 A. As a root turns a rounding error of 1e-16 into 1e-8, A is the pivoted Cholesky factor
    of the covariance of lower rank, cut at that rank: no eigenvalue is 0 for want of rank, and the columns shrink from
    left to right, which keeps the small eigenvalues accurate. ValueError: shapes, NaN, or not a covariance.
    """
    from scipy.linalg.lapack import dpstrf
    mus = [np.atleast_1d(np.asarray(m, np.float64)) for m in (mu1, mu2)]
    sigmas = [np.atleast_2d(np.asarray(s, np.float64)) for s in (sigma1, sigma2)]
    if any(m.shape != mus[0].shape[:1] or s.shape != mus[0].shape * 2 for m, s in zip(mus, sigmas, strict=True)):
        raise ValueError(f"mu must be (D,) and sigma (D, D), not {[x.shape for x in mus + sigmas]}")
    if not all(np.isfinite(x).all() for x in mus + sigmas):
        raise ValueError("mean or covariance is not finite (NaN or infinite)")
    factors = []
    for s in sigmas:
        lower, pivots, rank, _ = dpstrf(s.T, lower=1)
        factors.append(np.empty((len(s), rank)))
        factors[-1][pivots - 1] = np.tril(lower)[:, :rank]
        if not math.isclose(np.square(factors[-1]).sum(), np.trace(s), rel_tol=1e-3, abs_tol=1e-300):
            raise ValueError("sigma is not a covariance: it has negative eigenvalues")
    a, s = min(zip(factors, reversed(sigmas), strict=True), key=lambda pair: pair[0].shape[1])
    root = torch.linalg.eigvalsh(torch.from_numpy(a.T @ (s @ a))).clamp(min=0).sqrt().sum().item()
    return max(0.0, float(np.square(mus[0] - mus[1]).sum() + np.trace(sigmas[0]) + np.trace(sigmas[1]) - 2 * root))


def inception_score(probs, split_size=SPLIT):
    """exp(E KL(p(y|x) || p(y))), the mean over splits of split_size rows, of which the last may be shorter (as in ADM).

    probs: (N, K), rows sum to 1 -> a float from 1 to K (Salimans et al. 2016). 0 log 0 is 0.
    """
    kl = [torch.xlogy(p, p).sum(1).mean() - torch.xlogy(p.mean(0), p.mean(0)).sum()
          for p in torch.as_tensor(probs).double().split(split_size)]
    return torch.stack(kl).exp().mean().item()


def precision_recall(real, fake, k=3, *, block=2048):
    """Precision: share of fake that lies, for some real point, no further from it than its k-th real neighbour (itself
    not counted). Recall: the same with real and fake exchanged (Kynkaanniemi et al. 2019, Eq. 1 and 2).

    real (N, D), fake (M, D), k < N, M -> (precision, recall). Float64 (ADM: float16), so that ties and duplicates count
    as inside; block x block distances at a time, so memory is bounded.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or min(len(real), len(fake)) <= k:
        raise ValueError(f"features must be (N, D), (M, D) with N, M > {k}, not {(*real.shape,)}, {(*fake.shape,)}")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("features are not finite (NaN or infinite)")
    centre = real.mean(0, dtype=torch.float64)  # distances are differences of squares: keep these small

    def blocks(x):
        for i in range(0, len(x), block):
            part = x[i:i + block].to(centre) - centre
            yield slice(i, i + len(part)), part, part.square().sum(1)

    def distances(a, a2, b, b2):
        return torch.addmm(b2, a, b.T, alpha=-2).add_(a2[:, None])  # (a, b), squared

    def radii(x):
        near, largest = torch.full((len(x), k), math.inf).to(centre), 0
        for i, a, a2 in blocks(x):
            largest = max(largest, a2.max())
            for j, b, b2 in blocks(x[:i.stop]):  # the other half is its mirror image
                d = distances(a, a2, b, b2)
                if i == j:
                    d.fill_diagonal_(math.inf)
                else:
                    near[j] = torch.cat([near[j], d.T], 1).topk(k, largest=False).values
                near[i] = torch.cat([near[i], d], 1).topk(k, largest=False).values
        return near.amax(1) + 1e-12 * largest  # a tie must survive rounding

    real_radii, fake_radii = radii(real), radii(fake)
    real_inside, fake_inside = torch.zeros_like(real_radii, dtype=bool), torch.zeros_like(fake_radii, dtype=bool)
    for i, a, a2 in blocks(real):
        for j, b, b2 in blocks(fake):
            d = distances(a, a2, b, b2)
            fake_inside[j] |= (d <= real_radii[i, None]).any(0)
            real_inside[i] |= (d <= fake_radii[j]).any(1)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


# ---------------------------------------------------------------- feature nets: uint8 (N, C, H, W) -> (pool, spatial, probs)

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION_FILE
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# The graph. "name width HxW": a convolution of stride 1 that keeps the size; "HxW/s": of stride s, without padding.
# "a, b": b after a. "a | b", and "a + b", which binds tighter: side by side, their channels concatenated. torchvision's
# network differs: its average pools count the padding, and its last block has an average pool.
_A = ("branch1x1 64 1x1 | branch5x5_1 48 1x1, branch5x5_2 64 5x5 | "
      "branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3 | avg, branch_pool {} 1x1")
_C = ("branch1x1 192 1x1 | branch7x7_1 {0} 1x1, branch7x7_2 {0} 1x7, branch7x7_3 192 7x1 | branch7x7dbl_1 {0} 1x1, "
      "branch7x7dbl_2 {0} 7x1, branch7x7dbl_3 {0} 1x7, branch7x7dbl_4 {0} 7x1, branch7x7dbl_5 192 1x7 | "
      "avg, branch_pool 192 1x1")
_E = ("branch1x1 320 1x1 | branch3x3_1 384 1x1, branch3x3_2a 384 1x3 + branch3x3_2b 384 3x1 | branch3x3dbl_1 448 1x1, "
      "branch3x3dbl_2 384 3x3, branch3x3dbl_3a 384 1x3 + branch3x3dbl_3b 384 3x1 | {}, branch_pool 192 1x1")
INCEPTION = {
    "stem": "Conv2d_1a_3x3 32 3x3/2, Conv2d_2a_3x3 32 3x3/1, Conv2d_2b_3x3 64 3x3, max/2, "
            "Conv2d_3b_1x1 80 1x1, Conv2d_4a_3x3 192 3x3/1, max/2",                       # -> (192, 35, 35)
    "Mixed_5b": _A.format(32), "Mixed_5c": _A.format(64), "Mixed_5d": _A.format(64),      # -> (288, 35, 35)
    "Mixed_6a": "branch3x3 384 3x3/2 | "
                "branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3/2 | max/2",
    "Mixed_6b": _C.format(128), "Mixed_6c": _C.format(160),
    "Mixed_6d": _C.format(160), "Mixed_6e": _C.format(192),                               # -> (768, 17, 17)
    "Mixed_7a": "branch3x3_1 192 1x1, branch3x3_2 320 3x3/2 | branch7x7x3_1 192 1x1, "
                "branch7x7x3_2 192 1x7, branch7x7x3_3 192 7x1, branch7x7x3_4 192 3x3/2 | max/2",
    "Mixed_7b": _E.format("avg"), "Mixed_7c": _E.format("max"),                           # -> (2048, 8, 8)
}


class Conv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu_()


class Side(nn.ModuleList):
    def forward(self, x):
        return torch.cat([branch(x) for branch in self], 1)


def build(text, width, prefix):
    """A text of the graph for width input channels -> (module, output channels)."""
    for op in "|,+":
        if op in text:
            parts, out = [], width if op == "," else 0
            for part in text.split(op):
                module, n = build(part, out if op == "," else width, prefix)
                parts.append(module)
                out = n if op == "," else out + n
            return nn.Sequential(*parts) if op == "," else Side(parts), out
    name, *shape = text.split()
    if name in ("avg", "max", "max/2"):
        return {"avg": nn.AvgPool2d(3, 1, 1, count_include_pad=False), "max": nn.MaxPool2d(3, 1, 1),
                "max/2": nn.MaxPool2d(3, 2)}[name], width
    size, _, stride = shape[1].partition("/")
    size = [int(n) for n in size.split("x")]
    conv = Conv(width, int(shape[0]), size, int(stride or 1), 0 if stride else [n // 2 for n in size])
    conv.keys = [prefix + name + key for key in  # in the public file
                 (".conv.weight", ".bn.weight", ".bn.bias", ".bn.running_mean", ".bn.running_var")]
    return conv, int(shape[0])


def resize_tf1(x, size=299):
    """(N, C, H, W) -> float32 (N, C, size, size) as TensorFlow 1's ResizeBilinear: pixel i is at i * H / size."""
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (np.float32(n) / np.float32(size)).item()
        low = at.long().clamp(max=n - 1)
        a, b = (x.index_select(dim, i).float() for i in (low, (low + 1).clamp(max=n - 1)))
        x = torch.lerp(a, b, (at - low).view(-1, *[1] * (3 - dim)))
    return x


@contextmanager
def plain_float32(device):
    """Features don't depend on what the caller does for speed: no autocast, TF32 or bfloat16."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(torch.device(device).type, enabled=False), \
                torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class InceptionV3(nn.Module):
    """The network of 2015-12-05: uint8 (N, 3 or 1, H, W) -> (pool (N, 2048), spatial (N, 2023), probs (N, 1008)).

    As in ADM's graph: bilinear to 299x299, (x - 128) / 128, softmax of the logits without their bias. The spatial
    features are "mixed_6/conv:0"[..., :7], flattened as (17, 17, 7). TF counts mixed, mixed_1, ... from Mixed_5b, so
    mixed_6 is Mixed_6d; its node "conv" comes after conv/Conv2D and conv/batchnorm and is their ReLU. So these are the
    first 7 channels of branch1x1 after batch norm and ReLU, which are the first 7 of the block.

    weights: a file in pytorch-fid's layout; None: that file from torch.hub's checkpoints folder, downloaded if it isn't
    there, its SHA-256 checked. ValueError: one line that names the file.
    """
    widths = (2048, 2023, 1008)

    def __init__(self, weights=None):
        super().__init__()
        self.blocks, width = nn.ModuleDict(), 3
        with torch.device("meta"):  # only the shapes: the numbers come from the file
            for name, text in INCEPTION.items():
                self.blocks[name], width = build(text, width, "" if name == "stem" else name + ".")
        convs = [m for m in self.modules() if isinstance(m, Conv)]
        shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
        for conv in convs:
            shapes |= dict(zip(conv.keys, [conv.weight.shape] + [conv.bias.shape] * 4, strict=True))

        path = weights or os.path.join(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
        try:
            if not weights and not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, path, INCEPTION_SHA256)  # in place once the hash is right
            if not weights:
                with open(path, "rb") as f:
                    if hashlib.file_digest(f, "sha256").hexdigest() != INCEPTION_SHA256:
                        raise ValueError("its SHA-256 is wrong, delete it")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a pickle protocol that it is about to refuse
                state = torch.load(path, map_location="cpu", weights_only=True)
            wrong = [k for k, s in shapes.items() if k not in state or state[k].shape != s]
            wrong += [k for k in state if k not in shapes and not k.endswith("num_batches_tracked")]
            if wrong:
                raise ValueError(f"{wrong[0]} differs from pytorch-fid's layout")
        except Exception as e:  # noqa: BLE001  no network, or whatever torch.load does with a foreign file
            raise ValueError(f"{path}: no Inception weights ({(str(e) or type(e).__name__).splitlines()[0]}); put "
                             f"{INCEPTION_URL} there") from None
        for conv in convs:  # batch norm folded in: gamma (W x - mean) / sqrt(var + 0.001) + beta
            w, gamma, beta, mean, var = (state[k].double() for k in conv.keys)
            scale = gamma / (var + 0.001).sqrt()
            conv.weight = nn.Parameter((w * scale[:, None, None, None]).float(), requires_grad=False)
            conv.bias = nn.Parameter((beta - mean * scale).float(), requires_grad=False)
        self.register_buffer("fc", state["fc.weight"].float())
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, x):
        if x.dtype != torch.uint8:
            raise ValueError(f"InceptionV3 takes uint8 images, 0 to 255, not {x.dtype}")
        with plain_float32(x.device):
            x = (resize_tf1(x.expand(-1, 3, -1, -1)) - 128) / 128
            x = x.contiguous(memory_format=torch.channels_last)                   # (N, 3, 299, 299)
            for name, block in self.blocks.items():
                x = block(x)
                if name == "Mixed_6d":
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)             # (N, 17 * 17 * 7)
            pool = x.mean((2, 3))                                                 # (N, 2048)
            return pool, spatial, (pool @ self.fc.T).softmax(1)


class DigitsNet(nn.Module):
    """The same for 8x8 digits: uint8 (N, 1 or 3, 8, 8) -> (pool (N, 64), spatial (N, 128), probs (N, 10)), float32."""
    widths = (64, 128, 10)

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.conv3, self.fc1, self.fc2 = nn.Conv2d(32, 64, 3, padding=1), nn.Linear(256, 64), nn.Linear(64, 10)

    def logits(self, x):
        x = x.float().mean(1, keepdim=True) / 127.5 - 1
        x = F.max_pool2d(F.silu(self.conv2(F.silu(self.conv1(x)))), 2)            # (N, 32, 4, 4); ReLUs would die
        spatial = x[:, :8].permute(0, 2, 3, 1).flatten(1)                         # (N, 4 * 4 * 8)
        pool = F.silu(self.fc1(F.max_pool2d(F.silu(self.conv3(x)), 2).flatten(1)))
        return pool, spatial, self.fc2(pool)

    @torch.no_grad()
    def forward(self, x):
        with plain_float32(x.device):
            pool, spatial, logits = self.logits(x)
            return pool, spatial, logits.softmax(1)


def digits_net():
    """DigitsNet, trained from a fixed seed (some seconds) on all digits but each fifth, of which it gets 98 % right.

    It is kept in torch.hub's checkpoints folder. The caller's random state, gradient mode and threads don't matter.
    """
    path, threads = os.path.join(torch.hub.get_dir(), "checkpoints", "digits-cnn-v1.pt"), torch.get_num_threads()
    with plain_float32("cpu"), torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        net = DigitsNet()
        with suppress(Exception):  # not there, or broken
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return net
        torch.default_generator.manual_seed(0)
        net, real = DigitsNet(), real_images("digits")
        train = torch.arange(len(real)) % 5 > 0
        x, y = real.images[train], torch.tensor(real.labels)[train]
        optimizer, steps = torch.optim.Adam(net.parameters()), 600
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        torch.set_num_threads(1)  # sums, and so the weights, depend on the number of threads
        try:
            for _ in range(steps):
                i = torch.randint(len(x), (64,))
                dy, dx = torch.randint(3, (2,)).tolist()  # shifted by up to a pixel
                images = F.pad(x[i], (1, 1, 1, 1))[:, :, dy:dy + 8, dx:dx + 8]
                loss = F.cross_entropy(net.logits(images)[2], y[i])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        finally:
            torch.set_num_threads(threads)
    with suppress(OSError, RuntimeError):  # a folder that can't be written: train again next time
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(net.state_dict(), f"{path}.{os.getpid()}")
        os.replace(f"{path}.{os.getpid()}", path)
    return net


# ---------------------------------------------------------------- evaluation


def world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(x):
    """Sum of x over the ranks."""
    if dist.is_initialized():
        y = x.cpu() if dist.get_backend() == "gloo" else x
        dist.all_reduce(y)
        x = y.to(x.device)
    return x


def statistics(net, images, *, batch=64, stop=None, keep=None, labels=None, progress=False):
    """One pass of images through net -> namespace(count, pool, spatial: (mu, sigma), features, score, accuracy).

    Float64 sums, unbiased covariances. stop: look at the first so many images; features: pool of the first keep (all);
    score: Inception Score; accuracy: share of the labels that the net gives. Collective: all ranks get the same.
    """
    from tqdm import tqdm
    device, (rank, ranks) = next(net.parameters()).device, world()
    count = int(total(torch.tensor(images.count, device=device))) if images.local else images.count
    count = min(count, stop or count)
    if count < 2 or images.local and images.count < len(range(rank, count, ranks)):
        raise ValueError(f"{images.name}: at least 2 images are needed, and on rank r the rows r::{ranks}; rank {rank} "
                         f"has {images.count} of {count}")
    float64 = {"dtype": torch.float64, "device": device}
    # shift, sum of x - shift, sum of (x - shift)(x - shift)^T: with a shift near the mean nothing cancels
    moments = [[torch.zeros(size, **float64) for size in ((d,), (d,), (d, d))] for d in net.widths[:2]]
    splits = -(-count // SPLIT)
    p_sum, p_log_p = torch.zeros(splits, net.widths[2], **float64), torch.zeros(splits, **float64)
    features = torch.zeros(min(count, count if keep is None else keep), net.widths[0], device=device)  # each rank fills its rows
    done = right = 0
    with tqdm(total=count, desc=images.name, unit="img", disable=not progress or rank > 0) as bar:
        for index, x in images.read(batch, rank, ranks, count):
            pool, spatial, probs = net(x.to(device).permute(0, 3, 1, 2))
            for (shift, s1, s2), f in zip(moments, (pool, spatial), strict=True):
                if done == 0:
                    shift.copy_(f.mean(0))
                f = f.double() - shift
                s1 += f.sum(0)
                s2.addmm_(f.T, f)
            wanted = index[index < len(features)].to(device)
            features[wanted] = pool[:len(wanted)]
            p, split = probs.double(), (index // SPLIT).to(device)
            p_sum.index_add_(0, split, p)
            p_log_p.index_add_(0, split, torch.xlogy(p, p).sum(1))
            if labels is not None:
                y = labels[done:done + len(x)] if images.local else labels[index]
                right += (probs.argmax(1) == y.to(device)).sum()
            done += len(x)
            bar.update(min(len(x) * ranks, count - bar.n))
    result = SimpleNamespace(count=count, features=total(features))
    for name, (shift, s1, s2) in zip(("pool", "spatial"), moments, strict=True):
        mu = total(shift * done + s1) / count
        off = shift + s1 / max(done, 1) - mu  # this rank's mean from the mean of all: Chan's rule for merging
        sigma = total(s2 - torch.outer(s1, s1) / max(done, 1) + done * torch.outer(off, off)) / (count - 1)
        if not (mu.isfinite().all() and sigma.isfinite().all()):
            raise ValueError(f"{images.name}: features that are not finite; are these the right weights?")
        setattr(result, name, (mu.cpu().numpy(), sigma.cpu().numpy()))
    n = torch.bincount(torch.arange(count) // SPLIT).to(device)
    p = total(p_sum) / n[:, None]
    result.score = (total(p_log_p) / n - torch.xlogy(p, p).sum(1)).exp().mean().item()
    result.accuracy = (total(torch.zeros((), **float64) + right) / count).item()
    return result


def check_size(images, features):
    if features == "digits" and images.shape[:2] != (8, 8):
        raise ValueError(f"{images.name}: digits features are for images of 8x8 pixels, not {images.shape[0]}x"
                         f"{images.shape[1]}; use inception features")


def load_reference(reference, features="inception", *, size=None, weights=None, batch=64, progress=False):
    """What evaluate() needs to know of the real images: read once, and before anything expensive.

    reference: an ADM .npz (mu, sigma, mu_s, sigma_s, perhaps arr_0), or what open_images takes. size: pixels to which a
    folder of class folders is centre-cropped. weights: InceptionV3's. Collective. ValueError: one line.
    """
    if features not in ("inception", "digits"):
        raise ValueError(f"features must be inception or digits, not {features!r}")
    if weights is not None and features == "digits":
        raise ValueError(f"weights {weights} are the Inception network's: leave them out with features digits")
    keys = npz_keys(reference) if isinstance(reference, (str, os.PathLike)) else []
    stats, images = [], None
    if {"mu", "sigma", "mu_s", "sigma_s"} & set(keys):
        pool, spatial, _ = (InceptionV3 if features == "inception" else DigitsNet).widths
        for key, want in (("mu", (pool,)), ("sigma", (pool,) * 2), ("mu_s", (spatial,)), ("sigma_s", (spatial,) * 2)):
            x = read_npz(reference, key)
            if x.shape != want or x.dtype.kind != "f" or not np.isfinite(x).all():
                raise ValueError(f"{reference}: {key} must be finite numbers {want} for {features} features; it is "
                                 f"{x.dtype} {x.shape}, NaN or infinite where the shape is right")
            stats.append(x)
    if not stats or "arr_0" in keys:
        images = open_images(reference, size)
        check_size(images, features)
    error = [None]
    for turn in (True, False):  # rank 0 downloads or trains, then the others find what it left
        if (world()[0] == 0) == turn:
            try:
                net = InceptionV3(weights) if features == "inception" else digits_net()
            except ValueError as e:
                error = [str(e)]
        if turn and dist.is_initialized():
            dist.broadcast_object_list(error, 0)
        if error[0]:
            e = ValueError(error[0])
            e.shared = turn  # all ranks have rank 0's
            raise e
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    ref = SimpleNamespace(kind=features, net=net, images=images, count=None, features=None)
    if images:
        got = statistics(net, images, batch=batch, stop=MANIFOLD if stats else None, keep=MANIFOLD, progress=progress)
        ref.pool, ref.spatial, ref.features, ref.count = got.pool, got.spatial, got.features, got.count
    if stats:
        ref.pool, ref.spatial, ref.count = stats[:2], stats[2:], None
    return ref


def evaluate(samples, reference, features="inception", *, weights=None, batch=64, labels=None, progress=False):
    """{"fid", "sfid", "is", "precision", "recall"} of samples; with labels and digits features also "accuracy", the
    share of samples to which the net gives their label.

    samples: an .npz, a folder, uint8 (N, H, W, C), or what open_images returned. reference: the same, an ADM .npz, or
    what load_reference returned, which brings its own features and weights. labels (N,): that the samples
    were asked for as. batch: images a pass and rank, changes only the speed. precision and recall are nan where the
    reference has no images. Collective. ValueError: one line that names the file and what would be right.
    """
    images = samples if isinstance(samples, SimpleNamespace) else open_images(samples)
    ref = reference
    if not isinstance(ref, SimpleNamespace):
        ref = load_reference(ref, features, size=images.shape[0], weights=weights, batch=batch, progress=progress)
    check_size(images, ref.kind)
    if ref.kind != "digits":
        labels = None
    if labels is not None:
        labels = torch.as_tensor(labels).cpu()
        if labels.shape != (images.count,):
            raise ValueError(f"{images.name}: labels must be {images.count} integers, not {tuple(labels.shape)}")
    got = statistics(ref.net, images, batch=batch, labels=labels, progress=progress,
                     keep=0 if ref.features is None else None)  # precision and recall alone need them
    figures = torch.zeros(4, dtype=torch.float64, device=got.features.device)
    if world()[0] == 0:
        for name, count in ((images.name, got.count), ("reference", ref.count)):
            if count and count < ref.net.widths[0]:
                print(f"fid.py: warning: {name}: {count} images are fewer than {ref.net.widths[0]} features, FID comes "
                      "out too high", file=sys.stderr)
        figures[0] = frechet_distance(*got.pool, *ref.pool)
        figures[1] = frechet_distance(*got.spatial, *ref.spatial)
        figures[2:] = math.nan
        if ref.features is not None and min(len(ref.features), got.count) > 3:
            figures[2:] = torch.tensor(precision_recall(ref.features, got.features), dtype=torch.float64)
    fid, sfid, precision, recall = total(figures).tolist()  # the other ranks add zeros
    out = {"fid": fid, "sfid": sfid, "is": got.score, "precision": precision, "recall": recall}
    return out if labels is None else {**out, "accuracy": got.accuracy}


def save_stats(path, ref):
    """What load_reference returned -> an .npz in ADM's layout: mu, sigma, mu_s, sigma_s, the first 10,000 images."""
    partial = f"{path}.{os.getpid()}"
    try:
        with zipfile.ZipFile(partial, "w") as z:
            for key, x in zip(("mu", "sigma", "mu_s", "sigma_s"), (*ref.pool, *ref.spatial), strict=True):
                with z.open(f"{key}.npy", "w", force_zip64=True) as f:
                    np.lib.format.write_array(f, np.ascontiguousarray(x), allow_pickle=False)
            if ref.images:
                shape = (min(ref.images.count, MANIFOLD), *ref.images.shape)
                with z.open("arr_0.npy", "w", force_zip64=True) as f:
                    np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
                    for _, x in ref.images.read(64, 0, 1, shape[0]):
                        f.write(x.contiguous().numpy().tobytes())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def main(argv=None):
    p = argparse.ArgumentParser(prog="fid.py", description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False, formatter_class=lambda
                                prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=120))
    p.add_argument("samples", nargs="+", metavar="SAMPLES",
                   help="an .npz with arr_0 uint8 (N, H, W, C), or a folder of images")
    p.add_argument("reference", metavar="REFERENCE", help="the same, an ADM .npz with mu, sigma, mu_s and sigma_s, a "
                   "folder of class folders (centre-cropped to the samples' size), or digits")
    p.add_argument("--features", choices=("inception", "digits"), help="the feature net [digits where REFERENCE is "
                   "digits or the samples are 8x8 with one channel, else inception]")
    p.add_argument("--weights", metavar="FILE", help="Inception weights, pytorch-fid's [downloaded once, 95 MB]")
    p.add_argument("--batch", metavar="N", type=int, default=64, help="images at once, per process; changes only the speed "
                   "[%(default)s]")
    p.add_argument("--json", action="store_true", help="a JSON list instead of the Markdown table [off]")
    p.add_argument("--save-stats", metavar="FILE", help="also write REFERENCE as an ADM .npz [not written]")
    quiet = int(os.environ.get("LOCAL_RANK", "0")) > 0  # while every rank would say the same

    def stop(error):
        if quiet or getattr(error, "shared", False) and world()[0]:
            time.sleep(30)  # a node's first rank says it, and torchrun then ends this one
        else:
            print(f"fid.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    p.error = stop
    args = p.parse_args(argv)
    distributed, rows = "LOCAL_RANK" in os.environ and not dist.is_initialized(), []
    try:
        if args.batch < 1:
            raise ValueError(f"--batch must be at least 1 image, not {args.batch}")
        out = args.save_stats
        if out and (not out.endswith(".npz") or not os.path.isdir(os.path.dirname(out) or ".")
                    or os.path.realpath(out) in map(os.path.realpath, [*args.samples, args.reference])):
            raise ValueError(f"--save-stats {out} must be an .npz in a folder that exists, and none of the inputs")
        opened = [open_images(s) for s in args.samples]
        digits = args.reference == "digits" or opened[0].shape == (8, 8, 1)
        features = args.features or ("digits" if digits else "inception")
        for images in opened:
            check_size(images, features)
            if images.shape[:2] != opened[0].shape[:2]:
                raise ValueError(f"{images.name}: other image size than {opened[0].name}; give each size its own run")
        if distributed:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        quiet = False
        ref = load_reference(args.reference, features, size=opened[0].shape[0], weights=args.weights, batch=args.batch,
                             progress=True)
        for images in opened:
            rule = "-"  # sample.py's record, X.json beside X.npz, says how the labels were drawn
            with suppress(OSError, ValueError, KeyError, TypeError), \
                    open(os.path.splitext(images.name)[0] + ".json", encoding="utf-8") as f:
                rule = str(json.load(f)["class_labels"])
            labels = None
            if features == "digits" and "labels" in npz_keys(images.name):
                labels = read_npz(images.name, "labels").astype(np.int64)
            figures = evaluate(images, ref, batch=args.batch, labels=labels, progress=True)
            rows.append({"samples": images.name, "images": images.count, "labels": rule,
                         **{k: None if math.isnan(v) else v for k, v in figures.items()}})
        if out and world()[0] == 0:
            save_stats(out, ref)
    except (ValueError, OSError) as e:
        stop(e)
    if args.json and world()[0] == 0:
        print(json.dumps(rows, indent=1))
    elif world()[0] == 0:
        keys, heads = list(max(rows, key=len)), {"fid": "FID", "sfid": "sFID", "is": "IS"}  # accuracy only where known
        print("| " + " | ".join(heads.get(k, k) for k in keys) + " |\n|" + "---|" * 3 + "---:|" * (len(keys) - 3))
        for row in rows:
            cells = [row.get(k) for k in keys]
            cells = ["-" if c is None else f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells]
            print("| " + " | ".join(cells) + " |")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
