"""FID, sFID, Inception Score, precision and recall, as ADM's evaluator defines them.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz      # one of ADM's references
    python fid.py a.npz b.npz imagenet/train                       # a row each; a folder of images
    python fid.py samples.npz latents-256                          # what data.py has prepared
    python fid.py samples.npz digits                               # in a small CNN's features
    torchrun --nproc-per-node 8 fid.py samples.npz reference.npz   # split over GPUs, same figures

The evaluator is openai/guided-diffusion's. Images are uint8, HWC in files and CHW in tensors.
"""
import json
import math
import os
import sys
import warnings
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import models

MANIFOLD = 10_000  # real images that precision and recall look at (ADM)
SPLIT = 5_000      # images in a split of the Inception Score (ADM)
DIGIT = (8, 8, 1)  # height, width and channels of a digit, which has features of its own


# ---------------------------------------------------------------- metrics

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): Heusel et al. 2017, Eq. 6.

    mu: (D,), sigma: (D, D) of any rank -> a float >= 0, computed in float64.
    ValueError: wrong shapes, NaN or infinity, or a sigma with negative eigenvalues.

    With sigma1 = A A^T, the trace of the root is the sum of the square roots of the eigenvalues
    of A^T sigma2 A. A square root turns a rounding error of 1e-16 into 1e-8. So A is the pivoted
    Cholesky factor of the covariance of lower rank, cut at that rank: no eigenvalue is zero for
    lack of rank, and A's shrinking columns keep the small ones accurate.
    """
    mu1, mu2 = np.array(mu1, np.float64, ndmin=1), np.array(mu2, np.float64, ndmin=1)
    sigma1, sigma2 = np.array(sigma1, np.float64, ndmin=2), np.array(sigma2, np.float64, ndmin=2)
    shapes = [x.shape for x in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(len(mu1),), (len(mu1), len(mu1))] * 2:
        raise ValueError(f"mu must be (D,) and sigma (D, D), not {shapes}")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or covariance is not finite (NaN or infinity)")
    a1, a2 = cholesky_factor(sigma1), cholesky_factor(sigma2)
    if a1.shape[1] <= a2.shape[1]:
        product = a1.T @ (sigma2 @ a1)
    else:
        product = a2.T @ (sigma1 @ a2)
    root = torch.linalg.eigvalsh(torch.from_numpy(product)).clamp(min=0).sqrt().sum().item()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    return max(0.0, float(distance))


def cholesky_factor(sigma):
    """A (D, rank) with A A^T = sigma."""
    from scipy.linalg.lapack import dpstrf
    lower, pivots, rank, _ = dpstrf(sigma.T, lower=1)
    a = np.empty((len(sigma), rank))
    a[pivots - 1] = np.tril(lower)[:, :rank]
    # 1e-12: images that are all alike have a covariance of rounding errors, of either sign.
    if not math.isclose(np.square(a).sum(), np.trace(sigma), rel_tol=1e-3, abs_tol=1e-12):
        raise ValueError("sigma is not a covariance: it has negative eigenvalues")
    return a


def inception_score(probs, split_size=SPLIT):
    """exp(E KL(p(y|x) || p(y))), averaged over splits of split_size rows: Salimans et al. 2016.

    probs: (N, K), rows that sum to 1 -> a float in [1, K]. As in ADM the last split may be shorter.
    """
    scores = []
    for p in torch.as_tensor(probs).double().split(split_size):
        marginal = p.mean(0)
        kl = torch.xlogy(p, p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(kl.exp())
    return torch.stack(scores).mean().item()


def precision_recall(real, fake, k=3, *, block=512):
    """Share of fakes inside some real point's k-NN ball, and of reals inside some fake's.

    real: (N, D), fake: (M, D) -> (precision, recall): Kynkaanniemi et al. 2019, Eq. 1 and 2.
    In float64 (ADM: float16), so that ties and duplicates count as inside; the distances of
    `block` points at a time. ValueError: wrong shapes, N or M not above k, NaN or infinity.
    """
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    fits = real.ndim == fake.ndim == 2 and real.shape[1] == fake.shape[1]
    if not fits or min(len(real), len(fake)) <= k:
        raise ValueError(f"features must be (N, D) and (M, D) with N and M above {k}, "
                         f"not {tuple(real.shape)} and {tuple(fake.shape)}")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("features are not finite (NaN or infinity)")
    center = real.mean(0)  # small norms keep |a|^2 - 2 ab + |b|^2 accurate
    real, fake = real - center, fake - center
    real_radii, fake_radii = knn_radii(real, k, block), knn_radii(fake, k, block)
    fake_inside, real_inside = torch.zeros_like(fake_radii, dtype=bool), []
    for points, radii in zip(real.split(block), real_radii.split(block), strict=True):
        d = squared_distances(points, fake)
        fake_inside |= (d <= radii[:, None]).any(0)
        real_inside.append((d <= fake_radii).any(1))
    return fake_inside.double().mean().item(), torch.cat(real_inside).double().mean().item()


def squared_distances(a, b):
    """(N, D), (M, D) -> (N, M)."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2) + a.square().sum(1, keepdim=True)


