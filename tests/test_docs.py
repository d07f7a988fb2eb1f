"""The documentation does what it says: commands are accepted, quick ones and all Python run on a toy run folder.

What cannot run here is marked by a comment before its fence, `<!-- needs: TPU -->`, `network` or `hours`; its commands
are still parsed.
"""

import itertools
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import pytest
from experiment_scripts import script

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")])
NEEDS = {"TPU", "network", "hours"}
OTHER_PROGRAMS = {
    "source", "cp", "pip", "python3", "pytest", "pre-commit", "make", "gcloud", "curl", "lm_eval", "aiperf",
    "${EDITOR:-vi}",
}  # fmt: skip

mpl.use("Agg")


class Block(NamedTuple):
    """A fenced block: its page, line, language, text and what it needs (None: nothing that is not here)."""

    page: Path
    line: int
    language: str
    text: str
    needs: str | None


def blocks(page):
    """The fenced blocks of a page."""
    text, found = page.read_text(), []
    pattern = r"(?:<!-- needs: (\w+) -->\n+)?^```(\w*)\n(.*?)^```$"
    for match in re.finditer(pattern, text, flags=re.MULTILINE | re.DOTALL):
        needs, language, body = match.groups()
        found.append(Block(page, text.count("\n", 0, match.start(3)), language, body, needs))
    return found


def commands(block):
    """The commands of a bash block as lists of words: without comments, settings of variables and `&&`."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        words.whitespace_split = True
        for known, command in itertools.groupby(words, lambda word: word not in ("&&", "|")):
            command = list(itertools.dropwhile(lambda word: re.match("[A-Z_]+=", word), command))
            if known and command:
                yield command


ALL = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in ALL if block.language == "bash"]


def name_of(block):
    return f"{block.page.relative_to(ROOT)}:{block.line}"


@pytest.fixture(scope="module")
def toy(tmp_path_factory, nano_data):
    """A folder in which runs/quickstart is a run of six steps of the smallest model, on invented text.

    articles/ holds more text.
    """
    folder, prepared = tmp_path_factory.mktemp("toy"), list(nano_data.iterdir())
    (folder / "articles").mkdir()
    for i in range(80):
        (folder / "articles" / f"{i}.txt").write_text(f"Article {i} is about the number {i * i}, and no other.\n" * 5)
    arguments = ["nano", "--steps", "6", "--data.batch-size", "8", "--data.folder", str(nano_data)]
    arguments += ["--data.validation-fraction", "0.1"]  # that of nano_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments, "--run-dir", str(folder / "runs" / "quickstart")])
        assert script("train").main() == 0
    assert list(nano_data.iterdir()) == prepared, "the World Factbook instead"
    return folder


@pytest.fixture
def in_toy(toy, monkeypatch):
    """The working directory is the toy's."""
    monkeypatch.chdir(toy)
    return toy


class Accepted(Exception):
    """A script has understood its arguments."""


def test_fences_say_what_they_need_in_known_words():
    assert {block.needs for block in ALL} <= {*NEEDS, None}
    marks = sum(len(re.findall("^<!-- needs:", page.read_text(), flags=re.MULTILINE)) for page in PAGES)
    assert marks == sum(block.needs is not None for block in ALL), "a mark stands before something that is no fence"


@pytest.mark.parametrize("block", SHELL, ids=name_of)
def test_commands_are_accepted(block, monkeypatch, tmp_path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for program, *arguments in commands(block):
        if program == "python" and arguments[0].startswith("experiments/"):
            refuses_nothing(arguments, monkeypatch)
        elif program == "python":
            assert arguments[:1] == ["-m"]
            assert (ROOT / arguments[1].replace(".", "/")).exists(), arguments
        elif program == "make":
            assert arguments[0] in targets
        elif program.endswith(".sh"):
            assert (ROOT / program).exists(), program
            if arguments and arguments[0].startswith("experiments/"):
                refuses_nothing(arguments, monkeypatch)
        else:
            assert Path(program).name in OTHER_PROGRAMS, f"{program}: say in this test how to check it"


def refuses_nothing(arguments, monkeypatch):
    """`python ARGUMENTS` gets as far as its parsed command line."""
    module = script(arguments[0].removeprefix("experiments/").removesuffix(".py"))
    parse = module.parse_arguments

    def stop(*given, **named):
        try:
            raise Accepted(parse(*given, **named))
        except SystemExit as end:
            raise (end if end.code else Accepted) from None  # --help ends with 0

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        patch.setattr(module, "parse_arguments", stop)
        patch.setattr("rdlm.weights.begin_from", lambda run, depth: run)  # the folder of --init is not there
        with pytest.raises(Accepted):
            module.main()


def test_a_flag_that_is_not_there_is_noticed(monkeypatch):
    with pytest.raises((SystemExit, ValueError)):
        refuses_nothing(["experiments/evaluate.py", "runs/x", "--no-such-flag", "3"], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in SHELL if block.needs is None], ids=name_of)
def test_quick_commands_run(block, in_toy, command, monkeypatch):
    for program, first, *arguments in commands(block):
        assert program == "python", f"{program}: not run by any test, so mark what it needs"
        if first == "-m":
            monkeypatch.setattr(sys, "argv", arguments)
            with pytest.raises(SystemExit, match=r"^0$"):
                runpy.run_module(arguments[0], run_name="__main__")
            continue
        name = first.removeprefix("experiments/").removesuffix(".py")
        code, _, err = command(name, *arguments)
        assert code == 0, (first, arguments, err)


def python_pages():
    return [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", python_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_a_page_runs_from_top_to_bottom(page, in_toy):
    names = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python" and block.needs is None:
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("[2-9]*.py")), ids=lambda path: path.stem)
def test_tutorials_run(path, in_toy):
    runpy.run_path(str(path))


@pytest.mark.slow
@pytest.mark.usefixtures("full_compile")  # it runs longer than it compiles
def test_the_first_tutorial_shows_what_it_says(in_toy):
    """More recurrences than in training help words four times as long. (How much depends on rounding.)"""
    curves = runpy.run_path(str(ROOT / "examples" / "1_depth_curve.py"))["curves"]
    assert curves[8][3] > 0.9
    assert curves[32][5] > curves[32][3] + 0.05


def test_readme_fits_one_screen_and_a_half():
    text = (ROOT / "README.md").read_bytes()
    assert text.count(b"\n") <= 150
    assert len(text) <= 9_000


def slug(heading):
    """The anchor that Markdown renderers give a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def headings(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if ROOT / "docs" not in p.parents], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_outside_the_site_resolve(page):
    """mkdocs checks the links of docs/ itself."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in map(slug, headings(there)), target


def test_pages_and_sections_that_the_code_cites_exist():
    """As in (docs/model.md, Sampling the depth): the words behind a page begin with one of its headings."""
    for path in [path for folder in ("rdlm", "experiments", "tests") for path in (ROOT / folder).rglob("*.py")]:
        text = " ".join(path.read_text().replace("\n#", "\n").split())
        for page, section in re.findall(r"docs/([\w/-]+\.md)(?:, ([A-Z][\w -]*\w))?", text):
            known = headings(ROOT / "docs" / page)
            assert not section or any(section.startswith(heading) for heading in known), (path, page, section)


def test_the_plan_in_contributing_is_the_one_that_is_checked():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers" and c["containers"] == ["rdlm"])
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| floor |") : text.index("`recurrence` and `exits` know")]
    floors = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.strip().splitlines()[2:]]
    assert floors == [[room.strip() for room in re.split(r"[|:]", layer)] for layer in layers]
