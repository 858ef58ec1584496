"""Check that KServe's own API knows every field of the objects in the given files.

tests/image.sh runs it where `kserve` is installed:
uv run --no-project --with kserve==0.21.0 python tests/deploy/kserve_schema.py FILES
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml
from kserve import models  # type: ignore[import-not-found]
from kubernetes.client import models as kubernetes_models  # type: ignore[import-not-found]

_PRIMITIVES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        document = yaml.safe_load(path.read_text())
        if document["kind"] == "Kustomization":
            continue
        version = document["apiVersion"].split("/")[1]
        check(document, f"{version[0].upper()}{version[1:]}{document['kind']}", path.name)
        print(f"{path.name}: a {document['kind']} of {document['apiVersion']}")


def check(value: Any, kind: str, where: str) -> None:
    """`kind` as in the generated clients: a class, `list[…]`, `dict(str, …)` or a primitive."""
    if inner := re.fullmatch(r"[lL]ist\[(.+)\]", kind):
        for index, element in enumerate(value):
            check(element, inner[1], f"{where}[{index}]")
    elif inner := re.fullmatch(r"[dD]ict[(\[]str, (.+)[)\]]", kind):
        for key, element in value.items():
            check(element, inner[1], f"{where}.{key}")
    elif kind in _PRIMITIVES:
        if not isinstance(value, _PRIMITIVES[kind]):
            sys.exit(f"{where}: {value!r} is not a {kind}")
    elif (
        found := getattr(models, kind, None) or getattr(kubernetes_models, kind, None)
    ) is not None:
        names = {key: name for name, key in found.attribute_map.items()}
        for key, element in value.items():
            if key not in names:
                sys.exit(f"{where}: a {kind} has no {key}; it has {', '.join(sorted(names))}")
            check(element, found.openapi_types[names[key]], f"{where}.{key}")
        # Complains of what is required and missing.
        found(**{names[key]: element for key, element in value.items()})
    elif kind not in ("object", "IntOrString", "ResourceQuantity"):
        sys.exit(f"{where}: unknown type {kind}")


if __name__ == "__main__":
    main()
