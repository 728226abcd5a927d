"""Clients that keep a stack busy: each adapts batches and classifies wells, and compares every answer with the right one."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from examples.demo import Plate
from model.layout import parse_file_name
from service.client import AnchorwellClient
from service.schemas import Prediction

Right = Mapping[str, Mapping[str, float]]
"""The right answer: well, class, probability."""


def probabilities(prediction: Prediction) -> Right:
    """What an answer says, by well."""
    return {well.well: dict(well.probabilities) for well in prediction.wells}


def difference(found: Right, right: Right) -> float:
    """The largest difference of a probability, over the wells found."""
    return max(abs(value - right[well][name]) for well, of in found.items() for name, value in of.items())


def wells_of(plate: Plate, count: int) -> list:
    """The files of a plate's first treated wells."""
    wells = {path: parse_file_name(path.name).well for path in plate.treated}
    chosen = sorted(set(wells.values()))[:count]
    return [path for path, well in wells.items() if well in chosen]


@dataclass
class Load:
    """So many clients, from ``with`` to its end."""

    url: str
    plate: Plate
    right: Right
    clients: int = 4
    wells: int = 2
    requests: int = 0
    failures: list[str] = field(default_factory=list)
    worst: float = 0.0
    kept: dict[str, int] = field(default_factory=dict)
    bundles: set[str] = field(default_factory=set)
    longest_s: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        for number in range(self.clients):
            thread = threading.Thread(target=self._client, args=(number,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(180)
            if thread.is_alive():
                self.failures.append("a client waits for its answer still")

    def _client(self, number: int) -> None:
        files, round_ = wells_of(self.plate, self.wells), 0
        with AnchorwellClient(self.url) as client:
            while not self._over.is_set():
                batch = f"load-{number}-{round_}"
                round_ += 1
                adapted = self._timed(lambda batch=batch: client.adapt(batch, self.plate.controls, pixel_size_um=self.size))
                if adapted is None:
                    continue
                with self._lock:
                    self.kept[batch] = adapted.control_wells
                for _ in range(3):
                    answer = self._timed(lambda batch=batch: self._predicted(client, batch, files))
                    if answer is not None:
                        with self._lock:
                            self.worst = max(self.worst, difference(probabilities(answer), self.right))
                            self.bundles.add(answer.bundle)

    def _predicted(self, client: AnchorwellClient, batch: str, files: list) -> Prediction:
        """Classify wells, each in a request of its own: the client has to make one answer of them."""
        return client.predict(batch, files, pixel_size_um=self.size, request_bytes=1)

    @property
    def size(self) -> float:
        """Of the plate's pixels, in µm."""
        return self.plate.pixel_size_um

    def _timed(self, ask):
        begun = time.monotonic()
        try:
            answer = ask()
        except Exception as error:  # noqa: BLE001 (whatever it is, somebody got no answer)
            with self._lock:
                self.failures.append(f"{type(error).__name__}: {error}")
            time.sleep(0.5)
            return None
        with self._lock:
            self.requests += 1
            self.longest_s = max(self.longest_s, time.monotonic() - begun)
        return answer
