"""What is checked before several ranks work on the same model and rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from upweight.checks import form_of_rows
from upweight.shards import digest_batches, digest_names, digest_rows

if TYPE_CHECKING:
    from upweight.cluster import Cluster
    from upweight.risk import EmpiricalRisk

__all__ = ["check_ranks", "check_unwrapped", "check_whole"]

# Rows that every rank makes a digest of. Of each other row two ranks make one.
DIGEST_ROWS = 64


def check_ranks(risk: EmpiricalRisk, cluster: Cluster) -> None:
    """Refuse rows that are not the same on all ranks.

    Each rank makes a digest of its own share and of the one after it, so that rows are read twice
    in all, and of some rows of all shares.
    """
    n, rows = risk.n, risk.rows
    told: dict[str, Any] = {
        "the number of rows": n,
        "the names of rows": digest_names(rows.names),
        "the form of rows": digest_batches([str(form_of_rows(rows))]),
    }
    cluster.same({"parameters and buffers": risk.model.fingerprint()}, "model")
    cluster.same({"chosen parameters": digest_names(risk.model.names)}, "model")
    cluster.same(told, "data")
    spread = sorted({i * (n - 1) // DIGEST_ROWS for i in range(DIGEST_ROWS + 1)})
    content = digest_batches(rows.take([at]) for at in spread)
    cluster.same({"the content of rows": content}, "data")
    few = risk.with_rows(risk.rows.subset(spread[:8]))
    loss = f"{float(few.losses().double().mean()):.5g}"  # of the loss itself there is no digest
    cluster.same({"the loss of some rows": loss}, "loss")
    ranks = [(cluster.rank + one) % cluster.size for one in (0, 1)]
    found = {str(rank): digest_rows(rows, cluster.share(n, rank)) for rank in ranks}
    every = cluster.meet("digests of rows", found)
    for rank in range(cluster.size):
        before = (rank - 1) % cluster.size
        if every[rank][str(rank)] != every[before][str(rank)]:
            share = cluster.share(n, rank)
            raise ValueError(
                f"expected the same data on all ranks; ranks {before} and {rank} have other "
                f"content in rows {share.start} to {share.stop - 1}. Load the same rows in the "
                "same order on every rank, with the same seeds"
            )


def check_whole(model: nn.Module) -> None:
    """Refuse a model of which every rank has but a part."""
    if not isinstance(model, nn.Module):
        return  # that is told where its rows are
    parts = [n for n, p in model.named_parameters() if type(p).__name__ == "DTensor"]
    parts += [n for n, m in model.named_modules() if type(m).__name__.startswith("FullySharded")]
    if parts:
        raise ValueError(
            "expected a whole model on every rank; this one is cut into parts by fully_shard() or "
            f"the like ({', '.join(parts[:3])}), which all ranks gather at every layer: they would "
            "have to pass the same number of batches. Build the model again without it, and load "
            "what torch.distributed.checkpoint.state_dict.get_model_state_dict gives with "
            "StateDictOptions(full_state_dict=True)"
        )


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a model whose forward function waits for other ranks."""
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "expected a model that is not wrapped in DistributedDataParallel, which waits for all "
            "ranks in its forward function. Pass model.module"
        )
