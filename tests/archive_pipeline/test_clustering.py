"""Rows come out in order, in groups of bounded size, whatever the sample said."""

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from archive_pipeline.clustering import Cluster, Clusters, Key, boundaries_of, sorted_groups
from archive_pipeline.columns import Column, Field

COLUMNS = (
    Column("id", "bigint", "bigint", Field("id", "bigint")),
    Column("tenant_id", "text", "text", Field("tenant_id", "string")),
    Column("created_at", "timestamp with time zone", "instant", Field("created_at_us", "bigint")),
    Column("details", "text", "text", Field("details", "string")),
)
Row = tuple[int, str | None, int, str]
keys = st.tuples(st.sampled_from([None, "", "a", "ab", "b", "é", "😀"]), st.integers(-3, 3))
tables = st.lists(st.tuples(keys, st.integers(0, 40)), max_size=60).map(
    lambda drawn: [(number, tenant, us, "x" * size) for number, ((tenant, us), size) in enumerate(drawn)]
)


def batch_of(rows: list[Row]) -> pa.RecordBatch:
    columns: list[list[Any]] = [list(column) for column in zip(*rows, strict=True)] if rows else [[]] * 4
    types = [pa.int64(), pa.string(), pa.int64(), pa.string()]
    return pa.record_batch([pa.array(c, t) for c, t in zip(columns, types, strict=True)], names=list("abcd"))


def in_order(row: Row) -> tuple[bool, bytes, int, int]:
    return (row[1] is not None, (row[1] or "").encode(), row[2], row[0])


def read(clusters: list[Cluster], limit: int) -> list[list[Row]]:
    groups = [group for cluster in clusters for group in sorted_groups(cluster, COLUMNS, limit)]
    return [list(zip(*(column.to_pylist() for column in group.columns), strict=True)) for group in groups]


@settings(deadline=None)
@given(tables, st.lists(keys, max_size=5), st.integers(1, 12), st.integers(50, 2000))
def test_rows_come_out_whole_and_in_order_whatever_the_sample_and_the_limit(
    tmp_path_factory: Any, table: list[Row], sample: list[Key], wanted: int, limit: int
) -> None:
    directory: Path = tmp_path_factory.mktemp("clusters")
    clusters = Clusters(directory, COLUMNS, boundaries_of(sample, wanted))
    for start in range(0, len(table), 7):
        clusters.add(batch_of(table[start : start + 7]))
    groups = read(clusters.close(), limit)
    assert [row for group in groups for row in group] == sorted(table, key=in_order)
    assert not list(directory.iterdir())


def test_a_cluster_that_came_out_too_large_is_divided_by_its_own_keys(tmp_path: Path) -> None:
    table: list[Row] = [(number, f"tenant {number % 9}", number, "x" * 1000) for number in range(500)]
    clusters = Clusters(tmp_path, COLUMNS, [])
    clusters.add(batch_of(table))
    groups = read(clusters.close(), 20_000)
    assert max(map(len, groups)) <= 60
    assert [row for group in groups for row in group] == sorted(table, key=in_order)


def test_huge_rows_of_one_tenant_and_one_instant_are_held_a_few_at_a_time(tmp_path: Path) -> None:
    clusters = Clusters(tmp_path, COLUMNS, [])
    clusters.add(batch_of([(number, "t", 0, "x" * 100_000) for number in range(20)]))
    groups = read(clusters.close(), 120_000)
    assert max(map(len, groups)) <= 4
    assert [row[0] for group in groups for row in group] == list(range(20))


def test_threads_may_add_at_the_same_time(tmp_path: Path) -> None:
    table: list[Row] = [(number, f"{number % 5}", number, "") for number in range(4000)]
    clusters = Clusters(tmp_path, COLUMNS, boundaries_of([(tenant, us) for _, tenant, us, _ in table], 10))

    def add(rows: list[Row]) -> None:
        for start in range(0, len(rows), 50):
            clusters.add(batch_of(rows[start : start + 50]))

    threads = [threading.Thread(target=add, args=(table[part::4],)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = clusters.close()
    assert len(found) == 10
    assert [row for group in read(found, 1 << 20) for row in group] == sorted(table, key=in_order)
