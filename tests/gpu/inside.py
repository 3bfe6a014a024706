"""A look at every operation, also at those inside the package's own operators."""

from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Inside(TorchDispatchMode):
    """Shows ``seen`` each operation with the tensors that go in and come out.

    A mode does not see what an operator of the package does: it runs its own code here instead.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "equireg":
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), result))
        self.seen(function, given, made)
        return result

    def seen(self, function: Any, given: list[Tensor], made: list[Tensor]) -> None:
        raise NotImplementedError
