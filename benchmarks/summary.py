"""The headline figures of all measurements here: as one flat object in ``summary.json``, in tables, and as charts.

    python -m benchmarks.summary

Every figure is read from the JSON of the run that measured it; what was not measured is left out. Each table stands on
its page between two comments, ``<!-- NAME -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import formats_report, peers_report
from ernie_image_nf4.benchmarking import report as benchmark_report
from ernie_image_nf4.benchmarking import summary as benchmark
from ernie_image_nf4.benchmarking.arms import has_own_work
from ernie_image_nf4.evaluation.report import markdown_table
from ernie_image_nf4.fast.step_plan import DEFAULT_CACHE
from ernie_image_nf4.loading.cards import GENERATIONS

FOLDER = Path(__file__).parent
CHECKOUT = FOLDER.parent
CHART = FOLDER / "benchmark_h100.png"
PEERS, PEERS_CHART = "peers_h100.json", FOLDER / "peers_h100.png"
SKIPPING_SIZES = (512, 1024)
FEWER = " steps"  # in the name of the row that simply draws with fewer of them
FORMATS, FORMATS_CHART = "nf4_mini.json", FOLDER / "nf4_mini.png"
# Table -> the page it stands on.
PAGES = {
    "cards": "README.md",
    "generations": "README.md",
    "headline": "README.md",
    "fidelity": "README.md",
    "summary": "docs/figures.md",
    "mini-figures": "docs/mini.md",
    "speed": "docs/speed.md",
    "large": "docs/speed.md",
    "growth": "docs/speed.md",
    "peers": "docs/speed.md",
    "turbo": "docs/speed.md",
    "skipping": "docs/speed.md",
    "formats": "docs/fidelity.md",
    "calibration": "docs/quantizing.md",
}
# Arm of the benchmark -> its name in the README, whose table and chart have these rows.
HEADLINES = {
    "original, CPU offload": "original in bfloat16, with diffusers' CPU offload",
    "demo": "NF4 by plain diffusers calls",
    "resident": "`resident`",
    "resident, int8": '`resident`, `products="int8"`',
    "resident, fp8": '`resident`, `products="fp8"`',
    "offload": "`offload`",
    "stream": "`stream`",
}
# Below the table of cards: what its figures are of.
CARDS_NOTE = """\
Measured with random weights on an H100 of which another process held the rest, 50 steps, with the prompt enhancer: the
command `generate` from start to end; memory that PyTorch reserved, and all that was gone. Small cards are slower."""
VARIANTS = ("stock", "scale_search", "default", "calibrated")
TEXTS = {
    "h100.time_vs_demo.resident": "one 512x512 picture, 50 steps, 256 enhancer tokens: time over the plain calls'",
    "h100.pe_ms_per_token": "prompt enhancer, milliseconds a token",
    "h100.pe_ms_per_token.four_texts": "... of four texts at once, milliseconds a token of any",
    "h100.pe_first_call_s": "... what its first call takes beyond later ones, with warm caches, s",
    "h100.first_picture_extra_s": "what a first picture takes beyond later ones, with warm caches, s",
    "h100.step_ms.eager_512": "denoising step with guidance at 512x512, ms",
    "h100.step_ms.eager_1024": "... at 1024x1024",
    "h100.step_vs_demo.resident_512": "... at 512x512, time over that of the plain calls",
    "h100.step_vs_demo.resident_1024": "... at 1024x1024",
    "h100.peak_gib.resident_512": "peak reserved memory at 512x512, loading included, GiB: `resident`",
    "h100.peak_gib.offload_512": "... `offload`",
    "h100.peak_gib.stream_512": "... `stream`",
    "h100.peak_gib.offload_1024": "... at 1024x1024: `offload`",
    "h100.peak_gib.stream_1024": "... `stream`",
    "h100.time_vs_resident.offload": "time of a picture over that in `resident`: `offload`",
    "h100.time_vs_resident.stream": "... `stream`",
    "h100.load_time_vs_demo": "loading, `resident`: time over that of the plain calls",
    "h100.prediction_error.resident": "largest relative difference of a prediction to that of the plain calls",
    "h100.step_ms.int8_512": 'with `products="int8"`: denoising step at 512x512, ms',
    "h100.step_ms.int8_1024": "... at 1024x1024",
    "h100.int8_product_vs_bf16": "... the product alone, 2,200 x 12,288 x 4,096, rescaled: rate over bfloat16's",
    "h100.prediction_error.resident_int8": "... largest relative difference of a prediction to that of the plain calls",
    "h100.time_vs_demo.resident_fp8": 'with `products="fp8"`: time of a picture over that of the plain calls',
    "h100.step_ms.fp8_512": "... denoising step at 512x512, ms",
    "h100.step_ms.fp8_1024": "... at 1024x1024, ms",
    "h100.step_vs_demo.fp8_1024": "... step at 1024x1024: time over that of the plain calls",
    "h100.prediction_error.resident_fp8": "... largest relative difference of a prediction to that of the plain calls",
    "h100.step_vs_bfloat16.float16_512": "in float16: denoising step at 512x512, time over that in bfloat16",
    "h100.turbo_s.enhanced_512": "as ERNIE-Image-Turbo, 8 steps without guidance, with 256 enhancer tokens: seconds a "
    "picture of 512x512",
    "h100.turbo_s.plain_512": "... without the enhancer",
    "h100.turbo_s.enhanced_1024": "... of 1024x1024, with it",
    "h100.turbo_s.plain_1024": "... without",
    **peers_report.TEXTS,
    "h100.time_vs_full.guidance_until_half": "full-size model with random weights on an H100, 1024x1024, 50 steps: "
    "denoising with `guidance_until=0.5`, time over that of all steps with guidance",
    "h100.time_vs_full.cache": "... with `cache=True`, over that of all steps computed",
    "h100.time_vs_full_512.guidance_until_half": "... at 512x512: with `guidance_until=0.5`",
    "h100.time_vs_full_512.cache": "... with `cache=True`",
    "skipping.psnr_db.guidance_until_half": "the mini's pictures with `guidance_until=0.5` against those of all steps "
    "with guidance, PSNR in dB",
    "skipping.psnr_db.cache": "... with `cache=True` against all steps computed",
    "products.psnr_db.int8": 'the mini\'s pictures with `products="int8"` against those in float32, PSNR in dB',
    "products.psnr_db.fp8": '... with `products="fp8"`',
    "products.psnr_db.bfloat16": "... in bfloat16, as by default",
    "products.prediction_error.int8": '... largest relative difference of a prediction with `products="int8"`',
    "products.prediction_error.fp8": '... with `products="fp8"`',
    "products.prediction_error.bfloat16": "... in bfloat16",
    "cards.seconds_1024.free_11_0": "`generate` as a whole at 1024x1024, 50 steps, with the enhancer, s: where 11.0 "
    "GiB are free",
    "cards.seconds_1024.free_7_2": "... where 7.2 GiB are free",
    "cards.seconds_1024.free_5_2": "... 5.2 GiB",
    "cards.seconds_1024.free_3_4": "... 3.4 GiB",
    "batch.h100_s.resident": "full-size model with random weights on an H100, 512x512, 50 steps, 16 prompts with the "
    "enhancer, in batches of 8: seconds a picture, `resident`",
    "batch.h100_s.resident_single": "... one by one",
    "batch.h100_s.offload": "... in batches of 8, `offload`",
    "batch.h100_s.offload_single": "... one by one",
    "serve.requests_lost": "the mini served on a CPU to 8 clients, 200 requests of which some are bad, some clients go "
    "away and a worker is killed: good requests without an answer",
    "serve.wrong_answers": "... answers that are not as they should be, pictures compared to the byte",
    "serve.throughput_vs_batch.h100_16": "full-size model with random weights served on an H100, 512x512, 50 steps: "
    "pictures a minute with 16 clients over those of `generate_batch`",
    "serve.extra_latency_s.h100": "... seconds that a lone request takes beyond `generate` of a loaded model",
    "lora.step_vs_base.one": "full-size model with random weights on an H100, 512x512: a step with a LoRA of rank 16 "
    "on all layers of the blocks, time over that without",
    "lora.step_vs_base.two": "... with two of them",
    "lora.step_vs_base.int8": '... with one and `products="int8"`, over that without a LoRA',
    "lora.step_vs_base.fp8": '... and `products="fp8"`',
    "lora.train_step_s.h100_11_gib": "... a step of `examples/train_lora.py`, one picture, rank 16, where 11.0 GiB are "
    "free, s",
    "lora.train_peak_gib": "... peak of PyTorch's memory on the GPU, GiB",
    "reload.growth_mib_per_round": "the mini on an H100, loaded, drawn with and deleted 100 times, the memory modes in "
    "turn: allocated memory that stays, MiB a round",
    "reload.freed_by_del": "... least share of a pipeline's memory that `del pipe` frees",
    "threads.wrong_pictures": "... drawn in four threads, with a pipeline each and with one for all, in each memory "
    "mode, and while another thread loads: pictures that are not the one drawn alone",
    "quantize.h100_s": "full-size `quantize --no-scale-search --no-default-keep` on an H100, source in the page cache, "
    "s",
    "quantize.h100_conventional_s": "... the same by `from_pretrained` and `save_pretrained`, s",
    "quantize.peak_host_gib": "... peak host memory of `quantize` without page cache, GiB",
    "quantize.peak_gpu_gib": "... peak GPU memory of `quantize`, GiB",
    "nf4.quantize_s.h100_full_size": "... with scale search, s",
    "quantize.bytes.transformer": "... bytes of the stock NF4 file: transformer",
    "quantize.bytes.text_encoder": "... text encoder",
    "quantize.bytes.pe": "... prompt enhancer",
    "quantize.cpu_vs_bitsandbytes": "two CPU cores, `quantize --no-scale-search --no-default-keep` as a whole: speed "
    "over that of bitsandbytes' `quantize_4bit` on the same weights in memory",
    "quantize.cpu_projected_s": "... seconds that the full-size model would take at that speed, from the page cache",
    "nf4.cpu_time_vs_stock": "... time of the scale search over stock NF4",
    "calibrate.h100_s": "full-size `quantize --calibrate` of random weights on an H100, 64 prompts, s; beside a "
    "training for 88 s, then with 11 GiB free",
    "calibrate.peak_gpu_gib": "... peak of PyTorch's memory on the GPU, GiB",
    "calibrate.peak_host_gib": "... peak host memory without page cache, GiB",
    "calibrate.prediction_error_vs_search": "... error of guided predictions for prompts and noise that it didn't see, "
    "over that with scale search",
    "nf4.error_vs_stock.mini": "squared weight error with scale search over stock NF4's, at the same bytes: the mini's "
    "transformer",
    "nf4.error_vs_stock.normal": "... random normal weights",
    "nf4.psnr_db.stock": "the mini's pictures against its bfloat16 original's, PSNR in dB: stock NF4",
    "nf4.psnr_db.scale_search": "... scale search",
    "nf4.psnr_db.default": "... scale search and kept layers, the default",
    "nf4.psnr_db.calibrated": "... calibrated as well",
}

MINI_TEXTS = {
    "vae_psnr_db": "VAE, 512 new scenes encoded and decoded: PSNR in dB",
    "background_accuracy": "400 English captions at 256x256: background right",
    "place_accuracy": "... objects at the places asked for, and nowhere else",
    "object_accuracy": "... the right object, of all objects asked for",
    "object_accuracy_zh": "400 Chinese captions: the right object",
    "object_accuracy_512": "120 English captions at 512x512: the right object",
    "enhancer_card_prompts": "the enhancer on two prompts about a cat, a desk and a sheet of paper, ten seeds each: "
    "all three drawn",
    "enhancer_free_form": "... on 50 prompts written by hand: the right object",
    "weights_mb": "all weight files, MB",
}


def main() -> None:
    (FOLDER / "summary.json").write_text(json.dumps(summary(), indent=2) + "\n", encoding="utf-8")
    for name, table in tables().items():
        page = CHECKOUT / PAGES[name]
        page.write_text(replaced(page.read_text(encoding="utf-8"), name, table), encoding="utf-8")
    if run := read_benchmark():
        draw_chart(run, CHART)
    if run := read(PEERS):
        peers_report.draw_chart(run, PEERS_CHART)
    if run := read(FORMATS):
        formats_report.draw_chart(run, FORMATS_CHART)


def summary() -> dict[str, float]:
    """All headline figures by key."""
    return {key: value for figures in figures_of_runs().values() for key, value in figures.items()}


def figures_of_runs() -> dict[str, dict[str, float]]:
    """File of a run, of those that are there -> the headline figures that it measured."""
    found: dict[str, dict[str, float]] = {}
    if run := read_benchmark():
        arms = {arm["name"]: arm for arm in run["arms"]}
        demo, resident = arms["demo"], arms["resident"]
        found["benchmark_h100.json"] = benchmark.summary(run) | {
            "h100.step_vs_demo.resident_512": rounded(resident["step_ms"] / demo["step_ms"]),
            "h100.step_vs_demo.resident_1024": rounded(resident["large"]["step_ms"] / demo["large"]["step_ms"]),
            "h100.prediction_error.resident": rounded(resident["prediction_error"]),
        }
    if run := read(PEERS):
        found[PEERS] = peers_report.figures(run)
    if run := read("cards.json"):
        found["cards.json"] = benchmark.cards_summary(run)
    for memory in ("resident", "offload"):
        if run := read(file := f"batch_h100_{memory}.json"):
            found[file] = {
                f"batch.h100_s.{memory}": run[memory]["batch"]["seconds_a_picture"],
                f"batch.h100_s.{memory}_single": run[memory]["single"]["seconds_a_picture"],
            }
    if run := read("products_mini.json"):
        found["products_mini.json"] = {
            f"products.{key}.{name}": result[figure]
            for name, result in run["results"].items()
            for key, figure in (("psnr_db", "psnr"), ("prediction_error", "prediction_error"))
            if figure in result
        }
    for name in ("skipping_cpu", "skipping_mini"):  # the second has more captions, and takes the place of the first
        if run := read(file := f"{name}.json"):
            found.pop("skipping_cpu.json", None)
            found[file] = skipping_figures(run, "skipping.psnr_db", "psnr")
    for size, run in skipping_times().items():
        prefix = "h100.time_vs_full" + ("" if size == SKIPPING_SIZES[-1] else f"_{size}")
        found[f"skipping_h100_{size}.json"] = skipping_figures(run, prefix, "time_vs_full")
    if run := read("lora_h100.json"):
        found["lora_h100.json"] = lora_figures(run)
    if run := read("threads_and_reloads_h100.json"):
        cases = [case for memory in run["threads"].values() for case in memory.values()]
        found["threads_and_reloads_h100.json"] = {
            "reload.growth_mib_per_round": run["reloads"]["growth_mib_per_round"],
            "reload.freed_by_del": run["reloads"]["freed_by_del"],
            "threads.wrong_pictures": sum(case["wrong"] for case in (*cases, run["loading"])),
        }
    if run := read("quantize_h100.json"):
        found["quantize_h100.json"] = {
            "quantize.h100_s": run["quantize"]["seconds"],
            "quantize.h100_conventional_s": run["conventional"]["seconds"],
            "quantize.peak_host_gib": run["quantize"]["host_gib"],
            "quantize.peak_gpu_gib": run["quantize"]["gpu_device_gib"],
            "nf4.quantize_s.h100_full_size": run["scale_search"]["seconds"],
            **{f"quantize.bytes.{name}": size["bytes"] for name, size in run["bytes"]["nf4"].items()},
        }
    if run := read("quantize_cpu.json"):
        errors = run["scale_search_vs_stock"]["squared_error"]
        found["quantize_cpu.json"] = {
            "quantize.cpu_vs_bitsandbytes": run["cpu_vs_bitsandbytes"],
            "quantize.cpu_projected_s": run["projected_full_size_s"],
            "nf4.cpu_time_vs_stock": run["scale_search_vs_stock"]["time"],
            "nf4.error_vs_stock.mini": errors["transformer"],
            "nf4.error_vs_stock.normal": errors["normal"],
        }
    if run := read("calibrate_h100.json"):
        found["calibrate_h100.json"] = {
            "calibrate.h100_s": run["calibrated"]["seconds"],
            "calibrate.peak_gpu_gib": run["calibrated"]["gpu_reserved_gib"],
            "calibrate.peak_host_gib": run["calibrated"]["host_gib"],
            "calibrate.prediction_error_vs_search": run["errors"]["prediction_error_vs_search"],
        }
    if run := read("serve_cpu.json"):
        found["serve_cpu.json"] = {
            "serve.requests_lost": run["requests_lost"],
            "serve.wrong_answers": run["wrong_answers"],
        }
    if run := read("serve_h100.json"):
        found["serve_h100.json"] = {
            "serve.throughput_vs_batch.h100_16": run["throughput_vs_batch_16"],
            "serve.extra_latency_s.h100": run["extra_latency_seconds"],
        }
    if run := read(FORMATS):
        found[FORMATS] = {f"nf4.psnr_db.{name}": round(run["results"][name]["psnr"], 3) for name in VARIANTS}
    return found


def tables() -> dict[str, str]:
    """The tables by name, those of runs that are there."""
    made = {"summary": summary_table(figures_of_runs()), "generations": generations_table()}
    if run := read("../training/report.json"):
        made["mini-figures"] = mini_table(run["figures"])
    if run := read("cards.json"):
        made["cards"] = f"{cards_table(run)}\n\n{CARDS_NOTE}"
    if run := read_benchmark():
        made |= {
            "headline": headline_table(run),
            "speed": benchmark_report.arms_table(run),
            "large": large_table(run),
            "growth": growth_table(run),
        }
        if any(has_own_work(arm) and "error" not in arm for arm in run["arms"]):
            made["turbo"] = benchmark_report.turbo_table(run)
    if run := read(PEERS):
        made["peers"] = peers_report.section(run, f"../benchmarks/{PEERS_CHART.name}")
    if run := read("skipping_mini.json") or read("skipping_cpu.json"):
        made["skipping"] = skipping_table(run, skipping_times())
    if run := read(FORMATS):
        made |= {"formats": formats_report.table(run), "fidelity": formats_report.short_table(run)}
    if run := read("calibrate_h100.json"):
        made["calibration"] = calibration_table(run)
    return made


def skipping_figures(run: dict[str, Any], prefix: str, key: str) -> dict[str, float]:
    """A figure of each of the two ways to leave something out, by itself."""
    arms = {"guidance_until_half": "guidance_until=0.5", "cache": f"cache={DEFAULT_CACHE}"}
    return {
        f"{prefix}.{name}": rounded(run["results"][arm][key]) for name, arm in arms.items() if arm in run["results"]
    }


def lora_figures(run: dict[str, Any]) -> dict[str, float]:
    """What LoRAs cost a step, and what training one takes, of the rows that came to an end."""
    wanted = {"one": ("auto", "one"), "two": ("auto", "two"), "int8": ("int8", "one"), "fp8": ("fp8", "one")}
    found = {
        f"lora.step_vs_base.{name}": run["step"][products][f"{loras}_vs_base"]
        for name, (products, loras) in wanted.items()
        if "error" not in run["step"].get(products, {"error": ""})
    }
    if "error" not in run["train"]:
        found["lora.train_step_s.h100_11_gib"] = run["train"]["step_s"]
        found["lora.train_peak_gib"] = run["train"]["peak_reserved_gib"]
    return found


def skipping_times() -> dict[int, dict[str, Any]]:
    """Size -> the run at full size that measured times."""
    runs = {size: read(f"skipping_h100_{size}.json") for size in SKIPPING_SIZES}
    return {size: run for size, run in runs.items() if run}


def skipping_table(run: dict[str, Any], times: dict[int, dict[str, Any]]) -> str:
    """What the mini's pictures lose where steps leave something out, and what that saves at full size."""
    results = {name: dict(result) for name, result in run["results"].items() if name != run["against"]}
    for size, timed in times.items():
        # The last row's name is of the steps that a cache computes, which are others where there are more in all.
        names = {FEWER if FEWER in name else name: name for name in timed["results"]}
        for name, result in results.items():
            arm = names.get(FEWER if FEWER in name else name)
            if arm is not None:
                result[f"time_{size}"] = timed["results"][arm]["time_vs_full"]
    columns = {
        "rows computed": ("work", ".0%"),
        **{f"time, {size}x{size}": (f"time_{size}", ".0%") for size in times},
        "PSNR (dB)": ("psnr", ".1f"),
        "lowest PSNR (dB)": ("lowest_psnr", ".1f"),
        "objects right": ("object_accuracy", ".1%"),
    }
    shown = {title: each for title, each in columns.items() if any(each[0] in result for result in results.values())}
    rows = [
        [f"`{name}`", *(f"{result[key]:{form}}" if key in result else "–" for key, form in shown.values())]
        for name, result in results.items()
    ]
    return markdown_table(["", *shown], rows)


