"""Questions about captions: what a model wrote is read, filtered and written, with tiny models of random weights."""

import json
import re
from pathlib import Path

import pytest
import torch

from hermesflow.data.records import Question
from hermesflow.data.sources import read_source
from hermesflow.runtime.files import InputError, shown
from hermesflow.scoring import questions as question_generation
from hermesflow.scoring.questions import (
    QuestionFilter,
    QuestionGenerator,
    answers_freely,
    generate_questions,
    parse_questions,
    write_questions,
)

WRITTEN = """ rabbit, plane
Activities:
Colors: blue, red
Counting:
Other attributes:
About rabbit (animal):
Q: is this a rabbit?
Choices: yes, no
A: yes
Q: what animal is in the picture?
Choices:rabbit, dog,cat, bird
A: Rabbit
About plane (vehicle):
Q: is there a plane?
Choices: yes,no
A: yes
About blue (color):
Q: what color is the rabbit?
Choices: blue, red, green
A: pink
Q: is this a rabbit?
Choices: yes, no
A: yes
Q: which rabbit?
Choices: blue
A: blue
Q: how many (or how few)?
A: one
About 1,000 people
Q: how many people are there?
Choices: 1,000, 2,000
A: 1,000"""


def test_what_is_written_is_read() -> None:
    assert parse_questions(WRITTEN) == [
        Question("is this a rabbit?", ("yes", "no"), "yes", "animal/human", "rabbit"),
        Question("what animal is in the picture?", ("rabbit", "dog,cat", "bird"), "rabbit", "animal/human", "rabbit"),
        Question("is there a plane?", ("yes", "no"), "yes", "other", "plane"),
        Question("how many people are there?", ("1,000", "2,000"), "1,000", "other", "1,000 people"),
    ]


@pytest.mark.parametrize(
    ("line", "element", "element_type"),
    [
        ("About fox (animal):", "fox", "animal/human"),
        ("About woman (human):", "woman", "animal/human"),
        ("About starry night (other):", "starry night", "other"),
        ("About red  ( Color ) :", "red", "color"),
        ("About fox:", "fox", "other"),
        ("About fox", "fox", "other"),
        ("About fox (small) (object):", "fox (small)", "object"),
    ],
)
def test_elements_and_their_types(line: str, element: str, element_type: str) -> None:
    [question] = parse_questions(f"{line}\nQ: a?\nChoices: yes, no\nA: no")
    assert (question.element, question.element_type) == (element, element_type)


