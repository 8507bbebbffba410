"""train.py by its command line: four stages, exact resume, the loss of a step, clear errors."""
import json
import math
import random
import re
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import train
from embed import Embedder
from engine import checkpoint, tokens
from engine import run as runs
from engine.distributed import ALONE
from losses import cosent_loss
from mask import FULL
from ranks import (STEPS, arguments, assert_equal, assert_same_run, chain_arguments, config,
                   die_at, full_disk, log, meta_of, run, stages_before, state_of,
                   step_loss_replaced, tiny_config, tiny_model, write_lines)
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """One undisturbed run of all four stages, started by asking for the last one."""
    out = tmp_path_factory.mktemp("whole")
    train.main(chain_arguments(rows, "embed_sup", out))
    return out


# ---------------------------------------------------------------- the chain of stages

def test_asking_for_the_last_stage_trains_all_four(rows, whole, capsys):
    for stage in train.STAGES:
        assert sorted(log(whole, stage)) == list(range(1, STEPS + 1))
        scores = json.loads((whole / stage / "eval.json").read_text())
        assert 0 <= scores["retrieval/little/test/ndcg@10"] <= 1
    assert len({line["task"] for line in log(whole, "embed_sup").values()}) > 1
    stamps = [(whole / s / "log.jsonl").stat().st_mtime_ns for s in train.STAGES]
    minutes = json.loads((whole / "summary.json").read_text())["minutes"]
    train.main(chain_arguments(rows, "embed_sup", whole))      # a finished stage is not repeated
    assert stamps == [(whole / s / "log.jsonl").stat().st_mtime_ns for s in train.STAGES]
    shown = capsys.readouterr().out
    assert "embed_weak" in shown and "python embed.py --checkpoint" in shown
    assert "scored already" not in shown           # its collections are the same
    summary = json.loads((whole / "summary.json").read_text())
    assert set(train.STAGES) < set(summary) and summary["versions"]["torch"] == torch.__version__
    assert summary["memory_gb"] > 0.1 and summary["minutes"] == minutes > 0


@pytest.mark.parametrize("stage", train.STAGES)
def test_no_step_draws_a_random_number(rows, tmp_path, stage):
    """Else a checkpoint would have to hold the state of the generators."""
    states = []

    def noted(real, *args):
        states.append((random.getstate(), np.random.get_state()[1].tolist(),
                       torch.get_rng_state().tolist()))
        return real(*args)
    with step_loss_replaced(noted):
        train.main(arguments(rows, stage, tmp_path))
    assert len(states) == STEPS and states[0] == states[-1]


def test_a_stage_starts_from_the_weights_and_the_tokenizer_before_it(rows, whole, tmp_path):
    out = stages_before("sft", whole, tmp_path)
    train.main(chain_arguments(rows, "sft", out, "--learning_rate=0"))
    assert_equal(state_of(out, "sft"), state_of(whole, "pretrain"))
    assert state_of(out, "sft", "tokenizer.tiktoken") == \
        state_of(whole, "pretrain", "tokenizer.tiktoken")


def test_other_settings_of_a_later_stage_show_before_the_first_is_trained(rows, whole, tmp_path):
    (tmp_path / "sft").symlink_to(whole / "sft")
    with pytest.raises(SystemExit, match="sft/step_.* was trained with learning_rate="):
        train.main(chain_arguments(rows, "sft", tmp_path, "--learning_rate=0"))
    assert not (tmp_path / "pretrain").exists()


def test_a_stage_may_pool_otherwise_than_the_one_before_it(rows, whole, tmp_path):
    out, last = stages_before("embed_weak", whole, tmp_path), rows / "last.py"
    last.write_text((rows / "embed_weak.py").read_text()
                    + 'pooling = "last"\npool_prompt = True\n')
    argv = chain_arguments(rows, "embed_weak", out, "--steps=1", "--checkpointing=7")
    seen = []

    def noted(real, model, *args):
        seen.append((model.config.pooling, model.checkpointing))
        return real(model, *args)
    with step_loss_replaced(noted):
        train.main([str(last), *argv[1:]])
    shape = meta_of(out, "embed_weak")["model"]
    assert seen == [("last", 7)] and (shape["pooling"], shape["pool_prompt"]) == ("last", True)


def test_without_text_the_tokenizer_learns_from_the_pairs(rows, tmp_path):
    argv = [arg for arg in arguments(rows, "embed_weak", tmp_path) if not arg.startswith("--text")]
    tokenizer = train.train_tokenizer(config(argv))
    assert len(list(tmp_path.glob("tokenizer-*"))) == 1
    assert len(tokenizer.encode("This function")) < 5      # of the passages, too


