"""A front door's TLS, client certificates and API keys over real gRPC, also while they change."""

import asyncio
import hashlib
import os
import sys

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.options import FrontDoorOptions
from cluster.frontdoor.tls import Certificates, TlsFiles
from cluster.pb.expertmesh.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2
from cluster.pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from tests.cluster.harness_frontdoor import DEMO, WAIT_S, front_door, saying, until
from tests.fakes import FakeGateway
from workers.errors import ConfigError

HOST = "127.0.0.1"
OK = grpc.StatusCode.OK
UNREACHED = grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module")
def model():
    return ModelInfo.load(DEMO)


@pytest.fixture(scope="module")
def authorities():
    return trustme.CA(), trustme.CA()


@pytest.fixture
def gateway(model):
    return FakeGateway(saying(model, "hello"), hold_after=1)


def write(directory, authority, *, client_ca=None) -> TlsFiles:
    """Write a fresh certificate as a Secret's files; returns where they lie."""
    issued = authority.issue_cert(HOST)
    issued.private_key_pem.write_to_path(directory / "tls.key")
    chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
    (directory / "tls.crt").write_bytes(chain)
    if client_ca is not None:
        client_ca.cert_pem.write_to_path(directory / "ca.crt")
    names = ("tls.crt", "tls.key", "ca.crt" if client_ca is not None else "")
    return TlsFiles(*(str(directory / name) if name else "" for name in names))


def connect(address, trusted, client=None):
    """Open a connection that is shared with no other, as that of another client."""
    root = trusted.cert_pem.bytes()
    own = ()
    if client is not None:
        own = (client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes())
    return grpc.aio.secure_channel(
        address,
        grpc.ssl_channel_credentials(root, *own),
        options=[("grpc.use_local_subchannel_pool", 1)],
    )


async def asked(channel, metadata=(), *, status=False) -> grpc.StatusCode:
    """Ask for the models, or for what only operators may see; returns the status of the call."""
    try:
        if status:
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)
            await stub.GetView(cluster_pb2.GetViewRequest(), metadata=metadata, timeout=WAIT_S)
        else:
            await InferenceServiceStub(channel).ListModels(
                inference_pb2.ListModelsRequest(), metadata=metadata, timeout=WAIT_S
            )
    except grpc.aio.AioRpcError as error:
        return error.code()
    return OK


async def asked_anew(address, trusted, client=None, metadata=()) -> grpc.StatusCode:
    async with connect(address, trusted, client) as channel:
        return await asked(channel, metadata)


async def test_only_who_trusts_the_authority_connects_and_nobody_in_cleartext(
    model, authorities, tmp_path
):
    ours, strange = authorities
    options = FrontDoorOptions(listen=f"{HOST}:0", tls=write(tmp_path, ours))
    async with front_door(model=model, options=options) as site:
        assert await asked_anew(site.address, ours) is OK
        assert await asked_anew(site.address, strange) is UNREACHED
        async with grpc.aio.insecure_channel(site.address) as channel:
            assert await asked(channel) is UNREACHED


async def test_a_certificate_is_renewed_while_streams_run_and_clients_come(
    model, authorities, gateway, tmp_path
):
    before, after = authorities
    options = FrontDoorOptions(listen=f"{HOST}:0", tls=write(tmp_path, before))
    async with front_door(gateway, model=model, options=options) as site:
        old = connect(site.address, before)
        request = inference_pb2.GenerateRequest(text="x")
        call = InferenceServiceStub(old).Generate(request, timeout=WAIT_S)
        answer = aiter(call)
        await anext(answer)
        await anext(answer)

        (tmp_path / "tls.crt").write_bytes(b"half of a rotation")
        assert await asked_anew(site.address, before) is OK
        write(tmp_path, after)

        assert await asked_anew(site.address, after) is OK
        assert await asked_anew(site.address, before) is UNREACHED
        gateway.go_on()
        rest = [response async for response in answer]
        assert rest[-1].HasField("finish")
        assert await asked(old) is OK
        await old.close()


async def test_with_an_authority_for_clients_only_its_certificates_come_in_and_name_the_tenant(
    model, authorities, tmp_path
):
    ours, strange = authorities
    tls = write(tmp_path, ours, client_ca=ours)
    options = FrontDoorOptions(listen=f"{HOST}:0", tls=tls, operators=("ops.example",))
    async with front_door(model=model, options=options) as site:
        site.publish()
        acme, ops = (ours.issue_cert(n, common_name="x") for n in ("acme.example", "ops.example"))
        assert await asked_anew(site.address, ours, acme) is OK
        assert await asked_anew(site.address, ours) is UNREACHED
        assert await asked_anew(site.address, ours, strange.issue_cert("acme")) is UNREACHED
        async with connect(site.address, ours, acme) as channel:
            assert await asked(channel, status=True) is grpc.StatusCode.PERMISSION_DENIED
        async with connect(site.address, ours, ops) as channel:
            assert await asked(channel, status=True) is OK


