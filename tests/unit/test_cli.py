"""The command line: its options are exactly these, and mistakes end in one line."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console

from cluster.cli.bench import Outcome, percentiles, summarize
from cluster.cli.main import app, run
from cluster.cli.status import Rates, live_table
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb

CLIENT = {"server", "tls-ca", "tls-cert", "tls-key", "api-key-file"}
OPTIONS = {
    "serve": {
        "model", "config", "set", "gateways", "tensor-parallel", "expert-workers", "listen",
        "ray-address", "allow-chaos", "insecure",
    },
    "apply": {"config", "set", "ray-address", "watch", "insecure"},
    "rollout": {"config", "set", "ray-address", "insecure", "timeout-s"},
    "down": {"ray-address"},
    "demo": {"config", "set", "client"},
    "chat": {*CLIENT, "system", "thinking", "temperature", "max-tokens", "seed"},
    "generate": {*CLIENT, "temperature", "max-tokens", "seed"},
    "status": {*CLIENT, "json", "watch"},
    "scale": CLIENT,
    "drain": CLIENT,
    "bench": {
        *CLIENT, "requests", "concurrency", "rate-per-s", "prompt-tokens", "output-tokens",
        "seed", "json",
    },
    "chaos": {
        *CLIENT, "model", "kills", "double-kills", "freezes", "joins", "drains",
        "controller-kills", "gateway-kills", "gateway-freezes", "front-door-kills", "both-kills",
        "cuts", "concurrency", "seed", "bit-stable", "json", "plot",
    },
    "trace record": {"model", "questions", "out", "max-tokens", "max-sequences"},
    "check": {"model", "config", "set", "parity"},
}  # fmt: skip


def test_commands_and_options_are_exactly_the_listed_ones() -> None:
    commands = dict(typer.main.get_command(app).commands)
    for name, command in commands.pop("trace").commands.items():
        commands[f"trace {name}"] = command

    found = {
        name: {
            option.removeprefix("--")
            for parameter in command.params
            for option in parameter.opts
            if option.startswith("--")
        }
        for name, command in commands.items()
    }
    assert found == OPTIONS


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["serve", "--set", "experts.wokers=3"], 1, "experts.wokers: unknown key; did you mean"),
        (["serve", "--config", "missing.yaml"], 1, "cannot read missing.yaml"),
        (["serve", "--no-such"], 2, "No such option"),
        (["check", "--model", "nowhere"], 1, "nowhere"),
        (["serve", "--tensor-parallel", "3"], 1, "tensor"),
    ],
)
def test_a_mistake_ends_in_one_line(monkeypatch, capsys, arguments, status, words) -> None:
    monkeypatch.setattr(sys, "argv", ["expertmesh", *arguments])

    assert run() == status
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "when"),
    [
        ([], ""),
        (["gateways.snapshot_store_bytes=10000000"], "with a second gateway"),
        (["gateways.snapshot_store_bytes=10000000", "gateways.count=2"], "warning"),
        (["gateways.snapshot_store_bytes=10000000", "gateways.snapshot_tokens=0"], ""),
    ],
)
def test_check_says_what_snapshots_need_and_whether_they_have_it(
    monkeypatch, capsys, settings, when
) -> None:
    sets = [word for setting in settings for word in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["expertmesh", "check", "--no-parity", *sets])
    monkeypatch.setenv("COLUMNS", "160")

    assert run() == 0
    said = capsys.readouterr().out
    assert "recurrent states of 32 sequences" in said
    assert ("all that one gateway runs: 32 sequences and all KV" in said) is (
        "gateways.snapshot_tokens=0" not in settings
    )
    assert ("gateways.snapshot_store_bytes: the 32 sequences" in said) is bool(when)
    if when:
        words = " ".join(said[said.index(when) :].split())
        assert words.startswith(f"{when}: gateways.snapshot_store_bytes: the 32 sequences that")
        assert "has room for 3 of 1,024 tokens each, or 2 of 2,048." in words
        assert "Set it to 149946368 where" in words


def test_a_foreign_package_of_the_same_name_is_refused_with_its_place(tmp_path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").touch()
    entry = Path(__file__).parents[2] / "expertmesh.py"
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "import importlib.util as u;"
        f"s = u.spec_from_file_location('expertmesh', {str(entry)!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m); m.main()"
    )

    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 1
    assert "'cluster' resolves to" in ended.stderr
    assert str(tmp_path / "cluster") in ended.stderr


def test_percentiles_are_of_nearest_rank() -> None:
    assert percentiles([float(i) for i in range(1, 101)]) == {
        "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0,
    }  # fmt: skip
    assert percentiles([]) == {}
    assert percentiles([2.0]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0, "max": 2.0}


def test_a_report_counts_errors_apart_and_takes_rates_of_what_completed() -> None:
    good = Outcome(sent_s=0.0, arrivals_s=[1.0, 2.0, 3.0], tokens=5)
    bad = Outcome(sent_s=0.0, error="RESOURCE_EXHAUSTED")

    report = summarize([good, bad], wall_s=10.0)

    assert report["completed"] == 1
    assert report["errors"] == {"RESOURCE_EXHAUSTED": 1}
    assert report["tokens_per_s"] == 0.5
    assert report["time_to_first_token_s"]["p50"] == 1.0
    assert report["time_per_output_token_s"]["p50"] == 0.5


def test_the_live_table_shows_who_is_busy_who_waits_and_the_last_rebalance() -> None:
    members = [
        pb.MemberHealth(
            name="expert_worker-0",
            worker_stats=pb.WorkerStats(),
            busy_share=0.25,
            queue_age_s=0.012,
        ),
        pb.MemberHealth(name="gateway-0", gateway_stats=pb.GatewayStats(), waiting_share=0.5),
    ]
    last = pb.Rebalance(age_s=7, count=3, num_moves=40, gain=0.12)
    status = pb.ClusterStatus(
        view=pb.View(), members=members, last_rebalance=last, replicas_moving=8
    )
    console = Console(width=160, record=True, file=io.StringIO())

    console.print(live_table(status, Rates(), 1.0))

    text = console.export_text()
    for words in ("25 %", "12 ms", "50 %", "rebalanced 3 times, 7 s ago: 40 replicas", "8 still"):
        assert words in text
