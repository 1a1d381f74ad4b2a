"""Whether the bucket is set up as the archive needs it: asked before a run writes, and shown to people.

Belongs here: the questions, which answers stop a run, the remedies, the recommended policy and lifecycle rules, and
``python -m archive_pipeline.bucket_protection``. Does not: changing the bucket; that is its owner's to do.

Object Lock alone does not keep an archive: an overwritten key has a new current version, which Athena reads, and a
delete marker hides a locked one. So the policy makes S3 refuse both, and manifests name the versions.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from botocore.exceptions import ClientError

from archive_pipeline.errors import BucketUnprotectedError
from archive_pipeline.manifest import Layout
from archive_pipeline.objects import ArchiveBucket, Protection
from scaling.errors import UserError, run_command
from scaling.settings import ArchiveSettings, load

CANARY = b"The archive can be written, and read back with its key.\n"
LEFTOVER_DAYS = 7
# Answers that mean "you may not ask" or "this server does not know the question".
NOT_TOLD = ("AccessDenied", "NotImplemented", "MethodNotAllowed", "403", "405", "501")
# Classes whose objects must be restored, for hours, before anybody can read them.
UNREADABLE_CLASSES = ("GLACIER", "DEEP_ARCHIVE")
COMMAND = "python -m archive_pipeline.bucket_protection"


class Verdict(StrEnum):
    """What an answer means for a run."""

    OK = "ok"
    REFUSED = "refused"
    ADVICE = "advice"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One question and its answer.

    Attributes:
        what: was asked.
        have: the answer.
        want: the answer that is required, or advised.
        verdict: whether a run may start.
        remedy: what to do; empty when nothing is.
    """

    what: str
    have: str
    want: str
    verdict: Verdict
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class BucketReport:
    """All answers of a bucket.

    Attributes:
        bucket: its name.
        findings: in the order asked.
    """

    bucket: str
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> tuple[Finding, ...]:
        """What keeps a run from starting."""
        return tuple(finding for finding in self.findings if finding.verdict is Verdict.REFUSED)


def require(bucket: ArchiveBucket, layout: Layout, *, write: bool = True) -> BucketReport:
    """Refuse a bucket that lacks what the settings require, before anything is written to it.

    Args:
        bucket: of the archive.
        layout: where the archive lies in it.
        write: whether the last question may be asked, which writes an object; a dry run does not.

    Returns:
        The report; what is only advised may be missing.

    Raises:
        BucketUnprotectedError: something required is missing; the sentence names each thing and its remedy.
        UserError: the bucket does not exist or does not answer.
    """
    report = inspect(bucket, layout, write=write)
    if report.refused:
        problems = "; ".join(f"{each.what} is {each.have}: {each.remedy}" for each in report.refused)
        raise BucketUnprotectedError(f"bucket {bucket.name} is not set up as required: {problems}")
    return report


def inspect(bucket: ArchiveBucket, layout: Layout, *, write: bool = True) -> BucketReport:
    """Ask everything.

    The last question writes one small object the first time, with the encryption and the lock of a manifest, and reads
    it back, which needs the permissions of a run but for its deletes.

    Args:
        bucket: of the archive.
        layout: where the archive lies in it.
        write: whether the last question may be asked.

    Raises:
        UserError: the bucket does not exist or does not answer.
    """
    encryption = _default_encryption(bucket)
    findings = [
        _region(bucket),
        _versioning(bucket),
        _object_lock(bucket),
        *_lifecycle(bucket, layout),
        _public_access(bucket),
        *_policy(bucket),
    ]
    default = _compare_encryption(bucket, encryption, None)
    # A stored object tells which key an alias means.
    found = (encryption or {}).get("KMSMasterKeyID")
    unsettled = found is not None and "alias/" in f"{found} {bucket.protection.kms_key}"
    refused = any(each.verdict is Verdict.REFUSED for each in (*findings, *(() if unsettled else (default,))))
    if refused or not write:
        canary = Finding("write and read back", "not tried", "an object", Verdict.UNKNOWN)
    else:
        canary, resolved = _canary(bucket, layout)
        default = _compare_encryption(bucket, encryption, resolved)
    findings.insert(3, default)
    return BucketReport(bucket.name, (*findings, canary))


