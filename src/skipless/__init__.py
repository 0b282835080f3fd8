"""Remove, exactly, the weights a transformer without skip connections does not need (arXiv:2404.12362).

`skipless.audit(model)` says what can be removed safely, `skipless.fuse(source, destination)` rewrites a model folder,
`skipless.verify(a, b)` proves that nothing changed, and `import skipless.model` lets transformers load the result.
Importing skipless itself loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skipless.errors import InputError
from skipless.version import __version__

if TYPE_CHECKING:
    from skipless.reports.auditing import audit
    from skipless.reports.counting import count
    from skipless.reports.verification import verify
    from skipless.rewrite.fusion import fuse

__all__ = ["InputError", "__version__", "audit", "count", "fuse", "verify"]

_LAZY = {
    "audit": "skipless.reports.auditing",
    "count": "skipless.reports.counting",
    "fuse": "skipless.rewrite.fusion",
    "verify": "skipless.reports.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
