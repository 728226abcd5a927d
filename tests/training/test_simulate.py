import json
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from csv import DictReader
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from model.layout import Role
from training.optics import CHANNELS, PIXEL_SIZES_UM, RANGES, WORST_BLUR_UM, conditions, photograph
from training.phenotypes import PHENOTYPES, draw_cells, paint
from training.simulate import (
    CLASSES,
    PlateBatch,
    SimulatedWell,
    SimulationPlan,
    plate_batches,
    plate_wells,
    render_site,
    simulate,
    well_conditions,
)

DOCS = Path(__file__).parents[2] / "docs" / "simulator.md"
SMALL = SimulationPlan(labs=1, batches=1, plates=1, sites=1, size_px=48, wells_per_class=1, inactive_wells=2)
PLATE = PlateBatch(lab=1, batch=1, plate=1)
SITES = 12


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(DictReader(file))


# --- the same seed is the same data ----------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    simulate(SMALL, tmp_path / "one", workers=1)
    simulate(SMALL, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_lab_alone_equals_the_same_lab_among_others(tmp_path):
    simulate(replace(SMALL, labs=3), tmp_path / "three")
    simulate(replace(SMALL, first_lab=2), tmp_path / "alone")
    alone = contents(tmp_path / "alone" / "simulated_02")
    assert alone == contents(tmp_path / "three" / "simulated_02")
    assert len(alone) == (16 + 8 + 2) * 5 + 2


def test_plan_sizes_do_not_change_a_site():
    well = SimulatedWell(2, 5, "DMSO", "DMSO", Role.CONTROL)
    larger = replace(SMALL, batches=4, plates=5, sites=3, wells_per_class=4)
    np.testing.assert_array_equal(render_site(SMALL, PLATE, well, 1), render_site(larger, PLATE, well, 1))


def test_every_place_and_every_seed_has_its_own_image():
    well = SimulatedWell(2, 5, "DMSO", "DMSO", Role.CONTROL)
    images = [
        render_site(SMALL, PLATE, well, 1),
        render_site(SMALL, PLATE, well, 2),
        render_site(SMALL, PLATE, replace(well, row=3), 1),
        render_site(SMALL, replace(PLATE, plate=2), well, 1),
        render_site(replace(SMALL, seed=8), PLATE, well, 1),
    ]
    assert len({image.tobytes() for image in images}) == len(images)


def test_inactive_compounds_are_drawn_from_exactly_the_untreated_phenotype():
    assert PHENOTYPES["inactive"] is PHENOTYPES["DMSO"]
    control = SimulatedWell(2, 5, "DMSO", "DMSO", Role.CONTROL)
    inactive = SimulatedWell(2, 5, "SIM-I01", "inactive", Role.TREATED)
    np.testing.assert_array_equal(render_site(SMALL, PLATE, control, 1), render_site(SMALL, PLATE, inactive, 1))


# --- plates and files ------------------------------------------------------------------------------------------------


def test_a_full_96_well_plate_has_controls_at_both_ends_and_every_class_between():
    wells = plate_wells(SimulationPlan(), PLATE)
    assert len({well.name for well in wells}) == 96
    assert {well.column for well in wells if well.role == Role.CONTROL} == {0, 11}
    assert {well.role for well in wells if well.label == "DMSO"} == {Role.CONTROL}
    assert Counter(well.label for well in wells) == {"DMSO": 16, "inactive": 16, **dict.fromkeys(CLASSES, 8)}


def test_a_384_well_plate_has_its_controls_in_columns_02_and_23():
    wells = plate_wells(SimulationPlan(plate_format=384, wells_per_class=30, novel_wells=5), PLATE)
    assert Counter(well.name[1:] for well in wells if well.role == Role.CONTROL) == {"02": 16, "23": 16}
    treated = [well for well in wells if well.role == Role.TREATED]
    assert {well.name[1:] for well in treated} <= {f"{column:02d}" for column in range(3, 23)}
    assert Counter(well.label for well in treated)["novel"] == 5


def test_treated_positions_differ_between_plates():
    first, second = (plate_wells(SimulationPlan(), plate) for plate in plate_batches(SimulationPlan())[:2])
    assert [well.label for well in first] != [well.label for well in second]


def test_empty_wells_are_not_written_and_tables_follow_jump(tmp_path):
    heard = []
    report = simulate(replace(SMALL, sites=2), tmp_path, progress=lambda done, total: heard.append((done, total)))
    folder = tmp_path / report.plates[0]
    sites, wells = rows(folder / "load_data.csv"), rows(folder / "platemap.csv")
    assert len(sites) == report.sites == 2 * len(wells) == 52
    assert heard[-1] == (52, 52)
    assert list(wells[0]) == ["well", "compound", "label", "role"]
    assert {row["role"] for row in wells} == {"control", "treated"}
    assert {row["Metadata_Source"] for row in sites} == {"simulated_01"}
    for channel in CHANNELS:
        files = [folder / row[f"PathName_Orig{channel}"] / row[f"FileName_Orig{channel}"] for row in sites]
        assert all(file.is_file() for file in files)
    assert len(list((folder / "images").iterdir())) == 5 * len(sites)
    (metres,) = {row[f"Metadata_ImageResolution{axis}"] for row in sites for axis in "XY"}
    assert metres in {f"{size * 1e-6:.9g}" for size in PIXEL_SIZES_UM}


def test_files_hold_one_plain_uint16_plane_and_no_tag_that_varies(tmp_path):
    simulate(SMALL, tmp_path)
    path = tmp_path / PLATE.folder / "images" / "A01_1_DNA.tif"
    with tifffile.TiffFile(path) as file:
        (page,) = file.pages
        assert (page.dtype, page.shape, page.compression) == (np.uint16, (48, 48), 1)
        assert not {"Software", "DateTime", "ImageDescription"} & {tag.name for tag in page.tags}
        well = SimulatedWell(0, 0, "DMSO", "DMSO", Role.CONTROL)
        np.testing.assert_array_equal(page.asarray(), render_site(SMALL, PLATE, well, 1)[0])


def test_the_record_says_simulated_and_holds_what_was_drawn(tmp_path):
    simulate(SMALL, tmp_path)
    record = json.loads((tmp_path / "simulation.json").read_text())
    assert (record["format"], record["simulated"], record["plan"]["seed"]) == (1, True, 7)
    lab = record["labs"]["simulated_01"]
    plate = lab["batches"]["SIM01_B01"]["plates"]["SIM01B01P01"]
    assert len(plate["drawn"]["gain"]) == len(CHANNELS)
    assert set(RANGES) < set(lab["drawn"])


def test_a_folder_with_a_finished_simulation_is_refused(tmp_path):
    simulate(SMALL, tmp_path)
    with pytest.raises(FileExistsError, match="choose an empty folder"):
        simulate(SMALL, tmp_path)


class StoppedError(Exception):
    """The simulation stops here."""


def stopped(plan: SimulationPlan, out: Path) -> None:
    def stop(done: int, total: int) -> None:  # noqa: ARG001 (a progress's shape)
        raise StoppedError

    with pytest.raises(StoppedError):
        simulate(plan, out, progress=stop)


def test_a_simulation_that_was_stopped_is_begun_again_by_the_same_plan_alone(tmp_path):
    stopped(replace(SMALL, plates=2), tmp_path / "stopped")
    with pytest.raises(FileExistsError, match="is of another plan: choose an empty folder"):
        simulate(SMALL, tmp_path / "stopped")
    simulate(replace(SMALL, plates=2), tmp_path / "stopped")
    simulate(replace(SMALL, plates=2), tmp_path / "whole")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may have more bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 1_000, 4_000])
