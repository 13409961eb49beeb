"""The simulation of `python -m benchmarks.capacity`, against closed formulas."""

import json
import re
import subprocess
import sys
from math import factorial
from pathlib import Path
from random import Random
from xml.etree import ElementTree as ET

import pytest

simpy = pytest.importorskip("simpy", reason="simpy is in the extra `test`")

from benchmarks.capacity.lag import Routing, simulate  # noqa: E402
from benchmarks.capacity.model import Deployment, Kind, Model, Way  # noqa: E402
from benchmarks.capacity.parts import Connections, Gauge, Processors, Steps, quantile  # noqa: E402
from benchmarks.capacity.scale import rule  # noqa: E402
from benchmarks.capacity.storm import CAPACITY, RECONNECTS, RETRIES, Crowd  # noqa: E402

ROOT = Path(__file__).parents[1]
SEED = 7


def waiting(arrivals: float, service: float, servers: int) -> float:
    """Seconds that a request waits on average, by Erlang's formula for M/M/c."""
    load = arrivals * service
    terms = [load**each / factorial(each) for each in range(servers)]
    last = load**servers / factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last) * service / (servers - load)


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("part", ["processors", "connections"])
def test_processors_and_connections_queue_as_erlang_says(part: str, servers: int) -> None:
    """Requests come by chance and take a time by chance: M/M/c, at a load of seven tenths."""
    env, random = simpy.Environment(), Random(SEED)
    processors, connections = Processors(env, servers), Connections(env, servers)
    service, waited = 1.0, list[float]()
    arrivals = 0.7 * servers / service

    def ask() -> Steps:
        came, takes = env.now, random.expovariate(1 / service)
        if part == "processors":
            yield processors.work(takes)
        else:
            yield from connections.acquire()
            yield env.timeout(takes)
            connections.release()
        waited.append(env.now - came - takes)

    def come() -> Steps:
        while True:
            yield env.timeout(random.expovariate(arrivals))
            env.process(ask())

    env.process(come())
    env.run(until=60_000 / arrivals)
    mean = sum(waited) / len(waited)
    assert mean == pytest.approx(waiting(arrivals, service, servers), rel=0.1)


@pytest.mark.parametrize("way", list(Way))
def test_as_many_connections_are_busy_as_little_says(way: Way) -> None:
    """Arrivals times the seconds for which each is held, which differ from way to way."""
    reading, trip = 0.05, 0.001 + 0.002 + 0.003
    kind = Kind("read", 0.0, 0.0, statements=2, loop=0.001, work=0.002, reading=reading)
    model = Model(Deployment(workers=100, processors=100, network=0.003), way, [kind], SEED)
    model.come(200)
    outcome = model.run(warm_up=1, seconds=50)
    trips = 2 if way is Way.STATEMENTS else 4
    held = trips * trip + (reading if way is Way.UNTIL_READ else 0)
    assert outcome.in_pools.mean == pytest.approx(200 * held, rel=0.05)
    on_server = held if way is not Way.STATEMENTS else trips * trip
    assert outcome.on_server.mean == pytest.approx(200 * on_server, rel=0.05)
    assert sum(outcome.taken) / len(outcome.taken) == pytest.approx(
        trips * trip + reading, rel=0.05
    )


def test_a_full_pool_serves_its_size_over_the_time_it_is_held() -> None:
    """Whatever the number of clients: that is what a pool limits."""
    kind = Kind("query", 0.0, 0.0, statements=1, loop=0.0, work=0.0, wait=0.05, writes=True)
    rates = []
    for clients in (4, 40):
        model = Model(Deployment(pool_size=4), Way.STATEMENTS, [kind], SEED)
        model.stay(clients, 0.001)
        rates.append(len(model.run(1, 10).taken) / 10)
    assert rates == pytest.approx([4 / 0.051, 4 / 0.05], rel=0.01)


