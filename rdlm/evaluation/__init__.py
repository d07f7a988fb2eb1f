"""How good is a model at depth r?

depth           loss and accuracy against r, at fixed depths and with exit rules
difficulty      accuracy on a procedural task, by its difficulty
scoring         log-likelihoods of continuations
questions       accuracy on multiple choice and cloze questions, with intervals and baselines
question_files  files of questions
question_sets   two question sets from a pinned package
answer_steps    recurrences that a generated answer takes
calibration     exit thresholds with a guarantee
held_out        examples that a run was not trained on
lm_eval         lm-eval's tasks; needs the extra `eval`
"""

from rdlm.evaluation.answer_steps import answer_steps, check_memory_of_steps, longest_prompt
from rdlm.evaluation.question_files import Choice, Cloze, Style, read_questions, write_questions
from rdlm.evaluation.question_sets import SETS, question_file
from rdlm.evaluation.questions import Answers, answer, as_pairs, baselines, bootstrap_mean, wilson
from rdlm.evaluation.scoring import Pair, Scores, cut_left, cut_pair, is_cut, score, split

__all__ = [
    "SETS",
    "Answers",
    "Choice",
    "Cloze",
    "Pair",
    "Scores",
    "Style",
    "answer",
    "answer_steps",
    "as_pairs",
    "baselines",
    "bootstrap_mean",
    "check_memory_of_steps",
    "cut_left",
    "cut_pair",
    "is_cut",
    "longest_prompt",
    "question_file",
    "read_questions",
    "score",
    "split",
    "wilson",
    "write_questions",
]
