"""The contract of `Runtime`, kept by Ray and by the fake alike."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cluster.config import ray_environment
from cluster.control.ports import Died, ProcessId, ProcessSpec, Raised, Returned
from tests.cluster.harness_head import ray_head
from tests.fake_runtime import FakeRuntime
from workers.clock import SystemClock
from workers.placement import (
    ExpertId,
    Member,
    MemberId,
    MemberState,
    Placement,
    Replica,
    Role,
    View,
)

ONE = ProcessId(MemberId("one", 1))
TWO = ProcessId(MemberId("two", 1))


def spec(process=ONE, **more) -> ProcessSpec:
    defaults = {"body": "tests.cluster.echo_body:EchoBody", "arguments": ("hello",)}
    return ProcessSpec(id=process, role=Role.EXPERT_WORKER, **{**defaults, **more})


@pytest.fixture(scope="module")
def ray_cluster():
    ray_environment()
    from cluster.runtime.session import ray_session

    with ray_session(None, logs_to_console=False, num_gpus=0) as logs:
        yield logs


@pytest.fixture(params=["fake", pytest.param("ray", marks=pytest.mark.ray)])
def runtime(request):
    if request.param == "fake":
        fake = FakeRuntime()
        fake.answers["open"] = lambda p: ("hello", 1)

        def fail(_process):
            raise ValueError("as asked")

        fake.answers["fail"] = fail
        yield fake
        return
    request.getfixturevalue("ray_cluster")
    from cluster.runtime.actors import RayRuntime

    runtime = RayRuntime(SystemClock())
    yield runtime
    for process in (ONE, TWO):
        runtime.kill(process)


def events_until(runtime, count: int) -> list:
    """Poll until so many events are in; each poll waits for the next with a deadline."""
    events, deadline = [], time.perf_counter() + 30
    while len(events) < count:
        assert time.perf_counter() < deadline, f"only {events}"
        events += runtime.poll()
    return events


def test_a_call_returns_its_value(runtime) -> None:
    runtime.spawn(spec())
    runtime.call(ONE, 1, "open")

    (event,) = events_until(runtime, 1)

    assert isinstance(event, Returned)
    assert (event.process, event.method, event.value[0]) == (ONE, "open", "hello")


def test_an_error_in_a_call_leaves_the_process_alive(runtime) -> None:
    runtime.spawn(spec())
    runtime.call(ONE, 1, "fail")
    (event,) = events_until(runtime, 1)
    assert isinstance(event, Raised)
    assert "as asked" in event.error

    runtime.call(ONE, 1, "open")
    (event,) = events_until(runtime, 1)
    assert isinstance(event, Returned)


def test_a_killed_process_is_reported_once_and_calls_to_it_vanish(runtime) -> None:
    runtime.spawn(spec())
    runtime.call(ONE, 1, "open")
    events_until(runtime, 1)

    runtime.kill(ONE)
    (event,) = events_until(runtime, 1)
    assert isinstance(event, Died)
    runtime.kill(ONE)
    runtime.call(ONE, 1, "open")

    assert runtime.poll() == []


@pytest.mark.ray
def test_a_crash_is_noticed(ray_cluster) -> None:
    from cluster.runtime.actors import RayRuntime

    runtime = RayRuntime(SystemClock())
    runtime.spawn(spec(TWO))
    runtime.call(TWO, 1, "open")
    (event,) = events_until(runtime, 1)

    os.kill(event.value[1], signal.SIGKILL)

    (event,) = events_until(runtime, 1)
    assert isinstance(event, Died)
    assert event.process == TWO


@pytest.mark.ray
def test_a_body_that_cannot_be_built_is_a_death_with_the_reason(ray_cluster) -> None:
    from cluster.runtime.actors import RayRuntime

    runtime = RayRuntime(SystemClock())
    runtime.spawn(spec(body="tests.cluster.echo_body:UnbornBody", arguments=()))

    (event,) = events_until(runtime, 1)
    assert isinstance(event, Died)
    assert "cannot be born" in event.reason


@pytest.mark.ray
def test_a_gang_of_ranks_gets_its_environment(ray_cluster) -> None:
    from cluster.runtime.actors import RayRuntime

    runtime = RayRuntime(SystemClock())
    ranks = [ProcessId(MemberId("gang", 1), rank) for rank in range(2)]
    for rank in ranks:
        runtime.spawn(spec(rank, gang=("gang.1", 2), environment={"OMP_NUM_THREADS": "3"}))
        runtime.call(rank, 1, "environment", "OMP_NUM_THREADS")

    assert [e.value for e in events_until(runtime, 2)] == ["3", "3"]
    for rank in ranks:
        runtime.kill(rank)
    assert all(isinstance(e, Died) for e in events_until(runtime, 2))


@pytest.mark.ray
def test_a_process_that_starts_yields_to_those_that_serve(ray_cluster) -> None:
    from cluster.runtime.actors import RayRuntime

    runtime = RayRuntime(SystemClock())
    runtime.spawn(spec(TWO))
    runtime.call(TWO, 1, "niceness")

    (event,) = events_until(runtime, 1)
    while_it_was_imported, now = event.value
    runtime.kill(TWO)
    assert (while_it_was_imported, now) == (os.nice(0) + 5, os.nice(0))


# Ray belongs to a process, and this cluster has two nodes.
CONTROLLERS = """
import sys
from cluster.config import ray_environment
ray_environment()
import ray
from cluster.runtime.controller import start_controller
from cluster.runtime.nodes import node_name
from cluster.runtime.session import ray_session

class Body:
    def node(self):
        return node_name()

with ray_session(sys.argv[1], logs_to_console=False, num_gpus=0):
    assert len(ray.nodes()) == 2
    for number in range(8):
        controller = start_controller(Body, name=f"controller-{number}")
        print(controller.call("node") == node_name())
        controller.end()
"""


@pytest.mark.ray
def test_a_controller_that_names_no_node_runs_where_it_was_started_from() -> None:
    with ray_head("memory") as head:
        head.join("127.0.0.2", {}, ())
        ended = subprocess.run(
            [sys.executable, "-c", CONTROLLERS, head.address],
            env=dict(head.environment),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.split() == ["True"] * 8


@pytest.mark.ray
def test_a_view_reaches_a_process_as_it_was(ray_cluster) -> None:
    from cluster.runtime.actors import RayRuntime

    worker = MemberId("w", 7)
    replicas = {
        ExpertId(layer, expert): tuple(Replica(worker, slot) for slot in range(layer + expert))
        for layer in range(2)
        for expert in range(3)
    }
    member = Member(id=worker, role=Role.EXPERT_WORKER, state=MemberState.ACTIVE)
    view = View(3, 4, (member,), Placement("v", 2, 3, replicas))
    runtime = RayRuntime(SystemClock())
    for process in (ONE, TWO):
        runtime.spawn(spec(process))
        runtime.call(process, 1, "echo", view)

    events = events_until(runtime, 2)
    for process in (ONE, TWO):
        runtime.kill(process)
    assert [event.value for event in events] == [view, view]
