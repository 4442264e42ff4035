"""Flower's entry point on a client: builds a `PFDMClient` for each message."""

from __future__ import annotations

from flwr.client import Client, ClientApp
from flwr.common import Context

from clients.local import open_local_client
from clients.pfdm_client import PFDMClient

__all__ = ["app", "client_fn"]


def client_fn(context: Context) -> Client:
    """The client of this node; everything it keeps is in its store on disk."""
    local = open_local_client(dict(context.node_config), dict(context.run_config), context.run_id)
    return PFDMClient(local).to_client()


app = ClientApp(client_fn=client_fn)
