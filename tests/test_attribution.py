"""The command that shows which document an answer rests on."""

import numpy as np
import pytest
from tiny_model import HEADS, LAYERS, smollm2, tiny_path  # noqa: F401

import fastattn
from fastattn import __main__, _attribution as attribution
from fastattn.models import weights

DOCUMENTS = ["the cat sat", "a hat", "the mat at home"]


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return smollm2.load(tiny_path)


def test_each_token_of_the_prompt_is_of_its_document(tiny):
    _, tokenizer = tiny
    tokens, segments = attribution.prompt_of(tokenizer, DOCUMENTS, "who?")
    assert len(tokens) == len(segments)
    decode = tokenizer.decoder()
    texts = ["".join(decode(tokens[n]) for n in np.flatnonzero(segments == part)) for part in range(3)]
    assert texts == [f"user\nDocument 1: {DOCUMENTS[0]}\n\n", *(f"Document {n}: {DOCUMENTS[n - 1]}\n\n" for n in (2, 3))]
    assert set(segments) == {-1, 0, 1, 2}


def test_a_prompt_in_one_part_is_the_chat_template(tiny):
    _, tokenizer = tiny
    tokens, part = tokenizer.chat_parts(["the cat", " sat"], "be kind")
    assert tokens == tokenizer.chat("the cat sat", "be kind") and part.tolist().count(1) == len(tokenizer.encode(" sat"))


def test_attention_to_documents_is_that_of_the_formula(tiny):
    model, tokenizer = tiny
    tokens, segments = attribution.prompt_of(tokenizer, DOCUMENTS, "who?")
    written, mass = attribution.answer(model, tokens, segments, tokenizer.end, 5)
    assert mass.shape == (len(written), LAYERS, HEADS, 3) and 0 < len(written) <= 5
    seen = []

    class Watching(fastattn.KVCache):
        def attend(self, q, **keywords):
            seen.append(fastattn.attention_weights(q, self._k[:, :, : self.lengths[0]], causal=True)[0])
            return super().attend(q, **keywords)

    caches = [Watching(1, a.num_kv_heads, None, a.head_dim, dtype="float32") for a in (block.attention for block in model.decoder.blocks)]
    model.forward([*tokens, *written[:-1]], caches)
    for layer, of_layer in enumerate(seen):
        for n in range(len(written)):
            row = of_layer[:, len(tokens) - 1 + n, : len(tokens)]
            expected = np.stack([row[:, segments == part].sum(1) for part in range(3)], axis=1)
            np.testing.assert_allclose(mass[n, layer], expected, atol=1e-5)


def test_losses_are_differences_of_log_probabilities(tiny):
    model, tokenizer = tiny
    written = tokenizer.encode("the cat")
    lost = attribution.losses(model, tokenizer, DOCUMENTS, "who?", written)
    assert lost.shape == (len(written), 3)

    def likelihood(documents):
        tokens, total = attribution.prompt_of(tokenizer, documents, "who?")[0], 0.0
        for token in written:
            logits = model.prefill(tokens, model.new_cache()).astype(np.float64)
            total += logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            tokens = [*tokens, token]
        return total

    assert lost[:, 1].sum() == pytest.approx(likelihood(DOCUMENTS) - likelihood([DOCUMENTS[0], DOCUMENTS[2]]), abs=1e-3)


def test_program_prints_draws_and_writes(tiny_path, tmp_path, capsys):
    paths = []
    for n, text in enumerate(DOCUMENTS):
        paths.append(tmp_path / f"{n}.txt")
        paths[-1].write_text(text)
    page = tmp_path / "page.html"
    arguments = [*map(str, paths), "--model", str(tiny_path), "--max-tokens", "4", "--page", str(page), "--question", "<who>?"]
    try:
        import matplotlib

        matplotlib.use("Agg")
        arguments += ["--picture", str(tmp_path / "picture.png")]
    except ImportError:
        pass
    assert __main__.main(["attribution", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("all tokens") and lines[-1].count("%") == 3
    assert sum(int(share.strip()) for share in lines[-1].replace("all tokens", "").split("%")[:3]) in (99, 100, 101)
    assert "<who>" not in page.read_text() and "document 3" in page.read_text()
    if "--picture" in arguments:
        assert (tmp_path / "picture.png").stat().st_size > 1000


def test_program_refuses_what_it_cannot_do(tiny_path, tmp_path, capsys):
    with pytest.raises(weights.ModelError, match="the model takes"):
        attribution.main(["--model", str(tiny_path), "--max-tokens", "400"])
    assert __main__.main(["attribution", "--model", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("fastattn attribution: ")
    for arguments in (["one.txt"], ["--max-tokens", "0"]):
        with pytest.raises(SystemExit):
            attribution.parse_arguments(arguments)
