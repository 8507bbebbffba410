"""Measurements: the paper's tables and claims at the scale at hand, baselines, speed and memory.

    baselines.py   what the method has to beat, scored by the same code
    ablation.py    Tables 4, 6, 12, the claims of Sec. 3.2 and 3.4, the curve over LM tokens
    cells.py       trains the cells of those tables; intervals over seeds
    probes.py      measures that can see a mask: word order, late answers, numbers, ranks
    tables.py      tables of a finished run: MKQA (Tables 3, 8, 9, 13), Table 5, Appendix B
    figures.py     the figures        results.py   docs/results.md and the tables of the README
    real.py        a folder of public sets         questions.py  natural questions
    exercises.py   the exercises of docs/exercises.md            bench.py  speed and memory
    paper.py       the numbers that the paper printed

Each writes a file under results/; nothing else in the project imports this folder.
"""
