"""A screen on a Ray cluster: actors on its machines that each answer plates. The only module that knows Ray.

Each actor has an engine and decoders of its own. A plate whose actor or machine is lost is answered by another; what was
written of it stands only when it is whole. Index, bundle and images lie where every machine sees them.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.data

from service.index import ScreenIndex
from service.screen import Outcome, RayCluster
from service.settings import Settings


class PlateActor:
    """Answers the plates that it is given, one by one; lives in a process of its own."""

    def __init__(self, index: str, settings: dict[str, Any], out: str) -> None:
        from service.app import screening  # noqa: PLC0415 (the driver needs no engine)

        self._index = ScreenIndex.open(Path(index))
        self._open = ExitStack()
        folder = Path(self._open.enter_context(TemporaryDirectory(prefix="anchorwell-screen-")))
        self._screener = self._open.enter_context(screening(Settings(**{**settings, "data": folder / "lab"}), out))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answer the plate that a row names."""
        outcome = self._screener.answer(self._index.plate(row["plate"]))
        return {"outcome": json.dumps(asdict(outcome))}


def answered_on(
    cluster: RayCluster, index: ScreenIndex, plates: Sequence[str], settings: Settings, out: str
) -> Iterator[Outcome]:
    """Answer plates on a cluster, as they are done.

    Raises:
        ConnectionError: no cluster answers at the address.
    """
    if not plates:
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of what Ray Data itself does
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"plate": name} for name in plates], override_num_blocks=len(plates))
    own = settings.model_copy(update={"threads": settings.threads or cluster.cores})
    given = {"index": str(index.path.absolute()), "settings": own.model_dump(mode="json", exclude={"data"}), "out": out}
    answers = rows.map(
        PlateActor,  # type: ignore[arg-type]
        fn_constructor_kwargs=given,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=cluster.actors),
        num_cpus=cluster.cores,
        num_gpus=cluster.gpus,
    )
    try:
        for row in answers.iter_rows():
            yield Outcome(**json.loads(row["outcome"]))
    finally:
        ray.shutdown()
