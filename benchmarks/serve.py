"""The server under load: whether a request is lost or a picture wrong, how fast it is beside `generate_batch`.

    python -m benchmarks.serve load --output benchmarks/serve_cpu.json
    python -m benchmarks.serve speed --work /tmp/serve --output benchmarks/serve_h100.json

`load` starts ``ernie-image-nf4 serve`` with the mini on the CPU, and lets clients send requests of mixed sizes: some
are bad, some clients go away before the answer, and one of two workers is killed in the middle. Every picture that was
answered is compared with one drawn alone, by the function behind ``generate``, to the byte.

`speed` makes a repository of full size with random weights in `--work` (41 GB of disk while it is made), draws with it
alone and by `generate_batch`, then starts the server and draws the same prompts and seeds with 1, 4 and 16 clients.
What was drawn without the server is kept in ``WORK/alone.json``: an interrupted run is gone on with by the same call.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import psutil

from benchmarks.children import answer, end_with_parent, write
from ernie_image_nf4.benchmarking.interrupted import is_same_run, read_result
from ernie_image_nf4.repository.metadata import installed_versions

PROMPTS = ("an orange cat on a wooden desk", "a red apple and a fish on the beach", "一只狗在草地上", "a rocket")
SIZES = ((64, 64), (96, 64), (64, 128), (128, 128))
BAD = (
    {"size": "65x64"},
    {"steps": 0},
    {"n": 1000},
    {"guidance_scale": 1e9},
    {"prompt": " "},
    {"seed": -1},
    {"stepz": 3},
    {"size": "9999x9999"},
)
ALONE = "alone.json"
TRIES = 20  # of a request that is told to come again


@dataclass
class Planned:
    """A request of the load.

    Attributes:
        kind: ``good``, ``bad``, or ``leaves`` for a client that goes away.
        body: As it is sent.
        leaves_after: Seconds.
    """

    kind: str
    body: dict[str, Any]
    leaves_after: float = 0.0


@dataclass
class Outcome:
    """What came of one.

    Attributes:
        status: ``answered``, ``refused``, ``left``, or ``lost`` with the reason.
        come_again: How often it was told to come again, by status.
        pngs: The pictures.
        seconds: From the first try to the answer.
    """

    status: str
    come_again: list[int] = field(default_factory=list)
    pngs: list[bytes] = field(default_factory=list)
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["load", "speed", "alone"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--requests", type=int, default=200, help="of the load")
    parser.add_argument("--clients", type=int, default=8, help="of the load")
    parser.add_argument("--work", type=Path, help="folder for the repository of the speed run")
    parser.add_argument("--preset", default="full", choices=["full", "tiny"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=32, help="of generate_batch, and of 16 clients")
    arguments = parser.parse_args()
    if arguments.mode == "alone":
        print(json.dumps(alone(arguments)))
        return
    result = {"command": " ".join(["python", "-m", "benchmarks.serve", *sys.argv[1:]]), "machine": machine()}
    result |= load(arguments) if arguments.mode == "load" else speed(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def machine() -> dict[str, Any]:
    servers = {name: version(name) for name in ("fastapi", "uvicorn", "openai")}
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": installed_versions() | servers | {"python": platform.python_version()},
    }


@contextmanager
def server(*arguments: str) -> Iterator[tuple[psutil.Process, str, float]]:
    """The command ``serve`` at a free port: its process, its address, and the seconds it took to be ready."""
    command = [sys.executable, "-m", "ernie_image_nf4", "serve", *arguments, "--no-page", "--port", "0"]
    # By SIGTERM it ends its workers too.
    process = psutil.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=end_with_parent(signal.SIGTERM))
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"is ready at (\S+) after (\S+) s", line):
                break
        else:
            raise RuntimeError("".join(lines))
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()  # so that it isn't held up
        yield process, found[1], float(found[2])
    finally:
        process.terminate()
        process.wait(120)


# Load


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Many clients at once, some of them ill-behaved."""
    plan = make_plan(arguments.requests)
    with server("--device", "cpu", "--device", "cpu") as (process, url, ready):
        while len(workers(process)) < 2:
            time.sleep(0.1)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        for seed in range(4):  # both workers have drawn before memory is measured
            client.images.generate(prompt="a cat", size="128x128", n=4, extra_body={"steps": 2, "seed": seed})
        memory, done, killed = [memory_of(process, 0)], [], ""
        began = time.perf_counter()
        with ThreadPoolExecutor(arguments.clients) as pool:
            tasks = [pool.submit(send, client, url, planned) for planned in plan]
            for number, task in enumerate(tasks, 1):
                done.append(task.result())
                if number == len(plan) // 2:
                    killed = kill_one(process)
                if number % (len(plan) // 8) == 0:
                    memory.append(memory_of(process, number))
        seconds = time.perf_counter() - began
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            deaths = re.search(r"^ernie_image_worker_deaths_total (\S+)", answer.read().decode(), re.MULTILINE)
    wrong = compare(plan, done)
    lost = [outcome.status for outcome in done if outcome.status.startswith("lost")]
    middle, last = memory[4], memory[-1]
    lasting = middle["worker_bytes"].keys() & last["worker_bytes"].keys()
    return {
        "settings": "the mini on the CPU, two workers of one thread; 2 to 4 steps, 64x64 to 128x128",
        "requests": Counter(planned.kind for planned in plan),
        "clients": arguments.clients,
        "worker_killed": killed,
        "worker_deaths": float(deaths[1]) if deaths else None,
        "ready_seconds": ready,
        "seconds": round(seconds, 1),
        "outcomes": Counter(outcome.status for outcome in done),
        "pictures": sum(len(outcome.pngs) for outcome in done),
        "told_to_come_again": Counter(str(status) for outcome in done for status in outcome.come_again),
        "requests_lost": len(lost),
        "reasons": lost,
        "wrong_answers": len(wrong),
        "wrong": wrong,
        "median_seconds": round(statistics.median(o.seconds for o in done if o.status == "answered"), 2),
        # Of the second half, and of the worker that was there all along.
        "server_growth_mib": round((last["server_bytes"] - middle["server_bytes"]) / 2**20, 2),
        "worker_growth_mib": [
            round((last["worker_bytes"][pid] - middle["worker_bytes"][pid]) / 2**20, 2) for pid in lasting
        ],
        "memory": memory,
    }


def make_plan(count: int) -> list[Planned]:
    """The same requests in every run: four in five are good, one in ten is bad, one in ten leaves."""
    chance = random.Random(0)
    plan = []
    for number in range(count):
        width, height = chance.choice(SIZES)
        body: dict[str, Any] = {"prompt": chance.choice(PROMPTS), "size": f"{width}x{height}", "seed": number * 10}
        body |= {"steps": chance.randint(2, 4), "n": chance.choice((1, 1, 1, 2)), "use_pe": chance.random() < 0.3}
        body["guidance_scale"] = chance.choice((1.0, 4.0))
        if number % 10 == 3:
            plan.append(Planned("bad", body | chance.choice(BAD)))
        elif number % 10 == 7:
            plan.append(Planned("leaves", body | {"n": 4, "steps": 8}, chance.uniform(0.0, 0.6)))
        else:
            plan.append(Planned("good", body))
    return plan


def send(client: openai.OpenAI, url: str, planned: Planned) -> Outcome:
    """Send one request, again if that is the answer."""
    began = time.perf_counter()
    if planned.kind == "leaves":
        leave(url, planned)
        return Outcome("left")
    fields = dict(planned.body)
    known = {name: fields.pop(name) for name in ("prompt", "size", "n") if name in fields}
    come_again: list[int] = []
    for _ in range(TRIES):
        try:
            answer = client.images.generate(**known, extra_body=fields)
        except openai.BadRequestError:
            return Outcome("refused", come_again)
        except openai.APIStatusError as error:
            pause = error.response.headers.get("Retry-After")
            if pause is None:
                return Outcome(f"lost: {error.status_code} {error.message}", come_again)
            come_again.append(error.status_code)
            time.sleep(min(2.0, float(pause)))
            continue
        except openai.APIError as error:
            return Outcome(f"lost: {type(error).__name__}", come_again)
        pngs = [base64.b64decode(each.b64_json) for each in answer.data]
        return Outcome("answered", come_again, pngs, time.perf_counter() - began)
    return Outcome("lost: told to come again too often", come_again)


def leave(url: str, planned: Planned) -> None:
    """Send a request and go away before the answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    body = json.dumps(planned.body)
    connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    time.sleep(planned.leaves_after)
    connection.close()


def workers(process: psutil.Process) -> list[psutil.Process]:
    """The worker processes that have loaded a model."""
    children = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
    return [child for child in children if child.memory_info().rss > 300 * 2**20]


def kill_one(process: psutil.Process) -> str:
    """Kill the worker that has computed most."""
    busiest = max(workers(process), key=lambda worker: worker.cpu_times().user)
    busiest.kill()
    return "by SIGKILL, after half of the requests"


def memory_of(process: psutil.Process, number: int) -> dict[str, Any]:
    """Resident memory of the server and its workers after so many requests."""
    children = {str(child.pid): child.memory_info().rss for child in workers(process)}
    return {"requests": number, "server_bytes": process.memory_info().rss, "worker_bytes": children}


def compare(plan: Sequence[Planned], done: Sequence[Outcome]) -> list[str]:
    """What is not as it should be: pictures that aren't those drawn alone, bad requests that were answered."""
    import torch

    from ernie_image_nf4 import load
    from ernie_image_nf4.generation.single import draw_and_save

    torch.set_num_threads(1)
    pipe, wrong = load(device="cpu"), []
    pipe.set_progress_bar_config(disable=True)
    for number, (planned, outcome) in enumerate(zip(plan, done, strict=True)):
        expected = {"good": ("answered",), "bad": ("refused",), "leaves": ("left",)}[planned.kind]
        if outcome.status not in expected:
            wrong += [] if outcome.status.startswith("lost") else [f"{number}: {planned.kind}, {outcome.status}"]
            continue
        if planned.kind != "good":
            continue
        with tempfile.TemporaryDirectory() as folder:
            body = planned.body
            width, height = map(int, body["size"].split("x"))
            paths = [Path(folder) / f"{index}.png" for index in range(body["n"])]
            options = {"steps": body["steps"], "guidance": body["guidance_scale"], "use_pe": body["use_pe"]}
            list(draw_and_save(pipe, paths, body["prompt"], width=width, height=height, seed=body["seed"], **options))
            if [path.read_bytes() for path in paths] != outcome.pngs:
                wrong.append(f"{number}: another picture")
    return wrong


# Speed


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alone and in batches without a server, then with one."""
    from benchmarks.batch_h100 import build

    build(arguments.work, arguments.preset)
    without = drawn_alone(arguments)
    with server(str(arguments.work / "ERNIE-Image-NF4")) as (_, url, ready):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)

        def draw(seed: int, steps: int = arguments.steps) -> float:
            began = time.perf_counter()
            options = {"seed": seed, "steps": steps, "guidance_scale": 4.0}
            size = f"{arguments.size}x{arguments.size}"
            answer = client.images.generate(prompt=prompt_of(seed), size=size, extra_body=options)
            base64.b64decode(answer.data[0].b64_json)
            return time.perf_counter() - began

        for count in (16, 4, 1):  # warm-up, of every batch size that comes
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(lambda seed: draw(seed, 2), range(count)))
        lone = [draw(seed) for seed in range(4)]
        clients = {}
        for count, pictures in ((1, 4), (4, max(4, arguments.pictures // 2)), (16, arguments.pictures)):
            began = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(draw, range(pictures)))
            clients[str(count)] = round(60 * pictures / (time.perf_counter() - began), 3)
    (arguments.work / ALONE).unlink()
    return {
        "settings": {"preset": arguments.preset, "size": arguments.size, "steps": arguments.steps, "guidance": 4.0},
        "ready_seconds": ready,
        "without_server": without,
        "lone_seconds": [round(seconds, 3) for seconds in lone],
        "pictures_a_minute": clients,
        "throughput_vs_batch_16": round(clients["16"] / without["batch_pictures_a_minute"], 4),
        # The enhancer writes more for one prompt than for another, so each is compared with itself.
        "extra_latency_seconds": round(
            statistics.median(a - b for a, b in zip(lone, without["single_seconds"], strict=True)), 4
        ),
    }


def drawn_alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `alone` measures, from the file in which an interrupted run with the same settings left it if it is there.

    The file is removed by a run that comes to its end.
    """
    asked = machine() | {name: getattr(arguments, name) for name in ("preset", "size", "steps", "pictures")}
    file = arguments.work / ALONE
    left = read_result(file)
    if is_same_run(left, {"asked": asked}, ["asked"]):
        return left["found"]
    options = [
        word
        for name in ("work", "preset", "size", "steps", "pictures")
        for word in (f"--{name}", getattr(arguments, name))
    ]
    found = answer([sys.executable, "-m", "benchmarks.serve", "alone", *options])
    write(file, json.dumps({"asked": asked, "found": found}))
    return found


def prompt_of(seed: int) -> str:
    from benchmarks.batch_h100 import PROMPTS

    return PROMPTS[seed % len(PROMPTS)]


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: seconds of single pictures from a loaded model, and pictures a minute in batches."""
    import torch

    from ernie_image_nf4 import Row, generate_batch, load
    from ernie_image_nf4.generation.single import draw_and_save

    pipe = load(arguments.work / "ERNIE-Image-NF4")
    pipe.set_progress_bar_config(disable=True)
    size: dict[str, Any] = {"height": arguments.size, "width": arguments.size, "guidance": 4.0}
    with tempfile.TemporaryDirectory() as folder:

        def single(seed: int, steps: int) -> float:
            began = time.perf_counter()
            path = Path(folder) / "single.png"
            list(draw_and_save(pipe, [path], prompt_of(seed), seed=seed, steps=steps, **size))
            return time.perf_counter() - began

        def batch(count: int, steps: int, name: str) -> float:
            began = time.perf_counter()
            rows = [Row(prompt_of(seed), seed=seed) for seed in range(count)]
            list(generate_batch(pipe, rows, Path(folder) / name, steps=steps, **size))
            return time.perf_counter() - began

        single(0, 2)
        batch(16, 2, "warm-up")
        singles = [single(seed, arguments.steps) for seed in range(4)]
        seconds = batch(arguments.pictures, arguments.steps, "batch")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "single_seconds": [round(each, 3) for each in singles],
        "batch_pictures_a_minute": round(60 * arguments.pictures / seconds, 3),
    }


if __name__ == "__main__":
    main()
