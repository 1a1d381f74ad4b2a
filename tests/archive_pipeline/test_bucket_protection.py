"""The bucket is set up as the settings require, or nothing is written to it."""

import json
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import boto3
import pytest

from archive_pipeline.bucket_protection import (
    BucketReport,
    Verdict,
    canary_key,
    inspect,
    main,
    recommended_lifecycle,
    recommended_policy,
    require,
)
from archive_pipeline.errors import BucketUnprotectedError
from archive_pipeline.manifest import Layout
from archive_pipeline.months import Month
from archive_pipeline.objects import ArchiveBucket, Protection
from devstack.aws import Aws
from devstack.servers import Bucket
from scaling.errors import UserError
from scaling.settings import ArchiveSettings, load
from tests.archive_pipeline.s3_with_faults import Faults, faulty_s3

LAYOUT = Layout("audit_logs")
RUN_ROLE, ERASE_ROLE = "arn:aws:iam::1:role/run", "arn:aws:iam::1:role/erase"
BLOCKED = {"BlockPublicAcls": True, "IgnorePublicAcls": True, "BlockPublicPolicy": True, "RestrictPublicBuckets": True}


@pytest.fixture
def archive(bucket: Bucket, settings_environment: Callable[..., None]) -> Callable[..., ArchiveBucket]:
    """Make the archive's bucket under settings: `archive(ARCHIVE_OBJECT_LOCK="governance")`."""

    def make(**settings: str) -> ArchiveBucket:
        settings_environment(None, bucket, **settings)
        return ArchiveBucket.from_settings(load(ArchiveSettings))

    return make


def verdicts(report: BucketReport) -> dict[str, Verdict]:
    return {finding.what: finding.verdict for finding in report.findings}


def have(report: BucketReport) -> dict[str, str]:
    return {finding.what: finding.have for finding in report.findings}


def test_a_bucket_of_which_nothing_is_required_is_taken_with_advice(archive: Callable[..., ArchiveBucket]) -> None:
    report = require(archive(), LAYOUT)
    found = verdicts(report)
    assert report.refused == ()
    assert found["write and read back"] is Verdict.OK
    assert [found[what] for what in ("versioning", "leftover multipart uploads", "policy on overwriting")] == [
        Verdict.ADVICE
    ] * 3


def test_a_dry_run_asks_and_writes_nothing(archive: Callable[..., ArchiveBucket]) -> None:
    bucket = archive()
    assert verdicts(require(bucket, LAYOUT, write=False))["write and read back"] is Verdict.UNKNOWN
    assert list(bucket.keys("")) == []


# case 49
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"ARCHIVE_OBJECT_LOCK": "governance"},
            r"versioning is off: aws s3api .*Enabled; Object Lock is off: aws s3api",
        ),
        ({"ARCHIVE_PRUNE": "propose"}, r"versioning is off: aws s3api put-bucket-versioning --bucket test-"),
        ({"ARCHIVE_SSE_KMS_KEY": "alias/archive"}, r"default encryption is none: aws s3api put-bucket-encryption"),
    ],
)
def test_a_bucket_without_the_required_versioning_object_lock_or_encryption_is_refused_before_anything_is_written(
    archive: Callable[..., ArchiveBucket], settings: dict[str, str], sentence: str
) -> None:
    bucket = archive(**settings)
    with pytest.raises(BucketUnprotectedError, match=rf"^bucket test-\w+ is not set up as required: {sentence}"):
        require(bucket, LAYOUT)
    assert list(bucket.keys("")) == []


@pytest.mark.lockable_bucket
def test_a_bucket_with_versions_and_object_lock_takes_a_locked_object_once(
    archive: Callable[..., ArchiveBucket],
) -> None:
    bucket = archive(ARCHIVE_OBJECT_LOCK="governance", ARCHIVE_OBJECT_LOCK_DAYS="1")
    for _ in range(2):
        found = verdicts(require(bucket, LAYOUT))
        assert [found[what] for what in ("versioning", "Object Lock", "write and read back")] == [Verdict.OK] * 3
    [canary] = bucket.versions("")
    stored = bucket.head(canary.key)
    assert stored is not None
    assert (canary.key, stored.lock) == (canary_key(LAYOUT, bucket.protection), "governance")


