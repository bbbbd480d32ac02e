"""The cache on its own: what it stores, how much, and that sequences go on exactly after any cut, copy or failure."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dependencies import CONFIGS, expected, filled, poison, run, run_step, tokens, toy_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4 import Config, KVCache
from dsv4.cache import cache as cache_module
from dsv4.cache import cache_bytes
from dsv4.cache.replay import Replay, plan_replay

NANO, FLASH = Config.preset("nano"), Config.preset("v4-flash")
SLIM_FLASH = replace(FLASH, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4), num_nextn_predict_layers=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 7, 300, 1024])
def test_stand_in_agrees_with_itself(name: str, chunk: int) -> None:
    ids = tokens(1024 if chunk > 1 else 270)
    made = toy_cache(CONFIGS[name])
    got = [run(made, [ids[at : at + chunk]])[0] for at in range(0, len(ids), chunk)]
    assert np.array_equal(np.concatenate(got), expected(CONFIGS[name], ids))
    assert made.lengths == (len(ids),)


@pytest.mark.parametrize("rollback", [0, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_crop_to_every_length(name: str, rollback: int) -> None:
    config, ids, other = CONFIGS[name], tokens(1300), tokens(140, seed=1)
    for length in range(0, 1301, 3 if rollback and name == "all kinds" else 13):
        cut = filled(config, ids, rollback=rollback)
        cut.crop(length)
        poison(cut)
        assert np.array_equal(run(cut, [other])[0], expected(config, ids[:length] + other)[length:]), length


def test_crop_within_rollback_runs_nothing_again() -> None:
    config, ids = CONFIGS["all kinds"], tokens(600)
    for length in (9, 256, 257, 400, 512, 600):
        for back in range(9):
            made = filled(config, ids[:length])
            made.crop(length - back)
            poison(made)
            assert list(made.pending()) == []
            new = tokens(150, seed=2)
            assert np.array_equal(run(made, [new])[0], expected(config, ids[: length - back] + new)[length - back :])


def test_repeated_small_crops_add_up() -> None:
    """Ten cuts of two tokens reach further back than the rings do."""
    config, ids = CONFIGS["all kinds"], tokens(600)
    made = filled(config, ids)
    for times in range(10):
        made.crop(made.length - 2)
        assert bool(list(_pending_spans(made.snapshot()))) == (2 * (times + 1) > made.rollback)
    new = tokens(150, seed=2)
    assert np.array_equal(run(made, [new])[0], expected(config, ids[:580] + new)[580:])


def test_rows_written_before_a_crop_count() -> None:
    """Eight tokens back, one on, eight back: the rings still miss what the tokens first cut off overwrote."""
    config, ids, new = CONFIGS["all kinds"], tokens(900), tokens(150, seed=2)
    for length in range(880, 901):
        made = filled(config, ids[:length])
        made.crop(length - 8)
        run(made, [[3]])
        made.crop(length - 15)
        got = run(made, [new])[0]
        assert np.array_equal(got, expected(config, ids[: length - 15] + new)[length - 15 :])


@pytest.mark.parametrize("name", CONFIGS)
def test_crop_after_a_replay(name: str) -> None:
    """Rows that a replay could not rebuild exactly are not taken for exact by the next one."""
    config, ids, new = CONFIGS[name], tokens(1300), tokens(150, seed=2)
    for first, second in ((700, 690), (700, 670), (700, 600), (1010, 1000), (1100, 1070), (600, 520), (530, 515)):
        made = filled(config, ids)
        made.crop(first)
        _pending_spans(made)
        made.crop(second)
        assert np.array_equal(run(made, [new])[0], expected(config, ids[:second] + new)[second:])


def _pending_spans(made: KVCache) -> list[tuple[int, int, int]]:
    spans = []
    for step in made.pending():
        spans += step.spans
        run_step(made, step)
        made.commit(step)
    return spans


def test_replay_starts_no_earlier_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token less of a replay, of either kind, and some length goes wrong."""
    config, ids, other = CONFIGS["all kinds"], tokens(1295), tokens(140, seed=1)
    whole = filled(config, ids, rollback=0)
    wrong = {True: 0, False: 0}
    plans = []

    def late(*args: object) -> Replay:
        plan = plan_replay(*args)
        plans.append(plan)
        return plan._replace(start=min(plan.start + 1, args[1]))

    monkeypatch.setattr(cache_module, "plan_replay", late)
    for length in range(1001, 1295, 3):
        cut = whole.snapshot()
        cut.crop(length)
        same = np.array_equal(run(cut, [other])[0], expected(config, ids[:length] + other)[length:])
        wrong[plans[-1].reuses_window] += not same
    assert wrong[True] > 0
    assert wrong[False] > 0


