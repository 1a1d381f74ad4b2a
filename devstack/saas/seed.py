"""Demo data of the SaaS: tenants, workspaces, users, Google connections, fourteen months of audit logs.

Belongs here: rows of the SaaS's tables, the same for the same seed. Does not: calendars (google_calendar's worlds).

The audit logs are made inside Postgres (450,000 rows in a few seconds) and hold on purpose what breaks exporters:
NULL beside empty text, backslash-N, tabs and newlines, 4-byte UTF-8, right-to-left marks, numbers of 400 digits,
deep JSON, IPv6 with masks, and rows at the first and the last microsecond of every month.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import LiteralString

import psycopg

from sync_pipeline.grants import GrantCipher

TENANTS = 40
WORKSPACES = 60
USERS_PER_WORKSPACE = 4
CLOSED_MONTHS = 13
AUDIT_ROWS = 450_000
AI_ROWS = 20_000
NAMESPACE = uuid.UUID("8d5f1c1e-2f0c-4f6c-9b39-6a4b1f7d9a10")

# Relative weights of fourteen months: growth, a launch, a quiet holiday. The last is the open one.
MONTH_WEIGHTS = (4, 5, 5, 6, 7, 2, 8, 9, 16, 9, 10, 11, 12, 6)

NASTY_TEXTS = (
    "",
    " ",
    "\\N",
    "NULL",
    "line\nbreak\r\nand\ttab",
    "quo\"te, com,ma; semi'colon",
    "back\\slash \\x00 \\u0000",
    "🦊 4-byte 𝕌𝕋𝔽-8 👩‍👩‍👧",
    "שלום עולם \u202eright to left\u202c",
    "e\u0301 is not \u00e9",
    "\u0001\u001f control",
    "'; DROP TABLE audit_logs; --",
    "x" * 5000,
)
NASTY_JSON = (
    "{}",
    "[]",
    "null",
    '""',
    '"\\\\N"',
    '{"b": 1, "a": 2, "": 3}',
    '{"big": 1e400, "precise": 0.1234567890123456789012345678901234567890, "negative": -0.0}',
    '{"text": "tab\\tnewline\\nquote\\" emoji 🦊"}',
    "[null, true, [], {}, [[1, [2, [3]]]]]",
    "[" * 200 + "]" * 200,
    '{"1": {"2": {"3": {"4": {"5": {"6": {"7": {"8": "deep"}}}}}}}}',
)
ACTIONS = (
    "document.viewed",
    "document.viewed",
    "document.edited",
    "document.shared",
    "calendar.connected",
    "user.signed_in",
    "user.invited",
    "ai.prompted",
    "security.mfa_reset",
)
ADDRESSES = ("203.0.113.7", "198.51.100.0/24", "2001:db8::1", "2001:db8:abcd::/48", "::ffff:192.0.2.128", "10.0.0.1/32")
AGENTS = (
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 Chrome/126.0 Safari/537.36",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "curl/8.9.1",
    "okhttp/4.12.0",
)

# n ^ random: tenant k gets a share of about 1/k.
AUDIT_LOGS: LiteralString = """
INSERT INTO public.audit_logs (id, tenant_id, workspace_id, user_id, action, resource_type, resource_id, details,
                               ip_address, user_agent, created_at)
