"""Questions for a model, without lm-eval: multiple choice and cloze from JSON lines, scored at every depth at once."""

from rdlm.questions.answers import Answers, answer, baselines, bootstrap_mean, wilson
from rdlm.questions.files import Choice, Cloze, Style, read_questions, write_questions
from rdlm.questions.package import SETS, question_file
from rdlm.questions.pictures import plot_accuracy, plot_steps
from rdlm.questions.scoring import Pair, Scores, score, split
from rdlm.questions.steps import answer_steps

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
    "baselines",
    "bootstrap_mean",
    "plot_accuracy",
    "plot_steps",
    "question_file",
    "read_questions",
    "score",
    "split",
    "wilson",
    "write_questions",
]