@pytest.mark.lockable_bucket
def test_a_default_retention_is_refused_because_it_would_lock_the_salts(archive: Callable[..., ArchiveBucket]) -> None:
    bucket = archive()
    bucket.client.put_object_lock_configuration(
        Bucket=bucket.name,
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled",
            "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}},
        },
    )
    with pytest.raises(BucketUnprotectedError, match="erasures must be able to remove salts"):
        require(bucket, LAYOUT)


def rule(**parts: Any) -> dict[str, Any]:
    return {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": ""}, **parts}


@pytest.mark.parametrize(
    ("rules", "refused"),
    [
        ([rule(Expiration={"Days": 400})], True),
        ([rule(Expiration={"Days": 400}, Filter={"Prefix": "audit_logs/year=2025/"})], True),
        ([rule(Expiration={"Days": 400}, Filter={"Prefix": "audit_logs_man"})], True),
        ([rule(Expiration={"Days": 400}, Filter={"Prefix": "exports/"})], False),
        ([rule(Expiration={"Days": 400}, Status="Disabled")], False),
    ],
)
def test_a_lifecycle_rule_that_would_remove_archived_months_is_refused(
    archive: Callable[..., ArchiveBucket], rules: list[Any], refused: bool
) -> None:
    bucket = archive()
    bucket.client.put_bucket_lifecycle_configuration(
        Bucket=bucket.name, LifecycleConfiguration={"Rules": [*rules, *recommended_lifecycle()["Rules"]]}
    )
    report = inspect(bucket, LAYOUT)
    assert [finding.what for finding in report.refused] == (["lifecycle expiry"] if refused else [])
    assert verdicts(report)["leftover multipart uploads"] is Verdict.OK


@pytest.mark.lockable_bucket
def test_under_the_recommended_policy_nobody_but_its_roles_hides_or_removes_an_archived_object(
    archive: Callable[..., ArchiveBucket],
) -> None:
    bucket = archive()
    policy = recommended_policy(bucket.name, LAYOUT, Protection(), run_role=RUN_ROLE, erase_role=ERASE_ROLE)
    # The S3 server of these tests speaks plain HTTP, and takes every request for one without If-None-Match.
    kept = [each for each in policy["Statement"] if each["Sid"] not in ("TlsOnly", "NeverOverwrite")]
    bucket.client.put_bucket_policy(Bucket=bucket.name, Policy=json.dumps({**policy, "Statement": kept}))
    month = Month(2025, 1)
    salts = LAYOUT.salts(month, "main", 1)
    for key in (LAYOUT.part(month, "main", 1, 0, "00" * 32), LAYOUT.manifest(month, "main", 1), salts):
        version = bucket.put_bytes(key, b"one", content_type="text/plain")
        with pytest.raises(UserError, match="AccessDenied"):
            bucket.delete(key)
        with pytest.raises(UserError, match="AccessDenied"):
            bucket.delete(key, version)
        assert bucket.read(key) == b"one"
    bucket.client.delete_bucket_policy(Bucket=bucket.name)


def test_the_recommended_policy_refuses_plain_http_and_a_put_that_could_overwrite(
    archive: Callable[..., ArchiveBucket],
) -> None:
    bucket = archive()
    policy = recommended_policy(bucket.name, LAYOUT, Protection(), run_role=RUN_ROLE, erase_role=ERASE_ROLE)
    never = next(each for each in policy["Statement"] if each["Sid"] == "NeverOverwrite")
    assert never["Condition"]["Null"] == {"s3:if-none-match": "true"}
    guarded = [pattern.removeprefix(f"arn:aws:s3:::{bucket.name}/") for pattern in never["Resource"]]
    month = Month(2025, 1)
    for key, refused in {
        LAYOUT.part(month, "main", 1, 0, "00" * 32): True,
        LAYOUT.manifest(month, "main", 1): True,
        LAYOUT.link("main", 1): True,
        LAYOUT.salts(month, "main", 1): False,  # an attempt that died left its own
        LAYOUT.catalog: False,
    }.items():
        assert any(fnmatchcase(key, pattern) for pattern in guarded) is refused, key

    bucket.client.put_bucket_policy(Bucket=bucket.name, Policy=json.dumps({**policy, "Statement": [never]}))
    found = verdicts(inspect(bucket, LAYOUT))
    assert (found["policy on overwriting"], found["policy on plain HTTP"]) == (Verdict.OK, Verdict.ADVICE)
    bucket.client.put_bucket_policy(Bucket=bucket.name, Policy=json.dumps(policy))
    with pytest.raises(UserError, match="AccessDenied"):
        bucket.read("anything")


def test_the_recommended_policy_admits_no_other_key_where_the_key_is_named_by_its_arn() -> None:
    key = "arn:aws:kms:us-east-1:1:key/k"
    policy = recommended_policy("b", LAYOUT, Protection(key), run_role=RUN_ROLE, erase_role=ERASE_ROLE)
    statement = policy["Statement"][-1]
    assert statement["Sid"] == "NoOtherKey"
    assert list(statement["Condition"]["StringNotEquals"].values()) == [key]
    by_alias = recommended_policy("b", LAYOUT, Protection("alias/k"), run_role=RUN_ROLE, erase_role=ERASE_ROLE)
    assert "NoOtherKey" not in [each["Sid"] for each in by_alias["Statement"]]


@pytest.fixture
def faults(bucket: Bucket, archive: Callable[..., ArchiveBucket]) -> Iterator[Faults]:
    with faulty_s3(bucket.server.endpoint) as proxy:
        yield proxy


# case 50
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (("GET", "canary", "decrypt denied"), r"KMS refuses GetObject of .*the credentials need kms:Decrypt on the"),
        (("PUT", "canary", "503"), r"S3 failed PutObject of .* times \(SlowDown\)"),
    ],
)
def test_a_bucket_that_cannot_be_read_back_is_refused(
    archive: Callable[..., ArchiveBucket], faults: Faults, monkeypatch: pytest.MonkeyPatch, fault: Any, sentence: str
) -> None:
    monkeypatch.setattr("archive_pipeline.objects.ATTEMPTS", 2)
    bucket = archive(AWS_ENDPOINT_URL_S3=faults.url)
    faults.lasting = [fault]
    with pytest.raises(BucketUnprotectedError, match=f"write and read back is not possible: {sentence}"):
        require(bucket, LAYOUT)


