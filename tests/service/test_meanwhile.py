"""What happens to a batch while a request is worked on, and what a process says while the store is away."""

import pytest

from model.images import ImageRecipe
from service.errors import StoreUnavailableError
from service.records import MemoryRecords
from service.storage import Storage
from tests.service.conftest import running
from tests.service.plates import CHANNELS, CONTROL_WELLS, FakeEngine, fake_bundle, image, ome_tiff, plane, well_files
from tests.service.test_images import post_staged, put_plane, staged
from tests.service.test_routes import adapted, by_well, predicted

KEY = {"Idempotency-Key": "k"}
OTHER_RECIPE = ImageRecipe(channels=CHANNELS, size=8, shrink=2)


def once(engine, what, before):
    """Let something happen when the engine is next asked to measure, or to classify."""
    really = getattr(engine, what)

    def interrupted(*arguments):
        setattr(engine, what, really)
        before()
        return really(*arguments)

    setattr(engine, what, interrupted)


def slug(answer):
    return answer.json()["type"].rpartition("/")[2]


# --- deleted, replaced, superseded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["form", "staged"])
def test_controls_of_a_batch_that_is_deleted_meanwhile_do_not_bring_it_back(way, client, engine, storage):
    staged(client, CONTROL_WELLS)
    once(engine, "measure", lambda: client.delete("/batches/P1"))
    if way == "form":
        answer = client.post("/batches/P1/controls", files=well_files(CONTROL_WELLS))
    else:
        answer = post_staged(client, "controls", wells=CONTROL_WELLS)
    assert (answer.status_code, slug(answer)) == (404, "batch-not-found")
    assert client.get("/batches").json()["batches"] == []
    assert storage.blobs.names("batches/") == []


def test_answers_on_superseded_statistics_do_not_take_the_place_of_newer_ones(client, engine):
    adapted(client)

    def changed():
        adapted(client, wells=["G01"])
        predicted(client, ["E05"])

    once(engine, "classify", changed)
    late = predicted(client, ["E05", "F05"])
    assert any("superseded statistics" in notice for notice in late["notices"])
    kept = by_well(client.get("/batches/P1/predictions").json())
    assert (kept["E05"]["stale"], kept["F05"]["stale"]) == (False, True)
    assert not any("superseded" in notice for notice in predicted(client, ["E05"])["notices"])


@pytest.mark.parametrize(
    ("happens", "expected"),
    [
        (lambda client: put_plane(client, "P1", "F05", 1, "DNA", salt="other", replace=True), (503, "batch-busy")),
        (lambda client: client.delete("/batches/P1"), (404, "batch-not-found")),
    ],
)
def test_planes_that_go_while_they_are_asked_for_are_told_so(happens, expected, client, monkeypatch):
    adapted(client)
    staged(client, ["E05", "F05"], sites=(1, 2, 3))
    named = client.app.state.served.receiver

    def late(*arguments):
        upload = type(named).named(named, *arguments)
        happens(client)
        return upload

    monkeypatch.setitem(vars(named), "named", late)
    answer = post_staged(client, "predict")
    assert (answer.status_code, slug(answer)) == expected


def test_an_unadapted_answer_may_be_repeated_although_the_batch_changes_meanwhile(client, engine):
    adapted(client)
    once(engine, "classify", lambda: adapted(client, wells=["G01"]))
    options = {"params": {"context": "source"}, "headers": KEY}
    first = predicted(client, ["E05"], **options)
    assert predicted(client, ["E05"], **options) == first


# --- another bundle --------------------------------------------------------------------------------------------------


def test_a_bundle_with_another_recipe_uses_the_kept_controls(client, settings, storage, tmp_path):
    adapted(client)
    staged(client, ["E01"])
    post_staged(client, "controls", wells=["E01"])
    other = settings.model_copy(update={"bundle": fake_bundle(tmp_path / "other", recipe=OTHER_RECIPE).path})
    with running(other, FakeEngine(), storage) as later:
        prediction = predicted(later, ["E05"])
        prepared = storage.blobs.names("batches/")
        alone = adapted(later, "P2", wells=[*CONTROL_WELLS, "E01"])
        assert prediction["statistics_id"] == alone["statistics_id"]
        assert by_well(predicted(later, ["E05"], batch="P2"))["E05"] == by_well(prediction)["E05"]
    back = predicted(client, ["E05"])
    assert (back["context_sites"], client.get("/batches/P1").json()["unusable_sites"]) == (6, 0)
    assert set(prepared) <= set(storage.blobs.names("batches/")), "statistics that are kept need no images"
    assert adapted(client, wells=["E01"])["context_sites"] == 6
    assert storage.of("default").usage.kept_bytes() == sum(
        len(storage.blobs.get(name)) for name in storage.blobs.names("batches/")
    )


