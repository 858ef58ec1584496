"""PyTorch's transfer learning tutorial, "ConvNet as fixed feature extractor".

Run by benchmarks/finetune.py:
python benchmarks/peers/torch_loop.py --data DIR --weights FILE

Kept from the tutorial: its transforms, batches of 4, SGD with a learning rate of 0.001 (a tenth
every 7 epochs) and momentum 0.9, the best epoch's weights. In its favour: 5 epochs instead of 25,
and the frozen backbone's BatchNorm in eval, which the tutorial leaves in training, so that
statistics of 4 images drift into it (--tutorial-batch-norm does the same). Batches of 32 keep a CPU
busier, with the same step an image: --batch-size 32 --lr 0.008.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

Loader = DataLoader[tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tutorial-batch-norm", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_classes = sum(path.is_dir() for path in (args.data / "train").iterdir())
    file = {"file": str(args.weights)}
    model = timm.create_model(
        args.backbone, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=file
    ).to(device)
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    train_loader, val_loader = load_data(
        args.data, model.pretrained_cfg, args.batch_size, args.workers
    )
    optimizer = torch.optim.SGD(model.get_classifier().parameters(), lr=args.lr, momentum=0.9)
    print(
        json.dumps(
            {
                "accuracy": fit(
                    model,
                    optimizer,
                    train_loader,
                    val_loader,
                    device,
                    args.epochs,
                    args.tutorial_batch_norm,
                )
            }
        )
    )


def load_data(
    folder: Path, cfg: dict[str, tuple[float, ...]], batch_size: int, num_workers: int
) -> tuple[Loader, Loader]:
    """The tutorial's transforms, with the backbone's own mean and std."""
    normalize = transforms.Normalize(cfg["mean"], cfg["std"])
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            normalize,
        ]
    )
    plain = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalize]
    )
    train = datasets.ImageFolder(str(folder / "train"), augment)
    val = datasets.ImageFolder(str(folder / "val"), plain)
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True, num_workers=num_workers),
        DataLoader(val, batch_size=batch_size, num_workers=num_workers),
    )


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_loader: Loader,
    val_loader: Loader,
    device: torch.device,
    num_epochs: int,
    tutorial_batch_norm: bool,
) -> float:
    """Train the head; return the best epoch's validation accuracy and keep its weights."""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    best = -1.0
    with tempfile.TemporaryDirectory() as scratch:
        best_path = Path(scratch) / "best.pt"
        for epoch in range(num_epochs):
            model.train(tutorial_batch_norm)
            train_epoch(model, train_loader, optimizer, device)
            scheduler.step()
            accuracy = evaluate(model, val_loader, device)
            print(f"epoch {epoch + 1}: val accuracy {accuracy:.4f}", flush=True)
            if accuracy > best:
                best = accuracy
                torch.save(model.state_dict(), best_path)
        model.load_state_dict(torch.load(best_path, weights_only=True))
    return best


def train_epoch(
    model: nn.Module, loader: Loader, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    criterion = nn.CrossEntropyLoss()
    for images, labels in loader:
        optimizer.zero_grad()
        criterion(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, device: torch.device) -> float:
    model.eval()
    num_right = num_seen = 0
    for images, labels in loader:
        predicted = model(images.to(device)).argmax(1)
        num_right += int((predicted == labels.to(device)).sum())
        num_seen += len(labels)
    return num_right / num_seen


if __name__ == "__main__":
    main()
