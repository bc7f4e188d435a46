"""Saves and loads our checkpoints, loads public ones, converts to other formats.

    python checkpoints.py CKPT --to-diffusers DIR [--vae NAME]   # a DiT, for diffusers' DiTPipeline
    python checkpoints.py CKPT --to-safetensors FILE             # the average's tensors, the config

Ours is a dict: config (plain values), step, model, ema, optimizer (state dicts), log (the rows of
log.csv), losses (since the last row), scored (the step of the last evaluation), w (at this step),
ramp (over so many steps w rises), classes (names). No pickled code is run.
"""
import argparse
import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path, PosixPath

import numpy as np
import torch
from safetensors import safe_open

import models
import runtime
from runtime import UserError

# What training files hold besides tensors: flags as a Namespace, with paths and numpy's scalars.
SCALAR, _ = np.float64(0).__reduce__()
KINDS = [type(np.dtype(kind)) for kind in ("?", "i4", "i8", "f4", "f8")]
PLAIN = [argparse.Namespace, PosixPath, np.dtype, SCALAR, *KINDS]
HEADER = "model-guidance"  # of our .safetensors: its metadata's key
SHAPE = ("input_size", "in_channels", "num_classes", "scale_aware")


# ---------------------------------------------------------------- files of a training run

def previous(path):
    """Where the checkpoint before the last one is kept: ckpt.pt -> ckpt-prev.pt."""
    return Path(path).with_stem(f"{Path(path).stem}-prev")


def save_checkpoint(path, state):
    """Writes the dict, and keeps the file before it. At each moment one of the two is whole."""
    with runtime.atomic(path) as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())  # on the disk before the old one gives way
        if zipfile.is_zipfile(path):  # a truncated one must not replace the one before it
            os.replace(path, previous(path))


