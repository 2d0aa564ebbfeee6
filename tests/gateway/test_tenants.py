"""API keys: who they let in, and that no message ever shows one."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.errors import AuthError, SettingsError
from headrace.types import Band
from headrace_gateway.tenants import load_tenants


def test_without_keys_everyone_is_the_default_tenant() -> None:
    tenants = load_tenants("")
    assert tenants.open_to_all
    assert tenants.identify(None).name == "default"


def test_keys_name_tenants_whose_caches_are_apart() -> None:
    tenants = load_tenants("k1:red, k2:blue ,k3,k4:red")
    red, blue = tenants.identify("Bearer k1"), tenants.identify("bearer k2")
    assert (red.name, blue.name, tenants.identify("Bearer k3").name) == ("red", "blue", "default")
    assert red.salt != blue.salt
    assert tenants.identify("Bearer k4") == red


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic k1", "k1", "Bearer k", "Bearer \udc80"]
)
def test_a_missing_or_wrong_key_is_a_401(header: str | None) -> None:
    with pytest.raises(AuthError) as caught:
        load_tenants("k1:red").identify(header)
    assert caught.value.status == 401
    assert caught.value.code in ("missing_api_key", "invalid_api_key")


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# who may\n\nk1:red\nk2:blue:batch\n")
    tenants = load_tenants(f"@{path}")
    assert tenants.identify("Bearer k2").bands == {Band.BATCH}


def test_a_tenant_gets_the_best_band_it_may_use() -> None:
    """What it may not have becomes the next lower band, else the lowest that it has."""
    tenant = load_tenants("k:t:standard+batch").identify("Bearer k")
    assert tenant.grant(Band.INTERACTIVE) is Band.STANDARD
    assert tenant.grant(Band.BATCH) is Band.BATCH
    only_top = load_tenants("k:t:interactive").identify("Bearer k")
    assert only_top.grant(Band.BATCH) is Band.INTERACTIVE


@pytest.mark.parametrize(
    "setting",
    [
        "secret:bad tenant",
        "secret:t:nobody",
        "secret,secret",
        ":t",
        "sec ret",
        "@/no/such/file",
        ",",
    ],
)
def test_a_bad_setting_names_the_variable_but_never_the_key(setting: str) -> None:
    with pytest.raises(SettingsError, match="HEADRACE_API_KEYS") as caught:
        load_tenants(setting)
    assert "secret" not in caught.value.message
