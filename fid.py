"""FID, sFID, Inception Score, precision and recall, as ADM's evaluator defines them.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz      # one of ADM's references
    python fid.py a.npz b.npz imagenet/train                       # a row each; or data.py's folder
    python fid.py samples.npz photos-32                            # in a small CNN's features
    torchrun --nproc-per-node 8 fid.py samples.npz reference.npz   # split over GPUs, same figures

The evaluator is openai/guided-diffusion's. Images are uint8, HWC in files and CHW in tensors.
ADM's acceptance test (not run here): admnet_guided_upsampled_imagenet256.npz against the reference
above must give IS 215.837, FID 3.94256, sFID 6.1404, precision 0.8265, recall 0.5309.
"""
import json
import math
import os
import shutil
import struct
import sys
import tempfile
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import checkpoints
import data
import runtime
from runtime import UserError

MANIFOLD = 10_000  # real images that precision and recall look at (ADM)
SPLIT = 5_000      # images in a split of the Inception Score (ADM)
WIDTH = 64         # features of the classifier
TRAINING = 600     # steps that it is trained for; after a change delete what is kept of it
CLASSES = 10_000   # at most, of a classifier
LARGEST = 64       # it scores prepared pixels of up to so many a side, without being asked


# ---------------------------------------------------------------- metrics

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): Heusel et al. 2017, Eq. 6.

    mu: (D,), sigma: (D, D) of any rank -> a float >= 0, computed in float64.

    With sigma1 = A A^T, the trace of the root is the sum of the square roots of the eigenvalues
    of A^T sigma2 A. A square root turns a rounding error of 1e-16 into 1e-8. So A is the pivoted
    Cholesky factor of the covariance of lower rank, cut at that rank: no eigenvalue is zero for
    lack of rank, and A's shrinking columns keep the small ones accurate.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise UserError("a mean or covariance is not finite (NaN or infinity)")
    a1 = cholesky_factor(sigma1)
    a2 = cholesky_factor(sigma2)
    product = a1.T @ (sigma2 @ a1) if a1.shape[1] <= a2.shape[1] else a2.T @ (sigma1 @ a2)
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
        raise UserError("sigma is not a covariance: it has negative eigenvalues")
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
    In float64 (ADM: float16), so that ties and duplicates count as inside; `block` rows at a time.
    """
    real = torch.as_tensor(real).double()
    fake = torch.as_tensor(fake).double()
    if min(len(real), len(fake)) <= k or not (real.isfinite().all() and fake.isfinite().all()):
        raise UserError(f"precision and recall need more than {k} finite features of each")
    center = real.mean(0)  # small norms keep |a|^2 - 2 ab + |b|^2 accurate
    real = real - center
    fake = fake - center
    return covered(fake, real, k, block), covered(real, fake, k, block)


def covered(points, manifold, k, block):
    """Share of the points (N, D) that lie in some k-NN ball of the manifold (M, D)."""
    def squared_distances(a, b):
        return torch.addmm(b.square().sum(1), a, b.T, alpha=-2) + a.square().sum(1, keepdim=True)
    inside = torch.zeros(len(points), dtype=bool, device=points.device)
    tolerance = 1e-12 * manifold.square().sum(1).max()  # ties must survive rounding
    for i in range(0, len(manifold), block):
        centers = manifold[i:i + block]
        d = squared_distances(centers, manifold)
        d.diagonal(i).fill_(math.inf)  # a point is not its own neighbour
        radii = d.topk(k, largest=False).values.amax(1, keepdim=True) + tolerance
        inside |= (squared_distances(centers, points) <= radii).any(0)
    return inside.double().mean().item()


# ---------------------------------------------------------------- Inception

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
STRIDE_2 = {"Conv2d_1a_3x3", "Mixed_6a_branch3x3", "Mixed_6a_branch3x3dbl_3",
            "Mixed_7a_branch3x3_2", "Mixed_7a_branch7x7x3_4"}
UNPADDED = STRIDE_2 | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}


class InceptionV3(nn.Module):
    """The network of 2015-12-05: uint8 (N, 3 or 1, H, W) -> pool, spatial, probs, float32.

    pool (N, 2048) is for FID, precision and recall; spatial (N, 2023) for sFID; probs (N, 1008)
    for the Inception Score: softmax of the logits without their bias, as in ADM's graph.
    spatial is that graph's "mixed_6/conv:0"[..., :7], here the first 7 channels of Mixed_6d.
    weights: a file in pytorch-fid's layout; None: downloaded once, to torch.hub's folder.
    """
    widths = (2048, 2023, 1008)

    def __init__(self, weights=None):
        super().__init__()
        self.weight = nn.ParameterDict()
        self.bias = nn.ParameterDict()
        options = {"map_location": "cpu", "weights_only": True}
        try:
            state = (torch.load(weights, **options) if weights else
                     torch.hub.load_state_dict_from_url(INCEPTION_URL, check_hash=True, **options))
            for name in [key[:-12] for key in state if key.endswith(".conv.weight")]:
                # W x and its batch norm as one: gamma (W x - mean) / sqrt(var + 0.001) + beta
                keys = "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"
                weight, gamma, beta, mean, var = (state[f"{name}.{key}"].double() for key in keys)
                scale = gamma / (var + 0.001).sqrt()
                name = name.replace(".", "_")
                self.weight[name] = (weight * scale[:, None, None, None]).float()
                self.bias[name] = (beta - mean * scale).float()
            if len(self.weight) != 94 or state["fc.weight"].shape != (1008, 2048):
                raise ValueError("not 94 convolutions and an fc.weight of (1008, 2048)")
        except Exception as e:  # noqa: BLE001  torch.load raises anything
            reason = (str(e) or type(e).__name__).splitlines()[0]
            raise UserError(f"{weights or 'torch.hub'}: no Inception weights ({reason}); download "
                            f"{INCEPTION_URL} and give it as --weights FILE; training does "
                            "without them with --eval-samples 0") from None
        self.register_buffer("fc", state["fc.weight"].float())
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, x):
        with plain_float32(x.device.type):
            x = (resize_tf1(x.expand(-1, 3, -1, -1)) - 128) / 128            # (N, 3, 299, 299)
            x = x.contiguous(memory_format=torch.channels_last)
            x = self.convs(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
            x = F.max_pool2d(x, 3, 2)                                        # (N, 64, 73, 73)
            x = self.convs(x, "Conv2d_3b_1x1", "Conv2d_4a_3x3")
            x = F.max_pool2d(x, 3, 2)                                        # (N, 192, 35, 35)
            for block in "5b", "5c", "5d", "6a", "6b", "6c", "6d":           # (N, 768, 17, 17)
                x = self.mixed(x, block)
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                # (N, 17 * 17 * 7)
            for block in "6e", "7a", "7b", "7c":                             # (N, 2048, 8, 8)
                x = self.mixed(x, block)
            pool = x.mean((2, 3))                                            # (N, 2048)
            return pool, spatial, (pool @ self.fc.T).softmax(1)

    def convs(self, x, *names):
        """Convolutions of these names, one after the other, each with a ReLU."""
        for name in names:
            weight = self.weight[name]
            bias = self.bias[name]
            padding = 0 if name in UNPADDED else [k // 2 for k in weight.shape[2:]]
            x = F.conv2d(x, weight, bias, 2 if name in STRIDE_2 else 1, padding).relu_()
        return x

    def mixed(self, x, block):
        """A block of branches side by side; their channels are concatenated."""
        def branch(x, name, length=None):
            names = [f"{name}_{i + 1}" for i in range(length)] if length else [name]
            return self.convs(x, *(f"Mixed_{block}_branch{name}" for name in names))
        if block in ("6a", "7a"):
            last = F.max_pool2d(x, 3, 2)
        elif block == "7c":
            last = branch(F.max_pool2d(x, 3, 1, 1), "_pool")
        else:  # torchvision's counts the padding
            last = branch(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), "_pool")
        if block in ("5b", "5c", "5d"):
            branches = [branch(x, "1x1"), branch(x, "5x5", 2), branch(x, "3x3dbl", 3)]
        elif block == "6a":
            branches = [branch(x, "3x3"), branch(x, "3x3dbl", 3)]
        elif block in ("6b", "6c", "6d", "6e"):
            branches = [branch(x, "1x1"), branch(x, "7x7", 3), branch(x, "7x7dbl", 5)]
        elif block == "7a":
            branches = [branch(x, "3x3", 2), branch(x, "7x7x3", 4)]
        else:
            a = branch(x, "3x3_1")
            b = branch(x, "3x3dbl", 2)
            branches = [branch(x, "1x1"), branch(a, "3x3_2a"), branch(a, "3x3_2b"),
                        branch(b, "3x3dbl_3a"), branch(b, "3x3dbl_3b")]
        return torch.cat([*branches, last], 1)


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
def plain_float32(device_type):
    """Full fp32, whatever autocast, TF32 or cuDNN settings the caller has."""
    cudnn = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    settings = [(cudnn, "enabled", True), (cudnn, "benchmark", False),
                (cudnn, "deterministic", True)]
    if hasattr(torch.backends, "fp32_precision"):  # from torch 2.9 on; the older ones can't be read
        mkldnn = torch.backends.mkldnn             # where a caller has set these
        settings += [(part, "fp32_precision", "ieee")
                     for part in (matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)]
    else:
        settings += [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    saved = [getattr(part, name) for part, name, _ in settings]
    try:
        for part, name, value in settings:
            setattr(part, name, value)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for (part, name, _), value in zip(settings, saved, strict=True):
            setattr(part, name, value)


# ---------------------------------------------------------------- a classifier of small images

class Classifier(nn.Module):
    """A small CNN for images of a shape (H, W, C), H = W, in K classes.

    uint8 (N, C, H, W) -> pool (N, 64), for FD, precision and recall; spatial: none, (N, 0); probs
    (N, K), for the accuracy.
    """

    def __init__(self, shape, classes):
        super().__init__()
        self.widths = (WIDTH, 0, classes)
        side, _, channels = shape
        stride = 1 if side <= 16 else 2
        side = math.ceil(side / stride)
        width = 16
        self.convs = nn.ModuleList([nn.Conv2d(channels, width, 3, stride, padding=1)])
        while side > 3:
            wider = min(2 * width, 128)
            self.convs.append(nn.Conv2d(width, wider, 3, padding=1))
            width = wider
            side //= 2
        self.fc1 = nn.Linear(width * side ** 2, WIDTH)
        self.fc2 = nn.Linear(WIDTH, classes)

    def forward(self, x):
        with plain_float32(x.device.type):
            x = F.silu(self.convs[0](x.float() / 127.5 - 1))                 # ReLUs would die
            for conv in self.convs[1:]:
                x = F.max_pool2d(F.silu(conv(x)), 2)
            pool = F.silu(self.fc1(x.flatten(1)))
            return pool, pool[:, :0], self.fc2(pool).softmax(1)


def train_classifier(images):
    """A Classifier of labelled Images, trained on all but every fifth; prints its accuracy there.

    Nothing of the caller's matters to the weights or is changed. Rank 0 trains it for all.
    UserError: no labels, one class, or too few images to learn from.
    """
    if images.array is None or images.labels is None or images.labels.min() < 0:
        raise UserError(f"{images.name}: features classifier needs images with labels: a folder "
                        "that data.py has prepared, digits, or an .npz with arr_0 and labels")
    remedy = "give --eval-samples 0, or Inception's --weights FILE"
    if images.shape[0] != images.shape[1] or images.labels.max() >= CLASSES:
        raise UserError(f"{images.name}: the classifier needs square images, here {images.shape}, "
                        f"and labels below {CLASSES:,}, here up to {images.labels.max()}; {remedy}")
    counts = np.bincount(images.labels)
    if np.count_nonzero(counts) == 1:
        raise UserError(f"{images.name}: has one class, so that no classifier can score; {remedy}")
    place = np.argsort(images.order)  # as in the file, where classes are in order
    held_out = place[::5]
    others = place[np.arange(len(place)) % 5 > 0]
    side = images.shape[0]
    reach = side // 8
    rank, _ = runtime.ranks()

    def batch(chosen):
        x = torch.from_numpy(images.array[images.order[chosen]])
        x = x.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        return x, torch.from_numpy(images.labels[chosen])
    with (plain_float32("cpu"), torch.inference_mode(False), torch.enable_grad(),
          torch.random.fork_rng(devices=[]), ExitStack() as at_exit):
        torch.default_generator.manual_seed(0)
        net = Classifier(images.shape, len(counts))
        right = torch.zeros(1)
        if rank == 0:
            at_exit.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # the order of sums, and so the weights, depend on it
            optimizer = torch.optim.Adam(net.parameters())
            rate = 0.03 / len(net.convs)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=TRAINING)
            bar = at_exit.enter_context(runtime.progress(64 * TRAINING, "classifier"))
            for _ in range(TRAINING):
                x, y = batch(others[torch.randint(len(others), (64,))])
                dy, dx = torch.randint(2 * reach + 1, (2,)).tolist()  # shifted
                x = F.pad(x, [reach] * 4)[:, :, dy:dy + side, dx:dx + side]
                optimizer.zero_grad()
                F.cross_entropy(net.fc2(net(x)[0]), y).backward()
                optimizer.step()
                schedule.step()
                bar.update(64)
            net.requires_grad_(False)
            for chosen in np.array_split(held_out, math.ceil(len(held_out) / 500)):
                x, y = batch(chosen)
                right += (net(x)[2].argmax(1) == y).sum()
    for x in (*net.requires_grad_(False).parameters(), right):
        runtime.reduce(x.mul_(rank == 0))
    accuracy = right.item() / len(held_out)
    often = counts.max() / images.count  # the accuracy of always naming the largest class
    found = (f"a classifier of its {len(counts)} classes, trained on the others, recognises "
             f"{accuracy:.3f} of {len(held_out)} held-out images")
    if accuracy < often + (1 - often) / 4:
        raise UserError(f"{images.name}: {found}: too few images to learn from; {remedy}")
    if rank == 0:
        print(f"{images.name}: {found}", flush=True)
    return net


# ---------------------------------------------------------------- images

class Images:
    """uint8 images, read batch by batch: an array (N, H, W, C), an .npz with arr_0, or a folder.

    real: also "digits", what data.py has prepared, and class folders, cropped to size x size.
    These are sorted by class, and therefore taken in a fixed random order.

    count, shape (H, W, C), labels (count,) int64 or None; order (count,): their rows in the array
    or the list of files
    """

    def __init__(self, source, *, real=False, size=None):
        is_path = isinstance(source, (str, os.PathLike))
        self.name = name = os.fspath(source) if is_path else "the array"
        self.array = self.files = self.size = self.labels = None
        by_class = False
        rows = None
        if not is_path:
            self.array = np.asarray(source)
        elif name == "digits" or data.is_prepared(name):
            if not real:
                raise UserError(f"{name}: real images; the order is SAMPLES REFERENCE")
            prepared = data.Data(name)
            by_class = True
            if prepared.vae is None:
                self.array = prepared.images
                rows = prepared.rows
            else:
                self.files = prepared.originals()
                self.size = prepared.size
        elif os.path.isdir(name):
            self.files, _ = data.list_images(name)
            if not self.files:
                raise UserError(f"{name}: a folder without images")
            if real and os.path.abspath(name) not in map(os.path.dirname, self.files):
                by_class = True
                self.size = size
        headers = {}
        if self.files:
            first = data.read_image(self.files[0], self.size)
            shape = (len(self.files), *first.shape)
            dtype = first.dtype
        elif self.array is not None:
            shape = self.array.shape if rows is None else (len(rows), *self.array.shape[1:])
            dtype = self.array.dtype
        else:
            headers = npz_headers(name)
            if "mu" in headers and not real:
                raise UserError(f"{name}: has statistics; the order is SAMPLES REFERENCE")
            shape, dtype = headers.get("arr_0", ((), "nothing"))
        if dtype != np.uint8 or len(shape) != 4 or shape[0] < 4 or shape[3] not in (1, 3):
            raise UserError(f"{name}: must have at least 4 images, uint8 (N, H, W, C) with C 1 or "
                            f"3, in an .npz as arr_0; found {dtype} {shape}")
        if headers:
            self.array = npz_array(name, "arr_0")
            labels_shape, labels_dtype = headers.get("labels", (None, None))
            if labels_shape == shape[:1] and labels_dtype.kind in "iu":
                self.labels = np.array(npz_array(name, "labels"), np.int64)
        self.order = np.arange(shape[0]) if rows is None else rows
        if by_class:
            mixed = np.random.RandomState(0).permutation(len(self.order))
            self.order = self.order[mixed]
            self.labels = None if rows is None else prepared.labels[mixed]
        self.count = len(self.order)
        self.shape = tuple(shape[1:])

    def read(self, path):
        """An image of the folder. UserError: it is of another shape than the first."""
        image = data.read_image(path, self.size)
        if image.shape != self.shape:
            raise UserError(f"{path}: is {image.shape}, others of its folder are {self.shape}; "
                            f"make them one size")
        return image

    def batches(self, batch, rank=0, world=1):
        """Yields (rows (b,) int64, images (b, C, H, W)): the rows rank::world, in order."""
        rows = np.arange(rank, self.count, world)
        parts = [rows[i:i + batch] for i in range(0, len(rows), batch)]
        if self.files:
            paths = [self.files[i] for i in self.order[rows]]
            read = data.read_ahead(paths, batch, min(8, os.cpu_count()), self.read)
            arrays = map(np.stack, read)
        else:
            arrays = (self.array[self.order[part]] for part in parts)
        for part, x in zip(parts, arrays, strict=True):
            yield torch.from_numpy(part), torch.from_numpy(x).permute(0, 3, 1, 2)


@contextmanager
def open_npz(path):
    """A zip file to read; whatever is wrong inside it becomes a UserError that names path."""
    try:
        with zipfile.ZipFile(path) as z:
            yield z
    except UserError:
        raise
    except Exception as e:  # noqa: BLE001  zipfile raises anything
        raise UserError(f"{path}: neither a folder of images nor an intact .npz ({e})") from None


def npz_headers(path):
    """{name: (shape, dtype)} of the arrays in an .npz, which can be far larger than the file."""
    with open_npz(path) as z:
        headers = {}
        for name in z.namelist():
            if name.endswith(".npy"):
                with z.open(name) as f:
                    shape, _, dtype = read_header(f)
                headers[name.removesuffix(".npy")] = shape, dtype
    return headers


def read_header(f):
    """(shape, whether in Fortran order, dtype) of an array in a .npy file, open at its start."""
    np.lib.format.read_magic(f)
    return np.lib.format.read_array_header_1_0(f)


def npz_array(path, name):
    """An array of an .npz, memory-mapped; a compressed one is unpacked to a temporary file."""
    with open_npz(path) as z:
        entry = z.getinfo(f"{name}.npy")
        with z.open(entry) as f:
            shape, fortran, dtype = read_header(f)
            header = f.tell()
        if entry.file_size != header + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has another size than its header says")
        order = "F" if fortran else "C"
        if entry.compress_type == zipfile.ZIP_STORED:
            with open(path, "rb") as file:
                # The values come after the entry's own header: 30 bytes, its name, extra fields.
                file.seek(entry.header_offset + 26)
                start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                return np.memmap(file, dtype, "r", start + header, shape, order)
        try:
            with z.open(entry) as packed, tempfile.TemporaryFile() as file:
                shutil.copyfileobj(packed, file)
                return np.memmap(file, dtype, "r", header, shape, order)
        except OSError as e:
            raise UserError(f"{path}: can't be unpacked to a temporary file ({e.strerror or e}); "
                            "make room there, or set TMPDIR") from None


def read_statistics(path, headers, shapes):
    """{name: array} of numbers of these shapes. UserError: one is missing, or of another shape."""
    for key, shape in shapes.items():
        found, dtype = headers.get(key, ("missing", None))
        if found != shape or dtype.kind not in "fiu":
            raise UserError(f"{path}: {key} must be numbers {shape}, but is {dtype} {found}")
    return {key: np.array(npz_array(path, key)) for key in shapes}


# ---------------------------------------------------------------- evaluation

def statistics(net, images, *, batch, keep):
    """One pass of the images through net, shared out among the processes; sums are in float64.

    -> (stats, Inception Score, share of the images' labels that net agrees with), everywhere alike.
    stats: mu, sigma (of pool), mu_s, sigma_s (of spatial, if the network has it), pool (of the
    first `keep` images), shape
    """
    rank, world = runtime.ranks()
    device = next(net.parameters()).device
    count = images.count
    if rank == 0 and count < net.widths[0]:
        print(f"fid.py: warning: {images.name}: {count} images are fewer than the {net.widths[0]} "
              "features, the distance comes out too high", file=sys.stderr)
    # Moments are of differences from rank 0's features of the first image: so nothing cancels.
    _, first = next(images.batches(1))
    names = ["", "_s"] if net.widths[1] else [""]
    origins = [runtime.reduce(x[0].double() * (rank == 0))
               for x in net(first.to(device))[:len(names)]]
    zeros = origins[0].new_zeros
    sums = [zeros(len(x)) for x in origins]
    products = [zeros(len(x), len(x)) for x in origins]
    kept = torch.zeros(min(count, keep), net.widths[0], device=device)
    splits = math.ceil(count / SPLIT)
    p_sum = zeros(splits, net.widths[2])
    p_log_p = zeros(splits)
    right = zeros(1)
    with runtime.progress(math.ceil(count / world), images.name) as bar:
        for rows, x in images.batches(batch, rank, world):
            pool, spatial, probs = net(runtime.move(x, device))
            for i, features in enumerate((pool, spatial)[:len(names)]):
                difference = features.double() - origins[i]
                sums[i] += difference.sum(0)
                products[i].addmm_(difference.T, difference)
            wanted = runtime.move(rows[rows < keep], device)
            kept[wanted] = pool[:len(wanted)]
            p = probs.double()
            split = runtime.move(rows // SPLIT, device)
            p_sum.index_add_(0, split, p)
            p_log_p.index_add_(0, split, torch.xlogy(p, p).sum(1))
            if images.labels is not None:
                labels = runtime.move(torch.from_numpy(images.labels)[rows], device)
                right += (probs.argmax(1) == labels).sum()
            bar.update(len(rows))
    stats = {"pool": runtime.reduce(kept).cpu().numpy(), "shape": np.array(images.shape)}
    for i, suffix in enumerate(names):
        mean = runtime.reduce(sums[i]) / count
        product = runtime.reduce(products[i])
        sigma = (product - count * torch.outer(mean, mean)) / (count - 1)
        if not sigma.isfinite().all():
            raise UserError(f"{images.name}: features are not finite; are the weights right?")
        stats[f"mu{suffix}"] = (origins[i] + mean).cpu().numpy()
        stats[f"sigma{suffix}"] = sigma.cpu().numpy()
    n = torch.bincount(torch.arange(count) // SPLIT).to(device)
    marginal = runtime.reduce(p_sum) / n[:, None]
    entropy = -torch.xlogy(marginal, marginal).sum(1)  # as in inception_score()
    kl = runtime.reduce(p_log_p) / n + entropy
    return stats, kl.exp().mean().item(), runtime.reduce(right).item() / count


def choose_features(reference, weights=None):
    """Which features score against a reference unless something else is asked for.

    "classifier" for digits, small prepared pixels, and statistics of its width; else "inception".
    """
    name = os.fspath(reference)
    if weights is not None:
        return "inception"
    if data.is_prepared(name):
        info = data.read_info(name)
        small = info.get("vae") is None and info.get("size", math.inf) <= LARGEST
    elif os.path.isfile(name):
        small = npz_headers(name).get("mu", [None])[0] == (WIDTH,)
    else:
        small = name == "digits"
    return "classifier" if small else "inception"


def load_reference(reference, features="inception", *, size=None, weights=None, batch=64):
    """What evaluate() needs of the real images, read once and before anything expensive.

    reference: an .npz with ADM's statistics (mu, sigma; mu_s, sigma_s) or with images, arr_0; a
        folder of images, or of class folders, cropped to size; "digits"; a folder that data.py
        has prepared; an array of images. A prepared folder keeps its statistics, as inception.npz
        or classifier.npz, torch.hub's folder those of the digits.
    features: "inception", or "classifier": of a Classifier trained on these images, which need
        labels. size: height of the samples, in pixels.
    -> a namespace: name, features, net, stats (of statistics(), and the classifier's weights as
    net.*, or the SHA-256 of Inception's; ADM's lack it, pool and shape), shape
    """
    if features not in ("inception", "classifier"):
        raise UserError(f"features {features}: there are inception and classifier")
    small = features == "classifier"
    if weights is not None and small:
        raise UserError(f"--weights {weights}: are Inception's, not for --features classifier")
    rank, _ = runtime.ranks()
    name = os.fspath(reference) if isinstance(reference, (str, os.PathLike)) else "the reference"
    kept = None
    if data.is_prepared(name):
        kept = os.path.join(name, f"{features}.npz")
    elif name == "digits":
        kept = os.path.join(torch.hub.get_dir(), "checkpoints", f"digits-{features}.npz")
    file = kept or name
    # Rank 0 looks for all: another run may be about to write it.
    found = runtime.reduce(torch.tensor(float(rank == 0 and os.path.isfile(file))))
    headers = {}
    stats = {}
    net = None
    if found:
        try:
            headers = npz_headers(file)
            stats, net = read_reference(file, headers, small)
        except UserError:
            if kept is None:
                raise
    # A kept file may be damaged, or on one machine alone: then all processes compute it anew.
    if kept and not runtime.reduce(torch.tensor(float(bool(stats))), dist.ReduceOp.MIN):
        headers = {}
        stats = {}
        net = None
    images = None
    shape = None
    if "shape" in stats:
        shape = tuple(stats["shape"].tolist())
    # ADM's files have statistics and images: precision and recall need the latter's features.
    unread_images = "arr_0" in headers and "pool" not in headers
    if not stats or unread_images:
        images = Images(reference, real=True, size=size)
        shape = images.shape
    if shape and size not in (None, shape[0]):
        raise UserError(f"{name}: its images are {shape}, unlike the samples of {size} pixels; "
                        "give a reference like the samples")
    if small and net is None:
        net = train_classifier(images)
        stats |= {f"net.{key}": x.numpy() for key, x in net.state_dict().items()}
    elif net is None:
        first = int(os.environ.get("LOCAL_RANK", rank)) == 0
        if not first:
            runtime.barrier()  # one process of each machine downloads for all of it
        net = InceptionV3(weights)
        if first:
            runtime.barrier()
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    if not small:
        digest = np.frombuffer(bytes.fromhex(checkpoints.fingerprint(net)), np.uint8)
        known = stats.get("weights", None if kept else digest)  # ADM's have none
        same = images is not None or np.array_equal(known, digest)
        if not runtime.reduce(torch.tensor(float(same)), dist.ReduceOp.MIN):
            if not kept:
                raise UserError(f"{name}: has statistics of other Inception weights than these")
            stats = {}
            images = Images(reference, real=True, size=size)
    if images:
        computed, _, _ = statistics(net, images, batch=batch, keep=MANIFOLD)
        stats = computed | stats
        if not small:
            stats["weights"] = digest
        if kept and rank == 0:
            with suppress(OSError):  # not writable: computed anew the next time
                os.makedirs(os.path.dirname(kept), exist_ok=True)
                with runtime.atomic(kept) as f:
                    np.savez(f, **stats)
    return SimpleNamespace(name=name, features=features, net=net, stats=stats, shape=shape)


def read_reference(file, headers, small):
    """The statistics in an .npz with these headers, {} if it has none, and its Classifier if small.

    UserError: they are of another shape, or without the classifier.
    """
    if "mu" not in headers:
        return {}, None
    d = WIDTH if small else InceptionV3.widths[0]
    shapes = {"mu": (d,), "sigma": (d, d)}
    if "mu_s" in headers and not small:  # pytorch-fid's files have none
        d_s = InceptionV3.widths[1]
        shapes |= {"mu_s": (d_s,), "sigma_s": (d_s, d_s)}
    if "pool" in headers:
        rows, *_ = headers["pool"][0] or (0,)
        shapes |= {"pool": (min(rows, MANIFOLD), d)}
    if "pool" in headers or small:
        shapes |= {"shape": (3,)}
    if "weights" in headers:
        shapes |= {"weights": (32,)}
    stats = read_statistics(file, headers, shapes)
    if not small:
        return stats, None
    classes, *_ = headers.get("net.fc2.weight", ((), None))[0] or (0,)
    height, width, channels = stats["shape"].astype(int).tolist()
    if not (1 < classes <= CLASSES and height == width in range(1, 1025) and channels in (1, 3)):
        raise UserError(f"{file}: has statistics of a classifier, but no classifier")
    net = Classifier((height, width, channels), classes).requires_grad_(False)
    shapes = {f"net.{key}": tuple(x.shape) for key, x in net.state_dict().items()}
    weights = read_statistics(file, headers, shapes)
    net.load_state_dict({key: torch.from_numpy(weights[f"net.{key}"]) for key in net.state_dict()})
    return stats | weights, net


def evaluate(samples, reference, features="inception", *, weights=None, batch=64):
    """{"fid", "sfid", "is", "precision", "recall"}, or {"fd", "accuracy", "precision", "recall"}.

    The latter are by the features of a classifier of the reference's images. FD is FID's distance
    in them, and can be compared only with FD in the same ones. accuracy: the share of samples that
    the classifier takes for what their labels say; nan without labels.

    samples: an .npz with arr_0 uint8 (N, H, W, C), a folder of images, or such an array.
    reference: what load_reference() takes, or what it returned, with its features and weights.
    Precision and recall are nan where the reference is statistics alone, sFID without mu_s.
    Collective under torch.distributed: every process reads its share and gets the same figures.
    """
    images = samples if isinstance(samples, Images) else Images(samples)
    ref = reference
    if not isinstance(ref, SimpleNamespace):
        ref = load_reference(ref, features, size=images.shape[0], weights=weights, batch=batch)
    if ref.shape and images.shape != ref.shape:
        raise UserError(f"{images.name}: images of {images.shape}, but {ref.shape} in {ref.name}")
    keep = images.count if "pool" in ref.stats else 0  # only precision and recall need them
    stats, score, accuracy = statistics(ref.net, images, batch=batch, keep=keep)
    figures = torch.zeros(4, dtype=torch.float64)
    if runtime.ranks()[0] == 0:  # the other processes add zeros
        device = next(ref.net.parameters()).device
        figures[:] = math.nan
        for i, suffix in enumerate(["", "_s"]):
            mu = f"mu{suffix}"
            sigma = f"sigma{suffix}"
            if mu in ref.stats:
                figures[i] = frechet_distance(stats[mu], stats[sigma],
                                              ref.stats[mu], ref.stats[sigma])
        if keep:
            real, fake = (torch.from_numpy(x["pool"]).to(device) for x in (ref.stats, stats))
            figures[2], figures[3] = precision_recall(real, fake)
    distance, spatial_distance, precision, recall = runtime.reduce(figures).tolist()
    manifolds = {"precision": precision, "recall": recall}
    if ref.features == "classifier":
        accuracy = math.nan if images.labels is None else accuracy
        return {"fd": distance, "accuracy": accuracy} | manifolds
    return {"fid": distance, "sfid": spatial_distance, "is": score} | manifolds


# ---------------------------------------------------------------- python fid.py

def label_rule(path):
    """How the labels were chosen, says sample.py's record beside the samples; "-" without one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(Path(f"{path}.json").read_bytes())["class_labels"])
    return "-"


def main(argv=None):
    p = runtime.command_line(__doc__)
    p.add_argument("samples", nargs="+", metavar="SAMPLES",
                   help="an .npz with arr_0 uint8 (N, H, W, C), as sample.py writes, or a folder")
    p.add_argument("reference", metavar="REFERENCE",
                   help="the same of real images; ADM's .npz; class folders; a folder of data.py's")
    p.add_argument("--features", choices=["inception", "classifier"],
                   help="a classifier is trained on REFERENCE's images [classifier for digits and "
                   f"prepared pixels up to {LARGEST}, else inception]")
    p.add_argument("--weights", metavar="FILE", help="Inception's [downloaded once, 95 MB]")
    p.add_argument("--batch", type=runtime.number("[1, inf)", int), default=64, metavar="N",
                   help="images at a time, per process; no effect on the figures [%(default)s]")
    p.add_argument("--save-stats", type=Path, metavar="FILE", help="to keep REFERENCE's [off]")
    p.add_argument("--picture", type=Path, metavar="FILE",
                   help="a .png with a row of the first ten images of each SAMPLES [off]")
    args = p.parse_args(argv)
    inputs = [Path(path).resolve() for path in (*args.samples, args.reference)]
    for flag, target in ("save-stats", args.save_stats), ("picture", args.picture):
        if target and (target.resolve() in inputs or not target.parent.is_dir()):
            raise UserError(f"--{flag} {target}: must not be an input, and its folder must exist")
        if target:
            inputs.append(target.resolve())  # the two must differ
    rank, _, _ = runtime.setup()
    samples = [Images(path) for path in args.samples]
    if args.picture and len({images.shape for images in samples}) > 1:
        raise UserError(f"--picture {args.picture}: the images of all SAMPLES must have one size")
    features = args.features or choose_features(args.reference, args.weights)
    reference = load_reference(args.reference, features, size=samples[0].shape[0],
                               weights=args.weights, batch=args.batch)
    columns = ["FID", "sFID", "IS", "precision", "recall"]
    if features == "classifier":
        columns = ["FD", "accuracy", "precision", "recall"]
    table = [["samples", "images", "labels", *columns],
             ["---", "---:", "---"] + ["---:"] * len(columns)]
    for images in samples:
        scores = evaluate(images, reference, batch=args.batch)
        figures = [scores.get(column.lower(), math.nan) for column in columns]
        cells = ["-" if math.isnan(figure) else f"{figure:.4f}" for figure in figures]
        table.append([images.name, str(images.count), label_rule(images.name), *cells])
    if rank == 0:
        for cells in table:
            print("| " + " | ".join(cells) + " |", flush=True)
        if args.save_stats:
            with runtime.atomic(args.save_stats) as f:
                np.savez(f, **reference.stats)
        if args.picture:
            from sample import save_grid
            rows = [next(images.batches(10))[1] for images in samples]
            width = min(map(len, rows))  # some may have fewer
            picture = torch.cat([row[:width] for row in rows]).permute(0, 2, 3, 1)
            save_grid(picture.numpy(), args.picture, width)


if __name__ == "__main__":
    runtime.run(main)