def read_checkpoint(path):
    """The file's tensors and plain values, memory-mapped where possible. UserError: one line."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                header = file.metadata() or {}
            return json.loads(header[HEADER]) | {"ema": state} if HEADER in header else state
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it then refuses
            state = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            state.keys()  # AttributeError: not a dict
    except pickle.UnpicklingError as e:
        held = re.search(r"GLOBAL (\S+)", str(e))
        raise UserError(f"{path}: not a checkpoint, or it has code, which is never run "
                        f"({held[1] if held else 'not a pickle of tensors'})") from None
    except Exception as e:  # noqa: BLE001  torch.load raises anything for a broken file
        raise UserError(f"{path}: truncated, or not a checkpoint ({type(e).__name__})") from None
    return state


def read_last(path, config, steps):
    """What a run with this config goes on from: (checkpoint or None, lines to print).

    The file at path; where that is missing or can't be read, the one before it.
    UserError: neither can be read, or it belongs to a run with other settings, or is beyond steps.
    """
    files = [file for file in (path, previous(path)) if file.exists()]
    errors = []
    if not files:
        return None, []
    for file in files:
        try:
            last = read_checkpoint(file)
            break
        except UserError as e:
            errors.append(str(e))
    else:
        raise UserError("; ".join([*errors, "delete what is there to start anew"]))
    saved = last.get("config")
    if not isinstance(saved, dict) or "losses" not in last:
        raise UserError(f"--out {path.parent}: has a ckpt.pt of something else; give another")
    if "scored" not in last:
        raise UserError(f"--out {path.parent}: its run is of an earlier edition and can't be "
                        f"resumed; start from its weights with --init {path} --out NEW")
    for key in sorted(config.keys() | saved.keys()):
        if saved.get(key) != config.get(key) and key != "vae":  # its path may differ
            other = f"with {key} {saved.get(key)}, not {config.get(key)}"
            if key == "data":  # hashes
                other = "on other --data"
            raise UserError(
                f"--out {path.parent} holds a run {other}: resume it with its own flags, give "
                f"another --out, or start from its weights with --init {path} --out NEW")
    if last["step"] > steps:
        raise UserError(f"--steps {steps}: the run in {path.parent} is at step {last['step']}")
    notes = [f"warning: {e}; resuming from the one before it" for e in errors]
    return last, [*notes, f"resuming from step {last['step']}"]


def initialize_from(path, name, shape, classes):
    """create_model(name, **shape) with a checkpoint's weights: (model, lines to print).

    The rows of the label table go by the classes' names where both sides have names, else by their
    numbers; the empty class's goes to the empty class's. What is new starts anew: other rows, and
    an input for w. UserError: the rest doesn't fit.
    """
    source, config = load_checkpoint(path)
    model = models.create_model(name, **shape)
    old = config["classes"]
    some_numbers = {*classes} <= {*old}  # such as 2 and 5
    by_name = has_names(classes) and (has_names(old) or some_numbers)
    rows = dict(zip(old if by_name else classes, range(len(old)), strict=False))
    new = [label for label in classes if label not in rows]
    found = f"{len(classes) - len(new)} of {len(classes)}"
    lines = [f"--init {path}: has {found} classes, by {'name' if by_name else 'number'}"]
    if new:
        lines.append("new classes: " + ", ".join(new[:10]) + (", ..." if len(new) > 10 else ""))
    if config.get("num_labels") or config.get("drop") == 0:
        lines.append(f"warning: --init {path} was trained without an empty class; give "
                     "--start-step N: guidance needs some plain training of it")
    state = source.state_dict()
    key = "y_embedder.embedding_table.weight"
    table = model.state_dict()[key].clone()
    try:
        for i, label in enumerate(classes):
            if label in rows:
                table[i] = state[key][rows[label]]
        table[-1] = state[key][-1]
        model.load_state_dict(model.state_dict() | state | {key: table})
    except RuntimeError as e:  # names tensors that are unknown or of another shape
        raise UserError(f"--init {path}: its {config['model']} for {source.in_channels}x"
                        f"{source.input_size}x{source.input_size} doesn't fit {name} for "
                        f"{model.in_channels}x{model.input_size}x{model.input_size} "
                        f"({str(e).splitlines()[-1].strip()})") from None
    return model, lines


def has_names(classes):
    """Whether the classes are called something else than 0, 1, 2, ..."""
    return classes != [str(i) for i in range(len(classes))]


def save_log(rows, path):
    """Dicts -> a .csv, with a column for each key that one of them has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns] + [[str(row.get(key, "")) for key in columns] for row in rows]
    with runtime.atomic(path) as f:
        f.write("".join(",".join(line) + "\n" for line in lines).encode())


def save_curves(rows, path):
    """The rows of a log: loss, score and w, each where it was logged and moved."""
    from matplotlib.figure import Figure
    curves = {}
    for name, key in ("loss", "loss"), ("FD", "fd"), ("FID", "fid"), ("w", "w"):
        points = [(row["step"], row[key]) for row in rows if row.get(key, "") != ""]
        if len({value for _, value in points}) > 1:
            curves[name] = points
    figure = Figure(figsize=(4.5 * max(1, len(curves)), 3.2), layout="tight")
    for i, (name, points) in enumerate(curves.items(), 1):
        axis = figure.add_subplot(1, len(curves), i)
        axis.plot(*zip(*points, strict=True))
        axis.set(xlabel="step", ylabel=name, yscale="linear" if name == "w" else "log")
        axis.grid(alpha=0.3, which="both")
    with runtime.atomic(path) as f:
        figure.savefig(f, format="png", dpi=120)


