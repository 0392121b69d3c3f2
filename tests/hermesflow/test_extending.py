"""What users add from outside the package: a family, a loss, a scorer and an evaluation, one file each, in one run.

The toy family shares little with the built-in model: its codes lie in the middle of the vocabulary, backwards and with
a gap, text follows them, an image is a causal span of 2 x 8 codes with an id after each row, drawn code by code.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hermesflow import tasks
from hermesflow.algorithms.losses import find_loss
from hermesflow.config import load_config
from hermesflow.data.pairs import read_pairs
from hermesflow.engine.token_layout import Ids
from hermesflow.models import load_model
from hermesflow.report.page import write_report
from hermesflow.runtime.files import InputError, read_json
from hermesflow.selfplay import run_selfplay
from hermesflow.worlds import shapes

TOY_FAMILY = '''
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.token_layout import Ids, Layout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.engine.weights import load_weights, save_weights
from hermesflow.kernels.linear_sample import linear_sample
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models.images import fit_image
from hermesflow.models.model import Model, PromptFormat
from hermesflow.models.text_tokenizers import WordTokenizer

BOS, ROW_END, BOI, EOI = range(4)
FIRST_CODE, NUM_CODES = 8, 32
FIRST_TEXT = 100


class ToyLayout(Layout):
    """[4 specials | a gap | codes, backwards, with a gap in their middle | a gap | text]"""

    codebook_size, num_image_tokens, image_grid = NUM_CODES, 16, (2, 8)
    image_mode = prefix_mode = "causal"
    before_image, row_end, after_image = (BOI,), (ROW_END,), (EOI,)
    eot = FIRST_TEXT

    def __init__(self, num_words):
        self.vocab_size = FIRST_TEXT + num_words
        self.text_ids = Ids(range(FIRST_TEXT, self.vocab_size))
        self.code_ids = Ids([FIRST_CODE + 40 - code - (code > 16) for code in range(NUM_CODES)])

    def text_prompt(self, text_ids):
        return [BOS, *text_ids]

    def image_prefix(self, codes):
        return [BOS, *self.image(codes)]

    def question(self, text_ids):
        return list(text_ids)


class ToyTokenizer(WordTokenizer):
    """Words, whose ids in the joint vocabulary begin at FIRST_TEXT."""

    def encode(self, text):
        return [FIRST_TEXT + id for id in super().encode(text)]

    def decode(self, ids):
        return super().decode([id - FIRST_TEXT for id in ids])


@dataclass(frozen=True, kw_only=True)
class ToySampling:
    temperature: float = 1.0


class ToyDecoder:
    """Draws an image code by code, each from all that precedes it."""

    params = ToySampling

    def __init__(self, transformer, layout, backend=None):
        self.transformer, self.layout, self.backend = transformer, layout, backend

    def generate(self, prompt_ids, seeds, params, *, known_codes=None, max_sequences=256, progress=iter):
        num_images, layout = seeds.shape[1], self.layout
        codes = torch.zeros(*seeds.shape, layout.num_image_tokens, dtype=torch.int64)
        weight, bias = layout.code_ids.rows(self.transformer.head)
        for row, ids in enumerate(prompt_ids):
            prompt = layout.text_prompt(ids)
            for number, position in enumerate(layout.code_positions):
                spans = [(prompt, -1, "causal")]
                spans += [(layout.image(image)[:position], 0, "causal") for image in codes[row].tolist()]
                tree = SpanTree.build(spans)
                rows = torch.tensor([len(prompt) + position * (image + 1) - 1 for image in range(num_images)])
                hidden = self.transformer(tree, rows=rows)
                key = RandomKey(seeds[row], torch.full_like(seeds[row], number), torch.zeros_like(seeds[row]))
                drawn, _ = linear_sample(hidden, weight, bias, temperature=params.temperature, key=key)
                codes[row, :, number] = drawn
        return codes


class ToyModel(Model):
    image_decoder = ToyDecoder

    def encode_images(self, images):
        """The image tokenizer reads 32 x 128 pixels."""
        return super().encode_images(np.stack([_resize(image, (128, 32)) for image in images]))

    def decode_images(self, codes, height=None, width=None):
        images = super().decode_images(codes, height, width)
        size = self.image_size
        return np.stack([_resize(image, (size, size)) for image in images]) if len(images) else images

    def write(self, folder, dtype):
        save_weights(self.transformer, folder / "model.safetensors", dtype)
        save_weights(self.vq_tokenizer, folder / "vq_tokenizer.safetensors", dtype)
        self.text_tokenizer.save(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))


class ToyFamily:
    files = ("config.json", "*.safetensors", "tokenizer.json")

    def claims(self, config):
        return isinstance(config, dict) and config.get("model_type") == "toy"

    def load(self, folder, config, device, dtype, **options):
        model = make(ToyTokenizer.from_file(folder / "tokenizer.json"))
        load_weights(model.transformer, folder / "model.safetensors", dtype=dtype)
        load_weights(model.vq_tokenizer, folder / "vq_tokenizer.safetensors")
        return model


FAMILY = ToyFamily()


def make(tokenizer):
    """A model of random weights."""
    layout = ToyLayout(tokenizer.size)
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_size": 64, "norm": "rmsnorm"}
    transformer = Transformer(TransformerConfig(vocab_size=layout.vocab_size, **shape))
    transformer.init_weights(torch.Generator().manual_seed(0), std=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vq_tokenizer = VQTokenizer(VQTokenizerConfig(
            code_bits=5, channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=(1, 1, 1), num_groups=4, patch_size=4
        ))
    prompts = PromptFormat(caption_question="give a caption for this image .", max_caption_tokens=6)
    return ToyModel(transformer.eval(), vq_tokenizer.eval(), tokenizer, layout, 64, prompts, ToySampling())


def _resize(image, size):
    from PIL import Image
    return np.asarray(Image.fromarray(image).resize(size))
'''

TOY_LOSS = '''
from hermesflow.algorithms.losses import PairLoss


class Squared(PairLoss):
    """Means over tokens, held to a margin of 1."""

    means_over_tokens = True

    def of_pairs(self, win, lose, config):
        return (1 - config.beta * (win - lose)).square()


LOSS = Squared()
'''

TOY_SCORER = """
def brightness(images, record):
    return images.mean(axis=(1, 2, 3)) / 255
