"""Suites that others publish: layouts as their own code reads them, resuming, judges, damaged and foreign files."""

import base64
import csv
import importlib
import io
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from hermesflow.cli import main
from hermesflow.evaluation.metrics import measure
from hermesflow.evaluation.suites import judges
from hermesflow.evaluation.suites.drawing import draw_suite
from hermesflow.evaluation.suites.presets import PRESETS
from hermesflow.evaluation.suites.run import find_suite
from hermesflow.evaluation.suites.suite import SuitePrompt, SuiteQuestion, marks_of_answers, rows_of
from hermesflow.models import load_model
from hermesflow.runtime.files import InputError
from hermesflow.runtime.registry import SUITES

TEXTS = ("a large red circle in the top left on a white background", "a small blue square on a white background",
         "two green triangles on a black background")  # fmt: skip
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": TEXTS[0]},
    {"tag": "counting", "include": [{"class": "square", "count": 2}], "exclude": [{"class": "square", "count": 3}],
     "prompt": TEXTS[1]},
    {"tag": "counting", "include": [{"class": "circle", "count": 1},
                                    {"class": "square", "count": 1, "position": ["left of", 0]}], "prompt": TEXTS[2]},
]  # fmt: skip


def write_prompts(name, folder):
    """The list of three prompts in the suite's own form."""
    folder.mkdir(exist_ok=True)
    if name == "geneval":
        path = folder / "evaluation_metadata.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in GENEVAL))
    elif name == "dpg":
        path, out = folder / "dpg_bench.csv", io.StringIO()
        columns = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad",
                   "category_detailed", "tuple", "question_natural_language"]  # fmt: skip
        table = csv.DictWriter(out, columns)
        table.writeheader()
        for number, text in enumerate(TEXTS):
            asked_of = (
                ("0", "entity - whole (circle)", "is there a circle ?"),
                ("1", "attribute - color (red)", "is it red ?"),
            )
            for part, (needs, kind, asked) in enumerate(asked_of, 1):
                row = dict.fromkeys(columns, "x") | {"item_id": f"item{number}", "text": text}
                row |= {"proposition_id": part, "dependency": needs, "tuple": kind, "question_natural_language": asked}
                table.writerow(row)
        path.write_text(out.getvalue())
    elif name == "tifa":
        path = folder / "questions.json"
        path.write_text(json.dumps([
            {"id": f"drawbench_{number}", "caption": text, "question": question, "choices": choices, "answer": answer,
             "element_type": kind}
            for number, text in enumerate(TEXTS)
            for question, choices, answer, kind in [
                ("is there a circle ?", ["yes", "no"], ("yes", "no", "no")[number], "object"),
                ("what color is the background ?", ["white", "black"], ("white", "white", "black")[number], "color"),
            ]
        ]))  # fmt: skip
    elif name == "compbench":
        path = folder / "color_val.txt"
        path.write_text("\n".join(TEXTS) + "\n")
    elif name == "genai":
        path = folder / "genai_image.json"
        path.write_text(json.dumps({f"{number:05d}": {"prompt": text} for number, text in enumerate(TEXTS)}))
        (folder / "genai_skills.json").write_text(json.dumps({"basic": [0, 1], "counting": [2]}))
    else:
        path = folder
        entries = [{"Prompt": text, "Explanation": "x", "Category": "c", "Subcategory": "s", "prompt_id": number}
                   for text, number in zip(TEXTS, (1, 500, 950), strict=True)]  # fmt: skip
        (folder / "data.json").write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory):
    """By suite its prompts' file and its folder, drawn."""
    found = {}
    for name in SUITES:
        folder = tmp_path_factory.mktemp(name)
        found[name] = write_prompts(name, folder / "prompts"), folder / "out"
        draw(model, name, *found[name])
    return found


