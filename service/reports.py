"""How the stories' results are told: values of ``schemas`` from those of ``model`` and ``store``."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.bundle import Bundle, Manifest, recipe_json
from model.layout import PlateMap, Role
from model.predictions import WellAnswer
from service import schemas
from service.engine import Engine
from service.errors import problem_of
from service.store import Adaptation, BatchRecord, KeptAnswer
from service.uploads import RefusedSite, SeenSite, Skipped, Upload

CONTROLS, PANEL, BLENDED, SOURCE = "controls", "panel", "blended", "source"
"""What an answer's statistics are of."""
VERSION = version("anchorwell")
REPORTED_SATURATION = 0.001
FURTHEST = 100.0
"""Percentile of a plate that no held-out training plate is as far away as."""


def provenance(bundle: Bundle, engine: Engine) -> dict[str, Any]:
    """What answers: the members of every ``schemas.Provenance``."""
    return {
        "bundle": bundle.digest,
        "provider": engine.provider,
        "precision": engine.precision,
        "version": VERSION,
    }


def model_card(bundle: Bundle, engine: Engine, max_context_sites: int) -> schemas.ModelCard:
    """The served bundle."""
    manifest = bundle.manifest
    return schemas.ModelCard(
        **provenance(bundle, engine),
        name=manifest.name,
        classes=manifest.classes,
        channels=manifest.channels,
        recipe=schemas.Recipe.model_validate(recipe_json(manifest.recipe)),
        method=manifest.method,
        trained_context=manifest.context,
        minimum_control_wells=manifest.minimum_control_wells,
        max_context_sites=max_context_sites,
        members=manifest.members,
        features=manifest.features,
        temperature=manifest.temperature,
        network=manifest.network,
        training=manifest.training,
    )


def context_report(manifest: Manifest, adaptation: Adaptation | None) -> dict[str, Any]:
    """What the statistics were measured on and how far they lie from training: members of both reports."""
    return {
        "statistics_id": adaptation.statistics_id if adaptation else None,
        "trained_context": manifest.context,
        "context_wells": adaptation.control_wells if adaptation else (),
        "context_panel": adaptation.panel if adaptation else (),
        "context_sites": len(adaptation.used) if adaptation else 0,
        "left_out": tuple(
            schemas.LeftOut(
                well=site.well,
                site=site.site,
                reason=f"the context is full: {len(adaptation.used)} sites are measured in one pass",
            )
            for site in adaptation.left_out
        )
        if adaptation
        else (),
        "prior_weight": adaptation.prior_weight if adaptation else None,
        "distance": adaptation.distance if adaptation else None,
        "percentile": adaptation.percentile if adaptation else None,
        "out_of_range": adaptation.out_of_range if adaptation else None,
    }


def notices(
    manifest: Manifest, adaptation: Adaptation | None, batch: BatchRecord, upload: Upload, *, unusable_sites: int
) -> tuple[str, ...]:
    """What a reader of an answer should know of how it came about: assumptions made, and what is unlike training."""
    return (*_upload_notices(batch, upload), *_context_notices(manifest, adaptation, batch, unusable_sites))


def _upload_notices(batch: BatchRecord, upload: Upload) -> Iterator[str]:
    yield from upload.notices
    if upload.plate is not None and not _names_plate(batch.batch_id, upload.plate):
        yield f"the images' table is of plate {upload.plate[:80]!r}, the batch is named {batch.batch_id}"


def _names_plate(batch_id: str, plate: str) -> bool:
    """Whether an id is a plate's name, or starts with it: BR00116991, or BR00116991-rescan."""
    return re.fullmatch(re.escape(plate) + "([._-].*)?", batch_id, re.IGNORECASE) is not None


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third", 4: "fourth"}.get(number, f"{number}th")


def _context_notices(
    manifest: Manifest, adaptation: Adaptation | None, batch: BatchRecord, unusable_sites: int
) -> Iterator[str]:
    recipe = manifest.recipe
    if recipe.pixel_size_um is not None and batch.pixel_size_um is None:
        taken = "they were taken as they are" if recipe.shrink == 1 else f"every {_ordinal(recipe.shrink)} pixel was taken"
        yield (
            f"the images' pixel size is not known: {taken}, as if of {recipe.pixel_size_um / recipe.shrink:g} µm. Images of "
            "a known size are resampled, and answered otherwise: send pixel_size_um, or a LoadData table that has it"
        )
    if unusable_sites:
        yield (
            f"{unusable_sites} kept control sites were prepared for another bundle's image recipe and are not measured: "
            "send them again"
        )
    if adaptation is not None and manifest.context not in (CONTROLS, adaptation.context):
        how = {SOURCE: " (AdaBN)", PANEL: _without_panel(adaptation, batch)}.get(manifest.context, "")
        yield f"the network was trained for the context {manifest.context!r} and is served with control statistics{how}"
    if adaptation is not None and adaptation.prior_weight is not None:
        yield (
            f"the statistics are blended: beside {len(adaptation.control_wells)} control wells the mean of the training "
            f"plates has {adaptation.prior_weight:.0%} of the weight, which makes the plate's distance from them smaller too"
        )
    if adaptation is not None and adaptation.out_of_range:
        yield "the statistics of this plate's controls are unlike those of the training plates"
    elif adaptation is not None and adaptation.percentile >= FURTHEST:
        yield (
            "the statistics of this plate's controls lie further from the training plates than those of any held-out one: "
            "are pixel size, channels and stain what the network was trained on?"
        )


