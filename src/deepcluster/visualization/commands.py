"""`visualize filters` and `visualize top-images`: what the filters of a trunk have learned to see."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.data.sources import open_source
from deepcluster.run.folder import RunFolder
from deepcluster.run.model import Model, load, loaded, new_interruption
from deepcluster.visualization.filters.show import show_filters
from deepcluster.visualization.options import FilterOptions, TopImagesOptions
from deepcluster.visualization.top_images.saving import check_copies_folder, save_top_images
from deepcluster.visualization.top_images.search import find_top_images

# Where the pictures of a run are, in its folder.
PICTURES = "visualization"


def filters(
    model: str | Path | Model,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> list[Path]:
    """Pictures that excite each filter most, as `deepcluster visualize filters` finds them.

    Args:
        model: a run folder, a checkpoint, `untrained:ARCH`, `untrained:RUN`, or what `load` gave.
        out: folder of the pictures, with a folder a stage; RUN/visualization/filters by default.
        device, workers: how the work is done.
        reporter: told how far the work is.
        options: `deepcluster.visualization.options.FilterOptions`.

    Returns:
        the grid (PNG) of each stage.

    Raises:
        InputError: model, options or folder can't be used; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on where this one stopped.
    """
    checked, model = FilterOptions.from_dict(options), model if isinstance(model, Model) else load(model)
    folder = _folder(model, "filters", out)
    interruption = new_interruption()
    with interruption.listening():
        model = loaded(model, device=device, workers=workers, reporter=reporter, interruption=interruption)
        return [found.grid for found in show_filters(model, checked, folder)]


def top_images(
    model: str | Path | Model,
    data: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    copies: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> list[Path]:
    """The images that excite each filter most, as `deepcluster visualize top-images` finds them.

    Args:
        model: a run folder, a checkpoint, `untrained:ARCH`, `untrained:RUN`, or what `load` gave.
        data: the images that are looked through.
        out: folder of the pictures, with a folder a stage; RUN/visualization/top-images by default.
        copies: a new or empty folder for copies of the images, a folder a filter.
        device, workers: how the work is done.
        reporter: told how far the work is.
        options: `deepcluster.visualization.options.TopImagesOptions`.

    Returns:
        the `top-images.json` of each stage, which names its pictures.

    Raises:
        InputError: model, data, options or folder can't be used.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on where this one stopped.
    """
    checked, model = TopImagesOptions.from_dict(options), model if isinstance(model, Model) else load(model)
    folder = _folder(model, "top-images", out)
    reporter = reporter or Reporter(quiet=True)
    if copies is not None:
        check_copies_folder(Path(copies))
    interruption = new_interruption()
    with interruption.listening():
        source = open_source(data, on_trouble=reporter.warn)
        model = loaded(model, device=device, workers=workers, reporter=reporter, interruption=interruption)
        found = find_top_images(model, source, checked)
        named = ", ".join(map(str, [data] if isinstance(data, str | Path) else data))
        return save_top_images(found, source, folder, model, data=named, copies=Path(copies) if copies else None)


def _folder(model: Model, kind: str, out: str | Path | None) -> Path:
    """Where the pictures go; nothing is made yet."""
    if out is not None:
        return Path(out)
    run = Path(model.name)
    if not RunFolder(run).is_run():
        raise InputError(f"{run} is no run folder to write the pictures into: name a folder with --out")
    return run / PICTURES / kind
