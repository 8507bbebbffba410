"""data.py: formats, batches of each stage, the mixture of a stage, mined hard negatives."""
import gzip
import json

import numpy as np
import pytest
import torch

import data
from dhnm import HardNegativePool
from embed import Embedder
from engine import collection, mining
from engine.collection import load_collection
from engine.distributed import ALONE, World
from mask import FULL
from model import Conan
from ranks import tiny_config, write_collection, write_lines
from tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)        # the caches go to out/cache


@pytest.fixture
def embedder(tokenizer):
    model = Conan(tiny_config().model_config()).init_weights(torch.Generator().manual_seed(0))
    return Embedder.of(model, tokenizer, FULL, 16)


def task(tokenizer, rows, kind="retrieval", stage="embed_sup", world=ALONE, **changed):
    """Return a `Task` on rows that are written to a file."""
    cfg = tiny_config(stage, **changed)
    return data.Task(kind, cfg, tokenizer, world, [write_lines(data.Path(f"{kind}.jsonl"), rows)])


def texts_of(batch, tokenizer):
    """Return the texts of a batch, decoded; each one ends with the end-of-text token."""
    parts = [ids.tolist() for ids in batch.ids.split(batch.lengths)]
    assert {ids.pop() for ids in parts} == {tokenizer.eos_id}
    return [tokenizer.decode(ids) for ids in parts]


# ---------------------------------------------------------------- rows

@pytest.mark.parametrize("row", [
    {"instruction": "do", "input": "x", "output": "y"},
    {"prompt": "do", "query": "x", "pos": "y"},            # a string is one positive, not letters
    {"prompt": "do", "query": "x", "pos": ["y"], "neg": [], "instruction": "no"},
    {"instruction": "do", "query": "x", "pos": ["y"], "input": "a column", "output": "of its own"},
    {"prompt": "do", "query": "x", "pos": ["y"], "neg": None, "more": {"ignored": 1}},
])
def test_pairs_come_in_several_spellings(row):
    assert data.parse_pair(row) == {"query": "x", "pos": ["y"], "neg": [], "prompt": "do"}


@pytest.mark.parametrize("nothing", [{"input": ""}, {"input": None}, {}])
def test_where_alpacas_input_is_empty_the_instruction_is_the_query(nothing):
    row = {"instruction": "Name a primary colour.", "output": "Red.", **nothing}
    assert data.parse_pair(row) == {"query": "Name a primary colour.", "pos": ["Red."], "neg": [],
                                    "prompt": ""}


@pytest.mark.parametrize("kind, row, reason", [
    ("text", {"txt": "a", "id": 1}, "key 'text' is missing; the keys are ['id', 'txt']"),
    ("text", {"text": 3}, "key 'text' must be a string, not int"),
    ("text", {"text": "\u2003\n"}, "key 'text' is empty"),
    ("pairs", {"query": "q", "answer": "p"}, "'pos' is missing; the keys are ['answer', 'query']"),
    ("pairs", {"query": "q", "pos": {"en": "p"}}, "'pos' must be a string, not dict"),
    ("pairs", {"query": "q", "pos": []}, "key 'pos' is an empty list"),
    ("pairs", {"query": "q", "pos": "p", "negatives": ["n"]}, "'negatives' is not read: hard neg"),
    ("pairs", {"query": "q", "pos": "p", "neg": None, "negs": ["n"]}, "'negs' is not read"),
    ("pairs", {"query": "q", "pos": ["p", " "]}, "key 'pos' is empty"),
    ("pairs", {"query": "q", "pos": ["p"], "neg": [1]}, "key 'neg' must be a string, not int"),
    ("pairs", {"query": "q", "pos": ["p"], "prompt": 1}, "the prompt must be a string, not int"),
    ("pairs", {"instruction": ["do"], "input": "q", "output": "p"}, "the prompt must be a string"),
    ("pairs", {"instruction": "", "input": "", "output": "p"}, "key 'input' is empty"),
    ("sts", {"sentence1": "a", "sentence2": "b"}, "key 'score' must be a finite number"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": "4"}, "must be a finite number"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": True}, "must be a finite number"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": 1e39}, "a finite number (float32)"),
    ("sts", {"sentence1": "a", "score": 1}, "key 'sentence2' is missing"),
])
def test_what_a_row_lacks_is_said(kind, row, reason):
    with pytest.raises(ValueError) as caught:
        data.PARSERS[kind](row)
    assert reason in str(caught.value)