async def test_the_authority_of_clients_is_renewed_too(model, authorities, tmp_path):
    before, after = authorities
    tls = write(tmp_path, before, client_ca=before)
    options = FrontDoorOptions(listen=f"{HOST}:0", tls=tls)
    async with front_door(model=model, options=options) as site:
        old, new = before.issue_cert("acme"), after.issue_cert("acme")
        assert await asked_anew(site.address, before, new) is UNREACHED

        after.cert_pem.write_to_path(tmp_path / "ca.crt")

        assert await asked_anew(site.address, before, new) is OK
        assert await asked_anew(site.address, before, old) is UNREACHED


async def test_keys_come_over_tls_and_are_replaced_while_it_serves(model, authorities, tmp_path):
    ours, _ = authorities
    keys = tmp_path / "keys"

    def allow(**tenants: str) -> None:
        digests = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in tenants.items()}
        keys.write_text("".join(f"{name}: {digest}\n" for name, digest in digests.items()))

    allow(acme="old", ops="o")
    options = FrontDoorOptions(
        listen=f"{HOST}:0", tls=write(tmp_path, ours), api_keys_file=str(keys), operators=("ops",)
    )
    async with front_door(model=model, options=options) as site, connect(site.address, ours) as c:
        site.publish()
        old, new, ops = ((("authorization", f"Bearer {key}"),) for key in ("old", "new", "o"))
        refused = grpc.StatusCode.UNAUTHENTICATED
        assert [await asked(c), await asked(c, old), await asked(c, new)] == [refused, OK, refused]
        denied = grpc.StatusCode.PERMISSION_DENIED
        assert [await asked(c, k, status=True) for k in (old, ops)] == [denied, OK]

        allow(acme="new", ops="o")
        async with asyncio.timeout(WAIT_S):
            while await asked(c, new) is not OK:  # noqa: ASYNC110  # looked at once a second
                await asyncio.sleep(0.02)
        assert await asked(c, old) is refused


async def test_the_command_line_reaches_a_front_door_by_certificate_and_key(
    model, authorities, gateway, tmp_path
):
    ours, _ = authorities
    gateway.go_on()
    (tmp_path / "keys").write_text(f"ops: {hashlib.sha256(b'secret').hexdigest()}\n")
    (tmp_path / "key").write_text("secret\n")
    client = ours.issue_cert("someone")
    client.private_key_pem.write_to_path(tmp_path / "own.key")
    client.cert_chain_pems[0].write_to_path(tmp_path / "own.crt")
    options = FrontDoorOptions(
        listen=f"{HOST}:0", tls=write(tmp_path, ours, client_ca=ours),
        api_keys_file=str(tmp_path / "keys"), operators=("ops",),
    )  # fmt: skip
    async with front_door(gateway, model=model, options=options) as site:
        given = {"server": site.address, "tls-ca": "ca.crt", "tls-cert": "own.crt"}
        given |= {"tls-key": "own.key", "api-key-file": "key"}

        async def run(*words: str, without: str = "") -> tuple[int, str]:
            flags = [f"--{name}={value}" for name, value in given.items() if name != without]
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "expertmesh", *words, *flags, cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(DEMO.parents[1])},
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            said, _ = await asyncio.wait_for(process.communicate(), 60)
            return process.returncode, said.decode()

        assert await run("generate", "x") == (0, "hello\n")
        assert (await run("status", "--json"))[0] == 0
        status, said = await run("bench", "--requests=2", "--output-tokens=1")
        assert (status, "2 completed" in said) == (0, True), said
        status, said = await run("generate", "x", without="api-key-file")
        assert (status, "UNAUTHENTICATED: send an API key" in said) == (1, True), said
        status, said = await run("generate", "x", without="tls-cert")
        assert (status, "give --tls-cert and --tls-key together" in said) == (1, True), said


async def test_health_is_answered_in_cleartext_at_its_own_port_and_nothing_else_is(
    model, authorities, gateway, tmp_path
):
    ours, _ = authorities
    tls = write(tmp_path, ours, client_ca=ours)
    options = FrontDoorOptions(listen=f"{HOST}:0", health_listen=f"{HOST}:0", tls=tls)
    async with front_door(gateway, model=model, options=options) as site:
        await until(lambda: site.door.ready)
        async with grpc.aio.insecure_channel(site.door.health_address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert await asked(channel) is grpc.StatusCode.UNIMPLEMENTED
            site.set_state(0, site.members[0].state)
            await site.door.drain(0.0)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)


@pytest.mark.parametrize("harm", ["missing", "another's key", "locked key", "no certificate"])
def test_certificates_that_cannot_be_used_are_named_at_the_start(authorities, tmp_path, harm):
    ours, _ = authorities
    tls = write(tmp_path, ours, client_ca=ours)
    match harm:
        case "missing":
            (tmp_path / "tls.crt").unlink()
        case "another's key":
            ours.issue_cert(HOST).private_key_pem.write_to_path(tmp_path / "tls.key")
        case "locked key":
            name = "ENCRYPTED PRIVATE KEY"
            text = f"-----BEGIN {name}-----\nMIIB\n-----END {name}-----\n"
            (tmp_path / "tls.key").write_text(text)
        case _:
            (tmp_path / "ca.crt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"tls\.crt.*cannot be used"):
        Certificates(tls)
