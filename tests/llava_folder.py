"""A tiny random checkpoint in the very layout of `llava-hf/llava-1.5-7b-hf`: files, tokens, chat template, vocabulary.

Only the sizes differ. The tokenizer is LLaMA's kind (BPE with byte fallback), trained here on a few sentences; the rest of its
32,000 places hold words that never occur.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

VOCABULARY, IMAGE, PAD = 32_064, 32_000, 32_001
TEXTS = [
    "A chat between a curious human and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "USER: Provide a one-sentence caption for the provided image. ASSISTANT: A man riding a wave on top of a surfboard.",
    "Answer the question using a single word or phrase. Is there a dog in the image? yes no red blue green two three",
    "Two dogs run on the grass. A red car stands on the street. A woman holds an umbrella in the rain.",
    "Answer with the option's letter from the given choices directly. A. B. C. D. There are several options:",
] * 4
# As in the published processor: pictures first, then text, no system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@functools.cache
def trained_vocabulary() -> str:
    """The trained tokenizer as JSON, its base vocabulary filled up to 32,000."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # of training only: no token crosses a space
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for filler in range(len(vocabulary), IMAGE):
        vocabulary[f"▁unused{filler}"] = filler
    state["pre_tokenizer"] = None
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special[:3]]
    return json.dumps(state)


def tokenizer() -> PreTrainedTokenizerFast:
    """LLaMA's kind of tokenizer with <image> = 32,000 and <pad> = 32,001."""
    made = Tokenizer.from_str(trained_vocabulary())
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    made.add_special_tokens([AddedToken("<image>", special=True), AddedToken("<pad>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def write_llava(folder: Path, *, layers: int = 4, hidden: int = 32, size: int = 84, seed: int = 0) -> Path:
    """Save model and processor; (size / 14)^2 image tokens. The folder."""
    words = tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer=words, patch_size=14, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=size, patch_size=14,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=IMAGE, pad_token_id=PAD, image_seq_length=(size // 14) ** 2, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():  # as large as in a trained model, so that replies differ
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 1, 2
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder, max_shard_size="5MB")
    processor.save_pretrained(folder)
    _as_published(folder)
    return folder


def _as_published(folder: Path) -> None:
    """The published folder keeps the picture's settings in a file of their own and calls its tokenizer LlamaTokenizer."""
    processor = json.loads((folder / "processor_config.json").read_text())
    pictures = {**processor.pop("image_processor"), "processor_class": "LlavaProcessor"}
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words.pop("backend", None)
    words |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    for name, content in (
        ("processor_config.json", processor), ("preprocessor_config.json", pictures), ("tokenizer_config.json", words),
        ("added_tokens.json", {"<image>": IMAGE, "<pad>": PAD}),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(content, indent=2))
