"""Mutated repositories against `verify`, `info` and `load`: each must work with the right result, or say what is wrong.

    python -m benchmarks.fuzz --cases 2000 --output benchmarks/fuzz.json

A case is an integer, the seed of its mutations; ``--first N --cases 1 --keep FOLDER`` makes its folder again. It runs
in a process forked after all imports, with 2 GiB of memory, and 20 s for each of the three functions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ernie_image_nf4 import load, verify
from ernie_image_nf4.errors import ErnieImageNF4Error
from ernie_image_nf4.repository.components import COMPONENTS, METADATA
from ernie_image_nf4.repository.describe import describe
from ernie_image_nf4.repository.metadata import installed_versions
from ernie_image_nf4.repository.record import open_repository

SECONDS = 20
MEMORY = 2 << 30
# Values that replace a setting: ends of number ranges, other types, paths, names that exist elsewhere.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**16, 2**20, 2**31, 2**63, 10**30, -(2**31), 0.0, 0.5, -1.5, 1e-300,
    1e308, "", "x", "nf4", "fp4", "float32", "int8", "bitsandbytes", "gptq", "main", "../../etc/passwd", "/etc/passwd",
    "\x00", "é" * 300, "torch", "sdpa", "user/kernel", [], [1], [None], [0, 0], ["os", "system"], {}, {"a": 1},
    [[[[[[1]]]]]], list(range(2000)),
)  # fmt: skip
STRANGERS = {
    "adapter_config.json": '{"base_model_name_or_path": "user/other", "peft_type": "LORA"}',
    "model.safetensors.index.json": '{"weight_map": {"a": "../../x.safetensors"}}',
    "diffusion_pytorch_model.safetensors.index.json": '{"weight_map": {"a": "/etc/x.safetensors"}}',
    "modeling.py": "raise SystemExit('code from the repository ran')",
    "transformers.py": "raise SystemExit('code from the repository ran')",
    "pytorch_model.bin": "no pickle",
    "generation_config.json": '{"max_length": 1e9, "custom_generate": "x"}',
    "special_tokens_map.json": '{"eos_token": {"content": 5}}',
    "added_tokens.json": '{"<new>": 99999999}',
    "chat_template.jinja": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}


@dataclass
class Result:
    """Outcome of a case.

    Attributes:
        seed: Of its mutations.
        mutations: What was changed.
        outcomes: Function -> ``"works"`` or ``"refused"``.
        violations: What must not happen, one line each.
        seconds: Function -> wall time.
        peak: Largest resident size of the process in bytes.
    """

    seed: int
    mutations: list[str] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak: int = 0


# Mutations: each changes the folder and returns what it did


def mutate(folder: Path, seed: int) -> list[str]:
    """Change a repository in one to three ways. Half of the cases lose their metadata too, so that no digest helps."""
    choose = random.Random(seed)
    done = []
    if choose.random() < 0.5:
        (folder / METADATA).unlink()
        done.append(f"removed {METADATA}")
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        mutation = choose.choice(MUTATIONS)
        files = [path for path in _files(folder) if path.is_file()]
        done.append(f"{mutation.__name__} {mutation(folder, choose.choice(files), choose)}")
    return done


def flip(folder: Path, file: Path, choose: random.Random) -> str:
    content = bytearray(file.read_bytes()) or bytearray(1)
    end = len(content) if choose.random() < 0.5 else min(len(content), 4000)  # Headers and settings stand at the start
    places = [choose.randrange(end) for _ in range(choose.choice((1, 1, 4, 32)))]
    for place in places:
        content[place] ^= 1 << choose.randrange(8)
    file.write_bytes(content)
    return f"{file.relative_to(folder)} at {places[:4]}"


def truncate(folder: Path, file: Path, choose: random.Random) -> str:
    size = choose.choice((0, 1, 8, file.stat().st_size - 1, choose.randrange(file.stat().st_size + 1)))
    os.truncate(file, max(size, 0))
    return f"{file.relative_to(folder)} to {size}"


def extend(folder: Path, file: Path, choose: random.Random) -> str:
    with file.open("ab") as stream:
        stream.write(choose.randbytes(choose.choice((1, 8, 1000))))
    return str(file.relative_to(folder))


def swap(folder: Path, file: Path, choose: random.Random) -> str:
    same = [path for path in _files(folder) if path.suffix == file.suffix and path != file and path.is_file()] or [file]
    other = choose.choice(same)
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)
    return f"{file.relative_to(folder)} and {other.relative_to(folder)}"


def remove(folder: Path, file: Path, choose: random.Random) -> str:
    target = file if choose.random() < 0.8 or file.parent == folder else file.parent
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    return str(target.relative_to(folder))


def rename(folder: Path, file: Path, choose: random.Random) -> str:
    component = folder / choose.choice(COMPONENTS).name
    component.mkdir(exist_ok=True)
    target = choose.choice(
        (component / file.name, file.with_name(f"{file.stem}x{file.suffix}"), file.with_suffix(".bin"))
    )
    if target != file:
        file.replace(target)
    return f"{file.relative_to(folder)} to {target.relative_to(folder)}"


def replace_by_folder_or_link(folder: Path, file: Path, choose: random.Random) -> str:
    target = choose.choice(("a folder", "/etc/hostname", "/dev/zero", "missing", file.name, "../README.md"))
    file.unlink()
    if target == "a folder":
        file.mkdir()
    else:
        file.symlink_to(target)
    return f"{file.relative_to(folder)} by {target}"


def add_stranger(folder: Path, file: Path, choose: random.Random) -> str:
    name = choose.choice(sorted(STRANGERS))
    target = folder / choose.choice(COMPONENTS).name / name
    target.parent.mkdir(exist_ok=True)
    if target.is_dir():
        return "nothing"
    target.write_text(STRANGERS[name])
    return str(target.relative_to(folder))


def change_json(folder: Path, file: Path, choose: random.Random) -> str:
    files = [
        path for path in _files(folder) if path.suffix == ".json" and path.is_file() and path.name != "tokenizer.json"
    ]
    file = choose.choice(files or [file])
    try:
        value = json.loads(file.read_text())
    except ValueError:
        return "nothing"
    said = _change_value(value, choose)
    file.write_text(json.dumps(value))
    return f"{file.relative_to(folder)}: {said}"


def change_tokenizer(folder: Path, file: Path, choose: random.Random) -> str:
    files = [path for path in folder.glob("*/tokenizer.json") if path.is_file()]
    file = choose.choice(files or [file])
    try:
        value = json.loads(file.read_bytes())
    except ValueError:
        return "nothing"
    said = _change_value(value, choose)
    file.write_text(json.dumps(value))
    return f"{file.relative_to(folder)}: {said}"


def change_header(folder: Path, file: Path, choose: random.Random) -> str:
    files = [path for path in folder.glob("*/*.safetensors") if path.is_file()]
    file = choose.choice(files or [file])
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError:
        return "nothing"
    said = _change_value(header, choose)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return f"{file.relative_to(folder)}: {said}"


def change_tensor(folder: Path, file: Path, choose: random.Random) -> str:
    files = [path for path in folder.glob("*/*.safetensors") if path.is_file()]
    file = choose.choice(files or [file])
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError):
        return "nothing"
    name = choose.choice(sorted(tensors) or ["none"])
    tensor = tensors.pop(name, torch.zeros(1))
    how = choose.choice(("drop", "rename", "shorten", "reshape", "convert", "nan", "settings"))
    if how == "rename":
        tensors[f"{name}x"] = tensor
    elif how == "shorten":
        tensors[name] = tensor.flatten()[:-1].clone()
    elif how == "reshape":
        tensors[name] = tensor.reshape(1, -1)
    elif how == "convert":
        tensors[name] = tensor.to(choose.choice((torch.float32, torch.float16, torch.uint8, torch.int64, torch.bool)))
    elif how == "nan":
        tensors[name] = (
            torch.full_like(tensor, choose.choice((float("nan"), float("inf"))))
            if tensor.is_floating_point()
            else tensor
        )
    elif how == "settings":
        tensors[name] = tensor
        if states := [key for key in sorted(tensors) if "quant_state" in key]:
            name = choose.choice(states)
            try:
                value = json.loads(tensors[name].numpy().tobytes())
            except ValueError:
                value = {}
            _change_value(value, choose)
            tensors[name] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{file.relative_to(folder)}: {how} {name}"


MUTATIONS: tuple[Callable[[Path, Path, random.Random], str], ...] = (
    flip, flip, truncate, extend, swap, remove, rename, replace_by_folder_or_link, add_stranger,
    change_json, change_json, change_json, change_json, change_tokenizer, change_header, change_header, change_tensor,
    change_tensor,
)  # fmt: skip


def _files(folder: Path) -> list[Path]:
    """The components' files and the two files beside the components, as far as they still exist."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] in OURS)


