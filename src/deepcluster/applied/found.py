"""Tables that commands print, write and return. R rows."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from deepcluster.applied.opening import output_target
from deepcluster.applied.shown import PictureRows, found_html
from deepcluster.core.errors import InputError
from deepcluster.core.files import output_path, write_whole
from deepcluster.core.html import pandas
from deepcluster.core.text import as_line, count_of, printable
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource
from deepcluster.data.sources.by_name import NamedPictures
from deepcluster.run.table_writers import ENDINGS, write_rows

LIST = ".txt"


class Found:
    """A result with columns of R rows; frozen dataclasses derive from it.

    Attributes:
        pictures: what notebooks show above the table; None for nothing.
    """

    pictures: PictureRows | None = None

    def columns(self) -> dict[str, Any]:
        """Return lists and arrays of R values by the name of the column, as they are written."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(next(iter(self.columns().values())))

    def to_pandas(self) -> Any:
        """Return a data frame with the columns that are written.

        Raises:
            InputError: pandas is not installed.
        """
        return pandas().DataFrame(self.columns())

    def _repr_html_(self) -> str:
        return found_html(repr(self), self.columns(), self.pictures)


def checked_outputs(
    out: str | Path | None, page: str | Path | None, *, endings: tuple[str, ...], inputs: Sequence[object]
) -> tuple[Any, Any]:
    """Return the paths of the table and of the page to write; nothing is made yet.

    Raises:
        InputError: one can't be written, the table is one of the inputs, or the packages of the page are not installed.
    """
    target = None if out is None else output_target(out, endings, parts=False, inputs=inputs)
    if page is None:
        return target, None
    import_module("deepcluster.visualization.report.page").needs_report_extra()
    return target, output_path(page, "--page", endings=(".html", ".htm"))


def check_listed(images: ImageSource | None, target: Path | None) -> None:
    """Raise `InputError` where images are no files, which a list of files can't name.

    Args:
        images: None for a table without images, of which the list has the names.
        target: the list, or another kind of file, or none.
    """
    if images is None or target is None or target.suffix != LIST:
        return
    missing = len(images) - images.n_found if isinstance(images, NamedPictures) else 0
    bare = sum(images.path(index) is None for index in range(len(images)))
    if bare > missing:
        raise InputError(
            f"{target} would be a list of files, and {bare - missing:,} of the {count_of(len(images), 'image')} are in an "
            f"archive, a table, memory or at an address: unpack them, or write a table ({', '.join(ENDINGS)})"
        )


def write_found(found: Found, target: Path) -> None:
    """Write a table."""
    columns = found.columns().items()
    write_rows({name: list(map(printable, one)) if isinstance(one, list) else one for name, one in columns}, target)


def write_list(names: Sequence[str], target: Path) -> None:
    """Write one name, or path, per line, as DATA takes them."""
    write_whole(target, "".join(f"{as_line(printable(name))}\n" for name in names))


def write_page(
    page: Path, title: str, parts: Sequence[Mapping[str, Any]], images: ImageSource | None, *, workers: int, work: Work
) -> None:
    """Write a page, as `write_picture_page` in `visualization` does, on a floor beside this one."""
    module = import_module("deepcluster.visualization.picture_page")
    module.write_picture_page(page, title, parts, images, workers=workers, work=work)


def picture(index: int, name: str, caption: str, *, marked: bool = False) -> dict[str, Any]:
    """Return a picture of a page: index among the images, and what is written below it."""
    return {"index": index, "name": name, "caption": caption, "marked": marked}
