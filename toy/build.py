"""Build the data folder of a run without data of its own: the built-in corpus and its languages.

    python -m toy.build --out=out/installed_docs     # train.py does it on the first run

corpus.py writes the English files. Here the lexicon (26 languages) adds

    text-languages.jsonl       stage 1: documents of summary lines in one language each
    clr.jsonl                  stage 4: the documentation pairs with the query translated (clr.py)
    clr_test/, clr_dev/        the same 100 questions in every language, to judge and to choose by

Languages are text in stage 1, and are paired with English by CLR in stage 4 alone: the difference
between stages 3 and 4 shows what CLR does. It teaches hardly a word (docs/log.md).
"""
import argparse
import hashlib
import random
import shutil
from pathlib import Path

from clr import LANGUAGES, Gates, build_clr, copy_gate, script_gate
from configurator import run_command
from engine.checkpoint import only_writer
from engine.jsonl import read_jsonl, read_object, write_jsonl, write_object
from toy import corpus, lexicon
from toy.lexicon import LexiconTranslator, Phrasing

VERSION = 8                        # raise it when the files change: old ones are rebuilt
LANGUAGE_SHARE = 0.15              # characters of text-languages.jsonl, as a share of text.jsonl's
LINES = 10                         # of a document in another language
QUESTIONS = 100                    # queries of dev and of test that every language has


def language_documents(summaries, n_characters, translate, phrase, seed=0):
    """Yield {"text", "lang"}: lines of one language, until `n_characters` are written.

    Every language but English has the same chance. Lines are drawn anew for each document.
    """
    rng, langs = random.Random(seed), [lang for lang in translate.table if lang != "en"]
    while n_characters > 0:
        lang, lines = rng.choice(langs), rng.choices(summaries, k=LINES)
        text = "\n".join(phrase(translate.words(line, lang), lang, rng) for line in lines)
        n_characters -= len(text)
        yield {"text": text, "lang": lang}


def write_questions(folder, source, translate):
    """Write the first `QUESTIONS` queries of a collection's folder in all languages."""
    queries = list(read_jsonl(source / "queries.jsonl"))[:QUESTIONS]
    corpus.write_collection(
        folder, ({**row, "lang": "en"} for row in read_jsonl(source / "corpus.jsonl")),
        ({"id": f"{query['id']}/{lang}", "lang": lang, "text": query["text"] if lang == "en" else
          translate(query["text"], lang)} for query in queries for lang in LANGUAGES),
        ((f"{query['id']}/{lang}", query["id"]) for query in queries for lang in LANGUAGES))


def write_languages(folder):
    """Add the files in other languages to the English ones; return {what: how many}."""
    translate, phrase, rng = LexiconTranslator(), Phrasing(), random.Random(0)
    if missing := translate.table.keys() - phrase.frames.keys() - {"en"}:
        raise ValueError(f"{lexicon.HERE / 'phrasing.tsv'}: no row for {', '.join(missing)}")
    pairs = list(read_jsonl(folder / "pairs" / "documentation.jsonl"))
    size = sum(len(row["text"]) for row in read_jsonl(folder / "text.jsonl"))
    n_documents = write_jsonl(folder / "text-languages.jsonl", language_documents(
        [row["input"] for row in pairs], LANGUAGE_SHARE * size, translate, phrase))
    gates = Gates(script_gate(0.2), copy_gate)
    n_clr = write_jsonl(folder / "clr.jsonl", build_clr(
        ({"query": row["input"], "pos": [row["output"]]} for row in pairs),
        lambda text, lang: phrase(translate.words(text, lang), lang, rng), gates=gates))
    for split in ("dev", "test"):
        write_questions(folder / f"clr_{split}", folder / split, translate)
    return {"documents in other languages": n_documents, "clr": n_clr,
            "dropped": dict(gates.dropped)}


def ensure(folder):
    """Build all files in `folder`, unless they are there and made of the same; return the counts.

    What they are made of: the installed packages' versions, the lexicon's tables, this code's
    VERSION. manifest.json says so when all is there. Raises ValueError for a folder of other files.
    """
    folder, place = Path(folder), Path(folder) / "manifest.json"

    def manifest():
        return read_object(place) if place.is_file() else {}
    tables = b"".join(path.read_bytes() for path in sorted(lexicon.HERE.glob("*.tsv")))
    made_of = {"toy": VERSION, "tables": hashlib.sha256(tables).hexdigest(), **corpus.versions()}
    if manifest().get("versions") == made_of:
        return manifest()
    if "versions" not in manifest() and any(
            not path.name.startswith((".lock", "manifest.json.")) for path in folder.glob("*")):
        raise ValueError(f"{folder} holds something else than the built-in corpus; delete it, "
                         "or name another folder")
    with only_writer(folder):
        if manifest().get("versions") != made_of:              # another process may have built it
            print(f"building {folder}, once: about half a minute", flush=True)
            write_object(place, {"versions": {}})
            shutil.rmtree(folder / "pairs", ignore_errors=True)    # an older one may have had more
            write_object(place, {"versions": made_of} | corpus.write(folder)
                         | write_languages(folder))
    return manifest()


def main():
    """Build the folder on the command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m toy.build",
                                     description="build the built-in corpus in 26 languages")
    parser.add_argument("--out", default="out/installed_docs", help="folder to write")
    counts = ensure(parser.parse_args().out)
    print(", ".join(f"{key} {value}" for key, value in counts.items() if key != "versions"))


if __name__ == "__main__":
    run_command(main)
