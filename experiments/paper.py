'''The numbers that the paper printed (Li et al., EMNLP 2025, arXiv 2509.12892), as constants.

    rows(TABLE_3)[-1]            # {"Model": "Conan-embedding-v2", "R@20": 72.5, ...}

Typed from the paper, nothing corrected: where two of its tables disagree, both stand here, and the
tables of this project say so. Every number of ours is measured, none is in this file. Scores are in
percent. In Tables 14 and 15 the paper's own column alone, under mteb's names of the tasks.
'''

# Table 1, Sec. 4.3: MTEB English (classic) and Chinese
TABLE_1 = """Languages | Model | Class. | Clust. | PairClass | Rerank | Retri | STS | Summ. | Avg.
English | e5-mistral-7b-instruct | 79.85 | 51.44 | 88.42 | 49.78 | 57.62 | 84.32 | 36.57 | 67.97
English | stella-en-1.5B-v5 | 89.38 | 57.06 | 88.02 | 50.19 | 52.42 | 83.27 | 36.91 | 69.43
English | NV-Embed-v2 | 87.19 | 47.66 | 88.69 | 49.61 | 62.84 | 83.82 | 35.21 | 69.81
English | gte-Qwen2-7B-instruct | 88.52 | 58.97 | 85.9 | 50.47 | 58.09 | 82.69 | 35.74 | 70.72
English | jasper-en-v1 | 90.27 | 60.52 | 88.14 | 50.0 | 56.05 | 84.37 | 37.19 | 71.41
English | gemini-embedding-exp-03-07 | 90.05 | 59.39 | 87.70 | 48.59 | 64.35 | 85.29 | 38.28 | 73.30
English | Conan-embedding-v2 | 90.98 | 59.96 | 92.35 | 49.07 | 66.24 | 85.12 | 35.48 | 73.52
Chinese | e5-mistral-7b-instruct | 72.96 | 52.30 | 66.31 | 61.38 | 61.75 | 48.34 | - | 59.92
Chinese | gte-Qwen2-1.5B-instruct | 72.53 | 54.61 | 79.50 | 68.21 | 71.86 | 60.05 | - | 67.12
Chinese | bge-multilingual-gemma2 | 75.31 | 59.30 | 79.30 | 68.28 | 73.73 | 55.19 | - | 67.64
Chinese | gte-Qwen2-7B-instruct | 75.77 | 66.06 | 81.16 | 69.24 | 75.70 | 65.20 | - | 71.62
Chinese | xiaobu-embedding-v2 | 76.53 | 65.17 | 85.94 | 72.58 | 76.49 | 64.18 | - | 72.36
Chinese | Conan-embedding-v1 | 76.77 | 66.33 | 85.68 | 72.76 | 76.67 | 63.67 | - | 72.50
Chinese | retrieve-zh-v1 | 76.88 | 66.50 | 85.98 | 72.86 | 76.97 | 63.92 | - | 72.71
Chinese | Conan-embedding-v2 | 76.47 | 68.84 | 92.44 | 74.41 | 78.31 | 65.48 | - | 74.24"""

# Table 2, Sec. 4.3: MTEB English, zero-shot; the first number is the share of unseen tasks
TABLE_2 = """Model | Zero-shot | Class. | Clust. | PairClass | Rerank | Retri | STS | Summ. | Avg.
bge-large-en-v1.5 | 100% | 78.34 | 48.01 | 87.13 | 48.26 | 55.44 | 82.79 | 33.13 | 65.89
multilingual-e5-large-instruct | 95% | 75.54 | 49.89 | 86.24 | 48.74 | 53.47 | 84.72 | 29.89 | 65.53
GIST-Embedding-v0 | 80% | 78.16 | 48.50 | 86.33 | 47.52 | 53.59 | 83.35 | 32.32 | 65.50
UAE-Large-v1 | 100% | 79.08 | 47.86 | 87.25 | 48.35 | 55.91 | 84.37 | 30.13 | 66.40
mxbai-embed-large-v1 | 100% | 79.10 | 47.48 | 87.20 | 48.05 | 55.40 | 84.42 | 32.63 | 66.26
GritLM-7B | 95% | 81.25 | 50.82 | 87.29 | 49.59 | 54.95 | 83.03 | 35.65 | 67.07
e5-mistral-7b-instruct | 95% | 79.85 | 51.44 | 88.42 | 49.78 | 57.62 | 84.32 | 36.57 | 67.97
text-embedding-005 | 95% | 86.03 | 51.91 | 87.62 | 48.84 | 58.77 | 85.18 | 35.05 | 69.60
SFR-Embedding-Mistral | 85% | 80.47 | 54.93 | 88.59 | 50.15 | 59.33 | 84.77 | 36.32 | 69.31
Linq-Embed-Mistral | 95% | 83.00 | 54.07 | 88.44 | 49.44 | 60.14 | 84.69 | 37.26 | 69.80
Conan-embedding-v2 | 95% | 88.35 | 57.34 | 90.97 | 47.21 | 63.84 | 83.77 | 35.20 | 71.43"""

