"""``ernie-image-nf4 serve`` as a process: it says when it is ready, and ends in order."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time

import openai
import pytest
from running import client_of, serve_command

from ernie_image_nf4.cli import serve
from ernie_image_nf4.errors import InvalidSettings, MissingPackage
from ernie_image_nf4.serving import security
from ernie_image_nf4.serving.extra import check_installed
from ernie_image_nf4.serving.server import bind

DRAWN = {"size": "64x64", "extra_body": {"steps": 100, "seed": 1, "use_pe": False}}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_sigterm_finishes_what_is_drawn_and_refuses_the_rest(repository):
    outcomes: dict[str, object] = {}

    def draw(name: str) -> None:
        try:
            outcomes[name] = client_of(url, "sesame").images.generate(prompt="a cat", **DRAWN).data
        except openai.APIError as error:
            outcomes[name] = error

    arguments = [str(repository), "--device", "cpu"]
    with serve_command(*arguments, ERNIE_IMAGE_NF4_API_KEY="sesame") as (process, url):
        with pytest.raises(openai.AuthenticationError):
            client_of(url, "open").models.list()
        threads = [threading.Thread(target=draw, args=(name,)) for name in ("begun", "waiting")]
        for thread in threads:
            thread.start()
            time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        for thread in threads:
            thread.join(30)
    assert process.returncode in (0, -signal.SIGTERM)
    assert len(outcomes["begun"]) == 1
    assert isinstance(outcomes["waiting"], openai.InternalServerError)
    assert outcomes["waiting"].status_code == 503
    assert "being stopped" in outcomes["waiting"].message
    with pytest.raises(openai.APIConnectionError):
        client_of(url).models.list()


def test_a_host_that_is_not_there_is_told_as_such(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(InvalidSettings, match=r"no address nowhere .* try another --host"):
        bind("nowhere", 0)


def test_an_address_that_is_taken_is_one_line(command, repository):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = command("serve", repository, "--no-page", "--port", taken.getsockname()[1])
    assert found.code == 1
    assert found.err.startswith("Error: Can't listen on 127.0.0.1")
    assert found.err.count("\n") == 1


def test_the_variable_for_the_key_is_the_same_for_a_cluster():
    assert serve.API_KEY == security.API_KEY


@pytest.mark.parametrize("key", ["芝麻", "sesame\n", " sesame", "ses\tame"])
def test_a_key_that_nobody_could_send_is_refused(command, key):
    found = command("serve", "--api-key", key)
    assert found.code == 2
    assert "can't be sent in a header" in " ".join(found.err.split())


def test_an_empty_key_is_refused(command):
    found = command("serve", "--api-key", " ")
    assert found.code == 2
    assert "let everybody in" in found.err


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr("ernie_image_nf4.serving.extra.EXTRAS", {"serve": ("fastapi", "no_such_package")})
    with pytest.raises(
        MissingPackage, match=r'no_such_package is not installed: pip install "ernie-image-nf4\[serve\]"'
    ):
        check_installed()