def knn_radii(x, k, block):
    """Squared distance from each point to its k-th neighbour: (N, D) -> (N,)."""
    radii = []
    for i in range(0, len(x), block):
        d = squared_distances(x[i:i + block], x)
        d.diagonal(i).fill_(math.inf)  # a point is not its own neighbour
        radii.append(d.topk(k, largest=False).values.amax(1))
    return torch.cat(radii) + 1e-12 * x.square().sum(1).max()  # ties must survive rounding


# ---------------------------------------------------------------- Inception

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 + INCEPTION_FILE)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Conv(nn.Conv2d):
    """Convolution and ReLU; the batch norm between them is folded into weight and bias.

    name: in the public file. Stride 1 keeps the size, unless padding is given.
    """

    def __init__(self, name, width, out, kernel, stride=1, padding="same"):
        super().__init__(width, out, kernel, stride, padding if stride == 1 else 0)
        self.name = name

    def forward(self, x):
        return super().forward(x).relu_()


class Concat(nn.ModuleList):
    """Branches, lists of layers, side by side: their channels are concatenated.

    block: the public file has its name before those of the convolutions.
    """

    def __init__(self, *branches, block=""):
        super().__init__(nn.Sequential(*branch) for branch in branches)
        for conv in convolutions(self):
            conv.name = block + conv.name

    def forward(self, x):
        return torch.cat([branch(x) for branch in self], 1)


def convolutions(module):
    return [m for m in module.modules() if isinstance(m, Conv)]


def average_pool():
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # torchvision's counts the padding


def mixed_5(name, width, out):
    return Concat(
        [Conv("branch1x1", width, 64, 1)],
        [Conv("branch5x5_1", width, 48, 1), Conv("branch5x5_2", 48, 64, 5)],
        [Conv("branch3x3dbl_1", width, 64, 1), Conv("branch3x3dbl_2", 64, 96, 3),
         Conv("branch3x3dbl_3", 96, 96, 3)],
        [average_pool(), Conv("branch_pool", width, out, 1)],
        block=f"{name}.")


def mixed_6a():
    return Concat(
        [Conv("branch3x3", 288, 384, 3, stride=2)],
        [Conv("branch3x3dbl_1", 288, 64, 1), Conv("branch3x3dbl_2", 64, 96, 3),
         Conv("branch3x3dbl_3", 96, 96, 3, stride=2)],
        [nn.MaxPool2d(3, 2)],
        block="Mixed_6a.")


def mixed_6(name, c):
    return Concat(
        [Conv("branch1x1", 768, 192, 1)],
        [Conv("branch7x7_1", 768, c, 1), Conv("branch7x7_2", c, c, (1, 7)),
         Conv("branch7x7_3", c, 192, (7, 1))],
        [Conv("branch7x7dbl_1", 768, c, 1), Conv("branch7x7dbl_2", c, c, (7, 1)),
         Conv("branch7x7dbl_3", c, c, (1, 7)), Conv("branch7x7dbl_4", c, c, (7, 1)),
         Conv("branch7x7dbl_5", c, 192, (1, 7))],
        [average_pool(), Conv("branch_pool", 768, 192, 1)],
        block=f"{name}.")


def mixed_7a():
    return Concat(
        [Conv("branch3x3_1", 768, 192, 1), Conv("branch3x3_2", 192, 320, 3, stride=2)],
        [Conv("branch7x7x3_1", 768, 192, 1), Conv("branch7x7x3_2", 192, 192, (1, 7)),
         Conv("branch7x7x3_3", 192, 192, (7, 1)), Conv("branch7x7x3_4", 192, 192, 3, stride=2)],
        [nn.MaxPool2d(3, 2)],
        block="Mixed_7a.")


def mixed_7(name, width, pool):
    return Concat(
        [Conv("branch1x1", width, 320, 1)],
        [Conv("branch3x3_1", width, 384, 1),
         Concat([Conv("branch3x3_2a", 384, 384, (1, 3))],
                [Conv("branch3x3_2b", 384, 384, (3, 1))])],
        [Conv("branch3x3dbl_1", width, 448, 1), Conv("branch3x3dbl_2", 448, 384, 3),
         Concat([Conv("branch3x3dbl_3a", 384, 384, (1, 3))],
                [Conv("branch3x3dbl_3b", 384, 384, (3, 1))])],
        [pool, Conv("branch_pool", width, 192, 1)],
        block=f"{name}.")


