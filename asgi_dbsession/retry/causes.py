"""What an exception came from."""

from collections.abc import Iterator


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, its causes and contexts, and the members of groups among them; each once.

    `raise error from error` makes a circle, so what was seen is remembered.
    """
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += (each.__context__, each.__cause__)
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions
