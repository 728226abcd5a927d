"""Keeps files as they were sent: of controls, so that a later bundle's recipe can be applied to them, and for jobs."""

from collections.abc import Collection, Iterator, Mapping
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
    """Keeps what one request sends: ``put`` are bytes by blob, ``named`` the blobs that its commit named."""

    store: BatchStore
    shard: str = field(default_factory=new_shard)
    put: dict[str, int] = field(default_factory=dict)
    named: Collection[str] = ()

    def __call__(self, slices: Mapping[str, FileSlice]) -> Mapping[str, KeptFile]:
        """Keep a site's files by channel, one of several channels once."""
        blobs: dict[tuple[Path, int], str] = {}
        data: dict[str, bytes] = {}
        for file in slices.values():
            if (file.path, file.offset) not in blobs:
                content = file.read()
                blob = blobs[file.path, file.offset] = new_blob(content, self.shard)
                data[blob] = content
        self.put |= {blob: len(content) for blob, content in data.items()}
        self.store.put_files(data)
        return {channel: KeptFile(blobs[file.path, file.offset], file.size, file.page) for channel, file in slices.items()}


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
    store.drop_files(keeper.put.keys() - keeper.named)


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