def fingerprint(module):
    """SHA-256 of a network's weights, in hexadecimal."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(key.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- any checkpoint -> a network

def load_checkpoint(path, *, weights="ema", device="cpu"):
    """A network in eval mode, and its config: model, kind, step, w, vae, classes, ...

    path: our ckpt.pt, or the folder of a run; a public file of DiT, SiT, REPA or MG, .pt or
        .safetensors; a folder of diffusers' DiTPipeline, or its name on the hub.
    weights: "ema" or "model". UserError, in one line: missing, truncated, foreign or unsafe.
    """
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)) and not os.path.exists(path) and (
            Path(path).suffix not in (".pt", ".pth", ".ckpt", ".bin", ".safetensors")):
        path = from_hub(str(path))
    path = Path(path)
    for file in path / "ckpt.pt", previous(path / "ckpt.pt"):
        if file.exists():  # the folder of a run
            path = file
            break
    ours = False
    if path.is_dir():
        state, config = from_diffusers(path)
    else:
        state = read_checkpoint(path)
        ours = {"config", "classes"} <= state.keys()  # others, too, may have a config
        if not ours:
            state, config = from_public(state, weights, path)
    broken = f"{path}: not a whole checkpoint"
    if ours and "ema" in state and weights not in state:
        raise UserError(f"{path}: holds the average alone; leave out --raw")
    try:
        if ours:
            config = state["config"] | {key: state[key] for key in ("step", "w", "classes")}
            state = state[weights]
        name = config["model"]
        shape = {key: config[key] for key in SHAPE}
    except (KeyError, TypeError) as e:
        raise UserError(f"{broken} ({e})") from None
    try:
        with torch.device("meta"):  # the initial weights would be overwritten at once
            model = models.create_model(name, **shape)
        model.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, AttributeError) as e:  # names tensors that don't fit
        raise UserError(f"{broken} ({str(e).strip().splitlines()[-1].strip()[:200]})") from None
    return model.float().to(device).eval().requires_grad_(True), config | {"kind": model.kind}


def size_name(depth, width, heads, path):
    """Which of models.SIZES it is; heads None: not known. UserError: none."""
    for name, size in models.SIZES.items():
        if size[:2] == (depth, width) and heads in (None, size[2]):
            return name
    raise UserError(f"{path}: no known size has {depth} blocks of width {width}"
                    + (f" and {heads} heads" if heads else ""))


def from_public(checkpoint, weights, path):
    """The state dict and config of a public file. Its size is read from the tensors.

    DiT's and SiT's files are bare state dicts; their training scripts write "model", "ema", "opt"
    and "args"; REPA's and MG's files have "ema"; others' may have "model" or "state_dict" alone.

    REPA's and MG's SiT follow our convention, without variance channels. In SiT's own code, whose
    files have these channels or its flags, t' = 1 - t runs from noise to data, and v' is -v. Both
    are linear in a weight, so the weights are changed, here and nowhere else.
    """
    flags = checkpoint.get("args")
    flags = flags if isinstance(flags, dict) else getattr(flags, "__dict__", {})
    unlike = f"{path}: not a checkpoint of ours, DiT, SiT, REPA or MG"
    state = checkpoint
    if {"ema", "model", "state_dict"} & checkpoint.keys():
        state = checkpoint.get(weights, checkpoint.get("model", checkpoint.get("state_dict")))
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint with {weights} weights")
    # Without the wrappers' prefixes and counters, and REPA's projectors, which only its training
    # needs. MG calls the embedder of w s_embedder.
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): x for key, x in state.items()}
    state = {key.replace("s_embedder.", "w_embedder."): x for key, x in state.items()
             if not key.startswith("projectors.") and key not in ("n_averaged", "num_updates")}
    for key, x in state.items():
        if not isinstance(x, torch.Tensor):
            raise UserError(f"{path}: not a checkpoint with {weights} weights ({key} is of type "
                            f"{type(x).__name__})")
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        rows = len(state["y_embedder.embedding_table.weight"])
        outputs = len(state["final_layer.linear.weight"]) // patch ** 2
    except KeyError as e:
        raise UserError(f"{unlike}: lacks {e}, has {', '.join([*state][:3])}, ...") from None
    except (ValueError, IndexError, ZeroDivisionError, TypeError) as e:
        raise UserError(f"{unlike}: a tensor has another shape ({e})") from None
    path_type = flags.get("path_type")
    prediction = flags.get("prediction")
    if path_type not in (None, "linear", "Linear") or prediction not in (None, "v", "velocity"):
        raise UserError(f"{path}: trained with path {path_type} and prediction {prediction}; only "
                        f"linear and velocity are known here")
    depth = sum(key.endswith(".attn.qkv.weight") for key in state)
    size = size_name(depth, width, None, path)
    hint = f"{flags.get('model', '')} {path.name}".lower()
    kinds = [kind for kind in ("DiT", "SiT") if re.search(rf"(?<![a-z]){kind.lower()}", hint)]
    sits_own = (path_type, prediction) == ("Linear", "velocity")  # as its flags are spelt
    repas = (path_type, prediction) == ("linear", "v") or "mgw" in flags  # MG has no other path
    if outputs == 2 * channels:
        if len(kinds) != 1:
            raise UserError(f"{path}: DiT's and SiT's files look alike; rename it, so that it has "
                            f"exactly one of DiT and SiT in its name")
        kind, = kinds
        sits_own = kind == "SiT" and not repas
    elif outputs != channels:
        raise UserError(f"{path}: has {outputs} output channels for {channels} of the input; DiT "
                        f"and SiT have as many, or twice as many")
    elif kinds == ["DiT"]:
        raise UserError(f"{path}: a DiT without variance channels, which is not known here")
    elif not (sits_own or repas) and ("args" in checkpoint or "ema" not in checkpoint):
        raise UserError(f"{path}: doesn't tell which way t runs; its args must have path_type "
                        "Linear and prediction velocity, as SiT's, or linear and v, as REPA's, or "
                        "MG's mgw; or it must have the weights under ema, and no args")
    else:
        kind = "SiT"
    if sits_own:
        try:
            state = turned(state, patch, channels)
        except (KeyError, RuntimeError) as e:
            raise UserError(f"{unlike}: lacks, or has in another shape, {e}") from None
    return state, {
        "model": f"{kind}-{size}/{patch}", "input_size": round(tokens ** 0.5) * patch,
        "in_channels": channels, "num_classes": rows - 1,
        "scale_aware": "w_embedder.mlp.0.weight" in state,
        "classes": [str(i) for i in range(rows - 1)], "w": None, "step": None,
        "vae": "stabilityai/sd-vae-ft-ema" if channels == 4 else None}


def turned(state, patch, channels):
    """The state dict of a SiT whose time runs from noise to data, for time from data to noise."""
    cos, sin = state["t_embedder.mlp.0.weight"].float().chunk(2, 1)                # (D, 128) each
    # With f(1-t) for the angle ft: cos f(1-t) = cos f cos ft + sin f sin ft, and
    # sin f(1-t) = sin f cos ft - cos f sin ft.
    f = models.frequencies()
    new = {"t_embedder.mlp.0.weight": torch.cat([cos * f.cos() + sin * f.sin(),
                                                 cos * f.sin() - sin * f.cos()], 1)}
    for key in "final_layer.linear.weight", "final_layer.linear.bias":
        parts = state[key].unflatten(0, (patch ** 2, -1, channels))
        new[key] = -parts[:, 0].flatten(0, 1)  # variance channels, if any, were never trained
    return state | new


# ---------------------------------------------------------------- diffusers' DiTPipeline

def layers(depth):
    """Yields (our linear layer, diffusers' names of its parts)."""
    yield "x_embedder.proj", ["pos_embed.proj"]
    yield "final_layer.linear", ["proj_out_2"]
    yield "final_layer.adaLN_modulation.1", ["proj_out_1"]
    for i in range(depth):
        ours = f"blocks.{i}"
        theirs = f"transformer_blocks.{i}"
        embedder = f"{theirs}.norm1.emb.timestep_embedder"  # diffusers keeps a copy in each block
        yield "t_embedder.mlp.0", [f"{embedder}.linear_1"]
        yield "t_embedder.mlp.2", [f"{embedder}.linear_2"]
        yield f"{ours}.adaLN_modulation.1", [f"{theirs}.norm1.linear"]
        yield f"{ours}.attn.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"]
        yield f"{ours}.attn.proj", [f"{theirs}.attn1.to_out.0"]
        yield f"{ours}.mlp.fc1", [f"{theirs}.ff.net.0.proj"]
        yield f"{ours}.mlp.fc2", [f"{theirs}.ff.net.2"]


