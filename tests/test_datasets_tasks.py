"""The short-answer tasks as data sets: whole pictures in order, unique ids, pictures as they look, scored as they come."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from dyrate_lib import InputError, prepared
from dyrate_lib.datasets import SCENES_PER_SEED, open_dataset
from dyrate_lib.datasets_tasks import picture_id
from dyrate_lib.scenes import make_scene, render, tasks
from dyrate_lib.scenes.data import normalise
from dyrate_lib.scenes.looks import render_look
from dyrate_lib.scenes.tasks import NAMES, PLAIN, PROMPTS_A_PICTURE, Example, Look, base_task
from dyrate_lib.task_metrics import METRICS, score_task

LOOKED = ("vizwiz", "textvqa", "textvqa-ocr")


@pytest.mark.parametrize("task", NAMES)
def test_items_are_the_examples_in_order(task):
    n, prompts = 12, PROMPTS_A_PICTURE[base_task(task)]
    dataset = open_dataset(f"scenes:{task}:val", n)
    assert len(dataset) == n * prompts and dataset.name == f"scenes:{task}:val"
    made = (tasks.examples(task, make_scene(seed, "val")) for seed in itertools.count())
    expected = [e for found in itertools.islice((found for found in made if found), n) for e in found]
    for item, example in zip(dataset, expected, strict=True):
        assert (item.prompt, item.references) == (example.prompt, list(example.answers))
        about = item.meta
        assert (about["scene"], about["look"], about["answer"]) == (example.scene, example.look, example.answer)
        assert (about["category"], about["part"], about["family"]) == (example.category, example.part, task)
        assert (about["seed"], about["split"]) == (example.scene.seed, "val") and about.items() >= example.meta.items()
    pictures = [item.meta["picture"] for item in dataset]
    assert [len(list(group)) for _, group in itertools.groupby(pictures)] == [prompts] * n and len(set(pictures)) == n
    assert [item.prompt for item in open_dataset(f"scenes:{task}:val", n)[-3:]] == [
        item.prompt for item in dataset[-3:]
    ]
    assert dataset[-1] == dataset[len(dataset) - 1] and len(dataset.references()) == len(dataset)


def test_ids_are_unique_over_everything():
    places = [(split, seed) for split in ("val", "test") for seed in (0, 1)]

    def ids_of(*names):
        specs = [(f"scenes:{name}:{split}", seed) for name in names for split, seed in places]
        return [item.id for spec, seed in specs for item in open_dataset(spec, 4, seed)]

    plain, ids = ids_of("short", "questions"), ids_of(*NAMES)
    assert len(set(ids)) == len(ids) == 2 * 2 * 4 * sum(PROMPTS_A_PICTURE[base_task(name)] for name in NAMES)
    assert not set(ids) & set(plain)


def test_pictures_with_a_look_have_ids_of_their_own():
    scene = make_scene(5, "val")
    assert picture_id(scene, PLAIN) == scene.id
    ids = {picture_id(scene, look) for look in (PLAIN, Look(blur=1.0), Look(blur=2.0), Look(noise=1.0, seed=1))}
    assert len(ids) == 4
    both = (open_dataset(f"scenes:{task}:val", 3) for task in ("textvqa", "textvqa-ocr"))
    for a, b in zip(*both, strict=True):
        assert a.meta["picture"] == b.meta["picture"] != a.meta["scene"].id and a.id != b.id and a.prompt != b.prompt


def test_seeds_and_splits_take_other_scenes():
    assert open_dataset("scenes:gqa:test", 2, seed=3)[1].meta["seed"] >= 3 * SCENES_PER_SEED
    assert open_dataset("scenes:pope:novel", 2)[0].meta["scene"].split == "novel"


def test_scenes_without_a_question_are_passed_over(monkeypatch):
    def every_third(task, scene, variant=0):
        return [Example(task, scene, f"? {scene.seed}", "a", ("a",), "c")] if scene.seed % 3 == 2 else []

    monkeypatch.setattr("dyrate_lib.datasets_tasks.examples", every_third)
    dataset = open_dataset("scenes:gqa:val", 4)
    assert dataset[3].meta["seed"] == 11 and [item.meta["seed"] for item in dataset] == [2, 5, 8, 11]
    monkeypatch.setattr("dyrate_lib.datasets_tasks.SCENES_PER_SEED", 10)
    with pytest.raises(InputError, match="of a seed's 10 scenes 3 give a question"):
        open_dataset("scenes:gqa:val", 4)[3]


def test_nothing_is_made_on_opening(monkeypatch):
    monkeypatch.setattr("dyrate_lib.datasets_tasks.make_scene", lambda *_: pytest.fail("made"))
    assert len(open_dataset("scenes:pope:test", 1000)) == 4000


@pytest.mark.parametrize("task", ["gqa", *LOOKED])
def test_pictures_look_as_they_should(task):
    for item in open_dataset(f"scenes:{task}:val", 3):
        scene, look = item.meta["scene"], item.meta["look"]
        shown = np.asarray(item.image)
        assert shown.shape == (336, 336, 3)
        assert np.array_equal(shown, np.asarray(render_look(scene, look)))
        assert np.array_equal(shown, np.asarray(render(scene))) == look.plain


def test_prepared_pictures(tiny_336):
    """A batch of plain pictures and pictures with looks equals each picture through PIL; a picture is made once."""
    prepared.clear_cache()
    shown = set()
    for task in ("pope", "vizwiz"):
        dataset = open_dataset(f"scenes:{task}:val", 4)
        indices = list(range(min(8, len(dataset))))
        shown |= {dataset[index].meta["picture"] for index in indices}
        found = prepared.pictures(tiny_336, dataset, indices)
        for index in indices:
            pixels = torch.from_numpy(np.asarray(dataset[index].image).astype(np.float32) / 255).permute(2, 0, 1)
            assert torch.allclose(found[index], normalise(pixels[None])[0], atol=0.51 / 255 / 0.26)
        assert torch.equal(found, prepared.pictures(tiny_336, dataset, indices))
    assert len(prepared._pictures) == len(shown) > 2
    prepared.clear_cache()


def test_pictures_are_shared_with_captions(tiny_336, monkeypatch):
    prepared.clear_cache()
    captions = prepared.pictures(tiny_336, open_dataset("scenes:short:val", 2), [0, 1])
    monkeypatch.setattr(prepared, "_render", lambda *_: pytest.fail("rendered again"))
    assert torch.equal(prepared.pictures(tiny_336, open_dataset("scenes:pope:val", 2), [0, 3, 4, 7])[[0, 2]], captions)
    prepared.clear_cache()


@pytest.fixture(scope="module")
def tiny_336():
    from dyrate_lib.scenes.tokenizer import build_processor

    return build_processor()


@pytest.mark.parametrize("task", NAMES)
def test_true_answers_score_full_marks_and_wrong_ones_none(task):
    dataset = open_dataset(f"scenes:{task}:test", 24)
    full = score_task(task, {item.id: item.meta["answer"] for item in dataset}, dataset)
    wrong = score_task(task, {item.id: "zebra" for item in dataset}, dataset)
    assert len(full.ids) == 24 and wrong.score == 0
    if task in LOOKED:
        assert full.score > 75  # annotators differ
    else:
        categories = len({item.meta["category"] for item in dataset})
        assert full.score == (200 * categories if task == "mme" else 100)
    assert METRICS[task].headline in full.parts


def test_identity_follows_the_texts(monkeypatch):
    first = open_dataset("scenes:gqa:val", 5).identity
    assert first == open_dataset("scenes:gqa:val", 5).identity and first["n"] == 5
    assert open_dataset("scenes:pope:val", 5).identity["n"] == 20
    original = tasks.examples

    def reworded(task, scene, variant=0):
        found = original(task, scene, variant)
        return [dataclasses.replace(e, prompt=e.prompt + "!") for e in found] if scene.seed == 4 else found

    monkeypatch.setattr("dyrate_lib.datasets_tasks.examples", reworded)
    assert open_dataset("scenes:gqa:val", 5).identity["texts"] != first["texts"]


def test_families_are_named():
    with pytest.raises(InputError, match="questions, gqa, vizwiz, scienceqa, textvqa, pope, mmbench, mme, textvqa-ocr"):
        open_dataset("scenes:vqa:val", 3)
    with pytest.raises(InputError, match="say how many"):
        open_dataset("scenes:pope:val")
    with pytest.raises(InputError, match="splits"):
        open_dataset("scenes:pope:dev", 3)
