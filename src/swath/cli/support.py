"""The page docs/support.md: what the backends answer when they are asked to run one call after another.

    python -m swath.cli.support > docs/support.md

Each answer is a backend's own ``why_not``, asked through ``swath.explain``. Nothing runs, and tensors hold no data, so
CUDA is asked about without a GPU, and the page is the same wherever it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from swath.cache import PagedKV
from swath.cli.calls import arguments, case_of
from swath.cli.elsewhere import GPUS, INTERPRET, cuda_is, interpreting, without_data
from swath.dispatch import BACKENDS
from swath.ops.explain import OPS, explain
from swath.pages import PageTable
from swath.quant import KVQuant
from swath.target import Target, has_triton
from swath.testing import Case
from swath.testing.cases import NAMES
from swath.window import Window

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HOST_BACKENDS = ("reference", "cpu")
"""Asked about CPU tensors in the tables of options; the others about CUDA tensors."""
ARCH = "sm_90"
"""What CUDA stands for: a GPU that has every backend."""
PREFILL = 256
"""Query tokens of the calls that ``hopper`` is asked about: decode is not its own."""

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2

Change = Callable[[list[Any], dict[str, Any]], None]


@dataclass(frozen=True)
class Call:
    """A call of a public function: a case in numbers, and what ``change`` does to its arguments and keywords."""

    op: str
    case: Case = field(default_factory=case_of)
    change: Change | None = None

    def prefill(self) -> Call:
        """The same call for more query tokens than decode has."""
        return replace(self, case=replace(self.case, q_lens=(PREFILL,), kv_lens=(max(*self.case.kv_lens, PREFILL),)))

    def reasons(self, device: torch.device) -> dict[str, str | None]:
        """What each backend has against the call on tensors of ``device``, fastest first; None: it takes it."""
        with without_data():
            args, options = arguments(self.op, self.case, device)
            if self.change is not None:
                self.change(args, options)
            # Naming the reference keeps ``explain`` from planning a launch, which this page does not show.
            return explain(self.op, *args, impl="reference", **options).reasons


@dataclass(frozen=True)
class Row:
    """One option, and a call for each of the values it is asked with; ``verbatim``: of every backend the same call."""

    option: str
    calls: dict[str, Call]
    verbatim: bool = False


def page() -> str:
    """The whole page, Markdown.

    Raises:
        RuntimeError: Triton is not installed here, so its backend cannot be asked.
    """
    if not has_triton():
        raise RuntimeError("the page speaks for Triton too, and Triton is not installed")
    with interpreting(False), cuda_is(Target(ARCH, GPUS[ARCH][0])):
        notes = _Notes()
        parts = [INTRODUCTION, _devices(notes)]
        for op in OPS:
            parts.append(_options(op, notes))
        parts += [REFUSED, _refusals(), str(notes)]
    return "\n\n".join(filter(None, parts)) + "\n"


INTRODUCTION = """\
# Support

Made by `python -m swath.cli.support > docs/support.md`; a test compares the two.

Every answer is what a backend's `why_not` says to one call. **yes**: the backend takes it. **no** or **not**: it does
not, for the reason with that number at the end of the page. **-**: the operator has no such backend; `impl="auto"`
takes the next one. Below the first table `reference` and `cpu` are asked about CPU tensors, the others about CUDA
tensors, and `hopper` about prefill where the others are asked about decode. CUDA stands for an sm_90 GPU (H100, H200):
`hopper` runs there alone, `triton` answers the same everywhere.

An answer says neither how fast a call is nor, by itself, that the result is right. That is shown by the tests, which
hold every backend to the same float64 results."""

REFUSED = """\
## Refused before any backend is asked

These limits are the operators' own."""


