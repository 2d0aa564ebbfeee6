"""API keys: who they let in, and that no message ever shows one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import AuthError, SettingsError
from headrace.types import Band
from headrace_gateway.tenants import (
    LIMIT_MAX,
    LIMITS,
    WEIGHT_MAX,
    WEIGHT_MIN,
    KeyLimits,
    load_tenants,
)


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
        "secret:t secret",
        "secret:t weight=0",
        "secret:t weight=nan",
        "secret:t weight=1e2",
        "secret:t weight=4 weight=4",
        "secret:t weight=٤",
        "secret:t requests_per_minute=0",
        "secret:t requests_per_minute=1.5",
        "secret:t tokens_per_minute=-1",
        "secret:t tokens_per_minute=9999999999",
        "secret:t concurrency=",
        "secret:t concurrency",
        "secret:t concurrency = 5",
        "secret:t weight=4,other:t weight=1",
        "secret:t prompt_entries=yes",
        "secret:t prompt_entries",
        "secret:t admin=1",
        "secret:t sharing_group=",
        "secret:t sharing_group=a/b",
        "secret:t sharing_group=a,other:t sharing_group=b",
        "secret:t prompt_entries=true,other:t prompt_entries=false",
        "@/no/such/file",
        ",",
    ],
)
def test_a_bad_setting_names_the_variable_but_never_the_key(setting: str) -> None:
    with pytest.raises(SettingsError, match="HEADRACE_API_KEYS") as caught:
        load_tenants(setting)
    assert "secret" not in caught.value.message


def test_an_entry_gives_a_share_and_what_its_key_may_use() -> None:
    tenants = load_tenants(
        "k1:red:batch weight=4 requests_per_minute=60, k2:red tokens_per_minute=5000  "
        "concurrency=3, k3:blue weight=0.5,k4 weight=2"
    )
    k1, k2, k3, k4 = (tenants.identify(f"Bearer k{at}") for at in range(1, 5))
    assert (k1.weight, k2.weight, k3.weight, k4.weight) == (4, 4, 0.5, 2)
    assert k1.bands == {Band.BATCH}
    assert k1.limits is not None
    assert k1.limits == KeyLimits(k1.limits.id, requests_per_minute=60)
    assert k2.limits == KeyLimits(k2.limits.id if k2.limits else "", 0, 5_000, 3)
    assert k2.limits is not None
    assert k1.limits.id != k2.limits.id
    assert k3.limits is None


def test_sharing_is_the_tenants_and_administration_the_keys() -> None:
    """Groups share one salt that no tenant's name gives; whoever says nothing shares nothing."""
    tenants = load_tenants(
        "k1:red sharing_group=warm,k2:red admin=true,k3:blue sharing_group=warm "
        "prompt_entries=true,k4:warm,k5:green admin=false"
    )
    k1, k2, k3, k4, k5 = (tenants.identify(f"Bearer k{at}") for at in range(1, 6))
    assert k1.salt == k2.salt == k3.salt
    assert len({k1.salt, k4.salt, k5.salt}) == 3
    assert [k.admin for k in (k1, k2, k3, k4, k5)] == [False, True, False, False, False]
    assert [k.prompt_entries for k in (k1, k2, k3, k4, k5)] == [False, False, True, False, False]
    assert load_tenants("").identify(None).admin, "where nobody is kept out"
    willing = load_tenants("k1:red,k2:blue prompt_entries=false", prompt_entries=True)
    assert willing.identify("Bearer k1").prompt_entries
    assert not willing.identify("Bearer k2").prompt_entries


def test_limits_are_a_keys_own_and_the_same_at_every_gateway() -> None:
    """Redis never learns the key, and two gateways with the same settings mean the same."""
    setting = "secret-key:t concurrency=3"
    one, two = (load_tenants(setting).identify("Bearer secret-key").limits for _ in range(2))
    assert one is not None
    assert one == two
    assert "secret" not in one.id
    assert len(one.id) == 32


def test_options_stand_in_files_too(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("k1:red weight=3\n  k2:red:standard   concurrency=1  \n")
    tenants = load_tenants(f"@{path}")
    assert tenants.identify("Bearer k2").weight == 3
    path.write_text("k1:red weight=3\n\n# other\nk2:red weight=1\n")
    with pytest.raises(SettingsError, match="line 4: this tenant has another weight"):
        load_tenants(f"@{path}")


OPTION = st.one_of(
    st.builds("weight={}".format, st.sampled_from(["1", "4", "0.01", "1000", "1001", "0", "x"])),
    st.builds("{}={}".format, st.sampled_from(LIMITS), st.integers(-1, LIMIT_MAX + 1)),
    st.builds(
        "{}={}".format,
        st.sampled_from(["admin", "prompt_entries", "sharing_group"]),
        st.sampled_from(["true", "false", "1", "", "a/b"]),
    ),
    st.text(st.characters(codec="utf-8", exclude_characters=",@"), max_size=12),
)


@given(
    st.lists(
        st.tuples(st.sampled_from(["", ":red", ":blue:batch", ":x:nobody"]), st.lists(OPTION)),
        min_size=1,
        max_size=4,
    )
)
def test_any_entry_is_understood_or_refused_without_showing_it(
    entries: list[tuple[str, list[str]]],
) -> None:
    parts = [f"s3cr3t{at}{rest} {' '.join(opts)}" for at, (rest, opts) in enumerate(entries)]
    try:
        tenants = load_tenants(",".join(parts))
    except SettingsError as error:
        assert error.message.startswith("HEADRACE_API_KEYS: entry ")
        assert "s3cr3t" not in error.message
        return
    for at, (_, options) in enumerate(entries):
        tenant = tenants.identify(f"Bearer s3cr3t{at}")
        assert WEIGHT_MIN <= tenant.weight <= WEIGHT_MAX
        wanted = [option for option in options if option.startswith(LIMITS)]
        assert (tenant.limits is not None) == bool(wanted)
        for option in wanted:
            name, _, value = option.partition("=")
            assert getattr(tenant.limits, name) == int(value)