def test_the_tokenizer_learns_from_a_seeded_sample_of_the_documents(rows, tmp_path, monkeypatch):
    texts, real = {}, Tokenizer.train
    monkeypatch.setattr(tokens, "TOKENIZER_TEXTS", 5)
    monkeypatch.setattr(Tokenizer, "train", lambda sample, size, **more: real(
        texts.setdefault(len(texts), list(sample)), size, **more))
    for seed in (0, 0, 1):                         # the second time the first one's file is taken
        cfg = config(arguments(rows, "pretrain", tmp_path, f"--seed={seed}", "--vocab_size=260"))
        train.train_tokenizer(cfg)
    assert sorted(texts) == [0, 1] and [len(set(t)) for t in texts.values()] == [5, 5]
    assert texts[0] != texts[1]
    everything = [json.loads(line)["text"] for line in open(rows / "text.jsonl")]
    assert set(texts[0] + texts[1]) <= set(everything)


def test_an_lm_stage_is_measured_on_held_out_text(rows, tmp_path):
    folder = tmp_path / "mine"
    (folder / "pairs").mkdir(parents=True)
    (folder / "text.jsonl").write_bytes((rows / "text.jsonl").read_bytes())
    (folder / "text_dev.jsonl").write_text('{"text": "sort a list. tree a node."}\n')
    argv = [arg for arg in arguments(rows, "pretrain", tmp_path / "out", "--steps=60",
                                     "--learning_rate=0.01") if not arg.startswith("--text")]
    train.main([*argv, f"--data={folder}"])
    scores = json.loads((tmp_path / "out/pretrain/eval.json").read_text())
    before, after = (scores[f"lm/mine/dev/loss{end}"] for end in ("_before", ""))
    assert before == pytest.approx(math.log(350), abs=0.1) and after < before - 1
    assert log(tmp_path / "out", "pretrain")[1]["validation"] == before
    at_50, last = (log(tmp_path / "out", "pretrain")[step]["validation"] for step in (59, 60))
    assert at_50 < before and after == last != at_50
    for text, reason in (("", ": no text"), ('{"txt": "a"}', ":1: key 'text' is missing")):
        (folder / "text_dev.jsonl").write_text(text)
        with pytest.raises(SystemExit, match=f"text_dev.jsonl{reason}"):
            train.main([*argv, f"--data={folder}", "--resume=false"])


def test_stage_2_is_measured_before_its_first_step_too(rows, whole, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for kind in ("pairs", "text"):
        (folder / f"{kind}.jsonl").write_bytes((rows / f"{kind}.jsonl").read_bytes())
    (folder / "dev").symlink_to(rows / "little" / "test")
    argv = [arg for arg in arguments(rows, "sft", tmp_path / "out", f"--data={folder}")
            if not arg.startswith(("--text", "--pairs"))]
    run(ALONE, argv, checkpoint.latest(whole / "pretrain"))
    scores = json.loads((tmp_path / "out/sft/eval.json").read_text())
    assert scores["lm/mine/dev/loss"] < scores["lm/mine/dev/loss_before"]


def test_an_instruction_outlives_a_stage_that_asks_nothing(rows, tmp_path):
    """Search takes that of stage 3 where stage 4 has similarity alone."""
    lines = [json.loads(line) for line in open(rows / "pairs.jsonl")]
    path = write_lines(rows / "own.jsonl", [{**row, "instruction": "Look up"} for row in lines])
    train.main(arguments(rows, "embed_weak", tmp_path, f"--pairs={path}", "--steps=1"))
    argv = arguments(rows, "embed_sup", tmp_path, "--retrieval=", "--classification=", "--steps=1")
    run(ALONE, argv, checkpoint.latest(tmp_path / "embed_weak"))
    assert meta_of(tmp_path, "embed_sup")["prompts"]["retrieval"] == "Look up"


def test_a_stage_killed_in_its_evaluation_is_scored_when_it_resumes(rows, whole, tmp_path,
                                                                     monkeypatch):
    out, seen, real = stages_before("embed_weak", whole, tmp_path), [], train.evaluate_stage

    def dies(state):
        seen.append(state.embedder.mask)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "evaluate_stage", dies)
    for _ in range(2):                             # after the last step, and resumed
        with pytest.raises(KeyboardInterrupt):
            train.main(chain_arguments(rows, "embed_weak", out))
    assert seen == [FULL, FULL]                    # bidirectionally
    monkeypatch.setattr(train, "evaluate_stage", real)
    train.main(chain_arguments(rows, "embed_weak", out))
    assert_same_run(out, whole, "embed_weak")
    assert "retrieval/little/test/ndcg@10" in (out / "embed_weak/eval.json").read_text()


