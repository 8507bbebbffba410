"""README and docs: links and files exist, lengths are true, sentences are short, numbers move in.

The tables between `<!-- results:NAME -->` and `<!-- /results -->` come from results/, by a command
of experiments. They are checked where they are made.
"""
import re
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = r"(?:config|docs|engine|experiments|results|tests|toy|tools)"


def each_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])(test)


def current(page):
    """Return a page without the log of the first edition, whose files are gone."""
    return page.read_text(encoding="utf-8").split("## The first edition")[0]


def prose(text):
    """Return the paragraphs, list items and captions: no code, no tables, no comments."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    lines = ["" if line.startswith(("#", "|", "!")) else re.sub(r"^\s*- ", "\n", line)
             for line in text.splitlines()]
    return [" ".join(block.split()) for block in "\n".join(lines).split("\n\n") if block.strip()]


def sentences(text):
    """Return the sentences of the prose; `Sec. 3.2`, `Eq. 4` and `et al.` end none."""
    for block in prose(text):
        block = re.sub(r"\b(Sec|Eq|App|Fig|al)\. ", r"\1.", block)
        yield from re.split(r"(?<=[.?!])[*)]* ", block)


def anchors(text):
    """Return the link targets of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_the_reader_of_sentences_by_hand():
    text = "# A head\nOne, by Sec. 3.2. Two\nends.\n\n- Three?\n\n| a. | b. |\n```\ncode. x\n```\n"
    assert list(sentences(text)) == ["One, by Sec.3.2.", "Two ends.", "Three?"]
    assert anchors("## The paper's contradictions\n") == {"the-papers-contradictions"}


# ---------------------------------------------------------------- what is named exists

@each_page
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            other = page.parent / path if path else page
            assert other.is_file(), target
            assert not anchor or anchor in anchors(other.read_text(encoding="utf-8")), target


@each_page
def test_files_that_are_named_exist(page):
    """Files and folders of the project in backticks, and whatever a command starts."""
    text = current(page)
    names = re.findall(rf"`({ROOMS}/[\w./-]*|[\w-]+\.py)`", text)
    names += re.findall(r"\b(?:python|pytest|torchrun)\b[^`\n]*? ((?:\w+/)*\w+\.py)", text)
    names += [f"{module.replace('.', '/')}.py" for module in
              re.findall(r"python -m ((?:toy|tools|experiments)\.\w+)", text)]
    assert len(names) > 2 or page.name in ("log.md", "data.md", "serving.md", "results.md")
    assert not [name for name in names if not (ROOT / name).exists()]


@each_page
def test_functions_that_are_named_exist(page):
    text = current(page)
    missing = []
    for module, name in re.findall(r"`((?:\w+\.)?\w+)\.(\w+)(?:\([^`]*\))?`", text):
        path = ROOT / f"{module.replace('.', '/')}.py"
        if path.is_file() and name not in ("py", "jsonl") and \
                name not in path.read_text(encoding="utf-8"):
            missing.append(f"{module}.{name}")
    assert not missing


def test_settings_that_are_named_exist():
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    for page in PAGES:
        text = current(page)
        for line in re.findall(r"train\.py config/\S+ +(--.+)", text):
            for name in re.findall(r"--(\w+)", line.split("#")[0]):
                assert re.search(rf"^    {name}:", source, re.MULTILINE), f"{page.name}: --{name}"


@each_page
def test_no_path_of_a_machine(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.:/])/(?:home|work|root|tmp|mnt|Users|data)/\S*", text)
    assert "shared/" not in text


# ---------------------------------------------------------------- what is said is true

def test_lengths_are_true_within_20_percent():
    rows = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.MULTILINE))
    assert set(rows) == {path.name for path in ROOT.glob("*.py")}
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in rows}
    wrong = {name: lengths[name] for name, shown in rows.items()
             if abs(int(shown) - lengths[name]) > 0.2 * lengths[name]}
    assert not wrong, f"these are the lengths now: {wrong}"


def test_the_memory_table_is_what_a_dry_run_prints(monkeypatch, capsys):
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    command, rows = re.search(r"^\$ python train\.py (.*--dry_run.*)\n([^`]+)```", text,
                              re.MULTILINE).groups()
    monkeypatch.chdir(ROOT)
    train.main(command.split())
    output = capsys.readouterr().out
    assert [row for row in rows.splitlines() if row and row not in output.splitlines()] == []


# ---------------------------------------------------------------- it can be read

def test_sentences_are_short():
    long = [sentence for sentence in sentences(README) if len(sentence.split()) > 25]
    assert not long


def test_tables_of_results_have_their_places():
    opened = re.findall(r"^<!-- results:(\w+) -->$", README, re.MULTILINE)
    assert opened == ["default_run", "ideas"]
    assert len(re.findall(r"^<!-- /results -->$", README, re.MULTILINE)) == len(opened)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- results:") == text.count("<!-- /results -->"), page.name


def test_it_can_be_read_in_one_go():
    assert len(README.splitlines()) <= 200
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 60
