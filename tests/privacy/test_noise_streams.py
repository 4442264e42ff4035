"""The random bits of the noise: ChaCha20 against an independent one, streams, keys and seeds."""

from __future__ import annotations

import copy
import hashlib
import pickle
import secrets

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedpdm.privacy import noise
from fedpdm.privacy.noise import SeededNoise, SystemNoise
from fedpdm.rng import Purpose, seed_sequence
from tests.support.oracles import binomial_bounds


def seeded(seed: int = 0) -> SeededNoise:
    return SeededNoise(np.random.SeedSequence(seed))


# --- ChaCha20 -------------------------------------------------------------------------------


def chacha20(key: bytes, nonce: bytes, blocks: int, first: int = 0) -> bytes:
    """Key stream of RFC 8439 section 2.3 from block `first` on, for a nonce of 12 bytes."""
    state = np.empty((16, blocks), dtype=np.uint32)
    fixed = np.frombuffer(b"expand 32-byte k" + key, dtype="<u4")
    state[:12] = fixed[:, None]
    state[12] = np.arange(first, first + blocks, dtype=np.uint32)
    state[13:] = np.frombuffer(nonce, dtype="<u4")[:, None]
    x = state.copy()

    def turn(a: int, b: int, by: int) -> None:
        """x_a ^= x_b; x_a <<<= by."""
        x[a] ^= x[b]
        x[a] = (x[a] << np.uint32(by)) | (x[a] >> np.uint32(32 - by))

    for _ in range(10):
        for at in range(8):  # four columns, then four diagonals
            shifts = (0, 0, 0, 0) if at < 4 else (0, 1, 2, 3)
            a, b, c, d = (4 * row + (at + shift) % 4 for row, shift in enumerate(shifts))
            for left, right in ((16, 12), (8, 7)):
                x[a] += x[b]
                turn(d, a, left)
                x[c] += x[d]
                turn(b, c, right)
    return (x + state).T.astype("<u4").tobytes()


def test_the_oracle_is_rfc_8439() -> None:
    """Section 2.3.2, and appendix A.1, test vectors 1, 2 and 5."""
    for key, nonce, block, expected in (
        (
            bytes(range(32)), "000000090000004a00000000", 1,
            "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
            "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
        ),
        (
            bytes(32), "000000000000000000000000", 0,
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
            "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
        ),
        (
            bytes(32), "000000000000000000000000", 1,
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
            "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
        ),
        (
            bytes(32), "000000000000000000000002", 0,
            "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
            "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
        ),
    ):  # fmt: skip
        assert chacha20(key, bytes.fromhex(nonce), 1, block).hex() == expected


def expected_stream(key: bytes, stream: int, blocks: int) -> bytes:
    return chacha20(key, bytes(11) + bytes([stream]), blocks)


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_key_streams_are_chacha20_from_block_0(stream: int) -> None:
    for key in (bytes(32), bytes(range(32))):
        expected, found = expected_stream(key, stream, 40), noise._KeyStream(key, stream)
        taken = b""
        for count in (1, 16, 0, 33, 200):
            taken += found.words(count, "<u2").tobytes() + found.words(count, "<u4").tobytes()
        low = int.from_bytes(expected[len(taken) : len(taken) + 12], "little")
        assert found.integer(96) == low
        assert taken == expected[: len(taken)]


def test_streams_never_overlap() -> None:
    """Their nonces differ, so no block of one is a block of another; nor do they start over."""
    streams = [noise._KeyStream(b"k" * 32, number) for number in range(3)]
    blocks = [s.words(16, "<u4").tobytes() for s in streams for _ in range(5000)]
    assert len(set(blocks)) == len(blocks)
    # After 2^32 blocks the counter goes on into the nonce's first word, which is 0 in all streams.
    for stream in range(3):
        rest = bytes(11) + bytes([stream])
        late = Cipher(algorithms.ChaCha20(b"k" * 32, b"\xff" * 4 + rest), mode=None).encryptor()
        following = late.update(bytes(128))[64:]
        assert following == chacha20(b"k" * 32, b"\x01" + bytes(3) + rest[4:], 1)


# --- From bits to draws ---------------------------------------------------------------------


def slow_draws(key: bytes, count: int) -> tuple[list[float], int]:
    """The sampler bit by bit, in Python's integers, and how many ties it met."""
    tables = noise._tables()
    blocks = count // 16 + 2
    direct, leftover, more = (expected_stream(key, n, blocks) for n in range(3))
    drawn, ties, at = [], 0, 0
    for n in range(count):
        word = int.from_bytes(direct[2 * n : 2 * n + 2], "little")
        if word < tables.num_direct:
            drawn.append(float(tables.direct[word]))
            continue
        long = int.from_bytes(leftover[4 * at : 4 * at + 4], "little")
        at += 1
        column, first = long >> 15, long & 0x7FFF
        threshold = (int(tables.thresholds[column]) & 0x7FFF) << 96 | tables.more[column]
        if first != threshold >> 96:
            below = first << 96 < threshold
        else:
            further = int.from_bytes(more[12 * ties : 12 * ties + 12], "little")
            ties += 1
            below = (first << 96 | further) < threshold
        drawn.append(float(tables.values[2 * column + (not below)]))
    return drawn, ties


