"""Uploads without images of their own: planes that were sent ahead, or lie elsewhere, asked for by well."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from model.layout import PlaneKey, Role, parse_well
from service.decoding import FileSlice
from service.errors import InvalidRequestError, NoImagesError
from service.rules import existing
from service.store import BatchRecord, BatchStore, StagedPlane
from service.uploads import SentFile, Upload, complete_sites

F = TypeVar("F", bound=SentFile)


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
        with self.store.file(self.batch, self.plane.blob) as path:
            yield FileSlice(path, 0, self.plane.size, self.name)


@dataclass(frozen=True)
class Named:
    """What a request without images of its own says: of which batch and role, perhaps which wells, at which pixel size."""

    batch_id: str
    role: Role
    wells: Sequence[str] | None = None
    pixel_size_um: float | None = None


def staged_upload(store: BatchStore, named: Named, channels: Sequence[str]) -> Upload:
    """Gather staged planes: of the wells named; or else the plate map's controls, or all that are no controls.

    Raises:
        BatchNotFoundError: nothing was sent to that batch. InvalidRequestError: controls without wells or a plate map.
        NoImagesError: nothing is staged of these wells. MissingChannelError: a site is not complete.
    """
    batch = existing(store, named.batch_id)
    planes = {plane.key: StagedFile(store, batch, plane) for plane in store.staged(named.batch_id)}
    sites = complete_sites(chosen(store, named, planes, "staged"), channels)
    return Upload(sites, pixel_size_um=named.pixel_size_um, incarnation=batch.incarnation)


def chosen(store: BatchStore, named: Named, planes: Mapping[PlaneKey, F], how: str) -> dict[PlaneKey, F]:
    """Choose planes by their wells: those named; or else the plate map's controls, or all that are no controls.

    Raises:
        InvalidRequestError: controls without wells or a plate map, or a panel without wells. NoImagesError: none of a well.
    """
    there = {key.well for key in planes}
    wells = _wells(store, named, there)
    absent = sorted(wells - there)
    if absent or not wells:
        of = f"well {', '.join(absent[:10])}" if absent else f"a {named.role} well"
        raise NoImagesError(f"no image of {of} is {how} for batch {named.batch_id}", batch_id=named.batch_id)
    return {key: plane for key, plane in planes.items() if key.well in wells}


def _wells(store: BatchStore, named: Named, there: set[str]) -> set[str]:
    if named.wells is not None:
        return {parse_well(well) for well in named.wells}
    batch, platemap = store.batch(named.batch_id), store.platemap(named.batch_id)
    planned = frozenset() if platemap is None else platemap.wells(Role.CONTROL)
    if named.role is Role.TREATED:
        return there - planned - (frozenset() if batch is None else batch.control_wells)
    if named.role is Role.PANEL:
        raise InvalidRequestError("which wells are the panel? Name them in wells", batch_id=named.batch_id)
    if not planned:
        raise InvalidRequestError(
            "which wells are controls? Name them in wells, or send a plate map that tells them", batch_id=named.batch_id
        )
    return there & planned