@pytest.mark.parametrize(
    "text", ["", "nonsense", "Q: a?\nChoices: yes, no\nA: yes", "About x (object):\nA: yes", "About :\nQ:\nA:"]
)
def test_nothing_is_made_up(text: str) -> None:
    assert parse_questions(text) == []


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Two", "2", True),
        ("two cats", "2", True),
        ("3 cats", "2", False),
        ("cats", "2", False),
        ("red", "red", True),
        ("Red.", "red", True),
        ("a bright red", "red", False),
        ("dark red", "red", True),
        ("", "red", False),
        ("anything", "yes", True),
        ("anything", "No", True),
        ("blue sky", "Blue Sky", True),
    ],
)
def test_free_answers(text: str, answer: str, right: bool) -> None:
    assert answers_freely(text, answer) is right


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of a tiny LLaMA and a tiny T5 of random weights, with a tokenizer of bytes; LLaMA's begins with <s>."""
    import transformers
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import WordLevel

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<s>", "<unk>", *alphabet])}
    folders = {}
    for name in ("llama", "t5"):
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        split = pre_tokenizers.Split("", "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        tokenizer.decoder = decoders.ByteLevel()
        template = "<s> $A" if name == "llama" else "$A </s>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 2), ("</s>", 1)]
        )
        folder = tmp_path_factory.mktemp(name)
        special = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
        special |= {"pad_token": "<pad>"} if name == "t5" else {}  # as LLaMA, whose tokenizer has none
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
        sizes = {"vocab_size": len(vocabulary), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if name == "llama":
                config = transformers.LlamaConfig(
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=600,
                    initializer_range=0.5,
                    **sizes,
                )
                model = transformers.LlamaForCausalLM(config)
            else:
                config = transformers.T5Config(
                    d_model=32,
                    d_ff=64,
                    d_kv=16,
                    num_layers=2,
                    num_heads=2,
                    decoder_start_token_id=0,
                    initializer_factor=3.0,
                    **sizes,
                )
                model = transformers.T5ForConditionalGeneration(config)
            model.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


CAPTIONS = ["a fox", "a blue rabbit and a red plane", "two\n cats </b>", "a"]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_is_written_as_one_by_one(models: dict[str, str], num_beams: int) -> None:
    generator = QuestionGenerator(models["llama"], num_beams=num_beams, max_new_tokens=12)
    texts = generator.write(CAPTIONS)
    assert texts == [generator.write([caption])[0] for caption in CAPTIONS]
    assert len(set(texts)) > 1 and all(texts) and not any("INST" in text for text in texts)
    assert generator.write([]) == []


def test_the_prompt_is_the_published_one(models: dict[str, str], monkeypatch) -> None:
    generator = QuestionGenerator(models["llama"], max_new_tokens=2)
    seen = []
    work = generator._model.generate
    monkeypatch.setattr(generator._model, "generate", lambda **kwargs: seen.append(kwargs) or work(**kwargs))
    generator.write(["a {braced}  fox"])
    [ids] = seen[0]["input_ids"].tolist()
    assert ids.count(2) == 1 and ids[0] == 2  # one start of text, not two
    prompt = generator._tokenizer.decode(ids[1:])
    assert prompt.startswith("[INST] <<SYS>>\nGiven an image description, generate one or two multiple-choice")
    assert prompt.endswith("for each type.\n\n<</SYS>>\n\nDescription: a {braced} fox [/INST] Entities:")
    assert seen[0]["num_beams"] == 5 and not seen[0]["do_sample"]


def test_what_follows_a_blank_line_is_cut(models: dict[str, str], monkeypatch) -> None:
    generator = QuestionGenerator(models["llama"], max_new_tokens=2)
    monkeypatch.setattr(generator._tokenizer, "batch_decode", lambda ids, **_: ["one\ntwo\n\nthree\n\nfour"] * len(ids))
    assert generator.write(["a fox"]) == ["one\ntwo"]


def test_a_caption_beyond_the_models_room_is_named(models: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"caption 'fox fox .*': has \d+ tokens with its prompt, the model has"):
        QuestionGenerator(models["llama"], max_new_tokens=12).write(["fox " * 100])


QUESTIONS = [
    Question("what color?", ("red", "blue", "green", "pink", "grey"), "grey", "color", "x"),
    Question("how many foxes are there?", ("1", "2"), "2", "counting", "x"),
    Question("a fox?", ("yes", "no"), "yes", "object", "x"),
]


def test_the_filter_asks_in_batches_as_one_by_one(models: dict[str, str]) -> None:
    qa_filter = QuestionFilter(models["t5"])
    texts = [f"{question.question} \n {'a fox ' * 3}" for question in QUESTIONS]
    answers = qa_filter._answer(texts)
    assert answers == [qa_filter._answer([text])[0] for text in texts] and len(set(answers)) > 1
    assert qa_filter.accept([], []) == []


@pytest.mark.parametrize(
    ("chosen", "free", "kept"),
    [
        (["grey", "2", "yes"], ["grey", "two foxes", "what"], [True, True, True]),
        (["grey", "1", "no"], ["grey", "2", "yes"], [True, False, False]),
        (["Grey ", "2", "YES"], ["pink", "three", ""], [False, False, True]),
    ],
)
def test_both_answers_must_agree(models: dict[str, str], monkeypatch, chosen: list, free: list, kept: list) -> None:
    qa_filter = QuestionFilter(models["t5"])
    asked = []
    monkeypatch.setattr(
        qa_filter, "_answer", lambda texts: asked.append(texts) or (chosen if "(A)" in texts[0] else free)
    )
    assert qa_filter.accept(["a", "b", "c"], QUESTIONS) == kept
    assert asked[0][0] == "what color? \n a \n (A) red (B) blue (C) green (D) pink (E) grey "
    assert asked[1][1] == "how many foxes are there? \n b"


def test_questions_go_back_to_their_captions(models: dict[str, str], monkeypatch) -> None:
    generator, qa_filter = QuestionGenerator(models["llama"], max_new_tokens=2), QuestionFilter(models["t5"])
    monkeypatch.setattr(generator, "write", lambda captions: [WRITTEN if "rabbit" in c else "" for c in captions])
    seen = []

    def accept(captions: list[str], questions: list[Question]) -> list[bool]:
        seen.extend(captions)
        return [question.element == "rabbit" for question in questions]

    monkeypatch.setattr(qa_filter, "accept", accept)
    captions = ["a fox", "a rabbit and a plane", "a rabbit"]
    assert [len(found) for found in generate_questions(captions, generator)] == [0, 4, 4]
    assert [len(found) for found in generate_questions(captions, generator, qa_filter)] == [0, 2, 2]
    assert seen == ["a rabbit and a plane"] * 4 + ["a rabbit"] * 4


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        (
            '[{"id": 7, "caption": "a rabbit", "img_path": "7.png", "prompt": "p", "other": 1}]',
            [{"id": 7, "img_path": "7.png", "prompt": "p", "caption": "a rabbit"}],
        ),
        (
            '{"id": "x", "caption": "a rabbit"}\n\n{"id": "y", "caption": "two"}\n',
            [{"id": "x", "caption": "a rabbit"}, {"id": "y", "caption": "two"}],
        ),
        ("a rabbit\n\n two \n", [{"id": "1", "caption": "a rabbit"}, {"id": "3", "caption": "two"}]),
    ],
    ids=["list", "lines", "text"],
)
def test_the_file_is_in_tifas_form(models: dict[str, str], tmp_path: Path, monkeypatch, text: str, heads: list) -> None:
    monkeypatch.setattr(QuestionGenerator, "write", lambda self, captions: [WRITTEN] * len(captions))
    (tmp_path / "captions").write_text(text)
    output = tmp_path / "out" / "questions.json"
    assert write_questions(tmp_path / "captions", output, models["llama"]) == 4 * len(heads)
    rows = json.loads(output.read_text())
    assert rows[0] == heads[0] | {
        "element": "rabbit",
        "element_type": "animal/human",
        "question": "is this a rabbit?",
        "choices": ["yes", "no"],
        "answer": "yes",
    }
    assert [{key: row[key] for key in heads[0]} for row in rows[::4]] == heads


