"""Shapes as types: `Float[Tensor, "b n d"]` is checked by jaxtyping where it was imported first, as the tests do, and is plain `Tensor` elsewhere.

So a shape stands in every signature, and the field still needs torch alone.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
else:

    class _Unchecked:
        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Float = Int = _Unchecked
