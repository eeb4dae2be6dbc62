"""The commands of `expertmesh` and their options.

What needs torch or Ray is imported by the commands that use it: the others answer at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import grpc
import typer

from cluster.cli.bench import LoadOptions, bench_command
from cluster.cli.client import Server, for_clients
from cluster.cli.operate import Pool, drain_command, scale_command
from cluster.cli.status import status_command, watch_command
from cluster.cli.talk import Ask, chat_command, generate_command
from cluster.config import ClusterConfig, load_config
from workers.errors import ConfigError, ExpertmeshError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve hybrid mixture-of-experts models on a cluster whose members may come and go.",
)

Config = Annotated[Path | None, typer.Option("--config", help="YAML file.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE, over the file; repeatable.")
]
Model = Annotated[str | None, typer.Option("--model", help="A checkpoint's directory, or demo.")]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Listen beyond this machine though anybody may call then."),
]
RayAddress = Annotated[
    str,
    typer.Option(help="HOST:PORT, ray://HOST:PORT, or auto for the cluster of this machine."),
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; unset is the model's own.")]
MaxTokens = Annotated[int | None, typer.Option(help="Unset is what the context allows.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")]


@app.command()
def serve(
    *,
    model: Model = None,
    config: Config = None,
    set_: Settings = None,
    gateways: Annotated[int | None, typer.Option(help="Number of gateways.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="Ranks of each gateway.")] = None,
    expert_workers: Annotated[
        int | None, typer.Option(help="0 runs the experts in the gateway's processes.")
    ] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="A Ray cluster that is there already.")
    ] = None,
    allow_chaos: Annotated[
        bool, typer.Option("--allow-chaos", help="Let `expertmesh chaos` harm its members.")
    ] = False,
    insecure: Insecure = False,
) -> None:
    """Run a cluster in the foreground; prints `ready HOST:PORT` when it serves."""
    given = {
        "model.path": model,
        "gateways.count": gateways,
        "gateways.tensor_parallel": tensor_parallel,
        "experts.workers": expert_workers,
        "front_doors.listen": listen,
        "control.allow_chaos": True if allow_chaos else None,
        "front_doors.insecure": True if insecure else None,
    }
    from cluster.cli.serve import serve_command

    serve_command(_configuration(config, set_, given), ray_address)


@app.command("apply")
def apply_(
    *,
    config: Annotated[Path, typer.Option("-f", "--config", help="YAML file.")],
    set_: Settings = None,
    ray_address: RayAddress = "auto",
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Again when the file changes or Ray's head was lost."),
    ] = False,
    insecure: Insecure = False,
) -> None:
    """Bring a cluster on a Ray cluster to a configuration; it outlives this command.

    What runs is adopted: running it again changes what differs, and prints `ready HOST:PORT`.
    """
    from cluster.cli.apply import apply_command, watch_command

    settings = _with_insecure(set_, insecure=insecure)
    if watch:
        watch_command(config, settings, ray_address)
    else:
        apply_command(lambda: load_config(config, settings), ray_address)


@app.command()
def rollout(
    *,
    config: Annotated[
        Path | None, typer.Option("-f", "--config", help="YAML file; none keeps what runs.")
    ] = None,
    set_: Settings = None,
    ray_address: RayAddress = "auto",
    insecure: Insecure = False,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for the end.")] = 3600.0,
) -> None:
    """Apply a configuration, and replace one by one the members that run with older settings."""
    from cluster.cli.apply import rollout_command

    settings = _with_insecure(set_, insecure=insecure)
    if settings and config is None:
        raise ConfigError("give the file, with -f, that --set and --insecure are to change")
    load = (lambda: load_config(config, settings)) if config else None
    rollout_command(load, ray_address, timeout_s)


@app.command()
def down(*, ray_address: RayAddress = "auto") -> None:
    """Drain and end the cluster on a Ray cluster: that of `apply`, or of a `serve` that runs."""
    from cluster.cli.apply import down_command

    down_command(ray_address)


@app.command()
def demo(
    *,
    config: Config = None,
    set_: Settings = None,
    client: Annotated[
        Path | None, typer.Option(help="A program to run against it, with --server HOST:PORT.")
    ] = None,
) -> None:
    """Start a small cluster with the shipped model, ask it two things, and end it."""
    from cluster.cli.demo import demo_command

    given = {
        "gateways.tensor_parallel": 2,
        "experts.workers": 3,
        "front_doors.listen": "127.0.0.1:0",
    }
    demo_command(_configuration(config, set_, given), client)


@app.command()
@for_clients
def chat(
    message: Annotated[
        str | None, typer.Argument(help="One question; none for a dialogue.")
    ] = None,
    *,
    server: Server,
    system: Annotated[str, typer.Option(help="The system's instructions.")] = "",
    thinking: Annotated[bool | None, typer.Option(help="Unset is the model's own way.")] = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
) -> None:
    """Talk to a model, one turn after the other."""
    chat_command(server, message, system, thinking, Ask(temperature, max_tokens, seed))


@app.command()
@for_clients
def generate(
    prompt: Annotated[str, typer.Argument(help="Continued as it stands, without a chat template.")],
    *,
    server: Server,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
) -> None:
    """Continue a text."""
    generate_command(server, prompt, Ask(temperature, max_tokens, seed))


@app.command()
@for_clients
def status(
    *,
    server: Server,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again and again, with load and what stalls.")
    ] = False,
) -> None:
    """Show the members of a cluster, its term and version, and the coverage of its experts."""
    if watch:
        watch_command(server)
    else:
        status_command(server, as_json=json)


@app.command()
@for_clients
def scale(
    pool: Annotated[Pool, typer.Argument(help="Which role.")],
    count: Annotated[int, typer.Argument(min=1, help="How many members are wanted.")],
    *,
    server: Server,
) -> None:
    """Set how many members of a role are wanted; they come and go while requests run."""
    scale_command(server, pool, count)


@app.command()
@for_clients
def drain(
    member: Annotated[str, typer.Argument(help="NAME or NAME.INCARNATION, as in status.")],
    *,
    server: Server,
) -> None:
    """Have one member leave for good, once others hold what it holds."""
    drain_command(server, member)


@app.command()
@for_clients
def bench(
    *,
    server: Server,
    requests: Annotated[int, typer.Option(min=1, help="How many in all.")] = 64,
    concurrency: Annotated[int, typer.Option(help="Closed loop: how many at once.")] = 8,
    rate_per_s: Annotated[
        float | None, typer.Option(help="Open loop: arrivals a second, whatever the answers do.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the random prompts.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    seed: Annotated[int, typer.Option(help="Of prompts, sampling and arrivals.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the report there as JSON.")] = None,
) -> None:
    """Load a cluster over gRPC and report latencies, tokens per second and errors."""
    options = LoadOptions(
        requests=requests, concurrency=concurrency, rate_per_s=rate_per_s,
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, seed=seed,
    )  # fmt: skip
    bench_command(server, options, json)


@app.command()
@for_clients
def chaos(
    *,
    server: Server,
    model: Model = None,
    kills: Annotated[int, typer.Option(help="SIGKILL of an expert worker.")] = 10,
    double_kills: Annotated[int, typer.Option(help="SIGKILL of two at once.")] = 0,
    freezes: Annotated[int, typer.Option(help="SIGSTOP of one for 0.5 to 5 s.")] = 3,
    joins: Annotated[int, typer.Option(help="One worker more.")] = 3,
    drains: Annotated[int, typer.Option(help="One worker less.")] = 3,
    controller_kills: Annotated[int, typer.Option(help="SIGKILL of the controller.")] = 0,
    gateway_kills: Annotated[int, typer.Option(help="SIGKILL of any rank of a gateway.")] = 0,
    gateway_freezes: Annotated[int, typer.Option(help="SIGSTOP of any rank.")] = 0,
    front_door_kills: Annotated[int, typer.Option(help="SIGKILL of a front door.")] = 0,
    both_kills: Annotated[int, typer.Option(help="Of a front door and a gateway at once.")] = 0,
    cuts: Annotated[int, typer.Option(help="Reset all connections to a front door.")] = 0,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of requests, moments and victims.")] = 0,
    bit_stable: Annotated[
        bool, typer.Option("--bit-stable", help="The cluster runs so: explain no mismatch.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the report there as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the stalls there (png, svg).")] = None,
) -> None:
    """Harm a running cluster under load, and check that no client could tell.

    Refused unless the cluster was started with --allow-chaos. With --model every token is checked
    against the same weights in one process.
    """
    from cluster.chaos.faults import Fault
    from cluster.chaos.run import ChaosOptions
    from cluster.cli.chaos import chaos_command
    from cluster.serving import model_directory

    counts = {
        Fault.KILL: kills, Fault.KILL_TWO: double_kills, Fault.FREEZE: freezes, Fault.JOIN: joins,
        Fault.DRAIN: drains, Fault.KILL_CONTROLLER: controller_kills,
        Fault.KILL_GATEWAY: gateway_kills, Fault.FREEZE_GATEWAY: gateway_freezes,
        Fault.KILL_FRONT_DOOR: front_door_kills, Fault.KILL_BOTH: both_kills, Fault.CUT: cuts,
    }  # fmt: skip
    given = _configuration(None, None, {"model.path": model})
    chaos_command(
        server,
        ChaosOptions(counts=counts, concurrency=concurrency, seed=seed),
        model_dir=model_directory(given) if model else None,
        bit_stable=bit_stable,
        report_path=json,
        plot_path=plot,
    )


trace = typer.Typer(no_args_is_help=True, help="Record which experts are activated, to plan by.")
app.add_typer(trace, name="trace")


@trace.command("record")
def trace_record(
    *,
    model: Model = None,
    questions: Annotated[Path, typer.Option(help="A text file with one question a line.")],
    out: Annotated[Path, typer.Option(help="The trace, an .npz file.")],
    max_tokens: Annotated[int, typer.Option(help="Of each answer, at most.")] = 64,
    max_sequences: Annotated[int, typer.Option(help="Answered at once.")] = 32,
) -> None:
    """Answer questions in this process, and record which experts each row activates."""
    from cluster.cli.trace import trace_record_command
    from cluster.serving import model_directory

    directory = model_directory(_configuration(None, None, {"model.path": model}))
    trace_record_command(
        directory, questions, out, max_tokens=max_tokens, max_sequences=max_sequences
    )


@app.command()
def check(
    *,
    model: Model = None,
    config: Config = None,
    set_: Settings = None,
    parity: Annotated[
        bool, typer.Option(help="Compare logits with transformers, where it is installed.")
    ] = True,
) -> None:
    """Check a checkpoint and a configuration without starting anything; prints memory per role."""
    from cluster.cli.check import check_command

    check_command(_configuration(config, set_, {"model.path": model}), parity=parity)


_HINTS = {grpc.StatusCode.UNAUTHENTICATED: " (--api-key-file names a file that holds one)"}


def run() -> int:
    """Run the command line; returns the exit status. Expected errors are one line, not a trace."""
    try:
        return app(standalone_mode=False) or 0
    except ExpertmeshError as error:
        return _complain(str(error), 1)
    except grpc.RpcError as error:
        hint = _HINTS.get(error.code(), "")
        return _complain(f"{error.code().name}: {error.details()}{hint}", 1)
    except typer.Exit as exit_:
        return exit_.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # a mistake in the command line itself
            return _complain(error.format_message(), 2)
        raise


def _configuration(
    path: Path | None, settings: list[str] | None, given: Mapping[str, object]
) -> ClusterConfig:
    """Read the file, then the options that were given, then `--set`, each over what was before."""
    values = {key: value for key, value in given.items() if value is not None}
    return load_config(path, settings or (), values)


def _with_insecure(settings: list[str] | None, *, insecure: bool) -> list[str]:
    return [*(["front_doors.insecure=true"] if insecure else []), *(settings or [])]


def _complain(message: str, status: int) -> int:
    typer.echo(f"expertmesh: {message}", err=True)
    return status
