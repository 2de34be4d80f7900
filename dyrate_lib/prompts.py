"""The chat template of the Vicuna-style LLaVA-1.5 checkpoints, in one place.

Every prompt of the project has the form ``{SYSTEM_PROMPT} USER: <image>\\n{text} ASSISTANT:``, so that all four token
types of the study exist: `sys` (everything before the image), `img`, `ins` (after the image) and `res` (generated).
"""

from __future__ import annotations

from .errors import check_whole

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

    Raises:
        InputError: a number of pictures that is no whole number, or below 0.
    """
    placeholder = f"{IMAGE_TOKEN}\n" * check_whole("image", int(image) if isinstance(image, bool) else image, 0)
    return f"{SYSTEM_PROMPT} USER: {placeholder}{user_text} ASSISTANT:"
