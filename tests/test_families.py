"""Every family on a tiny random model: our loop == stock, batches == alone, counts == counted, several pictures a prompt."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dyrate_lib import VTW, DyRate, FastV, InputError, NoReduction, RandomPrune, attention_shares, generate, model_info
from dyrate_lib.layout import content_key, gather_columns, image_columns, picture_numbers, picture_owners
from dyrate_lib.masks import IMG
from dyrate_lib.methods import ST3, PyramidDrop, SparseVLM
from dyrate_lib.models import Adapter, families
from tests.test_generation import lively_predictor
from tests.tiny_families import FAMILIES, IMAGE, NEXT_SHAPES, QWEN_GRIDS, model_of, stock_inputs

METHODS = {
    "fastv": FastV(2, 0.5),
    "fastv-3": FastV(3, 0.8),
    "vtw": VTW(3),
    "random": RandomPrune(2, 0.6),
    "dyrate": DyRate(lively_predictor(), 3),
    "dyrate-step": DyRate(lively_predictor(), 2, rank="step"),
    "sparsevlm": SparseVLM(layers=(1, 2, 3), counts=(6, 4, 2)),
    "pyramiddrop": PyramidDrop(layers=(2, 3, 4)),
    "st3": ST3(),
}
# seeds of a prompt's pictures and the words after them: one, two, none, one again; unequal lengths throughout
ROWS = (((0,), 6), ((1, 2), 9), ((), 12), ((3,), 3))
STEPS = 6

by_family = pytest.mark.parametrize("name", FAMILIES)
by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def stock(name, inputs, **options):
    model = model_of(name)
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**stock_inputs(name, inputs), **settings)


@by_family
def test_unpruned_is_the_stock_model(name):
    model, inputs = model_of(name), FAMILIES[name].inputs(ROWS)
    theirs = stock(name, inputs, output_logits=True, return_dict_in_generate=True)
    ours = generate(model, inputs, None, STEPS, eos_token_id=[], return_logits=True)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert (ours.logits - torch.stack(theirs.logits, 1)).abs().max() < 1e-4
    assert ours.sequences[:, -STEPS:].unique().numel() > 4  # a model that repeats one token would show little


@by_family
@by_method
def test_our_loop_equals_stock_under_the_context(name, method):
    model, inputs = model_of(name), FAMILIES[name].inputs(ROWS)
    before = stock(name, inputs)
    with method(model) as pruning:
        theirs = stock(name, inputs)
    ours = generate(model, inputs, method, STEPS, eos_token_id=[])
    assert torch.equal(ours.sequences, theirs)
    assert torch.equal(torch.stack(pruning.kept, 1), ours.trace.kept)
    assert (ours.trace.kept[:, 0] < ours.trace.n_image)[[0, 1, 3]].any()  # something was cut
    assert torch.equal(stock(name, inputs), before)  # and the model is as before


@by_family
@by_method
def test_a_batch_is_its_rows_alone(name, method):
    model, family = model_of(name), FAMILIES[name]
    together = generate(model, family.inputs(ROWS), method, STEPS, eos_token_id=[], return_logits=True)
    for row, spec in enumerate(ROWS):
        inputs = family.inputs([(spec[0], spec[1])])
        # the words of a row depend on its number in the batch
        words = family.inputs(ROWS)["input_ids"][row, -spec[1] :]
        inputs["input_ids"][0, -spec[1] :] = words
        alone = generate(model, inputs, method, STEPS, eos_token_id=[], return_logits=True)
        assert torch.equal(alone.new_tokens[0], together.new_tokens[row])
        assert (alone.logits[0] - together.logits[row]).abs().max() < 1e-4
        assert torch.equal(alone.trace.kept[0], together.trace.kept[row])
        assert alone.sample_flops(0) == together.sample_flops(row)
        if not spec[0]:
            assert int(alone.trace.n_image[0]) == 0


@by_family
def test_keeping_all_is_the_unpruned_model(name):
    model, inputs = model_of(name), FAMILIES[name].inputs(ROWS)
    for beams in (1, 2):
        with NoReduction()(model):  # the context also sees to it that beams get their own pictures (see the test below)
            plain = stock(name, inputs, num_beams=beams)
        with FastV(2, 0.0)(model):
            assert torch.equal(stock(name, inputs, num_beams=beams), plain)
    assert torch.equal(generate(model, inputs, FastV(2, 0.0), STEPS, eos_token_id=[]).sequences, stock(name, inputs))


@by_family
def test_flops_are_those_that_torch_counts(name):
    """Each part within 1 %: tower, projector, prefill of the language model, one decode step, head."""
    model, family = model_of(name), FAMILIES[name]
    inputs = family.inputs([((0, 1), 8)])
    adapter = Adapter(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as encoder:
        adapter.picture_features(inputs, torch.float32)
    ours = generate(model, inputs, FastV(2, 0.5), 1, eos_token_id=[]).flops("cached")
    assert ours.by_part["vision"] + ours.by_part["projector"] == pytest.approx(encoder.get_total_flops(), rel=0.01)
    for method in (NoReduction(), FastV(2, 0.5), VTW(3)):
        out = generate(model, inputs, method, 4, eos_token_id=[])
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as whole:
            generate(model, inputs, method, 4, eos_token_id=[])
        counted = out.flops("cached")
        # the feature row that the method reads is its own cost: one query over all keys a step
        own = 4 * 2 * adapter.n_heads * model_info(model).head_dim * int(out.trace.prompt_length[0] + 2)
        assert whole.get_total_flops() - own == pytest.approx(float(counted), rel=0.01)
        assert float(counted) == sum(counted.by_part.values())
    one = generate(model, family.inputs([((0,), 8)]), None, 1).flops("cached").by_part["vision"]
    other = generate(model, family.inputs([((1,), 8)]), None, 1).flops("cached").by_part["vision"]
    assert ours.by_part["vision"] == one + other > one


@by_family
def test_where_the_pictures_are(name):
    family = FAMILIES[name]
    inputs = family.inputs(ROWS)
    prompt = Adapter(model_of(name)).embed(inputs)
    sizes = [[family.picture(seed).tokens for seed in seeds] for seeds, _ in ROWS]
    assert prompt.n_image.tolist() == [sum(row) for row in sizes]
    assert torch.equal(prompt.types == IMG, inputs["input_ids"] == IMAGE)
    assert ((prompt.picture_index >= 0) == (prompt.image_index >= 0)).all()
    if name in ("idefics3", "smolvlm"):  # what counts as a picture is a tile of four tokens
        sizes = [[4] * (sum(row) // 4) for row in sizes]
    for row, expected in enumerate(sizes):
        counts = [int((prompt.picture_index[row] == k).sum()) for k in range(len(expected))]
        assert counts == expected
    assert (prompt.vision_flops[2] == 0).all() and (prompt.vision_flops[[0, 1, 3]] > 0).all()


@by_family
def test_the_content_key_knows_pictures_and_their_order(name):
    adapter, family = Adapter(model_of(name)), FAMILIES[name]
    seeds = [(0, 4), (4, 0), (0, 8), (0, 4)] if name != "idefics3" else [(0, 6), (6, 0), (0, 3), (0, 6)]
    if name == "smolvlm":
        seeds = [(0, 6), (6, 0), (0, 3), (0, 6)]  # seeds of equal size, so that only the pixels differ
    keys = [int(adapter.embed(family.inputs([(row, 5)])).content_key[0]) for row in seeds]
    assert len(set(keys[:3])) == 3 and keys[3] == keys[0]
    both = adapter.embed(family.inputs([((0,), 5), (seeds[0], 5)])).content_key
    assert int(both[0]) == int(adapter.embed(family.inputs([((0,), 5)])).content_key[0])


def test_the_key_of_one_picture_is_what_it_was():
    """Records hold draws made from it: one picture a prompt must keep its number."""
    ids = torch.tensor([[0, 5, 9, 9, 6], [5, 6, 9, 9, 7]])
    types = torch.tensor([[-1, 0, 1, 1, 2], [0, 0, 1, 1, 2]])
    pixels = torch.arange(24, dtype=torch.float32).view(2, 3, 2, 2) / 10
    assert content_key(ids, types, pixels, [0, 1]).tolist() == content_key(ids, types, list(pixels), [0, 1]).tolist()
    flat = (pixels * 997).round().long().flatten(1)
    real = (types != -1).long()
    by_hand = (ids * real * (real.cumsum(-1) * real * 2654435761 % 1000003)).sum(-1) + (flat * torch.arange(1, 13)).sum(
        -1
    )
    assert content_key(ids, types, pixels, [0, 1]).tolist() == (by_hand % (2**31 - 1)).tolist()


def test_next_counts_what_transformers_packs():
    model, family = model_of("llava-next"), FAMILIES["llava-next"]
    adapter = Adapter(model)
    inputs = family.inputs([((0, 1, 2, 3), 4)])
    features = adapter.picture_features(inputs, torch.float32)
    assert adapter.picture_sizes(inputs) == [len(feature) for feature in features]
    assert adapter.picture_sizes(inputs) == [9 + rows * (columns + 1) for *_, rows, columns in NEXT_SHAPES]
    crops = [shape[2] for shape in NEXT_SHAPES]
    listed = {**inputs, "pixel_values": torch.cat([p[:n] for p, n in zip(inputs["pixel_values"], crops, strict=True)])}
    same, other = adapter.embed(inputs), adapter.embed(listed)  # one crop after another, as older processors gave them
    assert torch.equal(same.embeds, other.embeds) and torch.equal(same.content_key, other.content_key)


def test_next_at_its_published_size_has_up_to_2880_tokens():
    """LLaVA-NeXT's own tower and grids, counted without building it: 576 and four crops of 576, newlines on top."""
    adapter = copy.copy(Adapter(model_of("llava-next")))
    adapter.config = copy.deepcopy(adapter.config)
    adapter.config.vision_config.image_size = 336
    adapter.config.image_grid_pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    sizes = adapter.picture_sizes({"image_sizes": torch.tensor([[672, 672], [480, 640], [336, 1008]])})
    assert sizes == [2880 + 48, 576 + 36 * 49, 576 + 24 * 73]


