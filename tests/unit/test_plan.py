"""Who reads what: a partition of every epoch, the same on any number of processes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdad_dist.data.plan import MicroBatch, Plan, StreamPlan, by_shard, order

counts = st.integers(1, 120)
batches = st.integers(1, 40)
worlds = st.integers(1, 9)
micros = st.none() | st.integers(1, 12)
seeds = st.integers(0, 2**63)
shard_counts = st.lists(st.integers(0, 25), min_size=1, max_size=12).filter(any)


def plans(world: int, **plan) -> list[Plan]:
    return [Plan(rank=rank, world=world, **plan) for rank in range(world)]


def streams(world: int, counts: list[int], **plan) -> list[StreamPlan]:
    ends = np.cumsum([0, *counts])
    shards = tuple(np.arange(a, b) for a, b in pairwise(ends))
    return [StreamPlan(shards, rank=rank, world=world, **plan) for rank in range(world)]


def rows(steps: list[list[MicroBatch]]) -> list[int]:
    return [int(row) for step in steps for micro in step for row in micro.rows]


def assert_partition(ranks: list, count: int, batch: int, micro: int | None) -> None:
    """Every epoch holds each row once, in steps that all processes agree on."""
    per_epoch = ranks[0].steps_per_epoch
    assert per_epoch == -(-count // batch)
    for epoch in range(2):
        steps = [list(r.steps(epoch * per_epoch, (epoch + 1) * per_epoch)) for r in ranks]
        assert sorted(row for rank in steps for row in rows(rank)) == list(range(count))
        for step, of_ranks in enumerate(zip(*steps, strict=True)):
            assert len({len(micros) for micros in of_ranks}) == 1  # equal numbers of passes
            parts = [micro for micros in of_ranks for micro in micros]
            images = sum(len(micro.rows) for micro in parts)
            assert images == min(batch, count - step * batch) > 0
            assert {micro.step_images for micro in parts} == {images}
            assert micro is None or max(len(part.rows) for part in parts) <= micro
            for passes in zip(*of_ranks, strict=True):
                assert sum(len(part.rows) for part in passes) > 0
    for step in range(2 * per_epoch + 1):
        done = [r for k in range(step) for r in (min(batch, count - k % per_epoch * batch),)]
        assert ranks[0].samples_seen(step) == sum(done)


@given(counts, seeds, st.integers(0, 10_000))
def test_an_epoch_is_a_permutation(count: int, seed: int, epoch: int):
    assert sorted(order(count, seed, epoch)) == list(range(count))


def test_the_order_never_changes():
    """A run must be resumable after an upgrade: these numbers are part of the format."""
    assert order(10, 0, 0).tolist() == [7, 4, 8, 1, 2, 6, 5, 0, 9, 3]
    assert order(10, 7, 3).tolist() == [5, 8, 4, 1, 9, 6, 3, 7, 0, 2]


def test_orders_of_seeds_and_epochs_look_unrelated():
    orders = np.array([order(50, seed, epoch) for seed in range(8) for epoch in range(8)])
    assert len({tuple(o) for o in orders.tolist()}) == 64
    first = np.array([order(50, seed, epoch)[0] for seed in range(40) for epoch in range(50)])
    share = np.bincount(first, minlength=50) / len(first)
    assert share.max() < 0.05 and share.min() > 0.002
    correlation = np.corrcoef(orders) - np.eye(64)
    assert abs(correlation).max() < 0.6


@settings(max_examples=150, deadline=None)
@given(counts, batches, worlds, micros, seeds)
def test_an_epoch_is_dealt_out_without_loss_or_repetition(count, batch, world, micro, seed):
    ranks = plans(world, count=count, batch_size=batch, micro_batch_size=micro, seed=seed)
    assert_partition(ranks, count, batch, micro)


@settings(max_examples=100, deadline=None)
@given(counts, batches, worlds, micros, seeds)
def test_a_step_holds_the_same_images_on_any_number_of_processes(count, batch, world, micro, seed):
    alone = Plan(count, batch_size=batch, seed=seed)
    ranks = plans(world, count=count, batch_size=batch, micro_batch_size=micro, seed=seed)
    stop = 2 * alone.steps_per_epoch
    steps = zip(*(list(r.steps(0, stop)) for r in ranks), strict=True)
    for wanted, of_ranks in zip(alone.steps(0, stop), steps, strict=True):
        together = sorted(row for micros in of_ranks for row in rows([micros]))
        assert together == sorted(rows([wanted]))


@settings(max_examples=100, deadline=None)
@given(counts, batches, worlds, micros, st.integers(0, 30), st.integers(0, 10))
def test_resuming_at_any_step_goes_on_as_if_nothing_happened(count, batch, world, micro, at, more):
    for plan in plans(world, count=count, batch_size=batch, micro_batch_size=micro):
        whole = list(plan.steps(0, at + more))[at:]
        assert [rows([s]) for s in plan.steps(at, at + more)] == [rows([s]) for s in whole]


def test_a_training_may_continue_on_another_number_of_processes():
    seen: list[list[int]] = []
    for world, (start, stop) in [(4, (0, 3)), (1, (3, 5)), (3, (5, 12))]:
        ranks = plans(world, count=23, batch_size=4, seed=5)
        steps = zip(*(list(r.steps(start, stop)) for r in ranks), strict=True)
        seen += [sorted(row for micros in step for row in rows([micros])) for step in steps]
    assert seen == [sorted(rows([s])) for s in Plan(23, batch_size=4, seed=5).steps(0, 12)]


@settings(max_examples=150, deadline=None)
@given(shard_counts, batches, worlds, micros, seeds)
def test_streaming_gives_each_image_once_in_equal_steps(counts, batch, world, micro, seed):
    ranks = streams(world, counts, batch_size=batch, micro_batch_size=micro, seed=seed)
    assert_partition(ranks, sum(counts), batch, micro)


@settings(max_examples=100, deadline=None)
@given(shard_counts, batches, worlds, st.integers(0, 30), st.integers(0, 10))
def test_streaming_resumes_at_any_step(counts, batch, world, at, more):
    for plan in streams(world, counts, batch_size=batch):
        whole = list(plan.steps(0, at + more))[at:]
        assert [rows([s]) for s in plan.steps(at, at + more)] == [rows([s]) for s in whole]


@settings(max_examples=100, deadline=None)
@given(shard_counts, worlds, seeds)
def test_a_process_reads_its_shards_one_after_the_other(counts, world, seed):
    for plan in streams(world, counts, batch_size=3, seed=seed):
        shard_of = np.repeat(np.arange(len(counts)), counts)
        for epoch in range(2):
            per_epoch = plan.steps_per_epoch
            read = rows(list(plan.steps(epoch * per_epoch, (epoch + 1) * per_epoch)))
            shards = [int(shard_of[row]) for row in read]
            switches = [b for a, b in zip([-1, *shards], shards, strict=False) if a != b]
            assert switches == [s for s in plan.deal(epoch)[plan.rank] if counts[s]]


@given(shard_counts, worlds, seeds)
def test_processes_hold_equal_loads_to_within_one_shard(counts, world, seed):
    dealt = streams(world, counts, batch_size=1, seed=seed)[0].deal(0)
    held = [sum(counts[shard] for shard in shards) for shards in dealt]
    assert max(held) - min(held) <= max(counts)
    assert sorted(shard for shards in dealt for shard in shards) == list(range(len(counts)))


def test_no_process_waits_for_its_turn_until_the_end_of_an_epoch():
    for plan in streams(2, [40, 30, 30, 40], batch_size=14):
        shares = [len(rows([step])) for step in plan.steps(0, 10)]
        assert max(shares) - min(shares) <= 1 and sum(shares) == 70


def test_epochs_shuffle_the_shards_and_their_rows():
    plan = streams(1, [10] * 8, batch_size=80)[0]
    first, second = (rows([step]) for step in plan.steps(0, 2))
    assert [row // 10 for row in first] != [row // 10 for row in second]
    in_shard = [[row for row in epoch if row // 10 == 3] for epoch in (first, second)]
    assert in_shard[0] != in_shard[1] and sorted(in_shard[0]) == sorted(in_shard[1])


def test_samples_are_grouped_by_their_shards():
    grouped = by_shard(["b", "a", "b", "c"])
    assert {name: found.tolist() for name, found in grouped.items()} == {
        "b": [0, 2],
        "a": [1],
        "c": [3],
    }


@pytest.mark.parametrize("make", [plans, streams])
def test_more_processes_than_images_take_part_with_empty_batches(make):
    images = {"count": 2} if make is plans else {"counts": [1, 1]}
    ranks = make(5, batch_size=32, **images)
    steps = [list(rank.steps(0, 1)) for rank in ranks]
    assert [len(rows(step)) for step in steps] == [1, 1, 0, 0, 0]
    assert all(step[0][0].step_images == 2 for step in steps)
