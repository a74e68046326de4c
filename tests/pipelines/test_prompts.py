from __future__ import annotations

import pytest

from dit_accel.pipelines.prompts import cut_text, unknown_words


@pytest.fixture(params=["flux", "pixart"])
def pipe(request, tiny_flux, tiny_pixart):
    return {"flux": tiny_flux, "pixart": tiny_pixart}[request.param]()


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a Red apple, 3d style", []),
        ("zebra", ["zebra"]),
        ("a zebra, a red zebra and quagga!", ["zebra", "and", "quagga", "!"]),
        ("red-apple", ["red-apple"]),
    ],
)
def test_unknown_words(pipe, prompt, unknown):
    assert unknown_words(pipe, prompt) == unknown


def test_cut_text_is_what_the_tokenizer_cuts(pipe):
    prompt = "A red Apple, 3d style of the face"  # nine tokens and the end mark
    assert cut_text(pipe, prompt, 10) == ""
    assert cut_text(pipe, prompt, 9) == "face"
    assert cut_text(pipe, prompt, 4) == ", 3d style of the face"
    tokenizer = getattr(pipe, "tokenizer_2", None) or pipe.tokenizer
    kept = tokenizer(prompt, truncation=True, max_length=4).input_ids
    assert kept == tokenizer("A red Apple").input_ids
