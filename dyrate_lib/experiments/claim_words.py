"""The question behind each claim, for notebook 07. No word here says how it was answered."""

from __future__ import annotations

QUESTIONS: dict[str, str] = {
    "C1": "Does attention move from the image to the response as a reply grows?",
    "C2": "Is FastV at half the tokens nearly lossless, and VTW at half depth not?",
    "C3": "Does DyRate keep caption quality at a third of the FLOPs?",
    "C4": "Is DyRate faster than the unpruned model, FastV and VTW?",
    "C5": "Does training meet a FLOPs budget without a search?",
    "C6": "Does the predictor cost next to nothing?",
    "C7": "Does the decoding strategy matter, as printed?",
    "C8": "Does a fixed rate beat a depth-based one at fewer FLOPs?",
    "C9": "Does the removed share grow over steps, and differ by picture?",
    "C10": "Do short answers survive (Table I's seven tasks)?",
    "C11": "Do attention shares tell how much to prune?",
    "C12": "Does the rate follow the need for the image?",
    "C13": "May dropping be final?",
    "C14": "Is less removed where there is more to see?",
    "C15": "Does a better rule lose nothing at a quarter of the FLOPs?",
    "F3": "Can the predictor be trained end to end?",
}

# For the overview's narrow column; at most 34 letters.
SHORT: dict[str, str] = {
    "C1": "attention leaves the image", "C2": "FastV ½ is lossless, VTW is not", "C3": "quality kept at ⅓ of the FLOPs",
    "C4": "faster than FastV and VTW", "C5": "budget met without a search", "C6": "predictor costs nothing",
    "C7": "decoding strategy matters", "C8": "fixed rate beats depth-based", "C9": "removed share grows, differs",
    "C10": "short answers survive", "C11": "attention tells how much to prune", "C12": "rate follows the need",
    "C13": "dropping may be final", "C14": "prunes less where more to see", "C15": "ours: lossless at ¼ of the FLOPs",
    "F3": "trainable end to end",
}  # fmt: skip

# Where to look, beside the claim's own notebook: beginnings of figures' names; those that were drawn are linked.
FIGURES: dict[str, tuple[str, ...]] = {
    "C1": ("fig2_",), "C2": ("tab2_",), "C3": ("tab2_",), "C4": ("tab3_latency", "tab3_speed_up"), "C5": ("fig3_learning",),
    "C6": ("tab3_latency",), "C7": ("tab4a_",), "C8": ("tab4b_",), "C9": ("fig4_",), "C10": ("tab1_",), "C11": ("controls_diff",),
    "C12": ("controls_course",), "C13": ("controls_final",), "C14": ("controls_seen",), "C15": ("controls_better",),
    "F3": ("fig3_learning", "fig3_gradient"),
}  # fmt: skip
