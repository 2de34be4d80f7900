"""Training on the short-answer tasks: rows, slots, going on from a checkpoint with another vocabulary."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib import paths
from dyrate_lib.errors import InputError
from dyrate_lib.prompts import IMAGE_TOKEN, chat_prompt
from dyrate_lib.scenes import FAMILIES, NEEDS, PROMPTS, make_scene, references, rows, starting
from dyrate_lib.scenes import trainer as trainer_module
from dyrate_lib.scenes.card import card
from dyrate_lib.scenes.data import N_CLS, PackedBatches, cls_targets
from dyrate_lib.scenes.objective import KIND_WEIGHTS, Recipe, cls_loss, response_loss, to_device, token_accuracy
from dyrate_lib.scenes.packing import (
    DEFAULT_SLOTS,
    KINDS,
    Part,
    answer_ids,
    example_part,
    instruction_ids,
    layout,
    place,
    prefix_ids,
    response_tokens,
)
from dyrate_lib.scenes.questions import questions
from dyrate_lib.scenes.score import answer
from dyrate_lib.scenes.tasks import NAMES, PLAIN, examples, textvqa, vizwiz
from dyrate_lib.scenes.tokenizer import build_processor, build_tokenizer
from dyrate_lib.scenes.train import main
from dyrate_lib.scenes.trainer import train
from dyrate_lib.scenes.vlm import PackedForward, build_model

OLD = paths.checkpoints() / "scenes-small"
QUIET = dict(device="cpu", log_every=1, say=lambda _: None)
TINY = Recipe(size="tiny", batch=2, slots=("short", "task:34", "task:72"))


@lru_cache(maxsize=1)
def batch_of_rows() -> tuple[dict, list, list]:
    """A batch, its rows, and every prompt with its answer and look that was drawn for them."""
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((rows, "examples"), (vizwiz, "several"), (textvqa, "several")):
            stock = getattr(module, name)

            def recording(*arguments, stock=stock, **options):
                found = stock(*arguments, **options)
                drawn.extend((e.prompt, e.answer, e.look) for e in found)
                return found

            patch.setattr(module, name, recording)
        batch = PackedBatches("train", 64)[3]
    composed = [rows.compose(make_scene(3 * 64 + b, "train"), layout()) for b in range(64)]
    return batch, composed, drawn


# ---------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_every_word_of_a_task_is_one_token_and_its_answer_fits_the_evaluation(name):
    tokenizer = build_tokenizer()
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    longest = max(layout().lengths[3:])
    for seed in range(500, 560):
        for e in examples(name, make_scene(seed, "novel" if seed % 2 else "test")):
            tail = chat_prompt(e.prompt).split(IMAGE_TOKEN)[1]
            ids = tokenizer(tail, add_special_tokens=False).input_ids
            assert list(instruction_ids(e.prompt)) == ids
            assert len(ids) == len(pieces(tail)), "each word is a token"
            assert tokenizer.decode(answer_ids(e.answer)[:-1]) == f" {e.answer}"
            assert answer_ids(e.answer)[-1] == tokenizer.eos_token_id and len(answer_ids(e.answer)) <= 4
            assert len(example_part(name, e)) <= longest


# --------------------------------------------------------------------------------------------------------------- rows


@given(
    st.lists(st.integers(2, 40), max_size=8),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.data(),
)
def test_parts_get_the_shortest_free_slot_they_fit(sizes, lengths, data):
    parts = [Part("gqa", (0,) * (n - 1), (1,), (0,)) for n in sizes]
    free = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True))
    placed = place(parts, lengths, free)
    slots = [slot for slot, _ in placed]
    assert len(set(slots)) == len(slots) and set(slots) <= set(free)
    assert all(len(part) <= lengths[slot] for slot, part in placed)
    left = sorted(lengths[s] for s in set(free) - set(slots))
    out = [p for p in parts if not any(p is q for _, q in placed)]
    assert all(len(p) > n for p in out for n in left), "nothing is left out that fits what is left"
    assert not placed or lengths[slots[0]] == min(lengths[s] for s in free if lengths[s] >= len(placed[0][1]))


def test_every_slot_holds_a_prompt_that_was_drawn_and_its_answer():
    batch, _, drawn = batch_of_rows()
    tokenizer, where = build_tokenizer(), layout()
    said_of = {chat_prompt(prompt).split(IMAGE_TOKEN)[1]: set() for prompt, _, _ in drawn}
    for prompt, said, look in drawn:
        said_of[chat_prompt(prompt).split(IMAGE_TOKEN)[1]].add((said, look))
    captions = {chat_prompt(text).split(IMAGE_TOKEN)[1]: family for family, text in PROMPTS.items()}
    starts, seen_kinds = np.cumsum((0, *where.lengths)), set()
    for b in range(64):
        scene = make_scene(3 * 64 + b, "train")
        for start, length in zip(starts, where.lengths, strict=False):
            part = slice(start, start + length)
            ids, labels, kinds = (batch[k][b, part] for k in ("ids", "labels", "kind"))
            at = np.flatnonzero(labels >= 0)
            assert (kinds >= 0).tolist() == (labels >= 0).tolist() == (batch["need"][b, part] >= 0).tolist()
            if not len(at):
                assert (ids == tokenizer.pad_token_id).all()
                continue
            assert (np.diff(at) == 1).all() and (ids[at + 1] == labels[at]).all()
            assert labels[at[-1]] == tokenizer.eos_token_id and (ids[at[-1] + 2 :] == tokenizer.pad_token_id).all()
            (kind,) = {KINDS[k] for k in kinds[at]}
            seen_kinds.add(kind)
            head, said = tokenizer.decode(ids[: at[0] + 1].tolist()), tokenizer.decode(labels[at[:-1]].tolist()).strip()
            if kind in FAMILIES:
                assert captions[head] == kind and said in references(scene, kind)
            elif kind != "question":
                looks = [look for answer_, look in said_of[head] if answer_ == said]
                assert batch["looks"][b] in looks or PLAIN in looks
                assert ("Reference OCR token" in head) == (kind == "textvqa-ocr")
                assert batch["need"][b, part][at].tolist() == [NEEDS.index("image")] * (len(at) - 1) + [NEEDS.index("none")]
    assert seen_kinds == set(KINDS)


def test_a_picture_is_asked_only_what_it_shows():
    batch, composed, _ = batch_of_rows()
    kinds = [{part.kind for _, part in row.placed} for row in composed]
    sorts = {"plain": 0, "signed": 0, "covered": 0, "bad": 0}
    for b, row in enumerate(composed):
        assert batch["looks"][b] == row.look and bool(batch["seen"][b]) == row.seen
        scene, signed = make_scene(3 * 64 + b, "train"), bool(row.look.signs)
        if signed:
            assert row.seen != textvqa.cover(scene, row.look) and "late" not in kinds[b]
            assert {"textvqa", "textvqa-ocr"} <= kinds[b]
            sorts["signed" if row.seen else "covered"] += 1
            assert row.seen or kinds[b] == {"textvqa", "textvqa-ocr"}
        elif row.look.plain:  # some photographs for VizWiz are good ones
            assert row.seen and set(FAMILIES) <= kinds[b] and not kinds[b] & {"textvqa", "textvqa-ocr"}
            sorts["plain"] += 1
        else:
            assert kinds[b] == {"vizwiz"} and not row.seen
            sorts["bad"] += 1
    assert sorts["plain"] > 20 and sorts["signed"] > 10 and sorts["bad"] > 4


def test_signs_that_lie_over_an_object_leave_only_their_own_prompts(monkeypatch):
    monkeypatch.setattr(textvqa, "cover", lambda scene, look: True)
    for seed in range(40):
        row = rows.compose(make_scene(seed, "train"), layout())
        if row.look.signs:
            assert not row.seen and {part.kind for _, part in row.placed} <= {"textvqa", "textvqa-ocr"}


@pytest.mark.parametrize("module", [vizwiz, textvqa])
def test_several_prompts_share_one_picture_and_begin_with_the_tasks_own(module):
    counts = set()
    for seed in range(30):
        scene = make_scene(seed, "train")
        (own,) = module.examples(scene, 5)
        found = module.several(scene, 5, 4)
        assert found[0] == own and {e.look for e in found} == {own.look}
        assert len({e.prompt for e in found}) == len(found) <= 4
        counts.add(len(found))
    assert max(counts) > 1


def test_polls_are_answered_yes_as_often_as_the_picture_allows():
    found = [rows._asked("pope", make_scene(s, "train"), random.Random(str(s))) for s in range(300)]
    yes = sum(p.body[:-1] == answer_ids("yes")[:-1] for p in found)
    assert 0.52 < yes / 300 < 0.73  # a half, and a quarter of the other half


def test_batches_are_a_function_of_split_and_index_and_go_on_where_an_earlier_run_ended():
    one, other = PackedBatches("train", 4), PackedBatches("train", 4, first=8)
    assert all(np.array_equal(one[2][k], other[0][k]) for k in one[2] if k != "looks") and one[2]["looks"] == other[0]["looks"]
    assert not np.array_equal(one[2]["ids"], PackedBatches("val", 4)[2]["ids"])
    loaded = next(trainer_module._loader(PackedBatches("train", 4, length=5), 2, 1, False))
    assert loaded["looks"] == one[2]["looks"] and np.array_equal(loaded["ids"].numpy(), one[2]["ids"])


def test_slots_must_be_known():
    for bad in ("gqa", "task:", "task:x"):
        with pytest.raises(InputError, match="unknown slot"):
            layout((bad,))
    assert layout().total == 448 and not layout(("short", "question")).tasks and layout().tasks


# ------------------------------------------------------------------------------------------------------------- losses


def test_the_cls_loss_is_over_pictures_that_show_their_scene():
    head = torch.nn.Linear(6, N_CLS)
    cls = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    target = torch.from_numpy(np.stack([cls_targets(make_scene(s, "train")) for s in range(5)]))
    seen = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(cls_loss(head, cls, target, seen), cls_loss(head, cls[seen], target[seen]))
    single = torch.stack([cls_loss(head, cls[i : i + 1], target[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(cls_loss(head, cls, target), single.mean())
    assert cls_loss(head, cls, target, torch.zeros(5, dtype=torch.bool)).item() == 0


def test_weights_go_with_their_kinds():
    assert len(KIND_WEIGHTS) == len(KINDS)
    logits = torch.zeros(1, 3, 7)
    for i, weight in enumerate(KIND_WEIGHTS):
        total, means = response_loss(logits, torch.tensor([[1, 2, -100]]), torch.tensor([[i, i, -1]]), KIND_WEIGHTS)
        assert float(total) == pytest.approx(weight * float(np.log(7)), rel=1e-5)
        assert (means > 0).nonzero().flatten().tolist() == [i]


def test_accuracy_of_a_task_is_that_of_its_answers():
    batch = to_device(PackedBatches("val", 12)[0], torch.device("cpu"))

    def ends_only(pixels, ids):  # always says EOS
        return torch.nn.functional.one_hot(torch.full_like(ids, build_tokenizer().eos_token_id), 2000).float(), None

    found = token_accuracy(ends_only, [batch])
    assert all(found[name] == 0 for name in NAMES if name in found) and found["question"] == 0.5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_both_kinds_of_attention_are_one_function():
    model = build_model("tiny", seed=2)
    batch = to_device(PackedBatches("val", 2)[0], torch.device("cpu"))
    with torch.no_grad():
        logits = [
            PackedForward(model, torch.tensor(prefix_ids()), layout().lengths, torch.float32, kind)(
                batch["pixel_values"], batch["ids"]
            )[0]
            for kind in ("masked", "flex")
        ]
    assert (logits[0] - logits[1]).abs().max() < 1e-5
    with pytest.raises(InputError, match="masked"):
        PackedForward(model, torch.tensor(prefix_ids()), layout().lengths, torch.float32, "fast")


# ------------------------------------------------------------------------------------- going on from a checkpoint


@pytest.fixture(scope="module")
def old():
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(OLD, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(OLD)


@pytest.fixture(scope="module")
def mapped():
    model = build_model("small", seed=3)
    starting.load_start(model, OLD)
    return model.eval()


def test_new_tokens_start_as_the_mean_of_the_pieces_they_were_split_into(old, mapped):
    model, processor = old
    before, after = processor.tokenizer, build_tokenizer()
    sources = starting.token_sources(before, after)
    for number in (after.pad_token_id, after.convert_tokens_to_ids(IMAGE_TOKEN), after.get_vocab()["Ġred"]):
        assert sources[number] == [before.get_vocab()[after.convert_ids_to_tokens(number)]]
    split = [i for i, s in enumerate(sources) if len(s) > 1]
    rows_of = {"embed": lambda m: m.get_input_embeddings().weight, "head": lambda m: m.lm_head.weight}
    for rows_in in rows_of.values():
        for i in [*split[:20], *range(0, len(sources), 97)]:
            torch.testing.assert_close(rows_in(mapped)[i], rows_in(model)[sources[i]].mean(0))
    for i in split[:50]:
        text = after.decode([i])
        assert before(text, add_special_tokens=False).input_ids == sources[i]


def test_at_first_the_model_says_what_the_checkpoint_said(old, mapped):
    model, processor = old
    before, after = processor.tokenizer, build_tokenizer()
    shared = sorted(set(before.get_vocab()) & set(after.get_vocab()))
    columns = [torch.tensor([t.get_vocab()[w] for w in shared]) for t in (before, after)]
    for family in FAMILIES:
        scene = make_scene(9, "test")
        texts = (chat_prompt(PROMPTS[family]).replace(IMAGE_TOKEN, IMAGE_TOKEN * 576), f" {references(scene, family)[2]}")
        pixels = to_device(PackedBatches("test", 1)[9], torch.device("cpu"))["pixel_values"]
        logits = []
        with torch.no_grad():
            for net, tokenizer, kept in zip((model, mapped), (before, after), columns, strict=True):
                ids = torch.tensor([[*tokenizer(texts[0]).input_ids, *tokenizer(texts[1], add_special_tokens=False).input_ids]])
                logits.append(net(input_ids=ids, pixel_values=pixels).logits[0, -30:, kept])
        torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    scenes = [make_scene(s, "test") for s in (0, 1)]
    said = [
        answer(net, kind, scenes, [PROMPTS["short"]] * 2, max_new_tokens=24)
        for net, kind in ((model, processor), (mapped, build_processor()))
    ]
    assert said[0] == said[1] and said[0][0] in references(scenes[0], "short")


def test_captions_can_be_told_in_a_checkpoints_own_vocabulary(old):
    tokenizer = old[1].tokenizer
    ids, needs = response_tokens(make_scene(4, "test"), "late", 1, tokenizer)
    text = references(make_scene(4, "test"), "late")[1]
    assert ids == [*tokenizer(f" {text}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert needs == response_tokens(make_scene(4, "test"), "late", 1)[1]


@pytest.fixture(scope="module")
def tiny_start(tmp_path_factory):
    """A tiny checkpoint as the command line leaves it, trained on captions alone."""
    out = tmp_path_factory.mktemp("start") / "scenes-tiny"
    found = train(replace(TINY, slots=("short",)), steps=2, out=out, **QUIET)
    recipe = asdict(found.recipe)
    (out / "metrics.json").write_text(json.dumps({"recipe": recipe}))
    return out


def test_a_start_is_described_by_its_steps_pictures_and_weights(tiny_start, tmp_path):
    found = starting.described(tiny_start)
    assert (found["name"], found["steps"], found["pictures"]) == ("scenes-tiny", 2, 4) and len(found["sha256"]) == 64
    second = shutil.copytree(tiny_start, tmp_path / "second")
    recipe = json.loads((second / "metrics.json").read_text())["recipe"] | {"start": found, "steps": 3}
    (second / "metrics.json").write_text(json.dumps({"recipe": recipe}))
    again = starting.described(second)
    assert (again["steps"], again["pictures"]) == (5, 10) and again["sha256"] == found["sha256"]


def test_a_start_that_does_not_fit_is_refused_before_training(tiny_start, tmp_path):
    with pytest.raises(InputError, match="metrics.json"):
        train(TINY, steps=1, start=tmp_path, **QUIET)
    with pytest.raises(InputError, match="another size"):
        starting.load_start(build_model("tiny"), OLD)
    bare = shutil.copytree(tiny_start, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        train(TINY, steps=1, start=bare, **QUIET)


def test_training_goes_on_with_pictures_that_the_checkpoint_has_not_seen(tiny_start, monkeypatch):
    asked = []
    stock = trainer_module.PackedBatches

    def recording(*arguments, **options):
        asked.append(options.get("first"))
        return stock(*arguments, **options)

    monkeypatch.setattr(trainer_module, "PackedBatches", recording)
    found = train(TINY, steps=1, start=tiny_start, **QUIET)
    assert asked[0] == 4 and found.recipe.start["name"] == "scenes-tiny"


def test_a_new_cls_head_learns_alone_at_first(tiny_start):
    recipe = replace(TINY, steps=40, warmup=2)
    before = build_model("tiny")
    starting.load_start(before, tiny_start)
    name = "model.vision_tower.encoder.layers.1.mlp.fc1.weight"  # the last layer, which only the CLS token is read through
    weights = {}
    for steps in (2, 3):
        keep = trainer_module._Run(recipe, torch.device("cpu"), lambda _: None, tiny_start)
        data = PackedBatches("train", 2, recipe.slots)
        keep.recipe = replace(recipe, start={"name": "scenes-tiny"})
        keep.make_forward(False, data.layout.lengths, {}, "masked")
        for i in range(steps):
            keep.update(to_device(data[i], torch.device("cpu")), 40)
        weights[steps] = keep.model.state_dict()[name]
    assert torch.equal(weights[2], before.state_dict()[name]) and not torch.equal(weights[3], before.state_dict()[name])


def test_a_few_steps_lower_the_loss_on_tasks(tiny_start):
    recipe = replace(TINY, slots=("task:28", "task:34", "task:50", "task:72"), batch=4, lr=2e-3)
    found = train(recipe, steps=24, start=tiny_start, **QUIET)
    for name in ("gqa", "mmbench", "pope"):
        losses = [line[name] for line in found.history if line[name]]
        assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:3]), name


def test_a_killed_run_from_a_start_resumes_where_it_was(tiny_start, tmp_path, monkeypatch):
    out, recipe = tmp_path / "scenes-tiny", replace(TINY, steps=5, warmup=2)
    whole = train(recipe, start=tiny_start, **QUIET)
    saved = trainer_module.Keeper.save

    def save_and_die(self, run, planned, final=False):
        saved(self, run, planned, final)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module.Keeper, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, start=tiny_start, out=out, save_every=0.0, **QUIET)
    monkeypatch.setattr(trainer_module.Keeper, "save", saved)
    resumed = train(recipe, start=tiny_start, out=out, **QUIET)
    assert [h["loss"] for h in resumed.history] == pytest.approx([h["loss"] for h in whole.history], abs=1e-6)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(InputError, match="another recipe"):
        train(recipe, out=out, **QUIET)


# ------------------------------------------------------------------------------------------------- command line, card


def test_the_command_line_trains_further_and_scores_every_task(tiny_start, tmp_path):
    out = tmp_path / "scenes-tiny"
    arguments = f"--size tiny --from {tiny_start} --steps 2 --batch 2 --device cpu --eval-n 2 --out {out}"
    assert main(arguments.split()) == 0
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["recipe"]["slots"] == list(DEFAULT_SLOTS) and numbers["recipe"]["lr"] == 6e-4
    assert numbers["recipe"]["start"]["steps"] == 2 and set(numbers["tasks"]) == set(NAMES)
    assert all(s["n"] == 2 and s["low"] <= s["score"] <= s["high"] for s in numbers["tasks"].values())
    text = (out / "README.md").read_text()
    assert text == card(numbers)
    assert "from the checkpoint `scenes-tiny` (2 steps, 4 pictures" in text and "4 steps in all. Now 2 steps of 2 fresh" in text
    assert "scene seeds from 4 on" in text and "| mmbench | circular accuracy |" in text and "| textvqa-ocr |" in text


def test_answers_are_given_to_the_picture_as_it_looks():
    model, processor = build_model("tiny", seed=1).eval(), build_processor()
    found = [e for s in range(3) for e in textvqa.examples(make_scene(s, "test"))]
    scenes, prompts, looks = ([getattr(e, k) for e in found] for k in ("scene", "prompt", "look"))
    seen = []
    stock = model.generate

    def generate(**inputs):
        seen.append(inputs["pixel_values"])
        return stock(**inputs)

    model.generate = generate
    answer(model, processor, scenes, prompts, 2, looks)
    answer(model, processor, scenes, prompts, 2)
    assert (seen[0] != seen[1]).flatten(1).any(1).all()


def test_questions_of_captions_go_on_being_asked():
    _, composed, _ = batch_of_rows()
    asked = [part for row in composed for _, part in row.placed if part.kind == "question"]
    known = {tuple(answer_ids(q.answer)) for s in range(200) for q in questions(make_scene(s, "train"))}
    assert len(asked) > 20 and all(tuple(part.body) in known for part in asked)
