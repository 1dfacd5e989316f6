"""The processes of a run on one CPU machine are forked from one that has imported everything, once.

A run has six processes that import torch, Ray and verl or vLLM: ten seconds of a core each, on a small machine most of its
start-up. Here a seventh, the standard library's fork server (:mod:`multiprocessing.forkserver`), imports all of it while Ray and
the driver start, and each of the six is forked from it: Ray's workers through ``setup_worker.py``, the file that Ray's raylet
starts them with, and vLLM's engine through the context that vLLM gets its processes from (``imports.py``). A forked process has
the environment, directory and output of the one that asked for it, as if it were started anew, and runs the same code from there.

Whatever is out of the ordinary (another interpreter, a container, a variable that libraries read when they are imported, a server
that is gone) is started anew, as Ray and vLLM do it. The server has one thread and holds no connection of Ray's: nothing that a
fork could break. ``tests/contract/test_warm.py`` checks all of this.
"""
