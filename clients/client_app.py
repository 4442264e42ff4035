"""Flower's entry point on a client: builds a `PFDMClient` for each message."""

from __future__ import annotations

from flwr.client import Client, ClientApp
from flwr.common import Context

from clients.failures import ClientError, failure_line
from clients.local import is_deployed, open_local_client
from clients.masking import secure_mod
from clients.pfdm_client import PFDMClient

__all__ = ["app", "client_fn"]


def client_fn(context: Context) -> Client:
    """The client of this node; everything it keeps is in its store on disk.

    Flower sends the text of whatever is raised here to the server: see `clients.failures`.
    """
    node = dict(context.node_config)
    try:
        return PFDMClient(
            open_local_client(node, dict(context.run_config), context.run_id)
        ).to_client()
    except Exception as error:
        if not is_deployed(node):
            raise
        who = f"client {node.get('partition-id', 'without a partition-id')}"
        raise ClientError(failure_line(error, who=who, deployed=True)) from None


app = ClientApp(client_fn=client_fn, mods=[secure_mod])