def test_replay_length_of_a_release() -> None:
    plan = plan_replay(KVCache(FLASH).settings, 100_000, 100_000)
    assert not plan.reuses_window
    assert 100_000 - plan.start == 8 + 43 * 127
    assert plan.floor == 100_000 - 8 - 127


@pytest.mark.parametrize("rows", [1, 17, 50])
def test_replay_in_pieces(rows: int) -> None:
    config, ids, other = CONFIGS["all kinds"], tokens(900), tokens(140, seed=1)
    made = filled(config, ids)
    made.crop(520)
    sizes = []
    for step in made.pending(rows):
        sizes.append(len(step.position))
        assert step.replay
        assert bool((step.write_table == -1).all())
        run_step(made, step)
        made.commit(step)
    assert len(sizes) > 1
    assert max(sizes) == rows
    assert np.array_equal(run(made, [other])[0], expected(config, ids[:520] + other)[520:])


def test_replay_leaves_room_to_roll_back() -> None:
    config, ids, other = CONFIGS["all kinds"], tokens(900), tokens(140, seed=1)
    for length in range(300, 890, 37):
        made = filled(config, ids)
        made.crop(length)
        _pending_spans(made)
        made.crop(length - 8)
        assert list(made.pending()) == []
        assert np.array_equal(run(made, [other])[0], expected(config, ids[: length - 8] + other)[length - 8 :])


def test_abandoned_replay_starts_over() -> None:
    config, ids, other = CONFIGS["all kinds"], tokens(900), tokens(140, seed=1)
    made = filled(config, ids)
    made.crop(530)
    steps = made.pending(40)
    for layers in (4, 2):
        step = next(steps)
        run_step(made, step, layers)
        if layers == 4:
            made.commit(step)
    with pytest.raises(RuntimeError, match="commit every step"):
        next(steps)
    with pytest.raises(RuntimeError, match="pending"):
        made.begin([torch.tensor([1])])
    assert np.array_equal(run(made, [other])[0], expected(config, ids[:530] + other)[530:])


@pytest.mark.parametrize("layers", [0, 1, 4])
@pytest.mark.parametrize("chunk", [1, 8, 9, 300])
def test_step_that_failed(chunk: int, layers: int) -> None:
    config, ids, other = CONFIGS["all kinds"], tokens(700), tokens(140, seed=1)
    made = filled(config, ids)
    before = made.nbytes
    for _ in range(2):
        run_step(made, made.begin([torch.tensor(tokens(chunk, seed=3))]), layers)
        assert made.lengths == (700,)
        assert made.token_ids().tolist() == ids
        assert bool(_pending_spans(made)) == (chunk > made.rollback)
        assert made.nbytes <= before
    assert np.array_equal(run(made, [other])[0], expected(config, ids + other)[700:])


def test_sequences_of_different_lengths() -> None:
    config = CONFIGS["all kinds"]
    made = toy_cache(config, batch_size=3)
    ids: list[list[int]] = [[], [], []]
    for turn, counts in enumerate([(5, 0, 300), (0, 129, 1), (256, 1, 0), (1, 1, 1), (0, 0, 0), (300, 2, 40)]):
        new = [tokens(count, seed=10 * turn + place) for place, count in enumerate(counts)]
        got = run(made, new)
        for place in range(3):
            ids[place] += new[place]
            assert np.array_equal(got[place], expected(config, ids[place])[len(ids[place]) - counts[place] :])
    assert made.lengths == tuple(map(len, ids)) == (562, 133, 342)
    assert made.length == 562
    made.crop([40, 133, 300])
    ids = [ids[0][:40], ids[1], ids[2][:300]]
    assert {span[0] for span in _pending_spans(made.snapshot())} == {0, 2}
    got = run(made, [[1], [2, 3], [4]])
    for place, new in enumerate(([1], [2, 3], [4])):
        assert np.array_equal(got[place], expected(config, ids[place] + new)[len(ids[place]) :])


