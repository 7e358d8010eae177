"""Makes Triton's interpreter several times as fast."""

from __future__ import annotations

import functools

import triton.language as tl


def patch_once(monkeypatch):
    """Patch Triton's language once per launch, not at each call of a kernel's function, where nothing is left to patch."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang

    @functools.cache
    def languages(fn):
        return [value for value in fn.__globals__.values() if value is tl or value is tl.core]

    def patch(fn):
        if any(tl.core.is_builtin(language.load) for language in languages(fn)):
            return original(fn)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_patch_lang", patch)
