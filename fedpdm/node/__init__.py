"""A participant's side before it joins: what it is given, and whether it may and can take part."""

from fedpdm.node.checking import check_node
from fedpdm.node.network import Handshake, shake_hands
from fedpdm.node.report import Check, NodeReport
from fedpdm.node.settings import NodeSettings, default_store, split_address

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