def test_copies_share_pages_until_written() -> None:
    config, ids = CONFIGS["all kinds"], tokens(700)
    made = filled(config, ids)
    window, compressed = made._tables.pools
    assert (window.used, compressed.used) == (1, 3)
    many = made.fork([0] * 5)
    assert (window.used, compressed.used) == (1, 3)
    news = [tokens(3, seed=place) for place in range(5)]
    got = run(many, news)
    for place, new in enumerate(news):
        assert np.array_equal(got[place], expected(config, ids + new)[700:])
    assert (window.used, compressed.used) == (1 + 5, 3 + 5)  # the last page of each kind, once a copy
    assert many.nbytes < 5 * made.nbytes
    assert np.array_equal(run(made, [[1, 2]])[0], expected(config, [*ids, 1, 2])[700:])
    assert (window.used, compressed.used) == (1 + 5, 3 + 5)  # by now the last holder of its own
    del many
    gc.collect()
    assert (window.used, compressed.used) == (1, 3)
    del made
    gc.collect()
    assert (window.used, compressed.used) == (0, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_go_their_own_ways(name: str) -> None:
    config, ids = CONFIGS[name], tokens(600)
    for length in (1, 130, 255, 256, 257, 280, 299, 300, 515, 600):
        made = filled(config, ids[:length])
        two = made.fork([0, 0])
        rows = [ids[:length]] * 3
        for turn, count in enumerate((25, 1, 90, 150)):
            new = [tokens(count, seed=100 * turn + place) for place in range(3)]
            got = [*run(two, new[:2]), *run(made, new[2:])]
            for place in range(3):
                rows[place] = rows[place] + new[place]
                assert np.array_equal(got[place], expected(config, rows[place])[-count:])


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_the_copy_module_makes_snapshots(how: Callable[[KVCache], KVCache]) -> None:
    config, ids = CONFIGS["all kinds"], tokens(300)
    made = filled(config, ids)
    window, compressed = made._tables.pools
    before = (window.used, compressed.used)
    other = how(made)
    assert np.array_equal(run(other, [[5, 6]])[0], expected(config, [*ids, 5, 6])[300:])
    del other
    gc.collect()
    assert (window.used, compressed.used) == before
    assert np.array_equal(run(made, [[1, 2]])[0], expected(config, [*ids, 1, 2])[300:])


def test_pickle_is_refused() -> None:
    with pytest.raises(
        TypeError, match=re.escape("cannot be pickled; write it with save and read it with KVCache.load")
    ):
        pickle.dumps(filled(CONFIGS["all kinds"], tokens(10)))


def test_copies_keep_their_ids() -> None:
    made = filled(CONFIGS["all kinds"], tokens(700))
    other = made.snapshot()
    other.crop(695)
    run(other, [[1, 2, 3]])
    assert made.token_ids().tolist() == tokens(700)
    assert other.token_ids().tolist() == [*tokens(695), 1, 2, 3]


@pytest.mark.parametrize("ran", [False, True])
def test_snapshot_during_a_step(ran: bool) -> None:
    config, ids, new = CONFIGS["all kinds"], tokens(700), tokens(200, seed=3)
    made = filled(config, ids)
    before = made.nbytes
    step = made.begin([torch.tensor(new)])
    if ran:
        run_step(made, step)
    other = made.snapshot()
    assert other.nbytes == before
    if not ran:
        run_step(made, step)
    made.commit(step)
    assert other.lengths == (700,)
    assert np.array_equal(run(other, [[5, 6]])[0], expected(config, [*ids, 5, 6])[700:])
    assert np.array_equal(run(made, [[5]])[0], expected(config, [*ids, *new, 5])[900:])


def test_pages_come_back() -> None:
    """A long sequence in small steps needs no more window pages than its window does."""
    made = toy_cache(CONFIGS["all kinds"])
    for at in range(40):
        run(made, [tokens(100, seed=at)])
    window, compressed = made._tables.pools
    assert window.capacity <= 3
    assert compressed.used == 16
    made.clear()
    assert (window.used, compressed.used, made.length) == (0, 0, 0)
    assert made.nbytes == cache_bytes(made.config, 0, quantization="off", dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"index_format": "fp8", "rollback": 0},
        {"quantization": "off", "dtype": torch.float32},
        {"quantization": "off", "dtype": torch.float64, "rollback": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "config", [NANO, CONFIGS["odd ratios"], Config.preset("v4-flash")], ids=["nano", "odd", "flash"]
)
def test_bytes(config: Config, options: dict) -> None:
    """The planner's figure, the cache's, and that of its tensors are one, at every length."""
    if config is CONFIGS["odd ratios"] and options.get("quantization") != "off":
        config = replace(NANO, compress_ratios=(4, 100, 3, 300, 0, 0, 0, 0))
    step = 1 if config is NANO else 97
    made = KVCache(config, batch_size=2, **options)
    assert made.nbytes == cache_bytes(config, 0, 2, **options)
    lengths = [0, 0]
    for at in range(0, 1100, step):
        counts = [step, step * (at % 3 == 0)]
        made.commit(made.begin([torch.zeros(count, dtype=torch.int64) for count in counts]))
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        assert made.nbytes == cache_bytes(config, lengths, **options)
    assert made.nbytes == _measured_bytes(made) <= made.allocated_nbytes + 2 * 4 * sum(lengths)
    same = KVCache(config, batch_size=2, **options)
    for _ in range(3):
        same.commit(same.begin([torch.zeros(400, dtype=torch.int64)] * 2))
    assert same.nbytes == cache_bytes(config, 1200, batch_size=2, **options)


def _measured_bytes(made: KVCache) -> int:
    total = 0
    tables = made._stored_tables()
    for pool, table in zip(made._tables.pools, tables, strict=True):
        pages = {int(page) for page in table.flatten() if page >= 0}
        total += sum(tensor[page].nbytes for tensor in pool.tensors for page in pages)
    for layer in made.layers:
        total += sum(state.nbytes for state in (layer.state, layer.index_state) if state is not None)
    # A sequence pays for the columns it uses.
    total += sum(2 * 4 * -(-length // 256) for length in made.lengths)
    return total + sum(4 * length for length in made.lengths)


def test_bytes_a_token_of_the_releases() -> None:
    """Rows and keys alone: 40 bytes of padding at every two HCA entries (1,728 for 1,168) make the rest."""
    for name, csa, hca in (("v4-flash", 21, 20), ("v4-pro", 30, 31)):
        config = Config.preset(name)
        grown = cache_bytes(config, 1 << 20) - cache_bytes(config, 1 << 19)
        page = csa * (37_440 + 64 * 68) + hca * 1_728
        assert grown * 256 == (page + 8 + 4 * 256) << 19
        assert csa * 652 / 4 + hca * 584 / 128 == pytest.approx({"v4-flash": 3514, "v4-pro": 5031}[name], abs=1)


def test_layers_describe_what_they_store() -> None:
    made = KVCache(NANO, batch_size=np.int64(3))
    made.commit(made.begin([torch.zeros(5, dtype=torch.int64)] * 3))
    swa, csa, hca = made.layers[0], made.layers[2], made.layers[3]
    assert swa.pages is swa.state is swa.index_pages is swa.index_state is None
    assert swa.window_pages.dtype == torch.uint8
    assert csa.state.shape == (3, 16, 2, 256)
    assert csa.index_state.shape == (3, 16, 2, 256)
    assert csa.page_size == 64
    assert csa.index_pages.shape[1] == 64 * 68
    assert hca.state.shape == (3, 136, 2, 128)
    assert hca.index_pages is hca.index_state is None
    assert hca.page_size == 2
    assert hca.state.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"max_seq_len": 0}, "max_seq_len must be an integer from 1 to 2147483647, got 0"),
        ({"quantization": "fp8"}, "quantization"),
        ({"index_format": "int8"}, "index_format"),
        ({"rollback": -1}, "rollback"),
        ({"dtype": torch.int32}, "dtype"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        KVCache(NANO, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([torch.zeros(1, dtype=torch.int64)], "one tensor a sequence"),
        ([torch.zeros(1, dtype=torch.int64), torch.zeros(53, dtype=torch.int64)], "max_seq_len is 60"),
        *(([torch.tensor([1]), torch.zeros(1, dtype=kind)], "integer") for kind in (torch.float32, torch.bool)),
        ([torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)], "integer"),
        ([torch.zeros(1, dtype=torch.int64), torch.tensor([97])], "vocab|\\[0, 97\\)"),
        ([torch.zeros(1, dtype=torch.int64), torch.tensor([-1])], "\\[0, 97\\)"),
        ([torch.zeros(1, dtype=torch.int64), [1]], "tensors"),
    ],
)
def test_begin_refuses(ids: list, message: str) -> None:
    made = toy_cache(CONFIGS["all kinds"], batch_size=2, max_seq_len=60)
    run(made, [tokens(8), tokens(8)])
    before = made.nbytes
    with pytest.raises(ValueError, match=message) as error:
        made.begin(ids)
    assert "\n" not in str(error.value)
    assert (made.lengths, made.nbytes) == ((8, 8), before)
    assert np.array_equal(run(made, [tokens(52, 1), []])[0], expected(made.config, tokens(8) + tokens(52, 1))[8:])