def summary_table(runs: dict[str, dict[str, float]]) -> str:
    """Every headline figure, with the run that measured it."""
    measured = {key: (number(value), file) for file, figures in runs.items() for key, value in figures.items()}
    rows = []
    for key, text in TEXTS.items():
        if key in measured:
            value, file = measured[key]
            rows.append(f"| `{key}` | {text} | {value} | [{file.removesuffix('.json')}](../benchmarks/{file}) |")
    return "\n".join(["| figure | what | value | run |", "|---|---|---:|---|", *rows])


def mini_table(figures: dict[str, float]) -> str:
    """What the mini draws, by the classifier's judgement."""
    rows = [f"| `{key}` | {text} | {number(figures[key])} |" for key, text in MINI_TEXTS.items()]
    return "\n".join(["| figure | what | value |", "|---|---|---:|", *rows])


def headline_table(run: dict[str, Any]) -> str:
    """Ways to run the full-size model, from the slowest to the one for the smallest cards."""
    columns = ["load (s)", "first picture (s)", "each after it (s)", "a step (ms)", "GPU memory (GiB)"]
    rows = []
    for name, arm in headline_arms(run).items():
        memory = max(arm["loading_peak_reserved_gib"], arm["peak_reserved_gib"])
        times = [f"{arm[key]:.1f}" for key in ("load_s", "first_s", "seconds")]
        rows.append([name, *times, f"{arm['step_ms']:.0f}", f"{memory:.1f}"])
    return markdown_table(["", *columns], rows)


