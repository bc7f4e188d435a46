"""A folder of images -> an array, once; then the reader of that array, or of scikit-learn's digits.

    python data.py imagenet/train --size 256 --out latents-256      # means and stds of latents
    python data.py photos --size 64 --vae none --out photos-64      # pixels
    torchrun --nproc-per-node 8 data.py imagenet/train --size 256 --out latents-256

FOLDER holds one folder of images a class. Interrupted, the same command goes on where it was.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import checkpoints
import models
import runtime
from runtime import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Data:
    """The images that a run trains on: Data("digits"), or Data(DIR) of `python data.py`.

    DIR/x.npy holds pixels, uint8 (N, H, W, 3), or latents, float16 (N, 2, 2, c, h, w): plain and
    flipped (--no-flip: plain alone), mean and std. It is in the order of the classes.

    kind: "digits", "pixels" or "latents"; shape: (C, H, W) of x0; classes: their names
    labels: int64 (N,); images: the array, for pixels and digits uint8 (N, H, W, C)
    source, size: the folder of images, and to how many pixels they were cropped
    vae: the VAE's name, None for pixels; identity: what a resumed run compares
    UserError: one line that names --data.
    """

    def __init__(self, name):
        if str(name) == "digits" and is_prepared(name):
            raise UserError("--data digits: are scikit-learn's scans, and also a folder here that "
                            "data.py prepared; give ./digits for the folder, or rename it")
        if str(name) == "digits":
            self.kind = "digits"
            self.flip = False
            self.vae = None
            self.source = None
            self.size = 8
            self.images, self.labels = digits()
            self.classes = [*"0123456789"]
            self.shape = (1, 8, 8)
            self.identity = "digits"
            return
        if not is_prepared(name):
            raise UserError(f"--data {name}: neither digits nor prepared; to prepare images, run "
                            f"python data.py FOLDER --size PIXELS --out DIR")
        if Path(name, "progress").exists():
            raise UserError(f"--data {name}: not complete; run its data.py command again")
        info = read_info(name)
        self.images = open_array(name)
        try:
            self.kind = info["kind"]
            self.flip = info["flip"]
            self.classes = info["classes"]
            self.vae = info["vae"]
            self.source = info["source"]
            self.size = info["size"]
            self.labels = np.repeat(np.arange(len(self.classes)), info["counts"])
            self.identity = [info[key] for key in ("images_sha256", "vae_sha256", "size", "flip")]
        except KeyError:
            raise UserError(f"--data {name}: not a folder that data.py prepared") from None
        self.shape = (3, self.size, self.size) if self.kind == "pixels" else self.images.shape[3:]

    def __len__(self):
        return len(self.labels)

    def index(self, seed, step, batch):
        """The images of a step, (batch,) int64: each once an epoch, in an order drawn for it."""
        n = len(self)
        place = torch.arange(step * batch, (step + 1) * batch)  # in all epochs, one after another
        parts = []
        for epoch in (place // n).unique().tolist():
            rows = place[place // n == epoch] % n
            parts.append(epoch_order(seed, epoch, n)[rows])
        return torch.cat(parts)

    def get(self, index, flip=None, posterior=None):
        """A batch: index (N,) int64, flip (N,) bool, posterior (N, C, H, W) normal draws.

        -> x0 (N, C, H, W) float32 and y (N,) int64, on the posterior's device if there is one.
        Where flip or posterior don't apply, or are None, they are ignored (latents: the mean).
        """
        index = np.asarray(index)
        flip = np.zeros(len(index), bool) if flip is None or not self.flip else np.asarray(flip)
        if self.kind == "latents":
            x = self.images[index, flip.astype(int)]  # reads only the chosen view
        else:
            x = self.images[index]
            x[flip] = x[flip, :, ::-1]
        x = torch.from_numpy(x)
        y = torch.from_numpy(self.labels[index])
        if posterior is not None:
            x = runtime.move(x, posterior.device)
            y = runtime.move(y, posterior.device)
        if self.kind != "latents":
            return x.permute(0, 3, 1, 2) / 127.5 - 1, y
        mean, std = x.float().unbind(1)
        return (mean if posterior is None else mean + std * posterior), y


@functools.lru_cache(2)
def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=runtime.generator(seed, 2, epoch))


def digits():
    """scikit-learn's 1,797 scans: uint8 (1797, 8, 8, 1), int64 (1797,)."""
    from sklearn.datasets import load_digits
    scans = load_digits()  # values 0..16
    images = np.rint(scans.images * 255 / 16).astype(np.uint8)
    return images[..., None], scans.target.astype(np.int64)