def test_the_file_is_read_back_as_the_questions_of_records(models: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(QuestionGenerator, "write", lambda self, captions: [WRITTEN] * len(captions))
    data = tmp_path / "data.jsonl"
    data.write_text('{"id": 7, "caption": "a rabbit", "codes": [1]}\n{"id": "x", "caption": "two", "codes": [2]}\n')
    write_questions(data, tmp_path / "questions.json", models["llama"])
    records, rejected = read_source(data, tmp_path / "questions.json")
    assert [(record.id, len(record.questions)) for record in records] == [("7", 4), ("x", 4)] and not rejected
    assert records[0].questions == tuple(parse_questions(WRITTEN))


def test_from_captions_to_questions_with_real_models(models: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(question_generation, "_MAX_ANSWER_TOKENS", 3)
    monkeypatch.setattr(QuestionGenerator.__init__, "__kwdefaults__", {"num_beams": 2, "max_new_tokens": 4})
    (tmp_path / "captions.txt").write_text("a fox\na rabbit\n")
    count = write_questions(tmp_path / "captions.txt", tmp_path / "questions.json", models["llama"], models["t5"])
    assert count == 0 and json.loads((tmp_path / "questions.json").read_text()) == []  # nonsense holds no question


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no captions; write one a line, or JSON lines with id and caption"),
        (b"[]", "holds no captions"),
        (b'{"id": 1, "caption": "a"}\n{"id": 2}', "entry 2: expected an object with id and caption; complete it"),
        (b'{"caption": "a"}', "entry 1: expected an object with id and caption"),
        (b'[{"id": 1, "caption": " "}]', "entry 1: expected an object with id and caption"),
        (b'[{"id": 1, "caption": "a"}', "damaged JSON: the list .* has no end; add what is cut off"),
        (b'{"id": 1, "caption": "a", "prompt": NaN}', "entry 1: cannot be written as JSON .*; correct it"),
        (rb'{"id": 1, "caption": "\ud800"}', "entry 1: cannot be written as JSON .*surrogates.*; correct it"),
        (b"\xff\xfe", "not UTF-8 text; save it as UTF-8"),
        (None, "no such file; check the path"),
    ],
)
def test_a_file_without_captions_is_named(tmp_path: Path, text: bytes | None, message: str) -> None:
    path = tmp_path / "captions"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {message}"):
        write_questions(path, tmp_path / "questions.json", "no-model")


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        (b"\xef\xbb\xbfa fox\r\na cat\r\n", {"1": "a fox", "2": "a cat"}),
        (b'\xef\xbb\xbf{"id": 1, "caption": "a fox"}', {1: "a fox"}),
        ("a\u2028fox\x85b\nc\x0bd\r\n".encode(), {"1": "a\u2028fox\x85b", "2": "c\x0bd"}),
        (b"\n\na fox", {"3": "a fox"}),
    ],
    ids=["byte order mark", "byte order mark of JSON", "separators", "blank lines"],
)
def test_captions_of_a_file(tmp_path: Path, data: bytes, captions: dict) -> None:
    (tmp_path / "captions").write_bytes(data)
    entries = question_generation._read_captions(tmp_path / "captions")
    assert {entry["id"]: entry["caption"] for entry in entries} == captions