def test_step_does_not_change() -> None:
    """Its tables are what begin gave out, whatever becomes of the pages."""
    made = filled(CONFIGS["all kinds"], tokens(500))
    step = made.begin([torch.tensor(tokens(600))])
    before = step.window_table.tolist(), step.compressed_table.tolist()
    made.commit(step)
    made.crop(3)
    assert (step.window_table.tolist(), step.compressed_table.tolist()) == before


def test_commit_takes_the_last_step_once() -> None:
    made = toy_cache(CONFIGS["all kinds"])
    first = made.begin([torch.tensor([1])])
    second = made.begin([torch.tensor([2])])
    with pytest.raises(ValueError, match="commit"):
        made.commit(first)
    made.commit(second)
    with pytest.raises(ValueError, match="commit"):
        made.commit(second)
    third = made.begin([torch.tensor([3])])
    made.crop(0)
    with pytest.raises(ValueError, match="commit"):
        made.commit(third)
    assert made.lengths == (0,)


@pytest.mark.parametrize("target", [-1, 11, [5], [5, 11], [5, -1]])
def test_crop_refuses(target: int | list[int]) -> None:
    made = toy_cache(CONFIGS["all kinds"], batch_size=2)
    run(made, [tokens(10), tokens(10)])
    with pytest.raises(ValueError, match="crop"):
        made.crop(target)
    assert made.lengths == (10, 10)