def test_equal_ids_are_equal_texts_composed_or_not():
    assert data.text_id("caf\u00e9") == data.text_id("cafe\u0301") != data.text_id("cafe")
    assert data.text_id("x\u00b2") != data.text_id("x2")   # as the tokenizer tells them apart
    assert 0 <= data.text_id("\ud800") < 2 ** 63           # a lone surrogate, too


# ---------------------------------------------------------------- language model batches

def test_token_windows_predict_the_next_token(tokenizer, tmp_path):
    texts = [f"the fox {i}" for i in range(200)]
    stream = data.TokenStream(texts, tokenizer, tmp_path / "tokens", seed=0)
    flat = [i for text in texts for i in tokenizer.encode(text) + [tokenizer.eos_id]]
    assert stream.read(0, len(stream)).tolist() == flat
    batch = data.lm_batch(stream.windows(np.arange(4), 16), np.arange(4))
    assert batch.lengths == [16] * 4 and len(batch.ids) == 64
    ids, targets = batch.ids.view(4, 16), batch.targets.view(4, 16)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    n = (len(flat) - 1) // 16 - 1                          # windows of an epoch
    first, second = (stream.windows(np.arange(e * n, (e + 1) * n), 16) for e in (0, 1))
    assert not {tuple(w) for w in first.tolist()} & {tuple(w) for w in second.tolist()}
    with pytest.raises(ValueError, match=f"{len(flat)} tokens of text are too few for blocks"):
        stream.windows(np.arange(1), 100_000)


def test_sft_predicts_the_output_and_nothing_of_the_prompt(tokenizer):
    example = ("jumps", "the quick", "brown fox")
    batch = data.sft_batch([example], [0], tokenizer, 64)
    learnt = batch.targets[batch.targets != -100].tolist()
    assert learnt == tokenizer.encode("brown fox") + [tokenizer.eos_id]
    assert tokenizer.decode(batch.ids.tolist()) == "jumps\nthe quick\n\nbrown fox"
    cut = data.sft_batch([example], [0], tokenizer, 8)
    assert cut.lengths == [8] and cut.truncated == 1
    assert (cut.targets != -100).sum() == 5                # the output has half of the room
    assert cut.ids[3] == batch.ids[(batch.targets == -100).sum()]      # after the blank line
    both = data.sft_batch([("jumps", "the quick", "brown fox " * 9)], [0], tokenizer, 8)
    assert (both.targets != -100).sum() == 5               # nor more than half, where both are long


def test_a_cut_prompt_keeps_a_blank_line_of_two_tokens():
    one_liners = Tokenizer.train(["the quick brown fox jumps"] * 5, 300)
    assert len(one_liners.encode("\n\n")) == 2
    for max_len, whole in ((16, True), (3, False)):
        batch = data.sft_batch([("jumps", "the quick " * 10, "fox")], [0], one_liners, max_len)
        asked = one_liners.decode(batch.ids[:int((batch.targets == -100).sum()) + 1].tolist())
        assert asked.endswith("\n\n") == whole and asked.endswith("\n"), max_len
        assert batch.lengths == [min(max_len, len(batch.ids))] and batch.truncated == 1


def test_a_long_prompt_is_cut_only_as_far_as_its_output_needs(tokenizer):
    prompt, output = (len(tokenizer.encode(text)) for text in ("the quick\n\n", "fox"))
    fits = data.sft_batch([(None, "the quick", "fox")], [0], tokenizer, prompt + output)
    assert fits.truncated == 0 and fits.lengths == [prompt + output] and prompt > output


# ---------------------------------------------------------------- contrastive batches

