"""A cut network on kept activations is the whole network; what cannot be cut is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from finetune.training.boundary import FrozenPart, TrainablePart, cut
from models.backbone.custom import CustomNetwork
from models.backbone.freezing import (
    Freezing,
    freeze,
    parameter_groups,
    prove_frozen,
    set_train_mode,
)

# A network with BatchNorm, one with LayerNorm, and one with depthwise convolutions; each with its
# classifier and image size.
NETWORKS: dict[str, tuple[str, int]] = {
    "resnet18": ("fc", 64),
    "test_vit": ("head", 32),
    "tf_efficientnet_lite0": ("classifier", 64),
}
POLICIES = [
    ("resnet18", "backbone", "global_pool"),
    ("resnet18", "until:bn1", "bn1"),
    ("resnet18", "until:maxpool", "maxpool"),
    ("resnet18", "until:layer2", "layer2"),
    ("resnet18", "until:layer4.0", "layer4.0"),
    ("test_vit", "until:patch_embed", "patch_embed"),
    ("test_vit", "until:blocks.1", "blocks.1"),
    ("test_vit", "until:norm", "norm"),
    ("tf_efficientnet_lite0", "until:conv_stem", "conv_stem"),
    ("tf_efficientnet_lite0", "until:blocks.2", "blocks.2"),
    ("tf_efficientnet_lite0", "until:blocks.4.1", "blocks.4.1"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def build(name: str) -> nn.Module:
    """Random weights: zeros and ones of an initialiser could hide a part of the network."""
    torch.manual_seed(0)
    options = {"img_size": 32} if name == "test_vit" else {}
    return scramble(timm.create_model(name, num_classes=3, **options))


def scramble(model: nn.Module) -> nn.Module:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 1:
            tensor.data = torch.rand_like(tensor) + 0.5
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return model.eval()


def own_network(trunk: nn.Module, num_features: int) -> nn.Module:
    model = CustomNetwork(trunk, num_features)
    model.reset_classifier(3)
    return scramble(model)


def images(name: str, count: int = 5, seed: int = 1) -> torch.Tensor:
    size = NETWORKS[name][1] if name in NETWORKS else 16
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def cut_at(name: str, policy: str) -> tuple[nn.Module, Freezing, TrainablePart]:
    model = build(name)
    freezing = freeze(model, policy, NETWORKS[name][0])
    rest = cut(model, freezing, images(name, 2, seed=0))
    assert rest is not None
    return model, freezing, rest


def cut_own(trunk: nn.Module, policy: str) -> TrainablePart | None:
    with torch.no_grad():
        num_features = trunk.eval()(images("own")).shape[1]
    model = own_network(trunk, num_features)
    return cut(model, freeze(model, policy, "head", "backbone."), images("own", 2, seed=0))


@pytest.mark.parametrize(("name", "policy", "boundary"), POLICIES)
def test_the_rest_on_kept_activations_gives_the_logits_of_the_whole(
    name: str, policy: str, boundary: str
) -> None:
    model, _, rest = cut_at(name, policy)
    with torch.no_grad():
        expected = model(images(name))
        assert expected.std(dim=0).min() > 1e-4
        activations = FrozenPart(model, rest.boundary)(images(name))
        rest.open()
        logits = rest(activations)
        rest.close()
    assert rest.boundary == boundary
    assert activations.shape == (5, torch.Size(rest.boundary_shape).numel())
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "policy", "boundary"), POLICIES[3::3])
def test_gradients_through_the_rest_are_those_of_the_whole(
    name: str, policy: str, boundary: str
) -> None:
    model, freezing, rest = cut_at(name, policy)
    labels = torch.tensor([0, 1, 2, 0, 1])
    set_train_mode(model, freezing, update_batch_norm=False)

    def gradients(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        return {
            key: parameter.grad.clone()
            for key, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    expected = gradients(model(images(name)))
    with torch.no_grad():
        activations = FrozenPart(model, boundary)(images(name))
    rest.open()
    found = gradients(rest(activations))
    rest.close()
    assert set(found) == {
        key for key, parameter in model.named_parameters() if parameter.requires_grad
    }
    for key, gradient in found.items():
        torch.testing.assert_close(
            gradient,
            expected[key],
            rtol=1e-4,
            atol=1e-5 * float(expected[key].abs().max()),
            msg=key,
        )


def test_modules_answer_as_themselves_again_after_close() -> None:
    model, _, rest = cut_at("resnet18", "until:layer2")
    with torch.no_grad():
        expected = model(images("resnet18"))
        rest.open()
        assert rest(torch.zeros(5, *rest.boundary_shape)).shape == expected.shape
        assert not torch.equal(model(images("resnet18")), expected)
        rest.close()
        assert torch.equal(model(images("resnet18")), expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_was_set_on_a_module_is_there_again_after_close() -> None:
    """As a user's own wrapper may have set it."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    as_of_its_class = trunk[0].forward
    trunk[0].forward = lambda pictures: as_of_its_class(pictures) * 2
    rest = cut_own(trunk, "until:1")
    assert rest is not None
    expected = trunk(images("own"))
    rest.open()
    rest.close()
    assert torch.equal(trunk(images("own")), expected)
    assert "forward" in vars(trunk[0])


