"""Killed with SIGKILL at random moments under mixed load: what was acknowledged is there, and nothing is half there.

Every client notes what it sends before it sends it and what was acknowledged. After each kill the service is started
again and held against the notes: acknowledged uploads, statistics and answers are there unchanged; a request without an
answer took effect whole or not at all; and repeated under its Idempotency-Key it takes effect once. With Redis, every third
kill takes Redis, too.
"""

import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from benchmarks.bars import Bar
from benchmarks.servers import Redis, Service, channels, form, put_plane

CLIENTS = 6
CONTROLS = [f"{row}{column:02d}" for row in "ABCD" for column in (1, 2, 23, 24)]
TREATED = [f"{row}{column:02d}" for row in "EFGHIJ" for column in range(3, 9)]
FIRST_CONTROLS = 8
BATCHES = 4
NEW_BATCH = 0.3


@dataclass
class Notes:
    """What one client knows of one batch."""

    batch: str
    controls: set[str] = field(default_factory=set)
    statistics_id: str | None = None
    answers: dict[str, tuple[str, dict[str, float]]] = field(default_factory=dict)
    staged: set[tuple[str, str]] = field(default_factory=set)
    platemap: bool = False
    deleted: bool = False
    pending: tuple[str, list[str], str] | None = None
    """The request that was sent and not answered: what, its wells, its Idempotency-Key."""


@dataclass
class Tally:
    """What happened, over all rounds."""

    acknowledged: int = 0
    unanswered: int = 0
    unanswered_kept: int = 0
    checked: int = 0
    faults: list[str] = field(default_factory=list)


class Client(threading.Thread):
    """Sends one request after the other, until the service is gone."""

    def __init__(self, url: str, number: int, seed: int, tally: Tally) -> None:
        super().__init__(daemon=True)
        self.http = httpx.Client(base_url=url, timeout=30)
        self.random = random.Random(seed)  # noqa: S311 (a load, no secret)
        self.names = channels()
        self.number = number
        self.tally = tally
        self.notes: list[Notes] = []

    def run(self) -> None:
        """Send until nothing answers."""
        try:
            while True:
                self.step()
        except httpx.TransportError:
            return

    def step(self) -> None:
        """Do one of the things that clients do."""
        living = [note for note in self.notes if not note.deleted]
        if not living or (len(living) < BATCHES and self.random.random() < NEW_BATCH):
            note = Notes(f"K{self.number}-{uuid4().hex[:8]}")
            self.notes.append(note)
            self.send(note, "controls", CONTROLS[:FIRST_CONTROLS])
            return
        note = self.random.choice(living)
        left = [well for well in CONTROLS if well not in note.controls]
        kind = self.random.choices(["controls", "predict", "stage", "platemap", "delete"], [2, 5, 5, 1, 0.5])[0]
        if kind == "controls" and left:
            self.send(note, "controls", left[:2])
        elif kind == "predict":
            self.send(note, "predict", self.random.sample(TREATED, 2))
        elif kind == "stage":
            self.send(note, "stage", [self.random.choice(TREATED)])
        else:
            self.send(note, "delete" if kind == "delete" else "platemap", [])

    def send(self, note: Notes, kind: str, wells: list[str], key: str | None = None) -> None:
        """Send a request, noting it before and its answer after."""
        key = key or uuid4().hex
        note.pending = (kind, wells, key)
        answer = self.sent(note, kind, wells, key)
        if answer.status_code in (429, 503, 409) and "retry-after" in answer.headers:
            time.sleep(0.3)
            self.send(note, kind, wells, key)
            return
        if not answer.is_success:
            gone = kind == "delete" and answer.status_code == httpx.codes.NOT_FOUND
            if not gone:
                self.tally.faults.append(f"{note.batch} {kind} {wells}: {answer.status_code} {answer.text[:200]}")
                note.pending = None
                return
        self.acknowledge(note, kind, wells, answer)
        note.pending = None
        self.tally.acknowledged += 1

    def sent(self, note: Notes, kind: str, wells: list[str], key: str) -> httpx.Response:
        """Send it."""
        headers, place = {"Idempotency-Key": key}, f"/batches/{note.batch}"
        if kind in ("controls", "predict"):
            return self.http.post(f"{place}/{kind}", files=form(note.batch, wells, self.names), headers=headers)
        if kind == "stage":
            return put_plane(self.http, note.batch, wells[0], self.names[0])
        if kind == "platemap":
            rows = [*(f"{well},control" for well in CONTROLS), *(f"{well},treated" for well in TREATED)]
            return self.http.put(f"{place}/platemap", content="\n".join(["well,role", *rows]).encode())
        return self.http.delete(place)

    def acknowledge(self, note: Notes, kind: str, wells: list[str], answer: httpx.Response) -> None:
        """Note what the service promised."""
        if kind == "controls":
            note.controls |= set(wells)
            note.statistics_id = answer.json()["statistics_id"]
        elif kind == "predict":
            body = answer.json()
            note.answers |= {well["well"]: (body["statistics_id"], well["probabilities"]) for well in body["wells"]}
        elif kind == "stage":
            note.staged.add((wells[0], self.names[0]))
        elif kind == "platemap":
            note.platemap = True
        else:
            note.deleted = True

    # --- afterwards --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Hold the service against the notes."""
        for note in self.notes:
            faults = list(self.faults_of(note))
            self.tally.checked += 1
            self.tally.faults += [f"{note.batch}: {fault}" for fault in faults]

    def faults_of(self, note: Notes) -> Any:
        """What is not as it should be."""
        pending_kind, pending_wells, key = note.pending or ("", [], "")
        place = f"/batches/{note.batch}"
        found = self.http.get(place)
        exists = found.status_code == httpx.codes.OK
        if note.deleted or not exists:
            may_be_gone = note.deleted or pending_kind == "delete" or not (note.controls or note.staged or note.platemap)
            if exists or not may_be_gone:
                yield f"is there: {exists}, deleted: {note.deleted}, pending: {pending_kind}"
            if not exists and pending_kind == "delete":
                self.tally.unanswered += 1
                self.tally.unanswered_kept += 1
                note.deleted, note.pending = True, None
            if note.deleted:
                return
        if exists:
            yield from self.differences(note, found.json(), pending_kind, set(pending_wells))
        if note.pending is not None:
            self.tally.unanswered += 1
            self.send(note, pending_kind, pending_wells, key)
            if pending_kind == "controls":
                after = self.http.get(place).json()
                if set(after["control_wells"]) != note.controls or after["control_sites"] != len(note.controls):
                    yield f"repeating a request made other controls: {after['control_wells']}"

    def differences(self, note: Notes, batch: dict[str, Any], pending: str, wells: set[str]) -> Any:
        """What differs from what was acknowledged, beyond the whole effect of the unanswered request."""
        controls = set(batch["control_wells"])
        took_effect = pending == "controls" and controls == note.controls | wells and not wells <= note.controls
        if controls != note.controls and not took_effect:
            yield f"controls {sorted(controls)}, acknowledged {sorted(note.controls)}, pending {pending} {sorted(wells)}"
        if took_effect:
            self.tally.unanswered_kept += 1
        elif note.controls and batch["statistics_id"] != note.statistics_id:
            yield f"statistics {batch['statistics_id']}, acknowledged {note.statistics_id}"
        yield from self.lost(note, pending == "predict", wells)
        if note.answers and not took_effect and pending != "delete":
            yield from self.asked_again(note)

    def lost(self, note: Notes, predicting: bool, wells: set[str]) -> Any:
        """What was acknowledged beside controls, and is not there as it was."""
        place = f"/batches/{note.batch}"
        images = {(item["well"], item["channel"]) for item in self.http.get(f"{place}/images").json()["images"]}
        if not note.staged <= images:
            yield f"staged planes are gone: {note.staged - images}"
        kept = {item["well"]: item for item in self.http.get(f"{place}/predictions").json()["wells"]}
        for well, (statistics_id, probabilities) in note.answers.items():
            if well not in kept:
                yield f"the answer of {well} is gone"
            elif kept[well]["statistics_id"] == statistics_id and kept[well]["probabilities"] != probabilities:
                yield f"the answer of {well} changed"
            elif kept[well]["statistics_id"] != statistics_id and not (predicting and well in wells):
                yield f"the answer of {well} stands on other statistics"
        if note.platemap and self.http.get(f"{place}/platemap").status_code != httpx.codes.OK:
            yield "the plate map is gone"

    def asked_again(self, note: Notes) -> Any:
        """A well that was answered on the current statistics gets the same answer again."""
        for well, (statistics_id, probabilities) in note.answers.items():
            if statistics_id == note.statistics_id:
                files = form(note.batch, [well], self.names)
                again = self.http.post(f"/batches/{note.batch}/predict", files=files).json()
                if again["wells"][0]["probabilities"] != probabilities:
                    yield f"asked again, {well} gets another answer"
                return