def test_qwen_positions_are_those_of_stock():
    model, family = model_of("qwen2.5-vl"), FAMILIES["qwen2.5-vl"]
    inputs = stock_inputs("qwen2.5-vl", family.inputs(ROWS))
    wanted, deltas = model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )  # fmt: skip
    prompt = Adapter(model).embed(family.inputs(ROWS))
    assert prompt.position_ids.shape == (4, inputs["input_ids"].shape[1], 3)
    assert torch.equal(prompt.position_ids.permute(2, 0, 1), wanted)
    assert torch.equal(prompt.last_position[:, 0, 0] + 1, prompt.length + deltas[:, 0])
    first = prompt.position_ids[0][prompt.types[0] == IMG]  # 16 tokens of a 4 x 4 grid, in raster order
    height, width = QWEN_GRIDS[0][1] // 2, QWEN_GRIDS[0][2] // 2
    assert (first[:, 1] - first[0, 1]).tolist() == [row for row in range(height) for _ in range(width)]
    assert (first[:, 2] - first[0, 2]).tolist() == list(range(width)) * height
    picked = gather_columns(prompt.position_ids, torch.tensor([[3, 1]] * 4))
    assert torch.equal(picked[:, 0], prompt.position_ids[:, 3]) and picked.shape == (4, 2, 3)


