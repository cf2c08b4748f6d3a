"""The README's sentences of figures say what the rows say."""

from __future__ import annotations

from safeshard.bench.pages.in_short import sentences


def _row(shape: str, seconds: str, peak: str, cache: str) -> dict[str, str]:
    return {
        "what": "safemerge, 1 adapter", "shape": shape, "median_s": seconds, "peak_rss_bytes": peak, "bytes": "2e9",
        "cache": cache,
    }  # fmt: skip


def test_each_figure_is_of_its_row() -> None:
    pipeline = [
        _row("llama-1b x22 layers", "9", "9e9", "cold"),
        _row("llama-1b x22 layers", "1.5", "0.25e9", "warm"),
        _row("llama-1b x2 layers", "8", "8e9", "warm"),
        _row("llama-70b x80 layers, 2 real", "100", "3e9", "cold"),
        _row("llama-70b x10 layers, 2 real", "7", "2.5e9", "cold"),
    ]
    peers = [
        {"against": "", "time_ratio": "", "memory_ratio": ""},
        {"against": "mergekit 0.1", "time_ratio": "4", "memory_ratio": "0.1"},
        {"against": "PEFT 0.1", "time_ratio": "2", "memory_ratio": "0.9"},
    ]
    text = " ".join(sentences(pipeline, peers).split())
    assert "takes 1.5 s and 0.25 GB on a 1.1B shape" in text
    assert "100 s and 3.0 GB on a 70B shape (2 GB read and written, not cached)" in text
    assert "10 of its 80 layers take 2.5 GB" in text
    assert "1/4.0 of mergekit's time and 10 % of its memory" in text
    assert sentences(pipeline[:3], peers) == sentences(pipeline, peers[:1]) == "Not all of these were measured yet.\n"
