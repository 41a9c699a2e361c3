"""``ird serve``: restoring over HTTP, with a page to drop a picture on.

``POST /api/restore?model=…&variant=…&format=png`` takes a picture as the body and answers with the restored one; with
``Accept: application/json`` it answers with JSON that holds it in base64. ``GET /api/models`` lists what there is.
Nothing in a request reaches the file system: models are loaded at the start and chosen by name,
pictures stay in memory.
"""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import Field, ValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from infra.config import Config, ConfigError
from infra.templates import templates
from pipeline.admission import Admission, FullError
from pipeline.budget import parse_bytes
from pipeline.inference import LoadedModel, RestoreOptions, resolve_options
from pipeline.pictures import PictureError, TooLargeError, decode_picture, encode_picture
from pipeline.restore import resolve_model, restore_picture
from training.models import scale_of, variants_of

_TEMPLATES = Path(__file__).parent / "templates"
_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "tif": "image/tiff"}
_PARAMETERS = frozenset({"model", "variant", "format"})
_LOOK_SECONDS = 0.25  # between two looks whether the client is still there
_CLOSED = 499  # a client that left reads no answer; the code is for the log


class ServeConfig(Config):
    """What a server allows."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8090
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1")  # names that a request may address it by
    max_bytes: Annotated[int, Field(ge=1024)] = 20 << 20  # of a body
    max_pixels: Annotated[int, Field(ge=64)] = 4_000_000  # of a picture; of a result four times that
    workers: Annotated[int, Field(ge=1)] = 1  # pictures at work; torch spreads each over all cores
    waiting: Annotated[int, Field(ge=0)] = 8
    timeout: Annotated[float, Field(gt=0)] = 60.0  # seconds from the last byte of a body to the answer
    upload_timeout: Annotated[float, Field(gt=0)] = 20.0  # seconds that a body may take
    connections: Annotated[int, Field(ge=1)] = 64
    memory: int | None = None  # bytes that one picture may take; None: half of those that are free


class RequestError(Exception):
    """An answer that is no picture: its status, what is wrong, and when to come again."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class Restored:
    """A result: encoded, and what the client may want to know of it."""

    data: bytes
    width: int
    height: int
    variant: str
    notes: tuple[str, ...]


def make_app(models: Mapping[str, LoadedModel], config: ServeConfig) -> FastAPI:
    """The application, for uvicorn or any other ASGI server."""
    admission = Admission(config.workers, config.waiting)
    page = templates(_TEMPLATES).get_template("serve.html")
    facts: dict[str, Any] = {"models": [_describe(name, model) for name, model in models.items()]}
    facts |= {"limits": {"bytes": config.max_bytes, "pixels": config.max_pixels}, "formats": list(_TYPES)}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        admission.close()

    app = FastAPI(title="ird", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(config.hosts), www_redirect=False)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
        # A body that was not read to its end leaves the connection in no state to be used again.
        headers |= {"Connection": "close"} if error.status in (408, 413, 429) else {}
        return JSONResponse({"error": str(error)}, error.status, headers)

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        origin = request.headers.get("origin")
        response: Response
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            response = JSONResponse({"error": "requests from pages of other places are refused"}, 403)
        else:
            response = await answer(request)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.get("/")
    async def index() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(page.render(nonce=nonce, facts=facts), headers={"Content-Security-Policy": policy})

    @app.get("/api/models")
    async def list_models() -> dict[str, Any]:
        return facts

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "inside": admission.inside}

    @app.post("/api/restore")
    async def restore(request: Request) -> Response:
        query = request.query_params
        unknown = sorted(set(query) - _PARAMETERS)
        if unknown:
            raise RequestError(
                400, f"unknown parameters {', '.join(unknown)}; allowed: {', '.join(sorted(_PARAMETERS))}"
            )
        name, kind = query.get("model", next(iter(models))), query.get("format", "png")
        if name not in models:
            raise RequestError(404, f"no model of that name; there are: {', '.join(models)}")
        if kind not in _TYPES:
            raise RequestError(400, f"no such format; there are: {', '.join(_TYPES)}")
        # Depths such as [9999,1,1,1], which a person may ask of `ird restore`, would cost what they like.
        named = variants_of(models[name].config)
        variant = query.get("variant", named[-1])
        if variant not in named:
            raise RequestError(400, f"no such variant; there are: {', '.join(named)}")
        options = resolve_options(models[name], RestoreOptions(variant=variant))
        try:
            admission.check()
            body = await _read_body(request, config)
            arrived = time.perf_counter()
            work = admission.enter(lambda: _restore(models[name], body, options, kind, config))
        except FullError as full:
            raise RequestError(429, str(full), full.retry_after) from None
        restored, seconds = await _finished(request, work, config.timeout, admission)
        told = {
            "model": name,
            "variant": restored.variant,
            "width": restored.width,
            "height": restored.height,
            "milliseconds": round(1000 * seconds),
            "waited": round(1000 * (time.perf_counter() - arrived - seconds)),
        }
        if "application/json" in request.headers.get("accept", ""):
            picture = {"type": _TYPES[kind], "picture": base64.b64encode(restored.data).decode()}
            return JSONResponse({**told, "notes": list(restored.notes), **picture})
        headers = {f"X-Ird-{key.title()}": str(value) for key, value in told.items()}
        return Response(restored.data, media_type=_TYPES[kind], headers=headers)

    return app


