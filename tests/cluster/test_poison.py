"""A real cluster and a request that ends the expert workers which compute it: it fails, alone."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from tests.cluster.harness_serve import Served, served, token_ids
from tests.injection.into import environment_of
from tests.ranks.harness_gateway import Reference

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

GUILTY = tuple(range(100, 140))
TOKENS = 24
INNOCENT = [f"And it came to pass{' in those days' * i}" for i in range(3)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    row = tmp_path_factory.mktemp("poison") / "row.json"
    row.write_text(json.dumps(Reference(bit_stable=True).row_of(GUILTY, layer=1)))
    environment = environment_of(
        "workers.expert.worker", "tests.injection.poison:die_of_row", POISON_ROW=str(row)
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with served(
            "--expert-workers", "2",
            "--set", "experts.floor=2",
            "--set", "experts.standby=3",
            "--set", "dispatch.bit_stable=true",
        ) as running:  # fmt: skip
            yield running


def test_it_fails_alone_and_no_other_client_can_tell(cluster: Served) -> None:
    def ask(text: str) -> list[int]:
        return token_ids(cluster.generate(text, max_tokens=TOKENS, timeout_s=180))

    undisturbed = [ask(text) for text in INNOCENT]
    before = {m["pid"] for m in cluster.members("EXPERT_WORKER")}
    failed = threading.Event()

    def ask_until_it_has_failed(text: str) -> list[list[int]]:
        answers = []
        while not failed.is_set():
            answers.append(ask(text))
        return [*answers, ask(text)]

    guilty = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=GUILTY), stopping=pb.Stopping(max_tokens=5, ignore_eos=True)
    )
    with ThreadPoolExecutor(len(INNOCENT)) as pool:
        others = [pool.submit(ask_until_it_has_failed, text) for text in INNOCENT]
        with pytest.raises(grpc.RpcError) as refused:
            list(cluster.inference.Generate(guilty, timeout=120))
        failed.set()
        answers = [other.result(180) for other in others]

    assert refused.value.code() is grpc.StatusCode.INTERNAL
    assert "expert workers ended" in refused.value.details()
    ended = before - {m["pid"] for m in cluster.members("EXPERT_WORKER")}
    print(f"{len(ended)} of {len(before)} workers and their successors ended")
    assert len(ended) >= 2
    for text, right, given in zip(INNOCENT, undisturbed, answers, strict=True):
        assert len(given) > 1
        assert all(tokens == right for tokens in given), text