def test_a_contrastive_batch_holds_queries_positives_and_negatives(tokenizer):
    """An absent negative is an empty text."""
    rows = [{"query": "the", "pos": ["fox"], "neg": ["dog"]},
            {"query": "lazy", "pos": ["dog"], "neg": [], "prompt": "over"}]
    t = task(tokenizer, rows, n_negatives=2)
    t.pool = HardNegativePool([[1], [0]], 2)                # of the passages "fox" and "dog"
    order = data.shuffled(np.arange(2), 2, 0).tolist()
    batch = t.batch(0)
    texts = ["Find\nthe", "over\nlazy"][::1 if order == [0, 1] else -1]    # "Find": no own prompt
    positives = ["fox", "dog"] if order == [0, 1] else ["dog", "fox"]
    negatives = ["dog", "", "fox", ""] if order == [0, 1] else ["fox", "", "dog", ""]
    assert texts_of(batch, tokenizer) == texts + positives + negatives
    assert batch.positive_ids.tolist() == [data.text_id(text) for text in positives]
    assert batch.negative_ids[order.index(0)].tolist() == [data.text_id("dog"), -1]
    assert batch.negative_ids[order.index(1)].tolist() == [data.text_id("fox"), -1]
    skip = [len(tokenizer.encode(text)) for text in ("Find\n", "over\n")]
    assert batch.skip == [skip[i] for i in order] + [0] * 6
    assert t.prompts == {"Find": 1, "over": 1}
    assert batch.rows.tolist() == order


def test_an_instruction_takes_the_tokens_that_are_skipped(tokenizer):
    """Its line end keeps the tokens before it apart from those of the text."""
    for prompt in ("Find", "the quick brown fox", "jumps over:"):
        n = data.prompt_length(tokenizer, prompt)
        ids = tokenizer.encode(data.format_query("lazy dog", prompt))
        assert tokenizer.decode(ids[n:]) == "lazy dog"
    assert data.prompt_length(tokenizer, "") == data.prompt_length(tokenizer, None) == 0


def test_all_positives_of_a_row_are_known_in_every_batch(tokenizer):
    """Of the same query in other rows as well, once passages are numbered (stage 4)."""
    rows = [{"query": "the", "pos": ["fox", "dog"]}, {"query": "lazy", "pos": ["dog"]},
            {"query": "the", "pos": ["quick"]}]
    fox, dog, quick = map(data.text_id, ("fox", "dog", "quick"))
    known = {"embed_sup": [[fox, dog, quick], [dog], [fox, dog, quick]],
             "embed_weak": [[fox, dog], [dog], [quick]]}
    for stage, kind in (("embed_sup", "retrieval"), ("embed_weak", "pairs")):
        batch = task(tokenizer, rows, kind, stage, batch_size=3).batch(0)
        for row, ids in zip(batch.rows, batch.known_ids.tolist()):
            assert {i for i in ids if i >= 0} == set(known[stage][row]), stage
            assert len(ids) == max(len(known[stage][r]) for r in batch.rows)


def test_every_positive_is_drawn_in_some_epoch(tokenizer):
    rows = [{"query": f"the {i}", "pos": [f"fox {i} {j}" for j in range(5)]} for i in range(8)]
    t = task(tokenizer, rows, "pairs", "embed_weak", batch_size=8)
    drawn = [set(t.batch(epoch).positive_ids.tolist()) for epoch in range(50)]
    assert set().union(*drawn) == {data.text_id(text) for row in rows for text in row["pos"]}
    assert drawn[7] == set(t.batch(7).positive_ids.tolist())           # a function of (seed, epoch)


