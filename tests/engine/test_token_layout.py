"""How sequences are framed, and what a layout refuses."""

import dataclasses

import pytest


def test_an_image_by_its_features(layout):
    """Show-o's variant with CLIP features: mmu, system prompt, soi, features; then eoi and the text, without sot."""
    framed = dataclasses.replace(layout, system_ids=(20, 21))
    assert framed.feature_prefix(3) == ([framed.special("mmu"), 20, 21, framed.soi, *[framed.pad] * 3], 4)
    assert layout.feature_prefix(1) == ([layout.special("mmu"), layout.soi, layout.pad], 2)
    assert framed.feature_question([5, 6]) == [framed.eoi, 5, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sot": 40}, r"sot must be a text id in \[0, 40\), got 40"),
        ({"eot": -1}, "eot must be a text id in .*, got -1"),
        ({"system_ids": (3, 41)}, "system_ids must be a text id in .*, got 41"),
    ],
    ids=["sot", "eot", "system"],
)
def test_bad_layout(layout, change, message):
    with pytest.raises(ValueError, match=f"TokenLayout: {message}"):
        dataclasses.replace(layout, **change)
