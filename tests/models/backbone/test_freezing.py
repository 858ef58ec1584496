"""Freezing holds under real gradient steps, and a frozen tensor that changes is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import nn

from models.backbone.custom import CustomNetwork
from models.backbone.freezing import (
    Freezing,
    FrozenDriftError,
    freeze,
    parameter_groups,
    prove_frozen,
    set_train_mode,
    stages,
)
from models.errors import GraftError

LR: dict[str, Any] = {"head_lr": 0.1, "backbone_lr": 0.05, "weight_decay": 0.01}


class Trunk(nn.Module):
    """A user's own network: a buffer and a parameter of its own, BatchNorm, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.offset: torch.Tensor
        self.register_buffer("offset", torch.zeros(1))
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.tail = nn.Sequential(
            nn.Conv2d(8, 12, 3, stride=4), nn.BatchNorm2d(12), nn.Dropout(0.5)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.tail(self.stem(images * self.scale + self.offset))
        return features.mean(dim=(2, 3))


NETWORKS = {"resnet": ("fc", ""), "vit": ("head", ""), "custom": ("head", "backbone.")}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "custom":
        model = CustomNetwork(Trunk(), 12)
        model.reset_classifier(3)
        return model
    if kind == "vit":
        return timm.create_model("test_vit", num_classes=3, img_size=32)
    return timm.create_model("resnet18", num_classes=3)


def take_steps(
    model: nn.Module,
    freezing: Freezing,
    classifier: str,
    *,
    update_batch_norm: bool = True,
    num_steps: int = 2,
) -> None:
    """Real steps of SGD with momentum and weight decay on noise."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(parameter_groups(model, classifier, **LR), momentum=0.9)
    set_train_mode(model, freezing, update_batch_norm=update_batch_norm)
    for _ in range(num_steps):
        logits = model(torch.rand(4, 3, 32, 32, generator=generator))
        loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def moved(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {
        name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)
    }


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    )


POLICIES = [
    ("resnet", "backbone", {"fc"}),
    ("resnet", "until:layer3", {"layer4", "fc"}),
    ("resnet", "until:layer4.0", {"layer4.1", "fc"}),
    (
        "resnet",
        "until:layer4.0.conv1",
        {"layer4.0.bn1", "layer4.0.conv2", "layer4.0.bn2", "layer4.0.downsample", "layer4.1", "fc"},
    ),
    ("resnet", "none", {""}),
    ("vit", "backbone", {"head"}),
    ("vit", "until:blocks.3", {"blocks.4", "blocks.5", "norm", "fc_norm", "head"}),
    ("vit", "none", {""}),
    ("custom", "backbone", {"head"}),
    ("custom", "until:stem", {"backbone.tail", "head"}),
    ("custom", "none", {""}),
]


@pytest.mark.parametrize(("kind", "policy", "trainable"), POLICIES)
def test_exactly_what_is_not_frozen_moves_under_training(
    kind: str, policy: str, trainable: set[str]
) -> None:
    classifier, prefix = NETWORKS[kind]
    model = build(kind)
    before = snapshot(model)
    freezing = freeze(model, policy, classifier, prefix)
    take_steps(model, freezing, classifier)
    may_move = {
        name
        for name in before
        if "" in trainable or any(name.startswith(f"{module}.") for module in trainable)
    }
    changed = moved(before, model)
    assert changed <= may_move
    parameters = {name for name, _ in model.named_parameters()}
    assert changed & parameters == may_move & parameters
    assert freezing.num_frozen_tensors == len(set(before) - may_move)
    prove_frozen(model, freezing)


@pytest.mark.parametrize(("kind", "policy", "trainable"), POLICIES)
def test_the_optimizer_holds_each_trainable_parameter_once_and_no_other(
    kind: str, policy: str, trainable: set[str]
) -> None:
    classifier, prefix = NETWORKS[kind]
    model = build(kind)
    freeze(model, policy, classifier, prefix)
    groups = parameter_groups(model, classifier, **LR)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    wanted = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if "" in trainable or any(name.startswith(f"{module}.") for module in trainable)
    }
    assert len(held) == len(set(held))
    assert set(held) == wanted


def test_groups_have_their_own_rates_and_spare_biases_and_norms_the_decay() -> None:
    model = build("resnet")
    freeze(model, "until:layer3", "fc")
    groups = {
        group["name"]: group
        for group in parameter_groups(
            model, "fc", head_lr=0.5, backbone_lr=0.25, weight_decay=0.125
        )
    }
    assert set(groups) == {"head", "head_no_decay", "backbone", "backbone_no_decay"}
    assert [
        groups[name]["lr"] for name in ("head", "head_no_decay", "backbone", "backbone_no_decay")
    ] == [0.5, 0.5, 0.25, 0.25]
    assert [
        groups[name]["weight_decay"]
        for name in ("head", "head_no_decay", "backbone", "backbone_no_decay")
    ] == [0.125, 0, 0.125, 0]
    assert [parameter.shape for parameter in groups["head"]["params"]] == [model.fc.weight.shape]
    assert all(parameter.ndim == 1 for parameter in groups["backbone_no_decay"]["params"])


def test_freezing_again_with_another_policy_forgets_the_first() -> None:
    model = build("resnet")
    freeze(model, "backbone", "fc")
    freezing = freeze(model, "none", "fc")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert freezing.num_frozen_tensors == 0


def test_frozen_modules_stay_in_eval_and_the_rest_trains() -> None:
    model = build("custom")
    freezing = freeze(model, "until:stem", "head", "backbone.")
    set_train_mode(model, freezing, update_batch_norm=True)
    assert not any(module.training for module in model.backbone.stem.modules())
    assert all(module.training for module in model.backbone.tail.modules())
    assert model.backbone.training


def test_batch_norm_keeps_its_statistics_where_they_are_not_to_be_updated() -> None:
    model = build("resnet")
    freezing = freeze(model, "none", "fc")
    before = snapshot(model)
    take_steps(model, freezing, "fc", update_batch_norm=False)
    changed = moved(before, model)
    assert not any(
        name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in changed
    )
    assert {"bn1.weight", "layer4.1.bn2.bias", "conv1.weight"} <= changed
    assert not any(module.training for _, module in batch_norms(model))


def test_without_the_eval_mode_frozen_batch_norm_drifts_and_is_named() -> None:
    model = build("resnet")
    freezing = freeze(model, "until:layer1", "fc")
    model.train()
    model(torch.rand(4, 3, 32, 32))
    with pytest.raises(
        FrozenDriftError,
        match=r"until:layer1: 15 of 30 frozen tensors changed during the run: bn1\.running_mean",
    ):
        prove_frozen(model, freezing)


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("resnet", "layer2.0.conv1.weight"),
        ("resnet", "bn1.running_var"),
        ("resnet", "bn1.num_batches_tracked"),
        ("vit", "pos_embed"),
        ("vit", "blocks.0.norm1.weight"),
        ("custom", "backbone.scale"),
        ("custom", "backbone.offset"),
    ],
)
def test_one_changed_value_of_a_frozen_tensor_is_found_and_named(kind: str, tensor: str) -> None:
    classifier, prefix = NETWORKS[kind]
    model = build(kind)
    freezing = freeze(model, "backbone", classifier, prefix)
    prove_frozen(model, freezing)
    flat = model.state_dict()[tensor].view(-1)
    flat[0] = (
        flat[0] + 1 if not flat.is_floating_point() else torch.nextafter(flat[0], torch.tensor(9.0))
    )
    with pytest.raises(
        FrozenDriftError,
        match=rf"1 of \d+ frozen tensors changed during the run: {tensor}\. Nothing was published",
    ):
        prove_frozen(model, freezing)


def test_a_frozen_tensor_that_is_gone_counts_as_changed() -> None:
    model = build("custom")
    freezing = freeze(model, "backbone", "head", "backbone.")
    del model.backbone.scale
    with pytest.raises(FrozenDriftError, match=r"backbone\.scale"):
        prove_frozen(model, freezing)


def test_a_buffer_outside_the_state_dict_is_watched_too() -> None:
    model = build("custom")
    model.backbone.register_buffer("hidden", torch.zeros(2), persistent=False)
    freezing = freeze(model, "backbone", "head", "backbone.")
    model.backbone.hidden += 1
    with pytest.raises(FrozenDriftError, match=r"backbone\.hidden"):
        prove_frozen(model, freezing)


@pytest.mark.parametrize(
    ("kind", "name", "offered"),
    [
        ("resnet", "layer9", "conv1, bn1, layer1, layer2, layer3, layer4"),
        ("resnet", "", "layer1, layer2, layer3, layer4"),
        ("resnet", "layer", "layer1, layer2, layer3, layer4"),
        ("vit", "blocks.17", r"patch_embed, blocks\.0, blocks\.1"),
        ("custom", "layer1", "stem, tail"),
    ],
)
def test_a_wrong_module_name_is_answered_with_the_stages(
    kind: str, name: str, offered: str
) -> None:
    classifier, prefix = NETWORKS[kind]
    with pytest.raises(
        GraftError,
        match=rf"--freeze until:{name}: there is no module '{name}'; its stages are .*{offered}",
    ) as caught:
        freeze(build(kind), f"until:{name}", classifier, prefix)
    assert classifier not in str(caught.value).split("stages are")[1].split(", ")


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_offered_stage_can_be_frozen_until(kind: str) -> None:
    classifier, prefix = NETWORKS[kind]
    model = build(kind)
    numbers = [
        freeze(model, f"until:{name}", classifier, prefix).num_frozen_tensors
        for name in stages(model, classifier, prefix)
    ]
    assert numbers == sorted(numbers)
    assert numbers[0] > 0


def test_the_classifier_cannot_be_frozen() -> None:
    with pytest.raises(
        GraftError, match="'fc' is the classifier, which always trains; say --freeze backbone"
    ):
        freeze(build("resnet"), "until:fc", "fc")


@pytest.mark.parametrize("policy", ["all", "", "until", "Backbone"])
def test_an_unknown_policy_is_answered_with_the_policies(policy: str) -> None:
    with pytest.raises(
        GraftError, match=f"--freeze {policy}: the policies are backbone, until:NAME and none"
    ):
        freeze(build("custom"), policy, "head", "backbone.")
