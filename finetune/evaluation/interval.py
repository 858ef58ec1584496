"""How far chance may have moved a number: the percentile bootstrap over images.

Efron & Tibshirani 1993, chapter 13.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """The middle 95 % of a number's values over resampled images."""

    low: float
    high: float

    @classmethod
    def of(cls, resampled: npt.NDArray[np.float64]) -> Interval:
        low, high = np.percentile(resampled, (2.5, 97.5))
        return cls(float(low), float(high))

    def to_list(self) -> list[float]:
        return [self.low, self.high]


def draw_counts(
    counts: npt.NDArray[np.int64], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Resampled `counts` `[K]` of N images in K kinds: `[num_resamples,K]`.

    For statistics that depend only on how many images are of each kind: drawing N of them with
    replacement is then one multinomial draw.
    """
    shares = counts / counts.sum()
    return (
        np.random.default_rng(seed)
        .multinomial(int(counts.sum()), shares, num_resamples)
        .astype(np.float64)
    )


def draw_weights(
    num_images: int, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> npt.NDArray[np.float32]:
    """How often each of N images is drawn in each resample, `[num_resamples,N]`."""
    drawn = np.random.default_rng(seed).integers(0, num_images, (num_resamples, num_images))
    drawn += num_images * np.arange(num_resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=num_resamples * num_images)
    return counts.reshape(num_resamples, num_images).astype(np.float32)
