"""A run that is resumed: its settings, with what a resume may change, its images and its state.

A finished run is trained further with more epochs. With a constant rate, it becomes the run of so many epochs. Where
`--lr-schedule cosine` has ended, the cosine begins again (`lr_restarts`): it becomes the run that was begun with that.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.files import load_tensors, read_table
from deepcluster.data.sources import ImageSource, fingerprint
from deepcluster.data.sources.folders import difference
from deepcluster.run.folder import RunFolder, differing_settings, load_checkpoint
from deepcluster.run.settings import Settings


def saved_settings(folder: RunFolder, user_options: Mapping[str, Any]) -> Settings:
    """Return the settings of the run that is resumed, with the changes that a resume may make."""
    saved = Settings.from_saved(folder.read_config()["settings"], resume=True)
    # The precision that auto chose at the start is kept, whatever this machine would choose; so are the epochs of --minutes.
    asked = {
        name: value for name, value in user_options.items() if name != "minutes" and (name, value) != ("precision", "auto")
    }
    saved = _extended(folder, saved, asked.get("epochs"))
    changed = differing_settings(asked, saved)
    if changed:
        later = any(one.startswith("--epochs ") for one in changed) and asked["epochs"] > saved.epochs
        rest = "finish it first: then more --epochs continue it" if later else "start another run with --out"
        raise InputError(f"a resumed run keeps its settings: {'; '.join(changed)}. Leave them out, or {rest}")
    return Settings.from_dict({**saved.as_dict(), **asked})


def _extended(folder: RunFolder, saved: Settings, epochs: Any) -> Settings:
    """Return the settings of a run whose schedule has ended, and begins again for more epochs; else those it has."""
    if saved.lr_schedule == "constant" or not isinstance(epochs, int) or epochs <= saved.epochs or not folder.last.is_file():
        return saved
    state = load_tensors(folder.last, mapped=True)
    if "final" not in state or state["epoch"] <= saved.epochs:
        return saved
    return replace(saved, epochs=epochs, lr_restarts=(*saved.lr_restarts, saved.epochs))


def check_same_data(folder: RunFolder, source: ImageSource) -> None:
    """Refuse to resume with other images."""
    saved = folder.read_config()["data"]
    if saved["fingerprint"] == fingerprint(source):
        return
    change = ", or their names have changed"
    tables = sorted(folder.assignments.glob("*.parquet"))
    if tables:  # They have the names of the run's images.
        before = sorted(read_table(tables[0], ["name"]).column("name").to_pylist())
        now = sorted(source.name(index) for index in range(len(source)))
        change = "; " + (difference(before, now) or "they are the same in another order")
    raise InputError(
        f"the images are not those of this run: it has {saved['images']:,}, here are {len(source):,}{change}. "
        "Restore them, or start another run with --out"
    )


def saved_state(folder: RunFolder, settings: Settings, n_images: int) -> dict[str, Any]:
    """Return the last checkpoint with the rows of this rank. It must be of this run and not beyond its epochs."""
    state = load_checkpoint(folder.last)
    state["rows"] = folder.read_rows(state, folder.ranks.part(n_images))
    others = differing_settings(_of_checkpoint(state, settings), settings)
    if others:
        raise InputError(f"{folder.last} is the checkpoint of another run: {'; '.join(others)}")
    epoch, begun = state["epoch"], state["labelled"]
    if epoch + begun > settings.epochs + 1:
        raise InputError(
            f"--epochs {settings.epochs} is fewer than this run has begun; use --epochs {epoch - 1 + begun} or more"
        )
    return state


def _of_checkpoint(state: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the settings of a checkpoint; if the schedule has begun again since, with the epochs of the run."""
    saved = Settings.from_saved(state["settings"])
    ends, now = ((*one.lr_restarts, one.epochs) for one in (saved, settings))
    values = saved.as_dict()
    if ends == now[: len(ends)]:
        values.update(epochs=settings.epochs, lr_restarts=list(settings.lr_restarts))
    return values