SELECT md5(%(seed)s || ':' || %(month)s || ':' || i)::uuid,
       tenant_id,
       CASE WHEN luck < 0.9 THEN workspaces[1 + abs(hashint4(i)) %% cardinality(workspaces)] END,
       CASE WHEN luck > 0.05 THEN users[1 + abs(hashint4(-i)) %% cardinality(users)] END,
       (%(actions)s::text[])[1 + floor(cardinality(%(actions)s::text[]) * dice)::int],
       CASE WHEN luck < 0.97 THEN (ARRAY['document', 'calendar', 'user', 'workspace'])[1 + floor(4 * dice)::int] END,
       CASE WHEN nasty THEN (%(texts)s::text[])[1 + pick %% cardinality(%(texts)s::text[])]
            WHEN luck < 0.8 THEN 'res_' || substr(md5(i::text), 1, 10) END,
       CASE WHEN nasty THEN (%(documents)s::jsonb[])[1 + pick %% cardinality(%(documents)s::jsonb[])]
            WHEN luck < 0.98 THEN jsonb_build_object(
                'request_id', md5(i::text), 'duration_ms', round((luck * 900)::numeric, 3),
                'changed', jsonb_build_array('title', i %% 7), 'success', luck > 0.02) END,
       CASE WHEN nasty THEN (%(addresses)s::inet[])[1 + pick %% cardinality(%(addresses)s::inet[])]
            WHEN luck < 0.99 THEN '10.0.0.0'::inet + (luck * 16000000)::bigint END,
       CASE WHEN nasty THEN (%(texts)s::text[])[1 + (pick + 5) %% cardinality(%(texts)s::text[])]
            ELSE (%(agents)s::text[])[1 + floor(cardinality(%(agents)s::text[]) * dice)::int] END,
       CASE i WHEN 1 THEN %(start)s
              WHEN 2 THEN %(end)s - interval '1 microsecond'
              WHEN 3 THEN %(start)s + interval '1 microsecond'
              ELSE %(start)s + (i - luck) / %(rows)s * (%(end)s - %(start)s) END
FROM (SELECT i, luck, dice, i <= 3 OR i %% 40 = 0 AS nasty, i %% 40 + i / 40 + %(month)s AS pick,
             (%(tenants)s::uuid[])[floor((cardinality(%(tenants)s::uuid[]) + 1) ^ skew)::int] AS tenant_id
      FROM (SELECT i, random() AS luck, random() AS dice, random() AS skew
            FROM generate_series(1, %(rows)s) AS i) AS dice) AS rolled
JOIN (SELECT tenant_id, array_agg(id ORDER BY id) AS workspaces
      FROM public.workspaces GROUP BY tenant_id) AS w USING (tenant_id)
JOIN (SELECT tenant_id, array_agg(id ORDER BY id) AS users FROM public.users GROUP BY tenant_id) AS u USING (tenant_id)
"""

AI_USAGE: LiteralString = """
INSERT INTO public.ai_usage (id, tenant_id, user_id, model, feature, input_tokens, output_tokens, cost_usd, created_at)
SELECT md5(%(seed)s || ':ai:' || i)::uuid,
       (%(tenants)s::uuid[])[floor((cardinality(%(tenants)s::uuid[]) + 1) ^ random())::int],
       (%(users)s::uuid[])[1 + i %% cardinality(%(users)s::uuid[])],
       (ARRAY['small', 'medium', 'large'])[1 + i %% 3],
       (ARRAY['summarise', 'schedule', 'search'])[1 + i %% 3],
       300 + i %% 4000, 50 + i %% 900, round((i %% 4000) * 0.000003 + 0.00001, 6),
       %(start)s + i / %(rows)s::float8 * (%(end)s - %(start)s)
