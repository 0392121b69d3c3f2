"""Questions about captions in the form of TIFA (arXiv 2303.11897): written by a text model, filtered by another."""

from __future__ import annotations

import itertools
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from hermesflow.data.entries import read_entries
from hermesflow.data.records import Question
from hermesflow.data.wording import overlap_f1
from hermesflow.runtime.files import (
    InputError,
    StrPath,
    check_output,
    read_text,
    split_lines,
    write_json,
    write_problem,
    write_text,
)
from hermesflow.runtime.progress import track
from hermesflow.scoring.text_models import load_text_model

GENERATOR = "tifa-benchmark/llama2_tifa_question_generation"
"""The model of the published code; another one is spoken to in the same form."""
FILTER = "allenai/unifiedqa-v2-t5-large-1363200"
"""The question-answering model of the published filter."""
CATEGORIES = (
    "object", "human", "animal", "food", "activity", "attribute", "counting", "color", "material", "spatial",
    "location", "shape", "other",
)  # fmt: skip
"""Types of the elements of a caption, as the model was taught them."""
# The words that the published model was fine-tuned on, misprints included (tifascore/question_gen_llama2.py).
_PROMPT = (
    "[INST] <<SYS>>\n"
    "Given an image description, generate one or two multiple-choice questions that verifies if the image description "
    "is correct.\n"
    "Classify each concept into a type (object, human, animal, food, activity, attribute, counting, color, material, "
    "spatial, location, shape, other), and then generate a question for each type.\n"
    "\n<</SYS>>\n\nDescription: {caption} [/INST] Entities:"
)
_NUM_BEAMS = 5
_MAX_NEW_TOKENS = 384  # the published code stops at 512 tokens with the prompt, which has some 130
_MAX_ANSWER_TOKENS = 30
_FREE_FORM_F1 = 0.6
_BATCH = 8
_ABOUT = re.compile(r"About\s+(?P<element>.+?)\s*(?:\((?P<type>[^()]*)\)\s*)?:?\s*")
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NUMBER_OF_WORD = {word: str(number) for number, word in enumerate(_NUMBERS)}


class QuestionGenerator:
    """Writes questions about captions, in TIFA's form as text."""

    def __init__(self, name: str = GENERATOR, *, num_beams: int = _NUM_BEAMS, max_new_tokens: int = _MAX_NEW_TOKENS):
        """
        Args:
            name: a causal language model of the Hugging Face hub, or the folder of one.
            num_beams: beams of the search; 1 is greedy.
            max_new_tokens: what it writes about a caption is cut here.
        Raises: InputError if the model cannot be had.
        """
        self._num_beams, self._max_new_tokens = num_beams, max_new_tokens
        self._tokenizer, self._model = load_text_model("AutoModelForCausalLM", name, "give another with --model")
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.pad_token is None:
            raise InputError(f"{name}: its tokenizer has no end of text; give another with --model")

    @torch.inference_mode()
    def write(self, captions: Sequence[str]) -> list[str]:
        """What the model writes about each caption, up to the first blank line.

        Raises: InputError on a caption that is longer than the model can read.
        """
        # The tokenizer puts the start of text before the prompt, where the model has one.
        prompts = [_PROMPT.format(caption=" ".join(caption.split())) for caption in captions]
        room = getattr(self._model.config, "max_position_embeddings", None)
        for caption, ids in zip(captions, self._tokenizer(prompts)["input_ids"] if prompts else (), strict=True):
            if room is not None and len(ids) + self._max_new_tokens > room:
                raise InputError(
                    f"caption {caption[:60]!r}: has {len(ids)} tokens with its prompt, the model has room for "
                    f"{room - self._max_new_tokens}; shorten it or give another --model"
                )
        texts = []
        for start in range(0, len(prompts), _BATCH):
            inputs = self._tokenizer(prompts[start : start + _BATCH], return_tensors="pt", padding=True)
            inputs = {name: inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
            ids = self._model.generate(
                **inputs,
                do_sample=False,
                num_beams=self._num_beams,
                max_new_tokens=self._max_new_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
            )
            ids = ids[:, inputs["input_ids"].shape[1] :]
            texts += self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.split("\n\n")[0] for text in texts]


