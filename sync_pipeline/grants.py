"""OAuth grants at rest: refresh tokens encrypted with Fernet, under keys that can be rotated.

Belongs here: turning a refresh token into the bytes of ``google_connections.refresh_token_encrypted`` and back, and the
command line of keys and grants. Does not: the rows they are stored in (`sync_pipeline.connections`,
`sync_pipeline.key_rotation`), or what a grant is exchanged for (`sync_pipeline.google_calendar`).

Fernet (https://github.com/fernet/spec) has implementations in every language a SaaS is written in, so the
product can write what the pipeline reads.
"""

import argparse
import sys
from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from scaling import settings
from scaling.errors import UserError, run_command


class UnreadableGrantError(Exception):
    """A stored grant was not made with any of the configured keys, or is damaged."""


class GrantCipher:
    """Encrypts with the newest key, decrypts with any; the keys never show in a repr."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Take the keys into use.

        Args:
            keys: Fernet keys (url-safe base64 of 32 bytes), newest first.

        Raises:
            UserError: there is no key.
        """
        if not keys:
            raise UserError("there is no grant encryption key; make one with: python -m sync_pipeline.grants new-key")
        self._newest = Fernet(keys[0])
        self._fernet = MultiFernet([Fernet(key) for key in keys])

    def encrypt(self, refresh_token: str) -> bytes:
        """Encrypt a refresh token with the newest key; the result is ASCII, fit for a bytea or text column."""
        return self._fernet.encrypt(refresh_token.encode())

    def decrypt(self, grant: bytes | str) -> str:
        """Get the refresh token of a stored grant.

        Args:
            grant: what `encrypt` returned, as a bytea or text column holds it.

        Raises:
            UnreadableGrantError: no key opens it.
        """
        try:
            return self._fernet.decrypt(grant).decode()
        except (InvalidToken, ValueError):
            raise UnreadableGrantError("the stored grant does not open with any of GRANT_ENCRYPTION_KEYS") from None

    def is_newest(self, grant: bytes | str) -> bool:
        """Whether the newest key opens a stored grant, so that the older ones are not needed for it."""
        try:
            self._newest.decrypt(grant)
        except (InvalidToken, ValueError):
            return False
        return True

    def rotate(self, grant: bytes | str) -> bytes:
        """Encrypt a stored grant anew with the newest key, so that older keys can be retired.

        Args:
            grant: encrypted under any of the keys.

        Raises:
            UnreadableGrantError: no key opens it.
        """
        try:
            return self._fernet.rotate(grant)
        except (InvalidToken, ValueError):
            raise UnreadableGrantError("the stored grant does not open with any of GRANT_ENCRYPTION_KEYS") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: make a key, work on grants line by line, or encrypt anew what is stored.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code.

    Raises:
        UserError: the keys are missing or wrong, a line is not a grant, or the stored grants may not be written.
    """
    parser = argparse.ArgumentParser(prog="python -m sync_pipeline.grants", description="Keys and grants at rest.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("new-key", help="print a new key for GRANT_ENCRYPTION_KEYS (put it first)")
    commands.add_parser("encrypt", help="refresh tokens in, grants for refresh_token_encrypted out")
    commands.add_parser("rotate", help="grants in, the same grants under the newest key out")
    stored = commands.add_parser("rotate-stored", help="encrypt every grant in the database with the newest key")
    stored.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing")
    options = parser.parse_args(arguments)
    command = options.command

    if command == "new-key":
        sys.stdout.write(Fernet.generate_key().decode() + "\n")
        return 0
    keys = [key.get_secret_value() for key in settings.load(settings.SyncSettings).grant_encryption_keys]
    if command == "rotate-stored":
        from sync_pipeline import key_rotation  # which imports this module

        return key_rotation.command(keys, dry_run=options.dry_run)
    cipher = GrantCipher(keys)
    for number, line in enumerate(filter(None, map(str.strip, sys.stdin)), start=1):
        try:
            grant = cipher.encrypt(line) if command == "encrypt" else cipher.rotate(line.encode())
        except UnreadableGrantError as error:
            raise UserError(f"line {number}: {error}") from None
        sys.stdout.write(grant.decode() + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
