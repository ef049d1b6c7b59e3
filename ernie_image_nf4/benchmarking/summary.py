"""Headline figures of runs on an H100."""

from __future__ import annotations

from typing import Any

from .arms import REFERENCE


def summary(result: dict[str, Any]) -> dict[str, float]:
    """Headline figures by their keys in ``benchmarks/summary.json``; those of arms that failed are left out."""
    arms = {arm["name"]: arm for arm in result["arms"] if "error" not in arm}
    demo, resident = arms.get(REFERENCE, {}), arms.get("resident", {})
    offload, stream = arms.get("offload", {}), arms.get("stream", {})
    int8, fp8 = (arms.get(f"resident, {products}", {}) for products in ("int8", "fp8"))
    float16 = arms.get("resident, float16", {})
    int8_product: dict[str, float] = next(iter(result.get("growth", {}).get("int8_products", [])), {})
    turbo, plain_turbo = arms.get("turbo", {}), arms.get("turbo, no enhancer", {})
    figures = {
        "time_vs_demo.resident": _ratio(resident, demo, "seconds"),
        "pe_ms_per_token": resident.get("prompt_enhancer_ms_per_token"),
        "pe_ms_per_token.four_texts": resident.get("prompt_enhancer_together", {}).get("ms_per_token"),
        "pe_first_call_s": resident.get("prompt_enhancer_first_overhead_s"),
        "first_picture_extra_s": _difference(resident, "first_s", "seconds"),
        "step_ms.eager_512": resident.get("step_ms"),
        "step_ms.eager_1024": resident.get("large", {}).get("step_ms"),
        "peak_gib.resident_512": _peak(resident),
        "peak_gib.offload_512": _peak(offload),
        "peak_gib.stream_512": _peak(stream),
        "peak_gib.offload_1024": offload.get("large", {}).get("peak_reserved_gib"),
        "peak_gib.stream_1024": stream.get("large", {}).get("peak_reserved_gib"),
        "time_vs_resident.offload": _ratio(offload, resident, "seconds"),
        "time_vs_resident.stream": _ratio(stream, resident, "seconds"),
        "load_time_vs_demo": _ratio(resident, demo, "load_s"),
        "step_ms.int8_512": int8.get("step_ms"),
        "step_ms.int8_1024": int8.get("large", {}).get("step_ms"),
        "int8_product_vs_bf16": int8_product.get("speedup"),
        "prediction_error.resident_int8": int8.get("prediction_error"),
        "time_vs_demo.resident_fp8": _ratio(fp8, demo, "seconds"),
        "step_ms.fp8_512": fp8.get("step_ms"),
        "step_ms.fp8_1024": fp8.get("large", {}).get("step_ms"),
        "step_vs_demo.fp8_1024": _ratio(fp8.get("large", {}), demo.get("large", {}), "step_ms"),
        "step_vs_bfloat16.float16_512": _ratio(float16, resident, "step_ms"),
        "turbo_s.enhanced_512": turbo.get("seconds"),
        "turbo_s.plain_512": plain_turbo.get("seconds"),
        "turbo_s.enhanced_1024": turbo.get("large", {}).get("seconds"),
        "turbo_s.plain_1024": plain_turbo.get("large", {}).get("seconds"),
        "prediction_error.resident_fp8": fp8.get("prediction_error"),
    }
    return {f"h100.{key}": float(f"{value:.4g}") for key, value in figures.items() if value is not None}


def cards_summary(result: dict[str, Any]) -> dict[str, float]:
    """Headline figures of ``benchmarks/cards.json``: seconds of a 1024x1024 picture, from the start of the command to
    its end, by the GiB that were free.
    """
    return {
        f"cards.seconds_1024.free_{str(row['free_gib']).replace('.', '_')}": float(f"{row['seconds']:.4g}")
        for row in result["cards"]
        if row["enhancer"] and "error" not in row
    }


def _ratio(one: dict[str, float], other: dict[str, float], key: str) -> float | None:
    return one[key] / other[key] if key in one and key in other else None


def _difference(arm: dict[str, float], one: str, other: str) -> float | None:
    return arm[one] - arm[other] if one in arm and other in arm else None


def _peak(arm: dict[str, float]) -> float | None:
    """Peak reserved GiB, loading included."""
    return max((arm[key] for key in ("loading_peak_reserved_gib", "peak_reserved_gib") if key in arm), default=None)