def test_a_bundle_with_another_channel_asks_for_it_and_the_first_goes_on(client, settings, storage, tmp_path):
    first = adapted(client)
    channels = ("DNA", "ER", "Mito")
    recipe = ImageRecipe(channels=channels, size=8, shrink=2)
    other = settings.model_copy(update={"bundle": fake_bundle(tmp_path / "other", recipe=recipe).path})
    with running(other, FakeEngine(), storage) as later:
        answer = later.post("/batches/P1/predict", files=well_files(["E05"], channels=channels))
        assert (answer.status_code, slug(answer)) == (409, "controls-of-another-recipe")
    assert predicted(client, ["E05"])["statistics_id"] == first["statistics_id"]


def test_channels_of_one_file_are_kept_once_and_prepared_anew(client, settings, storage, tmp_path):
    files = [
        image(f"{well}_1.ome.tif", ome_tiff(CHANNELS, [plane((well, name)) for name in CHANNELS])) for well in CONTROL_WELLS
    ]
    assert client.post("/batches/P1/controls", files=files).status_code == 201
    assert len(storage.blobs.names("batches/")) == 2 * len(CONTROL_WELLS)
    other = settings.model_copy(update={"bundle": fake_bundle(tmp_path / "other", recipe=OTHER_RECIPE).path})
    with running(other, FakeEngine(), storage) as later:
        assert predicted(later, ["E05"])["context_wells"] == list(CONTROL_WELLS)


def test_kept_files_go_with_the_controls_that_they_are_of(client, storage):
    adapted(client)
    before = set(storage.blobs.names("batches/"))
    client.post("/batches/P1/controls?replace=true", files=well_files(["A01"], salt="other"))
    after = set(storage.blobs.names("batches/"))
    assert (len(before), len(after), len(before & after)) == (32, 32, 24)
    assert client.post("/batches/P1/controls", files=well_files(["A01"])).status_code == 409
    adapted(client, wells=["B01"])
    assert set(storage.blobs.names("batches/")) == after, "what was refused, or was there, leaves nothing"
    client.delete("/batches/P1")
    assert storage.blobs.names("batches/") == []


# --- the store is away -----------------------------------------------------------------------------------------------


class Distant(MemoryRecords):
    """Records that may be out of reach."""

    away = False

    def read(self, keys):
        if self.away:
            raise StoreUnavailableError("the records are away")
        return super().read(keys)

    def scan(self, prefix, after="", limit=1000):
        if self.away:
            raise StoreUnavailableError("the records are away")
        return super().scan(prefix, after, limit)

    def commit(self, commit):
        if self.away:
            raise StoreUnavailableError("the records are away")
        super().commit(commit)


@pytest.fixture
def distant(settings, storage):
    records = Distant()
    with running(settings.model_copy(update={"workers": 0}), FakeEngine(), Storage(records, storage.blobs)) as client:
        yield client, records


def test_while_the_store_is_away_a_batch_is_answered_on_what_this_process_changed_last(distant):
    client, records = distant
    adapted(client)
    predicted(client, ["E05"])
    replaced = client.post("/batches/P1/controls?replace=true", files=well_files(["A01"], salt="other")).json()
    records.away = True
    prediction = predicted(client, ["E05"])
    assert (prediction["statistics_id"], prediction["kept"]) == (replaced["statistics_id"], False)
    assert any("cannot be reached" in notice for notice in prediction["notices"])
    records.away = False
    again = predicted(client, ["E05"])
    assert (again["kept"], again["wells"]) == (True, prediction["wells"])
    assert not any("cannot be reached" in notice for notice in again["notices"])


def test_while_the_store_is_away_a_batch_that_this_process_deleted_is_not_answered(distant):
    client, records = distant
    adapted(client)
    predicted(client, ["E05"])
    client.delete("/batches/P1")
    records.away = True
    answer = client.post("/batches/P1/predict", files=well_files(["E05"]))
    assert (answer.status_code, slug(answer)) == (503, "store-unavailable")