def test_the_log_has_the_rate_of_each_step(rows, whole):
    cfg = config(chain_arguments(rows, "pretrain", whole))
    assert [line["lr"] for line in log(whole, "pretrain").values()] == [
        train.lr_at(step, cfg) for step in range(STEPS)]


def test_a_tokenizer_of_another_version_is_trained_anew(rows, tmp_path, monkeypatch):
    cfg = config(arguments(rows, "pretrain", tmp_path))
    for version in ("1", "2"):
        monkeypatch.setattr(Tokenizer, "VERSION", version)
        train.train_tokenizer(cfg)
    assert len(list(tmp_path.glob("tokenizer-*"))) == 2


def test_the_mask_opens_in_the_weak_stage_only(whole):
    alphas = {s: [line["alpha"] for line in log(whole, s).values()] for s in train.STAGES}
    assert set(alphas["pretrain"]) == set(alphas["sft"]) == {0.0}
    assert alphas["embed_weak"] == [i / 5 for i in range(6)]        # 0 at first, 1 exactly at last
    assert set(alphas["embed_sup"]) == {1.0}
    assert meta_of(whole, "sft")["mask"]["alpha"] == 0.0
    assert meta_of(whole, "embed_weak")["mask"]["alpha"] == 1.0


def test_a_checkpoint_on_the_way_carries_the_mask_of_its_step(rows, whole, tmp_path):
    out = stages_before("embed_weak", whole, tmp_path)
    argv = chain_arguments(rows, "embed_weak", out, "--save_every=2")
    die_at(3, lambda: train.main(argv))            # after the checkpoint of step 2
    assert meta_of(out, "embed_weak")["mask"]["alpha"] == 1 / 5


def test_a_run_killed_before_its_first_save_keeps_what_it_mined(rows, whole, tmp_path, monkeypatch):
    out = stages_before("embed_sup", whole, tmp_path)
    argv = chain_arguments(rows, "embed_sup", out)
    die_at(0, lambda: train.main(argv))
    assert checkpoint.latest(out / "embed_sup").name == "step_000000"
    monkeypatch.setattr(data, "fill_pools", lambda *_: pytest.fail("mined a second time"))
    train.main(argv)
    assert_same_run(out, whole, "embed_sup")


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_run_killed_and_resumed_equals_the_undisturbed_one(rows, whole, tmp_path, stage):
    """The field's bugs: replayed data, fresh optimizer state, a forgotten pool."""
    out = stages_before(stage, whole, tmp_path)
    argv = chain_arguments(rows, stage, out, "--save_every=2")
    die_at(3, lambda: train.main(argv))            # after the checkpoint of step 2
    assert max(log(out, stage)) == 3 and not (out / stage / "eval.json").exists()
    torch.manual_seed(12345)                       # whatever happens in between must not matter
    train.main(argv)
    assert_same_run(out, whole, stage)
    if stage == "embed_sup":                       # negatives were replaced before and after
        replaced = [line.get("replaced", 0) > 0 for line in log(out, stage).values()]
        assert any(replaced[:2]) and any(replaced[2:])


def test_sigterm_saves_and_says_so(rows, whole, tmp_path, capsys):
    def asked_to_stop(real, model, batch, cfg, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(model, batch, cfg, step)
    argv = chain_arguments(rows, "pretrain", tmp_path)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with step_loss_replaced(asked_to_stop), pytest.raises(SystemExit) as caught:
        train.main(argv)
    for number, handler in before.items():         # the process would have ended
        signal.signal(number, handler)
    assert caught.value.code == 128 + signal.SIGTERM
    assert "the same command resumes" in capsys.readouterr().out
    assert checkpoint.latest(tmp_path / "pretrain").name == "step_000004"
    train.main(argv)
    assert_same_run(tmp_path, whole, "pretrain")


def test_sigterm_during_the_last_save_is_not_lost(rows, tmp_path, monkeypatch):
    real = runs.save

    def stopped(state, step):
        path = real(state, step)
        signal.raise_signal(signal.SIGTERM)
        return path
    argv = chain_arguments(rows, "sft", tmp_path)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(runs, "save", stopped)
        train.main(argv)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert caught.value.code == 128 + signal.SIGTERM and not (tmp_path / "sft").exists()
    assert checkpoint.latest(tmp_path / "pretrain").name == "step_000006"
    train.main(argv)
    assert (tmp_path / "pretrain/eval.json").is_file() and (tmp_path / "sft/eval.json").is_file()


def test_a_run_keeps_its_dtype_on_another_machine(rows, tmp_path, monkeypatch):
    argv = arguments(rows, "pretrain", tmp_path, "--dtype=auto")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    die_at(3, lambda: train.main([*argv, "--save_every=2"]))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    train.main(argv)
    assert meta_of(tmp_path, "pretrain")["dtype"] == "float32"
    monkeypatch.setattr(train.distributed.World, "gather_objects", lambda _, value:   # two ranks
                        [value] + ["float32"] * (value == "bfloat16"))
    train.main([*argv, "--resume=false"])
    assert meta_of(tmp_path, "pretrain")["dtype"] == "float32"


def test_a_restart_by_torchrun_does_not_begin_again(rows, tmp_path, monkeypatch):
    argv = arguments(rows, "pretrain", tmp_path, "--resume=false")
    train.main(argv)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SystemExit, match="--resume=false would begin it again"):
        train.main(argv)
    assert checkpoint.latest(tmp_path / "pretrain").name == "step_000006"


