"""Data sets: scenes made when asked for, COCO folders in both layouts, and annotations that are wrong in a named way."""

import json

import numpy as np
import pytest
from PIL import Image

from dyrate_lib import paths
from dyrate_lib.datasets import COCO_PROMPT, SCENES_PER_SEED, open_dataset
from dyrate_lib.errors import InputError, ResourceError

COCO_MINI = paths.root().parent / "shared" / "coco-mini"


def coco_content(n=4):
    return {
        "info": {},
        "images": [{"id": 100 - i, "file_name": f"{i:03d}.png", "height": 8, "width": 8} for i in range(n)],
        "annotations": [
            {"id": 10 * i + j, "image_id": 100 - i, "caption": f"caption {j}\nof picture {i} "}
            for i in range(n)
            for j in range(2)
        ],
    }


def write_coco(folder, content=None, layout="mini", name="val2017"):
    content = coco_content() if content is None else content
    mini = layout == "mini"
    annotation = folder / "captions.json" if mini else folder / "annotations" / f"captions_{name}.json"
    pictures = folder / ("images" if mini else name)
    annotation.parent.mkdir(exist_ok=True)
    pictures.mkdir(exist_ok=True)
    annotation.write_text(content if isinstance(content, str) else json.dumps(content))
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(pictures / f"{i:03d}.png")
    return f"coco:{folder}"


@pytest.mark.parametrize("layout", ["mini", "official"])
def test_coco_layouts(tmp_path, layout):
    dataset = open_dataset(write_coco(tmp_path, layout=layout))
    assert len(dataset) == 4 and [item.id for item in dataset] == ["97", "98", "99", "100"]
    item = dataset[-1]
    assert item.references == ["caption 0 of picture 0", "caption 1 of picture 0"]
    assert item.prompt == COCO_PROMPT and item.image.getpixel((0, 0)) == (0, 0, 0)
    assert dataset[0].image.getpixel((0, 0)) == (3, 0, 0) and dataset[0].meta == {"file_name": "003.png"}
    assert dataset.references()["97"] == dataset[0].references


def test_validation_set_before_training_set(tmp_path):
    train = coco_content()
    train["annotations"] = train["annotations"][:2]
    write_coco(tmp_path, train, "official", "train2017")
    assert len(open_dataset(write_coco(tmp_path, None, "official", "val2017"))) == 4


def test_coco_subsets_by_seed(tmp_path):
    spec = write_coco(tmp_path)
    assert [i.id for i in open_dataset(spec, n=2)] == ["97", "98"]
    shuffles = {tuple(i.id for i in open_dataset(spec, n=3, seed=seed)) for seed in range(1, 20)}
    assert len(shuffles) > 5 and all(len(set(s)) == 3 for s in shuffles)
    with pytest.raises(InputError, match="has 4 pictures with captions, 5 were asked for"):
        open_dataset(spec, n=5)


def test_pictures_are_read_when_asked_for(tmp_path):
    spec = write_coco(tmp_path)
    (tmp_path / "images" / "002.png").write_bytes(b"broken")
    dataset = open_dataset(spec)
    assert dataset[0].image.size == (8, 8)
    with pytest.raises(InputError, match=r"002\.png is not an image"):
        _ = dataset[1].image


def test_pictures_without_captions_are_left_out_and_may_be_missing(tmp_path):
    content = coco_content()
    content["images"].append({"id": 1, "file_name": "not-here.png"})
    assert len(open_dataset(write_coco(tmp_path, content))) == 4


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ResourceError, match="there is no folder"):
        open_dataset(f"coco:{tmp_path / 'nowhere'}")
    with pytest.raises(ResourceError, match="none named"):
        open_dataset("coco:")
    with pytest.raises(ResourceError, match=r"neither captions.json nor annotations/captions_\*\.json"):
        open_dataset(f"coco:{tmp_path}")
    spec = write_coco(tmp_path)
    (tmp_path / "images" / "001.png").unlink()
    with pytest.raises(ResourceError, match=r"1 of 4 pictures are not in .*images, e.g. 001\.png"):
        open_dataset(spec)
    for picture in (tmp_path / "images").iterdir():
        picture.unlink()
    (tmp_path / "images").rmdir()
    with pytest.raises(ResourceError, match=r"its picture folder images/ is not"):
        open_dataset(spec)


def broken(change):
    content = coco_content()
    change(content)
    return content


