"""Tenants: whose key it is, and that no tenant's blocks can be met by another's salt."""

from __future__ import annotations

import hashlib
import hmac

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.config import RouterConfig
from services.router.tenants import Keyring
from services.secrets import Secret
from services.settings import SettingsError, load_settings
from tests.router.harness import FakeIndex, running_router

PROMPT = list(range(70))
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
KEYS = ("first-key", "second-key", "acme:key-a", "acme:key-b")


SECRET = Secret((b"the routers' own secret, 32 bytes",))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_names_its_tenant():
    keyring = Keyring((*KEYS, "proj:with:colons"))
    first, second = keyring.find(b"first-key"), keyring.find(b"second-key")
    assert first is not None
    assert second is not None
    assert first != second
    acme = keyring.find(b"key-a")
    assert acme is not None
    assert acme == keyring.find(b"key-b")
    assert acme.name == "acme"
    named = keyring.find(b"with:colons")
    assert named is not None
    assert named.name == "proj"
    for wrong in (b"", b"acme", b"acme:key-a", b"first-key2", b"#1"):
        assert keyring.find(wrong) is None
    assert not Keyring(())


def test_secrets_show_nowhere():
    tenant = Keyring(KEYS).find(b"first-key")
    assert tenant is not None
    assert "first-key" not in repr(tenant)
    assert repr(tenant.secret) not in repr(tenant)
    assert "first-key" not in tenant.salt("")


def test_a_key_may_be_given_by_its_hash_and_only_hashes_are_kept():
    digest = hashlib.sha256(b"key-b").hexdigest()
    keyring = Keyring(("acme:key-a", f"acme:sha256:{digest}", f"sha256:{hashlib.sha256(b'alone').hexdigest().upper()}"))
    assert [keyring.find(key).name for key in (b"key-a", b"key-b", b"alone")] == ["acme", "acme", "#3"]
    assert keyring.find(digest.encode()) is None, "the hash is no key"
    assert "key-a" not in repr(vars(keyring))


def test_keys_come_from_a_file_that_nobody_else_can_read(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nacme:key-a\n\n  second-key  \n")
    path.chmod(0o600)
    assert RouterConfig(api_key=("first-key",), api_key_file=str(path)).read_api_keys() == (
        "first-key",
        "acme:key-a",
        "second-key",
    )
    for text, says in (("# none\n", "has no key"), ("a\na\n", "same key twice"), ("a b\nc,d\n", "no comma")):
        path.write_text(text)
        with pytest.raises(SettingsError, match=says):
            RouterConfig(api_key_file=str(path)).read_api_keys()
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        RouterConfig(api_key_file=str(path)).read_api_keys()


def salt_by_name_alone(name: str) -> str:
    """What a name was enough for, and code that everybody can read."""
    secret = hashlib.sha256(b"tenant\0" + name.encode()).digest()
    return hmac.new(secret, b"tandem cache salt 1\0", hashlib.sha256).hexdigest()[:32]


@pytest.mark.parametrize("secret", [SECRET, None], ids=["with a tenant secret", "without"])
def test_a_name_and_the_code_make_no_salt(secret):
    acme, again = Keyring(KEYS, secret).find(b"key-a"), Keyring(tuple(reversed(KEYS)), secret).find(b"key-b")
    assert acme.salt("") == again.salt(""), "in every router"
    others = [salt_by_name_alone("acme"), Keyring(("acme:guess",), secret).find(b"guess").salt("")]
    others[1:] = [] if secret else others[1:]  # with the secret the tenant is the name's, whatever its keys
    others.append(Keyring(("acme:guess",), Secret((b"another secret of that length ..",))).find(b"guess").salt(""))
    assert acme.salt("") not in others


def test_with_a_tenant_secret_a_tenant_keeps_its_cache_when_its_keys_change():
    before, after = Keyring(("acme:old",), SECRET).find(b"old"), Keyring(("acme:new",), SECRET).find(b"new")
    assert before.salt("x") == after.salt("x")
    assert not Keyring(("acme:old",), SECRET).needs_tenant_secret
    assert Keyring(("acme:old",)).needs_tenant_secret
    assert Keyring(("acme:old",)).find(b"old").salt("x") != Keyring(("acme:new",)).find(b"new").salt("x")


salts = st.text(max_size=8, alphabet=st.characters()) | st.just("\ud800")


@given(one=salts, other=salts)
def test_salts_of_two_tenants_never_meet_and_are_the_same_in_every_router(one, other):
    mine, yours = Keyring(KEYS, SECRET).find(b"first-key"), Keyring(KEYS, SECRET).find(b"key-a")
    assert mine is not None
    assert yours is not None
    assert mine.salt(one) != yours.salt(other)
    assert (mine.salt(one) == mine.salt(other)) == (one == other)
    # Nor can a client reach a derived salt by sending it.
    assert mine.salt(yours.salt(other)) != yours.salt(other)
    again = Keyring(tuple(reversed(KEYS)), SECRET).find(b"first-key")
    assert again is not None
    assert again.salt(one) == mine.salt(one)


async def salts_and_questions(make_worker, config, asks):
    """What the worker got as salt, and what the index was asked, per request."""
    worker, index = make_worker(), FakeIndex()
    async with (
        running_router(config, worker, index=index) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as http,
    ):
        for key, fields in asks:
            response = await http.post("/v1/completions", json={**BODY, **fields}, headers=bearer(key))
            assert response.status_code == 200
    return [request.cache_salt for request in worker.requests], [tuple(hashes) for hashes in index.asked]


ASKS = [("first-key", {}), ("second-key", {}), ("key-a", {}), ("key-b", {}), ("key-a", {"cache_salt": "user-7"})]


async def test_tenants_share_no_block_and_keys_of_one_tenant_do(make_worker):
    salts, questions = await salts_and_questions(make_worker, RouterConfig(api_key=KEYS), ASKS)
    assert salts[2] == salts[3]
    assert len({salts[0], salts[1], salts[2], salts[4]}) == 4
    assert all(salt and "key" not in salt and "user-7" not in salt for salt in salts)
    assert questions[2] == questions[3]
    assert len({block for asked in questions for block in asked}) == 4 * len(questions[0])


async def test_all_may_share_where_that_is_configured(make_worker):
    salts, questions = await salts_and_questions(make_worker, RouterConfig(api_key=KEYS, cache_sharing="all"), ASKS)
    assert salts == ["", "", "", "", "user-7"]
    assert len(set(questions[:4])) == 1


async def test_without_keys_the_client_s_salt_goes_as_it_is(make_worker):
    salts, _ = await salts_and_questions(make_worker, RouterConfig(), [("x", {}), ("y", {"cache_salt": "s"})])
    assert salts == ["", "s"]


async def test_decisions_are_explained_to_their_tenant_only(make_worker):
    async with (
        running_router(RouterConfig(api_key=KEYS), make_worker()) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as http,
    ):
        await http.post("/v1/completions", json={**BODY, "request_id": "mine"}, headers=bearer("key-a"))
        statuses = [(await http.get("/debug/routing/mine", headers=bearer(key))).status_code for key in
                    ("key-a", "key-b", "first-key", "wrong")]  # fmt: skip
    assert statuses == [200, 200, 404, 401]


@pytest.mark.parametrize("sharing", ["", "nobody"])
def test_an_unknown_way_of_sharing_is_refused(sharing):
    with pytest.raises(SystemExit) as stopped:
        load_settings(RouterConfig, ["--cache-sharing", sharing], prog="router", environ={})
    assert stopped.value.code == 2
