"""Published formats: COCO's folder with its parts, Karpathy's Flickr30k file, nocaps with domains, parquet; good and broken."""

import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dyrate_lib.datasets import open_dataset
from dyrate_lib.errors import InputError, ResourceError
from dyrate_lib.published import coco_parts, split_part


def save_pictures(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        noise = np.random.default_rng(i).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)


def write_coco_folder(folder, parts=("val2017",), n=4):
    """The official layout: annotations/captions_NAME.json and NAME/ with 12-digit JPEGs."""
    for place, part in enumerate(parts):
        first = 1000 * place
        names = [f"{first + i:012d}.jpg" for i in range(n)]
        content = {
            "info": {"year": 2017}, "licenses": [],
            "images": [{"id": first + i, "file_name": name, "height": 24, "width": 32} for i, name in enumerate(names)],
            "annotations": [{"id": first + 10 * i + j, "image_id": first + i, "caption": f"A dog runs, way {j} of {i}.\n"}
                            for i in range(n) for j in range(5)],
        }  # fmt: skip
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))
        save_pictures(folder / part, names)
    return f"coco:{folder}"


def karpathy(n=6):
    splits = ["train", "test", "val", "test", "train", "test"]
    return {
        "dataset": "flickr30k",
        "images": [
            {"imgid": i, "split": splits[i % 6], "filename": f"{1000 + i}.jpg", "sentids": [5 * i + j for j in range(5)],
             "sentences": [{"tokens": ["a", "dog"], "raw": f"A dog  {i}-{j}.", "sentid": 5 * i + j} for j in range(5)]}
            for i in range(n)
        ],
    }  # fmt: skip


def nocaps(n=6):
    domains = ["in-domain", "near-domain", "out-domain"]
    return {
        "info": {}, "licenses": [],
        "images": [{"id": i, "open_images_id": f"{i:016x}", "file_name": f"{i:016x}.jpg", "height": 24, "width": 32,
                    "coco_url": "https://example.org/x.jpg", "domain": domains[i % 3]} for i in range(n)],
        "annotations": [{"id": 10 * i + j, "image_id": i, "caption": f"A vehicle {i} {j}."} for i in range(n) for j in range(10)],
    }  # fmt: skip


PUBLISHED = {  # kind -> what makes its annotations, their file, the pictures' folder and names
    "coco": (nocaps, "captions.json", "images", [f"{i:016x}.jpg" for i in range(6)]),
    "flickr30k": (karpathy, "dataset_flickr30k.json", "flickr30k-images", [f"{1000 + i}.jpg" for i in range(6)]),
    "nocaps": (nocaps, "nocaps_val_4500_captions.json", "val", [f"{i:016x}.jpg" for i in range(6)]),
}


def write_published(kind, folder, content=None):
    make, annotations, pictures, names = PUBLISHED[kind]
    if not (folder / pictures).is_dir():
        save_pictures(folder / pictures, names)
    (folder / annotations).write_text(json.dumps(make() if content is None else content))
    return f"{kind}:{folder}"


# --------------------------------------------------------------------------------------------------------------- good


def test_coco_parts_are_chosen_by_name(tmp_path):
    spec = write_coco_folder(tmp_path, ("train2017", "val2017"))
    assert coco_parts(tmp_path) == ["train2017", "val2017"]
    assert [i.id for i in open_dataset(spec)] == ["1000", "1001", "1002", "1003"]  # validation unless asked
    train = open_dataset(f"{spec}#train2017")
    assert [i.id for i in train] == ["0", "1", "2", "3"] and train.name == "coco"
    assert train[1].file.name == "000000000001.jpg" and train[1].image.size == (32, 24)
    with pytest.raises(ResourceError, match="no annotations/captions_test2017.json"):
        open_dataset(f"{spec}#test2017")


def test_karpathy_splits(tmp_path):
    spec = write_published("flickr30k", tmp_path)
    test = open_dataset(spec)
    assert [i.id for i in test] == ["1001", "1003", "1005"] and test.name == "flickr30k:test"
    assert test[0].references == [f"A dog 1-{j}." for j in range(5)] and test[0].image.mode == "RGB"
    assert len(open_dataset(f"{spec}#train")) == 2 and len(open_dataset(f"{spec}#val")) == 1
    assert (
        open_dataset(f"{spec}#val").identity["texts"] == test.identity["texts"]
    )  # one file; the name tells them apart
    with pytest.raises(InputError, match="splits are train, restval, val, test, not 'dev'"):
        open_dataset(f"{spec}#dev")
    with pytest.raises(InputError, match="no captions of split restval"):
        open_dataset(f"{spec}#restval")