def canary_key(layout: Layout, protection: Protection) -> str:
    """Key of the object that is written and read back; other encryption or another lock is another object.

    Args:
        layout: where the archive lies.
        protection: how objects are stored.
    """
    how = hashlib.sha256(f"{protection.kms_key} {protection.lock}".encode()).hexdigest()
    return f"{layout.manifests}canary-{how[:8]}.txt"


def recommended_policy(
    bucket: str, layout: Layout, protection: Protection, *, run_role: str, erase_role: str
) -> dict[str, Any]:
    """Write the policy under which nobody overwrites or hides an archived object.

    Args:
        bucket: its name.
        layout: where the archive lies in it.
        protection: how objects are stored.
        run_role: ARN of the role that archives; it removes what its dead attempts left among the data.
        erase_role: ARN of the only role that removes versions, for erasures.
    """
    arn = f"arn:aws:s3:::{bucket}"
    data, manifests = f"{arn}/{layout.data}*", f"{arn}/{layout.manifests}*"
    statements = [
        _deny("TlsOnly", "s3:*", [arn, f"{arn}/*"], {"Bool": {"aws:SecureTransport": "false"}}),
        # Parts, manifests and links; salts and the catalog are replaced. Also refuses copies, which carry no
        # If-None-Match. The second condition exempts the steps of multipart uploads, which cannot carry one.
        _deny(
            "NeverOverwrite",
            "s3:PutObject",
            [data, f"{arn}/{layout.manifests}year=*.json", f"{arn}/{layout.manifests}chain/*"],
            {"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}},
        ),
        _deny(
            "OnlyErasuresRemoveVersions",
            ["s3:DeleteObjectVersion", "s3:BypassGovernanceRetention", "s3:PutObjectLegalHold"],
            [data, manifests],
            {"StringNotEquals": {"aws:PrincipalArn": erase_role}},
        ),
        _deny(
            "NobodyHidesData",
            "s3:DeleteObject",
            [data],
            {"StringNotEquals": {"aws:PrincipalArn": [run_role, erase_role]}},
        ),
        _deny(
            "NobodyHidesManifests",
            "s3:DeleteObject",
            [manifests],
            {"StringNotEquals": {"aws:PrincipalArn": erase_role}},
        ),
    ]
    if protection.kms_key is not None and protection.kms_key.startswith("arn:"):
        key = "s3:x-amz-server-side-encryption-aws-kms-key-id"
        # A negated operator is true of a request that does not carry the header and so takes the bucket's default.
        condition = {"StringNotEquals": {key: protection.kms_key}, "Null": {key: "false"}}
        statements.append(_deny("NoOtherKey", "s3:PutObject", [data, manifests], condition))
    return {"Version": "2012-10-17", "Statement": statements}


def recommended_lifecycle() -> dict[str, Any]:
    """Write the lifecycle rules, which end the multipart uploads that other tools left, and nothing of the archive."""
    return {
        "Rules": [
            {
                "ID": "end-leftover-multipart-uploads",
                "Status": "Enabled",
                "Filter": {"Prefix": ""},
                "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": LEFTOVER_DAYS},
            }
        ]
    }


def _deny(
    sid: str, action: str | list[str], resource: list[str], condition: Mapping[str, Mapping[str, object]]
) -> dict[str, Any]:
    return {
        "Sid": sid,
        "Effect": "Deny",
        "Principal": "*",
        "Action": action,
        "Resource": resource,
        "Condition": condition,
    }


def _region(bucket: ArchiveBucket) -> Finding:
    answer = _ask(bucket, bucket.client.head_bucket)
    found = answer.get("BucketRegion") if answer else None
    if found is None or found == bucket.region:
        return Finding("region", found or "not told", bucket.region, Verdict.OK if found else Verdict.UNKNOWN)
    return Finding("region", found, bucket.region, Verdict.REFUSED, f"set AWS_REGION to {found}")