def _without_panel(adaptation: Adaptation, batch: BatchRecord) -> str:
    if not batch.panel_wells:
        return ": no panel is recorded (POST …/controls?role=panel)"
    return ": a blend is of controls alone" if adaptation.context == BLENDED else ": its panel could not be measured"


def well_prediction(
    answer: WellAnswer,
    classes: Sequence[str],
    refused: Iterable[RefusedSite],
    adaptation: Adaptation | None,
    *,
    control: bool,
) -> schemas.WellPrediction:
    """Tell a well's answer; one of a plate that is out of range is out of range."""
    plate_out_of_range = adaptation is not None and adaptation.out_of_range
    return schemas.WellPrediction(
        well=answer.well,
        label=answer.label,
        probability=answer.probability,
        probabilities=dict(zip(classes, answer.probabilities, strict=True)),
        entropy=answer.entropy,
        sites=answer.sites,
        refused=tuple(
            schemas.RefusedImage(site=site.key.site, problem=problem_of(site.error).slug, detail=site.error.detail)
            for site in refused
        ),
        spread=answer.spread,
        distance_to_controls=answer.distance_to_controls,
        distance_to_class=answer.distance_to_class,
        resembles_controls=answer.resembles_controls,
        out_of_range=answer.out_of_range or plate_out_of_range,
        control=control,
    )


def saturation_report(sites: Iterable[SeenSite]) -> tuple[schemas.Saturation, ...]:
    """Tell, per channel, how many planes are noticeably saturated and which is worst."""
    shares: dict[str, list[tuple[float, SeenSite]]] = defaultdict(list)
    for site in sites:
        for channel, share in site.saturation.items():
            if share > REPORTED_SATURATION:
                shares[channel].append((share, site))
    worst = {channel: max(found, key=lambda item: item[0]) for channel, found in shares.items()}
    return tuple(
        schemas.Saturation(
            channel=channel,
            planes=len(shares[channel]),
            worst_share=share,
            worst_well=site.key.well,
            worst_site=site.key.site,
        )
        for channel, (share, site) in sorted(worst.items())
    )


def skipped_report(skipped: Iterable[Skipped]) -> tuple[schemas.SkippedFile, ...]:
    """Tell the files that were skipped."""
    return tuple(schemas.SkippedFile(file=item.file, reason=item.reason) for item in skipped)


# --- what is kept ----------------------------------------------------------------------------------------------------


def kept_answers(prediction: schemas.Prediction, embeddings: Iterable[NDArray[np.float32]]) -> list[KeptAnswer]:
    """What is kept of a prediction: each well's answer and embedding, by the statistics they stand on."""
    assert prediction.statistics_id is not None
    return [
        KeptAnswer(
            well=well.well,
            told={
                **well.model_dump(mode="json"),
                "context": prediction.context,
                "answered_at": datetime.now(UTC).isoformat(),
            },
            statistics_id=prediction.statistics_id,
            bundle_digest=prediction.bundle,
            embedding=embedding,
        )
        for well, embedding in zip(prediction.wells, embeddings, strict=True)
    ]


def kept_predictions(
    batch: BatchRecord, platemap: PlateMap | None, answers: Iterable[KeptAnswer], current: Collection[tuple[str, str]]
) -> schemas.KeptPredictions:
    """Tell kept answers; ``current`` are the bundle and statistics that they could be answered with now."""
    wells = tuple(
        schemas.KeptPrediction.model_validate(
            {
                **answer.told,
                "batch_id": batch.batch_id,
                "plate": batch.plate or batch.batch_id,
                "statistics_id": answer.statistics_id,
                "bundle": answer.bundle_digest,
                "stale": (answer.bundle_digest, answer.statistics_id) not in current,
                "control": answer.well in batch.control_wells,
                "platemap": {} if platemap is None else row_of(platemap, answer.well),
                "embedding": tuple(float(value) for value in answer.embedding),
            }
        )
        for answer in answers
    )
    return schemas.KeptPredictions(batch_id=batch.batch_id, wells=wells)


def platemap_report(batch_id: str, platemap: PlateMap) -> schemas.PlateMapReport:
    """Tell a plate map."""
    return schemas.PlateMapReport(
        batch_id=batch_id,
        columns=platemap.columns,
        wells=platemap.rows,
        control_wells=tuple(sorted(platemap.wells(Role.CONTROL))),
        treated_wells=tuple(sorted(platemap.wells(Role.TREATED))),
    )


def row_of(platemap: PlateMap, well: str) -> dict[str, str]:
    """Return a well's values by column; nothing for a well that the plate map does not name."""
    return dict(zip(platemap.columns, platemap.rows[well], strict=True)) if well in platemap.rows else {}
