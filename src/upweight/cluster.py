"""Processes that work on one fit together, each with a share of the rows.

Every process, or rank, makes the same calls in the same order. Whatever they exchange begins with a
meeting, in which each says where it is and whether it has failed: so a failure of one stops all of
them with its message, and none waits for what will not come.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Cluster", "ClusterError", "assign"]

# How long a rank may wait for the slowest. The end of a process is noticed at once.
WAIT = timedelta(days=2)
# Small tensors are sent together, so many bytes at a time.
BUCKET_BYTES = 64 * 2**20
# Seconds between two looks at whether another rank has failed.
LOOK = 0.5

START = "start the script with `torchrun --nproc-per-node=N script.py`"

_made = itertools.count()


class ClusterError(RuntimeError):
    """Another rank has failed, has ended, or is somewhere else."""

    #: Seen before the next meeting, where the other rank tells it itself.
    early = False


class Cluster:
    """The processes of torch's default process group.

    Parameters
    ----------
    device
        Where the model is.

    Attributes
    ----------
    rank, size
        Which of how many processes this is.

    Raises
    ------
    RuntimeError
        If there is no process group, or two processes have a model on the same GPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"cluster=True needs several processes: {START}")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # messages and tensors on the CPU do not wait for a GPU, nor end with its time limit
        self._group = dist.new_group(backend="gloo", timeout=WAIT)
        self._store: Any = getattr(dist.distributed_c10d, "_get_default_store", lambda: None)()
        self._id, self._failures, self._looked = next(_made), 0, 0.0
        self._depth, self._failing = 0, False
        if device is not None and device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            places = [tuple(p) for p in self.meet("devices", [socket.gethostname(), index])]
            if len(set(places)) < len(places):
                raise RuntimeError(
                    f"expected a GPU for every rank; got {places} for ranks 0 to {self.size - 1}. "
                    "Move the model to torch.device('cuda', int(os.environ['LOCAL_RANK']))"
                )

    @classmethod
    def of(cls, wanted: Cluster | bool, device: torch.device) -> Cluster:
        """A cluster as it is, or that of the processes that ``torchrun`` has started."""
        if isinstance(wanted, Cluster):
            return wanted
        if not dist.is_available():
            raise RuntimeError("cluster=True needs a torch that was built with torch.distributed")
        if not dist.is_initialized():
            if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
                raise RuntimeError(
                    f"cluster=True, but this process is alone: {START}, or leave cluster= out. Or "
                    "call torch.distributed.init_process_group before"
                )
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_end)
        return cls(device)

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which shows progress and writes what is there once."""
        return self.rank == 0

    def share(self, n: int, rank: int | None = None) -> slice:
        """The rows of a rank, by default this one, among n; none if there are too few."""
        at = self.rank if rank is None else rank
        return slice(n * at // self.size, n * (at + 1) // self.size)

    def assign(self, costs: Sequence[float]) -> list[int]:
        """The rank for each of some tasks."""
        return assign(costs, self.size)

    # --- meetings --------------------------------------------------------------------------------

    def meet(self, what: str, value: Any = None) -> list[Any]:
        """What every rank has to say, for JSON; waits until all have come.

        Raises
        ------
        ClusterError
            If a rank has failed meanwhile, or is somewhere else.
        """
        return self._meet(what, value, None)

    def tell(self, what: str, value: Any = None) -> Any:
        """What rank 0 has to say."""
        return self.meet(what, value if self.main else None)[0]

    def same(self, values: Mapping[str, Any], what: str) -> None:
        """Refuse values that are not the same on all ranks.

        Raises
        ------
        ValueError
            On every rank; it names what differs, and on which ranks.
        """
        every = self.meet(what, dict(values))
        told: list[str] = []
        for name in dict.fromkeys(name for one in every for name in one):
            ranks: dict[str, list[int]] = {}
            for rank, one in enumerate(every):
                ranks.setdefault(json.dumps(one.get(name)), []).append(rank)
            if len(ranks) > 1:
                there = "; ".join(f"{_ranks(r)}: {_short(v)}" for v, r in ranks.items())
                told.append(f"{name} ({there})")
        if told:
            raise ValueError(
                f"expected the same {what} on all ranks; they differ in {', '.join(told)}. Every "
                "rank loads the same model and the same rows in the same order, with the same "
                "seeds"
            )

    @contextmanager
    def together(self, what: str) -> Generator[None]:
        """A block that all ranks leave well, or none: with an error each."""
        self._depth += 1
        try:
            yield
            self.meet(f"the end of {what}")
        except Exception as error:
            if not self._failing:
                self._fail(error, what)
            raise
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._failing = False

    def watch(self) -> None:
        """Stop a long piece of work if another rank has failed."""
        if self._store is None or time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        if self._store.check([self._key]):
            error = ClusterError(self._store.get(self._key).decode())
            error.early = True
            raise error

    @property
    def _key(self) -> str:
        return f"upweight/{self._id}/{self._failures}"

    def _fail(self, error: Exception, what: str) -> None:
        told, early = f"{type(error).__name__}: {error}", getattr(error, "early", False)
        if self._store is not None and not early:
            self._store.set(self._key, f"rank {self.rank} has stopped: {told}")
        with suppress(ClusterError):  # if there is no one left, what went wrong here is told
            self._meet(f"the end of {what}", early, told)

    def _meet(self, what: str, value: Any, error: str | None) -> list[Any]:
        found = self._gathered({"what": what, "value": value, "error": error})
        failed = {rank: one for rank, one in enumerate(found) if one["error"] is not None}
        if failed:
            self._failing, self._failures = self._depth > 0, self._failures + 1
            if error is not None:
                return []
            first = {r: one for r, one in failed.items() if one["value"] is not True} or failed
            raise ClusterError(
                "; ".join(f"rank {r} has stopped: {one['error']}" for r, one in first.items())
            )
        if len({one["what"] for one in found}) > 1:
            self._failing = self._depth > 0
            places = ", ".join(f"rank {r} at {one['what']!r}" for r, one in enumerate(found))
            raise ClusterError(
                f"expected all ranks at the same place; got {places}. Every rank makes the same "
                "calls in the same order: none of them inside `if rank == 0`"
            )
        return [one["value"] for one in found]

    def _gathered(self, message: Any) -> list[Any]:
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._telling():
            dist.all_gather(lengths, torch.tensor([len(text)]), group=self._group)
            longest = max(int(length) for length in lengths)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(text)] = text
            texts = [torch.zeros_like(padded) for _ in lengths]
            dist.all_gather(texts, padded, group=self._group)
        found = zip(texts, lengths, strict=True)
        return [json.loads(x[: int(length)].numpy().tobytes()) for x, length in found]

    @contextmanager
    def _telling(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            self._failing = self._depth > 0  # there is no one left to agree with
            raise ClusterError(
                "another rank has ended, or cannot be reached; look at its output, and start all "
                f"of them again ({str(error).splitlines()[0]})"
            ) from error

    # --- tensors ---------------------------------------------------------------------------------

    def add(self, tensors: Sequence[Tensor], what: str) -> None:
        """Put the sums over all ranks in place of tensors, to the same bits everywhere."""
        shapes = self.meet(what, [list(tensor.shape) for tensor in tensors])
        if any(shape != shapes[0] for shape in shapes):
            raise ClusterError(f"expected tensors of the same shapes on all ranks for {what}")
        for bucket in _buckets(tensors):
            sizes = [tensor.numel() for tensor in bucket]
            with self._telling():
                flat = bucket[0].contiguous().flatten()
                if len(bucket) > 1:
                    flat = torch.cat([tensor.flatten() for tensor in bucket])
                # the order of summands may be another on every rank
                dist.all_reduce(flat, group=self._of(flat))
                self._send(flat, 0)
                for tensor, part in zip(bucket, flat.split(sizes), strict=True):
                    if tensor.data_ptr() != part.data_ptr():
                        tensor.copy_(part.reshape(tensor.shape))

    def spread(
        self,
        costs: Sequence[float],
        function: Callable[[int], Sequence[Tensor]],
        device: torch.device,
        what: str,
    ) -> list[list[Tensor]]:
        """``function(at)`` for each task, each done by one rank, with results on all of them."""
        owners = self.assign(costs)
        own: dict[int, list[Tensor]] = {}
        for at, owner in enumerate(owners):
            if owner == self.rank:
                self.watch()
                own[at] = [tensor.contiguous() for tensor in function(at)]
        told = self.meet(what, {at: [_form(t) for t in found] for at, found in own.items()})
        results: list[list[Tensor]] = []
        for at, owner in enumerate(owners):
            found = own.get(at) or [_empty(f, device) for f in told[owner][str(at)]]
            for tensor in found:
                with self._telling():
                    self._send(tensor, owner)
            results.append(found)
        return results

    def gather_rows(self, own: Tensor, what: str) -> Tensor:
        """The rows (n_r, …) of all ranks in order, (n, …), on each of them."""
        forms = self.meet(what, _form(own))
        parts: list[Tensor] = []
        for rank, form in enumerate(forms):
            part = own.cpu().contiguous() if rank == self.rank else _empty(form, own.device, "cpu")
            with self._telling():
                self._send(part, rank)
            parts.append(part)
        filled = [part for part in parts if len(part)] or parts[:1]
        return torch.cat(filled).to(own.device)

    def _of(self, tensor: Tensor) -> Any:
        return self._group if tensor.device.type == "cpu" else None

    def _send(self, tensor: Tensor, owner: int) -> None:
        """From the owner to all others, as bytes: not every backend knows every dtype."""
        if tensor.numel():
            data = tensor.view(-1).view(torch.uint8)
            dist.broadcast(data, owner, group=self._of(tensor))

    def __repr__(self) -> str:
        return f"<Cluster: rank {self.rank} of {self.size}>"


def assign(costs: Sequence[float], size: int) -> list[int]:
    """Which of `size` ranks does each task: the most expensive first, to the least loaded.

    Examples
    --------
    >>> assign([1.0, 8.0, 1.0, 4.0, 3.0], 2)
    [1, 0, 0, 1, 1]
    """
    loads, owners = [0.0] * size, [0] * len(costs)
    for at in sorted(range(len(costs)), key=lambda at: (-costs[at], at)):
        owners[at] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owners[at]] += costs[at]
    return owners


def _buckets(tensors: Sequence[Tensor]) -> Generator[list[Tensor]]:
    """Small tensors of one dtype and device together, large ones alone."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.numel():
            continue
        held = kinds.setdefault((tensor.dtype, tensor.device), [])
        if held and sum(t.nbytes for t in held) + tensor.nbytes > BUCKET_BYTES:
            yield held
            held = kinds[tensor.dtype, tensor.device] = []
        held.append(tensor)
    yield from (held for held in kinds.values() if held)


def _form(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def _empty(form: Sequence[Any], device: torch.device, place: str | None = None) -> Tensor:
    return torch.empty(form[0], dtype=getattr(torch, form[1]), device=place or device)


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:56]} …"


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