def cards_table(run: dict[str, Any]) -> str:
    """Cards by their free memory: the mode that was chosen, and what a picture took."""
    columns = ["free of it", "mode", "command (s)", "of it the picture (s)", "reserved (GiB)", "in all (GiB)"]
    rows = [
        [
            row["card"],
            f"{row['free_gib']:.1f} GiB",
            f"`{row['mode']}`",
            *(f"{row[key]:.0f}" for key in ("seconds", "picture_s")),
            *(f"{row[key]:.1f}" for key in ("peak_reserved_gib", "device_peak_gib")),
        ]
        for row in run["cards"]
        if row["enhancer"] and "error" not in row
    ]
    return markdown_table(["a card of", *columns], rows)


def generations_table() -> str:
    """What `load` takes on each generation of cards."""
    columns = ["", "compute capability", "dtype", "attention", "products it can be asked for", "tried"]
    rows = [
        [
            f"{each.name}: {each.cards}",
            ".".join(map(str, each.capability)),
            str(each.dtype).removeprefix("torch."),
            each.attention,
            ", ".join(each.products),
            each.evidence,
        ]
        for each in GENERATIONS
    ]
    return markdown_table(columns, rows).replace("---:", "---")


def large_table(run: dict[str, Any]) -> str:
    """Step time and memory of every arm at the large size."""
    rows = [
        [arm["name"], f"{arm['large']['step_ms']:.1f}", f"{arm['large']['peak_reserved_gib']:.2f}"]
        for arm in run["arms"]
        if "large" in arm and not has_own_work(arm)
    ]
    return markdown_table(["", "step (ms)", "peak reserved (GiB)"], rows)


