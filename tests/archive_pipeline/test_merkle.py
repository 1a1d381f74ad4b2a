"""Merkle trees: RFC 6962's own vectors, proofs of every leaf, and what an erasure leaves provable."""

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archive_pipeline import merkle
from archive_pipeline.merkle import (
    EMPTY_ROOT,
    LEAVES_A_CHUNK,
    ROWS_A_SEED,
    Punctured,
    Seeds,
    leaf,
    proof,
    punctured_from_bytes,
    punctured_to_bytes,
    root,
    salts_from_bytes,
    salts_to_bytes,
    verify_proof,
)

# The inputs and roots of the reference implementation (certificate-transparency-go, merkletree tests).
INPUTS = [bytes.fromhex(text) for text in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
LEAVES = [hashlib.sha256(b"\x00" + data).digest() for data in INPUTS]
PATHS = {
    (0, 1): (),
    (0, 8): (
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ),
    (5, 8): (
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ),
    (2, 3): ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",),
    (1, 5): (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ),
}
hashes = st.binary(min_size=32, max_size=32)


def recursive(leaves: Sequence[bytes]) -> bytes:
    """The RFC's definition, word for word."""
    if len(leaves) < 2:
        return leaves[0] if leaves else EMPTY_ROOT
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + recursive(leaves[:split]) + recursive(leaves[split:])).digest()


def test_the_roots_are_those_of_rfc_6962() -> None:
    assert root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert [root(LEAVES[:size]).hex() for size in range(1, 9)] == list(ROOTS)


@pytest.mark.parametrize(("index", "size"), PATHS)
def test_the_audit_paths_are_those_of_rfc_6962(index: int, size: int) -> None:
    path = proof(LEAVES[:size], index)
    assert [each.hex() for each in path] == list(PATHS[index, size])
    assert verify_proof(LEAVES[index], index, size, path, bytes.fromhex(ROOTS[size - 1]))


