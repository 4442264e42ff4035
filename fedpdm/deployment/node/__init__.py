"""A participant's side before it joins: what it is given, and whether it may and can take part."""

from fedpdm.deployment.node.checking import check_node
from fedpdm.deployment.node.network import Handshake, shake_hands
from fedpdm.deployment.node.report import Check, NodeReport
from fedpdm.deployment.node.settings import NodeSettings, default_store, split_address

__all__ = [
    "Check",
    "Handshake",
    "NodeReport",
    "NodeSettings",
    "check_node",
    "default_store",
    "shake_hands",
    "split_address",
]
