'''The probe of App. B: does an embedding tell "3 fairy tales" from "5 fairy tales"?

    python -m experiments.tables appendix_b

Triplets of a query with a number, a passage with that number, and the same passage with another.
The set is balanced: where 3 is right and 5 wrong, the same passages come again with 5 right and 3
wrong, so a model that ignores numbers, or that always likes the larger one, scores 0.5. The last
group asks the paper's other half, whether a wrong number hides the right subject: there the right
passage has the other number, and the wrong one the query's number and another subject.
UNSPECIFIED: the paper shows one example and no score; the sentences are this project's.
'''
from itertools import permutations

import tasks
from data import PROMPTS

WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = tuple("23456789")
SUBJECTS = {                       # what is asked for, and the passage about it
    "fairy tales": "A picture book for children with {} fairy tales and coloured drawings.",
    "chairs around a table": "The dining set comes as {} chairs around a table made of oak.",
    "days in the mountains": "They walked from hut to hut and spent {} days in the mountains.",
    "bedrooms and a garden": "For rent: a house near the river with {} bedrooms and a garden.",
    "strings on a guitar": "The builder put {} strings on a guitar that he sold to a friend.",
    "goals in one match": "The young striker surprised everybody and scored {} goals in one match.",
    "dimensions of an array": "The function returns the {} dimensions of an array as a tuple.",
    "threads at a time": "By default the pool of workers runs {} threads at a time.",
    "digits after the point": "Prices are rounded, and are shown with {} digits after the point.",
    "retries of a request": "The client gives up after {} retries of a request that has failed.",
}


def triplets(asked=DIGITS, told=DIGITS):
    """Yield (query, right passage, wrong passage): numbers written as `asked`, and as `told`."""
    for subject, passage in SUBJECTS.items():
        for right, wrong in permutations(range(len(DIGITS)), 2):
            yield (f"{asked[right]} {subject}", passage.format(told[right]),
                   passage.format(told[wrong]))


def subject_triplets():
    """Yield triplets whose right passage has another number, the wrong one another subject."""
    subjects = list(SUBJECTS)
    for i, subject in enumerate(subjects):
        other = SUBJECTS[subjects[(i + 1) % len(subjects)]]
        for asked, told in permutations(DIGITS, 2):
            yield f"{asked} {subject}", SUBJECTS[subject].format(told), other.format(asked)


def groups():
    """Return {column of the table: its triplets}."""
    return {"3 for 3": list(triplets()), "three for three": list(triplets(WORDS, WORDS)),
            "3 for three": list(triplets(DIGITS, WORDS)),
            "subject before number": list(subject_triplets())}


def accuracy(encoder, found):
    """Return the share of triplets whose right passage is the nearer one; a tie counts half."""
    left = [query for query, _, _ in found for _ in range(2)]
    right = [passage for _, *both in found for passage in both]
    scores = tasks.similarity(encoder, left, right, prompts=(PROMPTS["retrieval"], None))
    better, worse = scores[::2], scores[1::2]
    return float(((better > worse) + 0.5 * (better == worse)).mean())
