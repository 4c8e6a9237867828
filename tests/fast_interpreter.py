"""Triton's interpreter, which replaces its language at every call of a device function, made to do so once a launch.

That is a third of the time of the tests that use it. Where a release of Triton is built otherwise nothing changes.
"""

from typing import Any


def replace_language_once() -> None:
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        executor = interpreter.GridExecutor
        replace, launch = interpreter._patch_lang, executor.__call__
    except (ImportError, AttributeError):
        return
    known: dict[Any, tuple[bool, bool]] = {}
    done: set[tuple[bool, bool]] = set()

    def replace_unless_done(fn: Any) -> Any:
        if fn not in known:
            visible = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
            known[fn] = tl in visible, tl.core in visible
        if known[fn] in done:
            return None
        done.add(known[fn])
        return replace(fn)

    def launch_anew(self: Any, *args: Any, **options: Any) -> Any:
        done.clear()
        return launch(self, *args, **options)

    interpreter._patch_lang, executor.__call__ = replace_unless_done, launch_anew
