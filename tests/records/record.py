"""What a record of a public loss says; the tests of ``test_records*.py`` are generated from it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from equireg import GridTransform

BATCH = 12  # of every sample input, and the size of no other dimension: so a batch can be cut out of any argument
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)

# Relative to float64 on the same rounded input, the loss and, by its norm, each gradient.
TOLERANCE = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (2e-6, 1e-5),
    torch.float16: (1e-4, 2e-3),
    torch.bfloat16: (1e-4, 1e-2),
}

# Where the layers of a module run in half precision too, their outputs are rounded: to 2^-11, and 2^-8 in bf16.
TOLERANCE_OF_HALF_LAYERS = {torch.float16: (5e-4, 5e-3), torch.bfloat16: (4e-3, 4e-2)}

Arguments = tuple[Any, ...]
Change = Callable[[Arguments], Arguments]

NO_ENTRIES = "outputs without entries"
AS_REFERENCE = "what the reference gives"


@dataclass(frozen=True)
class Refused:
    """A call, or options, that are refused with a message that names the argument and what came."""

    error: type[Exception]
    message: str
    change: Change = lambda args: args
    options: Mapping[str, Any] = field(default_factory=dict)


class Draw:
    """Source of sample inputs of one dtype."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def floats(self, *shape, grad=True, uniform=False):
        """Normal, or uniform in 0.1 .. 1; ``grad``: whether the loss is to give it a gradient."""
        draw = torch.rand if uniform else torch.randn
        values = draw(shape, dtype=torch.float64, generator=self.generator)
        return (0.1 + 0.9 * values if uniform else values).to(self.dtype).requires_grad_(grad)

    def whole(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator)

    def booleans(self, *shape):
        return torch.rand(shape, generator=self.generator) < 0.5

    def labels(self, classes):
        """Of BATCH samples, as many of each class, in any order."""
        return (torch.arange(BATCH) % classes)[torch.randperm(BATCH, generator=self.generator)]

    def indices(self, samples):
        return torch.randperm(samples, generator=self.generator)[:BATCH]

    def elements(self, source, target):
        return GridTransform(self.whole(4, BATCH), self.booleans(BATCH), source, target)


@dataclass(frozen=True)
class Record:
    """One public loss, or ``"name/variant"``, and what every test needs to know of it.

    make: options to the function, or to a new module; what it draws comes from the global generator.
    inputs: positional arguments; those that should get a gradient require one.
    reference: the formula as a loop in float64, of the module's parameters by name and the arguments.
    made_of: of a module's ``parts``, the loss by the formula that they document.
    frozen: places of arguments that never get a gradient.
    refused: wrong calls; ``empty`` and ``one``: what a batch of no and of one sample gives, a number for each output,
        one of the constants above, or a Refused without a change.
    identical, zero: what a batch of equal rows, and one with zero rows give, likewise.
    processes: whether the loss joins the samples of all processes with ``gather_distributed=True`` ("gather"), or
        each process takes its own: those whose mean over processes is that of the batch ("mean"), or not ("local").
    half_module: half precision inputs need a module of half precision, whose layers round.
    streams: built on ``pair_lse``, so tested with the streamed form too.
    same_bits: whatever the strides of the inputs.
    compiles: as a whole, with ``compile_options`` of torch._dynamo.config; where not, ``fullgraph=True`` raises.
    """

    name: str
    make: Callable[..., Callable[..., Any]]
    inputs: Callable[[Draw], Arguments]
    reference: Callable[..., Any]
    refused: Mapping[str, Refused]
    empty: Any
    one: Any
    identical: Any = AS_REFERENCE
    zero: Any = AS_REFERENCE
    made_of: Callable[[Any], Any] | None = None
    frozen: tuple[int, ...] = ()
    processes: str = "local"
    half_module: bool = False
    streams: bool = False
    same_bits: bool = True
    compiles: bool = True
    compile_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def public_name(self) -> str:
        return self.name.split("/")[0]

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Callable[..., Any]:
        """The function or module, for inputs of ``dtype``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loss = self.make(**options)
        if not isinstance(loss, nn.Module):
            return loss
        return loss.to(torch.float32 if dtype in HALF and not self.half_module else dtype)

    def sample(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Arguments:
        return self.inputs(Draw(dtype, seed))

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """Largest relative error of the outputs, and of each gradient."""
        return (TOLERANCE_OF_HALF_LAYERS if self.half_module and dtype in HALF else TOLERANCE)[dtype]


def take(args: Arguments, rows: slice) -> Arguments:
    """Samples ``rows`` of the batch: of every tensor along each dimension that has the size of the batch.

    Results are leaves that require a gradient where the argument does.
    """

    def taken(value):
        if isinstance(value, GridTransform):
            return GridTransform(value.quarter_turns[rows], value.flip[rows].clone(), value.source, value.target)
        if not isinstance(value, torch.Tensor):
            return value
        places = tuple(rows if size == BATCH else slice(None) for size in value.shape)
        return value.detach()[places].clone().requires_grad_(value.requires_grad)

    return tree_map(taken, args)


def split(args: Arguments, rank: int, world: int) -> Arguments:
    """The part of process ``rank`` of ``world``; ``world`` divides BATCH."""
    return take(args, slice(rank * BATCH // world, (rank + 1) * BATCH // world))


def on_floats(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Changes every floating point tensor among the arguments, keeping which of them require a gradient."""

    def changed(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return change(value.detach()).requires_grad_(value.requires_grad)

    return lambda args: tree_map(changed, args)


def replace(place: int, value: Any) -> Change:
    """One argument instead of another; a function is applied to the one there."""

    def change(args):
        new = value(args[place]) if callable(value) else value
        return (*args[:place], new, *args[place + 1 :])

    return change


def leaves(args: Arguments) -> list[torch.Tensor]:
    """The tensors that should get a gradient."""
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    """The floating point tensors of a result."""
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return tuple(part for part in parts if part.is_floating_point())


def refused_type(place: int, name: str, got: str = "torch.int64") -> Refused:
    """Whole numbers where floating point ones belong."""
    return Refused(TypeError, f"{re.escape(name)} must be .*got {got}", replace(place, lambda x: x.detach().long()))
