"""What training loops on a frozen model share: the size of a pass, how its attention runs, the learning rate, processes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lm_eval_softverb.backbone import Backbone

# Padded tokens of one forward and backward pass; activations for the backward pass grow with them, speed does not beyond.
TOKENS_ON_CPU, TOKENS_ON_GPU = 2048, 1 << 15


def tokens_per_pass(backbone: Backbone) -> int:
    """A default that keeps matrix products large and memory small."""
    return TOKENS_ON_CPU if backbone.device.type == "cpu" else TOKENS_ON_GPU


def attention(backbone: Backbone) -> AbstractContextManager[None]:
    """On a CPU the backward pass of fused attention in bfloat16 outweighs all matrix products; written out it does not.

    Faster products than torch's (keys not repeated for each head) cost held-out accuracy that gradients and losses did not
    show; see benchmarks/LOG.md.
    """
    if backbone.device.type == "cpu" and backbone.dtype == torch.bfloat16:
        return sdpa_kernel(SDPBackend.MATH)  # type: ignore[no-any-return]
    return nullcontext()


def learning_rate(peak: float, schedule: str, warmup: float, step: int, total: int) -> float:
    """Learning rate of the 0-based ``step`` of ``total``: rising over a share ``warmup`` of the steps, then by ``schedule``.

    Args:
        schedule: ``constant``, or ``linear`` or ``cosine`` to zero.
    """
    warm = int(warmup * total)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return float(peak * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi))))
    return peak


class Processes:
    """The processes of ``accelerate launch``; one alone where there is no launcher."""

    def __init__(self) -> None:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        self._state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
        self.rank, self.count = int(self._state.process_index), int(self._state.num_processes)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """Where this process should load the model; None leaves it to the caller."""
        return str(self._state.device) if self.count > 1 else None

    def sum(self, values: Tensor) -> Tensor:
        from accelerate.utils import reduce

        return reduce(values, "sum") if self.count > 1 else values  # type: ignore[no-any-return]

    def wait(self) -> None:
        self._state.wait_for_everyone()
