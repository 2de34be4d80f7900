"""The command line that trains a scenes VLM from scratch, or further from a checkpoint.

    python -m dyrate_lib.scenes.train --size small --out DIR --budget-seconds 540
    python -m dyrate_lib.scenes.train --size small --from data/checkpoints/scenes-small --steps 4400 --out DIR --ship DIR2
    python -m dyrate_lib.scenes.train --size small --from CONTINUED --mix lagging --budget-seconds 600 --out DIR

Each picture carries one row of captions and short-answer tasks (see `rows` for what is asked of which picture, and
:class:`~dyrate_lib.scenes.packed_forward.PackedForward`); the loss is the cross-entropy on responses, averaged within each kind,
plus what the CLS token of the vision tower should know of the picture and, in some mixes, what its patches say. The
output folder is a complete checkpoint from the first save on; a killed run resumes from its state.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from .checkpoint import ship, unship
from .mixes import PRESETS
from .objective import Recipe
from .packed_forward import ATTENTIONS
from .trainer import TrainResult, train
from .vlm import SIZES

__all__ = ["Recipe", "TrainResult", "main", "provenance", "ship", "train", "unship"]

# Enough to learn new tasks with, below the 1e-3 at which the checkpoints were first trained: what they know is to stay.
LR_FURTHER = 6e-4


def provenance(device: torch.device) -> dict:
    """What the run was made with: device, versions, date."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; see ``--help``."""
    from . import score

    entered = time.monotonic()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(prog="python -m dyrate_lib.scenes.train", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint (the state to resume from: OUT.state)")
    parser.add_argument("--from", type=Path, dest="start", metavar="FOLDER", help="checkpoint to train further")
    parser.add_argument(
        "--budget-seconds", type=float, help="for all: start, training, evaluation; default: 540, no limit with --steps"
    )
    parser.add_argument("--eval-seconds", type=float, default=80, help="part of the budget kept for the evaluation")
    parser.add_argument("--steps", type=int, help="train exactly so many steps instead of filling the budget")
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--lr", type=float, help=f"highest learning rate; default: {Recipe.lr:g}, {LR_FURTHER:g} with --from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda:0, cpu, ...; default: CUDA if there is one")
    parser.add_argument("--workers", type=int, help="processes that prepare scenes")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument(
        "--attention", choices=(*ATTENTIONS, "auto"), default="auto", help="of the packed pass; auto: what is fastest, compiled"
    )
    parser.add_argument(
        "--mix", choices=sorted(PRESETS), default="broad", help="shares of captions and tasks; lagging: for a second leg on tasks"
    )
    parser.add_argument("--save-every", type=float, default=75.0, help="seconds between checkpoints")
    parser.add_argument("--ship", type=Path, help="also copy the checkpoint there, as shards and one files.tar")
    parser.add_argument("--eval-n", type=int, default=500, help="held-out pictures (or questions a kind) to score")
    parser.add_argument("--card", type=Path, metavar="DIR", help="only rewrite DIR/README.md, scoring CIDEr (Java)")
    parser.add_argument("--unship", type=Path, nargs=2, metavar=("SHIPPED", "DIR"), help="only undo --ship")
    args = parser.parse_args(arguments)
    if args.unship:
        unship(*args.unship)
        return 0
    if args.card:
        score.write_card(args.card, with_cider=True)
        return 0
    if args.out is None:
        parser.error("--out is needed")
    out = args.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"[{args.size} {time.monotonic() - entered:6.1f} s] {text}", flush=True)

    lr = args.lr or (LR_FURTHER if args.start else Recipe.lr)
    preset = vars(PRESETS[args.mix])
    recipe = Recipe(size=args.size, seed=args.seed, steps=args.steps, batch=args.batch, lr=lr, **preset)
    budget = args.budget_seconds or (None if args.steps else 540.0)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    result = train(
        recipe,
        out=out,
        device=device,
        deadline=None if budget is None else entered + budget - args.eval_seconds,
        compile={"auto": None, "on": True, "off": False}[args.compile],
        workers=args.workers,
        save_every=args.save_every,
        ship_to=args.ship,
        say=say,
        start=args.start,
        attention=args.attention,
    )
    score.finish(
        out,
        {
            "recipe": asdict(result.recipe) | {"steps": result.steps},
            "parameters": sum(p.numel() for p in result.model.parameters()),
            "ms_per_step": round(result.ms_per_step, 2),
            "train_seconds": round(result.seconds, 1),
            "compiled": result.compiled,
            "last": result.history[-1],
            "provenance": provenance(device),
        },
        device=device,
        n=args.eval_n,
        give_up=None if budget is None else entered + budget + 15,
        say=say,
        ship_to=args.ship,
    )
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
