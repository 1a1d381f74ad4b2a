"""The code locations load anywhere, alone, and with nothing configured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dagster._core.instance.config import dagster_instance_config

from devstack.processes import CHECKOUT

LOCATIONS = ["sync_pipeline", "archive_pipeline", "scaling"]
BARE = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env=BARE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_location_loads_in_a_fresh_interpreter_with_an_empty_environment(location: str) -> None:
    code = f"""
import json, sys
import dagster as dg
from {location}.definitions import defs
dg.Definitions.validate_loadable(defs)
repository = defs.get_repository_def()
print(json.dumps({{"assets": len(list(repository.asset_graph.get_all_asset_keys())),
                   "modules": sorted({{name.split(".")[0] for name in sys.modules}})}}))
"""
    loaded = json.loads(python(code))
    assert loaded["assets"] >= (2 if location == "scaling" else 4)
    others = set(LOCATIONS) - {location, "scaling"}  # which both pipelines stand on
    assert not {*others, "devstack", "tests", "bench"} & set(loaded["modules"])


def test_the_workspace_validates(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "dagster", "definitions", "validate", "-w", "workspace.yaml"],
        cwd=CHECKOUT,
        env={**BARE, "DAGSTER_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for location in LOCATIONS:
        assert f"Validation successful for code location {location}" in done.stdout + done.stderr


def test_the_instance_configuration_is_valid() -> None:
    config, custom_class = dagster_instance_config(str(CHECKOUT))
    assert custom_class is None
    [storage] = config["storage"]
    assert storage == "postgres"