def test_scores_of_weights_that_are_gone_do_not_count(rows, tmp_path, monkeypatch):
    argv, folder = arguments(rows, "pretrain", tmp_path), tmp_path / "pretrain"
    train.main(argv)
    for path in folder.glob("step_*"):
        shutil.rmtree(path)
    monkeypatch.setattr(train, "score", lambda state: 1 / 0)           # stopped before its scores
    with pytest.raises(ZeroDivisionError):
        train.main(argv)
    assert not (folder / "eval.json").exists() and (folder / "eval.json.aside").is_file()


def test_data_that_changes_under_a_chain_is_noticed(rows, tmp_path, monkeypatch):
    pairs, real = tmp_path / "pairs.jsonl", train.train
    shutil.copy(rows / "pairs.jsonl", pairs)

    def edits(*args):
        pairs.write_text(pairs.read_text() * 2)
        return real(*args)
    monkeypatch.setattr(train, "train", edits)
    argv = [f"--pairs={pairs}" if arg.startswith("--pairs=") else arg
            for arg in chain_arguments(rows, "sft", tmp_path / "out")]
    with pytest.raises(SystemExit, match="the data of sft has changed since the start"):
        train.main(argv)


def test_a_run_afresh_sets_the_old_one_aside_only_when_it_can_start(rows, tmp_path, monkeypatch):
    argv, folder = arguments(rows, "pretrain", tmp_path), tmp_path / "pretrain"
    train.main(argv)
    old = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    monkeypatch.setenv("CXX", "/nowhere")
    with pytest.raises(SystemExit, match="torch.compile needs a C"):
        train.main([*argv, "--resume=false", "--compile=true"])
    assert {path.name: path.read_bytes() for path in folder.glob("*.json*")} == old
    assert checkpoint.latest(folder).name == "step_000006"
    train.main([*argv, "--resume=false", "--steps=3"])
    assert checkpoint.latest(folder).name == "step_000003"
    for name, content in old.items():
        assert (folder / f"{name}.aside").read_bytes() == content


# ---------------------------------------------------------------- the loss of a step

def unit(*degrees):
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_the_contrastive_loss_by_hand():
    """Two queries, their positives and one hard negative; the other query has none."""
    x = unit(0, 90, 30, 60, 45, 90)                # q0, q1, p0, p1, n0, an empty text
    batch = data.Batch("retrieval", torch.zeros(6), [1] * 6, None, query_ids=torch.tensor([1, 2]),
                       positive_ids=torch.tensor([3, 4]), negative_ids=torch.tensor([[5], [-1]]),
                       known_ids=torch.tensor([[3], [4]]))
    loss, cosines = train.embedding_loss(x, batch, 1.0, (2,))
    c30, c60, c45 = (math.cos(math.radians(d)) for d in (30, 60, 45))
    each = math.log(1 + math.exp(c60 - c30) + math.exp(c45 - c30))          # n0 counts for both
    assert loss.item() == pytest.approx(each, abs=1e-6)
    assert cosines[0].item() == pytest.approx(c45)


@pytest.mark.parametrize("place", ["in batch", "hard negative"])
def test_all_positives_of_a_row_leave_its_denominator(place):
    """Row 0 has the positives 3 and 4, of which 3 was drawn; row 1 has 4 alone."""
    negatives = {"in batch": [[-1], [-1]], "hard negative": [[4], [-1]]}[place]
    batch = data.Batch("retrieval", torch.zeros(6), [1] * 6, None, query_ids=torch.tensor([1, 2]),
                       positive_ids=torch.tensor([3, 4]), negative_ids=torch.tensor(negatives),
                       known_ids=torch.tensor([[3, 4], [4, -1]]))
    x = unit(0, 90, 30, 60, 60, 90)
    loss, _ = train.embedding_loss(x, batch, 1.0, (2,))
    c30, c60 = (math.cos(math.radians(d)) for d in (30, 60))
    row_1 = math.log(1 + math.exp(c60 - c30))      # against row 0's positive; its own is 4
    assert loss.item() == pytest.approx((0 + row_1) / 2, abs=1e-6)


