"""Options from a YAML file and the command line: read, completed, checked, written."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml

from lct_fast.cli.option_checks import check
from lct_fast.cli.option_defaults import fill
from lct_fast.cli.options import Config, ConfigError


def resolve(given: dict[str, Any]) -> Config:
    """A checked Config from the options given; the data set's defaults fill the rest.

    Raises:
        ConfigError: unknown key, wrong type, value out of range; one line.
    """
    known = {f.name: f for f in dataclasses.fields(Config)}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"unknown config key {key!r}: {hint}")
    values = {k: _typed(known[k], v) for k, v in given.items() if v is not None}
    config = Config(**values)
    fill(config)
    check(config, known)
    return config


def _typed(f: dataclasses.Field[Any], value: Any) -> Any:
    kinds = str(f.type)
    if "list" in kinds:
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(v, str) for v in items):
            raise ConfigError(f"{f.name}: expected a list of names, got {value!r}")
        return items
    wanted = next(t for t in (bool, int, float, str) if t.__name__ in kinds)
    if wanted is float and isinstance(value, str):
        # YAML reads 1e-4, without a dot, as a string.
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{f.name}: expected float, got {value!r}") from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{f.name}: expected {wanted.__name__}, got {value!r}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(k, str) for k in loaded):
        raise ConfigError(f"config {path}: expected option: value on each line, got {loaded!r:.60}")
    return loaded


def write_yaml(config: Config, path: Path) -> None:
    """Writes every option, resolved."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option of Config as a flag; flags not given stay None."""
    for f in dataclasses.fields(Config):
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"]
        if f.default is not None and f.default is not False:
            text += f" (default {f.default})"
        kinds = str(f.type)
        if "bool" in kinds:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif "list" in kinds:
            parser.add_argument(flag, nargs="+", default=None, help=text)
        else:
            kind: Any = int if "int" in kinds else float if "float" in kinds else str
            metavar = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else None
            parser.add_argument(flag, type=kind, default=None, help=text, metavar=metavar)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options given on the command line, over those of ``--config``."""
    flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)}
    from_file = read_yaml(args.config) if args.config else {}
    return from_file | {k: v for k, v in flags.items() if v is not None}


__all__ = ["Config", "ConfigError", "add_arguments", "given", "read_yaml", "resolve", "write_yaml"]
