"""OAuth 2.0: grants, access tokens, the token endpoint's answers and who a request comes from.

Bodies follow https://developers.google.com/identity/protocols/oauth2/web-server#offline. The authorization-code flow
is not here: the simulator hands out refresh tokens for users that exist.
"""

import random
from dataclasses import dataclass

from devstack.google_calendar import errors
from devstack.google_calendar.clock import VirtualClock
from devstack.google_calendar.resource import Resource
from devstack.google_calendar.settings import Settings

_SCOPE = "https://www.googleapis.com/auth/calendar"
_YEARS = 10 * 365 * 86_400.0
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@dataclass(slots=True)
class _Grant:
    email: str
    revoked: bool = False


@dataclass(slots=True)
class _Access:
    grant: _Grant
    expires: float


class OAuthError(Exception):
    """An error answer of the token endpoint."""

    def __init__(self, status: int, error: str, description: str) -> None:
        super().__init__(description)
        self.status = status
        self.body: Resource = {"error": error, "error_description": description}


class Grants:
    """Refresh tokens and access tokens of every user."""

    def __init__(self, clock: VirtualClock, settings: Settings, rng: random.Random) -> None:
        self._clock = clock
        self._settings = settings
        self._random = rng
        # Never repeats in a simulator started again with the same seed: there a client that kept an access token
        # would else come to act for another user.
        self._fresh = random.SystemRandom()
        self._grants: dict[str, _Grant] = {}
        self._access: dict[str, _Access] = {}

    def connect(self, email: str, *, revoked: bool = False) -> tuple[str, str]:
        """Grant access for a user and return a refresh token and an access token that lasts ten years."""
        grant = _Grant(email, revoked)
        refresh = "1//0" + _text(60, self._random)
        self._grants[refresh] = grant
        return refresh, self._issue(grant, _YEARS, self._random)

    def user_of(self, authorization: str | None) -> str:
        """Return the e-mail address behind an Authorization header.

        Raises:
            ApiError: 401 if there is none, or the token is unknown, expired or revoked.
        """
        if not authorization:
            raise errors.login_required()
        access = self._access.get(authorization.removeprefix("Bearer ").removeprefix("OAuth ").strip())
        if access is None or access.grant.revoked or access.expires <= self._clock.now():
            raise errors.invalid_credentials()
        return access.grant.email

    def applicant(self, form: dict[str, str]) -> str:
        """Return the e-mail address whose refresh token a form carries, "" if it carries none that is known."""
        grant = self._grants.get(form.get("refresh_token", ""))
        return grant.email if grant else ""

    def token(self, form: dict[str, str]) -> Resource:
        """Answer the token endpoint with a new access token.

        Raises:
            OAuthError: as documented, e.g. invalid_grant.
        """
        kind = form.get("grant_type", "")
        if kind != "refresh_token":
            raise OAuthError(400, "unsupported_grant_type", f"Invalid grant_type: {kind}")
        self._check_client(form)
        refresh = form.get("refresh_token")
        if not refresh:
            raise OAuthError(400, "invalid_request", "Missing required parameter: refresh_token")
        grant = self._grants.get(refresh)
        if grant is None:
            raise OAuthError(400, "invalid_grant", "Bad Request")
        if grant.revoked:
            raise revoked()
        seconds = self._settings.access_token_seconds
        return {
            "access_token": self._issue(grant, seconds, self._fresh),
            "expires_in": seconds,
            "scope": _SCOPE,
            "token_type": "Bearer",
        }

    def revoke_token(self, token: str) -> None:
        """Answer the revocation endpoint: revoke the grant behind a refresh or access token.

        Raises:
            OAuthError: 400 for an unknown token.
        """
        access = self._access.get(token)
        grant = self._grants.get(token) or (access.grant if access else None)
        if grant is None or grant.revoked:
            raise OAuthError(400, "invalid_token", "Token expired or revoked")
        grant.revoked = True

    def set_revoked(self, email: str, *, revoked: bool) -> None:
        """Revoke or reinstate every grant of a user."""
        for grant in self._grants.values():
            if grant.email == email:
                grant.revoked = revoked

    def expire_access(self, email: str) -> None:
        """Expire the access tokens of a user; refresh tokens stay good."""
        for access in self._access.values():
            if access.grant.email == email:
                access.expires = 0.0

    def _check_client(self, form: dict[str, str]) -> None:
        if not self._settings.client_id:
            return
        if form.get("client_id") != self._settings.client_id:
            raise OAuthError(401, "invalid_client", "The OAuth client was not found.")
        if self._settings.client_secret and form.get("client_secret") != self._settings.client_secret:
            raise OAuthError(401, "invalid_client", "Unauthorized")

    def _issue(self, grant: _Grant, seconds: float, rng: random.Random) -> str:
        token = "ya29." + _text(80, rng)
        self._access[token] = _Access(grant, self._clock.now() + seconds)
        return token


def _text(length: int, rng: random.Random) -> str:
    return "".join(rng.choices(_ALPHABET, k=length))


def revoked() -> OAuthError:
    """Return the answer for a revoked or expired grant."""
    return OAuthError(400, "invalid_grant", "Token has been expired or revoked.")
