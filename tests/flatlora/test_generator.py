"""Law 9: the integer stream and its normals are a published contract; these bits never change."""

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatlora.ops import Stream, noise_key
from flatlora.ops.philox import philox4x32_
from flatlora.ops.reference import _tables, standard_normals

CPU = torch.device("cpu")

words32 = st.integers(0, 2**32 - 1)


def philox(counter: list[int], key: tuple[int, int], rounds: int) -> list[int]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return [int(word) for word in philox4x32_((c0, c1, c2, c3), key, rounds=rounds)]


def philox_in_integers(counter: list[int], key: tuple[int, int], rounds: int) -> list[int]:
    """The definition, on Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


# counter, key, 7 rounds, 10 rounds: kat_vectors of Random123
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "5f6fb709 0d893f64 4f121f81 4f730a48",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "5207ddc2 45165e59 4d8ee751 8c52f662",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "4dfccaba 190a87f0 c47362ba b6b5242a",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "seven", "ten"), KNOWN)
def test_philox_gives_the_known_answers(counter: str, key: str, seven: str, ten: str) -> None:
    def parse(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    k0, k1 = parse(key)
    assert philox(parse(counter), (k0, k1), 7) == parse(seven)
    assert philox(parse(counter), (k0, k1), 10) == parse(ten)


@given(st.lists(words32, min_size=4, max_size=4), st.tuples(words32, words32), st.integers(1, 10))
def test_philox_equals_its_definition(
    counter: list[int], key: tuple[int, int], rounds: int
) -> None:
    assert philox(counter, key, rounds) == philox_in_integers(counter, key, rounds)


@given(st.integers(0, 2**64 - 1), st.text(max_size=40))
def test_a_key_is_two_words(seed: int, name: str) -> None:
    assert all(0 <= word < 2**32 for word in noise_key(seed, name))


def test_keys_never_change() -> None:
    assert [
        f"{word:08x}" for word in noise_key(42, "model.layers.0.self_attn.q_proj")
    ] == GOLDEN_KEY


@pytest.mark.parametrize(
    "start", [0, 8, 5, 2**35 - 11], ids=["start", "block", "inside", "beyond-2**32-blocks"]
)
def test_each_normal_follows_the_specification(start: int) -> None:
    key = noise_key(7, "layer")
    normals = standard_normals(Stream(key, step=3, draw=2), start, 40, CPU)
    for offset, normal in enumerate(normals.tolist()):
        block, place = divmod(start + offset, 8)
        word = philox_in_integers([block % 2**32, block >> 32, 3, 2], key, 7)[place // 2]
        low, high = word & 0xFFFF, word >> 16
        radius = math.sqrt(-2 * math.log((low + 0.5) / 65536))
        angle = 2 * math.pi * high / 65536 - math.pi
        expected = radius * (math.cos(angle) if place % 2 == 0 else math.sin(angle))
        assert normal == pytest.approx(expected, rel=2e-7, abs=1e-15)


def test_the_tables_never_change() -> None:
    """Every entry is the float32 nearest to the exact value, whatever the platform's libm.

    The nearest tie between two float32 values is 1.5e-6 of their distance away (found with 50
    digits), far beyond the error of any float64 sine or logarithm.
    """
    assert [sha256(table) for table in _tables(CPU)] == GOLDEN_TABLES


def test_the_integer_stream_never_changes() -> None:
    key = noise_key(42, "model.layers.0.self_attn.q_proj")
    index = torch.arange(4096)
    counter = (
        index,
        torch.zeros_like(index),
        torch.full_like(index, 10),
        torch.full_like(index, 1),
    )
    words = torch.stack(philox4x32_(counter, key), dim=1)
    assert sha256(words, "<u4") == GOLDEN_WORDS


def test_the_normals_never_change() -> None:
    key = noise_key(42, "model.layers.0.self_attn.q_proj")
    normals = standard_normals(Stream(key, step=10, draw=1), 0, 8 * 4096, CPU)
    assert [value.hex() for value in normals[:8].tolist()] == GOLDEN_NORMALS
    assert sha256(normals) == GOLDEN_NORMALS_HASH


def test_the_tail_ends_where_the_specification_says() -> None:
    radius, cosine, sine = _tables(CPU)
    assert float(radius.max()) == pytest.approx(math.sqrt(-2 * math.log(0.5 / 65536)))
    assert float(radius.max()) < 4.855
    assert float(cosine.abs().max()) == float(sine.abs().max()) == 1


def test_odd_moments_vanish_and_the_variance_is_one_less_5e_6() -> None:
    radius, cosine, sine = (table.double() for table in _tables(CPU))
    assert float(cosine.sum()) == float(sine.sum()) == 0
    assert math.fsum((cosine * sine).tolist()) == 0
    variance = float(radius.square().mean() * cosine.square().mean())
    assert 1 - variance == pytest.approx(5.3e-6, rel=0.01)


def sha256(tensor: torch.Tensor, dtype: str = "<f4") -> str:
    """Hash of a tensor's little-endian 32-bit values."""
    return hashlib.sha256(tensor.numpy().astype(dtype).tobytes()).hexdigest()


GOLDEN_KEY = [
    "564857cc",
    "1f3658d0",
]
GOLDEN_TABLES = [
    "d9133d5f8dd5ec969bb2b538b03186d90e895f3501872e67b10a709b32e3dda2",
    "9f6a0dd18886215eeef7f8ed1a5033023bdf0c3151522e3c34755e3ef17e9fcb",
    "82978997356ca920d01be61e659a34217552c830833406cb34d5e503a92df3b2",
]
GOLDEN_WORDS = "19658cf20adfe90efa7d9f1e569aaf6f35656d066ef8261ead73d1bbf9525366"
GOLDEN_NORMALS = [
    "0x1.694aba0000000p-2",
    "0x1.87b68a0000000p-1",
    "-0x1.32e1ec0000000p-1",
    "-0x1.1f7c640000000p-2",
    "-0x1.b719900000000p-4",
    "-0x1.5fdf160000000p-1",
    "0x1.c154ea0000000p-1",
    "-0x1.1595720000000p-1",
]
GOLDEN_NORMALS_HASH = "1e885740b529230c0a5cb7b9ccf7bc6c296ac72be238149becc4792bf641ddfa"