class InceptionV3(nn.Module):
    """The network of 2015-12-05: uint8 (N, 3 or 1, H, W) -> pool, spatial, probs, float32.

    pool (N, 2048) is for FID, precision and recall; spatial (N, 2023) for sFID; probs (N, 1008)
    for the Inception Score: softmax of the logits without their bias, as in ADM's graph.
    spatial is that graph's "mixed_6/conv:0"[..., :7] as (17, 17, 7), where "conv" is a ReLU and
    mixed_6 is Mixed_6d here: the first 7 channels of its branch1x1, and so of the block.

    weights: a file in pytorch-fid's layout. None: that file from torch.hub's checkpoints folder,
    downloaded if missing, its SHA-256 checked. ValueError: it can't be loaded.
    """
    widths = (2048, 2023, 1008)

    def __init__(self, weights=None):
        super().__init__()
        with torch.device("meta"):  # the numbers come from the file
            self.to_6d = nn.Sequential(                                      # (N, 3, 299, 299)
                Conv("Conv2d_1a_3x3", 3, 32, 3, stride=2),                   # (N, 32, 149, 149)
                Conv("Conv2d_2a_3x3", 32, 32, 3, padding=0),
                Conv("Conv2d_2b_3x3", 32, 64, 3), nn.MaxPool2d(3, 2),        # (N, 64, 73, 73)
                Conv("Conv2d_3b_1x1", 64, 80, 1),
                Conv("Conv2d_4a_3x3", 80, 192, 3, padding=0),
                nn.MaxPool2d(3, 2), mixed_5("Mixed_5b", 192, 32),            # (N, 256, 35, 35)
                mixed_5("Mixed_5c", 256, 64), mixed_5("Mixed_5d", 288, 64),  # (N, 288, 35, 35)
                mixed_6a(), mixed_6("Mixed_6b", 128),                        # (N, 768, 17, 17)
                mixed_6("Mixed_6c", 160), mixed_6("Mixed_6d", 160))
            self.to_7c = nn.Sequential(
                mixed_6("Mixed_6e", 192), mixed_7a(),                        # (N, 1280, 8, 8)
                mixed_7("Mixed_7b", 1280, average_pool()),
                mixed_7("Mixed_7c", 2048, nn.MaxPool2d(3, 1, 1)))            # (N, 2048, 8, 8)
        path = weights or os.path.join(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
        try:
            if not weights and not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, path, INCEPTION_SHA256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a pickle protocol that it is about to refuse
                state = torch.load(path, map_location="cpu", weights_only=True)
            for conv in convolutions(self):
                fold(conv, state)
            if state["fc.weight"].shape != (1008, 2048):
                raise ValueError("fc.weight is not (1008, 2048)")
        except Exception as e:  # noqa: BLE001  torch.load raises anything
            reason = (str(e) or type(e).__name__).splitlines()[0]
            raise ValueError(f"{path}: no Inception weights ({reason}); download {INCEPTION_URL} "
                             "and give it as --weights FILE; training does without them with "
                             "--eval-samples 0") from None
        self.register_buffer("fc", state["fc.weight"].float())
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, x):
        if x.dtype != torch.uint8:
            raise ValueError(f"InceptionV3 takes uint8 images, 0 to 255, not {x.dtype}")
        with plain_float32(x.device):
            x = (resize_tf1(x.expand(-1, 3, -1, -1)) - 128) / 128
            x = self.to_6d(x.contiguous(memory_format=torch.channels_last))  # (N, 768, 17, 17)
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                # (N, 17 * 17 * 7)
            pool = self.to_7c(x).mean((2, 3))                                # (N, 2048)
            return pool, spatial, (pool @ self.fc.T).softmax(1)


def fold(conv, state):
    """Weight and bias of W x and its batch norm: gamma (W x - mean) / sqrt(var + 0.001) + beta."""
    weight = state[f"{conv.name}.conv.weight"].double()
    gamma, beta, mean, var = (state[f"{conv.name}.bn.{key}"].double()
                              for key in ("weight", "bias", "running_mean", "running_var"))
    if weight.shape != conv.weight.shape or not gamma.shape == beta.shape == conv.bias.shape:
        raise ValueError(f"{conv.name} has another shape")
    scale = gamma / (var + 0.001).sqrt()
    weight, bias = weight * scale[:, None, None, None], beta - mean * scale
    conv.weight = nn.Parameter(weight.float(), requires_grad=False)
    conv.bias = nn.Parameter(bias.float(), requires_grad=False)