def test_a_simulation_whose_disk_was_full_is_gone_on_with(tmp_path, size):
    out = tmp_path / "full"
    with small_files(size), pytest.raises(OSError, match="File too large"):
        simulate(SMALL, out)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    simulate(SMALL, out)
    simulate(SMALL, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_record_that_cannot_be_written_leaves_a_simulation_to_go_on_with(tmp_path):
    plan = replace(SMALL, plates=2, wells_per_class=0, inactive_wells=0)
    simulate(plan, tmp_path / "whole")
    largest = max(len(content) for name, content in contents(tmp_path / "whole").items() if name != "simulation.json")
    assert largest < (tmp_path / "whole" / "simulation.json").stat().st_size
    with small_files(largest), pytest.raises(OSError, match="File too large"):
        simulate(plan, tmp_path / "full")
    assert not (tmp_path / "full" / "simulation.json").exists()
    simulate(plan, tmp_path / "full")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_plane_that_cannot_be_written_is_told_by_its_file(tmp_path, workers):
    plan = replace(SMALL, size_px=96)
    with small_files(12_000), pytest.raises(OSError, match="File too large") as told:
        simulate(plan, tmp_path, workers)
    assert Path(told.value.filename).suffix == ".tif"


def test_of_two_that_simulate_the_same_at_once_neither_stumbles_over_the_other(tmp_path):
    def other_ends(done: int, total: int) -> None:
        if done == total:
            (tmp_path / "simulation.plan.json").unlink()

    simulate(SMALL, tmp_path, progress=other_ends)
    assert (tmp_path / "simulation.json").is_file()


def test_a_folder_with_anything_else_in_it_is_refused(tmp_path):
    (tmp_path / "simulated_01").mkdir()
    with pytest.raises(FileExistsError, match="is not empty and no simulation was begun there"):
        simulate(SMALL, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plate_format": 24}, "96 or 384"),
        ({"labs": 0}, "labs is 0"),
        ({"novel_wells": -1}, "cannot be negative"),
        ({"wells_per_class": 11}, "room for 80"),
        ({"size_px": 2048}, "32 to 512"),
    ],
)
def test_an_impossible_plan_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        SimulationPlan(**change)


