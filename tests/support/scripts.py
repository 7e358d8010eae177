"""Run a Python script as a forked process, which finds imported what this one has: seconds less than a new interpreter."""

import atexit
import gc
import inspect
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Script:
    """``python script arguments...``, started at once. What it prints to standard output and error goes to one text.

    Python scripts that it starts itself are forked as well: the ranks of a Trainer, the workers of torchrun.

    Args:
        script: its path, or the name of a module, as after ``python -m``.
        arguments: of the command line.
        cwd: where it runs.
        variables: of the environment, beside those of this process.
    """

    def __init__(self, script, *arguments, cwd, **variables):
        self._output = Path(cwd) / f"output-{os.urandom(4).hex()}"
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, **variables}
        command = [str(script), *map(str, arguments)]
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._main, args=(command, cwd, environment))
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

    def _main(self, command, cwd, environment):
        subprocess.Popen = ForkedPopen
        with open(self._output, "wb") as file:
            _become(command, cwd, environment, stdout=file.fileno(), stderr=file.fileno())


class ForkedPopen(subprocess.Popen):
    """Forks where the command is Python with a script."""

    def _execute_child(self, *args):
        arguments = inspect.signature(super()._execute_child).bind(*args).arguments
        executable, *command = [arguments["args"]] if isinstance(arguments["args"], str) else list(arguments["args"])
        if command[:1] == ["-u"]:  # not buffered
            del command[0]
        if executable != sys.executable or not command or not str(command[0]).endswith(".py"):
            super()._execute_child(*args)
            return
        self.pid = os.fork()
        if self.pid == 0:
            if arguments["start_new_session"]:
                os.setsid()
            environment = dict(os.environ) if arguments["env"] is None else arguments["env"]
            cwd = arguments["cwd"] or os.getcwd()
            _become(list(map(str, command)), cwd, environment, stdout=arguments["c2pwrite"], stderr=arguments["errwrite"])
        self._child_created = True
        self._close_pipe_fds(*(arguments[f"{name}{end}"] for name in ("p2c", "c2p", "err") for end in ("read", "write")))


def _become(command, cwd, environment, *, stdout, stderr):
    """Be the process of ``python command...``; does not return. -1 leaves ``stdout`` or ``stderr`` as it is."""
    gc.freeze()  # as in ranks.py
    atexit._clear()  # the handlers so far are of the parent
    for number, descriptor in ((1, stdout), (2, stderr)):
        if descriptor not in (-1, number):
            os.dup2(descriptor, number)
    sys.stdout, sys.stderr = map(_text_output, (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    script, sys.argv = command[0], command
    code = 0
    try:
        if script.endswith(".py"):
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):  # a message, as sys.exit takes it
        print(code or "", file=sys.stderr)
        code = int(code is not None)
    atexit._run_exitfuncs()  # Lightning's launcher waits there for the ranks that it has started
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _text_output(number):
    return io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding="utf-8", write_through=True)
