"""What is kept of a batch, over either kind of storage."""

import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256

import numpy as np
import pytest

from model.images import PreparedImage
from model.layout import PlaneKey, PlateMap, Role, SiteKey
from model.scale import BatchScale
from model.statistics import BatchNormStatistics, statistics_id
from service.deeds import Deed
from service.errors import BatchBusyError, BatchNotFoundError, BlobMissingError, QuotaExceededError
from service.kept import BundleView
from service.storage import Storage
from service.store import (
    Adaptation,
    BatchRecord,
    Change,
    ControlSite,
    KeptAnswer,
    RevisionConflictError,
    StagedPlane,
    image_bytes,
    image_from_bytes,
    new_blob,
)
from tests.service.plates import plane

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
A01, B01 = SiteKey("A01", 1), SiteKey("B01", 12)
NEW = BatchRecord("P1")


def control(key, seed=0):
    image = image_bytes(PreparedImage(pixels_of(key, seed)))
    site = ControlSite(key, {"DNA": "0" * 64, "ER": f"{seed:064d}"}, "recipe", new_blob(image, "0a1"), len(image))
    return site, image


def pixels_of(key, seed=0):
    return plane((key, seed)).astype(np.float32)[None]


def staged_plane(data, well="E05"):
    return StagedPlane(
        PlaneKey(well, 1, "DNA"), sha256(data).hexdigest(), len(data), new_blob(data, "0a2"), "2026-01-02T03:04:05Z"
    )


def adaptation(name="s1", bundle="b1"):
    return Adaptation(
        bundle_digest=bundle,
        statistics_id=name,
        statistics=BatchNormStatistics(np.arange(3, dtype=np.float32), np.ones(3, np.float32), sites=2, wells=2),
        control_centre=np.array([0.1, 0.2], np.float32),
        used=(A01, B01),
        left_out=(SiteKey("B01", 13),),
        distance=1.25,
        percentile=50.0,
        out_of_range=False,
        provider="CPUExecutionProvider",
        precision="fp32",
        created_at=NOW,
    )


def answer(well, statistics="s1"):
    return KeptAnswer(well, {"label": "alpha"}, statistics, "b1", np.array([0.5, -1.25], np.float32))


@pytest.fixture
def kept(any_storage):
    return any_storage.of("mine")


def also():
    return Deed("mine").done("test", "P1", {})


def test_a_commit_keeps_all_of_a_change_and_reads_back_as_it_was(kept):
    site, image = control(A01)
    platemap = PlateMap(("well", "compound"), {"A01": ("A01", "DMSO")}, {"A01": Role.CONTROL, "E05": Role.TREATED})
    change = Change(NOW, 0.65, [(site, image)], frozenset({"E05"}), adaptation(), "BR1", [answer("E05")], platemap)
    kept.commit(NEW, change)
    batch = kept.batch("P1")
    assert batch.controls == {A01: site}
    assert (batch.treated, batch.planned) == ({"E05"}, {"E05"})
    assert batch.adaptations == {("b1", "s1")}
    assert (batch.pixel_size_um, batch.plate, batch.changed_at) == (0.65, "BR1", NOW)
    assert kept.image(batch, A01).pixels.tobytes() == pixels_of(A01).tobytes()
    read = kept.adaptation("P1", "b1", "s1")
    assert read.to_bytes() == adaptation().to_bytes()
    assert (read.used, read.left_out, read.control_wells) == ((A01, B01), (SiteKey("B01", 13),), ("A01", "B01"))
    (told,) = kept.answers("P1")
    assert told.to_bytes() == answer("E05").to_bytes()
    assert kept.platemap("P1") == platemap


def test_an_adaptation_keeps_its_scale_and_the_batch_its_name(kept):
    scale = BatchScale(low=((0.1,), (300.5,)), span=((4_000.0,), (1 / 3,)))
    kept.commit(NEW, Change(NOW, adaptation=replace(adaptation(), scale=scale, unscaled_id="s0")))
    read = kept.adaptation("P1", "b1", "s1")
    assert (read.scale, read.unscaled_id) == (scale, "s0")
    kept.commit(kept.batch("P1"), Change(NOW, treated=frozenset({"E05"})))
    assert kept.batch("P1").scales == {"s0": scale.digest}


def test_what_was_kept_before_there_were_scales_reads_and_writes_as_it_did():
    before = BatchRecord("P1", "a.b", 0.65, "BR1", {A01: control(A01)[0]}, changed_at=NOW).to_bytes()
    assert b"scale" not in before
    assert BatchRecord.from_bytes("P1", before).to_bytes() == before, "the store compares what it reads to the byte"
    assert b"scale" not in adaptation().to_bytes()
    assert Adaptation.from_bytes(adaptation().to_bytes()).scale is None