def _versioning(bucket: ArchiveBucket) -> Finding:
    required = bucket.protection.versioned
    want = "Enabled" if required else "Enabled (advised)"
    answer = _ask(bucket, bucket.client.get_bucket_versioning)
    if answer is None:
        return _not_told("versioning", want, "s3:GetBucketVersioning", required=required)
    status = answer.get("Status", "off")
    if status == "Enabled":
        return Finding("versioning", status, want, Verdict.OK)
    return Finding(
        "versioning",
        status.lower(),
        want,
        Verdict.REFUSED if required else Verdict.ADVICE,
        f"aws s3api put-bucket-versioning --bucket {bucket.name} --versioning-configuration Status=Enabled",
    )


def _object_lock(bucket: ArchiveBucket) -> Finding:
    mode = bucket.protection.lock
    want = "off" if mode == "off" else f"enabled, without a default retention ({mode} is set object by object)"
    required = mode != "off"
    answer = _ask(bucket, bucket.client.get_object_lock_configuration, absent=("ObjectLockConfigurationNotFoundError",))
    if answer is None:
        return _not_told("Object Lock", want, "s3:GetBucketObjectLockConfiguration", required=required)
    configuration = answer.get("ObjectLockConfiguration", {})
    retention = configuration.get("Rule", {}).get("DefaultRetention")
    if retention:
        # It would lock the salts too, and an erasure that cannot remove them leaves personal data guessable.
        return Finding(
            "Object Lock",
            f"on every object by a default retention ({retention['Mode'].lower()})",
            want,
            Verdict.REFUSED,
            f"aws s3api put-object-lock-configuration --bucket {bucket.name} "
            "--object-lock-configuration ObjectLockEnabled=Enabled, without a rule, because erasures must be able to "
            "remove salts",
        )
    enabled = configuration.get("ObjectLockEnabled") == "Enabled"
    if enabled or not required:
        return Finding("Object Lock", "enabled" if enabled else "off", want, Verdict.OK)
    return Finding(
        "Object Lock",
        "off",
        want,
        Verdict.REFUSED,
        f"aws s3api put-object-lock-configuration --bucket {bucket.name} "
        "--object-lock-configuration ObjectLockEnabled=Enabled",
    )


def _default_encryption(bucket: ArchiveBucket) -> dict[str, Any] | None:
    """The bucket's default: algorithm and key; None when it is not told."""
    answer = _ask(
        bucket, bucket.client.get_bucket_encryption, absent=("ServerSideEncryptionConfigurationNotFoundError",)
    )
    if answer is None:
        return None
    rules = answer.get("ServerSideEncryptionConfiguration", {}).get("Rules", [])
    return next((dict(rule["ApplyServerSideEncryptionByDefault"]) for rule in rules), {})


def _compare_encryption(bucket: ArchiveBucket, default: dict[str, Any] | None, resolved: str | None) -> Finding:
    what, key = "default encryption", bucket.protection.kms_key
    want = f"aws:kms with {key}" if key else "any"
    if default is None:
        return _not_told(what, want, "s3:GetEncryptionConfiguration", required=key is not None)
    algorithm, found = default.get("SSEAlgorithm", "none"), default.get("KMSMasterKeyID")
    have = f"{algorithm} with {found}" if found else algorithm
    if key is None or (algorithm.startswith("aws:kms") and found and _same_key(found, key, resolved)):
        return Finding(what, have, want, Verdict.OK)
    rule = {
        "ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key},
        "BucketKeyEnabled": True,
    }
    return Finding(
        what,
        have,
        want,
        Verdict.REFUSED,
        f"aws s3api put-bucket-encryption --bucket {bucket.name} --server-side-encryption-configuration "
        f"'{json.dumps({'Rules': [rule]})}', or correct ARCHIVE_SSE_KMS_KEY",
    )


def _same_key(found: str, configured: str, resolved: str | None) -> bool:
    """Whether two names are one key's: an ARN ends in the id or the alias; an alias is resolved by a stored object."""
    return any(
        found == name or found.endswith((f"/{name}", f":{name}")) or name.endswith((f"/{found}", f":{found}"))
        for name in (configured, resolved)
        if name is not None
    )


