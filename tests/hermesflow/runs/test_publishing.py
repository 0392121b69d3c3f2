"""Pushing to the hub: what huggingface_hub sends to a stand-in of it on this machine, the cards, what is refused."""

import base64
import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pyarrow as pa
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard

from hermesflow import cli
from hermesflow.config import load_config, to_toml
from hermesflow.data.pairs import PAIRS_SCHEMA
from hermesflow.data.preference_tables import write_preference_tables
from hermesflow.evaluation.metrics import measure, summarize
from hermesflow.models import load_model
from hermesflow.runtime.files import write_json, write_parquet, write_text

TOKEN = "hf_0123456789"
HOSTILE = "|`<b>*x*\n---\n- [a](b): #"
"""Of a path and a metric: what would end a cell, a line of code or the front matter, or become markup."""


class Hub(ThreadingHTTPServer):
    """Answers as the Hugging Face hub does when a folder is uploaded, and keeps what arrives."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.tokens, self.stored, self.files, self.made = [], set(), {}, {}, {}
        self.refused = {}
        """Status by a part of the path, which is refused with it."""
        self.large = ()
        """Endings of files that are taken by the protocol of large files."""

    def answer(self, path, body):
        if path == "/api/repos/create":
            asked = json.loads(body)
            kind = f"{asked['type']}s/" if asked["type"] != "model" else ""
            repo = f"{asked['organization']}/{asked['name']}"
            status = 409 if repo in self.made else 200
            self.made.setdefault(repo, asked)
            return status, {"url": f"{self.url}/{kind}{repo}"}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if self.large and name.endswith(self.large) else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {"objects": [
                item | {"actions": {"upload": {"href": f"{self.url}/stored/{item['oid']}"}}} for item in objects
            ]}  # fmt: skip
        if path.startswith("/stored/"):
            self.stored[path.removeprefix("/stored/")] = body
            return 200, {}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    self.files[line["value"]["path"]] = self.stored[line["value"]["oid"]]
            return 200, {"commitUrl": f"{self.url}/me/it/commit/{'0' * 40}", "commitOid": "0" * 40}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repo = "/".join(path.split("/")[-2:])
        if repo in self.made:
            return 200, {"id": repo, "private": self.made[repo].get("visibility") == "private"}
        return 404, {"error": "Not found"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _take(self):
        body, path, hub = self.rfile.read(int(self.headers.get("Content-Length") or 0)), self.path, self.server
        hub.requests.append(f"{self.command} {path}")
        hub.tokens.add(self.headers.get("Authorization"))
        status = next((status for part, status in hub.refused.items() if part in path), None)
        status, said = (status, {"error": "No, <you>\nmay not"}) if status else hub.answer(path, body)
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _take

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    constants = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    constants |= {name: str(tmp_path / name) for name in ("HF_TOKEN_PATH", "AGENT_HARNESSES_PATH")}
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value, raising=False)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()  # the next one sees no proxy
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def evaluation(*right):
    rows = [{"id": f"r{number}", "scores": {"understanding": [value, 4], HOSTILE.replace("\n", " "): [value, 4]}}
            for number, value in enumerate(right)]  # fmt: skip
    return {"metrics": measure(rows), "records": rows}


EVALUATIONS = evaluation(1, 2, 2, 3), evaluation(2, 3, 3, 4)


@pytest.fixture(scope="module")
def made(shared_tiny_model, make_pair, tmp_path_factory):
    """A folder with the model that the runs begin with, and its pairs."""
    folder = tmp_path_factory.mktemp("made")
    shared_tiny_model.save(folder / HOSTILE.replace("/", ""))
    rows = [make_pair(shared_tiny_model, number, sides) for number, sides in enumerate(("both", "generation", "both"))]
    return folder, pa.Table.from_pylist(rows, PAIRS_SCHEMA)


@pytest.fixture
def run(made, shared_tiny_model, tmp_path):
    """A run's folder of one trained round."""
    folder, (model, pairs) = tmp_path / "run", made
    settings = [f"model.name={json.dumps(str(model / HOSTILE))}", "run.name=it", "selfplay.num_rounds=2"]
    write_text(folder / "config.toml", to_toml(load_config(None, settings)))
    for number, found in enumerate(EVALUATIONS):
        write_json(folder / f"round-{number}" / "evaluation.json", found)
    write_parquet(folder / "round-1" / "pairs.parquet", pairs)
    (folder / "round-1" / "candidates").mkdir()
    shared_tiny_model.save(folder / "round-1" / "model")
    return folder


def push(capsys, *arguments):
    """(exit code, output, lines of errors)"""
    code = cli.main(["push", *map(str, arguments)])
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("hermesflow: error: ")]