def resize_tf1(x, size=299):
    """(N, C, H, W) -> float32 (N, C, size, size): TF1's bilinear, pixel i is at i H / size."""
    for dim in (3, 2):
        n = x.shape[dim]
        scale = (np.float32(n) / np.float32(size)).item()
        at = torch.arange(size, dtype=torch.float32, device=x.device) * scale
        low = at.long().clamp(max=n - 1)
        high = (low + 1).clamp(max=n - 1)
        share = (at - low).view(-1, *[1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low).float(), x.index_select(dim, high).float(), share)
    return x


@contextmanager
def plain_float32(device):
    """Full fp32, whatever autocast, TF32 or cuDNN settings the caller has."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (torch.autocast(torch.device(device).type, enabled=False),
              torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True,
                                         allow_tf32=False)):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


# ---------------------------------------------------------------- the digits' network

class DigitsNet(nn.Module):
    """For 8x8 digits: uint8 (N, 1, 8, 8) -> pool (N, 64), spatial (N, 128), probs (N, 10)."""
    widths = (64, 128, 10)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(256, 64), nn.Linear(64, 10)

    def logits(self, x):
        x = x.float() / 127.5 - 1
        x = F.silu(self.conv2(F.silu(self.conv1(x))))                        # ReLUs would die
        x = F.max_pool2d(x, 2)                                               # (N, 32, 4, 4)
        spatial = x[:, :8].permute(0, 2, 3, 1).flatten(1)                    # (N, 4 * 4 * 8)
        x = F.max_pool2d(F.silu(self.conv3(x)), 2)                           # (N, 64, 2, 2)
        pool = F.silu(self.fc1(x.flatten(1)))                                # (N, 64)
        return pool, spatial, self.fc2(pool)

    @torch.no_grad()
    def forward(self, x):
        with plain_float32(x.device):
            pool, spatial, logits = self.logits(x)
            return pool, spatial, logits.softmax(1)


def digits_net():
    """DigitsNet, trained for some seconds on all digits but every fifth: 98 % of those are right.

    Kept in torch.hub's checkpoints folder. The weights don't depend on the caller's seed, gradient
    mode or number of threads, and the caller's random state is left alone.
    """
    path = os.path.join(torch.hub.get_dir(), "checkpoints", "digits-cnn-v1.pt")
    with (plain_float32("cpu"), torch.inference_mode(False), torch.enable_grad(),
          torch.random.fork_rng(devices=[])):
        net = DigitsNet()
        with suppress(Exception):  # missing or broken
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return net
        torch.default_generator.manual_seed(0)
        net = DigitsNet()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the order of sums, and so the weights, depend on it
        try:
            train_digits(net)
        finally:
            torch.set_num_threads(threads)
    with suppress(OSError):  # not writable: train again next time
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with models.atomic(path) as f:
            torch.save(net.state_dict(), f)
    return net


def train_digits(net, steps=600):
    images, labels = (torch.from_numpy(x) for x in data.digits())
    train = torch.arange(len(images)) % 5 > 0
    images, labels = images[train].view(-1, 1, 8, 8), labels[train]
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        i = torch.randint(len(images), (64,))
        dy, dx = torch.randint(3, (2,)).tolist()  # shifted by up to a pixel
        x = F.pad(images[i], (1, 1, 1, 1))[:, :, dy:dy + 8, dx:dx + 8]
        loss = F.cross_entropy(net.logits(x)[2], labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


# ---------------------------------------------------------------- images

class Images:
    """uint8 images: an array, files, or else the .npz at `name`, read batch by batch.

    shape: (H, W, C) of each. labels: the .npz's, or None. size: the files are cropped to it.
    shuffle: sorted by class, so take them in a fixed random order.
    """

    def __init__(self, name, array=None, files=None, size=None, shuffle=False):
        self.name, self.array, self.files, self.size = name, array, files, size
        self.shuffle, self.labels, dtype = shuffle, None, "uint8"
        if files:
            shape = (len(files), *data.read_image(files[0], size).shape)
            if size is None:
                check_sizes(name, files)
        elif array is not None:
            shape, dtype = array.shape, array.dtype
        else:
            headers = npz_headers(name)
            if "arr_0" not in headers:
                raise ValueError(f"{name}: has no arr_0, the images; it has {[*headers]}")
            shape, dtype = headers["arr_0"]
            if headers.get("labels") == (shape[:1], np.int64):
                self.labels = read_array(name, "labels")
        if dtype != "uint8" or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            raise ValueError(f"{name}: images must be uint8 (N, H, W, C) with C 1 or 3, "
                             f"not {dtype} {shape}")
        self.count, self.shape = shape[0], tuple(shape[1:])
        if self.count < 4:
            raise ValueError(f"{name}: the metrics need 4 images, and it has {self.count}")

    def batches(self, batch, rank=0, world=1, stop=None):
        """Yields (rows (b,) int64, images (b, C, H, W)): rows rank::world below stop, in order."""
        rows = np.arange(rank, stop or self.count, world)
        parts = [rows[i:i + batch] for i in range(0, len(rows), batch)]
        order = np.arange(self.count)
        if self.shuffle:
            order = np.random.RandomState(0).permutation(self.count)
        if self.files:
            paths = [self.files[i] for i in order[rows]]
            arrays = data.read_ahead(paths, self.size, batch, workers=min(8, os.cpu_count()))
        elif self.array is not None:
            arrays = (self.array[order[part]] for part in parts)
        else:
            arrays = read_rows(self.name, self.shape, parts)
        for part, x in zip(parts, arrays, strict=True):
            yield torch.from_numpy(part), torch.from_numpy(x).permute(0, 3, 1, 2)


def open_images(source, *, real=False, size=None):
    """Images of an array (N, H, W, C), an .npz with arr_0, or a folder, with the folders in it.

    real: also "digits", what data.py has prepared, and class folders, which are cropped to size.
    ValueError: none of these, of mixed sizes, fewer than 4 images, or real ones among samples.
    """
    if not isinstance(source, (str, os.PathLike)):
        array = source.cpu() if isinstance(source, torch.Tensor) else source
        return Images("the array", array=np.asarray(array))
    name = os.fspath(source)
    if name == "digits" or data.is_prepared(name):
        if not real:
            raise ValueError(f"{name}: real images among SAMPLES; the order is SAMPLES REFERENCE")
        prepared = data.Data(name)
        if prepared.vae is None:
            return Images(name, array=prepared.images, shuffle=True)
        if not os.path.isdir(prepared.source):
            raise ValueError(f"{name}: the folder that it was made from, {prepared.source}, is "
                             "gone; give --reference, real images or statistics of them")
        files, _, _ = data.class_folders(prepared.source)
        return Images(name, files=files, size=prepared.size, shuffle=True)
    if not os.path.isdir(name):
        return Images(name)
    files = data.list_images(name)
    if not files:
        raise ValueError(f"{name}: no images in this folder")
    if real and all(Path(path).parent != Path(name).absolute() for path in files):
        files, _, _ = data.class_folders(name)
        return Images(name, files=files, size=size, shuffle=True)
    return Images(name, files=files)


def check_sizes(name, files):
    from PIL import Image
    sizes = {}
    for path in files:
        try:
            with Image.open(path) as image:
                sizes.setdefault(image.size, path)
        except OSError:
            data.read_image(path)  # says what is wrong
        if len(sizes) > 1:
            raise ValueError(f"{name}: images of mixed sizes, {' and '.join(sizes.values())}; "
                             "make them one size")


@contextmanager
def open_npz(path):
    """A zip file to read; whatever is wrong inside it becomes a ValueError that names path."""
    try:
        with zipfile.ZipFile(path) as z:
            yield z
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file or folder") from None
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path}: not an .npz, or a damaged one ({e}); make it again") from None


def npz_headers(path):
    """{name: (shape, dtype)} of the arrays in an .npz, which can be far larger than the file."""
    headers = {}
    with open_npz(path) as z:
        for info in z.infolist():
            if info.filename.endswith(".npy"):
                with z.open(info) as f:
                    shape, dtype = read_header(f)
                    size = math.prod(shape) * dtype.itemsize
                    if size != info.file_size - f.tell() and not dtype.hasobject:
                        raise ValueError(f"{info.filename} is truncated")
                headers[info.filename.removesuffix(".npy")] = shape, dtype
    return headers


def read_header(f):
    """Reads an array's header and no further -> (shape, dtype)."""
    if np.lib.format.read_magic(f) == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(f)
    if fortran and len(shape) > 2:
        raise ValueError("an array in Fortran order; save np.ascontiguousarray of it")
    return shape, dtype