def test_batches_never_hold_a_query_twice_and_all_ranks_share_them(tokenizer, monkeypatch):
    rows = [{"query": f"the {i}", "pos": [f"fox {i}"]} for i in range(11)]
    alone = task(tokenizer, rows, "pairs", "embed_weak", batch_size=4)
    ranks = [task(tokenizer, rows, "pairs", "embed_weak", batch_size=4) for _ in range(2)]
    for rank, t in enumerate(ranks):
        t.world = World(rank, 2, torch.device("cpu"))
    for k in range(9):                             # an epoch is two batches; three rows wait
        indices = alone.batch(k).rows.tolist()
        assert len(set(indices)) == 4
        assert indices == [i for t in ranks for i in t.batch(k).rows.tolist()]
        assert k % 2 == 0 or not {*indices} & {*alone.batch(k - 1).rows.tolist()}
    monkeypatch.setattr(World, "gather_objects", lambda world, value: [value])
    with pytest.raises(ValueError, match="a batch of 4 pairs rows cannot be split over 3"):
        task(tokenizer, rows, "pairs", "embed_weak", World(0, 3, torch.device("cpu")), batch_size=4)


def test_all_ranks_share_the_windows_of_a_text(tokenizer):
    rows = [{"text": f"the quick fox {i}"} for i in range(60)]
    alone = task(tokenizer, rows, "text", "pretrain", batch_size=4)
    ranks = [task(tokenizer, rows, "text", "pretrain", batch_size=4) for _ in range(2)]
    for rank, t in enumerate(ranks):
        t.world = World(rank, 2, torch.device("cpu"))
    for k in range(9):
        assert torch.equal(alone.batch(k).ids, torch.cat([t.batch(k).ids for t in ranks]))


def test_sts_batches_pair_the_first_half_with_the_second(tokenizer):
    rows = [{"sentence1": f"the {i}", "sentence2": f"fox {i}", "score": i / 2} for i in range(3)]
    batch = task(tokenizer, rows, "sts", batch_size=3).batch(0)
    order = batch.rows.tolist()
    assert texts_of(batch, tokenizer) == [f"the {i}" for i in order] + [f"fox {i}" for i in order]
    assert batch.scores.tolist() == [i / 2 for i in order] and batch.skip == [0] * 6


@pytest.mark.parametrize("reach, warns", [(5, True), (1, False)])
def test_sts_files_of_unequal_scales_are_named(tokenizer, capsys, reach, warns):
    files = [write_lines(data.Path(f"{top}.jsonl"), [
        {"sentence1": "a", "sentence2": "b", "score": top * i / 3} for i in range(4)])
             for top in (1.0, reach)]
    data.Task("sts", tiny_config("embed_sup"), tokenizer, ALONE, files)
    text = "warning: the scores of 5.jsonl reach 5, those of 1.0.jsonl 1; CoSENT compares them"
    assert (text in "".join(capsys.readouterr())) == warns


def test_long_texts_are_cut_and_counted_and_chunks_cover_the_batch(tokenizer):
    texts = ["fox " * 50, "dog", "the"]
    long, *short = tokenizer.encode_batch(texts)
    limits = [4, len(short[0]) + 1, len(short[1])]     # the middle one just has room for its end
    batch = data.Batch.of("sts", texts, limits, tokenizer, np.arange(3), skip=[1, 0, 2])
    assert batch.lengths == limits and batch.truncated == 2
    assert batch.ids.tolist() == [*long[:3], tokenizer.eos_id, *short[0], tokenizer.eos_id,
                                  *short[1][:-1], tokenizer.eos_id]
    parts = list(batch.chunks(2))
    assert [part[1] for part in parts] == [batch.lengths[:2], batch.lengths[2:]]
    assert [part[3] for part in parts] == [[1, 0], [2]]
    assert torch.equal(torch.cat([part[0] for part in parts]), batch.ids)


def test_an_instruction_leaves_a_query_one_token_at_least(tokenizer):
    rows = [{"query": "the", "pos": ["fox"], "prompt": "over"}]
    n = data.prompt_length(tokenizer, "over")
    task(tokenizer, rows, "pairs", "embed_weak", batch_size=1, query_len=n + 2)    # one, its end
    with pytest.raises(ValueError, match="the instruction 'over' takes .* leaves a query none"):
        task(tokenizer, rows, "pairs", "embed_weak", batch_size=1, query_len=n + 1)


