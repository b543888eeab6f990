"""Window: the rule, the key ranges that follow from it, and the conversions."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swath import Window
from swath.testing import visible
from swath.testing.oracle import inside

WINDOWS = st.builds(
    Window,
    st.none() | st.integers(0, 12),
    st.integers(0, 9),
    st.booleans(),
)


def matrix(window: Window, first: int, last: int, kv_len: int) -> torch.Tensor:
    """Which keys a query sees by the independent formula."""
    p, k = torch.arange(first, last + 1), torch.arange(kv_len)
    return visible(p, k, window.size, window.global_tokens, window.causal)


@given(WINDOWS, st.integers(-15, 30), st.integers(0, 6), st.integers(0, 25))
def test_mask_is_the_formula(window: Window, first: int, more: int, kv_len: int) -> None:
    got = window.mask(torch.arange(first, first + more + 1), torch.arange(kv_len))
    assert torch.equal(got, matrix(window, first, first + more, kv_len))


@given(WINDOWS, st.integers(-15, 30), st.integers(0, 6), st.integers(0, 25))
def test_key_ranges_hold_every_visible_key_and_begin_and_end_at_one(
    window: Window, first: int, more: int, kv_len: int
) -> None:
    lead, left, right = window.key_ranges(first, first + more, kv_len)
    assert 0 <= lead <= left <= right <= kv_len
    inside = torch.zeros(kv_len, dtype=torch.bool)
    inside[:lead] = inside[left:right] = True
    seen = matrix(window, first, first + more, kv_len).any(0)
    assert not (seen & ~inside).any()
    assert not (inside & ~seen).any(), "neighbouring queries leave no gap, so the ranges are exact"


@given(WINDOWS, st.integers(-15, 30), st.integers(0, 6), st.integers(0, 25))
def test_every_query_sees_the_interior_and_the_leading_keys(window: Window, first: int, more: int, kv_len: int) -> None:
    lead, left, right = window.key_ranges(first, first + more, kv_len)
    start, stop = window.interior(first, first + more, left, right)
    by_all = matrix(window, first, first + more, kv_len).all(0)
    assert by_all[:lead].all()
    assert by_all[start:stop].all()
    by_window = matrix(replace(window, global_tokens=0), first, first + more, kv_len).all(0)
    by_window[:left] = False
    assert by_window.nonzero().flatten().tolist() == list(range(start, stop))


@given(WINDOWS, st.integers(-15, 30), st.integers(1, 6), st.integers(0, 25))
def test_visible_bound_bounds(window: Window, first: int, rows: int, kv_len: int) -> None:
    seen = matrix(window, first, first + rows - 1, kv_len).any(0)
    assert window.visible_bound(rows, kv_len) >= int(seen.sum())


def test_visible_bound_does_not_grow_with_the_context() -> None:
    assert Window(128, 4).visible_bound(1, 10**6) == 128 + 4
    assert Window(128, 4, causal=False).visible_bound(1, 10**6) == 2 * 127 + 1 + 4


def test_the_worked_examples() -> None:
    window = Window(size=4, global_tokens=2)
    seen = window.mask(torch.tensor([10, 3]), torch.arange(12))
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0, 1, 7, 8, 9, 10], [0, 1, 2, 3]]
    assert window.key_ranges(10, 11, 100) == (2, 7, 12)


@pytest.mark.parametrize(
    ("left", "right", "causal", "wanted"),
    [
        (127, 0, True, Window(128)),
        (0, 0, True, Window(1)),
        (-1, 0, True, Window()),
        (-1, -1, True, Window()),
        (127, 127, True, Window(128)),
        (127, -1, True, Window(128)),
        (127, 0, False, Window(128)),
        (-1, 0, False, Window()),
        (-1, -1, False, Window(causal=False)),
        (5, 5, False, Window(6, causal=False)),
    ],
)
def test_from_flash(left: int, right: int, causal: bool, wanted: Window) -> None:
    assert Window.from_flash(left, right, causal=causal) == wanted


def test_from_flash_does_not_guess_causality() -> None:
    """Callers of FlashAttention write ``causal=True, window_size=(-1, -1)``: without the flag it would be lost."""
    with pytest.raises(TypeError, match="causal"):
        Window.from_flash(-1, -1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^causal: wanted a bool, got"):
        Window.from_flash(-1, -1, causal=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("left", "right"), [(5, 4), (5, -1), (-1, 3), (-2, 0), (0, 7)])
def test_from_flash_refuses_other_right_windows(left: int, right: int) -> None:
    with pytest.raises(ValueError, match=r"^(left|right): wanted"):
        Window.from_flash(left, right, causal=False)


def test_what_a_window_argument_may_be() -> None:
    window = Window(7, global_tokens=2)
    assert Window.of(window) is window
    assert Window.of(None) == Window()
    assert Window.of(128) == Window(128)
    for wrong in (True, 2.0, "128", (127, 0)):
        with pytest.raises(TypeError, match=r"^window: wanted a Window, an int or None, got"):
            Window.of(wrong)
    with pytest.raises(ValueError, match=r"^size: wanted"):
        Window.of(-1)


def test_a_size_beyond_any_position_is_refused() -> None:
    assert Window(2**31 - 1).size == 2**31 - 1
    with pytest.raises(ValueError, match=r"^size: wanted at most 2147483647"):
        Window(2**31)


@pytest.mark.parametrize(
    ("local", "global_", "wanted"),
    [
        (None, None, Window()),
        (None, 4, Window(0, global_tokens=4)),
        (1023, 4, Window(1024, global_tokens=4)),
        (255, None, Window(256)),
    ],
)
def test_from_mojo(local: int | None, global_: int | None, wanted: Window) -> None:
    assert Window.from_mojo(local, global_) == wanted


def test_a_copy_with_tensors_of_its_own_is_another_window() -> None:
    window = Window(4, torch.tensor([3]))
    assert hash(window) == hash(window.key)
    assert copy.deepcopy(window) != window
    assert pickle.loads(pickle.dumps(window)) != window
    assert copy.deepcopy(Window(4)) == Window(4)


def test_leading_tokens_of_each_sequence() -> None:
    counts = torch.tensor([3, -5, 9], dtype=torch.int32)
    window = Window(4, counts, max_global_tokens=9)
    assert [window.for_sequence(b).global_tokens for b in range(3)] == [3, 0, 9]
    assert window.global_bound(100) == 9
    assert window.global_bound(5) == 5
    assert Window(4, counts).global_bound(100) == 100


def test_windows_compare_and_hash_by_value() -> None:
    counts = torch.tensor([1], dtype=torch.int32)
    assert {Window(4): 1}[Window(4)] == 1
    assert Window(4) != Window(5)
    assert Window(4, counts) == Window(4, counts)
    assert Window(4, counts) != Window(4, counts.clone())
    assert Window().is_unbounded
    assert not Window(4).is_unbounded


ONE = torch.tensor([1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("fields", "error", "name"),
    [
        ({"size": -1}, ValueError, "size"),
        ({"size": 2.0}, TypeError, "size"),
        ({"size": True}, TypeError, "size"),
        ({"global_tokens": -1}, ValueError, "global_tokens"),
        ({"global_tokens": None}, TypeError, "global_tokens"),
        ({"global_tokens": torch.tensor([1.0])}, TypeError, "global_tokens"),
        ({"global_tokens": 2**31}, ValueError, "global_tokens"),
        ({"size": 10**30}, ValueError, "size"),
        ({"global_tokens": ONE[None]}, ValueError, "global_tokens"),
        ({"max_global_tokens": 4}, ValueError, "max_global_tokens"),
        ({"global_tokens": ONE, "max_global_tokens": -1}, ValueError, "max_global_tokens"),
        ({"causal": 1}, TypeError, "causal"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_fields(fields: dict[str, object], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}: wanted"):
        Window(**fields)


BOUNDED = st.builds(
    lambda rows, g: Window(global_tokens=g, bounds=torch.tensor(rows, dtype=torch.int32)),
    st.lists(st.tuples(st.integers(-4, 30) | st.just(-(2**31)), st.integers(-4, 30) | st.just(2**31 - 1)), min_size=1),
    st.integers(0, 9),
)


@given(BOUNDED, st.integers(0, 25))
def test_bounds_show_what_their_ranges_hold(window: Window, kv_len: int) -> None:
    rows, keys = torch.zeros(len(window.bounds), dtype=torch.int64), torch.arange(kv_len)
    seen = inside(window.bounds, keys, window.global_tokens)
    assert torch.equal(window.mask(rows, keys), seen)
    assert torch.equal(window.seen_by_any(0, 0, kv_len), seen.any(0))
    lead, left, right = window.key_ranges(0, 0, kv_len)
    assert 0 <= lead <= left <= right <= kv_len
    held = torch.zeros(kv_len, dtype=torch.bool)
    held[:lead] = held[left:right] = True
    assert not (seen.any(0) & ~held).any()
    assert lead in (0, window.global_tokens) or lead == kv_len or seen[:, :lead].any(0).all()
    by_window = inside(window.bounds, keys, 0)
    assert not right > left or by_window.any(0)[left] or left == 0
    start, stop = window.interior(0, 0, left, right)
    assert by_window[:, start:stop].all()


def test_rows_of_bounds() -> None:
    bounds = torch.arange(12).view(2, 3, 2)
    window = Window(bounds=bounds, max_visible=1)
    assert torch.equal(window.for_sequence(1, 1).of_rows(1, 3).bounds, bounds[1, 1:])
    assert Window(4).of_rows(1, 2) == Window(4)
    assert not window.is_unbounded
    assert window == Window(bounds=bounds, max_visible=1) != Window(bounds=bounds.clone(), max_visible=1)
    assert hash(window) == hash(Window(bounds=bounds, max_visible=1))


def test_guesses_go_by_the_promise() -> None:
    bounds = torch.zeros(1, 2, dtype=torch.int32)
    assert Window(bounds=bounds).visible_guess(16, 5000) == 5000
    assert Window(bounds=bounds, max_visible=100).visible_guess(16, 5000) == 128 + 15
    assert Window(bounds=bounds, max_visible=100).visible_bound(16, 5000) == 5000
    assert Window(100, global_tokens=2).visible_guess(16, 5000) == 99 + 16 + 2