def test_the_sts_loss_is_cosent_of_the_pairs_averaged_over_dims():
    x, scores = torch.randn(6, 4), torch.tensor([3.0, 1.0, 2.0])
    batch = data.Batch("sts", torch.zeros(6), [1] * 6, None, scores=scores)
    loss, rest = train.embedding_loss(x, batch, 0.5, (2, 4))
    by_hand = [cosent_loss(F.cosine_similarity(x[:3, :d], x[3:, :d]), scores, temperature=0.5)
               for d in (2, 4)]
    assert rest is None and loss.item() == pytest.approx(sum(map(float, by_hand)) / 2, abs=1e-6)


def test_micro_batches_change_nothing_but_the_memory(rows, whole, tmp_path):
    for stage in ("sft", "embed_sup"):
        out = stages_before(stage, whole, tmp_path / stage)
        train.main(chain_arguments(rows, stage, out, "--micro_batch_size=5"))
        for step, line in log(whole, stage).items():
            assert log(out, stage)[step]["loss"] == pytest.approx(line["loss"], rel=2e-4)


def test_the_learning_rate_warms_up_and_falls_towards_its_end():
    cfg = tiny_config(steps=100, warmup=0.1, final_lr=0.25, learning_rate=2.0)
    rates = [train.lr_at(step, cfg) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * (0.25 + 0.75 / 2))             # half of the cosine
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert rates[99] == pytest.approx(0.25 * 2.0, rel=0.01)                # the last step's


def test_matrices_decay_and_norms_do_not():
    cfg = tiny_config(weight_decay=0.3, beta2=0.9, learning_rate=0.25)
    model = tiny_model()
    groups = train.build_optimizer(model, cfg).param_groups
    decayed = {id(p) for p in groups[0]["params"]}
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.3, 0.0)
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (not name.endswith("norm.weight")), name
    assert groups[0]["lr"] == 0.25 and groups[0]["betas"] == (0.9, 0.9)


def test_non_finite_losses_are_skipped_and_then_stop_the_run(rows, tmp_path):
    batches, bad = {}, {2, 3}

    def poisoned(real, model, batch, cfg, step):
        batches[step] = batch
        loss, scores = real(model, batch, cfg, step)
        return (loss * float("nan") if step in bad else loss), scores
    with step_loss_replaced(poisoned):
        train.main(arguments(rows, "pretrain", tmp_path / "a"))
        assert log(tmp_path / "a", "pretrain")[6]["skipped"] == 2
        bad |= set(range(100))
        with pytest.raises(SystemExit, match="step 9, task text: loss nan.*10 such steps in a row"):
            train.main(arguments(rows, "pretrain", tmp_path / "b", "--steps=30"))
    saved = torch.load(tmp_path / "a/pretrain/nonfinite_step2_rank0.pt", weights_only=True)
    assert saved["task"] == "text" and len(saved["ids"]) == sum(saved["lengths"])
    cfg = config(arguments(rows, "pretrain", tmp_path))
    model = train.Conan(cfg.model_config()).init_weights()
    loss, _ = train.step_loss(model, data.Batch(**saved), cfg, 2)          # can be taken once more
    first, _ = train.step_loss(model, batches[2], cfg, 2)
    assert float(loss) == float(first) > 0


def test_a_step_is_skipped_also_where_its_batch_cannot_be_kept(tmp_path, capsys):
    state = SimpleNamespace(counters={"skipped": 0, "in_a_row": 0}, world=ALONE,
                            cfg=SimpleNamespace(run_dir=tmp_path))
    batch = data.lm_batch(torch.zeros(4, 300, dtype=torch.int64), np.arange(4))
    with full_disk(1000):
        runs.skip_step(state, 3, batch, float("nan"), 1.0)
    assert "step 3, task text: loss nan" in (text := capsys.readouterr().out)
    assert "skipped, the batch is not kept: " in text


def test_a_save_that_takes_long_warns_and_the_summary_counts_minutes(rows, tmp_path, capsys,
                                                                     monkeypatch):
    monkeypatch.setattr(runs, "SLOW_SAVE", 0.0)
    began = time.perf_counter()
    train.main(arguments(rows, "pretrain", tmp_path, "--steps=1"))
    minutes = json.loads((tmp_path / "summary.json").read_text())["minutes"]
    assert 0 < minutes <= (time.perf_counter() - began) / 60
    shown = "".join(capsys.readouterr())
    assert re.search(r"warning: saving .*step_000001 took \d+ s; .* torchrun waits 30 s", shown)
    assert "pretrain writes: 'Return the' ->" in shown


