"""DiT's and SiT's transformer, DiT's noise schedule, and the VAE codec.

`python models.py` prints parameters and GFLOPs of every configuration. Equations without a name
are Tang et al.'s (2025).
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from runtime import UserError

# depth, width, heads (DiT, Table 1; T and XS are ours, for digits and small colour images)
SIZES = {
    "T": (4, 64, 4),
    "XS": (6, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
NAMES = [f"{kind}-{size}/{patch}"
         for kind in ("DiT", "SiT") for size in SIZES for patch in (2, 4, 8)]

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # DiT's forward process, t = 0..999
ALPHA_BARS = torch.cumprod(1 - BETAS, 0)


@functools.cache
def schedule(device):
    """BETAS and ALPHA_BARS on a device, copied there once."""
    return BETAS.to(device), ALPHA_BARS.to(device)


# ---------------------------------------------------------------- the transformer

def create_model(name, *, input_size, in_channels, num_classes, scale_aware=False):
    """The network of that name with DiT's initialisation.

    name: "{DiT,SiT}-{T,XS,S,B,L,XL}/{2,4,8}": kind, size, patch.
    input_size, in_channels: height (= width) and channels of x, which may be latents.
    num_classes: without the empty class, which is label num_classes.
    scale_aware: the network also takes the guidance scale w (Eq. 21).
    UserError: an unknown name, or an input_size that the patch doesn't divide.
    """
    if name not in NAMES:
        raise UserError(f"--model {name}: unknown; known are {', '.join(NAMES)}")
    kind, size, patch = name.replace("/", "-").split("-")
    if input_size % int(patch):
        raise UserError(f"--model {name}: its patch of {patch} doesn't divide the input size, "
                        f"{input_size} (of images, or of their latents)")
    return Transformer(kind, *SIZES[size], int(patch), input_size, in_channels, num_classes,
                       scale_aware)


class Transformer(nn.Module):
    """DiT (Peebles & Xie 2023); SiT (Ma et al. 2024) is the same without the variance channels.

    forward(x, t, y, w=None): x (N, C, H, W); t (N,), larger is noisier (DiT: 0..999, SiT: [0, 1]);
    y (N,) int64, num_classes is the empty class; w (N,) or a number, for scale-aware networks: the
    guidance scale, 1 by default.
    -> SiT: v = eps - x_0, (N, C, H, W); DiT: eps and the variance's interpolation, (N, 2C, H, W).

    The nn.ModuleDicts only give the parameters DiT's names.
    """
    checkpointing = False  # of activations: they are computed again in the backward pass

    def __init__(self, kind, depth, width, heads, patch, input_size, in_channels, num_classes,
                 scale_aware):
        super().__init__()
        self.kind = kind
        self.patch = patch
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.scale_aware = scale_aware
        self.learn_sigma = kind == "DiT"
        self.out_channels = in_channels * (2 if self.learn_sigma else 1)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, width, patch, patch)})
        self.register_buffer("pos_embed", position_embedding(width, input_size // patch))
        self.t_embedder = ScalarEmbedder(width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})
        if scale_aware:
            self.w_embedder = ScalarEmbedder(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict({
            "linear": nn.Linear(width, patch * patch * self.out_channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))})
        self.initialize()

    def initialize(self):
        """DiT's: Xavier for linear layers, N(0, 0.02) for embeddings, 0 where a branch ends."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a linear layer of patches
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in [*self.blocks, self.final_layer]:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.scale_aware:  # starts as the network without w, also after --init
            nn.init.normal_(self.w_embedder.mlp[0].weight, std=0.02)
            nn.init.zeros_(self.w_embedder.mlp[2].weight)

    def forward(self, x, t, y, w=None):
        height = x.shape[2] // self.patch
        width = x.shape[3] // self.patch
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)                    # (N, D)
        if self.scale_aware:  # the empty class has no scale: 0 (Eq. 22)
            w = torch.zeros_like(t, dtype=torch.float32) + (1 if w is None else w)
            c = c + self.w_embedder(w.masked_fill(y == self.num_classes, 0))
        elif w is not None:
            raise UserError("w is an input of scale-aware networks only (--w-range)")
        # In this order the sum, and so every block's input, is contiguous.
        x = self.pos_embed + self.x_embedder.proj(x).flatten(2).transpose(1, 2)        # (N, T, D)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        x = self.final_layer.linear(norm_modulate(x, shift, scale))            # (N, T, patch^2 C)
        x = x.unflatten(1, (height, width)).unflatten(3, (self.patch, self.patch, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)             # (N, C, H, W)


class Block(nn.Module):
    """Attention and MLP; the condition shifts, scales and gates them, from 0 (adaLN-Zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width),
                                   "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width),
                                  "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation                  # (N, 1, D) each
        qkv = self.attn.qkv(norm_modulate(x, shift1, scale1))                          # (N, T, 3D)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # (N, heads, T, d)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)         # (N, T, D)
        x = x + gate1 * self.attn.proj(h)
        h = self.mlp.fc1(norm_modulate(x, shift2, scale2))                             # (N, T, 4D)
        return x + gate2 * self.mlp.fc2(F.gelu(h, approximate="tanh"))


def norm_modulate(x, shift, scale):
    """LayerNorm, scaled and shifted by the condition: (N, T, D), twice (N, 1, D) -> (N, T, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class ScalarEmbedder(nn.Module):
    """t, or w, as 128 cosines and 128 sines, then two layers: (N,) -> (N, width)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, s):
        angles = s[:, None].float() * frequencies(s.device)                            # (N, 128)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


def frequencies(device="cpu"):
    """10000^(-i/128), i = 0..127, as in DiT, SiT, REPA and MG (diffusers' DiT divides by 127)."""
    i = torch.arange(128, device=device, dtype=torch.float32)
    return torch.exp(-math.log(10000) * i / 128)


def position_embedding(width, grid):
    """Fixed 2-D sines and cosines, column then row (MAE's order): (1, grid * grid, width)."""
    freqs = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * freqs              # (grid, width/4)
    table = torch.cat([angles.sin(), angles.cos()], 1)                             # (grid, width/2)
    both = torch.cat([table.repeat(grid, 1), table.repeat_interleave(grid, 0)], 1)
    return both.float()[None]


# ---------------------------------------------------------------- the VAE codec

def load_vae(name, device="cpu"):
    """diffusers' AutoencoderKL of a hub name or local folder, frozen, working image by image.

    UserError: it can't be loaded, or lacks tensors (diffusers would fill them with random ones).
    """
    from diffusers import AutoencoderKL
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # of a failed download, our one line is enough
    try:
        vae, info = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False,
                                                  output_loading_info=True)
    except Exception as e:  # noqa: BLE001  downloads raise anything
        raise UserError(f"--vae {name}: neither a folder of diffusers' AutoencoderKL nor found on "
                        f"the hub ({' '.join(str(e).split())[:200]}); give such a folder, or in "
                        "data.py none, for pixels") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        first = [*info["missing_keys"], *info["mismatched_keys"]][0]
        raise UserError(f"--vae {name}: incomplete, {first} is missing or of another shape")
    vae.enable_slicing()
    return vae.to(device).eval().requires_grad_(False)


def vae_factor(vae):
    """How many pixels a side one latent stands for."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode(vae, images):
    """Images (N, 3, H, W) in [-1, 1] -> mean and std of the scaled latents, (N, c, h, w) each.

    A latent is mean + std * normal. In fp32 under any autocast, as decode().
    """
    with torch.autocast(images.device.type, enabled=False):
        posterior = vae.encode(images.float()).latent_dist
    return posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor


@torch.no_grad()
def decode(vae, latents):
    """Scaled latents (N, c, h, w) -> images (N, 3, H, W), about [-1, 1]."""
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode(latents.float() / vae.config.scaling_factor).sample


# ---------------------------------------------------------------- python models.py

def flops(model):
    """FLOPs of one forward pass of one image, two for a multiply-add, counted without computing."""
    from torch.utils.flop_counter import FlopCounterMode
    x = torch.empty(1, model.in_channels, model.input_size, model.input_size, device="meta")
    y = torch.empty(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, torch.empty(1, device="meta"), y)
    return counter.get_total_flops()


def main():
    from runtime import command_line
    command_line(__doc__).parse_args()
    print("Inputs are 32x32x4 latents of 256x256 images with 1000 classes; T: 8x8 digits.\n\n"
          "| model | parameters (M) | GFLOPs a pass (multiply-adds) |\n|---|---|---|")
    for name in NAMES:
        size, channels, classes = (8, 1, 10) if "-T/" in name else (32, 4, 1000)
        with torch.device("meta"):
            model = create_model(name, input_size=size, in_channels=channels, num_classes=classes)
        parameters = sum(x.numel() for x in model.state_dict().values())  # DiT counts the positions
        print(f"| {name} | {parameters / 1e6:.2f} | {flops(model) / 2e9:.4g} |")


if __name__ == "__main__":
    from runtime import run
    run(main)