def test_qwen_takes_positions_without_axes_too():
    adapter = Adapter(model_of("qwen2.5-vl"))
    like = torch.zeros(1)
    flat = torch.arange(5)[None]
    a, b = adapter.rotary(flat, like), adapter.rotary(flat[..., None].expand(1, 5, 3), like)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[0].shape == (1, 5, 16)


@by_family
def test_attention_shares_sum_to_one(name):
    model, inputs = model_of(name), FAMILIES[name].inputs(ROWS)
    out = generate(model, inputs, NoReduction(), 4, eos_token_id=[])
    shares = attention_shares(model, inputs, out.new_tokens)
    assert torch.allclose(shares.sum(-1), torch.ones(()), atol=1e-5)
    assert (shares[:, 1] - out.trace.attention).abs().max() < 1e-4
    assert float(shares[0, :, :, :, 1].mean()) > 0.02 and float(shares[2, ..., 1].abs().max()) == 0


@by_family
def test_what_does_not_fit_is_refused_before_any_work(name, monkeypatch):
    model, family = model_of(name), FAMILIES[name]
    inputs = family.inputs([((0, 1), 5)])
    without = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    monkeypatch.setattr(Adapter(model).core, "get_image_features", _never)
    with pytest.raises(InputError, match="0 picture.* need 0 image tokens"):
        generate(model, without, FastV(2, 0.5), 2)
    words = {**inputs, "input_ids": torch.where(inputs["input_ids"] == IMAGE, 20, inputs["input_ids"])}
    with pytest.raises(InputError, match="the prompts hold 0"):
        generate(model, words, None, 2)
    moved = {key: torch.cat((value, value)) for key, value in without.items()}
    moved["input_ids"][0, inputs["input_ids"][0] == IMAGE] = torch.tensor(20)
    columns = image_columns((inputs["input_ids"] == IMAGE).long() * IMG)[0]
    moved["input_ids"][0, columns[:-1]] = IMAGE
    moved["input_ids"][1, columns[1:]] = 20
    with pytest.raises(InputError, match="whole number of its pictures|runs of image tokens"):
        generate(model, {**inputs, **moved}, None, 2)
    missing = [key for key in Adapter(model).needed if key != "pixel_values"]
    for key in missing:
        with pytest.raises(InputError, match=f"{key} is missing"):
            generate(model, {k: v for k, v in inputs.items() if k != key}, None, 2)