@pytest.mark.lockable_bucket
def test_what_is_required_but_may_not_be_asked_is_refused_with_the_missing_permission(
    archive: Callable[..., ArchiveBucket], faults: Faults
) -> None:
    bucket = archive(AWS_ENDPOINT_URL_S3=faults.url, ARCHIVE_OBJECT_LOCK="governance", ARCHIVE_OBJECT_LOCK_DAYS="1")
    faults.lasting = [("GET", "?versioning", "decrypt denied"), ("GET", "?lifecycle", "decrypt denied")]
    with pytest.raises(
        BucketUnprotectedError, match="required: versioning is not told: allow s3:GetBucketVersioning to the credent"
    ):
        require(bucket, LAYOUT)
    faults.lasting.pop(0)
    report = require(bucket, LAYOUT)
    assert verdicts(report)["leftover multipart uploads, lifecycle expiry"] is Verdict.UNKNOWN


def test_a_bucket_that_does_not_exist_is_an_error_and_not_a_finding(archive: Callable[..., ArchiveBucket]) -> None:
    bucket = archive()
    missing = ArchiveBucket(bucket.client, "no-such-bucket-here", region=bucket.region)
    with pytest.raises(UserError, match="bucket no-such-bucket-here does not exist"):
        require(missing, LAYOUT)


class Moto:
    """A bucket of moto's S3, which has the settings that the S3 server of these tests lacks."""

    def __init__(self, aws: Aws, name: str, region: str = "us-east-1") -> None:
        credentials: Any = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
        self.client = boto3.client("s3", endpoint_url=aws.endpoint, region_name=region, **credentials)
        kms = boto3.client("kms", endpoint_url=aws.endpoint, region_name=region, **credentials)
        self.name, self.region = name, region
        where: Any = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        self.client.create_bucket(Bucket=name, **where)
        self.key = kms.create_key()["KeyMetadata"]

    def bucket(self, key: str | None, region: str | None = None) -> ArchiveBucket:
        return ArchiveBucket(self.client, self.name, region=region or self.region, protection=Protection(key))

    def encrypt_by_default(self, key: str) -> None:
        default: Any = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}
        self.client.put_bucket_encryption(
            Bucket=self.name,
            ServerSideEncryptionConfiguration={"Rules": [{"ApplyServerSideEncryptionByDefault": default}]},
        )


