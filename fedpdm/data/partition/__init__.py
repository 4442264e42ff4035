"""The split of one image set over simulated clients, and how it is written down."""

from fedpdm.data.partition.sharing import ClientPartition, partition
from fedpdm.data.partition.tables import partition_record, partition_table

__all__ = [
    "ClientPartition",
    "partition",
    "partition_record",
    "partition_table",
]
