"""Images at addresses of their own: those of a list, or of a folder. N images."""

from collections.abc import Mapping

from deepcluster.core.addresses import names_below, path_of, shown
from deepcluster.core.errors import UnreadableImage
from deepcluster.core.names import PackedNames
from deepcluster.core.retry import Refused
from deepcluster.core.text import distinct, endings_of, printable
from deepcluster.data.sources.files import count_endings
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.storage.blocks import BlockStore
from deepcluster.data.storage.remote import read_whole


class RemoteImages(ImageSource):
    """Image files at addresses of one server, each fetched whole when it is first read; safe to read from many threads.

    The content at an address is assumed not to change: neither `stamp` nor `changed` asks the server, and what the block
    store holds is not fetched again.
    """

    def __init__(self, labels: Mapping[str, str], details: str, blocks: BlockStore) -> None:
        """Take N different addresses with their class names ("" = unknown), and what `details` adds to their endings."""
        super().__init__(labels.values() if any(labels.values()) else None)
        paths = [path_of(address) for address in labels]
        self._addresses = PackedNames(labels)
        self._names = PackedNames(distinct([printable(name) for name in names_below(paths)]))
        self._details = f"({endings_of(count_endings(paths))}) {details}"
        self._blocks = blocks
        self._answered = False

    def __len__(self) -> int:
        return len(self._addresses)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            UnreadableImage: the server refuses it.
            ConnectionLost: the server is gone, for which the image is not to blame.
        """
        address = self._addresses[index]
        try:
            content = self._blocks.get(f"{shown(address)}\nwhole", lambda: read_whole(address, answered=self._answered))
        except Refused as error:
            raise UnreadableImage(str(error)) from error
        self._answered = True
        return content

    def stamp(self, index: int) -> str:
        return shown(self._addresses[index])

    def holder(self, index: int) -> str:
        return shown(self._addresses[index])

    def details(self) -> str:
        return self._details