@pytest.mark.parametrize("number", [np.int64, lambda n: torch.tensor([n]), torch.tensor])
def test_numbers_of_other_kinds(number: Any) -> None:
    made = toy_cache(CONFIGS["all kinds"], batch_size=2)
    run(made, [tokens(10), tokens(10)])
    length = number(7)
    made.crop(length)
    if isinstance(length, torch.Tensor):
        length += 2
    assert made.lengths == (7, 7)
    assert all(type(length) is int for length in made.lengths)
    made.crop([number(5), number(3)])
    assert made.fork(number(1)).lengths == (3,)
    assert made.fork([number(1), number(0)]).lengths == (3, 5)


def test_fork_refuses() -> None:
    made = toy_cache(CONFIGS["all kinds"])
    for choice in (1, -1, [], [0, 1]):
        with pytest.raises(ValueError, match="sequence"):
            made.fork(choice)


def test_shortage_of_memory_leaves_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    config, ids, other = CONFIGS["all kinds"], tokens(500), tokens(600, seed=1)
    made = filled(config, ids)

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(made._tables.pools[1], "_makers", [made._tables.pools[1]._makers[0], fail])
        with pytest.raises(RuntimeError, match="memory"):
            made.begin([torch.tensor(other)])
    assert np.array_equal(run(made, [other])[0], expected(config, ids + other)[500:])


