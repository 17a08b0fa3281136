"""The connections that have not shown the token: few at a time, and the oldest makes room.

A connection is a guest until the first request with the token, which arrives with the connection
where its sender is a friend. So guests need no long stay, and a newcomer is never turned away for
them: however many idle connections strangers open, a client with the token gets in.
"""

from collections import Counter
from collections.abc import Callable, Hashable


class Guests:
    """The guests of one server, oldest first. Lives on an event loop."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self.most = most
        self.most_per_address = most_per_address
        self._guests: dict[Hashable, tuple[str, Callable[[], None]]] = {}
        self._by_address: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._guests)

    def enter(self, guest: Hashable, address: str, show_out: Callable[[], None]) -> None:
        """Take a connection in.

        show_out: called where it must make room for another
        """
        if self._by_address[address] >= self.most_per_address:
            self._end_oldest(address)
        elif len(self._guests) >= self.most:
            # of the address that has most: a flood from one address ends only its own
            self._end_oldest(self._by_address.most_common(1)[0][0])
        self._guests[guest] = (address, show_out)
        self._by_address[address] += 1

    def leave(self, guest: Hashable) -> None:
        """Forget a connection that has shown the token, or is closed."""
        address, _ = self._guests.pop(guest, (None, None))
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def _end_oldest(self, address: str) -> None:
        oldest = next(guest for guest, (own, _) in self._guests.items() if own == address)
        show_out = self._guests[oldest][1]
        self.leave(oldest)
        show_out()