# Table 3, Sec. 4.4: MKQA
TABLE_3 = """Model | R@20 | R@100 | nDCG@10
BM25 | 28.1 | 39.9 | 25.4
mContriever | 56.3 | 67.9 | 44.9
text-embedding-v3 | 62.1 | 69.5 | 48.1
e5-mistral | 62.4 | 70.1 | 47.5
M3-Embedding | 68.8 | 75.5 | 53.2
Conan-embedding-v2 | 72.5 | 80.2 | 59.1"""

# Table 4: (soft mask, CLR, DHNM) -> Multi, Eng, Zh
TABLE_4 = {(1, 0, 0): (61.73, 70.41, 70.99), (0, 1, 0): (62.69, 70.94, 71.41),
           (0, 0, 1): (61.81, 71.50, 72.09), (1, 1, 0): (64.45, 72.14, 71.79),
           (1, 0, 1): (63.03, 72.78, 72.44), (1, 1, 1): (65.17, 73.52, 74.24)}

# Table 5, Sec. 4.6.1: minutes for the English queries of Multilingual Amazon Reviews, one 910B
TABLE_5 = """Model | Model Size (million) | Embedding Dim. | Infer Time (min.) | MRL | Avg.
gte-large-en-v1.5 | 335 | 1024 | 1.12 | ✗ | 65.89
stella-en-1.5B-v5 | 1543 | 1536 | 5.54 | ✓ | 69.43
Linq-Embed-Mistral | 6782 | 4096 | 30.61 | ✗ | 69.80
NV-Embed-v2 | 7851 | 4096 | 33.58 | ✗ | 69.81
gte-Qwen2-7B-instruct | 7613 | 3584 | 31.78 | ✗ | 70.72
Conan-embedding-v2 | 1503 | 3584 | 5.14 | ✓ | 73.52"""

# Table 6: (LoRA's rank, 0: all weights; soft mask) -> Eng
TABLE_6 = {(16, 0): 72.18, (16, 1): 72.12, (32, 0): 72.08, (32, 1): 72.23, (64, 0): 71.83,
           (64, 1): 72.40, (0, 0): 71.50, (0, 1): 73.52}

# Table 8 and 9, Limitations A.2, A.3: recall@20 on MKQA, and shares of the CLR rows in percent
TABLE_8 = """Resource | Proportion | Performance
High-resource | 37% | 70.6
Mid-resource | 45% | 73.47
Low-resource | 18% | 72.19"""
TABLE_9 = """Language Family | Avg. Score | Total Share
Chinese | 70.4 | 37%
Germanic | 74.6 | 36%
Romance | 73.9 | 22%
Slavic | 75.5 | 7%
Arabic | 65.2 | 3%
Korean | 67.5 | 3%
Others | 67.7 | 11%"""

# Table 10 and 11, App. B: pairs of the weakly supervised stage, rows of the supervised one
TABLE_10 = """Categories | Data Format | Numbers
News | (title, content) | 620M
Knowledge Base | (question, answer) | 106M
Social Media | (title, content) | 690M
Web Page | (input, output) | 70M
Academic Paper | (title, content) | 50M
Community QA | (question, answer) | 30M
Instruction datasets | (prompt, response) | 200M"""
TABLE_11 = """Tasks | Data Format | Numbers
STS | (sentence, sentence pairs) | 1.8M
CLR | (text, pos text, neg text) | 3.0M
Retrieval | (text, pos text, neg text) | 3.0M
classification | (text, pos label, neg label) | 2.8M"""