def read_rows(path, shape, parts):
    """Yields arr_0[part], uint8 (b, *shape), for each array of increasing row numbers."""
    size, at = math.prod(shape), 0
    with open_npz(path) as z, z.open("arr_0.npy") as f:
        read_header(f)
        for part in parts:
            f.read((part[0] - at) * size)  # rows of other processes
            at = part[-1] + 1
            x = np.frombuffer(f.read((at - part[0]) * size), np.uint8)
            yield x.reshape(-1, *shape)[part - part[0]]


def read_array(path, key):
    with open_npz(path) as z, z.open(f"{key}.npy") as f:
        return np.lib.format.read_array(f, allow_pickle=False)


# ---------------------------------------------------------------- evaluation

class Moments:
    """Mean and covariance of features (N, D): streamed, summed over the processes, in float64.

    Sums are of differences from the first image's features, so that nothing cancels.
    """

    def __init__(self, first):
        rank, _ = models.ranks()
        self.origin = total(first.double() * (rank == 0))  # the others' GPUs may round differently
        self.sum = torch.zeros_like(self.origin)
        self.outer = self.origin.new_zeros(len(first), len(first))

    def add(self, x):
        x = x.double() - self.origin
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)

    def result(self, count):
        """-> mu (D,), sigma (D, D), unbiased, in numpy."""
        mean, outer = total(self.sum) / count, total(self.outer)
        sigma = (outer - count * torch.outer(mean, mean)) / (count - 1)
        return (self.origin + mean).cpu().numpy(), sigma.cpu().numpy()


