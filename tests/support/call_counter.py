"""Which functions of the package are entered between two moments, in all threads: how long a way is, for a reader.

What counts as a function of its own is what a reader has to look up: functions and methods that are written out, nested ones
too, each once, however often it is entered or resumed. These do not:

* getters of properties, cached ones too: they read like attributes;
* what dataclasses and named tuples generate: there is no source to read;
* comprehensions, generator expressions and lambdas: they stand in the function that is being read;
* bodies of modules and classes, should something be imported on the way;
* counters and statistics, see :data:`STATISTICS`: they are beside the way.
"""

import functools
import inspect
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import lightning_onebit

ROOT = Path(lightning_onebit.__file__).parent

STATISTICS = (
    "comm/stats.py", "Communicator._count", "Communicator._counting", "Exchange.seconds",
    "CompressedOptimizer._count_waits", "comm/watch.py", "Communicator._carry_out",
)  # fmt: skip
"""Files, and qualified names, of what only counts, or only notes which places a rank has passed."""


class Function(NamedTuple):
    file: str
    """Relative to the package."""
    name: str
    """Qualified, from Python 3.11 on; before, with the line, as names may repeat."""


class CallCounter:
    """Within ``with CallCounter() as counter``, notes what is entered while :meth:`start` and :meth:`stop` want it noted.

    Threads started within are watched from their beginning. Older ones cannot be, but for that which enters: so enter before
    the training starts, also if only one step of it is of interest.
    """

    def __init__(self):
        self._codes = set()
        self._noting = False

    def __enter__(self):
        self._previous = sys.getprofile(), threading.getprofile()
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_):
        sys.setprofile(self._previous[0])
        threading.setprofile(self._previous[1])
        self._noting = False  # threads that are still there keep the profile function

    def start(self):
        """Forget what was noted, and note from now on."""
        self._codes = set()
        self._noting = True

    def stop(self):
        """Stop noting, and return the functions, sorted."""
        self._noting = False
        getters = _getters()
        functions = {_function(code) for code in self._codes if code not in getters and _is_written_out(code)}
        return sorted(f for f in functions if f.file not in STATISTICS and f.name not in STATISTICS)

    @contextmanager
    def noting(self):
        """Note within; yields a list that holds the functions afterwards."""
        functions = []
        self.start()
        try:
            yield functions
        finally:
            functions.extend(self.stop())

    def _profile(self, frame, event, _):
        if self._noting and event == "call":
            self._codes.add(frame.f_code)


def files(functions):
    """The files that hold these functions, sorted."""
    return sorted({f.file for f in functions})


def listed(functions):
    """For messages: files, with the functions of each."""
    names = {file: [f.name for f in functions if f.file == file] for file in files(functions)}
    lines = "\n".join(f"  {file}: {', '.join(found)}" for file, found in names.items())
    return f"{len(functions)} functions in {len(names)} files:\n{lines}"


def _is_written_out(code):
    of_package = Path(code.co_filename).is_relative_to(ROOT)
    return of_package and bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")


def _function(code):
    name = getattr(code, "co_qualname", f"{code.co_name}:{code.co_firstlineno}")
    return Function(Path(code.co_filename).relative_to(ROOT).as_posix(), name.replace("<locals>.", ""))


def _getters():
    """Code of all getters of properties in the modules of the package that are loaded."""
    modules = [m for name, m in list(sys.modules.items()) if m and name.split(".")[0] == lightning_onebit.__name__]
    classes = {c for module in modules for c in vars(module).values() if isinstance(c, type)}
    attributes = [attribute for c in classes for attribute in vars(c).values()]
    getters = [a.fget for a in attributes if isinstance(a, property)]
    getters += [a.func for a in attributes if isinstance(a, functools.cached_property)]
    return {inspect.unwrap(getter).__code__ for getter in getters if inspect.isfunction(inspect.unwrap(getter))}
