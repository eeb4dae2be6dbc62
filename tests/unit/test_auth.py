"""Who calls: keys in a file that changes, names in certificates, and who may change the cluster."""

import hashlib
import itertools

import pytest

from cluster.frontdoor.auth import Authenticator, KeyFile, parse_keys
from tests.fakes import FakeClock
from workers.errors import ConfigError, PermissionDeniedError, UnauthenticatedError


def line(tenant: str, key: str) -> str:
    return f"{tenant}: {hashlib.sha256(key.encode()).hexdigest()}\n"


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def keys(tmp_path, clock):
    path = tmp_path / "keys"
    path.write_text("# comment\n\n" + line("alpha", "secret-a") + line("beta", "secret-b"))
    return KeyFile(str(path), clock)


def authenticator(keys=None, *, by_certificate=False):
    return Authenticator(keys, by_certificate=by_certificate, operators=("beta",))


ALPHA, BETA = "secret-a", "secret-b"
HEADERS = {
    "none": [],
    "another header": [("x-request-id", ALPHA)],
    "empty": [("x-api-key", "")],
    "bare bearer": [("authorization", "Bearer ")],
    "basic": [("authorization", f"Basic {ALPHA}")],
    "prefix": [("x-api-key", ALPHA[:-1])],
    "suffix": [("x-api-key", ALPHA + "x")],
    "space": [("x-api-key", ALPHA + " ")],
    "case": [("x-api-key", ALPHA.upper())],
    "the digest": [("x-api-key", hashlib.sha256(ALPHA.encode()).hexdigest())],
    "not ascii": [("x-api-key", "schlüssel")],
    "alpha's": [("x-api-key", ALPHA)],
    "alpha's as bearer": [("authorization", f"Bearer {ALPHA}")],
    "beta's as bearer": [("authorization", f"bearer {BETA}")],
    "beta's as bytes": [("x-api-key", BETA.encode())],
    "both": [("authorization", f"Bearer {ALPHA}"), ("x-api-key", BETA)],
}
IDENTITIES = {"no certificate": [], "alpha": [b"alpha"], "beta": [b"beta", b"alpha"]}


def expected(asks_key: bool, by_certificate: bool, header: str, certificate: str) -> str | None:
    """Return the tenant by the rules in plain words; None for a caller who is refused."""
    if asks_key:
        if header.startswith("alpha's"):
            return "alpha"
        return "beta" if header.startswith("beta's") or header == "both" else None
    if by_certificate:
        return None if certificate == "no certificate" else certificate
    return ""


@pytest.mark.parametrize("certificate", IDENTITIES)
@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize(("asks_key", "by_certificate"), itertools.product([True, False], repeat=2))
def test_every_way_to_call_is_told_apart(keys, asks_key, by_certificate, header, certificate):
    tested = authenticator(keys if asks_key else None, by_certificate=by_certificate)
    call = (HEADERS[header], IDENTITIES[certificate])
    tenant = expected(asks_key, by_certificate, header, certificate)

    if tenant is None:
        for ask in (tested.caller, tested.operator):
            with pytest.raises(UnauthenticatedError, match=r"send an API key|not known|no name"):
                ask(*call)
        return
    assert tested.caller(*call).tenant == tenant
    if tenant == "alpha":
        with pytest.raises(PermissionDeniedError, match=r"alpha is no operator.*operators"):
            tested.operator(*call)
    else:
        assert tested.operator(*call).tenant == tenant


def test_no_message_repeats_a_key(keys):
    for header in HEADERS.values():
        for value in (v for _, v in header if isinstance(v, str) and len(v) > 7):
            with pytest.raises(UnauthenticatedError) as caught:
                authenticator(keys).caller([("x-api-key", value + "?")], [])
            assert value not in str(caught.value)


def test_keys_are_read_again_when_a_second_has_passed(keys, clock, tmp_path):
    path = tmp_path / "keys"
    path.write_text(line("alpha", "new") + line("alpha", "secret-a"))
    assert keys.tenant_of(b"new") is None

    clock.time_s = 1.0

    assert keys.tenant_of(b"new") == "alpha"
    assert keys.tenant_of(b"secret-a") == "alpha"
    assert keys.tenant_of(b"secret-b") is None


def test_a_mounted_secret_changes_by_a_link_that_points_elsewhere(clock, tmp_path):
    for name, key in (("one", "old"), ("two", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(line("alpha", key))
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "keys").symlink_to("..data/keys")
    keys = KeyFile(str(tmp_path / "keys"), clock)

    (tmp_path / "..new").symlink_to("two")
    (tmp_path / "..new").rename(tmp_path / "..data")
    clock.time_s = 1.0

    assert keys.tenant_of(b"new") == "alpha"
    assert keys.tenant_of(b"old") is None


@pytest.mark.parametrize("harm", ["missing", "malformed", "not text"])
def test_while_the_file_is_unusable_the_keys_of_before_hold(keys, clock, tmp_path, harm):
    path = tmp_path / "keys"
    match harm:
        case "missing":
            path.unlink()
        case "malformed":
            path.write_text(line("gamma", "g") + "delta: secret\n")
        case _:
            path.write_bytes(b"\xff\xfe\x00")
    clock.time_s = 1.0

    assert keys.tenant_of(b"secret-a") == "alpha"
    assert keys.tenant_of(b"g") is None

    path.write_text(line("gamma", "g"))
    clock.time_s = 2.0
    assert keys.tenant_of(b"g") == "gamma"
    assert keys.tenant_of(b"secret-a") is None


def test_an_emptied_file_lets_nobody_in(keys, clock, tmp_path):
    (tmp_path / "keys").write_text("")
    clock.time_s = 1.0

    assert keys.tenant_of(b"secret-a") is None


@pytest.mark.parametrize(
    "text", ["alpha", "alpha: secret", ": " + 64 * "a", "a b: " + 64 * "a", "a: " + 65 * "a"]
)
def test_a_line_that_is_no_key_is_named_and_not_shown(text):
    with pytest.raises(ConfigError, match="line 2: write TENANT") as caught:
        parse_keys(f"# first\n{text}\n")
    assert "secret" not in str(caught.value)


def test_one_key_of_two_tenants_is_refused():
    with pytest.raises(ConfigError, match="line 2: the key of beta is also that of alpha"):
        parse_keys(line("alpha", "same") + line("beta", "same"))


def test_a_file_that_is_missing_from_the_beginning_is_an_error(tmp_path, clock):
    with pytest.raises(ConfigError, match="cannot read the API keys"):
        KeyFile(str(tmp_path / "none"), clock)
