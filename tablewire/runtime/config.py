"""Configuration: TOML files, overridden by `TABLEWIRE_*` variables, overridden by flags.

A configuration is a tree of `Section`s, frozen structs whose fields all have a default, bounds and
a description:

    class Lease(Section, frozen=True, kw_only=True):
        ttl_ms: Annotated[int, key("How long etcd keeps the lease", ge=2_000, le=600_000)] = 10_000

    in a file                 under [lease]: ttl_ms = 5000
    in the environment        TABLEWIRE_LEASE__TTL_MS=5000      lists: a,b   maps: zone=a,rack=7   (or JSON)
    as a flag                 {"lease.ttl_ms": 5000}            None means that the flag was not given

A frozen dataclass is a section too, if the metadata of its fields are arguments of `key`: code that
must not import this module defines its settings that way.

An unknown key, a value of the wrong type or out of bounds is one ConfigError, in one line, with the
path of the key and where it was given. Each value is converted by itself, so that the path in the
text is always the key's.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from tablewire.errors import ConfigError
from tablewire.runtime.uris import redact_uri

ENVIRONMENT_PREFIX = "TABLEWIRE_"
OTHER_VARIABLES = frozenset({"TABLEWIRE_ETCD_BIN", "TABLEWIRE_POSTGRES_BIN", "TABLEWIRE_CONFIG", "TABLEWIRE_ENDPOINTS"})
"""Variables of this prefix that are no configuration keys."""
FILE_BYTES_MAX = 1024 * 1024

_SHOWN_CHARACTERS_MAX = 60
_BOUNDS = (
    ("ge", ">= "), ("gt", "> "), ("le", "<= "), ("lt", "< "),
    ("min_length", "length >= "), ("max_length", "length <= "), ("pattern", "matches "),
)  # fmt: skip


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of configuration structs. __post_init__ raises ValueError if keys contradict each other."""


_S = TypeVar("_S")
_Values: TypeAlias = Iterator[tuple[str, tuple[Any, str]]]
"""Pairs of a path and (the value, where it was given)."""


def key(doc: str, **bounds: Any) -> msgspec.Meta:
    """Return the annotation of a key: its description, and msgspec's bounds (ge, le, ...)."""
    return msgspec.Meta(description=doc, **bounds)


@dataclasses.dataclass(frozen=True, slots=True)
class ConfigKey:
    """One key of a configuration, such as `lease.ttl_ms`."""

    path: str
    hint: Any
    default: Any

    @property
    def environment(self) -> str:
        """The environment variable that sets it."""
        return ENVIRONMENT_PREFIX + self.path.replace(".", "__").upper()

    @property
    def bare(self) -> Any:
        """The type without its annotation."""
        return get_args(self.hint)[0] if get_origin(self.hint) is Annotated else self.hint

    @property
    def type(self) -> str:
        """The type as text."""
        if get_origin(self.bare) is Literal:
            return "str"
        return self.bare.__name__ if isinstance(self.bare, type) and not get_args(self.bare) else str(self.bare)

    @property
    def choices(self) -> str:
        """The values of a Literal, empty for any other type."""
        return ", ".join(map(str, get_args(self.bare))) if get_origin(self.bare) is Literal else ""

    @property
    def bounds(self) -> str:
        """The choices or the bounds as text, such as ">= 1, <= 10"."""
        found = [f"{sign}{value}" for name, sign in _BOUNDS if (value := getattr(self._meta, name)) is not None]
        return self.choices or ", ".join(found)

    @property
    def doc(self) -> str:
        return self._meta.description or ""

    @property
    def _meta(self) -> msgspec.Meta:
        return next((item for item in get_args(self.hint)[1:] if isinstance(item, msgspec.Meta)), msgspec.Meta())