def _describe(name: str, model: LoadedModel) -> dict[str, Any]:
    variants = variants_of(model.config)
    scale = model.metadata.get("scale", 2) if model.adapts else scale_of(model.config, variants[-1])
    return {"name": name, "network": model.config.name, "variants": list(variants), "scale": scale}


async def _read_body(request: Request, config: ServeConfig) -> bytes:
    """The body, if it is not too large and does not come too slowly."""
    too_large = RequestError(413, f"at most {config.max_bytes:,} bytes are taken")
    try:
        if int(request.headers.get("content-length", "0")) > config.max_bytes:
            raise too_large
    except ValueError:
        raise RequestError(400, "Content-Length is no number") from None
    body = bytearray()
    try:
        async with asyncio.timeout(config.upload_timeout):
            async for piece in request.stream():
                body += piece
                if len(body) > config.max_bytes:
                    raise too_large
    except TimeoutError:
        raise RequestError(408, f"the picture took longer than {config.upload_timeout:g} s to come") from None
    except ClientDisconnect:
        raise RequestError(_CLOSED, "the client left") from None
    if not body:
        raise RequestError(400, "expected a picture as the body")
    return bytes(body)


async def _finished(
    request: Request, work: "Future[tuple[Restored, float]]", timeout: float, admission: Admission
) -> tuple[Restored, float]:
    """What ``work`` gives, unless the client leaves or the time is up; what still waits is then given up."""
    waiting = asyncio.wrap_future(work)
    deadline = time.monotonic() + timeout
    while not waiting.done():
        await asyncio.wait({waiting}, timeout=_LOOK_SECONDS)
        if waiting.done():
            break
        if time.monotonic() > deadline:
            work.cancel()
            raise RequestError(503, f"not done within {timeout:g} s; try again", admission.retry_after())
        if await request.is_disconnected():
            work.cancel()
            raise RequestError(_CLOSED, "the client left")
    try:
        return waiting.result()
    except TooLargeError as error:
        raise RequestError(413, str(error)) from None
    except PictureError as error:
        raise RequestError(400, str(error)) from None
    except (CancelledError, asyncio.CancelledError):
        raise RequestError(503, "the server is stopping", 5) from None
    except (RuntimeError, MemoryError):  # torch says "out of memory" by RuntimeError
        raise RequestError(
            503, "not enough memory for this picture; try a smaller one", admission.retry_after()
        ) from None


def _restore(
    model: LoadedModel, body: bytes, options: RestoreOptions, kind: str, config: ServeConfig
) -> tuple[Restored, float]:
    started = time.perf_counter()
    scale = options.scale or scale_of(
        model.config, options.variant if len(variants_of(model.config)) > 1 else "default"
    )
    picture = decode_picture(body, min(config.max_pixels, 4 * config.max_pixels // scale**2))
    notes: list[str] = []
    restored = restore_picture(model, picture, options, notify=notes.append, memory=config.memory)
    data = encode_picture(restored, f".{kind}")
    height, width = restored.pixels.shape[:2]
    return Restored(data, width, height, options.variant, tuple(notes)), time.perf_counter() - started


def serving(
    sources: Sequence[str], allowed: Sequence[str], budget_mem: str, settings: Mapping[str, Any]
) -> tuple[dict[str, LoadedModel], ServeConfig]:
    """The models behind ``sources``, by the names that clients see, and the configuration.

    A folder goes by its name alone: where it lies is nobody's business.

    Raises:
        ConfigError: a value out of its bounds, or two models of one name.
        RegistryError, ExportError: there is no such model.
    """
    try:
        config = ServeConfig(
            **settings,
            hosts=(*ServeConfig().hosts, *allowed, *([settings["host"]] if settings["host"] != "0.0.0.0" else [])),
            memory=parse_bytes(budget_mem) if budget_mem else None,
        )
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(faults) from None
    models: dict[str, LoadedModel] = {}
    for source in sources:
        name = source if source.startswith("models:") else _name_of(Path(source))
        if name in models:
            raise ConfigError(f"--model {source}: there is a model {name} already; rename the folder")
        models[name] = resolve_model(source, notify=print)
    return models, config


def _name_of(folder: Path) -> str:
    """``runs/finetune/export`` is finetune."""
    parts = [part for part in folder.absolute().parts if part not in ("export", "out", "artifacts")]
    return parts[-1]


def serve(models: Mapping[str, LoadedModel], config: ServeConfig) -> None:
    """Serve until a signal comes; the first line says where."""
    import uvicorn

    print(f"ird serve: {', '.join(models)}", flush=True)
    uvicorn.run(
        make_app(models, config),
        host=config.host,
        port=config.port,
        limit_concurrency=config.connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=10,
        server_header=False,
        access_log=False,
    )
