"""``fastclip serve``: search a folder on a web page of this machine."""

from __future__ import annotations

import argparse
import os
import sys

from fastclip.cli.ending import Terminated
from fastclip.cli.search import add_index_options, engine_of, update

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A web page for this machine alone: type, click a picture to find what is like it, or drop one on the page."
    )
    parser.add_argument("--port", type=int, default=8137, metavar="N", help="of 127.0.0.1; 0 is any free one (8137)")
    add_index_options(parser)
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from fastclip.search.serve import make_server

    if not 0 <= args.port < 65536:
        raise ValueError(f"--port must be from 0 to 65535, got {args.port}")
    engine = engine_of(args)
    with make_server(engine, port=args.port) as server:  # a port that is taken is found before the work
        try:
            update(engine, args)
            print(f"http://127.0.0.1:{server.server_port}/", flush=True)
            print("fastclip serve: Ctrl-C ends it", file=sys.stderr)
            server.serve_forever()
        except (KeyboardInterrupt, Terminated) as ending:
            if isinstance(ending, Terminated):
                print("fastclip serve: ended by SIGTERM", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            # A request's thread that is in torch at the interpreter's end would abort the process
            os._exit(143 if isinstance(ending, Terminated) else 130)
    return 0