def test_cutting_changes_no_tensor() -> None:
    model = build("resnet18")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert cut(model, freeze(model, "until:layer1", "fc"), images("resnet18")) is not None
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "policy"), [("resnet18", "until:layer3"), ("test_vit", "until:blocks.2")]
)
def test_frozen_tensors_are_bit_equal_after_training_through_the_rest(
    name: str, policy: str
) -> None:
    model, freezing, rest = cut_at(name, policy)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        activations = FrozenPart(model, rest.boundary)(images(name))
    groups = parameter_groups(
        model, NETWORKS[name][0], head_lr=0.1, backbone_lr=0.1, weight_decay=0.1
    )
    optimizer = torch.optim.AdamW(groups)
    rest.open()
    set_train_mode(model, freezing, update_batch_norm=True)
    for _ in range(3):
        loss = nn.functional.cross_entropy(rest(activations), torch.tensor([0, 1, 2, 0, 1]))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    rest.close()
    prove_frozen(model, freezing)
    moved = {
        key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])
    }
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable <= moved
    assert len(moved) + freezing.num_frozen_tensors == len(before)


class Skip(nn.Module):
    """`early` is read behind `late`, through a weight that training may raise from zero."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.early = nn.Conv2d(3, 4, 3, padding=1)
        self.late = nn.Conv2d(4, 4, 3, padding=1)
        self.tail = nn.Conv2d(4, 4, 3, padding=1)
        self.share = nn.Parameter(torch.full((1, 1), share))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        early = self.early(pictures)
        features: torch.Tensor = (self.tail(self.late(early)) + self.share * early).mean(dim=(2, 3))
        return features


class ReadsImage(Skip):
    """The image itself is read behind the boundary."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.tail(self.late(self.early(pictures))).mean(dim=(2, 3))
        return features + self.share * pictures.mean(dim=(1, 2, 3))[:, None]


class GivesPair(nn.Module):
    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pictures, pictures


class Pair(nn.Module):
    """The last frozen module gives no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.split = GivesPair()
        self.tail = nn.Conv2d(4, 4, 3)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.tail(sum(self.split(self.stem(pictures)))).mean(dim=(2, 3))
        return features


class Twice(nn.Module):
    """The last frozen module is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.tail = nn.Conv2d(3, 4, 3)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.tail(self.stem(self.stem(pictures))).mean(dim=(2, 3))
        return features


class AsksForSize(nn.Module):
    """It refuses images of another size, in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.tail = nn.Conv2d(4, 4, 3)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        if pictures.shape[-1] != 16:
            raise KeyError("a size that this network does not know")
        features: torch.Tensor = self.tail(self.stem(pictures)).mean(dim=(2, 3))
        return features


@pytest.mark.parametrize(
    ("build_trunk", "policy"),
    [
        (lambda: Skip(1.0), "until:late"),
        (lambda: Skip(0.0), "until:late"),
        (lambda: ReadsImage(1.0), "until:late"),
        (lambda: ReadsImage(0.0), "until:late"),
        (Pair, "until:split"),
        (Twice, "until:stem"),
        (AsksForSize, "until:stem"),
    ],
    ids=[
        "skip",
        "skip of weight zero",
        "image",
        "image of weight zero",
        "no tensor",
        "called twice",
        "size",
    ],
)
def test_a_network_that_does_not_end_in_one_line_of_modules_cannot_be_cut(
    build_trunk: Callable[[], nn.Module], policy: str
) -> None:
    torch.manual_seed(0)
    trunk = build_trunk()
    expected = trunk(images("own"))
    assert cut_own(trunk, policy) is None
    assert not any("forward" in vars(module) for module in trunk.modules())
    assert trunk(images("own")).shape == expected.shape


def test_the_same_network_is_cut_before_the_skip_connection() -> None:
    torch.manual_seed(0)
    rest = cut_own(Skip(1.0), "until:early")
    assert rest is not None
    assert rest.boundary == "backbone.early"


def test_a_boundary_inside_a_residual_block_or_a_patch_embedding_cannot_be_cut() -> None:
    model = build("resnet18")
    assert cut(model, freeze(model, "until:layer2.0.bn1", "fc"), images("resnet18")) is None
    model = build("test_vit")
    assert cut(model, freeze(model, "until:patch_embed.proj", "head"), images("test_vit")) is None


def test_in_place_operations_behind_the_boundary_leave_kept_activations_unchanged() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.SiLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
    )
    rest = cut_own(trunk, "until:1")
    assert rest is not None
    with torch.no_grad():
        kept = FrozenPart(rest.model, rest.boundary)(images("own"))
        assert torch.equal(kept, trunk[:2](images("own")).flatten(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_frozen_is_nothing_to_cut(name: str) -> None:
    model = build(name)
    assert cut(model, freeze(model, "none", NETWORKS[name][0]), images(name)) is None