def _never(*args, **kwargs):
    raise AssertionError("the vision tower ran")


def test_inputs_of_another_shape_are_refused():
    inputs = FAMILIES["llava-next"].inputs([((0,), 5)])
    with pytest.raises(InputError, match="crops"):
        generate(model_of("llava-next"), {**inputs, "pixel_values": inputs["pixel_values"][:, :3]}, None, 2)
    inputs = FAMILIES["qwen2.5-vl"].inputs([((0,), 5)])
    with pytest.raises(InputError, match="patches"):
        generate(model_of("qwen2.5-vl"), {**inputs, "pixel_values": inputs["pixel_values"][1:]}, None, 2)
    with pytest.raises(InputError, match="Videos"):
        generate(model_of("qwen2.5-vl"), {**inputs, "pixel_values_videos": inputs["pixel_values"]}, None, 2)
    two = FAMILIES["qwen2.5-vl"].inputs([((2, 2), 5)])
    ids = two["input_ids"][0].tolist()
    middle = ids.index(IMAGE) + 6
    joined = [token for token in ids if token != IMAGE]
    joined = torch.tensor([joined[: middle - 6] + [IMAGE] * 12 + joined[middle - 6 :]])
    with pytest.raises(InputError, match="2 pictures stand in 1 runs"):
        generate(model_of("qwen2.5-vl"), {**two, "input_ids": joined}, None, 2)
    inputs = FAMILIES["idefics3"].inputs([((0,), 5)])
    with pytest.raises(InputError, match=r"\[batch, tiles, 3, height, width\]"):
        generate(model_of("idefics3"), {**inputs, "pixel_values": inputs["pixel_values"][0]}, None, 2)


