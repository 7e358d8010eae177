"""Run a Python script as a forked process, which finds imported what this one has: seconds less than a new interpreter.

What the script starts itself, it starts as ever: the other ranks of a Trainer are new interpreters that run the script.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Script:
    """``python script arguments...``, started at once. Standard output and error go to one text.

    Args:
        script: its path, or the name of a module, as after ``python -m``.
        arguments: of the command line.
        cwd: where it runs.
        variables: of the environment, beside those of this process.
    """

    def __init__(self, script, *arguments, cwd, **variables):
        self._output = Path(cwd) / f"output-{os.urandom(4).hex()}"
        context = multiprocessing.get_context("fork")
        arguments = (script, list(map(str, arguments)), cwd, self._output, variables)
        self._process = context.Process(target=_main, args=arguments)
        self._process.start()

    def wait(self, timeout=110):
        """The exit code, and what was printed.

        Raises:
            AssertionError: if it does not end in time, with what was printed until then.
        """
        self._process.join(timeout)
        hangs = self._process.is_alive()
        if hangs:
            self._process.kill()
            self._process.join()
        output = self._output.read_text(encoding="utf-8")
        self._output.unlink()
        assert not hangs, f"not done within {timeout} s: {output}"
        return self._process.exitcode, output


def _main(script, arguments, cwd, output, variables):
    gc.freeze()  # as in ranks.py
    atexit._clear()  # the handlers so far are of the parent
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.update({"PYTHONPATH": paths, **variables})
    os.chdir(cwd)
    with open(output, "w", encoding="utf-8", buffering=1) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        sys.argv = [str(script), *arguments]
        code = 0
        try:
            if Path(script).exists():
                sys.path.insert(0, str(Path(script).parent))
                runpy.run_path(str(script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
            code = 1
        if not isinstance(code, int):  # a message, as sys.exit takes it
            print(code or "", file=file)
            code = int(code is not None)
        atexit._run_exitfuncs()  # Lightning's launcher waits there for the ranks that it has started
        file.flush()
        os._exit(code)
