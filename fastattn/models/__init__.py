"""Models that the commands and the examples run: where their files are fetched, how these are checked, and their tokenizers.

:mod:`fastattn.models.weights` fetches, :mod:`fastattn.models.smollm2` is SmolLM2. The layers are those of ``fastattn.layers``. Needs
the extra ``examples``.
"""
