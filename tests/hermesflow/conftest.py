"""What the tests of the library share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from hermesflow.data import encoding, published_pairs
from hermesflow.data.pairs import PAIRS_SCHEMA
from hermesflow.data.records import Record
from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.models import Model
from hermesflow.models.images import decode_image
from hermesflow.models.text_tokenizers import WordTokenizer
from hermesflow.models.tiny import TinyModel
from hermesflow.worlds import pretraining, shapes


def make_tiny_model() -> Model:
    text_tokenizer = WordTokenizer.of_words(shapes.vocabulary())
    vq_config = VQTokenizerConfig(
        code_bits=5, channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=(1, 1, 1), num_groups=4, patch_size=4
    )
    layout = TokenLayout(
        text_vocab_size=text_tokenizer.size,
        codebook_size=vq_config.codebook_size,
        num_image_tokens=16,
        sot=text_tokenizer.bos,
        eot=text_tokenizer.eos,
    )
    config = TransformerConfig(
        vocab_size=layout.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        mlp_size=64,
        qk_norm=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vq_tokenizer = VQTokenizer(vq_config).eval()
        # Wider than the usual 0.02: the model's answers and samples then differ from image to image.
        transformer = Transformer(config).init_weights(torch.Generator().manual_seed(0), std=0.2).eval()
    return TinyModel(transformer, vq_tokenizer, text_tokenizer, layout, 64, pretraining.PROMPTS, pretraining.SAMPLING)


@pytest.fixture(autouse=True)
def no_process_group():
    """Training that shards and is broken off leaves its process group to the next one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def tiny_model() -> Model:
    """A model of random weights with 16 tokens an image, made anew for each test, so that a test may train it."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def shared_tiny_model() -> Model:
    """The same model, one for all tests, for results that several of them share: leave its weights alone."""
    return make_tiny_model()


@pytest.fixture
def images_in_memory(shared_tiny_model: Model, monkeypatch) -> list[int]:
    """Four images a batch; receives 1 for every image that is read, and -n for n that are encoded."""
    events: list[int] = []
    encode = shared_tiny_model.encode_images

    def noting_decode(*arguments):
        events.append(1)
        return decode_image(*arguments)

    def noting_encode(images):
        events.append(-len(images))
        return encode(images)

    monkeypatch.setattr(published_pairs, "decode_image", noting_decode)
    monkeypatch.setattr(encoding, "decode_image", noting_decode)
    monkeypatch.setattr(shared_tiny_model, "encode_images", noting_encode)
    monkeypatch.setattr(encoding, "_BATCH_PIXELS", 4 * 64 * 64)
    return events


@pytest.fixture(scope="session")
def random_pairs() -> Callable[..., pa.Table]:
    """Makes a table of pairs whose images and captions are random; pair k has the first k % (n + 1) of n questions:
    (model, count=6, sides=("both",), asked=()) -> pairs."""

    def make(
        model: Model, count: int = 6, sides: Sequence[str] = ("both",), asked: Sequence[tuple[str, str]] = ()
    ) -> pa.Table:
        rng, layout = np.random.default_rng(0), model.layout
        words, rows = ["red", "green", "blue", "circle", "square", "a"], []
        for index in range(count):
            win, lose = (" ".join(words[item] for item in rng.integers(len(words), size=size)) for size in (4, 3))
            codes = rng.integers(layout.codebook_size, size=(3, layout.num_image_tokens)).tolist()
            row = dict.fromkeys(PAIRS_SCHEMA.names) | {"record_id": f"r{index}", "category": "colors"}
            row |= {"caption": "a red circle", "sides": sides[index % len(sides)], "record_codes": codes[0]}
            if row["sides"] != "understanding":
                row |= {"win_codes": codes[1], "lose_codes": codes[2]}
            if row["sides"] != "generation":
                row |= {"win_caption_ids": model.encode_text(win), "lose_caption_ids": model.encode_text(lose)}
            if asked:
                of_row = asked[: index % (len(asked) + 1)]
                row |= {"questions": [question for question, _ in of_row], "answers": [answer for _, answer in of_row]}
                row["choices"] = [["blue", answer, "top left"][: 2 + (answer == "no")] for _, answer in of_row]
            rows.append(row)
        return pa.Table.from_pylist(rows, PAIRS_SCHEMA)

    return make


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., dict]:
    """Makes a whole row of pairs for 16 codes, with texts and scores: (model, number, sides="both") -> row."""

    def pair(model, number, sides="both"):
        codes = np.random.default_rng(number).integers(0, 32, (3, 16)).tolist()
        row = dict.fromkeys(PAIRS_SCHEMA.names) | {
            "record_id": f"../r{number}",
            "category": "other",
            "caption": "a red circle",
            "sides": sides,
            "record_codes": codes[0],
        }
        if sides != "understanding":
            row |= {"win_codes": codes[1], "lose_codes": codes[2], "win_image_score": 0.75, "lose_image_score": 0.5}
        if sides != "generation":
            for role, text, score in (("win", "a red circle", 1.0), ("lose", "a blue circle", 0.25)):
                row |= {f"{role}_caption": text, f"{role}_caption_ids": model.encode_text(text)}
                row[f"{role}_caption_score"] = score
        return row

    return pair


@pytest.fixture(scope="session")
def asked() -> list[tuple[str, str]]:
    """Questions about a real image with their right answers, for random_pairs."""
    return [
        ("what color is the circle ?", "red"),
        ("how many circles are there ?", "two"),
        ("is there a square ?", "no"),
        ("where is the circle ?", "top left"),
    ]


@pytest.fixture(scope="session")
def tiny_records(shared_tiny_model: Model) -> list[Record]:
    """Seven records of the shapes world with the codes that the tiny model gives their images."""
    rng = np.random.default_rng(0)
    scenes = shapes.sample_scenes("train", 7, seed=0)
    records = [shapes.make_record(scene, f"train-{index}", rng) for index, scene in enumerate(scenes)]
    codes = shared_tiny_model.encode_images(np.stack([record.image for record in records])).numpy().astype(np.int32)
    return [replace(record, codes=row, image=None) for record, row in zip(records, codes, strict=True)]


def write_encoder(folder: Path) -> None:
    """Writes a BERT of random weights that knows the words of the shapes world."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *shapes.vocabulary()]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def make_encoder() -> Callable[[Path], None]:
    """Writes the folder of a text encoder, for a test that changes it."""
    return write_encoder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> str:
    """The folder of a text encoder, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("models") / "encoder"
    write_encoder(folder)
    return str(folder)