def total(x):
    """Sum of x over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def statistics(net, images, *, batch, keep, stop=None, labels=None):
    """One pass of the images (or the first `stop`) through net, shared out among the processes.

    -> (stats, Inception Score, share of `labels` that net agrees with), the same in every process.
    stats: {"mu", "sigma" of pool; "mu_s", "sigma_s" of spatial; "pool" of the first `keep` images;
    "shape" of an image}. ValueError: features that aren't finite.
    """
    rank, world = models.ranks()
    device = next(net.parameters()).device
    count = min(images.count, stop or images.count)
    if rank == 0 and not stop and count < net.widths[0]:
        print(f"fid.py: warning: {images.name}: {count} images are fewer than the {net.widths[0]} "
              "features, FID comes out too high", file=sys.stderr)
    _, first = next(images.batches(1, stop=1))
    pool, spatial, _ = net(first.to(device))
    pool_moments, spatial_moments = Moments(pool[0]), Moments(spatial[0])
    kept = torch.zeros(min(count, keep), net.widths[0], device=device)  # filled by all ranks
    splits = math.ceil(count / SPLIT)
    p_sum = torch.zeros(splits, net.widths[2], dtype=torch.float64, device=device)
    p_log_p = torch.zeros(splits, dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.float64, device=device)
    with tqdm(total=count, desc=images.name, unit="img", leave=False,
              disable=True if rank else None) as bar:  # None: only in a terminal
        for rows, x in images.batches(batch, rank, world, count):
            pool, spatial, probs = net(x.to(device))
            pool_moments.add(pool)
            spatial_moments.add(spatial)
            wanted = rows[rows < keep].to(device)
            kept[wanted] = pool[:len(wanted)]
            p, split = probs.double(), (rows // SPLIT).to(device)
            p_sum.index_add_(0, split, p)
            p_log_p.index_add_(0, split, torch.xlogy(p, p).sum(1))
            if labels is not None:
                right += (probs.argmax(1) == labels[rows].to(device)).sum()
            bar.update(min(len(x) * world, count - bar.n))
    mu, sigma = pool_moments.result(count)
    mu_s, sigma_s = spatial_moments.result(count)
    if not (np.isfinite(sigma).all() and np.isfinite(sigma_s).all()):
        raise ValueError(f"{images.name}: features are not finite; are these the right weights?")
    stats = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s,
             "pool": total(kept).cpu().numpy(), "shape": np.array(images.shape)}
    n = torch.bincount(torch.arange(count) // SPLIT).to(device)
    marginal = total(p_sum) / n[:, None]
    kl = total(p_log_p) / n - torch.xlogy(marginal, marginal).sum(1)  # as in inception_score()
    return stats, kl.exp().mean().item(), total(right).item() / count


@dataclass
class Reference:
    """What evaluate() needs of the real images: what load_reference() returns."""
    name: str
    net: nn.Module
    stats: dict  # as statistics() returns it; "pool" and "shape" only where they are known

    def save(self, path):
        with models.atomic(path) as f:
            np.savez(f, **self.stats)


def load_reference(reference, features="inception", *, size=None, weights=None, batch=64):
    """What evaluate() needs of the real images, read once and before anything expensive.

    reference: an .npz with ADM's statistics (mu, sigma, mu_s, sigma_s) or with images, arr_0; a
        folder of images, or of class folders, cropped to size; "digits"; a folder that data.py
        has prepared, which then keeps its statistics, as inception.npz; an array of images.
    features: "digits" for 8x8 images of one channel, else "inception".
    size: height of the samples, in pixels. weights: InceptionV3's. batch: images at a time.
    -> Reference. Collective under torch.distributed.
    ValueError: one line that names the file, folder or flag, and what would be right.
    """
    if features not in ("inception", "digits"):
        raise ValueError(f"features must be inception or digits, not {features!r}")
    if weights is not None and features == "digits":
        raise ValueError(f"--weights {weights}: these are Inception's, which digits don't use")
    rank, _ = models.ranks()
    is_path = isinstance(reference, (str, os.PathLike))
    name = file = os.fspath(reference) if is_path else "the reference"
    prepared = is_path and data.is_prepared(name)
    if prepared:
        file = os.path.join(name, "inception.npz")
    # Rank 0 looks for all: another run may be about to write it.
    found = total(torch.tensor(float(rank == 0 and is_path and os.path.isfile(file))))
    headers = npz_headers(file) if found else {}
    stats, images = {}, None
    if "mu" in headers:
        stats = read_statistics(file, headers, features)
    if not stats or "arr_0" in headers and "pool" not in headers:
        images = open_images(reference, real=True, size=size)
    shape = tuple(images.shape if images else stats.get("shape", ()))
    if shape and size not in (None, shape[0]):
        raise ValueError(f"{name}: images of {shape[0]}x{shape[1]} pixels, but the samples have "
                         f"{size}; give a reference of their size")
    if shape and (shape == DIGIT) != (features == "digits"):
        raise ValueError(f"{name}: images of {shape} don't go with {features} features; samples "
                         "and reference must both be digits, (8, 8, 1), or both be pictures")
    if rank > 0:
        models.barrier()  # rank 0 downloads or trains the network first
    net = InceptionV3(weights) if features == "inception" else digits_net()
    if rank == 0:
        models.barrier()
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    if images:
        stop = MANIFOLD if stats else None  # only for precision and recall
        computed, _, _ = statistics(net, images, batch=batch, keep=MANIFOLD, stop=stop)
        stats = computed | stats
    result = Reference(name, net, stats)
    if prepared and images and rank == 0:
        with suppress(OSError):  # not writable: computed again next time
            result.save(file)
    return result


def read_statistics(path, headers, features):
    """The statistics of an .npz, read only where their shapes are right: it may be a zip bomb."""
    pool, spatial, _ = (InceptionV3 if features == "inception" else DigitsNet).widths
    shapes = {"mu": (pool,), "sigma": (pool, pool), "mu_s": (spatial,),
              "sigma_s": (spatial, spatial)}
    if "pool" in headers:
        rows = headers["pool"][0][:1]
        shapes["pool"] = (*min(rows, (MANIFOLD,)), pool)
    if "shape" in headers:
        shapes["shape"] = (3,)
    stats = {}
    for key, shape in shapes.items():
        found, dtype = headers.get(key, ("missing", None))
        if found != shape or dtype.kind not in "fiu":
            raise ValueError(f"{path}: {key} must be numbers {shape} for {features} features, "
                             f"but is {dtype} {found}")
        stats[key] = read_array(path, key)
        if not np.isfinite(stats[key]).all():
            raise ValueError(f"{path}: {key} is not finite (NaN or infinity)")
    return stats


def evaluate(samples, reference, features="inception", *, weights=None, batch=64, labels=None):
    """{"fid", "sfid", "is", "precision", "recall"}, and for digits with labels "accuracy".

    samples: an .npz with arr_0 uint8 (N, H, W, C), a folder of images, or such an array.
    reference: what load_reference() takes, or what it returned, with its features and weights.
    labels: (N,) what the samples should show, by default the .npz's "labels"; accuracy is the
        share that the digits' network agrees with.
    Precision and recall are nan where the reference is statistics alone. Collective under
    torch.distributed: every process passes the same, reads its share, and gets the same figures.
    ValueError: one line that names the file and what would be right.
    """
    images = samples if isinstance(samples, Images) else open_images(samples)
    ref = reference
    if not isinstance(ref, Reference):
        ref = load_reference(ref, features, size=images.shape[0], weights=weights, batch=batch)
    digits = isinstance(ref.net, DigitsNet)
    shape = tuple(ref.stats.get("shape", DIGIT if digits else images.shape))
    if images.shape != shape:
        raise ValueError(f"{images.name}: images of (height, width, channels) {images.shape}, but "
                         f"{shape} in {ref.name}; give a reference like the samples")
    if not digits:
        labels = None
    elif labels is None:
        labels = images.labels
    if labels is not None:
        labels = torch.as_tensor(labels).cpu()
        if labels.shape != (images.count,):
            raise ValueError(f"{images.name}: {images.count} images, but labels of shape "
                             f"{tuple(labels.shape)}")
    keep = images.count if "pool" in ref.stats else 0  # only precision and recall need them
    stats, score, accuracy = statistics(ref.net, images, batch=batch, keep=keep, labels=labels)
    device = next(ref.net.parameters()).device
    figures = torch.zeros(4, dtype=torch.float64, device=device)  # the other processes add zeros
    rank, _ = models.ranks()
    if rank == 0:
        figures[:] = math.nan
        for i, (mu, sigma) in enumerate((("mu", "sigma"), ("mu_s", "sigma_s"))):
            figures[i] = frechet_distance(stats[mu], stats[sigma], ref.stats[mu], ref.stats[sigma])
        if keep:
            real, fake = (torch.from_numpy(x["pool"]).to(device) for x in (ref.stats, stats))
            figures[2], figures[3] = precision_recall(real, fake)
    fid, sfid, precision, recall = total(figures).tolist()
    scores = {"fid": fid, "sfid": sfid, "is": score, "precision": precision, "recall": recall}
    if labels is not None:
        scores["accuracy"] = accuracy
    return scores


# ---------------------------------------------------------------- python fid.py

def label_rule(path):
    """How the labels were chosen, says sample.py's record beside the samples; "-" without one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with open(f"{path}.json", encoding="utf-8") as f:
            rule = json.load(f)["class_labels"]
        if isinstance(rule, str):
            return rule
    return "-"


