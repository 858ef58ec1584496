"""A conversion loads no compiler, and who compiles afterwards gets the real one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

RunPython = Callable[..., subprocess.CompletedProcess[str]]
COMPILES = "import torch; assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2)).tolist() == [2, 2]"


def test_a_backbone_is_built_and_converted_without_the_compiler(
    run_python: RunPython, tmp_path: object
) -> None:
    done = run_python(
        f"""
import sys
from pathlib import Path
from models.backbone.build import build_backbone
from models.prepared import write_prepared
write_prepared(build_backbone("resnet18", num_classes=2, pretrained=False, image_size=64), Path({str(tmp_path)!r}) / "made")
assert not {{"torch._dynamo", "sympy"}} & sys.modules.keys(), sorted(sys.modules)
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "before",
    [
        "import models.backbone.build",
        "import torchvision",
        # Asked for more than the stand-in has, it makes way at once.
        "from models.backbone.lean_import import without_compiler\nwith without_compiler():\n    import torch._dynamo\n    torch._dynamo.reset()",
        "from models.backbone.lean_import import without_compiler\nwith without_compiler():\n    from torch._dynamo.utils import counters",
    ],
)
def test_who_compiles_gets_the_real_compiler(run_python: RunPython, before: str) -> None:
    done = run_python(
        f"{before}\n{COMPILES}\nimport torch._dynamo.utils as utils; assert utils.is_compile_supported('cpu') in (True, False)"
    )
    assert done.returncode == 0, done.stderr
