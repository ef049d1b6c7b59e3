"""``serve``: a page and OpenAI's images API."""

from __future__ import annotations

import logging
import time
from typing import Annotated, Any

import typer

from .options import (
    DtypeOption,
    ExactOption,
    MemoryOption,
    ModelArgument,
    OfflineOption,
    ProductsOption,
    RevisionOption,
)

logger = logging.getLogger(__name__)

API_KEY = "ERNIE_IMAGE_NF4_API_KEY"


def serve(
    model: ModelArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=API_KEY, help=f"Ask for this key. Better put into {API_KEY}, as others see the options."),
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The web page, or the endpoint only.")] = True,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    device: Annotated[
        list[str] | None,
        typer.Option(help="A worker on this device; may be repeated. Default: all GPUs, or else the best there is."),
    ] = None,
    dtype: DtypeOption = None,
    memory: MemoryOption = "auto",
    products: ProductsOption = "auto",
    exact: ExactOption = False,
    no_pe: Annotated[bool, typer.Option("--no-pe", help="Leave the prompt enhancer out.")] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Offer this LoRA by its name; may be repeated."),
    ] = None,
    max_pixels: Annotated[int, typer.Option(min=256, help="Of a picture.")] = 2048 * 2048,
    max_steps: Annotated[int, typer.Option(min=1, help="Of a picture.")] = 100,
    max_count: Annotated[int, typer.Option(min=1, help="Pictures of a request.")] = 10,
    queue_length: Annotated[int, typer.Option(min=1, help="Pictures that may wait.")] = 64,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds for a request, waiting included.")] = 600,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
) -> None:
    """Draw in the browser and from any OpenAI client: a web page and an endpoint."""
    began = time.monotonic()
    from ..serving.security import fault_of_api_key

    if api_key is not None and (fault := fault_of_api_key(api_key)):
        raise typer.BadParameter(fault, param_hint="--api-key")
    from ..serving.extra import check_installed

    check_installed()
    from ..serving.requests import Limits

    limits = Limits(max_pixels, max_steps, max_count, queue_length=queue_length, seconds=time_limit)
    finding: dict[str, Any] = {"revision": revision, "local_files_only": offline, "prompt_enhancer": not no_pe}
    loading = {"dtype": dtype, "memory": memory, "products": products, "fast": "exact" if exact else True}
    options = {"devices": tuple(device or ()), "limits": limits, "log_prompts": log_prompts, **finding, **loading}
    _run(model, options, lora or [], host, port, api_key, page, began)


def _run(
    model: str | None,
    options: dict[str, Any],
    loras: list[str],
    host: str,
    port: int,
    api_key: str | None,
    page: bool,
    began: float,
) -> None:
    """Serve until a signal comes."""
    import asyncio

    from ..serving.application import make_app
    from ..serving.engine import Engine
    from ..serving.lora import named_loras
    from ..serving.security import is_this_machine
    from ..serving.server import bind, run_server

    named = named_loras(loras)
    bound = bind(host, port)
    local = is_this_machine(bound.getsockname()[0])
    if not local and api_key is None:
        logger.warning("Anybody who reaches %s can draw: set %s to ask for a key.", host, API_KEY)
    engine = Engine(model, loras=named, **options)
    app = make_app(engine, api_key=api_key, page=page, local_only=local and api_key is None)
    asyncio.run(run_server(engine, app, bound, began=began))