@pytest.mark.parametrize(
    "size", [LEAVES_A_CHUNK + extra for extra in (-1, 0, 1, 2, LEAVES_A_CHUNK, LEAVES_A_CHUNK + 3)]
)
def test_a_tree_of_several_chunks_has_the_root_of_the_definition(size: int) -> None:
    leaves = [number.to_bytes(32, "big") for number in range(size)]
    assert root(iter(leaves)) == recursive(leaves)
    for index in {0, LEAVES_A_CHUNK - 2, len(leaves) // 2, len(leaves) - 1}:
        assert verify_proof(leaves[index], index, len(leaves), proof(iter(leaves), index), root(leaves))


def test_roots_of_equal_subtrees_stand_in_for_their_leaves() -> None:
    leaves = [number.to_bytes(32, "big") for number in range(300)]
    assert root(root(leaves[at : at + 64]) for at in range(0, 300, 64)) == root(leaves)


@settings(deadline=None)
@given(st.lists(hashes, min_size=1, max_size=70), st.data())
def test_every_leaf_can_be_proven_and_nothing_else(leaves: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    tree, path = root(leaves), proof(leaves, index)
    assert tree == recursive(leaves)
    assert verify_proof(leaves[index], index, len(leaves), path, tree)

    other = data.draw(hashes.filter(lambda each: each != leaves[index]))
    assert not verify_proof(other, index, len(leaves), path, tree)
    assert not verify_proof(leaves[index], index, len(leaves), (*path, other), tree)
    assert not verify_proof(leaves[index], index, len(leaves), path, other)
    assert not verify_proof(leaves[index], len(leaves), len(leaves), path, tree)
    assert not verify_proof(leaves[index], -1, len(leaves), path, tree)
    if path:
        assert not verify_proof(leaves[index], index, len(leaves), path[:-1], tree)
        spot = data.draw(st.integers(0, len(path) - 1))
        if path[spot] != other:
            assert not verify_proof(leaves[index], index, len(leaves), (*path[:spot], other, *path[spot + 1 :]), tree)


def test_a_proof_of_a_smaller_tree_is_none_of_a_larger_one() -> None:
    path = proof(LEAVES[:4], 0)
    assert verify_proof(LEAVES[0], 0, 4, path, root(LEAVES[:4]))
    assert not verify_proof(LEAVES[0], 0, 8, path, root(LEAVES[:4]))
    assert not verify_proof(root(LEAVES[:2]), 0, 4, path[1:], root(LEAVES[:4]))


def test_a_leaf_outside_the_tree_has_no_proof() -> None:
    with pytest.raises(IndexError):
        proof(LEAVES, 8)
    with pytest.raises(IndexError):
        proof(LEAVES, -1)


# -- salts ----------------------------------------------------------------------------------------------------------


def test_equal_rows_have_different_leaves_and_a_seed_serves_1024_of_them() -> None:
    seeds = Seeds.fresh(ROWS_A_SEED + 1)
    assert len(seeds.seeds) == 2 * 32
    assert len({leaf(seeds.salt(row), "same") for row in range(seeds.rows)}) == seeds.rows


def test_salts_survive_their_bytes_and_damaged_ones_are_refused() -> None:
    parts = [Seeds.fresh(1), Seeds.fresh(ROWS_A_SEED), Seeds.fresh(5000)]
    body = salts_to_bytes(parts)
    assert salts_from_bytes(body) == parts
    with pytest.raises(ValueError, match="cut off"):
        salts_from_bytes(body[:-1])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 2 * ROWS_A_SEED + 7).flatmap(
        lambda rows: st.tuples(st.just(rows), st.sets(st.integers(0, rows - 1)), st.sets(st.integers(0, rows - 1)))
    )
)
def test_after_an_erasure_the_old_root_is_provable_and_no_erased_salt_can_be_found(
    drawn: tuple[int, set[int], set[int]],
) -> None:
    rows, first, second = drawn
    seeds = Seeds.fresh(rows)
    leaves = [leaf(seeds.salt(row), f"row {row}") for row in range(rows)]
    punctured = Punctured.of(root(leaves), seeds, {row: leaves[row] for row in first})
    punctured = punctured.without({row: leaves[row] for row in second})
    (punctured,) = punctured_from_bytes(punctured_to_bytes([punctured]))

    gone = first | second
    left = [f"row {row}" for row in range(rows) if row not in gone]
    assert root(punctured.leaves(left)) == punctured.root == root(leaves)
    assert punctured.erased == {row: leaves[row] for row in gone}
    body = punctured.to_bytes()
    for row in sorted(gone)[:20]:
        assert punctured.salt(row) is None
        assert bytes.fromhex(seeds.salt(row)) not in body
        assert seeds.seed(row) not in body
    for row in sorted(set(range(rows)) - gone)[:20]:
        assert punctured.salt(row) == seeds.salt(row)
    if left:
        with pytest.raises(ValueError, match="fewer"):
            list(punctured.leaves(left[1:]))
        assert root(punctured.leaves(["forged", *left[1:]])) != punctured.root
    with pytest.raises(ValueError, match="more"):
        list(punctured.leaves([*left, "one more"]))


def test_an_erasure_of_no_such_row_is_refused() -> None:
    with pytest.raises(IndexError):
        Punctured.of(EMPTY_ROOT, Seeds.fresh(3), {3: LEAVES[0]})


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_other_bytes_than_an_erasures_are_refused(body: bytes) -> None:
    try:
        parts = punctured_from_bytes(body)
    except ValueError:
        return
    assert punctured_to_bytes(parts) == body


@pytest.mark.parametrize("marks", [0b00000000, 0b10000000], ids=["no row", "a row after the last"])
def test_a_record_of_an_erasure_that_marks_no_row_is_refused(marks: int) -> None:
    salts = bytes(16 * 5) if not marks else bytes(16 * 4 + 32)
    with pytest.raises(ValueError, match="damaged"):
        punctured_from_bytes(EMPTY_ROOT + (5).to_bytes(8, "big") + bytes([1, marks]) + salts)


@pytest.mark.parametrize("cut", [1, 40, 41, 100])
def test_a_cut_off_record_of_an_erasure_is_refused(cut: int) -> None:
    body = Punctured.of(EMPTY_ROOT, Seeds.fresh(2000), {5: LEAVES[0]}).to_bytes()
    with pytest.raises(ValueError, match=r"cut off|damaged"):
        punctured_from_bytes(body[:-cut])


def test_a_record_of_an_erasure_stays_small_when_the_erased_rows_lie_together() -> None:
    erased = {row: bytes(32) for row in range(5000, 6000)}
    body = Punctured.of(EMPTY_ROOT, Seeds.fresh(1_000_000), erased).to_bytes()
    assert len(body) < 100_000
    assert merkle.HASH_BYTES * len(erased) < len(body)
