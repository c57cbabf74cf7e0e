"""A process that serves one file until its standard input ends, as it does when its parent ends (see `check`)."""

from __future__ import annotations

import os
import sys

from limbeck.commands.serve import serve


def main() -> None:
    file, context = sys.argv[1:]
    server = serve(file, context=int(context), slots=1)
    print(server.url, flush=True)
    sys.stdin.read()
    os._exit(0)  # llama.cpp's own threads would keep the process


if __name__ == "__main__":
    main()