def test_an_instruction_that_the_start_did_not_see_stops_no_step(tokenizer):
    rows = [{"query": "the", "pos": ["fox"], "prompt": "the"}]
    found = task(tokenizer, rows, "pairs", "embed_weak", batch_size=1, query_len=6)
    long = "over the lazy dog"                 # the index keeps a hundred of a thousand
    found.examples_of = lambda *_: [(long, "the", "fox")]
    batch = found.batch(0)
    assert batch.lengths[0] == 6 and batch.skip[0] > 6 and batch.truncated == 1


def test_a_row_may_say_that_there_is_no_instruction(tokenizer):
    rows = [{"query": "the", "pos": ["fox"], "prompt": ""}]
    batch = task(tokenizer, rows, "pairs", "embed_weak", batch_size=1).batch(0)
    assert texts_of(batch, tokenizer) == ["the", "fox"] and batch.skip == [0, 0]


def test_positives_are_drawn_by_the_seed(tokenizer):
    rows = [{"query": f"the {i}", "pos": [f"fox {i} {j}" for j in range(5)]} for i in range(8)]
    drawn = [set(task(tokenizer, rows, "pairs", "embed_weak", batch_size=8, seed=seed).batch(0)
                 .positive_ids.tolist()) for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_sentences_are_cut_at_the_length_of_a_query(tokenizer):
    rows = [{"sentence1": "fox " * 30, "sentence2": "dog", "score": 1}]
    batch = task(tokenizer, rows, "sts", batch_size=1, query_len=8, passage_len=16).batch(0)
    assert batch.lengths[0] == 8 and batch.truncated == 1


def test_a_query_is_the_same_under_any_instruction(tokenizer):
    rows = [{"query": "the", "pos": ["fox"], "prompt": "over"},
            {"query": "the", "pos": ["dog"], "prompt": "lazy"}]
    batch = task(tokenizer, rows, "pairs", "embed_weak").batch(0)
    assert batch.query_ids.tolist() == [data.text_id("the")] * 2


# ---------------------------------------------------------------- hard negatives

def test_own_negatives_are_in_use_though_one_row_has_none(tokenizer, embedder):
    rows = [{"query": f"the {i}", "pos": [f"fox {i}"], "neg": [f"own {i} a", f"own {i} b"]}
            for i in range(64)]
    rows[5]["neg"] = []
    t = task(tokenizer, rows, batch_size=16)
    data.fill_pools([t], embedder)
    in_use = [{t.passages.text(p) for p in row.tolist()} for row in t.pool.negatives(range(64))]
    assert all(texts == set(row["neg"]) for texts, row in zip(in_use, rows) if row["neg"])
    assert len(in_use[5]) == 2 and "fox 5" not in in_use[5]


def test_candidates_below_the_floor_are_left_out_but_for_the_hardest(tokenizer, embedder,
                                                                     monkeypatch):
    """PAPER Sec. 3.4: Eq. 6 would discard them at their first step; the same model scored them."""
    rows = [{"query": f"the {i}", "pos": [f"fox {i}"]} for i in range(10)]
    t = task(tokenizer, rows, pool_size=8)

    def mine(queries, passages, *args, **more):
        scores = np.array([[0.9, 0.3, 0.2, 0.5, 0.39, -0.5, -0.1, 0.1]] * 10, dtype=np.float32)
        return np.tile(np.arange(8), (10, 1)), scores
    monkeypatch.setattr(mining, "mine", mine)
    data.fill_pools([t], embedder)
    assert t.pool.candidates.tolist() == [[0, 1, 3]] * 10      # 0.3 stays: every query has two


def test_fixed_negatives_stay_and_dynamic_ones_do_not_also_after_a_resume(tokenizer, embedder):
    rows = [{"query": f"the {i}", "pos": [f"fox {i}"]} for i in range(10)]
    for policy in ("fixed", "v2"):
        t = task(tokenizer, rows, pool_size=8, dhnm=policy)
        data.fill_pools([t], embedder)
        for _ in range(2):
            before = t.pool.negatives([0]).tolist()
            t.pool.update([0], torch.full((1, 2), 0.1))        # far below the floor of 0.4
            assert (t.pool.negatives([0]).tolist() == before) == (policy == "fixed")
            t.load_pool(t.pool.state_dict())


def test_translated_queries_are_mined_around_their_positive(tokenizer, embedder, monkeypatch):
    rows = [{"query": f"le {i}", "pos": [f"fox {i}"]} for i in range(6)]
    calls = {}

    def mine(queries, passages, *args, **more):
        calls[len(calls)] = (queries, passages.passages)
        return np.full((len(queries), 50), -1), np.zeros((len(queries), 50), np.float32)
    monkeypatch.setattr(mining, "mine", mine)
    data.fill_pools([task(tokenizer, rows, "clr"), task(tokenizer, rows, "retrieval")], embedder)
    assert np.array_equal(calls[0][0], embedder.encode([row["pos"][0] for row in rows]))
    assert np.allclose(calls[1][0], embedder.encode([row["query"] for row in rows], prompt="Find"),
                       atol=1e-6)


def test_queries_are_embedded_under_their_own_instruction(embedder, tmp_path):
    rows = [{"query": "the fox", "prompt": prompt} for prompt in (None, "over", "", None)]
    vectors = mining.Miner(tmp_path, embedder).queries("x", rows, "jumps")
    right = [embedder.encode("the fox", prompt=prompt) for prompt in ("jumps", "over", "", "jumps")]
    assert np.allclose(vectors, right, atol=1e-6)


def test_what_a_broken_run_mined_is_mined_anew(tokenizer, embedder, monkeypatch):
    rows = [{"query": f"the {i}", "pos": [f"fox {i}"]} for i in range(10)]
    other = Conan(tiny_config().model_config()).init_weights(torch.Generator().manual_seed(1))

    def dies(*args, **more):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mining, "mine", dies)            # when all is embedded, by another model
        data.fill_pools([task(tokenizer, rows)], Embedder.of(other, tokenizer, FULL, 16))
    assert list(data.Path("out/embed_sup/mining").iterdir())
    pools = []
    for out in ("out", "elsewhere"):
        t = task(tokenizer, rows, out=out)
        data.fill_pools([t], embedder)
        pools.append(t.pool.candidates.tolist())
        assert not (t.cfg.run_dir / "mining").exists()
    assert pools[0] == pools[1]


