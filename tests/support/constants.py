"""What the code has for a number, by the name under which documents have it."""

import importlib
import inspect
from datetime import timedelta
from typing import Any


def value_of(name: str) -> float:
    """Seconds, bytes or a number. name: `module:NAME`, `module:Class.field`, or a default: `module:name.parameter`."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        fields = getattr(found, "__dataclass_fields__", None) or getattr(found, "model_fields", {})
        if part in fields:
            found = fields[part].default
        elif inspect.isroutine(found) or (inspect.isclass(found) and not hasattr(found, part)):
            found = inspect.signature(found).parameters[part].default
        else:
            found = getattr(found, part)
    if isinstance(found, timedelta):
        return found.total_seconds()
    return found / 1000 if path.endswith("_MS") else found
