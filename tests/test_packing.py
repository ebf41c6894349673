"""The order of rows, their packing, and what each of several processes makes of a batch."""

import collections
import itertools
import json
import threading
import time

import grain
import grain.experimental
import jax.numpy as jnp
import numpy as np
import pytest

from genlora_jax.data.batches import Batches
from genlora_jax.data.config import DataConfig
from genlora_jax.data.order import rows_at
from genlora_jax.data.packing import filled, max_in_row, pack
from genlora_jax.data.sources import MemorySource, Part
from genlora_jax.training.feed import Feed
from genlora_jax.training.recorder import WaitWatch

SLOTS = 8


class Rows(MemorySource):
    """Rows in memory, all tokens of which are the row's number; or as if nobody knew lengths."""

    def __init__(self, count, longest=40, *, known=True, seed=0, copies=None):
        sizes = np.random.default_rng(seed).integers(2, longest + 1, count)
        super().__init__([tokens(row, size) for row, size in enumerate(sizes)])
        self.mean = self.lengths.mean()
        self.asked = []  # rows that were read
        self.copies = copies or (lambda row: 1)  # examples of a row
        if not known:
            self.lengths = None

    @property
    def mean_length(self):
        return self.mean

    def read(self, rows):
        self.asked += rows
        return [[self.examples[row]] * self.copies(row) for row in rows]


def tokens(row, size):
    return {"input_ids": np.full(size, row, np.int32), "loss_mask": np.ones(size, bool)}


def config(**changes):
    return DataConfig(**({"train": "-", "length": 64, "batch_size": SLOTS} | changes))


def seen(batch):
    """The rows of which a batch has examples, each as often as it has."""
    starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    return batch["input_ids"][starts].tolist()


def parts_of(processes):
    """The slots of each of so many processes."""
    return np.split(np.arange(SLOTS), processes)


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def next_or_padding(batches, slots):
    """The next rows of a process; padding when its streams have ended, perhaps before others'."""
    return next(batches, None) or filled([[]] * slots, 64)


def assert_same(ours, theirs):
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


# The order.


@pytest.mark.parametrize("count", [1, 2, 3, 24, 64, 65, 1000])
def test_every_epoch_has_every_row_once(count):
    rows = rows_at([Part(count)], 7, np.arange(3 * count)).reshape(3, count)
    np.testing.assert_array_equal(np.sort(rows), np.tile(np.arange(count), (3, 1)))


def test_all_orders_are_about_as_frequent():
    found = collections.Counter(tuple(rows_at([Part(4)], i, np.arange(4))) for i in range(4800))
    assert len(found) == 24
    assert 120 < min(found.values()) <= max(found.values()) < 290  # 200 each


def test_neighbours_and_places_tell_nothing_about_rows():
    for count in (1000, 1024, 100_000):
        rows = rows_at([Part(count)], 0, np.arange(count))
        for other in (np.arange(count), np.roll(rows, 1)):
            assert abs(np.corrcoef(rows, other)[0, 1]) < 4 / count**0.5


def test_a_position_s_row_does_not_depend_on_what_else_is_asked():
    whole = rows_at([Part(500)], 3, np.arange(1500))
    some = np.array([1499, 3, 700])
    np.testing.assert_array_equal(rows_at([Part(500)], 3, some), whole[some])


def test_windows_come_one_after_the_other_each_in_an_order_of_its_own():
    rows = rows_at([Part(100, window=30)], 0, np.arange(200))
    for epoch in rows.reshape(2, 100):
        for start in (0, 30, 60, 90):
            window = epoch[start : start + 30]
            assert sorted(window) == list(range(start, min(start + 30, 100)))
            assert window.tolist() != sorted(window)


def test_a_mixture_takes_of_each_part_its_share_evenly_and_all_its_rows():
    parts = [Part(1000, 3.0), Part(50, 1.0), Part(200, 0.5)]
    rows = rows_at(parts, 0, np.arange(9000))
    part = np.searchsorted([1000, 1050], rows, side="right")
    for start in (0, 90, 4500):  # each stretch has the shares, 6 : 2 : 1
        counts = np.bincount(part[start : start + 90], minlength=3)
        np.testing.assert_allclose(counts, [60, 20, 10], atol=1)
    times = np.bincount(rows)
    np.testing.assert_allclose(times[:1000], 6, atol=1)
    np.testing.assert_allclose(times[1000:1050], 40, atol=1)
    np.testing.assert_allclose(times[1050:], 5, atol=1)