def held(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_all(files, folder):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def nothing_remains(tmp_path):
    return not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("large", [(), (".safetensors",)], ids=["regular", "large files"])
def test_the_model_of_a_run_arrives_whole(hub, run, shared_tiny_model, large, tmp_path, capsys):
    hub.large = large
    assert push(capsys, run, "me/it") == (0, f"{hub.url}/me/it\n", [])
    card = hub.files.pop("README.md").decode()
    assert hub.files == held(run / "round-1" / "model")
    assert bool(hub.stored) == bool(large) and nothing_remains(tmp_path)
    assert hub.tokens <= {f"Bearer {TOKEN}", None} and "visibility" not in hub.made["me/it"]
    opened = load_model(write_all(hub.files, tmp_path / "again"))
    for name, value in shared_tiny_model.transformer.state_dict().items():
        assert torch.equal(value, opened.transformer.state_dict()[name]), name
    data = ModelCard(card).data
    assert (data.library_name, data.base_model, data.datasets) == ("hermesflow", None, None)
    assert "https://arxiv.org/abs/2502.12148" in card and "--model me/it\n" in card
    assert "- round 1: pair-dpo, 512 records, 3 pairs" in card


def test_the_card_has_the_runs_results_as_its_summary_has_them(hub, run, capsys):
    push(capsys, run, "me/it")
    card = hub.files["README.md"].decode()
    _, [after] = summarize(EVALUATIONS)
    low, high = after["understanding_ci95"]
    change = after["change"]["understanding"]
    [row] = [line for line in card.splitlines() if line.startswith("| understanding |")]
    assert f"| {after['understanding']:.3f} [{low:.3f}, {high:.3f}] |" in row
    assert row.endswith(f"| {change['change']:+.3f} [{change['ci95'][0]:+.3f}, {change['ci95'][1]:+.3f}] |")


def test_a_run_that_measured_nothing_has_no_results(hub, run, capsys):
    (run / "round-1" / "evaluation.json").unlink()
    assert push(capsys, run, "me/it")[0] == 0 and "## Results" not in hub.files["README.md"].decode()


def test_names_from_a_run_become_no_markup(hub, run, capsys):
    push(capsys, run, "me/it")
    _, front, body = hub.files["README.md"].decode().split("---\n", 2)
    assert "base_model" not in front
    outside = [line for line in body.splitlines() if not line.startswith("    ")]
    [row] = [line for line in outside if line.startswith("| \\|")]
    assert row.startswith("| \\|\\`\\<b\\>\\*x\\* --- - \\[a\\]\\(b\\)\\: \\# |")
    assert not any("<b>" in line or line.startswith("- [") for line in outside)


def test_the_model_it_came_from_and_its_pairs_are_linked(hub, run, capsys):
    assert push(capsys, run, "me/pairs", "--pairs")[0] == 0
    write_text(run / "config.toml", to_toml(load_config(None, ["model.name=showlab/show-o-512x512"])))
    assert push(capsys, run, "me/it")[0] == 0
    data = ModelCard(hub.files["README.md"].decode()).data
    assert data.base_model == "showlab/show-o-512x512" and data.datasets == ["me/pairs"]


def test_a_folder_of_a_model_is_pushed_without_what_only_a_run_knows(hub, run, capsys):
    assert push(capsys, run / "round-1" / "model", "me/it")[0] == 0
    card = hub.files.pop("README.md").decode()
    assert hub.files == held(run / "round-1" / "model") and "##" not in card and ModelCard(card).data.tags


def test_the_pairs_of_a_round_arrive_as_tables(hub, run, made, shared_tiny_model, tmp_path, capsys):
    assert push(capsys, run, "me/pairs", "--pairs") == (0, f"{hub.url}/datasets/me/pairs\n", [])
    assert hub.made["me/pairs"]["type"] == "dataset" and nothing_remains(tmp_path)
    card = hub.files.pop("README.md").decode()
    tables = held(write_preference_tables(shared_tiny_model, made[1], tmp_path / "tables"))
    del tables["README.md"]
    assert hub.files == tables
    assert {item["config_name"]: item["data_files"] for item in DatasetCard(card).data.configs} == {
        "generation": "generation.parquet",
        "understanding": "understanding.parquet",
    }
    assert "- `generation`, 3 rows" in card and "- `understanding`, 2 rows" in card
    assert "drew 8 images" in card and "Round 1 of self-play" in card
    assert json.loads((run / "round-1" / "pushed.json").read_text()) == "me/pairs"


def test_pairs_that_were_imported_say_so(hub, run, capsys):
    (run / "round-1" / "candidates").rmdir()
    push(capsys, run, "me/pairs", "--pairs", "--round", 1)
    assert "the pairs were imported" in hub.files["README.md"].decode()


def test_private_reaches_the_hub(hub, run, capsys):
    assert push(capsys, run, "me/it", "--private")[0] == 0
    assert hub.made["me/it"]["visibility"] == "private"
    assert push(capsys, run, "me/it")[0] == 0  # it is there already


def test_private_sends_nothing_to_a_repository_that_all_see(hub, run, tmp_path, capsys):
    hub.made["me/it"] = {"visibility": "public"}
    code, _, [line] = push(capsys, run, "me/it", "--private")
    assert code == 2 and "for all to see; make it private on the hub" in line
    assert not hub.files and nothing_remains(tmp_path)


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ({"/api/": 401}, "me/it: the hub refuses it (401, No, <you> may not); use a valid token"),
        ({"/api/": 403}, "use a token that may write to this owner's"),
        ({"/api/": 500}, "(500, No, <you> may not); correct that, or try again later"),
        ({"/preupload/": 403}, "use a token that may write"),
        ({"/validate-yaml": 400}, "cannot be sent (Invalid metadata in README.md"),
        ({"/commit/": 413}, "(413, No, <you> may not)"),
    ],
    ids=["401", "403", "500", "403 of files", "400 of the card", "413 of the commit"],
)
@pytest.mark.parametrize("options", [(), ("--pairs",)], ids=["model", "pairs"])
def test_what_the_hub_refuses_is_a_line(hub, run, refused, says, options, tmp_path, capsys):
    hub.refused = refused
    code, out, [line] = push(capsys, run, "me/it", *options)
    assert (code, out) == (2, "") and says in line
    assert not hub.files and nothing_remains(tmp_path) and not (run / "round-1" / "pushed.json").exists()


