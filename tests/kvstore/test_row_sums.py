"""The sums of rows against their definition in plain integers, by C and by numpy, and against their bound."""

from __future__ import annotations

import functools
import itertools
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import ROW_WORDS, Multipliers, row_sums
from kvstore.block.row_sums import sums_by_c, sums_by_numpy

KEY = Multipliers.of(b"a test's own secret")
SOURCE = Path(row_sums.__file__).with_suffix(".c")


@functools.cache
def in_order(multipliers: Multipliers) -> list[int]:
    pairs = itertools.zip_longest(multipliers.even.tolist(), multipliers.odd.tolist())
    return [each for pair in pairs for each in pair if each is not None]


def by_definition(multipliers: Multipliers, block: bytes) -> bytes:
    m, sums = in_order(multipliers), []
    for start in range(0, len(block), 8 * ROW_WORDS):
        row = block[start : start + 8 * ROW_WORDS]
        halves = struct.unpack(f"<{len(row) // 4}I", row)
        sums += [sum(m[i + moved] * w for i, w in enumerate(halves)) % 2**64 for moved in (0, 1)]
    return struct.pack(f"<{len(sums)}Q", *sums)


def words_of(block: bytes) -> np.ndarray:
    return np.frombuffer(block, dtype="<u8")


def test_golden_values_hold_for_ever() -> None:
    assert [int(each) for each in KEY.even[:2]] == [0x45F00E2CB22C33C, 0xAF8B85BF4F3FFD9B]
    assert KEY.sums(words_of(bytes(range(64)))).hex() == "184e87c64f8fb5314ca670dc1f200f6a"


def test_multipliers_are_read_only_and_another_secrets_are_others() -> None:
    assert (KEY.even.size, KEY.odd.size) == (ROW_WORDS + 1, ROW_WORDS)
    with pytest.raises(ValueError, match="read-only"):
        KEY.even[0] = 1
    other = Multipliers.of(b"a test's own secres")
    assert not set(KEY.even.tolist()) & set(other.even.tolist())
    assert str(int(KEY.even[0])) not in repr(KEY)


@given(st.binary(min_size=8, max_size=200).map(lambda data: data[: len(data) // 8 * 8]))
def test_sums_are_those_of_the_definition(block: bytes) -> None:
    expected = by_definition(KEY, block)
    assert KEY.sums(words_of(block)) == expected
    assert sums_by_numpy(KEY, words_of(block)) == expected


@pytest.mark.parametrize("num_words", [ROW_WORDS - 1, ROW_WORDS, ROW_WORDS + 1, 16 * ROW_WORDS + 3, 17 * ROW_WORDS])
def test_rows_and_what_is_left_over_are_summed_alike_by_all(num_words: int) -> None:
    random = np.random.default_rng(num_words).integers(0, 2**64, num_words, dtype=np.uint64)
    for words in (random, np.full(num_words, 2**64 - 1, dtype=np.uint64), np.zeros(num_words, dtype=np.uint64)):
        assert KEY.sums(words) == sums_by_numpy(KEY, words) == by_definition(KEY, words.tobytes())


def test_words_that_are_not_aligned_are_summed_all_the_same() -> None:
    raw = np.random.default_rng(0).integers(0, 256, 8 * 100 + 1, dtype=np.uint8)
    assert KEY.sums(raw[1:].view("<u8")) == by_definition(KEY, raw[1:].tobytes())


def test_words_of_another_type_or_shape_are_refused() -> None:
    words = np.zeros((2, 8), dtype=np.uint64)
    for wrong in (words[None], words[0, ::2], words[:, ::2], words[0].astype(np.int64), words[0, :0]):
        with pytest.raises(ValueError, match="expected contiguous uint64 words of one block"):
            KEY.sums(wrong)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is here")
def test_c_sums_to_the_same_bytes_as_numpy(tmp_path: Path) -> None:
    library = tmp_path / "row_sums.so"
    flags = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["cc", *flags, "-o", library, SOURCE], check=True)
    by_c, random = sums_by_c(library), np.random.default_rng(3)
    for num_words in (*range(1, 40), ROW_WORDS - 1, ROW_WORDS, ROW_WORDS + 1, 3 * ROW_WORDS + 7):
        words = random.integers(0, 2**64, num_words, dtype=np.uint64)
        assert by_c(KEY, words) == sums_by_numpy(KEY, words), num_words


@pytest.mark.parametrize(
    ("computes", "says"),
    [
        (None, "does not load, blocks are summed by numpy"),
        (b"other sums", "gives wrong sums here, blocks are summed by"),
    ],
)
def test_a_library_that_does_not_load_or_computes_something_else_is_not_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    computes: bytes | None,
    says: str,
) -> None:
    path = tmp_path / "_row_sums.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(row_sums, "library_path", lambda: path)
    if computes is not None:
        monkeypatch.setattr(row_sums, "sums_by_c", lambda _: lambda *_: computes)
    assert row_sums._fastest.__wrapped__() is sums_by_numpy
    assert says in caplog.text


@pytest.mark.parametrize("wrong_sum", range(12))
def test_a_library_that_gets_any_kind_of_row_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, wrong_sum: int) -> None:
    """Of four that it sums at once, of one, or of a part of one: by one bit."""

    def sums(multipliers: Multipliers, words: np.ndarray) -> bytes:
        wrong = np.frombuffer(sums_by_numpy(multipliers, words), dtype="<u8").copy()
        wrong[wrong_sum] ^= np.uint64(1 << 63)
        return wrong.tobytes()

    monkeypatch.setattr(row_sums, "library_path", lambda: Path("_row_sums.so"))
    monkeypatch.setattr(row_sums, "sums_by_c", lambda _: sums)
    assert row_sums._fastest.__wrapped__() is sums_by_numpy