class QuestionFilter:
    """Keeps the questions that a question-answering model answers rightly from the caption."""

    def __init__(self, name: str = FILTER):
        """
        Args:
            name: a sequence-to-sequence model of UnifiedQA's form, on the hub or in a folder.
        Raises: InputError if the model cannot be had.
        """
        self._tokenizer, self._model = load_text_model(
            "AutoModelForSeq2SeqLM", name, "give another with --filter, or leave the filter out"
        )

    def accept(self, captions: Sequence[str], questions: Sequence[Question]) -> list[bool]:
        """Which questions [Q] to keep, each about the caption beside it.

        The answer chosen from the choices must be the right one; and, unless it is yes or no, F1 of the free answer's
        words against its words must be above 0.6, where a number may be written in letters.
        """
        asked = [f"{question.question} \n {caption}" for caption, question in zip(captions, questions, strict=True)]
        listed = [_list_choices(question.choices) for question in questions]
        chosen = self._answer([f"{text} \n {choices}" for text, choices in zip(asked, listed, strict=True)])
        free = self._answer(asked)
        return [
            choice.strip().casefold() == question.answer.casefold() and answers_freely(text, question.answer)
            for choice, text, question in zip(chosen, free, questions, strict=True)
        ]

    @torch.inference_mode()
    def _answer(self, texts: Sequence[str]) -> list[str]:
        answers = []
        for start in range(0, len(texts), _BATCH):
            inputs = self._tokenizer(list(texts[start : start + _BATCH]), return_tensors="pt", padding=True)
            inputs = {name: inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
            ids = self._model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=_MAX_ANSWER_TOKENS)
            answers += self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return answers


def generate_questions(
    captions: Sequence[str], generator: QuestionGenerator, qa_filter: QuestionFilter | None = None
) -> list[list[Question]]:
    """Multiple-choice questions that a picture of each caption must answer.

    Args:
        captions: any number of texts.
        generator: writes the questions.
        qa_filter: drops those that cannot be answered from the caption; None keeps all.
    Returns: the questions of each caption; none where nothing that was written could be read.
    Source: TIFA (arXiv 2303.11897), and the code of HermesFlow (arXiv 2502.12148).
    """
    written = [parse_questions(text) for text in generator.write(captions)]
    if qa_filter is None:
        return written
    pairs = [(caption, question) for caption, of_it in zip(captions, written, strict=True) for question in of_it]
    kept = iter(qa_filter.accept([caption for caption, _ in pairs], [question for _, question in pairs]))
    return [[question for question in questions if next(kept)] for questions in written]


def parse_questions(text: str) -> list[Question]:
    """The questions in what a model wrote in TIFA's form.

    Lines "About ELEMENT (TYPE):", then "Q:", "Choices:" and "A:" for each question of it; other lines are passed over.
    A question is dropped if its answer is none of its choices, if it has fewer than two, or if it was asked before. A
    missing or unknown type is "other"; animals and humans are one type, as in TIFA.
    """
    questions: dict[str, Question] = {}
    element, element_type, asked, choices = "", "other", "", ()
    for line in map(str.strip, split_lines(text)):
        about = _ABOUT.fullmatch(line)
        name, _, rest = line.partition(":")
        name, rest = name.strip().lower(), rest.strip()
        if about:
            element, element_type, asked, choices = about["element"], _element_type(about["type"]), "", ()
        elif name == "q":
            asked, choices = rest, ()
        elif name == "choices":
            choices = _split_choices(rest)
        elif name == "a":
            answer = next((choice for choice in choices if choice.casefold() == rest.casefold()), None)
            if element and asked and answer is not None and len(choices) > 1:
                question = Question(asked, choices, answer, element_type, element)
                questions.setdefault(asked.casefold(), question)
            asked, choices = "", ()
    return list(questions.values())


def answers_freely(text: str, answer: str) -> bool:
    """Whether a free answer says the right one: F1 of their words above 0.6, or any where that is yes or no."""
    if answer.casefold() in ("yes", "no"):
        return True
    words = re.sub(r"[^\w\s]|_", "", text.casefold()).split()
    if answer.isdecimal():
        numbers = [word for word in (_NUMBER_OF_WORD.get(word, word) for word in words) if word.isdecimal()]
        words = numbers[:1] or words
    wanted = re.sub(r"[^\w\s]|_", "", answer.casefold()).split()
    return overlap_f1(Counter(words), Counter(wanted)) > _FREE_FORM_F1


