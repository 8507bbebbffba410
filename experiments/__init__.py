"""Measurements: the paper's tables and claims at the scale at hand, speed and memory.

    tables.py      the command line: figures, and every table of the paper by its number
    lab.py         trains the cells of a grid; stats.py: intervals over seeds
    ablation.py    Tables 4, 6, 12: which cells, and what is written of them
    claims.py      what Sec. 3.2 and 3.4 say, looked at in those cells
    scores.py      Tables 1, 2, 5, 14, 15; columns.py brings the task types, numbers.py App. B
    languages.py   Tables 3, 7, 8, 9, 13; used.py: Tables 10, 11
    paper.py       the numbers that the paper printed; layout.py, runs.py: how tables are written,
                   and what a run left behind
    bench.py       speed and memory        questions.py  100 natural questions
    real.py        a folder of public sets exercises.py  the README's exercises
"""
