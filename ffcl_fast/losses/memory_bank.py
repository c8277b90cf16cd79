"""A queue of embeddings to contrast with (MoCo, He et al. 2020), as lightly's ``MemoryBankModule``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..distributed.losses import gather_keys
from ..functional import _checks


class MemoryBank(nn.Module):
    """The last ``size`` embeddings seen, (size, D) float32, random unit vectors at first. The loss reads it in place.

    State: the buffers ``bank`` and ``bank_ptr``, saved by ``state_dict``; a state dict without them (lightly does not
    save its own) leaves them as they are.

    Args:
        size: 0 for no bank; (size, D); or a bare size, D then being taken from the first batch.
        gather_distributed: add the embeddings of every process.
        group: the processes; None for all.

    Raises:
        ValueError: a negative entry, or not one of these forms.
    """

    def __init__(
        self,
        size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        shape = tuple(size) if isinstance(size, Sequence) else (size,)
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in shape) or len(shape) not in (1, 2):
            raise ValueError(f"memory_bank_size must be 0, (size, dim) or size, none negative; got {size}")
        if len(shape) == 2 and not shape[1]:
            raise ValueError(f"memory_bank_size must have a dim of at least 1; got {size}")
        self.size: int = shape[0]
        self.any_width = len(shape) == 1
        self.gather_distributed = gather_distributed
        self.group = group
        self.bank: Tensor
        self.bank_ptr: Tensor
        if self.size:
            dim = shape[1] if len(shape) == 2 else 0
            self.register_buffer("bank", F.normalize(torch.randn(self.size, dim), dim=-1))
            self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long))

    def keys(self, width: int) -> Tensor:
        """The (size, width) embeddings, not a copy: those that the next :meth:`enqueue` writes over included.

        Raises:
            ValueError: the bank is of another width.
        """
        if not self.bank.shape[1]:
            with torch.inference_mode(False), torch.no_grad():  # made by a validation batch, it is trained with later
                bank = torch.randn(self.size, width, dtype=self.bank.dtype, device=self.bank.device)
                self.bank = F.normalize(bank, dim=-1)
        self.check_width(width)
        return self.bank

    def check_width(self, width: int) -> None:
        """Raises ValueError for a ``width`` that the bank does not have; one without a width yet takes any."""
        if self.bank.shape[1] not in (0, width):
            raise ValueError(f"out1 must be as wide as the memory bank: got {width}, it is {self.bank.shape[1]} wide")

    @property
    def gathers(self) -> bool:
        """Whether what is added comes from other processes too."""
        return self.gather_distributed and distributed.world_size(self.group) > 1

    def gathered(self, inputs: Sequence[tuple[str, object]], check: Callable[[], Tensor]) -> Tensor:
        """The embeddings (N, D) that ``check`` returns, of all processes.

        Raises on every process, at once, what ``check`` raises on any, and for ``inputs`` that hold NaN or infinity or
        for banks that differ; LostRank where another process is gone.
        """
        return gather_keys("memory bank", inputs, check, self.size, self.bank_ptr, self.group)

    def enqueue(self, batch: Tensor) -> None:
        """Let ``batch`` (N, D), of every process if the bank gathers, replace the oldest ones; see :meth:`put`."""

        def check() -> Tensor:
            _checks.embeddings("batch", batch)
            self.check_width(batch.shape[1])
            return batch.detach()

        self.put(self.gathered((("batch", batch),), check) if self.gathers else batch)

    @torch.no_grad()
    def put(self, batch: Tensor) -> None:
        """Let ``batch`` (N, D) replace the oldest embeddings.

        As in lightly a batch that does not fit before the end is cut there, and the next one starts at the beginning.
        """
        # Positions as tensors: reading the pointer would stall an accelerator and break a compiled graph.
        count = batch.shape[0]
        batch = batch[: self.size].to(device=self.bank.device, dtype=self.bank.dtype)
        position = self.bank_ptr + torch.arange(batch.shape[0], device=self.bank.device)
        fits = (position < self.size)[:, None]
        position = position % self.size
        self.bank[position] = torch.where(fits, batch, self.bank[position])
        end = self.bank_ptr + count
        self.bank_ptr.copy_(torch.where(end >= self.size, 0, end))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args) -> None:
        stored = state_dict.get(prefix + "bank")
        if self.size and stored is not None and self.any_width and stored.dim() == 2:
            self.bank = self.bank.new_empty(self.size, stored.shape[1])
        own_missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, own_missing, *args)

    def extra_repr(self) -> str:
        return f"size={self.size}"
