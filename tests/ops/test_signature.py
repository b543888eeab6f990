"""The memory of signatures: what it knows again, and that it keeps nothing of a call alive."""

from __future__ import annotations

import gc
from dataclasses import fields
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from swath import PagedKV, PageTable, Window, paged_attention
from swath.ops import paged
from swath.ops.signature import Memory, signature_of
from swath.testing import Case, make


class OwnWindow(Window):
    """A window that a user made of one."""


class OwnTable(PageTable):
    """A table that a user made of one."""


class OwnCache(PagedKV):
    """A cache that a user made of one."""


class Stranger:
    """Nothing that swath takes."""


@pytest.mark.parametrize("own", [False, True], ids=["known", "of the user"])
def test_nothing_of_a_call_stays_alive(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what a user made of a noun, which is not known again: what it adds might decide about the call."""
    known: dict[Any, Any] = {}
    monkeypatch.setattr(paged.STAGES.memory, "_known", known)
    inputs = make(Case(size=20, global_tokens=(1, 2, 3), table="rows", sink="fp32", q_start=(30, 20, 60)))
    q, cache, table, seq_lens = inputs.args
    options = inputs.options
    if own:
        options["window"] = OwnWindow(20, options["window"].global_tokens)
        table, cache = OwnTable(table.entries, rows=table.rows), OwnCache(cache.k, cache.v)
    nouns = [cache, table, options["window"]]
    parts = [q, seq_lens, *options.values(), *(getattr(x, f.name) for x in nouns for f in fields(x))]
    watched = [ref(x) for x in parts if isinstance(x, Tensor)] + [ref(x) for x in nouns]
    assert len(watched) == 9 + 3
    for _ in range(2):
        paged_attention(q, cache, table, seq_lens, **options)
    assert len(known) == (not own)
    del q, cache, table, seq_lens, options, nouns, parts, inputs
    gc.collect()
    assert [w() for w in watched if w() is not None] == []


def test_strangers_are_named_and_forgotten() -> None:
    inputs = make(Case())
    stranger = Stranger()
    watched = ref(stranger)
    with pytest.raises(TypeError, match=r"^window: wanted a Window, an int or None, got Stranger"):
        inputs.run(window=stranger)
    del stranger
    gc.collect()
    assert watched() is None


def test_an_out_that_is_q_makes_another_call() -> None:
    q = torch.zeros(2, 1, 16)
    looks = [signature_of((q,), {"out": out}) for out in (torch.zeros_like(q), torch.ones_like(q), q, q.view(2, 1, 16))]
    assert looks[0] == looks[1] != looks[2] == looks[3]


def test_a_negated_view_makes_another_call() -> None:
    x = torch.zeros(2, 16)
    assert signature_of((x,), {}) != signature_of((torch._neg_view(x),), {})


def test_what_tables_look_like() -> None:
    """Forms of one shape are different calls."""
    entries, rows = torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    forms = [entries, entries.long(), PageTable(entries, rows=rows), PageTable(entries, unit="token")]
    forms += [PageTable(entries, rows=rows.long()), PageTable(entries.long(), rows=rows)]
    assert len({signature_of((form,), {}) for form in forms}) == len(forms)
    alike = PageTable(entries, rows=rows), PageTable(entries + 1, rows=rows + 1)
    assert len({signature_of((table,), {}) for table in alike}) == 1


def test_a_call_without_a_signature_is_checked_each_time() -> None:
    memory: Memory[int] = Memory()
    checked = []
    for _ in range(2):
        memory.recall(lambda x: checked.append(x) or 1, ([Stranger()],), {})
        memory.recall(lambda x: checked.append(x) or 1, (torch.zeros(2, 2).to_sparse(),), {})
        memory.recall(lambda x: checked.append(x) or 1, (3,), {})
    assert len(checked) == 5
