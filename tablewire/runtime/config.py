"""Configuration: TOML files, then `TABLEWIRE_*` variables, then flags, each stronger than what is before it.

A configuration is a tree of `Section`s, frozen structs whose fields all have a default, a bound and a sentence:

    class Lease(Section, frozen=True, kw_only=True):
        ttl_ms: Annotated[int, key("How long etcd keeps us", ge=2_000, le=600_000)] = 10_000

    in a file                 under [lease]: ttl_ms = 5000
    in the environment        TABLEWIRE_LEASE__TTL_MS=5000      lists: a,b   maps: zone=a,rack=7   (or JSON)
    as a flag                 {"lease.ttl_ms": 5000}            a None is a flag that was not given

A frozen dataclass is a section too, when the metadata of its fields are arguments of `key`: code that must not import this
module defines its settings that way.

Nothing is guessed: an unknown key, a value of the wrong type or out of its bounds is one ConfigError, in one line, with the path
of the key and where it came from. A value is converted by itself, so that msgspec's path is ours in every case.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from tablewire.errors import ConfigError
from tablewire.runtime.uris import redact_uri

ENVIRONMENT_PREFIX = "TABLEWIRE_"
OTHER_VARIABLES = frozenset({"TABLEWIRE_ETCD_BIN", "TABLEWIRE_POSTGRES_BIN", "TABLEWIRE_CONFIG", "TABLEWIRE_ENDPOINTS"})
"""Variables of this prefix that are no configuration keys."""
CONFIG_BYTES_MAX = 1024 * 1024
_SHOWN_CHARACTERS_MAX = 60


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all configuration structs. A check over several keys belongs into __post_init__ and raises ValueError."""


_S = TypeVar("_S", bound=Section)


def key(doc: str, **bounds: Any) -> msgspec.Meta:
    """What stands beside a key's type: its sentence, and bounds as msgspec has them (ge, gt, le, lt, min_length, ...)."""
    return msgspec.Meta(description=doc, **bounds)


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One key, for `config show` and the documentation. `path` as in a file, `environment` as a variable."""

    path: str
    environment: str
    type: str
    default: Any
    bounds: str
    doc: str


@dataclass(frozen=True, slots=True)
class _Given:
    """A value, and where it was found. is_text: from the environment or a flag, where everything is text."""

    value: Any
    origin: str
    is_text: bool


def load(
    kind: type[_S],
    *,
    files: Sequence[Path | str] = (),
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    other_variables: Collection[str] = OTHER_VARIABLES,
) -> _S:
    """The configuration. Later files are stronger. ConfigError says what is wrong and where."""
    return load_with_origins(kind, files=files, environ=environ, flags=flags, other_variables=other_variables)[0]


def load_with_origins(
    kind: type[_S],
    *,
    files: Sequence[Path | str] = (),
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    other_variables: Collection[str] = OTHER_VARIABLES,
) -> tuple[_S, dict[str, str]]:
    """As `load`, and for each key that was given (path -> "file ...", "environment variable ...", "flag ...")."""
    leaves = dict(_leaves(kind))
    given: dict[str, _Given] = {}
    for file in files:
        given.update(_from_table(_read(Path(file)), leaves, f"file {file}", ""))
    given.update(_from_environ(environ or {}, leaves, other_variables))
    given.update(_from_flags(flags or {}, leaves))
    values = {path: _convert(path, found, leaves[path]) for path, found in given.items()}
    origins = {path: found.origin for path, found in given.items()}
    return _build(kind, values, origins, ""), origins


def describe(kind: type[Section]) -> list[KeyRow]:
    """All keys in the order of their definition."""
    rows = []
    for path, field in _leaves(kind):
        meta = field.meta
        rows.append(
            KeyRow(
                path=path,
                environment=variable_of(path),
                type=_type_name(field.type),
                default=field.default,
                bounds=_choices(field.type) or (_bounds(meta) if meta is not None else ""),
                doc=(meta.description or "") if meta is not None else "",
            )
        )
    return rows


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key's path and value, in the order of their definition."""
    for name, _ in _fields(type(config)):
        path, value = f"{prefix}{name}", getattr(config, name)
        if is_section(type(value)):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def variable_of(path: str) -> str:
    """The environment variable of a key."""
    return ENVIRONMENT_PREFIX + path.replace(".", "__").upper()


# ---------------------------------------------------------------------------------------------------------------------
# The keys of a tree


@dataclass(frozen=True, slots=True)
class _Leaf:
    type: Any
    meta: msgspec.Meta | None
    default: Any


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, Section) or dataclasses.is_dataclass(kind))


def _fields(kind: type[Any]) -> Iterator[tuple[str, Any]]:
    """The name and the type hint of each key and section of a section."""
    hints = get_type_hints(kind, include_extras=True)
    if not dataclasses.is_dataclass(kind):
        yield from ((name, hints[name]) for name in kind.__struct_fields__)
        return
    for field in dataclasses.fields(kind):
        yield field.name, Annotated[hints[field.name], key(**field.metadata)]


def _leaves(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, _Leaf]]:
    defaults = kind()
    for name, hint in _fields(kind):
        path = f"{prefix}{name}"
        if is_section(hint):
            yield from _leaves(hint, f"{path}.")
            continue
        metas = [item for item in get_args(hint)[1:] if isinstance(item, msgspec.Meta)] if _is_annotated(hint) else [None]
        yield path, _Leaf(hint, metas[0], getattr(defaults, name))