def test_inference_mode_does_not_stick() -> None:
    """State made under inference_mode can be written without it."""
    config, ids = CONFIGS["all kinds"], tokens(300)
    with torch.inference_mode():
        made = filled(config, ids)
        other = made.snapshot()
        other.crop(295)
    for cache, length in ((made, 300), (other, 295)):
        with torch.no_grad():
            step = cache.begin([torch.tensor([1])])
            for layer in cache.layers:
                layer.window_pages[-1].mul_(1)
                if layer.state is not None:
                    layer.state.mul_(1)
            assert not step.window_table.is_inference()
        assert np.array_equal(run(cache, [[7]])[0], expected(config, [*ids[:length], 7])[length:])


# Anything in any order


class _Model:
    """Lists of ids, and the cache that should behave as they do."""

    def __init__(self, config: Config, ids: list[list[int]], cache: KVCache):
        self.config, self.ids, self.cache = config, ids, cache

    def append(self, counts: list[int], seed: int) -> None:
        new = [tokens(count, seed + place) for place, count in enumerate(counts[: len(self.ids)])]
        new += [[]] * (len(self.ids) - len(new))
        got = run(self.cache, new)
        for place, more in enumerate(new):
            old = self.ids[place]
            assert np.array_equal(got[place], expected(self.config, old + more)[len(old) :])
            self.ids[place] = old + more

    def check(self) -> None:
        assert self.cache.lengths == tuple(map(len, self.ids))
        assert [self.cache.token_ids(place).tolist() for place in range(len(self.ids))] == self.ids


_COUNTS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 400)), min_size=1, max_size=3)
_ACTION = st.one_of(
    st.tuples(st.just("append"), _COUNTS),
    st.tuples(st.just("fail"), _COUNTS),
    st.tuples(st.just("crop"), st.lists(st.floats(0, 1), min_size=3, max_size=3)),
    st.tuples(st.just("roll back"), st.lists(st.integers(0, 9), min_size=3, max_size=3)),
    st.tuples(st.just("snapshot"), st.none()),
    st.tuples(st.just("fork"), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
    st.tuples(st.just("switch"), st.integers(0, 3)),
    st.tuples(st.just("drop"), st.integers(0, 3)),
    st.tuples(st.just("file"), st.none()),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    batch=st.integers(1, 3),
    rollback=st.sampled_from([0, 3, 8]),
    actions=st.lists(_ACTION, min_size=3, max_size=14),
)
def test_any_order_of_operations(tmp_path: Path, name: str, batch: int, rollback: int, actions: list) -> None:
    config = CONFIGS[name]
    models = [_Model(config, [[] for _ in range(batch)], toy_cache(config, batch, rollback=rollback))]
    for seed, (action, detail) in enumerate(actions):
        now = models[0]
        size = len(now.ids)
        if action == "append":
            now.append(detail, seed)
        elif action == "fail":
            _pending_spans(now.cache)
            new = [torch.tensor(tokens(count, seed), dtype=torch.int64) for count in (detail * 3)[:size]]
            run_step(now.cache, now.cache.begin(new), 1 + seed % 3)
        elif action == "crop":
            now.ids = [ids[: int(part * len(ids))] for ids, part in zip(now.ids, detail, strict=False)]
            now.cache.crop([len(ids) for ids in now.ids])
        elif action == "roll back":
            now.ids = [ids[: max(0, len(ids) - back)] for ids, back in zip(now.ids, detail, strict=False)]
            now.cache.crop([len(ids) for ids in now.ids])
        elif action == "snapshot":
            models.append(_Model(config, list(now.ids), now.cache.snapshot()))
        elif action == "fork":
            chosen = [place % size for place in detail]
            models.append(_Model(config, [now.ids[place] for place in chosen], now.cache.fork(chosen)))
        elif action == "switch":
            models.insert(0, models.pop(detail % len(models)))
        elif action == "drop" and len(models) > 1:
            models.pop(detail % len(models))
        elif action == "file":
            now.cache.save(tmp_path / "cache")
            now.cache = KVCache.load(tmp_path / "cache", config)
        for each in models:
            each.check()
    for seed, each in enumerate(models):
        poison_unshared(each, models)
        each.append([5] * len(each.ids), 100 + seed)


def poison_unshared(each: _Model, models: list[_Model]) -> None:
    """Free pages are free for all; pages of siblings are not to be touched."""
    if len(models) == 1:
        poison(each.cache)