def table(rows):
    """Dicts of cells -> Markdown, with the columns of the longest."""
    columns = max(rows, key=len)
    lines = ["| " + " | ".join(columns) + " |", "|---|---:|---|" + "---:|" * (len(columns) - 3)]
    for row in rows:
        cells = [row.get(column, math.nan) for column in columns]
        for i, cell in enumerate(cells):
            if isinstance(cell, float):
                cells[i] = "-" if math.isnan(cell) else f"{cell:.4f}"
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def parse_args(argv):
    p = models.command_line(__doc__)
    p.add_argument("samples", nargs="+", metavar="SAMPLES",
                   help="an .npz with arr_0 uint8 (N, H, W, C), as sample.py writes, or a folder")
    p.add_argument("reference", metavar="REFERENCE",
                   help="the same for real images; ADM's .npz; class folders, cropped to the size "
                        "of SAMPLES; what data.py has prepared; digits")
    p.add_argument("--weights", metavar="FILE",
                   help="of Inception, pytorch-fid's [downloaded once, 95 MB]")
    p.add_argument("--batch", type=models.number("[1, inf)", int), default=64, metavar="N",
                   help="images at a time, per process; no effect on the figures [%(default)s]")
    p.add_argument("--save-stats", metavar="FILE",
                   help="keep what REFERENCE amounts to as an .npz, itself a REFERENCE [off]")
    args = p.parse_args(argv)
    if args.save_stats:
        inputs = [os.path.realpath(path) for path in (*args.samples, args.reference)]
        folder = os.path.dirname(os.path.abspath(args.save_stats))
        if os.path.realpath(args.save_stats) in inputs or not os.path.isdir(folder):
            raise ValueError(f"--save-stats {args.save_stats}: must be a new file, in a folder "
                             "that exists")
    return args


