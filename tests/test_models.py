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
    twice = {"input_ids": torch.cat((batch["input_ids"][:1],) * 2, 1), "pixel_values": batch["pixel_values"][:2]}
    with pytest.raises(InputError, match="several pictures"):
        generate(model, twice, None, 2)
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
