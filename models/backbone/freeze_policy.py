"""What `--freeze` means for a list of module names. Without torch: checked before any work."""

from __future__ import annotations

from collections.abc import Sequence

from models.errors import GraftError


def resolve_policy(
    policy: str, module_names: Sequence[str], *, classifier: str, prefix: str, stages: Sequence[str]
) -> frozenset[str]:
    """The names of the frozen modules among `module_names`, which come in `named_modules` order.

    `backbone` freezes all but the module `classifier`; `until:NAME` everything up to NAME with what
    is in it, and the own tensors of its ancestors; `none` nothing. `prefix` stands before NAME in
    the network ("backbone." in a user's own). Raises GraftError for another policy, and for a NAME
    that is not there (with `stages` as the offer) or is the classifier.
    """
    head = {
        name for name in module_names if name == classifier or name.startswith(f"{classifier}.")
    }
    if policy == "none":
        return frozenset()
    if policy == "backbone":
        return frozenset(module_names) - head
    if not policy.startswith("until:"):
        raise GraftError(f"--freeze {policy}: the policies are backbone, until:NAME and none")
    last = policy.removeprefix("until:")
    full = prefix + last
    if not last or full not in module_names:
        raise GraftError(
            f"--freeze {policy}: there is no module {last!r}; its stages are {', '.join(stages)}"
        )
    if full in head:
        raise GraftError(
            f"--freeze {policy}: {last!r} is the classifier, which always trains; "
            "say --freeze backbone"
        )
    subtree = [
        index
        for index, name in enumerate(module_names)
        if name == full or name.startswith(f"{full}.")
    ]
    return frozenset(module_names[: subtree[-1] + 1]) - head
