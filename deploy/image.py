"""`make image`: build the Bento and its container image, with the first builder that works here.

make image                              # graft:cpu, on OpenVINO and without torch
make image FLAVOUR=cuda                 # graft:cuda, with torch
make image ARGS="--ca corporate.crt --pip-conf pip.conf"   # behind a proxy, or with your own index
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

PROJECT_DIR = Path(__file__).resolve().parent.parent
BENTOFILES = {"cpu": "bentofile.yaml", "cuda": "bentofile.cuda.yaml"}
# The command that shows that a builder works: docker may be installed without its daemon.
BUILDERS = {
    "docker": ("docker", "version", "--format", "{{.Server.Version}}"),
    "podman": ("podman", "version"),
    "buildah": ("buildah", "version"),
    "nerdctl": ("nerdctl", "info"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--flavour", choices=BENTOFILES, default="cpu", help="cpu: OpenVINO; cuda: torch on a GPU"
    )
    parser.add_argument("--tag", help="the image's name; by default graft:<flavour>")
    parser.add_argument(
        "--backend", choices=BUILDERS, help="which builder; by default the first that answers"
    )
    parser.add_argument(
        "--pip-conf", type=Path, help="a pip.conf for the build alone, which no layer keeps"
    )
    parser.add_argument(
        "--ca", type=Path, help="certificates for the build alone, which no layer keeps"
    )
    options = parser.parse_args()
    tag = options.tag or f"graft:{options.flavour}"
    try:
        backend = options.backend or find_builder()
        bento = build_bento(BENTOFILES[options.flavour])
        containerize(bento, backend, tag, {"pip.conf": options.pip_conf, "ca.crt": options.ca})
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    print(f"{tag}: the image of {bento}, built by {backend}")


def find_builder() -> str:
    """The first of BUILDERS that works. Raises RuntimeError with a reason for each if none does."""
    reasons = []
    for name, probe in BUILDERS.items():
        if shutil.which(name) is None:
            reasons.append(f"{name} is not installed")
            continue
        answer = subprocess.run(probe, capture_output=True, text=True)
        if answer.returncode == 0:
            return name
        message = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        reasons.append(f"{name} does not answer ({message})")
    raise RuntimeError(
        f"an image needs one of {', '.join(BUILDERS)}, and {'; '.join(reasons)}. "
        "On Debian: `apt-get install buildah`"
    )


def build_bento(bentofile: str) -> str:
    """`bentoml build`; the tag of what it made. Raises RuntimeError with its message."""
    answer = _run("bentoml", "build", "--bentofile", bentofile, "--output", "tag", env={})
    return answer.strip().removeprefix("__tag__:")


def containerize(bento: str, backend: str, tag: str, secrets: dict[str, Path | None]) -> None:
    """`bentoml containerize` by this builder. Raises RuntimeError with the builder's message."""
    options = ["--image-tag", tag]
    for name, path in secrets.items():
        if path is not None:
            options += ["--opt", f"secret=id={name},src={path.resolve()}"]
    # BentoML (1.4.39) assembles the build in a temporary folder, and accepts templates from the
    # current folder only.
    with tempfile.TemporaryDirectory(prefix="graft-image-") as folder:
        # By default buildah and podman write OCI images, which have no HEALTHCHECK.
        env = {"TMPDIR": folder, "BUILDAH_FORMAT": "docker"}
        _run(
            "bentoml",
            "containerize",
            bento,
            "--backend",
            backend,
            *options,
            cwd=Path(folder),
            env=env,
        )


def _run(command: str, *arguments: str, cwd: Path = PROJECT_DIR, env: Mapping[str, str]) -> str:
    program = Path(sys.executable).with_name(command)
    answer = subprocess.run(
        [program, *arguments],
        cwd=cwd,
        env={**os.environ, "BENTOML_DO_NOT_TRACK": "true", **env},
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        raise RuntimeError(
            f"{command} {' '.join(arguments)} failed:\n{answer.stdout}{answer.stderr}"
        )
    return answer.stdout


if __name__ == "__main__":
    main()