def _lifecycle(bucket: ArchiveBucket, layout: Layout) -> Iterator[Finding]:
    uploads, expiry, classes = "leftover multipart uploads", "lifecycle expiry", "storage classes"
    answer = _ask(bucket, bucket.client.get_bucket_lifecycle_configuration, absent=("NoSuchLifecycleConfiguration",))
    if answer is None:
        yield _not_told(f"{uploads}, {expiry}", "ended, none", "s3:GetLifecycleConfiguration", required=False)
        return
    rules = [rule for rule in answer.get("Rules", []) if rule["Status"] == "Enabled" and _meets(rule, layout)]
    days = [rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] for rule in rules if _ends_uploads(rule)]
    yield Finding(
        uploads,
        f"ended after {min(days)} days" if days else "kept, and paid, for ever",
        "ended (advised)",
        Verdict.OK if days else Verdict.ADVICE,
        "" if days else "add the rule that --policy prints",
    )
    expiring = [_name(rule) for rule in rules if {"Days", "Date"} & rule.get("Expiration", {}).keys()]
    yield Finding(
        expiry,
        f"set by rule {', '.join(expiring)}" if expiring else "none",
        "none",
        Verdict.REFUSED if expiring else Verdict.OK,
        "limit the rule to prefixes outside the archive; it would remove archived months" if expiring else "",
    )
    if forgetting := [_name(rule) for rule in rules if "NoncurrentVersionExpiration" in rule]:
        yield Finding(
            "old versions",
            f"removed by rule {', '.join(forgetting)}",
            "kept (advised)",
            Verdict.ADVICE,
            "an object that was overwritten or hidden is restored from its old version",
        )
    moving = [
        _name(rule)
        for rule in rules
        if any(each.get("StorageClass") in UNREADABLE_CLASSES for each in rule.get("Transitions", []))
    ]
    if moving:
        yield Finding(
            classes,
            f"unreadable ones by rule {', '.join(moving)}",
            "readable ones (advised)",
            Verdict.ADVICE,
            "Athena, queries and audits cannot read them; GLACIER_IR costs about the same and can be read",
        )


def _meets(rule: Mapping[str, Any], layout: Layout) -> bool:
    """Whether a rule touches the archive, whose objects carry no tags."""
    condition = rule.get("Filter", {})
    condition = condition.get("And", condition)
    if condition.get("Tag") or condition.get("Tags"):
        return False
    prefix = condition.get("Prefix", rule.get("Prefix", ""))
    return any(each.startswith(prefix) or prefix.startswith(each) for each in (layout.data, layout.manifests))


def _ends_uploads(rule: Mapping[str, Any]) -> bool:
    return "DaysAfterInitiation" in rule.get("AbortIncompleteMultipartUpload", {})


def _name(rule: Mapping[str, Any]) -> str:
    return str(rule.get("ID", "without a name"))


def _public_access(bucket: ArchiveBucket) -> Finding:
    what, want = "public access", "blocked (advised)"
    answer = _ask(bucket, bucket.client.get_public_access_block, absent=("NoSuchPublicAccessBlockConfiguration",))
    if answer is None:
        return _not_told(what, want, "s3:GetBucketPublicAccessBlock", required=False)
    blocks = answer.get("PublicAccessBlockConfiguration", {})
    switches = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    if missing := [switch for switch in switches if not blocks.get(switch)]:
        return Finding(
            what,
            f"not blocked by {', '.join(missing)}",
            want,
            Verdict.ADVICE,
            f"aws s3api put-public-access-block --bucket {bucket.name} --public-access-block-configuration "
            + ",".join(f"{switch}=true" for switch in switches),
        )
    return Finding(what, "blocked", want, Verdict.OK)


