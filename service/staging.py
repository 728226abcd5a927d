"""Uploads whose images were sent ahead: planes kept by ``PUT``, asked for by well."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from model.layout import Role, parse_well
from service.decoding import FileSlice
from service.errors import InvalidRequestError, NoImagesError
from service.rules import existing
from service.store import BatchRecord, BatchStore, StagedPlane
from service.uploads import Upload, complete_sites


@dataclass(frozen=True)
class StagedFile:
    """The file of a staged plane."""

    store: BatchStore
    batch: BatchRecord
    plane: StagedPlane

    @property
    def name(self) -> str:
        """Its place, for it was sent without a name."""
        key = self.plane.key
        return f"{key.well}/{key.site}/{key.channel}"

    @property
    def content(self) -> str:
        """The sha256 of its bytes."""
        return self.plane.sha256

    @contextmanager
    def on_disk(self) -> Iterator[FileSlice]:
        """Give the file as bytes on this machine's disk."""
        with self.store.staged_file(self.batch, self.plane) as path:
            yield FileSlice(path, 0, self.plane.size, self.name)


def staged_upload(
    store: BatchStore,
    batch_id: str,
    wells: Sequence[str] | None,
    role: Role,
    channels: Sequence[str],
    pixel_size_um: float | None = None,
) -> Upload:
    """Gather staged planes: of the wells named; or else the plate map's controls, or all that are no controls.

    Raises:
        BatchNotFoundError: nothing was sent to that batch. InvalidRequestError: controls without wells or a plate map.
        NoImagesError: nothing is staged of these wells. MissingChannelError: a site is not complete.
    """
    batch = existing(store, batch_id)
    staged = store.staged(batch_id)
    chosen = _wells(store, batch, wells, role, {plane.key.well for plane in staged})
    planes = {plane.key: StagedFile(store, batch, plane) for plane in staged if plane.key.well in chosen}
    absent = sorted(chosen - {key.well for key in planes})
    if absent or not planes:
        of = f"well {', '.join(absent[:10])}" if absent else f"a {role} well"
        raise NoImagesError(
            f"no image of {of} is staged for batch {batch_id}: PUT /batches/{batch_id}/images/{{well}}/{{site}}/{{channel}}",
            batch_id=batch_id,
        )
    return Upload(complete_sites(planes, channels), pixel_size_um=pixel_size_um)


def _wells(store: BatchStore, batch: BatchRecord, wells: Sequence[str] | None, role: Role, staged: set[str]) -> set[str]:
    if wells is not None:
        return {parse_well(well) for well in wells}
    platemap = store.platemap(batch.batch_id)
    planned = frozenset() if platemap is None else platemap.wells(Role.CONTROL)
    if role is Role.TREATED:
        return staged - planned - batch.control_wells
    if not planned:
        raise InvalidRequestError(
            "which wells are controls? Name them in wells, or send a plate map that tells them", batch_id=batch.batch_id
        )
    return staged & planned
