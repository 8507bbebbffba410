"""sample.py: a language model writes what it has learned, and says what is wrong."""
import sys
from types import SimpleNamespace

import pytest
import torch

import sample
import train
from ranks import arguments, tiny_model, write_lines
from sample import generate


@pytest.fixture
def model(tokenizer):
    """A model that always takes the token after the last one: a, b, c and so on."""
    v = tokenizer.vocab_size
    model = tiny_model(vocab_size=v + 3, n_embd=2 * v, n_head=1, n_kv_head=1, ffn_dim=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.zero_() if p.dim() > 1 else p.fill_(1.0)
        model.embed_tokens.weight[:v] = torch.eye(v, 2 * v)
    real = model.hidden

    def hidden(ids, lengths, mask):
        model.calls.append((len(ids), mask))
        model.read.append(ids.tolist())
        return real(ids, lengths, mask).roll(1, dims=1)        # points at the next token
    model.calls, model.read, model.hidden = [], [], hidden
    return model


def test_the_most_likely_token_is_taken_at_temperature_0(model, tokenizer):
    start = tokenizer.encode("a")
    assert len(start) == 1
    right = tokenizer.decode(list(range(start[0] + 1, start[0] + 6)))
    assert right == "bcdef"
    assert generate(model, tokenizer, "a", n_tokens=5, temperature=0) == right
    assert generate(model, tokenizer, "a", n_tokens=5, temperature=1e-3) == right
    assert generate(model, tokenizer, "a", n_tokens=5, temperature=1e-40) == right
    assert [n for n, _ in model.calls[:5]] == [1, 2, 3, 4, 5]  # all that is written so far
    assert all(mask.is_causal for _, mask in model.calls)


def test_it_ends_at_the_end_of_text_and_reads_no_more_than_fits(model, tokenizer):
    last = tokenizer.decode([tokenizer.eos_id - 1])            # the next one is end-of-text
    assert tokenizer.encode(last) == [tokenizer.eos_id - 1]
    assert generate(model, tokenizer, last, temperature=0) == ""
    model.read.clear()
    generate(model, tokenizer, "", n_tokens=1, temperature=0)  # as after another document
    assert model.read == [[tokenizer.eos_id]]
    assert generate(model, tokenizer, "c" * 90 + "a" * 10, n_tokens=3, temperature=0) == "bcd"
    assert model.calls[-1][0] == model.config.block_size == 64


def test_chance_is_seeded(tokenizer):
    model = tiny_model(std=0.3, vocab_size=tokenizer.vocab_size)
    texts = [generate(model, tokenizer, "the", 20, 1.0, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len({generate(model, tokenizer, "the", 20, t) for t in (0, 0.5, 1)}) == 3
    assert generate(model, tokenizer, "", n_tokens=4)      # begins by itself


def test_a_trained_model_writes_its_text_on_the_command_line(rows, tmp_path, monkeypatch, capsys):
    text = write_lines(rows / "alphabet.jsonl", [{"text": "one two three four five six"}] * 60)
    train.main(arguments(rows, "pretrain", tmp_path, f"--text={text}", "--steps=60",
                         "--learning_rate=0.01", "--vocab_size=300"))

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--checkpoint={tmp_path / 'pretrain'}",
                                          *more])
        sample.main()
        return capsys.readouterr().out
    capsys.readouterr()
    assert "one two three four five six" in run("--prompt=one two", "--temperature=0")
    assert run("--instruction=Find", "--prompt=one").startswith("Find\none\n\n")
    for bad in ("-1", "nan"):
        with pytest.raises(SystemExit, match="sample.py: error: --temperature must not be neg"):
            run(f"--temperature={bad}")
    with pytest.raises(SystemExit, match="sample.py: error: --n_tokens must be at least 1, not 0"):
        run("--n_tokens=0")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint=nowhere"])
    with pytest.raises(SystemExit, match="sample.py: error: nowhere: no checkpoint here"):
        sample.main()


def test_the_flags_reach_the_writer(monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "Embedder", lambda *_, **__: SimpleNamespace(
        model="model", tokenizer="tokenizer"))
    monkeypatch.setattr(sample, "generate", lambda *args: asked.append(args) or "")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt=a", "--n_tokens=3",
                                      "--temperature=0.5", "--seed=7"])
    sample.main()
    assert asked == [("model", "tokenizer", "a", 3, 0.5, 7)]


def test_no_token_beyond_the_tokenizers_is_written(model, tokenizer):
    """A vocabulary may be learned smaller than the one that was asked for."""
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer.vocab_size:] = 100.0
    assert generate(model, tokenizer, "a", n_tokens=3, temperature=0) == "bcd"