def test_the_warm_up_is_the_nearest_whole_number_of_steps():
    cfg = tiny_config(steps=40, warmup=0.07, learning_rate=3.0)            # 2.8 steps
    assert [train.lr_at(step, cfg) for step in range(3)] == pytest.approx([1, 2, 3])


# ---------------------------------------------------------------- what is refused, and how

@pytest.mark.parametrize("more, message", [
    (["--task_weights=clr:1"], "embed_sup needs data: --clr=FILE; where files are named"),
    (["--task_weights=clr:0"], "no task is left"),
    (["--retrieval=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--batch_size=25"], "24 rows are too few for a batch of 25"),
    (["--parallel=fsdp", "--lora_rank=4"], "needs parallel ddp or zero1"),
    (["--evaluate=nowhere"], "nowhere/corpus.jsonl: no such file"),
    (["--evaluate=a/docs,b/docs"], "a/docs, b/docs: two folders to evaluate have one name"),
    (["--n_negatives=51"], "n_negatives 51 exceeds pool_size 6"),
    (["--vocab_size=260", "--text=words.jsonl"], "too few for blocks of 32"),
    (["--text=", "--retrieval=", "--classification="], "trained on text, or on pairs: neither"),
    (["--lora_rank=4", "--text=words.jsonl"], "lora_rank 4: pretrain trains all weights"),
])
def test_a_mistake_is_one_clear_line(rows, tmp_path, more, message):
    stage = "pretrain" if "--text=words.jsonl" in more else "embed_sup"
    write_lines(rows / "words.jsonl", [{"text": "short"}])
    with pytest.raises((SystemExit, ValueError), match=message) as caught:
        train.main(arguments(rows, stage, tmp_path, *more))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*/step_*"))     # before anything was trained


def test_a_mistake_in_a_later_stages_data_shows_before_the_first_stage(tmp_path):
    folder, out = tmp_path / "data", tmp_path / "out"
    argv = ["config/embed_sup.py", f"--data={folder}", f"--out={out}", "--device=cpu"]
    for name, row, message in (
            ("none.jsonl", {}, "pretrain needs data: .*data has no text.jsonl"),
            ("text.jsonl", {"text": "fox"}, "sft needs data: .*data has no pairs.jsonl"),
            ("pairs.jsonl", {"query": "a", "pos": "b"}, "pairs.jsonl: 70 rows are too few for a b"),
            ("pairs.jsonl", {"query": "a", "pos": "b"}, "has no retrieval.jsonl or clr.jsonl or"),
            ("sts.jsonl", {"s1": "a", "score": 1}, "sts.jsonl:1: key 'sentence1' is missing"),
            ("dev/corpus.jsonl", {"_id": 1, "text": "a"}, "corpus.jsonl:1: id or _id must be a"),
            ("text_dev.jsonl", {"txt": "a"}, "text_dev.jsonl:1: key 'text' is missing"),
            ("labels_test.jsonl", {"text": "a"}, "labels_test.jsonl:1: key 'label' is missing"),
            ("test/corpus.jsonl", {"_id": 1, "text": "a"}, "corpus.jsonl:1: id or _id must be a")):
        rows = 200 if "retrieval" in message else 70
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(folder / name, [row] * rows)
        with pytest.raises(SystemExit, match=message):
            train.main(argv)
    assert not out.exists()


def test_a_folder_of_data_must_exist_unless_it_is_the_embedded_one(tmp_path, monkeypatch):
    folder, built = tmp_path / "installed_docs", []
    monkeypatch.setattr(train.toy, "ensure", built.append)
    train.prepare_data([tiny_config("pretrain", data=str(folder))])
    assert built == [str(folder)]
    with pytest.raises(SystemExit, match="there is no folder nowhere; `python -m tools.sets`"):
        train.main(["--stage=pretrain", "--data=nowhere", f"--out={tmp_path}", "--device=cpu"])


def test_a_model_of_another_shape_is_not_continued(rows, whole, tmp_path):
    before = checkpoint.latest(whole / "pretrain")
    cfg = config(arguments(rows, "sft", tmp_path, "--n_layer=3"))
    with pytest.raises(ValueError, match="step_000006: its model has n_layer 2, sft asks for 3"):
        train.train(cfg, train.distributed.start("cpu"), before)


@pytest.mark.parametrize("stage, kind", [("pretrain", "text"), ("embed_sup", "retrieval")])
def test_a_resumed_run_refuses_data_that_changed(rows, tmp_path, stage, kind):
    path = tmp_path / f"{kind}.jsonl"
    path.write_bytes((rows / path.name).read_bytes())
    argv = arguments(rows, stage, tmp_path, "--save_every=2", f"--{kind}={path}")
    die_at(3, lambda: train.main(argv))            # after the checkpoint of step 2
    path.write_text(path.read_text().replace("a", "e", 1))
    with pytest.raises(SystemExit, match=f"step_000002 was trained on other {kind} data: "
                                         f"{re.escape(str(path))} changed"):
        train.main(argv)
    assert max(log(tmp_path, stage)) == 3          # and nothing has happened


