"""One training run: resumable, on a CPU or a GPU, of the model or of its dense twin."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.shape import ModelShape
from demo.data import WINDOW, Windows
from demo.model import Llama4
from demo.muon import Muon

BATCH = 16  # windows in a step
PEAK_RATE = 6e-3
WARM_UP_STEPS = 50
BALANCE_WEIGHT = 0.01
CLIP = 1.0


@dataclass(frozen=True)
class Step:
    """What a step did. loss: mean of -ln p over its tokens; balance: 1 when experts are loaded evenly."""

    number: int
    loss: float
    balance: float
    cpu_s: float  # of this process since the run began, resumed parts included


class Run:
    """A model in training. `folder` keeps its state: weights and the optimizers' moments, every `save_every` steps.

    With a state in it, the run goes on from there. `folder` None keeps nothing. Without `decay` the rate stays up.
    """

    def __init__(self, shape: ModelShape, steps: int, seed: int, folder: Path | None, *, decay: bool = True) -> None:
        torch.manual_seed(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = Llama4(shape).to(self.device)
        self.steps = steps
        self.done = 0
        self._decay = decay
        self._cpu_before_s = 0.0
        self._folder = folder
        self._optimizers = self._make_optimizers()
        # Compiling fuses the small operations that otherwise take half of the time; without a compiler it still works.
        compiles = self.device.type == "cuda" or shutil.which("g++") is not None
        self._loss = torch.compile(self._loss_of) if compiles else self._loss_of
        # It warns that the fullest expert's size is read in mid-pass, which is meant: nothing is dropped.
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        if folder is not None and (folder / "state.safetensors").exists():
            self._resume(folder / "state.safetensors")

    def rate(self, step: int) -> float:
        """The learning rate: up over WARM_UP_STEPS, then linearly down to a fiftieth, or constant without decay."""
        rising = min(1.0, (step + 1) / WARM_UP_STEPS)
        falling = 1.0 - 0.98 * step / self.steps if self._decay else 1.0
        return PEAK_RATE * rising * falling

    def train(self, windows: Windows, on_step: Callable[[Step], bool], *, save_every: int = 250) -> None:
        """Go on until the last step, or until `on_step` returns False."""
        started_s = time.process_time()
        while self.done < self.steps:
            ids = windows.batch(self.done, BATCH).to(self.device)
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate(self.done)
            loss, balance = self._loss(ids[:, :-1], ids[:, 1:])
            (loss + BALANCE_WEIGHT * balance).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            for optimizer in self._optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.done += 1
            cpu_s = self._cpu_before_s + time.process_time() - started_s
            step_end_s = time.process_time()
            going_on = on_step(Step(self.done, loss.item(), balance.item(), cpu_s))
            started_s += time.process_time() - step_end_s  # what `on_step` takes is not training
            if self._folder is not None and (self.done % save_every == 0 or self.done == self.steps or not going_on):
                self._save(self._folder / "state.safetensors", cpu_s)
            if not going_on:
                return

    def warm_up(self, windows: Windows) -> None:
        """Compile, without a change to any weight: what comes after runs at full speed from its first step."""
        for step in range(3):  # the fullest expert differs, so the second and third compile for any size
            ids = windows.batch(step, BATCH).to(self.device)
            loss, balance = self._loss(ids[:, :-1], ids[:, 1:])
            (loss + BALANCE_WEIGHT * balance).backward()
        self.model.zero_grad(set_to_none=True)

    def _loss_of(self, inputs_NL: Tensor, targets_NL: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16):
            trunk = self.model(inputs_NL)
            logits_NLV = self.model.lm_head(trunk.hidden_NLD)
        return F.cross_entropy(logits_NLV.flatten(0, 1).float(), targets_NL.flatten()), trunk.balance

    def _make_optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """Muon for the matrices between the layers; AdamW for what is looked up, chosen from, or a vector."""
        muon: list[Tensor] = []
        adamw: list[Tensor] = []
        for name, weight in self.model.named_parameters():
            looked_up = weight.dim() == 1 or any(part in name for part in ("embed_tokens", "lm_head", "router"))
            (adamw if looked_up else muon).append(weight)
        return (
            torch.optim.AdamW(adamw, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
            Muon(muon, lr=PEAK_RATE, weight_decay=0.05),
        )

    def _named_moments(self) -> dict[str, Tensor]:
        names: dict[Tensor, str] = {weight: name for name, weight in self.model.named_parameters()}
        return {
            f"{moment}/{names[weight]}": value
            for optimizer in self._optimizers
            for weight, state in optimizer.state.items()
            for moment, value in state.items()
        }

    def _save(self, path: Path, cpu_s: float) -> None:
        tensors = {**self.model.state_dict(), **self._named_moments()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        about = {"done": self.done, "cpu_s": cpu_s}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"run": json.dumps(about)})
        partial.rename(path)

    def _resume(self, path: Path) -> None:
        with safe_open(path, "pt", device=str(self.device)) as state:
            about = json.loads(state.metadata()["run"])
            self.model.load_state_dict({name: state.get_tensor(name) for name in self.model.state_dict()})
            weights = dict(self.model.named_parameters())
            for optimizer in self._optimizers:
                own = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
                for key in state.keys():  # noqa: SIM118  not a dictionary
                    moment, _, name = key.rpartition("/")
                    if moment and id(weights[name]) in own:
                        optimizer.state[weights[name]][moment] = state.get_tensor(key)
        self.done, self._cpu_before_s = about["done"], about["cpu_s"]


def steps_for(tokens: int) -> int:
    """Steps that read this many tokens, rounded up."""
    return -(-tokens // (BATCH * WINDOW))
