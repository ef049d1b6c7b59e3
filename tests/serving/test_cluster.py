"""The endpoint on Ray Serve: two replicas of the mini, one of them killed. Runs where Ray is installed."""

from __future__ import annotations

import base64
import inspect
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import yaml
from conftest import CHECKOUT
from running import client_of, until

from ernie_image_nf4 import load
from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.generation.single import draw_and_save

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

REQUESTS, CLIENTS = 24, 4


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    from ernie_image_nf4.serving.cluster import ClusterOptions, app

    with socket.create_server(("127.0.0.1", 0)) as free, pytest.MonkeyPatch.context() as patch:
        port = free.getsockname()[1]
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(CHECKOUT))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder
        ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(ClusterOptions(gpus=0, replicas=2)), name="mini", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[dict[str, str]]:
    """The names of the replicas' actors."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor for actor in actors if "ErnieImage" in actor["name"]]


def test_no_request_is_lost_when_a_replica_is_killed(url, tmp_path):
    client = client_of(url, max_retries=8)

    def draw(seed: int) -> bytes | str:
        fields = {"size": "64x64", "extra_body": {"seed": seed, "steps": 3, "use_pe": False}}
        if seed % 8 == 7:
            fields["size"] = "63x64"
        try:
            answer = client.images.generate(prompt="A cat on the beach", **fields)
        except openai.BadRequestError as error:
            return error.message
        return base64.b64decode(answer.data[0].b64_json)

    assert len(replicas()) == 2
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(draw, seed) for seed in range(REQUESTS)]
        until(lambda: sum(answer.done() for answer in answers) >= REQUESTS // 4)
        ray.kill(ray.get_actor(**replicas()[0]))
        found = [answer.result(60) for answer in answers]
    good = [seed for seed in range(REQUESTS) if seed % 8 != 7]
    assert all("multiple of 16" in str(found[seed]) for seed in range(REQUESTS) if seed not in good)
    paths = [tmp_path / f"{seed}.png" for seed in range(REQUESTS)]
    options = {"height": 64, "width": 64, "steps": 3, "seed": 0, "use_pe": False}
    list(draw_and_save(load(device="cpu"), paths, "A cat on the beach", **options))
    assert [found[seed] for seed in good] == [paths[seed].read_bytes() for seed in good]


def test_the_settings_file_is_what_ray_takes():
    from ray.serve.schema import ServeDeploySchema

    from ernie_image_nf4.serving.cluster import ClusterOptions

    settings = yaml.safe_load((CHECKOUT / "deploy" / "ray-serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(settings).applications
    ClusterOptions.model_validate(application.args)
    assert application.import_path == "ernie_image_nf4.serving.cluster:app"
    assert [deployment.name for deployment in application.deployments] == ["ErnieImage"]


def test_ray_sees_what_to_make_of_the_arguments_of_serve_run():
    from ernie_image_nf4.serving.cluster import ClusterOptions, app

    (options,) = inspect.signature(app).parameters.values()
    assert options.annotation is ClusterOptions  # not its name: Ray would hand on the arguments as a dictionary
    said = ClusterOptions.model_validate({"model": "user/ERNIE-Image-NF4", "gpus": "0", "replicas": "2"})
    assert (said.gpus, said.replicas) == (0, 2)


@pytest.mark.parametrize(("key", "fault"), [("", "would let everybody in"), ("sesame\n", "nobody could get in")])
def test_a_key_that_cant_be_asked_for_is_refused(monkeypatch, key, fault):
    from ernie_image_nf4.serving.cluster import ClusterOptions, app

    monkeypatch.setenv("ERNIE_IMAGE_NF4_API_KEY", key)
    with pytest.raises(InvalidSettings, match=fault):
        app(ClusterOptions(gpus=0))
