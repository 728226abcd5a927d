"""Every profile that needs no GPU, for real: built, brought up, asked, hurt. Writes ``build/containers.json``.

Run by ``tests/containers/run.sh``, which says what it needs. Nothing is left running.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import redis

from benchmarks.bars import Bar, read_bars, table, write_bars
from examples.demo import BUNDLES, Plate, Server, read_plate
from service.client import AnchorwellClient, ProblemError
from tests.containers.load import Load, Right, difference, probabilities
from tests.containers.stack import PROJECT, ROOT, Stack, address, inspected, killed, run, until
from training.simulate import SimulationPlan, simulate

PLAN = SimulationPlan(labs=1, batches=1, plates=1, first_lab=5, seed=2026, sites=1, wells_per_class=2, inactive_wells=0)
BUNDLE = BUNDLES / "cs-arm-bn"
SAME = 1e-4
"""Two runtimes, and processors, compute the same sums in other orders."""
REDIS = tuple(f"redis-{number}" for number in (1, 2, 3))


class Driver:
    """What all parts share: a simulated plate, and the right answer to it, from a service without containers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (name,) = simulate(PLAN, folder / "plates", workers=2).plates
        self.plate: Plate = read_plate(folder / "plates" / name)
        server = Server(BUNDLE, folder)
        try:
            with AnchorwellClient(server.url) as client:
                self.right = self.asked(client, "right")
        finally:
            server.stop()

    def asked(self, client: AnchorwellClient, batch: str) -> Right:
        """Adapt a batch and classify its wells."""
        client.adapt(batch, self.plate.controls, pixel_size_um=self.plate.pixel_size_um)
        return self.predicted(client, batch)

    def predicted(self, client: AnchorwellClient, batch: str) -> Right:
        """Classify the wells of a batch that was adapted."""
        return probabilities(client.predict(batch, self.plate.treated, pixel_size_um=self.plate.pixel_size_um))

    def require_right(self, found: Right) -> None:
        """Return when an answer is the right one."""
        assert found.keys() == self.right.keys()
        assert difference(found, self.right) < SAME, difference(found, self.right)

    # --- docker compose up -------------------------------------------------------------------------------------------

    def laptop(self) -> list[Bar]:
        """From a clone to the first answer; the same after a backup was put into an empty stack."""
        with Stack() as stack:
            begun = time.monotonic()
            stack.compose("build", "--no-cache", "service")
            built = time.monotonic() - begun
            ready = stack.up()
            with AnchorwellClient(stack.url) as client:
                self.require_right(self.asked(client, "P1"))
            answered = time.monotonic() - begun
            bars = [
                Bar("build_s", built, "s"),
                Bar("up_to_ready_s", ready, "s"),
                Bar("clone_to_first_right_answer_s", answered, "s", at_most=600),
                Bar("image_over_its_base_mb", _over_base_mb("anchorwell:cpu"), "MB", at_most=350),
            ]
            _require_hardened(stack.ids("service")[0])
            return [*bars, *self._backed_up(stack)]

    def _backed_up(self, stack: Stack) -> list[Bar]:
        """The commands of docs/deploy.md: a copy of the images' volume, and an empty stack filled from it."""
        with AnchorwellClient(stack.url) as client:
            before = client.batch("P1").statistics_id
        stack.compose("stop", "service")
        backup = self.folder / "backup.tar"
        with backup.open("wb") as file:
            stack.run("service", "tar", "-C", "/data", "-cf", "-", ".", stdout=file)
        stack.down()
        with backup.open("rb") as file:
            stack.run("service", "tar", "-C", "/data", "-xf", "-", stdin=file)
        begun = time.monotonic()
        told = stack.compose("run", "--rm", "-T", "service", "anchorwell", "restore")
        assert "restored" in told, told
        stack.up()
        restored = time.monotonic() - begun
        with AnchorwellClient(stack.url) as client:
            same = client.batch("P1").statistics_id == before
            found = self.predicted(client, "P1")
        self.require_right(found)
        assert "hold" in stack.inside("service", "anchorwell", "audit", "verify")
        return [Bar("backup_restored_s", restored, "s"), Bar("statistics_same_after_restore", float(same), "", at_least=1)]

    # --- profile scale -----------------------------------------------------------------------------------------------

    def scaled(self) -> list[Bar]:
        """A replica killed, replicas replaced for another bundle, and Redis's primary killed, all under load."""
        with Stack("scale") as stack:
            ready = stack.up("proxy")
            until(lambda: len(stack.healthy("replica")) == 3, 120, "three replicas are healthy")
            until(lambda: _followers(stack) == 2, 60, "both replicas of Redis follow")
            with AnchorwellClient(stack.url) as client:
                self.require_right(self.asked(client, "P1"))
                job = self._by_a_worker(stack, client)
            bars = [Bar("scale_up_to_ready_s", ready, "s"), job]
            return [*bars, *self._replica_killed(stack), *self._rolled(stack), *self._primary_killed(stack)]

    def _by_a_worker(self, stack: Stack, client: AnchorwellClient) -> Bar:
        begun = time.monotonic()
        client.stage("P1", self.plate.treated)
        wells = sorted(self.right)
        answer = httpx.post(
            f"{stack.url}/batches/P1/predict",
            json={"staged": True, "wells": wells, "pixel_size_um": self.plate.pixel_size_um},
            headers={"Prefer": "respond-async"},
            timeout=30,
        )
        assert answer.status_code == 202, answer.text
        job_id = answer.json()["job_id"]
        until(lambda: client.job(job_id).state not in ("queued", "running"), 60, "a worker does the job")
        found = client.job(job_id)
        assert found.state == "done", found
        assert found.prediction is not None
        self.require_right(probabilities(found.prediction))
        return Bar("job_by_a_worker_s", time.monotonic() - begun, "s")

    def _load(self, stack: Stack) -> Load:
        return Load(stack.url, self.plate, self.right)

    def _replica_killed(self, stack: Stack) -> list[Bar]:
        with self._load(stack) as load:
            until(lambda: load.requests >= 8, 60, "the load runs")
            killed(stack.ids("replica")[1])
            until(lambda: len(stack.healthy("replica")) < 3, 30, "one is gone")
            until(lambda: len(stack.healthy("replica")) == 3, 120, "it is back")
        return self._told("replica_killed", load, stack)

    def _rolled(self, stack: Stack) -> list[Bar]:
        other, newer = _other_bundle(self.folder / "other"), _other_bundle(self.folder / "newer", format_version=99)
        before = stack.ids("replica")
        refused = run("sh", "docker/roll.sh", check=False, env={**stack.environment, "ANCHORWELL_BUNDLE": str(newer)})
        kept = stack.ids("replica") == before
        print(refused[-400:])
        with self._load(stack) as load:
            until(lambda: load.requests >= 8, 60, "the load runs")
            before = load.requests
            rolled = run("sh", "docker/roll.sh", env={**stack.environment, "ANCHORWELL_BUNDLE": str(other)})
            until(lambda: load.requests >= before + 16, 120, "the load goes on")
        print(rolled)
        with AnchorwellClient(stack.url) as client:
            served = {client.model().bundle for _ in range(12)}
            self.require_right(self.predicted(client, "P1"))
        assert len(served) == 1, served
        bars = [
            Bar("old_replicas_stay_when_new_ones_do_not_get_ready", float(kept), "", at_least=1),
            Bar("bundles_that_answered_while_rolling", float(len(load.bundles)), "", at_least=2),
        ]
        return [*bars, *self._told("rolled", load, stack)]

    def _primary_killed(self, stack: Stack) -> list[Bar]:
        first = _primary(stack)
        with self._load(stack) as load:
            until(lambda: load.requests >= 8, 60, "the load runs")
            _dies_for_good(stack, first)
            failed_over = until(lambda: _primary(stack) not in (first, None), 60, "a replica is the primary")
            before = load.requests
            until(lambda: load.requests >= before + 16, 120, "the load goes on")
        bars = [Bar("sentinel_failover_s", failed_over, "s"), *self._told("primary_killed", load, stack)]
        stack.compose("up", "-d", "--no-deps", first)
        until(lambda: _followers(stack) == 2, 60, "the old primary follows")
        return [*bars, *self._loss_window(stack)]

    def _loss_window(self, stack: Stack) -> list[Bar]:
        """What comes to a primary that no replica hears is not acknowledged; when it is lost, it is measured again."""
        first = _primary(stack)
        assert first is not None
        others = [name for name in REDIS if name != first]
        with AnchorwellClient(stack.url) as client:
            network = f"{PROJECT}_redis"
            cut = {stack.ids(name)[0]: address(stack.ids(name)[0], "redis") for name in others}
            for container in cut:
                run("docker", "network", "disconnect", network, container)
            refused = _problem(lambda: self._once(stack, "W1"))
            with _connected(stack, first) as server:
                written = server.exists("anchorwell:v3:record:batch/default/W1")
            _dies_for_good(stack, first)
            for container, ip in cut.items():
                run("docker", "network", "connect", "--ip", ip, network, container)
            until(lambda: _primary(stack) in others, 90, "there is a primary")
            until(lambda: _followers(stack) >= 1, 90, "a replica of Redis follows")
            lost = _problem(lambda: client.batch("W1"))
            kept = client.batch("P1").statistics_id
            self.require_right(self.asked(client, "W1"))
            again = client.batch("W1").statistics_id
            forgotten = _forgotten(stack, "P1")
            self.require_right(self.predicted(client, "P1"))
        print(f"to a primary that nobody follows: {refused}; after the failover: {lost}")
        assert refused is not None
        return [
            Bar("unacknowledged_on_the_primary_and_gone_with_it", float(written and lost is not None), "", at_least=1),
            Bar("refused_while_no_replica_confirms", float(refused.slug == "store-unavailable"), "", at_least=1),
            Bar("statistics_same_when_sent_again", float(again == kept), "", at_least=1),
            Bar("statistics_lost_from_redis_and_measured_again", float(forgotten), "", at_least=1),
        ]

    def _once(self, stack: Stack, batch: str) -> None:
        """Send controls without trying again."""
        files = [("images", (path.name, path.read_bytes(), "image/tiff")) for path in self.plate.controls]
        data = {"pixel_size_um": repr(self.plate.pixel_size_um)}
        answer = httpx.post(f"{stack.url}/batches/{batch}/controls", files=files, data=data, timeout=60)
        if not answer.is_success:
            raise ProblemError(answer.json())

    def _told(self, name: str, load: Load, stack: Stack) -> list[Bar]:
        """How a load went; every batch whose controls were acknowledged is there, with all of them."""
        for failure in load.failures[:10]:
            print(f"{name}: {failure}")
        with AnchorwellClient(stack.url) as client:
            lost = sum(_control_wells(client, batch) != count for batch, count in load.kept.items())
        return [
            Bar(f"{name}_requests", float(load.requests), ""),
            Bar(f"{name}_failed_after_retries", float(len(load.failures)), "", at_most=0),
            Bar(f"{name}_acknowledged_and_lost", float(lost), "", at_most=0),
            Bar(f"{name}_largest_difference", load.worst, "", at_most=SAME),
            Bar(f"{name}_longest_request_s", load.longest_s, "s"),
        ]

    # --- throughput --------------------------------------------------------------------------------------------------

    def replicas(self, rounds: int = 5, seconds: float = 20) -> list[Bar]:
        """Wells a second of one replica on one core, and of two on one core each, in turn."""
        override = self.folder / "pinned.yml"
        override.write_text(
            'version: "3.8"\nservices:\n  replica:\n    environment: {ANCHORWELL_THREADS: "1"}\n    deploy: {replicas: 2}\n',
            encoding="utf-8",
        )
        with Stack("scale", files=(override,)) as stack:
            stack.up("proxy")
            until(lambda: len(stack.healthy("replica")) == 2, 120, "two replicas are healthy")
            urls = []
            for core, container in enumerate(stack.ids("replica")):
                run("docker", "update", "--cpuset-cpus", str(core), container)
                urls.append(f"http://{address(container)}:8000")
            with AnchorwellClient(urls[0]) as client:
                self.asked(client, "P1")
                client.stage("P1", self.plate.treated)
            ratios = []
            for _ in range(rounds):
                one, both = (self._wells_a_second(used, seconds) for used in (urls[:1], urls))
                print(f"one replica {one:.1f} wells/s, two {both:.1f}")
                ratios.append(both / one / 2)
        middle = statistics.median(ratios)
        return [Bar("two_replicas_over_twice_one", middle, "", at_least=0.9, interval=(min(ratios), max(ratios)))]

    def _wells_a_second(self, urls: list[str], seconds: float) -> float:
        wells, size = sorted(self.right), self.plate.pixel_size_um
        counts, until_ = [0] * len(urls), time.monotonic() + seconds

        def ask(number: int, url: str) -> None:
            with AnchorwellClient(url) as client:
                while time.monotonic() < until_:
                    client.predict_staged("P1", wells, pixel_size_um=size)
                    counts[number] += len(wells)

        begun = time.monotonic()
        threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(urls)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / (time.monotonic() - begun)

    # --- profile observe ---------------------------------------------------------------------------------------------

    def observed(self) -> list[Bar]:
        """Prometheus finds the service by itself, its rules hold, and the dashboard's expressions are answered."""
        with Stack("observe", PROMETHEUS_PORT="8766") as stack:
            stack.up("service", "prometheus")
            with AnchorwellClient(stack.url) as client:
                self.asked(client, "P1")
            asked = "http://127.0.0.1:8766/api/v1/query"

            def value(expression: str) -> list:
                found = httpx.get(asked, params={"query": expression}, timeout=10)
                return found.json()["data"]["result"] if found.is_success else []

            seen = until(lambda: bool(value("anchorwell_requests_total")), 120, "Prometheus reads the service")
            dashboard = json.loads((ROOT / "docker/grafana/dashboards/anchorwell.json").read_text(encoding="utf-8"))
            expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
            until(lambda: bool(value("sum(rate(anchorwell_requests_total[2m]))")), 60, "there is a rate")
            silent = [one for one in expressions if not value(one.replace("$__rate_interval", "2m"))]
            rules = httpx.get("http://127.0.0.1:8766/api/v1/rules", timeout=10).json()["data"]["groups"][0]["rules"]
        print("without a value:", silent)
        return [
            Bar("prometheus_reads_after_s", seen, "s"),
            Bar("dashboard_expressions_without_a_value", float(len(silent)), "", at_most=0),
            Bar("alert_rules_in_order", float(sum(rule["health"] == "ok" for rule in rules)), "", at_least=len(rules)),
        ]

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def told(self) -> list[Bar]:
        """What an operator is told when something is missing."""
        broken = _other_bundle(self.folder / "later", format_version=99)
        cases = {
            "missing bundle": (["-e", "ANCHORWELL_BUNDLE=/nowhere"], "/nowhere"),
            "bundle of a later format": (["-v", f"{broken}:/bundle:ro"], "format"),
            "no GPU": (["-v", f"{BUNDLE}:/bundle:ro", "-e", "ANCHORWELL_DEVICE=cuda"], "CUDA"),
            "Redis unreachable": (["-v", f"{BUNDLE}:/bundle:ro", "-e", "ANCHORWELL_REDIS=redis://127.0.0.1:1/0"], "Redis"),
            "open to all without keys": (["-v", f"{BUNDLE}:/bundle:ro", "-e", "ANCHORWELL_ALLOW_ANONYMOUS=0"], "keys"),
        }
        bars = []
        for name, (options, words) in cases.items():
            open_to_all = ("-e", "ANCHORWELL_ALLOW_ANONYMOUS=1")
            said = run("docker", "run", "--rm", *open_to_all, *options, "anchorwell:cpu", check=False)
            last = said.strip().splitlines()[-1] if said.strip() else ""
            print(f"{name}: {last}")
            clear = last.startswith("error") and words in said and "Traceback" not in said
            bars.append(Bar(f"told_clearly: {name}", float(clear), "", at_least=1))
        return [*bars, self._full_volume(), _no_device()]

    def _full_volume(self) -> Bar:
        """A volume that is full: the request is refused with the reason, what was kept stays, and it goes on afterwards."""
        override = self.folder / "small.yml"
        override.write_text(
            'version: "3.8"\nvolumes:\n  data:\n    driver_opts: {type: tmpfs, device: tmpfs, o: "size=48m,uid=10001"}\n',
            encoding="utf-8",
        )
        with Stack(files=(override,)) as stack:
            stack.up()
            with AnchorwellClient(stack.url) as client:
                refused = None
                for number in range(40):
                    refused = _problem(lambda number=number: self._once(stack, f"F{number}"))
                    if refused is not None:
                        break
                print(f"full volume, at batch {number}: {refused}")
                assert refused is not None
                client.delete("F0")
                assert number > 1, "the volume holds two batches"
                assert self.predicted(client, "F1")
        return Bar("told_clearly: full volume", float(refused.slug == "store-unavailable"), "", at_least=1)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _problem(ask: Callable[[], object]) -> ProblemError | None:
    try:
        ask()
    except ProblemError as error:
        return error
    return None


