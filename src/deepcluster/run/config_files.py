"""`train --config`: the settings of a run, or of a file that the user wrote."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.files import user_path
from deepcluster.core.options import coerce
from deepcluster.run.folder import RunFolder
from deepcluster.run.settings import Settings


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return settings by name, those of a run with everything that its recipe chose.

    Args:
        path: a run folder, its config.json, or a file `.json` or `.toml` of names and values, at the top or in `settings`.
            `batch-size` is `batch_size`.

    Raises:
        InputError: the file can't be read, or a name or value in it is no setting.
    """
    path = user_path(path)
    if path.is_dir():
        return _of_run(RunFolder(path).read_config())
    content = _read(path)
    found = content.get("settings", content)
    if not isinstance(found, Mapping):
        raise InputError(f"{path}: settings should be names and values, not {found!r}")
    if found is not content and "changed_by_recipe" in content:  # What `train` writes.
        return _of_run(content)
    if stray := sorted(set(content) - {"settings"}) if found is not content else []:
        raise InputError(f"{path} has settings, and beside them {', '.join(stray)}: put all into settings")
    values: dict[str, Any] = {}
    for written, value in found.items():
        name = written.replace("-", "_")
        try:
            values[name] = coerce(Settings, name, value)
        except InputError as fault:
            raise InputError(f"{path}: {fault}") from None
    return values


def with_config(config: str | Path | None, user_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `config`, where there is one, and those of the user, which win.

    Raises:
        InputError: the file can't be used, or the user names a recipe where the file leaves it nothing to choose.
    """
    if config is None:
        return dict(user_options)
    values = read_settings(config)
    recipe = user_options.get("recipe", values.get("recipe"))
    if recipe != values.get("recipe") and len(values) == len(Settings().as_dict()):
        raise InputError(f"--config {config} has all settings, and leaves --recipe {recipe} none to choose: leave one out")
    return {**values, **user_options}


def _of_run(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a run's config.json, whatever version wrote it."""
    settings = Settings.from_saved(content["settings"]).as_dict()
    return {name: value for name, value in settings.items() if name != "limit" or value is not None}


def _read(path: Path) -> dict[str, Any]:
    readers = {".json": json.loads, ".toml": tomllib.loads}
    if path.suffix.lower() not in readers:
        raise InputError(f"--config {path} should be a run folder, or a file .json or .toml of settings")
    try:
        content = readers[path.suffix.lower()](path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise InputError(f"--config {path} can't be read: {(fault.strerror or str(fault)).lower()}") from None
    except ValueError as fault:  # What both readers raise.
        raise InputError(f"--config {path} is damaged: {fault}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path} should hold names and values, such as epochs and 20")
    return content