# ---------------------------------------------------------------- images

def read_image(path, size=None):
    """An image file of any mode -> uint8 (H, W, 3). Alpha is dropped, as ADM does.

    size: ADM's centre crop to (size, size, 3): halved by box filters, then bicubic.
    UserError names an unreadable file.
    """
    from PIL import Image
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
                values = np.rint(np.asarray(image) / 257).clip(0, 255)
                image = Image.fromarray(values.astype(np.uint8))
            if image.mode == "P":  # a palette may hold transparency
                image = image.convert("RGBA")
            image = image.convert("RGB")
    except Exception as e:  # noqa: BLE001  decoders raise anything
        raise UserError(f"{path}: unreadable image ({e}); replace it, or remove it and "
                        f"begin anew") from None
    if size is None:
        return np.array(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    shape = round(image.width * scale), round(image.height * scale)
    x = np.array(image.resize(shape, Image.BICUBIC))
    top = (x.shape[0] - size) // 2
    left = (x.shape[1] - size) // 2
    return np.ascontiguousarray(x[top:top + size, left:left + size])


def list_images(folder):
    """All images below a folder, sorted; no folder twice, as links may lead back up."""
    folder = Path(os.path.abspath(folder))
    found = []
    seen = {parent.resolve() for parent in folder.parents} | {*folder.resolve().parents}
    for root, folders, files in os.walk(folder, followlinks=True):
        real = Path(root).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(root, name) for name in files
                  if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def class_folders(folder):
    """A folder with one folder of images a class -> (paths, labels, names of the classes).

    Classes are sorted as numbers where all names are numbers, else as strings.
    UserError: there is no such folder, or no images in folders of it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; give one that holds the class folders")
    names = sorted(entry.name for entry in os.scandir(folder)
                   if entry.is_dir() and not entry.name.startswith("."))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    files = {name: list_images(os.path.join(folder, name)) for name in names}
    classes = [name for name in names if files[name]]
    if not classes:
        raise UserError(f"{folder}: no folders of images in it; give the folder above the classes")
    paths = [path for name in classes for path in files[name]]
    return paths, [label for label, name in enumerate(classes) for _ in files[name]], classes


# ---------------------------------------------------------------- an array in a folder

def is_prepared(path):
    """Whether `python data.py` has written (or begun) this folder."""
    return os.path.isfile(os.path.join(path, "data.json"))


def read_info(folder):
    """FOLDER/data.json as a dict. UserError: it isn't one."""
    try:
        return dict(json.loads(Path(folder, "data.json").read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{folder}: its data.json is damaged; delete it, or give "
                        "another folder") from None


def fill(folder, info, make, *, free=()):
    """An array on disk, FOLDER/x.npy, of which each process makes a share. Resumes where it was.

    info: what the values depend on, and "shape", "dtype"; kept as FOLDER/data.json.
    make(rows): yields the values of these rows (int64), some consecutive ones at a time.
    -> the array, memory-mapped. UserError: FOLDER holds another info (but for keys in `free`), or
    other files, or another process is writing it.
    """
    folder = Path(folder)
    rank, world = runtime.ranks()
    with runtime.locked(folder):
        if rank == 0:
            begin(folder, json.loads(json.dumps(info)), free)
        runtime.barrier()
        array = open_array(folder)
        progress = folder / "progress"
        mine = []
        if progress.exists():
            missing = np.flatnonzero(np.fromfile(progress, np.uint8) == 0)
            mine = np.array_split(missing, world)[rank]
        runtime.barrier()  # every rank has seen what is missing
        if len(mine):
            with (open(folder / "x.npy", "r+b") as file, open(progress, "r+b") as marks,
                  runtime.progress(len(mine), folder.name.removesuffix(".parts")) as bar):
                for values in make(mine):
                    rows = mine[:len(values)].tolist()
                    mine = mine[len(values):]
                    # Written, not mapped: a full disk then is an error, not a signal.
                    try:
                        for row, value in zip(rows, values, strict=True):
                            position = array.offset + row * value.nbytes
                            os.pwrite(file.fileno(), value.tobytes(), position)
                        os.fsync(file.fileno())
                        for row in rows:  # not before the values are on the disk
                            os.pwrite(marks.fileno(), b"\1", row)
                    except OSError as e:
                        raise OSError(e.errno, e.strerror, file.name) from None
                    bar.update(len(rows))
        runtime.barrier()
        if rank == 0:
            progress.unlink(missing_ok=True)
        runtime.barrier()
    return array


def begin(folder, info, free):
    """Makes what is missing in a folder of fill(): data.json, progress, then x.npy.

    UserError: it was made with another info, or holds other files.
    """
    progress = folder / "progress"
    if is_prepared(folder):
        saved = read_info(folder)
        other = [key for key in info if saved.get(key) != info[key] and key not in free]
        if other:
            raise UserError(f"{folder} was made with another {other[0]}: use the same flags and "
                            f"files to resume, or delete it")
    elif {*os.listdir(folder)} - {"data.json.tmp", runtime.LOCK}:
        raise UserError(f"{folder}: has other files in it; give a new or an empty folder")
    with runtime.atomic(folder / "data.json") as f:
        f.write(json.dumps(info, indent=1).encode() + b"\n")
    if not (folder / "x.npy").exists():
        header = {"descr": info["dtype"], "fortran_order": False, "shape": tuple(info["shape"])}
        with runtime.atomic(progress) as f:  # a byte per row
            f.write(bytes(info["shape"][0]))
        with runtime.atomic(folder / "x.npy") as f:
            np.lib.format.write_array_header_1_0(f, header)
            f.truncate(f.tell() + math.prod(info["shape"]) * np.dtype(info["dtype"]).itemsize)


def open_array(folder):
    """FOLDER/x.npy, memory-mapped. UserError: it is missing, or not what data.json says."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        array = np.load(Path(folder, "x.npy"), mmap_mode="r")
        if [*array.shape] == read_info(folder)["shape"]:
            return array
    raise UserError(f"{folder}: its x.npy is missing or damaged; delete the folder, or "
                    "give another")


# ---------------------------------------------------------------- python data.py

def describe(args, paths, labels, classes, vae):
    """What DIR/data.json says. UserError: a --size that doesn't fit the VAE."""
    files = hashlib.sha256()
    for path in paths:
        files.update(os.fsencode(os.path.relpath(path, args.folder)) + b"\0")
    for path in paths[::math.ceil(len(paths) / 1000)]:  # to read 1.28 million takes too long
        files.update(Path(path).read_bytes())
    info = {"kind": "pixels", "shape": [len(paths), args.size, args.size, 3], "dtype": "|u1",
            "size": args.size, "flip": not args.no_flip, "classes": classes,
            "counts": np.bincount(labels).tolist(), "images_sha256": files.hexdigest(),
            "source": os.path.abspath(args.folder), "vae": None, "vae_sha256": None}
    if vae:
        factor = models.vae_factor(vae)
        if args.size % factor:
            raise UserError(f"--size {args.size}: must be a multiple of the VAE's {factor}")
        views = 1 if args.no_flip else 2
        latent = args.size // factor
        local = os.path.isdir(args.vae)  # then found from every folder, by its absolute path
        info |= {"kind": "latents", "dtype": "<f2", "vae_sha256": checkpoints.fingerprint(vae),
                 "shape": [len(paths), views, 2, vae.config.latent_channels, latent, latent],
                 "vae": os.path.abspath(args.vae) if local else args.vae}
    return info


def read_ahead(paths, size, batch, workers, shape=None):
    """Yields uint8 (n, H, W, 3), up to `batch` images at a time, while the next are being read.

    UserError: an image that is not of this shape, (H, W, 3), if there is no size to crop it to.
    """
    def submit(start):
        return [pool.submit(read_image, path, size) for path in paths[start:start + batch]]
    with ThreadPoolExecutor(workers) as pool:
        reading = submit(0)
        for start in range(0, len(paths), batch):
            current = reading
            reading = submit(start + batch)
            images = [image.result() for image in current]
            for path, image in zip(paths[start:], images, strict=False):
                if shape not in (None, image.shape):
                    raise UserError(f"{path}: is {image.shape}, others of its folder are {shape}; "
                                    f"make them one size")
            yield np.stack(images)


@torch.no_grad()
def encode_views(vae, images, flip):
    """uint8 (n, H, W, 3) -> float16 (n, views, 2, c, h, w): plain and flipped; mean and std."""
    x = torch.from_numpy(images).to(vae.device).permute(0, 3, 1, 2) / 127.5 - 1
    views = [x, x.flip(-1)] if flip else [x]
    halves = [torch.stack(models.encode(vae, view), 1) for view in views]      # (n, 2, c, h, w)
    return torch.stack(halves, 1).half().cpu().numpy()


def parse_args(argv):
    p = runtime.command_line(__doc__)
    add = p.add_argument
    positive = runtime.number("[1, inf)", int)
    add("folder", metavar="FOLDER", help="holds one folder of images a class")
    add("--size", type=positive, required=True, metavar="PIXELS",
        help="images are cropped to this height and width")
    add("--vae", default="stabilityai/sd-vae-ft-ema", metavar="NAME",
        help="hub name or folder of an AutoencoderKL; none: pixels [%(default)s]")
    add("--no-flip", action="store_true", help="images must not be mirrored [off]")
    add("--batch", type=positive, default=64, metavar="N",
        help="images at a time, per process [%(default)s]")
    add("--workers", type=positive, default=min(16, os.cpu_count()), metavar="N",
        help="threads that read images, per process [%(default)s]")
    add("--out", required=True, metavar="DIR", help="a new folder, or one to go on with")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.out == "digits":
        raise UserError("--out digits: is the name of the built-in data; give another")
    rank, _, device = runtime.setup()
    paths, labels, classes = class_folders(args.folder)
    vae = None if args.vae == "none" else models.load_vae(args.vae, device)
    info = describe(args, paths, labels, classes, vae)
    if rank == 0:
        size = math.prod(info["shape"]) * np.dtype(info["dtype"]).itemsize
        each = [f"{name} ({count})" for name, count in zip(classes, info["counts"], strict=True)]
        more = [f"and {len(each) - 20} more"] if len(each) > 20 else []
        print(f"{len(paths)} images of {len(classes)} classes: {', '.join(each[:20] + more)}\n"
              f"{args.out} will have {size / 1e6:.1f} MB", flush=True)

    def make(rows):
        files = [paths[row] for row in rows]
        for images in read_ahead(files, args.size, args.batch, args.workers):
            yield encode_views(vae, images, info["flip"]) if vae else images
    fill(args.out, info, make, free=("source", "vae"))
    if rank == 0:
        print(f"{args.out} is complete. Next: torchrun train_sit_mg.py --data "
              f"{shlex.quote(args.out)}")


if __name__ == "__main__":
    runtime.run(main)