def _control_wells(client: AnchorwellClient, batch: str) -> int:
    """How many control wells of a batch are kept; none of one that is lost."""
    try:
        return len(client.batch(batch).control_wells)
    except ProblemError:
        return 0


def _over_base_mb(image: str) -> float:
    """What the project's layers add to the base image."""
    return (inspected(image)["Size"] - inspected(_base())["Size"]) / 1e6


def _base() -> str:
    return os.environ.get("PYTHON_IMAGE", "python:3.11-slim-bookworm")


def _require_hardened(container: str) -> None:
    found = inspected(container)
    assert found["Config"]["User"] == "anchorwell"
    assert found["HostConfig"]["ReadonlyRootfs"] is True
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert all(port[0]["HostIp"] == "127.0.0.1" for port in found["HostConfig"]["PortBindings"].values())


def _no_device() -> Bar:
    """The gpu profile on a machine without one: the engine says so at once."""
    stack = Stack("gpu")
    run("docker", "tag", "anchorwell:cpu", "anchorwell:gpu")  # what is in it does not matter: it is not to be started
    said = stack.compose("up", "--no-build", "--no-deps", "-d", "gpu", check=False)
    stack.down()
    run("docker", "rmi", "anchorwell:gpu")
    print("profile gpu:", said.strip().splitlines()[-1])
    return Bar("told_clearly: profile gpu without a GPU", float("nvidia" in said), "", at_least=1)