def write_questions(
    captions_path: StrPath,
    output: StrPath,
    generator: str = GENERATOR,
    qa_filter: str | None = None,
) -> int:
    """Writes questions about the captions of a file, as JSON in TIFA's form.

    What is done is kept in OUTPUT.partial until the end: after a stop the same call resumes there.

    Args:
        captions_path: a JSON list or JSON lines of {"id", "caption"} (img_path and prompt are passed on), or plain text
            with a caption on each line, whose number is its id.
        output: a list of {"id", "caption", "question", "choices", "answer", "element_type", "element"}.
        generator, qa_filter: names of the models.
    Returns: the number of questions.
    Raises: InputError if the file holds no captions, the output cannot be written, OUTPUT.partial is of other captions
        or models, or a model cannot be had.
    """
    entries = _read_captions(Path(captions_path))
    check_output(output)
    partial, begin = Path(f"{output}.partial"), {"generator": generator, "filter": qa_filter}
    done = _read_partial(partial, begin, entries)
    writer = QuestionGenerator(generator)
    checker = QuestionFilter(qa_filter) if qa_filter is not None else None
    write_text(partial, "".join(json.dumps(line) + "\n" for line in [begin, *done]))  # without a line that was cut
    for start in track(range(len(done), len(entries), _BATCH), "questions", "batches"):
        batch = entries[start : start + _BATCH]
        found = generate_questions([entry["caption"] for entry in batch], writer, checker)
        lines = [
            {"entry": entry, "questions": [_question_row(question) for question in questions]}
            for entry, questions in zip(batch, found, strict=True)
        ]
        _add_lines(partial, lines)
        done += lines
    rows = [line["entry"] | question for line in done for question in line["questions"]]
    write_json(output, rows)
    partial.unlink()
    return len(rows)


def _read_partial(path: Path, begin: dict[str, Any], entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the first entries, as far as they are done and have not changed since.

    Raises: InputError if it was begun with other models, or none of it is about these entries.
    """
    if not path.exists():
        return []
    lines = [line for line in map(_value_of, split_lines(read_text(path))) if isinstance(line, dict)]
    pairs = itertools.takewhile(lambda pair: pair[0].get("entry") == pair[1], zip(lines[1:], entries, strict=False))
    kept = [line for line, _ in pairs]
    if lines[:1] != [begin] or (lines[1:] and not kept):
        raise InputError(
            f"{path}: a stopped run left it, with other captions or models; give those again to resume it, or delete "
            "it to begin anew"
        )
    return kept


def _value_of(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # a stop cut it
        return None


def _add_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise write_problem(path, error) or error from error


def _question_row(question: Question) -> dict[str, Any]:
    return {
        "element": question.element,
        "element_type": question.element_type,
        "question": question.question,
        "choices": list(question.choices),
        "answer": question.answer,
    }


def _read_captions(path: Path) -> list[dict[str, Any]]:
    """Entries with id and caption, and with img_path and prompt where the file has them."""
    text = read_text(path)
    if text.lstrip()[:1] in ("[", "{"):
        entries = read_entries(path)
    else:
        lines = enumerate(split_lines(text), 1)
        entries = [{"id": str(number), "caption": line.strip()} for number, line in lines if line.strip()]
    if not entries:
        raise InputError(f"{path}: holds no captions; write one a line, or JSON lines with id and caption")
    for number, entry in enumerate(entries, 1):
        texts = isinstance(entry, dict) and isinstance(entry.get("caption"), str) and entry["caption"].strip()
        if not texts or type(entry.get("id")) not in (str, int):
            raise InputError(f"{path}: entry {number}: expected an object with id and caption; complete it")
    kept = [{key: entry[key] for key in ("id", "img_path", "prompt", "caption") if key in entry} for entry in entries]
    for number, entry in enumerate(kept, 1):
        try:
            json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:  # NaN, or half of a pair of surrogates
            raise InputError(f"{path}: entry {number}: cannot be written as JSON ({error}); correct it") from error
    return kept


def _element_type(text: str | None) -> str:
    name = (text or "").strip().lower()
    if name in ("animal", "human", "animal/human"):
        return "animal/human"
    return name if name in CATEGORIES else "other"


def _split_choices(text: str) -> tuple[str, ...]:
    """Choices in order, without repeats; a comma inside a number parts nothing where blanks follow the others."""
    parts = re.split(r",\s+", text) if re.search(r",\s", text) else text.split(",")
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _list_choices(choices: Sequence[str]) -> str:
    """As UnifiedQA was taught: "(A) red (B) blue "; the published code names four at most."""
    return "".join(f"({letter}) {choice} " for letter, choice in zip(string.ascii_uppercase, choices, strict=False))
