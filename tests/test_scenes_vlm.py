"""Tokenizer, processor, models, packed training rows, training, checkpoints, probe."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dyrate_lib import paths
from dyrate_lib.errors import DyRateError, InputError
from dyrate_lib.prompts import SYSTEM_PROMPT, chat_prompt
from dyrate_lib.scenes import FAMILIES, NEEDS, PROMPTS, annotated_reference, make_scene, questions, references, render
from dyrate_lib.scenes import trainer as trainer_module
from dyrate_lib.scenes.captions import N_REFERENCES
from dyrate_lib.scenes.checkpoint import export, ship, unship
from dyrate_lib.scenes.data import (
    CLS_GROUPS,
    DEFAULT_SLOTS,
    KINDS,
    N_CLS,
    QUESTION_SLOT,
    PackedBatches,
    cls_targets,
    instruction_ids,
    layout,
    normalise,
    prefix_ids,
    word_id,
)
from dyrate_lib.scenes.objective import Recipe, learning_rate, response_loss, to_device, token_accuracy
from dyrate_lib.scenes.probe import naming_rows, object_attention, patch_shares, summarise
from dyrate_lib.scenes.render import render_batch
from dyrate_lib.scenes.score import answer, bootstrap, card, questions_of, split_references
from dyrate_lib.scenes.tokenizer import MAX_RESPONSE, build_processor, build_tokenizer
from dyrate_lib.scenes.train import main
from dyrate_lib.scenes.trainer import train
from dyrate_lib.scenes.training_plan import Plan
from dyrate_lib.scenes.vlm import SIZES, PackedForward, build_model

CAPTION_SLOTS = ("short", "narrative", "late", "question", "question", "question", "question")
TINY = Recipe(size="tiny", batch=4, slots=("short",))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model():
    return build_model("tiny", seed=1).eval()


# ------------------------------------------------------------------------------------------ tokenizer and processor


def test_every_word_of_a_caption_is_one_token(tokenizer):
    for split in ("train", "test", "novel"):
        for seed in range(300, 400):
            scene = make_scene(seed, split)
            for family in FAMILIES:
                for i, text in enumerate(references(scene, family)):
                    ids = tokenizer(" " + text, add_special_tokens=False).input_ids
                    assert ids == [word_id(w) for w, _ in annotated_reference(scene, family, i)]
                    assert len(ids) < MAX_RESPONSE


def test_answers_are_one_token(tokenizer):
    for seed in range(400, 500):
        for q in questions(make_scene(seed, "novel")):
            assert tokenizer(" " + q.answer, add_special_tokens=False).input_ids == [word_id(q.answer)]


@pytest.mark.parametrize("text", ["What a naïve façade, isn't it? 10€ — 東京 \n\tok", "Zebras queue quietly.", "</div> A<b"])
def test_any_text_comes_back_from_the_tokenizer(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_vocabulary_is_small_and_the_system_prompt_short(tokenizer):
    assert 500 < len(tokenizer) <= 2000
    assert 25 <= len(tokenizer(SYSTEM_PROMPT).input_ids) <= 35
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, "<image>"]
    assert len({tokenizer.convert_tokens_to_ids(t) for t in special}) == 5


def test_the_processor_makes_576_image_tokens_and_survives_saving(processor, tmp_path):
    from transformers import AutoProcessor

    scene = make_scene(3, "test")
    processor.save_pretrained(tmp_path)
    for p in (processor, AutoProcessor.from_pretrained(tmp_path)):
        assert type(p).__name__ == "LlavaProcessor" and p.tokenizer.padding_side == "left"
        texts = [chat_prompt("Hi."), chat_prompt(PROMPTS["short"])]
        batch = p(images=[render(scene)] * 2, text=texts, padding=True, return_tensors="pt")
        image_id = p.tokenizer.convert_tokens_to_ids("<image>")
        assert (batch["input_ids"] == image_id).sum(1).tolist() == [576, 576]
        assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][1].all()
        assert batch["pixel_values"].shape == (2, 3, 336, 336)
        assert batch["input_ids"][1].tolist() == [*prefix_ids(), *instruction_ids(PROMPTS["short"])]


def test_training_sees_the_pixels_that_the_processor_makes(processor):
    scenes = [make_scene(s, "val") for s in range(3)]
    made = processor(images=[render(s) for s in scenes], text=[chat_prompt("x")] * 3, return_tensors="pt")["pixel_values"]
    assert (normalise(render_batch(scenes)) - made).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------ packed rows


def test_rows_hold_what_they_say():
    batches, where = PackedBatches("train", 6, CAPTION_SLOTS), layout(CAPTION_SLOTS)
    batch = batches[5]
    assert all(np.array_equal(batch[k], batches[5][k]) for k in batch)
    assert batch["ids"].shape == (6, where.total) and (len(prefix_ids()) + where.total) % 8 == 0
    tokenizer = build_tokenizer()
    for b in range(6):
        scene = make_scene(5 * 6 + b, "train")
        start = 0
        for kind, length in zip(where.kinds, where.lengths, strict=True):
            part = slice(start, start + length)
            labels, ids = batch["labels"][b, part], batch["ids"][b, part]
            said = labels[labels >= 0]
            if kind == "question" and not len(said):
                start += length
                continue
            assert said[-1] == tokenizer.eos_token_id
            at = np.flatnonzero(labels >= 0)
            assert (ids[at + 1] == said).all(), "a label is the next token"
            text = tokenizer.decode(said[:-1].tolist()).strip()
            kinds = set(batch["kind"][b, part][labels >= 0].tolist())
            assert kinds == {KINDS.index(kind)}
            if kind == "question":
                asked = tokenizer.decode(ids[: at[0] + 1].tolist())
                assert "single word or phrase. ASSISTANT:" in asked and len(text.split()) == 1
            else:
                i = references(scene, kind).index(text)
                needs = [NEEDS.index(n) for _, n in annotated_reference(scene, kind, i)]
                assert batch["need"][b, part][at][:-1].tolist() == needs
            start += length


def test_questions_fit_their_slot_and_rows_differ_in_wording():
    longest = max(
        len(instruction_ids(q.prompt)) + 2 for s in range(500) for q in questions(make_scene(s, "novel"), variant=s)
    )
    assert longest <= QUESTION_SLOT
    first = {tuple(row[:20]) for row in PackedBatches("train", 40, CAPTION_SLOTS)[0]["labels"][:, 13:33].tolist()}
    assert len(first) > 20


def test_cls_targets_are_the_truth():
    scene = make_scene(11, "test")
    target = dict(zip([n for n, _ in CLS_GROUPS], np.split(cls_targets(scene), np.cumsum([n for _, n in CLS_GROUPS])[:-1])))
    assert sum(n for _, n in CLS_GROUPS) == N_CLS
    assert target["shapes"].sum() == len({o.shape for o in scene.objects})
    assert target["pairs"].sum() == len({o.pair for o in scene.objects})
    assert target["count"].argmax() + 1 == len(scene.objects)
    assert target["ground"].sum() == target["tone"].sum() == 1


# ----------------------------------------------------------------------------------------------------------- models


def test_the_packed_pass_equals_the_model_used_alone(model):
    batch = to_device(PackedBatches("val", 2)[0], torch.device("cpu"))
    where = layout()
    forward = PackedForward(model, torch.tensor(prefix_ids()), where.lengths, torch.float32)
    with torch.no_grad():
        logits, cls = forward(batch["pixel_values"], batch["ids"])
        vision = model.model.vision_tower(batch["pixel_values"])
        assert (vision.pooler_output - cls).abs().max() < 1e-5
        start, front = 0, torch.tensor(prefix_ids()).expand(2, -1)
        for length in where.lengths:
            ids = torch.cat([front, batch["ids"][:, start : start + length]], dim=1)
            alone = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[:, len(prefix_ids()) :]
            assert (alone - logits[:, start : start + length]).abs().max() < 1e-5
            start += length


@pytest.mark.parametrize("size", ["small", "base"])
def test_shipped_sizes_are_deep_real_llavas(size):
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        built = build_model(size)
    assert isinstance(built, LlavaForConditionalGeneration)
    text, s = built.config.text_config, SIZES[size]
    assert 16 <= text.num_hidden_layers <= 24 and text.hidden_size // text.num_attention_heads == 32
    assert built.config.vision_feature_layer == -2 and built.config.vision_config.patch_size == 14
    assert built.config.image_seq_length == 576 and s.name == f"scenes-{size}"
    assert 2 * sum(p.numel() for p in built.parameters()) < 38e6


def test_unknown_sizes_are_refused():
    with pytest.raises(InputError, match="small"):
        build_model("huge")


def test_the_cls_loss_reaches_the_last_vision_layer_which_captions_do_not():
    model = build_model("tiny")
    batch = to_device(PackedBatches("train", 2, ("short",))[0], torch.device("cpu"))
    forward = PackedForward(model, torch.tensor(prefix_ids()), layout(("short",)).lengths, torch.float32)
    last = model.model.vision_tower.encoder.layers[-1].mlp.fc1.weight
    first = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    logits, cls = forward(batch["pixel_values"], batch["ids"])
    captions = torch.autograd.grad(logits.square().mean(), [last, first], retain_graph=True, allow_unused=True)
    assert captions[0] is None and captions[1].abs().max() > 0
    assert torch.autograd.grad(cls[:, 0].sum(), last)[0].abs().max() > 0


# --------------------------------------------------------------------------------------------------------- training


def test_twenty_steps_lower_the_loss():
    found = train(TINY, steps=20, device="cpu", log_every=1, say=lambda _: None)
    losses = [line["short"] for line in found.history]
    assert len(losses) == found.steps == 20
    assert losses[0] == pytest.approx(math.log(len(build_tokenizer())), rel=0.05)
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    assert not found.model.training


def test_the_learning_rate_warms_up_and_falls():
    recipe = Recipe(lr=1e-3, final_lr=1e-5, warmup=200)
    rates = [learning_rate(recipe, s, 1000) for s in range(1000)]
    assert rates[0] == pytest.approx(1e-5) and max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (99, 100) and rates[-1] < 1.1e-5
    assert all(a >= b for a, b in zip(rates[100:], rates[101:], strict=False))


def test_losses_are_means_within_each_kind():
    logits = torch.zeros(1, 4, 10)
    logits[0, 0, 3] = 50.0
    labels, kind = torch.tensor([[3, 1, 2, -100]]), torch.tensor([[0, 0, 3, -1]])
    total, means = response_loss(logits, labels, kind, (0.5, 0.1, 0.1, 0.3, *[1.0] * (len(KINDS) - 4)))
    assert means[:4].tolist() == pytest.approx([math.log(10) / 2, 0, 0, math.log(10)], abs=1e-4)
    assert not means[4:].any()
    assert float(total) == pytest.approx(0.5 * math.log(10) / 2 + 0.3 * math.log(10), rel=1e-4)


def test_token_accuracy_counts_by_kind_and_need(model):
    batch = to_device(PackedBatches("val", 3)[0], torch.device("cpu"))

    def oracle(pixels, ids):  # always right, except where the image is needed
        right = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), len(build_tokenizer())).float()
        wrong = (batch["need"] == NEEDS.index("image")) & (batch["kind"] < KINDS.index("question"))
        return right * ~wrong[..., None], None

    found = token_accuracy(oracle, [batch])
    assert found["need_image"] == 0 and found["need_response"] == found["need_none"] == found["answer"] == 1
    assert 0.5 < found["short"] < 0.6


def test_a_killed_run_resumes_where_it_was(tmp_path, monkeypatch):
    out = tmp_path / "scenes-tiny"
    recipe = replace(TINY, steps=6, batch=2)
    whole = train(recipe, device="cpu", log_every=1, say=lambda _: None)
    saved = trainer_module.Keeper.save

    def save_and_die(self, run, planned, final=False):
        saved(self, run, planned, final)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module.Keeper, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out=out, device="cpu", log_every=1, save_every=0.0, say=lambda _: None)
    assert (out / "config.json").is_file() and (out / "model.safetensors").is_file()
    monkeypatch.setattr(trainer_module.Keeper, "save", saved)
    said = []
    resumed = train(recipe, out=out, device="cpu", log_every=1, say=said.append)
    assert "resumed at step 1" in said
    assert [h["loss"] for h in resumed.history] == pytest.approx([h["loss"] for h in whole.history], abs=1e-5)
    with pytest.raises(InputError, match="another recipe"):
        train(replace(recipe, lr=1e-4), out=out, device="cpu", say=lambda _: None)


def test_a_compiler_that_fails_is_named_and_training_goes_on(monkeypatch):
    def broken(self):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(PackedForward, "compile", broken)
    said = []
    found = train(TINY, steps=2, batch=1, device="cpu", compile=True, say=said.append)
    assert any("no compiler here" in line for line in said)
    assert found.steps == 2 and not found.compiled


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch):
    monkeypatch.setattr(trainer_module, "cls_loss", lambda *a: torch.tensor(float("nan")))
    with pytest.raises(DyRateError, match="not finite"):
        train(TINY, steps=3, batch=1, device="cpu", log_every=1, say=lambda _: None)


def test_steps_or_a_deadline_are_needed():
    with pytest.raises(InputError, match="deadline"):
        train(TINY, device="cpu")


def test_a_plan_fills_the_time_and_only_ever_shrinks():
    plan = Plan(None, 1000.0, 0, lambda _: None)
    plan.measured(40, now=100.0, ms=100.0)
    assert plan.steps == 8700
    plan.watch(500, now=150.0, ms=90.0)
    assert plan.steps == 8700
    plan.watch(1000, now=200.0, ms=200.0)
    assert plan.steps == 4800
    fixed = Plan(50, 1.0, 0, lambda _: None)
    fixed.watch(20, now=5.0, ms=1e6)
    assert fixed.steps == 50 and fixed.done(50) and not fixed.done(49)


# ------------------------------------------------------------------------------- checkpoints, scores, command line


def test_checkpoints_load_anew_and_survive_transport(model, processor, tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    out = tmp_path / "a"
    export(model, processor, out, {"log.jsonl": "{}\n"})
    export(model, processor, out, {"log.jsonl": "{}\n"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    ship(out, tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["files.tar", "model.safetensors"]
    unship(tmp_path / "b", tmp_path / "c")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "c", dtype=torch.float32)
    assert AutoProcessor.from_pretrained(tmp_path / "c").patch_size == 14
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert (a.to(torch.bfloat16).float() - b).abs().max() == 0, name


def test_the_command_line_trains_scores_and_writes_a_card(tmp_path):
    out = tmp_path / "scenes-tiny"
    arguments = f"--size tiny --steps 2 --batch 2 --device cpu --eval-n 2 --out {out} --ship {tmp_path / 's'}"
    assert main(arguments.split()) == 0
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["recipe"]["steps"] == 2 and set(numbers["scores"]) >= {"short:test", "count:test", "short:novel"}
    text = (out / "README.md").read_text()
    assert "2 steps of 2 fresh pictures" in text and "| short:test | equals a reference |" in text
    assert len((out / "log.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "s" / "files.tar").is_file()


def test_answers_come_one_a_picture_in_order(model, processor):
    asked = questions_of("count", "test", 3)
    scenes = [make_scene(seed, "test") for seed, _ in asked]
    together = answer(model, processor, scenes, [q.prompt for _, q in asked], max_new_tokens=2)
    alone = [answer(model, processor, [s], [q.prompt], max_new_tokens=2)[0] for s, (_, q) in zip(scenes, asked, strict=True)]
    assert together == alone


def test_bootstrap_intervals_hold_the_mean_and_narrow():
    few, many = bootstrap([0, 1] * 10), bootstrap([0, 1] * 500)
    assert few["mean"] == many["mean"] == 0.5
    assert few["low"] < many["low"] < 0.5 < many["high"] < few["high"]


# ---------------------------------------------------------------------------------------------------- probe, report


def test_naming_rows_are_the_words_of_the_listed_objects():
    for seed in range(40):
        scene = make_scene(seed, "test")
        for family, i in (("short", 3), ("narrative", 0), ("late", 4)):
            words = [w for w, _ in annotated_reference(scene, family, i)]
            rows = naming_rows(scene, family, i)
            assert [[words[k] for k in r] for r in rows] == [
                [o.size, o.color, o.shape] for o in scene.salient(len(rows))
            ]
            assert len(rows) == min(len(scene.objects), 2 if family == "short" else 4)


def test_patch_shares_sum_to_the_visible_area():
    scene = make_scene(5, "test")
    shares = patch_shares(scene, 24)
    assert shares.shape == (len(scene.objects), 24, 24)
    assert 0 <= float(shares.min()) and float(shares.sum(0).max()) <= 1 + 1e-5


def test_object_attention_reads_the_right_rows_and_leaves_the_model_as_it_was(model, processor):
    scenes = [make_scene(s, "test") for s in (3, 4)]
    before = model.config._attn_implementation
    found = object_attention(model, processor, scenes, "short", 1)
    assert model.config._attn_implementation == before
    assert found.inside.shape == (len(found.words), 4, 2) and found.maps.shape[1:] == (4, 2, 24, 24)
    # A picture, prompt and reply by hand, through the model's own attention maps.
    scene = scenes[0]
    reply = [word_id(w) for w, _ in annotated_reference(scene, "short", 1)]
    ids = torch.tensor([[*prefix_ids(), *instruction_ids(PROMPTS["short"]), *reply]])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=normalise(render_batch([scene])), output_attentions=True)
    model.set_attn_implementation(before)
    said = naming_rows(scene, "short", 1)[0]
    start = len(prefix_ids()) + len(instruction_ids(PROMPTS["short"])) - 1
    rows = out.attentions[2][0, 1, [start + k for k in said]]
    columns = ids[0] == model.config.image_token_id
    assert np.allclose(found.maps[0, 2, 1].ravel(), rows[:, columns].mean(0).numpy(), atol=1e-6)
    assert found.image[0, 2, 1] == pytest.approx(float(rows[:, columns].sum(1).mean()), abs=1e-5)
    assert (found.inside >= 0).all() and (found.inside <= 1).all()
    kept = json.loads(json.dumps(summarise(found)))
    assert len(kept["enrichment"]) == 4 and len(kept["inside"]) == len(found.inside) // 2


def test_a_reply_is_compared_with_the_wordings_it_does_not_follow():
    texts = references(make_scene(1, "test"), "short")
    for i in range(N_REFERENCES):
        said = {"a": texts[i].replace("background", "ground")}
        followed, others = split_references(said, {"a": texts})
        assert followed == {"a": texts[i]} and others == {"a": [t for k, t in enumerate(texts) if k != i]}


# ------------------------------------------------------------------------------------------------- what is shipped

SHIPPED = ["scenes-small", "scenes-base"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_cards_agree_with_their_numbers(name):
    folder = paths.checkpoints() / name
    numbers = json.loads((folder / "metrics.json").read_text())
    assert (folder / "README.md").read_text() == card(numbers)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1] == numbers["last"] and log[-1]["step"] == numbers["recipe"]["steps"]
    short = numbers["cider"]["short:test"]
    assert short["cider"] >= 0.9 * short["one_reference"] and short["other_wordings"] >= 0.9 * short["followed"]
    recorded = {k: tuple(v) if isinstance(v, list) else v for k, v in numbers["recipe"].items()}
    assert Recipe(**recorded).slots in (CAPTION_SLOTS, DEFAULT_SLOTS)


def test_shipped_weights_are_small_enough_for_git():
    files = [p for name in SHIPPED for p in (paths.checkpoints() / name).glob("*.safetensors")]
    assert len(files) >= 5 and sum(p.stat().st_size for p in files) < 60e6 and max(p.stat().st_size for p in files) < 15e6


@pytest.mark.slow
def test_the_shipped_small_model_describes_held_out_pictures():
    from dyrate_lib import load_vlm

    model, processor = load_vlm("scenes-small", device="cpu")
    if json.loads((paths.checkpoints() / "scenes-small" / "metrics.json").read_text())["recipe"].get("start"):
        assert processor.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    scenes = [make_scene(s, "test") for s in range(6)]
    said = answer(model, processor, scenes, [PROMPTS["short"]] * 6, max_new_tokens=24)
    assert sum(t in references(s, "short") for t, s in zip(said, scenes, strict=True)) >= 4
