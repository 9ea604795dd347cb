"""The order of samples, on which resuming a run depends."""

from __future__ import annotations

import math

import pytest

from support import needs

needs("models")

from fastclip.data.loading.order import Draw, Order, mix


def run(order: Order, first: int, last: int) -> list[Draw]:
    """Return all draws of these steps."""
    return [draw for step in range(first, last) for draw in order.draws(step, 0, order.batch_size)]


def samples(draws: list[Draw]) -> list[int]:
    return [draw.sample for draw in draws]


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (13, 4), (7, 7), (7, 6), (5, 1), (1, 1)])
def test_order_of_an_epoch_is_a_permutation_cut_to_whole_batches(size: int, batch_size: int) -> None:
    order = Order(size, batch_size, seed=3)
    batches = size // batch_size
    assert order.epoch_length == batches * batch_size
    for epoch in range(3):
        drawn = run(order, epoch * batches, (epoch + 1) * batches)
        assert {draw.epoch for draw in drawn} == {epoch}
        assert len(set(samples(drawn))) == len(drawn) == order.epoch_length
        assert set(samples(drawn)) <= set(range(size))


def test_order_leaves_out_other_samples_each_epoch() -> None:
    order = Order(13, 4, seed=0)
    left = [set(range(13)) - set(samples(run(order, 3 * epoch, 3 * epoch + 3))) for epoch in range(99)]
    assert all(len(out) == 1 for out in left) and set().union(*left) == set(range(13))


@pytest.mark.parametrize(("size", "batch_size"), [(5, 6), (5, 12), (3, 100), (1, 4)])
def test_order_of_a_batch_larger_than_the_data_takes_epochs_in_turn(size: int, batch_size: int) -> None:
    order = Order(size, batch_size, seed=3)
    assert order.epoch_length == size
    drawn = run(order, 0, size)  # batch_size epochs
    assert [draw.epoch for draw in drawn] == [k // size for k in range(size * batch_size)]
    for epoch in range(batch_size):
        assert sorted(samples([draw for draw in drawn if draw.epoch == epoch])) == list(range(size))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    epochs = [samples(run(Order(50, 50, seed), e, e + 1)) for seed in range(20) for e in range(20)]
    assert len(set(map(tuple, epochs))) == len(epochs)  # an order seeded by seed + epoch would repeat
    assert samples(run(Order(50, 50, seed=7), 9, 10)) == epochs[7 * 20 + 9]


def test_order_rows_are_parts_of_the_batch() -> None:
    for order in (Order(10, 4, seed=1), Order(3, 8, seed=1)):
        for step in (0, 1, 5):
            whole = order.draws(step, 0, order.batch_size)
            for start in range(order.batch_size + 1):
                for stop in range(start, order.batch_size + 1):
                    assert order.draws(step, start, stop) == whole[start:stop]
        for start, stop in ((-1, 2), (0, order.batch_size + 1), (2, 1)):
            with pytest.raises(ValueError, match=f"rows {start} to {stop} are not in a batch of {order.batch_size}"):
                order.draws(0, start, stop)


def test_order_is_the_one_of_all_runs_so_far() -> None:
    # A later version must be able to resume a run of an earlier one in the same order, so these numbers never change
    # without a reason.
    assert [mix(0, 0), mix(1, 0), mix(0, 1)] == [5857645148978988075, 5419339031343110921, 14719997280833369599]
    assert samples(Order(10, 10, seed=0).draws(0, 0, 10)) == [7, 9, 2, 8, 5, 3, 6, 0, 1, 4]
    late = Order(100_000, 5, seed=12345).draws(7 * 20_000, 0, 5)
    assert late == [Draw(7, sample) for sample in (59144, 61630, 91678, 40524, 9784)]


@pytest.mark.parametrize(
    ("size", "batch_size", "epochs", "steps"),
    [
        (100, 10, 1, 10),
        (109, 10, 3, 30),
        (100, 10, 0.05, 1),
        (100, 10, 0, 1),
        (100, 10, 0.31, 4),
        (100, 1, 0.07, 7),  # 0.07 * 100 is 7.000000000000001
        (10, 4, 0.3, 1),
        (10, 25, 5, 2),
        (10, 25, 5.1, 3),
        (1437, 64, 18, 396),
    ],
)
def test_order_steps_cover_the_epochs(size: int, batch_size: int, epochs: float, steps: int) -> None:
    assert Order(size, batch_size, seed=0).steps(epochs) == steps


@pytest.mark.parametrize("epochs", [-1, math.inf, math.nan])
def test_order_refuses_epochs_that_are_no_number(epochs: float) -> None:
    with pytest.raises(ValueError, match="epochs must be finite and at least 0"):
        Order(10, 2, seed=0).steps(epochs)


@pytest.mark.parametrize(("size", "batch_size"), [(13, 4), (5, 5), (5, 12), (3, 100)])
def test_order_position_is_that_of_the_first_sample(size: int, batch_size: int) -> None:
    order = Order(size, batch_size, seed=0)
    begun: dict[int, int] = {}
    for step in range(50):
        epoch = order.draws(step, 0, 1)[0].epoch
        assert order.position(step) == (epoch, begun.get(epoch, 0))
        begun[epoch] = begun.get(epoch, 0) + 1


@pytest.mark.parametrize(("size", "batch_size"), [(0, 1), (1, 0), (5, -1)])
def test_order_refuses_nothing(size: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="size and batch_size must be positive"):
        Order(size, batch_size, seed=0)