@pytest.mark.parametrize("counts", [[1000, 1, 60], [2, 2, 2], [7, 9_999]])
def test_parts_without_weights_have_each_row_once_an_epoch_and_alternate_evenly(counts):
    parts, total = [Part(count, window=50) for count in counts], sum(counts)
    rows = rows_at(parts, 0, np.arange(2 * total)).reshape(2, total)
    np.testing.assert_array_equal(np.sort(rows), np.tile(np.arange(total), (2, 1)))
    part = np.searchsorted(np.cumsum(counts), rows[0], side="right")
    for number, count in enumerate(counts):
        taken = np.cumsum(part == number)
        expected = np.arange(1, total + 1) * count / total
        np.testing.assert_allclose(taken, expected, atol=len(counts))
    far = 10**10 * total + np.arange(total)  # of products beyond int64
    np.testing.assert_array_equal(np.sort(rows_at(parts, 0, far)), np.arange(total))


def test_a_part_without_rows_is_refused():
    with pytest.raises(ValueError, match="a part without rows"):
        rows_at([Part(5, 1.0), Part(0, 1.0)], 0, np.arange(4))


# Packing.


@pytest.mark.parametrize("most", [None, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 500])
def test_rows_hold_each_example_once_and_no_more_than_they_may(count, most):
    lengths = np.random.default_rng(count).integers(1, 65, count)
    rows = pack(lengths, config(), most, 32)
    assert sorted(itertools.chain(*rows)) == list(range(count))
    assert max((lengths[row].sum() for row in rows), default=0) <= 64
    assert max(map(len, rows), default=0) <= (most or count)


def first_fit(lengths, cfg, most):
    """Rows as Grain packs them, into as many open rows as a batch has."""
    examples = grain.MapDataset.source([{"x": np.zeros(n, np.int8)} for n in lengths])
    return grain.experimental.FirstFitPackIterDataset(
        examples.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)),
        length_struct={"x": cfg.length},
        num_packing_bins=cfg.batch_size,
        shuffle_bins=False,
        max_sequences_per_bin=most,
    )


@pytest.mark.parametrize("mean", [30, 60, 120, 300])
@pytest.mark.parametrize("spread", [0.1, 0.4, 0.9])
def test_there_is_hardly_more_padding_than_first_fit_leaves(mean, spread):
    rng, cfg = np.random.default_rng(0), config(length=512, batch_size=16)
    lengths = np.clip(rng.lognormal(np.log(mean), spread, 1500), 4, 512).astype(int)
    source = MemorySource([tokens(0, n) for n in lengths])
    theirs = sum(1 for _ in first_fit(lengths, cfg, max_in_row(source, cfg)))
    padding = Batches(source, cfg).plan(1).padding
    assert padding < 1 - lengths.sum() / (theirs * cfg.length) + 0.02


def test_long_and_short_examples_come_in_no_order():
    batches = list(Batches(Rows(4000, 64), config(), epochs=1))
    counts = np.concatenate([batch["segment_ids"].max(axis=1) for batch in batches[:-1]])
    places = np.arange(len(counts))
    assert abs(np.corrcoef(places, counts)[0, 1]) < 4 / len(counts) ** 0.5
    within_a_group = np.corrcoef(places % 64, counts)[0, 1]
    assert abs(within_a_group) < 4 / len(counts) ** 0.5


