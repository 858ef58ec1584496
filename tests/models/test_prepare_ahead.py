"""A backbone is prepared while images are read; what fails there, the run reports as ever."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import RunForked, RunPython
from tests.support.forked import Program

BEGIN = """
import sys, time
from pathlib import Path
from models.prepare_ahead import prepare_ahead
from models.prepared import prepare_backbone
cache = Path(sys.argv[1])
given = {"weights": None, "pretrained": True, "image_size": 64, "cache_dir": cache}
"""


def test_at_its_end_the_cache_has_it_and_this_process_no_torch(
    run_python: RunPython, tmp_path: Path
) -> None:
    done = run_python(
        f"""{BEGIN}
with prepare_ahead("tf_efficientnet_lite0", **given):
    assert not list(cache.glob("backbones/*/config.json"))
    read_at = time.time()
(made,) = cache.glob("backbones/*/config.json")
assert made.stat().st_mtime > read_at
backbone = prepare_backbone("tf_efficientnet_lite0", **given, scratch_dir=cache)
assert backbone.folder == made.parent and backbone.is_pretrained and "torch" not in sys.modules
""",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_an_error_meanwhile_ends_it_and_leaves_nothing(
    run_python: RunPython, tmp_path: Path
) -> None:
    done = run_python(
        f"""{BEGIN}
with prepare_ahead("tf_efficientnet_lite0", **given):
    while not list(cache.glob("backbones/.tmp-*")):
        time.sleep(0.001)
    raise ValueError("no images")
""",
        str(tmp_path),
    )
    assert "ValueError: no images" in done.stderr
    assert list((tmp_path / "backbones").iterdir()) == []


def test_what_is_wrong_is_left_to_the_run(run_forked: RunForked, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"no tensors")
    code = f"""
import sys
sys.argv = ["-c", {str(tmp_path / "cache")!r}]
{BEGIN}
given["weights"] = Path({str(weights)!r})
with prepare_ahead("tf_efficientnet_lite0", **given):
    pass
prepare_backbone("tf_efficientnet_lite0", **given, scratch_dir=cache)
"""
    (done,) = run_forked(Program(code=code))
    assert done.returncode == 1
    assert done.stderr.count("direct cause") == 1
    assert str(weights) in done.stderr


def test_what_would_be_downloaded_or_cannot_be_kept_is_not_begun(
    run_python: RunPython, tmp_path: Path
) -> None:
    done = run_python(
        f"""{BEGIN}
import subprocess
subprocess.Popen = None
with prepare_ahead("resnet18", **given): pass
with prepare_ahead("mine:build", **given): pass
with prepare_ahead("tf_efficientnet_lite0", **{{**given, "pretrained": False}}): pass
with prepare_ahead("tf_efficientnet_lite0", **{{**given, "cache_dir": None}}): pass
""",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