def test_default_encryption_with_the_configured_key_is_taken_under_each_of_its_names(aws: Aws) -> None:
    moto = Moto(aws, "encrypted-by-default")
    for default in ("Arn", "KeyId"):
        moto.encrypt_by_default(moto.key[default])
        for configured in ("Arn", "KeyId"):
            report = require(moto.bucket(moto.key[configured]), LAYOUT)
            assert verdicts(report)["default encryption"] is Verdict.OK


# case 49
def test_default_encryption_with_another_key_than_the_configured_one_is_refused(aws: Aws) -> None:
    moto = Moto(aws, "encrypted-otherwise")
    moto.encrypt_by_default("arn:aws:kms:us-east-1:1:key/theirs")
    with pytest.raises(BucketUnprotectedError, match=r"default encryption is aws:kms with arn:.*theirs: aws"):
        require(moto.bucket(moto.key["Arn"]), LAYOUT)


# case 50
def test_a_bucket_in_another_region_is_refused_with_the_right_one(aws: Aws) -> None:
    moto = Moto(aws, "in-europe", "eu-west-1")
    with pytest.raises(BucketUnprotectedError, match="region is eu-west-1: set AWS_REGION to eu-west-1"):
        require(moto.bucket(None, region="us-east-1"), LAYOUT)
    assert verdicts(require(moto.bucket(None), LAYOUT))["region"] is Verdict.OK


def test_public_access_that_is_not_blocked_is_advised_against(aws: Aws) -> None:
    moto = Moto(aws, "public")
    assert verdicts(require(moto.bucket(None), LAYOUT))["public access"] is Verdict.ADVICE
    partly: Any = {**BLOCKED, "BlockPublicPolicy": False}
    moto.client.put_public_access_block(Bucket="public", PublicAccessBlockConfiguration=partly)
    assert have(require(moto.bucket(None), LAYOUT))["public access"] == "not blocked by BlockPublicPolicy"
    everything: Any = BLOCKED
    moto.client.put_public_access_block(Bucket="public", PublicAccessBlockConfiguration=everything)
    assert verdicts(require(moto.bucket(None), LAYOUT))["public access"] is Verdict.OK


def test_the_command_prints_have_required_and_remedy_and_fails_when_a_run_would_be_refused(
    archive: Callable[..., ArchiveBucket], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    archive()
    assert main([]) == 0
    assert "advice" in capsys.readouterr().out
    archive(ARCHIVE_OBJECT_LOCK="compliance")
    assert main([]) == 1
    shown = capsys.readouterr().out
    assert "refused" in shown
    assert "put-bucket-versioning" in shown


def test_the_command_prints_policy_and_lifecycle_without_asking_the_bucket(
    archive: Callable[..., ArchiveBucket], capsys: pytest.CaptureFixture[str]
) -> None:
    archive(AWS_ENDPOINT_URL_S3="http://127.0.0.1:9")
    assert main(["--policy", "--run-role", RUN_ROLE, "--erase-role", ERASE_ROLE]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["lifecycle"] == recommended_lifecycle()
    assert ERASE_ROLE in json.dumps(printed["policy"])


# case 44
def test_the_recommended_lifecycle_ends_leftover_uploads_and_is_asked_for(
    archive: Callable[..., ArchiveBucket],
) -> None:
    bucket = archive()
    assert verdicts(inspect(bucket, LAYOUT))["leftover multipart uploads"] is Verdict.ADVICE
    lifecycle: Any = recommended_lifecycle()
    bucket.client.put_bucket_lifecycle_configuration(Bucket=bucket.name, LifecycleConfiguration=lifecycle)
    assert have(inspect(bucket, LAYOUT))["leftover multipart uploads"] == "ended after 7 days"
