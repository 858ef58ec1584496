"""Slow depthwise convolutions in bfloat16 get float32 gradients; others are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from finetune.training.depthwise import DepthwiseGradientsInFloat32

SLOW = [
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (7, 3), "padding": (3, 1), "stride": (1, 2), "bias": False},
    {"kernel_size": 5, "dilation": 2},
]


def images() -> torch.Tensor:
    return torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )


def gradients(layer: nn.Conv2d, x: torch.Tensor) -> list[torch.Tensor]:
    """Of the input and of the parameters, for an output whose gradients are its own values."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(y.detach())
    return [tensor.grad for tensor in (x, *layer.parameters()) if tensor.grad is not None]


@pytest.mark.parametrize("settings", SLOW, ids=str)
def test_gradients_are_those_of_float32_rounded_once(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, groups=8, **settings)
    half = layer.bfloat16()
    x = images().bfloat16()
    with DepthwiseGradientsInFloat32():
        found = gradients(half, x)
    # The same step in float32, from the same rounded values and the same rounded output.
    output = half(x).float()
    exact = nn.Conv2d(8, 8, groups=8, **settings)
    exact.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    y = exact(x_exact := x.float().requires_grad_())
    y.backward(output)
    expected = [tensor.grad for tensor in (x_exact, *exact.parameters())]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is torch.bfloat16
        assert other is not None
        torch.testing.assert_close(one, other.bfloat16(), rtol=0.008, atol=1e-5)


def test_under_autocast_parameters_in_float32_get_their_gradients() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(2, 3, 12, 12)
    network(x).square().mean().backward()
    expected = [
        parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None
    ]
    network.zero_grad()
    with DepthwiseGradientsInFloat32(), torch.autocast("cpu", torch.bfloat16):
        output = network(x)
    output.float().square().mean().backward()
    assert output.dtype is torch.bfloat16
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.float32
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=0.1, atol=0.02 * float(gradient.abs().max())
        )


def test_a_frozen_weight_gets_no_gradient() -> None:
    layer = nn.Conv2d(8, 8, 5, groups=8).bfloat16()
    layer.weight.requires_grad_(False)
    with DepthwiseGradientsInFloat32():
        found = gradients(layer, images().bfloat16())
    assert layer.weight.grad is None
    assert len(found) == 2


@pytest.mark.parametrize("settings", SLOW, ids=str)
def test_the_slow_ones_and_only_they_are_caught(settings: dict[str, Any]) -> None:
    def is_caught(layer: nn.Conv2d, x: torch.Tensor) -> bool:
        with DepthwiseGradientsInFloat32():
            return type(layer(x).grad_fn).__name__ == "_DepthwiseBackward"

    slow = nn.Conv2d(8, 8, groups=8, **settings)
    assert is_caught(slow.bfloat16(), images().bfloat16())
    assert not is_caught(slow.float(), images())
    assert not is_caught(nn.Conv2d(8, 8, groups=4, **settings).bfloat16(), images().bfloat16())
    assert not is_caught(nn.Conv2d(8, 8, 3, groups=8).bfloat16(), images().bfloat16())
    with torch.no_grad():
        assert not is_caught(slow.bfloat16(), images().bfloat16())
