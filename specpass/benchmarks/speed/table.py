"""What a speed file says: the ratios that are aimed at, and tables."""

from __future__ import annotations

from typing import Any

from specpass.benchmarks.quality.summary import table

BUDGET, PROMPT_BUDGET, EQUAL = 256, 1024, 1024  # EQUAL: slots at which a pruned cache is as large as the static one


def aims(records: dict[tuple[Any, ...], dict[str, Any]], equal_kv: dict[str, Any]) -> dict[str, float | None]:
    """Ratios that the project aims at, of measurements in this file; None where one is missing.

    Args: equal_kv: batch -> steps of the pruned and the static cache, measured by turns.
    """

    def ratio(field: str, over: tuple[Any, ...], under: tuple[Any, ...]) -> float | None:
        values = [records.get(key, {}).get(field) for key in (over, under)]
        return None if None in values or not values[1] else round(values[0] / values[1], 3)

    return {
        "ttft specpc 1024 over full_eager, S 8192 (at most 0.5)": ratio(
            "ttft_s", ("specpass_specpc", PROMPT_BUDGET, 8192, 1), ("full_eager", None, 8192, 1)
        ),
        "decode rate speckv 256 over static, S 16384, batch 4 (at least 1.35)": ratio(
            "decode_tokens_per_s", ("specpass_speckv", BUDGET, 16384, 4), ("full_static_compiled", None, 16384, 4)
        ),
        "decode floor, static over speckv 256, S 16384, batch 4 (the bound)": ratio(
            "decode_floor_ms", ("full_static_compiled", None, 16384, 4), ("specpass_speckv", BUDGET, 16384, 4)
        ),
        **{
            f"decode rate at equal KV over static by turns, {EQUAL} slots, batch {batch} (at least 1)": round(
                found["other_decode_ms"] / found["decode_ms"], 3
            )
            for batch, found in equal_kv.items()
        },
    }


def markdown(document: dict[str, Any]) -> str:
    """Tables of a speed file: measurements with floors, aims, profiles."""
    rows = [
        [
            "method",
            "budget",
            "S",
            "batch",
            "ttft s (floor)",
            "ms a step (floor)",
            "tokens/s",
            "KV MiB",
            "peak MiB",
            "compile cold / warm s",
        ]
    ]
    for r in sorted(document["results"], key=lambda r: (r["batch"], r["length"])):
        ttft = "-" if r["ttft_s"] is None else f"{r['ttft_s']:.2f} ({shown(r['ttft_floor_s'])})"
        cold = "-" if r["compile_cold_s"] is None else f"{r['compile_cold_s']:.0f} / {r['compile_warm_s']:.0f}"
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.0f}"
        rows.append(
            [
                r["method"],
                str(r["budget"] or "-"),
                str(r["length"]),
                str(r["batch"]),
                ttft,
                f"{r['decode_ms']:.1f} ({r['decode_floor_ms']:.1f})",
                f"{r['decode_tokens_per_s']:.2f}",
                f"{r['kv_bytes'] / 2**20:.1f}",
                peak,
                cold,
            ]
        )
    parts = [table(rows)]
    known = {name: value for name, value in document.get("aims", {}).items() if value is not None}
    if known:
        parts.append(table([["aim", "ratio"], *([name, f"{value:.2f}"] for name, value in known.items())]))
    lines = [
        [method, phase, str(found["length"]), *(f"{value:.2f}" for value in found[phase].values())]
        for method, found in document.get("profiles", {}).items()
        for phase in ("prefill", "decode")
    ]
    if lines:
        names = next(iter(document["profiles"].values()))["prefill"]
        parts.append(table([["method", "phase", "S", *(f"{name}" for name in names)], *lines]))
    return "\n".join(parts)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