def test_a_prepared_site_is_kept_with_its_field():
    pixels, field = pixels_of(A01), np.random.default_rng(1).random((1, 2, 6))
    read = image_from_bytes(image_bytes(PreparedImage(pixels, field)))
    assert (read.pixels.tobytes(), read.field.tobytes()) == (pixels.tobytes(), field.tobytes())
    assert image_from_bytes(image_bytes(PreparedImage(pixels))).field is None


def test_the_panel_and_what_was_blended_read_back(kept):
    (control_site, image), (sited, other) = control(A01), control(B01)
    panel_site = replace(sited, role=Role.PANEL)
    blend = replace(adaptation(), context="panel", panel=("B01",), prior_weight=0.25)
    kept.commit(NEW, Change(NOW, controls=[(control_site, image), (panel_site, other)], adaptation=blend))
    batch = kept.batch("P1")
    assert batch.controls == {A01: control_site, B01: panel_site}
    assert (batch.control_wells, batch.panel_wells) == ({"A01"}, {"B01"})
    assert batch.control_bytes == control_site.size + panel_site.size
    read = Adaptation.from_bytes(kept.adaptation("P1", "b1", "s1").to_bytes())
    assert (read.context, read.control_wells, read.panel, read.prior_weight) == ("panel", ("A01",), ("B01",), 0.25)


def test_what_was_kept_before_there_were_panels_and_blends_reads_back_to_the_same_bytes(kept):
    kept.commit(NEW, Change(NOW, controls=[control(A01)]))
    data = kept.batch("P1").to_bytes()
    assert b'"role"' not in data
    old = BatchRecord.from_bytes("P1", data)
    assert (old.to_bytes(), old.control_wells, old.panel_wells) == (data, {"A01"}, frozenset())
    with np.load(io.BytesIO(adaptation().to_bytes())) as stored:
        arrays = dict(stored)
    rest = json.loads(arrays["rest"].tobytes())
    arrays["rest"] = np.frombuffer(
        json.dumps({name: rest[name] for name in rest.keys() - {"context", "panel", "prior_weight"}}).encode(), np.uint8
    )
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    read = Adaptation.from_bytes(buffer.getvalue())
    assert (read.context, read.panel, read.prior_weight, read.control_wells) == ("controls", (), None, ("A01", "B01"))


def test_a_batch_keeps_its_plate_and_pixel_size(kept):
    kept.commit(NEW, Change(NOW, 0.65, [control(A01)], plate="BR1"))
    kept.commit(kept.batch("P1"), Change(NOW, treated=frozenset({"E05"})))
    assert (kept.batch("P1").plate, kept.batch("P1").pixel_size_um) == ("BR1", 0.65)


def test_changes_add_up_and_old_statistics_stay(kept):
    kept.commit(NEW, Change(NOW, 0.65, [control(A01)], adaptation=adaptation("s1")))
    kept.commit(kept.batch("P1"), Change(NOW, controls=[control(B01)], treated=frozenset("C")))
    kept.commit(kept.batch("P1"), Change(NOW, adaptation=adaptation("s2"), treated=frozenset("D")))
    batch = kept.batch("P1")
    assert list(batch.controls) == [A01, B01]
    assert batch.treated == {"C", "D"}
    assert batch.adaptations == {("b1", "s1"), ("b1", "s2")}
    assert batch.pixel_size_um == 0.65
    assert kept.adaptation("P1", "b1", "s1").statistics_id == "s1"


def test_the_latest_answer_of_a_well_takes_the_place_of_the_one_before(kept):
    kept.commit(NEW, Change(NOW, answers=[answer("E05"), answer("A02")]))
    kept.commit(kept.batch("P1"), Change(NOW, answers=[answer("E05", "s2")]))
    assert [(item.well, item.statistics_id) for item in kept.answers("P1")] == [("A02", "s1"), ("E05", "s2")]


def test_a_site_sent_again_takes_the_place_of_the_kept_one_and_the_old_file_goes(kept, any_storage):
    kept.commit(NEW, Change(NOW, controls=[control(A01)]))
    before = kept.batch("P1")
    site, image = control(A01, seed=1)
    kept.commit(before, Change(NOW, controls=[(site, image)]))
    assert kept.batch("P1").controls == {A01: site}
    assert kept.image(kept.batch("P1"), A01).pixels.tobytes() == pixels_of(A01, 1).tobytes()
    assert kept.image(before, A01) is None
    assert any_storage.blobs.names("batches/mine") == [f"batches/mine/{site.blob}"]


