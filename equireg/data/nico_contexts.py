"""Which contexts of NICO each class is trained in, from head to tail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from equireg._checks import Arguments
from equireg.data.drawn import drawn_order

# From head to tail, as Wang et al. (2021) published them; the other three of a class are in no training image.
_PUBLISHED = {
    "bear": "in_forest black brown eating_grass in_water lying on_snow",
    "bird": "on_ground in_hand on_branch flying eating on_grass standing",
    "cat": "on_snow at_home in_street walking in_river in_cage eating",
    "cow": "in_river lying standing eating in_forest on_grass on_snow",
    "dog": "on_grass in_water in_cage eating on_beach lying running",
    "elephant": "in_zoo in_circus in_forest in_river eating standing on_grass",
    "horse": "on_beach aside_people running lying on_grass on_snow in_forest",
    "monkey": "sitting walking in_water on_snow in_forest eating on_grass",
    "rat": "at_home in_hole in_cage in_forest in_water on_grass eating",
    "sheep": "eating on_road walking on_snow on_grass lying in_forest",
}


def context_name(folder: str) -> str:
    """``on grass`` and ``On-grass`` are ``on_grass``."""
    return folder.lower().replace(" ", "_").replace("-", "_")


def training_orders(
    args: Arguments,
    sizes: dict[str, dict[str, int]],
    setting: str,
    given: Mapping[str, Sequence[str]] | None,
    seed: int,
) -> dict[str, list[str]]:
    """The contexts of each class in training, from head to tail."""
    for name, contexts in sizes.items():
        if len(contexts) < 2:
            args.fail(f"class {name!r}", "in two contexts or more", sorted(contexts))
    if given is not None:
        if set(given) != set(sizes):
            args.fail("training_contexts", f"given for the classes {sorted(sizes)}", sorted(given))
        orders = {name: [context_name(context) for context in given[name]] for name in sizes}
        for name, order in orders.items():
            unknown = sorted(set(order) - set(sizes[name]))
            if unknown or not order or len(set(order)) < len(order):
                got = f"{unknown[0]!r} of {name!r}" if unknown else order
                args.fail("training_contexts", f"different ones of {sorted(sizes[name])}", got)
    else:
        orders = {name: _PUBLISHED.get(name, "").split() for name in sizes}
        if not all(order and set(order) <= set(sizes[name]) for name, order in orders.items()):
            orders = _chosen(sizes, seed)
    if setting in ("adjusting", "zero-shot"):
        return orders
    if setting == "orthogonal":
        return {name: order + sorted(set(sizes[name]) - set(order)) for name, order in orders.items()}
    frequency: dict[str, int] = {}
    for contexts in sizes.values():
        for context in contexts:
            frequency[context] = frequency.get(context, 0) + 1
    return {name: sorted(contexts, key=lambda c: (-frequency[c], c)) for name, contexts in sizes.items()}


def _chosen(sizes: dict[str, dict[str, int]], seed: int) -> dict[str, list[str]]:
    """A head of its own for each class, and seven in ten contexts to train on."""
    heads = _heads(sizes)
    orders = {}
    for name, contexts in sizes.items():
        rest = sorted(set(contexts) - {heads[name]})
        rest = [rest[place] for place in drawn_order([f"{name} {context}" for context in rest], seed)]
        trained = max(1, min(len(contexts) - 1, round(0.7 * len(contexts))))
        # Heads of other classes go to the tail, as in the published order.
        orders[name] = [heads[name], *sorted(rest[: trained - 1], key=lambda c: c in heads.values())]
    return orders


def _heads(sizes: dict[str, dict[str, int]]) -> dict[str, str]:
    """The head of each class, large contexts first, different for each class if possible (augmenting paths)."""
    wishes = {name: sorted(contexts, key=lambda c: (-contexts[c], c)) for name, contexts in sizes.items()}
    owner: dict[str, str] = {}

    def give(name: str, tried: set[str]) -> bool:
        for context in wishes[name]:
            if context not in tried:
                tried.add(context)
                if context not in owner or give(owner[context], tried):
                    owner[context] = name
                    return True
        return False

    for name in wishes:
        give(name, set())
    heads = {name: context for context, name in owner.items()}
    for name in wishes:  # more classes than contexts
        if name not in heads:
            used = list(heads.values())
            heads[name] = min(wishes[name], key=used.count)
    return heads