def test_the_floor_keeps_the_order():
    scores = np.tile(np.float32([0.9, 0.1]), (1, 100))
    kept = data.without_easy(np.arange(200)[None], scores, 2)[0]
    assert kept[:101].tolist() == [0, 1, *range(2, 200, 2)] and (kept[101:] == -1).all()


def test_candidates_that_bring_cosines_pass_the_same_floor(tokenizer):
    rows = [{"query": f"the {i}", "pos": [f"fox {i}"], "neg": [f"own {i} {k}" for k in range(4)],
             "cosines": [0.9, 0.3, 0.2, 0.5]} for i in range(4)]
    t = task(tokenizer, rows, pool_size=8)
    data.fill_pools([t], None)                     # nothing is embedded
    pools = [[t.passages.text(p) for p in row.tolist()] for row in t.pool.candidates]
    assert pools == [[f"own {i} {k}" for k in (0, 1, 3)] for i in range(4)]


# ---------------------------------------------------------------- the mixture of a stage

def test_a_stage_takes_the_files_that_are_named_or_those_of_its_folder(tmp_path):
    for name in ("text.jsonl", "text-zh.jsonl", "text_dev.jsonl", "pairs/a.jsonl", "pairs/b.NDJSON",
                 "pairs/c.jsonl.gz", "pairs/d.en-de.jsonl", "pairs/d.en-fr.jsonl", "sts.json",
                 "pairs/a.jsonl.bak", "pairs/notes.txt", "clr.jsonl.bak", "clr_old.jsonl",
                 "text.jsonl.report.json", "pairs/a.jsonl.report.json"):
        write_lines(tmp_path / "set" / name, [{"text": name}])
    cfg = tiny_config(data=str(tmp_path / "set"))

    def files(kind):
        return [str(data.Path(f).relative_to(tmp_path / "set")) for f in data.sources(cfg, kind)]
    assert files("text") == ["text-zh.jsonl", "text.jsonl"]
    assert files("pairs") == [f"pairs/{name}" for name in (
        "a.jsonl", "b.NDJSON", "c.jsonl.gz", "d.en-de.jsonl", "d.en-fr.jsonl")]
    assert files("sts") == ["sts.json"] and files("clr") == []
    named = tiny_config(data=str(tmp_path / "set"), text=("x.jsonl",))
    assert data.sources(named, "text") == ("x.jsonl",) and data.sources(named, "pairs") == ()
    assert cfg.uses_folder and not named.uses_folder


