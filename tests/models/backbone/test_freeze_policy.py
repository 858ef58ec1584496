"""A policy is a set of module names, found without torch, or a refusal that names the way out."""

from __future__ import annotations

import pytest

from models.backbone.freeze_policy import resolve_policy
from models.errors import GraftError
from tests.conftest import RunPython

NAMES = (
    "",
    "stem",
    "layer1",
    "layer1.0",
    "layer1.0.conv",
    "layer1.1",
    "layer10",
    "layer10.0",
    "norm",
    "fc",
    "fc.inner",
)
STAGES = ("stem", "layer1", "layer10", "norm")


def resolve(
    policy: str, names: tuple[str, ...] = NAMES, classifier: str = "fc", prefix: str = ""
) -> frozenset[str]:
    return resolve_policy(policy, names, classifier=classifier, prefix=prefix, stages=STAGES)


@pytest.mark.parametrize(
    ("policy", "frozen"),
    [
        ("none", set()),
        ("backbone", set(NAMES) - {"fc", "fc.inner"}),
        ("until:stem", {"", "stem"}),
        ("until:layer1", {"", "stem", "layer1", "layer1.0", "layer1.0.conv", "layer1.1"}),
        ("until:layer1.0", {"", "stem", "layer1", "layer1.0", "layer1.0.conv"}),
        ("until:layer1.0.conv", {"", "stem", "layer1", "layer1.0", "layer1.0.conv"}),
        ("until:layer10", set(NAMES) - {"norm", "fc", "fc.inner"}),
        ("until:norm", set(NAMES) - {"fc", "fc.inner"}),
    ],
)
def test_a_policy_freezes_all_up_to_its_module_with_its_ancestors(
    policy: str, frozen: set[str]
) -> None:
    assert resolve(policy) == frozen


def test_a_classifier_in_the_middle_of_the_network_still_trains() -> None:
    assert resolve("until:norm", ("", "fc", "stem", "norm")) == {"", "stem", "norm"}


def test_a_module_of_a_users_own_network_is_named_as_there() -> None:
    names = ("", "backbone", "backbone.stem", "backbone.tail", "head")
    assert resolve("until:stem", names, "head", "backbone.") == {"", "backbone", "backbone.stem"}
    assert resolve("backbone", names, "head", "backbone.") == set(names) - {"head"}
    with pytest.raises(GraftError, match=r"there is no module 'backbone\.stem'"):
        resolve("until:backbone.stem", names, "head", "backbone.")


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (
            "until:layer",
            "--freeze until:layer: there is no module 'layer'; "
            "its stages are stem, layer1, layer10, norm",
        ),
        (
            "until:",
            "--freeze until:: there is no module ''; its stages are stem, layer1, layer10, norm",
        ),
        (
            "until:fc",
            "--freeze until:fc: 'fc' is the classifier, which always trains; say --freeze backbone",
        ),
        (
            "until:fc.inner",
            "--freeze until:fc.inner: 'fc.inner' is the classifier, which always trains; "
            "say --freeze backbone",
        ),
        ("head", "--freeze head: the policies are backbone, until:NAME and none"),
        ("", "--freeze : the policies are backbone, until:NAME and none"),
        ("None", "--freeze None: the policies are backbone, until:NAME and none"),
    ],
)
def test_a_policy_that_does_not_fit_is_answered_with_the_way_out(policy: str, said: str) -> None:
    with pytest.raises(GraftError) as caught:
        resolve(policy)
    assert str(caught.value) == said


def test_it_needs_no_torch(run_python: RunPython) -> None:
    done = run_python(
        "import sys, models.backbone.freeze_policy\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert done.stdout.split() == ["False", "False"], done.stderr
