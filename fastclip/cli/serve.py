"""``fastclip serve``: search a folder on a web page that only this machine can reach."""

from __future__ import annotations

import argparse
import os
import sys

from fastclip.cli.ending import Terminated
from fastclip.cli.help import describe
from fastclip.cli.search import add_index_options, engine_of, update

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Search a folder on a web page, which only this machine can reach. Type a text, click an image to find similar "
        "ones, or drop an image on the page.",
        "fastclip serve photos --checkpoint runs/b32",
        "fastclip serve photos --checkpoint ViT-B-32.pt --model ViT-B-32 --port 0",
    )
    parser.add_argument(
        "--port", type=int, default=8137, metavar="N", help="port of the page on 127.0.0.1; 0 picks any free one"
    )
    add_index_options(parser)
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from fastclip.search.serve import make_server

    if not 0 <= args.port < 65536:
        raise ValueError(f"--port must be from 0 to 65535, got {args.port}")
    engine = engine_of(args)
    with make_server(engine, port=args.port) as server:  # a port that is in use is reported before the work
        try:
            update(engine, args)
            print(f"http://127.0.0.1:{server.server_port}/", flush=True)
            print("fastclip serve: press Ctrl-C to stop", file=sys.stderr)
            server.serve_forever()
        except (KeyboardInterrupt, Terminated) as ending:
            if isinstance(ending, Terminated):
                print("fastclip serve: ended by SIGTERM", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            # A request whose thread is inside torch while the interpreter shuts down would abort the process
            os._exit(143 if isinstance(ending, Terminated) else 130)
    return 0
