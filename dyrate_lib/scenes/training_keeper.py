"""What a training run leaves on disk as it goes: the checkpoint, its copy for transport, the state to resume from."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import export, ship
from .training_plan import Say
from .training_state import load_state, save_state

if TYPE_CHECKING:
    from .trainer import _Run


@dataclass
class Keeper:
    """Writes the checkpoint and the state to resume from."""

    out: Path | None
    processor: Any
    ship_to: Path | None
    every: float
    say: Say
    last: float = field(default_factory=time.monotonic)

    @property
    def state(self) -> Path | None:
        return None if self.out is None else self.out.with_name(self.out.name + ".state") / "state.safetensors"

    def resumable(self) -> int:
        """The step a state was left at, 0 without one."""
        if self.state is None or not self.state.exists():
            return 0
        return load_state(self.state)["step"]

    def due(self) -> bool:
        return time.monotonic() - self.last > self.every

    def save(self, run: _Run, planned: int | None, final: bool = False) -> None:
        self.last = time.monotonic()
        if self.out is None or self.state is None:
            return
        save_state(self.state, run.state() | {"planned": planned})
        log = "".join(json.dumps(line) + "\n" for line in run.history)
        export(run.model, self.processor, self.out, {"log.jsonl": log})
        if self.ship_to is not None:
            ship(self.out, self.ship_to)
        self.last = time.monotonic()
        self.say(f"saved step {run.step} to {self.out.name}{' (final)' if final else ''}")
