"""fastai's own recipe on a folder with train/ and val/, as its quick start writes it; run by benchmarks/finetune.py.

python benchmarks/peers/fastai_learner.py --data DIR --weights FILE --recipe fit_one_cycle     the backbone frozen
python benchmarks/peers/fastai_learner.py --data DIR --weights FILE --recipe fine_tune         one epoch frozen, then all of it

Its defaults are left as they are: batches of 64, Adam, its learning rates, its head, its normalisation (timm's mean and std for the
backbone). Augmentation is left out, as in its quick start: on a CPU that spares it time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastai.vision.all import ImageDataLoaders, Resize, accuracy, set_seed, vision_learner  # type: ignore[import-not-found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--recipe", choices=("fit_one_cycle", "fine_tune"), default="fit_one_cycle")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    loaders = ImageDataLoaders.from_folder(
        args.data, train="train", valid="val", item_tfms=Resize(224), num_workers=args.workers
    )
    # fastai hands what it does not know to timm, which then reads the weights from the file instead of its hub.
    learner = vision_learner(
        loaders, args.backbone, metrics=accuracy, pretrained_cfg_overlay={"file": str(args.weights)}
    )
    getattr(learner, args.recipe)(args.epochs)
    print(json.dumps({"accuracy": float(learner.recorder.values[-1][-1])}))


if __name__ == "__main__":
    main()