class StoppedWriter:
    """Stands in for the model: writes, and is interrupted before the caption that it stops at."""

    def __init__(self, name: str) -> None:
        self.seen: list[str] = []
        StoppedWriter.last = self

    stop = ""

    def write(self, captions: list[str]) -> list[str]:
        if self.stop in captions:
            raise KeyboardInterrupt
        self.seen += captions
        return [WRITTEN if caption.endswith(("0", "3")) else f"About {caption}\n{ASKED}" for caption in captions]


ASKED = "Q: a?\nChoices: yes, no\nA: yes"


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch) -> Path:
    """A folder where writing about captions 0 to 29 was interrupted after the first two batches of 8."""
    monkeypatch.setattr(question_generation, "QuestionGenerator", StoppedWriter)
    (tmp_path / "captions").write_text("".join(f"caption {number}\n" for number in range(30)))
    monkeypatch.setattr(StoppedWriter, "stop", "caption 20")
    with pytest.raises(KeyboardInterrupt):
        write_questions(tmp_path / "captions", tmp_path / "out.json", "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions", "out.json.partial"]
    monkeypatch.setattr(StoppedWriter, "stop", "")
    return tmp_path


def keep(lines: list[str], number: int, cut: str = "") -> str:
    return "".join(lines[:number]) + cut


