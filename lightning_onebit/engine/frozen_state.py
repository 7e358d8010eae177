"""What ``optimizer.state`` is in the compressed phase: empty, as state is held in flat buckets. Whoever looks is told so."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NoReturn


class FrozenState(defaultdict[Any, Any]):
    """Takes the place of a stock optimizer's ``state``, and notes what user code does to it."""

    was_cleared = False
    """Whether user code wants to begin with a fresh state."""

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            "`optimizer.state` is empty in the compressed phase, where state is held in another form. HINT: read"
            " `optimizer.state_dict()`, which is that of a stock optimizer; to change state, replace it all by"
            " `optimizer.load_state_dict(...)`, or call `strategy.resume_warmup()` before."
        )

    def _refuse_if_untouched(self) -> None:
        """User code asks for an entry that a stock optimizer would have: "none" would be wrong, and half of a reset."""
        if not self and not self.was_cleared:
            self._refuse()

    def __missing__(self, key: Any) -> NoReturn:
        self._refuse()

    def __contains__(self, key: object) -> bool:
        self._refuse_if_untouched()
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._refuse_if_untouched()
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self._refuse_if_untouched()
        return super().pop(key, *default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        self._refuse_if_untouched()
        return super().setdefault(key, default)

    def __delitem__(self, key: Any) -> None:
        self._refuse_if_untouched()
        super().__delitem__(key)

    def __copy__(self) -> defaultdict[Any, Any]:  # type: ignore[override]
        return defaultdict(dict, self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are ordinary ones."""
        return defaultdict, (dict, dict(self))

    def clear(self) -> None:
        """Under DDP a reset of the optimizer: it is noted."""
        super().clear()
        self.was_cleared = True
