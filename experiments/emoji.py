"""1,911 colour images of Twemoji (CC-BY 4.0), 64 pixels, in ten categories: as class folders.

    python experiments/emoji.py out/emoji       # npm downloads emoji-datasource-twitter, some 60 MB
    python data.py out/emoji --size 32 --vae none --no-flip --out out/emoji-32

--no-flip: letters and clocks must not be mirrored.
"""
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def main(folder):
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(["npm", "pack", "--silent", "emoji-datasource-twitter@16.0.0"],
                       cwd=temporary, check=True)
        archive, = Path(temporary).glob("*.tgz")
        with tarfile.open(archive) as package:
            package.extractall(temporary, filter="data")
        source = Path(temporary, "package")
        for emoji in json.loads((source / "emoji.json").read_bytes()):
            category = emoji["category"].split()[0].lower()
            path = Path(folder, category, emoji["image"])
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / "img" / "twitter" / "64" / emoji["image"], path)


if __name__ == "__main__":
    main(*sys.argv[1:])
