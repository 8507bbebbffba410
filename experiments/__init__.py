"""Measurements: the paper's tables and claims at the scale at hand, baselines, speed and memory.

    ablation.py   Tables 4, 6, 12, the claims of Sec. 3.2 to 3.4, the curve over LM tokens
    cells.py      trains the cells of those tables
    probes.py     measures that can see a mask: word order, late answers, ranks
    baselines.py  what the method has to beat, and public sets, scored by the same code
    bench.py      speed and memory
    rehearsal.py  what comes before the first step: seconds, memory, disk
    tables.py     scores of whole runs, natural questions, the exercises of docs/exercises.md
    figures.py    the figures
    results.py    intervals over seeds, docs/results.md, the tables of README and docs
    runs.py       what a run leaves behind, read back

Each command writes a file under results/; nothing else in the project imports this folder.
"""