FROM generate_series(1, %(rows)s) AS i
"""


@dataclass(frozen=True, slots=True)
class Account:
    """A Google account that granted access."""

    email: str
    refresh_token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Seeded:
    """What there is now."""

    tenants: int
    workspaces: int
    audit_rows: int
    first_month: datetime
    """Start of the oldest month of audit logs."""
    closed_months: int
    """Months before the one that is open at the given time."""


def is_seeded(connection: psycopg.Connection) -> bool:
    """Tell whether the tables hold rows already.

    Args:
        connection: as the tables' owner.
    """
    return bool(connection.execute("SELECT FROM public.tenants LIMIT 1").rowcount)


def seed(
    connection: psycopg.Connection,
    *,
    now: datetime,
    accounts: Sequence[Account],
    grant_keys: Sequence[str],
    audit_rows: int = AUDIT_ROWS,
    seed: int = 1,
) -> Seeded:
    """Fill the SaaS's empty tables, in the caller's transaction.

    Args:
        connection: as a superuser: triggers and FK checks are off while rows are generated.
        now: the end of the audit logs; the month it falls into is the open one.
        accounts: one Google connection each, spread over the workspaces in order.
        grant_keys: Fernet keys of the refresh tokens, newest first.
        audit_rows: of `audit_logs`, over all months.
        seed: same seed, same rows (but for the ciphertext of the refresh tokens).

    Returns:
        Counts and the first month.
    """
    tenants = [_id(seed, "tenant", number) for number in range(1, TENANTS + 1)]
    workspaces = [_id(seed, "workspace", number) for number in range(1, WORKSPACES + 1)]
    # The first forty workspaces are one per tenant, the further twenty belong to the first tenants.
    owners = [tenants[number % TENANTS] for number in range(WORKSPACES)]
    members = [workspace for workspace in range(WORKSPACES) for _ in range(USERS_PER_WORKSPACE)]
    users = [_id(seed, "user", number) for number in range(1, len(members) + 1)]
    cipher = GrantCipher(grant_keys)

    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL session_replication_role = replica")
        cursor.execute("SELECT setseed(%s)", [(seed % 1000) / 1000])
        cursor.executemany(
            "INSERT INTO public.tenants (id, name, plan) VALUES (%s, %s, %s)",
            [
                (tenant, f"Tenant {number:02}", "enterprise" if number < 4 else "team" if number < 16 else "free")
                for number, tenant in enumerate(tenants, start=1)
            ],
        )
        cursor.executemany(
            "INSERT INTO public.workspaces (id, tenant_id, name) VALUES (%s, %s, %s)",
            [
                (workspace, owner, f"Workspace {number:02}")
                for number, (workspace, owner) in enumerate(zip(workspaces, owners, strict=True), start=1)
            ],
        )
        cursor.executemany(
            "INSERT INTO public.users (id, tenant_id, email, full_name, google_api_enabled)"
            " VALUES (%s, %s, %s, %s, %s)",
            [
                (user, owners[workspace], f"person-{number:03}@example.com", f"Person {number}", number % 4 == 1)
                for number, (user, workspace) in enumerate(zip(users, members, strict=True), start=1)
            ],
        )
        cursor.executemany(
            "INSERT INTO public.google_connections (id, tenant_id, workspace_id, user_id, google_account,"
            " refresh_token_encrypted) VALUES (%s, %s, %s, %s, %s, %s)",
            [
                (
                    _id(seed, "connection", number),
                    owners[number % WORKSPACES],
                    workspaces[number % WORKSPACES],
                    users[number % WORKSPACES * USERS_PER_WORKSPACE],
                    account.email,
                    cipher.encrypt(account.refresh_token),
                )
                for number, account in enumerate(accounts)
            ],
        )
        months = _months(now)
        total = 0
        for number, (start, end) in enumerate(months):
            rows = max(3, audit_rows * MONTH_WEIGHTS[number] // sum(MONTH_WEIGHTS))
            total += rows
            cursor.execute(
                AUDIT_LOGS,
                {
                    "seed": seed,
                    "month": number,
                    "rows": rows,
                    "start": start,
                    "end": end,
                    "tenants": tenants,
                    "actions": list(ACTIONS),
                    "texts": list(NASTY_TEXTS),
                    "documents": list(NASTY_JSON),
                    "addresses": list(ADDRESSES),
                    "agents": list(AGENTS),
                },
            )
        cursor.execute(
            AI_USAGE,
            {
                "seed": seed,
                "rows": AI_ROWS,
                "start": months[0][0],
                "end": now,
                "tenants": tenants,
                "users": users,
            },
        )
        cursor.execute("SET LOCAL session_replication_role = origin")
    return Seeded(TENANTS, WORKSPACES, total, months[0][0], CLOSED_MONTHS)


def _id(seed: int, kind: str, number: int) -> uuid.UUID:
    return uuid.uuid5(NAMESPACE, f"{seed}/{kind}/{number}")


def _months(now: datetime) -> list[tuple[datetime, datetime]]:
    """The closed months before `now` in UTC, oldest first, and the open one, which ends now."""
    now = now.astimezone(UTC)
    starts = [now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)]
    while len(starts) <= CLOSED_MONTHS:
        starts.insert(0, (starts[0] - timedelta(days=1)).replace(day=1))
    return list(zip(starts, [*starts[1:], now], strict=True))
