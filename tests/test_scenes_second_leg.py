"""What a second leg on the tasks adds: patches that say letters, scaffolds, mixes, gathered labels, trials of kernels."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from dyrate_lib.errors import InputError
from dyrate_lib.prompts import IMAGE_TOKEN, chat_prompt
from dyrate_lib.scenes import fast_forward as fast_forward_module
from dyrate_lib.scenes import make_scene, rows, scaffolds, starting
from dyrate_lib.scenes import trainer as trainer_module
from dyrate_lib.scenes.card import card
from dyrate_lib.scenes.data import LABELLED, PackedBatches, labelled
from dyrate_lib.scenes.fast_forward import fast_forward
from dyrate_lib.scenes.lettering import WORDS
from dyrate_lib.scenes.looks import render_looks
from dyrate_lib.scenes.mixes import PRESETS, Mix
from dyrate_lib.scenes.objective import Recipe, response_loss, text_loss, to_device
from dyrate_lib.scenes.packed_forward import PackedForward
from dyrate_lib.scenes.packing import KINDS, SCAFFOLDS, answer_part, layout, prefix_ids
from dyrate_lib.scenes.patch_texts import LETTERS, N_TEXTS, NO_TEXT, patch_texts, words_shown
from dyrate_lib.scenes.questions import MIN_OFFSET
from dyrate_lib.scenes.render import pack_scenes
from dyrate_lib.scenes.tasks import PLAIN, Look, Sign, examples
from dyrate_lib.scenes.tasks.textvqa import draw_signs_of
from dyrate_lib.scenes.tokenizer import build_tokenizer
from dyrate_lib.scenes.train import main
from dyrate_lib.scenes.training_plan import Plan
from dyrate_lib.scenes.vlm import build_model

CPU = torch.device("cpu")
LAGGING = PRESETS["lagging"]
TINY = Recipe(size="tiny", batch=2, **vars(LAGGING))
QUIET = dict(device="cpu", log_every=1, say=lambda _: None)
WHITE, BLACK = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)


# ------------------------------------------------------------------------------------------------ what patches say


def test_patches_say_the_word_and_the_letter_under_their_centre():
    # scale 4: 'tea' is 76 x 36 px, its letters' cells are 24 px wide and begin 2 px in: 30-54, 54-78, 78-102 (margin: 28, 104)
    sign = Sign("tea", 28, 42, 4, BLACK, WHITE)
    words, letters = patch_texts(Look(signs=(sign,))).reshape(2, 24, 24)
    # centres at 14 i + 7: 35, 49, 63, 77, 91 across (105 is off the board) and 49, 63, 77 down (91 is off)
    want = np.full((24, 24), NO_TEXT)
    want[3:6, 2:7] = WORDS.index("tea")
    assert (words == want).all()
    want[3:6, 2:7] = [LETTERS.index(c) for c in "tteea"]
    assert (letters == want).all()
    assert (patch_texts(PLAIN) == NO_TEXT).all()
    assert (patch_texts(Look(signs=(sign,), crop=(0.0, 0.0, 200.0))) == NO_TEXT).all(), "signs are no longer where they were"


def test_a_patch_says_a_word_where_the_picture_shows_its_board():
    for seed in range(12):
        scene, rng = make_scene(seed, "train"), random.Random(str(seed))
        signs, _ = draw_signs_of(scene, rng)
        signs = [replace(s, ink=(0.0, 1.0, 0.0), board=(0.0, 0.0, 1.0)) for s in signs]
        picture = render_looks(*pack_scenes([scene]), [Look(signs=tuple(signs))])[0]
        pure = (picture[0] == 0) & ((picture[1] == 1) & (picture[2] == 0) | (picture[1] == 0) & (picture[2] == 1))
        said = patch_texts(Look(signs=tuple(signs))) != NO_TEXT
        assert (said[0] == said[1]).all()
        assert said[0].reshape(24, 24).tolist() == pure[7::14, 7::14].tolist()


def test_words_shown_are_those_of_the_signs():
    looks = [PLAIN, Look(signs=(Sign("tea", 10, 10, 3, BLACK, WHITE), Sign("exit", 10, 99, 3, BLACK, WHITE)))]
    shown = words_shown(looks)
    assert shown.shape == (2, 60) and not shown[0].any()
    assert {WORDS[i] for i in np.flatnonzero(shown[1])} == {"tea", "exit"}
    batch = PackedBatches("train", 24, LAGGING.slots, mix=LAGGING.mix)[0]
    assert (batch["cls"][:, -60:] == words_shown(batch["looks"])).all() and batch["cls"][:, -60:].any()


def test_the_loss_of_texts_is_over_patches_of_signs():
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, sum(N_TEXTS))
    features = torch.randn(3, 576, 8, generator=generator)
    texts = torch.full((3, 2, 576), NO_TEXT, dtype=torch.int8)
    texts[0, :, 5], texts[2, :, 70] = torch.tensor([3, 4]), torch.tensor([59, 25])
    logits = head(torch.nn.functional.layer_norm(features, (8,)))
    words, letters = logits[..., :60].log_softmax(-1), logits[..., 60:].log_softmax(-1)
    want = -(words[0, 5, 3] + letters[0, 5, 4] + words[2, 70, 59] + letters[2, 70, 25]) / 2
    torch.testing.assert_close(text_loss(head, features, texts), want)
    assert text_loss(head, features, torch.full_like(texts, NO_TEXT)).item() == 0


def test_the_loss_of_texts_reaches_what_the_language_model_reads_and_no_further():
    keep = trainer_module._Run(replace(TINY, kind_weights=(0.0,) * len(KINDS), cls_weight=0.0), CPU, lambda _: None, None)
    data = PackedBatches("train", 8, TINY.slots, mix=TINY.mix)
    keep.make_forward(False, data.layout.lengths, {}, "masked")
    loss, parts = keep.losses(to_device(data[0], CPU))
    assert parts[2] > 0 and loss.item() == pytest.approx(0.25 * parts[2].item(), rel=1e-5)
    loss.backward()
    layers = keep.model.model.vision_tower.encoder.layers
    assert layers[0].mlp.fc1.weight.grad.abs().max() > 0  # two layers: the last one's output is for CLS alone
    assert not any(p.grad is not None and p.grad.any() for p in layers[1].parameters())
    assert not any(p.grad is not None and p.grad.any() for p in keep.model.model.language_model.parameters())


# --------------------------------------------------------------------------------------------------- gathered labels


def test_labelled_positions_are_all_of_them_and_filled_up():
    batch = PackedBatches("train", 5, TINY.slots, mix=TINY.mix)[1]
    found, flat = labelled(batch["labels"], batch["kind"]), batch["labels"].ravel()
    n = int((flat >= 0).sum())
    assert len(found["at"]) % LABELLED == 0 and 0 <= len(found["at"]) - n < LABELLED
    assert (found["at"][:n] == np.flatnonzero(flat >= 0)).all() and (found["at"][n:] == 0).all()
    assert (found["at_labels"][:n] == flat[flat >= 0]).all() and (found["at_labels"][n:] == -100).all()
    assert (found["at_kind"][:n] == batch["kind"].ravel()[flat >= 0]).all() and (found["at_kind"][n:] == -1).all()


def test_the_loss_of_gathered_positions_is_that_of_all_with_its_gradients():
    model = build_model("tiny", seed=5)
    batch = to_device(PackedBatches("train", 3, TINY.slots, mix=TINY.mix)[0], CPU)
    forward = PackedForward(model, torch.tensor(prefix_ids()), layout(TINY.slots).lengths, torch.float32)
    found = []
    for gathered in (False, True):
        h, _, _ = forward.hidden(batch["pixel_values"], batch["ids"])
        if gathered:
            logits = forward.logits(h.flatten(0, 1).index_select(0, batch["at"]))
            loss, means = response_loss(logits, batch["at_labels"], batch["at_kind"], TINY.kind_weights)
        else:
            loss, means = response_loss(forward.logits(h), batch["labels"], batch["kind"], TINY.kind_weights)
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        found.append((loss, means, grads))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    for a, b in zip(found[0][2], found[1][2], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- scaffolds, mixes


def test_a_relation_is_true_of_the_picture():
    """Those between two shapes that are there once, whose truth the test works out by itself."""
    pattern = re.compile(r"Is the (\w+) (?:to the )?(left|right|above|below)(?: of)? the (\w+)\?")
    checked, kinds = 0, set()
    for seed in range(700):
        scene = make_scene(seed, "train")
        asked = scaffolds.relation(scene, random.Random(str(seed)))
        if asked is None:
            continue
        kinds.add(asked[0].split()[0])
        match = pattern.match(asked[0])
        if not match:
            continue
        shapes = {o.shape: o for o in scene.objects if [p.shape for p in scene.objects].count(o.shape) == 1}
        one, side, two = match.groups()
        if one not in shapes or two not in shapes:
            continue
        a, b = shapes[one], shapes[two]
        ahead = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[side]
        assert abs(ahead) >= MIN_OFFSET and asked[1] == ("yes" if ahead > 0 else "no")
        checked += 1
    assert checked > 40 and {"Is", "Seen", "Which"} <= kinds


def test_free_and_told_prompts_say_the_right_option():
    frees = 0
    for seed in range(60):
        scene = make_scene(seed, "train")
        for name in ("mmbench", "scienceqa"):
            for e in examples(name, scene):
                right = next(line[3:] for line in e.prompt.split("\n") if line.startswith(f"{e.answer}. "))
                asked = scaffolds.free(e)
                assert (asked is None) == ("of these" in e.prompt)
                if asked:
                    frees += 1
                    assert asked[1] == right and "A. " not in asked[0] and asked[0].split("\n")[0] == e.prompt.split("\n")[0]
                if name == "mmbench":
                    prompt, letter = scaffolds.told(e)
                    assert prompt == f"Context: {right}.\n{e.prompt}" and letter == e.answer
    assert frees > 100


def test_every_word_of_a_scaffold_is_one_token_and_fits_a_slot():
    pieces = build_tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str
    longest = max(layout(LAGGING.slots).lengths)
    for seed in range(80):
        scene, rng = make_scene(seed, "train"), random.Random(str(seed))
        found = [scaffolds.relation(scene, rng)]
        for e in (*examples("mmbench", scene)[:1], *examples("scienceqa", scene)):
            found += [scaffolds.free(e), *([scaffolds.told(e)] if e.task == "mmbench" else [])]
        for prompt, said in filter(None, found):
            part, tail = answer_part("free", prompt, said), chat_prompt(prompt).split(IMAGE_TOKEN)[1]
            assert len(part.head) == len(pieces(tail)) and len(part.body) == len(pieces(f" {said}")) + 1
            assert len(part) <= longest


def test_the_lagging_mix_asks_more_of_what_lags_and_keeps_the_rest():
    def count(preset):
        where = layout(preset.slots)
        composed = [rows.compose(make_scene(s, "train"), where, preset.mix) for s in range(120)]
        kinds = [part.kind for row in composed for _, part in row.placed]
        return composed, {k: kinds.count(k) / 120 for k in KINDS}

    (_, broad), (composed, lagging) = count(PRESETS["broad"]), count(LAGGING)
    assert not any(broad[k] for k in SCAFFOLDS) and all(lagging.values())
    for kind in ("mmbench", "textvqa", "textvqa-ocr", *SCAFFOLDS):
        assert lagging[kind] > 1.1 * broad[kind], kind
    assert lagging["scienceqa"] > 0.9 * broad["scienceqa"] and lagging["narrative"] > 0.5 * broad["narrative"]
    pairs = 0
    for row in composed:  # two rotations of one question: the same options, another letter
        asked = [part for _, part in row.placed if part.kind == "mmbench"]
        if len(asked) == 2:
            assert sorted(asked[0].head) == sorted(asked[1].head) and asked[0].body != asked[1].body
            pairs += 1
    assert pairs > 60


def test_rows_of_the_broad_mix_are_what_they_were():
    scene = make_scene(11, "train")
    assert rows.compose(scene, layout()) == rows.compose(scene, layout(), Mix())
    assert rows.compose(scene, layout()) != rows.compose(scene, layout(LAGGING.slots), LAGGING.mix)


# ----------------------------------------------------------------------------------------------------- kernels, plan


class Forward:
    def __init__(self, kind, fails=()):
        self.kind, self.fails, self.compiled = kind, fails, False

    def compile(self):
        if "compile" in self.fails:
            raise RuntimeError("no compiler here")
        self.compiled = True


def _try(attention, fails, compile=True):
    said = []

    def work(forward):
        if "work" in forward.fails:
            raise RuntimeError("no backward here")

    forward, compiled = fast_forward(lambda k: Forward(k, fails.get(k, ())), attention, compile, work, said.append)
    assert forward.compiled == compiled
    return forward.kind, compiled, said


@pytest.mark.parametrize("step", ["compile", "work"])
def test_a_way_that_fails_gives_way_before_training(step):
    kind, compiled, said = _try("flex", {"flex": (step,)})
    assert (kind, compiled) == ("masked", True) and any("flex" in line and "here" in line for line in said)
    kind, compiled, said = _try("flex", {"flex": (step,), "masked": (step,)})
    assert (kind, compiled) == ("masked", False) and any("eager" in line for line in said)
    assert _try("auto", {"masked": (step,)})[:2] == ("flex", True)
    assert _try("flex", {})[:2] == ("flex", True) and _try("masked", {})[:2] == ("masked", True)
    assert _try("auto", {}, compile=False)[:2] == ("masked", False)
    with pytest.raises(InputError, match="auto"):
        _try("fast", {})


def test_a_way_that_cannot_be_built_or_timed_gives_way():
    def build(kind):
        if kind == "flex":
            raise RuntimeError("no block mask")
        return Forward(kind)

    said = []
    forward, compiled = fast_forward(build, "auto", True, lambda _: None, said.append)
    assert (forward.kind, compiled) == ("masked", True) and any("no block mask" in line for line in said)


def test_auto_takes_the_faster_way(monkeypatch):
    for slow in ("masked", "flex"):
        monkeypatch.setattr(fast_forward_module, "_seconds", lambda work, f, slow=slow: 2.0 if f.kind == slow else 1.0)
        kind, _, said = _try("auto", {})
        assert kind != slow and any("2000 ms" in line for line in said)


def test_a_trial_that_fails_half_way_leaves_no_gradients(monkeypatch):
    keep = trainer_module._Run(TINY, CPU, lambda _: None, None)
    data = PackedBatches("train", 2, TINY.slots, mix=TINY.mix)
    monkeypatch.setattr(PackedForward, "compile", lambda self: None)
    monkeypatch.setattr(PackedForward, "__call__", lambda *_: 1 / 0)  # validation's pass, behind the backward one
    keep.make_forward(True, data.layout.lengths, to_device(data[0], CPU), "masked")
    assert not keep.compiled and all(p.grad is None for p in keep.parameters)


def test_a_plan_is_made_anew_when_things_have_settled():
    plan = Plan(None, 600.0, 0, lambda _: None)
    assert [s for s in range(300) if plan.starts(s)] == [10, 130]
    assert [(s, plan.timed_steps) for s in range(300) if plan.ends(s)] == [(40, 30), (190, 60)]
    plan.measured(40, now=20.0, ms=100.0)
    first = plan.steps
    plan.watch(100, now=30.0, ms=300.0)
    assert plan.steps == first, "a slow beginning changes nothing before the second window"
    plan.measured(190, now=50.0, ms=220.0)
    assert plan.steps == (190 + int(550 * 0.965 / 0.22)) // 100 * 100 < first
    plan.measured(190, now=50.0, ms=80.0)
    assert plan.steps > first, "it may grow, too"
    resumed = Plan(None, 600.0, 500, lambda _: None)
    resumed.resume(2600)
    assert resumed.steps == 2600 and not any(resumed.starts(s) or resumed.ends(s) for s in range(500, 800))
    fixed = Plan(70, None, 0, lambda _: None)
    assert not any(fixed.starts(s) or fixed.ends(s) for s in range(300))


# ------------------------------------------------------------------------------------------------- the whole chain


def test_a_second_leg_tells_of_all_before_it_and_sees_no_picture_twice(tmp_path, monkeypatch):
    asked, stock = [], trainer_module.PackedBatches

    def recording(*arguments, **options):
        if arguments[0] == "train":
            asked.append(options["first"])
        return stock(*arguments, **options)

    monkeypatch.setattr(trainer_module, "PackedBatches", recording)
    folders = [tmp_path / name for name in ("captions", "tasks", "lagging")]
    common = "--size tiny --device cpu --eval-n 1"
    runs = (
        f"--steps 2 --batch 3 --out {folders[0]}",
        f"--steps 3 --batch 2 --from {folders[0]} --out {folders[1]}",
        f"--steps 2 --batch 2 --from {folders[1]} --mix lagging --out {folders[2]}",
    )
    for arguments in runs:
        assert main(f"{common} {arguments}".split()) == 0
    assert asked == [0, 6, 12]
    numbers = json.loads((folders[2] / "metrics.json").read_text())
    start = numbers["recipe"]["start"]
    assert (start["name"], start["steps"], start["pictures"]) == ("tasks", 5, 12)
    first, second = start["legs"]
    assert (first["steps"], first["pictures"]) == (2, 6) and (second["steps"], second["pictures"], second["first"]) == (3, 6, 6)
    shas = [starting.described(folder)["sha256"] for folder in folders]
    assert [first["sha256"], second["sha256"]] == shas[:2] and start["sha256"] == shas[1]
    assert starting.described(folders[2])["legs"][-1] == {"steps": 2, "pictures": 4, "first": 12, "sha256": shas[2]}
    assert Mix(**{k: tuple(v) if isinstance(v, list) else v for k, v in numbers["recipe"]["mix"].items()}) == LAGGING.mix
    assert numbers["recipe"]["kind_weights"] == list(LAGGING.kind_weights) and numbers["recipe"]["text_weight"] == 0.25
    text = (folders[2] / "README.md").read_text()
    assert text == card(numbers) and "7 steps in all" in text and "scene seeds from 12 on" in text
    assert "2 steps, 6 pictures" in text and "3 steps, 6 pictures from scene 6 on" in text
    assert "38% with signs" in text and "relation questions of all tasks" in text and "60% of the time" in text


def test_a_tower_learns_to_read_patches_from_its_own_loss():
    """Letters of a few fixed pictures, by heart: that targets lie where the pixels are is tested above."""
    recipe = replace(TINY, batch=4, lr=3e-3, kind_weights=(0.0,) * len(KINDS), cls_weight=0.0, slots=("task:26",))
    keep = trainer_module._Run(replace(recipe, mix=replace(LAGGING.mix, bad=0.0, signed=1.0)), CPU, lambda _: None, None)
    data = PackedBatches("train", 4, recipe.slots, mix=keep.recipe.mix)
    keep.make_forward(False, data.layout.lengths, {}, "masked")
    batch = to_device(data[0], CPU)
    losses = [keep.update(batch, 25)[2].item() for _ in range(25)]
    assert losses[0] > 6.5 and losses[-1] < 0.8 * losses[0]
