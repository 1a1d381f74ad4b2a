"""The token endpoint and access tokens."""

import httpx
import pytest

from tests.google_calendar.conftest import ANA, Api, reason


def _refresh(api: Api, **form: str) -> httpx.Response:
    token = api.simulator.user(ANA).refresh_token
    body = {"grant_type": "refresh_token", "refresh_token": token, "client_id": "id", "client_secret": "s", **form}
    return api.http.post(api.simulator.token_url, data=body)


def _list(api: Api, access_token: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {access_token}"}
    return api.http.get(f"{api.simulator.url}/calendar/v3/users/me/calendarList", headers=headers)


def test_a_refresh_brings_an_access_token_that_expires_with_virtual_time(api: Api) -> None:
    granted = _refresh(api).json()
    assert granted["token_type"] == "Bearer"
    assert granted["expires_in"] == 3599
    assert _list(api, granted["access_token"]).status_code == 200
    api.simulator.advance(3600)
    answer = _list(api, granted["access_token"])
    assert (answer.status_code, reason(answer)) == (401, "authError")


def test_the_access_token_of_the_description_lasts_for_years(api: Api) -> None:
    api.simulator.advance(5 * 365 * 86_400)
    assert _list(api, api.simulator.user(ANA).access_token).status_code == 200


def test_a_request_without_credentials_or_with_unknown_ones_is_refused(api: Api) -> None:
    answer = api.http.get(f"{api.simulator.url}/calendar/v3/users/me/calendarList")
    assert (answer.status_code, reason(answer)) == (401, "required")
    answer = _list(api, "ya29.unknown")
    assert (answer.status_code, reason(answer)) == (401, "authError")


def test_a_revoked_grant_answers_invalid_grant_until_it_is_reinstated(api: Api) -> None:
    access = _refresh(api).json()["access_token"]
    api.simulator.revoke(ANA)
    answer = _refresh(api)
    assert answer.status_code == 400
    assert answer.json() == {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}
    assert _list(api, access).status_code == 401
    api.simulator.reinstate(ANA)
    assert _refresh(api).status_code == 200


def test_the_revocation_endpoint_revokes_the_grant_behind_a_token(api: Api) -> None:
    token = api.simulator.user(ANA).refresh_token
    assert api.http.post(f"{api.simulator.url}/revoke", params={"token": token}).status_code == 200
    assert _refresh(api).json()["error"] == "invalid_grant"
    assert api.http.post(f"{api.simulator.url}/revoke", params={"token": "x"}).status_code == 400


@pytest.mark.parametrize(
    ("form", "status", "error"),
    [
        ({"refresh_token": "1//0unknown"}, 400, "invalid_grant"),
        ({"refresh_token": ""}, 400, "invalid_request"),
        ({"grant_type": "password"}, 400, "unsupported_grant_type"),
    ],
)
def test_a_refresh_that_cannot_be_granted_says_why(api: Api, form: dict[str, str], status: int, error: str) -> None:
    answer = _refresh(api, **form)
    assert (answer.status_code, answer.json()["error"]) == (status, error)


def test_a_configured_client_is_insisted_on(api: Api) -> None:
    api.simulator.configure(client_id="id", client_secret="s")
    assert _refresh(api).status_code == 200
    for form in ({"client_id": "other"}, {"client_secret": "other"}):
        answer = _refresh(api, **form)
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")


def test_expired_access_tokens_leave_the_refresh_token_good(api: Api) -> None:
    access = _refresh(api).json()["access_token"]
    api.simulator.expire_access_tokens(ANA)
    assert _list(api, access).status_code == 401
    assert _list(api, _refresh(api).json()["access_token"]).status_code == 200


def test_the_token_endpoint_can_be_made_to_fail(api: Api) -> None:
    api.simulator.add_fault("error", method="oauth.token", user="somebody@example.com")
    api.simulator.add_fault("invalid_grant", method="oauth.token", user=ANA, times=1)
    api.simulator.add_fault("error", method="oauth.token", status=503, after=1, times=1)
    assert [_refresh(api).status_code for _ in range(3)] == [400, 503, 200]
    assert api.simulator.counts().count("oauth.token", user=ANA) == 3
    assert api.simulator.counts().count("oauth.token", status=503) == 1
