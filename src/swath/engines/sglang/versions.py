"""What differs between the releases of SGLang that swath supports (0.5.15 to 0.5.23), in one place."""

from __future__ import annotations

from typing import Any, NamedTuple


class Settings(NamedTuple):
    """What the server was started with.

    deterministic: results that no batch changes. algorithm, topk, drafts: of speculation, the children of a draft
    token, and the tokens that are verified at once; None without drafts.
    """

    deterministic: bool
    algorithm: str | None
    topk: int | None
    drafts: int | None


def choices() -> list[list[str]]:
    """The lists of names that the command line takes for attention backends."""
    try:
        from sglang.srt.arg_groups import choices as home
    except ImportError:  # before 0.5.16
        from sglang.srt import server_args as home
    return [
        home.ATTENTION_BACKEND_CHOICES,
        home.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
        home.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
    ]


def settings(runner: Any) -> Settings:
    """The settings of a ``ModelRunner``'s server."""
    try:
        from sglang.srt.runtime_context import get_exec, get_spec
    except ImportError:
        spec, deterministic = runner.server_args, runner.server_args.enable_deterministic_inference
    else:
        spec, deterministic = get_spec(), get_exec().deterministic.enable_deterministic_inference
    names = ("speculative_algorithm", "speculative_eagle_topk", "speculative_num_draft_tokens")
    return Settings(deterministic, *(getattr(spec, name) for name in names))


def mistaken_type(runner: Any) -> Any:
    """The type that layers of a ``ModelRunner``'s model have though they are causal, or None.

    0.5.15 calls every layer of Gemma 3 bidirectional. It reads that in its Triton backend alone, and there only without
    graphs and chunks; newer releases say so where the model's configuration does.
    """
    from sglang.srt.layers.radix_attention import AttentionType

    config = runner.model_config.hf_text_config
    is_causal = config.model_type == "gemma3_text" and not getattr(config, "use_bidirectional_attention", False)
    return AttentionType.DECODER_BIDIRECTIONAL if is_causal else None


def read_to_the_end() -> Any:
    """What ``shared_read_ends`` answers: SGLang's table of requests is read until the forward pass is over.

    0.5.15 does not ask. There the scheduler may change the table while a captured graph runs, but only where no result
    comes of it: rows of finished requests, tokens to come, and pages that hold the same keys as those before.
    """
    from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

    return SharedReadEnds.POST_REPLAY
