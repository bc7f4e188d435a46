"""A folder of images -> an array, once; then the reader of that array, or of scikit-learn's digits.

    python data.py imagenet/train --size 256 --out latents-256      # means and stds of latents
    python data.py photos --size 64 --vae none --out photos-64      # pixels
    torchrun --nproc-per-node 8 data.py imagenet/train --size 256 --out latents-256

FOLDER holds one folder of images per class. Interrupted, the same command goes on where it was.
Images that can't be read are left out, and listed at the end.
"""
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import shlex
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import checkpoints
import models
import runtime
from runtime import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif",
            ".tiff", ".ppm", ".pgm")
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENODEV, errno.EMFILE,
           errno.ENFILE, errno.ENOMEM, errno.EHOSTDOWN, errno.EACCES}  # of disks and systems
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
         6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}  # EXIF's orientations, but for upright
DONE = b"\1"  # marks of a row in FOLDER/progress: written,
BAD = b"\2"   # or without a value


class Data:
    """The images that a run trains on: Data("digits"), or Data(DIR) of `python data.py`.

    DIR/x.npy holds pixels, uint8 (M, H, W, 3), or latents, float16 (M, 2, 2, c, h, w): plain and
    flipped (--no-flip: plain alone), mean and std. It is in the order of the classes; rows of
    images that couldn't be read are never drawn.

    kind: "digits", "pixels" or "latents"; shape: (C, H, W) of x0; classes: their names
    images: the array, for pixels and digits uint8 (M, H, W, C); rows: int64 (N,), those to draw
    labels: int64 (N,); size: to how many pixels images were cropped
    source, files: the folder of images, and all M paths in it (None: of an earlier edition)
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
            self.files = None
            self.size = 8
            self.images, self.labels = digits()
            self.rows = np.arange(len(self.labels))
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
        self.images = open_array(name, info.get("shape"))
        self.images._mmap.madvise(mmap.MADV_RANDOM)  # or each row would read a megabyte
        try:
            self.kind = info["kind"]
            self.flip = info["flip"]
            self.classes = info["classes"]
            self.vae = info["vae"]
            self.source = info["source"]
            self.size = info["size"]
            self.files = info.get("files")
            labels = np.repeat(np.arange(len(self.classes)), info["counts"])
            self.identity = [info[key] for key in ("images_sha256", "vae_sha256", "size", "flip")]
        except KeyError:
            raise UserError(f"--data {name}: not a folder that data.py prepared") from None
        self.rows = np.delete(np.arange(len(labels)), info.get("bad", []))
        if not len(self.rows):
            raise UserError(f"{name}: none of its images could be read")
        self.labels = labels[self.rows]
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
        rows = self.rows[index]
        if self.kind == "latents":
            x = self.read(rows, flip.astype(int))  # only the chosen view
        else:
            x = self.read(rows)
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

    def read(self, *index):
        """self.images[index], asked of the disk all at once, and without what lies around it."""
        if isinstance(self.images, np.memmap):
            strides = self.images.strides
            starts = self.images.offset + sum(
                i * stride for i, stride in zip(index, strides, strict=False))
            before = starts % mmap.PAGESIZE
            advise = self.images._mmap.madvise
            for page, length in zip((starts - before).tolist(),
                                    (before + strides[len(index) - 1]).tolist(), strict=True):
                advise(mmap.MADV_WILLNEED, page, length)
        return self.images[index]

    def originals(self):
        """The image files of the rows, in their order. UserError: their folder is gone."""
        if not os.path.isdir(self.source):
            raise UserError(f"--data: its images' folder {self.source} is gone; give --reference")
        files = self.files or class_folders(self.source)[0]
        return [os.path.join(self.source, files[row]) for row in self.rows]


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
    """An image file -> uint8 (H, W, 3): upright (EXIF), and on white where it is transparent.

    Floats and more than 8 bits are scaled: to_8_bits().
    size: ADM's centre crop to (size, size, 3): halved by box filters, then bicubic.
    UserError names a file that can't be read.
    """
    from PIL import Image
    Image.MAX_IMAGE_PIXELS = 2 ** 28  # PIL refuses twice as many; its own bound is a third
    try:
        with Image.open(path) as image:
            deep = any(";16" in str(tile) for tile in image.tile)
            inverted = getattr(image, "tag_v2", {}).get(262) == 0  # TIFF's WhiteIsZero
            key = image.info.get("transparency")                   # the colour that is no colour
            image.load()  # a TIFF is turned by this, and then has no tag
            turn = None
            with contextlib.suppress(Exception):  # whatever else is wrong with the EXIF
                turn = TURNS.get(image.getexif().get(0x112))
            if turn:
                image = image.transpose(Image.Transpose[turn])
            if image.mode[0] in "IF":  # convert() would clip at 255
                values = np.asarray(image)
                # PIL has scaled a PGM by its own white, and inverts 8 bits alone.
                scaled = image.format == "PPM" and image.mode != "F"
                grey = to_8_bits(values, 65535 if scaled else None)
                grey = 255 - grey if inverted else grey
                image = Image.fromarray(grey)
                if key is not None:
                    image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype("u1")))
            # Of other modes with 16 bits PIL takes the upper 8, which are dark where 12 are used.
            elif deep and 0 < np.asarray(image.convert("RGB")).max() < 16:
                raise ValueError("12 bits stored as 16; scale it to 16 or 8")
            elif deep and isinstance(key, tuple):  # in 16 bits, of which the upper 8 were taken
                image.info["transparency"] = tuple(value >> 8 for value in key)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = image.convert("RGB")
    except Exception as e:  # decoders raise anything
        reason = str(e) or type(e).__name__
        raise UserError(f"{path}: unreadable image ({reason}); replace or remove it") from e
    if size is None:
        return np.array(image)
    if max(image.size) > 16 * min(image.size):  # or all of a strip would be resized
        half = 8 * min(image.size)
        x = image.width // 2
        y = image.height // 2
        image = image.crop((max(0, x - half), max(0, y - half),
                            min(image.width, x + half), min(image.height, y + half)))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    shape = round(image.width * scale), round(image.height * scale)
    x = np.array(image.resize(shape, Image.BICUBIC))
    top = (x.shape[0] - size) // 2
    left = (x.shape[1] - size) // 2
    return np.ascontiguousarray(x[top:top + size, left:left + size])


def to_8_bits(values, white=None):
    """Grey values, floats or whole numbers of up to 16 bits -> uint8.

    white: where it is None, 1 for floats up to 1, else the least of 255, 4095 (cameras) and 65535
    that holds the values. ValueError: none is likely.
    """
    largest = values.max()
    if not (np.isfinite(values).all() and values.min() >= 0):
        raise ValueError("values below 0, or not finite")
    if white is None:
        whites = [1] if values.dtype.kind == "f" else []
        white = min((w for w in [*whites, 255, 4095, 65535] if largest <= w), default=math.inf)
        if 0 < largest < white / 16:
            raise ValueError(f"grey values up to {largest:g}, so that white isn't known; scale it "
                             "to 8 bits")
        if values.dtype.str[1:] == "u2" and white < 65535:
            note(f"images of 16 bits without a value above {white} are scaled by it, also where "
                 "others beside them are not; scale them to 8 bits if that is wrong")
    return np.rint(values * (255 / white)).clip(max=255).astype(np.uint8)


@functools.cache
def note(text):
    """Prints a line to stderr, once."""
    print(f"data.py: {text}", file=sys.stderr, flush=True)


def list_images(folder):
    """All images below a folder, and all other files, sorted. Hidden ones don't count.

    No folder is entered twice, as links may lead back up, nor one that data.py has written.
    """
    def fail(e):  # or os.walk would leave out what it can't list
        raise e
    folder = Path(os.path.abspath(folder))
    images = []
    others = []
    seen = {parent.resolve() for parent in folder.parents} | {*folder.resolve().parents}
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = Path(root).resolve()
        if real in seen or {"data.json", "x.npy"} <= {*files}:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                found = images if name.lower().endswith(SUFFIXES) else others
                found.append(os.path.join(root, name))
    return sorted(images), sorted(others)


def class_folders(folder):
    """A folder with one folder of images per class -> (paths, labels, classes' names, notes).

    Classes are sorted as numbers where all names are numbers, else as strings.
    notes: lines on what was left out. UserError: no such folder, or no images in folders of it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; give one that holds the class folders")
    visible = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    names = sorted(entry.name for entry in visible
                   if entry.is_dir() and not is_prepared(entry.path))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    files = {}
    left_out = [entry.path for entry in visible if entry.is_file()]  # of no class
    for name in names:
        files[name], others = list_images(os.path.join(folder, name))
        left_out += others
    notes = []
    if left_out:
        kinds = Counter(Path(path).suffix or "no suffix" for path in left_out)
        each = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(10))
        notes.append(f"left out {len(left_out)} files, such as {left_out[0]}: {each}")
    classes = [name for name in names if files[name]]
    empty = [name for name in names if not files[name]]
    if empty:
        notes.append(f"left out {len(empty)} folders without images: {', '.join(empty[:20])}")
    if not classes:
        notes = [f"{folder}: no folders of images in it", *notes]
        raise UserError("; ".join([*notes, "give the folder above the classes"]))
    paths = [path for name in classes for path in files[name]]
    labels = [label for label, name in enumerate(classes) for _ in files[name]]
    return paths, labels, classes, notes


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


