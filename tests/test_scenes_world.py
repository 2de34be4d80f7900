"""The scenes world: determinism, splits, rendering."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from dyrate_lib.errors import InputError
from dyrate_lib.scenes import HELD_OUT, SHAPES, SPLITS, make_scene, object_masks, render, render_batch
from dyrate_lib.scenes.render import pack_scenes, render_packed, signed_distance, to_uint8
from dyrate_lib.scenes.world import (
    COLOR_NAMES,
    GROUNDS,
    MIN_GAP_X,
    SEEN_PAIRS,
    SIZE,
    TONE_NAMES,
    Ground,
    Scene,
    SceneObject,
)

SCENES = {split: [make_scene(seed, split) for seed in range(400)] for split in SPLITS}


def picture_of(*objects: SceneObject) -> Scene:
    ground = Ground("plain", "gray", (0.5, 0.5, 0.5), (0.6, 0.6, 0.6), 20.0, 0.0, 0.0, 0)
    return Scene(0, "train", ground, objects)


def an_object(shape: str, x: float = 168.0, y: float = 168.0, radius: float = 40.0, angle: float = 0.0) -> SceneObject:
    return SceneObject(shape, "red", "large", x, y, radius, angle, (1.0, 0.0, 0.0))


def test_the_same_seed_gives_the_same_scene_and_another_seed_another():
    assert make_scene(7, "val") == SCENES["val"][7]
    assert len(set(SCENES["train"])) == 400


def test_the_stream_of_scenes_has_not_changed():
    """Checkpoints, records and cards refer to scenes by seed; these figures were written down when they were made."""
    scene = make_scene(0, "test")
    assert [(o.shape, o.color, o.size) for o in scene.objects] == [("star", "orange", "small")]
    assert scene.ground.kind == "plain" and scene.ground.tone == "navy"
    assert [len(make_scene(s, "novel").objects) for s in range(6)] == [1, 6, 5, 9, 6, 5]


def test_held_out_pairs_are_one_for_each_shape_and_colour():
    assert {s for s, _ in HELD_OUT} == set(SHAPES) and {c for _, c in HELD_OUT} == set(COLOR_NAMES)
    assert len(HELD_OUT) == 10 and len(SEEN_PAIRS) == 90


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_seen_splits_hold_no_held_out_pair_but_all_their_parts(split):
    pairs = {o.pair for s in SCENES[split] for o in s.objects}
    assert not pairs & HELD_OUT
    assert {p[0] for p in pairs} == set(SHAPES) and {p[1] for p in pairs} == set(COLOR_NAMES)


def test_every_novel_scene_holds_a_held_out_pair():
    assert all(any(o.pair in HELD_OUT for o in s.objects) for s in SCENES["novel"])


def test_no_scene_of_one_split_can_equal_one_of_another():
    for number, split in enumerate(SPLITS):
        assert {s.ground.seed % 4 for s in SCENES[split]} == {number}


def test_scenes_are_varied_and_unambiguous():
    scenes = [s for split in SPLITS for s in SCENES[split]]
    assert {len(s.objects) for s in scenes} == set(range(1, 10))
    assert {s.ground.kind for s in scenes} == set(GROUNDS) and {s.ground.tone for s in scenes} == set(TONE_NAMES)
    overlaps = 0
    for s in scenes:
        xs = sorted(o.x for o in s.objects)
        assert all(b - a >= MIN_GAP_X for a, b in zip(xs, xs[1:], strict=False))
        for o in s.objects:
            assert o.radius <= o.x <= SIZE - o.radius and o.radius <= o.y <= SIZE - o.radius
            assert all(abs(v - SIZE * k / 3) >= 7 for v in (o.x, o.y) for k in (1, 2))
            assert (o.radius > 30) == (o.size == "large")
        near = [math.dist((a.x, a.y), (b.x, b.y)) / (a.radius + b.radius) for a in s.objects for b in s.objects if a != b]
        assert all(d >= 0.77 for d in near)
        overlaps += any(d < 1 for d in near)
    assert overlaps > 50


def test_positions_and_salience_follow_the_coordinates():
    a, b, c = an_object("star", 30, 60), an_object("ring", 300, 200), an_object("moon", 150, 300)
    small = dataclasses.replace(an_object("heart", 10, 10), size="small")
    assert [o.position for o in (a, b, c, an_object("star"))] == ["top left", "right", "bottom", "center"]
    assert [o.shape for o in picture_of(b, small, c, a).salient()] == ["star", "moon", "ring", "heart"]


@pytest.mark.parametrize("bad", [(-1, "val"), (0, "validation")])
def test_unknown_splits_and_negative_seeds_are_refused(bad):
    with pytest.raises(InputError):
        make_scene(*bad)


def test_a_picture_alone_equals_the_same_picture_in_a_batch():
    scenes = SCENES["train"][:12]
    batch = render_batch(scenes)
    assert batch.shape == (12, 3, SIZE, SIZE) and batch.dtype == torch.float32
    assert 0 <= batch.min() and batch.max() <= 1
    for scene, together in zip(scenes, batch, strict=True):
        alone = np.asarray(render(scene)).astype(int)
        assert np.abs(alone - to_uint8(together).permute(1, 2, 0).numpy().astype(int)).max() <= 2


def test_every_kind_of_ground_is_drawn_and_textured():
    spread = {}
    for scene in SCENES["train"]:
        if scene.ground.kind not in spread:
            bare = dataclasses.replace(scene, objects=())
            spread[scene.ground.kind] = float(render_batch([bare])[0].std((1, 2)).mean())
    assert set(spread) == set(GROUNDS)
    assert spread.pop("plain") < 1e-6
    assert min(spread.values()) > 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_negative_inside_and_cover_a_plausible_area(shape):
    axis = torch.arange(-60, 60) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    d = signed_distance(shape, x, y, torch.tensor(40.0))
    inside = (d < 0).float().mean() * 120**2 / 40**2
    assert 0.8 < inside < 3.2
    assert d[0].min() > 0 and d[-1].min() > 0 and d[:, 0].min() > 0 and d[:, -1].min() > 0


def test_edges_are_anti_aliased_and_cover_the_true_area():
    scene = picture_of(an_object("circle", 168.3, 167.6))
    red = render_batch([scene])[0]
    cover = (red[0] - 0.5) / 0.5
    assert ((cover > 0.05) & (cover < 0.95)).sum() > 100
    assert float(cover.sum()) == pytest.approx(math.pi * 38**2, rel=0.005)


def test_shapes_turn_with_their_angle():
    upright = render_batch([picture_of(an_object("triangle"))])[0]
    turned = render_batch([picture_of(an_object("triangle", angle=math.pi / 2))])[0]
    quarter = torch.rot90(upright, -1, (1, 2))
    assert (turned - quarter).abs().max() < 0.1 and (turned - upright).abs().max() > 0.4


def test_later_objects_lie_on_top_and_masks_show_what_is_visible():
    below, above = an_object("square"), dataclasses.replace(an_object("circle", 190.0), rgb=(0.0, 0.0, 1.0))
    scene = picture_of(below, above)
    masks, pixels = object_masks(scene), render_batch([scene])[0]
    assert masks.shape == (2, SIZE, SIZE)
    assert pixels[2, 168, 185] == 1 and masks[1, 168, 185] == 1 and masks[0, 168, 185] == 0
    assert float(masks.sum(0).max()) <= 1 + 1e-6
    rebuilt = 0.5 * (1 - masks.sum(0)) + masks[0]
    assert (rebuilt - pixels[0]).abs().max() < 1e-5


def test_an_object_at_the_border_is_cut_off_not_wrapped_around():
    cut = render_batch([picture_of(an_object("circle", 5.0, 168.0))])[0, 0]
    assert cut[168, 2] == 1 and (cut[:, 200:] == 0.5).all()


def test_packing_keeps_every_number():
    objects, grounds = pack_scenes(SCENES["val"][:3])
    scene = SCENES["val"][1]
    n = len(scene.objects)
    assert (objects[1, :n, 0] >= 0).all() and (objects[1, n:, 0] == -1).all()
    assert objects[1, 0, 1] == scene.objects[0].x and grounds[1, -1] == scene.ground.seed
    assert torch.equal(render_packed(objects, grounds), render_batch(SCENES["val"][:3]))


@pytest.mark.gpu
def test_the_gpu_draws_the_same_pictures():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    scenes = SCENES["test"][:32]
    difference = to_uint8(render_batch(scenes, "cuda")).cpu().int() - to_uint8(render_batch(scenes)).int()
    # A speckle or an edge may fall on the other side of its threshold in a pixel here and there.
    assert float((difference.abs() > 2).float().mean()) < 1e-3
