"""Laws of packing and of the endless sequence of batches."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jlora import packing


def example(identity: int, size: int) -> packing.Example:
    """An example whose tokens say which one it is: rows can be read back."""
    tokens = np.arange(size, dtype=np.int32) + 1000 * identity + 1
    return packing.Example(tokens, tokens % 3 != 0, f"made:{identity}")


def examples_of(sizes) -> list[packing.Example]:
    return [example(i, size) for i, size in enumerate(sizes)]


def segments(batch):
    """The (tokens, targets, loss_mask, positions) of every segment of a batch."""
    for i in range(len(batch["tokens"])):
        ids = batch["segment_ids"][i]
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            yield tuple(batch[k][i][here] for k in ("tokens", "targets", "loss_mask", "positions"))


def identities(batches) -> list[int]:
    return [int(tokens[0]) // 1000 for batch in batches for tokens, *_ in segments(batch)]


def naive_first_fit(sizes, length):
    rows = []
    for i, size in enumerate(sizes):
        row = next((r for r in rows if sum(sizes[j] for j in r) + size <= length), None)
        if row is None:
            rows.append(row := [])
        row.append(i)
    return rows


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


length_and_sizes = st.integers(2, 40).flatmap(
    lambda length: st.tuples(
        st.just(length), st.lists(st.integers(1, length), min_size=1, max_size=60)
    )
)


@hypothesis.given(length_and_sizes)
def test_pack_is_first_fit(drawn):
    length, sizes = drawn
    examples = examples_of(sizes)
    rows = packing.pack(examples, length)
    expected = [[examples[i] for i in row] for row in naive_first_fit(sizes, length)]
    assert rows == expected  # the examples themselves, whole: each is in exactly one row


@hypothesis.given(length_and_sizes, st.integers(1, 5), st.booleans(), st.booleans())
def test_an_epoch_holds_every_example_once_and_whole(drawn, batch_size, shuffle, pack):
    length, sizes = drawn
    examples = examples_of(sizes)
    batches = packing.Batches(
        examples, batch_size=batch_size, length=length, seed=3, shuffle=shuffle, pack=pack
    )
    epoch = list(batches.epoch(1))
    assert sorted(identities(epoch)) == list(range(len(examples)))
    for batch in epoch:
        assert {v.shape for v in batch.values()} == {(batch_size, length)}
        padding = batch["segment_ids"] == 0
        for name in ("tokens", "targets", "loss_mask", "positions"):
            assert not batch[name][padding].any()
        for tokens, targets, mask, positions in segments(batch):
            whole = examples[tokens[0] // 1000]
            np.testing.assert_array_equal(tokens, whole.tokens)
            np.testing.assert_array_equal(positions, np.arange(len(whole)))
            np.testing.assert_array_equal(targets[:-1], whole.tokens[1:])
            np.testing.assert_array_equal(mask[:-1], whole.loss_mask[1:])
            assert mask[-1] == 0
            assert targets[-1] == 0
    total = sum(batch["loss_mask"].sum() for batch in epoch)
    assert total == sum(e.num_targets for e in examples)


@hypothesis.given(length_and_sizes, st.integers(1, 5), st.booleans(), st.booleans())
def test_the_sequence_is_one_epoch_after_the_other(drawn, batch_size, shuffle, pack):
    length, sizes = drawn
    examples = examples_of(sizes)
    batches = packing.Batches(
        examples, batch_size=batch_size, length=length, seed=3, shuffle=shuffle, pack=pack
    )
    needed = batches.count(2)
    seen = identities(batches.batch(i) for i in range(needed))
    for epoch in (0, 1):
        part = seen[epoch * len(examples) : (epoch + 1) * len(examples)]
        assert part == identities(batches.epoch(epoch))
    full = [batches.batch(i)["segment_ids"].any(axis=1).all() for i in range(needed)]
    assert all(full)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_any_batch_is_the_same_whatever_was_read_before(shuffle, pack):
    examples = examples_of(np.random.default_rng(0).integers(1, 20, 50).tolist())
    options = {"batch_size": 4, "length": 24, "seed": 7, "shuffle": shuffle, "pack": pack}
    uninterrupted = packing.Batches(examples, **options)
    batches = [uninterrupted.batch(i) for i in range(60)]  # several epochs
    for i in (59, 0, 31, 30):
        assert_same(packing.Batches(examples, **options).batch(i), batches[i])
        assert_same(uninterrupted.batch(i), batches[i])


def test_examples_with_rows_of_their_own_can_share_rows():
    arguments = {"batch_size": 2, "length": 32, "seed": 3}
    alone, shared = (
        packing.Batches(examples_of([9] * 20), pack=pack, **arguments) for pack in (False, True)
    )
    assert shared.packed() is shared
    for index in range(5):
        assert_same(alone.packed().batch(index), shared.batch(index))


def test_epochs_and_seeds_differ_only_with_shuffle():
    examples = examples_of([5] * 40)

    def order(seed, epoch, shuffle):
        batches = packing.Batches(examples, batch_size=4, length=16, seed=seed, shuffle=shuffle)
        return identities(batches.epoch(epoch))

    assert order(0, 0, True) != order(0, 1, True)
    assert order(0, 0, True) != order(1, 0, True)
    assert order(0, 0, False) == order(5, 3, False) == list(range(40))


def test_a_data_set_smaller_than_a_batch_fills_it_with_later_epochs():
    batches = packing.Batches(examples_of([4]), batch_size=3, length=8, seed=0)
    assert identities([batches.batch(5)]) == [0, 0, 0]
    assert identities(batches.epoch()) == [0]
    assert batches.per_epoch == 1


def test_count_takes_parts_of_epochs():
    batches = packing.Batches(examples_of([8] * 100), batch_size=4, length=8, seed=0)
    assert [batches.count(epochs) for epochs in (0.001, 0.5, 1, 2.5)] == [1, 13, 25, 63]
    with pytest.raises(ValueError, match="epochs must be above 0"):
        batches.count(0)


def test_a_hundred_thousand_examples_pack_in_a_moment():
    sizes = np.clip(np.random.default_rng(0).lognormal(5, 0.8, 100_000).astype(int), 4, 2048)
    mask = np.ones(2048, np.bool_)
    tokens = np.zeros(2048, np.int32)
    rows = packing.pack([packing.Example(tokens[:n], mask[:n], "") for n in sizes], 2048)
    assert sizes.sum() / (len(rows) * 2048) > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": []}, "data set is empty"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"length": 9}, r"made:1: an example of 10 tokens does not fit rows of 9"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"examples": examples_of([5, 10]), "batch_size": 2, "length": 16, "seed": 0}
    with pytest.raises(ValueError, match=message):
        packing.Batches(**(arguments | change))
