"""`Run`: a run folder in the hand of a Python user, as `train` and `cluster` return it: a path with metrics and clusters."""

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from deepcluster.core.addresses import is_address
from deepcluster.core.errors import InputError
from deepcluster.core.files import read_table
from deepcluster.core.html import block, curve, line, pandas, safe, table
from deepcluster.core.paths import ResultPath
from deepcluster.core.text import count_of
from deepcluster.data.sources import ImageSource, fingerprint, open_source
from deepcluster.run.cluster_names import read_names
from deepcluster.run.folder import RunFolder
from deepcluster.run.metrics import epoch_cells
from deepcluster.run.model import Model
from deepcluster.run.settings import Settings

# Epochs that a notebook shows; `Run.metrics` has all.
SHOWN_EPOCHS = 10


class Metrics(list[dict[str, Any]]):
    """The lines of `metrics.jsonl`, one mapping per epoch."""

    def __repr__(self) -> str:
        return f"Metrics({count_of(len(self), 'epoch')}: {', '.join(self[-1]) if self else 'none yet'})"

    def to_pandas(self) -> Any:
        """Return a data frame with one row per epoch; `seconds` becomes the columns `seconds.features`, ...

        Raises:
            InputError: pandas is not installed.
        """
        return pandas().json_normalize(list(self))

    def _repr_html_(self) -> str:
        epochs = self[-1]["epoch"] if self else 0
        earlier = len(self) - SHOWN_EPOCHS
        note = [line(f"the last {SHOWN_EPOCHS} of {count_of(len(self), 'epoch')}", faint=True)] if earlier > 0 else []
        return block(*note, table(epoch_cells(one, epochs) for one in self[-SHOWN_EPOCHS:]))


class Run(ResultPath):
    """A run folder: a path (`run / "metrics.jsonl"`, `str(run)`), which also gives what is in it.

    Every function that takes a model takes it.

    Raises:
        InputError: there is no run in the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the run in `folder`."""
        super().__init__(folder)
        self._folder.read_config()

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(Path(str(self)))

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json: settings, what the recipe changed and why, data, versions, command."""
        return self._folder.read_config()

    @property
    def settings(self) -> Settings:
        """Settings of the run."""
        return Settings.from_saved(self.config["settings"])

    @property
    def metrics(self) -> Metrics:
        """One mapping per finished epoch: `epoch`, `loss`, `nmi_previous`, `seconds`, ..."""
        return Metrics(self._folder.read_metrics())

    @property
    def clusters(self) -> Any:
        """`Clusters` of the images of the run: of the finished trunk, or of the last epoch before.

        Raises:
            InputError: there are none yet.
        """
        folder = self._folder
        newest = folder.newest_clusters()
        if newest is None:
            raise InputError(
                f"{self} has no clusters{' yet: train an epoch first' if self.config['data']['images'] else ''}"
            )
        rows = read_table(newest, ["name", "cluster", "distance"])
        clusters = import_module("deepcluster.applied.rows").Clusters  # On a higher floor, as below.
        numbers = (rows.column(name).to_numpy() for name in ("cluster", "distance"))
        names = read_names(folder.path)
        return clusters(
            rows.column("name").to_pylist(), *numbers, folder.read_unreadable(), cluster_names=names, images=self.images
        )

    def images(self) -> ImageSource | None:
        """Return the images of the run; None where they are not on this machine, or others by now."""
        data = self.config["data"]
        address = data.get("address") or []
        if not address or any(map(is_address, address)):
            return None
        with suppress(InputError):
            source = open_source(address, self.settings.limit)
            return source if fingerprint(source) == data.get("fingerprint") else None
        return None

    def model(self) -> Model:
        """Return the trained model, as `deepcluster.load` does."""
        model: Model = import_module("deepcluster.interop.loading").load(self)
        return model

    def report(self, **options: Any) -> Path:
        """Make the page of the run, as `deepcluster.report` does."""
        page: Path = import_module("deepcluster.visualization.report.command").report(self, **options)
        return page

    def __repr__(self) -> str:
        try:
            return f"Run({str(self)!r}: {self._summary()})"
        except (InputError, OSError):  # It was deleted meanwhile.
            return f"Run({str(self)!r})"

    def _summary(self) -> str:
        settings, metrics = self.settings, self.metrics
        if clustered := self._folder.clustered():
            count = count_of(self.config["data"]["images"], "image" if clustered["stage"] else "embedding")
            return f"{count} of {clustered['model']} in {settings.describe_clusters()}, not trained"
        facts = [f"{settings.arch} at {settings.image_size} px"]
        if self.config["data"].get("images"):
            facts.append(settings.describe_clusters())
        if metrics:
            facts.append(f"{len(metrics)} of {count_of(settings.epochs, 'epoch')}")
        return ", ".join(facts)

    def _repr_html_(self) -> str:
        try:
            summary, metrics, about = self._summary(), self.metrics, self.config["data"].get("description", "")
        except (InputError, OSError):
            return block(line(repr(self)))
        names = {"loss": "loss", "nmi_previous": "nmi(prev)", "nmi_labels": "nmi(labels)", "knn": "k-NN", "linear": "linear"}
        curves = []
        for name, title in names.items():
            values = [float("nan") if one.get(name) is None else float(one[name]) for one in metrics]
            curves.append(curve(title, values, first=metrics[0]["epoch"] if metrics else 1))
        clustered = self._folder.clustered()
        steps = [".clusters", ".report()", *([] if clustered else [".metrics"])]
        steps += [] if clustered and not clustered["stage"] else [".model()"]  # A run of a table has no network.
        last = " ".join([f"<div>{safe('next:')}", *(f"<code>{step}</code>" for step in steps)])
        head = [line(f"run {self}", bold=True), line(summary), line(about, faint=True)]
        return block(*head, *curves, f'{last} <code>/ "file"</code></div>')
