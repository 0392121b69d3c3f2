"""Judges of a suite's images: a result file of its own, the model's answers, or an OpenAI-compatible endpoint.

A judge that answers questions keeps what it said in answers-NAME.jsonl, an image a line, and asks no image twice.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from PIL import Image

from hermesflow.evaluation.suites.drawing import IMAGES, pictures_of, read_settings
from hermesflow.evaluation.suites.mask2former import write_results
from hermesflow.evaluation.suites.suite import Marks, Suite, SuiteFile, SuitePrompt, SuiteQuestion, marks_of_answers
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError, expand_home, read_text, reason_of, shown
from hermesflow.runtime.progress import track
from hermesflow.runtime.text import plain_text
from hermesflow.scoring.matching import find_choice

Ask = Callable[[Image.Image, Sequence[SuiteQuestion]], str]
"""An image and its questions -> a digit a question, 1 where the answer is right. Raises: ConnectionError if the judge
gives none."""
_RETRIES, _WAIT, _TIMEOUT, _WORKERS = 6, 0.5, 120.0, 8
_MOST_BYTES = 1 << 20


def judge_suite(
    suite: Suite,
    prompts: Sequence[SuitePrompt],
    folder: Path,
    judge: str,
    *,
    model: Callable[[], Model] | None = None,
    judge_model: str = "",
) -> Marks:
    """What a judge says of a suite's images.

    Args:
        suite, prompts: the suite.
        folder: that of draw_suite.
        judge: "import:FILE", "self", the address of an endpoint, such as http://127.0.0.1:8000/v1, or for GenEval
            "mask2former:FOLDER" (mask2former.py).
        model: opens the model that answers for "self".
        judge_model: what the endpoint calls its model; empty: the first that it lists.
    Raises: InputError on a judge that is none, a suite that it cannot judge, or images that it gave no answer about.
    """
    kind, _, rest = judge.partition(":")
    if kind == "import" and rest:
        return suite.read_results(Path(expand_home(rest)), prompts)
    if kind == "mask2former" and rest:
        path = folder / f"results-{_slug(judge)}.jsonl"
        write_results(suite, prompts, folder, Path(expand_home(rest)), path)
        return suite.read_results(path, prompts)
    if not all(prompt.questions for prompt in prompts):
        raise InputError(
            f"--judge {judge}: the suite has no questions that it could answer; use the suite's own judge on "
            f"{folder / IMAGES}, and give its result by --judge import:FILE"
        )
    if judge == "self" and model is not None:
        ask, workers = _SelfJudge(model), 1
    elif kind in ("http", "https"):
        endpoint = Endpoint(judge, judge_model)
        ask, workers = endpoint, _WORKERS
        judge = f"{judge} {endpoint.model}"
    else:
        raise InputError(
            f"--judge {shown(judge)}: expected import:FILE, self, mask2former:FOLDER or the address of an endpoint"
        )
    count = int(read_settings(folder)["num_images"])
    files = [(prompt, file) for row, prompt in enumerate(prompts) for file in suite.files_of(prompt, row, count)]
    return marks_of_answers(suite, prompts, _answers(files, folder, judge, ask, workers))


def _answers(
    files: Sequence[tuple[SuitePrompt, SuiteFile]], folder: Path, judge: str, ask: Ask, workers: int
) -> dict[str, list[str]]:
    """By prompt, a text of digits an image; new ones are added to the judge's file as they come."""
    path = folder / f"answers-{_slug(judge)}.jsonl"
    known = _read_answers(path, judge) if path.is_file() else {}
    left = [(prompt, file) for prompt, file in files if any((file.path, number) not in known for number in file.images)]
    failed: list[str] = []

    def work(item: tuple[SuitePrompt, SuiteFile]) -> list[dict[str, Any]]:
        prompt, file = item
        pictures = zip(file.images, pictures_of(file, folder / IMAGES), strict=True)
        wanted = [(number, picture) for number, picture in pictures if (file.path, number) not in known]
        digits = [(number, ask(picture, prompt.questions)) for number, picture in wanted]
        return [{"file": file.path, "image": number, "right": text, "judge": judge} for number, text in digits]

    with open(path, "a", encoding="utf-8") as out:
        for item, done in _side_by_side(track(left, "judging", "files"), work, workers):
            try:
                lines = done()
            except ConnectionError as error:
                failed.append(f"{item[1].path}: {error}")
                continue
            for line in lines:
                known[line["file"], line["image"]] = line["right"]
                out.write(json.dumps(line) + "\n")
            out.flush()
    if failed:
        raise InputError(
            f"{judge}: gave no answer about {len(failed)} of {len(files)} files ({failed[0]}); the others are kept in "
            f"{path}, give the same command again"
        )
    found: dict[str, list[str]] = {}
    for prompt, file in files:
        found.setdefault(prompt.id, []).extend(known[file.path, number] for number in file.images)
    for prompt, _ in files:
        if any(len(digits) != len(prompt.questions) for digits in found[prompt.id]):
            raise InputError(f"{path}: was made with other questions; remove it, or give those")
    return found


