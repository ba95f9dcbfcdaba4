"""Objects that stand before another one, and show all of its members."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")
SHOWING = "_shows_the_members_of"


def standing_before(cls: type[T], inner: Any, at: str) -> T:
    """Return an object of a class, not yet initialised, that also shows the members of another one.

    ``__getattr__`` alone would do for who asks for a member, and not for who asks whether there is
    one: checks of protocols look at the class.

    Args:
        cls: The class.
        inner: Whose members are shown.
        at: The name of the field of the object that holds it.
    """

    def member(name: str) -> property:
        return property(lambda self: getattr(getattr(self, at), name))

    if not hasattr(cls, SHOWING):  # a copy of one with another field is of its class
        shown: dict[str, Any] = {SHOWING: at}
        shown |= {n: member(n) for n in dir(inner) if not (n.startswith("_") or hasattr(cls, n))}
        cls = type(cls.__name__, (cls,), shown)
    return object.__new__(cls)
