"""A well's answer is its own: alone, in company, in any order or chunking, after a restart, from either store; bit for bit.

With the demo bundle on onnxruntime, on simulated wells.
"""

import pytest

from service.settings import Settings
from service.storage import open_storage
from tests.service.conftest import running
from tests.service.plates import image, tiff
from training.simulate import CHANNELS, SimulationPlan, plate_batches, plate_wells, render_site

PLAN = SimulationPlan(labs=1, first_lab=30, batches=1, plates=1, seed=5, sites=2, wells_per_class=1, inactive_wells=0)
WHOLE = "whole"


@pytest.fixture(scope="module")
def plate():
    """Files by well: six control wells and every treated one, two sites each."""
    (batch,) = plate_batches(PLAN)
    wells = plate_wells(PLAN, batch)
    controls = [well for well in wells if well.role == "control"][:6]
    treated = [well for well in wells if well.role == "treated"]
    files = {
        well.name: [
            image(f"{well.name}_{site}_{channel}.tif", tiff(plane))
            for site in (1, 2)
            for channel, plane in zip(CHANNELS, render_site(PLAN, batch, well, site), strict=True)
        ]
        for well in [*controls, *treated]
    }
    return files, [well.name for well in controls], [well.name for well in treated]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def demo_settings(request, demo_bundles, tmp_path):
    return Settings(bundle=demo_bundles / "cs-arm-bn", data=tmp_path / "data", device="cpu", threads=request.param)


def adapt(client, files, wells):
    for well in wells:
        answer = client.post("/batches/P1/controls", files=files[well], data={"pixel_size_um": "0.6"})
        assert answer.status_code == 201, answer.text
    return answer.json()["statistics_id"]


def ask(client, files, wells):
    sent = [file for well in wells for file in files[well]]
    answer = client.post("/batches/P1/predict", files=sent)
    assert answer.status_code == 200, answer.text
    return {well["well"]: well for well in answer.json()["wells"]}


def test_company_order_chunking_and_a_restart_change_no_bit(demo_settings, plate):
    files, controls, treated = plate
    with running(demo_settings, workers=True) as client:
        adapt(client, files, controls)
        whole = ask(client, files, treated)
        assert len({tuple(well["probabilities"].values()) for well in whole.values()}) == len(treated)
        for well in treated[:3]:
            assert ask(client, files, [well])[well] == whole[well]
            shuffled = {well: list(reversed(files[well]))}
            assert ask(client, shuffled, [well])[well] == whole[well]
        assert ask(client, files, list(reversed(treated))) == whole
        assert ask(client, files, treated[:3]) | ask(client, files, treated[3:]) == whole
    with running(demo_settings) as client:
        assert ask(client, files, treated) == whole


def test_both_stores_and_any_order_of_controls_give_the_same_statistics_and_answers(
    demo_settings, plate, any_storage, tmp_path
):
    files, controls, treated = plate
    with running(demo_settings, storage=any_storage) as client:
        name = adapt(client, files, list(reversed(controls)))
        found = ask(client, files, treated[:3])
    with running(demo_settings, storage=open_storage(tmp_path / "reference")) as client:
        assert adapt(client, files, controls) == name
        assert ask(client, files, treated[:3]) == found
