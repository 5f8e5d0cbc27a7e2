"""`visualize top-images`: the images of a data set that excite the filters of a trunk most."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepcluster.core.progress import Reporter
from deepcluster.data.sources import open_source
from deepcluster.run.model import Model, load, loaded, new_interruption
from deepcluster.visualization.folder import pictures_folder
from deepcluster.visualization.options import TopImagesOptions
from deepcluster.visualization.top_images.saving import check_copies_folder, save_top_images
from deepcluster.visualization.top_images.search import find_top_images


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
    """Find the images that excite each filter most, as `deepcluster visualize top-images` does.

    Args:
        model: a run folder, a checkpoint, `untrained:ARCH`, `untrained:RUN`, or the result of `load`.
        data: the images to search.
        out: folder of the pictures, with a folder per stage; RUN/visualization/top-images by default.
        copies: a new or empty folder for copies of the images, with a folder per filter.
        device: device to compute on.
        workers: threads that prepare images.
        reporter: shows progress; quiet by default.
        options: fields of `deepcluster.visualization.options.TopImagesOptions`.

    Returns:
        the `top-images.json` of each stage, which names its pictures.

    Raises:
        InputError: model, data, options or folder can't be used.
        Interrupted: Ctrl-C or SIGTERM; the images are searched again by the next call.
    """
    checked, model = TopImagesOptions.from_dict(options), model if isinstance(model, Model) else load(model)
    folder = pictures_folder(model, "top-images", out)
    reporter = reporter or Reporter(quiet=True)
    if copies is not None:
        check_copies_folder(Path(copies))
    interruption = new_interruption("nothing is kept of the search: run the same command again")
    with interruption.listening():
        source = open_source(data, on_trouble=reporter.warn)
        model = loaded(model, device=device, workers=workers, reporter=reporter, interruption=interruption)
        top = find_top_images(model, source, checked)
        name = ", ".join(map(str, [data] if isinstance(data, str | Path) else data))
        return save_top_images(top, source, folder, model, data=name, copies=Path(copies) if copies else None)
