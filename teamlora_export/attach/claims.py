"""What the products of a graph are said to be, by their names and by their places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from teamlora_export.attach.names import ROLES, Key, keys_of
from teamlora_export.attach.place import UNSPLIT, find_places
from teamlora_export.attach.products import Product, Span
from teamlora_export.attach.stored import name_of

NAME, PLACE = "name", "place"
_MOST_SHOWN = 4


class Claims:
    """What products are said to be.

    Attributes:
        spans: of each projection of a layer. packed: of several that are packed into one product.
        evidence: what says so, of each product.
        disputed: what is wrong with a product that is said to be two things, by each of these.
        unsplit: why it is not known where in a packed product a projection is. unproven: the same of one whose span
            is a guess.

    Args:
        widths: columns of each projection that is looked for.
    """

    def __init__(self, products: Sequence[Product], widths: Mapping[Key, int]) -> None:
        self.spans: dict[Key, list[Span]] = defaultdict(list)
        self.packed: dict[Key, list[Span]] = defaultdict(list)
        self.evidence: dict[Product, tuple[str, ...]] = {}
        self.disputed: dict[Key, str] = {}
        self.unsplit: dict[Key, str] = {}
        self.unproven: dict[Key, str] = {}
        self._widths = widths
        places = find_places(products)
        for product in products:
            self._add(product, places.get(product))

    def _add(self, product: Product, placed: Key | None) -> None:
        named = {key for each in keys_of(product.names) if (key := self._known(each)) is not None}
        if placed is not None and placed.layer is None and named:
            # A head has a name of each architecture's own.
            placed = None
        if placed is None and not named:
            return
        evidence = (*([NAME] if named else []), *([PLACE] if placed is not None else []))
        whole = Span(product, 0, product.out_features)
        added = {key for key in named if placed is not None and adds_to(key, placed)}
        said = named - added | ({placed} if placed is not None else set())
        # Several in one: a module that has them in one as well may be it, whatever their order.
        inner = [Key(key.layer, UNSPLIT[key.roles]) for key in [placed] if key is not None and key.roles in UNSPLIT]
        said -= set(inner)
        if len(said) > 1:
            self._dispute(product, placed, named, {*said, *added, *inner})
            return
        self.evidence[product] = evidence
        for key in {*said, *added}:
            (self.packed if len(key.roles) > 1 else self.spans)[key].append(whole)
        for key in inner:
            self.packed[key].append(whole)
            self._split(product, key, is_placed=False)
        for key in said:
            if len(key.roles) > 1:
                self._split(product, key, placed is not None)

    def _dispute(self, product: Product, placed: Key | None, named: set[Key], said: Iterable[Key]) -> None:
        names = f"its names say {listed(named)}" if named else ""
        text = f"{name_of(product.node)}: {names}" + (f" and its place {placed}" if placed is not None else "")
        for key in said:
            for single in (key, *singles(key)):
                self.disputed[single] = text

    def _known(self, key: Key) -> Key | None:
        """What a name says, if that is a projection; a module outside of the layers may have more words in front."""
        if key in self._widths or set(key.roles) <= set(ROLES):
            return key
        words = key.roles[0].split(".")
        shorter = (Key(None, (".".join(words[start:]),)) for start in range(1, len(words)))
        return next((each for each in shorter if each in self._widths), None) if key.layer is None else None

    def _split(self, product: Product, key: Key, is_placed: bool) -> None:
        """Where in a packed product each projection is."""
        sizes = [part.end - part.start for part in product.parts]
        if len(sizes) != len(key.roles):
            sizes = [self._widths.get(single, 0) for single in singles(key)]
        packs = f"{name_of(product.node)} packs {key}, and"
        is_known = sum(sizes) == product.out_features and 0 not in sizes
        start = 0
        for single, size in zip(singles(key), sizes, strict=True):
            if not is_known:
                self.unsplit[single] = f"{packs} does not show where each begins"
                continue
            self.spans[single].append(Span(product, start, start + size))
            start += size
            if not is_placed and len(set(sizes)) < len(sizes):
                self.unproven[single] = f"{packs} has parts of one size, whose order nothing proves"


def adds_to(named: Key, placed: Key) -> bool:
    """Whether a name does not say what a place says, and contradicts it neither: words of a module's own; or several
    projections in one, whose order the place shows."""
    is_own = not set(named.roles) <= set(ROLES)
    return named.layer == placed.layer and (is_own or UNSPLIT.get(named.roles) == placed.roles)


def singles(key: Key) -> list[Key]:
    """Each of the projections that a key is of."""
    return [Key(key.layer, (role,)) for role in key.roles]


def listed(items: Iterable[object]) -> str:
    """A few of them, for a message."""
    shown = [str(item) for item in items]
    rest = len(shown) - _MOST_SHOWN
    return ", ".join(shown[:_MOST_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
