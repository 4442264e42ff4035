"""What travels between server and clients: named tensors of known types, and nothing else.

`from fedpdm import wire` gives the messages; `wire.quantize` is for fewer bits per number,
`wire.summands` and `wire.totals` for secure aggregation. It imports `privacy`, `storage` and
`config`; `setup` and everything above may import it.
"""

from fedpdm.wire import messages, metrics
from fedpdm.wire.messages import *  # noqa: F403
from fedpdm.wire.metrics import *  # noqa: F403
from fedpdm.wire.types import WireError as WireError

__all__ = [*messages.__all__, *metrics.__all__, "WireError"]