def write_info(folder, info):
    with runtime.atomic(Path(folder, "data.json")) as f:
        f.write(json.dumps(info, indent=1).encode() + b"\n")


def fill(folder, info, make, *, free=()):
    """An array on disk, FOLDER/x.npy, of which each process makes a share. Resumes where it was.

    info: what the values depend on, and "shape", "dtype"; kept as FOLDER/data.json.
    make(rows): yields the values of these rows (int64), some consecutive ones at a time. A value
        of None leaves a row at 0; data.json lists it under "bad".
    -> the array, memory-mapped. UserError: FOLDER holds another info (but for keys in `free`), or
    other files, or another process is writing it.
    """
    folder = Path(folder)
    rank, world = runtime.ranks()
    with runtime.locked(folder):
        if rank == 0:
            begin(folder, json.loads(json.dumps(info)), free)
        runtime.barrier()
        array = open_array(folder, info["shape"])
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
                            if value is not None:
                                position = array.offset + row * value.nbytes
                                os.pwrite(file.fileno(), value.tobytes(), position)
                        os.fsync(file.fileno())
                        # Not before the values are on the disk.
                        for row, value in zip(rows, values, strict=True):
                            os.pwrite(marks.fileno(), BAD if value is None else DONE, row)
                    except OSError as e:
                        raise OSError(e.errno, e.strerror, file.name) from None
                    bar.update(len(rows))
        runtime.barrier()
        if rank == 0 and progress.exists():
            bad = np.flatnonzero(np.fromfile(progress, np.uint8) == ord(BAD))
            if len(bad):
                write_info(folder, read_info(folder) | {"bad": bad.tolist()})
            progress.unlink()
        runtime.barrier()
    return array


