"""Flags and a YAML file → options; what is wrong is one line for each option."""

from __future__ import annotations

import argparse
import difflib
import inspect
import logging
import re
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from finetune.config import ProgramOptions, flag_of
from models.allowed import describe_allowed
from models.errors import GraftError

logger = logging.getLogger("graft.options")


class _StrictLoader(yaml.SafeLoader):
    """YAML without its surprises: a key that stands twice is an error, and 1:30 is text, not 90."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value} stands in it twice, again in line {line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_WHOLE_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*$")
_StrictLoader.yaml_implicit_resolvers = {
    first: [
        (tag, _WHOLE_NUMBER if tag == "tag:yaml.org,2002:int" else pattern)
        for tag, pattern in resolvers
        # A name may look like a date.
        if tag != "tag:yaml.org,2002:timestamp"
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _StoreLast(argparse.Action):
    """Stores a value; of a flag that is given twice, as scripts do, the first one is named."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, values)
        if before != values:
            logger.warning(
                "%s %s has no effect: %s %s comes after it",
                option_string,
                before,
                option_string,
                values,
            )
        setattr(namespace, self.dest, values)


AnyOptions = TypeVar("AnyOptions", bound=ProgramOptions)


def parse_options(kind: type[AnyOptions], arguments: list[str]) -> AnyOptions:
    """Options from flags, else from the YAML file of `--config`, else their defaults.

    Raises GraftError with one line for every wrong option; `--help` prints and exits.
    """
    given = _parse_flags(kind, arguments)
    if given.get("config") == "":
        raise GraftError("--config '': it must not be empty")
    from_file = _read_config(kind, Path(given["config"])) if "config" in given else {}
    merged = {**from_file, **given}
    empty = [name for name in kind.model_fields if merged.get(name) == ""]
    if empty:
        raise GraftError("\n".join(f"{flag_of(name)} '': it must not be empty" for name in empty))
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        lines = [_describe_problem(kind, problem) for problem in error.errors()]
        raise GraftError("\n".join(lines)) from None


def _parse_flags(kind: type[ProgramOptions], arguments: list[str]) -> dict[str, Any]:
    """The options that are given, by field; values are still text, those of switches bool."""
    parser = argparse.ArgumentParser(
        prog=kind.program,
        description=inspect.getdoc(kind),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    name_of_action = {}
    for name, field in kind.model_fields.items():
        if name == kind.positional:
            # Optional for argparse, which would exit where it is missing: pydantic says so.
            parser.add_argument(name, nargs="?", metavar=name.upper(), help=field.description)
            continue
        action = _add_argument(parser, name, field)
        name_of_action["/".join(action.option_strings)] = name
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        if str(error.argument_name) not in name_of_action:
            raise GraftError("--help: it takes no value") from None
        _refuse_flag(kind, name_of_action[str(error.argument_name)])
    if unknown:
        _refuse_unknown(kind, unknown)
    return vars(given)


def _add_argument(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> argparse.Action:
    details = []
    if field.metadata and not isinstance(field.default, str):
        details.append(describe_allowed(field))
    if field.default is not None and not field.is_required():
        on_or_off = {True: "on", False: "off"}
        is_switch = field.annotation is bool
        details.append(f"default: {on_or_off[field.default] if is_switch else field.default}")
    text = " ".join(str(field.description).split())
    text = f"{text} ({'; '.join(details)})" if details else text
    if field.annotation is bool:
        return parser.add_argument(
            flag_of(name), action=argparse.BooleanOptionalAction, help=text.replace("%", "%%")
        )
    return parser.add_argument(
        flag_of(name), action=_StoreLast, metavar=_metavar(field), help=text.replace("%", "%%")
    )


def _metavar(field: FieldInfo) -> str:
    """What stands for the value in the help: `{auto,cpu,cuda}`, `N`, `X`, `PATH` or `TEXT`."""
    if get_origin(field.annotation) is Literal:
        return f"{{{','.join(get_args(field.annotation))}}}"
    names = {int: "N", float: "X", Path: "PATH"}
    kinds = (field.annotation, *get_args(field.annotation))
    return next((names[kind] for kind in kinds if kind in names), "TEXT")


def _refuse_flag(kind: type[ProgramOptions], name: str) -> NoReturn:
    """A known flag without the value that it needs, or with one that it does not take."""
    field, flag = kind.model_fields[name], flag_of(name)
    if field.annotation is bool:
        raise GraftError(f"{flag}: it takes no value; say {flag} or --no-{flag[2:]}")
    raise GraftError(f"{flag}: it needs a value, {describe_allowed(field)}")


def _refuse_unknown(kind: type[ProgramOptions], words: list[str]) -> NoReturn:
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags:
        raise GraftError(
            f"{words[0]}: it belongs to no option; options are given as --name VALUE, "
            "--help lists them"
        )
    known = [flag_of(name) for name in kind.model_fields]
    switches = [name for name, field in kind.model_fields.items() if field.annotation is bool]
    known += [flag_of(f"no_{name}") for name in switches]
    raise GraftError(
        "\n".join(
            f"{flag}: there is no such option; {_did_you_mean(flag, known)}--help lists them"
            for flag in flags
        )
    )


def _did_you_mean(flag: str, known: list[str]) -> str:
    close = [other for other in known if other.startswith(flag)]
    close = close or difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    return f"did you mean {close[0]}? " if close else ""


def _read_config(kind: type[ProgramOptions], path: Path) -> dict[str, Any]:
    allowed = "it takes a YAML file, such as the config.yaml of a run"
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise GraftError(f"--config {path}: {error.strerror}; {allowed}") from error
    except UnicodeDecodeError as error:
        raise GraftError(f"--config {path}: it is not text in UTF-8; {allowed}") from error
    # A number of thousands of digits raises ValueError.
    except (yaml.YAMLError, ValueError) as error:
        raise GraftError(f"--config {path}: it is not valid YAML: {error}") from error
    except RecursionError:
        raise GraftError(f"--config {path}: it is nested too deeply; {allowed}") from None
    if not isinstance(loaded, dict):
        raise GraftError(
            f"--config {path}: it must hold one `option: value` a line, as the config.yaml of a "
            "run does"
        )
    unknown = sorted(str(key) for key in loaded if key not in kind.model_fields)
    if unknown:
        raise GraftError(
            f"--config {path}: unknown options {', '.join(unknown)}; "
            f"known are {', '.join(kind.model_fields)}"
        )
    if "config" in loaded:
        raise GraftError(f"--config {path}: config: a file cannot name another; leave it out")
    for name, value in loaded.items():
        field = kind.model_fields[name]
        # Which pydantic would take for 1 and 0.
        if isinstance(value, bool) and field.annotation is not bool:
            raise GraftError(
                f"--config {path}: {name}: {str(value).lower()}: it must be "
                f"{describe_allowed(field)}"
            )
    return loaded


def _describe_problem(kind: type[ProgramOptions], problem: Any) -> str:
    """One of pydantic's errors with its flag, the value and what is allowed."""
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    flag = name.upper() if name == kind.positional else flag_of(name)
    if problem["type"] == "missing":
        field = kind.model_fields[name]
        return f"{flag}: it is needed, {describe_allowed(field)}; --help lists the options"
    if problem["type"] == "value_error":
        return message if message.startswith(flag) else f"{flag} {problem['input']}: {message}"
    if problem["type"] == "string_too_short":
        return f"{flag} {problem['input']!r}: it must not be empty"
    return f"{flag} {problem['input']}: it must be {describe_allowed(kind.model_fields[name])}"
