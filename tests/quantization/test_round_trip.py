"""From a folder to the Hub and back, then drawing without a network: the real client against a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKOUT
from hub_server import Hub, serve

from ernie_image_nf4.repository.components import MODEL_INDEX
from ernie_image_nf4.repository.integrity import verify

ID = "user/ERNIE-Tiny-NF4"
SMALL = {"height": 32, "width": 48, "num_inference_steps": 2, "use_pe": False}

# Draws one picture and prints what it did as JSON. With "shut", every attempt to reach a network is noted and fails.
DRAW = """
import hashlib, json, sys
job = json.loads(sys.argv[1])
attempts = []

def shut(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        attempts.append(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[0]}")
        raise OSError("the network is shut")

if job["shut"]:
    sys.addaudithook(shut)

import torch
torch.set_num_threads(1)
from ernie_image_nf4 import load
from ernie_image_nf4.errors import ErnieImageNF4Error

result = {"attempts": attempts}
try:
    pipe = load(device="cpu", **job["load"])
    generator = torch.Generator("cpu").manual_seed(0)
    image = pipe("a cat", generator=generator, **job["draw"]).images[0]
    result |= {"pixels": hashlib.sha256(image.tobytes()).hexdigest(), "folder": str(pipe.name_or_path)}
except ErnieImageNF4Error as error:
    result["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(result))
"""
# Only finds the folder, which takes no torch.
FIND = (
    DRAW[: DRAW.index("import torch")]
    + """
from ernie_image_nf4.errors import ErnieImageNF4Error
from ernie_image_nf4.repository.resolve import find_repository

result = {"attempts": attempts}
try:
    result["folder"] = str(find_repository(**job["load"]))
except ErnieImageNF4Error as error:
    result["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(result))
"""
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub(repository: Path) -> Iterator[Hub]:
    with serve() as hub:
        yield hub


def environment(hub: Hub, home: Path, **variables: str) -> dict[str, str]:
    """Environment of a user of that Hub. Xet, the Hub's other transfer protocol, would need a server of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    switched_off = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK")
    return {
        **inherited,
        **dict.fromkeys(switched_off, "1"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "PYTHONPATH": str(CHECKOUT),
        **variables,
    }


def hf(hub: Hub, home: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the ``hf`` command."""
    command = [Path(sys.executable).with_name("hf"), *map(str, arguments)]
    return subprocess.run(command, env=environment(hub, home, **variables), capture_output=True, text=True)


def run(
    code: str, hub: Hub, home: Path, *, shut: bool = False, variables: dict[str, str] | None = None, **arguments: object
) -> dict:
    """What a new process has to say that runs `DRAW` or `FIND` with the arguments of `load`."""
    job = {"shut": shut, "load": arguments, "draw": SMALL}
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(job, default=str)],
        env=environment(hub, home, **(variables or {})),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of a repository folder, by path; what the client notes for itself is left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def pixels(repository: Path) -> str:
    """Digest of the picture that the repository draws before it was ever uploaded."""
    import torch

    from ernie_image_nf4 import load

    pipe = load(repository, device="cpu")
    image = pipe("a cat", generator=torch.Generator("cpu").manual_seed(0), **SMALL).images[0]
    assert np.asarray(image).std() > 0
    return hashlib.sha256(image.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def published(hub: Hub, home: Path, repository: Path) -> str:
    """The Hub id of the repository, after `hf upload`."""
    result = hf(hub, home, "upload", ID, repository, HF_TOKEN="hf_owner")
    assert result.returncode == 0, result.stderr
    return ID


# The round trip


def test_what_is_uploaded_is_what_was_there(hub, published, repository):
    files = hub.repositories[published].commits[hub.repositories[published].refs["main"]]
    uploaded = {path: file.sha256 for path, file in files.items()}
    assert uploaded == {name: digest for name, digest in contents(repository).items() if "__pycache__" not in name}
    assert {path for path, file in files.items() if file.lfs} == {
        path for path in files if path.endswith(".safetensors")
    }


@pytest.fixture(scope="module")
def downloaded(hub: Hub, published: str, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as `hf download` laid it down, made read-only."""
    folder = tmp_path_factory.mktemp("download") / "X"
    result = hf(hub, home, "download", published, "--local-dir", folder)
    assert result.returncode == 0, result.stderr
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


@pytest.fixture(scope="module")
def offline(hub: Hub, downloaded: Path) -> list[dict]:
    """What two processes at once say that draw from it, without a network and with a home that nobody can write."""
    nowhere = Path("/proc/nowhere")
    variables = {"HOME": str(nowhere), "XDG_CACHE_HOME": str(nowhere / "cache")}
    with ThreadPoolExecutor(2) as processes:
        options = {"shut": True, "variables": variables, "model": downloaded, "verify": True}
        return [run.result() for run in [processes.submit(run, DRAW, hub, nowhere / "hf", **options) for _ in range(2)]]


def test_downloaded_and_offline_it_draws_the_same_pixels(offline, pixels):
    assert [drawn["pixels"] for drawn in offline] == [pixels, pixels]


def test_from_a_folder_no_connection_is_attempted(offline):
    assert [drawn["attempts"] for drawn in offline] == [[], []]


def test_a_folder_is_what_was_uploaded_before_and_after_loading(downloaded, offline, repository):
    assert len(offline) == 2
    assert contents(downloaded) == contents(repository)


def test_from_the_cache_it_draws_the_same_pixels_online_and_off(hub, published, pixels, tmp_path):
    first = len(hub.requests)
    online = run(DRAW, hub, tmp_path, model=published, verify=True)
    assert online["pixels"] == pixels
    assert len(hub.requests) > first
    before = len(hub.requests)
    offline = run(DRAW, hub, tmp_path, shut=True, variables={"HF_HUB_OFFLINE": "1"}, model=published)
    assert offline == {**online, "attempts": []}
    assert len(hub.requests) == before


def test_the_shut_network_would_have_been_noticed(hub, published, tmp_path):
    found = run(FIND, hub, tmp_path, shut=True, model=published)
    assert found["attempts"]
    assert "could not be downloaded" in found["error"]


def test_quantize_publishes_what_it_made(hub, original, home, tmp_path):
    folder = tmp_path / "nf4"
    command = [sys.executable, "-m", "ernie_image_nf4", "quantize", original, folder, "--device", "cpu", "--quiet"]
    result = subprocess.run(
        [*command, "--push-to-hub", "user/pushed"],
        env=environment(hub, home, HF_TOKEN="hf_owner"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    files = hub.repositories["user/pushed"].commits[hub.repositories["user/pushed"].refs["main"]]
    assert {path: file.sha256 for path, file in files.items()} == contents(folder)
    result = hf(hub, home, "download", "user/pushed", "--local-dir", tmp_path / "X")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "X") == contents(folder)


# Interruptions


@pytest.fixture(scope="module")
def large(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the Hub as ``user/large``: a file of 24 MB, as the client keeps nothing of what it has less than 10 MB of."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(
        np.random.default_rng(0).bytes(24_000_000)
    )
    (folder / MODEL_INDEX).write_text("{}")
    hub.add("user/large", folder)
    return folder


def ranges(hub: Hub) -> list[int]:
    return [int(re.findall(r"\d+", asked)[0]) for _, path, asked in hub.requests if asked and "user/large" in path]


def test_a_lost_connection_is_taken_up_where_it_broke(hub, large, home, tmp_path):
    hub.cut_after = 15_000_000
    for _ in range(2):  # huggingface_hub goes on by itself, or in versions like 1.3 when it is called again
        result = hf(hub, home, "download", "user/large", "--local-dir", tmp_path)
        if result.returncode == 0:
            break
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path) == contents(large)
    assert ranges(hub)[-1] >= 10_000_000


def test_a_killed_download_fetches_only_what_was_not_finished(hub, large, home, tmp_path):
    hub.stall_after = 15_000_000
    command = [Path(sys.executable).with_name("hf"), "download", "user/large", "--local-dir", tmp_path]
    with subprocess.Popen(
        command, env=environment(hub, home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as download:
        assert hub.stalled.wait(60)
        deadline = time.monotonic() + 60
        while not (tmp_path / MODEL_INDEX).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # until the client has noted that the file is complete
        download.send_signal(signal.SIGKILL)
    hub.go_on.set()
    first = len(hub.requests)
    result = hf(hub, home, "download", "user/large", "--local-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path) == contents(large)
    again = [path for method, path, _ in hub.requests[first:] if method == "GET"]
    assert [path for path in again if "/cdn/" in path]
    assert not [path for path in again if path.endswith(MODEL_INDEX)]


# Publishing that fails

PUBLISH = """
import sys
from pathlib import Path
from ernie_image_nf4.errors import UploadFailed
from ernie_image_nf4.repository.upload import create_repository, upload
try:
    if sys.argv[1] == "create":
        create_repository(sys.argv[2])
    else:
        upload(Path(sys.argv[1]), sys.argv[2])
except UploadFailed as error:
    print(error)
"""


def publish(hub: Hub, home: Path, what: object, repo_id: str, **variables: str) -> str:
    """The line that publishing ends in."""
    command = [sys.executable, "-c", PUBLISH, str(what), repo_id]
    result = subprocess.run(command, env=environment(hub, home, **variables), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return result.stdout.strip()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to publish."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "README.md").write_text("# Nothing\n")
    return folder


@pytest.mark.parametrize(("token", "reason"), [("hf_wrong", "Invalid credentials"), ("hf_other", "rights")])
def test_without_the_right_to(hub, page, home, token, reason):
    said = publish(hub, home, "create", "user/new", HF_TOKEN=token)
    assert re.fullmatch(
        rf"Publishing to user/new failed \(.*{reason}.*\): log in with `hf auth login` .*, then .*", said
    )
    assert said.endswith("then repeat the command.")
    hub.add("user/readable", page)
    said = publish(hub, home, page, "user/readable", HF_TOKEN=token)
    assert re.fullmatch(rf"Publishing to user/readable failed \(.*{reason}.*\): log in with `hf auth login` .*", said)
    assert said.endswith(f"then publish the folder, which is complete, with `hf upload user/readable {page}`.")


def test_by_a_server_that_fails(hub, page, home):
    hub.add("user/broken", page, broken=True)
    said = publish(hub, home, page, "user/broken", HF_TOKEN="hf_owner")
    assert re.match(r"Publishing to user/broken failed \(.*501.*\): wait until the Hub is well again, then", said)


def test_without_a_connection(hub, page, home):
    said = publish(hub, home, page, "user/new", HF_TOKEN="hf_owner", HF_ENDPOINT="http://127.0.0.1:9")
    assert re.match(r"Publishing to user/new failed \(.*\): see to the connection, then", said)


def test_with_the_network_off(hub, page, home):
    said = publish(hub, home, page, "user/new", HF_TOKEN="hf_owner", HF_HUB_OFFLINE="1")
    assert re.match(r"Publishing to user/new failed \(.*\): unset HF_HUB_OFFLINE, then", said)


def test_what_quantize_made_is_complete_though_it_can_not_be_published(hub, original, home, tmp_path, page):
    hub.add("user/breaks", page, broken=True)
    command = [sys.executable, "-m", "ernie_image_nf4", "quantize", original, tmp_path / "nf4", "--device", "cpu"]
    result = subprocess.run(
        [*command, "--quiet", "--push-to-hub", "user/breaks"],
        env=environment(hub, home, HF_TOKEN="hf_owner"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith(f"with `hf upload user/breaks {tmp_path / 'nf4'}`.")
    assert all(report.ok for report in verify(tmp_path / "nf4"))
