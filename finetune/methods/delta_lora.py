"""Delta-LoRA: the frozen matrix follows the low-rank product as that changes from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from finetune.data.rows import Row
from finetune.methods.method import Method
from finetune.methods.peft import Peft


class DeltaLora(Method):
    """Zi et al. 2023, arXiv:2309.02411: after step K of a warm-up, W += ratio * s * (B A - the B A of the step before).

    The sum telescopes to W_T = W_0 + ratio * s * (B_T A_T - B_K A_K), so W itself stays frozen, 4-bit or bf16, and no
    update is rounded away: a forward pass adds that term, computed from detached factors, because the gradient reaches
    A and B only through their own product. s = lora_alpha / r; no dropout, which would break W's difference.
    Trains r (in + out) parameters a layer, as LoRA does; what is saved is a LoRA of rank 2 r.
    """

    def __init__(
        self, *, r: int, lora_alpha: float, update_ratio: float, warmup: float, target_modules: Sequence[str] | str
    ) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} is a share of the steps: at least 0, less than 1")
        self.r, self.lora_alpha, self.ratio, self.warmup = r, lora_alpha, update_ratio, warmup
        self.target_modules = target_modules if isinstance(target_modules, str) else list(target_modules)
        self.lora = Peft(self._config(1))
        self.start_step = 0  # K, in steps
        self.start: dict[str, Tensor] = {}  # name of a factor -> A_K (r, in) or B_K (out, r); empty until step K

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """LoRA whose layers also add the movement of their frozen matrix."""
        tuned = self.lora.attach(model, tokenizer=tokenizer, num_steps=num_steps, train_rows=train_rows)
        self.start_step, self.start = round(self.warmup * num_steps), {}
        for name, layer in _layers(tuned):
            layer.register_forward_hook(self._hook(name))
        self.after_step(tuned, 0)
        return tuned

    def after_step(self, model: nn.Module, step: int) -> None:
        """Keep the factors of step K."""
        if step == self.start_step:
            for name, layer in _layers(model):
                self.start[f"{name}.lora_A"], self.start[f"{name}.lora_B"] = (f.clone() for f in _factors(layer))

    def state(self) -> dict[str, Any]:
        """The factors of step K, once it is past."""
        return dict(self.start)

    def restore(self, state: dict[str, Any]) -> None:
        """The factors of step K of the run that is resumed."""
        self.start = dict(state)

    def save(self, model: Any, folder: Path) -> None:
        """[A_T; A_K] and [(1 + ratio) B_T, -ratio B_K] with the same s: a LoRA that PEFT loads."""
        tensors = {}
        for name, layer in _layers(model):
            a, b = _factors(layer)
            first, second = self._start(name, a, b)
            tensors[f"{name}.lora_A.weight"] = torch.cat([a, first]).cpu()
            tensors[f"{name}.lora_B.weight"] = torch.cat([(1 + self.ratio) * b, -self.ratio * second], dim=1).cpu()
        config = self._config(2)
        config.base_model_name_or_path = self.lora.config.base_model_name_or_path
        config.inference_mode = True
        config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def load(self, model: Any, folder: Path) -> Any:
        """PEFT's own loading, from safetensors."""
        return self.lora.load(model, folder)

    def _config(self, times: int) -> LoraConfig:
        """A LoRA of `times` the rank and the same scale."""
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=times * self.r,
            lora_alpha=times * self.lora_alpha,  # type: ignore[arg-type]
            target_modules=self.target_modules,
        )

    def _start(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A_K and B_K beside the factors `a` and `b`, which they are until step K."""
        if not self.start:
            return a, b
        return self.start[f"{name}.lora_A"].to(a), self.start[f"{name}.lora_B"].to(b)

    def _hook(self, name: str) -> Any:
        def add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.start:
                return output
            a, b = _factors(layer)
            first, second = self._start(name, a, b)
            moved = linear(linear(inputs[0].to(a.dtype), torch.cat([a, first])), torch.cat([b, -second], dim=1))
            return output + (self.ratio * layer.scaling["default"] * moved).to(output.dtype)

        return add


def _layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), detached."""
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
