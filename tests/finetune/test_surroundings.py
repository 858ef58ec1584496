"""Whole runs where the machine is odd: they work, or say in one line which place is at fault."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.images import write_noise_folders

RunForked = Callable[[list[tuple[str, dict[str, str]]]], list[tuple[int, str]]]

# Mounts are this process's alone.
RUN = """
import ctypes, os, subprocess, tempfile
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
print("code", main({arguments!r}))
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

    def job(self, root: Path, data: Path) -> tuple[str, dict[str, str]]:
        for name in ("cache", "out", "checkpoints", "tmp"):
            (root / name).mkdir()
            (root / name).chmod(0o777)
        root.chmod(0o777)
        common = (
            f"--data {data} --backbone tests.support.tiny:build_trunk --workers 1 "
            f"--precision fp32 --output {root}/out --repository {root}/checkpoints"
        )
        cache = "" if "XDG_CACHE_HOME" in (*self.unset, *self.env) else f" --cache-dir {root}/cache"
        code = RUN.format(
            mounts=[
                (folder if folder.startswith("/") else f"{root}/{folder}", how)
                for folder, how in self.mounts.items()
            ],
            unset=self.unset,
            user=self.user,
            arguments=f"{common}{cache} {self.arguments}".split(),
        )
        return code, {"TMPDIR": f"{root}/tmp", **self.env}


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
def ends(run_forked: RunForked) -> Iterator[dict[str, tuple[int, str]]]:
    """The exit code and the output of each run."""
    # Every user can reach it, unlike pytest's.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        data = write_noise_folders(root / "data", 6)
        jobs = []
        for number, surroundings in enumerate(ODD.values()):
            own = root / str(number)
            own.mkdir()
            jobs.append(surroundings.job(own, data))
        found = [end for at in range(0, len(jobs), 4) for end in run_forked(jobs[at : at + 4])]
        yield dict(zip(ODD, found, strict=True))
        shutil.rmtree(root / "data")


@pytest.mark.parametrize("name", ODD)
def test_a_run_works_or_names_the_place(name: str, ends: dict[str, tuple[int, str]]) -> None:
    code, said = ends[name]
    if "CLONE_NEW" in said:
        pytest.skip("namespaces of its own need root")
    assert code == 0, said
    assert "Traceback" not in said
    last = said[said.rindex("code ") :].strip()
    expected = ODD[name].says
    if not expected:
        assert last == "code 0", said
        return
    assert last == "code 2", said
    (error,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert expected in error