def test_a_hub_that_cannot_be_reached_is_a_line(hub, run, tmp_path, monkeypatch, capsys):
    closed = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    closed.server_close()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed.server_port}")
    code, _, [line] = push(capsys, run, "me/it")
    assert code == 2 and "check the network connection" in line and nothing_remains(tmp_path)


@pytest.mark.parametrize(
    "repo", ["a/b/c", "../x", "it", "me/", "me/a b", "me/--x", "http://me/it", "", "me/" + "x" * 97]
)
def test_what_is_no_id_is_refused_before_anything_is_sent(hub, run, repo, capsys):
    code, _, [line] = push(capsys, run, repo)
    assert code == 2 and "is no id of the hub; give OWNER/NAME" in line and not hub.requests


@pytest.mark.parametrize("token", [None, "", "hf_\x07bell", "hf_caf\u00e9"])
def test_no_token_is_refused_before_anything_is_sent(hub, run, token, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    code, _, [line] = push(capsys, run, "me/it")
    assert code == 2 and "log in with hf auth login, or set HF_TOKEN" in line and not hub.requests
    assert not token or token not in line


def test_what_is_not_there_is_refused_before_anything_is_sent(hub, run, tmp_path, capsys):
    for arguments, says in (
        ((run, "me/it", "--pairs", "--round", 2), "round-2: has no pairs; give the folder of a run"),
        ((run / "round-1" / "model", "me/it", "--pairs"), "round-1: has no pairs"),
        ((run, "me/it", "--round", 1), "--round: belongs to --pairs"),
        ((tmp_path / "nothing", "me/it"), "no model"),
    ):
        code, _, [line] = push(capsys, *arguments)
        assert code == 2 and says in line, line
    write_parquet(run / "round-1" / "pairs.parquet", PAIRS_SCHEMA.empty_table())
    (run / "round-1" / "model").rename(tmp_path / "model")
    for options, says in ((("--pairs",), "has no pairs"), ((), "no round of this run is trained yet")):
        code, _, [line] = push(capsys, run, "me/it", *options)
        assert code == 2 and says in line
    assert not hub.requests and nothing_remains(tmp_path)


def test_a_damaged_evaluation_is_named(hub, run, tmp_path, capsys):
    write_json(run / "round-1" / "evaluation.json", {"metrics": {}, "records": [{"id": 3}]})
    code, _, [line] = push(capsys, run, "me/it")
    assert code == 2 and "evaluation.json: damaged" in line and not hub.requests and nothing_remains(tmp_path)


def test_the_command_as_users_call_it(hub, run, tmp_path):
    """The command takes the address and the token from HF_ENDPOINT and HF_TOKEN; hf_xet may be installed."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "temporary"),
    }
    command = [sys.executable, "-c", "import sys; from hermesflow.cli import main; sys.exit(main())", "push"]
    done = subprocess.run(
        [*command, run, "me/it"], env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/me/it\n"), done.stderr
    assert TOKEN not in done.stderr and nothing_remains(tmp_path)
    del hub.files["README.md"]
    assert hub.files == held(run / "round-1" / "model")