def has_statistics(path):
    return os.path.isfile(path) and "mu" in npz_headers(path)


def main(argv=None):
    args = parse_args(argv)
    rank, _, _ = models.setup()
    for path in args.samples:
        if has_statistics(path) and not has_statistics(args.reference):
            raise ValueError(f"{path}: has statistics of real images, and {args.reference} has "
                             "none; the order is SAMPLES REFERENCE")
    samples = [open_images(path) for path in args.samples]
    shape = samples[0].shape
    for images in samples:
        if images.shape != shape:
            raise ValueError(f"{images.name}: images of {images.shape}, but {shape} in "
                             f"{samples[0].name}; score each size by itself")
    reference = load_reference(args.reference, "digits" if shape == DIGIT else "inception",
                               size=shape[0], weights=args.weights, batch=args.batch)
    rows = []
    for images in samples:
        scores = evaluate(images, reference, batch=args.batch)
        row = {"samples": images.name, "images": images.count, "labels": label_rule(images.name),
               "FID": scores.pop("fid"), "sFID": scores.pop("sfid"), "IS": scores.pop("is")}
        rows.append(row | scores)
    if rank == 0:
        if args.save_stats:
            reference.save(args.save_stats)
        print(table(rows))


if __name__ == "__main__":
    models.run(main)
