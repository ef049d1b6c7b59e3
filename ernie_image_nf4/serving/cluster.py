"""The endpoint on many GPUs and machines, as a deployment of Ray Serve.

``serve run ernie_image_nf4.serving.cluster:app``. Each replica is the application of `application` with an engine of
its own, on the GPU that Ray gives it. Ray spreads the requests, and starts replicas anew or adds some. There is no
page: a page's visitor would have to stay with one replica.
"""

# Without `from __future__ import annotations`: Ray looks whether the annotation of `app`'s argument is a model of
# pydantic, to make one of the arguments, and wouldn't recognize it in a string.

import os
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from ..errors import InvalidSettings
from .application import make_app
from .engine import Engine
from .requests import Limits
from .security import API_KEY, fault_of_api_key


class ClusterOptions(BaseModel):
    """What ``args`` in the settings file, or ``serve run ... NAME=VALUE``, can say.

    Attributes:
        model: Folder or Hub id, on each machine; None for the repository of this package.
        memory: As for `load`, and so are the next two.
        dtype: See there.
        products: See there.
        gpus: GPUs of a replica, each with a worker; 0 for the CPU. A part, 0.5, shares one with another replica.
        replicas: How many; None for one, or for what the settings file says on autoscaling.
        queue_length: Pictures that may wait at a replica.
        time_limit: Seconds for a request, its waiting at the replica included.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    memory: str = "auto"
    dtype: str | None = None
    products: str = "auto"
    gpus: float = 1
    replicas: int | None = None
    queue_length: int = 64
    time_limit: float = 600


def app(options: ClusterOptions) -> serve.Application:
    """The application for ``serve run``. An API key is taken from the environment in which it is called.

    Args:
        options: What each replica loads.

    Raises:
        InvalidSettings: The key is none that can be asked for.
    """
    api_key = os.environ.get(API_KEY)
    if api_key is not None and (fault := fault_of_api_key(api_key)):
        raise InvalidSettings(f"{API_KEY} {fault} Without a key, unset it.")

    def build() -> Any:
        """In the replica."""
        limits = Limits(queue_length=options.queue_length, seconds=options.time_limit)
        loading: dict[str, Any] = {"memory": options.memory, "dtype": options.dtype, "products": options.products}
        devices = () if options.gpus else ("cpu",)
        return make_app(Engine(options.model, devices=devices, limits=limits, **loading), api_key=api_key, page=False)

    replica: Any = serve.deployment(
        serve.ingress(build)(),
        name="ErnieImage",
        ray_actor_options={"num_gpus": options.gpus},
        max_ongoing_requests=options.queue_length,  # What waits at a replica can share a batch
    )
    if options.replicas is not None:
        replica = replica.options(num_replicas=options.replicas)
    return replica.bind()
