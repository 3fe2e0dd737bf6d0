"""Variable-length image coding and generation: DQVAE++ tokenizers and DGiT generators."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graincode.api import as_images, load_generator, load_tokenizer
    from graincode.core.codes import GrainCodes
    from graincode.core.errors import GraincodeError
    from graincode.core.layout import CodeLayout
    from graincode.core.prompts import CodeMask, CodePrefix

__all__ = [
    "CodeLayout", "CodeMask", "CodePrefix", "GrainCodes", "GraincodeError", "as_images", "load_generator",
    "load_tokenizer",
]  # fmt: skip

_MODULES = {"CodeLayout": "core.layout", "GrainCodes": "core.codes", "GraincodeError": "core.errors"}
_MODULES |= dict.fromkeys(("CodeMask", "CodePrefix"), "core.prompts")
_MODULES |= dict.fromkeys(("as_images", "load_generator", "load_tokenizer"), "api")


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: `import graincode` alone imports no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """The public names, for completion."""
    return [*globals(), *__all__]
