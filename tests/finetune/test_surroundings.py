"""Whole runs where the machine is odd: they work, or say in one line which place is at fault."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RunForked
from tests.support.forked import Program
from tests.support.images import write_noise_folders

# Mounts are this process's alone.
RUN = """
import ctypes, os, subprocess, sys, tempfile
mounts, unset, user = {mounts!r}, {unset!r}, {user!r}
if mounts:
    assert ctypes.CDLL(None).unshare(0x00020000) == 0, "CLONE_NEWNS"
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
for folder, how in mounts:
    subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder], check=True)
for name in unset:
    os.environ.pop(name, None)
if user:
    # In a namespace of users: with another number, and this process's rights to its interpreter.
    assert ctypes.CDLL(None).unshare(0x10000000) == 0, "CLONE_NEWUSER"
    open("/proc/self/uid_map", "w").write(f"{{user}} 0 1")
    assert os.getuid() == user
tempfile.tempdir = None  # chosen before the fork
from finetune.run import main
sys.exit(main({arguments!r}))
"""
FULL, READ_ONLY = "nr_inodes=1", "ro"


class Surroundings:
    """What is odd about a run, and how it should end: `says` is part of its last lines."""

    def __init__(
        self,
        says: str = "",
        *,
        mounts: dict[str, str] | None = None,
        env: dict[str, str] | None = None,
        unset: tuple[str, ...] = (),
        user: int = 0,
        arguments: str = "",
    ) -> None:
        self.says = says
        self.mounts = mounts or {}
        self.env = env or {}
        self.unset = unset
        self.user = user
        self.arguments = arguments

    @property
    def decides_at_import(self) -> bool:
        """Whether the default of an option depends on it."""
        return "XDG_CACHE_HOME" in (*self.unset, *self.env)

    def program(self, root: Path, data: Path) -> Program:
        for name in ("cache", "out", "checkpoints", "tmp"):
            (root / name).mkdir()
            (root / name).chmod(0o777)
        root.chmod(0o777)
        common = (
            f"--data {data} --backbone tests.support.tiny:build_trunk --workers 1 "
            f"--precision fp32 --output {root}/out --repository {root}/checkpoints"
        )
        cache = "" if self.decides_at_import else f" --cache-dir {root}/cache"
        code = RUN.format(
            mounts=[
                (folder if folder.startswith("/") else f"{root}/{folder}", how)
                for folder, how in self.mounts.items()
            ],
            unset=self.unset,
            user=self.user,
            arguments=f"{common}{cache} {self.arguments}".split(),
        )
        return Program(code=code, env={"TMPDIR": f"{root}/tmp", **self.env})


NOBODY = 54321
ODD = {
    "no home": Surroundings(unset=("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")),
    "empty XDG_CACHE_HOME": Surroundings(env={"XDG_CACHE_HOME": ""}),
    "an old locale": Surroundings(env={"LC_ALL": "POSIX", "LANG": "POSIX"}),
    "a user without a name": Surroundings(
        user=NOBODY, unset=("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")
    ),
    "/dev/shm full": Surroundings(
        mounts={"/dev/shm": FULL}, arguments="--freeze until:stem --epochs 1"
    ),
    "cache full": Surroundings("--cache-dir", mounts={"cache": FULL}),
    "cache read-only": Surroundings("--cache-dir", mounts={"cache": READ_ONLY}),
    "output full": Surroundings("--output", mounts={"out": FULL}),
    "output read-only": Surroundings("--output", mounts={"out": READ_ONLY}),
    "repository full": Surroundings("--repository", mounts={"checkpoints": FULL}),
    "repository read-only": Surroundings("--repository", mounts={"checkpoints": READ_ONLY}),
    # Python falls back to /tmp.
    "TMPDIR full": Surroundings(mounts={"tmp": FULL}),
}


@pytest.fixture(scope="module")
def ends(
    run_forked: RunForked, run_forked_online: RunForked
) -> Iterator[dict[str, subprocess.CompletedProcess[str]]]:
    # Every user can reach it, unlike pytest's.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        data = write_noise_folders(root / "data", 6)
        programs = {}
        for number, (name, surroundings) in enumerate(ODD.items()):
            own = root / str(number)
            own.mkdir()
            programs[name] = surroundings.program(own, data)
        ends: dict[str, subprocess.CompletedProcess[str]] = {}
        for run, late in ((run_forked, False), (run_forked_online, True)):
            names = [name for name in ODD if ODD[name].decides_at_import == late]
            for place in range(0, len(names), 4):
                some = names[place : place + 4]
                ends |= zip(some, run(*(programs[name] for name in some)), strict=True)
        yield ends


@pytest.mark.parametrize("name", ODD)
def test_a_run_works_or_names_the_place(
    name: str, ends: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    done = ends[name]
    if "CLONE_NEW" in done.stderr:
        pytest.skip("namespaces of its own need root")
    assert "Traceback" not in done.stderr
    expected = ODD[name].says
    if not expected:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2, done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert expected in error
