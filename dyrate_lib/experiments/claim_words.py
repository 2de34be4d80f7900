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

# For the overview's narrow column; at most 30 letters.
SHORT: dict[str, str] = {
    "C1": "attention leaves the image", "C2": "FastV loses little, VTW much", "C3": "quality kept at ⅓ of FLOPs",
    "C4": "faster than FastV and VTW", "C5": "budget met without search", "C6": "predictor costs nothing",
    "C7": "decoding strategy matters", "C8": "fixed beats depth-based", "C9": "removed share grows, differs",
    "C10": "short answers survive", "C11": "attention says how much", "C12": "rate follows the need",
    "C13": "dropping may be final", "C14": "prunes less for more to see", "C15": "ours: lossless at ¼ of FLOPs",
    "F3": "trainable end to end",
}  # fmt: skip

# End of a quantity's name -> (name for a narrow column, whether it is a share, to be shown in percent); the first that fits
NUMBERS: dict[str, tuple[str, bool]] = {
    "img_change": ("image share", True), "res_change": ("response share", True), "fastv2_loss": ("FastV's loss", True),
    "vtw_loss": ("VTW's loss", True), "fastv2_minus_vtw": ("CIDEr over VTW", False), "flops_ratio": ("FLOPs", True),
    "dyrate_gain": ("CIDEr", True), "better_gain": ("CIDEr", True), "minus_original": ("CIDEr", False),
    "minus_random": ("CIDEr over random", False), "minus_dyrate": ("CIDEr over DyRate", False),
    "end_to_end_ratio": ("time, ratio", False), "over_fastv2": ("time over FastV", False),
    "over_fastv3": ("time over FastV", False),
    "over_vtw": ("time over VTW", False), "abs_error_max": ("FLOPs off by", True), "flops_share": ("of a step's FLOPs", True),
    "time_share": ("of a step's time", True), "share_of_saving": ("of the saving", True),
    "best_minus_worst": ("CIDEr, spread", False), "minus_greedy": ("CIDEr over greedy", False),
    "fixed_minus_depth": ("CIDEr, FP − DP", False), "narrative_minus_late_growth": ("narrative − late", True),
    "growth": ("growth", True), "sd_between_pictures": ("SD over pictures", True), "rank_correlation": ("ρ", False),
    "shares_minus_step": ("CIDEr over step", False), "shares_minus_none": ("CIDEr over constant", False),
    "shares_minus_foreign": ("CIDEr over another's", False), "share_of_gap": ("of the oracle's gain", True),
    "oracle_minus_none": ("CIDEr, oracle", False), "flops_gap_max": ("FLOPs apart", True), "given_step": ("ρ at one step", False),
    "rate_need": ("ρ", False), "rate_step": ("ρ", False), "in_force_need": ("ρ", False),
    "against_reversible": ("to reversible", True), "against_reranked": ("to re-ranked", True),
    "removed_objects": ("ρ", False), "removed_clutter": ("ρ", False), "given_objects": ("ρ", False),
    "objective_drop": ("drop of the loss", False), "minus_discarded": ("logits off by", False),
    "minus_fixed": ("CIDEr over fixed", False),
}  # fmt: skip

# Where to look, beside the claim's own notebook: beginnings of figures' names; those that were drawn are linked.
# C13 has a table only.
FIGURES: dict[str, tuple[str, ...]] = {
    "C1": ("fig2_",), "C2": ("tab2_",), "C3": ("tab2_",), "C4": ("tab3_latency", "tab3_speed_up"), "C5": ("fig3_learning",),
    "C6": ("tab3_latency",), "C7": ("tab4a_",), "C8": ("tab4b_",), "C9": ("fig4_",), "C10": ("tab1_",),
    "C11": ("controls_differences",), "C12": ("controls_courses",), "C13": (), "C14": ("controls_seen",),
    "C15": ("controls_better",), "F3": ("fig3_learning", "fig3_gradient"),
}  # fmt: skip
