"""``python -m tagpr <stage> [key=value ...]``: run one stage, and on the embedded default what it is missing."""

import sys

from tagpr.stages import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
