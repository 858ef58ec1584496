"""Programs in processes that are forked from one which has imported what they need.

Importing torch, timm and OpenVINO takes seconds, and dozens of tests run whole programs. A forked
process is as separate as one that is started: its own arguments, folder, environment, output,
limits and exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support.shared import HANG_SECONDS

PROJECT_DIR = Path(__file__).resolve().parents[2]
# Neither nncf, which a run seldom needs, nor what starts threads.
IMPORTED_BY_A_RUN = (
    "finetune.run",
    "finetune.training.explain",
    "models.backbone.build",
    "models.backbone.export",
    "openvino",
    "sklearn.datasets",
)


@dataclass(frozen=True)
class Program:
    """A file with its arguments, or `code`; `env` is added to the environment of this process."""

    path: str = ""
    arguments: Sequence[str] = ()
    code: str = ""
    cwd: str = str(PROJECT_DIR)
    env: Mapping[str, str] = field(default_factory=dict)
    # As ENOSPC does, EFBIG stops a write after a part of it.
    max_file_bytes: int | None = None


class Forker:
    """The process that has imported `modules`."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked", *modules],
            cwd=PROJECT_DIR,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, programs: Sequence[Program], output_dir: Path
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run all at once, and wait for them; what they print goes to files in `output_dir`."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        jobs = [
            {**asdict(program), "output": str(output_dir / str(index))}
            for index, program in enumerate(programs)
        ]
        requests.write(json.dumps(jobs) + "\n")
        requests.flush()
        codes: list[int] = json.loads(answers.readline())
        return [
            subprocess.CompletedProcess(
                [program.path or "-c", *program.arguments],
                code,
                *(Path(f"{job['output']}.{name}").read_text() for name in ("out", "err")),
            )
            for program, job, code in zip(programs, jobs, codes, strict=True)
        ]

    def close(self) -> None:
        self._process.communicate(timeout=HANG_SECONDS)


def _serve(modules: Sequence[str]) -> None:
    gc.disable()
    for name in modules:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        pids = []
        for job in json.loads(line):
            pid = os.fork()
            if pid == 0:
                _run(job)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def _run(job: dict[str, Any]) -> None:
    """Run a program in this process, and end it as Python would."""
    signal.alarm(int(HANG_SECONDS))  # ends what hangs, with -14
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{job['output']}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, f"{job['output']}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    if job["max_file_bytes"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_file_bytes"],) * 2)
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    code = 0
    try:
        if job["path"]:
            sys.argv = [job["path"], *job["arguments"]]
            # Python puts a program's folder first; this process' own entry is the project.
            sys.path.insert(0, str(Path(job["path"]).parent))
            runpy.run_path(job["path"], run_name="__main__")
        else:
            exec(job["code"], {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1:])