def test_hidden_files_are_not_read_and_a_file_beside_its_packed_self_is_named(tmp_path):
    (tmp_path / "pairs").mkdir()
    for name in ("a.jsonl", "._a.jsonl", "b.jsonl.gz"):
        (tmp_path / "pairs" / name).write_bytes(b"x")
    cfg = tiny_config(data=str(tmp_path))
    assert [data.Path(f).name for f in data.sources(cfg, "pairs")] == ["a.jsonl", "b.jsonl.gz"]
    (tmp_path / "pairs/b.jsonl").write_bytes(b"x")
    with pytest.raises(ValueError, match="pairs/b.jsonl lies beside its own .gz"):
        data.sources(cfg, "pairs")


@pytest.mark.parametrize("name", [
    "pairs-test.jsonl", "pairs/dev.jsonl.gz", "pairs/a-dev.ndjson", "pairs.test.jsonl",
    "pairs-nq_test.jsonl", "pairs/nq.validation.jsonl.gz", "pairs/Test.json"])
def test_a_file_named_as_a_held_out_split_is_refused(tmp_path, name):
    (tmp_path / "pairs").mkdir()
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{name} would be trained on"):
        data.sources(tiny_config(data=str(tmp_path)), "pairs")


@pytest.mark.parametrize("name", ["text-2.jsonl.zst", "text/b.parquet"])
def test_a_file_that_cannot_be_read_is_not_left_out_in_silence(tmp_path, name):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/README.md").write_text("about")
    cfg = tiny_config("pretrain", text=(), data=str(tmp_path))
    assert data.sources(cfg, "text") == ()
    (tmp_path / name).write_bytes(b"packed")
    with pytest.raises(ValueError, match=f"{name}: only JSONL and JSONL.gz are read"):
        data.sources(cfg, "text")


