"""Who may see the pages, and until when."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
import redis

from pipeline import wiring
from pipeline.settings import Settings
from pipeline.web.app import create_app
from pipeline.web.ops.access import check_password, hash_password
from tests.integration.ops.conftest import (
    NUMBER,
    PASSWORDS,
    SECRET,
    Filled,
    Sign,
    changes,
    everything,
    pages,
    sign_in,
    users,
)

# The door


def test_without_users_there_are_no_pages(make_settings: Callable[..., Settings]) -> None:
    client = create_app(make_settings()).test_client()
    assert client.get("/ops/").status_code == client.get("/ops/sign-in").status_code == 404


def test_whoever_is_signed_out_is_led_to_the_door_and_then_to_the_page(sign: Sign, filled: Filled) -> None:
    nobody = sign("")
    for path in pages(filled):
        answer = nobody.get(path)
        assert (answer.status_code, answer.location.partition("?")[0]) == (303, "/ops/sign-in"), path
    before = everything(filled.ledger)
    for path, fields in [*changes(filled), ("/ops/leads", {"text": NUMBER}), ("/ops/sign-out", {})]:
        assert nobody.post(path, csrf="", **fields).status_code == 401, path
    assert everything(filled.ledger) == before
    door = nobody.get(nobody.get("/ops/leads?state=rejected").location)
    form = re.search(r'name="form" value="([^"]+)"', door.text)[1]
    wanted = re.search(r'name="next" value="([^"]+)"', door.text)[1]
    given = {"form": form, "name": "asha", "password": PASSWORDS["asha"], "next": wanted}
    assert nobody.client.post("/ops/sign-in", data=given).location == "/ops/leads?state=rejected"
    assert nobody.get("/ops/leads?state=rejected").status_code == 200


def test_the_door_leads_nowhere_else(sign: Sign) -> None:
    for target in ("https://evil.test/", "//evil.test", "/ops\\@evil.test", "/opsevil", "/v1/leads"):
        client = sign("").client
        form = re.search(r'name="form" value="([^"]+)"', client.get("/ops/sign-in").text)[1]
        given = {"form": form, "name": "asha", "password": PASSWORDS["asha"], "next": target}
        assert client.post("/ops/sign-in", data=given).location == "/ops/", target


def test_the_session_cookie_is_for_our_pages_alone(sign: Sign) -> None:
    client = sign("").client
    cookie = next(
        one
        for one in sign_in(client, "asha", PASSWORDS["asha"]).headers.getlist("Set-Cookie")
        if "pipeline_ops=" in one
    )
    assert {"HttpOnly", "SameSite=Lax", "Path=/ops", "Max-Age=43200"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    tls = sign("").client
    form = re.search(r'name="form" value="([^"]+)"', tls.get("/ops/sign-in", base_url="https://pipeline.test").text)[1]
    given = {"form": form, "name": "asha", "password": PASSWORDS["asha"]}
    answer = tls.post("/ops/sign-in", data=given, base_url="https://pipeline.test")
    assert all("Secure" in one.split("; ") for one in answer.headers.getlist("Set-Cookie") if "Max-Age=0" not in one)


def test_wrong_passwords_are_refused_and_too_many_lock_the_address(sign: Sign, valkey: redis.Redis) -> None:
    client = sign("").client
    for name, password in [("asha", "wrong"), ("nobody", "wrong"), ("asha", ""), *[("asha", "x")] * 7]:
        answer = sign_in(client, name, password)
        assert (answer.status_code, "Name or password is wrong" in answer.text) == (403, True)
    answer = sign_in(client, "asha", PASSWORDS["asha"])  # right, and too late
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "600")
    assert client.get("/ops/").status_code == 303
    elsewhere = sign_in(client, "asha", PASSWORDS["asha"], environ_base={"REMOTE_ADDR": "10.1.2.3"})
    assert elsewhere.status_code == 303
    assert not any(b"wrong" in key for key in valkey.scan_iter())


@pytest.mark.parametrize(
    ("proxies", "proto", "is_secure"),
    [(0, "https", False), (1, "https", True), (1, "http", False), (1, "https, http", False), (2, "https, http", True)],
)
def test_only_the_proxies_that_are_counted_are_believed(
    settings: Settings, proxies: int, proto: str, *, is_secure: bool
) -> None:
    wiring.close_services()
    client = create_app(settings.model_copy(update={"ops_proxies": proxies})).test_client()
    cookie = client.get("/ops/sign-in", headers={"X-Forwarded-Proto": proto}).headers["Set-Cookie"]
    assert ("Secure" in cookie.split("; ")) is is_secure
    wiring.close_services()


def test_tries_are_counted_by_the_address_that_a_believed_proxy_saw(settings: Settings) -> None:
    wiring.close_services()
    client = create_app(settings.model_copy(update={"ops_proxies": 1})).test_client()

    def status(said: str) -> int:
        return sign_in(client, "asha", "wrong", headers={"X-Forwarded-For": said}).status_code

    assert [status(f"203.0.113.{number}, 198.51.100.7") for number in range(11)] == [403] * 10 + [
        429
    ]  # a made-up front
    assert status("203.0.113.1, 198.51.100.8") == 403
    wiring.close_services()


def test_a_sign_in_form_of_another_site_is_refused(sign: Sign) -> None:
    client = sign("").client
    given = {"name": "asha", "password": PASSWORDS["asha"]}
    assert client.post("/ops/sign-in", data=given).status_code == 400
    form = re.search(r'name="form" value="([^"]+)"', sign("").client.get("/ops/sign-in").text)[1]
    assert client.post("/ops/sign-in", data=given | {"form": form}).status_code == 400
    assert client.get("/ops/").status_code == 303


def test_signing_out_ends_the_session_wherever_its_cookie_is(sign: Sign) -> None:
    person, thief = sign("asha"), sign("")
    thief.client.set_cookie("pipeline_ops", person.client.get_cookie("pipeline_ops", path="/ops").value, path="/ops")
    assert thief.get("/ops/").status_code == 200
    assert person.post("/ops/sign-out").location == "/ops/sign-in"
    assert person.get("/ops/").status_code == thief.get("/ops/").status_code == 303


def test_a_session_ends_with_its_time_and_with_its_users_entry(
    sign: Sign, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookie = sign("asha").client.get_cookie("pipeline_ops", path="/ops").value

    def status(given: Settings) -> int:
        client = create_app(given).test_client()
        client.set_cookie("pipeline_ops", cookie, path="/ops")
        return client.get("/ops/nothing").status_code

    viewer = users().replace(":operator", "")
    assert status(settings) == 404
    assert status(settings.model_copy(update={"ops_users": type(settings.ops_users)(viewer)})) == 303
    assert status(settings.model_copy(update={"ops_secret": type(settings.ops_secret)(SECRET + "x")})) == 303
    later = datetime.now(UTC).timestamp() + settings.ops_session_seconds + 1
    monkeypatch.setattr("itsdangerous.timed.time.time", lambda: later)
    assert status(settings) == 303


def test_a_hash_of_a_password_fits_into_an_env_file() -> None:
    hashed = hash_password("lighthouse-keeper")
    assert re.fullmatch(r"[A-Za-z0-9.]+", hashed)
    assert check_password(hashed, "lighthouse-keeper")
    assert not check_password(hashed, "lighthouse-keepers")
