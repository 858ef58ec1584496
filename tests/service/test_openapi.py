"""The OpenAPI page describes every route of the table, whole and without another host."""

from __future__ import annotations

import json
import re
from typing import Any, cast

import bentoml
import pytest

from service.app import ROUTES, Graft
from service.openapi import describe


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return described(needs_token=True)


def described(*, needs_token: bool) -> dict[str, Any]:
    service = cast(bentoml.Service[Any], Graft)
    return describe(service.openapi_spec.asdict(), ROUTES, needs_token=needs_token)


def operations(spec: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, item in spec["paths"].items()
        for method, operation in item.items()
    }


def test_every_route_is_described_and_nothing_else(spec: dict[str, Any]) -> None:
    assert set(operations(spec)) == {(route.method, route.path) for route in ROUTES}
    for (_, path), operation in operations(spec).items():
        assert len(operation["summary"]) > 5, path
        in_path = {
            parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"
        }
        assert in_path == set(re.findall(r"\{(\w+)\}", path))
        assert {"200", "default"} <= set(operation["responses"])


def test_every_answer_and_every_body_has_a_shape(spec: dict[str, Any]) -> None:
    texts = {"/", "/docs.json", "/livez", "/readyz", "/metrics"}
    no_body = re.compile(r".*:(load|unload)")
    for (method, path), operation in operations(spec).items():
        if path not in texts:
            assert (
                "$ref" in operation["responses"]["200"]["content"]["application/json"]["schema"]
            ), path
        assert ("requestBody" in operation) == (method != "GET" and not no_body.fullmatch(path)), (
            path
        )


def test_no_reference_dangles_and_no_shape_is_left_over(spec: dict[str, Any]) -> None:
    wanted = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(spec)))
    assert wanted == set(spec["components"]["schemas"])


def test_operation_ids_are_unique(spec: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operation in operations(spec).values()]
    assert len(set(ids)) == len(ids)


def test_errors_have_the_shape_of_their_protocol(spec: dict[str, Any]) -> None:
    for (_, path), operation in operations(spec).items():
        name = operation["responses"]["default"]["content"]["application/json"]["schema"][
            "$ref"
        ].rpartition("/")[2]
        is_ours = operation["tags"][0] in ("app", "graft", "health", "admin")
        assert name == ("ErrorResponse" if is_ours else "ProtocolError"), path


def test_who_needs_a_token() -> None:
    def closed(needs_token: bool) -> set[str]:
        found = operations(described(needs_token=needs_token))
        assert all(
            operation.get("security", [{"bearer": []}]) == [{"bearer": []}]
            for operation in found.values()
        )
        return {path for (_, path), operation in found.items() if "security" in operation}

    assert closed(False) == {route.path for route in ROUTES if route.needs == "admin_token"}
    assert closed(True) == {route.path for route in ROUTES if route.needs != "nothing"}


def test_nothing_comes_from_another_host(spec: dict[str, Any]) -> None:
    assert "://" not in json.dumps(spec)
