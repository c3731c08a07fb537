"""Real photographs from Debian packages and scikit-image, some with known ImageNet classes, as 224x224 inputs.

    apt-get install --no-install-recommends gcompris-qt-data palapeli-data mate-backgrounds plasma-workspace-wallpapers
    pip install scikit-image
    python benchmarks/photographs.py --out data/photographs.npz

The pictures stay where the packages put them; the file written here is a working copy, never to be committed.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from lowbit.data.photographs import RESOURCES, read_resource

LIST = Path(__file__).with_name("photographs.txt")


def open_picture(source: str) -> Image.Image | None:
    """The picture a line of the list names, or None when its package is not installed."""
    if " : " in source:
        container, inner = source.split(" : ")
        if not (RESOURCES / container).exists():
            return None
        matches = [data for path, data in read_resource(RESOURCES / container).items() if path.endswith("/resource/" + inner)]
        return Image.open(io.BytesIO(matches[0])).convert("RGB") if matches else None
    if source.startswith("scikit-image "):
        try:
            import skimage
        except ImportError:
            return None
        return Image.open(Path(skimage.__file__).parent / "data" / source.split()[1]).convert("RGB")
    return Image.open(source).convert("RGB") if Path(source).exists() else None


def crops(picture: Image.Image, size: int = 224, crop: float = 0.875) -> list[np.ndarray]:
    """The centre crop (as in the network's evaluation) and four corner crops, uint8 ``[size, size, 3]``."""
    shorter = int(size / crop)
    scale = shorter / min(picture.size)
    picture = picture.resize(
        (max(shorter, round(picture.width * scale)), max(shorter, round(picture.height * scale))), Image.Resampling.BICUBIC
    )
    right, bottom = picture.width - size, picture.height - size
    corners = [(right // 2, bottom // 2), (0, 0), (right, 0), (0, bottom), (right, bottom)]
    return [np.asarray(picture.crop((x, y, x + size, y + size))) for x, y in corners]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/photographs.npz"))
    args = parser.parse_args()
    labelled, classes, calibration, missing = [], [], [], []
    for line in LIST.read_text().splitlines():
        if line.startswith("#"):
            continue
        source, _, accepted = (part.strip() for part in line.partition(" |"))
        picture = open_picture(source)
        if picture is None:
            missing.append(source)
        elif accepted:
            labelled.append(crops(picture)[0])
            classes.append(accepted)
        else:
            calibration.extend(crops(picture)[:3])
    if not labelled:
        sys.exit("no photograph found; install the packages named in this file's first lines")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, labelled=np.stack(labelled), classes=np.array(classes), calibration=np.stack(calibration))
    print(f"{len(labelled)} labelled photographs, {len(calibration)} calibration crops, {len(missing)} missing -> {args.out}")
    for source in missing:
        print("  missing:", source)


if __name__ == "__main__":
    main()