def test_other_families_and_decoders_are_named():
    from transformers import (
        CLIPVisionConfig,
        Gemma2Config,
        GPT2Config,
        GPT2LMHeadModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
    )

    gpt = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10))
    with pytest.raises(InputError, match="GPT2LMHeadModel is not supported.*LlavaNext.*Qwen2_5_VL.*Idefics3.*SmolVLM"):
        generate(gpt, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, None, 1)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=28
    )
    small = {
        "vocab_size": 30,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    gemma = Gemma2Config(**small, num_key_value_heads=1, head_dim=8)
    with pytest.raises(InputError, match="gemma2.*llama, mistral, qwen2"):
        Adapter(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=gemma)))
    sliding = MistralConfig(**small, num_key_value_heads=1, sliding_window=4)
    with pytest.raises(InputError, match="sliding window"):
        Adapter(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=sliding)))


def test_adding_a_family_is_one_subclass(monkeypatch):
    """As CONTRIBUTING says: a class that names the model classes, in the list, and everything works with it."""
    from transformers import LlavaForConditionalGeneration

    from dyrate_lib import families as module

    class Renamed(LlavaForConditionalGeneration):
        pass

    class RenamedAdapter(Adapter):
        classes = ("Renamed",)
        model_types = ("renamed",)

    model = Renamed(model_of("llava").config)
    model.load_state_dict(model_of("llava").state_dict())
    with pytest.raises(InputError, match="Renamed is not supported"):
        Adapter(model)
    monkeypatch.setattr(module, "FAMILIES", (*module.FAMILIES, RenamedAdapter))
    assert RenamedAdapter in families() and type(Adapter(model)) is RenamedAdapter
    inputs = FAMILIES["llava"].inputs(ROWS)
    out = generate(model.eval(), inputs, FastV(2, 0.5), STEPS, eos_token_id=[])
    assert torch.equal(
        out.sequences, generate(model_of("llava"), inputs, FastV(2, 0.5), STEPS, eos_token_id=[]).sequences
    )


def test_owners_and_numbers():
    assert picture_owners([5, 0, 7], [2, 3, 7]) == [0, 0, 2]
    with pytest.raises(InputError, match="3 picture.* need 12 image tokens, the prompts hold 11"):
        picture_owners([4, 7], [2, 3, 7])
    with pytest.raises(InputError, match="Prompt 0"):
        picture_owners([4, 8], [2, 3, 7])
    columns = torch.tensor([[3, 4, 6, 7, 8], [2, 3, -1, -1, -1]])
    assert picture_numbers([0, 0, 1], [2, 3, 2], columns).tolist() == [[0, 0, 1, 1, 1], [0, 0, -1, -1, -1]]


@by_family
def test_pictures_of_a_prompt_are_ranked_together(name):
    """One budget for all pictures of a prompt: the kept tokens are the best of all, not a share of each."""
    model, inputs = model_of(name), FAMILIES[name].inputs([((1, 2), 6)])
    out = generate(model, inputs, FastV(2, 0.5), 1, eos_token_id=[])
    n = int(out.trace.n_image[0])
    assert int(out.trace.kept[0, 0]) == round(n * 0.5)
    prompt = Adapter(model).embed(inputs)
    kept = out.trace.kept_at(0, 0)
    shares = [int((prompt.picture_index[0, kept] == k).sum()) for k in range(int(prompt.picture_index.max()) + 1)]
    assert sum(shares) == len(kept)


@by_family
def test_several_sequences_and_beams_with_two_pictures(name):
    """Rows are repeated by stock generate; the pictures of each must stay with it."""
    model, inputs = model_of(name), FAMILIES[name].inputs(ROWS)
    two = FAMILIES[name].inputs(ROWS[1:2])
    words = inputs["input_ids"][1, -9:]
    two["input_ids"][0, -9:] = words
    for method in (NoReduction(), FastV(2, 0.5)):
        with method(model):
            one = stock(name, inputs)
            many = stock(name, inputs, do_sample=True, top_k=1, num_return_sequences=2)
            beams = stock(name, inputs, num_beams=2)
            alone = stock(name, two, num_beams=2)
            greedy = stock(name, two)
        assert torch.equal(many[::2], one) and torch.equal(many[1::2], one)
        assert torch.equal(beams[1, -STEPS:], alone[0, -STEPS:])
        assert torch.equal(greedy[0, -STEPS:], one[1, -STEPS:])
