"""A folder per cluster with links to its images, or copies, which more images can be added to later.

What is in it is recorded in a hidden table: nothing else is ever deleted, and no image is put there twice. A new folder is
complete when it has its name; each link or copy is complete when it has its own. N images, K clusters.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.core.device import free_disk_bytes
from deepcluster.core.errors import DeepClusterError, InputError, UnreadableImage
from deepcluster.core.files import MARK, file_stamp, mark_as_ours, output_path, user_path
from deepcluster.core.text import are, count_of, size
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource
from deepcluster.run.folder_entries import Entries
from deepcluster.run.folder_record import COPYING, PLAN, RECORD, Record, check_deletable, is_within
from deepcluster.run.lock import Lock
from deepcluster.run.model import data_key
from deepcluster.run.portable_names import entry_name, folder_name, looks
from deepcluster.run.resumable import digest_of

# Images between two looks at the clock, and at requests to stop.
STEP = 16


@dataclass(frozen=True)
class Folders:
    """What `assign --folders` makes.

    Args:
        given: the folder, as the user names it.
        kind: `link` (relative where possible), `absolute` (link), `hardlink` or `copy`.
        ranked: names begin with the rank by the distance to the centroid.
        add: put images beside those that are there.
        overwrite: replace what is there.
    """

    given: Path
    kind: str = "link"
    ranked: bool = False
    add: bool = False
    overwrite: bool = False

    def as_there(self) -> "Folders":
        """Return what is to be made, of the kind that the folder has where images are added without naming one."""
        facts = Record.facts_of(self.place) if self.add and self.kind == "link" else {}
        return replace(self, kind=facts.get("kind", self.kind))

    @property
    def place(self) -> Path:
        """The folder itself, where a link to it was given."""
        return Path(os.path.realpath(user_path(self.given)))

    @property
    def unfinished(self) -> Path:
        """The folder before it has its name."""
        return self.place.with_name(f"{self.place.name}.part")


def check_folders(wanted: Folders, source: ImageSource, clusters: str, work: Work) -> None:
    """Find out before long work what is in the way of folders, or of links and copies in them.

    Args:
        clusters: changes with the clusters; images are only added to folders of the same.

    Raises:
        InputError: something is; nothing was written or deleted.
    """
    place, what = wanted.place, f"--folders {wanted.given}"
    output_path(place, "--folders", is_folder=True)
    there = [path for path in place.iterdir() if path.name != MARK] if place.is_dir() else []
    if not (place / MARK).is_file() and there:
        raise InputError(f"{what} is not an empty folder; name one that does not exist yet")
    record = Record.of(place)
    if there and record is None:
        raise InputError(f"{what} has lost its record {RECORD}, or is of an earlier version: delete it, or name another one")
    if there and not (wanted.add or wanted.overwrite):
        raise InputError(
            f"{what} has clusters of an earlier command: --add puts new images beside them, --overwrite replaces them"
        )
    if wanted.add and record and record.facts.get("clusters") != clusters:
        raise InputError(f"{what} has clusters of another model: --overwrite replaces them")
    if wanted.add and wanted.ranked and record and record.facts.get("ranked") != "True":
        raise InputError(f"{what} was made without --ranked: use --overwrite to rank all images, or leave out --ranked")
    if wanted.unfinished.exists() and not (wanted.unfinished / MARK).is_file():
        raise InputError(
            f"{wanted.unfinished} is in the way, and deepcluster did not write it: move it, or name another one"
        )
    if there and _holds_images(place, source):
        raise InputError(f"{what} holds images of the data itself: name another folder")
    if there and not wanted.add:
        check_deletable(place, what, source)
    entries = Entries(wanted.kind, source, work, final=place)
    entries.check(next(path for path in (place, *place.parents) if path.is_dir()), what)
    if wanted.kind == "copy":
        known = (record if wanted.add and record else Record()).known(place)
        needed = -_bytes_below(wanted.unfinished)
        for index in range(len(source)):
            bytes_of, _, _ = (stamp := source.stamp(index)).partition("-")
            if source.path(index) and bytes_of.isdecimal() and not known(source.name(index), stamp, entries.where(index)):
                needed += int(bytes_of)
        if needed > (free := free_disk_bytes(place)):
            raise InputError(f"{what}: --copy needs {size(needed)}, and {size(free)} of its disk are free")


def _holds_images(place: Path, source: ImageSource) -> bool:
    """Return whether an image of a source lies in a folder."""
    parents = {path.parent for index in range(len(source)) if (path := source.path(index))}
    return any(is_within(parent, place) for parent in parents)


def _bytes_below(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def make_folders(
    wanted: Folders,
    source: ImageSource,
    cluster_N: NDArray[np.int64],
    distance_N: NDArray[np.float32],
    names: Mapping[int, str],
    clusters: str,
    work: Work,
    *,
    n_clusters: int,
) -> str:
    """Put each image into the folder of its cluster; return what was done, in words.

    Args:
        cluster_N, distance_N: cluster of each image, and the distance to its centroid.
        names: names of clusters.
        clusters: as in `check_folders`.

    Raises:
        InputError: another process makes the same folder, or something has come in the way; the same command continues.
        Interrupted: the same command continues.
        DeepClusterError: the disk is full, or fails.
    """
    place, unfinished, what = wanted.place, wanted.unfinished, f"--folders {wanted.given}"
    lock = Lock(place.with_name(f".{unfinished.name}.in-use"), what=what, doing="filled", other="folder")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with closing(lock):
            lock.acquire(work.reporter.warn)
            check_folders(wanted, source, clusters, work)  # Others may have changed it since.
            before = Record.of(place) if wanted.add else None
            folder = unfinished if before is None else place
            record = before or Record({"clusters": clusters, "ranked": str(wanted.ranked), "kind": wanted.kind})
            if before is None:
                plan = digest_of(data_key(source), clusters, wanted.kind, wanted.ranked, sorted(names.items()))
                _begin(folder, plan, source)
            filling = Filling(folder, record, cluster_N, distance_N, len(str(n_clusters - 1)), names)
            entries = Entries(wanted.kind, source, work, temporary=folder / COPYING, final=place)
            try:
                with work.track("links and copies", len(source)) as advance:
                    done = filling.fill(source, entries, advance)
            finally:  # What a stop leaves is ours, too.
                record.write(folder)
            if before is None:
                if place.exists():
                    check_deletable(place, what, source)
                    shutil.rmtree(place)
                folder.rename(place)
                (place / PLAN).unlink()
            return done
    except OSError as fault:
        raise DeepClusterError(f"could not write {wanted.given}: {fault}; {work.interruption.advice}") from fault


def _begin(folder: Path, plan: str, source: ImageSource) -> None:
    """Make an unfinished folder, or keep one that a stop has left of the same plan."""
    with suppress(OSError, UnicodeDecodeError):
        if (folder / PLAN).read_text(encoding="utf-8") == plan:
            return
    if folder.exists():
        check_deletable(folder, f"{folder}, which a stopped command has left,", source)
        shutil.rmtree(folder)
    folder.mkdir()
    mark_as_ours(folder)
    (folder / PLAN).write_text(plan, encoding="utf-8")


class Filling:
    """Puts images into the folders of their clusters.

    Args:
        folder: holds these folders.
        record: what is there; it is added to.
        digits: of the numbers of clusters.
        names: names of clusters.
    """

    def __init__(
        self,
        folder: Path,
        record: Record,
        cluster_N: NDArray[np.int64],
        distance_N: NDArray[np.float32],
        digits: int,
        names: Mapping[int, str],
    ) -> None:
        self.folder, self.record, self.cluster_N, self.distance_N = folder, record, cluster_N, distance_N
        self.names, self.digits, self.ranked = names, digits, record.facts["ranked"] == "True"
        self.rank_N, self.rank_digits = _ranks(cluster_N, distance_N, record)
        self.taken = {
            hash((cluster, looks(self._without_rank(file.rpartition("/")[2]))))
            for file, cluster in zip(record.rows["file"], record.rows["cluster"], strict=True)
        }
        self._folders: dict[int, Path] = {}

    def _without_rank(self, name: str) -> str:
        return re.sub(r"^\d+_", "", name) if self.ranked else name

    def fill(self, source: ImageSource, entries: Entries, advance: Callable[[int], None]) -> str:
        """Put all images of a source there that are not there yet; return what was done, in words."""
        is_known, rows = self.record.known(entries.final), self.record.rows
        is_first = not rows["file"]
        n_there, n_added, n_failed = 0, 0, 0
        for index in range(len(source)):
            if index % STEP == 0:
                advance(min(STEP, len(source) - index))
            cluster = int(self.cluster_N[index])
            if cluster == UNASSIGNED:
                continue
            name, stamp, path = source.name(index), source.stamp(index), entries.where(index)
            if is_known(name, stamp, path):
                n_there += 1
                continue
            try:
                file = self._put(index, cluster, name, entries)
            except (FileNotFoundError, UnreadableImage):
                file = None
                if (image := source.path(index)) and image.exists():
                    raise
            if file is None:
                n_failed += 1
                continue
            n_added += 1
            own_stamp = "" if file.is_symlink() else file_stamp(file)
            place, distance = file.relative_to(self.folder).as_posix(), float(self.distance_N[index])
            for column, value in zip(rows.values(), (place, cluster, distance, name, path, stamp, own_stamp), strict=True):
                column.append(value)
        if n_failed:
            entries.work.reporter.warn(
                f"{are(n_failed, 'image')} left out of the folders: gone, or without a file of its own (--copy writes these)"
            )
        return count_of(n_added, "image") if is_first else f"{count_of(n_added, 'image')} added, {n_there:,} were there"

    def _put(self, index: int, cluster: int, name: str, entries: Entries) -> Path | None:
        """Make the entry of an image, and return it; None if the image has no file to link to."""
        prefix = f"{self.rank_N[index]:0{self.rank_digits}d}_" if self.ranked else ""
        name = entries.file_name(index, name)
        folder = self._folder(cluster)
        for suffix in chain([""], (f"-{number}" for number in count(2))):  # a/b__c.jpg after a__b/c.jpg
            final = entry_name(name, prefix=prefix, suffix=suffix)
            key = hash((cluster, looks(self._without_rank(final))))
            if key not in self.taken and entries.put(index, folder / final):
                self.taken.add(key)
                return folder / final
            if not entries.has_file(index):
                return None
        return None

    def _folder(self, cluster: int) -> Path:
        """Return the folder of a cluster, whatever name a user has given to it."""
        if cluster not in self._folders:
            if not self._folders:
                found = (re.fullmatch(r"cluster-(\d+)( .*)?", path.name) for path in self.folder.iterdir() if path.is_dir())
                self._folders = {int(match[1]): self.folder / match[0] for match in found if match}
            usual = f"cluster-{cluster:0{self.digits}d} {folder_name(self.names.get(cluster, ''))}".rstrip()
            self._folders.setdefault(cluster, self.folder / usual)
        self._folders[cluster].mkdir(exist_ok=True)
        return self._folders[cluster]


def _ranks(cluster_N: NDArray[np.int64], distance_N: NDArray[np.float32], record: Record) -> tuple[NDArray[np.int64], int]:
    """Return the rank of each image in its cluster by distance, from 1, and the number of digits to write it with.

    Where images are there already, a new one gets the rank of the first that is farther from the centroid: their names stay.
    """
    old_cluster, old_distance = np.array(record.rows["cluster"], np.int64), np.array(record.rows["distance"], np.float32)
    is_old = len(old_cluster) > 0
    clusters, distances = (old_cluster, old_distance) if is_old else (cluster_N, distance_N)
    rank_N = np.zeros(len(cluster_N), np.int64)
    order = np.lexsort((distances, clusters))
    found, starts, sizes = np.unique(clusters[order], return_index=True, return_counts=True)
    if not is_old:
        rank_N[order] = np.arange(len(order)) - np.repeat(starts, sizes) + 1
    else:
        there = dict(zip(found.tolist(), np.split(distances[order], starts[1:]), strict=True))
        for cluster in np.unique(cluster_N).tolist():
            mine = cluster_N == cluster
            rank_N[mine] = 1 + np.searchsorted(there.get(cluster, distances[:0]), distance_N[mine])
    return rank_N, max(3, len(str(sizes.max(initial=0))))
