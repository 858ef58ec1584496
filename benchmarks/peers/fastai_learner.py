"""The recipe of fastai's quick start on a folder with train/ and val/.

Run by benchmarks/finetune.py:
python benchmarks/peers/fastai_learner.py --data DIR --weights FILE --recipe RECIPE
    fit_one_cycle   the backbone is frozen
    fine_tune       one frozen epoch, then everything is trained

Defaults are kept: batches of 64, Adam, learning rates, head, normalisation (timm's mean and std of
the backbone). Like the quick start it does not augment, which saves it time on a CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastai.vision.all import (  # type: ignore[import-not-found]
    ImageDataLoaders,
    Resize,
    accuracy,
    set_seed,
    vision_learner,
)


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
    # fastai passes unknown arguments to timm, which then reads the weights from this file.
    learner = vision_learner(
        loaders, args.backbone, metrics=accuracy, pretrained_cfg_overlay={"file": str(args.weights)}
    )
    getattr(learner, args.recipe)(args.epochs)
    print(json.dumps({"accuracy": float(learner.recorder.values[-1][-1])}))


if __name__ == "__main__":
    main()