def draw(model, name, path, folder, **more):
    suite = find_suite(name)
    options = {"num_images": suite.images_per_prompt, "seed": 3, "sampling": model.sampling} | more
    return draw_suite(model, "tiny", name, suite, suite.read_prompts(path), folder, **options)


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_geneval_is_laid_out_as_its_evaluator_reads_it(drawn):
    """evaluate_images.py: folders of digits, metadata.jsonl with one object, samples that match digits and .png."""
    images, found = drawn["geneval"][1] / "images", []
    for subfolder in sorted(os.listdir(images)):
        assert (images / subfolder).is_dir() and subfolder.isdigit()
        metadata = json.loads((images / subfolder / "metadata.jsonl").read_text())
        names = sorted(os.listdir(images / subfolder / "samples"))
        assert all(re.match(r"\d+\.png", name) for name in names) and len(names) == 4
        assert all(Image.open(images / subfolder / "samples" / name).size == (64, 64) for name in names)
        found.append(metadata)
    assert found == GENEVAL


def test_dpg_is_laid_out_as_its_evaluator_reads_it(model, drawn):
    """compute_dpg_bench.py: every name in the folder is an item's, and four crops of the resolution are its images."""
    images = drawn["dpg"][1] / "images"
    assert sorted(os.listdir(images)) == ["item0.png", "item1.png", "item2.png"]
    whole = np.asarray(Image.open(images / "item1.png"))
    assert whole.shape == (128, 128, 3)
    crops = [whole[top : top + 64, left : left + 64] for top in (0, 64) for left in (0, 64)]
    assert len({crop.tobytes() for crop in crops}) == 4


def test_tifa_is_laid_out_as_its_evaluator_reads_it(drawn):
    """tifa_score.py: paths by id as text, relative to the file that holds them."""
    path = drawn["tifa"][1] / "images/images.json"
    by_id = json.loads(path.read_text())
    assert set(by_id) == {"drawbench_0", "drawbench_1", "drawbench_2"}
    assert all(Image.open(os.path.join(os.path.dirname(path), name)).size == (64, 64) for name in by_id.values())


