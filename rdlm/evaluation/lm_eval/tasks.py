"""Load lm-eval's tasks and run them once per depth; errors in a task become one line."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import jinja2
import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from rdlm.config import InputError, did_you_mean, one_line
from rdlm.evaluation.lm_eval.model import DepthLM, Effort
from rdlm.evaluation.lm_eval.protocols import Protocol

_MODEL = inspect.getfile(DepthLM)
_FIELDS = ("doc_to_text", "doc_to_target", "doc_to_choice")


@dataclasses.dataclass(frozen=True)
class DepthResult:
    """All tasks at one depth, or with the exit rule.

    depth: maximum recurrences. rule: kind of the exit rule, or None. results: {task or group: {"metric,filter":
    value}}, as lm-eval reports them. effort: {task: cost of its requests}. versions, fewshot: of every task.
    """

    depth: int
    rule: str | None
    results: dict[str, dict[str, float]]
    effort: dict[str, Effort]
    versions: dict[str, Any]
    fewshot: dict[str, int]


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> list[Task | Group]:
    """Tasks and groups by name, from lm-eval's own collection or, offline, from the YAML files of a folder.

    A local file reads local data with `dataset_path: json` and `dataset_kwargs: {data_files: {test: FILE}}`, FILE
    relative to the folder where the command runs.

    Raises:
      InputError: unknown names, files that are not tasks, or data that are missing, empty or lack a column.
    """
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include-path {include_path}: not a folder; it should hold lm-eval's task files (.yaml)")
    if not names:
        raise InputError("tasks: name at least one")
    _quiet()
    try:
        manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    except yaml.YAMLError as error:
        raise InputError(f"--include-path {include_path}: a task file is not YAML ({one_line(error)})") from error
    if include_path is not None:
        _check_files(include_path)
    loaded: list[Task | Group] = []
    for name in dict.fromkeys(names):
        if name not in manager.all_tasks:
            where = "" if include_path is None else f" in {include_path}"
            raise InputError(f"task {name!r}: unknown{where}.{did_you_mean(name, manager.all_tasks)}")
        found = _load(manager, name)
        for task in found:
            for leaf in [task] if isinstance(task, Task) else task.get_all_tasks():
                _check_columns(leaf, local=include_path is not None)
        loaded += found
    # lm-eval refuses a task that comes twice, alone and in a group; its results stand beside those of the group.
    grouped = {leaf.task_name for group in loaded if isinstance(group, Group) for leaf in group.get_all_tasks()}
    return [task for task in loaded if isinstance(task, Group) or task.task_name not in grouped]


def evaluate(
    lm: DepthLM, tasks: Sequence[Task | Group], protocol: Protocol, limit: int | None = None
) -> list[DepthResult]:
    """Every task at every row of `lm` (its depths, then its exit rule), as `protocol` says.

    limit: only the first documents of each task.

    Raises:
      InputError: a request that the model cannot answer, or a document that lacks a column.
    """
    leaves = [leaf for t in tasks for leaf in ([t] if isinstance(t, Task) else t.get_all_tasks())]
    rows, no_names = [], TaskManager(include_defaults=False)  # its own would read 13,000 files to find no name in them
    for row, (depth, rule) in enumerate(lm.rows):
        lm.row = row
        try:
            results = simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=no_names,
                num_fewshot=protocol.fewshot,
                limit=limit,
                log_samples=False,
                apply_chat_template=protocol.chat,
                fewshot_as_multiturn=protocol.multiturn,
                system_instruction=protocol.system,
                bootstrap_iters=1000,
            )
        except (jinja2.UndefinedError, KeyError) as error:
            raise InputError(f"tasks: a document has no column for its template ({one_line(error)})") from error
        except Exception as error:  # whatever a task's own code and lm-eval's checks raise
            ours = any(frame.filename == _MODEL for frame in traceback.extract_tb(error.__traceback__))
            if isinstance(error, InputError) or ours:
                raise  # not the task's fault
            if protocol.fewshot and "population" in str(error):
                raise InputError(f"fewshot = {protocol.fewshot}: a task has fewer examples to put in front") from error
            raise InputError(f"tasks: lm-eval cannot run them ({type(error).__name__}: {one_line(error)})") from error
        effort = {task.task_name: lm.effort(task.instances) for task in leaves}
        numbers = {name: _numbers(found) for name, found in {**results.get("groups", {}), **results["results"]}.items()}
        versions, fewshot = dict(results["versions"]), dict(results["n-shot"])
        rows.append(DepthResult(depth, None if rule is None else rule.kind, numbers, effort, versions, fewshot))
    return rows


def headline(results: dict[str, float]) -> list[tuple[str, float]]:
    """The metric of a task that a table shows, [(filter, value)]: acc_norm, else acc, else exact_match, else the first.

    The name of lm-eval's default filter is "".
    """
    by_metric: dict[str, list[tuple[str, float]]] = {}
    for name, value in results.items():
        metric, _, which = name.partition(",")
        if not metric.endswith("_stderr"):
            by_metric.setdefault(metric, []).append(("" if which == "none" else which, value))
    for metric in ("acc_norm", "acc", "exact_match", *by_metric):
        if metric in by_metric:
            return by_metric[metric]
    return []


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and "," in k}


def _quiet() -> None:
    """Silence lm-eval and datasets, which log every step."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _load(manager: TaskManager, name: str) -> list[Task | Group]:
    try:
        found = manager.load([name])
    except jinja2.TemplateError as error:
        raise InputError(f"task {name!r}: its template does not fit the data ({one_line(error)})") from error
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise InputError(
            f"task {name!r}: its data cannot be found ({one_line(error)}); files are looked for from the folder "
            f"where the command runs, and other data sets need a network"
        ) from error
    except IndexError as error:  # from lm-eval's look at the first document
        known = {"string index out of range": "a choice of its first document is empty"}
        other = "it has no document, or its first one has no choices or a target that is not one of them"
        raise InputError(f"task {name!r}: {known.get(str(error), other)} ({one_line(error)})") from error
    except (StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error  # a file without a line is a StopIteration
        raise InputError(f"task {name!r}: its data are empty or damaged ({one_line(cause)})") from error
    except (KeyError, ValueError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        raise InputError(f"task {name!r}: cannot be loaded ({type(error).__name__}: {one_line(error)})") from error
    groups = found.get("groups", {})
    inside = {leaf.task_name for group in groups.values() for leaf in group.get_all_tasks()}
    return [*(g for n, g in groups.items() if n == name), *(t for n, t in found["tasks"].items() if n not in inside)]


def _check_files(folder: Path) -> None:
    """Refuse YAML files that lm-eval would ignore without a message."""
    for path in sorted(folder.rglob("*.yaml")):
        text = re.sub(r"!function\s+", "", path.read_text(encoding="utf-8", errors="replace"))
        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{path}: not YAML ({one_line(error)})") from error
        if not isinstance(tree, dict) or not ({"task", "group", "dataset_path", "include"} & set(tree)):
            raise InputError(f"{path}: not a task of lm-eval (it names neither task nor group)")


def _check_columns(task: Task, local: bool) -> None:
    name = task.task_name
    documents = task.eval_docs
    if not len(documents):
        raise InputError(f"task {name!r}: its split is empty; there is nothing to evaluate")
    columns = list(getattr(documents, "features", None) or documents[0])
    for field in _FIELDS if local else ():
        value = task.get_config(field)
        # If no column has this name, lm-eval takes the word as text, and every question becomes the same.
        if isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*", value) and value not in columns:
            raise InputError(f"task {name!r}: {field}: column {value!r} is missing (there: {', '.join(columns)})")
    if local and task.OUTPUT_TYPE == "multiple_choice":
        for i, document in enumerate(documents):
            _check_choices(task, document, f"task {name!r}: document {i}")


def _check_choices(task: Task, document: dict[str, Any], where: str) -> None:
    """Refuse an empty choice, and a target that is not one of the choices: lm-eval would count it as wrong."""
    try:
        choices, target = task.doc_to_choice(document), task.doc_to_target(document)
    except Exception as error:  # of the task's templates and functions
        raise InputError(f"{where}: its templates do not fit ({type(error).__name__}: {one_line(error)})") from error
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise InputError(f"{where}: choices {choices!r}: must be texts, none empty")
    for one in target if isinstance(target, list) else [target]:
        if one not in (range(len(choices)) if isinstance(one, int) else choices):
            raise InputError(f"{where}: target {one!r} is not one of the {len(choices)} choices")
