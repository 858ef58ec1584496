"""Make multi-label images: mosaics of none to four labelled images on noise, with all their labels.

python benchmarks/mosaics.py --data fashion-mnist-3000-1000 --output mosaics
python finetune/run.py --data mosaics/labels.csv

benchmarks/images.py makes the folder of --data. Writes PNGs and labels.csv with path,labels,split.
Training mosaics are made of training images, validation mosaics of validation images.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

# Run as a file, `import finetune` would find benchmarks/finetune.py.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from PIL import Image

from finetune.config import Options
from finetune.data.splits import load_splits
from models.sources import SEPARATOR

_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="as finetune/run.py takes it")
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument(
        "--images", type=int, nargs=2, default=(3000, 1000), help="to train on and to validate on"
    )
    parser.add_argument("--side", type=int, default=112, help="of a tile, in pixels")
    args = parser.parse_args()
    options = Options(data=args.data)
    splits = load_splits(
        args.data, data_root=options.data_root, val_fraction=options.val_fraction, seed=0
    )
    generator = np.random.default_rng(0)
    args.output.mkdir(parents=True)
    with (args.output / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "labels", "split"))
        for split, samples, num_images in (
            ("train", splits.train, args.images[0]),
            ("val", splits.val, args.images[1]),
        ):
            for index in range(num_images):
                page = Image.fromarray(
                    generator.integers(0, 64, (2 * args.side, 2 * args.side, 3), np.uint8)
                )
                tiles = generator.permutation(len(samples))[: generator.integers(0, 5)]
                for (row, column), tile in zip(generator.permutation(_PLACES), tiles, strict=False):
                    image = (
                        Image.open(io.BytesIO(samples[tile].read()))
                        .convert("RGB")
                        .resize((args.side, args.side))
                    )
                    page.paste(image, (args.side * int(column), args.side * int(row)))
                path = args.output / f"{split}-{index:04d}.png"
                page.save(path)
                rows.writerow(
                    (
                        path.name,
                        SEPARATOR.join(sorted({splits.describe(samples[tile]) for tile in tiles})),
                        split,
                    )
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
