"""The file of API keys: what it may say, and whose key is whose."""

import hashlib
import re
from pathlib import Path

import pytest

from engine.errors import UserError
from vcli.server.keys import ANYONE, Keys


def keys_of(folder: Path, text: str, api_key: str = "") -> Keys:
    file = folder / "keys.toml"
    file.write_text(text)
    return Keys.load(api_key, file)


def test_without_keys_everybody_is_let_in():
    keys = Keys.load("", None)
    assert not keys
    assert keys.tenant_of(b"") is ANYONE
    assert keys.tenant_of(b"Bearer whatever") is ANYONE


def test_each_key_belongs_to_its_tenant(tmp_path):
    digest = hashlib.sha256("ümlaut-key".encode()).hexdigest()
    text = f'[acme]\nkeys = ["sk-old-key", "sk-new-key"]\n[ops]\nkeys = ["sha256:{digest}"]\nis_admin = true\n'
    keys = keys_of(tmp_path, text)

    acme, ops = keys.tenant_of(b"Bearer sk-old-key"), keys.tenant_of("bearer  ümlaut-key".encode())
    assert acme is not None
    assert ops is not None
    assert (acme.name, acme.is_admin) == ("acme", False)
    assert keys.tenant_of(b"Bearer sk-new-key") is acme
    assert (ops.name, ops.is_admin) == ("ops", True)
    assert keys.has_admin


def test_the_one_key_of_the_flag_is_everybodys(tmp_path):
    keys = Keys.load("the key", None)
    assert keys.tenant_of(b"Bearer the key") is ANYONE
    assert keys.tenant_of(b"Bearer another key") is None
    with pytest.raises(UserError, match="exclude each other"):
        keys_of(tmp_path, '[acme]\nkeys = ["sk-old-key"]', api_key="the key")


def test_salts_of_two_tenants_never_meet(tmp_path):
    keys = keys_of(tmp_path, '[a]\nkeys = ["sk-of-a-1", "sk-of-a-2"]\n[ab]\nkeys = ["sk-of-ab"]')
    a, same, ab = (keys.tenant_of(f"Bearer {key}".encode()) for key in ("sk-of-a-1", "sk-of-a-2", "sk-of-ab"))
    assert a is not None
    assert ab is not None
    assert a.salt("x") == same.salt("x") != a.salt("")
    tried = ["", "a", "b", "\n", "a\n", "ab\n", "\nb", "b\n", "a\nb"]
    assert {a.salt(salt) for salt in tried}.isdisjoint(ab.salt(salt) for salt in tried)


def test_keys_are_read_again_and_limits_go_on(tmp_path):
    admin = '[ops]\nkeys = ["sk-admin"]\nis_admin = true\n'
    acme = "[acme]\nrequests_per_minute = 5\nkeys = "
    keys = keys_of(tmp_path, f'{acme}["sk-stolen"]\n{admin}')
    before = keys.tenant_of(b"Bearer sk-stolen")
    assert before is not None

    (tmp_path / "keys.toml").write_text(f'{acme}["sk-fresh"]\n{admin}')
    keys.reload()
    after = keys.tenant_of(b"Bearer sk-fresh")
    assert keys.tenant_of(b"Bearer sk-stolen") is None
    assert after is not None
    assert after.budget is before.budget

    for bad, words in (("[acme", "is not understood"), (f'{acme}["sk-fresh"]', "has no admin any more")):
        (tmp_path / "keys.toml").write_text(bad)
        with pytest.raises(UserError, match=words):
            keys.reload()
        assert keys.tenant_of(b"Bearer sk-fresh") is after, "as it was"


@pytest.mark.parametrize(
    "authorization",
    [b"", b"Bearer", b"Bearer ", b"sk-old-key", b"Basic sk-old-key", b"Bearer sk-old-ke", b"\xff"],
)
def test_what_is_no_key_is_nobodys(tmp_path, authorization):
    assert keys_of(tmp_path, '[acme]\nkeys = ["sk-old-key"]').tenant_of(authorization) is None


def test_a_digest_does_not_open_what_its_key_opens(tmp_path):
    digest = hashlib.sha256(b"sk-the-key").hexdigest()
    keys = keys_of(tmp_path, f'[acme]\nkeys = ["sha256:{digest}"]')
    assert keys.tenant_of(b"Bearer sk-the-key") is not None
    for stolen in (digest, f"sha256:{digest}"):
        assert keys.tenant_of(f"Bearer {stolen}".encode()) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("[acme]\nkeys = []", "holds no key"),
        ("[acme", "is not understood"),
        ("acme = 3", "is not understood"),
        ('[acme]\nkeys = "sk-old-key"', "is not understood"),
        ('[acme]\nkeys = ["sk-old-key"]\nadmin = true', "unknown field `admin`"),
        ('[acme]\nkeys = ["sk-old-key"]\ntokens_per_minute = 0', "is not understood"),
        ('[acme]\nkeys = ["short"]', "5 characters can be guessed"),
        ('[acme]\nkeys = ["sha256:1234"]', "64 hexadecimal digits"),
        ('["a b"]\nkeys = ["sk-old-key"]', "'a b' is no name"),
        ('[a]\nkeys = ["sk-old-key"]\n[b]\nkeys = ["sk-old-key"]', "[a] and [b] have the same key"),
    ],
)
def test_a_file_that_is_wrong_is_told_in_a_sentence(tmp_path, text, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        keys_of(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "sk-old-key" not in str(caught.value), "no key is printed"


def test_a_file_that_is_not_there_is_told_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"--api-key-file .*nothing.toml cannot be read"):
        Keys.load("", tmp_path / "nothing.toml")
