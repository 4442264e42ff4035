"""The federation's certificates: made by the coordinator, checked by every participant.

An authority (CA) signs the coordinator's server certificate and one certificate per node. Flower
uses the server's for TLS and a node's key, registered at the coordinator, to authenticate the node.
A node's certificate binds that key to the number of its client, and says until when.
"""

from fedpdm.deployment.certificates.files import CertificateError
from fedpdm.deployment.certificates.making import (
    make_authority,
    make_node,
    make_request,
    make_server,
    sign_request,
)
from fedpdm.deployment.certificates.reading import NodeCertificate, read_node_certificate

__all__ = [
    "CertificateError",
    "NodeCertificate",
    "make_authority",
    "make_node",
    "make_request",
    "make_server",
    "read_node_certificate",
    "sign_request",
]