# --- what labs do ----------------------------------------------------------------------------------------------------


def test_conditions_stay_within_their_limits_at_any_draw():
    width = sum(limits.width for limits in RANGES.values())
    for deviate in (-9.0, 0.0, 9.0):
        at = conditions(np.full((4, width), deviate), 0.65)
        for name, limits in RANGES.items():
            assert np.all(np.asarray(getattr(at, name)) >= limits.low)
            assert np.all(np.asarray(getattr(at, name)) <= limits.high)


def test_labs_differ_more_than_batches_and_batches_more_than_plates():
    plates = plate_batches(SimulationPlan(labs=12))
    well = SimulatedWell(3, 4, "DMSO", "DMSO", Role.CONTROL)
    gain = np.log([well_conditions(SMALL, plate, well).gain for plate in plates]).reshape(12, 3, 2, 5)
    lab = gain.mean((1, 2)).std(0).mean()
    batch, plate = gain.mean(2).std(1).mean(), gain.std(2).mean()
    assert lab > 2 * batch > 2 * plate > 0


def test_the_documentation_states_every_range():
    text = DOCS.read_text()
    for name, limits in RANGES.items():
        spread = " / ".join(f"{level:g}" for level in limits.spread)
        assert f"| `{name}` | {limits.centre:g} | {spread} | {limits.low:g} to {limits.high:g} |" in text


# --- what compounds do -----------------------------------------------------------------------------------------------


def measure(image: NDArray[np.uint16]) -> dict[str, float]:
    """Simple statistics of one site, one for each axis that a phenotype moves."""
    dna, er, _, agp, mito = image.astype(np.float32) - np.percentile(image, 1, axis=(1, 2))[:, None, None]
    smooth = ndimage.gaussian_filter(dna, 1.5)
    nuclei = smooth > 0.3 * np.percentile(smooth, 98)
    sizes = np.bincount(ndimage.label(nuclei)[0].ravel())[1:]
    body = ndimage.gaussian_filter(image[2].astype(np.float32), 2)
    cells = body > np.percentile(body, 1) + 0.15 * np.ptp(np.percentile(body, [1, 98]))
    core, away = ndimage.binary_erosion(nuclei, iterations=2), ndimage.distance_transform_edt(~nuclei)
    rim, cytoplasm = ndimage.distance_transform_edt(cells) < 4, cells & ~nuclei

    def coarse(plane: NDArray[np.float32], mask: NDArray[np.bool_], sigma: float) -> float:
        band = ndimage.gaussian_filter(plane, sigma) - ndimage.gaussian_filter(plane, 2 * sigma)
        return float(band[mask].std() / plane[mask].mean())

    return {
        "nuclei": float((sizes > 60).sum()),
        "nuclear area": float(sizes[sizes > 60].mean()),
        "chromatin texture": coarse(dna, core, 2.0),
        "mito texture": coarse(mito, cytoplasm, 2.0),
        "mito near nucleus": float(mito[cells & (away > 0) & (away < 6)].mean() / mito[cells & (away > 10)].mean()),
        "actin at the edge": float(agp[cells & rim].mean() / agp[cytoplasm & ~rim].mean()),
        "er texture": coarse(er, cytoplasm, 2.0),
    }


