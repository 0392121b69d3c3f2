"""The server under many clients at once, and under bad ones: openai's client, limits, seeds, what is slow or leaves."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

from hermesflow import load_model, tasks
from hermesflow.serving import server as serving
from hermesflow.serving.server import Server
from hermesflow.serving.worker import ImageJob, QueueFullError, Worker

PROMPT = "a large red circle in the top left on a white background"


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def address(model):
    """Of a server on a port of its own."""
    made = Server(model, "tiny", max_waiting=128, max_batch=32, max_bytes=1 << 20)
    config = uvicorn.Config(made.app, host="127.0.0.1", port=0, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not running.started and time.monotonic() < until:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join()
    made.worker.close()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def picture(model):
    """An image as pixels and as a data address."""
    (drawn,) = tasks.generate_images(model, [PROMPT], seed=5)
    buffer = io.BytesIO()
    Image.fromarray(drawn.pixels).save(buffer, format="PNG")
    return drawn.pixels, "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def asked(url, question="is there a red circle ?"):
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def send(address, path, body, data=None):
    """(status, JSON)."""
    data = json.dumps(body).encode() if data is None else data
    request = urllib.request.Request(address + path, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def pixels_of(item):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item))))


def test_openais_client_draws_what_the_command_draws(model, client):
    found = client.images.generate(model="tiny", prompt=PROMPT, n=2, extra_body={"seed": 5, "num_steps": 4})
    sampling = model.sampling.__class__(**{**vars(model.sampling), "num_steps": 4})
    expected = list(tasks.generate_images(model, [PROMPT], num_images=2, seed=5, sampling=sampling))
    assert len(found.data) == 2
    for item, image in zip(found.data, expected, strict=True):
        assert np.abs(pixels_of(item.b64_json).astype(int) - image.pixels).max() <= 1


def test_openais_client_asks(model, client, picture):
    pixels, url = picture
    said = client.chat.completions.create(model="tiny", messages=asked(url), temperature=0, n=2)
    (expected,) = model.answer([pixels], "is there a red circle ?")
    assert [choice.message.content for choice in said.choices] == [expected] * 2
    assert said.choices[0].finish_reason == "stop" and said.usage.completion_tokens >= 2
    drawn = [
        client.chat.completions.create(model="tiny", messages=asked(url), seed=seed, temperature=1.5) for seed in (3, 3)
    ]
    assert drawn[0].choices[0].message.content == drawn[1].choices[0].message.content
    assert [entry.id for entry in client.models.list().data] == ["tiny"]


def test_health_and_metrics(address, client):
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert json.loads(answer.read())["status"] == "ok"
    client.images.generate(model="tiny", prompt=PROMPT, extra_body={"num_steps": 1})
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        text = answer.read().decode()
    assert 'hermesflow_requests_total{path="/v1/images/generations",status="200"}' in text
    assert "hermesflow_images_total" in text and "hermesflow_waiting 0" in text


@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("images/generations", {"prompt": ""}, 400, "prompt: expected words"),
        ("images/generations", {"prompt": "a purple unicorn"}, 400, "does not know the word 'purple'"),
        ("images/generations", {"prompt": PROMPT, "n": 17}, 400, "n: expected a whole number from 1 to 16"),
        ("images/generations", {"prompt": PROMPT, "n": True}, 400, "n: expected a whole number"),
        ("images/generations", {"prompt": PROMPT, "size": "512x512"}, 400, "size: this model draws 64x64 alone"),
        ("images/generations", {"prompt": PROMPT, "response_format": "url"}, 400, "sent as b64_json"),
        ("images/generations", {"prompt": PROMPT, "num_steps": "many"}, 400, "num_steps"),
        ("images/generations", {"prompt": PROMPT, "seed": -1}, 400, "seed: expected a whole number from 0"),
        ("images/generations", {"prompt": PROMPT, "colour": 1}, 400, "'colour' is no field"),
        ("images/generations", [1], 400, "no JSON object"),
        ("images/generations/", {}, 404, "Not Found"),
        ("models", {}, 405, "Method Not Allowed"),
        ("chat/completions", {"messages": []}, 400, "expected one message of a user"),
        ("chat/completions", {"messages": [{"role": "user", "content": "hello"}]}, 400, "one image and a question"),
        ("chat/completions", {"messages": asked("http://127.0.0.1/x.png")}, 400, "nothing is fetched"),
        ("chat/completions", {"messages": asked("data:image/png;base64,%%%")}, 400, "image_url"),
        ("chat/completions", {"messages": asked("data:image/png;base64,aGVsbG8=")}, 400, "not an image that"),
        ("chat/completions", {"messages": "x"}, 400, "expected a list of messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "parts of type"),
        ("chat/completions", {"messages": [], "stream": True}, 400, "stream: answers are sent whole"),
        ("chat/completions", {"messages": asked("x"), "temperature": 9}, 400, "expected data:image"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(address, path, body, status, message):
    code, found = send(address, f"/v1/{path}", body)
    assert code == status and message in found["error"]["message"], found


def test_bodies_that_are_none_or_too_large(address):
    for data, status in ((b"{", 400), (b"[" * 100_000, 400), (b"\xff\xfe", 400), (b"x" * (2 << 20), 413)):
        assert send(address, "/v1/images/generations", None, data)[0] == status


def test_a_slow_client_and_one_that_leaves_hold_up_nobody(address, client, monkeypatch):
    monkeypatch.setattr(serving, "_READ_SECONDS", 1.0)
    host, port = address.removeprefix("http://").split(":")
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    slow = socket.create_connection((host, int(port)))
    slow.sendall(head + b'{"prompt"')
    gone = socket.create_connection((host, int(port)))
    body = json.dumps({"prompt": PROMPT, "n": 8}).encode()
    gone.sendall(head.replace(b"100", str(len(body)).encode()) + body)
    gone.close()
    began = time.monotonic()
    assert client.images.generate(model="tiny", prompt=PROMPT, extra_body={"num_steps": 2}).data
    assert time.monotonic() - began < 10
    slow.settimeout(10)
    assert b"408" in slow.recv(4096)
    slow.close()


def flood(client, picture, seconds, num_clients):
    """Requests of so many clients at once: (how many were answered, what failed)."""
    until, failed, answered = time.monotonic() + seconds, [], []
    _, url = picture

    def work(number):
        while time.monotonic() < until:
            try:
                if number % 2:
                    body = {"seed": number, "num_steps": 2}
                    found = client.images.generate(model="tiny", prompt=PROMPT, extra_body=body).data[0].b64_json
                else:
                    said = client.chat.completions.create(model="tiny", messages=asked(url), temperature=0)
                    found = said.choices[0].message.content
                answered.append((number, found))
            except Exception as error:
                failed.append(error)

    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(work, range(num_clients)))
    return answered, failed


def check_flood(client, picture, seconds):
    answered, failed = flood(client, picture, seconds, 64)
    assert not failed, failed[:3]
    by_client = {}
    for number, found in answered:
        by_client.setdefault(number, set()).add(found)
    # Whatever rode beside it, a request got the same.
    assert len(by_client) == 64 and all(len(found) == 1 for found in by_client.values())
    return len(answered)


def test_sixty_four_clients_at_once(client, picture):
    assert check_flood(client, picture, 3) >= 64


@pytest.mark.soak
def test_sixty_four_clients_for_a_minute(client, picture):
    print(f"{check_flood(client, picture, 60)} requests of 64 clients in 60 s, none failed")


def test_a_full_row_refuses_and_recovers(model):
    """What waits is bounded; a job that is cancelled is not computed; one that fails fails alone."""
    started, go_on = threading.Event(), threading.Event()

    class Held:
        def __getattr__(self, name):
            return getattr(model, name)

        @property
        def engine(self):
            started.set()
            go_on.wait(20)
            return model.engine

    worker = Worker(Held(), max_waiting=3, max_batch=8)

    def job(prompt_ids=None):
        ids = model.image_prompt(PROMPT) if prompt_ids is None else prompt_ids
        return ImageJob(key=model.sampling, size=1, prompt_ids=ids, seeds=(1,))

    first = worker.submit(job())
    assert started.wait(20)
    others = [worker.submit(job()), worker.submit(job([10**9])), worker.submit(job())]
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        worker.submit(job())
    assert others[2].cancel()
    go_on.set()
    assert np.array_equal(first.result(60), others[0].result(60))
    with pytest.raises(Exception, match="."):
        others[1].result(60)
    assert worker.submit(job()).result(60).shape == (1, 64, 64, 3)
    worker.close()


def test_the_command(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "hermesflow", "serve", "--model", "tiny", "--port", str(port)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
    try:
        assert running.stdout.readline().strip() == f"http://127.0.0.1:{port}/v1"
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                status, found = send(
                    f"http://127.0.0.1:{port}", "/v1/images/generations", {"prompt": PROMPT, "seed": 1}
                )
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        assert status == 200 and pixels_of(found["data"][0]["b64_json"]).shape == (64, 64, 3)
    finally:
        running.terminate()
        assert running.wait(20) is not None