def _build(kind: type[_S], values: Mapping[str, Any], origins: Mapping[str, str], prefix: str) -> _S:
    fields: dict[str, Any] = {}
    for name, hint in _fields(kind):
        path = f"{prefix}{name}"
        if is_section(hint):
            fields[name] = _build(hint, values, origins, f"{path}.")
        elif path in values:
            fields[name] = values[path]
    try:
        return kind(**fields)
    except ValueError as error:
        involved = dict.fromkeys(origin for path, origin in origins.items() if path.startswith(prefix))
        raise ConfigError(f"{', '.join(involved)}: {prefix.rstrip('.') or 'configuration'}: {error}") from error


def _convert(path: str, given: _Given, leaf: _Leaf) -> Any:
    value = _parse_text(path, given, leaf) if given.is_text and isinstance(given.value, str) else given.value
    try:
        return msgspec.convert(value, leaf.type, strict=not given.is_text)
    except msgspec.ValidationError as error:
        reason, _, inner = str(error).partition(" - at `$")
        shown = redact_uri(str(given.value))
        shown = shown if len(shown) <= _SHOWN_CHARACTERS_MAX else shown[:_SHOWN_CHARACTERS_MAX] + "..."
        choices = _choices(leaf.type)
        raise ConfigError(
            f"{given.origin}: {path}{inner.rstrip('`')}: {reason}{choices and f' (one of {choices})'}: {shown!r}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Where values come from


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            text = stream.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"file {file}: {error.strerror}") from error
    if len(text) > CONFIG_BYTES_MAX:
        raise ConfigError(f"file {file}: larger than {CONFIG_BYTES_MAX} bytes")
    try:
        return tomllib.loads(text.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"file {file}: not valid TOML: {error}") from error


def _from_table(table: Mapping[str, Any], leaves: Mapping[str, _Leaf], origin: str, prefix: str) -> Iterator[tuple[str, _Given]]:
    for name, value in table.items():
        path = f"{prefix}{name}"
        if path in leaves:
            yield path, _Given(value, origin, is_text=False)
        elif not any(known.startswith(f"{path}.") for known in leaves):
            raise ConfigError(f"{origin}: unknown key {path}{_suggestion(path, leaves)}")
        elif not isinstance(value, Mapping):
            raise ConfigError(f"{origin}: {path} is a section, write [{path}]")
        else:
            yield from _from_table(value, leaves, origin, f"{path}.")


def _from_environ(
    environ: Mapping[str, str], leaves: Mapping[str, _Leaf], other_variables: Collection[str]
) -> Iterator[tuple[str, _Given]]:
    paths = {variable_of(path): path for path in leaves}
    for name, value in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or name in other_variables:
            continue
        if name not in paths:
            raise ConfigError(f"environment variable {name}: no such key{_suggestion(name, paths)}")
        yield paths[name], _Given(value, f"environment variable {name}", is_text=True)


def _from_flags(flags: Mapping[str, Any], leaves: Mapping[str, _Leaf]) -> Iterator[tuple[str, _Given]]:
    for path, value in flags.items():
        if value is None:
            continue
        if path not in leaves:
            raise ConfigError(f"flag {path}: no such key{_suggestion(path, leaves)}")
        yield path, _Given(value, f"flag {path}", is_text=True)


def _parse_text(path: str, given: _Given, leaf: _Leaf) -> Any:
    """Text for a list or a map: JSON, or the short form a,b and name=value,name=value."""
    container = get_origin(_bare(leaf.type))
    text = given.value.strip()
    if container not in (list, tuple, dict):
        return given.value
    if text[:1] in ("[", "{"):
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{given.origin}: {path}: not valid JSON: {error}") from error
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if container is not dict:
        return parts
    pairs = [part.partition("=") for part in parts]
    if not all(name and equals for name, equals, _ in pairs):
        raise ConfigError(f"{given.origin}: {path}: expected name=value,name=value, got {redact_uri(text)!r}")
    return {name.strip(): value.strip() for name, _, value in pairs}


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def _suggestion(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f" (did you mean {close[0]}?)" if close else ""


def _is_annotated(hint: Any) -> bool:
    return get_origin(hint) is Annotated


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if _is_annotated(hint) else hint


def _choices(hint: Any) -> str:
    bare = _bare(hint)
    return ", ".join(str(choice) for choice in get_args(bare)) if get_origin(bare) is Literal else ""


def _type_name(hint: Any) -> str:
    bare = _bare(hint)
    if get_origin(bare) is Literal:
        return "str"
    return bare.__name__ if isinstance(bare, type) and not get_args(bare) else str(bare).replace("typing.", "")


def _bounds(meta: msgspec.Meta) -> str:
    """The bounds as people write them: ">= 1, <= 10"."""
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    found = [f"{sign} {getattr(meta, name)}" for name, sign in signs if getattr(meta, name) is not None]
    if meta.min_length is not None:
        found.append(f"length >= {meta.min_length}")
    if meta.max_length is not None:
        found.append(f"length <= {meta.max_length}")
    if meta.pattern is not None:
        found.append(f"matches {meta.pattern}")
    return ", ".join(found)