def sites(label: str, focus_um: float) -> list[NDArray[np.uint16]]:
    """SITES images of wells of lab 3, focused as told; the same cells for every label where the count is the same."""
    images = []
    for number in range(SITES):
        well = SimulatedWell(1 + number % 6, 2 + number // 6, "", label, Role.TREATED)
        at = well_conditions(SMALL, PlateBatch(3, 1, 1), well)
        at = replace(at, focus_um=focus_um, channel_focus=(1.0,) * 5)
        rng = np.random.default_rng(number)
        cells = draw_cells(PHENOTYPES[label], 1.0, 280, at, rng)
        images.append(photograph(paint(cells, 280, at, rng), 256, at, rng))
    return images


@pytest.fixture(scope="module", params=[0.6, WORST_BLUR_UM], ids=["sharp", "worst focus"])
def plate(request: pytest.FixtureRequest) -> dict[str, list[NDArray[np.uint16]]]:
    return {label: sites(label, request.param) for label in ("DMSO", *CLASSES)}


AXES = {
    "antimitotic": ("nuclear area", +1),
    "cytostatic": ("nuclei", -1),
    "chromatin_condensed": ("nuclear area", -1),
    "chromatin_coarse": ("chromatin texture", +1),
    "mito_fragmented": ("mito texture", +1),
    "mito_perinuclear": ("mito near nucleus", +1),
    "actin_edge": ("actin at the edge", +1),
    "er_granular": ("er texture", +1),
}


def test_every_class_moves_its_own_axis_away_from_the_controls_even_out_of_focus(plate):
    measured = {label: [measure(image) for image in images] for label, images in plate.items()}
    effects = {}
    for label, (axis, sign) in AXES.items():
        treated, control = (np.array([site[axis] for site in measured[name]]) for name in (label, "DMSO"))
        effects[label] = float(sign * (treated.mean() - control.mean()) / control.std())
    assert min(effects.values()) > 0.6, effects


def test_total_intensities_alone_hardly_tell_the_classes_apart(plate):
    totals = np.log([[image.mean((1, 2), dtype=float) for image in plate[label]] for label in CLASSES])
    totals /= totals.std((0, 1))
    right = 0
    for truth in range(len(CLASSES)):
        for site in range(SITES):
            means = totals.mean(1)
            means[truth] = np.delete(totals[truth], site, axis=0).mean(0)
            right += int(np.square(means - totals[truth, site]).sum(1).argmin() == truth)
    accuracy = right / (SITES * len(CLASSES))
    assert accuracy < 0.4  # chance is 0.125; fewer cells are less light, so it cannot fall to chance


def test_images_are_uint16_of_the_size_asked_for_and_rarely_saturated(plate):
    images = np.stack([image for images in plate.values() for image in images])
    assert images.shape[1:] == (5, 256, 256)
    assert images.dtype == np.uint16
    assert (images == np.iinfo(np.uint16).max).mean() < 1e-3
    assert images.max() > 4095


def test_jumps_tables_of_the_simulation_tell_what_the_plate_maps_tell(tmp_path):
    simulate(replace(SMALL, labs=2), tmp_path)
    plates = rows(tmp_path / "metadata" / "plate.csv")
    assert [row["Metadata_Plate"] for row in plates] == ["SIM01B01P01", "SIM02B01P01"]
    labels = {row["Metadata_JCP2022"]: row["label"] for row in rows(tmp_path / "metadata" / "moa.csv")}
    controls = {row["Metadata_JCP2022"] for row in rows(tmp_path / "metadata" / "perturbation_control.csv")}
    told = {
        (row["Metadata_Plate"], row["Metadata_Well"]): labels.get(row["Metadata_JCP2022"], "DMSO")
        for row in rows(tmp_path / "metadata" / "well.csv")
        if row["Metadata_JCP2022"] in {*labels, *controls}
    }
    for plate in plates:
        folder = Path(plate["Metadata_Source"]) / plate["Metadata_Batch"] / plate["Metadata_Plate"]
        mapped = {row["well"]: row["label"] for row in rows(tmp_path / folder / "platemap.csv")}
        assert mapped == {well: label for (name, well), label in told.items() if name == plate["Metadata_Plate"]}