"""

TOY_EVALUATION = '''
import torch

from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.evaluation.evaluation import Evaluation


class Brightness(Evaluation):
    """How many of an image's drawn pixels are bright, and whether a question has a first token."""

    def measure(self, model, config):
        rows = []
        for number, text in enumerate(("a red circle", "a blue square", "a green triangle")):
            seeds = torch.arange(config.images_per_prompt)[None] + config.seed
            codes = model.engine.generate([model.image_prompt(text)], num_images=config.images_per_prompt, seeds=seeds,
                                          temperature=model.sampling_of(config).temperature)
            bright = model.decode_images(codes[0]) > 127
            asked = model.question_prompt("is there a circle ?")
            sampling, seeds = SamplingParams(temperature=0.0, max_new_tokens=1), torch.zeros(1, 1, 1, dtype=torch.int64)
            [[[answer]]] = model.engine.generate_text(codes[:, 0], [[asked]], sampling=[sampling], seeds=seeds)
            scores = {"bright": [int(bright.sum()), bright.size], "answers/any": [len(answer), 1]}
            rows.append({"id": f"prompt-{number}", "scores": scores})
        return rows


SUITE = Brightness()
'''
FILES = {
    "toy_family": TOY_FAMILY, "toy_loss": TOY_LOSS, "toy_scorer": TOY_SCORER, "toy_evaluation": TOY_EVALUATION,
}  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """The folder of the four files, importable, of a model of the family, and of records."""
    folder = tmp_path_factory.mktemp("toys")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import toy_family

        toy_family.make(toy_family.ToyTokenizer.of_words(shapes.vocabulary())).save(folder / "model")
        records, rng = [], np.random.default_rng(0)
        for number, scene in enumerate(shapes.sample_scenes("train", 12, seed=0)):
            record = shapes.make_record(scene, str(number), rng)
            Image.fromarray(record.image).save(folder / f"{number}.png")
            questions = [
                {"question": item.question, "choices": list(item.choices), "answer": item.answer}
                for item in record.questions
            ]
            records.append(
                {"id": record.id, "caption": record.caption, "img_path": f"{number}.png", "questions": questions}
            )
        (folder / "records.json").write_text(json.dumps(records))
        yield folder
        for name in FILES:
            sys.modules.pop(name, None)


def settings(toys: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"run.folder={folder}",
        "run.name=toys",
        f"model.name={toys / 'model'}",
        "model.family=toy_family:FAMILY",
        f"data.source={toys / 'records.json'}",
        "data.num_records=6",
        "selfplay.num_rounds=2",
        "curation.num_images=2",
        "curation.batch_records=3",
        "curation.score=toy_scorer:brightness",
        "curation.threshold=0",
        "curation.margin=0",
        "curation.keep=any",
        "curation.caption_top_k=[2]",
        "train.loss_type=toy_loss:LOSS",
        "train.num_steps=2",
        "train.pairs_per_step=2",
        "train.warmup_steps=0",
        "eval.suite=toy_evaluation:SUITE",
        "eval.images_per_prompt=2",
        *more,
    ]


def test_two_rounds_with_all_four(toys, tmp_path, capsys):
    summary = run_selfplay(load_config(None, settings(toys, tmp_path)))
    assert [sorted(metrics["change"]) for metrics in summary["rounds"]] == [["answers", "bright"]] * 2
    assert 0 < summary["before"]["bright"] < 1 and len(summary["before"]["bright_ci95"]) == 2
    run = tmp_path / "toys"
    for number in (1, 2):
        pairs = read_pairs(run / f"round-{number}" / "pairs.parquet").to_pylist()
        assert pairs and all(pair["win_image_score"] > pair["lose_image_score"] for pair in pairs if pair["win_codes"])
        lines = [json.loads(line) for line in (run / f"round-{number}/train/metrics.jsonl").read_text().splitlines()]
        # At the first step policy and reference agree, so that each pair loses (1 - 0) ** 2.
        first, second = (line["generation/loss"] for line in lines)
        assert first == pytest.approx(1) and second != first
        trained = load_model(str(run / f"round-{number}/model"), family="toy_family:FAMILY")
        before = toys / "model" if number == 1 else run / "round-1/model"
        before = load_model(str(before), family="toy_family:FAMILY")
        assert not torch.equal(trained.transformer.head.weight, before.transformer.head.weight)
    out = capsys.readouterr().out
    assert "bright" in out and "answers, any" in out and "report:" in out
    page = write_report(run).read_text()
    assert "bright" in page and "on 3 records" in page
    assert read_json(run / "summary.json")["settings"]["train"]["loss_type"] == "toy_loss:LOSS"


def test_a_toy_image_is_its_own_whatever_it_is_drawn_beside(toys):
    model = load_model(str(toys / "model"), family="toy_family:FAMILY")
    prompts = [model.image_prompt(text) for text in ("a red circle", "a blue square")]
    seeds = torch.arange(4).view(2, 2)
    together = model.engine.generate(prompts, num_images=2, seeds=seeds, temperature=1.0)
    alone = model.engine.generate(prompts[1:], num_images=1, seeds=seeds[1:, 1:], temperature=1.0)
    assert torch.equal(together[1, 1], alone[0, 0]) and together.unique().numel() > 8


def test_what_a_family_cannot_do_is_told(toys, tmp_path):
    model = load_model(str(toys / "model"), family="toy_family:FAMILY")
    with pytest.raises(InputError, match="draws whole images and keeps no part of one; generate instead"):
        next(tasks.inpaint_images(model, toys / "0.png", toys / "1.png", "a red circle"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return (win - lose).sum()", r"of_pairs gave \[\], expected a tensor \[2\], a value for each pair"),
        ("return 1.0", "of_pairs gave float, expected a tensor"),
        ("return (win - lose).detach()", "of_pairs gave no gradient; compute the loss from win and lose"),
    ],
    ids=["a sum", "a number", "no gradient"],
)
def test_a_loss_that_is_none_is_refused(toys, tmp_path, monkeypatch, body, message):
    (tmp_path / "odd_loss.py").write_text(
        "from hermesflow.algorithms.losses import PairLoss\n"
        f"class Odd(PairLoss):\n    def of_pairs(self, win, lose, config):\n        {body}\n"
        "LOSS = Odd()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "odd_loss", raising=False)
    find_loss.cache_clear()
    with pytest.raises(InputError, match=f"train.loss_type odd_loss:LOSS: {message}"):
        run_selfplay(load_config(None, settings(toys, tmp_path, "train.loss_type=odd_loss:LOSS")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("FAMILY.load = lambda *_, **__: None", "load gave None, no Model"),
        ("ToyLayout.eot = 3", "expected the layout's eot among its text ids, got 3"),
        ("ToyLayout.image_mode = 'full'", "draws masked codes of full images"),
        ("ToyLayout.image_grid = (4, 8)", r"expected an image_grid of 16 codes, got \[4, 8\]"),
        ("ToyLayout.codebook_size = 64", "expected 64 code_ids, got 32"),
        ("ToyLayout.row_end = (999,)", "expected the layout's ids around codes in"),
        ("ToyLayout.prefix_mode = 'fulll'", "expected the layout's modes to be full or causal, got 'fulll'"),
    ],
)
def test_a_family_that_does_not_fit_itself_is_one_line(toys, tmp_path, monkeypatch, change, message):
    decoder = "ToyModel.image_decoder = Model.image_decoder\n" if "full'" in change and "image_mode" in change else ""
    (tmp_path / "odd_family.py").write_text(f"{TOY_FAMILY}\n{decoder}{change}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "odd_family", raising=False)
    with pytest.raises(InputError, match=f"model.family odd_family:FAMILY: .*{message}"):
        load_model(str(toys / "model"), family="odd_family:FAMILY")


def test_an_evaluation_of_other_records_is_refused_when_it_is_made(toys, tmp_path, monkeypatch):
    (tmp_path / "odd_suite.py").write_text(
        "import itertools\n"
        "from hermesflow.evaluation.evaluation import Evaluation\n"
        "class Odd(Evaluation):\n    calls = itertools.count()\n"
        "    def measure(self, model, config): return [{'id': str(next(self.calls)), 'scores': {'right': [1, 2]}}]\n"
        "SUITE = Odd()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "odd_suite", raising=False)
    with pytest.raises(InputError, match="eval.suite odd_suite:SUITE: record '0' before is '1' after"):
        run_selfplay(load_config(None, settings(toys, tmp_path, "eval.suite=odd_suite:SUITE")))
    assert (tmp_path / "toys/round-1/model").exists() and not (tmp_path / "toys/round-1/evaluation.json").exists()


def test_a_setting_that_the_family_lacks_is_refused(toys, tmp_path):
    message = r"num_steps \(of drawing, curation or eval\): .* not drawn by it, but by temperature; leave it as it is"
    with pytest.raises(InputError, match=message):
        run_selfplay(load_config(None, settings(toys, tmp_path, "drawing.num_steps=4")))
    assert not list(tmp_path.glob("toys/round-*"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.family=toy_family:NONE", "model.family toy_family:NONE: the module toy_family has no NONE"),
        ("curation.score=toy_none:f", "curation.score toy_none:f: the module toy_none cannot be imported"),
        ("train.loss_type=toy_none:LOSS", "train.loss_type toy_none:LOSS: the module toy_none cannot be imported"),
        ("eval.suite=toy_none:SUITE", "eval.suite toy_none:SUITE: the module toy_none cannot be imported"),
        ("selfplay.algorithm=toy_none:A", "selfplay.algorithm toy_none:A: the module toy_none cannot be imported"),
    ],
)
def test_what_cannot_be_had_is_told_before_the_work(toys, tmp_path, setting, message):
    with pytest.raises(InputError, match=message):
        run_selfplay(load_config(None, settings(toys, tmp_path, setting)))
    assert not list(tmp_path.glob("toys/round-*"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.family=toy", 'model.family: expected auto, .*showo, show-o2, tiny, or "module:object", got "toy"'),
        ("train.loss_type=toy", "train.loss_type: expected sigmoid, ipo, hinge, robust, simpo, or"),
        ("eval.suite=toy", "eval.suite: expected builtin, records, or"),
        ("selfplay.algorithm=toy", "selfplay.algorithm: expected pair-dpo, grpo, own-drawings, caption-grpo, or"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(setting, message):
    with pytest.raises(InputError, match=message):
        load_config(None, [setting])


@pytest.mark.parametrize("ids", [range(3, 9), [7, 2, 5, 11]], ids=["range", "any"])
def test_ids_number_and_find_rows_of_a_head(ids):
    head, table = torch.nn.Linear(4, 12), Ids(ids)
    numbers = torch.arange(len(ids))
    assert table.of(numbers).tolist() == list(ids) == [table[number] for number in range(len(table))]
    assert torch.equal(table.numbers(table.of(numbers)), numbers)
    weight, bias = table.rows(head)
    assert torch.equal(weight, head.weight[list(ids)]) and torch.equal(bias, head.bias[list(ids)])
    assert ids[0] in table and 0 not in table


def test_the_docs_tell_true_numbers():
    """Each row of docs/extending.md names its table in the registry, or the op's."""
    from hermesflow.runtime import registry

    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    tables = {name for name, value in vars(registry).items() if name.isupper() and isinstance(value, dict)}
    assert all(f"| `{name}` | 2 |" in text for name in tables)