# Table 12, App. C: schedule -> Multi, Eng, Zh
TABLE_12 = {"Linear": (61.73, 70.41, 70.99), "Accelerating": (61.50, 70.51, 70.81),
            "Decelerating": (61.43, 70.01, 70.37)}

# Table 13, App. D.1: recall@20 on MKQA by language
TABLE_13 = """Language | BM25 | mDPR | mContriever | Multilingual-E5-large | \
e5-mistral-7b-instruct | text-embedding-v3 | M3-embedding | Conan-embedding-v2
ar | 13.4 | 33.8 | 43.8 | 59.7 | 47.6 | 55.1 | 63.0 | 65.2
da | 36.2 | 55.7 | 63.3 | 71.7 | 72.3 | 67.6 | 72.0 | 73.1
de | 23.3 | 53.2 | 60.2 | 71.2 | 70.8 | 67.6 | 70.4 | 72.8
es | 29.8 | 55.4 | 62.3 | 70.8 | 71.6 | 68.0 | 70.7 | 73.2
fi | 33.2 | 42.8 | 58.7 | 67.7 | 63.6 | 65.5 | 68.9 | 71.6
fr | 30.3 | 56.5 | 62.6 | 69.5 | 72.7 | 68.2 | 70.8 | 73.5
he | 16.1 | 34.0 | 50.5 | 61.4 | 32.4 | 46.3 | 64.6 | 66.7
hu | 26.1 | 46.1 | 57.1 | 68.0 | 68.3 | 64.0 | 67.9 | 70.2
it | 31.5 | 53.8 | 62.0 | 71.2 | 71.3 | 67.6 | 70.3 | 73.9
ja | 14.5 | 46.3 | 50.7 | 63.1 | 57.6 | 64.2 | 67.9 | 71.8
km | 20.7 | 20.6 | 18.7 | 18.3 | 23.3 | 25.7 | 59.5 | 62.4
ko | 18.3 | 36.8 | 44.9 | 58.9 | 49.4 | 53.9 | 63.3 | 67.5
ms | 42.3 | 53.8 | 63.7 | 70.2 | 71.1 | 66.1 | 72.3 | 78.4
nl | 42.5 | 56.9 | 63.9 | 73.0 | 74.5 | 68.8 | 72.3 | 75.6
no | 38.5 | 55.2 | 63.0 | 71.1 | 70.8 | 67.0 | 71.6 | 76.9
pl | 28.7 | 50.4 | 60.9 | 70.5 | 71.5 | 66.1 | 70.4 | 76.7
pt | 31.8 | 52.5 | 61.0 | 66.8 | 71.6 | 67.7 | 70.6 | 74.8
ru | 21.8 | 49.8 | 57.9 | 70.6 | 68.7 | 65.1 | 70.0 | 74.3
sv | 41.1 | 54.9 | 62.7 | 72.0 | 73.3 | 67.8 | 71.5 | 74.8
th | 28.4 | 40.9 | 54.4 | 69.7 | 57.1 | 55.2 | 70.8 | 75.9
tr | 33.5 | 45.5 | 59.9 | 67.3 | 65.5 | 64.9 | 69.6 | 75.8
vi | 33.6 | 51.3 | 59.9 | 68.7 | 62.3 | 63.5 | 70.9 | 73.0
zh_cn | 19.4 | 50.1 | 55.9 | 44.3 | 61.2 | 62.7 | 67.3 | 70.4
zh_hk | 23.9 | 50.2 | 55.5 | 46.4 | 55.9 | 61.4 | 66.7 | 71.8
zh_tw | 22.5 | 50.6 | 55.2 | 45.9 | 56.5 | 61.6 | 65.6 | 69.7
Avg | 28.1 | 47.9 | 56.3 | 63.5 | 62.4 | 62.1 | 68.8 | 72.4"""

