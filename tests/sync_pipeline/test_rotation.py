"""Whose turn it is: tenants in turn, none with more than its share, nobody forgotten."""

from collections import Counter
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from sync_pipeline.rotation import Rotation
from sync_pipeline.workspaces import Workspace


def of(tenant: int, number: int = 0) -> Workspace:
    return Workspace(UUID(int=tenant), UUID(int=1000 * tenant + number))


def test_tenants_take_turns_however_many_workspaces_one_has() -> None:
    rotation = Rotation([*(of(1, n) for n in range(100)), of(2), of(3)], tenant_limit=4)
    assert [one.tenant_id.int for one in rotation.take(6)] == [1, 2, 3, 1, 1, 1]


def test_a_tenant_with_its_share_in_work_is_passed_over_until_one_is_done() -> None:
    rotation = Rotation([of(1, n) for n in range(5)], tenant_limit=2)
    first = rotation.take(8)
    assert first == [of(1, 0), of(1, 1)]
    assert rotation.take(8) == []
    rotation.done(first[0])
    assert rotation.take(8) == [of(1, 2)]


def test_a_workspace_put_back_waits_behind_the_others_of_its_tenant() -> None:
    rotation = Rotation([of(1, n) for n in range(3)], tenant_limit=1)
    (first,) = rotation.take(1)
    rotation.done(first)
    rotation.put_back(first)
    order = []
    for _ in range(3):
        (one,) = rotation.take(1)
        rotation.done(one)
        order.append(one)
    assert order == [of(1, 1), of(1, 2), of(1, 0)]


@given(
    tenants=st.lists(st.integers(1, 6), max_size=60),
    limit=st.integers(1, 5),
    at_most=st.integers(1, 9),
    choices=st.randoms(use_true_random=False),
)
def test_everybody_is_served_once_and_no_tenant_exceeds_its_share(
    tenants: list[int], limit: int, at_most: int, choices: object
) -> None:
    due = [of(tenant, number) for number, tenant in enumerate(tenants)]
    rotation = Rotation(due, tenant_limit=limit)
    in_work: list[Workspace] = []
    served: list[Workspace] = []
    while rotation or in_work:
        taken = rotation.take(at_most)
        assert taken or in_work, "nobody is at its limit when nothing is in work"
        in_work += taken
        assert max(Counter(one.tenant_id for one in in_work).values(), default=0) <= limit
        choices.shuffle(in_work)  # type: ignore[attr-defined]  # a random.Random
        done = in_work.pop()
        rotation.done(done)
        served.append(done)
    assert sorted(served) == sorted(due)


@given(limit=st.integers(1, 4), crowd=st.integers(1, 200), others=st.integers(1, 10))
def test_a_tenant_waits_for_at_most_one_turn_of_each_other(limit: int, crowd: int, others: int) -> None:
    rotation = Rotation([*(of(1, n) for n in range(crowd)), *(of(2 + n) for n in range(others))], tenant_limit=limit)
    first = rotation.take(1 + others)
    assert {one.tenant_id.int for one in first} == set(range(1, 2 + others))
