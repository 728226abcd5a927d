"""Keeps the files of control images as they were sent, so that a later bundle's recipe can be applied to them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.decoding import FileSlice
from service.errors import StoreUnavailableError
from service.store import BatchRecord, BatchStore, ControlSite, KeptFile, new_blob, new_shard

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class FileKeeper:
    """Keeps what one request sends; ``named`` are the blobs that its commit named."""

    store: BatchStore
    shard: str = field(default_factory=new_shard)
    put: set[str] = field(default_factory=set)
    named: frozenset[str] = frozenset()

    def __call__(self, slices: Mapping[str, FileSlice], planes: Mapping[str, str]) -> Mapping[str, KeptFile]:
        """Keep a site's files, one of several channels once."""
        blobs: dict[tuple[Path, int], str] = {}
        data: dict[str, bytes] = {}
        for channel in planes:
            file = slices[channel]
            if (file.path, file.offset) not in blobs:
                content = file.read()
                blob = blobs[file.path, file.offset] = new_blob(content, self.shard)
                data[blob] = content
        self.put |= data.keys()
        self.store.put_files(data)
        found = {channel: slices[channel] for channel in planes}
        return {channel: KeptFile(blobs[file.path, file.offset], file.size, file.page) for channel, file in found.items()}


@contextmanager
def kept_files(store: BatchStore) -> Iterator[FileKeeper]:
    """Keep files while a request lasts; those that its commit did not come to name go again."""
    keeper = FileKeeper(store)
    try:
        yield keeper
    except StoreUnavailableError:  # perhaps a commit names them all the same; if none does, they are swept
        raise
    except BaseException:
        store.drop_files(keeper.put)
        raise
    store.drop_files(keeper.put - keeper.named)


@dataclass(frozen=True)
class ControlFile:
    """The kept file of one channel of a control site."""

    store: BatchStore
    batch: BatchRecord
    site: ControlSite
    channel: str

    @property
    def name(self) -> str:
        """Its place."""
        return f"{self.site.key.well}/{self.site.key.site}/{self.channel}"

    @property
    def content(self) -> str:
        """The sha256 of its bytes."""
        return self.site.planes[self.channel]

    @contextmanager
    def on_disk(self) -> Iterator[FileSlice]:
        """Give the file as bytes on this machine's disk."""
        kept = self.site.files[self.channel]
        with self.store.file(self.batch, kept.blob) as path:
            yield FileSlice(path, 0, kept.size, self.name, kept.page)