def _policy(bucket: ArchiveBucket) -> Iterator[Finding]:
    answer = _ask(bucket, bucket.client.get_bucket_policy, absent=("NoSuchBucketPolicy",))
    if answer is None:
        yield _not_told("policy", "denies what the archive never does (advised)", "s3:GetBucketPolicy", required=False)
        return
    try:
        statements = json.loads(answer.get("Policy", "{}")).get("Statement", [])
    except ValueError:
        statements = []
    conditions = [
        json.dumps(statement.get("Condition", {})).lower()
        for statement in (statements if isinstance(statements, list) else [statements])
        if statement.get("Effect") == "Deny"
    ]
    for what, key in (("policy on overwriting", "s3:if-none-match"), ("policy on plain HTTP", "aws:securetransport")):
        denied = any(key in condition for condition in conditions)
        yield Finding(
            what,
            "denies it" if denied else "allows it",
            "denies it (advised)",
            Verdict.OK if denied else Verdict.ADVICE,
            "" if denied else "add the policy that --policy prints",
        )


def _canary(bucket: ArchiveBucket, layout: Layout) -> tuple[Finding, str | None]:
    what, want = "write and read back", "an object, encrypted and locked as a manifest is"
    key = canary_key(layout, bucket.protection)
    try:
        next(bucket.keys(layout.data), None)
        bucket.put_bytes(key, CANARY, content_type="text/plain")
        stored = bucket.head(key)
        intact = bucket.read(key) == CANARY
    except (UserError, FileNotFoundError) as error:
        return Finding(what, "not possible", want, Verdict.REFUSED, str(error)), None
    if not intact or stored is None:
        return Finding(what, "other bytes", want, Verdict.REFUSED, f"s3://{bucket.name}/{key} was altered"), None
    if bucket.protection.lock != "off" and stored.lock is None:
        # Seen without s3:GetObjectRetention too, which audits and erasures need as well.
        remedy = "allow s3:PutObjectRetention and s3:GetObjectRetention to the credentials"
        return Finding(what, "possible, but without a lock", want, Verdict.REFUSED, remedy), stored.kms_key
    return Finding(what, "possible", want, Verdict.OK), stored.kms_key


def _ask(
    bucket: ArchiveBucket, question: Callable[..., Any], *, absent: Sequence[str] = ()
) -> Mapping[str, Any] | None:
    """An answer about the bucket: empty when nothing is set, None when it is not told."""
    with bucket.sentences(""):
        try:
            answer: Mapping[str, Any] = question(Bucket=bucket.name)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in absent:
                return {}
            if code in NOT_TOLD:
                return None
            raise
    return answer


def _not_told(what: str, want: str, permission: str, *, required: bool) -> Finding:
    verdict = Verdict.REFUSED if required else Verdict.UNKNOWN
    return Finding(what, "not told", want, verdict, f"allow {permission} to the credentials")


def _print(report: BucketReport) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {Verdict.OK: "green", Verdict.REFUSED: "bold red", Verdict.ADVICE: "yellow", Verdict.UNKNOWN: "dim"}
    table = Table(title=f"bucket {report.bucket}", title_justify="left")
    for heading in ("", "setting", "have", "required", "remedy"):
        table.add_column(heading, overflow="fold")
    for each in report.findings:
        cells = (each.what, each.have, each.want, each.remedy)
        table.add_row(f"[{colours[each.verdict]}]{each.verdict}[/]", *map(escape, cells))
    Console().print(table)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        The exit code; 1 when a run would be refused.
    """
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Whether the bucket is set up as the archive's settings require."
    )
    parser.add_argument(
        "--policy", action="store_true", help="print the recommended bucket policy and lifecycle rules as JSON instead"
    )
    parser.add_argument(
        "--run-role", metavar="ARN", default="arn:aws:iam::ACCOUNT:role/ARCHIVE", help="the role that archives"
    )
    parser.add_argument(
        "--erase-role",
        metavar="ARN",
        default="arn:aws:iam::ACCOUNT:role/ERASE",
        help="the one that may remove versions",
    )
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    settings = load(ArchiveSettings)
    layout = Layout(settings.archive_prefix)
    if options.policy:
        policy = recommended_policy(
            settings.archive_bucket,
            layout,
            Protection.from_settings(settings),
            run_role=options.run_role,
            erase_role=options.erase_role,
        )
        print(json.dumps({"policy": policy, "lifecycle": recommended_lifecycle()}, indent=2))
        return 0
    report = inspect(ArchiveBucket.from_settings(settings), layout)
    _print(report)
    return 1 if report.refused else 0


if __name__ == "__main__":
    run_command(main)
