"""Edge density: by hand on drawn edges, and what it orders in scenes."""

import numpy as np
import pytest

from dyrate_lib.errors import InputError
from dyrate_lib.scenes import edge_density, make_scene, render


def test_edges_by_hand():
    flat = np.full((10, 12, 3), 90, np.uint8)
    assert edge_density(flat) == 0.0
    half = flat.copy()
    half[:, 6:] = 200
    assert edge_density(half) == pytest.approx(
        2 / 10
    )  # central differences see a step from both sides; 10 inner columns
    faint = flat.copy()
    faint[:, 6:] = 108  # 18 of 255 over two pixels: 0.035 a pixel
    assert edge_density(faint) == 0.0
    faint[:, 6:] = 112  # 0.043
    assert edge_density(faint) == pytest.approx(2 / 10)
    assert edge_density(half.transpose(1, 0, 2)) == edge_density(half)
    board = (np.indices((9, 9)).sum(0) // 2 % 2 * 255).astype(np.uint8)
    assert edge_density(np.repeat(board[..., None], 3, 2)) > 0.9


def test_textured_grounds_are_more_cluttered_than_plain_ones():
    found = {"plain": [], "striped": [], "speckled": []}
    for scene in (make_scene(seed, "test") for seed in range(60)):
        if scene.ground.kind in found:
            found[scene.ground.kind].append(edge_density(render(scene)))
    assert max(found["plain"]) < min(found["speckled"]) and np.mean(found["plain"]) < np.mean(found["striped"])


def test_an_image_and_its_array_are_the_same():
    picture = render(make_scene(3, "test"))
    assert edge_density(picture) == edge_density(np.asarray(picture))


@pytest.mark.parametrize(
    "picture",
    [np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3)), np.zeros((2, 5, 3), np.uint8), np.zeros((5, 5, 4), np.uint8)],
)
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(InputError, match="uint8"):
        edge_density(picture)
