"""Round numbers along an axis."""

from __future__ import annotations

import math


def nice_ticks(low: float, high: float, num_steps: int = 5) -> list[tuple[float, str]]:
    """Multiples of 1, 2 or 5 times a power of ten within a range, and how they are written.

    There are up to `num_steps` + 1, with as many decimals as tell them apart.
    """
    rough = (high - low) / num_steps
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    num_decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [
        (number * step, f"{number * step:.{num_decimals}f}") for number in range(first, last + 1)
    ]