def growth_table(run: dict[str, Any]) -> str:
    """How a step's time grows with size and batch."""
    rows = [
        [
            f"{row['size']}x{row['size']}, {row['batch']}",
            f"{row['step_ms']:.1f}",
            f"{row['tflop']:.1f}",
            f"{row['over_floor']:.2f}",
        ]
        for row in run["growth"]["rows"]
    ]
    return markdown_table(["size, pictures", "step (ms)", "TFLOP", "over the floor"], rows)


def headline_arms(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name in the README -> the arm's figures."""
    arms = {arm["name"]: arm for arm in run["arms"] if "error" not in arm}
    return {title: arms[name] for name, title in HEADLINES.items() if name in arms}


def chart_values(run: dict[str, Any]) -> dict[str, list[float]]:
    """What the chart's bars show: row -> seconds a picture and peak reserved GiB, rounded as they are written there."""
    return {
        name.replace("`", ""): [round(arm["seconds"], 1), round(arm["peak_reserved_gib"], 1)]
        for name, arm in headline_arms(run).items()
    }


def draw_chart(run: dict[str, Any], path: Path) -> None:
    """Draw seconds a picture and memory of the headline arms. The PNG's text ``Description`` keeps the values."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    values = chart_values(run)
    ours = [arm["way"] == "ours" for arm in headline_arms(run).values()]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    workload = run["workload"]
    titles = (
        f"seconds a picture ({workload['size']}x{workload['size']}, {workload['steps']} steps)",
        "GPU memory at its peak (GiB)",
    )
    for index, (axes, title) in enumerate(zip(figure.subplots(1, 2, sharey=True), titles, strict=True)):
        bars = axes.barh(
            list(values),
            [row[index] for row in values.values()],
            color=["#3b76af" if own else "#999999" for own in ours],
        )
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.set_title(title, fontsize="medium")
        axes.margins(x=0.12)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, format="png", dpi=120, metadata={"Description": json.dumps(values)})


def calibration_table(run: dict[str, Any]) -> str:
    """Time and memory on the GPU of each phase of a calibration at full size."""
    whole = run["calibrated"]
    rows = [
        [each["phase"], f"{each['seconds']:.0f}", f"{each['gpu_reserved_gib']:.1f}"]
        for each in (*whole["phases"], whole | {"phase": "all, with starting and hashing"})
    ]
    return markdown_table(["phase", "seconds", "GPU memory (GiB)"], rows)


def number(value: float) -> str:
    """A figure as the tables have it."""
    return f"{value:g}" if value < 1e5 else f"{value:,}"


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")


def replaced(text: str, name: str, table: str) -> str:
    """`text` with another table between the comments of that name.

    Raises:
        ValueError: There are no such comments.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, after = text.index(begin) + len(begin), text.index(end)
    return f"{text[:before]}\n{table.strip()}\n{text[after:]}"


def read_benchmark() -> dict[str, Any] | None:
    """The benchmark's run without the arms that compiled the transformer's blocks, an option of `load` that is gone."""
    run = read("benchmark_h100.json")
    return run and run | {"arms": [arm for arm in run["arms"] if not arm["options"].get("compile")]}


def read(name: str) -> dict[str, Any] | None:
    path = FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    main()
