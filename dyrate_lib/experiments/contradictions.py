"""Where the printed paper contradicts itself, with the arithmetic that shows it.

Everything here is computed from `data/paper/*.csv` and from the published dimensions of LLaVA-1.5; no model is run.
Figures that the paper does not print (other authors' evaluations, a graphics card's data sheet) are named as such.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from .. import accounting, compare
from ..dimensions import llava_dimensions
from ..models import ModelInfo

# lmms-eval figures of LLaVA-1.5-7B as the FastV authors publish them, and LLaVA-1.5's own VQAv2 and TextVQA accuracies
FASTV_AUTHORS = {"nocaps": 105.5, "flickr30k": 74.9, "coco2017": 110.4}
TEXTVQA_WITH_OCR, TEXTVQA_WITHOUT_OCR, VQAV2 = 58.2, 46.0, 78.5
RTX_4090_BANDWIDTH, RTX_4090_MEMORY = 1.008e12, 24e9  # bytes a second and bytes, from the data sheet
N_IMAGE = 576


@dataclass(frozen=True)
class Contradiction:
    """One place where the paper disagrees with itself or with arithmetic. `numbers` holds what was computed."""

    where: str
    printed: str
    against: str
    arithmetic: str
    numbers: dict[str, float] = field(default_factory=dict)


def llava_info(size: str) -> ModelInfo:
    """Dimensions of LLaVA-1.5-7B ("7b") or -13B ("13b") as their config files have them."""
    return llava_dimensions(size)


def prefill_ratio(info: ModelInfo, layer: int, rate: float, text: int | np.ndarray) -> np.ndarray:
    """FastV's formula for one forward pass without a share `rate` of the image tokens from `layer` on, over the unpruned one."""
    text = np.asarray(text, dtype=np.float64)
    full = accounting.paper_layer_flops(text + N_IMAGE, info.hidden, info.mlp)
    pruned = accounting.paper_layer_flops(text + N_IMAGE * (1 - rate), info.hidden, info.mlp)
    return (layer * full + (info.n_layers - layer) * pruned) / (info.n_layers * full)


def text_length_for(info: ModelInfo, layer: int, rate: float, ratio: float, longest: int = 2000) -> float:
    """The number of text tokens (interpolated) at which `prefill_ratio` is `ratio`; NaN if none up to `longest` gives it."""
    text = np.arange(longest + 1)
    ratios = prefill_ratio(info, layer, rate, text)
    if not ratios[0] <= ratio <= ratios[-1]:
        return float("nan")
    return float(np.interp(ratio, ratios, text))


