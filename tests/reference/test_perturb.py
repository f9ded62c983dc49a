"""The definition of perturb: its words against published ones, its normal against the exact one, its formulas."""

import pytest
import torch

from lct_fast.reference import perturb as reference


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known answers of philox4x32-10 that its authors publish with Random123.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    a, b, c, d = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in reference.philox((a, b, c, d), key)) == expected


def test_words_use_all_bits_of_seed_and_offset() -> None:
    seed, counter = 0x123456789ABCDEF0, 0x0FEDCBA987654321
    low, high = torch.tensor([counter & 0xFFFFFFFF]), torch.tensor([counter >> 32])
    zero = torch.zeros(1, dtype=torch.int64)
    expected = reference.philox((low, high, zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    assert reference.words(seed, 4 * counter, 4).tolist() == [int(word) for word in expected]
    assert torch.equal(reference.words(seed, 5, 90), reference.words(seed, 0, 95)[5:])


def test_normal_of_every_word() -> None:
    """All 2^23 values there are, against the exact inverse in float64."""
    eps = reference.normal(torch.arange(2**23) << 9)
    exact = torch.special.ndtri((torch.arange(2**23).double() + 0.5) * 2.0**-23)
    assert eps.dtype == torch.float32
    assert bool((eps == -eps.flip(0)).all())
    error = ((eps.double() - exact) / exact).abs()
    assert float(error.max()) < 1e-6
    assert bool((eps[1:] >= eps[:-1]).all())


def test_moments_and_distribution_of_a_million() -> None:
    eps = reference.normals((10**6,), 2024, 0, False).double().sort().values
    moments = [float(eps.pow(k).mean()) for k in (1, 2, 3, 4)]
    # Standard errors of the means: sqrt of (1, 2, 15, 96) / 10^6; four of them.
    for got, exact, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(got - exact) < 4 * (variance / 10**6) ** 0.5
    cdf = torch.special.ndtr(eps)
    steps = torch.arange(10**6 + 1, dtype=torch.float64) / 10**6
    distance = max(float((steps[1:] - cdf).max()), float((cdf - steps[:-1]).max()))
    # Kolmogorov: below 1.95 / sqrt(n) but for one draw in a thousand.
    assert distance < 1.95e-3


def test_neighbouring_streams_and_values_are_uncorrelated() -> None:
    a, b = (reference.normals((10**5,), seed, 0, False).double() for seed in (1, 2))
    for x, y in ((a, b), (a[1:], a[:-1]), (a[4:], a[:-4])):
        assert abs(float((x * y).mean())) < 4 / 10**2.5


def test_formulas() -> None:
    z, sigma, loss = torch.randn(3, 4, 2), torch.rand(4) + 0.1, torch.randn(6)
    eps = reference.normals((6, 4, 2), 9, 7, True).double()
    wide = sigma.double()[:, None]
    noisy = reference.perturb(z, sigma, 9, 7, True, 2)
    torch.testing.assert_close(noisy.double(), z.double().repeat(2, 1, 1) + wide * eps, rtol=1e-6, atol=1e-6)
    error = reference.score(loss, sigma, 9, 7, (6, 4, 2), True, 10)
    torch.testing.assert_close(
        error.double(), loss.double()[:, None, None] * eps / (10 * wide), rtol=1e-6, atol=0
    )
    one = reference.score(loss, sigma[0], 9, 7, (6, 4, 2), True)
    torch.testing.assert_close(
        one.double(), loss.double()[:, None, None] * eps / (6 * wide[0]), rtol=1e-6, atol=0
    )


def test_halves_are_exact_negatives() -> None:
    eps = reference.normals((6, 5), 3, 2, True)
    assert torch.equal(eps[3:], -eps[:3])
    assert torch.equal(eps[:3], reference.normals((3, 5), 3, 2, False))
