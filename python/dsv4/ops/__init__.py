"""The ops of DeepSeek-V4's layers: `dsv4.ops.<op>` calls `torch.ops.dsv4.<op>`; `dsv4.ops.<op>_reference` is its
definition in plain torch.

Every module beside this one whose name has no leading underscore is one family of ops; its `__all__`, if it has one, is
public here. So a new family is a new file and no edit of this one.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from dsv4.ops._registry import implementations, use_reference

__all__ = ["implementations", "use_reference"]

for _module in sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")):
    _family = importlib.import_module(f"{__name__}.{_module}")
    for _name in getattr(_family, "__all__", ()):
        globals()[_name] = getattr(_family, _name)
        __all__.append(_name)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