def _other_bundle(folder: Path, **changed: object) -> Path:
    """The demo bundle under another name, which makes it another bundle."""
    shutil.copytree(BUNDLE, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "name": "another", **changed}), encoding="utf-8")
    return folder


@contextmanager
def _connected(stack: Stack, name: str, port: int = 6379) -> Iterator[redis.Redis]:
    with redis.Redis(address(stack.ids(name)[0], "redis"), port, socket_timeout=2, decode_responses=True) as server:
        yield server


def _primary(stack: Stack) -> str | None:
    """The Redis that the Sentinels take for the primary, when it takes itself for it, too."""
    for name in REDIS:
        try:
            with _connected(stack, name) as server, _connected(stack, "sentinel-1", 26379) as sentinel:
                asked = sentinel.sentinel_get_master_addr_by_name("anchorwell")
                if asked is not None and asked[0] == address(stack.ids(name)[0], "redis") and server.role()[0] == "master":
                    return name
        except (redis.RedisError, IndexError, RuntimeError):
            continue
    return None


def _followers(stack: Stack) -> int:
    """How many replicas follow the primary."""
    name = _primary(stack)
    if name is None:
        return 0
    with _connected(stack, name) as server:
        return sum(follower["state"] == "online" for key, follower in server.info("replication").items()
                   if key.startswith("slave"))  # fmt: skip


