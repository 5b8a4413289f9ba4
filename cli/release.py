"""Taking a volume away from a cache that is gone: the operator's word, never ours.

Two steps at the store: a writable open that accepts the loss (epoch + 1 fences the holder), and a
close.  A crash between them leaves the volume open at nobody's id: the same command again.
"""

from typing import Any

from millpond.cli.run import BUSY, CommandError
from millpond.store.catalogue import new_id
from millpond.store.client import StoreClient
from millpond.store.transfer import new_lineage


def is_held(volume: dict[str, Any]) -> bool:
    """Some cache has it open, or may hold writes that the store has not."""
    return bool(volume["open_holder"] or volume["dirty_holder"])


async def release(client: StoreClient, volume: dict[str, Any]) -> dict[str, Any]:
    """Give it to nobody; what its holder has not shipped is lost.  The volume.  StoreError."""
    identity = {"id": volume["id"], "cache_id": new_id().hex()}
    opened = await client.call(
        "volume.open",
        **identity,
        lineage=new_lineage(),
        first_sequence=None,
        expected_epoch=volume["epoch"],
        accept_loss=True,
    )
    epoch = opened["volume"]["epoch"]
    closed = await client.call("volume.close", **identity, epoch=epoch)
    return dict(closed["volume"])


def refusal(volume: dict[str, Any]) -> CommandError:
    """Without that word."""
    holder = volume["dirty_holder"] or volume["open_holder"]
    may_hold = "may hold writes" if volume["dirty_holder"] else "may have guests that use it"
    return CommandError(
        f"volume '{volume['name']}' is open at cache {holder}, which {may_hold}: stop that cache"
        " and its guests, or if it is gone for good, give up what it had with --accept-loss",
        exit_code=BUSY,
    )