def load(
    kind: type[_S],
    *,
    files: Sequence[Path | str] = (),
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> _S:
    """Return the configuration; later files override earlier ones."""
    return load_with_origins(kind, files=files, environ=environ, flags=flags)[0]


def load_with_origins(
    kind: type[_S],
    *,
    files: Sequence[Path | str] = (),
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> tuple[_S, dict[str, str]]:
    """Return the configuration, and by its path the origin ("file ...") of each key that was given."""
    keys = {one.path: one for one in describe(kind)}
    given: dict[str, tuple[Any, str]] = {}
    for file in files:
        given.update(_from_table(_read_toml(file), keys, f"file {file}", ""))
    texts = dict(_from_environ(environ or {}, keys)) | dict(_from_flags(flags or {}, keys))
    given |= {path: (_parse_text(keys[path], value, origin), origin) for path, (value, origin) in texts.items()}
    values = {path: _convert(keys[path], *found, is_text=path in texts) for path, found in given.items()}
    origins = {path: origin for path, (_value, origin) in given.items()}
    return _build(kind, values, origins, ""), origins


def describe(kind: type[Any], prefix: str = "") -> list[ConfigKey]:
    """Return all keys in the order of their definition."""
    defaults = kind()
    found: list[ConfigKey] = []
    for name, hint in _fields(kind):
        path = f"{prefix}{name}"
        found += describe(hint, f"{path}.") if _is_section(hint) else [ConfigKey(path, hint, getattr(defaults, name))]
    return found


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of every key, in the order of their definition."""
    for name, _ in _fields(type(config)):
        path, value = f"{prefix}{name}", getattr(config, name)
        if _is_section(type(value)):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def read_file(file: Path | str, where: str) -> bytes:
    """Return the contents of a small file. where: the beginning of the text of a ConfigError."""
    try:
        with Path(file).open("rb") as stream:
            contents = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from error
    if len(contents) > FILE_BYTES_MAX:
        raise ConfigError(f"{where} is larger than {FILE_BYTES_MAX} bytes")
    return contents


# ---------------------------------------------------------------------------------------------------------------------
# From text to values


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and (issubclass(hint, Section) or dataclasses.is_dataclass(hint))


def _fields(kind: type[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the type hint of each key and section of a section."""
    hints = get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            yield field.name, Annotated[hints[field.name], key(**field.metadata)]
    else:
        yield from ((name, hints[name]) for name in kind.__struct_fields__)


def _build(kind: type[_S], values: Mapping[str, Any], origins: Mapping[str, str], prefix: str) -> _S:
    fields: dict[str, Any] = {}
    for name, hint in _fields(kind):
        path = f"{prefix}{name}"
        if _is_section(hint):
            fields[name] = _build(hint, values, origins, f"{path}.")
        elif path in values:
            fields[name] = values[path]
    try:
        return kind(**fields)
    except ValueError as error:
        involved = dict.fromkeys(origin for path, origin in origins.items() if path.startswith(prefix))
        raise ConfigError(f"{', '.join(involved)}: {prefix.rstrip('.') or 'configuration'}: {error}") from error


def _convert(one: ConfigKey, value: Any, origin: str, is_text: bool) -> Any:
    """Return the value as the type of the key. is_text: "5" may become a number."""
    try:
        return msgspec.convert(value, one.hint, strict=not is_text)
    except msgspec.ValidationError as error:
        reason, _, inner = str(error).partition(" - at `$")
        shown = redact_uri(str(value))
        shown = shown if len(shown) <= _SHOWN_CHARACTERS_MAX else shown[:_SHOWN_CHARACTERS_MAX] + "..."
        choices = f" (one of {one.choices})" if one.choices else ""
        raise ConfigError(f"{origin}: {one.path}{inner.rstrip('`')}: {reason}{choices}: {shown!r}") from error


def _parse_text(one: ConfigKey, value: Any, origin: str) -> Any:
    """Parse the text of a list or a map: JSON, or a,b and name=value,name=value."""
    container = get_origin(one.bare)
    if container not in (list, tuple, dict) or not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] in ("[", "{"):
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{origin}: {one.path}: not valid JSON: {error}") from error
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if container is not dict:
        return parts
    pairs = [part.partition("=") for part in parts]
    if not all(name and equals for name, equals, _ in pairs):
        raise ConfigError(f"{origin}: {one.path}: expected name=value,name=value, got {redact_uri(text)!r}")
    return {name.strip(): item.strip() for name, _, item in pairs}


def _read_toml(file: Path | str) -> dict[str, Any]:
    try:
        return tomllib.loads(read_file(file, f"file {file}").decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"file {file}: not valid TOML: {error}") from error


def _from_table(table: Mapping[str, Any], keys: Mapping[str, ConfigKey], origin: str, prefix: str) -> _Values:
    for name, value in table.items():
        path = f"{prefix}{name}"
        if path in keys:
            yield path, (value, origin)
        elif not any(known.startswith(f"{path}.") for known in keys):
            raise ConfigError(f"{origin}: unknown key {path}{_suggestion(path, keys)}")
        elif not isinstance(value, Mapping):
            raise ConfigError(f"{origin}: {path} is a section, write [{path}]")
        else:
            yield from _from_table(value, keys, origin, f"{path}.")


def _from_environ(environ: Mapping[str, str], keys: Mapping[str, ConfigKey]) -> _Values:
    paths = {one.environment: path for path, one in keys.items()}
    for name, value in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or name in OTHER_VARIABLES:
            continue
        if name not in paths:
            raise ConfigError(f"environment variable {name}: no such key{_suggestion(name, paths)}")
        yield paths[name], (value, f"environment variable {name}")


def _from_flags(flags: Mapping[str, Any], keys: Mapping[str, ConfigKey]) -> _Values:
    for path, value in flags.items():
        if path not in keys and value is not None:
            raise ConfigError(f"flag {path}: no such key{_suggestion(path, keys)}")
        if value is not None:
            yield path, (value, f"flag {path}")


def _suggestion(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f" (did you mean {close[0]}?)" if close else ""
