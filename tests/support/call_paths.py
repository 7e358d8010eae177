"""Which functions of the package are entered, in which files: how far a reader must go to follow a call."""

import sys
from contextlib import contextmanager
from pathlib import Path

import lightning_onebit

ROOT = Path(lightning_onebit.__file__).parent


class Entered:
    """Functions of the package that this thread enters within :meth:`recording`, as ``(file, name, first line)``.

    Lambdas and comprehensions belong to the function that they are written in.
    """

    def __init__(self):
        self.functions = set()

    @contextmanager
    def recording(self):
        before = sys.getprofile()
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(before)

    def _note(self, frame, event, _):
        code = frame.f_code
        if event == "call" and not code.co_name.startswith("<"):
            file = Path(code.co_filename)
            if file.is_relative_to(ROOT):
                self.functions.add((str(file.relative_to(ROOT)), code.co_name, code.co_firstlineno))

    def within(self, *folders):
        """Of :attr:`functions`, those of some sub-packages."""
        return {function for function in self.functions if function[0].split("/")[0] in folders}


def files(functions):
    return {file for file, *_ in functions}
