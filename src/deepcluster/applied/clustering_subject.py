"""What `cluster` clusters: images seen by a model, or a table of embeddings. N rows, D features."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from deepcluster.applied.clustering_options import ClusterOptions
from deepcluster.applied.clustering_rows import FeatureRows
from deepcluster.applied.opening import Data
from deepcluster.core.addresses import whole_address
from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.files import check_file, user_path
from deepcluster.core.work import Work
from deepcluster.data.decode import decode
from deepcluster.data.sources import ImageSource, fingerprint, open_source
from deepcluster.data.sources.given import addresses_of, given_data
from deepcluster.data.sources.scan import TABLES
from deepcluster.interop.loading import load
from deepcluster.run.embedding_tables import NO_NUMBERS, EmbeddingTable, is_table, open_table, table_of_run
from deepcluster.run.features import Pooled
from deepcluster.run.folder import RunFolder
from deepcluster.run.kept_features import kept_rows
from deepcluster.run.model import Model
from deepcluster.run.settings import Settings

# Settings that a run takes over from the model: how its network sees images.
_OF_TRUNK = tuple(one.name for one in fields(Settings) if one.metadata["section"] == "trunk" and one.name != "init")
BATCH_SIZE = 256
NOT_FINITE = "its features are not finite numbers"


class Subject(ABC):
    """Rows to cluster, with what a run folder keeps of them.

    Attributes:
        device: where they are clustered.
        address: where the images are; empty where that is not known.
        own_settings: settings of the run that the subject determines.
        made_of: what config.json notes of model and stage.
    """

    device: torch.device
    address: Sequence[str]
    own_settings: Mapping[str, Any]
    made_of: Mapping[str, Any]

    @abstractmethod
    def __len__(self) -> int:
        """Return N."""

    @abstractmethod
    def rows(self) -> FeatureRows:
        """Return the features; those of images are extracted now, by all ranks together."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the name of each row."""

    @abstractmethod
    def reasons(self, missing: Sequence[int]) -> dict[int, str]:
        """Return why some rows hold no numbers, by index."""

    @abstractmethod
    def describe(self) -> str:
        """Return what is clustered, in words."""

    @abstractmethod
    def data_facts(self) -> dict[str, Any]:
        """Return what config.json notes of the images."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside settings and clusters."""

    def settings(self, options: ClusterOptions, *, clusters: int, pca: int) -> Settings:
        """Return the settings of the run, checked."""
        own = {name: value for name, value in options.as_dict().items() if name not in ("pca", "precision")}
        return Settings.from_dict({**own, **self.own_settings, "clusters": clusters, "pca": pca})

    def kept_settings(self, settings: Settings) -> dict[str, Any]:
        """Return those of the settings that apply: the others are of training."""
        names = {one.name for one in fields(ClusterOptions)} | {"clusters", *self.own_settings}
        return {name: value for name, value in settings.as_dict().items() if name in names}


@dataclass(frozen=True)
class ImagesSubject(Subject):
    """Images seen by a model."""

    model: Model
    source: ImageSource
    address: Sequence[str]
    stage: str
    batch_size: int
    limit: int | None

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.model.machine.clustering_device

    @property
    def own_settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        values = self.model.settings.as_dict()
        own = {name: values[name] for name in _OF_TRUNK}
        return {**own, "cluster_stage": self.stage, "precision": self.model.machine.precision, "limit": self.limit}

    @property
    def made_of(self) -> Mapping[str, Any]:  # type: ignore[override]
        name = self.model.name
        return {"model": whole_address(name) if user_path(name).exists() else name, "stage": self.stage}

    def __len__(self) -> int:
        return len(self.source)

    def rows(self) -> FeatureRows:
        wanted = Pooled(self.stage)
        return FeatureRows.of(kept_rows(self.model, self.source, [wanted], batch_size=self.batch_size)[wanted])

    def names(self) -> list[str]:
        return [self.source.name(index) for index in range(len(self))]

    def reasons(self, missing: Sequence[int]) -> dict[int, str]:
        found = dict.fromkeys(missing, NOT_FINITE)
        for index in missing:  # Kept features do not say why: the images are read once more.
            try:
                decode(self.source.read(index))
            except UnreadableImage as fault:
                found[index] = str(fault)
        return found

    def describe(self) -> str:
        settings = self.model.settings
        return f"{self.model.name}: {settings.arch} at {settings.image_size} px, stage {self.stage}"

    def data_facts(self) -> dict[str, Any]:
        return _facts_of(self.source, self.address)

    def state(self) -> dict[str, Any]:
        trunk = {name: value.cpu() for name, value in self.model.trunk.state_dict().items()}
        return {"trunk": trunk, **({} if self.model.trained else {"imported": True})}