def test_a_commit_from_another_revision_changes_nothing(kept):
    old = BatchRecord("P1", "another.revision", changed_at=NOW)
    kept.commit(NEW, Change(NOW, controls=[control(A01)]))
    before = kept.batch("P1")
    for stale in (NEW, old):
        with pytest.raises(RevisionConflictError):
            kept.commit(stale, Change(NOW, controls=[control(B01)], treated=frozenset({"E05"}), answers=[answer("E05")]))
    assert kept.batch("P1") == before
    assert kept.answers("P1") == []


def test_a_batch_made_anew_is_not_taken_for_the_deleted_one(kept):
    kept.commit(NEW, Change(NOW, controls=[control(A01)]))
    old = kept.batch("P1")
    kept.delete(old, also())
    kept.commit(NEW, Change(NOW, controls=[control(B01)]))
    with pytest.raises(RevisionConflictError):
        kept.commit(old, Change(NOW, treated=frozenset({"E05"})))
    assert list(kept.batch("P1").controls) == [B01]
    assert kept.batch("P1").incarnation != old.incarnation


def test_a_batch_keeps_its_incarnation_until_it_is_deleted(kept):
    kept.commit(NEW, Change(NOW, controls=[control(A01)]))
    first = kept.batch("P1")
    kept.commit(first, Change(NOW, treated=frozenset({"E05"})))
    second = kept.batch("P1")
    assert (second.incarnation, second.revision != first.revision) == (first.incarnation, True)


def test_a_deleted_batch_leaves_nothing_but_its_entry_in_the_audit_log(kept, any_storage):
    staged = staged_plane(b"abc")
    kept.commit(NEW, Change(NOW, 0.65, [control(A01)], frozenset({"E05"}), adaptation(), answers=[answer("E05")]))
    kept.stage(kept.batch("P1"), staged, b"abc", NOW, also())
    kept.commit(BatchRecord("P10"), Change(NOW, controls=[control(A01)]))
    assert kept.batch_ids() == ["P1", "P10"]
    kept.delete(kept.batch("P1"), also())
    assert kept.batch("P1") is None
    assert kept.staged("P1") == kept.answers("P1") == []
    assert kept.batch_ids() == ["P10"]
    assert [key for key, _ in any_storage.records.scan("part/mine/P1/")] == []
    (site,) = kept.batch("P10").controls.values()
    assert any_storage.blobs.names("batches/mine") == [f"batches/mine/{site.blob}"]
    assert kept.usage.kept_bytes() == site.size
    assert [name for name in any_storage.blobs.names("journal/batch/mine/P1/") if "-gone-" not in name] == []


def test_tenants_do_not_see_each_other(any_storage):
    mine, other = any_storage.of("mine"), any_storage.of("other")
    mine.commit(NEW, Change(NOW, controls=[control(A01)]))
    assert other.batch("P1") is None
    assert other.batch_ids() == []
    assert mine.batch_ids() == ["P1"]


def test_a_plane_is_staged_once_and_replaced_only_by_who_saw_it(kept, any_storage):
    first, second = staged_plane(b"abc"), staged_plane(b"abd")
    kept.stage(NEW, first, b"abc", NOW, also())
    batch = kept.batch("P1")
    with kept.file(batch, first.blob) as path:
        assert path.read_bytes() == b"abc"
    with pytest.raises(RevisionConflictError):
        kept.stage(batch, second, b"abd", NOW, also())
    assert len(any_storage.blobs.names("batches/mine")) == 1, "what was refused is not left behind"
    kept.stage(batch, second, b"abd", NOW, also(), instead_of=first)
    assert kept.staged("P1") == [second]
    assert kept.staged_plane("P1", first.key) == second
    with pytest.raises(BatchBusyError, match="replaced while they were read"), kept.file(batch, first.blob):
        pass
    kept.delete(batch, also())
    with pytest.raises(BatchNotFoundError, match="was deleted"), kept.file(batch, second.blob):
        pass


def test_a_file_that_goes_while_it_is_read_is_told_as_what_happened(kept):
    plane = staged_plane(b"abc")
    kept.stage(NEW, plane, b"abc", NOW, also())
    batch = kept.batch("P1")

    def read_late():
        with kept.file(batch, plane.blob):
            kept.delete(batch, also())
            raise FileNotFoundError  # as a worker finds that opens it by its name

    with pytest.raises(BatchNotFoundError, match="was deleted"):
        read_late()


def test_a_file_that_is_gone_without_a_reason_is_told_as_missing(kept, any_storage):
    kept.commit(NEW, Change(NOW, controls=[control(A01)]))
    any_storage.blobs.delete(any_storage.blobs.names("batches/mine"))
    with pytest.raises(BlobMissingError):
        kept.image(kept.batch("P1"), A01)


