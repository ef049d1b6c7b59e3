"""A model argument becomes a local folder: this repository, a folder, or one of the Hub by a small server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CHECKOUT
from hub_server import Hub, serve
from small_disk import run_on_small_disk

from ernie_image_nf4.errors import InvalidSettings, RepositoryNotFound
from ernie_image_nf4.repository.components import COMPONENTS, METADATA, MODEL_INDEX, PROMPT_ENHANCER
from ernie_image_nf4.repository.record import open_repository, read_model_index
from ernie_image_nf4.repository.resolve import find_repository

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"  # the discard port: connections are refused


def find(*, endpoint: str = NOWHERE, package: Path = CHECKOUT, environment: dict[str, str] | None = None, **arguments):
    """The path or the error's line from a new process, as the Hub library reads its environment once."""
    code = (
        "import json, sys\n"
        "from ernie_image_nf4.errors import ErnieImageNF4Error\n"
        "from ernie_image_nf4.repository.resolve import find_repository\n"
        "try:\n"
        "    print(find_repository(**json.loads(sys.argv[1])))\n"
        "except ErnieImageNF4Error as error:\n"
        "    print(f'{type(error).__name__}: {error}')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments, default=str)],
        cwd=package,
        env={
            **os.environ,
            "PYTHONPATH": str(package),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.count("\n") == 1
    return result.stdout.strip()


# Folders


def test_a_folder_is_itself(repository):
    assert find_repository(repository) == repository
    assert find_repository(str(repository)) == repository


def test_a_folder_costs_no_network_call(repository):
    assert find(model=repository, endpoint=NOWHERE) == str(repository)


def test_a_folder_wins_over_a_hub_id_of_the_same_spelling(repository, tmp_path, monkeypatch):
    shutil.copytree(repository, tmp_path / "user" / "model")
    monkeypatch.chdir(tmp_path)
    assert find_repository("user/model") == Path("user/model")


def test_no_model_means_the_repository_around_the_package(repository):
    assert find(package=repository) == str(repository)


def test_no_model_and_no_repository_around_the_package(tmp_path):
    shutil.copytree(CHECKOUT / "ernie_image_nf4", tmp_path / "ernie_image_nf4")
    message = find(package=tmp_path)
    assert re.match(r"RepositoryNotFound: No model was named.*name a folder or a Hub id", message)


@pytest.mark.parametrize(
    "model",
    [
        *("./nowhere", "/nowhere/at-all", "~/nowhere/at-all", "nowhere", "a/b/c", "a\\b", ""),
        *("~nobody-is-called-so/model", "x" * 5000),  # for which pathlib raises errors of its own
    ],
)
def test_a_path_that_does_not_exist(model):
    with pytest.raises(RepositoryNotFound, match=r"There is no folder .* a Hub id has the form 'user/name'"):
        find_repository(model)


def test_a_file_is_no_repository(repository):
    with pytest.raises(RepositoryNotFound, match="is a file: name the folder"):
        find_repository(repository / "model_index.json")


def test_a_folder_has_no_other_revision(repository):
    with pytest.raises(InvalidSettings, match="local folder"):
        find_repository(repository, revision="v2")


# The Hub


@pytest.fixture(scope="module")
def hub(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A server with ``user/model``, in which there is more than a pipeline needs, and others that refuse."""
    folder = shutil.copytree(repository, tmp_path_factory.mktemp("hub") / "model")
    for unwanted in ("README.md", "picture.png", "transformer/pytorch_model.bin", "pe/tf_model.h5"):
        (folder / unwanted).write_text("not wanted")
    with serve() as hub:
        hub.add("user/model", folder)
        hub.add("user/gated", folder, gated=True)
        hub.add("user/private", folder, private=True)
        hub.add("user/broken", folder, broken=True)
        yield hub


def names(folder: str | Path) -> set[str]:
    """Paths of all files of a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def needed(folder: Path) -> set[str]:
    """Those of them that the pipeline needs."""
    components = {component.name for component in COMPONENTS}
    return {name for name in names(folder) if name.split("/")[0] in {*components, MODEL_INDEX, METADATA}}


def test_a_hub_id_is_downloaded_without_what_the_pipeline_does_not_need(hub, repository, tmp_path):
    folder = find(endpoint=hub.endpoint, model="user/model", cache_dir=tmp_path)
    assert names(folder) == needed(repository)
    assert [*open_repository(Path(folder)).components] == [component.name for component in COMPONENTS]


def test_without_prompt_enhancer_its_files_stay_on_the_hub(hub, repository, tmp_path):
    folder = find(endpoint=hub.endpoint, model="user/model", cache_dir=tmp_path, prompt_enhancer=False)
    assert names(folder) == {name for name in needed(repository) if name.split("/")[0] not in PROMPT_ENHANCER}


def test_without_weights_only_configurations_are_downloaded(hub, repository, tmp_path):
    folder = find(endpoint=hub.endpoint, model="user/model", cache_dir=tmp_path, weights=False)
    assert names(folder) == {name for name in needed(repository) if not name.endswith(".safetensors")}


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, copy, tmp_path):
    first = hub.add("user/versions", copy)
    hub.repositories["user/versions"].refs |= {"v1": first, "stable": first}
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")
    second = hub.add("user/versions", copy)
    for revision, commit in {"v1": first, "stable": first, first: first, "main": second, None: second}.items():
        folder = find(endpoint=hub.endpoint, model="user/versions", cache_dir=tmp_path, revision=revision)
        assert folder.endswith(commit)
    message = find(endpoint=hub.endpoint, model="user/versions", cache_dir=tmp_path, revision="v9")
    assert message.startswith("RepositoryNotFound: user/versions has no revision 'v9'")


def test_a_repository_that_does_not_exist(hub, tmp_path):
    message = find(endpoint=hub.endpoint, model="user/missing", cache_dir=tmp_path)
    assert re.match(
        r"RepositoryNotFound: There is no folder 'user/missing' and no Hub repository.*hf auth login", message
    )


@pytest.mark.parametrize("token", [False, "hf_other"], ids=["no token", "another user's token"])
def test_a_repository_with_restricted_access(hub, tmp_path, token):
    message = find(endpoint=hub.endpoint, model="user/gated", cache_dir=tmp_path, token=token)
    assert "accept its terms on https://huggingface.co/user/gated" in message


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_a_private_repository_with_a_token_of_its_owner(hub, tmp_path, how):
    given = {"token": "hf_owner"} if how == "argument" else {"environment": {"HF_TOKEN": "hf_owner"}}
    folder = find(endpoint=hub.endpoint, model="user/private", cache_dir=tmp_path, weights=False, **given)
    assert read_model_index(Path(folder))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (False, r"no Hub repository of that name that anyone may read: .* for a private one log in"),
        (
            "hf_other",
            r"no Hub repository of that name that your token may read: .* take a token of an account that may",
        ),
        ("hf_wrong", r"The Hub doesn't accept your token .*hf auth login"),
    ],
    ids=["no token", "another user's token", "a wrong token"],
)
def test_a_private_repository_says_what_is_wrong_with_the_token(hub, tmp_path, token, message):
    error = find(endpoint=hub.endpoint, model="user/private", cache_dir=tmp_path, token=token)
    assert re.match(rf"RepositoryNotFound: .*{message}", error)


