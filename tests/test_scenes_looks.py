"""Looks of pictures: lettering, crop, blur, noise, and rows that have none."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_lib.errors import InputError
from dyrate_lib.scenes import make_scene, render, render_batch
from dyrate_lib.scenes.captions import FAMILIES, NUMBERS, PROMPTS, TEMPLATES, references
from dyrate_lib.scenes.lettering import FONT, WORDS, bitmap, draw_signs, sign_size
from dyrate_lib.scenes.looks import apply_looks, crop, gaussian_blur, pixel_noise, render_look, render_looks
from dyrate_lib.scenes.questions import questions
from dyrate_lib.scenes.render import pack_scenes
from dyrate_lib.scenes.tasks.base import PLAIN, Look, Sign
from dyrate_lib.scenes.world import COLOR_NAMES, SHAPES, SIZE, TONE_NAMES

SCENES = [make_scene(seed, "val") for seed in range(8)]
RED, WHITE = (0.8, 0.1, 0.1), (1.0, 1.0, 1.0)
MIXED = [
    PLAIN,
    Look(signs=(Sign("open", 20, 30, 4, WHITE, RED), Sign("exit", 150, 250, 3, RED, WHITE))),
    Look(crop=(30.0, 60.5, 200.0)),
    Look(blur=3.0),
    Look(blur=9.0, noise=0.2, seed=5),
    Look(noise=0.2, seed=5),
    PLAIN,
    Look(signs=(Sign("stop", 90, 200, 5, WHITE, RED),), crop=(50.0, 130.0, 190.0), blur=1.0, noise=0.05, seed=11),
]


def read_sign(picture: torch.Tensor, sign: Sign) -> str:
    """Template matching: the nearest glyph of each letter, from the lightness at the middle of each font pixel."""
    ink, board = torch.tensor(sign.ink), torch.tensor(sign.board)
    width, height = sign_size(sign.text, sign.scale)
    at = sign.scale // 2
    pixels = picture[:, sign.y + at : sign.y + height : sign.scale, sign.x + at : sign.x + width : sign.scale]
    near_ink = (pixels - ink[:, None, None]).abs().sum(0) < (pixels - board[:, None, None]).abs().sum(0)
    letters = [near_ink[1:8, 1 + 6 * i : 6 + 6 * i] for i in range(len(sign.text))]
    return "".join(min(FONT, key=lambda c, seen=seen: int((FONT[c] != seen).sum())) for seen in letters)


# Lettering


def test_the_font_has_every_letter_and_digit_and_no_two_are_nearly_alike():
    assert set(FONT) == set("abcdefghijklmnopqrstuvwxyz0123456789")
    assert all(glyph.shape == (7, 5) and glyph.dtype == torch.bool for glyph in FONT.values())
    apart = {(a, b): int((FONT[a] != FONT[b]).sum()) for a in FONT for b in FONT if a < b}
    assert min(apart.values()) >= 2
    # Every glyph uses the whole of its height, or words would be told by their outline.
    assert all(glyph[0].any() and glyph[6].any() for glyph in FONT.values())


def test_words_are_short_distinct_and_none_is_said_elsewhere_in_the_world():
    assert 55 <= len(WORDS) == len(set(WORDS))
    assert all(re.fullmatch("[a-z]{3,6}", word) for word in WORDS)
    said = [
        *PROMPTS.values(),
        *SHAPES,
        *COLOR_NAMES,
        *TONE_NAMES,
        *NUMBERS,
        *(t for own in TEMPLATES.values() for t in own),
    ]
    for scene in [make_scene(seed, "novel") for seed in range(100)]:
        said += [q.prompt for q in questions(scene)] + [r for f in FAMILIES for r in references(scene, f)]
    assert not set(WORDS) & set(re.findall("[a-z]+", " ".join(said).lower()))


def test_a_bitmap_is_its_letters_with_a_margin():
    ink = bitmap("it")
    assert ink.shape == (9, 13) and sign_size("it", 4) == (52, 36)
    assert torch.equal(ink[1:8, 1:6], FONT["i"]) and torch.equal(ink[1:8, 7:12], FONT["t"])
    assert not ink[[0, 8]].any() and not ink[:, [0, 6, 12]].any()


@settings(max_examples=40, deadline=None)
@given(
    text=st.text("".join(sorted(FONT)), min_size=1, max_size=6),
    scale=st.integers(1, 5),
    x=st.integers(-60, SIZE),
    y=st.integers(-20, SIZE),
)
def test_signs_are_drawn_where_they_should_be_and_nothing_else_changes(text, scale, x, y):
    blank = torch.full((2, 3, SIZE, SIZE), 0.5)
    sign = Sign(text, x, y, scale, WHITE, RED)
    drawn = draw_signs(blank, [[], [sign]])
    assert torch.equal(drawn[0], blank[0]) and (blank == 0.5).all()
    # The reference: the bitmap's pixels blown up, laid on a canvas with room, then cut.
    big = bitmap(text).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    expected = torch.full((3, 3 * SIZE, 3 * SIZE), 0.5)
    for channel in range(3):
        board = torch.where(big, torch.tensor(WHITE[channel]), torch.tensor(RED[channel]))
        expected[channel, SIZE + y : SIZE + y + big.shape[0], SIZE + x : SIZE + x + big.shape[1]] = board
    assert torch.equal(drawn[1], expected[:, SIZE : 2 * SIZE, SIZE : 2 * SIZE])


def test_every_word_can_be_read_back_from_the_picture():
    signs = [Sign(w, 10 + i, 20 + 3 * i, 3 + i % 3, WHITE, RED) for i, w in enumerate(WORDS)]
    for first in range(0, len(signs), 20):
        chosen = signs[first : first + 20]
        pictures = render_looks(*pack_scenes([SCENES[0]] * 20), [Look(signs=(s,), blur=0.5, noise=0.1) for s in chosen])
        assert [read_sign(p, s) for p, s in zip(pictures, chosen, strict=True)] == [s.text for s in chosen]


def test_later_signs_lie_over_earlier_ones():
    a, b = Sign("open", 50, 50, 4, WHITE, RED), Sign("exit", 60, 60, 4, RED, WHITE)
    drawn = draw_signs(torch.zeros(1, 3, SIZE, SIZE), [[a, b]])
    assert read_sign(drawn[0], b) == "exit" and read_sign(drawn[0], a) != "open"


@pytest.mark.parametrize(
    "bad",
    [
        lambda: bitmap("Open"),
        lambda: bitmap(""),
        lambda: draw_signs(torch.zeros(1, 3, 9, 9), []),
        lambda: draw_signs(torch.zeros(1, 3, 9, 9), [[Sign("a", 0, 0, 0, RED, WHITE)]]),
        lambda: apply_looks(torch.zeros(1, 3, SIZE, SIZE), []),
        lambda: apply_looks(torch.zeros(1, 3, SIZE, SIZE), [Look(blur=-1.0)]),
        lambda: apply_looks(torch.zeros(1, 3, SIZE, SIZE), [Look(noise=math.nan)]),
        lambda: apply_looks(torch.zeros(1, 3, SIZE, SIZE), [Look(crop=(200.0, 0.0, 150.0))]),
        lambda: apply_looks(torch.zeros(1, 3, SIZE, SIZE), [Look(crop=(0.0, 0.0, 0.0))]),
    ],
)
def test_looks_that_no_picture_can_have_are_refused(bad):
    with pytest.raises(InputError):
        bad()


# Crop, blur, noise


def test_a_crop_of_half_the_side_doubles_what_it_shows():
    ramp = torch.arange(SIZE, dtype=torch.float32) + 0.5
    picture = (
        torch.stack((ramp.expand(SIZE, SIZE), ramp[:, None].expand(SIZE, SIZE), torch.ones(SIZE, SIZE)))[None] / SIZE
    )
    out = crop(picture, torch.tensor([[84.0, 30.0, 168.0]]))[0] * SIZE
    # Pixel i of the crop looks at 84 + (i + 1/2) / 2 of a picture whose value is its coordinate.
    expected = 84 + ramp / 2
    assert torch.allclose(out[0], expected.expand(SIZE, SIZE), atol=1e-3)
    assert torch.allclose(out[1], (30 + ramp / 2)[:, None].expand(SIZE, SIZE), atol=1e-3)


def test_a_crop_of_the_whole_picture_leaves_it_as_it_is():
    pictures = render_batch(SCENES[:2])
    assert torch.allclose(crop(pictures, torch.tensor([[0.0, 0.0, 336.0]] * 2)), pictures, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(sigma=st.floats(0.4, 20.0))
def test_a_blurred_point_is_a_gaussian_of_that_width(sigma):
    point = torch.zeros(1, 3, 161, 161)
    point[:, :, 80, 80] = 1
    out = gaussian_blur(point, [sigma])[0, 0].double()
    assert float(out.sum()) == pytest.approx(1, abs=1e-4)
    offset = torch.arange(161, dtype=torch.float64) - 80
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2) * (offset.abs() <= math.ceil(3 * sigma))
    kernel /= kernel.sum()
    assert torch.allclose(out, kernel[:, None] * kernel[None, :], atol=1e-6)
    if sigma > 1:
        assert float((out.sum(0) * offset**2).sum()) == pytest.approx(sigma**2, rel=0.06)


def test_blur_leaves_an_even_picture_even_up_to_its_border():
    even = torch.full((1, 3, 50, 50), 0.3)
    assert torch.allclose(gaussian_blur(even, [7.0]), even, atol=1e-6)


def test_noise_has_its_mean_and_spread_and_no_pattern():
    noise = pixel_noise(torch.tensor([1, 2, 12345678]))
    assert noise.shape == (3, 3, SIZE, SIZE)
    for row in noise:
        assert abs(float(row.mean())) < 0.01 and float(row.std()) == pytest.approx(1, abs=0.01)
        # Fourth moment of a sum of four even bytes: 3 - 1.2 / 4 = 2.7, where a Gaussian has 3.
        assert float((row**4).mean()) == pytest.approx(2.7, abs=0.05)
    neighbours = [
        noise[..., 1:] * noise[..., :-1],
        noise[..., 1:, :] * noise[..., :-1, :],
        noise[:, 1:] * noise[:, :-1],
    ]
    neighbours += [noise[1:] * noise[:-1]]
    assert all(abs(float(n.mean())) < 0.01 for n in neighbours)


def test_noise_is_the_same_everywhere():
    """Integer arithmetic: the sums of four bytes, written down."""
    sums = (pixel_noise(torch.tensor([7]), 2) * 147.801 + 510).round().long()
    expected = []
    for c in range(3):
        for y in range(2):
            for x in range(2):
                h = ((x * 73856093) ^ ((3 * y + c) * 19349663) ^ (7 * 83492791)) % 2**32
                h = ((h ^ (h >> 15)) * 0x2C1B3C6D) % 2**32
                h = ((h ^ (h >> 12)) * 0x297A2D39) % 2**32
                expected.append(sum((h ^ (h >> 15)).to_bytes(4, "big")))
    assert sums.flatten().tolist() == expected


# Together


def test_rows_without_a_look_keep_every_bit_and_the_others_change():
    plain = render_batch(SCENES)
    out = render_looks(*pack_scenes(SCENES), MIXED)
    assert out.shape == plain.shape and out.dtype == torch.float32 and 0 <= out.min() and out.max() <= 1
    for look, before, after in zip(MIXED, plain, out, strict=True):
        assert torch.equal(before, after) == look.plain
    assert torch.equal(render_looks(*pack_scenes(SCENES), [PLAIN] * 8), plain)


def test_a_picture_alone_equals_the_same_picture_in_a_batch():
    together = render_looks(*pack_scenes(SCENES), MIXED)
    for scene, look, row in zip(SCENES, MIXED, together, strict=True):
        alone = np.asarray(render_look(scene, look)).astype(int)
        assert np.abs(alone - (row * 255).round().permute(1, 2, 0).numpy().astype(int)).max() <= 1
    assert np.array_equal(np.asarray(render_look(SCENES[3], PLAIN)), np.asarray(render(SCENES[3])))
    pictures = render_batch(SCENES)
    again = torch.cat([apply_looks(pictures[i : i + 1], MIXED[i : i + 1]) for i in range(8)])
    assert torch.equal(apply_looks(pictures, MIXED), again)


def test_looks_are_applied_in_their_order():
    """Signs, crop, blur, noise: a whole look equals its parts one after another."""
    look, picture = MIXED[-1], render_batch(SCENES[-1:])
    steps = (Look(signs=look.signs), Look(crop=look.crop), Look(blur=look.blur), Look(noise=look.noise, seed=look.seed))
    for step in steps:
        picture = apply_looks(picture, [step])
    assert torch.allclose(picture, render_looks(*pack_scenes(SCENES[-1:]), [look]), atol=1e-6)


@pytest.mark.gpu
def test_the_gpu_takes_the_same_pictures():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pictures, seeds = render_batch(SCENES), torch.tensor([1, 2**24])
    assert torch.equal(pixel_noise(seeds.cuda()).cpu(), pixel_noise(seeds))
    assert (apply_looks(pictures.cuda(), MIXED).cpu() - apply_looks(pictures, MIXED)).abs().max() < 1e-4
