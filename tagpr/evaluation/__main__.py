"""``python -m tagpr.evaluation key=value ...``"""

from tagpr.configuration import main

# Everything else lives in a module that a process of its own can import by name.
from tagpr.evaluation.stage import run

if __name__ == "__main__":
    main("evaluate", run)
