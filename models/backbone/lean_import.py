"""Importing timm and torchvision without torch's compiler.

Both name it while they are imported (in decorators, and to set a limit of its own), and that alone loads `torch._dynamo` and sympy: 3 of
8 s, for a compiler that a conversion for the CPU never runs.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_COMPILER = "torch._dynamo"
_UTILS = "torch._dynamo.utils"


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """What is imported within finds a stand-in for `torch._dynamo`, which makes way for the real one when it is asked for more.

    After it, who uses the compiler imports the real one. On a machine with CUDA, where networks are compiled, nothing is done.
    """
    if _COMPILER in sys.modules or torch.cuda.is_available():
        yield
        return
    utils = _StandIn(_UTILS, {"is_compile_supported": _is_compile_supported})
    sys.modules[_COMPILER] = _StandIn(
        _COMPILER, {"utils": utils, "config": SimpleNamespace(), "disable": _disable}
    )
    sys.modules[_UTILS] = utils
    try:
        yield
    finally:
        _remove_stand_ins()


class _StandIn(ModuleType):
    """A module of which the names that are wanted on import are there."""

    def __init__(self, name: str, names: dict[str, Any]) -> None:
        super().__init__(name)
        # Of the real package: its other modules can be imported.
        self.__path__ = [f"{path}/_dynamo" for path in torch.__path__]
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _remove_stand_ins()
        return getattr(importlib.import_module(self.__name__), name)


def _remove_stand_ins() -> None:
    for name in (_UTILS, _COMPILER):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


def _is_compile_supported(device_type: str) -> bool:
    return bool(importlib.import_module(_UTILS).is_compile_supported(device_type))


def _disable(fn: Any = None, recursive: bool = True, **_: Any) -> Any:
    """As it is: what is never compiled needs no exception from it."""
    return (lambda function: function) if fn is None else fn
