"""Loading models and preparing inputs: the real layout, bad input, missing things."""

from __future__ import annotations

import shutil

import pytest
import torch

from dyrate_lib import FastV, InputError, ResourceError, chat_prompt, generate, load_vlm, model_info, prepare_inputs
from dyrate_lib.masks import IMG, INS, PAD, SYS
from dyrate_lib.models import Adapter, token_types


def test_token_types_by_position():
    ids = torch.tensor([[0, 1, 5, 9, 9, 6, 7], [1, 5, 6, 9, 9, 7, 8], [0, 0, 0, 1, 5, 6, 7]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    assert token_types(ids, mask, 9).tolist() == [
        [PAD, SYS, SYS, IMG, IMG, INS, INS],
        [SYS, SYS, SYS, IMG, IMG, INS, INS],
        [PAD, PAD, PAD, INS, INS, INS, INS],
    ]


def test_a_saved_folder_in_the_hub_layout_loads_and_runs(tiny, tmp_path, batch):
    """save_pretrained's layout is that of llava-hf/llava-1.5-7b-hf: config, safetensors, tokenizer, processor."""
    model, processor = tiny
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    loaded, its_processor = load_vlm(tmp_path / "m", device="cpu")
    inputs = prepare_inputs(its_processor, [_grey()], [chat_prompt("Describe.")])
    want = prepare_inputs(processor, [_grey()], [chat_prompt("Describe.")])
    assert torch.equal(inputs["input_ids"], want["input_ids"]) and torch.equal(
        inputs["pixel_values"], want["pixel_values"]
    )
    out = generate(loaded, inputs, FastV(2, 0.5), 5, eos_token_id=[])
    assert torch.equal(out.sequences, generate(model, want, FastV(2, 0.5), 5, eos_token_id=[]).sequences)
    assert isinstance(out.text[0], str)


def test_exact_dimensions_of_the_random_models():
    """Counted on the meta device: the published parameter counts are 7.06 and 13.35 billion."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from dyrate_lib.loading import _LLAVA_DIMS

    for kind, billions in (("llava-1.5-7b", 7.063), ("llava-1.5-13b", 13.351)):
        vision = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
        text = LlamaConfig(vocab_size=32064, **_LLAVA_DIMS[kind])
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.002)
        assert model_info(model).n_image_tokens == 576


def _grey():
    from PIL import Image

    return Image.new("RGB", (50, 40), "grey")


@pytest.mark.parametrize("count", [0, 2])
def test_placeholders_must_match_pictures(tiny, count):
    prompt = "<image>\n" * count + "Describe."
    with pytest.raises(InputError, match="placeholder"):
        prepare_inputs(tiny[1], [_grey()], [prompt])


def test_bad_batches_are_refused(tiny, batch):
    model, processor = tiny
    with pytest.raises(InputError, match="No prompts"):
        prepare_inputs(processor, [], [])
    with pytest.raises(InputError, match="2 images for 1"):
        prepare_inputs(processor, [_grey(), _grey()], ["<image>"])
    with pytest.raises(InputError, match="more than the 20 allowed"):
        prepare_inputs(processor, [_grey()], [chat_prompt("Describe.")], max_length=20)
    right = {**batch, "attention_mask": batch["attention_mask"].flip(-1)}
    with pytest.raises(InputError, match="padding_side"):
        generate(model, right, None, 2)
    with pytest.raises(InputError, match="image tokens"):
        generate(model, {k: v for k, v in batch.items() if k != "pixel_values"}, None, 2)
    ids = batch["input_ids"][:1]
    cut = ids[:, : int((ids[0] == model.config.image_token_id).nonzero()[20])]
    straddling = {"input_ids": torch.cat((ids, cut), 1), "pixel_values": batch["pixel_values"][:2]}
    with pytest.raises(InputError, match="image tokens"):
        generate(model, straddling, None, 2)
    with pytest.raises(InputError, match="hides image tokens"):
        generate(
            model, {**batch, "attention_mask": (batch["input_ids"] != model.config.image_token_id).long()}, None, 2
        )
    long = torch.full((1, 5000), 7)
    with pytest.raises(InputError, match="context"):
        generate(model, {"input_ids": long}, None, 2)
    with pytest.raises(InputError, match="at least one token"):
        generate(model, {"input_ids": torch.zeros(1, 0, dtype=torch.long)}, None, 2)


def test_missing_things_are_named(tiny, tmp_path, monkeypatch):
    with pytest.raises(ResourceError, match="config.json is missing"):
        load_vlm(tmp_path)
    with pytest.raises(InputError, match="random:llava-9"):
        load_vlm("random:llava-9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match="GPU"):
        load_vlm("random:tiny", device="cuda")
    tiny[0].save_pretrained(tmp_path / "m")
    tiny[1].save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ResourceError, match="could not be loaded"):
        load_vlm(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="llama"):
        load_vlm(tmp_path / "m")


def test_a_hub_id_that_is_not_at_hand_is_named():
    with pytest.raises(ResourceError, match="nobody/nothing-here"):
        load_vlm("nobody/nothing-here")


def test_grouped_query_heads_are_supported(pictures, tiny):
    """A language model with fewer key heads than query heads: stock and ours agree."""
    import copy

    from transformers import LlavaForConditionalGeneration

    config = copy.deepcopy(tiny[0].config)
    config.text_config.num_key_value_heads = 2
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    inputs = prepare_inputs(tiny[1], pictures[:2], [chat_prompt("Describe."), chat_prompt("What is there to see?")])
    with FastV(2, 0.5)(model):
        stock = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    out = generate(model, inputs, FastV(2, 0.5), 5, eos_token_id=[])
    assert torch.equal(stock, out.sequences)
    assert Adapter(model).n_heads == 4


def test_attention_shares_of_every_layer(tiny, batch):
    from dyrate_lib import NoReduction, attention_shares

    out = generate(tiny[0], batch, NoReduction(), 5, eos_token_id=[])
    shares = attention_shares(tiny[0], batch, out.new_tokens)
    assert shares.shape == (4, 8, 5, 4, 4)
    assert (shares[:, 1] - out.trace.attention).abs().max() < 1e-5
    one = attention_shares(tiny[0], batch, out.new_tokens, layers=[6])
    assert torch.equal(one[:, 0], shares[:, 6])
    with pytest.raises(InputError, match="0..7"):
        attention_shares(tiny[0], batch, out.new_tokens, layers=[8])


def test_weights_that_cannot_fit_are_refused_before_allocation(monkeypatch):
    monkeypatch.setattr("dyrate_lib.loading.free_memory", lambda device: 20_000_000_000)
    with pytest.raises(ResourceError, match=r"28\.\d GB .*bfloat16"):
        load_vlm("random:llava-1.5-7b", device="cpu", dtype="float32")


def test_two_pictures_in_one_prompt(tiny, pictures):
    """Ours == stock, the batch == each row alone, and the two pictures count as two."""
    model, processor = tiny
    prompts = [chat_prompt("What has changed?", image=2), chat_prompt("Describe."), chat_prompt("Hello.", image=False)]
    rows = [pictures[:2], pictures[2], None]
    inputs = prepare_inputs(processor, rows, prompts)
    n = model_info(model).n_image_tokens
    for method in (None, FastV(2, 0.5)):
        out = generate(model, inputs, method, 5, eos_token_id=[], return_logits=True)
        assert out.trace.n_image.tolist() == [2 * n, n, 0]
        for row, (images, prompt) in enumerate(zip(rows, prompts, strict=True)):
            alone = generate(
                model, prepare_inputs(processor, [images], [prompt]), method, 5, eos_token_id=[], return_logits=True
            )
            assert torch.equal(alone.new_tokens[0], out.new_tokens[row])
            assert (alone.logits[0] - out.logits[row]).abs().max() < 1e-4
    with FastV(2, 0.5)(model):
        stock = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(stock, out.sequences)
    assert out.trace.kept[:, 0].tolist() == [n, n // 2, 0]  # half of both pictures' tokens, ranked together
    parts = [out.sample_flops(row).by_part for row in range(3)]
    assert parts[0]["vision"] == 2 * parts[1]["vision"] > 0 and parts[2]["vision"] == 0
    with pytest.raises(InputError, match="2 <image> placeholder.*1 picture"):
        prepare_inputs(processor, [pictures[0]], [chat_prompt("What has changed?", image=2)])


def test_next_loads_from_a_folder_with_its_processor(tmp_path, pictures):
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    from dyrate_lib.scenes.tokenizer import build_tokenizer
    from tests.tiny_families import FAMILIES

    tokenizer = build_tokenizer()
    config = FAMILIES["llava-next"].build().config
    config.image_token_id, config.text_config.vocab_size = tokenizer.convert_tokens_to_ids("<image>"), len(tokenizer)
    from transformers import LlavaNextForConditionalGeneration

    LlavaNextForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    image = LlavaNextImageProcessorPil(
        size={"shortest_edge": 42},
        crop_size={"height": 42, "width": 42},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    LlavaNextProcessor(
        image, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(tmp_path / "m")
    model, processor = load_vlm(tmp_path / "m", device="cpu")
    rows = [pictures[:2], None, pictures[2].crop((0, 0, 40, 90))]
    prompts = [chat_prompt("Compare.", image=2), chat_prompt("Hello.", image=False), chat_prompt("Describe.")]
    inputs = prepare_inputs(processor, rows, prompts)
    assert {"pixel_values", "image_sizes"} < set(inputs)
    out = generate(model, inputs, FastV(2, 0.5), 4, eos_token_id=[])
    with FastV(2, 0.5)(model):
        stock = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(out.sequences, stock) and len(out.text) == 3
    assert out.trace.n_image[1] == 0 < out.trace.n_image[2] < out.trace.n_image[0]


@pytest.mark.parametrize("name", ["qwen2.5-vl", "idefics3", "smolvlm"])
def test_other_families_load_by_their_model_type(name, tmp_path, monkeypatch):
    """Their processors need torchvision, which tests do without: the model is loaded, the processor stood in for."""
    import transformers

    from tests.tiny_families import FAMILIES, model_of

    model_of(name).save_pretrained(tmp_path / "m")

    def missing(source, **options):
        raise ImportError("requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)
    with pytest.raises(ResourceError, match="package that is not installed: requires the Torchvision"):
        load_vlm(tmp_path / "m", device="cpu")
    from dyrate_lib.scenes.tokenizer import build_processor

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda source, **options: build_processor())
    loaded, _ = load_vlm(tmp_path / "m", device="cpu")
    inputs = FAMILIES[name].inputs([((0, 1), 5)])
    again = generate(loaded, inputs, FastV(2, 0.5), 4, eos_token_id=[])
    assert torch.equal(again.sequences, generate(model_of(name), inputs, FastV(2, 0.5), 4, eos_token_id=[]).sequences)