def _dies_for_good(stack: Stack, service: str) -> None:
    """Kill a service's container as a crash does, and keep the engine from starting it again."""
    (container,) = stack.ids(service)
    run("docker", "update", "--restart", "no", container)
    killed(container)


def _forgotten(stack: Stack, batch: str) -> bool:
    """Take a batch's statistics out of Redis; whether there were some. Replicas are started anew, for they remember them."""
    name = _primary(stack)
    assert name is not None
    with _connected(stack, name) as server:
        keys = [key for key in server.scan_iter("anchorwell:*adaptation*") if f"/{batch}/" in key]
        for key in keys:
            server.delete(key)
    for container in stack.ids("replica"):
        run("docker", "restart", "-t", "70", container)
    until(lambda: len(stack.healthy("replica")) == 3, 120, "replicas are healthy")
    return bool(keys)


PARTS = ("laptop", "scaled", "replicas", "observed", "told")


def main() -> None:
    """Run the parts that are named, or all; figures of parts that were not run stay."""
    wanted = sys.argv[1:] or list(PARTS)
    path = ROOT / "build" / "containers.json"
    parts = ROOT / "build" / "containers"
    with tempfile.TemporaryDirectory(prefix="anchorwell-containers-") as folder:
        driver = Driver(Path(folder))
        for name in wanted:
            write_bars(getattr(driver, name)(), parts / f"{name}.json")
    bars = [bar for name in PARTS for bar in read_bars(parts / f"{name}.json")]
    write_bars(bars, path)
    print(table(bars))
    if any(bar.holds is False for bar in bars):
        sys.exit(1)


if __name__ == "__main__":
    main()
