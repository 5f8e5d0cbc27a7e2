"""Results with one row per image. N images, D features."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from deepcluster.applied import shown
from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.core.errors import did_you_mean
from deepcluster.core.html import pandas
from deepcluster.core.text import count_of
from deepcluster.data.sources import ImageSource

# Where the pictures are; a function is called when they are shown.
Images = ImageSource | Callable[[], ImageSource | None] | None


class Rows:
    """One row per image: `len`, iteration, `rows[3]`, `rows["a/b.jpg"]`; slices, masks and indices choose rows."""

    names: list[str]
    unreadable: dict[str, str]
    images: Images

    def columns(self) -> dict[str, Any]:
        """Return lists and arrays of N rows by name: `name`, `cluster`, ...; a column that is None is left out."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        return {
            name.removesuffix("D").removesuffix("_N") if "_N" in name else name.removesuffix("s"): value
            for name, value in found.items()
            if value is not None and not isinstance(value, dict) and name != "images"
        }

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, which: int | str) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, which: slice | NDArray[Any] | list[int] | list[bool]) -> Self: ...
    def __getitem__(self, which: Any) -> Any:
        """Return the row of an image, by number or name, or several rows as a table of the same kind."""
        if isinstance(which, str):
            if which not in self.names:
                raise KeyError(f"no image is called {which}{did_you_mean(which, self.names[:10_000])}")
            which = self.names.index(which)
        if hasattr(which, "__index__") and np.ndim(which) == 0:
            return {name: _plain(column[which]) for name, column in self.columns().items()}
        chosen = np.arange(len(self))[which]
        new: dict[str, Any] = {}
        for one in fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            if isinstance(value, np.ndarray):
                new[one.name] = value[chosen]
            elif isinstance(value, list):
                new[one.name] = [value[index] for index in chosen.tolist()]
        new["unreadable"] = {name: self.unreadable[name] for name in new["names"] if name in self.unreadable}
        return replace(self, **new)  # type: ignore[type-var]

    def source(self) -> ImageSource | None:
        """Return the images, where they are known and can be read here."""
        return self.images() if callable(self.images) else self.images

    def _about(self, what: str) -> str:
        unreadable = f", {len(self.unreadable):,} unreadable" if self.unreadable else ""
        known = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        hidden = {
            "images",
            *(name for name, value in known.items() if value is None or (name == "cluster_names" and not value)),
        }
        return f"{type(self).__name__}({what}{unreadable}: {', '.join(f'.{name}' for name in known if name not in hidden)})"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


@dataclass(frozen=True, repr=False, eq=False)
class Embeddings(Rows):
    """Features, one row per image.

    Attributes:
        names: path of each image relative to the data.
        embedding_ND: float32; rows of NaN for unreadable images.
        unreadable: why images can't be read, by name.
        images: where the pictures are, for notebooks.
    """

    names: list[str]
    embedding_ND: NDArray[np.float32]
    unreadable: dict[str, str]
    images: Images = field(default=None)

    def to_pandas(self) -> Any:
        """Return a data frame (N, D) of the numbers, with the names as its index.

        Raises:
            InputError: pandas is not installed.
        """
        pd = pandas()
        return pd.DataFrame(self.embedding_ND, index=pd.Index(self.names, name="name"))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the numbers, as scikit-learn and NumPy ask for them."""
        rows_ND = self.embedding_ND
        return rows_ND.astype(rows_ND.dtype if dtype is None else dtype, copy=bool(copy))

    def __repr__(self) -> str:
        return self._about(f"{count_of(len(self.embedding_ND), 'image')} of {self.embedding_ND.shape[-1]:,} numbers")

    def _repr_html_(self) -> str:
        return shown.embeddings_html(repr(self), self.names, self.embedding_ND, self.unreadable)


@dataclass(frozen=True, repr=False, eq=False)
class Clusters(Rows):
    """Clusters, one row per image.

    Attributes:
        names: path of each image relative to the data.
        cluster_N: int64; -1 for unreadable images.
        distance_N: Euclidean distance to the centroid after whitening, or on deepcluster-v2's sphere; NaN for unreadable
            images.
        unreadable: why images can't be read, by name.
        second_N, second_distance_N: the second nearest cluster, -1 where there is none, and the distance to its centroid.
        confidence_N: 1 - distance / second distance: 0 half-way between two clusters, 1 at a centroid.
        cluster_names: names that were given to clusters, by number.
        images: where the pictures are, for notebooks.
    """

    names: list[str]
    cluster_N: NDArray[np.int64]
    distance_N: NDArray[np.float32]
    unreadable: dict[str, str]
    second_N: NDArray[np.int64] | None = None
    second_distance_N: NDArray[np.float32] | None = None
    confidence_N: NDArray[np.float32] | None = None
    cluster_names: dict[int, str] = field(default_factory=dict)
    images: Images = field(default=None)

    def columns(self) -> dict[str, Any]:
        """Return lists and arrays of N rows by name: `name`, `cluster`, ..., and `cluster_name` where names are given."""
        named = {"cluster_name": [self.cluster_names.get(one, "") for one in self.cluster_N.tolist()]}
        return super().columns() | (named if self.cluster_names else {})

    def to_pandas(self) -> Any:
        """Return a data frame with one row per image: `name`, `cluster`, `distance`, ...

        Raises:
            InputError: pandas is not installed.
        """
        return pandas().DataFrame(self.columns())

    def __repr__(self) -> str:
        used = np.unique(self.cluster_N[self.cluster_N != UNASSIGNED])
        return self._about(f"{count_of(len(self.cluster_N), 'image')} in {count_of(len(used), 'cluster')}")

    def _repr_html_(self) -> str:
        return shown.clusters_html(repr(self), self.columns(), self.unreadable, self.source)


def clusters_of(
    image_names: list[str],
    columns: Mapping[str, NDArray[Any]],
    cluster_names: Mapping[int, str],
    unreadable: dict[str, str],
    images: Images = None,
) -> Clusters:
    """Return clusters of the columns of `clustering.located`."""
    rows = {f"{name}_N": column for name, column in columns.items()}
    return Clusters(image_names, unreadable=unreadable, cluster_names=dict(cluster_names), images=images, **rows)