def begin(folder, info, free):
    """Makes what is missing in a folder of fill(): progress, data.json, then x.npy.

    UserError: it was made with another info, has lost its x.npy, or holds other files.
    """
    progress = folder / "progress"
    array = folder / "x.npy"
    if is_prepared(folder):
        saved = read_info(folder)
        if not (array.exists() or progress.exists()):
            raise UserError(f"{folder}: its x.npy is gone; delete the folder, or give another")
        other = [key for key in info if saved.get(key) != info[key] and key not in free]
        if other:
            raise UserError(f"{folder} was made with another {other[0]}: use the same flags and "
                            f"files to resume, or delete it")
        info = saved | info
    elif {*os.listdir(folder)} - {"progress", "progress.tmp", "data.json.tmp", runtime.LOCK}:
        raise UserError(f"{folder}: has other files in it; give a new or an empty folder")
    if not array.exists():
        with runtime.atomic(progress) as f:  # a byte per row
            f.write(bytes(info["shape"][0]))
    write_info(folder, info)
    if not array.exists():
        header = {"descr": info["dtype"], "fortran_order": False, "shape": tuple(info["shape"])}
        with runtime.atomic(array) as f:
            np.lib.format.write_array_header_1_0(f, header)
            f.truncate(f.tell() + math.prod(info["shape"]) * np.dtype(info["dtype"]).itemsize)


