"""`report`: one self-contained page of a run, made again while it is being trained, or of a table of embeddings."""

import time
import webbrowser
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.files import output_path, user_path
from deepcluster.core.progress import Reporter
from deepcluster.core.retry import end_waits
from deepcluster.core.text import duration, size
from deepcluster.core.work import Interruption, Work
from deepcluster.data.loader import usual_workers
from deepcluster.data.sources import open_source
from deepcluster.run.cluster_names import read_names
from deepcluster.run.folder import RunFolder
from deepcluster.visualization.options import ReportOptions
from deepcluster.visualization.report.build import Context, build_report
from deepcluster.visualization.report.collection import RunFacts
from deepcluster.visualization.report.inline import Page
from deepcluster.visualization.report.page import needs_report_extra
from deepcluster.visualization.report.run import Data, read_run
from deepcluster.visualization.report.table import read_table

# How often a watched run is checked for a new epoch, and a watched page reloads itself.
WATCH_SECONDS, REFRESH_SECONDS = 2.0, 15


def report(
    path: str | Path,
    *,
    data: Data | None = None,
    out: str | Path | None = None,
    show: bool = False,
    watch: bool = False,
    new: Data | None = None,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Page:
    """Make one self-contained HTML page, as `deepcluster report` does.

    Args:
        path: a run folder, or a table of embeddings or of clusters: Parquet (a file or a folder of them), text or NumPy.
        data: where the images are; of a run by default where they were when it was started. Without images the page shows
            only names.
        out: the page; RUN/report.html, or TABLE.report.html beside a table, by default.
        show: open it in the browser.
        watch: make it again after each epoch until the run is finished; the page reloads itself.
        new: images that are not of the run: the page shows each beside the cluster that it falls into.
        device, workers: device, and number of processes that prepare images.
        reporter: prints lines and progress.
        options: `deepcluster.visualization.options.ReportOptions`.

    Returns:
        the path of the page, which a notebook shows.

    Raises:
        InputError: there is nothing to show, or an option can't be used.
        Interrupted: Ctrl-C or SIGTERM; the previous page stays.
    """
    started = time.monotonic()
    needs_report_extra()
    path, checked = user_path(path), ReportOptions.from_dict(options)
    workers = usual_workers() if workers is None else workers
    is_run = RunFolder(path).is_run()
    page = _page(path, out, is_run=is_run)
    if watch and not is_run:
        raise InputError(f"--watch follows a run during training, and {path} is no run folder")
    if new is not None and not is_run:
        raise InputError(f"--new needs a model for new images: give a run folder, and {path} is a table")
    work = Work(reporter or Reporter(), Interruption(on_request=end_waits, advice="the last page that was made is whole"))
    # Nothing is saved before the page, which is written beside the old one: a stop needs no safe moment.
    with work.interruption.listening(), work.interruption.at_once():
        if not is_run:
            _write(page, _of_table(path, checked, data, workers, work), started, show=show)
            return Page(page)
        folder = RunFolder(path)

        def read() -> Context:
            return read_run(folder, checked, data=data, new=new, device=device, workers=workers, work=work)

        if watch:
            _watch(page, folder, read, work, show=show)
        else:
            _write(page, read(), started, show=show)
    return Page(page)


def _page(path: Path, out: str | Path | None, *, is_run: bool) -> Path:
    """Return the path of the page that is written; nothing is written yet."""
    if not path.exists():
        raise InputError(f"{path} does not exist: give a run folder, or a table of embeddings (.parquet)")
    if path.is_dir() and not is_run and not any(path.glob("*.parquet")):
        raise InputError(f"{path} is neither a run folder (it has no config.json) nor a folder of Parquet files")
    usual = path / "report.html" if is_run else path.with_suffix(".report.html")
    return output_path(usual if out is None else out, "--out", endings=(".html", ".htm"))


def _of_table(path: Path, options: ReportOptions, data: Data | None, workers: int, work: Work) -> Context:
    """Return what the page of a table shows; names of its clusters may be in `names.csv` beside it."""
    images = open_source(data, on_trouble=work.reporter.warn) if data is not None else None
    table = read_table(path, options, images=images, work=work)
    beside = path.absolute().parent
    try:
        names = {**table.cluster_names, **read_names(beside)}
    except InputError as error:  # It may be a table of something else.
        work.reporter.warn(f"names of clusters are left out: {error}")
        names = dict(table.cluster_names)
    table = replace(table, title=options.title or table.title, cluster_names=names, names_folder=str(path.parent))
    n_unreadable, sizes_K = len(table.unreadable), table.sizes_K()
    facts = RunFacts(table.title, str(path), n_images=len(table), n_unreadable=n_unreadable, sizes_K=sizes_K)
    return Context(table, facts, options=options, workers=workers, work=work)


def _write(page: Path, context: Context, started: float, *, show: bool, refresh_seconds: int = 0) -> None:
    """Write the page, and print its size and the seconds since `started`, when its work began."""
    n_bytes = build_report(page, context, refresh_seconds=refresh_seconds)
    context.work.reporter.say(f"{page}: {size(n_bytes)}, made in {duration(time.monotonic() - started)}")
    if show:
        webbrowser.open(page.absolute().as_uri())


def _watch(page: Path, folder: RunFolder, read: Callable[[], Context], work: Work, *, show: bool) -> None:
    """Write the page again after each epoch until the run is finished."""

    def stamps() -> list[tuple[str, int]]:
        """Return what changes when an epoch is done, or the run is finished."""
        files = [*folder.cluster_tables().values(), folder.last]
        return [(path.name, path.stat().st_mtime_ns) for path in files if path.is_file()]

    work.reporter.say("watching: the page is made again after each epoch, until Ctrl-C or the end of the run")
    shown: list[tuple[str, int]] = []
    while True:
        while not folder.cluster_tables() or stamps() == shown:
            work.check()
            time.sleep(WATCH_SECONDS)
        is_first, shown = not shown, stamps()
        started, context = time.monotonic(), read()
        _write(
            page, context, started, show=show and is_first, refresh_seconds=0 if context.run.finished else REFRESH_SECONDS
        )
        if context.run.finished:
            return
