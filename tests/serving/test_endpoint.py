"""OpenAI's images API, as OpenAI's own client and others meet it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import openai
import pytest
from conftest import CHECKOUT
from PIL import Image
from running import client_of, running_engine, running_loop, serving, until

from ernie_image_nf4.errors import DrawingFailed, RequestTimedOut, ShuttingDown, WorkerLost
from ernie_image_nf4.generation.image_file import read_settings
from ernie_image_nf4.generation.single import draw_and_save
from ernie_image_nf4.serving.answers import error_answer

SMALL = {"size": "32x32", "extra_body": {"steps": 2, "guidance_scale": 3.0, "seed": 3}}
LONG = {"size": "64x64", "extra_body": {"steps": 100, "seed": 3}, "n": 5}  # takes seconds


@pytest.fixture(scope="module")
def loop():
    with running_loop() as loop:
        yield loop


@pytest.fixture(scope="module")
def engine(loop, repository):
    with running_engine(loop, repository) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(loop, engine):
    with serving(loop, engine, local_only=True) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return client_of(url)


def answered(url: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict, str]:
    """Status, headers and text of an answer to plain HTTP."""
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    request = urllib.request.Request(url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except HTTPError as error:
        return error.code, dict(error.headers), error.read().decode()


# Pictures


def test_openais_client_draws_what_generate_draws(client, pipe, tmp_path):
    path = tmp_path / "cat.png"
    draw = draw_and_save(pipe, [path], "a cat", height=32, width=32, steps=2, guidance=3.0, seed=3)
    ((drawing, _),) = draw
    answer = client.images.generate(prompt="a cat", model="ERNIE-Tiny-NF4", response_format="b64_json", **SMALL)
    assert base64.b64decode(answer.data[0].b64_json) == path.read_bytes()
    assert answer.data[0].revised_prompt == drawing.revised_prompt
    assert abs(answer.created - time.time()) < 60


def test_what_steps_leave_out_is_left_out_as_generate_does(client, pipe, tmp_path):
    path, skipping = tmp_path / "cat.png", {"guidance_until": 0.5, "cache": 2}
    list(draw_and_save(pipe, [path], "a cat", height=32, width=32, steps=6, guidance=3.0, seed=3, **skipping))
    asked = {"steps": 6, "guidance_scale": 3.0, "seed": 3}
    whole, skipped = (
        client.images.generate(prompt="a cat", size="32x32", extra_body=asked | extra) for extra in ({}, skipping)
    )
    assert base64.b64decode(skipped.data[0].b64_json) == path.read_bytes()
    assert {key: read_settings(path)[key] for key in skipping} == {"guidance_until": "0.5", "cache": "2"}
    assert pixels(skipped) != pixels(whole)


def pixels(answer: Any) -> bytes:
    """Those of the first picture of an answer."""
    with Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))) as image:
        return image.tobytes()


def test_several_pictures_have_seeds_that_count_up(client):
    answer = client.images.generate(prompt="a cat", n=3, **SMALL)
    assert [each.seed for each in answer.data] == [3, 4, 5]
    assert len({each.b64_json for each in answer.data}) == 3


def test_what_is_left_open_is_as_the_model_recommends(client, engine):
    answer = client.images.generate(prompt="a cat", size="auto", extra_body={"steps": 1, "use_pe": False})
    with Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))) as image:
        assert image.size == (engine.recommended.width, engine.recommended.height)
        assert image.text["guidance_scale"] == str(engine.recommended.guidance_scale)
    assert answer.data[0].revised_prompt is None


def test_openais_client_gets_progress_and_the_picture_in_a_stream(client):
    whole = client.images.generate(prompt="a cat", **SMALL)
    with client.images.generate(prompt="a cat", stream=True, **SMALL) as stream:
        events = list(stream)
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert [kind for kind in kinds if kind != "queued"] == ["started", "revised_prompt", "step", "step", "completed"]
    assert [(event.step, event.steps) for event in events if event.type.endswith("step")] == [(1, 2), (2, 2)]
    assert events[-1].b64_json == whole.data[0].b64_json


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert model.id == "ERNIE-Tiny-NF4"
    assert client.models.retrieve(model.id) == model


def test_the_lines_of_the_documentation_draw(url, engine, tmp_path, monkeypatch):
    page = (CHECKOUT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = (each for each in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "openai" in each)
    curl = re.search(r"^curl (.*?)\n```", page, re.DOTALL | re.MULTILINE).group(1)
    monkeypatch.chdir(tmp_path)
    small = code.replace("http://127.0.0.1:8000", url).replace("256x256", "32x32").replace('"steps": 25', '"steps": 1')
    exec(compile(small, "docs/serving.md", "exec"), {})
    assert read_settings(tmp_path / "cat.png")["seed"] == "7"
    (path, body) = re.search(r"http://127.0.0.1:8000(\S+) .*?-d '(.*?)'", curl, re.DOTALL).groups()
    status, _, text = answered(url, path, json.dumps(json.loads(body) | {"size": "32x32", "steps": 1}).encode())
    assert status == 200
    assert json.loads(text)["data"][0]["seed"] == 7


# Errors


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"prompt": " "}, "prompt", "empty"),
        ({"size": "33x32"}, "size", "multiple of 16: try 32"),
        ({"size": "huge"}, "size", "write it like"),
        ({"size": "16384x16384"}, "size", "larger than this server draws"),
        ({"n": 11}, "n", "up to 10"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"extra_body": {"steps": 0}}, "steps", "1 or more"),
        ({"extra_body": {"steps": "2"}}, "steps", "valid integer"),
        ({"extra_body": {"guidance_scale": 1e30}}, "guidance_scale", "up to 100"),
        ({"extra_body": {"guidance_until": 1.5}}, "guidance_until", "no share of the steps"),
        ({"extra_body": {"cache": 0}}, "cache", "no number of steps"),
        ({"extra_body": {"cache": 1.5}}, "cache", "valid integer"),
        ({"extra_body": {"seed": -1}}, "seed", "out of range"),
        ({"extra_body": {"stepz": 2}}, "stepz", "no field 'stepz'"),
        ({"extra_body": {"lora": [{"name": "/etc/passwd"}]}}, "lora", "offers none"),
        ({"extra_body": {"image": "http://127.0.0.1/"}}, "image", "no field"),
    ],
)
def test_wrong_fields_are_told_by_openais_own_exception(client, change, param, text):
    with pytest.raises(openai.BadRequestError, match=text) as raised:
        client.images.generate(**{"prompt": "a cat", **change})
    assert raised.value.param == param
    assert raised.value.type == "invalid_request_error"


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="this server has 'ERNIE-Tiny-NF4'"):
        client.images.generate(prompt="a cat", model="dall-e-3")


def test_what_is_no_json_and_what_is_no_route_is_answered_in_the_same_form(url):
    for path, body, status in [("/v1/images/generations", b"{", 400), ("/v1/nothing", None, 404)]:
        found, _, text = answered(url, path, body)
        assert found == status
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'"a cat"'])
def test_a_body_that_is_no_object_is_told_so(url, body):
    status, _, text = answered(url, "/v1/images/generations", body)
    assert (status, "The body is no JSON object" in text) == (400, True)


def test_beside_the_page_too_an_unknown_path_is_answered_in_openais_form(loop, repository):
    # An engine of its own: it ends with the page.
    with running_engine(loop, repository) as engine, serving(loop, engine, page=True) as url:
        for path in ("/v1/nothing", "/v1/images/generations"):
            status, _, text = answered(url, path)
            assert status == 404
            assert "POST /v1/images/generations" in json.loads(text)["error"]["message"]


def test_a_body_that_is_too_large_is_refused_announced_or_not(url, engine):
    body = b'{"prompt": "' + b"x" * engine.limits.max_body_bytes + b'"}'
    assert answered(url, "/v1/images/generations", body)[0] == 413
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
        chunks = (body[start : start + 65536] for start in range(0, len(body), 65536))
        connection.request("POST", "/v1/images/generations", chunks, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413


def test_a_full_queue_tells_when_to_come_again(client, url, engine, monkeypatch):
    monkeypatch.setattr(engine, "limits", replace(engine.limits, queue_length=1))
    with client.images.generate(prompt="a cat", stream=True, **LONG) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="send the request again later") as raised:
            client.images.generate(prompt="a cat", **SMALL)
    assert int(raised.value.response.headers["Retry-After"]) > 0
    assert re.search(r'^ernie_image_requests_total\{outcome="QueueFull"\} 1\.0$', answered(url, "/metrics")[2], re.M)
    until(lambda: not engine.unfinished)


def test_a_time_limit_is_told(client, engine, monkeypatch):
    monkeypatch.setattr(engine, "limits", replace(engine.limits, seconds=0.3))
    with pytest.raises(openai.InternalServerError, match="longer than") as raised:
        client.images.generate(prompt="a cat", **LONG)
    assert raised.value.status_code == 504
    with (
        pytest.raises(openai.APIError, match="longer than"),
        client.images.generate(prompt="a cat", stream=True, **LONG) as stream,
    ):
        list(stream)


@pytest.mark.parametrize(
    ("error", "status", "retried"),
    [
        (DrawingFailed("no memory"), 500, False),
        (RequestTimedOut("too long"), 504, False),
        (WorkerLost("it died", 5), 503, True),
        (ShuttingDown("it ends", 10), 503, True),
    ],
)
def test_openais_client_tries_again_what_can_succeed_later(error, status, retried):
    answer = error_answer(error)
    assert answer.status == status
    assert (answer.headers.get("x-should-retry") != "false") == retried
    assert ("Retry-After" in answer.headers) == retried


# Clients that go away


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_dropped(url, engine, stream):
    address = urlsplit(url)
    body = {"prompt": "a cat", "size": "64x64", "n": 10, "steps": 100, "stream": stream}
    connection = http.client.HTTPConnection(address.netloc, timeout=60)
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
    until(lambda: engine.unfinished and engine.workers[0].batch)
    if stream:
        connection.getresponse().read(20)
    connection.sock.shutdown(2)
    connection.close()
    began = time.monotonic()
    until(lambda: not engine.unfinished and engine.workers[0].idle)
    assert time.monotonic() - began < 3


# Keys and strangers


def test_with_an_api_key_only_who_has_it_is_served(loop, engine):
    with serving(loop, engine, api_key="sesame") as url:
        assert client_of(url, "sesame").images.generate(prompt="a cat", **SMALL).data
        for wrong in ("open", "sesam", "sesame2", "芝麻".encode().decode("latin-1")):
            status, headers, _ = answered(url, "/v1/models", Authorization=f"Bearer {wrong}")
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
        with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
            client_of(url, "open").images.generate(prompt="a cat")
        assert answered(url, "/metrics")[0] == 401
        assert answered(url, "/healthz")[0] == 200


def test_a_web_page_of_somebody_else_is_refused(url):
    assert answered(url, "/healthz", Origin=url)[0] == 200
    assert answered(url, "/healthz", Origin="http://localhost:9")[0] == 200
    for header in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example:8000"}):
        assert answered(url, "/healthz", **header)[0] == 403


# Figures and descriptions


def test_metrics_count_what_became_of_requests(client, url, engine):
    def figures() -> dict[str, float]:
        lines = [line for line in answered(url, "/metrics")[2].splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = figures()
    client.images.generate(prompt="a cat", n=2, **SMALL)
    after = figures()
    drawn = 'ernie_image_requests_total{outcome="drawn"}'
    assert after[drawn] - before[drawn] == 1
    assert after["ernie_image_pictures_total"] - before["ernie_image_pictures_total"] == 2
    assert after["ernie_image_waiting_pictures"] == 0


def test_the_api_describes_itself(url):
    description = json.loads(answered(url, "/openapi.json")[2])
    assert "/v1/images/generations" in description["paths"]
    assert {"negative_prompt", "seed", "use_pe"} <= set(
        description["components"]["schemas"]["ImageRequest"]["properties"]
    )
    assert answered(url, "/docs")[0] == 200


def test_prompts_are_logged_only_where_asked_for(client, engine, caplog, monkeypatch):
    caplog.set_level("ERROR", logger="openai")  # the client's own log has them
    caplog.set_level("DEBUG")
    client.images.generate(prompt="a secret cat", **SMALL)
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="a secret cat", size="x")
    assert "secret" not in caplog.text
    monkeypatch.setattr(engine, "log_prompts", True)
    client.images.generate(prompt="a known cat", **SMALL)
    assert "a known cat" in caplog.text


def test_eight_clients_at_once_all_get_their_own_picture(client):
    bodies = [{"size": "32x32", "extra_body": {"steps": 2, "seed": seed, "use_pe": False}} for seed in range(8)]
    alone = [client.images.generate(prompt="a cat", **body).data[0].b64_json for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: client.images.generate(prompt="a cat", **body).data[0].b64_json, bodies))
    assert together == alone
