"""Graft on a CUDA device in one command, eight minutes at most: is it right, and how fast?

python benchmarks/cuda.py                             all steps, into docs/cuda-benchmark.md
python benchmarks/cuda.py --steps tests,serve         some of them
python benchmarks/cuda.py --device cpu --docs /tmp    a dry run where there is no device

Each step is a process of its own with a time limit, and its result is written as soon as it is
there, so that half a run is worth half.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Run as a file, `import cuda` in torch would find this file instead of NVIDIA's package.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from benchmarks.client import Client, run_loop
from benchmarks.images import make_request_images
from benchmarks.sections import write_section
from benchmarks.servers import ROOT, Launch, serve

_TITLE = "# Graft on a CUDA device\n\nWritten by `benchmarks/cuda.py`.\n"
_BACKBONES = ("tf_efficientnet_lite0", "resnet18", "resnet50", "vit_small_patch16_224")
_SECONDS = 2.0
# By step, in seconds: imports, conversions and what a device does for the first time are in it.
_LIMITS = {"device": 30, "tests": 90, "probe": 90, "tuned": 120, "engines": 120, "serve": 90}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", default=",".join(_LIMITS), help="comma-separated, in order")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    parser.add_argument("--step", choices=_LIMITS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(_STEPS[args.step](args.device)))
        return
    for step in args.steps.split(","):
        lines = _run_step(step, args.device)
        write_section(args.docs / "cuda-benchmark.md", _TITLE, step, [f"## {step}", "", *lines])


def _run_step(step: str, device: str) -> list[str]:
    """The lines of a step's section: its table, or why there is none."""
    command = [sys.executable, __file__, "--step", step, "--device", device]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=_LIMITS[step]
        )
    except subprocess.TimeoutExpired:
        return [f"not done within {_LIMITS[step]} s"]
    seconds = time.perf_counter() - started
    if done.returncode:
        return [f"failed after {seconds:.0f} s:", "```", *done.stderr.splitlines()[-15:], "```"]
    rows = json.loads(done.stdout.splitlines()[-1])
    columns = list(rows[0])
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows),
        "",
        f"{seconds:.0f} s",
    ]


def _measure_device(device: str) -> list[dict[str, Any]]:
    import timm
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    driver = (
        subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        if shutil.which("nvidia-smi")
        else ""
    )
    versions = {"torch": torch.__version__, "timm": timm.__version__, "cores": os.cpu_count()}
    return [{"device": name, "driver": driver, **versions}]


