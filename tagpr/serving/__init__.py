"""A trained model for others to ask: an OpenAI-compatible endpoint where ``user`` picks the profile.

``POST /v1/chat/completions`` takes one user message, the query, and

- ``user``: whose profile is shown. Of an unknown user nothing is shown, and the answer says so: header ``x-tagpr-user`` and
  field ``tagpr.user`` are ``known``, ``unknown`` or ``none`` (the request named nobody). ``serve.unknown_user=refuse``: 404.
- ``task``: whose prompt it is, of ``benchmark.tasks``; a further field (``extra_body`` of OpenAI's client).
- ``best_of``: so many samples, of which PRMU's favourite among the well-formed ones is given, with all scores in
  ``tagpr.prmu``. Where PRMU gives no score there is no answer (503), never just any of them.
- ``n``, ``temperature``, ``top_p``, ``seed``, ``max_tokens``, ``max_completion_tokens`` as usual; greedy by default. Any other
  field is refused by its name, and so is streaming.

The tagged reasoning is in ``message.reasoning_content``, the answer in ``message.content``, and ``tagpr.problems`` names the
first violated rule of the format of each choice, if any (S24).
"""
