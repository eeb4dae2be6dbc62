"""Clients that vanish in mid-stream or whose deadline passes leave no block behind.

    python -m tests.accept.disconnect [--count 1000] [--json FILE]

A real cluster serves; each round starts a long generation and cancels it, lets its deadline pass,
or kills the client's process. Then the gateway's KV and state blocks in use must be what they were.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import grpc

from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from tests.cluster.harness_serve import Served, served

SETTLE_S = 10.0
KILLED_SHARE = 0.02  # a client process costs a second to start
CLIENT = """
import sys, grpc
from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from cluster.pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
with grpc.insecure_channel(sys.argv[1]) as channel:
    request = pb.GenerateRequest(text="And it came to pass",
                                 stopping=pb.Stopping(max_tokens=4000, ignore_eos=True))
    for response in InferenceServiceStub(channel).Generate(request):
        print("token", flush=True)
"""


def blocks_used(cluster: Served) -> float:
    (gateway,) = cluster.members("GATEWAY")
    series = cluster.metrics(gateway)
    return sum(v for k, v in series.items() if "blocks_used" in k)


def vanish(cluster: Served, draw: random.Random) -> str:
    """Start a generation and leave it; returns how."""
    if draw.random() < KILLED_SHARE:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, cluster.endpoint], stdout=subprocess.PIPE, text=True
        )
        for _ in range(draw.randrange(1, 20)):
            client.stdout.readline()
        client.kill()
        client.wait(10)
        client.stdout.close()
        return "client killed"
    passes = draw.random() < 0.4
    call = cluster.inference.Generate(
        pb.GenerateRequest(
            text="Now it came to pass " * draw.randrange(1, 30),
            sampling=pb.Sampling(num_sequences=draw.choice([1, 1, 1, 3])),
            stopping=pb.Stopping(max_tokens=3000, ignore_eos=True),
        ),
        timeout=draw.uniform(0.01, 0.6) if passes else 60,
    )
    try:
        for _ in range(10**6 if passes else draw.randrange(12)):
            next(call)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        return "deadline passed"
    call.cancel()
    return "cancelled"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    report = {"count": options.count, "seed": options.seed, "ways": {}, "worst_free_s": 0.0}
    with served("--tensor-parallel", "2", "--expert-workers", "2") as cluster:
        before = blocks_used(cluster)
        for done in range(1, options.count + 1):
            way = vanish(cluster, draw)
            report["ways"][way] = report["ways"].get(way, 0) + 1
            if done % 50 == 0 or done == options.count:
                start = time.perf_counter()
                while blocks_used(cluster) != before:
                    assert time.perf_counter() - start < SETTLE_S, f"blocks leak after {done}"
                    time.sleep(0.02)
                free_s = time.perf_counter() - start
                report["worst_free_s"] = max(report["worst_free_s"], free_s)
                print(f"{done} of {options.count}: {report['ways']}, blocks as before", flush=True)
        report["blocks_before"], report["blocks_after"] = before, blocks_used(cluster)
        report["tokens_after"] = len([r for r in cluster.generate() if r.token_ids])
    report["passed"] = report["blocks_before"] == report["blocks_after"]
    print(json.dumps(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2))
    sys.exit(not report["passed"])


if __name__ == "__main__":
    main()