def _run_tests(_: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "pytest", "-q", "tests/models/engine"]
    done = subprocess.run(
        [*command, "-k", "torch or cuda or ring"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    return [{"tests": "; ".join([lines[-1], *failed]), "exit code": done.returncode}]


def _run_digits(device: str, *options: str) -> list[dict[str, Any]]:
    """A whole process on the embedded digits, with the second at which it logged each line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "finetune/run.py", "--device", device]
        command += ["--output", f"{folder}/runs", "--repository", f"{folder}/checkpoints"]
        command += ["--cache-dir", f"{folder}/cache", *options]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        rows = [
            {"second": f"{time.perf_counter() - started:.1f}", "log": line.strip()}
            for line in process.stdout
            if line.strip()
        ]
        process.wait()
    kept = re.compile("engine:|features:|probe:|epoch|accuracy|keeps|costs|error|converting")
    return [row for row in rows if kept.search(row["log"])] + [
        {"second": f"{time.perf_counter() - started:.1f}", "log": f"exit {process.returncode}"}
    ]


def _measure_engines(device: str) -> list[dict[str, Any]]:
    """Each backbone's engine on crops in host memory, beside the same network fed on the device."""
    return [_measure_engine(name, device) for name in _BACKBONES]


def _measure_engine(name: str, device: str) -> dict[str, Any]:
    import timm
    import torch

    from models.engine.torch_engine import TorchEngine
    from models.preprocess import Preprocess

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=0).eval()
    crops = np.random.default_rng(0).integers(0, 256, (512, 224, 224, 3), np.uint8)
    exact = _run_exact(network, crops[:16])
    started = time.perf_counter()
    engine = TorchEngine(network, Preprocess(height=224, width=224), device=device)
    opened = time.perf_counter() - started
    found = engine.run_here(crops[:16])
    size = engine.info.batch_size
    speed = _measure_rate(lambda: engine.submit(crops[:size]), size)
    alone = [_seconds_of(lambda: engine.run_here(crops[:1])) for _ in range(20)]
    engine.close()
    bound = _measure_on_device(network, size, engine.info.precision, device)
    return {
        "backbone": name,
        "precision": engine.info.precision,
        "batch": size,
        "opened s": f"{opened:.1f}",
        "error": f"{np.linalg.norm(found - exact) / np.linalg.norm(exact):.4f}",
        "images/s": f"{speed:.0f}",
        "eager from device memory": f"{bound:.0f}",
        "ratio": f"{speed / bound:.2f}",
        "one image ms": f"{1000 * statistics.median(alone):.2f}",
    }


def _run_exact(network: Any, crops: Any) -> Any:
    import torch

    from models.preprocess import Preprocess

    preprocess = Preprocess(height=224, width=224)
    mean = np.array(preprocess.mean, np.float32) * 255
    std = np.array(preprocess.std, np.float32) * 255
    images = torch.from_numpy(((crops - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return network.cpu()(images).numpy()


def _measure_on_device(network: Any, size: int, precision: str, device: str) -> float:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    network = network.to(device, dtype).to(memory_format=torch.channels_last)
    images = torch.randn(size, 3, 224, 224, device=device).to(
        dtype, memory_format=torch.channels_last
    )

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        for _ in range(3):
            network(images)
        wait()
        started, num_done = time.perf_counter(), 0
        while time.perf_counter() - started < _SECONDS:
            for _ in range(5):
                network(images)
            wait()
            num_done += 5 * size
        return num_done / (time.perf_counter() - started)


def _measure_rate(submit: Callable[[], Any], size: int) -> float:
    """Images a second with two threads that submit and three batches in flight for each."""
    counts = [0, 0]
    until = time.perf_counter() + _SECONDS

    def work(index: int) -> None:
        in_flight = []
        while time.perf_counter() < until:
            in_flight.append(submit())
            if len(in_flight) > 3:
                in_flight.pop(0).result()
                counts[index] += size
        for future in in_flight:
            future.result()
            counts[index] += size

    started = time.perf_counter()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


def _seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _measure_server(device: str) -> list[dict[str, Any]]:
    """A real server with a model of the embedded backbone, asked by 1 and 64 clients."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"CHECKPOINTS": f"{folder}/checkpoints", "GRAFT_DEVICE": device}
        command = [sys.executable, "finetune/run.py", "--device", device, "--name", "digits"]
        command += ["--output", f"{folder}/runs", "--repository", f"{folder}/checkpoints"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        photos = make_request_images(Path(folder), count=16)
        launch = Launch(
            (sys.executable, "-m", "bentoml", "serve", "--port", "{port}"), "/readyz", environment
        )
        rows = []
        with serve(launch, Path(folder) / "log") as server:
            for num_images in (1, 16):
                request = _encode(photos[:num_images])
                for num_clients in (1, 64):
                    seconds = run_loop(_ask(server.url, request, num_clients))
                    rows.append(
                        {
                            "images a request": num_images,
                            "clients": num_clients,
                            "requests/s": f"{len(seconds) / _SECONDS:.0f}",
                            "images/s": f"{num_images * len(seconds) / _SECONDS:.0f}",
                            "p50 ms": f"{1000 * statistics.median(seconds):.1f}",
                            "ready s": f"{server.start_seconds:.1f}",
                        }
                    )
    return rows


def _encode(images: list[bytes]) -> bytes:
    boundary = "graft-benchmark"
    parts = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{index}.jpg"\r\n'
        f"Content-Type: image/jpeg\r\n\r\n".encode()
        + image
        + b"\r\n"
        for index, image in enumerate(images)
    )
    body = parts + f"--{boundary}--\r\n".encode()
    head = (
        "POST /predict HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: multipart/form-data; boundary={boundary}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _ask(url: str, request: bytes, num_clients: int) -> list[float]:
    """The seconds of each good answer of clients that send the next request when they have one."""
    client, seconds = Client(url), []
    await client.send(request)
    until = time.perf_counter() + _SECONDS

    async def loop() -> None:
        while (started := time.perf_counter()) < until:
            status, body = await client.send(request)
            assert status == 200, body
            seconds.append(time.perf_counter() - started)

    await asyncio.gather(*(loop() for _ in range(num_clients)))
    client.close()
    return seconds


_STEPS: Mapping[str, Callable[[str], list[dict[str, Any]]]] = {
    "device": _measure_device,
    "tests": _run_tests,
    "probe": _run_digits,
    "tuned": lambda device: _run_digits(device, "--freeze", "until:blocks.4", "--epochs", "2"),
    "engines": _measure_engines,
    "serve": _measure_server,
}

if __name__ == "__main__":
    main()