def test_compbench_is_laid_out_as_its_evaluator_reads_it(drawn):
    """BLIP_vqa.py: sorted by the number after the last underscore; the prompt stands before the first."""
    names = os.listdir(drawn["compbench"][1] / "images/samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == [text for text in TEXTS for _ in range(10)]
    assert [int(name.split("_")[-1].split(".")[0]) for name in names] == list(range(30))


def test_genai_and_wise_are_laid_out_as_their_evaluators_read_them(drawn):
    """genai_bench/evaluate.py opens INDEX.jpeg of each key; gpt_eval.py opens PROMPT_ID.png."""
    for name, expected, kind in (
        ("genai", ["00000.jpeg", "00001.jpeg", "00002.jpeg"], "JPEG"),
        ("wise", ["1.png", "500.png", "950.png"], "PNG"),
    ):
        images = drawn[name][1] / "images"
        assert sorted(os.listdir(images)) == sorted(expected)
        assert all(Image.open(images / file).format == kind for file in expected)


@pytest.mark.parametrize("name", ["geneval", "dpg"])
def test_what_is_missing_is_drawn_again_alike(model, drawn, tmp_path, name):
    path, folder = drawn[name]
    before = files_below(folder)
    victims = [file for file in before if file.endswith(".png")][::2]
    for victim in victims:
        (folder / victim).unlink()
    others = {file: (folder / file).stat().st_mtime_ns for file in before if file not in victims}
    draw(model, name, path, folder)
    assert files_below(folder) == before
    assert all((folder / file).stat().st_mtime_ns == when for file, when in others.items())


def test_other_settings_are_refused(model, drawn):
    path, folder = drawn["wise"]
    with pytest.raises(InputError, match=r"were drawn with another seed \(3, now 4\)"):
        draw(model, "wise", path, folder, seed=4)
    with pytest.raises(InputError, match="puts 3 images into a square"):
        draw(model, "dpg", *drawn["dpg"], num_images=3)


def marks(name, drawn, tmp_path, text, file="results.json"):
    (tmp_path / file).write_text(text)
    suite = find_suite(name)
    prompts = suite.read_prompts(drawn[name][0])
    found = suite.read_results(tmp_path / file, prompts)
    return measure(rows_of(prompts, found))


def test_geneval_is_the_mean_over_tasks(drawn, tmp_path):
    right = {(0, 0): True, (0, 1): True, (1, 0): False, (1, 1): True, (2, 0): False, (2, 1): False}
    lines = [
        {"filename": f"a/{prompt:05d}/samples/{image:05d}.png", "prompt": TEXTS[prompt], "correct": is_right}
        for (prompt, image), is_right in right.items()
    ]
    found = marks("geneval", drawn, tmp_path, "\n".join(map(json.dumps, lines)))
    assert found["category"]["single_object"] == 1 and found["category"]["counting"] == pytest.approx(0.25)
    assert found["score"] == pytest.approx((1 + 0.25) / 2)


def test_dpg_by_scores_and_by_answers(drawn, tmp_path):
    """Its judge's two files; a question counts nothing where one that it needs was answered wrongly."""
    text = (
        "out/item0.png, 1.0, 0.5, 0.5, 0.0, 0.5\nout/item1.png, 1.0, 1.0, 1.0, 1.0, 1.0\nImage path: x, DPG-Bench: 75\n"
    )
    assert marks("dpg", drawn, tmp_path, text)["score"] == pytest.approx(0.75)
    detail = [("item0", 0, "is there a circle ?", "yes"), ("item0", 0, "is it red ?", "no"),
              ("item0", 64, "is there a circle ?", "no"), ("item0", 64, "is it red ?", "yes")]  # fmt: skip
    lines = [f"out/{id}.png, ({left}, 0, {left + 64}, 64), {asked}, {said}" for id, left, asked, said in detail]
    found = marks("dpg", drawn, tmp_path, "\n".join(lines))
    assert found["score"] == pytest.approx((0.5 + 0.0) / 2)
    assert found["category"]["attribute - color"] == pytest.approx(0.5)


def test_the_other_suites_results(drawn, tmp_path):
    seen, unseen = {"scores": 1, "element_type": "object"}, {"scores": 0, "element_type": "color"}
    details = {"drawbench_0": {"q1": seen, "q2": unseen}, "drawbench_1": {"q1": seen}}
    found = marks("tifa", drawn, tmp_path, json.dumps({"tifa_average": 0.75, "question_details": details}))
    assert found["score"] == pytest.approx(0.75) and found["category"]["color"] == 0

    answers = [{"question_id": number, "answer": f"{number / 30:.4f}"} for number in range(30)]
    found = marks("compbench", drawn, tmp_path, json.dumps(answers))
    assert found["score"] == pytest.approx(np.mean([number / 30 for number in range(30)]), abs=1e-4)

    torch.save(torch.tensor([[[0.5]], [[0.7]], [[0.9]]]), tmp_path / "scores.pt")
    suite = find_suite("genai")
    prompts = suite.read_prompts(drawn["genai"][0])
    found = measure(rows_of(prompts, suite.read_results(tmp_path / "scores.pt", prompts)))
    assert found["score"] == pytest.approx(0.7) and found["category"]["basic"] == pytest.approx(0.6)

    lines = [{"prompt_id": 1, "consistency": 2, "realism": 1, "aesthetic_quality": 0}, {"prompt_id": 500, "score": 1}]
    found = marks("wise", drawn, tmp_path, "\n".join(map(json.dumps, lines)))
    assert found["category"]["culture"] == pytest.approx(0.8)
    assert found["score"] == pytest.approx((0.4 * 0.8 + 0.12 * 1) / 0.52)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("geneval", '{"filename": "a/00007/samples/00000.png", "correct": true}', "line 1: .* is no image of these"),
        ("geneval", '{"filename": "a.png"', "line 1: no JSON"),
        ("geneval", '{"filename": "a.png", "correct": "yes"}', "correct is 'yes'"),
        ("dpg", "out/other.png, 0.5, 0.5", "line 1: 'out/other.png' is no image of these prompts"),
        ("dpg", "\n", "holds no scores of these prompts"),
        ("tifa", '{"tifa_average": 0.5}', "has no question_details"),
        ("tifa", '{"question_details": {"x": {}}}', "'x' is none of these prompts"),
        ("tifa", '{"question_details": {"drawbench_0": {"q": {"scores": "high"}}}}', "scores is 'high'"),
        ("compbench", '[{"question_id": 0, "answer": "0.5"}]', "has 1 images, which 3 prompts cannot"),
        ("compbench", '[{"question_id": 9, "answer": "0"}, {"question_id": 1, "answer": "0"}, {"question_id": 2, '
         '"answer": "0"}]', "question_id 9 is none of 3 images"),
        ("genai", '{"00009": 0.5}', "'00009': 0.5 is no score of these prompts"),
        ("genai", "[" * 100_000, "no JSON"),
        ("wise", '{"prompt_id": 1, "consistency": 999, "realism": 999, "aesthetic_quality": 999}', "line 1: .* no "),
        ("wise", "", "holds no scores"),
    ],
)  # fmt: skip
def test_results_that_are_damaged_or_foreign_are_named_in_a_line(drawn, tmp_path, name, text, message):
    with pytest.raises(InputError, match=message) as error:
        marks(name, drawn, tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("geneval", '{"tag": "a", "include": [], "prompt": 3}', "prompt is 3"),
        ("geneval", '{"tag": "a", "include": [{"class": "x", "count": 1, "position": ["left of", 5]}], "prompt": "b"}',
         "position .* is none"),
        ("dpg", "item_id,text\na,b\n", "row 2: has no proposition_id"),
        ("tifa", "[]", "holds nothing"),
        ("compbench", "a cat/dog\n", "cannot name a file"),
        ("genai", '{"../x": {"prompt": "a"}}', "no number of a prompt"),
        ("wise", '[{"Prompt": "a", "Explanation": "b", "prompt_id": true}]', "prompt_id is True"),
    ],
)  # fmt: skip
def test_lists_of_prompts_that_are_damaged_are_named(tmp_path, name, text, message):
    (tmp_path / "prompts").write_text(text)
    with pytest.raises(InputError, match=message):
        find_suite(name).read_prompts(tmp_path / "prompts")