def _side_by_side(items: Any, work: Callable[[Any], Any], workers: int) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """(item, what gives its result or raises), as they come; few are begun ahead."""
    with ThreadPoolExecutor(workers) as pool:
        running: dict[Future, Any] = {}
        for item in items:
            running[pool.submit(work, item)] = item
            if len(running) >= 2 * workers or workers == 1:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result
        for future, item in running.items():
            yield item, future.result


class _SelfJudge:
    """The model's own answers, by the likelihood of the choices; it is opened at the first question."""

    def __init__(self, open_model: Callable[[], Model]) -> None:
        self._open_model = open_model

    @functools.cached_property
    def _model(self) -> Model:
        return self._open_model()

    def __call__(self, picture: Image.Image, questions: Sequence[SuiteQuestion]) -> str:
        digits = ""
        for question in questions:
            right = question.answer.strip()
            choices = self._model.merge_choices([choice.strip() for choice in question.choices], right)
            (chances,) = self._model.score([picture], question.question, choices)
            digits += str(int(max(chances, key=chances.__getitem__) == right))
        return digits


class Endpoint:
    """A model behind an OpenAI-compatible address; OPENAI_API_KEY is sent where it is set.

    A request that fails is tried again, a bounded number of times, after waits that double.
    """

    def __init__(self, address: str, model: str = "", wait_seconds: float = _WAIT) -> None:
        """Raises: InputError if no model is named and the endpoint lists none."""
        self._address, self._wait = address.rstrip("/"), wait_seconds
        self.model = model or self._first_model()

    def __call__(self, picture: Image.Image, questions: Sequence[SuiteQuestion]) -> str:
        """See Ask."""
        url = f"data:image/png;base64,{_png(picture)}"
        return "".join(str(int(self._is_right(url, question))) for question in questions)

    def _is_right(self, url: str, question: SuiteQuestion) -> bool:
        choices = ", ".join(question.choices)
        text = f"{question.question}\nAnswer with one of these alone: {choices}"
        image = {"type": "image_url", "image_url": {"url": url}}
        content = [image, {"type": "text", "text": text}]
        body = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": 64,
            "messages": [{"role": "user", "content": content}],
        }
        answer = self._send("/chat/completions", body, _said)
        index = find_choice(answer, question.choices)
        return index >= 0 and plain_text(question.choices[index]) == plain_text(question.answer)

    def _first_model(self) -> str:
        try:
            return self._send("/models", None, lambda given: str(given["data"][0]["id"]))
        except ConnectionError as error:
            raise InputError(f"--judge {self._address}: {error}; start it, or correct the address") from error

    def _send(self, path: str, body: dict | None, read: Callable[[Any], str]) -> str:
        """What read makes of the answer's JSON. Raises: ConnectionError after the last try."""
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        data, reason = None if body is None else json.dumps(body).encode(), ""
        for attempt in range(_RETRIES):
            if attempt:
                time.sleep(self._wait * 2 ** (attempt - 1))
            try:
                request = urllib.request.Request(self._address + path, data=data, headers=headers)
                with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                    return read(json.loads(answer.read(_MOST_BYTES)))
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if 400 <= error.code < 500 and error.code not in (408, 409, 425, 429):
                    break  # the same request would fail again
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                reason = reason_of(error)
        raise ConnectionError(f"no answer after {attempt + 1} tries ({reason})")


def _said(given: Any) -> str:
    text = given["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("an answer without text")
    return text


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _slug(judge: str) -> str:
    """A file's name for a judge, its own."""
    words = "".join(char if char.isalnum() else "-" for char in judge.lower()).strip("-")[:40]
    return judge if judge == "self" else f"{words}-{hashlib.blake2b(judge.encode(), digest_size=4).hexdigest()}"


def _read_answers(path: Path, judge: str) -> dict[tuple[str, int], str]:
    """What the judge said before; a last line that a stop cut short is left out."""
    found = {}
    for line in read_text(path).split("\n"):
        try:
            given = json.loads(line)
            if given["judge"] == judge and set(given["right"]) <= set("01"):
                found[str(given["file"]), int(given["image"])] = given["right"]
        except (ValueError, LookupError, TypeError):
            continue
    return found