TABLE = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
USAGE = """\
A DiT trained with Model-guidance. Call it with guidance_scale=1 (the default is 4, and takes label
1000 for the empty class), and a number of steps that divides 1000:

    pipe = DiTPipeline.from_pretrained("{folder}")
    for block in pipe.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    images = pipe(class_labels=[0], guidance_scale=1, num_inference_steps=250).images

The loop sets the frequencies that the network was trained with, 10000^(-i/128). Without it
diffusers takes 10000^(-i/127): the network sees other times, and draws other images.
"""


def to_safetensors(model, config, path):
    """Writes the network's tensors; the config, as JSON, is in the file's metadata."""
    from safetensors.torch import save
    if Path(path).suffix != ".safetensors" or Path(path).exists():
        raise UserError(f"--to-safetensors {path}: must be a new file whose name ends so")
    header = {key: config[key] for key in ("step", "w", "classes")} | {"config": config}
    state = {key: x.contiguous() for key, x in model.state_dict().items()}
    with runtime.atomic(path) as f:
        f.write(save(state, {"format": "pt", HEADER: json.dumps(header)}))
    print(f"{path} has {len(state)} tensors of {config['model']}")


def to_diffusers(model, config, vae, folder):
    """Writes a folder for diffusers.DiTPipeline, with DDIM as in sample.py. -> how to use it.

    UserError: not a DiT, or no VAE: DiTPipeline needs one.
    """
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    folder = Path(folder)
    if model.kind != "DiT" or model.scale_aware:
        raise UserError(f"--to-diffusers {folder}: DiTPipeline takes a DiT without an input for w")
    if vae is None:
        raise UserError(f"--to-diffusers {folder}: DiTPipeline needs a VAE, and this checkpoint "
                        f"works on pixels; give --vae")
    if folder.exists():
        raise UserError(f"--to-diffusers {folder}: exists already; name a new folder")
    state = model.state_dict()
    depth = len(model.blocks)
    heads = model.blocks[0].heads
    transformer = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=state["pos_embed"].shape[2] // heads,
        in_channels=model.in_channels, out_channels=model.out_channels, num_layers=depth,
        sample_size=model.input_size, patch_size=model.patch, norm_eps=1e-6,
        num_embeds_ada_norm=model.num_classes)
    new = {TABLE.format(i): state["y_embedder.embedding_table.weight"] for i in range(depth)}
    rest = state.keys() - {"y_embedder.embedding_table.weight", "pos_embed"}
    for ours, theirs in layers(depth):
        for part in "weight", "bias":
            values = state[f"{ours}.{part}"].chunk(len(theirs))
            new |= {f"{name}.{part}": value for name, value in zip(theirs, values, strict=True)}
            rest -= {f"{ours}.{part}"}
    if rest:
        raise UserError(f"--to-diffusers {folder}: diffusers' DiT has no {min(rest)}")
    transformer.load_state_dict(new)
    betas = models.BETAS
    scheduler = DDIMScheduler(len(betas), float(betas[0]), float(betas[-1]), "linear",
                              clip_sample=False, timestep_spacing="trailing")
    temporary = folder.with_name(f"{folder.name}.tmp")
    DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler).save_pretrained(temporary)
    index = json.loads((temporary / "model_index.json").read_text())
    index["id2label"] = dict(enumerate(config["classes"]))
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (temporary / "README.md").write_text(USAGE.format(folder=folder.name))
    os.replace(temporary, folder)
    return USAGE.format(folder=folder)