def test_a_token_that_is_not_stored(hub, tmp_path):
    environment = {"HF_HOME": str(tmp_path)}
    error = find(endpoint=hub.endpoint, model="user/private", cache_dir=tmp_path, token=True, environment=environment)
    assert error.startswith("RepositoryNotFound: user/private was asked for with a token, and none is stored")


def test_a_server_that_fails(hub, tmp_path):
    message = find(endpoint=hub.endpoint, model="user/broken", cache_dir=tmp_path)
    assert "user/broken could not be downloaded" in message


def test_no_connection(tmp_path):
    message = find(model="user/model", cache_dir=tmp_path)
    assert "could not be downloaded" in message
    assert "`hf download user/model --local-dir X`" in message


DOWNLOAD = """
from ernie_image_nf4.errors import DiskFull
from ernie_image_nf4.repository.resolve import find_repository
try:
    find_repository("user/model", cache_dir="small/cache")
except DiskFull as error:
    print(error)
"""


def test_a_disk_that_is_too_small(hub, tmp_path):
    lines = run_on_small_disk(tmp_path, 200_000, DOWNLOAD, HF_ENDPOINT=hub.endpoint, HF_HUB_DISABLE_XET="1")
    assert lines == [
        "The disk of small/cache is full, user/model has no room there: free some space, or name another disk by "
        "HF_HOME (load's cache_dir), and try again; whole files are kept."
    ]


