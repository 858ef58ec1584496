"""List what an image contains, with sizes and licences, or as a CycloneDX SBOM.

It runs in the image, which does not hold it, with the standard library and no network:

    docker run --rm -i --entrypoint python3 graft:cpu - < deploy/contents.py
    docker run --rm -i --entrypoint python3 graft:cpu - --cyclonedx < deploy/contents.py
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path

_MEGABYTE = 1_000_000
_OLD_CLASSIFIERS = {
    "MIT License": "MIT",
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
}


@dataclass(frozen=True)
class Component:
    """`kind` is CycloneDX's type; `licence` is an SPDX expression or the component's own words."""

    kind: str
    name: str
    version: str
    licence: str
    purl: str
    num_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cyclonedx", action="store_true", help="an SBOM as CycloneDX 1.6 JSON")
    parser.add_argument(
        "--no-system", action="store_true", help="without the base image's packages"
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path(
            os.environ.get("CHECKPOINTS")
            or Path(os.environ.get("BENTO_PATH", "."), "src/checkpoints")
        ),
        help="the repository whose weights are listed",
    )
    options = parser.parse_args()
    components = sorted(list_packages(), key=lambda one: -one.num_bytes)
    components += sorted(list_checkpoints(options.checkpoints), key=lambda one: one.name)
    if not options.no_system:
        components += sorted(list_system_packages(), key=lambda one: -one.num_bytes)
    if options.cyclonedx:
        json.dump(describe(components), sys.stdout, indent=1)
        print()
        return
    for one in components:
        size, licence = one.num_bytes / _MEGABYTE, one.licence or "no licence given"
        print(f"{size:8.1f} MB  {one.kind:23} {one.name} {one.version}  {licence}")
    total = sum(one.num_bytes for one in components) / _MEGABYTE
    print(f"{total:8.1f} MB  in {len(components)} components")


def list_packages() -> Iterator[Component]:
    """Every distribution that this interpreter can import, with its size, bytecode included."""
    for one in distributions():
        name, version = one.metadata["Name"], one.version
        paths = {Path(str(file.locate())) for file in one.files or ()}
        num_bytes = sum(path.stat().st_size for path in paths if path.is_file())
        purl = f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{version}"
        yield Component("library", name, version, _licence_of(one), purl, num_bytes)


def list_system_packages() -> Iterator[Component]:
    """Debian's, where the base image is one, with the licences that their copyright files name."""
    status = Path("/var/lib/dpkg/status")
    if not status.exists():
        return
    query = [
        "dpkg-query",
        "-W",
        "-f",
        "${Package}\t${Version}\t${Architecture}\t${Installed-Size}\n",
    ]
    for line in subprocess.run(
        query, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        name, version, architecture, kilobytes = line.split("\t")
        purl = f"pkg:deb/debian/{name}@{version}?arch={architecture}"
        yield Component(
            "library", name, version, _debian_licence(name), purl, 1024 * int(kilobytes or 0)
        )


def list_checkpoints(repository: Path) -> Iterator[Component]:
    """The models: what their weights are, where they come from and what licence they carry."""
    for path in sorted(repository.glob("*/[0-9]*/config.json")):
        section = json.loads(path.read_text())["graft"]
        name, version = path.parent.parent.name, path.parent.name
        num_bytes = sum(file.stat().st_size for file in path.parent.iterdir())
        weights = f"{name} ({section.get('weights') or 'no pretrained weights'})"
        yield Component(
            "machine-learning-model",
            weights,
            version,
            section.get("license") or "",
            f"pkg:generic/{name}@{version}",
            num_bytes,
        )


def describe(components: list[Component]) -> dict[str, object]:
    """The CycloneDX 1.6 document."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {"type": "container", "bom-ref": "graft", "name": "graft"},
        },
        "components": [
            {
                "type": one.kind,
                "bom-ref": one.purl,
                "name": one.name,
                "version": one.version,
                "purl": one.purl,
                **({"licenses": [{"license": {"name": one.licence}}]} if one.licence else {}),
                "properties": [{"name": "graft:bytes", "value": str(one.num_bytes)}],
            }
            for one in components
        ],
    }


def _licence_of(one: Distribution) -> str:
    """PEP 639's expression, else the classifiers, else the old field, which may be a full text."""
    fields = one.metadata.json
    if "license_expression" in fields:
        return str(fields["license_expression"])
    prefix = "License :: OSI Approved :: "
    classifiers = [
        line.removeprefix(prefix)
        for line in fields.get("classifier", ())
        if line.startswith(prefix)
    ]
    if classifiers:
        return " AND ".join(_OLD_CLASSIFIERS.get(name, name) for name in classifiers)
    lines = str(fields.get("license", "")).strip().splitlines()
    if lines:
        return lines[0][:100]
    # A name for a set of requirements, such as cuda-toolkit's.
    is_empty = all(file.parts[0].endswith(".dist-info") for file in one.files or ())
    return "nothing of its own to license" if is_empty else ""


def _debian_licence(package: str) -> str:
    try:
        text = Path("/usr/share/doc", package, "copyright").read_text(errors="replace")
    except OSError:
        return ""
    # Some put the first line of the text there; a name is short.
    names = dict.fromkeys(
        name
        for name in re.findall(r"^License: *(\S.*?)\s*$", text, re.MULTILINE)
        if len(name) <= 40
    )
    return " AND ".join(names) or "see /usr/share/doc/" + package + "/copyright"


if __name__ == "__main__":
    main()
