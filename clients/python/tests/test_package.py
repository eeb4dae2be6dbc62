"""The distribution stands alone: grpcio and protobuf, and nothing of the cluster."""

import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
USE = """
import asyncio
from expertmesh_client import AsyncClient, Client, DeadlineError, RetryPolicy, UnavailableError
policy = RetryPolicy(max_failures=1, first_backoff_s=0.01)
with Client("127.0.0.1:1", retry=policy) as client:
    try:
        client.generate("x", timeout_s=30).collect()
    except UnavailableError as error:
        print(type(error).__name__)
async def main():
    async with AsyncClient("127.0.0.1:1", retry=policy) as client:
        try:
            await client.tokenize("x")
        except (UnavailableError, DeadlineError) as error:
            print(type(error).__name__)
asyncio.run(main())
"""


def run(program, path):
    """Run a program that sees these directories and the standard library, and nothing else."""
    setup = f"import sys; sys.path += {[str(p) for p in path]!r}\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", setup + program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()


@pytest.fixture(scope="module")
def allowed(tmp_path_factory):
    """A directory of the packages that the distribution depends on, and what they depend on."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "google").mkdir()
    for name, part in (
        ("grpcio", "grpc"),
        ("protobuf", "google/protobuf"),
        ("protobuf", "google/_upb"),
        ("typing_extensions", "typing_extensions.py"),
    ):
        (directory / part).symlink_to(metadata.distribution(name).locate_file(part))
    return directory


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, timeout=60)
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_works_with_its_dependencies_alone(wheel, allowed, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)

    assert run(USE, [tmp_path, allowed]) == ["UnavailableError", "UnavailableError"]


def test_the_wheel_holds_what_it_promises(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
        (about,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        text = archive.read(about).decode()

    assert {"py.typed", "_pb/expertmesh/v1/inference_pb2.pyi", "licenses/LICENSE"} <= names
    assert not [name for name in names if "test" in name]
    assert sorted(line for line in text.splitlines() if line.startswith("Requires-Dist")) == [
        "Requires-Dist: grpcio>=1.80.0",
        "Requires-Dist: protobuf>=6.33",
    ]


def test_the_client_asks_for_no_older_packages_than_the_server(pytestconfig):
    def ranges(path):
        lines = tomllib.loads(path.read_text())["project"]["dependencies"]
        return {line.partition(">=")[0]: line for line in lines}

    own = ranges(PROJECT / "pyproject.toml")
    servers = ranges(pytestconfig.rootpath / "pyproject.toml")

    assert own == {name: servers[name] for name in own}


def test_it_loads_beside_other_messages_of_the_same_names(allowed):
    """As beside the server's package of another version, in one process."""
    other = """
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(
    name="expertmesh/v1/inference.proto", package="expertmesh.v1"
)
file.message_type.add(name="GenerateRequest")
descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
import expertmesh_client
print("loaded")
"""

    assert run(other, [PROJECT / "src", allowed]) == ["loaded"]


def test_both_licenses_are_the_same(pytestconfig):
    assert (PROJECT / "LICENSE").read_text() == (pytestconfig.rootpath / "LICENSE").read_text()