def run(kills: int, folder: Path, *, with_redis: bool, seed: int = 1) -> list[Bar]:
    """Kill the service so many times, and hold it against what it acknowledged."""
    name = "Redis" if with_redis else "embedded"
    rng, tally = random.Random(seed), Tally()  # noqa: S311 (moments, no secret)
    redis = Redis(folder / "redis") if with_redis else None
    if redis is not None:
        redis.start()
    service = Service(folder / "lab", None if redis is None else redis.url)
    service.start()
    for number in range(kills):
        clients = [Client(service.url, index, seed * 10_000 + number * 100 + index, tally) for index in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(rng.uniform(0.05, 2.5))
        service.kill()
        if redis is not None and number % 3 == 2:  # noqa: PLR2004 (every third)
            redis.kill()
            redis.start()
        for client in clients:
            client.join()
        service.start()
        for client in clients:
            client.check()
            client.http.close()
        print(f"{name}: kill {number + 1}, {tally.acknowledged} acknowledged, {len(tally.faults)} faults", flush=True)
        for fault in tally.faults[-3:]:
            print(f"  {fault}", flush=True)
    service.stop()
    chain = _audit(folder / "lab", None if redis is None else redis.url)
    if redis is not None:
        redis.kill()
    return [
        Bar(f"{name}: kills under load", kills, "kills", at_least=100),
        Bar(f"{name}: requests acknowledged", tally.acknowledged, "requests"),
        Bar(f"{name}: batches held against what was acknowledged", tally.checked, "batches"),
        Bar(f"{name}: requests without an answer, then repeated", tally.unanswered, "requests"),
        Bar(f"{name}: of these found to have taken effect", tally.unanswered_kept, "requests"),
        Bar(f"{name}: acknowledged but gone, half there, or changed", len(tally.faults), "faults", at_most=0),
        Bar(f"{name}: audit log broken", float(chain), "chains", at_most=0),
    ]


def _audit(data: Path, redis: str | None) -> bool:
    """Whether the audit log's chain is broken."""
    environment = {**os.environ, **({"ANCHORWELL_REDIS": redis} if redis is not None else {})}
    command = [str(Path(sys.executable).with_name("anchorwell")), "audit", "verify", "--data", str(data)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)  # noqa: S603 (our own program)
    print(done.stdout + done.stderr, end="")
    return done.returncode != 0