def test_the_hashes_of_a_stage_are_those_of_its_contents(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    cfg = tiny_config("pretrain", text=("a.jsonl",), pairs=("unread.jsonl",))
    first = data.hashes(cfg)
    assert list(first) == ["text"] and list(first["text"]) == ["a.jsonl"]
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n')
    assert data.hashes(cfg) != first
    write_lines(tmp_path / "p.jsonl", [{"query": "q", "pos": "p"}] * 9)
    weak = [tiny_config("embed_weak", pairs=("p.jsonl",) * n, batch_size=2) for n in (1, 2)]
    once, twice = map(data.hashes, weak)                   # two tasks of the same rows
    assert len(once["pairs"]) == 1 and len(twice["pairs"]) == 2


def test_stage_4_takes_steps_by_rows_over_batch(tokenizer):
    """PAPER Table 11 counts rows: a task of larger batches has fewer steps."""
    for kind in ("retrieval", "sts"):
        write_lines(data.Path(f"{kind}.jsonl"), [
            {"query": f"the {i}", "pos": "fox", "sentence1": "a", "sentence2": "b", "score": i}
            for i in range(20)])
    cfg = tiny_config(retrieval=("retrieval.jsonl",), sts=("sts.jsonl",), batch_size=2,
                      batch_sizes={"sts": 16}, task_weights={"sts": 1.8, "retrieval": 3.0})
    assert [(task.kind, task.size, weight) for task, weight in data.build_tasks(
        cfg, tokenizer, ALONE)] == [("retrieval", 2, 1.5), ("sts", 16, 1.8 / 16)]


def test_the_weak_stage_takes_one_file_a_step_by_rows(tokenizer):
    for name, n in (("web-a", 4), ("web-b", 6), ("news", 8)):
        write_lines(data.Path(f"{name}.jsonl"), [{"query": f"the {i}", "pos": "fox"}
                                                 for i in range(n)])
    cfg = tiny_config("embed_weak", pairs=("web-a.jsonl", "web-b.jsonl", "news.jsonl"))
    tasks = data.build_tasks(cfg, tokenizer, ALONE)
    assert [(len(task.rows), weight) for task, weight in tasks] == [(4, 4), (6, 6), (8, 8)]
    with pytest.raises(ValueError, match="embed_weak needs data: --pairs=FILE"):
        data.build_tasks(tiny_config("embed_weak", text=("t.jsonl",)), tokenizer, ALONE)


def test_the_most_frequent_instruction_is_kept_not_the_first(tokenizer):
    rows = [{"query": f"the {i}", "pos": ["fox"], "prompt": prompt}
            for i, prompt in enumerate(("over", "lazy", "lazy"))]
    t = task(tokenizer, rows, "pairs", "embed_weak", query_len=12)
    assert data.prompts_of([(t, 1)]) == {"retrieval": "lazy"}


def test_a_tasks_own_batch_must_be_filled_as_well(tokenizer):
    rows = [{"sentence1": "a", "sentence2": "b", "score": i} for i in range(3)]
    with pytest.raises(ValueError, match="3 rows are too few for a batch of 4"):
        task(tokenizer, rows, "sts", batch_size=2, batch_sizes={"sts": 4})


# ---------------------------------------------------------------- collections

def test_files_that_nobody_reads_are_named(tmp_path):
    for name in ("text.jsonl", "text-2.jsonl.gz", "clr.jsonl", "text_dev.jsonl", "sts_test.jsonl",
                 "labels_test.jsonl", "manifest.json", "clr.jsonl.report.json", "retreival.jsonl",
                 "text_2.jsonl.gz", "README.md", "sts_test-2.jsonl", "text_dev.ndjson"):
        (tmp_path / name).touch()
    assert [path.name for path in collection.unread(tmp_path, data.PARSERS)] == [
        "retreival.jsonl", "sts_test-2.jsonl", "text_2.jsonl.gz", "text_dev.ndjson"]


def test_a_collection_is_read_plain_packed_and_from_windows(tmp_path):
    folder = write_collection(tmp_path / "set", ["a", "b"], ["c", "d"])
    right = load_collection(folder)
    assert right.qrels == {"0": {"0": 1.0}, "1": {"1": 1.0}}
    for path in list(folder.iterdir()):            # a byte order mark, and other line ends
        raw = b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n"
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(raw))
        path.unlink()
    assert load_collection(folder) == right


def test_ids_are_only_keys(tmp_path):
    folder = write_collection(tmp_path / "set", ["a"], ["c"])
    for text in ("../../x", "/etc/passwd", "a\u0000b", "x" * 10_000, "-1", " "):
        (folder / "corpus.jsonl").write_text(json.dumps({"_id": text, "text": "a"}) + "\n")
        (folder / "qrels.tsv").write_bytes(f"0\t{text}\t1\n".encode())
        assert load_collection(folder).qrels == {"0": {text: 1.0}}


def test_where_some_rows_alone_bring_cosines_all_are_mined(tokenizer, embedder):
    rows = [{"query": f"the {i}", "pos": [f"fox {i}"], "neg": [f"own {i}"]} for i in range(6)]
    rows[0]["cosines"] = [0.9]
    t = task(tokenizer, rows, pool_size=4)
    data.fill_pools([t], embedder)
    assert not t.rows.is_scored and (t.pool.negatives(range(6)) >= 0).all()
