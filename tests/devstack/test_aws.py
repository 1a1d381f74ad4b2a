"""KMS, Glue and Athena of the devstack: boto3 finds them by itself."""

import boto3
import pytest

from devstack.aws import Aws


@pytest.fixture
def environment(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        **aws.environment(),
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("environment")
def test_boto3_finds_each_service_by_the_variables_alone() -> None:
    key = boto3.client("kms").create_key(KeyUsage="SIGN_VERIFY", KeySpec="RSA_2048")["KeyMetadata"]
    assert key["KeySpec"] == "RSA_2048"
    boto3.client("glue").create_database(DatabaseInput={"Name": "found"})
    assert boto3.client("glue").get_database(Name="found")["Database"]["Name"] == "found"
    assert "primary" in [group["Name"] for group in boto3.client("athena").list_work_groups()["WorkGroups"]]