def test_bytes_are_counted_as_they_come_and_go(kept):
    site, image = control(A01)
    kept.commit(NEW, Change(NOW, controls=[(site, image)]))
    planes = [staged_plane(data, well) for well, data in (("E05", b"abc"), ("F05", b"defg"))]
    for item, data in zip(planes, (b"abc", b"defg"), strict=True):
        kept.stage(kept.batch("P1"), item, data, NOW, also())
    assert kept.usage.kept_bytes() == len(image) + 7
    kept.stage(kept.batch("P1"), staged_plane(b"hijkl"), b"hijkl", NOW, also(), instead_of=planes[0])
    assert kept.usage.kept_bytes() == len(image) + 9
    kept.unstage(kept.batch("P1"), [planes[1]], also())
    assert kept.usage.kept_bytes() == len(image) + 5
    assert [item.key.well for item in kept.staged("P1")] == ["E05"]
    kept.delete(kept.batch("P1"), also())
    assert kept.usage.kept_bytes() == 0


def test_what_does_not_fit_a_tenants_room_is_not_kept_and_takes_none(any_storage):
    site, image = control(A01)
    full = Storage(any_storage.records, any_storage.blobs, lambda _: len(image) + 2).of("mine")
    full.commit(NEW, Change(NOW, controls=[(site, image)]))
    before = full.batch("P1")
    with pytest.raises(QuotaExceededError, match="3 more do not fit"):
        full.stage(before, staged_plane(b"abc"), b"abc", NOW, also())
    with pytest.raises(QuotaExceededError):
        full.commit(before, Change(NOW, controls=[control(B01)]))
    assert (full.batch("P1"), full.staged("P1")) == (before, [])
    assert any_storage.blobs.names("batches/mine") == [f"batches/mine/{site.blob}"]
    full.commit(before, Change(NOW, controls=[control(A01, seed=1)]))  # in the place of the one before
    full.stage(full.batch("P1"), staged_plane(b"ab"), b"ab", NOW, also())
    assert Storage(any_storage.records, any_storage.blobs).of("other").usage.kept_bytes() == 0


def test_what_this_process_changed_is_what_it_knows_while_the_store_is_away(kept):
    kept.commit(NEW, Change(NOW, controls=[control(A01)]))
    assert list(kept.last_known("P1").controls) == [A01]
    kept.commit(kept.last_known("P1"), Change(NOW, controls=[control(B01)]))
    assert list(kept.last_known("P1").controls) == [A01, B01]
    kept.delete(kept.last_known("P1"), also())
    assert kept.last_known("P1") is None


def test_a_kept_image_that_was_damaged_is_never_measured(kept, any_storage):
    kept.commit(NEW, Change(NOW, controls=[control(A01)]))
    (name,) = any_storage.blobs.names("batches/mine")
    data = bytearray(any_storage.blobs.get(name))
    data[-1] ^= 1
    any_storage.blobs.put(name, bytes(data))
    with pytest.raises(BlobMissingError, match="well A01 site 1 of batch P1 was damaged"):
        kept.image(kept.batch("P1"), A01)


def test_kept_arrays_are_never_pickles():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        image_from_bytes(buffer.getvalue())


def test_statistics_are_named_once_for_the_same_controls_and_anew_for_others(bundle, monkeypatch):
    view, named = BundleView(bundle, "fp32", max_context_sites=4), []
    monkeypatch.setattr("service.kept.statistics_id", lambda **given: named.append(given) or statistics_id(**given))
    site = ControlSite(A01, dict.fromkeys(bundle.manifest.channels, "0" * 64), view.recipe_digest, "0a1/b", 1)
    batch = BatchRecord("P1", controls={A01: site})

    def name(batch, **how):
        return view.wanted(batch, view.usable(batch), **how).name

    first = name(batch)
    assert name(batch) == name(replace(batch, treated=frozenset({"C03"}))) == first
    assert len(named) == 1
    other = replace(site, planes=dict.fromkeys(bundle.manifest.channels, "1" * 64))
    changed = [replace(batch, controls=controls) for controls in ({A01: other}, {B01: site})]
    assert len({first, name(batch, blend=True), name(replace(batch, pixel_size_um=1.5)), *map(name, changed)}) == 5
    assert name(replace(batch, controls=dict(batch.controls))) == first


def test_a_change_without_controls_leaves_a_batch_those_that_it_had(storage):
    store = storage.of("default")
    first = store.commit(NEW, Change(NOW, controls=[control(A01)]))
    after = store.commit(first, Change(NOW, treated=frozenset({"C03"})))
    assert after.controls is first.controls
    assert store.commit(after, Change(NOW, controls=[control(B01)])).controls.keys() == {A01, B01}