def open_array(folder, shape):
    """FOLDER/x.npy, memory-mapped. UserError: it is missing, or not of data.json's shape."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        array = np.load(Path(folder, "x.npy"), mmap_mode="r")
        if shape and array.shape == tuple(shape):
            return array
    raise UserError(f"{folder}: its x.npy is missing or damaged; delete the folder, or "
                    "give another")


# ---------------------------------------------------------------- python data.py

def list_rows(args, saved):
    """-> (paths in FOLDER, a row each; their sizes in bytes; classes' names; notes).

    saved: DIR/data.json, or {}. A DIR that was begun has kept its list, which holds also where a
    file is gone by now. notes: what was left out.
    UserError: FOLDER has other images than this list, or one that has changed since it was read.
    """
    paths, _, classes, notes = class_folders(args.folder)
    above = os.path.join(os.path.abspath(args.folder), "")
    found = {path.removeprefix(above): size_of(path) for path in paths}
    if "files" not in saved:
        return [*found], [*found.values()], classes, notes
    files = saved["files"]
    sizes = dict(zip(files, saved.get("bytes", map(found.get, files)), strict=True))
    progress = Path(args.out, "progress")
    if progress.exists():
        read = np.fromfile(progress, np.uint8) == ord(DONE)
    else:
        read = ~np.isin(np.arange(len(files)), saved.get("bad", []))
    other = [file for file in found if file not in sizes]
    other += [file for file in itertools.compress(files, read)
              if found.get(file, sizes[file]) != sizes[file]]
    if other:
        raise UserError(f"{args.folder}: {len(other)} of its images are not those that {args.out} "
                        f"was made from, such as {other[0]}; give another --out")
    return files, [found.get(file, sizes[file]) for file in files], saved["classes"], notes


def size_of(path):
    """In bytes; None: a link to nowhere."""
    with contextlib.suppress(OSError):
        return os.path.getsize(path)


def describe(args, files, sizes, classes, vae, saved):
    """What DIR/data.json says. UserError: a --size that doesn't fit the VAE, or any patch."""
    counts = Counter(file.split(os.sep)[0] for file in files)
    info = {"kind": "pixels", "shape": [len(files), args.size, args.size, 3], "dtype": "|u1",
            "size": args.size, "flip": not args.no_flip, "classes": classes,
            "counts": [counts[name] for name in classes],
            "source": os.path.abspath(args.folder), "vae": None, "vae_sha256": None,
            "files": files, "bytes": sizes}
    factor = models.vae_factor(vae) if vae else 1
    if args.size % (2 * factor):
        raise UserError(f"--size {args.size}: must be a multiple of {2 * factor}, the smallest "
                        + ("patch in the VAE's latents" if vae else "patch"))
    if vae:
        views = 1 if args.no_flip else 2
        latent = args.size // factor
        local = os.path.isdir(args.vae)  # then found from every folder, by its absolute path
        info |= {"kind": "latents", "dtype": "<f2", "vae_sha256": checkpoints.fingerprint(vae),
                 "shape": [len(files), views, 2, vae.config.latent_channels, latent, latent],
                 "vae": os.path.abspath(args.vae) if local else args.vae}
    if not saved:
        digest = hashlib.sha256()
        for file, size in zip(files, sizes, strict=True):
            digest.update(os.fsencode(f"{file}\0{size}\0"))
        info["images_sha256"] = digest.hexdigest()
    elif "files" not in saved:  # of an earlier edition: no list to compare
        if Path(args.out, "progress").exists():
            raise UserError(f"{args.out}: was begun by an earlier edition; delete it, or give "
                            "another --out")
        del info["files"]
        del info["bytes"]
    return info


def read_ahead(paths, batch, workers, read):
    """Yields lists of read(path), up to `batch` at a time, while the next are being read."""
    def submit(start):
        return [pool.submit(read, path) for path in paths[start:start + batch]]
    with ThreadPoolExecutor(workers) as pool:
        reading = submit(0)
        for start in range(0, len(paths), batch):
            current = reading
            reading = submit(start + batch)
            yield [image.result() for image in current]


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
    add("folder", metavar="FOLDER", help="holds one folder of images per class")
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
    saved = read_info(args.out) if is_prepared(args.out) else {}
    files, sizes, classes, notes = list_rows(args, saved)
    vae = None if args.vae == "none" else models.load_vae(args.vae, device)
    info = describe(args, files, sizes, classes, vae, saved)
    if rank == 0:
        size = math.prod(info["shape"]) * np.dtype(info["dtype"]).itemsize
        each = [f"{name} ({count})" for name, count in zip(classes, info["counts"], strict=True)]
        more = [f"and {len(each) - 20} more"] if len(each) > 20 else []
        print(f"{len(files)} images of {len(classes)} classes: {', '.join(each[:20] + more)}",
              *notes, f"{args.out} will have {size / 1e6:.1f} MB", sep="\n", flush=True)

    def read(path):
        try:
            return read_image(path, args.size)
        except UserError as e:
            cause = e.__cause__
            passing = isinstance(cause, MemoryError) or getattr(cause, "errno", None) in PASSING
            if isinstance(cause, FileNotFoundError):  # this one file, or all of its folder?
                passing = not os.path.isdir(os.path.dirname(path))
            if passing:
                raise UserError(f"{path}: can't be read ({cause}); when that is mended, run the "
                                "same command again") from None
            print(f"data.py: left out: {e}", file=sys.stderr, flush=True)
            return None

    def make(rows):
        paths = [os.path.join(args.folder, files[row]) for row in rows]
        for values in read_ahead(paths, args.batch, args.workers, read):
            readable = [image for image in values if image is not None]
            if vae and readable:
                latents = iter(encode_views(vae, np.stack(readable), info["flip"]))
                values = [None if image is None else next(latents) for image in values]
            yield values
    fill(args.out, info, make, free=("source", "vae", "bytes"))
    if rank == 0:
        print(*report(args.out, files), sep="\n")


def report(folder, files):
    """Writes preview.png of pixels. Yields lines: which images were left out, what comes next."""
    from sample import save_classes
    prepared = Data(folder)
    bad = np.delete(np.arange(len(files)), prepared.rows)
    if len(bad):
        yield (f"left out {len(bad)} of {len(files)} images, which can't be read (mended ones need "
               f"a new --out): " + ", ".join(files[row] for row in bad[:20]))
    counts = np.bincount(prepared.labels, minlength=len(prepared.classes))
    for row in np.flatnonzero(counts == 0):
        yield f"warning: no image of class {prepared.classes[row]} can be read"
    yield f"{folder} is complete"
    if prepared.kind == "pixels":
        preview = os.path.join(folder, "preview.png")
        save_classes(prepared.images, torch.from_numpy(prepared.labels), preview, prepared.rows)
        yield f"look at {preview}"
    flags = "--w 1.5 --teacher online --guide-share 0.25"
    if len(prepared.classes) == 1:
        flags = "--w 1 --eval-samples 0"  # nothing to guide, and no classifier to score with
    elif prepared.kind == "pixels" and prepared.size > 64:
        flags += " --eval-samples 0"  # or Inception's weights are downloaded
    yield f"next: torchrun train_sit_mg.py --data {shlex.quote(folder)} {flags}"


if __name__ == "__main__":
    runtime.run(main)
