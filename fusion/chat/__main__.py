"""Talk to models side by side: `python -m fusion.chat MODEL [MODEL ...] [--web]`."""

import argparse
import math
import sys
from collections.abc import Sequence

from fusion.config import EXIT_USER_ERROR, UserError

HIGHEST_PORT = 65_535


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the models and talk until the end of the input; exit status 2 on mistakes in what was given."""
    parser = argparse.ArgumentParser(prog="python -m fusion.chat", description="Talk to models side by side.")
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="model folder, hub id, or run of train.py, merge.py"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the most likely token")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="decides what is drawn at a temperature above 0")
    parser.add_argument("--web", action="store_true", help="a page on this machine instead of the terminal")
    parser.add_argument("--port", type=int, default=8321, help="of the page (default: 8321; 0: any that is free)")
    options = parser.parse_args(arguments)
    if not 0 <= options.temperature < math.inf or options.max_new_tokens < 1 or not 0 <= options.port <= HIGHEST_PORT:
        parser.error(f"--temperature is 0 or more, --max-new-tokens 1 or more, --port from 0 to {HIGHEST_PORT}")
    from fusion.chat.speaker import speakers

    settings = {
        "temperature": options.temperature,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
    }
    try:
        found = speakers(options.models, **settings)
        if options.web:
            from fusion.chat.web import serve

            serve(found, options.port)
        else:
            from fusion.chat.terminal import talk

            talk(found, sys.stdin, sys.stdout)
    except UserError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