@pytest.mark.parametrize(
    "content, message",
    [
        ("{not json", "not readable JSON"),
        ([1, 2], "not in COCO's caption format"),
        ({"images": []}, "needs the lists 'images' and 'annotations'"),
        ({"images": [], "annotations": []}, "has no captions"),
        (broken(lambda c: c["images"][1].pop("file_name")), r"images\[1\] has no 'file_name'"),
        (broken(lambda c: c["images"].append(5)), r"images\[4\] has no 'id'"),
        (broken(lambda c: c["images"][1].update(id=[3])), r"images\[1\] has the id \[3\]"),
        (broken(lambda c: c["images"][1].update(id=100)), "image id 100 occurs more than once"),
        (broken(lambda c: c["images"][1].update(file_name="000.png")), "file name 000.png occurs more than once"),
        (broken(lambda c: c["images"][1].update(file_name="../../secret.png")), r"has the file name '\.\./"),
        (broken(lambda c: c["images"][1].update(file_name="/etc/secret.png")), "has the file name '/etc"),
        (
            broken(lambda c: c["annotations"][3].update(caption="  ")),
            r"annotations\[3\] of image 99 has an empty caption",
        ),
        (broken(lambda c: c["annotations"][3].update(caption=7)), r"annotations\[3\] of image 99 has an empty caption"),
        (broken(lambda c: c["annotations"][3].pop("caption")), r"annotations\[3\] has no 'caption'"),
        (broken(lambda c: c["annotations"][3].update(image_id=5)), "of image 5, which is not among the images"),
        (broken(lambda c: c["annotations"][3].update(id=0)), "annotation id 0 occurs more than once"),
    ],
)
def test_broken_annotations_are_named(tmp_path, content, message):
    spec = write_coco(tmp_path, content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        open_dataset(spec)


@pytest.mark.parametrize(
    "spec, options, message",
    [
        ("flickr", {}, "is not a data set"),
        (None, {}, "is not a data set"),
        ("flickr:/x", {}, "unknown kind of data set 'flickr'"),
        ("scenes:tall:val", {"n": 3}, "families short, narrative, late, questions"),
        ("scenes:short:dev", {"n": 3}, "splits train, val, test, novel"),
        ("scenes:short", {"n": 3}, "families"),
        ("scenes:short:val", {}, "say how many with n"),
        ("scenes:short:val", {"n": 0}, "at least 1"),
        ("scenes:short:val", {"n": 3, "seed": -1}, "must not be negative"),
        ("scenes:short:val", {"n": SCENES_PER_SEED + 1}, "a seed has"),
    ],
)
def test_bad_specifications(spec, options, message):
    with pytest.raises(InputError, match=message):
        open_dataset(spec, **options)


@pytest.mark.parametrize("family", ["short", "narrative", "late"])
def test_scenes_captions(family):
    dataset = open_dataset(f"scenes:{family}:val", n=5)
    item = dataset[2]
    assert len(dataset) == 5 and item.image.size == (336, 336) and item.image.mode == "RGB"
    assert len(item.references) == 5 and item.prompt and item.meta["seed"] == 2
    assert np.array_equal(np.asarray(item.image), np.asarray(open_dataset(f"scenes:{family}:val", n=3)[2].image))


def test_scenes_render_only_when_asked(monkeypatch):
    from dyrate_lib import scenes

    rendered = []
    monkeypatch.setattr(scenes, "render", lambda scene: rendered.append(scene.id) or Image.new("RGB", (2, 2)))
    dataset = open_dataset("scenes:short:test", n=3)
    assert len(dataset.references()) == 3 and not rendered
    assert dataset[1].image.size == (2, 2) and rendered == [dataset[1].id]


def test_scenes_questions_hold_every_kind():
    from dyrate_lib.scenes import QUESTION_KINDS

    dataset = open_dataset("scenes:questions:val", n=12)
    kinds = [item.meta["kind"] for item in dataset]
    assert set(kinds) == set(QUESTION_KINDS)
    assert all(len(item.references) == 1 and "single word or phrase" in item.prompt for item in dataset)
    assert [item.prompt for item in dataset] == [item.prompt for item in open_dataset("scenes:questions:val", n=12)]


def test_scenes_of_other_seeds_and_splits_are_others():
    ids = [
        item.id
        for split in ("val", "test")
        for seed in (0, 1)
        for item in open_dataset(f"scenes:short:{split}", 3, seed)
    ]
    assert len(set(ids)) == len(ids) == 12


def test_identity_knows_the_content_and_not_the_place(tmp_path):
    folders = [tmp_path / name for name in ("here", "there", "other")]
    for folder in folders:
        folder.mkdir()
    changed = coco_content()
    changed["annotations"][0]["caption"] = "another caption"
    here, there = (open_dataset(write_coco(folder)).identity for folder in folders[:2])
    other = open_dataset(write_coco(folders[2], changed)).identity
    assert here == there != other and "here" not in json.dumps(here)
    scenes = open_dataset("scenes:short:val", n=3).identity
    assert scenes == open_dataset("scenes:short:val", n=3).identity
    assert scenes["texts"] != open_dataset("scenes:late:val", n=3).identity["texts"]


def test_indexing():
    dataset = open_dataset("scenes:short:val", n=4)
    assert [item.id for item in dataset[1:3]] == [dataset[1].id, dataset[2].id]
    assert dataset[-1].id == dataset[3].id
    for index in (4, -5):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="the folder ../shared/coco-mini is not beside the checkout")
def test_real_coco_pictures():
    dataset = open_dataset(f"coco:{COCO_MINI}")
    assert len(dataset) == 60
    for item in dataset:
        assert item.image.mode == "RGB" and min(item.image.size) > 100 and len(item.references) >= 5
