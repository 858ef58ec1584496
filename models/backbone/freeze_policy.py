"""What `--freeze` means for a list of module names. Needs no torch, so that a wrong policy is answered before any work."""

from __future__ import annotations

from collections.abc import Sequence

from models.errors import GraftError


def resolve_policy(
    policy: str, module_names: Sequence[str], *, classifier: str, prefix: str, stages: Sequence[str]
) -> frozenset[str]:
    """The modules that stay as they are, by name as in `named_modules`, in whose order `module_names` come.

    `backbone` freezes all but the module named `classifier`; `until:NAME` everything up to and including NAME, and the ancestors of
    NAME with their own tensors; `none` nothing. `prefix` stands before NAME in the network ("backbone." round a user's own module).
    Raises GraftError for another policy, or a NAME that is not there (with `stages` as the offer) or that is the classifier.
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
            f"--freeze {policy}: {last!r} is the classifier, which always trains; say --freeze backbone"
        )
    subtree = [
        index
        for index, name in enumerate(module_names)
        if name == full or name.startswith(f"{full}.")
    ]
    return frozenset(module_names[: subtree[-1] + 1]) - head