@pytest.mark.slow
def test_draws_follow_the_bits_one_by_one() -> None:
    """From the seed to the noise, by code that shares nothing but the tables; ties included."""
    count = 600_000
    sequence = np.random.SeedSequence(7, spawn_key=(2, 0, 0, 1))
    key = b"".join(int(word).to_bytes(4, "little") for word in sequence.generate_state(8))
    expected, ties = slow_draws(key, count)
    assert SeededNoise(sequence).draw((count,)).tolist() == expected
    left_over = 1.0 - noise._tables().num_direct / (1 << 16)
    assert 1 <= ties <= binomial_bounds(count, left_over * 2.0**-15)[1]


def test_ties_come_once_in_two_to_the_fifteen(monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked, count = seeded(8), [], 20_000_000
    decide = source._more.integer
    monkeypatch.setattr(source._more, "integer", lambda bits: asked.append(bits) or decide(bits))
    room = np.empty(1_000_000, dtype=np.float32)
    for _ in range(count // len(room)):
        source.fill(room)
    left_over = 1.0 - noise._tables().num_direct / (1 << 16)
    low, high = binomial_bounds(count, left_over * 2.0**-15)
    assert low <= len(asked) <= high


def test_draws_do_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = seeded(1).draw((200_000,))
    source = seeded(1)
    cut = np.concatenate([source.draw((n,)) for n in (1, 70_000, 0, 65_537, 64_462)])
    assert np.array_equal(whole, cut)
    assert np.array_equal(whole.reshape(50, 40, 100), seeded(1).draw((50, 40, 100)))
    for chunk in (1000, 1 << 17):
        monkeypatch.setattr(noise, "CHUNK", chunk)
        assert np.array_equal(whole, seeded(1).draw((200_000,)))


# --- Keys -----------------------------------------------------------------------------------


def repeated_rows(*draws: np.ndarray) -> int:
    """How many runs of 32 draws have come before."""
    rows = [run.tobytes() for draw in draws for run in draw.reshape(-1, 32)]
    return len(rows) - len(set(rows))


def test_system_noise_never_repeats() -> None:
    first, second = SystemNoise(), SystemNoise()
    draws = [source.draw((320_000,)) for source in (first, second, first)]
    assert repeated_rows(*draws) == 0
    assert repeated_rows(*draws, draws[1][32:64]) == 1  # a planted fault
    for source in (first, seeded()):
        for again in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot pickle"):
                again(source._more._cipher)
        for again in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot pickle"):
                again(source)


def test_system_noise_takes_a_fresh_key_of_256_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []

    def token_bytes(size: int, draw=secrets.token_bytes) -> bytes:  # type: ignore[no-untyped-def]
        keys.append(draw(size))
        return keys[-1]

    monkeypatch.setattr(noise.secrets, "token_bytes", token_bytes)
    drawn = [SystemNoise().draw((500,)).tolist() for _ in range(3)]
    assert [len(key) for key in keys] == [32, 32, 32]
    assert len(set(keys)) == 3
    assert drawn == [slow_draws(key, 500)[0] for key in keys]


@pytest.mark.parametrize("component", ["seed", "purpose", "client", "round", "chunk"])
def test_seeds_and_their_components_change_the_draw(component: str) -> None:
    given = {"seed": 3, "purpose": Purpose.RELEASE_NOISE, "client": 1, "round": 2, "chunk": 4}
    other = given | {component: Purpose.SAMPLING if component == "purpose" else 5}
    draws = [
        SeededNoise(seed_sequence(**key)).draw((32_000,))  # type: ignore[arg-type]
        for key in (given, other)
    ]
    assert repeated_rows(*draws) == 0
    assert abs(np.corrcoef(*draws)[0, 1]) < 5.0 / np.sqrt(32_000)
    again = SeededNoise(seed_sequence(**given)).draw((32_000,))  # type: ignore[arg-type]
    assert np.array_equal(again, draws[0])


def test_seeded_noise_is_the_same_on_every_machine_and_version() -> None:
    # Part of the reproducibility contract, as the numbers of purposes are.
    drawn = seeded(0).draw((100_000,)).astype("<i4")
    assert drawn[:6].tolist() == [-4716, 5718, 1690, 4337, 720, 5687]
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "876ff347c0526cbe"


def test_sources_say_what_they_are() -> None:
    assert SeededNoise.seeded
    assert not SystemNoise.seeded
    assert "simulation only" in SeededNoise.description
    assert "operating-system" in SystemNoise.description