OURS = {*(component.name for component in COMPONENTS), "model_index.json", METADATA}


def _change_value(value: Any, choose: random.Random) -> str:
    """Replace, remove, add or exchange a value somewhere in a JSON value, in place; returns what was done and where."""
    path = []
    while isinstance(value, dict | list) and value:
        key = choose.choice(sorted(value)) if isinstance(value, dict) else choose.randrange(len(value))
        path.append(str(key))
        if isinstance(value[key], dict | list) and value[key] and choose.random() < 0.8:
            value = value[key]
            continue
        how = choose.choice(("replace", "replace", "replace", "remove", "exchange", "add"))
        if how == "replace":
            value[key] = choose.choice(VALUES)
        elif how == "remove":
            del value[key]
        elif how == "exchange":
            other = choose.choice(sorted(value)) if isinstance(value, dict) else choose.randrange(len(value))
            value[key], value[other] = value[other], value[key]
        elif isinstance(value, dict):
            value[choose.choice(("auto_map", "quantization_config", "x", "num_labels", "rope_scaling"))] = (
                choose.choice(VALUES)
            )
        else:
            value.append(choose.choice(VALUES))
        return f"{how} {'.'.join(path)}"
    return "nothing"


# One case


def check(original: Path, folder: Path, result: Result) -> None:
    """Run the three functions on a mutated copy, and note the outcomes in the result."""
    digests = (folder / METADATA).is_file() and _content(original / METADATA) == _content(folder / METADATA)
    changed = digests and _contents(original) != _contents(folder)

    def verify_it() -> bool:
        passed = all(report.ok for report in verify(folder))
        if passed and changed:
            result.violations.append("verify passes although bytes have changed")
        return passed

    functions = {
        "verify": verify_it,
        "info": lambda: bool(describe(open_repository(folder, weights=False))),
        "load": lambda: load(folder, device="cpu") is not None,
    }
    for name, function in functions.items():
        started = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            result.outcomes[name] = "works" if function() else "refused"
        except ErnieImageNF4Error as error:
            result.outcomes[name] = "refused"
            if not str(error).strip() or "\n" in str(error):
                result.violations.append(f"{name}: a message of no or several lines: {error}")
        except BaseException as error:  # What the search is for
            text = f"{type(error).__module__}.{type(error).__name__}: {str(error)[:300]}"
            result.violations.append(f"{name}: {text}")
        finally:
            signal.alarm(0)
        result.seconds[name] = time.perf_counter() - started
    result.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if result.peak > MEMORY:
        result.violations.append(f"peak of {result.peak:,} bytes")