# Several processes.


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_processes_make_the_rows_of_one_and_each_row_once_an_epoch(processes, known):
    source = Rows(701, known=known)
    whole = list(Batches(source, config(), epochs=2))
    counts = collections.Counter(itertools.chain(*map(seen, whole)))
    assert counts == dict.fromkeys(range(701), 2)
    parts = [Batches(source, config(), epochs=2, slots=slots) for slots in parts_of(processes)]
    for expected in whole:
        assert_same(joined([next_or_padding(part, SLOTS // processes) for part in parts]), expected)
    assert not any(map(list, parts))


@pytest.mark.parametrize("known", [True, False])
def test_a_process_reads_the_rows_of_its_slots_alone(known):
    sources = [Rows(701, known=known) for _ in range(4)]
    counts = collections.Counter()
    for source, slots in zip(sources, parts_of(4), strict=True):
        made = list(Batches(source, config(), epochs=1, slots=slots))
        counts.update(itertools.chain(*map(seen, made)))
        assert sorted(source.asked) == sorted(itertools.chain(*map(seen, made)))
    assert counts == dict.fromkeys(range(701), 1)


@pytest.mark.parametrize("known", [True, False])
def test_another_number_of_processes_goes_on_with_the_very_next_batch(known):
    """The processes change every few batches; no row is lost, and none comes twice."""
    source = Rows(701, known=known)
    whole = list(Batches(source, config(), epochs=1))
    made, state = [], None
    for processes in itertools.cycle((2, 8, 1, 4)):
        parts = [Batches(source, config(), epochs=1, slots=slots) for slots in parts_of(processes)]
        for part in parts:
            if state is not None:
                part.set_state(json.loads(json.dumps(state)))
        for _ in range(7):
            rows = [next_or_padding(part, SLOTS // processes) for part in parts]
            made.append(joined(rows))
        places = zip(*(part.get_state()["places"] for part in parts), strict=True)
        state = parts[0].get_state() | {
            "places": [next(filter(None, place)) for place in places]  # of the one that makes it
        }
        if len(made) >= len(whole):
            break
    for ours, theirs in zip(made, whole, strict=False):
        assert_same(ours, theirs)
    assert not any(batch["segment_ids"].any() for batch in made[len(whole) :])
    counts = collections.Counter(itertools.chain(*map(seen, made)))
    assert counts == dict.fromkeys(range(701), 1)


def test_rows_without_an_example_and_rows_of_several_are_all_read():
    source = Rows(300, known=False, copies=lambda row: row % 3)
    batches = list(Batches(source, config(), epochs=2))
    counts = collections.Counter(itertools.chain(*map(seen, batches)))
    assert counts == {row: row % 3 * 2 for row in range(300) if row % 3}


def test_fewer_rows_than_slots_fill_what_they_can():
    batches = list(itertools.islice(Batches(Rows(3), config(pack=False)), 6))
    counts = collections.Counter(itertools.chain(*map(seen, batches)))
    assert set(counts) == {0, 1, 2}
    with pytest.raises(ValueError, match=r"3 rows are fewer than data\.batch_size 8: lower"):
        Batches(Rows(3, known=False), config())


def test_a_process_without_examples_goes_on_with_padding_if_there_is_no_end():
    source = Rows(SLOTS, known=False, copies=lambda _: 0)
    made = [*itertools.islice(Batches(source, config(), slots=[2, 3]), 3)]
    assert [batch["segment_ids"].any() for batch in made] == [False] * 3
    assert [*Batches(source, config(), slots=[2, 3], epochs=1)] == []


def test_a_source_of_which_nothing_is_left_ends():
    source = Rows(40, known=False, copies=lambda row: 0)
    assert list(Batches(source, config())) == []
    with pytest.raises(ValueError, match=r"data\.train: none of 40 rows has an example"):
        Batches(source, config()).plan(1)


@pytest.mark.parametrize(
    ("field", "changes"),
    [("seed", {"seed": 1}), ("length", {"length": 65}), ("pack", {"pack": False})],
)
def test_a_place_in_another_order_is_refused_by_field(field, changes):
    state = Batches(Rows(50), config()).get_state()
    with pytest.raises(ValueError, match=rf"order of the data with data\.{field} "):
        Batches(Rows(50), config(**changes)).set_state(state)


def test_a_place_in_another_mixture_is_refused():
    def batches(*parts):
        source = Rows(50)
        source.parts = parts
        return Batches(source, config())

    mixture = batches(Part(20, 1.0), Part(30, 2.0))
    state = json.loads(json.dumps(mixture.get_state()))
    mixture.set_state(state)
    for other in (
        batches(Part(20, 1.0), Part(30, 3.0)),
        batches(Part(50)),
        batches(Part(30, 1.0), Part(20, 2.0)),
    ):
        with pytest.raises(ValueError, match=r"with \[rows, weight, window\] of the sources \[\["):
            other.set_state(state)


# How long a run is.


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("pack", [True, False])
def test_known_lengths_tell_the_steps_without_reading(epochs, pack):
    source = Rows(701)
    plan = Batches(source, config(pack=pack)).plan(epochs)
    assert source.asked == []
    batches = list(Batches(source, config(pack=pack), epochs=epochs))
    assert plan.exact
    assert plan.steps == len(batches)
    rows = sum(int(batch["segment_ids"].any(axis=1).sum()) for batch in batches)
    filled = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
    assert plan.padding == pytest.approx(1 - filled / (rows * 64))


def test_unknown_lengths_are_estimated_from_a_sample():
    source = Rows(10_000, known=False)
    plan = Batches(source, config()).plan(2)
    assert not plan.exact
    assert len(source.asked) < 2300
    steps = len(list(Batches(source, config(), epochs=2)))
    assert plan.steps == pytest.approx(steps, rel=0.03)


# Batches ahead of the device.


class Device:
    """An array that a device computes."""

    def __init__(self, seconds):
        self.until = time.monotonic() + seconds

    def is_ready(self):
        return time.monotonic() >= self.until


class SlowBatches:
    """Batches that are made when `more` is released."""

    def __init__(self):
        self.made, self.more, self.closed = 0, threading.Semaphore(0), False

    def __next__(self):
        self.more.acquire()
        self.made += 1
        return self.made

    def get_state(self):
        return {"places": [[0, self.made]]}

    def set_state(self, state):
        ((_, self.made),) = state["places"]

    def close(self):
        self.closed = True
        self.more.release(100)


def test_the_place_is_that_of_the_batch_taken_however_many_are_made():
    batches = SlowBatches()
    with Feed(batches, lambda batch: batch) as feed:
        feed.set_state({"places": [[0, 5]]})
        assert feed.get_state() == {"places": [[0, 5]]}
        batches.more.release(3)
        assert feed.take() == 6
        while batches.made < 8:
            time.sleep(0.001)
        assert feed.get_state() == {"places": [[0, 6]]}
        assert [feed.take(), feed.take()] == [7, 8]
        assert feed.get_state() == {"places": [[0, 8]]}
    assert batches.closed


def test_a_save_has_the_places_of_all_processes(monkeypatch):
    feeds = [Feed(Batches(Rows(99, known=False), config(), slots=s), dict) for s in parts_of(2)]
    gathered = [None]
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(
        "genlora_jax.training.feed.multihost_utils.process_allgather",
        lambda own: np.stack([own, gathered[0]]),
    )
    for feed, (first, last) in zip(feeds, ((0, 4), (4, 8)), strict=True):
        with feed:
            feed.take()
            feed.take()
            gathered[0] = np.full((SLOTS, 2), -1, np.int32)
            gathered[0][[*range(first), *range(last, SLOTS)]] = 7  # of the other process
            places = feed.get_state()["places"]
        assert places[first:last] == [[0, 2]] * 4
        assert all(place == [7, 7] for place in places[:first] + places[last:])
    json.dumps(places)


def test_a_device_waits_from_when_it_has_nothing_to_do():
    batches = SlowBatches()
    with Feed(batches, lambda batch: batch) as feed:
        threading.Timer(0.3, batches.more.release).start()
        feed.take(Device(0.1))
        assert feed.waited == pytest.approx(0.2, abs=0.08)
        before = feed.waited
        threading.Timer(0.1, batches.more.release).start()
        feed.take(Device(0.5))
        assert feed.waited == before
        batches.more.release()
        time.sleep(0.1)
        feed.take(Device(0))
        assert feed.waited == before


def test_an_error_in_making_a_batch_comes_where_it_is_taken():
    def place(batch):
        if batch == 2:
            raise ValueError("rows.jsonl:2: not a row")
        return jnp.float32(batch)

    batches = SlowBatches()
    batches.more.release(9)
    with Feed(batches, place) as feed:
        assert feed.take() == 1
        with pytest.raises(ValueError, match="not a row"):
            feed.take()


def test_a_wait_of_more_than_a_twentieth_is_told_once():
    watch = WaitWatch()
    lines = [watch.add(1.0, 0.9)]  # the first, with the compiler's time
    lines += [watch.add(1.0, 0.04) for _ in range(50)]
    assert lines == [None] * 51
    lines = [watch.add(1.0, 0.06) for _ in range(150)]
    (line,) = filter(None, lines)
    assert lines.index(line) == 49
    assert line.startswith("input_wait: the device waited for data 6% of the last 50 steps")