class _Notes:
    """Reasons, numbered in the order in which they turn up."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, reason: str) -> str:
        return f"[{self._numbers.setdefault(reason, len(self._numbers) + 1)}]"

    def __str__(self) -> str:
        lines = [f"{number}. {reason}" for reason, number in self._numbers.items()]
        return "\n".join(["## Reasons", "", *lines]) if lines else ""


def _devices(notes: _Notes) -> str:
    """Which backend takes which tensors."""
    names = [name for name in reversed(BACKENDS) if any(name in Call(op).reasons(CPU) for op in OPS)]
    rows = []
    for op in OPS:
        for place, device, interpret in (
            ("CPU", CPU, False),
            (f"CPU, `{INTERPRET}=1`", CPU, True),
            ("CUDA", CUDA, False),
        ):
            with interpreting(interpret):
                reasons = Call(op).reasons(device)
            auto = next(name for name, reason in reasons.items() if reason is None)
            answers = [_cell({"": reasons[name]}, notes) if name in reasons else "-" for name in names]
            rows.append([f"`{op}`", place, f"`{auto}`", *answers])
    head = ["operator", "tensors", "`auto` takes", *(f"`{name}`" for name in names)]
    return "## Tensors\n\n" + _table(head, rows)


def _options(op: str, notes: _Notes) -> str:
    """The options of an operator, each backend asked about tensors that it is made for."""
    names = [name for name in reversed(BACKENDS) if name in Call(op).reasons(CPU)]
    rows = []
    for row in ROWS[op]():
        asked = {value: {name: _asked(call, name, row.verbatim) for name in names} for value, call in row.calls.items()}
        cells = [_cell({value: reasons[name] for value, reasons in asked.items()}, notes) for name in names]
        rows.append([row.option, ", ".join(row.calls), *cells])
    head = ["option", "asked with", *(f"`{name}`" for name in names)]
    return f"## `{op}`\n\n" + _table(head, rows)


def _asked(call: Call, backend: str, verbatim: bool) -> str | None:
    """The answer of a backend to a call of its own kind, or to this very one."""
    call = call.prefill() if backend == "hopper" and not verbatim else call
    return call.reasons(CPU if backend in HOST_BACKENDS else CUDA)[backend]


def _cell(answers: dict[str, str | None], notes: _Notes) -> str:
    refused = {value: notes.number(reason) for value, reason in answers.items() if reason is not None}
    if not refused:
        return "yes"
    if len(refused) == len(answers) and len(set(refused.values())) == 1:
        return f"no {next(iter(refused.values()))}"
    return "not " + ", ".join(f"{value} {number}" for value, number in refused.items())


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _refusals() -> str:
    rows = []
    for words, call in _limits().items():
        try:
            call.reasons(CPU)
        except (TypeError, ValueError) as error:
            rows.append([f"`{call.op}`", words, f"`{type(error).__name__}`: {error}"])
        else:
            raise RuntimeError(f"{call.op} takes {words}, which the page says it refuses")
    return _table(["operator", "call", "error"], rows)


def _scored(op: str) -> list[Row]:
    """Options that both attention operators have."""

    def asked(values: dict[str, Any], name: str, **others: Any) -> dict[str, Call]:
        return {words: Call(op, case_of(**{name: value}, **others)) for words, value in values.items()}

    group = {str(n): n for n in (1, 2, 3, 5, 7, 8, 64)}
    windows: dict[str, dict[str, Any]] = {
        "none (full causal)": {},
        "`Window(128)`": {"size": 128},
        "`Window(0)`": {"size": 0},
        "`Window(128, global_tokens=4)`": {"size": 128, "global_tokens": 4},
        "`Window(0, global_tokens=4)`": {"size": 0, "global_tokens": 4},
        "`Window(causal=False)`": {"causal": False},
        "`Window(128, causal=False)`": {"size": 128, "causal": False},
    }
    return [
        Row("head_dim", asked({str(n): n for n in (64, 80, 96, 128, 192, 256, 512)}, "head_dim")),
        Row("head_dim of K / of V", {f"{k} / {v}": _narrow(op, k, v) for k, v in ((192, 128), (256, 128))}),
        Row("query heads per kv head", asked(group, "group", num_kv_heads=1)),
        Row("`gqa`", {f'`"{x}"`': _with(op, gqa=x) for x in ("grouped", "interleaved")}),
        Row("`window`", {words: Call(op, case_of(**window)) for words, window in windows.items()}),
        Row("`global_tokens`, one count per sequence", {"[B]": Call(op, change=_leading_per_sequence)}),
        Row("`bounds`, a range for each row", {"[..., 2]": Call(op, change=_bounds)}),
        Row("`q_start`", {"[B]": Call(op, change=_q_start)}),
        Row("`scale`", {"0.5": _with(op, scale=0.5), "-1": _with(op, scale=-1.0)}),
        Row("`softcap`", asked({"30": 30.0}, "softcap")),
        Row("`sink`", asked({"fp32": "fp32"}, "sink") | {"bf16": Call(op, change=_sink_in_bf16)}),
        Row("`return_lse`", {"True": _with(op, return_lse=True)}),
        Row("`out`", {"with padded rows": Call(op, change=_padded_out)}),
    ]


def _attention_rows() -> list[Row]:
    dtypes = {NAMES[d]: Call("attention", case_of(q_len=64, dtype=d)) for d in (BF16, FP16, FP32)}
    return [Row("dtype of q, k and v", dtypes), *_scored("attention")]


def _paged_rows() -> list[Row]:
    op = "paged_attention"

    def over(*granularities: KVQuant, **others: Any) -> dict[str, Call]:
        return {_stored(quant): Call(op, case_of(quant=quant, **others)) for quant in granularities}

    forms = {"decode": 1, "n-step decode": 4, "chunked prefill (`cu_seqlens_q`)": 64}
    sizes, kept = (1, 8, 16, 48, 64, 544, 1024), ("tensor", "head", "channel", "token")
    fp8_queries = case_of(dtype=E4M3, quant=KVQuant(E4M3, "token"))
    return [
        Row("queries", {words: Call(op, case_of(q_len=n)) for words, n in forms.items()}, verbatim=True),
        Row("q and cache alike", {NAMES[d]: Call(op, case_of(dtype=d, quant=KVQuant(d))) for d in (BF16, FP16, FP32)}),
        Row("int8 cache, scale per", over(*(KVQuant(INT8, g) for g in kept))),
        Row("fp8 (e4m3) cache, scale per", over(*(KVQuant(E4M3, g) for g in ("none", *kept)))),
        Row("fp8 (e5m2) cache, scale per", over(*(KVQuant(E5M2, g) for g in ("none", *kept)))),
        Row("int8 cache, K and V scaled per", over(KVQuant(INT8, "channel", "token"), KVQuant(INT8, "token", "head"))),
        Row("int8 cache under q of", {NAMES[d]: Call(op, case_of(dtype=d, quant=KVQuant(INT8, "token")))
                                      for d in (BF16, FP16, FP32, E4M3)}),
        Row("fp8 (e4m3) cache under e4m3 q, scale per",
            over(*(KVQuant(E4M3, g) for g in ("none", *kept)), dtype=E4M3)),
        Row("`q_scale` of e4m3 queries", {"one for all": Call(op, fp8_queries, _q_scale),
                                          "one a row": Call(op, fp8_queries, _q_scale_per_row)}),
        Row('`compute="int8"`, scale per', over(*(KVQuant(INT8, g) for g in kept[:3]), compute="int8")),
        Row('`compute="fast"`, int8 cache, scale per', over(*(KVQuant(INT8, g) for g in kept), compute="fast")),
        Row("page_size", {str(n): Call(op, case_of(page_size=n)) for n in sizes}),
        Row("`block_table`", {"[B, max_pages]": Call(op), "(page_ids, page_indptr)": Call(op, change=_flat),
                              '`PageTable(rows=..., unit="token")`': Call(op, change=_request_table)}),
        Row("tables, lengths, positions", {"int32": Call(op), "int64": Call(op, change=_in_64_bits)}),
        Row("cache made by", {"`PagedKV`": Call(op), "`from_nhd`": Call(op, change=_nhd),
                              "`from_packed`": Call(op, change=_packed),
                              "V with other strides": Call(op, change=_apart)}),
        *_scored(op),
        Row("`split_size`", {str(n): _with(op, split_size=n) for n in (64, 256)}),
    ]  # fmt: skip


def _append_rows() -> list[Row]:
    op = "append_kv"
    stored = [KVQuant(d) for d in (BF16, FP16, FP32)]
    stored += [KVQuant(d, g) for d in (INT8, E4M3, E5M2) for g in ("tensor", "head", "channel", "token")]
    return [
        Row("dtype of k and v", {NAMES[d]: Call(op, case_of(dtype=d)) for d in (BF16, FP16, FP32)}),
        Row("cache", {_named(q): Call(op, case_of(quant=q)) for q in stored}),
        Row("page_size", {str(n): Call(op, case_of(page_size=n)) for n in (1, 8, 16, 48, 64, 544, 1024)}),
        Row("head_dim of K / of V", {f"{k} / {v}": _narrow(op, k, v) for k, v in ((192, 128), (512, 512))}),
    ]


def _quantise_rows() -> list[Row]:
    op, dtypes = "quantise_q", (BF16, FP16, FP32)
    static = Call(op, change=lambda args, _: args.append(args[0].new_empty((), dtype=FP32)))
    rows = Row("dtype of q", {NAMES[d]: Call(op, case_of(dtype=d)) for d in dtypes})
    return [rows, Row("scale", {"one a row": Call(op), "[]": static})]


def _merge_rows() -> list[Row]:
    dtypes = {NAMES[d]: Call("merge_states", case_of(dtype=d)) for d in (BF16, FP16, FP32)}
    stacked = Call("merge_states", change=_stacked)
    return [Row("dtype of the outs", dtypes), Row("N states at once", {"[N, tokens, Hq, D]": stacked})]


ROWS = {"attention": _attention_rows, "paged_attention": _paged_rows, "append_kv": _append_rows}
ROWS |= {"quantise_q": _quantise_rows, "merge_states": _merge_rows}


def _limits() -> dict[str, Call]:
    """Calls that no backend takes."""
    paged, int8 = "paged_attention", KVQuant(INT8, "token")
    return {
        "fp8 queries": Call("attention", case_of(q_len=64, dtype=E4M3)),
        "head_dim 100": Call(paged, case_of(head_dim=100)),
        "head_dim 520": Call(paged, case_of(head_dim=520)),
        "keys of 128, values of 60": _narrow(paged, 128, 60),
        "page_size 24": Call(paged, case_of(page_size=24)),
        "5 query heads, 2 kv heads": Call(paged, change=_five_heads),
        "fp16 queries, bf16 cache": Call(paged, case_of(dtype=FP16)),
        "fp8 queries, bf16 cache": Call(paged, case_of(dtype=E4M3)),
        "`q_scale` with bf16 queries": Call(paged, change=_q_scale),
        '`compute="int8"`, token scales': Call(paged, case_of(quant=int8, compute="int8")),
        '`compute="int8"`, fp8 cache': Call(paged, case_of(quant=KVQuant(E4M3, "head"), compute="int8")),
        "`split_size=100`": _with(paged, split_size=100),
        "q that requires grad": Call(paged, change=_needs_grad),
    }


def _stored(quant: KVQuant) -> str:
    return quant.k if quant.k == quant.v_granularity else f"{quant.k} (K) and {quant.v_granularity} (V)"


def _named(quant: KVQuant) -> str:
    return f"{NAMES[quant.dtype]} {_stored(quant)}".removesuffix(" none")


def _narrow(op: str, head_dim: int, v_head_dim: int) -> Call:
    return Call(op, case_of(head_dim=head_dim, v_head_dim=v_head_dim))


def _with(op: str, **keywords: Any) -> Call:
    return Call(op, change=lambda _, options: options.update(keywords))


def _five_heads(args: list[Any], _: dict[str, Any]) -> None:
    args[0] = args[0].new_empty(*args[0].shape[:-2], 5, args[0].shape[-1])


def _leading_per_sequence(args: list[Any], options: dict[str, Any]) -> None:
    counts = torch.empty(1, dtype=torch.int32, device=args[0].device)
    options["window"] = Window(128, global_tokens=counts, max_global_tokens=4)


def _stacked(args: list[Any], options: dict[str, Any]) -> None:
    args[:] = [x.new_empty(3, *x.shape) for x in args[:2]]
    options["lse_base"] = "2"


def _bounds(args: list[Any], options: dict[str, Any]) -> None:
    options["window"] = Window(bounds=args[0].new_empty(*args[0].shape[:-2], 2, dtype=torch.int32))


def _q_start(args: list[Any], options: dict[str, Any]) -> None:
    options["q_start"] = torch.empty(1, dtype=torch.int32, device=args[0].device)


def _sink_in_bf16(args: list[Any], options: dict[str, Any]) -> None:
    options["sink"] = torch.empty(args[0].shape[-2], dtype=BF16, device=args[0].device)


def _padded_out(args: list[Any], options: dict[str, Any]) -> None:
    *leading, head_dim = args[0].shape
    options["out"] = args[0].new_empty(*leading, 2 * head_dim).narrow(-1, 0, head_dim)


def _q_scale(args: list[Any], options: dict[str, Any]) -> None:
    options["q_scale"] = torch.empty((), device=args[0].device)


def _q_scale_per_row(args: list[Any], options: dict[str, Any]) -> None:
    options["q_scale"] = torch.empty(args[0].shape[:-1], device=args[0].device)


def _flat(args: list[Any], _: dict[str, Any]) -> None:
    args[2] = args[2].flatten(), torch.empty(2, dtype=torch.int32, device=args[0].device)


def _nhd(args: list[Any], _: dict[str, Any]) -> None:
    num_pages, num_kv_heads, page_size, head_dim = args[1].k.shape
    args[1] = PagedKV.from_nhd(*(args[1].k.new_empty(num_pages, page_size, num_kv_heads, head_dim) for _ in "kv"))


def _packed(args: list[Any], _: dict[str, Any]) -> None:
    num_pages, num_kv_heads, page_size, head_dim = args[1].k.shape
    args[1] = PagedKV.from_packed(args[1].k.new_empty(num_pages, page_size, num_kv_heads, 2 * head_dim))


def _apart(args: list[Any], _: dict[str, Any]) -> None:
    k, v = args[1].k, args[1].v
    args[1] = PagedKV(k, v.new_empty(v.transpose(1, 2).shape).transpose(1, 2))


def _request_table(args: list[Any], _: dict[str, Any]) -> None:
    tokens = args[2].new_empty(8, args[2].shape[1] * args[1].page_size)
    args[2] = PageTable(tokens, rows=args[2].new_empty(1), unit="token")


def _in_64_bits(args: list[Any], options: dict[str, Any]) -> None:
    _q_start(args, options)
    args[2], args[3], options["q_start"] = args[2].long(), args[3].long(), options["q_start"].long()


def _needs_grad(args: list[Any], _: dict[str, Any]) -> None:
    args[0].requires_grad_()


if __name__ == "__main__":
    print(page(), end="")
