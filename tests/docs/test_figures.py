"""Figures in sentences of README and docs/ are those of the runs they came from; test_summary.py has the tables."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
from doc_pages import read

from benchmarks import summary


def run(name: str) -> dict[str, Any]:
    return json.loads(read(f"benchmarks/{name}.json"))


BENCHMARK = run("benchmark_h100")
ARMS = {arm["name"]: arm for arm in BENCHMARK["arms"]}
DEMO, RESIDENT, COLD = ARMS["demo"], ARMS["resident"], ARMS["resident, first start"]
OFFLOAD, STREAM, FP8 = ARMS["offload"], ARMS["stream"], ARMS["resident, fp8"]
BATCH = {mode: run(f"batch_h100_{mode}")[mode] for mode in ("resident", "offload")}
MINI, PRODUCTS = run("nf4_mini")["results"], run("products_mini")["results"]
SERVE = run("serve_cpu")
QUANTIZE, CPU = run("quantize_h100"), run("quantize_cpu")
PSNR = {name: MINI[name]["psnr"] for name in summary.VARIANTS}


def later(arm: dict[str, Any]) -> list[float]:
    """Seconds of the pictures after the first."""
    return [picture["seconds"] for picture in arm["pictures"][1:]]


def first_overhead(arm: dict[str, Any]) -> float:
    """Seconds that the first picture took beyond those after it."""
    return arm["pictures"][0]["seconds"] - statistics.median(later(arm))


def enhancer_overhead(arm: dict[str, Any]) -> float:
    return arm["prompt_enhancer_first_overhead_s"]


# Page, sentence with places for figures, and the figures.
SENTENCES: list[tuple[str, str, tuple[Any, ...]]] = [
    (
        "docs/serving.md",
        "{} clients sent {} requests of mixed sizes, of which {} were bad and {} gave up before the answer",
        (SERVE["clients"], sum(SERVE["requests"].values()), SERVE["requests"]["bad"], SERVE["requests"]["leaves"]),
    ),
    (
        "docs/serving.md",
        "All {} good ones were answered, each of their {} pictures as drawn alone to the byte",
        (SERVE["outcomes"]["answered"], SERVE["pictures"]),
    ),
    ("docs/serving.md", "the server grew by {:.1f} MiB", (SERVE["server_growth_mib"],)),
    ("docs/serving.md", "all along grew by {:.0f} MiB", tuple(SERVE["worker_growth_mib"])),
    (
        "README.md",
        "draws with them in {:.1f}, {:.1f} or {:.1f} GiB of GPU memory",
        tuple(arm["peak_reserved_gib"] for arm in (RESIDENT, OFFLOAD, STREAM)),
    ),
    ("README.md", "over {} captions", (run("nf4_mini")["captions"],)),
    (
        "docs/speed.md",
        "a picture takes {:.2f} of the plain calls' time, most of it saved in the prompt enhancer, "
        "a denoising step {:.2f}, loading {:.2f}",
        tuple(RESIDENT[key] / DEMO[key] for key in ("seconds", "step_ms", "load_s")),
    ),
    (
        "docs/speed.md",
        "A step takes {:.2f} of the plain calls' time",
        (RESIDENT["large"]["step_ms"] / DEMO["large"]["step_ms"],),
    ),
    ("docs/speed.md", "({:.0f} TFLOP/s)", (BENCHMARK["growth"]["tflop_per_s"],)),
    (
        "docs/speed.md",
        "takes {:.0f} ms instead of {:.0f}, a picture {:.2f} of the plain calls' time",
        (FP8["step_ms"], RESIDENT["step_ms"], FP8["seconds"] / DEMO["seconds"]),
    ),
    (
        "docs/speed.md",
        "relative difference to float32 | {:.1%} | {:.1%} | {:.1%} | [the mini]",
        tuple(PRODUCTS[name]["prediction_error"] for name in ("int8", "fp8", "bfloat16")),
    ),
    (
        "docs/speed.md",
        "| {:.1f} dB | {:.1f} dB | {:.1f} dB | [the mini]",
        tuple(PRODUCTS[name]["psnr"] for name in ("int8", "fp8", "bfloat16")),
    ),
    (
        "docs/speed.md",
        "relative difference to float32 | – | {:.1%} | {:.1%} | [full size, random weights]",
        (FP8["prediction_error_to_float32"], RESIDENT["prediction_error_to_float32"]),
    ),
    ("docs/speed.md", "calibrated NF4 weights are {:.1f} dB from their original", (PSNR["calibrated"],)),
    ("docs/speed.md", "in float32, over {} captions ([run]", (run("skipping_mini")["captions"],)),
    (
        "docs/speed.md",
        "takes {:.1f} s more than later ones, {:.1f} s of that in the prompt enhancer",
        (first_overhead(RESIDENT), enhancer_overhead(RESIDENT)),
    ),
    (
        "docs/speed.md",
        "it takes {:.1f} s more ({:.1f} s in the enhancer); with fp8, in its first run, {:.1f} s more",
        (first_overhead(COLD), enhancer_overhead(COLD), first_overhead(FP8)),
    ),
    (
        "docs/speed.md",
        "own pictures took {:.0f} to {:.0f} s, as they wait for Python; their first one {:.0f} s",
        (min(later(DEMO)), max(later(DEMO)), DEMO["first_s"]),
    ),
    (
        "docs/speed.md",
        "took {:.1f} to {:.1f} s in five loads, the plain calls {:.1f} to {:.1f} s",
        tuple(choose(arm["all_load_s"]) for arm in (RESIDENT, DEMO) for choose in (min, max)),
    ),
    (
        "docs/memory-modes.md",
        "at 512x512 with the prompt enhancer: {:.2f} GiB in `resident`, {:.2f} in `offload`, {:.2f} in `stream`",
        tuple(arm["peak_reserved_gib"] for arm in (RESIDENT, OFFLOAD, STREAM)),
    ),
    (
        "docs/memory-modes.md",
        "at 1024x1024 without it: {:.2f} GiB in `resident`, {:.2f} in `offload`, {:.2f} in `stream`",
        tuple(arm["large"]["peak_reserved_gib"] for arm in (RESIDENT, OFFLOAD, STREAM)),
    ),
    (
        "docs/memory-modes.md",
        "took {:.2f} times as long as in `resident`, in `stream` {:.2f} times",
        tuple(arm["seconds"] / RESIDENT["seconds"] for arm in (OFFLOAD, STREAM)),
    ),
    (
        "docs/memory-modes.md",
        "reserved {:.2f} GiB in [`offload`]",
        (BATCH["offload"]["batch"]["peak_reserved_gib"],),
    ),
    ("docs/memory-modes.md", "and {:.2f} GiB in [`resident`]", (BATCH["resident"]["batch"]["peak_reserved_gib"],)),
    *(
        (
            "docs/many-prompts.md",
            f"| `{mode}` | {{:.2f}} | {{:.2f}} | {{:.2f}} |",
            (
                BATCH[mode]["single"]["seconds_a_picture"],
                BATCH[mode]["batch"]["seconds_a_picture"],
                BATCH[mode]["batch"]["peak_reserved_gib"],
            ),
        )
        for mode in ("resident", "offload")
    ),
    (
        "docs/fidelity.md",
        "are small steps, {:.1f} and {:.1f} dB",
        (round(PSNR["scale_search"], 2) - round(PSNR["stock"], 2), PSNR["default"] - PSNR["scale_search"]),
    ),
    ("docs/fidelity.md", "It gives {:.0f} dB over stock NF4", (PSNR["calibrated"] - PSNR["stock"],)),
    (
        "docs/fidelity.md",
        "at {:.0%} more bytes",
        (MINI["calibrated"]["bits_per_weight"]["transformer"] / MINI["stock"]["bits_per_weight"]["transformer"] - 1,),
    ),
    (
        "docs/quantizing.md",
        "leaves [{:.2f} times](../benchmarks/quantize_cpu.json) stock NF4's squared error, "
        "and takes {:.0f} times as long",
        (CPU["scale_search_vs_stock"]["squared_error"]["transformer"], CPU["scale_search_vs_stock"]["time"]),
    ),
    ("docs/quantizing.md", "the mini was calibrated with {}", (run("nf4_mini")["calibration_prompts"],)),
    ("docs/quantizing.md", "would take about [{} s]", (CPU["projected_full_size_s"],)),
    *(
        (
            "docs/quantizing.md",
            f"| {what} | {{:.1f}} | {{:.2f}} | {{:.2f}} |",
            tuple(QUANTIZE[key][part] for part in ("seconds", "host_gib", "gpu_device_gib")),
        )
        for what, key in (
            ("`quantize`", "scale_search"),
            ("`quantize --no-scale-search --no-default-keep`", "quantize"),
            ("the same by `from_pretrained` and `save_pretrained`", "conventional"),
        )
    ),
    (
        "docs/figures-by-others.md",
        "differ from the release's by [{} bytes at most]",
        (max(abs(size["minus_published"]) for size in QUANTIZE["bytes"]["nf4"].values()),),
    ),
]


@pytest.mark.parametrize(
    ("page", "sentence", "figures"), SENTENCES, ids=[f"{each[0]}: {each[1]}" for each in SENTENCES]
)
def test_sentences_have_the_figures_of_their_runs(page: str, sentence: str, figures: tuple[Any, ...]) -> None:
    assert sentence.format(*figures) in " ".join(read(page).split())


def test_exact_predictions_are_those_of_the_plain_calls_and_others_near() -> None:
    """As README and docs/speed.md say. In runs from before ``fast="exact"`` every arm was exact."""
    arms = [RESIDENT, COLD, OFFLOAD, STREAM]
    exact = [ARMS["resident, exact"]] if "resident, exact" in ARMS else arms
    assert [arm["prediction_error"] for arm in exact] == [0.0] * len(exact)
    assert all(arm["prediction_error"] <= 0.005 for arm in arms)


def test_batches_give_the_pictures_of_single_mode() -> None:
    """As docs/many-prompts.md says."""
    assert all(row["largest"] == 0 for mode in BATCH.values() for row in mode["rounding"])


def test_bfloat16_is_within_0_2_db_of_float32() -> None:
    """As docs/fidelity.md says, of the formats that its table has."""
    rounded = run("nf4_mini_bfloat16")["results"]
    assert all(abs(rounded[name]["psnr"] - result["psnr"]) <= 0.2 for name, result in MINI.items() if "psnr" in result)


def test_what_single_kinds_of_layers_and_the_kept_ones_buy() -> None:
    """As docs/fidelity.md says."""
    rows = [row for row in run("nf4_sensitivity")["results"] if row["quantized"] == "transformer" and "gain_db" in row]
    small = {row["kept"]: row["gain_db"] for row in rows if row["share_of_full_transformer"] < 0.03}
    kept = small.pop("the default")
    assert round(kept, 1) == 1.2
    assert kept == max(kept, *small.values())
    assert max(gain for name, gain in small.items() if "," not in name) <= 0.6


def test_backgrounds_change_with_a_cache_of_three_only() -> None:
    """As docs/speed.md says of 200 pictures."""
    skipping = run("skipping_mini")
    wrong = [round(200 * (1 - skipping["results"][f"cache={n}"]["background_accuracy"])) for n in (2, 3)]
    assert (skipping["captions"], wrong) == (200, [0, 1])


def test_both_ways_to_quantize_gave_the_same_files() -> None:
    """As docs/quantizing.md says."""
    assert all(component["files_identical"] for component in QUANTIZE["same_weights"].values())


def test_the_published_sizes_are_those_that_were_compared_with() -> None:
    """As docs/figures-by-others.md says."""
    rows = [
        line for line in read("docs/figures-by-others.md").splitlines() if line.startswith(("| tr", "| te", "| pe |"))
    ]
    for kind, column in (("original", 2), ("nf4", 3)):
        published = {name: size["bytes"] - size["minus_published"] for name, size in QUANTIZE["bytes"][kind].items()}
        cells = {row.split("|")[1].strip(): int(row.split("|")[column].replace(",", "")) for row in rows}
        assert cells == published


def test_the_readme_says_how_long_the_first_picture_ever_takes():
    assert f"{COLD['first_s']:.1f} s with `resident`" in " ".join(read("README.md").split())