def run_case(original: Path, seed: int, work: Path) -> Result:
    """Make a mutated copy below `work` and check it in a forked process. A process that dies is a violation too."""
    folder = work / f"case-{seed}"
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("ernie_image_nf4"))
    result = Result(seed, mutations=mutate(folder, seed))
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiver)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            signal.signal(signal.SIGALRM, _time_is_up)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            check(original, folder, result)
            with os.fdopen(sender, "w") as stream:
                json.dump(vars(result), stream)
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as stream:
        text = _read_within(stream.fileno(), 3 * SECONDS + 10)
    if not text:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    shutil.rmtree(folder)
    if text:
        return Result(**json.loads(text))
    result.violations.append(f"the process died or hung (status {status})")
    return result


def _read_within(descriptor: int, seconds: float) -> str:
    import select

    parts, deadline = [], time.monotonic() + seconds
    while select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b"".join(parts).decode()
        parts.append(part)
    return ""


def _time_is_up(*_: object) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() and file.resolve().stat().st_size < 1 << 24 else None


def _contents(folder: Path) -> dict[str, bytes | None]:
    """Contents of the files that the metadata has digests of: those in the components' folders."""
    return {str(path.relative_to(folder)): _content(path) for path in _files(folder) if path.parent != folder}


# All cases


def run(original: Path, first: int, cases: int, progress: bool = True) -> dict[str, Any]:
    """Run cases `first`, `first` + 1 ... and sum up their outcomes."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("verify", "info", "load")}
    kinds: Counter[str] = Counter()
    violations, slowest, peak = [], dict.fromkeys(counts, 0.0), 0
    started = time.perf_counter()
    load(original, device="cpu")  # Libraries' lazy imports, before the first fork
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        for seed in range(first, first + cases):
            result = run_case(original, seed, Path(work))
            kinds.update(mutation.split()[0] for mutation in result.mutations)
            for name, outcome in result.outcomes.items():
                counts[name][outcome] += 1
                slowest[name] = max(slowest[name], result.seconds[name])
            peak = max(peak, result.peak)
            if result.violations:
                violations.append({"seed": seed, "mutations": result.mutations, "violations": result.violations})
                if progress:
                    print(f"seed {seed}: {result.mutations}: {result.violations}", flush=True)
            if progress and (seed - first + 1) % 100 == 0:
                print(f"{seed - first + 1} of {cases}, {len(violations)} violations", flush=True)
    return {
        "seeds": [first, first + cases - 1],
        "cases": cases,
        "violations": violations,
        "outcomes": {name: dict(counter) for name, counter in counts.items()},
        "mutations": dict(kinds.most_common()),
        "slowest_seconds": {name: round(value, 2) for name, value in slowest.items()},
        "peak_resident_bytes": peak,
        "limits": {"seconds": SECONDS, "bytes": MEMORY},
        "wall_seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    from ernie_image_nf4.quantization.convert import quantize
    from ernie_image_nf4.quantization.synthetic import synthesize

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--keep", type=Path, help="only make the first case, in this folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        source = synthesize(Path(folder) / "tiny", preset="tiny", progress=False)
        original = quantize(source, Path(folder) / "tiny-nf4", device="cpu", progress=False)
        if arguments.keep:
            shutil.copytree(original, arguments.keep, ignore=shutil.ignore_patterns("ernie_image_nf4"))
            print(mutate(arguments.keep, arguments.first))
            return
        report = {
            "command": f"python -m benchmarks.fuzz --first {arguments.first} --cases {arguments.cases}",
            "repository": "synthesize --preset tiny, quantized",
            "versions": {"python": platform.python_version(), **installed_versions()},
            **run(original, arguments.first, arguments.cases),
        }
    text = json.dumps(report, indent=2) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    print(text)
    if report["violations"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
