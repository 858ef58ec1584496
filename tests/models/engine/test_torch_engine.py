"""The engine on CUDA agrees with the one on CPUs, and refuses what its device cannot run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.engine.engine import Precision, run
from models.engine.openvino_engine import OpenVINOEngine
from models.engine.torch_engine import TorchEngine
from models.errors import GraftError
from models.prepared import PreparedBackbone, build_engine
from models.preprocess import Pixels, Preprocess


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_that_the_cpu_does_not_run_is_refused(precision: Precision) -> None:
    with pytest.raises(GraftError, match=f"--precision {precision}: the torch engine on cpu"):
        TorchEngine(torch.nn.Flatten(), Preprocess(), device="cpu", precision=precision)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_cuda_agrees_with_the_cpu(
    prepared: PreparedBackbone, engine: OpenVINOEngine, crops: Pixels, precision: Precision
) -> None:
    on_cuda = build_engine(
        prepared.folder, prepared.preprocess, prepared.config, device="cuda", precision=precision
    )
    one, other = run(on_cuda, crops), run(engine, crops)
    cosine = (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert cosine.min() > (0.9999 if precision == "fp32" else 0.99)
    on_cuda.close()
