"""A grammar process whose compiler does what the grammar says: tests of what a fork may do."""

from __future__ import annotations

import os
import time

from headrace.errors import CallerError
from headrace.types import ModelRecord
from headrace_gateway import grammar_process


class Unruly:
    def __init__(self, record: ModelRecord) -> None:
        if record.name == "broken":
            raise CallerError("no vocabulary")
        if record.name == "dead":
            os._exit(1)

    def compile(self, grammar: str) -> object:
        what, _, _ = grammar.partition(" ")
        if what == "spin":
            while True:
                pass
        if what == "sleep":
            time.sleep(3_600)
        if what == "memory":
            bytearray(4 * grammar_process.MEMORY_BYTES)
        if what == "abort":
            os.abort()
        raise CallerError(f"pid {os.getppid()}", code="invalid_grammar")


if __name__ == "__main__":
    grammar_process.Grammars = Unruly  # type: ignore[assignment,misc]  # its double
    grammar_process.main()
