"""The chat template of the Vicuna-style LLaVA-1.5 checkpoints, in one place.

Every prompt of the project has the form ``{SYSTEM_PROMPT} USER: <image>\\n{text} ASSISTANT:``, so that all four token
types of the study exist: `sys` (everything before the image), `img`, `ins` (after the image) and `res` (generated).
"""

from __future__ import annotations

IMAGE_TOKEN = "<image>"

SYSTEM_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def chat_prompt(user_text: str, image: bool | int = True) -> str:
    """Wrap a user's text into the full chat string that the processor expects.

    Args:
        user_text: what the user asks, without any template words.
        image: put one ``<image>`` placeholder and a newline in front of the text, or as many as the number says.

    Returns:
        ``"{SYSTEM_PROMPT} USER: <image>\\n{user_text} ASSISTANT:"`` (without the image part if ``image`` is false).
    """
    placeholder = f"{IMAGE_TOKEN}\n" * int(image)
    return f"{SYSTEM_PROMPT} USER: {placeholder}{user_text} ASSISTANT:"