# ---- the bound ----


def flipped(words: np.ndarray, bit: int, places: slice | list[int]) -> np.ndarray:
    changed = words.copy()
    changed[places] ^= np.uint64(1 << bit)
    return changed


def test_no_bit_position_is_blind_however_many_words_it_is_flipped_in() -> None:
    # With words as wide as the sum two flipped bits 63 are never seen under odd multipliers, two flipped bits 61 in a
    # quarter of all tries.
    unseen: Counter[tuple[int, str]] = Counter()
    for number in range(25):
        key = Multipliers.of(b"%d" % number)
        words = np.random.default_rng(number).integers(0, 2**64, 24, dtype=np.uint64)
        before = key.sums(words)
        for bit in range(64):
            for name, places in (
                ("one", [5]),
                ("two", [5, 11]),
                ("every second", slice(0, 24, 2)),
                ("all", slice(None)),
            ):
                after = key.sums(flipped(words, bit, places))
                for half in (slice(0, 8), slice(8, 16)):  # each sum sees it by itself
                    unseen[bit, name] += before[half] == after[half]
    assert +unseen == Counter()


def test_two_flipped_signs_in_bfloat16_are_seen_wherever_they_are() -> None:
    words = np.random.default_rng(1).integers(0, 2**64, 2 * ROW_WORDS, dtype=np.uint64)
    signs = [(word, bit) for word in (0, 1, 700, ROW_WORDS, 2 * ROW_WORDS - 1) for bit in (15, 31, 47, 63)]
    seen = {KEY.sums(words)}
    for (one, one_bit), (two, two_bit) in itertools.combinations(signs, 2):
        seen.add(KEY.sums(flipped(flipped(words, one_bit, [one]), two_bit, [two])))
    assert len(seen) == 1 + len(signs) * (len(signs) - 1) // 2


def test_swapped_words_halves_and_rows_and_shifted_payloads_are_seen() -> None:
    words = np.random.default_rng(2).integers(0, 2**64, 3 * ROW_WORDS, dtype=np.uint64)
    others = [np.roll(words, shift) for shift in (1, 2, 7, ROW_WORDS, 2 * ROW_WORDS)]
    others += [(words << np.uint64(32)) | (words >> np.uint64(32))]
    for one, two in ((0, 1), (5, 900), (5, 5 + ROW_WORDS)):
        swapped = words.copy()
        swapped[[one, two]] = words[[two, one]]
        others.append(swapped)
    assert len({KEY.sums(each) for each in [words, *others]}) == 1 + len(others)


def test_the_bound_holds_for_every_difference_in_a_model_small_enough_to_count() -> None:
    # Halves of 4 bits under multipliers of 8, two halves to a row: of all m_0, m_1, m_2, for how many are both sums
    # equal? 2**(2k) / 2**16 of them at most, where 2**k divides the last difference.
    modulus, all_m = 256, np.arange(256)
    for first, last in itertools.product(range(-15, 16), repeat=2):
        if last == 0:
            continue
        hits_first = np.bincount(all_m * first % modulus, minlength=modulus)  # of m_0: which products, how often
        hits_last = np.bincount(all_m * last % modulus, minlength=modulus)  # of m_2
        # given m_1: m_0 * first = -m_1 * last, and m_2 * last = -m_1 * first
        num_equal = int((hits_first[-all_m * last % modulus] * hits_last[-all_m * first % modulus]).sum())
        power = (last & -last) ** 2
        assert num_equal * 2**16 <= power * 2**24, (first, last)