def table3_text_lengths() -> pd.DataFrame:
    """For each pruned row of Table III with a known layer and rate: the text length that its percentage would need."""
    table = compare.load_paper("table3")
    rows = []
    for size, model in (("7b", "LLaVA-1.5-7B"), ("13b", "LLaVA-1.5-13B")):
        info = llava_info(size)
        for method, layer, rate in (("fastv-2", 2, 0.5), ("fastv-3", 3, 0.5), ("vtw", 16, 1.0)):
            row = table[(table.model == model) & (table.method == method)].iloc[0]
            printed = float(row.tflops_percent)
            needed = text_length_for(info, layer, rate, printed / 100)
            low, high = 100 * prefill_ratio(info, layer, rate, np.array([0, 100]))
            rows.append(
                {"model": model, "method": row.label, "printed %": printed, "% at 0 text tokens": low,
                 "% at 100 text tokens": high,
                 "text tokens needed": needed}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _equation_3() -> Contradiction:
    k, n_rates = np.arange(1, 11), 10
    printed = N_IMAGE * (k - 1) // n_rates  # eq. 3: tokens with i <= N (k - 1) / K get a 1
    text = N_IMAGE - (N_IMAGE * (k - 1)) // n_rates
    return Contradiction(
        "Eq. 3",
        "m_i^k = 1 for i <= N (k - 1) / K",
        "Sec. III-C: r_1 = 0 means retaining all tokens",
        f"N = 576, K = 10: as printed, rate r_1 keeps {printed[0]} tokens and r_10 keeps {printed[-1]}; by the text "
        f"r_1 keeps {text[0]} "
        f"and r_10 keeps {text[-1]}. Read here as keeping N - floor(r_k N).",
        {
            "printed_r1": float(printed[0]),
            "text_r1": float(text[0]),
            "printed_r10": float(printed[-1]),
            "text_r10": float(text[-1]),
        },
    )


def _table_2_swap() -> Contradiction:
    table = compare.load_paper("table2").set_index(["model", "method"])
    row = table.loc[("LLaVA-1.5-7B", "original")]
    as_printed = abs(row.nocaps - FASTV_AUTHORS["nocaps"]) + abs(row.flickr30k - FASTV_AUTHORS["flickr30k"])
    swapped = abs(row.flickr30k - FASTV_AUTHORS["nocaps"]) + abs(row.nocaps - FASTV_AUTHORS["flickr30k"])
    llava = compare.load_paper("table4b").set_index("method").loc["original"].nocaps
    large = table.loc[("LLaVA-1.5-13B", "original")]
    return Contradiction(
        "Table II, 7B rows",
        f"Nocaps {row.nocaps:.2f}, Flickr30k {row.flickr30k:.2f} (original)",
        f"Table IVb: the same model on Nocaps {llava:.2f}; 13B rows: Nocaps {large.nocaps:.2f}, Flickr30k {large.flickr30k:.2f}",
        f"Distance to the FastV authors' lmms-eval figures (Nocaps 105.5, Flickr30k 74.9): {as_printed:.2f} points as printed, "
        f"{swapped:.2f} with the two columns swapped. The columns are swapped in all 7B rows (so also Nocaps in Table III).",
        {"as_printed": float(as_printed), "swapped": float(swapped)},
    )


def _table_3_percentages() -> list[Contradiction]:
    lengths = table3_text_lengths()
    small = lengths[lengths.model == "LLaVA-1.5-7B"]["text tokens needed"].tolist()
    info7, info13 = llava_info("7b"), llava_info("13b")
    text = np.arange(0, 2001)
    step = 100 * (prefill_ratio(info7, 3, 0.5, text) - prefill_ratio(info7, 2, 0.5, text))
    vtw = 100 * prefill_ratio(info13, 16, 1.0, np.array([0, 100]))
    table = compare.load_paper("table3").set_index(["model", "method"]).tflops_percent
    printed = table.loc[("LLaVA-1.5-7B", "fastv-3")] - table.loc[("LLaVA-1.5-7B", "fastv-2")]
    return [
        Contradiction(
            "Table III, 13B rows",
            "the same TFLOPs % as for 7B (57.90, 55.40, 55.20)",
            "13B has 40 layers, 7B has 32: cutting after layer 2, 3 or 16 is another share of them",
            f"VTW at layer 16 of 40 by FastV's formula: {vtw[0]:.1f} % with no text token, {vtw[1]:.1f} % with 100; "
            f"never 55.2 % there. "
            "The 13B column repeats the 7B one.",
            {"vtw13_text0": float(vtw[0]), "vtw13_text100": float(vtw[1])},
        ),
        Contradiction(
            "Table III, 7B rows",
            "FastV 2: 55.40 %, FastV 3: 57.90 %, VTW 16: 55.20 %",
            "one formula at one text length",
            f"The three need {small[0]:.0f}, {small[1]:.0f} and {small[2]:.0f} text tokens. At R = 0.5 going from "
            f"layer 2 to 3 adds at most "
            f"{step.max():.2f} points at any length; {printed:.2f} are printed.",
            {
                "fastv2": small[0],
                "fastv3": small[1],
                "vtw": small[2],
                "step_max": float(step.max()),
                "step_printed": float(printed),
            },
        ),
    ]


def latency_arithmetic() -> dict[str, float]:
    """Bytes of a decode step at batch 1 in 16 bits, and what the printed latencies would imply, for 7B and 13B."""
    out: dict[str, float] = {}
    for size in ("7b", "13b"):
        info = llava_info(size)
        weights = 2.0 * sum(accounting.llm_parameters(info).values())
        image = float(accounting.kv_bytes(info, N_IMAGE, 2))
        out |= {
            f"weights_{size}": weights, f"image_kv_{size}": image, f"saving_{size}": image / (weights + image),
            f"parity_batch_{size}": weights / image, f"ms_per_token_{size}": 1000 * weights / RTX_4090_BANDWIDTH,
        }  # fmt: skip
    table = compare.load_paper("table3").set_index(["model", "method"]).latency_ms
    for size, model in (("7b", "LLaVA-1.5-7B"), ("13b", "LLaVA-1.5-13B")):
        out[f"gain_{size}"] = float(table.loc[(model, "original")] / table.loc[(model, "dyrate")])
        out[f"latency_{size}"] = float(table.loc[(model, "original")])
    return out


def _latency() -> list[Contradiction]:
    a = latency_arithmetic()
    shortest = float(compare.load_paper("text").set_index("id").value.loc["response_tokens_min"])
    return [
        Contradiction(
            "Table III, latency",
            f"x{a['gain_7b']:.2f} (7B) and x{a['gain_13b']:.2f} (13B) faster",
            "a decode step reads the weights whatever is pruned",
            f"Batch 1, 16 bits, 7B: the keys and values of 576 image tokens are {a['image_kv_7b'] / 1e9:.2f} GB beside "
            f"{a['weights_7b'] / 1e9:.1f} GB of weights, so dropping all of them saves {a['saving_7b']:.1%} of a "
            f"step's traffic; they "
            f"weigh as much as the weights at batch {a['parity_batch_7b']:.0f}. So large a gain can come only from "
            f"the prefill or from "
            "large batches.",
            a,
        ),
        Contradiction(
            "Table III, latency",
            f"{a['latency_7b']:.2f} ms (7B) and {a['latency_13b']:.2f} ms (13B), for responses of 16 to 64 tokens on "
            f"RTX 4090 cards",
            "reading the weights once a token takes longer",
            f"At 1008 GB/s one token of 7B takes at least {a['ms_per_token_7b']:.1f} ms, {shortest:.0f} tokens "
            f"{shortest * a['ms_per_token_7b']:.0f} ms: "
            f"the printed latency is not that of a response. 13B's weights ({a['weights_13b'] / 1e9:.1f} GB in 16 "
            f"bits) do not fit on one "
            "24 GB card.",
            {"response_ms_7b": shortest * a["ms_per_token_7b"]},
        ),
    ]


def wrong_bold(name: str) -> pd.DataFrame:
    """Columns of the paper's table `name` in which the bold value is not the best of its block: column, bold, best, by whom."""
    table = compare.load_paper(name)
    label = "model" if name == "table1" else "label"
    blocks = [table] if name == "table1" else [block for _, block in table.groupby("model", sort=False)]
    rows = []
    for block in blocks:
        for column in block.select_dtypes("number").columns.difference(["resolution"], sort=False):
            marked = block[[column in str(bold).split() for bold in block.bold]]
            best = block.loc[block[column].idxmax()]
            if len(marked) and float(marked[column].max()) < float(best[column]):
                rows.append(
                    {"table": name, "block": best["model"] if name != "table1" else "all", "column": column,
                     "bold": float(marked[column].max()), "best": float(best[column]), "best by": best[label]}
                )  # fmt: skip
    return pd.DataFrame(rows, columns=["table", "block", "column", "bold", "best", "best by"])


def _table_1() -> list[Contradiction]:
    table = compare.load_paper("table1").set_index("model")
    wrong = pd.concat([wrong_bold("table1"), wrong_bold("table2")], ignore_index=True)
    shown = "; ".join(
        f"{r.table[:5].capitalize()} {r.table[5:]} {r.column}: {r.bold:g} bold, {r.best:g} ({r._6}) is best"
        for r in wrong.itertuples()
    )
    loss = table.loc["LLaVAv1.5"].vqa - table.loc["DyRate(ours)"].vqa
    return [
        Contradiction(
            "Table I, column VQA",
            f"LLaVA-1.5 {table.loc['LLaVAv1.5'].vqa:g}, FastV {table.loc['FastV'].vqa:g}, DyRate "
            f"{table.loc['DyRate(ours)'].vqa:g} (bold)",
            f"LLaVA-1.5's published VQAv2 is {VQAV2:g}; {TEXTVQA_WITH_OCR:g} is its TextVQA with OCR tokens in the prompt, about "
            f"{TEXTVQA_WITHOUT_OCR:g} without",
            f"DyRate stands {loss:.1f} points below LLaVA-1.5 in the column, but only "
            f"{TEXTVQA_WITHOUT_OCR - table.loc['DyRate(ours)'].vqa:.1f} below "
            "the figure without OCR tokens: the rows likely mix two protocols, so the column compares nothing.",
            {"loss": float(loss)},
        ),
        Contradiction(
            "Tables I and II, bold", "the highest-performing results are in bold", "the numbers beside them",
            f"{len(wrong)} columns mark a value that is not the best: {shown}.", {"wrong": float(len(wrong))},
        ),
        Contradiction(
            "Table I, column MME", "headed Accuracy", "values in the thousands",
            f"LLaVA-1.5 has {table.loc['LLaVAv1.5'].mme:g}: a score of up to 2000 (perception), not a percentage; VisionZip's "
            f"{table.loc['VisionZip'].mme:g}, so far above, probably adds the cognition part.", {},
        ),
    ]  # fmt: skip


def _ablation() -> list[Contradiction]:
    a, b = compare.load_paper("table4a").set_index("method").nocaps, compare.load_paper("table4b").set_index("method")
    info = llava_info("7b")
    kept = np.linspace(0, 1, 10001)
    ratios = np.array([prefill_ratio(info, 3, 1 - k, 64) for k in kept])
    fixed = float(np.interp(b.loc["fixed"].flops_percent / 100, ratios, kept))
    return [
        Contradiction(
            "Sec. IV-D against Table IVa", f"top_k = 6 gives {a.max():.2f}",
            f"Table IVa gives {a.max():.2f} to {a.idxmax().replace('-', '_')}",
            "The same number under two names; both are run here.", {"best": float(a.max())},
        ),
        Contradiction(
            "Table IVa against IVb", f"greedy {a['greedy']:.2f} on Nocaps",
            f"LLaVA {b.loc['original'].nocaps:.2f} on Nocaps, with 'the default greedy search'",
            f"Two values, {a['greedy'] - b.loc['original'].nocaps:.2f} points apart, for what both tables call "
            f"LLaVA-1.5-7B under greedy decoding; the spread "
            f"that Table IVa is about is {a.max() - a.min():.2f}.", {"apart": float(a["greedy"] - b.loc["original"].nocaps)},
        ),
        Contradiction(
            "Sec. IV-D, C_retain", "1 - H(L - 4) P_4th - H(L - 4) R'", "a rate that 'adapts to the layer index'",
            "H(L - 4) stands there twice, so the two terms add up to one constant, P_4th + R', from layer 4 on: "
            "unless R' itself depends on "
            "the layer, which is never defined, nothing changes with depth.", {},
        ),
        Contradiction(
            "Sec. IV-B against Table III", "visual tokens reduced 'by half'",
            "33.33 % of the FLOPs (Table III), 28.80 % (Table IVb)",
            f"Half the tokens from layer 3 on is {100 * float(prefill_ratio(info, 3, 0.5, 64)):.1f} % with 64 text "
            f"tokens; 33.33 % leaves "
            f"{float(np.interp(1 / 3, ratios, kept)):.1%} of the image tokens, 28.80 % leaves {fixed:.1%}.",
            {"half": float(prefill_ratio(info, 3, 0.5, 64)), "kept_at_third": float(np.interp(1 / 3, ratios, kept)),
             "kept_fixed": fixed},
        ),
        Contradiction("Sec. IV-C", "'our method, DiffRate'", "the title's DyRate",
        "DiffRate is reference [20], a method for vision transformers by other authors.", {}),
    ]  # fmt: skip


def contradictions() -> list[Contradiction]:
    """All of them, in the order of the paper."""
    return [_equation_3(), *_table_1(), _table_2_swap(), *_table_3_percentages(), *_latency(), *_ablation()]


def contradiction_table() -> pd.DataFrame:
    """One row each: where, printed, against, arithmetic (all text)."""
    return pd.DataFrame(
        [
            {"where": c.where, "printed": c.printed, "against": c.against, "arithmetic": c.arithmetic}
            for c in contradictions()
        ]
    )
