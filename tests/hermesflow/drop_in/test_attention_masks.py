"""Masks of the published layouts are read back, all others refused with the reason."""

import re

import pytest
import torch

from hermesflow.drop_in.attention_masks import ImageFirst, ImageLast, UnknownMaskError, read_masks

FAR = float(torch.iinfo(torch.int64).min)


def additive(sees, dtype=torch.float32):
    """[L, L] bool -> what the published code adds to the scores, [1, 1, L, L]."""
    return torch.zeros(sees.shape).masked_fill(~sees, FAR).to(dtype)[None, None]


def image_last(length, first, image):
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    sees = (columns <= rows) & ((columns >= first) | (rows < first))
    sees[image:, first:] = True
    return sees


def image_first(length, first, end):
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    sees[:, first:end] = True
    return sees


# No pads, pads, one token of text, nothing but an image and pads.
LAST = [(9, 0, 4), (9, 3, 6), (9, 5, 6), (9, 4, 4)]
# Codes from the start, features after a system prompt, an image alone, text alone.
FIRST = [(9, 0, 5), (9, 3, 7), (9, 0, 9), (9, 0, 0), (1, 0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "first", "image"), LAST)
def test_text_and_then_an_image(length, first, image, dtype):
    (reading,) = read_masks(additive(image_last(length, first, image), dtype), 1, length)
    assert reading == ImageLast(first, image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "first", "end"), FIRST)
def test_an_image_and_then_text(length, first, end, dtype):
    (reading,) = read_masks(additive(image_first(length, first, end), dtype), 1, length)
    assert reading == ImageFirst(first, end)


def test_what_is_read_says_what_the_mask_says():
    """Every pair of bounds of both layouts: the reading's own mask is the one that was read."""
    length = 7
    for low in range(length):
        for high in range(low, length + 1):
            for make in (image_last, image_first):
                sees = make(length, low, high)
                (reading,) = read_masks(additive(sees), 1, length)
                if isinstance(reading, ImageLast):
                    again = image_last(length, reading.first, reading.image)
                else:
                    again = image_first(length, reading.first, reading.end)
                assert torch.equal(again, sees)


def test_each_sequence_of_a_batch_is_read_by_itself():
    masks = [image_last(9, 2, 5), image_first(9, 0, 4), image_last(9, 0, 7)]
    batch = torch.cat([additive(sees) for sees in masks])
    assert read_masks(batch, 3, 9) == [ImageLast(2, 5), ImageFirst(0, 4), ImageLast(0, 7)]
    assert read_masks(batch[:1], 3, 9) == [ImageLast(2, 5)] * 3  # one mask for all


@pytest.mark.parametrize("far", [-1e4, float("-inf"), torch.finfo(torch.float32).min])
def test_any_number_that_hides_a_token_will_do(far):
    mask = torch.zeros(1, 1, 6, 6).masked_fill(~image_first(6, 0, 3), far)
    assert read_masks(mask, 1, 6) == [ImageFirst(0, 3)]


@pytest.mark.parametrize("make", [image_last, image_first])
def test_one_entry_more_or_less_is_seen(make):
    """No entry of either layout may differ, pads' included."""
    length, known = 6, make(6, 2, 4)
    for row in range(length):
        for column in range(length):
            sees = known.clone()
            sees[row, column] = ~sees[row, column]
            try:
                (reading,) = read_masks(additive(sees), 1, length)
            except UnknownMaskError:
                continue
            # What is still a layout is read as what it now is.
            again = (
                image_first(length, reading.first, reading.end)
                if isinstance(reading, ImageFirst)
                else (image_last(length, reading.first, reading.image))
            )
            assert torch.equal(again, sees), (row, column)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "there is no attention_mask"),
        (image_first(4, 0, 2)[None, None], "the attention_mask is of torch.bool, not of numbers"),
        (additive(image_first(4, 0, 2)).long(), "the attention_mask is of torch.int64"),
        (additive(image_first(4, 0, 2))[0, 0], "the attention_mask is [4, 4], not [2, 1, 4, 4]"),
        (additive(image_first(5, 0, 2)), "the attention_mask is [1, 1, 5, 5], not [2, 1, 4, 4]"),
        (additive(image_first(4, 0, 2)).expand(3, -1, -1, -1), "the attention_mask is [3, 1, 4, 4]"),
        (additive(image_first(4, 0, 2)) + 0.5, "sequence 0 has entries other than 0 and at most -10000"),
        (additive(image_first(4, 0, 2)).where(torch.ones(4, 4).tril() > 0, torch.nan), "sequence 0 has entries"),
        (additive(image_first(4, 0, 2) | torch.eye(4).bool().roll(3, 1)), "sequence 0 is none of the known layouts"),
    ],
    ids=["missing", "bool", "int", "two-dims", "length", "batch", "between", "nan", "odd"],
)
def test_what_is_no_such_mask_is_named(mask, message):
    with pytest.raises(UnknownMaskError, match=re.escape(message)):
        read_masks(mask, 2, 4)