@pytest.mark.parametrize(
    ("change", "num_kept"),
    [
        (lambda lines: keep(lines, 17), 16),
        (lambda lines: keep(lines, 12, lines[12][:30]), 11),
        (lambda lines: keep(lines, 12, lines[12][:-1]), 12),
        (lambda lines: keep(lines, 1, lines[1][:30]), 0),
        (lambda lines: keep(lines, 1), 0),
        (lambda lines: keep(lines, 5) + keep(lines[3:], 9), 4),
    ],
    ids=["as it was", "a cut line", "no line end", "the first cut", "none", "of two processes"],
)
def test_interrupted_questions_go_on(stopped: Path, change, num_kept: int) -> None:
    whole = write_questions(stopped / "captions", stopped / "whole.json", "m")
    partial = stopped / "out.json.partial"
    partial.write_text(change(partial.read_text().splitlines(keepends=True)))
    assert write_questions(stopped / "captions", stopped / "out.json", "m") == whole
    assert StoppedWriter.last.seen == [f"caption {number}" for number in range(num_kept, 30)]
    assert (stopped / "out.json").read_bytes() == (stopped / "whole.json").read_bytes()
    assert sorted(path.name for path in stopped.iterdir()) == ["captions", "out.json", "whole.json"]


def test_captions_may_change_behind_those_that_are_done(stopped: Path) -> None:
    text = (stopped / "captions").read_text()
    (stopped / "captions").write_text(text.replace("caption 10\n", "a fox\n") + "one more\n")
    write_questions(stopped / "captions", stopped / "out.json", "m")
    assert StoppedWriter.last.seen[:2] == ["a fox", "caption 11"] and StoppedWriter.last.seen[-1] == "one more"
    captions = list(dict.fromkeys(row["caption"] for row in json.loads((stopped / "out.json").read_text())))
    assert captions == (stopped / "captions").read_text().splitlines()


@pytest.mark.parametrize("kind", ["captions", "generator", "filter", "a file of another kind", "a folder"])
def test_what_another_run_left_is_not_overwritten(stopped: Path, kind: str) -> None:
    partial, models = stopped / "out.json.partial", ["m"]
    if kind == "captions":
        (stopped / "captions").write_text("a fox\n")
    elif kind in ("generator", "filter"):
        models = {"generator": ["n"], "filter": ["m", "f"]}[kind]
    elif kind == "a file of another kind":
        partial.write_text("mine")
    else:
        partial.unlink()
        partial.mkdir()
    before = None if kind == "a folder" else partial.read_text()
    message = "cannot be read" if kind == "a folder" else "a stopped run left it, with other captions or models; give"
    with pytest.raises(InputError, match=f"out.json.partial: {message}"):
        write_questions(stopped / "captions", stopped / "out.json", *models)
    assert before is None or partial.read_text() == before


def test_an_output_that_cannot_be_written_shows_before_the_work(tmp_path: Path, no_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(question_generation, "QuestionGenerator", lambda name: pytest.fail("started"))
    (tmp_path / "captions").write_text("a fox\n")
    for output, message in ((tmp_path, "is a folder or a device; give the name"), (no_folder / "x", "cannot be writt")):
        with pytest.raises(InputError, match=message):
            write_questions(tmp_path / "captions", output)


def test_a_disk_that_fills_up_is_named(tmp_path: Path, full_disk: Path, monkeypatch) -> None:
    monkeypatch.setattr(question_generation, "QuestionGenerator", StoppedWriter)
    (tmp_path / "captions").write_text("a fox\n")
    with pytest.raises(InputError, match="the disk is full"):
        write_questions(tmp_path / "captions", full_disk / "out.json")


@pytest.mark.parametrize(
    ("make", "hint"), [(QuestionGenerator, "--model"), (QuestionFilter, "--filter, or leave the filter out")]
)
def test_a_model_that_is_not_there_is_named(tmp_path: Path, make: type, hint: str) -> None:
    name = str(tmp_path / "no-model")
    with pytest.raises(InputError, match=f"no text model {re.escape(shown(name))}.*, or give another with {hint}"):
        make(name)