def test_nocaps_domains(tmp_path):
    spec = write_published("nocaps", tmp_path)
    whole = open_dataset(spec)
    assert len(whole) == 6 and [i.meta["domain"] for i in whole][:3] == ["in-domain", "near-domain", "out-domain"]
    assert all(len(i.references) == 10 for i in whole)
    near = open_dataset(f"{spec}#near-domain")
    assert [i.id for i in near] == ["1", "4"] and near.name == "nocaps:near-domain"
    with pytest.raises(InputError, match="domains of nocaps are in-domain"):
        open_dataset(f"{spec}#far")


def test_a_byte_order_mark_and_a_hash_in_the_folder_do_no_harm(tmp_path):
    folder = tmp_path / "coco#1"
    spec = write_coco_folder(folder)
    file = folder / "annotations" / "captions_val2017.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(open_dataset(spec)) == 4 and split_part(str(folder)) == (str(folder), "")


# ------------------------------------------------------------------------------------------------------------- broken


FLICKR = [
    (lambda c: c.pop("images"), "not in Karpathy's format"),
    (lambda c: c["images"][1].pop("filename"), r"images\[1\] has no 'filename'"),
    (lambda c: c["images"][1].pop("split"), r"images\[1\] has no 'split'"),
    (lambda c: c["images"][1].update(split="dev"), r"images\[1\] \(1001.jpg\) has the split 'dev'"),
    (lambda c: c["images"][1].update(sentences=[]), r"images\[1\] \(1001.jpg\) has no sentences"),
    (lambda c: c["images"][1]["sentences"][2].pop("raw"), r"images\[1\].sentences\[2\] has no 'raw'"),
    (
        lambda c: c["images"][1]["sentences"][2].update(raw=" "),
        r"images\[1\].sentences\[2\] \(1001.jpg\) has an empty caption",
    ),
    (lambda c: c["images"][1]["sentences"][2].update(sentid=0), "sentid 0 occurs more than once"),
    (lambda c: c["images"][1].update(filename="1000.jpg"), "picture 1000.jpg occurs more than once"),
    (lambda c: c["images"][1].update(filename="../1.jpg"), r"images\[1\] has the file name"),
    (lambda c: c["images"].append(7), r"images\[6\] has no 'filename'"),
]
NOCAPS = [
    (lambda c: c["images"][2].pop("domain"), r"images\[2\] has no 'domain'"),
    (lambda c: c["images"][2].update(domain="far"), r"images\[2\] has the domain 'far'"),
    (lambda c: c["images"][2].update(id=0), "image id 0 occurs more than once"),
    (
        lambda c: c["annotations"][2].update(caption="\ud800"),
        r"annotations\[2\] of image 0 has a caption that is no valid text",
    ),
    (lambda c: c["annotations"].clear(), "has no captions"),
]


@pytest.mark.parametrize(
    "kind, change, message", [("flickr30k", *case) for case in FLICKR] + [("nocaps", *case) for case in NOCAPS]
)
def test_broken_annotations_are_named(tmp_path, kind, change, message):
    content = PUBLISHED[kind][0]()
    change(content)
    with pytest.raises(InputError, match=message):
        open_dataset(write_published(kind, tmp_path, content))


