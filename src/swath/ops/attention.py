"""``attention``: dense, variable-length prefill."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, get_type_hints, overload

import torch
from torch import Tensor

from swath import checks
from swath.cache import DenseKeys
from swath.errors import bad_type, bad_value
from swath.ops import arguments
from swath.ops.operator import Operands, Operator, Options, Stages, spelled_out
from swath.ops.signature import coarse
from swath.ops.torch_ops import TorchOp
from swath.problem import Accepted, Outputs, Problem, make_outputs
from swath.window import Window

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttentionOptions(TypedDict, total=False):
    """The options that both attention operators have; ``attention`` says what they mean."""

    max_q_len: int | None
    max_kv_len: int | None
    window: Window | int | None
    scale: float | None
    softcap: float
    sink: Tensor | None
    gqa: str
    q_start: Tensor | None
    out: Tensor | None


def defaults_of(options: type) -> dict[str, Any]:
    """What options are where they are left out: as Problem has it, or None."""
    known = {f.name: f.default for f in fields(Problem) if f.default is not MISSING}
    return {name: known.get(name) for name in get_type_hints(options)} | {"window": None, "return_lse": False}


DEFAULTS = defaults_of(AttentionOptions)


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    return_lse: Literal[False] = False, impl: str = "auto", **options: Unpack[AttentionOptions],
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    return_lse: Literal[True], impl: str = "auto", **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    return_lse: bool, impl: str = "auto", **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@spelled_out(AttentionOptions, DEFAULTS)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: bool = False,
    impl: str = "auto",
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences laid end to end, each row over the keys its window shows.

    Args:
        q: [Tq, Hq, D], bf16, fp16 or fp32; any strides with the last one 1.
        k: [Tk, Hkv, D], v: [Tk, Hkv, Dv] with Dv <= D, in q's dtype; any strides with the last one 1.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [B + 1]; sequence b owns rows ``cu[b] .. cu[b + 1] - 1``.
        max_q_len, max_kv_len: host bounds of the lengths, for the launch only; None: Tq and Tk.
        window: which keys a query sees (see ``Window``); an int n is ``Window(n)``, None is full causal attention.
        scale: multiplies q . k; None is ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(s / softcap)``; 0 or inf is none.
        sink: [Hq] logits, bf16, fp16 or fp32, that join the softmax's denominator and nothing else (gpt-oss).
        gqa: "grouped" (kv head = q head // group) or "interleaved" (kv head = q head % Hkv).
        q_start: int32 or int64 [B], position of each sequence's first query; None: the queries are the last keys.
        out: [Tq, Hq, Dv] to write into; rows past ``cu_seqlens_q[-1]`` stay untouched. It may be q itself, and shares
            no memory with other arguments.
        return_lse: also return the log of the softmax denominator: natural log, fp32 [Tq, Hq].
        impl: "auto" or the backend to use.

    Returns:
        out [Tq, Hq, Dv], or (out, lse). A row that sees no key is 0 and its LSE -inf (the sink logit with sinks).

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    made: Tensor | tuple[Tensor, Tensor] = ATTENTION(
        (q, k, v, cu_seqlens_q, cu_seqlens_k), {"return_lse": return_lse, **options}, impl
    )
    return made


def _outputs(accepted: Accepted, operands: Operands, options: Options) -> Outputs:
    return make_outputs(operands[0], accepted.v_head_dim, options)


def _case(accepted: Accepted, operands: Operands, options: Options, outputs: Outputs) -> Problem:
    q, k, v, cu_seqlens_q, cu_seqlens_k = operands
    return accepted.problem(q, DenseKeys(k, v, cu_seqlens_k), {**options, "cu_seqlens_q": cu_seqlens_q}, outputs)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Problem:  # fmt: skip
    """Check the arguments of ``attention`` (see there) and make its outputs."""
    return STAGES.prepare((q, k, v, cu_seqlens_q, cu_seqlens_k), options)


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Accepted:  # fmt: skip
    """Every check of a call whose signature was not met before."""
    arguments.check_names(options, DEFAULTS, "attention")
    options = DEFAULTS | options
    checks.check_tensor("q", q, 3)
    if q.dtype not in arguments.Q_DTYPES:
        raise bad_type("q", "bfloat16, float16 or float32", q.dtype)
    checks.check_rows("q", q)
    for name, x in (("k", k), ("v", v)):
        checks.check_tensor(name, x, 3, q.device)
        if x.dtype != q.dtype:
            raise bad_type(name, f"q's dtype {q.dtype}", x.dtype)
        checks.check_rows(name, x)
    checks.check_values(v, k)
    arguments.check_heads(q, k.shape[1], k.shape[2], v.shape[2])
    checks.check_ints("cu_seqlens_q", cu_seqlens_q, None, q.device)
    if cu_seqlens_q.shape[0] < 1:
        raise bad_value("cu_seqlens_q", "shape [B + 1]", tuple(cu_seqlens_q.shape))
    num_seqs = cu_seqlens_q.shape[0] - 1
    checks.check_ints("cu_seqlens_k", cu_seqlens_k, num_seqs + 1, q.device)
    values = arguments.check_options(q, v.shape[2], num_seqs, options)
    checks.check_no_grad(q=q, k=k, v=v, sink=options["sink"], out=options["out"])
    values["max_q_len"] = checks.check_bound("max_q_len", options["max_q_len"], q.shape[0])
    values["max_kv_len"] = checks.check_bound("max_kv_len", coarse(options["max_kv_len"]), k.shape[0])
    return Accepted(values, v.shape[2])


class AttentionOperator(Operator[Problem]):
    """An operator that makes an output, or fills ``out``, and an LSE if asked for.

    A schema's results are fixed: an LSE that was not asked for is an empty tensor there, and an overload that fills
    ``out`` returns the LSE alone.
    """

    def __init__(
        self, name: str, prepare: Any, stages: Stages[Problem], operands: dict[str, Any], options: type
    ) -> None:  # fmt: skip
        arguments = {**operands, **get_type_hints(options), "return_lse": bool}
        returns = "(Tensor out, Tensor lse)"
        defaults = defaults_of(options)
        super().__init__(name, "attention", prepare, _out_and_lse, arguments, defaults, returns, stages=stages)

        def run(**named: Any) -> Tensor:
            return cast(Tensor, self._run(**named)[1])

        def fake(**named: Any) -> Tensor:
            return cast(Tensor, self._fake(**named)[1])

        self.into_out = TorchOp(f"{name}.out", {**self.arguments, "out": Tensor}, "Tensor", run, fake, ("out",))

    def dispatched(self, named: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
        """What the public function returns, through the dispatcher: by the overload for ``out`` if that is given."""
        if named["out"] is None:
            out, lse = self.torch_op(**named)
        else:
            out, lse = named["out"], self.into_out(**named)
        return (out, lse) if named["return_lse"] else out


def _out_and_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    lse = problem.lse
    return problem.out, problem.out.new_empty(0, dtype=torch.float32) if lse is None else lse


OPERANDS = {"q": Tensor, "k": Tensor, "v": Tensor, "cu_seqlens_q": Tensor, "cu_seqlens_k": Tensor}
STAGES = Stages(_check, _outputs, _case)
ATTENTION = AttentionOperator("attention", prepare, STAGES, OPERANDS, AttentionOptions)