def test_an_impossible_hub_id():
    assert find(model="us er/model").startswith("RepositoryNotFound: There is no folder 'us er/model'")


# The commands that look at a repository


def run_command(hub: Hub, home: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ernie_image_nf4", *map(str, arguments)],
        cwd=CHECKOUT,
        env=os.environ | environment | variables,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def changed(hub: Hub, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first commit of ``user/changed``; in the second, on its main branch, a byte of the VAE is another one."""
    copy = Path(shutil.copytree(repository, tmp_path_factory.mktemp("changed") / "copy"))
    first = hub.add("user/changed", copy)
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    hub.add("user/changed", copy)
    return first


@pytest.mark.slow
def test_verify_looks_at_the_revision_that_is_asked_for(hub, changed, tmp_path):
    latest = run_command(hub, tmp_path, "verify", "user/changed")
    assert latest.returncode == 1
    assert "was changed: its SHA-256" in latest.stdout
    assert run_command(hub, tmp_path, "verify", "user/changed", "--revision", changed).returncode == 0
    before = len(hub.requests)
    offline = run_command(hub, tmp_path, "verify", "user/changed", "--revision", changed, "--offline")
    assert offline.returncode == 0
    assert len(hub.requests) == before
    elsewhere = run_command(hub, tmp_path / "other", "verify", "user/changed", "--offline")
    assert elsewhere.returncode == 1
    assert "the network is off" in elsewhere.stderr
    assert len(hub.requests) == before


def test_info_looks_at_the_revision_that_is_asked_for(hub, changed, tmp_path):
    for options in ([], ["--offline"]):
        said = run_command(hub, tmp_path, "info", "user/changed", "--revision", changed, *options)
        assert said.returncode == 0
        assert f"snapshots/{changed}" in said.stdout
    missing = run_command(hub, tmp_path, "info", "user/changed", "--revision", "v9")
    assert missing.stderr.splitlines()[-1].startswith("Error: user/changed has no revision 'v9'")


@pytest.mark.parametrize("name", ["info", "verify"])
def test_a_folder_has_one_revision(hub, repository, tmp_path, name):
    said = run_command(hub, tmp_path, name, repository, "--revision", "v1")
    assert said.returncode == 1
    assert "is a local folder, which has just one" in said.stderr


# The Hub's cache, in the layout that huggingface_hub documents


@pytest.fixture
def cache(repository: Path, tmp_path: Path) -> Path:
    """A Hub cache that holds `repository` as ``user/model``."""
    storage = tmp_path / "cache" / "models--user--model"
    shutil.copytree(repository, storage / "snapshots" / COMMIT)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(COMMIT)
    return tmp_path / "cache"


def test_local_files_only_takes_the_cache(cache):
    expected = cache / "models--user--model" / "snapshots" / COMMIT
    assert find(model="user/model", cache_dir=cache, local_files_only=True) == str(expected)


def test_the_offline_variable_takes_the_cache(cache):
    expected = cache / "models--user--model" / "snapshots" / COMMIT
    assert find(model="user/model", cache_dir=cache, environment={"HF_HUB_OFFLINE": "1"}) == str(expected)


def test_no_connection_takes_the_cache(cache):
    assert find(model="user/model", cache_dir=cache).endswith(COMMIT)


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_offline_and_not_in_the_cache(tmp_path, how):
    environment = {"HF_HUB_OFFLINE": "1"} if how == "variable" else {}
    message = find(model="user/model", cache_dir=tmp_path, local_files_only=how == "argument", environment=environment)
    assert "the network is off" in message
    assert "`hf download user/model --local-dir X`, then load 'X'" in message
