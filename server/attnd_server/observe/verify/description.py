"""A sample as the fields of a line of the log."""

from __future__ import annotations

from attnd_server.observe.verify.check import Verdict
from attnd_server.observe.verify.sample import Sample


def described(sample: Sample, verdict: Verdict) -> dict[str, object]:
    """All that it takes to run a call like it, without a number of anybody's tensors."""
    step, config, options, choice = sample.step, sample.config, sample.options, sample.choice
    requests = [rows.request for rows in choice.rows]
    masks = ("valid_lens", "block_sizes", "prefix_lens", "padded_prefix_lens", "hole_starts", "hole_ends")
    return {
        "backend": sample.backend.value,
        "layer": sample.layer,
        "error_ratio": f"{verdict.ratio:.4g}",  # JSON has no infinity
        "largest_error": f"{verdict.error:.4g}",
        "num_not_finite": verdict.num_not_finite,
        "worst_request_row_head": verdict.worst,
        "seed": sample.seed,
        "is_decode": step.is_decode,
        "cache_only": step.cache_only,
        "store_first": step.store_first,
        "num_reqs": step.num_reqs,
        "num_tokens": step.num_tokens,
        "requests": requests,
        "query_lens": [step.query_lens[request] for request in requests],
        "context_lens": step.context_lens[requests].tolist(),
        **{name: getattr(step, name)[requests].tolist() for name in masks},
        "verified_rows": [[rows.first_row, rows.num_rows] for rows in choice.rows],
        "verified_kv_heads": [choice.first_kv_head, choice.num_kv_heads],
        "heads_per_kv_head": options.num_heads // config.num_kv_heads,
        "head_dims": [config.head_dim, config.head_dim_v],
        "page_size": config.page_size,
        "dtype": str(config.dtype),
        "kv_dtype": str(config.kv_dtype),
        "v_dtype": str(config.v_dtype),
        "latent": config.latent,
        "layout": config.layout.value,
        "precision": config.precision.value,
        "kv_split": str(config.kv_split),
        "scale": options.scale,
        "softcap": options.softcap,
        "window": options.window,
        "alibi": options.alibi_slopes is not None,
        "sinks": options.sinks is not None,
        "return_lse": options.return_lse,
    }
