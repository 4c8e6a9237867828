"""Tables that follow from a module's arguments."""

from typing import Any

import torch
from torch import Tensor


class Constants:
    """Mix-in for a module with tables that are not in its state dict, and are filled anew wherever the module moves.

    ``to_empty``, after the meta device for example, would leave them without values, and no state dict could give
    them back.
    """

    def register_constant(self, name: str, table: Tensor) -> None:
        """Add a table, made on the CPU, as a buffer that is not saved."""
        vars(self).setdefault("_tables", {})[name] = table
        module: Any = self
        module.register_buffer(name, table, persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)  # type: ignore[misc]
        for name, table in vars(self).get("_tables", {}).items():
            buffer = getattr(self, name)
            if not buffer.is_meta:
                with torch.no_grad():
                    buffer.copy_(table)
        return self
