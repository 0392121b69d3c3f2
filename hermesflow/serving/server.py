"""hermesflow serve: images and answers of a model for whatever speaks OpenAI's interface.

    POST /v1/images/generations    POST /v1/chat/completions (one question about one image)
    GET /v1/models   GET /health   GET /metrics (Prometheus)

Requests of many clients are computed together (worker.py). Beside OpenAI's fields images take seed, num_steps,
temperature and guidance_scale; the same seed gives the image that hermesflow generate gives.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from PIL import Image

from hermesflow.config import ConfigError, DrawingConfig
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.models.images import decode_image
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError
from hermesflow.serving.worker import AnswerJob, ImageJob, QueueFullError, Worker

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise InputError("serve: starlette and uvicorn are not installed; run: pip install 'hermesflow[serve]'") from error

MOST_IMAGES = 16
"""Images, or answers, of one request."""
_DRAWN_BY = ("num_steps", "temperature", "guidance_scale")
_IGNORED = {"model", "user", "quality", "style", "background", "moderation", "output_format", "response_format"}
_IMAGE_FIELDS = {"prompt", "n", "size", "seed", *_DRAWN_BY, *_IGNORED}
_CHAT_FIELDS = {
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "n", "stream", "user",
    "stop", "frequency_penalty", "presence_penalty", "logprobs", "metadata", "store",
}  # fmt: skip
_READ_SECONDS = 30.0
_LOOK_SECONDS = 0.5


class RequestError(ValueError):
    """A request that cannot be answered."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """The application, and what it counts."""

    def __init__(
        self, model: Model, name: str, *, max_waiting: int = 256, max_batch: int = 64, max_bytes: int = 32 << 20
    ) -> None:
        """
        Args:
            model: answers.
            name: what it is called.
            max_waiting: requests that may wait.
            max_batch: images, or answers, of one pass.
            max_bytes: of a request.
        """
        self._model, self._name, self._max_bytes = model, name, max_bytes
        self.worker = Worker(model, max_waiting=max_waiting, max_batch=max_batch)
        self._counts: Counter[tuple[str, int]] = Counter()
        self._made: Counter[str] = Counter()
        self._began = time.time()
        routes = [
            Route("/v1/images/generations", self._counted(self._images), methods=["POST"]),
            Route("/v1/chat/completions", self._counted(self._chat), methods=["POST"]),
            Route("/v1/models", self._counted(self._models)),
            Route("/health", self._counted(self._health)),
            Route("/metrics", self._metrics),
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self._no_such_route})
        self.app.router.redirect_slashes = False

    def _counted(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The same, with errors as OpenAI words them, and counted."""

        async def handle(request: Request) -> Response:
            try:
                response = await answer(request)
            except RequestError as error:
                response = _error(str(error), error.status)
            except QueueFullError as error:
                response = _error(str(error), 429)
                response.headers["Retry-After"] = "1"
            except InputError as error:
                response = _error(str(error), 400)
            except ClientDisconnect:
                response = _error("the client left", 499)
            except Exception as error:  # of the model; the others go on
                response = _error(f"the model failed ({type(error).__name__}: {error})", 500)
            self._counts[request.url.path, response.status_code] += 1
            return response

        return handle

    async def _images(self, request: Request) -> Response:
        given = await self._body(request, _IMAGE_FIELDS)
        prompt, count = given.get("prompt"), _number(given, "n", 1, 1, MOST_IMAGES)
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError("prompt: expected words")
        if given.get("response_format", "b64_json") != "b64_json" or given.get("output_format", "png") != "png":
            raise RequestError("response_format: images are sent as b64_json, in PNG alone")
        size = f"{self._model.image_size}x{self._model.image_size}"
        if given.get("size", "auto") not in ("auto", None, size):
            raise RequestError(f"size: this model draws {size} alone")
        chosen = {name: given[name] for name in _DRAWN_BY if given.get(name) is not None}
        try:
            sampling = self._model.sampling_of(replace(DrawingConfig(), **chosen))
        except ConfigError as error:
            raise RequestError(f"{error.key}: {error.reason}") from error
        first = _number(given, "seed", uuid.uuid4().int % 2**31, 0, 2**62 - MOST_IMAGES)
        seeds = tuple(range(first, first + count))
        job = ImageJob(key=sampling, size=count, prompt_ids=self._model.user_prompt(prompt, "prompt"), seeds=seeds)
        images = await self._done(request, self.worker.submit(job))
        self._made["images"] += count
        data = [{"b64_json": _png(pixels), "seed": seed} for pixels, seed in zip(images, seeds, strict=True)]
        return JSONResponse({"created": int(time.time()), "data": data, "size": size})

    async def _chat(self, request: Request) -> Response:
        given = await self._body(request, _CHAT_FIELDS)
        if given.get("stream"):
            raise RequestError("stream: answers are sent whole; set it to false")
        question, image = _question(given.get("messages"))
        most = _number(given, "max_tokens", self._model.prompts.max_answer_tokens, 1, 4096)
        most = _number(given, "max_completion_tokens", most, 1, 4096)
        count = _number(given, "n", 1, 1, MOST_IMAGES)
        params = SamplingParams(
            temperature=_real(given, "temperature", 1.0, 0.0, 2.0), top_k=0,
            top_p=_real(given, "top_p", 1.0, 1e-6, 1.0), min_p=0.0, max_new_tokens=most,
        )  # fmt: skip
        first = _number(given, "seed", uuid.uuid4().int % 2**31, 0, 2**62 - MOST_IMAGES)
        asked = self._model.question_prompt(question)
        seeds = tuple(range(first, first + count))
        job = AnswerJob(key=params, size=count, image=image, question_ids=asked, seeds=seeds)
        answers = await self._done(request, self.worker.submit(job))
        self._made["answers"] += count
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": self._model.decode_text(ids)},
                "finish_reason": "length" if len(ids) >= most else "stop",
            }
            for number, ids in enumerate(answers)
        ]
        written = sum(map(len, answers))
        usage = {"prompt_tokens": len(asked), "completion_tokens": written, "total_tokens": len(asked) + written}
        return JSONResponse({
            "id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time()),
            "model": self._name, "choices": choices, "usage": usage,
        })  # fmt: skip

    async def _models(self, request: Request) -> Response:
        entry = {"id": self._name, "object": "model", "created": int(self._began), "owned_by": "hermesflow"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self.worker.num_waiting})

    async def _metrics(self, request: Request) -> Response:
        lines = ["# TYPE hermesflow_requests_total counter"]
        for (path, status), count in sorted(self._counts.items()):
            lines.append(f'hermesflow_requests_total{{path="{path}",status="{status}"}} {count}')
        for kind in ("images", "answers"):
            lines += [f"# TYPE hermesflow_{kind}_total counter", f"hermesflow_{kind}_total {self._made[kind]}"]
        lines += ["# TYPE hermesflow_batches_total counter", f"hermesflow_batches_total {self.worker.num_batches}"]
        lines += ["# TYPE hermesflow_waiting gauge", f"hermesflow_waiting {self.worker.num_waiting}"]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def _no_such_route(self, request: Request, error: HTTPException) -> Response:
        """An unknown path, or a method that it has not."""
        return _error(error.detail, error.status_code, error.headers)

    async def _body(self, request: Request, known: set[str]) -> dict[str, Any]:
        """The JSON object of a request, within time and size. Raises: RequestError."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(_READ_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size > self._max_bytes:
                        raise RequestError(f"the request is larger than {self._max_bytes} bytes", 413)
                    parts.append(part)
        except TimeoutError as error:
            raise RequestError("the request came too slowly", 408) from error
        try:
            given = json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise RequestError("the request is no JSON") from error
        if not isinstance(given, dict):
            raise RequestError("the request is no JSON object")
        unknown = sorted(given.keys() - known)
        if unknown:
            raise RequestError(f"{unknown[0][:80]!r} is no field that is known here; leave it out")
        return given

    async def _done(self, request: Request, future: Future) -> Any:
        """The result of a job, which is taken out of the row where its client leaves."""
        waiting = asyncio.wrap_future(future)
        while True:
            done, _ = await asyncio.wait([waiting], timeout=_LOOK_SECONDS)
            if done:
                return waiting.result()
            if await request.is_disconnected():
                future.cancel()
                raise ClientDisconnect()


def run_server(
    model: Model, name: str, host: str, port: int, *, max_waiting: int, max_batch: int, max_bytes: int
) -> None:
    """Answers until it is stopped. Raises: InputError if uvicorn is not installed."""
    try:
        import uvicorn
    except ImportError as error:
        raise InputError("serve: uvicorn is not installed; run: pip install 'hermesflow[serve]'") from error
    server = Server(model, name, max_waiting=max_waiting, max_batch=max_batch, max_bytes=max_bytes)
    try:
        uvicorn.run(server.app, host=host, port=port, log_level="warning", timeout_keep_alive=10)
    finally:
        server.worker.close()


def _question(messages: Any) -> tuple[str, Image.Image]:
    """The text and the image of a conversation of one turn; what a system says stands before the question.

    Raises: RequestError.
    """
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        raise RequestError("messages: expected a list of messages")
    texts, images = [], []
    turns = [item for item in messages if item.get("role") not in ("system", "developer")]
    if len(turns) != 1 or turns[0].get("role") != "user":
        raise RequestError("messages: expected one message of a user; the model answers one question about one image")
    for item in messages:
        content = item.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise RequestError("messages: expected content as text, or a list of parts")
        for part in parts:
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif part.get("type") == "image_url":
                url = part.get("image_url")
                images.append(_image(url.get("url") if isinstance(url, dict) else url))
            else:
                raise RequestError("messages: expected parts of type text and image_url")
    question = "\n".join(text.strip() for text in texts if text.strip())
    if len(images) != 1 or not question:
        raise RequestError(f"messages: expected one image and a question, got {len(images)} images")
    return question, images[0]


def _image(url: Any) -> Image.Image:
    """Of a data: address; nothing is fetched. Raises: RequestError."""
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url[:64]:
        raise RequestError("image_url: expected data:image/...;base64,...; nothing is fetched from other addresses")
    try:
        data = base64.b64decode(url.partition(",")[2], validate=True)
        return decode_image(data, "image_url", lambda image: image.convert("RGB"))
    except (binascii.Error, InputError) as error:
        raise RequestError(f"image_url: {error}") from error


def _number(given: dict[str, Any], name: str, usual: int, low: int, high: int) -> int:
    value = given.get(name)
    if value is None:
        return usual
    if type(value) is not int or not low <= value <= high:
        raise RequestError(f"{name}: expected a whole number from {low} to {high}")
    return value


def _real(given: dict[str, Any], name: str, usual: float, low: float, high: float) -> float:
    value = given.get(name)
    if value is None:
        return usual
    if type(value) not in (int, float) or not low <= value <= high:
        raise RequestError(f"{name}: expected a number from {low:g} to {high:g}")
    return float(value)


def _png(pixels: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _error(message: str, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status_code=status, headers=headers)
