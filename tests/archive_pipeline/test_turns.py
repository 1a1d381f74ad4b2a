"""Exports of several months at once, or one prune."""

import pytest

from archive_pipeline.errors import MonthBusyError
from archive_pipeline.turns import exporting, pruning
from tests.archive_pipeline.conftest import Room


def test_exports_go_on_beside_each_other_and_no_prune_beside_them(room: Room) -> None:
    table = room.target.table
    with exporting(room.shard, table), exporting(room.shard, table, patience=0):
        busy = pytest.raises(MonthBusyError, match="audit_logs is busy: months of it are being exported")
        with busy, pruning(room.shard, table, patience=0):
            pass
    with pruning(room.shard, table, patience=0):
        pass


def test_neither_an_export_nor_another_prune_goes_on_beside_a_prune(room: Room) -> None:
    table = room.target.table
    with pruning(room.shard, table):
        with pytest.raises(MonthBusyError, match="a prune is at work on it"), exporting(room.shard, table, patience=0):
            pass
        with pytest.raises(MonthBusyError), pruning(room.shard, table, patience=0):
            pass


def test_whoever_waits_begins_when_the_other_has_ended(room: Room) -> None:
    table, naps = room.target.table, []
    prune = pruning(room.shard, table)
    prune.__enter__()

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            prune.__exit__(None, None, None)

    with exporting(room.shard, table, sleep=sleep):
        assert len(naps) == 2