def test_a_stage_whose_base_was_trained_anew_is_refused(rows, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    where = checkpoint.latest(out / "pretrain")
    files = {name: checkpoint.load(where, name) for name in checkpoint.entries(where)}
    files["model.pt"] = {name: 2 * p for name, p in files["model.pt"].items()}
    checkpoint.save(out / "pretrain", STEPS, files)
    for stage in ("sft", "embed_sup"):
        with pytest.raises(SystemExit, match="sft/step_000006 started from other weights than "
                                             ".*pretrain/step_000006 has now"):
            train.main(chain_arguments(rows, stage, out))


def test_a_stage_from_random_weights_does_not_pass_for_one_with_a_stage_before_it(rows, whole,
                                                                                  tmp_path):
    out = stages_before("embed_weak", whole, tmp_path)
    train.main(arguments(rows, "embed_weak", out))
    with pytest.raises(SystemExit, match="started from other weights than .*sft/step_000006"):
        train.main(chain_arguments(rows, "embed_weak", out))


def test_a_scored_stage_is_not_scored_on_other_collections(rows, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    train.main(chain_arguments(rows, "embed_sup", out, "--evaluate="))
    assert "embed_sup/step_000006 is scored already; eval.py" in capsys.readouterr().out


def test_a_finished_stage_whose_data_changed_is_not_taken_for_the_next(rows, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    changed = write_lines(tmp_path / "text.jsonl", [{"text": f"other words {i}"}
                                                    for i in range(96)])
    with pytest.raises(SystemExit, match=f"pretrain/step_000006 was trained on other text data: "
                                         f"{changed} new; .*/text.jsonl gone"):
        train.main(chain_arguments(rows, "embed_sup", out, f"--text={changed}"))


def test_starting_afresh_takes_the_new_vocabulary_and_the_new_text(rows, tmp_path):
    """What is cached carries the hash of what it was made from."""
    def tokens_of(*more):
        train.main(arguments(rows, "pretrain", tmp_path, "--steps=1", *more))
        path = checkpoint.latest(tmp_path / "pretrain") / "tokenizer.tiktoken"
        stream = max(tmp_path.glob("tokens-*/*.bin"), key=lambda file: file.stat().st_mtime_ns)
        tokenizer = Tokenizer.load(path)
        return tokenizer, data.np.fromfile(stream, data.np.uint32)
    first, stream = tokens_of("--vocab_size=300")
    other, again = tokens_of("--vocab_size=320", "--resume=false")
    assert (first.vocab_size, other.vocab_size) == (300, 320)
    assert other.eos_id in again
    assert other.decode(again.tolist()) == first.decode(stream.tolist())
    path = write_lines(rows / "elsewhere.jsonl", [{"text": f"quite another text {i}"}
                                                  for i in range(96)])
    last, stream = tokens_of("--vocab_size=300", f"--text={path}", "--resume=false")
    assert last.decode(stream.tolist()).startswith("quite another text 0")
    assert len(list(tmp_path.glob("tokenizer-*"))) == len(list(tmp_path.glob("tokens-*"))) == 3


def test_an_interrupted_stage_does_not_resume_on_another_base(rows, whole, tmp_path):
    argv = chain_arguments(rows, "sft", stages_before("sft", whole, tmp_path), "--save_every=2")
    die_at(3, lambda: train.main(argv))
    with pytest.raises(ValueError, match="sft/step_000002 started from other weights than random"):
        run(ALONE, argv)


def test_a_file_that_nobody_reads_is_named(tmp_path, capsys):
    read = ("text.jsonl", "text/en.jsonl", "held_out/set/a.jsonl", "search/corpus.jsonl.gz",
            "search/queries.jsonl", "text_dev.jsonl", "manifest.json")
    lost = ("retreival.jsonl", "st.ndjson.gz", "retreival/a.jsonl", "pairs/en/a.jsonl")
    for name in (*read, *lost):
        write_lines(tmp_path / name, [{"text": "fox"}])
    train.prepare_data([tiny_config("pretrain", data=str(tmp_path))])
    shown = capsys.readouterr().out
    assert shown.count("warning") == len(lost)
    for name in lost:
        assert f"warning: {tmp_path / name} is not read" in shown


# ---------------------------------------------------------------- what a checkpoint holds

def test_the_instruction_that_a_model_was_trained_with_travels(rows, tmp_path, capsys,
                                                               monkeypatch):
    prompt, scored = "Represent this question for a search", []
    monkeypatch.setattr(train, "evaluate_stage", lambda state: scored.append(state.embedder) or {})
    lines = [json.loads(line) for line in open(rows / "retrieval.jsonl")]
    path = write_lines(rows / "asked.jsonl", [{**row, "prompt": prompt} for row in lines])
    train.main(arguments(rows, "embed_sup", tmp_path, f"--retrieval={path}", "--steps=1",
                         "--query_len=40", "--passage_len=40", "--dtype=bfloat16"))
    assert meta_of(tmp_path, "embed_sup")["prompts"]["retrieval"] == prompt
    assert [(by.prompts["retrieval"], by.dtype, by.max_len) for by in scored] == [
        (prompt, "bfloat16", 40)]
    embedder = Embedder(tmp_path / "embed_sup", device="cpu")
    assert embedder.prompts == data.PROMPTS | {"retrieval": prompt}
    assert "instructions" not in "".join(capsys.readouterr())


def test_rows_with_several_instructions_are_said_so(rows, tmp_path, capsys):
    lines = [json.loads(line) for line in open(rows / "pairs.jsonl")]
    files = [write_lines(rows / f"{name}.jsonl", [{**row, "instruction": text} for row in part])
             for name, text, part in (("a_most", "Find a text", lines[:60]),
                                      ("b_few", "Find a title", lines[60:]))]
    train.main(arguments(rows, "embed_weak", tmp_path, "--steps=1",
                         f"--pairs={','.join(map(str, files))}"))
    assert meta_of(tmp_path, "embed_weak")["prompts"]["retrieval"] == "Find a text"
    assert "several instructions; search and evaluation will use the most frequent one, " \
           "'Find a text'" in "".join(capsys.readouterr())


def test_rows_that_say_there_is_no_instruction_train_without_one(rows, tmp_path):
    lines = [json.loads(line) for line in open(rows / "retrieval.jsonl")]
    path = write_lines(rows / "bare.jsonl", [{**row, "prompt": ""} for row in lines])
    train.main(arguments(rows, "embed_sup", tmp_path, f"--retrieval={path}", "--steps=1"))
    assert meta_of(tmp_path, "embed_sup")["prompts"]["retrieval"] == ""


def test_the_embedder_reads_what_training_wrote(whole):
    embedder = Embedder(whole / "embed_sup", device="cpu")
    texts = ["sort a list", "", "open a file " * 40, "x"]
    vectors = torch.from_numpy(embedder.encode(texts, batch_size=2))
    assert vectors.shape == (4, 32) and vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4))
    saved = train.Conan(train.ConanConfig(**meta_of(whole, "embed_sup")["model"]))
    saved.load_state_dict(state_of(whole, "embed_sup"))
    tokenizer = embedder.tokenizer
    ids = torch.tensor(tokenizer.encode("sort a list") + [tokenizer.eos_id])
    right = F.normalize(saved(ids, [len(ids)]), dim=1)[0].detach()
    assert torch.allclose(right, vectors[0], atol=1e-6)


def test_texts_that_are_cut_are_counted(rows, tmp_path, capsys):
    cut = []

    def noted(real, model, batch, *rest):
        cut.append(batch.truncated)
        assert torch.is_autocast_enabled("cpu")
        return real(model, batch, *rest)
    with step_loss_replaced(noted):
        train.main(arguments(rows, "embed_weak", tmp_path, "--passage_len=16", "--dtype=bfloat16"))
    assert f"embed_weak: texts were cut {sum(cut)} times, queries at 16 tokens, others at 16" in \
        "".join(capsys.readouterr())
    shown = [line["truncated"] for line in log(tmp_path, "embed_weak").values()]
    assert shown == np.cumsum(cut).tolist() and min(cut) > 0


def test_while_a_stage_is_scored_the_first_ctrl_c_ends_the_run(rows, tmp_path, monkeypatch):
    before, seen = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(train, "evaluate_stage", lambda state: seen.append(
        signal.getsignal(signal.SIGINT)) or {})
    train.main(arguments(rows, "pretrain", tmp_path, "--steps=1"))
    assert seen == [before]


@pytest.mark.parametrize("name", ["text_dev.jsonl", "sts_test.jsonl", "test/corpus.jsonl"])
def test_bad_lines_of_what_is_scored_are_never_skipped(tmp_path, name):
    write_lines(tmp_path / "text.jsonl", [{"text": "fox"}])
    write_lines(tmp_path / name, [{"txt": "a"}])
    configs = [tiny_config(stage, data=str(tmp_path), skip_bad_lines=True)
               for stage in train.STAGES]
    with pytest.raises(ValueError, match=rf"{name}:1: key '\w+' is missing"):
        train.prepare_data(configs)