def from_hub(name):
    """Downloads what is needed of a DiTPipeline -> its folder. UserError: it can't be had."""
    try:
        import huggingface_hub
        files = ["model_index.json", "transformer/*.json", "vae/*.json"]
        tensors = ["transformer/*.safetensors", "vae/*.safetensors"]
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=files + tensors))
        # Where these are missing, the older format.
        older = [f"{part}/*.bin" for part in ("transformer", "vae")
                 if not any(folder.glob(f"{part}/*.safetensors"))]
        if older:
            huggingface_hub.snapshot_download(name, allow_patterns=older)
    except Exception as e:  # noqa: BLE001  downloads raise anything
        raise UserError(f"{name}: no such file or folder here, and can't be had from the hub "
                        f"({type(e).__name__}: {' '.join(str(e).split())[:200]}); download it "
                        "where there is a network, and give its folder") from None
    return folder


def from_diffusers(folder):
    """The state dict and config of a DiTPipeline's folder. UserError: none, or incomplete."""
    from diffusers import DiTTransformer2DModel
    try:
        index = json.loads((folder / "model_index.json").read_bytes())
        transformer, info = DiTTransformer2DModel.from_pretrained(
            folder / "transformer", local_files_only=True, low_cpu_mem_usage=False,
            output_loading_info=True)
        names = index.get("id2label") or {}
        named = {int(key): str(value) for key, value in names.items()}
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as e:
        raise UserError(f"{folder}: not a folder of diffusers' DiTPipeline "
                        f"({' '.join(str(e).split())[:200]}), and has neither the ckpt.pt of a run "
                        "nor its ckpt-prev.pt") from None
    lacking = [*info["missing_keys"], *info["mismatched_keys"]]
    if lacking:
        raise UserError(f"{folder}: incomplete, {lacking[0]} is missing or of another shape")
    c = transformer.config
    their_state = transformer.state_dict()
    state = {"y_embedder.embedding_table.weight": their_state[TABLE.format(0)],
             "pos_embed": models.position_embedding(transformer.inner_dim,
                                                    c.sample_size // c.patch_size)}
    for ours, theirs in layers(c.num_layers):
        for part in "weight", "bias":
            values = [their_state[f"{name}.{part}"] for name in theirs]
            state[f"{ours}.{part}"] = torch.cat(values)
    size = size_name(c.num_layers, transformer.inner_dim, c.num_attention_heads, folder)
    return state, {
        "model": f"DiT-{size}/{c.patch_size}", "input_size": c.sample_size,
        "in_channels": c.in_channels, "num_classes": c.num_embeds_ada_norm, "scale_aware": False,
        "classes": [named.get(i, str(i)) for i in range(c.num_embeds_ada_norm)],
        "w": None, "step": None, "vae": str(folder / "vae") if (folder / "vae").is_dir() else None}


def main(argv=None):
    p = runtime.command_line(__doc__)
    p.add_argument("checkpoint", metavar="CKPT", help="ours or a public one, for diffusers a DiT's")
    to = p.add_mutually_exclusive_group(required=True).add_argument
    to("--to-diffusers", metavar="DIR", help="a new folder")
    to("--to-safetensors", metavar="FILE", help="a new file")
    p.add_argument("--vae", metavar="NAME", help="hub name or folder of the decoder [trained with]")
    args = p.parse_args(argv)
    model, config = load_checkpoint(args.checkpoint)
    if args.to_safetensors:
        to_safetensors(model, config, args.to_safetensors)
        return
    name = args.vae or config["vae"]
    vae = models.load_vae(name) if name else None
    print(to_diffusers(model, config, vae, args.to_diffusers))


if __name__ == "__main__":
    runtime.run(main)