# Table 14, App. D.2: MTEB English (classic)
TABLE_14 = """Column | Task | Conan-embedding-v2
Retri | ArguAna | 88.18
Retri | ClimateFEVER | 44.45
Retri | CQADupstackRetrieval | 52.11
Retri | DBPedia | 56.33
Retri | FEVER | 92.52
Retri | FiQA2018 | 62.16
Retri | HotpotQA | 83.36
Retri | MSMARCO | 52.38
Retri | NFCorpus | 42.09
Retri | NQ | 82.81
Retri | QuoraRetrieval | 90.58
Retri | SCIDOCS | 30.21
Retri | SciFact | 87.60
Retri | Touche2020 | 31.09
Retri | TRECCOVID | 93.87
STS | BIOSSES | 84.78
STS | SICK-R | 81.91
STS | STS12 | 84.07
STS | STS13 | 86.7
STS | STS14 | 83.18
STS | STS15 | 86.54
STS | STS16 | 87.52
STS | STS17 | 89.09
STS | STS22 | 69.3
STS | STSBenchmark | 87.01
Summ. | SummEval | 30.64
PairClass | SprintDuplicateQuestions | 94.99
PairClass | TwitterSemEval2015 | 80.34
PairClass | TwitterURLCorpus | 89.38
Class. | AmazonCounterfactualClassification | 97.12
Class. | AmazonPolarityClassification | 98.91
Class. | AmazonReviewsClassification | 66.01
Class. | Banking77Classification | 91.05
Class. | EmotionClassification | 93.68
Class. | ImdbClassification | 96.9
Class. | MassiveIntentClassification | 88.71
Class. | MassiveScenarioClassification | 90.1
Class. | MTOPDomainClassification | 95.76
Class. | MTOPIntentClassification | 96.97
Class. | ToxicConversationsClassification | 93.08
Class. | TweetSentimentExtractionClassification | 85.03
Clust. | ArxivClusteringP2P | 56.31
Clust. | ArxivClusteringS2S | 57.03
Clust. | BiorxivClusteringP2P | 52.32
Clust. | BiorxivClusteringS2S | 48.39
Clust. | MedrxivClusteringP2P | 46.19
Clust. | MedrxivClusteringS2S | 46.58
Clust. | RedditClustering | 72.32
Clust. | RedditClusteringP2P | 76.15
Clust. | StackExchangeClustering | 82.13
Clust. | StackExchangeClusteringP2P | 53.64
Clust. | TwentyNewsgroupsClustering | 64.17
Rerank | AskUbuntuDupQuestions | 67.46
Rerank | MindSmallReranking | 33.28
Rerank | SciDocsRR | 88.94
Rerank | StackOverflowDupQuestions | 56.28"""
AVERAGE_14 = 73.09

# Table 15, App. D.2: MTEB Chinese
TABLE_15 = """Column | Task | Conan-embedding-v2
Retri | CmedqaRetrieval | 45.32
Retri | CovidRetrieval | 79.88
Retri | DuRetrieval | 88.72
Retri | EcomRetrieval | 68.12
Retri | MMarcoRetrieval | 83.45
Retri | MedicalRetrieval | 62.56
Retri | T2Retrieval | 84.92
Retri | VideoRetrieval | 76.55
PairClass | Ocnli | 92.74
PairClass | Cmnli | 89.90
Class. | AmazonReviewsClassification | 53.81
Class. | MassiveIntentClassification | 80.51
Class. | MassiveScenarioClassification | 86.45
Class. | IFlyTek | 50.32
Class. | JDReview | 90.09
Class. | MultilingualSentiment | 80.17
Class. | OnlineShopping | 94.19
Class. | TNews | 58.21
Class. | Waimai | 88.45
Rerank | CMedQAv1-reranking | 91.81
Rerank | CMedQAv2-reranking | 89.45
Rerank | MMarcoReranking | 41.59
Rerank | T2Reranking | 71.91
STS | AFQMC | 60.32
STS | ATEC | 59.23
STS | BQ | 74.63
STS | LCQMC | 80.66
STS | PAWSX | 45.17
STS | QBQTC | 43.98
STS | STSB | 81.15
STS | STS22 | 68.78
Clust. | CLSClusteringP2P | 64.48
Clust. | CLSClusteringS2S | 62.83
Clust. | ThuNewsClusteringP2P | 76.11
Clust. | ThuNewsClusteringS2S | 73.59"""
AVERAGE_15 = 72.83


def rows(table):
    """Return a table above as [{column: value}]; "-" is None, what looks like a number is one.

    >>> rows("Model | Dim | Avg." + chr(10) + "a | 64 | 1.5")
    [{'Model': 'a', 'Dim': 64, 'Avg.': 1.5}]
    """
    header, *lines = [line.split(" | ") for line in table.split("\n")]
    return [dict(zip(header, map(_value, line), strict=True)) for line in lines]


def _value(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None if text == "-" else {"✓": True, "✗": False}.get(text, text)