@dataclass(frozen=True)
class TableSubject(Subject):
    """A table of embeddings, and the images that it is of, where these are known."""

    table: EmbeddingTable
    device: torch.device
    source: ImageSource | None
    address: Sequence[str]
    limit: int | None

    @property
    def own_settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {}

    @property
    def made_of(self) -> Mapping[str, Any]:  # type: ignore[override]
        limited = {} if self.limit is None else {"limit": self.limit}
        return {"model": whole_address(self.table.path), "stage": "", "table": self.table.facts(), **limited}

    def __len__(self) -> int:
        return len(self.table)

    def rows(self) -> FeatureRows:
        return FeatureRows(len(self.table), self.table.dim, self.table.read)

    def names(self) -> list[str]:
        return self.table.names()

    def reasons(self, missing: Sequence[int]) -> dict[int, str]:
        return dict.fromkeys(missing, NO_NUMBERS)

    def describe(self) -> str:
        return self.table.describe()

    def data_facts(self) -> dict[str, Any]:
        if self.source is not None:
            return {**_facts_of(self.source, self.address), "images": len(self.table)}
        return {"description": self.table.describe(), "images": len(self.table), "address": []}

    def state(self) -> dict[str, Any]:
        return {"trunk": {}, "table": str(self.table.path)}


def open_subject(
    model: str | Path | Model,
    data: Data | None,
    *,
    stage: str | None,
    precision: str,
    device: str,
    batch_size: int,
    workers: int | None,
    limit: int | None,
    work: Work,
) -> Subject:
    """Return what is to be clustered; no image is read yet.

    Args:
        data: None: the images of the run that `model` is.
        precision: "auto" is that of the model's run.

    Raises:
        InputError: model, stage or images can't be used.
    """
    run = None if isinstance(model, Model) else RunFolder(user_path(model))
    facts = run.clustered() if run is not None and run.is_run() else {}
    remembered: list[str] = []
    asked = data
    of_table = is_table(model) or bool(facts and not facts["stage"])
    if run is not None and run.is_run():
        config = run.read_config()
        remembered = config["data"].get("address") or []
        limit = limit if limit is not None or data is not None else facts.get("limit", config["settings"].get("limit"))
    data = (remembered or None) if data is None else given_data(data)
    source = None if data is None else open_source(data, None if of_table else limit, on_trouble=work.reporter.warn)
    address = [] if data is None else addresses_of(data)
    if of_table:
        for name, value in {"--stage": stage, "--precision": None if precision == "auto" else precision}.items():
            if value is not None:
                raise InputError(f"{name} {value} is of a network, and {model} is a table of embeddings: leave it out")
        if batch_size != BATCH_SIZE or workers is not None:
            work.reporter.warn(
                "a table of embeddings is read without batches and workers: --batch-size and --workers do nothing"
            )
        table = table_of_run(run.path, facts, limit) if facts and run else open_table(model, limit)  # type: ignore[arg-type]
        return TableSubject(table, Machine.choose(device, "fp32").clustering_device, source, address, limit)
    if source is None and run is not None and run.path.is_dir() and not run.is_run():
        raise InputError(f"{model} is no run and no table of embeddings: name the model first, then the images")
    if source is None and run is not None and run.path.suffix.lower() in TABLES:
        check_file(run.path)
        raise InputError(
            f"{model} holds no embeddings: cluster takes those that embed writes as .parquet or .npy, or a model and images"
        )
    if source is None:
        wants = f"{model} does not remember any" if asked is None and run is not None and run.is_run() else "name them"
        raise InputError(f"cluster MODEL DATA needs the images to cluster: {wants}")
    model = model if isinstance(model, Model) else load(model)
    if model.remark:
        work.reporter.say(f"{model.name}: {model.remark}")
    stage = stage or model.trunk.embed_stage
    model.trunk.check_stage(stage)
    model = model.on(device, precision=None if precision == "auto" else precision, workers=workers, work=work)
    return ImagesSubject(model, source, address, stage, batch_size, limit)


def _facts_of(source: ImageSource, address: Sequence[str]) -> dict[str, Any]:
    return {
        "description": source.describe(),
        "images": len(source),
        "classes": source.class_names,
        "fingerprint": fingerprint(source),
        "address": list(address),
    }
