"""A matrix on its way to disk, in shards that survive the end of the process."""

from upweight.shards.digests import digest_batches, digest_names, digest_rows
from upweight.shards.store import ShardStore, refuse_existing, sizes

__all__ = [
    "ShardStore",
    "digest_batches",
    "digest_names",
    "digest_rows",
    "refuse_existing",
    "sizes",
]