def test_connections_are_given_in_turn_and_only_to_those_who_still_wait() -> None:
    """One who gave up is passed over, and no connection is lost by that."""
    env, told = simpy.Environment(), list[tuple[int, bool, float]]()
    gauge = Gauge(env)
    connections = Connections(env, 1, gauge)

    def ask(number: int, patience: float) -> Steps:
        got = yield from connections.acquire(patience)
        told.append((number, got, env.now))
        if got:
            yield env.timeout(10)
            connections.release()

    for number, patience in enumerate([1.0, 5.0, 15.0, 50.0]):
        env.process(ask(number, patience))
    env.run()
    assert told == [(0, True, 0), (1, False, 5), (2, True, 10), (3, True, 20)]
    assert gauge.now == 0
    assert env.now == 50  # the last one has waited until then, had it not been given one
    assert (gauge.mean, quantile(gauge.seconds, 0.99)) == (0.6, 1)


def test_positions_show_no_client_its_own_past() -> None:
    """Naive routing does, and so does a sticky two seconds once the lag is longer."""
    found = {
        routing: simulate(routing, 3.0, 1.0, clients=50, seconds=100, seed=SEED)
        for routing in Routing
    }
    assert (found[Routing.POSITIONS].stale, found[Routing.POSITIONS].back) == (0, 0)
    assert 0 < found[Routing.STICKY].stale < found[Routing.NAIVE].stale
    assert found[Routing.NAIVE].on_primary == 0
    assert found[Routing.POSITIONS].on_primary < found[Routing.POSITIONS].count


def test_an_early_503_keeps_the_answers_useful() -> None:
    """With a patience of five seconds, thirty seconds in the queue are for nobody."""
    useful = []
    for timeout in (0.5, 30.0):
        crowd = Crowd(timeout, SEED)
        crowd.come(1.3)
        crowd.run(40)
        useful.append(sum(crowd.answers[second] for second in range(30, 40)) / 10)
    assert useful[0] == pytest.approx(CAPACITY, rel=0.02)
    assert useful[1] < CAPACITY / 4


def test_jitter_spreads_those_who_come_back() -> None:
    """The worst second is what the server must live through."""
    worst = []
    for pause in (RECONNECTS[1], RECONNECTS[2]):
        crowd = Crowd(0.5, SEED, RETRIES[1])
        crowd.come(0.5)
        crowd.cut_off(2, 500, pause)
        crowd.run(12)
        worst.append(max(crowd.tries.values()))
    assert worst[0] > 500 > worst[1]


def test_the_rule_of_thumb_is_little_and_three_roots() -> None:
    """So it can be calculated without a simulation."""
    assert rule(100) == 130
    assert rule(0.25) == 2


def test_all_chance_follows_from_the_seed() -> None:
    """So that the page can be made again."""

    def run(seed: int) -> list[float]:
        crowd = Crowd(0.5, seed, RETRIES[2])
        crowd.come(1.2)
        crowd.run(3)
        return crowd.taken

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_page_has_all_tables_and_its_pictures(tmp_path: Path) -> None:
    """No cell is empty, whatever the figures are."""
    command = [sys.executable, "-m", "benchmarks.capacity", "--quick", "--write", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    text = (tmp_path / "explanation" / "how-many-connections.md").read_text()
    assert "**simulated**" in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == 8
    for table in tables:
        first, *rows = [line.split(" | ") for line in table.splitlines()]
        assert len(rows) > 2
        assert all(len(row) == len(first) and all(row) for row in rows)
    for name in ("connections.svg", "connections-narrow.svg"):
        words = {
            each.text for each in ET.fromstring((tmp_path / "measured" / name).read_text()).iter()
        }
        assert {"asgi-dbsession", "held until COMMIT", "30 s"} <= words


def test_the_kept_figures_are_measured_ones() -> None:
    """All that the validation compares with."""
    found = json.loads((ROOT / "docs" / "measured" / "capacity.json").read_text())
    cells = {(each["request"], each["pool"], each["clients"]) for each in found["responses"]}
    assert len(cells) == 32