def test_wrong_encodings_and_broken_json_name_the_line(tmp_path):
    spec = write_coco_folder(tmp_path)
    file = tmp_path / "annotations" / "captions_val2017.json"
    good = file.read_text()
    file.write_bytes(b'{\n"info":\n"caf\xe9"}')
    with pytest.raises(InputError, match="captions_val2017.json is not readable JSON: line 3 is not UTF-8"):
        open_dataset(spec)
    file.write_text(good[: len(good) // 2])
    with pytest.raises(InputError, match="not readable JSON: .*line 1 column"):
        open_dataset(spec)
    file.write_bytes(good.encode("utf-16"))
    with pytest.raises(InputError, match="line 1 is not UTF-8"):
        open_dataset(spec)
    file.write_text("[" * 100_000)
    with pytest.raises(InputError, match="not readable JSON"):
        open_dataset(spec)


def test_missing_pictures_and_files(tmp_path):
    spec = write_published("flickr30k", tmp_path)
    (tmp_path / "flickr30k-images" / "1003.jpg").unlink()
    with pytest.raises(ResourceError, match=r"1 of 3 pictures are not in .*, e.g. 1003.jpg"):
        open_dataset(spec)
    assert len(open_dataset(f"{spec}#train")) == 2  # only what is asked for has to be there
    (tmp_path / "dataset_flickr30k.json").unlink()
    with pytest.raises(ResourceError, match="0 annotation files"):
        open_dataset(spec)
    with pytest.raises(ResourceError, match="there is no folder"):
        open_dataset("nocaps:/nowhere/at/all")


def test_pictures_in_folders_of_their_own(tmp_path):
    content = nocaps()
    content["images"][0]["file_name"] = "deep/x.jpg"
    spec = write_published("nocaps", tmp_path, content)
    with pytest.raises(ResourceError, match="e.g. deep/x.jpg"):
        open_dataset(spec)
    save_pictures(tmp_path / "val" / "deep", ["x.jpg"])
    assert open_dataset(spec)[0].image.size == (32, 24)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(list(PUBLISHED)),
    where=st.sampled_from(["images", "annotations"]),
    row=st.integers(0, 5),
    key=st.data(),
    value=anything,
)
def test_any_change_gives_a_data_set_or_our_error(tmp_path, kind, where, row, key, value):
    content = PUBLISHED[kind][0]()
    table = content.get(where, content["images"])
    entry = table[row % len(table)]
    name = key.draw(st.sampled_from(sorted(entry)))
    if key.draw(st.booleans()):
        entry[name] = value
    else:
        table[row % len(table)] = value
    spec = write_published(kind, tmp_path / kind, content)
    try:
        dataset = open_dataset(spec)
    except (InputError, ResourceError) as error:
        assert str(error)
    else:
        assert len(dataset) and all(item.references and item.file.is_file() for item in dataset)


# ------------------------------------------------------------------------------------------------------------ parquet


def picture(number=0, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


def table(n=5):
    return [
        {"image": picture(i), "image_id": 10 + i, "annotations_captions": [f"Thing {i}.", "Any  thing."]}
        for i in range(n)
    ]


@pytest.fixture
def write(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow (the extra [lmms]) is not installed")
    import pyarrow.parquet as pq

    def write(rows, name="val-0.parquet", **options):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, **options)
        return f"parquet:{tmp_path}"

    return write


def test_parquet_is_read_where_it_lies(write):
    spec = write(table(), row_group_size=2)
    write([{**row, "image_id": row["image_id"] + 100} for row in table(3)], "data/test-0.parquet")
    val = open_dataset(f"{spec}#val")
    assert [i.id for i in val] == ["10", "11", "12", "13", "14"] and val.name == "parquet:val"
    assert [i.image.getpixel((0, 0))[0] for i in val] == [0, 1, 2, 3, 4] and val[3].references == [
        "Thing 3.",
        "Any thing.",
    ]
    assert len(open_dataset(spec)) == 8 and len(open_dataset(f"{spec}#test", n=2)) == 2
    assert {i.id for i in open_dataset(f"{spec}#val", n=5, seed=3)} == {i.id for i in val}
    with pytest.raises(ResourceError, match="no files of split train"):
        open_dataset(f"{spec}#train")


def test_broken_parquet_is_named(write, tmp_path):
    cases = [
        ([{"image": picture()}], "has no column 'image' or none of answer"),
        ([{"caption": ["x"]}], "has no column 'image'"),
        ([{"image": picture(), "caption": ["x"]}, {"image": picture(), "caption": []}], "row 1 has no captions"),
        ([{"image": picture(), "caption": ["x", " "]}], "row 0 has an empty caption"),
        ([{"image": picture(), "caption": ["x"], "id": 1}] * 2, "id 1 occurs more than once"),
    ]
    for rows, message in cases:
        with pytest.raises(InputError, match=message):
            open_dataset(write(rows))
    spec = write([{"image": {"bytes": b"nonsense"}, "caption": ["x"]}, {"image": {"bytes": None}, "caption": ["y"]}])
    with pytest.raises(InputError, match=r"val-0.parquet, picture val-0-0: .*not an image"):
        _ = open_dataset(spec)[0].image
    with pytest.raises(InputError, match="bytes are not in the file"):
        _ = open_dataset(spec)[1].image
    (tmp_path / "val-0.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(InputError, match="val-0.parquet is not a sound parquet file"):
        open_dataset(spec)
    with pytest.raises(ResourceError, match="there is nothing at"):
        open_dataset("parquet:/nowhere/at/all")
