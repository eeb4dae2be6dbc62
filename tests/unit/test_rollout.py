"""A rollout: members with older settings are replaced one by one, and nothing else happens."""

import pytest

from tests.unit.test_controller import Bench
from workers.placement import Role


def successor(before: Bench, **changes) -> Bench:
    """Return the next controller of a cluster, with other settings."""
    return Bench(after=before, settings="new", **changes)


def serving(bench: Bench) -> dict[str, str]:
    """Return the settings of every serving member."""
    return {str(m.id): m.settings for m in bench.view.members if m.serves}


def roll(bench: Bench, ticks: int = 60) -> list[dict[str, str]]:
    """Roll out and return who served after each tick."""
    bench.controller.rollout()
    seen = []
    for _ in range(ticks):
        bench.ticks(1)
        seen.append(serving(bench))
    return seen


def of_role(members: dict[str, str], role: Role) -> list[str]:
    return [settings for name, settings in members.items() if name.startswith(f"{role.value}-")]


def test_other_settings_alone_replace_nobody() -> None:
    before = Bench(settings="old")
    before.ticks()
    bench = successor(before)

    bench.ticks(30)

    assert set(serving(bench).values()) == {"old"}
    status = bench.controller.status()
    assert (status.ready, status.rolling) == (True, False)
    assert all(member.outdated for member in status.members)


@pytest.mark.parametrize("standby", [0, 1])
def test_everybody_is_replaced_and_as_many_as_are_wanted_serve_at_every_moment(standby) -> None:
    sizes = {"workers": 3, "gateways": 2, "standby": standby, "floor": 2}
    before = Bench(settings="old", **sizes)
    before.ticks()
    bench = successor(before, **sizes)
    bench.ticks()

    seen = roll(bench, 120)

    assert set(serving(bench).values()) == {"new"}
    for members in seen:
        assert len(of_role(members, Role.EXPERT_WORKER)) >= 3
        assert len(of_role(members, Role.GATEWAY)) >= 2
        assert len(of_role(members, Role.FRONT_DOOR)) >= 1
    assert bench.view.uncovered() == []
    assert not bench.controller.status().rolling
    assert not any(member.outdated for member in bench.controller.status().members)


def test_one_at_a_time_comes_and_goes() -> None:
    before = Bench(settings="old", workers=4)
    before.ticks()
    bench = successor(before, workers=4)
    bench.controller.rollout()

    for _ in range(100):
        bench.ticks(1)
        assert sum(life.leaving for life in bench.controller._lives.values()) <= 1
        assert len(of_role(serving(bench), Role.EXPERT_WORKER)) <= 5


def test_a_rollout_to_settings_that_do_not_work_stops_at_the_first_who_goes_on_to_serve() -> None:
    before = Bench(settings="old")
    before.ticks()
    bench = successor(before)
    bench.ticks()

    def fail(_process):
        raise ValueError("cannot start")

    bench.runtime.answers["open"] = fail
    seen = roll(bench)

    assert seen[-1] == seen[0]
    assert set(seen[-1].values()) == {"old"}
    status = bench.controller.status()
    assert status.rolling
    assert "failed to start" in status.failure


def test_a_rollout_goes_on_under_the_next_controller() -> None:
    before = Bench(settings="old")
    before.ticks()
    first = successor(before)
    first.controller.rollout()
    first.ticks(6)
    assert "old" in serving(first).values()

    bench = successor(first)
    bench.ticks(80)

    assert set(serving(bench).values()) == {"new"}


def test_the_settings_of_before_end_a_rollout_with_them() -> None:
    before = Bench(settings="old")
    before.ticks()
    first = successor(before)
    first.controller.rollout()
    first.ticks(8)

    bench = Bench(after=first, settings="old")
    bench.ticks(80)

    assert set(serving(bench).values()) == {"old"}
    assert not bench.controller.status().rolling


def test_a_member_that_dies_is_replaced_by_one_with_the_newest_settings() -> None:
    before = Bench(settings="old")
    before.ticks()
    bench = successor(before)
    bench.ticks()

    bench.runtime.die(bench.runtime.named("expert_worker-1")[0])
    bench.ticks(20)

    assert sorted(of_role(serving(bench), Role.EXPERT_WORKER)) == ["new", "old", "old"]


def test_a_gateway_of_another_size_is_adopted_whole_and_replaced() -> None:
    before = Bench(settings="old", ranks=4)
    before.ticks()
    (old,) = {p.member for p in before.runtime.named("gateway-0")}
    bench = successor(before, ranks=1)
    bench.ticks()
    assert len(bench.runtime.named("gateway-0")) == 4

    roll(bench)

    assert not [p for p in bench.runtime.specs if p.member == old]
    (new,) = [p for p in bench.runtime.specs if p.member.name.startswith("gateway")]
    assert serving(bench)[str(new.member)] == "new"


def test_counts_that_were_configured_anew_are_wanted_and_what_was_scaled_stays() -> None:
    before = Bench(workers=3, gateways=1)
    before.ticks()
    before.controller.scale(Role.GATEWAY, 3)
    before.ticks()

    bench = Bench(after=before, workers=4, gateways=1)
    bench.ticks(20)

    assert len(bench.view.with_role(Role.EXPERT_WORKER)) == 4
    assert len(bench.view.with_role(Role.GATEWAY)) == 3


def test_nobody_is_replaced_while_somebody_else_is_missing() -> None:
    before = Bench(settings="old")
    before.ticks()
    bench = successor(before)
    bench.ticks()
    victim = bench.runtime.named("expert_worker-2")[0]
    bench.controller.rollout()
    bench.runtime.die(victim)

    bench.ticks(1)

    assert not any(life.leaving for life in bench.controller._lives.values())