def test_ids_never_leave_the_folder(tmp_path):
    for id in ("../x", "a/b", ".hidden"):
        entry = {"id": id, "caption": "c", "question": "q", "choices": ["a"], "answer": "a", "element_type": "t"}
        (tmp_path / "questions.json").write_text(json.dumps([entry]))
        with pytest.raises(InputError, match="cannot name a file"):
            find_suite("tifa").read_prompts(tmp_path / "questions.json")


def test_answers_make_scores_by_the_suites_rule():
    geneval, prompts = find_suite("geneval"), None

    prompts = [
        SuitePrompt(id="a", text="t", questions=(SuiteQuestion(question="p"), SuiteQuestion(question="q", needs=(0,))))
    ]
    assert marks_of_answers(geneval, prompts, {"a": ["11", "10"]})["a"]["score"] == [1.0, 0.0]
    assert marks_of_answers(find_suite("dpg"), prompts, {"a": ["11", "01", "10"]})["a"]["score"] == [1.0, 0.0, 0.5]


# judges


class Stand(ThreadingHTTPServer):
    """An endpoint that is slow, fails and talks nonsense now and then, and sees what is in a picture by its mean."""

    def __init__(self, faults):
        self.faults, self.requests, self.lock = faults, 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(200, json.dumps({"data": [{"id": "judge-1"}]}))

    def do_POST(self):
        with self.server.lock:
            self.server.requests += 1
            number = self.server.requests
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = body["messages"][0]["content"]
        picture = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
        is_light = np.asarray(picture.convert("L")).mean() > 100
        fault = self.server.faults(number, is_light)
        if fault == "slow":
            time.sleep(0.2)
        elif fault == "500":
            return self.reply(500, "oh no")
        elif fault == "malformed":
            return self.reply(200, '{"choices": [{"message"')
        elif fault == "empty":
            return self.reply(200, '{"choices": []}')
        elif fault == "400":
            return self.reply(400, "no")
        if "background" in text["text"]:
            said = "White." if is_light else "the black"
        else:
            said = "yes"
        return self.reply(200, json.dumps({"choices": [{"message": {"content": said}}]}))

    def reply(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def endpoint():
    made = []

    def make(faults=lambda number, is_light: None):
        made.append(Stand(faults))
        return made[-1]

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(judges, "_WAIT", 0.01)
    monkeypatch.setattr(judges.Endpoint.__init__, "__defaults__", ("", 0.01))


def judged(drawn, name, judge, folder=None, **more):
    suite = find_suite(name)
    prompts = suite.read_prompts(drawn[name][0])
    return judges.judge_suite(suite, prompts, folder or drawn[name][1], judge, **more)


def test_an_endpoint_with_faults_loses_nothing(drawn, endpoint, tmp_path):
    faults = ["slow", "500", None, "malformed", None, "empty", None]
    server = endpoint(lambda number, _: faults[number % len(faults)])
    found = judged(drawn, "tifa", server.address)
    clean = judged(drawn, "tifa", endpoint().address)
    assert found == clean and set(found) == {"drawbench_0", "drawbench_1", "drawbench_2"}
    assert found["drawbench_2"]["color"] == [1.0] and found["drawbench_1"]["object"] == [0.0]
    before = server.requests
    assert judged(drawn, "tifa", server.address) == found and server.requests == before


def test_an_endpoint_that_gives_up_keeps_what_is_done(drawn, endpoint):
    is_well = []
    server = endpoint(lambda number, is_light: None if is_well or is_light else "500")
    with pytest.raises(InputError, match=r"gave no answer about 1 of 3 files .*after 6 tries \(status 500\)"):
        judged(drawn, "tifa", server.address)
    is_well.append(True)
    before = server.requests
    assert len(judged(drawn, "tifa", server.address)) == 3 and server.requests - before == 2
    refusing = endpoint(lambda number, is_light: "400")
    with pytest.raises(InputError, match=r"after 1 tries \(status 400\)"):
        judged(drawn, "tifa", refusing.address)
    assert refusing.requests == 3


def test_an_endpoint_that_is_not_there_is_named(drawn):
    with pytest.raises(InputError, match="no answer after 6 tries .*start it, or correct the address"):
        judged(drawn, "tifa", "http://127.0.0.1:9/v1")


def test_the_models_own_answers(model, drawn):
    found = judged(drawn, "tifa", "self", model=lambda: model)
    assert set(found) == {"drawbench_0", "drawbench_1", "drawbench_2"}
    assert found["drawbench_2"]["color"] == [1.0]
    assert judged(drawn, "tifa", "self", model=lambda: pytest.fail("asked twice")) == found


REPLIES = {
    "repeat": (("yes", "no", "yes"), "yes", "Yes.", "1"),
    "exact first": (("A", "a", "b"), "a", "a", "1"),
    "article": (("A", "B"), "A", "A.", "1"),
    "sign": (("1", "2"), "1", "-1", "0"),
    "unicode form": (("caf\u00e9", "bar"), "caf\u00e9", "cafe\u0301", "1"),
    "several": (("RED", "red", "blue"), "red", "Red", "0"),
}


@pytest.mark.parametrize(("choices", "answer", "reply", "digits"), REPLIES.values(), ids=REPLIES.keys())
def test_what_an_endpoint_says_is_matched_with_the_choices(choices, answer, reply, digits, monkeypatch):
    judge = judges.Endpoint("http://127.0.0.1:9/v1", "judge-1")
    monkeypatch.setattr(judge, "_send", lambda *_: reply)
    question = SuiteQuestion(question="what ?", choices=choices, answer=answer)
    assert judge(Image.new("RGB", (8, 8)), [question]) == digits


def test_the_model_judges_by_choices_that_differ(model):
    picture = Image.new("RGB", (64, 64))
    color = SuiteQuestion(question="what color is the background ?", choices=("black", "white"), answer="black")
    plain = judges._SelfJudge(lambda: model)
    for choices in (("BLACK", "white", "black"), ("white", " black", "black", "White")):
        repeated = SuiteQuestion(question=color.question, choices=choices, answer="black")
        assert plain(picture, [repeated]) == plain(picture, [color])
    with pytest.raises(InputError, match="expected two or more distinct answers"):
        plain(picture, [SuiteQuestion(question=color.question, choices=("black", "Black"), answer="black")])


def test_judges_that_cannot_be_are_refused(drawn, tmp_path):
    with pytest.raises(InputError, match="expected import:FILE, self, mask2former:FOLDER or the address"):
        judged(drawn, "tifa", "gpt")
    with pytest.raises(InputError, match="the suite has no questions that it could answer"):
        judged(drawn, "genai", "self")
    with pytest.raises(InputError, match="holds no images of a suite; draw them first"):
        judged(drawn, "tifa", "self", folder=tmp_path, model=lambda: None)


# the command


def run(capsys, *arguments):
    code = main(["eval", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_command_draws_judges_and_compares(tmp_path, capsys):
    path = write_prompts("tifa", tmp_path / "prompts")
    suite = ("--suite", "tifa", "--prompts", path, "--model", "tiny")
    code, out, _ = run(capsys, *suite, "-o", tmp_path / "a")
    assert code == 0 and out.strip() == str(tmp_path / "a/images")
    code, out, _ = run(capsys, *suite, "-o", tmp_path / "a", "--judge", "self")
    assert code == 0 and "category, color" in out
    result = json.loads((tmp_path / "a/evaluation.json").read_text())
    assert result["judge"] == "self" and result["settings"]["model"] == "tiny" and len(result["records"]) == 3
    run(capsys, *suite, "-o", tmp_path / "b", "eval.seed=77")
    code, out, _ = run(
        capsys, *suite, "-o", tmp_path / "b", "--judge", "self", "--compare", tmp_path / "a/evaluation.json"
    )
    assert code == 0 and "change in points" in out
    (tmp_path / "scores.json").write_text(json.dumps({"question_details": {}}))
    code, _, err = run(capsys, *suite, "-o", tmp_path / "b", "--judge", f"import:{tmp_path / 'scores.json'}")
    assert code == 0 or "error" in err
    code, _, err = run(capsys, "--prompts", path)
    assert code == 2 and "--prompts: belongs to --suite NAME" in err
    code, _, err = run(capsys, "--suite", "other", "--prompts", path)
    assert code == 2 and "tifa" in err


# presets and the page


@pytest.mark.parametrize(
    "preset, family",
    [("show-o", "showo"), ("janus-pro", "janus"), ("mmada", "mmada"), ("lumina-dimoo", "lumina_dimoo"),
     ("bagel", "bagel")],
)  # fmt: skip
def test_presets_of_inference_scripts_are_what_the_family_does_by_itself(preset, family):
    sampling = importlib.import_module(f"hermesflow.models.{family}").SAMPLING
    assert {name: getattr(sampling, name) for name in PRESETS[preset].drawing} == PRESETS[preset].drawing


def test_presets_are_kept_with_the_images_and_refuse_what_says_otherwise(tmp_path, capsys):
    path = write_prompts("wise", tmp_path / "prompts")
    suite = ("--suite", "wise", "--prompts", path, "--model", "tiny", "-o", tmp_path / "a")
    assert run(capsys, *suite, "--preset", "mmada")[0] == 0
    settings = json.loads((tmp_path / "a/drawing.json").read_text())
    assert settings["preset"].startswith("mmada: Gen-Verse/MMaDA")
    assert settings["sampling"]["num_steps"] == 15 and settings["sampling"]["guidance_scale"] == 3.5
    for more, message in (
        (["--preset", "mmada", "eval.num_steps=4"], "--preset mmada: has num_steps 15, you gave 4"),
        (["--preset", "mmada", "drawing.guidance_scale=0"], "has guidance_scale 3.5, you gave 0"),
        (["--preset", "dalle"], "--preset dalle: there is none; there are show-o, "),
        ([], "were drawn with another sampling|were drawn with another preset"),
    ):
        code, _, err = run(capsys, *suite, *more)
        assert code == 2 and re.search(message, err), err
    code, _, err = run(capsys, "--preset", "mmada")
    assert code == 2 and "--preset: belongs to --suite NAME" in err


def test_the_page_escapes_what_the_suite_says(model, tmp_path, capsys):
    """And shows what is there: a judge elsewhere may have taken the images away."""
    (tmp_path / "genai_image.json").write_text(
        json.dumps({"00000": {"prompt": TEXTS[0]}, "00001": {"prompt": TEXTS[1]}})
    )
    (tmp_path / "genai_skills.json").write_text(json.dumps({"<script>alert(1)</script>": [0, 1]}))
    suite = ("--suite", "genai", "--prompts", tmp_path / "genai_image.json", "--model", "tiny", "-o", tmp_path / "out")
    assert run(capsys, *suite)[0] == 0
    (tmp_path / "out/images/00001.jpeg").unlink()
    (tmp_path / "scores.json").write_text('{"00000": 0.5, "00001": 0.75}')
    code, out, err = run(capsys, *suite, "--judge", f"import:{tmp_path / 'scores.json'}")
    assert code == 0 and f"page: {tmp_path / 'out/index.html'}" in out, err
    page = (tmp_path / "out/index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and page.count("<img") == 1
