"""`report`: one self-contained page of a run, made anew while it goes on, or of any table of embeddings."""

import json
import os
import time
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.interruption import Interruption
from deepcluster.core.progress import Reporter
from deepcluster.core.text import duration, size
from deepcluster.data.loader import usual_workers
from deepcluster.data.sources import open_source
from deepcluster.data.storage.retries import end_waits
from deepcluster.run.folder import RunFolder
from deepcluster.run.metrics import health
from deepcluster.visualization.folder import PICTURES
from deepcluster.visualization.options import ReportOptions
from deepcluster.visualization.report.build import build_report
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.glance import RunFacts
from deepcluster.visualization.report.method.pipeline import Pipeline
from deepcluster.visualization.report.page import needs_report_extra
from deepcluster.visualization.report.run_reader import Record, RunReader
from deepcluster.visualization.report.table.read import read_table

Data = str | Path | Sequence[str | Path]

# How often a watched run is looked at, and a watched page reads itself again.
LOOK_SECONDS, REFRESH_SECONDS = 2.0, 15


def report(
    path: str | Path,
    *,
    data: Data | None = None,
    out: str | Path | None = None,
    show: bool = False,
    watch: bool = False,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Path:
    """Make one self-contained HTML page, as `deepcluster report` does.

    Args:
        path: a run folder, or a table of embeddings or of clusters (.parquet, .npz, .npy, .csv).
        data: where the images are; of a run by default where they were when it was begun. Without images: names alone.
        out: the page; RUN/report.html, or TABLE.report.html beside a table, by default.
        show: open it in the browser.
        watch: make it anew after each epoch until the run is finished; the page reads itself again.
        device, workers: how the work is done.
        reporter: told how far the work is.
        options: `deepcluster.visualization.options.ReportOptions`.

    Returns:
        the page.

    Raises:
        InputError: there is nothing to show, or an option can't be used.
        Interrupted: Ctrl-C or SIGTERM; a page that was there stays.
    """
    needs_report_extra()
    path, checked, reporter = Path(path), ReportOptions.from_dict(options), reporter or Reporter()
    workers = usual_workers() if workers is None else workers
    is_run = RunFolder(path).is_run()
    page = _page(path, out, is_run=is_run)
    interruption = Interruption(on_request=end_waits, advice="the last page that was made is whole")
    with interruption.listening():
        maker = _Maker(page, checked, workers, reporter, interruption, show)
        if is_run:
            reader = RunReader(RunFolder(path), data, checked.map_images, device, workers, reporter, interruption)
            maker.of_run(reader, watch=watch)
        elif watch:
            raise InputError(f"--watch follows a run while it goes on, and {path} is no run folder")
        else:
            maker.of_table(path, data)
    return page


def _page(path: Path, out: str | Path | None, *, is_run: bool) -> Path:
    """The file that is written; nothing is made yet."""
    if not path.exists():
        raise InputError(f"{path} does not exist: give a run folder, or a table of embeddings (.parquet, .npz, .npy)")
    if path.is_dir() and not is_run and not any(path.glob("*.parquet")):
        raise InputError(f"{path} is neither a run folder (it has no config.json) nor a folder of Parquet files")
    page = Path(out) if out is not None else path / "report.html" if is_run else path.with_suffix(".report.html")
    if page.suffix not in (".html", ".htm"):
        raise InputError(f"--out {page}: the file should end in .html")
    folder = page.absolute().parent
    if page.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"--out {page}: the folder {folder} does not exist or can't be written to")
    return page


@dataclass(frozen=True)
class _Maker:
    """Makes a page, and tells where it is."""

    page: Path
    options: ReportOptions
    workers: int
    reporter: Reporter
    interruption: Interruption
    show: bool

    def of_run(self, reader: RunReader, *, watch: bool) -> None:
        """The page of a run; watched, anew after each epoch until the run is finished."""
        if watch:
            self._wait_for(reader, lambda: bool(reader.tables()))
        first = True
        while True:
            seen = _stamps(reader)
            record = reader.read()
            going_on = watch and not record.finished
            self._make(record.collection, _about(reader.folder, record), record.pipeline, reader.folder, going_on, first)
            if not going_on:
                return
            if first:
                self.reporter.say("watching: the page is made anew after each epoch, until Ctrl-C or the end of the run")
            first = False
            self._wait_for(reader, lambda seen=seen: _stamps(reader) != seen)  # type: ignore[misc]

    def of_table(self, path: Path, data: Data | None) -> None:
        """The page of a table."""
        images = open_source(data, on_trouble=self.reporter.warn) if data is not None else None
        collection = read_table(
            path,
            clusters=self.options.clusters,
            embedding_column=self.options.embedding_column,
            cluster_column=self.options.cluster_column,
            label_column=self.options.label_column,
            name_column=self.options.name_column,
            images=images,
            seed=self.options.seed,
            reporter=self.reporter,
            check=self.interruption.check,
        )
        about = RunFacts(
            title=collection.title,
            config={},
            metrics=[],
            evaluations=[],
            folder=str(path),
            finished=True,
            made_at=datetime.now(),
            n_images=len(collection),
            n_unreadable=len(collection.unreadable),
            sizes_K=collection.sizes_K(),
        )
        self._make(collection, about, None, None, going_on=False, first=True)

    def _make(
        self,
        collection: Collection,
        about: RunFacts,
        pipeline: Pipeline | None,
        folder: RunFolder | None,
        going_on: bool,
        first: bool,
    ) -> None:
        started = time.monotonic()
        n_bytes = build_report(
            self.page,
            collection,
            about,
            self.options,
            pipeline=pipeline,
            pictures=folder.path / PICTURES if folder is not None else None,
            workers=self.workers,
            reporter=self.reporter,
            interruption=self.interruption,
            refresh_seconds=REFRESH_SECONDS if going_on else 0,
        )
        if n_bytes > self.options.max_mb * 1e6:
            self.reporter.warn(f"the page takes {size(n_bytes)}, more than --max-mb {self.options.max_mb:g}")
        self.reporter.say(f"{self.page}: {size(n_bytes)}, made in {duration(time.monotonic() - started)}")
        if self.show and first:
            webbrowser.open(self.page.absolute().as_uri())

    def _wait_for(self, reader: RunReader, ready: Callable[[], bool]) -> None:
        while not ready():
            self.interruption.check()
            time.sleep(LOOK_SECONDS)


def _stamps(reader: RunReader) -> list[tuple[str, int]]:
    """What changes when an epoch is done, or the run is finished."""
    return [
        (path.name, path.stat().st_mtime_ns) for path in (*reader.tables().values(), reader.folder.last) if path.is_file()
    ]


def _about(folder: RunFolder, record: Record) -> RunFacts:
    """The run, in what its section takes."""
    moments = [datetime.fromtimestamp(path.stat().st_mtime) for path in (folder.config, folder.metrics) if path.is_file()]
    return RunFacts(
        title=record.collection.title,
        config=record.config,
        metrics=record.metrics,
        evaluations=[content for path in sorted(folder.path.glob("evaluation/*.json")) if (content := _json(path))],
        folder=str(folder.path),
        finished=record.finished,
        made_at=datetime.now(),
        started=moments[0],
        ended=moments[-1] if record.metrics else None,
        n_images=len(record.collection),
        n_unreadable=len(record.collection.unreadable),
        sizes_K=record.collection.sizes_K(),
        complaint=health(record.metrics) if record.metrics else None,
    )


def _json(path: Path) -> dict[str, Any] | None:
    """The content of a file of results; None where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
