"""Text deltas and stop strings."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from service.serving.text import TextStream


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def stream(text: str, *stop: str) -> tuple[list[str], bool]:
    """Feed a text byte by byte; return the deltas and whether a stop string ended it."""
    tokenizer = byte_tokenizer()
    pieces = TextStream(tokenizer.decode, stop)
    deltas = []
    for token_id in tokenizer.encode(text).ids:
        deltas.append(pieces.add(token_id))
        if pieces.is_stopped:
            break
    deltas.append(pieces.end())
    return deltas, pieces.is_stopped


def test_a_delta_never_ends_inside_a_character() -> None:
    deltas, _ = stream("aé😀z")
    assert [delta for delta in deltas if delta] == ["a", "é", "😀", "z"]


def test_an_incomplete_character_at_the_end_is_not_lost() -> None:
    tokenizer = byte_tokenizer()
    pieces = TextStream(tokenizer.decode, ())
    first, second, *_ = tokenizer.encode("a😀").ids
    assert pieces.add(first) == "a"
    assert pieces.add(second) == ""
    assert pieces.end() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("aab", ("ab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("x\n\ny", ("\n\n", "y"), "x"),
        ("hello", ("hello",), ""),
    ],
)
def test_text_ends_before_the_first_stop_string(text: str, stop: tuple[str, ...], expected: str) -> None:
    deltas, is_stopped = stream(text, *stop)
    assert is_stopped
    assert "".join(deltas) == expected


def test_the_beginning_of_a_stop_string_is_held_back_and_sent_when_it_is_none() -> None:
    deltas, is_stopped = stream("aENEx", "END")
    assert not is_stopped
    assert deltas == ["a", "", "", "EN", "Ex", ""]
    assert stream("xEN", "END") == (["x", "", "", "EN"], False)
