"""Rules of a batch: what may be sent to it, as it is kept. Values in, errors out."""

from model.layout import PlateMap, Role
from service.errors import (
    BatchNotFoundError,
    ControlAsPanelError,
    ControlConflictError,
    PixelSizeConflictError,
    PlateConflictError,
    TreatedAsControlError,
)
from service.store import BatchRecord, BatchStore, ControlSite
from service.uploads import PreparedSite


def agreed_pixel_size(batch: BatchRecord, sent: float | None) -> float | None:
    """Return the batch's pixel size, which the first controls set; a request that names none means that one.

    Raises:
        PixelSizeConflictError: another one was sent.
    """
    if sent is None:
        return batch.pixel_size_um
    require_pixel_size(batch, sent)
    return sent


def require_pixel_size(batch: BatchRecord, pixel_size_um: float | None) -> None:
    """Check the pixel size that images were prepared at.

    Raises:
        PixelSizeConflictError: the batch's controls were prepared at another one.
    """
    if batch.controls and pixel_size_um != batch.pixel_size_um:
        raise PixelSizeConflictError(
            f"the controls of batch {batch.batch_id} are kept {_at(batch.pixel_size_um)}, these images come "
            f"{_at(pixel_size_um)}: send the same, or delete the batch and send its controls again",
            batch_id=batch.batch_id,
        )


def require_plate(batch: BatchRecord, plate: str | None) -> None:
    """Check the plate that an upload's table names.

    Raises:
        PlateConflictError: the batch's controls are of another one.
    """
    if batch.controls and batch.plate and plate and plate.casefold() != batch.plate.casefold():
        raise PlateConflictError(
            f"the controls of batch {batch.batch_id} are of plate {_short(batch.plate)}, these images are of plate "
            f"{_short(plate)}: send them to that plate's batch",
            batch_id=batch.batch_id,
        )


def _short(name: str | None) -> str:
    return repr((name or "")[:80])


def _at(pixel_size_um: float | None) -> str:
    return "without a pixel size" if pixel_size_um is None else f"at {pixel_size_um} µm per pixel"


def refuse_treated(batch: BatchRecord, wells: frozenset[str]) -> None:
    """Let no treated well into the statistics.

    Raises:
        TreatedAsControlError: a well was answered as a treated one, or the plate map calls it one.
    """
    planned = sorted(wells & batch.planned)
    if planned:
        raise _treated_as_control(
            batch,
            planned,
            f"the plate map of batch {batch.batch_id} calls well {', '.join(planned[:10])} treated: leave it out, or "
            "correct the plate map",
        )
    panel = sorted(wells & batch.panel_wells)
    if panel:
        raise _treated_as_control(
            batch,
            panel,
            f"well {', '.join(panel[:10])} of batch {batch.batch_id} is of its panel, a treated well, and no control: "
            "leave it out, or delete the batch if it was recorded by mistake",
        )
    treated = sorted(wells & batch.treated)
    if treated:
        raise _treated_as_control(
            batch,
            treated,
            f"well {', '.join(treated[:10])} of batch {batch.batch_id} was answered as treated and is no control: "
            "leave it out, or delete the batch if it was answered by mistake",
        )


def refuse_panel(batch: BatchRecord, wells: frozenset[str], platemap: PlateMap | None) -> None:
    """Let no control into the panel.

    Raises:
        ControlAsPanelError: a well is kept as a control, or the plate map calls it one.
    """
    kept = sorted(wells & batch.control_wells)
    if kept:
        raise _control_as_panel(
            batch,
            kept,
            f"well {', '.join(kept[:10])} of batch {batch.batch_id} is kept as a control and cannot be of its panel too: "
            "leave it out, or delete the batch and send its controls again",
        )
    planned = sorted(wells & (frozenset() if platemap is None else platemap.wells(Role.CONTROL)))
    if planned:
        raise _control_as_panel(
            batch,
            planned,
            f"the plate map of batch {batch.batch_id} calls well {', '.join(planned[:10])} a control: leave it out, or "
            "correct the plate map",
        )


def refuse_platemap(batch: BatchRecord, platemap: PlateMap) -> None:
    """Let no plate map call a kept control treated, or a well of the panel a control.

    Raises:
        TreatedAsControlError, ControlAsPanelError: it does.
    """
    panel = sorted(platemap.wells(Role.CONTROL) & batch.panel_wells)
    if panel:
        raise _control_as_panel(
            batch,
            panel,
            f"the plate map calls well {', '.join(panel[:10])} a control, which batch {batch.batch_id} keeps as its panel: "
            "correct it, or delete the batch and send its panel again",
        )
    kept = sorted(platemap.wells(Role.TREATED) & batch.control_wells)
    if kept:
        raise _treated_as_control(
            batch,
            kept,
            f"the plate map calls well {', '.join(kept[:10])} treated, which batch {batch.batch_id} keeps as a control: "
            "correct it, or delete the batch and send its controls again",
        )


def _treated_as_control(batch: BatchRecord, wells: list[str], detail: str) -> TreatedAsControlError:
    return TreatedAsControlError(detail, batch_id=batch.batch_id, well=wells[0], wells=wells)


def _control_as_panel(batch: BatchRecord, wells: list[str], detail: str) -> ControlAsPanelError:
    return ControlAsPanelError(detail, batch_id=batch.batch_id, well=wells[0], wells=wells)


def require_incarnation(now: BatchRecord, asked: str | None) -> None:
    """Check that what comes of a request is kept for the batch that it was asked of; None is one that was not there yet.

    Raises:
        BatchNotFoundError: it was deleted meanwhile, whether or not it was made anew.
    """
    if asked is not None and now.incarnation != asked:
        raise BatchNotFoundError(
            f"batch {now.batch_id} was deleted while this request was worked on; nothing of it was kept",
            batch_id=now.batch_id,
        )


def existing(store: BatchStore, batch_id: str) -> BatchRecord:
    """Return a kept batch.

    Raises:
        BatchNotFoundError: there is none.
    """
    batch = store.batch(batch_id)
    if batch is None:
        raise not_found(batch_id)
    return batch


def control_conflict(batch_id: str, kept: ControlSite, sent: PreparedSite) -> ControlConflictError:
    """Say that other images are kept for a control site."""
    channels = [channel for channel, sha256 in sent.planes.items() if kept.planes.get(channel) != sha256]
    return ControlConflictError(
        f"batch {batch_id} keeps another image for well {kept.key.well} site {kept.key.site} "
        f"channel {', '.join(channels)}; ?replace=true puts the new one in its place",
        batch_id=batch_id,
        well=kept.key.well,
        site=kept.key.site,
        channel=channels[0],
    )


def not_found(batch_id: str) -> BatchNotFoundError:
    """Say that a batch is not kept."""
    return BatchNotFoundError(f"there is no batch {batch_id}; GET /batches lists them", batch_id=batch_id)
