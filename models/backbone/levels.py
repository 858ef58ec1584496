"""Features of all levels: a network's last level as it is, then each of its stages, pooled.

A linear head on all levels of a frozen network comes close to fine-tuning it (Head2Toe, Evci et al.
2022, arXiv 2201.03529), and the levels are there after the pass that computes the last one.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from models.backbone.build import FeatureExtractor
from models.errors import GraftError
from models.preprocess import Preprocess

# Of a transformer's dozens of blocks, so many are pooled, evenly spaced, the last one among them.
_MAX_STAGES = 6
_NUM_SPACED = 4
# Of so many stages, counted from the last, a 2 × 2 grid of means as well.
_NUM_GRIDS = 3
_TOO_SMALL = 1e-6


class LevelFeatures(nn.Module):
    """Images `[B,3,H,W]` → features `[B,F]`: those of the last level, then of all others.

    The first columns are `FeatureExtractor`'s. Then, from the last stage to the first, each stage's
    mean, maximum and standard deviation over positions (and its class token, where it has one);
    then the grids. Each stage's and each grid's have their signed root taken and are divided by
    their norm, so that no level outweighs another. `sets` are the nested choices of columns, each
    by the number of its columns.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._options = _choose_options(model)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        last, stages, grids = self._levels(images)
        return torch.cat([last, *stages, *grids], dim=1)

    def count_sets(self, images: torch.Tensor) -> dict[str, int]:
        """The nested sets, smallest first: name → the number of its columns."""
        last, stages, grids = self._levels(images)
        widths = [last.shape[1], *(level.shape[1] for level in stages)]
        num_upper = (len(stages) + 1) // 2
        return {
            "last": widths[0],
            "upper half": sum(widths[: 1 + num_upper]),
            "all": sum(widths),
            "all and grid": sum(widths) + sum(level.shape[1] for level in grids),
        }

    def _levels(
        self, images: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        final, stages = self.model.forward_intermediates(images, **self._options)
        last = self.model.forward_head(final, pre_logits=True)
        maps, tokens = _split_tokens(stages)
        pooled = [_pool(*each) for each in zip(maps, tokens, strict=True)]
        grids = [
            _weigh(nn.functional.adaptive_avg_pool2d(each, 2).flatten(1))
            for each in maps[-_NUM_GRIDS:]
        ]
        return last, pooled[::-1], grids[::-1]


def count_level_sets(model: nn.Module, preprocess: Preprocess) -> dict[str, int]:
    """The sets of `LevelFeatures`, or "last" alone where the network does not show its stages."""
    images = torch.zeros(1, 3, preprocess.height, preprocess.width)
    model.eval()
    with torch.inference_mode():
        last = FeatureExtractor(model)(images)
        alone = {"last": int(last.shape[1])}
        if not hasattr(model, "forward_intermediates"):
            return alone
        # Networks of timm and of users give their stages in ways of their own.
        try:
            features = LevelFeatures(model)
            sets = features.count_sets(images)
            is_same = torch.allclose(
                features(images)[:, : last.shape[1]], last, rtol=1e-4, atol=1e-4
            )
        except Exception:
            return alone
    return {name: int(width) for name, width in sets.items()} if is_same else alone


def feature_module(model: nn.Module, level_sets: Sequence[str]) -> nn.Module:
    """What gives the features of a backbone with these level sets; of one without, its last level.

    Raises GraftError where the network does not show its stages any more.
    """
    if len(level_sets) < 2:
        return FeatureExtractor(model)
    if not hasattr(model, "forward_intermediates"):
        raise GraftError(
            "the checkpoint's head is on all levels of its network, which has no "
            "forward_intermediates here; install the version of timm that it names"
        )
    return LevelFeatures(model)


def _choose_options(model: Any) -> dict[str, Any]:
    """The arguments of `forward_intermediates`."""
    options: dict[str, Any] = {}
    if "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters:
        options["return_prefix_tokens"] = True
    num_stages = len(getattr(model, "feature_info", None) or ())
    if num_stages > _MAX_STAGES:
        options["indices"] = [
            (number * num_stages) // _NUM_SPACED - 1 for number in range(1, _NUM_SPACED + 1)
        ]
    return options


def _split_tokens(
    stages: Sequence[Any],
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Maps `[B,C,H,W]` in float32, and the class token `[B,C]` beside each, if any."""
    maps: list[torch.Tensor] = []
    tokens: list[torch.Tensor | None] = []
    for stage in stages:
        is_pair = isinstance(stage, tuple)
        maps.append((stage[0] if is_pair else stage).float())
        tokens.append(stage[1][:, 0].float() if is_pair else None)
    return maps, tokens


def _pool(values: torch.Tensor, token: torch.Tensor | None) -> torch.Tensor:
    mean = values.mean(dim=(2, 3))
    variance = (values * values).mean(dim=(2, 3)) - mean * mean
    pooled = [mean, values.amax(dim=(2, 3)), variance.clamp(min=0).sqrt()]
    return _weigh(torch.cat(pooled if token is None else [token, *pooled], dim=1))


def _weigh(level: torch.Tensor) -> torch.Tensor:
    """The signed root, of a norm that only the number of columns decides."""
    rooted = torch.sign(level) * level.abs().sqrt()
    norm = torch.linalg.vector_norm(rooted, dim=1, keepdim=True).clamp(min=_TOO_SMALL)
    weighed: torch.Tensor = rooted * (level.shape[1] ** 0.5 / norm)
    return weighed
